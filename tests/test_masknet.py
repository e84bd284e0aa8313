"""The mask network and the separator, against SpeechBrain's own on the same weights."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speechbrain.lobes.models.dual_path import (
    Decoder,
    Dual_Path_Model,
    Encoder,
    SBRNNBlock,
    SBTransformerBlock,
    SepformerWrapper,
)
from speechbrain.lobes.models.transformer.Transformer import PositionalEncoding
from speechbrain.nnet.attention import MultiheadAttention
from torch.profiler import ProfilerActivity, profile

from dsd_modules.masknet import DualPathMaskNet, _overlap_add, _positional_encoding, _segment, _self_attention
from dsd_modules.separator import separate

CHANNELS = 8


def model_arguments(*, norm_before=True, positions=True, dropout=0.0, layers=2, rnn=None, **changes):
    models = [
        SBRNNBlock(2 * CHANNELS, 12, layers, rnn_type=rnn, dropout=dropout)
        if rnn
        else SBTransformerBlock(
            layers,
            2 * CHANNELS,
            nhead=2,
            d_ffn=24,
            dropout=dropout,
            norm_before=norm_before,
            use_positional_encoding=positions,
        )
        for _ in range(2)
    ]
    arguments = {
        "in_channels": CHANNELS,
        "out_channels": 2 * CHANNELS,
        "intra_model": models[0],
        "inter_model": models[1],
        "num_layers": 3,
        "norm": "ln",
        "K": 10,
        "num_spks": 3,
    }
    return {**arguments, **changes}


def small_masknet(seed=0, **changes):
    """Two layers per model, three blocks, three speakers; norms and biases away from their initial values."""
    torch.manual_seed(seed)
    masknet = DualPathMaskNet(**model_arguments(**changes))
    for parameter in masknet.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return masknet


def peer_of(masknet, **changes):
    """SpeechBrain's own model with the same weights."""
    peer = Dual_Path_Model(**model_arguments(**changes))
    peer.load_state_dict(masknet.state_dict(), strict=True)
    return peer.train(masknet.training)


def published_size(masknet_class=DualPathMaskNet, num_layers=8):
    """The mask network of the published SepFormer."""
    transformers = [
        SBTransformerBlock(num_layers, 256, 8, 1024, dropout=0, norm_before=True, use_positional_encoding=True)
        for _ in range(2)
    ]
    return masknet_class(256, 256, *transformers, num_layers=2, K=250, num_spks=2, linear_layer_after_inter_intra=False)


def coders(kernel=16, channels=CHANNELS, bias=False):
    encoder = Encoder(kernel_size=kernel, out_channels=channels)
    decoder = Decoder(channels, 1, kernel_size=kernel, stride=kernel // 2, bias=bias)
    return encoder, decoder


def assert_close(actual, expected, relative=1e-5):
    """Equal to a share of the expected peak."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < relative, f"{error=}"


def peak_bytes(function):
    """The most memory that a call holds at once, by PyTorch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


# --- against SpeechBrain ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_before": False},
        {"K": 7, "positions": False, "skip_around_intra": False},
        {"K": 7, "positions": False, "skip_around_intra": False, "norm_before": False},
        {"norm": "gln", "linear_layer_after_inter_intra": False},
        {"norm": "gln", "linear_layer_after_inter_intra": False, "norm_before": False},
        {"norm": "cln", "use_global_pos_enc": True, "max_length": 2 * CHANNELS},
        {"norm": "cln", "use_global_pos_enc": True, "max_length": 2 * CHANNELS, "norm_before": False},
        {"rnn": "LSTM"},
        {"rnn": "GRU", "K": 7, "norm": "gln", "skip_around_intra": False},
        {"rnn": "RNN", "norm": "cln", "layers": 1},
    ],
)
def test_equals_speechbrain(changes, training):
    masknet = small_masknet(**changes).train(training)
    peer = peer_of(masknet, **changes)
    x = torch.randn(2, CHANNELS, 73)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = masknet(ours), peer(theirs)
    assert_close(output, expected)

    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(gradient)
    assert_close(ours.grad, theirs.grad, relative=1e-4)
    peak = max(p.grad.abs().max() for p in peer.parameters())
    for (name, parameter), other in zip(masknet.named_parameters(), peer.parameters(), strict=True):
        assert (parameter.grad - other.grad).abs().max() < 1e-4 * peak, name


