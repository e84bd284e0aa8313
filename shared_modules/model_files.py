"""The files of a trained model, read without running anything of them, and written as a folder that is whole."""

import glob
import math
import os
import pickle
import re
import shutil
import stat
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import yaml
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode

from shared_modules.files import flush_to_disk
from shared_modules.options import is_hub_name

HPARAMS_FILE = "hyperparams.yaml"
EXPORTED_FOLDER = "exported"  # of a run
PLAN_PREFIXES = ("!new:", "!name:")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp")
}
_MAX_YAML_BYTES = 2**20
_LIMIT = 100_000  # of any number in a model's wiring, so that nothing enormous is built before the weights are seen
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of weights
# A YAML may name more of these, as those of published folders do: it is not built. What else it names is refused.
_NOT_BUILT = ("speechbrain.", "dsd_modules.", "nessa_modules.", "shared_modules.", "torch.optim.")


class Plan:
    """What a ``!new:`` or ``!name:`` of a YAML asks for, as plain data."""

    def __init__(self, tag, arguments):
        self.tag, self.arguments = tag, arguments


class _PlanLoader(yaml.SafeLoader):
    """Reads a resolved HyperPyYAML text without importing or calling anything."""


def _construct_plan(prefix, loader, suffix, node):
    tag = prefix + suffix
    if isinstance(node, yaml.MappingNode):
        return Plan(tag, loader.construct_mapping(node, deep=True))
    return Plan(tag, None if isinstance(node, yaml.SequenceNode) else {})


for _prefix in PLAN_PREFIXES:
    _PlanLoader.add_multi_constructor(_prefix, partial(_construct_plan, _prefix))


def read_plan(text, where):
    """The top level of a HyperPyYAML text as plain data, with a :class:`Plan` for what it would build."""
    try:
        # The parser that resolve_references uses, so that both see the same tags: it would open the files of
        # !include: and call the functions of !applyref:.
        tree = YAML().compose(text)
        if not isinstance(tree, MappingNode):
            raise ValueError("it is no mapping of names to values")
        for tag in tags(tree):
            if not tag.startswith(PLAN_PREFIXES) and tag not in ("!ref", "!copy", *_PLAIN_TAGS):
                raise ValueError(f"the tag {tag} is not allowed in a model folder")
        if _written_out(tree) > _MAX_YAML_BYTES:
            raise ValueError("its aliases and references, written out, are too long for a model's wiring")
        _check_arithmetic(tree)
        plan = yaml.load(resolve_references(text), Loader=_PlanLoader)
    except Exception as error:  # a text from anywhere can fail in any way
        raise ValueError(f"{where} cannot be read: {error}.") from None
    if not isinstance(plan, dict):
        raise ValueError(f"{where} must hold a mapping of names to values.")
    return plan


def tags(node):
    """The tag of every node."""
    return (str(each.tag) for each in _nodes(node))


def _nodes(tree):
    """Every node of a YAML once."""
    seen, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node.value, list):
            for child in node.value:
                nodes.extend(child if isinstance(child, tuple) else (child,))


def _check_arithmetic(tree):
    """Refuse references that would be multiplied into something enormous: powers, and strings."""
    top_level = {key.value: value for key, value in tree.value} if isinstance(tree.value, list) else {}

    def is_number(node):
        if node is None or isinstance(node.value, list):
            return False
        if node.tag != "!ref":
            return re.fullmatch(r"[-+.\w]+", node.value) is not None
        names, rest = re.findall(r"<([^<>]*)>", node.value), re.sub(r"<[^<>]*>", "", node.value)
        is_plain = "**" not in node.value and re.fullmatch(r"[-+*/%().\s\d]*", rest)
        return bool(is_plain) and all(is_number(top_level.get(name)) for name in names)

    for node in _nodes(tree):
        if node.tag == "!ref" and re.search(r"[*%]", str(node.value)) and not is_number(node):
            raise ValueError(f"the arithmetic of {node.value!r} is not allowed in a model folder")


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


def check_names(text, where, what):
    """Refuse a YAML that names anything to be built outside the packages of models, even where nothing needs it.

    Arguments
    ---------
    text : str or bytes
        The YAML, which :func:`read_plan` has read.
    where : str or Path
        Its place, for the message.
    what : str
        What it should describe, for the message.

    Raises
    ------
    ValueError
        The first such tag.
    """
    for tag in tags(YAML().compose(text)):
        if tag.startswith(PLAN_PREFIXES) and not tag.partition(":")[2].startswith(_NOT_BUILT):
            raise ValueError(f"{where} asks for {tag}, which is no part of {what}.")


def build(plan, classes, where, limits=None, device="meta", **arguments):
    """Build what a plan asks for, if it is one of the classes.

    Arguments
    ---------
    plan : Plan
        From :func:`read_plan`.
    classes : dict
        From the allowed dotted paths to the classes that are built for them.
    where : str
        The plan's place, for messages.
    limits : dict, optional
        From an argument's name to the largest number that it may be, where that is not 100,000.
    device : str or torch.device
        Where it is built; the meta device takes no memory, time or random numbers.
    **arguments
        That replace the plan's own.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If the plan asks for another class, or cannot be built.
    """
    built_class = planned_class(plan, classes, where)
    arguments = plan.arguments | arguments
    for name, value in arguments.items():
        limit = (limits or {}).get(name, _LIMIT)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= limit:
                raise ValueError(f"{where}: {name} can only be up to {limit}, but got {number}.")
    try:
        with torch.device(device):
            return built_class(**arguments)
    except Exception as error:  # the arguments may be anything
        raise ValueError(f"{where} cannot be built: {error}") from None


