"""Synthetic speakers by the hundred, each recorded on several occasions.

espeak-ng has some eighty voice variants that sound human. Here every speaker is a variant of its own: formants, pitch,
breath and so on are drawn from continuous distributions over about the range that the human-like variants span. The
speakers of all splits come from one population, as people do, and no two are alike. Splits read different sentences.

A speaker's utterances fall into sessions. A session has a room, a microphone and a background noise; level and noise
change with each utterance, and the speaker's pitch and pace a little with each session: without that, a speaker would
be told by what a synthesiser repeats exactly.
"""

import json

import numpy as np
import soundfile
from scipy import fft, signal

from shared_modules.build_once import build_once
from shared_modules.corpus import read_sentences, resample, run_parallel, trim, write_csv
from shared_modules.espeak import Voice, installed_paths, own_variants, synthesize

SPLITS = ("train", "alignment", "dev", "test")
GENERATOR_VERSION = 2  # raise it whenever the same settings give other bytes

_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
# Of ten sentences five are for training, and so on.
_SENTENCE_OWNERS = ("train", "alignment", "train", "test", "train", "dev", "train", "alignment", "train", "test")
_MIN_WORDS, _MAX_WORDS = 5, 8  # about 2 to 3 seconds
_EQ_BANDS_HZ = (62.5, 125, 250, 500, 1000, 2000, 4000, 8000)
_FILTER_TAPS = 1024
_COLUMNS = ("id", "speaker", "path", "duration_s", "sex", "session", "split", "accent", "text")


def make_voices(
    folder,
    sizes,
    utterances_per_speaker,
    seed=1234,
    sample_rate=16000,
    conditions=1.0,
    num_sessions=3,
    num_workers=None,
    progressbar=True,
):
    """Synthesise speakers, or find those made before with the same settings.

    Arguments
    ---------
    folder : str or Path
        Parent of the data's own folder ``voices-<settings>-<hash>``, which appears whole or not at all.
    sizes : dict
        From a split (``train``, ``alignment``, ``dev``, ``test``) to its number of speakers. Every other speaker is a
        woman. A split's first speakers do not depend on how many there are.
    utterances_per_speaker : int or dict
        For all splits, or from a split to its number; about 2 to 3 seconds each.
    seed : int
        Of everything that is drawn.
    sample_rate : int
        8000 or 16000, in Hz.
    conditions : float
        How far the recording conditions differ: 0 is studio quality throughout, 1 what telephones and rooms do to a
        voice, more is harder.
    num_sessions : int
        On how many occasions a speaker is recorded; fewer where there are fewer utterances.
    num_workers : int, optional
        Speakers at a time; default: one per core. The result does not depend on it.
    progressbar : bool
        Whether to show one.

    Returns
    -------
    Path
        ``metadata.csv``, for :func:`nessa_modules.corpora.read_corpus`: a row per utterance, sorted by id, with the
        columns ``id, speaker, path, duration_s, sex, session, split, accent, text``.

    Raises
    ------
    ValueError
        If an argument makes no sense, or espeak-ng is not installed, or fails.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = make_voices(folder.name, {"dev": 1}, 1, sample_rate=8000, progressbar=False)
    >>> path.read_text().splitlines()[1].split(",")[:2]
    ['dev0000-00', 'dev0000']
    >>> folder.cleanup()
    """
    if not isinstance(utterances_per_speaker, dict):
        utterances_per_speaker = dict.fromkeys(sizes, utterances_per_speaker)
    _check(sizes, utterances_per_speaker, seed, sample_rate, conditions, num_sessions)
    sizes = {split: sizes[split] for split in SPLITS if sizes.get(split)}
    settings = {
        "generator_version": GENERATOR_VERSION,
        "sizes": sizes,
        "utterances_per_speaker": {split: utterances_per_speaker[split] for split in sizes},
        "seed": seed,
        "sample_rate": sample_rate,
        "conditions": float(conditions),
        "num_sessions": num_sessions,
    }

    def build(root):
        installed_paths()  # a missing package shows at once
        sentences = [sentence.rstrip(".!?") for sentence in read_sentences()["en"]]
        jobs = []
        for split, num_speakers in sizes.items():
            owned = [s for rank, s in enumerate(sentences) if _SENTENCE_OWNERS[rank % len(_SENTENCE_OWNERS)] == split]
            num_utterances = settings["utterances_per_speaker"][split]
            for k in range(num_speakers):
                rng = np.random.default_rng([seed, SPLITS.index(split), k])
                sex, name = "mf"[k % 2 == 0], f"{split}{k:04d}"
                jobs.append((rng, split, name, sex, _choose_texts(owned, num_utterances, rng)))

        def record(job):
            rng, split, speaker, sex, texts = job
            (root / "wav" / speaker).mkdir(parents=True)
            rows = []
            accent, recordings = _record_speaker(rng, sex, texts, sample_rate, conditions, num_sessions)
            for k, (session, samples) in enumerate(recordings):
                path = f"wav/{speaker}/{speaker}-{k:02d}.wav"
                soundfile.write(root / path, samples, sample_rate, subtype="PCM_16")
                duration, session = f"{len(samples) / sample_rate:.6f}", f"{speaker}-s{session}"
                rows.append((f"{speaker}-{k:02d}", speaker, path, duration, sex, session, split, accent, texts[k]))
            return rows

        rows = run_parallel(record, jobs, num_workers, "Synthesising speakers", progressbar)
        write_csv(root / "metadata.csv", _COLUMNS, sorted(row for speaker_rows in rows for row in speaker_rows))

    text = json.dumps(settings, indent=2) + "\n"
    name = f"voices-{sum(sizes.values())}spk-{sample_rate // 1000}k"
    return build_once(folder, name, text, build) / "metadata.csv"


