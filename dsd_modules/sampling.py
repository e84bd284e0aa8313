"""Which mixtures a step trains on and a batch evaluates, on any number of ranks. No mixture is repeated."""

import json
from pathlib import Path

import numpy as np
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from torch.utils.data import Sampler


@register_checkpoint_hooks
class TrainingBatches(Sampler):
    """The training batches of one rank, as lists of ``(epoch, row, weight)``.

    An epoch has an order of its own, drawn from (seed, epoch). A step takes the next ``batch_size * accumulation *
    num_ranks`` mixtures of it, whatever they are split into; the epoch's last step takes what is left, in equal parts.
    A rank or an accumulated batch that runs short joins the step with one mixture of weight 0.

    ``weight`` is the mixture's in the loss. It is ``1 / B`` for one rank without accumulation; in general it
    undoes that Brain divides the loss by ``accumulation`` and that DDP averages over the ranks, so that the gradient is
    that of the mean over all mixtures of the step.

    How far the epoch has come is counted in mixtures, and is a recoverable, so that a resume may have another number
    of ranks.

    Arguments
    ---------
    num_samples : int
        Mixtures of the training set.
    batch_size : int
        Mixtures per batch and rank.
    seed : int
        Of the order.
    accumulation : int
        Batches per step.
    rank, num_ranks : int
        This process, of so many.

    Example
    -------
    >>> batches = TrainingBatches(num_samples=5, batch_size=2, seed=1)
    >>> batches.set_epoch(1)
    >>> [[row for _, row, _ in batch] for batch in batches], [weight for _, _, weight in list(batches)[-1]]
    ([[1, 4], [0, 3], [2]], [1.0])
    >>> second = TrainingBatches(num_samples=5, batch_size=2, seed=1, rank=1, num_ranks=2)
    >>> second.set_epoch(1)
    >>> list(second)
    [[(1, 0, 0.5), (1, 3, 0.5)], [(1, 2, 0.0)]]
    """

    def __init__(self, num_samples, batch_size, seed, accumulation=1, rank=0, num_ranks=1):
        self.num_samples = num_samples
        self.seed = seed
        self.accumulation = accumulation
        self.rank = rank
        self.num_ranks = num_ranks
        self.step_size = batch_size * accumulation * num_ranks
        self.epoch = 0
        self.num_done = 0

    @property
    def epoch_share_done(self):
        """The share of the epoch's mixtures that has been trained on."""
        return self.num_done / self.num_samples

    def set_epoch(self, epoch):
        """Called by Brain at the start of each epoch; going on inside the same epoch keeps the place."""
        if epoch != self.epoch:
            self.epoch, self.num_done = epoch, 0

    def advance(self):
        """Note that a step is done."""
        self.num_done = min(self.num_done + self.step_size, self.num_samples)

    def __len__(self):
        return self.accumulation * -(-self.num_samples // self.step_size)

    def __iter__(self):
        rows = np.arange(self.num_samples)
        np.random.default_rng([self.seed, self.epoch]).shuffle(rows)
        num_parts = self.accumulation * self.num_ranks
        for start in range(self.num_done, self.num_samples, self.step_size):
            step = rows[start : start + self.step_size].tolist()
            weight = num_parts / len(step)
            part_size = -(-len(step) // num_parts)
            for part in range(self.rank, num_parts, self.num_ranks):
                batch = step[part * part_size : (part + 1) * part_size]
                yield [(self.epoch, row, weight) for row in batch] or [(self.epoch, step[0], 0.0)]

    @mark_as_saver
    def save(self, path):
        """Save the place in the epoch."""
        Path(path).write_text(json.dumps({"epoch": self.epoch, "num_done": self.num_done}), encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Go on from there."""
        del end_of_epoch
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        self.epoch, self.num_done = state["epoch"], state["num_done"]


class EvaluationBatches(Sampler):
    """The evaluation batches of one rank, as lists of rows: each rank takes every ``num_ranks``-th batch.

    What is in a batch does not depend on the number of ranks, and so neither do its scores.

    Arguments
    ---------
    num_samples, batch_size : int
        Mixtures of the set, and of a batch.
    rank, num_ranks : int
        This process, of so many.

    Example
    -------
    >>> list(EvaluationBatches(5, 2)), list(EvaluationBatches(5, 2, rank=1, num_ranks=2))
    ([[0, 1], [2, 3], [4]], [[2, 3]])
    """

    def __init__(self, num_samples, batch_size, rank=0, num_ranks=1):
        batches = [list(range(i, min(i + batch_size, num_samples))) for i in range(0, num_samples, batch_size)]
        self.batches = batches[rank::num_ranks]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)
