"""Tests of the ONNX files: against PyTorch at any length and batch, and in a program without this project."""

import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from test_model_folder import CONVTASNET, DPRNN, make_export, make_other_export

from dsd_modules import onnx_export
from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.model_card import amend_card, write_card
from dsd_modules.model_folder import read_model
from dsd_modules.onnx_export import export_onnx

# GRUs of two layers, plain recurrence, the norm that SpeechBrain calls gln, and global positions: no YAML has them.
UNUSUAL = """
num_spks: 3
sample_rate: 8000
encoder: !new:speechbrain.lobes.models.dual_path.Encoder {kernel_size: 16, out_channels: 16}
intra: !new:speechbrain.lobes.models.dual_path.SBRNNBlock
  {input_size: 16, hidden_channels: 8, num_layers: 2, rnn_type: GRU, bidirectional: true}
inter: !new:speechbrain.lobes.models.dual_path.SBRNNBlock
  {input_size: 16, hidden_channels: 8, num_layers: 1, rnn_type: RNN, bidirectional: true}
masknet: !new:dsd_modules.masknet.DualPathMaskNet
  num_spks: 3
  in_channels: 16
  out_channels: 16
  num_layers: 1
  K: 7
  norm: gln
  use_global_pos_enc: true
  max_length: 16
  intra_model: !ref <intra>
  inter_model: !ref <inter>
decoder: !new:speechbrain.lobes.models.dual_path.Decoder
  {in_channels: 16, out_channels: 1, kernel_size: 16, stride: 8, bias: false}
modules: {encoder: !ref <encoder>, masknet: !ref <masknet>, decoder: !ref <decoder>}
"""
CAUSAL = UNUSUAL[: UNUSUAL.index("intra:")] + """\
masknet: !new:dsd_modules.tasnet.ConvTasNetMaskNet
  {N: 16, B: 12, H: 24, P: 5, X: 3, R: 1, C: 3, norm_type: cLN, causal: true, mask_nonlinear: softmax}
""" + UNUSUAL[UNUSUAL.index("decoder:") :]  # fmt: skip


def make_folder(folder, text):
    """A model folder of a YAML, with random weights."""
    torch.manual_seed(2)
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(text)
    for name, module in load_hyperpyyaml(text)["modules"].items():
        torch.save(module.state_dict(), folder / f"{name}.ckpt")
    return folder


@pytest.fixture(scope="module")
def sepformer(tmp_path_factory):
    """Two blocks whose chunks of 4 frames are soon more than the 2,500 positions that SpeechBrain keeps."""
    folder = make_export(tmp_path_factory.mktemp("onnx") / "exported", num_spks=3, chunk_size=4)
    return folder, export_onnx(folder, longest_seconds=0.5)


@pytest.fixture(scope="module", params=["dprnn", "convtasnet", "unusual", "causal"])
def other(request, tmp_path_factory):
    """One block of another kind."""
    folder = tmp_path_factory.mktemp("onnx") / "exported"
    if request.param == "dprnn":
        make_other_export(folder, "dprnn", **{**DPRNN, "num_blocks": 1})
    elif request.param == "convtasnet":  # which reaches 64 frames: further than the shorter mixtures
        make_other_export(
            folder, "convtasnet", **{**CONVTASNET, "num_blocks": 1, "num_conv_layers": 6, "conv_kernel": 5}
        )
    else:
        make_folder(folder, UNUSUAL if request.param == "unusual" else CAUSAL)
    return folder, export_onnx(folder, longest_seconds=0.5)


def run_onnx(path, mixture):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (estimates,) = session.run(["estimates"], {"mixture": mixture.numpy()})
    return torch.from_numpy(estimates)


def assert_equal(estimates, expected):
    assert estimates.shape == expected.shape
    assert (estimates - expected).abs().max() <= 1e-4 * expected.abs().max()


