"""The losses against torchmetrics, fast_bss_eval, asteroid, SpeechBrain, plain loops and closed forms."""

import itertools
import math

import pytest
import torch

from dsd_modules import losses
from dsd_modules.losses import (
    PITLoss,
    assigned_loss,
    block_weights,
    is_silent,
    layerwise_loss,
    length_mask,
    pairwise_neg_si_sdr,
)
from dsd_modules.permutation import invert_permutation, reorder_estimates

SPEAKERS = [2, 3, 5, 8]
TOLERANCE_DB = 1e-3


def signals(num_spks, batch=4, num_samples=2000, seed=0, noise=0.5, dtype=torch.float64):
    """Shuffled, scaled, noisy references with means of their own; returns est, ref, and the shuffle."""
    rng = torch.Generator().manual_seed(seed + 100 * num_spks)
    ref = torch.randn(batch, num_spks, num_samples, generator=rng, dtype=dtype)
    shuffle = torch.stack([torch.randperm(num_spks, generator=rng) for _ in range(batch)])
    est = reorder_estimates(ref, shuffle)  # est j is reference shuffle[j]
    est = est + noise * torch.randn(est.shape, generator=rng, dtype=dtype)
    est = est * (0.1 + torch.rand(batch, num_spks, 1, generator=rng, dtype=dtype))
    return est + 0.3, ref - 0.2, shuffle


def slow_neg_si_sdr(est, ref):
    """One pair by the definition (Le Roux et al. 2019, eq. 3), in plain float64."""
    est, ref = est.double() - est.double().mean(), ref.double() - ref.double().mean()
    target = (est @ ref) / (ref @ ref) * ref
    noise = est - target
    return -10 * math.log10(float(target @ target) / float(noise @ noise))


def slow_matrix(est, ref):
    """``[B, N_ref, N_est]``."""
    return torch.tensor([[[slow_neg_si_sdr(e, r) for e in es] for r in rs] for es, rs in zip(est, ref, strict=True)])


def assert_close_within(bound_db, matrix, expected):
    """Equal to 1e-3 dB inside the bound. Beyond it everyone saturates in a way of their own: ours at 80 dB."""
    is_inside = expected.abs() < bound_db
    assert is_inside.double().mean() > 0.5
    torch.testing.assert_close(matrix[is_inside], expected[is_inside], atol=TOLERANCE_DB, rtol=0)
    assert (matrix[~is_inside].abs() > bound_db - 1).all()
    assert (matrix.abs() <= 80).all()


# Each oracle returns its per-item loss in dB and the index of the estimate assigned to each reference.


def torchmetrics_oracle(est, ref):
    audio = pytest.importorskip("torchmetrics.functional.audio")

    def si_sdr(est, ref):
        return audio.scale_invariant_signal_distortion_ratio(est, ref, zero_mean=True)

    value, perm = audio.permutation_invariant_training(est, ref, si_sdr, eval_func="max")
    ordered = audio.pit_permutate(est, perm)  # its own convention: now in the order of the references
    return -value, perm, ordered


def fast_bss_eval_oracle(est, ref):
    metrics = pytest.importorskip("fast_bss_eval.torch")
    value, perm = metrics.si_sdr(ref, est, zero_mean=True, return_perm=True)
    return -value.mean(-1), perm, torch.stack([e[p] for e, p in zip(est, perm, strict=True)])


def asteroid_oracle(est, ref):
    sdr = pytest.importorskip("asteroid.losses.sdr")
    wrapper = pytest.importorskip("asteroid.losses.pit_wrapper")
    matrix = sdr.PairwiseNegSDR("sisdr", zero_mean=True)(est, ref)
    loss, perm = wrapper.PITLossWrapper.find_best_perm(matrix)
    return loss, perm, wrapper.PITLossWrapper.reorder_source(est, perm)


