"""The smallest valid configuration, and what comes of breaking one thing in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from framework.errors import ConfigError, Fault
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
    return {fault.path: fault for fault in caught.value.faults}


def warnings_of(changes: dict[str, Any], **options: Any) -> dict[str, Fault]:
    _, warnings = validate(changed(changes), lambda path: f"place of {path}", **options)
    return {fault.path: fault for fault in warnings}
