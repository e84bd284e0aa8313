"""Tests of the comparison of two runs: the statistics against SciPy, and the command line."""

import math
import subprocess
import sys
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from dsd_modules.compare import comparison_figure, comparison_table, main, paired_difference
from dsd_modules.evaluation import write_results

HISTORY = (
    "epoch,valid_si_sdri,valid_si_sdri_block1,valid_si_sdri_block2,label_switch_rate,probe_label_switch_rate,"
    "dropped_samples,reordered_samples\n"
    "1,1.0,0.5,1.0,,,0,0\n"
    "2,2.0,1.5,2.0,{rate},0.05,3,1\n"
)


def make_run(folder, scores, rate=0.125, num_blocks=2):
    """A run's folder of SI-SDRi by id; SDRi is higher by 0.5 dB, block 1 lower by 1 dB."""
    folder.mkdir()
    rows = [
        {"si_sdri": score, "sdri": score + 0.5}
        | {f"si_sdri_block{block}": score - num_blocks + block for block in range(1, num_blocks + 1)}
        for score in scores.values()
    ]
    write_results(folder / "test_results.csv", list(scores), rows)
    (folder / "history.csv").write_text(HISTORY.format(rate=rate))
    return folder


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    a = {f"mix_{i}": score for i, score in enumerate(rng.normal(10, 3, size=40))}
    b = {name: score + rng.normal(0.5, 0.3) for name, score in a.items()}
    return make_run(tmp_path / "pit", a), make_run(tmp_path / "dsd", b, rate=0.0625)


@pytest.mark.parametrize("num_pairs", [2, 3, 50])
def test_interval_equals_scipy(num_pairs):
    rng = np.random.default_rng(num_pairs)
    a = rng.normal(size=num_pairs)
    b = a + rng.normal(0.3, 0.2, size=num_pairs)
    difference = paired_difference(a, b)
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.mean == pytest.approx(difference.mean_b - difference.mean_a)
    assert difference.num_pairs == num_pairs


def test_pairs_without_a_score_are_left_out():
    difference = paired_difference([1.0, math.nan, 3.0, 4.0], [2.0, 2.0, math.nan, 7.0])
    assert difference == replace(paired_difference([1.0, 4.0], [2.0, 7.0]), num_unscored=2)
    assert difference.num_pairs == 2


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.1, 3.9], "B is better by 1.00 dB, 95 % interval [0.75, 1.25]: excludes zero"),
        ([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], "A is better by 1.00 dB, 95 % interval [-1.25, -0.75]: excludes zero"),
        ([0.0, 0.0], [1.0, -0.5], "B is ahead by 0.25 dB, but the 95 % interval [-9.28, 9.78] includes zero"),
        ([1.0, 2.0], [1.5, 2.5], "B is better by 0.50 dB, 95 % interval [0.50, 0.50]: excludes zero"),
        ([1.0, 2.0], [1.0, 2.0], "A and B have the same mean, 95 % interval [0.00, 0.00]"),
        ([1.0], [1.5], "B - A is 0.50 dB on a single mixture: the interval is undefined"),
        ([1.0, math.nan], [math.nan, 2.0], "no mixture has a score in both runs"),
    ],
)
def test_words(a, b, words):
    assert paired_difference(a, b).in_words() == words


def test_single_pair_has_no_interval():
    difference = paired_difference([1.0], [1.5])
    assert difference.mean == 0.5
    assert math.isnan(difference.low)
    assert math.isnan(difference.high)


def test_unequal_lengths():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_table_pairs_by_id_and_takes_common_columns():
    a = {"x": {"si_sdri": 1.0, "si_sdri_block1": 1.0, "si_sdri_block2": 1.0}, "y": {"si_sdri": 5.0}}
    a["y"] |= {"si_sdri_block1": 2.0, "si_sdri_block2": 2.0}
    b = {"y": {"si_sdri": 6.0, "si_sdri_block1": 2.0}, "x": {"si_sdri": 1.5, "si_sdri_block1": 1.0}}
    table = comparison_table(a, b, metric="si_sdri_block1")
    assert list(table) == ["si_sdri_block1", "si_sdri"]
    assert table["si_sdri"].mean == 0.75


