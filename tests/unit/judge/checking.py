"""Judges the files of a valid configuration with some keys changed."""

from __future__ import annotations

from typing import Any

from framework.errors import Fault
from framework.judge.disk import FileCheck, check_files
from framework.schema.validate import Use, judge_values
from tests.unit.schema.minimal import assert_whole, changed


def check(
    changes: dict[str, Any] | None = None,
    *,
    use: Use = "train",
    need: bool = True,
    where: Any = lambda path: f"place of {path}",
) -> FileCheck:
    base = {
        "model.source": "model",
        "data.path": "data/cats",
        "model.dit.lora": {"rank": 4, "alpha": 4},
    }
    config, faults, _ = judge_values(changed(base | (changes or {})), where, use=use)
    assert config is not None, faults
    found = check_files(config, where, use=use, need=need)
    for fault in (*found.faults, *found.warnings):
        assert_whole(fault)
    return found


def only_fault(found: FileCheck) -> Fault:
    assert len(found.faults) == 1, found
    assert found.warnings == ()
    return found.faults[0]
