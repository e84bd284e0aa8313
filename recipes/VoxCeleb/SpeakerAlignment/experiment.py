"""Train two generations of a speaker model, and compare all ways to let one recognise the profiles of the other.

    > python experiment.py results/demo                           # synthetic voices, about 9 minutes on two cores
    > python experiment.py results/recorded --plan recorded \\
          --train_csv libri_train/metadata.csv \\
          --dev_csv libri_test/metadata.csv:0:20 --test_csv libri_test/metadata.csv:20:

Models v1 (older, weaker) and v2 (newer, better) are trained for each seed, as processes of train_embeddings.py. Every
alignment is fitted to their embeddings of the alignment speakers, who are a share of the training source's (and the
training speakers, too, if the plan says so). Trials are of the test speakers. What is to be trained and tried stands
in the plan, a small YAML. The same command goes on where it was stopped, and keeps what is there.

    OUTPUT/summary.md                the tables that matter
    OUTPUT/results.csv               EER and minDCF of every system, seed, sex, number of enrolled utterances and of
                                     alignment speakers; intervals.csv: means over seeds with intervals
    OUTPUT/differences.csv           NESSA minus each baseline, paired; recovered_gain.csv, costs.csv
    OUTPUT/error_rates.png, det.png, dependence.png, spaces.png
    OUTPUT/models, alignments        what was trained, to be used
    OUTPUT/data, embeddings, scores  what a repeated command needs not make again
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch

from nessa_modules.alignment import load_alignment
from nessa_modules.corpora import read_corpus
from nessa_modules.embeddings import embed
from nessa_modules.experiment import (
    alignment_folder,
    load_encoder,
    read_sexes,
    run_experiment,
)
from nessa_modules.plan import EXPECTED, System, check_plan, read_plan
from nessa_modules.report import write_figures, write_tables
from shared_modules.errors import ends_in_one_sentence, mistakes_as_run_errors
from shared_modules.files import lock_folder
from shared_modules.options import check_values

RECIPE = Path(__file__).resolve().parent
PLANS = RECIPE / "hparams"
NUM_DRAWN_SPEAKERS, NUM_DRAWN_UTTERANCES = 8, 8


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of everything; one that is there goes on")
    parser.add_argument(
        "--plan",
        help="demo, 800_speakers, recorded, recorded_disjoint (all in hparams), or a YAML like theirs (demo; with "
        "--train_csv: recorded)",
    )
    sources = "a csv (id, speaker, path), <csv>:<start>:<stop> for some of its speakers, or a folder"
    parser.add_argument("--train_csv", help=f"training and alignment speakers: {sources}; without: synthetic voices")
    parser.add_argument("--alignment_csv", help="alignment speakers (a share of the training source's)")
    parser.add_argument("--dev_csv", help="speakers by whom each training chooses its best epoch")
    parser.add_argument("--test_csv", help="speakers of the trials")
    parser.add_argument("--speakers_txt", help="LibriSpeech's SPEAKERS.TXT or a csv of speaker, sex: for EER per sex")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the models (1 2 3)")
    parser.add_argument("--loss", help=f"of the models: {EXPECTED['loss'][1]} (as the plan says)")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="of the models: cpu or cuda (%(default)s)")
    return parser.parse_args(argv)


def plan_of(arguments):
    """The plan that the command line names, checked."""
    name = arguments.plan or ("recorded" if arguments.train_csv else "demo")
    of_recipe = PLANS / f"experiment_{name}.yaml"
    plan = read_plan(of_recipe if Path(name).name == name and of_recipe.exists() else name)
    if arguments.loss:
        check_values({"loss": arguments.loss}, EXPECTED)
        plan = dataclasses.replace(plan, loss=arguments.loss)
    check_plan(plan)
    if len(set(arguments.seeds)) != len(arguments.seeds) or min(arguments.seeds) < 0 or max(arguments.seeds) >= 1000:
        raise ValueError(f"--seeds can only be different whole numbers of 0 to 999, but got {arguments.seeds}.")
    if arguments.jobs < 1:
        raise ValueError(f"--jobs can only be a whole number of at least 1, but got {arguments.jobs}.")
    return plan


def sources_of(arguments):
    """From a split to its source; None for synthetic voices."""
    sources = {split: getattr(arguments, f"{split}_csv") for split in ("train", "alignment", "dev", "test")}
    if not any(sources.values()):
        return None
    for split in ("train", "dev", "test"):
        if not sources[split]:
            raise ValueError(f"--{split}_csv is missing: --train_csv, --dev_csv and --test_csv go together.")
    return {split: source for split, source in sources.items() if source}


def spaces_of(arguments):
    """What the picture of the spaces shows: some test utterances, by v1 and v2 of the first seed, and NESSA."""
    seed = arguments.seeds[0]
    utterances = read_corpus(arguments.output / "data/test.csv", progressbar=False)
    names = sorted({utterance.speaker for utterance in utterances})
    names = [names[len(names) * k // NUM_DRAWN_SPEAKERS] for k in range(NUM_DRAWN_SPEAKERS)]
    rows = []
    for name in dict.fromkeys(names):
        rows += [row for row, each in enumerate(utterances) if each.speaker == name][:NUM_DRAWN_UTTERANCES]
    models = [load_encoder(arguments.output / f"models/{version}_{seed}/exported") for version in ("v1", "v2")]
    cache = arguments.output / "embeddings"
    embeddings = [embed(model, utterances, cache, progressbar=False)[rows] for model in models]
    system = System("v1", "v2", "nessa")
    return {
        "enroll": embeddings[0],
        "runtime": embeddings[1],
        "speakers": [utterances[row].speaker for row in rows],
        "alignment": load_alignment(alignment_folder(arguments.output, seed, system)),
        "title": f"Test utterances in the spaces of v1 (enrollment) and v2 (runtime), seed {seed}",
    }


@ends_in_one_sentence
def main(argv=None):
    """The whole experiment, and its report."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)  # as the models' trainings; --jobs processes share the cores
    with mistakes_as_run_errors():
        plan, sources = plan_of(arguments), sources_of(arguments)
        sexes = read_sexes(arguments.speakers_txt) if arguments.speakers_txt else None
        lock = lock_folder(arguments.output)  # until the end
        results = run_experiment(
            plan, arguments.output, RECIPE, arguments.seeds, sources, sexes, arguments.jobs, arguments.device
        )
        text = write_tables(results, arguments.output)
        figures = write_figures(results, arguments.output, spaces_of(arguments))
    print(f"\n{text}")
    tables = ("summary.md", "results.csv", "intervals.csv", "differences.csv", "recovered_gain.csv", "costs.csv")
    for path in (*(arguments.output / name for name in tables), *figures):
        print(path)
    del lock


if __name__ == "__main__":
    main(sys.argv[1:])
