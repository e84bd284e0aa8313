"""Early exit: as many blocks as the mixture needs, and the estimates of the block where it stops."""

import csv
import itertools
import math
import sys

import pytest
import soundfile
import test_masknet
import test_tasnet
import torch
from conftest import REPOSITORY
from speechbrain.lobes.models.dual_path import Decoder

from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.separator import agreement_db, check_early_exit, separate, separate_until

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import bench_early_exit

MODELS = {
    "sepformer of 4 blocks, 2 speakers": (test_masknet.small_masknet, {"num_layers": 4, "num_spks": 2}),
    "sepformer of 3 blocks, 3 speakers": (test_masknet.small_masknet, {}),
    "dprnn of 4 blocks, 3 speakers": (test_masknet.small_masknet, {"num_layers": 4, "rnn": "LSTM"}),
    "conv-tasnet of 4 repeats, 2 speakers": (test_tasnet.small_masknet, {"R": 4, "C": 2}),
}


@pytest.fixture(params=MODELS)
def modules(request):
    small_masknet, changes = MODELS[request.param]
    masknet = small_masknet(**changes).eval()
    return *test_masknet.coders(), masknet


@pytest.fixture
def coders_and_masknet():
    def build(**changes):
        encoder, decoder = test_masknet.coders()
        return encoder, test_masknet.small_masknet(**changes).eval(), decoder

    return build


def count_blocks_run(masknet):
    """A list that grows with each block that is run."""
    calls = []
    if hasattr(masknet, "dual_mdl"):
        for block in masknet.dual_mdl:
            block.register_forward_hook(lambda *_: calls.append(1))
    else:
        for name, layer in masknet.temporal_conv_net.items():
            if name.endswith("_0"):
                layer.layers["act"].register_forward_hook(lambda *_: calls.append(1))
    return calls


def si_sdr_db(estimate, reference):
    """By the definition (Le Roux et al. 2019), in float64: the power of the target's share over that of the rest."""
    estimate, reference = (signal.double() - signal.double().mean() for signal in (estimate, reference))
    target = (estimate @ reference) / (reference @ reference) * reference
    return 10 * math.log10(target.square().sum() / (estimate - target).square().sum())


# --- real models ---


@torch.no_grad()
def test_stops_where_the_definition_says(modules):
    """For thresholds around every agreement, against all blocks separated at once."""
    encoder, decoder, masknet = modules
    mixture = torch.randn(1, 1203)
    every = separate(encoder, masknet, decoder, mixture, blocks="all")[:, 0]  # [L, N, T]
    num_blocks = len(every)
    worst = [min(map(si_sdr_db, later, earlier)) for earlier, later in itertools.pairwise(every)]
    calls = count_blocks_run(masknet)
    stops = set()
    for threshold in [-1000.0, 1000, *(value + step for value in worst for step in (-0.01, 0.01))]:
        agreeing = [block for block, value in enumerate(worst, 2) if value >= threshold]
        calls.clear()
        estimates, num_blocks_run = separate_until(encoder, masknet, decoder, mixture, threshold)
        assert num_blocks_run == min([*agreeing, num_blocks])
        assert len(calls) == num_blocks_run
        assert torch.equal(estimates, separate(encoder, masknet, decoder, mixture, blocks=[num_blocks_run - 1])[0])
        stops.add(num_blocks_run)
    assert {2, num_blocks} <= stops


@torch.no_grad()
def test_a_number_of_blocks_runs_no_more(modules):
    encoder, decoder, masknet = modules
    calls = count_blocks_run(masknet)
    for block in range(masknet.num_layers):
        calls.clear()
        separate(encoder, masknet, decoder, torch.randn(1, 400), blocks=[block])
        assert len(calls) == block + 1


@torch.no_grad()
def test_masks_of_one_block_after_the_other(modules):
    encoder, _, masknet = modules
    x, lengths = encoder(torch.randn(2, 1203)), [149, 60]
    every = masknet(x, lengths, "all")
    calls = count_blocks_run(masknet)
    for index, masks in enumerate(masknet.block_masks(x, lengths)):
        assert len(calls) == index + 1
        assert torch.equal(masks, every[index])
    calls.clear()
    some = list(masknet.block_masks(x, lengths, [-2, 0, 0]))
    assert torch.equal(torch.stack(some), every[[0, -2]])
    assert len(calls) == masknet.num_layers - 1


@torch.no_grad()
def test_through_wrappers(coders_and_masknet):
    """As DistributedDataParallel and torch.compile wrap them."""
    encoder, masknet, decoder = coders_and_masknet()
    mixture = torch.randn(1, 500)
    expected, _ = separate_until(encoder, masknet, decoder, mixture, 1000)
    compiled = torch.compile(masknet, backend="eager")
    wrapped = [torch.nn.DataParallel(module) for module in (encoder, masknet, decoder)]
    for modules in ((encoder, compiled, decoder), wrapped):
        estimates, num_blocks_run = separate_until(*modules, mixture, 1000)
        assert num_blocks_run == 3
        assert torch.equal(estimates, expected)


