"""Collectives over the ranks of a DDP run; with one process they do nothing. All ranks must call them."""

import sys

import torch
from speechbrain.utils.distributed import ddp_barrier, is_distributed_initialized


def world_size():
    """The number of ranks."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def get_rank():
    """This process's rank."""
    return torch.distributed.get_rank() if is_distributed_initialized() else 0


def run_on_main(function, *args):
    """Run a function on the main process while the others wait. Where it raises ValueError, none goes on."""
    fault = None
    if get_rank() == 0:
        try:
            function(*args)
        except ValueError as error:
            fault = error
    faults = all_gather(str(fault) if fault else None)
    if fault:
        raise fault
    if faults[0]:
        sys.exit(1)  # the main process says why


def all_reduce(tensor, operation):
    """Reduce a CPU tensor over the ranks (``SUM``, ``MIN``, ...); NCCL wants it on the GPU meanwhile."""
    if world_size() == 1:
        return tensor
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    moved = tensor.to(device, copy=True)
    torch.distributed.all_reduce(moved, getattr(torch.distributed.ReduceOp, operation))
    return moved.cpu()


def all_gather(thing):
    """Every rank's (picklable) thing, in a list."""
    if world_size() == 1:
        return [thing]
    ranks = [None] * world_size()
    torch.distributed.all_gather_object(ranks, thing)
    return ranks


def leave_group():
    """Leave the process group, at the end of a run that went well.

    A rank that exits in it may be aborted while Python shuts down: Gloo's threads still hold tensors then
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    if is_distributed_initialized():
        ddp_barrier()
        torch.distributed.destroy_process_group()
