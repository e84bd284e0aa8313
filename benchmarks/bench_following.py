"""Do voices stay in their place in long recordings? Conversations of recorded speech, with pauses, window by window.

Each speaker utters recorded sentences with pauses of 0.2 to 20 seconds, independently of the other; so both speak, one
speaks, or none. Compared are the ways from one window to the next, on the same conversations:

- each window on its own, in the order of the network's outputs: what cutting a file into pieces gives;
- followed by the overlap alone;
- followed by the overlap and reminders: what SepformerDSDSeparation does;
- the whole conversation as one window, where memory allows: what the model itself can do.

The same with perfect voices that come in a random order for each window (10 dB of the other voice left in) tells
what the following loses, whatever the model.
"""

import argparse
import csv
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.losses import PITLoss, pairwise_neg_si_sdr
from dsd_modules.windows import FollowedVoices, Windows, match_voices

RATE = 8000
PIECE = 4 * RATE  # in which it is asked who is where
PAUSES = [((0.2, 1), 0.5), ((1, 5), 0.3), ((8, 20), 0.2)]  # seconds, and how often
LEFT_IN_DB = -10


def read_speech(folder):
    """The utterances of each of the last 20 speakers of ``metadata.csv`` (the others may have served to develop)."""
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: row["id"])
    speech = defaultdict(list)
    for row in rows:
        speech[row["speaker"]].append(soundfile.read(folder / row["path"], dtype="float32")[0])
    return [speech[speaker] for speaker in sorted(speech)[-20:]]


def speak(utterances, num_samples, rng):
    """A speaker's part of a conversation [T]."""
    voice = np.zeros(num_samples, np.float32)
    level = 0.05 * 10 ** (rng.uniform(-2, 2) / 20)
    begin, waiting = int(RATE * rng.uniform(0, 4)), []
    while begin < num_samples:
        waiting = waiting or list(rng.permutation(len(utterances)))
        utterance = utterances[waiting.pop()]
        utterance = utterance * (level / np.sqrt(np.mean(utterance**2)))
        voice[begin : begin + len(utterance)] = utterance[: num_samples - begin]
        pause = PAUSES[rng.choice(len(PAUSES), p=[share for _, share in PAUSES])][0]
        begin += len(utterance) + int(RATE * rng.uniform(*pause))
    return voice


def converse(speech, num_spks, minutes, seed):
    """Sources [T, N] of a conversation."""
    rng = np.random.default_rng(seed)
    speakers = rng.choice(len(speech), num_spks, replace=False)
    return np.stack([speak(speech[speaker], int(60 * RATE * minutes), rng) for speaker in speakers], axis=1)


def places(sources, voices):
    """For each piece the voice that each source is in, or None where nobody speaks."""
    energies = np.mean(sources**2, axis=0)
    for begin in range(0, len(sources), PIECE):
        source, voice = sources[begin : begin + PIECE].astype(float), voices[begin : begin + PIECE].astype(float)
        speaks = np.mean(source**2, axis=0) > 0.03 * energies
        norms = np.outer(np.linalg.norm(source, axis=0), np.linalg.norm(voice, axis=0)) + 1e-9
        likeness = np.abs(source.T @ voice) / norms * speaks[:, None]
        yield tuple(linear_sum_assignment(likeness, maximize=True)[1]) if speaks.any() else None


def improvement(sources, voices, mixture):
    """SI-SDRi in dB over the whole conversation, under its one best assignment."""
    sources, voices, mixture = (torch.from_numpy(x.astype(np.float64).T)[None] for x in (sources, voices, mixture))
    before = -pairwise_neg_si_sdr(mixture.expand_as(sources), sources).diagonal(0, 1, 2).mean()
    return float(-PITLoss()(voices, sources).loss.mean() - before)


