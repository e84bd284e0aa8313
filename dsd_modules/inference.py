"""Trained separators: export them, start from their weights, and separate recordings with them."""

import glob
import math
import os
import shutil
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.signal
import soundfile
import torch
import yaml
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from speechbrain.lobes.models.dual_path import Decoder, Encoder, SBTransformerBlock

from dsd_modules.files import write_whole
from dsd_modules.masknet import DualPathMaskNet
from dsd_modules.options import MODEL_OPTIONS
from dsd_modules.separator import separate

# What a folder's YAML may name, and what is built for it. Nothing else is ever imported or called.
_CLASSES = {
    "encoder": {"speechbrain.lobes.models.dual_path.Encoder": Encoder},
    "masknet": {
        "dsd_modules.masknet.DualPathMaskNet": DualPathMaskNet,
        "speechbrain.lobes.models.dual_path.Dual_Path_Model": DualPathMaskNet,  # the same parameters
    },
    "decoder": {"speechbrain.lobes.models.dual_path.Decoder": Decoder},
}
_TRANSFORMERS = {"speechbrain.lobes.models.dual_path.SBTransformerBlock": SBTransformerBlock}
_MODULES = tuple(_CLASSES)
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp")
}
_HEARD_RMS = 0.05  # about that of LibriMix's mixtures
_HPARAMS_FILE = "hyperparams.yaml"
_FILES = {_HPARAMS_FILE, *(f"{name}.ckpt" for name in _MODULES)}

_HPARAMS = """\
# SepFormer (https://arxiv.org/abs/2010.13154), exported for inference. It loads with
# dsd_modules.inference.SepformerDSDSeparation and with speechbrain.inference.SepformerSeparation.

num_spks: {num_spks} # speakers
sample_rate: {sample_rate} # Hz
num_filters: {num_filters} # of encoder and decoder
kernel_size: {kernel_size} # of encoder and decoder, samples
kernel_stride: !ref <kernel_size> // 2
chunk_size: {chunk_size} # K, frames
num_blocks: {num_blocks} # dual-path blocks
num_intra_layers: {num_intra_layers} # transformer layers within chunks, per block
num_inter_layers: {num_inter_layers} # transformer layers across chunks, per block
num_heads: {num_heads} # of attention
d_ffn: {d_ffn} # width of the feed-forward layers

encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: !ref <kernel_size>
    out_channels: !ref <num_filters>

intra_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: !ref <num_intra_layers>
    d_model: !ref <num_filters>
    nhead: !ref <num_heads>
    d_ffn: !ref <d_ffn>
    dropout: 0
    use_positional_encoding: True
    norm_before: True

inter_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: !ref <num_inter_layers>
    d_model: !ref <num_filters>
    nhead: !ref <num_heads>
    d_ffn: !ref <d_ffn>
    dropout: 0
    use_positional_encoding: True
    norm_before: True

masknet: !new:dsd_modules.masknet.DualPathMaskNet
    num_spks: !ref <num_spks>
    in_channels: !ref <num_filters>
    out_channels: !ref <num_filters>
    num_layers: !ref <num_blocks>
    K: !ref <chunk_size>
    intra_model: !ref <intra_model>
    inter_model: !ref <inter_model>
    norm: ln
    linear_layer_after_inter_intra: False
    skip_around_intra: True

decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: !ref <num_filters>
    out_channels: 1
    kernel_size: !ref <kernel_size>
    stride: !ref <kernel_stride>
    bias: False

modules:
    encoder: !ref <encoder>
    masknet: !ref <masknet>
    decoder: !ref <decoder>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        encoder: !ref <encoder>
        masknet: !ref <masknet>
        decoder: !ref <decoder>
"""


