"""The bank: its checkpoints, its refusals, its merge over two gloo ranks, and its memory."""

import pickle
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch
import torch.multiprocessing
from conftest import PEAK_BYTES
from speechbrain.utils.checkpoints import Checkpointer

from dsd_modules.memory_bank import AssignmentMemoryBank, EpochCounts
from dsd_modules.sample_dropout import Entries

IDS = [f"mix_{row:03d}" for row in range(10)]
OPTIONS = {"num_spks": 3, "mode": "drop", "margin_db": 0.25, "max_drop_rate": 0.5, "patience": 2}


def new_bank(ids=IDS, **options):
    bank = AssignmentMemoryBank(**(OPTIONS | options))
    if ids is not None:
        bank.set_samples(ids)
    return bank


def random_visits(rows, seed, num_spks=3):
    rng = torch.Generator().manual_seed(seed)
    perm = torch.stack([torch.randperm(num_spks, generator=rng) for _ in rows])
    metric = 5 * torch.randn(len(rows), generator=rng)
    valid = torch.rand(len(rows), generator=rng) > 0.1
    return torch.tensor(rows), perm, metric, valid


def train(bank, epochs, batches=((3, 1, 4), (0, 5, 9), (2, 6, 8, 7)), end=True):
    for epoch in epochs:
        bank.start_epoch(epoch)
        for number, rows in enumerate(batches):
            bank.update(*random_visits(rows, seed=100 * epoch + number))
        if end:
            bank.end_epoch()
    return bank


def contents(bank):
    """All a bank remembers, in plain numbers."""
    stored = bank.lookup(torch.arange(len(bank)))
    return {field.name: getattr(stored, field.name).tolist() for field in fields(Entries)}


# Its ids


def test_empty_until_it_is_given_its_samples():
    bank = new_bank(ids=None)
    assert len(bank) == 0
    with pytest.raises(IndexError, match="0"):
        bank.lookup(torch.tensor([0]))
    bank.set_samples(IDS)
    assert len(bank) == 10
    assert set(contents(bank)["num_visits"]) == {0}


def test_duplicate_id_is_named():
    with pytest.raises(ValueError, match="'mix_b'"):
        new_bank(["mix_a", "mix_b", "mix_c", "mix_b"])


@pytest.mark.parametrize("ids", [IDS, tuple(IDS)])
def test_the_same_samples_again_change_nothing(ids):
    bank = train(new_bank(), [1])
    before = contents(bank)
    bank.set_samples(ids)
    assert contents(bank) == before


@pytest.mark.parametrize(
    ("ids", "how_many", "first"),
    [
        ([*IDS[:4], "new", *IDS[5:]], "1", "'new'"),
        ([*IDS[:4], "new", *IDS[5:8], "newer", IDS[9]], "2", "'new'"),
        ([IDS[1], IDS[0], *IDS[2:]], "2", "'mix_001'"),
        ([*IDS, "more", "and_more"], "2", "'more'"),
        (IDS[:7], "3", "row 7"),
        (["x" + sample_id for sample_id in IDS], "10", "'xmix_000'"),
    ],
)
def test_other_samples_are_refused_and_nothing_is_lost(ids, how_many, first, tmp_path):
    bank = train(new_bank(), [1, 2])
    before = contents(bank)
    with pytest.raises(ValueError, match=f"{how_many} of 10") as error:
        bank.set_samples(ids)
    assert first in str(error.value)
    assert contents(bank) == before
    bank.save(tmp_path / "bank.ckpt")
    # Both orders: ids, then checkpoint; checkpoint, then ids.
    other = new_bank(ids)
    with pytest.raises(ValueError, match=f"{how_many} of 10") as error:
        other.load(tmp_path / "bank.ckpt")
    assert first in str(error.value)
    assert set(contents(other)["num_visits"]) == {0}
    late = new_bank(ids=None)
    late.load(tmp_path / "bank.ckpt")
    with pytest.raises(ValueError, match=f"{how_many} of 10"):
        late.set_samples(ids)


