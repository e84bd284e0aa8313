"""Tests of exported folders, fine-tuning, and the separation of batches and recordings."""

import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.lobes.models.dual_path import Dual_Path_Model

import dsd_modules.inference
from dsd_modules.inference import SepformerDSDSeparation, export_model, load_weights, save_estimates
from dsd_modules.separator import separate

OPTIONS = {
    "num_spks": 2,
    "sample_rate": 8000,
    "num_filters": 16,
    "kernel_size": 16,
    "chunk_size": 20,
    "num_blocks": 2,
    "num_intra_layers": 1,
    "num_inter_layers": 1,
    "num_heads": 2,
    "d_ffn": 32,
}

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
    return load_hyperpyyaml(dsd_modules.inference._HPARAMS.format(**{**OPTIONS, **changes}))["modules"]


def make_export(folder, seed=0, **changes):
    return export_model(folder, {**OPTIONS, **changes}, make_modules(seed, **changes))


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


def separate_with(modules, mixture):
    return separate(modules["encoder"], modules["masknet"], modules["decoder"], mixture).transpose(1, 2)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("model") / "exported")


@pytest.fixture(scope="module")
def separator(exported):
    return SepformerDSDSeparation.from_hparams(source=exported)


# Export and load


@pytest.mark.parametrize("num_spks", [2, 3])
def test_round_trip_equals_the_modules(tmp_path, num_spks):
    modules = make_modules(num_spks=num_spks)
    folder = export_model(tmp_path / "runs" / "exported", {**OPTIONS, "num_spks": num_spks, "lr": 0.1}, modules)
    separator = SepformerDSDSeparation.from_hparams(source=str(folder), savedir="ignored")
    assert (separator.num_spks, separator.sample_rate, separator.num_blocks) == (num_spks, 8000, 2)
    mixture = torch.randn(3, 1003)
    estimates = separator.separate_batch(mixture)
    assert estimates.shape == (3, 1003, num_spks)
    assert not estimates.requires_grad
    torch.testing.assert_close(estimates, separate_with(modules, mixture), rtol=0, atol=0)


def test_separates_the_same_in_speechbrain(tmp_path, exported, separator):
    theirs = SepformerSeparation.from_hparams(source=str(exported), savedir=str(tmp_path / "savedir"))
    mixture = torch.randn(1, 1003)
    torch.testing.assert_close(separator.separate_batch(mixture), theirs.separate_batch(mixture), rtol=1e-4, atol=1e-5)


def test_loads_a_published_folder(tmp_path):
    folder = make_published(tmp_path / "published")
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


def test_the_wiring_is_that_of_the_recipe():
    recipe = Path(__file__).parents[1] / "recipes/LibriMix/separation/hparams/sepformer_dsd.yaml"
    first, last = "\nencoder: !new:", "    decoder: !ref <decoder>\n"
    texts = [recipe.read_text(encoding="utf-8"), dsd_modules.inference._HPARAMS]
    wirings = [text[text.index(first) : text.index(last, text.index("\nmodules:"))] for text in texts]
    assert wirings[0] == wirings[1]


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


def test_export_refuses_options_that_do_not_fit(tmp_path):
    modules = make_modules()
    with pytest.raises(ValueError, match=r"do not fit modules\['masknet'\]: conv2d.weight has shape \[32, .*\[48, "):
        export_model(tmp_path / "exported", {**OPTIONS, "num_spks": 3}, modules)
    with pytest.raises(ValueError, match="d_ffn must be a whole number, but got None"):
        export_model(tmp_path / "exported", {k: v for k, v in OPTIONS.items() if k != "d_ffn"}, modules)
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
        ("num_spks: 3", "num_spks: 3\nsample_rate: fast", "sample_rate must be a whole number of Hz, but got 'fast'"),
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
    text = (
        PUBLISHED
        + "\nlogger: !new:subprocess.Popen\n  args: [touch, ran]\nrun: !name:os.system\n  command: touch ran\n"
    )
    folder = make_published(tmp_path / "model")
    (folder / "hyperparams.yaml").write_text(text)
    assert SepformerDSDSeparation.from_hparams(source=folder).num_spks == 3
    assert not os.path.exists("ran")


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


