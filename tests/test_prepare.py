"""Preparation: manifests of every LibriMix variant, their reuse, and what is said of data that are not right."""

import csv
import itertools
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RECIPE, REPOSITORY

from dsd_modules.data.generate import generate_synthetic, mix_recordings
from dsd_modules.data.wavs import WavReader

sys.path.insert(0, str(RECIPE))
import librimix_prepare

SETS = {"train-100": 2, "train-360": 3, "dev": 2, "test": 2}
REALSPEECH = Path(os.environ.get("DSD_REALSPEECH") or REPOSITORY.parent / "shared" / "realspeech")


def write_variant(root, num_spks=2, sample_rate=8000, mode="min", metadata=True, sets=None):
    """A folder as LibriMix's generator writes it, of noise; returns the written 16-bit samples by path."""
    rng = np.random.default_rng(num_spks)
    written = {}
    for subset, size in (sets or SETS).items():
        rows = {"mix_clean": [], "mix_both": [], "mix_single": []}
        for number in range(size):
            mixture_id = f"{100 * number}-1-{subset}_{number}-22-0000"
            lengths = rng.integers(300, 900, num_spks)
            length = {"min": min, "max": max}[mode](lengths)
            signals = {f"s{i + 1}": rng.integers(-3000, 3000, n) for i, n in enumerate(lengths)}
            signals = {name: np.resize(np.append(x, np.zeros(900)), length) for name, x in signals.items()}
            signals["noise"] = rng.integers(-900, 900, length)
            signals["mix_clean"] = sum(signals[f"s{i + 1}"] for i in range(num_spks))
            signals["mix_both"] = signals["mix_clean"] + signals["noise"]
            signals["mix_single"] = signals["s1"] + signals["noise"]
            for name, signal in signals.items():
                path = f"wav{sample_rate // 1000}k/{mode}/{subset}/{name}/{mixture_id}.wav"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(root / path, signal.astype(np.int16), sample_rate, subtype="PCM_16")
                os.utime(root / path, ns=(10**18, 10**18))
                written[path] = signal / 2**15
            for task, task_rows in rows.items():
                sources = ["s1"] if task == "mix_single" else [f"s{i + 1}" for i in range(num_spks)]
                names = [task, *sources, *(["noise"] if task != "mix_clean" else [])]
                paths = [f"/generated/elsewhere/{subset}/{name}/{mixture_id}.wav" for name in names]
                task_rows.append([mixture_id, mixture_id, *paths, length])
        for task, task_rows in rows.items():
            sources = range(1, 2 if task == "mix_single" else num_spks + 1)
            columns = [*(f"source_{i}_path" for i in sources), *(["noise_path"] if task != "mix_clean" else [])]
            if metadata:
                header = ["mixture_ID", "original_mixture_ID", "mixture_path", *columns, "length"]
                path = root / f"wav{sample_rate // 1000}k/{mode}/metadata/mixture_{subset}_{task}.csv"
                path.parent.mkdir(exist_ok=True)
                with open(path, "w", newline="") as stream:
                    csv.writer(stream).writerows([header, *reversed(task_rows)])  # in no order
    return written


def options_for(folder, output, **changed):
    """The options that preparation looks at."""
    manifests = {f"{name}_csv": str(output / "manifests" / f"{name}.csv") for name in ("train", "valid", "test")}
    return {
        "data_folder": folder and str(folder),
        "num_spks": 2,
        "sample_rate": 8000,
        "train_sets": ["train-360"],
        "mode": "min",
        "task": "mix_clean",
        "kernel_size": 16,
        "quantize": True,
        "cache_gb": 0,
        **manifests,
        **changed,
    }


def prepare(options):
    """What a run does."""
    librimix_prepare.check_data(options)
    librimix_prepare.prepare_data(options)
    return {name: read(options[f"{name}_csv"]) for name in ("train", "valid", "test")}


