"""Tests of the overlap against closed forms, of gender pairs from hand-made metadata, and of the table of groups."""

import csv
import math

import pytest
import torch

from dsd_modules import results
from dsd_modules.evaluation import write_results
from dsd_modules.groups import gender_pairs, overlap_ratio, write_groups
from dsd_modules.results import finish_run, format_groups

NAN = math.nan


def stretches(num_samples, *spans):
    """Ones from each start up to its end, a row for each."""
    signals = torch.zeros(len(spans), num_samples)
    for signal, (start, end) in zip(signals, spans, strict=True):
        signal[start:end] = 1
    return signals


@pytest.mark.parametrize(
    ("spans", "ratio"),
    [
        ([(0, 100), (0, 100)], 1),
        ([(0, 60), (40, 100)], 0.2),
        ([(0, 50), (50, 100)], 0),
        ([(0, 100), (0, 0)], 0),  # one is silent
        ([(0, 50), (25, 75), (50, 100)], 0.5),  # never all three
        ([(0, 100), (10, 20), (15, 40)], 0.3),
        ([(0, 0), (0, 0)], 0),
    ],
)
def test_overlap(spans, ratio):
    ref = stretches(100, *spans)
    for order in (list(range(len(spans))), [*range(1, len(spans)), 0]):
        assert overlap_ratio(ref[None, order]).tolist() == pytest.approx([ratio])


def test_overlap_counts_pauses_and_negative_samples():
    ref = stretches(100, (10, 60), (0, 100))
    ref[0, 20:50] = 0
    ref[0, [10, 59]] = -1e-6
    assert overlap_ratio(ref[None]).item() == pytest.approx(0.5)


def test_overlap_of_a_batch_of_different_lengths():
    ref = torch.stack([stretches(100, (0, 60), (40, 100)), stretches(100, (0, 20), (10, 100))])
    ref[1, :, 40:] = 7  # padding need not be silent
    assert overlap_ratio(ref, torch.tensor([100, 40])).tolist() == pytest.approx([0.2, 0.25])


def test_single_reference_has_no_overlap():
    assert math.isnan(overlap_ratio(torch.ones(1, 1, 100)).item())


