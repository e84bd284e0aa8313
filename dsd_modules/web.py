"""A page to try a trained model on: ``make web``, or ``python -m dsd_modules.web`` where gradio is installed.

It is served to this machine alone (127.0.0.1), asks nothing of any other, and keeps no recording: what is given
and what comes out lie in temporary folders, which end with the page.
"""

import argparse
import html
import importlib.util
import os
import signal
import tempfile
import threading
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import soundfile
import torch

from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.pictures import clock, draw_recordings
from dsd_modules.separate import CHECKOUT, find_model
from shared_modules.errors import RunError, ends_in_one_sentence, mistakes_as_run_errors
from shared_modules.figures import BLUE

EXAMPLES = {
    "Two speakers": Path(__file__).parent / "examples" / "two_speakers.flac",
    "Two speakers and noise": Path(__file__).parent / "examples" / "two_speakers_noise.flac",
}
_KEPT_SECONDS = 24 * 3600  # files of a page that stays open
_CALLS_AT_ONCE = 2  # so that a short recording need not wait for a long one
_WAITING_AT_ONCE = 20  # of gradio's 40 threads, which its other events need, too


def describe(separator, separated):
    """The figures of a separation, as HTML.

    Arguments
    ---------
    separator : SepformerDSDSeparation
    separated : SeparatedRecording

    Returns
    -------
    str
    """
    factor = separated.real_time_factor
    figures = {
        "Recording": _duration(separated.num_seconds),
        "Time taken": _duration(separated.elapsed_seconds),
        "Real-time factor": f"{factor:#.2g}" if factor < 9.95 else f"{factor:.0f}",
        "Blocks": f"{separated.blocks_run:.3g} of {separator.num_blocks}",
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()) + "</dl>"


def _duration(seconds):
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 120 else clock(seconds)


def say_fault(error, path):
    """What was wrong with a recording, as HTML: the sentence of the error, with the file's name for its path.

    Example
    -------
    >>> say_fault(ValueError("/tmp/1/a<b>.wav is empty: it has no samples."), "/tmp/1/a<b>.wav")
    '<p role="alert">a&lt;b&gt;.wav is empty: it has no samples.</p>'
    """
    sentence = str(error)
    if isinstance(error, OSError):
        sentence = f"{error.filename or path}: {error.strerror or error}"
    elif not isinstance(error, ValueError):
        sentence = f"{path}: {type(error).__name__}: {sentence}"
    return f'<p role="alert">{html.escape(sentence.replace(str(path), Path(path).name))}</p>'


class _Stopped(Exception):
    """The visitor stopped the separation, or left."""


@contextmanager
def _turn(turns, wait):
    """Hold one of the turns of a semaphore; until there is one, call ``wait`` ten times a second."""
    while not turns.acquire(timeout=0.1):
        wait()
    try:
        yield
    finally:
        turns.release()


_INVITATION = "<p>The voices will appear here.</p>"
_STOPPED = "<p>Stopped.</p>"
_NOW = "() => performance.now()"  # ms since the page was loaded
_WIDTH_AND_NOW = """(...inputs) => {
    const width = document.querySelector("#results").clientWidth - 26;
    return [...inputs.slice(0, -2), width, performance.now()];
}"""
_CSS = """
.gradio-container { max-width: 1240px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
#title { padding-bottom: 8px; }
#title h1 { font-size: 30px; margin: 0; }
#title p { margin: 4px 0 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#title p.lead { font-size: 18px; color: var(--body-text-color); }
#message p { margin: 0; padding: 12px 16px; border-radius: 8px; border: 1px dashed var(--border-color-primary);
    color: var(--body-text-color-subdued); }
#message p[role=alert] { border: 1px solid #d55e00; border-left-width: 6px; color: var(--body-text-color);
    overflow-wrap: anywhere; }
#message dl { display: flex; flex-wrap: wrap; gap: 4px 40px; margin: 0; }
#message dt { font-size: 13px; color: var(--body-text-color-subdued); }
#message dd { font-size: 20px; margin: 0; font-variant-numeric: tabular-nums; }
.voice { gap: 0 !important; padding: 8px 12px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.voice h2 { font-size: 17px; margin: 0; }
.voice .row { display: grid; grid-template-columns: 80px 1fr 110px; align-items: center; gap: 0 12px; }
.voice .row > * { min-width: 0 !important; }
.dark audio { color-scheme: dark; }
@media (max-width: 640px) {
    .voice .row { grid-template-columns: 1fr 110px; }
    .voice .row > :nth-child(2) { grid-area: 2 / 1 / 3 / 3; }
}
.voice .icon-button-wrapper { display: none; }
.voice img { width: 100%; height: auto; display: block; }
"""


