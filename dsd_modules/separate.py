"""Separate recordings from the command line: ``python -m dsd_modules.separate meeting.wav -o out/``."""

import argparse
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shared_modules.errors import RunError, error_line, let_the_main_rank_speak_first, mistakes_as_run_errors
from shared_modules.recording_files import VOICE, find_recordings
from shared_modules.terminal import SecondsBar, leave, positive, printable, write_line

# What needs seconds to import (torch, SpeechBrain) waits until the command line was read and the files were found.

CHECKOUT = Path(__file__).resolve().parents[1]

_MOST_VOICES = 9  # looked for, of an earlier run
_SECONDS_BETWEEN_MESSAGES = 0.1

_EPILOG = """\
examples:
  python -m dsd_modules.separate meeting.wav
  python -m dsd_modules.separate recordings/ more.flac -o out/ --model speechbrain/sepformer-libri2mix
  python -m dsd_modules.separate recordings/ -o out/ --jobs 4
  torchrun --nproc_per_node=8 -m dsd_modules.separate recordings/ -o out/
  ffmpeg -i talk.mp4 -f wav - | python -m dsd_modules.separate - -o out/

Each recording gives OUT/<its folder within the folder given>/<its name>_spk<i>.wav, 16 bit. Where two would give
the same names, as a.wav and a.flac of one folder do, their endings stay: a.wav_spk1.wav, a.flac_spk1.wav. A voice's
file is there whole or not at all.

exit codes: 0 all recordings were separated; 1 some were not: each is named on standard error; 2 nothing was tried:
wrong usage, no model or no recordings; 130 interrupted.
"""


@dataclass(frozen=True)
class Task:
    """A recording and where its voices go.

    ``source`` is its path, None for standard input; ``name`` what messages call it. The voices are
    ``<folder>/<stem>_spk<i>.wav``.
    """

    source: Path | None
    name: str
    folder: Path
    stem: str


@dataclass(frozen=True)
class Outcome:
    """What became of a task: ``kind`` is separated, skipped or failed; ``line`` tells it."""

    kind: str
    line: str


def plan_outputs(found, output):
    """Where the voices of each recording go, no two to the same place.

    Arguments
    ---------
    found : list of (Path or None, Path)
        From :func:`shared_modules.recording_files.find_recordings`.
    output : Path
        The folder of the voices.

    Returns
    -------
    list of Task
        In the order given, each recording once.

    Raises
    ------
    RunError
        If the voices of two recordings would have the same names, or one is a voice of another.

    Example
    -------
    >>> found = [(Path("a.wav"), Path()), (Path("a.flac"), Path()), (Path("d/b.wav"), Path("c"))]
    >>> [f"{task.folder}/{task.stem}" for task in plan_outputs(found, Path("out"))]
    ['out/a.wav', 'out/a.flac', 'out/c/b']
    """
    places = defaultdict(dict)  # by folder and stem: the recordings, each once however it was given
    for path, folder in found:
        stem = path.stem if path else "stdin"
        places[output / folder, stem].setdefault(os.path.realpath(path) if path else None, path)
    tasks = [
        Task(path, str(path or "stdin"), folder, path.name if path and len(paths) > 1 else stem)
        for (folder, stem), paths in places.items()
        for path in paths.values()
    ]
    owners = {}
    for task in tasks:
        other = owners.setdefault((os.path.realpath(task.folder), task.stem), task)
        if other is not task:
            raise RunError(
                f"{other.name} and {task.name} would both be written to {task.folder / task.stem}_spk1.wav: separate "
                "them one after the other with other output folders, or give the folder that holds both."
            )
    for task in tasks:
        folder, name = os.path.split(os.path.realpath(task.source or ""))
        voice = VOICE.fullmatch(name)
        if voice and (folder, voice[1]) in owners:
            raise RunError(
                f"{task.name} would be replaced by a voice of {owners[folder, voice[1]].name}: leave it out, or give "
                "another output folder."
            )
    return tasks


