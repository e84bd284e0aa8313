"""Preparation of LibriMix (Cosentino et al. 2020, https://github.com/JorisCos/LibriMix) and of data in its shape.

The layout of a generated folder is that of LibriMix's generator:
``Libri2Mix/wav8k/min/train-360/{mix_clean,mix_both,mix_single,s1,s2,noise}/<mixture id>.wav``, with
``Libri2Mix/wav8k/min/metadata/mixture_train-360_mix_clean.csv`` and so on beside the sets.

Beside the manifests stands ``prepared.json``: what they were made for, and a digest of the data they were made of.
"""

import hashlib
import itertools
import json
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsd_modules.data import on_the_fly
from dsd_modules.data.generate import generate_synthetic
from dsd_modules.data.manifest import (
    check_audio,
    read_mixtures,
    read_rows,
    refuse_shared_mixtures,
    sort_by_id,
    write_manifest,
)
from dsd_modules.data.wavs import WavReader
from shared_modules.files import write_whole

logger = logging.getLogger(__name__)

_OWN_MANIFESTS, _LIBRIMIX_FOLDER, _ON_THE_FLY = "own manifests", "LibriMix folder", "mixed at load time"


def check_data(options):
    """Look for the data before anything is generated or built, without opening an audio file.

    Arguments
    ---------
    options : dict
        The recipe's options as plain values.

    Raises
    ------
    ValueError
        If a folder, a mixture's file or a manifest is missing, or (with ``skip_prep``) the earlier preparation is.
    """
    if options.get("skip_prep"):
        _fitting_record(options)
    if _kind(options) != _LIBRIMIX_FOLDER or options["data_folder"]:
        _list_sets(options)


def prepare_data(options):
    """Write the three manifests, or find that those of an earlier preparation still hold.

    They are of the user's own csv files, of a generated LibriMix folder, of a LibriMix that is mixed at load time, or
    of synthetic voices. All audio is checked before the first manifest is written.

    Arguments
    ---------
    options : dict
        The recipe's options as plain values.

    Raises
    ------
    ValueError
        If the data are not complete or a file is not right, or (with ``skip_prep``) they changed.
    """
    manifests = _manifests(options)
    sets = _list_sets(options)
    record = {"settings": _settings(options), "mixtures": _digest_mixtures(sets)}
    if options.get("skip_prep"):
        earlier = _fitting_record(options)
        if earlier["manifests"] != _digest_manifests(options):
            raise ValueError(
                f"The manifests in {manifests[0].parent} were changed since they were written; "
                "run once without --skip_prep."
            )
        if earlier["mixtures"] != record["mixtures"]:
            raise ValueError(
                f"The mixtures of the data are not those of the manifests in {manifests[0].parent}; "
                "run once without --skip_prep."
            )
        return
    earlier = _read_record(options)
    if earlier is not None:
        record_now = {**record, **_digests(sets, options)}
        if None not in record_now.values() and earlier == record_now:
            logger.info("The manifests in %s are reused.", manifests[0].parent)
            return
        logger.warning(
            "The data or their settings differ from those of the manifests in %s: all audio is checked again.",
            manifests[0].parent,
        )
    rows = _check_sets(sets, options)
    for manifest in manifests:
        manifest.parent.mkdir(parents=True, exist_ok=True)
    _record_file(options).unlink(missing_ok=True)  # so that it never stands beside manifests of other data
    for manifest, set_rows in zip(manifests, rows, strict=True):
        write_manifest(manifest, set_rows)
    with write_whole(_record_file(options)) as stream:
        json.dump({**record, **_digests(sets, options)}, stream, indent=2)


def make_reader(options):
    """What reads the signals of the manifests' rows.

    Arguments
    ---------
    options : dict
        The recipe's options as plain values.

    Returns
    -------
    WavReader or OnTheFlyReader
    """
    if _kind(options) == _ON_THE_FLY:
        return on_the_fly.OnTheFlyReader(
            options["librispeech_folder"],
            options.get("wham_folder"),
            options["num_spks"],
            options["sample_rate"],
            options["task"],
            quantize=options["quantize"],
            cache_bytes=int(options["cache_gb"] * 1e9),
        )
    return WavReader(_made_data_folder(options), options["num_spks"])


