"""Tests of trials, error rates and their intervals: against brute force, closed forms, scikit-learn and simulations."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch.nn.functional import cosine_similarity, normalize

from nessa_modules.embeddings import embed
from nessa_modules.trials import (
    ErrorRates,
    SameSpace,
    WeightedErrors,
    calibrate_thresholds,
    det_points,
    draw_trial_weights,
    eer,
    make_trials,
    min_dcf,
    recovered_gain,
    same_sex,
    speaker_errors,
    trials_from_list,
)


def utterances_of(speakers, sessions=None, sexes=None):
    """One utterance for each letter, named like a1, a2, b1."""
    counts, made = {}, []
    for index, name in enumerate(speakers):
        counts[name] = counts.get(name, 0) + 1
        session, sex = sessions[index] if sessions else "", sexes[index] if sexes else ""
        made.append(SimpleNamespace(id=f"{name}{counts[name]}", speaker=name, session=session, sex=sex))
    return made


def gaussian_scores(num_targets, num_others, distance, seed=0):
    """Scores whose error rates are known: both kinds have the variance 1."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(distance, 1, num_targets), rng.normal(0, 1, num_others)])
    return scores, np.arange(num_targets + num_others) < num_targets


# Error rates


@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_eer_of_two_gaussians(distance):
    scores, labels = gaussian_scores(200_000, 200_000, distance)
    assert eer(scores, labels) == pytest.approx(stats.norm.cdf(-distance / 2), abs=0.003)


@pytest.mark.parametrize("p_target", [0.01, 0.05, 0.5])
def test_min_dcf_of_two_gaussians(p_target):
    def cost(threshold):
        return p_target * stats.norm.cdf(threshold - 3) + (1 - p_target) * stats.norm.sf(threshold)

    expected = optimize.minimize_scalar(cost, bounds=(-2, 8), method="bounded").fun / min(p_target, 1 - p_target)
    scores, labels = gaussian_scores(200_000, 400_000, 3.0)
    assert min_dcf(scores, labels, p_target) == pytest.approx(expected, rel=0.02)


def brute_force(scores, labels, weights, p_target):
    """All thresholds one by one; the polyline through their points is cut with the diagonal."""
    points = []
    for threshold in [math.inf, *sorted(set(scores), reverse=True)]:
        rejected = scores < threshold
        miss = weights[labels & rejected].sum() / weights[labels].sum()
        false_accept = weights[~labels & ~rejected].sum() / weights[~labels].sum()
        points.append((false_accept, miss))
    cost = min(p_target * miss + (1 - p_target) * accept for accept, miss in points) / min(p_target, 1 - p_target)
    for (accept_1, miss_1), (accept_2, miss_2) in itertools.pairwise(points):
        if miss_1 >= accept_1 and miss_2 <= accept_2:
            share = (miss_1 - accept_1) / ((miss_1 - accept_1) - (miss_2 - accept_2))
            return accept_1 + share * (accept_2 - accept_1), cost
    raise AssertionError("no crossing")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("decimals", [1, 12])
def test_error_rates_equal_brute_force(seed, decimals):
    """Also where many scores are equal (one decimal), and with weights, some of which are zero."""
    rng = np.random.default_rng(seed)
    labels = rng.random(80) < 0.3
    scores = (rng.normal(size=80) + labels).round(decimals)
    weights = rng.integers(0, 4, size=(5, 80))
    errors = WeightedErrors(scores, labels)(weights, 0.1)
    for draw, weight in enumerate(weights):
        expected_eer, expected_cost = brute_force(scores, labels, weight, 0.1)
        assert eer(scores, labels, weight) == pytest.approx(expected_eer)
        assert min_dcf(scores, labels, 0.1, weight) == pytest.approx(expected_cost)
        assert errors[0][draw] == pytest.approx(expected_eer)
        assert errors[1][draw] == pytest.approx(expected_cost)


def test_weights_are_repetitions():
    scores, labels = gaussian_scores(30, 60, 1.0)
    weights = np.random.default_rng(1).integers(0, 3, size=90)
    repeated = np.repeat(np.arange(90), weights)
    assert eer(scores, labels, weights) == pytest.approx(eer(scores[repeated], labels[repeated]))
    assert min_dcf(scores, labels, 0.05, weights) == pytest.approx(min_dcf(scores[repeated], labels[repeated], 0.05))


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], 0.0),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 1.0),
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0], 0.5),
        ([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0], 0.5),
    ],
)
def test_eer_of_few_trials(scores, labels, expected):
    assert eer(scores, labels) == pytest.approx(expected)


