"""How long a store of very many voice profiles takes to fill, load, search and forget somebody, and its memory.

    python benchmarks/bench_profiles.py
    python benchmarks/bench_profiles.py --profiles 1000 --folder .   # whether it runs

The embeddings are random. Each number is of one run, but for the search, the median of many; a search is identify
without the model's time for the recording. The store lies in a temporary folder: loading is measured with what the
system has in its cache.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from nessa_modules.profiles import VoiceProfiles

CALIBRATION = [{"false_accept_rate": 0.001, "threshold": 0.5}]
BATCH = 10_000  # profiles that are enrolled in one step


def encoder(size):
    """A model whose recordings are embeddings."""
    return SimpleNamespace(model_id="bench", embedding_size=size, encode_recording=lambda recording: recording[0])


class Turned:
    """A one-sided linear alignment, with the interface of nessa_modules.alignment."""

    enroll_model_id, runtime_model_id, alignment_id = "bench", "newer", "turned"
    calibration = CALIBRATION

    def __init__(self, size):
        self.matrix = np.random.default_rng(1).standard_normal((size, size)).astype(np.float32) / size**0.5

    def enroll(self, x):
        return x @ self.matrix

    def runtime(self, y):
        return y


def memory_mib():
    """What the process holds now, MiB."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() / 2**20


class Times:
    """Rows of a table: wall and processor time in seconds, or a size."""

    def __init__(self):
        self.rows = []

    def take(self, name, action, times=1):
        """Do something so many times: the medians, and the last result."""
        wall, processor = [], []
        for _ in range(times):
            start = time.perf_counter(), time.process_time()
            result = action()
            wall.append(time.perf_counter() - start[0])
            processor.append(time.process_time() - start[1])
        self.rows.append((name, f"{statistics.median(wall):.3g} s", f"{statistics.median(processor):.3g} s"))
        return result

    def show(self):
        print("| | wall time, or size | processor time |\n| --- | ---: | ---: |")
        for row in self.rows:
            print(f"| {' | '.join(row)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=int, default=1_000_000, metavar="N", help="(default: a million)")
    parser.add_argument("--dimensions", type=int, default=192, metavar="D", help="of an embedding (default: 192)")
    parser.add_argument("--searches", type=int, default=50, metavar="K", help="(default: 50)")
    parser.add_argument("--folder", help="where the store is made (default: the system's for temporary files)")
    parser.add_argument("--aligned", action="store_true", help="map the profiles through a linear alignment")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    size, total = arguments.dimensions, arguments.profiles
    times = Times()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "voices.db"
        profiles = VoiceProfiles(path, encoder(size), calibration=CALIBRATION, false_accept_rate=0.001)

        def enroll():
            for begin in tqdm(range(0, total, BATCH), desc="enroll", unit_scale=BATCH, leave=False, disable=None):
                embeddings = rng.standard_normal((min(BATCH, total - begin), size)).astype(np.float32)
                profiles.enroll_embeddings((f"person {begin + row:07d}", e) for row, e in enumerate(embeddings))

        times.take(f"enroll them, {BATCH} at a time", enroll)
        times.rows.append(("the file", f"{path.stat().st_size / 2**20:.0f} MiB", ""))
        known, alignment = encoder(size), None
        if arguments.aligned:
            alignment = Turned(size)
            times.take("migrate", lambda: profiles.migrate(alignment))
            known.model_id = "newer"
        profiles.close()

        before = memory_mib()
        profiles = VoiceProfiles(path, known, alignment)
        recording = rng.standard_normal(size).astype(np.float32), 16000
        result = times.take("first search, which loads", lambda: profiles.identify(recording))
        assert result.num_profiles == total
        times.rows.append(("memory of the loaded profiles", f"{memory_mib() - before:.0f} MiB", ""))
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        times.rows.append(("most memory of the process", f"{most:.0f} MiB", ""))
        times.take("search, median", lambda: profiles.identify(recording), arguments.searches)

        other = VoiceProfiles(path, known, alignment)  # as another process would
        other.enroll_embeddings([("new", recording[0])])
        result = times.take("search after another has enrolled somebody", lambda: profiles.identify(recording))
        assert (result.name, result.num_profiles) == ("new", total + 1)
        times.take("verify", lambda: profiles.verify("new", recording))
        times.take("remove", lambda: other.remove("new"))
        result = times.take("search after another has removed somebody", lambda: profiles.identify(recording))
        assert (result.name, result.num_profiles) == (None, total)
    print(f"{total} profiles of {size} dimensions, {os.environ.get('OMP_NUM_THREADS', 'all')} threads\n")
    times.show()


if __name__ == "__main__":
    main()