def speechbrain_oracle(est, ref):
    losses = pytest.importorskip("speechbrain.nnet.losses")
    wrapper = losses.PitWrapper(losses.cal_si_snr)
    # The recipes call it with the references first: its permutation names references, so it is the inverse.
    loss, perm = wrapper(ref.transpose(1, 2), est.transpose(1, 2))
    perm = invert_permutation(torch.tensor(perm))
    return loss, perm, reorder_estimates(est, perm)


ORACLES = [torchmetrics_oracle, fast_bss_eval_oracle, asteroid_oracle, speechbrain_oracle]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(
    ("oracle", "num_spks"),
    # SpeechBrain tries all N! permutations in Python, which takes minutes beyond 3.
    [(o, n) for o in ORACLES for n in SPEAKERS if o is not speechbrain_oracle or n <= 3],
)
def test_pit_equals_oracle(oracle, num_spks, noise, dtype):
    est, ref, _ = signals(num_spks, noise=noise, dtype=dtype)
    loss, perm, ordered = oracle(est, ref)
    result = PITLoss()(est, ref)
    torch.testing.assert_close(result.loss, loss, atol=TOLERANCE_DB, rtol=0)
    assert torch.equal(result.perm, perm)
    assert torch.equal(reorder_estimates(est, result.perm), ordered)


@pytest.mark.parametrize("oracle", ORACLES)
def test_pit_direction_on_cycles(oracle):
    # The estimates are the references rolled by one: estimate j is reference j+1, reference i is estimate i-1.
    est, ref, _ = signals(3, batch=2)
    rng = torch.Generator().manual_seed(1)
    est = ref[:, [1, 2, 0]] + 0.1 * torch.randn(ref.shape, generator=rng, dtype=ref.dtype)
    expected = torch.tensor([[2, 0, 1]] * 2)
    loss, perm, ordered = oracle(est, ref)
    result = PITLoss()(est, ref)
    assert torch.equal(result.perm, expected)
    assert torch.equal(perm, expected)
    assert torch.equal(reorder_estimates(est, result.perm), ordered)
    torch.testing.assert_close(result.loss, loss, atol=TOLERANCE_DB, rtol=0)


@pytest.mark.parametrize("num_spks", [1, *SPEAKERS])
def test_matrix_equals_the_definition(num_spks):
    est, ref, shuffle = signals(num_spks, batch=2)
    matrix = pairwise_neg_si_sdr(est, ref)  # rows are references
    assert_close_within(55, matrix, slow_matrix(est, ref).double())
    assert torch.equal(PITLoss()(est, ref).perm, invert_permutation(shuffle))


@pytest.mark.parametrize("num_spks", SPEAKERS)
def test_matrix_equals_peers(num_spks):
    est, ref, _ = signals(num_spks)
    matrix = pairwise_neg_si_sdr(est, ref)
    peer = pytest.importorskip("fast_bss_eval.torch").pairwise_si_sdr_loss(est, ref, zero_mean=True)
    assert_close_within(40, matrix, peer)
    sdr = pytest.importorskip("asteroid.losses.sdr")
    peer = sdr.PairwiseNegSDR("sisdr", zero_mean=True)(est, ref)  # its rows are estimates
    assert_close_within(40, matrix, peer.transpose(1, 2))


@pytest.mark.parametrize("db", [-20.0, 0.0, 10.0, 40.0, 60.0])
def test_closed_form_of_two_orthogonal_signals(db):
    time = torch.arange(800) / 800
    ref, noise = torch.sin(2 * math.pi * 5 * time), torch.cos(2 * math.pi * 9 * time)
    est = 3 * (ref + 10 ** (-db / 20) * noise)
    loss = pairwise_neg_si_sdr(est.double().view(1, 1, -1), ref.double().view(1, 1, -1))
    assert loss.item() == pytest.approx(-db, abs=TOLERANCE_DB)


def test_shape_is_references_by_estimates():
    est, ref = torch.randn(2, 4, 100), torch.randn(2, 3, 100)
    matrix = pairwise_neg_si_sdr(est, ref)
    assert matrix.shape == (2, 3, 4)
    assert matrix[1, 2, 3].item() == pytest.approx(slow_neg_si_sdr(est[1, 3], ref[1, 2]), abs=TOLERANCE_DB)


