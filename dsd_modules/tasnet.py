"""The mask network of Conv-TasNet, with the output of every repeat at hand.

The parameters are those of SpeechBrain's ``MaskNet``, name by name, so its checkpoints load.
"""

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.conv_tasnet import GlobalLayerNorm, MaskNet, TemporalBlock

from dsd_modules.masknet import block_indices, masked_norm, masks_of_blocks, padded_lengths, run_layer

_EPS = 1e-8  # of SpeechBrain's norms


class ConvTasNetMaskNet(MaskNet):
    """SpeechBrain's mask network of Conv-TasNet (https://arxiv.org/abs/1809.07454), for layer-wise training.

    It has the parameters of ``speechbrain.lobes.models.conv_tasnet.MaskNet`` and computes the same masks. The encoder
    and decoder around it are those of ``speechbrain.lobes.models.dual_path``. What differs:

    * the masks of any repeat are available; each repeat's output goes through the same output layer. A repeat is
      called a block here, as in :class:`dsd_modules.masknet.DualPathMaskNet`;
    * with ``lengths``, an item of a padded batch gives the masks it gives alone;
    * items may be shorter than a convolution reaches, and dilations may exceed 128.

    Arguments
    ---------
    N : int
        Number of filters of the encoder.
    B : int
        Number of channels of the bottleneck.
    H : int
        Number of channels within the temporal blocks.
    P : int
        Kernel of the depthwise convolutions, frames, odd.
    X : int
        Number of temporal blocks per repeat; their dilations are 1, 2, 4, ...
    R : int
        Number of repeats.
    C : int
        Number of speakers.
    norm_type : str
        'gLN' (over the channels and frames of an item) or 'cLN' (over the channels of a frame).
    causal : bool
        Whether a frame sees no later ones. SpeechBrain's convolutions look back by half a kernel more than they must.
    mask_nonlinear : str
        'relu' or 'softmax' (over the filters, as in SpeechBrain).
    activation_checkpointing : bool
        Whether training computes each temporal block again in the backward pass, in place of keeping what is in
        it: less memory for more time, and the same gradients.

    Raises
    ------
    ValueError
        Where an argument is out of range.

    Example
    -------
    >>> masknet = ConvTasNetMaskNet(N=8, B=6, H=12, P=3, X=4, R=3, C=2)
    >>> x = torch.randn(4, 8, 95)
    >>> masknet(x).shape
    torch.Size([2, 4, 8, 95])
    >>> masknet(x, blocks="all").shape
    torch.Size([3, 2, 4, 8, 95])
    >>> masks = masknet(x, lengths=torch.tensor([95, 40, 3, 77]), blocks=[0, -1])
    >>> masks.shape, masks[:, :, 2, :, 3:].count_nonzero().item()
    (torch.Size([2, 2, 4, 8, 95]), 0)
    """

    def __init__(
        self,
        N,
        B,
        H,
        P,
        X,
        R,
        C,
        norm_type="gLN",
        causal=False,
        mask_nonlinear="relu",
        activation_checkpointing=False,
    ):
        if P % 2 == 0:
            raise ValueError(f"P, the kernel of the depthwise convolutions in frames, must be odd, but got {P}")
        if norm_type not in ("gLN", "cLN"):
            raise ValueError(f"norm_type can only be 'gLN' or 'cLN', but got {norm_type!r}")
        if mask_nonlinear not in ("relu", "softmax"):
            raise ValueError(f"mask_nonlinear can only be 'relu' or 'softmax', but got {mask_nonlinear!r}")
        super().__init__(N, B, H, P, X, 0, C, norm_type, causal, mask_nonlinear)  # the temporal blocks are built below
        self.num_spks = C
        self.num_layers = R
        self.X = X
        self.norm_type = norm_type
        self.causal = causal
        self.activation_checkpointing = activation_checkpointing
        for repeat in range(R):
            for layer in range(X):
                dilation = 2**layer
                # SpeechBrain's layers see a dummy of so many frames; it must not be shorter than they reach.
                shape = (1, P * dilation, B)
                block = TemporalBlock(shape, H, P, 1, "same", dilation, norm_type=norm_type, causal=causal)
                self.temporal_conv_net.add_module(f"temporalblock_{repeat}_{layer}", block)

    def forward(self, x, lengths=None, blocks=None):
        """Masks of the final repeat, or of the repeats asked for.

        Arguments
        ---------
        x : torch.Tensor
            Encoded mixture [B, N, F].
        lengths : torch.Tensor or list of int, optional
            Number of valid frames of each item, [B]. What lies beyond does not matter, and the masks are
            zero there. Keep them on the CPU: they are then checked, and lengths that all equal F cost
            nothing. On a GPU they are taken as they are, since a look at them would stall it.
        blocks : sequence of int or "all", optional
            Repeats, from 0, negative ones from the end. None is the final one, without a leading axis.
            Repeats after the last one asked for are not run.

        Returns
        -------
        masks : torch.Tensor
            [spks, B, N, F], or [len(blocks), spks, B, N, F] with ``blocks``.

        Raises
        ------
        ValueError
            Where a repeat does not exist, or lengths do not fit the batch.
        """
        return masks_of_blocks(self, x, lengths, blocks)

    def block_masks(self, x, lengths=None, blocks="all"):
        """Masks of one repeat after the other, for those who decide on the way where to stop.

        Arguments
        ---------
        x, lengths
            As of :meth:`forward`.
        blocks : sequence of int or "all"
            The repeats whose masks are wanted, in any order.

        Yields
        ------
        masks : torch.Tensor
            [spks, B, N, F], in the order of the repeats, each repeat once. A repeat is run when its masks, or those of
            a later one, are asked for.

        Raises
        ------
        ValueError
            As :meth:`forward`, with the first masks.

        Example
        -------
        >>> masknet = ConvTasNetMaskNet(N=8, B=6, H=12, P=3, X=4, R=3, C=2)
        >>> masks = masknet.block_masks(torch.randn(4, 8, 95))
        >>> next(masks).shape  # only the first repeat was run
        torch.Size([2, 4, 8, 95])
        """
        indices = block_indices(blocks, self.num_layers)
        lengths = padded_lengths(lengths, x)
        frame_mask = None
        if lengths is not None:
            frame_mask = torch.arange(x.shape[2], device=x.device) < lengths[:, None, None]  # [B, 1, F]
            x = x.masked_fill(~frame_mask, 0)

        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        x = F.conv1d(_normalize(self.layer_norm, x), self.bottleneck_conv1x1.conv.weight)  # [B, B', F]
        for index in range(max(indices) + 1):
            for layer in range(self.X):
                block = self.temporal_conv_net[f"temporalblock_{index}_{layer}"]
                x = run_layer(_temporal_block, block.layers, x, lengths, frame_mask, recompute=recompute)
            if index in indices:
                yield self._output_layer(x, frame_mask)  # [spks, B, N, F]

    def _output_layer(self, x, frame_mask):
        """Masks [spks, B, N, F] from a repeat's output [B, B', F]."""
        scores = F.conv1d(x, self.mask_conv1x1.conv.weight)  # [B, spks*N, F]
        scores = scores.unflatten(1, (self.num_spks, -1)).transpose(0, 1)  # [spks, B, N, F]
        masks = F.relu(scores) if self.mask_nonlinear == "relu" else F.softmax(scores, dim=2)
        return masks if frame_mask is None else masks.masked_fill(~frame_mask, 0)


