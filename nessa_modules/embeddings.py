"""Embeddings of many utterances, computed once and kept on disk."""

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from shared_modules.files import write_whole


def embed(encoder, utterances, cache_folder=None, progressbar=True):
    """The embeddings of utterances by a frozen model: read from the cache, or computed and put there.

    Arguments
    ---------
    encoder : nessa_modules.encoder.SpeakerEncoder
        ``model_id``, ``embedding_size`` and ``encode_utterances(utterances, progressbar)`` are used.
    utterances : list of Utterance
        K of them.
    cache_folder : str or Path, optional
        Made where it is missing. A file in it belongs to the model's weights and to the utterances as they are: their
        names, segments, and their files' sizes and times of change. One that is damaged is computed anew.
    progressbar : bool
        Whether to show one while computing.

    Returns
    -------
    torch.Tensor
        float32 ``[K, D]`` on the CPU, not length-normalised.

    Raises
    ------
    ValueError
        If there are no utterances, a file is missing, or the model's embeddings are not finite.

    Example
    -------
    >>> import tempfile
    >>> from types import SimpleNamespace
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.wav").write_bytes(b"...")
    >>> utterances = [SimpleNamespace(id="a", path=str(folder / "a.wav"), start_s=0.0, duration_s=1.0)]
    >>> encoder = SimpleNamespace(model_id="abc", embedding_size=2)
    >>> encoder.encode_utterances = lambda utterances, progressbar: torch.ones(len(utterances), 2)
    >>> embed(encoder, utterances, folder / "cache")
    tensor([[1., 1.]])
    >>> del encoder.encode_utterances
    >>> embed(encoder, utterances, folder / "cache")
    tensor([[1., 1.]])
    """
    if not utterances:
        raise ValueError("There is no utterance to compute an embedding of.")
    shape = (len(utterances), encoder.embedding_size)
    if cache_folder is None:
        return _compute(encoder, utterances, progressbar, shape)
    path = Path(cache_folder) / f"{encoder.model_id}_{_content_hash(utterances)}.pt"
    embeddings = _read(path, shape)
    if embeddings is None:
        embeddings = _compute(encoder, utterances, progressbar, shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path, "wb") as stream:
            torch.save({"embeddings": embeddings, "checksum": _checksum(embeddings)}, stream)
    return embeddings


def _compute(encoder, utterances, progressbar, shape):
    with torch.no_grad():
        embeddings = encoder.encode_utterances(utterances, progressbar=progressbar)
    embeddings = torch.as_tensor(embeddings).detach().float().cpu().contiguous()
    if tuple(embeddings.shape) != shape:
        raise ValueError(f"The model must give embeddings of the shape {shape}, but got {tuple(embeddings.shape)}.")
    broken = ~embeddings.isfinite().all(dim=-1)
    if broken.any():
        first = utterances[int(broken.nonzero()[0])]
        raise ValueError(
            f"The model's embeddings of {int(broken.sum())} utterances are not finite, as of {first.path}."
        )
    return embeddings


def _content_hash(utterances):
    """Of what the utterances are, 16 hexadecimal digits; a file that changed has another size or time of change."""
    digest = hashlib.sha256()
    files = {}
    for utterance in utterances:
        path = str(utterance.path)
        if path not in files:
            try:
                state = os.stat(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
            files[path] = [os.path.abspath(path), state.st_size, state.st_mtime_ns]
        row = [utterance.id, *files[path], float(utterance.start_s), float(utterance.duration_s)]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


def _checksum(embeddings):
    return hashlib.sha256(embeddings.numpy().tobytes()).hexdigest()


def _read(path, shape):
    """The embeddings of a cache file; None where there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        embeddings = kept["embeddings"]
        is_whole = tuple(embeddings.shape) == shape and embeddings.dtype == torch.float32
        is_whole = is_whole and _checksum(embeddings) == kept["checksum"]
    except (
        AttributeError,
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ):
        is_whole = False
    if is_whole:
        return embeddings
    warnings.warn(f"{path} is damaged; its embeddings are computed anew.", stacklevel=3)
    return None