# Invariances


@pytest.mark.parametrize("garbage", [0.0, 1e4, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_spks", [2, 3])
def test_padding_never_changes_value_or_gradient(num_spks, garbage):
    est, ref, _ = signals(num_spks, dtype=torch.float32)
    lengths = torch.tensor([2000, 1500, 1, 701])
    est_padded, ref_padded = est.clone(), ref.clone()
    for item, length in enumerate(lengths):
        est_padded[item, :, length:] = garbage
        ref_padded[item, :, length:] = -garbage
    est_padded.requires_grad_()
    result = PITLoss()(est_padded, ref_padded, lengths)
    result.loss.sum().backward()
    assert not est_padded.grad.isnan().any()
    for item in (0, 1, 3):
        alone = est[item : item + 1, :, : lengths[item]].clone().requires_grad_()
        expected = PITLoss()(alone, ref[item : item + 1, :, : lengths[item]])
        expected.loss.sum().backward()
        torch.testing.assert_close(result.loss_matrix[item], expected.loss_matrix[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(est_padded.grad[item, :, : lengths[item]], alone.grad[0])
        assert torch.equal(result.perm[item], expected.perm[0])
        assert (est_padded.grad[item, :, lengths[item] :] == 0).all()


def test_padding_garbage_in_the_references_only():
    est, ref, _ = signals(2, dtype=torch.float32)
    lengths = torch.full((4,), 1200)
    expected = pairwise_neg_si_sdr(est, ref, lengths)
    ref[..., 1200:] = math.nan
    assert torch.equal(pairwise_neg_si_sdr(est, ref, lengths), expected)
    assert not is_silent(ref, lengths).any()


def test_full_lengths_equal_none():
    est, ref, _ = signals(3)
    torch.testing.assert_close(
        pairwise_neg_si_sdr(est, ref, torch.full((4,), est.shape[-1])), pairwise_neg_si_sdr(est, ref)
    )


def test_length_mask():
    mask = length_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.shape == (3, 1, 3)
    assert mask[:, 0].int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_zero_and_one_sample_are_silent_not_nan():
    est, ref = torch.randn(2, 2, 50, requires_grad=True), torch.randn(2, 2, 50)
    matrix = pairwise_neg_si_sdr(est, ref, torch.tensor([0, 1]))
    matrix.sum().backward()
    assert (matrix == 0).all()
    assert (est.grad == 0).all()
    assert is_silent(ref, torch.tensor([0, 1])).all()


@pytest.mark.parametrize("scale", [-1.0, 1e-4, 0.5, 1e4])
def test_scale_of_either_side_changes_nothing(scale):
    est, ref, _ = signals(3, dtype=torch.float32)
    expected = pairwise_neg_si_sdr(est, ref)
    torch.testing.assert_close(pairwise_neg_si_sdr(scale * est, ref), expected, atol=TOLERANCE_DB, rtol=0)
    torch.testing.assert_close(pairwise_neg_si_sdr(est, scale * ref), expected, atol=TOLERANCE_DB, rtol=0)
    torch.testing.assert_close(pairwise_neg_si_sdr(scale * est, scale * ref), expected, atol=TOLERANCE_DB, rtol=0)


def test_scale_of_one_speaker_of_one_item_changes_nothing():
    est, ref, _ = signals(3, dtype=torch.float32)
    expected = pairwise_neg_si_sdr(est, ref)
    est[1, 2] *= 1e-3
    ref[2, 0] *= 1e3
    torch.testing.assert_close(pairwise_neg_si_sdr(est, ref), expected, atol=TOLERANCE_DB, rtol=0)


def test_mean_changes_nothing():
    est, ref, _ = signals(3, dtype=torch.float32)
    expected = pairwise_neg_si_sdr(est, ref)
    torch.testing.assert_close(pairwise_neg_si_sdr(est + 10, ref - 5), expected, atol=TOLERANCE_DB, rtol=0)


@pytest.mark.parametrize("num_spks", SPEAKERS)
def test_order_of_estimates_and_references_changes_nothing(num_spks):
    est, ref, _ = signals(num_spks)
    result = PITLoss()(est, ref)
    order = torch.randperm(num_spks, generator=torch.Generator().manual_seed(9))
    shuffled = PITLoss()(est[:, order], ref)
    torch.testing.assert_close(shuffled.loss, result.loss)
    assert torch.equal(order[shuffled.perm], result.perm)  # the same estimates, under their new numbers
    shuffled = PITLoss()(est, ref[:, order])
    torch.testing.assert_close(shuffled.loss, result.loss)
    assert torch.equal(shuffled.perm, result.perm[:, order])


def test_items_do_not_see_each_other():
    est, ref, _ = signals(3)
    result = PITLoss()(est, ref)
    for item in range(len(est)):
        alone = PITLoss()(est[item : item + 1], ref[item : item + 1])
        torch.testing.assert_close(alone.loss, result.loss[item : item + 1])


# Silence, perfection, garbage


def gradient(est, ref, lengths=None):
    est = est.clone().requires_grad_()
    matrix = pairwise_neg_si_sdr(est, ref, lengths)
    matrix.sum().backward()
    return matrix.detach(), est.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 1.0, 1e-3, 1e4])
def test_silent_reference_neither_helps_nor_hurts(level, dtype):
    est, ref, _ = signals(3, dtype=dtype)
    ref[1, 2] = level  # digital silence, or a constant
    expected, _ = gradient(est, ref)
    assert is_silent(ref).nonzero().tolist() == [[1, 2]]
    matrix, grad = gradient(est, ref)
    assert matrix.isfinite().all()
    assert (matrix[1, 2] == 0).all()
    assert torch.equal(matrix[0], expected[0])
    # The gradient of the item is that of its audible references alone.
    _, audible = gradient(est[1:2], ref[1:2, :2])
    torch.testing.assert_close(grad[1:2], audible)
    est.requires_grad_()
    result = PITLoss()(est, ref)
    (grad,) = torch.autograd.grad(result.loss.sum(), est)
    assert grad.isfinite().all()
    assert (grad[1, result.perm[1, 2]] == 0).all()  # whoever got the silence learns nothing
    assert grad.flatten(1).norm(dim=1)[1] < 2 * grad.flatten(1).norm(dim=1)[0]


def test_all_references_silent():
    est, ref, _ = signals(3)
    matrix, grad = gradient(est, torch.zeros_like(ref))
    assert (matrix == 0).all()
    assert (grad == 0).all()


def test_silence_under_the_mask_only():
    est, ref, _ = signals(2)
    ref[0, 1, :500] = 0.0
    lengths = torch.tensor([500, 2000, 2000, 2000])
    assert is_silent(ref, lengths).tolist() == [[False, True]] + [[False, False]] * 3
    assert not is_silent(ref).any()
    assert (pairwise_neg_si_sdr(est, ref, lengths)[0, 1] == 0).all()


@pytest.mark.parametrize("level", [1e-6, 1e-3, 1.0, 1e3])
def test_quiet_is_not_silent(level):
    _, ref, _ = signals(2, dtype=torch.float32)
    assert not is_silent(level * ref).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, 1.0, 1e3])
