"""What plain PIT and DSD + LO make of the same mixture: spectrograms, and the audio of synthetic voices."""

import math

from ablation_plan import ARMS, DSD_LO, PLAIN_PIT

from dsd_modules.data.wavs import WavReader
from dsd_modules.dataset import MixtureDataset
from dsd_modules.evaluation import read_results
from dsd_modules.options import read_options
from dsd_modules.report import draw_separations
from dsd_modules.results import separate_example
from shared_modules.figures import save_figure


def write_examples(output):
    """Separate a test mixture of the main regime, and one of synthetic voices, with the models of the first seed.

    The mixture is the one of which plain PIT's improvement is the median. Where the runs' folders are gone, or the
    figure is there, nothing is written.

    Arguments
    ---------
    output : Path
        The ablation's folder: gets ``separation_<regime>.png`` and ``examples/<arm>/*.wav`` (synthetic voices alone).
    """
    for regime in ("main", "synthetic"):
        runs = {arm: output / "runs" / regime / arm / "1" for arm in (PLAIN_PIT, DSD_LO)}
        figure_path = output / f"separation_{regime}.png"
        if figure_path.exists() or not all((run / "exported").is_dir() for run in runs.values()):
            continue
        _, options = read_options(runs[PLAIN_PIT] / "hyperparams.yaml")
        scores, _ = read_results(runs[PLAIN_PIT] / "test_results.csv")
        ranked = sorted((row["si_sdri"], name) for name, row in scores.items() if math.isfinite(row["si_sdri"]))
        reader = WavReader(options["data_folder"] or "", options["num_spks"])
        test_set = MixtureDataset(runs[PLAIN_PIT] / "manifests/test.csv", options["sample_rate"], reader)
        item = test_set[test_set.data_ids.index(ranked[len(ranked) // 2][1])]
        examples = {}
        for arm, run in runs.items():
            folder = output / "examples" / arm if regime == "synthetic" else run / "examples"
            examples[ARMS[arm].label] = separate_example(run / "exported", item, folder)
        save_figure(draw_separations(examples), figure_path)
