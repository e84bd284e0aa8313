"""Alignments that map each side by at most one matrix: none at all, Procrustes rotation and least squares.

The functions compute the matrices; the classes make :class:`nessa_modules.alignment.Alignment` of them.
"""

import math

import numpy as np
import torch

from nessa_modules.alignment import Alignment
from nessa_modules.paired_embeddings import speaker_folds

_NUM_FOLDS = 5
_RIDGES = tuple(10.0**power for power in np.arange(-5, 1.01, 0.5))  # times the mean variance of a dimension


def procrustes_map(source, target):
    """The matrix with orthonormal rows that brings one set of vectors closest to another.

    Schönemann 1966, Psychometrika 31(1), 1-10: from the singular vectors of source^T target.

    Arguments
    ---------
    source, target : Tensor
        [K, D] and [K, E], D <= E, row by row what shall match.

    Returns
    -------
    Tensor
        W [D, E] with W W^T = I, for which ||source W - target|| is least.

    Example
    -------
    >>> points = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> bool(torch.allclose(procrustes_map(points, points @ quarter_turn), quarter_turn, atol=1e-6))
    True
    """
    left, _, right = torch.linalg.svd(source.T @ target, full_matrices=False)  # (D, D), (D), (D, E)
    return left @ right


def procrustes_matrices(pairs):
    """The rotation between two models' embeddings, each without its mean: see :class:`ProcrustesAlignment`.

    Arguments
    ---------
    pairs : PairedEmbeddings

    Returns
    -------
    dict
        From the side that is rotated, ``enroll`` or ``runtime``, to its matrix [D, Dz], float64.

    Example
    -------
    >>> from nessa_modules.paired_embeddings import pair_embeddings
    >>> X = torch.randn(40, 8)
    >>> list(procrustes_matrices(pair_embeddings(X, X[:, :5], [row // 2 for row in range(40)])))
    ['runtime']
    """
    enroll, runtime = (side - side.mean(0) for side in (pairs.enroll, pairs.runtime))
    if enroll.shape[1] < runtime.shape[1]:
        return {"enroll": procrustes_map(enroll, runtime)}
    return {"runtime": procrustes_map(runtime, enroll)}


def ridge_maps(source, target, ridges):
    """Regularised least squares, for several strengths at once.

    Arguments
    ---------
    source, target : Tensor
        [K, D] and [K, E], both without their means.
    ridges : sequence of float
        Each L times: what is added to the D eigenvalues of the covariance matrix, as a share of their mean.

    Returns
    -------
    Tensor
        W [L, D, E], which minimises ||source W - target||^2 + K * ridge * mean eigenvalue * ||W||^2.

    Example
    -------
    >>> source = torch.tensor([[1.0], [-1.0]])
    >>> ridge_maps(source, 3 * source, [0.0, 1.0]).flatten()
    tensor([3.0000, 1.5000])
    """
    _, singular, right = torch.linalg.svd(source, full_matrices=False)  # (R), (R, D), R = min(K, D)
    eigenvalues = singular.square()
    mean = eigenvalues.sum() / source.shape[1]
    cross = right @ (source.T @ target)  # (R, E)
    strengths = mean * torch.as_tensor(list(ridges), dtype=source.dtype)
    # A direction without any variance is mapped to zero, also without a ridge.
    floor = eigenvalues.max() * torch.finfo(source.dtype).eps * max(source.shape)
    inverse = torch.where(eigenvalues > floor, 1 / (eigenvalues + strengths[:, None]).clamp_min(floor), 0)  # (L, R)
    return right.T @ (inverse[:, :, None] * cross)  # (L, D, E)


def least_squares_matrices(pairs, ridge):
    """The regression of one model's embeddings on the other's: see :class:`LeastSquaresAlignment`.

    Arguments
    ---------
    pairs : PairedEmbeddings
    ridge : float
        See :func:`ridge_maps`.

    Returns
    -------
    dict
        ``runtime``: its matrix [Dy, Dx], float64.

    Example
    -------
    >>> from nessa_modules.paired_embeddings import pair_embeddings
    >>> X = torch.randn(40, 8)
    >>> pairs = pair_embeddings(X, X[:, :5], [row // 2 for row in range(40)])
    >>> list(least_squares_matrices(pairs, 0.1)["runtime"].shape)
    [5, 8]
    """
    enroll, runtime = (side - side.mean(0) for side in (pairs.enroll, pairs.runtime))
    return {"runtime": ridge_maps(runtime, enroll, [ridge])[0]}