def test_silent_estimate_is_the_worst_and_does_not_poison(level, dtype):
    # A constant estimate carries no signal either: its SI-SDR is that of silence.
    est, ref, _ = signals(3, num_samples=8000, dtype=dtype)
    _, usual = gradient(est, ref)
    est[1, 2] = level
    matrix, grad = gradient(est, ref)
    assert matrix.isfinite().all()
    assert (matrix[1, :, 2] == 80).all()
    assert grad.isfinite().all()
    assert torch.equal(grad[0], usual[0])
    assert grad[1, 2].norm() <= 10 * usual[1, 2].norm()


def test_silent_estimate_of_silent_reference():
    est, ref, _ = signals(2)
    est[0, 1], ref[0, 0] = 0.0, 0.0
    matrix, grad = gradient(est, ref)
    assert matrix[0, 0].tolist() == [0.0, 0.0]
    assert matrix.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perfect_estimate_is_finite_and_its_gradient_small(dtype):
    _, ref, _ = signals(3, dtype=dtype)
    for est in (ref, 2 * ref, -ref):
        est = est.clone().requires_grad_()
        result = PITLoss()(est, ref)
        result.loss.sum().backward()
        assert (result.loss == -80).all()
        assert result.loss.isfinite().all()
        assert est.grad.isfinite().all()
        assert est.grad.norm() < 1


