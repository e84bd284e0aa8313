"""The levels of separated voices: the gains with which they add up to their mixture."""

import numpy as np
import scipy.optimize


def mixing_gains(products, cross_products):
    """One gain per voice, with which the voices add up to the mixture as well as they can.

    A voice that goes against the mixture is turned over first: SI-SDR does not see signs, so training may leave an
    output so. Beyond that no gain is negative.

    Arguments
    ---------
    products : np.ndarray
        Sums over time of the products of voices ``i`` and ``j``, [N, N].
    cross_products : np.ndarray
        Sums over time of the products of each voice and the mixture, [N].

    Returns
    -------
    np.ndarray
        Gains [N]: those with the least squared difference. That of a silent voice is 0, of a turned one negative.

    Example
    -------
    >>> voices = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])  # [T, N]
    >>> mixture = np.array([3.0, 0.5, 1.0])
    >>> mixing_gains(voices.T @ voices, voices.T @ mixture)
    array([3. , 0.5])
    """
    signs = np.where(cross_products < 0, -1.0, 1.0)
    products, cross_products = products * np.outer(signs, signs), cross_products * signs
    gains = np.zeros(len(cross_products))
    is_heard = np.diag(products) > 0
    scale = np.sqrt(np.diag(products)[is_heard])  # so that faint and loud voices are solved for equally well
    values, vectors = np.linalg.eigh(products[np.ix_(is_heard, is_heard)] / np.outer(scale, scale))
    is_kept = values > 1e-12  # voices that equal each other leave nothing else
    roots = np.sqrt(values[is_kept])
    if is_kept.any():
        matrix = roots[:, None] * vectors[:, is_kept].T  # [K, N], with the same products
        target = (vectors[:, is_kept].T @ (cross_products[is_heard] / scale)) / roots  # [K]
        gains[is_heard] = scipy.optimize.nnls(matrix, target)[0] / scale
    return gains * signs


class Levels:
    """Gathers what the gains follow from, while voices come block by block.

    Example
    -------
    >>> levels = Levels(num_spks=2)
    >>> levels.add(np.array([1.0, 1.0]), np.array([[0.5, 0.0], [0.0, 2.0]]))
    >>> levels.gains()
    array([2. , 0.5])
    """

    def __init__(self, num_spks):
        self._products = np.zeros((num_spks, num_spks))
        self._cross_products = np.zeros(num_spks)

    def add(self, mixture, voices):
        """Take the next samples: mixture [t] and voices [t, N]."""
        voices = voices.astype(np.float64)
        self._products += voices.T @ voices
        self._cross_products += voices.T @ mixture

    def gains(self):
        """The gains [N] for all that was added: see :func:`mixing_gains`."""
        return mixing_gains(self._products, self._cross_products)
