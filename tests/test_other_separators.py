"""DPRNN and Conv-TasNet: the same recipe with another YAML, and SpeechBrain's own folders of them."""

import csv
import sys

import pytest
import torch
from conftest import HPARAMS, TINY, TINY_MODEL, arguments
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.lobes.models.conv_tasnet import MaskNet
from speechbrain.lobes.models.dual_path import Decoder, Dual_Path_Model, Encoder, SBRNNBlock

from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.masknet import DualPathMaskNet
from dsd_modules.model_folder import load_weights, model_options, read_model
from dsd_modules.options import EXPECTED, check_options, read_options
from dsd_modules.report import read_history
from dsd_modules.separator import separate
from dsd_modules.tasnet import ConvTasNetMaskNet

DPRNN = HPARAMS.with_name("dprnn_dsd.yaml")
CONVTASNET = HPARAMS.with_name("convtasnet_dsd.yaml")
TINY_MODELS = {
    DPRNN: {"num_filters": 16, "chunk_size": 20, "num_blocks": 3, "hidden_channels": 12},
    CONVTASNET: {
        "num_filters": 16,
        "num_blocks": 3,
        "num_conv_layers": 3,
        "conv_kernel": 5,
        "bottleneck_channels": 12,
        "hidden_channels": 24,
    },
}
ALL = [HPARAMS, DPRNN, CONVTASNET]


def build_modules(hparams_file, **overrides):
    """The modules of a YAML's model section."""
    text = hparams_file.read_text(encoding="utf-8")
    section = text[text.rindex("\n# Model: ") : text.index("\npit_loss: ")]
    torch.manual_seed(0)
    return load_hyperpyyaml("num_spks: 2\nsample_rate: 8000\n" + section, overrides)["modules"]


# --- the YAMLs ---


def parts(hparams_file):
    """What stands before the model section, but for the header, and what stands behind it."""
    text = hparams_file.read_text(encoding="utf-8")
    name = hparams_file.name.removesuffix("_dsd.yaml")
    before, model_and_rest = text[text.index("\n# Seed of") :].split("\n# Model: ")
    return before.replace(f"results/{name}_dsd_", "results/"), model_and_rest.split("\nmodules:\n")[1]


@pytest.mark.parametrize("hparams_file", [DPRNN, CONVTASNET])
def test_only_the_model_differs_from_sepformers_yaml(hparams_file):
    assert parts(hparams_file) == parts(HPARAMS)


@pytest.mark.parametrize("hparams_file", ALL)
def test_every_option_is_checked_and_explained(hparams_file):
    _, options = read_options(hparams_file)
    check_options(options)
    lines = hparams_file.read_text(encoding="utf-8").splitlines()
    nulls = {line.split(":")[0] for line in lines if ": null #" in line}
    for name in nulls | {name for name, value in options.items() if isinstance(value, str | int | float | list)}:
        (number,) = [number for number, line in enumerate(lines) if line.startswith(f"{name}:")]
        comment = lines[number].partition(" #")[2] or lines[number - 1].partition("# ")[2]
        assert len(comment) > 3, name
        _, expected = EXPECTED[name]
        choices = expected.removeprefix("one of ").split(", ") if expected.startswith("one of ") else []
        assert all(choice in comment for choice in choices), name


def test_no_check_is_for_an_option_of_no_yaml():
    assert set(EXPECTED) <= {name for hparams_file in ALL for name in read_options(hparams_file)[1]}


@pytest.mark.parametrize("hparams_file", [DPRNN, CONVTASNET])
def test_the_options_that_a_checkpoint_fixes(hparams_file):
    names = {"num_spks", "sample_rate", "kernel_size", *TINY_MODELS[hparams_file]}
    assert set(model_options(hparams_file)) == names


@pytest.mark.parametrize(
    ("hparams_file", "name", "value", "message"),
    [
        (DPRNN, "hidden_channels", 0, "--hidden_channels can only be a whole number of at least 1, but got 0"),
        (DPRNN, "num_heads", 2, "no option --num_heads"),
        (CONVTASNET, "conv_kernel", 4, "--conv_kernel can only be an odd whole number of at least 1, but got 4"),
        (CONVTASNET, "num_conv_layers", 2.5, "but got 2.5"),
    ],
)
def test_an_option_out_of_range(recipe, hparams_file, name, value, message):
    with pytest.raises(SystemExit) as stop:
        recipe.main([str(hparams_file), *arguments({"device": "cpu", name: value})])
    assert message in stop.value.code


