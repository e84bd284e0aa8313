"""A trained speaker-embedding model: its folder, read without running anything of it, and its embeddings."""

import ast
import copy
import hashlib
import io
import json
import math
import re
import stat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.ResNet import ResNet
from speechbrain.lobes.models.Xvector import Xvector
from speechbrain.nnet.pooling import StatisticsPooling
from speechbrain.processing.features import InputNormalization
from tqdm import tqdm

from nessa_modules.corpora import read_utterance
from shared_modules.devices import find_device
from shared_modules.files import write_whole
from shared_modules.model_files import (
    HPARAMS_FILE,
    PLAN_PREFIXES,
    Plan,
    build,
    cpu_state,
    fill,
    find_folder,
    planned_class,
    read_plan,
    read_state,
    read_text_file,
    tags,
    write_folder,
)
from shared_modules.recordings import Recording, Resampler

MODEL_FILE, CLASSIFIER_FILE = "embedding_model.ckpt", "classifier.ckpt"
LABEL_FILES = ("label_encoder.ckpt", "label_encoder.txt")  # text; SpeechBrain looks for the first unless told
MIN_SECONDS = 0.25  # less than that tells nothing of a voice
MAX_SAMPLE_RATE = 768_000  # Hz

_DEFAULT_RATE = 16000  # Hz, of published folders, which do not tell it
_WINDOW_SECONDS = 60.0  # longer recordings are embedded in pieces, so that memory does not grow with their length
_SILENT_PEAK = 1e-4  # of full scale: not more than the dither of a 16-bit file
_SILENT = "{} is silent: there is no voice in it."
_MAX_LABEL_BYTES = 2**21  # VoxCeleb's 7,205 speakers take about 150 kB
_ESCAPE = r"""\\(?:['"\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})"""  # as Python's repr has them
_LABEL_LINE = re.compile(rf"""('(?:[^'\\\n]|{_ESCAPE})*'|"(?:[^"\\\n]|{_ESCAPE})*") => (\d{{1,9}})""")

# What is built: by its place in the YAML, from the allowed paths to the classes.
_BUILT = {
    "compute_features": {"speechbrain.lobes.features.Fbank": Fbank},
    "mean_var_norm": {"speechbrain.processing.features.InputNormalization": InputNormalization},
    "embedding_model": {
        "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN": ECAPA_TDNN,
        "speechbrain.lobes.models.ResNet.ResNet": ResNet,
        "speechbrain.lobes.models.Xvector.Xvector": Xvector,
    },
}
_ACTIVATIONS = {
    f"!name:torch.nn.{name}": getattr(torch.nn, name) for name in ("ReLU", "LeakyReLU", "PReLU", "GELU", "SiLU")
}
_COSINE_CLASSIFIERS = (
    "!new:speechbrain.lobes.models.ECAPA_TDNN.Classifier",  # that of an exported folder
    "!new:speechbrain.lobes.models.ResNet.Classifier",  # the same under another name
)
# What a YAML may name: that, and what else published folders name, which is not built.
_NAMED = (
    *(f"!new:{path}" for classes in _BUILT.values() for path in classes),
    *_ACTIVATIONS,
    *_COSINE_CLASSIFIERS,
    "!new:speechbrain.lobes.models.Xvector.Classifier",
    "!new:speechbrain.dataio.encoder.CategoricalEncoder",
    "!new:speechbrain.dataio.preprocess.AudioNormalizer",
    "!new:speechbrain.utils.parameter_transfer.Pretrainer",
    "!new:torch.nn.Identity",
)
# The largest numbers of the wiring, so that nothing enormous is built before the weights are seen.
_LIMITS = {
    "n_mels": 512,
    "n_fft": 16384,
    "sample_rate": MAX_SAMPLE_RATE,
    "f_min": MAX_SAMPLE_RATE,
    "f_max": MAX_SAMPLE_RATE,
    "win_length": 500,  # ms
    "hop_length": 500,  # ms
    "left_frames": 50,
    "right_frames": 50,
    "tdnn_blocks": 64,
    "block_sizes": 64,
    "res2net_scale": 64,
    "kernel_sizes": 99,
    "tdnn_kernel_sizes": 99,
    "dilations": 99,
    "tdnn_dilations": 99,
}
_MAX_LAYERS = 64