def _temporal_block(layers, x, lengths, frame_mask):
    """``TemporalBlock.forward`` for x [B, B', F] with the channels where convolutions want them."""
    y = layers["act"](F.conv1d(x, layers["conv"].conv.weight))  # [B, H, F]
    y = _normalize(layers["norm"], y, frame_mask)
    separable = layers["DSconv"]  # "act_0" is the name that its norm gets in SpeechBrain
    y = separable["act"](_depthwise(separable["conv_0"], y, lengths))  # [B, H, F]
    y = _normalize(separable["act_0"], y, frame_mask)
    return x + F.conv1d(y, separable["conv_1"].conv.weight)  # [B, B', F]


def _depthwise(layer, x, lengths):
    """SpeechBrain's depthwise convolution of x [B, H, F]: each item is reflected at its ends, or causal."""
    num_frames = x.shape[2]
    conv, reach = layer.conv, layer.dilation * (layer.kernel_size - 1) // 2
    if layer.padding == "causal":
        x = F.pad(x, (3 * reach, 0))[..., : num_frames + 2 * reach]
    elif lengths is not None:
        x = x.gather(2, _reflection(x, lengths, reach))
    elif not torch.compiler.is_exporting() and reach < num_frames:
        x = F.pad(x, (reach, reach), mode="reflect")
    else:  # also what is exported, which must serve every length
        x = x[..., _reflection(x[:1, :1], None, reach)[0, 0]]
    return F.conv1d(x, conv.weight, dilation=layer.dilation, groups=conv.groups)  # [B, H, F]


def _reflection(x, lengths, reach):
    """Where each frame of [B, H, reach + F + reach] lies in x [B, H, F], with an item reflected at both its ends.

    As in numpy's "reflect", an item that is shorter than the reach is reflected again and again.
    """
    frames = torch.arange(-reach, x.shape[2] + reach, device=x.device)
    last = frames[-1] - reach if lengths is None else lengths[:, None, None] - 1  # [] or [B, 1, 1]
    steps = frames.abs() % (2 * last).clamp(min=1)  # of a way from the first frame to the last and back
    return (last - (last - steps).abs()).expand(*x.shape[:2], -1)


def _normalize(norm, x, frame_mask=None):
    """SpeechBrain's gLN or cLN of x [B, C, F], in the precision of its weights."""
    x = x.to(torch.promote_types(x.dtype, norm.gamma.dtype))
    weight, bias = norm.gamma.flatten(), norm.beta.flatten()  # [C]
    if not isinstance(norm, GlobalLayerNorm):  # each frame by itself
        return F.layer_norm(x.transpose(1, 2), weight.shape, weight, bias, _EPS).transpose(1, 2)
    if frame_mask is None:
        return F.group_norm(x, 1, weight, bias, _EPS)
    return masked_norm(x, frame_mask, weight[:, None], bias[:, None], _EPS)