def find_mixtures(data_folder, subset, num_spks, sample_rate, mode="min", task="mix_clean"):
    """The mixtures of one set of a generated LibriMix folder: those its metadata list, or those its folders hold.

    Arguments
    ---------
    data_folder : str
        A ``Libri2Mix`` or ``Libri3Mix`` folder.
    subset : str
        ``train-100``, ``train-360``, ``dev`` or ``test``.
    num_spks : int
        2 or 3, the sources to separate; 1 for the task ``mix_single``, of either folder.
    sample_rate : int
        8000 or 16000 Hz.
    mode : str
        ``min`` or ``max``.
    task : str
        ``mix_clean``, ``mix_both`` or ``mix_single``: which mixture is to be separated.

    Returns
    -------
    list of dict
        ``ID`` (the mixture's file name), ``mix_wav``, ``s1_wav``, ... (relative to the data folder), and where there
        are metadata ``length`` (in samples); sorted by id.

    Raises
    ------
    ValueError
        If a folder is missing, has another number of speakers, or lacks a mixture or a source, or where the metadata
        have no rows, an id twice, or not all mixtures of the folder.
    """
    root = Path(data_folder)
    rate_folder = root / f"wav{sample_rate // 1000}k"
    folder = rate_folder / mode / subset
    signals = {"mix_wav": task, **{f"s{spk}_wav": f"s{spk}" for spk in range(1, num_spks + 1)}}
    if (task == "mix_single") != (num_spks == 1):
        raise ValueError(f"num_spks is 1 for the task mix_single alone, but got {num_spks} for {task}.")
    inside = [root / name for name in (f"Libri{num_spks}Mix", "Libri2Mix", "Libri3Mix") if (root / name).is_dir()]
    if not rate_folder.is_dir() and inside:
        raise ValueError(f"data_folder {root} is the folder above LibriMix; give --data_folder {inside[0]}.")
    for part in (root, rate_folder, rate_folder / mode, folder, *(folder / signal for signal in signals.values())):
        if part.is_dir():
            continue
        hint = f" (num_spks is {num_spks})" if part.name.startswith("s") and part.parent == folder else ""
        above = part.parent if part != root else root
        raise ValueError(f"The data folder lacks {part}{hint}: of {above}, {_describe(above)}.")
    if task != "mix_single" and (folder / f"s{num_spks + 1}").is_dir():
        raise ValueError(f"num_spks is {num_spks}, but {folder} holds a source s{num_spks + 1}.")

    present = {signal: _list_wavs(folder / signal) for signal in signals.values()}
    on_disk = set().union(*present.values())
    metadata = rate_folder / mode / "metadata" / f"mixture_{subset}_{task}.csv"
    if not metadata.exists() and metadata.parent.is_dir() and on_disk:  # LibriMix writes it once the set is whole
        warnings.warn(f"{metadata} is missing: is {folder} whole? It holds {len(on_disk)} mixtures.", stacklevel=2)
    lengths = _read_lengths(metadata) if metadata.exists() else dict.fromkeys(on_disk)
    if not lengths:
        raise ValueError(f"{folder / task} holds no wav files.")
    missing = [
        (folder / signal / f"{mixture_id}.wav", mixture_id)
        for signal in signals.values()
        for mixture_id in sorted(lengths.keys() - present[signal])
    ]
    if missing:
        raise ValueError(
            f"{missing[0][0]} does not exist; {len({mixture_id for _, mixture_id in missing})} of {len(lengths)} "
            "mixtures lack one of their files."
        )
    surplus = sorted(on_disk - lengths.keys())
    if surplus:
        raise ValueError(
            f"The metadata {metadata} do not list {surplus[0]}.wav; {len(surplus)} of the {len(on_disk)} mixtures in "
            f"{folder} are not in them."
        )
    relative = folder.relative_to(root).as_posix()
    return [
        {
            "ID": mixture_id,
            **{name: f"{relative}/{signal}/{mixture_id}.wav" for name, signal in signals.items()},
            **({} if lengths[mixture_id] is None else {"length": lengths[mixture_id]}),
        }
        for mixture_id in sorted(lengths)
    ]


