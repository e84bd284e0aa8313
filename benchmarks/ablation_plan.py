"""What the ablation compares: arms (ways to train) in regimes (what is trained, on what), all from the recipe's YAML.

A run is one arm in one regime with one seed. Everything that differs between two runs stands here, as overrides of
recipes/LibriMix/separation/hparams/sepformer_dsd.yaml.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

PLAIN_PIT = "plain_pit"
DSD_LO = "dsd_drop_lo"
MAIN_ARMS = (PLAIN_PIT, "dsd_drop", "lo", DSD_LO)

_PLAIN = {"dsd_mode": "none", "layerwise": False}
_DSD_LO = {"dsd_mode": "drop", "layerwise": True}


@dataclass(frozen=True)
class Arm:
    """A way to train: its name in tables and figures, and the overrides."""

    label: str
    overrides: dict


ARMS = {
    PLAIN_PIT: Arm("plain PIT", _PLAIN),
    "dsd_drop": Arm("DSD drop", {"dsd_mode": "drop", "layerwise": False}),
    "lo": Arm("LO", {"dsd_mode": "none", "layerwise": True}),
    DSD_LO: Arm("DSD drop + LO", _DSD_LO),
    # Controls from the literature.
    "cascaded_pit": Arm("cascaded PIT", {"dsd_mode": "cascade", "layerwise": False}),  # stages: see overrides()
    "prob_pit": Arm("probabilistic PIT, 1 dB", {**_PLAIN, "soft_min_gamma_db": 1.0}),
    "dsd_reorder": Arm("DSD reorder", {"dsd_mode": "reorder", "layerwise": False}),
    "dsd_reorder_lo": Arm("DSD reorder + LO", {"dsd_mode": "reorder", "layerwise": True}),
    # One option of DSD + LO changed.
    "dsd_drop_lo_si_sdri": Arm("DSD drop + LO, dsd_metric si_sdri", {**_DSD_LO, "dsd_metric": "si_sdri"}),
    "dsd_drop_lo_margin1": Arm("DSD drop + LO, margin 1 dB", {**_DSD_LO, "dsd_margin_db": 1.0}),
    "dsd_drop_lo_independent": Arm("DSD drop + LO, independent", {**_DSD_LO, "layer_permutation": "independent"}),
    # The search: plain PIT alone, looked at on the dev set alone.
    "lr_0.0006": Arm("plain PIT, lr 0.0006", {**_PLAIN, "lr": 0.0006}),
    "lr_0.0012": Arm("plain PIT, lr 0.0012", {**_PLAIN, "lr": 0.0012}),
    "lr_0.0024": Arm("plain PIT, lr 0.0024", {**_PLAIN, "lr": 0.0024}),
    "batch_2": Arm("plain PIT, lr 0.0012, batch size 2", {**_PLAIN, "lr": 0.0012, "batch_size": 2}),
}


@dataclass(frozen=True)
class Data:
    """A data set to mix: ``source`` is ``recordings`` or ``synthetic`` (voices)."""

    source: str = "recordings"
    num_spks: int = 2
    max_seconds: float | None = 2.0  # of a mixture
    num_train: int = 1200


@dataclass(frozen=True)
class Regime:
    """What is trained, on what, and how long; with the arms that are compared there."""

    label: str
    arms: tuple  # with one seed
    main_arms: tuple = ()  # with several
    data: Data = Data()
    overrides: dict = field(default_factory=dict)
    length: float = 1.0  # epochs, as a multiple of --epochs
    is_tested: bool = True


_PAIR = (PLAIN_PIT, DSD_LO)

# In the order in which they run.
REGIMES = {
    "search": Regime(
        "search of the hyper-parameters",
        ("lr_0.0006", "lr_0.0012", "lr_0.0024", "batch_2"),
        length=0.5,
        is_tested=False,
    ),
    "main": Regime(
        "2 speakers, 2 blocks", ("cascaded_pit", "prob_pit", "dsd_reorder", "dsd_reorder_lo"), main_arms=MAIN_ARMS
    ),
    "half": Regime("half as long", (*_PAIR, "dsd_drop_lo_margin1", "dsd_drop_lo_independent"), length=0.5),
    "three_speakers": Regime("3 speakers", _PAIR, data=Data(num_spks=3), overrides={"num_spks": 3}, length=0.5),
    "four_blocks": Regime("4 blocks", _PAIR, overrides={"num_blocks": 4}, length=0.5),
    "small_train": Regime("300 training mixtures, half as long", _PAIR, data=Data(num_train=300), length=2),
    "random_crops": Regime(
        "random 2 s crops of mixtures up to 6 s",
        (*_PAIR, "dsd_drop_lo_si_sdri"),
        data=Data(max_seconds=6.0),
        length=0.5,
    ),
    "fixed_crops": Regime(
        "fixed 2 s crops of mixtures up to 6 s",
        _PAIR,
        data=Data(max_seconds=6.0),
        overrides={"segment": "fixed"},
        length=0.5,
    ),
    "synthetic": Regime("synthetic voices", _PAIR, data=Data(source="synthetic"), length=0.5),
}

# The small model and its training; chosen by the search on plain PIT and the dev set.
TRAINING = {
    "batch_size": 1,
    "segment_seconds": 2,
    "lr": 0.0012,
    "lr_schedule": "linear",
    "lr_warmup": 0.05,
    "num_filters": 64,
    "kernel_size": 32,
    "chunk_size": 50,
    "num_blocks": 2,
    "num_intra_layers": 1,
    "num_inter_layers": 1,
    "num_heads": 2,
    "d_ffn": 128,
    "num_workers": 0,
    "probe_size": 64,
    "examples_interval": 0,
}


class Run(NamedTuple):
    """One training."""

    regime: str
    arm: str
    seed: int


def plan(regimes, num_seeds):
    """The runs in their order: a regime's main arms with the first seed, with the next, then its other arms.

    Arguments
    ---------
    regimes : sequence of str
        Names of :data:`REGIMES`.
    num_seeds : int
        Of the main arms.

    Returns
    -------
    list of Run

    Example
    -------
    >>> [(run.arm, run.seed) for run in plan(["main"], 2)[3:6]]
    [('dsd_drop_lo', 1), ('plain_pit', 2), ('dsd_drop', 2)]
    """
    runs = []
    for name in regimes:
        regime = REGIMES[name]
        runs += [Run(name, arm, seed) for seed in range(1, num_seeds + 1) for arm in regime.main_arms]
        runs += [Run(name, arm, 1) for arm in regime.arms]
    return runs


def num_epochs(run, epochs):
    """The epochs of a run where the main arms have ``epochs``; at least 1."""
    return max(round(epochs * REGIMES[run.regime].length), 1)


def overrides(run, epochs):
    """What the run changes in the YAML.

    Arguments
    ---------
    run : Run
        The run.
    epochs : int
        Of the main arms.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If a run with stages has fewer epochs than these.

    Example
    -------
    >>> overrides(Run("three_speakers", "plain_pit", 1), 6)["num_spks"]
    3
    """
    number_of_epochs = num_epochs(run, epochs)
    if ARMS[run.arm].overrides["dsd_mode"] == "cascade" and number_of_epochs < 3:
        raise ValueError(f"{run.arm} has three stages and needs at least 3 epochs, but got {number_of_epochs}.")
    options = {
        **TRAINING,
        **REGIMES[run.regime].overrides,
        **ARMS[run.arm].overrides,
        "number_of_epochs": number_of_epochs,
        "seed": run.seed,
    }
    if options["dsd_mode"] == "cascade":  # a third of the steps for each stage
        options["cascade_pit_epochs"] = options["cascade_fixed_epochs"] = max(number_of_epochs // 3, 1)
    return options
