"""The space of a search: what Optuna draws from, which overrides a draw means, and what keeps it from making sense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from framework.compose import Dimension, SweepRequest
from framework.errors import Fault
from framework.judge import Verdict
from framework.schema.sweep import OptunaSweeper
from framework.sweep.results_rows import BASIS_KEYS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_DIGITS = 4


def build_space(dimensions: Sequence[Dimension]) -> dict[str, BaseDistribution]:
    """What Optuna draws from, by key: choices, evenly spaced numbers of a `range(...)`, or an interval."""
    return {dimension.key: _distribution(dimension) for dimension in dimensions}


def draw_overrides(
    dimensions: Sequence[Dimension], values: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The overrides that drawn values mean, and their texts by key. Floats are rounded to four digits."""
    overrides = [_override(dimension, values[dimension.key]) for dimension in dimensions]
    texts = {
        dimension.key: override.partition("=")[2]
        for dimension, override in zip(dimensions, overrides, strict=True)
    }
    return tuple(overrides), texts


def check_search(
    request: SweepRequest, settings: OptunaSweeper, verdicts: Sequence[Verdict]
) -> list[Fault]:
    """What keeps a search from being able to tell good points from bad ones. verdicts: of its extreme points."""
    valid = [verdict for verdict in verdicts if verdict.config is not None]
    faults = _not_validated(valid) or _not_comparable(request, valid)
    faults += _only_whole_numbers(request, verdicts)
    if settings.pruner != "none":
        faults += _not_logged(valid)
    return faults


def warn_search(settings: OptunaSweeper, verdicts: Sequence[Verdict]) -> list[Fault]:
    """What makes a search do less than is meant."""
    for verdict in verdicts:
        config = verdict.config
        if config is None or settings.pruner == "none":
            continue
        every, last = config.validation.every_n_steps, config.trainer.max_steps
        if every >= last:
            message = (
                f"is {every} and a run has {last} steps, so that no point can be stopped before its end "
                f"(hydra.sweeper.pruner={settings.pruner})"
            )
            hint = f"Set it to {max(1, last // 5)}, or hydra.sweeper.pruner=none."
            where = verdict.where("validation.every_n_steps")
            return [Fault("validation.every_n_steps", message, where, hint=hint, code="unused")]
    return []


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if dimension.interval is not None:
        low, high = dimension.interval
        if dimension.whole:
            return IntDistribution(math.ceil(low), math.floor(high), log=dimension.log)
        return FloatDistribution(low, high, log=dimension.log)
    assert dimension.choices is not None
    numbers = _range_of(dimension)
    if numbers is None:
        return CategoricalDistribution(dimension.choices)
    step = numbers[1] - numbers[0]
    if all(number.is_integer() for number in numbers):
        return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(step))
    return FloatDistribution(numbers[0], numbers[-1], step=step)


def _override(dimension: Dimension, value: Any) -> str:
    if dimension.interval is not None:
        name = dimension.line.partition("=")[0]
        low, high = dimension.interval
        return f"{name}={_number_text(value, low, high)}"
    assert dimension.choices is not None
    numbers = _range_of(dimension)
    if numbers is None:
        return str(value)
    nearest = min(range(len(numbers)), key=lambda place: abs(numbers[place] - value))
    return dimension.choices[nearest]


def _range_of(dimension: Dimension) -> list[float] | None:
    """The numbers of a `range(...)` of three or more; None for all other choices."""
    choices = dimension.choices or ()
    if not dimension.line.partition("=")[2].strip().startswith("range(") or len(choices) < 3:
        return None
    numbers = sorted(float(choice.partition("=")[2]) for choice in choices)
    # Optuna's own numbers go up; where the range goes down, so do the choices.
    return numbers if [f"{n:g}" for n in numbers] == [_plain(c) for c in choices] else None


def _plain(choice: str) -> str:
    return f"{float(choice.partition('=')[2]):g}"


def _number_text(value: float, low: float, high: float) -> str:
    """A number as short as four digits make it, and still inside its interval."""
    if isinstance(value, int):
        return str(value)
    rounded = float(f"{value:.{_DIGITS}g}")
    return repr(min(max(rounded, low), high))


def _not_validated(verdicts: Sequence[Verdict]) -> list[Fault]:
    for verdict in verdicts:
        if verdict.config is not None and verdict.config.validation.fraction == 0:
            message = "is 0, but a search compares its points by validation loss"
            hint = "Set validation.fraction=0.1: that share of the pictures is held out."
            where = verdict.where("validation.fraction")
            return [
                Fault(
                    "validation.fraction",
                    message,
                    where,
                    hint=hint,
                    code="rule",
                    value="0",
                    allowed="more than 0",
                )
            ]
    return []


def _not_comparable(request: SweepRequest, verdicts: Sequence[Verdict]) -> list[Fault]:
    """Keys that decide what the loss is measured on and that the search would change."""
    if len(verdicts) < 2:
        return []
    dumps = [v.config.model_dump(mode="json") for v in verdicts if v.config is not None]
    faults = []
    for key in BASIS_KEYS:
        if len({repr(_at(values, key)) for values in dumps}) > 1:
            message = "is different from point to point, so that their validation losses can't be compared"
            hint = "Give it one value, or try every combination: leave out hydra/sweeper=optuna."
            lines = [d.line for d in request.dimensions if d.key == key]
            where = f"command line: {lines[0]}" if lines else verdicts[-1].where(key)
            faults.append(Fault(key, message, where, hint=hint, code="rule"))
    return faults


def _only_whole_numbers(request: SweepRequest, verdicts: Sequence[Verdict]) -> list[Fault]:
    """Intervals of fractions for keys that take none; told as one fault each, and not by a value that nobody typed."""
    refused = {f.path for v in verdicts for f in v.faults if f.code == "wrong-type"}
    faults = []
    for dimension in request.dimensions:
        if dimension.interval is None or dimension.whole or dimension.key not in refused:
            continue
        low, high = dimension.interval
        if not (low.is_integer() and high.is_integer()):
            continue
        name, _, typed = dimension.line.partition("=")
        message = "takes whole numbers only, but its interval holds fractions, too"
        hint = f"Write '{name}=int({typed})'."
        where = f"command line: {dimension.line}"
        faults.append(Fault(dimension.key, message, where, hint=hint, code="wrong-type"))
    return faults


def _not_logged(verdicts: Sequence[Verdict]) -> list[Fault]:
    for verdict in verdicts:
        if verdict.config is not None and not verdict.config.logger.csv:
            message = "is false, but points are stopped early by the losses in metrics.csv"
            hint = "Set logger.csv=true, or hydra.sweeper.pruner=none."
            where = verdict.where("logger.csv")
            return [Fault("logger.csv", message, where, hint=hint, code="rule", value="false")]
    return []


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