def export_model(folder, options, modules):
    """Write a trained model as a folder of SpeechBrain's published form: what inference needs, and no more.

    The folder appears whole or not at all. One that was exported earlier to the same place stays until the
    new one is complete, and is then replaced.

    Arguments
    ---------
    folder : str or Path
        Where the folder shall be.
    options : dict
        At least those of :data:`dsd_modules.options.MODEL_OPTIONS`, whole numbers, as in the recipe's YAML.
    modules : dict
        ``encoder``, ``masknet`` and ``decoder`` as the recipe's YAML builds them, on any device.

    Returns
    -------
    Path
        The folder: ``hyperparams.yaml``, ``encoder.ckpt``, ``masknet.ckpt`` and ``decoder.ckpt``.

    Raises
    ------
    ValueError
        If an option is missing or does not fit the modules, or the folder holds anything else.

    Example
    -------
    >>> import tempfile
    >>> options = {"num_spks": 2, "sample_rate": 8000, "num_filters": 8, "kernel_size": 4, "chunk_size": 10}
    >>> options |= {"num_blocks": 2, "num_intra_layers": 1, "num_inter_layers": 1, "num_heads": 2, "d_ffn": 16}
    >>> intra, inter = (SBTransformerBlock(1, 8, 2, 16, use_positional_encoding=True) for _ in range(2))
    >>> masknet = DualPathMaskNet(8, 8, intra, inter, 2, K=10, linear_layer_after_inter_intra=False)
    >>> modules = {"encoder": Encoder(4, 8), "masknet": masknet, "decoder": Decoder(8, 1, 4, stride=2, bias=False)}
    >>> folder = export_model(tempfile.mkdtemp() + "/exported", options, modules)
    >>> sorted(path.name for path in folder.iterdir())
    ['decoder.ckpt', 'encoder.ckpt', 'hyperparams.yaml', 'masknet.ckpt']
    >>> separator = SepformerDSDSeparation.from_hparams(source=folder)
    >>> separator.separate_batch(torch.randn(3, 100)).shape
    torch.Size([3, 100, 2])
    """
    for name in MODEL_OPTIONS:
        if type(options.get(name)) is not int:
            raise ValueError(f"The option {name} must be a whole number, but got {options.get(name)!r}.")
    target = Path(folder).resolve()
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"A model is exported to a folder, but {folder} is a file.")
        strangers = sorted(path.name for path in target.iterdir() if path.name not in _FILES)
        if strangers:  # replacing the folder would delete them
            raise ValueError(
                f"{folder} holds {strangers[0]!r}, which is no part of an exported model; give another place."
            )

    hparams = _HPARAMS.format(**options)
    states = {name: _cpu_state(modules[name]) for name in _MODULES}
    for name, module in _build_modules(_read_plan(hparams, "the exported YAML"), "the exported YAML").items():
        _check_state(states[name], module, f"The options do not fit modules[{name!r}]")

    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_siblings(target, "tmp")
    beside, aside = (target.with_name(f".{target.name}.{os.getpid()}.{ending}") for ending in ("tmp", "old"))
    try:
        beside.mkdir()
        with write_whole(beside / _HPARAMS_FILE) as stream:
            stream.write(hparams)
        for name, state in states.items():
            with write_whole(beside / f"{name}.ckpt", "wb") as stream:
                torch.save(state, stream)
        _sync_folder(beside)
        if target.exists():
            _remove_siblings(target, "old")
            os.rename(target, aside)
        os.rename(beside, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync_folder(target.parent)
    _remove_siblings(target, "old")
    return Path(folder)


def load_weights(folder, modules):
    """Start from the weights of a trained model: fine-tuning. All modules are loaded, or none is changed.

    Arguments
    ---------
    folder : str or Path
        From :func:`export_model`, or of SpeechBrain's published form: ``encoder.ckpt``, ``masknet.ckpt`` and
        ``decoder.ckpt``.
    modules : dict
        ``encoder``, ``masknet`` and ``decoder``, on any device. Their weights are replaced.

    Raises
    ------
    ValueError
        If the folder or a file is missing, a file is no checkpoint, or it does not fit its module: which key
        differs, and how.

    Example
    -------
    >>> load_weights("no/such/folder", {})
    Traceback (most recent call last):
    ValueError: The model folder no/such/folder was not found; expected a local folder with encoder.ckpt, ...
    """
    folder = _find_folder(folder)
    states = {name: _read_state(folder / f"{name}.ckpt") for name in _MODULES}
    for name, state in states.items():
        _check_state(state, modules[name], f"{folder / f'{name}.ckpt'} does not fit the model")
    try:
        heads = _num_heads(_read_modules(folder)[0]["masknet"])  # which no weight shows
    except (FileNotFoundError, ValueError):
        heads = None  # weights that came without a YAML of this form
    if heads not in (None, _num_heads(modules["masknet"])):
        raise ValueError(
            f"{folder / _HPARAMS_FILE} does not fit the model: its attention layers have {heads} heads, "
            f"but expected {_num_heads(modules['masknet'])}."
        )
    for name, state in states.items():
        modules[name].load_state_dict(state)


class SepformerDSDSeparation:
    """A trained separator, ready to separate batches and recordings.

    Use :meth:`from_hparams`. The model is in eval mode, and keeps no gradients.

    Arguments
    ---------
    modules : dict
        ``encoder``, ``masknet`` (:class:`dsd_modules.masknet.DualPathMaskNet`) and ``decoder``.
    sample_rate : int
        Of the recordings it was trained with, Hz.
    device : str or torch.device
        Where it computes.

    Attributes
    ----------
    num_spks : int
        Number of speakers that it separates.
    num_blocks : int
        Number of dual-path blocks.

    Raises
    ------
    ValueError
        If the device does not exist.

    Example
    -------
    >>> intra, inter = (SBTransformerBlock(1, 8, 2, d_ffn=16) for _ in range(2))
    >>> masknet = DualPathMaskNet(8, 8, intra, inter, num_layers=2, K=10, num_spks=3)
    >>> modules = {"encoder": Encoder(16, 8), "masknet": masknet, "decoder": Decoder(8, 1, 16, stride=8, bias=False)}
    >>> separator = SepformerDSDSeparation(modules, sample_rate=8000)
    >>> separator.num_spks, separator.sample_rate, separator.num_blocks
    (3, 8000, 2)
    >>> separator.separate_batch(torch.randn(2, 1000), lengths=[1000, 7]).shape
    torch.Size([2, 1000, 3])
    """

    def __init__(self, modules, sample_rate, device="cpu"):
        try:
            self.device = torch.empty(0, device=device).device
        except (AssertionError, RuntimeError) as error:  # torch raises either
            raise ValueError(f"device can only be one of this machine, but got {device!r}: {error}") from None
        self.mods = torch.nn.ModuleDict(modules).to(self.device).eval().requires_grad_(False)
        self.sample_rate = sample_rate
        self.num_spks = self.mods["masknet"].num_spks
        self.num_blocks = self.mods["masknet"].num_layers

    @classmethod
    def from_hparams(cls, source, savedir=None, run_opts=None):
        """Load an exported model. No file is created, and no code of the folder is run.

        Arguments
        ---------
        source : str or Path
            A local folder from :func:`export_model`, or a SepFormer in SpeechBrain's published form.
        savedir : str, optional
            Not used: SpeechBrain's calls name it.
        run_opts : dict, optional
            ``{"device": "cuda"}``; without it the CPU.

        Returns
        -------
        SepformerDSDSeparation

        Raises
        ------
        ValueError
            If the folder or a file is missing, its YAML is not that of a SepFormer or asks for anything to
            be run, or its weights do not fit.
        """
        folder = _find_folder(source)
        try:
            modules, sample_rate = _read_modules(folder)
        except FileNotFoundError:
            raise ValueError(f"The model folder {folder} holds no {_HPARAMS_FILE}.") from None
        for name, module in modules.items():
            path = folder / f"{name}.ckpt"
            state = _read_state(path)
            _check_state(state, module, f"{path} does not fit {_HPARAMS_FILE}")
            module.load_state_dict(state, assign=True)  # the module was built without memory
        device = (run_opts or {}).get("device") or "cpu"
        return cls({name: module.float() for name, module in modules.items()}, sample_rate, device)

    @torch.no_grad()
    def separate_batch(self, mix, lengths=None):
        """Separate a batch of mixtures at the model's sample rate.

        An item of a padded batch gives what it gives alone. The estimates have the scale that the network
        gives them, which training leaves open; samples after the last whole frame are zero.

        Arguments
        ---------
        mix : torch.Tensor
            Mixtures [B, T], floating point, on any device.
        lengths : torch.Tensor or list of int, optional
            Number of samples of each item, [B]. What lies beyond does not matter.

        Returns
        -------
        torch.Tensor
            Estimates [B, T, N] for N speakers, float32, on the model's device; zero beyond the lengths.

        Raises
        ------
        ValueError
            If the mixtures are not [B, T], empty or not finite, or the lengths do not fit them.
        """
        if not isinstance(mix, torch.Tensor) or mix.dim() != 2 or not mix.is_floating_point():
            got = f"{mix.dtype} {list(mix.shape)}" if isinstance(mix, torch.Tensor) else type(mix)
            raise ValueError(f"mix must be a floating-point tensor of shape [B, T], but got {got}.")
        if mix.numel() == 0:
            raise ValueError(f"mix must not be empty, but got shape {list(mix.shape)}.")
        num_samples = mix.shape[1]
        mix = mix.to(self.device, torch.float32)  # [B, T]
        if lengths is not None:
            lengths = torch.as_tensor(lengths).cpu()  # [B]
            if lengths.shape != mix.shape[:1] or lengths.is_floating_point():
                got = f"{lengths.dtype} {list(lengths.shape)}"
                raise ValueError(f"lengths must be whole numbers of samples of shape [{len(mix)}], but got {got}.")
            if lengths.min() < 1 or lengths.max() > num_samples:
                raise ValueError(f"lengths must lie in [1, {num_samples}] samples, but got {lengths.tolist()}.")
            is_padding = torch.arange(num_samples) >= lengths[:, None]  # [B, T]
            is_padding = is_padding.to(self.device)
            mix = mix.masked_fill(is_padding, 0)
        if not mix.isfinite().all():
            raise ValueError("mix must be finite, but it holds NaN or infinite samples.")

        kernel = self.mods["encoder"].conv1d.kernel_size[0]
        mix = torch.nn.functional.pad(mix, (0, max(0, kernel - num_samples)))  # [B, max(T, kernel)]
        whole = None if lengths is None else lengths.clamp(min=kernel)
        estimates = separate(self.mods["encoder"], self.mods["masknet"], self.mods["decoder"], mix, whole)
        estimates = estimates[:, :, :num_samples]  # [B, N, T]
        if lengths is not None:
            estimates = estimates.masked_fill(is_padding[:, None], 0)
        return estimates.transpose(1, 2)  # [B, T, N]

    def separate_file(self, path):
        """Separate a recording.

        Channels are averaged, and another sample rate is converted. Each voice is scaled by one gain, so that
        the voices add up to the recording as well as they can: their relative levels are kept. All voices are
        turned down together where the loudest sample would exceed 1. Silence gives silence; the level of the
        recording does not matter otherwise.

        Arguments
        ---------
        path : str or Path
            An audio file of any format that soundfile reads.

        Returns
        -------
        torch.Tensor
            The voices [T, N] at the model's sample rate, float32, on the CPU.

        Raises
        ------
        ValueError
            If the file is missing, no audio, empty or not finite.
        """
        mixture = _read_mono(path, self.sample_rate)  # [T]
        rms = np.sqrt(np.mean(mixture**2))
        # The network's normalisation fails on faint input, so it hears every recording at one level.
        heard = torch.from_numpy(mixture * (_HEARD_RMS / rms if rms > 0 else 1.0)).float()  # [T]
        estimates = self.separate_batch(heard[None])[0].cpu().numpy()  # [T, N]
        estimates = estimates * _mixing_gains(estimates, mixture)  # [T, N], float64
        peak = np.abs(estimates).max()
        return torch.from_numpy((estimates / max(peak, 1.0)).astype(np.float32))


def save_estimates(estimates, sample_rate, folder, stem):
    """Write the voices of a recording as 16-bit wav files; each appears only once it is whole.

    Arguments
    ---------
    estimates : torch.Tensor
        The voices [T, N]; what exceeds 1 is clipped.
    sample_rate : int
        Hz.
    folder : str or Path
        Created where it is missing.
    stem : str
        The files are ``<stem>_spk1.wav`` and so on.

    Returns
    -------
    list of Path

    Raises
    ------
    ValueError
        If the voices are not [T, N] or not finite.

    Example
    -------
    >>> import tempfile
    >>> paths = save_estimates(torch.zeros(800, 2), 8000, tempfile.mkdtemp(), "meeting")
    >>> [path.name for path in paths]
    ['meeting_spk1.wav', 'meeting_spk2.wav']
    """
    if estimates.dim() != 2:
        raise ValueError(f"estimates must have shape [T, N], but got {list(estimates.shape)}.")
    if not estimates.isfinite().all():
        raise ValueError("estimates must be finite, but they hold NaN or infinite samples.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for spk, voice in enumerate(estimates.detach().cpu().numpy().T, 1):
        paths.append(folder / f"{stem}_spk{spk}.wav")
        with write_whole(paths[-1], "wb") as stream:
            soundfile.write(stream, voice, sample_rate, format="WAV", subtype="PCM_16")
    return paths


class _Plan:
    """What a ``!new:`` or ``!name:`` of a YAML asks for, as plain data."""

    def __init__(self, tag, arguments):
        self.tag, self.arguments = tag, arguments


class _PlanLoader(yaml.SafeLoader):
    """Reads a resolved HyperPyYAML text without importing or calling anything."""


def _construct_plan(loader, tag, node):
    if isinstance(node, yaml.MappingNode):
        return _Plan(tag, loader.construct_mapping(node, deep=True))
    return _Plan(tag, None if isinstance(node, yaml.SequenceNode) else {})


for _prefix in ("!new:", "!name:"):
    _PlanLoader.add_multi_constructor(
        _prefix, lambda loader, suffix, node, prefix=_prefix: _construct_plan(loader, prefix + suffix, node)
    )


def _read_plan(text, where):
    """The top level of a HyperPyYAML text as plain data, with a :class:`_Plan` for what it would build."""
    try:
        # The parser that resolve_references uses, so that both see the same tags: it would open the files of
        # !include: and call the functions of !applyref:.
        for tag in _tags(YAML().compose(text)):
            if not tag.startswith(("!new:", "!name:")) and tag not in ("!ref", "!copy", *_PLAIN_TAGS):
                raise ValueError(f"the tag {tag} is not allowed in a model folder")
        plan = yaml.load(resolve_references(text), Loader=_PlanLoader)
    except Exception as error:  # a text from anywhere can fail in any way
        raise ValueError(f"{where} cannot be read: {error}.") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("modules"), dict):
        raise ValueError(f"{where} must hold a mapping `modules` with {', '.join(_MODULES)}.")
    return plan


def _tags(node):
    """The tags of all nodes, each once."""
    tags, seen, nodes = {}, set(), [node]
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        tags[str(node.tag)] = None
        if isinstance(node.value, list):
            for child in node.value:
                nodes.extend(child if isinstance(child, tuple) else (child,))
    return list(tags)


def _build_modules(plan, where):
    """The three modules that the YAML's ``modules`` name, without weights: on torch's meta device."""
    with torch.device("meta"):  # takes no memory, time or random numbers
        return {
            name: _build(plan["modules"].get(name), classes, f"{where}: {name}") for name, classes in _CLASSES.items()
        }


def _build(plan, classes, where):
    """Build what a plan asks for, if it is one of the classes."""
    allowed = [f"!new:{path}" for path in classes]
    tag = plan.tag if isinstance(plan, _Plan) else plan
    if tag not in allowed:
        raise ValueError(f"{where} can only be {' or '.join(allowed)}, but got {tag!r}.")
    if plan.arguments is None:
        raise ValueError(f"{where} must give the arguments of {tag} by name.")
    arguments = dict(plan.arguments)
    for name in ("intra_model", "inter_model"):
        if name in arguments:
            arguments[name] = _build(arguments[name], _TRANSFORMERS, f"{where}.{name}")
        elif classes is _CLASSES["masknet"]:
            raise ValueError(f"{where} must give {name}.")
    try:
        return classes[tag.removeprefix("!new:")](**arguments)
    except Exception as error:  # the arguments may be anything
        raise ValueError(f"{where} cannot be built: {error}") from None


def _read_modules(folder):
    """The modules of a folder without weights, and its sample rate."""
    path = folder / _HPARAMS_FILE
    plan = _read_plan(path.read_bytes(), path)
    sample_rate = plan.get("sample_rate", 8000)  # old published folders do not tell it
    if type(sample_rate) is not int or sample_rate < 1:
        raise ValueError(f"{path}: sample_rate must be a whole number of Hz, but got {sample_rate!r}.")
    return _build_modules(plan, path), sample_rate


def _find_folder(folder):
    if not Path(folder).is_dir():
        raise ValueError(
            f"The model folder {folder} was not found; expected a local folder with "
            f"{', '.join(f'{name}.ckpt' for name in _MODULES)} and {_HPARAMS_FILE}."
        )
    return Path(folder)


def _read_state(path):
    """The tensors of a checkpoint by name. Nothing but tensors is unpickled."""
    if not path.is_file():
        raise ValueError(f"The model folder {path.parent} holds no {path.name}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of weights alone: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is no checkpoint: expected tensors by name, but got {type(state).__name__}.")
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path} holds weights that are NaN or infinite, first in {key}.")
    return state


