import time

import torch

from shared_modules.checkpoints import WholeCheckpointer


def test_the_newest_checkpoint_has_the_last_name_also_within_a_second(tmp_path, monkeypatch):
    """The number of a deleted one is not given to a newer one, which would stand before older ones."""
    second = time.gmtime(0)
    monkeypatch.setattr(time, "localtime", lambda *_: second)
    checkpointer = WholeCheckpointer(tmp_path, {"layer": torch.nn.Linear(1, 1)})
    doomed = checkpointer.save_checkpoint()
    kept = [checkpointer.save_checkpoint()]
    checkpointer.delete_checkpoints(num_to_keep=1)
    assert not doomed.path.exists()
    kept += [checkpointer.save_checkpoint() for _ in range(2)]
    assert sorted(tmp_path.iterdir()) == [checkpoint.path for checkpoint in kept]
