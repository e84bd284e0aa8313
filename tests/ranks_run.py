"""One process of a run, alone or with torchrun, in float64: ``ranks_run.py ARGUMENTS``.

Leaves its weights and the gradient of each step, as the optimizer finds it, in ``rank<i>.pt``.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "LibriMix" / "separation"))
import train

from dsd_modules.data.wavs import WavReader

fit, clip = train.Separation.fit, torch.nn.utils.clip_grad_norm_
read, read_source = WavReader.read, WavReader.read_source
steps = []


def weights_of(brain):
    return {n: {k: w.clone() for k, w in m.state_dict().items()} for n, m in brain.hparams.modules.items()}


def fit_and_keep(brain, *args, **kwargs):
    initial = weights_of(brain)
    fit(brain, *args, **kwargs)
    kept = {"initial": initial, "weights": weights_of(brain), "steps": steps}
    torch.save(kept, f"rank{os.environ.get('RANK', '0')}.pt")


def clip_and_keep(parameters, *args, **kwargs):
    parameters = list(parameters)
    steps.append([parameter.grad.clone() for parameter in parameters])
    return clip(parameters, *args, **kwargs)


train.Separation.fit = fit_and_keep
torch.nn.utils.clip_grad_norm_ = clip_and_keep
WavReader.read = lambda *args: read(*args).astype("float64")
WavReader.read_source = lambda *args: read_source(*args).astype("float64")
if __name__ == "__main__":  # processes that score PESQ and STOI import this file
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    train.main(sys.argv[1:])
    assert not torch.distributed.is_initialized()  # a rank that exits in the group may be aborted