MIXTURES = [(1, 16), (3, 17), (2, 40), (1, 333), (4, 1003), (1, 20001)]


def make_mixture(batch, length):
    return 0.05 * torch.randn(batch, length, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("batch", "length"), MIXTURES)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_every_block_separates_as_in_pytorch(sepformer, num_blocks, batch, length):
    folder, files = sepformer
    mixture = make_mixture(batch, length)
    expected = SepformerDSDSeparation.from_hparams(folder).separate_batch(mixture, num_blocks=num_blocks)
    assert expected.shape == (batch, length, 3)
    assert_equal(run_onnx(files[num_blocks - 1].path, mixture), expected)


@pytest.mark.parametrize(("batch", "length"), MIXTURES)
def test_other_separators_separate_as_in_pytorch(other, batch, length):
    folder, files = other
    mixture = make_mixture(batch, length)
    assert_equal(run_onnx(files[0].path, mixture), SepformerDSDSeparation.from_hparams(folder).separate_batch(mixture))


def test_positions_go_on_beyond_those_that_are_kept(sepformer):
    folder, files = sepformer
    mixture = make_mixture(1, 48_000)  # 6,000 frames, in 3,000 chunks
    separator = SepformerDSDSeparation.from_hparams(folder)
    assert separator.mods["masknet"].dual_mdl[0].inter_mdl.pos_enc.pe.shape[1] == 2500
    assert_equal(run_onnx(files[0].path, mixture), separator.separate_batch(mixture, num_blocks=1))


def test_long_sums_stay_exact(tmp_path):
    """onnxruntime's own norm of a whole minute is wrong by more than 1e-4."""
    folder = make_other_export(
        tmp_path / "exported", "convtasnet", **{**CONVTASNET, "num_blocks": 1, "num_conv_layers": 1}
    )
    (file,) = export_onnx(folder, longest_seconds=60)
    assert file.longest_checked_length == 480_000
    assert file.largest_difference < 1e-5


def test_silence_gives_silence(sepformer):
    """The variance of silence is 0, and what is added to it must not be optimised away."""
    mixture = torch.cat([torch.zeros(1, 400), make_mixture(1, 400)])
    estimates = run_onnx(sepformer[1][1].path, mixture)
    assert estimates[0].count_nonzero() == 0
    assert estimates.isfinite().all()
    assert estimates[1].count_nonzero() > 0


def test_a_file_tells_what_it_is(sepformer):
    for num_blocks, file in enumerate(sepformer[1], 1):
        assert file.path.name == f"separator_blocks{num_blocks}.onnx"
        session = onnxruntime.InferenceSession(str(file.path))
        told = session.get_modelmeta().custom_metadata_map
        assert float(told.pop("largest_difference")) == file.largest_difference <= 1e-4
        assert {name: int(value) for name, value in told.items()} == {
            "sample_rate": 8000,
            "num_spks": 3,
            "num_blocks": num_blocks,
            "opset": 18,
            "shortest_length": 16,
            "longest_checked_length": 4000,
        }
        (mixture,), (estimates,) = session.get_inputs(), session.get_outputs()
        assert (mixture.name, mixture.shape, mixture.type) == ("mixture", ["batch", "length"], "tensor(float)")
        assert (estimates.name, estimates.shape) == ("estimates", ["batch", "length", 3])
        model = onnx.load(file.path)
        onnx.checker.check_model(model, full_check=True)
        assert model.ir_version == 8
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]


def test_a_file_holds_its_weights_and_no_place_of_this_machine(sepformer):
    for file in sepformer[1]:
        content = file.path.read_bytes()
        assert len(content) > 4 * sum(p.numel() for p in read_model(sepformer[0])[0]["encoder"].parameters())
        for place in (str(Path.home()), str(Path(onnx_export.__file__).parents[1]), "site-packages", "stack_trace"):
            assert place.encode() not in content
    names = sorted(path.name for path in sepformer[0].iterdir())
    model_files = ["decoder.ckpt", "encoder.ckpt", "hyperparams.yaml", "masknet.ckpt"]
    assert names == [*model_files, "separator_blocks1.onnx", "separator_blocks2.onnx"]
    sizes = [file.path.stat().st_size for file in sepformer[1]]
    assert sizes[0] < 0.6 * sizes[1]  # only the blocks that are run


