"""Tests of the separation of batches and recordings."""

import math
import os

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from conftest import HPARAMS
from test_model_folder import OPTIONS, make_export, make_modules

from dsd_modules.inference import SepformerDSDSeparation, _mixing_gains, save_estimates
from dsd_modules.model_folder import export_model


@pytest.fixture(scope="module")
def separator(tmp_path_factory):
    return SepformerDSDSeparation.from_hparams(make_export(tmp_path_factory.mktemp("model") / "exported"))


def test_missing_device(tmp_path):
    with pytest.raises(ValueError, match="device can only be one of this machine, but got 'tpu9'"):
        SepformerDSDSeparation.from_hparams(make_export(tmp_path / "exported"), run_opts={"device": "tpu9"})


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
def test_gpu_equals_cpu(tmp_path, separator):
    modules = {name: module.cuda() for name, module in make_modules().items()}
    folder = export_model(tmp_path / "from_gpu", HPARAMS, OPTIONS, modules)
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
        gains = _mixing_gains(estimates, mixture)
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
