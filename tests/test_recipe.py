"""The real recipe, tiny: it learns, counts, survives kills, and equals what it should."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HPARAMS, REPOSITORY, TINY, arguments, write_manifests
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsd_modules.data.generate import generate_synthetic
from dsd_modules.report import read_history

MODULES = ("encoder", "masknet", "decoder")


def newest(output_folder):
    return sorted(Path(output_folder, "save").glob("CKPT*"))[-1]


def weights(output_folder):
    """All weights of the newest checkpoint."""
    state = {}
    for name in MODULES:
        saved = torch.load(newest(output_folder) / f"{name}.ckpt", weights_only=True)
        state.update({f"{name}.{key}": value for key, value in saved.items()})
    return state


def scalars(output_folder):
    """Every TensorBoard scalar as {tag: [(step, value)]}, and the steps of everything else."""
    events = EventAccumulator(str(Path(output_folder, "tensorboard")), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for kind, read in (("histograms", events.Histograms), ("images", events.Images), ("audio", events.Audio)):
        found.update({tag: [e.step for e in read(tag)] for tag in events.Tags()[kind]})
    return found


def assert_same_run(one, other):
    """Equal weights, optimizer, bank, and records."""
    expected, actual = weights(one), weights(other)
    assert expected.keys() == actual.keys()
    for key in expected:
        assert torch.equal(expected[key], actual[key]), key
    for name in ("memory_bank", "probe_bank", "weight_average"):
        expected, actual = (torch.load(newest(run) / f"{name}.ckpt", weights_only=True) for run in (one, other))
        for key in expected:
            assert np.array_equal(expected[key], actual[key]), (name, key)
    for name in ("train_log.txt", "exclusions.csv", "test_results.csv"):
        assert Path(one, name).read_text() == Path(other, name).read_text(), name
    histories = [read_history(Path(run, "history.csv")) for run in (one, other)]
    for expected, actual in zip(*histories, strict=True):
        expected, actual = ({k: v for k, v in row.items() if k != "seconds"} for row in (expected, actual))
        assert expected == pytest.approx(actual, nan_ok=True, abs=0)
    assert scalars(one) == scalars(other)


@pytest.fixture(scope="module")
def whole_run(librimix, recipe, tmp_path_factory):
    """Four epochs with everything on, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    hook = sys.excepthook
    recipe.main([str(HPARAMS), *arguments({**KILLED, "data_folder": librimix, "output_folder": folder})])
    sys.excepthook = hook
    return folder


# Random crops, accumulated gradients and checkpoints inside the epoch: all that a resume could get wrong.
KILLED = {
    **TINY,
    "number_of_epochs": 4,
    "segment_seconds": 0.1,
    "grad_accumulation_factor": 2,
    "batch_size": 2,
    "ckpt_interval_minutes": 0,
    "ckpt_interval_steps": 3,
    "lr_schedule": "linear",
    "dsd_patience": 2,
    "dropout": 0.1,
    "examples_interval": 2,
}


def test_the_loss_falls_and_switches_are_counted(whole_run):
    history = read_history(whole_run / "history.csv")
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 1
    assert history[-1]["valid_loss"] < history[0]["valid_loss"] - 1
    assert history[0]["label_switches"] == 0  # nothing to compare with yet
    assert sum(row["label_switches"] for row in history) > 0
    assert history[0]["dropped_samples"] == 0
    assert sum(row["dropped_samples"] for row in history) > 0
    for row in history:
        assert row["label_switch_rate"] == (row["label_switches"] / 24 if row["epoch"] > 1 else 0)


