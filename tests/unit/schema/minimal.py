"""The smallest valid configuration, and what comes of breaking one thing in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from framework.errors import FAULT_CODES, ConfigError, Fault
from framework.schema.names import known_paths
from framework.schema.run import RunConfig
from framework.schema.validate import validate

MINIMAL: dict[str, Any] = {
    "model": {"family": "qwen_image", "source": "somewhere", "dit": {"trainable": "lora"}},
    "data": {"path": "pictures"},
    "run": {"name": "test"},
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The minimal configuration with dotted keys set."""
    values = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        node = values
        *parents, last = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return values


def faults_of(changes: dict[str, Any], **options: Any) -> dict[str, Fault]:
    with pytest.raises(ConfigError, match="in the configuration") as caught:
        validate(changed(changes), lambda path: f"place of {path}", **options)
    for fault in caught.value.faults:
        assert_whole(fault)
    return {fault.path: fault for fault in caught.value.faults}


def warnings_of(changes: dict[str, Any], **options: Any) -> dict[str, Fault]:
    _, warnings = validate(changed(changes), lambda path: f"place of {path}", **options)
    for fault in warnings:
        assert_whole(fault)
    return {fault.path: fault for fault in warnings}


def assert_whole(fault: Fault) -> None:
    """Every fault says where, what kind it is, and what to do next; names that are near exist."""
    assert fault.path
    assert fault.message
    assert fault.message[-1] not in ".;:"
    assert fault.code in FAULT_CODES
    assert fault.code != "invalid"
    assert fault.where
    assert fault.hint.endswith((".", "...")), fault.hint
    assert fault.hint[0].isupper() or fault.hint[0] == "`"
    if fault.code in ("wrong-value", "wrong-type", "out-of-range", "wrong-length"):
        assert fault.value
        assert fault.allowed
    if fault.code == "unknown-key":
        assert set(fault.nearest) <= set(known_paths(RunConfig))
