"""Bounded memory that DataLoader workers share: the first entries that fit, kept for good."""

import mmap
import multiprocessing
import struct

_RECORD = struct.Struct("16sq")  # a key and its number of bytes, before the bytes themselves
_NUM_USED = struct.Struct("q")  # at the very start: where the next record goes
_ALIGNMENT = 64
_PATIENCE_SECONDS = 30.0  # a record is written in a millisecond, but a machine can stand still


def _align(offset):
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


class SharedCache:
    """Bytes by key, in memory that is shared with all processes forked after it was made.

    What is kept is never evicted: in training, where each mixture is read once an epoch in random order, the entries
    that fit are then hit in every epoch, while a cache of the latest ones would hardly ever hit.

    The memory is a log: a record is appended under a lock and counts only once the end of the log is moved behind it,
    so that a process killed half-way leaves nothing wrong. If it held the lock, the others wait for it once, and do
    with what they have seen from then on. Memory is taken from the system as it is filled. Pickled (workers that are
    spawned, not forked), it becomes a cache that keeps nothing.

    Arguments
    ---------
    num_bytes : int
        The most memory to take; 0: keep nothing.

    Raises
    ------
    ValueError
        If the system refuses so much memory.

    Example
    -------
    >>> cache = SharedCache(1000)
    >>> cache.put(b"0123456789abcdef", b"kept")
    True
    >>> bytes(cache.get(b"0123456789abcdef")), cache.get(b"fedcba9876543210"), cache.has_room(2000)
    (b'kept', None, False)
    """

    def __init__(self, num_bytes=0):
        self.num_bytes = int(num_bytes)
        self._places = {}  # key: (start, stop) in the memory; what this process has seen of the log
        self._seen = _align(_NUM_USED.size)
        if self.num_bytes < self._seen:
            self.num_bytes = 0
            return
        try:
            self._memory = mmap.mmap(-1, self.num_bytes)
        except (OSError, OverflowError, ValueError) as error:
            raise ValueError(f"A cache of {self.num_bytes / 2**30:g} GiB cannot be had: {error}.") from None
        self._view = memoryview(self._memory)
        self._lock = multiprocessing.Lock()
        self._is_lock_lost = False
        _NUM_USED.pack_into(self._memory, 0, self._seen)

    def __reduce__(self):
        return SharedCache, ()

    def has_room(self, num_bytes):
        """Whether so many bytes would still fit."""
        return bool(self.num_bytes) and self._num_used() + _RECORD.size + num_bytes <= self.num_bytes

    def get(self, key):
        """The bytes of a key (16 bytes), as a memoryview; None where there are none."""
        if not self.num_bytes:
            return None
        if key not in self._places and self._num_used() > self._seen and self._acquire():
            try:
                self._catch_up()
            finally:
                self._lock.release()
        place = self._places.get(key)
        return None if place is None else self._view[slice(*place)].toreadonly()

    def put(self, key, content):
        """Keep the bytes of a key (16 bytes), if there is room. Bytes that it has already stay.

        Returns
        -------
        bool
            Whether the key is kept now.
        """
        content = memoryview(content).cast("B")
        if not self.has_room(content.nbytes) or not self._acquire():
            return False
        try:
            self._catch_up()
            if key not in self._places:
                if not self.has_room(content.nbytes):
                    return False
                start = self._seen + _RECORD.size
                self._view[start : start + content.nbytes] = content
                _RECORD.pack_into(self._memory, self._seen, key, content.nbytes)
                _NUM_USED.pack_into(self._memory, 0, _align(start + content.nbytes))
                self._catch_up()
            return True
        finally:
            self._lock.release()

    def _acquire(self):
        self._is_lock_lost = self._is_lock_lost or not self._lock.acquire(timeout=_PATIENCE_SECONDS)
        return not self._is_lock_lost

    def _num_used(self):
        return _NUM_USED.unpack_from(self._memory, 0)[0]

    def _catch_up(self):
        """Take in the records that were appended since; called with the lock held, which orders the memory."""
        num_used = self._num_used()
        while self._seen < num_used:
            key, num_bytes = _RECORD.unpack_from(self._memory, self._seen)
            start = self._seen + _RECORD.size
            self._places[key] = (start, start + num_bytes)
            self._seen = _align(start + num_bytes)
