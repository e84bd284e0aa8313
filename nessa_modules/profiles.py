"""Voice profiles in one SQLite file: enroll, verify, identify, remove, and migrate to another model without audio."""

import json
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nessa_modules.profile_file import ProfileFile, Store, checked_calibration, checked_rate
from nessa_modules.profile_models import ProfileModels, normalised
from nessa_modules.profile_results import Candidate, Identification, MixtureVoice, Verification
from nessa_modules.profile_table import ProfileTable

__all__ = ["Candidate", "Identification", "MixtureVoice", "Verification", "VoiceProfiles"]

DEFAULT_FALSE_ACCEPT_RATE = 0.01

_CHUNK = 2**12  # profiles that are read and mapped at a time
_SILENT_DB = -40.0  # of a voice, to the loudest of its mixture
_NO_FIT = "its tables do not fit each other"


class VoiceProfiles:
    """Voice profiles in one SQLite file, for one model or for a pair of models and their alignment.

    Each profile keeps the original embedding of each of its recordings, with the id of the model that made it; no
    audio. Recordings are scored by the cosine with the profile, which is the mean of its length-normalised embeddings,
    both in the space that the alignment maps them to.

    The store remembers the models and the alignment that it is scored with, and their thresholds; whatever else is
    given is refused. The thresholds of an alignment are those of profiles that its enrollment model made, heard by its
    runtime model; profiles that the runtime model made are compared with the same. The first search loads all profiles
    (4 bytes for each dimension, and their names), later ones only what has changed. The file is created by the first
    ``enroll``, readable by its owner alone.

    It may be used by several processes and threads at once: each sees what the others have written, whole. But a
    process that was forked while another thread used a store can use none, and says so: SQLite's locks stay as they
    were.

    Arguments
    ---------
    path : str or Path
        The file.
    encoder : SpeakerEncoder or (SpeakerEncoder, SpeakerEncoder), optional
        The model that makes embeddings (:class:`nessa_modules.encoder.SpeakerEncoder`), or two: the first enrolls, the
        second recognises. One of an aligned pair is enough for what it can do: either model enrolls, the runtime model
        recognises. None: ``names``, ``remove`` and ``migrate`` need no model.
    alignment : Alignment, optional
        Of the enrollment and the runtime model (:func:`nessa_modules.alignment.load_alignment`). None where one model
        does both.
    calibration : list of dict, optional
        Thresholds for a new store, from :func:`nessa_modules.trials.calibrate_thresholds`. None: the alignment's.
    false_accept_rate : float, optional
        Which of the thresholds counts, unless a call says otherwise. None: the store's; for a new one 0.01, or if it
        has no threshold for that the lowest rate.
    must_exist : bool
        Refuse a path where there is no store yet.

    Raises
    ------
    ValueError
        If the file is no such store or damaged, or its models or alignment are others: the sentence names both.
    OSError
        If the file cannot be read or written, the disk is full, or another process does not let go of it.

    Example
    -------
    >>> import tempfile
    >>> from types import SimpleNamespace
    >>> encoder = SimpleNamespace(model_id="v1", embedding_size=2, encode_recording=lambda recording: recording[0])
    >>> path = Path(tempfile.mkdtemp()) / "voices.db"
    >>> calibration = [{"false_accept_rate": 0.01, "threshold": 0.8}]
    >>> profiles = VoiceProfiles(path, encoder, calibration=calibration)
    >>> profiles.enroll("Ada", [(np.array([1.0, 0.1]), 16000), (np.array([2.0, -0.2]), 16000)])
    >>> profiles.enroll("Bob", [(np.array([0.0, 1.0]), 16000)])
    >>> result = profiles.verify("Ada", (np.array([3.0, 0.0]), 16000))
    >>> round(result.score, 3), result.accepted
    (1.0, True)
    >>> profiles.identify((np.array([-1.0, 0.0]), 16000)).name is None
    True
    >>> profiles.remove("Ada")
    >>> profiles.names(), "Ada" in profiles
    (['Bob'], False)
    """

    def __init__(self, path, encoder=None, alignment=None, calibration=None, false_accept_rate=None, must_exist=False):
        self.path = Path(path)
        self._models = ProfileModels(self.path, encoder, alignment)
        self._calibration = None if calibration is None else checked_calibration(calibration, "calibration")
        self._rate = None if false_accept_rate is None else checked_rate(false_accept_rate)
        self._file = ProfileFile(path)
        self._table, self._table_file = None, None  # the loaded profiles, and the identity of the file they are of
        with self._file.transaction() as connection:
            store = self._file.read_store(connection)
        if store is None and must_exist:
            raise ValueError(f"There is no store of voice profiles at {self.path}: enroll somebody first.")
        if store is not None and (encoder is not None or alignment is not None):
            self._models.check_store(store)
        if store is not None and false_accept_rate is not None:
            self._threshold(store, false_accept_rate)

    def names(self):
        """The names of all profiles, sorted.

        Returns
        -------
        list of str
        """
        with self._file.transaction() as connection:
            if self._file.read_store(connection) is None:
                return []
            return [name for (name,) in connection.execute("SELECT name FROM profile ORDER BY name")]

    def __contains__(self, name):
        """Whether there is a profile of a name, compared in Unicode's form NFC; ValueError for what can be no name."""
        name = _checked_name(name)
        with self._file.transaction() as connection:
            return self._file.read_store(connection) is not None and self._number(connection, name) is not None

    def describe(self):
        """What the store holds, for people.

        Returns
        -------
        dict or None
            ``enroll_model_id``, ``runtime_model_id``, ``alignment_id`` (None: one model), ``false_accept_rate``,
            ``calibration`` (a list of rates and thresholds) and ``profiles``: of each the ``name``, the number of its
            ``recordings`` and the ``models`` that made them. None where there is no store yet.
        """
        with self._file.transaction() as connection:
            store = self._file.read_store(connection)
            if store is None:
                return None
            rows = connection.execute(
                "SELECT name, count(*), json_group_array(DISTINCT model_id), count(*) - count(model_id) FROM profile "
                "LEFT JOIN recording ON recording.profile = profile.id LEFT JOIN model ON model.id = recording.model "
                "GROUP BY profile.id ORDER BY name"
            ).fetchall()
            if any(missing for *_, missing in rows):
                raise self._file.damaged(_NO_FIT)
            found = [{"name": n, "recordings": count, "models": sorted(json.loads(ids))} for n, count, ids, _ in rows]
        fields = ("enroll_model_id", "runtime_model_id", "alignment_id", "false_accept_rate")
        known = {field: getattr(store, field) for field in fields}
        return {**known, "calibration": store.calibration, "profiles": found}

    def enroll(self, name, recordings, add=False):
        """Make a profile from recordings of one person. All of them are kept, or none.

        Arguments
        ---------
        name : str
            Any text, compared in Unicode's form NFC.
        recordings : list of (str, Path, bytes or (array, int))
            Audio files, their content, or samples [T] with their sample rate in Hz; of any rate.
        add : bool
            Add the recordings to the profile that has this name already. Without it such a name is refused, so that no
            two persons are mixed up in one profile.

        Raises
        ------
        ValueError
            If a recording cannot be used, which the sentence names, the name is taken (or with ``add``: is not),
            empty or ends in blanks, or the encoder is none of the store's models.
        OSError
            If the file cannot be written.
        """
        name = _checked_name(name)
        recordings = _listed(recordings)
        if not recordings:
            raise ValueError(f"A profile needs at least one recording, but got none for {name!r}.")
        with self._file.transaction() as connection:  # what can be known before the work is said before it
            store = self._file.read_store(connection)
            models = self._models
            self._check_enrolls(store)
            if store is not None:
                self._check_name(connection, name, add)
        embeddings = []
        bar = tqdm(recordings, desc="recordings", delay=2, disable=None, leave=False)
        for number, recording in enumerate(bar, start=1):
            try:
                embeddings.append(models.checked(models.enroller.encode_recording(recording)))  # [1, D]
            except ValueError as error:
                if isinstance(recording, str | os.PathLike) or len(recordings) == 1:
                    raise
                raise ValueError(f"Recording {number} of {len(recordings)}: {error}") from error
        self._enroll(models, [(name, np.concatenate(embeddings))], add)

    def enroll_embeddings(self, profiles, add=False):
        """Make profiles from embeddings that the enrolling encoder has made: many at once, all or none.

        Arguments
        ---------
        profiles : iterable of (str, array)
            Names and embeddings [K, D], as the encoder gives them.
        add : bool
            See :meth:`enroll`.

        Raises
        ------
        ValueError, OSError
            As for :meth:`enroll`.
        """
        self._enroll(self._models, profiles, add)

    def _enroll(self, models, profiles, add):
        with self._file.writing(self._new_store) as (connection, store):
            self._check_still(models)
            self._check_enrolls(store)
            model = self._model_number(connection, models.enroller)
            for name, embeddings in profiles:
                name = _checked_name(name)
                embeddings = models.checked(embeddings)  # [K, D]
                self._check_name(connection, name, add)
                (number,) = connection.execute(
                    "INSERT INTO profile (name, change) VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET change = excluded.change RETURNING id",
                    (name, store.num_changes + 1),
                ).fetchone()
                rows = [(number, model, embedding.tobytes()) for embedding in embeddings]
                connection.executemany("INSERT INTO recording (profile, model, embedding) VALUES (?, ?, ?)", rows)

    def verify(self, name, recording, false_accept_rate=None):
        """Is this the person of that name?

        Arguments
        ---------
        name : str
            Of a profile.
        recording : str, Path, bytes or (array, int)
            See :meth:`enroll`.
        false_accept_rate : float, optional
            One that there is a threshold for. None: the store's.

        Returns
        -------
        Verification

        Raises
        ------
        ValueError
            If there is no such profile, the recording cannot be used, the encoder is not the store's runtime model,
            or there is no threshold for the rate.
        """
        name = _checked_name(name)

        def read(connection):
            store, threshold, rate = self._recognising(connection, false_accept_rate)
            number = self._number(connection, name) if store.num_changes else None  # a store that is not there has none
            if number is None:
                raise ValueError(f"There is no profile {name!r} in {self.path}.")
            _, (profile,) = self._read_profiles(connection, np.array([number]))  # [Dz]
            return profile, threshold, rate

        with self._file.transaction() as connection:
            models = self._models
            read(connection)
        utterance = models.utterance(recording)  # [Dz]
        with self._file.transaction() as connection:  # again: it may have been removed meanwhile
            self._check_still(models)
            profile, threshold, rate = read(connection)
        score = float(profile @ utterance)
        return Verification(name, score, score >= threshold, threshold, rate)

    def identify(self, recording, num_candidates=5, false_accept_rate=None):
        """Who is this? The best profile if it reaches the threshold, else nobody.

        The false-accept rate belongs to one comparison. Among N profiles a stranger is taken for somebody up to N
        times as often: give a lower rate here where the store is large.

        Arguments
        ---------
        recording : str, Path, bytes or (array, int)
            See :meth:`enroll`.
        num_candidates : int
            How many of the best are told.
        false_accept_rate : float, optional
            One that there is a threshold for. None: the store's.

        Returns
        -------
        Identification

        Raises
        ------
        ValueError
            If the recording cannot be used, the encoder is not the store's runtime model, or there is no threshold
            for the rate.
        """
        if not isinstance(num_candidates, int) or num_candidates < 1:
            raise ValueError(f"num_candidates can only be a whole number of at least 1, but got {num_candidates!r}.")
        with self._file.transaction() as connection:
            models = self._models
            self._recognising(connection, false_accept_rate)
        utterance = models.utterance(recording)  # [Dz]
        with self._file.lock:
            self._check_still(models)
            with self._file.transaction() as connection:
                store, threshold, rate = self._recognising(connection, false_accept_rate)
                table = self._loaded(connection, store)
            candidates, num_profiles = table.search(utterance, num_candidates), table.count
        name = candidates[0].name if candidates and candidates[0].score >= threshold else None
        return Identification(name, candidates, threshold, rate, num_profiles)

    def identify_mixture(self, recording, separator, num_candidates=5, false_accept_rate=None, progress=None):
        """Who speaks at the same time? Separates a recording, and identifies each voice.

        Each voice is identified for itself: the same name for two voices means that the separator left one person in
        both.

        Arguments
        ---------
        recording : str, Path, bytes or binary file object
            Audio of any format and rate.
        separator : SepformerDSDSeparation
            :class:`dsd_modules.inference.SepformerDSDSeparation`.
        num_candidates, false_accept_rate
            See :meth:`identify`.
        progress : callable, optional
            Called with the seconds separated and in all.

        Returns
        -------
        list of MixtureVoice
            In the separator's order. Voices 40 dB below the loudest one are silent.

        Raises
        ------
        ValueError
            As for :meth:`identify`, or if the recording cannot be separated or a voice is too short.
        """
        with self._file.transaction() as connection:
            self._recognising(connection, false_accept_rate)
        voices = np.asarray(separator.separate_file(recording, progress=progress))  # [T, N]
        levels = np.sqrt(np.mean(np.square(voices, dtype=np.float64), axis=0))  # [N]
        found = []
        for number, (voice, level) in enumerate(zip(voices.T, levels, strict=True), start=1):
            level_db = 20 * math.log10(level / levels.max()) if level > 0 else -math.inf
            identification = None
            if level_db > _SILENT_DB:
                samples = np.ascontiguousarray(voice), separator.sample_rate
                try:
                    identification = self.identify(samples, num_candidates, false_accept_rate)
                except ValueError as error:
                    raise ValueError(f"Voice {number} of the mixture: {error}") from error
            found.append(MixtureVoice(number, level_db, identification))
        return found

    def remove(self, *names):
        """Forget profiles: all of them or, where one is not known, none. Nothing of them is left in the file.

        SQLite's secure_delete overwrites what is deleted with zeros, but where SQLite had moved rows to another page
        before, it may have left copies of them in the gaps between rows, which nothing overwrites: in trials, of 1 to 3
        in 3,565 people removed. So the file is written anew (VACUUM). That takes time in proportion to the file, in
        which other processes wait, and as much room again: give many names at once. If this process is killed before
        that is done, the next ``enroll``, ``remove`` or ``migrate`` of any process does it first. What the file system
        or the disk keep of earlier states is beyond this, as are backups.

        Arguments
        ---------
        *names : str

        Raises
        ------
        ValueError
            If there is no such profile.
        OSError
            If the file cannot be written; where the profiles were removed already, the sentence says so.
        """
        names = list(dict.fromkeys(_checked_name(name) for name in names))
        with self._file.writing() as (connection, _):
            numbers = [self._number(connection, name) for name in names]
            for name, number in zip(names, numbers, strict=True):
                if number is None:
                    raise ValueError(f"There is no profile {name!r} in {self.path}.")
            rows = [(number,) for number in numbers]
            connection.executemany("DELETE FROM recording WHERE profile = ?", rows)
            connection.executemany("DELETE FROM profile WHERE id = ?", rows)
            connection.execute("DELETE FROM model WHERE id NOT IN (SELECT model FROM recording)")
            connection.execute("UPDATE store SET num_removals = num_removals + 1, has_traces = 1")
        try:
            self._file.overwrite_traces()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"{error.strerror}; the profiles are removed, but traces of them may be left in the file: the next "
                "enroll, remove or migrate overwrites them",
                str(self.path),
            ) from error

    def migrate(self, alignment, encoder=None, calibration=None, false_accept_rate=None):
        """Move the whole store to another runtime model, without any audio: in one step, or not at all.

        The embeddings stay as they are; from now on they are compared through the alignment. Each must have been made
        by one of the alignment's two models; people can be enrolled with either of them from then on. Where the store
        is moved to what it has already, its thresholds stay, unless others are given.

        Arguments
        ---------
        alignment : Alignment or None
            From the model that made the profiles to the new one. None: to ``encoder`` alone, which must have made all
            profiles.
        encoder : SpeakerEncoder, optional
            The new runtime model, with which this object goes on. None: it goes on without one.
        calibration : list of dict, optional
            Thresholds, from :func:`nessa_modules.trials.calibrate_thresholds`. None: those of the alignment.
        false_accept_rate : float, optional
            Which of them counts. None: the store's where there is a threshold for it, else 0.01, or if there is none
            for that the lowest.

        Returns
        -------
        bool
            Whether anything was changed.

        Raises
        ------
        ValueError
            If profiles were made by other models (it tells how many and which), or their size is not what the
            alignment takes; or the encoder is not the alignment's runtime model.
        OSError
            If the file cannot be written.
        """
        if alignment is None and encoder is None:
            raise ValueError("migrate needs an alignment, or an encoder that has made all profiles.")
        if alignment is not None and encoder is not None and encoder.model_id != alignment.runtime_model_id:
            raise ValueError(
                f"The alignment's runtime model is {alignment.runtime_model_id}, but the encoder is model "
                f"{encoder.model_id}."
            )
        models = ProfileModels(self.path, encoder, alignment)
        if calibration is not None:
            calibration = checked_calibration(calibration, "calibration")
        if false_accept_rate is not None:
            false_accept_rate = checked_rate(false_accept_rate)
        with self._file.lock:  # until this object has what the file has: no other thread sees one without the other
            with self._file.writing() as (connection, store):
                self._check_moves(connection, models)
                if calibration is None and models.ids == store[:3]:
                    calibration = store.calibration
                new = self._settings(models, calibration, false_accept_rate, store.false_accept_rate)
                if false_accept_rate is not None:
                    _find_threshold(new.calibration, false_accept_rate, self.path)
                new = Store(*new[:5], *store[5:])
                if new != store:
                    self._file.write_store(connection, new)
            self._models, self._calibration, self._rate, self._table = models, calibration, None, None
        return new != store

    def set_calibration(self, calibration, false_accept_rate=None):
        """Replace the thresholds; a store that is not there yet is created without profiles.

        Arguments
        ---------
        calibration : list of dict
            From :func:`nessa_modules.trials.calibrate_thresholds`, with scores of this store's models and alignment.
        false_accept_rate : float, optional
            Which of them counts. None: the store's where there is a threshold for it, else 0.01, or if there is none
            for that the lowest.

        Raises
        ------
        ValueError
            If it is none, or has no threshold for the rate.
        OSError
            If the file cannot be written.
        """
        entries = checked_calibration(calibration, "calibration")
        if false_accept_rate is not None:
            _find_threshold(entries, false_accept_rate, self.path)
        with self._file.writing(self._new_store) as (connection, store):
            self._models.check_store(store)
            rate = _counting_rate(entries, false_accept_rate or store.false_accept_rate)
            self._file.write_store(connection, store._replace(calibration=entries, false_accept_rate=rate))

    def close(self):
        """Close the file. The next call opens it again, and the next search loads the profiles anew."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # The store and its thresholds

    def _new_store(self):
        """The store that this object would begin."""
        return self._settings(self._models, self._calibration, self._rate, DEFAULT_FALSE_ACCEPT_RATE)

    def _settings(self, models, calibration, rate, preferred_rate):
        """A new store; None: the alignment's calibration, and the preferred rate where there is a threshold for it."""
        entries = checked_calibration(models.calibration, "The alignment") if calibration is None else calibration
        if rate is None:
            rate = _counting_rate(entries, preferred_rate)
        elif entries:
            _find_threshold(entries, rate, self.path)
        return Store(*models.ids, entries, rate, num_changes=0, num_removals=0, has_traces=0)

    def _threshold(self, store, rate):
        """The threshold for a rate, and the rate."""
        # The alignment's, if it was calibrated after the store was made.
        entries = store.calibration or checked_calibration(self._models.calibration, "The alignment")
        if rate is None:
            rate = self._rate
        if rate is None:
            rate = _counting_rate(entries, store.false_accept_rate)
        return _find_threshold(entries, rate, self.path), rate

    def _recognising(self, connection, rate):
        """The store (where there is none, what it would be), if it recognises with this model; threshold and rate."""
        recogniser = self._models.recogniser
        if recogniser is None:
            raise ValueError("Recognising needs an encoder, but got none.")
        store = self._file.read_store(connection) or self._new_store()
        self._models.check_store(store)
        if recogniser.model_id != store.runtime_model_id:
            raise ValueError(
                f"{self.path} recognises with model {store.runtime_model_id}, but the encoder is model "
                f"{recogniser.model_id}: load that model, or migrate the store with an alignment of the two."
            )
        return store, *self._threshold(store, rate)

    def _check_enrolls(self, store):
        if self._models.enroller is None:
            raise ValueError("Enrolling needs an encoder, but got none.")
        if store is not None:
            self._models.check_store(store)

    def _check_still(self, models):
        """Refuse what was embedded before another thread migrated; called with the lock held."""
        if models is not self._models:
            raise ValueError(f"{self.path} was moved to another model meanwhile; give the recording again.")

    def _check_moves(self, connection, models):
        """Refuse models that cannot compare all profiles of the file."""
        counts = connection.execute(
            "SELECT model_id, embedding_size, count(DISTINCT profile) FROM recording LEFT JOIN model "
            "ON model.id = recording.model GROUP BY model_id ORDER BY model_id"
        ).fetchall()
        if any(model_id is None for model_id, _, _ in counts):
            raise self._file.damaged(_NO_FIT)
        known = models.known_ids
        strangers = [f"model {model_id} ({count})" for model_id, _, count in counts if model_id not in known]
        if strangers:
            total, num_strange = connection.execute(
                "SELECT (SELECT count(*) FROM profile), count(DISTINCT profile) FROM recording JOIN model "
                f"ON model.id = recording.model WHERE model_id NOT IN ({', '.join('?' * len(known))})",
                known,
            ).fetchone()
            knows = f"{'it' if models.ids[2] is None else 'the alignment'} knows {' and '.join(known)}"
            raise ValueError(
                f"{num_strange} of the {total} profiles in {self.path} cannot be moved: they were made by "
                f"{', '.join(strangers)}, but {knows}."
            )
        for model_id, size, _ in counts:
            models.profiles(np.eye(1, size, dtype=np.float32), model_id)  # refuses a size that does not fit

    # What is read

    def _loaded(self, connection, store):
        """The profiles in memory, as they are in the file."""
        table, self._table = self._table, None  # after an interruption all are loaded anew
        # The file may be another one, or a backup of it from before.
        if table is None or self._table_file != self._file.identity or store.num_changes < table.num_changes:
            table, self._table_file = ProfileTable(), self._file.identity
        if store.num_changes > table.num_changes:
            if store.num_removals != table.num_removals and table.count:
                table.keep_only(_numbers(connection.execute("SELECT id FROM profile")))
            query = "SELECT id FROM profile WHERE change > ? ORDER BY id"
            changed = _numbers(connection.execute(query, (table.num_changes,)))
            with tqdm(total=len(changed), desc="profiles", delay=2, disable=None, leave=False) as bar:
                for begin in range(0, len(changed), _CHUNK):
                    numbers = changed[begin : begin + _CHUNK]
                    table.put(numbers, *self._read_profiles(connection, numbers), num_left=len(changed) - begin)
                    bar.update(len(numbers))
            table.num_changes, table.num_removals = store.num_changes, store.num_removals
        self._table = table
        return table

    def _read_profiles(self, connection, numbers):
        """The names and the vectors [K, Dz], of length 1, of profiles by their sorted numbers [K]."""
        wanted = json.dumps(numbers.tolist())
        rows = connection.execute(
            "SELECT profile.id, name FROM json_each(?) AS wanted CROSS JOIN profile ON profile.id = wanted.value",
            (wanted,),
        ).fetchall()
        names = [name for _, name in sorted(rows)]
        rows = connection.execute(
            "SELECT profile, model, embedding FROM json_each(?) AS wanted "
            "CROSS JOIN recording ON recording.profile = wanted.value",
            (wanted,),
        ).fetchall()
        models = {number: (id_, size) for number, id_, size in connection.execute("SELECT * FROM model")}
        if len(names) != len(numbers) or any(model not in models for _, model, _ in rows):
            raise self._file.damaged(_NO_FIT)
        places = np.searchsorted(numbers, np.fromiter((row[0] for row in rows), np.int64, len(rows)))  # [R]
        if not np.bincount(places, minlength=len(numbers)).all():
            raise self._file.damaged("a profile has no recordings")
        made_by = np.fromiter((row[1] for row in rows), np.int64, len(rows))  # [R]
        total = None
        for model in np.unique(made_by):
            model_id, size = models[int(model)]
            own = np.flatnonzero(made_by == model)
            own = own[np.argsort(places[own], kind="stable")]  # [R'], those of a profile together
            blobs = [rows[row][2] for row in own]
            if any(not isinstance(blob, bytes) or len(blob) != 4 * size for blob in blobs):
                raise self._file.damaged("an embedding has another size than its model's")
            embeddings = np.frombuffer(b"".join(blobs), "<f4").reshape(-1, size)  # [R', D]
            embeddings = normalised(embeddings, f"An embedding of {self.path}")
            having, first, counts = np.unique(places[own], return_index=True, return_counts=True)  # [K'] each
            counts = counts[:, None].astype(np.float32)  # [K', 1]
            means = np.add.reduceat(embeddings, first) / counts  # [K', D]
            # A profile of both models: each one's mean is mapped, and counts by its recordings.
            weighted = self._models.profiles(means, model_id) * counts  # [K', Dz]
            if total is None:
                total = np.zeros((len(numbers), weighted.shape[1]), np.float32)  # [K, Dz]
            total[having] += weighted
        return names, normalised(total, f"A profile of {self.path}")

    def _number(self, connection, name):
        row = connection.execute("SELECT id FROM profile WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def _check_name(self, connection, name, add):
        is_taken = self._number(connection, name) is not None
        if add and not is_taken:
            raise ValueError(f"There is no profile {name!r} in {self.path} to add recordings to.")
        if not add and is_taken:
            raise ValueError(
                f"There is a profile {name!r} in {self.path} already: remove it first, or add the recordings to it."
            )

    def _model_number(self, connection, encoder):
        row = connection.execute("SELECT id, embedding_size FROM model WHERE model_id = ?", (encoder.model_id,))
        number, size = row.fetchone() or (None, None)
        if number is None:
            query = "INSERT INTO model (model_id, embedding_size) VALUES (?, ?) RETURNING id"
            return connection.execute(query, (encoder.model_id, encoder.embedding_size)).fetchone()[0]
        if size != encoder.embedding_size:
            raise ValueError(
                f"{self.path} holds embeddings of size {size} of model {encoder.model_id}, but the encoder's have "
                f"size {encoder.embedding_size}."
            )
        return number


def _numbers(rows):
    return np.fromiter((number for (number,) in rows), np.int64)


def _listed(recordings):
    """The list of recordings, also where one was given by itself."""
    if isinstance(recordings, str | bytes | os.PathLike):
        return [recordings]
    recordings = recordings if isinstance(recordings, tuple) else list(recordings)
    if len(recordings) == 2 and isinstance(recordings[1], int | np.integer):
        return [tuple(recordings)]
    return list(recordings)


def _checked_name(name):
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"The name of a profile can only be a text that is not empty, but got {name!r}.")
    if name != name.strip():
        raise ValueError(f"The name of a profile can neither begin nor end with blanks, but got {name!r}.")
    if "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"The name of a profile can only be a text that UTF-8 can hold, but got {name!r}.")
    return unicodedata.normalize("NFC", name)


def _entry(entries, rate):
    """The threshold for a rate; None where there is none."""
    return next((entry for entry in entries if math.isclose(entry["false_accept_rate"], rate, rel_tol=1e-6)), None)


def _counting_rate(entries, preferred):
    """The preferred rate where there is a threshold for it, else the default one, else the lowest there is."""
    if not entries:
        return preferred
    entry = _entry(entries, preferred) or _entry(entries, DEFAULT_FALSE_ACCEPT_RATE) or entries[0]
    return entry["false_accept_rate"]


def _find_threshold(entries, rate, path):
    entry = _entry(entries, checked_rate(rate))
    if entry is not None:
        return entry["threshold"]
    if not entries:
        raise ValueError(
            f"{path} has no threshold: its models were never calibrated; calibrate on recordings of other speakers."
        )
    rates = ", ".join(f"{entry['false_accept_rate']:g}" for entry in entries)
    raise ValueError(f"There are thresholds for the false-accept rates {rates}, but got {rate!r}.")
