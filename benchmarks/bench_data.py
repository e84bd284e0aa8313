"""How fast a DataLoader worker gives training crops: generated wavs against mixing at load time, side by side.

    python benchmarks/bench_data.py --clock cpu
    python benchmarks/bench_data.py --quick     # whether it runs
    python benchmarks/bench_data.py --librispeech_folder LibriSpeech --wham_folder wham_noise --metadata_folder metadata

The same 8 kHz crops through the same MixtureDataset and DataLoader, from WavReader (generated wavs, 16 bit) and from
OnTheFlyReader: without a cache, in the first epoch with one (which makes whole mixtures, to keep them), and from then
on. All sides take turns; the numbers are medians. Without folders the data are made here: voices of 10 to 16 s as
16 kHz flac, as LibriSpeech's, and noises of 5 to 20 s in two channels, as WHAM's. The files have been read before: no
disk is measured.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.dataio.dataloader import make_dataloader
from tqdm import tqdm

from dsd_modules.data.on_the_fly import RATE, OnTheFlyReader, find_mixtures
from dsd_modules.data.wavs import WavReader
from dsd_modules.dataset import MixtureDataset

SIDES = ("generated wavs", "on the fly", "filling the cache", "cached")
AIM = 0.5  # of the rate of generated wavs
WARM_UP = 3  # batches before the clock starts
QUICK = {"mixtures": 6, "repeats": 1, "epochs": 2}


def voice(rng, num_samples):
    """Harmonics of a wandering pitch under an envelope of noise, with pauses: about as compressible as speech."""
    seconds = np.arange(num_samples) / RATE
    knots = np.arange(0, seconds[-1] + 1, 0.1)
    pitch = np.interp(seconds, knots, rng.uniform(90, 220) * (1 + 0.1 * rng.standard_normal(len(knots))))
    envelope = np.interp(seconds, knots, np.maximum(0, rng.standard_normal(len(knots)) + 0.3))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 12))
    return 0.03 * envelope * (harmonics + 0.5 * rng.standard_normal(num_samples)) + 3e-4 * rng.standard_normal(
        num_samples
    )


def make_recordings(folder, num_mixtures, num_spks, seed):
    """LibriSpeech, WHAM's noise and LibriMix's metadata in small; the three folders."""
    rng = np.random.default_rng(seed)
    librispeech, wham, metadata = (folder / name for name in ("LibriSpeech", "wham_noise", "metadata"))
    for path in (librispeech / "train-clean-100", wham / "tr", metadata):
        path.mkdir(parents=True)
    rows = []
    for number in tqdm(range(num_mixtures), "making recordings", leave=False):
        row = {"mixture_ID": f"mixture-{number:04d}"}
        for spk in range(1, num_spks + 1):
            path = f"train-clean-100/{number}-{spk}.flac"
            soundfile.write(librispeech / path, voice(rng, int(RATE * rng.uniform(10, 16))), RATE)
            row |= {f"source_{spk}_path": path, f"source_{spk}_gain": rng.uniform(0.3, 1.2)}
        noise = 0.02 * rng.standard_normal((int(RATE * rng.uniform(5, 20)), 2))
        soundfile.write(wham / "tr" / f"{number}.wav", noise, RATE)
        rows.append(row | {"noise_path": f"tr/{number}.wav", "noise_gain": rng.uniform(0.5, 3)})
    write_rows(metadata / f"libri{num_spks}mix_train-clean-100.csv", rows)
    return librispeech, wham, metadata


def write_rows(path, rows):
    """A csv of dicts that have the same keys; its path."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_wavs(folder, rows, reader, sample_rate):
    """The files that LibriMix's generator writes for these rows; the rows of their manifest."""
    names = ["mix", *(f"s{spk}" for spk in range(1, reader.num_spks + 1))]
    for name in names:
        (folder / name).mkdir(parents=True)
    manifest = []
    for row in tqdm(rows, "writing generated wavs", leave=False):
        paths = {f"{name}_wav": str(folder / name / f"{row['ID']}.wav") for name in names}
        signals = reader.read(row, 0, round(row["duration"] * sample_rate))
        for path, signal in zip(paths.values(), signals, strict=True):
            soundfile.write(path, signal, sample_rate, subtype="PCM_16")
        manifest.append({"ID": row["ID"], "duration": row["duration"], **paths})
    return manifest


def items_per_second(dataset, epochs, num_workers, clock):
    """The rate at which the training's DataLoader gives the crops of these epochs, one to a batch."""
    rng = np.random.default_rng(0)
    batches = [[(epoch, int(row), 1.0)] for epoch in epochs for row in rng.permutation(len(dataset))]
    loader = make_dataloader(dataset, batch_sampler=batches, num_workers=num_workers)
    for number, _ in enumerate(loader):
        if number == WARM_UP - 1:
            start = clock()
    return (len(batches) - WARM_UP) / (clock() - start)


