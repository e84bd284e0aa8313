"""Two ranks (gloo, on a CPU) train, count, evaluate and resume as one process does on the union of their batches."""

import csv
import math
import subprocess
import sys

import pytest
import torch
from conftest import HPARAMS, REPOSITORY, TINY, arguments, write_librimix, write_manifests

from dsd_modules.report import read_history

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# 27 mixtures leave the last step of an epoch with 3, and random crops make a young model change its mind.
COMPARED = {
    **TINY,
    "number_of_epochs": 5,
    "lr": 0.0001,
    "segment_seconds": 0.05,
    "dsd_start_epoch": 1,
    "probe_size": 7,
    "eval_batch_size": 2,
}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    sizes = {"train-360": 27, "dev": 5, "test": 7}
    return write_librimix(tmp_path_factory.mktemp("ranks") / "Libri2Mix", sizes, seed=5)


def run(folder, num_ranks, script="ranks_run.py", returncode=0, **overrides):
    """A run of the recipe in ``folder / "run"``; what its ranks leave."""
    folder.mkdir(exist_ok=True)
    launcher = TORCHRUN if num_ranks == 2 else [sys.executable]
    script = script if isinstance(script, list) else [script]
    command = [*launcher, str(REPOSITORY / "tests" / script[0]), *script[1:], str(HPARAMS)]
    command += arguments({**COMPARED, "output_folder": folder / "run", **overrides})
    result = subprocess.run(command, capture_output=True, check=False, cwd=folder, timeout=600)  # nothing hangs
    if returncode == 0:
        assert result.returncode == 0, result.stderr.decode()[-3000:]
    else:
        assert result.returncode != 0
    return result


def newest(folder):
    return sorted((folder / "run" / "save").glob("CKPT*"))[-1]


def bank_of(folder):
    return torch.load(newest(folder) / "memory_bank.ckpt", weights_only=True)


def audit_of(folder):
    with open(folder / "run" / "exclusions.csv", newline="") as stream:
        return sorted(csv.DictReader(stream), key=lambda row: (int(row["epoch"]), row["id"]))


@pytest.fixture(scope="module", params=[1, 3], ids=["plain", "accumulated"])
def compared(request, mixtures, tmp_path_factory):
    """The same training by one process with batches of 4, and by two with batches of 2."""
    folder = tmp_path_factory.mktemp("compared")
    options = {"data_folder": mixtures, "grad_accumulation_factor": request.param}
    run(folder / "one", 1, batch_size=4, **options)
    run(folder / "two", 2, batch_size=2, **options)
    return folder


def test_gradients_equal_those_of_the_union_batch(compared):
    """In each step of five epochs of training, and so do the weights in the end."""
    assert_same_steps(compared)


def assert_same_steps(compared):
    (one,) = (torch.load(path) for path in (compared / "one").glob("rank*.pt"))
    ranks = [torch.load(compared / "two" / f"rank{rank}.pt") for rank in (0, 1)]
    assert len(one["steps"]) == len(ranks[0]["steps"]) >= 9
    for number, expected in enumerate(one["steps"]):
        largest = max(gradient.abs().max() for gradient in expected)
        assert largest > 0
        for gradient, first, second in zip(expected, ranks[0]["steps"][number], ranks[1]["steps"][number], strict=True):
            assert torch.equal(first, second)
            assert (gradient - first).abs().max() < 1e-5 * largest
    for name, weights in ranks[0]["weights"].items():
        for key, weight in weights.items():
            assert torch.equal(weight, ranks[1]["weights"][name][key])
            assert torch.allclose(weight, one["weights"][name][key], atol=1e-7)
    initial, trained = one["initial"]["encoder"]["conv1d.weight"], one["weights"]["encoder"]["conv1d.weight"]
    assert (trained - initial).abs().max() > 1e-4


def test_dynamic_mixtures_and_augmentation_are_the_same_on_two_ranks(mixtures, tmp_path):
    options = {"dynamic_mixing": True, "dsd_mode": "none", "speed_perturb": True, "wave_drop": True, "ema_decay": 0.9}
    options |= {"number_of_epochs": 2, **write_manifests(tmp_path, mixtures)}
    run(tmp_path / "one", 1, batch_size=4, **options)
    run(tmp_path / "two", 2, batch_size=2, **options)
    assert_same_steps(tmp_path)
    averages = [
        torch.load(newest(tmp_path / name) / "weight_average.ckpt", weights_only=True) for name in ("one", "two")
    ]
    for key, value in averages[0].items():
        assert torch.allclose(value.double(), averages[1][key].double(), atol=1e-7), key


