"""Alignments with a closed form: against oracles, their refusals, and their folder on the disk."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn import functional

from nessa_modules.alignment import (
    ALIGNMENTS,
    DESCRIPTION_FILE,
    PairedEmbeddings,
    choose_ridge,
    gram_factor,
    load_alignment,
    logit_scores,
    make_alignment,
    pair_embeddings,
    procrustes_map,
    ridge_maps,
    speaker_folds,
    speaker_means,
)

SMALL = {kind: {"hidden_size": 8, "max_steps": 20} for kind in ("nessa", "nessa_runtime")}


def paired(num_speakers=9, utterances=3, sizes=(8, 6), seed=0):
    """Embeddings of two linear models with noise: X [K, Dx], Y [K, Dy] and K names."""
    rng = torch.Generator().manual_seed(seed)
    speakers = torch.randn(num_speakers, 8, generator=rng).repeat_interleave(utterances, 0)
    traits = speakers + 0.3 * torch.randn(speakers.shape, generator=rng)
    X, Y = (traits @ torch.randn(8, size, generator=rng) + 0.5 for size in sizes)
    return X, Y, [f"speaker {row // utterances}" for row in range(len(X))]


def fitted(kind, sizes=(8, 6), **data):
    sizes = (8, 8) if kind == "none" else sizes
    return make_alignment(kind, **SMALL.get(kind, {})).fit(*paired(sizes=sizes, **data))


def unit(values):
    return functional.normalize(values.double(), dim=-1)


# Logits


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


# Linear maps


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


# The interface


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_scores_are_cosines_of_the_mapped_vectors(kind):
    alignment = fitted(kind)
    X, Y, _ = paired(seed=3, sizes=(8, 8) if kind == "none" else (8, 6))
    scores = alignment.score(X[:5], Y[:7])
    assert scores.shape == (5, 7)
    assert scores.dtype == torch.float32
    expected = functional.cosine_similarity(alignment.enroll(X[:5])[:, None], alignment.runtime(Y[:7])[None], dim=-1)
    torch.testing.assert_close(scores, expected)
    assert alignment.enroll(X[0]).shape == (alignment.size,)
    assert alignment.enroll(X.reshape(3, -1, 8)).shape == (3, len(X) // 3, alignment.size)


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_only_the_direction_of_an_embedding_counts(kind):
    alignment = fitted(kind)
    X, Y, _ = paired(seed=3, sizes=(8, 8) if kind == "none" else (8, 6))
    lengths = torch.logspace(-25, 25, len(X))[:, None]
    torch.testing.assert_close(alignment.score(X, Y), alignment.score(X * lengths, Y * lengths.flip(0)))


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_numpy_and_double_precision_are_the_same(kind):
    X, Y, speakers = paired(sizes=(8, 8) if kind == "none" else (8, 6))
    one = make_alignment(kind, **SMALL.get(kind, {})).fit(X, Y, speakers)
    other = make_alignment(kind, **SMALL.get(kind, {})).fit(X.double().numpy(), Y.numpy(), np.array(speakers))
    torch.testing.assert_close(one.score(X, Y), other.score(X.numpy(), Y.double().numpy()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_speakers_may_have_one_utterance_or_be_numbers(kind):
    X, Y, _ = paired(utterances=1, sizes=(8, 8) if kind == "none" else (8, 6))
    alignment = make_alignment(kind, **SMALL.get(kind, {})).fit(X, Y, torch.arange(len(X)))
    assert torch.isfinite(alignment.score(X, Y)).all()


@pytest.mark.parametrize("kind", [kind for kind in ALIGNMENTS if kind != "none"])
def test_two_speakers_are_enough(kind):
    X, Y, speakers = paired(num_speakers=2)
    alignment = make_alignment(kind, **SMALL.get(kind, {})).fit(X, Y, speakers)
    scores = alignment.score(X, Y)
    same = torch.tensor([[a == b for b in speakers] for a in speakers])
    assert scores[same].mean() > scores[~same].mean()


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_what_cannot_be_fitted_is_refused(kind):
    X, Y, speakers = paired(sizes=(8, 8))
    alignment = make_alignment(kind)
    zero, broken = X.clone(), Y.clone()
    zero[4] = 0
    broken[[2, 5]] = float("nan")
    for arguments, match in (
        ((X[1:], Y, speakers), "26, 27 and 27 rows"),
        ((X, Y, speakers[1:]), "27, 27 and 26 rows"),
        ((zero, Y, speakers), "X to fit an alignment on can only be finite and other than zero, but row 4 is not\\."),
        ((X, broken, speakers), "Y to fit an alignment on .* row 2 is not, and 1 more are not"),
        ((X, Y, ["only one"] * 27), "two speakers or more, but got only 'only one'"),
        ((X[0], Y, speakers), r"X can only be embeddings \[utterances, dimensions\], but got \[8\]"),
        ((X[:0], Y[:0], []), r"\[0, 8\]"),
        ((X, Y[:1].expand(27, 8), speakers), "Y to fit an alignment on can only differ"),
    ):
        with pytest.raises(ValueError, match=match):
            alignment.fit(*arguments)


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_what_cannot_be_mapped_is_refused(kind):
    with pytest.raises(ValueError, match="only be used once it is fitted"):
        make_alignment(kind).enroll(torch.ones(8))
    alignment = fitted(kind)
    with pytest.raises(ValueError, match=r"the enroll model can only have 8 dimensions, but got \[2, 3\]"):
        alignment.enroll(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"the runtime model can only have . dimensions, but got \[\]"):
        alignment.runtime(1.0)
    wrong = torch.ones(3, alignment.runtime_size)
    wrong[1, 0] = float("inf")
    with pytest.raises(
        ValueError, match="of the runtime model can only be finite and other than zero, but row 1 is not"
    ):
        alignment.score(torch.ones(1, 8), wrong)
    with pytest.raises(ValueError, match="other than zero, but row 0 is not"):
        alignment.enroll(torch.zeros(8))


def test_none_needs_equal_dimensions():
    with pytest.raises(ValueError, match="same number of dimensions, but got 8 and 6"):
        make_alignment("none").fit(*paired())


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_fitting_leaves_the_global_random_state_and_repeats(kind):
    state = torch.get_rng_state()
    one, other = fitted(kind), fitted(kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.alignment_id == other.alignment_id


def test_folds_share_no_speaker_and_are_equal_parts():
    folds = speaker_folds(23, 5, seed=1)
    assert sorted(folds.bincount().tolist()) == [4, 4, 5, 5, 5]
    assert not torch.equal(folds, speaker_folds(23, 5, seed=2))
    pairs = pair_embeddings(*paired(num_speakers=23))
    kept, held_out = pairs.of_speakers(folds != 0), pairs.of_speakers(folds == 0)
    assert kept.num_speakers + held_out.num_speakers == 23
    assert len(kept.enroll) + len(held_out.enroll) == len(pairs.enroll)
    expected = speaker_means(pairs.enroll, pairs.speaker_indices)[folds == 0]
    torch.testing.assert_close(speaker_means(held_out.enroll, held_out.speaker_indices), expected)


# On the disk


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_saved_and_loaded(kind, tmp_path):
    alignment = fitted(kind)
    alignment.calibration = [{"false_accept_rate": 0.01, "threshold": 0.42}]
    alignment.save(tmp_path / "alignment", "a" * 16, "b" * 16)
    loaded = load_alignment(tmp_path / "alignment")
    X, Y, _ = paired(seed=5, sizes=(8, 8) if kind == "none" else (8, 6))
    assert torch.equal(loaded.score(X, Y), alignment.score(X, Y))
    for name in ("name", "enroll_model_id", "runtime_model_id", "alignment_id", "calibration", "details", "size"):
        assert getattr(loaded, name) == getattr(alignment, name), name
    assert loaded.num_parameters == alignment.num_parameters
    files = sorted(path.name for path in (tmp_path / "alignment").iterdir())
    assert files == [f"alignment-{alignment.alignment_id}.pt", DESCRIPTION_FILE]
    assert alignment.num_bytes == sum((tmp_path / "alignment" / name).stat().st_size for name in files)


def test_saving_again_replaces_and_keeps_the_models(tmp_path):
    fitted("nessa").save(tmp_path, "model a", "model b")
    alignment = fitted("procrustes", seed=2)
    alignment.save(tmp_path, "model a", "model c")
    loaded = load_alignment(tmp_path)
    assert loaded.name == "procrustes"
    assert len(list(tmp_path.iterdir())) == 2
    loaded.calibration.append({"false_accept_rate": 0.001, "threshold": 0.6})
    loaded.save(tmp_path)
    again = load_alignment(tmp_path)
    assert again.runtime_model_id == "model c"
    assert again.calibration == [{"false_accept_rate": 0.001, "threshold": 0.6}]
    assert again.alignment_id == alignment.alignment_id  # which does not depend on the calibration


def test_a_kill_while_saving_leaves_the_old_alignment(tmp_path, monkeypatch):
    """At each of the two renames that make files appear."""
    fitted("procrustes").save(tmp_path, "a", "b")
    old = load_alignment(tmp_path).alignment_id
    replace = os.replace
    for survived in (0, 1):
        count = []

        def killed(source, target, survived=survived, count=count):
            if len(count) == survived:
                raise KeyboardInterrupt
            count.append(target)
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fitted("least_squares").save(tmp_path, "a", "b")
        assert load_alignment(tmp_path).alignment_id == old
    monkeypatch.setattr(os, "replace", replace)
    fitted("least_squares").save(tmp_path, "a", "b")
    assert load_alignment(tmp_path).name == "least_squares"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_id_depends_on_kind_content_and_models(tmp_path):
    alignment = fitted("procrustes")
    alignments = [alignment, fitted("procrustes", seed=1), fitted("least_squares"), fitted("logit")]
    ids = []
    for number, each in enumerate(alignments):
        each.save(tmp_path / str(number), "a", "b")
        ids.append(each.alignment_id)
    for number, models in enumerate((("b", "a"), ("a", "c"))):
        alignment.save(tmp_path / f"models {number}", *models)
        ids.append(alignment.alignment_id)
    assert len(set(ids)) == 6
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in ids)


def test_an_alignment_is_saved_only_fitted_and_with_its_models(tmp_path):
    with pytest.raises(ValueError, match="only be saved once it is fitted"):
        make_alignment("logit").save(tmp_path, "a", "b")
    with pytest.raises(ValueError, match=r"ids of its two models, but got \('a', None\)"):
        fitted("logit").save(tmp_path, "a")
    alignment = fitted("logit")
    alignment.calibration = [{"threshold": 0.5}]
    with pytest.raises(ValueError, match=r"calibration that is no rate with its threshold: \{'threshold': 0.5\}"):
        alignment.save(tmp_path, "a", "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "rotation"}, "unknown kind of alignment: 'rotation'"),
        ({"kind": ["none"]}, "unknown kind of alignment"),
        ({"format": 2}, "only be of format 1, but got 2"),
        ({"alignment_id": "../../etc/passwd"}, "16 hexadecimal digits"),
        ({"alignment_id": "0" * 16}, "holds no alignment-"),
        ({"enroll_model_id": ""}, "enroll_model_id in .* can only be the id of a model, but got ''"),
        ({"runtime_model_id": "another"}, "was changed since it was written"),
        ({"enroll_size": 9}, "only be"),
        ({"size": -1}, "size in .* can only be a number of dimensions, but got -1"),
        ({"size": True}, "number of dimensions, but got True"),
        ({"settings": {"clip": 1}}, "settings that this version does not know"),
        ({"calibration": [{"false_accept_rate": 2, "threshold": 0.1}]}, "calibration that is no rate"),
        ({"calibration": None}, "calibration that is no rate"),
        ({"kind": "least_squares"}, "only"),
    ],
)
def test_a_changed_description_is_refused(tmp_path, change, match):
    fitted("nessa").save(tmp_path, "a", "b")
    path = tmp_path / DESCRIPTION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        load_alignment(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 1}'])
def test_what_is_no_description_is_refused(tmp_path, text):
    (tmp_path / DESCRIPTION_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"alignment\.json"):
        load_alignment(tmp_path)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"holds no alignment: alignment\.json is missing"):
            load_alignment(folder)


@pytest.mark.parametrize("kind", ["procrustes", "nessa"])
def test_changed_tensors_are_refused(tmp_path, kind):
    alignment = fitted(kind)
    alignment.save(tmp_path, "a", "b")
    path = tmp_path / f"alignment-{alignment.alignment_id}.pt"
    whole = path.read_bytes()
    tensors = torch.load(path, weights_only=True)
    name = "runtime_matrix"
    for changed, match in (
        ({name: tensors[name] + 1}, "was changed since it was written"),
        ({name: tensors[name][:-1]}, r"does not fit its description: .* can only be \("),
        ({name: tensors[name] * float("nan")}, "NaN or infinite, first in runtime_matrix"),
        ({name: tensors[name].int()}, "floating-point numbers"),
        ({"another": torch.ones(1)}, "another can only be missing"),
        ({3: torch.ones(1)}, "tensors by name"),
    ):
        torch.save(tensors | changed, path)
        with pytest.raises(ValueError, match=match):
            load_alignment(tmp_path)
    torch.save({other: tensor for other, tensor in tensors.items() if other != name}, path)
    with pytest.raises(ValueError, match="but got none"):
        load_alignment(tmp_path)
    for broken in (b"", b"no tensors", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="no checkpoint"):
            load_alignment(tmp_path)


def test_files_that_are_none_or_too_large_are_refused(tmp_path):
    alignment = fitted("procrustes")
    alignment.save(tmp_path, "a", "b")
    tensors = next(tmp_path.glob("*.pt"))
    tensors.unlink()
    os.mkfifo(tensors)
    with pytest.raises(ValueError, match="holds no alignment-"):
        load_alignment(tmp_path)
    description = tmp_path / DESCRIPTION_FILE
    for text in ("[" * 100_000, " " * 2**21):
        description.write_text(text)
        with pytest.raises(ValueError, match=r"alignment\.json"):
            load_alignment(tmp_path)
    description.unlink()
    os.mkfifo(description)
    with pytest.raises(ValueError, match="can only be a file"):
        load_alignment(tmp_path)


def test_the_folder_of_a_run_is_its_alignment(tmp_path):
    alignment = fitted("procrustes")
    alignment.save(tmp_path / "alignment", "a", "b")
    assert load_alignment(tmp_path).alignment_id == alignment.alignment_id


def test_tensors_that_are_expanded_or_parameters(tmp_path):
    alignment = fitted("procrustes")
    alignment.save(tmp_path, "a", "b")
    path = next(tmp_path.glob("*.pt"))
    tensors = torch.load(path, weights_only=True)
    matrix = tensors["runtime_matrix"]
    torch.save(tensors | {"runtime_matrix": torch.nn.Parameter(matrix)}, path)
    assert load_alignment(tmp_path).alignment_id == alignment.alignment_id
    torch.save(tensors | {"runtime_matrix": torch.ones(1, 1).expand(matrix.shape)}, path)
    with pytest.raises(ValueError, match="larger than what the file holds"):
        load_alignment(tmp_path)


@pytest.mark.parametrize("threshold", [-10, 2.5, 10**400, float("nan"), True, "0.5"])
def test_a_threshold_that_is_no_cosine_is_refused(tmp_path, threshold):
    alignment = fitted("procrustes")
    alignment.save(tmp_path, "a", "b")
    path = tmp_path / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["calibration"] = [{"false_accept_rate": 0.01, "threshold": threshold}]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="no rate with its threshold"):
        load_alignment(tmp_path)


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_tensors_that_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alignment = fitted("procrustes")
    alignment.save(tmp_path, "a", "b")
    path = tmp_path / f"alignment-{alignment.alignment_id}.pt"
    torch.save({"runtime_matrix": _Trap()}, path)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_alignment(tmp_path)
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(ValueError, match="no checkpoint"):
        load_alignment(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Trap()))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match="no checkpoint"):
        load_alignment(tmp_path)
    assert not (tmp_path / "trap").exists()
