"""Separation: SpeechBrain's SepformerSeparation against this interface, on the same weights and the same audio.

    python benchmarks/bench_inference.py                                  # full size and demo size, random weights
    python benchmarks/bench_inference.py --model results/demo/exported --audio mixture.wav --seconds 10
    python benchmarks/bench_inference.py --cases streamed --seconds 600 3600 --limit-minutes 60
    python benchmarks/bench_inference.py --quick                          # whether it runs

Each case is a process of its own, so that its peak memory is known: of all that the process holds, the libraries and
the weights included. The processes of one point are alive together and work in turn, one at a time (A B A B), so that a
busy machine slows all of them. The first round warms up; where it takes long it is the only one, and counts. The ratios
are the medians over the rounds of one case's time to SpeechBrain's in the same round. *CPU* is the processor time of
all threads, *RTF* the wall clock per second of audio.

*difference* is the largest one of a sample from SpeechBrain's, as a share of the loudest sample; *SI-SDR* compares with
this interface's own float32 output of all blocks, as the mean over voices. The streamed case reads a file, separates it
window by window and writes files, so it differs in more than rounding; what it gives, and how well the first block
separates, means something for trained models alone. "ONNX int8" is the ONNX file after onnxruntime's dynamic
quantization, "int8" PyTorch's.

A case is left out where it would take longer than the limit, foreseen from a shorter length. One that needs more memory
than allowed, or does not take such a length, is told so, and not tried at longer ones.
"""

import argparse
import logging
import math
import multiprocessing
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

# PyTorch and what needs it are imported in the processes of the cases alone: a process begins with the peak memory of
# the one that started it.

RECIPE_YAML = Path(__file__).resolve().parent.parent / "recipes/LibriMix/separation/hparams/sepformer_dsd.yaml"
SIZES = {
    "full": {},  # the YAML's defaults
    "demo": {  # the Makefile's
        "num_filters": 64,
        "kernel_size": 32,
        "chunk_size": 50,
        "num_intra_layers": 1,
        "num_inter_layers": 1,
        "num_heads": 2,
        "d_ffn": 128,
    },
}
SPEECHBRAIN, OURS, FIRST_BLOCK, STREAMED = "SpeechBrain", "all blocks", "first block", "streamed"
BF16, INT8, ONNX, ONNX_INT8 = "bf16", "int8", "ONNX", "ONNX int8"
DUAL_PATH = ("dsd_modules.masknet.DualPathMaskNet", "speechbrain.lobes.models.dual_path.Dual_Path_Model")
AIMS = ((OURS, 0.7), (FIRST_BLOCK, 0.4))  # at most so many times SpeechBrain's time
COLUMNS = ["model", "audio, s", "threads", "case", "wall", "CPU", "RTF", "wall / CPU ratio"]
COLUMNS += ["peak memory", "difference", "SI-SDR"]
LONG_SECONDS = 30  # what takes longer is measured once
START_SECONDS = 300  # for a process to import, load and answer


@dataclass
class Point:
    """What is measured."""

    model: str
    folder: Path
    threads: int
    seconds: float
    recording: Path

    def __str__(self):
        return f"{self.model}, {self.seconds:g} s, {self.threads} thread(s)"


@dataclass
class Cost:
    """Of one case at one point."""

    audio_seconds: float
    wall: list = field(default_factory=list)  # seconds, one a round
    cpu: list = field(default_factory=list)
    peak_mib: float = math.nan
    estimates: np.ndarray | None = None  # [T, N]
    fault: str = ""


# --- the cases: from a point to a function of a recording that returns estimates [T, N] ---


def speechbrain(point):
    """SpeechBrain's interface and its own mask network, as in a published folder."""
    from speechbrain.inference.separation import SepformerSeparation

    text = (point.folder / "hyperparams.yaml").read_text(encoding="utf-8").replace(DUAL_PATH[0], DUAL_PATH[1])
    if DUAL_PATH[1] not in text:
        raise ValueError("SpeechBrain has no such model to compare with")
    with tempfile.TemporaryDirectory() as folder:
        source = shutil.copytree(point.folder, Path(folder) / "source")
        (source / "hyperparams.yaml").write_text(text, encoding="utf-8")
        separator = SepformerSeparation.from_hparams(source=str(source), savedir=str(Path(folder) / "saved"))
    return on_batch(separator.separate_batch, point)


