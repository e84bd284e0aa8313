"""The profiles of a store in memory: kept up to date by their numbers, and searched."""

import numpy as np

from nessa_modules.profile_results import Candidate

_CHUNK = 2**12  # rows that are moved at a time


class ProfileTable:
    """A vector and a name for each profile: one row each, sorted by the profiles' numbers.

    A number stays that of one profile, also after it was removed, and a new profile's is higher than all before.

    Example
    -------
    >>> table = ProfileTable()
    >>> table.put(np.array([1, 2, 3]), ["Ada", "Bob", "Eve"], np.eye(3, dtype=np.float32), num_left=3)
    >>> table.keep_only(np.array([1, 3]))
    >>> table.search(np.array([0.6, 0.0, 0.8], np.float32), 1)[0].name
    'Eve'
    """

    def __init__(self):
        self._numbers, self._names, self._vectors = np.zeros(0, np.int64), [], np.zeros((0, 0), np.float32)
        self.count = 0
        self.num_changes = self.num_removals = 0  # of the store when it was read

    def put(self, numbers, names, vectors, num_left):
        """Write the rows of profiles, numbers [K] sorted, vectors [K, Dz]; num_left: how many are to come, with these.

        A profile that is there already keeps its name.
        """
        rows = np.searchsorted(self._numbers[: self.count], numbers)
        num_known = int(np.searchsorted(rows, self.count))  # the others are new, and come after all that are there
        num_new = len(numbers) - num_known
        rows[num_known:] += np.arange(num_new)
        if self.count + num_new > len(self._vectors):
            self._grow(self.count + num_left, vectors.shape[1])
        self._vectors[rows], self._numbers[rows] = vectors, numbers
        self._names.extend(names[num_known:])
        self.count += num_new

    def keep_only(self, numbers):
        """Drop all other profiles, in place, and overwrite what was theirs."""
        kept = np.flatnonzero(np.isin(self._numbers[: self.count], numbers, assume_unique=True))
        for begin in range(0, len(kept), _CHUNK):
            rows = kept[begin : begin + _CHUNK]
            if rows[-1] >= begin + len(rows):  # something before was dropped
                self._vectors[begin : begin + len(rows)] = self._vectors[rows]
                self._numbers[begin : begin + len(rows)] = self._numbers[rows]
        self._names = [self._names[row] for row in kept.tolist()]
        self._vectors[len(kept) : self.count] = 0
        self.count = len(kept)

    def search(self, utterance, num_candidates):
        """The candidates that are closest to an utterance [Dz] of length 1, best first."""
        if not self.count:
            return []
        scores = self._vectors[: self.count] @ utterance  # [N]
        best = np.arange(self.count)
        if num_candidates < self.count:
            best = np.argpartition(scores, -num_candidates)[-num_candidates:]
        best = best[np.lexsort((best, -scores[best]))]
        return [Candidate(self._names[row], float(scores[row])) for row in best]

    def _grow(self, needed, size):
        capacity = needed + needed // 8 + 16  # what is not written takes no memory
        vectors, numbers = np.empty((capacity, size), np.float32), np.zeros(capacity, np.int64)
        if self.count:
            vectors[: self.count], numbers[: self.count] = self._vectors[: self.count], self._numbers[: self.count]
        self._vectors, self._numbers = vectors, numbers
