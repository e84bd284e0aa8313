"""Tests of the scores against fast_bss_eval and closed forms, and of the table of results."""

import itertools
import math
import os

import fast_bss_eval
import numpy as np
import pytest
import scipy.linalg
import torch

from dsd_modules.compare import comparison_table
from dsd_modules.evaluation import best_permutations, read_results, score_batch, write_results
from dsd_modules.permutation import reorder_estimates
from dsd_modules.quality import quality_columns
from shared_modules.files import read_table, write_whole


def make_batch(num_blocks=2, batch=3, num_spks=2, num_samples=4000, seed=0):
    """Coloured noise with an offset, estimates in a random order with crosstalk, and the mixtures."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(batch, num_spks, num_samples, generator=generator)
    ref = ref.cumsum(-1) * 0.05 + ref  # not white, not zero-mean
    order = torch.stack([torch.randperm(num_spks, generator=generator) for _ in range(batch)])
    est = torch.take_along_dim(ref, order.unsqueeze(-1), dim=1) + 0.3 * ref.flip(1)
    noise = torch.randn(num_blocks, batch, num_spks, num_samples, generator=generator)
    return 2 * est + 0.5 * noise, ref, ref.sum(1)


def oracle(est, ref, mixture, filter_length):
    """Per-speaker scores and improvements of one item by fast_bss_eval, under SI-SDR's best permutation."""
    orders = itertools.permutations(range(len(ref)))
    best = max(orders, key=lambda order: -fast_bss_eval.si_sdr_loss(est[list(order)], ref, zero_mean=True).mean())
    options = {"filter_length": filter_length, "zero_mean": filter_length == 1}
    score = -fast_bss_eval.sdr_loss(est[list(best)], ref, **options)
    return score, score + fast_bss_eval.sdr_loss(mixture.expand_as(ref), ref, **options)


@pytest.mark.parametrize("num_spks", [2, 3])
def test_scores_equal_fast_bss_eval(num_spks):
    est, ref, mixture = make_batch(num_spks=num_spks)
    for b, scores in enumerate(score_batch(est, ref, mixture)):
        signals = est[-1, b].double(), ref[b].double(), mixture[b].double()
        si_sdr, si_sdri = oracle(*signals, filter_length=1)
        sdr, sdri = oracle(*signals, filter_length=512)
        for name, value in {"si_sdr": si_sdr, "si_sdri": si_sdri, "sdr": sdr, "sdri": sdri}.items():
            assert scores[name] == pytest.approx(value.mean().item(), abs=1e-4)
            for i in range(num_spks):
                assert scores[f"{name}_spk{i + 1}"] == pytest.approx(value[i].item(), abs=1e-4)
        for block in range(2):
            _, improvement = oracle(est[block, b].double(), *signals[1:], filter_length=1)
            assert scores[f"si_sdri_block{block + 1}"] == pytest.approx(improvement.mean().item(), abs=1e-4)


def test_sdr_equals_its_definition():
    """The energy of the projection on 512 shifts of the reference over that of the rest (Vincent et al. 2006)."""
    est, ref, mixture = make_batch(num_blocks=1, batch=1, num_samples=1500)
    (scores,) = score_batch(est, ref, mixture)
    for i, sdr in enumerate([scores["sdr_spk1"], scores["sdr_spk2"]]):
        shifts = scipy.linalg.convolution_matrix(ref[0, i].double().numpy(), 512)
        sdrs = []
        for signal in est[0, 0].double().numpy():
            signal = np.pad(signal, (0, 511))
            projection = shifts @ np.linalg.lstsq(shifts, signal)[0]
            sdrs.append(10 * np.log10((projection**2).sum() / ((signal - projection) ** 2).sum()))
        assert sdr == pytest.approx(max(sdrs), abs=1e-4)


def test_closed_form():
    """Orthogonal sines: an estimate with 1/10 of the other speaker has 20 dB, the mixture 0 dB."""
    time = torch.arange(8000) / 8000
    ref = torch.stack([torch.sin(2 * math.pi * 100 * time), torch.sin(2 * math.pi * 200 * time)])[None]
    est = (ref + 0.1 * ref.flip(1) + 0.7).flip(1)[None]  # wrong order, and an offset that must not count
    (scores,) = score_batch(est, ref, ref.sum(1))
    assert scores["si_sdr"] == pytest.approx(20, abs=1e-3)
    assert scores["si_sdri_spk2"] == pytest.approx(20, abs=1e-3)
    assert all(math.isfinite(value) for value in scores.values())