_HEADER = """\
# A speaker-embedding model, exported for inference. It loads with nessa_modules.encoder.SpeakerEncoder and, without
# this project, with speechbrain.inference.EncoderClassifier and SpeakerRecognition.

"""
# The embeddings are compared as they are; SpeechBrain's SpeakerRecognition asks for the module all the same.
_FOOTER = """
mean_var_norm_emb: !new:speechbrain.processing.features.InputNormalization
  norm_type: global
  std_norm: false

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
  sample_rate: !ref <sample_rate>

modules:
  compute_features: !ref <compute_features>
  mean_var_norm: !ref <mean_var_norm>
  mean_var_norm_emb: !ref <mean_var_norm_emb>
  embedding_model: !ref <embedding_model>
  classifier: !ref <classifier>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
    embedding_model: !ref <embedding_model>
"""


class SpeakerEncoder:
    """A frozen speaker-embedding model, in eval mode.

    Use :meth:`from_hparams`; the constructor takes the parts.

    Arguments
    ---------
    wiring : dict
        The plans of ``compute_features``, ``mean_var_norm`` and ``embedding_model`` by name, as
        :func:`training_wiring` reads them.
    state : dict, optional
        The weights of the embedding model by name; None: random ones, from torch's generator.
    classifier_weight : torch.Tensor, optional
        ``[S, D]``: a direction for each of S training speakers.
    speakers : list of str, optional
        Their S names.
    device : str or torch.device
        Where it computes.
    where : str or Path
        What messages call the model.

    Attributes
    ----------
    sample_rate : int
        Hz.
    embedding_size : int
        D.
    model_id : str
        16 hexadecimal digits, a hash of the wiring and the weights: of what the embeddings depend on, and of nothing
        else.
    classifier_weight : torch.Tensor or None
        ``[S, D]``, rows of length 1: the cosine with row s is the model's score of training speaker s. None where the
        model was trained without such a classifier (a contrastive loss, or a classifier of several layers).
    speakers : list of str or None
        The S names, where they are known.
    device : torch.device

    Raises
    ------
    ValueError
        If the parts do not give a model that embeds, or the device does not exist.

    Example
    -------
    >>> wiring = {
    ...     "compute_features": Plan("!new:speechbrain.lobes.features.Fbank", {"sample_rate": 8000, "n_mels": 24}),
    ...     "mean_var_norm": Plan(
    ...         "!new:speechbrain.processing.features.InputNormalization", {"norm_type": "sentence", "std_norm": False}
    ...     ),
    ...     "embedding_model": Plan(
    ...         "!new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
    ...         {"input_size": 24, "channels": [8, 8, 8, 8, 16], "attention_channels": 8, "se_channels": 8,
    ...          "res2net_scale": 2, "lin_neurons": 12},
    ...     ),
    ... }
    >>> encoder = SpeakerEncoder(wiring)
    >>> encoder.sample_rate, encoder.embedding_size, encoder.encode_batch(torch.randn(2, 4000)).shape
    (8000, 12, torch.Size([2, 12]))
    """

    def __init__(self, wiring, state=None, classifier_weight=None, speakers=None, device="cpu", where="the model"):
        self.device = find_device(device)
        self.wiring = wiring
        self.sample_rate = _sample_rate(wiring, where)
        modules = _build_modules(wiring, where, "cpu" if state is None else "meta")
        if state is not None:
            state = {name: tensor.clone() for name, tensor in state.items()}  # the caller may go on training
            fill(modules["embedding_model"], state, f"The weights of {where} do not fit {HPARAMS_FILE}")
        _make_steady(modules["embedding_model"])
        self.mods = torch.nn.ModuleDict(modules).eval().requires_grad_(False)
        self.mods["embedding_model"].float()
        self.model_id = _hash(wiring, cpu_state(self.mods["embedding_model"]))
        self.mods.to(self.device)
        self.embedding_size = self._probe(where)
        if classifier_weight is not None:
            if classifier_weight.dim() != 2 or classifier_weight.shape[1] != self.embedding_size:
                raise ValueError(
                    f"The classifier of {where} can only be [S, {self.embedding_size}], but got shape "
                    f"{list(classifier_weight.shape)}."
                )
            classifier_weight = F.normalize(classifier_weight.detach().float().cpu(), dim=-1)  # (S, D)
        if speakers is not None and classifier_weight is not None and len(speakers) != len(classifier_weight):
            raise ValueError(
                f"The classifier of {where} has {len(classifier_weight)} speakers, but {len(speakers)} names."
            )
        self.classifier_weight = classifier_weight
        self.speakers = speakers

    @classmethod
    def from_hparams(cls, source, savedir=None, run_opts=None):
        """Load a model. No code of the folder is run.

        Arguments
        ---------
        source : str or Path
            A folder from :func:`export_encoder`, or the folder of a run that holds one; an ECAPA-TDNN, ResNet or
            x-vector in the form of SpeechBrain's ``EncoderClassifier``; or its name on the Hugging Face hub, such
            as ``speechbrain/spkrec-ecapa-voxceleb``, with ``@revision`` where one is to be pinned.
        savedir : str or Path, optional
            The hub's cache for this model; left out: the one of all programs. A local folder is read where it is.
        run_opts : dict, optional
            ``{"device": "cuda"}``; without it the CPU.

        Returns
        -------
        SpeakerEncoder

        Raises
        ------
        ValueError
            If the folder or a file is missing or cannot be downloaded, its YAML is not that of such a model or asks
            for anything else, or its weights do not fit.
        """
        folder = find_folder(source, [MODEL_FILE], [CLASSIFIER_FILE, *LABEL_FILES], savedir)
        path = folder / HPARAMS_FILE
        try:
            text = read_text_file(path)
        except FileNotFoundError:
            raise ValueError(f"The model folder {folder} holds no {HPARAMS_FILE}.") from None
        plan = read_plan(text, path)
        _check_named(text, path)
        absent = [name for name in _BUILT if name not in plan]
        if absent:  # such as those that take a mel spectrogram instead of audio
            raise ValueError(f"{path} holds no {absent[0]}: it is not in the form of SpeechBrain's EncoderClassifier.")
        wiring = {name: plan[name] for name in _BUILT}
        rate = _sample_rate(wiring, path)
        if plan.get("sample_rate", rate) != rate:
            raise ValueError(f"{path}: sample_rate is {plan['sample_rate']!r}, but its features are of {rate} Hz.")
        _build_modules(wiring, path, "meta")  # a wiring that cannot be is told before the weights are read
        state = read_state(folder / MODEL_FILE)
        weight, speakers = _read_classifier(plan.get("classifier"), folder), _read_speakers(folder)
        if weight is not None and speakers is not None and len(speakers) != len(weight):
            speakers = None  # a list of something else: the embeddings do not need it
        return cls(wiring, state, weight, speakers, (run_opts or {}).get("device") or "cpu", folder)

    def encode_batch(self, wavs, wav_lens=None):
        """Embeddings of a batch at the model's sample rate.

        An item of a padded batch gives what it gives alone, up to rounding: what has one length is computed together,
        since SpeechBrain's convolutions would see the padding.

        Arguments
        ---------
        wavs : torch.Tensor
            Floating point, ``[B, T]`` (or ``[T]``: one item), on any device.
        wav_lens : torch.Tensor, optional
            Each item's share of T, ``[B]``, above 0 up to 1, as in SpeechBrain.

        Returns
        -------
        torch.Tensor
            float32 ``[B, D]``, on the model's device, not length-normalised. It takes no part in gradients, but can
            be computed with.

        Raises
        ------
        ValueError
            If the batch is of another shape, empty, not finite or too short.
        """
        if not isinstance(wavs, torch.Tensor) or not wavs.is_floating_point() or wavs.dim() not in (1, 2):
            got = f"{wavs.dtype} {list(wavs.shape)}" if isinstance(wavs, torch.Tensor) else type(wavs).__name__
            raise ValueError(f"wavs can only be a floating-point tensor [B, T], but got {got}.")
        wavs = wavs[None] if wavs.dim() == 1 else wavs  # (B, T)
        if wavs.numel() == 0:
            raise ValueError(f"wavs must not be empty, but got shape {list(wavs.shape)}.")
        lengths = torch.full((len(wavs),), wavs.shape[1])
        if wav_lens is not None:
            shares = torch.as_tensor(wav_lens, dtype=torch.float64).cpu()
            if shares.shape != wavs.shape[:1] or not bool(((shares > 0) & (shares <= 1)).all()):
                raise ValueError(
                    f"wav_lens can only be [{len(wavs)}] shares above 0 up to 1, but got {shares.tolist()}."
                )
            lengths = (shares * wavs.shape[1]).round().long()  # (B,) samples
        least = math.ceil(MIN_SECONDS * self.sample_rate)
        if int(lengths.min()) < least:
            raise ValueError(
                f"A voice needs at least {MIN_SECONDS} s ({least} samples at {self.sample_rate} Hz), but got "
                f"{int(lengths.min())} samples."
            )
        embeddings = torch.empty(len(wavs), self.embedding_size, device=self.device)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            names = [f"Item {row} of the batch" for row in rows.tolist()]
            embeddings[rows.to(self.device)] = self._encode(wavs[rows.to(wavs.device), :length], names)
        return embeddings

    def encode_recording(self, recording, name=None):
        """The embedding of a recording of any format, sample rate and number of channels.

        One of more than a minute is embedded in equal pieces of up to a minute; the embeddings of those that are not
        silent are averaged.

        Arguments
        ---------
        recording : str, Path, bytes, binary file object, or tuple
            A file, its content, or the samples ``[T]`` or ``[T, channels]`` (numpy or torch; integers are of full
            scale) and their rate in Hz.
        name : str, optional
            What messages call it; else its path, or "the recording".

        Returns
        -------
        torch.Tensor
            float32 ``[D]``, on the model's device, not length-normalised.

        Raises
        ------
        ValueError
            If it is missing, no audio, silent, too short or not finite: its name, and the fault.
        """
        name = name or (str(recording) if isinstance(recording, str | Path) else "the recording")
        return self._encode_pieces(self._read(recording, name)[None], [name])[0]

    def encode_utterances(self, utterances, progressbar=True, batch_seconds=60.0):
        """The embeddings of many utterances.

        Arguments
        ---------
        utterances : list of nessa_modules.corpora.Utterance
            K of them.
        progressbar : bool
            Whether to show one.
        batch_seconds : float
            How much audio is computed at a time, of utterances of one length.

        Returns
        -------
        torch.Tensor
            float32 ``[K, D]``, on the CPU, in the order of the utterances, not length-normalised.

        Raises
        ------
        ValueError
            If a recording cannot be read, is silent, too short or not finite.
        """
        embeddings = torch.empty(len(utterances), self.embedding_size)
        order = sorted(range(len(utterances)), key=lambda k: utterances[k].duration_s)
        waiting = []  # (row, name, samples) of one length
        with tqdm(total=len(utterances), desc="embeddings", disable=not progressbar, delay=1, leave=False) as bar:

            def encode_waiting():
                rows, names, signals = zip(*waiting, strict=True)
                embeddings[list(rows)] = self._encode_pieces(np.stack(signals), names).cpu()
                bar.update(len(rows))
                waiting.clear()

            for row in order:
                name = f"{utterances[row].path} ({utterances[row].id})"
                samples = self._checked(read_utterance(utterances[row], self.sample_rate), name)
                is_full = (len(waiting) + 1) * len(samples) > batch_seconds * self.sample_rate
                if waiting and (is_full or len(waiting[0][2]) != len(samples)):
                    encode_waiting()
                waiting.append((row, name, samples))
            if waiting:
                encode_waiting()
        return embeddings

    def _encode(self, wavs, names):
        """Embeddings ``[B, D]`` of items ``[B, T]`` of equal length, which messages call by their names."""
        with torch.inference_mode():
            shares = torch.ones(len(wavs), device=self.device)
            features = self.mods["compute_features"](wavs.to(self.device, torch.float32))  # (B, frames, mels)
            features = self.mods["mean_var_norm"](features, shares)
            embeddings = self.mods["embedding_model"](features).flatten(1)  # (B, D), also of (B, 1, D)
        for name, is_finite in zip(names, embeddings.isfinite().all(-1).tolist(), strict=True):
            if not is_finite:
                raise ValueError(f"{name} gives no finite embedding: its samples are not finite, or far too large.")
        return embeddings.clone()  # those of inference mode could not be learned from

    def _encode_pieces(self, signals, names):
        """Embeddings ``[B, D]`` of checked signals ``[B, T]`` of equal length, however long."""
        num_pieces = math.ceil(signals.shape[1] / (_WINDOW_SECONDS * self.sample_rate))
        length = signals.shape[1] // num_pieces
        pieces = signals[:, : length * num_pieces].reshape(len(signals), num_pieces, length)  # (B, pieces, length)
        has_voice = ~self._is_silent(pieces)  # (B, pieces)
        total = torch.zeros(len(signals), self.embedding_size, device=self.device)  # (B, D)
        for number in range(num_pieces):
            rows = np.flatnonzero(has_voice[:, number])
            if len(rows):
                total[rows] += self._encode(torch.from_numpy(pieces[rows, number]), [names[row] for row in rows])
        counts = has_voice.sum(1, keepdims=True)  # (B, 1)
        for row in np.flatnonzero(counts == 0):  # what changes so slowly that no piece shows it
            raise ValueError(_SILENT.format(names[row]))
        return total / torch.from_numpy(counts).to(self.device)

    def _read(self, recording, name):
        """The samples ``[T]`` of a recording at the model's rate, as one channel."""
        if not isinstance(recording, tuple):
            with Recording(recording, name) as opened:
                return self._checked(np.concatenate(list(opened.blocks(self.sample_rate))), name)
        try:
            samples, rate = recording
            if isinstance(samples, torch.Tensor):
                samples = samples.detach().cpu()
                samples = samples.float() if samples.is_floating_point() else samples  # numpy knows no bfloat16
            samples = np.asarray(samples)
        except (TypeError, ValueError):
            raise ValueError(f"{name} can only be given as (samples, sample rate).") from None
        if samples.dtype.kind in "iu":  # those without a sign have their silence in the middle
            least, most = np.iinfo(samples.dtype).min, np.iinfo(samples.dtype).max
            full_scale = (most - least + 1) / 2
            samples = (samples - (least + full_scale)) / full_scale
        elif samples.dtype.kind != "f":
            raise ValueError(f"{name} can only hold integer or floating-point samples, but got {samples.dtype}.")
        samples = samples.astype(np.float32)
        if samples.ndim not in (1, 2) or samples.size == 0:
            raise ValueError(f"{name} can only be samples [T] or [T, channels], but got shape {list(samples.shape)}.")
        if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not 100 <= rate <= MAX_SAMPLE_RATE:
            raise ValueError(f"{name}: its sample rate can only be 100 to {MAX_SAMPLE_RATE} Hz, but got {rate!r}.")
        if not np.isfinite(samples).all():
            raise ValueError(f"{name} holds samples that are NaN or infinite.")
        samples = samples if samples.ndim == 1 else samples.mean(1, dtype=np.float32)  # (T,)
        resampler = Resampler(int(rate), self.sample_rate)
        return self._checked(np.concatenate([resampler.push(samples), resampler.finish()]), name)

    def _checked(self, samples, name):
        """The samples, unless no voice can be in them."""
        seconds = len(samples) / self.sample_rate
        if seconds < MIN_SECONDS:
            raise ValueError(f"{name} is too short: a voice needs at least {MIN_SECONDS} s, but got {seconds:.3f} s.")
        if self._is_silent(samples):
            raise ValueError(_SILENT.format(name))
        return samples

    def _is_silent(self, samples):
        """Whether samples ``[.., T]`` are nearly constant: ``[..]``."""
        edge = self.sample_rate // 50  # where resampling lets the step of a constant signal ring
        return np.ptp(samples[..., edge:-edge], axis=-1) < 2 * _SILENT_PEAK

    def _probe(self, where):
        """The embedding's size; refuses a model whose parts do not fit each other."""
        signal = torch.arange(self.sample_rate // 2).remainder(37)[None] / 37 - 0.5  # (1, T), any will do
        try:
            return self._encode(signal, ["a signal"]).shape[1]
        except Exception as error:  # the parts may be anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{where} does not embed: {reason}") from None


def training_wiring(hparams_file, overrides=""):
    """The plans of the modules that embeddings depend on, from a YAML that was trained with.

    Arguments
    ---------
    hparams_file : str or Path
        It is read as text: nothing of it is run.
    overrides : str
        As HyperPyYAML takes them.

    Returns
    -------
    dict
        ``compute_features``, ``mean_var_norm`` and ``embedding_model``: a :class:`shared_modules.model_files.Plan`
        each.

    Raises
    ------
    ValueError
        If the YAML cannot be read or holds no such model.
    """
    try:
        text = Path(hparams_file).read_text(encoding="utf-8")
        tree = YAML().load(resolve_references(text, overrides or None))
        stream = io.StringIO()
        YAML().dump({name: tree[name] for name in _BUILT}, stream)
    except KeyError as error:
        raise ValueError(f"{hparams_file} holds no {error.args[0]}.") from None
    except Exception as error:  # a YAML can be wrong in any way
        raise ValueError(f"{hparams_file} cannot be read: {error}.") from None
    return read_plan(stream.getvalue(), hparams_file)


def export_encoder(folder, wiring, embedding_model, classifier_weight=None, speakers=None):
    """Write a model as a folder of SpeechBrain's published form. The folder appears whole or not at all.

    Arguments
    ---------
    folder : str or Path
        Where the folder shall be. One that was exported earlier to the same place is replaced.
    wiring : dict
        From :func:`training_wiring`.
    embedding_model : torch.nn.Module
        The trained one, as the wiring builds it.
    classifier_weight : torch.Tensor, optional
        ``[S, D]``, of a cosine classifier (additive-margin softmax).
    speakers : list of str, optional
        The names of the S training speakers; given with the weight.

    Returns
    -------
    Path
        The folder: ``hyperparams.yaml``, ``embedding_model.ckpt``, and with a classifier ``classifier.ckpt`` and
        ``label_encoder.ckpt`` (text, as SpeechBrain's ``CategoricalEncoder`` writes it).

    Raises
    ------
    ValueError
        If the parts do not make a model that embeds as the trained one does, or the place holds anything else.
    """
    state = cpu_state(embedding_model)
    encoder = SpeakerEncoder(wiring, state, classifier_weight, speakers, where="the trained model")
    trained = copy.deepcopy(embedding_model).cpu().eval()
    _make_steady(trained)
    again = copy.copy(encoder)
    again.mods = {**encoder.mods, "embedding_model": trained}
    signal = torch.randn(1, encoder.sample_rate, generator=torch.Generator().manual_seed(0))
    expected, got = (each._encode(signal, ["the trained model"]) for each in (encoder, again))
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())):
        raise ValueError("The YAML and its options do not fit the trained model: its embeddings differ.")
    text = _write_yaml(encoder, None if classifier_weight is None else len(classifier_weight))
    _check_named(text, HPARAMS_FILE)

    def write(beside):
        with write_whole(beside / HPARAMS_FILE) as stream:
            stream.write(text)
        with write_whole(beside / MODEL_FILE, "wb") as stream:
            torch.save(state, stream)
        if classifier_weight is None:
            return
        with write_whole(beside / CLASSIFIER_FILE, "wb") as stream:
            torch.save({"weight": classifier_weight.detach().float().cpu().clone()}, stream)
        with write_whole(beside / LABEL_FILES[0]) as stream:
            names = speakers or [str(index) for index in range(len(classifier_weight))]
            stream.write("".join(f"{name!r} => {index}\n" for index, name in enumerate(names)))
            stream.write("================\n'starting_index' => 0\n")

    return write_folder(folder, write, is_model_file)


