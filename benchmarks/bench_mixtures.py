"""Who speaks at the same time? How well voices that were separated are identified, of speakers with profiles.

    python benchmarks/bench_mixtures.py SEPARATOR EXPERIMENT

SEPARATOR is the exported folder of a run, EXPERIMENT a folder that experiment.py of recipes/VoxCeleb/SpeakerAlignment
has filled, with the speaker models and alignments. Each test speaker of it has a profile of the first three utterances;
the others are mixed, as many speakers at a time as the separator knows, each at -2.5 to 2.5 dB, from their starts to
the end of the shortest. Heard are

- each voice alone, cut as in the mixture: the best that can be expected;
- the mixture itself, for each voice: what separating nothing gives, at best 1 of N right;
- each voice with the others left in, attenuated by 10 and 20 dB: what separators give that leave so much, and make no
  artefacts;
- the voices after the first block of the separator and after all; each is its speaker's under the best assignment.

*identified* is the share of voices whose own profile is the closest of all, with a 95 % interval over speakers, *EER*
that of all pairs of a voice and a profile; both are means over the experiment's seeds.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.losses import PITLoss
from nessa_modules.alignment import load_alignment
from nessa_modules.corpora import read_corpus, read_utterance
from nessa_modules.experiment import alignment_folder, load_encoder
from nessa_modules.plan import NEW, OLD, System
from nessa_modules.trials import eer
from shared_modules.statistics import speaker_bootstrap

NUM_ENROLL = 3
SYSTEMS = (OLD, NEW, System("v1", "v2", "nessa"), System("v2", "v1", "nessa"))
LEFT_IN_DB = (-10, -20)


def draw_mixtures(speakers, num_mixtures, num_spks, rng):
    """Sources of mixtures: tuples of (speaker, utterance). Each speaker's utterances take turns."""
    waiting = {speaker: [] for speaker in speakers}
    mixtures = []
    for _ in range(num_mixtures):
        chosen = rng.choice(sorted(speakers), num_spks, replace=False)
        for speaker in chosen:
            waiting[speaker] = waiting[speaker] or list(rng.permutation(len(speakers[speaker])))
        mixtures.append(tuple((speaker, speakers[speaker][waiting[speaker].pop()]) for speaker in chosen))
    return mixtures


def mix(utterances, sample_rate, rng):
    """Sources [N, T] at their levels in the mixture, which is their sum."""
    signals = [torch.as_tensor(read_utterance(utterance, sample_rate)) for utterance in utterances]
    num_samples = min(map(len, signals))
    sources = torch.stack([signal[:num_samples] for signal in signals]).float()
    gains = 10 ** (torch.from_numpy(rng.uniform(-2.5, 2.5, len(sources))) / 20)
    return 0.05 * sources / sources.square().mean(-1, keepdim=True).sqrt() * gains.float()[:, None]


def hear(separator, sources):
    """What is heard of each source: from its name to signals [N, T], and the SI-SDR improvement of all blocks, dB."""
    mixture = sources.sum(0, keepdim=True)  # (1, T)
    heard = {"alone": sources, "the mixture itself": mixture.expand_as(sources)}
    for left_in_db in LEFT_IN_DB:
        heard[f"others at {left_in_db} dB"] = sources + 10 ** (left_in_db / 20) * (mixture - sources)
    for name, num_blocks in (("separated, first block", 1), ("separated, all blocks", None)):
        voices = separator.separate_batch(mixture, num_blocks=num_blocks).cpu().transpose(1, 2)  # (1, N, T)
        result = PITLoss()(voices, sources[None])
        heard[name] = voices[0, result.perm[0]]
    before = PITLoss()(mixture.expand_as(sources)[None], sources[None]).loss
    return heard, float(before - result.loss)