def test_another_number_of_speakers_is_refused(tmp_path):
    train(new_bank(), [1]).save(tmp_path / "bank.ckpt")
    with pytest.raises(ValueError, match=r"3 speakers.*2"):
        new_bank(num_spks=2).load(tmp_path / "bank.ckpt")


@pytest.mark.parametrize("rows", [[-1], [10], [0, 11], [3, -2]])
def test_rows_out_of_range_are_refused(rows):
    bank = new_bank()
    with pytest.raises(IndexError, match="10"):
        bank.lookup(torch.tensor(rows))
    with pytest.raises(IndexError):
        bank.update(*random_visits(rows, 0))
    assert set(contents(bank)["num_visits"]) == {0}


def test_a_row_twice_in_a_batch_is_refused():
    bank = new_bank()
    with pytest.raises(ValueError, match=r"\[3, 1, 3\]"):
        bank.update(*random_visits([3, 1, 3], 0))
    assert bank.counts == EpochCounts()


def test_an_empty_batch_is_no_visit():
    bank = new_bank()
    bank.start_epoch(1)
    empty = torch.empty(0, dtype=torch.int64)
    decision = bank.update(empty, torch.empty(0, 3, dtype=torch.int64), torch.empty(0))
    assert decision.action.shape == (0,)
    assert bank.counts == EpochCounts()


def test_lookup_gives_copies():
    bank = train(new_bank(), [1])
    before = contents(bank)
    stored = bank.lookup(torch.arange(10))
    for field in fields(Entries):
        getattr(stored, field.name).fill_(99)
    assert contents(bank) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_spks", 0),
        ("num_spks", 128),
        ("mode", "remove"),
        ("margin_db", -0.5),
        ("start_epoch", 0),
        ("max_drop_rate", 1.5),
        ("max_drop_rate", -0.1),
        ("patience", -1),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=option) as error:
        new_bank(**{option: value})
    assert repr(value) in str(error.value)


def test_half_precision_and_graph_are_welcome():
    bank = new_bank()
    bank.start_epoch(1)
    metric = torch.tensor([1.5, -2.0], dtype=torch.bfloat16, requires_grad=True)
    bank.update(torch.tensor([0, 1]), torch.tensor([[0, 1, 2], [1, 2, 0]]), metric)
    assert contents(bank)["best_metric"][:2] == [1.5, -2.0]


# Counts and epochs


def test_counts_by_hand():
    bank = new_bank(max_drop_rate=1.0, margin_db=0.0, patience=1)
    rows, perm = torch.tensor([0, 1, 2, 3]), torch.tensor([[0, 1, 2]] * 4)
    other = torch.tensor([[1, 2, 0]] * 4)
    bank.start_epoch(1)
    bank.update(rows, perm, torch.tensor([5.0, 5.0, 5.0, float("nan")]))
    assert bank.counts == EpochCounts(visits=4, uncounted=1)
    assert bank.counts.label_switch_rate == 0.0
    bank.start_epoch(2)
    bank.update(rows, torch.cat([perm[:1], other[1:]]), torch.tensor([4.0, 4.0, 6.0, 4.0]))
    # agrees; dropped; better under another assignment; first
    assert bank.counts == EpochCounts(visits=4, revisits=3, label_switches=2, dropped_samples=1)
    assert bank.counts.label_switch_rate == pytest.approx(2 / 3)
    assert bank.counts.excluded_rate == pytest.approx(1 / 4)
    bank.start_epoch(3)
    bank.update(rows, other, torch.full((4,), 1.0), torch.tensor([True, True, False, True]))
    # dropped; re-admitted, and no switch; uncounted; agrees
    expected = EpochCounts(visits=4, uncounted=1, revisits=3, label_switches=1, dropped_samples=1, readmitted_samples=1)
    assert bank.counts == expected
    assert bank.end_epoch() == expected


