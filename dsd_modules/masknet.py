"""The dual-path mask network of SepFormer and DPRNN, with the output of every block at hand.

The parameters are those of SpeechBrain's ``Dual_Path_Model``, name by name, so its checkpoints load.
"""

import contextlib
import copy
import itertools
import math
import threading
from functools import partial

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.dual_path import (
    CumulativeLayerNorm,
    Dual_Computation_Block,
    Dual_Path_Model,
    SBRNNBlock,
    SBTransformerBlock,
)
from speechbrain.nnet.attention import MultiheadAttention
from speechbrain.nnet.RNN import rnn_init
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

# Smaller tensors are cheaper to keep than to compute again.
_BYTES_WORTH_SAVING = 2**20
# Of a transformer's activations, per core: 500 to 4,000 take the same time, to a few per cent.
_FRAMES_IN_CACHE = 1000


class DualPathMaskNet(Dual_Path_Model):
    """SpeechBrain's dual-path model of SepFormer (https://arxiv.org/abs/2010.13154) and DPRNN
    (https://arxiv.org/abs/1910.06379), for layer-wise training.

    It has the parameters of ``Dual_Path_Model`` and computes the same masks. What differs:

    * the masks of any block are available; each block's output goes through the same output head;
    * attention is fused, and no attention weights are kept;
    * each block is initialised on its own, where SpeechBrain copies one block;
    * with ``lengths``, an item of a padded batch gives the masks it gives alone;
    * chunks, and frames in a chunk, may be more than the 2,500 that SpeechBrain's positional encoding holds.

    Arguments
    ---------
    in_channels : int
        Number of channels at the output of the encoder.
    out_channels : int
        Number of channels of the intra and inter models.
    intra_model : SBTransformerBlock or SBRNNBlock
        Model to process within the chunks. A template: each block gets a copy with weights of its own.
    inter_model : SBTransformerBlock or SBRNNBlock
        Model to process across the chunks. A template, too.
    num_layers : int
        Number of dual-path blocks.
    norm : str
        Normalization type: 'ln', 'gln' or 'cln'; see ``speechbrain.lobes.models.dual_path.select_norm``.
    K : int
        Chunk length in frames, at least 2.
    num_spks : int
        Number of speakers.
    skip_around_intra : bool
        Skip connection around the intra model.
    linear_layer_after_inter_intra : bool
        Linear layer after the inter and the intra model.
    use_global_pos_enc : bool
        Global positional encodings.
    max_length : int
        Number of channels of the global positional encodings: ``out_channels`` where they are used.
    activation_checkpointing : bool
        Whether training computes each transformer layer, or recurrent model, again in the backward pass, in
        place of keeping what is in it: less memory for more time, and the same gradients.

    Raises
    ------
    ValueError
        Where a model is neither an ``SBTransformerBlock`` with attention type "regularMHA" nor an ``SBRNNBlock``
        whose width fits, or K is below 2.

    Example
    -------
    >>> intra = SBTransformerBlock(1, 16, 2, d_ffn=32, norm_before=True)
    >>> inter = SBTransformerBlock(1, 16, 2, d_ffn=32, norm_before=True)
    >>> masknet = DualPathMaskNet(8, 16, intra, inter, num_layers=3, K=10, num_spks=2)
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
        in_channels,
        out_channels,
        intra_model,
        inter_model,
        num_layers=1,
        norm="ln",
        K=200,
        num_spks=2,
        skip_around_intra=True,
        linear_layer_after_inter_intra=True,
        use_global_pos_enc=False,
        max_length=20000,
        activation_checkpointing=False,
    ):
        _check_models(intra_model, inter_model, out_channels, linear_layer_after_inter_intra)
        if K < 2:
            raise ValueError(f"K, the chunk length in frames, must be at least 2, but got {K}")
        super().__init__(
            in_channels,
            out_channels,
            intra_model,
            inter_model,
            num_layers=0,  # the blocks are built below
            norm=norm,
            K=K,
            num_spks=num_spks,
            use_global_pos_enc=use_global_pos_enc,
            max_length=max_length,
        )
        self.num_layers = num_layers
        self.activation_checkpointing = activation_checkpointing
        for _ in range(num_layers):
            block = DualPathBlock(
                copy.deepcopy(intra_model),
                copy.deepcopy(inter_model),
                out_channels,
                norm,
                skip_around_intra=skip_around_intra,
                linear_layer_after_inter_intra=linear_layer_after_inter_intra,
            )
            # Children first: attention's own reset sets the bias of its output layer to zero.
            self.dual_mdl.append(block.apply(_reset_parameters))

    def forward(self, x, lengths=None, blocks=None):
        """Masks of the final block, or of the blocks asked for.

        Arguments
        ---------
        x : torch.Tensor
            Encoded mixture [B, N, F].
        lengths : torch.Tensor or list of int, optional
            Number of valid frames of each item, [B]. What lies beyond does not matter, and the masks are
            zero there. Keep them on the CPU: they are then checked, and lengths that all equal F cost
            nothing. On a GPU they are taken as they are, since a look at them would stall it.
        blocks : sequence of int or "all", optional
            Blocks, from 0, negative ones from the end. None is the final block, without a leading axis.
            Blocks after the last one asked for are not run.

        Returns
        -------
        masks : torch.Tensor
            [spks, B, N, F], or [len(blocks), spks, B, N, F] with ``blocks``.

        Raises
        ------
        ValueError
            Where a block does not exist, lengths do not fit the batch, or the norm does not allow lengths.
        """
        return masks_of_blocks(self, x, lengths, blocks)

    def block_masks(self, x, lengths=None, blocks="all"):
        """Masks of one block after the other, for those who decide on the way where to stop.

        Arguments
        ---------
        x, lengths
            As of :meth:`forward`.
        blocks : sequence of int or "all"
            The blocks whose masks are wanted, in any order.

        Yields
        ------
        masks : torch.Tensor
            [spks, B, N, F], in the order of the blocks, each block once. A block is run when its masks, or those of a
            later block, are asked for.

        Raises
        ------
        ValueError
            As :meth:`forward`, with the first masks.

        Example
        -------
        >>> intra, inter = (SBTransformerBlock(1, 16, 2, d_ffn=32) for _ in range(2))
        >>> masknet = DualPathMaskNet(8, 16, intra, inter, num_layers=3, K=10)
        >>> masks = masknet.block_masks(torch.randn(4, 8, 95))
        >>> next(masks).shape  # only the first block was run
        torch.Size([2, 4, 8, 95])
        """
        indices = block_indices(blocks, self.num_layers)
        lengths = padded_lengths(lengths, x)
        frame_mask = chunk_mask = None
        if lengths is not None:
            norm = self.dual_mdl[0].norm
            if norm not in ("ln", "gln", "cln"):
                raise ValueError(f"lengths need norm 'ln', 'gln' or 'cln', but got {norm!r}")
            frame_mask = torch.arange(x.shape[2], device=x.device) < lengths[:, None, None]  # [B, 1, F]

        x = self.conv1d(_normalize(self.norm, x, frame_mask))  # [B, N, F]
        if self.use_global_pos_enc:
            positions = _positional_encoding(self.pos_enc, x.shape[2]).transpose(1, 2)  # [1, N, F]
            x = positions + x * x.shape[1] ** 0.5
        if lengths is not None:
            x = x.masked_fill(~frame_mask, 0)
        x, gap = _segment(x, self.K)  # [B, N, K, S]
        if lengths is not None:
            # An item alone has this many chunks, and they are the first of the padded item's.
            num_chunks = 2 * ((lengths + self.K // 2) // self.K + 1)  # [B]
            chunk_mask = torch.arange(x.shape[3], device=x.device) < num_chunks[:, None]  # [B, S]

        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for index, block in enumerate(self.dual_mdl[: max(indices) + 1]):
            x = block(x, chunk_mask, recompute)
            if index in indices:
                yield self._output_head(x, gap, frame_mask)  # [spks, B, N, F]

    def _output_head(self, x, gap, frame_mask):
        """Masks [spks, B, N, F] from a block's output [B, N, K, S]."""
        x = _overlap_add(self.prelu(x), gap)  # [B, N, F]
        # A 1x1 convolution commutes with overlap-add, behind which it has half the frames. Each lies in two chunks,
        # so the bias counts twice.
        x = F.conv1d(x, self.conv2d.weight.squeeze(-1), 2 * self.conv2d.bias)  # [B, N*spks, F]
        B, _, num_frames = x.shape
        x = x.view(B * self.num_spks, -1, num_frames)  # [B*spks, N, F]
        x = self.end_conv1x1(self.output(x) * self.output_gate(x))  # [B*spks, N, F]
        masks = self.activation(x).view(B, self.num_spks, *x.shape[1:]).transpose(0, 1)  # [spks, B, N, F]
        return masks if frame_mask is None else masks.masked_fill(~frame_mask, 0)


