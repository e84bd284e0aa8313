"""The generated data: reproducible, disjoint, shaped like LibriMix, whole or absent."""

import csv
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile

from dsd_modules.data import generate, librimix
from dsd_modules.data.generate import generate_synthetic, main, mix_recordings
from shared_modules import corpus

SETS = {"train-100": 5, "dev": 2, "test": 2}


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hash_files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_int(path, sample_rate=8000):
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (sample_rate, 1, "PCM_16")
    return soundfile.read(path, dtype="int16")[0].astype(int)


def make_recordings(folder, speakers, per_speaker=2, seconds=1.5, sample_rate=11025, name="metadata.csv"):
    """Tones under noise bursts, one pitch per speaker; returns the csv."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["id,speaker,path,text"]
    seconds = np.arange(round(seconds * sample_rate)) / sample_rate
    for k, speaker in enumerate(speakers):
        for u in range(per_speaker):
            burst = rng.standard_normal(len(seconds)) * (np.sin(2 * np.pi * 2 * seconds) > 0)
            samples = 0.1 * np.sin(2 * np.pi * (200 + 90 * k) * seconds) + 0.05 * burst
            soundfile.write(folder / f"{speaker}-{u}.flac", samples, sample_rate)
            lines.append(f"{speaker}-{u},{speaker},{speaker}-{u}.flac,words")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return generate_synthetic(tmp_path_factory.mktemp("synthetic"), sets=SETS, num_workers=1, progressbar=False)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return make_recordings(folder, [f"ann{k}" for k in range(9)])


def test_sentences():
    sentences = corpus.read_sentences()
    every = [sentence for listed in sentences.values() for sentence in listed]
    assert len(every) == len(set(every)) >= 240
    assert all(5 <= len(sentence.split()) <= 14 for sentence in every)
    assert not set(corpus.WOMEN) & set(corpus.MEN)


def test_all_voices_speak():
    """Every language and every variant exists in the installed espeak-ng."""
    voices = [corpus.Voice(language, "m3", 175, 50, 50) for language in sorted(set(corpus.LANGUAGES))]
    voices += [corpus.Voice("en-us", variant, 175, 50, 50) for variant in corpus.WOMEN + corpus.MEN]
    spoken = corpus.run_parallel(
        lambda voice: corpus.synthesize(voice, ["Good morning."])[1][0], voices, None, "", progressbar=False
    )
    assert len(set(spoken)) == len(voices) - 1  # en-us+m3 is there twice
    levels = [np.abs(np.frombuffer(pcm, np.int16).astype(int)).max() for pcm in spoken]
    assert min(levels) > 500
    assert max(levels) < 2**15 - 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_same_bytes_from_the_seed(synthetic, tmp_path, num_workers):
    again = generate_synthetic(tmp_path, sets=SETS, num_workers=num_workers, progressbar=False)
    assert again.parent.name == synthetic.parent.name
    assert hash_files(again.parent) == hash_files(synthetic.parent)


def test_another_seed_gives_other_mixtures_in_another_folder(synthetic, tmp_path):
    other = generate_synthetic(tmp_path, sets={"dev": 2}, seed=1, progressbar=False)
    assert other.parent.name != synthetic.parent.name
    metadata = "metadata/libri2mix_dev.csv"
    assert (other / metadata).read_bytes() != (synthetic / metadata).read_bytes()


@pytest.mark.parametrize("variant", ["f2", "victor"])
def test_breath_does_not_depend_on_the_clock(variant):
    """espeak-ng seeds the noise of breathy voices with the second they start in."""
    voice = corpus.Voice("en-us", variant, 175, 50, 50)
    first = corpus.synthesize(voice, ["Good morning to you all."])
    time.sleep(1.1)
    assert corpus.synthesize(voice, ["Good morning to you all."]) == first


def test_splits_share_nothing(synthetic):
    rows = read_rows(synthetic.parent / "corpus/metadata.csv")
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    for column in ("speaker", "variant", "text"):
        owners = {}
        for row in rows:
            owners.setdefault(row[column], set()).add(row["split"])
        assert all(len(splits) == 1 for splits in owners.values()), column


def test_corpus_audio(synthetic):
    for row in read_rows(synthetic.parent / "corpus/metadata.csv"):
        samples = read_int(synthetic.parent / "corpus" / row["path"], 16000)
        assert len(samples) / 16000 == pytest.approx(float(row["duration_s"]), abs=1e-4)
        assert 1.5 < len(samples) / 16000 < 6
        assert 0.6 * 2**15 < np.abs(samples).max() < 0.8 * 2**15
        loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
        assert loud[0] < 0.02 * 16000
        assert loud[-1] > len(samples) - 0.02 * 16000


def test_layout(synthetic):
    assert synthetic.name == "Libri2Mix"
    assert json.loads((synthetic.parent / "generated.json").read_text())["sets"] == SETS
    for name, num_mixtures in SETS.items():
        rows = read_rows(synthetic / f"wav8k/min/metadata/mixture_{name}_mix_clean.csv")
        assert list(rows[0]) == ["mixture_ID", "mixture_path", "source_1_path", "source_2_path", "length"]
        ids = [row["mixture_ID"] for row in rows]
        assert ids == sorted(set(ids))
        assert len(ids) == num_mixtures
        for folder in ("mix_clean", "s1", "s2"):
            assert sorted(p.stem for p in (synthetic / "wav8k/min" / name / folder).iterdir()) == ids
        for row in rows:
            paths = [row[f"{what}_path"] for what in ("mixture", "source_1", "source_2")]
            mixture, first, second = (read_int(synthetic / path) for path in paths)
            assert len(mixture) == int(row["length"])
            np.testing.assert_array_equal(mixture, first + second)
            assert np.abs(mixture).max() <= 0.9 * 2**15 + 1
        made_of = read_rows(synthetic / f"metadata/libri2mix_{name}.csv")
        info = read_rows(synthetic / f"metadata/libri2mix_{name}_info.csv")
        assert [row["mixture_ID"] for row in made_of] == [row["mixture_ID"] for row in info] == ids
        for row, speakers in zip(made_of, info, strict=True):
            stems = [Path(row[f"source_{k}_path"]).stem for k in (1, 2)]
            assert row["mixture_ID"] == "_".join(stems)
            assert speakers["speaker_1_ID"] != speakers["speaker_2_ID"]
            assert (synthetic.parent / "corpus" / row["source_1_path"]).is_file()


def test_made_once(synthetic, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("worked again")

    monkeypatch.setattr(generate, "make_corpus", fail)
    monkeypatch.setattr(generate, "mix_set", fail)
    folder = synthetic.parent.parent
    assert generate_synthetic(folder, sets=SETS, num_workers=2, progressbar=False) == synthetic
    assert not list(folder.glob(".*.tmp*"))


def test_three_speakers_16k_max_with_noise(recordings, tmp_path):
    make_recordings(tmp_path / "more", ["x", "y", "z"], per_speaker=1, seconds=2.1, sample_rate=16000)
    root = mix_recordings(
        tmp_path,
        {"train-360": f"{recordings}::6", "test": tmp_path / "more/metadata.csv"},
        sets={"train-360": 3, "test": 1},
        num_spks=3,
        sample_rate=16000,
        mode="max",
        noise=True,
        progressbar=False,
    )
    assert root.name == "Libri3Mix"
    for name in ("train-360", "test"):
        rows = read_rows(root / f"wav16k/max/metadata/mixture_{name}_mix_both.csv")
        columns = ["source_1_path", "source_2_path", "source_3_path", "noise_path"]
        assert list(rows[0]) == ["mixture_ID", "mixture_path", *columns, "length"]
        for row in rows:
            *sources, noise = (read_int(root / row[column], 16000) for column in columns)
            np.testing.assert_array_equal(read_int(root / row["mixture_path"], 16000), sum(sources) + noise)
            clean = root / row["mixture_path"].replace("mix_both", "mix_clean")
            np.testing.assert_array_equal(read_int(clean, 16000), sum(sources))
            assert noise.any()
    assert read_rows(root / "metadata/libri3mix_test.csv")[0]["noise_path"].startswith("1/f^")


def test_min_cuts_and_max_pads(tmp_path):
    make_recordings(tmp_path, ["short"], per_speaker=1, seconds=1, sample_rate=8000)
    short = (tmp_path / "metadata.csv").read_text().splitlines()[1]
    both = make_recordings(tmp_path, ["long"], per_speaker=1, seconds=2, sample_rate=8000)
    both.write_text(both.read_text() + short + "\n")
    for mode, length in (("min", 8000), ("max", 16000)):
        root = mix_recordings(tmp_path / "out", {"dev": both}, {"dev": 1}, mode=mode, progressbar=False)
        (row,) = read_rows(root / f"wav8k/{mode}/metadata/mixture_dev_mix_clean.csv")
        (info,) = read_rows(root / "metadata/libri2mix_dev_info.csv")
        signals = {info[f"speaker_{k}_ID"]: read_int(root / row[f"source_{k}_path"]) for k in (1, 2)}
        assert {len(signal) for signal in signals.values()} == {length} == {int(row["length"])}
        assert signals["long"][8000:].any() == (mode == "max")
        assert not signals["short"][8000:].any()


def test_loudness_is_drawn_from_librimix_range(tmp_path):
    corpus_csv = make_recordings(tmp_path, "abcdef", sample_rate=8000)
    root = mix_recordings(tmp_path / "out", {"dev": corpus_csv}, {"dev": 12}, progressbar=False)
    meter = pyloudnorm.Meter(8000)
    levels = [
        meter.integrated_loudness(read_int(path) / 2**15)
        for source in ("s1", "s2")
        for path in sorted((root / "wav8k/min/dev" / source).iterdir())
    ]
    assert -33.1 < min(levels) < -31  # every source of 24 is whole: same lengths
    assert -27 < max(levels) < -24.9


def test_recorded_noise_is_shared_out(recordings, tmp_path):
    make_recordings(tmp_path / "noise", [f"noise{k}" for k in range(7)], per_speaker=1, seconds=1)
    arguments = {"train-360": f"{recordings}:0:6", "dev": f"{recordings}:6:"}, {"train-360": 4, "dev": 2}
    root = mix_recordings(tmp_path, *arguments, noise_folder=tmp_path / "noise", progressbar=False)
    used = {
        name: {row["noise_path"] for row in read_rows(root / f"metadata/libri2mix_{name}.csv")} for name in arguments[1]
    }
    assert used["dev"] == {"noise5-0.flac"}
    assert not used["train-360"] & {"noise5-0.flac", "noise6-0.flac"}
    (tmp_path / "noise/noise6-0.flac").unlink()
    (tmp_path / "noise/noise5-0.flac").unlink()
    with pytest.raises(ValueError, match="holds 5 wav or flac files"):
        mix_recordings(tmp_path, *arguments, noise_folder=tmp_path / "noise", progressbar=False)


def test_long_recordings_meet_again_in_other_segments(tmp_path):
    corpus_csv = make_recordings(tmp_path, "ab", per_speaker=1, seconds=5, sample_rate=8000)
    root = mix_recordings(
        tmp_path / "out", {"train-360": corpus_csv}, {"train-360": 3}, max_seconds=1, progressbar=False
    )
    rows = read_rows(root / "wav8k/min/metadata/mixture_train-360_mix_clean.csv")
    ids = sorted(row["mixture_ID"].replace("b-0_a-0", "a-0_b-0") for row in rows)
    assert len({row["mixture_ID"] for row in rows}) == 3
    assert all(name.startswith("a-0_b-0") for name in ids)
    assert {row["length"] for row in rows} == {"8000"}
    info = read_rows(root / "metadata/libri2mix_train-360_info.csv")
    assert len({row["source_1_start_s"] for row in info}) == 3
    with pytest.raises(ValueError, match="allow 1 different mixtures of 2 speakers, but 3 are wanted"):
        mix_recordings(tmp_path / "out", {"train-360": corpus_csv}, {"train-360": 3}, progressbar=False)


def test_segments_avoid_pauses():
    samples = np.zeros(80000)
    samples[70000:] = np.random.default_rng(0).standard_normal(10000)
    for seed in range(5):
        start, segment = librimix._draw_segment(samples, 8000, 1.0, np.random.default_rng(seed))
        assert len(segment) == 8000
        assert start + 8000 > 70000


def test_draw_groups():
    speakers = ["a"] * 50 + ["b", "c", "d"]
    groups = librimix.draw_groups(speakers, 150, 3, np.random.default_rng(0))
    assert len({tuple(sorted(group)) for group in groups}) == 150
    assert all(len({speakers[i] for i in group}) == 3 for group in groups)
    first = [speakers[group[0]] for group in groups]
    assert len(set(first)) == 4  # the order within a group is random


def test_names_stay_unique():
    assert librimix._unique_names(["a", "a-2", "a", "a"]) == ["a", "a-2", "a-3", "a-4"]


def test_leftovers_of_a_killed_run_are_removed(recordings, tmp_path):
    """A run killed in the middle leaves a temporary folder, which the next run removes."""
    code = (
        "import os, sys; from dsd_modules.data import generate\n"
        "generate.mix_set = lambda root, *rest: ((root / 'half').mkdir(), os._exit(9))\n"
        "generate.mix_recordings(sys.argv[1], {'dev': sys.argv[2]}, {'dev': 1})"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path, recordings])
    assert killed.returncode == 9
    assert len(list(tmp_path.glob(".*.tmp*/half"))) == 1
    root = mix_recordings(tmp_path, {"dev": recordings}, {"dev": 1}, progressbar=False)
    assert not list(tmp_path.glob(".*.tmp*"))
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [root.parent]


def test_two_processes_at_once(recordings, tmp_path):
    command = [sys.executable, "-m", "dsd_modules.data.generate", "recordings", tmp_path, "--dev", recordings]
    both = [
        subprocess.Popen([*command, "--num-mixtures", "5"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=600)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (path,) = answers
    assert len(list(Path(path.decode().strip(), "wav8k/min/dev/mix_clean").iterdir())) == 5


def test_a_changed_recording_is_mixed_anew(tmp_path):
    corpus_csv = make_recordings(tmp_path, "ab", per_speaker=1)
    first = mix_recordings(tmp_path / "out", {"dev": corpus_csv}, {"dev": 1}, progressbar=False)
    make_recordings(tmp_path, "ab", per_speaker=1, seconds=2)
    assert mix_recordings(tmp_path / "out", {"dev": corpus_csv}, {"dev": 1}, progressbar=False) != first


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.full(8000, np.nan), "holds NaN"),
        (np.zeros(8000), "is silent"),
        (np.ones(800), "is 0.10 s long"),
        (np.ones((8000, 2)), "has 2 channels"),
        (None, "cannot be read as audio"),
    ],
)
def test_unfit_recordings_are_named(tmp_path, samples, message):
    good = make_recordings(tmp_path, "ab", per_speaker=1)
    good.write_text(good.read_text().replace("b-0.flac", "bad.wav"))
    if samples is None:
        (tmp_path / "bad.wav").write_text("no audio")
    else:
        soundfile.write(tmp_path / "bad.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=f"bad.wav {message}"):
        mix_recordings(tmp_path / "out", {"dev": good}, {"dev": 1}, progressbar=False)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,speaker,path\n", "lists no recordings"),
        ("id,path\na,b\n", "has no speaker"),
        ("id,speaker,path\na,b,missing.wav\n", "missing.wav, listed in .*, does not exist"),
        ("id,speaker,path\na/b,b,metadata.csv\n", "'a/b' cannot be"),
        ("id,speaker,path\na,b,c.csv\na,b,c.csv\n", "'a' is listed twice"),
        ("id,speaker,path\na,,c.csv\n", "row 2: id, speaker and path must not be empty"),
    ],
)
def test_wrong_csvs(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        librimix.read_corpus(tmp_path / "c.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpora": {"train-360": "{}", "dev": "{}"}}, "speaker 'ann0' is in both train-360 and dev"),
        ({"corpora": {"dev": "{}:0:1"}}, "set dev: mixtures of 2 speakers need as many speakers, but got 1"),
        ({"corpora": {"dev": "{}:9:"}}, "selects none of the 9 speakers"),
        ({"corpora": {}}, "no corpus was given"),
        ({"corpora": {"dev": "missing.csv"}}, "missing.csv cannot be read"),
        ({"corpora": {"a/b": "{}"}}, "plain folder name, but got 'a/b'"),
        ({"sets": {"dev": 0}}, "at least 1 mixture, but got 0"),
        ({"sets": {"test": 1}}, "must name the same sets"),
        ({"mode": "mid"}, "'min' or 'max', but got 'mid'"),
        ({"sample_rate": 44100}, "8000 or 16000 Hz, but got 44100"),
        ({"num_spks": 1}, "at least 2, but got 1"),
        ({"max_seconds": 0.1}, "at least 0.4, but got 0.1"),
        ({"seed": -1}, "at least 0, but got -1"),
    ],
)
def test_wrong_arguments(recordings, tmp_path, options, message):
    corpora = options.pop("corpora", {"dev": "{}"})
    corpora = {name: path.format(recordings) for name, path in corpora.items()}
    with pytest.raises(ValueError, match=message):
        mix_recordings(tmp_path, corpora, **options, progressbar=False)


def test_unknown_split_of_voices(tmp_path):
    with pytest.raises(ValueError, match="train, dev and test, but got 'valid'"):
        generate_synthetic(tmp_path, num_voices={"valid": 3})


@pytest.mark.parametrize("package", ["pyloudnorm", "espeakng_loader"])
def test_missing_package(monkeypatch, tmp_path, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["synthetic", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install dsd-separation[generate]" in error
    assert error.count("\n") == 1


def test_command_line(recordings, tmp_path, capsys):
    arguments = ["recordings", str(tmp_path), "--train", f"{recordings}:0:5", "--test", f"{recordings}:5:"]
    assert main([*arguments, "--num-mixtures", "3", "2"]) == 0
    root = Path(capsys.readouterr().out.strip())
    assert len(read_rows(root / "metadata/libri2mix_train-360.csv")) == 3
    assert main([*arguments, "--num-mixtures", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])


def test_no_torch():
    """Workers must start fast."""
    code = "import sys, dsd_modules.data.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
