"""NESSA: its closed forms and draws against oracles, its choices, and what it gives on two simulated models."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from nessa_modules.alignment import make_alignment
from nessa_modules.nessa import (
    CrossSpaceMaps,
    Nessa,
    NessaRuntime,
    SpeakerTable,
    calibrated_cost,
    closed_form,
    closed_forms,
    contrastive_loss,
    network,
    start_tensors,
)
from nessa_modules.paired_embeddings import pair_embeddings, speaker_means

UTTERANCES = 6


def simulate(num_speakers, seed=0, sizes=(24, 20), noises=(0.45, 0.3), hidden_sizes=(12, 40)):
    """Two models of different strength, trained with a contrastive loss on speakers of their own.

    A recording is a nonlinear mixture of a speaker's and a session's traits. Each model hears it with noise of its own
    and is a random hidden layer with a trained one behind it. Returns X, Y and speakers of the last ones.
    """
    rng = torch.Generator().manual_seed(seed)
    num_training = 200
    speakers = torch.arange(num_training + num_speakers).repeat_interleave(UTTERANCES)
    traits = torch.randn(num_training + num_speakers, 16, generator=rng)[speakers]
    session = 0.8 * torch.randn(len(speakers), 16, generator=rng)
    recordings = torch.tanh(torch.cat([traits, session], 1) @ torch.randn(32, 60, generator=rng) / 5)
    embeddings = []
    for size, noise, hidden_size in zip(sizes, noises, hidden_sizes, strict=True):
        heard = recordings + noise * torch.randn(recordings.shape, generator=rng)
        first = (torch.randn(60, hidden_size, generator=rng) / 5).requires_grad_()
        second = (torch.randn(hidden_size, size, generator=rng) / 5).requires_grad_()
        optimizer = torch.optim.Adam([first, second], lr=0.01)
        for _ in range(120):
            drawn = torch.randperm(num_training, generator=rng)[:64]
            rows = drawn[:, None] * UTTERANCES + torch.rand(64, UTTERANCES, generator=rng).argsort(1)[:, :2]
            pair = functional.normalize(torch.relu(heard[rows] @ first) @ second, dim=-1)
            loss = contrastive_loss(pair[:, 0], pair[:, 1], torch.tensor(2.3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        embeddings.append((torch.relu(heard @ first) @ second).detach())
    is_ours = speakers >= num_training
    return embeddings[0][is_ours], embeddings[1][is_ours], speakers[is_ours]


def area_under_curve(score, X, Y, speakers):
    """Of profiles of each speaker's first three utterances against the utterances that are left."""
    is_enrolled = torch.arange(len(X)) % UTTERANCES < 3
    indices = torch.unique(speakers[is_enrolled], return_inverse=True)[1]
    profiles = speaker_means(functional.normalize(X[is_enrolled], dim=-1), indices)
    is_target = speakers[is_enrolled].unique()[:, None] == speakers[~is_enrolled]
    return roc_auc_score(is_target.flatten(), score(profiles, Y[~is_enrolled]).flatten())


def halves(num_alignment, num_test=100, seed=0):
    X, Y, speakers = simulate(num_alignment + num_test, seed)
    cut = num_alignment * UTTERANCES
    return (X[:cut], Y[:cut], speakers[:cut]), (X[cut:], Y[cut:], speakers[cut:])


@pytest.fixture(scope="module")
def many():
    """300 speakers to align, 100 to test."""
    return halves(300)


def random_pairs(num_speakers=12, utterances=4, sizes=(6, 5), seed=0):
    rng = torch.Generator().manual_seed(seed)
    traits = torch.randn(num_speakers, 8, generator=rng).repeat_interleave(utterances, 0)
    traits = traits + 0.5 * torch.randn(traits.shape, generator=rng)
    X, Y = (traits @ torch.randn(8, size, generator=rng) for size in sizes)
    return X, Y, [f"speaker {row // utterances:02d}" for row in range(len(X))]


# What it gives


@pytest.mark.parametrize("kind", ["nessa", "nessa_runtime"])
def test_better_on_unseen_speakers_than_what_has_a_closed_form(many, kind):
    alignment_set, test_set = many
    others = {}
    for other in ("logit", "procrustes", "least_squares"):
        others[other] = area_under_curve(make_alignment(other).fit(*alignment_set).score, *test_set)
    fitted = make_alignment(kind, hidden_size=64, max_steps=160).fit(*alignment_set)
    assert 1 - area_under_curve(fitted.score, *test_set) < 0.9 * (1 - max(others.values())), others
    assert fitted.details["steps"] > 0
    assert fitted.details["cost"] < fitted.details["start_cost"]
    costs = {row["step"]: row["held_out_cost"] for row in fitted.history}
    assert costs[0] == fitted.details["start_cost"]
    assert min(costs.values()) == costs[fitted.details["steps"]] == fitted.details["cost"]


