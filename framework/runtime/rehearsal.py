"""Runs what a phase of a plan does on fake tensors and counts bytes: nothing is read, computed or allocated.

Long stacks of equal blocks are shortened: a step is run with four blocks and with five, and what it takes with all of
them follows from the two. That is exact and no estimate, because with each block the same tensors come and go. The
highest point of a stage (the forward pass, then the backward pass of the last block, of the one before, ...) grows by
the same bytes with every block of the stack. From the last but one to the third, stages differ by the same bytes too,
so that the highest of them is at one end. Where blocks aren't stored alike, all of them are run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from framework.hub import read_component_config
from framework.plan.types import ComponentPlan
from framework.runtime.adapters import attach_lora_
from framework.runtime.load import ModuleBuilder, build_skeleton
from framework.runtime.trace import ACTIVATIONS, MeasuredBytes
from framework.storage.fetching import Fetcher
from framework.storage.scratch import release_scratch

_SHORT = (4, 5)
"""Numbers of blocks that a shortened stack is run with; two points of a line."""
FETCHED, GRADIENTS, HELD = "fetched", "gradients", "held"

Bytes = dict[str, int]


@dataclass
class Stage:
    """The highest moment of one stage.   device, host: label -> bytes."""

    device: Bytes = field(default_factory=dict)
    host: Bytes = field(default_factory=dict)


class Stages:
    """Takes down the peaks of stages one after the other."""

    def __init__(self, counter: MeasuredBytes) -> None:
        self._counter = counter
        self.found: dict[str, Stage] = {}

    def end(self, *names: str) -> None:
        """End the present stage under its names; where a name was there already, the higher peak counts."""
        device, host = self._counter.peak_by_label, self._counter.host_peak_by_label
        for name in names:
            stage = self.found.setdefault(name, Stage())
            if _beside_fetched(device) >= _beside_fetched(stage.device):
                stage.device = device
            if _beside_fetched(host) >= _beside_fetched(stage.host):
                stage.host = host
        self._counter.restart()


def _beside_fetched(labels: Mapping[str, int]) -> int:
    return sum(count for label, count in labels.items() if label != FETCHED)


class _LabellingFetcher(Fetcher):
    """Names what it fetches. It never fetches ahead: a rehearsal knows no order of use yet."""

    counter: MeasuredBytes | None = None

    def _begin(self, unit: Any) -> Any:
        arrival = super()._begin(unit)
        if self.counter is not None:
            self.counter.label((w.values for w in arrival.weights.values()), FETCHED)
        return arrival

    def _look_ahead(self) -> None:
        return


class Rehearsal:
    """Components of a plan without content, on fake tensors.

    device: where they are counted; the stand-in for a device that this build of torch doesn't have is the CPU.
    modules: component name -> module, ready to be run inside `counting`.
    """

    def __init__(
        self, family: ModuleBuilder, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self.device = device
        self.compute_dtype = compute_dtype
        self.modules: dict[str, nn.Module] = {}
        self._family = family
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._fetchers: list[_LabellingFetcher] = []
        self._full_stacks: dict[str, int] = {}

    def build(self, plan: ComponentPlan, *, shorten: bool = False) -> None:
        """Make one component.   shorten: leave out blocks, where they are all alike, for `run` to make up for."""
        meta = torch.device("meta")
        # Built for the meta device, because peft can't move fake parameters; the real device is put in afterwards.
        fetcher = _LabellingFetcher(meta, rehearsal=True)
        with _config_folder(plan.folder) as folder:
            module = build_skeleton(
                plan,
                self._family,
                folder,
                device=meta,
                compute_dtype=self.compute_dtype,
                fetcher=fetcher,
            )
        if shorten and (name := _uniform_stack(module, plan)) is not None:
            stack = module.get_submodule(name)
            assert isinstance(stack, nn.ModuleList)
            if len(stack) > max(_SHORT):
                self._full_stacks[plan.name] = len(stack)
                del stack[max(_SHORT) :]
        _attach(module, plan)
        fetcher.device = self.device
        self._fetchers.append(fetcher)
        self.modules[plan.name] = module
        with self._fake:
            _fill_(module, self.device)

    def run(self, step: Callable[[Stages], None], *, gradients: bool) -> dict[str, Stage]:
        """Run `step` and return its stages as they are with all blocks.

        step: is given the stages to end; it is called several times.
        gradients: whether blocks leave anything for a backward pass; without, two of them show all that there is.
        """
        release_scratch()
        try:
            return self._run(step, gradients=gradients)
        finally:
            release_scratch()

    def _run(self, step: Callable[[Stages], None], *, gradients: bool) -> dict[str, Stage]:
        stacks = {name: _stack_of(module) for name, module in self.modules.items()}
        shortened = [s for name, s in stacks.items() if s is not None and name in self._full_stacks]
        counter = MeasuredBytes(self.device)
        with self._fake, counter:
            for module in self.modules.values():
                counter.label(_resting(module), HELD)
                counter.label(_attributes(module), ACTIVATIONS)
            with _only([stack for stack in stacks.values() if stack is not None], 1):
                # What modules make once and keep (rotary frequencies) is there afterwards, as in any later step.
                self._count(step, counter)
            if not gradients:
                with _only(shortened, 2):
                    return self._count(step, counter)
            longer = self._count(step, counter)
            if not self._full_stacks:
                return longer
            (full,) = self._full_stacks.values()
            with _only(shortened, min(_SHORT)):
                shorter = self._count(step, counter)
        return {
            stage: _extended(shorter[stage], found, full)
            for stage, found in longer.items()
            if stage in shorter
        }

    def _count(self, step: Callable[[Stages], None], counter: MeasuredBytes) -> dict[str, Stage]:
        stages = Stages(counter)
        hooks = [
            hook
            for module in self.modules.values()
            for hook in (*_label_gradients(module, counter), *_mark_blocks(module, stages))
        ]
        for fetcher in self._fetchers:
            fetcher.counter = counter
        counter.restart()
        try:
            step(stages)
        finally:
            for hook in hooks:
                hook.remove()
            for fetcher in self._fetchers:
                fetcher.release()
                fetcher.counter = None
            for module in self.modules.values():
                module.zero_grad(set_to_none=True)
        return stages.found

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The arithmetic of a training run: autocast without a cache of casts, as Lightning has it; none in float32."""
        if self.compute_dtype == torch.float32:
            yield
            return
        with torch.autocast(self.device.type, dtype=self.compute_dtype, cache_enabled=False):
            yield


