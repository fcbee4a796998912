"""Sections that aren't part of a run, e.g. a sweep's settings, are judged in the same words."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field

from framework.errors import Fault
from framework.schema.base import Section
from framework.schema.validate import judge_section


class Partition(Section):
    name: str = Field(min_length=1, description="Name of the partition.")
    gpus: int = Field(1, ge=0, le=8, description="GPUs of a job.")


class Launcher(Section):
    kind: Literal["basic", "slurm"] = Field("basic", description="What starts the jobs.")
    n_jobs: int = Field(1, ge=1, description="Jobs at a time.")
    partitions: tuple[Partition, ...] = Field((), description="Where jobs may run.")


def judge(values: dict[str, Any]) -> tuple[Launcher | None, dict[str, Fault]]:
    section, faults = judge_section(
        Launcher, values, lambda path: f"place of {path}", prefix="hydra.launcher"
    )
    return section, {fault.path: fault for fault in faults}


def test_a_valid_section_is_returned() -> None:
    section, faults = judge({"n_jobs": 2, "partitions": [{"name": "a"}]})
    assert faults == {}
    assert section is not None
    assert section.partitions[0].gpus == 1


@pytest.mark.parametrize(
    ("values", "path", "code", "message", "nearest", "hint"),
    [
        ({"njobs": 2}, "n_jobs", "unknown-key", "hydra.launcher has n_jobs", "hydra.launcher.n_jobs", "=2."),
        ({"n_jobs": 0}, "n_jobs", "out-of-range", "at least 1", "", "hydra.launcher.n_jobs=1"),
        ({"n_jobs": "two"}, "n_jobs", "wrong-type", "'two' is not a whole number", "", ""),
        ({"n_jobs": True}, "n_jobs", "wrong-type", "not true", "", ""),
        ({"kind": "slrm"}, "kind", "wrong-value", "one of basic, slurm", "slurm", "hydra.launcher.kind=slurm"),
        ({"learning_rate": 1}, "learning_rate", "unknown-key", "hydra.launcher has kind", "", "Remove it"),
        ({"partitions": [{"name": "a", "gpu": 1}]}, "partitions[0].gpu", "unknown-key",
         "hydra.launcher.partitions[0] has gpus, name", "", ""),
        ({"partitions": [{"name": "a"}, {"name": ""}]}, "partitions[1].name", "wrong-length", "isn't empty", "", ""),
        ({"partitions": [{"name": "a", "gpus": 9}]}, "partitions[0].gpus", "out-of-range", "at most 8", "", ""),
        ({"partitions": [{}]}, "partitions[0].name", "missing-key", "must be set: Name of the partition", "", ""),
        ({"n_jobs": "???", "kind": 3}, "kind", "wrong-type", "one of", "", ""),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_the_prefix(
    values: dict[str, Any], path: str, code: str, message: str, nearest: str, hint: str
) -> None:
    if code == "unknown-key" and path == "n_jobs":
        path = "njobs"
    section, faults = judge(values)
    assert section is None
    assert list(faults) == [f"hydra.launcher.{path}"]
    fault = faults[f"hydra.launcher.{path}"]
    assert fault.code == code
    assert fault.where == f"place of hydra.launcher.{path}"
    assert message in fault.message
    assert fault.nearest == ((nearest,) if nearest else ())
    assert hint in fault.hint
    assert fault.hint
    assert "octavo explain" not in fault.hint  # which knows the keys of a run only
