"""`model.fit` in a run: chosen before anything is written, kept by a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.errors import PlanError
from framework.plan.types import PhasePlan, VramPlan
from framework.runtime.fitting import fit_run, host_memory_bytes
from framework.runtime.forecast import forecast_run
from framework.schema import RunConfig
from framework.training import fitting as module_under_test
from framework.training.fitting import resolve_fit
from framework.training.run_folder import config_key, read_state
from tests.training.runs import change, fit_values, read_losses

MIB = 2**20


def train_bytes(plan: VramPlan) -> int:
    """Of both memories, which are one on the CPU."""
    phase: PhasePlan = plan.phase("train")
    return phase.device_bytes + phase.host_bytes


@pytest.fixture
def tight(values: dict[str, Any]) -> dict[str, Any]:
    """A run that fits only when blocks are recomputed: nearly all that the tiny model's step takes is activations."""
    values = change(values, data__batch_size=4, model__text_encoder__offload="none")
    plain = forecast_run(RunConfig.model_validate(values), device="cpu")
    recomputed = change(values, model__dit__gradient_checkpointing=True)
    smaller = forecast_run(RunConfig.model_validate(recomputed), device="cpu")
    between = (train_bytes(plain) + train_bytes(smaller)) / 2 / MIB
    return change(values, model__fit=f"{between:.6f}MiB")


def test_a_run_takes_the_settings_and_writes_them_down(tight: dict[str, Any]) -> None:
    result = fit_values(tight)
    saved = yaml.safe_load((result.run_dir / "config.yaml").read_text())
    assert saved["model"]["dit"]["gradient_checkpointing"] is True
    assert saved["model"]["fit"] == tight["model"]["fit"]
    by_hand = change(
        tight, model__fit=None, model__dit__gradient_checkpointing=True, run__name="by_hand"
    )
    assert read_losses(fit_values(by_hand).run_dir) == read_losses(result.run_dir)
    plan = yaml.safe_load((result.run_dir / "plan.json").read_text())
    assert plan["components"]["dit"]["gradient_checkpointing"] is True


def test_what_was_resolved_is_a_configuration_that_chooses_nothing(tight: dict[str, Any]) -> None:
    config = RunConfig.model_validate(tight)
    resolved, text = resolve_fit(config, "", device="cpu")
    read_back = RunConfig.model_validate(yaml.safe_load(text))
    assert read_back == resolved
    again, _ = resolve_fit(read_back, text, device="cpu")
    assert again == resolved
    assert len(fit_run(read_back, device="cpu").trials) == 1


def test_a_run_without_fit_is_left_alone(values: dict[str, Any]) -> None:
    config = RunConfig.model_validate(values)
    assert resolve_fit(config, "as it was", device="cpu") == (config, "as it was")


def test_a_stopped_run_goes_on_with_the_settings_that_it_began_with(
    tight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit_values(tight)

    def refuse(config: RunConfig, *, device: str) -> None:
        raise AssertionError("settings were chosen anew")

    monkeypatch.setattr(module_under_test, "fit_run", refuse)
    config = RunConfig.model_validate(tight)
    with pytest.raises(AssertionError, match="chosen anew"):
        resolve_fit(config, "", device="cpu")  # a finished run decides nothing
    state_file = first.run_dir / "run.json"
    state_file.write_text(state_file.read_text().replace('"finished"', '"running"'))
    resolved, _ = resolve_fit(config, "", device="cpu")
    assert resolved.model.dit.gradient_checkpointing
    assert config_key(resolved) == read_state(first.run_dir)["key"]
    # What may differ when a run is gone on with may differ here, too.
    quiet = RunConfig.model_validate(change(tight, trainer__log_every_n_steps=3))
    assert resolve_fit(quiet, "", device="cpu")[0].model == resolved.model
    for other in (
        change(tight, optim__lr=1e-3),
        change(tight, model__fit="1GiB"),
        change(tight, checkpoint__resume="never"),
        change(tight, model__dit__offload="none"),
    ):
        if other["model"]["dit"].get("offload"):
            # The same settings, now written by hand: still the same run.
            assert resolve_fit(RunConfig.model_validate(other), "", device="cpu")[0] == resolved
            continue
        with pytest.raises(AssertionError, match="chosen anew"):
            resolve_fit(RunConfig.model_validate(other), "", device="cpu")


def test_where_nothing_fits_nothing_is_written(values: dict[str, Any], tmp_path: Path) -> None:
    tiny = change(values, model__fit="0.1MiB")
    with pytest.raises(PlanError, match="nothing fits"):
        fit_values(tiny)
    assert not (tmp_path / "outputs").exists()


def test_this_machine_says_how_much_memory_it_has() -> None:
    found = host_memory_bytes()
    assert found is None or found > 2**28
