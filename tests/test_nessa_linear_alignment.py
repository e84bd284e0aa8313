"""Linear alignments: Procrustes and least squares against oracles, and what none at all needs."""

import pytest
import scipy.linalg
import torch
from test_nessa_alignment import paired
from torch.nn import functional

from nessa_modules.alignment import make_alignment
from nessa_modules.linear_alignment import choose_ridge, procrustes_map, ridge_maps
from nessa_modules.paired_embeddings import PairedEmbeddings, pair_embeddings


def unit(values):
    return functional.normalize(values.double(), dim=-1)


def test_procrustes_is_scipys():
    source, target = torch.randn(2, 40, 7, dtype=torch.float64)
    expected = scipy.linalg.orthogonal_procrustes(source.numpy(), target.numpy())[0]
    torch.testing.assert_close(procrustes_map(source, target), torch.as_tensor(expected))


@pytest.mark.parametrize(("sizes", "rotated"), [((8, 6), "runtime"), ((6, 8), "enroll"), ((7, 7), "runtime")])
def test_procrustes_undoes_a_rotation_into_more_dimensions(sizes, rotated):
    rng = torch.Generator().manual_seed(0)
    small, large = sorted(sizes)
    rotation = torch.linalg.qr(torch.randn(large, small, generator=rng, dtype=torch.float64)).Q.T  # rows orthonormal
    points = unit(torch.randn(50, small, generator=rng))
    X, Y = (points @ rotation, points) if rotated == "runtime" else (points, points @ rotation)
    alignment = make_alignment("procrustes").fit(X, Y, [row // 2 for row in range(50)])
    assert alignment.details["rotated"] == rotated
    torch.testing.assert_close(alignment.enroll(X), alignment.runtime(Y), atol=1e-6, rtol=0)
    # Nothing but a rotation and the mean: distances stay.
    torch.testing.assert_close(torch.pdist(alignment.runtime(Y)), torch.pdist(unit(Y)).float(), atol=1e-5, rtol=0)


def test_ridge_solves_the_normal_equations():
    source, target = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    gram = source.T @ source
    for ridge, estimate in zip((0.0, 0.1, 10.0), ridge_maps(source, target, [0.0, 0.1, 10.0]), strict=True):
        strength = ridge * gram.trace() / 5
        expected = torch.linalg.solve(gram + strength * torch.eye(5, dtype=torch.float64), source.T @ target)
        torch.testing.assert_close(estimate, expected)


def test_ridge_of_fewer_rows_than_dimensions_is_the_least_norm_solution():
    source, target = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    expected = torch.linalg.pinv(source) @ target
    torch.testing.assert_close(ridge_maps(source, target, [0.0])[0], expected)


def test_least_squares_undoes_a_linear_map():
    rng = torch.Generator().manual_seed(0)
    Y = unit(torch.randn(300, 6, generator=rng))
    X = unit(Y @ torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64)).Q[:6])
    alignment = make_alignment("least_squares").fit(X, Y, [row // 3 for row in range(300)])
    assert alignment.details["ridge"] < 1e-4
    torch.testing.assert_close(alignment.runtime(Y), alignment.enroll(X), atol=1e-4, rtol=0)


def test_the_ridge_is_chosen_on_held_out_speakers():
    """With the session's noise common to a speaker's utterances, folds over utterances would want less of it."""
    rng = torch.Generator().manual_seed(0)
    noise = 2 * torch.randn(12, 30, generator=rng).repeat_interleave(20, 0)
    clean = torch.randn(12, 30, generator=rng).repeat_interleave(20, 0)
    Y = clean + noise + 0.01 * torch.randn(240, 30, generator=rng)
    speakers = torch.arange(12).repeat_interleave(20)
    ridges = [1e-6, 1e-2, 1.0, 100.0]
    pairs = pair_embeddings(clean + 0.01 * torch.randn(240, 30, generator=rng), Y, speakers)
    assert choose_ridge(pairs, ridges) >= 1.0
    each_its_own = PairedEmbeddings(pairs.enroll, pairs.runtime, torch.arange(240))
    assert choose_ridge(each_its_own, ridges) < 1.0


def test_a_given_ridge_is_used():
    assert make_alignment("least_squares", ridge=0.5).fit(*paired()).details["ridge"] == 0.5
    with pytest.raises(ValueError, match="ridge can only be 0 or more, but got -1"):
        make_alignment("least_squares", ridge=-1)


def test_none_needs_equal_dimensions():
    with pytest.raises(ValueError, match="same number of dimensions, but got 8 and 6"):
        make_alignment("none").fit(*paired())