def read(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def refuses(options, *messages):
    """The preparation ends in one sentence that holds the messages."""
    with pytest.raises(ValueError, match=r"^[^\n]*\.$") as error:
        prepare(options)
    for message in messages:
        assert str(message) in str(error.value), error.value


@pytest.fixture
def libri2mix(tmp_path):
    """Two speakers, with metadata."""
    write_variant(tmp_path / "Libri2Mix")
    return tmp_path / "Libri2Mix"


@pytest.fixture
def no_header_is_opened(monkeypatch):
    """From the call on, a look into an audio file is a failure."""

    def start():
        for name in ("info", "read", "SoundFile"):
            monkeypatch.setattr(soundfile, name, lambda *args, **kwargs: pytest.fail("opened an audio file"))

    return start


@pytest.mark.parametrize(
    ("num_spks", "sample_rate", "mode", "task"),
    itertools.product((2, 3), (8000, 16000), ("min", "max"), ("mix_clean", "mix_both", "mix_single")),
)
def test_every_variant(tmp_path, num_spks, sample_rate, mode, task):
    """Sorted ids, real durations, relative paths, and a reader that finds the signals; with and without metadata."""
    root = tmp_path / f"Libri{num_spks}Mix"
    written = write_variant(
        root, num_spks, sample_rate, mode, sets={"train-100": 1, "train-360": 2, "dev": 1, "test": 1}
    )
    layout = {"num_spks": 1 if task == "mix_single" else num_spks, "sample_rate": sample_rate, "mode": mode}
    options = options_for(root, tmp_path, **layout, task=task, train_sets=["train-360", "train-100"])
    manifests = prepare(options)
    reader = librimix_prepare.make_reader(options)
    signals = {"mix_wav": task, **{f"s{i + 1}_wav": f"s{i + 1}" for i in range(layout["num_spks"])}}
    subsets = {"train": ["train-100", "train-360"], "valid": ["dev"], "test": ["test"]}
    for name, rows in manifests.items():
        found = [path for path in written for subset in subsets[name] if f"/{subset}/{task}/" in path]
        assert [row["ID"] for row in rows] == sorted(Path(path).stem for path in found)
        assert sorted(row["mix_wav"] for row in rows) == sorted(found)
        for row in rows:
            assert list(row) == ["ID", "duration", *signals]
            paths = [row["mix_wav"].replace(f"/{task}/", f"/{signal}/") for signal in signals.values()]
            assert [row[column] for column in signals] == paths
            num_samples = len(written[row["mix_wav"]])
            assert float(row["duration"]) == num_samples / sample_rate
            whole = np.stack([written[path] for path in paths])
            np.testing.assert_array_equal(reader.read(row, 0, num_samples), whole)
            np.testing.assert_array_equal(reader.read(row, 50, 100), whole[:, 50:150])
            for index in range(layout["num_spks"]):
                np.testing.assert_array_equal(reader.read_source(row, index, 50, 100), whole[1 + index, 50:150])
            noise = 0 if task == "mix_clean" else written[row["mix_wav"].replace(f"/{task}/", "/noise/")][50:150]
            np.testing.assert_allclose(reader.read_noise(row, 50, 100), noise + np.zeros(100), atol=1e-7)

    shutil.rmtree(root / f"wav{sample_rate // 1000}k/{mode}/metadata")
    assert (
        prepare({**options, **options_for(root, tmp_path / "other", **layout, task=task)})["test"] == manifests["test"]
    )


def test_a_reader_says_what_is_wrong_with_a_file(tmp_path):
    reader = WavReader(tmp_path, 1)
    entry = {"mix_wav": "mix.wav", "s1_wav": "s1.wav"}
    soundfile.write(tmp_path / "mix.wav", np.zeros(100), 8000)
    for signal, message in (
        (None, "cannot be read"),
        (np.zeros(80), "ends 10 samples before its manifest says"),
        (np.zeros(30), "ends 60 samples before its manifest says"),
        (np.zeros((100, 2)), "is damaged"),
        (np.full(100, np.nan), "holds values that are not finite"),
    ):
        if signal is not None:
            soundfile.write(tmp_path / "s1.wav", signal, 8000, subtype="FLOAT")
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 's1.wav'} {message}")):
            reader.read(entry, 40, 50)


