"""The voices of a recording as wav files, written block by block: whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import os
import struct
from pathlib import Path

import numpy as np

from shared_modules.files import flush_to_disk

_UNKNOWN_SIZE = 0xFFFFFFFF  # in a wav's header: until the file ends


class VoiceFiles:
    """The voices of a recording as 16-bit wav files, written block by block. Use it in a ``with`` statement.

    They are written under hidden names beside, and renamed one right after the other when the block ends
    without an exception; files of these names are replaced. After an exception nothing is left; after a kill
    hidden files may be left, which the next writer of the same names removes.

    Arguments
    ---------
    folder : str or Path
        Created where it is missing.
    stem : str
        The files are ``<stem>_spk1.wav`` and so on.
    num_spks : int
        Number of voices N.
    sample_rate : int
        Of the files, Hz.

    Attributes
    ----------
    paths : list of Path
        The N files.

    Raises
    ------
    OSError
        If a file cannot be written: it names the file.

    Example
    -------
    >>> import tempfile
    >>> with VoiceFiles(tempfile.mkdtemp(), "meeting", num_spks=2, sample_rate=8000) as voices:
    ...     for _ in range(3):
    ...         voices.write(np.zeros((1000, 2), np.float32))
    >>> import soundfile
    >>> [(path.name, soundfile.info(path).frames) for path in voices.paths]
    [('meeting_spk1.wav', 3000), ('meeting_spk2.wav', 3000)]
    """

    def __init__(self, folder, stem, num_spks, sample_rate):
        self.paths = [Path(folder) / f"{stem}_spk{spk}.wav" for spk in range(1, num_spks + 1)]
        self._sample_rate = sample_rate
        self._files = []

    def __enter__(self):
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        try:
            for path in self.paths:
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "A folder stands where a voice is to be written", str(path))
                _remove_leftovers(path)
                self._files.append(_WavFile(path, self._sample_rate))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, voices):
        """Add the next samples.

        Arguments
        ---------
        voices : numpy.ndarray or torch.Tensor
            [t, N], float, on the CPU; what exceeds 1 is clipped.

        Raises
        ------
        ValueError
            If they are not [t, N] or not finite.
        """
        voices = np.asarray(voices, np.float32)  # [t, N]
        if voices.ndim != 2 or voices.shape[1] != len(self.paths):
            raise ValueError(f"voices must have shape [t, {len(self.paths)}], but got {list(voices.shape)}.")
        if not np.isfinite(voices).all():
            raise ValueError("voices must be finite, but they hold NaN or infinite samples.")
        pcm = np.clip(np.rint(voices * 32768), -32768, 32767).astype("<i2")  # [t, N]
        for file, samples in zip(self._files, pcm.T, strict=True):
            file.write(samples.tobytes())

    def __exit__(self, exception_type, *_):
        try:
            if exception_type is None:
                for file in self._files:
                    file.finish()
                for file in self._files:
                    file.appear()
                flush_to_disk(self.paths[0].parent)
        finally:
            self._discard()

    def _discard(self):
        for file in self._files:
            file.discard()


def wav_header(num_samples, sample_rate):
    """The first 80 bytes of a wav file of one channel of 16 bit, in the form for long files where it needs to be.

    Sizes of 4 GiB and more need RF64 (EBU Tech 3306): the same header, in which the chunk that other readers
    skip gives the sizes in 64 bits.

    Arguments
    ---------
    num_samples : int
    sample_rate : int
        Hz.

    Returns
    -------
    bytes

    Example
    -------
    >>> wav_header(8000, 8000)[:4], wav_header(2**31, 8000)[:4]
    (b'RIFF', b'RF64')
    """
    num_bytes = 2 * num_samples
    riff_bytes = 80 - 8 + num_bytes
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    if riff_bytes < _UNKNOWN_SIZE:
        start = struct.pack("<4sI4s4sI28x", b"RIFF", riff_bytes, b"WAVE", b"JUNK", 28)
        return start + form + struct.pack("<4sI", b"data", num_bytes)
    start = struct.pack(
        "<4sI4s4sIQQQI", b"RF64", _UNKNOWN_SIZE, b"WAVE", b"ds64", 28, riff_bytes, num_bytes, num_samples, 0
    )
    return start + form + struct.pack("<4sI", b"data", _UNKNOWN_SIZE)


class _WavFile:
    """A wav file of one voice under a hidden name. Written here, since libsndfile hides why a write failed."""

    def __init__(self, path, sample_rate):
        self._path, self._sample_rate = path, sample_rate
        self._beside = path.with_name(f".{path.name}.{os.getpid()}.{id(self):x}.tmp")
        self._num_bytes = 0
        with self._names_the_file():
            self._stream = open(self._beside, "wb")  # noqa: SIM115
            try:
                with contextlib.suppress(OSError):  # some network drives know no locks
                    fcntl.flock(self._stream, fcntl.LOCK_EX)  # tells others that its writer lives
                self._stream.write(wav_header(0, sample_rate))
            except BaseException:
                self.discard()
                raise

    def write(self, samples):
        with self._names_the_file():
            self._stream.write(samples)
        self._num_bytes += len(samples)

    def finish(self):
        with self._names_the_file():
            self._stream.seek(0)
            self._stream.write(wav_header(self._num_bytes // 2, self._sample_rate))
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()

    def appear(self):
        os.replace(self._beside, self._path)

    def discard(self):
        with contextlib.suppress(OSError):  # a full disk: what is buffered cannot be written
            self._stream.close()
        self._beside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _names_the_file(self):
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def _remove_leftovers(path):
    """Remove the hidden files that a killed writer left beside a path; one that lives holds a lock on its own."""
    for beside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(beside, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            beside.unlink()
