"""Tests of the ablation's tables and figures, on a few made-up rows whose answers are plain arithmetic."""

import csv
import math
import sys

import matplotlib.image
import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import ablation_figures
from ablation_report import Ablation, main, tables, write_report

from shared_modules.statistics import speaker_bootstrap

# Test SI-SDRi of three mixtures by seed: the differences are 0.2, 0.4, 0.6 (seed 1) and 0.4, 0.4, 1.0 (seed 2).
SCORES = {
    ("main", "plain_pit", 1): (1.0, 2.0, 3.0),
    ("main", "dsd_drop_lo", 1): (1.2, 2.4, 3.6),
    ("main", "plain_pit", 2): (2.0, 3.0, 4.0),
    ("main", "dsd_drop_lo", 2): (2.4, 3.4, 5.0),
    ("main", "prob_pit", 1): (0.5, 1.5, 2.5),
}
SPEAKERS = ("a b", "a c", "b c")
FIGURES = ["blocks.png", "differences.png", "label_switches.png", "learning_curves.png"]


def history(run, num_epochs=4):
    """Epochs whose dev SI-SDRi is the epoch's number, plus 0.5 dB for DSD + LO; the first has no probe rate."""
    regime, arm, seed = run
    gain, excluded, seconds = (0.5, 0.04, 15) if arm == "dsd_drop_lo" else (0, 0, 10)
    for epoch in range(1, num_epochs + 1):
        yield {
            **{"regime": regime, "arm": arm, "seed": seed, "epoch": epoch, "seconds": seconds * seed},
            **{"label_switch_rate": 0.2 / epoch - excluded, "probe_label_switch_rate": "" if epoch == 1 else 0.1},
            **{"excluded_rate": excluded * (epoch > 1), "valid_si_sdri": epoch + gain},
            **{"valid_si_sdri_block1": epoch - 0.5 + gain, "valid_si_sdri_block2": epoch + gain},
            "valid_layer_decoupling_block1": 0.3 / epoch,
        }


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path):
    others = [("half", "plain_pit", 1), ("half", "dsd_drop_lo", 1)]
    runs = [("search", "lr_0.0012", 1), *SCORES, *others]
    write(tmp_path / "results.csv", [row for run in runs for row in history(run, 4 if run[0] == "main" else 2)])
    scores = []
    for (regime, arm, seed), values in SCORES.items():
        for number, (value, speakers) in enumerate(zip(values, SPEAKERS, strict=True)):
            row = {"regime": regime, "arm": arm, "seed": seed, "id": f"m{number}", "speakers": speakers}
            row |= {"si_sdri": value, "sdri": value + 0.5}
            scores.append(row | {"si_sdri_block1": value - 0.3, "si_sdri_block2": value, "si_sdri_block3": ""})
    write(tmp_path / "test_scores.csv", scores)
    about = {"device": "EPYC", "threads": 1, "jobs": 2, "commit": "abc", "seconds": 900, "command": "train.py a,b"}
    write(tmp_path / "runs.csv", [dict(zip(("regime", "arm", "seed"), run, strict=True)) | about for run in runs])
    return tmp_path


