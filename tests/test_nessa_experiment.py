"""Tests of the experiment: the whole of it with stand-ins for the models, what it keeps, and what it refuses."""

import csv
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPOSITORY, arguments

from nessa_modules import experiment
from nessa_modules.alignment import load_alignment
from nessa_modules.corpora import read_corpus
from nessa_modules.experiment import (
    SeedWork,
    evaluate,
    make_corpora,
    read_sexes,
    score_seed,
    shared_classifier,
    subset_of_speakers,
)
from nessa_modules.nessa import Nessa
from nessa_modules.options import DATA_OPTIONS, read_options
from nessa_modules.plan import CONTROLS, NEW, OLD, PAIRS, ModelPlan, Plan, System, read_plan, systems_of
from nessa_modules.report import LABELS, summary
from nessa_modules.trainings import Training, train_models
from nessa_modules.trials import SameSpace, eer, make_trials, trials_from_list

RECIPE = REPOSITORY / "recipes/VoxCeleb/SpeakerAlignment"
# With 9 alignment speakers NESSA ends at a closed form, at once; "many" are for what shall align well.
SIZES = {"train": 12, "alignment": 9, "many": 40, "dev": 4, "test": 12}


def draw(name, size):
    """Standard normal numbers that follow from a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=size)


class FakeEncoder:
    """A model that hears a speaker's 6 traits, with an error of its own, in a space of its own."""

    embedding_size, sample_rate = 10, 8000
    classifier_weight = speakers = None

    def __init__(self, folder, device="cpu"):
        self.name = json.loads((Path(folder) / "model.json").read_text())["name"]
        self.model_id = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        self.error = 1.6 if self.name.startswith("v1") else 0.4
        self.basis = np.linalg.qr(draw(self.name, (10, 10)))[0][:6]

    def encode_utterances(self, utterances, progressbar=True):
        rows = [
            draw(each.speaker, 6) + 0.3 * draw(each.id, 6) + self.error * draw(each.id + self.name, 6)
            for each in utterances
        ]
        return torch.tensor(np.array(rows) @ self.basis, dtype=torch.float32)

    def encode_batch(self, wavs):
        return torch.ones(len(wavs), 2000) @ torch.ones(2000, 2000) @ torch.ones(2000, self.embedding_size)


FAKE_RECIPE = """
    import json, sys
    from pathlib import Path
    options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    if options.get("--fail") == "True":
        sys.exit("error: --fail can only be False, but got True.")
    folder = Path(options["--output_folder"])
    assert Path(options["--train_csv"]).exists() and Path(options["--dev_csv"]).exists()
    (folder / "exported").mkdir(parents=True, exist_ok=True)
    (folder / "exported/model.json").write_text(json.dumps({"name": folder.name}))
    (folder / "history.csv").write_text("epoch,eer\\n1,0.1\\n")
    with open(folder / "started.txt", "a") as stream:
        stream.write("once\\n")
"""


@pytest.fixture
def fake_recipe(tmp_path):
    """A folder whose train_embeddings.py trains nothing."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "train_embeddings.py").write_text(textwrap.dedent(FAKE_RECIPE))
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Several csv, whose recordings hold nothing but noise."""
    folder = tmp_path_factory.mktemp("speakers")
    noise = np.random.default_rng(0).normal(0, 0.1, 9600)
    soundfile.write(folder / "noise.wav", noise, 8000)
    made = {}
    for split, num_speakers in SIZES.items():
        rows = [
            f"{split}{speaker:02d}-{number},{split}{speaker:02d},noise.wav,{'fm'[speaker % 2]}"
            for speaker in range(num_speakers)
            for number in range(6)
        ]
        made[split] = folder / f"{split}.csv"
        made[split].write_text("\n".join(["id,speaker,path,sex", *rows]))
    return made


@pytest.fixture(scope="module")
def sources(recordings):
    """The csv of each split."""
    return {split: path for split, path in recordings.items() if split != "many"}


