"""Runs the recipe and kills itself, without warning, at a chosen moment: ``killed_run.py MOMENT NUMBER ARGUMENTS``.

``step N`` is in the middle of the N-th training step, ``save N`` in the middle of writing the N-th checkpoint,
``delete N`` in the middle of deleting one, ``log N`` between the N-th epoch's log line and its checkpoint.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "LibriMix" / "separation"))
import train

from shared_modules import checkpoints, tracking

moment, number, *arguments = sys.argv[1:]
calls = 0


def kill_at(function):
    """The function, but its N-th call is the process's last."""

    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


if moment == "step":
    train.Separation.compute_objectives = kill_at(train.Separation.compute_objectives)
elif moment == "save":  # one of its files is written, others are not
    checkpoints.RandomState.save = kill_at(checkpoints.RandomState.save)
    checkpoints.RandomState.save._speechbrain_saver = True
    checkpoints.register_checkpoint_hooks(checkpoints.RandomState)
elif moment == "delete":  # its meta file is gone, others are not
    rmtree = shutil.rmtree

    def kill_within(path, *args, **kwargs):
        (Path(path) / "CKPT.yaml").unlink(missing_ok=True)
        kill_at(rmtree)(path, *args, **kwargs)

    shutil.rmtree = kill_within
elif moment == "log":
    tracking.History.append = kill_at(tracking.History.append)
torch.set_num_threads(1)
train.main(arguments)
assert not torch.distributed.is_initialized()  # a rank that exits in the group may be aborted
