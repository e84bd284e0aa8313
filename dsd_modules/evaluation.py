"""Scores of separated test mixtures, and the table they are kept in. All scores are in dB, more is better."""

import csv
import math

import torch
from torch.nn.functional import normalize
from torchmetrics.functional.audio import (
    scale_invariant_signal_distortion_ratio,
    signal_distortion_ratio,
)

from dsd_modules.losses import is_silent, length_mask, pairwise_neg_si_sdr
from dsd_modules.permutation import reorder_estimates, solve_assignment
from shared_modules.files import read_table, write_whole

# Scores lie within +-100 dB: a perfect estimate would have an infinite one.
_BOUND_DB = 100.0
_PERFECT_DB = 60.0
# Added to the references' autocorrelation, whose energy is one: narrow-band references stay solvable.
_LOAD_DIAG = 1e-10


def _bounded(scores):
    """Scores within the bounds. Of a perfect estimate, rounding leaves an infinite or undefined SDR."""
    return scores.nan_to_num(nan=_BOUND_DB).clamp(-_BOUND_DB, _BOUND_DB)


def _si_sdr(est, ref):
    """Scale-invariant SDR of signals that have zero mean, ``[..., T]`` each."""
    est, ref = (normalize(signal, dim=-1) for signal in torch.broadcast_tensors(est, ref))
    scores = scale_invariant_signal_distortion_ratio(est, ref)
    # torchmetrics gives a silent estimate 0 dB, as if it were as good as a mixture.
    return _bounded(torch.where(est.any(-1), scores, -_BOUND_DB))


def _sdr(est, ref, si_sdr):
    """SDR of signals without padding, ``[..., T]`` each. NaN where it cannot be solved, unless SI-SDR is perfect."""
    est, ref = torch.broadcast_tensors(est, ref)
    scores = signal_distortion_ratio(est, ref, load_diag=_LOAD_DIAG)
    return torch.where(scores.isnan() & (si_sdr < _PERFECT_DB), torch.nan, _bounded(scores))


def _checked_lengths(est, ref, lengths):
    if est.dim() != 4 or est.shape[1:] != ref.shape:
        raise ValueError(
            f"est must be [L, B, N, T] and ref [B, N, T], but got the shapes {list(est.shape)} and {list(ref.shape)}."
        )
    num_samples = ref.shape[-1]
    if lengths is None:
        lengths = torch.full(ref.shape[:1], num_samples)
    lengths = lengths.to(ref.device)
    if lengths.shape != ref.shape[:1] or lengths.min() < 1 or lengths.max() > num_samples:
        raise ValueError(f"lengths must be {len(ref)} numbers from 1 to {num_samples}, but got {lengths.tolist()}.")
    return lengths


def _without_padding(signal, lengths):
    return torch.where(length_mask(lengths, signal.shape[-1]), signal, 0.0).double()


def _without_failures(est, lengths):
    """Estimates, ``[L, B, N, T]``; silent and non-finite ones are zero."""
    est = _without_padding(est, lengths)
    est = torch.where(est.isfinite().all(-1, keepdim=True), est, 0.0)
    is_silent_est = torch.stack([is_silent(block, lengths) for block in est])  # (L, B, N)
    return torch.where(is_silent_est.unsqueeze(-1), 0.0, est)


@torch.no_grad()
def best_permutations(est, ref, lengths=None):
    """The assignment of each block's estimates to the references that maximises the mean SI-SDR.

    Arguments
    ---------
    est : torch.Tensor
        Estimates of all blocks, ``[L, B, N, T]``.
    ref : torch.Tensor
        References, ``[B, N, T]``.
    lengths : torch.Tensor, optional
        Samples of each item, ``[B]``. None: all ``T``.

    Returns
    -------
    perm : torch.Tensor
        ``[L, B, N]``: ``perm[l, b, i]`` is the index of the estimate assigned to reference ``i``, for
        :func:`dsd_modules.permutation.reorder_estimates`.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Example
    -------
    >>> ref = torch.randn(1, 3, 800)
    >>> best_permutations(ref[None, :, [2, 0, 1]], ref)
    tensor([[[1, 2, 0]]])
    """
    lengths = _checked_lengths(est, ref, lengths)
    est = _without_failures(est, lengths)
    return solve_assignment(pairwise_neg_si_sdr(est, _without_padding(ref, lengths), lengths))