def test_manifests_move_with_their_data(libri2mix, tmp_path, no_header_is_opened):
    options = options_for(libri2mix, tmp_path)
    manifests = prepare(options)
    moved = (tmp_path / "other disk" / "LibriMix").absolute()
    moved.parent.mkdir()
    shutil.move(libri2mix, moved)
    shutil.copytree(tmp_path / "manifests", tmp_path / "new run" / "manifests")
    reader = WavReader(moved, 2)
    assert reader.read(manifests["test"][0], 0, 200).any()
    no_header_is_opened()
    assert prepare(options_for(moved, tmp_path / "new run")) == manifests
    assert prepare(options_for(moved, tmp_path / "new run", skip_prep=True)) == manifests


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_all(path):
    for signal in ("mix_clean", "s1", "s2"):
        cut(path.parent.parent / signal / path.name)


def rewrite(samples, sample_rate):
    return lambda path: soundfile.write(path, samples, sample_rate)


def relist(change):
    """Change the rows of the metadata of a file's set."""

    def rewrite_metadata(path):
        metadata = path.parents[2] / "metadata" / f"mixture_{path.parents[1].name}_mix_clean.csv"
        with open(metadata, newline="") as stream:
            header, *rows = csv.reader(stream)
        with open(metadata, "w", newline="") as stream:
            csv.writer(stream).writerows(change(header, sorted(rows)))

    return rewrite_metadata


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (cut, ["dev/s2/100-1-dev_1-22-0000.wav is cut off", "1 of 7 mixtures have such a fault"]),
        (cut_all, ["dev/mix_clean/100-1-dev_1-22-0000.wav is cut off", "1 of 7 mixtures"]),
        (lambda path: path.unlink(), ["dev/s2/100-1-dev_1-22-0000.wav does not exist; 1 of 2 mixtures lack one of"]),
        (lambda path: shutil.rmtree(path.parent), ["The data folder lacks", "dev/s2 (num_spks is 2)"]),
        (lambda path: shutil.rmtree(path.parents[1]), ["The data folder lacks", "min/dev: of", "it holds metadata"]),
        (rewrite(np.zeros(600), 44100), ["s2/100-1-dev_1", "a sample rate of 44100 Hz, but sample_rate is 8000"]),
        (rewrite(np.zeros(5000), 8000), ["s2/100-1-dev_1", "has 5000 samples, but its metadata say"]),
        (rewrite(np.zeros((600, 2)), 8000), ["s2/100-1-dev_1", "has 2 channels, but one was expected; 1 of 7"]),
        (rewrite(np.zeros(8), 8000), ["s2/100-1-dev_1", "has 8 samples, but at least 16 are needed; 1 of 7"]),
        (lambda path: path.write_bytes(b""), ["s2/100-1-dev_1", "is not a readable audio file"]),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), ["s2/100-1-dev_1", "is not a readable audio file"]),
        (relist(lambda header, rows: []), ["mixture_dev_mix_clean.csv has no rows"]),
        (relist(lambda header, rows: [header]), ["mixture_dev_mix_clean.csv has no rows"]),
        (
            relist(lambda header, rows: [header, *rows, *rows]),
            ["'0-1-dev_0-22-0000' stands 2 times", "; 2 ids are not"],
        ),
        (
            relist(lambda header, rows: [header, *rows[:1]]),
            ["do not list 100-1-dev_1-22-0000.wav; 1 of the 2 mixtures"],
        ),
        (relist(lambda header, rows: [header, *rows, ["x"] * 6]), ["mix_clean.csv has a length that is no number"]),
        (
            relist(lambda header, rows: [header, *rows, [*["y"] * 5, 9], [*["x"] * 5, 9]]),
            ["dev/mix_clean/x.wav does not exist; 2 of 4 mixtures lack one of their files"],
        ),
        (relist(lambda header, rows: [header[1:], *rows]), ["has no column mixture_ID"]),
    ],
)
def test_a_corrupted_folder(libri2mix, tmp_path, damage, messages):
    """One sentence, nothing left behind; and what an earlier run left is as it was."""
    options = options_for(libri2mix, tmp_path / "earlier")
    manifests = prepare(options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "earlier/manifests").iterdir()}
    assert sorted(before) == ["prepared.json", "test.csv", "train.csv", "valid.csv"]
    damage(libri2mix / "wav8k/min/dev/s2/100-1-dev_1-22-0000.wav")
    refuses(options_for(libri2mix, tmp_path / "run"), *messages)
    assert not (tmp_path / "run").exists()
    refuses(options, *messages)
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier/manifests").iterdir()} == before
    assert manifests["test"] == read(options["test_csv"])


