"""Losses that train a speaker-embedding model: two contrastive ones, and softmax with an additive margin.

All take a batch of P different speakers with M utterances each, ``[P, M, D]``. The contrastive ones compare the
utterances of the batch with each other and know no speaker by name; the softmax learns a weight vector per training
speaker.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import AngularMargin, LogSoftmaxWrapper
from torch import nn

LOSSES = ("prototypical", "ge2e", "am_softmax")
_LEAST_SCALE = 1e-6  # the learned scale stays positive, so that more alike never scores less


@dataclass
class LossResult:
    """What a loss says of a batch.

    Attributes
    ----------
    loss : torch.Tensor
        The mean over the queries (the utterances that are classified), nats, with gradient.
    accuracy : torch.Tensor
        Per query ``[Q]``: 1 where its own speaker scores best, else 0.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor


def prototypical_cosines(embeddings):
    """Cosines of each speaker's last utterance with each speaker's prototype, the mean of the other utterances.

    J. S. Chung et al., "In defence of metric learning for speaker recognition", 2020
    (https://arxiv.org/abs/2003.11982), section 2.2: angular prototypical.

    Arguments
    ---------
    embeddings : torch.Tensor
        ``[P, M, D]``, M at least 2.

    Returns
    -------
    torch.Tensor
        ``[P, P]``: ``[j, k]`` is of speaker j's query with speaker k's prototype.

    Raises
    ------
    ValueError
        For another shape.

    Example
    -------
    >>> east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> prototypical_cosines(torch.stack([torch.stack([east, east]), torch.stack([north, east])]))
    tensor([[1., 0.],
            [1., 0.]])
    """
    _check(embeddings, least_utterances=2)
    queries = F.normalize(embeddings[:, -1], dim=-1)  # (P, D)
    prototypes = F.normalize(embeddings[:, :-1].mean(1), dim=-1)  # (P, D)
    return queries @ prototypes.T


def ge2e_cosines(embeddings):
    """Cosines of each utterance with each speaker's centroid; for its own speaker the centroid of the others.

    L. Wan et al., "Generalized end-to-end loss for speaker verification", 2018 (https://arxiv.org/abs/1710.10467),
    equations 1, 8 and 9: centroids are means of length-normalised embeddings.

    Arguments
    ---------
    embeddings : torch.Tensor
        ``[P, M, D]``, M at least 2.

    Returns
    -------
    torch.Tensor
        ``[P, M, P]``: ``[j, i, k]`` is of speaker j's utterance i with speaker k.

    Raises
    ------
    ValueError
        For another shape.

    Example
    -------
    >>> east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> ge2e_cosines(torch.stack([torch.stack([east, east]), torch.stack([north, north])]))[0]
    tensor([[1., 0.],
            [1., 0.]])
    """
    _check(embeddings, least_utterances=2)
    num_speakers, num_utterances, _ = embeddings.shape
    embeddings = F.normalize(embeddings, dim=-1)  # (P, M, D)
    sums = embeddings.sum(1)  # (P, D)
    cosines = embeddings @ F.normalize(sums, dim=-1).T  # (P, M, P)
    others = F.normalize(sums[:, None] - embeddings, dim=-1)  # (P, M, D), without the utterance itself
    own = (embeddings * others).sum(-1, keepdim=True)  # (P, M, 1)
    is_own = torch.eye(num_speakers, dtype=torch.bool, device=embeddings.device)[:, None]  # (P, 1, P)
    return torch.where(is_own.expand(-1, num_utterances, -1), own, cosines)


class ContrastiveLoss(nn.Module):
    """Cross entropy over the speakers of the batch, of scaled and shifted cosines: prototypical, or GE2E's softmax.

    Arguments
    ---------
    kind : str
        ``prototypical`` (:func:`prototypical_cosines`) or ``ge2e`` (:func:`ge2e_cosines`).
    init_scale, init_bias : float
        What the learned scale (positive) and bias begin with; the defaults are those of both papers.

    Raises
    ------
    ValueError
        For another kind, or a scale that is not positive.

    Example
    -------
    >>> loss = ContrastiveLoss("prototypical")
    >>> apart = torch.eye(3)[:, None].repeat(1, 2, 1)  # three speakers, each in a direction of its own
    >>> result = loss(apart)
    >>> result.accuracy.tolist(), round(float(result.loss.detach()), 6)
    ([1.0, 1.0, 1.0], 9.1e-05)
    """

    def __init__(self, kind, init_scale=10.0, init_bias=-5.0):
        super().__init__()
        kinds = {"prototypical": prototypical_cosines, "ge2e": ge2e_cosines}
        if kind not in kinds:
            raise ValueError(f"kind can only be one of {', '.join(kinds)}, but got {kind!r}.")
        if not init_scale > 0:
            raise ValueError(f"init_scale can only be positive, but got {init_scale!r}.")
        self.kind = kind
        self._cosines = kinds[kind]
        self.scale = nn.Parameter(torch.tensor(float(init_scale)))
        self.bias = nn.Parameter(torch.tensor(float(init_bias)))

    def forward(self, embeddings, speakers=None):
        """The loss of a batch.

        Arguments
        ---------
        embeddings : torch.Tensor
            ``[P, M, D]``, of P different speakers.
        speakers : torch.Tensor, optional
            Not used: these losses know no speaker by name.

        Returns
        -------
        LossResult
            Of Q = P queries (prototypical) or Q = P x M (GE2E).
        """
        del speakers
        cosines = self._cosines(embeddings)  # (P, P) or (P, M, P)
        own = torch.arange(len(embeddings), device=embeddings.device)
        own = own if cosines.dim() == 2 else own[:, None].expand(-1, cosines.shape[1])
        cosines, own = cosines.flatten(0, -2), own.flatten()  # (Q, P), (Q,)
        scores = cosines * self.scale.clamp(min=_LEAST_SCALE) + self.bias
        return LossResult(F.cross_entropy(scores, own), _accuracy(cosines, own))


