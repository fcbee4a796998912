"""Judging stays cheap: the benchmark runs, and its targets are met on this machine."""

from __future__ import annotations

import json
import sys

import pytest

from .conftest import ROOT, run


@pytest.mark.slow
def test_a_hundred_configurations_take_less_than_the_targets(environment: dict[str, str]) -> None:
    command = [sys.executable, "benchmarks/validate.py", "--json", "--repeats", "1"]
    result = run(command, ROOT, environment, check=False)
    found = json.loads(result.stdout)
    assert result.returncode == 0, found
    assert found["targets_met"] == {"one": True, "hundred": True}
    assert found["one"]["process_seconds"] < found["torch"]["process_seconds"]
