"""Alignments map two frozen models' embeddings so that a profile of one can be scored with an utterance of the other.

Every alignment has one interface, :class:`Alignment`: fitted on embeddings that both models made of the same
utterances, it maps profiles of the enrollment model and utterances of the runtime model to vectors whose cosine is
the score. Embeddings are length-normalised first, always and by the alignment itself: what the extractors were
trained to compare is their direction. Here are those with a closed form; the trained one is in
:mod:`nessa_modules.nessa`.
"""

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from shared_modules.files import write_whole
from shared_modules.model_files import read_state, read_text_file

ALIGNMENTS = ("none", "logit", "procrustes", "least_squares", "nessa_start", "nessa", "nessa_runtime")

DESCRIPTION_FILE = "alignment.json"
ALIGNMENT_FOLDER = "alignment"  # of a run
_FORMAT = 1
_TENSORS_FILE = "alignment-{}.pt"  # {}: the alignment's id, so that description and tensors cannot be mixed up

# From here on a vector's norm, computed through the Gram matrix, may be wrong by 1e-16 * 1e10 = 1e-6 of itself.
_MAX_GRAM_CONDITION = 1e10

_SHORT, _LONG = 1e-12, 1e18  # lengths whose squares float32 holds to full precision lie between

_NUM_FOLDS = 5
_RIDGES = tuple(10.0**power for power in np.arange(-5, 1.01, 0.5))  # times the mean variance of a dimension


def gram_factor(enroll_weight, runtime_weight):
    """A small matrix R whose columns have the inner products of the columns of two weight matrices side by side.

    With R = [R_e R_r], the vectors R_e x and R_r y have the norms and the inner product of the logits A x and B y,
    for any x and y: cosine scoring of S logits costs no more than that of min(S, Dx + Dy) numbers. R is the Cholesky
    factor of the Gram matrix of [A B]. Where there are fewer speakers than dimensions, or the Gram matrix is
    singular up to rounding, R is that of the QR decomposition instead, which needs no Gram matrix.

    Arguments
    ---------
    enroll_weight : Tensor
        A [S, Dx]; a row is a speaker.
    runtime_weight : Tensor
        B [S, Dy]; the same speakers in the same order.

    Returns
    -------
    Tensor
        R [min(S, Dx + Dy), Dx + Dy], upper triangular, float64.

    Example
    -------
    >>> A, B = torch.eye(3)[:, :1], torch.ones(3, 1)
    >>> gram_factor(A, B)
    tensor([[1.0000, 1.0000],
            [0.0000, 1.4142]], dtype=torch.float64)
    """
    both = torch.cat([enroll_weight.double(), runtime_weight.double()], dim=1)  # (S, Dx + Dy)
    if len(both) >= both.shape[1]:
        gram = both.T @ both  # (Dx + Dy, Dx + Dy)
        eigenvalues = torch.linalg.eigvalsh(gram)
        if eigenvalues[0] * _MAX_GRAM_CONDITION > eigenvalues[-1]:
            return torch.linalg.cholesky(gram, upper=True)
    return torch.linalg.qr(both, mode="r").R


def logit_scores(enroll_weight, runtime_weight, profiles, utterances):
    """Cosines between all logits, computed as they are defined: what :class:`LogitAlignment` computes cheaper.

    Arguments
    ---------
    enroll_weight, runtime_weight : Tensor
        A [S, Dx] and B [S, Dy].
    profiles, utterances : Tensor
        [P, Dx] and [U, Dy].

    Returns
    -------
    Tensor
        [P, U].

    Example
    -------
    >>> A, B = torch.eye(3)[:, :1], torch.ones(3, 1)
    >>> logit_scores(A, B, torch.ones(1, 1), torch.ones(1, 1))
    tensor([[0.5774]])
    """
    enroll_logits = functional.normalize(profiles @ enroll_weight.T, dim=-1)  # (P, S)
    return enroll_logits @ functional.normalize(utterances @ runtime_weight.T, dim=-1).T  # (P, U)


