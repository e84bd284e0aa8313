"""One training step of SepFormer: SpeechBrain's separation recipe against this recipe, on the same weights.

    python benchmarks/bench_step.py                         # full size: 1 s on a CPU, 3 and 4 s on a GPU
    python benchmarks/bench_step.py --size demo --seconds 2
    python benchmarks/bench_step.py --quick                 # whether it runs

A step is forward, loss, backward, gradient clipping and Adam. Sides: SpeechBrain's recipe (plain PIT), and this
recipe's ``fit_batch`` with plain PIT (--dsd_mode none --layerwise False) and with DSD + LO (the default; also with
--activation_checkpointing True), the visit of the memory bank and the records included. Their steps alternate, so that
a busy machine slows all of them. Times are medians, on a CPU of CPU time, on a GPU of wall clock; the ratios are to
SpeechBrain's. Peak memory is that of tensors, from before the model is built until two steps are done.
"""

import argparse
import gc
import importlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of PyTorch's profiler

import torch
from bench_inference import RECIPE_YAML, SIZES, load_recipe
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.dual_path import Dual_Path_Model
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper
from tqdm import tqdm

from dsd_modules.sampling import TrainingBatches

SPEECHBRAIN = "SpeechBrain"
DSD_LO = {"dsd_mode": "drop", "layerwise": True}
OPTIONS = {
    "plain PIT": {"dsd_mode": "none", "layerwise": False},
    "DSD + LO": DSD_LO,
    "DSD + LO, layers recomputed": {**DSD_LO, "activation_checkpointing": True},
}
SIDES = (SPEECHBRAIN, *OPTIONS)
AIMS = (  # side, what, at most so many times SpeechBrain's
    ("plain PIT", "time", 0.8),
    ("plain PIT", "GPU memory", 0.6),
    ("DSD + LO", "time", 1.0),
)


@dataclass
class Setting:
    """What is measured."""

    size: str
    seconds: float
    batch_size: int
    device: torch.device
    precision: str  # fp32 or bf16

    def __str__(self):
        return f"{self.size} size, batch {self.batch_size}, {self.seconds:g} s, {self.device}, {self.precision}"


@dataclass
class Cost:
    """Of the steps of one side."""

    wall_ms: list = field(default_factory=list)
    cpu_ms: list = field(default_factory=list)
    peak_mib: float = 0.0
    first_loss: float | None = None  # dB

    def milliseconds(self, device):
        """Of wall clock where a GPU works, of CPU time elsewhere."""
        return self.cpu_ms if device.type == "cpu" else self.wall_ms


def recipe_brain(setting, folder, **options):
    """This recipe's Brain, in the first epoch that may exclude samples."""
    if str(RECIPE_YAML.parents[1]) not in sys.path:
        sys.path.insert(0, str(RECIPE_YAML.parents[1]))
    separation = importlib.import_module("train").Separation
    hparams = load_recipe(setting.size, folder, precision=setting.precision, **options)
    run_opts = {"device": str(setting.device), "precision": setting.precision}
    brain = separation(hparams["modules"], hparams["optimizer"], hparams, run_opts)
    brain.init_optimizers()
    brain.step, brain.train_sampler = 0, TrainingBatches(1000, setting.batch_size, seed=0)
    bank = brain.hparams.memory_bank
    bank.set_samples([str(row) for row in range(setting.batch_size)])
    bank.start_epoch(brain.hparams.dsd_start_epoch)
    return brain


def recipe_step(setting, folder, mixture, sources, **options):
    """The step of this recipe."""
    brain = recipe_brain(setting, folder, **options)
    items = [
        {
            "id": str(row),
            "row": row,
            "weight": 1 / setting.batch_size,
            "num_samples": len(mixture[row]),
            "mix_sig": mixture[row],
            "sources": sources[row],
        }
        for row in range(setting.batch_size)
    ]
    batch = PaddedBatch(items)
    return lambda: brain.fit_batch(batch)


class SpeechBrainStep:
    """The step of SpeechBrain's recipe, with a batch [B, T] and its sources [B, T, N]."""

    def __init__(self, setting, folder, mixture, sources):
        brain = recipe_brain(setting, folder)
        hparams = brain.hparams
        self.mixture, self.sources = mixture.to(setting.device), sources.to(setting.device)
        self.encoder, self.decoder = hparams.encoder, hparams.decoder
        self.templates = hparams.intra_model, hparams.inter_model  # SpeechBrain's Brain holds them, too
        self.masknet = Dual_Path_Model(
            hparams.num_filters,
            hparams.num_filters,
            *self.templates,
            num_layers=hparams.num_blocks,
            norm=hparams.masknet.dual_mdl[0].norm,
            K=hparams.chunk_size,
            num_spks=hparams.num_spks,
            linear_layer_after_inter_intra=False,
        )
        self.masknet.load_state_dict(hparams.masknet.state_dict())
        self.masknet.to(setting.device)
        self.parameters = [p for m in (self.encoder, self.masknet, self.decoder) for p in m.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=hparams.lr)
        self.training_ctx, self.max_grad_norm = brain.training_ctx, brain.max_grad_norm

    def __call__(self):
        with self.training_ctx:
            features = self.encoder(self.mixture)  # [B, C, F]
            masks = self.masknet(features)  # [N, B, C, F]
            separated = torch.stack([features] * len(masks)) * masks
            estimates = [self.decoder(rows).view(len(features), -1, 1) for rows in separated]  # each [B, T', 1]
            estimates = torch.cat(estimates, -1)  # [B, T', N]
            missing = self.mixture.shape[1] - estimates.shape[1]
            estimates = torch.nn.functional.pad(estimates, (0, 0, 0, missing))  # [B, T, N]
            loss = get_si_snr_with_pitwrapper(self.sources, estimates).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().cpu()