def test_a_cost_is_at_most_that_of_accepting_nobody():
    scores, labels = gaussian_scores(50, 50, -1.0)
    assert min_dcf(scores, labels) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eer([0.1, 0.2], [1, 1]), "of 2 trials 2 are targets"),
        (lambda: eer([0.1, math.nan], [1, 0]), "Scores must be finite, but 1 of 2 are not"),
        (lambda: eer([0.1, 0.2], [1]), r"got the shapes \(2,\) and \(1,\)"),
        (lambda: min_dcf([0.1, 0.2], [1, 0], p_target=1), "p_target can only be a number above 0 and below 1"),
        (lambda: calibrate_thresholds([0.1, 0.2], [1, 0], [1.0]), "false-accept rate can only be"),
        (lambda: make_trials(utterances_of("abc")), "No speaker has more than 1 utterances"),
        (lambda: make_trials(utterances_of("aaa")), "of 6 trials 6 are targets"),
        (lambda: make_trials(utterances_of("aab"), num_enroll=0), "num_enroll must be at least 1, but got 0"),
        (lambda: trials_from_list(utterances_of("aab"), [(1, "a1", "a9")]), "names the utterance 'a9'"),
        (lambda: speaker_errors(make_trials(utterances_of("aabb")), {"x": []}), "'x' has no scores"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_thresholds_keep_their_rates():
    scores, labels = gaussian_scores(300, 2000, 2.0)
    others = scores[~labels]
    for row in calibrate_thresholds(scores, labels, (0.1, 0.05, 0.01, 0.001)):
        rate, threshold = row["false_accept_rate"], row["threshold"]
        assert (others >= threshold).sum() == round(rate * 2000)
        lower = scores[scores < threshold].max()  # the next lower one would accept too many, or is a target's
        assert (others >= lower).sum() == round(rate * 2000) + 1
        assert row["false_reject_rate"] == (scores[labels] < threshold).mean()
        assert threshold == pytest.approx(stats.norm.isf(rate), abs=0.35)


def test_thresholds_are_the_lowest_that_keep_the_rate_where_many_scores_are_equal():
    scores = np.random.default_rng(0).standard_normal(5000).round(2)
    labels = np.arange(5000) < 100
    others = scores[~labels]
    for row in calibrate_thresholds(scores, labels, (0.001, 0.01, 0.3)):
        assert np.mean(others >= row["threshold"]) <= row["false_accept_rate"]
        assert np.mean(others >= scores[scores < row["threshold"]].max()) > row["false_accept_rate"]


def test_a_rate_that_the_trials_cannot_show_is_left_out(caplog):
    labels = np.arange(1000) < 1  # 999 non-targets
    rows = calibrate_thresholds(np.zeros(1000), labels, [0.001, 0.05])
    assert [row["false_accept_rate"] for row in rows] == [0.05]
    assert "rate of 0.001: it needs at least 1000 comparisons of different speakers, but there are 999" in caplog.text
    assert len(calibrate_thresholds(np.zeros(1001), np.arange(1001) < 1, [0.001])) == 1


def test_threshold_where_nobody_may_be_accepted():
    """The best two scores are equal, and non-targets': one may be accepted, so that the threshold lies above both."""
    scores, labels = np.minimum(np.arange(15.0), 13), np.arange(15) < 5
    (row,) = calibrate_thresholds(scores, labels, [0.1])
    assert row["threshold"] > 13
    assert row["false_reject_rate"] == 1


def test_det_points_are_error_rates_at_thresholds():
    scores, labels = gaussian_scores(40, 40, 1.0)
    false_accept, false_reject = det_points(scores, labels)
    assert (np.diff(false_accept) <= 0).all()
    assert (np.diff(false_reject) >= 0).all()
    nearest = np.abs(false_accept - false_reject).argmin()
    assert false_accept[nearest] == pytest.approx(eer(scores, labels), abs=0.03)


# Who is tried against whom


def test_no_utterance_is_tried_against_a_profile_that_it_enrolled():
    utterances = utterances_of("aaaabbbcd")
    trials = make_trials(utterances, num_enroll=2, sets_per_speaker=10)
    seen = set()
    for profile, test in zip(trials.profile_index, trials.test_index, strict=True):
        rows = trials.profile_rows[profile]
        assert trials.test_rows[test] not in rows
        seen.add((*rows, trials.test_rows[test]))
    assert len(seen) == len(trials)  # none twice
    assert len(trials.profile_rows) == math.comb(4, 2) + math.comb(3, 2)  # c and d have too few
    assert len(trials) == (6 + 3) * (9 - 2)
    assert trials.labels.sum() == 6 * 2 + 3 * 1
    pairs = trials.speaker_pairs()
    assert (trials.labels == (pairs[:, 0] == pairs[:, 1])).all()


def test_drawn_sets_differ_and_are_the_same_again():
    utterances = utterances_of("a" * 30 + "b" * 30)
    first, again, other = (make_trials(utterances, 3, 12, seed=seed) for seed in (1, 1, 2))
    sets = [tuple(rows) for rows in first.profile_rows]
    assert len(set(sets)) == len(sets) == 24
    assert sets == [tuple(rows) for rows in again.profile_rows]
    assert sets != [tuple(rows) for rows in other.profile_rows]


def test_same_session_is_left_out_where_asked():
    utterances = utterances_of("aaabbb", sessions=["1", "1", "2", "1", "2", "2"])
    trials = make_trials(utterances, exclude_same_session=True)
    tried = {
        (utterances[trials.profile_rows[p][0]].id, utterances[trials.test_rows[t]].id)
        for p, t in zip(trials.profile_index, trials.test_index, strict=True)
    }
    assert ("a1", "a2") not in tried
    assert ("a1", "a3") in tried
    assert ("a1", "b1") in tried  # another speaker's session of the same name is another session
    assert len(tried) == 6 * 3 + 8
    with pytest.raises(ValueError, match="0 are targets"):
        make_trials(utterances_of("aabb", sessions=["1", "1", "1", "1"]), exclude_same_session=True)


def test_trials_of_one_sex():
    utterances = utterances_of("aabbccdd", sexes="FFFFMMMM")
    trials = make_trials(utterances)
    women, men = (same_sex(trials, utterances, sex) for sex in "FM")
    assert len(women) == len(men) == 4 * 3
    assert set(women.speaker_pairs().ravel()) == {"a", "b"}
    assert same_sex(trials, utterances, "") is None


class Turned:
    """A stand-in for an alignment: one side is mapped by a matrix, the other left as it is."""

    def __init__(self, matrix):
        self.matrix = matrix

    def enroll(self, embeddings):
        return embeddings @ self.matrix

    def runtime(self, embeddings):
        return embeddings


def test_scores_are_cosines_of_profiles_and_utterances():
    generator = torch.Generator().manual_seed(0)
    enroll, runtime = torch.randn(9, 6, generator=generator), torch.randn(9, 4, generator=generator)
    matrix = torch.randn(6, 4, generator=generator)
    trials = make_trials(utterances_of("aaabbbccc"), num_enroll=2)
    scores = trials.scores(Turned(matrix), enroll, runtime)
    for index in range(0, len(trials), 5):
        rows = trials.profile_rows[trials.profile_index[index]]
        profile = normalize(enroll[rows.tolist()], dim=-1).mean(0) @ matrix
        utterance = runtime[trials.test_rows[trials.test_index[index]]]
        assert scores[index] == pytest.approx(float(cosine_similarity(profile, utterance, dim=0)), abs=1e-6)


def test_a_list_gives_the_trials_of_the_list():
    utterances = utterances_of("aaabb")
    pairs = [(1, "a1", "a2"), (0, "a1", "b2"), (1, "b1", "b2"), (0, "b1", "a3")]
    trials = trials_from_list(utterances, pairs)
    embeddings = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    scores = trials.scores(SameSpace(), embeddings, embeddings)
    row_of = {utterance.id: row for row, utterance in enumerate(utterances)}
    for (label, enroll, test), score, found in zip(pairs, scores, trials.labels, strict=True):
        expected = cosine_similarity(embeddings[row_of[enroll]], embeddings[row_of[test]], dim=0)
        assert score == pytest.approx(float(expected), abs=1e-6)
        assert found == bool(label)


# Intervals


def test_weights_count_speakers():
    """A target trial counts as often as its speaker was drawn, another one the product of its two."""
    trials = make_trials(utterances_of("aabbccdd"))
    pairs, checked = trials.speaker_pairs(), 0
    for weights in draw_trial_weights(trials, num_draws=40):
        for weight in weights:
            counts = {name: weight[trials.labels & (pairs[:, 0] == name)][0] for name in "abcd"}
            assert sum(counts.values()) == 4
            for pair, value, is_target in zip(pairs, weight, trials.labels, strict=True):
                assert value == (counts[pair[0]] if is_target else counts[pair[0]] * counts[pair[1]])
            checked += 1
    assert checked == 40


def test_draws_equal_the_library():
    """What is sorted once for all draws equals scikit-learn's curve for each; seeds are averaged inside a draw."""
    trials = make_trials(utterances_of("aaabbbcccdddeee"))
    rng = np.random.default_rng(0)
    by_seed = [trials.labels + rng.normal(size=len(trials)) for _ in range(2)]
    errors = speaker_errors(trials, {"x": by_seed}, num_draws=25, seed=5, p_target=0.05)["x"]
    weights = np.concatenate(list(draw_trial_weights(trials, 25, seed=5)))
    for draw, weight in enumerate(weights):
        expected = np.mean([eer(scores, trials.labels, weight) for scores in by_seed])
        assert errors.eer_draws[draw] == pytest.approx(expected)
        expected = np.mean([min_dcf(scores, trials.labels, 0.05, weight) for scores in by_seed])
        assert errors.min_dcf_draws[draw] == pytest.approx(expected)
    assert errors.eer == pytest.approx(np.mean([eer(scores, trials.labels) for scores in by_seed]))


def test_a_system_does_not_differ_from_itself():
    trials = make_trials(utterances_of("aabbccddee"))
    scores = [trials.labels + np.random.default_rng(0).normal(size=len(trials))]
    errors = speaker_errors(trials, {"x": scores, "again": [2 * scores[0] - 1]}, num_draws=50)
    difference = errors["x"].minus(errors["again"])
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_interval_holds_the_truth_where_speakers_matter():
    """25 speakers whose own difficulty varies; the truth is the EER over very many of them."""

    def draw_scores(num_speakers, rng):
        own = rng.normal(0, 1.0, size=num_speakers)  # how well a speaker's utterances fit the own profile
        trials = make_trials(utterances_of([f"s{index:03d}" for index in range(num_speakers) for _ in range(4)]), 1, 4)
        index = np.array([int(name[1:]) for name in trials.speaker_pairs()[:, 0]])
        return trials, trials.labels * (2.5 + own[index]) + rng.normal(0, 1, size=len(trials))

    # A target's score is 2.5 + N(0, 1) + N(0, 1), another's N(0, 1): the rates cross where 2.5 - t = sqrt(2) t.
    truth = stats.norm.sf(2.5 / (1 + math.sqrt(2)))
    rng, hits, num_sets = np.random.default_rng(0), 0, 60
    for number in range(num_sets):
        trials, scores = draw_scores(25, rng)
        interval = speaker_errors(trials, {"x": [scores]}, num_draws=150, seed=number)["x"].interval()
        hits += interval.low <= truth <= interval.high
    assert hits / num_sets > 0.85


def rates(value, draws):
    draws = np.asarray(draws, dtype=float)
    return ErrorRates(value, value, (value,), (value,), draws, draws)


def test_recovered_gain_of_known_errors():
    old, new = rates(0.20, [0.19, 0.20, 0.21]), rates(0.10, [0.09, 0.10, 0.11])
    recovered = recovered_gain(old, new, rates(0.14, [0.13, 0.14, 0.15]))
    assert recovered.gain.mean == pytest.approx(0.6)
    assert (recovered.gain.low, recovered.gain.high) == pytest.approx((0.6, 0.6))
    assert recovered_gain(old, new, old).gain.mean == pytest.approx(0.0)
    assert recovered_gain(old, new, new).gain.mean == pytest.approx(1.0)
    assert recovered_gain(old, new, rates(0.3, [0.3] * 3)).gain.mean == pytest.approx(-1.0)


def test_recovered_gain_is_undefined_without_a_gap():
    old, new = rates(0.20, [0.15, 0.20, 0.25]), rates(0.19, [0.20, 0.19, 0.18])
    recovered = recovered_gain(old, new, new)
    assert recovered.gain is None
    assert recovered.reason.startswith("undefined: the gap between v1 and v2, 1.0 points of EER [-5.0, 7.0]")


def test_draws_without_a_gap_are_infinite():
    """Two of a hundred draws have no gap: its interval still lies above zero, and the ratio's ends stay finite."""
    old, new = rates(0.2, np.full(100, 0.2)), rates(0.1, [0.2, 0.2] + [0.1] * 98)
    gain = recovered_gain(old, new, rates(0.15, np.full(100, 0.15))).gain
    assert (gain.low, gain.high) == pytest.approx((0.5, 0.5))


# Embeddings on disk


class CountingEncoder:
    """A stand-in for an extractor that tells how often it was asked."""

    embedding_size = 3

    def __init__(self, model_id="0" * 16):
        self.model_id, self.num_calls = model_id, 0

    def encode_utterances(self, utterances, progressbar=True):
        self.num_calls += 1
        numbers = [[len(each.id), each.start_s, each.duration_s] for each in utterances]
        return torch.tensor(numbers, dtype=torch.float32)


def segment(folder, name="a", start_s=0.0, duration_s=2.0):
    path = folder / f"{name}.wav"
    if not path.exists():
        path.write_bytes(b"some samples")
    return SimpleNamespace(id=f"{name}{start_s}", path=str(path), start_s=start_s, duration_s=duration_s)


def test_embeddings_are_computed_once(tmp_path):
    encoder, utterances = CountingEncoder(), [segment(tmp_path), segment(tmp_path, start_s=2.0)]
    first = embed(encoder, utterances, tmp_path / "cache", progressbar=False)
    again = embed(encoder, utterances, tmp_path / "cache", progressbar=False)
    assert encoder.num_calls == 1
    assert torch.equal(first, again)
    assert first.shape == (2, 3)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_model_segment_or_file_is_computed_anew(tmp_path):
    cache, utterances = tmp_path / "cache", [segment(tmp_path)]
    encoder = CountingEncoder()
    embed(encoder, utterances, cache)
    embed(CountingEncoder("1" * 16), utterances, cache)
    embed(encoder, [segment(tmp_path, duration_s=1.0)], cache)
    assert encoder.num_calls == 2
    (tmp_path / "a.wav").write_bytes(b"some other samples")
    embed(encoder, utterances, cache)
    assert encoder.num_calls == 3
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "pickle", "shape"])
def test_a_damaged_cache_is_computed_anew(tmp_path, damage):
    cache, utterances, encoder = tmp_path / "cache", [segment(tmp_path)], CountingEncoder()
    first = embed(encoder, utterances, cache)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        position = content.index(first.numpy().tobytes())
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    elif damage == "text":
        path.write_text("not a tensor")
    elif damage == "pickle":
        torch.save({"embeddings": SimpleNamespace(shape=(1, 3)), "checksum": ""}, path)
    else:
        torch.save({"embeddings": torch.zeros(2, 3), "checksum": ""}, path)
    with pytest.warns(UserWarning, match="is damaged; its embeddings are computed anew"):
        assert torch.equal(embed(encoder, utterances, cache), first)
    assert encoder.num_calls == 2
    embed(encoder, utterances, cache)
    assert encoder.num_calls == 2


def test_embedding_mistakes(tmp_path):
    with pytest.raises(ValueError, match="no utterance"):
        embed(CountingEncoder(), [], tmp_path)
    missing = SimpleNamespace(id="x", path=str(tmp_path / "x.wav"), start_s=0.0, duration_s=1.0)
    with pytest.raises(ValueError, match=r"x\.wav cannot be read"):
        embed(CountingEncoder(), [missing], tmp_path / "cache")
    broken = CountingEncoder()
    broken.encode_utterances = lambda utterances, progressbar: torch.full((1, 3), math.nan)
    with pytest.raises(ValueError, match=r"not finite, as of .*a\.wav"):
        embed(broken, [segment(tmp_path)], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
