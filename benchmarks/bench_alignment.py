"""What an alignment costs: the time of scoring logits over the number of speakers, and of mapping an utterance.

    python benchmarks/bench_alignment.py                  # scoring, parameters, bytes, time
    python benchmarks/bench_alignment.py --model FOLDER   # the time as a share of that runtime model's
    python benchmarks/bench_alignment.py --quick          # whether it runs

Scoring: profiles and utterances of random embeddings against classifier weights of S speakers, through all S logits
and through the Cholesky factor; the largest difference of the scores stands beside. Mapping: one utterance at a time,
as a device recognises them. Times are medians of CPU time, on one thread; all that is compared is measured in turn.
Without --model, the runtime model is a small ECAPA-TDNN of SpeechBrain's with random weights, with its features.
"""

import argparse
import logging
import statistics
import time

import torch
from tqdm import tqdm

from nessa_modules.alignment import ALIGNMENTS, make_alignment
from nessa_modules.logit_alignment import logit_scores
from nessa_modules.plan import NESSA_KINDS

MAX_DIFFERENCE = 1e-5
MAX_SHARE = 0.02  # of the runtime model's time, of NESSA
MAX_GROWTH = 1.5  # of the scoring time from the fewest speakers to the most, still called flat
SAMPLE_RATE = 16000


def cpu_seconds(function, repeats):
    """Median CPU time of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def random_pairs(num_speakers, size, utterances=4):
    """Embeddings of two random linear models, and the speakers' numbers."""
    traits = torch.randn(num_speakers, size).repeat_interleave(utterances, 0)
    traits = traits + 0.5 * torch.randn(traits.shape)
    X, Y = (traits @ torch.randn(size, size) for _ in range(2))
    return X, Y, torch.arange(num_speakers).repeat_interleave(utterances)


def bench_scoring(numbers_of_speakers, size, num_profiles, num_utterances, repeats):
    """Print the table; return the largest difference of scores and the growth of the time."""
    X, Y, speakers = random_pairs(50, size)
    profiles, utterances = torch.randn(num_profiles, size), torch.randn(num_utterances, size)
    print(f"Scoring {num_profiles} profiles with {num_utterances} utterances of {size} dimensions\n")
    print(f"{'speakers':>10}{'fit':>11}{'all logits':>13}{'factor':>11}{'faster':>9}{'difference':>13}")
    differences, seconds = [], []
    for number in tqdm(numbers_of_speakers, "scoring", leave=False):
        weights = [torch.nn.functional.normalize(torch.randn(number, size), dim=1) for _ in range(2)]
        alignment = make_alignment("logit", enroll_weight=weights[0], runtime_weight=weights[1])
        fit = cpu_seconds(lambda each=alignment: each.fit(X, Y, speakers), 1)
        full = cpu_seconds(lambda each=weights: logit_scores(*each, profiles, utterances), repeats)
        factor = cpu_seconds(lambda each=alignment: each.score(profiles, utterances), repeats)
        # Against logits in float64: in float32, sums over many speakers are not that exact.
        exact = logit_scores(*(each.double() for each in (*weights, profiles, utterances)))
        differences.append(float((alignment.score(profiles, utterances) - exact).abs().max()))
        seconds.append(factor)
        print(
            f"{number:10d}{fit:9.2f} s{1e3 * full:10.2f} ms{1e3 * factor:8.2f} ms{full / factor:8.1f}x"
            f"{differences[-1]:13.1e}",
            flush=True,
        )
    # With fewer speakers than dimensions, the factor has only as many rows as there are speakers.
    full_rank = [each for each, number in zip(seconds, numbers_of_speakers, strict=True) if number >= 2 * size]
    return max(differences), (full_rank[-1] / full_rank[0] if len(full_rank) > 1 else None)


