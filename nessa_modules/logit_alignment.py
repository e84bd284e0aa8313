"""The alignment by speaker logits: embeddings are compared by how they match a set of speakers in either space."""

import torch
from torch.nn import functional

from nessa_modules.linear_alignment import LinearAlignment
from nessa_modules.paired_embeddings import speaker_means

# From here on a vector's norm, computed through the Gram matrix, may be wrong by 1e-16 * 1e10 = 1e-6 of itself.
_MAX_GRAM_CONDITION = 1e10


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
        A [S, Dx] and B [S, Dy], as for :func:`gram_factor`.
    profiles, utterances : Tensor
        [P, Dx] of the enrollment model and [U, Dy] of the runtime model.

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
        """A and B as they are used.

        Arguments
        ---------
        pairs : PairedEmbeddings
            Whose centroids are taken where no classifier weights were given.

        Returns
        -------
        list of Tensor
            A [S, Dx] and B [S, Dy], rows of length 1, float64.
        """
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
