"""Tests of the page: its messages anywhere, the page itself in a headless Chromium where there is one."""

import importlib.util
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.parse import urlparse

import numpy as np
import pytest
import soundfile
from test_model_folder import make_export
from test_pictures import noise

from dsd_modules import web
from dsd_modules.inference import SeparatedRecording, SepformerDSDSeparation

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"),
    *("--use-fake-ui-for-media-stream", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
]
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
in_a_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (make test-web installs them)")


# Messages


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("/tmp/x/a & b.wav is empty: it has no samples."), "a &amp; b.wav is empty: it has no samples."),
        (OSError(28, "No space left on device", "/tmp/y/v_spk1.wav"), "/tmp/y/v_spk1.wav: No space left on device"),
        (OSError("broken"), "a &amp; b.wav: broken"),
        (RuntimeError("out of memory"), "a &amp; b.wav: RuntimeError: out of memory"),
    ],
)
def test_faults_are_one_sentence(error, sentence):
    assert web.say_fault(error, "/tmp/x/a & b.wav") == f'<p role="alert">{sentence}</p>'


def test_figures_of_a_separation():
    separator = SimpleNamespace(num_blocks=3)
    text = web.describe(separator, SeparatedRecording([], 3600.0, 72.0, 2.25))
    assert re.findall("<dd>(.*?)</dd>", text) == ["1:00:00", "72.0 s", "0.020", "2.25 of 3"]
    text = web.describe(separator, SeparatedRecording([], 2.0, 25.0, 3.0))
    assert re.findall("<dd>(.*?)</dd>", text) == ["2.00 s", "25.0 s", "12", "3 of 3"]
    assert "<dd>10</dd>" in web.describe(separator, SeparatedRecording([], 2.0, 19.94, 3.0))


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        web.main([*arguments])
    return stop.value.code


def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command() == "error: the page needs gradio, which `make web` installs and starts it with."
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__spec__=object()))
    missing = command("--model", str(tmp_path / "none"))
    assert missing.startswith("error: ")
    assert str(tmp_path / "none") in missing
    folder = make_export(tmp_path / "exported")
    assert "device can only be one of this machine" in command("--model", str(folder), "--device", "tpu9")
    assert command("--port", "70000") == 2
    assert "can only be 1 to 65535, but got 70000" in capsys.readouterr().err


@pytest.mark.parametrize("path", web.EXAMPLES.values(), ids=list(web.EXAMPLES))
def test_examples(path):
    info = soundfile.info(path)
    assert (info.samplerate, info.channels) == (8000, 1)
    assert 4 <= info.duration <= 6
    assert path.stat().st_size < 100_000