def difference(voices, whole):
    """How much the voices [T, N] differ from those of the whole, in dB: the median over seconds."""
    perm, signs = match_voices(whole, voices)
    voices = (signs * voices[:, perm])[: len(voices) // RATE * RATE].reshape(-1, RATE, whole.shape[1])  # [S, 8000, N]
    whole = whole[: len(whole) // RATE * RATE].reshape(voices.shape)
    return np.median(10 * np.log10(np.square(voices - whole).sum((1, 2)) / (np.square(whole).sum((1, 2)) + 1e-9)))


class PerfectVoices:
    """Gives the sources, with something of each other left in, in a random order each time.

    The mixture that it is given holds the numbers of the samples, so that it knows which they are.
    """

    def __init__(self, sources, seed):
        self.rng = np.random.default_rng(seed)
        others = sources.sum(1, keepdims=True) - sources
        self.voices = sources + 10 ** (LEFT_IN_DB / 20) * others
        self.num_spks = sources.shape[1]

    def __call__(self, mixture):
        return self.voices[mixture.astype(int)][:, self.rng.permutation(self.num_spks)]


def follow(separate_window, mixture, num_spks, cut, is_matched=True):
    """The voices [T, N] of a mixture."""
    match = match_voices if is_matched else lambda voices, estimates: (np.arange(num_spks), np.ones(num_spks))
    followed = FollowedVoices(separate_window, num_spks, cut, match)
    return np.concatenate([voices for _, voices in [*followed.push(mixture), *followed.finish()]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder of a model for 8 kHz")
    parser.add_argument(
        "speech", type=Path, help="folder with metadata.csv (columns id, speaker, path) of 8 kHz speech"
    )
    parser.add_argument("--conversations", type=int, default=6, metavar="N", help="(default: 6)")
    parser.add_argument("--minutes", type=float, default=3, help="of each (default: 3)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    separator = SepformerDSDSeparation.from_hparams(arguments.model)
    num_spks, speech = separator.num_spks, read_speech(arguments.speech)
    network = separator._window_separator(None, None)
    cuts = {
        "each window on its own": (Windows.of_recording(16 * RATE, 2 * RATE), False),
        "overlap alone": (Windows.of_recording(16 * RATE, 2 * RATE), True),
        "overlap and reminders": (Windows.of_recording(16 * RATE, 2 * RATE, RATE), True),
        "stream, overlap alone": (Windows.of_stream(4 * RATE, RATE // 2, RATE // 10), True),
        "stream, overlap and reminders": (Windows.of_stream(4 * RATE, RATE // 2, RATE // 10, RATE), True),
        "the whole as one window": (Windows.of_recording(int(arguments.minutes * 60 * RATE), 2 * RATE), True),
    }
    counts, differences = defaultdict(lambda: np.zeros(5)), []
    for seed in tqdm(range(arguments.conversations)):
        sources = converse(speech, num_spks, arguments.minutes, seed)
        noise = 1e-4 * np.random.default_rng(seed).standard_normal(len(sources))
        mixture = (sources.sum(1) + noise).astype(np.float32)
        for name, (cut, is_matched) in cuts.items():
            for kind in ("model", "perfect voices"):
                if kind == "model":
                    voices = follow(network, mixture, num_spks, cut, is_matched)
                elif name.startswith("the whole"):
                    continue
                else:
                    perfect = PerfectVoices(sources, seed)
                    voices = follow(perfect, np.arange(len(mixture)), num_spks, cut, is_matched)
                spoken = [place for place in places(sources, voices) if place is not None]
                swaps = sum(place != last for last, place in pairwise(spoken))
                elsewhere = len(spoken) - max(map(spoken.count, spoken))
                gain = improvement(sources, voices, mixture)
                counts[kind, name] += [swaps, len(spoken) - 1, elsewhere, len(spoken), gain]
                if kind == "model" and name == "overlap and reminders":
                    windowed = voices
                elif kind == "model" and name.startswith("the whole"):
                    differences.append(difference(windowed, voices))
    print(f"\n{arguments.conversations} conversations of {arguments.minutes:g} minutes, {num_spks} speakers\n")
    print("| voices of | from window to window | pieces that swap | pieces in another's place | SI-SDRi |")
    print("| --- | --- | ---: | ---: | ---: |")
    for (kind, name), (swaps, steps, elsewhere, pieces, gain) in sorted(counts.items()):
        gain /= arguments.conversations
        print(f"| {kind} | {name} | {swaps / steps:.1%} | {elsewhere / pieces:.1%} | {gain:.2f} dB |")
    print("\nHow much the model's voices differ from those of the whole, median over seconds, in each conversation:")
    print(", ".join(f"{value:.0f}" for value in differences), "dB")


if __name__ == "__main__":
    main()
