"""The folder form of a trained model: export it, read it, start from its weights."""

import copy
import glob
import math
import os
import pickle
import re
import shutil
import stat
from functools import partial
from io import StringIO
from pathlib import Path

import huggingface_hub
import torch
import yaml
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.error import YAMLError
from speechbrain.lobes.models.dual_path import Decoder, Encoder, SBRNNBlock, SBTransformerBlock

from dsd_modules.masknet import DualPathMaskNet
from dsd_modules.separator import separate
from dsd_modules.tasnet import ConvTasNetMaskNet
from shared_modules.files import flush_to_disk, write_whole
from shared_modules.options import is_hub_name

# What a folder's YAML may name, and what is built for it. Nothing else is ever imported or called.
_CLASSES = {
    "encoder": {"speechbrain.lobes.models.dual_path.Encoder": Encoder},
    "masknet": {
        "dsd_modules.masknet.DualPathMaskNet": DualPathMaskNet,
        "speechbrain.lobes.models.dual_path.Dual_Path_Model": DualPathMaskNet,  # the same parameters
        "dsd_modules.tasnet.ConvTasNetMaskNet": ConvTasNetMaskNet,
        "speechbrain.lobes.models.conv_tasnet.MaskNet": ConvTasNetMaskNet,  # the same parameters
    },
    "decoder": {"speechbrain.lobes.models.dual_path.Decoder": Decoder},
}
_CHUNK_MODELS = {
    "speechbrain.lobes.models.dual_path.SBTransformerBlock": SBTransformerBlock,
    "speechbrain.lobes.models.dual_path.SBRNNBlock": SBRNNBlock,
}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of weights
_RNN_TYPES = ("LSTM", "GRU", "RNN")  # SBRNNBlock would call whatever stands under another name
_MODULES = tuple(_CLASSES)
_PLAN_PREFIXES = ("!new:", "!name:")
# A YAML may name more of these, as those of published folders do: it is not built. What else it names is refused.
_NOT_BUILT = ("speechbrain.", "dsd_modules.", "shared_modules.", "torch.optim.")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp")
}
_HPARAMS_FILE = "hyperparams.yaml"
_FILES = [_HPARAMS_FILE, *(f"{name}.ckpt" for name in _MODULES)]
CARD_FILE = "README.md"
EXPORTED_FOLDER = "exported"  # of a run
MAX_SAMPLE_RATE = 768_000  # Hz
_MAX_YAML_BYTES = 2**20
_LIMIT = 100_000  # of any number in a model's wiring, so that nothing enormous is built before the weights are seen
_LIMITS = {"num_layers": 100, "R": 100, "X": 16, "N": 4096, "B": 4096, "H": 4096, "P": 100}
_NEEDED = ("num_spks", "sample_rate", "modules")  # and what they refer to
_TRAINING_OPTIONS = ("dropout", "activation_checkpointing")  # of the modules, but no checkpoint fixes them

_HEADER = """\
# A speech separator, exported for inference. It loads with dsd_modules.inference.SepformerDSDSeparation and, without
# dsd_modules, with speechbrain.inference.SepformerSeparation.

"""
_PRETRAINER = """
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
""" + "".join(f"    {name}: !ref <modules[{name}]>\n" for name in _MODULES)
# SpeechBrain's own classes of the same parameters, so that it loads the folder where this project is not installed.
_STOCK_CLASSES = {
    "dsd_modules.masknet.DualPathMaskNet": "speechbrain.lobes.models.dual_path.Dual_Path_Model",
    "dsd_modules.tasnet.ConvTasNetMaskNet": "speechbrain.lobes.models.conv_tasnet.MaskNet",
}
_STOCK_REACH = 128  # frames: Conv-TasNet's convolutions reach no further there


def onnx_name(num_blocks):
    """The name of the ONNX file of the first blocks, in an exported folder.

    Example
    -------
    >>> onnx_name(2)
    'separator_blocks2.onnx'
    """
    return f"separator_blocks{num_blocks}.onnx"


def is_model_file(name):
    """Whether a file of this name belongs to an exported folder: its model, its card, or ONNX.

    Example
    -------
    >>> is_model_file("encoder.ckpt"), is_model_file("README.md"), is_model_file("notes.txt")
    (True, True, False)
    """
    return name in _FILES or name == CARD_FILE or re.fullmatch(r"separator_blocks[1-9]\d*\.onnx", name) is not None


