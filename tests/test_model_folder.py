"""Tests of exported folders: written, read with or without trust, and started from."""

import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import HPARAMS, TINY_MODEL
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.lobes.models.dual_path import Dual_Path_Model

from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.model_folder import export_model, load_weights, model_options, read_model
from dsd_modules.options import read_options
from dsd_modules.separator import separate

OPTIONS = {**TINY_MODEL, "num_spks": 2, "sample_rate": 8000, "dropout": 0.0, "d_ffn": 32}

# The recipe's model alone, without its data and training.
RECIPE = HPARAMS.read_text(encoding="utf-8")
MODEL = "num_spks: 2\nsample_rate: 8000\n" + RECIPE[RECIPE.index("\nnum_filters: ") : RECIPE.index("\npit_loss: ")]

# Short texts that are long once they are written out.
BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 11))
REFERENCES = "".join(f"a{i}: !ref {f'<a{i - 1}>' * 10}\n" for i in range(1, 11))

# The form of the folders that SpeechBrain has published, with its own class for the mask network.
PUBLISHED = """
# Parameters
num_spks: 3
N_encoder_out: 16
kernel_size: 16

Encoder: &encoder !new:speechbrain.lobes.models.dual_path.Encoder
  kernel_size: !ref <kernel_size>
  out_channels: !ref <N_encoder_out>

SBtfintra: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
  num_layers: 2
  d_model: 16
  nhead: 4
  d_ffn: 32
  dropout: 0
  use_positional_encoding: true
  norm_before: true

SBtfinter: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
  num_layers: 1
  d_model: !ref <N_encoder_out>
  nhead: 4
  d_ffn: 32
  dropout: 0
  use_positional_encoding: true
  norm_before: true

MaskNet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
  num_spks: !ref <num_spks>
  in_channels: 16
  out_channels: 16
  num_layers: 2
  K: 20
  intra_model: !ref <SBtfintra>
  inter_model: !ref <SBtfinter>
  norm: ln
  linear_layer_after_inter_intra: false
  skip_around_intra: true

Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
  in_channels: 16
  out_channels: 1
  kernel_size: 16
  stride: !ref <kernel_size> // 2
  bias: false

modules:
  encoder: *encoder
  decoder: !ref <Decoder>
  masknet: !ref <MaskNet>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
    encoder: !ref <Encoder>
    decoder: !ref <Decoder>
    masknet: !ref <MaskNet>
"""


def make_modules(seed=0, **changes):
    """The modules that the recipe's YAML builds."""
    torch.manual_seed(seed)
    return load_hyperpyyaml(MODEL, {**OPTIONS, **changes})["modules"]


def make_export(folder, seed=0, **changes):
    return export_model(folder, HPARAMS, {**OPTIONS, **changes}, make_modules(seed, **changes))


def make_published(folder, text=PUBLISHED):
    """A published-form folder with random weights."""
    torch.manual_seed(7)
    modules = load_hyperpyyaml(text)["modules"]
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(text)
    for name, module in modules.items():
        for parameter in module.parameters():  # SpeechBrain's blocks start as copies of one
            torch.nn.init.normal_(parameter, std=0.2)
        torch.save(module.state_dict(), folder / f"{name}.ckpt")
    return folder


def make_hub_error(error_class):
    """As huggingface_hub raises it: a page of text with the server's answer."""
    return error_class("404 Client Error.\n\nNot Found for url", response=MagicMock())


def separate_with(modules, mixture):
    return separate(modules["encoder"], modules["masknet"], modules["decoder"], mixture).transpose(1, 2)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("model") / "exported")


# Export and load


@pytest.mark.parametrize("num_spks", [2, 3])
def test_round_trip_equals_the_modules(tmp_path, num_spks):
    modules = make_modules(num_spks=num_spks)
    folder = export_model(
        tmp_path / "runs" / "exported", HPARAMS, {**OPTIONS, "num_spks": num_spks, "lr": 0.1}, modules
    )
    separator = SepformerDSDSeparation.from_hparams(source=str(folder), savedir="ignored")
    assert (separator.num_spks, separator.sample_rate, separator.num_blocks) == (num_spks, 8000, 2)
    mixture = torch.randn(3, 1003)
    estimates = separator.separate_batch(mixture)
    assert estimates.shape == (3, 1003, num_spks)
    assert not estimates.requires_grad
    with torch.no_grad():  # as there: with gradients it is decoded by another sum, which may round otherwise
        torch.testing.assert_close(estimates, separate_with(modules, mixture), rtol=0, atol=0)