def build_page(separator, model_name):
    """The page, not yet served.

    Arguments
    ---------
    separator : SepformerDSDSeparation
    model_name : str
        What the page calls the model.

    Returns
    -------
    gradio.Blocks
    """
    import gradio

    names = ["Mixture", *(f"Voice {spk}" for spk in range(1, separator.num_spks + 1))]
    turns = threading.Semaphore(_CALLS_AT_ONCE)  # not gradio's queue, where one that waits cannot be stopped
    stops = {}  # from a visitor's session to when its browser last asked for something, and what ends the separation

    def stop(request: gradio.Request):
        _, is_stopped = stops.pop(request.session_hash, (0, threading.Event()))
        is_stopped.set()

    def clear(changed_ms, request: gradio.Request):
        asked_ms, is_stopped = stops.get(request.session_hash, (0, threading.Event()))
        if changed_ms < asked_ms:  # told of it late
            return {message: gradio.skip()}
        is_stopped.set()
        stops[request.session_hash] = changed_ms, is_stopped
        return {message: _INVITATION, results: gradio.update(visible=False)}

    def separate(
        path,
        num_blocks,
        stops_early,
        exit_si_sdr_db,
        width,
        asked_ms,
        request: gradio.Request,
        progress=gradio.Progress(),  # noqa: B008
    ):
        if path is None:
            yield {message: '<p role="alert">There is no recording yet: drop one, record one, or take an example.</p>'}
            return
        changed_ms, is_stopped = stops.get(request.session_hash, (0, None))
        if changed_ms <= asked_ms:  # else told of this late, and it is stopped already
            is_stopped = threading.Event()
            stops[request.session_hash] = asked_ms, is_stopped

        def go_on():
            if is_stopped.is_set():
                raise _Stopped

        def wait():
            go_on()
            progress(0.0, desc="waiting for other recordings")

        def report(done_seconds, total_seconds):
            go_on()
            total_seconds = max(total_seconds, done_seconds)  # a header may promise too little
            progress(done_seconds / (total_seconds or 1), desc=f"{clock(done_seconds)} of {clock(total_seconds)}")

        yield {
            message: "<p>&nbsp;</p>",  # the progress bar lies over it
            results: gradio.update(visible=False),
            start_button: gradio.update(visible=False),
            stop_button: gradio.update(visible=True),
        }
        shown = {start_button: gradio.update(visible=True), stop_button: gradio.update(visible=False)}
        with tempfile.TemporaryDirectory() as folder:
            try:
                go_on()
                with _turn(turns, wait):
                    separated = separator.separate_to_files(
                        path,
                        folder,
                        stem=Path(path).stem,
                        num_blocks=None if stops_early else num_blocks,
                        exit_si_sdr_db=exit_si_sdr_db if stops_early else None,
                        progress=report,
                    )
                    progress(1.0, desc="drawing")
                    num_samples = soundfile.info(separated.paths[0]).frames
                    paths = [path, *separated.paths]
                    recordings = dict(zip(names, paths, strict=True))
                    drawn = draw_recordings(recordings, num_samples, separator.sample_rate, min(max(240, width), 1200))
                go_on()
            except _Stopped:
                shown[message] = _STOPPED
            except Exception as error:  # the page goes on, and its buttons must come back
                if not isinstance(error, ValueError | OSError):  # out of memory, or a bug
                    traceback.print_exc()
                shown[message] = say_fault(error, path)
            else:
                shown |= {message: describe(separator, separated), results: gradio.update(visible=True)}
                shown |= dict(zip(pictures, drawn, strict=True))
                shown |= dict(zip([*players, *downloads], map(str, [*paths, *separated.paths]), strict=True))
            yield shown  # gradio has copied the files when it goes on from here
            if is_stopped.is_set():  # meanwhile
                yield {message: _STOPPED, results: gradio.update(visible=False)}

    with gradio.Blocks(title="Speech separation", analytics_enabled=False, delete_cache=(3600, _KEPT_SECONDS)) as page:
        gradio.HTML(_title(separator, model_name), elem_id="title")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=320):
                recording = gradio.Audio(
                    label="Mixture",
                    sources=["upload", "microphone"],
                    type="filepath",
                    editable=False,
                    buttons=[],
                    waveform_options={"show_recording_waveform": False},
                )
                gradio.Examples(
                    [[str(path)] for path in EXAMPLES.values()],
                    [recording],
                    example_labels=list(EXAMPLES),
                    label="Or take an example",
                    cache_examples=False,
                )
                blocks = gradio.Slider(
                    1,
                    max(2, separator.num_blocks),
                    value=separator.num_blocks,
                    step=1,
                    label="Blocks",
                    info="Fewer: quicker, but less well separated.",
                    visible=separator.num_blocks > 1,
                )
                stops_early = gradio.Checkbox(
                    label="Stop where a block agrees with the one before", visible=separator.num_blocks >= 3
                )
                agreement = gradio.Slider(
                    0,
                    80,
                    value=30,
                    step=1,
                    label="Agreement (dB)",
                    info="SI-SDR. Lower: quicker, but less well separated.",
                    visible=False,
                )
                start_button = gradio.Button("Separate", variant="primary", size="lg")
                stop_button = gradio.Button("Stop", variant="stop", size="lg", visible=False)
            with gradio.Column(scale=5, min_width=560, elem_id="results"):
                message = gradio.HTML(_INVITATION, elem_id="message")
                with gradio.Column(visible=False) as results:
                    pictures, players, downloads = [], [], []
                    for name in names:
                        with gradio.Column(elem_classes="voice"):
                            with gradio.Row(elem_classes="row"):
                                gradio.HTML(f"<h2>{name}</h2>")
                                player = gradio.Audio(
                                    type="filepath",
                                    interactive=False,
                                    container=False,
                                    show_label=False,
                                    buttons=[],
                                    waveform_options={"show_recording_waveform": False},
                                )
                                players.append(player)
                                if name != "Mixture":
                                    downloads.append(gradio.DownloadButton("Download", size="sm"))
                            pictures.append(gradio.HTML())
        width = gradio.Number(800, visible=False)
        now_ms = gradio.Number(0, visible=False)
        stops_early.change(
            lambda is_on: (gradio.update(visible=not is_on), gradio.update(visible=is_on)),
            stops_early,
            [blocks, agreement],
            show_progress="hidden",
        )
        recording.change(
            clear,
            now_ms,
            [message, results],
            js=_NOW,
            trigger_mode="multiple",  # one that waited for the one before would tell a later time
            show_progress="hidden",
        )
        start_button.click(
            separate,
            [recording, blocks, stops_early, agreement, width, now_ms],
            [message, results, start_button, stop_button, *pictures, *players, *downloads],
            js=_WIDTH_AND_NOW,
            show_progress_on=message,
            concurrency_limit=_WAITING_AT_ONCE,
        )
        stop_button.click(stop, queue=False)
        page.unload(stop)
    return page