def test_published_size_takes_speechbrains_checkpoint(monkeypatch):
    """Keys, shapes and output of the model of SpeechBrain's SepformerWrapper."""
    torch.manual_seed(0)
    monkeypatch.setattr(SepformerWrapper, "reset_layer_recursively", lambda *_: None)  # takes 15 s
    peer = SepformerWrapper().eval()
    masknet = published_size().eval()
    masknet.load_state_dict(peer.masknet.state_dict(), strict=True)
    mixture = torch.randn(1, 3000)
    with torch.no_grad():
        x = peer.encoder(mixture)
        assert_close(masknet(x), peer.masknet(x))
        # [B, N, T] against SpeechBrain's [B, T, N]
        assert_close(separate(peer.encoder, masknet, peer.decoder, mixture), peer(mixture).transpose(1, 2))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_recurrent_models_without_linear_layers(bidirectional):
    """Their own output has the channels of the block then, also from one direction alone."""

    def changes():
        hidden = CHANNELS if bidirectional else 2 * CHANNELS
        models = [SBRNNBlock(2 * CHANNELS, hidden, 1, bidirectional=bidirectional) for _ in range(2)]
        return {"intra_model": models[0], "inter_model": models[1], "linear_layer_after_inter_intra": False}

    masknet = small_masknet(**changes())
    x = torch.randn(2, CHANNELS, 73)
    assert_close(masknet(x), peer_of(masknet, **changes())(x))
    assert_close(masknet(x, [73, 30])[:, 1, :, :30], masknet(x[1:, :, :30])[:, 0])


def test_attention_dropout():
    """Dropout falls on the attention weights, in training only: its mean is the output without dropout."""
    torch.manual_seed(0)
    attention = MultiheadAttention(nhead=2, d_model=16, dropout=0.5).att
    x = torch.randn(1, 12, 16)
    repeated = x.expand(2000, -1, -1)
    with torch.no_grad():
        expected = _self_attention(attention.eval(), x)[0]
        dropped = _self_attention(attention.train(), repeated)
    error = (dropped.mean(0) - expected).abs().max()
    assert error < 6 * dropped.std(0).max() / 2000**0.5
    assert dropped.std(0).min() > 0


def test_dropout_of_all_layers():
    """With a dropout that drops nearly everything, only the residual path is left, as in SpeechBrain's."""
    masknet = small_masknet(dropout=1 - 1e-7).train()
    peer = peer_of(masknet, dropout=1 - 1e-7)
    x = torch.randn(2, CHANNELS, 73)
    assert_close(masknet(x), peer(x))
    drop_nothing = peer_of(masknet).train()
    assert (drop_nothing(x) - peer(x)).abs().max() > 1e-2


