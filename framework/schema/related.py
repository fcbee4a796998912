"""Which keys act on each other, read from related.yaml; for `octavo explain`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

_COMPONENTS = ("dit", "dit_2", "text_encoder", "text_encoder_2", "vae")


def related_keys(path: str) -> list[tuple[tuple[str, ...], str]]:
    """Every (other keys, how they act on each other) of the key or section at a dotted path."""
    return [
        (tuple(key for key in keys if key != path), how) for keys, how in _table() if path in keys
    ]


@cache
def _table() -> tuple[tuple[tuple[str, ...], str], ...]:
    """Read the table, with one entry per component where a key holds `*`."""
    text = Path(__file__).with_name("related.yaml").read_text(encoding="utf-8")
    entries: list[tuple[tuple[str, ...], str]] = []
    for entry in yaml.safe_load(text):
        starred = any("*" in key for key in entry["keys"])
        for component in _COMPONENTS if starred else ("",):
            keys = tuple(key.replace("*", component) for key in entry["keys"])
            entries.append((keys, entry["how"]))
    return tuple(entries)
