"""What all kinds of alignments have in common: scoring, refusals, and their folder on the disk."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional

from nessa_modules.alignment import ALIGNMENTS, DESCRIPTION_FILE, load_alignment, make_alignment

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


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_fitting_leaves_the_global_random_state_and_repeats(kind):
    state = torch.get_rng_state()
    one, other = fitted(kind), fitted(kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.alignment_id == other.alignment_id


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
