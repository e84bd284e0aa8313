"""Speaker verification: who is tried against whom, how often that goes wrong, and how sure one may be of it.

A trial is a profile (the mean of a few enrolled utterances) and one utterance; it is a target trial where both are of
the same speaker. Scores are higher where the two are more alike. Error rates are shares (0.05 is 5 %).
"""

import itertools
import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import det_curve, roc_curve
from torch.nn.functional import normalize

from shared_modules.statistics import Interval, percentile_interval

logger = logging.getLogger(__name__)

_PAIRS_AT_A_TIME = 1_000_000  # of embeddings, so that a long list of trials takes little memory
_WEIGHTS_AT_A_TIME = 4_000_000  # of bootstrapped trials, for the same reason


@dataclass(frozen=True)
class Trials:
    """A list of T trials between P profiles and U test utterances, all made of the same K utterances.

    Attributes
    ----------
    profile_rows : tuple of numpy.ndarray
        Of each profile the rows of the utterances that enroll it, into ``[K]``.
    profile_speakers : numpy.ndarray
        Of each profile the speaker, ``[P]``.
    test_rows : numpy.ndarray
        The rows of the test utterances, ``[U]``, into ``[K]``.
    test_speakers : numpy.ndarray
        ``[U]``.
    profile_index, test_index : numpy.ndarray
        Of each trial the profile, into ``[P]``, and the test utterance, into ``[U]``; both ``[T]``.
    labels : numpy.ndarray
        Of each trial whether the utterance is the profile's speaker's, bool ``[T]``.
    """

    profile_rows: tuple
    profile_speakers: np.ndarray
    test_rows: np.ndarray
    test_speakers: np.ndarray
    profile_index: np.ndarray
    test_index: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def subset(self, keep):
        """The trials that are kept (bool ``[T]``), of the same profiles and utterances."""
        parts = self.profile_index[keep], self.test_index[keep], self.labels[keep]
        head = self.profile_rows, self.profile_speakers, self.test_rows, self.test_speakers
        return Trials(*head, *parts)

    def speaker_pairs(self):
        """Of each trial the profile's and the utterance's speaker, ``[T, 2]``."""
        profiles, tests = self.profile_speakers[self.profile_index], self.test_speakers[self.test_index]
        return np.stack([profiles, tests], axis=1)  # 2 x (T,) -> (T, 2)

    def profiles(self, embeddings):
        """Each profile: the mean of the length-normalised embeddings that enroll it.

        Arguments
        ---------
        embeddings : torch.Tensor
            Of all utterances by the enrollment model, ``[K, D]``.

        Returns
        -------
        torch.Tensor
            ``[P, D]``.
        """
        unit = normalize(torch.as_tensor(embeddings), dim=-1)
        return torch.stack([unit[torch.as_tensor(rows)].mean(0) for rows in self.profile_rows])

    def scores(self, alignment, enroll_embeddings, runtime_embeddings):
        """The cosine score of each trial under an alignment.

        Arguments
        ---------
        alignment : nessa_modules.alignment.Alignment
            Anything with ``enroll`` and ``runtime`` does, such as :class:`SameSpace`.
        enroll_embeddings, runtime_embeddings : torch.Tensor
            Of all utterances by the enrollment model, ``[K, Dx]``, and by the runtime model, ``[K, Dy]``.

        Returns
        -------
        numpy.ndarray
            float64 ``[T]``.
        """
        with torch.no_grad():
            profiles = normalize(torch.as_tensor(alignment.enroll(self.profiles(enroll_embeddings))).double(), dim=-1)
            utterances = torch.as_tensor(runtime_embeddings)[torch.as_tensor(self.test_rows)]
            utterances = normalize(torch.as_tensor(alignment.runtime(utterances)).double(), dim=-1)
        index = torch.as_tensor(self.profile_index), torch.as_tensor(self.test_index)
        parts = [
            (profiles[of_profile] * utterances[of_test]).sum(-1)  # (T', Dz) -> (T',)
            for of_profile, of_test in zip(*(each.split(_PAIRS_AT_A_TIME) for each in index), strict=True)
        ]
        return torch.cat(parts).numpy()


class SameSpace:
    """No alignment: profiles and utterances are of one model, or taken as if they were."""

    @staticmethod
    def enroll(embeddings):
        """The embeddings as they are."""
        return embeddings

    @staticmethod
    def runtime(embeddings):
        """The embeddings as they are."""
        return embeddings


