"""How a run ends when something is wrong that its user can mend: one sentence, no traceback."""

import functools
import os
import sys
from contextlib import contextmanager

from speechbrain.utils.distributed import is_distributed_initialized


class RunError(Exception):
    """A run cannot go on, for a reason that its user can mend."""


@contextmanager
def mistakes_as_run_errors():
    """While options and data are looked at, a ValueError is the user's mistake, not a bug."""
    try:
        yield
    except ValueError as error:
        raise RunError(str(error)) from None


def ends_in_one_sentence(main):
    """Decorate a command's main function: what its user can mend is said in one sentence, with exit code 1."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except RunError as error:
            sentence = f"error: {error}"
        except OSError as error:
            if error.filename is None or error.strerror is None:
                raise
            sentence = f"error: {error.filename}: {error.strerror}"
        except KeyboardInterrupt:
            print("\ninterrupted: the same command goes on from the last checkpoint", file=sys.stderr)
            sys.exit(130)
        # Before the ranks work together all of them see the same mistake; then one may be alone with it.
        is_heard = os.environ.get("RANK", "0") == "0" or is_distributed_initialized()
        sys.exit(sentence if is_heard else 1)

    return wrapped
