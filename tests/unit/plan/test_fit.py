"""The cheapest settings that fit are chosen, on made-up plans of a model of 20 GiB in FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from framework.errors import ConfigError, PlanError
from framework.plan.fit import (
    CUDA_RESERVE_BYTES,
    Fit,
    Limits,
    find_shortfall,
    fitting,
    override_lines,
    solve_fit,
)
from framework.plan.fit_choices import (
    Freedom,
    inference_freedom,
    present_choice,
    run_freedom,
    with_keys,
    written_keys,
)
from framework.plan.types import (
    ComponentPlan,
    MemoryParts,
    Phase,
    PhasePlan,
    Placement,
    States,
    TensorGroup,
    TensorPlan,
    VramPlan,
)
from framework.schema.model import ComponentConfig, DitConfig, ModelConfig
from framework.schema.run import RunConfig
from framework.schema.sizes import read_size_bytes
from tests.unit.schema.minimal import changed

GIB = 2**30
BF16_GIB = {"dit": 40.0, "text_encoder": 16.0, "vae": 0.25}
# Share of a component that is fetched at once, two units.
UNIT_SHARE = {"model": 1.0, "block": 2 / 60, "layer": 2 / 840}


def run_config(changes: Mapping[str, Any] | None = None) -> RunConfig:
    return RunConfig.model_validate(
        changed({"sample.prompts": ["a"], "data.cache": True, **(changes or {})})
    )


class Machine:
    """Makes up plans, and counts how often it was asked for one.

    activations: GiB of the train step without checkpointing; a quarter of it with.   optimizer: GiB.
    """

    def __init__(
        self, config: RunConfig, *, activations: float = 12.0, optimizer: float = 0.5
    ) -> None:
        self.config = config
        self.activations = activations
        self.optimizer = optimizer
        self.plans = 0
        self.outlines = 0

    def evaluate(self, model: ModelConfig) -> VramPlan:
        self.plans += 1
        return self._plan(model, traced=True)

    def outline(self, model: ModelConfig) -> VramPlan:
        self.outlines += 1
        return self._plan(model, traced=False)

    def _plan(self, model: ModelConfig, *, traced: bool) -> VramPlan:
        step = self.activations / (4 if model.dit.gradient_checkpointing else 1)
        phases = (
            self._phase("encode", ("text_encoder", "vae"), model, 0.5, 0.0, traced),
            self._phase("train", ("dit",), model, step, self.optimizer, traced),
            self._phase("sample", ("dit", "vae"), model, 2.0, self.optimizer, traced),
        )
        return VramPlan(
            purpose="train", family="qwen_image", compute_dtype="bf16", device="cuda",
            components=tuple(self._component(name, part) for name, part in model.components.items()),
            phases=phases,
        )  # fmt: skip

    @staticmethod
    def _component(name: str, part: ComponentConfig) -> ComponentPlan:
        """One tensor as large as all of it."""
        placed = Placement(
            storage_dtype="fp8_e4m3" if part.precision == "fp8" else "bf16", place="device"
        )
        tensor = TensorPlan(
            name="w", source_key="w", file="f", shape=(int(BF16_GIB[name] * GIB / 2),),
            source_dtype="BF16", kind="linear",
        )  # fmt: skip
        states = States(offload=placed, onload=placed, preparing=placed, computation=placed)
        return ComponentPlan(
            name=name, source="s", folder="f", commit=None, trainable="none", lora=None,
            groups=(TensorGroup(name="g", states=states, tensors=(tensor,)),),
        )  # fmt: skip

    @staticmethod
    def _phase(
        name: Phase,
        parts: tuple[str, ...],
        model: ModelConfig,
        activations: float,
        optimizer: float,
        traced: bool,
    ) -> PhasePlan:
        sizes = {
            part: BF16_GIB[part] / (2 if model.components[part].precision == "fp8" else 1)
            for part in parts
        }
        resting = sum(s for part, s in sizes.items() if model.components[part].offload == "none")
        away = {p: s for p, s in sizes.items() if model.components[p].offload != "none"}
        least = max(
            (s * UNIT_SHARE[model.components[p].granularity] for p, s in away.items()), default=0.0
        )
        room = (model.vram_limit or 0) - resting - optimizer - activations
        fetched = max(least, min(sum(away.values()), room))
        host = sum(s for part, s in sizes.items() if model.components[part].offload == "host")
        return PhasePlan(
            name=name,
            components=parts,
            device=MemoryParts(
                weights=int(resting * GIB),
                optimizer=int(optimizer * GIB),
                fetched=int(fetched * GIB),
                activations=int(activations * GIB) if traced else None,
            ),
            host=MemoryParts(weights=int(host * GIB)),
        )


def solve(
    gib: float,
    changes: Mapping[str, Any] | None = None,
    *,
    host_gib: float | None = None,
    device: str = "cuda",
    machine: Machine | None = None,
) -> Fit:
    config = machine.config if machine else run_config(changes)
    machine = machine or Machine(config)
    size, host = int(gib * GIB), None if host_gib is None else int(host_gib * GIB)
    limits = Limits(size, size, None if device == "cpu" else host, device == "cpu")
    return solve_fit(
        config.model,
        limits=limits,
        freedom=run_freedom(config, device=device),
        evaluate=machine.evaluate,
        outline=machine.outline,
    )


def test_what_fits_as_it_is_stays_as_it_is() -> None:
    fit = solve(80)
    assert fit.chosen is not None
    assert fit.chosen.keys == {}
    assert fit.chosen.cost == 1.0
    assert fit.overrides == []
    assert [trial.fits for trial in fit.trials] == [True]


@pytest.mark.parametrize(
    ("gib", "overrides"),
    [
        (53, []),
        (52, ["model.dit.precision=fp8"]),
        (33, ["model.dit.precision=fp8"]),
        # the step alone is too large, so that recomputing is what helps
        (32, ["model.dit.precision=fp8", "model.dit.gradient_checkpointing=true"]),
        (24, ["model.dit.precision=fp8", "model.dit.gradient_checkpointing=true"]),
    ],
)
def test_the_first_in_the_order_of_cost_that_fits_is_chosen(gib: int, overrides: list[str]) -> None:
    assert sorted(solve(gib).overrides) == sorted(overrides)


def test_an_encoder_changes_only_where_its_own_phase_is_too_large() -> None:
    fit = solve(16)
    assert {o for o in fit.overrides if "text_encoder" in o} == {"model.text_encoder.precision=fp8"}
    assert not [o for o in fit.overrides if "vae" in o]


def test_offload_fills_the_room_that_is_left() -> None:
    fit = solve(16)
    assert fit.model is not None
    assert fit.model.dit.offload == "host"
    assert fit.model.dit.granularity == "block"
    assert fit.model.vram_limit == 16
    train = next(phase for phase in fit.chosen.phases if phase.name == "train")  # type: ignore[union-attr]
    assert 15.9 * GIB < train.device_bytes <= 16 * GIB


def test_the_limit_is_lowered_where_kept_weights_leave_no_room_for_activations() -> None:
    config = run_config()
    machine = Machine(config)

    def careless(model: ModelConfig) -> VramPlan:
        """Keeps weights as if there were no activations."""
        limit = None if model.vram_limit is None else model.vram_limit + 2.0
        return machine.evaluate(model.model_copy(update={"vram_limit": limit}))

    size = 16 * GIB
    fit = solve_fit(
        config.model,
        limits=Limits(size, size, None, False),
        freedom=run_freedom(config, device="cuda"),
        evaluate=careless,
    )
    assert fit.model is not None
    assert fit.model.vram_limit == pytest.approx(14, abs=0.01)
    assert fit.chosen is not None
    assert fit.chosen.fits


def test_a_small_host_memory_leads_to_the_disk() -> None:
    fit = solve(12, host_gib=4)
    assert fit.model is not None
    assert fit.model.dit.offload == "disk"
    assert fit.model.dit.precision == "fp8"
    assert solve(12, host_gib=64).model.dit.offload == "host"  # type: ignore[union-attr]


def test_layers_are_fetched_only_where_blocks_are_too_large() -> None:
    machine = Machine(run_config(), activations=8.0)
    assert solve(3.5, machine=machine).model.dit.granularity == "block"  # type: ignore[union-attr]
    tight = Machine(run_config(), activations=8.0)
    assert solve(3.0, machine=tight).model.dit.granularity == "layer"  # type: ignore[union-attr]


def test_a_cpu_never_rests_weights_in_its_own_memory() -> None:
    fit = solve(16, device="cpu")
    assert fit.model is not None
    assert {part.offload for part in fit.model.components.values()} <= {"none", "disk"}
    assert not any("=host" in line for trial in fit.trials for line in override_lines(trial.keys))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("dit.precision", "bf16"),
        ("dit.gradient_checkpointing", False),
        ("dit.offload", "none"),
        ("vram_limit", 20.0),
    ],
)
def test_what_the_configuration_sets_itself_is_kept(written: str, value: Any) -> None:
    fit = solve(24, {f"model.{written}": value})
    model = fit.model
    assert written in fit.kept
    assert model is not None or written == "dit.offload"
    for trial in fit.trials:
        assert written not in trial.keys


def test_nothing_but_storage_and_recomputation_is_changed() -> None:
    config = run_config({"model.dit.lora.rank": 8})
    fit = solve(10, machine=Machine(config))
    assert fit.model is not None
    allowed = {"precision", "offload", "granularity", "gradient_checkpointing", "vram_limit"}

    def rest(model: ModelConfig) -> Any:
        values = model.model_dump()
        return {
            name: {k: v for k, v in part.items() if k not in allowed}
            if isinstance(part, dict)
            else part
            for name, part in values.items()
            if name not in allowed
        }

    assert rest(fit.model) == rest(config.model)


def test_a_component_that_trains_in_full_rests_on_the_device_unencoded() -> None:
    fit = solve(56, {"model.dit.trainable": "full"})
    assert fit.model is not None
    assert fit.model.dit.precision == "bf16"
    assert fit.model.dit.offload == "none"
    assert solve(24, {"model.dit.trainable": "full"}).chosen is None


def test_nothing_is_recomputed_where_no_gradient_passes() -> None:
    config = run_config({"model.dit.trainable": "none", "model.vae.trainable": "lora"})
    fit = solve(20, machine=Machine(config))
    assert not any("dit.gradient_checkpointing" in trial.keys for trial in fit.trials)
    freedom = inference_freedom(config.model, device="cuda")
    assert not any(c["dit"].gradient_checkpointing for c in freedom.choices(config.model))


def test_choices_come_in_the_order_of_cost_and_equal_arguments_give_equal_settings() -> None:
    config = run_config()
    freedom = run_freedom(config, device="cuda")
    choices = freedom.choices(config.model)
    costs = [freedom.cost(choice) for choice in choices]
    assert costs == sorted(costs)
    assert choices[0] == present_choice(config.model)
    assert solve(11).overrides == solve(11).overrides


def test_the_chosen_settings_are_the_cheapest_of_all_that_fit() -> None:
    """What failures rule out is never something that would have fitted."""
    config = run_config()
    freedom = run_freedom(config, device="cuda")
    for gib, host in [
        (53, None),
        (30, 8.0),
        (20, 30.0),
        (14, 12.0),
        (9, 64.0),
        (6, 4.0),
        (4, 25.0),
    ]:
        machine = Machine(config)
        fit = solve(gib, host_gib=host, machine=machine)
        assert fit.chosen is not None
        tried = machine.plans
        for choice in freedom.choices(config.model):
            keys = {
                f"{name}.{key}": getattr(part, key)
                for name, part in choice.items()
                for key in ("precision", "offload", "granularity")
            }
            keys["dit.gradient_checkpointing"] = choice["dit"].gradient_checkpointing
            plan = machine.evaluate(with_keys(config.model, keys))
            over = [excess for phase in plan.phases for _, excess in fit.limits.excess(phase)]
            if max(over) <= 0:
                assert fit.chosen.cost == pytest.approx(freedom.cost(choice))
                break
        assert tried < 40


def test_an_outline_spares_the_slow_plans() -> None:
    machine = Machine(run_config())
    fit = solve(24, machine=machine)
    assert fit.chosen is not None
    assert not all(trial.traced for trial in fit.trials)
    without = Machine(machine.config)
    same = solve_fit(
        machine.config.model,
        limits=fit.limits,
        freedom=run_freedom(machine.config, device="cuda"),
        evaluate=without.evaluate,
    )
    assert same.overrides == fit.overrides
    assert machine.plans < without.plans


def test_where_nothing_fits_it_says_what_comes_closest_and_what_to_change() -> None:
    machine = Machine(run_config(), activations=60.0)
    fit = solve(8, machine=machine)
    assert fit.chosen is None
    short = find_shortfall(fit)
    assert (short.phase.name, short.part) == ("train", "activations")
    assert short.part_bytes == 15 * GIB
    assert "data.batch_size" in short.way
    assert fit.closest.keys["dit.gradient_checkpointing"] is True
    with pytest.raises(
        PlanError, match=r"nothing fits 8\.0 GiB of device memory: train needs"
    ) as e:
        fitting(fit)
    assert "model.dit.precision=fp8" in str(e.value.where)
    assert "activations, 15.0 GiB" in str(e.value.found)
    assert machine.plans <= 2, "no other settings are tried"


@pytest.mark.parametrize(
    ("changes", "part", "way"),
    [
        ({"model.dit.precision": "bf16", "model.dit.offload": "none"}, "weights", "dit.precision"),
        ({"model.vram_limit": 200.0}, "fetched", "model.vram_limit"),
    ],
)
def test_the_way_out_names_what_was_set_by_hand(
    changes: dict[str, Any], part: str, way: str
) -> None:
    short = find_shortfall(solve(10, changes))
    assert short.part == part
    assert way in short.way


def test_a_large_optimizer_is_told() -> None:
    machine = Machine(run_config(), optimizer=30.0)
    short = find_shortfall(solve(24, machine=machine))
    assert short.part == "optimizer"
    assert "adamw_8bit" in short.way


def test_the_host_can_be_what_is_too_small() -> None:
    fit = solve(8, {"model.dit.offload": "host"}, host_gib=4)
    short = find_shortfall(fit)
    assert short.memory == "host"
    with pytest.raises(PlanError, match=r"nothing fits 4\.0 GiB of host memory"):
        fitting(fit)


def test_written_keys_are_those_that_a_file_or_an_override_sets() -> None:
    model = ModelConfig(
        family="qwen_image",
        source="x",
        vram_limit=4.0,
        dit=DitConfig(precision="bf16", trainable="lora"),
        vae=ComponentConfig(offload="host"),
    )
    assert written_keys(model) == {"vram_limit", "dit.precision", "vae.offload"}
    resolved = with_keys(model, {"dit.offload": "disk"})
    assert len(written_keys(resolved)) == 3 * 3 + 1 + 1, "what was resolved once is all written"


def test_a_gpu_holds_less_than_its_size() -> None:
    limits = Limits.of(24 * GIB, None, device="cuda:0")
    assert limits.device_bytes == int(24 * GIB * 0.97) - CUDA_RESERVE_BYTES
    assert not limits.shared
    assert Limits.of(24 * GIB, 8 * GIB, device="cpu") == Limits(24 * GIB, 24 * GIB, None, True)
    with pytest.raises(PlanError, match="holds no tensors"):
        Limits.of(GIB // 2, None, device="cuda")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24 GiB", 24 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("512MiB", 2**29),
        ("24GB", 24 * 10**9),
        (" 2TiB ", 2 * 2**40),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert read_size_bytes(text, path="--fit") == size


@pytest.mark.parametrize("text", ["24", "24gib", "GiB", "-1GiB", "24 GiB!", "0x10GiB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="isn't an amount of memory") as caught:
        read_size_bytes(text, path="--fit")
    (fault,) = caught.value.faults
    assert fault.path == "--fit"
    assert fault.nearest == (
        ("24GiB",) if text.startswith("24") else ("0GiB",) if text.startswith("0") else ()
    )


def test_freedom_weighs_encoders_by_whether_a_step_runs_them() -> None:
    cached = run_freedom(run_config(), device="cuda")
    live = run_freedom(run_config({"data.cache": False}), device="cuda")
    assert isinstance(cached, Freedom)
    assert cached.shares["text_encoder"] < live.shares["text_encoder"] < live.shares["dit"]


def test_offload_costs_less_where_weights_stay_on_the_device() -> None:
    config = run_config()
    freedom = run_freedom(config, device="cuda")
    choices = freedom.choices(config.model)
    choice = next(c for c in choices if c["dit"].offload == "host" and c["dit"].precision == "fp8")
    costs = [freedom.cost(choice, {"dit": moved}) for moved in (0.0, 0.5, 1.0)]
    assert costs == sorted(costs)
    assert costs[2] == freedom.cost(choice)
    assert costs[0] == pytest.approx(1.2, abs=0.01)