def planned_class(plan, classes, where):
    """The class of a plan, if it is one of those allowed; see :func:`build`."""
    allowed = [f"!new:{path}" for path in classes]
    tag = plan.tag if isinstance(plan, Plan) else plan
    if tag not in allowed:
        raise ValueError(f"{where} can only be {' or '.join(allowed)}, but got {tag!r}.")
    if plan.arguments is None:
        raise ValueError(f"{where} must give the arguments of {tag} by name.")
    return classes[tag.removeprefix("!new:")]


def read_text_file(path):
    """The bytes of a model's YAML. A pipe would be waited for, and what is large is none."""
    try:
        mode, num_bytes = path.stat().st_mode, path.stat().st_size
        if not stat.S_ISREG(mode) or num_bytes > _MAX_YAML_BYTES:
            raise ValueError(f"{path} can only be a file of up to {_MAX_YAML_BYTES} bytes.")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def find_folder(source, files, optional_files=(), savedir=None):
    """The local folder of a model; one on the hub is downloaded.

    Arguments
    ---------
    source : str or Path
        A folder, the folder of a run, whose ``exported`` is meant, or a name on the Hugging Face hub,
        ``owner/name`` or ``owner/name@revision``, from where its files are downloaded.
    files : sequence of str
        Checkpoints that a model needs beside ``hyperparams.yaml``.
    optional_files : sequence of str
        What else is downloaded where it is there.
    savedir : str or Path, optional
        The hub's cache for these files; left out: the one of all programs. A local folder is read where it is.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If it is missing, or cannot be downloaded.
    """
    expected = f"{', '.join(files)} and {HPARAMS_FILE}"
    if isinstance(source, str) and is_hub_name(source):
        name, _, revision = source.partition("@")
        patterns = [HPARAMS_FILE, *files, *optional_files]
        try:
            folder = huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, cache_dir=savedir
            )
            return Path(folder)
        except Exception as error:  # a download can fail in any way
            raise ValueError(
                f"The model folder {source} was not found; expected a local folder with {expected}, or its name on "
                f"the Hugging Face hub, which did not give it: {_download_fault(error)}"
            ) from None
    if not os.path.isdir(source):
        raise ValueError(f"The model folder {source} was not found; expected a local folder with {expected}.")
    exported = Path(source) / EXPORTED_FOLDER
    if exported.is_dir() and not (Path(source) / files[0]).exists():
        return exported  # the folder of a run
    return Path(source)


def _download_fault(error):
    """A sentence of one line; the hub's own may fill a page."""
    if isinstance(error, RepositoryNotFoundError):
        return "it has no public model of this name."
    if isinstance(error, RevisionNotFoundError):
        return "the model has no such revision."
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_state(path):
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
    is_named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not is_named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is no checkpoint: expected tensors by name, but got {type(state).__name__}.")
    for key, tensor in state.items():
        is_count = key.endswith("num_batches_tracked") and tensor.dtype == torch.int64  # of batch norm
        if not (tensor.dtype in _DTYPES or is_count) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {key} can only be floating-point numbers, but got {tensor.dtype}.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key} {list(tensor.shape)} is larger than what the file holds of it.")
        if not tensor.isfinite().all():
            raise ValueError(f"{path} holds weights that are NaN or infinite, first in {key}.")
    return state


def check_state(state, module, fault):
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


def fill(module, state, fault):
    """Give a module that was built without memory its weights."""
    check_state(state, module, fault)
    module.load_state_dict(state, assign=True)


def cpu_state(module):
    """The weights of a module, on the CPU."""
    return {key: tensor.detach().cpu() for key, tensor in module.state_dict().items()}


def write_folder(folder, write, is_part):
    """Write a folder that appears whole or not at all.

    One that was written earlier to the same place stays until the new one is complete, and is then replaced.

    Arguments
    ---------
    folder : str or Path
        Where it shall be.
    write : callable
        Writes the files into the (empty) folder that it is given.
    is_part : callable
        Whether a file of a name belongs to such a folder: one with anything else is not replaced.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the place is a file, or a folder with anything else.
    """
    target = check_place(folder, is_part)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_siblings(target, "tmp")
    beside, aside = (target.with_name(f".{target.name}.{os.getpid()}.{ending}") for ending in ("tmp", "old"))
    try:
        beside.mkdir()
        write(beside)
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


def check_place(folder, is_part):
    """Refuse a place that :func:`write_folder` must not replace; returns it resolved."""
    target = Path(folder).resolve()
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"A model is exported to a folder, but {folder} is a file.")
        strangers = sorted(path.name for path in target.iterdir() if not is_part(path.name))
        if strangers:  # replacing the folder would delete them
            raise ValueError(
                f"{folder} holds {strangers[0]!r}, which is no part of an exported model; give another place."
            )
    return target


def _remove_siblings(target, ending):
    """Remove the temporary folders that this export, or a killed one, left beside the target."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.{ending}"):
        shutil.rmtree(path, ignore_errors=True)
