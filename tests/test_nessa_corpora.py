"""Readers of speaker corpora: the layouts, what is refused, splits, trials, and the recipe's manifests."""

import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nessa_modules.corpora import (
    Utterance,
    cut,
    read_corpus,
    read_utterance,
    read_voxceleb_trials,
    split_speakers,
    write_corpus,
)

PREPARE = Path(__file__).resolve().parent.parent / "recipes" / "VoxCeleb" / "voxceleb_prepare.py"
REALSPEECH = os.environ.get("DSD_REALSPEECH")


def write_tone(path, seconds=1.0, rate=8000, channels=1, **options):
    """A ramp from -0.5 to 0.5, so that every place in a file is known by its value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.linspace(-0.5, 0.5, round(seconds * rate))
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate, **options)
    return path


def write_csv(path, rows, header="id,speaker,path"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_csv(tmp_path):
    """Four speakers with two recordings of 7 s each."""
    rows = []
    for speaker in ("dora", "ann", "carl", "bob"):
        for k in range(2):
            write_tone(tmp_path / speaker / f"{k}.wav", seconds=7)
            rows.append(f"{speaker}-{k},{speaker},{speaker}/{k}.wav")
    return write_csv(tmp_path / "all.csv", rows)


def test_voxceleb_layout(tmp_path):
    for part in ("id10002/videoB/00002.wav", "id10001/videoA/00001.wav", "id10002/videoB/00001.wav"):
        write_tone(tmp_path / "vox1/dev/wav" / part, seconds=4)
    (tmp_path / "vox1/vox1_meta.csv").write_text(
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\nid10001\tA\tf\tIreland\tdev\nid10002\tB\tm\tUSA\tdev\n"
    )
    utterances = read_corpus(tmp_path / "vox1/dev/wav")
    names = ["id10001/videoA/00001", "id10002/videoB/00001", "id10002/videoB/00002"]
    assert [u.id for u in utterances] == names
    assert [u.speaker for u in utterances] == ["id10001", "id10002", "id10002"]
    assert [u.session for u in utterances] == ["videoA", "videoB", "videoB"]
    assert [u.sex for u in utterances] == ["f", "m", "m"]
    assert {u.duration_s for u in utterances} == {4.0}
    # The folders above make no difference.
    assert [u.id for u in read_corpus(tmp_path / "vox1")] == names


def test_librispeech_layout(tmp_path):
    root = tmp_path / "LibriSpeech"
    for speaker, chapter, number in (("103", "1240", 0), ("103", "1241", 3), ("1034", "121119", 0)):
        write_tone(root / "train-clean-100" / speaker / chapter / f"{speaker}-{chapter}-{number:04d}.flac", seconds=2)
    (root / "SPEAKERS.TXT").write_text(
        ";ID  |SEX| SUBSET | MINUTES | NAME\n103 | F | train-clean-100 | 25 | Some One\n1034 | M | x | 25 | M\n"
    )
    utterances = read_corpus(root / "train-clean-100")
    assert [(u.id, u.speaker, u.session, u.sex) for u in utterances] == [
        ("103-1240-0000", "103", "1240", "f"),
        ("103-1241-0003", "103", "1241", "f"),
        ("1034-121119-0000", "1034", "121119", "m"),
    ]


def test_csv_columns_and_the_round_trip_of_a_manifest(tmp_path):
    write_tone(tmp_path / "a.wav", seconds=10)
    header = "speaker,id,path,session,sex,duration_s,start_s"
    path = write_csv(tmp_path / "all.csv", ["ann,a-2,a.wav,day 1,F,2.5,4", "ann,a-1,a.wav,,,1.5,0.25"], header)
    utterances = read_corpus(path)
    assert utterances == [
        Utterance("a-1", "ann", str(tmp_path / "a.wav"), 1.5, 0.25, "", str(tmp_path / "a.wav")),
        Utterance("a-2", "ann", str(tmp_path / "a.wav"), 2.5, 4.0, "f", "day 1"),
    ]
    (tmp_path / "elsewhere").mkdir()
    write_corpus(tmp_path / "elsewhere/manifest.csv", utterances)
    assert read_corpus(tmp_path / "elsewhere/manifest.csv") == utterances


def test_split_column_and_slices_of_speakers(small_csv):
    assert sorted({u.speaker for u in read_corpus(f"{small_csv}:1:3")}) == ["bob", "carl"]
    assert sorted({u.speaker for u in read_corpus(f"{small_csv}:-1:")}) == ["dora"]
    with pytest.raises(ValueError, match="selects none of the 4 speakers"):
        read_corpus(f"{small_csv}:9:")
    lines = small_csv.read_text().splitlines()
    lines = [lines[0] + ",split", *(line + (",dev" if "ann" in line else ",train") for line in lines[1:])]
    small_csv.write_text("\n".join(lines))
    assert {u.speaker for u in read_corpus(small_csv, split="dev")} == {"ann"}
    with pytest.raises(ValueError, match="no rows whose split is 'test'"):
        read_corpus(small_csv, split="test")


@pytest.mark.parametrize(
    ("seconds", "segment", "num"), [(13, 3, 4), (6, 3, 2), (5.99, 3, 1), (2, 3, 1), (13.7, 0.1, 137)]
)
def test_segments_cover_the_recording_once(seconds, segment, num):
    parts = cut(Utterance("a", "ann", "a.wav", seconds, start_s=2.0), segment)
    assert len(parts) == num
    assert min(part.duration_s for part in parts) >= min(segment, seconds) - 1e-3
    assert parts[0].start_s == 2.0
    for part, following in itertools.pairwise(parts):
        assert part.start_s + part.duration_s == pytest.approx(following.start_s)
    assert parts[-1].start_s + parts[-1].duration_s == pytest.approx(2.0 + seconds)
    assert len({part.id for part in parts}) == num


def test_segments_share_the_session_of_their_file(small_csv):
    utterances = read_corpus(small_csv, segment_seconds=3)
    assert len(utterances) == 16
    assert all(u.session == u.path for u in utterances)
    assert {u.duration_s for u in utterances} == {3.5}


def test_short_utterances_are_left_out(tmp_path):
    write_tone(tmp_path / "a.wav", 0.3)
    write_tone(tmp_path / "b.wav", 0.6)
    path = write_csv(tmp_path / "all.csv", ["a,x,a.wav", "b,x,b.wav"])
    assert [u.id for u in read_corpus(path)] == ["b"]
    assert [u.id for u in read_corpus(path, min_seconds=0.1)] == ["a", "b"]
    with pytest.raises(ValueError, match=r"all.csv: none of its 2 utterances is 9 s long"):
        read_corpus(path, min_seconds=9)


MISTAKES = {
    "no rows": ([], "id,speaker,path", "all.csv has no rows"),
    "no column": (["a,b"], "id,path", "all.csv has no column 'speaker'; its columns are id, path"),
    "empty cell": (["a,,a.wav"], None, "row 2: id, speaker and path must not be empty"),
    "twice": (["a,x,a.wav", "a,y,a.wav"], None, "'a' stands 2 times"),
    "missing file": (["a,x,b.wav"], None, r"b.wav, which .*all.csv lists \(row 2\), does not exist"),
    "empty file": (["a,x,empty.wav"], None, "empty.wav cannot be read as audio: it is empty"),
    "no samples": (["a,x,zero.wav"], None, "zero.wav is empty: it has no samples"),
    "no audio": (["a,x,text.wav"], None, "text.wav cannot be read as audio: "),
    "sex": (["a,x,a.wav,q"], "id,speaker,path,sex", "sex can only be f, m or empty, but got 'q'"),
    "duration": (["a,x,a.wav,-1"], "id,speaker,path,duration_s", "duration_s can only be .*'-1'"),
    "duration nan": (["a,x,a.wav,nan"], "id,speaker,path,duration_s", "duration_s can only be .*'nan'"),
    "start alone": (["a,x,a.wav,1"], "id,speaker,path,start_s", "a start_s, but no duration_s"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_csv_are_named(tmp_path, mistake):
    rows, header, message = MISTAKES[mistake]
    write_tone(tmp_path / "a.wav")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is no audio, but it is long enough to be taken for a header " * 3)
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), 8000)
    with pytest.raises(ValueError, match=message) as caught:
        read_corpus(write_csv(tmp_path / "all.csv", rows, header or "id,speaker,path"))
    assert "\n" not in str(caught.value)


def test_csv_that_is_none(tmp_path):
    (tmp_path / "all.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"all.csv cannot be read as a csv"):
        read_corpus(tmp_path / "all.csv")
    (tmp_path / "all.csv").write_text("")
    with pytest.raises(ValueError, match=r"all.csv has no rows"):
        read_corpus(tmp_path / "all.csv")


def test_mistakes_in_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no wav or flac files"):
        read_corpus(tmp_path)
    (tmp_path / "id1/v").mkdir(parents=True)
    (tmp_path / "id1/v/1.m4a").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds 1 m4a files, which cannot be read"):
        read_corpus(tmp_path)
    write_tone(tmp_path / "id1/1.wav")
    with pytest.raises(ValueError, match=r"1.wav stands in no folder speaker/session"):
        read_corpus(tmp_path)
    for name in ("min_seconds", "segment_seconds"):
        with pytest.raises(ValueError, match=f"{name} can only be a positive number of seconds, but got 0"):
            read_corpus(tmp_path, **{name: 0})


def test_reading_gives_the_stretch_that_was_asked_for(tmp_path):
    path = write_tone(tmp_path / "a.flac", seconds=4, rate=16000)  # -0.5 at 0 s, 0.5 at 4 s
    whole = Utterance("a", "ann", str(path), 4.0)
    segment = Utterance("a", "ann", str(path), 2.0, start_s=1.0)
    assert read_utterance(whole, 16000).shape == (64000,)
    for rate in (16000, 8000, 11025):
        samples = read_utterance(segment, rate, offset_s=0.5, num_seconds=1.0)
        assert samples.dtype == np.float32
        assert len(samples) == rate
        middle = samples[rate // 4 : -rate // 4]  # away from the resampler's edges
        expected = -0.5 + (1.5 + np.arange(rate) / rate)[rate // 4 : -rate // 4] / 4
        np.testing.assert_allclose(middle, expected, atol=2e-4)
    assert len(read_utterance(segment, 16000, offset_s=1.5, num_seconds=9)) == 8000  # up to its end
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.tile([0.5, 0.25], (8000, 1)), 8000, subtype="FLOAT")
    np.testing.assert_allclose(read_utterance(Utterance("s", "ann", str(stereo), 1.0), 8000), 0.375)


def test_faults_found_while_reading_are_named(tmp_path):
    samples = np.zeros(8000)
    samples[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 8000, subtype="FLOAT")
    (utterance,) = read_corpus(write_csv(tmp_path / "all.csv", ["a,x,nan.wav"]))
    with pytest.raises(ValueError, match=r"nan.wav holds values that are not finite \(in utterance a\)"):
        read_utterance(utterance, 8000)
    assert np.isfinite(read_utterance(utterance, 8000, num_seconds=0.5)).all()
    with pytest.raises(ValueError, match=r"gone.wav cannot be read: it does not exist"):
        read_utterance(Utterance("g", "x", str(tmp_path / "gone.wav"), 1.0), 8000)
    path = write_tone(tmp_path / "short.wav", 1.0)
    with pytest.raises(ValueError, match=r"short.wav ends before utterance s does"):
        read_utterance(Utterance("s", "x", str(path), 3.0), 8000)
    with pytest.raises(ValueError, match=r"short.wav ends before utterance s does"):
        read_utterance(Utterance("s", "x", str(path), 1.0, start_s=5.0), 8000)


def test_split_speakers():
    utterances = [Utterance(f"u{k}", f"spk{k % 50}", "a.wav", 1.0) for k in range(200)]
    parts = split_speakers(utterances, [0.5, 0.3, 0.2], seed=3)
    speakers = [{u.speaker for u in part} for part in parts]
    assert list(map(len, speakers)) == [25, 15, 10]
    assert len(set.union(*speakers)) == 50
    assert sorted(u.id for part in parts for u in part) == sorted(u.id for u in utterances)
    again = split_speakers(utterances[::-1], [0.5, 0.3, 0.2], seed=3)
    assert [{u.speaker for u in part} for part in again] == speakers
    assert [{u.speaker for u in part} for part in split_speakers(utterances, [0.5, 0.3, 0.2], seed=4)] != speakers


def test_small_shares_get_a_speaker():
    utterances = [Utterance(f"u{k}", f"spk{k}", "a.wav", 1.0) for k in range(4)]
    for shares in ([0.97, 0.01, 0.01, 0.01], [0.01, 0.01, 0.01, 0.97], [0.01, 0.49, 0.01, 0.49]):
        assert [len(part) for part in split_speakers(utterances, shares)] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="5 parts need a speaker each, but there are 4"):
        split_speakers(utterances, [0.2] * 5)
    for shares in ([0.5, 0.6], [], [1.5, -0.5]):
        with pytest.raises(ValueError, match="shares can only be positive numbers that sum up to 1"):
            split_speakers(utterances, shares)


def test_trial_lists(tmp_path):
    path = tmp_path / "veri_test.txt"
    path.write_text("1 id1/a/00001.wav id1/b/00002.wav\n\n0 id1/a/00001.wav id2/c/00001.wav\n")
    assert read_voxceleb_trials(path) == [(1, "id1/a/00001", "id1/b/00002"), (0, "id1/a/00001", "id2/c/00001")]
    path.write_text("1 id1/a/00001.wav id1/b/00002.wav\n2 a b\n")
    with pytest.raises(ValueError, match=r"veri_test.txt, line 2: expected 0 or 1 and two recordings, but got '2 a b'"):
        read_voxceleb_trials(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"veri_test.txt lists no trials"):
        read_voxceleb_trials(path)
    with pytest.raises(ValueError, match=r"gone.txt cannot be read: No such file"):
        read_voxceleb_trials(tmp_path / "gone.txt")


@pytest.fixture(scope="module")
def prepare():
    """The recipe's data step as a module."""
    spec = importlib.util.spec_from_file_location("voxceleb_prepare", PREPARE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipe_with_csv_files(prepare, small_csv, tmp_path):
    options = {
        "output_folder": str(tmp_path / "out"),
        "train_csv": f"{small_csv}::2",
        "dev_csv": f"{small_csv}:2:3",
        "alignment_csv": f"{small_csv}:1:3",
        "segment_seconds": 3,
    }
    manifests = prepare.prepare_data(options, ("train", "dev"))
    assert {u.speaker for u in read_corpus(manifests["train"])} == {"ann", "bob"}
    whole = {split: read_corpus(options[f"{split}_csv"]) for split in ("train", "dev")}
    assert read_corpus(manifests["dev"]) == whole["dev"]  # only what is learned from is cut
    assert len(read_corpus(manifests["train"])) > len(whole["train"])
    # Earlier manifests are taken as they are, if they are of the same options.
    before = manifests["dev"].stat().st_mtime_ns
    assert prepare.prepare_data({**options, "skip_prep": True}, ("train", "dev")) == manifests
    assert manifests["dev"].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"skip_prep: segment_seconds is 2, but it was 3 when"):
        prepare.prepare_data({**options, "skip_prep": True, "segment_seconds": 2}, ("train", "dev"))
    with pytest.raises(ValueError, match=r"skip_prep: .* holds no manifest of alignment"):
        prepare.check_data({**options, "skip_prep": True}, ("alignment",))
    with pytest.raises(ValueError, match=r"Speaker 'carl' is in both alignment and dev"):
        prepare.prepare_data(options, ("alignment", "dev"))
    with pytest.raises(ValueError, match=r"test_csv is missing: with train_csv"):
        prepare.check_data(options, ("dev", "test"))
    with pytest.raises(ValueError, match=r"dev_csv nowhere.csv does not exist"):
        prepare.check_data({**options, "dev_csv": "nowhere.csv"}, ("dev",))
    with pytest.raises(ValueError, match="either data_folder or csv files"):
        prepare.check_data({**options, "data_folder": "x"}, ("dev",))
    with pytest.raises(ValueError, match="A split can only be train, alignment, dev, test, but got 'valid'"):
        prepare.check_data(options, ("valid",))