@pytest.mark.parametrize("rnn", [None, "LSTM"])
def test_autocast_is_close_and_finite(rnn):
    masknet = small_masknet(rnn=rnn).eval()
    x = torch.randn(3, CHANNELS, 73)
    lengths = torch.tensor([73, 50, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, padded = masknet(x), masknet(x, lengths)
    assert_close(plain.float(), masknet(x), relative=0.1)
    assert_close(padded.float(), masknet(x, lengths), relative=0.1)


BF16 = """
import torch
from test_masknet import CHANNELS, small_masknet
with torch.autocast("cpu", dtype=torch.bfloat16):
    masks = small_masknet(rnn="LSTM")(torch.randn(2, CHANNELS, 73))
masks.float().sum().backward()
"""


def test_autocast_on_a_cpu_without_bf16():
    """oneDNN takes this CPU for such a one; PyTorch lets it fail at an LSTM all the same."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", BF16], cwd=Path(__file__).parent, env=environment, check=True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_norms_are_computed_again_in_the_backward_pass(monkeypatch, dtype):
    """The gradients are the same bit by bit. With autocast it is the narrow copy that is kept."""
    x = torch.randn(2, CHANNELS, 73)
    gradients = []
    for threshold, num_calls in ((0, 1 if dtype else 2), (float("inf"), 1)):
        monkeypatch.setattr("dsd_modules.masknet._BYTES_WORTH_SAVING", threshold)
        masknet, calls = small_masknet(), []
        norm = masknet.dual_mdl[1].inter_mdl.mdl.layers[0].norm2
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            masks = masknet(x)
        masks.float().square().sum().backward()
        assert len(calls) == num_calls
        gradients.append([p.grad for p in masknet.parameters()])
    for again, kept in zip(*gradients, strict=True):
        assert torch.equal(again, kept)


@pytest.mark.parametrize("lengths", [None, [73, 40, 3]])
def test_rows_one_after_the_other_give_the_same(monkeypatch, lengths):
    """Inference lets a transformer take a few rows at once, the last of them fewer; a row longer than that alone."""
    masknet = small_masknet().eval()
    x = torch.randn(3, CHANNELS, 73)
    expected = masknet(x, lengths)  # with gradients, all rows at once
    calls = []
    for name in ("intra_mdl", "inter_mdl"):
        norm = getattr(masknet.dual_mdl[0], name).mdl.norm
        norm.register_forward_hook(lambda module, inputs, _: calls.append(len(inputs[0])))
    with torch.no_grad():
        monkeypatch.setattr("dsd_modules.masknet._FRAMES_IN_CACHE", 110)
        assert_close(masknet(x, lengths), expected)
        assert calls == [11] * 4 + [4] + [6] * 5  # of 48 rows of 10 frames, and of 30 rows of 16
        monkeypatch.setattr("dsd_modules.masknet._FRAMES_IN_CACHE", 5)
        assert_close(masknet(x, lengths), expected)


@pytest.mark.parametrize("K", [2, 7, 10])
@pytest.mark.parametrize("num_frames", [1, 5, 20, 35])
def test_chunks_equal_speechbrains(K, num_frames):
    peer = peer_of(small_masknet())
    x = torch.randn(2, 3, num_frames)
    chunks, gap = _segment(x, K)
    expected, expected_gap = peer._Segmentation(x, K)
    assert torch.equal(chunks, expected)
    assert gap == expected_gap
    assert torch.equal(_overlap_add(chunks, gap), peer._over_add(expected, gap))
    assert chunks.permute(0, 3, 2, 1).is_contiguous()


# --- blocks ---


def test_every_block_equals_a_model_that_ends_there():
    masknet = small_masknet().eval()
    x = torch.randn(2, CHANNELS, 73)
    masks = masknet(x, blocks="all")  # [L, spks, B, N, F]
    assert masks.shape == (3, 3, 2, CHANNELS, 73)
    assert torch.equal(masks[-1], masknet(x))
    for num_layers in (1, 2, 3):
        truncated = Dual_Path_Model(**model_arguments(num_layers=num_layers)).eval()
        kept = {k: v for k, v in masknet.state_dict().items() if k in truncated.state_dict()}
        truncated.load_state_dict(kept, strict=True)
        assert_close(masks[num_layers - 1], truncated(x))


@pytest.mark.parametrize(("blocks", "indices"), [([0], [0]), ([-2, 0], [1, 0]), ((-1, 2), [2, 2]), (range(2), [0, 1])])
def test_only_what_was_asked_for_is_computed(blocks, indices):
    masknet = small_masknet().eval()
    x = torch.randn(2, CHANNELS, 73)
    every = masknet(x, blocks="all")
    calls = []
    for module in (*masknet.dual_mdl, masknet.end_conv1x1):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    masks = masknet(x, blocks=blocks)
    assert torch.equal(masks, every[indices])
    assert sum(module is masknet.end_conv1x1 for module in calls) == len(set(indices))
    assert sum(module in list(masknet.dual_mdl) for module in calls) == max(indices) + 1


def test_all_parameters_take_part():
    """DistributedDataParallel waits for the gradient of every parameter."""
    for blocks, lengths, rnn in itertools.product([None, "all"], [None, [73, 20]], [None, "LSTM"]):
        masknet = small_masknet(rnn=rnn)
        masknet(torch.randn(2, CHANNELS, 73), lengths, blocks).sum().backward()
        assert all(parameter.grad is not None for parameter in masknet.parameters())


# --- initialisation ---


@pytest.mark.parametrize("rnn", [None, "LSTM"])
def test_each_block_is_initialised_on_its_own(rnn):
    torch.manual_seed(3)
    masknet = DualPathMaskNet(**model_arguments(rnn=rnn))
    matrices = [(name, p) for name, p in masknet.named_parameters() if p.dim() > 1]
    for (name, one), (other_name, other) in itertools.combinations(matrices, 2):
        shared = torch.isin(one, other).float().mean()  # two random floats may coincide
        assert shared < 0.01, f"{name} shares {shared:.0%} of its values with {other_name}"


@pytest.mark.parametrize("rnn", [None, "GRU"])
def test_initialisation_is_that_of_fresh_modules(rnn):
    """The same rule and defaults: spread of the weights, zeros and ones, orthogonal recurrent weights."""
    torch.manual_seed(3)
    masknet = DualPathMaskNet(**model_arguments(rnn=rnn))
    for index, block in enumerate(masknet.dual_mdl):
        fresh = Dual_Path_Model(**model_arguments(num_layers=1, rnn=rnn)).dual_mdl[0]
        for (name, parameter), expected in zip(block.named_parameters(), fresh.parameters(), strict=True):
            if expected.unique().numel() == 1:
                assert torch.equal(parameter, expected), (index, name)
            else:
                torch.testing.assert_close(parameter.std(), expected.std(), rtol=0.5, atol=0)
            if "weight_hh" in name:
                torch.testing.assert_close(parameter.T @ parameter, torch.eye(12), rtol=0, atol=1e-5)


def test_initialisation_follows_the_seed():
    one, same, other = (small_masknet(seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "dual_mdl.1.inter_mdl.mdl.layers.0.self_att.att.in_proj_weight"
    assert not torch.equal(one[name], other[name])


# --- lengths ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"K": 7},
        {"norm": "gln", "norm_before": False},
        {"norm": "cln"},
        {"rnn": "LSTM"},
        {"rnn": "GRU", "K": 7, "norm": "gln"},
        {"rnn": "RNN", "norm": "cln"},
    ],
)
def test_padded_batch_equals_single_items(changes):
    """Also an item shorter than a chunk, of a single frame, and at the edges of a chunk."""
    masknet = small_masknet(**changes).eval()
    peer = peer_of(masknet, **changes)
    lengths = [73, 41, 35, 34, 20, 5, 1]
    x = 3 * torch.randn(len(lengths), CHANNELS, max(lengths)) + 1
    masks = masknet(x, torch.tensor(lengths), "all")  # [L, spks, B, N, F]
    for b, length in enumerate(lengths):
        alone = masknet(x[b : b + 1, :, :length], blocks="all")[:, :, 0]
        assert_close(masks[:, :, b, :, :length], alone)
        assert_close(masks[-1, :, b, :, :length], peer(x[b : b + 1, :, :length])[:, 0])
        assert masks[:, :, b, :, length:].count_nonzero() == 0


def test_global_positions_with_lengths():
    masknet = small_masknet(use_global_pos_enc=True, max_length=2 * CHANNELS).eval()
    x = torch.randn(2, CHANNELS, 73)
    masks = masknet(x, [73, 30])
    assert_close(masks[:, 1, :, :30], masknet(x[1:, :, :30])[:, 0])


@pytest.mark.parametrize("rnn", [None, "LSTM"])
def test_padding_does_not_matter_and_gradients_are_finite(rnn):
    lengths = torch.tensor([73, 40, 3])
    x = torch.randn(3, CHANNELS, 73)
    noisy = x.clone()
    for b, length in enumerate(lengths):
        noisy[b, :, length:] = 1e4 * torch.randn(CHANNELS, 73 - length)
    gradients = []
    for inputs in (x, noisy):
        masknet = small_masknet(rnn=rnn)
        inputs.requires_grad_()
        masknet(inputs, lengths, "all").square().sum().backward()
        gradients.append([inputs.grad, *(p.grad for p in masknet.parameters())])
    for clean, other in zip(*gradients, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, other)
    for b, length in enumerate(lengths):
        assert gradients[0][0][b, :, length:].count_nonzero() == 0


@pytest.mark.parametrize("rnn", [None, "LSTM"])
def test_gradients_of_a_padded_batch_are_those_of_its_items(rnn):
    masknet = small_masknet(rnn=rnn)
    lengths = [73, 40, 3]
    x = torch.randn(3, CHANNELS, 73)
    masknet(x, lengths).square().sum().backward()
    padded = [p.grad.clone() for p in masknet.parameters()]
    masknet.zero_grad()
    for b, length in enumerate(lengths):
        masknet(x[b : b + 1, :, :length]).square().sum().backward()
    peak = max(p.grad.abs().max() for p in masknet.parameters())
    for gradient, parameter in zip(padded, masknet.parameters(), strict=True):
        assert (gradient - parameter.grad).abs().max() < 1e-4 * peak


def test_full_lengths_take_the_plain_path():
    masknet = small_masknet().eval()
    x = torch.randn(2, CHANNELS, 73)
    masks = []
    masknet.dual_mdl[0].register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    assert torch.equal(masknet(x, torch.tensor([73, 73])), masknet(x))
    masknet(x, [73, 72])
    assert [mask is None for mask in masks] == [True, True, False]


# --- activation checkpointing ---


@pytest.mark.parametrize("lengths", [None, [73, 20]])
@pytest.mark.parametrize("changes", [{}, {"norm_before": False}, {"rnn": "LSTM"}])
def test_checkpointing_gives_the_same_gradients(monkeypatch, changes, lengths):
    """With dropout, whose draws must be the same again; and where norms are computed again without it."""
    monkeypatch.setattr("dsd_modules.masknet._BYTES_WORTH_SAVING", 0)
    x = torch.randn(2, CHANNELS, 73, dtype=torch.float64)
    results = []
    for activation_checkpointing in (False, True):
        masknet = small_masknet(dropout=0.3, activation_checkpointing=activation_checkpointing, **changes).double()
        inputs = x.clone().requires_grad_()
        torch.manual_seed(4)
        masks = masknet(inputs, lengths, "all")
        masks.square().sum().backward()
        results.append([masks, inputs.grad, *(p.grad for p in masknet.parameters())])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)
    torch.manual_seed(5)
    assert (masknet(x, lengths, "all") - masks).abs().max() > 1e-3  # dropout was at work


@pytest.mark.parametrize("rnn", [None, "LSTM"])
def test_checkpointing_with_autocast(rnn):
    x = torch.randn(2, CHANNELS, 73)
    gradients = []
    for activation_checkpointing in (False, True):
        masknet = small_masknet(rnn=rnn, dropout=0.1, activation_checkpointing=activation_checkpointing)
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            masks = masknet(x)
        masks.float().square().sum().backward()
        gradients.append([p.grad for p in masknet.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


@pytest.mark.parametrize("changes", [{}, {"norm_before": False}, {"rnn": "LSTM"}])
def test_checkpointing_saves_memory(changes):
    x = torch.randn(2, CHANNELS, 600)
    peaks = []
    for activation_checkpointing in (False, True):
        masknet = small_masknet(layers=4, activation_checkpointing=activation_checkpointing, **changes)
        peaks.append(peak_bytes(lambda masknet=masknet: masknet(x).sum().backward()))
    assert peaks[1] < 0.4 * peaks[0], peaks


def test_checkpointing_is_for_training_alone(monkeypatch):
    """It costs nothing elsewhere, and no weight tells of it."""
    calls = []

    def count(function, *args, **kwargs):
        calls.append(function)
        return function(*args)

    monkeypatch.setattr("dsd_modules.masknet.checkpoint", count)
    masknet = small_masknet(activation_checkpointing=True)
    x = torch.randn(2, CHANNELS, 73)
    masknet.eval()(x)
    with torch.no_grad():
        masknet.train()(x)
    small_masknet()(x)
    assert calls == []
    masknet(x)
    assert len(calls) == 3 * 2 * 2  # blocks, models, layers
    assert masknet.state_dict().keys() == small_masknet().state_dict().keys()


# --- long sequences ---


def test_positions_beyond_those_held():
    encoding = PositionalEncoding(6, max_len=5)
    torch.testing.assert_close(_positional_encoding(encoding, 40), PositionalEncoding(6, max_len=40).pe)
    assert torch.equal(_positional_encoding(encoding, 3), encoding.pe[:, :3])


def test_more_chunks_than_speechbrain_holds():
    changes = {"K": 2, "layers": 1, "num_layers": 1}
    masknet = small_masknet(**changes).eval()
    peer = peer_of(masknet, **changes)
    x = torch.randn(2, CHANNELS, 2600)
    with pytest.raises(RuntimeError):
        peer(x)
    peer.dual_mdl[0].inter_mdl.pos_enc = PositionalEncoding(2 * CHANNELS, max_len=2700)
    with torch.no_grad():
        assert_close(masknet(x), peer(x))
        assert_close(masknet(x, [2600, 2550])[:, 1, :, :2550], peer(x[1:, :, :2550])[:, 0])


# --- separate ---


@pytest.mark.parametrize("blocks", [None, "all", [0]])
def test_separate_equals_single_items(blocks):
    torch.manual_seed(0)
    encoder, decoder = coders(bias=True)  # which must not fill the padding
    masknet = small_masknet().eval()
    lengths = [611, 610, 608, 333, 57, 16]
    mixture = torch.randn(len(lengths), 611)
    garbage = mixture.clone()
    for b, length in enumerate(lengths):
        garbage[b, length:] = 100 * torch.randn(611 - length)
    estimates = separate(encoder, masknet, decoder, mixture, torch.tensor(lengths), blocks)  # [..., B, N, T]
    assert estimates.shape[-3:] == (6, 3, 611)
    assert torch.equal(estimates, separate(encoder, masknet, decoder, garbage, lengths, blocks))
    for b, length in enumerate(lengths):
        alone = separate(encoder, masknet, decoder, mixture[b : b + 1, :length], blocks=blocks)
        assert_close(estimates[..., b, :, :length], alone[..., 0, :, :])
        assert estimates[..., b, :, length:].count_nonzero() == 0


def test_separate_orders_blocks_items_and_speakers():
    """Each axis on its own, against masks decoded one at a time."""
    encoder, decoder = coders()
    masknet = small_masknet().eval()
    mixture = torch.randn(2, 200)
    estimates = separate(encoder, masknet, decoder, mixture, blocks="all")  # [L, B, N, T]
    features = encoder(mixture)
    masks = masknet(features, blocks="all")  # [L, spks, B, N, F]
    for block, item, speaker in itertools.product(range(3), range(2), range(3)):
        expected = decoder((masks[block, speaker, item] * features[item])[None])[0]
        assert_close(estimates[block, item, speaker], expected)


@pytest.mark.parametrize("num_samples", [16, 17, 200])
def test_separate_single_rows(num_samples):
    """SpeechBrain's decoder squeezes its output: one item, one block and one speaker keep their axes."""
    encoder, decoder = coders()
    masknet = small_masknet(num_spks=1)
    mixture = torch.randn(1, num_samples)
    assert separate(encoder, masknet, decoder, mixture).shape == (1, 1, num_samples)
    assert separate(encoder, masknet, decoder, mixture, blocks=[0]).shape == (1, 1, 1, num_samples)


def test_separate_calls_each_module_once_through_its_wrapper():
    class Wrapper(torch.nn.Module):  # hides attributes, as DistributedDataParallel does
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    encoder, decoder = coders()
    modules = [Wrapper(module) for module in (encoder, small_masknet(), decoder)]
    separate(*modules, torch.randn(3, 100), [100, 70, 50], "all").sum().backward()
    assert [module.calls for module in modules] == [1, 1, 1]
    assert all(p.grad is not None for module in modules for p in module.parameters())


def test_separate_published_size_equals_single_items():
    torch.manual_seed(0)
    encoder, decoder = coders(channels=256)
    masknet = published_size().eval()
    lengths = [3211, 1777]  # 400 and 221 frames: 6 chunks and 4, of 250
    mixture = torch.randn(2, 3211)
    with torch.no_grad():
        estimates = separate(encoder, masknet, decoder, mixture, lengths, "all")  # [L, B, N, T]
        for b, length in enumerate(lengths):
            alone = separate(encoder, masknet, decoder, mixture[b : b + 1, :length], blocks="all")[:, 0]
            assert_close(estimates[:, b, :, :length], alone, relative=1e-4)


# --- what is refused ---


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([3], "block 3"), ([0, -4], "block -4"), ([], "at least one"), ("last", "'last'")],
)
def test_wrong_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        small_masknet()(torch.randn(1, CHANNELS, 30), blocks=blocks)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([30, 31], r"\[30, 31\]"), ([0, 30], r"\[0, 30\]"), ([30], r"shape \[2\], but got \[1\]")],
)
def test_wrong_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        small_masknet()(torch.randn(2, CHANNELS, 30), lengths)