def test_the_audit_has_a_row_for_each_exclusion(whole_run):
    history = read_history(whole_run / "history.csv")
    with open(whole_run / "exclusions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = ["epoch", "id", "action", "stored_assignment", "assignment", "stored_metric", "metric"]
    assert list(rows[0]) == columns
    for epoch in history:
        in_epoch = [row for row in rows if int(row["epoch"]) == epoch["epoch"]]
        assert len(in_epoch) == epoch["dropped_samples"]
    for row in rows:
        assert row["action"] == "drop"
        assert row["id"].startswith("train-360_")
        assert row["assignment"] != row["stored_assignment"]
        assert float(row["metric"]) <= float(row["stored_metric"])


def test_tensorboard_holds_the_numbers_of_the_log(whole_run):
    events, history = scalars(whole_run), read_history(whole_run / "history.csv")
    for tag in (
        "label_switches",
        "label_switch_rate",
        "dropped_samples",
        "reordered_samples",
        "probe_label_switches",
        "lr",
        "loss/train",
        "loss_block1/train",
        "loss/valid",
        "si_sdr/train",
        "si_sdri/valid",
        "si_sdri_block1/train",
        "si_sdri_block2/valid",
        "layer_decoupling_block1/train",
    ):
        assert [step for step, _ in events[tag]] == [1, 2, 3, 4], tag
    for row in history:
        assert events["si_sdri/valid"][row["epoch"] - 1][1] == pytest.approx(row["valid_si_sdri"], abs=1e-4)
        assert events["label_switches"][row["epoch"] - 1][1] == row["label_switches"]
    accumulator = EventAccumulator(str(whole_run / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert "assignment_margin_db" in tags["histograms"]
    assert "example_1/spectrograms" in tags["images"]
    assert {"example_1/mixture", "example_1/reference_1", "example_3/estimate_2"} <= set(tags["audio"])
    log = (whole_run / "train_log.txt").read_text()
    assert log.count(" label_switches: ") == 4
    assert "layer_decoupling_block1" in log


def test_a_run_leaves_results_report_examples_and_model(whole_run):
    with open(whole_run / "test_results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == [f"test_{i:03d}" for i in range(5)] + ["mean"]
    for column in ("si_sdr", "si_sdri", "sdr", "sdri", "si_sdr_spk1", "sdri_spk2", "si_sdri_block1", "si_sdri_block2"):
        mean = np.mean([float(row[column]) for row in rows[:-1]])
        assert float(rows[-1][column]) == pytest.approx(mean, abs=1e-3)
    assert (whole_run / "report.png").stat().st_size > 10_000
    assert {path.name for path in (whole_run / "exported").iterdir()} == {
        "README.md",
        "hyperparams.yaml",
        *(f"{name}.ckpt" for name in MODULES),
    }
    card = (whole_run / "exported" / "README.md").read_text()
    assert f"| test set | 5 | {float(rows[-1]['si_sdri']):.2f} |" in card
    assert len(list((whole_run / "examples").glob("*.wav"))) == 5


def kill_and_resume(moment, number, options, folder):
    """Kill a run at a moment, and give the same command again."""
    command = arguments({**options, "output_folder": folder})
    script = [sys.executable, str(REPOSITORY / "tests" / "killed_run.py")]
    for how, returncode in ((moment, -9), ("never", 0)):
        run = subprocess.run([*script, how, str(number), str(HPARAMS), *command], capture_output=True, check=False)
        assert run.returncode == returncode, run.stderr.decode()[-2000:]
    names = {path.name for path in (folder / "save").iterdir()}
    assert all(name.startswith("CKPT+") for name in names), names


# 24 mixtures in batches of 2: 12 batches and 3 checkpoints within each epoch, and one at its end.
@pytest.mark.parametrize(
    ("moment", "number"), [("step", 2), ("step", 21), ("save", 2), ("save", 5), ("delete", 3), ("log", 2)]
)
def test_a_killed_run_goes_on_to_the_same_result(moment, number, whole_run, librimix, tmp_path):
    kill_and_resume(moment, number, {**KILLED, "data_folder": librimix}, tmp_path / "run")
    assert_same_run(whole_run, tmp_path / "run")


def test_a_killed_run_keeps_its_schedule_cap_and_workers(run_recipe, librimix, tmp_path):
    """The plateau schedule halves the rate; reordering has a cap that part of an epoch has used; readers work."""
    options = {
        **KILLED,
        "data_folder": librimix,
        "lr_schedule": "plateau",
        "lr": 0.02,
        "lr_patience": 0,
        "lr_hold_epochs": 0,
        "dsd_mode": "reorder",
        "dsd_max_drop_rate": 0.1,
        "dsd_patience": 0,
        "segment_seconds": 0.05,
        "number_of_epochs": 6,
    }
    run_recipe(**{**options, "output_folder": tmp_path / "whole"})
    history = read_history(tmp_path / "whole" / "history.csv")
    assert len({row["lr"] for row in history}) > 1
    assert max(row["reordered_samples"] for row in history) == 2
    kill_and_resume("step", 58, {**options, "num_workers": 2}, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_killed_run_with_new_mixtures_in_each_epoch_goes_on_to_the_same_result(run_recipe, librimix, tmp_path):
    """Dynamic mixing, speeds, drops, dropout and the average of the weights."""
    options = {**KILLED, **write_manifests(tmp_path, librimix), "dynamic_mixing": True, "dsd_mode": "none"}
    options |= {"speed_perturb": True, "wave_drop": True, "ema_decay": 0.9, "segment_seconds": 0.2}
    run_recipe(**{**options, "output_folder": tmp_path / "whole"})
    kill_and_resume("step", 21, options, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_best_checkpoint_is_evaluated_and_exported(recipe, run_recipe, librimix, tmp_path, monkeypatch):
    """The second epoch's weights are spoilt."""

    def spoil(brain, batch, should_step):
        if brain.hparams.epoch_counter.current == 2:
            for parameter in brain.modules.parameters():
                torch.nn.init.normal_(parameter)

    monkeypatch.setattr(recipe.Separation, "on_fit_batch_start", spoil)
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", lr_schedule="plateau")
    history = read_history(tmp_path / "run" / "history.csv")
    assert history[1]["valid_si_sdri"] < history[0]["valid_si_sdri"]
    best, last = sorted(Path(tmp_path, "run", "save").glob("CKPT*"))
    exported, of_best, of_last = (
        torch.load(folder / "encoder.ckpt", weights_only=True)["conv1d.weight"]
        for folder in (tmp_path / "run" / "exported", best, last)
    )
    assert torch.equal(exported, of_best)
    assert not torch.equal(exported, of_last)


def read_mean(output_folder):
    with open(Path(output_folder, "test_results.csv"), newline="") as stream:
        return list(csv.DictReader(stream))[-1]


@pytest.mark.parametrize(
    "overrides",
    [
        {"dsd_mode": "reorder", "layer_permutation": "independent", "layer_weights": "ramp"},
        {"dsd_mode": "none", "layerwise": False, "probe_size": 0, "examples_interval": 0},
        {"num_blocks": 1, "segment": "fixed", "segment_seconds": 0.3, "dsd_metric": "si_sdri", "dsd_margin_db": 1},
        {"precision": "bf16", "dsd_max_drop_rate": 0.1, "dsd_start_epoch": 1, "batch_size": 7},
    ],
)
def test_every_option_trains(run_recipe, librimix, tmp_path, overrides):
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", **overrides)
    history = read_history(tmp_path / "run" / "history.csv")
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert np.isfinite(float(read_mean(tmp_path / "run")["si_sdri"]))


def test_three_speakers(run_recipe, librimix3, tmp_path):
    run_recipe(data_folder=librimix3, output_folder=tmp_path / "run", num_spks=3)
    history = read_history(tmp_path / "run" / "history.csv")
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert "sdri_spk3" in read_mean(tmp_path / "run")
    assert len(list((tmp_path / "run" / "examples").glob("*_spk?.wav"))) == 3


def test_plain_pit_counts_its_switches_but_excludes_nothing(run_recipe, librimix, tmp_path):
    quick = {"dsd_mode": "none", "layerwise": False, "segment_seconds": 0.1, "number_of_epochs": 3}
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", **quick)
    history = read_history(tmp_path / "run" / "history.csv")
    assert sum(row["label_switches"] for row in history) > 0
    assert sum(row["dropped_samples"] + row["reordered_samples"] for row in history) == 0
    assert len((tmp_path / "run" / "exclusions.csv").read_text().splitlines()) == 1


def test_fine_tuning_starts_from_an_exported_model(whole_run, run_recipe, librimix, tmp_path):
    """A learning rate of almost zero keeps what the exported model can do."""
    run_recipe(
        data_folder=librimix,
        output_folder=tmp_path / "run",
        pretrained_folder=whole_run / "exported",
        number_of_epochs=1,
        lr=1e-12,
    )
    assert float(read_mean(tmp_path / "run")["si_sdr"]) == pytest.approx(
        float(read_mean(whole_run)["si_sdr"]), abs=0.01
    )


def test_training_on_a_users_own_manifests(run_recipe, librimix, tmp_path):
    """Ids and relative paths in a csv of the user's own, with other columns and in any order."""
    subsets = {"train": "train-360", "valid": "dev", "test": "test"}
    for name, subset in subsets.items():
        with open(librimix / f"{name}.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["note", "s2_path", "s1_path", "mix_path", "id"])
            for path in sorted((librimix / "wav8k/min" / subset / "mix_clean").iterdir(), reverse=True):
                paths = [path.parent.parent.relative_to(librimix) / signal / path.name for signal in ("s2", "s1")]
                writer.writerow(["x", *paths, path.relative_to(librimix), f"mine, {path.stem}"])
    manifests = {f"{name}_manifest": librimix / f"{name}.csv" for name in subsets}
    run_recipe(output_folder=tmp_path / "run", number_of_epochs=1, **manifests)
    with open(tmp_path / "run" / "test_results.csv", newline="") as stream:
        assert [row["id"] for row in csv.DictReader(stream)][:2] == ["mine, test_000", "mine, test_001"]


def test_the_embedded_data_are_made_once_and_reused(recipe, run_recipe, tmp_path, monkeypatch, capfd):
    """No --data_folder: synthetic voices, mixed into a LibriMix folder, take the same path as a user's."""
    quick = {"synthetic_folder": tmp_path / "data", "synthetic_sizes": "[6, 2, 2]", "segment_seconds": 0.5}
    run_recipe(output_folder=tmp_path / "one", number_of_epochs=1, **quick)
    (dataset,) = (tmp_path / "data").glob("synthetic-*/Libri2Mix")
    assert len(list((dataset / "wav8k/min/train-360/mix_clean").glob("*.wav"))) == 6
    made = dataset.stat().st_mtime_ns
    capfd.readouterr()
    run_recipe(output_folder=tmp_path / "two", number_of_epochs=1, **quick)
    assert dataset.stat().st_mtime_ns == made
    assert "Synthesising" not in capfd.readouterr().err
    assert weights(tmp_path / "one").keys() == weights(tmp_path / "two").keys()
    for key, weight in weights(tmp_path / "one").items():
        assert torch.equal(weight, weights(tmp_path / "two")[key])  # the seed decides everything


def test_train_py_is_short_and_leaves_fit_batch_alone(recipe):
    assert len((REPOSITORY / "recipes/LibriMix/separation/train.py").read_text().splitlines()) < 200
    import speechbrain as sb

    assert recipe.Separation.fit_batch is sb.Brain.fit_batch


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        ({"sample_rate": 16000, "kernel_size": 32}, {"sample_rate": 16000}),
        ({"mode": "max", "task": "mix_both"}, {"mode": "max", "noise": True}),
    ],
)
def test_other_librimix_layouts(run_recipe, tmp_path, overrides, data):
    data_folder = generate_synthetic(
        tmp_path / "data", sets={"train-360": 6, "dev": 2, "test": 2}, max_seconds=0.6, progressbar=False, **data
    )
    run_recipe(data_folder=data_folder, output_folder=tmp_path / "run", number_of_epochs=1, **overrides)
    assert np.isfinite(float(read_mean(tmp_path / "run")["si_sdri"]))
