"""Manifests of a LibriMix folder (Cosentino et al. 2020, https://github.com/JorisCos/LibriMix).

The layout is that of LibriMix's generator:
``Libri2Mix/wav8k/min/train-360/{mix_clean,mix_both,s1,s2}/<mixture id>.wav``.
"""

from pathlib import Path

from dsd_modules.data.manifest import write_manifest


def _describe(folder):
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    return f"it holds {', '.join(names)}" if names else "it is empty" if folder.is_dir() else "it does not exist"


def find_mixtures(data_folder, subset, num_spks, sample_rate, mode="min", task="mix_clean"):
    """The mixtures of one set of a LibriMix folder.

    Arguments
    ---------
    data_folder : str
        A ``Libri2Mix`` or ``Libri3Mix`` folder.
    subset : str
        ``train-100``, ``train-360``, ``dev`` or ``test``.
    num_spks : int
        2 or 3.
    sample_rate : int
        8000 or 16000 Hz.
    mode : str
        ``min`` or ``max``.
    task : str
        ``mix_clean`` or ``mix_both``: which mixture is to be separated.

    Returns
    -------
    list of tuple
        ``(id, path of the mixture, path of source 1, ...)``, sorted by id, which is the mixture's file name.

    Raises
    ------
    ValueError
        If a folder is missing, has another number of speakers, or lacks a source.
    """
    root = Path(data_folder)
    rate_folder = root / f"wav{sample_rate // 1000}k"
    folder = rate_folder / mode / subset
    signals = [task, *(f"s{spk}" for spk in range(1, num_spks + 1))]
    if not rate_folder.is_dir() and (root / f"Libri{num_spks}Mix").is_dir():
        raise ValueError(
            f"data_folder {root} is the folder above LibriMix; give --data_folder {root / f'Libri{num_spks}Mix'}."
        )
    for part in (root, rate_folder, rate_folder / mode, folder, *(folder / signal for signal in signals)):
        if part.is_dir():
            continue
        hint = f" (num_spks is {num_spks})" if part.name.startswith("s") and part.parent == folder else ""
        above = part.parent if part != root else root
        raise ValueError(f"The data folder lacks {part}{hint}: of {above}, {_describe(above)}.")
    if (folder / f"s{num_spks + 1}").is_dir():
        raise ValueError(f"num_spks is {num_spks}, but {folder} holds a source s{num_spks + 1}.")
    names = sorted(path.name for path in (folder / task).glob("*.wav"))
    if not names:
        raise ValueError(f"{folder / task} holds no wav files.")
    for signal in signals[1:]:
        surplus = {path.name for path in (folder / signal).glob("*.wav")}.difference(names)
        if surplus:
            raise ValueError(
                f"{folder / task / min(surplus)} does not exist; {len(surplus)} of the sources in "
                f"{folder / signal} lack their mixture."
            )
        present = {path.name for path in (folder / signal).glob("*.wav")}
        missing = [name for name in names if name not in present]
        if missing:
            raise ValueError(
                f"{folder / signal / missing[0]} does not exist; "
                f"{len(missing)} of {len(names)} mixtures lack this source."
            )
    return [(Path(name).stem, *(str(folder / signal / name) for signal in signals)) for name in names]


def check_librimix(data_folder, train_sets, **layout):
    """Look whether a LibriMix folder is complete, without opening its files.

    Arguments
    ---------
    data_folder : str
        A ``Libri2Mix`` or ``Libri3Mix`` folder.
    train_sets : list of str
        The training sets, which are put together.
    **layout
        ``num_spks``, ``sample_rate``, ``mode``, ``task``: see :func:`find_mixtures`.

    Returns
    -------
    list of list of tuple
        The mixtures for training, validation and test.

    Raises
    ------
    ValueError
        If it is not complete: what is missing.
    """
    subsets = [*train_sets, "dev", "test"]
    *train, valid, test = [find_mixtures(data_folder, subset, **layout) for subset in subsets]
    return [[mixture for mixtures in train for mixture in mixtures], valid, test]


def prepare_librimix(data_folder, train_csv, valid_csv, test_csv, train_sets, min_samples=1, **layout):
    """Write the manifests of the training, validation and test sets.

    Arguments
    ---------
    data_folder : str
        A ``Libri2Mix`` or ``Libri3Mix`` folder.
    train_csv, valid_csv, test_csv : str
        Where the manifests are written.
    min_samples : int
        The shortest mixture that is allowed.
    train_sets, **layout
        See :func:`check_librimix`.

    Raises
    ------
    ValueError
        If the folder is not complete, or a file is not right
        (see :func:`dsd_modules.data.manifest.write_manifest`).
    """
    sets = check_librimix(data_folder, train_sets, **layout)
    for manifest, mixtures in zip((train_csv, valid_csv, test_csv), sets, strict=True):
        write_manifest(manifest, mixtures, layout["sample_rate"], min_samples)
