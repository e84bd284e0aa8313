"""From mixtures to estimates: encoder, mask network and decoder, the same in training and in inference."""

import torch
import torch.nn.functional as F


def separate(encoder, masknet, decoder, mixture, lengths=None, blocks=None):
    """Separate a batch of mixtures.

    Each module is called once, so that wrappers such as DistributedDataParallel see one forward. An item
    of a padded batch gives what it gives alone. The samples after its last whole frame are zero.

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
    conv = getattr(encoder, "module", encoder).conv1d  # DistributedDataParallel hides it, compile does not
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if mixture.dim() != 2:
        raise ValueError(f"mixture must have shape [B, T], but got {list(mixture.shape)}")
    num_samples = mixture.shape[1]
    if num_samples < kernel:
        raise ValueError(f"mixture has {num_samples} samples, fewer than the encoder's kernel of {kernel}")
    lengths = _padded_lengths(lengths, mixture, kernel)
    num_frames = None if lengths is None else (lengths - kernel) // stride + 1  # [B]

    features = encoder(mixture)  # [B, C, F]
    masks = masknet(features, lengths=num_frames, blocks=blocks)  # [spks, B, C, F] or [L, spks, B, C, F]
    rows = (masks * features).flatten(0, -3)  # [L*spks*B, C, F]
    # The decoder squeezes what it can, so its output's shape is set here.
    estimates = decoder(rows).reshape(*masks.shape[:-2], -1)  # [..., spks, B, T']
    estimates = estimates.transpose(-2, -3).to(mixture.dtype)  # [..., B, spks, T']
    estimates = F.pad(estimates, (0, num_samples - estimates.shape[-1]))  # [..., B, spks, T]
    if lengths is None:
        return estimates
    ends = (num_frames - 1) * stride + kernel  # [B], where the last whole frame ends
    is_padding = torch.arange(num_samples, device=mixture.device) >= ends.to(mixture.device)[:, None]  # [B, T]
    return estimates.masked_fill(is_padding[:, None], 0)


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