def is_model_file(name):
    """Whether a file of this name belongs to an exported folder.

    Example
    -------
    >>> is_model_file("embedding_model.ckpt"), is_model_file("notes.txt")
    (True, False)
    """
    return name in (HPARAMS_FILE, MODEL_FILE, CLASSIFIER_FILE, *LABEL_FILES, "README.md")


class _SteadyPooling(StatisticsPooling):
    """SpeechBrain's pooling adds a little noise to the mean, also in eval mode; this adds the noise's middle."""

    def _get_gauss_noise(self, shape_of_tensor, device="cpu"):
        return torch.full(shape_of_tensor, 5 * self.eps, device=device)


def _make_steady(embedding_model):
    """Let an x-vector give the same embedding each time."""
    if isinstance(embedding_model, Xvector):
        for index, layer in enumerate(embedding_model.blocks):
            if isinstance(layer, StatisticsPooling):
                embedding_model.blocks[index] = _SteadyPooling(layer.return_mean, layer.return_std)


def _build_modules(wiring, where, device):
    """The three modules of a wiring; the embedding model on a device, in eval mode."""
    modules = {}
    for name, classes in _BUILT.items():
        place, plan = f"{where}: {name}", wiring.get(name)
        planned_class(plan, classes, place)
        replaced = {}
        for argument, value in plan.arguments.items():
            if isinstance(value, dict) or (isinstance(value, list) and len(value) > _MAX_LAYERS):
                raise ValueError(f"{place}.{argument} can only have up to {_MAX_LAYERS} values, but got {value!r:.80}.")
            if argument == "activation":
                if not isinstance(value, Plan) or value.tag not in _ACTIVATIONS or value.arguments:
                    expected, tag = f"{', '.join(_ACTIVATIONS)} without arguments", getattr(value, "tag", value)
                    raise ValueError(f"{place}.activation can only be one of {expected}, but got {tag!r:.80}.")
                replaced[argument] = _ACTIVATIONS[value.tag]
        place_of_weights = device if name == "embedding_model" else "cpu"
        modules[name] = build(plan, classes, place, _LIMITS, place_of_weights, **replaced).eval()
    if modules["compute_features"].requires_grad:
        raise ValueError(f"{where}: compute_features can only have fixed filters, but got requires_grad: True.")
    norm_type = modules["mean_var_norm"].norm_type
    if norm_type != "sentence":
        raise ValueError(f"{where}: mean_var_norm can only have norm_type sentence, but got {norm_type!r}.")
    return modules


