"""Makes training data in LibriMix's shape: from synthetic voices, or from a user's own recordings.

On the command line::

    python -m dsd_modules.data.generate synthetic OUT
    python -m dsd_modules.data.generate recordings OUT --train a.csv --dev b.csv:0:20 --test b.csv:20:

Both write ``OUT/<kind>-<settings>-<hash>/Libri{N}Mix`` whole or not at all, and return at once where data of the
same settings are there already.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from dsd_modules.data.librimix import MixSettings, import_pyloudnorm, mix_set, read_corpus
from shared_modules.build_once import build_once
from shared_modules.corpus import make_corpus, share_of, split_of
from shared_modules.espeak import installed_paths

GENERATOR_VERSION = 4  # raise it whenever the same settings give other bytes

_SETS = {"train-360": 1200, "dev": 100, "test": 100}
_NUM_VOICES = {"train": 192, "dev": 16, "test": 16}
_MAX_UTTERANCES = 10  # per voice


def generate_synthetic(
    folder,
    num_spks=2,
    sample_rate=8000,
    mode="min",
    sets=None,
    num_voices=None,
    seed=1234,
    noise=False,
    max_seconds=None,
    num_workers=None,
    progressbar=True,
):
    """Makes a LibriMix-shaped data set of synthetic voices, or finds the one made before.

    Arguments
    ---------
    folder : str or Path
        Parent of the data set's own folder ``synthetic-<settings>-<hash>``.
    num_spks : int
        Speakers per mixture, 2 or more.
    sample_rate : int
        8000 or 16000, in Hz.
    mode : str
        ``min`` or ``max``, as in LibriMix.
    sets : dict, optional
        From a set's name to its number of mixtures; default ``{"train-360": 1200, "dev": 100, "test": 100}``.
        Sets named ``dev*`` and ``test*`` have speakers, voices and sentences of their own.
    num_voices : dict, optional
        From a split (``train``, ``dev``, ``test``) to its number of speakers; default 192, 16 and 16, and fewer
        where there are fewer sources than that.
    seed : int
        Seed of everything that is drawn.
    noise : bool
        Whether to add generated coloured noise.
    max_seconds : float, optional
        Utterances (about 2.5 to 5 s) that are longer are cut to a random segment of this length.
    num_workers : int, optional
        Workers; default: one per core. The result does not depend on it.
    progressbar : bool
        Whether to show progress.

    Returns
    -------
    Path
        The folder ``Libri{N}Mix``.

    Raises
    ------
    ValueError
        If an argument makes no sense, or a needed package is missing.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = generate_synthetic(folder.name, sets={"dev": 1}, progressbar=False)
    >>> sorted(p.name for p in (path / "wav8k/min/dev").iterdir())
    ['mix_clean', 's1', 's2']
    >>> folder.cleanup()
    """
    settings = MixSettings(num_spks, sample_rate, mode, noise, max_seconds, seed)
    sets = _check_sets(sets or _SETS)
    unknown = set(num_voices or {}) - set(_NUM_VOICES)
    if unknown:
        raise ValueError(f"num_voices takes the keys train, dev and test, but got {min(unknown)!r}")
    slots = dict.fromkeys(_NUM_VOICES, 0)  # how many sources each split has to fill
    for name, num_mixtures in sets.items():
        slots[split_of(name)] = max(num_mixtures * num_spks, slots[split_of(name)])
    voices = {
        split: min((num_voices or {}).get(split, _NUM_VOICES[split]), num_sources)
        for split, num_sources in slots.items()
    }
    utterances = {
        split: min(math.ceil(num_sources / max(voices[split], 1)), _MAX_UTTERANCES)
        for split, num_sources in slots.items()
    }
    recipe = {
        "kind": "synthetic",
        **asdict(settings),
        "sets": sets,
        "num_voices": voices,
        "utterances_per_voice": utterances,
    }

    def build(root):
        corpus_csv = make_corpus(root / "corpus", voices, utterances, seed, num_workers, progressbar)
        corpus = {split: [] for split in voices}
        for utterance in read_corpus(corpus_csv):
            split = next(split for split in voices if utterance.speaker.startswith(split))
            corpus[split].append(utterance)
        for name, num_mixtures in sets.items():
            mix_set(
                root,
                name,
                corpus[split_of(name)],
                num_mixtures,
                settings,
                num_workers=num_workers,
                progressbar=progressbar,
            )

    return _build_once(folder, recipe, build)


def mix_recordings(
    folder,
    corpora,
    sets=None,
    num_spks=2,
    sample_rate=8000,
    mode="min",
    seed=1234,
    noise=False,
    noise_folder=None,
    max_seconds=None,
    num_workers=None,
    progressbar=True,
):
    """Mixes a user's own recordings into a LibriMix-shaped data set, or finds the one made before.

    Arguments
    ---------
    folder : str or Path
        Parent of the data set's own folder ``recordings-<settings>-<hash>``.
    corpora : dict
        From a set's name to its csv: columns ``id``, ``speaker`` and ``path`` (relative to the csv's folder), one
        row per recording. ``<csv>:<start>:<stop>`` takes some of its speakers only: a Python slice of their
        sorted names, e.g. ``test.csv:0:20`` and ``test.csv:20:``.
    sets : dict, optional
        From a set's name to its number of mixtures; default: 1200 for each set, 100 for ``dev*`` and ``test*``.
    noise : bool
        Whether to add noise.
    noise_folder : str or Path, optional
        Folder of recorded noise (wav or flac, at any depth), which is shared out among train, dev and test; adds
        noise. Without it, noise is generated.
    max_seconds : float, optional
        Recordings that are longer are cut to a random segment of this length, another one in each mixture.
    num_spks, sample_rate, mode, seed, num_workers, progressbar
        See ``generate_synthetic``.

    Returns
    -------
    Path
        The folder ``Libri{N}Mix``.

    Raises
    ------
    ValueError
        If an argument makes no sense, a package or file is missing, a recording is not fit, or two sets have a
        speaker in common.

    Example
    -------
    >>> mix_recordings("data", {"train-360": "all.csv:20:", "dev": "all.csv:0:20"})
    Traceback (most recent call last):
    ...
    ValueError: all.csv cannot be read as a csv file: [Errno 2] No such file or directory: 'all.csv'
    """
    settings = MixSettings(num_spks, sample_rate, mode, noise or noise_folder is not None, max_seconds, seed)
    if not corpora:
        raise ValueError("no corpus was given: expected a csv for at least one set")
    sets = _check_sets(sets or {name: 1200 if split_of(name) == "train" else 100 for name in corpora})
    if sets.keys() != corpora.keys():
        raise ValueError(f"sets {sorted(sets)} and corpora {sorted(corpora)} must name the same sets")
    selected = {name: _select_speakers(str(corpora[name])) for name in sets}
    for a, b in combinations(selected, 2):
        common = {u.speaker for u in selected[a]} & {u.speaker for u in selected[b]}
        if common:
            raise ValueError(f"speaker {min(common)!r} is in both {a} and {b}; their speakers must differ")
    noise_files = _list_noise(noise_folder, {split_of(name) for name in sets}) if noise_folder else {}
    content = [(n, u.id, u.speaker, u.text, _stamp(u.file)) for n, corpus in selected.items() for u in corpus]
    content += [(split, _stamp(file)) for split, files in noise_files.items() for file in files]
    recipe = {
        "kind": "recordings",
        **asdict(settings),
        "sets": sets,
        "corpora": {name: str(Path(corpora[name]).resolve()) for name in sets},
        "noise_folder": noise_folder and str(Path(noise_folder).resolve()),
        "content": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    }

    def build(root):
        for name, num_mixtures in sets.items():
            mix_set(
                root,
                name,
                selected[name],
                num_mixtures,
                settings,
                noise_files.get(split_of(name), ()),
                num_workers,
                progressbar,
            )

    return _build_once(folder, recipe, build)


def _stamp(file):
    """What changes when a file does."""
    return str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns


def _check_sets(sets):
    for name, num_mixtures in sets.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"a set's name must be a plain folder name, but got {name!r}")
        if not isinstance(num_mixtures, int) or num_mixtures < 1:
            raise ValueError(f"set {name} needs at least 1 mixture, but got {num_mixtures}")
    return dict(sets)


def _select_speakers(corpus):
    """Reads ``<csv>`` or ``<csv>:<start>:<stop>``."""
    csv_path, start, stop = re.fullmatch(r"(.*?)(?::(-?\d*):(-?\d*))?", corpus, re.DOTALL).groups()
    utterances = read_corpus(csv_path)
    if start is None:
        return utterances
    speakers = sorted({utterance.speaker for utterance in utterances})
    chosen = set(speakers[slice(*(int(edge) if edge else None for edge in (start, stop)))])
    if not chosen:
        raise ValueError(f"{corpus} selects none of the {len(speakers)} speakers of {csv_path}")
    return [utterance for utterance in utterances if utterance.speaker in chosen]


def _list_noise(noise_folder, splits):
    """Shares the noise files of a folder out among the splits that are wanted."""
    files = sorted(path for path in Path(noise_folder).rglob("*") if path.suffix.lower() in (".wav", ".flac"))
    shares = {split: share_of(split, files) if len(splits) > 1 else files for split in splits}
    if not all(shares.values()):
        raise ValueError(
            f"{noise_folder} holds {len(files)} wav or flac files, but noise for train, dev and test needs 7"
        )
    return shares


def _build_once(folder, recipe, build):
    """Runs ``build``, unless there are data of the same settings."""
    recipe = {"generator_version": GENERATOR_VERSION, **recipe}
    text = json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
    name = f"{recipe['kind']}-{recipe['num_spks']}spk-{recipe['sample_rate'] // 1000}k-{recipe['mode']}"

    def checked_build(root):
        import_pyloudnorm()  # a missing package shows at once
        if recipe["kind"] == "synthetic":
            installed_paths()
        build(root)

    return build_once(folder, name, text, checked_build) / f"Libri{recipe['num_spks']}Mix"


def main(arguments=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dsd_modules.data.generate", description=__doc__.split("\n\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="synthetic|recordings")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("folder", metavar="OUT", help="parent of the data set's own folder")
    shared.add_argument(
        "--num-mixtures",
        type=int,
        nargs="+",
        metavar="N",
        help="mixtures of train, dev and test, in this order, for the sets that are made (default: 1200 100 100)",
    )
    shared.add_argument("--train-name", default="train-360", help="name of the training set (%(default)s)")
    shared.add_argument("--num-spks", type=int, default=2, help="speakers per mixture (%(default)s)")
    shared.add_argument("--sample-rate", type=int, default=8000, help="8000 or 16000 Hz (%(default)s)")
    shared.add_argument("--mode", default="min", help="min cuts to the shortest source, max pads (%(default)s)")
    shared.add_argument("--max-seconds", type=float, help="cut longer recordings to random segments")
    shared.add_argument("--noise", action="store_true", help="add noise (generated, unless there is a folder)")
    shared.add_argument("--seed", type=int, default=1234, help="(%(default)s)")
    shared.add_argument("--num-workers", type=int, help="workers (one per core)")
    kinds.add_parser("synthetic", parents=[shared], help="mix voices of espeak-ng")
    recordings = kinds.add_parser(
        "recordings",
        parents=[shared],
        help="mix your own recordings",
        description="Mixes recordings. CSV has the columns id, speaker and path (relative to its folder), one row "
        "per mono recording. CSV:START:STOP takes some speakers only, a Python slice of their sorted names: with "
        "40 speakers, --dev all.csv:0:20 --test all.csv:20: gives 20 to each.",
    )
    for split in ("train", "dev", "test"):
        recordings.add_argument(f"--{split}", metavar="CSV", help=f"recordings of the {split} set")
    recordings.add_argument("--noise-folder", help="folder of recorded noise (wav or flac) to add")

    options = vars(parser.parse_args(arguments))
    kind, names = options.pop("kind"), (options.pop("train_name"), "dev", "test")
    num_mixtures = options.pop("num_mixtures")
    try:
        if kind == "recordings":
            csvs = [options.pop(split) for split in ("train", "dev", "test")]
            options["corpora"] = {name: path for name, path in zip(names, csvs, strict=True) if path}
            names = tuple(options["corpora"])
        if num_mixtures is not None:
            if len(num_mixtures) != len(names):
                raise ValueError(f"--num-mixtures: {len(names)} numbers expected, but got {len(num_mixtures)}")
            options["sets"] = dict(zip(names, num_mixtures, strict=True))
        else:
            options["sets"] = {name: _SETS["train-360" if split_of(name) == "train" else name] for name in names}
        print((generate_synthetic if kind == "synthetic" else mix_recordings)(**options))
    except (ValueError, OSError, RuntimeError) as error:  # libsndfile's errors are RuntimeErrors
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
