"""The experiment: two generations of a speaker model, every pair of them, every alignment, and what it gains.

A plan (a small YAML) says what the models v1 and v2 are and how they are tried. For each seed both are trained as
processes of the recipe's ``train_embeddings.py``; then all alignments are fitted to their embeddings of the alignment
speakers, and scored on the trials of the test speakers. What exists is kept: the same call goes on where it was
stopped.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import statistics
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nessa_modules.alignment import load_alignment, make_alignment
from nessa_modules.corpora import read_corpus, split_speakers, write_corpus
from nessa_modules.embeddings import embed
from nessa_modules.plan import (
    NEW,
    OLD,
    PAIRS,
    SEEDED_KINDS,
    SEXES,
    SPLITS,
    Plan,
    System,
    check_plan,
    systems_of,
)
from nessa_modules.trainings import Training, train_models
from nessa_modules.trials import make_trials, recovered_gain, same_sex, speaker_errors
from shared_modules.files import write_whole

_SCORES_FORMAT = 1
# Where one of them changes, kept scores are computed anew.
_CODE_OF_SCORES = (
    "alignment.py",
    "paired_embeddings.py",
    "linear_alignment.py",
    "logit_alignment.py",
    "nessa.py",
    "trials.py",
)
_CALLS = 5  # of what is timed, in a row


# Data


def make_corpora(plan, folder, sources=None, sexes=None, progressbar=True):
    """List the utterances of each split in ``folder/<split>.csv``.

    No two splits share a speaker, unless the plan says ``align_training_speakers``: then the training speakers' are
    among the alignment's.

    Arguments
    ---------
    plan : Plan
    folder : str or Path
        Created where it is missing. Synthetic voices are kept in it, too.
    sources : dict, optional
        From ``train``, ``dev`` and ``test`` to what :func:`nessa_modules.corpora.read_corpus` reads; the alignment
        speakers are ``plan.alignment_share`` of the training source, unless ``alignment`` has one, too. Without
        sources, voices are synthesised.
    sexes : dict, optional
        From a speaker to ``f`` or ``m``, where the sources do not tell.
    progressbar : bool

    Returns
    -------
    dict
        From a split to its list of utterances.

    Raises
    ------
    ValueError
        If there is neither a source nor a size, a source cannot be read, or splits share a speaker.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpora = _read_sources(plan, sources, progressbar) if sources else _synthesise(plan, folder, progressbar)
    speakers = {split: {utterance.speaker for utterance in corpora[split]} for split in SPLITS}
    for split, other in itertools.combinations(SPLITS, 2):
        if shared := sorted(speakers[split] & speakers[other]):
            raise ValueError(f"The splits {split} and {other} share {len(shared)} speakers, such as {shared[0]!r}.")
    if plan.align_training_speakers:
        corpora["alignment"] = sorted([*corpora["alignment"], *corpora["train"]], key=lambda each: each.id)
    if sexes:
        corpora = {
            split: [dataclasses.replace(each, sex=sexes.get(each.speaker, each.sex)) for each in utterances]
            for split, utterances in corpora.items()
        }
    for split, utterances in corpora.items():
        write_corpus(folder / f"{split}.csv", utterances)
    for version in ("v1", "v2"):
        share, utterances = getattr(plan, version).share_of_speakers, corpora["train"]
        own = utterances if share == 1 else split_speakers(utterances, [share, 1 - share], seed=0)[0]
        write_corpus(folder / f"train_{version}.csv", own)
    return corpora


def _read_sources(plan, sources, progressbar):
    corpora = {}
    for split, source in sources.items():
        # Two segments of one recording would make a trial within a session, which is too easy.
        segment_seconds = plan.segment_seconds if split in ("train", "alignment") else None
        corpora[split] = read_corpus(source, segment_seconds=segment_seconds, progressbar=progressbar)
    if "alignment" not in corpora:
        shares = [1 - plan.alignment_share, plan.alignment_share]
        corpora["train"], corpora["alignment"] = split_speakers(corpora["train"], shares, seed=0)
    return corpora


def _synthesise(plan, folder, progressbar):
    from nessa_modules.voices import make_voices

    if not (plan.synthetic_sizes and plan.synthetic_utterances):
        raise ValueError(f"The plan {plan.name} has no synthetic_sizes and synthetic_utterances; name sources of data.")
    path = make_voices(
        folder,
        plan.synthetic_sizes,
        plan.synthetic_utterances,
        sample_rate=plan.sample_rate,
        conditions=plan.synthetic_conditions,
        progressbar=progressbar,
    )
    return {split: read_corpus(path, split=split, progressbar=progressbar) for split in SPLITS}