def choose_ridge(pairs, ridges=_RIDGES, seed=0):
    """The ridge with the least squared error on held-out speakers, from the runtime to the enrollment space.

    Arguments
    ---------
    pairs : PairedEmbeddings
    ridges : sequence of float
        To choose from; of equally good ones the first. Left out: from 1e-5 to 10.
    seed : int
        Of the folds over speakers, five, or as many as there are speakers.

    Returns
    -------
    float

    Example
    -------
    >>> from nessa_modules.paired_embeddings import pair_embeddings
    >>> X = torch.randn(40, 8)
    >>> choose_ridge(pair_embeddings(X, X.flip(1), [row // 2 for row in range(40)]), [0.01, 1.0, 100.0])
    0.01
    """
    folds = speaker_folds(pairs.num_speakers, min(_NUM_FOLDS, pairs.num_speakers), seed)
    errors = torch.zeros(len(ridges), dtype=torch.float64)
    for fold in folds.unique():
        kept, held_out = pairs.of_speakers(folds != fold), pairs.of_speakers(folds == fold)
        means = kept.enroll.mean(0), kept.runtime.mean(0)
        maps = ridge_maps(kept.runtime - means[1], kept.enroll - means[0], ridges)  # (L, Dy, Dx)
        for number, matrix in enumerate(maps):
            estimates = (held_out.runtime - means[1]) @ matrix
            errors[number] += (estimates - (held_out.enroll - means[0])).square().sum()
    return float(ridges[int(errors.argmin())])


class LinearAlignment(Alignment):
    """Base of the alignments that map each side by at most one matrix and one offset."""

    def _map(self, side, embeddings):
        matrix, offset = (self._tensors.get(f"{side}_{part}") for part in ("matrix", "offset"))
        if matrix is not None:
            embeddings = embeddings.to(matrix.dtype) @ matrix  # (.., D) -> (.., Dz)
        return embeddings if offset is None else embeddings + offset

    def _expected_shapes(self):
        shapes = {}
        for side, size in (("enroll", self.enroll_size), ("runtime", self.runtime_size)):
            if f"{side}_matrix" in self._tensors:
                shapes[f"{side}_matrix"] = (size, self.size)
            elif size != self.size:
                shapes[f"{side}_matrix"] = "missing"
            if f"{side}_offset" in self._tensors:
                shapes[f"{side}_offset"] = (self.size,)
        return shapes


class NoAlignment(LinearAlignment):
    """Cosine scoring across the two spaces as if they were one: only where they have the same dimension.

    Example
    -------
    >>> alignment = NoAlignment().fit([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], ["a", "b"])
    >>> alignment.score([[2.0, 0.0]], [[3.0, 0.0], [0.0, 1.0]])
    tensor([[1., 0.]])
    """

    name = "none"

    def _check_fit(self, pairs):
        sizes = pairs.enroll.shape[1], pairs.runtime.shape[1]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "Without an alignment, both models can only have the same number of dimensions, but got "
                f"{sizes[0]} and {sizes[1]}."
            )

    def _fit(self, pairs):
        return {}, {}


class ProcrustesAlignment(LinearAlignment):
    """The rotation that brings one space closest to the other.

    On length-normalised embeddings, from which each side's mean over the alignment utterances is taken first, and
    later in scoring. The space of fewer dimensions is rotated into the other, without loss; of two of the same
    dimension, the runtime space into the enrollment space.

    Example
    -------
    >>> X = torch.randn(40, 8)
    >>> alignment = ProcrustesAlignment().fit(X, X.flip(1), [row // 2 for row in range(40)])
    >>> bool(torch.allclose(alignment.enroll(X), alignment.runtime(X.flip(1)), atol=1e-6))
    True
    """

    name = "procrustes"

    def _fit(self, pairs):
        matrices = procrustes_matrices(pairs)
        return _around_means(pairs, matrices), {"rotated": next(iter(matrices))}


class LeastSquaresAlignment(LinearAlignment):
    """Ridge regression of the enrollment embedding on the runtime embedding.

    On length-normalised embeddings, from which each side's mean over the alignment utterances is taken first, and
    later in scoring. The runtime side is mapped, so that profiles stay in the space of their model. The strength of
    the regularisation is the one with the least squared error on held-out speakers, in five folds over speakers.

    Arguments
    ---------
    ridge : float, optional
        The strength, as a share of the mean variance of a runtime dimension. Left out: chosen.
    seed : int
        Of the folds.

    Raises
    ------
    ValueError
        If the ridge is negative.

    Example
    -------
    >>> X = torch.randn(40, 8)
    >>> alignment = LeastSquaresAlignment().fit(X, 2 * X.flip(1), [row // 2 for row in range(40)])
    >>> alignment.details["ridge"] < 1e-4
    True
    """

    name = "least_squares"

    def __init__(self, ridge=None, seed=0):
        super().__init__()
        if ridge is not None and not 0 <= ridge < math.inf:
            raise ValueError(f"ridge can only be 0 or more, but got {ridge}.")
        self.ridge = ridge
        self.seed = seed

    def _fit(self, pairs):
        ridge = choose_ridge(pairs, seed=self.seed) if self.ridge is None else self.ridge
        return _around_means(pairs, least_squares_matrices(pairs, ridge)), {"ridge": ridge}


def _around_means(pairs, matrices):
    """Tensors of a :class:`LinearAlignment` that takes each side's mean off, then maps by the side's matrix, if any."""
    tensors = {}
    for side in ("enroll", "runtime"):
        offset = -getattr(pairs, side).mean(0)
        if side in matrices:
            tensors[f"{side}_matrix"], offset = matrices[side], offset @ matrices[side]
        tensors[f"{side}_offset"] = offset
    return {name: tensor.float() for name, tensor in tensors.items()}