def _sample_rate(wiring, where):
    plan = wiring.get("compute_features")
    arguments = (plan.arguments or {}) if isinstance(plan, Plan) else {}
    rate = arguments.get("sample_rate", _DEFAULT_RATE)
    if type(rate) is not int or not 1000 <= rate <= MAX_SAMPLE_RATE:
        raise ValueError(
            f"{where}: sample_rate can only be a whole number of 1000 to {MAX_SAMPLE_RATE} Hz, but got {rate!r}."
        )
    return rate


def _check_named(text, where):
    """Refuse a YAML that names anything but the parts of such a model, even where nothing needs it."""
    for tag in tags(YAML().compose(text)):
        if tag.startswith(PLAN_PREFIXES) and tag not in _NAMED:
            raise ValueError(f"{where} asks for {tag}, which is no part of a speaker-embedding model.")


def _read_classifier(plan, folder):
    """The weight ``[S, D]`` of a cosine classifier; None for none, or another kind."""
    path = folder / CLASSIFIER_FILE
    is_cosine = isinstance(plan, Plan) and plan.tag in _COSINE_CLASSIFIERS
    if not is_cosine or not path.exists() or (plan.arguments or {}).get("lin_blocks", 0) != 0:
        return None
    state = read_state(path)
    if list(state) != ["weight"] or state["weight"].dim() != 2:
        raise ValueError(f"{path} can only hold a weight [speakers, size], but got {', '.join(state)}.")
    return state["weight"]


