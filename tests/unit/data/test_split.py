from __future__ import annotations

import random
from pathlib import Path

import pytest

from framework.data.checks import CheckedSample
from framework.data.images import content_key
from framework.data.samples import Sample
from framework.data.split import hold_out
from framework.errors import DataError


def samples(*names: object) -> list[CheckedSample]:
    return [
        CheckedSample(Sample(Path(f"{name}.png"), ""), content_key(str(name).encode()), (8, 8))
        for name in names
    ]


def split(
    data: list[CheckedSample], fraction: float = 0.2, seed: int = 0, max_samples: int = 10**6
):
    return hold_out(data, fraction=fraction, seed=seed, max_samples=max_samples)


def test_parts_are_disjoint_complete_and_in_order() -> None:
    data = samples(*range(1000))
    train, held = split(data)
    assert sorted(train + held, key=data.index) == data
    assert train == sorted(train, key=data.index)
    assert held == sorted(held, key=data.index)
    assert 150 < len(held) < 250


def test_zero_turns_it_off() -> None:
    data = samples(1, 2, 3)
    assert split(data, 0.0) == (data, [])
    assert split([], 0.0) == ([], [])


def test_the_split_stays_when_the_data_grows_or_is_shuffled() -> None:
    data = samples(*range(400))
    _, held = split(data[:200])
    _, grown = split(data)
    assert [sample for sample in grown if sample in data[:200]] == held
    shuffled = data[:]
    random.Random(1).shuffle(shuffled)
    assert set(split(shuffled)[1]) == set(grown)


def test_copies_fall_on_one_side() -> None:
    data = samples(*range(100)) * 2
    train, held = split(data)
    assert not {s.content_key for s in train} & {s.content_key for s in held}


def test_max_samples_takes_some_of_those_held_out_and_returns_none_to_training() -> None:
    data = samples(*range(500))
    train, held = split(data)
    fewer_train, fewer = split(data, max_samples=7)
    assert len(fewer) == 7
    assert set(fewer) < set(held)
    assert fewer_train == train
    assert set(split(data, max_samples=6)[1]) < set(fewer)


def test_seeds_choose_differently() -> None:
    data = samples(*range(200))
    assert split(data, seed=1)[1] != split(data, seed=2)[1]


def test_at_least_one_is_held_out() -> None:
    for seed in range(20):
        train, held = split(samples(1, 2, 3), fraction=0.01, seed=seed)
        assert (len(train), len(held)) == (2, 1)


def test_one_picture_cannot_be_split() -> None:
    with pytest.raises(DataError, match="holding out 10% of 1 pictures leaves none to train on"):
        split(samples(1), fraction=0.1)
