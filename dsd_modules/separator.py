"""From mixtures to estimates: encoder, mask network and decoder, the same in training and in inference."""

import math

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.dual_path import Decoder

from dsd_modules.losses import is_silent, pairwise_neg_si_sdr


def separate(encoder, masknet, decoder, mixture, lengths=None, blocks=None):
    """Separate a batch of mixtures.

    Each module is called once, so that wrappers such as DistributedDataParallel see one forward; only the decoder is
    not where a faster way gives the same (on a CPU without gradients). An item of a padded batch gives what it gives
    alone. The samples after its last whole frame are zero.

    Arguments
    ---------
    encoder : torch.nn.Module
        ``speechbrain.lobes.models.dual_path.Encoder`` of one input channel, wrapped or not.
    masknet : torch.nn.Module
        :class:`dsd_modules.masknet.DualPathMaskNet` or :class:`dsd_modules.tasnet.ConvTasNetMaskNet`, wrapped or
        not.
    decoder : torch.nn.Module
        ``speechbrain.lobes.models.dual_path.Decoder`` with the encoder's kernel, wrapped or not.
    mixture : torch.Tensor
        Mixtures [B, T].
    lengths : torch.Tensor or list of int, optional
        Number of samples of each item, [B]. Keep them on the CPU: they are then checked, and lengths that
        all equal T cost nothing. On a GPU they are taken as they are, since a look at them would stall it.
    blocks : sequence of int or "all", optional
        Blocks of the mask network to decode. None is the final block, without a leading axis.

    Returns
    -------
    estimates : torch.Tensor
        [B, N, T] for N speakers, or [len(blocks), B, N, T] with ``blocks``; zero beyond the lengths.

    Raises
    ------
    ValueError
        Where the mixture is not [B, T], an item is shorter than the encoder's kernel, or lengths do not
        fit the batch.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder, SBTransformerBlock
    >>> from dsd_modules.masknet import DualPathMaskNet
    >>> encoder = Encoder(kernel_size=16, out_channels=8)
    >>> decoder = Decoder(8, 1, kernel_size=16, stride=8, bias=False)
    >>> intra, inter = (SBTransformerBlock(1, 8, 2, d_ffn=16) for _ in range(2))
    >>> masknet = DualPathMaskNet(8, 8, intra, inter, num_layers=2, K=10, num_spks=3)
    >>> mixture = torch.randn(4, 1000)
    >>> separate(encoder, masknet, decoder, mixture).shape
    torch.Size([4, 3, 1000])
    >>> separate(encoder, masknet, decoder, mixture, [1000, 700, 16, 999], blocks="all").shape
    torch.Size([2, 4, 3, 1000])
    """
    kernel, stride = _framing(encoder, mixture)
    lengths = _padded_lengths(lengths, mixture, kernel)
    num_frames = None if lengths is None else (lengths - kernel) // stride + 1  # [B]

    features = encoder(mixture)  # [B, C, F]
    masks = masknet(features, lengths=num_frames, blocks=blocks)  # [spks, B, C, F] or [L, spks, B, C, F]
    estimates = _decode(decoder, masks, features, mixture)  # [..., B, spks, T]
    if lengths is None:
        return estimates
    ends = (num_frames - 1) * stride + kernel  # [B], where the last whole frame ends
    is_padding = torch.arange(mixture.shape[1], device=mixture.device) >= ends.to(mixture.device)[:, None]  # [B, T]
    return estimates.masked_fill(is_padding[:, None], 0)


