"""The memory bank of dynamic sample dropout: each training sample's best assignment, across epochs and ranks.

Samples are addressed by their row, the position of their id in the sorted manifest, which travels with the
batch; of the ids themselves only eight-byte digests are kept, to recognise other data. About 30 bytes a sample.
"""

import hashlib
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks

from dsd_modules.sample_dropout import DROP, REORDER, Entries, decide, record
from shared_modules.distributed import all_reduce, get_rank, world_size

# "cascade" is PIT, then fixed assignments, then PIT again; the others are the rule's.
POLICIES = ("none", "drop", "reorder", "cascade")


@dataclass
class EpochCounts:
    """What happened to the samples in one epoch."""

    visits: int = 0
    uncounted: int = 0  # visits with a silent source or a non-finite metric
    revisits: int = 0  # counted visits of samples that had been seen before
    label_switches: int = 0
    dropped_samples: int = 0
    reordered_samples: int = 0
    readmitted_samples: int = 0
    all_dropped_batches: int = 0

    @property
    def label_switch_rate(self):
        """Label switches per revisit; 0 before there is any."""
        return self.label_switches / self.revisits if self.revisits else 0.0

    @property
    def excluded_rate(self):
        """Dropped or reordered samples per visit."""
        return (self.dropped_samples + self.reordered_samples) / self.visits if self.visits else 0.0


def _digest(sample_id):
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little", signed=True)


