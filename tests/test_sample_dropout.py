"""The DSD rule, case by case from the design's table, and against a slow re-implementation in plain Python."""

import math
import random
from dataclasses import fields

import pytest
import torch

from dsd_modules.memory_bank import AssignmentMemoryBank
from dsd_modules.sample_dropout import ACTIONS, DROP, KEEP, REORDER, Decision, Entries, decide, record

NAN, INF = math.nan, math.inf

# Assignments of two and of three speakers. CYCLE and BACK are each other's inverses: taking one for the other
# is the mistake that two speakers hide.
AB, BA = (0, 1), (1, 0)
ABC, CYCLE, BACK = (0, 1, 2), (1, 2, 0), (2, 0, 1)


def entries(best_metric, best_perm, last_perm=None, num_visits=1, num_exclusions=0, exclusion_run=0):
    """One stored sample."""
    return Entries(
        best_metric=torch.tensor([float(best_metric)]),
        best_perm=torch.tensor([best_perm]),
        last_perm=torch.tensor([best_perm if last_perm is None else last_perm]),
        num_visits=torch.tensor([num_visits]),
        num_exclusions=torch.tensor([num_exclusions]),
        exclusion_run=torch.tensor([exclusion_run]),
    )


def as_row(stored, row=0):
    """``(m*, pi*, last, visits, exclusions, run)`` in plain numbers."""
    return (
        stored.best_metric[row].item(),
        tuple(stored.best_perm[row].tolist()),
        tuple(stored.last_perm[row].tolist()),
        stored.num_visits[row].item(),
        stored.num_exclusions[row].item(),
        stored.exclusion_run[row].item(),
    )


def visit(stored, perm, metric, **options):
    perm, metric = torch.tensor([perm]), torch.tensor([float(metric)])
    decision = decide(stored, perm, metric, **options)
    return decision, record(decision, perm, metric)


# The table of DESIGN.md, section 2: stored is always (8 dB, pi*).

TABLE = [
    # m, is pi == pi*?, margin -> contradicts, becomes the entry
    (9.0, True, 0.0, False, True),
    (9.0, False, 0.0, False, True),  # better: stored also where pi differs
    (8.0, True, 0.0, False, False),
    (8.0, False, 0.0, True, False),  # m == m* counts as not better
    (7.0, True, 0.0, False, False),
    (7.0, False, 0.0, True, False),
    (-40.0, False, 0.0, True, False),
    (8.0, False, 1.5, False, False),  # "otherwise": within the margin
    (6.75, False, 1.5, False, False),
    (6.5, False, 1.5, True, False),  # m == m* - margin counts
    (6.25, False, 1.5, True, False),
    (6.25, True, 1.5, False, False),
    (8.25, False, 1.5, False, True),  # the margin never holds back a better one
]


@pytest.mark.parametrize("mode", ["none", "drop", "reorder"])
@pytest.mark.parametrize("perms", [(AB, BA), (ABC, (0, 2, 1)), (CYCLE, BACK), (BACK, CYCLE), (CYCLE, ABC)])
@pytest.mark.parametrize(("metric", "is_same", "margin_db", "contradicts", "is_stored"), TABLE)
def test_table(metric, is_same, margin_db, contradicts, is_stored, perms, mode):
    best, other = perms
    perm = best if is_same else other
    decision, after = visit(entries(8, best), perm, metric, mode=mode, margin_db=margin_db)
    is_excluded = contradicts and mode != "none"
    expected = {"none": KEEP, "drop": DROP, "reorder": REORDER}[mode] if contradicts else KEEP
    assert decision.action.tolist() == [expected]
    assert decision.keep.tolist() == [expected != DROP]
    assert decision.is_excluded.tolist() == [is_excluded]
    if expected != DROP:
        assert tuple(decision.perm[0].tolist()) == (best if expected == REORDER else perm)
    assert decision.is_renewed.tolist() == [is_stored]
    assert decision.is_switched.tolist() == [perm != best]
    assert decision.is_counted.tolist() == [True]
    assert decision.is_readmitted.tolist() == [False]
    stored = (metric, perm) if is_stored else (8.0, best)
    assert as_row(after) == (*stored, perm, 2, int(is_excluded), int(is_excluded))


