"""A user's mistakes end at once, in one sentence, before any data is generated or model built."""

import errno
import shutil

import numpy as np
import pytest
import soundfile
from conftest import HPARAMS, TINY, arguments
from filelock import FileLock
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.dual_path import SepformerWrapper

from shared_modules import checkpoints, errors


def fails(recipe, message, **overrides):
    """The run ends with one sentence that holds the message."""
    with pytest.raises(SystemExit) as stop:
        recipe.main([str(HPARAMS), *arguments({"device": "cpu", **overrides})])
    assert isinstance(stop.value.code, str), stop.value.code
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    assert message in stop.value.code, stop.value.code


@pytest.fixture
def nothing_built(recipe, monkeypatch):
    """Generating data or building a model is a failure."""

    def refuse(*args, **kwargs):
        pytest.fail("went on after the mistake")

    for name in ("load_hyperpyyaml", "prepare_data"):
        monkeypatch.setattr(recipe, name, refuse)


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dsd_mode", "dorp", "--dsd_mode can only be one of none, drop, reorder, cascade, but got 'dorp'"),
        ("dsd_mod", "drop", "no option --dsd_mod; did you mean --dsd_mode?"),
        ("num_spks", 4, "--num_spks can only be one of 1, 2, 3, but got 4"),
        ("sample_rate", 44100, "one of 8000, 16000, but got 44100"),
        ("dsd_margin_db", -1, "a number of at least 0, but got -1"),
        ("dsd_max_drop_rate", 1.5, "a number from 0 to 1, but got 1.5"),
        ("dsd_max_drop_rate", 0, "--dsd_mode drop contradicts --dsd_max_drop_rate 0"),
        ("layerwise", "maybe", "one of True, False, but got 'maybe'"),
        ("layer_permutation", "own", "one of shared, independent"),
        ("batch_size", 0, "a whole number of at least 1, but got 0"),
        ("batch_size", 2.5, "but got 2.5"),
        ("grad_accumulation_factor", 0, "at least 1, but got 0"),
        ("segment_seconds", 0, "null or a number above 0"),
        ("segment_seconds", 0.001, "is shorter than the encoder's kernel of 16 samples"),
        ("segment", "sliding", "one of random, fixed"),
        ("lr", "nan", "a number above 0"),
        ("train_sets", "train-100", "a list of train-100, train-360 or both"),
        ("synthetic_sizes", "[10, 0, 1]", "three whole numbers of at least 1"),
        ("kernel_size", 15, "--kernel_size must be even, but got 15"),
        ("num_heads", 7, "--num_heads must divide num_filters, but got 7 for 256 filters"),
        ("data_folder", "/no/such/folder", "--data_folder /no/such/folder does not exist"),
        ("precision", "fp16", "--precision fp16 needs a GPU"),
        ("device", "bogus", "device can only be one of this machine, but got 'bogus'"),
        ("num_filters", 7, "--num_filters must be even, but got 7"),
        ("sample_rate", 8000.0, "one of 8000, 16000, but got 8000.0"),
        ("train_sets", "[[a], b]", "a list of train-100"),
        ("save_folder", "null", "a path, but got None"),
        ("train_manifest", "train.csv", "--train_manifest needs the other two"),
        ("task", "mix_single", "--task mix_single has one speaker: give --num_spks 1, but got --num_spks 2"),
        ("num_spks", 1, "--task mix_clean has several speakers: give 2 or 3, but got --num_spks 1"),
        ("dynamic_mixing", True, "which the memory bank of --dsd_mode drop cannot follow; give --dsd_mode none"),
        ("librispeech_folder", ".", "--librispeech_folder needs --metadata_folder too, to mix mix_clean at load time"),
        ("wham_folder", "/no/such/folder", "--wham_folder needs --librispeech_folder too"),
        ("metadata_folder", "/no/such/folder", "--metadata_folder /no/such/folder does not exist"),
        ("ema_decay", 1, "--ema_decay can only be a number from 0 up to (not with) 1, but got 1"),
        ("speeds", "[97.5]", "--speeds can only be a list of whole numbers of 50 to 200 (%), but got [97.5]"),
        ("test_metrics", "[sdr]", "--test_metrics can only be a list of pesq and stoi, or [], but got ['sdr']"),
        ("test_block", 0, "--test_block can only be null or a whole number of at least 1, but got 0"),
    ],
)
def test_an_option_out_of_range(recipe, name, value, message):
    fails(recipe, message, **{name: value})


@pytest.mark.usefixtures("nothing_built")
def test_the_last_of_a_repeated_option_counts(recipe):
    with pytest.raises(SystemExit, match=r"--lr can only be a number above 0, but got -0\.001"):
        recipe.main([str(HPARAMS), "--lr", "1e-3", "--num_spks", "3", "--lr", "-1e-3"])


