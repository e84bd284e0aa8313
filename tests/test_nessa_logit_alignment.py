"""The alignment by speaker logits, against cosines of all logits."""

import pytest
import torch
from test_nessa_alignment import paired
from torch.nn import functional

from nessa_modules.alignment import make_alignment
from nessa_modules.logit_alignment import gram_factor, logit_scores
from nessa_modules.paired_embeddings import pair_embeddings


def unit(values):
    return functional.normalize(values.double(), dim=-1)


@pytest.mark.parametrize(
    ("num_speakers", "sizes"), [(400, (16, 12)), (28, (16, 12)), (20, (16, 12)), (2, (16, 12)), (300, (1, 5))]
)
@pytest.mark.parametrize("center", [False, True])
def test_logit_scores_are_those_of_all_logits(num_speakers, sizes, center):
    X, Y, speakers = paired(num_speakers, sizes=sizes)
    alignment = make_alignment("logit", center=center).fit(X, Y, speakers)
    pairs = pair_embeddings(X, Y, speakers)
    A, B = alignment.speaker_weights(pairs)
    x, y = unit(X), unit(Y)
    if center:
        x, y = x - x.mean(0), y - y.mean(0)
    expected = logit_scores(A, B, x, y)
    assert A.shape == (num_speakers, sizes[0])
    assert alignment.size == min(num_speakers, sum(sizes))
    torch.testing.assert_close(alignment.score(X, Y).double(), expected, atol=1e-5, rtol=0)
    # Also the lengths, and inner products inside a side.
    logits = x[:9] @ A.T
    torch.testing.assert_close(
        (alignment.enroll(X[:9]) @ alignment.enroll(X[:9]).T).double(), logits @ logits.T, atol=1e-5, rtol=1e-5
    )


def test_logit_scores_with_a_nearly_singular_gram_matrix():
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(200, 4, generator=rng, dtype=torch.float64)
    mix = torch.randn(4, 10, generator=rng, dtype=torch.float64)
    # Ranks 4 + 4 of 20, up to a noise from none at all to one that Cholesky bears.
    for noise in (0, 1e-12, 1e-9, 1e-6, 1e-3):
        A = base @ mix + noise * torch.randn(200, 10, generator=rng, dtype=torch.float64)
        B = base.roll(1, 1) @ mix + noise * torch.randn(200, 10, generator=rng, dtype=torch.float64)
        factor = gram_factor(A, B)
        both = torch.cat([A, B], dim=1)
        torch.testing.assert_close(factor.T @ factor, both.T @ both, rtol=1e-9, atol=1e-9)
        x, y = torch.randn(2, 30, 10, generator=rng, dtype=torch.float64)
        scores = functional.normalize(x @ factor[:, :10].T, dim=1) @ functional.normalize(y @ factor[:, 10:].T, dim=1).T
        torch.testing.assert_close(scores, logit_scores(A, B, x, y), atol=1e-5, rtol=0)
        assert torch.equal(factor, factor.triu())


def test_gram_factor_takes_cholesky_only_where_it_is_accurate(monkeypatch):
    calls = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda *args, **kwargs: calls.append(1) or cholesky(*args, **kwargs))
    A, B = torch.randn(2, 50, 3, dtype=torch.float64)
    gram_factor(A, B)
    assert len(calls) == 1
    gram_factor(A, A)  # singular
    gram_factor(A[:5], B[:5])  # fewer speakers than dimensions
    gram_factor(A, A + 1e-7 * B)  # singular up to rounding
    assert len(calls) == 1


def test_classifier_weights_are_used_where_given():
    X, Y, speakers = paired()
    A, B = torch.randn(50, 8), torch.randn(50, 6).numpy()
    alignment = make_alignment("logit", enroll_weight=A, runtime_weight=B).fit(X, Y, speakers)
    expected = logit_scores(unit(A), unit(torch.as_tensor(B)), unit(X), unit(Y))
    torch.testing.assert_close(alignment.score(X, Y).double(), expected, atol=1e-5, rtol=0)
    assert alignment.details["num_logits"] == 50


def test_centroids_are_means_of_length_normalised_embeddings():
    X, Y, speakers = paired(num_speakers=5)
    A, _ = make_alignment("logit").speaker_weights(pair_embeddings(X, Y, speakers))
    expected = unit(torch.stack([unit(X)[3 * speaker : 3 * speaker + 3].mean(0) for speaker in range(5)]))
    torch.testing.assert_close(A, expected)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"enroll_weight": torch.ones(3, 8)}, "for both models or for none"),
        ({"enroll_weight": torch.ones(3, 8), "runtime_weight": torch.ones(4, 6)}, r"\[3, 8\] and \[4, 6\]"),
        ({"enroll_weight": torch.ones(3, 8), "runtime_weight": torch.ones(3)}, r"\[3, 8\] and \[3\]"),
        ({"enroll_weight": torch.ones(3, 8), "runtime_weight": torch.ones(3, 7)}, "its 6 dimensions, but got 7"),
    ],
)
def test_classifier_weights_that_do_not_fit_are_refused(weights, match):
    with pytest.raises(ValueError, match=match):
        make_alignment("logit", **weights).fit(*paired())
