"""The rule of dynamic sample dropout (DSD): which samples of a batch to train on, and under which assignment.

Pure functions of tensors; the state they read lives in :mod:`dsd_modules.memory_bank`.
"""

from dataclasses import dataclass

import torch

KEEP, DROP, REORDER = 0, 1, 2
ACTIONS = ("keep", "drop", "reorder")
MODES = ("none", "drop", "reorder", "fixed")  # fixed: see decide


@dataclass
class Entries:
    """What the memory bank holds of some samples; each field ``[B]``, permutations ``[B, N]``."""

    best_metric: torch.Tensor  # dB, the best so far
    best_perm: torch.Tensor  # its assignment
    last_perm: torch.Tensor  # PIT's own assignment at the last visit
    num_visits: torch.Tensor
    num_exclusions: torch.Tensor
    exclusion_run: torch.Tensor  # exclusions in a row, up to the last visit


@dataclass
class Decision:
    """What to do with each sample of a batch; each tensor ``[B]``, permutations ``[B, N]``."""

    stored: Entries  # as they were before
    action: torch.Tensor  # KEEP, DROP or REORDER
    perm: torch.Tensor  # the assignment to train under
    is_renewed: torch.Tensor  # the entry becomes (metric, PIT's assignment)
    is_readmitted: torch.Tensor  # would be excluded, but its patience is used up
    is_switched: torch.Tensor  # PIT's assignment differs from the sample's own last one
    is_counted: torch.Tensor  # False: the visit leaves no trace

    @property
    def keep(self):
        """Whether the sample has a weight in the loss."""
        return self.action != DROP

    @property
    def is_excluded(self):
        """Dropped or reordered."""
        return self.action != KEEP


def decide(stored, perm, metric, mode="drop", margin_db=0.0, patience=0, quota=None, valid=None):
    """The DSD rule for one batch of visits (after Gao et al. 2023; the exact rule is this project's reading).

    ================================  ============================================================
    first visit                       train under ``perm``; store it
    metric > best                     train under ``perm``; store it, whatever the assignment
    metric <= best, same assignment   train under ``perm``
    metric <= best - margin, other    **exclude**: drop, or reorder (train under the stored one)
    otherwise                         train under ``perm``
    ================================  ============================================================

    In mode ``fixed`` (the middle stage of interrupted and cascaded PIT, Yang et al. 2019) the bank's assignments stand:
    a sample that has one trains under it, however good or bad, and none is stored anew.

    Arguments
    ---------
    stored : Entries
        The bank's entries of the batch's samples.
    perm : torch.Tensor
        PIT's assignment, ``[B, N]``.
    metric : torch.Tensor
        PIT's metric (higher is better), dB, ``[B]``.
    mode : str
        ``none``, ``drop``, ``reorder`` or ``fixed``.
    margin_db : float
        How much worse than the best a sample must be for its exclusion, dB.
    patience : int
        A sample excluded that many times in a row is re-admitted and its entry renewed; 0: never.
    quota : int, optional
        At most so many exclusions, first come first served; None: no limit.
    valid : torch.Tensor, optional
        Boolean ``[B]``; False where a source is silent. Such visits, and those whose metric is not finite, are
        trained under ``perm`` and leave no trace.

    Returns
    -------
    Decision

    Raises
    ------
    ValueError
        For an unknown mode.

    Example
    -------
    >>> stored = Entries(
    ...     best_metric=torch.tensor([8.0, 8.0]), best_perm=torch.tensor([[0, 1], [0, 1]]),
    ...     last_perm=torch.tensor([[0, 1], [0, 1]]), num_visits=torch.tensor([1, 1]),
    ...     num_exclusions=torch.tensor([0, 0]), exclusion_run=torch.tensor([0, 0]))
    >>> decide(stored, torch.tensor([[1, 0], [1, 0]]), torch.tensor([5.0, 9.0])).keep
    tensor([False,  True])
    """
    if mode not in MODES:
        raise ValueError(f"mode can only be one of {', '.join(MODES)}, but got {mode!r}.")
    is_counted = torch.isfinite(metric) if valid is None else torch.isfinite(metric) & valid
    is_seen = stored.num_visits > 0
    is_first, is_revisit = is_counted & ~is_seen, is_counted & is_seen
    never = torch.zeros_like(is_seen)
    is_better = is_revisit & (metric > stored.best_metric)
    is_switched = is_revisit & (perm != stored.last_perm).any(-1)

    differs = is_revisit & (perm != stored.best_perm).any(-1)
    if mode == "fixed":
        return Decision(
            stored=stored,
            action=torch.where(differs, REORDER, KEEP),
            perm=torch.where(differs.unsqueeze(-1), stored.best_perm, perm),
            is_renewed=is_first,
            is_readmitted=never,
            is_switched=is_switched,
            is_counted=is_counted,
        )

    is_excludable = never if mode == "none" else differs & ~is_better & (metric <= stored.best_metric - margin_db)
    is_readmitted = is_excludable & (stored.exclusion_run >= patience) if patience > 0 else never
    is_excluded = is_excludable & ~is_readmitted
    if quota is not None:
        is_excluded = is_excluded & (is_excluded.cumsum(0) <= quota)

    is_reordered = is_excluded if mode == "reorder" else never
    return Decision(
        stored=stored,
        action=torch.where(is_excluded, REORDER if mode == "reorder" else DROP, KEEP),
        perm=torch.where(is_reordered.unsqueeze(-1), stored.best_perm, perm),
        is_renewed=is_first | is_better | is_readmitted,
        is_readmitted=is_readmitted,
        is_switched=is_switched,
        is_counted=is_counted,
    )


def record(decision, perm, metric):
    """The entries after the visit.

    Arguments
    ---------
    decision : Decision
        What :func:`decide` said.
    perm : torch.Tensor
        PIT's assignment, ``[B, N]``.
    metric : torch.Tensor
        PIT's metric, dB, ``[B]``.

    Returns
    -------
    Entries
        New tensors; rows that are not counted are unchanged.

    Example
    -------
    >>> zeros = torch.zeros(1, dtype=torch.int64)
    >>> empty = Entries(torch.zeros(1), torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), zeros, zeros, zeros)
    >>> perm, metric = torch.tensor([[1, 0]]), torch.tensor([3.0])
    >>> record(decide(empty, perm, metric), perm, metric).best_perm
    tensor([[1, 0]])
    """
    stored = decision.stored
    renewed, counted, excluded = decision.is_renewed, decision.is_counted, decision.is_excluded
    return Entries(
        best_metric=torch.where(renewed, metric, stored.best_metric),
        best_perm=torch.where(renewed.unsqueeze(-1), perm, stored.best_perm),
        last_perm=torch.where(counted.unsqueeze(-1), perm, stored.last_perm),
        num_visits=stored.num_visits + counted,
        num_exclusions=stored.num_exclusions + excluded,
        exclusion_run=torch.where(excluded, stored.exclusion_run + 1, stored.exclusion_run * ~counted),
    )
