"""Fit an alignment of two frozen speaker models, test it, calibrate its thresholds, and save it.

    > python train_alignment.py hparams/alignment.yaml --enroll_model large/exported --runtime_model small/exported
    > python train_alignment.py hparams/alignment.yaml --enroll_model speechbrain/spkrec-ecapa-voxceleb \\
          --runtime_model small/exported --alignment nessa_runtime --data_folder /path/to/voxceleb

Every option stands, with its values, in hparams/alignment.yaml. The alignment is put into <output_folder>/alignment.
"""

import sys
from functools import partial
from pathlib import Path

import speechbrain as sb
from voxceleb_prepare import check_data, prepare_data

from nessa_modules.alignment import ALIGNMENT_FOLDER, ALIGNMENTS
from nessa_modules.corpora import read_corpus, read_voxceleb_trials
from nessa_modules.embeddings import embed
from nessa_modules.experiment import fit_alignment, load_encoder
from nessa_modules.options import DATA_OPTIONS
from nessa_modules.plan import NESSA_KINDS, SEEDED_KINDS
from nessa_modules.report import LABELS, alignment_figure
from nessa_modules.trials import SameSpace, calibrate_thresholds, make_trials, speaker_errors, trials_from_list
from shared_modules.devices import find_device
from shared_modules.errors import ends_in_one_sentence, mistakes_as_run_errors
from shared_modules.figures import save_figure
from shared_modules.files import lock_folder, write_table
from shared_modules.options import (
    BOOL,
    OPTIONAL_PATH,
    PATH,
    check_values,
    list_of,
    number,
    one_of,
    optional,
    read_options,
    whole,
)
from shared_modules.tracking import event_writer

SPLITS = ("alignment", "dev", "test")
_SHARE = number(lambda v: 0 < v < 1, "above 0 and below 1")
# What each option may be: a test, and the words for what is expected.
EXPECTED = {
    "seed": whole(0, 2**32 - 1),
    "enroll_model": PATH,
    "runtime_model": PATH,
    "device": PATH,
    "output_folder": PATH,
    **DATA_OPTIONS,
    "alignment_csv": OPTIONAL_PATH,
    "test_csv": OPTIONAL_PATH,
    "test_trials": OPTIONAL_PATH,
    "alignment": one_of(*ALIGNMENTS),
    "hidden_size": whole(1),
    "max_profile": whole(1),
    "speakers_per_batch": whole(2),
    "max_steps": whole(0),
    "lr": number(lambda v: v > 0, "above 0"),
    "dropout": number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
    "ridge": optional(number(lambda v: v >= 0, "of at least 0")),
    "center": BOOL,
    "num_enroll": whole(1),
    "sets_per_speaker": whole(1),
    "exclude_same_session": BOOL,
    "p_target": _SHARE,
    "num_draws": whole(2),
    "false_accept_rates": list_of(
        lambda v: all(isinstance(rate, float) and 0 < rate < 1 for rate in v),
        "a list of numbers above 0 and below 1",
    ),
}
_OF_NESSA = ("hidden_size", "max_profile", "speakers_per_batch", "max_steps", "lr", "dropout", "seed")
# Which of the options a kind of alignment takes.
OPTIONS_OF = {"logit": ("center",), "least_squares": ("ridge", "seed"), "nessa_start": ("max_profile", "seed")}
OPTIONS_OF |= dict.fromkeys(NESSA_KINDS, _OF_NESSA)


def check_options(options):
    """Refuse values that are out of range, and a device that is not there."""
    for name in ("enroll_model", "runtime_model"):
        if options[name] is None:
            raise ValueError(f"--{name} is missing: the folder of an exported model, or a name on the hub.")
    check_values(options, EXPECTED)
    find_device(options["device"])


def make_all_trials(options, utterances):
    """The trials of dev and test."""
    choose = partial(
        make_trials,
        num_enroll=options["num_enroll"],
        sets_per_speaker=options["sets_per_speaker"],
        seed=options["seed"],
        exclude_same_session=options["exclude_same_session"],
    )
    trials = {"dev": choose(utterances["dev"])}
    if options["test_trials"]:
        trials["test"] = trials_from_list(utterances["test"], read_voxceleb_trials(options["test_trials"]))
    else:
        trials["test"] = choose(utterances["test"])
    return trials


def score_all(kind, alignment, trials, embeddings, split):
    """The scores of both symmetric pairs and of the asymmetric one, without and with the alignment."""
    enroll, runtime = embeddings["enroll", split], embeddings["runtime", split]
    scores = {
        "enrollment model on both sides": trials.scores(SameSpace(), enroll, enroll),
        "runtime model on both sides": trials.scores(SameSpace(), runtime, runtime),
    }
    if enroll.shape[1] == runtime.shape[1] and kind != "none":
        scores[LABELS["none"]] = trials.scores(SameSpace(), enroll, runtime)
    return {**scores, LABELS[kind]: trials.scores(alignment, enroll, runtime)}


def result_rows(split, errors):
    """The error rates of one split."""
    rows = []
    for name, rates in errors.items():
        row = {"split": split, "system": name}
        for measure in ("eer", "min_dcf"):
            interval = rates.interval(measure)
            row |= {measure: interval.mean, f"{measure}_low": interval.low, f"{measure}_high": interval.high}
        rows.append(row)
    return rows


