"""The recipe of the embedding models, tiny: it learns, survives kills, and exports what it trained."""

import csv
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPOSITORY, arguments, voice
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nessa_modules.encoder import SpeakerEncoder
from nessa_modules.losses import LOSSES
from nessa_modules.options import EXPECTED, check_options, check_resume, read_options
from nessa_modules.trials import eer

RECIPE = REPOSITORY / "recipes" / "VoxCeleb" / "SpeakerAlignment"
MODELS = ("ecapa", "xvector")
TINY = {
    "sample_rate": 8000,
    "n_mels": 24,
    "n_fft": 256,
    "channels": 16,
    "last_channels": 24,
    "embedding_size": 12,
    "number_of_epochs": 3,
    "steps_per_epoch": 6,
    "speakers_per_batch": 6,
    "crop_seconds": 0.5,
    "dev_crop_seconds": 0.8,
    "lr": 0.01,
    "num_workers": 0,
    "device": "cpu",
    "noprogressbar": None,
}
TINY_ECAPA = {**TINY, "attention_channels": 8, "se_channels": 8, "res2net_scale": 4}


def write_speakers(folder, name, num_speakers, num_utterances, seed):
    """A csv of speakers who differ in pitch."""
    rng = np.random.default_rng(seed)
    lines = ["id,speaker,path"]
    for speaker in range(num_speakers):
        pitch_hz = 90 * 1.15 ** (speaker + 0.5 * seed)
        for number in range(num_utterances):
            utterance = f"{name}{speaker:02d}-{number}"
            signal = voice(rng, int(8000 * rng.uniform(1.0, 1.4)), pitch_hz * rng.uniform(0.98, 1.02))
            soundfile.write(folder / f"{utterance}.wav", signal, 8000)
            lines.append(f"{utterance},{name}{speaker:02d},{utterance}.wav")
    path = folder / f"{name}.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The options that give the data: eight training speakers, four that validate."""
    folder = tmp_path_factory.mktemp("speakers")
    return {
        "train_csv": write_speakers(folder, "train", 8, 4, seed=0),
        "dev_csv": write_speakers(folder, "dev", 4, 4, seed=1),
    }


@pytest.fixture(scope="module")
def script():
    """The recipe's script as a module."""
    sys.path.insert(0, str(RECIPE))
    spec = importlib.util.spec_from_file_location("train_embeddings", RECIPE / "train_embeddings.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_embeddings"] = module
    spec.loader.exec_module(module)
    hook = sys.excepthook
    yield module
    sys.excepthook = hook


def run(script, model="ecapa", **overrides):
    tiny = TINY_ECAPA if model == "ecapa" else TINY
    script.main([str(RECIPE / "hparams" / f"{model}.yaml"), *arguments({**tiny, **overrides})])


def history(folder):
    with open(Path(folder) / "history.csv", newline="") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def weights(folder):
    newest = sorted(Path(folder, "save").glob("CKPT*"))[-1]
    return {name: torch.load(newest / f"{name}.ckpt", weights_only=True) for name in ("embedding_model", "optimizer")}


def flat(tree, name=""):
    """The leaves of nested dicts and lists, tensors as lists of numbers."""
    if isinstance(tree, torch.Tensor):
        return {name: tree.tolist()}
    if not isinstance(tree, dict | list):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {leaf: value for key, child in items for leaf, value in flat(child, f"{name}.{key}").items()}


