"""Tests of the separation of batches and recordings."""

import io
import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from conftest import HPARAMS, PEAK_BYTES
from test_model_folder import OPTIONS, make_export, make_modules

from dsd_modules import inference
from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.levels import mixing_gains
from dsd_modules.model_folder import export_model
from dsd_modules.separator import separate


@pytest.fixture(scope="module")
def separator(tmp_path_factory):
    return SepformerDSDSeparation.from_hparams(make_export(tmp_path_factory.mktemp("model") / "exported"))


def test_missing_device(tmp_path):
    with pytest.raises(ValueError, match="device can only be one that computes, but got 'meta'"):
        SepformerDSDSeparation.from_hparams(make_export(tmp_path / "exported"), run_opts={"device": "meta"})
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


def estimates_of(separator, monkeypatch, function):
    """Replace the network by a function from mixtures [1, T] to estimates [1, N, T]."""
    monkeypatch.setattr(separator, "_run", lambda mix, *options: (function(mix), [separator.num_blocks]))


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
    estimates_of(separator, monkeypatch, lambda mix: heard.append(mix) or mix[:, None].expand(-1, 2, -1))
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
    estimates_of(separator, monkeypatch, lambda mix: (torch.from_numpy(sources).float() * scales).T[None])
    estimates = separator.separate_file(tmp_path / "mix.wav")
    torch.testing.assert_close(estimates, torch.from_numpy(sources).float(), rtol=1e-3, atol=1e-5)


def test_gains_are_the_best_that_are_not_negative():
    """Against a search over the voices that may be off, on correlated estimates."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        estimates = rng.standard_normal((200, 3)) + 2 * rng.standard_normal((200, 1))
        mixture = estimates @ rng.standard_normal(3) + rng.standard_normal(200)
        gains = mixing_gains(estimates.T @ estimates, estimates.T @ mixture)
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
    estimates_of(separator, monkeypatch, lambda mix: torch.from_numpy(sources).T[None])
    estimates = separator.separate_file(tmp_path / "mix.wav")
    torch.testing.assert_close(estimates, torch.from_numpy(sources) / 3, rtol=1e-3, atol=1e-5)


def test_unreadable_recordings_name_the_file(tmp_path, separator):
    def refused(name, message):
        with pytest.raises(ValueError, match=message) as error:
            separator.separate_file(tmp_path / name)
        assert name in str(error.value)

    refused("missing.wav", "was not found")
    (tmp_path / "folder.wav").mkdir()
    refused("folder.wav", "is a folder")
    (tmp_path / "text.wav").write_text("no audio at all")
    refused("text.wav", "cannot be read as audio")
    (tmp_path / "nothing.wav").write_bytes(b"")
    refused("nothing.wav", "is empty")
    (tmp_path / "headerless.raw").write_bytes(bytes(100))
    refused("headerless.raw", "cannot be read as audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    refused("empty.wav", "is empty")
    for name, value in (("nan.wav", math.nan), ("inf.wav", math.inf)):
        for sample_rate in (8000, 16000):
            samples = np.zeros((400, 2))
            samples[7, 1] = value
            soundfile.write(tmp_path / name, samples, sample_rate, subtype="FLOAT")
            refused(name, "NaN or infinite")


# Long recordings, early exit, streams


def test_recordings_from_bytes_and_file_objects(tmp_path, separator):
    soundfile.write(tmp_path / "mix.flac", speech_like(3000, num_voices=1), 8000)
    content = (tmp_path / "mix.flac").read_bytes()
    expected = separator.separate_file(tmp_path / "mix.flac")
    for recording in (content, io.BytesIO(content), str(tmp_path / "mix.flac")):
        assert torch.equal(separator.separate_file(recording), expected)
    with open(tmp_path / "mix.flac", "rb") as stream:
        assert torch.equal(separator.separate_file(stream), expected)
    with pytest.raises(ValueError, match="recording cannot be read as audio"):
        separator.separate_file(b"no audio")


def test_one_channel(tmp_path, separator):
    channels = speech_like(3000, num_voices=2)
    soundfile.write(tmp_path / "both.wav", channels, 8000, subtype="FLOAT")
    for channel in (1, 2):
        soundfile.write(tmp_path / "one.wav", channels[:, channel - 1], 8000, subtype="FLOAT")
        voices = separator.separate_file(tmp_path / "both.wav", channel=channel)
        assert torch.equal(voices, separator.separate_file(tmp_path / "one.wav"))
    for channel in (0, 3, "left"):
        with pytest.raises(ValueError, match=r"both\.wav.*but got"):
            separator.separate_file(tmp_path / "both.wav", channel=channel)


@pytest.mark.parametrize("rate", ["file", 8000, 16000, 11025])
def test_sample_rate_of_the_voices(tmp_path, separator, monkeypatch, rate):
    """A tone comes back as it went in, as long as the recording, at any rate."""
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(44101) / 44100)
    soundfile.write(tmp_path / "mix.wav", tone, 44100, subtype="FLOAT")
    estimates_of(separator, monkeypatch, lambda mix: torch.stack([mix, 0 * mix], 1))
    voices = separator.separate_file(tmp_path / "mix.wav", sample_rate=rate)
    rate = 44100 if rate == "file" else rate
    assert voices.shape == (math.ceil(44101 * rate / 44100), 2)
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(len(voices)) / rate)
    np.testing.assert_allclose(voices[200:-200, 0], expected[200:-200], atol=2e-3)
    assert voices[:, 1].count_nonzero() == 0
    for wrong in (0, 8000.0, "model"):
        with pytest.raises(ValueError, match="sample_rate can only be"):
            separator.separate_file(tmp_path / "mix.wav", sample_rate=wrong)


def test_nothing_clips_at_another_rate(tmp_path, separator, monkeypatch):
    """Between the samples of the model's rate the voices may be louder than at them."""
    mixture = np.sign(np.sin(2 * np.pi * 900 * np.arange(8000) / 8000 + 0.1))
    soundfile.write(tmp_path / "mix.wav", mixture, 8000, subtype="FLOAT")
    estimates_of(separator, monkeypatch, lambda mix: torch.stack([mix, 0 * mix], 1))
    assert separator.separate_file(tmp_path / "mix.wav").abs().max() == pytest.approx(1)
    louder = separator.separate_file(tmp_path / "mix.wav", sample_rate=48000)
    assert louder.abs().max() == pytest.approx(1)
    assert louder.square().mean() < 0.9


