"""What was measured of FP8's errors: the report, its JSON, and the files in which later runs find it.

A file's name says what the report was measured of, so that the processes of a run, the runs of a sweep and a later
`generate` take the same layers, and a stale one is never found.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from statistics import median

from filelock import FileLock
from pydantic import ValidationError

from framework.atomic import write_text
from framework.plan.types import ComponentPlan, Frozen, VramPlan

DEFAULT_FOLDER = Path(".octavo/cache/encoding_error")
INPUT_PX = 256
"""Side of the square picture that the seeded input stands for: 256 tokens of 16 x 16 px."""
TEXT_TOKENS = 64
SIGMA = 0.5
SEED = 0

# Part of every name: raise it when a change alters what is measured.
_VERSION = 1
# Part of the name under which a measurement is kept: raise it when encoding changes a number.
_ENCODING_VERSION = 2

log = logging.getLogger("octavo")


class LayerError(Frozen):
    """What encoding did to one layer.

    weight_error: |V - W| / |W|.   output_share: the layer's part in the squared error of the DiT's output, from 0 to 1
    (`OutputProbe.shares`); None where it wasn't measured.
    """

    layer: str
    shape: tuple[int, ...]
    weight_error: float
    output_share: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)


class EncodingReport(Frozen):
    """What FP8 storage of one component costs in accuracy. All errors are relative L2 norms.

    layers: what is encoded here, in the order of the files; weights that are FP8 in the file aren't among them.
    output_error: of the DiT's output on the seeded input; None for other components.
    budget: `fp8.error_budget`.   kept: layers that it keeps in high precision; `output_error` is with them kept.
    output_error_before: without them.
    """

    component: str
    layers: tuple[LayerError, ...]
    output_error: float | None = None
    budget: float | None = None
    kept: tuple[str, ...] = ()
    output_error_before: float | None = None

    @property
    def summary(self) -> str:
        """The report in one line, for a log."""
        if not self.layers:
            return f"{self.component}: no weight is encoded here, so FP8 adds no error"
        worst = max(self.layers, key=lambda layer: layer.weight_error)
        typical = median(layer.weight_error for layer in self.layers)
        told = [
            f"{self.component} in FP8, relative errors: weights {typical:.3g} (median of {len(self.layers)} layers), "
            f"at most {worst.weight_error:.3g} ({worst.layer})"
        ]
        if self.budget is not None and self.kept:
            layers = "1 layer" if len(self.kept) == 1 else f"{len(self.kept)} layers"
            told.append(
                f"output {self.output_error_before:.3g}, and {self.output_error:.3g} with {layers} kept in high "
                f"precision by fp8.error_budget={self.budget:g}"
            )
        elif self.output_error is not None:
            told.append(f"output {self.output_error:.3g} on a seeded input")
        return "; ".join(told)

    def worst(self, count: int) -> list[LayerError]:
        """The layers that cost the output most, or, where that is unknown, those with the largest weight error."""
        return sorted(
            self.layers,
            key=lambda e: (-(e.output_share or 0.0), -e.weight_error),
        )[:count]


@contextmanager
def remembered(
    plan: VramPlan, part: ComponentPlan, folder: Path, *, budget: float | None = None
) -> Iterator[Path]:
    """Give the file in which the report on this component is kept, or will be; others who want it wait meanwhile.

    part: of `plan`.   Where the folder can't be written the work is done without it: maybe twice, never wrongly.
    """
    file = folder / f"{part.name}-{_identity(plan, part, budget)}.json"
    lock = FileLock(file.with_suffix(".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield file
        return
    try:
        yield file
    finally:
        lock.release()


def read_report(file: Path) -> EncodingReport | None:
    """A report from its file; None where there is none, or a damaged one."""
    try:
        return EncodingReport.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def write_report(file: Path, report: EncodingReport) -> None:
    """Keep a report; where the folder can't be written, a log line says so."""
    try:
        write_text(file, report.model_dump_json(indent=2) + "\n")
    except OSError as error:
        log.warning("what FP8 costs was measured, but %s can't be written: %s", file, error)


def _identity(plan: VramPlan, part: ComponentPlan, budget: float | None) -> str:
    """Hash of everything that decides a report."""
    tensors = [(group, tensor) for group in part.groups for tensor in group.tensors]
    if part.commit is not None:
        weights = [[part.source, part.commit]]
    else:
        files = sorted({Path(part.folder) / tensor.file for _, tensor in tensors})
        weights = [_state(file) for file in files]
    stored: Mapping[str, object] = {
        tensor.name: [group.scaling, group.block_shape, group.states.onload.storage_dtype]
        for group, tensor in tensors
    }
    content = [
        _ENCODING_VERSION,
        weights,
        stored,
        plan.compute_dtype,
        plan.device.partition(":")[0],
        budget,
    ]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _state(file: Path) -> list[str]:
    status = file.stat()
    return [str(file.resolve()), str(status.st_size), str(status.st_mtime_ns)]


def report_json(reports: Sequence[EncodingReport]) -> str:
    """Reports as JSON; keys stay the same from version to version."""
    parts = {report.component: report.model_dump(mode="json") for report in reports}
    settings = {
        "picture_px": [INPUT_PX, INPUT_PX],
        "text_tokens": TEXT_TOKENS,
        "sigma": SIGMA,
        "seed": SEED,
    }
    return json.dumps({"version": _VERSION, "input": settings, "components": parts}, indent=2)


def read_reports(file: Path) -> list[EncodingReport]:
    """Reports from a file that `report_json` made; none where it isn't there or damaged."""
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["components"]
        return [EncodingReport.model_validate(part) for part in parts.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