def test_with_few_speakers_no_worse_than_what_has_a_closed_form():
    alignment_set, test_set = halves(40, seed=1)
    others = [
        area_under_curve(make_alignment(other).fit(*alignment_set).score, *test_set)
        for other in ("logit", "procrustes", "least_squares")
    ]
    fitted = Nessa(hidden_size=64, max_steps=80).fit(*alignment_set)
    assert area_under_curve(fitted.score, *test_set) > max(others) - 0.002


def test_speakers_that_cannot_be_told_apart_stay_so():
    """Labels without a meaning: nothing is learned that would show on other speakers."""
    rng = torch.Generator().manual_seed(0)
    X, Y = torch.randn(2, 240, 10, generator=rng)
    alignment = Nessa(hidden_size=16, max_steps=40).fit(X, Y, torch.arange(40).repeat_interleave(6))
    assert alignment.details["cost"] > 0.9
    X, Y = torch.randn(2, 600, 10, generator=rng)
    speakers = torch.arange(100).repeat_interleave(6)
    assert abs(area_under_curve(alignment.score, X, Y, speakers) - 0.5) < 0.05


# The network and its loss


def test_before_training_the_network_is_the_linear_map():
    pairs = pair_embeddings(*random_pairs())
    maps = closed_form(pairs, ("cross_space", 0.3, 0.1, 0.5, 1.0))
    tensors = start_tensors(pairs, maps, 7, torch.Generator().manual_seed(0))
    for side in ("enroll", "runtime"):
        embeddings = getattr(pairs, side)
        expected = functional.normalize(embeddings @ maps[side][0] + maps[side][1], dim=-1)
        torch.testing.assert_close(network(tensors, side, embeddings.float()), expected.float(), atol=1e-5, rtol=0)
        lengths = (embeddings @ tensors[f"{side}_matrix"].double() + tensors[f"{side}_offset"].double()).norm(dim=-1)
        torch.testing.assert_close(float(lengths.mean()), 1.0)


def test_the_network_is_torchs_layers():
    rng = torch.Generator().manual_seed(0)
    linear, hidden, output = torch.nn.Linear(6, 4), torch.nn.Linear(6, 9), torch.nn.Linear(9, 4, bias=False)
    tensors = {"runtime_matrix": linear.weight.T, "runtime_offset": linear.bias, "runtime_hidden_offset": hidden.bias}
    tensors |= {"runtime_hidden_matrix": hidden.weight.T, "runtime_output_matrix": output.weight.T}
    embeddings = torch.randn(3, 2, 6, generator=rng)
    expected = functional.normalize(linear(embeddings) + output(torch.relu(hidden(embeddings))), dim=-1)
    torch.testing.assert_close(network(tensors, "runtime", embeddings), expected)
    assert network(tensors, "enroll", embeddings) is embeddings


def test_dropout_leaves_the_mean_of_a_hidden_layer():
    tensors = {"enroll_matrix": torch.zeros(1, 2), "enroll_offset": torch.tensor([0.0, 1.0])}
    tensors |= {"enroll_hidden_matrix": torch.ones(1, 4000), "enroll_hidden_offset": torch.zeros(4000)}
    tensors |= {"enroll_output_matrix": torch.tensor([[1 / 4000, 0.0]]).expand(4000, 2)}
    generator = torch.Generator().manual_seed(0)
    vector = network(tensors, "enroll", torch.ones(1, 1), dropout=0.5, generator=generator)[0]
    assert abs(float(vector[0] / vector[1]) - 1) < 0.1


def test_the_loss_is_lower_where_speakers_meet():
    profiles = functional.normalize(torch.randn(10, 6), dim=-1)
    scale = torch.tensor(2.0)
    met, mixed = contrastive_loss(profiles, profiles, scale), contrastive_loss(profiles, profiles.roll(1, 0), scale)
    assert met < mixed
    torch.testing.assert_close(met, contrastive_loss(profiles.flip(0), profiles.flip(0), scale))
    same = torch.ones(10, 6) / 6**0.5
    torch.testing.assert_close(contrastive_loss(same, same, scale), torch.tensor(10.0).log())


