"""Synthetic speakers: reproducible, all different, shared out without overlap, whole or absent."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nessa_modules import voices
from nessa_modules.corpora import read_corpus, read_utterance
from nessa_modules.voices import draw_channel, draw_variant, make_voices
from shared_modules.corpus import read_sentences
from shared_modules.espeak import Voice, installed_paths, own_variants, synthesize

pytest.importorskip("espeakng_loader")

SIZES = {"train": 6, "alignment": 4, "dev": 2, "test": 4}


def make(folder, **changes):
    settings = {"sizes": SIZES, "utterances_per_speaker": 4, "sample_rate": 8000, "progressbar": False, **changes}
    return make_voices(folder, **settings)


def hash_files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("voices"), num_workers=1)


def test_layout(made):
    utterances = read_corpus(made)
    assert len(utterances) == 4 * sum(SIZES.values())
    header = made.read_text().splitlines()[0]
    assert header == "id,speaker,path,duration_s,sex,session,split,accent,text"
    for utterance in utterances:
        info = soundfile.info(utterance.path)
        assert (info.samplerate, info.channels, info.subtype) == (8000, 1, "PCM_16")
        assert utterance.duration_s == pytest.approx(info.frames / 8000, abs=1e-6)
        assert 0.8 < utterance.duration_s < 5
        samples = read_utterance(utterance, 8000)
        assert 0.05 < np.abs(samples).max() < 0.95  # heard, and not clipped
    assert 1.5 < np.mean([u.duration_s for u in utterances]) < 3.5
    sexes = {u.speaker: u.sex for u in utterances}
    assert sorted(sexes.values()) == ["f"] * 8 + ["m"] * 8
    sessions = {u.session: u.speaker for u in utterances}
    assert len(sessions) == 3 * 16
    assert all(session.startswith(speaker) for session, speaker in sessions.items())


def test_splits_share_no_speaker_and_no_sentence(made):
    sentences = [sentence.rstrip(".!?") for sentence in read_sentences()["en"]]
    rows = [line.split(",", 8) for line in made.read_text().splitlines()[1:]]
    speakers, read = {}, {}
    for row in rows:
        speakers.setdefault(row[6], set()).add(row[1])
        text = row[8].strip('"')
        (rank,) = [rank for rank, sentence in enumerate(sentences) if text in sentence]
        read.setdefault(row[6], set()).add(rank)
    assert {split: len(names) for split, names in speakers.items()} == SIZES
    assert len(set.union(*speakers.values())) == sum(SIZES.values())
    assert sum(map(len, read.values())) == len(set.union(*read.values()))


@pytest.mark.parametrize("num_workers", [2])
def test_same_bytes_from_the_seed(made, tmp_path, num_workers):
    again = make(tmp_path, num_workers=num_workers)
    assert again.parent.name == made.parent.name
    assert hash_files(again.parent) == hash_files(made.parent)
    assert make(tmp_path) == again  # found, not made


def test_more_speakers_leave_the_first_ones_as_they_are(made, tmp_path):
    fewer = make(tmp_path, sizes={"test": 2})
    assert fewer.parent.name != made.parent.name
    before, after = hash_files(made.parent), hash_files(fewer.parent)
    wavs = [name for name in after if name.endswith(".wav")]
    assert len(wavs) == 8
    assert all(after[name] == before[name] for name in wavs)
    other = hash_files(make(tmp_path, sizes={"test": 2}, seed=1).parent)
    assert all(other[name] != before[name] for name in wavs)


def pitch_hz(samples, rate=8000):
    """The strongest period of 2.5 to 16 ms, of the loudest 40 % of frames: the median."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 400)[::80]
    energy = (frames**2).sum(axis=1)
    pitches = []
    for frame in frames[energy >= np.quantile(energy, 0.6)]:
        correlation = np.correlate(frame, frame, "full")[399:]
        pitches.append(rate / (rate // 400 + np.argmax(correlation[rate // 400 : rate // 60])))
    return np.median(pitches)


def test_women_have_the_higher_voices(tmp_path):
    utterances = read_corpus(make(tmp_path, sizes={"dev": 16}, utterances_per_speaker=1, conditions=0))
    pitches = {sex: [pitch_hz(read_utterance(u, 8000)) for u in utterances if u.sex == sex] for sex in "fm"}
    assert len(pitches["f"]) == len(pitches["m"]) == 8
    assert 150 < np.median(pitches["f"]) < 280
    assert 75 < np.median(pitches["m"]) < 150
    assert len({round(pitch) for pitch in pitches["f"]}) >= 5  # of many pitches


def test_an_own_variant_is_spoken_as_espeak_would():
    """The text of a variant that espeak-ng has, under another name, gives the same bytes."""
    _, data = installed_paths()
    text = (data / "voices/!v/f2").read_text(encoding="utf-8")
    before = sorted(path.name for path in (data / "voices/!v").iterdir())
    sentences = ["Good morning to all of you.", "The train is late."]
    _, expected = synthesize(Voice("en-us", "f2", 160, 50, 50), sentences)
    for language in (None, "en"):
        with own_variants({"own": text}, language) as own:
            _, spoken = synthesize(Voice("en-us", "own", 160, 50, 50), sentences, own)
            assert spoken == expected
        assert not own.exists()
    assert sorted(path.name for path in (data / "voices/!v").iterdir()) == before


def test_a_voice_may_change_its_pace_from_sentence_to_sentence():
    slow, fast = Voice("en-us", "m3", 120, 50, 50), Voice("en-us", "m3", 200, 50, 50)
    sentences = ["The train is late."] * 3
    _, plain = synthesize(slow, sentences)
    assert synthesize([slow, slow, slow], sentences)[1] == plain
    _, spoken = synthesize([slow, fast, slow], sentences)
    assert spoken[0] == plain[0]
    assert len(spoken[1]) < 0.8 * len(spoken[0])
    assert len(spoken[2]) == pytest.approx(len(spoken[0]), rel=0.05)
    with pytest.raises(ValueError, match="voice can only be one voice, or one of the same language and variant"):
        synthesize([slow, Voice("en-us", "f2", 120, 50, 50), slow], sentences)
    with pytest.raises(ValueError, match="nothing to say"):
        synthesize(slow, [])


def test_no_two_variants_are_alike():
    rng = np.random.default_rng(0)
    women, men = ([draw_variant(sex, rng) for _ in range(300)] for sex in "fm")
    assert len(set(women + men)) == 600

    def values(variants, name, column):
        lines = (line.split() for variant in variants for line in variant.splitlines())
        return np.array([float(line[column]) for line in lines if " ".join(line[:column]) == name])

    # Women's formants lie some 15 % higher (Peterson and Barney 1952).
    ratio = values(women, "formant 2", 2).mean() / values(men, "formant 2", 2).mean()
    assert 1.1 < ratio < 1.2
    for variants, lowest, highest in ((women, 100, 290), (men, 55, 165)):
        pitches = values(variants, "pitch", 1)
        assert len(pitches) == 300
        assert lowest < pitches.min() < pitches.max() < highest


def test_the_channel():
    studio = draw_channel(np.random.default_rng(3), 16000, conditions=0)
    gain_db = 20 * np.log10(np.abs(np.fft.rfft(studio, 2**15)))
    np.testing.assert_allclose(gain_db, 0, atol=0.01)  # a mere delay
    spreads = []
    for conditions in (0.5, 1, 2):
        gains = []
        for seed in range(40):
            response = draw_channel(np.random.default_rng(seed), 16000, conditions)
            assert np.isfinite(response).all()
            power = np.abs(np.fft.rfft(response, 2**15)) ** 2
            frequencies = np.fft.rfftfreq(2**15, 1 / 16000)
            bands = [(f0 <= frequencies) & (frequencies < 2 * f0) for f0 in (125, 250, 500, 1000, 2000)]
            gains.append([10 * np.log10(power[band].mean()) for band in bands])
        spreads.append(np.std(gains, axis=0).mean())
    assert spreads == sorted(spreads)
    assert 3 < spreads[1] < 8  # dB


def noise_floor_db(samples):
    """Level of the quietest tenth of the frames below that of the whole."""
    frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    power = (frames**2).mean(axis=1)
    return 10 * np.log10(np.quantile(power, 0.1) / power.mean() + 1e-12)


def test_conditions_make_it_noisier(tmp_path):
    floors = []
    for conditions in (0, 0.5, 2):
        utterances = read_corpus(make(tmp_path, sizes={"test": 4}, conditions=conditions))
        floors.append(np.mean([noise_floor_db(read_utterance(u, 8000)) for u in utterances]))
    assert floors == sorted(floors)
    assert floors[2] - floors[0] > 10


def test_utterances_of_a_session_share_their_channel(made):
    """Their long-term spectra are nearer to each other than to those of the speaker's other sessions."""
    within, across = [], []
    utterances = read_corpus(made)
    spectra = {}
    for utterance in utterances:
        samples = read_utterance(utterance, 8000)
        frames = samples[: len(samples) // 256 * 256].reshape(-1, 256) * np.hanning(256)
        power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)[1:129].reshape(16, 8).mean(axis=1)
        level_db = 10 * np.log10(power)
        spectra[utterance.id] = level_db - level_db.mean()
    for one in utterances:
        for other in utterances:
            if one.speaker == other.speaker and one.id < other.id:
                distance = np.abs(spectra[one.id] - spectra[other.id]).mean()
                (within if one.session == other.session else across).append(distance)
    assert len(within) == 16
    assert np.mean(within) < 0.8 * np.mean(across)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ValueError("espeak-ng failed")

    monkeypatch.setattr(voices, "synthesize", fail)
    with pytest.raises(ValueError, match="espeak-ng failed"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_kill_leaves_nothing_that_is_taken_for_whole(tmp_path):
    sizes = {"train": 500}
    code = f"from nessa_modules.voices import make_voices; make_voices({str(tmp_path)!r}, {sizes}, 2, sample_rate=8000)"
    repository = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=repository, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".voices-*.tmp*/wav/*/*.wav")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".voices-*.tmp*/wav/*/*.wav"))
    assert not list(tmp_path.glob("voices-*"))


def test_settings_are_kept(made):
    settings = json.loads((made.parent / "generated.json").read_text())
    assert settings["sizes"] == SIZES
    assert settings["sample_rate"] == 8000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"valid": 3}}, "sizes can only have the keys train, alignment, dev, test, but got 'valid'"),
        ({"sizes": {"dev": 0}}, "sizes must have at least one speaker"),
        ({"sizes": {"dev": 1.5}}, r"sizes\['dev'\] can only be a whole number of 0 to 9999, but got 1.5"),
        ({"utterances_per_speaker": {"train": 3}}, "utterances_per_speaker of alignment can only be 1 to 99"),
        ({"utterances_per_speaker": 0}, "utterances_per_speaker of train can only be 1 to 99, but got 0"),
        ({"sample_rate": 44100}, "sample_rate can only be 8000 or 16000, but got 44100"),
        ({"conditions": -1}, "conditions can only be a number of 0 to 3, but got -1"),
        ({"num_sessions": 0}, "num_sessions can only be a whole number of at least 1, but got 0"),
        ({"seed": -1}, "seed can only be a whole number of at least 0, but got -1"),
    ],
)
def test_arguments_that_make_no_sense_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)
    assert not list(tmp_path.iterdir())
