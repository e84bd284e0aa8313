"""The moving average of the weights, against its closed form."""

import pytest
import torch

from dsd_modules.averaging import WeightAverage


def one_weight(value):
    modules = {"encoder": torch.nn.Linear(1, 1, bias=False)}
    torch.nn.init.constant_(modules["encoder"].weight, value)
    return modules


def test_the_average_of_some_steps():
    """After w_1 .. w_n: decay^(n-1) w_1 + (1 - decay) sum_k decay^(n-k) w_k."""
    modules, decay, weights = one_weight(9.0), 0.8, [1.0, -2.0, 4.0, 0.5]
    average = WeightAverage(modules, decay)
    for weight in weights:
        torch.nn.init.constant_(modules["encoder"].weight, weight)
        average.update(modules)
    expected = decay**3 * weights[0] + sum((1 - decay) * decay ** (3 - k) * weights[k] for k in range(1, 4))
    assert average.averaged(modules)["encoder"].weight.item() == pytest.approx(expected)
    assert modules["encoder"].weight.item() == weights[-1]


def test_without_decay_there_is_none(tmp_path):
    modules = one_weight(3.0)
    average = WeightAverage(modules, 0.0)
    average.update(modules)
    assert average.averaged(modules) is modules
    average.save(tmp_path / "average")
    average.load(tmp_path / "average")


def test_it_goes_on_after_a_checkpoint(tmp_path):
    modules = one_weight(1.0)
    whole = WeightAverage(modules, 0.5)
    whole.update(modules)
    whole.save(tmp_path / "average")
    resumed = WeightAverage(one_weight(7.0), 0.5)
    resumed.load(tmp_path / "average")
    torch.nn.init.constant_(modules["encoder"].weight, 2.0)
    for average in (whole, resumed):
        average.update(modules)
        assert average.averaged(modules)["encoder"].weight.item() == pytest.approx(1.5)


def test_switched_on_in_a_resumed_run_it_starts_with_the_next_step(tmp_path):
    modules = one_weight(4.0)
    WeightAverage(modules, 0.0).save(tmp_path / "average")
    average = WeightAverage(one_weight(100.0), 0.9)
    average.load(tmp_path / "average")
    assert average.averaged(modules) is modules  # as a test alone of that run would ask for
    average.update(modules)
    assert average.averaged(modules)["encoder"].weight.item() == 4.0


def test_a_checkpoint_without_an_average_leaves_none_of_a_later_one(tmp_path):
    """A run whose best epoch lies before it was switched on: that epoch's own weights are scored."""
    modules = one_weight(2.0)
    WeightAverage(modules, 0.0).save(tmp_path / "average")
    average = WeightAverage(modules, 0.9)
    average.update(one_weight(7.0))
    average.load(tmp_path / "average")
    assert average.averaged(modules) is modules


def test_a_restart_forgets():
    modules = one_weight(1.0)
    average = WeightAverage(modules, 0.9)
    average.update(modules)
    average.restart()
    torch.nn.init.constant_(modules["encoder"].weight, 5.0)
    average.update(modules)
    assert average.averaged(modules)["encoder"].weight.item() == 5.0


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_wrong_decay(decay):
    with pytest.raises(ValueError, match=str(decay)):
        WeightAverage(one_weight(1.0), decay)
