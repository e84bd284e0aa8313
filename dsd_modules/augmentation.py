"""Speed perturbation and wave drop of training crops: what is drawn follows from (seed, epoch, id) alone."""

import hashlib

import numpy as np
import torch
from scipy.signal import resample_poly
from speechbrain.augment.time_domain import DropChunk, DropFreq

_SLOWEST, _FASTEST = 50, 200  # %, beyond which it is hardly speech; 0.95 and 1 are meant as factors
# As SpeechBrain's separation recipes have them: lengths in samples, the width as a share of the Nyquist frequency.
_DROP_CHUNK = DropChunk(drop_length_low=1000, drop_length_high=2000, drop_count_low=0, drop_count_high=5)
_DROP_FREQ = DropFreq(drop_freq_count_low=0, drop_freq_count_high=3, drop_freq_width=0.05)


def seeded_generator(purpose, seed, epoch, sample_id):
    """A generator whose draws are the same for any number of workers and ranks and after a resume.

    Arguments
    ---------
    purpose : str
        What is drawn: different purposes draw independently of each other.
    seed, epoch : int
        The run's seed, the epoch.
    sample_id : str
        The mixture's id.

    Returns
    -------
    np.random.Generator

    Example
    -------
    >>> seeded_generator("speed", 1, 2, "mix").random() == seeded_generator("speed", 1, 2, "mix").random()
    True
    >>> seeded_generator("speed", 1, 2, "mix").random() == seeded_generator("speed", 1, 3, "mix").random()
    False
    """
    key = f"{purpose}/{seed}/{epoch}/{sample_id}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little"))


def perturb_speed(signals, speeds):
    """Play each source at a speed of its own, by resampling: its tempo and its pitch change by the same factor.

    What the mixture holds beyond its sources (noise) stays as it is.

    Arguments
    ---------
    signals : np.ndarray
        ``[1 + N, T]``: the mixture, then the sources.
    speeds : sequence of int
        Percent, one per source: 95 is slower, longer and lower.

    Returns
    -------
    np.ndarray
        ``[1 + N, T']``, where ``T'`` is the length of the shortest signal, at most ``T``.

    Example
    -------
    >>> perturb_speed(np.ones((3, 2100), dtype="float32"), speeds=(95, 105)).shape
    (3, 2000)
    """
    mixture, sources = signals[0], signals[1:]
    perturbed = [resample_poly(source, 100, speed) for source, speed in zip(sources, speeds, strict=True)]
    num_samples = min(len(mixture), *map(len, perturbed))
    perturbed = np.stack([source[:num_samples] for source in perturbed])
    mixture = mixture[:num_samples] + (perturbed.sum(axis=0) - sources[:, :num_samples].sum(axis=0))
    return np.concatenate([mixture[None], perturbed])


def drop_waves(mixture, seed):
    """Silence a few short stretches and narrow frequency bands of a signal.

    By SpeechBrain's ``DropChunk`` and ``DropFreq``, as its separation recipes apply them to mixtures: up to five
    stretches of 1000 to 2000 samples, then up to three bands. torch's global generator is left as it was.

    Arguments
    ---------
    mixture : np.ndarray
        ``[T]``, float32.
    seed : int
        Of what is dropped.

    Returns
    -------
    np.ndarray
        ``[T]``; ``mixture`` itself where nothing of it would be left.

    Example
    -------
    >>> dropped = drop_waves(np.ones(8000, dtype="float32"), seed=1)
    >>> dropped.shape, bool((dropped == 0).any())
    ((8000,), True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators, too
        dropped = _DROP_CHUNK(torch.from_numpy(mixture).unsqueeze(0), torch.ones(1))
        dropped = _DROP_FREQ(dropped).squeeze(0).numpy()
    return dropped if dropped.any() and np.isfinite(dropped).all() else mixture


class Augmentation:
    """Changes the crops that were read for training.

    Called as ``augmentation(signals, sample_id, epoch, num_samples)``, which gives the signals back changed.

    Arguments
    ---------
    seed : int
        The run's seed.
    speeds : sequence of int, optional
        Percent: the speeds each source draws one of (see :func:`perturb_speed`). None: no speed perturbation.
    wave_drop : bool
        Whether stretches and bands of the mixture are dropped (see :func:`drop_waves`). The references stay whole.

    Raises
    ------
    ValueError
        If ``speeds`` is not a list of whole percentages from 50 to 200.

    Example
    -------
    >>> augmentation = Augmentation(seed=1, speeds=[95, 100, 105], wave_drop=True)
    >>> needed = augmentation.num_samples_needed(8000)
    >>> crop = np.random.default_rng(1).standard_normal((3, needed), dtype="float32")
    >>> needed, augmentation(crop, "mix", epoch=1, num_samples=8000).shape
    (8400, (3, 8000))
    """

    def __init__(self, seed, speeds=None, wave_drop=False):
        if speeds is not None:
            is_list = isinstance(speeds, list | tuple) and len(speeds) > 0
            if not is_list or not all(isinstance(speed, int) and _SLOWEST <= speed <= _FASTEST for speed in speeds):
                raise ValueError(
                    f"speeds can only be a list of whole percentages from {_SLOWEST} to {_FASTEST}, but got {speeds!r}."
                )
        self.seed = seed
        self.speeds = speeds
        self.wave_drop = wave_drop

    def num_samples_needed(self, num_samples):
        """How many samples to read so that ``num_samples`` are left at the fastest speed."""
        fastest = 100 if self.speeds is None else max(100, *self.speeds)
        return num_samples * fastest // 100  # of which resampling makes num_samples, as it rounds up

    def __call__(self, signals, sample_id, epoch, num_samples=None):
        """Change one crop.

        Arguments
        ---------
        signals : np.ndarray
            ``[1 + N, T]``, float32: the mixture, then the sources.
        sample_id : str
            The mixture's id.
        epoch : int
            The epoch.
        num_samples : int, optional
            The most that the crop may have in the end. None: all there is.

        Returns
        -------
        np.ndarray
            ``[1 + N, T']``, float32.
        """
        if self.speeds is not None:
            rng = seeded_generator("speed", self.seed, epoch, sample_id)
            signals = perturb_speed(signals, rng.choice(self.speeds, size=len(signals) - 1))
        signals = signals[:, :num_samples]
        if self.wave_drop:
            rng = seeded_generator("wave drop", self.seed, epoch, sample_id)
            signals = np.concatenate([drop_waves(signals[0], int(rng.integers(2**63)))[None], signals[1:]])
        return signals