def make_trials(utterances, num_enroll=1, sets_per_speaker=5, seed=0, exclude_same_session=False):
    """Try every speaker's profiles against that speaker's other utterances and against all of the other speakers.

    Arguments
    ---------
    utterances : list of Utterance
        The K utterances: ``speaker`` is read, and ``session`` where sessions matter.
    num_enroll : int
        Utterances that make a profile.
    sets_per_speaker : int
        How many profiles a speaker has: all sets of ``num_enroll`` utterances where they are no more than this, else
        different ones drawn from them.
    seed : int
        Of the draw.
    exclude_same_session : bool
        Whether no speaker is tried with an utterance of a session that enrolled the profile. A speaker of one session
        then has no target trial.

    Returns
    -------
    Trials
        No utterance is tried against a profile that it helped to enroll. Who has no more than ``num_enroll``
        utterances has no profile, but is tried against those of the others.

    Raises
    ------
    ValueError
        If there would be no target trial, or no non-target trial.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> utterances = [SimpleNamespace(speaker=name, session="") for name in "aaabb"]
    >>> trials = make_trials(utterances, num_enroll=2)
    >>> [rows.tolist() for rows in trials.profile_rows], int(trials.labels.sum()), len(trials)
    ([[0, 1], [0, 2], [1, 2]], 3, 9)
    """
    for name, value in (("num_enroll", num_enroll), ("sets_per_speaker", sets_per_speaker)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}.")
    speakers = np.array([utterance.speaker for utterance in utterances])
    rows_of = {}
    for row, speaker in enumerate(speakers):
        rows_of.setdefault(str(speaker), []).append(row)
    rng = np.random.default_rng(seed)
    profiles = [
        (speaker, np.array(rows))
        for speaker, own in sorted(rows_of.items())
        if len(own) > num_enroll
        for rows in _subsets(own, num_enroll, sets_per_speaker, rng)
    ]
    if not profiles:
        raise ValueError(
            f"No speaker has more than {num_enroll} utterances, which a profile of num_enroll {num_enroll} needs."
        )
    profile_speakers, profile_rows = zip(*profiles, strict=True)
    profile_speakers = np.array(profile_speakers)

    is_target = profile_speakers[:, None] == speakers[None, :]  # (P, K)
    is_tried = np.ones_like(is_target)
    sessions = np.array([f"{utterance.speaker}/{utterance.session}" for utterance in utterances])
    for index, rows in enumerate(profile_rows):
        is_tried[index, rows] = False
        if exclude_same_session:
            is_tried[index, np.isin(sessions, sessions[rows])] = False
    profile_index, test_index = np.nonzero(is_tried)
    trials = Trials(
        profile_rows=profile_rows,
        profile_speakers=profile_speakers,
        test_rows=np.arange(len(speakers)),
        test_speakers=speakers,
        profile_index=profile_index,
        test_index=test_index,
        labels=is_target[profile_index, test_index],
    )
    _check_both_kinds(trials.labels)
    return trials


def _subsets(rows, size, most, rng):
    """All sets of so many rows, or ``most`` different ones of them, sorted."""
    if math.comb(len(rows), size) <= most:
        return list(itertools.combinations(rows, size))
    drawn = set()
    while len(drawn) < most:
        drawn.add(tuple(sorted(rng.choice(rows, size, replace=False).tolist())))
    return sorted(drawn)


def trials_from_list(utterances, pairs):
    """The trials of a list such as VoxCeleb's: one utterance enrolls each profile.

    Arguments
    ---------
    utterances : list of Utterance
        ``id`` and ``speaker`` are read.
    pairs : list of (label, enroll_id, test_id)
        As :func:`nessa_modules.corpora.read_voxceleb_trials` gives them; a label is true for a target.

    Returns
    -------
    Trials

    Raises
    ------
    ValueError
        If an utterance of the list is not among those given, or there is but one kind of trial.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> utterances = [SimpleNamespace(id=f"{name}{i}", speaker=name) for name in "ab" for i in (1, 2)]
    >>> trials = trials_from_list(utterances, [(1, "a1", "a2"), (0, "a1", "b1")])
    >>> trials.labels.tolist(), trials.speaker_pairs().tolist()
    ([True, False], [['a', 'a'], ['a', 'b']])
    """
    row_of = {utterance.id: row for row, utterance in enumerate(utterances)}
    for _, *names in pairs:
        for name in names:
            if name not in row_of:
                raise ValueError(f"The trial list names the utterance {name!r}, which is not among those given.")
    speakers = np.array([utterance.speaker for utterance in utterances])
    enroll_rows = np.array([row_of[enroll] for _, enroll, _ in pairs], dtype=int)
    profile_rows, profile_index = np.unique(enroll_rows, return_inverse=True)
    test_rows, test_index = np.unique(np.array([row_of[test] for _, _, test in pairs], dtype=int), return_inverse=True)
    labels = np.array([bool(label) for label, _, _ in pairs], dtype=bool)
    _check_both_kinds(labels)
    return Trials(
        profile_rows=tuple(profile_rows[:, None]),
        profile_speakers=speakers[profile_rows],
        test_rows=test_rows,
        test_speakers=speakers[test_rows],
        profile_index=profile_index,
        test_index=test_index,
        labels=labels,
    )


