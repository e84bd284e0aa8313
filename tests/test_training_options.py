"""Precision, accumulation, compile, averaging, checkpointing and augmentation work with DSD and LO."""

import csv
import functools
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_manifests

from dsd_modules import averaging
from dsd_modules.evaluation import read_results
from dsd_modules.report import read_history


def newest(run):
    return sorted(Path(run, "save").glob("CKPT*"))[-1]


def si_sdri(run):
    return read_results(Path(run) / "test_results.csv")[1]["si_sdri"]


def test_averaged_weights_are_validated_and_exported(run_recipe, librimix, tmp_path):
    """With a decay of almost one the average stays at the first step's weights."""
    options = {"data_folder": librimix, "lr": 0.01, "number_of_epochs": 3}
    run_recipe(output_folder=tmp_path / "average", ema_decay=0.9999999, **options)
    history = read_history(tmp_path / "average" / "history.csv")
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.5
    assert history[-1]["valid_loss"] == pytest.approx(history[0]["valid_loss"], abs=0.02)
    saved = torch.load(newest(tmp_path / "average") / "weight_average.ckpt", weights_only=True)
    exported = torch.load(tmp_path / "average" / "exported" / "encoder.ckpt", weights_only=True)
    trained = torch.load(newest(tmp_path / "average") / "encoder.ckpt", weights_only=True)
    assert torch.equal(exported["conv1d.weight"], saved["module.encoder.conv1d.weight"])
    assert not torch.allclose(exported["conv1d.weight"], trained["conv1d.weight"], atol=1e-4)

    run_recipe(output_folder=tmp_path / "plain", **options)
    assert read_history(tmp_path / "plain" / "history.csv")[-1]["train_loss"] == history[-1]["train_loss"]
    assert si_sdri(tmp_path / "plain") != si_sdri(tmp_path / "average")


def test_a_test_alone_repeats_the_scores_at_any_block(run_recipe, librimix, tmp_path):
    options = {"data_folder": librimix, "output_folder": tmp_path / "run", "ema_decay": 0.5}
    run_recipe(**options)
    first = (tmp_path / "run" / "test_results.csv").read_bytes()
    log = (tmp_path / "run" / "train_log.txt").read_bytes()
    (tmp_path / "run" / "test_results.csv").unlink()
    run_recipe(**options, test_only=None)
    assert (tmp_path / "run" / "test_results.csv").read_bytes() == first
    run_recipe(**options, test_only=None, test_block=1)
    assert (tmp_path / "run" / "test_results.csv").read_bytes() == first
    assert (tmp_path / "run" / "train_log.txt").read_bytes() == log  # nothing was trained
    rows, _ = read_results(tmp_path / "run" / "test_results.csv")
    of_block, _ = read_results(tmp_path / "run" / "test_results_block1.csv")
    for name, row in rows.items():
        assert of_block[name]["si_sdri"] == row["si_sdri_block1"]
    with pytest.raises(SystemExit, match=r"--ema_decay is 0.0, but the run in .* had 0.5"):
        run_recipe(**{**options, "ema_decay": 0.0}, test_only=None)


def test_a_test_alone_moves_the_average_to_the_device(recipe, run_recipe, librimix, tmp_path, monkeypatch):
    options = {"data_folder": librimix, "output_folder": tmp_path / "run", "number_of_epochs": 1, "ema_decay": 0.5}
    run_recipe(**options)
    moved = []
    monkeypatch.setattr(averaging.WeightAverage, "to", lambda average, device: moved.append(str(device)))
    run_recipe(**options, test_only=None)
    assert moved == ["cpu"]


def test_pesq_and_stoi_stand_in_the_table(recipe, run_recipe, librimix, tmp_path, monkeypatch):
    """Of tones PESQ finds no speech: its cells are empty. Each mixture's scores are its own."""
    metrics = ["stoi"] if importlib.util.find_spec("pesq") is None else ["pesq", "stoi"]
    options = {"data_folder": librimix, "output_folder": tmp_path / "run", "number_of_epochs": 1}
    run_recipe(**options, test_metrics=f"[{', '.join(metrics)}]")
    rows, mean = read_results(tmp_path / "run" / "test_results.csv")
    for metric in metrics:
        assert f"{metric}_spk2" in mean
        assert f"{metric}_mix" in mean
    assert 0 < mean["stoi"] <= 1
    assert len({row["stoi"] for row in rows.values()}) == len(rows)
    assert all(row["overlap"] == pytest.approx(1, abs=0.01) for row in rows.values())
    with open(tmp_path / "run" / "test_groups.csv", newline="") as stream:
        (group,) = csv.DictReader(stream)
    assert (group["kind"], group["group"], group["num_mixtures"]) == ("overlap", "75-100 %", "5")
    monkeypatch.setitem(sys.modules, "pystoi", None)
    monkeypatch.setattr(recipe, "prepare_data", lambda options: pytest.fail("went on without the package"))
    with pytest.raises(SystemExit, match="--test_metrics stoi needs the package pystoi: pip install pystoi"):
        run_recipe(**options, test_metrics="[stoi]")