@pytest.mark.usefixtures("nothing_built")
def test_a_data_folder_of_another_kind(recipe, librimix, librimix3, tmp_path):
    fails(recipe, f"{librimix / 'wav8k/min/train-360/s3'} (num_spks is 3)", data_folder=librimix, num_spks=3)
    fails(recipe, "num_spks is 2, but", data_folder=librimix3)
    fails(recipe, f"give --data_folder {librimix}", data_folder=librimix.parent)
    fails(recipe, "wav16k", data_folder=librimix, sample_rate=16000)
    fails(recipe, "mix_both", data_folder=librimix, task="mix_both")
    fails(recipe, "train-100", data_folder=librimix, train_sets="[train-100, train-360]")
    (tmp_path / "empty").mkdir()
    fails(recipe, "it is empty", data_folder=tmp_path / "empty")
    broken = shutil.copytree(librimix, tmp_path / "Libri2Mix")
    (broken / "wav8k/min/dev/s2/dev_003.wav").unlink()
    fails(recipe, "s2/dev_003.wav does not exist; 1 of 5 mixtures lack one of their files", data_folder=broken)


@pytest.mark.parametrize(
    ("signal", "sample_rate", "message"),
    [
        (np.zeros(100), 8000, "has 100 samples, but its mixture"),
        (np.zeros(6000), 44100, "has a sample rate of 44100 Hz, but sample_rate is 8000"),
        (np.zeros((6000, 2)), 8000, "has 2 channels"),
        (np.zeros(0), 8000, "has 0 samples, but at least 16 are needed"),
        (None, 0, "is not a readable audio file"),
    ],
)
def test_a_file_that_is_not_right(recipe, librimix, tmp_path, monkeypatch, signal, sample_rate, message):
    monkeypatch.setattr(recipe, "load_hyperpyyaml", lambda *args: pytest.fail("went on after the mistake"))
    broken = shutil.copytree(librimix, tmp_path / "Libri2Mix")
    path = broken / "wav8k/min/train-360/s2/train-360_004.wav"
    if signal is None:
        path.write_bytes(b"RIFFnonsense")
    else:
        soundfile.write(path, signal, sample_rate)
    fails(recipe, message, data_folder=broken, output_folder=tmp_path / "run")
    fails(recipe, "train-360_004.wav", data_folder=broken, output_folder=tmp_path / "run")
    fails(recipe, "1 of 34 mixtures have such a fault", data_folder=broken, output_folder=tmp_path / "run")
    assert not (tmp_path / "run" / "manifests").exists()


def test_a_resume_on_other_data_or_with_another_model(recipe, run_recipe, librimix, tmp_path):
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", number_of_epochs=1)
    other = {**TINY, "output_folder": tmp_path / "run", "number_of_epochs": 2}
    fails(recipe, "--d_ffn is 8, but the run in", **{**other, "data_folder": librimix, "d_ffn": 8})
    fails(recipe, "--mode is max, but the run in", **{**other, "data_folder": librimix, "mode": "max"})
    convtasnet = [str(HPARAMS.with_name("convtasnet_dsd.yaml")), "--data_folder", str(librimix)]
    with pytest.raises(SystemExit, match="is of another separator, which has no --num_conv_layers"):
        recipe.main([*convtasnet, "--output_folder", str(tmp_path / "run")])
    renamed = shutil.copytree(librimix, tmp_path / "Libri2Mix")
    for path in renamed.glob("wav8k/min/train-360/*/train-360_007.wav"):
        path.rename(path.with_name("train-360_0070.wav"))
    message = "1 of 24 stored sample ids differ from the 24 current ones, the first in row 7 ('train-360_0070')"
    fails(recipe, message, **{**other, "data_folder": renamed})


def test_defaults_are_the_published_model(monkeypatch):
    """SepFormer as SpeechBrain publishes it for LibriMix: the same weights, 25.7 million of them."""
    # Its constructor spends most of its time on drawing weights anew, which does not matter here.
    monkeypatch.setattr(SepformerWrapper, "reset_layer_recursively", lambda self, layer: None)
    with open(HPARAMS, encoding="utf-8") as stream:
        modules = load_hyperpyyaml(stream)["modules"]
    shapes = {f"{name}.{key}": w.shape for name, module in modules.items() for key, w in module.state_dict().items()}
    assert shapes == {key: w.shape for key, w in SepformerWrapper().state_dict().items()}


def test_a_training_that_learns_nothing_is_stopped(recipe, librimix, tmp_path):
    tiny = {**TINY, "output_folder": tmp_path / "run"}
    fails(recipe, "Lower --lr (now 1000000.0)", **{**tiny, "lr": 1e6}, data_folder=librimix)
    silent = shutil.copytree(librimix, tmp_path / "Libri2Mix")
    for path in silent.glob("wav8k/min/train-360/s2/*.wav"):
        samples, sample_rate = soundfile.read(path)
        soundfile.write(path, 0 * samples, sample_rate)
    fails(recipe, "each of the 24 training mixtures had a silent source", **tiny, data_folder=silent)


