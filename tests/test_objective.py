"""The recipe's objective: what a batch's loss is, with and without exclusions, and against SpeechBrain's own."""

import pytest
import speechbrain as sb
import torch
from conftest import HPARAMS, TINY, arguments
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

from dsd_modules.dataset import MixtureDataset
from dsd_modules.losses import assigned_loss, pairwise_neg_si_sdr
from dsd_modules.sampling import TrainingBatches


@pytest.fixture
def make_brain(recipe, librimix, tmp_path):
    """A Brain on the tiny training set, before its first epoch: ``make_brain(dsd_mode=..., ...)``."""

    def make(**overrides):
        given = {**TINY, "data_folder": librimix, "output_folder": tmp_path / "run", **overrides}
        _, run_opts, text = sb.parse_arguments([str(HPARAMS), *arguments(given)])
        text, options = recipe.read_options(HPARAMS, text)
        recipe.prepare_data(options)
        with open(HPARAMS, encoding="utf-8") as stream:
            hparams = load_hyperpyyaml(stream, text)
        train = MixtureDataset(hparams["train_csv"], 8000, recipe.make_reader(options))
        hparams["memory_bank"].set_samples(train.data_ids)
        hparams["memory_bank"].start_epoch(2)
        brain = recipe.Separation(hparams["modules"], hparams["optimizer"], hparams, run_opts, hparams["checkpointer"])
        brain.init_optimizers()
        brain.train_set, brain.train_sampler = train, TrainingBatches(len(train), 4, seed=0)
        brain.batch = PaddedBatch([train[1, row, 0.25] for row in range(4)])
        return brain

    return make


def gradients(brain):
    return [parameter.grad.clone() for parameter in brain.modules.parameters()]


def train_loss(brain, batch=None):
    """Loss and gradients of a training batch, without a step."""
    batch = batch or brain.batch
    brain.modules.zero_grad()
    estimates = brain.compute_forward(batch, sb.Stage.TRAIN)
    loss = brain.compute_objectives(estimates, batch, sb.Stage.TRAIN)
    loss.backward()
    return loss.detach(), estimates.detach()


def contradict(brain, rows):
    """Store the opposite of PIT's assignment with an unbeatable metric for some rows, and PIT's own for the others."""
    with torch.no_grad():
        estimates = brain.compute_forward(brain.batch, sb.Stage.TRAIN)
        perm = brain.hparams.pit_loss(estimates, *brain.references(brain.batch)).perm[-1]
    is_chosen = torch.isin(brain.batch.row, torch.tensor(rows))
    stored = torch.where(is_chosen[:, None], perm.flip(-1), perm)
    brain.hparams.memory_bank.update(brain.batch.row, stored, torch.full((4,), 60.0))
    return perm


def test_plain_pit_equals_speechbrains_own_loss(make_brain):
    brain = make_brain(dsd_mode="none", layerwise=False)
    loss, estimates = train_loss(brain)
    references, lengths = brain.references(brain.batch)
    assert len(estimates) == 1
    # SpeechBrain masks nothing, so item by item, without the padding; its axes are [B, T, N].
    expected = [
        get_si_snr_with_pitwrapper(references[b : b + 1, :, :t].mT, estimates[0, b : b + 1, :, :t].mT)
        for b, t in enumerate(lengths.tolist())
    ]
    assert loss == pytest.approx(torch.stack(expected).mean().item(), abs=1e-3)


@pytest.mark.parametrize("layer_weights", ["uniform", "ramp"])
def test_the_loss_is_the_weighted_sum_of_the_blocks(make_brain, layer_weights):
    brain = make_brain(layer_weights=layer_weights)
    loss, estimates = train_loss(brain)
    references, lengths = brain.references(brain.batch)
    perm = brain.hparams.pit_loss(estimates, references, lengths).perm[-1]
    blocks = [assigned_loss(pairwise_neg_si_sdr(est, references, lengths), perm).mean() for est in estimates]
    weights = {"uniform": (1 / 2, 1 / 2), "ramp": (1 / 3, 2 / 3)}[layer_weights]
    assert loss == pytest.approx(sum(w * block.item() for w, block in zip(weights, blocks, strict=True)), abs=1e-4)


