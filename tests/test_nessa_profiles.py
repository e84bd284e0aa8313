"""Tests of the voice profiles: scores, thresholds, models that do not fit, several processes, kills, and removal."""

import contextlib
import gc
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from profiles_run import CALIBRATION, RATE, Aligned, Encoder, fork, raw_bytes, speaker

from nessa_modules import profile_file
from nessa_modules.alignment import ALIGNMENTS, load_alignment, make_alignment
from nessa_modules.plan import NESSA_KINDS
from nessa_modules.profiles import VoiceProfiles

RUN = [sys.executable, str(Path(__file__).parent / "profiles_run.py")]
V1, V2, V3 = Encoder("v1"), Encoder("v2"), Encoder("v3", 20)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "voices.db"


@pytest.fixture
def profiles(path):
    """A store of one model, with three people."""
    with VoiceProfiles(path, V1, calibration=CALIBRATION) as profiles:
        for number, name in enumerate(("Ada", "Bob", "Čeněk 李")):
            profiles.enroll(name, [speaker(number, take) for take in range(3)])
        yield profiles


def refused(match, action, *arguments, **options):
    """The action is refused in one sentence."""
    with pytest.raises(ValueError, match=match) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def run(*arguments, **environment):
    command = [*RUN, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def in_a_child(act):
    """The exit status of a fork of this process, whatever becomes of it: 0, or 256 where it fails."""
    return os.waitpid(fork(act), 0)[1]


# Scores and thresholds


def test_scores_are_cosines_with_the_mean_of_normalised_embeddings(profiles):
    for number, name in enumerate(("Ada", "Bob", "Čeněk 李")):
        takes = np.stack([V1.encode_recording(speaker(number, take)) for take in range(3)])
        for other in range(4):
            embedding = V1.encode_recording(speaker(other, 9))
            expected = unit(unit(takes).mean(0)) @ unit(embedding)
            result = profiles.verify(name, speaker(other, 9))
            assert result.score == pytest.approx(expected, abs=1e-6)
            assert result.accepted == (expected >= 0.5)
            assert (result.name, result.threshold, result.false_accept_rate) == (name, 0.5, 0.01)


def test_identify_names_the_best_or_nobody(profiles):
    result = profiles.identify(speaker(2, 9))
    assert result.name == "Čeněk 李" == result.candidates[0].name
    assert [candidate.score for candidate in result.candidates] == pytest.approx(
        sorted((profiles.verify(name, speaker(2, 9)).score for name in profiles.names()), reverse=True), abs=1e-6
    )
    stranger = profiles.identify(speaker(77), num_candidates=1)
    assert stranger.name is None
    assert len(stranger.candidates) == 1
    assert (stranger.num_profiles, stranger.threshold, stranger.false_accept_rate) == (3, 0.5, 0.01)
    refused("at least 1, but got 0", profiles.identify, speaker(0), num_candidates=0)


def test_the_best_of_many_come_in_order(path):
    rng = np.random.default_rng(0)
    with VoiceProfiles(path, V1, calibration=CALIBRATION) as profiles:
        vectors = rng.standard_normal((500, 24)).astype(np.float32)
        profiles.enroll_embeddings((f"p{row}", vector) for row, vector in enumerate(vectors))
        query = speaker(0)
        scores = unit(vectors) @ unit(V1.encode_recording(query))
        for num in (1, 7, 499, 500, 501):
            best = profiles.identify(query, num).candidates
            assert [candidate.name for candidate in best] == [f"p{row}" for row in np.argsort(-scores)[:num]]


def test_the_rate_chooses_the_threshold(profiles, path):
    assert profiles.verify("Ada", speaker(0), false_accept_rate=0.1).threshold == 0.3
    assert profiles.identify(speaker(0), false_accept_rate=0.1).false_accept_rate == 0.1
    assert VoiceProfiles(path, V1, false_accept_rate=0.1).verify("Ada", speaker(0)).threshold == 0.3
    refused("the false-accept rates 0.01, 0.1, but got 0.5", profiles.verify, "Ada", speaker(0), 0.5)
    refused("the false-accept rates 0.01, 0.1, but got 0.5", VoiceProfiles, path, V1, false_accept_rate=0.5)


@pytest.mark.parametrize("rate", [5, 0, -1, "x", float("nan"), True])
def test_a_rate_that_is_none(profiles, path, rate):
    for action in (
        lambda: VoiceProfiles(path, V1, false_accept_rate=rate),
        lambda: VoiceProfiles(path.with_name("new.db"), V1, false_accept_rate=rate),
        lambda: profiles.verify("Ada", speaker(0), rate),
        lambda: profiles.migrate(Aligned(V1, V2), V2, false_accept_rate=rate),
        lambda: profiles.set_calibration(CALIBRATION, rate),
    ):
        refused("false_accept_rate can only be a number above 0 and below 1, but got", action)


@pytest.mark.parametrize(
    ("old", "new", "chosen"),
    [([0.2], [0.2, 0.01], 0.2), ([0.2], [0.1, 0.01], 0.01), ([0.2], [0.1, 0.05], 0.05), ([], [0.3, 0.2], 0.2)],
)
def test_the_rate_that_counts_is_one_that_there_is_a_threshold_for(path, old, new, chosen):
    old, new = ([{"false_accept_rate": rate, "threshold": 0.5} for rate in rates] for rates in (old, new))
    VoiceProfiles(path, V1, calibration=old).enroll("Ada", [speaker(0)])
    VoiceProfiles(path, V1).set_calibration(new)
    assert VoiceProfiles(path).describe()["false_accept_rate"] == chosen
    VoiceProfiles(path, V1).set_calibration(old or new)
    VoiceProfiles(path).migrate(Aligned(V1, V2), calibration=new)
    assert VoiceProfiles(path).describe()["false_accept_rate"] == chosen


def test_without_a_threshold_nobody_is_recognised(path):
    profiles = VoiceProfiles(path, V1)
    profiles.enroll("Ada", [speaker(0)])
    refused("no threshold", profiles.verify, "Ada", speaker(0))
    refused("no threshold", profiles.identify, speaker(0))
    other = VoiceProfiles(path, V1)
    other.set_calibration([{"false_accept_rate": 0.01, "threshold": 0.2}])
    assert profiles.verify("Ada", speaker(0)).threshold == 0.2
    refused("rates 0.01, but got 0.5", other.set_calibration, [{"false_accept_rate": 0.01, "threshold": 0}], 0.5)
    refused("a false_accept_rate and a threshold", other.set_calibration, [{"rate": 0.5}])


def test_an_alignment_that_is_calibrated_later(path):
    """As for a new store, the lowest rate counts where there is no threshold for 0.01."""
    alignment = Aligned(V1, V2)
    alignment.calibration = None
    VoiceProfiles(path, V1, alignment).enroll("Ada", [speaker(0)])
    alignment.calibration = [{"false_accept_rate": rate, "threshold": 0.5} for rate in (0.1, 0.05)]
    result = VoiceProfiles(path, V2, alignment).verify("Ada", speaker(0, 1))
    assert (result.accepted, result.threshold, result.false_accept_rate) == (True, 0.5, 0.05)


def test_thresholds_of_another_model_are_refused(profiles, path):
    other = VoiceProfiles(path)
    profiles.remove(*profiles.names())
    other.migrate(None, V2)
    refused("is a store of model v2, but the encoder is model v1", profiles.set_calibration, CALIBRATION)


def test_a_calibration_without_a_model_begins_no_store(path):
    refused("A new store needs an encoder or an alignment", VoiceProfiles(path).set_calibration, CALIBRATION)
    assert VoiceProfiles(path).describe() is None


def test_a_calibration_may_come_first(path):
    VoiceProfiles(path, V1).set_calibration(CALIBRATION, false_accept_rate=0.1)
    assert VoiceProfiles(path, must_exist=True).names() == []
    profiles = VoiceProfiles(path, V1)
    profiles.enroll("Ada", [speaker(0)])
    assert profiles.verify("Ada", speaker(0)).threshold == 0.3


def test_nobody_is_known_before_the_first(path):
    profiles = VoiceProfiles(path, V1, calibration=CALIBRATION)
    assert profiles.names() == []
    result = profiles.identify(speaker(0))
    assert (result.name, result.candidates, result.num_profiles) == (None, [], 0)
    refused("no profile 'Ada'", profiles.verify, "Ada", speaker(0))
    refused("no store of voice profiles", profiles.remove, "Ada")
    refused("no store of voice profiles", profiles.migrate, Aligned(V1, V2))
    refused("no store of voice profiles at .*voices.db", VoiceProfiles, path, must_exist=True)
    assert not path.exists()


# Two models


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_a_store_is_migrated_without_audio(path, tmp_path, kind):
    voices = np.stack([speaker(number, take)[0] for number in range(100, 160) for take in range(2)])
    speakers = np.repeat(np.arange(60), 2)
    alignment = make_alignment(kind, **({"max_steps": 20} if kind in NESSA_KINDS else {}))
    alignment.fit(voices @ V1.matrix, voices @ V2.matrix, speakers)
    alignment.calibration = CALIBRATION
    alignment.save(tmp_path / "alignment", "v1", "v2")
    alignment = load_alignment(tmp_path / "alignment")

    names = [f"person {number}" for number in range(8)]
    with VoiceProfiles(path, V1, calibration=CALIBRATION) as old:
        for number, name in enumerate(names):
            old.enroll(name, [speaker(number, take) for take in range(2)])
        before = raw_embeddings(path)
        refused("expects, or migrate", VoiceProfiles, path, V2, alignment)
        old.migrate(alignment, V2)
        assert raw_embeddings(path) == before

        new = VoiceProfiles(path, V2, alignment)
        for profiles in (old, new):
            for number, name in enumerate(names):
                utterance = speaker(number, 9)
                takes = np.stack([V1.encode_recording(speaker(number, take)) for take in range(2)])
                expected = alignment.score(unit(takes).mean(0)[None], V2.encode_recording(utterance)[None])[0, 0]
                result = profiles.verify(name, utterance)
                assert result.score == pytest.approx(float(expected), abs=1e-5)
                if kind in ("procrustes", "least_squares"):
                    assert profiles.identify(utterance).name == name
        refused(
            "model v2, but the encoder is model v1", VoiceProfiles(path, V1, alignment).verify, names[0], speaker(0)
        )
        refused("alignment .* of models v1 and v2, but got none", VoiceProfiles, path, V1)


def raw_embeddings(path):
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT profile, model, embedding FROM recording ORDER BY id").fetchall()


def test_after_a_migration_either_model_enrolls(profiles, path):
    alignment = Aligned(V1, V2)
    profiles.migrate(alignment, V2)
    profiles.enroll("Dora", [speaker(3)])
    both = VoiceProfiles(path, (V1, V2), alignment)
    both.enroll("Ema", [speaker(4)])
    both.enroll("Dora", [speaker(3, 1), speaker(3, 2)], add=True)  # of both models
    for number, name in enumerate(("Ada", "Bob", "Čeněk 李", "Dora", "Ema")):
        assert both.identify(speaker(number, 9)).name == name
        assert both.verify(name, speaker(number, 9)).accepted
    described = {profile["name"]: profile for profile in both.describe()["profiles"]}
    assert described["Dora"] == {"name": "Dora", "recordings": 3, "models": ["v1", "v2"]}

    means = [V2.encode_recording(speaker(3)), unit(np.stack([speaker(3, 1)[0], speaker(3, 2)[0]]) @ V1.matrix).mean(0)]
    mapped = unit(alignment.runtime(means[0])) + 2 * unit(alignment.enroll(means[1]))
    expected = unit(mapped) @ unit(alignment.runtime(V2.encode_recording(speaker(3, 9))))
    assert both.verify("Dora", speaker(3, 9)).score == pytest.approx(expected, abs=1e-5)


def test_a_migration_while_a_recording_is_embedded(profiles, monkeypatch):
    """Its embedding is the old model's, and is not scored in the new space."""
    alignment = Aligned(V1, V2)
    embed = V1.encode_recording
    for ask in (profiles.identify, lambda recording: profiles.verify("Ada", recording)):

        def migrate_meanwhile(recording):
            embedding = embed(recording)
            profiles.migrate(alignment, V2, calibration=CALIBRATION)
            return embedding

        monkeypatch.setattr(V1, "encode_recording", migrate_meanwhile)
        refused("was moved to another model meanwhile", ask, speaker(0, 9))
        monkeypatch.undo()
        assert profiles.identify(speaker(0, 9)).name == "Ada"
        profiles.migrate(None, V1, calibration=CALIBRATION)


def test_a_migration_while_recordings_are_enrolled(profiles, monkeypatch):
    """Their embeddings are the old model's, and are not kept as the new one's."""
    embed = V1.encode_recording

    def migrate_meanwhile(recording):
        embedding = embed(recording)
        profiles.migrate(Aligned(V1, V2), V2)
        return embedding

    monkeypatch.setattr(V1, "encode_recording", migrate_meanwhile)
    refused("was moved to another model meanwhile", profiles.enroll, "Eve", speaker(5))
    assert profiles.names() == ["Ada", "Bob", "Čeněk 李"]


def test_other_threads_see_a_migration_as_one_step(profiles, monkeypatch):
    """Neither the moved file with the old model nor the new model with the old file."""
    results, threads = [], []
    real = profile_file.ProfileFile.writing

    @contextlib.contextmanager
    def identify_after(self, *arguments):
        with real(self, *arguments) as written:
            yield written
        threads.append(threading.Thread(target=lambda: results.append(profiles.identify(speaker(0, 9)).name)))
        threads[0].start()
        threads[0].join(timeout=0.3)

    monkeypatch.setattr(profile_file.ProfileFile, "writing", identify_after)
    profiles.migrate(Aligned(V1, V2), V2)
    threads[0].join()
    assert results == ["Ada"]


def test_an_aligned_pair_of_which_each_place_has_one_model(path):
    alignment = Aligned(V1, V2)
    office = VoiceProfiles(path, V1, alignment)
    office.enroll("Ada", [speaker(0)])
    device = VoiceProfiles(path, V2, alignment)
    assert device.identify(speaker(0, 1)).name == "Ada"
    refused("recognises with model v2, but the encoder is model v1", office.identify, speaker(0))
    refused("recognises with model v2, but the encoder is model v1", office.verify, "Ada", speaker(0))


def test_models_that_do_not_fit_are_refused(profiles, path):
    refused("is a store of model v1, but the encoder is model v2: .*migrate", VoiceProfiles, path, V2)
    refused("scored with model v1 without an alignment, but got alignment a1", VoiceProfiles, path, V1, Aligned(V1, V2))
    refused("two models, v1 and v2, can only be compared", VoiceProfiles, path, (V1, V2))
    refused("models v1 and v2, but the encoder is model v3", VoiceProfiles, path, V3, Aligned(V1, V2))
    refused("runtime model is v2, but .* to recognise is model v1", VoiceProfiles, path, (V2, V1), Aligned(V1, V2))
    nameless = Aligned(V1, V2)
    nameless.enroll_model_id = None
    refused("does not say which models", VoiceProfiles, path, V2, nameless)
    keeper = VoiceProfiles(path)
    refused("needs an encoder", keeper.enroll, "Eve", [speaker(0)])
    refused("needs an encoder", keeper.verify, "Ada", speaker(0))
    refused("needs an encoder", keeper.identify, speaker(0))


def test_another_size_of_the_same_model_is_refused(profiles, path):
    larger = VoiceProfiles(path, Encoder("v1", 30))
    refused("size 24 of model v1, but the encoder's have size 30", larger.enroll, "Eve", [speaker(0)])
    refused(r"\[K, 24\], but got \[1, 30\]", profiles.enroll_embeddings, [("Eve", np.ones(30))])
    assert len(profiles.names()) == 3


def test_a_migration_of_profiles_that_the_alignment_does_not_know_changes_nothing(profiles, path):
    profiles.migrate(Aligned(V1, V2), V2)
    profiles.enroll("Dora", [speaker(3)])
    before = path.read_bytes()
    match = r"3 of the 4 profiles .*: they were made by model v1 \(3\), but the alignment knows v2 and v3"
    refused(match, profiles.migrate, Aligned(V2, V3), V3)
    refused(r"1 of the 4 .* model v2 \(1\), but it knows v1", profiles.migrate, None, V1)
    small = Encoder("v1", 20)
    refused("does not take embeddings of size 24 of model v1", profiles.migrate, Aligned(small, V2), V2)
    refused("runtime model is v3, but the encoder is model v2", profiles.migrate, Aligned(V1, V3), V2)
    refused("rates 0.01, 0.1, but got 0.7", profiles.migrate, Aligned(V1, V2), V2, false_accept_rate=0.7)
    refused("needs an alignment, or an encoder", profiles.migrate, None)
    assert path.read_bytes() == before
    assert profiles.identify(speaker(0, 9)).name == "Ada"


def test_who_has_the_store_open_learns_of_a_migration(profiles, path):
    assert profiles.identify(speaker(0)).name == "Ada"
    VoiceProfiles(path).migrate(Aligned(V1, V2))
    refused("alignment a1 of models v1 and v2, but got none", profiles.identify, speaker(0))
    refused("alignment a1 of models v1 and v2, but got none", profiles.verify, "Ada", speaker(0))
    refused("alignment a1 of models v1 and v2, but got none", profiles.enroll, "Eve", [speaker(0)])


def test_a_migration_brings_its_own_thresholds(profiles, path):
    alignment = Aligned(V1, V2)
    alignment.calibration = [{"false_accept_rate": 0.01, "threshold": 0.9}]
    profiles.migrate(alignment, V2)
    assert profiles.verify("Ada", speaker(0)).threshold == 0.9
    profiles.migrate(alignment, V2, CALIBRATION, false_accept_rate=0.1)
    assert profiles.verify("Ada", speaker(0)).threshold == 0.3
    assert VoiceProfiles(path, V2, alignment).verify("Ada", speaker(0)).threshold == 0.3


def test_a_migration_to_what_the_store_has_already_changes_nothing(profiles, path):
    assert profiles.migrate(None, V1) is False
    assert profiles.verify("Ada", speaker(0)).threshold == 0.5
    alignment = Aligned(V1, V2)
    assert profiles.migrate(alignment, V2, [{"false_accept_rate": 0.2, "threshold": 0.9}]) is True
    before = profiles.describe()
    assert profiles.migrate(alignment, V2) is False
    assert profiles.describe() == before
    assert profiles.verify("Ada", speaker(0)).threshold == 0.9
    refused("rates 0.2, but got 0.1", profiles.migrate, alignment, V2, false_accept_rate=0.1)  # not the alignment's


def test_a_rate_without_thresholds_is_not_migrated_to(profiles):
    alignment = Aligned(V1, V2)
    alignment.calibration = None
    refused("voices.db has no threshold", profiles.migrate, alignment, V2, false_accept_rate=0.3)
    assert profiles.verify("Ada", speaker(0)).threshold == 0.5


# Names and recordings


def test_one_bad_recording_and_nothing_is_enrolled(profiles, path):
    before = path.read_bytes()
    refused("audio file gone.wav was not found", profiles.enroll, "Eve", [speaker(0), "gone.wav"])
    refused("Recording 2 of 2: the recording is silent", profiles.enroll, "Eve", [speaker(0), (np.zeros(16), RATE)])
    refused("at least one recording, but got none for 'Eve'", profiles.enroll, "Eve", [])
    people = [("Eve", np.ones(24)), ("Finn", np.ones(24)), ("Ada", np.ones(24))]
    refused("a profile 'Ada' .* already", profiles.enroll_embeddings, people)
    refused("zero or not finite", profiles.enroll_embeddings, [("Eve", np.ones(24)), ("Finn", np.full(24, np.nan))])
    assert path.read_bytes() == before


def test_an_embedding_of_any_length_is_one(profiles, path):
    """The square of a finite float32 may be infinite, or zero."""
    embedding = V1.encode_recording(speaker(5))
    profiles.enroll_embeddings([("large", embedding * np.float32(1e25)), ("small", embedding * np.float32(1e-30))])
    for name in ("large", "small"):
        assert profiles.verify(name, speaker(5)).score == pytest.approx(1, abs=1e-6)


def test_a_recording_or_a_profile_without_a_direction_is_named(path):
    alignment = Aligned(V1, V1)
    profiles = VoiceProfiles(path, V1, alignment)
    profiles.enroll("Ada", [speaker(0)])
    alignment.runtime = np.zeros_like
    refused("^The embedding of the recording is zero or not finite where it is", profiles.verify, "Ada", speaker(0))
    alignment.enroll = np.zeros_like
    refused("^A profile of .*voices.db is zero or not finite where it is", profiles.verify, "Ada", speaker(0))


def test_one_recording_needs_no_list(profiles):
    profiles.enroll("Eve", speaker(5))
    assert profiles.verify("Eve", speaker(5, 1)).accepted
    refused("gone.wav was not found", profiles.enroll, "Finn", "gone.wav")


def test_a_model_of_any_name_is_described(path):
    VoiceProfiles(path, Encoder("large, v1")).enroll("Ada", [speaker(0)])
    assert VoiceProfiles(path).describe()["profiles"] == [{"name": "Ada", "recordings": 1, "models": ["large, v1"]}]


def test_a_name_that_is_taken_needs_to_be_added_to(profiles):
    refused("a profile 'Ada' .* already", profiles.enroll, "Ada", [speaker(0)])
    profiles.enroll("Ada", [speaker(0, 5)], add=True)
    assert {p["name"]: p["recordings"] for p in profiles.describe()["profiles"]}["Ada"] == 4
    refused("no profile 'Eve' .* to add", profiles.enroll, "Eve", [speaker(0)], add=True)


@pytest.mark.parametrize("name", ["", "  ", " Ada", "Ada\n", "A\0da", "\udcff", None, 7])
def test_names_that_are_none(profiles, name):
    for action in (profiles.verify, profiles.enroll):
        refused("name of a profile", action, name, [speaker(0)])
    refused("name of a profile", profiles.remove, name)


def test_any_other_text_is_a_name(profiles):
    names = ["'; DROP TABLE profile; --", "👩🏽‍🔬", "a,b", "ünïcödé", "x" * 10000, "two\nlines", "%", "ADA"]
    for number, name in enumerate(names):
        profiles.enroll(name, [speaker(10 + number)])
    assert set(names) < set(profiles.names())
    for number, name in enumerate(names):
        assert profiles.identify(speaker(10 + number, 1)).name == name
    assert profiles.verify("u\u0308nïcödé", speaker(13)).accepted  # the same text, composed otherwise


def test_whether_a_name_is_there(profiles, path):
    assert "Čeněk 李" in profiles
    assert "C\u030cene\u030ck 李" in profiles  # composed otherwise
    assert "Eve" not in profiles
    assert "Eve" not in VoiceProfiles(path.with_name("none.db"))
    refused("name of a profile", profiles.__contains__, " Ada")


# What others write


def test_a_search_sees_what_others_changed(path):
    rng = np.random.default_rng(0)
    profiles, other = (VoiceProfiles(path, V1, calibration=CALIBRATION) for _ in range(2))
    takes = {}
    for step in range(120):
        name = f"p{rng.integers(40)}"
        if name in takes and rng.random() < 0.5:
            other.remove(name)
            del takes[name]
        else:
            embedding = rng.standard_normal((1, 24)).astype(np.float32)
            other.enroll_embeddings([(name, embedding)], add=name in takes)
            takes[name] = np.concatenate([takes.get(name, np.zeros((0, 24), np.float32)), embedding])
        if step % 3 == 0 and takes:
            query = speaker(step)
            scores = {name: unit(unit(t).mean(0)) @ unit(V1.encode_recording(query)) for name, t in takes.items()}
            result = profiles.identify(query, num_candidates=100)
            assert {c.name: pytest.approx(c.score, abs=1e-5) for c in result.candidates} == scores
            assert result.num_profiles == len(takes)


def test_a_file_that_takes_the_place_of_another(profiles, path, tmp_path):
    assert profiles.identify(speaker(0)).name == "Ada"
    with VoiceProfiles(tmp_path / "other.db", V1, calibration=CALIBRATION) as other:
        other.enroll("Zoe", [speaker(0)])
    os.replace(tmp_path / "other.db", path)
    assert profiles.identify(speaker(0)).name == "Zoe"
    path.unlink()
    assert profiles.identify(speaker(0)).name is None


def test_a_closed_file_that_is_written_over(profiles, path, tmp_path):
    assert profiles.identify(speaker(0)).name == "Ada"
    profiles.close()
    with VoiceProfiles(tmp_path / "other.db", V1, calibration=CALIBRATION) as other:
        for number, name in enumerate(("Zoe", "Yan", "Xia")):
            other.enroll(name, [speaker(number)])
    path.write_bytes((tmp_path / "other.db").read_bytes())
    assert profiles.identify(speaker(0)).name == "Zoe"


def test_a_process_may_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profiles = VoiceProfiles("voices.db", V1, calibration=CALIBRATION)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    profiles.enroll("Ada", [speaker(0)])
    assert VoiceProfiles(tmp_path / "voices.db").names() == ["Ada"]


def test_several_processes_at_once(path):
    command = [*RUN, "crowd", str(path), "20"]
    processes = [subprocess.Popen(command, env={**os.environ, "PLACE": str(place)}) for place in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(VoiceProfiles(path).names()) == sorted(f"person {n}" for n in range(60) if n % 5)


def test_threads_and_a_fork_share_a_store(profiles):
    faults = []

    def use(number):
        try:
            for take in range(5):
                profiles.enroll(f"{number} {take}", [speaker(20 + number, take)])
                assert profiles.identify(speaker(0, take)).name == "Ada"
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults

    def enroll():
        profiles.enroll("of the child", [speaker(50)])
        assert profiles.identify(speaker(50, 1)).name == "of the child"

    assert in_a_child(enroll) == 0
    assert profiles.identify(speaker(50, 1)).name == "of the child"
    assert len(profiles.names()) == 3 + 20 + 1


@pytest.mark.parametrize("action", ["close", "names", "forget"])
def test_a_forked_child_leaves_the_connection_of_its_parent_alone(profiles, action):
    """SQLite's locks would go with it; also where the child does not know the store any more."""

    class Connection:
        in_transaction = False

        def close(self):
            os._exit(1)

        def __del__(self):
            if os.getpid() != parent:
                os._exit(1)

    parent = os.getpid()
    store = VoiceProfiles(profiles.path)
    store.close()
    store._file._connection = Connection()

    def act():
        nonlocal store
        if action != "forget":
            getattr(store, action)()
        del store
        gc.collect()

    assert in_a_child(act) == 0
    store._file._connection = None


def test_a_fork_while_another_thread_uses_the_store(profiles):
    is_held, may_go = threading.Event(), threading.Event()

    def people():
        is_held.set()
        may_go.wait()
        yield "Eve", np.ones(24)

    thread = threading.Thread(target=profiles.enroll_embeddings, args=(people(),))
    thread.start()
    is_held.wait()

    def act():
        signal.alarm(60)
        for action in (profiles.names, lambda: profiles.identify(speaker(0)), lambda: VoiceProfiles(profiles.path)):
            with pytest.raises(OSError, match="this process was forked while a store was in use"):
                action()

    try:
        assert in_a_child(act) == 0
    finally:
        may_go.set()
        thread.join()
    assert "Eve" in profiles.names()


def test_a_lock_that_is_not_let_go_of(profiles, path, monkeypatch):
    monkeypatch.setattr(profile_file, "_BUSY_SECONDS", 0.1)
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match=r"locked for 0.1 s: '.*voices.db'"):
            VoiceProfiles(path)
        holder.execute("ROLLBACK")
    assert len(VoiceProfiles(path).names()) == 3


@pytest.mark.parametrize("action", ["enroll", "migrate", "remove"])
def test_killed_at_any_moment(path, action):
    counts = json.loads(run(action, path, 25))
    assert counts["before"] > 0
    assert counts["before"] + counts["after"] == 25


def test_a_removal_that_was_killed_is_completed_by_the_next_one(profiles, path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(profile_file.ProfileFile, "overwrite_traces", killed)
        with pytest.raises(KeyboardInterrupt):
            profiles.remove("Ada")
    assert profiles.names() == ["Bob", "Čeněk 李"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT has_traces FROM store").fetchone() == (1,)
    refused("no profile 'Ada'", VoiceProfiles(path).remove, "Ada")
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT has_traces FROM store").fetchone() == (0,)


# The file


def test_only_the_owner_reads_it(profiles, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    profiles.remove("Ada")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["voices.db"]


@pytest.mark.parametrize("seed", range(3))
def test_remove_leaves_no_trace(path, seed):
    rng = np.random.default_rng(seed)
    encoder = Encoder("large", 192)
    profiles = VoiceProfiles(path, encoder, calibration=CALIBRATION)
    traces, present = {}, []  # by name: the bytes of the name, and of each embedding

    def enroll(num):
        people = []
        for _ in range(num):
            name = "".join(chr(c) for c in rng.integers(0x4E00, 0x9000, rng.integers(4, 60)))
            embeddings = rng.standard_normal((rng.integers(1, 4), 192)).astype(np.float32)
            traces[name] = [name.encode(), *(e[k : k + 4].tobytes() for e in embeddings for k in (0, 60, 188))]
            people.append((name, embeddings))
        profiles.enroll_embeddings(people)
        present.extend(name for name, _ in people)

    enroll(150)
    for _ in range(6):
        enroll(rng.integers(1, 30))
        for name in rng.choice(present, 3, replace=False):
            embedding = rng.standard_normal(192).astype(np.float32)
            profiles.enroll_embeddings([(str(name), embedding)], add=True)
            traces[name].append(embedding[:4].tobytes())
        leaving = [present.pop(rng.integers(len(present))) for _ in range(rng.integers(1, 25))]
        profiles.remove(*leaving)
        content = raw_bytes(path)
        for name, parts in traces.items():
            assert [part in content for part in parts] == [name in present] * len(parts)
        # secure_delete alone leaves a copy so seldom that this test would not find it: the file was written anew.
        with sqlite3.connect(path) as connection:
            connection.execute("VACUUM INTO ?", (str(path.with_name("anew")),))
        assert path.with_name("anew").read_bytes()[100:] == content[100:]  # the header counts the changes
        path.with_name("anew").unlink()
    assert sorted(present) == profiles.names()


def test_no_trace_is_left_in_a_log_that_somebody_chose(profiles, path):
    profiles.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    profiles.remove("Ada")
    assert b"Ada" not in raw_bytes(path)
    assert [p.name for p in path.parent.iterdir()] == ["voices.db"]


def test_a_removal_during_another_ones_cleaning_is_not_taken_for_clean(profiles, path, monkeypatch):
    real = profile_file.ProfileFile.overwrite_traces

    def remove_meanwhile(self):
        with monkeypatch.context() as patched:
            patched.setattr(profile_file.ProfileFile, "overwrite_traces", lambda self: None)  # it is killed then
            connection = self._connect()
            connection.set_trace_callback(
                lambda sql: sql.startswith("UPDATE store SET has_traces = 0") and VoiceProfiles(path).remove("Bob")
            )
            real(self)
            connection.set_trace_callback(None)

    with monkeypatch.context() as patched:
        patched.setattr(profile_file.ProfileFile, "overwrite_traces", remove_meanwhile)
        profiles.remove("Ada")
    assert profiles.names() == ["Čeněk 李"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT has_traces FROM store").fetchone() == (1,)


def test_a_model_that_nobody_was_enrolled_with_is_forgotten_too(profiles, path):
    profiles.migrate(Aligned(V1, V2), V2)
    profiles.enroll("Dora", [speaker(3)])
    profiles.remove("Ada", "Bob", "Čeněk 李")
    profiles.migrate(Aligned(V2, V3, "a2"), V3)  # does not know v1
    assert profiles.identify(speaker(3, 1)).name == "Dora"


def test_remove_takes_all_or_none(profiles):
    refused("no profile 'Eve'", profiles.remove, "Ada", "Eve")
    assert "Ada" in profiles.names()
    profiles.remove("Ada", "Bob", "Ada")
    assert profiles.names() == ["Čeněk 李"]
    profiles.remove("Čeněk 李")
    assert profiles.identify(speaker(0)).name is None


IS_DAMAGED = {
    "calibration": "UPDATE store SET calibration = '[1]'",
    "calibration of another kind": "UPDATE store SET calibration = 5",
    "calibration without numbers": """UPDATE store SET calibration = '[{"false_accept_rate":"x"}]'""",
    "deep calibration": "UPDATE store SET calibration = replace(hex(zeroblob(50000)), '0', '[')",
    "calibration that is no JSON": "UPDATE store SET calibration = '{{{'",
    "calibration of bytes": "UPDATE store SET calibration = x'ff'",
    "calibration with infinity": """UPDATE store SET calibration = '[{"false_accept_rate":0.1,"threshold":1e999}]'""",
    "long number": "UPDATE store SET calibration = '[{\"false_accept_rate\":1' || hex(zeroblob(500)) || '}]'",
    "rate": "UPDATE store SET false_accept_rate = 'abc'",
    "rate out of range": "UPDATE store SET false_accept_rate = 2",
    "model id": "UPDATE store SET runtime_model_id = x'00'",
    "alignment id": "UPDATE store SET alignment_id = x'00'",
    "num_changes": "UPDATE store SET num_changes = 'abc'",
    "num_changes too high": "UPDATE store SET num_changes = 9223372036854775807",
    "num_changes too low": "UPDATE store SET num_changes = -1",
    "num_removals": "UPDATE store SET num_removals = 'abc'",
    "has_traces": "UPDATE store SET has_traces = 'abc'",
    "size": "UPDATE model SET embedding_size = 'abc'",
    "size too high": "UPDATE model SET embedding_size = 1000000000000",
    "size too low": "UPDATE model SET embedding_size = -24",
    "models": "DELETE FROM model",
    "name of bytes": "UPDATE profile SET name = x'41' WHERE id = 2",
    "change": "UPDATE profile SET change = 'abc'",
    "change that is never loaded": "UPDATE profile SET change = -1",
    "change to come": "UPDATE profile SET change = 99",
}


@pytest.mark.parametrize("kind", IS_DAMAGED)
def test_a_damaged_store_is_called_so_whatever_is_asked(profiles, path, kind):
    with sqlite3.connect(path) as connection:
        connection.execute(IS_DAMAGED[kind])
    for action in (
        lambda: VoiceProfiles(path),
        profiles.names,
        profiles.describe,
        lambda: profiles.identify(speaker(0)),
        lambda: profiles.verify("Ada", speaker(0)),
        lambda: profiles.enroll("Eve", [speaker(4)]),
        lambda: profiles.remove("Ada"),
        lambda: profiles.migrate(Aligned(V1, V2)),
    ):
        refused("voices.db is damaged", action)


@pytest.mark.parametrize("condition", ["", " WHERE profile = 2"])
def test_a_profile_without_recordings_is_damage(profiles, path, condition):
    with sqlite3.connect(path) as connection:
        connection.execute(f"DELETE FROM recording{condition}")
    refused("voices.db is damaged: its tables do not fit", profiles.describe)
    refused("voices.db is damaged: a profile has no rec", profiles.identify, speaker(0))
    refused("voices.db is damaged: a profile has no rec", profiles.verify, "Bob", speaker(0))


def test_recordings_of_a_model_that_is_not_there_are_damage(profiles, path):
    profiles.migrate(Aligned(V1, V2), V2)
    profiles.enroll("Dora", [speaker(3)])
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM model WHERE model_id = 'v1'")
    for action in (profiles.describe, lambda: profiles.identify(speaker(0)), lambda: profiles.migrate(None, V2)):
        refused("voices.db is damaged: its tables do not fit", action)


IS_OTHER = ["text", "database", "folder", "cut", "version", "trigger", "table", "settings"]  # seen on opening


def make_other(path, kind):
    if kind == "text":
        path.write_text("name,embedding\n" * 100)
    elif kind == "database":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE people (name)")
    elif kind == "folder":
        path.mkdir()
    else:
        with VoiceProfiles(path, V1, calibration=CALIBRATION) as profiles:
            profiles.enroll("Ada", [speaker(0)])
        if kind == "cut":
            os.truncate(path, path.stat().st_size // 2)
            return
        with sqlite3.connect(path) as connection:
            for statement in {
                "version": ["PRAGMA user_version = 9"],
                "trigger": ["CREATE TRIGGER t AFTER INSERT ON profile BEGIN DELETE FROM recording; END"],
                "table": ["DROP TABLE recording"],
                "settings": ["DELETE FROM store"],
                "embedding": ["UPDATE recording SET embedding = x'00'"],
                "infinite": [f"UPDATE recording SET embedding = x'{'0000807f' * 24}'"],
                "name": ["UPDATE profile SET name = CAST(x'ff' AS TEXT)"],
            }[kind]:
                connection.execute(statement)


@pytest.mark.parametrize(
    "kind",
    [*IS_OTHER, "embedding", "infinite", "name"],
)
def test_what_is_no_store_is_refused_and_kept(path, kind):
    make_other(path, kind)
    before = path.read_bytes() if path.is_file() else None

    def use():
        profiles = VoiceProfiles(path, V1)
        profiles.identify(speaker(0))

    refused("voices.db", use)
    if kind in IS_OTHER:
        refused("voices.db", VoiceProfiles, path, V1)
    if before is not None:
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["voices.db"]


def test_bytes_that_changed_never_end_in_another_exception(path, tmp_path):
    with VoiceProfiles(path, V1, calibration=CALIBRATION) as profiles:
        profiles.enroll_embeddings((f"p{n}", np.eye(2, 24, n % 20)) for n in range(60))
    whole = path.read_bytes()
    rng, sentences = np.random.default_rng(0), []
    for _ in range(60):
        content = bytearray(whole)
        begin = rng.integers(len(content))
        length = min(rng.integers(1, 200), len(content) - begin)
        content[begin : begin + length] = rng.bytes(length)
        path.write_bytes(content)
        try:
            with VoiceProfiles(path, V1) as profiles:
                profiles.identify(speaker(0))
                profiles.enroll("new", [speaker(0)])
                profiles.remove("p7")
        except (ValueError, OSError) as error:
            sentences.append(str(error))
    assert len(sentences) > 10
    assert all("voices.db" in sentence for sentence in sentences)


def test_a_full_disk(profiles, path):
    connection = profiles._file._connection
    connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(OSError, match=r"No space left on device: '.*voices.db'"):
        profiles.enroll("Eve", [speaker(0, take) for take in range(100)])
    assert len(profiles.names()) == 3
    connection.execute("PRAGMA max_page_count = 10000")
    profiles.enroll("Eve", [speaker(5)])
    assert profiles.identify(speaker(5, 1)).name == "Eve"


def test_files_that_may_not_grow(path):
    result = json.loads(run("full", path, 100_000))
    assert "voices.db" in result["error"]
    assert len(VoiceProfiles(path).names()) == result["people"] > 10


def test_no_permission(path, tmp_path):
    with pytest.raises(OSError, match=r"missing/voices.db"):
        VoiceProfiles(tmp_path / "missing" / "voices.db", V1).enroll("Ada", [speaker(0)])


def test_a_link_to_nothing(path, tmp_path):
    path.symlink_to(tmp_path / "gone.db")
    with pytest.raises(OSError, match=r"a link to a file that is not there.*voices.db"):
        VoiceProfiles(path, V1).enroll("Ada", [speaker(0)])
    refused("no store", VoiceProfiles, path, must_exist=True)


def test_a_removal_whose_traces_cannot_be_overwritten_says_so(profiles, path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device", str(self.path))

    with monkeypatch.context() as patched:
        patched.setattr(profile_file.ProfileFile, "overwrite_traces", full)
        with pytest.raises(OSError, match="No space left on device; the profiles are removed, but traces"):
            profiles.remove("Ada")
    assert "Ada" not in profiles.names()


def test_a_copy_of_the_file_is_a_store(profiles, path, tmp_path):
    shutil.copy(path, tmp_path / "copy.db")
    assert VoiceProfiles(tmp_path / "copy.db", V1).identify(speaker(1, 5)).name == "Bob"


def test_an_empty_file_is_a_store_that_is_not_begun(path):
    path.touch()
    refused("no store", VoiceProfiles, path, must_exist=True)
    VoiceProfiles(path, V1, calibration=CALIBRATION).enroll("Ada", [speaker(0)])
    assert VoiceProfiles(path).names() == ["Ada"]


# Mixtures


class Separator:
    """Gives the voices that it is given."""

    sample_rate = RATE

    def __init__(self, *voices):
        self.voices = np.stack(voices, axis=1)

    def separate_file(self, recording, progress=None):
        if progress is not None:
            progress(1.0, 1.0)
        return self.voices


def test_the_voices_of_a_mixture_are_named(profiles):
    separator = Separator(speaker(1, 9)[0], 0.001 * speaker(0, 9)[0], speaker(70)[0], np.zeros(16, np.float32))
    voices = profiles.identify_mixture("meeting.wav", separator)
    assert [voice.number for voice in voices] == [1, 2, 3, 4]
    assert [voice.is_silent for voice in voices] == [False, True, False, True]
    assert voices[0].identification.name == "Bob"
    assert voices[2].identification.name is None
    assert -70 < voices[1].level_db < -50
    assert voices[3].level_db == -np.inf


def test_a_mixture_of_silence_has_silent_voices(profiles):
    voices = profiles.identify_mixture("meeting.wav", Separator(*np.zeros((2, 16), np.float32)))
    assert all(voice.is_silent for voice in voices)
