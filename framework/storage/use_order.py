"""Remembers in which order things are used, to tell which comes next."""

from __future__ import annotations

from typing import Generic, TypeVar

Item = TypeVar("Item")

# Longest stretch of the past that is compared; more than the layers of a block forth and back.
_CONTEXT = 64
# Uses remembered: two training steps with checkpointing of a model with several thousand layers.
_REMEMBERED = 65536


class UseOrder(Generic[Item]):
    """Predicts the next item from the last time that the same items were used in the same order.

    A training step uses layers forth, and forth and back again where blocks are recomputed, so that the same item is
    followed by different ones; only a longer stretch of the past tells which.
    """

    def __init__(self) -> None:
        self._past: list[Item] = []
        # Place of each item's uses, and the place in the past that the present repeats.
        self._places: dict[int, list[int]] = {}
        self._match: int | None = None

    def note(self, item: Item) -> None:
        """Say that an item is used now."""
        follows = (
            self._match is not None
            and self._match + 1 < len(self._past)
            and self._past[self._match + 1] is item
        )
        self._past.append(item)
        if follows and self._match is not None:
            self._match += 1
        else:
            self._match = self._search()
        self._places.setdefault(id(item), []).append(len(self._past) - 1)
        if len(self._past) > _REMEMBERED:
            self._forget()

    def expected(self) -> Item | None:
        """The item that will probably be used next; None where nothing like the present has been seen."""
        if self._match is None or self._match + 1 >= len(self._past):
            return None
        return self._past[self._match + 1]

    def restart(self) -> None:
        """Forget the order, because something else begins."""
        self._past, self._places, self._match = [], {}, None

    def _search(self) -> int | None:
        """Earlier place whose past agrees longest with the present; the latest of equal ones."""
        here = len(self._past) - 1
        best, longest = None, 0
        for place in reversed(self._places.get(id(self._past[here]), [])[-_CONTEXT:]):
            length = 1
            while (
                length < _CONTEXT
                and place - length >= 0
                and self._past[place - length] is self._past[here - length]
            ):
                length += 1
            if length > longest:
                best, longest = place, length
        return best

    def _forget(self) -> None:
        """Drop the older half."""
        kept = self._past[len(self._past) // 2 :]
        self.restart()
        for item in kept:
            self.note(item)
