"""Tests of PESQ and STOI against closed forms and the packages themselves, and of the processes that compute them."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.signal import resample_poly

from dsd_modules.quality import QualityScorer, check_metrics, pesq_score, quality, quality_columns, stoi_score
from shared_modules.espeak import Voice, synthesize

VOICES = (Voice("en-us", "m3", 170, 45, 60), Voice("en-us", "f2", 165, 60, 60), Voice("en-us", "m1", 180, 30, 50))
SENTENCE = "The old house by the river had been empty for many years."


def _installed(metrics):
    """PESQ is compiled when it is installed, which needs a compiler: not every machine has it."""
    if "pesq" in metrics:
        pytest.importorskip("pesq")
    return metrics


@pytest.fixture(params=["pesq", "stoi"])
def metric(request):
    return _installed([request.param])[0]


@pytest.fixture(scope="module")
def spoken():
    """22,050 Hz."""
    return [np.frombuffer(synthesize(voice, [SENTENCE])[1][0], np.int16) / 32768 for voice in VOICES]


@pytest.fixture
def make_speech(spoken):
    """Three speakers at a sample rate of choice, ``[3, T]``, two seconds."""

    def make(sample_rate, num_spks=3):
        speech = [resample_poly(samples, sample_rate, 22050)[: 2 * sample_rate] for samples in spoken]
        return np.stack(speech)[:num_spks].astype(np.float32)

    return make


def with_noise(speech, snr_db, seed=0):
    noise = np.random.default_rng(seed).standard_normal(speech.shape)
    gain = np.sqrt(np.square(speech).mean() / np.square(noise).mean()) * 10 ** (-snr_db / 20)
    return (speech + gain * noise).astype(np.float32)


def test_perfect_estimate_has_the_highest_score(make_speech):
    """ITU-T P.862.1 and P.862.2 map PESQ's raw maximum of 4.5 to MOS."""
    _installed(["pesq"])
    narrow, wide = make_speech(8000, 1)[0], make_speech(16000, 1)[0]
    assert pesq_score(narrow, narrow, 8000) == pytest.approx(0.999 + 4 / (1 + math.exp(-1.4945 * 4.5 + 4.6607)))
    assert pesq_score(wide, wide, 16000) == pytest.approx(0.999 + 4 / (1 + math.exp(-1.3669 * 4.5 + 3.8224)))
    assert stoi_score(narrow, narrow, 8000) == pytest.approx(1)