def test_defaults_are_the_published_models():
    """The weights of SpeechBrain's classes in the published sizes; DPRNN has the 2.6 million of its paper."""
    coders = {"encoder": Encoder(16, 64), "decoder": Decoder(64, 1, kernel_size=16, stride=8, bias=False)}
    lstms = [SBRNNBlock(64, 128, 1, bidirectional=True) for _ in range(2)]
    dprnn = {**coders, "masknet": Dual_Path_Model(64, 64, *lstms, num_layers=6, K=100, num_spks=2)}
    coders = {"encoder": Encoder(16, 512), "decoder": Decoder(512, 1, kernel_size=16, stride=8, bias=False)}
    convtasnet = {**coders, "masknet": MaskNet(N=512, B=128, H=512, P=3, X=8, R=3, C=2)}
    for hparams_file, expected, millions in ((DPRNN, dprnn, 2.6), (CONVTASNET, convtasnet, 3.4)):
        modules = build_modules(hparams_file)
        num_weights = sum(p.numel() for module in modules.values() for p in module.parameters())
        assert round(num_weights / 1e6, 1) == millions
        for name, module in modules.items():
            ours, theirs = module.state_dict(), expected[name].state_dict()
            assert {k: w.shape for k, w in ours.items()} == {k: w.shape for k, w in theirs.items()}


# --- the recipe ---


@pytest.fixture(scope="module", params=[DPRNN, CONVTASNET], ids=["dprnn", "convtasnet"])
def run(request, recipe, librimix, tmp_path_factory):
    """A YAML, and the folder of a run with it."""
    folder = tmp_path_factory.mktemp(request.param.stem) / "run"
    options = {name: value for name, value in TINY.items() if name not in TINY_MODEL}
    options |= {"number_of_epochs": 4, "segment_seconds": 0.1, "data_folder": librimix, "output_folder": folder}
    hook = sys.excepthook
    recipe.main([str(request.param), *arguments({**options, **TINY_MODELS[request.param]})])
    sys.excepthook = hook
    return request.param, folder


def test_the_recipe_trains_it(run):
    """Each block, or repeat, has a loss, which falls; and the rule excludes mixtures."""
    history = read_history(run[1] / "history.csv")
    for column in ("train_loss_block1", "train_loss_block2", "train_loss_block3", "valid_loss"):
        assert history[-1][column] < history[0][column] - 0.5, column
    assert sum(row["label_switches"] for row in history) > 0
    assert sum(row["dropped_samples"] for row in history) > 0
    with open(run[1] / "test_results.csv", newline="") as stream:
        mean = list(csv.DictReader(stream))[-1]
    assert float(mean["si_sdri_block1"]) != float(mean["si_sdri_block3"])


def test_its_export_separates_as_the_checkpoint(run, tmp_path):
    """Here and in SpeechBrain; it says what the model is, and no more."""
    hparams_file, folder = run
    (best,) = [path for path in (folder / "save").iterdir() if is_best(folder, path)]
    modules = build_modules(hparams_file, **TINY_MODELS[hparams_file])
    for name, module in modules.items():
        module.load_state_dict(torch.load(best / f"{name}.ckpt", weights_only=True))
    mixture = torch.randn(3, 1003)
    expected = separate(**modules, mixture=mixture, lengths=[1003, 400, 60]).transpose(1, 2)  # [B, T, N]
    separator = SepformerDSDSeparation.from_hparams(folder / "exported")
    assert (separator.num_spks, separator.sample_rate, separator.num_blocks) == (2, 8000, 3)
    torch.testing.assert_close(separator.separate_batch(mixture, [1003, 400, 60]), expected)
    theirs = SepformerSeparation.from_hparams(source=str(folder / "exported"), savedir=str(tmp_path / "savedir"))
    estimates = theirs.separate_batch(mixture[:1])
    torch.testing.assert_close(estimates, separator.separate_batch(mixture[:1]), rtol=1e-4, atol=1e-5)
    text = (folder / "exported" / "hyperparams.yaml").read_text()
    for word in ("optimizer", "memory_bank", "checkpoint", "!apply", "seed", "_folder"):
        assert word not in text


def is_best(folder, checkpoint):
    """Whether a checkpoint is that of the epoch with the best validation."""
    history = read_history(folder / "history.csv")
    best = max(history, key=lambda row: row["valid_si_sdri"])
    return f"epoch: {best['epoch']}\n" in (checkpoint / "CKPT.yaml").read_text()


def test_another_run_starts_from_its_export(run, recipe, librimix, tmp_path):
    hparams_file, folder = run
    options = {name: value for name, value in TINY.items() if name not in TINY_MODEL}
    options |= {"pretrained_folder": folder / "exported", "data_folder": librimix, "output_folder": tmp_path / "run"}
    options |= {"number_of_epochs": 1, "lr": 1e-9, "activation_checkpointing": True, "test_at_end": False}
    hook = sys.excepthook
    recipe.main([str(hparams_file), *arguments({**options, **TINY_MODELS[hparams_file]})])
    sys.excepthook = hook
    earlier, (row,) = read_history(folder / "history.csv"), read_history(tmp_path / "run" / "history.csv")
    assert row["valid_loss"] == pytest.approx(min(e["valid_loss"] for e in earlier), abs=0.2)