@pytest.mark.parametrize("mode", ["none", "drop", "reorder"])
@pytest.mark.parametrize("metric", [-200.0, 0.0, 30.0])
@pytest.mark.parametrize("perm", [AB, BA, ABC, CYCLE])
def test_first_visit_is_trained_and_stored(mode, metric, perm):
    empty = entries(0, (0,) * len(perm), num_visits=0)  # what an unseen row happens to hold says nothing
    decision, after = visit(empty, perm, metric, mode=mode, patience=1, quota=0)
    assert decision.action.tolist() == [KEEP]
    assert tuple(decision.perm[0].tolist()) == perm
    assert decision.is_switched.tolist() == [False]
    assert as_row(after) == (metric, perm, perm, 1, 0, 0)


@pytest.mark.parametrize("mode", ["none", "drop", "reorder"])
@pytest.mark.parametrize(("metric", "valid"), [(NAN, True), (INF, True), (-INF, True), (20.0, False), (NAN, False)])
@pytest.mark.parametrize("num_visits", [0, 3])
def test_uncounted_visits_leave_no_trace(mode, metric, valid, num_visits):
    stored = entries(8, CYCLE, BACK, num_visits, exclusion_run=2)
    decision, after = visit(stored, ABC, metric, mode=mode, patience=2, valid=torch.tensor([valid]))
    assert decision.action.tolist() == [KEEP]
    assert tuple(decision.perm[0].tolist()) == ABC
    assert not (decision.is_counted | decision.is_switched | decision.is_renewed | decision.is_readmitted).any()
    assert as_row(after) == as_row(stored)


def test_record_does_not_touch_what_it_is_given():
    stored = entries(8, AB)
    before = as_row(stored)
    visit(stored, BA, 9.0)
    visit(stored, BA, 5.0)
    assert as_row(stored) == before


def test_unknown_mode_names_the_value():
    with pytest.raises(ValueError, match="'remove'"):
        visit(entries(8, AB), AB, 1.0, mode="remove")


def test_actions_are_named():
    assert [ACTIONS[action] for action in (KEEP, DROP, REORDER)] == ["keep", "drop", "reorder"]


# Sequences of visits of one sample: (metric, perm) -> (action, m*, pi*). The last assignment is always PIT's own.

K, D, R, U = "keep", "drop", "reorder", "uncounted"