def draw_variant(sex, rng):
    """Draw a speaker's voice, as the text of an espeak-ng voice variant.

    Arguments
    ---------
    sex : str
        ``f`` or ``m``.
    rng : numpy.random.Generator
        Source of chance.

    Returns
    -------
    str
        See :func:`shared_modules.espeak.own_variants`.

    Example
    -------
    >>> draw_variant("f", np.random.default_rng(0)).splitlines()[:2]
    ['language variant', 'gender female']
    """
    is_woman = sex == "f"
    # A shorter vocal tract shifts all formants up. In percent of espeak-ng's own.
    tract = rng.normal(112, 4.5) if is_woman else rng.normal(97, 4.5)
    lowest = (170 if is_woman else 95) * np.exp(rng.normal(0, 0.14))  # Hz
    highest = lowest * rng.uniform(1.2, 1.6)
    lines = [
        "language variant",
        f"gender {'female' if is_woman else 'male'}",
        f"pitch {lowest:.0f} {highest:.0f}",
        f"flutter {rng.integers(0, 11)}",
        f"roughness {rng.integers(0, 4)}",
        f"voicing {rng.integers(55, 111)}",
        f"consonants {rng.integers(70, 131)} {rng.integers(70, 121)}",
    ]
    for formant in range(9):
        frequency = tract * np.exp(rng.normal(0, 0.025 if 1 <= formant <= 3 else 0.05))
        strength = (100 if formant <= 3 else 85) * np.exp(rng.normal(0, 0.2))
        width = (125 if is_woman else 95) * np.exp(rng.normal(0, 0.2))
        lines.append(f"formant {formant} {frequency:.0f} {strength:.0f} {width:.0f}")
    if rng.random() < 0.5:
        breath = rng.integers(1, 8, size=7)
        lines += [f"breath 0 {' '.join(map(str, breath))}", "breathw 150 150 200 200 400 400 600 600"]
    low, middle, high = rng.integers(150, 256, size=3)
    lines.append(f"tone 600 {low} 1200 {middle} 2000 {high}")
    return "\n".join(lines) + "\n"


