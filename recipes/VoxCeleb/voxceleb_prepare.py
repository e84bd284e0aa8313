"""The data step of the speaker recipes: from the options to one csv of utterances per split.

The splits are ``train`` (the extractors learn on it), ``alignment`` (the alignments are fitted on it), ``dev``
(thresholds, the choice of a model) and ``test``. They come from one of

- csv files of (id, speaker, path), one for each split: ``train_csv``, ``alignment_csv``, ``dev_csv``, ``test_csv``;
- a folder in VoxCeleb's or LibriSpeech's layout, ``data_folder``, whose speakers are shared out;
- synthetic voices, where neither is given.

The manifests stand in ``<output_folder>/manifests``, and ``prepared.json`` beside them says what they were made of.
"""

import itertools
import json
import logging
from pathlib import Path

from nessa_modules.corpora import cut, read_corpus, split_speakers, write_corpus
from nessa_modules.voices import SPLITS, make_voices
from shared_modules.files import write_whole

logger = logging.getLogger(__name__)

_CSV_FILES, _FOLDER, _SYNTHETIC = "csv files", "folder", "synthetic voices"
_RECORD = "prepared.json"


def check_data(options, splits):
    """Look for the data before anything is built, without opening an audio file.

    Arguments
    ---------
    options : dict
        The recipe's options as plain values, see :func:`prepare_data`.
    splits : tuple of str
        Those that are wanted.

    Raises
    ------
    ValueError
        If an option is missing or makes no sense, or a file or folder does not exist.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise ValueError(f"A split can only be {', '.join(SPLITS)}, but got {unknown[0]!r}.")
    kind = _kind(options)
    if kind == _CSV_FILES:
        if options.get("data_folder"):
            raise ValueError("Give either data_folder or csv files such as train_csv, but not both.")
        for split in splits:
            if not options.get(f"{split}_csv"):
                given = next(f"{name}_csv" for name in SPLITS if options.get(f"{name}_csv"))
                raise ValueError(
                    f"{split}_csv is missing: with {given}, the recordings of {', '.join(splits)} are needed."
                )
            path = Path(options[f"{split}_csv"])
            # A path may end in :<start>:<stop>, see read_corpus.
            if not path.exists() and not Path(str(path).rsplit(":", 2)[0]).exists():
                raise ValueError(f"{split}_csv {path} does not exist.")
    if kind == _FOLDER and not Path(options["data_folder"]).is_dir():
        raise ValueError(f"data_folder {options['data_folder']} does not exist, or is no folder.")
    if kind != _CSV_FILES:
        name = "speaker_shares" if kind == _FOLDER else "synthetic_speakers"
        if len(options[name]) != len(SPLITS):
            raise ValueError(
                f"{name} can only be a list of {len(SPLITS)} numbers ({', '.join(SPLITS)}), but got {options[name]!r}."
            )
    if options.get("skip_prep"):
        _check_earlier(options, splits)


def prepare_data(options, splits, progressbar=True):
    """Write the manifests of the wanted splits.

    Arguments
    ---------
    options : dict
        The recipe's options as plain values. Of them are used

        - ``output_folder``: the manifests are written into its folder ``manifests``;
        - ``train_csv``, ``alignment_csv``, ``dev_csv``, ``test_csv``: csv files, or ``<csv>:<start>:<stop>`` for some
          of its speakers, or folders, see :func:`nessa_modules.corpora.read_corpus`;
        - ``data_folder``, ``speaker_shares`` (the share of each of the four splits) and ``split_seed``;
        - ``synthetic_folder``, ``synthetic_speakers`` (the number in each of the four splits),
          ``synthetic_utterances`` (of a speaker), ``synthetic_conditions``, ``synthetic_seed`` and ``sample_rate``;
        - ``min_seconds`` and ``segment_seconds`` (of training and alignment; null: recordings are not cut): optional;
        - ``skip_prep``: take the manifests of an earlier run as they are.
    splits : tuple of str
        Of ``train``, ``alignment``, ``dev`` and ``test``.
    progressbar : bool
        Whether to show the progress of reading or making the data.

    Returns
    -------
    dict
        From each of the splits to the path of its manifest, which ``read_corpus`` reads.

    Raises
    ------
    ValueError
        If data are missing or damaged; if a speaker of ``dev`` or ``test`` stands in another split as well; if two
        splits have an id in common.
    """
    check_data(options, splits)
    manifests = {split: _folder(options) / f"{split}.csv" for split in splits}
    if options.get("skip_prep"):
        return manifests
    kind = _kind(options)
    lengths = {"progressbar": progressbar}
    if options.get("min_seconds") is not None:
        lengths["min_seconds"] = options["min_seconds"]
    if kind == _CSV_FILES:
        utterances = {split: read_corpus(options[f"{split}_csv"], **lengths) for split in splits}
    elif kind == _FOLDER:
        everything = read_corpus(options["data_folder"], **lengths)
        parts = split_speakers(everything, options["speaker_shares"], options["split_seed"])
        utterances = {split: parts[SPLITS.index(split)] for split in splits}
    else:
        # All splits are made at once: the second script, which wants others of them, finds them.
        voices = make_voices(
            options["synthetic_folder"],
            dict(zip(SPLITS, options["synthetic_speakers"], strict=True)),
            options["synthetic_utterances"],
            seed=options["synthetic_seed"],
            sample_rate=options["sample_rate"],
            conditions=options["synthetic_conditions"],
            progressbar=progressbar,
        )
        utterances = {split: read_corpus(voices, split=split, **lengths) for split in splits}
    _refuse_shared(utterances)
    if options.get("segment_seconds") is not None:
        # Not dev and test: segments of one recording would meet in trials, which are too easy within a session.
        for split in {"train", "alignment"} & set(splits):
            utterances[split] = [part for each in utterances[split] for part in cut(each, options["segment_seconds"])]

    folder = _folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    record = _read_record(folder)
    # The other script's manifests are no longer vouched for, if these are made of something else.
    known = record["splits"] if record.get("settings") == _settings(options) else []
    (folder / _RECORD).unlink(missing_ok=True)
    for split, manifest in manifests.items():
        write_corpus(manifest, utterances[split])
        num_speakers = len({utterance.speaker for utterance in utterances[split]})
        logger.info("%s: %d utterances of %d speakers", split, len(utterances[split]), num_speakers)
    with write_whole(folder / _RECORD) as stream:
        json.dump({"settings": _settings(options), "splits": sorted({*known, *splits})}, stream, indent=2)
    return manifests


def _kind(options):
    if any(options.get(f"{split}_csv") for split in SPLITS):
        return _CSV_FILES
    return _FOLDER if options.get("data_folder") else _SYNTHETIC


def _folder(options):
    return Path(options["output_folder"]) / "manifests"


def _settings(options):
    """The options that the manifests depend on."""
    kind = _kind(options)
    names = {
        _CSV_FILES: tuple(f"{split}_csv" for split in SPLITS),
        _FOLDER: ("data_folder", "speaker_shares", "split_seed"),
        _SYNTHETIC: (
            *("synthetic_speakers", "synthetic_utterances", "synthetic_conditions", "synthetic_seed", "sample_rate"),
            "synthetic_folder",
        ),
    }[kind]
    values = {name: options.get(name) for name in (*names, "min_seconds", "segment_seconds")}
    return {"kind of data": kind, **json.loads(json.dumps(values, default=str))}


def _read_record(folder):
    """What the last preparation left; an empty dict where there is nothing."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return record if record.keys() == {"settings", "splits"} else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _check_earlier(options, splits):
    """With ``skip_prep`` the manifests must be there, and be of these options."""
    folder = _folder(options)
    record = _read_record(folder)
    missing = [
        split for split in splits if split not in record.get("splits", ()) or not (folder / f"{split}.csv").is_file()
    ]
    if missing:
        raise ValueError(f"skip_prep: {folder} holds no manifest of {missing[0]} from an earlier run; run without it.")
    for name, value in _settings(options).items():
        earlier = record["settings"].get(name)
        if earlier != value:
            raise ValueError(
                f"skip_prep: {name} is {value!r}, but it was {earlier!r} when the manifests in {folder} were written; "
                "run without it."
            )


def _refuse_shared(utterances):
    """No speaker is both learned from and tested on; training and alignment may share theirs, if the user says so."""
    for one, other in itertools.combinations(utterances, 2):
        speakers = {u.speaker for u in utterances[one]} & {u.speaker for u in utterances[other]}
        if speakers and {one, other} != {"train", "alignment"}:
            raise ValueError(
                f"Speaker {min(speakers)!r} is in both {one} and {other}; {len(speakers)} speakers are, but theirs "
                "must differ."
            )
        if speakers:
            logger.warning("%d speakers are in both %s and %s.", len(speakers), one, other)
            continue
        ids = {u.id for u in utterances[one]} & {u.id for u in utterances[other]}
        if ids:
            raise ValueError(f"Id {min(ids)!r} stands in both {one} and {other}; {len(ids)} ids do.")