def small_ecapa(size):
    """A runtime model with random weights: samples [1, T] to an embedding."""
    from speechbrain.lobes.features import Fbank
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    features = Fbank(sample_rate=SAMPLE_RATE, n_mels=40)
    model = ECAPA_TDNN(40, channels=[64, 64, 64, 64, 192], attention_channels=32, lin_neurons=size, se_channels=32)
    model.eval()
    parameters = sum(each.numel() for each in model.parameters())
    return lambda samples: model(features(samples))[:, 0], parameters, SAMPLE_RATE


def exported_model(folder):
    """The runtime model of a folder."""
    from nessa_modules.encoder import SpeakerEncoder

    encoder = SpeakerEncoder.from_hparams(folder)
    parameters = sum(each.numel() for each in encoder.mods.parameters())
    return encoder.encode_batch, parameters, encoder.sample_rate


def bench_mapping(model, seconds, num_speakers, repeats):
    """Print the table; return the largest share of NESSA's kinds."""
    encode, parameters, sample_rate = model
    samples = 0.1 * torch.randn(1, int(seconds * sample_rate))
    with torch.no_grad():
        embedding = encode(samples)
        size = embedding.shape[-1]
        data = random_pairs(num_speakers, size)
        alignments = {}
        for kind in tqdm(ALIGNMENTS, "fits", leave=False):
            options = {"max_steps": 20} if kind in NESSA_KINDS else {}
            alignments[kind] = make_alignment(kind, **options).fit(*data)
        times = {kind: [] for kind in ("model", *alignments)}
        for _ in tqdm(range(repeats), "utterances", leave=False):
            times["model"].append(cpu_seconds(lambda: encode(samples), 1))
            for kind, alignment in alignments.items():
                times[kind].append(cpu_seconds(lambda each=alignment: each.runtime(embedding), 3))
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"\nMapping an utterance of {seconds:g} s, {size} dimensions\n")
    print(f"{'':>16}{'parameters':>12}{'on disk':>12}{'an utterance':>15}{'of the model':>14}")
    print(f"{'runtime model':>16}{parameters:12d}{'':>12}{1e6 * medians['model']:12.0f} us{'':>14}")
    for kind, alignment in alignments.items():
        print(
            f"{kind:>16}{alignment.num_parameters:12d}{alignment.num_bytes / 1e3:9.1f} kB{1e6 * medians[kind]:12.0f} us"
            f"{medians[kind] / medians['model']:13.2%}",
            flush=True,
        )
    return max(medians[kind] for kind in NESSA_KINDS) / medians["model"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="an exported runtime model's folder")
    parser.add_argument("--size", type=int, default=128, help="dimensions of an embedding (default: 128)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of an utterance (default: 2)")
    parser.add_argument("--speakers", type=int, nargs="+", help="(default: 100, 1000, 10000, 100000)")
    parser.add_argument("--repeats", type=int, help="(default: 30)")
    parser.add_argument("--quick", action="store_true", help="few speakers, few repetitions")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    repeats = args.repeats or (3 if args.quick else 30)
    numbers = args.speakers or ([50, 300, 1000] if args.quick else [100, 1000, 10_000, 100_000])
    print(f"torch {torch.__version__}, one thread; CPU time\n")
    model = exported_model(args.model) if args.model else small_ecapa(args.size)
    difference, growth = bench_scoring(sorted(numbers), args.size, 100, 100, max(3, repeats // 3))
    share = bench_mapping(model, args.seconds, 20 if args.quick else 200, repeats)
    print(f"\nAim: scores equal to {MAX_DIFFERENCE:g}: {verdict(difference < MAX_DIFFERENCE)}, {difference:.1e}.")
    flat = "not measured" if growth is None else f"{verdict(growth < MAX_GROWTH)}, {growth:.2f} times"
    print(f"Aim: scoring time flat in the number of speakers: {flat}.")
    print(f"Aim: NESSA under {MAX_SHARE:.0%} of the runtime model's time: {verdict(share < MAX_SHARE)}, {share:.2%}.")


def verdict(is_met):
    return "met" if is_met else "missed"


if __name__ == "__main__":
    main()
