"""The learning rate, by epoch or by step."""

from speechbrain.nnet.schedulers import ReduceLROnPlateau, update_learning_rate

SCHEDULES = ("plateau", "linear")


def linear_decay(progress, warmup=0.0):
    """The share of the peak learning rate: up linearly during the warm-up, then down linearly to zero.

    Arguments
    ---------
    progress : float
        Share of all optimizer steps that are done, 0 to 1.
    warmup : float
        Share of the steps that the warm-up takes.

    Returns
    -------
    float

    Example
    -------
    >>> linear_decay(0.05, warmup=0.1), linear_decay(0.75), linear_decay(1.0)
    (0.5, 0.25, 0.0)
    """
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1 - progress) / (1 - warmup))


class LearningRate(ReduceLROnPlateau):
    """One of two schedules, behind one interface.

    ``plateau`` is SpeechBrain's for SepFormer: after ``hold_epochs`` epochs the rate is halved whenever the validation
    loss has not improved for more than ``patience`` epochs. ``linear`` is a function of the step alone
    (:func:`linear_decay`), so that it is the same in every run that is compared.

    Arguments
    ---------
    schedule : str
        ``plateau`` or ``linear``.
    lr : float
        The peak rate.
    warmup : float
        ``linear``: share of all steps.
    patience, hold_epochs, lr_min, factor
        ``plateau``: see SpeechBrain's ``ReduceLROnPlateau`` (``hold_epochs`` is its ``dont_halve_until_epoch``).

    Raises
    ------
    ValueError
        For an unknown schedule.
    """

    def __init__(self, schedule, lr, warmup=0.0, patience=2, hold_epochs=5, lr_min=1e-8, factor=0.5):
        super().__init__(lr_min=lr_min, factor=factor, patience=patience, dont_halve_until_epoch=hold_epochs)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule can only be one of {', '.join(SCHEDULES)}, but got {schedule!r}.")
        self.schedule = schedule
        self.lr = lr
        self.warmup = warmup

    def on_step(self, optimizer, progress):
        """Set the rate of the coming optimizer step; ``progress`` is the share of all steps that are done."""
        if self.schedule == "linear":
            for group in optimizer.param_groups:  # SpeechBrain's update_learning_rate would log every step
                group["lr"] = self.lr * linear_decay(progress, self.warmup)

    def on_epoch(self, optimizer, epoch, valid_loss):
        """Set the rate of the coming epoch."""
        if self.schedule == "plateau":
            _, next_lr = self([optimizer], epoch, valid_loss)
            update_learning_rate(optimizer, next_lr)
