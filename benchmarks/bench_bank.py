"""What the memory bank costs: the time of a visit, its memory and its checkpoint, at 10 thousand to 10 million samples.

    python benchmarks/bench_bank.py
    python benchmarks/bench_bank.py --quick     # whether it runs

A visit is ``AssignmentMemoryBank.update``: look the batch's entries up, decide, record. Rows, assignments and metrics
are random, so that samples are excluded, renewed and kept. Times are medians of CPU time. The visits of all sizes
alternate, and the share is that of a full-size training step (batch 1, DSD + LO; see bench_step.py) of the same run.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from bench_step import Setting, make_step, timed
from tqdm import tqdm

from dsd_modules.memory_bank import AssignmentMemoryBank

BATCH_SIZES = (1, 8)
MAX_SHARE = 0.001  # of a step
MAX_GROWTH = 1.5  # of the visit's time from the smallest bank to the largest, still called flat


class SampleIds(Sequence):
    """Ids like LibriMix's, made when they are asked for: a list of ten million strings takes 800 MB."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, row):
        if not 0 <= row < self.num_samples:
            raise IndexError(row)
        return f"{row:08d}-1272-128104_1462-170142"


def filled_bank(num_samples):
    """A bank in its second epoch with all samples visited, and the seconds of CPU time that ``set_samples`` took."""
    bank = AssignmentMemoryBank(num_spks=2, mode="drop")
    start = time.process_time()
    bank.set_samples(SampleIds(num_samples))
    seconds = time.process_time() - start
    bank.start_epoch(1)
    for rows in torch.arange(num_samples).split(2**20):
        perm, metric = random_visits(len(rows))
        bank.update(rows, perm, metric)
    bank.start_epoch(2)
    return bank, seconds


def random_visits(batch_size):
    """Assignments [B, 2] and metrics [B] in dB."""
    first = torch.randint(2, (batch_size, 1))
    return torch.cat([first, 1 - first], dim=1), 10 + 2 * torch.randn(batch_size)


def visit_seconds(bank, batch_size):
    """CPU time of one visit."""
    rows = torch.randint(len(bank), (2 * batch_size,)).unique()[:batch_size]
    perm, metric = random_visits(len(rows))
    is_valid = torch.ones(len(rows), dtype=torch.bool)
    start = time.process_time()
    bank.update(rows, perm, metric, is_valid)
    return time.process_time() - start


def num_bytes(bank):
    """Of all the bank's tensors."""
    entries = [getattr(bank._entries, field.name) for field in fields(bank._entries)]
    return sum(tensor.nbytes for tensor in (bank._digests, bank._is_touched, *entries))


def checkpoint_bytes(bank):
    """Of the file that a checkpoint holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.ckpt"
        bank.save(path)
        return path.stat().st_size


def step_seconds(size, crop_seconds, repeats):
    """CPU time of a training step."""
    setting = Setting(size, crop_seconds, 1, torch.device("cpu"), "fp32")
    with tempfile.TemporaryDirectory() as folder:
        step = make_step("DSD + LO", setting, Path(folder))
        times = [timed(step, setting.device)[1] / 1000 for _ in tqdm(range(1 + repeats), "steps", leave=False)]
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", help="in the bank (default: 10**4, 10**5, 10**6, 10**7)")
    parser.add_argument("--visits", type=int, default=1000, help="of each size and batch size (default: 1000)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of the training step's crop (default: 0.5)")
    parser.add_argument("--quick", action="store_true", help="small banks, and the step of the demo's model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    sizes = sorted(args.samples or ([10**3, 10**4] if args.quick else [10**4, 10**5, 10**6, 10**7]))
    step = step_seconds("demo" if args.quick else "full", args.seconds, 1 if args.quick else 3)

    banks, set_seconds = {}, {}
    for size in tqdm(sizes, "banks", leave=False):
        banks[size], set_seconds[size] = filled_bank(size)
    times = {(size, batch_size): [] for size in sizes for batch_size in BATCH_SIZES}
    for _ in tqdm(range(args.visits), "visits", leave=False):
        for size, batch_size in times:
            times[size, batch_size].append(visit_seconds(banks[size], batch_size))
    medians = {key: statistics.median(values) for key, values in times.items()}

    name = "demo" if args.quick else "full"
    print(f"torch {torch.__version__}, one thread; CPU time")
    print(f"a {name}-size training step of {args.seconds:g} s takes {1000 * step:.1f} ms\n")
    titles = "".join(f"{f'visit, batch {batch_size}':>18}{'of a step':>12}" for batch_size in BATCH_SIZES)
    print(f"{'samples':>10}{'set_samples':>13}{'memory':>12}{'a sample':>10}{'checkpoint':>13}{titles}")
    for size, bank in banks.items():
        memory, saved = num_bytes(bank), checkpoint_bytes(bank)
        row = f"{size:10d}{set_seconds[size]:11.2f} s{memory / 1e6:9.1f} MB{memory / size:8.1f} B{saved / 1e6:10.1f} MB"
        for batch_size in BATCH_SIZES:
            median = medians[size, batch_size]
            row += f"{1e6 * median:15.0f} us{median / step:12.4%}"
        print(row, flush=True)

    share = max(medians.values()) / step
    growth = max(medians[sizes[-1], batch_size] / medians[sizes[0], batch_size] for batch_size in BATCH_SIZES)
    print()
    if args.quick:
        print(f"Aim: a visit under {MAX_SHARE:.1%} of a full-size step: not measured; here {share:.2%} of the demo's.")
    else:
        print(f"Aim: a visit under {MAX_SHARE:.1%} of a full-size step: {verdict(share < MAX_SHARE)}, {share:.4%}.")
    print(
        f"Aim: flat in the number of samples: {verdict(growth < MAX_GROWTH)}, {growth:.2f} times the time at "
        f"{sizes[-1] / sizes[0]:g} times the samples."
    )


def verdict(is_met):
    return "met" if is_met else "missed"


if __name__ == "__main__":
    main()
