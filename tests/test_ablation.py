"""The ablation's plan and its runner, on a few synthetic mixtures."""

import csv
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import REPOSITORY
from hyperpyyaml import load_hyperpyyaml

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from ablation import _with_exclusions, main
from ablation_plan import ARMS, MAIN_ARMS, PLAIN_PIT, REGIMES, TRAINING, Run, num_epochs, overrides, plan

from dsd_modules.options import check_options, read_options


def read(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def ablation(*arguments):
    """Run the command; no recordings are given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DSD_REALSPEECH", None)
    command = [sys.executable, str(REPOSITORY / "benchmarks/ablation.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("run", plan(REGIMES, 1), ids=lambda run: f"{run.regime}-{run.arm}")
def test_every_run_is_one_that_the_recipe_takes(run):
    text = "\n".join(f"{name}: {value}" for name, value in overrides(run, 6).items())
    _, options = read_options(REPOSITORY / "recipes/LibriMix/separation/hparams/sepformer_dsd.yaml", text)
    check_options(options)
    assert options["num_spks"] == REGIMES[run.regime].data.num_spks
    assert options["lr_schedule"] == "linear"


def test_the_arms_of_a_regime_differ_in_the_method_alone():
    method = {"dsd_mode", "dsd_metric", "dsd_margin_db", "layerwise", "layer_permutation", "soft_min_gamma_db"}
    method |= {"cascade_pit_epochs", "cascade_fixed_epochs"}
    for name in REGIMES.keys() - {"search"}:
        options = [overrides(run, 6) for run in plan([name], 1)]
        for other in options[1:]:
            differing = {key for key in other if other[key] != options[0].get(key)}
            assert differing <= method, (name, differing)


def test_the_search_is_on_plain_pit_and_chose_what_is_trained_with():
    arms = [ARMS[arm].overrides for arm in REGIMES["search"].arms]
    assert all(arm["dsd_mode"] == "none" and not arm["layerwise"] for arm in arms)
    assert any({**TRAINING, **arm} == {**TRAINING, **ARMS[PLAIN_PIT].overrides} for arm in arms)
    assert not REGIMES["search"].is_tested


def test_every_arm_of_a_seed_starts_from_the_same_weights():
    """The method has no weights of its own, so the draws are the same."""
    hparams_file = REPOSITORY / "recipes/LibriMix/separation/hparams/sepformer_dsd.yaml"
    weights = []
    for arm in (*MAIN_ARMS, *REGIMES["main"].arms):
        options = overrides(Run("main", arm, 2), 6)
        text = "\n".join(f"{name}: {value}" for name, value in options.items())
        with open(hparams_file, encoding="utf-8") as stream:
            modules = load_hyperpyyaml(stream, read_options(hparams_file, text)[0])["modules"]
        weights.append({f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()})
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_main_arms_come_first_with_every_seed():
    runs = plan(["main"], 3)
    assert Counter(run.arm for run in runs[:12]) == dict.fromkeys(MAIN_ARMS, 3)
    assert {run.seed for run in runs[12:]} == {1}


def test_a_small_set_is_visited_more_often_for_as_many_steps():
    half, small = Run("half", PLAIN_PIT, 1), Run("small_train", PLAIN_PIT, 1)
    steps = [num_epochs(run, 6) * REGIMES[run.regime].data.num_train for run in (half, small)]
    assert steps[0] == steps[1]


def test_the_command_trains_then_tests_then_reports_and_goes_on(tmp_path):
    """Two runs on four mixtures: a closed test set, then an open one, and nothing to do again."""
    output = tmp_path / "ablation"
    small = ["--regimes", "synthetic", "--output", output, "--shrink", 300, "--epochs", 1, "--jobs", 2]
    first = ablation(*small, "--dev_only")
    assert first.returncode == 0, first.stderr
    results = read(output / "results.csv")
    assert {(row["regime"], row["arm"], row["seed"], row["epoch"]) for row in results} == {
        ("synthetic", arm, "1", "1") for arm in REGIMES["synthetic"].arms
    }
    by_arm = {row["arm"]: row for row in results}
    assert by_arm[PLAIN_PIT]["valid_si_sdri_block1"]
    assert not (output / "test_scores.csv").exists()
    assert not list(output.glob("runs/*/*/*/test_results.csv"))
    assert (output / "tables.md").exists()

    second = ablation(*small)  # nothing is trained again, and the test set is opened
    assert second.returncode == 0, second.stderr
    assert read(output / "results.csv") == results
    scores = read(output / "test_scores.csv")
    assert Counter(row["arm"] for row in scores) == dict.fromkeys(REGIMES["synthetic"].arms, 4)
    assert all(len(row["speakers"].split()) == 2 for row in scores)
    assert list(output.glob("examples/*/*.wav"))

    for folder in ("runs", "data"):  # the csv files alone tell that all is done
        (output / folder).rename(tmp_path / folder)
    third = ablation(*small)
    assert third.returncode == 0, third.stderr
    assert not (output / "runs").exists()

    other = ablation(*small[:-4], "--epochs", 2)
    assert other.returncode == 2
    assert "give these settings, or another --output" in other.stderr
    assert other.stderr.startswith("error: ")


def test_a_failed_run_is_told_and_the_test_set_stays_closed(tmp_path):
    small = ["--regimes", "synthetic", "--output", tmp_path, "--shrink", 300, "--epochs", 1, "--jobs", 2]
    result = ablation(*small, "--arms", PLAIN_PIT, "--set", "num_heads=7", "--set", "num_filters=16")
    assert result.returncode == 1
    assert "failed: synthetic/plain_pit/1: error: --num_heads must divide num_filters, but got 7" in result.stderr
    assert not (tmp_path / "results.csv").exists()
    assert not (tmp_path / "test_scores.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "dsd_mode=none"], "dsd_mode is what the runs differ in"),
        (["--set", "seed=1"], "seed is what the runs differ in, or the ablation's own"),
        (["--set", "lr"], "NAME=VALUE expected, but got 'lr'"),
        (["--arms", "lol"], "but got lol"),
        (["--epochs", "0"], "--epochs must be at least 1, but got 0"),
        (["--epochs", "2", "--speech", "x"], "cascaded_pit has three stages and needs at least 3 epochs, but got 2"),
        (["--data_folder", "/no/such/folder"], "--data_folder /no/such/folder is no folder"),
        (["--regimes", "half", "--arms", "lo"], "The plan has no run of the regimes half, arms lo"),
    ],
)
def test_mistakes_of_the_command_line(arguments, message, tmp_path, capsys):
    try:
        status = main([*arguments, "--output", str(tmp_path / "new")])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_exclusions_are_told_by_epoch(tmp_path):
    audit = tmp_path / "exclusions.csv"
    audit.write_text("epoch,id,stored_metric,metric\n2,a,3.0,1.0\n2,b,5.0,4.5\n2,c,1.0,-4.0\n")
    history = _with_exclusions([{"epoch": "1"}, {"epoch": "2"}], audit)
    assert history[0] == {"epoch": "1", "excluded_metric": "", "excluded_gap": ""}
    assert history[1] == {"epoch": "2", "excluded_metric": 0.5, "excluded_gap": 2.0}


def test_without_recordings_one_sentence_says_what_is_needed(tmp_path):
    result = ablation("--output", tmp_path / "ablation")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: --speech FOLDER (or DSD_REALSPEECH) is needed")
    result = ablation("--output", tmp_path / "ablation", "--speech", tmp_path / "none")
    assert result.returncode == 2
    assert "libri_test/metadata.csv" in result.stderr
    assert "Traceback" not in result.stderr