def test_recipe_with_a_folder_shares_its_speakers_out_alike_in_both_scripts(prepare, tmp_path):
    for speaker in range(10):
        write_tone(tmp_path / f"vox/id{speaker}/video/00001.wav")
    options = {
        "output_folder": str(tmp_path / "one"),
        "data_folder": str(tmp_path / "vox"),
        "speaker_shares": [0.4, 0.3, 0.1, 0.2],
        "split_seed": 5,
    }
    of_training = prepare.prepare_data(options, ("train", "dev"))
    of_alignment = prepare.prepare_data(
        {**options, "output_folder": str(tmp_path / "two")}, ("alignment", "dev", "test")
    )
    assert read_corpus(of_training["dev"]) == read_corpus(of_alignment["dev"])
    manifests = [of_training["train"], *of_alignment.values()]
    speakers = [{u.speaker for u in read_corpus(manifest)} for manifest in manifests]
    assert list(map(len, speakers)) == [4, 3, 1, 2]
    assert len(set.union(*speakers)) == 10
    with pytest.raises(ValueError, match="speaker_shares can only be a list of 4 numbers"):
        prepare.check_data({**options, "speaker_shares": [0.5, 0.5]}, ("train",))
    with pytest.raises(ValueError, match=r"data_folder .*gone does not exist, or is no folder"):
        prepare.check_data({**options, "data_folder": str(tmp_path / "gone")}, ("train",))