def test_keys_and_their_order():
    est, ref, mixture = make_batch(num_blocks=3, batch=1)
    assert list(score_batch(est, ref, mixture)[0]) == [
        *("si_sdr", "si_sdri", "sdr", "sdri"),
        *("si_sdr_spk1", "si_sdri_spk1", "sdr_spk1", "sdri_spk1"),
        *("si_sdr_spk2", "si_sdri_spk2", "sdr_spk2", "sdri_spk2"),
        *("si_sdri_block1", "si_sdri_block2", "si_sdri_block3"),
    ]


def test_each_block_has_its_own_assignment():
    est, ref, mixture = make_batch(num_blocks=1, num_spks=3)
    for same, swapped in zip(
        score_batch(torch.cat([est, est]), ref, mixture),
        score_batch(torch.cat([est[:, :, [1, 2, 0]], est]), ref, mixture),
        strict=True,
    ):
        assert swapped == pytest.approx(same)
        assert swapped["si_sdri_block1"] == pytest.approx(swapped["si_sdri"])


@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_best_permutations(num_spks):
    """Against a search with fast_bss_eval; where an estimate failed, the others are assigned as before."""
    est, ref, mixture = make_batch(num_spks=num_spks)
    lengths = torch.tensor([4000, 2500, 3333])
    mixture = mixture + est[0, :, 0]  # not the reference already, for a single speaker
    est[0, 1, 0] = math.nan
    perm = best_permutations(est, ref, lengths)
    orders = list(itertools.permutations(range(num_spks)))
    for block, b in itertools.product(range(2), range(3)):
        one, target = (x[:, : lengths[b]].double().nan_to_num(0) for x in (est[block, b], ref[b]))
        # The offset gives a silent estimate a score as bad for every reference.
        losses = [fast_bss_eval.si_sdr_loss(one[list(o)] + 1e-9, target, zero_mean=True).mean() for o in orders]
        assert tuple(perm[block, b].tolist()) == orders[int(np.argmin(losses))]
    assert score_batch(est, ref, mixture, lengths, perm) == score_batch(est, ref, mixture, lengths)


def test_permutation_that_is_given_is_used():
    est, ref, mixture = make_batch(num_blocks=1, num_spks=3)
    perm = best_permutations(est, ref)
    for b, scores in enumerate(score_batch(est, ref, mixture, perm=perm.roll(1, -1))):
        estimates = reorder_estimates(est[-1], perm[-1].roll(1, -1))[b].double()
        expected = -fast_bss_eval.si_sdr_loss(estimates, ref[b].double(), zero_mean=True)
        assert [scores[f"si_sdr_spk{i}"] for i in (1, 2, 3)] == pytest.approx(expected.tolist(), abs=1e-4)


def test_earlier_block_in_the_final_ones_place():
    est, ref, mixture = make_batch(num_blocks=3, num_spks=3)
    for scores, of_block, of_all in zip(
        score_batch(est[1:2], ref, mixture),
        score_batch(est[:2], ref, mixture),
        score_batch(est, ref, mixture),
        strict=True,
    ):
        assert of_block["si_sdri"] == of_all["si_sdri_block2"] != of_all["si_sdri"]
        assert [of_block[name] for name in ("si_sdr", "sdr", "sdri_spk3")] == [
            scores[name] for name in ("si_sdr", "sdr", "sdri_spk3")
        ]
        assert [name for name in of_block if "block" in name] == ["si_sdri_block1", "si_sdri_block2"]


def test_single_speaker():
    """Enhancement: the improvement is over the noisy mixture."""
    est, ref, _ = make_batch(num_spks=1)
    mixture = ref[:, 0] + torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))
    for b, scores in enumerate(score_batch(est, ref, mixture)):
        signals = est[-1, b].double(), ref[b].double(), mixture[b].double()
        si_sdr, si_sdri = oracle(*signals, filter_length=1)
        assert scores["si_sdr"] == scores["si_sdr_spk1"] == pytest.approx(si_sdr.item(), abs=1e-4)
        assert scores["si_sdri"] == pytest.approx(si_sdri.item(), abs=1e-4)


