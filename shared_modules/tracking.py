"""What a run writes down: running means, the history of epochs, TensorBoard.

Everything here can be checkpointed, so that a resumed run leaves the records of an uninterrupted one.
"""

import json
import math
import time
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.train_logger import TrainLogger

from shared_modules.distributed import all_gather, get_rank
from shared_modules.files import write_table

_QUANTA_PER_UNIT = 2**32


@register_checkpoint_hooks
class EpochTracker:
    """Running means of named values over the samples of an epoch, and the values themselves where wanted.

    Values are rounded to whole multiples of 2^-32, whose sums are exact: the means do not depend on the order, and so
    not on the number of ranks.

    Example
    -------
    >>> tracker = EpochTracker()
    >>> tracker.start_epoch(1)
    >>> tracker.add("si_sdr", torch.tensor([1.0, 3.0, float("nan")]))
    >>> tracker.means()
    {'si_sdr': 2.0}
    """

    def __init__(self):
        self.epoch = None
        self.totals = {}
        self.values = {}

    def start_epoch(self, epoch):
        """Begin at zero; going on inside the same epoch, after a resume, keeps what is there."""
        if epoch != self.epoch:
            self.epoch, self.totals, self.values = epoch, {}, {}

    def add(self, name, values, keep_values=False):
        """Add one value per sample; NaN does not count.

        Arguments
        ---------
        name : str
            Of the mean.
        values : torch.Tensor
            ``[B]``.
        keep_values : bool
            Whether :attr:`values` shall hold them one by one, for a histogram.
        """
        values = values.detach().double().flatten()
        values = values[values.isfinite()]
        total, count = self.totals.get(name, (0, 0))
        quanta = (values * _QUANTA_PER_UNIT).round().long().sum()
        self.totals[name] = (total + int(quanta), count + len(values))
        if keep_values:
            self.values.setdefault(name, []).extend(values.tolist())

    def means(self):
        """The mean of each name; NaN where nothing counted."""
        return {
            name: total / count / _QUANTA_PER_UNIT if count else math.nan
            for name, (total, count) in self.totals.items()
        }

    def synchronize(self):
        """Collect all ranks' values on rank 0, and empty the others. All ranks must call it."""
        ranks = all_gather((self.totals, self.values))
        self.totals, self.values = {}, {}
        if get_rank() > 0:
            return
        for totals, values in ranks:
            for name, (total, count) in totals.items():
                old_total, old_count = self.totals.get(name, (0, 0))
                self.totals[name] = (old_total + total, old_count + count)
            for name, kept in values.items():
                self.values.setdefault(name, []).extend(kept)

    @mark_as_saver
    def save(self, path):
        """Save the sums."""
        state = {"epoch": self.epoch, "totals": self.totals, "values": self.values}
        Path(path).write_text(json.dumps(state), encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Restore the sums (on the main process, which saved those of all)."""
        del end_of_epoch
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        self.epoch = state["epoch"]
        self.totals = {name: tuple(total) for name, total in state["totals"].items()} if if_main_process() else {}
        self.values = state["values"] if if_main_process() else {}


@register_checkpoint_hooks
class History:
    """One row of numbers per epoch, kept in ``history.csv``.

    Arguments
    ---------
    path : str
        The csv, rewritten whole at every epoch.
    """

    def __init__(self, path):
        self.path = path
        self.rows = []

    def append(self, row):
        """Add an epoch's numbers and write the file."""
        self.rows.append(row)
        cells = [{key: "" if _is_missing(value) else value for key, value in row.items()} for row in self.rows]
        write_table(self.path, cells)

    @mark_as_saver
    def save(self, path):
        """Save the rows."""
        Path(path).write_text(json.dumps(self.rows), encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Restore the rows."""
        del end_of_epoch
        self.rows = json.loads(Path(path).read_text(encoding="utf-8"))


def _is_missing(value):
    return isinstance(value, float) and not math.isfinite(value)


def event_writer(save_dir, first_step):
    """TensorBoard's writer, whose events from a step on take the place of those that earlier processes wrote.

    Event files are read in the order of their names: the second of their start, then the process. A second that
    another file has already is waited for to end, so that a later process does not come to stand before an earlier one
    (as long as the clock does not go back).

    Arguments
    ---------
    save_dir : str
        Where the event files go.
    first_step : int
        The first step that will be written.

    Returns
    -------
    torch.utils.tensorboard.SummaryWriter
    """
    from torch.utils.tensorboard import SummaryWriter

    seconds = [path.name.split(".")[3] for path in Path(save_dir).glob("events.out.tfevents.*")]
    while f"{int(time.time()):010d}" in seconds:
        time.sleep(0.05)
    return SummaryWriter(save_dir, purge_step=first_step)


class TensorboardLogger(TrainLogger):
    """Writes each epoch's numbers at the step of its epoch, also after a resume.

    SpeechBrain's own logger counts its calls and starts at one again. Events of epochs that are about to be
    repeated are purged.

    Arguments
    ---------
    save_dir : str
        Where the event files go.
    first_epoch : int
        The first epoch that this process will write.
    """

    def __init__(self, save_dir, first_epoch=1):
        self.writer = event_writer(save_dir, first_epoch) if if_main_process() else None

    def log_stats(self, stats_meta, train_stats=None, valid_stats=None, test_stats=None, verbose=False):
        """Write scalars; ``stats_meta`` holds the ``epoch``. Missing numbers (NaN) are left out."""
        del verbose
        if self.writer is None:
            return
        epoch = stats_meta["epoch"]
        for name, value in stats_meta.items():
            if name != "epoch" and not _is_missing(value):
                self.writer.add_scalar(name, value, epoch)
        for dataset, stats in (("train", train_stats), ("valid", valid_stats), ("test", test_stats)):
            for name, value in (stats or {}).items():
                if not _is_missing(value):
                    self.writer.add_scalar(f"{name}/{dataset}", value, epoch)
        self.writer.flush()

    def log_histogram(self, name, values, epoch):
        """Write the distribution of some values."""
        if self.writer is not None and len(values):
            self.writer.add_histogram(name, torch.tensor(values), epoch)
            self.writer.flush()
