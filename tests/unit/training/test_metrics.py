from __future__ import annotations

from framework.training.metrics import MetricsCallback, StepClock


def test_sums_and_seconds_since_the_last_row_come_back() -> None:
    before = MetricsCallback(StepClock(), every_n_steps=10)
    before._sums, before._num_steps, before._seconds = {"train/loss": 3.0}, 4, 2.0
    after = MetricsCallback(StepClock(), every_n_steps=10)
    after.load_state_dict(before.state_dict())
    assert (after._sums, after._num_steps, after._seconds) == ({"train/loss": 3.0}, 4, 2.0)