def ours(point, precision="fp32", **options):
    return on_batch(partial(pretrained(point, precision).separate_batch, **options), point)


def streamed(point):
    """``separate_to_files``; what it wrote is read again where it is short."""
    import torch

    torch.set_num_threads(point.threads)
    separator = pretrained(point)

    def separate(recording):
        with tempfile.TemporaryDirectory() as folder:
            paths = separator.separate_to_files(recording, folder).paths
            if point.seconds > 100:
                return None
            return np.stack([soundfile.read(path, dtype="float32")[0] for path in paths], axis=1)

    return separate


def int8(point):
    """PyTorch's dynamic quantization, which takes the feed-forward layers."""
    import torch

    separator = pretrained(point)
    separator.mods["masknet"] = torch.ao.quantization.quantize_dynamic(separator.mods["masknet"], {torch.nn.Linear})
    return on_batch(separator.separate_batch, point)


def onnx(point, pattern="separator_blocks*.onnx"):
    """onnxruntime, in a process without PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = point.threads
    path = max(point.folder.glob(pattern), key=lambda path: int(re.search(r"\d+", path.name)[0]))  # that of all blocks
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda recording: session.run(None, {"mixture": read(recording)[None]})[0][0]


CASES = {
    SPEECHBRAIN: speechbrain,
    OURS: ours,
    FIRST_BLOCK: partial(ours, num_blocks=1),
    STREAMED: streamed,
    BF16: partial(ours, precision="bf16"),
    INT8: int8,
    ONNX: onnx,
    ONNX_INT8: partial(onnx, pattern="int8_blocks*.onnx"),
}


def pretrained(point, precision="fp32"):
    from dsd_modules.inference import SepformerDSDSeparation

    return SepformerDSDSeparation.from_hparams(source=point.folder, run_opts={"precision": precision})


def read(recording):
    """A recording [T]."""
    return soundfile.read(recording, dtype="float32")[0]


def on_batch(separate_batch, point):
    """A function of a recording from one of a batch [1, T]."""
    import torch

    torch.set_num_threads(point.threads)
    return lambda recording: separate_batch(torch.from_numpy(read(recording))[None])[0].detach().numpy()


# --- processes ---


def work(connection, case, point, memory_gib):
    """A case's process: load the model, then separate at each message; answers are a dict each."""
    warnings.simplefilter("ignore")  # of PyTorch's quantization, which is to move to a package of its own
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * 2**30),) * 2)
    try:
        separate = CASES[case](point)
        connection.send({})
        while connection.recv() is not None:
            wall, cpu = time.perf_counter(), time.process_time()
            estimates = separate(point.recording)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
            peak_mib = peak / (2**20 if sys.platform == "darwin" else 2**10)
            connection.send({"wall": wall, "cpu": cpu, "peak_mib": peak_mib, "estimates": estimates})
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "allocate memory" in reason or isinstance(error, MemoryError):
            reason = f"more than {memory_gib:g} GiB of memory"
        connection.send({"fault": reason})


class CaseProcess:
    """One case's process, seen from here."""

    def __init__(self, case, point, memory_gib):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, case, point, memory_gib), daemon=True)
        self.process.start()
        theirs.close()
        self.cost = Cost(point.seconds)
        self._receive(START_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.join()

    def run(self, limit_seconds):
        """One round."""
        self.connection.send(True)
        answer = self._receive(limit_seconds)
        if answer is not None:
            self.cost.wall.append(answer["wall"])
            self.cost.cpu.append(answer["cpu"])
            self.cost.peak_mib, self.cost.estimates = answer["peak_mib"], answer["estimates"]

    def _receive(self, limit_seconds):
        try:
            answer = self.connection.recv() if self.connection.poll(limit_seconds) else {"fault": "over the time limit"}
        except EOFError:
            answer = {"fault": "its process was ended"}
        self.cost.fault = answer.get("fault", "")
        return None if self.cost.fault else answer


def measure(point, cases, rounds, limit_seconds, memory_gib):
    """The costs of the cases, by name."""
    with ExitStack() as stack, tqdm(total=len(cases) * (2 + rounds), desc=str(point), leave=False) as progress:
        processes = {}
        for case in cases:
            processes[case] = stack.enter_context(CaseProcess(case, point, memory_gib))
            progress.update()
        for repeat in range(rounds + 1):
            alive = [process for process in processes.values() if not process.cost.fault]
            for process in alive:
                process.run(limit_seconds)
                progress.update()
            if repeat == 0 and any(sum(process.cost.wall) > LONG_SECONDS for process in alive):
                break
            if repeat == 0:
                for process in alive:  # they were warming up
                    process.cost.wall.clear(), process.cost.cpu.clear()
        return {case: process.cost for case, process in processes.items()}


def foreseen(cost, seconds, limit_seconds):
    """Why a case is not tried at a length, from a shorter one; empty where it is."""
    if cost.fault:
        return cost.fault
    wall = statistics.median(cost.wall) * seconds / cost.audio_seconds
    return f"not tried: {wall / 60:.0f} min or more" if wall > limit_seconds else ""


# --- what is told ---


def si_sdr(estimates, references):
    """SI-SDR in dB of estimates [T, N], the mean over voices; equal signals give infinity."""
    est, ref = (x.astype(np.float64) - x.mean(0, dtype=np.float64) for x in (estimates, references))  # [T, N]
    target = ref * (est * ref).sum(0) / (ref * ref).sum(0)
    noise = ((est - target) ** 2).sum(0)  # [N]
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean(10 * np.log10((target**2).sum(0) / noise)))


