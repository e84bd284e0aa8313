"""The command line of separation with a separator whose recordings' names tell what happens: see test_separate_command.

Voice i of N is the recording divided by N. ``slow`` takes a minute after the first second, ``killed`` ends the
process as a lack of memory does, ``bug`` and ``memory`` raise.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsd_modules import separate
from dsd_modules.voice_files import VoiceFiles
from shared_modules.recordings import Recording


@dataclass
class SeparatedRecording:
    """As of dsd_modules.inference."""

    paths: list
    num_seconds: float
    elapsed_seconds: float = 0.5
    blocks_run: float = 2.0

    @property
    def real_time_factor(self):
        return self.elapsed_seconds / self.num_seconds


class Separator:
    """``options`` keeps what was asked for last."""

    def __init__(self, num_spks=2, sample_rate=8000):
        self.num_spks, self.sample_rate = num_spks, sample_rate
        self.options = None

    def separate_to_files(self, recording, folder, stem=None, progress=None, **options):
        self.options = options
        name = stem or ""
        if "bug" in name:
            raise TypeError("a bug")
        if "memory" in name:
            raise MemoryError
        with Recording(recording) as source:
            with VoiceFiles(folder, stem, self.num_spks, self.sample_rate) as voices:
                num_samples = 0
                for block in source.blocks(self.sample_rate, options["channel"], 1):
                    num_samples += len(block)
                    voices.write(np.stack([block / self.num_spks] * self.num_spks, 1))
                    if progress is not None:
                        progress(num_samples / self.sample_rate, source.num_seconds)
                    if "slow" in name or "killed" in name:
                        (Path(folder) / f"{stem}.begun").touch()
                    if "killed" in name:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if "slow" in name:
                        time.sleep(float(os.environ.get("SLOW_SECONDS", "60")))
            return SeparatedRecording(voices.paths, num_samples / self.sample_rate)


def load(model, arguments, num_processes=1):
    if model == "wrong":
        raise separate.RunError("The model is wrong.")
    return Separator()


if __name__ in ("__main__", "__mp_main__"):
    separate._load = load

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, separate.leave)
    sys.exit(separate.main())
