"""Separation of audio of any length: window by window, each voice followed from one window to the next."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Windows:
    """How audio is cut into overlapping windows. All in samples.

    Arguments
    ---------
    length : int
        Of a window.
    hop : int
        From the end of a window to the end of the next; the rest of the length is heard again.
    first : int
        Where the first window ends. Those that end before ``length`` samples have come are shorter.
    lookahead : int
        The last samples of each window, which wait for what the next window says of them.
    fade : int
        Over how many samples one window fades into the next, from where the lookahead begins.
    reminder : int
        Length of the reminders: see :class:`FollowedVoices`. 0: none.

    Raises
    ------
    ValueError
        If these do not fit each other.

    Example
    -------
    >>> Windows.of_recording(length=80000, overlap=16000)
    Windows(length=80000, hop=64000, first=80000, lookahead=12000, fade=8000, reminder=0)
    """

    length: int
    hop: int
    first: int
    lookahead: int
    fade: int
    reminder: int = 0

    def __post_init__(self):
        if not 0 < self.fade <= self.lookahead <= self.length - self.hop or min(self.hop, self.first) < 1:
            raise ValueError(f"the fade must fit the lookahead, and that the overlap of windows, but got {self}.")

    @classmethod
    def of_recording(cls, length, overlap, reminder=0):
        """Windows of a recording that is at hand: where they fade is far from the ends of both."""
        return cls(length, length - overlap, length, overlap * 3 // 4, overlap // 2, reminder)

    @classmethod
    def of_stream(cls, length, hop, fade, reminder=0):
        """Windows of audio that is still arriving: a sample waits for ``hop + fade`` others at most."""
        return cls(length, hop, hop, fade, fade, reminder)


def match_voices(voices, estimates):
    """Assign the estimates of a window to the voices so far, where both are known.

    The assignment, and the sign of each estimate, are those with the least squared difference, for estimates of one
    scale. SI-SDR does not see signs, so training may leave an output turned over. Where there is nothing to go by,
    the estimates keep their order and their signs.

    Arguments
    ---------
    voices : np.ndarray
        The voices so far [T, N].
    estimates : np.ndarray
        Estimates of the same samples [T, N].

    Returns
    -------
    perm : np.ndarray
        [N]: voice ``i`` goes on in ``signs[i] * estimates[:, perm[i]]``.
    signs : np.ndarray
        [N], 1 or -1.

    Example
    -------
    >>> voices = np.random.default_rng(0).standard_normal((100, 3))
    >>> match_voices(voices, voices[:, [2, 0, 1]] * [1, -1, 1])
    (array([1, 2, 0]), array([-1,  1,  1]))
    """
    products = voices.T.astype(np.float64) @ estimates  # [N, N]
    perm = linear_sum_assignment(np.abs(products), maximize=True)[1]
    return perm, np.where(products[range(len(perm)), perm] < 0, -1, 1)


class FollowedVoices:
    """Separates audio that comes piece by piece, and keeps each voice in its place.

    A window overlaps the one before; its estimates are assigned to the voices by what both say of the
    overlap (:func:`match_voices`), and faded in there. A voice that is silent in the overlap could come back
    in another's place. So the window is then preceded by a *reminder*: the stretch in which that voice was last
    heard well. The separator hears both together, and keeps the voice in one output.

    Arguments
    ---------
    separate_window : callable
        From a mixture [T] to the estimates [T, N], both float32 arrays; T is at most the length of a window
        and N reminders.
    num_spks : int
        Number of voices, N.
    windows : Windows
        How the audio is cut.
    match : callable
        As :func:`match_voices`.

    Example
    -------
    >>> halves = FollowedVoices(lambda mixture: np.stack([mixture / 2] * 2, 1), 2, Windows.of_recording(100, 40))
    >>> blocks = [*halves.push(np.ones(250, "float32")), *halves.push(np.ones(8, "float32")), *halves.finish()]
    >>> [len(mixture) for mixture, voices in blocks]
    [70, 60, 60, 68]
    >>> float(sum(np.abs(voices.sum(1) - mixture).max() for mixture, voices in blocks))
    0.0
    """

    def __init__(self, separate_window, num_spks, windows, match=match_voices):
        self.separate_window, self.num_spks, self.windows, self.match = separate_window, num_spks, windows, match
        self.mixture = np.zeros(0, np.float32)  # from sample `begin` on
        self.voices = np.zeros((0, num_spks), np.float32)  # of the same samples, as far as they are separated
        self.begin = 0  # what lies before is given out, and heard no more
        self.given = 0  # samples given out
        self.next_end = windows.first
        self.reminders = [None] * num_spks  # for each voice (mixture [R], voices [R, N])

    def push(self, samples):
        """Take the next samples of the mixture.

        Arguments
        ---------
        samples : np.ndarray
            [T], float32; any number.

        Returns
        -------
        iterator of (np.ndarray, np.ndarray)
            What is finished: mixture [T'] and voices [T', N], without gap from one call to the next. It is
            computed as the iterator is consumed.
        """
        self.mixture = np.concatenate([self.mixture, samples])
        return self._finished()

    def _finished(self):
        while self.begin + len(self.mixture) >= self.next_end:
            end = self.next_end
            self._separate_until(end)
            yield self._give(end - self.windows.lookahead)
            self.next_end = end + self.windows.hop

    def finish(self):
        """The audio has ended.

        Returns
        -------
        iterator of (np.ndarray, np.ndarray)
            The rest of the mixture [T'] and of the voices [T', N].
        """
        yield from self._finished()
        end = self.begin + len(self.mixture)
        if end > self.begin + len(self.voices):
            self._separate_until(end)
        yield self._give(end)

    def _separate_until(self, end):
        """Separate the window that ends there, and extend the voices by it."""
        begin = max(0, end - self.windows.length)
        window = self.mixture[begin - self.begin : end - self.begin]  # [T]
        known = self.voices[begin - self.begin :]  # [T', N], of its first samples: the overlap
        if window.any():
            reminders = self._reminders(known) if len(known) else []
            heard = np.concatenate([known[:0], *(voices for _, voices in reminders), known])
            estimates = self.separate_window(np.concatenate([*(mixture for mixture, _ in reminders), window]))
            perm, signs = self.match(heard, estimates[: len(heard)])
            estimates = signs * estimates[len(estimates) - len(window) :, perm]  # [T, N]
        else:
            estimates = np.zeros((len(window), self.num_spks))

        fade_begin = max(0, len(known) - self.windows.lookahead)
        fade_end = min(len(known), fade_begin + self.windows.fade)
        weight = np.sin(np.linspace(0, np.pi / 2, fade_end - fade_begin + 2)[1:-1, None]) ** 2
        faded = known[fade_begin:fade_end] * (1 - weight) + estimates[fade_begin:fade_end] * weight
        extended = np.concatenate([known[:fade_begin], faded, estimates[fade_end:]]).astype(np.float32)  # [T, N]
        self.voices = np.concatenate([self.voices[: begin - self.begin], extended])
        self._remember(window, extended)

    def _reminders(self, voices):
        """Those of the voices that are hardly heard in the overlap."""
        _, loudness = _loudest(voices, self.windows.reminder)
        return [
            reminder
            for spk, reminder in enumerate(self.reminders)
            if reminder is not None and 2 * loudness[spk] < np.abs(reminder[1][:, spk]).mean()
        ]

    def _remember(self, window, voices):
        """Keep the stretch in which each voice is heard best, unless it was heard far better before."""
        begins, loudness = _loudest(voices, self.windows.reminder)
        for spk, begin in enumerate(begins):
            last = self.reminders[spk]
            if loudness[spk] > 0 and (last is None or 2 * loudness[spk] > np.abs(last[1][:, spk]).mean()):
                stretch = slice(begin, begin + self.windows.reminder)
                self.reminders[spk] = (window[stretch].copy(), voices[stretch].copy())

    def _give(self, end):
        """What is finished, once; and let go of what is heard no more."""
        first, last = self.given - self.begin, max(end, self.given) - self.begin
        finished = self.mixture[first:last], self.voices[first:last]
        self.given = max(end, self.given)
        separated = self.begin + len(self.voices)
        begin = max(self.begin, min(self.given, separated - self.windows.length))  # no later window begins before
        self.mixture, self.voices = self.mixture[begin - self.begin :], self.voices[begin - self.begin :]
        self.begin = begin
        return finished


def _loudest(voices, length):
    """Where each voice's loudest stretch of a length begins [N], and how loud it is: its mean magnitude [N].

    Magnitudes, not energies: a bang is short, and says little of a voice.
    """
    if not 0 < length <= len(voices):
        return np.zeros(voices.shape[1], int), np.zeros(voices.shape[1])
    sums = np.concatenate([np.zeros((1, voices.shape[1])), np.abs(voices).cumsum(0, dtype=np.float64)])
    means = (sums[length:] - sums[:-length]) / length  # [T - length + 1, N]
    return means.argmax(0), means.max(0)