def identified(own, scores):
    """Share of voices whose profiles, own [M, N], score best of all, [M, N, P] of each seed; with an interval."""
    shares = np.mean([each.argmax(-1) == own for each in scores], axis=(0, 2))  # (M,)
    return speaker_bootstrap(shares, own.astype(str))


def mean_eer(own, scores):
    """EER of all pairs of a voice and a profile, the mean over seeds."""
    return np.mean([eer(each.ravel(), (own[..., None] == np.arange(each.shape[-1])).ravel()) for each in scores])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("separator", help="exported folder of a separator, or its name on the hub")
    parser.add_argument("experiment", type=Path, help="folder that experiment.py has filled")
    parser.add_argument("--mixtures", type=int, default=200, metavar="M", help="(default: 200)")
    arguments = parser.parse_args(arguments)

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    separator = SepformerDSDSeparation.from_hparams(arguments.separator)
    by_speaker = defaultdict(list)
    for utterance in read_corpus(arguments.experiment / "data" / "test.csv", progressbar=False):
        by_speaker[utterance.speaker].append(utterance)
    names = sorted(name for name, utterances in by_speaker.items() if len(utterances) > NUM_ENROLL)
    enrolled = [utterance for name in names for utterance in by_speaker[name][:NUM_ENROLL]]
    others = {name: by_speaker[name][NUM_ENROLL:] for name in names}
    seeds = sorted(int(folder.name.split("_")[1]) for folder in (arguments.experiment / "alignments").iterdir())
    encoders = {
        (version, seed): load_encoder(arguments.experiment / "models" / f"{version}_{seed}" / "exported")
        for version in ("v1", "v2")
        for seed in seeds
    }
    rates = {separator.sample_rate, *(encoder.sample_rate for encoder in encoders.values())}
    if len(rates) > 1:
        raise SystemExit(f"The separator and the speaker models can only have one sample rate, but got {rates} Hz.")
    profiles = {
        key: normalize(encoder.encode_utterances(enrolled, progressbar=False), dim=-1)
        .reshape(len(names), NUM_ENROLL, -1)
        .mean(1)
        for key, encoder in encoders.items()
    }

    own, improvements, embeddings = [], [], defaultdict(list)
    mixtures = draw_mixtures(others, arguments.mixtures, separator.num_spks, rng)
    for sources in tqdm(mixtures, desc="Mixtures"):
        signals = mix([utterance for _, utterance in sources], separator.sample_rate, rng)
        heard, improvement = hear(separator, signals)
        own.append([names.index(speaker) for speaker, _ in sources])
        improvements.append(improvement)
        for kind, voices in heard.items():
            for key, encoder in encoders.items():
                embeddings[kind, key].append(encoder.encode_batch(voices).cpu())
    own = np.array(own)  # (M, N)

    seconds = np.mean([min(utterance.duration_s for _, utterance in sources) for sources in mixtures])
    print(
        f"{len(mixtures)} mixtures of {separator.num_spks} of {len(names)} speakers, {seconds:.1f} s on average; "
        f"SI-SDRi {np.mean(improvements):.2f} dB\n"
    )
    print("| profiles, utterances | heard | identified, % | EER, % |\n|---|---|---|---|")
    for system in SYSTEMS:
        alignments = {seed: load_alignment(alignment_folder(arguments.experiment, seed, system)) for seed in seeds}
        for kind in heard:
            scores = []
            for seed, alignment in alignments.items():
                known = normalize(alignment.enroll(profiles[system.enroll, seed]).double(), dim=-1)  # (P, D)
                voices = torch.stack(embeddings[kind, (system.runtime, seed)])  # (M, N, D)
                voices = normalize(alignment.runtime(voices).double(), dim=-1)
                scores.append((voices @ known.T).detach().numpy())
            share, rate = identified(own, scores), 100 * mean_eer(own, scores)
            cells = f"{100 * share.mean:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}] | {rate:.1f}"
            print(f"| {system.pair} {system.alignment} | {kind} | {cells} |")


if __name__ == "__main__":
    main()
