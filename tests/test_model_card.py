"""Tests of the model card: its numbers are the run's, and it tells nothing else."""

import getpass
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from conftest import HPARAMS
from test_model_folder import CONVTASNET, make_export, make_other_export

from dsd_modules.evaluation import write_results
from dsd_modules.model_card import UNKNOWN_LICENCE, amend_card, write_card
from dsd_modules.onnx_export import OnnxFile

SCORES = {
    "a": {
        "si_sdr": 9.0,
        "si_sdri": 8.0,
        "sdr": 10.0,
        "sdri": 9.5,
        "stoi": 0.9,
        "si_sdri_block1": 7.0,
        "si_sdri_block2": 8.0,
    },
    "b": {
        "si_sdr": 5.0,
        "si_sdri": 4.5,
        "sdr": 6.0,
        "sdri": 5.0,
        "stoi": 0.8,
        "si_sdri_block1": 4.0,
        "si_sdri_block2": 4.5,
    },
}
HISTORY = "epoch,lr,valid_si_sdri\n1,0.001,2.0\n2,0.001,6.125\n3,0.001,5.5\n"
GROUPS = "kind,group,num_mixtures,si_sdri,sdri\ngender,FM,1,8.0,9.5\ngender,MM,1,4.5,\n"


def make_run(folder, num_spks=3, results=SCORES, **options):
    """A run's folder, with the files that a card reads."""
    folder.mkdir()
    text = HPARAMS.read_text(encoding="utf-8")
    for name, value in {"num_spks": num_spks, "output_folder": folder, **options}.items():
        text, count = re.subn(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    (folder / "hyperparams.yaml").write_text(f"# Generated today from:\n# {HPARAMS}\n# yamllint disable\n{text}")
    (folder / "history.csv").write_text(HISTORY)
    (folder / "test_groups.csv").write_text(GROUPS)
    (folder / "manifests").mkdir()
    for name, seconds in (("train", 5400), ("valid", 60), ("test", 20)):
        rows = "".join(f"{name}{n},{seconds},/home/{getpass.getuser()}/{n}.wav\n" for n in (1, 2))
        (folder / "manifests" / f"{name}.csv").write_text(f"ID,duration,mix_wav\n{rows}")
    if results:
        write_results(folder / "test_results.csv", list(results), list(results.values()))
    return folder, make_export(folder / "exported", num_spks=num_spks)


def read_card(path):
    """The header, and the text below it."""
    _, header, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def section(text, name):
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_every_number_is_the_runs(tmp_path):
    run, exported = make_run(tmp_path / "run", dsd_mode="reorder", lr="0.002", seed=7, train_sets="[train-100]")
    header, text = read_card(write_card(exported, run))
    assert header["license"] == UNKNOWN_LICENCE == "unknown"
    assert (header["library_name"], header["pipeline_tag"]) == ("speechbrain", "audio-to-audio")
    assert "sepformer" in header["tags"]
    (entry,) = header["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "SepFormer for three speakers at 8 kHz"
    assert result["dataset"]["name"] == "synthetic voices (espeak-ng), 2 test mixtures"
    assert {m["name"]: m["value"] for m in result["metrics"]} == {"SI-SDRi, dB": 6.25, "SDRi, dB": 7.25, "STOI": 0.85}

    results = section(text, "Results")
    assert "| test set | 2 | 6.25 | 7.25 | 0.85 |" in results
    assert "| gender FM | 1 | 8.00 | 9.50 | - |" in results
    assert "| gender MM | 1 | 4.50 | - | - |" in results
    assert "| 1 | 5.50 |" in results
    assert "| 2 | 6.25 |" in results

    training = section(text, "Training")
    assert "It was trained for 3 epochs." in training
    assert "6.12 dB, epoch 2." in training
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", training, flags=re.MULTILINE))
    assert {"dsd_mode": "reorder", "layerwise": "True", "lr": "0.002", "seed": "7"}.items() <= table.items()
    assert table["train_sets"] == '["train-100"]'  # it differs from the YAML's
    assert "`dsd_margin_db: 0.0`" in training.split("<details>")[1]

    data = section(text, "Data")
    assert "Synthetic voices, made with espeak-ng" in data
    assert "Mixtures: training 2 (3.0 h), validation 2 (2 min), test 2 (1 min)." in data
    assert "three speakers" in text
    assert "2 blocks" in text


def test_it_is_a_card_of_the_hub(tmp_path):
    run, exported = make_run(tmp_path / "run")
    card = huggingface_hub.ModelCard.load(write_card(exported, run))
    assert card.data.license == "unknown"
    assert [result.metric_value for result in card.data.eval_results] == [6.25, 7.25, 0.85]


@pytest.mark.parametrize("with_results", [True, False])
def test_it_tells_nothing_private(tmp_path, with_results):
    private = {"data_folder": tmp_path / "secret" / "Libri2Mix", "pretrained_folder": tmp_path / "exported_of_bob"}
    for folder in private.values():
        folder.mkdir(parents=True)
    run, exported = make_run(tmp_path / "run", results=SCORES if with_results else None, **private)
    text = write_card(exported, run).read_text(encoding="utf-8")
    for word in (tmp_path, Path.home(), "secret", "bob", "_csv", "output_folder", ".wav,", "manifests/"):
        assert str(word) not in text
    for path in re.findall(r"(?<![\w:/.<])/\w[\w./-]*", text):
        pytest.fail(f"a path: {path}")
    assert "started from the weights of another model" in text


def test_a_run_without_results_claims_none(tmp_path):
    run, exported = make_run(tmp_path / "run", results=None)
    header, text = read_card(write_card(exported, run))
    assert "model-index" not in header
    assert "metrics" not in header
    assert "No test scores were at hand, so nothing is known" in section(text, "Results")
    assert "SI-SDRi, dB" not in text


def test_a_model_of_no_run_claims_nothing(tmp_path):
    exported = make_export(tmp_path / "exported")
    header, text = read_card(write_card(exported, licence="cc-by-4.0"))
    assert header["license"] == "cc-by-4.0"
    assert "model-index" not in header
    assert "not at hand" in section(text, "Data")
    assert "not known" in section(text, "Training")
    assert "No test scores" in section(text, "Results")
    assert "data above" not in text
    assert "two speakers" in text


def test_scores_need_no_run(tmp_path):
    run, exported = make_run(tmp_path / "run")
    (run / "test_results.csv").rename(tmp_path / "scores.csv")  # which are no table of groups, too
    for folder in (None, run):
        header, text = read_card(write_card(exported, folder, tmp_path / "scores.csv"))
        assert "| test set | 2 | 6.25 | 7.25 | 0.85 |" in section(text, "Results")
        assert header["metrics"] == ["si-sdri", "sdri", "stoi"]
        assert ("data that are not known" in section(text, "Results")) == (folder is None)
    with pytest.raises(ValueError, match=r"none\.csv"):
        write_card(exported, table=tmp_path / "none.csv")


@pytest.mark.parametrize("fault", ["history.csv", "hyperparams.yaml", "manifests/train.csv", "test_groups.csv"])
def test_what_a_run_lacks_is_left_out(tmp_path, fault):
    run, exported = make_run(tmp_path / "run")
    (run / fault).unlink()
    _, text = read_card(write_card(exported, run))
    assert "| test set | 2 | 6.25 |" in text
    lacking = {
        "history.csv": "trained for",
        "hyperparams.yaml": "`dsd_mode`",
        "manifests/train.csv": "training 2",
        "test_groups.csv": "gender FM",
    }
    assert lacking[fault] not in text


def test_the_scores_of_a_block_are_called_so(tmp_path):
    run, exported = make_run(tmp_path / "run", results=None)
    table = run / "test_results_block1.csv"
    write_results(table, ["a"], [{"si_sdri": 3.0, "si_sdri_block1": 3.0}])
    _, text = read_card(write_card(exported, run, table, test_block=1))
    assert "| test set, block 1 | 1 | 3.00 |" in text
    assert "| test set |" not in text


@pytest.mark.parametrize(
    ("options", "data", "licence"),
    [
        ({}, "Synthetic voices, made with espeak-ng", "espeak-ng, which spoke the training data"),
        ({"data_folder": "d"}, "in the layout of Libri3Mix (`train-360`): clean mixtures", "CC BY 4.0."),
        (
            {"librispeech_folder": "l", "task": "mix_both"},
            "mixed at load time from LibriSpeech and WHAM!'s noise by LibriMix's metadata: mixtures with noise",
            "WHAM!'s noise under CC BY-NC 4.0",
        ),
        ({"train_manifest": "t"}, "Mixtures of the trainer's own", "licences of their own"),
    ],
)
def test_the_kind_of_data_decides_what_is_said_of_it(tmp_path, options, data, licence):
    run, exported = make_run(tmp_path / "run", **options)
    _, text = read_card(write_card(exported, run))
    assert data in section(text, "Data")
    assert licence in section(text, "Licence")
    assert ("espeak" in text) == (not options)
    assert ("it is for trying and testing" in section(text, "Limits")) == (not options)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "[dynamic sample dropout (`dsd_mode: drop`) and layer-wise optimization"),
        ({"dsd_mode": "none"}, "[layer-wise optimization"),
        ({"dsd_mode": "none", "layerwise": False}, "trained with permutation-invariant training, by"),
    ],
)
def test_the_method_is_that_of_the_run(tmp_path, options, method):
    run, exported = make_run(tmp_path / "run", **options)
    assert method in write_card(exported, run).read_text(encoding="utf-8")


