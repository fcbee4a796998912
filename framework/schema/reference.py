"""The page of all configuration keys and the words in which a key is described, made from the JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from framework.schema.in_words import (
    Json,
    default_in_words,
    example_in_words,
    is_section,
    values_in_words,
)
from framework.schema.json_schema import (
    SWEEP_GROUPS,
    find,
    run_schema,
    sweep_options,
    walk_sections,
)

INTRODUCTION = """# Configuration keys

Made from the JSON Schema by `octavo schema --format markdown`; a test fails when this page is stale.
`octavo explain KEY` tells the same about one key, with its present value and what set it.

A key is set in a recipe's YAML or on the command line: `python train.py recipe=pocket_lora optim.lr=5e-4`.
"""
SWEEPS = """# Keys of sweeps

Read by `octavo train -m` only: where the points run (`hydra/launcher=joblib`) and how they are chosen
(`hydra/sweeper=optuna`), with keys such as `hydra.launcher.n_jobs=4`. See [sweeps.md](sweeps.md).
"""


def render_reference(of: str = "") -> str:
    """Write the page: one table per section, one row per key with values, default, example and meaning.

    of: dotted path of one section, e.g. "model", to leave out the others and the introduction.
    """
    parts = [] if of else [INTRODUCTION]
    if of in SWEEP_GROUPS:
        return "\n".join(_sweep_tables(of))
    for path, section in walk_sections(find(run_schema(), of) or {}, of):
        rows = _rows(path, section)
        if rows:
            parts.append(_table(f"`{path}`", section["description"], rows))
    if not of:
        parts.append(SWEEPS)
        parts += [table for group in SWEEP_GROUPS for table in _sweep_tables(group)]
    return "\n".join(parts)


def _sweep_tables(group: str) -> Iterator[str]:
    """One table for each choice of a sweep's group."""
    path = group.replace("/", ".")
    for option in sweep_options(group):
        name = option["properties"]["name"]["enum"][0]
        rows = _rows(path, option, leave_out=("name",)) or ["| none | | | | |"]
        yield _table(f"`{path}` with `{group}={name}`", option["description"], rows)


def _table(heading: str, about: str, rows: Sequence[str]) -> str:
    header = ["| key | values | default | example | meaning |", "|---|---|---|---|---|"]
    return "\n".join([f"## {heading}", "", about, "", *header, *rows, ""])


def _rows(path: str, section: Json, leave_out: Sequence[str] = ()) -> list[str]:
    """One row for each plain key of a section."""
    required = section.get("required", ())
    return [
        _row(f"{path}.{name}" if path else name, key, name in required)
        for name, key in section["properties"].items()
        if not is_section(key) and name not in leave_out
    ]


def _row(path: str, key: Json, required: bool) -> str:
    cells = [
        f"`{path}`",
        values_in_words(key, "`"),
        default_in_words(key, required=required, mark="`"),
        f"`{example_in_words(key)}`",
        key["description"],
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
