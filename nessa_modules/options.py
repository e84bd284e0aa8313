"""The options of the embedding recipes' YAML, checked before any data is touched or model built."""

import os
from pathlib import Path

import yaml

from nessa_modules.losses import LOSSES
from shared_modules import options as shared
from shared_modules.options import (
    BOOL,
    OPTIONAL_PATH,
    PATH,
    check_kept,
    check_values,
    list_of,
    number,
    one_of,
    optional,
    whole,
)
from shared_modules.schedules import SCHEDULES

# What each option of the data may be, of every script: a test, and the words for what is expected.
DATA_OPTIONS = {
    "data_folder": OPTIONAL_PATH,
    "dev_csv": OPTIONAL_PATH,
    "speaker_shares": list_of(
        lambda v: len(v) == 4 and all(type(x) in (int, float) and x > 0 for x in v) and abs(sum(v) - 1) < 1e-6,
        "a list of four numbers above 0 (training, alignment, validation, test), 1 in all",
    ),
    "split_seed": whole(0, 2**32 - 1),
    "synthetic_folder": PATH,
    "synthetic_speakers": list_of(
        lambda v: len(v) == 4 and all(type(size) is int and size >= 2 for size in v),
        "a list of four whole numbers of at least 2 (training, alignment, validation, test)",
    ),
    "synthetic_utterances": whole(2),
    "synthetic_conditions": number(lambda v: v >= 0, "of at least 0"),
    "synthetic_seed": whole(0, 2**32 - 1),
    "min_seconds": number(lambda v: v > 0, "above 0"),
    "segment_seconds": optional(number(lambda v: v > 0, "above 0")),
    "sample_rate": one_of(8000, 16000),
    "skip_prep": BOOL,
}
# The same of each top-level option of the embedding recipes.
EXPECTED = {
    "seed": whole(0, 2**32 - 1),
    "output_folder": PATH,
    "save_folder": PATH,
    "train_log": PATH,
    **DATA_OPTIONS,
    "train_csv": OPTIONAL_PATH,
    "loss": one_of(*LOSSES),
    "margin": number(lambda v: 0 <= v <= 1, "from 0 to 1"),
    "scale": number(lambda v: v > 0, "above 0"),
    "out_n_neurons": optional(whole(2)),
    "number_of_epochs": whole(1),
    "steps_per_epoch": whole(1),
    "speakers_per_batch": whole(2),
    "utterances_per_speaker": whole(1),
    "crop_seconds": number(lambda v: v >= 0.25, "of at least 0.25"),
    "lr": number(lambda v: v > 0, "above 0"),
    "lr_schedule": one_of(*SCHEDULES),
    "lr_warmup": number(lambda v: 0 <= v < 1, "from 0 up to (not with) 1"),
    "lr_patience": whole(0),
    "lr_hold_epochs": whole(0),
    "lr_min": number(lambda v: v >= 0, "of at least 0"),
    "weight_decay": number(lambda v: v >= 0, "of at least 0"),
    "max_grad_norm": number(lambda v: v > 0, "above 0"),
    "precision": one_of("fp32", "fp16", "bf16"),
    "skip_nonfinite_grads": BOOL,
    "dev_crop_seconds": number(lambda v: v >= 0.25, "of at least 0.25"),
    "dev_batch_size": whole(1),
    "dev_utterances": whole(4),
    "num_to_keep": whole(1),
    "num_workers": whole(0),
    "n_mels": whole(4, 512),
    "n_fft": whole(16, 16384),
    "hop_ms": number(lambda v: 1 <= v <= 25, "of 1 to 25"),
    "embedding_size": whole(2),
    "channels": whole(2),
    "last_channels": whole(2),
    "attention_channels": whole(1),
    "se_channels": whole(1),
    "res2net_scale": whole(2),
}


def read_options(hparams_file, overrides="", run_opts=None):
    """The options of an embedding run as plain values: :func:`shared_modules.options.read_options`."""
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
    >>> check_options({"loss": "triplet"})
    Traceback (most recent call last):
    ValueError: --loss can only be one of prototypical, ge2e, am_softmax, but got 'triplet'.
    """
    check_values(options, EXPECTED)
    get = options.get
    if get("loss") in ("prototypical", "ge2e") and get("utterances_per_speaker", 2) < 2:
        raise ValueError(
            f"--loss {get('loss')} compares utterances of a speaker with each other; give at least 2 for "
            f"--utterances_per_speaker, not {get('utterances_per_speaker')}."
        )
    if get("channels", 0) % get("res2net_scale", 1):
        raise ValueError(
            f"--res2net_scale must divide channels, but got {get('res2net_scale')} for {get('channels')} channels."
        )
    if get("n_fft", 2**14) * 40 < get("sample_rate", 0):
        raise ValueError(
            f"--n_fft can only be {get('sample_rate') // 40} or more at {get('sample_rate')} Hz, the points of 25 ms, "
            f"but got {get('n_fft')}."
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":  # each rank would see other speakers to tell apart
        raise ValueError("Embeddings are trained by one process, but torchrun started several; start it without.")


# What a run keeps: its model, its data, and what its steps follow from.
_RUN_OPTIONS = tuple(
    name
    for name in EXPECTED
    if name not in ("output_folder", "save_folder", "train_log", "num_workers", "num_to_keep", "dev_batch_size")
    and name not in ("number_of_epochs", "synthetic_folder", "skip_prep", "skip_nonfinite_grads")
)


def check_resume(options):
    """Refuse to go on in an output folder whose checkpoints are of another run.

    Arguments
    ---------
    options : dict
        From :func:`read_options`.

    Raises
    ------
    ValueError
        If an option that the checkpoints depend on differs from that of the folder's last run.
    """
    if not any(Path(options["save_folder"]).glob("CKPT*/CKPT.yaml")):
        return
    try:
        earlier = read_options(Path(options["output_folder"]) / "hyperparams.yaml")[1]
    except (OSError, ValueError, yaml.YAMLError):
        return  # the file was cut off by a kill
    if any((name in earlier) != (name in options) for name in _RUN_OPTIONS):
        raise ValueError(
            f"The run in {options['output_folder']} is of another kind of model; give another --output_folder."
        )
    check_kept(options, earlier, (name for name in _RUN_OPTIONS if name != "out_n_neurons"))