@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_noise_lowers_the_score(metric, make_speech, sample_rate):
    score = {"pesq": pesq_score, "stoi": stoi_score}[metric]
    (speech,) = make_speech(sample_rate, 1)
    scores = [score(with_noise(speech, snr_db), speech, sample_rate) for snr_db in (40, 20, 10, 0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 0.1


@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_scores_are_those_of_the_packages(make_speech, sample_rate):
    _installed(["pesq"])
    from pesq import pesq
    from pystoi import stoi

    ref = make_speech(sample_rate)
    est, mixture = with_noise(ref, snr_db=10), ref.sum(0)
    scores = quality(est, ref, mixture, sample_rate, ["pesq", "stoi"])
    mode = {8000: "nb", 16000: "wb"}[sample_rate]
    for spk in range(3):
        expected = {"pesq": pesq(sample_rate, ref[spk], est[spk], mode), "stoi": stoi(ref[spk], est[spk], sample_rate)}
        swapped = {"pesq": pesq(sample_rate, est[spk], ref[spk], mode), "stoi": stoi(est[spk], ref[spk], sample_rate)}
        for name, value in expected.items():
            assert scores[f"{name}_spk{spk + 1}"] == pytest.approx(value, abs=1e-5)
            assert value != pytest.approx(swapped[name], abs=1e-4)
    assert scores["pesq"] == pytest.approx(np.mean([scores[f"pesq_spk{spk}"] for spk in (1, 2, 3)]))
    assert scores["stoi_mix"] == pytest.approx(np.mean([stoi(one, mixture, sample_rate) for one in ref]), abs=1e-5)
    assert scores["pesq_mix"] == pytest.approx(np.mean([pesq(sample_rate, one, mixture, mode) for one in ref]))
    assert list(scores) == quality_columns(["pesq", "stoi"], 3)


def test_scale_does_not_matter(metric, make_speech):
    ref = make_speech(8000, 2)
    est, mixture = with_noise(ref, snr_db=10), ref.sum(0)
    expected = quality(est, ref, mixture, 8000, [metric])
    assert quality(1e3 * est, 1e-2 * ref, mixture, 8000, [metric]) == pytest.approx(expected, abs=1e-4)
    for scale in (1e-30, 1e30):
        assert quality(scale * est, ref, mixture, 8000, [metric]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("silence", [0.0, 0.25])
def test_silent_reference_has_no_score(metric, make_speech, silence):
    ref = make_speech(8000)
    est, mixture = with_noise(ref, snr_db=10), ref.sum(0)
    expected = quality(est, ref, mixture, 8000, [metric])
    ref[1] = silence
    scores = quality(est, ref, mixture, 8000, [metric])
    assert math.isnan(scores[f"{metric}_spk2"])
    for spk in (1, 3):
        assert scores[f"{metric}_spk{spk}"] == expected[f"{metric}_spk{spk}"]
    assert scores[metric] == pytest.approx((scores[f"{metric}_spk1"] + scores[f"{metric}_spk3"]) / 2)
    assert math.isfinite(scores[f"{metric}_mix"])


@pytest.mark.parametrize("failure", [0.0, 0.25, math.nan, math.inf])
def test_failed_estimate_has_the_lowest_score(metric, make_speech, failure):
    ref = make_speech(8000, 2)
    est, mixture = with_noise(ref, snr_db=10), ref.sum(0)
    expected = quality(est, ref, mixture, 8000, [metric])
    est[0] = failure
    scores = quality(est, ref, mixture, 8000, [metric])
    assert scores[f"{metric}_spk1"] == {"pesq": 1, "stoi": 0}[metric]
    assert scores[f"{metric}_spk2"] == expected[f"{metric}_spk2"]
    assert scores[metric] == pytest.approx((scores[f"{metric}_spk1"] + scores[f"{metric}_spk2"]) / 2)
    assert scores[f"{metric}_mix"] == expected[f"{metric}_mix"]


@pytest.mark.parametrize(("seconds", "scored"), [(1 / 80, ()), (0.2, ()), (0.3, ("pesq",)), (0.5, ("pesq", "stoi"))])
@pytest.mark.parametrize("estimate", ["noisy", "silent"])
def test_short_mixture(metric, make_speech, seconds, scored, estimate):
    """A quarter of a second for PESQ, 0.4 s of speech for STOI, whatever the estimate."""
    ref = make_speech(8000, 2)[:, 4000 : 4000 + round(8000 * seconds)]
    est = with_noise(ref, snr_db=10) if estimate == "noisy" else np.zeros_like(ref)
    scores = quality(est, ref, ref.sum(0), 8000, [metric])
    assert {math.isfinite(score) for score in scores.values()} == {metric in scored}


def make_jobs(ref, num_jobs):
    return {f"mix_{i}": (with_noise(ref, snr_db=5 * i, seed=i), ref, ref.sum(0)) for i in range(num_jobs)}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_any_number_of_processes_gives_the_same(make_speech, num_processes):
    """More mixtures than may wait, and a second round in the same scorer."""
    metrics = _installed(["pesq", "stoi"])
    jobs = make_jobs(make_speech(8000), 6)
    expected = {sample_id: quality(*job, 8000, metrics) for sample_id, job in jobs.items()}
    with QualityScorer(metrics, 8000, num_processes=num_processes, progressbar=False) as scorer:
        for sample_id, job in jobs.items():
            scorer.submit(sample_id, *job)
        scores = scorer.collect()
        assert scores.keys() == expected.keys()
        for sample_id, score in scores.items():  # BLAS may have other threads there, and add in another order
            assert score == pytest.approx(expected[sample_id], rel=1e-9)
        assert scorer.collect() == {}
        scorer.submit("mix_3", *jobs["mix_3"])
        assert scorer.collect() == {"mix_3": scores["mix_3"]}


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_process_that_dies_takes_no_other_mixture_along(make_speech, caplog):
    jobs = make_jobs(make_speech(8000, 2), 6)
    expected = {sample_id: quality(*job, 8000, ["stoi"]) for sample_id, job in jobs.items()}
    for sample_id in ("mix_1", "mix_5"):
        jobs[sample_id] = (_Deadly(), *jobs[sample_id][1:])
        expected[sample_id] = dict.fromkeys(quality_columns(["stoi"], 2), math.nan)
    with QualityScorer(["stoi"], 8000, num_processes=1, progressbar=False) as scorer:
        for sample_id, job in jobs.items():
            scorer.submit(sample_id, *job)
        scores = scorer.collect()
    assert scores.keys() == expected.keys()
    for sample_id, score in scores.items():
        assert score == pytest.approx(expected[sample_id], nan_ok=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"The process that computed stoi of {sample_id} died." for sample_id in ("mix_1", "mix_5")
    ]


def test_error_of_a_process_reaches_the_run(make_speech):
    ref = make_speech(8000, 2)
    with QualityScorer(["stoi"], 8000, num_processes=1, progressbar=False) as scorer:
        scorer.submit("mix", ref[:1], ref, ref.sum(0))
        with pytest.raises(ValueError, match="argument 2 is longer"):
            scorer.collect()


def _goes_on(process):
    """A process that has ended may wait in the table for good: the first one of a container need not look after it."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # gone since, or no Linux
        return not os.path.isdir("/proc/self")


def test_killed_run_leaves_no_processes():
    script = (
        "import multiprocessing, os, signal, numpy\n"
        "from dsd_modules.quality import QualityScorer\n"
        "scorer = QualityScorer([], 8000, num_processes=2)\n"
        "for i in range(4): scorer.submit(str(i), *[numpy.zeros((1, 9))] * 3)\n"
        "print(*scorer._executor._processes, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    processes = [int(number) for number in killed.stdout.split()]
    assert len(processes) == 2
    for process in processes:
        for _ in range(600):
            if not _goes_on(process):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {process} goes on")


@pytest.mark.parametrize(("name", "package"), [("pesq", "pesq"), ("stoi", "pystoi")])
def test_missing_package(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"^--test_metrics {name} needs the package {package}: pip install {package}"):
        check_metrics([name])
    with pytest.raises(ValueError, match="pip install"):
        QualityScorer([name], 8000)
    check_metrics([])


def test_wrong_metric_or_sample_rate():
    _installed(["pesq"])
    with pytest.raises(ValueError, match="pesq and stoi, but got 'sdr' in it"):
        check_metrics(["stoi", "sdr"])
    with pytest.raises(ValueError, match="the sample rate is 22050"):
        QualityScorer(["pesq"], 22050)


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert QualityScorer(["stoi"], 8000).num_processes == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert QualityScorer(["stoi"], 8000).num_processes == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert QualityScorer(["stoi"], 8000).num_processes == 1
