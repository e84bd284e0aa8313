"""The options of the recipe's YAML, checked before any data is touched or model built."""

from pathlib import Path

import yaml

from dsd_modules.losses import LAYER_PERMUTATIONS, LAYER_WEIGHTS
from dsd_modules.memory_bank import POLICIES
from shared_modules import options as shared
from shared_modules.options import (
    BOOL,
    OPTIONAL_PATH,
    PATH,
    check_kept,
    check_values,
    is_hub_name,
    list_of,
    number,
    one_of,
    optional,
    whole,
)
from shared_modules.schedules import SCHEDULES

# What each top-level option of the recipe may be: a test, and the words for what is expected.
EXPECTED = {
    "seed": whole(0, 2**32 - 1),
    "output_folder": PATH,
    "save_folder": PATH,
    "train_csv": PATH,
    "valid_csv": PATH,
    "test_csv": PATH,
    "train_log": PATH,
    "data_folder": OPTIONAL_PATH,
    "librispeech_folder": OPTIONAL_PATH,
    "metadata_folder": OPTIONAL_PATH,
    "wham_folder": OPTIONAL_PATH,
    "synthetic_folder": PATH,
    "train_manifest": OPTIONAL_PATH,
    "valid_manifest": OPTIONAL_PATH,
    "test_manifest": OPTIONAL_PATH,
    "pretrained_folder": OPTIONAL_PATH,
    "skip_prep": BOOL,
    "num_spks": one_of(1, 2, 3),
    "sample_rate": one_of(8000, 16000),
    "train_sets": list_of(
        lambda v: v in (["train-100"], ["train-360"], ["train-100", "train-360"], ["train-360", "train-100"]),
        "a list of train-100, train-360 or both",
    ),
    "mode": one_of("min", "max"),
    "task": one_of("mix_clean", "mix_both", "mix_single"),
    "quantize": BOOL,
    "cache_gb": number(lambda v: v >= 0, "of at least 0"),
    "synthetic_sizes": list_of(
        lambda v: len(v) == 3 and all(type(size) is int and size >= 1 for size in v),
        "a list of three whole numbers of at least 1 (training, validation, test)",
    ),
    "synthetic_seed": whole(0, 2**32 - 1),
    "number_of_epochs": whole(1),
    "batch_size": whole(1),
    "grad_accumulation_factor": whole(1),
    "lr": number(lambda v: v > 0, "above 0"),
    "lr_schedule": one_of(*SCHEDULES),
    "lr_warmup": number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
    "lr_patience": whole(0),
    "lr_hold_epochs": whole(0),
    "lr_min": number(lambda v: v >= 0, "of at least 0"),
    "max_grad_norm": number(lambda v: v > 0, "above 0"),
    "ema_decay": number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
    "precision": one_of("fp32", "fp16", "bf16"),
    "skip_nonfinite_grads": BOOL,
    "ckpt_interval_minutes": number(lambda v: v >= 0, "of at least 0"),
    "segment_seconds": optional(number(lambda v: v > 0, "above 0")),
    "segment": one_of("random", "fixed"),
    "speed_perturb": BOOL,
    "speeds": list_of(
        lambda v: all(type(speed) is int and 50 <= speed <= 200 for speed in v),
        "a list of whole numbers of 50 to 200 (%)",
    ),
    "wave_drop": BOOL,
    "dynamic_mixing": BOOL,
    "dsd_mode": one_of(*POLICIES),
    "dsd_margin_db": number(lambda v: v >= 0, "of at least 0"),
    "dsd_start_epoch": whole(1),
    "dsd_metric": one_of("si_sdr", "si_sdri"),
    "dsd_max_drop_rate": number(lambda v: 0 <= v <= 1, "from 0 to 1"),
    "dsd_patience": whole(0),
    "cascade_pit_epochs": whole(1),
    "cascade_fixed_epochs": whole(1),
    "soft_min_gamma_db": number(lambda v: v >= 0, "of at least 0"),
    "probe_size": whole(0),
    "layerwise": BOOL,
    "layer_weights": one_of(*LAYER_WEIGHTS),
    "layer_permutation": one_of(*LAYER_PERMUTATIONS),
    "eval_batch_size": whole(1),
    "test_metrics": (
        lambda v: isinstance(v, list) and set(v) <= {"pesq", "stoi"},
        "a list of pesq and stoi, or []",
    ),
    "test_block": optional(whole(1)),
    "examples_interval": whole(0),
    "test_at_end": BOOL,
    "num_to_keep": whole(1),
    "num_workers": whole(0),
    "num_filters": whole(2),
    "kernel_size": whole(2),
    "chunk_size": whole(2),
    "num_blocks": whole(1),
    "num_intra_layers": whole(1),
    "num_inter_layers": whole(1),
    "num_heads": whole(1),
    "d_ffn": whole(1),
    "hidden_channels": whole(1),
    "bottleneck_channels": whole(1),
    "num_conv_layers": whole(1),
    "conv_kernel": (lambda v: type(v) is int and v > 0 and v % 2 == 1, "an odd whole number of at least 1"),
    "activation_checkpointing": BOOL,
    "dropout": number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
}


def read_options(hparams_file, overrides="", run_opts=None):
    """The options of a separation run as plain values: :func:`shared_modules.options.read_options`."""
    return shared.read_options(hparams_file, overrides, run_opts, EXPECTED)


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
    check_values(options, EXPECTED)
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
    check_kept(options, earlier, names)
