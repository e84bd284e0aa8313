"""Alignments map two frozen models' embeddings so that a profile of one can be scored with an utterance of the other.

Every alignment has one interface, :class:`Alignment`: fitted on embeddings that both models made of the same
utterances, it maps profiles of the enrollment model and utterances of the runtime model to vectors whose cosine is
the score. Embeddings are length-normalised first, always and by the alignment itself: what the extractors were
trained to compare is their direction. Here are the interface, :func:`make_alignment` and the folder on the disk. The
kinds with a closed form are in :mod:`nessa_modules.logit_alignment` and :mod:`nessa_modules.linear_alignment`, the
trained ones in :mod:`nessa_modules.nessa`; all are fitted on :class:`nessa_modules.paired_embeddings.PairedEmbeddings`.
"""

import hashlib
import io
import json
from pathlib import Path

import torch
from torch.nn import functional

from nessa_modules.paired_embeddings import length_normalised, pair_embeddings
from shared_modules.files import write_whole
from shared_modules.model_files import read_state, read_text_file

ALIGNMENTS = ("none", "logit", "procrustes", "least_squares", "nessa_start", "nessa", "nessa_runtime")

DESCRIPTION_FILE = "alignment.json"
ALIGNMENT_FOLDER = "alignment"  # of a run
_FORMAT = 1
_TENSORS_FILE = "alignment-{}.pt"  # {}: the alignment's id, so that description and tensors cannot be mixed up


