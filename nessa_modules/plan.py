"""The plan of an experiment with two generations of a speaker model: what they are, and which pairs are tried how."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from nessa_modules.alignment import ALIGNMENTS, make_alignment
from shared_modules.options import BOOL, check_values, number, one_of, optional, whole

NESSA_KINDS = ("nessa", "nessa_runtime")
SEEDED_KINDS = (*NESSA_KINDS, "nessa_start")  # that take a seed of the experiment's, and show a progress bar
SPLITS = ("train", "alignment", "dev", "test")
SEXES = {"f": "women", "m": "men"}


class System(NamedTuple):
    """Who enrolls, who recognises, and what lies between them."""

    enroll: str
    runtime: str
    alignment: str

    @property
    def is_symmetric(self):
        """Whether both sides are of one model."""
        return self.enroll == self.runtime

    @property
    def pair(self):
        """``v1-v1`` for a symmetric pair, ``v1->v2`` for profiles of v1 and utterances of v2."""
        return f"{self.enroll}{'-' if self.is_symmetric else '->'}{self.runtime}"


PAIRS = (("v1", "v2"), ("v2", "v1"))
OLD, NEW = System("v1", "v1", "none"), System("v2", "v2", "none")
CONTROLS = (System("v1", "v1", "nessa"), System("v2", "v2", "nessa"))


@dataclass(frozen=True)
class ModelPlan:
    """How one of the two models is trained.

    Attributes
    ----------
    hparams : str
        A YAML of the recipe's ``hparams``, such as ``ecapa.yaml``.
    options : dict
        What is changed in it.
    share_of_speakers : float
        The share of the training speakers that it gets, above 0 up to 1.
    """

    hparams: str
    options: dict = field(default_factory=dict)
    share_of_speakers: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What the experiment trains and tries. Each field is explained in ``hparams/experiment_demo.yaml``.

    Example
    -------
    >>> Plan("tiny", v1=ModelPlan("xvector.yaml"), v2=ModelPlan("ecapa.yaml")).num_enroll
    3
    """

    name: str
    v1: ModelPlan
    v2: ModelPlan
    loss: str = "prototypical"
    sample_rate: int = 8000
    synthetic_sizes: dict | None = None
    synthetic_utterances: dict | None = None
    synthetic_conditions: float = 1.0
    alignment_share: float = 0.4
    align_training_speakers: bool = False
    segment_seconds: float | None = None
    alignments: dict = field(default_factory=lambda: {kind: {} for kind in ALIGNMENTS})
    num_enroll: int = 3
    sets_per_speaker: int = 6
    exclude_same_session: bool = False
    enroll_curve: tuple = (1, 2, 3)
    speakers_curve: tuple = ()
    p_target: float = 0.01
    num_draws: int = 1000


def systems_of(plan):
    """All systems that the plan's alignments make, symmetric ones first.

    Example
    -------
    >>> plan = Plan("x", ModelPlan("a"), ModelPlan("b"), alignments={"procrustes": {}, "nessa": {}})
    >>> [f"{system.pair} {system.alignment}" for system in systems_of(plan)][:4]
    ['v1-v1 none', 'v2-v2 none', 'v1->v2 procrustes', 'v1->v2 nessa']
    """
    return [OLD, NEW, *(System(*pair, kind) for pair in PAIRS for kind in plan.alignments), *CONTROLS]


_SPEAKERS_OF_SPLITS = (
    lambda v: isinstance(v, dict) and set(v) == set(SPLITS) and all(type(n) is int and n >= 2 for n in v.values()),
    f"a whole number of at least 2 for each of {', '.join(SPLITS)}",
)
_SHARE = number(lambda v: 0 < v < 1, "above 0 and below 1")
_NUMBERS = (
    lambda v: isinstance(v, (list, tuple)) and all(type(n) is int and n >= 1 for n in v),
    "a list of whole numbers of at least 1",
)
EXPECTED = {
    "loss": one_of("prototypical", "ge2e", "am_softmax"),
    "sample_rate": one_of(8000, 16000),
    "synthetic_sizes": optional(_SPEAKERS_OF_SPLITS),
    "synthetic_utterances": optional(_SPEAKERS_OF_SPLITS),
    "synthetic_conditions": number(lambda v: v >= 0, "of at least 0"),
    "alignment_share": _SHARE,
    "align_training_speakers": BOOL,
    "segment_seconds": optional(number(lambda v: v > 0, "above 0")),
    "alignments": (
        lambda v: isinstance(v, dict) and "nessa" in v and all(isinstance(each, dict) for each in v.values()),
        "the options of each kind of alignment, nessa among them",
    ),
    "num_enroll": whole(1),
    "sets_per_speaker": whole(1),
    "exclude_same_session": BOOL,
    "enroll_curve": _NUMBERS,
    "speakers_curve": _NUMBERS,
    "p_target": _SHARE,
    "num_draws": whole(2),
}


