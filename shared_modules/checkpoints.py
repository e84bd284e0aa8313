"""Checkpoints that survive a kill at any moment, and recoverables for what SpeechBrain leaves out."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.checkpoints import (
    Checkpointer,
    ckpt_recency,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
    torch_recovery,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from shared_modules.distributed import all_gather, get_rank
from shared_modules.errors import RunError
from shared_modules.files import flush_to_disk

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"


class WholeCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, but a checkpoint is whole or not there.

    SpeechBrain writes into the final folder, meta file first, so a kill while saving (or while deleting) leaves a
    broken checkpoint that recovery picks and fails on. Here it is written under a name that the finder ignores,
    flushed to the disk, then renamed; a deletion renames first. Recoverables with a ``synchronize`` method are
    merged over the ranks before.
    """

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO):
        """See :meth:`Checkpointer.save_checkpoint`."""
        for recoverable in self.recoverables.values():
            if hasattr(recoverable, "synchronize"):
                recoverable.synchronize()
        if if_main_process():
            for leftover in self.checkpoints_dir.glob(f"{_UNFINISHED}*"):  # of a killed run
                shutil.rmtree(leftover)
        final = self._new_checkpoint_dirpath() if name is None else self._custom_checkpoint_dirpath(name)
        try:
            checkpoint = super().save_checkpoint(
                meta or {}, end_of_epoch, name=f"{_UNFINISHED}{final.name}", verbosity=logging.DEBUG
            )
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            reason = str(error).splitlines()[0]
            raise RunError(
                f"No checkpoint can be written to {self.checkpoints_dir}; is the disk full? ({reason})"
            ) from error
        if checkpoint is not None:  # the main process
            for path in [*checkpoint.path.iterdir(), checkpoint.path]:
                flush_to_disk(path)
            os.rename(checkpoint.path, final)
            flush_to_disk(self.checkpoints_dir)
            files = {name: final / path.name for name, path in checkpoint.paramfiles.items()}
            checkpoint = checkpoint._replace(path=final, paramfiles=files)
            logger.log(verbosity, f"Saved a checkpoint in {final}")
        ddp_barrier()
        return checkpoint

    def _new_checkpoint_dirpath(self):
        """A name after all that are there, in which they can be ordered too.

        SpeechBrain counts the checkpoints of one second, and gives the number of a deleted one again.
        """
        stem, _, number = Checkpointer._new_checkpoint_dirpath(self).name.rpartition("+")
        taken = [int(path.name.rpartition("+")[2]) for path in self.checkpoints_dir.glob(f"{stem}+*")]
        return self.checkpoints_dir / f"{stem}+{max([int(number) - 1, *taken]) + 1:02d}"

    def _custom_checkpoint_dirpath(self, name):
        if name.startswith(_UNFINISHED):
            return self.checkpoints_dir / name
        return Checkpointer._custom_checkpoint_dirpath(self, name)

    def delete_checkpoints(
        self,
        *,
        num_to_keep=1,
        min_keys=(),
        max_keys=(),
        importance_keys=(ckpt_recency,),
        ckpt_predicate=None,
        verbosity=logging.INFO,
    ):
        """See :meth:`Checkpointer.delete_checkpoints`, which deletes in place."""
        keys = [{"min_key": key} for key in min_keys] + [{"max_key": key} for key in max_keys]
        keys += [{"importance_key": key} for key in importance_keys]
        found = [self.find_checkpoints(**key, ckpt_predicate=ckpt_predicate) for key in keys]  # the best first
        doomed = {ckpt.path for ckpts in found for ckpt in ckpts}
        doomed -= {ckpt.path for ckpts in found for ckpt in ckpts[:num_to_keep]}
        ddp_barrier()
        for path in sorted(doomed) if if_main_process() else []:
            hidden = path.with_name(f"{_UNFINISHED}{path.name}")
            os.rename(path, hidden)
            shutil.rmtree(hidden)
            logger.log(verbosity, f"Deleted the checkpoint in {path}")
        ddp_barrier()

    def load_checkpoint(self, checkpoint):
        """See :meth:`Checkpointer.load_checkpoint`; a damaged file is named."""
        try:
            super().load_checkpoint(checkpoint)
        except Exception as error:  # a damaged file can fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(
                f"The checkpoint {checkpoint.path} cannot be loaded ({reason}). If it is damaged, remove that folder "
                "to go on from the one before."
            ) from error

    def check_recoverable(self, name):
        """Load one recoverable of the newest checkpoint, to see early whether it fits.

        Arguments
        ---------
        name : str
            Its name.

        Raises
        ------
        ValueError
            What its loader raises.
        """
        checkpoint = self.find_checkpoint()
        if checkpoint is not None:
            self.recoverables[name].load(_paramfile(checkpoint, name))

    def load_only(self, names, max_key=None):
        """Load some recoverables of the best checkpoint, and nothing else of it.

        ``recover_if_possible`` would also set the epoch, the bank and the logs back to that checkpoint.

        Arguments
        ---------
        names : sequence of str
            The recoverables to load.
        max_key : str, optional
            The key of the checkpoints' meta data that tells the best; None: the newest.

        Returns
        -------
        Checkpoint or None
            None where there is no checkpoint.
        """
        checkpoint = self.find_checkpoint(max_key=max_key)
        for name in names if checkpoint is not None else ():
            recoverable, path = self.recoverables[name], _paramfile(checkpoint, name)
            if isinstance(recoverable, torch.nn.Module):
                torch_recovery(recoverable, path, end_of_epoch=True)
            else:
                recoverable.load(path)
        return checkpoint