def section(text, title):
    """The rows of a table as lists of cells, below the heading that starts with the title."""
    part = next(part for part in text.split("## ") if part.startswith(title))
    return [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")][2:]


def test_quality(folder):
    rows = section(tables(Ablation(folder)), "Quality (2 speakers, 2 blocks)")
    by_mixture = speaker_bootstrap([0.3, 0.4, 0.8], [speakers.split() for speakers in SPEAKERS])
    assert rows == [
        ["plain PIT", "2", "4.00", "2.50", "3.00", "-", "-", "-", "2.20", "+0.30"],
        # By seed 0.4 and 0.6: the mean 0.5, the interval +- 12.706 x 0.1.
        ["DSD drop + LO", "2", "4.50", "3.00", "3.50", "+0.50", "[-0.77, +1.77]", "[+0.30, +0.80]", "2.70", "+0.30"],
        # Of the first seed alone, as plain PIT's that it is compared with.
        ["probabilistic PIT, 1 dB", "1", "4.00", "1.50", "2.00", "-0.50", "-", "[-0.50, -0.50]", "1.20", "+0.30"],
    ]
    assert (by_mixture.low, by_mixture.high) == pytest.approx((0.3, 0.8))


def test_behaviour_is_that_of_the_second_half(folder):
    rows = section(tables(Ablation(folder)), "Behaviour")
    assert rows[:2] == [
        ["plain PIT", "5.8 %", "10.0 %", "0.0 %", "7.5 %", "1.00 x"],
        ["DSD drop + LO", "1.8 %", "10.0 %", "4.0 %", "7.5 %", "1.50 x"],
    ]
    assert rows[2][-1] == "1.00 x"  # of the first seed alone: the second's epochs take twice as long


def test_every_seed_and_every_epoch(folder):
    text = tables(Ablation(folder))
    assert section(text, "Every seed")[2:] == [
        ["DSD drop + LO", "1", "2.40", "2.90"],
        ["DSD drop + LO", "2", "3.60", "4.10"],
        ["probabilistic PIT, 1 dB", "1", "1.50", "2.00"],
    ]
    assert section(text, "Label switches in training")[1] == ["DSD drop + LO", "16.0", "6.0", "2.7", "1.0"]
    assert section(text, "Label switches on the probe set")[0] == ["plain PIT", "-", "10.0", "10.0", "10.0"]
    assert section(text, "Excluded")[1] == ["DSD drop + LO", "0.0", "4.0", "4.0", "4.0"]
    assert section(text, "Layer-decoupling")[0] == ["plain PIT", "30.0", "15.0", "10.0", "7.5"]
    assert section(text, "Dev SI-SDRi")[1] == ["DSD drop + LO", "1.50", "2.50", "3.50", "4.50"]
    assert section(text, "Search") == [["plain PIT, lr 0.0012", "1.00", "2.00"]]


def test_regimes_start_with_the_main_pair_and_say_where_the_test_is_closed(folder):
    rows = section(tables(Ablation(folder)), "Regimes")
    assert [row[:6] for row in rows] == [
        ["2 speakers, 2 blocks", "plain PIT", "1", "test", "2.00", "-"],
        ["2 speakers, 2 blocks", "DSD drop + LO", "1", "test", "2.40", "+0.40"],
        ["2 speakers, 2 blocks", "plain PIT", "1, 2", "test", "2.50", "-"],
        ["2 speakers, 2 blocks", "DSD drop + LO", "1, 2", "test", "3.00", "+0.50"],
        ["half as long", "plain PIT", "1", "dev", "2.00", "-"],
        ["half as long", "DSD drop + LO", "1", "dev", "2.50", "+0.50"],
    ]
    assert rows[1][6:] == ["[+0.20, +0.60]", "2.10", "1.8 %", "0.31 x", "4.0 %"]
    assert rows[5][6:] == ["-", "2.00", "6.0 %", "0.60 x", "4.0 %"]


def test_runs(folder):
    text = tables(Ablation(folder))
    assert "8 runs took 2.0 hours" in text
    assert section(text, "Runs")[1] == ["2 speakers, 2 blocks", "5", "4500", "EPYC", "1", "2", "abc"]


def test_figures_show_what_the_tables_say(folder):
    ablation = Ablation(folder)
    main_arms, others = ablation_figures.learning_curves(ablation).axes
    assert [text.get_text() for text in main_arms.get_legend().get_texts()] == ["plain PIT", "DSD drop + LO"]
    assert others.get_legend().get_texts()[-1].get_text() == "probabilistic PIT, 1 dB"
    assert main_arms.lines[0].get_ydata() == pytest.approx([1, 2, 3, 4])
    assert len(main_arms.lines) == 2 + 4  # two means, two seeds each

    switches, probe, excluded, _ = ablation_figures.label_switches(ablation).axes
    assert switches.lines[0].get_xdata().tolist() == [2, 3, 4]
    assert switches.lines[0].get_ydata() == pytest.approx([10, 20 / 3, 5])
    assert len(probe.lines) == 3
    assert [line.get_ydata().tolist() for line in excluded.lines] == [[4, 4, 4]]

    scores, decoupling = ablation_figures.blocks(ablation).axes
    assert scores.lines[0].get_xdata() == pytest.approx([2.2, 2.7, 1.2])
    assert scores.lines[1].get_xdata() == pytest.approx([2.5, 3.0, 1.5])
    assert len(decoupling.lines) == 3

    by_arm, by_regime = ablation_figures.differences(ablation).axes
    assert [label.get_text() for label in by_arm.get_yticklabels()] == [
        "DSD drop + LO  (2 seeds)",
        "probabilistic PIT, 1 dB  (1 seed)",
    ]
    labels = ["2 speakers, 2 blocks  (2 seeds)", "half as long  (1 seed, dev set)"]
    assert [label.get_text() for label in by_regime.get_yticklabels()] == labels
    assert [text.get_text() for text in by_arm.texts] == ["+0.50", "-0.50"]


def test_report_of_all(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in folder.glob("*.png")) == FIGURES
    assert matplotlib.image.imread(folder / "differences.png").shape[1] == 1800
    assert "nan" not in (folder / "tables.md").read_text(encoding="utf-8")


def _keep(folder, words):
    """Keep those runs alone whose rows start with one of the words, and no test scores."""
    (folder / "test_scores.csv").write_text("")
    (folder / "runs.csv").unlink()
    header, *lines = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join([header, *(line for line in lines if line.startswith(words))]))