def test_a_users_manifest(recipe, librimix, tmp_path):
    """Ids that are no file names, a mixture in two sets, a mark of Excel's."""
    mixtures = sorted((librimix / "wav8k/min/train-360/mix_clean").iterdir())

    def write(name, ids, paths, encoding="utf-8"):
        rows = [f"{i},{p},{p},{p}" for i, p in zip(ids, paths, strict=True)]
        (tmp_path / name).write_text("\n".join(["ID,mix_wav,s1_wav,s2_wav", *rows]), encoding=encoding)
        return tmp_path / name

    good = [write("train.csv", ["a"], mixtures[:1]), write("test.csv", ["a"], mixtures[1:2], "utf-8-sig")]
    for sample_id in ("mean", "../escape", "x" * 300):
        manifests = [*good, write("bad.csv", [sample_id], mixtures[2:3])]
        overrides = dict(zip(("train_manifest", "test_manifest", "valid_manifest"), manifests, strict=True))
        fails(recipe, "An id can be a file name", output_folder=tmp_path / "run", **overrides)
    overrides = {"train_manifest": good[0], "test_manifest": good[1], "valid_manifest": good[0]}
    fails(
        recipe,
        "1 mixtures stand in two of the training, validation and test sets",
        output_folder=tmp_path / "run",
        **overrides,
    )


def test_folders_that_cannot_be_written(recipe, librimix, tmp_path):
    (tmp_path / "file").write_text("")
    fails(recipe, str(tmp_path / "file"), output_folder=tmp_path / "file", data_folder=librimix)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        fails(recipe, "Another run is at work in", output_folder=tmp_path / "run", data_folder=librimix)


def test_a_path_may_hold_what_yaml_takes_for_its_own(run_recipe, librimix, tmp_path):
    folder = tmp_path / "a: b #1"
    run_recipe(data_folder=librimix, output_folder=folder, number_of_epochs=1)
    assert (folder / "test_results.csv").is_file()


def test_a_damaged_checkpoint_is_named(recipe, run_recipe, librimix, tmp_path):
    options = {"data_folder": librimix, "output_folder": tmp_path / "run"}
    run_recipe(**options, number_of_epochs=1)
    (checkpoint,) = (tmp_path / "run" / "save").glob("CKPT*")
    (checkpoint / "optimizer.ckpt").write_bytes(b"damaged")
    fails(recipe, f"The checkpoint {checkpoint} cannot be loaded", **{**TINY, **options})
    (checkpoint / "CKPT.yaml").rename(tmp_path / "CKPT.yaml")
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (tmp_path / "CKPT.yaml").rename(checkpoint / "CKPT.yaml")
    fails(recipe, "is not of this recipe: it holds no memory_bank", **{**TINY, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_is_damaged_after_the_check_is_named(recipe, run_recipe, librimix, tmp_path, num_workers):
    """Also where a reader process meets it."""
    damaged = shutil.copytree(librimix, tmp_path / "Libri2Mix")
    options = {**TINY, "data_folder": damaged, "output_folder": tmp_path / "run", "num_workers": num_workers}
    run_recipe(**{**options, "number_of_epochs": 1})
    path = damaged / "wav8k/min/train-360/s2/train-360_004.wav"
    samples, sample_rate = soundfile.read(path)
    soundfile.write(path, samples[:-100], sample_rate)
    fails(recipe, f"{path} ends 100 samples before its manifest says.", **options, skip_prep=True)


def test_a_full_disk(recipe, librimix, tmp_path, monkeypatch):
    """While a checkpoint is saved, and elsewhere: Python's error names no file there."""
    options = {**TINY, "data_folder": librimix}
    full = OSError(errno.ENOSPC, "No space left on device")

    def save(*args, **kwargs):
        raise full

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Checkpointer, "save_checkpoint", save)
        message = "is the disk full? ([Errno 28] No space left on device)"
        fails(recipe, message, **options, output_folder=tmp_path / "saving")
    monkeypatch.setattr(recipe, "prepare_data", save)
    fails(recipe, "what the run writes: No space left on device", **options, output_folder=tmp_path / "preparing")


def test_a_history_that_is_gone(recipe, run_recipe, librimix, tmp_path):
    options = {**TINY, "data_folder": librimix, "output_folder": tmp_path / "run", "number_of_epochs": 1}
    run_recipe(**options)
    (tmp_path / "run" / "history.csv").unlink()
    fails(recipe, "history.csv cannot be read", **options, test_only=None)


def test_a_rank_that_is_alone_with_a_mistake_says_it(monkeypatch):
    """The main rank's sentence comes first, where it has the same mistake: torchrun then ends the others."""
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "3")

    @errors.ends_in_one_sentence
    def main():
        raise errors.RunError("the disk is not mounted here")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == "error (rank 3): the disk is not mounted here"
    assert waits == [5]