def find_model(source=None, checkout=CHECKOUT):
    """The model to separate with.

    Arguments
    ---------
    source : str, optional
        A folder of a model or of a training run, or a name on the Hugging Face hub. None: the exported model of the
        checkout that was written last.
    checkout : Path
        Where to look for that.

    Returns
    -------
    str

    Raises
    ------
    RunError
        If there is none.

    Example
    -------
    >>> find_model("speechbrain/sepformer-libri2mix")
    'speechbrain/sepformer-libri2mix'
    """
    if source is not None:
        return source
    found = checkout.glob("recipes/*/separation/results/**/exported/hyperparams.yaml")
    newest = max(found, key=lambda path: (path.stat().st_mtime, path), default=None)
    if newest is None:
        raise RunError(
            "There is no model here yet: train a small one with `make demo`, or give one with --model, a folder or a "
            "name on the Hugging Face hub such as speechbrain/sepformer-libri2mix."
        )
    return str(newest.parent)


def separate_task(separator, task, arguments, progress=None):
    """Separate one recording; what goes wrong with it is told, not raised.

    Arguments
    ---------
    separator : dsd_modules.inference.SepformerDSDSeparation
    task : Task
    arguments : argparse.Namespace
        The command line.
    progress : callable, optional
        Called with the seconds done and in all.

    Returns
    -------
    Outcome

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "a_spk1.wav").touch()
    >>> separate_task(None, Task(Path("a.wav"), "a.wav", folder, "a"), argparse.Namespace(overwrite=False)).kind
    'skipped'
    """
    voices = [task.folder / f"{task.stem}_spk{spk}.wav" for spk in range(1, _MOST_VOICES + 1)]
    try:
        existing = [path for path in voices if path.exists()]
        if existing and not arguments.overwrite:
            return Outcome("skipped", f"{task.name}: {existing[0]} is there already; --overwrite replaces it")
        result = separator.separate_to_files(
            sys.stdin.buffer if task.source is None else task.source,
            task.folder,
            task.stem,
            channel=arguments.channel,
            sample_rate=arguments.sample_rate,
            num_blocks=arguments.blocks,
            exit_si_sdr_db=arguments.exit_si_sdr_db,
            progress=progress,
        )
    except Exception as error:  # the rest is still to be done
        fault = str(error)
        if isinstance(error, OSError) and error.strerror:
            fault = f"{error.filename or task.folder}: {error.strerror}"
        elif not isinstance(error, ValueError):  # out of memory, or a bug
            fault = ": ".join([type(error).__name__, *fault.splitlines()[:1]])
        return Outcome("failed", fault if task.name in fault else f"{task.name}: {fault}")
    stale = [str(path) for path in existing if path not in result.paths]
    line = (
        f"{result.num_seconds:7.1f} s  {len(result.paths)} voices  in {result.elapsed_seconds:.2f} s  "
        f"real-time factor {result.real_time_factor:.3f}  blocks {result.blocks_run:.1f} -> {task.folder}/"
    )
    return Outcome("separated", line + (f"  (older: {', '.join(stale)})" if stale else ""))


def main(argv=None):
    """The command line.

    Arguments
    ---------
    argv : list of str, optional
        None: the arguments of the command.

    Returns
    -------
    int
        The exit code, see ``--help``.

    Example
    -------
    >>> main(["meeting.wav", "--output", __file__])
    2
    """
    arguments = _parser().parse_args(argv)
    rank = 0
    try:
        rank, world_size = _place_among_ranks()
        return _separate_all(arguments, rank, world_size)
    except BrokenPipeError:  # nobody reads on, as with `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except RunError as error:
        let_the_main_rank_speak_first(rank)
        write_line(error_line(printable(error), rank), sys.stderr)
        return 2
    except KeyboardInterrupt:
        write_line("interrupted", sys.stderr)
        return 130