def separate_until(encoder, masknet, decoder, mixture, exit_si_sdr_db):
    """Separate one mixture with no more blocks than it needs: early exit.

    Block after block is run and decoded. After block l >= 2 each of its estimates is compared with block l-1's at the
    same output, and the rest is left out once the SI-SDR between them is at least ``exit_si_sdr_db`` for every
    speaker: the worst decides, so that no voice is left behind for another that was easy. Outputs that changed places
    do not agree. Both silent agree; one silent and the other not do not. Blocks are worth decoding where each was
    supervised (layer-wise optimization).

    Arguments
    ---------
    encoder, masknet, decoder : torch.nn.Module
        As of :func:`separate`, with three blocks at least: fewer could save nothing.
    mixture : torch.Tensor
        One mixture [1, T]: another one may need other blocks.
    exit_si_sdr_db : float
        dB. Above 80, beyond which SI-SDR is not told apart, only silence ends before the last block.

    Returns
    -------
    estimates : torch.Tensor
        [1, N, T] for N speakers, those of ``separate(..., blocks=[num_blocks_run - 1])``.
    num_blocks_run : int
        From 2 to all.

    Raises
    ------
    ValueError
        Where the model has fewer than three blocks, the mixture is not [1, T] or shorter than the encoder's kernel,
        or ``exit_si_sdr_db`` is not finite.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder, SBTransformerBlock
    >>> from dsd_modules.masknet import DualPathMaskNet
    >>> encoder = Encoder(kernel_size=16, out_channels=8)
    >>> decoder = Decoder(8, 1, kernel_size=16, stride=8, bias=False)
    >>> intra, inter = (SBTransformerBlock(1, 8, 2, d_ffn=16) for _ in range(2))
    >>> masknet = DualPathMaskNet(8, 8, intra, inter, num_layers=4, K=10, num_spks=3)
    >>> estimates, num_blocks_run = separate_until(encoder, masknet, decoder, torch.randn(1, 1000), -80.0)
    >>> estimates.shape, num_blocks_run
    (torch.Size([1, 3, 1000]), 2)
    """
    masknet = getattr(masknet, "module", masknet)
    check_early_exit(exit_si_sdr_db, masknet.num_layers)
    _framing(encoder, mixture)
    if len(mixture) != 1:
        raise ValueError(f"early exit separates one mixture [1, T] at a time, but got {list(mixture.shape)}")
    features = encoder(mixture)  # [1, C, F]
    earlier = None
    for num_blocks_run, masks in enumerate(masknet.block_masks(features), 1):
        estimates = _decode(decoder, masks, features, mixture)  # [1, spks, T]
        if num_blocks_run == masknet.num_layers:
            break
        if earlier is not None and agreement_db(estimates[0], earlier[0]).min() >= exit_si_sdr_db:
            break
        earlier = estimates
    return estimates, num_blocks_run


def check_early_exit(exit_si_sdr_db, num_blocks):
    """Refuse what :func:`separate_until` cannot do.

    Arguments
    ---------
    exit_si_sdr_db : float
        dB.
    num_blocks : int
        Of the model.

    Raises
    ------
    ValueError
        Where the model has fewer than three blocks, or ``exit_si_sdr_db`` is not finite.

    Example
    -------
    >>> check_early_exit(20.0, num_blocks=2)
    Traceback (most recent call last):
    ...
    ValueError: exit_si_sdr_db needs a model of at least 3 blocks (it compares two before it leaves out the rest), ...
    """
    is_number = isinstance(exit_si_sdr_db, int | float) and not isinstance(exit_si_sdr_db, bool)
    if not is_number or not math.isfinite(exit_si_sdr_db):
        raise ValueError(f"exit_si_sdr_db can only be a finite number of dB, but got {exit_si_sdr_db!r}")
    if num_blocks < 3:
        raise ValueError(
            "exit_si_sdr_db needs a model of at least 3 blocks (it compares two before it leaves out the rest), "
            f"but this one has {num_blocks}"
        )