def read_plan(path):
    """Read a plan.

    Arguments
    ---------
    path : str or Path
        The YAML. It is data: nothing in it is run. It may name as its ``base`` another of the same folder, of which
        it changes only what it has; alignments, and the options of another model, are its own.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If the file cannot be read, or a key or a value is none of a plan's.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tiny.yaml"
    >>> _ = path.write_text("v1: {hparams: xvector.yaml}\\nv2: {hparams: ecapa.yaml}\\nnum_enroll: 2\\n")
    >>> plan = read_plan(path)
    >>> plan.name, plan.v2.hparams, plan.num_enroll
    ('tiny', 'ecapa.yaml', 2)
    """
    content = _read_with_bases(Path(path))
    names = {each.name for each in dataclasses.fields(Plan)} - {"name"}
    if not isinstance(content, dict) or not {"v1", "v2"} <= set(content) or not set(content) <= names:
        raise ValueError(
            f"The plan {path} must have v1 and v2, and nothing beside {', '.join(sorted(names))}, but got "
            f"{', '.join(map(str, content)) if isinstance(content, dict) else content!r}."
        )
    for version in ("v1", "v2"):
        model = content[version]
        known = {each.name for each in dataclasses.fields(ModelPlan)}
        if not isinstance(model, dict) or "hparams" not in model or not set(model) <= known:
            raise ValueError(f"{path}: {version} must have hparams, and may have options and share_of_speakers.")
        content[version] = ModelPlan(**{**model, "options": model.get("options") or {}})
        hparams, options, share = (getattr(content[version], each.name) for each in dataclasses.fields(ModelPlan))
        if not isinstance(hparams, str) or Path(hparams).name != hparams or not hparams.endswith(".yaml"):
            raise ValueError(f"{path}: hparams of {version} can only name a YAML of the recipe, but got {hparams!r}.")
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise ValueError(f"{path}: options of {version} can only be names with values, but got {options!r}.")
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise ValueError(f"{path}: share_of_speakers of {version} must be above 0, up to 1, but got {share!r}.")
    if isinstance(content.get("alignments"), dict):
        content["alignments"] = {kind: options or {} for kind, options in content["alignments"].items()}
    plan = Plan(name=Path(path).stem, **content)
    check_plan(plan)
    return plan


def _read_with_bases(path, read=()):
    """What a YAML says on top of its base, if it names one."""
    content = _read_yaml(path)
    if not isinstance(content, dict) or "base" not in content:
        return content
    base = content.pop("base")
    if not isinstance(base, str) or not base or Path(base).name != base:
        raise ValueError(f"{path}: base can only name a YAML of the same folder, but got {base!r}.")
    if base in (path.name, *read):
        raise ValueError(f"{path}: its base {base} builds on it in turn.")
    below = _read_with_bases(path.with_name(base), (path.name, *read))
    if not isinstance(below, dict):
        raise ValueError(f"{path}: its base {base} is no plan.")
    for version in ("v1", "v2"):
        models = [each.get(version) for each in (below, content)]
        if all(isinstance(each, dict) for each in models) and "hparams" in models[1]:
            below = {**below, version: {}}  # the options of another model mean nothing to it
    if "alignments" in content:
        below = {**below, "alignments": {}}
    return _merged(below, content)


def _read_yaml(path):
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The plan {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"The plan {path} is no YAML: {str(error).splitlines()[0]}.") from None


def _merged(base, changes):
    """A copy of base with the changes, key by key at every depth."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}


def check_plan(plan):
    """Refuse a plan that makes no sense.

    Arguments
    ---------
    plan : Plan

    Raises
    ------
    ValueError
        One sentence that names the value.
    """
    check_values(dataclasses.asdict(plan), EXPECTED)
    for kind, options in plan.alignments.items():
        try:
            make_alignment(kind, **options)
        except TypeError:
            raise ValueError(f"The alignment {kind} does not have all of the options {', '.join(options)}.") from None
