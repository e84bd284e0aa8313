"""Assignments against brute force, SciPy and closed forms. The direction is tested with three-cycles."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dsd_modules import permutation
from dsd_modules.permutation import (
    assignment_margin,
    count_switches,
    invert_permutation,
    reorder_estimates,
    solve_assignment,
)


def brute_force(matrix):
    """``perm[i]`` is the column (estimate) chosen for row (reference) ``i``; and the sorted mean losses."""
    num_spks = len(matrix)
    scored = sorted(
        (sum(float(matrix[i][j]) for i, j in enumerate(perm)) / num_spks, perm)
        for perm in itertools.permutations(range(num_spks))
    )
    return list(scored[0][1]), [score for score, _ in scored]


@pytest.mark.parametrize("num_spks", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["auto", "exhaustive", "hungarian"])
def test_solve_equals_brute_force(num_spks, method):
    matrices = torch.randn(20, num_spks, num_spks, generator=torch.Generator().manual_seed(num_spks))
    perm = solve_assignment(matrices, method)
    assert perm.dtype == torch.int64
    assert perm.tolist() == [brute_force(matrix)[0] for matrix in matrices.tolist()]


@pytest.mark.parametrize("num_spks", [2, 3, 5, 6, 8])
def test_exhaustive_hungarian_and_scipy_agree(num_spks):
    matrices = 10 * torch.randn(6, num_spks, num_spks, generator=torch.Generator().manual_seed(num_spks))
    expected = [linear_sum_assignment(matrix.numpy())[1].tolist() for matrix in matrices]
    for method in ("auto", "exhaustive", "hungarian"):
        assert solve_assignment(matrices, method).tolist() == expected, method


@pytest.mark.parametrize("method", ["auto", "exhaustive", "hungarian"])
def test_direction_on_a_cycle(method):
    # Reference 0 wants estimate 2, reference 1 wants 0, reference 2 wants 1; the inverse is [1, 2, 0].
    matrix = torch.tensor([[9.0, 9.0, 0.0], [0.0, 9.0, 9.0], [9.0, 0.0, 9.0]])
    assert solve_assignment(matrix, method).tolist() == [2, 0, 1]


@pytest.mark.parametrize("method", ["exhaustive", "hungarian"])
def test_leading_axes_and_empty_batches(method):
    matrices = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    perm = solve_assignment(matrices, method)
    assert perm.shape == (2, 4, 3)
    assert torch.equal(perm[1, 2], solve_assignment(matrices[1, 2], method))
    assert solve_assignment(torch.empty(0, 3, 3), method).shape == (0, 3)


@pytest.mark.parametrize("method", ["exhaustive", "hungarian"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype(method, dtype):
    matrix = torch.tensor([[9, 9, 0], [0, 9, 9], [9, 0, 9]], dtype=dtype, requires_grad=True)
    assert solve_assignment(matrix, method).tolist() == [2, 0, 1]


@pytest.mark.parametrize("method", ["exhaustive", "hungarian"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_losses_still_give_a_permutation(method, bad):
    matrices = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(3))
    alone = solve_assignment(matrices, method)
    matrices[1] = bad  # a whole item
    matrices[2, :, 1] = bad  # one estimate
    perm = solve_assignment(matrices, method)
    assert torch.equal(perm.sort(-1).values, torch.arange(3).expand(3, 3))
    assert torch.equal(perm[0], alone[0])  # the neighbours do not notice


@pytest.mark.parametrize("method", ["exhaustive", "hungarian"])
def test_an_infinite_pair_is_avoided_and_the_rest_still_optimal(method):
    matrix = torch.tensor([[math.inf, 1.0, 3.0], [0.0, math.nan, 1.0], [2.0, 5.0, math.inf]])
    # finite permutations: (1, 2, 0) costs 4, (2, 0, 1) costs 8, (1, 0, 2) and others hit a bad pair
    assert solve_assignment(matrix, method).tolist() == [1, 2, 0]


def test_permutations_cached_under_inference_mode_serve_training():
    permutation._all_permutations.cache_clear()
    matrix = torch.randn(2, 4, 4, requires_grad=True)
    with torch.inference_mode():
        solve_assignment(matrix)
    perm = solve_assignment(matrix)
    matrix.gather(-1, perm.unsqueeze(-1)).sum().backward()
    assert matrix.grad.sum() == 8


@pytest.mark.parametrize("shape", [(3, 3, 2), (2, 3), (4,)])
def test_not_square_names_the_shape(shape):
    with pytest.raises(ValueError, match=str(list(shape)).replace("[", r"\[").replace("]", r"\]")):
        solve_assignment(torch.zeros(shape))


def test_unknown_method_names_the_value():
    with pytest.raises(ValueError, match="'greedy'"):
        solve_assignment(torch.zeros(1, 2, 2), "greedy")


@pytest.mark.parametrize("num_spks", [2, 3, 5])
def test_margin_is_second_best_minus_best(num_spks):
    matrices = torch.randn(10, num_spks, num_spks, generator=torch.Generator().manual_seed(4)).double()
    scores = [brute_force(matrix)[1] for matrix in matrices.tolist()]
    expected = torch.tensor([score[1] - score[0] for score in scores], dtype=torch.float64)
    torch.testing.assert_close(assignment_margin(matrices), expected)


def test_margin_bounds():
    assert assignment_margin(torch.zeros(2, 1, 1)).tolist() == [math.inf, math.inf]
    assert assignment_margin(torch.zeros(1, 3, 3)).tolist() == [0.0]
    with pytest.raises(ValueError, match="6"):
        assignment_margin(torch.zeros(1, 6, 6))


@pytest.mark.parametrize("perm", list(itertools.permutations(range(3))))
def test_reorder_and_invert(perm):
    est = torch.tensor([[[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]]])
    ordered = reorder_estimates(est, torch.tensor([perm]))
    assert [row[0] for row in ordered[0].tolist()] == [10.0 * (j + 1) for j in perm]
    inverse = invert_permutation(torch.tensor([perm]))
    assert [inverse[0, j].item() for j in perm] == [0, 1, 2]
    assert torch.equal(reorder_estimates(ordered, inverse), est)


def test_reorder_takes_each_item_its_own_perm_and_passes_gradients():
    est = torch.randn(2, 4, 3, 5, requires_grad=True)
    perm = torch.stack([torch.stack([torch.randperm(3) for _ in range(4)]) for _ in range(2)])
    ordered = reorder_estimates(est, perm)
    for block, item, i in itertools.product(range(2), range(4), range(3)):
        assert torch.equal(ordered[block, item, i], est[block, item, perm[block, item, i]])
    ordered.sum().backward()
    assert torch.equal(est.grad, torch.ones_like(est))


def test_reordered_estimates_are_in_the_order_of_the_references():
    ref = torch.randn(6, 5, 50, generator=torch.Generator().manual_seed(5))
    shuffle = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    est = reorder_estimates(ref, shuffle)
    perm = solve_assignment(torch.cdist(ref, est))  # [B, N_ref, N_est]
    assert torch.equal(perm, invert_permutation(shuffle))
    assert torch.equal(reorder_estimates(est, perm), ref)


def test_count_switches_counts_items_not_speakers():
    previous = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 2, 0], [2, 0, 1]])
    current = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1], [2, 0, 1]])
    assert count_switches(current, previous) == 2
    assert count_switches(current, current) == 0
    assert count_switches(torch.empty(0, 3), torch.empty(0, 3)) == 0
    assert count_switches(current.expand(2, 4, 3), previous.expand(2, 4, 3)) == 4
