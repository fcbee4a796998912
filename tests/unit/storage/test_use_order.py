"""The next item is told from the order seen before."""

from __future__ import annotations

import pytest

from framework.storage.use_order import UseOrder


class Thing:
    """Compared by identity, as units are."""

    def __init__(self, name: str) -> None:
        self.name = name


def hits(sequence: str, *, passes: int) -> list[float]:
    """Share of right guesses in each pass over the sequence."""
    things = {name: Thing(name) for name in sequence}
    order: UseOrder[Thing] = UseOrder()
    shares = []
    for _ in range(passes):
        right = 0
        for name in sequence:
            right += order.expected() is things[name]
            order.note(things[name])
        shares.append(right / len(sequence))
    return shares


@pytest.mark.parametrize(
    "sequence",
    [
        "abcdefgh",
        "abcdefghgfedcba",  # forth and back
        "abcdef" + "deffed" + "abccba",  # blocks that are computed again before going back
        "xabcdabcdabcdy",  # a loop inside
        "aabbaabb",
    ],
)
def test_the_second_pass_is_known(sequence: str) -> None:
    first, second, third = hits(sequence, passes=3)
    assert first < second
    assert third == pytest.approx(1, abs=1.5 / len(sequence))


def test_nothing_is_expected_of_what_is_new() -> None:
    order: UseOrder[Thing] = UseOrder()
    assert order.expected() is None
    a, b = Thing("a"), Thing("b")
    for item in (a, b, a):
        order.note(item)
    assert order.expected() is b
    order.note(Thing("new"))
    assert order.expected() is None
    order.restart()
    order.note(a)
    assert order.expected() is None


def test_the_past_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.storage.use_order._REMEMBERED", 40)
    things = [Thing(str(i)) for i in range(8)]
    order: UseOrder[Thing] = UseOrder()
    wrong = 0
    for i in range(400):
        wrong += order.expected() is not things[i % 8]
        order.note(things[i % 8])
        assert len(order._past) <= 41
    assert wrong <= 9  # the first pass, and no more: forgetting the older half loses nothing
