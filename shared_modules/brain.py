"""What the Brains of the recipes share: records that begin with the run or with its checkpoint, and divergence."""

import speechbrain as sb

from shared_modules.errors import RunError


class RecordedBrain(sb.Brain):
    """A Brain whose records go on from its checkpoint, and whose user is told of a divergence in one sentence.

    The hparams hold ``lr``, ``epoch_counter`` and ``tensorboard_logger``, the latter to be called with ``first_epoch``.
    """

    def on_fit_start(self):
        """Recover the last checkpoint; drop the records of what comes after it."""
        if self.checkpointer is not None and self.checkpointer.find_checkpoint() is None:
            for recoverable in self.checkpointer.recoverables.values():
                if hasattr(recoverable, "rewind"):
                    recoverable.rewind()
        super().on_fit_start()
        self.tensorboard = self.hparams.tensorboard_logger(first_epoch=self.hparams.epoch_counter.current + 1)

    def check_loss_isfinite(self, loss):
        """SpeechBrain's check, with a sentence for the user."""
        try:
            super().check_loss_isfinite(loss)
        except ValueError:
            raise RunError(
                f"The loss of {self.nonfinite_count} batches of this epoch was not finite: the training diverged. "
                f"Lower --lr (now {self.hparams.lr})."
            ) from None