def draw_channel(rng, sample_rate, conditions):
    """Draw what a session does to a voice: room, microphone and transmission, as one impulse response.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of chance.
    sample_rate : int
        Hz.
    conditions : float
        See :func:`make_voices`; 0 gives a mere delay.

    Returns
    -------
    numpy.ndarray
        [taps]. The direct sound comes ``_FILTER_TAPS // 2`` samples late.

    Example
    -------
    >>> int(np.argmax(draw_channel(np.random.default_rng(0), 8000, conditions=0)))
    512
    """
    # All is drawn whatever the conditions, so that they change how strong an effect is and nothing else.
    gains_db = conditions * rng.normal(0, 5.5, size=len(_EQ_BANDS_HZ))
    lowest_hz = min(20 * rng.uniform(4, 25) ** conditions, 600)  # what is left must be understood
    highest_hz = max(sample_rate / 2 * rng.uniform(0.6, 1.3) ** conditions, 2000)
    decay_s, reverberant_db = rng.uniform(0.1, 0.5), rng.uniform(-17, -5) + 10 * np.log10(max(conditions, 1e-9))
    tail = rng.standard_normal(round(0.5 * sample_rate))

    frequencies = fft.rfftfreq(_FILTER_TAPS, 1 / sample_rate)
    log_hz = np.log2(np.maximum(frequencies, 20))
    gain_db = np.interp(log_hz, np.log2(_EQ_BANDS_HZ), gains_db)
    if conditions > 0:  # 18 dB per octave outside the band
        gain_db -= 18 * np.maximum(np.log2(lowest_hz) - log_hz, 0)
        gain_db -= 18 * np.maximum(log_hz - np.log2(highest_hz), 0)
    response = np.roll(fft.irfft(10 ** (gain_db / 20)), _FILTER_TAPS // 2) * np.hanning(_FILTER_TAPS + 1)[:-1]

    time_s = np.arange(len(tail)) / sample_rate
    tail *= 10 ** (-3 * time_s / decay_s)  # 60 dB within the decay
    tail[: round(0.002 * sample_rate)] = 0  # the first wall is some decimetres away
    tail *= 10 ** (reverberant_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1  # the direct sound
    return signal.fftconvolve(response, tail)  # (taps,)


def _check(sizes, utterances_per_speaker, seed, sample_rate, conditions, num_sessions):
    for split, size in sizes.items():
        if split not in SPLITS:
            raise ValueError(f"sizes can only have the keys {', '.join(SPLITS)}, but got {split!r}.")
        if not isinstance(size, int) or not 0 <= size <= 9999:
            raise ValueError(f"sizes[{split!r}] can only be a whole number of 0 to 9999, but got {size!r}.")
        number = utterances_per_speaker.get(split)
        if size and not (isinstance(number, int) and 1 <= number <= 99):
            raise ValueError(f"utterances_per_speaker of {split} can only be 1 to 99, but got {number!r}.")
    if not any(sizes.values()):
        raise ValueError(f"sizes must have at least one speaker, but got {sizes}.")
    if sample_rate not in (8000, 16000):
        raise ValueError(f"sample_rate can only be 8000 or 16000, but got {sample_rate!r}.")
    if not (isinstance(conditions, int | float) and 0 <= conditions <= 3):
        raise ValueError(f"conditions can only be a number of 0 to 3, but got {conditions!r}.")
    if not isinstance(num_sessions, int) or num_sessions < 1:
        raise ValueError(f"num_sessions can only be a whole number of at least 1, but got {num_sessions!r}.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed can only be a whole number of at least 0, but got {seed!r}.")


def _choose_texts(sentences, num_texts, rng):
    """What a speaker reads: some words in a row of each sentence; all sentences, before one comes again."""
    texts = []
    while len(texts) < num_texts:
        for rank in rng.permutation(len(sentences))[: num_texts - len(texts)]:
            words = sentences[rank].split()
            num_words = min(int(rng.integers(_MIN_WORDS, _MAX_WORDS + 1)), len(words))
            start = int(rng.integers(len(words) - num_words + 1))
            texts.append(" ".join(words[start : start + num_words]))
    return texts


def _record_speaker(rng, sex, texts, sample_rate, conditions, num_sessions):
    """The accent, and of each text the session's number and the samples."""
    accent, variant = str(rng.choice(_ACCENTS)), draw_variant(sex, rng)
    rate, pitch_range = rng.integers(135, 181), rng.integers(35, 71)
    num_sessions = min(num_sessions, len(texts))
    sessions = [k * num_sessions // len(texts) for k in range(len(texts))]
    moods, channels, noises = [], [], []
    for _ in range(num_sessions):
        # How the speaker is that day: in words per minute, and in espeak-ng's percent of pitch and of its range.
        drawn = (rate, 50, pitch_range) + conditions * rng.normal(0, (11, 7, 8))
        limits = ((100, 220), (20, 80), (20, 95))
        rate_then, pitch_then, range_then = (int(np.clip(x, *limit)) for x, limit in zip(drawn, limits, strict=True))
        moods.append(Voice(accent, "own", rate_then, pitch_then, range_then))
        channels.append(draw_channel(rng, sample_rate, conditions))
        noises.append((rng.uniform(0, 2), rng.uniform(7, 22)))
    with own_variants({"own": variant}, "en") as data:
        espeak_rate, spoken = synthesize([moods[session] for session in sessions], texts, data)
    recordings = []
    for session, pcm in zip(sessions, spoken, strict=True):
        samples = resample(np.frombuffer(pcm, np.int16) / 2**15, espeak_rate, sample_rate)
        samples = trim(samples, sample_rate)
        late = _FILTER_TAPS // 2
        samples = signal.oaconvolve(samples, channels[session])[late : late + len(samples) + round(0.1 * sample_rate)]
        colour, snr_db = noises[session]
        noise = _coloured_noise(len(samples), colour, sample_rate, rng)
        snr_db += rng.uniform(-5, 5)
        peak_db = rng.uniform(-20, -1)
        if conditions > 0:
            snr_db -= 20 * np.log10(conditions)
            samples += noise * np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)
        recordings.append((session, samples * 10 ** (peak_db / 20) / np.abs(samples).max()))
    return accent, recordings


def _coloured_noise(num_samples, colour, sample_rate, rng):
    """Noise [num_samples] whose power falls with frequency to the power of ``colour``."""
    length = fft.next_fast_len(num_samples, real=True)
    spectrum = fft.rfft(rng.standard_normal(length))
    frequencies = np.maximum(fft.rfftfreq(length, 1 / sample_rate), 50)
    return fft.irfft(spectrum * frequencies ** (-colour / 2), length)[:num_samples]
