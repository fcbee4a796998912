"""Amounts of memory as people write them: "24GiB", "512 MiB", "24GB"."""

from __future__ import annotations

import re

from framework.errors import ConfigError, Fault

SIZE_PATTERN = r"^\d+(\.\d+)? ?(MiB|GiB|TiB|MB|GB|TB)$"
"""A number and a binary unit (GiB, 2**30 bytes) or a decimal one (GB, 10**9 bytes)."""

_UNITS = {
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def read_size_bytes(text: str, *, path: str) -> int:
    """Return the bytes that a size such as "24GiB" stands for.

    path: the key or option that holds it, for the report.   Raises ConfigError for anything else.
    """
    found = re.fullmatch(SIZE_PATTERN, text.strip())
    if found is None:
        number = re.match(r"\d+(\.\d+)?", text.strip())
        nearest = (f"{number[0]}GiB",) if number else ()
        hint = "Write a number with its unit, e.g. 24GiB or 512MiB."
        message = f"{text!r} isn't an amount of memory"
        raise ConfigError(
            [Fault(path, message, nearest=nearest, hint=hint, code="wrong-value", value=text)]
        )
    unit = found[2]
    return int(float(text.strip().removesuffix(unit)) * _UNITS[unit])