def test_orthogonal_estimate_is_finite():
    ref = torch.tensor([[[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]])
    matrix, grad = gradient(ref, ref)
    assert matrix.isfinite().all()
    assert grad.isfinite().all()
    assert matrix[0, 0, 1] == 80


def test_nan_estimate_does_not_crash_and_stays_in_its_item():
    est, ref, _ = signals(3)
    expected = PITLoss()(est, ref)
    est[1, 0, 5] = math.nan
    est[2] = math.inf
    result = PITLoss()(est, ref)
    assert torch.equal(result.perm.sort(-1).values, torch.arange(3).expand(4, 3))
    assert not result.loss[[1, 2]].isfinite().any()
    assert torch.equal(result.loss[[0, 3]], expected.loss[[0, 3]])


# Number formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    est, ref, _ = signals(3, num_samples=32000, dtype=torch.float32)
    est, ref = (300 * est).to(dtype), (300 * ref).to(dtype)  # energies far over float16's 65504
    est.requires_grad_()
    result = PITLoss()(est, ref)
    assert result.loss.dtype == result.loss_matrix.dtype == torch.float32
    expected = PITLoss()(est.detach().double(), ref.double())
    torch.testing.assert_close(result.loss.double(), expected.loss, atol=TOLERANCE_DB, rtol=0)
    result.loss.mean().backward()
    assert est.grad.dtype == dtype
    assert est.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    est, ref, _ = signals(3, dtype=torch.float32)
    expected = PITLoss()(est, ref)
    with torch.autocast("cpu", dtype=dtype):
        result = PITLoss()(est, ref)
    assert torch.equal(result.loss_matrix, expected.loss_matrix)
    assert torch.equal(result.loss, expected.loss)


def test_float64_stays_float64():
    est, ref, _ = signals(2)
    assert PITLoss()(est, ref).loss.dtype == torch.float64


# Pieces: on a CPU, the sums run over pieces of the signals


@pytest.mark.parametrize("piece_size", [1, 50, 1000, 4000])
@pytest.mark.parametrize("lengths", [None, [200, 1, 130, 77]])
@pytest.mark.parametrize("num_blocks", [None, 3])
def test_pieces_change_nothing(num_blocks, lengths, piece_size, monkeypatch):
    # 200 samples of 6 or 12 rows: pieces of a sample, of a part of an item, of one item, and of several.
    est, ref, _ = signals(3, num_samples=200)
    est = est if num_blocks is None else torch.stack([est, est.roll(1, 1), est + ref])
    lengths = None if lengths is None else torch.tensor(lengths)

    def matrix_and_gradients():
        leaves = est.clone().requires_grad_(), ref.clone().requires_grad_()
        matrix = pairwise_neg_si_sdr(*leaves, lengths)
        weights = torch.arange(matrix.numel(), dtype=matrix.dtype).view_as(matrix)
        return matrix, *torch.autograd.grad((weights * matrix).sum(), leaves), is_silent(ref, lengths)

    expected = matrix_and_gradients()
    monkeypatch.setattr(losses, "_PIECE_SIZE", piece_size)
    for result, whole in zip(matrix_and_gradients(), expected, strict=True):
        torch.testing.assert_close(result, whole)


def test_long_signals_are_never_copied_to_float64():
    est, ref = torch.randn(4, 2, 100_000, requires_grad=True), torch.randn(4, 2, 100_000)
    with torch.profiler.profile(profile_memory=True) as profiler:
        PITLoss()(est, ref).loss.sum().backward()
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert largest <= est.nbytes  # the gradient


# Gradients


@pytest.mark.parametrize("num_spks", [1, 3])
def test_gradcheck_of_blocks_and_of_more_estimates_than_references(num_spks):
    est, ref, _ = signals(3, batch=2, num_samples=12)
    est = torch.stack([est, est.flip(1) + 0.1 * ref]).requires_grad_()
    ref = ref[:, :num_spks].clone().requires_grad_()
    assert torch.autograd.gradcheck(pairwise_neg_si_sdr, (est, ref))


def test_gradient_under_autocast_is_that_without():
    est, ref, _ = signals(3, dtype=torch.float32)
    _, expected = gradient(est, ref)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, result = gradient(est, ref)
    assert torch.equal(result, expected)


def test_gradcheck_pairwise_with_lengths():
    est, ref, _ = signals(3, batch=2, num_samples=12)
    lengths = torch.tensor([12, 9])
    est.requires_grad_()
    ref.requires_grad_()
    assert torch.autograd.gradcheck(lambda e, r: pairwise_neg_si_sdr(e, r, lengths), (est, ref))


@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_gradcheck_pit(num_spks):
    est, ref, _ = signals(num_spks, batch=2, num_samples=12)
    assert torch.autograd.gradcheck(lambda e: PITLoss()(e, ref).loss, (est.requires_grad_(),))


@pytest.mark.parametrize("layer_permutation", ["shared", "independent"])
def test_gradcheck_layerwise(layer_permutation):
    est, ref, _ = signals(3, batch=2, num_samples=12)
    est = torch.stack([est.flip(1), est + 0.3 * ref.roll(1, 1)])
    lengths = torch.tensor([11, 12])

    def loss(est):
        return layerwise_loss(PITLoss()(est, ref, lengths), None, None, "ramp", layer_permutation).loss

    assert torch.autograd.gradcheck(loss, (est.requires_grad_(),))


def test_excluded_items_have_no_gradient_and_the_rest_keep_one_over_b():
    est, ref, _ = signals(3)
    keep = torch.tensor([True, False, True, False])

    def batch_gradient(weights):
        leaf = est.clone().requires_grad_()
        (PITLoss()(leaf, ref).loss * weights).sum().backward()
        return leaf.grad

    leaf = est.clone().requires_grad_()
    loss = torch.where(keep, PITLoss()(leaf, ref).loss, 0.0).mean()
    loss.backward()
    assert (leaf.grad[~keep] == 0).all()
    torch.testing.assert_close(leaf.grad, batch_gradient(keep / 4))
    # Two batches of two, accumulated, equal the union.
    halves = [torch.where(keep[h], PITLoss()(est[h], ref[h]).loss, 0.0).mean() for h in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, loss)


def test_an_excluded_silent_item_does_not_poison_the_batch():
    est, ref, _ = signals(3)
    est[1] = 0.0
    ref[1, 0] = 0.0
    keep = torch.tensor([True, False, True, True])
    leaf = est.clone().requires_grad_()
    torch.where(keep, PITLoss()(leaf, ref).loss, 0.0).mean().backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[1] == 0).all()


