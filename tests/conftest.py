"""Shared by the tests: a tiny LibriMix-shaped folder, and runs of the real recipe on it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

# Scripts that tests start.
collect_ignore = ["killed_run.py", "ranks_run.py", "separate_run.py"]

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "recipes" / "LibriMix" / "separation"
HPARAMS = RECIPE / "hparams" / "sepformer_dsd.yaml"

# Small enough for a test, by the same overrides a user would type.
TINY_MODEL = {
    "num_filters": 16,
    "kernel_size": 16,
    "chunk_size": 20,
    "num_blocks": 2,
    "num_intra_layers": 1,
    "num_inter_layers": 1,
    "num_heads": 2,
    "d_ffn": 16,
}
TINY = {
    **TINY_MODEL,
    "number_of_epochs": 2,
    "batch_size": 4,
    "lr": 0.005,
    "probe_size": 4,
    "examples_interval": 1,
    "num_workers": 0,
    "device": "cpu",
    "noprogressbar": None,
}


torch.set_num_threads(1)  # at once: fixtures of modules come before those of tests


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# For programs that tests start. On Linux what getrusage tells begins at the size of the process that started it.
PEAK_BYTES = """
import os, resource

def peak_bytes():
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
"""


def voice(rng, num_samples, pitch_hz, sample_rate=8000):
    """A harmonic tone whose loudness and pitch wander like a voice's."""
    time = np.arange(num_samples) / sample_rate
    phase = 2 * np.pi * pitch_hz * (time + 0.01 * np.sin(2 * np.pi * rng.uniform(1, 4) * time))
    tone = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 6))
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * rng.uniform(1, 3) * time + rng.uniform(0, 6))
    return (0.1 * rng.uniform(0.5, 1) * envelope * tone).astype(np.float32)


def write_librimix(root, sizes, num_spks=2, sample_rate=8000, seconds=(0.5, 0.8), seed=0):
    """A folder in LibriMix's layout of wandering tones: ``sizes`` maps a set to its number of mixtures."""
    rng = np.random.default_rng(seed)
    for subset, size in sizes.items():
        folder = Path(root) / f"wav{sample_rate // 1000}k" / "min" / subset
        for name in ("mix_clean", *(f"s{i + 1}" for i in range(num_spks))):
            (folder / name).mkdir(parents=True)
        for number in range(size):
            num_samples = int(sample_rate * rng.uniform(*seconds))
            pitches = rng.uniform(100, 300, num_spks)
            sources = [voice(rng, num_samples, pitch, sample_rate) for pitch in pitches]
            for name, signal in (("mix_clean", sum(sources)), *((f"s{i + 1}", s) for i, s in enumerate(sources))):
                soundfile.write(folder / name / f"{subset}_{number:03d}.wav", signal, sample_rate, subtype="PCM_16")
    return Path(root)


def write_manifests(folder, data_folder):
    """A user's own manifests of such a folder, which name the speakers: the options that give them."""
    options = {}
    for name, subset in (("train", "train-360"), ("valid", "dev"), ("test", "test")):
        mixtures = Path(data_folder) / "wav8k" / "min" / subset
        lines = ["ID,mix_wav,s1_wav,s2_wav,s1_speaker,s2_speaker"]
        for number, wav in enumerate(sorted((mixtures / "mix_clean").iterdir())):
            paths = ",".join(str(mixtures / signal / wav.name) for signal in ("mix_clean", "s1", "s2"))
            lines.append(f"{wav.stem},{paths},speaker{number % 7},speaker{7 + number % 5}")
        options[f"{name}_manifest"] = Path(folder) / f"{name}.csv"
        options[f"{name}_manifest"].write_text("\n".join(lines))
    return options


@pytest.fixture(scope="session")
def librimix(tmp_path_factory):
    """Two speakers, 24 training, 5 validation and 5 test mixtures."""
    return write_librimix(tmp_path_factory.mktemp("data") / "Libri2Mix", {"train-360": 24, "dev": 5, "test": 5})


@pytest.fixture(scope="session")
def librimix3(tmp_path_factory):
    """Three speakers."""
    sizes = {"train-360": 8, "dev": 3, "test": 3}
    return write_librimix(tmp_path_factory.mktemp("data3") / "Libri3Mix", sizes, num_spks=3)


def arguments(overrides):
    """A command line from a dict; None is a flag."""
    return [
        part
        for name, value in overrides.items()
        for part in ([f"--{name}"] if value is None else [f"--{name}", str(value)])
    ]


@pytest.fixture(scope="session")
def recipe():
    """The recipe's train.py as a module."""
    sys.path.insert(0, str(RECIPE))
    spec = importlib.util.spec_from_file_location("train", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_recipe(recipe):
    """Run the recipe in this process: ``run_recipe(data_folder=..., output_folder=..., ...)``."""
    hook = sys.excepthook

    def run(**overrides):
        recipe.main([str(HPARAMS), *arguments({**TINY, **overrides})])

    yield run
    sys.excepthook = hook