def test_missing_folder_and_yaml(tmp_path):
    with pytest.raises(
        ValueError, match=r"sepformer-wsj02mix was not found; expected a local folder with encoder\.ckpt"
    ):
        SepformerDSDSeparation.from_hparams(source="speechbrain/sepformer-wsj02mix")
    with pytest.raises(ValueError, match=r"holds no hyperparams\.yaml"):
        SepformerDSDSeparation.from_hparams(source=tmp_path)
    with pytest.raises(ValueError, match="device can only be one of this machine, but got 'tpu9'"):
        SepformerDSDSeparation.from_hparams(make_export(tmp_path / "exported"), run_opts={"device": "tpu9"})


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
        ({"num_heads": 4}, r"hyperparams\.yaml .*have 2 heads, but expected 4"),
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


# Batches


def test_padded_items_equal_items_alone(separator):
    lengths = [1203, 700, 16, 7, 1, 1200]
    mixture = torch.randn(6, 1203)
    padded = mixture.clone()
    for item, length in zip(padded, lengths, strict=True):
        item[length:] = math.nan  # what lies beyond does not matter
    for given in (lengths, torch.tensor(lengths)):
        estimates = separator.separate_batch(padded, given)
        for b, length in enumerate(lengths):
            alone = separator.separate_batch(mixture[b : b + 1, :length])
            assert alone.shape == (1, length, 2)
            torch.testing.assert_close(estimates[b, :length], alone[0], rtol=1e-3, atol=1e-5)
            assert estimates[b, length:].count_nonzero() == 0


@pytest.mark.parametrize("num_samples", [1, 15, 16, 17])
def test_short_mixtures_keep_their_length(separator, num_samples):
    estimates = separator.separate_batch(torch.randn(2, num_samples, dtype=torch.float64))
    assert estimates.shape == (2, num_samples, 2)
    assert estimates.dtype == torch.float32
    assert estimates.isfinite().all()


@pytest.mark.parametrize(
    ("mix", "lengths", "message"),
    [
        (torch.randn(100), None, r"\[B, T\], but got torch.float32 \[100\]"),
        (torch.randn(1, 1, 100), None, r"but got torch.float32 \[1, 1, 100\]"),
        (torch.ones(1, 100, dtype=torch.int16), None, r"but got torch.int16 \[1, 100\]"),
        (np.zeros((1, 100)), None, "numpy.ndarray"),
        (torch.randn(2, 0), None, r"must not be empty, but got shape \[2, 0\]"),
        (torch.randn(0, 100), None, r"must not be empty, but got shape \[0, 100\]"),
        (torch.tensor([[0.0, math.nan]]), None, "NaN or infinite"),
        (torch.tensor([[0.0, math.inf]]), [2], "NaN or infinite"),
        (torch.randn(2, 100), [100], r"shape \[2\], but got torch.int64 \[1\]"),
        (torch.randn(2, 100), [1.0, 0.5], "whole numbers of samples"),
        (torch.randn(2, 100), [100, 0], r"lie in \[1, 100\] samples, but got \[100, 0\]"),
        (torch.randn(2, 100), [101, 5], r"lie in \[1, 100\] samples, but got \[101, 5\]"),
    ],
)
def test_bad_batches_are_refused(separator, mix, lengths, message):
    with pytest.raises(ValueError, match=message):
        separator.separate_batch(mix, lengths)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu(tmp_path, exported, separator):
    modules = {name: module.cuda() for name, module in make_modules().items()}
    folder = export_model(tmp_path / "from_gpu", OPTIONS, modules)
    assert all(t.device.type == "cpu" for t in torch.load(folder / "masknet.ckpt", weights_only=True).values())
    ours = SepformerDSDSeparation.from_hparams(folder, run_opts={"device": "cuda"})
    mixture = torch.randn(2, 900)
    estimates = ours.separate_batch(mixture, [900, 333])
    assert estimates.device.type == "cuda"
    torch.testing.assert_close(estimates.cpu(), separator.separate_batch(mixture, [900, 333]), rtol=1e-2, atol=1e-3)
    soundfile.write(tmp_path / "mix.wav", mixture[0].numpy() * 0.1, 8000)
    assert ours.separate_file(tmp_path / "mix.wav").shape == (900, 2)


