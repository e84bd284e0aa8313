"""The folder form of a trained model: export it, read it, start from its weights."""

import copy
import re
from io import StringIO
from pathlib import Path

import torch
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.error import YAMLError
from speechbrain.lobes.models.dual_path import Decoder, Encoder, SBRNNBlock, SBTransformerBlock

from dsd_modules.masknet import DualPathMaskNet
from dsd_modules.separator import separate
from dsd_modules.tasnet import ConvTasNetMaskNet
from shared_modules.files import write_whole
from shared_modules.model_files import (
    HPARAMS_FILE,
    Plan,
    build,
    check_names,
    check_place,
    check_state,
    cpu_state,
    fill,
    find_folder,
    planned_class,
    read_plan,
    read_state,
    read_text_file,
    write_folder,
)

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
_RNN_TYPES = ("LSTM", "GRU", "RNN")  # SBRNNBlock would call whatever stands under another name
_MODULES = tuple(_CLASSES)
_CHECKPOINTS = [f"{name}.ckpt" for name in _MODULES]
CARD_FILE = "README.md"
MAX_SAMPLE_RATE = 768_000  # Hz
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
    names = (HPARAMS_FILE, *_CHECKPOINTS, CARD_FILE)
    return name in names or re.fullmatch(r"separator_blocks[1-9]\d*\.onnx", name) is not None


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
    check_place(folder, is_model_file)
    hparams = _inference_yaml(hparams_file, options)
    states = {name: cpu_state(modules[name]) for name in _MODULES}
    built = _build_modules(_plan(hparams, hparams_file), hparams_file)
    for name, module in built.items():
        fill(module, states[name], f"The options do not fit modules[{name!r}]")
    _check_same_estimates(built, modules, hparams_file)

    def write(beside):
        with write_whole(beside / HPARAMS_FILE) as stream:
            stream.write(hparams)
        for name, state in states.items():
            with write_whole(beside / f"{name}.ckpt", "wb") as stream:
                torch.save(state, stream)

    return write_folder(folder, write, is_model_file)


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


def read_model(folder, savedir=None):
    """Build the model of a folder. No code of the folder is run.

    Arguments
    ---------
    folder : str or Path
        From :func:`export_model`, or a separator in SpeechBrain's published form; or its name on the Hugging
        Face hub, ``owner/name`` or ``owner/name@revision``, from where its four files are downloaded. Or the folder
        of a run, whose ``exported`` is read.
    savedir : str or Path, optional
        The hub's cache for these files; left out: the one of all programs.

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
    folder = find_folder(folder, _CHECKPOINTS, savedir=savedir)
    try:
        modules, sample_rate = _read_modules(folder)
    except FileNotFoundError:
        raise ValueError(f"The model folder {folder} holds no {HPARAMS_FILE}.") from None
    for name, module in modules.items():
        path = folder / f"{name}.ckpt"
        fill(module, read_state(path), f"{path} does not fit {HPARAMS_FILE}")
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
    folder = find_folder(folder, _CHECKPOINTS)
    states = {name: read_state(folder / f"{name}.ckpt") for name in _MODULES}
    for name, state in states.items():
        check_state(state, modules[name], f"{folder / f'{name}.ckpt'} does not fit the model")
    try:
        form = _form(_read_modules(folder)[0]["masknet"])
    except (FileNotFoundError, ValueError):
        form = {}  # weights that came without a YAML of this form
    for name, expected in _form(modules["masknet"]).items():
        if form.get(name, expected) != expected:
            raise ValueError(
                f"{folder / HPARAMS_FILE} does not fit the model: its {name} is {form[name]}, but expected {expected}."
            )
    for name, state in states.items():
        modules[name].load_state_dict(state)


def _inference_yaml(hparams_file, options):
    """The part of a training YAML that inference needs, with the values of the options, as text."""
    text = _HEADER + _dump(_model_part(hparams_file, options)) + _PRETRAINER
    if _is_stock(_plan(text, hparams_file)["modules"].get("masknet")):
        for ours, theirs in _STOCK_CLASSES.items():
            text = re.sub(rf"!new:{re.escape(ours)}$", f"!new:{theirs}", text, flags=re.MULTILINE)
    return text


def _is_stock(masknet):
    """Whether SpeechBrain's class would separate as ours does, from the plan of a mask network."""
    arguments = (masknet.arguments if isinstance(masknet, Plan) else None) or {}
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


def _plan(text, where):
    """The plan of a YAML, which has ``modules``."""
    plan = read_plan(text, where)
    if not isinstance(plan.get("modules"), dict):
        raise ValueError(f"{where} must hold a mapping `modules` with {', '.join(_MODULES)}.")
    return plan


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
    """Build what a plan asks for, if it is one of the classes, with what stands inside it."""
    built_class, parts = planned_class(plan, classes, where), {}
    if built_class is DualPathMaskNet:
        for name in ("intra_model", "inter_model"):
            if name not in plan.arguments:
                raise ValueError(f"{where} must give {name}.")
            parts[name] = _build(plan.arguments[name], _CHUNK_MODELS, f"{where}.{name}")
    rnn_type = plan.arguments.get("rnn_type", "LSTM")
    if built_class is SBRNNBlock and rnn_type not in _RNN_TYPES:
        raise ValueError(f"{where}: rnn_type can only be {', '.join(_RNN_TYPES)}, but got {rnn_type!r}.")
    # SpeechBrain's Conv-TasNet cannot be built on the meta device.
    device = "cpu" if built_class is ConvTasNetMaskNet else "meta"
    return build(plan, classes, where, _LIMITS, device, **parts)


def _read_modules(folder):
    """The modules of a folder without weights, and its sample rate."""
    path = folder / HPARAMS_FILE
    text = read_text_file(path)
    plan = _plan(text, path)
    sample_rate = plan.get("sample_rate", 8000)  # old published folders do not tell it
    if type(sample_rate) is not int or not 1 <= sample_rate <= MAX_SAMPLE_RATE:
        raise ValueError(
            f"{path}: sample_rate must be a whole number of Hz up to {MAX_SAMPLE_RATE}, but got {sample_rate!r}."
        )
    modules = _build_modules(plan, path)
    check_names(text, path, "a separator")
    return modules, sample_rate


@torch.no_grad()
def _check_separates(modules, folder):
    """Refuse a model that cannot separate: its parts may not fit each other, whatever their weights."""
    num_samples = 2 * modules["encoder"].conv1d.kernel_size[0]
    mixture = torch.zeros(1, num_samples, dtype=torch.float32)  # [1, T], whatever the default is
    try:
        separate(**modules, mixture=mixture)
    except Exception as error:  # the parts may be anything
        raise ValueError(f"The model of {folder} does not separate: {str(error).splitlines()[0]}") from None


def _form(masknet):
    """What the weights of a mask network do not show, by name."""
    names = ("norm_type", "causal", "mask_nonlinear")
    form = {name: getattr(masknet, name) for name in names if hasattr(masknet, name)}
    heads = {m.num_heads for m in masknet.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    return {**form, "number of attention heads": " and ".join(map(str, sorted(heads)))}
