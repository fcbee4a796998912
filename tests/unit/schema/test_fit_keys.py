"""`model.fit` and `model.fit_host`: amounts of memory with a unit."""

from __future__ import annotations

import pytest

from tests.unit.schema.minimal import faults_of, warnings_of


@pytest.mark.parametrize("size", ["24GiB", "11.5 GiB", "512MiB", "24GB"])
def test_a_size_with_a_unit_is_allowed(size: str) -> None:
    assert warnings_of({"model.fit": size, "model.fit_host": size}) == {}


@pytest.mark.parametrize("size", [24, "24", "24gib", "much", True])
def test_a_size_without_a_unit_is_refused(size: object) -> None:
    fault = faults_of({"model.fit": size})["model.fit"]
    assert "an amount of memory such as 24GiB or 512MiB" in fault.allowed
    assert "24GiB" in fault.message


def test_host_memory_without_a_device_to_fit_is_told() -> None:
    fault = warnings_of({"model.fit_host": "64GiB"})["model.fit_host"]
    assert fault.code == "unused"


def test_what_fit_may_yet_make_use_of_is_not_called_unused() -> None:
    changes = {"model.vram_limit": 20, "model.dit.granularity": "block"}
    assert set(warnings_of(changes)) == {"model.vram_limit", "model.dit.granularity"}
    assert warnings_of({**changes, "model.fit": "24GiB"}) == {}