def speaker_means(embeddings, speaker_indices):
    """The mean embedding of each speaker.

    Arguments
    ---------
    embeddings : Tensor
        [K, D].
    speaker_indices : Tensor
        [K], from 0 to S - 1, each of which occurs.

    Returns
    -------
    Tensor
        [S, D].

    Example
    -------
    >>> speaker_means(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))
    tensor([[2.],
            [5.]])
    """
    counts = torch.bincount(speaker_indices)
    sums = embeddings.new_zeros(len(counts), embeddings.shape[1]).index_add_(0, speaker_indices, embeddings)
    return sums / counts[:, None]


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


def speaker_folds(num_speakers, num_folds, seed):
    """Which of several equal parts each speaker is in, at random: for cross-validation over speakers.

    Arguments
    ---------
    num_speakers, num_folds : int
    seed : int

    Returns
    -------
    Tensor
        [S], from 0 to num_folds - 1.

    Example
    -------
    >>> speaker_folds(6, 3, seed=0).bincount()
    tensor([2, 2, 2])
    """
    order = torch.randperm(num_speakers, generator=torch.Generator().manual_seed(seed))
    return torch.empty(num_speakers, dtype=torch.int64).index_copy_(0, order, torch.arange(num_speakers) % num_folds)


@dataclass(frozen=True)
class PairedEmbeddings:
    """What alignments are fitted on: two models' embeddings of the same K utterances."""

    enroll: torch.Tensor  # [K, Dx], length 1, float64
    runtime: torch.Tensor  # [K, Dy], length 1, float64
    speaker_indices: torch.Tensor  # [K], from 0 to S - 1

    @property
    def num_speakers(self):
        """S."""
        return int(self.speaker_indices.max()) + 1

    def of_speakers(self, keep):
        """Those of some speakers only, numbered anew; keep is a mask [S]."""
        rows = keep[self.speaker_indices]
        indices = (keep.cumsum(0) - 1)[self.speaker_indices[rows]]
        return PairedEmbeddings(self.enroll[rows], self.runtime[rows], indices)


def pair_embeddings(X, Y, speakers):
    """Check embeddings to fit an alignment on, and length-normalise them.

    Arguments
    ---------
    X, Y : Tensor or numpy array
        [K, Dx] of the enrollment model and [K, Dy] of the runtime model: row by row the same K utterances.
    speakers : sequence
        The K utterances' speakers, names or numbers.

    Returns
    -------
    PairedEmbeddings
        The speakers are numbered in the order of their names.

    Raises
    ------
    ValueError
        If rows do not correspond, an embedding is zero or not finite, or there are fewer than two speakers.

    Example
    -------
    >>> pairs = pair_embeddings([[3.0, 4.0], [0.0, 2.0]], [[1.0], [-2.0]], ["b", "a"])
    >>> pairs.enroll.tolist(), pairs.runtime.tolist(), pairs.speaker_indices.tolist()
    ([[0.6, 0.8], [0.0, 1.0]], [[1.0], [-1.0]], [1, 0])
    """
    sides = []
    for name, values in (("X", X), ("Y", Y)):
        values = torch.as_tensor(values).detach().cpu().double()
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"{name} can only be embeddings [utterances, dimensions], but got {list(values.shape)}.")
        sides.append(_length_normalised(values, f"{name} to fit an alignment on"))
        if len(values) > 1 and (sides[-1] - sides[-1][0]).abs().max() < 1e-9:
            raise ValueError(f"The embeddings {name} to fit an alignment on can only differ, but all are the same.")
    if torch.is_tensor(speakers):
        speakers = speakers.tolist()
    speakers = list(speakers)
    if not len(sides[0]) == len(sides[1]) == len(speakers):
        raise ValueError(
            "X, Y and speakers can only be of the same utterances, row by row, but got "
            f"{len(sides[0])}, {len(sides[1])} and {len(speakers)} rows."
        )
    names, indices = np.unique(np.array([str(speaker) for speaker in speakers]), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"An alignment can only be fitted on two speakers or more, but got only {str(names[0])!r}.")
    return PairedEmbeddings(*sides, torch.as_tensor(indices.reshape(-1)))