# Recordings


def speech_like(num_samples, sample_rate=8000, num_voices=2, seed=0):
    """Band-limited noises with slowly varying levels [T, N]."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num_samples, num_voices))
    noise = scipy.signal.sosfilt(
        scipy.signal.butter(4, [200, 3000], "bandpass", fs=sample_rate, output="sos"), noise, 0
    )
    phase = np.arange(num_voices) + 2 * np.pi * 2 * np.arange(num_samples)[:, None] / sample_rate
    return (0.05 * noise * (1 + np.sin(phase))).astype(np.float32)


@pytest.mark.parametrize(
    ("sample_rate", "channels", "suffix", "num_samples"),
    [
        (8000, 1, "wav", 4000),
        (8000, 2, "wav", 4000),
        (44100, 2, "wav", 4001),
        (16000, 1, "flac", 8001),
        (11025, 3, "ogg", 99),
    ],
)
def test_recordings_of_any_form(tmp_path, separator, sample_rate, channels, suffix, num_samples):
    path = tmp_path / f"mix.{suffix}"
    soundfile.write(path, speech_like(num_samples, 2 * 8000, channels), sample_rate)
    estimates = separator.separate_file(path)
    assert estimates.shape == (math.ceil(num_samples * 8000 / sample_rate), 2)
    assert estimates.dtype == torch.float32
    assert estimates.isfinite().all()
    assert estimates.abs().max() <= 1


def test_stereo_is_averaged_and_resampled(tmp_path, separator, monkeypatch):
    """A tone of the mean of the channels keeps its level and its place in time."""
    times = np.arange(44100) / 44100
    tone = 0.4 * np.sin(2 * np.pi * 440 * times)
    soundfile.write(tmp_path / "mix.wav", np.stack([1.5 * tone, 0.5 * tone], 1), 44100, subtype="FLOAT")
    heard = []
    monkeypatch.setattr(separator, "separate_batch", lambda mix: heard.append(mix) or mix[..., None].expand(-1, -1, 2))
    estimates = separator.separate_file(tmp_path / "mix.wav")
    expected = torch.from_numpy(0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)).float()
    torch.testing.assert_close(estimates.sum(1)[100:-100], expected[100:-100], atol=2e-3, rtol=0)
    assert heard[0].square().mean().sqrt() == pytest.approx(0.05)


@pytest.mark.parametrize("gain", [1e-5, 1e4])
def test_the_level_of_a_recording_does_not_matter(tmp_path, separator, gain):
    mixture = 0.1 * speech_like(4000).sum(1)
    voices = []
    for level in (1, gain):
        soundfile.write(tmp_path / "mix.wav", level * mixture, 8000, subtype="FLOAT")
        voices.append(separator.separate_file(tmp_path / "mix.wav"))
    loudest = max(1, (gain * voices[0]).abs().max().item())
    torch.testing.assert_close(voices[1], gain * voices[0] / loudest, rtol=1e-3, atol=1e-5 * min(gain, 1))


@pytest.mark.parametrize("num_samples", [1, 5, 17])
def test_short_recordings(tmp_path, separator, num_samples):
    soundfile.write(tmp_path / "mix.wav", 0.1 * np.ones(num_samples), 8000)
    assert separator.separate_file(tmp_path / "mix.wav").shape == (num_samples, 2)


@pytest.mark.parametrize("sample_rate", [8000, 44100])
def test_silence_gives_silence(tmp_path, separator, sample_rate):
    soundfile.write(tmp_path / "mix.wav", np.zeros((3000, 2)), sample_rate)
    estimates = separator.separate_file(tmp_path / "mix.wav")
    assert estimates.isfinite().all()
    assert estimates.count_nonzero() == 0


@pytest.mark.parametrize("num_spks", [2, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_perfect_voices_get_their_levels_back(tmp_path, monkeypatch, num_spks, turned):
    """Of whatever scale and sign the network gives: training with SI-SDR sees neither."""
    separator = SepformerDSDSeparation.from_hparams(make_export(tmp_path / "exported", num_spks=num_spks))
    sources = speech_like(8000, num_voices=num_spks) * np.array([1, 0.1, 0.5])[:num_spks]
    soundfile.write(tmp_path / "mix.wav", sources.sum(1), 8000, subtype="FLOAT")
    scales = torch.tensor([30.0, 0.01, 5.0])[:num_spks] * (-1 if turned else 1)
    monkeypatch.setattr(separator, "separate_batch", lambda mix: torch.from_numpy(sources).float()[None] * scales)
    estimates = separator.separate_file(tmp_path / "mix.wav")
    torch.testing.assert_close(estimates, torch.from_numpy(sources).float(), rtol=1e-3, atol=1e-5)


def test_gains_are_the_best_that_are_not_negative():
    """Against a search over the voices that may be off, on correlated estimates."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        estimates = rng.standard_normal((200, 3)) + 2 * rng.standard_normal((200, 1))
        mixture = estimates @ rng.standard_normal(3) + rng.standard_normal(200)
        gains = dsd_modules.inference._mixing_gains(estimates, mixture)
        signs = np.sign(estimates.T @ mixture)
        assert (gains * signs >= 0).all()
        errors = []
        for on in np.ndindex(2, 2, 2):
            candidate = np.zeros(3)
            kept = np.flatnonzero(on)
            candidate[kept] = np.linalg.lstsq(estimates[:, kept], mixture, rcond=None)[0]
            if (candidate * signs >= 0).all():
                errors.append(np.sum((estimates @ candidate - mixture) ** 2))
        assert np.sum((estimates @ gains - mixture) ** 2) == pytest.approx(min(errors))


