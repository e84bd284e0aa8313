"""Permutation-invariant and layer-wise losses on SI-SDR. Losses are negative SI-SDR in dB."""

import math
from dataclasses import dataclass

import torch

from dsd_modules.permutation import MAX_EXHAUSTIVE_SPKS, permutation_losses, solve_assignment

LAYER_WEIGHTS = ("uniform", "ramp")
LAYER_PERMUTATIONS = ("shared", "independent")
# SI-SDR lies within +-80 dB: beyond, it has no gradient, and float32 signals could not tell anyway.
_BOUND_DB = 80.0
_LEAST_SHARE = 1e-8  # of the target or of the distortion in the estimate's energy, at the bound
# A signal whose AC energy is below this share of its whole energy is silent: digital silence, or a constant.
_SILENCE = 1e-10
# On a CPU the signals go to float64 in pieces of this many samples over all speakers: 2 MiB, which a cache holds.
_PIECE_SIZE = 2**18


@dataclass
class PITResult:
    """What permutation-invariant training needs of a batch; ``...`` stands for an optional axis of blocks.

    ``loss [..., B]`` is the mean over speakers under the best assignment in dB, ``perm [..., B, N]`` that
    assignment, ``loss_matrix [..., B, N_ref, N_est]`` the loss of every pair in dB.
    """

    loss: torch.Tensor
    perm: torch.Tensor
    loss_matrix: torch.Tensor

    def __getitem__(self, blocks):
        """The result of some of the blocks."""
        return PITResult(self.loss[blocks], self.perm[blocks], self.loss_matrix[blocks])


@dataclass
class LayerwiseResult:
    """``loss [B]`` is the weighted sum of ``block_losses [L, B]``, both in dB."""

    loss: torch.Tensor
    block_losses: torch.Tensor


def length_mask(lengths, num_samples):
    """Which samples belong to each item.

    Arguments
    ---------
    lengths : torch.Tensor
        Samples, ``[B]``.
    num_samples : int
        ``T`` of the padded batch.

    Returns
    -------
    torch.Tensor
        Boolean, ``[B, 1, T]``.

    Example
    -------
    >>> length_mask(torch.tensor([1, 3]), 3).int()
    tensor([[[1, 0, 0]],
    <BLANKLINE>
            [[1, 1, 1]]], dtype=torch.int32)
    """
    samples = torch.arange(num_samples, device=lengths.device)
    return (samples < lengths.unsqueeze(-1)).unsqueeze(-2)


def _padding_mask(signal, lengths):
    """Which samples are padding, ``[B, 1, T]`` (None: none), and each item's number of others, ``[B, 1]`` (or one)."""
    if lengths is None:
        return None, signal.shape[-1]
    if lengths.is_floating_point():
        raise ValueError(f"lengths must be samples (integers), but got {lengths.dtype}; are they relative?")
    lengths = lengths.to(signal.device).clamp(1, signal.shape[-1])
    return ~length_mask(lengths, signal.shape[-1]), lengths.unsqueeze(-1)


