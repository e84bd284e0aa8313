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

fit, clip, read = train.Separation.fit, torch.nn.utils.clip_grad_norm_, WavReader.read
steps = []


def fit_and_keep(brain, *args, **kwargs):
    fit(brain, *args, **kwargs)
    weights = {name: module.state_dict() for name, module in brain.hparams.modules.items()}
    torch.save({"weights": weights, "steps": steps}, f"rank{os.environ.get('RANK', '0')}.pt")


def clip_and_keep(parameters, *args, **kwargs):
    parameters = list(parameters)
    steps.append([parameter.grad.clone() for parameter in parameters])
    return clip(parameters, *args, **kwargs)


train.Separation.fit = fit_and_keep
torch.nn.utils.clip_grad_norm_ = clip_and_keep
WavReader.read = lambda *args: read(*args).astype("float64")
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
train.main(sys.argv[1:])