def test_the_first_of_several_faults_and_their_number(libri2mix, tmp_path):
    for path in libri2mix.glob("wav8k/min/*/s1/*.wav"):
        soundfile.write(path, np.zeros(600), 44100)
    refuses(options_for(libri2mix, tmp_path), "train-360/s1/0-1-train-360_0-22-0000.wav has", "; 7 of 7 mixtures have")
    shutil.rmtree(libri2mix / "wav8k/min/metadata")
    for path in libri2mix.glob("wav8k/min/test/s?/*.wav"):
        path.unlink()
    refuses(options_for(libri2mix, tmp_path), "test/s1/0-1-test_0-22-0000.wav does not exist; 2 of 2 mixtures lack")
    for path in libri2mix.glob("wav8k/min/test/mix_clean/*.wav"):
        path.unlink()
    refuses(options_for(libri2mix, tmp_path), "test/mix_clean holds no wav files")


def test_without_metadata_a_file_of_another_length_or_without_its_mixture(tmp_path):
    write_variant(tmp_path / "Libri3Mix", 3, metadata=False)
    folder = tmp_path / "Libri3Mix/wav8k/min/test"
    options = options_for(tmp_path / "Libri3Mix", tmp_path, num_spks=3)
    soundfile.write(folder / "s3/0-1-test_0-22-0000.wav", np.zeros(333), 8000)
    refuses(options, "s3/0-1-test_0-22-0000.wav has 333 samples, but its mixture wav8k/min/test/mix_clean/0-1-test_0")
    (folder / "mix_clean/0-1-test_0-22-0000.wav").unlink()
    refuses(options, "mix_clean/0-1-test_0-22-0000.wav does not exist; 1 of 2 mixtures lack one of their files")
    refuses({**options, "num_spks": 2}, "num_spks is 2, but", "holds a source s3")
    refuses({**options, "num_spks": 1}, "num_spks is 1 for the task mix_single alone, but got 1 for mix_clean")
    refuses({**options, "task": "mix_single"}, "num_spks is 1 for the task mix_single alone, but got 3 for mix_single")


def test_a_compressed_file_that_is_cut_off(tmp_path):
    """In a user's manifests; a wav whose header does not tell its length, as of a pipe, is not cut off."""
    rng = np.random.default_rng(0)
    manifests = {}
    for name in ("train", "valid", "test"):
        for ending in ("wav", "flac"):
            soundfile.write(tmp_path / f"{name}.{ending}", 0.1 * rng.standard_normal(20000), 8000)
        (tmp_path / f"{name}_list.csv").write_text(f"ID,mix_wav,s1_wav\na,{name}.flac,{name}.wav\n")
        manifests[f"{name}_manifest"] = str(tmp_path / f"{name}_list.csv")
    piped = bytearray((tmp_path / "valid.wav").read_bytes())
    piped[4:8] = piped[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "valid.wav").write_bytes(piped)
    options = options_for(None, tmp_path, num_spks=1, **manifests)
    assert {row["duration"] for rows in prepare(options).values() for row in rows} == {"2.5"}
    cut(tmp_path / "test.flac")
    refuses(options, f"{tmp_path / 'test.flac'} is cut off: it ends before its header says; 1 of 3 mixtures")