def scalars(folder):
    events = EventAccumulator(str(Path(folder, "tensorboard")), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def utterances(data):
    from nessa_modules.corpora import read_corpus

    return read_corpus(data["dev_csv"])


@pytest.fixture(scope="module")
def whole_run(script, data, tmp_path_factory):
    """Three epochs, uninterrupted, of a model whose pooling draws random numbers."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(script, "xvector", **data, output_folder=folder)
    return folder


def test_it_learns_to_tell_unseen_speakers_apart(script, data, tmp_path):
    torch.manual_seed(0)
    run(script, **data, output_folder=tmp_path / "run", number_of_epochs=5, loss="prototypical", steps_per_epoch=12)
    rows = history(tmp_path / "run")
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    encoder = SpeakerEncoder.from_hparams(tmp_path / "run")
    heard = utterances(data)
    embeddings = torch.nn.functional.normalize(encoder.encode_utterances(heard, progressbar=False), dim=-1)
    first, second = torch.triu_indices(len(heard), len(heard), offset=1)
    labels = [heard[i].speaker == heard[j].speaker for i, j in zip(first, second, strict=True)]
    assert eer((embeddings @ embeddings.T)[first, second].numpy(), labels) < 0.2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_model_trains_with_each_loss(model, loss, script, data, tmp_path):
    run(script, model, **data, output_folder=tmp_path, loss=loss, number_of_epochs=1, steps_per_epoch=2)
    encoder = SpeakerEncoder.from_hparams(tmp_path)
    assert encoder.sample_rate == 8000
    assert encoder.embedding_size == 12
    if loss == "am_softmax":
        assert encoder.speakers == [f"train{number:02d}" for number in range(8)]
        assert encoder.classifier_weight.shape == (8, 12)
        assert torch.allclose(encoder.classifier_weight.norm(dim=-1), torch.ones(8))
    else:
        assert encoder.speakers is None
        assert encoder.classifier_weight is None


def test_the_records_agree(whole_run):
    rows, events = history(whole_run), scalars(whole_run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for tag, column in (("loss/train", "train_loss"), ("accuracy/train", "train_accuracy"), ("eer/valid", "valid_eer")):
        assert [step for step, _ in events[tag]] == [1, 2, 3]
        assert [value for _, value in events[tag]] == pytest.approx([row[column] for row in rows])
    # Warm up over a tenth of 18 steps, then down: the last step of each epoch.
    shares = [(1 - step / 18) / 0.9 for step in (5, 11, 17)]
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * share for share in shares])
    assert len((whole_run / "train_log.txt").read_text().splitlines()) == 3


def test_the_best_epoch_is_exported(whole_run):
    best = min(row["valid_eer"] for row in history(whole_run))
    found = {}
    for checkpoint in (whole_run / "save").glob("CKPT*"):
        meta = (checkpoint / "CKPT.yaml").read_text()
        number = float(meta.split("eer: ")[1].split()[0])
        found[number] = torch.load(checkpoint / "embedding_model.ckpt", weights_only=True)
    assert min(found) == pytest.approx(best)
    exported = torch.load(whole_run / "exported" / "embedding_model.ckpt", weights_only=True)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in found[min(found)].items())


# Killed between a step and the next, or between an epoch's records and its checkpoint.
KILL = """
import os, signal, sys
sys.path.insert(0, {recipe!r})
import torch
import train_embeddings
from shared_modules import tracking
torch.set_num_threads(1)
owner, name = {place}
inner, calls = getattr(owner, name), 0
def wrapped(*args, **kwargs):
    global calls
    calls += 1
    if calls == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kwargs)