@contextmanager
def _only(stacks: Sequence[nn.ModuleList], count: int) -> Iterator[None]:
    """Leave just the first blocks in these stacks for a while."""
    whole = [dict(stack._modules) for stack in stacks]
    for stack in stacks:
        del stack[count:]
    try:
        yield
    finally:
        for stack, modules in zip(stacks, whole, strict=True):
            stack._modules = modules


def _label_gradients(module: nn.Module, counter: MeasuredBytes) -> list[Any]:
    def label(parameter: Tensor) -> None:
        assert parameter.grad is not None
        counter.label([parameter.grad], GRADIENTS)

    handles = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            register: Any = parameter.register_post_accumulate_grad_hook
            handles.append(register(label))
    return handles


@contextmanager
def _config_folder(place: str) -> Iterator[Path]:
    """A folder with the component's config.json: its own, or a temporary one, so that no weight is fetched."""
    if Path(place).is_dir():
        yield Path(place)
        return
    with TemporaryDirectory(prefix="octavo-") as folder:
        config = json.dumps(read_component_config(place))
        Path(folder, "config.json").write_text(config, encoding="utf-8")
        yield Path(folder)


def _attach(module: nn.Module, plan: ComponentPlan) -> None:
    if plan.lora is None:
        return
    there = {name for name, _ in module.named_modules()}
    layers = tuple(layer for layer in plan.lora.layers if layer.name in there)
    attach_lora_(
        module,
        plan.lora.model_copy(update={"layers": layers}),
        component=plan.name,
        seed=0,
        trains=plan.trainable == "lora",
    )