def test_a_set_without_its_metadata_may_not_be_whole(libri2mix, tmp_path):
    """LibriMix's generator writes a set's metadata once the set is whole."""
    (libri2mix / "wav8k/min/metadata/mixture_dev_mix_clean.csv").unlink()
    with pytest.warns(UserWarning, match=r"mixture_dev_mix_clean.csv is missing: is .*dev whole\? It holds 2 mixtures"):
        prepare(options_for(libri2mix, tmp_path))


def test_the_folder_above_librimix(libri2mix, tmp_path):
    refuses(options_for(tmp_path, tmp_path), f"give --data_folder {libri2mix}")
    refuses(options_for(tmp_path, tmp_path, num_spks=1, task="mix_single"), f"give --data_folder {libri2mix}")
    refuses(options_for(tmp_path / "none", tmp_path), "none: of", "it does not exist")
    refuses(options_for(libri2mix, tmp_path, mode="max"), "wav8k/max: of", "it holds min")


def warnings_of(caplog):
    return sum(record.levelno >= logging.WARNING for record in caplog.records)


def test_a_rerun_opens_no_header_and_notices_what_changed(
    libri2mix, tmp_path, no_header_is_opened, monkeypatch, caplog
):
    options = options_for(libri2mix, tmp_path)
    prepare(options)
    path = libri2mix / "wav8k/min/test/s2/0-1-test_0-22-0000.wav"
    with monkeypatch.context():
        no_header_is_opened()
        prepare(options)
        prepare({**options, "train_sets": options["train_sets"][::-1]})
        assert warnings_of(caplog) == 0

        for change in (
            {"kernel_size": 32},
            {"train_sets": ["train-100"]},
            {"task": "mix_both"},
        ):
            with pytest.raises(pytest.fail.Exception, match="opened an audio file"):
                prepare({**options, **change})
        os.utime(path, ns=(10**18, 10**18 + 1))  # as if written anew with as many samples
        with pytest.raises(pytest.fail.Exception, match="opened an audio file"):
            prepare(options)
    assert warnings_of(caplog) == 4
    assert "all audio is checked again" in caplog.text
    monkeypatch.undo()

    prepare(options)  # written anew
    caplog.clear()
    for path in libri2mix.glob("wav8k/min/train-360/*/0-1-*.wav"):
        path.rename(path.with_name("new.wav"))
    shutil.rmtree(libri2mix / "wav8k/min/metadata")
    assert [row["ID"] for row in prepare(options)["train"]][-1] == "new"
    Path(options["valid_csv"]).unlink()
    prepare(options)
    Path(options["valid_csv"]).write_text("ID,duration,mix_wav,s1_wav,s2_wav\n")
    assert len(prepare(options)["valid"]) == 2
    (tmp_path / "manifests/prepared.json").write_text("[1")
    prepare(options)
    assert len(caplog.records) == 3  # a damaged record is as good as none
    caplog.clear()
    prepare(options)
    assert not caplog.records


def test_a_preparation_that_was_interrupted(libri2mix, tmp_path, monkeypatch):
    """Whatever a kill leaves, no manifests of other settings are taken for those of this run."""
    options = options_for(libri2mix, tmp_path)
    prepare(options)
    write, written = librimix_prepare.write_manifest, []

    def write_one(path, rows):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, rows)

    monkeypatch.setattr(librimix_prepare, "write_manifest", write_one)
    with pytest.raises(KeyboardInterrupt):
        prepare({**options, "task": "mix_both"})
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "manifests").iterdir()) == ["test.csv", "train.csv", "valid.csv"]
    refuses({**options, "skip_prep": True}, "prepared.json does not exist; run once without it")
    assert "/mix_clean/" in prepare(options)["train"][0]["mix_wav"]


