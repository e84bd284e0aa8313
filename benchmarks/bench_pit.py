"""PIT SI-SDR losses side by side, forward and backward: SpeechBrain, asteroid, torchmetrics, fast_bss_eval, ours.

    python benchmarks/bench_loss.py
    python benchmarks/bench_loss.py --speakers 2 3 --batch 4 --seconds 3 --device cuda

The repeats of all libraries are interleaved, so that a busy machine slows all of them; the table gives the median
in milliseconds and, in brackets, how many times ours. A second table compares the layer-wise loss with a loop of
SpeechBrain's loss over the blocks. A library that is not installed, or too slow at this size, is said to be so.
"""

import argparse
import contextlib
import statistics
import time

import torch

from dsd_modules.losses import PITLoss, layerwise_loss


def ours(est, ref):
    """PIT loss of this library."""
    return PITLoss()(est, ref).loss.mean()


def ours_layerwise(est, ref, layer_permutation="independent"):
    """Layer-wise PIT loss of this library."""
    return layerwise_loss(PITLoss()(est, ref), layer_permutation=layer_permutation).loss.mean()


def speechbrain_loss():
    """``get_si_snr_with_pitwrapper``, which takes ``[B, T, N]`` and the references first."""
    from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

    return lambda est, ref: get_si_snr_with_pitwrapper(ref.transpose(1, 2), est.transpose(1, 2)).mean()


def asteroid_loss():
    """``PITLossWrapper`` around the pairwise matrix."""
    from asteroid.losses.pit_wrapper import PITLossWrapper
    from asteroid.losses.sdr import PairwiseNegSDR

    return PITLossWrapper(PairwiseNegSDR("sisdr", zero_mean=True), pit_from="pw_mtx")


def torchmetrics_loss():
    """``permutation_invariant_training`` on SI-SDR."""
    from torchmetrics.functional.audio import (
        permutation_invariant_training,
        scale_invariant_signal_distortion_ratio,
    )

    def loss(est, ref):
        metric = scale_invariant_signal_distortion_ratio
        return -permutation_invariant_training(est, ref, metric, eval_func="max", zero_mean=True)[0].mean()

    return loss


def fast_bss_eval_loss():
    """``si_sdr_pit_loss``."""
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


def compare(losses, est, ref, repeats, budget_seconds, clock):
    """Median seconds of each loss, or the reason why there is none.

    Arguments
    ---------
    losses : dict
        Name to function of ``(est, ref)``, or to a string that says why it is missing.
    est, ref : torch.Tensor
        What the functions are given.
    repeats : int
        How often each is timed, in turn.
    budget_seconds : float
        A loss whose first call takes longer is timed no more.
    clock : function
        Gives seconds.

    Returns
    -------
    dict
        Name to seconds, or to a string.
    """
    results, times, values = {}, {}, {}
    for name, loss_function in losses.items():
        if isinstance(loss_function, str):
            results[name] = loss_function
            continue
        seconds, values[name] = run_once(loss_function, est, ref, clock)  # also warms up
        if seconds > budget_seconds:
            results[name] = f"{seconds:.1f} s, once"
        else:
            times[name] = []
    for _ in range(repeats):
        for name in times:
            times[name].append(run_once(losses[name], est, ref, clock)[0])
    results |= {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, value in values.items():
        if abs(value - values["ours"]) > 1e-2:
            results[name] = f"wrong: {value:.3f} dB"
    return {name: results[name] for name in losses}


def signals(num_spks, args, num_blocks=None):
    """Noisy, shuffled references as estimates, ``[(L,) B, N, T]``, and the references."""
    generator = torch.Generator().manual_seed(args.seed)
    num_samples = int(args.seconds * args.sample_rate)
    ref = torch.randn(args.batch, num_spks, num_samples, generator=generator)
    shape = ref.shape if num_blocks is None else (num_blocks, *ref.shape)
    est = ref.roll(1, dims=1) + torch.randn(shape, generator=generator)
    return est.to(args.device), ref.to(args.device)


def print_table(title, rows):
    """``rows``: label to results of :func:`compare`."""
    names = list(next(iter(rows.values())))
    print(f"\n{title}\n")
    print("| speakers | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for label, results in rows.items():
        base = results["ours"]
        cells = [
            value if isinstance(value, str) else f"{1e3 * value:.1f} ({value / base:.1f}x)"
            for value in results.values()
        ]
        print(f"| {label} | " + " | ".join(cells) + " |")


def main():
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speakers", type=int, nargs="+", default=[2, 3, 5, 8])
    parser.add_argument("--batch", type=int, default=8, help="items in a batch")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the signals")
    parser.add_argument("--sample_rate", type=int, default=8000, help="Hz")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the layer-wise loss")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each, interleaved")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds; slower ones run once")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, steadier on a shared machine"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]

    peers = {}
    for name, build in PEERS.items():
        peers[name] = "not installed"
        with contextlib.suppress(ImportError):
            peers[name] = build()

    rows, layerwise_rows = {}, {}
    for num_spks in args.speakers:
        losses = peers | {"ours": ours}
        if num_spks > MAX_SPEECHBRAIN_SPKS and not isinstance(peers["SpeechBrain"], str):
            losses["SpeechBrain"] = "too slow (all N! in Python)"
        rows[num_spks] = compare(losses, *signals(num_spks, args), args.repeats, args.budget, clock)

        def loop(est, ref, loss_function=losses["SpeechBrain"]):
            return sum(loss_function(block, ref) for block in est) / len(est)

        layerwise = {
            "SpeechBrain in a loop": losses["SpeechBrain"] if isinstance(losses["SpeechBrain"], str) else loop,
            "ours in a loop": lambda est, ref: sum(ours(block, ref) for block in est) / len(est),
            "ours, shared": lambda est, ref: ours_layerwise(est, ref, "shared"),
            "ours": ours_layerwise,
        }
        est, ref = signals(num_spks, args, args.blocks)
        layerwise_rows[num_spks] = compare(layerwise, est, ref, args.repeats, args.budget, clock)

    shape = f"batch {args.batch}, {args.seconds:g} s at {args.sample_rate} Hz, {args.device}"
    print(f"torch {torch.__version__}, {args.threads} thread(s), {shape}")
    print(f"median of {args.repeats} in ms of {args.clock} time (times ours)")
    print_table("PIT SI-SDR loss, forward and backward", rows)
    print_table(f"Layer-wise loss, {args.blocks} blocks ('ours' is independent, as the loops are)", layerwise_rows)


if __name__ == "__main__":
    main()