def _theme():
    import gradio

    # Weights of which gradio ships the whole alphabet; what it fetched from elsewhere would be missing offline.
    sans = (gradio.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")
    return gradio.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=sans, font_mono=("ui-monospace", "monospace")
    ).set(
        body_text_color_subdued="*neutral_500",  # one step darker than gradio's, which is hard to read on white
        button_primary_background_fill=BLUE,
        button_primary_background_fill_dark=BLUE,
        button_primary_background_fill_hover="#005A8E",
        button_primary_background_fill_hover_dark="#005A8E",
        slider_color=BLUE,
        slider_color_dark=BLUE,
        loader_color=BLUE,
        loader_color_dark=BLUE,
        checkbox_background_color_selected=BLUE,
        checkbox_background_color_selected_dark=BLUE,
    )


def _title(separator, model_name):
    facts = [f"Model {model_name}", f"{separator.num_spks} voices", f"{separator.sample_rate / 1000:g} kHz"]
    return (
        "<h1>Speech separation</h1>"
        '<p class="lead">A recording of people who talk at the same time goes in; one recording for each voice comes '
        f"out.</p><p>{html.escape(' · '.join(facts))} · everything stays on this machine</p>"
    )


@ends_in_one_sentence
def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dsd_modules.web", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="of a model or a training run, or name on the hub (default: this checkout's newest)",
    )
    parser.add_argument("--port", type=int, default=7860, help="where the page is served (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    settings = parser.parse_args(arguments)
    if not 0 < settings.port < 2**16:
        parser.error(f"argument --port: can only be 1 to 65535, but got {settings.port}")
    if importlib.util.find_spec("gradio") is None:
        raise RunError("the page needs gradio, which `make web` installs and starts it with.")
    source = find_model(settings.model)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(KeyboardInterrupt):
        with mistakes_as_run_errors():
            separator = SepformerDSDSeparation.from_hparams(source, run_opts={"device": device})
        with tempfile.TemporaryDirectory(prefix="dsd_page_") as folder:
            serve(separator, source.removeprefix(f"{CHECKOUT}/"), settings.port, folder)


def serve(separator, model_name, port, folder):
    """Serve the page until KeyboardInterrupt, which SIGTERM raises as Ctrl+C does.

    Arguments
    ---------
    separator : SepformerDSDSeparation
    model_name : str
        What the page calls the model.
    port : int
    folder : str
        For all temporary files of this process, which are left to the caller.

    Raises
    ------
    RunError
        If the port cannot be had.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tempfile.tempdir = folder
    # Before gradio is imported, which reads this. The last one: it asks itself whether it is there.
    os.environ |= {"GRADIO_TEMP_DIR": str(Path(folder) / "gradio"), "GRADIO_ANALYTICS_ENABLED": "False"}
    os.environ |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    page = build_page(separator, model_name)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            css=_CSS,
            theme=_theme(),
        )
    except OSError:
        raise RunError(f"port {port} is in use or not allowed; give another one with --port.") from None
    print(f"The page is at http://127.0.0.1:{port} (Ctrl+C ends it).", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    main()