# Layer-wise


def slow_layerwise(est, ref, weights, layer_permutation, perm=None, imposed=None, lengths=None):
    """Loops over blocks, items and speakers; permutations by trying them all."""
    num_blocks, batch, num_spks, num_samples = est.shape
    lengths = [num_samples] * batch if lengths is None else lengths.tolist()
    block_losses = torch.zeros(num_blocks, batch, dtype=torch.float64)
    for b in range(batch):

        def pair(block, i, j, b=b):
            return slow_neg_si_sdr(est[block, b, j, : lengths[b]], ref[b, i, : lengths[b]])

        def mean_loss(block, assignment, pair=pair):
            return sum(pair(block, i, assignment[i]) for i in range(num_spks)) / num_spks

        def best(block, mean_loss=mean_loss):
            return min(itertools.permutations(range(num_spks)), key=lambda p: mean_loss(block, p))

        final = best(num_blocks - 1) if perm is None else perm[b].tolist()
        for block in range(num_blocks):
            is_own = layer_permutation == "independent" and block < num_blocks - 1
            if imposed is not None and imposed[b]:
                is_own = False
            block_losses[block, b] = mean_loss(block, best(block) if is_own else final)
    weights = torch.tensor(weights, dtype=torch.float64)
    return (weights[:, None] * block_losses).sum(0) / weights.sum(), block_losses


