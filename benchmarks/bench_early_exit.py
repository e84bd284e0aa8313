"""Early exit: what a separator gains with each block, and what it costs.

    python benchmarks/bench_early_exit.py --model "DSD + LO" RUN/exported --manifest RUN/manifests/test.csv

Each test mixture is separated by the first 1, 2, ... blocks (``num_blocks``), and with early exit at several thresholds
(``exit_si_sdr_db``), in turn, so that a busy machine slows all of them. A mixture's time is the median of its repeats,
of CPU time (on a GPU of wall clock), and the real-time factor is the sum of these over the sum of the durations. The
intervals are 95 % t intervals over mixtures, of SI-SDRi (a mixture's mean over its speakers) and of its difference from
all blocks on the same mixture. Further models (``--model`` again) are drawn beside the first with fixed numbers of
blocks, such as one that was trained without layer-wise optimization.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

from dsd_modules.data.wavs import WavReader
from dsd_modules.dataset import MixtureDataset
from dsd_modules.evaluation import score_batch
from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.report import block_colors
from dsd_modules.separator import separate, separate_until
from shared_modules.figures import BLUE, GREY, ORANGE, STYLE, new_figure, save_figure
from shared_modules.files import write_table
from shared_modules.statistics import t_interval

THRESHOLDS_DB = (12, 16, 20, 25)


@dataclass
class Mode:
    """A way to separate, and what it gave for each mixture."""

    model: str
    num_blocks: int | None = None  # of fixed ones
    exit_si_sdr_db: float | None = None
    si_sdri: list = field(default_factory=list)  # dB
    blocks_run: list = field(default_factory=list)
    cpu_seconds: list = field(default_factory=list)
    wall_seconds: list = field(default_factory=list)

    def separate(self, modules, mixture):
        """The estimates [1, N, T] of a mixture [1, T], and how many blocks they took."""
        if self.num_blocks is None:
            return separate_until(**modules, mixture=mixture, exit_si_sdr_db=self.exit_si_sdr_db)
        return separate(**modules, mixture=mixture, blocks=[self.num_blocks - 1])[0], self.num_blocks

    def measure(self, modules, item, repeats):
        """Separate an item of the test set, as a MixtureDataset gives it, and keep its score and times."""
        device = next(modules["decoder"].parameters()).device
        mixture, references = item["mix_sig"][None].to(device), item["sources"].T[None]  # [1, T], [1, N, T]
        cpu_seconds, wall_seconds = [], []
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            estimates, blocks_run = self.separate(modules, mixture)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            cpu_seconds.append(time.process_time() - cpu)
            wall_seconds.append(time.perf_counter() - wall)
        (scores,) = score_batch(estimates[None].cpu(), references, item["mix_sig"][None])
        self.si_sdri.append(scores["si_sdri"])
        self.blocks_run.append(blocks_run)
        self.cpu_seconds.append(statistics.median(cpu_seconds))
        self.wall_seconds.append(statistics.median(wall_seconds))


def measure(models, items, thresholds, repeats):
    """All modes of all models, those of early exit for the first model alone.

    Arguments
    ---------
    models : dict
        From a label to its SepformerDSDSeparation.
    items : sequence of dict
        The test set.

    Returns
    -------
    list of Mode
    """
    modes = []
    for label, model in models.items():
        modes += [Mode(label, num_blocks=number) for number in range(1, model.num_blocks + 1)]
        if label == next(iter(models)):
            modes += [Mode(label, exit_si_sdr_db=threshold) for threshold in thresholds]
    modules = {label: dict(model.mods) for label, model in models.items()}
    for mode in modes:  # the first call of a kernel is slow
        mode.separate(modules[mode.model], items[0]["mix_sig"][None].to(models[mode.model].device))
    for item in tqdm(items, desc="Separating", disable=None):
        for mode in modes:
            mode.measure(modules[mode.model], item, repeats)
    return modes


def summarize(modes, seconds):
    """A row of the table for each mode; ``seconds`` is the duration of all mixtures."""
    full = {mode.model: mode.si_sdri for mode in modes if mode.num_blocks}  # the last one has all blocks
    rows = []
    for mode in modes:
        scores = t_interval(mode.si_sdri)
        losses = t_interval([a - b for a, b in zip(mode.si_sdri, full[mode.model], strict=True)])
        stops = Counter(mode.blocks_run)
        rows.append(
            {
                "model": mode.model,
                "num_blocks": mode.num_blocks,
                "exit_si_sdr_db": mode.exit_si_sdr_db,
                "mean_blocks": statistics.mean(mode.blocks_run),
                "si_sdri": scores.mean,
                "si_sdri_low": scores.low,
                "si_sdri_high": scores.high,
                "difference": losses.mean,  # from all blocks, dB
                "difference_low": losses.low,
                "difference_high": losses.high,
                "cpu_factor": sum(mode.cpu_seconds) / seconds,
                "wall_factor": sum(mode.wall_seconds) / seconds,
                "stops": " ".join(f"{block}:{stops[block]}" for block in sorted(stops)),  # block: mixtures
            }
        )
    return rows


def format_rows(rows, clock):
    """The rows as a table of Markdown."""
    lines = [
        "| model | blocks | mean blocks | SI-SDRi, dB | minus all blocks, dB | real-time factor | stops after block |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        full = max(rows.index(other) for other in rows if other["model"] == row["model"] and other["num_blocks"])
        share = row[clock] / rows[full][clock]
        blocks = f"{row['num_blocks']}" if row["num_blocks"] else f"exit at {row['exit_si_sdr_db']:g} dB"
        difference = f"{row['difference']:+.2f} [{row['difference_low']:+.2f}, {row['difference_high']:+.2f}]"
        lines.append(
            f"| {row['model']} | {blocks} | {row['mean_blocks']:.2f} "
            f"| {row['si_sdri']:.2f} [{row['si_sdri_low']:.2f}, {row['si_sdri_high']:.2f}] "
            f"| {'' if rows.index(row) == full else difference} | {row[clock]:.4f} ({share:.2f}x) "
            f"| {'' if row['num_blocks'] else row['stops']} |"
        )
    return "\n".join(lines)


def draw(rows, clock, where):
    """The figure: SI-SDRi against time, and how many blocks each threshold takes."""
    first = rows[0]["model"]
    exits = [row for row in rows if row["num_blocks"] is None]
    figure = new_figure(5)
    trade, stops = figure.subplots(1, 2, width_ratios=[2.2, 1])
    for model, color in zip(dict.fromkeys(row["model"] for row in rows), (BLUE, GREY, "black"), strict=False):
        fixed = [row for row in rows if row["model"] == model and row["num_blocks"]]
        _plot_trade(trade, fixed, clock, f"{model}: the first blocks", color=color, marker="o", ms=7)
        for row in fixed:
            name = f"{row['num_blocks']} block{'s' * (row['num_blocks'] > 1)}"
            place = {"xytext": (-7, 6), "ha": "right"} if model == first else {"xytext": (0, -16), "ha": "center"}
            trade.annotate(name, (row[clock], row["si_sdri"]), textcoords="offset points", color=color, **place)
    _plot_trade(trade, exits, clock, f"{first}: early exit", color=ORANGE, marker="D", ms=7, ls=":")
    for row in exits:
        name = f"{row['exit_si_sdr_db']:g} dB"
        place = {"xytext": (8, -12), "ha": "left"}
        trade.annotate(name, (row[clock], row["si_sdri"]), textcoords="offset points", color=ORANGE, **place)
    trade.set(title="What a block gains, and what it costs", xlabel=f"real-time factor ({where})")
    trade.set(ylabel="SI-SDRi (dB)")
    trade.set_xlim(0, 1.08 * max(row[clock] for row in rows))
    trade.margins(y=0.12)
    handles, labels = trade.get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", lw=1, marker="|", ms=10))
    trade.legend(handles, [*labels, "95 % of the difference from all blocks"], loc="lower right")

    num_blocks = max(row["num_blocks"] or 0 for row in rows if row["model"] == first)
    left = [0.0] * len(exits)
    names = [f"{row['exit_si_sdr_db']:g}" for row in exits]
    for block, color in list(enumerate(block_colors(num_blocks), 1))[1:]:
        shares = [_share(row["stops"], block) for row in exits]
        stops.barh(names, shares, left=left, color=color, label=f"{block} blocks", height=0.7)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for height, row in enumerate(exits):
        stops.text(1.02, height, f"{row['mean_blocks']:.1f}", va="center")
    stops.text(1.02, len(exits) - 0.45, "mean", va="center")
    stops.xaxis.set_major_formatter(PercentFormatter(1))
    stops.set(
        title="Blocks that early exit runs", xlabel="share of mixtures", ylabel="exit_si_sdr_db (dB)", xlim=(0, 1)
    )
    stops.grid(False)
    stops.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=num_blocks)
    return figure


def _plot_trade(axes, rows, clock, label, **line):
    times, scores = [row[clock] for row in rows], [row["si_sdri"] for row in rows]
    bars = [
        [row["difference"] - row["difference_low"] for row in rows],
        [row["difference_high"] - row["difference"] for row in rows],
    ]
    axes.errorbar(times, scores, bars, label=label, capsize=3, elinewidth=1, **line)


def _share(stops, block):
    counts = {int(key): int(number) for key, number in (part.split(":") for part in stops.split())}
    return counts.get(block, 0) / sum(counts.values())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    label_and_folder = {"nargs": 2, "metavar": ("LABEL", "FOLDER"), "action": "append", "required": True}
    parser.add_argument("--model", **label_and_folder, help="an exported model of three blocks or more")
    parser.add_argument("--manifest", type=Path, required=True, help="the test set: a csv as a run writes it")
    parser.add_argument("--data-folder", type=Path, help="where the csv's paths start (default: its folder)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS_DB, help="of early exit, dB")
    parser.add_argument("--mixtures", type=int, help="the first so many (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="of each separation (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--csv", type=Path, default=Path("early_exit.csv"), help="the table (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=Path("early_exit.png"), help="(default: %(default)s)")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    run_opts = {"device": args.device}
    models = {name: SepformerDSDSeparation.from_hparams(folder, run_opts=run_opts) for name, folder in args.model}
    first = next(iter(models.values()))
    if first.num_blocks < 3:
        sys.exit(f"error: early exit needs a model of at least 3 blocks, but the first one has {first.num_blocks}.")
    reader = WavReader(str(args.data_folder or args.manifest.parent), first.num_spks)
    test_set = MixtureDataset(str(args.manifest), first.sample_rate, reader)
    items = [test_set[row] for row in range(min(len(test_set), args.mixtures or len(test_set)))]
    seconds = sum(item["num_samples"] for item in items) / first.sample_rate
    is_cpu = first.device.type == "cpu"
    where = f"{args.threads} thread{'s' * (args.threads > 1)}" if is_cpu else torch.cuda.get_device_name(first.device)
    clock = "cpu_factor" if is_cpu else "wall_factor"

    print(f"torch {torch.__version__}, {where}, {len(items)} mixtures of {seconds / len(items):.1f} s on average")
    with torch.no_grad():
        rows = summarize(measure(models, items, args.thresholds, args.repeats), seconds)
    print(format_rows(rows, clock))
    cells = [{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    write_table(args.csv, cells)
    where = f"CPU time, {where}" if is_cpu else where
    with matplotlib.rc_context(STYLE):
        save_figure(draw(rows, clock, where), args.figure)
    print(f"{args.csv}, {args.figure}")


if __name__ == "__main__":
    main()