def test_loud_voices_are_turned_down_together(tmp_path, separator, monkeypatch):
    sources = speech_like(4000)
    sources *= 3 / np.abs(sources).max()
    soundfile.write(tmp_path / "mix.wav", sources.sum(1), 8000, subtype="FLOAT")
    monkeypatch.setattr(separator, "separate_batch", lambda mix: torch.from_numpy(sources)[None])
    estimates = separator.separate_file(tmp_path / "mix.wav")
    torch.testing.assert_close(estimates, torch.from_numpy(sources) / 3, rtol=1e-3, atol=1e-5)


def test_unreadable_recordings_name_the_file(tmp_path, separator):
    def refused(name, message):
        with pytest.raises(ValueError, match=message) as error:
            separator.separate_file(tmp_path / name)
        assert name in str(error.value)

    refused("missing.wav", "was not found")
    (tmp_path / "folder.wav").mkdir()
    refused("folder.wav", "was not found")
    (tmp_path / "text.wav").write_text("no audio at all")
    refused("text.wav", "cannot be read as audio")
    (tmp_path / "nothing.wav").write_bytes(b"")
    refused("nothing.wav", "cannot be read as audio")
    (tmp_path / "headerless.raw").write_bytes(bytes(100))
    refused("headerless.raw", "cannot be read as audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    refused("empty.wav", "has no samples")
    for name, value in (("nan.wav", math.nan), ("inf.wav", math.inf)):
        for sample_rate in (8000, 16000):
            samples = np.zeros((400, 2))
            samples[7, 1] = value
            soundfile.write(tmp_path / name, samples, sample_rate, subtype="FLOAT")
            refused(name, "NaN or infinite")


def test_save_estimates(tmp_path):
    estimates = torch.stack([torch.linspace(-1, 1, 500), torch.zeros(500), torch.full((500,), 2.0)], 1)
    paths = save_estimates(estimates, 16000, tmp_path / "new" / "folder", "a.b")
    assert [path.name for path in paths] == ["a.b_spk1.wav", "a.b_spk2.wav", "a.b_spk3.wav"]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [path.name for path in paths]
    for path, voice in zip(paths, estimates.clamp(-1, 1).T, strict=True):
        assert soundfile.info(path).subtype == "PCM_16"
        samples, sample_rate = soundfile.read(path, dtype="float32")
        assert sample_rate == 16000
        np.testing.assert_allclose(samples, voice, atol=2**-15)
    with pytest.raises(ValueError, match=r"shape \[T, N\], but got \[500\]"):
        save_estimates(estimates[:, 0], 16000, tmp_path, "x")
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_estimates(estimates * math.nan, 16000, tmp_path, "x")