def compare(datasets, make_cached, num_workers, args):
    """Items per second of each of SIDES; ``make_cached`` gives a dataset with an empty cache."""
    clock = time.process_time if args.clock == "cpu" and num_workers == 0 else time.perf_counter
    rates = {side: [] for side in SIDES}
    epochs = range(1, 1 + args.epochs)
    for _ in range(args.repeats):
        cached = make_cached()
        turns = (*datasets, (cached, [0]), (cached, epochs))
        for side, turn in zip(SIDES, turns, strict=True):
            dataset, turn_epochs = turn if isinstance(turn, tuple) else (turn, epochs)
            rates[side].append(items_per_second(dataset, turn_epochs, num_workers, clock))
    return {side: statistics.median(values) for side, values in rates.items()}


def main():
    """Parse the arguments, make the data, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", type=int, default=40, help="of so many mixtures")
    parser.add_argument("--num_spks", type=int, default=2)
    parser.add_argument("--sample_rate", type=int, default=8000, help="Hz")
    parser.add_argument("--segment_seconds", type=float, default=3.0, help="length of the crops")
    parser.add_argument("--tasks", nargs="+", default=["mix_clean", "mix_both"], help="mix_clean, mix_both")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="worker processes; 0: none but this one")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of a timed run (filling the cache takes one)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, in turn")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="without workers; else always wall")
    parser.add_argument("--quick", action="store_true", help="small: " + str(QUICK))
    parser.add_argument("--librispeech_folder", help="real recordings instead of made ones: all three folders")
    parser.add_argument("--wham_folder")
    parser.add_argument("--metadata_folder")
    parser.add_argument("--subset", default="train-100", help="of the real recordings")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folders = (args.librispeech_folder, args.wham_folder, args.metadata_folder)
        if not any(folders):
            folders = make_recordings(folder, args.mixtures, args.num_spks, args.seed)
        results = {}
        layout = (args.subset, args.num_spks, args.sample_rate, "min")
        with tqdm(total=len(args.tasks) * len(args.workers), desc="measuring") as progress:
            for task in args.tasks:
                rows = find_mixtures(*folders, *layout, task)[: args.mixtures]
                reader_options = (*folders[:2], args.num_spks, args.sample_rate, task)
                reader = OnTheFlyReader(*reader_options)
                wav_rows = write_wavs(folder / task, rows, reader, args.sample_rate)
                wavs = write_rows(folder / f"{task}_wavs.csv", wav_rows)
                mixed = write_rows(folder / f"{task}.csv", rows)
                crops = {"segment_seconds": args.segment_seconds}
                datasets = [
                    MixtureDataset(wavs, args.sample_rate, WavReader("", args.num_spks), **crops),
                    MixtureDataset(mixed, args.sample_rate, reader, **crops),
                ]
                seconds = sum(row["duration"] for row in rows)
                cache_bytes = int(2 * (1 + args.num_spks) * args.sample_rate * seconds) + 1000 * len(rows)

                def make_cached(mixed=mixed, options=reader_options, cache_bytes=cache_bytes, crops=crops):
                    reader = OnTheFlyReader(*options, cache_bytes=cache_bytes)
                    return MixtureDataset(mixed, args.sample_rate, reader, **crops)

                for num_workers in args.workers:
                    results[task, num_workers] = compare(datasets, make_cached, num_workers, args)
                    progress.update()

    print(
        f"{len(rows)} mixtures of {args.num_spks} speakers, {seconds / len(rows):.1f} s on average, crops of "
        f"{args.segment_seconds:g} s at {args.sample_rate} Hz; items per second, and in brackets the share of "
        f"generated wavs; the cache takes {cache_bytes / len(rows) / 1e6:.2f} MB a mixture.\n"
    )
    print("| task | workers | " + " | ".join(SIDES) + " |")
    print("|---" * (2 + len(SIDES)) + "|")
    below = []
    for (task, num_workers), rates in results.items():
        base, *others = rates.values()
        cells = [f"{base:.0f}", *(f"{rate:.0f} ({rate / base:.2f})" for rate in others)]
        print(f"| {task} | {num_workers} | " + " | ".join(cells) + " |")
        below += [f"{task} with {num_workers} workers, {side}" for side, rate in rates.items() if rate < AIM * base]
    print(f"\nBelow {AIM:g} of the rate of generated wavs: {'; '.join(below) or 'none'}.")


if __name__ == "__main__":
    main()
