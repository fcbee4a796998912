from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.training.ema import TrainableEma


def parameters(value: float) -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.full((3,), value)), "b": nn.Parameter(torch.zeros(2, 2))}


def test_the_average_follows_the_formula() -> None:
    trained = parameters(0.0)
    ema = TrainableEma(trained, decay=0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, 3.0]):
        with torch.no_grad():
            trained["a"].fill_(value)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.averages["a"].tolist() == pytest.approx([expected] * 3)


def test_weights_come_back_bit_by_bit_after_a_swap() -> None:
    trained = parameters(0.1)
    ema = TrainableEma(trained, decay=0.9)
    with torch.no_grad():
        trained["a"].add_(1 / 3)
    before = trained["a"].detach().clone()
    with ema.swapped():
        assert torch.equal(trained["a"], ema.averages["a"])
    assert torch.equal(trained["a"], before)


def test_weights_come_back_after_an_error() -> None:
    trained = parameters(0.1)
    ema = TrainableEma(trained, decay=0.9)
    with torch.no_grad():
        trained["a"].fill_(5)
    with pytest.raises(ValueError, match="stop"), ema.swapped():
        raise ValueError("stop")
    assert trained["a"].tolist() == [5, 5, 5]


def test_the_state_comes_back() -> None:
    trained = parameters(1.0)
    ema = TrainableEma(trained, decay=0.9)
    with torch.no_grad():
        trained["a"].fill_(5)
    ema.update()
    other = TrainableEma(parameters(0.0), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.num_updates == 1
    assert torch.equal(other.averages["a"], ema.averages["a"])