def test_wrong_models():
    with pytest.raises(ValueError, match=r"intra_model can only be SBTransformerBlock or SBRNNBlock, but got .*LSTM"):
        DualPathMaskNet(**model_arguments(intra_model=torch.nn.LSTM(16, 8)))
    for changes, message in (
        ({"rnn": "LSTM", "intra_model": SBRNNBlock(16, 12, 1, bidirectional=False)}, "intra_model gives 12"),
        ({"rnn": "LSTM", "inter_model": SBRNNBlock(16, 8, 1)}, "inter_model gives 16"),
        ({"inter_model": SBRNNBlock(16, 8, 1)}, "inter_model gives 16"),
        ({"rnn": "LSTM", "linear_layer_after_inter_intra": False}, "give 16 channels; but intra_model gives 24"),
    ):
        with pytest.raises(ValueError, match=message):
            DualPathMaskNet(**model_arguments(**changes))
    with pytest.raises(ValueError, match="RoPEMHA"):
        DualPathMaskNet(**model_arguments(inter_model=SBTransformerBlock(1, 16, 2, attention_type="RoPEMHA")))
    with pytest.raises(ValueError, match="got 1"):
        DualPathMaskNet(**model_arguments(K=1))
    with pytest.raises(ValueError, match="'bn'"):
        small_masknet(norm="bn")(torch.randn(2, CHANNELS, 30), [30, 10])


def test_wrong_mixtures():
    modules = [coders()[0], small_masknet(), coders()[1]]
    with pytest.raises(ValueError, match="15 samples, fewer than the encoder's kernel of 16"):
        separate(*modules, torch.randn(2, 15))
    with pytest.raises(ValueError, match="15 samples, fewer than the encoder's kernel of 16"):
        separate(*modules, torch.randn(2, 100), [100, 15])
    with pytest.raises(ValueError, match=r"exceed the 100 samples of the batch: \[101, 20\]"):
        separate(*modules, torch.randn(2, 100), [101, 20])
    with pytest.raises(ValueError, match=r"shape \[2\], but got \[3\]"):
        separate(*modules, torch.randn(2, 100), [100, 20, 20])
    with pytest.raises(ValueError, match=r"\[2, 1, 100\]"):
        separate(*modules, torch.randn(2, 1, 100))