@pytest.mark.parametrize("garbage", [1.0, 1e4, math.nan])
def test_batch_of_different_lengths_equals_items_alone(garbage):
    est, ref, mixture = make_batch(num_spks=3)
    lengths = torch.tensor([4000, 2500, 3333])
    alone = [
        score_batch(est[:, b : b + 1, :, :length], ref[b : b + 1, :, :length], mixture[b : b + 1, :length])[0]
        for b, length in enumerate(lengths.tolist())
    ]
    for b, length in enumerate(lengths.tolist()):
        for signal in (est[:, b], ref[b], mixture[b]):
            signal[..., length:] = garbage
    for scores, expected in zip(score_batch(est, ref, mixture, lengths), alone, strict=True):
        assert scores == pytest.approx(expected, abs=1e-6)


def test_silent_reference_has_no_score():
    est, ref, mixture = make_batch(num_spks=3)
    expected = score_batch(est, ref, mixture)
    ref[1, 1] = 0.25  # a constant is silent too
    mixture[1] = ref[1].sum(0)
    scores = score_batch(est, ref, mixture)
    assert scores[0] == pytest.approx(expected[0])
    assert all(math.isnan(scores[1][f"{name}_spk2"]) for name in ("si_sdr", "si_sdri", "sdr", "sdri"))
    for name in ("si_sdr", "si_sdri", "sdr", "sdri"):
        speakers = [scores[1][f"{name}_spk{i}"] for i in (1, 3)]
        assert scores[1][name] == pytest.approx(sum(speakers) / 2)


def test_mixture_of_one_speaker_has_no_improvement():
    est, ref, _ = make_batch(batch=1)
    ref[:, 1] = 0
    (scores,) = score_batch(est, ref, ref.sum(1))
    assert math.isfinite(scores["si_sdr_spk1"])
    assert math.isfinite(scores["sdr"])
    assert math.isnan(scores["si_sdri"])
    assert math.isnan(scores["sdri_spk1"])
    assert math.isnan(scores["si_sdri_block1"])


def test_all_references_silent():
    (scores,) = score_batch(torch.randn(1, 1, 2, 1000), torch.zeros(1, 2, 1000), torch.zeros(1, 1000))
    assert all(math.isnan(value) for value in scores.values())


@pytest.mark.parametrize("failure", [0.0, 0.3, math.nan, math.inf])
def test_failed_estimate_scores_the_lowest(failure):
    est, ref, mixture = make_batch(num_blocks=1)
    expected = score_batch(est, ref, mixture)
    est[0, 0] = failure
    scores = score_batch(est, ref, mixture)
    assert scores[0]["si_sdr"] == scores[0]["sdr"] == -100
    for scores_of_others, expected_scores in zip(scores[1:], expected[1:], strict=True):
        assert scores_of_others == pytest.approx(expected_scores)


def test_perfect_estimate_scores_the_highest():
    _, ref, mixture = make_batch(num_spks=3)
    for scores in score_batch(ref[None, :, [2, 0, 1]], ref, mixture):
        assert scores["si_sdr"] == 100
        assert 95 <= scores["sdr"] <= 100


def test_scale_does_not_matter():
    est, ref, mixture = make_batch()
    for quiet, scores in zip(
        score_batch(1e-5 * est, 1e-5 * ref, 1e-5 * mixture), score_batch(est, ref, mixture), strict=True
    ):
        assert quiet == pytest.approx(scores, abs=1e-4)


def test_wrong_shapes():
    est, ref, mixture = make_batch()
    with pytest.raises(ValueError, match=r"got the shapes \[3, 2, 4000\]"):
        score_batch(est[0], ref, mixture)
    with pytest.raises(ValueError, match=r"mixture must be \[B, T\] = \[3, 4000\], but got \[3, 3999\]"):
        score_batch(est, ref, mixture[:, :-1])
    with pytest.raises(ValueError, match=r"\[1, 2, 4001\]"):
        score_batch(est, ref, mixture, torch.tensor([1, 2, 4001]))


