"""Mixing at load time: the samples of LibriMix's generator, its metadata, faults of the data, and the cache."""

import csv
import itertools
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly
from torch.utils.data import DataLoader

from dsd_modules.data import cache as cache_module
from dsd_modules.data import on_the_fly
from dsd_modules.data.cache import SharedCache
from dsd_modules.data.on_the_fly import OnTheFlyReader, extend_noise, find_mixtures, read_metadata, round_to_16_bits
from dsd_modules.dataset import MixtureDataset
from dsd_modules.report import read_history
from shared_modules import corpus
from shared_modules.files import write_whole

NUM_MIXTURES = 5
LAYOUTS = list(itertools.product((2, 3), (8000, 16000), ("min", "max")))
TASKS = ("mix_clean", "mix_both", "mix_single")


def generate_as_librimix(row, folders, out, num_sources, sample_rate, mode):
    """LibriMix's generator for one mixture: whole files, one step after the other, written with soundfile.

    Returns ``{"s1": ..., "noise": ..., "mix_clean": ...}``: before they are written, and read back.
    """
    sources = [soundfile.read(folders[0] / row[f"source_{k + 1}_path"], dtype="float32")[0] for k in range(num_sources)]
    gains = [float(row[f"source_{k + 1}_gain"]) for k in range(num_sources)] + [float(row["noise_gain"])]
    longest = max(len(source) for source in sources)
    noise = soundfile.read(folders[1] / row["noise_path"], dtype="float32", stop=longest)[0]
    if noise.ndim > 1:
        noise = noise[:, 0]
    if len(noise) < longest:
        fade = np.hanning(16001)  # rises to its middle, and falls from there
        whole = noise
        while len(whole) < longest:
            crossing = whole[-8001:] * fade[8000::-1] + noise[:8001] * fade[:8001]
            whole = np.concatenate([whole[:-8001], crossing, noise[8001:]])
        noise = whole[:longest]
    signals = [resample_poly(x * gain, sample_rate, 16000) for x, gain in zip([*sources, noise], gains, strict=True)]
    lengths = [len(x) for x in signals]
    if mode == "min":
        signals = [x[: min(lengths)] for x in signals]
    else:
        signals = [np.pad(x, (0, max(lengths) - len(x))) for x in signals]
    floats = dict(zip([*(f"s{k + 1}" for k in range(num_sources)), "noise"], signals, strict=True))
    parts = {"mix_clean": signals[:-1], "mix_both": signals, "mix_single": [signals[0], signals[-1]]}
    for task, summands in parts.items():
        floats[task] = np.zeros_like(signals[0])
        for x in summands:
            floats[task] += x
    written = {}
    for name, x in floats.items():
        soundfile.write(out / f"{name}.wav", x, sample_rate)
        written[name] = soundfile.read(out / f"{name}.wav", dtype="float32")[0]
    return floats, written