def test_separates_the_same_in_speechbrain(tmp_path, exported):
    theirs = SepformerSeparation.from_hparams(source=str(exported), savedir=str(tmp_path / "savedir"))
    ours = SepformerDSDSeparation.from_hparams(source=exported)
    mixture = torch.randn(1, 1003)
    torch.testing.assert_close(ours.separate_batch(mixture), theirs.separate_batch(mixture), rtol=1e-4, atol=1e-5)


STOCK = """
import sys
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dsd_modules":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
from speechbrain.inference.separation import SepformerSeparation
mixture, *folders = sys.argv[1:]
for number, folder in enumerate(folders):
    separator = SepformerSeparation.from_hparams(source=folder, savedir=f"savedir{number}")
    torch.save(separator.separate_batch(torch.load(mixture)), f"estimates{number}.pt")
"""


def make_other_export(folder, name, **overrides):
    """As :func:`make_export`, of another YAML of the recipe."""
    hparams_file = HPARAMS.with_name(f"{name}_dsd.yaml")
    _, options = read_options(hparams_file, "\n".join(f"{key}: {value}" for key, value in overrides.items()))
    text = hparams_file.read_text(encoding="utf-8")
    model = text[text.rindex("\n# Model: ") : text.index("\npit_loss: ")]
    torch.manual_seed(1)
    modules = load_hyperpyyaml(f"num_spks: 3\nsample_rate: 8000\n{model}", overrides)["modules"]
    return export_model(folder, hparams_file, options, modules)


DPRNN = {"num_spks": 3, "num_filters": 16, "chunk_size": 20, "num_blocks": 2, "hidden_channels": 12}
CONVTASNET = {"num_spks": 3, "num_filters": 16, "num_blocks": 2, "bottleneck_channels": 12, "hidden_channels": 24}


def test_speechbrain_loads_every_architecture_without_this_project(tmp_path):
    """With the card and ONNX beside the model."""
    folders = [
        make_export(tmp_path / "sepformer", num_spks=3),
        make_other_export(tmp_path / "dprnn", "dprnn", **DPRNN),
        make_other_export(tmp_path / "convtasnet", "convtasnet", **CONVTASNET),
    ]
    for folder in folders:
        (folder / "README.md").write_text("# A card\n")
        (folder / "separator_blocks1.onnx").write_bytes(b"weights")
    mixture = torch.randn(2, 4003)
    torch.save(mixture, tmp_path / "mixture.pt")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "mixture.pt"), *map(str, folders)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for number, folder in enumerate(folders):
        ours = SepformerDSDSeparation.from_hparams(folder).separate_batch(mixture)
        assert ours.shape == (2, 4003, 3)
        theirs = torch.load(tmp_path / f"estimates{number}.pt")
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_conv_layers", "conv_kernel", "is_stock"), [(8, 3, True), (9, 3, False), (8, 5, False)])
def test_speechbrains_class_is_named_where_it_can_be_built(tmp_path, num_conv_layers, conv_kernel, is_stock):
    widths = {"num_conv_layers": num_conv_layers, "conv_kernel": conv_kernel}
    folder = make_other_export(tmp_path / "exported", "convtasnet", **CONVTASNET, **widths)
    assert ("dsd_modules.tasnet" in (folder / "hyperparams.yaml").read_text()) != is_stock
    assert SepformerDSDSeparation.from_hparams(folder).num_spks == 3
    if is_stock:
        SepformerSeparation.from_hparams(source=str(folder), savedir=str(tmp_path / "savedir"))


@pytest.mark.parametrize("encoder", ["*encoder", "!ref <Encoder>"])
def test_loads_a_published_folder(tmp_path, encoder):
    folder = make_published(tmp_path / "published", PUBLISHED.replace("  encoder: *encoder", f"  encoder: {encoder}"))
    theirs = SepformerSeparation.from_hparams(source=str(folder), savedir=str(tmp_path / "savedir"))
    assert type(theirs.mods.masknet) is Dual_Path_Model
    ours = SepformerDSDSeparation.from_hparams(source=folder)
    assert (ours.num_spks, ours.sample_rate, ours.num_blocks) == (3, 8000, 2)
    mixture = torch.randn(1, 1003)
    torch.testing.assert_close(ours.separate_batch(mixture), theirs.separate_batch(mixture), rtol=1e-3, atol=1e-4)


