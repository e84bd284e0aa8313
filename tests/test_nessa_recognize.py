"""Tests of python -m nessa_modules.recognize: what it prints, its exit codes, and the whole way with real models."""

import io
import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from profiles_run import CALIBRATION, Aligned, Encoder
from test_inference import speech_like
from test_model_folder import make_export
from test_nessa_encoder import export

from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.separate import find_model
from nessa_modules import recognize
from nessa_modules.alignment import make_alignment
from nessa_modules.encoder import SpeakerEncoder
from nessa_modules.profiles import VoiceProfiles
from nessa_modules.trials import calibrate_thresholds
from shared_modules.recordings import Recording

RATE = 8000


class Spectra(Encoder):
    """A model that hears which of 16 tones are in a recording."""

    sample_rate = RATE

    def encode_recording(self, recording):
        if isinstance(recording, tuple):
            samples, rate = recording
            assert rate == RATE
        else:
            with Recording(recording) as opened:
                samples = np.concatenate(list(opened.blocks(RATE)))
        tones = np.abs(np.fft.rfft(samples, 4 * RATE))[400 : 400 + 16 * 400 : 400]
        if not tones.any():
            raise ValueError(f"{recording} is silent: there is no voice in it.")
        return (tones / np.linalg.norm(tones)).astype(np.float32) @ self.matrix

    def encode_utterances(self, utterances, progressbar=True):
        return torch.from_numpy(np.stack([self.encode_recording(utterance.path) for utterance in utterances]))


V1, V2 = Spectra("v1"), Spectra("v2", 20)


def tones(number, take=0, seconds=1.0, rate=RATE):
    """A speaker: some tones, each take with other strengths."""
    strengths = np.random.default_rng([1, number]).uniform(0, 1, 16) ** 3
    strengths *= np.random.default_rng([2, number, take]).uniform(0.7, 1.3, 16)
    time = np.arange(int(seconds * rate)) / rate
    return 0.1 * sum(s * np.sin(2 * np.pi * (100 + 100 * k) * time) for k, s in enumerate(strengths)) / strengths.sum()