# A service without this project


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("numpy", "onnxruntime", *sys.stdlib_module_names):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
"""


def test_the_cards_program_needs_numpy_and_onnxruntime_alone(sepformer, tmp_path):
    folder, files = sepformer
    card = write_card(folder)
    amend_card(folder, onnx_files=files)
    (program,) = re.findall(r"```python\n(import wave\n.*?)```", card.read_text(), flags=re.DOTALL)
    card.unlink()
    (tmp_path / "separator_blocks2.onnx").write_bytes(files[1].path.read_bytes())
    recording = (3000 * np.random.default_rng(0).standard_normal(4001)).astype("<i2")
    with wave.open(str(tmp_path / "meeting.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(recording.tobytes())
    command = [sys.executable, "-c", BLOCKED + program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    mixture = torch.from_numpy(recording.astype(np.float32) / 32768)
    heard = (0.05 / mixture.square().mean().sqrt() * mixture)[None]
    estimates = SepformerDSDSeparation.from_hparams(folder).separate_batch(heard)[0]  # [T, N]
    gains = torch.linalg.lstsq(estimates.double(), mixture[:, None].double()).solution[:, 0]
    expected = (estimates * gains * 32767).clamp(-32767, 32767).numpy()
    for spk in range(3):
        with wave.open(str(tmp_path / f"voice{spk + 1}.wav")) as file:
            assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (1, 8000, 4001)
            voice = np.frombuffer(file.readframes(4001), "<i2")
        assert np.abs(voice - expected[:, spk]).max() <= 2 + 1e-3 * np.abs(expected).max()


# Faults


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_to_convert_the_second(monkeypatch, sepformer):
    """The second file becomes one of the first block."""
    import onnx_ir

    paths = iter([sepformer[1][0].path, sepformer[1][0].path])
    monkeypatch.setattr(onnx_export, "_convert", lambda separator: onnx_ir.load(next(paths)))


def test_a_file_that_differs_is_not_written(sepformer, monkeypatch):
    folder, files = sepformer
    before, asked = listing(folder), []
    fail_to_convert_the_second(monkeypatch, sepformer)
    with pytest.raises(
        ValueError, match=r"blocks2\.onnx is not written: for a batch of \d and \d+ samples .* differ from"
    ):
        export_onnx(folder, longest_seconds=0.1, progress=asked.append)
    assert asked == [file.path for file in files]
    assert listing(folder) == before  # nor the first


def test_a_file_that_gives_no_number_is_not_written(sepformer, monkeypatch):
    fail_to_convert_the_second(monkeypatch, sepformer)
    monkeypatch.setattr(
        onnx_export._Separator, "forward", lambda self, mixture: torch.full((*mixture.shape, 3), np.nan)
    )
    with pytest.raises(ValueError, match=r"blocks1\.onnx is not written: .* by nan of"):
        export_onnx(sepformer[0], longest_seconds=0.1)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(sepformer, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=f"needs the package {package}; get it with: pip install onnx onnxscript onnxruntime"
    ):
        export_onnx(sepformer[0])


def test_weights_that_no_file_holds(sepformer, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"An ONNX file holds at most 2 GiB, but the weights of .* take 0.0"):
        export_onnx(sepformer[0])


def test_no_model(tmp_path):
    make_export(tmp_path / "run" / "exported")
    for folder in (tmp_path / "none", tmp_path / "run", "owner/name"):
        with pytest.raises(ValueError, match=f"ONNX files are written into a model folder, but {folder} is none"):
            export_onnx(folder)
