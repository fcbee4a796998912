"""How many things an error names before it only counts them."""

from __future__ import annotations

from collections.abc import Sequence

NUM_LISTED = 10


def list_first(names: Sequence[str], *, separator: str = ", ", limit: int = NUM_LISTED) -> str:
    """Write the first `limit` names out and count the rest: "a, b and 7 more"."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def count_of(number: int, noun: str) -> str:
    """Write "1 line" or "3 lines"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