def read_sexes(path):
    """Who is a woman and who a man.

    Arguments
    ---------
    path : str or Path
        LibriSpeech's ``SPEAKERS.TXT``, or a csv with the columns ``speaker`` and ``sex``.

    Returns
    -------
    dict
        From a speaker to ``f`` or ``m``.

    Raises
    ------
    ValueError
        If it cannot be read, or tells of no speaker.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "SPEAKERS.TXT"
    >>> _ = path.write_text(";ID  |SEX| SUBSET\\n14 | F | train-clean-360\\n16   | M | x\\n")
    >>> read_sexes(path)
    {'14': 'f', '16': 'm'}
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if lines and "speaker" in lines[0].split(",") and "sex" in lines[0].split(","):
        cells = [(row["speaker"], row["sex"]) for row in csv.DictReader(lines)]
    else:
        cells = [line.split("|")[:2] for line in lines if "|" in line and not line.startswith(";")]
    sexes = {speaker.strip(): sex.strip().lower()[:1] for speaker, sex in cells}
    sexes = {speaker: sex for speaker, sex in sexes.items() if sex in SEXES}
    if not sexes:
        raise ValueError(f"{path} tells no speaker's sex: SPEAKERS.TXT or a csv of speaker, sex was expected.")
    return sexes


# Scores


def load_encoder(folder, device="cpu"):
    """A frozen speaker model."""
    from nessa_modules.encoder import SpeakerEncoder

    return SpeakerEncoder.from_hparams(str(folder), run_opts={"device": device})


def shared_classifier(enroll_encoder, runtime_encoder):
    """The classifier weights of two models for the speakers that both were trained with.

    Arguments
    ---------
    enroll_encoder, runtime_encoder : SpeakerEncoder
        ``classifier_weight`` and ``speakers`` are used.

    Returns
    -------
    tuple of torch.Tensor or None
        ``[S, Dx]`` and ``[S, Dy]``, row by row the same speakers; None where one has no classifier, or they share
        fewer than two speakers.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> one = SimpleNamespace(classifier_weight=torch.eye(2), speakers=["a", "b"])
    >>> other = SimpleNamespace(classifier_weight=torch.eye(3), speakers=["b", "c", "a"])
    >>> shared_classifier(one, other)[1]
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    sides = []
    for encoder in (enroll_encoder, runtime_encoder):
        if encoder.classifier_weight is None or not encoder.speakers:
            return None
        sides.append({name: row for row, name in enumerate(encoder.speakers)})
    shared = [name for name in sides[0] if name in sides[1]]
    if len(shared) < 2:
        return None
    encoders = (enroll_encoder, runtime_encoder)
    return tuple(
        encoder.classifier_weight[[rows[name] for name in shared]]
        for encoder, rows in zip(encoders, sides, strict=True)
    )


def fit_alignment(kind, options, embeddings, speakers, encoders, seed=0):
    """Fit one alignment.

    Arguments
    ---------
    kind : str
        One of :data:`nessa_modules.alignment.ALIGNMENTS`.
    options : dict
        Of :func:`nessa_modules.alignment.make_alignment`.
    embeddings : tuple of torch.Tensor
        Of the enrollment and the runtime model, ``[K, Dx]`` and ``[K, Dy]``.
    speakers : list of str
        ``[K]``.
    encoders : tuple
        The two models: logits are those of their classifiers where they have them, for the same speakers.
    seed : int
        Of what NESSA draws.

    Returns
    -------
    Alignment
    """
    options = dict(options)
    if kind == "logit" and (weights := shared_classifier(*encoders)):
        options |= dict(zip(("enroll_weight", "runtime_weight"), weights, strict=True))
    if kind in SEEDED_KINDS:
        options.setdefault("seed", seed)
    return make_alignment(kind, **options).fit(*embeddings, speakers)


def subset_of_speakers(speakers, num_speakers, seed):
    """The rows of some speakers, drawn so that a larger subset holds the smaller ones.

    Example
    -------
    >>> len(subset_of_speakers(["a", "a", "b", "b", "c", "c"], 2, seed=0))
    4
    """
    names = sorted(set(speakers))
    chosen = set(np.array(names)[np.random.default_rng(seed).permutation(len(names))[:num_speakers]].tolist())
    return [row for row, name in enumerate(speakers) if name in chosen]


@dataclass(frozen=True)
class SeedWork:
    """What :func:`score_seed` needs to know; it goes to another process."""

    plan: Plan
    seed: int
    folder: Path
    models: dict
    device: str = "cpu"