@torch.no_grad()
def score_batch(est, ref, mixture, lengths=None, perm=None):
    """Score a batch of separated mixtures by SI-SDR and SDR and the improvements of both over the mixture.

    SI-SDR is the zero-mean one (Le Roux et al. 2019); SDR is BSS Eval's with its 512-tap distortion filter
    (Vincent et al. 2006), as computed by Scheibler 2022.

    The final block's estimates are assigned to the references by the permutation that maximises the mean
    SI-SDR; each block's SI-SDRi is under the block's own best permutation.

    What has no score is NaN and left out of the means over speakers: a speaker whose reference is silent,
    and the improvement over a mixture that is the reference already (all else is silent). Scores lie within
    -100 and 100 dB; a silent or non-finite estimate has -100.

    Arguments
    ---------
    est : torch.Tensor
        Estimates of all blocks, the final one last: ``[L, B, N, T]``. To have the scores of block ``b`` (from 1) in
        the final one's place, give ``est[:b]``.
    ref : torch.Tensor
        References, ``[B, N, T]``.
    mixture : torch.Tensor
        ``[B, T]``.
    lengths : torch.Tensor, optional
        Samples of each item, ``[B]``; what lies beyond never changes a score. None: all ``T``.
    perm : torch.Tensor, optional
        The :func:`best_permutations` of ``est``, where they are known already.

    Returns
    -------
    list of dict
        One for each item, with the keys ``si_sdr, si_sdri, sdr, sdri`` (means over speakers), the same for
        each speaker (``si_sdr_spk1``, ...; speaker i is reference i), ``si_sdri_block1`` to
        ``si_sdri_block<L>`` (means over speakers).

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Example
    -------
    >>> ref = torch.randn(1, 3, 800)
    >>> est = 5 * ref[:, [2, 0, 1]] + 0.1 * torch.randn(2, 1, 3, 800)
    >>> (scores,) = score_batch(est, ref, ref.sum(1))
    >>> list(scores)[:6]
    ['si_sdr', 'si_sdri', 'sdr', 'sdri', 'si_sdr_spk1', 'si_sdri_spk1']
    >>> scores["si_sdr"] > 30, scores["si_sdri_block2"] == scores["si_sdri"]
    (True, True)
    """
    lengths = _checked_lengths(est, ref, lengths)
    if mixture.shape != ref[:, 0].shape:
        raise ValueError(f"mixture must be [B, T] = {list(ref[:, 0].shape)}, but got {list(mixture.shape)}.")
    if perm is None:
        perm = best_permutations(est, ref, lengths)
    mask = length_mask(lengths, ref.shape[-1])  # (B, 1, T)
    est = reorder_estimates(_without_failures(est, lengths), perm)  # (L, B, N, T)
    ref, mixture = (_without_padding(signal, lengths) for signal in (ref, mixture.unsqueeze(1)))  # mixture: (B, 1, T)

    def zero_mean(signal):
        mean = signal.sum(-1, keepdim=True) / lengths.view(-1, 1, 1)
        return torch.where(mask, signal - mean, 0.0)

    si_sdr = _si_sdr(zero_mean(est), zero_mean(ref))  # (L, B, N)
    mixture_si_sdr = _si_sdr(zero_mean(mixture), zero_mean(ref))  # (B, N)
    sdr = _sdr(est[-1], ref, si_sdr[-1])  # (B, N)
    mixture_sdr = _sdr(mixture, ref, mixture_si_sdr)

    silent = is_silent(ref, lengths)
    separated = silent | (mixture_si_sdr >= _BOUND_DB)
    si_sdri = (si_sdr - mixture_si_sdr).masked_fill(separated, math.nan)
    sdri = (sdr - mixture_sdr).masked_fill(separated, math.nan)
    scores = torch.stack(
        [si_sdr[-1].masked_fill(silent, math.nan), si_sdri[-1], sdr.masked_fill(silent, math.nan), sdri],
        dim=1,
    )  # (B, 4, N)
    per_speaker = scores.transpose(1, 2).flatten(1)  # (B, N, 4) -> (B, N * 4)
    table = torch.cat([scores.nanmean(-1), per_speaker, si_sdri.nanmean(-1).T], dim=1)  # (B, 4 + N * 4 + L)

    names = ("si_sdr", "si_sdri", "sdr", "sdri")
    speakers = [f"{name}_spk{i + 1}" for i in range(ref.shape[1]) for name in names]
    blocks = [f"si_sdri_block{block + 1}" for block in range(len(est))]
    columns = [*names, *speakers, *blocks]
    return [dict(zip(columns, row, strict=True)) for row in table.tolist()]