@pytest.fixture
def plan():
    nessa = {"max_steps": 40, "hidden_size": 16}
    alignments = {kind: {} for kind in ("none", "logit", "procrustes", "least_squares")}
    return Plan(
        "toy",
        v1=ModelPlan("xvector.yaml", {"channels": 8}, 0.5),
        v2=ModelPlan("ecapa.yaml"),
        alignments={**alignments, "nessa_start": {}, "nessa": nessa, "nessa_runtime": nessa},
        num_enroll=2,
        sets_per_speaker=3,
        enroll_curve=(1, 2),
        speakers_curve=(6,),
        num_draws=60,
    )


@pytest.fixture
def fake_models(monkeypatch):
    monkeypatch.setattr(experiment, "load_encoder", FakeEncoder)


def run(plan, folder, fake_recipe, sources, seeds=(1, 2)):
    return experiment.run_experiment(plan, folder, fake_recipe, seeds, sources, progressbar=False)


@pytest.mark.usefixtures("fake_models")
def test_the_whole_experiment(plan, tmp_path, fake_recipe, sources):
    """The error rates are those computed here anew; a second call trains and fits nothing."""
    results = run(plan, tmp_path / "out", fake_recipe, sources)
    assert set(results.main) == set(systems_of(plan))
    assert len(results.main) == 2 + 2 * 7 + 2
    assert results.main[NEW].eer < 0.8 * results.main[OLD].eer
    assert set(results.by_sex) == {"f", "m"}
    assert set(results.by_enroll) == {1, 2}
    assert set(results.by_speakers) == {6, 9}
    assert results.by_enroll[2] is results.main

    test = read_corpus(tmp_path / "out/data/test.csv", progressbar=False)
    trials = make_trials(test, 2, 3)
    encoder = FakeEncoder(tmp_path / "out/models/v2_2/exported")
    embeddings = encoder.encode_utterances(test)
    expected = eer(trials.scores(SameSpace(), embeddings, embeddings), trials.labels)
    assert results.main[NEW].eer_by_seed[1] == pytest.approx(expected)

    alignment = load_alignment(tmp_path / "out/alignments/seed_1/v1_to_v2/procrustes")
    models = [FakeEncoder(tmp_path / f"out/models/{version}_1/exported") for version in ("v1", "v2")]
    assert (alignment.enroll_model_id, alignment.runtime_model_id) == tuple(model.model_id for model in models)
    scores = trials.scores(alignment, *(model.encode_utterances(test) for model in models))
    system = System("v1", "v2", "procrustes")
    assert results.main[system].eer_by_seed[0] == pytest.approx(eer(scores, trials.labels))
    women = trials.subset(np.array([pair[0] in WOMEN and pair[1] in WOMEN for pair in trials.speaker_pairs()]))
    own = women.scores(alignment, *(model.encode_utterances(test) for model in models))
    assert results.by_sex["f"][system].eer_by_seed[0] == pytest.approx(eer(own, women.labels))

    gains = results.gains[System("v1", "v2", "nessa")]["eer"]
    assert gains.gain.mean == pytest.approx(
        (results.main[OLD].eer - results.main[System("v1", "v2", "nessa")].eer)
        / (results.main[OLD].eer - results.main[NEW].eer)
    )
    text = summary(results)
    assert "## Profiles of v1, utterances of v2" in text
    assert f"| v1-v1 | {100 * results.main[OLD].eer:.1f} [" in text

    again = run(plan, tmp_path / "out", fake_recipe, sources)
    assert again.main[system].eer == results.main[system].eer
    starts = [path.read_text() for path in (tmp_path / "out/models").glob("*/started.txt")]
    assert starts == ["once\n"] * 4


WOMEN = {f"test{number:02d}" for number in range(0, 12, 2)}


@pytest.mark.usefixtures("fake_models")
def test_alignment_recovers_what_an_update_gains(plan, tmp_path, fake_recipe, sources, recordings):
    """Where both models hear the same six traits, a rotation nearly suffices; without any, scores tell nothing."""
    alignments = {kind: plan.alignments[kind] for kind in ("none", "procrustes", "nessa")}
    plan = dataclasses.replace(plan, alignments=alignments, speakers_curve=())
    results = run(plan, tmp_path / "out", fake_recipe, {**sources, "alignment": recordings["many"]}, seeds=(1,))
    for pair in PAIRS:
        assert results.main[System(*pair, "none")].eer > 0.35
        assert results.main[System(*pair, "procrustes")].eer < results.main[OLD].eer
        assert results.gains[System(*pair, "nessa")]["eer"].gain.low > 0


