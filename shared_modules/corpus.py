"""The synthetic corpus: espeak-ng voices reading sentences, as a folder of wav files and one csv.

Three splits (train, dev, test) share neither speakers, voice variants nor sentences. Everything follows from
the seed, whatever the number of workers.
"""

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from tqdm import tqdm

from shared_modules.espeak import Voice, synthesize

SPLITS = ("train", "dev", "test")
SAMPLE_RATE = 16000
_PEAK = 0.7
_MARGIN_SECONDS = 0.01

# Every voiced, human-like variant of espeak-ng 1.52. Left out: whispers, croaks, robots, echoes, chipmunks, and
# variants that sound like another one.
WOMEN = (
    *("Alicia", "Andrea", "Annie", "anika", "aunty", "belinda", "f1", "f2", "f3", "f4", "f5"),
    *("grandma", "linda", "shelby", "steph", "steph2"),
)
MEN = (
    *("Alex", "Andy", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Lee", "Mario"),
    *("Michael", "Mike", "Mr serious", "Nguyen", "Reed", "RicishayMax", "RicishayMax2", "adam", "antonio"),
    *("boris", "david", "ed", "edward", "edward2", "gustave", "ian", "iven2", "iven3", "iven4", "john"),
    *("klatt3", "klatt4", "klatt5", "klatt6", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "marcelo"),
    *("max", "michel", "miguel", "mike2", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert"),
    *("sandro", "travis", "victor"),
)
LANGUAGES = (
    *("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"),
    *("en-us-nyc", "de", "de", "fr", "fr", "es", "es-419", "it", "it"),
)


def split_of(set_name):
    """The split a set of mixtures belongs to: ``dev*`` and ``test*`` by name, all others are train.

    Example
    -------
    >>> [split_of(name) for name in ("train-360", "dev", "test")]
    ['train', 'dev', 'test']
    """
    return next((split for split in ("dev", "test") if set_name.startswith(split)), "train")


def share_of(split, items):
    """The share of a list that a split owns: five of seven items for train, one each for dev and test.

    Example
    -------
    >>> share_of("train", "abcdefgh"), share_of("dev", "abcdefgh"), share_of("test", "abcdefgh")
    (['a', 'b', 'c', 'd', 'e', 'h'], ['f'], ['g'])
    """
    owner = ("train",) * 5 + ("dev", "test")
    return [item for rank, item in enumerate(items) if owner[rank % 7] == split]


def read_sentences():
    """The sentences that ship with this package.

    Returns
    -------
    dict
        From a language (``en``, ``de``, ...) to its list of sentences.

    Example
    -------
    >>> sorted(read_sentences())
    ['de', 'en', 'es', 'fr', 'it']
    """
    sentences = {}
    for line in Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines():
        language, sentence = line.split("\t")
        sentences.setdefault(language, []).append(sentence)
    return sentences


def draw_voices(split, num_voices, seed):
    """Draws the speakers of a split. Every other one has a woman's variant.

    Arguments
    ---------
    split : str
        ``train``, ``dev`` or ``test``; the splits have no variant in common.
    num_voices : int
        How many.
    seed : int
        Seed of the draw.

    Returns
    -------
    list of Voice

    Example
    -------
    >>> len(set(draw_voices("train", 96, seed=1234)))
    96
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    women, men = (rng.permutation(share_of(split, variants)) for variants in (WOMEN, MEN))
    offsets = rng.random((2, max(len(women), len(men))))
    voices = []
    for k in range(num_voices):
        rank, is_man = divmod(k, 2)
        variants = men if is_man else women
        # Women's voices are the higher ones; those of one variant are spread over the range, to differ clearly.
        turn, variant = divmod(rank, len(variants))
        num_turns = -(-num_voices // (2 * len(variants)))
        lowest = 5 if is_man else 45
        pitch = lowest + 50 * (turn + offsets[is_man, variant]) / num_turns
        voices.append(
            Voice(
                language=str(rng.choice(LANGUAGES)),
                variant=str(variants[variant]),
                rate=int(rng.integers(125, 166)),
                pitch=int(pitch),
                pitch_range=int(rng.integers(30, 81)),
            )
        )
    return voices


def make_corpus(folder, num_voices, utterances_per_voice, seed=1234, num_workers=None, progressbar=True):
    """Synthesises the corpus: ``<folder>/wav/<speaker>/<id>.wav`` (16 kHz, 16 bit, mono) and ``metadata.csv``.

    The csv has one row per utterance, sorted by ``id``, with the columns ``id, speaker, path, duration_s, split,
    language, variant, text``; ``path`` is relative to the csv's folder.

    Arguments
    ---------
    folder : str or Path
        Where to write.
    num_voices : dict
        From a split to its number of speakers, e.g. ``{"train": 96, "dev": 16, "test": 16}``.
    utterances_per_voice : dict
        From a split to the number of sentences that each speaker reads (fewer where the split owns fewer
        sentences of the speaker's language).
    seed : int
        Seed of the voices and of who reads what.
    num_workers : int, optional
        Processes at a time; default: one per core. The result does not depend on it.
    progressbar : bool
        Whether to show one.

    Returns
    -------
    Path
        The csv.

    Raises
    ------
    ValueError
        If espeak-ng is not installed, or fails.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = make_corpus(folder.name, {"dev": 1}, {"dev": 1}, progressbar=False)
    >>> path.read_text().splitlines()[0]
    'id,speaker,path,duration_s,split,language,variant,text'
    >>> folder.cleanup()
    """
    folder = Path(folder)
    sentences = read_sentences()
    jobs = []
    for split in SPLITS:
        rng = np.random.default_rng([seed, SPLITS.index(split), 1])
        for k, voice in enumerate(draw_voices(split, num_voices.get(split, 0), seed)):
            language = voice.language.split("-")[0]
            owned = share_of(split, list(enumerate(sentences[language])))
            chosen = rng.permutation(len(owned))[: utterances_per_voice[split]]
            jobs.append((split, f"{split}{k:03d}", voice, [owned[i] for i in chosen]))

    def read_aloud(job):
        split, speaker, voice, texts = job
        sample_rate, utterances = synthesize(voice, [text for _, text in texts])
        (folder / "wav" / speaker).mkdir(parents=True)
        rows = []
        for (rank, text), pcm in zip(texts, utterances, strict=True):
            language = voice.language.split("-")[0]
            utterance_id = f"{speaker}-{language}{rank:03d}"
            path = f"wav/{speaker}/{utterance_id}.wav"
            samples = resample(np.frombuffer(pcm, np.int16) / 2**15, sample_rate, SAMPLE_RATE)
            samples = trim(samples, SAMPLE_RATE)
            samples *= _PEAK / np.abs(samples).max()
            soundfile.write(folder / path, samples, SAMPLE_RATE, subtype="PCM_16")
            duration = f"{len(samples) / SAMPLE_RATE:.4f}"
            rows.append((utterance_id, speaker, path, duration, split, voice.language, voice.variant, text))
        return rows

    rows = run_parallel(read_aloud, jobs, num_workers, "Synthesising voices", progressbar)
    header = ("id", "speaker", "path", "duration_s", "split", "language", "variant", "text")
    return write_csv(folder / "metadata.csv", header, sorted(row for voice_rows in rows for row in voice_rows))


def resample(samples, sample_rate, new_sample_rate):
    """Changes the rate of a signal (1-D array), as LibriMix does, with ``scipy.signal.resample_poly``.

    Example
    -------
    >>> len(resample(np.zeros(22050), 22050, 16000))
    16000
    """
    if sample_rate == new_sample_rate:
        return samples
    divisor = np.gcd(sample_rate, new_sample_rate)
    return resample_poly(samples, new_sample_rate // divisor, sample_rate // divisor)


def run_parallel(function, jobs, num_workers, description, progressbar):
    """Maps a function over jobs in threads, in order, under a progress bar; stops at the first error.

    Threads are enough: the work is done in child processes, or in libraries that release the GIL.

    Example
    -------
    >>> run_parallel(abs, [-1, 2], num_workers=2, description="abs", progressbar=False)
    [1, 2]
    """
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        try:
            results = pool.map(function, jobs)
            return list(tqdm(results, description, total=len(jobs), disable=not progressbar))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_csv(path, header, rows):
    """Writes a csv with plain newlines, so that the bytes are the same on every system; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def trim(samples, sample_rate):
    """Cuts what is quieter than 1 % of the peak at both ends, but for a small margin.

    Example
    -------
    >>> len(trim(np.r_[np.zeros(8000), np.ones(8000), np.zeros(8000)], 8000))
    8160
    """
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    margin = round(_MARGIN_SECONDS * sample_rate)
    return samples[max(loud[0] - margin, 0) : loud[-1] + 1 + margin]