def test_loading_leaves_no_trace(tmp_path, monkeypatch, exported):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before, random_state = listing(exported), torch.random.get_rng_state()
    separator = SepformerDSDSeparation.from_hparams(source=exported)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    separator.separate_batch(torch.randn(1, 500))
    assert listing(exported) == before == ["decoder.ckpt", "encoder.ckpt", "hyperparams.yaml", "masknet.ckpt"]
    assert listing(tmp_path) == []


def test_exported_folder_holds_no_training(exported):
    text = (exported / "hyperparams.yaml").read_text()
    for word in ("optimizer", "memory_bank", "checkpointer", "!apply", "seed", "_folder"):
        assert word not in text


def edit_recipe(path, old, new):
    """Write the recipe's YAML with an edit, and build its modules."""
    assert RECIPE.count(old) == MODEL.count(old) == 1
    path.write_text(RECIPE.replace(old, new), encoding="utf-8")
    torch.manual_seed(3)
    return load_hyperpyyaml(MODEL.replace(old, new), OPTIONS)["modules"]


INTRA = "intra_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (INTRA, INTRA + "    activation: gelu\n", "  activation: gelu\n"),
        (INTRA, "act: gelu # <lr>\n" + INTRA + "    activation: !ref <act>\n", "act: gelu\n"),
        ("    norm: ln #", "    norm: cln #", "  norm: cln\n"),
        (
            "modules:\n    encoder: !ref <encoder>\n",
            "modules:\n    bank: !new:collections.Counter\n"
            "    encoder: !new:speechbrain.lobes.models.dual_path.Encoder\n"
            "        kernel_size: 16\n        out_channels: !ref <num_filters>\n",
            "modules:\n  encoder: !new:",
        ),
        (
            "    intra_model: !ref <intra_model>\n",
            "    intra_model: !ref <inter_model>\n",
            "intra_model: !ref <inter_model>",
        ),
    ],
)
def test_an_edited_wiring_is_exported_as_edited(tmp_path, old, new, expected):
    modules = edit_recipe(tmp_path / "edited.yaml", old, new)
    overrides = "\n".join(f"{name}: {value}" for name, value in OPTIONS.items())
    _, options = read_options(tmp_path / "edited.yaml", overrides)
    folder = export_model(tmp_path / "exported", tmp_path / "edited.yaml", options, modules)
    text = (folder / "hyperparams.yaml").read_text()
    assert expected in text
    assert "lr" not in text
    mixture = torch.randn(2, 1003)
    estimates = SepformerDSDSeparation.from_hparams(folder).separate_batch(mixture)
    with torch.no_grad():  # as there
        torch.testing.assert_close(estimates, separate_with(modules, mixture), rtol=0, atol=0)
    theirs = SepformerSeparation.from_hparams(source=str(folder), savedir=str(tmp_path / "savedir"))
    torch.testing.assert_close(theirs.separate_batch(mixture), estimates, rtol=1e-4, atol=1e-5)
    is_tied = "inter_model" in new  # SpeechBrain's class would make one model of one template
    assert ("dsd_modules.masknet.DualPathMaskNet\n" in text) == is_tied


def test_the_export_holds_what_the_model_needs_and_no_more(exported):
    plan = YAML().load((exported / "hyperparams.yaml").read_text())
    parts = ["encoder", "intra_model", "inter_model", "masknet", "decoder", "modules", "pretrainer"]
    assert sorted(plan) == sorted([*OPTIONS, *parts])
    assert {name: plan[name] for name in OPTIONS} == OPTIONS


def test_checkpointing_is_not_exported(tmp_path):
    modules = make_modules(activation_checkpointing=True)
    assert modules["masknet"].activation_checkpointing
    folder = export_model(tmp_path / "exported", HPARAMS, {**OPTIONS, "activation_checkpointing": True}, modules)
    assert "checkpointing" not in (folder / "hyperparams.yaml").read_text()
    assert modules["masknet"].activation_checkpointing
    assert not read_model(folder)[0]["masknet"].activation_checkpointing
    SepformerSeparation.from_hparams(source=str(folder), savedir=str(tmp_path / "savedir"))