def test_the_calibrated_cost_is_that_of_a_fitted_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    targets, nontargets = rng.normal(0.5, 0.2, 60), rng.normal(0.1, 0.2, 900)
    scores, labels = np.concatenate([targets, nontargets])[:, None], np.repeat([1, 0], [60, 900])
    standard = (scores - scores.mean()) / scores.std()
    model = LogisticRegression(C=1e3, class_weight="balanced", max_iter=1000).fit(standard, labels)
    probabilities = model.predict_proba(standard)[:, 1]
    expected = -(np.log2(probabilities[:60]).mean() + np.log2(1 - probabilities[60:]).mean()) / 2
    cost = calibrated_cost(torch.as_tensor(targets), torch.as_tensor(nontargets))
    assert cost == pytest.approx(expected, abs=2e-3)
    # Neither the scale nor the level of scores counts; separable ones cost next to nothing.
    assert calibrated_cost(torch.as_tensor(9 * targets + 5), torch.as_tensor(9 * nontargets + 5)) == pytest.approx(cost)
    assert calibrated_cost(torch.ones(5), -torch.ones(50)) < 0.05


# Closed forms


def test_cross_space_maps_are_scipys_canonical_correlations_without_shrinkage():
    """One utterance a speaker, so that its speakers' covariances are those of utterances."""
    from scipy.linalg import subspace_angles

    X, Y, _ = random_pairs(num_speakers=200, utterances=1)
    pairs = pair_embeddings(X, Y, range(200))
    maps = CrossSpaceMaps(pairs)(0.0, 0.0, 0.0, 1.0)
    x, y = (getattr(pairs, side) @ maps[side][0] + maps[side][1] for side in ("enroll", "runtime"))
    correlations = (x * y).mean(0)
    centered = [(side - side.mean(0)).numpy() for side in (pairs.enroll, pairs.runtime)]
    expected = np.sort(np.cos(subspace_angles(*centered)))[::-1].copy()
    torch.testing.assert_close(correlations, torch.as_tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.T @ y / 200, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_session_that_two_embeddings_share_is_left_out():
    """Speakers in the first two dimensions, sessions in the others, the same in both spaces."""
    rng = torch.Generator().manual_seed(0)
    traits = torch.cat([torch.randn(400, 2, generator=rng).repeat_interleave(4, 0), torch.zeros(1600, 2)], 1)
    sessions = torch.cat([torch.zeros(1600, 2), torch.randn(1600, 2, generator=rng)], 1)
    X = traits + sessions
    speakers = torch.arange(400).repeat_interleave(4)
    maps = CrossSpaceMaps(pair_embeddings(X, X, speakers))

    def weight_of_sessions(session_share):
        matrix = maps(0.0, 0.0, 1.0, session_share)["runtime"][0]
        return float(matrix[2:].norm() / matrix[:2].norm())

    assert weight_of_sessions(0.0) < 0.1
    assert weight_of_sessions(1.0) > 0.5


@pytest.mark.parametrize("sizes", [(6, 5), (5, 6)])
@pytest.mark.parametrize("utterances", [1, 3])
def test_every_closed_form_is_finite(sizes, utterances):
    pairs = pair_embeddings(*random_pairs(num_speakers=4, utterances=utterances, sizes=sizes))
    keys = set()
    for key, maps in closed_forms(pairs):
        keys.add(key)
        for side in ("enroll", "runtime"):
            assert maps[side][0].shape[0] == getattr(pairs, side).shape[1]
            assert torch.isfinite(maps[side][0]).all()
            assert torch.isfinite(maps[side][1]).all()
        again = closed_form(pairs, key)
        torch.testing.assert_close(maps["runtime"][0], again["runtime"][0])
    assert len(keys) == 56


@pytest.mark.parametrize("name", ["procrustes", "least_squares"])
def test_closed_forms_are_the_baselines(name):
    X, Y, speakers = random_pairs()
    pairs = pair_embeddings(X, Y, speakers)
    tensors = start_tensors(pairs, closed_form(pairs, (name,)), 1, torch.Generator().manual_seed(0))
    scores = network(tensors, "enroll", pairs.enroll.float()) @ network(tensors, "runtime", pairs.runtime.float()).T
    # The ridge is chosen from a coarser grid.
    expected = make_alignment(name).fit(X, Y, speakers).score(X, Y)
    torch.testing.assert_close(scores, expected, atol=1e-5 if name == "procrustes" else 0.05, rtol=0)


def test_a_one_sided_start_has_the_inner_products_of_both_sides():
    pairs = pair_embeddings(*random_pairs())
    maps = closed_form(pairs, ("cross_space", 0.3, 0.3, 1.0, 0.5))
    starts = NessaRuntime()._starts(maps, pairs)
    x = pairs.enroll @ maps["enroll"][0]
    y = pairs.runtime @ maps["runtime"][0] + maps["runtime"][1]
    matrix, offset = starts["with_mean"]["runtime"]
    torch.testing.assert_close(pairs.enroll @ (pairs.runtime @ matrix + offset).T, x @ y.T)
    matrix, offset = starts["without_mean"]["runtime"]
    centered = pairs.enroll - pairs.enroll.mean(0)
    both = [each @ (pairs.runtime @ matrix + offset).T for each in (pairs.enroll, centered)]
    torch.testing.assert_close(*both)


# Draws


def test_profiles_are_drawn_from_other_utterances_of_the_speaker():
    speakers = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2, 0, 3])
    table = SpeakerTable(speakers)
    generator = torch.Generator().manual_seed(0)
    sizes, queries = [], set()
    for _ in range(300):
        query, rows, weights = table.draw(torch.tensor([2, 3, 1]), 4, generator)
        assert speakers[query].tolist() == [2, 3, 1]
        torch.testing.assert_close(weights.sum(1), torch.ones(3))
        for number, speaker in enumerate((2, 3, 1)):
            used = rows[number][weights[number] > 0].tolist()
            assert {int(speakers[row]) for row in used} == {speaker}
            assert len(set(used)) == len(used)
            if speaker == 3:  # a single utterance stands on both sides
                assert used == [10] == [int(query[number])]
            else:
                assert int(query[number]) not in used
        sizes.append(int((weights[0] > 0).sum()))
        queries.add(int(query[0]))
    assert queries == {3, 4, 5, 6, 7, 8}
    assert sorted(set(sizes)) == [1, 2, 3, 4]
    assert min(sizes.count(size) for size in (1, 2, 3, 4)) > 45  # 75 expected


