"""Crops of recordings that depend on (seed, epoch, id) alone."""

import hashlib


def crop_start(num_samples, segment_samples, seed, sample_id, epoch=None):
    """Where a crop begins: a pure function, the same for any number of workers and after a resume.

    Arguments
    ---------
    num_samples, segment_samples : int
        Lengths of the recording and of the crop.
    seed : int
        The run's seed.
    sample_id : str
        The recording's id.
    epoch : int, optional
        None: the same crop in every epoch.

    Returns
    -------
    int
        0 where the recording is no longer than the crop.

    Example
    -------
    >>> crop_start(100, 200, seed=1, sample_id="mix")
    0
    >>> crop_start(10**6, 100, 1, "mix", epoch=1) == crop_start(10**6, 100, 1, "mix", epoch=2)
    False
    """
    room = num_samples - segment_samples
    if room <= 0:
        return 0
    key = f"{seed}/{'' if epoch is None else epoch}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % (room + 1)