def _paramfile(checkpoint, name):
    if name not in checkpoint.paramfiles:
        raise RunError(f"The checkpoint {checkpoint.path} is not of this recipe: it holds no {name}.")
    return checkpoint.paramfiles[name]


@register_checkpoint_hooks
class AppendedFiles:
    """Files that grow during training. A resume cuts them to the length they had at the checkpoint.

    Arguments
    ---------
    paths : list of str
        The files, which need not exist.
    """

    def __init__(self, paths):
        self.paths = [Path(path) for path in paths]

    def rewind(self, sizes=None):
        """Cut each file to its size in bytes (by file name), or remove it where none is given."""
        if not if_main_process():
            return
        for path in self.paths:
            size = (sizes or {}).get(path.name, 0)
            if size == 0:
                path.unlink(missing_ok=True)
            elif path.exists() and path.stat().st_size > size:
                os.truncate(path, size)

    @mark_as_saver
    def save(self, path):
        """Note the files' sizes."""
        sizes = {file.name: file.stat().st_size for file in self.paths if file.exists()}
        Path(path).write_text(json.dumps(sizes), encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Cut the files to the noted sizes."""
        del end_of_epoch
        self.rewind(json.loads(Path(path).read_text(encoding="utf-8")))


@register_checkpoint_hooks
class RandomState:
    """The state of the random number generators (dropout and the like), of every rank."""

    def __init__(self):
        self._ranks = None  # of all ranks, at the last merge

    def synchronize(self):
        """Collect the states of all ranks. All ranks must call it."""
        self._ranks = all_gather(_random_state())

    @mark_as_saver
    def save(self, path):
        """Save the states; :meth:`synchronize` goes before."""
        torch.save(self._ranks, path)

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Restore this rank's state, where the run that saved had such a rank."""
        del end_of_epoch
        ranks = torch.load(path, map_location="cpu", weights_only=True)
        if get_rank() < len(ranks):
            _restore_random_state(ranks[get_rank()])


def _random_state():
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002 (what others draw from)
    return {
        "python": random.getstate(),
        "numpy": (numpy_name, numpy_keys.tolist(), *numpy_rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
