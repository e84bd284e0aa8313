"""PESQ and STOI of separated test mixtures, computed by several processes while the model goes on separating.

Both are optional: they need the packages ``pesq`` and ``pystoi``. This module is imported by each of the processes,
so it does without torch.
"""

import importlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

logger = logging.getLogger(__name__)

# The package of each metric, and how to install it.
PACKAGES = {
    "pesq": ("pesq", "pip install pesq (which compiles it: that takes a C compiler and Python's header files)"),
    "stoi": ("pystoi", "pip install pystoi"),
}
# What a silent or non-finite estimate gets.
_LOWEST = {"pesq": 1.0, "stoi": 0.0}
# Mixtures in wait for each process: enough to keep it busy, few enough to keep the memory small.
_BACKLOG = 4


def check_metrics(names):
    """Look whether the metrics can be computed, before hours of training.

    Arguments
    ---------
    names : list of str
        Of ``pesq`` and ``stoi``.

    Raises
    ------
    ValueError
        If a name is another one, or its package is missing: how to install it.

    Example
    -------
    >>> check_metrics(["mos"])
    Traceback (most recent call last):
    ValueError: --test_metrics can only be a list of pesq and stoi, but got 'mos' in it.
    """
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"--test_metrics can only be a list of {' and '.join(PACKAGES)}, but got {name!r} in it.")
        package, command = PACKAGES[name]
        try:
            importlib.import_module(package)
        except ImportError:
            raise ValueError(f"--test_metrics {name} needs the package {package}: {command}") from None


def pesq_score(est, ref, sample_rate):
    """PESQ as listening quality (MOS-LQO): narrow band (ITU-T P.862.1) at 8 kHz, wide band (P.862.2) at 16 kHz.

    Arguments
    ---------
    est, ref : np.ndarray
        ``[T]``. Their scales do not matter.
    sample_rate : int
        8000 or 16000 Hz.

    Returns
    -------
    float
        From 1 to 4.55 (narrow band) or 4.64 (wide band); NaN where PESQ finds no speech in the reference, and for
        less than a quarter of a second.
    """
    from pesq import BufferTooShortError, NoUtterancesError, pesq

    try:
        return float(pesq(sample_rate, ref, est, "wb" if sample_rate == 16000 else "nb"))
    except (BufferTooShortError, NoUtterancesError):
        return math.nan


def stoi_score(est, ref, sample_rate):
    """STOI, the short-time objective intelligibility (Taal et al. 2011).

    Arguments
    ---------
    est, ref : np.ndarray
        ``[T]``. Their scales do not matter.
    sample_rate : int
        Hz.

    Returns
    -------
    float
        At most 1; NaN where the reference has less than 0.4 seconds of speech, the stretch that STOI correlates.
    """
    from pystoi import stoi

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(stoi(ref.astype(np.float64), est.astype(np.float64), sample_rate))
        except (RuntimeWarning, np.exceptions.AxisError):  # the latter: not a single frame
            return math.nan


_SCORES = {"pesq": pesq_score, "stoi": stoi_score}


def _is_silent(samples):
    return np.ptp(samples) == 0


def _score(metric, est, ref, sample_rate):
    if _is_silent(ref):
        return math.nan
    if np.isfinite(est).all() and not _is_silent(est):
        # A peak of one each: PESQ computes in float32, in which an estimate far softer than its reference is silent.
        return _SCORES[metric](est / np.abs(est).max(), ref / np.abs(ref).max(), sample_rate)
    # The lowest, but only where another estimate would have a score.
    return math.nan if math.isnan(_SCORES[metric](ref, ref, sample_rate)) else _LOWEST[metric]


def quality_columns(metrics, num_spks):
    """The columns of the test table.

    Arguments
    ---------
    metrics : list of str
        Of ``pesq`` and ``stoi``.
    num_spks : int

    Returns
    -------
    list of str

    Example
    -------
    >>> quality_columns(["stoi"], num_spks=2)
    ['stoi', 'stoi_mix', 'stoi_spk1', 'stoi_spk2']
    """
    means = [f"{metric}{kind}" for metric in metrics for kind in ("", "_mix")]
    return means + [f"{metric}_spk{spk}" for spk in range(1, num_spks + 1) for metric in metrics]


def quality(est, ref, mixture, sample_rate, metrics):
    """PESQ and STOI of one separated mixture.

    What has no score is NaN and left out of the means over speakers: a speaker whose reference is silent, or of whom
    there is too little for the metric. A silent or non-finite estimate has the lowest score: 1 for PESQ, 0 for STOI.

    Arguments
    ---------
    est : np.ndarray
        Estimates in the order of the references, ``[N, T]``.
    ref : np.ndarray
        References, ``[N, T]``.
    mixture : np.ndarray
        ``[T]``.
    sample_rate : int
        Hz.
    metrics : list of str
        Of ``pesq`` and ``stoi``.

    Returns
    -------
    dict
        For each metric the mean over speakers (``pesq``), the same of the mixture in the estimates' place
        (``pesq_mix``: where separation started), and each speaker (``pesq_spk1``, ...; speaker i is reference i).

    Example
    -------
    >>> silence = np.zeros((2, 8000))
    >>> quality(silence, silence, silence[0], 8000, [])
    {}
    """
    scores = {}
    for metric in metrics:
        values = np.array(
            [
                [_score(metric, signal, reference, sample_rate) for signal in (estimate, mixture)]
                for estimate, reference in zip(est, ref, strict=True)
            ]
        )  # (N, 2)
        is_scored = ~np.isnan(values).any(1)
        means = values[is_scored].mean(0) if is_scored.any() else (math.nan, math.nan)
        scores[metric], scores[f"{metric}_mix"] = map(float, means)
        scores |= {f"{metric}_spk{spk}": float(value) for spk, value in enumerate(values[:, 0], 1)}
    return {column: scores[column] for column in quality_columns(metrics, len(ref))}