def test_recipe_makes_voices_where_no_data_are_given(prepare, tmp_path):
    pytest.importorskip("espeakng_loader")
    options = {
        "output_folder": str(tmp_path / "out"),
        "synthetic_folder": str(tmp_path / "voices"),
        "synthetic_speakers": [2, 1, 1, 1],
        "synthetic_utterances": 2,
        "synthetic_conditions": 1.0,
        "synthetic_seed": 1,
        "sample_rate": 8000,
    }
    manifests = prepare.prepare_data(options, ("train", "dev"), progressbar=False)
    assert [u.speaker for u in read_corpus(manifests["train"])] == ["train0000"] * 2 + ["train0001"] * 2
    more = prepare.prepare_data(options, ("alignment", "dev", "test"), progressbar=False)
    assert len(list((tmp_path / "voices").glob("voices-*"))) == 1
    assert more["dev"] == manifests["dev"]
    # Both scripts' manifests are known from then on.
    assert prepare.prepare_data({**options, "skip_prep": True}, ("train", "test")).keys() == {"train", "test"}


@pytest.mark.skipif(not REALSPEECH, reason="set DSD_REALSPEECH to the folder of recorded speech")
def test_recorded_speech():
    train = read_corpus(Path(REALSPEECH) / "libri_train/metadata.csv", segment_seconds=3)
    assert len({u.speaker for u in train}) == 261
    assert len(train) > 900
    one = read_utterance(train[1], 16000)
    assert len(one) == pytest.approx(train[1].duration_s * 16000, abs=32)
    assert 0.001 < np.abs(one).max() <= 1.1
    test = f"{REALSPEECH}/libri_test/metadata.csv"
    halves = [{u.speaker for u in read_corpus(test + part)} for part in (":0:20", ":20:")]
    assert list(map(len, halves)) == [20, 20]
    assert not halves[0] & halves[1]
