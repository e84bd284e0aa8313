"""Stand-ins for models, and processes that use a store of voice profiles: ``profiles_run.py ACTION STORE NUMBER``.

``enroll``, ``remove`` and ``migrate`` kill a process in the middle of it, without warning, so many times at moments all
over it, look at what is left, and print how often that was the state before and the state after it. ``crowd`` enrolls
so many people one after the other, and identifies each. ``full`` enrolls until files can grow no more.
"""

import json
import os
import random
import resource
import signal
import sqlite3
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nessa_modules.profiles import VoiceProfiles

RATE = 16000
CALIBRATION = [{"false_accept_rate": 0.01, "threshold": 0.5}, {"false_accept_rate": 0.1, "threshold": 0.3}]
NUM_RECORDINGS = 40


class Encoder:
    """A model that sees a speaker's hidden vector [16], which the samples are, through a matrix of its own."""

    sample_rate = RATE

    def __init__(self, model_id, embedding_size=24, seed=None):
        self.model_id, self.embedding_size = model_id, embedding_size
        seed = sum(model_id.encode()) if seed is None else seed
        self.matrix = np.random.default_rng(seed).standard_normal((16, embedding_size)).astype(np.float32)

    def encode_recording(self, recording):
        if not isinstance(recording, tuple):
            raise ValueError(f"The audio file {recording} was not found.")
        samples, rate = recording
        if rate != RATE:
            raise ValueError(f"the recording has a rate of {rate} Hz.")
        if not np.any(samples):
            raise ValueError("the recording is silent.")
        return np.asarray(samples, np.float32)[:16] @ self.matrix


class Aligned:
    """An alignment of two such models: back to the hidden vector."""

    def __init__(self, enroller, runtime, alignment_id="a1"):
        self.enroll_model_id, self.runtime_model_id = enroller.model_id, runtime.model_id
        self.alignment_id, self.calibration = alignment_id, CALIBRATION
        self._inverses = [np.linalg.pinv(encoder.matrix) for encoder in (enroller, runtime)]

    def enroll(self, x):
        return x @ self._inverses[0]

    def runtime(self, y):
        return y @ self._inverses[1]


def speaker(number, take=0, spread=0.3):
    """A recording of one of many speakers."""
    voice = np.random.default_rng([1, number]).standard_normal(16)
    noise = np.random.default_rng([2, number, take]).standard_normal(16)
    return (voice + spread * noise).astype(np.float32), RATE


def raw_bytes(path):
    """What stands in the file, and in any file that SQLite has left beside it."""
    path = Path(path)
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))


def fork(act):
    """A fork of this process that does something and ends: its number. It ends with 1 where it fails."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def kill_after(act, seconds):
    """Let a process do something, and kill it after a time."""
    child = fork(act)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)


def kill_and_look(path, number, begin, act, look):
    """Kill ``act`` at many moments; ``look`` tells ``before`` or ``after``, or fails."""
    durations = []
    for _ in range(3):
        begin()
        start = time.monotonic()
        act()
        durations.append(time.monotonic() - start)
        assert look() == "after"
    latest_seconds = 2 * min(durations) + 0.005  # the least: whatever else the machine did does not count
    counts = {"before": 0, "after": 0, "traces": 0}
    for moment in range(number):
        begin()
        kill_after(act, latest_seconds * (moment + random.random()) / number)
        counts[look()] += 1
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counts["traces"] += connection.execute("SELECT has_traces FROM store").fetchone()[0]
        connection.close()
    print(json.dumps(counts))


def main(action, path, number):
    encoder, newer = Encoder("v1", 192), Encoder("v2", 192)
    recordings = [speaker(7, take) for take in range(NUM_RECORDINGS)]

    def opened(**options):
        return VoiceProfiles(path, encoder, calibration=CALIBRATION, **options)

    def forget():
        with VoiceProfiles(path) as profiles:
            if "Ada" in profiles.names():
                profiles.remove("Ada")

    def enroll():
        with opened() as profiles:
            profiles.enroll("Ada", recordings)

    def recordings_of(name):
        with VoiceProfiles(path) as profiles:
            return {profile["name"]: profile["recordings"] for profile in profiles.describe()["profiles"]}.get(name, 0)

    def begin_again():
        forget()
        enroll()

    def is_enrolled():
        return {0: "before", NUM_RECORDINGS: "after"}[recordings_of("Ada")]

    def is_removed():
        return {0: "after", NUM_RECORDINGS: "before"}[recordings_of("Ada")]

    def migrate_back():
        with VoiceProfiles(path) as profiles:
            profiles.migrate(None, encoder, CALIBRATION)

    alignment = Aligned(encoder, newer)
    alignment.calibration = [{"false_accept_rate": 0.01, "threshold": 0.7}]

    def migrate():
        with VoiceProfiles(path) as profiles:
            profiles.migrate(alignment)

    def is_migrated():
        with VoiceProfiles(path) as profiles:
            known = SimpleNamespace(**profiles.describe())
        states = {("v1", None, 0.5): "before", ("v2", "a1", 0.7): "after"}
        return states[known.runtime_model_id, known.alignment_id, known.calibration[0]["threshold"]]

    if action == "crowd":
        with opened() as profiles:
            first = number * int(os.environ["PLACE"])
            for person in range(first, first + number):
                profiles.enroll(f"person {person}", [speaker(person)])
                assert profiles.identify(speaker(person, 1)).candidates[0].name == f"person {person}"
                if person % 5 == 0:
                    profiles.remove(f"person {person}")
        return
    if action == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        with opened() as profiles:
            for person in range(10**6):
                try:
                    profiles.enroll(f"person {person}", [speaker(person)])
                except OSError as error:
                    print(json.dumps({"people": person, "error": str(error)}))
                    return
    with opened() as profiles:
        profiles.enroll_embeddings((f"person {n}", np.eye(1, 192, n)) for n in range(100))
    if action == "enroll":
        kill_and_look(path, number, forget, enroll, is_enrolled)
    elif action == "remove":
        kill_and_look(path, number, begin_again, forget, is_removed)
        forget()
        if b"Ada" in raw_bytes(path):  # killed after the last commit: the next one that writes cleans up
            enroll()
            forget()
        assert b"Ada" not in raw_bytes(path)
    elif action == "migrate":
        kill_and_look(path, number, migrate_back, migrate, is_migrated)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