def write_results(path, ids, rows):
    """Write the table of a test: one row per mixture, sorted by id, and their mean.

    Arguments
    ---------
    path : str or Path
        The CSV file.
    ids : list of str
        The mixtures' names.
    rows : list of dict
        Their scores, as :func:`score_batch` returns them. NaN becomes an empty cell.

    Returns
    -------
    dict
        The mean of each column over the mixtures that have the score.

    Raises
    ------
    ValueError
        If there is nothing to write, an id occurs twice or is ``mean``, or the rows do not fit.

    Example
    -------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "test_results.csv"
    >>> write_results(path, ["b", "a"], [{"si_sdr": 9.0}, {"si_sdr": 10.0}])
    {'si_sdr': 9.5}
    >>> path.read_text().split()
    ['id,si_sdr', 'a,10.0', 'b,9.0', 'mean,9.5']
    """
    ids = [str(name) for name in ids]
    if len(ids) != len(rows) or not rows:
        raise ValueError(f"Each mixture needs one id and one row, but got {len(ids)} ids and {len(rows)} rows.")
    twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise ValueError(f"Each id may occur only once, but got {twice[0]!r} more than once.")
    if "mean" in ids:
        raise ValueError("The id 'mean' is kept for the last row, but got a mixture of that name.")
    columns = list(rows[0])
    for name, row in zip(ids, rows, strict=True):
        if row.keys() != rows[0].keys():
            raise ValueError(f"All rows must have the columns {columns}, but {name!r} has {list(row)}.")

    values = torch.tensor([[row[column] for column in columns] for row in rows], dtype=torch.float64)
    mean = values.nanmean(0).tolist()
    with write_whole(path) as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["id", *columns])
        for name, row in [*sorted(zip(ids, values.tolist(), strict=True)), ("mean", mean)]:
            table.writerow([name, *("" if math.isnan(value) else round(value, 4) for value in row)])
    return dict(zip(columns, mean, strict=True))


def read_results(path):
    """Read the table that :func:`write_results` wrote.

    Arguments
    ---------
    path : str or Path
        The CSV file.

    Returns
    -------
    rows : dict
        The scores of each mixture by id; an empty cell is NaN.
    mean : dict
        The table's last row.

    Raises
    ------
    ValueError
        If the file is missing or is no such table.

    Example
    -------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "test_results.csv"
    >>> _ = write_results(path, ["b", "a"], [{"si_sdr": 9.0}, {"si_sdr": math.nan}])
    >>> read_results(path)
    ({'a': {'si_sdr': nan}, 'b': {'si_sdr': 9.0}}, {'si_sdr': 9.0})
    """
    table = read_table(path, "id")
    if not table or table[-1][0] != "mean":
        raise ValueError(f"{path} is no table of test results: its last row must be 'mean'.")
    rows = dict(table[:-1])
    if len(rows) != len(table) - 1 or "mean" in rows:
        raise ValueError(f"{path} is no table of test results: an id occurs twice.")
    return rows, table[-1][1]