# The class


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    data = random_pairs(num_speakers=10)
    options = {"hidden_size": 8, "max_steps": 20}
    state = torch.get_rng_state()
    one = Nessa(**options).fit(*data)
    torch.manual_seed(5)
    assert Nessa(**options).fit(*data).alignment_id == one.alignment_id
    torch.set_rng_state(state)
    other = Nessa(**options, seed=1).fit(*data)
    assert torch.equal(torch.get_rng_state(), state)
    assert other.alignment_id != one.alignment_id


def test_one_sided_leaves_the_enrollment_side_as_it_is():
    X, Y, speakers = random_pairs(num_speakers=9)
    alignment = NessaRuntime(hidden_size=8, max_steps=20).fit(X, Y, speakers)
    torch.testing.assert_close(alignment.enroll(X), functional.normalize(X, dim=-1))
    assert alignment.size == 6
    assert alignment.num_parameters == 5 * 6 + 6 + 5 * 8 + 8 + 8 * 6
    two_sided = Nessa(hidden_size=8, max_steps=0).fit(X, Y, speakers)
    assert two_sided.num_parameters == (6 * 5 + 5 + 6 * 8 + 8 + 8 * 5) + (5 * 5 + 5 + 5 * 8 + 8 + 8 * 5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_fitted_also_where_the_caller_wants_no_gradients(mode):
    data = random_pairs(num_speakers=10)
    with mode():
        alignment = Nessa(hidden_size=8, max_steps=20).fit(*(torch.as_tensor(each) * 1.0 for each in data[:2]), data[2])
        scores = alignment.score(*data[:2])
    assert not scores.requires_grad
    torch.testing.assert_close(scores, Nessa(hidden_size=8, max_steps=20).fit(*data).score(*data[:2]))


def test_too_few_speakers_to_choose_end_at_a_closed_form():
    alignment = Nessa(hidden_size=8).fit(*random_pairs(num_speakers=9))
    assert alignment.details["steps"] == 0
    assert alignment.details["cost"] is None


def test_a_progress_bar_is_shown_where_asked(capsys):
    data = random_pairs(num_speakers=10)
    Nessa(hidden_size=8, max_steps=20).fit(*data)
    assert capsys.readouterr().err == ""
    Nessa(hidden_size=8, max_steps=20, progressbar=True).fit(*data)
    shown = capsys.readouterr().err
    assert "closed forms: " in shown
    assert "alignment: " in shown


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"hidden_size": 0}, "hidden_size can only be a whole number from 1, but got 0"),
        ({"max_steps": 2.5}, "max_steps can only be a whole number from 0, but got 2.5"),
        ({"speakers_per_batch": 1}, "speakers_per_batch can only be a whole number from 2, but got 1"),
        ({"lr": 0}, "lr can only be more than 0"),
        ({"dropout": 1.0}, "dropout can only be from 0 to less than 1, but got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(option, match):
    with pytest.raises(ValueError, match=match):
        make_alignment("nessa", **option)