def _fill_(module: nn.Module, device: torch.device) -> None:
    """Give every tensor of a module on the meta device a fake one on `device`; plain attributes stay on the host."""
    for owner in module.modules():
        source: Any = getattr(owner, "offloaded", None)
        if source is not None:
            source.device = device
        for name, value in list(vars(owner).items()):
            if isinstance(value, Tensor):
                setattr(owner, name, torch.empty(value.shape, dtype=value.dtype))
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                owner._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _resting(module: nn.Module) -> list[Tensor]:
    """What the plan counts as weights and adapters: parameters and persistent buffers."""
    return [*module.parameters(), *(b for owner in module.modules() for b in _buffers(owner, True))]


def _buffers(owner: nn.Module, persistent: bool) -> list[Tensor]:
    """A module's own buffers that a checkpoint has, or those that it hasn't."""
    return [
        buffer
        for name, buffer in owner._buffers.items()
        if buffer is not None and (name not in owner._non_persistent_buffers_set) == persistent
    ]


def _attributes(module: nn.Module) -> list[Tensor]:
    """Tensors that modules hold as plain attributes, and buffers that are computed and not read."""
    buffers = [b for owner in module.modules() for b in _buffers(owner, False)]
    plain = [v for owner in module.modules() for v in vars(owner).values() if isinstance(v, Tensor)]
    return buffers + plain


def _stack_of(module: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules of one class that stands in the module itself."""
    stacks = [
        child
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1
    ]
    return max(stacks, key=len, default=None)


def _uniform_stack(module: nn.Module, plan: ComponentPlan) -> str | None:
    """Name of the stack whose blocks are stored alike and have like adapters; None where they differ."""
    stack = _stack_of(module)
    if stack is None:
        return None
    name = next(name for name, child in module.named_children() if child is stack)
    contents: list[set[Any]] = [set() for _ in stack]
    for group in plan.groups:
        how = (group.name, group.scaling, group.states.model_dump_json())
        for tensor in group.tensors:
            _note(contents, name, tensor.name, (*how, tensor.shape))
    for layer in plan.lora.layers if plan.lora else ():
        _note(contents, name, layer.name, ("lora", layer.shape))
    return name if all(block == contents[0] for block in contents) else None


def _note(contents: list[set[Any]], stack: str, name: str, what: tuple[Any, ...]) -> None:
    if name.startswith(f"{stack}."):
        index, _, rest = name.removeprefix(f"{stack}.").partition(".")
        contents[int(index)].add((rest, *what))


def _mark_blocks(module: nn.Module, stages: Stages) -> list[Any]:
    """End a stage when the gradient of a block's input is there; blocks at both ends have names of their own."""
    stack = _stack_of(module)
    if stack is None or not any(p.requires_grad for p in module.parameters()):
        return []
    handles = []
    for index in range(1, len(stack)):
        from_end = len(stack) - index
        names = [f"backward to block {index}"] if index <= 2 or from_end > 2 else []
        names += [f"backward to block -{from_end}"] if from_end <= 2 else []

        def mark(block: Any, args: Any, kwargs: Any, names: list[str] = names) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.requires_grad and value.grad_fn is not None:
                    register: Any = value.register_hook
                    register(lambda grad: stages.end(*names))
                    return

        handles.append(stack[index].register_forward_pre_hook(mark, with_kwargs=True))
    return handles


def _extended(shorter: Stage, longer: Stage, full: int) -> Stage:
    """A stage with all blocks: every label grows by the same bytes with each block."""

    def line(short: Mapping[str, int], long: Mapping[str, int]) -> Bytes:
        low, high = _SHORT
        names = {*short, *long}
        return {
            name: short.get(name, 0)
            + (long.get(name, 0) - short.get(name, 0)) * (full - low) // (high - low)
            for name in names
        }

    return Stage(line(shorter.device, longer.device), line(shorter.host, longer.host))
