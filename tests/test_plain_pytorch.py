"""The training loop of the README's section on plain PyTorch, run as it stands there."""

import re

import pytest
import torch
from conftest import REPOSITORY

from dsd_modules.memory_bank import AssignmentMemoryBank


def read_loop():
    """The README's one block of code that trains."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (loop,) = [block for block in blocks if ".backward()" in block]
    return loop


@pytest.mark.parametrize("is_layerwise", [True, False])
def test_the_loop_learns_counts_and_drops(tmp_path, monkeypatch, capsys, is_layerwise):
    """Also with a model that gives the final estimates alone."""
    monkeypatch.chdir(tmp_path)
    loop = read_loop()
    if not is_layerwise:
        assert loop.count("return torch.stack(estimates)") == 1
        loop = loop.replace("return torch.stack(estimates)", "return estimates[-1]")
    names = {"__name__": "loop"}
    exec(compile(loop, "README.md", "exec"), names)

    epochs, losses, switches, dropped = zip(*names["history"], strict=True)
    assert epochs == tuple(range(1, 11))
    assert losses[-1] < losses[0] - 5
    assert switches[0] == dropped[0] == 0  # nothing to compare with in the first epoch
    assert sum(switches) > 0
    assert sum(dropped) > 0
    assert capsys.readouterr().out.count("label switches") == 10

    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(weight, weights[name]) for name, weight in names["model"].state_dict().items())
    bank = AssignmentMemoryBank(num_spks=2)
    bank.load(tmp_path / "bank.pt")
    rows = torch.arange(48)
    assert torch.equal(bank.lookup(rows).best_metric, names["bank"].lookup(rows).best_metric)
    assert (bank.lookup(rows).num_visits == 10).all()


def test_the_loop_is_short():
    assert len([line for line in read_loop().splitlines() if line.strip()]) <= 45