def write(path, samples, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of recordings of three people, and the models that folders stand for."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("ada", "bob", "eve")):
        for take in range(3):
            write(tmp_path / name / f"{take}.wav", tones(number, take))
    encoders = {"old": V1, "new": V2}
    alignments = {"old-to-new": Aligned(V1, V2)}
    monkeypatch.setattr(recognize, "_load_encoder", lambda source, device: encoders[source])
    monkeypatch.setattr(
        recognize, "_load_alignment", lambda arguments: arguments.alignment and alignments[arguments.alignment]
    )
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """The command line in this process: the lines on stdout and stderr."""

    def run(*arguments, code=0):
        assert recognize.main([*map(str, arguments)]) == code
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def store(here, run):
    VoiceProfiles("voices.db", V1).set_calibration(
        [{"false_accept_rate": 0.01, "threshold": 0.95}, {"false_accept_rate": 0.1, "threshold": 0.5}]
    )
    run("enroll", "Ada", "ada/0.wav", "ada/1.wav", "--model", "old")
    run("enroll", "Bob", "bob", "--model", "old")
    return here / "voices.db"


def test_enroll(store, run):
    out, err = run("enroll", "Eve", "eve", "--model", "old")
    assert (out, err) == (["Eve is enrolled with 3 recordings"], [])
    _, err = run("enroll", "Eve", "eve/1.wav", "--model", "old", code=2)
    assert err == [
        "error: There is a profile 'Eve' in voices.db already: remove it first, or add the recordings to it."
    ]
    out, _ = run("enroll", "Eve", "eve/1.wav", "--model", "old", "--add", "--json")
    assert [json.loads(line) for line in out] == [{"store": "voices.db", "name": "Eve", "recordings": 1}]
    _, err = run("enroll", "Finn", "eve/1.wav", "gone.wav", "--model", "old", code=2)
    assert err == ["error: The audio file gone.wav was not found."]
    assert VoiceProfiles(store).names() == ["Ada", "Bob", "Eve"]
    _, err = run("enroll", " ", "eve/1.wav", "--model", "old", code=2)
    assert err == ["error: The name of a profile can only be a text that is not empty, but got ' '."]
    _, err = run("enroll", "Finn", "eve/1.wav", "--model", "new", code=2)
    assert err[0].startswith("error: voices.db is a store of model v1, but the encoder is model v2: load that model")


def test_verify_and_its_exit_codes(store, run):
    out, err = run("verify", "Ada", "ada/2.wav", "--model", "old")
    assert err == []
    assert out[0].startswith("ada/2.wav: accepted as Ada: score 0.9")
    assert out[0].endswith(", threshold 0.950")
    out, _ = run("verify", "Ada", "bob/2.wav", "ada/2.wav", "--model", "old", code=1)
    assert [line.split(":")[1] for line in out] == [" rejected as Ada", " accepted as Ada"]
    out, err = run("verify", "Ada", "gone.wav", "ada/2.wav", "--model", "old", code=2)
    assert len(out) == 1
    assert err == ["error: The audio file gone.wav was not found."]
    out, _ = run("verify", "Ada", "bob/2.wav", "gone.wav", "--model", "old", "--json", code=2)
    first, second = map(json.loads, out)
    assert first.pop("score") < 0.95
    assert first == {
        "recording": "bob/2.wav", "name": "Ada", "accepted": False, "threshold": 0.95, "false_accept_rate": 0.01
    }  # fmt: skip
    assert second == {"recording": "gone.wav", "error": "The audio file gone.wav was not found."}
    out, _ = run("verify", "Ada", "ada/2.wav", "--model", "old", "--false_accept_rate", "0.1")
    assert out[0].endswith(", threshold 0.500")
    _, err = run("verify", "Ada", "ada/2.wav", "--model", "old", "--false_accept_rate", "0.3", code=2)
    assert err == ["error: There are thresholds for the false-accept rates 0.01, 0.1, but got 0.3."]
    _, err = run("verify", "Zoe", "ada/2.wav", "--model", "old", code=2)
    assert err == ["error: There is no profile 'Zoe' in voices.db."]


def test_verify_looks_up_one_name(store, run, monkeypatch):
    def names(self):
        raise AssertionError("all names were read")

    monkeypatch.setattr(VoiceProfiles, "names", names)
    assert run("verify", "Ada", "ada/2.wav", "--model", "old")[0][0].startswith("ada/2.wav: accepted as Ada")


def test_a_name_is_the_same_however_it_is_composed(store, run):
    name = "te\u0301l"
    run("enroll", name, "eve", "--model", "old")
    run("enroll", name, "eve/0.wav", "--model", "old", "--add")
    assert run("verify", name, "eve/1.wav", "--model", "old")[0][0].startswith("eve/1.wav: accepted as t\u00e9l: ")
    assert run("remove", name, "t\u00e9l") == (["t\u00e9l is removed"], [])


def test_identify(store, run, monkeypatch):
    out, _ = run("identify", "ada/2.wav", "eve/2.wav", "--model", "old")
    assert out[0].startswith("ada/2.wav: Ada: score 0.9")
    assert "; next are Bob 0." in out[0]
    assert out[1].startswith("eve/2.wav: nobody known: threshold 0.950; best are ")
    write(store.parent / "quiet.wav", np.zeros(RATE))
    out, err = run("identify", "quiet.wav", "bob", "--model", "old", "--json", "--candidates", 1, code=2)
    assert err == ["error: quiet.wav is silent: there is no voice in it."]
    found = [json.loads(line) for line in out]
    assert [result.get("name") for result in found] == [None, "Bob", "Bob", "Bob"]
    assert "error" in found[0]
    assert set(found[1]) == {"recording", "name", "candidates", "threshold", "false_accept_rate", "num_profiles"}
    assert len(found[1]["candidates"]) == 1
    stdin = SimpleNamespace(buffer=io.BytesIO((store.parent / "ada/2.wav").read_bytes()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    out, _ = run("identify", "-", "--model", "old")
    assert out[0].startswith("stdin: Ada: ")


def test_among_many_profiles_a_stranger_is_accepted_more_often(store, run):
    def notes(*arguments):
        return run("identify", *arguments, "--model", "old")[1]

    assert notes("ada", "eve") == []  # two profiles at 0.01
    assert notes("ada", "eve", "--false_accept_rate", "0.1") == [
        "note: among 2 profiles, at a false-accept rate of 0.1 for each, up to 20 % of strangers' recordings are taken "
        "for somebody: a lower --false_accept_rate makes it fewer"
    ]
    VoiceProfiles(store, V1).enroll_embeddings((f"p{n}", -V1.encode_recording(f"eve/{n % 3}.wav")) for n in range(200))
    assert notes("eve/2.wav") == []  # nobody was named
    (note,) = notes("ada", "bob", "--json")
    assert note.startswith("note: among 202 profiles, at a false-accept rate of 0.01 for each, up to 100 % of ")
    assert run("verify", "Ada", "ada", "--model", "old")[1] == []  # one comparison


def test_mistakes_are_told_before_models_are_loaded(store, run, monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(recognize, "_load_encoder", load)
    monkeypatch.setattr(recognize, "_load_separator", load)
    (store.parent / "empty").mkdir()
    for arguments in (["verify", "Ada"], ["identify"], ["identify", "--mixture"]):
        _, err = run(*arguments, "empty", "--model", "old", code=2)
        assert err == ["error: There is no recording in empty."]
    _, err = run("verify", "Zoe", "ada", "--model", "old", code=2)
    assert err == ["error: There is no profile 'Zoe' in voices.db."]
    store.write_text("x" * 5000)
    for arguments in (["enroll", "Eve"], ["verify", "Ada"], ["identify"], ["identify", "--mixture"]):
        _, err = run(*arguments, "ada", "--model", "old", code=2)
        assert err == ["error: voices.db is no store of voice profiles: it is no SQLite file."]


def test_a_mixture(store, run, monkeypatch):
    voices = np.stack([tones(1, 2), 1e-4 * tones(0, 2), tones(2, 2)], axis=1).astype(np.float32)
    separator = SimpleNamespace(sample_rate=RATE, separate_file=lambda recording, progress: voices)
    monkeypatch.setattr(recognize, "_load_separator", lambda arguments: separator)
    write(store.parent / "meeting.wav", voices.sum(1))
    out, _ = run("identify", "meeting.wav", "--mixture", "--model", "old")
    assert out[0].startswith("meeting.wav, voice 1: Bob: score 0.9")
    assert out[1].startswith("meeting.wav, voice 2: silent (-8")
    assert out[2].startswith("meeting.wav, voice 3: nobody known")
    out, _ = run("identify", "meeting.wav", "--mixture", "--model", "old", "--json")
    found = [json.loads(line) for line in out]
    assert [(result["voice"], result["name"], result["is_silent"]) for result in found] == [
        (1, "Bob", False), (2, None, True), (3, None, False)
    ]  # fmt: skip


def test_a_mixture_through_a_real_separator(store, run):
    folder = make_export(store.parent / "separator")
    write(store.parent / "meeting.wav", speech_like(16000, num_voices=1)[:, 0])
    voices = SepformerDSDSeparation.from_hparams(folder).separate_file(store.parent / "meeting.wav")
    for number in (1, 2):
        write(store.parent / f"voice{number}.wav", voices[:, number - 1].numpy())
        run("enroll", f"V{number}", f"voice{number}.wav", "--model", "old")
    out, _ = run("identify", "meeting.wav", "--mixture", "--separator", folder, "--model", "old")
    for number, line in enumerate(out, start=1):
        assert line.startswith(f"meeting.wav, voice {number}: V{number}: score 1.000")


def test_a_mixture_without_a_separator(store, run, monkeypatch):
    monkeypatch.setattr(recognize, "find_model", partial(find_model, checkout=store.parent))
    _, err = run("identify", "ada/0.wav", "--mixture", "--model", "old", code=2)
    assert err[0].startswith("error: There is no separator here yet: ")
    assert "--separator" in err[0]


def test_remove_and_list(store, run):
    out, err = run("remove", "Zoe", "Ada", code=2)
    assert (out, err) == (["Ada is removed"], ["error: There is no profile 'Zoe' in voices.db."])
    out, _ = run("list")
    assert out == [
        "model:     v1",
        "threshold: 0.950 at 0.01 (the default), 0.500 at 0.1",
        "profiles:  1",
        "  Bob  3 recordings    model v1",
    ]
    out, _ = run("list", "--json")
    assert json.loads(out[0])["profiles"] == [{"name": "Bob", "recordings": 3, "models": ["v1"]}]


def test_migrate(store, run):
    out, _ = run("migrate", "--alignment", "old-to-new", "--model", "new")
    assert out == [
        "2 profiles moved: recordings are recognised with model v2 from now on",
        "threshold: 0.950, now 0.500: that of the alignment's development speakers; to be sure of the rate, use "
        "calibrate with recordings like yours",
        "the threshold at 0.01 counts, unless --false_accept_rate says otherwise",
    ]
    out, _ = run("identify", "ada/2.wav", "--model", "new", "--alignment", "old-to-new")
    assert out[0].startswith("ada/2.wav: Ada: ")
    _, err = run("identify", "ada/2.wav", "--model", "old", code=2)
    assert err == [
        "error: voices.db is scored with alignment a1 of models v1 and v2, but got none: give what it expects, or "
        "migrate it."
    ]
    out, _ = run("list")
    assert out[:2] == ["models:    v1 enrolls, v2 recognises", "alignment: a1"]
    before = VoiceProfiles(store).describe()
    out, err = run("migrate", "--alignment", "old-to-new", "--model", "new")
    assert (out, err) == (["nothing changed: voices.db has these models and this alignment already"], [])
    assert VoiceProfiles(store).describe() == before
    _, err = run("migrate", code=2)
    assert err == ["error: migrate needs --alignment, or --model alone where that model has made all profiles."]
    _, err = run("migrate", "--model", "new", code=2)
    assert "2 of the 2 profiles in voices.db cannot be moved: they were made by model v1 (2)" in err[0]


def test_calibrate(here, run, caplog):
    rows = [f"{number}-{take},{number},dev/{number}-{take}.wav" for number in range(9) for take in range(4)]
    for number in range(9):
        for take in range(4):
            write(here / "dev" / f"{number}-{take}.wav", tones(10 + number, take))
    (here / "dev.csv").write_text("\n".join(["id,speaker,path", *rows]))
    out, _ = run("calibrate", "dev.csv", "--model", "old", "--json")
    known = json.loads(out[0])
    assert known["comparisons"] == 9 * 4 * 8 * 4  # profiles: each 3 of the 4 recordings
    assert [entry["false_accept_rate"] for entry in known["calibration"]] == [0.001, 0.01, 0.05]

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    embeddings = unit(np.stack([[V1.encode_recording(f"dev/{n}-{t}.wav") for t in range(4)] for n in range(9)]))
    trials = [
        (unit(np.delete(embeddings[one], left_out, axis=0).mean(0)) @ embeddings[other, take], one == other)
        for one in range(9) for left_out in range(4) for other in range(9) for take in range(4)
        if one != other or take == left_out
    ]  # fmt: skip
    expected = calibrate_thresholds(*map(np.array, zip(*trials, strict=True)), [0.001, 0.01, 0.05])
    for name in ("threshold", "false_reject_rate"):
        got = [entry[name] for entry in known["calibration"]]
        assert got == pytest.approx([entry[name] for entry in expected], abs=1e-5)

    run("enroll", "Ada", "ada", "--model", "old")
    out, _ = run("verify", "Ada", "ada/2.wav", "--model", "old")
    assert out[0].endswith(f"threshold {expected[1]['threshold']:.3f}")
    out, _ = run("calibrate", "dev.csv", "--model", "old", "--rates", "0.2")
    assert out[0] == "thresholds from 1152 comparisons of different speakers:"
    assert " at a false-accept rate of 0.2, which rejects " in out[1]
    assert out[2:] == ["the threshold at 0.2 counts, unless --false_accept_rate says otherwise"]
    assert VoiceProfiles("voices.db").describe()["false_accept_rate"] == 0.2
    out, _ = run("calibrate", "dev.csv", "--model", "old", "--false_accept_rate", "0.02")
    assert [" at a false-accept rate of 0.02, " in line for line in out[1:5]] == [False, False, True, False]
    assert out[5:] == ["the threshold at 0.02 counts, unless --false_accept_rate says otherwise"]
    out, _ = run("calibrate", "dev.csv", "--model", "old")
    assert out[4:] == ["the threshold at 0.01 counts, unless --false_accept_rate says otherwise"]

    _, err = run("calibrate", "dev.csv", "--model", "old", "--rates", "0.0001", code=2)
    assert err == ["error: dev.csv has too few recordings for any threshold."]
    assert "it needs at least 10000 comparisons of different speakers, but there are 1152." in caplog.text
    pair = ["--store", "two.db", "--alignment", "old-to-new", "--model", "new"]
    _, err = run("calibrate", "dev.csv", *pair, code=2)
    assert err == ["error: Profiles are to be made by model v1, but got v2: give it with --enroll_model."]
    run("calibrate", "dev.csv", *pair, "--enroll_model", "old")
    run("enroll", "Ada", "ada", "--store", "two.db", "--alignment", "old-to-new", "--model", "old")
    out, _ = run("identify", "ada/2.wav", *pair)
    assert out[0].startswith("ada/2.wav: Ada: ")
    (here / "one.csv").write_text("\n".join(["id,speaker,path", rows[0]]))
    _, err = run("calibrate", "one.csv", "--model", "old", code=2)
    assert err == ["error: No speaker has more than 3 utterances, which a profile of num_enroll 3 needs."]
    (here / "one.csv").write_text("\n".join(["id,speaker,path", *rows[:4]]))
    _, err = run("calibrate", "one.csv", "--model", "old", code=2)
    assert err[0].startswith("error: Target and non-target trials are both needed, of two speakers or more")


@pytest.mark.parametrize(
    "arguments",
    [
        ["identify", "ada/0.wav", "--model", "old"],
        ["verify", "Ada", "ada/0.wav", "--model", "old"],
        ["remove", "Ada"],
        ["list"],
        ["migrate", "--alignment", "old-to-new"],
    ],
)
def test_without_a_store(run, arguments, here):
    _, err = run(*arguments, code=2)
    assert err == ["error: There is no store of voice profiles at voices.db: enroll somebody first."]
    assert not (here / "voices.db").exists()


def test_a_store_that_is_none(run, here):
    (here / "voices.db").write_text("x" * 5000)
    for command in (["list"], ["enroll", "Ada", "ada", "--model", "old"]):
        _, err = run(*command, code=2)
        assert err == ["error: voices.db is no store of voice profiles: it is no SQLite file."]
    _, err = run("enroll", "Ada", "ada", "--model", "old", "--store", "no/folder.db", code=2)
    assert err == ["error: no/folder.db: No such file or directory"]


def test_names_and_files_that_a_terminal_would_obey(store, run, here):
    run("enroll", "A\x1b[31m", "eve", "--model", "old")
    out, _ = run("enroll", "two\nlines", "bob", "--model", "old")
    assert out == [r"two\nlines is enrolled with 3 recordings"]
    assert run("remove", "two\nlines")[0] == [r"two\nlines is removed"]
    write(here / "odd\x1b.wav", tones(2, 2))
    out, _ = run("identify", "odd\x1b.wav", "--model", "old")
    assert out[0].startswith(r"odd\x1b.wav: A\x1b[31m: ")
    out, _ = run("list")
    assert any(r"A\x1b[31m" in line for line in out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["identify"],
        ["identify", "a.wav"],
        ["identify", "a.wav", "--model", "old", "--false_accept_rate", "2"],
        ["identify", "a.wav", "--model", "old", "--candidates", "0"],
        ["identify", "a.wav", "--model", "old", "--separator", "folder"],
        ["calibrate", "a.csv", "--model", "old", "--segment_seconds", "-1"],
        ["forget", "Ada"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        recognize.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


HEAVY = ("torch", "speechbrain", "scipy", "sklearn", "matplotlib")


@pytest.mark.parametrize(
    "commands",
    [
        [["--help"], *([command, "--help"] for command in ("enroll", "verify", "identify", "migrate", "calibrate"))],
        [["list"], ["list", "--json"]],
        [["remove", "Ada"]],
    ],
)
def test_what_needs_no_model_starts_without_what_models_need(store, commands):
    code = "import contextlib, sys; from nessa_modules import recognize\n"
    code += f"for command in {commands}:\n with contextlib.suppress(SystemExit): recognize.main(command)\n"
    code += f"sys.exit(', '.join(sys.modules.keys() & {HEAVY}) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_whole_way_with_real_models(tmp_path, monkeypatch, capsys):
    """Enrolled with one model, migrated, and recognised with another of another kind, all from their folders."""
    monkeypatch.chdir(tmp_path)
    for folder, kind in (("old", "ecapa"), ("new", "xvector")):
        export(tmp_path / folder, kind)
    old, new = SpeakerEncoder.from_hparams("old"), SpeakerEncoder.from_hparams("new")
    development = [(tones(number, take), RATE) for number in range(20, 32) for take in range(2)]
    embeddings = [torch.stack([model.encode_recording(r) for r in development]) for model in (old, new)]
    alignment = make_alignment("least_squares", ridge=0.1).fit(*embeddings, np.repeat(np.arange(12), 2))
    alignment.calibration = CALIBRATION
    alignment.save("old-to-new", old.model_id, new.model_id)
    write(tmp_path / "enrolled.flac", tones(0, rate=16000), 16000)
    write(tmp_path / "heard.wav", tones(0, 1))

    def run(command, code=0):
        assert recognize.main([*command.split(), "--device", "cpu"]) == code
        return capsys.readouterr()

    run("enroll Ada enrolled.flac --model old")
    assert "no threshold" in run("verify Ada heard.wav --model old", code=2).err
    assert "load that model, or migrate" in run("verify Ada heard.wav --model new", code=2).err
    run("migrate --alignment old-to-new --model new")
    verified = json.loads(run("verify Ada heard.wav --model new --alignment old-to-new --json", code=0).out)
    profile = old.encode_recording("enrolled.flac")[None]
    expected = alignment.score(profile, new.encode_recording("heard.wav")[None])[0, 0]
    assert verified["score"] == pytest.approx(float(expected), abs=1e-5)
    assert verified["threshold"] == 0.5
    assert "recognises with model" in run("verify Ada heard.wav --model old --alignment old-to-new", code=2).err