def score_seed(work, progressbar=False):
    """Fit and score all systems of a seed's two models; what is there already is read.

    Arguments
    ---------
    work : SeedWork
    progressbar : bool

    Returns
    -------
    dict
        From ``(table, number, System)`` to scores ``[T]``: ``("main", 0, ...)``, ``("enroll", n, ...)`` with n
        utterances in a profile, and ``("speakers", n, ...)`` with n alignment speakers.
    """
    plan, seed = work.plan, work.seed
    encoders = {version: load_encoder(folder, work.device) for version, folder in work.models.items()}
    corpora = {split: read_corpus(work.folder / "data" / f"{split}.csv", progressbar=False) for split in SPLITS[1:]}
    path = work.folder / "scores" / f"seed_{seed}.npz"
    state = _state_of(work, encoders, corpora)
    if (found := _read_scores(path, state)) is not None:
        return found
    cache = work.folder / "embeddings"
    embeddings = {
        (version, split): embed(encoder, corpora[split], cache, progressbar)
        for version, encoder in encoders.items()
        for split in ("alignment", "test")
    }
    speakers = [utterance.speaker for utterance in corpora["alignment"]]
    trials = {n: _trials(plan, corpora["test"], n) for n in {plan.num_enroll, *plan.enroll_curve}}

    def fit(system, num_speakers=None):
        rows = range(len(speakers)) if num_speakers is None else subset_of_speakers(speakers, num_speakers, seed)
        sides = tuple(embeddings[version, "alignment"][list(rows)] for version in (system.enroll, system.runtime))
        own_encoders = encoders[system.enroll], encoders[system.runtime]
        own_speakers = [speakers[row] for row in rows]
        return fit_alignment(
            system.alignment, plan.alignments.get(system.alignment, {}), sides, own_speakers, own_encoders, seed
        )

    def score(alignment, system, num_enroll):
        tested = (embeddings[version, "test"] for version in (system.enroll, system.runtime))
        return trials[num_enroll].scores(alignment, *tested)

    curve = [n for n in plan.speakers_curve if n < len(set(speakers))]
    jobs = [(system, n) for system in systems_of(plan) for n in _fits_of(system, curve)]
    same_size = len({encoder.embedding_size for encoder in encoders.values()}) == 1
    scores = {}
    for system, num_speakers in tqdm(jobs, desc=f"Alignments of seed {seed}", disable=not progressbar, leave=False):
        if system.alignment == "none" and not system.is_symmetric and not same_size:
            continue  # cosines between spaces of different dimensions do not exist
        alignment = fit(system, num_speakers)
        if num_speakers is not None:
            scores["speakers", num_speakers, system] = score(alignment, system, plan.num_enroll)
            continue
        ids = encoders[system.enroll].model_id, encoders[system.runtime].model_id
        alignment.save(alignment_folder(work.folder, seed, system), *ids)
        scores["main", 0, system] = score(alignment, system, plan.num_enroll)
        for num_enroll in plan.enroll_curve:
            scores["enroll", num_enroll, system] = score(alignment, system, num_enroll)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path, "wb") as stream:
        np.savez(stream, state=np.array(state), **{_join(key): values for key, values in scores.items()})
    return scores


def alignment_folder(folder, seed, system):
    """Where the fitted alignment of a system is kept."""
    return Path(folder) / "alignments" / f"seed_{seed}" / system.pair.replace("->", "_to_") / system.alignment


def _fits_of(system, curve):
    """None: with all alignment speakers; else how many."""
    return (None, *curve) if not system.is_symmetric and system.alignment != "none" else (None,)


def _trials(plan, utterances, num_enroll):
    return make_trials(utterances, num_enroll, plan.sets_per_speaker, 0, plan.exclude_same_session)


def _join(key):
    table, size, system = key
    return "|".join([table, str(size), *system])