def test_the_options_that_a_checkpoint_fixes(tmp_path):
    names = set(OPTIONS) - {"dropout"}
    assert set(model_options(HPARAMS)) == names
    text = RECIPE.replace("    K: !ref <chunk_size>", "    K: !ref <my_chunk>")
    (tmp_path / "own.yaml").write_text("my_chunk: !ref <double> * 2\ndouble: 5\n" + text)
    assert set(model_options(tmp_path / "own.yaml")) == names - {"chunk_size"} | {"my_chunk", "double"}
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        model_options(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ".masknet.DualPathMaskNet\n",
            ".other.MaskNet\n",
            "masknet can only be .* but got '!new:dsd_modules.other.MaskNet'",
        ),
        (INTRA, INTRA + "    activation: !apply:os.system [touch ran]\n", "tag !apply:os.system is not allowed"),
        (INTRA, INTRA + "    activation: gelu\n", "do not fit the modules: they separate differently"),
        (INTRA, "act: !ref <seed>\n" + INTRA + "    d_head: !ref <act>\n", "cannot be built: .*d_head"),
        ("    decoder: !ref <decoder>\n\n", "\n", "decoder can only be .* but got None"),
        ("\nmodules:\n", "\nparts:\n", "must hold the top-level key modules"),
        ("\nencoder: ", "\n{", "cannot be read"),
    ],
)
def test_export_refuses_another_wiring(tmp_path, monkeypatch, old, new, message):
    monkeypatch.chdir(tmp_path)
    assert RECIPE.count(old) == 1
    (tmp_path / "edited.yaml").write_text(RECIPE.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        export_model(tmp_path / "exported", "edited.yaml", {**OPTIONS, "seed": 1}, make_modules())
    assert "edited.yaml" in str(error.value)
    assert listing(tmp_path) == ["edited.yaml"]


def test_export_refuses_a_missing_yaml_and_heads_that_no_weight_shows(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        export_model(tmp_path / "exported", tmp_path / "none.yaml", OPTIONS, make_modules())
    with pytest.raises(ValueError, match="separate differently"):
        export_model(tmp_path / "exported", HPARAMS, {**OPTIONS, "num_heads": 4}, make_modules())
    assert listing(tmp_path) == []


def test_export_leaves_the_modules_as_they_are(tmp_path):
    modules = make_modules()
    export_model(tmp_path / "exported", HPARAMS, OPTIONS, modules)
    for module in modules.values():
        assert module.training
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_two_models_are_independent(tmp_path):
    folders = [make_export(tmp_path / "a", seed=1), make_export(tmp_path / "b", seed=2, num_spks=3)]
    mixture = torch.randn(2, 800)
    alone = [SepformerDSDSeparation.from_hparams(source=folder).separate_batch(mixture) for folder in folders]
    both = [SepformerDSDSeparation.from_hparams(source=folder) for folder in folders]
    with torch.no_grad():
        both[0].mods["encoder"].conv1d.weight.zero_()
    assert both[0].separate_batch(mixture).count_nonzero() == 0
    assert torch.equal(both[1].separate_batch(mixture), alone[1])
    assert torch.equal(SepformerDSDSeparation.from_hparams(source=folders[0]).separate_batch(mixture), alone[0])


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_export_leaves_the_old_one(tmp_path, monkeypatch, fault):
    folder = make_export(tmp_path / "exported", seed=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save, saved = torch.save, []

    def save_half(state, stream):
        if saved:
            stream.write(b"half")
            raise fault
        save(state, stream)
        saved.append(state)

    monkeypatch.setattr(torch, "save", save_half)
    for place in (folder, tmp_path / "new"):
        saved.clear()
        with pytest.raises(type(fault)):
            make_export(place, seed=2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["exported"]


def test_export_replaces_the_old_one_and_cleans_up(tmp_path):
    folder = make_export(tmp_path / "exported", seed=1)
    for stale in (".exported.1.tmp", ".exported.1.old", ".other.1.tmp"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "encoder.ckpt").write_bytes(b"half")
    make_export(folder, seed=2, num_spks=3)
    assert sorted(os.listdir(tmp_path)) == [".other.1.tmp", "exported"]
    assert SepformerDSDSeparation.from_hparams(source=folder).num_spks == 3


def test_failed_replacement_brings_the_old_one_back(tmp_path, monkeypatch):
    folder = make_export(tmp_path / "exported", seed=1)
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        make_export(folder, num_spks=3)
    assert SepformerDSDSeparation.from_hparams(source=folder).num_spks == 2
    assert os.listdir(tmp_path) == ["exported"]


def test_export_deletes_nothing_of_others(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex.*no part of an exported model"):
        make_export(tmp_path)
    with pytest.raises(ValueError, match=r"thesis\.tex is a file"):
        make_export(tmp_path / "thesis.tex")


def test_export_replaces_the_card_and_the_onnx_of_the_old_model(tmp_path):
    folder = make_export(tmp_path / "exported")
    for name in ("README.md", "separator_blocks1.onnx", "separator_blocks12.onnx"):
        (folder / name).write_bytes(b"of the old model")
    make_export(folder, seed=1)
    assert listing(folder) == ["decoder.ckpt", "encoder.ckpt", "hyperparams.yaml", "masknet.ckpt"]
    (folder / "separator_blocks0.onnx").write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match=r"separator_blocks0\.onnx.*no part of an exported model"):
        make_export(folder, seed=1)


def test_export_refuses_options_that_do_not_fit(tmp_path):
    modules = make_modules()
    with pytest.raises(ValueError, match=r"do not fit modules\['masknet'\]: conv2d.weight has shape \[32, .*\[48, "):
        export_model(tmp_path / "exported", HPARAMS, {**OPTIONS, "num_spks": 3}, modules)
    with pytest.raises(ValueError, match="The option d_ffn of the YAML is missing"):
        export_model(tmp_path / "exported", HPARAMS, {k: v for k, v in OPTIONS.items() if k != "d_ffn"}, modules)
    assert listing(tmp_path) == []


# Folders that must not be trusted


@pytest.mark.parametrize(
    ("old", "new", "tag"),
    [
        ("num_spks: 3", "num_spks: 3\nboom: !apply:os.system [touch ran]", "!apply:os.system"),
        ("num_spks: 3", "num_spks: 3\nboom: [{a: !applyref:os.system [touch ran]}]", "!applyref:os.system"),
        ("num_spks: 3", "num_spks: !include:other.yaml", "!include:other.yaml"),
        ("num_spks: 3", "num_spks: 3\nboom: !module:antigravity", "!module:antigravity"),
        (
            "num_spks: 3",
            "num_spks: 3\nboom: !!python/object/apply:os.system [touch ran]",
            "python/object/apply:os.system",
        ),
        ("# Parameters", "%TAG !x! !apply\n---\nboom: !x!ref:os.system [touch ran]", "!applyref:os.system"),
        ("num_spks: 3", "num_spks: !ref <Encoder.conv1d>", "!apply:getattr"),
        ("encoder: *encoder", "encoder: !new:subprocess.Popen\n    args: [touch, ran]", "!new:subprocess.Popen"),
        ("encoder: *encoder", "encoder: !new:os.system [touch ran]", "!new:os.system"),
        ("encoder: *encoder", "encoder: !name:speechbrain.lobes.models.dual_path.Encoder", "!name:speechbrain"),
        ("encoder: *encoder", "encoder: 3", "3"),
        (
            "intra_model: !ref <SBtfintra>",
            "intra_model: !new:subprocess.Popen {args: [touch, ran]}",
            "subprocess.Popen",
        ),
        ("intra_model: !ref <SBtfintra>", "other: 1", "must give intra_model"),
        ("N_encoder_out: 16", "N_encoder_out: sixteen", "cannot be built"),
        ("modules:", "parts:", "must hold a mapping `modules`"),
        ("# Parameters", "{", "cannot be read"),
        ("num_spks: 3", "num_spks: !PLACEHOLDER", "!PLACEHOLDER"),
        ("kernel_size: 16\n", "kernel_size: !ref <kernel_size>\n", "cannot be read"),
        ("num_spks: 3", "num_spks: 3\nsample_rate: fast", "sample_rate must be a whole number of Hz"),
        ("num_spks: 3", "num_spks: 3\nsample_rate: 2147483648", "up to 768000, but got 2147483648"),
        ("num_layers: 2\n  d_model", "num_layers: 100000000\n  d_model", "num_layers can only be up to 100, but"),
        ("  K: 20", "  K: 1000000000", "K can only be up to 100000, but got 1000000000"),
        ("stride: !ref <kernel_size> // 2", "stride: 7", "but got ((16,), (7,))"),
        ("stride: !ref <kernel_size> // 2", "stride: 0", "but got ((16,), (0,))"),
        ("# Parameters", "b0: &b0 [x, x]\n" + BOMB, "written out, are too long"),
        ("# Parameters", "a0: xxxxxxxxxx\n" + REFERENCES, "written out, are too long"),
        ("# Parameters", "a: &a [*a]", "written out, are too long"),
        ("# Parameters", "a: !ref <kernel_size> ** 99999999", "the arithmetic of '<kernel_size> ** 99999999'"),
        ("# Parameters", "a: '*99999999'\nb: !ref <kernel_size>*<a>", "the arithmetic of"),
        ("# Parameters", "a: \"'x'\"\nb: !ref <a>\nc: !ref <b> * 999999999", "the arithmetic of '<b> * 999999999'"),
        ("# Parameters", "#" * 2**20, "up to 1048576 bytes"),
    ],
)
def test_yaml_is_refused_and_runs_nothing(tmp_path, monkeypatch, old, new, tag):
    folder = make_published(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("boom: !applyref:os.system [touch ran]")
    assert old in PUBLISHED
    (folder / "hyperparams.yaml").write_text(PUBLISHED.replace(old, new, 1))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (checked below)
        SepformerDSDSeparation.from_hparams(source=folder)
    assert tag in str(error.value)
    assert "hyperparams.yaml" in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_needed_is_not_built(tmp_path):
    """Published folders may hold more of SpeechBrain, and a training's optimizer."""
    text = (
        PUBLISHED + "\nlogger: !new:speechbrain.utils.train_logger.FileTrainLogger\n  save_file: ran\n"
        "optimizer: !name:torch.optim.Adam\n  lr: 0.1\n"
    )
    folder = make_published(tmp_path / "model")
    (folder / "hyperparams.yaml").write_text(text)
    assert SepformerDSDSeparation.from_hparams(source=folder).num_spks == 3


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("logger: !new:subprocess.Popen\n  args: [touch, ran]", "!new:subprocess.Popen"),
        ("run: !name:os.system\n  command: touch ran", "!name:os.system"),
        ("a: {b: [1, {c: !new:subprocess.Popen {args: [touch, ran]}}]}", "!new:subprocess.Popen"),
        ("a: !apply:os.system [touch ran]", "!apply:os.system"),
        ("a: {b: [1, {c: !apply:os.system [touch ran]}]}", "!apply:os.system"),
        ("a: {b: [1, !applyref:os.system [touch ran]]}", "!applyref:os.system"),
        ("a: [[!include:other.yaml ]]", "!include:other.yaml"),
        ("a: {b: !module:antigravity }", "!module:antigravity"),
        ("? !apply:os.system [touch ran]\n: 1", "!apply:os.system"),
        ("a: !!python/name:os.system ''", "python/name:os.system"),
        ("a: {b: !!python/object/new:subprocess.Popen [[touch, ran]]}", "python/object/new:subprocess.Popen"),
    ],
)
def test_what_stands_beside_the_model_is_refused(tmp_path, monkeypatch, text, tag):
    """Also under a key that nothing refers to, and deep inside it."""
    folder = make_published(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("boom: !applyref:os.system [touch ran]")
    (folder / "hyperparams.yaml").write_text(f"{PUBLISHED}\n{text}\n")
    with pytest.raises(ValueError, match=re.escape(tag)) as error:
        SepformerDSDSeparation.from_hparams(source=folder)
    assert "hyperparams.yaml" in str(error.value)
    assert not (tmp_path / "ran").exists()


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("load", ["from_hparams", "load_weights"])
def test_malicious_checkpoint_is_refused(tmp_path, monkeypatch, protocol, load):
    folder = make_export(tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    modules = make_modules()
    path = folder / "masknet.ckpt"
    for in_archive in (True, False):
        if in_archive:
            torch.save({"a": Payload()}, path, pickle_protocol=protocol)
        else:
            path.write_bytes(pickle.dumps(Payload(), protocol))
        with pytest.raises(ValueError, match=r"masknet\.ckpt is no checkpoint"):
            load_weights(folder, modules) if load == "load_weights" else SepformerDSDSeparation.from_hparams(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no checkpoint"),
        (b"RIFF" + bytes(100), "is no checkpoint"),
        ([torch.zeros(1)], "expected tensors by name, but got list"),
        ({"conv1d.weight": torch.full((16, 1, 16), math.nan)}, "NaN or infinite, first in conv1d.weight"),
        ({"conv1d.weight": torch.zeros(16, 1, 8)}, r"conv1d.weight has shape \[16, 1, 8\], but expected \[16, 1, 16\]"),
        ({}, r"lacks conv1d.weight \[16, 1, 16\]"),
        ({"conv1d.weight": torch.zeros(16, 1, 16), "b": torch.zeros(2)}, r"holds b \[2\], which is not expected"),
        (None, r"holds no encoder\.ckpt"),
    ],
)
def test_broken_checkpoint_names_the_fault(tmp_path, content, message):
    folder = make_export(tmp_path / "exported")
    path = folder / "encoder.ckpt"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        SepformerDSDSeparation.from_hparams(source=folder)
    assert str(folder) in str(error.value)
    with pytest.raises(ValueError, match=message):
        load_weights(folder, make_modules())


@pytest.mark.parametrize("name", ["exported", "./exported", "../my/exported", "/models/exported", "a/b/exported"])
def test_missing_folder_and_yaml(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    for source in (name, Path("models/exported")):
        message = re.escape(f"{source} was not found; expected a local folder with encoder.ckpt")
        with pytest.raises(ValueError, match=message):
            SepformerDSDSeparation.from_hparams(source)
    with pytest.raises(ValueError, match=r"holds no hyperparams\.yaml"):
        SepformerDSDSeparation.from_hparams(source=tmp_path)


def test_the_folder_of_a_run_gives_its_exported_model(tmp_path):
    exported = make_export(tmp_path / "run" / "exported")
    (tmp_path / "run" / "hyperparams.yaml").write_text("of: the training")
    expected = read_model(exported)[0]
    modules = make_modules(seed=1)
    load_weights(str(tmp_path / "run"), modules)
    for name, module in read_model(tmp_path / "run")[0].items():
        for key, weight in module.state_dict().items():
            assert torch.equal(weight, expected[name].state_dict()[key])
            assert torch.equal(weight, modules[name].state_dict()[key])


# The Hugging Face hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has one model; what it was asked for."""
    asked = []
    published = make_published(tmp_path / "hub")

    def snapshot_download(repo_id, revision=None, allow_patterns=None, cache_dir=None):
        asked.append((repo_id, revision, sorted(allow_patterns)))
        return str(published)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_model_of_the_hub_is_downloaded(hub):
    """Its four files alone, and the revision that is wanted."""
    separator = SepformerDSDSeparation.from_hparams("speechbrain/sepformer-libri2mix")
    assert separator.num_spks == 3
    modules = make_modules(num_spks=3, num_heads=4, num_intra_layers=2)
    load_weights("speechbrain/sepformer-libri2mix@a1b2c3", modules)
    mixture = torch.randn(2, 700)
    torch.testing.assert_close(separate_with(modules, mixture), separator.separate_batch(mixture))
    files = ["decoder.ckpt", "encoder.ckpt", "hyperparams.yaml", "masknet.ckpt"]
    name = "speechbrain/sepformer-libri2mix"
    assert hub == [(name, None, files), (name, "a1b2c3", files)]


def test_a_local_folder_of_a_hubs_name_is_not_downloaded(tmp_path, hub):
    (tmp_path / "owner").mkdir()
    make_export(tmp_path / "owner" / "name")
    assert SepformerDSDSeparation.from_hparams("owner/name").num_spks == 2
    load_weights("owner/name", make_modules())
    assert hub == []


def test_a_folder_of_the_hub_is_not_trusted(hub, tmp_path):
    torch.save({"a": Payload()}, tmp_path / "hub" / "masknet.ckpt")
    with pytest.raises(ValueError, match=r"masknet\.ckpt is no checkpoint"):
        SepformerDSDSeparation.from_hparams("owner/name")
    (tmp_path / "hub" / "hyperparams.yaml").write_text("boom: !apply:os.system [touch ran]\n" + PUBLISHED)
    with pytest.raises(ValueError, match=r"tag !apply:os\.system is not allowed"):
        SepformerDSDSeparation.from_hparams("owner/name")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (LocalEntryNotFoundError("Got: ConnectError: no route\nAn error happened\n"), "Got: ConnectError: no route"),
        (OfflineModeIsEnabled("offline mode is enabled."), "offline mode is enabled."),
        (make_hub_error(RepositoryNotFoundError), "it has no public model of this name."),
        (make_hub_error(RevisionNotFoundError), "the model has no such revision."),
        (TimeoutError(), "TimeoutError"),
    ],
)
@pytest.mark.parametrize("load", ["read_model", "load_weights"])
def test_a_fault_of_the_hub_is_told_in_one_sentence(monkeypatch, fault, message, load):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="owner/name@v1 was not found; expected a local folder") as error:
        read_model("owner/name@v1") if load == "read_model" else load_weights("owner/name@v1", make_modules())
    assert str(error.value).endswith(f"Hugging Face hub, which did not give it: {message}")
    assert "\n" not in str(error.value)


# Fine-tuning


def test_fine_tuning_starts_from_the_weights(tmp_path, exported):
    modules = make_modules(seed=5)
    load_weights(str(exported), torch.nn.ModuleDict(modules))
    mixture = torch.randn(2, 700)
    torch.testing.assert_close(separate_with(modules, mixture), separate_with(make_modules(0), mixture), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in modules["masknet"].parameters())


def test_fine_tuning_from_a_published_folder(tmp_path):
    folder = make_published(tmp_path / "published")
    modules = make_modules(num_spks=3, num_heads=4, num_intra_layers=2)
    load_weights(folder, modules)
    mixture = torch.randn(2, 700)
    torch.testing.assert_close(
        separate_with(modules, mixture), SepformerDSDSeparation.from_hparams(folder).separate_batch(mixture)
    )
    (folder / "hyperparams.yaml").unlink()  # weights alone, as in a SpeechBrain checkpoint
    load_weights(folder, modules)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_spks": 3}, r"masknet\.ckpt .*conv2d.weight has shape \[32, 16, 1, 1\], but expected \[48, 16, 1, 1\]"),
        ({"num_blocks": 3}, r"masknet\.ckpt .*lacks dual_mdl\.2\."),
        ({"num_blocks": 1}, r"masknet\.ckpt .*holds dual_mdl\.1\."),
        ({"kernel_size": 8}, r"encoder\.ckpt .*conv1d.weight has shape \[16, 1, 16\], but expected \[16, 1, 8\]"),
        ({"d_ffn": 64}, r"masknet\.ckpt .*pos_ffn"),
        ({"num_heads": 4}, r"hyperparams\.yaml .*its number of attention heads is 2, but expected 4"),
    ],
)
def test_fine_tuning_refuses_another_model(exported, changes, message):
    modules = make_modules(3, **changes)
    before = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}
    with pytest.raises(ValueError, match=message) as error:
        load_weights(exported, modules)
    assert str(exported) in str(error.value)
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name][key])


def test_a_yaml_that_is_no_file(tmp_path):
    folder = make_published(tmp_path / "model")
    (folder / "hyperparams.yaml").unlink()
    os.mkfifo(folder / "hyperparams.yaml")  # which a reader would wait for
    with pytest.raises(ValueError, match="can only be a file"):
        read_model(folder)
    (folder / "hyperparams.yaml").unlink()
    (folder / "hyperparams.yaml").mkdir()
    with pytest.raises(ValueError, match="can only be a file"):
        read_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to(torch.complex64), "can only be floating-point numbers, but got torch.complex64"),
        (lambda weight: weight.to(torch.int64), "can only be floating-point numbers, but got torch.int64"),
        (lambda weight: weight.to_sparse(), "can only be floating-point numbers"),
        (lambda weight: weight[:1, :1, :1].expand(10**6, 10**6, 1), "is larger than what the file holds of it"),
    ],
)
def test_weights_that_are_no_weights(tmp_path, change, message):
    folder = make_published(tmp_path / "model")
    state = torch.load(folder / "encoder.ckpt", weights_only=True)
    torch.save({key: change(weight) for key, weight in state.items()}, folder / "encoder.ckpt")
    with pytest.raises(ValueError, match=message):
        read_model(folder)