def threshold_rows(rates, scores, trials):
    """The thresholds that dev gives, and what they do on test."""
    rows = []
    for row in calibrate_thresholds(scores["dev"], trials["dev"].labels, rates):
        is_target, is_accepted = trials["test"].labels, scores["test"] >= row["threshold"]
        rows.append(
            {
                **{name: row[name] for name in ("false_accept_rate", "threshold")},
                "dev_false_reject_rate": row["false_reject_rate"],
                "test_false_accept_rate": float(is_accepted[~is_target].mean()),
                "test_false_reject_rate": float(1 - is_accepted[is_target].mean()),
            }
        )
    return rows


def fit_sentence(alignment, max_steps):
    """What came of NESSA's training, in words."""
    details = alignment.details
    speakers = f"{details['num_speakers']} speakers"
    if details["cost"] is None:
        return f"NESSA is a closed form: of {speakers} none can be held out to train on the others"
    cost = f"the cost of held-out speakers (0 to 1) is {details['cost']:.3f}"
    if details["steps"]:
        return f"NESSA was trained for {details['steps']} steps on {speakers}: {cost}, was {details['start_cost']:.3f}"
    why = ", which training did not improve" if max_steps else ""
    return f"NESSA is a closed form of {speakers}{why}: {cost}"


def report(options, alignment, rows, thresholds, curves):
    """Write the tables, the figure and TensorBoard's events; print what matters."""
    folder, history = Path(options["output_folder"]), alignment.history
    write_table(folder / "results.csv", rows)
    if thresholds:
        write_table(folder / "thresholds.csv", thresholds)
    if history:
        write_table(folder / "history.csv", history)
    figure = alignment_figure(curves, history)
    save_figure(figure, folder / "report.png")
    with event_writer(str(folder / "tensorboard"), first_step=0) as writer:
        for row in history:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(f"alignment/{name}", value, row["step"])
        for row in rows:
            for measure in ("eer", "min_dcf"):
                writer.add_scalar(f"{measure}/{row['split']}/{row['system'].replace(' ', '_')}", row[measure], 0)
        writer.add_figure("report", figure, 0)
    if alignment.name in NESSA_KINDS:
        print(fit_sentence(alignment, options["max_steps"]))
    for row in rows:
        rate, low, high = (f"{100 * row[name]:.2f}" for name in ("eer", "eer_low", "eer_high"))
        interval = f"(95 %: {low} to {high})"
        print(f"{row['split']:5} {row['system']:31} EER {rate:>5} % {interval}, minDCF {row['min_dcf']:.3f}")
    for row in thresholds:
        print(
            f"threshold {row['threshold']:.4f}: dev accepts {100 * row['false_accept_rate']:g} % of the non-targets, "
            f"test {100 * row['test_false_accept_rate']:.2f} %, and test rejects "
            f"{100 * row['test_false_reject_rate']:.2f} % of the targets"
        )
    print(f"{folder / 'alignment'}: the alignment; {folder / 'report.png'}: its curves")


@ends_in_one_sentence
def main(argv):
    """The run: check, prepare, embed, fit, test, calibrate, save."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    with mistakes_as_run_errors():
        given = {name: run_opts[name] for name in run_opts.overridden_args}
        overrides, options = read_options(hparams_file, overrides, given, EXPECTED)
        check_options(options)
        check_data(options, SPLITS)
        lock = lock_folder(options["output_folder"])  # until the end of the run
        encoders = {side: load_encoder(options[f"{side}_model"], options["device"]) for side in ("enroll", "runtime")}
        manifests = prepare_data(options, SPLITS)
        utterances = {split: read_corpus(path) for split, path in manifests.items()}
        trials = make_all_trials(options, utterances)
        sb.create_experiment_directory(options["output_folder"], hparams_file, overrides)
        cache = Path(options["output_folder"]) / "embeddings"
        embeddings = {
            (side, split): embed(encoder, utterances[split], cache)
            for side, encoder in encoders.items()
            for split in SPLITS
        }
        kind = options["alignment"]
        own_options = {name: options[name] for name in OPTIONS_OF.get(kind, ())}
        alignment = fit_alignment(
            kind,
            {**own_options, "progressbar": True} if kind in SEEDED_KINDS else own_options,
            (embeddings["enroll", "alignment"], embeddings["runtime", "alignment"]),
            [utterance.speaker for utterance in utterances["alignment"]],
            (encoders["enroll"], encoders["runtime"]),
        )
        scores = {split: score_all(kind, alignment, trials[split], embeddings, split) for split in ("dev", "test")}
        rows = []
        for split, own in scores.items():
            by_system = {name: [each] for name, each in own.items()}
            errors = speaker_errors(
                trials[split], by_system, options["num_draws"], options["seed"], options["p_target"]
            )
            rows += result_rows(split, errors)
        aligned = {split: own[LABELS[kind]] for split, own in scores.items()}
        thresholds = threshold_rows(options["false_accept_rates"], aligned, trials)
        alignment.calibration = [{name: row[name] for name in ("false_accept_rate", "threshold")} for row in thresholds]
        ids = encoders["enroll"].model_id, encoders["runtime"].model_id
        alignment.save(Path(options["output_folder"]) / ALIGNMENT_FOLDER, *ids)
        curves = {name: (each, trials["test"].labels) for name, each in scores["test"].items()}
    report(options, alignment, rows, thresholds, curves)
    del lock


if __name__ == "__main__":
    main(sys.argv[1:])
