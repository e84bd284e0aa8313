"""An exponential moving average of the weights, used for validation, test and export."""

import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@register_checkpoint_hooks
class WeightAverage:
    """PyTorch's exponential moving average of the weights after each step; with a decay of 0 there is none.

    Arguments
    ---------
    modules : dict
        The modules, whose weights are copied.
    decay : float
        What is kept of the average at each step, 0 up to (not with) 1.

    Raises
    ------
    ValueError
        If the decay is out of range.

    Example
    -------
    >>> modules = {"encoder": torch.nn.Linear(1, 1, bias=False)}
    >>> average = WeightAverage(modules, decay=0.75)
    >>> for weight in (1.0, 5.0):  # after two steps
    ...     _ = torch.nn.init.constant_(modules["encoder"].weight, weight)
    ...     average.update(modules)
    >>> average.averaged(modules)["encoder"].weight.item()
    2.0
    """

    def __init__(self, modules, decay):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 up to (not with) 1, but got {decay!r}.")
        self._model = None
        if decay > 0:
            modules = torch.nn.ModuleDict(modules)
            self._model = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()

    def to(self, device):
        """Move the average."""
        if self._model is not None:
            self._model.to(device)

    def update(self, modules):
        """Take a step's weights in; the first ones are copied."""
        if self._model is not None:
            self._model.update_parameters(torch.nn.ModuleDict(modules))

    def restart(self):
        """Forget what has been averaged."""
        if self._model is not None:
            self._model.n_averaged.zero_()

    def averaged(self, modules):
        """The averaged modules by name, or those given where nothing has been averaged."""
        has_steps = self._model is not None and int(self._model.n_averaged) > 0
        return dict(self._model.module) if has_steps else modules

    @mark_as_saver
    def save(self, path):
        """Save the average."""
        torch.save({} if self._model is None else self._model.state_dict(), path)

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Load the average; it starts anew where the run had none so far."""
        del end_of_epoch
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not state:
            self.restart()
        elif self._model is not None:
            self._model.load_state_dict(state)