def test_command_line(runs, tmp_path):
    run_a, run_b = runs
    command = [sys.executable, "-m", "dsd_modules.compare", run_a, run_b, "--out", tmp_path / "compare.png"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = output.splitlines()
    assert lines[3].startswith("si_sdri: B is better by 0.5")
    assert lines[3].endswith("]: excludes zero")
    assert [line.split()[0] for line in lines if line.endswith(" 40")] == [
        *("si_sdri", "sdri", "si_sdri_block1", "si_sdri_block2")
    ]
    assert any(line.split() == ["in", "training", "12.50", "%", "6.25", "%"] for line in lines)
    assert any(line.split() == ["probe", "set", "5.00", "%", "5.00", "%"] for line in lines)
    assert "over the mixtures of this one test set" in output
    assert "other seeds or other speakers" in output
    assert "Left out" not in output
    assert lines[-1] == str(tmp_path / "compare.png")
    assert matplotlib.image.imread(tmp_path / "compare.png").shape[:2] == (900, 1600)


def test_default_picture_and_metric(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, runs), "--metric", "sdri"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[3].startswith("sdri: B is better")
    assert output.endswith("\ncompare.png\n")
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_differing_mixtures_and_missing_scores(tmp_path, capsys):
    run_a = make_run(tmp_path / "a", {"x": 1.0, "y": 2.0, "z": math.nan, "only_a": 3.0})
    run_b = make_run(tmp_path / "b", {"x": 2.0, "y": 4.0, "z": 1.0, "b1": 9.0, "b2": 9.0}, num_blocks=1)
    assert main([str(run_a), str(run_b), "--out", str(tmp_path / "compare.png")]) == 0
    output = capsys.readouterr().out
    assert "B is ahead by 1.50 dB" in output
    assert "only A has them: 1 of 4 mixtures" in output
    assert "only B has them: 2 of 5 mixtures" in output
    assert "Left out of si_sdri: 1 mixtures" in output
    assert "si_sdri_block2" not in output


def _without(name):
    return lambda folder: (folder / name).unlink()


def _with(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (_without("test_results.csv"), [], "test_results.csv cannot be read: No such file or directory."),
        (_without("history.csv"), [], "history.csv cannot be read: No such file or directory."),
        (_with("test_results.csv", "id,sdr\n"), [], "last row must be 'mean'"),
        (_with("history.csv", "nonsense"), [], "no table by 'epoch'"),
        (_with("test_results.csv", "id,si_sdri\nother,1\nmean,1\n"), [], "no test mixture in common"),
        (lambda folder: None, ["--metric", "pesq"], "but got 'pesq'"),
        (lambda folder: None, ["--out", "/no/such/folder/compare.png"], "No such file or directory"),
        (lambda folder: None, ["--out", "compare.xyz"], "xyz"),
    ],
)
def test_errors_are_one_sentence(runs, tmp_path, monkeypatch, capsys, spoil, options, message):
    monkeypatch.chdir(tmp_path)
    spoil(runs[1])
    assert main([*map(str, runs), *options]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert message in error
    assert error.count("\n") == 1


def test_missing_folder(runs, tmp_path, capsys):
    assert main([str(runs[0]), str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err == f"The run's folder {tmp_path / 'absent'} does not exist.\n"


def test_figure_shows_both_runs():
    history = [{"epoch": 1, "valid_si_sdri": 1.0, "dropped_samples": 2}, {"epoch": 2, "valid_si_sdri": 2.0}]
    history[1] |= {"dropped_samples": 3, "reordered_samples": 4, "probe_label_switch_rate": 0.25}
    figure = comparison_figure({"A": history, "B": history[:1]})
    curves, switches, exclusions, blocks = figure.axes
    assert [line.get_label() for line in curves.lines] == ["A", "B"]
    assert switches.lines[0].get_xydata().tolist() == [[2, 25]]
    assert exclusions.lines[0].get_ydata().tolist() == [2, 7]
    assert not blocks.lines