def test_skip_prep(libri2mix, tmp_path, no_header_is_opened, monkeypatch):
    """Needs manifests of the same settings and mixtures, and looks at no file."""
    options = options_for(libri2mix, tmp_path, skip_prep=True)
    refuses(options, "--skip_prep True needs the manifests of an earlier run", "train.csv does not exist")
    manifests = prepare({**options, "skip_prep": False})
    no_header_is_opened()
    for path in libri2mix.glob("wav8k/min/*/*/*.wav"):
        os.utime(path, ns=(10**18, 10**18 + 1))  # as after a copy
    assert prepare(options) == manifests
    shutil.rmtree(libri2mix / "wav8k/min/metadata")
    assert prepare(options) == manifests

    end = f"when the manifests in {tmp_path / 'manifests'} were written; run once without it"
    refuses({**options, "kernel_size": 32}, f"--skip_prep True: kernel_size is 32, but it was 16 {end}")
    refuses({**options, "task": "mix_both"}, f"task is mix_both, but it was mix_clean {end}")
    refuses({**options, "train_sets": ["train-100"]}, f"train_sets is ['train-100'], but it was ['train-360'] {end}")
    own = {f"{name}_manifest": options[f"{name}_csv"] for name in ("train", "valid", "test")}
    refuses({**options, **own}, "kind of data is own manifests, but it was LibriMix folder")
    record = tmp_path / "manifests/prepared.json"
    text = record.read_text()
    record.write_text("{}")
    refuses(options, "prepared.json cannot be read")
    record.write_text(text)
    os.rename(options["test_csv"], tmp_path / "away.csv")
    refuses(options, "test.csv does not exist")
    os.rename(tmp_path / "away.csv", options["test_csv"])
    assert prepare(options) == manifests
    text = Path(options["train_csv"]).read_text()
    Path(options["train_csv"]).write_text("".join(text.splitlines(keepends=True)[:-1]))
    refuses(options, f"The manifests in {tmp_path / 'manifests'} were changed since they were written")
    Path(options["train_csv"]).write_text(text)

    for path in libri2mix.glob("wav8k/min/test/*/0-1-*.wav"):
        path.unlink()
    refuses(options, "The mixtures of the data are not those of the manifests in", "run once without --skip_prep")


def test_a_mixture_that_is_trained_on_and_scored(libri2mix, tmp_path):
    folder = libri2mix / "wav8k/min"
    shutil.rmtree(folder / "metadata")
    shutil.rmtree(folder / "dev")
    (folder / "dev").symlink_to(folder / "train-360")
    message = "mixtures stand in two of the training, validation and test sets, the first"
    refuses(options_for(libri2mix, tmp_path), message)


def test_a_users_own_manifests_have_absolute_paths(libri2mix, tmp_path, no_header_is_opened, monkeypatch):
    monkeypatch.chdir(libri2mix)
    own = {}
    for name, subset in {"train": "train-360", "valid": "dev", "test": "test"}.items():
        paths = sorted(Path("wav8k/min", subset, "mix_clean").iterdir(), reverse=True)
        lines = [
            f"{i},{p},{str(p).replace('mix_clean', 's1')},{str(p).replace('mix_clean', 's2')}"
            for i, p in enumerate(paths)
        ]
        Path(f"{name}.csv").write_text("\n".join(["id,mix_path,s1_path,s2_path", *lines]))
        own[f"{name}_manifest"] = f"{name}.csv"
    options = options_for(None, tmp_path, **own)
    manifests = prepare(options)
    assert [row["ID"] for row in manifests["train"]] == ["0", "1", "2"]
    assert manifests["valid"][1]["s2_wav"] == str(libri2mix / "wav8k/min/dev/s2/0-1-dev_0-22-0000.wav")
    assert librimix_prepare.make_reader(options).read(manifests["valid"][1], 3, 99).any()
    with monkeypatch.context():
        no_header_is_opened()
        assert prepare(options) == manifests
        assert prepare({**options, "skip_prep": True}) == manifests
    monkeypatch.undo()
    monkeypatch.chdir(libri2mix)
    lines = Path("test.csv").read_text().splitlines()
    Path("test.csv").write_text("\n".join([*lines, lines[1].replace("0,", "5,", 1)]))
    refuses({**options, "skip_prep": True}, "are not those of the manifests")
    assert len(prepare(options)["test"]) == 3
    Path("test.csv").write_text("\n".join([*lines, lines[1]]))
    refuses(options, "Mixture ids must be unique, but '0' stands 2 times in the manifest", "; 1 ids are not unique")
    Path("test.csv").write_text(lines[0] + "\n")
    refuses(options, "The manifest", "test.csv has no rows")
    shutil.copy("train.csv", "test.csv")
    refuses(options, "3 mixtures stand in two of the training, validation and test sets")


