"""PIT SI-SDR losses, forward and backward: ours beside SpeechBrain, asteroid, torchmetrics and fast_bss_eval.

    python benchmarks/bench_pit.py
    python benchmarks/bench_pit.py --quick
    python benchmarks/bench_pit.py --speakers 2 3 --batch 4 --seconds 3 --device cuda

The repeats of all libraries are interleaved, so that a busy machine slows all of them. One row for each point of the
grid: the median milliseconds of ours; for each peer, how many times ours it takes; the memory that ours takes at its
peak beside the estimates and references, as a multiple of theirs; how fast the bytes that any such loss must move went
by, beside the machine's bandwidth, measured in the same run; and how much of its time ours takes for signals of 8
samples too, which is the cost of its many small operations. The aims: at most half the time of the fastest peer, no
more than twice the inputs' memory. A second table compares the layer-wise loss with a loop of SpeechBrain's loss.

On a CPU, a bandwidth above 100 % means that the signals were still in the caches. A peer is left out where one call
would take longer than the budget, foreseen from a smaller point.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import time
import warnings

import torch
from tqdm import tqdm

from dsd_modules.losses import PITLoss, layerwise_loss

SPEEDUP_AIM = 2.0  # times as fast as the fastest peer, at least
MEMORY_AIM = 2.0  # times the inputs' bytes, at most
# Forward: read the estimates and the references. Backward: read both again, write the gradient of the estimates.
LEAST_PASSES = 5
SHORT = "ours, 8 samples"
QUICK = {"speakers": [2, 5, 20], "batch": [1, 8], "seconds": [1.0, 4.0]}


def ours(est, ref):
    """PIT loss of this library."""
    return PITLoss()(est, ref).loss.mean()


def ours_layerwise(est, ref, layer_permutation="independent"):
    """Layer-wise PIT loss of this library."""
    return layerwise_loss(PITLoss()(est, ref), layer_permutation=layer_permutation).loss.mean()


def speechbrain_loss():
    """``get_si_snr_with_pitwrapper``, which takes ``[B, T, N]`` and the references first; all N! permutations."""
    from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

    return lambda est, ref: get_si_snr_with_pitwrapper(ref.transpose(1, 2), est.transpose(1, 2)).mean()


def asteroid_loss():
    """``PITLossWrapper`` on the pairwise matrix, without the wrapper's refusal of 10 speakers and more."""
    from asteroid.losses.pit_wrapper import PITLossWrapper
    from asteroid.losses.sdr import PairwiseNegSDR

    pairwise = PairwiseNegSDR("sisdr", zero_mean=True)
    return lambda est, ref: PITLossWrapper.find_best_perm(pairwise(est, ref))[0].mean()


def torchmetrics_loss():
    """``permutation_invariant_training`` on SI-SDR; SciPy's assignment from 3 speakers."""
    from torchmetrics.functional.audio import (
        permutation_invariant_training,
        scale_invariant_signal_distortion_ratio,
    )

    def loss(est, ref):
        metric = scale_invariant_signal_distortion_ratio
        return -permutation_invariant_training(est, ref, metric, eval_func="max", zero_mean=True)[0].mean()

    return loss


def fast_bss_eval_loss():
    """``si_sdr_pit_loss``; its own Hungarian algorithm."""
    from fast_bss_eval.torch import si_sdr_pit_loss

    return lambda est, ref: si_sdr_pit_loss(est, ref, zero_mean=True).mean()


PEERS = {
    "SpeechBrain": speechbrain_loss,
    "asteroid": asteroid_loss,
    "torchmetrics": torchmetrics_loss,
    "fast_bss_eval": fast_bss_eval_loss,
}

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MAX_SPEECHBRAIN_SPKS = 6  # it loops in Python over all permutations of every item


def run_once(loss_function, est, ref, clock):
    """Seconds of one forward and backward, and the loss."""
    est = est.detach().requires_grad_()
    synchronize = torch.cuda.synchronize if est.is_cuda else lambda: None
    synchronize()
    start = clock()
    loss = loss_function(est, ref)
    loss.backward()
    synchronize()
    return clock() - start, loss.item()