SEQUENCES = {
    "plain drop": (
        {"mode": "drop"},
        [
            (3.0, BA, K, 3.0, BA),
            (2.0, AB, D, 3.0, BA),
            (2.5, BA, K, 3.0, BA),
            (3.0, AB, D, 3.0, BA),
            (3.5, AB, K, 3.5, AB),
            (3.5, BA, D, 3.5, AB),
            (9.0, AB, K, 9.0, AB),
        ],
    ),
    "plain reorder": (
        {"mode": "reorder"},
        [
            (3.0, BA, K, 3.0, BA),
            (2.0, AB, R, 3.0, BA),
            (2.0, AB, R, 3.0, BA),
            (3.25, AB, K, 3.25, AB),
            (3.25, BA, R, 3.25, AB),
        ],
    ),
    "none records": (
        {"mode": "none", "patience": 1},
        [(3.0, BA, K, 3.0, BA), (2.0, AB, K, 3.0, BA), (1.0, AB, K, 3.0, BA), (4.0, AB, K, 4.0, AB)],
    ),
    "negative metrics": (
        {"mode": "drop"},
        [(-9.0, AB, K, -9.0, AB), (-10.0, BA, D, -9.0, AB), (-8.0, BA, K, -8.0, BA), (-8.0, AB, D, -8.0, BA)],
    ),
    "three speakers": (
        {"mode": "reorder"},
        [
            (3.0, CYCLE, K, 3.0, CYCLE),
            (2.0, BACK, R, 3.0, CYCLE),
            (2.0, CYCLE, K, 3.0, CYCLE),
            (2.0, ABC, R, 3.0, CYCLE),
            (4.0, BACK, K, 4.0, BACK),
            (4.0, CYCLE, R, 4.0, BACK),
        ],
    ),
    "margin": (
        {"mode": "drop", "margin_db": 1.0},
        [
            (5.0, AB, K, 5.0, AB),
            (4.5, BA, K, 5.0, AB),
            (4.0, BA, D, 5.0, AB),
            (5.25, BA, K, 5.25, BA),
            (4.25, AB, D, 5.25, BA),
            (4.375, AB, K, 5.25, BA),
        ],
    ),
    "patience 1": (
        {"mode": "drop", "patience": 1},
        [
            (5.0, AB, K, 5.0, AB),
            (4.0, BA, D, 5.0, AB),
            (3.0, BA, K, 3.0, BA),  # renewed with the new metric, though lower
            (2.0, AB, D, 3.0, BA),
            (2.0, AB, K, 2.0, AB),
        ],
    ),
    "patience 2": (
        {"mode": "reorder", "patience": 2},
        [
            (5.0, ABC, K, 5.0, ABC),
            (4.0, CYCLE, R, 5.0, ABC),
            (4.0, BACK, R, 5.0, ABC),
            (1.0, CYCLE, K, 1.0, CYCLE),  # exactly two in a row, whatever they were
            (1.0, ABC, R, 1.0, CYCLE),
            (0.0, ABC, R, 1.0, CYCLE),
            (0.0, CYCLE, K, 1.0, CYCLE),  # agrees: nothing to re-admit, but the row is broken
            (0.0, ABC, R, 1.0, CYCLE),
            (0.0, ABC, R, 1.0, CYCLE),
            (0.5, ABC, K, 0.5, ABC),
        ],
    ),
    "a better visit breaks the row": (
        {"mode": "drop", "patience": 2},
        [
            (5.0, AB, K, 5.0, AB),
            (4.0, BA, D, 5.0, AB),
            (6.0, BA, K, 6.0, BA),
            (4.0, AB, D, 6.0, BA),
            (4.0, AB, D, 6.0, BA),
            (4.0, AB, K, 4.0, AB),
        ],
    ),
    "uncounted visits do not break the row": (
        {"mode": "drop", "patience": 2},
        [
            (NAN, AB, U, None, None),
            (5.0, AB, K, 5.0, AB),
            (4.0, BA, D, 5.0, AB),
            (INF, AB, U, 5.0, AB),
            (4.0, BA, D, 5.0, AB),
            (NAN, BA, U, 5.0, AB),
            (4.0, BA, K, 4.0, BA),
        ],
    ),
    "start epoch 3": (
        {"mode": "drop", "start_epoch": 3},
        [(5.0, AB, K, 5.0, AB), (4.0, BA, K, 5.0, AB), (3.0, BA, D, 5.0, AB), (6.0, BA, K, 6.0, BA)],
    ),
    "patience counts no exclusion before the start epoch": (
        {"mode": "drop", "start_epoch": 3, "patience": 1},
        [(5.0, AB, K, 5.0, AB), (4.0, BA, K, 5.0, AB), (3.0, BA, D, 5.0, AB), (3.0, BA, K, 3.0, BA)],
    ),
    "rate 0": (
        {"mode": "drop", "max_drop_rate": 0.0, "patience": 1},
        [(5.0, AB, K, 5.0, AB), (4.0, BA, K, 5.0, AB), (4.0, BA, K, 5.0, AB), (6.0, BA, K, 6.0, BA)],
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_of_visits(name):
    options, visits = SEQUENCES[name]
    num_spks = len(visits[0][1])
    bank = AssignmentMemoryBank(num_spks, **options)
    bank.set_samples(["other", "it"])
    row = torch.tensor([1])
    last, num_visits, num_exclusions, run = None, 0, 0, 0
    for epoch, (metric, perm, action, best_metric, best_perm) in enumerate(visits, start=1):
        bank.start_epoch(epoch)
        decision = bank.update(row, torch.tensor([perm]), torch.tensor([metric]))
        where = f"visit {epoch}"
        assert ACTIONS[decision.action.item()] == action.replace(U, K), where
        trained = best_perm if action == R else perm
        assert action == D or tuple(decision.perm[0].tolist()) == trained, where
        is_first = num_visits == 0
        assert decision.is_switched.item() == (action != U and not is_first and perm != last), where
        assert bank.counts.label_switches == int(decision.is_switched.item()), where
        assert bank.counts.revisits == int(action != U and not is_first), where
        assert bank.counts.uncounted == int(action == U), where
        assert (bank.counts.dropped_samples, bank.counts.reordered_samples) == (action == D, action == R), where
        if action != U:
            last, num_visits = perm, num_visits + 1
            num_exclusions += action in (D, R)
            run = run + 1 if action in (D, R) else 0
        after = as_row(bank.lookup(row))
        if num_visits:
            assert after == (best_metric, best_perm, last, num_visits, num_exclusions, run), where
        else:
            assert after[3:] == (0, 0, 0), where
    assert bank.lookup(torch.tensor([0])).num_visits.item() == 0  # the neighbour noticed nothing


# The cap


def contradicting(num_samples, **options):
    """A bank in its second epoch, all of whose samples would be excluded with the assignment BA."""
    bank = AssignmentMemoryBank(2, **options)
    bank.set_samples([f"s{row}" for row in range(num_samples)])
    bank.start_epoch(1)
    bank.update(torch.arange(num_samples), torch.tensor([AB] * num_samples), torch.full((num_samples,), 5.0))
    bank.start_epoch(2)
    return bank


def contradict(bank, rows, metric=1.0):
    return bank.update(torch.tensor(rows), torch.tensor([BA] * len(rows)), torch.full((len(rows),), metric))


@pytest.mark.parametrize(
    ("num_samples", "rate", "expected"),
    [
        (10, 0.0, 0),
        (10, 0.05, 0),
        (10, 0.1, 1),
        (10, 0.19, 1),
        (10, 0.3, 3),
        (10, 0.7, 7),
        (7, 0.5, 3),
        (100, 0.29, 29),
    ],
)
@pytest.mark.parametrize("mode", ["drop", "reorder"])
def test_cap_is_the_floor_first_come(num_samples, rate, expected, mode):
    bank = contradicting(num_samples, mode=mode, max_drop_rate=rate)
    order = list(reversed(range(num_samples)))
    excluded = []
    for start in range(0, num_samples, 4):
        rows = order[start : start + 4]
        excluded += contradict(bank, rows).is_excluded.tolist()
    assert excluded == [True] * expected + [False] * (num_samples - expected)
    stored = bank.lookup(torch.tensor(order))
    assert stored.exclusion_run.tolist() == [1] * expected + [0] * (num_samples - expected)
    assert (stored.best_metric == 5).all()
    assert stored.best_perm.tolist() == [[0, 1]] * num_samples
    assert stored.last_perm.tolist() == [[1, 0]] * num_samples


def test_cap_of_one_is_no_cap():
    bank = contradicting(3, max_drop_rate=1.0)
    assert all(contradict(bank, [0, 1, 2]).is_excluded.all() for _ in range(3))


def test_cap_starts_again_each_epoch():
    bank = contradicting(4, max_drop_rate=0.5)
    for epoch in (2, 3, 4):
        bank.start_epoch(epoch)
        assert contradict(bank, [3, 1, 0, 2]).is_excluded.tolist() == [True, True, False, False]


def test_cap_counts_only_what_is_excluded():
    bank = contradicting(4, max_drop_rate=0.5)
    rows = torch.tensor([0, 1, 2, 3])
    perm = torch.tensor([AB, BA, BA, BA])
    decision = bank.update(rows, perm, torch.tensor([1.0, 9.0, 1.0, 1.0]))  # agrees, better, excluded, excluded
    assert decision.is_excluded.tolist() == [False, False, True, True]


def test_readmission_takes_no_part_of_the_cap():
    bank = contradicting(4, max_drop_rate=0.25, patience=1)
    assert contradict(bank, [0]).is_excluded.tolist() == [True]
    bank.start_epoch(3)
    decision = contradict(bank, [0, 1, 2])
    assert decision.is_readmitted.tolist() == [True, False, False]
    assert decision.is_excluded.tolist() == [False, True, False]


def test_a_used_up_or_negative_quota_excludes_nothing():
    for quota in (0, -3):
        decision, after = visit(entries(8, AB), BA, 1.0, quota=quota)
        assert not decision.is_excluded.any()
        assert as_row(after) == (8.0, AB, BA, 2, 0, 0)


# A slow oracle


class SlowRule:
    """DESIGN.md, section 2, one visit at a time, in dictionaries."""

    def __init__(self, num_samples, mode, margin_db=0.0, start_epoch=1, max_drop_rate=1.0, patience=0):
        self.mode, self.margin_db, self.start_epoch, self.patience = mode, margin_db, start_epoch, patience
        self.allowed = math.floor(round(max_drop_rate * num_samples, 6)) if max_drop_rate < 1 else math.inf
        self.memory = {}
        self.epoch, self.num_excluded = 0, 0

    def new_epoch(self):
        self.epoch += 1
        self.num_excluded = 0

    def visit(self, sample, perm, metric, valid):
        """Returns (action, assignment to train under, switched)."""
        if not math.isfinite(metric) or not valid:
            return "keep", perm, False
        if sample not in self.memory:
            self.memory[sample] = {"best": metric, "perm": perm, "last": perm, "visits": 1, "exclusions": 0, "run": 0}
            return "keep", perm, False
        entry = self.memory[sample]
        is_switched = perm != entry["last"]
        entry["last"] = perm
        entry["visits"] += 1
        run, entry["run"] = entry["run"], 0
        if metric > entry["best"]:
            entry["best"], entry["perm"] = metric, perm
            return "keep", perm, is_switched
        may_exclude = self.mode != "none" and self.epoch >= self.start_epoch
        if perm == entry["perm"] or metric > entry["best"] - self.margin_db or not may_exclude:
            return "keep", perm, is_switched
        if self.patience and run >= self.patience:
            entry["best"], entry["perm"] = metric, perm
            return "keep", perm, is_switched
        if self.num_excluded >= self.allowed:
            return "keep", perm, is_switched
        self.num_excluded += 1
        entry["exclusions"] += 1
        entry["run"] = run + 1
        return self.mode, entry["perm"] if self.mode == "reorder" else perm, is_switched


OPTIONS = [
    {},
    {"margin_db": 0.5},
    {"start_epoch": 4},
    {"max_drop_rate": 0.3},
    {"max_drop_rate": 0.0},
    {"patience": 1},
    {"patience": 3},
    {"margin_db": 1.0, "start_epoch": 3, "max_drop_rate": 0.4, "patience": 2},
]


@pytest.mark.parametrize("num_spks", [2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["none", "drop", "reorder"])
def test_random_visits_equal_the_slow_rule(mode, options, num_spks):
    rng = random.Random(f"{mode} {options} {num_spks}")
    num_samples, num_epochs, batch = 12, 20, 5
    bank = AssignmentMemoryBank(num_spks, mode, **options)
    bank.set_samples([f"s{row}" for row in range(num_samples)])
    oracle = SlowRule(num_samples, mode, **options)
    seen = {"keep": 0, "drop": 0, "reorder": 0}
    for epoch in range(1, num_epochs + 1):
        bank.start_epoch(epoch)
        oracle.new_epoch()
        order = rng.sample(range(num_samples), num_samples)
        switches = 0
        for start in range(0, num_samples, batch):
            rows = order[start : start + batch]
            perms = [tuple(rng.sample(range(num_spks), num_spks)) for _ in rows]
            metrics = [rng.choice([NAN, INF, *(m / 4 for m in range(-8, 25))]) for _ in rows]
            valid = [rng.random() > 0.1 for _ in rows]
            decision = bank.update(torch.tensor(rows), torch.tensor(perms), torch.tensor(metrics), torch.tensor(valid))
            for b, visited in enumerate(zip(rows, perms, metrics, valid, strict=True)):
                action, trained, is_switched = oracle.visit(*visited)
                assert ACTIONS[decision.action[b].item()] == action
                assert tuple(decision.perm[b].tolist()) == trained
                assert decision.is_switched[b].item() == is_switched
                seen[action] += 1
                switches += is_switched
        assert bank.counts.label_switches == switches
        assert bank.counts.dropped_samples + bank.counts.reordered_samples == oracle.num_excluded
        for sample, entry in oracle.memory.items():
            assert as_row(bank.lookup(torch.tensor([sample]))) == tuple(entry.values())
    if mode != "none" and options.get("max_drop_rate", 1) > 0:
        assert seen[mode] > 20  # the oracle was not asked trivial questions


def test_decision_of_a_batch_equals_its_items_alone():
    rng = torch.Generator().manual_seed(0)
    size = 64
    perms = torch.stack([torch.randperm(3, generator=rng) for _ in range(3 * size)]).view(3, size, 3)
    counts = torch.randint(0, 4, (3, size), generator=rng)
    stored = Entries(torch.randn(size, generator=rng), perms[0], perms[1], *counts)
    metric = torch.randn(size, generator=rng)
    together = decide(stored, perms[2], metric, "reorder", 0.25, 2)
    for b in range(size):
        alone = Entries(*(getattr(stored, field.name)[b : b + 1] for field in fields(Entries)))
        decision = decide(alone, perms[2][b : b + 1], metric[b : b + 1], "reorder", 0.25, 2)
        for field in (field for field in fields(Decision) if field.name != "stored"):
            assert torch.equal(getattr(together, field.name)[b : b + 1], getattr(decision, field.name)), field.name
