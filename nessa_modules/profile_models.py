"""The models and the alignment that a store of voice profiles is used with: which belong together, and their space."""

import numpy as np


class ProfileModels:
    """The models that enroll and recognise, and the space in which they are compared.

    Arguments
    ---------
    path : Path
        The store, for messages.
    encoder, alignment
        As for :class:`nessa_modules.profiles.VoiceProfiles`.

    Raises
    ------
    ValueError
        If the encoders do not belong to the alignment or, without one, to each other.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> encoder = SimpleNamespace(model_id="v1", embedding_size=2, encode_recording=lambda recording: recording[0])
    >>> ProfileModels("voices.db", encoder, None).utterance((np.array([3.0, 4.0]), 16000)).tolist()
    [0.6000000238418579, 0.800000011920929]
    """

    def __init__(self, path, encoder, alignment):
        self._path, self._alignment = path, alignment
        self.enroller, self.recogniser = encoder if isinstance(encoder, tuple | list) else (encoder, encoder)
        if alignment is None:
            given = [model.model_id for model in self._given()]
            if len(set(given)) > 1:
                raise ValueError(
                    f"Embeddings of two models, {' and '.join(given)}, can only be compared through an alignment of "
                    "the two, but got none."
                )
            return
        if None in self.ids[:2]:
            raise ValueError("The alignment does not say which models it aligns: save it with their ids and load it.")
        for model in self._given():
            if model.model_id not in self.known_ids:
                raise ValueError(
                    f"The alignment is one of the models {' and '.join(self.known_ids)}, but the encoder is model "
                    f"{model.model_id}."
                )
        if self.enroller is not self.recogniser and self.recogniser.model_id != alignment.runtime_model_id:
            raise ValueError(
                f"The alignment's runtime model is {alignment.runtime_model_id}, but the encoder that is to recognise "
                f"is model {self.recogniser.model_id}."
            )

    def _given(self):
        return [model for model in (self.enroller, self.recogniser) if model is not None]

    @property
    def ids(self):
        """Of the enrollment model, the runtime model and the alignment of a store that these make."""
        if self._alignment is None:
            if self.enroller is None:
                raise ValueError(f"A new store needs an encoder or an alignment, but got none for {self._path}.")
            return self.enroller.model_id, self.enroller.model_id, None
        return self._alignment.enroll_model_id, self._alignment.runtime_model_id, self._alignment.alignment_id

    @property
    def known_ids(self):
        """The ids of the models whose embeddings can be compared."""
        return list(dict.fromkeys(self.ids[:2]))

    @property
    def calibration(self):
        """The thresholds of the alignment, as it gives them."""
        return getattr(self._alignment, "calibration", None) or []

    def check_store(self, store):
        """Refuse, with a ValueError, a :class:`Store` of another alignment or other models."""
        given = None if self._alignment is None else self._alignment.alignment_id
        if given != store.alignment_id:
            expected = f"model {store.runtime_model_id} without an alignment"
            if store.alignment_id is not None:
                models = f"{store.enroll_model_id} and {store.runtime_model_id}"
                expected = f"alignment {store.alignment_id} of models {models}"
            got = "none" if given is None else f"alignment {given}"
            raise ValueError(
                f"{self._path} is scored with {expected}, but got {got}: give what it expects, or migrate it."
            )
        expected = list(dict.fromkeys((store.enroll_model_id, store.runtime_model_id)))
        for model in self._given():
            if model.model_id not in expected:
                raise ValueError(
                    f"{self._path} is a store of model {' and '.join(expected)}, but the encoder is model "
                    f"{model.model_id}: load that model, or migrate the store with an alignment of the two."
                )

    def checked(self, embeddings):
        """Embeddings [K, D] or [D] of the enrolling model as float32 [K, D]; ValueError if they cannot be such."""
        return _checked(embeddings, self.enroller)

    def utterance(self, recording):
        """A recording, as the encoder takes it, in the space that is compared in: [Dz], of length 1."""
        embedding = _checked(self.recogniser.encode_recording(recording), self.recogniser)  # [1, D]
        if self._alignment is not None:
            embedding = self._mapped(self._alignment.runtime, embedding, self.recogniser.model_id)
        return normalised(embedding, "The embedding of the recording")[0]

    def profiles(self, embeddings, model_id):
        """Profiles [K, D] that a model made, in the space that is compared in: [K, Dz], of length 1."""
        if model_id not in self.known_ids:
            raise ValueError(f"{self._path} holds profiles of model {model_id}, which cannot be compared.")
        alignment = self._alignment
        if alignment is not None:
            side = alignment.enroll if model_id == alignment.enroll_model_id else alignment.runtime
            embeddings = self._mapped(side, embeddings, model_id)
        return normalised(embeddings, f"A profile of {self._path}")

    def _mapped(self, side, embeddings, model_id):
        try:
            return np.asarray(_array(side(embeddings)), np.float32)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"The alignment does not take embeddings of size {embeddings.shape[1]} of model {model_id}: {reason}"
            ) from error


def _array(values):
    """A NumPy array of an array or tensor."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def normalised(vectors, what):
    """Vectors [K, D] at length 1, float32; ValueError, which says what one of them is, if one has no direction.

    Example
    -------
    >>> normalised(np.array([[0.0, 2.0]]), "A profile of voices.db")
    array([[0., 1.]], dtype=float32)
    """
    norms = _norms(vectors)
    if not np.isfinite(norms).all() or not norms.all():
        raise ValueError(f"{what} is zero or not finite where it is compared: it has no direction.")
    return (vectors / norms).astype(np.float32, copy=False)


def _norms(vectors):
    """The lengths [K, 1] of vectors [K, D]; in float64, as the square of a finite float32 may be infinite or 0."""
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged ones
        return np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)


def _checked(embeddings, encoder):
    embeddings = np.atleast_2d(np.ascontiguousarray(_array(embeddings), np.float32))  # [K, D]
    if embeddings.ndim != 2 or not len(embeddings) or embeddings.shape[1] != encoder.embedding_size:
        raise ValueError(
            f"Embeddings of model {encoder.model_id} must have shape [K, {encoder.embedding_size}], but got "
            f"{list(embeddings.shape)}."
        )
    norms = _norms(embeddings)
    if not np.isfinite(norms).all() or not norms.all():
        raise ValueError(f"Model {encoder.model_id} gave an embedding that is zero or not finite.")
    return embeddings
