"""The ablation's plan and its runner, on a few synthetic mixtures."""

import csv
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from ablation import _with_exclusions
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


def test_main_arms_come_first_with_every_seed():
    runs = plan(["main"], 3)
    assert Counter(run.arm for run in runs[:12]) == dict.fromkeys(MAIN_ARMS, 3)
    assert {run.seed for run in runs[12:]} == {1}


def test_a_small_set_is_visited_more_often_for_as_many_steps():
    half, small = Run("half", PLAIN_PIT, 1), Run("small_train", PLAIN_PIT, 1)
    steps = [num_epochs(run, 6) * REGIMES[run.regime].data.num_train for run in (half, small)]
    assert steps[0] == steps[1]


def test_the_command_trains_then_tests_then_reports_and_goes_on(tmp_path):
    """Two runs on four mixtures: closed test set, kill, resume, test, and nothing to do again."""
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