def make_step(side, setting, folder):
    """The step of a side, which returns the loss in dB."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch_size, round(8000 * setting.seconds), 2)
    sources = 0.1 * torch.randn(shape, generator=generator)  # [B, T, N]
    mixture = sources.sum(-1)
    if side == SPEECHBRAIN:
        return SpeechBrainStep(setting, folder, mixture, sources)
    return recipe_step(setting, folder, mixture, sources, **OPTIONS[side])


def peak_memory(make, device, folder):
    """The most MiB of tensors at any moment of two steps, and of building the model before them."""
    gc.collect()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step = make()
        step(), step()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    # PyTorch keeps no such count for the CPU. Its profiler's trace has the sum at each allocation.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = make()
        step(), step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    held = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return (max(event["args"]["Total Allocated"] for event in events) - held) / 2**20


def timed(step, device):
    """Milliseconds of wall clock and of CPU time of one step, and its loss."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = float(step())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu), loss


def measure(setting, repeats, folder):
    """The costs of all sides."""
    costs = {side: Cost() for side in SIDES}
    with tqdm(total=len(SIDES) * (2 + repeats), desc=str(setting), leave=False) as progress:
        for side, cost in costs.items():
            cost.peak_mib = peak_memory(partial(make_step, side, setting, folder), setting.device, folder)
            progress.update()
        steps = {side: make_step(side, setting, folder) for side in SIDES}
        for repeat in range(repeats + 1):
            for side, step in steps.items():
                wall_ms, cpu_ms, loss = timed(step, setting.device)
                progress.update()
                if repeat == 0:  # the first step warms up, on the same weights everywhere
                    costs[side].first_loss = loss
                    continue
                costs[side].wall_ms.append(wall_ms)
                costs[side].cpu_ms.append(cpu_ms)
    return costs


def print_costs(setting, costs):
    """One line a side, with ratios to SpeechBrain's.

    Returns
    -------
    dict
        The ratios, by side and "time" or "memory".
    """
    reference, ratios = costs[SPEECHBRAIN], {}
    print(f"\n{setting}; median ms (least), ratio")
    print(f"{'':28}{'CPU time' if setting.device.type == 'cpu' else 'wall clock':>26}{'peak memory':>26}{'loss':>12}")
    for side, cost in costs.items():
        ms = cost.milliseconds(setting.device)
        ratios[side, "time"] = statistics.median(ms) / statistics.median(reference.milliseconds(setting.device))
        ratios[side, "memory"] = cost.peak_mib / reference.peak_mib
        print(
            f"{side:28}{statistics.median(ms):9.1f} ({min(ms):7.1f}) {ratios[side, 'time']:5.2f}x"
            f"{cost.peak_mib:13.0f} MiB {ratios[side, 'memory']:5.2f}x{cost.first_loss:9.3f} dB",
            flush=True,
        )
    return ratios


def print_aims(results):
    """A sentence about each aim, from the ratios of all full-size settings."""
    print()
    for side, what, limit in AIMS:
        on_gpu = what == "GPU memory"
        key = (side, what.removeprefix("GPU "))
        values = {
            str(setting): ratios[key]
            for setting, ratios in results
            if setting.size == "full" and (setting.device.type == "cuda" or not on_gpu)
        }
        aim = f"Aim: {side} at most {limit:g} times SpeechBrain's {what}:"
        if not values:
            others = ", ".join(f"{ratios[key]:.2f} ({setting})" for setting, ratios in results)
            print(f"{aim} not measured, it needs {'a GPU' if on_gpu else 'the full size'}; here {others}.")
            continue
        worst = max(values, key=values.get)
        verdict = "met" if values[worst] <= limit else "missed"
        print(f"{aim} {verdict}, {values[worst]:.2f} ({worst}).")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="full", help="full: the YAML's; demo: the Makefile's")
    parser.add_argument("--seconds", type=float, nargs="+", help="of a crop at 8 kHz (CPU: 1, GPU: 3 4)")
    parser.add_argument("--batch-size", type=int, default=1, help="mixtures (default: 1)")
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", help="cpu or cuda (default: what there is)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", help="(CPU: fp32, GPU: both)")
    parser.add_argument("--repeats", type=int, help="timed steps a side (CPU: 3, GPU: 10)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--quick", action="store_true", help="the demo's size on 0.25 s, 2 repeats")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)  # SpeechBrain's Brain tells what it is made of
    device = torch.device(args.device)
    is_cpu = device.type == "cpu"
    size = "demo" if args.quick else args.size
    seconds = args.seconds or ([0.25] if args.quick else [1] if is_cpu else [3, 4])
    repeats = args.repeats or (2 if args.quick else 3 if is_cpu else 10)
    name = f"{args.threads} thread(s)" if is_cpu else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {name}, {repeats} steps a side")

    results = []
    for precision in args.precision or (["fp32"] if is_cpu else ["fp32", "bf16"]):
        for crop in seconds:
            setting = Setting(size, crop, args.batch_size, device, precision)
            with tempfile.TemporaryDirectory() as folder:
                costs = measure(setting, repeats, Path(folder))
            results.append((setting, print_costs(setting, costs)))
            difference = abs(costs["plain PIT"].first_loss - costs[SPEECHBRAIN].first_loss)
            print(f"The losses of plain PIT differ by {difference:.1e} dB.")
            if precision == "fp32" and difference > 0.01:
                sys.exit("error: the sides do not compute the same loss.")
    print_aims(results)


if __name__ == "__main__":
    main()
