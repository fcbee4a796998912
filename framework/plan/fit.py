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
from framework.plan.types import MemoryParts, PhasePlan, VramPlan
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
    """A phase that is too large with some settings.   components: whose settings decide it."""

    components: tuple[str, ...]
    memory: Memory
    choice: Choice

    def rules_out(self, choice: Choice) -> bool:
        """Whether the same phase must be too large with other settings, too."""
        pairs = [(choice[name], self.choice[name]) for name in self.components]
        if self.memory == "host":
            return all(other.fills_host_as(failed) for other, failed in pairs)
        return all(other.saves_no_more_than(failed) for other, failed in pairs)


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    keys: dotted path below `model` -> value, of what they change.   cost: factor on the time of a step.
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
    smallest = max(choices, key=lambda choice: _savings(choice, choices))
    if not search.rest_is_hopeless(smallest):
        for choice in choices:
            found = search.attempt(choice)
            if found is not None:
                trial, fitting, plan = found
                trials = tuple(search.trials)
                return Fit(limits, trials, freedom.written, trial, fitting, plan)
    return Fit(limits, tuple(search.trials), freedom.written)


def _savings(choice: Choice, choices: list[Choice]) -> tuple[int, int]:
    """How many other choices need at least as much device memory, and how many as much host memory."""
    device = sum(
        all(other[name].saves_no_more_than(choice[name]) for name in choice) for other in choices
    )
    host = sum(all(other[name].fills_host_as(choice[name]) for name in choice) for other in choices)
    return device, host


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
        if self.attempt(smallest) is None:
            return True
        self.trials.clear()
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
            trial = Trial(keys, cost, _without_fetched(plan), self.limits, traced=False)
            if trial.excess_bytes > 0:
                self._note(trial, choice)
                return None
        model = with_keys(self.model, keys)
        plan = self.evaluate(model)
        trial = Trial(keys, cost, plan.phases, self.limits)
        if not trial.fits:
            self._note(trial, choice)
            return None
        fitting = (trial, model, plan)
        if "vram_limit" not in self.freedom.written and _offloads(choice):
            fitting = self._kept_there(fitting)
        self.trials.append(fitting[0])
        return fitting

    def _kept_there(self, fitting: _Fitting) -> _Fitting:
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
            trial = Trial(keys, without.cost, plan.phases, self.limits)
            if trial.fits:
                return trial, model, plan
            # What is kept ends where the phase with the largest activations would exceed the device.
            room -= trial.excess_bytes + int(_LIMIT_STEP * 2**30)
        return fitting

    def _note(self, trial: Trial, choice: Choice) -> None:
        self.trials.append(trial)
        for phase in trial.phases:
            for memory, excess in self.limits.excess(phase):
                # Host memory also holds what other phases need again.
                on_host = memory == "host" or self.limits.shared
                components = tuple(choice) if on_host else phase.components
                if excess > 0:
                    self.failures.append(Failure(components, memory, choice))


def _offloads(choice: Choice) -> bool:
    return any(part.offload != "none" for part in choice.values())


def _without_fetched(plan: VramPlan) -> tuple[PhasePlan, ...]:
    """The phases without fetched weights, of which a quick plan may count more than there are at the highest moment."""
    return tuple(
        phase.model_copy(update={"device": phase.device.model_copy(update={"fetched": 0})})
        for phase in plan.phases
    )


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
        f"nothing fits {_gib(asked)} of {short.memory} memory: "
        f"{short.phase.name} needs {_gib(short.excess_bytes)} more",
        where=f"closest: {settings}",
        found=f"the largest part is {short.part}, {_gib(short.part_bytes)}",
        hint=f"try {short.way}",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
