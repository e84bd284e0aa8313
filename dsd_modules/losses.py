"""Permutation-invariant and layer-wise losses on SI-SDR. Losses are negative SI-SDR in dB."""

import math
from dataclasses import dataclass

import torch

from dsd_modules.permutation import MAX_EXHAUSTIVE_SPKS, permutation_losses, solve_assignment

LAYER_WEIGHTS = ("uniform", "ramp")
LAYER_PERMUTATIONS = ("shared", "independent")
# SI-SDR lies within +-80 dB: beyond, it has no gradient, and float32 signals could not tell anyway.
_LEAST_SHARE = 1e-8
# A signal whose AC energy is below this share of its whole energy is silent: digital silence, or a constant.
_SILENCE = 1e-10


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


def _mask_padding(signal, lengths):
    """The signal in float32 or wider without its padding, and each item's number of samples ``[B, 1]`` (or one)."""
    signal = signal.to(torch.promote_types(signal.dtype, torch.float32))
    if lengths is None:
        return signal, signal.shape[-1]
    if lengths.is_floating_point():
        raise ValueError(f"lengths must be samples (integers), but got {lengths.dtype}; are they relative?")
    lengths = lengths.to(signal.device).clamp(1, signal.shape[-1])
    return torch.where(length_mask(lengths, signal.shape[-1]), signal, 0.0), lengths.unsqueeze(-1)


class _PairStatistics(torch.autograd.Function):
    """Products of all pairs ``[..., B, N_ref, N_est]``, and energies and sums ``[..., B, N]``, all in float64.

    Float64 sums keep the closed form of SI-SDR exact. Going through a Function of our own, no float64 copy of the
    signals outlives its block, and the backward pass is one float32 product of matrices: several times faster.
    """

    @staticmethod
    def forward(ctx, est, ref):
        ctx.save_for_backward(est, ref)
        ref = ref.double()
        dots, est_energies, est_sums = [], [], []
        for block in est.reshape(-1, *est.shape[-3:]):  # broadcasting would copy the references for each block
            block = block.double()  # (B, N, T)
            dots.append(ref @ block.transpose(-1, -2))
            est_energies.append(torch.linalg.vecdot(block, block))
            est_sums.append(block.sum(-1))
        lead = est.shape[:-2]
        return (
            torch.stack(dots).reshape(*lead, ref.shape[-2], est.shape[-2]),
            torch.stack(est_energies).reshape(est.shape[:-1]),
            torch.stack(est_sums).reshape(est.shape[:-1]),
            torch.linalg.vecdot(ref, ref),
            ref.sum(-1),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dot, est_energy, est_sum, ref_energy, ref_sum):
        est, ref = ctx.saved_tensors
        dot, est_energy, est_sum, ref_energy, ref_sum = (
            gradient.to(est.dtype) for gradient in (dot, est_energy, est_sum, ref_energy, ref_sum)
        )
        with torch.autocast(est.device.type, enabled=False):
            est_gradient = ref_gradient = None
            if ctx.needs_input_grad[0]:
                est_gradient = dot.transpose(-1, -2) @ ref.to(est.dtype)
                est_gradient.addcmul_(est, 2 * est_energy.unsqueeze(-1)).add_(est_sum.unsqueeze(-1))
            if ctx.needs_input_grad[1]:
                ref_gradient = (dot @ est).sum_to_size(ref.shape)
                ref_gradient += 2 * ref_energy.unsqueeze(-1) * ref + ref_sum.unsqueeze(-1)
        return est_gradient, ref_gradient


def _ac_energy(energy, total, num_samples):
    """The energy without the mean, ``[..., N]``, and whether anything but rounding is left of it."""
    ac_energy = energy - total.square() / num_samples
    return ac_energy, ac_energy <= _SILENCE * energy


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
    ref, num_samples = _mask_padding(ref, lengths)
    ref = ref.double()
    return _ac_energy(torch.linalg.vecdot(ref, ref), ref.sum(-1), num_samples)[1]


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
    est, num_samples = _mask_padding(est, lengths)
    ref, _ = _mask_padding(ref, lengths)
    dot, est_energy, est_sum, ref_energy, ref_sum = _PairStatistics.apply(est, ref)
    est_ac, is_silent_est = (x.unsqueeze(-2) for x in _ac_energy(est_energy, est_sum, num_samples))  # (..., B, 1, N)
    ref_ac, is_silent_ref = (x.unsqueeze(-1) for x in _ac_energy(ref_energy, ref_sum, num_samples))  # (B, N, 1)
    num_samples = num_samples.unsqueeze(-1) if torch.is_tensor(num_samples) else num_samples  # (B, 1, 1)
    dot = dot - ref_sum.unsqueeze(-1) * est_sum.unsqueeze(-2) / num_samples  # (..., B, N_ref, N_est)

    silent = is_silent_est | is_silent_ref
    cosine2 = torch.where(silent, 0.0, dot.square() / torch.where(silent, 1.0, est_ac * ref_ac))
    share = cosine2.clamp(min=_LEAST_SHARE), (1 - cosine2).clamp(min=_LEAST_SHARE)  # of target, of distortion
    loss = 10 * (share[1].log10() - share[0].log10())
    return torch.where(is_silent_ref, 0.0, loss).to(est.dtype)


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
    return loss_matrix.gather(-1, perm.unsqueeze(-1)).squeeze(-1).mean(-1)


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