class AdditiveMarginSoftmax(nn.Module):
    """Softmax over the training speakers, whose own cosine has to lead by a margin.

    F. Wang et al., "Additive margin softmax for face verification", 2018 (https://arxiv.org/abs/1801.05599). The
    parts are SpeechBrain's: its ECAPA recipe's classifier, and ``AngularMargin``, which is this margin on the cosine
    (``AdditiveAngularMargin`` would be the one on the angle).

    Arguments
    ---------
    embedding_size : int
        D.
    num_speakers : int
        Of the training set.
    margin : float
        Of the cosine, 0 up to 1.
    scale : float
        Of the cosines, positive.

    Attributes
    ----------
    classifier : speechbrain.lobes.models.ECAPA_TDNN.Classifier
        Its ``weight`` is ``[num_speakers, D]``.

    Raises
    ------
    ValueError
        If there are fewer than two speakers, or margin and scale are out of range.

    Example
    -------
    >>> loss = AdditiveMarginSoftmax(embedding_size=8, num_speakers=5)
    >>> result = loss(torch.randn(3, 2, 8), torch.tensor([4, 0, 2]))
    >>> result.loss.shape, result.accuracy.shape
    (torch.Size([]), torch.Size([6]))
    """

    def __init__(self, embedding_size, num_speakers, margin=0.2, scale=30.0):
        super().__init__()
        if not isinstance(num_speakers, int) or num_speakers < 2:
            raise ValueError(f"am_softmax needs at least 2 training speakers, but got {num_speakers!r}.")
        if not 0 <= margin <= 1 or not scale > 0:
            raise ValueError(
                f"margin can only be 0 to 1 and scale only positive, but got margin {margin!r} and scale {scale!r}."
            )
        self.classifier = Classifier(input_size=embedding_size, out_neurons=num_speakers)
        self.log_softmax = LogSoftmaxWrapper(AngularMargin(margin=margin, scale=scale))

    def forward(self, embeddings, speakers):
        """The loss of a batch.

        Arguments
        ---------
        embeddings : torch.Tensor
            ``[P, M, D]``.
        speakers : torch.Tensor
            Each speaker's number in the training set, ``[P]``.

        Returns
        -------
        LossResult
            Of Q = P x M queries.
        """
        _check(embeddings, least_utterances=1)
        speakers = speakers.to(embeddings.device)[:, None].expand(-1, embeddings.shape[1]).flatten()  # (Q,)
        cosines = self.classifier(embeddings.flatten(0, 1)[:, None])  # (Q, 1, S)
        return LossResult(self.log_softmax(cosines, speakers[:, None]), _accuracy(cosines[:, 0], speakers))


def make_loss(kind, embedding_size, num_speakers, margin=0.2, scale=30.0):
    """The loss by name.

    Arguments
    ---------
    kind : str
        One of :data:`LOSSES`.
    embedding_size, num_speakers, margin, scale
        Of ``am_softmax``, as for :class:`AdditiveMarginSoftmax`; the others need none of them.

    Returns
    -------
    torch.nn.Module
        Called with embeddings ``[P, M, D]`` and speakers ``[P]``, it returns a :class:`LossResult`.

    Raises
    ------
    ValueError
        For another kind.

    Example
    -------
    >>> make_loss("arcface", 192, 100)
    Traceback (most recent call last):
    ValueError: loss can only be one of prototypical, ge2e, am_softmax, but got 'arcface'.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss can only be one of {', '.join(LOSSES)}, but got {kind!r}.")
    if kind == "am_softmax":
        return AdditiveMarginSoftmax(embedding_size, num_speakers, margin, scale)
    return ContrastiveLoss(kind)


def _accuracy(cosines, own):
    return (cosines.detach().argmax(-1) == own).to(cosines.dtype)  # (Q,)


def _check(embeddings, least_utterances):
    shape = list(embeddings.shape)
    if len(shape) != 3 or shape[0] < 2 or shape[1] < least_utterances:
        raise ValueError(
            f"embeddings can only be [P, M, D] of at least 2 speakers with at least {least_utterances} utterances "
            f"each, but got shape {shape}."
        )
