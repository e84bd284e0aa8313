"""Where a model computes."""

import torch


def find_device(device):
    """A device, if this machine has it.

    Arguments
    ---------
    device : str or torch.device
        Such as ``cpu``, ``cuda`` or ``cuda:1``.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If this machine has none such, or it does not compute.

    Example
    -------
    >>> find_device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, ImportError, RuntimeError) as error:  # torch raises any of these
        reason = str(error).splitlines()[0].split(". ")[0]  # what follows may fill a page
        raise ValueError(f"device can only be one of this machine, but got {device!r}: {reason}") from None
    if found.type == "meta":
        raise ValueError("device can only be one that computes, but got 'meta'.")
    return found