def _cores_per_rank():
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _start_process():
    """In each process: Ctrl-C is for the run itself to handle, and a run that is killed leaves no orphans."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class QualityScorer:
    """Computes :func:`quality` in other processes: submit each mixture, collect all scores at the end.

    A process that dies takes no other mixture along: PESQ's code crashes on recordings with more than 50 stretches
    of speech, which are minutes long. Such a mixture has NaN, and a warning tells.

    Arguments
    ---------
    metrics : list of str
        Of ``pesq`` and ``stoi``.
    sample_rate : int
        Hz; PESQ is defined at 8000 and 16000 alone.
    num_processes : int, optional
        None: this machine's cores, shared by its ranks.
    progressbar : bool
        Whether to show one while :meth:`collect` waits.

    Raises
    ------
    ValueError
        If a metric cannot be computed.

    Example
    -------
    >>> silence = np.zeros((2, 8000))
    >>> with QualityScorer([], sample_rate=8000, num_processes=1) as scorer:
    ...     scorer.submit("mix_1", silence, silence, silence[0])
    ...     scorer.collect()
    {'mix_1': {}}
    """

    def __init__(self, metrics, sample_rate, num_processes=None, progressbar=True):
        check_metrics(metrics)
        if "pesq" in metrics and sample_rate not in (8000, 16000):
            raise ValueError(f"PESQ is defined at 8000 and 16000 Hz, but the sample rate is {sample_rate}.")
        self.metrics = list(metrics)
        self.sample_rate = sample_rate
        self.num_processes = num_processes or _cores_per_rank()
        self.progressbar = progressbar
        self._executor = None
        self._pending = {}  # from the future to (id, arguments of quality)
        self._scores = {}

    def submit(self, sample_id, est, ref, mixture):
        """Hand in one separated mixture; waits while too many others do.

        Arguments
        ---------
        sample_id : str
            The mixture's name.
        est, ref, mixture : np.ndarray
            Without padding: estimates in the order of the references ``[N, T]``, references ``[N, T]``, mixture
            ``[T]``.
        """
        while len(self._pending) >= _BACKLOG * self.num_processes:
            self._take_finished()
        job = (est, ref, mixture, self.sample_rate, self.metrics)
        try:
            future = self._start(job)
        except BrokenProcessPool:
            self._recover()
            future = self._start(job)
        self._pending[future] = (sample_id, job)

    def collect(self):
        """Wait for the scores, and end the processes.

        Returns
        -------
        dict
            The :func:`quality` of each mixture that was submitted since the last call, by id.
        """
        title, hidden = ", ".join(self.metrics), not self.progressbar
        with tqdm(desc=title, total=len(self._pending), disable=hidden, delay=3, leave=False) as progress:
            while self._pending:
                num_pending = len(self._pending)
                self._take_finished()
                progress.update(num_pending - len(self._pending))
        self.close()
        scores, self._scores = self._scores, {}
        return scores

    def close(self):
        """End the processes; what is not done yet is lost."""
        self._pending = {}
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self, job):
        if self._executor is None:
            # Not fork, which threads and CUDA do not survive. Python has each process import what the run's script
            # imports, and the metrics: the fork server does so once for all.
            context = multiprocessing.get_context("forkserver")
            imported = (__name__, *(PACKAGES[metric][0] for metric in self.metrics), "dsd_modules.brain")
            context.set_forkserver_preload([name for name in imported if name in sys.modules])
            # For the processes to be: as many as there are cores need no further threads, which doubled STOI's time.
            os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
            self._executor = ProcessPoolExecutor(self.num_processes, context, _start_process)
        return self._executor.submit(quality, *job)

    def _take_finished(self):
        """Wait for one mixture at least."""
        for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
            if isinstance(future.exception(), BrokenProcessPool):
                self._recover()
                return
            sample_id, _ = self._pending.pop(future)
            self._scores[sample_id] = future.result()

    def _recover(self):
        """After a process died: anew and one by one, so that only the mixture that kills it has no score."""
        wait(self._pending)  # a dead process breaks them all
        pending, self._pending, self._executor = self._pending, {}, None
        for future, (sample_id, job) in pending.items():
            try:
                if isinstance(future.exception(), BrokenProcessPool):
                    future = self._start(job)
                self._scores[sample_id] = future.result()
            except BrokenProcessPool:
                self._executor = None
                columns = quality_columns(self.metrics, num_spks=len(job[1]))
                self._scores[sample_id] = dict.fromkeys(columns, math.nan)
                logger.warning("The process that computed %s of %s died.", " and ".join(self.metrics), sample_id)
