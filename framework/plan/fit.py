"""Chooses the cheapest settings whose memory fits: what `octavo plan --fit` and `model.fit` do.

Pure: plans are made by a function that is given. Settings are tried from the cheapest on (`fit_choices.py`). What a
failure rules out isn't tried: a phase that is too large is so with all settings of its components that save no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import floor
from typing import Literal, NamedTuple

from framework.errors import PlanError
from framework.plan.fit_choices import Choice, Freedom, changed_keys, with_keys
from framework.plan.table import format_bytes
from framework.plan.types import MemoryParts, PhasePlan, VramPlan
from framework.plan.units import component_units
from framework.schema.model import ModelConfig

Memory = Literal["device", "host"]
Evaluate = Callable[[ModelConfig], VramPlan]
Keys = Mapping[str, str | bool | float | None]

CUDA_RESERVE_BYTES = 600 * 2**20
"""What a CUDA process takes beside its tensors: context, kernels, cuBLAS workspaces. A guess; it differs by card."""
FRAGMENTATION = 0.03
"""Share of a GPU's memory that the allocator can't use in practice. A guess."""
_LIMIT_STEP = 0.001  # GiB
_MAX_LIMITS = 3


@dataclass(frozen=True)
class Limits:
    """How much memory there is.

    size_bytes: of the device, as asked for.   device_bytes: what tensors may take of it.
    host_bytes: the same of host memory; None for no limit.   shared: whether the device's memory is the host's.
    """

    size_bytes: int
    device_bytes: int
    host_bytes: int | None
    shared: bool

    @classmethod
    def of(cls, size_bytes: int, host_bytes: int | None, *, device: str) -> Limits:
        """Limits for a device of this size; on a GPU less what CUDA and fragmentation take.

        device: "cpu", "cuda:0", ...   Raises PlanError where nothing would be left.
        """
        shared = device.startswith(("cpu", "mps"))
        usable = size_bytes
        if device.startswith("cuda"):
            usable = int(size_bytes * (1 - FRAGMENTATION)) - CUDA_RESERVE_BYTES
        if usable <= 0:
            raise PlanError(
                "so little device memory holds no tensors",
                found=f"{size_bytes / 2**30:.2f} GiB, of which a CUDA process takes about "
                f"{CUDA_RESERVE_BYTES / 2**30:.1f} GiB itself",
                hint="give --fit or model.fit the size of the card, e.g. 24GiB",
            )
        return cls(size_bytes, usable, None if shared else host_bytes, shared)

    def excess(self, phase: PhasePlan) -> Iterator[tuple[Memory, int]]:
        """Each memory with the bytes by which a phase is above its limit; negative where it is below."""
        used = phase.device_bytes + (phase.host_bytes if self.shared else 0)
        yield "device", used - self.device_bytes
        if self.host_bytes is not None:
            yield "host", phase.host_bytes - self.host_bytes


class Failure(NamedTuple):
    """A phase that is too large with some settings.

    sizes: components whose settings decide it -> bytes of their weights there.   excess_bytes: above the limit.
    """

    sizes: Mapping[str, int]
    memory: Memory
    excess_bytes: int
    choice: Choice

    def rules_out(self, choice: Choice) -> bool:
        """Whether the same phase must be too large with other settings, too: what they save is less than the excess."""
        saved = 0
        for name, size in self.sizes.items():
            other, failed = choice[name], self.choice[name]
            if self.memory == "host":
                saved += 0 if other.fills_host_as(failed) else size
            elif not other.saves_no_more_than(failed):
                if other.gradient_checkpointing > failed.gradient_checkpointing:
                    return False
                saved += size
        return saved < self.excess_bytes


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    keys: dotted path below `model` -> value, of what they change.   cost: factor on the time of a step, as if all
    offloaded weights were fetched each time; for what was chosen, with those that do.
    phases: as planned.   traced: False where weights alone were too large, so that nothing more was worked out.
    """

    keys: Keys
    cost: float
    phases: tuple[PhasePlan, ...]
    limits: Limits
    traced: bool = True

    @property
    def excess_bytes(self) -> int:
        """Bytes above the limit in the phase that is worst; 0 or less where everything fits."""
        return self.worst()[2]

    @property
    def fits(self) -> bool:
        """Whether every phase stays below both limits."""
        return self.traced and self.excess_bytes <= 0

    def worst(self) -> tuple[PhasePlan, Memory, int]:
        """The phase and memory that are nearest to the limit or farthest above it, and by how many bytes."""
        found = [
            (phase, memory, excess)
            for phase in self.phases
            for memory, excess in self.limits.excess(phase)
        ]
        return max(found, key=lambda item: item[2])