def _check_state(state, module, fault):
    """Refuse tensors that are not exactly a module's, naming the first one that differs."""
    expected = module.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            raise ValueError(f"{fault}: it lacks {key} {list(tensor.shape)}.")
        if state[key].shape != tensor.shape:
            raise ValueError(f"{fault}: {key} has shape {list(state[key].shape)}, but expected {list(tensor.shape)}.")
    for key, tensor in state.items():
        if key not in expected:
            raise ValueError(f"{fault}: it holds {key} {list(tensor.shape)}, which is not expected.")


def _cpu_state(module):
    return {key: tensor.detach().cpu() for key, tensor in module.state_dict().items()}


def _num_heads(masknet):
    heads = {m.num_heads for m in masknet.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    return " and ".join(map(str, sorted(heads)))


def _remove_siblings(target, ending):
    """Remove the temporary folders that this export, or a killed one, left beside the target."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.{ending}"):
        shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder):
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_mono(path, sample_rate):
    """A recording as one channel [T] at a sample rate, float64."""
    if not Path(path).is_file():
        raise ValueError(f"The audio file {path} was not found.")
    try:
        samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)  # [T, channels]
    except (OSError, RuntimeError, TypeError) as error:  # TypeError: headerless formats
        raise ValueError(f"{path} cannot be read as audio: {error}") from None
    if len(samples) == 0:
        raise ValueError(f"{path} is empty: it has no samples.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds samples that are NaN or infinite.")
    mixture = samples.mean(axis=1, dtype=np.float64)  # [T]
    if file_rate != sample_rate:
        divisor = math.gcd(file_rate, sample_rate)
        mixture = scipy.signal.resample_poly(mixture, sample_rate // divisor, file_rate // divisor)  # [T']
    return mixture


def _mixing_gains(estimates, mixture):
    """One gain per voice [N] with which the estimates [T, N] add up best to the mixture [T], in float64.

    SI-SDR does not see the sign of an estimate: training may leave it turned. So a voice that goes against
    the mixture is turned first; beyond that no gain is negative.
    """
    both = np.column_stack([estimates, mixture]).astype(np.float64)  # [T, N+1]
    triangle = np.linalg.qr(both, mode="r")  # [min(T, N+1), N+1], with the same least-squares problem
    signs = np.sign(triangle[:, :-1].T @ triangle[:, -1])  # [N]
    return signs * scipy.optimize.nnls(triangle[:, :-1] * signs, triangle[:, -1])[0]