def _place_among_ranks():
    """This process's rank and their number, as torchrun and others tell."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(value.isdecimal() for value in given) or int(given[0]) >= int(given[1]):
        raise RunError(f"RANK can only be 0 to WORLD_SIZE - 1, but the environment has {given[0]!r} of {given[1]!r}.")
    return int(given[0]), int(given[1])


def _separate_all(arguments, rank, world_size):
    output = arguments.output
    if os.path.exists(output) and not os.path.isdir(output):
        raise RunError(f"The voices go to a folder, but {output} is a file.")
    found, notes = find_recordings(arguments.recordings, output)
    tasks = plan_outputs(found, output)
    for note in notes if rank == 0 else ():
        write_line(f"note: {printable(note)}", sys.stderr)
    if not tasks:
        raise RunError(f"There is no recording in {', '.join(arguments.recordings)}.")
    if any(task.source is None for task in tasks):
        if sys.stdin.isatty():
            raise RunError("- takes the recording from standard input, but that is the terminal.")
        if arguments.jobs > 1 or world_size > 1:
            raise RunError("- cannot be shared among processes: give a file, or leave out --jobs and torchrun.")
    if arguments.jobs > 1 and world_size > 1:
        raise RunError("--jobs and torchrun both make processes: use one of them.")
    model = find_model(arguments.model)
    if rank == 0:
        write_line(f"model: {printable(model)}")

    own = tasks[rank::world_size]
    report = _Report(own, has_bars=world_size == 1)
    if own:
        num_processes = min(arguments.jobs, len(own))
        separator = _load(model, arguments) if num_processes == 1 else None
        with report:
            if num_processes > 1:
                _separate_in_processes(num_processes, model, own, arguments, report)
            else:
                for index, task in enumerate(own):
                    outcome = separate_task(separator, task, arguments, partial(report.progress, index))
                    report.outcome(index, outcome)
    counts = _join_ranks(report.counts, rank, world_size)
    if counts is not None and counts.total() > 1:
        kinds = ("separated", "skipped", "failed")
        parts = ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])
        write_line(f"{counts.total()} recordings: {parts}")
    return 0 if report.counts["separated"] == len(own) else 1


class _Report:
    """Progress bars on a terminal, and a line for each recording."""

    def __init__(self, tasks, has_bars):
        self.counts = Counter()
        self._names = [printable(task.name) for task in tasks]
        self._width = min(40, max(map(len, self._names), default=0))
        self._options = {"leave": False, "disable": None if has_bars else True, "dynamic_ncols": True}
        self._bars = {}
        self._all = None

    def __enter__(self):
        if len(self._names) > 1:
            form = "{desc}: {n_fmt}/{total_fmt}|{bar}| [{elapsed}<{remaining}]"
            self._all = tqdm(total=len(self._names), desc="recordings", bar_format=form, **self._options)
        return self

    def __exit__(self, *_):
        for bar in [*self._bars.values(), self._all]:
            if bar is not None:
                bar.close()

    def progress(self, index, done_seconds, total_seconds):
        if index not in self._bars:
            self._bars[index] = SecondsBar(self._names[index][:40], **self._options)
        self._bars[index].progress(done_seconds, total_seconds)

    def outcome(self, index, outcome):
        if index in self._bars:
            self._bars.pop(index).close()
        self.counts[outcome.kind] += 1
        line = printable(outcome.line)
        if outcome.kind == "separated":
            write_line(f"{self._names[index]:<{self._width}}  {line}")
        else:
            write_line(f"{'error' if outcome.kind == 'failed' else 'skipped'}: {line}", sys.stderr)
        if self._all is not None:
            self._all.update()


def _load(model, arguments, num_processes=1):
    """The separator, on its device, with this process's share of the cores.

    That it cannot do what is asked for shows here, not with each recording.
    """
    import torch

    from dsd_modules.inference import SepformerDSDSeparation

    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with mistakes_as_run_errors():
        run_opts = {"device": device, "precision": arguments.precision}
        separator = SepformerDSDSeparation.from_hparams(model, run_opts=run_opts)
        options = {"num_blocks": arguments.blocks, "exit_si_sdr_db": arguments.exit_si_sdr_db}
        if any(value is not None for value in options.values()):
            separator.separate_batch(torch.zeros(1, 1000), **options)
    return separator


def _separate_in_processes(num_processes, model, tasks, arguments, report):
    """Each process takes the next recording that none has taken; one that dies takes only its own with it."""
    context = multiprocessing.get_context("spawn")
    num_taken = context.Value("q", 0)
    processes, at_work = {}, {}  # by the reading end of each process's pipe
    waiting = set(range(len(tasks)))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes inherit it: this one ends them
    try:
        for _ in range(num_processes):
            reader, writer = context.Pipe(duplex=False)
            work = writer, num_taken, num_processes, model, tasks, arguments
            process = context.Process(target=_work, args=work, daemon=True)
            process.start()
            writer.close()  # only the process has it: its end is seen
            processes[reader] = process
        signal.signal(signal.SIGINT, handler)
        open_ends = set(processes)
        while open_ends:
            for reader in multiprocessing.connection.wait(open_ends):
                try:
                    index, message = reader.recv()
                except (EOFError, OSError):
                    open_ends.remove(reader)
                    processes[reader].join()
                    if reader in at_work:
                        fault = f"{tasks[at_work[reader]].name}: {_death(processes[reader].exitcode)}"
                        waiting.remove(at_work[reader])
                        report.outcome(at_work[reader], Outcome("failed", fault))
                    continue
                if index is None:
                    raise RunError(message)
                at_work[reader] = index
                if isinstance(message, Outcome):
                    del at_work[reader]
                    waiting.remove(index)
                    report.outcome(index, message)
                else:
                    report.progress(index, *message)
        for index in sorted(waiting):
            report.outcome(index, Outcome("failed", f"{tasks[index].name}: all processes had ended"))
    finally:
        signal.signal(signal.SIGINT, handler)
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _work(writer, num_taken, num_processes, model, tasks, arguments):
    """A process: separate what is left, and tell of it."""
    signal.signal(signal.SIGTERM, leave)
    with contextlib.suppress(BrokenPipeError):  # the main process was killed
        try:
            separator = _load(model, arguments, num_processes)
        except RunError as error:
            writer.send((None, str(error)))
            return
        while True:
            with num_taken.get_lock():
                index = num_taken.value
                num_taken.value += 1
            if index >= len(tasks):
                return
            last = -math.inf

            def tell(*seconds, index=index):
                nonlocal last
                if time.monotonic() - last > _SECONDS_BETWEEN_MESSAGES:
                    last = time.monotonic()
                    writer.send((index, seconds))

            tell(0.0, 0.0)  # so that it is known what the process was at, should it die
            writer.send((index, separate_task(separator, tasks[index], arguments, tell)))


def _join_ranks(counts, rank, world_size):
    """The counts of all ranks that torchrun started, for the first one, and None for the others.

    torchrun ends all once one leaves with an error, so each waits here for the rest.
    """
    if world_size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return counts
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    gathered = [None] * world_size
    torch.distributed.all_gather_object(gathered, counts)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return sum(gathered, Counter()) if rank == 0 else None


def _death(exit_code):
    if exit_code < 0:
        return f"its process was ended by {signal.Signals(-exit_code).name}; out of memory? Fewer --jobs need less"
    return f"its process ended with exit code {exit_code}"


def _rate(text):
    with contextlib.suppress(argparse.ArgumentTypeError):
        return "file" if text == "file" else positive(text)
    raise argparse.ArgumentTypeError(f"can only be file or a whole number of Hz, but got {text!r}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m dsd_modules.separate",
        description="Separate recordings into one file per voice.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recordings",
        nargs="+",
        metavar="RECORDING",
        help="audio files of any format that soundfile reads, folders of them, or - for standard input",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), metavar="OUT", help="folder (default: out)")
    parser.add_argument(
        "--model",
        help="folder of a model or a training run, or name on the Hugging Face hub (default: this checkout's newest)",
    )
    parser.add_argument(
        "--blocks", type=positive, metavar="L", help="run only the first L blocks: faster, less well (default: all)"
    )
    parser.add_argument(
        "--exit_si_sdr_db",
        type=float,
        metavar="X",
        help="stop after the block that agrees with the one before by X dB SI-SDR (models of 3 blocks and more)",
    )
    parser.add_argument("--channel", type=positive, metavar="C", help="take channel C, from 1 (default: their mean)")
    parser.add_argument(
        "--sample_rate",
        type=_rate,
        metavar="file|HZ",
        help="of the voices: the recording's own or so many Hz (default: the model's)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16: faster where the device has it (default: fp32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace voices that are there already")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="number of processes (default: 1)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)  # as an exception, so that nothing half done is left
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