@pytest.mark.usefixtures("fake_models")
def test_scores_are_kept_until_something_changes(plan, tmp_path, sources, monkeypatch):
    make_corpora(plan, tmp_path / "data", sources, progressbar=False)
    models = {}
    for version in ("v1", "v2"):
        models[version] = tmp_path / version
        models[version].mkdir()
        (models[version] / "model.json").write_text(json.dumps({"name": version}))
    work = SeedWork(plan, 1, tmp_path, models)
    scores = score_seed(work)
    fits = []
    monkeypatch.setattr(experiment, "fit_alignment", lambda *args: fits.append(args) or SameSpace())
    kept = score_seed(work)
    assert not fits
    assert kept.keys() == scores.keys()
    assert all(np.array_equal(kept[key], scores[key]) for key in scores)
    path = tmp_path / "scores/seed_1.npz"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"no scores", b""):
        path.write_bytes(damaged)
        with pytest.raises(AttributeError):  # the stand-in cannot be saved: it was asked for
            score_seed(work)
        assert fits
        fits.clear()
    path.write_bytes(content)
    other = SeedWork(plan, 1, tmp_path, {**models, "v2": models["v1"]})
    with pytest.raises(AttributeError):
        score_seed(other)
    assert fits


def test_the_two_models_start_from_different_seeds(plan, tmp_path):
    one, other = (Training(plan, version, 1, tmp_path) for version in ("v1", "v2"))
    assert one.options["seed"] != other.options["seed"]
    assert (one.options["channels"], one.options["loss"]) == (8, "prototypical")


def test_a_model_of_another_plan_is_refused(plan, tmp_path, fake_recipe, sources):
    make_corpora(plan, tmp_path / "out/data", sources, progressbar=False)
    train_models([Training(plan, "v1", 1, tmp_path / "out")], fake_recipe, progressbar=False)
    other = Plan("toy", v1=ModelPlan("xvector.yaml", {"channels": 16}, 0.5), v2=plan.v2)
    with pytest.raises(ValueError, match="v1_1 is a model of other settings or data than the plan's"):
        train_models([Training(other, "v1", 1, tmp_path / "out")], fake_recipe, progressbar=False)


def test_a_failed_training_is_told_and_resumed(plan, tmp_path, fake_recipe, sources):
    make_corpora(plan, tmp_path / "out/data", sources, progressbar=False)
    training = Training(plan, "v1", 1, tmp_path / "out")
    training.options["fail"] = True
    with pytest.raises(ValueError, match=r"training of v1/1 failed: error: --fail can only be False"):
        train_models([training], fake_recipe, progressbar=False)
    assert not training.is_done()


def test_splits_share_no_speaker(plan, tmp_path, sources):
    two = {name: sources[name] for name in ("train", "dev", "test")}
    corpora = make_corpora(plan, tmp_path / "data", two, progressbar=False)
    speakers = {split: {each.speaker for each in utterances} for split, utterances in corpora.items()}
    assert len(speakers["alignment"]) == round(0.4 * SIZES["train"])
    assert not speakers["alignment"] & speakers["train"]
    with open(tmp_path / "data/train_v1.csv", newline="") as stream:
        half = {row["speaker"] for row in csv.DictReader(stream)}
    assert half < speakers["train"]
    assert len(half) == round(0.5 * len(speakers["train"]))
    for one, other in itertools.combinations(experiment.SPLITS, 2):
        with pytest.raises(ValueError, match=f"splits {one} and {other} share"):
            make_corpora(plan, tmp_path / "data", {**sources, other: sources[one]}, progressbar=False)
    with pytest.raises(ValueError, match="has no synthetic_sizes"):
        make_corpora(plan, tmp_path / "data", progressbar=False)