def test_samples_were_dropped_unevenly(compared):
    """Otherwise the test above would show less than it says."""
    counts = read_history(compared / "two" / "run" / "history.csv")
    assert sum(row["all_dropped_batches"] for row in counts) > 0
    assert sum(row["dropped_samples"] for row in counts) > 5


def test_bank_counts_and_audit_equal_those_of_one_process(compared):
    one, two = bank_of(compared / "one"), bank_of(compared / "two")
    for name in ("best_perm", "last_perm", "num_visits", "num_exclusions", "exclusion_run", "digests"):
        assert torch.equal(one[name], two[name]), name
    assert torch.allclose(one["best_metric"], two["best_metric"], atol=1e-4)
    assert one["num_visits"].tolist() == [5] * 27
    assert torch.equal(one["rank_counts"].sum(0)[:-1], two["rank_counts"].sum(0)[:-1])  # but for all_dropped_batches

    names = ("label_switches", "label_switch_rate", "dropped_samples", "uncounted_samples", "probe_label_switches")
    histories = [read_history(compared / name / "run" / "history.csv") for name in ("one", "two")]
    for first, second in zip(*histories, strict=True):
        for name in names:
            assert first[name] == second[name], name
        for name in ("train_loss", "train_si_sdri", "margin_median", "valid_loss", "valid_si_sdri"):
            assert first[name] == pytest.approx(second[name], abs=1e-5), name
    assert (compared / "two" / "run" / "train_log.txt").read_text().count("epoch:") == 5  # written by one rank
    rows = [audit_of(compared / name) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) > 5
    for first, second in zip(*rows, strict=True):
        for column in ("epoch", "id", "action", "stored_assignment", "assignment"):
            assert first[column] == second[column]
        assert float(first["metric"]) == pytest.approx(float(second["metric"]), abs=2e-4)


def test_the_test_does_not_depend_on_the_number_of_ranks(compared, mixtures):
    """The same checkpoint, scored by one process and by two: the same bytes."""
    folder = compared / "one"
    options = {"data_folder": mixtures, "batch_size": 4, "test_only": None, "test_metrics": "[stoi]"}
    tables = []
    for num_ranks in (1, 2):
        (folder / "run" / "test_results.csv").unlink()
        run(folder, num_ranks, **options)
        tables.append((folder / "run" / "test_results.csv").read_bytes())
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + 7 + 1
    assert b"stoi_mix" in tables[0]


def test_sets_smaller_than_the_number_of_ranks(tmp_path):
    """One mixture to train on, to validate and to test: the second rank joins each step without weight."""
    data_folder = write_librimix(tmp_path / "Libri2Mix", {"train-360": 1, "dev": 1, "test": 1})
    options = {"data_folder": data_folder, "grad_accumulation_factor": 3, "probe_size": 0, "number_of_epochs": 2}
    run(tmp_path, 2, **options)
    assert bank_of(tmp_path)["num_visits"].tolist() == [2]
    history = read_history(tmp_path / "run" / "history.csv")
    assert all(math.isfinite(row["train_loss"]) and math.isfinite(row["valid_loss"]) for row in history)
    assert len((tmp_path / "run" / "test_results.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_resume_inside_an_epoch_with_another_number_of_ranks(before, after, mixtures, tmp_path):
    """A kill in the second epoch: each mixture is visited once in it all the same, and the records are whole."""
    options = {"data_folder": mixtures, "batch_size": 2, "ckpt_interval_minutes": 0, "ckpt_interval_steps": 2}
    options.update(number_of_epochs=2, grad_accumulation_factor=1, lr=0.001)
    steps_per_epoch = -(-27 // (2 * before))
    moment = steps_per_epoch + 3 + 4  # the batches of an epoch, of its validation (by one process), and of the next
    run(tmp_path, before, ["killed_run.py", "step", str(moment)], returncode=1, **options)
    assert 0 < bank_of(tmp_path)["num_visits"].sum() - 27 < 27
    run(tmp_path, after, ["killed_run.py", "never", "0"], **options)
    assert bank_of(tmp_path)["num_visits"].tolist() == [2] * 27
    history = read_history(tmp_path / "run" / "history.csv")
    assert [row["epoch"] for row in history] == [1, 2]
    visited = bank_of(tmp_path)["rank_counts"].sum(0)[0]
    assert visited == 27  # in the last epoch
