"""Recordings read block by block, as one channel at a sample rate: memory does not grow with length."""

import contextlib
import io
import math
import os
import shutil
import stat
import struct
import tempfile

import numpy as np
import soundfile
import soxr

_BLOCK_SAMPLES = 2**22  # the most that are read at once, of all channels together
_MANY_BYTES = 2**40
_MIN_RATE, _MAX_RATE = 100, 10_000_000  # Hz; a header with another is damaged
_UNKNOWN_SIZE = 0xFFFFFFFF  # in a wav's header: until the file ends


class Resampler:
    """Convert audio that comes in pieces to another sample rate. How it is cut makes no difference.

    Arguments
    ---------
    from_rate, to_rate : int
        Hz. Where they are equal, the samples pass unchanged.
    num_channels : int
        Number of channels.

    Example
    -------
    >>> resampler = Resampler(16000, 8000)
    >>> pieces = [resampler.push(np.zeros(n, np.float32)) for n in (999, 4)]
    >>> sum(map(len, pieces)) + len(resampler.finish())
    502
    """

    def __init__(self, from_rate, to_rate, num_channels=1):
        self._rates = from_rate, to_rate
        self._stream = None
        if from_rate != to_rate:
            self._stream = soxr.ResampleStream(from_rate, to_rate, num_channels, dtype="float32")
        self._num_received = self._num_given = 0
        self._nothing = np.zeros((0, num_channels) if num_channels > 1 else 0, np.float32)

    def push(self, samples):
        """Take the next piece, and give what is known of the result so far.

        Arguments
        ---------
        samples : numpy.ndarray
            Float32, [t] or [t, channels].

        Returns
        -------
        numpy.ndarray
            Float32, [t'] or [t', channels]; t' may be 0.
        """
        if self._stream is None or not len(samples):
            return samples
        self._num_received += len(samples)
        converted = self._stream.resample_chunk(np.ascontiguousarray(samples))
        self._num_given += len(converted)
        return converted

    def finish(self):
        """Give the rest, so that ceil(received x to_rate / from_rate) samples came in all. Call it once.

        Returns
        -------
        numpy.ndarray
            As for :meth:`push`.
        """
        if self._stream is None or not self._num_received:
            return self._nothing
        from_rate, to_rate = self._rates
        # One more sample of the result than soxr would round to: what lies beyond the end is silence.
        silence = np.zeros((math.ceil(from_rate / to_rate), *self._nothing.shape[1:]), np.float32)
        rest = self._stream.resample_chunk(silence, last=True)
        return rest[: resampled_length(self._num_received, from_rate, to_rate) - self._num_given]


