"""What it does to speaker models and alignments if all that they learn of a speaker is of one session.

    python benchmarks/bench_sessions.py OUTPUT                     # two seeds: about 10 minutes on two cores

Models v1 and v2 of the recipe's demo are trained on synthetic voices, of each speaker three utterances: all of one
session (one room, channel and mood), as where a single recording is cut into segments, or one of each of three
sessions. NESSA is fitted on others, again with three utterances of one session or of three. EER in %, profiles of
one utterance: "same session" tries a profile with the speaker's other utterances of its session, "other sessions" with
those of the others; non-target trials are the same. Means over seeds, with 95 % intervals over test speakers.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from nessa_modules.alignment import make_alignment
from nessa_modules.corpora import read_corpus, write_corpus
from nessa_modules.embeddings import embed
from nessa_modules.encoder import SpeakerEncoder
from nessa_modules.plan import read_plan
from nessa_modules.trials import SameSpace, make_trials, speaker_errors
from nessa_modules.voices import make_voices

RECIPE = Path(__file__).resolve().parent.parent / "recipes/VoxCeleb/SpeakerAlignment"
SIZES = {"train": 240, "alignment": 200, "dev": 16, "test": 40}
NUM_SESSIONS, NUM_PER_SESSION = 3, 3
DATA = {"one session": False, "three sessions": True}
TARGETS = ("same session", "other sessions")


def choose(utterances, is_spread):
    """Three utterances of each speaker: of the first session, or one of each session."""
    chosen = []
    for speaker in sorted({each.speaker for each in utterances}):
        own = [each for each in utterances if each.speaker == speaker]
        sessions = {name: [each for each in own if each.session == name] for name in sorted({u.session for u in own})}
        first = next(iter(sessions.values()))
        chosen += [each[0] for each in sessions.values()] if is_spread else first[:NUM_SESSIONS]
    return chosen


def train(folder, version, seed, train_csv, dev_csv, plan):
    """Train a model of the plan, unless it is there; returns it."""
    if not (folder / "done").exists():
        model = getattr(plan, version)
        options = {"seed": seed, "loss": plan.loss, "sample_rate": plan.sample_rate, **model.options}
        options |= {"train_csv": train_csv, "dev_csv": dev_csv, "output_folder": folder}
        command = [sys.executable, "train_embeddings.py", f"hparams/{model.hparams}", "--device", "cpu"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        subprocess.run(command, cwd=RECIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        (folder / "done").touch()
    return SpeakerEncoder.from_hparams(folder)


def same_session(trials, utterances):
    """Of each trial whether the profile's (only) utterance and the tested one are of one session."""
    sessions = np.array([each.session for each in utterances])
    profiles = np.array([sessions[rows[0]] for rows in trials.profile_rows])
    return profiles[trials.profile_index] == sessions[trials.test_rows][trials.test_index]


def main():
    """Train, align, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of everything; what is there is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    args.output = args.output.resolve()
    plan = read_plan(RECIPE / "hparams/experiment_demo.yaml")
    voices = make_voices(
        args.output, SIZES, NUM_SESSIONS * NUM_PER_SESSION, seed=4321, sample_rate=8000, num_sessions=NUM_SESSIONS
    )
    corpora = {split: read_corpus(voices, split=split) for split in SIZES}
    write_corpus(args.output / "dev.csv", corpora["dev"])
    trials = make_trials(corpora["test"], num_enroll=1, sets_per_speaker=NUM_SESSIONS * NUM_PER_SESSION)
    scores = {}  # from a system to its scores [T] of each seed

    for seed in args.seeds:
        for data, is_spread in DATA.items():
            train_csv = args.output / f"train_{data.split()[0]}.csv"
            write_corpus(train_csv, choose(corpora["train"], is_spread))
            embeddings = {}
            for version in ("v1", "v2"):
                folder = args.output / f"{data.split()[0]}_{version}_{seed}"
                model = train(folder, version, seed, train_csv, args.output / "dev.csv", plan)
                for split in ("alignment", "test"):
                    embeddings[version, split] = embed(model, corpora[split], args.output / "embeddings")
                own = embeddings[version, "test"]
                scores.setdefault(f"{version}, trained on {data}", []).append(trials.scores(SameSpace(), own, own))
            if not is_spread:
                continue  # alignments of the better models alone
            for aligned, is_aligned_spread in DATA.items():
                ids = {each.id for each in choose(corpora["alignment"], is_aligned_spread)}
                rows = [row for row, each in enumerate(corpora["alignment"]) if each.id in ids]
                x, y = (embeddings[version, "alignment"][rows] for version in ("v1", "v2"))
                nessa = make_alignment("nessa").fit(x, y, [corpora["alignment"][row].speaker for row in rows])
                pair = trials.scores(nessa, embeddings["v1", "test"], embeddings["v2", "test"])
                scores.setdefault(f"v1->v2, NESSA of {aligned}", []).append(pair)

    is_same, errors = same_session(trials, corpora["test"]), {}
    for targets, kept in zip(TARGETS, (is_same, ~is_same), strict=True):
        keep = kept | ~trials.labels
        errors[targets] = speaker_errors(
            trials.subset(keep), {name: [s[keep] for s in own] for name, own in scores.items()}
        )
    print("\n| | " + " | ".join(TARGETS) + " |\n| --- | --- | --- |")
    for system in scores:
        intervals = [errors[targets][system].interval() for targets in TARGETS]
        cells = [f"{100 * each.mean:.1f} [{100 * each.low:.1f}, {100 * each.high:.1f}]" for each in intervals]
        print(f"| {system} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