def decibels(estimates, references):
    """:func:`si_sdr` as a cell of the table; empty where a voice is silent, as in a streamed recording."""
    value = si_sdr(estimates, references)
    return "" if math.isnan(value) else f"{value:.1f} dB"


def ratio(costs, case, clock):
    """Median over the rounds of a case's time to SpeechBrain's in the same round, or None."""
    own, peers = (getattr(costs[name], clock) if name in costs else () for name in (case, SPEECHBRAIN))
    return statistics.median(a / b for a, b in zip(own, peers, strict=True)) if own and peers else None


def difference(estimates, references):
    """The largest one of a sample, as a share of the loudest."""
    return float(np.abs(estimates - references).max() / np.abs(references).max())


def row(point, case, costs):
    """A line of the table."""
    cost, peer, full = costs[case], costs.get(SPEECHBRAIN), costs.get(OURS)
    cells = [point.model, f"{point.seconds:g}", point.threads, case]
    if cost.fault:
        return "| " + " | ".join(map(str, [*cells, cost.fault, *[""] * (len(COLUMNS) - 5)])) + " |"
    wall, cpu = statistics.median(cost.wall), statistics.median(cost.cpu)
    ratios = [ratio(costs, case, clock) for clock in ("wall", "cpu")]
    cells += [f"{wall:.3g} s", f"{cpu:.3g} s", f"{wall / point.seconds:.3g}"]
    cells += [" / ".join("-" if value is None else f"{value:.2f}" for value in ratios), f"{cost.peak_mib:.0f} MiB"]
    estimates, peer, full = (None if c is None else c.estimates for c in (cost, peer, full))
    cells += ["" if peer is None or case not in (OURS, ONNX) else f"{difference(estimates, peer):.0e}"]
    cells += ["" if full is None or estimates is None or case in (OURS, SPEECHBRAIN) else decibels(estimates, full)]
    return "| " + " | ".join(map(str, cells)) + " |"


def print_aims(results):
    """A sentence about each aim, and about the memory that the streamed case takes."""
    for case, limit in AIMS:
        ratios = {str(point): ratio(costs, case, "cpu") for point, costs in results}
        ratios = {point: value for point, value in ratios.items() if value is not None}
        if ratios:
            worst = max(ratios, key=ratios.get)
            num_met = sum(value <= limit for value in ratios.values())
            print(
                f"Aim: {case} at most {limit:g} times SpeechBrain's CPU time: met at {num_met} of {len(ratios)} "
                f"points, at worst {ratios[worst]:.2f} ({worst})."
            )
    for model in dict.fromkeys(point.model for point, _ in results):
        costs = [costs[STREAMED] for point, costs in results if point.model == model and STREAMED in costs]
        peaks = [(cost.audio_seconds, cost.peak_mib) for cost in costs if not cost.fault]
        if peaks:
            (short, least), (long, most) = min(peaks), max(peaks)
            print(f"Streamed, {model}: {least:.0f} MiB for {short:g} s, {most:.0f} MiB for {long:g} s.")


# --- models and audio ---


