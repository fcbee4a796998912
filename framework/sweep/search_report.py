"""What a search has come to, in a few lines for the end of a sweep and for its page."""

from __future__ import annotations

from pathlib import Path

from framework.sweep.results_read import as_number, read_json

SEARCH_FILE = "search.json"


def search_lines(folder: Path, *, with_best: bool = True) -> list[str]:
    """The best overrides, ready to paste, and which keys mattered; empty for a sweep that is no finished search."""
    content = read_json(folder / SEARCH_FILE)
    lines = []
    best = content.get("best_overrides")
    if with_best and isinstance(best, str) and best:
        lines.append(f"Best settings: {best}")
    importances = content.get("importances")
    if isinstance(importances, dict) and importances:
        shares = [(str(key), as_number(share) or 0.0) for key, share in importances.items()]
        shares.sort(key=lambda pair: -pair[1])
        told = ", ".join(f"{key} {share:.0%}" for key, share in shares)
        lines.append(f"What the loss depended on: {told}")
    return lines