def _pieces(ref, num_rows):
    """Slices of items and samples that cover ``num_rows`` signals of each item: small on a CPU, everything on a GPU."""
    batch, num_samples = len(ref), ref.shape[-1]
    size = max(1, _PIECE_SIZE // max(1, num_rows)) if ref.device.type == "cpu" else max(1, batch * num_samples)
    items = max(1, size // max(1, num_samples))
    for item in range(0, batch, items):
        for sample in range(0, num_samples, size):
            yield slice(item, item + items), slice(sample, sample + size)


def _rows(signal, items, samples):
    """A piece of ``[B, N, T]``, or of ``[B, L, N, T]`` as ``L N`` rows: ``[b, rows, t]``."""
    return signal[items, ..., samples].flatten(1, -2)


def _statistics(ref, est, is_padding):
    """Sums and energies ``[B, rows]`` of the references and then the estimates, and products ``[B, N_ref, L N_est]``.

    Float64 sums keep the closed form of SI-SDR exact. Piece by piece, no float64 copy of the signals is made on a CPU.
    """
    num_refs, num_ests = ref.shape[1], est.shape[1:-1].numel()
    total, energy = ref.new_zeros(2, len(ref), num_refs + num_ests, dtype=torch.float64)
    dot = total.new_zeros(len(ref), num_refs, num_ests)
    for items, samples in _pieces(ref, num_refs + num_ests):
        piece = _rows(ref, items, samples)
        rows = total.new_empty(len(piece), num_refs + num_ests, piece.shape[-1])
        refs, ests = rows.split((num_refs, num_ests), 1)
        refs.copy_(piece)
        ests.copy_(_rows(est, items, samples))
        if is_padding is not None:
            rows.masked_fill_(is_padding[items, :, samples], 0.0)
        norm = torch.linalg.vector_norm(rows, dim=-1)  # a dot product would need a copy of the rows
        total[items].add_(rows.sum(-1))
        energy[items].addcmul_(norm, norm)
        dot[items].baddbmm_(refs, ests.transpose(1, 2))
    return total, energy, dot


def _ac_energy(energy, total, num_samples):
    """The energy without the mean, ``[..., N]``, and whether anything but rounding is left of it."""
    ac_energy = energy - total.square() / num_samples
    return ac_energy, ac_energy <= _SILENCE * energy


def _signal_gradient(signal, other, own, cross, constant, is_padding):
    """``cross @ other - own * signal + constant``: ``cross [B, rows, other rows]``, the other two ``[B, rows, 1]``."""
    gradient = torch.empty_like(signal)
    dtype = torch.promote_types(signal.dtype, torch.float32)
    own, cross, constant = own.to(dtype), cross.to(dtype), constant.to(dtype)
    for items, samples in _pieces(signal, own.shape[1] + cross.shape[2]):
        rows = torch.baddbmm(constant[items], cross[items], _rows(other, items, samples).to(dtype))
        rows.addcmul_(own[items], _rows(signal, items, samples), value=-1)
        if is_padding is not None:
            rows.masked_fill_(is_padding[items, :, samples], 0.0)
        gradient[items, ..., samples] = rows.view(gradient[items, ..., samples].shape)
    return gradient


class _NegSISDR(torch.autograd.Function):
    """Negative SI-SDR of all pairs, ``[B, N_ref, L N_est]``, of ``[B, (L,) N_est, T]`` and ``[B, N_ref, T]``.

    With ``c`` the cosine, ``p`` the product and ``E`` the energies of the zero-mean signals, the gradient of
    ``-10 log10(c^2 / (1 - c^2))`` for an estimate is ``20 / ln 10 / (1 - c^2) (est / E_est - ref / p)``, and likewise
    for a reference. So the backward pass is one product of matrices, and keeps the signals, but no copy of them.
    """

    @staticmethod
    def forward(ctx, est, ref, is_padding, num_samples):
        total, energy, dot = _statistics(ref, est, is_padding)
        mean = total / num_samples
        energy, is_silent = _ac_energy(energy, total, num_samples)
        energy.masked_fill_(is_silent, math.inf)  # its cosines and gradients become 0
        rows = dot.shape[1:]
        (ref_mean, _), (_, est_total) = mean.split(rows, 1), total.split(rows, 1)
        ref_energy, est_energy = energy.split(rows, 1)
        dot.addcmul_(ref_mean.unsqueeze(2), est_total.unsqueeze(1), value=-1)
        cosine2 = dot.square().div_(ref_energy.unsqueeze(2) * est_energy.unsqueeze(1))
        ctx.save_for_backward(est, ref, is_padding, mean, energy, dot, cosine2)
        loss = torch.logit(cosine2, eps=_LEAST_SHARE / 10).mul_(-10 / math.log(10)).clamp_(-_BOUND_DB, _BOUND_DB)
        loss.masked_fill_(is_silent[:, : rows[0], None], 0.0)
        return loss.to(torch.promote_types(est.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        est, ref, is_padding, mean, energy, dot, cosine2 = ctx.saved_tensors
        rest = 1 - cosine2
        is_bound = cosine2 * rest <= _LEAST_SHARE
        own = (gradient / rest).mul_(-20 / math.log(10)).masked_fill_(is_bound, 0.0)
        cross = own / dot.masked_fill(is_bound, 1.0)  # (B, N_ref, L N_est)
        ref_mean, est_mean = mean.unsqueeze(2).split(dot.shape[1:], 1)  # (B, rows, 1)
        ref_energy, est_energy = energy.unsqueeze(2).split(dot.shape[1:], 1)
        est_gradient = ref_gradient = None
        with torch.autocast(est.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                own_est, cross_est = own.sum(1).unsqueeze(2) / est_energy, cross.transpose(1, 2)
                constant = torch.baddbmm(own_est * est_mean, cross_est, ref_mean, alpha=-1)
                est_gradient = _signal_gradient(est, ref, own_est, cross_est, constant, is_padding)
            if ctx.needs_input_grad[1]:
                own_ref = own.sum(2).unsqueeze(2) / ref_energy
                constant = torch.baddbmm(own_ref * ref_mean, cross, est_mean, alpha=-1)
                ref_gradient = _signal_gradient(ref, est, own_ref, cross, constant, is_padding)
        return est_gradient, ref_gradient, None, None


def is_silent(ref, lengths=None):
    """Which sources are silent: digital silence, or a constant.

    Arguments
    ---------
    ref : torch.Tensor
        References, ``[B, N, T]``.
    lengths : torch.Tensor, optional
        Samples, ``[B]``.

    Returns
    -------
    torch.Tensor
        Boolean, ``[B, N]``.

    Example
    -------
    >>> is_silent(torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0]]]))
    tensor([[ True,  True, False]])
    """
    is_padding, num_samples = _padding_mask(ref, lengths)
    total, energy, _ = _statistics(ref, ref[:, :0], is_padding)
    return _ac_energy(energy, total, num_samples)[1]


def pairwise_neg_si_sdr(est, ref, lengths=None):
    """Negative scale-invariant SDR of every pair of reference and estimate (Le Roux et al. 2019, zero mean).

    With ``c`` the cosine between the zero-mean signals, SI-SDR is ``10 log10(c^2 / (1 - c^2))``, so one product
    of matrices gives all pairs.

    Arguments
    ---------
    est : torch.Tensor
        Estimates, ``[..., B, N, T]``; leading axes (blocks) share the references.
    ref : torch.Tensor
        References, ``[B, N, T]``.
    lengths : torch.Tensor, optional
        Samples of each item, ``[B]``; what lies beyond never changes the value. None: all ``T``.

    Returns
    -------
    loss_matrix : torch.Tensor
        ``[..., B, N_ref, N_est]`` in dB, float32 or wider, between -80 and 80.
        The row of a silent reference (see :func:`is_silent`) is 0 dB with no gradient whatever the estimate:
        it neither helps nor hurts. A silent estimate of an audible reference scores 80 dB without a gradient.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Example
    -------
    >>> ref = torch.tensor([[[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]])
    >>> est = torch.tensor([[[3.0, -3.0, 3.0, -3.0], [0.0, 0.0, 0.1, -0.1]]])
    >>> pairwise_neg_si_sdr(est, ref).round()
    tensor([[[  0.,  80.],
             [  0., -80.]]])
    """
    if ref.dim() != 3 or est.dim() < 3 or est.shape[-3] != ref.shape[0] or est.shape[-1] != ref.shape[-1]:
        raise ValueError(
            "est must be [..., B, N, T] and ref [B, N, T] with the same B and T, but got the shapes "
            f"{list(est.shape)} and {list(ref.shape)}."
        )
    if lengths is not None and lengths.shape != ref.shape[:1]:
        raise ValueError(f"lengths must be [{ref.shape[0]}], but got the shape {list(lengths.shape)}.")
    if est.dim() == 3:
        return _NegSISDR.apply(est, ref, *_padding_mask(ref, lengths))
    blocks = est.flatten(0, -4).transpose(0, 1)  # (B, L, N_est, T): more estimates of the same item
    matrix = _NegSISDR.apply(blocks, ref, *_padding_mask(ref, lengths)).unflatten(-1, blocks.shape[1:3])
    return matrix.permute(2, 0, 1, 3).reshape(*est.shape[:-2], *matrix.shape[1::2])  # (..., B, N_ref, N_est)


def assigned_loss(loss_matrix, perm):
    """The loss under a given assignment.

    Arguments
    ---------
    loss_matrix : torch.Tensor
        ``[..., B, N_ref, N_est]``.
    perm : torch.Tensor
        ``[..., B, N]``, broadcast over leading axes.

    Returns
    -------
    torch.Tensor
        ``[..., B]``, mean over speakers.

    Example
    -------
    >>> assigned_loss(torch.tensor([[[-9.0, 0.0], [1.0, -7.0]]]), torch.tensor([[1, 0]]))
    tensor([0.5000])
    """
    perm = perm.expand(loss_matrix.shape[:-1])
    return loss_matrix.gather(-1, perm.unsqueeze(-1)).mean((-2, -1))


def soft_minimum_loss(loss_matrix, gamma_db):
    """The soft minimum over all assignments, the loss of probabilistic PIT (Yousefi et al. 2019).

    ``-gamma log mean_pi exp(-loss_pi / gamma)``: every assignment has a share in the gradient, the better ones a
    larger one, so that no label switches at once. It goes to PIT's minimum as gamma goes to zero, and to the mean over
    the assignments as gamma grows. That the losses of an assignment are means over its speakers in dB is this
    project's reading.

    Arguments
    ---------
    loss_matrix : torch.Tensor
        ``[..., N_ref, N_est]`` in dB, at most 5 speakers.
    gamma_db : float
        The softness, dB, above 0.

    Returns
    -------
    torch.Tensor
        ``[...]`` in dB.

    Raises
    ------
    ValueError
        If the matrix is not square or has more than 5 speakers, or gamma is not above 0.

    Example
    -------
    >>> matrix = torch.tensor([[[-9.0, 0.0], [1.0, -7.0]]])
    >>> soft_minimum_loss(matrix, 0.1), soft_minimum_loss(matrix, 1e4)
    (tensor([-7.9307]), tensor([-3.7503]))
    """
    if not gamma_db > 0:
        raise ValueError(f"gamma_db must be above 0, but got {gamma_db!r}.")
    if loss_matrix.shape[-1] > MAX_EXHAUSTIVE_SPKS:
        num_spks = loss_matrix.shape[-1]
        raise ValueError(f"The soft minimum is for up to {MAX_EXHAUSTIVE_SPKS} speakers, but got {num_spks}.")
    losses = permutation_losses(loss_matrix)[0]  # (..., P)
    return -gamma_db * ((-losses / gamma_db).logsumexp(-1) - math.log(losses.shape[-1]))


class PITLoss(torch.nn.Module):
    """Permutation-invariant training on SI-SDR (Kolbaek et al. 2017): the loss under the best assignment.

    Example
    -------
    >>> ref = torch.randn(4, 3, 800)
    >>> result = PITLoss()(ref[:, [2, 0, 1]], ref)
    >>> result.perm[0]
    tensor([1, 2, 0])
    >>> result.loss.shape, result.loss_matrix.shape
    (torch.Size([4]), torch.Size([4, 3, 3]))
    """

    def forward(self, est, ref, lengths=None):
        """Solve the assignment of every item, for one output or for all blocks at once.

        Arguments
        ---------
        est : torch.Tensor
            ``[B, N, T]``, or ``[L, B, N, T]`` for L blocks.
        ref : torch.Tensor
            ``[B, N, T]``.
        lengths : torch.Tensor, optional
            Samples, ``[B]``.

        Returns
        -------
        PITResult
            With a leading axis of blocks where ``est`` has one; each block under its own best assignment.
        """
        loss_matrix = pairwise_neg_si_sdr(est, ref, lengths)
        perm = solve_assignment(loss_matrix)
        return PITResult(assigned_loss(loss_matrix, perm), perm, loss_matrix)


def block_weights(num_blocks, layer_weights="uniform", device=None):
    """The weight of each block's loss; they sum to one, so that gradient clipping means the same for any L.

    Arguments
    ---------
    num_blocks : int
        ``L``.
    layer_weights : str
        ``uniform``, or ``ramp``: proportional to the block's number.
    device : torch.device, optional
        Where the weights are wanted.

    Returns
    -------
    torch.Tensor
        ``[L]``.

    Example
    -------
    >>> block_weights(3, "ramp")
    tensor([0.1667, 0.3333, 0.5000])
    """
    if layer_weights == "uniform":
        weights = torch.ones(num_blocks, device=device)
    elif layer_weights == "ramp":
        weights = torch.arange(1.0, num_blocks + 1, device=device)
    else:
        raise ValueError(f"layer_weights can only be 'uniform' or 'ramp', but got {layer_weights!r}.")
    return weights / weights.sum()


def layerwise_loss(pit, perm=None, imposed=None, layer_weights="uniform", layer_permutation="shared", gamma_db=0.0):
    """The layer-wise loss: the weighted sum of all blocks' losses (Gao et al. 2023).

    Arguments
    ---------
    pit : PITResult
        Of all blocks: ``loss_matrix [L, B, N, N]``.
    perm : torch.Tensor, optional
        ``[B, N]``: the final block's assignment to train under. None: PIT's own.
    imposed : torch.Tensor, optional
        Boolean ``[B]``: the items (reordered ones) for which ``perm`` holds in every block, also where each block
        has its own. None: none.
    layer_weights : str
        ``uniform`` or ``ramp``, see :func:`block_weights`.
    layer_permutation : str
        ``shared`` imposes the final block's assignment on all blocks; ``independent`` gives each its own.
    gamma_db : float
        Above 0: each block's loss is its own soft minimum (:func:`soft_minimum_loss`), except where ``imposed``.

    Returns
    -------
    LayerwiseResult

    Raises
    ------
    ValueError
        For an unknown option.

    Example
    -------
    >>> pit = PITLoss()(torch.randn(2, 4, 3, 800), torch.randn(4, 3, 800))
    >>> result = layerwise_loss(pit)
    >>> torch.allclose(result.loss, result.block_losses.mean(0))
    True
    """
    if pit.loss_matrix.dim() != 4:
        raise ValueError(f"loss_matrix must be [L, B, N, N], but got the shape {list(pit.loss_matrix.shape)}.")
    perm = pit.perm[-1] if perm is None else perm
    if layer_permutation == "independent":
        own = torch.cat([pit.perm[:-1], perm.unsqueeze(0)])  # (L, B, N)
        perm = own if imposed is None else torch.where(imposed.unsqueeze(-1), perm, own)
    elif layer_permutation != "shared":
        raise ValueError(f"layer_permutation can only be 'shared' or 'independent', but got {layer_permutation!r}.")
    block_losses = assigned_loss(pit.loss_matrix, perm)  # (L, B)
    if gamma_db > 0:
        soft_losses = soft_minimum_loss(pit.loss_matrix, gamma_db)
        block_losses = soft_losses if imposed is None else torch.where(imposed, block_losses, soft_losses)
    weights = block_weights(len(block_losses), layer_weights, block_losses.device)
    return LayerwiseResult((weights.unsqueeze(-1) * block_losses).sum(0), block_losses)