def write_info(path, *rows):
    """As LibriMix writes it, speakers' ids as floats included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_spks = len(rows[0]) - 1
    columns = [f"speaker_{spk}_{what}" for spk in range(1, num_spks + 1) for what in ("ID", "sex")]
    with open(path, "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["mixture_ID", *columns])
        for name, *sexes in rows:
            table.writerow([name, *(cell for spk, sex in enumerate(sexes) for cell in (f"{spk}.0", sex))])


SPEAKERS = """\
; Some information about the LibriSpeech speakers
;ID  |SEX| SUBSET           |MINUTES| NAME
14   | F | train-clean-360  | 25.03 | Somebody
16   | F | train-clean-360  | 25.11 | Somebody else
17   | M | train-clean-360  | 25.04 | One | and another
; 19 | M | train-clean-360  | 25.04 | Left out
61   | M | test-clean       | 8.08  | Dave
"""


@pytest.mark.parametrize("place", ["", "metadata", "Libri2Mix"])
@pytest.mark.parametrize("name", ["test-clean", "test"])
def test_gender_pairs_of_librimix(tmp_path, place, name):
    rows = [("a_b", "F", "M"), ("c_d", "M", "F"), ("e_f", "M", "M"), ("g_h", "F", "F"), ("i_j", "F", "")]
    write_info(tmp_path / place / f"libri2mix_{name}_info.csv", *rows)
    pairs = gender_pairs(["c_d", "a_b", "e_f", "g_h", "i_j", "unknown"], 2, [None, tmp_path])
    assert pairs == {"a_b": "FM", "c_d": "FM", "e_f": "MM", "g_h": "FF"}
    assert gender_pairs(["c_d"], 1, [tmp_path]) == {"c_d": "M"}  # the first speaker alone is enhanced


def test_gender_pairs_of_three_speakers(tmp_path):
    rows = [("a", "M", "F", "M"), ("b", "F", "F", "M"), ("c", "F", "F", "F"), ("d", "M", "M", "M")]
    write_info(tmp_path / "libri3mix_test-clean_info.csv", *rows)
    assert gender_pairs("abcd", 3, [tmp_path]) == {"a": "FMM", "b": "FFM", "c": "FFF", "d": "MMM"}


def test_gender_pairs_of_librispeech(tmp_path):
    (tmp_path / "SPEAKERS.TXT").write_text(SPEAKERS)
    ids = {
        "14-1-0001_17-2-0002": "FM",
        "17-2-0002_61-1-0003": "MM",
        "16-1-0000_14-1-0001": "FF",
        "14-1-0001_19-1-0001": None,  # only in a comment
        "14-1-0001": None,  # one speaker of two
        "recording": None,
    }
    known = {name: pair for name, pair in ids.items() if pair}
    assert gender_pairs(list(ids), 2, ["no such folder", str(tmp_path)]) == known
    assert gender_pairs(["17-2-0002_14-1-0001_61-1-0003"], 3, [tmp_path]) == {"17-2-0002_14-1-0001_61-1-0003": "FMM"}


def test_librimix_tells_more_than_librispeech(tmp_path):
    (tmp_path / "SPEAKERS.TXT").write_text(SPEAKERS)
    write_info(tmp_path / "metadata" / "libri2mix_test_info.csv", ("14-1-0001_17-2-0002", "M", "M"))
    ids = ["14-1-0001_17-2-0002", "16-1-0000_14-1-0001"]
    assert gender_pairs(ids, 2, [tmp_path]) == dict(zip(ids, ("MM", "FF"), strict=True))


def test_info_without_sexes_is_no_error(tmp_path):
    """Generated mixtures have such a file."""
    (tmp_path / "libri2mix_test_info.csv").write_text(
        "mixture_ID,speaker_1_ID,speaker_2_ID\n14-1-0001_17-2-0002,14,17\n"
    )
    assert gender_pairs(["14-1-0001_17-2-0002"], 2, [tmp_path]) == {}
    (tmp_path / "SPEAKERS.TXT").write_text(SPEAKERS)
    assert gender_pairs(["14-1-0001_17-2-0002"], 2, [tmp_path]) == {"14-1-0001_17-2-0002": "FM"}
    assert gender_pairs(["14-1-0001_17-2-0002"], 2, [None]) == {}


ROWS = {
    "a": {"si_sdri": 1.0, "pesq": 2.0, "si_sdri_spk1": 9.0, "si_sdri_block1": 9.0, "overlap": 0.0},
    "b": {"si_sdri": 2.0, "pesq": NAN, "si_sdri_spk1": 9.0, "si_sdri_block1": 9.0, "overlap": 0.2499},
    "c": {"si_sdri": 4.0, "pesq": 3.0, "si_sdri_spk1": 9.0, "si_sdri_block1": 9.0, "overlap": 0.25},
    "d": {"si_sdri": NAN, "pesq": NAN, "si_sdri_spk1": 9.0, "si_sdri_block1": 9.0, "overlap": 0.75},
    "e": {"si_sdri": 5.0, "pesq": 4.0, "si_sdri_spk1": 9.0, "si_sdri_block1": 9.0, "overlap": 1.0},
    "f": {"si_sdri": 6.0, "pesq": 4.0, "si_sdri_spk1": 9.0, "si_sdri_block1": 9.0, "overlap": NAN},
}


def test_table_of_groups(tmp_path):
    path = tmp_path / "test_groups.csv"
    groups = write_groups(path, ROWS, {"a": "MM", "b": "FM", "c": "FM", "d": "FF"})
    assert path.read_text().splitlines() == [
        "kind,group,num_mixtures,si_sdri,pesq",
        "gender,FF,1,,",
        "gender,FM,2,3.0,3.0",
        "gender,MM,1,1.0,2.0",
        "overlap,0-25 %,2,1.5,2.0",
        "overlap,25-50 %,1,4.0,3.0",
        "overlap,75-100 %,2,5.0,4.0",
    ]
    assert groups[1] == {"kind": "gender", "group": "FM", "num_mixtures": 2, "si_sdri": 3.0, "pesq": 3.0}
    assert format_groups(groups).splitlines()[:3] == [
        "  group             mixtures   SI-SDRi      PESQ",
        "  gender FF                1         -         -",
        "  gender FM                2      3.00      3.00",
    ]


def test_without_groups_no_table_is_left(tmp_path):
    path = tmp_path / "test_groups.csv"
    write_groups(path, ROWS, {})
    assert path.exists()
    assert write_groups(path, {"f": ROWS["f"]}, {}) == []
    assert not path.exists()
    assert write_groups(path, {"x": {"si_sdri": 1.0}}, {}) == []


def test_scores_of_a_block_leave_the_report_alone(tmp_path, capsys):
    write_info(tmp_path / "metadata" / "libri3mix_test_info.csv", ("a", "F", "F", "M"), ("b", "F", "M", "F"))
    row = {"si_sdri": 3.0, "sdri": 3.5, "stoi": 0.8, "overlap": 0.6, "si_sdri_block1": 3.0}
    row |= {f"si_sdr_spk{spk}": 1.0 for spk in (1, 2, 3)}
    write_results(tmp_path / "test_results_block1.csv", ["a", "b"], [row, {**row, "si_sdri": 4.0}])
    finish_run(tmp_path, tmp_path / "exported", None, test_block=1, folders=[tmp_path])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metadata",
        "test_groups_block1.csv",
        "test_results_block1.csv",
    ]
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Test of block 1, 2 mixtures: SI-SDRi 3.50 dB, SDRi 3.50 dB, STOI 0.80 (block1 3.00)",
        "  group             mixtures   SI-SDRi      SDRi      STOI",
        "  gender FFM               2      3.50      3.50      0.80",
        "  overlap 50-75 %          2      3.50      3.50      0.80",
        f"  results table     {tmp_path.resolve() / 'test_results_block1.csv'}",
        f"  table of groups   {tmp_path.resolve() / 'test_groups_block1.csv'}",
    ]


def test_scores_of_the_run_are_drawn(tmp_path, capsys, monkeypatch):
    row = {"si_sdri": 3.0, "sdri": 3.5, "si_sdr_spk1": 1.0, "si_sdri_block1": 2.0, "si_sdri_block2": 3.0}
    scores = {"a": 9.0, "b": NAN, "c": 3.0, "d": -1.0}
    write_results(tmp_path / "test_results.csv", list(scores), [{**row, "si_sdri": score} for score in scores.values()])
    (tmp_path / "history.csv").write_text("epoch,valid_si_sdri\n1,2.0\n")
    drawn = {}
    monkeypatch.setattr(results, "separate_example", lambda exported, item, folder: item)
    monkeypatch.setattr(results, "draw_report", lambda history, path, **others: drawn.update(others, path=path))

    class TestSet(dict):
        data_ids = tuple(scores)

    finish_run(tmp_path, tmp_path / "exported", TestSet(enumerate(scores)))
    assert drawn["example"] == "c"  # the median
    assert drawn["results"]["si_sdri"] == pytest.approx(11 / 3, abs=1e-4)
    assert drawn["path"] == tmp_path.resolve() / "report.png"
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "Test, 4 mixtures: SI-SDRi 3.67 dB, SDRi 3.50 dB (block1 2.00, block2 3.00)"
    assert [line.split("  ")[1] for line in printed[2:]] == [
        *("results table", "figure", "TensorBoard", "separated voices", "exported model")
    ]