setattr(owner, name, wrapped)
train_embeddings.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("place", "number"),
    [('(train_embeddings.Embeddings, "compute_objectives")', 10), ('(tracking.History, "append")', 2)],
)
def test_a_killed_run_goes_on_to_the_same_result(place, number, script, data, whole_run, tmp_path):
    expected, killed = whole_run, tmp_path / "killed"
    command = [str(RECIPE / "hparams" / "xvector.yaml"), *arguments({**TINY, **data, "output_folder": killed})]
    code = KILL.format(recipe=str(RECIPE), place=place, number=number)
    process = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=REPOSITORY)
    assert process.returncode == -9, process.stderr[-2000:]
    assert not (killed / "exported").exists()
    run(script, "xvector", **data, output_folder=killed)

    assert flat(weights(expected)) == flat(weights(killed))
    for row, other in zip(history(expected), history(killed), strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert scalars(expected) == scalars(killed)
    assert (expected / "train_log.txt").read_text() == (killed / "train_log.txt").read_text()
    ids = {SpeakerEncoder.from_hparams(folder).model_id for folder in (expected, killed)}
    assert len(ids) == 1


def test_a_finished_run_is_exported_again(script, data, whole_run):
    before = (whole_run / "history.csv").read_bytes()
    model_id = SpeakerEncoder.from_hparams(whole_run).model_id
    run(script, "xvector", **data, output_folder=whole_run)
    assert (whole_run / "history.csv").read_bytes() == before
    assert SpeakerEncoder.from_hparams(whole_run).model_id == model_id


def test_workers_change_nothing(script, data, whole_run, tmp_path):
    run(script, "xvector", **data, output_folder=tmp_path, num_workers=1)
    for row, other in zip(history(whole_run), history(tmp_path), strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def fails_with(script, model="ecapa", **overrides):
    """The sentence that a run ends with."""
    with pytest.raises(SystemExit) as ended:
        run(script, model, **overrides)
    sentence = str(ended.value)
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("loss", ["prototypical", "am_softmax"])
def test_a_run_that_diverges_says_so(loss, script, data, tmp_path):
    sentence = fails_with(script, **data, output_folder=tmp_path, lr=1e30, lr_warmup=0, loss=loss)
    assert "the training diverged. Lower --lr" in sentence


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (lambda path: soundfile.write(path, np.zeros(8000), 8000), "is silent"),
        (lambda path: soundfile.write(path, np.full(8000, np.nan), 8000, subtype="FLOAT"), "not finite"),
        (lambda path: path.write_bytes(b"RIFF, or so"), "cannot be read"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_a_broken_recording_is_named(broken, fault, script, tmp_path):
    data = {f"{name}_csv": write_speakers(tmp_path, name, 6, 2, seed) for seed, name in enumerate(("train", "dev"))}
    broken(tmp_path / "train02-1.wav")
    sentence = fails_with(script, **data, output_folder=tmp_path / "run")
    assert "train02-1" in sentence
    assert fault in sentence


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"loss": "triplet"}, "--loss can only be one of prototypical, ge2e, am_softmax, but got 'triplet'"),
        ({"los": "ge2e"}, "There is no option --los; did you mean --loss?"),
        ({"speakers_per_batch": 9}, "--speakers_per_batch can only be up to 8, the number of training speakers"),
        ({"utterances_per_speaker": 1, "loss": "ge2e"}, "give at least 2 for --utterances_per_speaker, not 1"),
        ({"res2net_scale": 3}, "--res2net_scale must divide channels, but got 3 for 16 channels"),
        ({"n_fft": 128}, "--n_fft can only be 200 or more at 8000 Hz"),
        ({"out_n_neurons": 7}, "--out_n_neurons can only be 8, the number of training speakers, but got 7"),
        ({"dev_csv": "null"}, "dev_csv is missing"),
        ({"train_csv": "no/such.csv"}, "train_csv no/such.csv does not exist"),
        ({"crop_seconds": 0.1}, "--crop_seconds can only be a number of at least 0.25, but got 0.1"),
        ({"device": "cudo"}, "device can only be one of this machine, but got 'cudo'"),
        ({"precision": "fp16"}, "--precision fp16 needs a GPU"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(overrides, sentence, script, data, tmp_path):
    assert sentence in fails_with(script, **{**data, "output_folder": tmp_path / "run", **overrides})
    assert not (tmp_path / "run" / "save").exists()


def test_several_processes_are_refused(script, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "trained by one process" in fails_with(script, **data, output_folder=tmp_path)


def test_another_run_in_the_folder_is_refused(script, data, whole_run):
    for overrides, sentence in (
        ({"channels": 24}, "--channels is 24, but the run in"),
        ({"loss": "ge2e"}, "--loss is ge2e, but the run in"),
        ({"seed": 3}, "--seed is 3, but the run in"),
    ):
        assert sentence in fails_with(script, "xvector", **{**data, "output_folder": whole_run, **overrides})
    assert "of another kind of model" in fails_with(script, **data, output_folder=whole_run)


def test_validation_needs_trials_of_both_kinds(script, data, tmp_path):
    one_each = write_speakers(tmp_path, "dev", 4, 1, seed=1)
    sentence = fails_with(script, **{**data, "dev_csv": one_each, "output_folder": tmp_path / "run"})
    assert "Validation needs several speakers, one of them with several utterances" in sentence


@pytest.mark.parametrize("model", MODELS)
def test_every_option_is_checked(model):
    """Each scalar of the YAML stands in the table; nothing else does, but for the other model's form."""
    _, options = read_options(RECIPE / "hparams" / f"{model}.yaml")
    scalars = {name for name, value in options.items() if not isinstance(value, dict) and not name.startswith("__")}
    built = {name for name in scalars if options[name] is None and name not in EXPECTED}
    assert scalars - built <= EXPECTED.keys()
    only_ecapa = {"attention_channels", "se_channels", "res2net_scale"}
    assert EXPECTED.keys() - scalars == (only_ecapa if model == "xvector" else set())
    check_options(options)


def test_a_new_folder_has_nothing_to_contradict(tmp_path):
    _, options = read_options(RECIPE / "hparams" / "ecapa.yaml", f"output_folder: {tmp_path}")
    check_resume(options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", math.nan), ("margin", 1.5), ("seed", -1), ("speaker_shares", [0.5, 0.5]), ("synthetic_speakers", 3)],
)
def test_a_value_out_of_range_is_told(name, value):
    with pytest.raises(ValueError, match=f"--{name} can only be .*, but got"):
        check_options({name: value})