class Bands:
    """In place of the network: separates low from high, in an order of its own for each window."""

    def __init__(self, seed=0):
        self.rng, self.num_calls = np.random.default_rng(seed), 0
        self.taps = scipy.signal.firwin(801, 900, fs=8000)

    def __call__(self, mix):
        self.num_calls += 1
        low = torch.from_numpy(np.convolve(mix[0].numpy(), self.taps, "same")).float()
        return torch.stack([low, mix[0] - low])[self.rng.permutation(2)][None] * torch.tensor([-3.0, 0.2])[:, None]


def low_and_high(seconds, pause=(), seed=0):
    noise = 0.05 * np.random.default_rng(seed).standard_normal(seconds * 8000).astype(np.float32)
    low = np.convolve(noise, Bands().taps, "same").astype(np.float32)
    voices = np.stack([low, noise - low], 1)
    if pause:
        voices[pause[0] * 8000 : pause[1] * 8000] = 0
    return voices


def test_long_recordings_equal_the_whole(tmp_path, separator, monkeypatch):
    """Windows, whose outputs come in any order, sign and a scale of their own per output, with a long pause."""
    sources = low_and_high(40, pause=(12, 27))
    soundfile.write(tmp_path / "mix.wav", sources.sum(1), 8000, subtype="FLOAT")
    network = Bands()
    network_of_one_scale = lambda mix: network(mix) / torch.tensor([3.0, 0.2])[:, None]  # noqa: E731
    estimates_of(separator, monkeypatch, network_of_one_scale)
    seconds = []
    voices = separator.separate_file(
        tmp_path / "mix.wav", window_seconds=6, progress=lambda done, total: seconds.append((done, total))
    )
    assert network.num_calls > 6
    assert seconds[-1] == (40, 40)
    assert seconds == sorted(seconds)
    order = [0, 1] if (voices[:, 0] @ sources[:, 0]) > (voices[:, 0] @ sources[:, 1]) else [1, 0]
    difference = (voices[:, order] - torch.from_numpy(sources)).square().view(40, 8000, 2).mean(1)  # of each second
    is_edge = np.isin(np.arange(40), [0, 11, 12, 26, 27, 39])  # the filter reaches over them
    assert difference[is_edge].max() < 0.01 * sources.var(0).min()
    assert difference[~is_edge].max() < 1e-9 * sources.var(0).min()