def _file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _state_of(work, encoders, corpora):
    """A hash of all that the scores depend on."""
    names = ("alignments", "num_enroll", "sets_per_speaker", "exclude_same_session", "enroll_curve", "speakers_curve")
    plan = {name: getattr(work.plan, name) for name in names}
    ids = {version: encoder.model_id for version, encoder in encoders.items()}
    utterances = [[dataclasses.astuple(utterance) for utterance in corpora[split]] for split in ("alignment", "test")]
    code = [_file_hash(Path(__file__).with_name(name)) for name in _CODE_OF_SCORES]
    parts = [_SCORES_FORMAT, work.seed, plan, ids, utterances, code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_scores(path, state):
    """The scores in a file; None where there is none, it is damaged, or of another state."""
    found = {}
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["state"]) != state:
                return None
            for name in kept.files:
                if name != "state":
                    table, size, *system = name.split("|")
                    found[table, int(size), System(*system)] = kept[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found


def score_seeds(works, jobs=1, progressbar=True):
    """:func:`score_seed` of all seeds, several at a time.

    Arguments
    ---------
    works : list of SeedWork
    jobs : int
        Processes at a time, one thread each; 1: this one.
    progressbar : bool

    Returns
    -------
    dict
        As :func:`score_seed`, with a list over seeds for each.
    """
    by_seed = {}
    with tqdm(total=len(works), desc="Alignments", unit="seed", disable=not progressbar) as bar:
        if jobs == 1 or len(works) == 1:
            for work in works:
                by_seed[work.seed] = score_seed(work, progressbar)
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(jobs, len(works)), context, torch.set_num_threads, (1,)) as pool:
                started = {pool.submit(score_seed, work): work for work in works}
                for done in as_completed(started):
                    by_seed[started[done].seed] = done.result()
                    bar.update()
    first = by_seed[works[0].seed]
    return {key: [by_seed[work.seed][key] for work in works] for key in first}


# Costs