def prepare(folder, model, cases):
    """A folder with all that the cases need; meant for a process of its own."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if model in SIZES:
        export_random(folder, model)
    else:
        shutil.copytree(model, folder)
    if ONNX in cases or ONNX_INT8 in cases:
        from dsd_modules.onnx_export import export_onnx

        files = export_onnx(folder, longest_seconds=1.0)
        if ONNX_INT8 in cases:
            from onnxruntime.quantization import quantize_dynamic

            for file in files:
                path = folder / f"int8_blocks{file.num_blocks}.onnx"
                quantize_dynamic(file.path, path, op_types_to_quantize=["MatMul", "Gemm"])


def export_random(folder, size):
    """Export a SepFormer with random weights."""
    from dsd_modules.model_folder import export_model
    from dsd_modules.options import read_options

    with tempfile.TemporaryDirectory() as run_folder:
        modules = load_recipe(size, run_folder)["modules"]
    options = read_options(RECIPE_YAML, "\n".join(f"{name}: {value}" for name, value in SIZES[size].items()))[1]
    export_model(folder, RECIPE_YAML, options, modules)


def load_recipe(size, run_folder, **options):
    """What the recipe's YAML builds at a size. Its seed gives all the same weights."""
    from hyperpyyaml import load_hyperpyyaml

    with open(RECIPE_YAML, encoding="utf-8") as stream:
        return load_hyperpyyaml(stream, {**SIZES[size], **options, "output_folder": str(run_folder)})


def write_audio(path, seconds, sample_rate, source):
    """A recording of so many seconds: another one's, over and over; or noise that comes and goes, twice a second."""
    if source is None:
        time_axis = np.arange(sample_rate) / sample_rate
        samples = 0.1 * np.random.default_rng(0).standard_normal(sample_rate) * np.sin(2 * np.pi * time_axis)
    else:
        samples, rate = soundfile.read(source, always_2d=True)
        samples = samples[:, 0]
        if rate != sample_rate:
            raise ValueError(f"{source} must have the model's {sample_rate} Hz, but got {rate} Hz")
    num_samples = round(seconds * sample_rate)
    with soundfile.SoundFile(path, "w", sample_rate, 1, "PCM_16") as stream:
        for start in range(0, num_samples, len(samples)):
            stream.write(samples[: num_samples - start])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(SIZES), help="exported folders, or full and demo (random)")
    parser.add_argument("--audio", help="a recording at the model's sample rate, repeated (default: noise)")
    parser.add_argument("--seconds", type=float, nargs="+", default=[4, 30, 60, 600, 3600], help="of audio")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="timed, of each case")
    parser.add_argument("--limit-minutes", type=float, default=5, help="of wall clock, of one separation")
    parser.add_argument("--memory-gib", type=float, default=8, help="that one case may take")
    parser.add_argument("--quick", action="store_true", help="the demo's size on 1 and 2 s, one round")
    args = parser.parse_args()
    if args.quick:
        args.model, args.seconds, args.threads, args.rounds = ["demo"], [1, 2], [1], 1

    results = []
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for model in args.model:
            source = folder / f"model{len(results)}"
            process = multiprocessing.get_context("spawn").Process(target=prepare, args=(source, model, args.cases))
            process.start(), process.join()
            if process.exitcode != 0:
                sys.exit(f"error: the model {model} cannot be prepared.")
            found = re.search(r"^sample_rate: (\d+)", (source / "hyperparams.yaml").read_text(encoding="utf-8"), re.M)
            sample_rate = int(found[1]) if found else 8000
            for threads in args.threads:
                before = {}  # the costs at the length before
                for seconds in sorted(args.seconds):
                    point = Point(model, source, threads, seconds, folder / "mixture.wav")
                    write_audio(point.recording, seconds, sample_rate, args.audio)
                    limit = 60 * args.limit_minutes
                    skipped = {case: fault for case in before if (fault := foreseen(before[case], seconds, limit))}
                    cases = [case for case in args.cases if case not in skipped]
                    costs = measure(point, cases, args.rounds, limit, args.memory_gib)
                    costs |= {case: Cost(seconds, fault=fault) for case, fault in skipped.items()}
                    for case in args.cases:
                        print(row(point, case, costs), flush=True)
                    results.append((point, costs))
                    before = costs
    print()
    print_aims(results)


if __name__ == "__main__":
    main()
