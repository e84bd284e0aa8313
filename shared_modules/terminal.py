"""What the command lines share."""

import argparse
import contextlib
import sys

from tqdm import tqdm


def printable(text):
    """One line that any terminal takes, whatever bytes a file's name is made of.

    Example
    -------
    >>> printable("one\\ntwo")
    'one\\\\ntwo'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def write_line(text, file=None):
    """Write a line, above the progress bars and in one piece: processes that share the stream do not mix theirs.

    ``print`` writes the end of the line by itself where Python does not buffer (``PYTHONUNBUFFERED``).

    Arguments
    ---------
    text : str
    file : io.TextIOBase, optional
        None: standard output.

    Example
    -------
    >>> write_line("meeting.wav  12.0 s")
    meeting.wav  12.0 s
    """
    file = sys.stdout if file is None else file
    with tqdm.external_write_mode(file=file):
        file.write(f"{text}\n")
        file.flush()


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


class SecondsBar(tqdm):
    """A progress bar over the seconds of a recording.

    Arguments
    ---------
    description : str
    **options
        Others of tqdm's.

    Example
    -------
    >>> with SecondsBar("talk.wav", disable=True) as bar:
    ...     bar.progress(2.5, 10.0)
    """

    def __init__(self, description, **options):
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
        super().__init__(desc=description, total=0, bar_format=form, **options)

    def progress(self, done_seconds, total_seconds):
        """Show how many seconds are done, and how many there are as far as is known."""
        self.total = max(total_seconds, done_seconds)  # a header may promise too little
        self.update(done_seconds - self.n)