# The page in a browser


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """``python -m dsd_modules.web`` with a tiny model of 2 speakers and blocks, or of 3."""

    def __init__(self, folder, size):
        self.model = make_export(folder / "run" / "exported", num_spks=size, num_blocks=size)
        self.port = free_port()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.process = self.start(TMPDIR=str(self.temporary))
        self.first_line = self.process.stdout.readline()

    def start(self, **environment):
        arguments = ["--model", str(self.model.parent), "--port", str(self.port), "--device", "cpu"]
        return subprocess.Popen(
            [sys.executable, "-m", "dsd_modules.web", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def separate(self, path, folder, **options):
        """What the page should give: a list of (int16 samples, sample rate)."""
        separator = SepformerDSDSeparation.from_hparams(self.model)
        paths = separator.separate_to_files(path, folder, **options).paths
        return [soundfile.read(path, dtype="int16") for path in paths]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """By their number of speakers, started when they are first needed."""
    running = {}

    def serve(size):
        if size not in running:
            running[size] = Server(tmp_path_factory.mktemp("server"), size)
        server = running[size]
        assert server.first_line == f"The page is at http://127.0.0.1:{server.port} (Ctrl+C ends it).\n"
        return server

    yield serve
    for server in running.values():
        server.process.terminate()
    for server in running.values():
        rest, _ = server.process.communicate(timeout=60)
        assert (server.process.returncode, rest) == (0, "")
        assert list(server.temporary.iterdir()) == []  # nothing of the visitors is left


@pytest.fixture
def server(servers):
    return servers(2)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open the page as one more visitor: ``visit(server)``; none may ask anything of another machine."""
    contexts, asked, failures = [], set(), []

    def open_page(server, width=1280):
        context = chromium.new_context(viewport={"width": width, "height": 800}, permissions=["microphone"])
        contexts.append(context)
        context.set_default_timeout(60_000)
        context.on("request", lambda request: asked.add(urlparse(request.url)))
        context.on("weberror", lambda error: failures.append(str(error.error)))
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.port}")
        page.get_by_role("button", name="Separate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    assert failures == []


def give(page, path):
    page.locator("input[type=file]").first.set_input_files(path)
    page.locator("audio").first.wait_for(state="attached")


def separate(page):
    page.get_by_role("button", name="Separate").click()
    page.locator("#message").locator("dl, [role=alert]").wait_for()
    return page.locator("#message").inner_text()


def figures(page):
    """What the page tells of a separation."""
    names, values = (page.locator(f"#message {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def downloads(page, folder):
    """The voices that the page gives, as :meth:`Server.separate` returns them, and their names."""
    voices, names = [], []
    for button in page.get_by_text("Download", exact=True).all():
        with page.expect_download() as download:
            button.click()
        names.append(download.value.suggested_filename)
        download.value.save_as(folder / names[-1])
        voices.append(soundfile.read(folder / names[-1], dtype="int16"))
    return voices, names


def assert_same(voices, expected):
    assert len(voices) == len(expected)
    for (samples, sample_rate), (expected_samples, expected_rate) in zip(voices, expected, strict=True):
        assert sample_rate == expected_rate
        np.testing.assert_allclose(samples, expected_samples, atol=1, rtol=0)


def assert_shown(page, num_spks, num_seconds):
    """The mixture and each voice can be heard and seen."""
    assert page.locator("h2").all_inner_texts() == ["Mixture", *(f"Voice {i + 1}" for i in range(num_spks))]
    results = page.locator("#results")
    for tag in ("img", "audio"):
        assert results.locator(tag).count() == num_spks + 1
    for image in results.locator("img").all():
        assert image.is_visible()
        assert "waveform and spectrogram" in image.get_attribute("alt")
        width, shown = image.evaluate("image => [image.naturalWidth, image.clientWidth]")
        assert width == pytest.approx(2 * shown, rel=0.1)  # so that labels have their size
    for audio in results.locator("audio").all():
        assert audio.is_visible()
        page.wait_for_function("audio => audio.readyState > 0", arg=audio.element_handle())
        assert audio.evaluate("audio => audio.duration") == pytest.approx(num_seconds, abs=0.01)


@in_a_browser
@pytest.mark.parametrize("size", [2, 3])
def test_a_recording_is_separated(tmp_path, servers, visit, size):
    """By models of so many speakers, and as many blocks."""
    server = servers(size)
    path = tmp_path / "a <b> & ü.wav"
    soundfile.write(path, np.stack([noise(44100), noise(44100, seed=1)], 1), 44100)
    page = visit(server)
    assert page.title() == "Speech separation"
    give(page, path)
    separate(page)
    assert figures(page).keys() == {"Recording", "Time taken", "Real-time factor", "Blocks"}
    assert (figures(page)["Recording"], figures(page)["Blocks"]) == ("1.00 s", f"{size} of {size}")
    assert_shown(page, size, 1)
    voices, names = downloads(page, tmp_path)
    assert [name[-9:] for name in names] == [f"_spk{spk}.wav" for spk in range(1, size + 1)]
    assert all(len(samples) == 8000 for samples, _ in voices)
    assert_same(voices, server.separate(path, tmp_path / "expected"))

    page.get_by_role("slider", name="Blocks").fill("1")
    page.get_by_role("button", name="Separate").click()
    page.get_by_text(f"1 of {size}").wait_for()
    assert_same(downloads(page, tmp_path)[0], server.separate(path, tmp_path / "first", num_blocks=1))

    early = page.get_by_label("Stop where a block agrees with the one before")
    assert early.count() == (size >= 3)  # with fewer blocks it could save nothing
    if size >= 3:
        early.check()
        page.get_by_role("slider", name="Agreement (dB)").fill("0")
        page.get_by_role("button", name="Separate").click()
        page.get_by_text(re.compile(r"[23](\.\d+)? of 3")).wait_for()
        assert_same(downloads(page, tmp_path)[0], server.separate(path, tmp_path / "e", exit_si_sdr_db=0.0))


@in_a_browser
@pytest.mark.parametrize("name", web.EXAMPLES)
def test_an_example_is_separated(tmp_path, server, visit, name):
    page = visit(server)
    page.get_by_text(name, exact=True).click()
    page.locator("audio").first.wait_for(state="attached")
    separate(page)
    path = web.EXAMPLES[name]
    assert_shown(page, 2, soundfile.info(path).duration)
    voices, names = downloads(page, tmp_path)
    assert names == [f"{path.stem}_spk1.wav", f"{path.stem}_spk2.wav"]
    assert_same(voices, server.separate(path, tmp_path / "expected"))


@in_a_browser
def test_faults_are_told_and_nothing_is_lost(tmp_path, server, visit):
    page = visit(server)
    assert "There is no recording yet" in separate(page)
    (tmp_path / "text.wav").write_text("no audio at all")
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "nan.wav", np.full(800, math.nan), 8000, subtype="FLOAT")
    for name, message in (
        ("text.wav", "text.wav cannot be read as audio"),
        ("nothing.wav", "nothing.wav is empty"),
        ("empty.wav", "empty.wav is empty: it has no samples."),
        ("nan.wav", "nan.wav holds samples that are NaN or infinite"),
    ):
        give(page, tmp_path / name)
        text = separate(page)
        assert message in text
        assert "\n" not in text.strip()
        assert str(server.temporary) not in text
        assert page.locator("#results img").count() == 0
        page.get_by_label("Clear").click()
        page.get_by_text("The voices will appear here.").wait_for()

    (tmp_path / "notes.txt").write_text("no audio at all")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.txt")
    page.get_by_text("Invalid file type: notes.txt").wait_for()

    page.get_by_text("Two speakers", exact=True).click()  # after a fault it goes on
    page.locator("audio").first.wait_for(state="attached")
    separate(page)
    assert_shown(page, 2, soundfile.info(web.EXAMPLES["Two speakers"]).duration)


@in_a_browser
def test_silence_gives_silence(tmp_path, server, visit):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    page = visit(server)
    give(page, tmp_path / "silence.wav")
    separate(page)
    assert_shown(page, 2, 1)
    assert_same(downloads(page, tmp_path)[0], [(np.zeros(8000), 8000)] * 2)


@in_a_browser
def test_another_recording_clears_the_voices(server, visit):
    page = visit(server)
    page.get_by_text("Two speakers", exact=True).click()
    page.locator("audio").first.wait_for(state="attached")
    separate(page)
    page.get_by_text("Two speakers and noise", exact=True).click()
    page.get_by_text("The voices will appear here.").wait_for()
    assert page.locator("#results img").count() == 0


def hold_the_next_event(page):
    """Keep back what the page tells the server next, which the list returned will hold; all else goes through."""
    held = []
    page.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
    return held


def assert_it_may_come_late(page, held):
    """On a busy machine a separation may have begun, or be over, when the server is told what came before it."""
    separate(page)
    with page.expect_response("**/queue/join*"):
        held[0].continue_()
    page.wait_for_timeout(1000)
    assert_shown(page, 2, 1)


@in_a_browser
def test_a_recording_that_the_server_is_told_of_late(tmp_path, server, visit):
    soundfile.write(tmp_path / "a.wav", noise(8000), 8000)
    page = visit(server)
    held = hold_the_next_event(page)
    with page.expect_request("**/queue/join*"):
        give(page, tmp_path / "a.wav")
    assert_it_may_come_late(page, held)


@in_a_browser
def test_a_removal_that_the_server_is_told_of_late(tmp_path, server, visit):
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, noise(8000), 8000)
    page = visit(server)
    with page.expect_response("**/queue/join*"):
        give(page, tmp_path / "a.wav")
    held = hold_the_next_event(page)
    with page.expect_request("**/queue/join*"):
        page.get_by_label("Clear").click()
    give(page, tmp_path / "b.wav")
    assert_it_may_come_late(page, held)


@in_a_browser
def test_visitors_do_not_mix(tmp_path, server, visit):
    """Two at once, with files of one name."""
    pages, paths = [], []
    for visitor in range(2):
        paths.append(tmp_path / str(visitor) / "meeting.wav")
        paths[-1].parent.mkdir()
        soundfile.write(paths[-1], noise(5 * 8000, seed=visitor), 8000)
        pages.append(visit(server))
        give(pages[-1], paths[-1])
    for page in pages:
        page.get_by_role("button", name="Separate").click()
    for page, path in zip(pages, paths, strict=True):
        page.locator("#message dl").wait_for()
        assert_same(downloads(page, path.parent)[0], server.separate(path, path.parent / "expected"))
    assert [path.name for path in server.temporary.glob("*/*")] == ["gradio"]  # the calls' own folders are gone


@in_a_browser
def test_a_separation_is_stopped(tmp_path, server, visit):
    soundfile.write(tmp_path / "long.wav", noise(30 * 60 * 8000), 8000)
    page = visit(server)
    give(page, tmp_path / "long.wav")
    page.get_by_role("button", name="Separate").click()
    page.get_by_text("of 30:00").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert page.get_by_role("button", name="Separate").is_visible()
    assert not page.get_by_role("button", name="Stop").is_visible()

    page.get_by_role("button", name="Separate").click()
    page.get_by_text("of 30:00").wait_for()
    page.get_by_label("Clear").click()
    page.get_by_text("Stopped.").wait_for()
    give(page, tmp_path / "long.wav")

    page.get_by_role("button", name="Separate").click()
    page.get_by_text("of 30:00").wait_for()
    page.close()
    deadline = time.monotonic() + 60
    while [path.name for path in server.temporary.glob("*/*")] != ["gradio"]:  # it ends when the visitor leaves
        assert time.monotonic() < deadline
        time.sleep(0.1)


@in_a_browser
def test_one_that_waits_for_others_is_stopped(tmp_path, server, visit):
    """At once, and not when its turn has come."""
    soundfile.write(tmp_path / "long.wav", noise(30 * 60 * 8000), 8000)
    others = [visit(server) for _ in range(2)]
    for page in others:
        give(page, tmp_path / "long.wav")
        page.get_by_role("button", name="Separate").click()
        page.get_by_text("of 30:00").wait_for()
    page = visit(server)
    page.get_by_role("button", name="Separate").click()
    page.get_by_text("There is no recording yet").wait_for()
    for stop in ("Stop", "Two speakers"):
        soundfile.write(tmp_path / "a.wav", noise(8000), 8000)
        give(page, tmp_path / "a.wav")
        page.get_by_role("button", name="Separate").click()
        page.get_by_text("waiting for other recordings").wait_for()
        page.get_by_role("button", name=stop, exact=True).click()
        page.get_by_text("Stopped.").wait_for()
        if stop == "Stop":
            page.get_by_label("Clear").click()
            page.get_by_text("The voices will appear here.").wait_for()
    page.get_by_role("button", name="Separate").click()
    page.get_by_text("waiting for other recordings").wait_for()
    assert page.locator("#results img").count() == 0
    for other in others:
        other.get_by_role("button", name="Stop").click()
    page.locator("#message dl").wait_for()
    assert_shown(page, 2, soundfile.info(web.EXAMPLES["Two speakers"]).duration)


@pytest.mark.skipif("gradio" in MISSING, reason="needs gradio (make test-web installs it)")
def test_voices_of_a_recording_that_was_replaced_are_not_left(tmp_path):
    """Also where the server is told before it begins, or while gradio copies the files."""
    separator = SepformerDSDSeparation.from_hparams(make_export(tmp_path / "exported"))
    page = web.build_page(separator, "model")
    calls = {function.name: function.fn for function in page.fns.values()}
    path = str(web.EXAMPLES["Two speakers"])
    orders = ((10, 0, 15, True), (10, 1, 15, True), (10, 2, 15, True), (10, 1, 5, False), (0, 1, -1, False))
    for asked_ms, num_before, changed_ms, is_stopped in orders:
        visitor = SimpleNamespace(session_hash=f"{asked_ms} {num_before} {changed_ms}")
        messages = calls["separate"](path, 2, False, 30, 800, asked_ms, visitor, progress=lambda *_, **__: None)
        given = [next(messages) for _ in range(num_before)]
        calls["clear"](changed_ms, visitor)
        given += messages
        text = next(value for block, value in given[-1].items() if block.elem_id == "message")
        assert ("Stopped." in text) == is_stopped


@in_a_browser
def test_a_recording_from_the_microphone(tmp_path, server, visit):
    """Chromium's stand-in beeps."""
    page = visit(server)
    page.get_by_label("Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator("audio").first.wait_for(state="attached")
    separate(page)
    (first, sample_rate), _ = downloads(page, tmp_path)[0]
    assert sample_rate == 8000
    assert 1 < len(first) / 8000 < 10
    assert_shown(page, 2, len(first) / 8000)


@in_a_browser
def test_a_narrow_page(server, visit):
    page = visit(server, width=360)
    page.get_by_text("Two speakers", exact=True).click()
    page.locator("audio").first.wait_for(state="attached")
    separate(page)
    assert_shown(page, 2, soundfile.info(web.EXAMPLES["Two speakers"]).duration)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@in_a_browser
def test_a_port_that_is_in_use(server):
    second = server.start()
    output, _ = second.communicate(timeout=120)
    assert output.strip() == f"error: port {server.port} is in use or not allowed; give another one with --port."
    assert second.returncode == 1