def test_a_model_of_the_hub_that_was_fine_tuned_is_named(tmp_path):
    run, exported = make_run(tmp_path / "run", pretrained_folder="speechbrain/sepformer-libri3mix@a1b2", ema_decay=0.99)
    header, text = read_card(write_card(exported, run))
    assert header["base_model"] == "speechbrain/sepformer-libri3mix"
    assert "from the weights of `speechbrain/sepformer-libri3mix@a1b2`" in text
    assert "moving average (`ema_decay: 0.99`)" in text


def test_one_is_not_called_many(tmp_path):
    run, exported = make_run(tmp_path / "run")
    (run / "history.csv").write_text("epoch,valid_si_sdri\n1,2.0\n")
    assert "It was trained for 1 epoch." in write_card(exported, run).read_text(encoding="utf-8")


def test_other_separators_and_what_speechbrain_cannot_build(tmp_path):
    for folder, widths, can_build in (("a", CONVTASNET, True), ("b", {**CONVTASNET, "num_conv_layers": 9}, False)):
        exported = make_other_export(tmp_path / folder, "convtasnet", **widths)
        _, text = read_card(write_card(exported))
        assert "# Conv-TasNet for three speakers at 8 kHz" in text
        assert ("from speechbrain.inference" in text) == can_build


def test_what_is_amended_and_what_stays(tmp_path):
    run, exported = make_run(tmp_path / "run")
    path = write_card(exported, run)
    path.write_text(path.read_text() + "\nA line of the trainer's own; license: mine\n")
    before = path.read_text()
    amend_card(exported)
    assert path.read_text().rstrip() == before.rstrip()

    amend_card(exported, licence="cc-by-4.0", source="alice/three-voices")
    header, text = read_card(path)
    assert header["license"] == "cc-by-4.0"
    assert "license: mine" in text
    assert text.count('source = "alice/three-voices"') == 2
    assert "path/to/this/folder" not in text

    names = {
        "path": exported / "separator_blocks1.onnx",
        "sample_rate": 8000,
        "num_spks": 3,
        "num_blocks": 1,
        "opset": 18,
    }
    file = OnnxFile(**names, shortest_length=16, longest_checked_length=80000, largest_difference=1.25e-6)
    for _ in range(2):
        amend_card(exported, onnx_files=[file])
        _, text = read_card(path)
        assert text.count("## ONNX") == 1
        assert "| `separator_blocks1.onnx` | 1 | 80,000 | 1e-06 |" in text
        assert "at least 16 samples" in text
    assert "A line of the trainer's own" in text
    assert section(text, "Results") == section(before, "Results")

    with_onnx = path.read_text()
    for own in ("## Notes\n", "# Notes\n", "### Notes\n", "", "```python\nvoices[0]\n```\n"):
        path.write_text(f"{with_onnx}\n{own}What the trainer wrote below.\n")
        amend_card(exported, onnx_files=[replace(file, shortest_length=32)])
        changed = with_onnx.replace("at least 16 samples", "at least 32 samples")
        assert path.read_text() == f"{changed}\n{own}What the trainer wrote below.\n"

    path.write_text(with_onnx[: with_onnx.index("With numpy and onnxruntime")] + "# Notes\n\n```python\nmine\n```\n")
    amend_card(exported, onnx_files=[file])
    assert path.read_text().count("## ONNX") == 1
    assert path.read_text().endswith("# Notes\n\n```python\nmine\n```\n")


def test_faults(tmp_path):
    run, exported = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"README\.md cannot be read"):
        amend_card(exported, licence="mit")
    for licence in ("do as you like", "MIT", "", "mit\nsource: mine"):
        with pytest.raises(ValueError, match=r"A licence can only be an identifier such as apache-2.0"):
            write_card(exported, run, licence=licence)
    assert not (exported / "README.md").exists()
    write_card(exported, run)
    with pytest.raises(ValueError, match="A licence can only be"):
        amend_card(exported, licence="MIT licence")
    (run / "test_results.csv").write_text("id,si_sdri\na,not a number\n")
    before = (exported / "README.md").read_bytes()
    with pytest.raises(ValueError, match=r"test_results\.csv"):
        write_card(exported, run)
    assert (exported / "README.md").read_bytes() == before
