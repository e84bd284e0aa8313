"""One rank of a run with torchrun, which leaves its weights in ``rank<i>.pt``: ``ranks_run.py ARGUMENTS``."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "LibriMix" / "separation"))
import train

fit = train.Separation.fit


def fit_and_keep(brain, *args, **kwargs):
    fit(brain, *args, **kwargs)
    torch.save(brain.modules.state_dict(), f"rank{os.environ['RANK']}.pt")


train.Separation.fit = fit_and_keep
torch.set_num_threads(1)
train.main(sys.argv[1:])