def blocks_of(num_spks, num_blocks, batch=4, num_samples=300):
    """Each block improves on the one before, some blocks in another order."""
    est, ref, _ = signals(num_spks, batch, num_samples, noise=0.8)
    rng = torch.Generator().manual_seed(11)
    blocks = [est + (num_blocks - 1 - b) * torch.randn(est.shape, generator=rng).double() for b in range(num_blocks)]
    blocks[0] = blocks[0].roll(1, dims=1)
    return torch.stack(blocks), ref


@pytest.mark.parametrize("layer_permutation", ["shared", "independent"])
@pytest.mark.parametrize("layer_weights", ["uniform", "ramp"])
@pytest.mark.parametrize(("num_spks", "num_blocks"), [(2, 1), (2, 2), (3, 2), (3, 4)])
def test_layerwise_equals_a_plain_loop(num_spks, num_blocks, layer_weights, layer_permutation):
    est, ref = blocks_of(num_spks, num_blocks)
    lengths = torch.tensor([300, 200, 250, 300])
    weights = [1.0] * num_blocks if layer_weights == "uniform" else list(range(1, num_blocks + 1))
    rng = torch.Generator().manual_seed(2)
    imposed_perm = torch.stack([torch.randperm(num_spks, generator=rng) for _ in range(4)])
    imposed = torch.tensor([True, False, True, False])
    own = PITLoss()(est, ref, lengths).perm[-1]
    mixed = torch.where(imposed[:, None], imposed_perm, own)
    for perm, items in ((None, None), (mixed, imposed), (mixed, None), (own, torch.zeros(4, dtype=torch.bool))):
        pit = PITLoss()(est, ref, lengths)
        result = layerwise_loss(pit, perm, items, layer_weights, layer_permutation)
        loss, block_losses = slow_layerwise(est, ref, weights, layer_permutation, perm, items, lengths)
        torch.testing.assert_close(result.block_losses, block_losses, atol=TOLERANCE_DB, rtol=0)
        torch.testing.assert_close(result.loss, loss, atol=TOLERANCE_DB, rtol=0)


def test_shared_and_independent_differ_where_a_block_is_in_another_order():
    est, ref = blocks_of(3, 2)
    pit = PITLoss()(est, ref)
    assert (pit.perm[0] != pit.perm[1]).any()
    shared, independent = layerwise_loss(pit), layerwise_loss(pit, layer_permutation="independent")
    assert (shared.block_losses[0] > independent.block_losses[0] + 1).all()
    assert torch.equal(shared.block_losses[1], independent.block_losses[1])


def test_blocks_at_once_equal_blocks_one_by_one():
    est, ref = blocks_of(3, 3)
    lengths = torch.tensor([300, 1, 250, 300])
    together = PITLoss()(est, ref, lengths)
    for block in range(3):
        alone = PITLoss()(est[block], ref, lengths)
        torch.testing.assert_close(together.loss[block], alone.loss)
        torch.testing.assert_close(together.loss_matrix[block], alone.loss_matrix)
        assert torch.equal(together.perm[block], alone.perm)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 8])
