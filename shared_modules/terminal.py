"""What the command lines share."""

import argparse
import contextlib
import sys


def printable(text):
    """One line that any terminal takes, whatever bytes a file's name is made of.

    Example
    -------
    >>> printable("one\\ntwo")
    'one\\\\ntwo'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def leave(*_):
    """A signal handler: end as an exception does, so that nothing half done is left."""
    sys.exit(143)


def positive(text):
    """An argument's type: a whole number from 1.

    Example
    -------
    >>> positive("3")
    3
    """
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"can only be a whole number from 1, but got {text!r}")