# --- folders of SpeechBrain's own classes ---

CODERS = """
encoder: !new:speechbrain.lobes.models.dual_path.Encoder
  kernel_size: 16
  out_channels: 16
decoder: !new:speechbrain.lobes.models.dual_path.Decoder
  in_channels: 16
  out_channels: 1
  kernel_size: 16
  stride: 8
  bias: false
modules:
  encoder: !ref <encoder>
  decoder: !ref <decoder>
  masknet: !ref <masknet>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
    encoder: !ref <encoder>
    decoder: !ref <decoder>
    masknet: !ref <masknet>
"""
SPEECHBRAIN_DPRNN = """
num_spks: 3
intra: &intra !new:speechbrain.lobes.models.dual_path.SBRNNBlock
  input_size: 12
  hidden_channels: 10
  num_layers: 1
  rnn_type: GRU
  bidirectional: true
masknet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
  num_spks: !ref <num_spks>
  in_channels: 16
  out_channels: 12
  num_layers: 2
  K: 20
  intra_model: *intra
  inter_model: *intra
  norm: ln
  linear_layer_after_inter_intra: true
  skip_around_intra: true
"""
SPEECHBRAIN_CONVTASNET = """
num_spks: 3
masknet: !new:speechbrain.lobes.models.conv_tasnet.MaskNet
  N: 16
  B: 12
  H: 20
  P: 3
  X: 4
  R: 2
  C: !ref <num_spks>
  norm_type: 'gLN'
  causal: false
  mask_nonlinear: 'relu'
"""


def make_published(folder, text):
    torch.manual_seed(7)
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(text + CODERS)
    for name, module in load_hyperpyyaml(text + CODERS)["modules"].items():
        for parameter in module.parameters():  # SpeechBrain's blocks start as copies of one
            torch.nn.init.normal_(parameter, std=0.2)
        torch.save(module.state_dict(), folder / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize(
    ("text", "masknet_class"), [(SPEECHBRAIN_DPRNN, DualPathMaskNet), (SPEECHBRAIN_CONVTASNET, ConvTasNetMaskNet)]
)
def test_a_folder_of_speechbrains_classes_is_read(tmp_path, text, masknet_class):
    folder = make_published(tmp_path / "published", text)
    theirs = SepformerSeparation.from_hparams(source=str(folder), savedir=str(tmp_path / "savedir"))
    random_state = torch.random.get_rng_state()
    ours = SepformerDSDSeparation.from_hparams(folder)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert type(ours.mods["masknet"]) is masknet_class
    assert (ours.num_spks, ours.num_blocks) == (3, 2)
    mixture = torch.randn(1, 3003)
    torch.testing.assert_close(ours.separate_batch(mixture), theirs.separate_batch(mixture), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rnn_type: GRU", "rnn_type: get_logger", "rnn_type can only be LSTM, GRU, RNN, but got 'get_logger'"),
        ("rnn_type: GRU", "rnn_type: [GRU]", r"rnn_type can only be LSTM, GRU, RNN, but got \['GRU'\]"),
        ("SBRNNBlock", "DPTNetBlock", "intra_model can only be .*SBRNNBlock, but got .*DPTNetBlock"),
        ("  inter_model: *intra\n", "", "must give inter_model"),
        ("bidirectional: true", "bidirectional: false", "cannot be built: .* must be bidirectional"),
    ],
)
def test_another_wiring_is_refused(tmp_path, old, new, message):
    assert SPEECHBRAIN_DPRNN.count(old) == 1
    folder = make_published(tmp_path / "published", SPEECHBRAIN_DPRNN)
    (folder / "hyperparams.yaml").write_text(SPEECHBRAIN_DPRNN.replace(old, new) + CODERS)
    with pytest.raises(ValueError, match=message):
        read_model(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm_type", "cLN", "its norm_type is gLN, but expected cLN"),
        ("causal", True, "its causal is False, but expected True"),
        ("mask_nonlinear", "softmax", "its mask_nonlinear is relu, but expected softmax"),
        ("X", 3, "masknet.ckpt does not fit the model: it holds temporal_conv_net.temporalblock_0_3"),
    ],
)
def test_fine_tuning_refuses_what_no_weight_shows(tmp_path, name, value, message):
    folder = make_published(tmp_path / "published", SPEECHBRAIN_CONVTASNET)
    sizes = {"N": 16, "B": 12, "H": 20, "P": 3, "X": 4, "R": 2, "C": 3}
    coders = {"encoder": Encoder(16, 16), "decoder": Decoder(16, 1, kernel_size=16, stride=8, bias=False)}
    load_weights(folder, {**coders, "masknet": ConvTasNetMaskNet(**sizes)})
    with pytest.raises(ValueError, match=message):
        load_weights(folder, {**coders, "masknet": ConvTasNetMaskNet(**{**sizes, name: value})})