@torch.no_grad()
def agreement_db(estimates, earlier):
    """SI-SDR between the estimates of two blocks, output by output.

    Arguments
    ---------
    estimates, earlier : torch.Tensor
        [N, T].

    Returns
    -------
    torch.Tensor
        [N] in dB, from -80 to 80; infinite where both are silent, and minus infinity where one is.

    Example
    -------
    >>> a, b = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])
    >>> agreement_db(torch.stack([a, a + 0.1 * b, 0 * a, a]), torch.stack([3 * a, a, 0 * a, 0 * a]))
    tensor([80., 20., inf, -inf])
    """
    estimates, earlier = estimates.unsqueeze(1), earlier.unsqueeze(1)  # [N, 1, T]: each output is an item of its own
    si_sdr = -pairwise_neg_si_sdr(estimates, earlier)  # [N, 1, 1]
    silent = is_silent(torch.cat([estimates, earlier], dim=1))  # [N, 2]
    si_sdr = si_sdr.flatten().masked_fill(silent.any(1), -math.inf)
    return si_sdr.masked_fill(silent.all(1), math.inf)  # [N]


def _framing(encoder, mixture):
    """Kernel and stride of the encoder, which the mixture must be long enough for."""
    conv = getattr(encoder, "module", encoder).conv1d  # DistributedDataParallel hides it, compile does not
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if mixture.dim() != 2:
        raise ValueError(f"mixture must have shape [B, T], but got {list(mixture.shape)}")
    if mixture.shape[1] < kernel:
        raise ValueError(f"mixture has {mixture.shape[1]} samples, fewer than the encoder's kernel of {kernel}")
    return kernel, stride


def _decode(decoder, masks, features, mixture):
    """Estimates [..., B, spks, T] from masks [..., spks, B, C, F] for features [B, C, F]."""
    rows = (masks * features).flatten(0, -3)  # [L*spks*B, C, F]
    # The decoder squeezes what it can, so its output's shape is set here.
    estimates = _synthesize(decoder, rows).reshape(*masks.shape[:-2], -1)  # [..., spks, B, T']
    estimates = estimates.transpose(-2, -3).to(mixture.dtype)  # [..., B, spks, T']
    return F.pad(estimates, (0, mixture.shape[1] - estimates.shape[-1]))  # [..., B, spks, T]


def _synthesize(decoder, rows):
    """The decoder's output for rows [R, C, F].

    On a CPU its transposed convolution takes ten times as long as the product of matrices and the overlap-add that it
    is, and more than a tenth of the first block of a small model.
    """
    layer = getattr(decoder, "module", decoder)
    if torch.is_grad_enabled() or rows.device.type != "cpu" or not _is_plain(layer):
        return decoder(rows)
    stride = layer.stride[0]
    pieces = rows.transpose(1, 2) @ layer.weight[:, 0]  # [R, F, K], of which each half is continued by a neighbour's
    early, late = (half.flatten(1) for half in pieces.split(stride, dim=2))  # [R, F*stride]
    return F.pad(early, (0, stride)) + F.pad(late, (stride, 0))  # [R, T']


def _is_plain(layer):
    """Whether a decoder is SpeechBrain's, mono, without bias, and with a stride of half its kernel."""
    if type(layer) is not Decoder or layer.bias is not None:
        return False
    sizes = (layer.weight.shape[1:], layer.padding, layer.output_padding, layer.dilation)
    return sizes == ((1, 2 * layer.stride[0]), (0,), (0,), (1,))


def _padded_lengths(lengths, mixture, kernel):
    """Lengths as a tensor, or None where no item is known to be padded."""
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    if lengths.shape != mixture.shape[:1]:
        raise ValueError(f"lengths must have shape [{mixture.shape[0]}], but got {list(lengths.shape)}")
    if lengths.device.type != "cpu":
        return lengths
    if lengths.min() < kernel:
        raise ValueError(
            f"an item has {lengths.min()} samples, fewer than the encoder's kernel of {kernel}: {lengths.tolist()}"
        )
    if lengths.max() > mixture.shape[1]:
        raise ValueError(f"lengths exceed the {mixture.shape[1]} samples of the batch: {lengths.tolist()}")
    return None if lengths.min() == mixture.shape[1] else lengths
