"""Tests of reading recordings and writing voices, block by block."""

import io
import math
import os
import socket
import struct
import threading

import numpy as np
import pytest
import soundfile
import soxr

from shared_modules.recordings import Recording, Resampler, resampled_length


def noise(num_samples, channels=1, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal((num_samples, channels))).astype(np.float32)


def content(samples, sample_rate, **options):
    """An audio file as bytes."""
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", sample_rate, samples.shape[1], **{"format": "WAV", **options}) as file:
        for start in range(0, len(samples), 10000):
            file.write(samples[start : start + 10000])
    return stream.getvalue()


def read(source, sample_rate=None, **options):
    with Recording(source) as recording:
        return np.concatenate(list(recording.blocks(sample_rate or recording.sample_rate, **options)))


# Reading


@pytest.mark.parametrize("block_seconds", [0.0001, 0.013, 1, 1e9])
@pytest.mark.parametrize(("file_rate", "sample_rate"), [(44100, 8000), (8000, 44100), (8000, 8000), (44101, 7999)])
def test_blocks_equal_the_whole(file_rate, sample_rate, block_seconds):
    samples = noise(9001, 2)
    found = read(content(samples, file_rate, subtype="FLOAT"), sample_rate, block_seconds=block_seconds)
    expected = soxr.resample(samples.mean(1), file_rate, sample_rate)
    assert len(found) == math.ceil(9001 * sample_rate / file_rate)
    assert abs(len(found) - len(expected)) <= 1
    common = min(len(found), len(expected))
    np.testing.assert_allclose(found[:common], expected[:common], atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("num_samples", [1, 2, 7, 100, 8001])
@pytest.mark.parametrize(
    ("file_rate", "sample_rate"), [(44100, 8000), (8000, 44100), (48000, 16000), (100, 8000), (10**7, 8000)]
)
def test_number_of_samples(num_samples, file_rate, sample_rate):
    found = read(content(noise(num_samples), file_rate), sample_rate)
    assert len(found) == math.ceil(num_samples * sample_rate / file_rate)
    assert np.isfinite(found).all()


def test_a_tone_keeps_its_place_and_level():
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    found = read(content(tone[:, None], 44100, subtype="FLOAT"), 8000)
    np.testing.assert_allclose(found[200:-200], 0.5 * np.sin(2 * np.pi * 440 * np.arange(200, 7800) / 8000), atol=1e-4)


def test_channels():
    samples = noise(500, 3)
    data = content(samples, 8000, subtype="FLOAT")
    np.testing.assert_allclose(read(data), samples.mean(1), atol=1e-7)
    for channel in (1, 2, 3):
        np.testing.assert_array_equal(read(data, channel=channel), samples[:, channel - 1])
    with Recording(data, "meeting.wav") as recording:
        assert (recording.name, recording.num_channels, recording.num_frames) == ("meeting.wav", 3, 500)
        assert recording.num_seconds == 500 / 8000
        for channel in (0, 4, -1, True, 1.5, "1"):
            with pytest.raises(ValueError, match=r"channel can only be 1 to 3 in meeting.wav, but got"):
                recording.blocks(8000, channel=channel)
        for sample_rate in (0, -1, 8000.0, "file", None):
            with pytest.raises(ValueError, match="sample_rate can only be a whole number of Hz, but got"):
                recording.blocks(sample_rate)
        with pytest.raises(ValueError, match="block_seconds must be positive"):
            recording.blocks(8000, block_seconds=0)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64", "RF64", "NIST", "VOC"])
def test_formats(tmp_path, format):
    samples = noise(30000, 2)
    path = tmp_path / f"meeting.{format.lower()}"
    path.write_bytes(content(samples, 16000, format=format))
    expected = soundfile.read(path, dtype="float32")[0]
    assert len(expected) >= 30000
    for block_seconds in (0.01, 0.3, 10):
        np.testing.assert_allclose(read(path, block_seconds=block_seconds), expected.mean(1), atol=1e-7)
        np.testing.assert_allclose(read(path.read_bytes(), channel=2), expected[:, 1], atol=1e-7)


def test_mp3_without_a_header_is_read_to_its_end():
    """A quiet beginning of variable rate lets libsndfile guess far too few frames: what a cut stream looks like."""
    samples = noise(150000) * np.linspace(1, 0, 150000, dtype=np.float32)[:, None]
    data = content(samples, 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    second = data.index(data[:2], 4)
    bare = data[second:]  # the first frame is the header
    assert b"Xing" not in bare[:4096]
    for tag in (b"", b"ID3\x03\0\0\0\0\x07\x76" + bytes(1014)):
        assert 150000 <= len(read(tag + bare)) < 155000
        assert len(read(tag + data)) == 150000


@pytest.mark.parametrize("riff_size", [0, 36, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("data_size", [0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF])
def test_wav_whose_header_was_never_completed(riff_size, data_size):
    """As a pipe or a killed recorder leaves it."""
    data = bytearray(content(noise(5000), 8000))
    whole = read(bytes(data))
    place = data.index(b"data") + 4
    data[4:8], data[place : place + 4] = struct.pack("<I", riff_size), struct.pack("<I", data_size)
    np.testing.assert_array_equal(read(bytes(data)), whole)


def test_cut_wav_is_read_to_its_end():
    data = content(noise(5000), 8000)
    assert len(read(data[:-4001])) == 5000 - 2001


def test_again_from_the_beginning(tmp_path):
    (tmp_path / "a.mp3").write_bytes(content(noise(30000), 16000, format="MP3"))
    for source in (tmp_path / "a.mp3", (tmp_path / "a.mp3").read_bytes()):
        with Recording(source) as recording:
            next(recording.blocks(8000, block_seconds=0.1))  # left in the middle
            first, second = (np.concatenate(list(recording.blocks(8000))) for _ in range(2))
            np.testing.assert_array_equal(first, second)
            assert len(first) == 15000


def test_the_number_of_frames_is_corrected(tmp_path):
    """A cut mp3 promises more than it holds."""
    data = content(noise(60000), 16000, format="MP3")
    with Recording(data[: len(data) // 2]) as recording:
        assert recording.num_frames == 60000
        num_samples = sum(map(len, recording.blocks(16000)))
        assert recording.num_frames == num_samples < 40000


def test_file_objects(tmp_path):
    data = content(noise(5000), 8000)
    whole = read(data)
    (tmp_path / "a.wav").write_bytes(data)
    for source in (bytearray(data), memoryview(data), io.BytesIO(data)):
        np.testing.assert_array_equal(read(source), whole)
    with open(tmp_path / "a.wav", "rb") as stream:
        stream.read(100)  # it is read from its beginning all the same
        np.testing.assert_array_equal(read(stream), whole)
        assert not stream.closed
        with Recording(stream) as recording:
            assert recording.name == str(tmp_path / "a.wav")
    with open(tmp_path / "a.wav", "rb", buffering=0) as stream:
        np.testing.assert_array_equal(read(stream), whole)
    with open(tmp_path / "a.wav") as stream, pytest.raises(ValueError, match=r"a.wav must be opened in binary mode"):
        Recording(stream)
    with pytest.raises(ValueError, match=r"a.wav cannot be read: I/O operation on closed file"):
        Recording(stream, "a.wav")
    with pytest.raises(ValueError, match=r"can only be a path, bytes or a binary file object, but got .*int"):
        Recording(3)


def test_short_reads():
    """A file object may give less than is asked for."""

    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7) if size >= 0 else size)

    data = content(noise(5000), 8000, format="FLAC")
    np.testing.assert_array_equal(read(Slow(data)), read(data))


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_and_sockets(kind):
    data = content(noise(50000), 8000)
    if kind == "pipe":
        ends = [os.fdopen(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)]
    else:
        pair = socket.socketpair()
        ends = [end.makefile(mode) for end, mode in zip(pair, ("rb", "wb"), strict=True)]
        pair[0].close(), pair[1].close()  # once the files are closed as well

    def send():
        with ends[1]:
            ends[1].write(data)

    thread = threading.Thread(target=send)
    thread.start()
    with ends[0], Recording(ends[0], "stream") as recording:
        for _ in range(2):
            np.testing.assert_array_equal(np.concatenate(list(recording.blocks(8000))), read(data))
    thread.join()


def test_a_file_object_that_fails():
    class Broken(io.BytesIO):
        broken_from, fault = 20000, OSError(5, "Input/output error")

        def read(self, size=-1):
            if self.tell() >= self.broken_from:
                raise self.fault
            return super().read(size)

    class Interrupted(Broken):
        fault = KeyboardInterrupt()

    blocks = Recording(Broken(content(noise(50000), 8000)), "a.wav").blocks(8000, block_seconds=0.1)
    with pytest.raises(ValueError, match=r"a.wav cannot be read: .*Input/output error"):
        list(blocks)
    blocks = Recording(Interrupted(content(noise(50000), 8000))).blocks(8000, block_seconds=0.1)
    with pytest.raises(KeyboardInterrupt):
        list(blocks)
    Broken.broken_from = 0
    with pytest.raises(ValueError, match=r"a.wav cannot be read: .*Input/output error"):
        Recording(Broken(content(noise(50000), 8000)), "a.wav")


def test_what_is_no_recording(tmp_path):
    def refused(source, message, name=None):
        with pytest.raises(ValueError, match=message) as error:
            read(source)
        assert (name or str(source)) in str(error.value)

    refused(tmp_path / "missing.wav", "was not found")
    refused("", "was not found")
    refused("a\0.wav", "cannot be read: .*null")
    (tmp_path / "folder.wav").mkdir()
    refused(tmp_path / "folder.wav", "is a folder")
    os.mkfifo(tmp_path / "fifo.wav")
    refused(tmp_path / "fifo.wav", "is not a regular file")
    refused("/dev/zero", "is not a regular file")
    (tmp_path / "link.wav").symlink_to(tmp_path / "missing.wav")
    refused(tmp_path / "link.wav", "was not found")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    refused(tmp_path / "loop.wav", "cannot be read: Too many levels of symbolic links")
    for name, data in (("text.wav", b"no audio at all"), ("samples.raw", bytes(1000))):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "cannot be read as audio: Format not recognised")
        refused(data, "cannot be read as audio", "recording")
    (tmp_path / "nothing.wav").touch()
    refused(tmp_path / "nothing.wav", "is empty: it has no bytes")
    refused(b"", "is empty: it has no bytes", "recording")
    for format in ("WAV", "FLAC", "OGG", "MP3"):
        path = tmp_path / f"empty.{format.lower()}"
        path.write_bytes(content(noise(0), 8000, format=format))
        refused(path, "is empty|cannot be read as audio")
    # An empty one that other chunks follow.
    data = bytearray(content(noise(0), 8000)) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    data[4:8] = struct.pack("<I", len(data) - 8)
    refused(bytes(data), "is empty: it has no samples", "recording")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "secret.wav").write_bytes(content(noise(10), 8000))
    (tmp_path / "secret.wav").chmod(0)
    with pytest.raises(ValueError, match=r"secret.wav cannot be read: Permission denied"):
        Recording(tmp_path / "secret.wav")


def test_damaged_and_cut_files():
    flac = content(noise(60000), 16000, format="FLAC")
    blocks = Recording(flac[: len(flac) // 2], "cut.flac").blocks(8000, block_seconds=1)
    with pytest.raises(ValueError, match=r"cut.flac is damaged or cut off, 1.0 s or a little more .* lost sync"):
        list(blocks)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_samples_that_are_no_numbers(value, sample_rate):
    samples = noise(9000, 2)
    samples[8100:, 1] = value
    with Recording(content(samples, 8000, subtype="FLOAT"), "a.wav") as recording:
        with pytest.raises(
            ValueError, match=r"a.wav holds samples that are NaN or infinite, the first of them at 1.012"
        ):
            list(recording.blocks(sample_rate, block_seconds=0.3))
        assert sum(map(len, recording.blocks(8000, channel=1))) == 9000  # the other channel is sound


@pytest.mark.parametrize("sample_rate", [1, 99, 2**31 - 1])
def test_sample_rates_of_damaged_headers(sample_rate):
    data = bytearray(content(noise(100), 8000))
    data[24:28] = struct.pack("<I", sample_rate)
    with pytest.raises(ValueError, match=f"a.wav: its sample rate can only be .* Hz, but got {sample_rate}"):
        Recording(bytes(data), "a.wav")


def test_a_source_that_does_not_wait():
    class NonBlocking(io.BytesIO):
        def read(self, size=-1):
            return super().read(size) if self.tell() < 4000 else None

    with pytest.raises(ValueError, match="a non-blocking file cannot be read"):
        read(NonBlocking(content(noise(9000), 8000)))


def test_odd_names(tmp_path):
    data = content(noise(10), 8000)
    for name in ("-a b.wav", "été 会議.wav", "a'\"\n.wav", os.fsdecode(b"\xff\xfe.wav")):
        (tmp_path / name).write_bytes(data)
        assert len(read(tmp_path / name)) == 10


def test_memory_is_flat(tmp_path):
    """An hour of many channels at a high rate claims no more than a block at a time."""
    header = content(noise(1, 64), 192000, subtype="PCM_U8")
    with open(tmp_path / "long.wav", "wb") as stream:
        stream.write(header[: header.index(b"data") + 4] + struct.pack("<I", 0xFFFFFFFF))
        stream.truncate(2**31)  # sparse: 175 s
    with Recording(tmp_path / "long.wav") as recording:
        assert recording.num_seconds > 170
        assert len(next(recording.blocks(192000))) * 64 <= 2**22


def test_resampler_takes_any_pieces():
    samples = noise(5000, 3)
    expected = soxr.resample(samples, 16000, 11025)
    for sizes in ([5000], [0, 1, 4999], [7] * 714 + [2]):
        resampler, pieces, start = Resampler(16000, 11025, 3), [], 0
        for size in sizes:
            pieces.append(resampler.push(samples[start : start + size]))
            start += size
        found = np.concatenate([*pieces, resampler.finish()])
        assert len(found) == resampled_length(5000, 16000, 11025) == math.ceil(5000 * 11025 / 16000)
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-6)
    assert len(Resampler(16000, 11025).finish()) == 0