def test_only_what_is_learned_from_is_cut(plan, tmp_path, sources):
    """Segments of one test recording would meet each other in trials."""
    corpora = make_corpora(dataclasses.replace(plan, segment_seconds=0.5), tmp_path, sources, progressbar=False)
    sizes = {split: len(utterances) for split, utterances in corpora.items()}
    assert sizes == {split: 6 * SIZES[split] * (2 if split in ("train", "alignment") else 1) for split in sizes}


def test_a_moved_experiment_goes_on(plan, tmp_path, fake_recipe, sources):
    make_corpora(plan, tmp_path / "out/data", sources, progressbar=False)
    train_models([Training(plan, "v1", 1, tmp_path / "out")], fake_recipe, progressbar=False)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert Training(plan, "v1", 1, tmp_path / "moved").is_done()


def test_subsets_of_speakers_are_nested():
    speakers = [f"s{number // 3}" for number in range(60)]
    small, large = (subset_of_speakers(speakers, size, seed=1) for size in (5, 11))
    assert set(small) < set(large)
    assert len(small) == 15
    assert {speakers[row] for row in small} != {speakers[row] for row in subset_of_speakers(speakers, 5, seed=2)}


def test_classifiers_are_matched_by_speaker():
    one = SimpleNamespace(classifier_weight=torch.arange(6.0).view(3, 2), speakers=["a", "b", "c"])
    other = SimpleNamespace(classifier_weight=torch.arange(12.0).view(3, 4), speakers=["c", "x", "a"])
    weights = shared_classifier(one, other)
    assert weights[0].tolist() == [[0, 1], [4, 5]]
    assert weights[1].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert shared_classifier(one, SimpleNamespace(classifier_weight=None, speakers=None)) is None
    assert shared_classifier(one, SimpleNamespace(classifier_weight=torch.eye(2), speakers=["a", "y"])) is None


def test_a_plan_changes_its_base(tmp_path):
    (tmp_path / "old.yaml").write_text(
        "v1: {hparams: xvector.yaml, options: {lr: 0.1, n_mels: 24}}\nv2: {hparams: ecapa.yaml}\nnum_enroll: 2\n"
    )
    (tmp_path / "new.yaml").write_text("base: old.yaml\nv1: {options: {lr: 0.2}}\nsets_per_speaker: 7\n")
    old, new = (read_plan(tmp_path / f"{name}.yaml") for name in ("old", "new"))
    v1 = dataclasses.replace(old.v1, options={"lr": 0.2, "n_mels": 24})
    assert new == dataclasses.replace(old, name="new", v1=v1, sets_per_speaker=7)
    (tmp_path / "bad.yaml").write_text("base: ../old.yaml\n")
    with pytest.raises(ValueError, match=r"base can only name a YAML of the same folder, but got '\.\./old\.yaml'"):
        read_plan(tmp_path / "bad.yaml")
    (tmp_path / "newer.yaml").write_text("base: new.yaml\nsets_per_speaker: 8\n")
    assert read_plan(tmp_path / "newer.yaml") == dataclasses.replace(new, name="newer", sets_per_speaker=8)
    for name, base in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ValueError, match=r"one.yaml: its base two.yaml builds on it in turn"):
        read_plan(tmp_path / "two.yaml")
    (tmp_path / "other.yaml").write_text(
        "base: old.yaml\nv1: {hparams: ecapa.yaml}\nalignments: {nessa: {}, logit: {}}\n"
    )
    assert read_plan(tmp_path / "other.yaml").v1 == ModelPlan("ecapa.yaml")  # not with an x-vector's options
    (tmp_path / "fewer.yaml").write_text("base: other.yaml\nalignments: {nessa: }\n")
    assert read_plan(tmp_path / "fewer.yaml").alignments == {"nessa": {}}
    (tmp_path / "list.yaml").write_text("[1]")
    for base, message in (("list.yaml", "its base list.yaml is no plan"), ("''", "same folder, but got ''")):
        (tmp_path / "bad.yaml").write_text(f"base: {base}\n")
        with pytest.raises(ValueError, match=message):
            read_plan(tmp_path / "bad.yaml")
    (tmp_path / "lost.yaml").write_text("base: none.yaml\n")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_plan(tmp_path / "lost.yaml")


