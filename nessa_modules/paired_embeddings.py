"""What alignments are fitted on: two models' embeddings of the same utterances, and whose utterances they are."""

from dataclasses import dataclass

import numpy as np
import torch

_SHORT, _LONG = 1e-12, 1e18  # lengths whose squares float32 holds to full precision lie between


@dataclass(frozen=True)
class PairedEmbeddings:
    """Two models' embeddings of the same K utterances, as :func:`pair_embeddings` gives them."""

    enroll: torch.Tensor  # [K, Dx], length 1, float64
    runtime: torch.Tensor  # [K, Dy], length 1, float64
    speaker_indices: torch.Tensor  # [K], from 0 to S - 1

    @property
    def num_speakers(self):
        """S."""
        return int(self.speaker_indices.max()) + 1

    def of_speakers(self, keep):
        """Those of some speakers only.

        Arguments
        ---------
        keep : Tensor
            Whether to keep a speaker, [S], boolean.

        Returns
        -------
        PairedEmbeddings
            The speakers are numbered anew, in the same order.
        """
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
        sides.append(length_normalised(values, f"{name} to fit an alignment on"))
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


def length_normalised(embeddings, what):
    """Embeddings at length 1, also those whose squares float32 cannot hold.

    Arguments
    ---------
    embeddings : Tensor
        [.., D], floating-point.
    what : str
        Whose embeddings, for the message: it follows "The embeddings".

    Returns
    -------
    Tensor
        [.., D].

    Raises
    ------
    ValueError
        If one is zero or not finite; rows are counted through all leading dimensions.

    Example
    -------
    >>> length_normalised(torch.tensor([[3e-30, 4e-30]]), "of the runtime model")
    tensor([[0.6000, 0.8000]])
    """
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