def test_a_test_alone_needs_a_trained_model(recipe, run_recipe, librimix, tmp_path):
    with pytest.raises(SystemExit, match=r"--test_only needs a trained model, but .* holds no checkpoint"):
        run_recipe(data_folder=librimix, output_folder=tmp_path / "run", test_only=None)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="--test_block can only be 1 to 2, but got 3"):
        run_recipe(data_folder=librimix, output_folder=tmp_path / "run", test_block=3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"precision": "bf16", "grad_accumulation_factor": 2, "batch_size": 2, "activation_checkpointing": True},
        {"speed_perturb": True, "wave_drop": True, "segment_seconds": 0.3},
        {"speed_perturb": True, "speeds": "[90, 110]"},
        {"ema_decay": 0.9, "precision": "bf16"},
    ],
)
def test_options_train_with_dsd_and_lo(run_recipe, librimix, tmp_path, overrides):
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", number_of_epochs=3, **overrides)
    history = read_history(tmp_path / "run" / "history.csv")
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["train_loss_block1"] < history[0]["train_loss_block1"]
    assert sum(row["label_switches"] for row in history) > 0
    assert np.isfinite(si_sdri(tmp_path / "run"))


def test_the_metric_is_computed_in_fp32(recipe, run_recipe, librimix, tmp_path, monkeypatch):
    """Under bf16 autocast the estimates may be bf16; the pairwise matrix never is."""
    seen = []
    measure = recipe.Separation.measure

    def measure_and_look(brain, batch, pit):
        seen.append((pit.loss_matrix.dtype, torch.is_autocast_enabled("cpu")))
        return measure(brain, batch, pit)

    monkeypatch.setattr(recipe.Separation, "measure", measure_and_look)
    options = {"precision": "bf16", "number_of_epochs": 1, "test_at_end": False}
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", **options)
    assert (torch.float32, True) in seen
    assert {dtype for dtype, _ in seen} == {torch.float32}


def test_accumulated_batches_are_one_step(run_recipe, librimix, tmp_path):
    """Batches of 2, two to a step, train what batches of 4 do, also in an epoch whose last step is short."""
    options = {"data_folder": librimix, "lr": 0.01, "number_of_epochs": 2, "lr_schedule": "linear"}
    run_recipe(output_folder=tmp_path / "one", **{**options, "batch_size": 10})
    run_recipe(output_folder=tmp_path / "two", **{**options, "batch_size": 5, "grad_accumulation_factor": 2})
    weights = [torch.load(newest(tmp_path / run) / "masknet.ckpt", weights_only=True) for run in ("one", "two")]
    for key, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][key], atol=2e-3), key
    for first, second in zip(*(read_history(tmp_path / run / "history.csv") for run in ("one", "two")), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], abs=1e-3)
        assert first["lr"] == second["lr"]


def test_compiled_modules_train(run_recipe, librimix, tmp_path, monkeypatch):
    """``--compile`` goes through Brain; here without the C++ compiler that the default backend needs."""
    compiled = []

    def compile_eagerly(module, **kwargs):
        compiled.append(type(module).__name__)
        return functools.partial(original, backend="eager", dynamic=True)(module)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    options = {"data_folder": librimix, "number_of_epochs": 1, "segment_seconds": 0.3, "test_at_end": False}
    run_recipe(**options, output_folder=tmp_path / "compiled", compile=None)
    torch.compiler.reset()
    assert sorted(compiled) == ["Decoder", "DualPathMaskNet", "Encoder"]
    run_recipe(**options, output_folder=tmp_path / "plain")
    (first,), (second,) = (read_history(tmp_path / run / "history.csv") for run in ("compiled", "plain"))
    assert first["train_loss"] == pytest.approx(second["train_loss"], abs=0.01)
    assert first["valid_loss"] == pytest.approx(second["valid_loss"], abs=0.05)


def test_dynamic_mixing_trains_without_the_memory_bank(run_recipe, librimix, tmp_path):
    options = {"dynamic_mixing": True, "dsd_mode": "none", "segment_seconds": 0.3}
    options |= write_manifests(tmp_path, librimix)
    run_recipe(output_folder=tmp_path / "run", number_of_epochs=3, **options)
    history = read_history(tmp_path / "run" / "history.csv")
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert all(math.isnan(row["label_switch_rate"]) for row in history)  # nothing is counted: that is not 0 %
    assert all(math.isfinite(row["probe_label_switch_rate"]) for row in history)
    bank = torch.load(newest(tmp_path / "run") / "memory_bank.ckpt", weights_only=True)
    assert bank["num_visits"].sum() == 0
    probe = torch.load(newest(tmp_path / "run") / "probe_bank.ckpt", weights_only=True)
    assert probe["num_visits"].tolist() == [3] * 4