def _read_speakers(folder):
    """The names of the training speakers, in order; None where there is no list of them, or not one of that form.

    The file is text of SpeechBrain's ``CategoricalEncoder``: a Python string and a number from 0 on, on each line.
    The embeddings do not need it: whatever else it is, the model is not refused for it.
    """
    path = next((folder / name for name in LABEL_FILES if (folder / name).exists()), None)
    if path is None or not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > _MAX_LABEL_BYTES:
        return None
    names = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.startswith("====") or not line:
                break
            found = _LABEL_LINE.fullmatch(line)
            if found is None:
                return None
            names[int(found[2])] = ast.literal_eval(found[1])  # one string in quotes: its escapes are undone
    except (OSError, SyntaxError, ValueError):  # unreadable, no text, or a text that no string can hold
        return None
    return [names[index] for index in range(len(names))] if sorted(names) == list(range(len(names))) else None


def _hash(wiring, state):
    """16 hexadecimal digits of the wiring and the weights."""

    def plain(value):
        return {"class": value.tag, "arguments": value.arguments} if isinstance(value, Plan) else str(value)

    digest = hashlib.sha256(json.dumps(wiring, sort_keys=True, default=plain).encode())
    for name in sorted(state):
        tensor = state[name].contiguous()
        if tensor.is_floating_point():  # batch norm also counts its batches, which changes no embedding
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_yaml(encoder, num_speakers):
    """The YAML of an exported folder."""
    plans = {name: encoder.wiring[name] for name in _BUILT}
    if num_speakers is None:  # a contrastive loss has none, but SpeechBrain asks for one
        plans["classifier"] = Plan("!new:torch.nn.Identity", {})
    else:
        sizes = {"input_size": encoder.embedding_size, "out_neurons": num_speakers}
        plans["classifier"] = Plan(_COSINE_CLASSIFIERS[0], sizes)
        plans["label_encoder"] = Plan("!new:speechbrain.dataio.encoder.CategoricalEncoder", {})
    parts = [_HEADER, f"sample_rate: {encoder.sample_rate}\n"]
    for name, plan in plans.items():
        parts.append(f"\n{name}: {plan.tag}\n")
        for argument, value in plan.arguments.items():
            is_plan = isinstance(value, Plan)
            text = value.tag if is_plan else yaml.safe_dump(value, default_flow_style=True, width=10**6)
            parts.append(f"  {argument}: {text.strip().removesuffix('...').strip()}\n")
    parts.append(_FOOTER)
    if num_speakers is not None:
        parts.append("    classifier: !ref <classifier>\n    label_encoder: !ref <label_encoder>\n")
    return "".join(parts)