@pytest.fixture
def librispeech(tmp_path):
    """What LibriMix is generated from: 16 kHz speech and noise, with metadata."""
    rng = np.random.default_rng(0)
    (tmp_path / "metadata").mkdir()
    folders = {"train-360": ("train-clean-360", "tr"), "dev": ("dev-clean", "cv"), "test": ("test-clean", "tt")}
    for subset, (speech, noise) in folders.items():
        rows = []
        for number in range(2):
            paths = [f"{speech}/{10 + i}/{number}.flac" for i in range(2)] + [f"{noise}/{number}.wav"]
            for path in paths:
                file = tmp_path / ("wham_noise" if path.endswith("wav") else "LibriSpeech") / path
                file.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(file, 0.1 * rng.standard_normal(rng.integers(9000, 9500)), 16000, subtype="PCM_16")
            gains = rng.uniform(0.5, 1, 3).tolist()
            rows.append([f"{subset}_{number}", *itertools.chain(*zip(paths, gains, strict=True))])
        names = ["source_1", "source_2", "noise"]
        header = ["mixture_ID", *(f"{name}_{what}" for name in names for what in ("path", "gain"))]
        name = f"libri2mix_{speech}.csv"
        with open(tmp_path / "metadata" / name, "w", newline="") as stream:
            csv.writer(stream).writerows([header, *reversed(rows)])
    return {
        f"{name}_folder": str(tmp_path / folder)
        for name, folder in (("librispeech", "LibriSpeech"), ("wham", "wham_noise"), ("metadata", "metadata"))
    }


@pytest.mark.parametrize(("task", "num_spks"), [("mix_clean", 2), ("mix_both", 2), ("mix_single", 1)])
def test_librimix_that_is_mixed_at_load_time(librispeech, tmp_path, task, num_spks, no_header_is_opened, monkeypatch):
    options = options_for(None, tmp_path, task=task, num_spks=num_spks, cache_gb=0.001, **librispeech)
    if task == "mix_clean":
        shutil.rmtree(options["wham_folder"])
        options["wham_folder"] = None
    manifests = prepare(options)
    assert [row["ID"] for row in manifests["train"]] == ["train-360_0", "train-360_1"]
    row = manifests["test"][0]
    num_samples = round(float(row["duration"]) * 8000)
    assert 4500 <= num_samples <= 4750
    signals = librimix_prepare.make_reader(options).read(row, 0, num_samples)
    assert signals.shape == (1 + num_spks, num_samples)
    (tmp_path / "elsewhere").mkdir()
    moved = dict(options)
    for name in ("librispeech_folder", "metadata_folder", "wham_folder"):
        if options[name]:
            moved[name] = shutil.move(options[name], tmp_path / "elsewhere")
    with monkeypatch.context():
        no_header_is_opened()
        assert prepare(moved) == manifests
        assert prepare({**moved, "skip_prep": True}) == manifests
        refuses({**moved, "skip_prep": True, "mode": "max"}, "mode is max, but it was min")
    monkeypatch.undo()

    # The second source decides the length of a mixture with one speaker, too.
    changed = Path(moved["librispeech_folder"]) / "test-clean/11/0.flac"
    soundfile.write(changed, soundfile.read(changed)[0][:8000], 16000)
    assert float(prepare(moved)["test"][0]["duration"]) == 0.5
    metadata = Path(moved["metadata_folder"]) / "libri2mix_test-clean.csv"
    metadata.write_text("\n".join(metadata.read_text().splitlines()[:2]))
    refuses({**moved, "skip_prep": True}, "are not those of the manifests")
    assert [row["ID"] for row in prepare(moved)["test"]] == ["test_1"]
    changed.unlink()
    (changed.parent / "1.flac").unlink()
    before = Path(options["test_csv"]).read_bytes()
    refuses(moved, "test-clean/11/1.flac", "does not exist")
    assert Path(options["test_csv"]).read_bytes() == before


