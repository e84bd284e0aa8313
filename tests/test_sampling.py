"""Batches of any number of ranks: every mixture once, and steps that weigh all of their mixtures alike."""

import pytest

from dsd_modules.sampling import EvaluationBatches, TrainingBatches

SPLITS = [(1, 1, 1), (4, 1, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2), (2, 3, 3), (7, 2, 5)]  # batch, accumulation, ranks


def epoch_of(num_samples, batch_size, accumulation, num_ranks, epoch=1, seed=3):
    """The batches of every rank."""
    ranks = []
    for rank in range(num_ranks):
        batches = TrainingBatches(num_samples, batch_size, seed, accumulation, rank, num_ranks)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    return ranks


def steps_of(ranks, accumulation):
    """From each step's batches of all ranks to its rows and the sum of their weights."""
    assert len({len(batches) for batches in ranks}) == 1  # or a collective would wait forever
    steps = []
    for start in range(0, len(ranks[0]), accumulation):
        items = [item for batches in ranks for batch in batches[start : start + accumulation] for item in batch]
        steps.append(([row for _, row, weight in items if weight > 0], sum(weight for *_, weight in items)))
    return steps


@pytest.mark.parametrize(("batch_size", "accumulation", "num_ranks"), SPLITS)
@pytest.mark.parametrize("num_samples", [1, 2, 13, 24, 71])
def test_every_mixture_once_and_equal_weights(num_samples, batch_size, accumulation, num_ranks):
    ranks = epoch_of(num_samples, batch_size, accumulation, num_ranks)
    steps = steps_of(ranks, accumulation)
    assert sorted(row for rows, _ in steps for row in rows) == list(range(num_samples))
    for _, total in steps:  # Brain divides by accumulation, and DDP by the ranks: a mean is left
        assert total == pytest.approx(accumulation * num_ranks)
    for batch in (batch for batches in ranks for batch in batches):
        assert 1 <= len(batch) <= batch_size
        weights = {weight for *_, weight in batch}
        assert len(weights) == 1  # an item without weight is alone in its batch
        assert weights != {0.0} or len(batch) == 1


def test_a_step_takes_the_same_mixtures_however_it_is_split():
    splits = [(8, 1, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1), (2, 1, 4)]
    steps = [[set(rows) for rows, _ in steps_of(epoch_of(27, *split), split[1])] for split in splits]
    assert all(other == steps[0] for other in steps[1:])
    assert [len(rows) for rows in steps[0]] == [8, 8, 8, 3]


def test_the_last_step_is_shared_out_evenly():
    (first, second) = epoch_of(11, 4, 1, 2)
    assert [len(batch) for batch in first] == [4, 2]
    assert [len(batch) for batch in second] == [4, 1]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_of(50, 5, 1, 1, epoch, seed)[0] for epoch, seed in ((1, 3), (2, 3), (1, 4), (1, 3))]
    rows = [[row for batch in order for _, row, _ in batch] for order in orders]
    assert rows[0] == rows[3]
    assert len({tuple(order) for order in rows}) == 3
    assert {epoch for batch in orders[1] for epoch, *_ in batch} == {2}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_resume_goes_on_with_any_number_of_ranks(num_ranks, tmp_path):
    """Two ranks train three steps of epoch 2; others train what is left, and no mixture twice."""
    before = TrainingBatches(29, 3, 7, rank=1, num_ranks=2)
    before.set_epoch(2)
    (first, second) = epoch_of(29, 3, 1, 2, epoch=2, seed=7)
    done = {row for batches in (first[:3], second[:3]) for batch in batches for _, row, _ in batch}
    for _ in range(3):
        before.advance()
    assert before.epoch_share_done == pytest.approx(18 / 29)
    before.save(tmp_path / "state")

    rest = []
    for rank in range(num_ranks):
        after = TrainingBatches(29, 3, 7, rank=rank, num_ranks=num_ranks)
        after.load(tmp_path / "state")
        after.set_epoch(2)  # as Brain does
        rest += [row for batch in after for _, row, weight in batch if weight > 0]
    assert len(rest) == 11
    assert done | set(rest) == set(range(29))
    after.set_epoch(3)
    assert after.epoch_share_done == 0
    assert len(list(after)) == len(after)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_evaluation_batches_do_not_depend_on_the_ranks(num_ranks):
    one = [tuple(batch) for batch in EvaluationBatches(23, 4)]
    ranks = [[tuple(batch) for batch in EvaluationBatches(23, 4, rank, num_ranks)] for rank in range(num_ranks)]
    assert sorted(batch for batches in ranks for batch in batches) == one
    assert [row for batch in one for row in batch] == list(range(23))
