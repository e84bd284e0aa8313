"""Tests of the report: which panels are drawn of which columns, what they show, and the files."""

import math
import os

import matplotlib.image
import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from dsd_modules.report import draw_report, draw_separation, epoch_series, read_history, report_figure

RESULTS = {"si_sdri": 3.0, "sdri": 3.4, "si_sdri_block1": 2.0, "si_sdri_block2": 3.0}
TEST_PANEL = "Test means: SI-SDRi by block, SDRi"


def make_history(num_epochs=5, num_blocks=2, has_valid=True, num_excluded=3):
    history = []
    for epoch in range(1, num_epochs + 1):
        row = {"epoch": epoch, "lr": 1e-3, "train_si_sdri": 1.0 * epoch}
        row |= {"valid_si_sdri": 0.8 * epoch if has_valid else math.nan}
        for block in range(1, num_blocks + 1):
            row[f"train_si_sdri_block{block}"] = 0.5 * epoch * block
            row[f"valid_si_sdri_block{block}"] = 0.4 * epoch * block if has_valid else math.nan
        row |= {"label_switch_rate": 0.2 if epoch > 1 else math.nan, "probe_label_switch_rate": 0.1}
        row |= {"dropped_samples": num_excluded, "reordered_samples": 2 * num_excluded}
        row |= {f"valid_layer_decoupling_block{block}": 0.3 for block in range(1, num_blocks)}
        history.append(row)
    return history


def make_example(num_spks=2, num_samples=8000):
    references = np.random.default_rng(0).normal(size=(num_spks, num_samples))
    return {
        "id": "mix_1",
        "sample_rate": 8000,
        "mixture": references.sum(0),
        "references": references,
        "estimates": 100 * references,
    }


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_label() != "<colorbar>"]


def panel(figure, title):
    return figure.axes[titles(figure).index(title)]


def test_all_panels():
    figure = report_figure(make_history(), RESULTS, make_example(), "A run")
    assert titles(figure) == [
        "SI-SDRi",
        "Label switches",
        "Excluded samples",
        "SI-SDRi of each block, validation",
        "Layer-decoupling",
        TEST_PANEL,
        *("mixture", "reference 1", "reference 2", "estimate 1", "estimate 2"),
    ]
    assert figure.get_suptitle() == "A run"
    switches = panel(figure, "Label switches")
    assert [line.get_label() for line in switches.lines] == ["in training", "fixed probe set"]
    np.testing.assert_allclose(switches.lines[0].get_xydata(), [[epoch, 20] for epoch in (2, 3, 4, 5)])
    blocks = panel(figure, "SI-SDRi of each block, validation")
    assert [line.get_ydata()[-1] for line in blocks.lines] == pytest.approx([2.0, 4.0])
    assert [bar.get_height() for bar in panel(figure, TEST_PANEL).patches] == [2.0, 3.0, 3.4]


def test_exclusions_are_stacked():
    bars = panel(report_figure(make_history()), "Excluded samples").patches
    assert [bar.get_height() for bar in bars] == [3] * 5 + [6] * 5
    assert [bar.get_y() for bar in bars] == [0] * 5 + [3] * 5


def test_panels_without_columns_are_left_out():
    assert titles(report_figure([{"epoch": 1, "train_si_sdri": 1.0}])) == ["SI-SDRi"]
    figure = report_figure([{"epoch": 1, "probe_label_switch_rate": 0.5, "valid_si_sdri": math.nan}])
    assert titles(figure) == ["Label switches"]


def test_no_validation_shows_training():
    figure = report_figure(make_history(has_valid=False))
    assert [line.get_label() for line in panel(figure, "SI-SDRi").lines] == ["training"]
    assert "SI-SDRi of each block, training" in titles(figure)


@pytest.mark.parametrize("num_epochs", [1, 2, 300])
@pytest.mark.parametrize("num_blocks", [1, 8])
def test_few_and_many(tmp_path, num_epochs, num_blocks):
    results = {"sdri": 1.0} | {f"si_sdri_block{block}": 1.0 for block in range(1, num_blocks + 1)}
    history = make_history(num_epochs, num_blocks, num_excluded=0)
    figure = report_figure(history, results)
    assert ("Layer-decoupling" in titles(figure)) == (num_blocks > 1)
    assert [text.get_text() for text in panel(figure, "Excluded samples").texts] == ["none"]
    for axes in figure.axes:
        if axes.get_xlabel() == "epoch":
            left, right = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
            assert ticks
            assert all(tick == int(tick) >= 1 for tick in ticks)
    draw_report(history, tmp_path / "report.png", results)


def test_file(tmp_path):
    path = tmp_path / "report.png"
    draw_report(make_history(), path, RESULTS, make_example(3), "A run")
    height, width, _ = matplotlib.image.imread(path).shape
    assert width == 1600
    assert 800 < height < 1400
    draw_report(make_history(), tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(os.listdir(tmp_path)) == ["report.pdf", "report.png"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="history of 0 epochs"):
        draw_report([], tmp_path / "report.png")
    assert titles(report_figure([], example=make_example())) == titles(draw_separation(make_example()))


def test_spectrograms_share_range_and_level():
    figure = draw_separation(make_example(3, 12000))
    assert len(titles(figure)) == 7
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert {image.get_clim() for image in images} == {(-70, 0)}
    assert {tuple(image.get_extent()) for image in images} == {(0, 1.5, 0, 4)}
    # The estimates are 100 times their references, and drawn at the references' level.
    for reference, estimate in zip(images[1:4], images[4:], strict=True):
        np.testing.assert_allclose(estimate.get_array(), reference.get_array(), atol=1e-6)


def test_spectrogram_shows_the_frequency():
    example = make_example()
    example["references"][0] = np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000)
    image = next(axes for axes in draw_separation(example).axes if axes.get_title(loc="left") == "reference 1").images[
        0
    ]
    power = image.get_array()
    kilohertz = np.linspace(*image.get_extent()[2:], len(power))
    assert kilohertz[power.mean(axis=1).argmax()] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("key", ["mixture", "references", "estimates"])
def test_silent_signals(tmp_path, key):
    example = make_example(num_samples=100)  # shorter than a window, too
    example[key] = 0 * example[key]
    draw_report([], tmp_path / "report.png", example=example)


def test_tensors_for_tensorboard(tmp_path):
    example = make_example()
    for key in ("mixture", "references", "estimates"):
        example[key] = torch.from_numpy(example[key]).float()
    with SummaryWriter(tmp_path) as writer:
        writer.add_figure("separation", draw_separation(example))
    assert max(path.stat().st_size for path in tmp_path.iterdir()) > 10_000


def test_wrong_shapes():
    example = make_example()
    example["estimates"] = example["estimates"][0]
    with pytest.raises(ValueError, match=r"\(8000,\)"):
        draw_separation(example)


def test_read_history(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("epoch,lr,valid_si_sdri\n1,0.001,\n2,1e-4,3.5\n")
    history = read_history(path)
    assert history[1] == {"epoch": 2, "lr": 1e-4, "valid_si_sdri": 3.5}
    assert epoch_series(history, "valid_si_sdri") == ([2], [3.5])
    assert epoch_series(history, "probe_label_switch_rate") == ([], [])
    path.write_text("epoch,lr\nfirst,0.1\n")
    with pytest.raises(ValueError, match="'first'"):
        read_history(path)
    path.write_text("id,lr\na,0.1\n")
    with pytest.raises(ValueError, match="no table by 'epoch'"):
        read_history(path)