def test_the_same_epoch_keeps_counts_and_a_new_one_resets():
    bank = train(new_bank(), [1, 2], end=False)
    counts = EpochCounts(**asdict(bank.counts))
    assert counts.visits == 10
    bank.start_epoch(2)
    assert bank.counts == counts
    bank.start_epoch(3)
    assert bank.counts == EpochCounts()
    assert sum(contents(bank)["num_visits"]) > 0


# Checkpoints


def test_round_trip_through_the_checkpointer(tmp_path):
    bank = train(new_bank(), [1, 2, 3])
    Checkpointer(tmp_path, {"bank": bank}).save_checkpoint()
    again = new_bank()
    checkpointer = Checkpointer(tmp_path, {"bank": again})
    assert checkpointer.recover_if_possible() is not None
    assert contents(again) == contents(bank)
    assert again.counts == bank.counts
    assert again.epoch == 3
    assert contents(train(again, [4])) == contents(train(bank, [4]))
    assert again.counts == bank.counts


def test_the_checkpointer_refuses_other_data(tmp_path):
    Checkpointer(tmp_path, {"bank": train(new_bank(), [1])}).save_checkpoint()
    with pytest.raises(ValueError, match="1 of 10"):
        Checkpointer(tmp_path, {"bank": new_bank([*IDS[:9], "new"])}).recover_if_possible()


@pytest.mark.parametrize("mode", ["none", "drop", "reorder"])
def test_resume_in_the_middle_of_an_epoch_decides_the_same(mode, tmp_path):
    first, rest = [(3, 1, 4), (0, 5)], [(9, 2, 6), (8, 7)]
    # The cap of 2 is used up in part before the checkpoint: a resume that forgot it would exclude more.
    bank = train(new_bank(mode=mode, max_drop_rate=0.2), [1, 2, 3])
    bank.start_epoch(4)
    for number, rows in enumerate(first):
        bank.update(*random_visits(rows, seed=40 + number))
    Checkpointer(tmp_path, {"bank": bank}).save_checkpoint()
    again = new_bank(mode=mode, max_drop_rate=0.2)
    Checkpointer(tmp_path, {"bank": again}).recover_if_possible()
    again.start_epoch(4)
    assert again.counts.visits == 5
    for number, rows in enumerate(rest):
        visits = random_visits(rows, seed=50 + number)
        ours, theirs = again.update(*visits), bank.update(*visits)
        assert torch.equal(ours.action, theirs.action)
        assert torch.equal(ours.perm, theirs.perm)
        assert torch.equal(ours.is_switched, theirs.is_switched)
    assert contents(again) == contents(bank)
    assert again.end_epoch() == bank.end_epoch()


def test_the_saved_file_does_not_change_with_the_bank(tmp_path):
    bank = train(new_bank(), [1])
    before = contents(bank)
    bank.save(tmp_path / "bank.ckpt")
    train(bank, [2])
    again = new_bank()
    again.load(tmp_path / "bank.ckpt")
    assert contents(again) == before


# Two ranks

VISITS = {  # per scenario and rank: batches of one epoch
    "disjoint": [[(3, 1, 4), (0,)], [(5, 9), (2, 6)]],
    "overlapping": [[(3, 1)], [(1, 7), (3, 2)]],
    "one rank idle": [[], [(0, 1, 2)]],
}


