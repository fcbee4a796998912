"""Which settings `model.fit` may choose among, and what each costs in time.

Only where frozen weights rest and whether activations are recomputed is chosen: neither what trains nor what the
arithmetic computes, beyond the rounding of FP8 storage. What a configuration says itself is never changed.

Costs are factors on the time of a step, beside bf16 weights on the device without checkpointing. They order the
settings and predict no time. FP8: 1.03 to 1.26 measured on a CPU, 1.16 to 1.64 on paper for a large GPU
(`docs/performance.md`). Checkpointing repeats the forward pass, a third of a step. The factors of offload are guesses
from bytes moved twice a step over PCIe 4 or from a fast disk, for a step on a consumer card.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from framework.plan.build import run_residents, trained_denoiser
from framework.schema.families import DENOISERS
from framework.schema.model import (
    ComponentConfig,
    DitConfig,
    Granularity,
    ModelConfig,
    Offload,
    Precision,
)
from framework.schema.run import RunConfig

FP8_COST = 1.2
CHECKPOINTING_COST = 1.33
OFFLOAD_COST: Mapping[Offload, float] = {"none": 1.0, "host": 3.0, "disk": 12.0}
GRANULARITY_COST: Mapping[Granularity, float] = {"model": 1.0, "block": 1.02, "layer": 1.05}
STEP_SHARE = 0.25
"""Share of an encoder in the time of a step that runs it; a guess."""
ONCE_SHARE = 0.02
"""The same where its results are cached or it runs once for a picture; a guess."""

# How much each value saves on the device, least first.
_PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
_GRANULARITIES: tuple[Granularity, ...] = ("model", "block", "layer")


@dataclass(frozen=True)
class ComponentChoice:
    """Settings of one component; the names are the configuration's."""

    precision: Precision
    offload: Offload
    granularity: Granularity
    gradient_checkpointing: bool = False

    def saves_no_more_than(self, other: ComponentChoice) -> bool:
        """Whether this choice needs at least as much device memory as `other`, whatever the component."""
        as_long_there = self.offload == "none" or (
            other.offload != "none"
            and _GRANULARITIES.index(self.granularity) <= _GRANULARITIES.index(other.granularity)
        )
        return (
            as_long_there
            and _PRECISIONS.index(self.precision) <= _PRECISIONS.index(other.precision)
            and self.gradient_checkpointing <= other.gradient_checkpointing
        )

    def fills_host_as(self, other: ComponentChoice) -> bool:
        """Whether this choice needs at least as much host memory as `other`."""
        if other.offload != "host":
            return True
        same_or_larger = _PRECISIONS.index(self.precision) <= _PRECISIONS.index(other.precision)
        return self.offload == "host" and same_or_larger

    def savings(self) -> tuple[int, ...]:
        """A key that is highest for the choice that needs least on the device, and of equals least on the host."""
        return (
            self.precision == "fp8",
            self.gradient_checkpointing,
            self.offload != "none",
            _GRANULARITIES.index(self.granularity),
            self.offload == "disk",
        )

    def cost(self, moved_share: float = 1.0) -> float:
        """Factor on the component's own time.   moved_share: of its weights that don't stay on the device."""
        cost = FP8_COST if self.precision == "fp8" else 1.0
        cost *= CHECKPOINTING_COST if self.gradient_checkpointing else 1.0
        if self.offload != "none":
            # FP8 moves half of the bytes.
            moved = moved_share * (0.5 if self.precision == "fp8" else 1.0)
            cost *= 1 + (OFFLOAD_COST[self.offload] - 1) * moved
            cost *= 1 + (GRANULARITY_COST[self.granularity] - 1) * moved_share
        return cost


Choice = Mapping[str, ComponentChoice]
"""Component -> its settings."""


