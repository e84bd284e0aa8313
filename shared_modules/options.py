"""The options of a recipe's YAML: read as plain values, and checked before any data is touched or model built."""

import dataclasses
import difflib
import json
import math
import re
from decimal import Decimal
from pathlib import Path

import yaml
from hyperpyyaml import resolve_references
from speechbrain.utils.distributed import infer_device

from shared_modules.devices import find_device


class _PlainLoader(yaml.SafeLoader):
    """Reads the scalars of a HyperPyYAML text; what would be built is left out."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


# What an option may be: a test of its value, and the words for what is expected, as :func:`check_values` takes them.


def one_of(*values):
    """One of some values.

    Example
    -------
    >>> is_right, words = one_of("drop", "reorder")
    >>> is_right("reorder"), is_right("keep"), words
    (True, False, 'one of drop, reorder')
    """
    # True == 1 == 1.0, so the type counts too.
    return lambda v: any(v == w and type(v) is type(w) for w in values), "one of " + ", ".join(map(str, values))


def whole(least, most=math.inf):
    """A whole number in a range, both ends included.

    Example
    -------
    >>> is_right, words = whole(1)
    >>> is_right(3), is_right(0), is_right(2.0), words
    (True, False, False, 'a whole number of at least 1')
    """
    expected = f"a whole number of at least {least}" if most == math.inf else f"a whole number of {least} to {most}"
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most, expected


def number(is_right, expected):
    """A finite number that passes a test, which the words expected tell.

    Example
    -------
    >>> is_right, words = number(lambda v: v > 0, "above 0")
    >>> is_right(0.5), is_right(0), is_right(float("inf")), words
    (True, False, False, 'a number above 0')
    """
    return (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and is_right(v),
        f"a number {expected}",
    )


def optional(check):
    """Nothing, or what another check takes.

    Example
    -------
    >>> optional(whole(1))[1]
    'null or a whole number of at least 1'
    """
    is_right, expected = check
    return lambda v: v is None or is_right(v), f"null or {expected}"


def list_of(is_right, expected):
    """A list that is not empty and passes a test, which the words expected tell.

    Example
    -------
    >>> is_right, words = list_of(lambda v: len(set(v)) == len(v), "a list of different values")
    >>> is_right([1, 2]), is_right([1, 1]), is_right([])
    (True, False, False)
    """
    return lambda v: isinstance(v, list) and len(v) > 0 and is_right(v), expected


PATH = (lambda v: isinstance(v, str) and v != "", "a path")
OPTIONAL_PATH = optional(PATH)
BOOL = one_of(True, False)


def is_hub_name(name):
    """Whether a name is that of a model on the hub, ``owner/name`` or ``owner/name@revision``, and of nothing here.

    Example
    -------
    >>> is_hub_name("speechbrain/sepformer-libri2mix"), is_hub_name("/path/to/exported"), is_hub_name(None)
    (True, False, False)
    """
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", name or "")) and not Path(name).exists()


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def tidy_overrides(overrides, expected=None):
    """Let the last of a repeated option count, and write floats such as 1e-4 in digits: HyperPyYAML takes neither.

    Arguments
    ---------
    overrides : str
        As SpeechBrain's ``parse_arguments`` returns them, a line each.
    expected : dict, optional
        As for :func:`check_values`.

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
        if (expected or {}).get(name) in (PATH, OPTIONAL_PATH) and value not in ("null", "~", ""):
            values[name] = json.dumps(value, ensure_ascii=False)  # a # or a colon in a path means nothing to YAML
    values = {name: format(Decimal(v), "f") if _FLOAT.fullmatch(v.strip()) else v for name, v in values.items()}
    flags = [line for line in overrides.splitlines() if ": " not in line]
    return "\n".join([*flags, *(f"{name}: {value}" for name, value in values.items())])


def read_options(hparams_file, overrides="", run_opts=None, expected=None):
    """The options of a run as plain values, without building anything.

    Arguments
    ---------
    hparams_file : str
        The YAML.
    overrides : str
        As SpeechBrain's ``parse_arguments`` returns them.
    expected : dict, optional
        What each option may be, as for :func:`check_values`: paths are taken as they are.
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
    overrides = tidy_overrides(overrides, expected)
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


def check_values(options, expected):
    """Refuse values that are out of range.

    Arguments
    ---------
    options : dict
        From :func:`read_options`.
    expected : dict
        From an option's name to what it may be: a test, and the words for what is expected.

    Raises
    ------
    ValueError
        One sentence that names the option, the value and what was expected.

    Example
    -------
    >>> check_values({"batch_size": 0}, {"batch_size": whole(1)})
    Traceback (most recent call last):
    ValueError: --batch_size can only be a whole number of at least 1, but got 0.
    """
    for name, (is_right, words) in expected.items():
        if name in options and not is_right(options[name]):
            raise ValueError(f"--{name} can only be {words}, but got {options[name]!r}.")


def check_kept(options, earlier, names):
    """Refuse to go on in an output folder with other values than its run had.

    Arguments
    ---------
    options, earlier : dict
        From :func:`read_options`: what is asked for, and what the folder's last run had.
    names : iterable of str
        The options that must be kept; those that the earlier run did not have yet are not compared.

    Raises
    ------
    ValueError
        One sentence that names the option and both values.

    Example
    -------
    >>> check_kept({"seed": 2, "output_folder": "out"}, {"seed": 1}, ["seed"])
    Traceback (most recent call last):
    ValueError: --seed is 2, but the run in out had 1; give its value to go on, or another --output_folder.
    """
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
        raise ValueError("--data_parallel_backend is not supported; use torchrun for several GPUs.")
    device = run_opts.device or infer_device()
    is_cpu = find_device(device).type == "cpu"
    if options["precision"] == "fp16" and is_cpu:
        raise ValueError("--precision fp16 needs a GPU, but the device is the CPU; give fp32 or bf16.")
    if not is_cpu or "distributed_backend" in run_opts.overridden_args:
        return run_opts
    given = run_opts.overridden_args | {"distributed_backend"}
    return dataclasses.replace(run_opts, distributed_backend="gloo", overridden_args=given)