class DualPathBlock(Dual_Computation_Block):
    """SpeechBrain's dual-path block, with fused attention and a mask for chunks of padding.

    Arguments
    ---------
    *args : tuple
    **kwargs : dict
        Arguments of ``speechbrain.lobes.models.dual_path.Dual_Computation_Block``.

    Example
    -------
    >>> intra = SBTransformerBlock(1, 16, 2, d_ffn=32)
    >>> inter = SBTransformerBlock(1, 16, 2, d_ffn=32)
    >>> block = DualPathBlock(intra, inter, 16)
    >>> block(torch.randn(2, 16, 10, 6)).shape
    torch.Size([2, 16, 10, 6])
    """

    def forward(self, x, chunk_mask=None, recompute=False):
        """Process within the chunks, then across them.

        Arguments
        ---------
        x : torch.Tensor
            Chunks [B, N, K, S].
        chunk_mask : torch.Tensor, optional
            True for the chunks an item has, False for those of padding alone, [B, S]. The output of
            the latter is finite, but without meaning.
        recompute : bool
            Whether the backward pass computes the activations of the layers again.

        Returns
        -------
        out : torch.Tensor
            [B, N, K, S].
        """
        B, N, K, S = x.shape
        intra_mask = inter_mask = row_mask = None
        if chunk_mask is not None:
            intra_mask, inter_mask = chunk_mask[:, :, None, None], chunk_mask[:, None, :, None]
            row_mask = chunk_mask.repeat_interleave(K, dim=0)  # [B*K, S]

        x = x.permute(0, 3, 2, 1).contiguous()  # [B, S, K, N]; the chunks and a block's output lie so in memory
        intra = _apply_model(self.intra_mdl, x.view(B * S, K, N), recompute=recompute).view(B, S, K, -1)
        if self.linear_layer_after_inter_intra:
            intra = self.intra_linear(intra)
        if self.norm is not None:
            intra = _normalize_channels_last(self.intra_norm, intra, intra_mask)
        if self.skip_around_intra:
            intra = intra + x

        inter = intra.transpose(1, 2).contiguous()  # [B, K, S, N]; reshape would leave one item as it lies: slow
        inter = _apply_model(self.inter_mdl, inter.view(B * K, S, N), row_mask, recompute).view(B, K, S, -1)
        if self.linear_layer_after_inter_intra:
            inter = self.inter_linear(inter)
        if self.norm is not None:
            inter = _normalize_channels_last(self.inter_norm, inter, inter_mask)
        return (intra + inter.transpose(1, 2)).permute(0, 3, 2, 1)  # [B, N, K, S]