@dataclass(frozen=True)
class Freedom:
    """What may be chosen.

    written: dotted paths below `model` that the configuration sets itself, e.g. "dit.precision".
    offloads: places that save device memory here; host memory doesn't where it is the device's own.
    trained: components whose `trainable` counts; none of them for inference.
    shares: component -> its share in the time of a step.   denoiser: the one that training goes through.
    """

    written: frozenset[str]
    offloads: tuple[Offload, ...]
    trained: frozenset[str]
    shares: Mapping[str, float]
    denoiser: str = "dit"

    def choices(self, model: ModelConfig) -> list[Choice]:
        """Every combination, the cheapest first; among equals the one that changes least."""
        names = list(model.components)
        options = [list(self._options(name, part)) for name, part in model.components.items()]
        present = present_choice(model)
        combined = [dict(zip(names, parts, strict=True)) for parts in itertools.product(*options)]
        return sorted(
            combined,
            key=lambda choice: (
                round(self.cost(choice), 6),
                sum(choice[name] != present[name] for name in names),
            ),
        )

    def cost(self, choice: Choice, moved_shares: Mapping[str, float] | None = None) -> float:
        """Factor on the time of a step.

        moved_shares: component -> share of its weights that doesn't stay on the device; 1 where it isn't known.
        """
        cost = 1.0
        for name, part in choice.items():
            moved = (moved_shares or {}).get(name, 1.0)
            cost *= 1 + self.shares[name] * (part.cost(moved) - 1)
        return cost

    def _options(self, name: str, part: ComponentConfig) -> Iterator[ComponentChoice]:
        present = _present(part)
        full = name in self.trained and part.trainable == "full"
        precisions: tuple[Precision, ...] = (present.precision,)
        # A VAE has hardly a linear layer, which is what FP8 stores unless a configuration says otherwise.
        if name != "vae" and not full and not self._is_written(name, "precision"):
            precisions = _PRECISIONS
        offloads: tuple[Offload, ...] = (present.offload,)
        if not full and not self._is_written(name, "offload"):
            offloads = ("none", *self.offloads)
        checkpointing: tuple[bool, ...] = (present.gradient_checkpointing,)
        if self._may_checkpoint(name):
            checkpointing = (False, True)
        for precision, offload, recompute in itertools.product(precisions, offloads, checkpointing):
            for granularity in self._granularities(name, offload, present):
                yield ComponentChoice(precision, offload, granularity, recompute)

    def _granularities(
        self, name: str, offload: Offload, present: ComponentChoice
    ) -> tuple[Granularity, ...]:
        if offload == "none" or self._is_written(name, "granularity"):
            return (present.granularity,)
        # The transformer is the largest part: fetched as a whole it would need as much as at rest.
        return _GRANULARITIES[1:] if name in DENOISERS else _GRANULARITIES

    def _may_checkpoint(self, name: str) -> bool:
        return (
            name == self.denoiser
            and bool(self.trained - {"vae"})
            and not self._is_written(name, "gradient_checkpointing")
        )

    def _is_written(self, name: str, key: str) -> bool:
        return f"{name}.{key}" in self.written


def present_choice(model: ModelConfig) -> Choice:
    """What the configuration says now."""
    return {name: _present(part) for name, part in model.components.items()}


def _present(part: ComponentConfig) -> ComponentChoice:
    return ComponentChoice(
        precision=part.precision,
        offload=part.offload,
        granularity=part.granularity,
        gradient_checkpointing=isinstance(part, DitConfig) and part.gradient_checkpointing,
    )


def written_keys(model: ModelConfig) -> frozenset[str]:
    """Dotted paths below `model` that a file or an override sets, of the keys that may be chosen."""
    written = {"vram_limit"} & model.model_fields_set
    for name, part in model.components.items():
        if name in model.model_fields_set:
            written |= {f"{name}.{key}" for key in part.model_fields_set & _KEYS}
    return frozenset(written)


_KEYS = frozenset(ComponentChoice.__dataclass_fields__)


def changed_keys(model: ModelConfig, choice: Choice) -> dict[str, str | bool]:
    """Dotted path below `model` -> value, of what the choice says otherwise than the configuration."""
    present = present_choice(model)
    return {
        f"{name}.{key}": getattr(choice[name], key)
        for name in choice
        for key in ComponentChoice.__dataclass_fields__
        if getattr(choice[name], key) != getattr(present[name], key)
    }


def with_keys(model: ModelConfig, keys: Mapping[str, str | bool | float | None]) -> ModelConfig:
    """The model section with these keys (dotted paths below `model`) set, and judged again by its schema."""
    values = model.model_dump()
    for path, value in keys.items():
        name, _, key = path.rpartition(".")
        if name and values[name] is None:
            values[name] = {}
        (values[name] if name else values)[key] = value
    return type(model).model_validate(values)


def run_freedom(config: RunConfig, *, device: str) -> Freedom:
    """What may be chosen for a training run.   device: "cpu", "cuda:0", ..."""
    model = config.model
    denoiser = trained_denoiser(model)
    in_step = run_residents(config)["train"]
    return Freedom(
        written=written_keys(model),
        offloads=_offloads(device),
        trained=frozenset(
            name for name, part in model.components.items() if part.trainable != "none"
        ),
        shares={
            name: 1.0 if name == denoiser else STEP_SHARE if name in in_step else ONCE_SHARE
            for name in model.components
        },
        denoiser=denoiser,
    )


def inference_freedom(model: ModelConfig, *, device: str) -> Freedom:
    """What may be chosen for a generation, in which nothing trains."""
    return Freedom(
        written=written_keys(model),
        offloads=_offloads(device),
        trained=frozenset(),
        shares={name: 1.0 if name in DENOISERS else ONCE_SHARE for name in model.components},
    )


def _offloads(device: str) -> tuple[Offload, ...]:
    """Where weights can rest to save device memory; host memory is no other place for a CPU."""
    return ("host", "disk") if device.startswith("cuda") else ("disk",)


def free_keys(model: ModelConfig) -> frozenset[str]:
    """Dotted paths below `model` of keys that may be chosen, because neither a file nor an override sets them."""
    keys = {"vram_limit"}
    for name, part in model.components.items():
        keys |= {f"{name}.{key}" for key in _KEYS if key in type(part).model_fields}
    return frozenset(keys) - written_keys(model)