def write_metadata(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """LibriSpeech and WHAM in small: synthetic speech as 16 kHz flac, and noises of several lengths; the csv's rows."""
    root = tmp_path_factory.mktemp("on_the_fly")
    metadata = corpus.make_corpus(root / "corpus", {"train": 4}, {"train": 2}, num_workers=2, progressbar=False)
    with open(metadata, newline="", encoding="utf-8") as stream:
        utterances = list(csv.DictReader(stream))
    paths = []
    for number, utterance in enumerate(utterances):
        samples = soundfile.read(metadata.parent / utterance["path"], dtype="int16")[0]
        samples = samples[: len(samples) - number % 2]  # lengths odd and even
        speaker, chapter = 100 + number // 2, 7 + number % 2
        paths.append(f"train-clean-100/{speaker}/{chapter}/{speaker}-{chapter}-{number:04d}.flac")
        (root / "LibriSpeech" / paths[-1]).parent.mkdir(parents=True)
        soundfile.write(root / "LibriSpeech" / paths[-1], samples, 16000)
    rng = np.random.default_rng(0)
    (root / "wham_noise" / "tr").mkdir(parents=True)
    noises = {"short": 8400, "half": 9601, "second": 16000, "middle": 30001, "long": 400000}
    for name, num_samples in noises.items():
        samples = 0.1 * rng.standard_normal((num_samples, 2))
        samples = samples[:, 0] if name == "middle" else samples  # as augmented noise, which is mono
        soundfile.write(root / "wham_noise" / "tr" / f"{name}.wav", samples, 16000)
    rows = {}
    for num_spks in (2, 3):
        rows[num_spks] = []
        for number, noise in enumerate(noises):
            chosen = [paths[2 * ((number + k) % 4) + (number // 4 + k) % 2] for k in range(num_spks)]
            row = {"mixture_ID": "_".join(path.split("/")[-1][:-5] for path in chosen)}
            for k, path in enumerate(chosen, 1):
                gain = 5.0 if number == 1 else rng.uniform(0.2, 1.9)  # the second mixture is clipped
                row |= {f"source_{k}_path": path, f"source_{k}_gain": repr(gain)}
            rows[num_spks].append(row | {"noise_path": f"tr/{noise}.wav", "noise_gain": repr(rng.uniform(0.3, 3))})
        assert len({row["mixture_ID"] for row in rows[num_spks]}) == NUM_MIXTURES
        write_metadata(
            root / "metadata" / f"Libri{num_spks}Mix", f"libri{num_spks}mix_train-clean-100.csv", rows[num_spks]
        )
        info = [{"speaker_ID": 1, "sex": "F"}]
        write_metadata(root / "metadata" / f"Libri{num_spks}Mix", f"libri{num_spks}mix_train-clean-100_info.csv", info)
    return root, rows


@pytest.fixture(scope="session")
def librimix_files(speech, tmp_path_factory):
    """Of each layout and mixture: the generator's signals, before they are written and read back."""
    root, rows = speech
    out = tmp_path_factory.mktemp("generated")
    folders = (root / "LibriSpeech", root / "wham_noise")
    return {
        layout: {row["mixture_ID"]: generate_as_librimix(row, folders, out, *layout) for row in rows[layout[0]]}
        for layout in LAYOUTS
    }


def find(root, num_sources=2, sample_rate=8000, mode="min", task="mix_clean", **options):
    num_spks = 1 if task == "mix_single" else num_sources
    folders = (root / "LibriSpeech", None if task == "mix_clean" else root / "wham_noise")
    metadata = root / "metadata" / f"Libri{num_sources}Mix"
    return find_mixtures(
        *folders, metadata, "train-100", num_spks, sample_rate, mode, task, progressbar=False, **options
    )


def make_reader(root, num_sources=2, sample_rate=8000, task="mix_clean", **options):
    num_spks = 1 if task == "mix_single" else num_sources
    wham_folder = None if task == "mix_clean" else root / "wham_noise"
    return OnTheFlyReader(root / "LibriSpeech", wham_folder, num_spks, sample_rate, task, **options)


def as_read_from_csv(rows):
    return [{name: str(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_samples_are_those_of_librimix(speech, librimix_files, layout, task):
    """Whole mixtures and crops, rounded and not, made and from the cache."""
    num_sources, sample_rate, mode = layout
    root, _ = speech
    entries = as_read_from_csv(find(root, num_sources, sample_rate, mode, task))
    num_spks = 1 if task == "mix_single" else num_sources
    names = [task, *(f"s{k + 1}" for k in range(num_spks))]
    assert [entry["ID"] for entry in entries] == sorted(librimix_files[layout])
    rng = np.random.default_rng(1)
    for quantize, cache_bytes in itertools.product((True, False), (0, 2**25)):
        reader = make_reader(root, num_sources, sample_rate, task, quantize=quantize, cache_bytes=cache_bytes)
        for entry in entries:
            signals = librimix_files[layout][entry["ID"]][quantize]
            expected = np.stack([signals[name] for name in names]).astype(np.float32)
            noise = np.zeros(expected.shape[1]) if task == "mix_clean" else signals["noise"].astype(np.float32)
            total = expected.shape[1]
            assert round(float(entry["duration"]) * sample_rate) == total
            starts = [0, *rng.integers(0, total - 1000, 2).tolist()]
            stretches = [(start, int(rng.integers(1, total - start))) for start in starts]
            stretches += [(0, total), (1, total - 1), (total - 1, 1), (total - 777, 777), (5, 0)]
            for start, num_samples in stretches:
                stretch = slice(start, start + num_samples)
                made = reader.read(entry, start, num_samples)
                assert (made.dtype, made.shape) == (np.float32, (1 + num_spks, num_samples))
                assert made.flags.writeable
                np.testing.assert_array_equal(made, expected[:, stretch], strict=True)
                for index in range(num_spks):
                    source = reader.read_source(entry, index, start, num_samples)
                    np.testing.assert_array_equal(source, expected[1 + index, stretch], strict=True)
                np.testing.assert_array_equal(reader.read_noise(entry, start, num_samples), noise[stretch])


def test_test_data_covers_the_cases(speech, librimix_files):
    """Noise extended once, more than once and not at all; clipping; files of different length."""
    root, _ = speech
    entries = find(root, task="mix_both")
    rounds = [(row["longest_samples"] - 8001) / (row["noise_samples"] - 8001) for row in entries]
    assert min(rounds) < 1
    assert any(1 < number < 2.5 for number in rounds)
    assert max(rounds) > 20
    clipped = [np.abs(written["mix_clean"]).max() for _, written in librimix_files[(2, 16000, "max")].values()]
    assert max(clipped) == 1
    parities = {tuple(row[f"s{k}_samples"] % 2 for k in (1, 2)) for row in entries}
    assert len(parities) > 1
    assert all(row["s1_samples"] != row["s2_samples"] for row in entries)


def test_stretch_of_every_position(speech):
    """A resampled stretch does not depend on where it begins and ends: every start and stop of a short signal."""
    rng = np.random.default_rng(2)
    for num_samples, dtype in itertools.product((1, 2, 23, 60, 131), (np.float32, np.float64)):
        signal = rng.standard_normal(num_samples).astype(dtype)
        whole = resample_poly(signal, 8000, 16000)
        for start in range(len(whole)):
            for stop in range(start + 1, len(whole) + 1):
                first, last = on_the_fly.needed_stretch(start, stop, num_samples, 8000)
                made = on_the_fly.resample_stretch(signal[first:last], first, 8000, start, stop)
                np.testing.assert_array_equal(made, whole[start:stop], strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_that_of_soundfile(tmp_path, dtype):
    rng = np.random.default_rng(3)
    signals = [3 * rng.standard_normal(10000), 1e-5 * rng.standard_normal(10000), 1e-9 * rng.standard_normal(10000)]
    signals += [np.arange(-70000, 70000) / 2**16, np.linspace(-1.0001, -0.9999, 1001), [0.0, -0.0, 1, -1, 5, -5]]
    signals += [np.nextafter(dtype(k / 2**15), dtype(side)) for k in range(-32768, 32768, 97) for side in (-2, 2)]
    signal = np.concatenate([np.ravel(x) for x in signals]).astype(dtype)
    soundfile.write(tmp_path / "signal.wav", signal, 8000)
    expected = soundfile.read(tmp_path / "signal.wav", dtype="float32")[0]
    np.testing.assert_array_equal(round_to_16_bits(signal), expected, strict=True)


def test_extended_noise_has_constant_power_fades():
    """A constant stays constant: the two fades of one seam add up to 1; its end is cut."""
    noise = np.full(20000, 0.5, np.float32)
    extended = extend_noise(noise, 70001)
    assert extended.shape == (70001,)
    np.testing.assert_allclose(extended, 0.5, rtol=1e-12)
    with pytest.raises(ValueError, match="from 8002 samples on, but got 8001"):
        extend_noise(noise[:8001], 9000)


def test_metadata_folders(speech, tmp_path):
    """The folder of one LibriMix or the one above; csvs named with and without -clean."""
    root, rows = speech
    for folder in (root / "metadata", root / "metadata" / "Libri3Mix"):
        mixtures = read_metadata(folder, "train-100", 3, "mix_both")
        assert [mixture["ID"] for mixture in mixtures] == sorted(row["mixture_ID"] for row in rows[3])
        assert all(len(mixture["sources"]) == 3 and len(mixture["noise"]) == 1 for mixture in mixtures)
    write_metadata(tmp_path, "libri2mix_dev.csv", rows[2])
    assert len(read_metadata(tmp_path, "dev", 2)) == NUM_MIXTURES
    assert len(read_metadata(tmp_path, "dev", 1, "mix_single")) == NUM_MIXTURES
    for message, arguments in {
        "has no libri2mix_test.csv": (tmp_path, "test", 2),
        "it has this set for 2 speakers .num_spks is 3": (tmp_path, "dev", 3),
        "more than one csv for train-100: Libri2Mix.* and Libri3Mix": (root / "metadata", "train-100", 1, "mix_single"),
        "mix_single has one speaker, but num_spks is 2": (tmp_path, "dev", 2, "mix_single"),
        "metadata_folder .*nowhere does not exist": (tmp_path / "nowhere", "dev", 2),
        "task can only be one of mix_clean, mix_both, mix_single, but got 'mix'": (tmp_path, "dev", 2, "mix"),
    }.items():
        with pytest.raises(ValueError, match=message):
            read_metadata(*arguments)


def _change(rows, number, **cells):
    return [row | cells if position == number else row for position, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("message", "spoil"),
    {
        "has no rows": lambda rows: [],
        "has no column source_2_gain": lambda rows: [
            {name: cell for name, cell in row.items() if name != "source_2_gain"} for row in rows
        ],
        "has a source_3_path, but its name says 2": lambda rows: [row | {"source_3_path": "a"} for row in rows],
        "Line 4 of .* has no source_1_path": lambda rows: _change(rows, 2, source_1_path=""),
        "Line 3 of .* a gain is a finite number, but got 'nan'": lambda rows: _change(rows, 1, noise_gain="nan"),
        "Line 2 of .* a gain is a finite number, but got 'loud'": lambda rows: _change(rows, 0, source_2_gain="loud"),
        "stands 2 times in": lambda rows: _change(rows, 1, mixture_ID=rows[0]["mixture_ID"]),
        "An id can be a file name .* but got '../a'": lambda rows: _change(rows, 1, mixture_ID="../a"),
    }.items(),
)
def test_faults_of_the_metadata(speech, tmp_path, message, spoil):
    _, rows = speech
    spoilt = spoil(rows[2])
    write_metadata(tmp_path, "libri2mix_dev-clean.csv", spoilt or rows[2])
    if not spoilt:
        header = (tmp_path / "libri2mix_dev-clean.csv").read_text().splitlines()[0]
        (tmp_path / "libri2mix_dev-clean.csv").write_text(header + "\n")
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path, "dev", 2, "mix_both")


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize(
    ("message", "column", "spoil"),
    [
        ("does not exist", "source_2_path", lambda path: path.unlink()),
        ("is no readable audio file: empty, cut off", "source_1_path", _cut),
        ("is no readable audio file", "source_1_path", lambda path: path.write_text("not audio")),
        ("has a sample rate of 44100 Hz", "source_2_path", lambda path: soundfile.write(path, np.ones(50000), 44100)),
        ("has 2 channels, but at most 1", "source_1_path",
         lambda path: soundfile.write(path, np.ones((9000, 2)), 16000)),
        ("is no readable audio file", "source_1_path", lambda path: soundfile.write(path, np.zeros(0), 16000)),
        ("has 2 samples: the mixture would have 1, but at least 16", "source_1_path",
         lambda path: soundfile.write(path, np.ones(2), 16000)),
        ("does not exist;", "noise_path", lambda path: path.unlink()),
        ("is no readable audio file", "noise_path", _cut),
        ("has 3 channels, but at most 2", "noise_path", lambda path: soundfile.write(path, np.ones((9000, 3)), 16000)),
        ("has 8001 samples, but a noise", "noise_path", lambda path: soundfile.write(path, np.ones(8001), 16000)),
    ],
)  # fmt: skip
def test_faults_of_the_files(speech, tmp_path, message, column, spoil):
    """The first mixture with a faulty file, in the order of the ids, and how many there are."""
    root, rows = speech
    for name in ("LibriSpeech", "wham_noise"):
        for path in (root / name).rglob("*.*"):
            copy = tmp_path / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    write_metadata(tmp_path / "metadata" / "Libri2Mix", "libri2mix_train-clean-100.csv", rows[2][::-1])
    folder = tmp_path / ("wham_noise" if column == "noise_path" else "LibriSpeech")
    spoilt = rows[2][3][column]
    users = [
        row["mixture_ID"]
        for row in rows[2]
        if spoilt in (row["source_1_path"], row["source_2_path"], row["noise_path"])
    ]
    assert len(find(tmp_path, task="mix_both", min_samples=16)) == NUM_MIXTURES
    spoil(folder / spoilt)
    with pytest.raises(ValueError, match=message) as caught:
        find(tmp_path, task="mix_both", min_samples=16)
    assert str(caught.value).startswith(f"{folder / spoilt} (of mixture {min(users)}) ")
    assert str(caught.value).endswith(f"; {len(users)} of {NUM_MIXTURES} mixtures have such a fault.")


def test_augmented_noise_that_is_missing(speech, tmp_path):
    root, rows = speech
    write_metadata(tmp_path, "libri2mix_dev.csv", _change(rows[2], 0, noise_path="tr/longsp08.wav"))
    folders = (root / "LibriSpeech", root / "wham_noise", tmp_path)
    with pytest.raises(ValueError, match=r"longsp08.wav .* does not exist .*scripts/augment_train_noise.py"):
        find_mixtures(*folders, "dev", 2, 8000, "min", "mix_both", progressbar=False)
    assert len(find_mixtures(*folders, "dev", 2, 8000, "min", "mix_clean", progressbar=False)) == NUM_MIXTURES


def test_folders_that_are_not_right(speech):
    root, _ = speech
    metadata = root / "metadata"
    for message, folders in {
        "give --librispeech_folder .*LibriSpeech": (root, root / "wham_noise"),
        "librispeech_folder is needed, but it is not given": (None, root / "wham_noise"),
        "wham_folder is needed": (root / "LibriSpeech", None),
        "wham_folder .*nowhere does not exist": (root / "LibriSpeech", root / "nowhere"),
    }.items():
        with pytest.raises(ValueError, match=message):
            find_mixtures(*folders, metadata, "train-100", 2, 8000, "min", "mix_both", progressbar=False)


def test_a_file_that_changed_after_preparation(speech, tmp_path):
    root, _ = speech
    entry = as_read_from_csv(find(root))[0]
    path = tmp_path / entry["s1_wav"]
    path.parent.mkdir(parents=True)
    reader = OnTheFlyReader(tmp_path, None, 2, 8000)
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        reader.read_source(entry, 0, 0, 100)
    content = (root / "LibriSpeech" / entry["s1_wav"]).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    whole = int(entry["s1_samples"]) // 2
    with pytest.raises(ValueError, match=str(path)):
        reader.read_source({**entry, "duration": whole / 8000}, 0, whole - 100, 100)
    soundfile.write(path, np.ones(20000), 16000)
    with pytest.raises(ValueError, match=f"{path} has 20000 samples, but its manifest says {entry['s1_samples']}"):
        reader.read_source(entry, 0, 0, 100)
    reader = make_reader(root)
    with pytest.raises(ValueError, match=f"Mixture {entry['ID']} has .* samples, but those from 0 to 10000000"):
        reader.read(entry, 0, 10**7)


def test_noise_that_is_not_finite(speech, tmp_path):
    root, _ = speech
    entry = as_read_from_csv(find(root, task="mix_both"))[0]
    path = tmp_path / entry["noise_wav"]
    path.parent.mkdir(parents=True)
    soundfile.write(path, np.full(int(entry["noise_samples"]), np.nan), 16000, subtype="FLOAT")
    reader = OnTheFlyReader(root / "LibriSpeech", tmp_path, 2, 8000, "mix_both")
    with pytest.raises(ValueError, match=f"{path} holds values that are not finite"):
        reader.read(entry, 0, 100)


def _key(number):
    return number.to_bytes(16, "little")


def test_cache_keeps_what_fits():
    """Bounded, never wrong, and the first that came stay."""
    cache = SharedCache(10000)
    kept = [number for number in range(100) if cache.put(_key(number), bytes([number]) * 1500)]
    assert kept == list(range(6))
    assert not cache.has_room(1500)
    assert cache.put(_key(1000), b"small")
    for number in range(100):
        content = cache.get(_key(number))
        assert (content is None) if number not in kept else (content == bytes([number]) * 1500)
    assert cache.put(_key(3), b"another")  # the first content stays
    assert cache.get(_key(3)) == bytes([3]) * 1500
    for empty in (SharedCache(0), SharedCache(10), pickle.loads(pickle.dumps(cache))):
        assert not empty.put(_key(1), b"")
        assert empty.get(_key(1)) is None
    with pytest.raises(ValueError, match="GiB cannot be had"):
        SharedCache(2**60)


def test_cache_is_shared_with_forked_processes():
    """What one process keeps, the others find; two that keep the same one at once do no harm."""
    cache = SharedCache(2**20)
    context = multiprocessing.get_context("fork")

    def fill():
        for number in range(200):
            assert cache.put(_key(number), bytes([number]) * number)

    workers = [context.Process(target=fill) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert all(cache.get(_key(number)) == bytes([number]) * number for number in range(200))
    assert cache.get(_key(200)) is None


def test_cache_filled_by_another_process_in_between(monkeypatch):
    """The room is looked at again once the lock is held."""
    cache = SharedCache(2000)
    acquire = cache._acquire

    def be_late():
        monkeypatch.undo()
        other = multiprocessing.get_context("fork").Process(target=cache.put, args=(_key(1), b"1" * 1500))
        other.start()
        other.join()
        return acquire()

    monkeypatch.setattr(cache, "_acquire", be_late)
    assert not cache.put(_key(2), b"2" * 1500)
    assert (cache.get(_key(1)), cache.get(_key(2))) == (b"1" * 1500, None)


def test_cache_after_a_killed_writer(monkeypatch):
    """Killed between the bytes and the end of the log, with the lock held: nothing wrong is read, nobody hangs."""
    monkeypatch.setattr(cache_module, "_PATIENCE_SECONDS", 0.05)
    cache = SharedCache(2**20)
    assert cache.put(_key(1), b"before")

    class Deadly:
        """In place of the record's struct, which is written after the bytes and before the end of the log."""

        size = cache_module._RECORD.size

        def pack_into(self, *_):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die():
        cache_module._RECORD = Deadly()
        cache.put(_key(2), b"x" * 1000)

    worker = multiprocessing.get_context("fork").Process(target=write_and_die)
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert cache.get(_key(1)) == b"before"
    assert cache.get(_key(2)) is None
    assert not cache.put(_key(3), b"after")


def test_cached_mixtures_are_not_read_again(speech, monkeypatch):
    """Each file is read once with room for all, and again where there is none; another manifest is another key."""
    root, _ = speech
    entries = as_read_from_csv(find(root))
    reads = []
    read_file = on_the_fly._read_file
    monkeypatch.setattr(on_the_fly, "_read_file", lambda path, *rest: reads.append(path) or read_file(path, *rest))
    reader = make_reader(root, cache_bytes=2**24)
    plain = make_reader(root)
    for _ in range(2):
        for entry in entries:
            reader.read(entry, 100, 5000)
            reader.read_source(entry, 1, 7, 500)
    assert len(reads) == 2 * NUM_MIXTURES
    louder = {**entries[0], "s1_gain": "0.123"}
    np.testing.assert_array_equal(reader.read(louder, 0, 3000), plain.read(louder, 0, 3000))
    assert not np.array_equal(reader.read(louder, 0, 3000), plain.read(entries[0], 0, 3000))

    whole = 3 * 2 * round(float(entries[0]["duration"]) * 8000)
    small = make_reader(root, cache_bytes=whole + 500)
    small.read(entries[0], 0, 100)
    del reads[:]
    small.read(entries[0], 50, 100)
    assert reads == []
    np.testing.assert_array_equal(small.read(entries[1], 50, 100), plain.read(entries[1], 50, 100))
    assert not small.cache.has_room(whole)


@pytest.mark.parametrize("quantize", [True, False])
def test_data_loader_workers_share_the_cache(speech, librimix_files, tmp_path, quantize):
    """Two forked workers, three epochs: the generator's samples, and no file is opened once all is kept."""
    root, _ = speech
    rows = find(root, task="mix_both")
    with write_whole(tmp_path / "train.csv") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    reader = make_reader(root, task="mix_both", quantize=quantize, cache_bytes=2**24)
    dataset = MixtureDataset(tmp_path / "train.csv", 8000, reader)
    for epoch in range(3):  # each with workers that are forked anew
        if epoch == 2:
            reader.librispeech_folder = "nowhere"
        loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
        for item in loader:
            signals = librimix_files[(2, 8000, "min")][item["id"]][quantize]
            np.testing.assert_array_equal(item["mix_sig"].numpy(), signals["mix_both"])
            expected = np.stack([signals["s1"], signals["s2"]], axis=1)
            np.testing.assert_array_equal(item["sources"].numpy(), expected)


def test_reader_without_its_cache_after_pickling(speech, librimix_files):
    """For workers that are spawned."""
    root, _ = speech
    entry = as_read_from_csv(find(root))[0]
    reader = pickle.loads(pickle.dumps(make_reader(root, cache_bytes=2**24)))
    made = reader.read(entry, 0, 1000)
    np.testing.assert_array_equal(made[0], librimix_files[(2, 8000, "min")][entry["ID"]][True]["mix_clean"][:1000])


def test_mistaken_options(speech):
    root, _ = speech
    for message, options in {
        "sample_rate can only be 8000 or 16000 Hz, but got 44100": {"sample_rate": 44100},
        "task can only be one of .* but got 'noisy'": {"task": "noisy"},
    }.items():
        with pytest.raises(ValueError, match=message):
            make_reader(root, **options)
    with pytest.raises(ValueError, match="mode can only be 'min' or 'max', but got 'mid'"):
        find(root, mode="mid")


@pytest.mark.parametrize(
    ("task", "num_spks", "cache_gb"), [("mix_clean", 2, 0), ("mix_both", 2, 0.1), ("mix_single", 1, 0)]
)
def test_a_run_is_the_one_on_generated_files(speech, run_recipe, tmp_path, task, num_spks, cache_gb):
    """The same recipe on the generator's files, and without them: the same training, the same scores."""
    root, rows = speech
    folders = (root / "LibriSpeech", root / "wham_noise")
    generated = tmp_path / "Libri2Mix" / "wav8k" / "min"
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        renamed = [{**row, "mixture_ID": f"{row['mixture_ID']}-{subset}"} for row in rows[2]]
        write_metadata(tmp_path / "metadata", f"libri2mix_{subset}.csv", renamed)
        sexes = [{"mixture_ID": row["mixture_ID"], "speaker_1_sex": "F", "speaker_2_sex": "M"} for row in renamed]
        write_metadata(tmp_path / "metadata", f"libri2mix_{subset}_info.csv", sexes)
        for row in renamed:
            generate_as_librimix(row, folders, tmp_path, 2, 8000, "min")
            for name in (task, *(f"s{k + 1}" for k in range(num_spks))):
                folder = generated / subset.replace("-clean", "") / name
                folder.mkdir(parents=True, exist_ok=True)
                (tmp_path / f"{name}.wav").rename(folder / f"{row['mixture_ID']}.wav")
    options = {"task": task, "num_spks": num_spks, "train_sets": "[train-100]", "segment_seconds": 0.5, "batch_size": 2}
    run_recipe(**options, output_folder=tmp_path / "files", data_folder=tmp_path / "Libri2Mix")
    on_load = {"librispeech_folder": folders[0], "metadata_folder": tmp_path / "metadata", "cache_gb": cache_gb}
    on_load |= {} if task == "mix_clean" else {"wham_folder": folders[1]}
    run_recipe(**options, output_folder=tmp_path / "on_load", **on_load)
    histories = [read_history(tmp_path / run / "history.csv") for run in ("files", "on_load")]
    for first, second in zip(*histories, strict=True):
        assert str({**first, "seconds": 0}) == str({**second, "seconds": 0})  # NaN equals nothing
    tables = [(tmp_path / run / "test_results.csv").read_bytes() for run in ("files", "on_load")]
    assert tables[0] == tables[1]
    if num_spks == 2:
        assert "gender,FM,5," in (tmp_path / "on_load" / "test_groups.csv").read_text()
    wavs = {path.parent.name for path in (tmp_path / "on_load").rglob("*.wav")}
    assert wavs == {"examples"}  # nothing else was written