def test_results_round_trip(tmp_path):
    path = tmp_path / "test_results.csv"
    rows = [{"si_sdr": 1.23456, "sdr": math.nan}, {"si_sdr": 2.0, "sdr": -3.0}, {"si_sdr": 4.0, "sdr": -4.0}]
    mean = write_results(path, ["mix_c", 'mix,"a"', "mix_b"], rows)
    assert mean == pytest.approx({"si_sdr": 7.23456 / 3, "sdr": -3.5})
    assert path.read_text().splitlines() == [
        "id,si_sdr,sdr",
        '"mix,""a""",2.0,-3.0',
        "mix_b,4.0,-4.0",
        "mix_c,1.2346,",
        "mean,2.4115,-3.5",
    ]
    read, read_mean = read_results(path)
    assert list(read) == ['mix,"a"', "mix_b", "mix_c"]
    assert read["mix_c"] == pytest.approx({"si_sdr": 1.2346, "sdr": math.nan}, nan_ok=True)
    assert read_mean == {"si_sdr": 2.4115, "sdr": -3.5}
    assert os.listdir(tmp_path) == ["test_results.csv"]


def test_results_with_quality_and_overlap(tmp_path):
    """Optional columns pass through the table and into comparisons."""
    est, ref, mixture = make_batch(num_blocks=1)
    columns = [*quality_columns(["pesq", "stoi"], 2), "overlap"]
    rows = [{**row, **dict.fromkeys(columns, 0.5 + b)} for b, row in enumerate(score_batch(est, ref, mixture))]
    rows[1]["stoi"] = math.nan
    mean = write_results(tmp_path / "test_results.csv", ["a", "b", "c"], rows)
    assert mean["pesq"] == mean["stoi"] == mean["overlap"] == 1.5
    read, read_mean = read_results(tmp_path / "test_results.csv")
    assert list(read["a"]) == list(read_mean) == list(rows[0])
    assert math.isnan(read["b"]["stoi"])
    better = {name: {**row, "stoi": row["stoi"] + 0.25} for name, row in read.items()}
    difference = comparison_table(read, better, metric="stoi")["stoi"]
    assert (difference.mean, difference.num_pairs, difference.num_unscored) == (0.25, 2, 1)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        (["a", "a"], [{"sdr": 1.0}] * 2, "got 'a' more than once"),
        (["a", "mean"], [{"sdr": 1.0}] * 2, "'mean' is kept"),
        (["a"], [{"sdr": 1.0}] * 2, "1 ids and 2 rows"),
        ([], [], "0 ids and 0 rows"),
        (["a", "b"], [{"sdr": 1.0}, {"si_sdr": 1.0}], "'b' has"),
    ],
)
def test_results_that_cannot_be_written(tmp_path, ids, rows, message):
    with pytest.raises(ValueError, match=message):
        write_results(tmp_path / "test_results.csv", ids, rows)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no table by 'id'"),
        (b"epoch,lr\n1,0.1\n", "its header is 'epoch,lr'"),
        (b"id,sdr\na,1\n", "last row must be 'mean'"),
        (b"id,sdr\n", "last row must be 'mean'"),
        (b"id,sdr\na,1\na,2\nmean,1\n", "an id occurs twice"),
        (b"id,sdr\na,1,2\nmean,1\n", "the row 'a' has 3"),
        (b"id,sdr\na,high\nmean,1\n", "no number in the row 'a'"),
        (b"\x89PNG\r\n\xff\x00", "no CSV table"),
    ],
)
def test_results_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "test_results.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)


def test_missing_results(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_results(tmp_path / "test_results.csv")
    with pytest.raises(ValueError, match="Is a directory"):
        read_table(tmp_path, "id")


@pytest.mark.parametrize(("mode", "content"), [("w", "a\r\né\n"), ("wb", b"\x00\xff")])
def test_write_whole_keeps_the_old_file_on_failure(tmp_path, mode, content):
    path = tmp_path / "file"
    with write_whole(path, mode) as stream:
        stream.write(content)
    written = path.read_bytes()
    assert written == (content if mode == "wb" else content.encode())
    with pytest.raises(TypeError), write_whole(path, mode) as stream:
        stream.write(None)
    assert path.read_bytes() == written
    assert os.listdir(tmp_path) == ["file"]


def test_write_whole_refuses_other_modes(tmp_path):
    with pytest.raises(ValueError, match="'a'"), write_whole(tmp_path / "file", "a"):
        pass