def _length_normalised(embeddings, what):
    """Embeddings [.., D] at length 1, or a ValueError that says what is wrong with them."""
    lengths = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    if lengths.numel():
        shortest, longest = lengths.aminmax()  # NaN where one is
        if shortest.item() > _SHORT and longest.item() < _LONG:
            return embeddings / lengths
    # The squares of float32 embeddings may have overflowed or vanished.
    embeddings = embeddings / embeddings.abs().amax(dim=-1, keepdim=True)
    lengths = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    if not torch.isfinite(lengths).all():  # 0 / 0 is NaN
        rows = (~torch.isfinite(lengths)).flatten().nonzero().flatten().tolist()
        raise ValueError(
            f"The embeddings {what} can only be finite and other than zero, but row {rows[0]} is not"
            f"{f', and {len(rows) - 1} more are not' if len(rows) > 1 else ''}."
        )
    return embeddings / lengths


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
    >>> X = torch.randn(40, 8)
    >>> list(procrustes_matrices(pair_embeddings(X, X[:, :5], [row // 2 for row in range(40)])))
    ['runtime']
    """
    enroll, runtime = (side - side.mean(0) for side in (pairs.enroll, pairs.runtime))
    if enroll.shape[1] < runtime.shape[1]:
        return {"enroll": procrustes_map(enroll, runtime)}
    return {"runtime": procrustes_map(runtime, enroll)}


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
    >>> X = torch.randn(40, 8)
    >>> pairs = pair_embeddings(X, X[:, :5], [row // 2 for row in range(40)])
    >>> list(least_squares_matrices(pairs, 0.1)["runtime"].shape)
    [5, 8]
    """
    enroll, runtime = (side - side.mean(0) for side in (pairs.enroll, pairs.runtime))
    return {"runtime": ridge_maps(runtime, enroll, [ridge])[0]}


def _around_means(pairs, matrices):
    """Tensors of a :class:`LinearAlignment` that takes each side's mean off, then maps by the side's matrix, if any."""
    tensors = {}
    for side in ("enroll", "runtime"):
        offset = -getattr(pairs, side).mean(0)
        if side in matrices:
            tensors[f"{side}_matrix"], offset = matrices[side], offset @ matrices[side]
        tensors[f"{side}_offset"] = offset
    return {name: tensor.float() for name, tensor in tensors.items()}


class Alignment:
    """Base of all alignments: checks, scoring, and a folder on the disk. A subclass says how to fit and to map.

    All is computed on the CPU. A fitted alignment is a few named tensors.

    Attributes
    ----------
    name : str
        The kind, one of :data:`ALIGNMENTS`.
    enroll_size, runtime_size, size : int or None
        Dx, Dy, and the dimension Dz of the space where scores are computed; None before the fit.
    details : dict
        What the fit chose and found, as numbers and strings.
    history : list of dict
        Where the fit trained: ``step`` and ``held_out_cost``, the cost of held-out speakers. Not saved.
    enroll_model_id, runtime_model_id : str or None
        The models whose embeddings are aligned, once saved.
    calibration : list of dict
        Thresholds, each as ``{"false_accept_rate": rate, "threshold": score}``. No part of :attr:`alignment_id`.
    """

    name = ""

    def __init__(self):
        self.enroll_size = self.runtime_size = self.size = None
        self.enroll_model_id = self.runtime_model_id = None
        self.details = {}
        self.history = []
        self.calibration = []
        self._tensors = {}

    # What a subclass says

    def _fit(self, pairs):
        """Fit on :class:`PairedEmbeddings`; return named tensors and the details."""
        raise NotImplementedError

    def _map(self, side, embeddings):
        """Map embeddings [.., D] of length 1, of the side ``enroll`` or ``runtime``, to [.., Dz]."""
        raise NotImplementedError

    def _expected_shapes(self):
        """The shape that each tensor of :attr:`_tensors` must have, given the three sizes and which there are."""
        raise NotImplementedError

    def _settings(self):
        """Of the alignment's description: what beside the sizes and tensors decides how embeddings are mapped."""
        return {}

    # For everyone

    def fit(self, X, Y, speakers):
        """Fit to two models' embeddings of the same utterances.

        A speaker may have a single utterance. Then nothing but that utterance can stand for the speaker on both sides,
        and the two embeddings share its session: what is learned from such speakers takes the session for a trait of
        the speaker.

        Arguments
        ---------
        X, Y : Tensor or numpy array
            [K, Dx] of the enrollment model and [K, Dy] of the runtime model, row by row of the same K utterances, as
            the models give them.
        speakers : sequence
            The K utterances' speakers, names or numbers.

        Returns
        -------
        Alignment
            This one.

        Raises
        ------
        ValueError
            If rows do not correspond, an embedding is zero or not finite, or there are fewer than two speakers.
        """
        # Training needs gradients, also where the caller wants none.
        with torch.inference_mode(False), torch.enable_grad():
            pairs = pair_embeddings(X, Y, speakers)
            self._check_fit(pairs)
            tensors, details = self._fit(pairs)
        self._tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        self.details = {"num_utterances": len(pairs.enroll), "num_speakers": pairs.num_speakers, **details}
        self.enroll_size, self.runtime_size = pairs.enroll.shape[1], pairs.runtime.shape[1]
        with torch.no_grad():
            self.size = self._map("enroll", pairs.enroll[:1].float()).shape[-1]
        self.calibration = []
        return self

    def _check_fit(self, pairs):
        """Refuse embeddings that this kind cannot align."""

    @torch.no_grad()
    def enroll(self, x):
        """Map embeddings or profiles of the enrollment model.

        Arguments
        ---------
        x : Tensor or numpy array
            [.., Dx], as the model gives them, or a profile: the mean of the length-normalised embeddings of a
            speaker's enrolled utterances.

        Returns
        -------
        Tensor
            [.., Dz], float32. Only the direction has a meaning, except with ``logit``: there the length is that of
            the logit vector.

        Raises
        ------
        ValueError
            If the alignment is not fitted, the dimension is another, or a vector is zero or not finite.
        """
        return self._mapped("enroll", x, self.enroll_size)

    @torch.no_grad()
    def runtime(self, y):
        """Map embeddings of the runtime model [.., Dy] to [.., Dz], as :meth:`enroll` those of the other."""
        return self._mapped("runtime", y, self.runtime_size)

    def _mapped(self, side, embeddings, size):
        if size is None:
            raise ValueError(f"The alignment {self.name!r} can only be used once it is fitted or loaded.")
        embeddings = torch.as_tensor(embeddings).detach().cpu()
        if not embeddings.is_floating_point():
            embeddings = embeddings.float()
        if embeddings.ndim == 0 or embeddings.shape[-1] != size:
            raise ValueError(
                f"Embeddings of the {side} model can only have {size} dimensions, but got {list(embeddings.shape)}."
            )
        return self._map(side, _length_normalised(embeddings, f"of the {side} model")).float()

    @torch.no_grad()
    def score(self, profiles, utterances):
        """Score every profile with every utterance.

        Arguments
        ---------
        profiles : Tensor or numpy array
            [P, Dx], of the enrollment model.
        utterances : Tensor or numpy array
            [U, Dy], of the runtime model.

        Returns
        -------
        Tensor
            [P, U], the cosine of the mapped vectors, float32.

        Raises
        ------
        ValueError
            As :meth:`enroll`.
        """
        mapped = functional.normalize(self.enroll(profiles), dim=-1)  # (P, Dz)
        return mapped @ functional.normalize(self.runtime(utterances), dim=-1).T  # (P, U)

    # On the disk

    @property
    def num_parameters(self):
        """Numbers that the fit determined, both sides together."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def num_bytes(self):
        """Bytes of the two files that :meth:`save` writes."""
        return len(self._serialised()) + len(self._description().encode())

    @property
    def alignment_id(self):
        """16 hexadecimal digits that stand for the kind, the tensors and the two models, not for the calibration."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.name, self._settings(), self.enroll_model_id, self.runtime_model_id]).encode())
        digest.update(json.dumps([self.enroll_size, self.runtime_size, self.size]).encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _serialised(self):
        stream = io.BytesIO()
        torch.save(self._tensors, stream)
        return stream.getvalue()

    def _description(self):
        description = {
            "format": _FORMAT,
            "kind": self.name,
            "alignment_id": self.alignment_id,
            "enroll_model_id": self.enroll_model_id,
            "runtime_model_id": self.runtime_model_id,
            "enroll_size": self.enroll_size,
            "runtime_size": self.runtime_size,
            "size": self.size,
            "settings": self._settings(),
            "details": self.details,
            "calibration": self.calibration,
        }
        return json.dumps(description, indent=1) + "\n"

    def save(self, folder, enroll_model_id=None, runtime_model_id=None):
        """Write the alignment into a folder, in the place of one that is there: whole, or not at all.

        The tensors' file has the alignment's id in its name and is written first; the description, which names
        it, replaces the old one in one step.

        Arguments
        ---------
        folder : str or Path
            Created where it is missing.
        enroll_model_id, runtime_model_id : str, optional
            The two models. Left out: those that the alignment has.

        Raises
        ------
        ValueError
            If the alignment is not fitted, or a model is not known.
        """
        if self.enroll_size is None:
            raise ValueError(f"The alignment {self.name!r} can only be saved once it is fitted.")
        ids = (enroll_model_id or self.enroll_model_id, runtime_model_id or self.runtime_model_id)
        if not all(isinstance(each, str) and each for each in ids):
            raise ValueError(f"An alignment can only be saved with the ids of its two models, but got {ids}.")
        self.enroll_model_id, self.runtime_model_id = ids
        self.calibration = _checked_calibration(self.calibration, "This alignment")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors_path = folder / _TENSORS_FILE.format(self.alignment_id)
        with write_whole(tensors_path, "wb") as stream:
            stream.write(self._serialised())
        with write_whole(folder / DESCRIPTION_FILE) as stream:
            stream.write(self._description())
        for path in folder.glob(_TENSORS_FILE.format("*")):
            if path != tensors_path:
                path.unlink(missing_ok=True)


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


class LogitAlignment(LinearAlignment):
    """Cosine scoring between logits over a shared set of speakers, at a cost that does not grow with the speakers.

    The logits are A x and B y, where a row of A [S, Dx] and of B [S, Dy] stands for a speaker in either space: the
    weights of the classifiers that the models were trained with, or, for models trained with a contrastive loss, the
    centroids of the alignment speakers, the means of their length-normalised embeddings. Rows are length-normalised,
    as additive-margin softmax does: a logit is a cosine. They are scored through :func:`gram_factor`.

    Arguments
    ---------
    enroll_weight, runtime_weight : Tensor or numpy array, optional
        A and B, of the same speakers in the same order. Left out: the centroids.
    center : bool
        Whether the mean embedding of the alignment utterances is taken off the embeddings of each side first, and so
        off the centroids. Cosine scoring of logits is defined without, hence the default.

    Raises
    ------
    ValueError
        If only one of the weights is given, or they are not of the same speakers.

    Example
    -------
    >>> X, Y = torch.randn(2, 40, 8)
    >>> alignment = LogitAlignment().fit(X, Y, [row // 2 for row in range(40)])
    >>> alignment.enroll_size, alignment.runtime_size, alignment.size
    (8, 8, 16)
    """

    name = "logit"

    def __init__(self, enroll_weight=None, runtime_weight=None, center=False):
        super().__init__()
        if (enroll_weight is None) != (runtime_weight is None):
            raise ValueError("Classifier weights can only be given for both models or for none, but got one.")
        self._weights = None
        if enroll_weight is not None:
            self._weights = tuple(
                torch.as_tensor(weight).detach().cpu().double() for weight in (enroll_weight, runtime_weight)
            )
            shapes = [list(weight.shape) for weight in self._weights]
            if not (len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][0]):
                raise ValueError(
                    "Classifier weights can only be [speakers, dimensions] of the same speakers, but got "
                    f"{shapes[0]} and {shapes[1]}."
                )
        self.center = center

    def _check_fit(self, pairs):
        for side, embeddings, weight in zip(
            ("enroll", "runtime"), (pairs.enroll, pairs.runtime), self._weights or (None, None), strict=True
        ):
            if weight is not None and weight.shape[1] != embeddings.shape[1]:
                raise ValueError(
                    f"The classifier weights of the {side} model can only have its {embeddings.shape[1]} dimensions, "
                    f"but got {weight.shape[1]}."
                )

    def speaker_weights(self, pairs):
        """A [S, Dx] and B [S, Dy] as they are used, of length 1, float64."""
        weights = self._weights
        if weights is None:
            sides = (pairs.enroll, pairs.runtime)
            if self.center:
                sides = [side - side.mean(0) for side in sides]
            weights = [speaker_means(side, pairs.speaker_indices) for side in sides]
        return [functional.normalize(weight, dim=1) for weight in weights]

    def _fit(self, pairs):
        enroll_weight, runtime_weight = self.speaker_weights(pairs)
        factor = gram_factor(enroll_weight, runtime_weight)  # (Dz, Dx + Dy)
        matrices = factor.split([pairs.enroll.shape[1], pairs.runtime.shape[1]], dim=1)
        tensors = {"enroll_matrix": matrices[0].T, "runtime_matrix": matrices[1].T}
        if self.center:
            tensors["enroll_offset"] = -pairs.enroll.mean(0) @ tensors["enroll_matrix"]
            tensors["runtime_offset"] = -pairs.runtime.mean(0) @ tensors["runtime_matrix"]
        # In float64: rounded to float32, small differences between large logits would be lost.
        return tensors, {"num_logits": len(enroll_weight), "center": self.center}


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


def _kinds():
    # Here, because the trained alignments build on this module.
    from nessa_modules.nessa import Nessa, NessaRuntime, NessaStart

    closed_forms = (NoAlignment, LogitAlignment, ProcrustesAlignment, LeastSquaresAlignment, NessaStart)
    classes = (*closed_forms, Nessa, NessaRuntime)
    return {each.name: each for each in classes}


def make_alignment(kind, **options):
    """A new alignment, to be fitted.

    Arguments
    ---------
    kind : str
        One of :data:`ALIGNMENTS`: ``none``, ``logit``, ``procrustes``, ``least_squares``, ``nessa`` (both sides are
        mapped), ``nessa_start`` (the same before its training) or ``nessa_runtime`` (only the runtime side is).
    **options
        Those of the kind's class.

    Returns
    -------
    Alignment

    Raises
    ------
    ValueError
        If there is no such kind.

    Example
    -------
    >>> make_alignment("logit", center=True).center
    True
    >>> make_alignment("rotation")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: The alignment can only be none, logit, ... or nessa_runtime, but got 'rotation'.
    """
    if kind not in ALIGNMENTS:
        raise ValueError(
            f"The alignment can only be {', '.join(ALIGNMENTS[:-1])} or {ALIGNMENTS[-1]}, but got {kind!r}."
        )
    return _kinds()[kind](**options)


def load_alignment(folder):
    """Read an alignment that :meth:`Alignment.save` wrote. No code of the folder is run.

    Arguments
    ---------
    folder : str or Path
        That of the alignment, or of the run of ``train_alignment.py`` that made it.

    Returns
    -------
    Alignment
        With ``enroll_model_id``, ``runtime_model_id``, ``alignment_id`` and ``calibration``.

    Raises
    ------
    ValueError
        If there is none, or it is not as it was written.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> X = torch.randn(40, 8)
    >>> alignment = make_alignment("procrustes").fit(X, X.flip(1), [row // 2 for row in range(40)])
    >>> alignment.save(folder, "model of 2023", "model of 2024")
    >>> load_alignment(folder).alignment_id == alignment.alignment_id
    True
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION_FILE).exists() and (folder / ALIGNMENT_FOLDER / DESCRIPTION_FILE).exists():
        folder = folder / ALIGNMENT_FOLDER  # of a run
    path = folder / DESCRIPTION_FILE
    try:
        description = json.loads(read_text_file(path))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no alignment: {path.name} is missing.") from None
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no alignment's description: {error}.") from None
    alignment = _read_description(description, path)
    tensors_path = folder / _TENSORS_FILE.format(description["alignment_id"])
    tensors = {name: tensor.detach() for name, tensor in read_state(tensors_path).items()}
    _check_tensors(alignment, tensors, tensors_path)
    if alignment.alignment_id != description["alignment_id"]:
        raise ValueError(
            f"{folder} was changed since it was written: its content has the id {alignment.alignment_id}, but "
            f"{path.name} says {description['alignment_id']}."
        )
    return alignment


def _read_description(description, path):
    """The alignment that a description describes, without its tensors."""
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{path} can only be of format {_FORMAT}, but got {found!r}.")
    kind, settings = description.get("kind"), description.get("settings")
    if kind not in ALIGNMENTS:
        raise ValueError(f"{path} is of an unknown kind of alignment: {kind!r}.")
    identity = description.get("alignment_id")
    if not (isinstance(identity, str) and len(identity) == 16 and set(identity) <= set("0123456789abcdef")):
        raise ValueError(f"The alignment_id in {path} can only be 16 hexadecimal digits, but got {identity!r}.")
    alignment = make_alignment(kind)
    for name in ("enroll_size", "runtime_size", "size"):
        value = description.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1_000_000:
            raise ValueError(f"{name} in {path} can only be a number of dimensions, but got {value!r}.")
        setattr(alignment, name, value)
    for name in ("enroll_model_id", "runtime_model_id"):
        value = description.get(name)
        if not (isinstance(value, str) and value):
            raise ValueError(f"{name} in {path} can only be the id of a model, but got {value!r}.")
        setattr(alignment, name, value)
    if settings != alignment._settings():
        raise ValueError(f"{path} has settings that this version does not know: {settings!r}.")
    details = description.get("details")
    alignment.details = details if isinstance(details, dict) else {}
    alignment.calibration = _checked_calibration(description.get("calibration"), str(path))
    return alignment


def _checked_calibration(calibration, where):
    entries = calibration if isinstance(calibration, list) else [calibration]
    for entry in entries:
        is_entry = isinstance(entry, dict) and set(entry) == {"false_accept_rate", "threshold"}
        numbers = [v for v in entry.values() if type(v) in (int, float)] if is_entry else []
        # Beyond 1 only by what keeps even a perfect match out.
        if not (len(numbers) == 2 and 0 <= entry["false_accept_rate"] <= 1 and -1.1 <= entry["threshold"] <= 1.1):
            raise ValueError(f"{where} has a calibration that is no rate with its threshold: {entry!r}.")
    return entries


def _check_tensors(alignment, tensors, path):
    """Give an alignment its tensors, if they fit its description."""
    if not all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors.values()):
        raise ValueError(f"{path} can only hold tensors of float32 or float64.")
    alignment._tensors = tensors
    expected = alignment._expected_shapes()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        name = wrong[0]
        raise ValueError(
            f"{path} does not fit its description: {name} can only be {expected.get(name, 'missing')}, but got "
            f"{found.get(name, 'none')}."
        )