def resampled_length(num_samples, from_rate, to_rate):
    """The number of samples that :class:`Resampler` makes of so many.

    Arguments
    ---------
    num_samples : int
        At the first rate.
    from_rate, to_rate : int
        Hz.

    Returns
    -------
    int

    Example
    -------
    >>> resampled_length(44101, 44100, 8000)
    8001
    """
    return -(-num_samples * to_rate // from_rate)


class Recording:
    """An audio file that is read block by block, as one channel at a sample rate. Use it in a ``with`` statement.

    Arguments
    ---------
    source : str, Path, bytes or binary file object
        A path, the content of an audio file, or an open one, in any format that soundfile reads and whose header
        tells its sample rate. A file object is read from its beginning, or where it cannot seek (a pipe, a
        socket) from where it stands to its end, through a temporary file.
    name : str, optional
        What messages call it; else the path, or the file object's name.

    Attributes
    ----------
    name : str
    sample_rate : int
        Of the file, Hz.
    num_channels : int
        Of the file.
    num_frames : int
        Samples per channel, as the header tells. Some headers guess or are wrong: after :meth:`blocks` was read
        to its end it is the number found.

    Raises
    ------
    ValueError
        If it is missing, not a regular file, no audio or empty.

    Example
    -------
    >>> stream = io.BytesIO()
    >>> soundfile.write(stream, np.zeros((44100, 2)), 44100, format="WAV")
    >>> with Recording(stream.getvalue(), "meeting.wav") as recording:
    ...     recording.num_channels, sum(len(block) for block in recording.blocks(8000))
    (2, 8000)
    """

    def __init__(self, source, name=None):
        self._path = self._stream = None
        self._closing = contextlib.ExitStack()
        if isinstance(source, str | os.PathLike):
            self.name = str(source) if name is None else name
            self._path = source
            _check_regular(source, self.name)
        elif isinstance(source, bytes | bytearray | memoryview):
            self.name = name or "recording"
            self._stream = io.BytesIO(source)
        elif hasattr(source, "read"):
            self.name = name or str(getattr(source, "name", "recording"))
            self._stream = self._seekable(source)
        else:
            raise ValueError(f"A recording can only be a path, bytes or a binary file object, but got {type(source)}.")
        self._corrections = {}
        try:
            with self._opened() as (file, stream):
                if file.format in ("WAV", "WAVEX") and file.frames == 0:
                    self._corrections = {"size_at": _find_missing_size(stream)}
                elif file.format == "MP3":
                    self._corrections = {"is_endless": not _tells_its_length(stream)}
                self.sample_rate, self.num_channels, self.num_frames = file.samplerate, file.channels, file.frames
            if self._corrections.get("size_at"):
                with self._opened() as (file, _):
                    self.num_frames = file.frames
            if self.num_frames == 0:
                raise ValueError(f"{self.name} is empty: it has no samples.")
            if not _MIN_RATE <= self.sample_rate <= _MAX_RATE:
                expected = f"{_MIN_RATE} to {_MAX_RATE} Hz"
                raise ValueError(f"{self.name}: its sample rate can only be {expected}, but got {self.sample_rate}.")
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closing.close()

    @property
    def num_seconds(self):
        """Its duration, as far as :attr:`num_frames` is known."""
        return self.num_frames / self.sample_rate

    def blocks(self, sample_rate, channel=None, block_seconds=10.0):
        """The samples as one channel, block by block; each call starts again from the beginning.

        Arguments
        ---------
        sample_rate : int
            Hz.
        channel : int, optional
            The channel to take, from 1; None averages them.
        block_seconds : float
            About how much is read at a time. It does not change the samples.

        Returns
        -------
        iterator of numpy.ndarray
            Float32, each [t] with t > 0; ceil(frames x sample_rate / file's rate) samples in all. Of a file
            object, one at a time can be read.

        Raises
        ------
        ValueError
            If the channel does not exist; while reading, if the file is damaged or holds NaN or infinite samples.
        """
        if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | np.integer) or sample_rate < 1:
            raise ValueError(f"sample_rate can only be a whole number of Hz, but got {sample_rate!r}.")
        if channel is not None and (type(channel) is not int or not 1 <= channel <= self.num_channels):
            raise ValueError(f"channel can only be 1 to {self.num_channels} in {self.name}, but got {channel!r}.")
        if not block_seconds > 0:
            raise ValueError(f"block_seconds must be positive, but got {block_seconds!r}.")
        most = max(1, _BLOCK_SAMPLES // self.num_channels)
        return self._blocks(int(sample_rate), channel, max(1, int(min(block_seconds * self.sample_rate, most))))

    def _blocks(self, sample_rate, channel, block_frames):
        resampler = Resampler(self.sample_rate, sample_rate)
        for block in self._mono_blocks(channel, block_frames):
            converted = resampler.push(block)
            if len(converted):
                yield converted
        rest = resampler.finish()
        if len(rest):
            yield rest

    def _mono_blocks(self, channel, block_frames):
        """The blocks [t] at the file's rate."""
        num_frames = 0
        buffer = np.empty((block_frames, self.num_channels), np.float32)
        with self._opened() as (file, stream):
            while True:
                try:
                    block = file.read(out=buffer)  # [t, channels], until the file ends, whatever its header says
                except soundfile.LibsndfileError as error:
                    stream.raise_fault(self.name)
                    seconds = num_frames / self.sample_rate
                    raise ValueError(
                        f"{self.name} is damaged or cut off, {seconds:.1f} s or a little more from its start: "
                        f"{_reason(error)}"
                    ) from None
                stream.raise_fault(self.name)
                if not len(block):
                    break
                if channel is None:
                    mono = block.mean(axis=1, dtype=np.float64).astype(np.float32)  # [t]
                else:
                    mono = block[:, channel - 1].copy()  # [t]
                is_finite = np.isfinite(mono)
                if not is_finite.all():
                    seconds = (num_frames + int(is_finite.argmin())) / self.sample_rate
                    raise ValueError(
                        f"{self.name} holds samples that are NaN or infinite, the first of them at {seconds:.3f} s."
                    )
                num_frames += len(mono)
                yield mono
        if not num_frames:
            raise ValueError(f"{self.name} is empty: it has no samples.")
        self.num_frames = num_frames

    def _seekable(self, stream):
        """The file object, or where it cannot seek a temporary file with what it holds."""
        try:
            if not isinstance(stream.read(0), bytes):
                raise ValueError(f"{self.name} must be opened in binary mode.")
            try:
                stream.seek(0)
                return stream
            except (AttributeError, OSError):  # io.UnsupportedOperation is an OSError
                spool = self._closing.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
                shutil.copyfileobj(stream, spool)
                return spool
        except BaseException as error:
            self._closing.close()
            if isinstance(error, OSError) or (isinstance(error, ValueError) and self.name not in str(error)):
                raise ValueError(f"{self.name} cannot be read: {error}") from error
            raise

    @contextlib.contextmanager
    def _opened(self):
        """The file, opened at its beginning, and the stream under it."""
        with contextlib.ExitStack() as closing:
            try:
                source = self._stream
                if source is None:
                    source = closing.enter_context(open(self._path, "rb"))
                source.seek(0)
            except OSError as error:
                raise ValueError(f"{self.name} cannot be read: {error.strerror}.") from None
            stream = _Stream(source, **self._corrections)
            # libsndfile reads a path's file by itself: an interruption would be lost in Python's part of it.
            by_itself = self._path is not None and not any(self._corrections.values())
            try:
                file = closing.enter_context(_ForwardFile(source.fileno() if by_itself else stream, closefd=False))
            except soundfile.LibsndfileError as error:
                stream.raise_fault(self.name)
                if source.seek(0, os.SEEK_END) == 0:
                    raise ValueError(f"{self.name} is empty: it has no bytes.") from None
                raise ValueError(f"{self.name} cannot be read as audio: {_reason(error)}") from None
            yield file, stream


class _ForwardFile(soundfile.SoundFile):
    """Read from front to back. soundfile seeks after each read, and mp3 decoders lose their thread by that."""

    def seekable(self):
        return False


class _Stream:
    """A file object as libsndfile may use it.

    It reads as much as is asked for, where there is so much, and keeps what is raised, which cannot pass through
    C code.

    Arguments
    ---------
    stream : binary file object
    is_endless : bool
        Claim to be large: libsndfile guesses the length of such a file from its size, and reads no further.
    size_at : int, optional
        Where four bytes shall say that the size is unknown.
    """

    def __init__(self, stream, is_endless=False, size_at=None):
        self._stream, self._is_endless, self._size_at = stream, is_endless, size_at
        self._is_at_claimed_end = False
        self._fault = None

    def raise_fault(self, name):
        """Raise what was kept, a file object's own exception as a ValueError that names it."""
        if isinstance(self._fault, Exception):
            raise ValueError(f"{name} cannot be read: {self._fault}") from self._fault
        if self._fault is not None:
            raise self._fault

    def readinto(self, buffer):
        try:
            start, num_bytes = self._stream.tell(), 0
            while num_bytes < len(buffer):
                piece = self._stream.read(len(buffer) - num_bytes)
                if piece is None:
                    raise OSError("it gave no data yet: a non-blocking file cannot be read")
                if not piece:
                    break
                buffer[num_bytes : num_bytes + len(piece)] = piece
                num_bytes += len(piece)
            if self._size_at is not None:
                for place in range(max(start, self._size_at), min(start + num_bytes, self._size_at + 4)):
                    buffer[place - start : place - start + 1] = b"\xff"
            return num_bytes
        except BaseException as error:
            self._fault = self._fault or error
            return 0

    def seek(self, offset, whence=os.SEEK_SET):
        try:
            self._is_at_claimed_end = self._is_endless and whence == os.SEEK_END
            if not self._is_at_claimed_end:
                self._stream.seek(offset, whence)
        except BaseException as error:
            self._fault = self._fault or error

    def tell(self):
        try:
            return _MANY_BYTES if self._is_at_claimed_end else self._stream.tell()
        except BaseException as error:
            self._fault = self._fault or error
            return 0


def _find_missing_size(stream):
    """Where a wav whose writer never completed the header (it was killed, or wrote to a pipe) lacks its data's size.

    None where the header is complete: the file is empty.
    """
    stream.seek(0)
    head = bytearray(2**16)
    head = bytes(head[: stream.readinto(head)])
    stream.seek(0, os.SEEK_END)
    num_bytes = stream.tell()
    place = head.find(b"data\0\0\0\0") + 4
    is_complete = struct.unpack("<I", head[4:8])[0] + 8 == num_bytes
    return None if place < 4 or is_complete or num_bytes <= place + 4 else place


def _tells_its_length(stream):
    """Whether an mp3 file says in its first frame how many there are; else libsndfile can only guess."""
    head = bytearray(10)
    stream.seek(0)
    stream.readinto(head)
    first = 0
    if head[:3] == b"ID3":  # a tag, perhaps with a picture, before the first frame
        first = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    frame = bytearray(2**12)
    stream.seek(first)
    stream.readinto(frame)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def _check_regular(path, name):
    """Refuse what is no file, and what reading might wait for: a pipe, a terminal."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"The audio file {name} was not found.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', error)}.") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{name} is a folder, but expected an audio file.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} is not a regular file; open it and give the file object.")


def _reason(error):
    """libsndfile's own words."""
    return error.error_string.strip() or "unknown fault."