def test_block_weights(num_blocks):
    total = num_blocks * (num_blocks + 1) / 2
    uniform, ramp = block_weights(num_blocks).tolist(), block_weights(num_blocks, "ramp").tolist()
    assert uniform == pytest.approx([1 / num_blocks] * num_blocks)
    assert ramp == pytest.approx([(block + 1) / total for block in range(num_blocks)])


def test_one_block_is_plain_pit():
    est, ref, _ = signals(3)
    result = layerwise_loss(PITLoss()(est[None], ref))
    torch.testing.assert_close(result.loss, PITLoss()(est, ref).loss)


def test_assigned_loss_reads_references_by_row():
    matrix = torch.arange(9.0).view(1, 3, 3)
    assert assigned_loss(matrix, torch.tensor([[2, 0, 1]])).item() == pytest.approx((2 + 3 + 7) / 3)
    stacked = torch.stack([matrix, 10 * matrix])  # (L, B, N, N)
    assert assigned_loss(stacked, torch.tensor([[2, 0, 1]])).tolist() == [[pytest.approx(4)], [pytest.approx(40)]]


def test_one_speaker():
    est, ref, _ = signals(1)
    result = PITLoss()(est, ref)
    assert result.perm.tolist() == [[0]] * 4
    expected = [slow_neg_si_sdr(e[0], r[0]) for e, r in zip(est, ref, strict=True)]
    assert result.loss.tolist() == pytest.approx(expected, abs=TOLERANCE_DB)


# Users' mistakes


@pytest.mark.parametrize(
    ("est_shape", "ref_shape"),
    [((2, 3, 100), (2, 3, 99)), ((3, 3, 100), (2, 3, 100)), ((3, 100), (3, 100)), ((2, 3, 100), (2, 2, 3, 100))],
)
def test_wrong_shapes_are_named(est_shape, ref_shape):
    with pytest.raises(ValueError, match="shape") as error:
        pairwise_neg_si_sdr(torch.zeros(est_shape), torch.zeros(ref_shape))
    assert str(list(est_shape)) in str(error.value)
    assert str(list(ref_shape)) in str(error.value)


def test_other_number_of_speakers_is_named():
    with pytest.raises(ValueError, match=r"\[4, 3, 2\]"):
        PITLoss()(torch.randn(4, 2, 100), torch.randn(4, 3, 100))


@pytest.mark.parametrize("lengths", [torch.tensor(100), torch.tensor([100]), torch.tensor([[100], [100]])])
def test_wrong_lengths_are_named(lengths):
    with pytest.raises(ValueError, match="lengths") as error:
        pairwise_neg_si_sdr(torch.zeros(2, 3, 100), torch.zeros(2, 3, 100), lengths)
    assert str(list(lengths.shape)) in str(error.value)


def test_relative_lengths_are_refused():
    # SpeechBrain's own lengths are relative: taken for samples, they make every source silent and the loss 0.
    with pytest.raises(ValueError, match="lengths"):
        pairwise_neg_si_sdr(torch.randn(2, 3, 100), torch.randn(2, 3, 100), torch.tensor([1.0, 0.5]))


def test_lengths_out_of_range_are_cut_to_it():
    est, ref, _ = signals(3, batch=2, num_samples=100)
    expected = pairwise_neg_si_sdr(est, ref, torch.tensor([0, 100]))
    torch.testing.assert_close(pairwise_neg_si_sdr(est, ref, torch.tensor([-1, 150])), expected)


def test_layerwise_names_its_mistakes():
    pit = PITLoss()(torch.randn(2, 4, 3, 100), torch.randn(4, 3, 100))
    with pytest.raises(ValueError, match="'linear'"):
        layerwise_loss(pit, layer_weights="linear")
    with pytest.raises(ValueError, match="'own'"):
        layerwise_loss(pit, layer_permutation="own")


def test_layerwise_without_an_axis_of_blocks_is_refused():
    pit = PITLoss()(torch.randn(4, 3, 100), torch.randn(4, 3, 100))
    with pytest.raises(ValueError, match=r"\[4, 3, 3\]"):
        layerwise_loss(pit)
