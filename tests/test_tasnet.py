"""Conv-TasNet's mask network, against SpeechBrain's own on the same weights."""

import numpy as np
import pytest
import torch
from speechbrain.lobes.models.conv_tasnet import MaskNet
from test_masknet import assert_close, coders, peak_bytes

from dsd_modules.separator import separate
from dsd_modules.tasnet import ConvTasNetMaskNet, _reflection

FILTERS = 8
CHANGES = [
    {},
    {"norm_type": "cLN"},
    {"P": 5, "causal": True, "norm_type": "cLN"},
    {"causal": True},
    {"mask_nonlinear": "softmax"},
]


def small_masknet(seed=0, **changes):
    """Three repeats of four temporal blocks, three speakers; norms away from their initial values."""
    torch.manual_seed(seed)
    masknet = ConvTasNetMaskNet(**{"N": FILTERS, "B": 6, "H": 12, "P": 3, "X": 4, "R": 3, "C": 3, **changes})
    for name, parameter in masknet.named_parameters():
        if name.endswith(("gamma", "beta")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return masknet


def peer_of(masknet, **changes):
    """SpeechBrain's own with the same weights."""
    peer = MaskNet(**{"N": FILTERS, "B": 6, "H": 12, "P": 3, "X": 4, "R": 3, "C": 3, **changes})
    weights = {name: masknet.state_dict()[name] for name in peer.state_dict()}
    peer.load_state_dict(weights, strict=True)
    return peer


# --- against SpeechBrain ---


@pytest.mark.parametrize("changes", CHANGES)
def test_equals_speechbrain(changes):
    masknet = small_masknet(**changes)
    peer = peer_of(masknet, **changes)
    assert masknet.state_dict().keys() == peer.state_dict().keys()
    x = torch.randn(2, FILTERS, 73)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = masknet(ours), peer(theirs)
    assert_close(output, expected)

    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(gradient)
    assert_close(ours.grad, theirs.grad, relative=1e-4)
    peers = dict(peer.named_parameters())
    peak = max(p.grad.abs().max() for p in peers.values())
    for name, parameter in masknet.named_parameters():
        assert (parameter.grad - peers[name].grad).abs().max() < 1e-4 * peak, name


def test_every_repeat_equals_a_model_that_ends_there():
    masknet = small_masknet()
    x = torch.randn(2, FILTERS, 73)
    masks = masknet(x, blocks="all")  # [R, spks, B, N, F]
    assert masks.shape == (3, 3, 2, FILTERS, 73)
    assert torch.equal(masks[-1], masknet(x))
    for R in (1, 2, 3):
        assert_close(masks[R - 1], peer_of(masknet, R=R)(x))


def test_published_size_takes_speechbrains_checkpoint():
    """Within SpeechBrain's encoder and decoder, from waveform to waveform."""
    torch.manual_seed(0)
    sizes = {"N": 512, "B": 128, "H": 512, "P": 3, "X": 8, "R": 3, "C": 2}
    masknet = ConvTasNetMaskNet(**sizes).eval()
    peer = MaskNet(**sizes)
    masknet.load_state_dict(peer.state_dict(), strict=True)
    encoder, decoder = coders(channels=512)
    mixture = torch.randn(1, 3000)
    with torch.no_grad():
        features = encoder(mixture)
        assert (features >= 0).all()  # Conv-TasNet's encoder ends in a ReLU, as SepFormer's
        masks = peer(features)
        expected = torch.cat([decoder(mask * features) for mask in masks])  # [spks, T]
        assert_close(separate(encoder, masknet, decoder, mixture)[0], expected, relative=1e-4)


def test_a_longer_dilation_than_speechbrain_builds():
    """Its layers are built on 256 frames, which a convolution of dilation 256 exceeds."""
    with pytest.raises(RuntimeError):
        MaskNet(N=8, B=6, H=12, P=3, X=9, R=1, C=2)
    x = torch.randn(2, FILTERS, 300)
    masknet = small_masknet(X=9, R=1)
    assert masknet(x).isfinite().all()
    assert_close(masknet(x, [300, 40])[:, 1, :, :40], masknet(x[1:, :, :40])[:, 0])


# --- blocks ---


@pytest.mark.parametrize(("blocks", "indices"), [([0], [0]), ([-2, 0], [1, 0]), ((-1, 2), [2, 2]), (range(2), [0, 1])])
def test_only_what_was_asked_for_is_computed(monkeypatch, blocks, indices):
    masknet = small_masknet()
    x = torch.randn(2, FILTERS, 73)
    every = masknet(x, blocks="all")
    calls = []
    for block in masknet.temporal_conv_net.values():
        block.layers["act"].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(masknet(x, blocks=blocks), every[indices])
    assert len(calls) == 4 * (max(indices) + 1)


def test_all_parameters_take_part():
    for lengths in (None, [73, 20]):
        masknet = small_masknet()
        masknet(torch.randn(2, FILTERS, 73), lengths, "all").sum().backward()
        assert all(parameter.grad is not None for parameter in masknet.parameters())


def test_each_repeat_is_initialised_on_its_own():
    """By the rule of fresh modules: no two matrices share values, and the spread is SpeechBrain's."""
    torch.manual_seed(3)
    masknet = ConvTasNetMaskNet(N=8, B=12, H=24, P=3, X=3, R=3, C=2)
    fresh = MaskNet(N=8, B=12, H=24, P=3, X=3, R=3, C=2).state_dict()
    matrices = {name: p for name, p in masknet.named_parameters() if "conv" in name and p.dim() > 1 and p.shape[0] > 1}
    for name, one in matrices.items():
        torch.testing.assert_close(one.std(), fresh[name].std(), rtol=0.5, atol=0)
        for other_name, other in matrices.items():
            if name != other_name:
                assert torch.isin(one, other).float().mean() < 0.05, (name, other_name)


# --- lengths ---


@pytest.mark.parametrize("changes", CHANGES)
def test_padded_batch_equals_single_items(changes):
    """Also items that are shorter than a convolution reaches, down to a single frame."""
    masknet = small_masknet(**changes)
    peer = peer_of(masknet, **changes)
    lengths = [73, 41, 18, 17, 9, 5, 2, 1]
    x = 3 * torch.randn(len(lengths), FILTERS, max(lengths)) + 1
    masks = masknet(x, torch.tensor(lengths), "all")  # [R, spks, B, N, F]
    for b, length in enumerate(lengths):
        item = x[b : b + 1, :, :length]
        assert_close(masks[:, :, b, :, :length], masknet(item, blocks="all")[:, :, 0])
        if length > 16:  # SpeechBrain reflects no more than that
            assert_close(masks[-1, :, b, :, :length], peer(item)[:, 0], relative=3e-5)
        assert masks[:, :, b, :, length:].count_nonzero() == 0


@pytest.mark.parametrize("length", [1, 2, 3, 10])
@pytest.mark.parametrize("reach", [0, 1, 4, 25])
def test_reflection_is_numpys(length, reach):
    x = torch.randn(2, 3, 10)
    padded = x.gather(2, _reflection(x, torch.tensor([length, 10]), reach))
    for item, size in zip(range(2), (length, 10), strict=True):
        expected = np.pad(x[item, :, :size].numpy(), ((0, 0), (reach, reach)), mode="reflect")
        assert np.array_equal(padded[item, :, : size + 2 * reach].numpy(), expected)
    assert torch.equal(x[1:].gather(2, _reflection(x[1:], None, reach)), padded[1:])


@pytest.mark.parametrize("changes", CHANGES[:3])
def test_padding_does_not_matter_and_gradients_are_finite(changes):
    lengths = torch.tensor([73, 40, 3])
    x = torch.randn(3, FILTERS, 73)
    noisy = x.clone()
    for b, length in enumerate(lengths):
        noisy[b, :, length:] = 1e4 * torch.randn(FILTERS, 73 - length)
    gradients = []
    for inputs in (x, noisy):
        masknet = small_masknet(**changes)
        inputs.requires_grad_()
        masknet(inputs, lengths, "all").square().sum().backward()
        gradients.append([inputs.grad, *(p.grad for p in masknet.parameters())])
    for clean, other in zip(*gradients, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, other)
    for b, length in enumerate(lengths):
        assert gradients[0][0][b, :, length:].count_nonzero() == 0


def test_gradients_of_a_padded_batch_are_those_of_its_items():
    masknet = small_masknet()
    lengths = [73, 40, 3]
    x = torch.randn(3, FILTERS, 73)
    masknet(x, lengths).square().sum().backward()
    padded = [p.grad.clone() for p in masknet.parameters()]
    masknet.zero_grad()
    for b, length in enumerate(lengths):
        masknet(x[b : b + 1, :, :length]).square().sum().backward()
    peak = max(p.grad.abs().max() for p in masknet.parameters())
    for gradient, parameter in zip(padded, masknet.parameters(), strict=True):
        assert (gradient - parameter.grad).abs().max() < 1e-4 * peak


def test_a_causal_model_sees_nothing_later():
    masknet = small_masknet(causal=True, norm_type="cLN")
    x = torch.randn(1, FILTERS, 73)
    later = x.clone()
    later[:, :, 50:] += torch.randn(FILTERS, 23)
    masks, others = masknet(x), masknet(later)
    assert torch.equal(masks[..., :50], others[..., :50])
    assert not torch.equal(masks[..., 50], others[..., 50])


def test_separate_equals_single_items():
    encoder, decoder = coders()
    masknet = small_masknet()
    lengths = [611, 610, 333, 16]
    mixture = torch.randn(len(lengths), 611)
    estimates = separate(encoder, masknet, decoder, mixture, torch.tensor(lengths), "all")  # [R, B, N, T]
    for b, length in enumerate(lengths):
        alone = separate(encoder, masknet, decoder, mixture[b : b + 1, :length], blocks="all")
        assert_close(estimates[:, b, :, :length], alone[:, 0])


# --- precision and memory ---


def test_autocast_is_close_and_finite():
    masknet = small_masknet()
    x = torch.randn(3, FILTERS, 73)
    lengths = torch.tensor([73, 50, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, padded = masknet(x), masknet(x, lengths)
    assert_close(plain.float(), masknet(x), relative=0.1)
    assert_close(padded.float(), masknet(x, lengths), relative=0.1)


@pytest.mark.parametrize("lengths", [None, [73, 20]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients(dtype, lengths):
    x = torch.randn(2, FILTERS, 73)
    results = []
    for activation_checkpointing in (False, True):
        masknet = small_masknet(activation_checkpointing=activation_checkpointing)
        if dtype == torch.float64:
            masknet, x = masknet.double(), x.double()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            masks = masknet(x, lengths, "all")
        masks.double().square().sum().backward()
        results.append([masks, *(p.grad for p in masknet.parameters())])
    for plain, again in zip(*results, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6 * float(plain.detach().abs().max())
        torch.testing.assert_close(again, plain, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=tolerance)


def test_checkpointing_saves_memory_in_training_alone(monkeypatch):
    x = torch.randn(2, FILTERS, 2000)
    peaks = []
    for activation_checkpointing in (False, True):
        masknet = small_masknet(H=32, activation_checkpointing=activation_checkpointing)
        peaks.append(peak_bytes(lambda masknet=masknet: masknet(x).sum().backward()))
    assert peaks[1] < 0.4 * peaks[0], peaks
    monkeypatch.setattr("dsd_modules.masknet.checkpoint", lambda *args, **kwargs: pytest.fail("checkpointed"))
    masknet.eval()(x)
    with torch.no_grad():
        masknet.train()(x)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "BN"}, "norm_type can only be 'gLN' or 'cLN', but got 'BN'"),
        ({"mask_nonlinear": "sigmoid"}, "mask_nonlinear can only be 'relu' or 'softmax', but got 'sigmoid'"),
        ({"P": 4}, "must be odd, but got 4"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        small_masknet(**changes)


def test_wrong_blocks_and_lengths():
    masknet, x = small_masknet(), torch.randn(2, FILTERS, 30)
    with pytest.raises(ValueError, match="block 3 does not exist in a model of 3 blocks"):
        masknet(x, blocks=[3])
    with pytest.raises(ValueError, match=r"\[30, 31\]"):
        masknet(x, [30, 31])
