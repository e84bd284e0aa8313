"""The options of the recipe's YAML, read and checked before any data is touched or model built."""

import dataclasses
import difflib
import json
import math
import re
from decimal import Decimal
from pathlib import Path

import torch
import yaml
from hyperpyyaml import resolve_references
from speechbrain.utils.distributed import infer_device

from dsd_modules.losses import LAYER_PERMUTATIONS, LAYER_WEIGHTS
from dsd_modules.memory_bank import POLICIES
from dsd_modules.schedules import SCHEDULES


class _PlainLoader(yaml.SafeLoader):
    """Reads the scalars of a HyperPyYAML text; what would be built is left out."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _one_of(*values):
    # True == 1 == 1.0, so the type counts too.
    return lambda v: any(v == w and type(v) is type(w) for w in values), "one of " + ", ".join(map(str, values))


def _whole(least, most=math.inf):
    expected = f"a whole number of at least {least}" if most == math.inf else f"a whole number of {least} to {most}"
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most, expected


def _number(is_right, expected):
    return (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and is_right(v),
        f"a number {expected}",
    )


def _optional(check):
    is_right, expected = check
    return lambda v: v is None or is_right(v), f"null or {expected}"


def _list_of(is_right, expected):
    return lambda v: isinstance(v, list) and len(v) > 0 and is_right(v), expected


_PATH = (lambda v: isinstance(v, str) and v != "", "a path")
_OPTIONAL_PATH = _optional(_PATH)
_BOOL = _one_of(True, False)

# What each top-level option of the recipe may be: a test, and the words for what is expected.
EXPECTED = {
    "seed": _whole(0, 2**32 - 1),
    "output_folder": _PATH,
    "save_folder": _PATH,
    "train_csv": _PATH,
    "valid_csv": _PATH,
    "test_csv": _PATH,
    "train_log": _PATH,
    "data_folder": _OPTIONAL_PATH,
    "librispeech_folder": _OPTIONAL_PATH,
    "metadata_folder": _OPTIONAL_PATH,
    "wham_folder": _OPTIONAL_PATH,
    "synthetic_folder": _PATH,
    "train_manifest": _OPTIONAL_PATH,
    "valid_manifest": _OPTIONAL_PATH,
    "test_manifest": _OPTIONAL_PATH,
    "pretrained_folder": _OPTIONAL_PATH,
    "skip_prep": _BOOL,
    "num_spks": _one_of(1, 2, 3),
    "sample_rate": _one_of(8000, 16000),
    "train_sets": _list_of(
        lambda v: v in (["train-100"], ["train-360"], ["train-100", "train-360"], ["train-360", "train-100"]),
        "a list of train-100, train-360 or both",
    ),
    "mode": _one_of("min", "max"),
    "task": _one_of("mix_clean", "mix_both", "mix_single"),
    "quantize": _BOOL,
    "cache_gb": _number(lambda v: v >= 0, "of at least 0"),
    "synthetic_sizes": _list_of(
        lambda v: len(v) == 3 and all(type(size) is int and size >= 1 for size in v),
        "a list of three whole numbers of at least 1 (training, validation, test)",
    ),
    "synthetic_seed": _whole(0, 2**32 - 1),
    "number_of_epochs": _whole(1),
    "batch_size": _whole(1),
    "grad_accumulation_factor": _whole(1),
    "lr": _number(lambda v: v > 0, "above 0"),
    "lr_schedule": _one_of(*SCHEDULES),
    "lr_warmup": _number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
    "lr_patience": _whole(0),
    "lr_hold_epochs": _whole(0),
    "lr_min": _number(lambda v: v >= 0, "of at least 0"),
    "max_grad_norm": _number(lambda v: v > 0, "above 0"),
    "ema_decay": _number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
    "precision": _one_of("fp32", "fp16", "bf16"),
    "skip_nonfinite_grads": _BOOL,
    "ckpt_interval_minutes": _number(lambda v: v >= 0, "of at least 0"),
    "segment_seconds": _optional(_number(lambda v: v > 0, "above 0")),
    "segment": _one_of("random", "fixed"),
    "speed_perturb": _BOOL,
    "speeds": _list_of(
        lambda v: all(type(speed) is int and 50 <= speed <= 200 for speed in v),
        "a list of whole numbers of 50 to 200 (%)",
    ),
    "wave_drop": _BOOL,
    "dynamic_mixing": _BOOL,
    "dsd_mode": _one_of(*POLICIES),
    "dsd_margin_db": _number(lambda v: v >= 0, "of at least 0"),
    "dsd_start_epoch": _whole(1),
    "dsd_metric": _one_of("si_sdr", "si_sdri"),
    "dsd_max_drop_rate": _number(lambda v: 0 <= v <= 1, "from 0 to 1"),
    "dsd_patience": _whole(0),
    "cascade_pit_epochs": _whole(1),
    "cascade_fixed_epochs": _whole(1),
    "soft_min_gamma_db": _number(lambda v: v >= 0, "of at least 0"),
    "probe_size": _whole(0),
    "layerwise": _BOOL,
    "layer_weights": _one_of(*LAYER_WEIGHTS),
    "layer_permutation": _one_of(*LAYER_PERMUTATIONS),
    "eval_batch_size": _whole(1),
    "test_metrics": (
        lambda v: isinstance(v, list) and set(v) <= {"pesq", "stoi"},
        "a list of pesq and stoi, or []",
    ),
    "test_block": _optional(_whole(1)),
    "examples_interval": _whole(0),
    "test_at_end": _BOOL,
    "num_to_keep": _whole(1),
    "num_workers": _whole(0),
    "num_filters": _whole(2),
    "kernel_size": _whole(2),
    "chunk_size": _whole(2),
    "num_blocks": _whole(1),
    "num_intra_layers": _whole(1),
    "num_inter_layers": _whole(1),
    "num_heads": _whole(1),
    "d_ffn": _whole(1),
    "hidden_channels": _whole(1),
    "bottleneck_channels": _whole(1),
    "num_conv_layers": _whole(1),
    "conv_kernel": (lambda v: type(v) is int and v > 0 and v % 2 == 1, "an odd whole number of at least 1"),
    "activation_checkpointing": _BOOL,
    "dropout": _number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
}


def is_hub_name(name):
    """Whether a name is that of a model on the hub, ``owner/name`` or ``owner/name@revision``, and of nothing here.

    Example
    -------
    >>> is_hub_name("speechbrain/sepformer-libri2mix"), is_hub_name("/path/to/exported"), is_hub_name(None)
    (True, False, False)
    """
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", name or "")) and not Path(name).exists()


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def tidy_overrides(overrides):
    """Let the last of a repeated option count, and write floats such as 1e-4 in digits: HyperPyYAML takes neither.

    Arguments
    ---------
    overrides : str
        As SpeechBrain's ``parse_arguments`` returns them, a line each.

    Returns
    -------
    str

    Example
    -------
    >>> tidy_overrides("lr: 0.01\\nlr: 1e-4")
    'lr: 0.0001'
    """
    values = dict(line.split(": ", 1) for line in overrides.splitlines() if ": " in line)
    for name, value in values.items():
        if EXPECTED.get(name) in (_PATH, _OPTIONAL_PATH) and value not in ("null", "~", ""):
            values[name] = json.dumps(value, ensure_ascii=False)  # a # or a colon in a path means nothing to YAML
    values = {name: format(Decimal(v), "f") if _FLOAT.fullmatch(v.strip()) else v for name, v in values.items()}
    flags = [line for line in overrides.splitlines() if ": " not in line]
    return "\n".join([*flags, *(f"{name}: {value}" for name, value in values.items())])


def read_options(hparams_file, overrides="", run_opts=None):
    """The options of a run as plain values, without building anything.

    Arguments
    ---------
    hparams_file : str
        The YAML.
    overrides : str
        As SpeechBrain's ``parse_arguments`` returns them.
    run_opts : dict, optional
        SpeechBrain's own options that were given on the command line; those that stand in the YAML too replace them.

    Returns
    -------
    overrides : str
        All of them, as HyperPyYAML takes them.
    options : dict

    Raises
    ------
    ValueError
        If the file or the overrides cannot be read, or an override is no option of the file.
    """
    try:
        with open(hparams_file, encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"The hyper-parameter file {hparams_file} cannot be read: {reason}.") from None
    overrides = tidy_overrides(overrides)
    try:
        given = yaml.safe_load(overrides) or {}
        if not isinstance(given, dict):
            raise ValueError
        names = set(yaml.load(text, Loader=_PlainLoader))
    except (yaml.YAMLError, ValueError, TypeError):
        raise ValueError(f"Options are given as --key value, but got {overrides!r}.") from None
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean --{close[0]}?" if close else f"; its options stand in {hparams_file}."
            raise ValueError(f"There is no option --{name}{hint}")
    for name, value in (run_opts or {}).items():
        if name in names:  # so that the run's record tells them
            overrides += f"\n{name}: {value}"
    try:
        return overrides, yaml.load(resolve_references(text, overrides or None), Loader=_PlainLoader)
    except (ArithmeticError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The options of {hparams_file} cannot be resolved: {error}.") from None


def check_options(options):
    """Refuse values that are out of range, and sets that contradict each other.

    Arguments
    ---------
    options : dict
        From :func:`read_options`.

    Raises
    ------
    ValueError
        One sentence that names the option, the value and what was expected.

    Example
    -------
    >>> check_options({"dsd_mode": "dorp"})
    Traceback (most recent call last):
    ValueError: --dsd_mode can only be one of none, drop, reorder, cascade, but got 'dorp'.
    """
    for name, (is_right, expected) in EXPECTED.items():
        if name in options and not is_right(options[name]):
            raise ValueError(f"--{name} can only be {expected}, but got {options[name]!r}.")

    get = options.get
    if get("dsd_mode") in ("drop", "reorder") and get("dsd_max_drop_rate", 1) == 0:
        raise ValueError(
            f"--dsd_mode {get('dsd_mode')} contradicts --dsd_max_drop_rate 0, under which no sample is ever excluded; "
            "give a rate above 0, or --dsd_mode none."
        )
    if get("dsd_mode") == "cascade":
        if get("lr_schedule", "linear") != "linear":
            raise ValueError(
                f"--dsd_mode cascade starts from the initial weights again, which --lr_schedule {get('lr_schedule')} "
                "cannot follow; give --lr_schedule linear."
            )
        num_first = get("cascade_pit_epochs", 1) + get("cascade_fixed_epochs", 1)
        if num_first > get("number_of_epochs", num_first):
            raise ValueError(
                f"--number_of_epochs must be at least cascade_pit_epochs + cascade_fixed_epochs = {num_first}, "
                f"but got {options['number_of_epochs']}."
            )
    imposes = get("dsd_mode") in ("reorder", "cascade")
    if get("soft_min_gamma_db", 0) > 0 and imposes:
        raise ValueError(
            f"--soft_min_gamma_db {get('soft_min_gamma_db')} weighs all assignments, but --dsd_mode {get('dsd_mode')} "
            "imposes one; give one of the two."
        )
    if get("dsd_mode") == "cascade" and get("layerwise") and get("layer_permutation") == "independent":
        raise ValueError("--dsd_mode cascade fixes one assignment for all blocks; give --layer_permutation shared.")
    for name in ("kernel_size", "chunk_size", "num_filters"):
        if get(name, 2) % 2:
            raise ValueError(f"--{name} must be even, but got {options[name]}.")
    segment_seconds, kernel_size = get("segment_seconds"), get("kernel_size", 2)
    if segment_seconds and round(segment_seconds * get("sample_rate", 8000)) < kernel_size:
        raise ValueError(
            f"--segment_seconds {segment_seconds} is shorter than the encoder's kernel of {kernel_size} samples."
        )
    if get("num_filters", 1) % get("num_heads", 1):
        raise ValueError(
            f"--num_heads must divide num_filters, but got {options['num_heads']} for {options['num_filters']} filters."
        )
    if get("dynamic_mixing") and get("dsd_mode") != "none":
        raise ValueError(
            f"--dynamic_mixing True makes other mixtures in each epoch, which the memory bank of --dsd_mode "
            f"{get('dsd_mode')} cannot follow; give --dsd_mode none."
        )
    if (get("task") == "mix_single") != (get("num_spks") == 1):
        expected = "one speaker: give --num_spks 1" if get("task") == "mix_single" else "several speakers: give 2 or 3"
        raise ValueError(f"--task {get('task')} has {expected}, but got --num_spks {get('num_spks')}.")
    _check_sources(options)


def _check_sources(options):
    """Refuse data that are not given whole, given twice, or not there."""
    get = options.get
    manifests = [name for name in ("train_manifest", "valid_manifest", "test_manifest") if get(name)]
    if manifests and len(manifests) < 3:
        raise ValueError(f"--{manifests[0]} needs the other two of train_manifest, valid_manifest and test_manifest.")
    if manifests and get("data_folder"):
        raise ValueError(f"--data_folder {get('data_folder')} contradicts --{manifests[0]}; give one of the two.")
    at_load_time = [name for name in ("librispeech_folder", "wham_folder") if get(name)]
    if at_load_time:
        for name in (*manifests[:1], "data_folder"):
            if get(name):
                raise ValueError(f"--{name} {get(name)} contradicts --{at_load_time[0]}; give one of the two.")
        needed = ["librispeech_folder", "metadata_folder", *(["wham_folder"] if get("task") != "mix_clean" else [])]
        for name in needed:
            if not get(name):
                raise ValueError(f"--{at_load_time[0]} needs --{name} too, to mix {get('task')} at load time.")
    folders = ("data_folder", "librispeech_folder", "metadata_folder", "wham_folder", "pretrained_folder")
    for name in (*manifests, *folders):
        is_folder = name.endswith("_folder")
        if name == "pretrained_folder" and is_hub_name(get(name)):
            continue
        if get(name) and not Path(get(name)).exists():
            raise ValueError(f"--{name} {get(name)} does not exist.")
        if get(name) and Path(get(name)).is_dir() != is_folder:
            raise ValueError(f"--{name} {get(name)} must be a {'folder' if is_folder else 'file'}.")


# What a run keeps beside its model's form, and what it keeps until the end of an epoch that is resumed in its middle.
_RUN_OPTIONS = ("seed", "task", "mode", "probe_size", "lr_schedule", "cascade_pit_epochs", "cascade_fixed_epochs")
_EPOCH_OPTIONS = ("batch_size", "grad_accumulation_factor")


def check_resume(options, model_options, test_only=False):
    """Refuse to go on in an output folder whose checkpoints are of another model, or of another run.

    Arguments
    ---------
    options : dict
        From :func:`read_options`.
    model_options : list of str
        The options that give the model its form: :func:`dsd_modules.model_folder.model_options`.
    test_only : bool
        Whether nothing shall be trained: then there must be a checkpoint.

    Raises
    ------
    ValueError
        If an option that the checkpoints fix differs from that of the folder's last run.
    """
    checkpoints = sorted(Path(options["save_folder"]).glob("CKPT*/CKPT.yaml"), key=lambda path: path.stat().st_mtime)
    if test_only and not checkpoints:
        raise ValueError(f"--test_only needs a trained model, but {options['save_folder']} holds no checkpoint.")
    earlier_file = Path(options["output_folder"]) / "hyperparams.yaml"
    try:
        meta, earlier = yaml.safe_load(checkpoints[-1].read_text()), read_options(earlier_file)[1]
    except (IndexError, OSError, ValueError, yaml.YAMLError):
        return  # nothing to resume, or the file was cut off by a kill
    for name in model_options:
        if name not in earlier:
            raise ValueError(
                f"The run in {options['output_folder']} is of another separator, which has no --{name}; give another "
                "--output_folder."
            )
    if test_only and (options["ema_decay"] > 0) != (earlier.get("ema_decay", 0) > 0):
        raise ValueError(
            f"--ema_decay is {options['ema_decay']}, but the run in {options['output_folder']} had "
            f"{earlier.get('ema_decay', 0)}: its best weights were chosen accordingly; give that value to test them."
        )
    is_cascade = "cascade" in (options["dsd_mode"], earlier["dsd_mode"])
    names = (
        *(["dsd_mode"] if is_cascade else []),
        *model_options,
        *(() if test_only else _RUN_OPTIONS),
        *(() if meta["end-of-epoch"] else _EPOCH_OPTIONS),
    )
    for name in names:
        if name in earlier and earlier[name] != options[name]:
            raise ValueError(
                f"--{name} is {options[name]}, but the run in {options['output_folder']} had {earlier[name]}; "
                "give its value to go on, or another --output_folder."
            )


def check_run_opts(options, run_opts):
    """Refuse run options of SpeechBrain that this machine or this recipe cannot serve.

    Arguments
    ---------
    options : dict
        From :func:`read_options`.
    run_opts : RunOptions
        SpeechBrain's.

    Returns
    -------
    RunOptions
        The same, but for ``distributed_backend``: gloo where the device is the CPU and none was asked for.

    Raises
    ------
    ValueError
        If the device does not exist, cannot do the precision, or DataParallel is wanted.
    """
    if run_opts.data_parallel_backend:
        raise ValueError("--data_parallel_backend cannot gather the blocks' estimates; use torchrun instead.")
    device = run_opts.device or infer_device()
    try:
        is_cpu = torch.empty(0, device=device).device.type == "cpu"
    except (AssertionError, RuntimeError) as error:  # torch raises either
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if options["precision"] == "fp16" and is_cpu:
        raise ValueError("--precision fp16 needs a GPU, but the device is the CPU; give fp32 or bf16.")
    if not is_cpu or "distributed_backend" in run_opts.overridden_args:
        return run_opts
    given = run_opts.overridden_args | {"distributed_backend"}
    return dataclasses.replace(run_opts, distributed_backend="gloo", overridden_args=given)