def test_dropped_samples_count_in_the_mean_but_have_no_gradient(make_brain):
    brain = make_brain()
    perm = contradict(brain, rows=[1, 3])
    loss, estimates = train_loss(brain)
    references, lengths = brain.references(brain.batch)
    item_losses = [assigned_loss(pairwise_neg_si_sdr(est, references, lengths), perm) for est in estimates]
    per_item = torch.stack(item_losses).mean(0)
    assert loss == pytest.approx((per_item[0] + per_item[2]).item() / 4, abs=1e-5)  # four, not two
    assert brain.hparams.memory_bank.counts.dropped_samples == 2
    with_dropped = gradients(brain)

    brain.modules.zero_grad()
    estimates = brain.compute_forward(brain.batch, sb.Stage.TRAIN)
    kept = [assigned_loss(pairwise_neg_si_sdr(est, references, lengths), perm)[[0, 2]].sum() / 4 for est in estimates]
    (sum(kept) / len(kept)).backward()
    for actual, expected in zip(with_dropped, gradients(brain), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("layer_permutation", ["shared", "independent"])
def test_reordered_samples_train_under_the_stored_assignment(make_brain, layer_permutation):
    brain = make_brain(dsd_mode="reorder", layer_permutation=layer_permutation)
    perm = contradict(brain, rows=[0, 1, 2, 3])
    loss, estimates = train_loss(brain)
    references, lengths = brain.references(brain.batch)
    blocks = [assigned_loss(pairwise_neg_si_sdr(est, references, lengths), perm.flip(-1)).mean() for est in estimates]
    assert loss == pytest.approx(torch.stack(blocks).mean().item(), abs=1e-4)
    assert brain.hparams.memory_bank.counts.reordered_samples == 4


def test_a_batch_of_dropped_samples_is_no_special_case(make_brain):
    brain = make_brain()
    contradict(brain, rows=[0, 1, 2, 3])
    before = [parameter.detach().clone() for parameter in brain.modules.parameters()]
    brain.step = 1
    loss = brain.fit_batch(brain.batch)
    assert loss == 0
    assert brain.optimizer_step == 1
    for old, new in zip(before, brain.modules.parameters(), strict=True):
        assert torch.equal(old, new)  # Adam has no momentum yet
    assert brain.hparams.memory_bank.counts.all_dropped_batches == 1


def test_a_crop_with_a_silent_source_leaves_no_trace(make_brain):
    brain = make_brain()
    brain.batch.sources.data[2, :, 0] = 0
    loss, _ = train_loss(brain)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(brain))
    visits = brain.hparams.memory_bank.lookup(torch.arange(4)).num_visits
    assert visits.tolist() == [1, 1, 0, 1]


def test_the_metric_can_be_the_improvement(make_brain):
    plain, improvement = make_brain(dsd_metric="si_sdr"), make_brain(dsd_metric="si_sdri")
    improvement.modules.load_state_dict(plain.modules.state_dict())
    for brain in (plain, improvement):
        train_loss(brain)
    references, lengths = plain.references(plain.batch)
    mixture = -pairwise_neg_si_sdr(plain.batch.mix_sig.data[:, None], references, lengths).mean((1, 2))
    stored = [brain.hparams.memory_bank.lookup(torch.arange(4)).best_metric for brain in (plain, improvement)]
    assert torch.allclose(stored[0] - mixture, stored[1], atol=1e-3)


def test_gradients_go_through_the_wrapped_modules(make_brain):
    """SpeechBrain's recipe calls hparams' modules, so that DDP never sees a forward."""
    brain = make_brain()
    calls = []
    for name, module in brain.modules.items():
        wrapper = torch.nn.Sequential(module)
        wrapper.forward = lambda *a, _module=module, _name=name, **k: (calls.append(_name), _module(*a, **k))[1]
        if name != "encoder":  # whose kernel is read from the module itself
            brain.modules[name] = wrapper
    brain.compute_forward(brain.batch, sb.Stage.TRAIN)
    assert calls == ["masknet", "decoder"]


def test_the_same_crops_for_any_number_of_workers(make_brain):
    brain = make_brain(segment_seconds=0.2)
    crops = {"segment_seconds": 0.2, "segment": "random", "seed": 1}
    train = MixtureDataset(brain.hparams.train_csv, 8000, brain.train_set.reader, **crops)
    batches = []
    for num_workers in (0, 2):
        loader = brain.make_dataloader(train, sb.Stage.TRAIN, None, batch_size=5, num_workers=num_workers)
        for epoch in (1, 2):
            brain.train_sampler.set_epoch(epoch)
            batches.append([(batch.id, batch.mix_sig.data) for batch in loader])
    for (ids, signals), (other_ids, other_signals) in zip(
        batches[0] + batches[1], batches[2] + batches[3], strict=True
    ):
        assert ids == other_ids
        assert torch.equal(signals, other_signals)
    first, second = (
        {i: s for ids, signals in batch for i, s in zip(ids, signals, strict=True)} for batch in batches[:2]
    )
    assert list(first) != list(second)  # shuffled anew
    assert sum(torch.equal(first[i], second[i]) for i in first) < 3  # and cut anew


def test_fixed_crops_are_the_same_in_every_epoch(make_brain):
    brain = make_brain()
    crops = {"segment_seconds": 0.2, "segment": "fixed", "seed": 1}
    train = MixtureDataset(brain.hparams.train_csv, 8000, brain.train_set.reader, **crops)
    starts = set()
    for row in range(len(train)):
        first, second = train[1, row, 1.0], train[2, row, 1.0]
        assert first["num_samples"] == 1600
        assert torch.equal(first["mix_sig"], second["mix_sig"])
        assert torch.allclose(first["sources"].sum(-1), first["mix_sig"], atol=1e-3)  # the same stretch of all
        starts.add(float(first["mix_sig"][0]))
    assert len(starts) > len(train) / 2  # not all from the beginning