def test_one_speaker_among_synthetic_voices(tmp_path):
    """LibriMix's mix_single: the first source of two, and the noise."""
    quick = {"synthetic_folder": str(tmp_path / "data"), "synthetic_sizes": [2, 1, 1], "synthetic_seed": 1}
    options = options_for(None, tmp_path, task="mix_single", num_spks=1, **quick)
    librimix_prepare.check_data(options)
    assert not (tmp_path / "data").exists()  # a look generates nothing
    manifests = prepare(options)
    root = generate_synthetic(
        tmp_path / "data", sets={"train-360": 2, "dev": 1, "test": 1}, noise=True, seed=1, progressbar=False
    )
    (row,) = manifests["test"]
    num_samples = round(float(row["duration"]) * 8000)
    reader = librimix_prepare.make_reader(options)
    noise, _ = soundfile.read(root / row["mix_wav"].replace("mix_single", "noise"), dtype="float32")
    np.testing.assert_array_equal(reader.read_noise(row, 0, num_samples), noise)
    assert row["s1_wav"] == row["mix_wav"].replace("mix_single", "s1")
    assert list(row) == ["ID", "duration", "mix_wav", "s1_wav"]
    assert prepare({**options, "skip_prep": True}) == manifests
    assert json.loads((tmp_path / "manifests/prepared.json").read_text())["settings"]["num_spks"] == 1


@pytest.mark.skipif(not (REALSPEECH / "libri_train").is_dir(), reason="no recorded speech (DSD_REALSPEECH)")
@pytest.mark.parametrize("task", ["mix_clean", "mix_both"])
def test_recorded_speech_from_preparation_to_evaluation(run_recipe, tmp_path, task):
    test_speakers = REALSPEECH / "libri_test/metadata.csv"
    corpora = {
        "train-360": REALSPEECH / "libri_train/metadata.csv",
        "dev": f"{test_speakers}:0:20",
        "test": f"{test_speakers}:20:",
    }
    data_folder = mix_recordings(
        tmp_path / "data",
        corpora,
        {"train-360": 6, "dev": 2, "test": 3},
        noise_folder=REALSPEECH / "noise",
        max_seconds=1.0,
        progressbar=False,
    )
    output = tmp_path / "run"
    run_recipe(data_folder=data_folder, output_folder=output, task=task, number_of_epochs=1, segment_seconds=0.5)
    manifests = {name: read(output / "manifests" / f"{name}.csv") for name in ("train", "valid", "test")}
    assert {name: len(rows) for name, rows in manifests.items()} == {"train": 6, "valid": 2, "test": 3}
    assert all(f"/{task}/" in row["mix_wav"] for row in manifests["train"])
    results = read(output / "test_results.csv")
    assert [row["id"] for row in results] == [*(row["ID"] for row in manifests["test"]), "mean"]
    assert all(np.isfinite(float(row["si_sdri"])) for row in results)
