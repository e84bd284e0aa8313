"""How a run ends when something is wrong that its user can mend: one sentence, no traceback."""

import errno
import functools
import os
import sys
import time
from contextlib import contextmanager

_SECONDS_FOR_THE_MAIN_RANK = 5


class RunError(Exception):
    """A run cannot go on, for a reason that its user can mend."""


class DataError(RunError, ValueError):
    """A mixture cannot be read, or holds what it may not: found while training or evaluating."""

    def __str__(self):
        # A DataLoader worker's error comes with the worker's traceback before it.
        text = super().__str__().strip()
        return text.splitlines()[-1].split(f"{type(self).__name__}: ")[-1] if text else text


@contextmanager
def mistakes_as_run_errors():
    """While options and data are looked at, a ValueError is the user's mistake, not a bug."""
    try:
        yield
    except ValueError as error:
        raise RunError(str(error)) from None


def let_the_main_rank_speak_first(rank):
    """Wait some seconds, on another rank than the main one.

    If it is every rank's mistake, the main one says it, and torchrun ends the others meanwhile.
    """
    if str(rank) != "0":
        time.sleep(_SECONDS_FOR_THE_MAIN_RANK)


def error_line(fault, rank):
    """What is said of a fault, with the number of another rank than the main one.

    Example
    -------
    >>> error_line("The disk is full.", 0), error_line("The disk is full.", 3)
    ('error: The disk is full.', 'error (rank 3): The disk is full.')
    """
    return f"error: {fault}" if str(rank) == "0" else f"error (rank {rank}): {fault}"


def ends_in_one_sentence(main=None, *, interrupted="interrupted: the same command goes on from the last checkpoint"):
    """Decorate a command's main function: what its user can mend is said in one sentence, with exit code 1.

    ``@ends_in_one_sentence``, or ``@ends_in_one_sentence(interrupted="...")`` with the words for Ctrl-C, which ends
    with exit code 130.
    """
    if main is None:
        return functools.partial(ends_in_one_sentence, interrupted=interrupted)

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except RunError as error:
            fault = str(error)
        except OSError as error:
            place = error.filename
            if place is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                place = "what the run writes"
            if place is None or error.strerror is None:
                raise
            fault = f"{place}: {error.strerror}"
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)
            sys.exit(130)
        rank = os.environ.get("RANK", "0")
        let_the_main_rank_speak_first(rank)
        sys.exit(error_line(fault, rank))

    return wrapped