def test_silence_in_silence_out(modules):
    """Nothing to separate: two blocks tell, also where gradients are recorded."""
    encoder, decoder, masknet = modules
    estimates, num_blocks_run = separate_until(encoder, masknet, decoder, torch.zeros(1, 400), 1000)
    assert num_blocks_run == 2
    assert estimates.count_nonzero() == 0


@torch.no_grad()
def test_samples_that_are_no_numbers_run_all_blocks(coders_and_masknet):
    mixture = torch.randn(1, 400)
    mixture[0, 100] = torch.nan
    assert separate_until(*coders_and_masknet(num_layers=4), mixture, -1000)[1] == 4


# --- decoding without gradients on a CPU ---


@pytest.mark.parametrize(("kernel", "num_samples"), [(2, 2), (16, 16), (16, 40), (16, 203), (32, 1000)])
def test_decoding_equals_the_decoder(kernel, num_samples):
    """The product of matrices and overlap-add against PyTorch's transposed convolution, for blocks and for one."""
    torch.manual_seed(0)
    encoder, decoder = test_masknet.coders(kernel)
    masknet = test_masknet.small_masknet().eval()
    mixture = torch.randn(3, num_samples)
    calls = []
    decoder.register_forward_hook(lambda *_: calls.append(1))
    for blocks in (None, "all"):
        expected = separate(encoder, masknet, decoder, mixture, blocks=blocks)  # with gradients
        with torch.no_grad():
            test_masknet.assert_close(separate(encoder, masknet, decoder, mixture, blocks=blocks), expected)
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"stride": 4}, {"stride": 16}, {"bias": True}, {"dilation": 2}, {"padding": 1}])
def test_another_decoder_is_called(changes):
    decoder = Decoder(test_masknet.CHANNELS, 1, **{"kernel_size": 16, "stride": 8, "bias": False, **changes})
    calls = []
    decoder.register_forward_hook(lambda *_: calls.append(1))
    mixture = torch.randn(1, 24)  # 2 frames, which give no more samples by any of these strides
    separate(test_masknet.coders()[0], test_masknet.small_masknet(), decoder, mixture)
    assert calls


# --- estimates whose agreement is known ---


class _Framing(torch.nn.Module):
    """Frames of one sample, in place of an encoder."""

    def __init__(self):
        super().__init__()
        self.conv1d = torch.nn.Conv1d(1, 1, 1)

    def forward(self, mixture):
        return mixture.unsqueeze(1)


class _GivenMasks(torch.nn.Module):
    """Blocks whose estimates [L, N, T] are given, where the mixture is one everywhere."""

    def __init__(self, estimates):
        super().__init__()
        self.estimates, self.num_layers = estimates, len(estimates)

    def block_masks(self, features):
        for estimates in self.estimates:
            yield estimates[:, None, None]  # [N, 1, 1, T]


def blocks_run(estimates, threshold):
    modules = _Framing(), _GivenMasks(estimates), torch.nn.Identity()
    separated, num_blocks_run = separate_until(
        *modules, torch.ones(1, estimates.shape[-1], dtype=estimates.dtype), threshold
    )
    assert torch.equal(separated[0], estimates[num_blocks_run - 1])
    return num_blocks_run


def turning(*agreements_db, start=0.0):
    """Estimates of one voice [L, T]: each block's has the given SI-SDR with the one before.

    Each is a unit vector in the plane of two orthogonal tones, turned on by the angle whose cotangent is the ratio of
    what agrees to what does not; and each block has a scale of its own, which does not matter.
    """
    time = torch.arange(800, dtype=torch.float64) / 800
    tones = torch.stack([(2 * math.pi * 5 * time).sin(), (2 * math.pi * 5 * time).cos()])
    angles = [start]
    for agreement in agreements_db:
        angles.append(angles[-1] + math.atan(10 ** (-agreement / 20)))
    plane = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)
    return plane @ tones * torch.arange(1, len(angles) + 1)[:, None]


def test_closed_form():
    voice = turning(10, 20, 30, 40)
    torch.testing.assert_close(agreement_db(voice[1:], voice[:-1]), torch.tensor([10.0, 20, 30, 40]).double())
    expected = {-5: 2, 9.99: 2, 10.01: 3, 19.99: 3, 20.01: 4, 29.99: 4, 30.01: 5, 39.99: 5, 40.01: 5, 1000: 5}
    assert {threshold: blocks_run(voice[:, None], threshold) for threshold in expected} == expected