@dataclass(frozen=True)
class Fit:
    """What came of it.

    trials: in the order in which they were tried.   chosen: the one that fits; None where none does.
    model, plan: with the chosen settings; None where nothing fits.
    kept: dotted paths below `model` that the configuration sets itself, so that they weren't touched.
    """

    limits: Limits
    trials: tuple[Trial, ...]
    kept: frozenset[str]
    chosen: Trial | None = None
    model: ModelConfig | None = None
    plan: VramPlan | None = None

    @property
    def closest(self) -> Trial:
        """The chosen trial, or the one with the least above the limit."""
        return self.chosen or min(self.trials, key=lambda trial: (trial.excess_bytes, trial.cost))

    @property
    def overrides(self) -> list[str]:
        """The chosen settings as they are written on the command line; empty where none need be changed."""
        return override_lines(self.chosen.keys) if self.chosen else []


def override_lines(keys: Keys) -> list[str]:
    """Keys below `model` as overrides, e.g. "model.dit.precision=fp8"."""
    return [f"model.{path}={_written(value)}" for path, value in keys.items()]


def _written(value: str | bool | float | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else f"{value:g}"


def solve_fit(
    model: ModelConfig,
    *,
    limits: Limits,
    freedom: Freedom,
    evaluate: Evaluate,
    outline: Evaluate | None = None,
) -> Fit:
    """Find the cheapest settings with which every phase fits.

    evaluate: the plan of a model section, with everything that a phase holds; taken to be slow.
    outline: a plan with at most as many bytes, made quickly; what doesn't fit by it isn't evaluated.
    Deterministic: equal arguments give equal settings.   Raises what these functions raise.
    """
    search = _Search(model, limits, freedom, evaluate, outline)
    choices = freedom.choices(model)
    for index, choice in enumerate(choices):
        found = search.attempt(choice)
        if found is not None:
            trial, fitting, plan = found
            return Fit(limits, tuple(search.trials), freedom.written, trial, fitting, plan)
        if index == 0 and search.rest_is_hopeless(max(choices, key=_savings)):
            break
    return Fit(limits, tuple(search.trials), freedom.written)


def _savings(choice: Choice) -> list[tuple[int, ...]]:
    """How much a choice saves on the device, then on the host; choices of components are independent of each other."""
    return [part.savings() for part in choice.values()]


_Fitting = tuple[Trial, ModelConfig, VramPlan]


@dataclass
class _Search:
    """What has been tried, and what that rules out."""

    model: ModelConfig
    limits: Limits
    freedom: Freedom
    evaluate: Evaluate
    outline: Evaluate | None
    trials: list[Trial] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def rest_is_hopeless(self, smallest: Choice) -> bool:
        """Try the settings that need least, so that nobody waits for all the others where nothing fits.

        They are noted only where they don't fit.
        """
        before = len(self.trials)
        if self.attempt(smallest) is None:
            return True
        del self.trials[before:]
        return False

    def attempt(self, choice: Choice) -> _Fitting | None:
        """Try settings; the trial, its model section and its plan where they fit."""
        if any(failure.rules_out(choice) for failure in self.failures):
            return None
        keys: dict[str, str | bool | float | None] = {**changed_keys(self.model, choice)}
        cost = self.freedom.cost(choice)
        if self.outline is not None:
            free = {} if "vram_limit" in self.freedom.written else {"vram_limit": None}
            plan = self.outline(with_keys(self.model, {**keys, **free}))
            trial = Trial(keys, cost, _at_least(plan), self.limits, traced=False)
            if trial.excess_bytes > 0:
                self._note(trial, choice, plan)
                return None
        model = with_keys(self.model, keys)
        plan = self.evaluate(model)
        trial = Trial(keys, cost, plan.phases, self.limits)
        if not trial.fits:
            self._note(trial, choice, plan)
            return None
        fitting = (trial, model, plan)
        if "vram_limit" not in self.freedom.written and _offloads(choice):
            fitting = self._kept_there(fitting, choice)
        self.trials.append(fitting[0])
        return fitting

    def _kept_there(self, fitting: _Fitting, choice: Choice) -> _Fitting:
        """The same with the room that is left filled with offloaded weights, where that fits."""
        without = fitting[0]
        room = self.limits.device_bytes
        for _ in range(_MAX_LIMITS):
            limit = floor(room / 2**30 / _LIMIT_STEP) * _LIMIT_STEP
            if limit < _LIMIT_STEP:
                break
            keys = {**without.keys, "vram_limit": round(limit, 3)}
            model = with_keys(self.model, keys)
            plan = self.evaluate(model)
            cost = self.freedom.cost(choice, _moved_shares(plan))
            trial = Trial(keys, cost, plan.phases, self.limits)
            if trial.fits:
                return trial, model, plan
            # What is kept ends where the phase with the largest activations would exceed the device.
            room -= trial.excess_bytes + int(_LIMIT_STEP * 2**30)
        return fitting

    def _note(self, trial: Trial, choice: Choice, plan: VramPlan) -> None:
        self.trials.append(trial)
        sizes = {part.name: part.resting_bytes for part in plan.components}
        for phase in trial.phases:
            for memory, excess in self.limits.excess(phase):
                # Host memory also holds what other phases need again.
                on_host = memory == "host" or self.limits.shared
                names = tuple(sizes) if on_host else phase.components
                if excess > 0:
                    held = {name: sizes[name] for name in names}
                    self.failures.append(Failure(held, memory, excess, choice))


def _offloads(choice: Choice) -> bool:
    return any(part.offload != "none" for part in choice.values())


def _moved_shares(plan: VramPlan) -> dict[str, float]:
    """Component -> share of its offloaded weights that doesn't stay on the device in the phase where least stays."""
    shares: dict[str, float] = {}
    for phase in plan.phases:
        moving = {
            name: sum(unit.num_bytes for unit in component_units(plan.component(name)))
            for name in phase.components
            if plan.has(name)
        }
        total = sum(moving.values())
        if total and phase.name not in ("load", "save"):
            moved = 1 - phase.kept_bytes / total
            shares |= {name: max(shares.get(name, 0.0), moved) for name in moving}
    return shares


def _at_least(plan: VramPlan) -> tuple[PhasePlan, ...]:
    """The phases with as much as is surely there at one moment: either every gradient or weights on their way."""
    phases = []
    for phase in plan.phases:
        device = phase.device
        fetched = device.fetched - min(device.fetched, device.gradients)
        smaller = device.model_copy(update={"fetched": fetched})
        phases.append(phase.model_copy(update={"device": smaller}))
    return tuple(phases)


class Shortfall(NamedTuple):
    """Why nothing fits.

    trial: what comes closest.   phase: the one that is too large.   memory: in which.   excess_bytes: by how much.
    part, part_bytes: what takes most there, by its name in `MemoryParts`.   way: what a person could change.
    """

    trial: Trial
    phase: PhasePlan
    memory: Memory
    excess_bytes: int
    part: str
    part_bytes: int
    way: str


_WAYS = {
    "weights": "a smaller or already quantised checkpoint, or let go of what is set: {kept}",
    "adapters": "a smaller lora.rank or fewer lora.target_modules",
    "gradients": "trainable=lora in place of full, or a smaller lora.rank",
    "optimizer": "optim=adamw_8bit, trainable=lora in place of full, or a smaller lora.rank",
    "average": "optim.ema=null, or a smaller lora.rank",
    "fetched": "granularity=layer, or let go of what is set: {kept}",
    "staging": "a checkpoint with smaller tensors, or more host memory",
    "activations": "{activations}",
}
_ACTIVATIONS = {
    "train": "a smaller data.batch_size (with more trainer.accumulate_grad_batches) or data.max_px",
    "sample": "a smaller sample.size_px, or no samples (sample.prompts=[])",
    "encode": "a smaller data.max_px",
}


def find_shortfall(fit: Fit) -> Shortfall:
    """Say what is too large in what came closest, and what could be changed."""
    trial = fit.closest
    phase, memory, excess = trial.worst()
    parts: MemoryParts = phase.device if memory == "device" else phase.host
    sizes = {name: count or 0 for name, count in parts.by_name().items()}
    if memory == "device" and fit.limits.shared:
        host = phase.host.by_name()
        sizes = {name: count + (host[name] or 0) for name, count in sizes.items()}
    part = max(sizes, key=lambda name: sizes[name])
    kept = ", ".join(f"model.{path}" for path in sorted(fit.kept)) or "nothing"
    activations = _ACTIVATIONS.get(phase.name, _ACTIVATIONS["train"])
    way = _WAYS[part].format(kept=kept, activations=activations)
    return Shortfall(trial, phase, memory, excess, part, sizes[part], way)


def fitting(fit: Fit) -> tuple[ModelConfig, VramPlan]:
    """The chosen model section and its plan.   Raises PlanError, with what comes closest, where nothing fits."""
    if fit.model is not None and fit.plan is not None:
        return fit.model, fit.plan
    short = find_shortfall(fit)
    asked = fit.limits.size_bytes if short.memory == "device" else fit.limits.host_bytes or 0
    settings = " ".join(override_lines(short.trial.keys)) or "the settings as they are"
    raise PlanError(
        f"nothing fits {format_bytes(asked)} of {short.memory} memory: "
        f"{short.phase.name} needs {format_bytes(short.excess_bytes)} more",
        where=f"closest: {settings}",
        found=f"the largest part is {short.part}, {format_bytes(short.part_bytes)}",
        hint=f"try {short.way}",
    )