def _segment(x, K):
    """Half-overlapping chunks [B, N, K, S] of x [B, N, F], channels last in memory, and how many frames pad its end."""
    half = K // 2
    gap = K * ((half + x.shape[2]) // K + 1) - half - x.shape[2]  # 1 to K; so written, an exporter sees that K divides
    x = F.pad(x.transpose(1, 2), (0, 0, half, half + gap))  # [B, F', N]
    even, odd = (part.unflatten(1, (-1, K)) for part in (x[:, :-half], x[:, half:]))  # each [B, S/2, K, N]
    return torch.stack([even, odd], dim=2).flatten(1, 2).permute(0, 3, 2, 1), gap


def _overlap_add(x, gap):
    """Sum of the chunks [B, N, K, S] where they overlap [B, N, F], without the padding of :func:`_segment`."""
    half = x.shape[2] // 2
    even, odd = x.permute(0, 3, 2, 1).unflatten(1, (-1, 2)).unbind(2)  # each [B, S/2, K, N]
    x = even.flatten(1, 2)[:, half:-gap] + odd.flatten(1, 2)[:, : -half - gap]  # [B, F, N]
    return x.transpose(1, 2)


def masks_of_blocks(masknet, x, lengths, blocks):
    """What a mask network's ``forward`` returns, from its ``block_masks``: see :meth:`DualPathMaskNet.forward`."""
    indices = block_indices([-1] if blocks is None else blocks, masknet.num_layers)
    masks = dict(zip(sorted(set(indices)), masknet.block_masks(x, lengths, indices), strict=True))
    if blocks is None:
        return masks[indices[0]]
    return torch.stack([masks[index] for index in indices])


def block_indices(blocks, num_blocks):
    """Indices from 0 of the blocks asked for, which are "all", or indices of which negative ones count from the end."""
    if isinstance(blocks, str):
        if blocks != "all":
            raise ValueError(f"blocks can only be indices or 'all', but got {blocks!r}")
        blocks = range(num_blocks)
    blocks = list(blocks)
    if not blocks:
        raise ValueError(f"blocks must name at least one block, but got {blocks}")
    for block in blocks:
        if not -num_blocks <= block < num_blocks:
            raise ValueError(f"block {block} does not exist in a model of {num_blocks} blocks")
    return [block % num_blocks for block in blocks]


def padded_lengths(lengths, x):
    """Lengths on the device of x [B, N, F], or None where no item is known to be padded."""
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    num_frames = x.shape[2]
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must have shape [{x.shape[0]}], but got {list(lengths.shape)}")
    if lengths.device.type == "cpu":
        if lengths.min() < 1 or lengths.max() > num_frames:
            raise ValueError(f"lengths must lie in [1, {num_frames}] frames, but got {lengths.tolist()}")
        if lengths.min() == num_frames:
            return None
    return lengths.to(x.device, non_blocking=True)


def _check_models(intra_model, inter_model, out_channels, has_linear):
    """Refuse models that ``_apply_model`` does not know, and those of which SpeechBrain builds no block."""
    for name, model in (("intra_model", intra_model), ("inter_model", inter_model)):
        if isinstance(model, SBTransformerBlock):
            for layer in model.mdl.layers:
                if not isinstance(layer.self_att, MultiheadAttention):
                    raise ValueError(f"attention_type can only be 'regularMHA', but got {type(layer.self_att)}")
            continue
        if not isinstance(model, SBRNNBlock):
            raise ValueError(f"{name} can only be SBTransformerBlock or SBRNNBlock, but got {type(model)}")
        rnn = model.mdl.rnn
        width, expected = rnn.hidden_size * (1 + rnn.bidirectional), out_channels
        if has_linear:  # which SpeechBrain makes for a bidirectional intra model
            expected = 2 * intra_model.mdl.rnn.hidden_size if isinstance(intra_model, SBRNNBlock) else None
        if width != expected:
            raise ValueError(
                "with linear_layer_after_inter_intra, an SBRNNBlock must be bidirectional and both models have the "
                f"same hidden_channels; without, it must give {out_channels} channels; but {name} gives {width}"
            )


def _reset_parameters(module):
    """Draw the weights of one module anew, by PyTorch's own rule, and the recurrent ones by SpeechBrain's."""
    for name in ("reset_parameters", "_reset_parameters"):  # the latter is nn.MultiheadAttention's
        if hasattr(module, name):
            getattr(module, name)()
    if isinstance(module, torch.nn.RNNBase):
        rnn_init(module)


def _normalize(norm, x, mask=None):
    """Norm of x [B, N, ...] with the mean and variance of the masked part, in the precision of its weights.

    The mask (bool) broadcasts to x; its channel axis has size 1.
    """
    x = x.to(torch.promote_types(x.dtype, norm.weight.dtype))
    if mask is None or isinstance(norm, CumulativeLayerNorm):  # the latter normalises each frame by itself
        return norm(x)
    shape = (-1,) + (1,) * (x.dim() - 2)  # of the channels
    return masked_norm(x, mask, norm.weight.view(shape), norm.bias.view(shape), norm.eps)


def masked_norm(x, mask, weight, bias, eps):
    """Norm of x [B, N, ...] with the mean and variance of all that is masked of an item."""
    axes = tuple(range(1, x.dim()))
    x = torch.where(mask, x, 0)
    count = mask.sum(axes, keepdim=True).clamp(min=1) * (x[0].numel() // mask[0].numel())  # [B, 1, ...]
    centered = torch.where(mask, x - x.sum(axes, keepdim=True) / count, 0)  # [B, N, ...]
    variance = centered.square().sum(axes, keepdim=True) / count  # [B, 1, ...]
    scale = torch.rsqrt(variance + eps) * weight  # [B, N, 1, ...]
    return centered * scale + bias


def _normalize_channels_last(norm, x, mask=None):
    """:func:`_normalize` for x [B, ..., N], without moving the channels where the norm allows."""
    if mask is not None or not isinstance(norm, torch.nn.GroupNorm):
        mask = None if mask is None else mask.movedim(-1, 1)
        return _normalize(norm, x.movedim(-1, 1), mask).movedim(1, -1)
    x = x.to(torch.promote_types(x.dtype, norm.weight.dtype))
    standardize = partial(F.layer_norm, normalized_shape=x.shape[1:], eps=norm.eps)
    return _after_norm(lambda x: torch.addcmul(norm.bias, x, norm.weight), standardize, x)


def _apply_model(model, x, mask=None, recompute=False):
    """An intra or inter model for x [B, T, N]. The mask [B, T] is True for the first steps of a row, those it has."""
    if isinstance(model, SBRNNBlock):
        return run_layer(_recurrent, model.mdl.rnn, x, mask, recompute=recompute)
    mask = None if mask is None else mask[:, None, None]  # [B, 1, 1, T]
    rows = _rows_at_once(x)
    if rows >= x.shape[0]:  # not len(x), which an exporter takes for a constant
        return _transformer(model, x, mask, recompute)
    masks = itertools.repeat(None) if mask is None else mask.split(rows)
    return torch.cat([_transformer(model, *part, recompute) for part in zip(x.split(rows), masks, strict=False)])


def _rows_at_once(x):
    """How many rows of x [B, T, N] a transformer takes at once: those that fit a CPU's caches, elsewhere all.

    The rows do not see each other. One after the other they leave in the cache what the next operation reads.
    """
    if not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x.shape[0]
    return max(1, _FRAMES_IN_CACHE * torch.get_num_threads() // x.shape[1])


def run_layer(function, *args, recompute):
    """``function(*args)``; with ``recompute``, what it would keep for the backward pass is computed again there."""
    return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)


def _lacks_bf16(x):
    """Whether x is to be computed in bf16 on a CPU for which oneDNN has none: PyTorch lets it fail at an LSTM."""
    if not x.is_cpu or not torch.backends.mkldnn.is_available():
        return False
    is_autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else x.dtype
    return dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


_ONEDNN_SWITCH = threading.RLock()  # one for the process


@contextlib.contextmanager
def _without_onednn():
    """As ``torch.backends.mkldnn.flags(enabled=False)``, which warns of settings that it leaves as they are."""
    with _ONEDNN_SWITCH:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(before)


def _recurrent(rnn, x, mask=None):
    """``SBRNNBlock.forward`` for x [B, T, N]. The steps of a row that the mask [B, T] leaves out are not run."""
    rnn.flatten_parameters()
    if mask is None:
        with _without_onednn() if _lacks_bf16(x) else contextlib.nullcontext():
            return rnn(x)[0]
    packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def _transformer(model, x, mask=None, recompute=False):
    """``SBTransformerBlock.forward`` for x [B, T, N] with fused attention, without attention weights."""
    if model.use_positional_encoding:
        x = x + _positional_encoding(model.pos_enc, x.shape[1])
    # The hooks of _after_norm would keep what a checkpoint shall not.
    after_norm = _after_norm_kept if recompute else _after_norm
    for layer in model.mdl.layers:
        x = run_layer(_transformer_layer, layer, x, mask, after_norm, recompute=recompute)
    return model.mdl.norm(x)


def _transformer_layer(layer, x, mask, after_norm):
    attend = partial(_self_attention, layer.self_att.att, mask=mask)
    if layer.normalize_before:
        x = x + layer.dropout1(after_norm(attend, layer.norm1, x))
        return x + layer.dropout2(after_norm(layer.pos_ffn.ffn, layer.norm2, x))
    x = layer.norm1(x + layer.dropout1(attend(x)))
    return layer.norm2(x + layer.dropout2(layer.pos_ffn.ffn(x)))


def _after_norm_kept(function, norm, x):
    return function(norm(x))


def _after_norm(function, norm, x):
    """``function(norm(x))`` that does not keep norm(x) for the backward pass, but computes it again from x.

    That is a fifth of a transformer's memory for a hundredth of its time.
    """
    normed = norm(x)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(normed)
    if normed.nbytes < _BYTES_WORTH_SAVING:
        return function(normed)
    address = normed.data_ptr()  # not the tensor: the hooks would keep it

    def pack(saved):
        is_normed = saved.data_ptr() == address and saved.numel() == x.numel() and saved.is_contiguous()
        return saved.shape if is_normed else saved

    def unpack(packed):
        return norm(x.detach()).view(packed) if isinstance(packed, torch.Size) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(normed)


def _self_attention(attention, x, mask=None):
    """``nn.MultiheadAttention`` of x [B, T, N] to itself. The mask is True where a key may be attended."""
    B, T, N = x.shape
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # [B, T, 3*N]
    heads = (B, T, attention.num_heads, attention.head_dim)
    q, k, v = (part.view(heads).transpose(1, 2) for part in qkv.chunk(3, dim=2))  # each [B, heads, T, N/heads]
    dropout = attention.dropout if attention.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # [B, heads, T, N/heads]
    return attention.out_proj(y.transpose(1, 2).reshape(B, T, N))  # [B, T, N]


def _positional_encoding(encoding, length):
    """The first positions [1, length, N] of SpeechBrain's ``PositionalEncoding``, also beyond those it holds."""
    held = encoding.pe  # [1, T, N]
    if not torch.compiler.is_exporting() and length <= held.shape[1]:  # what is exported must serve every length
        return held[:, :length]
    num_held, channels, device = *held.shape[1:], held.device
    positions = torch.arange(num_held, torch.sym_max(num_held, length), device=device).float()  # [T']
    rates = torch.exp(torch.arange(0, channels, 2, device=device).float() * -(math.log(10000.0) / channels))
    angles = positions[:, None] * rates  # [T', N/2]
    further = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # [T', N]
    return torch.cat([held, further[None].to(held.dtype)], dim=1)[:, :length]  # [1, length, N]