def test_the_worst_voice_decides():
    """The mean over speakers would stop one block earlier."""
    easy, hard = turning(50, 60, 60), turning(5, 21, 60)
    for voices in ((easy, hard), (hard, easy), (easy, hard, easy)):
        assert blocks_run(torch.stack(voices, dim=1), 20) == 3


def test_agreement_that_is_lost_again_stops_at_the_first():
    assert blocks_run(turning(10, 25, 3, 3)[:, None], 20) == 3


def test_outputs_that_change_places_do_not_agree():
    first, second = turning(60, 60, 60), turning(60, 60, 60, start=math.pi / 2)
    estimates = torch.stack([first, second], dim=1)
    assert blocks_run(estimates, 20) == 2
    estimates[1] = estimates[1].flip(0)
    assert blocks_run(estimates, 20) == 4  # neither the second block nor the third, which is as the first
    three = torch.stack([first, second, first.cumsum(-1)], dim=1)
    three[1] = three[1].roll(1, dims=0)
    assert blocks_run(three, 20) == 4


def test_silent_voices():
    voice = turning(10, 20, 30)
    silent = torch.zeros_like(voice)
    assert blocks_run(torch.stack([voice, silent], dim=1), 15) == 3  # the voice decides
    assert blocks_run(torch.stack([silent, silent], dim=1), 1000) == 2
    fading = turning(60, 60, 60)
    fading[0] = 0  # silent in the first block alone: with no threshold do the first two agree
    assert blocks_run(torch.stack([voice, fading], dim=1), -1000) == 3
    fading = turning(60, 60, 60)
    fading[1] = 0
    assert blocks_run(fading[:, None], -1000) == 4


def test_agreement_leaves_no_gradient():
    estimates = torch.randn(2, 100, requires_grad=True)
    assert not agreement_db(estimates, torch.randn(2, 100)).requires_grad


# --- the benchmark ---


def test_benchmark(librimix, tmp_path, monkeypatch):
    """Two blocks are two blocks, whoever decides, and a table and a figure appear."""
    encoder, decoder = test_masknet.coders()
    masknet = test_masknet.small_masknet(num_layers=4, num_spks=2)
    separator = SepformerDSDSeparation({"encoder": encoder, "masknet": masknet, "decoder": decoder}, 8000)
    monkeypatch.setattr(bench_early_exit.SepformerDSDSeparation, "from_hparams", lambda *_, **__: separator)
    folder = librimix / "wav8k" / "min" / "test"
    lines = ["ID,duration,mix_wav,s1_wav,s2_wav"]
    for wav in sorted((folder / "mix_clean").iterdir())[:3]:
        lines.append(f"{wav.stem},{soundfile.info(wav).duration},mix_clean/{wav.name},s1/{wav.name},s2/{wav.name}")
    (tmp_path / "test.csv").write_text("\n".join(lines))
    paths = {name: tmp_path / f"early_exit.{name}" for name in ("csv", "png")}
    bench_early_exit.main(
        [
            *("--model", "tiny", "exported", "--manifest", str(tmp_path / "test.csv"), "--data-folder", str(folder)),
            *("--thresholds", "-1000", "1000", "--repeats", "1"),
            *("--csv", str(paths["csv"]), "--figure", str(paths["png"])),
        ]
    )
    with open(paths["csv"], encoding="utf-8") as stream:
        *fixed, low, high = csv.DictReader(stream)
    assert [row["mean_blocks"] for row in fixed] == ["1", "2", "3", "4"]
    assert (low["stops"], high["stops"]) == ("2:3", "4:3")
    for exited, row in ((low, fixed[1]), (high, fixed[3])):
        assert [exited[column] for column in ("si_sdri", "difference")] == [row["si_sdri"], row["difference"]]
    assert all(float(row["cpu_factor"]) > 0 for row in (*fixed, low, high))
    assert paths["png"].stat().st_size > 10_000


# --- what is refused ---


@pytest.mark.parametrize("threshold", [math.inf, -math.inf, math.nan, "20", None, True])
def test_wrong_threshold(coders_and_masknet, threshold):
    with pytest.raises(ValueError, match=f"finite number of dB, but got {threshold!r}"):
        separate_until(*coders_and_masknet(), torch.randn(1, 100), threshold)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_too_few_blocks(coders_and_masknet, num_blocks):
    with pytest.raises(ValueError, match=f"at least 3 blocks .*this one has {num_blocks}"):
        separate_until(*coders_and_masknet(num_layers=num_blocks), torch.randn(1, 100), 20)
    check_early_exit(20, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 100), r"one mixture \[1, T\] at a time, but got \[2, 100\]"),
        ((100,), r"\[B, T\], but got \[100\]"),
        ((1, 15), "15 samples, fewer than the encoder's kernel of 16"),
    ],
)
def test_wrong_mixtures(coders_and_masknet, shape, message):
    with pytest.raises(ValueError, match=message):
        separate_until(*coders_and_masknet(), torch.randn(shape), 20)