def rank_worker(rank, folder, world_size=2):
    """Run all scenarios on one rank and write what became of them."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    outcome = {}
    for name, visits in VISITS.items():
        bank = new_bank(max_drop_rate=1.0)  # the cap is each rank's own: it would differ from one process
        for epoch in (1, 2):
            bank.start_epoch(epoch)
            for number, rows in enumerate(visits[rank]):
                bank.update(*random_visits(rows, seed=100 * epoch + 10 * rank + number))
            own = EpochCounts(**asdict(bank.counts))
            summed = bank.end_epoch()
        outcome[name] = {"own": own, "summed": summed, "contents": contents(bank)}
        if rank == 0:
            bank.save(f"{folder}/{name}.ckpt")
        torch.distributed.barrier()
        again = new_bank()
        again.load(f"{folder}/{name}.ckpt")
        outcome[name]["loaded counts"] = again.counts
        outcome[name]["loaded contents"] = contents(again)

    # A visit that leaves no trace on the lowest rank must not hide the one that does.
    bank = new_bank()
    bank.start_epoch(1)
    metric = torch.tensor([float("nan") if rank == 0 else 4.0])
    bank.update(torch.tensor([6]), torch.tensor([[1, 2, 0]]), metric)
    bank.end_epoch()
    outcome["uncounted on rank 0"] = contents(bank)

    # The middle of an epoch: synchronize, save, go on; then the cap is each rank's own.
    bank = new_bank(max_drop_rate=0.4, patience=0)
    outcome["quota"] = [bank.quota]
    bank.start_epoch(1)
    rows = torch.arange(5) + 5 * rank
    bank.update(rows, torch.tensor([[0, 1, 2]] * 5), torch.full((5,), 8.0))
    bank.end_epoch()
    bank.start_epoch(2)
    bank.update(rows[: 1 + rank], torch.tensor([[1, 2, 0]] * (1 + rank)), torch.full((1 + rank,), 1.0))
    bank.synchronize()
    outcome["quota"].append(bank.quota)
    if rank == 0:
        bank.save(f"{folder}/middle.ckpt")
    torch.distributed.barrier()
    again = new_bank(max_drop_rate=0.4, patience=0)
    again.load(f"{folder}/middle.ckpt")
    outcome["quota"].append(again.quota)
    outcome["middle counts"] = again.counts

    # Saving before any merge must work, or say what is missing.
    try:
        new_bank().save(f"{folder}/rank{rank}.ckpt")
        outcome["save without merge"] = "saved"
    except Exception as error:
        outcome["save without merge"] = f"{type(error).__name__}: {error}"

    single = new_bank()
    single.load(f"{folder}/single.ckpt")
    outcome["from one rank"] = single.counts
    with open(f"{folder}/rank{rank}.pickle", "wb") as file:
        pickle.dump(outcome, file)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    train(new_bank(), [1, 2]).save(folder / "single.ckpt")
    torch.multiprocessing.spawn(rank_worker, (str(folder),), nprocs=2)
    outcomes = []
    for rank in range(2):
        with open(folder / f"rank{rank}.pickle", "rb") as file:
            outcomes.append(pickle.load(file))
    return folder, outcomes


def in_one_process(name):
    """The same visits in one process: of a row that both ranks visit, the lowest rank's visits alone."""
    taken = set()
    bank = new_bank(max_drop_rate=1.0)
    for rank in range(2):
        alone = new_bank(max_drop_rate=1.0)
        for epoch in (1, 2):
            alone.start_epoch(epoch)
            for number, rows in enumerate(VISITS[name][rank]):
                alone.update(*random_visits(rows, seed=100 * epoch + 10 * rank + number))
        rows = sorted({row for batch in VISITS[name][rank] for row in batch} - taken)
        taken |= set(rows)
        for field in fields(Entries):
            getattr(bank._entries, field.name)[rows] = getattr(alone._entries, field.name)[rows]
    return bank


@pytest.mark.parametrize("name", ["disjoint", "one rank idle"])
def test_disjoint_rows_merge_as_if_one_process_had_seen_them(ranks, name):
    _, outcomes = ranks
    expected = new_bank(max_drop_rate=1.0)
    for epoch in (1, 2):
        expected.start_epoch(epoch)
        for rank in range(2):
            for number, rows in enumerate(VISITS[name][rank]):
                expected.update(*random_visits(rows, seed=100 * epoch + 10 * rank + number))
    for outcome in outcomes:
        assert outcome[name]["contents"] == contents(expected)
        assert outcome[name]["summed"] == expected.end_epoch()