@register_checkpoint_hooks
class AssignmentMemoryBank:
    """Remembers each sample's best metric and assignment, and applies the DSD rule to every visit.

    Built empty from the YAML; :meth:`set_samples` gives it the ids once the data are there. All state is on the
    CPU, is saved with SpeechBrain's Checkpointer, and is merged over ranks by :meth:`synchronize`.

    Arguments
    ---------
    num_spks : int
        Number of speakers, N.
    mode : str
        ``none`` (plain PIT, still counted), ``drop``, ``reorder``, or ``cascade``: interrupted and cascaded PIT
        (Yang et al. 2019), which records the assignments for ``cascade_pit_epochs`` epochs of PIT, trains from the
        initial weights again under each sample's recorded assignment for ``cascade_fixed_epochs``, and goes on
        with PIT. What is recorded is the assignment of the sample's best visit.
    margin_db : float
        How much worse than its best a sample must be to be excluded, dB, at least 0.
    start_epoch : int
        First epoch (from 1) in which samples may be excluded; the bank records from the first on.
    max_drop_rate : float
        An epoch excludes at most floor(rate x samples), first come, per rank; 1: no cap.
    patience : int
        After this many exclusions in a row a sample is re-admitted and its entry renewed; 0: never.
    cascade_pit_epochs, cascade_fixed_epochs : int
        Of the first two stages of ``cascade``; the other modes do not look at them.

    Raises
    ------
    ValueError
        If an option is out of range.

    Example
    -------
    >>> bank = AssignmentMemoryBank(num_spks=2, mode="drop")
    >>> bank.set_samples(["mix_a", "mix_b"])
    >>> bank.start_epoch(1)
    >>> rows = torch.tensor([0, 1])
    >>> bank.update(rows, torch.tensor([[0, 1], [0, 1]]), torch.tensor([8.0, 3.0])).keep
    tensor([True, True])
    >>> bank.start_epoch(2)
    >>> bank.update(rows, torch.tensor([[1, 0], [1, 0]]), torch.tensor([7.0, 4.0])).keep
    tensor([False,  True])
    >>> bank.counts.label_switches, bank.counts.dropped_samples
    (2, 1)
    """

    def __init__(
        self,
        num_spks,
        mode="drop",
        margin_db=0.0,
        start_epoch=1,
        max_drop_rate=1.0,
        patience=0,
        cascade_pit_epochs=1,
        cascade_fixed_epochs=1,
    ):
        for name, value, is_right, expected in (
            ("num_spks", num_spks, 1 <= num_spks <= 127, "between 1 and 127"),
            ("mode", mode, mode in POLICIES, f"one of {', '.join(POLICIES)}"),
            ("margin_db", margin_db, margin_db >= 0, "at least 0"),
            ("start_epoch", start_epoch, start_epoch >= 1, "at least 1"),
            ("max_drop_rate", max_drop_rate, 0 <= max_drop_rate <= 1, "between 0 and 1"),
            ("patience", patience, patience >= 0, "at least 0"),
            ("cascade_pit_epochs", cascade_pit_epochs, cascade_pit_epochs >= 1, "at least 1"),
            ("cascade_fixed_epochs", cascade_fixed_epochs, cascade_fixed_epochs >= 1, "at least 1"),
        ):
            if not is_right:
                raise ValueError(f"{name} must be {expected}, but got {value!r}.")
        self.num_spks = num_spks
        self.mode = mode
        self.margin_db = margin_db
        self.first_epoch = start_epoch
        self.max_drop_rate = max_drop_rate
        self.patience = patience
        self.cascade_epochs = (cascade_pit_epochs, cascade_fixed_epochs)
        self.epoch = 0
        self.counts = EpochCounts()
        self._sample_ids = None
        self._rank_counts = None  # of all ranks, at the last merge
        self._allocate(torch.empty(0, dtype=torch.int64))

    def _allocate(self, digests):
        num_samples = len(digests)
        self._digests = digests
        self._is_touched = torch.zeros(num_samples, dtype=torch.bool)  # visited since the last merge
        self._entries = Entries(
            best_metric=torch.zeros(num_samples),
            best_perm=torch.zeros(num_samples, self.num_spks, dtype=torch.int8),
            last_perm=torch.zeros(num_samples, self.num_spks, dtype=torch.int8),
            num_visits=torch.zeros(num_samples, dtype=torch.int32),
            num_exclusions=torch.zeros(num_samples, dtype=torch.int32),
            exclusion_run=torch.zeros(num_samples, dtype=torch.int32),
        )

    def __len__(self):
        return len(self._digests)

    def set_samples(self, sample_ids):
        """Give the bank its samples; row ``r`` is ``sample_ids[r]``.

        Arguments
        ---------
        sample_ids : sequence of str
            Unique ids in manifest order. Only a reference is kept.

        Raises
        ------
        ValueError
            If an id stands twice, or the bank holds other samples already.
        """
        # One by one: a list of ten million integers takes 400 MB.
        digests = torch.from_numpy(np.fromiter(map(_digest, sample_ids), np.int64, len(sample_ids)))
        order = digests.sort(stable=True)
        twins = (order.values[1:] == order.values[:-1]).nonzero().flatten()
        if len(twins):
            twin = sample_ids[int(order.indices[int(twins[0]) + 1])]
            raise ValueError(f"Sample ids must be unique, but {twin!r} stands twice.")
        if len(self):
            self._refuse_other_samples(self._digests, digests, sample_ids)
        else:
            self._allocate(digests)
        self._sample_ids = sample_ids

    @staticmethod
    def _refuse_other_samples(stored, current, sample_ids):
        if torch.equal(stored, current):
            return
        num_common = min(len(stored), len(current))
        differing = (stored[:num_common] != current[:num_common]).nonzero().flatten()
        row = int(differing[0]) if len(differing) else num_common
        first = repr(sample_ids[row]) if row < len(current) else "beyond the last sample"
        num_differing = len(differing) + abs(len(stored) - len(current))
        raise ValueError(
            f"The memory bank was recorded on other training data: {num_differing} of {len(stored)} stored sample "
            f"ids differ from the {len(current)} current ones, the first in row {row} ({first}). "
            "Train on the same data, or into a new output_folder."
        )

    def _check_rows(self, rows):
        rows = rows.tolist()
        if rows and not 0 <= min(rows) <= max(rows) < len(self):
            raise IndexError(f"Rows must be below {len(self)}, but got {rows}.")
        if len(set(rows)) != len(rows):
            raise ValueError(f"A batch holds each sample once, but got the rows {rows}.")

    def lookup(self, rows):
        """The entries of some samples.

        Arguments
        ---------
        rows : torch.Tensor
            ``[B]``, int64.

        Returns
        -------
        Entries
            Copies.
        """
        rows = rows.cpu()
        self._check_rows(rows)
        entries = Entries(**{name: column.index_select(0, rows) for name, column in vars(self._entries).items()})
        entries.best_perm, entries.last_perm = entries.best_perm.long(), entries.last_perm.long()
        return entries

    @property
    def restart_epoch(self):
        """The first epoch that starts from the initial weights again; None where there is none."""
        return self.cascade_epochs[0] + 1 if self.mode == "cascade" else None

    @property
    def rule_mode(self):
        """The rule's mode in the current epoch."""
        if self.mode == "cascade":
            is_fixed = 0 <= self.epoch - self.restart_epoch < self.cascade_epochs[1]
            return "fixed" if is_fixed else "none"
        return self.mode if self.epoch >= self.first_epoch else "none"

    @property
    def quota(self):
        """How many exclusions are left in this epoch on this rank, or None for no limit."""
        if self.max_drop_rate >= 1:
            return None
        # The tolerance forgives floating point: 0.29 * 100 is 28.999999999999996.
        allowed = int(self.max_drop_rate * self._num_samples_per_rank() + 1e-9)
        return allowed - self.counts.dropped_samples - self.counts.reordered_samples

    def _num_samples_per_rank(self):
        return -(-len(self) // world_size())

    def update(self, rows, perm, metric, valid=None):
        """Decide about a batch of visits, and record them.

        Arguments
        ---------
        rows : torch.Tensor
            ``[B]``, int64, each sample once.
        perm : torch.Tensor
            PIT's assignment at the final block, ``[B, N]``.
        metric : torch.Tensor
            PIT's metric at the final block, mean over speakers, higher is better, dB, ``[B]``.
        valid : torch.Tensor, optional
            Boolean ``[B]``: False where a source of the crop is silent.

        Returns
        -------
        Decision
            On the CPU.
        """
        rows, perm, metric = rows.cpu(), perm.cpu(), metric.detach().float().cpu()
        valid = None if valid is None else valid.cpu()
        stored = self.lookup(rows)
        decision = decide(stored, perm, metric, self.rule_mode, self.margin_db, self.patience, self.quota, valid)
        entries = record(decision, perm, metric)
        for name, column in vars(self._entries).items():
            column.index_copy_(0, rows, getattr(entries, name).to(column.dtype))
        self._is_touched.index_copy_(0, rows, self._is_touched.index_select(0, rows) | decision.is_counted)
        self._count(decision)
        return decision

    def _count(self, decision):
        # Lists: for the few samples of a batch, faster than operations on tensors.
        action, is_counted = decision.action.tolist(), decision.is_counted.tolist()
        num_earlier_visits = decision.stored.num_visits.tolist()
        counts = self.counts
        counts.visits += len(action)
        counts.uncounted += is_counted.count(False)
        counts.revisits += sum(num > 0 for num, counted in zip(num_earlier_visits, is_counted, strict=True) if counted)
        counts.label_switches += sum(decision.is_switched.tolist())
        counts.dropped_samples += action.count(DROP)
        counts.reordered_samples += action.count(REORDER)
        counts.readmitted_samples += sum(decision.is_readmitted.tolist())
        counts.all_dropped_batches += int(0 < len(action) == action.count(DROP))

    def start_epoch(self, epoch):
        """Begin an epoch with counts of zero; going on inside the same epoch, after a resume, keeps them."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.counts = EpochCounts()

    def end_epoch(self):
        """Merge over the ranks.

        Returns
        -------
        EpochCounts
            Summed over the ranks.
        """
        self.synchronize()
        return EpochCounts(*self._rank_counts.sum(0).tolist())

    def _gather_counts(self):
        """The counts of every rank, ``[world_size, fields]``."""
        table = torch.zeros(world_size(), len(fields(EpochCounts)), dtype=torch.int64)
        table[get_rank()] = torch.tensor(list(asdict(self.counts).values()))
        return all_reduce(table, "SUM")

    def synchronize(self):
        """Give every rank the entries that any rank has updated. All ranks must call it; one alone does nothing.

        Where several ranks visited the same sample since the last merge (a sampler that repeats samples), the
        lowest rank's entry stands.
        """
        num_ranks, rank = world_size(), get_rank()
        if num_ranks > 1:
            owner = torch.where(self._is_touched, rank, num_ranks).to(torch.int32)
            owner = all_reduce(owner, "MIN")
            for field in fields(Entries):
                column = getattr(self._entries, field.name)
                shape = (-1,) + (1,) * (column.dim() - 1)
                mine = torch.where((owner == rank).view(shape), column, torch.zeros_like(column))
                merged = all_reduce(mine, "SUM")
                column.copy_(torch.where((owner < num_ranks).view(shape), merged, column))
        self._is_touched.zero_()
        self._rank_counts = self._gather_counts()

    @mark_as_saver
    def save(self, path):
        """Save the entries; :meth:`synchronize` goes before."""
        state = {field.name: getattr(self._entries, field.name) for field in fields(Entries)}
        if world_size() > 1 and self._rank_counts is None:
            raise RuntimeError("With several ranks, synchronize() must be called on all of them before save().")
        rank_counts = self._rank_counts if world_size() > 1 else self._gather_counts()
        torch.save({"digests": self._digests, "epoch": self.epoch, "rank_counts": rank_counts, **state}, path)

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Load the entries, and refuse those of other data.

        Raises
        ------
        ValueError
            If the checkpoint's ids differ from those given by :meth:`set_samples`, or its number of speakers.
        """
        del end_of_epoch
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["best_perm"].shape[1] != self.num_spks:
            raise ValueError(
                f"The memory bank was recorded with {state['best_perm'].shape[1]} speakers, "
                f"but num_spks is {self.num_spks}."
            )
        if self._sample_ids is not None:
            self._refuse_other_samples(state["digests"], self._digests, self._sample_ids)
        self._allocate(state["digests"])
        self._entries = Entries(**{field.name: state[field.name] for field in fields(Entries)})
        self.epoch = state["epoch"]
        rank_counts = state["rank_counts"]
        if len(rank_counts) != world_size():  # another number of ranks: the first one takes over the counts
            others = rank_counts.new_zeros(world_size() - 1, rank_counts.shape[1])
            rank_counts = torch.cat([rank_counts.sum(0, keepdim=True), others])
        self.counts = EpochCounts(*rank_counts[get_rank()].tolist())
