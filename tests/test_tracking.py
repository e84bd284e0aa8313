import itertools
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_modules.tracking import TensorboardLogger


def test_events_of_a_resumed_run_take_the_place_of_those_it_repeats_also_within_a_second(tmp_path, monkeypatch):
    """A later process may have a smaller number, by which files of the same second are ordered."""
    clock = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1000 + next(clock) / 100)  # both begin in one second, but for the wait
    killed = TensorboardLogger(str(tmp_path))
    for epoch in (1, 2):
        killed.log_stats({"epoch": epoch, "lr": 1.0})
    killed.writer.close()
    (file,) = tmp_path.iterdir()
    second_and_host, _, number = file.name.rsplit(".", 2)
    file.rename(tmp_path / f"{second_and_host}.99999999.{number}")

    resumed = TensorboardLogger(str(tmp_path), first_epoch=2)
    for epoch in (2, 3):
        resumed.log_stats({"epoch": epoch, "lr": 2.0})
    resumed.writer.close()

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lr")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