def measure_costs(work, seconds=3.0, num_rounds=50):
    """Parameters, bytes and time of each alignment, and what it adds to the runtime model's time for an utterance.

    Arguments
    ---------
    work : SeedWork
        Whose alignments are fitted.
    seconds : float
        Length of the utterance.
    num_rounds : int
        In each round, model and alignments are timed in turn, on one thread; medians count.

    Returns
    -------
    list of dict
        A row for each asymmetric system: ``enroll``, ``runtime``, ``alignment``, ``parameters``, ``bytes``,
        ``microseconds``, ``model_microseconds`` and ``share_of_model``, the ratio of the two. Length-normalising and
        checking the embedding are part of it; without an alignment they are all of it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for enroll, runtime in PAIRS:
            encoder = load_encoder(work.models[runtime])
            generator = torch.Generator().manual_seed(0)
            noise = 0.1 * torch.randn(1, round(seconds * encoder.sample_rate), generator=generator)
            embedding = encoder.encode_batch(noise)
            alignments = {}
            for kind in work.plan.alignments:
                folder = alignment_folder(work.folder, work.seed, System(enroll, runtime, kind))
                if folder.exists():
                    alignments[kind] = load_alignment(folder)
            jobs = {None: partial(encoder.encode_batch, noise)}
            jobs |= {kind: partial(alignment.runtime, embedding) for kind, alignment in alignments.items()}
            seconds_of = _median_times(jobs, num_rounds)
            rows += [
                {
                    "enroll": enroll,
                    "runtime": runtime,
                    "alignment": kind,
                    "parameters": alignment.num_parameters,
                    "bytes": alignment.num_bytes,
                    "microseconds": round(1e6 * seconds_of[kind], 1),
                    "model_microseconds": round(1e6 * seconds_of[None], 1),
                    "share_of_model": seconds_of[kind] / seconds_of[None],
                }
                for kind, alignment in alignments.items()
            ]
        return rows
    finally:
        torch.set_num_threads(threads)


def _median_times(jobs, num_rounds):
    """Of processor time, which other work on the machine disturbs less; each job several times in a round."""
    times = {name: [] for name in jobs}
    for _ in range(num_rounds):
        for name, job in jobs.items():
            job()  # what ran before it has emptied the caches
            start = time.process_time()
            for _ in range(_CALLS):
                job()
            times[name].append((time.process_time() - start) / _CALLS)
    return {name: statistics.median(each) for name, each in times.items()}


# Results


@dataclass(frozen=True)
class Results:
    """What came out. Errors are :class:`nessa_modules.trials.ErrorRates` by :class:`System`.

    Attributes
    ----------
    plan : Plan
    seeds : list of int
    counts : dict
        From a split to its numbers of speakers and utterances.
    trials : nessa_modules.trials.Trials
    scores : dict
        From a system to its scores on these trials, one array for each seed.
    main : dict
        Errors on these trials.
    by_sex : dict
        From ``f`` and ``m`` to the errors on the trials between speakers of that sex; without those that do not exist.
    by_enroll, by_speakers : dict
        From the number of enrolled utterances, or of alignment speakers, to errors.
    gains : dict
        From an asymmetric system to its :class:`nessa_modules.trials.RecoveredGain`, by ``eer`` and ``min_dcf``.
    costs : list of dict
        See :func:`measure_costs`.
    """

    plan: Plan
    seeds: list
    counts: dict
    trials: object
    scores: dict
    main: dict
    by_sex: dict
    by_enroll: dict
    by_speakers: dict
    gains: dict
    costs: list


def evaluate(plan, seeds, corpora, scores, costs=(), progressbar=True):
    """Error rates with their intervals over speakers, and what they say.

    Arguments
    ---------
    plan : Plan
    seeds : list of int
    corpora : dict
        From a split to its utterances.
    scores : dict
        From :func:`score_seeds`.
    costs : list of dict
        From :func:`measure_costs`.
    progressbar : bool

    Returns
    -------
    Results
    """
    test = corpora["test"]
    trials = _trials(plan, test, plan.num_enroll)
    num_alignment_speakers = len({utterance.speaker for utterance in corpora["alignment"]})
    tables = {}
    for (table, size, system), by_seed in scores.items():
        tables.setdefault((table, size), {})[system] = by_seed
    options = {"num_draws": plan.num_draws, "p_target": plan.p_target}
    main_scores = tables.pop(("main", 0))
    sexes = {sex: kept for sex in SEXES if (kept := same_sex(trials, test, sex)) is not None}
    bar = tqdm(total=1 + len(sexes) + len(tables), desc="Intervals", disable=not progressbar)
    with bar:
        main = speaker_errors(trials, main_scores, **options)
        bar.update()
        by_sex = {}
        for sex, kept in sexes.items():
            rows = _positions(trials, kept)
            own = {system: [each[rows] for each in by_seed] for system, by_seed in main_scores.items()}
            by_sex[sex] = speaker_errors(kept, own, **options)
            bar.update()
        curves = {"enroll": {}, "speakers": {}}
        for (table, size), own in sorted(tables.items(), key=lambda item: item[0]):
            own_trials = _trials(plan, test, size) if table == "enroll" else trials
            is_main = table == "enroll" and size == plan.num_enroll
            curves[table][size] = main if is_main else speaker_errors(own_trials, own, **options)
            bar.update()
    if curves["speakers"]:
        curves["speakers"][num_alignment_speakers] = main
    gains = {
        system: {measure: recovered_gain(main[OLD], main[NEW], errors, measure) for measure in ("eer", "min_dcf")}
        for system, errors in main.items()
        if not system.is_symmetric
    }
    counts = {
        split: {"speakers": len({each.speaker for each in utterances}), "utterances": len(utterances)}
        for split, utterances in corpora.items()
    }
    return Results(
        plan=plan,
        seeds=list(seeds),
        counts=counts,
        trials=trials,
        scores=main_scores,
        main=main,
        by_sex=by_sex,
        by_enroll=curves["enroll"],
        by_speakers=curves["speakers"],
        gains=gains,
        costs=list(costs),
    )


def _positions(trials, kept):
    """Where the trials of a subset stand among all; both are in one order."""
    width = len(trials.test_rows)
    keys, own = (each.profile_index * width + each.test_index for each in (trials, kept))
    return np.flatnonzero(np.isin(keys, own))


def run_experiment(
    plan, folder, recipe, seeds=(1, 2, 3), sources=None, sexes=None, jobs=1, device="cpu", progressbar=True
):
    """All of it: data, models, alignments, intervals; whatever is there is kept.

    Arguments
    ---------
    plan : Plan
    folder : str or Path
        ``data``, ``models``, ``embeddings``, ``alignments`` and ``scores`` are put there.
    recipe : str or Path
        The folder of ``train_embeddings.py``.
    seeds : sequence of int
    sources, sexes
        As for :func:`make_corpora`.
    jobs : int
        Processes at a time.
    device : str
        Of the models.
    progressbar : bool

    Returns
    -------
    Results

    Raises
    ------
    ValueError
        If something is wrong with the plan or the data, or a training fails.
    """
    folder = Path(folder)
    check_plan(plan)
    corpora = make_corpora(plan, folder / "data", sources, sexes, progressbar)
    for num_enroll in {plan.num_enroll, *plan.enroll_curve}:
        _trials(plan, corpora["test"], num_enroll)  # before hours of training
    trainings = {
        (version, seed): Training(plan, version, seed, folder, device) for seed in seeds for version in ("v1", "v2")
    }
    train_models(list(trainings.values()), recipe, jobs, progressbar)
    works = [
        SeedWork(plan, seed, folder, {version: trainings[version, seed].exported for version in ("v1", "v2")}, device)
        for seed in seeds
    ]
    scores = score_seeds(works, jobs, progressbar)
    return evaluate(plan, seeds, corpora, scores, measure_costs(works[0]), progressbar)