def test_files_are_what_separate_file_returns(tmp_path, separator):
    soundfile.write(tmp_path / "mix.wav", low_and_high(5).sum(1), 8000)
    for options in ({}, {"sample_rate": 11025}, {"num_blocks": 1, "window_seconds": 2.0}):
        voices = separator.separate_file(tmp_path / "mix.wav", **options)
        result = separator.separate_to_files(tmp_path / "mix.wav", tmp_path / "new" / "out", **options)
        assert [path.name for path in result.paths] == ["mix_spk1.wav", "mix_spk2.wav"]
        assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["mix_spk1.wav", "mix_spk2.wav"]
        for path, voice in zip(result.paths, voices.T, strict=True):
            samples, sample_rate = soundfile.read(path, dtype="float32")
            assert sample_rate == options.get("sample_rate", 8000)
            np.testing.assert_allclose(samples, voice, atol=2**-15)
        assert result.num_seconds == 5
        assert result.blocks_run == options.get("num_blocks", 2)
        assert result.real_time_factor == result.elapsed_seconds / 5


def test_a_fault_late_in_a_recording_writes_nothing(tmp_path, separator):
    samples = low_and_high(5).sum(1)
    samples[-7] = math.nan
    soundfile.write(tmp_path / "mix.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"mix\.wav holds samples that are NaN or infinite.*4\.999 s"):
        separator.separate_to_files(tmp_path / "mix.wav", tmp_path / "out", window_seconds=1.0)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("num_blocks", [1, 2, 3, None])
def test_num_blocks(tmp_path, num_blocks):
    """The first blocks alone: the estimates of that block of the whole model, and no other block is run."""
    modules = make_modules(num_blocks=3)
    separator = SepformerDSDSeparation(modules, 8000)
    mixture = torch.randn(2, 700)
    expected = separate(**modules, mixture=mixture, blocks="all")[(num_blocks or 3) - 1].transpose(1, 2)
    run = []
    for block in modules["masknet"].dual_mdl:
        block.register_forward_hook(lambda *_: run.append(1))
    torch.testing.assert_close(separator.separate_batch(mixture, num_blocks=num_blocks), expected)
    assert len(run) == (num_blocks or 3)
    for wrong in (0, 4, 1.0, True, "all"):
        with pytest.raises(ValueError, match=f"num_blocks can only be 1 to 3, but got {wrong!r}"):
            separator.separate_batch(mixture, num_blocks=wrong)


def test_bf16(tmp_path):
    """Near fp32, but not equal to it; early exit as well."""
    modules = make_modules(num_blocks=3)
    full, half = (SepformerDSDSeparation(modules, 8000, precision=precision) for precision in ("fp32", "bf16"))
    mixture = torch.randn(2, 4000)
    for options in ({}, {"lengths": [4000, 700]}, {"num_blocks": 1}, {"exit_si_sdr_db": -90.0}):
        expected, estimates = full.separate_batch(mixture, **options), half.separate_batch(mixture, **options)
        assert estimates.dtype == torch.float32
        error = (estimates - expected).square().sum() / expected.square().sum()
        assert 1e-7 < error < 1e-3
    assert half.separate_batch(torch.zeros(1, 900)).isfinite().all()
    with pytest.raises(ValueError, match="precision can only be 'fp32' or 'bf16', but got 'int8'"):
        SepformerDSDSeparation.from_hparams(make_export(tmp_path / "exported"), run_opts={"precision": "int8"})


def test_early_exit_of_each_item_and_window(tmp_path):
    modules = make_modules(num_blocks=4)
    separator = SepformerDSDSeparation(modules, 8000)
    mixture, lengths = torch.randn(3, 700), [700, 300, 5]
    early = separator.separate_batch(mixture, lengths, exit_si_sdr_db=-90.0)
    torch.testing.assert_close(early, separator.separate_batch(mixture, lengths, num_blocks=2), rtol=1e-3, atol=1e-5)
    late = separator.separate_batch(mixture, lengths, exit_si_sdr_db=90.0)
    torch.testing.assert_close(late, separator.separate_batch(mixture, lengths), rtol=1e-3, atol=1e-5)
    soundfile.write(tmp_path / "mix.wav", low_and_high(5, pause=(0, 2)).sum(1), 8000)
    for threshold, blocks_run in ((-90.0, 2), (90.0, 4)):
        result = separator.separate_to_files(
            tmp_path / "mix.wav", tmp_path, exit_si_sdr_db=threshold, window_seconds=1.0
        )
        assert result.blocks_run == blocks_run
    with pytest.raises(ValueError, match="give one of them"):
        separator.separate_batch(mixture, num_blocks=2, exit_si_sdr_db=9.0)
    with pytest.raises(ValueError, match="at least 3 blocks"):
        SepformerDSDSeparation(make_modules(), 8000).separate_batch(mixture, exit_si_sdr_db=9.0)


def test_a_stream_has_a_constant_latency(separator):
    """When n samples have come, all but the last 0.6 s are out, however they come."""
    mixture = low_and_high(5).sum(1)
    for lengths in ([1000] * 40, [40000], [1, 4798, 1, 1, 0, 3999, 31200]):
        counts = {"come": 0, "given": 0}

        def chunks(lengths=lengths, counts=counts):
            for length in lengths:
                assert counts["given"] == max(0, counts["come"] - 4800)
                counts["come"] += length
                yield mixture[counts["come"] - length : counts["come"]]

        for voices in separator.stream(chunks(), window_seconds=1.0):
            counts["given"] += len(voices)
        assert counts["given"] == len(mixture)


def test_a_stream_follows_the_voices(separator, monkeypatch):
    """Through windows whose outputs come in any order and sign, and a pause that is longer than they are."""
    sources = low_and_high(30, pause=(8, 20))
    network = Bands()
    estimates_of(separator, monkeypatch, lambda mix: network(mix) / torch.tensor([3.0, 0.2])[:, None])
    chunks = torch.from_numpy(sources.sum(1)).split(700)
    voices = torch.cat(list(separator.stream(chunks)))
    order = [0, 1] if (voices[:, 0] @ sources[:, 0]) > (voices[:, 0] @ sources[:, 1]) else [1, 0]
    difference = (voices[:, order] - torch.from_numpy(sources)).square().view(30, 8000, 2).mean(1)  # of each second
    assert difference[1:].max() < 0.02 * sources.var(0).min()


def test_a_stream_after_silence_begins_at_its_level(separator, monkeypatch):
    sources = np.concatenate([np.zeros((16000, 2), np.float32), low_and_high(4)])
    network = Bands()
    estimates_of(separator, monkeypatch, lambda mix: network(mix) / torch.tensor([3.0, 0.2])[:, None])
    voices = torch.cat(list(separator.stream(torch.from_numpy(sources.sum(1)).split(700))))
    levels = voices.sum(1).view(6, 8000).square().mean(1) / sources.sum(1).reshape(6, 8000).var(1).clip(1e-9)
    assert levels[:2].max() < 1e-9
    assert levels[2:].min() > 0.95


def test_streams_of_faint_silent_and_bad_audio(separator):
    assert list(separator.stream([])) == []
    assert list(separator.stream([np.zeros(0)])) == []
    assert torch.cat(list(separator.stream([torch.ones(9000, dtype=torch.bfloat16)]))).shape == (9000, 2)
    voices = torch.cat(list(separator.stream([np.zeros(9000), 1e-6 * np.ones(9000)])))
    assert voices.isfinite().all()
    assert voices[:4000].count_nonzero() == 0
    with pytest.raises(ValueError, match=r"the chunk that begins at 1\.000 s holds NaN"):
        list(separator.stream([np.zeros(8000), np.full(9, math.nan)]))
    with pytest.raises(ValueError, match=r"the chunk that begins at 0\.000 s holds NaN or infinite"):
        list(separator.stream([np.full(9000, 1e300)]))
    for wrong in (np.zeros((2, 9)), np.zeros(9, int), [1, 2], None):
        with pytest.raises(ValueError, match="a chunk can only be"):
            list(separator.stream([wrong]))
    for options in ({"hop_seconds": 5.0}, {"fade_seconds": 0.0}, {"window_seconds": -1.0}, {"num_blocks": 9}):
        with pytest.raises(ValueError, match="but got"):
            separator.stream([], **options)


def test_windows_that_are_too_short_are_refused(tmp_path, separator):
    soundfile.write(tmp_path / "mix.wav", np.ones(800), 8000)
    for seconds in (0.0, -1.0, 0.001, math.nan, math.inf, "16"):
        with pytest.raises(ValueError, match=r"window_seconds can only be a number from 0\.1 on"):
            separator.separate_file(tmp_path / "mix.wav", window_seconds=seconds)
    for rate in (2**31, 10**30):
        with pytest.raises(ValueError, match="sample_rate can only be a whole number of Hz up to 768000"):
            separator.separate_to_files(tmp_path / "mix.wav", tmp_path / "out", sample_rate=rate)
    for stem in ("../mix", "a/b", "/mix", "a\0"):
        with pytest.raises(ValueError, match="stem can only be"):
            separator.separate_to_files(tmp_path / "mix.wav", tmp_path / "out", stem=stem)


def test_early_exit_is_decided_for_each_window(tmp_path, monkeypatch):
    separator = SepformerDSDSeparation(make_modules(num_blocks=4), 8000)
    soundfile.write(tmp_path / "mix.wav", low_and_high(5).sum(1), 8000)
    blocks = itertools.cycle([2, 4, 3])
    monkeypatch.setattr(
        inference, "separate_until", lambda mixture, **_: (torch.stack([mixture, mixture], 1), next(blocks))
    )
    result = separator.separate_to_files(
        tmp_path / "mix.wav", tmp_path, exit_si_sdr_db=20.0, window_seconds=2.0
    )  # windows end at 2, 3.5 and 5 s
    assert result.blocks_run == 3


def test_silent_windows_are_not_run(tmp_path, separator, monkeypatch):
    soundfile.write(tmp_path / "mix.wav", low_and_high(20, pause=(3, 19)).sum(1), 8000)
    network = Bands()
    estimates_of(separator, monkeypatch, network)
    separator.separate_file(tmp_path / "mix.wav", window_seconds=2.0)
    assert network.num_calls == 3  # the windows end at 2, 3.5, ... 20 s


def test_a_model_that_gives_nan(tmp_path, separator, monkeypatch):
    estimates_of(separator, monkeypatch, lambda mix: torch.full((1, 2, mix.shape[1]), math.nan))
    soundfile.write(tmp_path / "mix.wav", low_and_high(5).sum(1), 8000)
    for seconds in (16.0, 1.0):
        with pytest.raises(ValueError, match="The model's estimates are NaN or infinite"):
            separator.separate_file(tmp_path / "mix.wav", window_seconds=seconds)


def test_progress_ends_at_the_end(tmp_path, separator):
    soundfile.write(tmp_path / "mix.wav", speech_like(44101, num_voices=2), 44100)
    seconds = []
    separator.separate_file(tmp_path / "mix.wav", progress=lambda *args: seconds.append(args))
    assert seconds == [(44101 / 44100, 44101 / 44100)]


def test_a_stereo_recording_of_another_rate_in_windows(tmp_path, separator, monkeypatch):
    """The same as at the model's rate."""
    mixture = scipy.signal.sosfilt(scipy.signal.butter(8, 3000, fs=8000, output="sos"), low_and_high(12).sum(1))
    times_five = scipy.signal.resample_poly(mixture, 5, 1)
    soundfile.write(tmp_path / "a.wav", mixture, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", np.stack([1.5 * times_five, 0.5 * times_five], 1), 40000, subtype="FLOAT")
    voices = []
    for name in ("a.wav", "b.wav"):
        network = Bands(seed=3)
        estimates_of(separator, monkeypatch, lambda mix, network=network: network(mix))
        voices.append(separator.separate_file(tmp_path / name, window_seconds=4.0))
        assert voices[-1].shape == (96000, 2)
    assert (voices[1] - voices[0])[400:-400].square().mean() < 0.001 * voices[0].square().mean()


def test_models_in_threads_do_not_meet(tmp_path):
    """Two models, files of one name in two folders, calls that run at the same time."""
    separators = [SepformerDSDSeparation(make_modules(seed=seed), 8000) for seed in (0, 1)]
    paths = []
    for seed in (0, 1):
        paths.append(tmp_path / str(seed) / "mix.wav")
        paths[-1].parent.mkdir()
        soundfile.write(paths[-1], low_and_high(4, seed=seed).sum(1), 8000)
    tasks = [(separator, path) for separator in separators for path in paths] * 3
    expected = [separator.separate_file(path, window_seconds=1.0) for separator, path in tasks]
    assert not torch.equal(expected[0], expected[1])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda task: task[0].separate_file(task[1], window_seconds=1.0), tasks))
    for result, one in zip(results, expected, strict=True):
        assert torch.equal(result, one)


def test_memory_does_not_grow_with_the_length(tmp_path):
    """Half a minute and half an hour, whose voices are 115 MB."""
    exported = make_export(tmp_path / "exported")
    script = f"""{PEAK_BYTES}
import sys
import torch
torch.set_num_threads(1)
from dsd_modules import inference
from dsd_modules.inference import SepformerDSDSeparation
separator = SepformerDSDSeparation.from_hparams(sys.argv[1])
separator._run = lambda mix, *options: (torch.stack([mix, mix], 1), [2])
peaks = []
for path in sys.argv[2:]:
    separator.separate_to_files(path, sys.argv[1] + "_voices", window_seconds=4.0)
    peaks.append(peak_bytes() >> 20)
print(*peaks)
"""
    rng = np.random.default_rng(0)
    paths = []
    noise = 0.05 * rng.standard_normal((80000, 2))
    for seconds in (30, 1800):
        paths.append(tmp_path / f"{seconds}.wav")
        with soundfile.SoundFile(paths[-1], "w", 8000, 2) as file:
            for _ in range(seconds // 10):
                file.write(noise)
    command = [sys.executable, "-c", script, str(exported), *map(str, paths)]
    short, long = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert long < short + 40