class Alignment:
    """Base of all alignments: checks, scoring, and a folder on the disk. A subclass says how to fit and to map.

    All is computed on the CPU. A fitted alignment is a few named tensors.

    Attributes
    ----------
    name : str
        The kind, one of :data:`ALIGNMENTS`.
    enroll_size, runtime_size, size : int or None
        Dx, Dy, and the dimension Dz of the space where scores are computed; None before the fit.
    details : dict
        What the fit chose and found, as numbers and strings.
    history : list of dict
        Where the fit trained: ``step`` and ``held_out_cost``, the cost of held-out speakers. Not saved.
    enroll_model_id, runtime_model_id : str or None
        The models whose embeddings are aligned, once saved.
    calibration : list of dict
        Thresholds, each as ``{"false_accept_rate": rate, "threshold": score}``. No part of :attr:`alignment_id`.
    """

    name = ""

    def __init__(self):
        self.enroll_size = self.runtime_size = self.size = None
        self.enroll_model_id = self.runtime_model_id = None
        self.details = {}
        self.history = []
        self.calibration = []
        self._tensors = {}

    # What a subclass says

    def _fit(self, pairs):
        """Fit on :class:`PairedEmbeddings`; return named tensors and the details."""
        raise NotImplementedError

    def _map(self, side, embeddings):
        """Map embeddings [.., D] of length 1, of the side ``enroll`` or ``runtime``, to [.., Dz]."""
        raise NotImplementedError

    def _expected_shapes(self):
        """The shape that each tensor of :attr:`_tensors` must have, given the three sizes and which there are."""
        raise NotImplementedError

    def _settings(self):
        """Of the alignment's description: what beside the sizes and tensors decides how embeddings are mapped."""
        return {}

    # For everyone

    def fit(self, X, Y, speakers):
        """Fit to two models' embeddings of the same utterances.

        A speaker may have a single utterance. Then nothing but that utterance can stand for the speaker on both sides,
        and the two embeddings share its session: what is learned from such speakers takes the session for a trait of
        the speaker.

        Arguments
        ---------
        X, Y : Tensor or numpy array
            [K, Dx] of the enrollment model and [K, Dy] of the runtime model, row by row of the same K utterances, as
            the models give them.
        speakers : sequence
            The K utterances' speakers, names or numbers.

        Returns
        -------
        Alignment
            This one.

        Raises
        ------
        ValueError
            If rows do not correspond, an embedding is zero or not finite, or there are fewer than two speakers.
        """
        # Training needs gradients, also where the caller wants none.
        with torch.inference_mode(False), torch.enable_grad():
            pairs = pair_embeddings(X, Y, speakers)
            self._check_fit(pairs)
            tensors, details = self._fit(pairs)
        self._tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        self.details = {"num_utterances": len(pairs.enroll), "num_speakers": pairs.num_speakers, **details}
        self.enroll_size, self.runtime_size = pairs.enroll.shape[1], pairs.runtime.shape[1]
        with torch.no_grad():
            self.size = self._map("enroll", pairs.enroll[:1].float()).shape[-1]
        self.calibration = []
        return self

    def _check_fit(self, pairs):
        """Refuse embeddings that this kind cannot align."""

    @torch.no_grad()
    def enroll(self, x):
        """Map embeddings or profiles of the enrollment model.

        Arguments
        ---------
        x : Tensor or numpy array
            [.., Dx], as the model gives them, or a profile: the mean of the length-normalised embeddings of a
            speaker's enrolled utterances.

        Returns
        -------
        Tensor
            [.., Dz], float32. Only the direction has a meaning, except with ``logit``: there the length is that of
            the logit vector.

        Raises
        ------
        ValueError
            If the alignment is not fitted, the dimension is another, or a vector is zero or not finite.
        """
        return self._mapped("enroll", x, self.enroll_size)

    @torch.no_grad()
    def runtime(self, y):
        """Map embeddings of the runtime model.

        Arguments
        ---------
        y : Tensor or numpy array
            [.., Dy], as the model gives them.

        Returns
        -------
        Tensor
            [.., Dz], float32, in the space of what :meth:`enroll` gives.

        Raises
        ------
        ValueError
            As :meth:`enroll`.
        """
        return self._mapped("runtime", y, self.runtime_size)

    def _mapped(self, side, embeddings, size):
        if size is None:
            raise ValueError(f"The alignment {self.name!r} can only be used once it is fitted or loaded.")
        embeddings = torch.as_tensor(embeddings).detach().cpu()
        if not embeddings.is_floating_point():
            embeddings = embeddings.float()
        if embeddings.ndim == 0 or embeddings.shape[-1] != size:
            raise ValueError(
                f"Embeddings of the {side} model can only have {size} dimensions, but got {list(embeddings.shape)}."
            )
        return self._map(side, length_normalised(embeddings, f"of the {side} model")).float()

    @torch.no_grad()
    def score(self, profiles, utterances):
        """Score every profile with every utterance.

        Arguments
        ---------
        profiles : Tensor or numpy array
            [P, Dx], of the enrollment model.
        utterances : Tensor or numpy array
            [U, Dy], of the runtime model.

        Returns
        -------
        Tensor
            [P, U], the cosine of the mapped vectors, float32.

        Raises
        ------
        ValueError
            As :meth:`enroll`.
        """
        mapped = functional.normalize(self.enroll(profiles), dim=-1)  # (P, Dz)
        return mapped @ functional.normalize(self.runtime(utterances), dim=-1).T  # (P, U)

    # On the disk

    @property
    def num_parameters(self):
        """Numbers that the fit determined, both sides together."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def num_bytes(self):
        """Bytes of the two files that :meth:`save` writes."""
        return len(self._serialised()) + len(self._description().encode())

    @property
    def alignment_id(self):
        """16 hexadecimal digits that stand for the kind, the tensors and the two models, not for the calibration."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.name, self._settings(), self.enroll_model_id, self.runtime_model_id]).encode())
        digest.update(json.dumps([self.enroll_size, self.runtime_size, self.size]).encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _serialised(self):
        stream = io.BytesIO()
        torch.save(self._tensors, stream)
        return stream.getvalue()

    def _description(self):
        description = {
            "format": _FORMAT,
            "kind": self.name,
            "alignment_id": self.alignment_id,
            "enroll_model_id": self.enroll_model_id,
            "runtime_model_id": self.runtime_model_id,
            "enroll_size": self.enroll_size,
            "runtime_size": self.runtime_size,
            "size": self.size,
            "settings": self._settings(),
            "details": self.details,
            "calibration": self.calibration,
        }
        return json.dumps(description, indent=1) + "\n"

    def save(self, folder, enroll_model_id=None, runtime_model_id=None):
        """Write the alignment into a folder, in the place of one that is there: whole, or not at all.

        The tensors' file has the alignment's id in its name and is written first; the description, which names
        it, replaces the old one in one step.

        Arguments
        ---------
        folder : str or Path
            Created where it is missing.
        enroll_model_id, runtime_model_id : str, optional
            The two models. Left out: those that the alignment has.

        Raises
        ------
        ValueError
            If the alignment is not fitted, or a model is not known.
        """
        if self.enroll_size is None:
            raise ValueError(f"The alignment {self.name!r} can only be saved once it is fitted.")
        ids = (enroll_model_id or self.enroll_model_id, runtime_model_id or self.runtime_model_id)
        if not all(isinstance(each, str) and each for each in ids):
            raise ValueError(f"An alignment can only be saved with the ids of its two models, but got {ids}.")
        self.enroll_model_id, self.runtime_model_id = ids
        self.calibration = _checked_calibration(self.calibration, "This alignment")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors_path = folder / _TENSORS_FILE.format(self.alignment_id)
        with write_whole(tensors_path, "wb") as stream:
            stream.write(self._serialised())
        with write_whole(folder / DESCRIPTION_FILE) as stream:
            stream.write(self._description())
        for path in folder.glob(_TENSORS_FILE.format("*")):
            if path != tensors_path:
                path.unlink(missing_ok=True)


def make_alignment(kind, **options):
    """A new alignment, to be fitted.

    Arguments
    ---------
    kind : str
        One of :data:`ALIGNMENTS`: ``none``, ``logit``, ``procrustes``, ``least_squares``, ``nessa`` (both sides are
        mapped), ``nessa_start`` (the same before its training) or ``nessa_runtime`` (only the runtime side is).
    **options
        Those of the kind's class.

    Returns
    -------
    Alignment

    Raises
    ------
    ValueError
        If there is no such kind.

    Example
    -------
    >>> make_alignment("logit", center=True).center
    True
    >>> make_alignment("rotation")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: The alignment can only be none, logit, ... or nessa_runtime, but got 'rotation'.
    """
    if kind not in ALIGNMENTS:
        raise ValueError(
            f"The alignment can only be {', '.join(ALIGNMENTS[:-1])} or {ALIGNMENTS[-1]}, but got {kind!r}."
        )
    return _kinds()[kind](**options)


def _kinds():
    # Here, because all kinds build on this module.
    from nessa_modules.linear_alignment import LeastSquaresAlignment, NoAlignment, ProcrustesAlignment
    from nessa_modules.logit_alignment import LogitAlignment
    from nessa_modules.nessa import Nessa, NessaRuntime, NessaStart

    closed_forms = (NoAlignment, LogitAlignment, ProcrustesAlignment, LeastSquaresAlignment, NessaStart)
    classes = (*closed_forms, Nessa, NessaRuntime)
    return {each.name: each for each in classes}


def load_alignment(folder):
    """Read an alignment that :meth:`Alignment.save` wrote. No code of the folder is run.

    Arguments
    ---------
    folder : str or Path
        That of the alignment, or of the run of ``train_alignment.py`` that made it.

    Returns
    -------
    Alignment
        With ``enroll_model_id``, ``runtime_model_id``, ``alignment_id`` and ``calibration``.

    Raises
    ------
    ValueError
        If there is none, or it is not as it was written.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> X = torch.randn(40, 8)
    >>> alignment = make_alignment("procrustes").fit(X, X.flip(1), [row // 2 for row in range(40)])
    >>> alignment.save(folder, "model of 2023", "model of 2024")
    >>> load_alignment(folder).alignment_id == alignment.alignment_id
    True
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION_FILE).exists() and (folder / ALIGNMENT_FOLDER / DESCRIPTION_FILE).exists():
        folder = folder / ALIGNMENT_FOLDER  # of a run
    path = folder / DESCRIPTION_FILE
    try:
        description = json.loads(read_text_file(path))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no alignment: {path.name} is missing.") from None
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no alignment's description: {error}.") from None
    alignment = _read_description(description, path)
    tensors_path = folder / _TENSORS_FILE.format(description["alignment_id"])
    tensors = {name: tensor.detach() for name, tensor in read_state(tensors_path).items()}
    _check_tensors(alignment, tensors, tensors_path)
    if alignment.alignment_id != description["alignment_id"]:
        raise ValueError(
            f"{folder} was changed since it was written: its content has the id {alignment.alignment_id}, but "
            f"{path.name} says {description['alignment_id']}."
        )
    return alignment


def _read_description(description, path):
    """The alignment that a description describes, without its tensors."""
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{path} can only be of format {_FORMAT}, but got {found!r}.")
    kind, settings = description.get("kind"), description.get("settings")
    if kind not in ALIGNMENTS:
        raise ValueError(f"{path} is of an unknown kind of alignment: {kind!r}.")
    identity = description.get("alignment_id")
    if not (isinstance(identity, str) and len(identity) == 16 and set(identity) <= set("0123456789abcdef")):
        raise ValueError(f"The alignment_id in {path} can only be 16 hexadecimal digits, but got {identity!r}.")
    alignment = make_alignment(kind)
    for name in ("enroll_size", "runtime_size", "size"):
        value = description.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1_000_000:
            raise ValueError(f"{name} in {path} can only be a number of dimensions, but got {value!r}.")
        setattr(alignment, name, value)
    for name in ("enroll_model_id", "runtime_model_id"):
        value = description.get(name)
        if not (isinstance(value, str) and value):
            raise ValueError(f"{name} in {path} can only be the id of a model, but got {value!r}.")
        setattr(alignment, name, value)
    if settings != alignment._settings():
        raise ValueError(f"{path} has settings that this version does not know: {settings!r}.")
    details = description.get("details")
    alignment.details = details if isinstance(details, dict) else {}
    alignment.calibration = _checked_calibration(description.get("calibration"), str(path))
    return alignment


def _checked_calibration(calibration, where):
    entries = calibration if isinstance(calibration, list) else [calibration]
    for entry in entries:
        is_entry = isinstance(entry, dict) and set(entry) == {"false_accept_rate", "threshold"}
        numbers = [v for v in entry.values() if type(v) in (int, float)] if is_entry else []
        # Beyond 1 only by what keeps even a perfect match out.
        if not (len(numbers) == 2 and 0 <= entry["false_accept_rate"] <= 1 and -1.1 <= entry["threshold"] <= 1.1):
            raise ValueError(f"{where} has a calibration that is no rate with its threshold: {entry!r}.")
    return entries


def _check_tensors(alignment, tensors, path):
    """Give an alignment its tensors, if they fit its description."""
    if not all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors.values()):
        raise ValueError(f"{path} can only hold tensors of float32 or float64.")
    alignment._tensors = tensors
    expected = alignment._expected_shapes()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        name = wrong[0]
        raise ValueError(
            f"{path} does not fit its description: {name} can only be {expected.get(name, 'missing')}, but got "
            f"{found.get(name, 'none')}."
        )
