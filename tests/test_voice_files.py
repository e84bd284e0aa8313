"""Tests of the writing of voices."""

import gc
import math
import os
import signal
import subprocess
import sys
import wave

import numpy as np
import pytest
import scipy.io.wavfile
import soundfile
from test_recordings import content, noise, read

from dsd_modules.voice_files import VoiceFiles, wav_header


@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_voices(tmp_path, num_spks):
    voices = noise(1000, num_spks)
    voices[:3, 0] = 1.5, -1.5, 0
    with VoiceFiles(tmp_path / "new" / "folder", "a.b", num_spks, 16000) as files:
        for start, end in ((0, 0), (0, 100), (0, 100), (100, 1000)):
            files.write(voices[start:end])
        assert not any(path.exists() for path in files.paths)
    expected = np.clip(np.concatenate([voices[:100], voices]), -1, 1)
    assert [path.name for path in files.paths] == [f"a.b_spk{i + 1}.wav" for i in range(num_spks)]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [path.name for path in files.paths]
    for path, voice in zip(files.paths, expected.T, strict=True):
        info = soundfile.info(path)
        assert (info.subtype, info.samplerate, info.channels, info.format) == ("PCM_16", 16000, 1, "WAV")
        np.testing.assert_allclose(soundfile.read(path)[0], voice, atol=2**-15)
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_voices_are_clipped_and_16_bit_samples_kept(tmp_path):
    exact = np.arange(-32768, 32768, dtype=np.int32) / np.float32(32768)
    with VoiceFiles(tmp_path, "a", 1, 8000) as files:
        files.write(np.concatenate([[-9, 9], exact])[:, None])
    samples = soundfile.read(files.paths[0], dtype="int16")[0]
    np.testing.assert_array_equal(samples, [-32768, 32767, *range(-32768, 32768)])
    with wave.open(str(files.paths[0])) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 65538)
    np.testing.assert_array_equal(scipy.io.wavfile.read(files.paths[0])[1], samples)


def test_earlier_voices_are_replaced_or_stay(tmp_path):
    def write(value, fault=None):
        with VoiceFiles(tmp_path, "a", 2, 8000) as files:
            files.write(np.full((100, 2), value))
            if fault is not None:
                raise fault
        return files

    write(0.25)
    for fault in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(fault)):
            write(0.5, fault)
        assert sorted(os.listdir(tmp_path)) == ["a_spk1.wav", "a_spk2.wav"]
        assert (soundfile.read(tmp_path / "a_spk2.wav")[0] == 0.25).all()
    for path in write(0.5).paths:
        assert (soundfile.read(path)[0] == 0.5).all()


@pytest.mark.parametrize(
    ("voices", "message"),
    [
        (np.zeros(10), r"shape \[t, 2\], but got \[10\]"),
        (np.zeros((10, 3)), r"shape \[t, 2\], but got \[10, 3\]"),
        (np.full((10, 2), math.nan), "NaN or infinite"),
        (np.full((10, 2), -math.inf), "NaN or infinite"),
    ],
)
def test_bad_voices_leave_nothing(tmp_path, voices, message):
    with pytest.raises(ValueError, match=message), VoiceFiles(tmp_path, "a", 2, 8000) as files:
        files.write(voices)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "a_spk2.wav").mkdir()
    with pytest.raises(OSError, match="A folder stands where") as error, VoiceFiles(tmp_path, "a", 2, 8000):
        pass
    assert error.value.filename == str(tmp_path / "a_spk2.wav")
    assert os.listdir(tmp_path) == ["a_spk2.wav"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), VoiceFiles(tmp_path / "file", "a", 2, 8000):
        pass
    with pytest.raises(OSError, match="name too long"), VoiceFiles(tmp_path, "a" * 300, 2, 8000):
        pass


_FULL_DISK = """
import resource, sys
import numpy as np
from dsd_modules.voice_files import VoiceFiles
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    with VoiceFiles(sys.argv[1], "a", 2, 8000) as files:
        for _ in range(int(sys.argv[2])):
            files.write(np.zeros((1000, 2), np.float32))
except OSError as error:
    print(error.filename, error.strerror)
"""


@pytest.mark.parametrize("num_writes", [10, 100])  # found when the buffer is flushed at the end, or before
def test_full_disk(tmp_path, num_writes):
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path), str(num_writes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in [f"{tmp_path}/a_spk{i}.wav File too large" for i in (1, 2)]
    assert os.listdir(tmp_path) == []


_WRITER = """
import sys, time
import numpy as np
from dsd_modules.voice_files import VoiceFiles
with VoiceFiles(sys.argv[1], "[a] *", 2, 8000) as files:
    files.write(np.zeros((100000, 2), np.float32))
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_that_stays(tmp_path):
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        living = sorted(os.listdir(tmp_path))
        with VoiceFiles(tmp_path, "[a] *", 2, 8000):  # what a living writer has begun stays
            assert set(living) < set(os.listdir(tmp_path))
        writer.send_signal(signal.SIGKILL)
    assert len(living) == 2
    assert all(name.startswith(".[a] *_spk") for name in living)
    (tmp_path / ".[a] *_spk1.wav.txt").write_text("another's")
    (tmp_path / ".a_spk1.wav.7.7.tmp").write_text("another's")
    with VoiceFiles(tmp_path, "[a] *", 2, 8000):
        pass
    ours = ["[a] *_spk1.wav", "[a] *_spk2.wav"]
    assert sorted(os.listdir(tmp_path)) == sorted([*ours, ".[a] *_spk1.wav.txt", ".a_spk1.wav.7.7.tmp"])


@pytest.mark.parametrize("num_samples", [0, 100, 2**31 - 37, 2**31 - 36, 2**31, 2**33])
def test_files_of_any_size(tmp_path, num_samples):
    """Sparse files: no such space is taken."""
    with open(tmp_path / "a.wav", "wb") as stream:
        stream.write(wav_header(num_samples, 44100))
        stream.truncate(80 + 2 * num_samples)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.frames, info.samplerate, info.channels, info.subtype) == (num_samples, 44100, 1, "PCM_16")
    assert info.format == ("RF64" if 72 + 2 * num_samples >= 2**32 - 1 else "WAV")


def test_no_file_is_left_open(tmp_path):
    def num_open():
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    (tmp_path / "a.wav").write_bytes(content(noise(100), 8000))
    (tmp_path / "b.wav").write_text("no audio")
    gc.collect()  # what earlier tests left open
    before = num_open()
    for _ in range(3):
        read(tmp_path / "a.wav")
        with pytest.raises(ValueError, match="cannot be read as audio"):
            read(tmp_path / "b.wav")
        with pytest.raises(RuntimeError), VoiceFiles(tmp_path, "c", 2, 8000):
            raise RuntimeError
    assert num_open() == before
