"""Time of SpeechBrain's Dual_Path_Model against DualPathMaskNet, side by side on the same weights.

Example: python benchmarks/bench_masknet.py --size published --seconds 2 --threads 1
"""

import argparse
import time

import torch
from speechbrain.lobes.models.dual_path import Dual_Path_Model, SBTransformerBlock

from dsd_modules.masknet import DualPathMaskNet

SIZES = {  # channels, layers of a transformer, heads, d_ffn, blocks, chunk length
    "small": (64, 2, 4, 128, 2, 100),
    "published": (256, 8, 8, 1024, 2, 250),
}


def build(size):
    """Both models, SpeechBrain's first."""
    channels, layers, heads, d_ffn, blocks, chunk = SIZES[size]

    def transformer():
        return SBTransformerBlock(
            layers, channels, heads, d_ffn, dropout=0, norm_before=True, use_positional_encoding=True
        )

    models = [
        model(
            channels,
            channels,
            transformer(),
            transformer(),
            num_layers=blocks,
            K=chunk,
            linear_layer_after_inter_intra=False,
        )
        for model in (Dual_Path_Model, DualPathMaskNet)
    ]
    models[1].load_state_dict(models[0].state_dict())
    return models


def seconds(function, device):
    """Wall clock of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name, functions, device, repeats):
    """Print the best time of each function; the calls alternate, so that both see the same load."""
    for function in functions:
        function()
    times = [[seconds(function, device) for function in functions] for _ in range(repeats)]
    theirs, *ours = (1000 * min(column) for column in zip(*times, strict=True))
    columns = "".join(f"{time:11.1f} ms, ratio {theirs / time:5.2f}" for time in ours)
    print(f"{name:24}{theirs:12.1f} ms{columns}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the mixture, at 8 kHz and stride 8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    theirs, ours = (model.to(device) for model in build(args.size))
    num_frames = int(args.seconds * 8000) // 8 - 1
    x = torch.randn(args.batch, SIZES[args.size][0], num_frames, device=device).relu()
    # Three quarters of a batch's frames on average, known on the CPU.
    lengths = torch.linspace(num_frames, num_frames / 2, args.batch).long() if args.batch > 1 else None

    def infer(model, **options):
        with torch.no_grad():
            model(x, **options)

    def train(model, **options):
        model.zero_grad()
        model(x, **options).square().mean().backward()

    print(f"{args.size}: {x.shape=}, {args.threads} threads, {device}, torch {torch.__version__}")
    titles = ["DualPathMaskNet"] + ["with lengths"] * (lengths is not None)
    print(f"{'':24}{'SpeechBrain':>15}" + "".join(f"{title:>26}" for title in titles))
    for name, step in (("forward", infer), ("forward and backward", train)):
        functions = [lambda step=step: step(theirs), lambda step=step: step(ours)]
        if lengths is not None:
            functions.append(lambda step=step: step(ours, lengths=lengths))
        compare(name, functions, device, args.repeats)
        if device.type == "cuda":
            for model, label in ((theirs, "SpeechBrain"), (ours, "DualPathMaskNet")):
                torch.cuda.reset_peak_memory_stats()
                step(model)
                print(f"  peak memory {label}: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    with torch.no_grad():
        expected = theirs(x)
        print(f"largest difference / peak: {(ours(x) - expected).abs().max() / expected.abs().max():.1e}")


if __name__ == "__main__":
    main()