def test_of_overlapping_rows_the_lowest_rank_stands(ranks):
    _, outcomes = ranks
    assert outcomes[0]["overlapping"]["contents"] == outcomes[1]["overlapping"]["contents"]
    # After epoch 1 both ranks go on from the merged entry, so compare what the first merge decides.
    merged = outcomes[0]["overlapping"]["contents"]
    expected = contents(in_one_process("overlapping"))
    for row in (1, 3):  # rank 0 went on from its own entries: its history is unbroken
        assert {name: column[row] for name, column in merged.items()} == {
            name: column[row] for name, column in expected.items()
        }
    for row in (7, 2):
        assert merged["num_visits"][row] > 0


def test_counts_are_summed_and_saved(ranks):
    folder, outcomes = ranks
    for name in VISITS:
        total = {
            field.name: sum(getattr(outcome[name]["own"], field.name) for outcome in outcomes)
            for field in fields(EpochCounts)
        }
        assert total["visits"] > 0
        for outcome in outcomes:
            assert asdict(outcome[name]["summed"]) == total
            assert outcome[name]["loaded counts"] == outcome[name]["own"]  # each rank its own again
            assert outcome[name]["loaded contents"] == outcomes[0][name]["contents"]
        bank = new_bank()
        bank.load(f"{folder}/{name}.ckpt")  # one rank instead of two
        assert asdict(bank.counts) == total
        assert contents(bank) == outcomes[0][name]["contents"]


def test_two_ranks_take_over_the_counts_of_one(ranks):
    folder, outcomes = ranks
    bank = new_bank()
    bank.load(folder / "single.ckpt")
    assert bank.counts.visits == 10
    assert outcomes[0]["from one rank"] == bank.counts
    assert outcomes[1]["from one rank"] == EpochCounts()


def test_an_uncounted_visit_leaves_no_trace_in_the_merge(ranks):
    _, outcomes = ranks
    for outcome in outcomes:
        assert outcome["uncounted on rank 0"]["num_visits"][6] == 1
        assert outcome["uncounted on rank 0"]["best_metric"][6] == 4.0
        assert outcome["uncounted on rank 0"]["best_perm"][6] == [1, 2, 0]


def test_the_cap_is_per_rank_and_survives_a_resume(ranks):
    _, outcomes = ranks
    for rank, outcome in enumerate(outcomes):
        assert outcome["quota"] == [2, 1 - rank, 1 - rank]  # floor(0.4 * 5) each; rank 0 used 1, rank 1 both
        assert outcome["middle counts"].dropped_samples == 1 + rank


def test_saving_before_any_merge_does_not_fail_obscurely(ranks):
    _, outcomes = ranks
    for outcome in outcomes:
        assert outcome["save without merge"] == "saved" or "synchronize" in outcome["save without merge"]


# Memory


def test_ten_million_samples_take_less_than_a_gigabyte():
    bank = AssignmentMemoryBank(num_spks=3)
    bank._allocate(torch.arange(10_000_000))
    tensors = [value for owner in (bank, bank._entries) for value in vars(owner).values() if torch.is_tensor(value)]
    assert len(bank) == 10_000_000
    assert len(tensors) == 8
    assert sum(tensor.nbytes for tensor in tensors) < 1e9 / 2


PEAK = """
import sys
import torch
from dsd_modules.memory_bank import AssignmentMemoryBank

class Ids:  # a manifest on disk: no id is kept in memory
    def __len__(self): return int(sys.argv[1])
    def __getitem__(self, row):
        if row >= len(self): raise IndexError
        return f"1089-134686-{row:08d}_121-127105-{row:08d}"

bank = AssignmentMemoryBank(2)
bank.set_samples(["a"])
bank = AssignmentMemoryBank(2)
before = peak_bytes()
bank.set_samples(Ids())
print(peak_bytes() - before)
"""


def test_set_samples_peaks_below_a_gigabyte_for_ten_million():
    command = [sys.executable, "-c", PEAK_BYTES + PEAK, "1000000"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 10 * peak < 1e9