@pytest.mark.parametrize(
    ("words", "figures"),
    [
        (("main,plain_pit,1", "main,dsd_drop_lo,1"), FIGURES),
        (("main,plain_pit,1,1",), [name for name in FIGURES if name != "differences.png"]),
        (("main,dsd_drop_lo,2",), [name for name in FIGURES if name != "differences.png"]),
        (("half",), ["differences.png"]),
        (("search",), []),
    ],
)
def test_report_of_a_part(folder, words, figures):
    _keep(folder, words)
    write_report(folder)
    assert sorted(path.name for path in folder.glob("*.png")) == figures


def test_differences_without_test_scores_are_on_the_dev_set(folder):
    _keep(folder, "main")
    difference = Ablation(folder).difference("main", "dsd_drop_lo")
    assert difference.by_seed == {1: 0.5, 2: 0.5}
    assert difference.over_seeds.mean == 0.5
    assert math.isnan(difference.over_speakers.low)


def _replace(name, old, new):
    def spoil(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "results.csv").unlink(), "results.csv cannot be read: No such file or directory."),
        (lambda folder: (folder / "results.csv").write_text(""), "results.csv has no run."),
        (_replace("results.csv", "regime", "regimes"), "results.csv lacks the column 'regime'."),
        (_replace("results.csv", "main,prob_pit,1,1", "main,prob_pit,1,1.5"), "no whole number: main, prob_pit, 1."),
        (_replace("results.csv", "main,prob_pit,1", "main,prob_pit,one"), "a cell that is no number in row 19"),
        (_replace("results.csv", "main,prob_pit", "main,unknown"), "in row 19 that no plan knows: main, unknown."),
        (_replace("test_scores.csv", "a b,1.0", "1.0"), "test_scores.csv has 10 columns, but row 1 has 9."),
        (_replace("test_scores.csv", "a b,1.2", "a b c,1.2"), "equally many speakers, but got [2, 3]."),
        (_replace("runs.csv", "seconds", "minutes"), "runs.csv lacks the column 'seconds'."),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, spoil, message):
    spoil(folder)
    assert main([str(folder)]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert message in error
    assert error.count("\n") == 1


def test_usage(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