def same_sex(trials, utterances, sex):
    """The trials whose two speakers are both of one sex.

    Arguments
    ---------
    trials : Trials
    utterances : list of Utterance
        Those of the trials, whose ``sex`` is read.
    sex : str

    Returns
    -------
    Trials or None
        None where they are not of both kinds, target and non-target.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> utterances = [SimpleNamespace(speaker=s, session="", sex=x) for s, x in zip("aabbcc", "FFFFMM")]
    >>> trials = make_trials(utterances)
    >>> len(trials), len(same_sex(trials, utterances, "F")), same_sex(trials, utterances, "M")
    (30, 12, None)
    """
    speakers = {utterance.speaker for utterance in utterances if utterance.sex == sex}
    kept = trials.subset(np.isin(trials.speaker_pairs(), list(speakers)).all(axis=1))
    return kept if 0 < kept.labels.sum() < len(kept) else None


def _check_both_kinds(labels):
    num_targets = int(np.sum(labels))
    if not 0 < num_targets < len(labels):
        raise ValueError(
            "Target and non-target trials are both needed, of two speakers or more, but of "
            f"{len(labels)} trials {num_targets} are targets."
        )


def _checked(scores, labels):
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels).astype(bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"Each trial needs a score and a label, but got the shapes {scores.shape} and {labels.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError(f"Scores must be finite, but {int((~np.isfinite(scores)).sum())} of {len(scores)} are not.")
    _check_both_kinds(labels)
    return scores, labels


def eer(scores, labels, weights=None):
    """The equal error rate: where as many targets are rejected as non-targets are accepted.

    Between two neighbouring points of scikit-learn's curve it is interpolated linearly.

    Arguments
    ---------
    scores : sequence of float
        ``[T]``, higher where a profile and an utterance are more alike.
    labels : sequence of bool
        ``[T]``, whether a trial is a target.
    weights : sequence of float, optional
        How often each trial counts, ``[T]``, at least 0.

    Returns
    -------
    float
        A share: 0.5 for scores that tell nothing.

    Raises
    ------
    ValueError
        If the lengths differ, a score is not finite, or all trials are of one kind.

    Example
    -------
    >>> eer([0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 1, 1, 0, 0, 0])
    0.3333333333333333
    """
    scores, labels = _checked(scores, labels)
    false_accept, true_accept, _ = roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    return float(_crossing(1 - true_accept[None], false_accept[None])[0])


def _crossing(false_reject, false_accept):
    """Where curves cross, ``[D]``: from (1, 0) to (0, 1), each ``[D, N]``, they are (falling, rising)."""
    gap = false_reject - false_accept
    after = (gap <= 0).argmax(axis=1)[:, None]  # never the first point, where it is 1
    gap_before, gap_after = (np.take_along_axis(gap, index, 1) for index in (after - 1, after))
    start, end = (np.take_along_axis(false_accept, index, 1) for index in (after - 1, after))
    return (start + (end - start) * gap_before / (gap_before - gap_after))[:, 0]


def min_dcf(scores, labels, p_target=0.01, weights=None):
    """The least detection cost over all thresholds, as NIST normalises it.

    ``(p_target * FR + (1 - p_target) * FA) / min(p_target, 1 - p_target)`` with both costs 1: accepting nobody, or
    everybody, whichever is cheaper, costs 1.

    Arguments
    ---------
    scores, labels, weights
        As for :func:`eer`.
    p_target : float
        How likely a target is beforehand: 0.01, or 0.05 as in VoxCeleb's challenge.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    ValueError
        As :func:`eer`, and for a ``p_target`` outside 0 to 1.

    Example
    -------
    >>> round(min_dcf([0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 1, 1, 0, 0, 0], p_target=0.5), 3)
    0.333
    """
    _check_p_target(p_target)
    scores, labels = _checked(scores, labels)
    false_accept, true_accept, _ = roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    cost = p_target * (1 - true_accept) + (1 - p_target) * false_accept
    return float(cost.min() / min(p_target, 1 - p_target))


def _check_p_target(p_target):
    if not 0 < p_target < 1:
        raise ValueError(f"p_target can only be a number above 0 and below 1, but got {p_target!r}.")


def det_points(scores, labels):
    """The detection error tradeoff, for a figure.

    Arguments
    ---------
    scores, labels
        As for :func:`eer`.

    Returns
    -------
    false_accept, false_reject : numpy.ndarray
        Shares at each threshold, from the lowest one on.

    Example
    -------
    >>> [rates.tolist() for rates in det_points([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])]
    [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    scores, labels = _checked(scores, labels)
    false_accept, false_reject, _ = det_curve(labels, scores)
    return false_accept, false_reject


def calibrate_thresholds(scores, labels, false_accept_rates=(0.1, 0.05, 0.01, 0.001)):
    """The lowest thresholds under which no more than a given share of the non-target trials is accepted.

    The rate is that of one comparison, of one profile with one utterance: a stranger is taken for somebody among N
    profiles up to N times as often. A rate that is less than one of the trials is left out with a warning.

    Arguments
    ---------
    scores, labels
        As for :func:`eer`; of a development set, whose speakers no model was trained on. A trial is accepted where
        its score is at least the threshold.
    false_accept_rates : sequence of float
        Above 0 and below 1.

    Returns
    -------
    list of dict
        For each rate ``false_accept_rate``, ``threshold`` and ``false_reject_rate`` (of the same trials).

    Raises
    ------
    ValueError
        As :func:`eer`, and for a rate out of range.

    Example
    -------
    >>> rows = calibrate_thresholds([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0], [0.5])
    >>> rows == [{"false_accept_rate": 0.5, "threshold": 0.4, "false_reject_rate": 0.0}]
    True
    """
    scores, labels = _checked(scores, labels)
    others = np.sort(scores[~labels])[::-1]
    rows = []
    for rate in false_accept_rates:
        if not 0 < rate < 1:
            raise ValueError(f"A false-accept rate can only be a number above 0 and below 1, but got {rate!r}.")
        accepted = min(math.floor(rate * len(others) + 1e-9), len(others) - 1)  # the next one would be too many
        if not accepted:
            needed = math.ceil(1 / rate - 1e-9)
            logger.warning(
                "No threshold for a false-accept rate of %g: it needs at least %d comparisons of different speakers, "
                "but there are %d.",
                *(rate, needed, len(others)),
            )
            continue
        refused = others[accepted]
        # Of all scores seen, of targets too, the lowest above those that must be refused.
        above = scores[scores > refused]
        threshold = float(above.min()) if len(above) else float(np.nextafter(refused, math.inf))
        rows.append(
            {
                "false_accept_rate": float(rate),
                "threshold": threshold,
                "false_reject_rate": float((scores[labels] < threshold).mean()),
            }
        )
    return rows


class WeightedErrors:
    """EER and minDCF of one list of scores under many weightings: sorted once, equal to :func:`eer`, :func:`min_dcf`.

    Arguments
    ---------
    scores, labels
        As for :func:`eer`.

    Example
    -------
    >>> errors = WeightedErrors([0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 1, 1, 0, 0, 0])
    >>> rates, costs = errors(np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]]), p_target=0.5)
    >>> rates.round(3).tolist(), costs.round(3).tolist()
    ([0.333, 0.0], [0.333, 0.0])
    """

    def __init__(self, scores, labels):
        scores, labels = _checked(scores, labels)
        self.targets, self.others = np.flatnonzero(labels), np.flatnonzero(~labels)
        self.targets = self.targets[np.argsort(-scores[self.targets], kind="stable")]
        self.others = self.others[np.argsort(-scores[self.others], kind="stable")]
        # Between two targets' scores the curve is a straight line: the points above and at each tell all of it.
        thresholds = np.unique(scores[self.targets])[::-1]
        accepted = [
            np.stack([np.searchsorted(-scores[kind], -thresholds, side) for side in ("left", "right")], 1).ravel()
            for kind in (self.targets, self.others)
        ]  # how many score above, and at least, each: 2 x (N,)
        self.accepted_targets, self.accepted_others = accepted

    def __call__(self, weights, p_target=0.01):
        """Error rates of each weighting.

        Arguments
        ---------
        weights : numpy.ndarray
            ``[D, T]``, whole numbers; each row with targets and non-targets.
        p_target : float
            As for :func:`min_dcf`.

        Returns
        -------
        rates, costs : numpy.ndarray
            EER and minDCF, ``[D]``.
        """
        true_accept = _accepted_share(weights[:, self.targets], self.accepted_targets)
        false_accept = _accepted_share(weights[:, self.others], self.accepted_others)
        false_reject = 1 - true_accept
        costs = (p_target * false_reject + (1 - p_target) * false_accept).min(axis=1)
        return _crossing(false_reject, false_accept), costs / min(p_target, 1 - p_target)


def _accepted_share(weights, accepted):
    """The weight of the first so many, as a share of all: for none, for each number of ``accepted``, and for all."""
    sums = np.cumsum(weights, axis=1, dtype=np.int64)  # (D, T')
    sums = np.hstack([np.zeros_like(sums[:, :1]), sums])  # (D, 1 + T')
    return sums[:, np.concatenate([[0], accepted, [-1]])] / sums[:, -1:]


@dataclass(frozen=True)
class ErrorRates:
    """The error rates of one system: means over seeds, of the trials as they are and of each bootstrap draw.

    Attributes
    ----------
    eer, min_dcf : float
        Means over seeds.
    eer_by_seed, min_dcf_by_seed : tuple of float
    eer_draws, min_dcf_draws : numpy.ndarray
        ``[D]``; draw d of every system of one :func:`speaker_errors` is of the same speakers.
    """

    eer: float
    min_dcf: float
    eer_by_seed: tuple
    min_dcf_by_seed: tuple
    eer_draws: np.ndarray
    min_dcf_draws: np.ndarray

    def interval(self, measure="eer"):
        """The mean and its 95 % interval over speakers, of ``eer`` or ``min_dcf``."""
        return percentile_interval(getattr(self, measure), getattr(self, f"{measure}_draws"))

    def minus(self, other, measure="eer"):
        """How much higher this system's error is than another's, with the paired 95 % interval over speakers."""
        name = f"{measure}_draws"
        draws = getattr(self, name) - getattr(other, name)
        return percentile_interval(getattr(self, measure) - getattr(other, measure), draws)


def draw_trial_weights(trials, num_draws=1000, seed=0):
    """Draw whole speakers with replacement, and tell how often each trial then counts.

    Trials that share a speaker are not independent. A non-target trial counts the product of how often its two
    speakers were drawn (the pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1(2), 386-411), a target
    trial as often as its one speaker.

    Arguments
    ---------
    trials : Trials
    num_draws : int
        Draws that leave no target or no non-target trial are repeated.
    seed : int

    Yields
    ------
    numpy.ndarray
        int32 ``[D', T]``, some of the draws at a time.

    Raises
    ------
    ValueError
        If draws keep leaving one kind of trial only.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> utterances = [SimpleNamespace(speaker=name, session="") for name in "aabbcc"]
    >>> sum(len(weights) for weights in draw_trial_weights(make_trials(utterances), num_draws=7))
    7
    """
    names, index = np.unique(trials.speaker_pairs(), return_inverse=True)
    index = index.reshape(-1, 2)  # (T, 2)
    rng = np.random.default_rng(seed)
    at_a_time = max(_WEIGHTS_AT_A_TIME // len(trials), 1)
    num_drawn = num_refused = 0
    while num_drawn < num_draws:
        number = min(at_a_time, num_draws - num_drawn)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=number).astype(np.int32)
        weights = counts[:, index[:, 0]]  # (D', T)
        weights *= np.where(trials.labels, 1, counts[:, index[:, 1]])
        is_whole = (weights[:, trials.labels] > 0).any(axis=1) & (weights[:, ~trials.labels] > 0).any(axis=1)
        if not is_whole.all():
            weights = weights[is_whole]
        num_drawn, num_refused = num_drawn + len(weights), num_refused + number - len(weights)
        if num_refused > 100 * num_draws:
            raise ValueError(f"{len(names)} speakers are too few to be drawn again with trials of both kinds.")
        if len(weights):
            yield weights


def speaker_errors(trials, scores, num_draws=1000, seed=0, p_target=0.01):
    """The error rates of several systems on the same trials, with a bootstrap over speakers that is paired.

    Arguments
    ---------
    trials : Trials
    scores : dict
        From a system's name to its scores ``[T]``, one array for each seed that it was trained with.
    num_draws, seed : int
        Of :func:`draw_trial_weights`; inside each draw the error is averaged over seeds.
    p_target : float
        Of :func:`min_dcf`.

    Returns
    -------
    dict
        From a system's name to its :class:`ErrorRates`.

    Raises
    ------
    ValueError
        As :func:`eer` and :func:`min_dcf`, or if a system has no scores.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> utterances = [SimpleNamespace(speaker=name, session="") for name in "aaabbbcccddd"]
    >>> trials, rng = make_trials(utterances), np.random.default_rng(0)
    >>> noise = rng.normal(size=len(trials))
    >>> scores = {"old": [1 * trials.labels + noise], "new": [3 * trials.labels + noise]}
    >>> errors = speaker_errors(trials, scores, num_draws=200)
    >>> errors["old"].minus(errors["new"]).low > 0
    True
    """
    _check_p_target(p_target)
    for name, by_seed in scores.items():
        if not by_seed:
            raise ValueError(f"The system {name!r} has no scores.")
    sorted_once = {name: [WeightedErrors(each, trials.labels) for each in by_seed] for name, by_seed in scores.items()}
    draws = {name: [] for name in scores}
    for weights in draw_trial_weights(trials, num_draws, seed):
        for name, by_seed in sorted_once.items():
            draws[name].append(np.mean([errors(weights, p_target) for errors in by_seed], axis=0))  # (2, D')
    result = {}
    for name, by_seed in scores.items():
        rates = tuple(eer(each, trials.labels) for each in by_seed)
        costs = tuple(min_dcf(each, trials.labels, p_target) for each in by_seed)
        drawn = np.concatenate(draws[name], axis=1) if draws[name] else np.empty((2, 0))  # (2, D)
        result[name] = ErrorRates(float(np.mean(rates)), float(np.mean(costs)), rates, costs, *drawn)
    return result


@dataclass(frozen=True)
class RecoveredGain:
    """What share of a model update's gain one updated side brings.

    Attributes
    ----------
    gap : Interval
        Error of both sides old minus error of both sides new.
    gain : Interval or None
        The share with its 95 % interval over speakers; None where the gap's interval does not exclude zero.
    reason : str
        Why there is no share; empty where there is one.
    """

    gap: Interval
    gain: Interval | None
    reason: str = ""


def recovered_gain(both_old, both_new, one_new, measure="eer"):
    """``(err(v1, v1) - err(asymmetric)) / (err(v1, v1) - err(v2, v2))``, where that is defined.

    The smaller the gap below the line, the wilder the ratio; so it is given only where the gap's own interval lies
    above zero. A draw in which the gap is not above zero counts as infinite, with the sign of what is above the line.

    Arguments
    ---------
    both_old, both_new, one_new : ErrorRates
        Of v1-v1, v2-v2 and the asymmetric pair, from one :func:`speaker_errors`.
    measure : str
        ``eer`` or ``min_dcf``.

    Returns
    -------
    RecoveredGain

    Example
    -------
    >>> def rates(error, draws):
    ...     return ErrorRates(error, error, (error,), (error,), np.array(draws), np.array(draws))
    >>> old, new, one_new = rates(0.2, [0.19, 0.21]), rates(0.1, [0.09, 0.11]), rates(0.13, [0.12, 0.14])
    >>> round(recovered_gain(old, new, one_new).gain.mean, 2)
    0.7
    >>> recovered_gain(new, new, one_new).reason
    'undefined: the gap between v1 and v2, 0.0 points of EER [0.0, 0.0], does not lie above zero'
    """
    gap = both_old.minus(both_new, measure)
    if not gap.low > 0:
        name, scale = ("points of EER", 100) if measure == "eer" else ("of minDCF", 1)
        low, mean, high = (f"{scale * value:.{1 if scale == 100 else 3}f}" for value in (gap.low, gap.mean, gap.high))
        reason = f"undefined: the gap between v1 and v2, {mean} {name} [{low}, {high}], does not lie above zero"
        return RecoveredGain(gap, None, reason)
    old, new, one = (getattr(rates, f"{measure}_draws") for rates in (both_old, both_new, one_new))
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(old > new, (old - one) / (old - new), np.copysign(math.inf, old - one))
    value = (getattr(both_old, measure) - getattr(one_new, measure)) / gap.mean
    return RecoveredGain(gap, percentile_interval(value, draws))
