"""Test scores by the speakers' sexes and by how much the speakers overlap."""

import csv
import math
from pathlib import Path

import torch

from dsd_modules.losses import length_mask
from shared_modules.files import write_whole

_OVERLAP_BINS = ("0-25 %", "25-50 %", "50-75 %", "75-100 %")


def overlap_ratio(ref, lengths=None):
    """The share of a mixture in which at least two speakers are active.

    A speaker is active from the first to the last sample that is not zero, pauses included: where one starts later or
    ends earlier, mixtures are padded with zeros.

    Arguments
    ---------
    ref : torch.Tensor
        References, ``[B, N, T]``.
    lengths : torch.Tensor, optional
        Samples of each item, ``[B]``. None: all ``T``.

    Returns
    -------
    torch.Tensor
        ``[B]``, from 0 to 1; NaN for a single reference, with which nobody can overlap.

    Example
    -------
    >>> overlap_ratio(torch.tensor([[[0.1, 0.0, 0.1, 0.0], [0.0, 0.2, 0.2, 0.0]]]))
    tensor([0.5000])
    """
    num_samples = ref.shape[-1]
    lengths = torch.full(ref.shape[:1], num_samples) if lengths is None else lengths
    lengths = lengths.to(ref.device)
    sounds = (ref != 0) & length_mask(lengths, num_samples)  # (B, N, T)
    has_begun, goes_on = sounds.cumsum(-1) > 0, sounds.flip(-1).cumsum(-1).flip(-1) > 0
    num_active = (has_begun & goes_on).sum(1)  # (B, T)
    ratio = (num_active >= 2).sum(-1) / lengths
    return ratio if ref.shape[1] > 1 else ratio.fill_(math.nan)


def _read_info(folder):
    """LibriMix's speakers of each test mixture in the order of its sources: from the id to the sexes."""
    sexes = {}
    for pattern in ("libri*mix_test*_info.csv", "*/libri*mix_test*_info.csv"):
        for path in sorted(folder.glob(pattern)):
            with open(path, newline="", encoding="utf-8", errors="replace") as stream:
                for row in csv.DictReader(stream):
                    columns = [name for name in row if name and name.startswith("speaker_") and name.endswith("_sex")]
                    sexes[row.get("mixture_ID")] = [row[name] for name in columns]
    return sexes


def _read_speakers(folder):
    """LibriSpeech's SPEAKERS.TXT: from the speaker's id to the sex."""
    path = folder / "SPEAKERS.TXT"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    cells = [line.split("|") for line in lines if not line.startswith(";")]
    return {line[0].strip(): line[1].strip() for line in cells if len(line) > 1}


def gender_pairs(ids, num_spks, folders):
    """The sexes of each mixture's speakers, as far as the metadata of LibriMix or LibriSpeech tell.

    Arguments
    ---------
    ids : list of str
        The mixtures' names. With LibriSpeech's ``SPEAKERS.TXT`` they tell the speakers: utterance ids joined by
        ``_``, of which each begins with the speaker's id and a ``-``.
    num_spks : int
        The speakers to be named: the first ones of the mixture.
    folders : list of (str or Path or None)
        Where to look for LibriMix's ``libri2mix_test-clean_info.csv`` (or ``_test_info.csv``, or of another number of
        speakers; also one folder deeper), and for ``SPEAKERS.TXT``.

    Returns
    -------
    dict
        From the id to ``FF``, ``FM`` or ``MM``, for three speakers ``FFF``, ``FFM``, ... (the speakers' order does not
        matter), without the mixtures of which a speaker's sex is not known.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "SPEAKERS.TXT").write_text("61 | M | test-clean\\n121 | F | test-clean\\n")
    >>> gender_pairs(["61-70968-0000_121-121726-0001", "other_mixture"], 2, [folder])
    {'61-70968-0000_121-121726-0001': 'FM'}
    """
    of_mixtures, of_speakers = {}, {}
    for folder in filter(None, folders):
        of_mixtures |= _read_info(Path(folder))
        of_speakers |= _read_speakers(Path(folder))
    pairs = {}
    for name in ids:
        sexes = of_mixtures.get(name) or [of_speakers.get(part.split("-")[0]) for part in name.split("_")]
        sexes = sexes[:num_spks]
        if len(sexes) == num_spks and set(sexes) <= {"F", "M"}:
            pairs[name] = "".join(sorted(sexes))
    return pairs


def _overlap_bin(ratio):
    """None where there is no ratio."""
    return None if math.isnan(ratio) else _OVERLAP_BINS[min(int(4 * ratio), 3)]


def write_groups(path, rows, pairs):
    """Write the mean test scores of each gender pair and each range of overlap.

    Arguments
    ---------
    path : str or Path
        The CSV file, with the columns ``kind`` (``gender`` or ``overlap``), ``group``, ``num_mixtures`` and the means
        of the scores. Without any group it is not written, and an earlier one is removed.
    rows : dict
        The scores of each mixture by id, with its ``overlap`` where it is known, see
        :func:`dsd_modules.evaluation.read_results`.
    pairs : dict
        From :func:`gender_pairs`.

    Returns
    -------
    list of dict
        The rows of the file: the means over those mixtures of the group that have the score (NaN: none has).

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "test_groups.csv"
    >>> rows = {"a": {"si_sdri": 9.0, "overlap": 0.5}, "b": {"si_sdri": 10.0, "overlap": 1.0}}
    >>> _ = write_groups(path, rows, pairs={"a": "FM", "b": "FM"})
    >>> print(path.read_text())
    kind,group,num_mixtures,si_sdri
    gender,FM,2,9.5
    overlap,50-75 %,1,9.0
    overlap,75-100 %,1,10.0
    <BLANKLINE>
    """
    overlaps = {name: _overlap_bin(row.get("overlap", math.nan)) for name, row in rows.items()}
    names = [("gender", pair) for pair in sorted(set(pairs.values()))] + [("overlap", ratio) for ratio in _OVERLAP_BINS]
    scores = [
        column
        for column in next(iter(rows.values()))
        if column != "overlap" and "_spk" not in column and "_block" not in column
    ]
    groups = []
    for kind, group in names:
        of_kind = pairs if kind == "gender" else overlaps
        members = [row for name, row in rows.items() if of_kind.get(name) == group]
        if members:
            means = {column: _mean([row[column] for row in members]) for column in scores}
            groups.append({"kind": kind, "group": group, "num_mixtures": len(members), **means})
    if not groups:
        Path(path).unlink(missing_ok=True)
        return groups
    with write_whole(path) as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(groups[0])
        for group in groups:
            means = ["" if math.isnan(group[column]) else round(group[column], 4) for column in scores]
            table.writerow([group["kind"], group["group"], group["num_mixtures"], *means])
    return groups


def _mean(values):
    return torch.tensor(values, dtype=torch.float64).nanmean().item()