@pytest.mark.parametrize("name", ["demo", "800_speakers", "recorded", "recorded_disjoint"])
def test_plans_of_the_recipe(name):
    plan = read_plan(RECIPE / f"hparams/experiment_{name}.yaml")
    assert plan.num_enroll in plan.enroll_curve
    for model in (plan.v1, plan.v2):
        text = (RECIPE / "hparams" / model.hparams).read_text()
        for option in model.options:
            assert f"\n{option}: " in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss: triplet", "--loss can only be one of prototypical, ge2e, am_softmax, but got 'triplet'"),
        ("num_enrol: 3", "nothing beside .*, but got .v1, v2, num_enrol"),
        ("num_enroll: 0", "--num_enroll can only be a whole number of at least 1, but got 0"),
        ("alignments: {nessa: {depth: 3}}", "alignment nessa does not have all of the options depth"),
        ("alignments: {nessa: {}, rotation: {}}", "but got 'rotation'"),
        ("alignments: {logit: {}}", "nessa among them"),
        ("synthetic_sizes: {train: 3}", "at least 2 for each of train, alignment, dev, test"),
        ("v1: 3", "v1 must have hparams"),
        ("v1: {hparams: ../evil.yaml}", r"can only name a YAML of the recipe, but got '\.\./evil\.yaml'"),
        ("v1: {hparams: 3}", "can only name a YAML of the recipe, but got 3"),
        ("v1: {hparams: a.yaml, options: [1]}", "options of v1 can only be names with values"),
        (
            "v1: {hparams: a.yaml, share_of_speakers: half}",
            "share_of_speakers of v1 .*, but got 'half'",
        ),
        ("[", "is no YAML"),
    ],
)
def test_mistakes_in_a_plan(tmp_path, change, message):
    path = tmp_path / "plan.yaml"
    lines = {"v1": "v1: {hparams: xvector.yaml}", "v2": "v2: {hparams: ecapa.yaml}"}
    path.write_text("\n".join({**lines, change.split(":")[0]: change}.values()))
    with pytest.raises(ValueError, match=message):
        read_plan(path)


def test_sexes_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("speaker,sex\n14,F\n16,male\n17,?\n")
    assert read_sexes(tmp_path / "a.csv") == {"14": "f", "16": "m"}
    (tmp_path / "b.txt").write_text("nothing")
    with pytest.raises(ValueError, match="tells no speaker's sex"):
        read_sexes(tmp_path / "b.txt")