def peak_memory(loss_function, est, ref):
    """Most bytes that one forward and backward held at a time beside its inputs; the gradient counts.

    On the CPU, the running sum of all that torch's allocator gave and took back, as its profiler recorded it.
    """
    if est.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(loss_function, est, ref, time.perf_counter)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_once(loss_function, est, ref, time.perf_counter)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def copy_bandwidth(device, clock, repeats=5):
    """Bytes per second, read and written, of copies of 256 MiB, more than any cache: one number for each copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(repeats + 1):
        synchronize = torch.cuda.synchronize if source.is_cuda else lambda: None
        synchronize()
        start = clock()
        target.copy_(source)
        synchronize()
        rates.append(2 * source.nbytes / (clock() - start))
    return rates[1:]  # the first touched fresh memory


def compare(losses, est, ref, args):
    """Median seconds of each loss, or the reason why there is none.

    Arguments
    ---------
    losses : dict
        Name to function of ``(est, ref)``, or to a string that says why it is missing.
    est, ref : torch.Tensor
        What the functions are given.
    args : argparse.Namespace
        ``clock``; ``budget``, the seconds beyond which a loss is timed no more after its first call; ``repeats`` and
        ``point_seconds``: each is timed in turn, that often at most, fewer (3 at least) where it would take longer.

    Returns
    -------
    dict
        Name to seconds, or to a string.
    """
    clock = CLOCKS[args.clock]
    results, times, values = {}, {}, {}
    for name, loss_function in losses.items():
        if isinstance(loss_function, str):
            results[name] = loss_function
            continue
        run_once(loss_function, est[..., :800], ref[..., :800], clock)  # warms up
        seconds, values[name] = run_once(loss_function, est, ref, clock)
        if seconds > args.budget:
            results[name] = f"{seconds:.1f} s, once"
        else:
            times[name] = [seconds]
    repeats = int(args.point_seconds / max(sum(seconds[0] for seconds in times.values()), 1e-9))
    for _ in range(min(max(repeats, 3), args.repeats)):
        for name in times:
            times[name].append(run_once(losses[name], est, ref, clock)[0])
    results |= {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    for name, value in values.items():
        if name != SHORT and abs(value - values["ours"]) > 1e-2:
            results[name] = f"wrong: {value:.3f} dB"
    return {name: results[name] for name in losses}


def signals(num_spks, batch, seconds, args, num_blocks=None):
    """Noisy, shuffled references as estimates, ``[(L,) B, N, T]``, and the references."""
    generator = torch.Generator().manual_seed(args.seed)
    ref = torch.randn(batch, num_spks, int(seconds * args.sample_rate), generator=generator)
    shape = ref.shape if num_blocks is None else (num_blocks, *ref.shape)
    est = ref.roll(1, dims=1) + torch.randn(shape, generator=generator)
    return est.to(args.device), ref.to(args.device)


def affordable(peers, measured, num_spks, num_samples, budget):
    """The peers, those that would take longer than the budget replaced by the reason.

    ``measured``: the samples of an item times items, and the seconds, of each peer's last point with as many speakers.
    """
    losses = dict(peers)
    for name, loss_function in peers.items():
        if isinstance(loss_function, str):
            continue
        if name == "SpeechBrain" and num_spks > MAX_SPEECHBRAIN_SPKS:
            losses[name] = f"{num_spks}!"
        elif name in measured:
            samples, seconds = measured[name]
            expected = seconds * num_samples / samples
            if expected > budget:
                losses[name] = f"~{expected:.0f} s"
    return losses


def measure_grid(peers, args):
    """One dictionary for each point: the point, the results of :func:`compare`, peak memory, bytes of the estimates."""
    points = []
    progress = tqdm(total=len(args.speakers) * len(args.batch) * len(args.seconds), unit="point")
    for num_spks in args.speakers:
        measured = {}
        for batch, seconds in sorted(
            itertools.product(args.batch, args.seconds), key=lambda point: point[0] * point[1]
        ):
            progress.set_description(f"{num_spks} speakers, batch {batch}, {seconds:g} s")
            est, ref = signals(num_spks, batch, seconds, args)
            num_samples = batch * ref.shape[-1]
            short_est, short_ref = est[..., :8].clone(), ref[..., :8].clone()

            def short(est, ref, short_est=short_est, short_ref=short_ref):
                return ours(short_est.requires_grad_(), short_ref)

            losses = affordable(peers, measured, num_spks, num_samples, args.budget) | {"ours": ours, SHORT: short}
            results = compare(losses, est, ref, args)
            measured |= {name: (num_samples, value) for name, value in results.items() if not isinstance(value, str)}
            memory = peak_memory(ours, est, ref) / (est.nbytes + ref.nbytes)
            points.append(
                {"point": (num_spks, batch, seconds), "results": results, "memory": memory, "bytes": est.nbytes}
            )
            progress.update()
    progress.close()
    return sorted(points, key=lambda point: point["point"])


def speedup(results):
    """How many times the time of ours the fastest peer takes; None if there is no peer."""
    times = [value for name, value in results.items() if name in PEERS and not isinstance(value, str)]
    return min(times) / results["ours"] if times else None


def print_grid(points, bandwidth):
    """The table, and how often the aims are met."""
    names = list(PEERS)
    titles = ["speakers", "batch", "s", "ours, ms", *names, "fastest", "memory", "least MB", "bandwidth", "fixed"]
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    slow, large = [], []
    for point in points:
        results, least_bytes = point["results"], LEAST_PASSES * point["bytes"]
        num_spks, batch, seconds = point["point"]
        label, fastest = f"{num_spks} x {batch} x {seconds:g} s", speedup(results)
        cells = [str(num_spks), str(batch), f"{seconds:g}", f"{1e3 * results['ours']:.2f}"]
        cells += [v if isinstance(v := results[name], str) else f"{v / results['ours']:.1f}x" for name in names]
        cells += ["-" if fastest is None else f"{fastest:.1f}x", f"{point['memory']:.2f}x", f"{least_bytes / 1e6:.1f}"]
        cells += [f"{least_bytes / results['ours'] / bandwidth:.0%}", f"{results[SHORT] / results['ours']:.0%}"]
        print("| " + " | ".join(cells) + " |")
        if fastest is not None and fastest < SPEEDUP_AIM:
            slow.append(f"{label} ({fastest:.1f}x)")
        if round(point["memory"], 2) > MEMORY_AIM:
            large.append(f"{label} ({point['memory']:.2f}x)")
    compared = sum(speedup(point["results"]) is not None for point in points)
    print(
        f"\nAt least {SPEEDUP_AIM:g} times as fast as the fastest peer at {compared - len(slow)} of {compared} points; "
        f"missed at (speakers x batch x length): {', '.join(slow) or 'none'}.\n"
        f"Peak memory at most {MEMORY_AIM:g} times the inputs' at {len(points) - len(large)} of {len(points)} points; "
        f"missed at: {', '.join(large) or 'none'}."
    )


def print_layerwise(rows):
    """``rows``: number of speakers to results of :func:`compare`; milliseconds, and in brackets times ours."""
    names = list(next(iter(rows.values())))
    print("| speakers | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for label, results in rows.items():
        base = results["ours"]
        cells = [v if isinstance(v, str) else f"{1e3 * v:.1f} ({v / base:.1f}x)" for v in results.values()]
        print(f"| {label} | " + " | ".join(cells) + " |")


def measure_layerwise(speechbrain, args):
    """The layer-wise loss beside loops over its blocks: number of speakers to results of :func:`compare`."""
    rows = {}
    for num_spks in args.layerwise_speakers:

        def loop(est, ref):
            return sum(speechbrain(block, ref) for block in est) / len(est)

        losses = {
            "SpeechBrain in a loop": speechbrain if isinstance(speechbrain, str) else loop,
            "ours in a loop": lambda est, ref: sum(ours(block, ref) for block in est) / len(est),
            "ours, shared": lambda est, ref: ours_layerwise(est, ref, "shared"),
            "ours": ours_layerwise,
        }
        rows[num_spks] = compare(losses, *signals(num_spks, 8, 4.0, args, args.blocks), args)
    return rows


def main():
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speakers", type=int, nargs="+", default=[2, 3, 5, 8, 20])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="items in a batch")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 4.0, 10.0], help="length of the signals")
    parser.add_argument("--quick", action="store_true", help="a small grid: " + str(QUICK))
    parser.add_argument("--sample_rate", type=int, default=8000, help="Hz")
    parser.add_argument("--layerwise_speakers", type=int, nargs="*", default=[2, 3], help="none: no second table")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the layer-wise loss")
    parser.add_argument("--repeats", type=int, default=25, help="timed runs of each, interleaved, at most")
    parser.add_argument("--point_seconds", type=float, default=2.0, help="for the repeats of a point; 3 in any case")
    parser.add_argument("--budget", type=float, default=2.5, help="seconds of one call; slower peers are left out")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, steadier on a shared machine"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on stderr when it starts and stops
    if args.quick:
        vars(args).update(QUICK)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # asteroid's Hungarian algorithm, on each call

    peers = {}
    for name, build in PEERS.items():
        peers[name] = "not installed"
        with contextlib.suppress(ImportError):
            peers[name] = build()

    rates = copy_bandwidth(args.device, CLOCKS[args.clock])
    points = measure_grid(peers, args)
    rates += copy_bandwidth(args.device, CLOCKS[args.clock])
    bandwidth = statistics.median(rates)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {args.threads} thread(s)"
    print(
        f"torch {torch.__version__}, {device}, {args.sample_rate} Hz, {args.clock} time, medians; a copy moves "
        f"{bandwidth / 1e9:.1f} GB/s (the {len(rates)} copies: {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f})\n"
    )
    print_grid(points, bandwidth)
    if args.layerwise_speakers:
        rows = measure_layerwise(peers["SpeechBrain"], args)
        print(f"\nLayer-wise loss, {args.blocks} blocks, batch 8, 4 s ('ours' is independent, as the loops are), ms:\n")
        print_layerwise(rows)


if __name__ == "__main__":
    main()