def _describe(folder):
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    return f"it holds {', '.join(names)}" if names else "it is empty" if folder.is_dir() else "it does not exist"


def _list_wavs(folder):
    """The names of a folder's wav files, without their ending."""
    return {
        name.removesuffix(".wav") for name in os.listdir(folder) if name.endswith(".wav") and not name.startswith(".")
    }


def _read_lengths(metadata):
    """From the ids that LibriMix's metadata list to the mixtures' numbers of samples."""
    rows = read_rows(metadata, "metadata file")
    for column in ("mixture_ID", "length"):
        if column not in rows[0]:
            raise ValueError(f"The metadata file {metadata} has no column {column}.")
    sort_by_id([{"ID": row["mixture_ID"]} for row in rows], f"the metadata file {metadata}")
    try:
        return {row["mixture_ID"]: int(float(row["length"])) for row in rows}
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"The metadata file {metadata} has a length that is no number of samples.") from None


def _kind(options):
    """Which kind of data the options name; synthetic voices are made into a LibriMix folder."""
    if options.get("train_manifest"):
        return _OWN_MANIFESTS
    return _ON_THE_FLY if options.get("librispeech_folder") else _LIBRIMIX_FOLDER


def _made_data_folder(options):
    """Where the manifests' relative paths start: for synthetic voices the folder, which is made if it is missing."""
    if _kind(options) == _OWN_MANIFESTS:
        return ""
    if options["data_folder"]:
        return options["data_folder"]
    num_train, num_valid, num_test = options["synthetic_sizes"]
    train_sets = options["train_sets"]
    return generate_synthetic(
        options["synthetic_folder"],
        num_spks=max(options["num_spks"], 2),
        sample_rate=options["sample_rate"],
        mode=options["mode"],
        sets={**dict.fromkeys(train_sets, -(-num_train // len(train_sets))), "dev": num_valid, "test": num_test},
        noise=options["task"] != "mix_clean",
        seed=options["synthetic_seed"],
    )


def _list_sets(options):
    """The mixtures for training, validation and test, found without opening audio."""
    if _kind(options) == _OWN_MANIFESTS:
        sets = [read_mixtures(options[f"{name}_manifest"], options["num_spks"]) for name in ("train", "valid", "test")]
        refuse_shared_mixtures(sets, "mix_wav")
        return sets
    if _kind(options) == _ON_THE_FLY:
        source, find = options["metadata_folder"], on_the_fly.read_metadata
        layout = {name: options[name] for name in ("num_spks", "task")}
    else:
        source, find = _made_data_folder(options), find_mixtures
        layout = {name: options[name] for name in ("num_spks", "sample_rate", "mode", "task")}
    return _join_train_sets([find(source, subset, **layout) for subset in _subsets(options)], options)


def _subsets(options):
    return [*options["train_sets"], "dev", "test"]


def _join_train_sets(sets, options):
    """The sets for training, validation and test, from those of :func:`_subsets`."""
    *train, valid, test = sets
    train = sort_by_id(list(itertools.chain(*train)), " and ".join(options["train_sets"]))
    refuse_shared_mixtures([train, valid, test], "ID")
    return [train, valid, test]


def _check_sets(sets, options):
    """The rows of the three manifests, after a look at every audio file."""
    min_samples = options["kernel_size"]
    if _kind(options) == _ON_THE_FLY:
        names = ("librispeech_folder", "wham_folder", "metadata_folder", "num_spks", "sample_rate", "mode", "task")
        layout = {name: options.get(name) for name in names}
        rows = [
            on_the_fly.find_mixtures(subset=subset, min_samples=min_samples, **layout) for subset in _subsets(options)
        ]
        return _join_train_sets(rows, options)
    root, mixtures = _made_data_folder(options), list(itertools.chain(*sets))
    rows = iter(check_audio(mixtures, root, options["sample_rate"], min_samples))
    return [list(itertools.islice(rows, len(mixtures))) for mixtures in sets]


def _manifests(options):
    return [Path(options[f"{name}_csv"]) for name in ("train", "valid", "test")]


def _settings(options):
    """The options that manifests depend on. Where the data lie is none of them, so that manifests move with them."""
    settings = {name: options[name] for name in ("num_spks", "sample_rate", "kernel_size")}
    if _kind(options) != _OWN_MANIFESTS:
        settings |= {"mode": options["mode"], "task": options["task"], "train_sets": sorted(options["train_sets"])}
    return {"kind of data": _kind(options), **settings}


def _digest_mixtures(sets):
    """Which mixtures there are. Their lengths are left out: they are known only where there are metadata."""
    sets = [[{key: value for key, value in item.items() if key != "length"} for item in items] for items in sets]
    return hashlib.sha256(json.dumps(sets).encode()).hexdigest()


def _digests(sets, options):
    return {"manifests": _digest_manifests(options), "files": _digest_files(sets, options)}


def _digest_manifests(options):
    """What stands in the manifests; None where one is missing."""
    try:
        return hashlib.sha256(b"".join(manifest.read_bytes() for manifest in _manifests(options))).hexdigest()
    except OSError:
        return None


def _digest_files(sets, options):
    """The size and time of every file that the mixtures are made of; None where one is missing."""
    is_mixed_on_the_fly = _kind(options) == _ON_THE_FLY
    root = options["librispeech_folder"] if is_mixed_on_the_fly else _made_data_folder(options)
    files = {}  # path as the mixtures have it: where it is
    for mixture in itertools.chain(*sets):
        if is_mixed_on_the_fly:
            paths = [path for path, _ in mixture["sources"]]
            files.update((path, os.path.join(options["wham_folder"], path)) for path, _ in mixture["noise"])
        else:
            paths = [path for name, path in mixture.items() if name.endswith("_wav")]
        files.update((path, os.path.join(root, path)) for path in paths)
    digest = hashlib.sha256(json.dumps(sets).encode())
    try:
        names = list(files)
        batches = [names[first : first + 1000] for first in range(0, len(names), 1000)]  # a task for each file is slow
        with ThreadPoolExecutor(max_workers=8) as pool:
            found = pool.map(lambda batch: [(path, os.stat(files[path])) for path in batch], batches)
            for path, status in itertools.chain(*found):
                digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    except OSError:
        return None
    return digest.hexdigest()


def _record_file(options):
    return _manifests(options)[0].with_name("prepared.json")


def _read_record(options):
    """What the last preparation left beside its manifests; None where there is nothing."""
    try:
        record = json.loads(_record_file(options).read_text(encoding="utf-8"))
        return record if record.keys() == {"settings", "mixtures", "manifests", "files"} else None
    except (OSError, ValueError, AttributeError):
        return None


def _fitting_record(options):
    """The same, where it must be there, and be of the same settings."""
    record = _read_record(options)
    folder = _record_file(options).parent
    missing = [file for file in (*_manifests(options), _record_file(options)) if not file.is_file()]
    if missing or record is None:
        fault = f"{missing[0]} does not exist" if missing else f"{_record_file(options)} cannot be read"
        raise ValueError(f"--skip_prep True needs the manifests of an earlier run, but {fault}; run once without it.")
    for name, value in _settings(options).items():
        earlier = record["settings"].get(name)
        if earlier != value:
            raise ValueError(
                f"--skip_prep True: {name} is {value}, but it was {earlier} when the manifests in {folder} were "
                "written; run once without it."
            )
    return record