# The recipe's script


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("nessa_experiment_script", RECIPE / "experiment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TOY_PLAN = """
v1: {hparams: xvector.yaml}
v2: {hparams: ecapa.yaml}
alignments: {none: , logit: , least_squares: , nessa: {max_steps: 20, hidden_size: 8}}
num_enroll: 2
sets_per_speaker: 2
enroll_curve: [1, 2]
speakers_curve: [4, 6]
num_draws: 20
"""


@pytest.mark.usefixtures("fake_models")
def test_the_command(script, tmp_path, fake_recipe, sources, monkeypatch, capsys):
    monkeypatch.setattr(script, "RECIPE", fake_recipe)
    monkeypatch.setattr(script, "load_encoder", FakeEncoder)
    (tmp_path / "toy.yaml").write_text(TOY_PLAN)
    given = [part for split, source in sources.items() for part in (f"--{split}_csv", str(source))]
    out = tmp_path / "out"
    script.main([str(out), "--plan", str(tmp_path / "toy.yaml"), "--seeds", "1", "2", "--jobs", "1", *given])
    printed = capsys.readouterr().out
    assert (out / "summary.md").read_text() in printed
    for name in ("error_rates.png", "det.png", "dependence.png", "spaces.png", "results.csv", "costs.csv"):
        assert (out / name).stat().st_size > 0
        assert str(out / name) in printed
    with open(out / "differences.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    main = [row for row in rows if row["trials"] == "all" and row["num_enroll"] == "2"]
    main = [row for row in main if row["num_alignment_speakers"] == "9"]
    assert sorted((row["enroll"], row["runtime"], row["minus"]) for row in main) == sorted(
        [(*pair, minus) for pair in (("v1", "v2"), ("v2", "v1")) for minus in ("none", "logit", "least_squares")]
        + [(version, version, "none") for version in ("v1", "v2")]
    )
    with open(out / "intervals.csv", newline="") as stream:
        by_trials = {row["trials"] for row in csv.DictReader(stream)}
    assert by_trials == {"all", "women", "men"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "triplet"], "--loss can only be one of"),
        (["--seeds", "1", "1"], "--seeds can only be different whole numbers"),
        (["--jobs", "0"], "--jobs can only be"),
        (["--train_csv", "x.csv"], "--dev_csv is missing"),
        (["--plan", "no_such.yaml"], "The plan no_such.yaml cannot be read"),
        (["--train_csv", "x.csv", "--dev_csv", "y.csv", "--test_csv", "z.csv"], "x.csv does not exist"),
    ],
)
def test_mistakes_on_the_command_line(script, tmp_path, options, message):
    with pytest.raises(SystemExit) as stop:
        script.main([str(tmp_path / "out"), *options])
    assert str(stop.value.code).startswith("error: ")
    assert message in str(stop.value.code)


def test_evaluate_needs_both_sexes(plan, tmp_path, sources):
    """Where the sex is not known there are no error rates per sex."""
    corpora = make_corpora(plan, tmp_path, sources, progressbar=False)
    corpora["test"] = [SimpleNamespace(speaker=each.speaker, session="", sex="") for each in corpora["test"]]
    trials = make_trials(corpora["test"], plan.num_enroll, plan.sets_per_speaker)
    rng = np.random.default_rng(0)
    scores = {
        ("main", 0, system): [trials.labels + rng.normal(size=len(trials))]
        for system in (OLD, NEW, *(System(*pair, "nessa") for pair in PAIRS), *CONTROLS)
    }
    results = evaluate(plan, [1], corpora, scores, progressbar=False)
    assert results.by_sex == {}
    assert "per sex" not in summary(results)


# train_alignment.py


@pytest.fixture(scope="module")
def train_alignment():
    sys.path.insert(0, str(RECIPE))
    spec = importlib.util.spec_from_file_location("nessa_train_alignment", RECIPE / "train_alignment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(RECIPE))


@pytest.fixture
def fit(train_alignment, tmp_path, sources, monkeypatch):
    """Run the script with two stand-ins: ``fit(alignment="procrustes", ...)``."""
    hook = sys.excepthook
    monkeypatch.setattr(train_alignment, "load_encoder", FakeEncoder)
    options = {f"{split}_csv": sources[split] for split in ("alignment", "dev", "test")}
    for side, name in (("enroll", "v1_0"), ("runtime", "v2_0")):
        folder = tmp_path / side
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps({"name": name}))
        options[f"{side}_model"] = folder
    options |= {"output_folder": tmp_path / "out", "num_enroll": 2, "num_draws": 20, "min_seconds": 0.5}

    def run(**overrides):
        given = {name: value for name, value in {**options, **overrides}.items() if value is not None}
        train_alignment.main([str(RECIPE / "hparams/alignment.yaml"), *arguments(given)])
        return tmp_path / "out"

    yield run
    sys.excepthook = hook


def read_csv(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("kind", ["procrustes", "nessa"])
def test_an_alignment_is_fitted_tested_and_calibrated(fit, recordings, kind, capsys):
    out = fit(alignment=kind, max_steps=20, hidden_size=8, alignment_csv=recordings["many"])
    assert ("NESSA" in capsys.readouterr().out) == (kind == "nessa")
    alignment = load_alignment(out / "alignment")
    models = [FakeEncoder(out.parent / side) for side in ("enroll", "runtime")]
    assert alignment.name == kind
    assert (alignment.enroll_model_id, alignment.runtime_model_id) == tuple(model.model_id for model in models)

    test = read_corpus(out / "manifests/test.csv", progressbar=False)
    trials = make_trials(test, 2, 5, seed=1986)
    scores = trials.scores(alignment, *(model.encode_utterances(test) for model in models))
    rows = {(row["split"], row["system"]): row for row in read_csv(out / "results.csv")}
    assert len(rows) == 2 * 4
    assert float(rows["test", LABELS[kind]]["eer"]) == pytest.approx(eer(scores, trials.labels))

    # Of 4 x 5 profiles and 24 utterances of dev, 360 trials are non-targets: 0.1 % of them are no trial at all.
    assert [row["false_accept_rate"] for row in alignment.calibration] == [0.1, 0.05, 0.01]
    for row, kept in zip(read_csv(out / "thresholds.csv"), alignment.calibration, strict=True):
        assert float(row["threshold"]) == kept["threshold"]
        accepted = (scores >= kept["threshold"])[~trials.labels].mean()
        assert float(row["test_false_accept_rate"]) == pytest.approx(accepted)
    assert (out / "report.png").stat().st_size > 0
    assert list((out / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("steps", "cost", "max_steps", "words"),
    [
        (
            40,
            0.2,
            400,
            "trained for 40 steps on 12 speakers: the cost of held-out speakers (0 to 1) is 0.200, was 0.500",
        ),
        (0, 0.5, 400, "a closed form of 12 speakers, which training did not improve: the cost"),
        (0, 0.5, 0, "a closed form of 12 speakers: the cost"),
        (0, None, 400, "none can be held out"),
    ],
)
def test_what_training_did_is_said_in_words(train_alignment, steps, cost, max_steps, words):
    details = {"num_speakers": 12, "steps": steps, "cost": cost, "start_cost": 0.5}
    assert words in train_alignment.fit_sentence(SimpleNamespace(details=details), max_steps)


def test_trials_of_a_list(fit, tmp_path):
    lines = [f"1 test{n:02d}-0 test{n:02d}-1\n0 test{n:02d}-0 test{(n + 1) % 12:02d}-3" for n in range(12)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    out = fit(alignment="none", test_trials=tmp_path / "list.txt")
    test = read_corpus(out / "manifests/test.csv", progressbar=False)
    trials = trials_from_list(test, experiment_list(lines))
    model = FakeEncoder(tmp_path / "enroll").encode_utterances(test)
    row = next(row for row in read_csv(out / "results.csv") if row["split"] == "test")
    assert row["system"] == "enrollment model on both sides"
    assert float(row["eer"]) == pytest.approx(eer(trials.scores(SameSpace(), model, model), trials.labels))


def experiment_list(lines):
    return [(int(label), *names) for line in lines for label, *names in map(str.split, line.splitlines())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "rotation"}, "--alignment can only be one of none, logit"),
        ({"max_step": 3}, "no option --max_step; did you mean --max_steps?"),
        ({"enroll_model": None}, "--enroll_model is missing"),
        ({"num_enroll": 6}, "No speaker has more than 6 utterances"),
        ({"num_enroll": 0}, "--num_enroll can only be a whole number of at least 1, but got 0"),
        ({"false_accept_rates": "[1.5]"}, "a list of numbers above 0 and below 1, but got [1.5]"),
        ({"device": "bogus"}, "device can only be one of this machine, but got 'bogus'"),
        ({"dev_csv": None}, "dev_csv is missing"),
        ({"test_trials": "no_such.txt"}, "no_such.txt cannot be read"),
    ],
)
def test_mistakes_in_fitting(fit, options, message):
    with pytest.raises(SystemExit) as stop:
        fit(**options)
    assert str(stop.value.code).startswith("error: ")
    assert message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_the_yamls_of_the_recipe_agree():
    """The three commands share one data folder's speakers out alike, and fit NESSA as the experiment does."""
    folder = REPOSITORY / "recipes/VoxCeleb/SpeakerAlignment/hparams"
    options = {name: read_options(folder / f"{name}.yaml")[1] for name in ("ecapa", "xvector", "alignment")}
    shared = [name for name in DATA_OPTIONS if name in options["alignment"] and not name.endswith("_csv")]
    assert {"speaker_shares", "split_seed", "synthetic_speakers", "synthetic_seed"} <= set(shared)
    for name in shared:
        assert options["ecapa"][name] == options["xvector"][name] == options["alignment"][name], name
    for name, parameter in inspect.signature(Nessa).parameters.items():
        if name in options["alignment"] and name != "seed":
            assert options["alignment"][name] == parameter.default, name
