"""The controls from the literature: soft-minimum (probabilistic) PIT, and interrupted and cascaded PIT."""

import csv
import itertools
import math

import pytest
import speechbrain as sb
import torch
from conftest import HPARAMS, TINY, arguments
from test_objective import make_brain, train_loss  # noqa: F401
from test_recipe import assert_same_run, kill_and_resume, newest, read_mean, weights
from test_sample_dropout import ABC, BACK, CYCLE, as_row, entries, visit

from dsd_modules.losses import PITLoss, layerwise_loss, soft_minimum_loss
from dsd_modules.memory_bank import AssignmentMemoryBank
from dsd_modules.report import read_history
from dsd_modules.sample_dropout import KEEP, REORDER


def slow_soft_minimum(matrix, gamma_db):
    """One item, term by term."""
    losses = [sum(matrix[i][p[i]] for i in range(len(p))) / len(p) for p in itertools.permutations(range(len(matrix)))]
    return -gamma_db * math.log(sum(math.exp(-loss / gamma_db) for loss in losses) / len(losses))


@pytest.mark.parametrize("num_spks", [1, 2, 3, 4])
@pytest.mark.parametrize("gamma_db", [0.5, 1.0, 20.0])
def test_soft_minimum_equals_the_sum_over_permutations(num_spks, gamma_db):
    matrix = 10 * torch.randn(5, num_spks, num_spks, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [slow_soft_minimum(item.tolist(), gamma_db) for item in matrix]
    assert soft_minimum_loss(matrix, gamma_db).tolist() == pytest.approx(expected)


def test_soft_minimum_lies_between_pit_and_the_mean_over_assignments():
    matrix = 10 * torch.randn(50, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    minimum = torch.stack([matrix[:, range(3), p].mean(-1) for p in itertools.permutations(range(3))]).amin(0)
    assert torch.allclose(soft_minimum_loss(matrix, 1e-6), minimum, atol=1e-4)
    assert torch.allclose(soft_minimum_loss(matrix, 1e6), matrix.mean((1, 2)), atol=1e-3)
    soft = soft_minimum_loss(matrix, 2.0)
    assert ((soft >= minimum) & (soft <= matrix.mean((1, 2)))).all()


def test_soft_minimum_shares_the_gradient_among_the_assignments():
    matrix = torch.tensor([[[-6.0, 0.0], [0.0, -6.0]]], requires_grad=True)
    soft_minimum_loss(matrix, 2.0).sum().backward()
    share = 1 / (1 + math.exp(-6 / 2))  # of the better assignment
    expected = torch.tensor([[[share, 1 - share], [1 - share, share]]]) / 2
    assert torch.allclose(matrix.grad, expected)


def test_soft_minimum_of_loud_losses_does_not_overflow():
    matrix = torch.tensor([[[-80.0, 80.0], [80.0, -80.0]]], requires_grad=True)
    loss = soft_minimum_loss(matrix, 0.01)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-80 + 0.01 * math.log(2), abs=1e-4)
    assert torch.isfinite(matrix.grad).all()


def test_soft_minimum_names_its_mistakes():
    with pytest.raises(ValueError, match="gamma_db must be above 0, but got 0"):
        soft_minimum_loss(torch.zeros(1, 2, 2), 0)
    with pytest.raises(ValueError, match="up to 5 speakers, but got 6"):
        soft_minimum_loss(torch.zeros(1, 6, 6), 1.0)


def test_each_block_has_its_own_soft_minimum_except_where_one_is_imposed():
    ref = torch.randn(4, 3, 400, generator=torch.Generator().manual_seed(3))
    pit = PITLoss()(torch.randn(2, 4, 3, 400, generator=torch.Generator().manual_seed(4)), ref)
    soft = soft_minimum_loss(pit.loss_matrix, 1.5)
    assert torch.allclose(layerwise_loss(pit, gamma_db=1.5).block_losses, soft)
    imposed = torch.tensor([False, True, False, True])
    losses = layerwise_loss(pit, imposed=imposed, gamma_db=1.5).block_losses
    assert torch.allclose(losses[:, ~imposed], soft[:, ~imposed])
    assert torch.allclose(losses[:, imposed], layerwise_loss(pit).block_losses[:, imposed])


# Cascaded PIT: the rule


@pytest.mark.parametrize("metric", [-20.0, 8.0, 30.0])
def test_fixed_trains_under_the_stored_assignment_whatever_the_metric(metric):
    decision, after = visit(entries(8, CYCLE), BACK, metric, mode="fixed", margin_db=50, quota=0)
    assert decision.action.tolist() == [REORDER]
    assert tuple(decision.perm[0].tolist()) == CYCLE
    assert decision.is_switched.tolist() == [True]
    assert as_row(after)[:3] == (8.0, CYCLE, BACK)  # nothing is stored anew
    decision, after = visit(entries(8, CYCLE), CYCLE, metric, mode="fixed")
    assert decision.action.tolist() == [KEEP]
    assert tuple(decision.perm[0].tolist()) == CYCLE
    assert as_row(after)[:2] == (8.0, CYCLE)


def test_fixed_stores_what_it_has_never_seen():
    decision, after = visit(entries(0, ABC, num_visits=0), BACK, 3.0, mode="fixed")
    assert decision.action.tolist() == [KEEP]
    assert as_row(after) == (3.0, BACK, BACK, 1, 0, 0)


def test_the_stages_of_a_cascade():
    bank = AssignmentMemoryBank(num_spks=2, mode="cascade", cascade_pit_epochs=2, cascade_fixed_epochs=3)
    modes = []
    for epoch in range(1, 8):
        bank.start_epoch(epoch)
        modes.append(bank.rule_mode)
    assert modes == ["none"] * 2 + ["fixed"] * 3 + ["none"] * 2
    assert bank.restart_epoch == 3
    assert AssignmentMemoryBank(num_spks=2).restart_epoch is None
    for option in ("cascade_pit_epochs", "cascade_fixed_epochs"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, but got 0"):
            AssignmentMemoryBank(num_spks=2, **{option: 0})


# The recipe

CASCADE = {
    "dsd_mode": "cascade",
    "layerwise": False,
    "lr_schedule": "linear",
    "cascade_pit_epochs": 1,
    "cascade_fixed_epochs": 2,
}


def test_a_cascade_starts_again_from_the_initial_weights(make_brain):  # noqa: F811
    brain = make_brain(**CASCADE, number_of_epochs=4)
    initial = {name: value.clone() for name, value in brain.modules.state_dict().items()}
    brain.make_dataloader(sb.dataio.dataset.DynamicItemDataset({str(i): {} for i in range(4)}), sb.Stage.TRAIN)
    brain.on_fit_start()
    brain.on_stage_start(sb.Stage.TRAIN, 1)
    train_loss(brain)
    brain.optimizer.step()
    assert brain.optimizer.state
    assert any(not torch.equal(value, initial[name]) for name, value in brain.modules.state_dict().items())
    brain.on_stage_start(sb.Stage.TRAIN, 2)
    assert not brain.optimizer.state
    assert all(torch.equal(value, initial[name]) for name, value in brain.modules.state_dict().items())


def test_a_cascade_fixes_the_recorded_assignments_and_decays_twice(recipe, run_recipe, librimix, tmp_path):
    options = {**CASCADE, "number_of_epochs": 4, "segment_seconds": 0.1}
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", **options)
    history = read_history(tmp_path / "run" / "history.csv")
    reordered = [row["reordered_samples"] for row in history]
    assert reordered[0] == reordered[3] == 0
    assert min(reordered[1:3]) > 0
    with open(tmp_path / "run" / "exclusions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [sum(int(row["epoch"]) == epoch for row in rows) for epoch in (1, 2, 3, 4)] == reordered
    stored = {}
    for row in rows:  # one assignment per mixture through both epochs
        assert stored.setdefault(row["id"], row["stored_assignment"]) == row["stored_assignment"]
    # The last step of a stage of n steps has the rate 1/n of the peak: 6 steps of PIT, then 18 after the restart.
    assert [row["lr"] / 0.005 for row in history] == pytest.approx([1 / 6, 13 / 18, 7 / 18, 1 / 18])


def test_a_cascade_killed_after_its_restart_goes_on_to_the_same_result(run_recipe, librimix, tmp_path):
    options = {**TINY, **CASCADE, "data_folder": librimix, "number_of_epochs": 3, "segment_seconds": 0.1}
    options |= {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 2}
    kill_and_resume("step", 9, options, tmp_path / "killed")  # of 6 steps an epoch
    run_recipe(**{**options, "output_folder": tmp_path / "whole"})
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_what_a_cascade_learned_before_its_restart_is_not_its_result(run_recipe, librimix, tmp_path):
    """The first stage, alone with a learning rate, is better than what follows, and must not be taken."""
    options = {**CASCADE, "cascade_pit_epochs": 4, "cascade_fixed_epochs": 1, "number_of_epochs": 5}
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", **options)
    history = read_history(tmp_path / "run" / "history.csv")
    assert history[3]["valid_si_sdri"] > history[4]["valid_si_sdri"] + 0.1
    exported = torch.load(tmp_path / "run" / "exported" / "masknet.ckpt", weights_only=True)
    final = torch.load(newest(tmp_path / "run") / "masknet.ckpt", weights_only=True)
    for name, value in final.items():
        assert torch.equal(value, exported[name]), name


def test_probabilistic_pit_trains_and_is_validated_as_pit(run_recipe, librimix, tmp_path):
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", soft_min_gamma_db=1.0)
    history = read_history(tmp_path / "run" / "history.csv")
    assert history[1]["train_loss"] < history[0]["train_loss"]
    for row in history:
        assert row["valid_loss_block2"] == pytest.approx(-row["valid_si_sdr"], abs=1e-6)
        assert row["train_loss_block2"] > -row["train_si_sdr"] + 0.05


def test_a_closed_test_set_is_opened_by_the_same_command(run_recipe, librimix, tmp_path):
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run", test_at_end=False)
    assert newest(tmp_path / "run")
    for name in ("test_results.csv", "exported", "report.png"):
        assert not (tmp_path / "run" / name).exists()
    trained, history = weights(tmp_path / "run"), (tmp_path / "run" / "history.csv").read_text()
    run_recipe(data_folder=librimix, output_folder=tmp_path / "run")
    assert math.isfinite(float(read_mean(tmp_path / "run")["si_sdri"]))
    assert (tmp_path / "run" / "report.png").exists()
    assert (tmp_path / "run" / "history.csv").read_text() == history
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, trained[name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"soft_min_gamma_db": -1}, "--soft_min_gamma_db can only be a number of at least 0, but got -1"),
        ({"soft_min_gamma_db": 1, "dsd_mode": "reorder"}, "--soft_min_gamma_db 1 weighs all assignments"),
        ({"soft_min_gamma_db": 1, **CASCADE, "number_of_epochs": 3}, "but --dsd_mode cascade imposes one"),
        ({**CASCADE, "lr_schedule": "plateau"}, "which --lr_schedule plateau cannot follow; give --lr_schedule linear"),
        ({**CASCADE, "number_of_epochs": 2}, "at least cascade_pit_epochs + cascade_fixed_epochs = 3, but got 2"),
        (
            {**CASCADE, "number_of_epochs": 3, "layerwise": True, "layer_permutation": "independent"},
            "give --layer_permutation shared",
        ),
    ],
)
def test_options_that_contradict_each_other(recipe, overrides, message):
    with pytest.raises(SystemExit) as stop:
        recipe.main([str(HPARAMS), *arguments({**TINY, **overrides})])
    assert message in stop.value.code