def export_model(folder, hparams_file, options, modules):
    """Write a trained model as a folder of SpeechBrain's published form: what inference needs, and no more.

    The wiring is that of the YAML that was trained with; its paths, data and training are left out. The folder
    appears whole or not at all. One that was exported earlier to the same place stays until the new one is
    complete, and is then replaced.

    Arguments
    ---------
    folder : str or Path
        Where the folder shall be.
    hparams_file : str or Path
        The YAML that was trained with. It is read as text: nothing of it is run.
    options : dict
        The values of its top-level scalars, as :func:`dsd_modules.options.read_options` returns them.
    modules : dict
        ``encoder``, ``masknet`` and ``decoder`` as that YAML builds them, on any device.

    Returns
    -------
    Path
        The folder: ``hyperparams.yaml``, ``encoder.ckpt``, ``masknet.ckpt`` and ``decoder.ckpt``.

    Raises
    ------
    ValueError
        If the YAML cannot be read or wires another kind of model, an option is missing, the two do not
        give a model that separates as the modules do, or the folder holds anything else.

    Example
    -------
    >>> import tempfile
    >>> from dsd_modules.options import read_options
    >>> hparams_file = Path(__file__).parents[1] / "recipes/LibriMix/separation/hparams/sepformer_dsd.yaml"
    >>> changes = ["num_filters: 8", "kernel_size: 4", "chunk_size: 10", "num_heads: 2", "d_ffn: 16"]
    >>> changes += ["num_intra_layers: 1", "num_inter_layers: 1"]
    >>> _, options = read_options(hparams_file, chr(10).join(changes))
    >>> transformer = {"nhead": 2, "d_ffn": 16, "use_positional_encoding": True, "norm_before": True}
    >>> intra, inter = (SBTransformerBlock(1, 8, **transformer) for _ in range(2))
    >>> masknet = DualPathMaskNet(8, 8, intra, inter, 2, K=10, linear_layer_after_inter_intra=False)
    >>> modules = {"encoder": Encoder(4, 8), "masknet": masknet, "decoder": Decoder(8, 1, 4, stride=2, bias=False)}
    >>> folder = export_model(tempfile.mkdtemp() + "/exported", hparams_file, options, modules)
    >>> sorted(path.name for path in folder.iterdir())
    ['decoder.ckpt', 'encoder.ckpt', 'hyperparams.yaml', 'masknet.ckpt']
    >>> loaded, sample_rate = read_model(folder)
    >>> sample_rate, torch.equal(loaded["encoder"].conv1d.weight, modules["encoder"].conv1d.weight)
    (8000, True)
    """
    target = Path(folder).resolve()
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"A model is exported to a folder, but {folder} is a file.")
        strangers = sorted(path.name for path in target.iterdir() if not is_model_file(path.name))
        if strangers:  # replacing the folder would delete them
            raise ValueError(
                f"{folder} holds {strangers[0]!r}, which is no part of an exported model; give another place."
            )

    hparams = _inference_yaml(hparams_file, options)
    states = {name: _cpu_state(modules[name]) for name in _MODULES}
    built = _build_modules(_read_plan(hparams, hparams_file), hparams_file)
    for name, module in built.items():
        _fill(module, states[name], f"The options do not fit modules[{name!r}]")
    _check_same_estimates(built, modules, hparams_file)

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
        flush_to_disk(beside)
        if target.exists():
            _remove_siblings(target, "old")
            os.rename(target, aside)
        os.rename(beside, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush_to_disk(target.parent)
    _remove_siblings(target, "old")
    return Path(folder)


def model_options(hparams_file):
    """The options of a training YAML that its checkpoints fix: those that the modules are built from.

    Arguments
    ---------
    hparams_file : str or Path
        It is read as text: nothing of it is run.

    Returns
    -------
    list of str
        In the order of the YAML.

    Raises
    ------
    ValueError
        If the YAML cannot be read.

    Example
    -------
    >>> hparams_file = Path(__file__).parents[1] / "recipes/LibriMix/separation/hparams/sepformer_dsd.yaml"
    >>> model_options(hparams_file)[:4]
    ['num_spks', 'sample_rate', 'num_filters', 'kernel_size']
    """
    part = _model_part(hparams_file)
    return [n for n, value in part.items() if not isinstance(value, dict | list) and n not in _TRAINING_OPTIONS]


def read_model(folder):
    """Build the model of a folder. No code of the folder is run.

    Arguments
    ---------
    folder : str or Path
        From :func:`export_model`, or a separator in SpeechBrain's published form; or its name on the Hugging
        Face hub, ``owner/name`` or ``owner/name@revision``, from where its four files are downloaded into the
        hub's own cache. Or the folder of a run, whose ``exported`` is read.

    Returns
    -------
    modules : dict
        ``encoder``, ``masknet`` (:class:`dsd_modules.masknet.DualPathMaskNet` or
        :class:`dsd_modules.tasnet.ConvTasNetMaskNet`) and ``decoder`` with their weights, float32, on the CPU.
    sample_rate : int
        Of the recordings it was trained with, Hz.

    Raises
    ------
    ValueError
        If the folder or a file is missing or cannot be downloaded, its YAML is not that of a separator of these
        kinds or asks for anything to be run, or its weights do not fit.

    Example
    -------
    >>> read_model("no/such/folder")
    Traceback (most recent call last):
    ValueError: The model folder no/such/folder was not found; expected a local folder with encoder.ckpt, ...
    """
    folder = _find_folder(folder)
    try:
        modules, sample_rate = _read_modules(folder)
    except FileNotFoundError:
        raise ValueError(f"The model folder {folder} holds no {_HPARAMS_FILE}.") from None
    for name, module in modules.items():
        path = folder / f"{name}.ckpt"
        _fill(module, _read_state(path), f"{path} does not fit {_HPARAMS_FILE}")
    modules = {name: module.float() for name, module in modules.items()}
    _check_separates(modules, folder)
    return modules, sample_rate


def load_weights(folder, modules):
    """Start from the weights of a trained model: fine-tuning. All modules are loaded, or none is changed.

    Arguments
    ---------
    folder : str or Path
        From :func:`export_model`, or of SpeechBrain's published form: ``encoder.ckpt``, ``masknet.ckpt`` and
        ``decoder.ckpt``. Or its name on the Hugging Face hub, as for :func:`read_model`.
    modules : dict
        ``encoder``, ``masknet`` and ``decoder``, on any device. Their weights are replaced.

    Raises
    ------
    ValueError
        If the folder or a file is missing or cannot be downloaded, a file is no checkpoint, or it does not fit
        its module: which key differs, and how.

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
        form = _form(_read_modules(folder)[0]["masknet"])
    except (FileNotFoundError, ValueError):
        form = {}  # weights that came without a YAML of this form
    for name, expected in _form(modules["masknet"]).items():
        if form.get(name, expected) != expected:
            raise ValueError(
                f"{folder / _HPARAMS_FILE} does not fit the model: its {name} is {form[name]}, but expected {expected}."
            )
    for name, state in states.items():
        modules[name].load_state_dict(state)


def _inference_yaml(hparams_file, options):
    """The part of a training YAML that inference needs, with the values of the options, as text."""
    text = _HEADER + _dump(_model_part(hparams_file, options)) + _PRETRAINER
    if _is_stock(_read_plan(text, hparams_file)["modules"].get("masknet")):
        for ours, theirs in _STOCK_CLASSES.items():
            text = re.sub(rf"!new:{re.escape(ours)}$", f"!new:{theirs}", text, flags=re.MULTILINE)
    return text


def _is_stock(masknet):
    """Whether SpeechBrain's class would separate as ours does, from the plan of a mask network."""
    arguments = (masknet.arguments if isinstance(masknet, _Plan) else None) or {}
    intra_model = arguments.get("intra_model")
    if intra_model is not None and intra_model is arguments.get("inter_model"):
        return False  # of one template it makes one model for both
    num_layers, kernel = arguments.get("X"), arguments.get("P")  # of Conv-TasNet
    if not isinstance(num_layers, int) or not isinstance(kernel, int):
        return True
    return 2 ** (num_layers - 1) * (kernel // 2) <= _STOCK_REACH


def _model_part(hparams_file, options=None):
    """The top-level keys of a training YAML that inference needs; with options, the scalars have their values."""
    try:
        tree = YAML().load(Path(hparams_file).read_text(encoding="utf-8"))  # keeps the tags, and runs nothing
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ValueError(f"{hparams_file} cannot be read: {error}.") from None
    for name in _NEEDED:
        if not isinstance(tree, dict) or name not in tree:
            raise ValueError(f"{hparams_file} must hold the top-level key {name}.")
    _strip_training(tree)
    if isinstance(tree["modules"], dict):  # what else was trained has no place in the folder
        tree["modules"] = {name: tree["modules"].get(name) for name in _MODULES}
    needed, waiting = set(), list(_NEEDED)
    while waiting:
        name = waiting.pop()
        if name in tree and name not in needed:
            needed.add(name)
            if options is not None:
                tree[name] = _overridden(name, tree[name], options)
            waiting += re.findall(r"<([^<>\[.]+)", _dump({name: tree[name]}))
    return {name: value for name, value in tree.items() if name in needed}


def _overridden(name, value, options):
    """The value of a top-level key in this run: that of the options, where it is a scalar."""
    if isinstance(value, dict | list):
        return value
    if isinstance(value, TaggedScalar) and options.get(name) is None:  # a !ref to what is no scalar
        return value
    if name not in options:
        raise ValueError(f"The option {name} of the YAML is missing.")
    return options[name]


def _dump(tree):
    stream = StringIO()
    YAML().dump(tree, stream)
    return stream.getvalue()


def _strip_training(tree):
    """Remove what tells of training from a YAML: the comments, which may name other keys, and checkpointing."""
    if hasattr(tree, "ca"):
        tree.ca.items.clear()
        tree.ca.comment, tree.ca.end = None, []
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if isinstance(child, dict):
            child.pop("activation_checkpointing", None)
        _strip_training(child)


def _check_same_estimates(built, modules, hparams_file):
    """Refuse a model that separates differently from the trained modules of equal weights.

    Weights do not show all of the wiring: not the activation, the number of heads or the chunk length.
    """
    trained = {name: copy.deepcopy(modules[name]).cpu() for name in _MODULES}  # their mode and device stay
    num_samples = 4000 + trained["encoder"].conv1d.kernel_size[0]
    mixture = torch.arange(num_samples).remainder(37)[None] / 37 - 0.5  # [1, T], any will do
    with torch.no_grad():
        ours, theirs = (
            separate(**{name: module.eval() for name, module in model.items()}, mixture=mixture)  # [1, N, T]
            for model in (built, trained)
        )
    if (ours - theirs).abs().max() > 1e-4 * theirs.abs().max():
        raise ValueError(f"{hparams_file} and the options do not fit the modules: they separate differently.")


class _Plan:
    """What a ``!new:`` or ``!name:`` of a YAML asks for, as plain data."""

    def __init__(self, tag, arguments):
        self.tag, self.arguments = tag, arguments


class _PlanLoader(yaml.SafeLoader):
    """Reads a resolved HyperPyYAML text without importing or calling anything."""


def _construct_plan(prefix, loader, suffix, node):
    tag = prefix + suffix
    if isinstance(node, yaml.MappingNode):
        return _Plan(tag, loader.construct_mapping(node, deep=True))
    return _Plan(tag, None if isinstance(node, yaml.SequenceNode) else {})


for _prefix in _PLAN_PREFIXES:
    _PlanLoader.add_multi_constructor(_prefix, partial(_construct_plan, _prefix))


def _read_plan(text, where):
    """The top level of a HyperPyYAML text as plain data, with a :class:`_Plan` for what it would build."""
    try:
        # The parser that resolve_references uses, so that both see the same tags: it would open the files of
        # !include: and call the functions of !applyref:.
        tree = YAML().compose(text)
        for tag in _tags(tree):
            if not tag.startswith(_PLAN_PREFIXES) and tag not in ("!ref", "!copy", *_PLAIN_TAGS):
                raise ValueError(f"the tag {tag} is not allowed in a model folder")
        if _written_out(tree) > _MAX_YAML_BYTES:
            raise ValueError("its aliases and references, written out, are too long for a model's wiring")
        plan = yaml.load(resolve_references(text), Loader=_PlanLoader)
    except Exception as error:  # a text from anywhere can fail in any way
        raise ValueError(f"{where} cannot be read: {error}.") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("modules"), dict):
        raise ValueError(f"{where} must hold a mapping `modules` with {', '.join(_MODULES)}.")
    return plan


def _tags(node):
    """The tag of every node."""
    seen, nodes = set(), [node]
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield str(node.tag)
        if isinstance(node.value, list):
            for child in node.value:
                nodes.extend(child if isinstance(child, tuple) else (child,))


def _written_out(tree):
    """About how many characters a YAML has, once its aliases and references are written out."""
    top_level = {key.value: value for key, value in tree.value} if isinstance(tree.value, list) else {}
    sizes = {}

    def size(node):
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # until it is known: what holds itself has no end
            if isinstance(node.value, list):
                children = [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
                sizes[id(node)] = 1 + sum(map(size, children))
            else:
                names = re.findall(r"<([^<>\[.]+)", node.value) if node.tag in ("!ref", "!copy") else ()
                sizes[id(node)] = (
                    1 + len(node.value) + sum(size(top_level[name]) for name in names if name in top_level)
                )
        return sizes[id(node)]

    return size(tree)


def _build_modules(plan, where):
    """The three modules that the YAML's ``modules`` name. Their weights mean nothing yet."""
    with torch.random.fork_rng(devices=[]):
        modules = {
            name: _build(plan["modules"].get(name), classes, f"{where}: {name}") for name, classes in _CLASSES.items()
        }
    conv, decoder = modules["encoder"].conv1d, modules["decoder"]
    ours, expected = (decoder.kernel_size, decoder.stride), (conv.kernel_size, conv.stride)
    if ours != expected or decoder.padding != (0,) or decoder.output_padding != (0,) or decoder.dilation != (1,):
        raise ValueError(
            f"{where}: the decoder can only have the encoder's kernel and stride {expected}, no padding, dilation 1, "
            f"but got {ours}, padding {decoder.padding} and {decoder.output_padding}, dilation {decoder.dilation}."
        )
    return modules


def _build(plan, classes, where):
    """Build what a plan asks for, if it is one of the classes."""
    allowed = [f"!new:{path}" for path in classes]
    tag = plan.tag if isinstance(plan, _Plan) else plan
    if tag not in allowed:
        raise ValueError(f"{where} can only be {' or '.join(allowed)}, but got {tag!r}.")
    if plan.arguments is None:
        raise ValueError(f"{where} must give the arguments of {tag} by name.")
    arguments, built_class = dict(plan.arguments), classes[tag.removeprefix("!new:")]
    if built_class is DualPathMaskNet:
        for name in ("intra_model", "inter_model"):
            if name not in arguments:
                raise ValueError(f"{where} must give {name}.")
            arguments[name] = _build(arguments[name], _CHUNK_MODELS, f"{where}.{name}")
    for name, value in arguments.items():
        limit = _LIMITS.get(name, _LIMIT)
        if isinstance(value, int | float) and not abs(value) <= limit:
            raise ValueError(f"{where}: {name} can only be up to {limit}, but got {value}.")
    if built_class is SBRNNBlock and arguments.get("rnn_type", "LSTM") not in _RNN_TYPES:
        raise ValueError(f"{where}: rnn_type can only be {', '.join(_RNN_TYPES)}, but got {arguments['rnn_type']!r}.")
    # The meta device takes no memory, time or random numbers; SpeechBrain's Conv-TasNet cannot be built there.
    device = "cpu" if built_class is ConvTasNetMaskNet else "meta"
    try:
        with torch.device(device):
            return built_class(**arguments)
    except Exception as error:  # the arguments may be anything
        raise ValueError(f"{where} cannot be built: {error}") from None


def _read_text(path):
    """The bytes of a YAML. A pipe would be waited for, and what is large is none."""
    try:
        mode, num_bytes = path.stat().st_mode, path.stat().st_size
        if not stat.S_ISREG(mode) or num_bytes > _MAX_YAML_BYTES:
            raise ValueError(f"{path} can only be a file of up to {_MAX_YAML_BYTES} bytes.")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def _read_modules(folder):
    """The modules of a folder without weights, and its sample rate."""
    path = folder / _HPARAMS_FILE
    text = _read_text(path)
    plan = _read_plan(text, path)
    sample_rate = plan.get("sample_rate", 8000)  # old published folders do not tell it
    if type(sample_rate) is not int or not 1 <= sample_rate <= MAX_SAMPLE_RATE:
        raise ValueError(
            f"{path}: sample_rate must be a whole number of Hz up to {MAX_SAMPLE_RATE}, but got {sample_rate!r}."
        )
    modules = _build_modules(plan, path)
    for tag in _tags(YAML().compose(text)):
        if tag.startswith(_PLAN_PREFIXES) and not tag.partition(":")[2].startswith(_NOT_BUILT):
            raise ValueError(f"{path} asks for {tag}, which is no part of a separator.")
    return modules, sample_rate


def _find_folder(source):
    """The local folder of a model; one on the hub is downloaded."""
    expected = f"{', '.join(f'{name}.ckpt' for name in _MODULES)} and {_HPARAMS_FILE}"
    if isinstance(source, str) and is_hub_name(source):
        name, _, revision = source.partition("@")
        try:
            return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
        except Exception as error:  # a download can fail in any way
            raise ValueError(
                f"The model folder {source} was not found; expected a local folder with {expected}, or its name on "
                f"the Hugging Face hub, which did not give it: {_download_fault(error)}"
            ) from None
    if not os.path.isdir(source):
        raise ValueError(f"The model folder {source} was not found; expected a local folder with {expected}.")
    exported = Path(source) / EXPORTED_FOLDER
    if exported.is_dir() and not (Path(source) / _FILES[1]).exists():
        return exported  # the folder of a run
    return Path(source)


def _download_fault(error):
    """A sentence of one line; the hub's own may fill a page."""
    if isinstance(error, RepositoryNotFoundError):
        return "it has no public model of this name."
    if isinstance(error, RevisionNotFoundError):
        return "the model has no such revision."
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_state(path):
    """The tensors of a checkpoint by name. Nothing but tensors is unpickled."""
    if not path.is_file():
        raise ValueError(f"The model folder {path.parent} holds no {path.name}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose advice is to load it all the same
        raise ValueError(f"{path} is no checkpoint of weights alone: it holds other things, or is damaged.") from None
    except Exception as error:  # a broken file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of weights alone: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is no checkpoint: expected tensors by name, but got {type(state).__name__}.")
    for key, tensor in state.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {key} can only be floating-point numbers, but got {tensor.dtype}.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key} {list(tensor.shape)} is larger than what the file holds of it.")
        if not tensor.isfinite().all():
            raise ValueError(f"{path} holds weights that are NaN or infinite, first in {key}.")
    return state


@torch.no_grad()
def _check_separates(modules, folder):
    """Refuse a model that cannot separate: its parts may not fit each other, whatever their weights."""
    num_samples = 2 * modules["encoder"].conv1d.kernel_size[0]
    mixture = torch.zeros(1, num_samples, dtype=torch.float32)  # [1, T], whatever the default is
    try:
        separate(**modules, mixture=mixture)
    except Exception as error:  # the parts may be anything
        raise ValueError(f"The model of {folder} does not separate: {str(error).splitlines()[0]}") from None


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


def _fill(module, state, fault):
    """Give a module that was built without memory its weights."""
    _check_state(state, module, fault)
    module.load_state_dict(state, assign=True)


def _cpu_state(module):
    return {key: tensor.detach().cpu() for key, tensor in module.state_dict().items()}


def _form(masknet):
    """What the weights of a mask network do not show, by name."""
    names = ("norm_type", "causal", "mask_nonlinear")
    form = {name: getattr(masknet, name) for name in names if hasattr(masknet, name)}
    heads = {m.num_heads for m in masknet.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    return {**form, "number of attention heads": " and ".join(map(str, sorted(heads)))}


def _remove_siblings(target, ending):
    """Remove the temporary folders that this export, or a killed one, left beside the target."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.{ending}"):
        shutil.rmtree(path, ignore_errors=True)
