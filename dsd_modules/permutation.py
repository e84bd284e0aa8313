"""Permutations of speakers: solving, applying, inverting and comparing label assignments.

Throughout, ``perm[b, i]`` is the index of the *estimate* that is assigned to *reference* ``i`` of item ``b``,
and a loss matrix is ``[..., n_ref, n_est]``.
"""

import functools
import itertools

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

# Up to this many speakers all permutations are tried (at most 120), which needs no copy to the CPU.
MAX_EXHAUSTIVE_SPKS = 5


@functools.lru_cache(maxsize=32)
def _all_permutations(num_spks, device):
    return torch.tensor(list(itertools.permutations(range(num_spks))), device=device)  # (P, N)


def _check_square(loss_matrix):
    if loss_matrix.dim() < 2 or loss_matrix.shape[-1] != loss_matrix.shape[-2]:
        raise ValueError(f"loss_matrix must be [..., N, N], but got the shape {list(loss_matrix.shape)}.")


def _finite(loss_matrix):
    """Non-finite entries become dearer than any finite one, so that the search always has an answer."""
    return loss_matrix.detach().double().nan_to_num(nan=1e12, posinf=1e12, neginf=-1e12)


def permutation_losses(loss_matrix):
    """The mean loss of every permutation.

    Arguments
    ---------
    loss_matrix : torch.Tensor
        ``[..., N, N]``; there are N! permutations, so N should be small.

    Returns
    -------
    losses : torch.Tensor
        ``[..., P]``, mean over speakers.
    perms : torch.Tensor
        The permutations, ``[P, N]``.

    Raises
    ------
    ValueError
        If the matrix is not square.

    Example
    -------
    >>> permutation_losses(torch.tensor([[[-9.0, 0.0], [1.0, -7.0]]]))
    (tensor([[-8.0000,  0.5000]]), tensor([[0, 1],
            [1, 0]]))
    """
    _check_square(loss_matrix)
    num_spks = loss_matrix.shape[-1]
    perms = _all_permutations(num_spks, loss_matrix.device)
    references = torch.arange(num_spks, device=loss_matrix.device)
    return loss_matrix[..., references, perms].mean(-1), perms  # (..., P, N) -> (..., P)


def solve_assignment(loss_matrix, method="auto"):
    """The assignment of estimates to references with the smallest total loss.

    Arguments
    ---------
    loss_matrix : torch.Tensor
        Loss of every pair, ``[..., N_ref, N_est]`` with ``N_ref == N_est``.
    method : str
        ``exhaustive`` tries all permutations, ``hungarian`` calls SciPy's ``linear_sum_assignment``;
        ``auto`` is exhaustive up to 5 speakers.

    Returns
    -------
    perm : torch.Tensor
        ``[..., N]`` (int64): ``perm[..., i]`` is the index of the estimate assigned to reference ``i``.

    Raises
    ------
    ValueError
        If the matrix is not square or the method is unknown.

    Example
    -------
    >>> matrix = torch.tensor([[[5.0, 1.0, 5.0], [5.0, 5.0, 1.0], [1.0, 5.0, 5.0]]])
    >>> solve_assignment(matrix)
    tensor([[1, 2, 0]])
    """
    _check_square(loss_matrix)
    if method not in ("auto", "exhaustive", "hungarian"):
        raise ValueError(f"method can only be 'auto', 'exhaustive' or 'hungarian', but got {method!r}.")
    num_spks = loss_matrix.shape[-1]
    if method == "exhaustive" or (method == "auto" and num_spks <= MAX_EXHAUSTIVE_SPKS):
        losses, perms = permutation_losses(_finite(loss_matrix))
        return perms[losses.argmin(-1)]  # (..., N)
    matrices = _finite(loss_matrix).reshape(-1, num_spks, num_spks).cpu().numpy()
    perm = np.array([linear_sum_assignment(matrix)[1] for matrix in matrices], dtype=np.int64)
    return torch.from_numpy(perm).reshape(loss_matrix.shape[:-1]).to(loss_matrix.device)


def assignment_margin(loss_matrix):
    """How much worse the second-best assignment is than the best: small margins are about to switch.

    Arguments
    ---------
    loss_matrix : torch.Tensor
        ``[..., N, N]`` in dB, at most 5 speakers.

    Returns
    -------
    margin : torch.Tensor
        ``[...]``, mean over speakers, dB, not negative. Infinite for a single speaker.

    Raises
    ------
    ValueError
        If the matrix is not square or has more than 5 speakers.

    Example
    -------
    >>> assignment_margin(torch.tensor([[[-9.0, 0.0], [1.0, -7.0]]]))
    tensor([8.5000], dtype=torch.float64)
    """
    _check_square(loss_matrix)
    num_spks = loss_matrix.shape[-1]
    if num_spks > MAX_EXHAUSTIVE_SPKS:
        raise ValueError(f"The margin is for up to {MAX_EXHAUSTIVE_SPKS} speakers, but got {num_spks}.")
    losses, perms = permutation_losses(_finite(loss_matrix))
    if len(perms) == 1:
        return torch.full_like(losses[..., 0], float("inf"))
    best, second = losses.topk(2, dim=-1, largest=False).values.unbind(-1)
    return second - best


def reorder_estimates(est, perm):
    """Put the estimates in the order of the references.

    Arguments
    ---------
    est : torch.Tensor
        ``[..., N, T]``.
    perm : torch.Tensor
        ``[..., N]``, see :func:`solve_assignment`.

    Returns
    -------
    torch.Tensor
        ``[..., N, T]`` whose row ``i`` is the estimate of reference ``i``.

    Example
    -------
    >>> est = torch.tensor([[[10.0], [20.0], [30.0]]])
    >>> reorder_estimates(est, torch.tensor([[1, 2, 0]])).flatten()
    tensor([20., 30., 10.])
    """
    return torch.take_along_dim(est, perm.unsqueeze(-1), dim=-2)


def invert_permutation(perm):
    """The inverse: the index of the reference to which each estimate is assigned.

    Arguments
    ---------
    perm : torch.Tensor
        ``[..., N]``.

    Returns
    -------
    torch.Tensor
        ``[..., N]`` with ``inverse[..., perm[..., i]] == i``.

    Example
    -------
    >>> invert_permutation(torch.tensor([[1, 2, 0]]))
    tensor([[2, 0, 1]])
    """
    return perm.argsort(-1)


def count_switches(perm, previous_perm):
    """The number of items whose assignment differs from the previous one.

    Arguments
    ---------
    perm, previous_perm : torch.Tensor
        ``[..., N]``.

    Returns
    -------
    int

    Example
    -------
    >>> count_switches(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1], [0, 1]]))
    1
    """
    return int((perm != previous_perm).any(-1).sum())
