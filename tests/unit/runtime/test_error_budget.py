"""An error budget keeps the fewest layers that hold it, and what is measured is what is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.errors import PlanError
from framework.models import get_family
from framework.plan.build import build_inference_plan
from framework.runtime import error_budget
from framework.runtime.encoding_error import OutputProbe, SourceWeights
from framework.runtime.encoding_report import (
    EncodingReport,
    LayerError,
    read_reports,
    report_json,
)
from framework.runtime.error_budget import (
    measure_encoding,
    measure_output,
    resolve_error_budget,
)
from framework.runtime.load import load_component
from framework.schema import ModelConfig

CPU = torch.device("cpu")
FAMILY = get_family("qwen_image")


def model_of(source: Path, *, budget: float | None = None, **dit: Any) -> ModelConfig:
    fp8 = {"error_budget": budget, **dit.pop("fp8", {})}
    return ModelConfig.model_validate(
        {
            "family": "qwen_image",
            "source": str(source),
            "compute_dtype": "fp32",
            "dit": {"precision": "fp8", "trainable": "lora", "fp8": fp8, **dit},
        }
    )


def resolve(model: ModelConfig, folder: Path, **options: Any) -> tuple[Any, Any]:
    return resolve_error_budget(
        model, FAMILY, device=CPU, compute_dtype=torch.float32, folder=folder, **options
    )


def loaded_error(model: ModelConfig) -> float | None:
    """The error of the DiT as a run loads it, against the published weights of all layers."""
    with_all = build_inference_plan(model_of(Path(model.source)), device="cpu").component("dit")
    part = build_inference_plan(model, device="cpu").component("dit")
    probe = OutputProbe(
        load_component(part, FAMILY, device=CPU, compute_dtype=torch.float32),
        SourceWeights(with_all),
        FAMILY,
    )
    return measure_output(probe, shares=False).output_error


@pytest.fixture(scope="module")
def error_before(tiny_checkpoint: Path) -> float:
    found = loaded_error(model_of(tiny_checkpoint))
    assert found is not None
    return found


@pytest.mark.parametrize("part", [0.8, 0.4])
def test_the_fewest_layers_that_hold_the_budget_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, error_before: float, part: float
) -> None:
    budget = part * error_before
    model, report = resolve(model_of(tiny_checkpoint, budget=budget), tmp_path)
    assert report.output_error_before == error_before
    assert loaded_error(model) == report.output_error <= budget
    # With one layer less, in the order in which they are kept, it wouldn't hold.
    less = report.model_copy(update={"kept": report.kept[:-1]})
    unkept, _ = resolve(model_of(tiny_checkpoint, budget=budget), tmp_path, known=less)
    assert loaded_error(unkept) > budget
    # The family's own list still holds, and each layer gains most for its bytes.
    assert "norm_out*" in model.dit.fp8.keep_high_precision
    gains = {e.layer: e.output_share / e.numel for e in report.layers}
    assert min(gains[name] for name in report.kept) >= max(
        gain for name, gain in gains.items() if name not in report.kept
    )


def test_layers_that_the_user_keeps_stay_kept(
    tiny_checkpoint: Path, tmp_path: Path, error_before: float
) -> None:
    fp8 = {"keep_high_precision": ["img_mlp*", "attn.to_q"]}
    given = model_of(tiny_checkpoint, budget=0.5 * error_before, fp8=fp8)
    model, report = resolve(given, tmp_path)
    assert model.dit.fp8.keep_high_precision == ("img_mlp*", "attn.to_q", *report.kept)
    assert not any("img_mlp" in name for name in report.kept)


def test_a_budget_that_holds_already_keeps_nothing(
    tiny_checkpoint: Path, tmp_path: Path, error_before: float
) -> None:
    given = model_of(tiny_checkpoint, budget=error_before * 1.01)
    model, report = resolve(given, tmp_path)
    assert model is given
    assert report.kept == ()
    assert report.output_error == error_before


def test_a_budget_that_no_plan_can_hold_is_refused_with_one_that_can_be(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float32 nearly any budget holds with one layer in FP8; this one doesn't.
    with pytest.raises(PlanError, match="can't be met while any layer of the dit is") as caught:
        resolve(model_of(tiny_checkpoint, budget=1e-9), tmp_path)
    assert "model.dit.precision=bf16" in caught.value.hint
    enough = float(caught.value.hint.rpartition(" ")[2])
    model, report = resolve(model_of(tiny_checkpoint, budget=enough), tmp_path)
    assert loaded_error(model) == report.output_error <= enough


def test_what_was_measured_is_found_again(
    tiny_checkpoint: Path, tmp_path: Path, error_before: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = model_of(tiny_checkpoint, budget=0.7 * error_before)
    first, report = resolve(given, tmp_path)
    again = EncodingReport.model_validate_json(next(tmp_path.glob("*.json")).read_text())
    assert again == report

    def refuse(*args: Any) -> None:
        raise AssertionError("loaded although all is known")

    monkeypatch.setattr(error_budget, "Residency", refuse)
    assert resolve(given, tmp_path) == (first, report)
    assert resolve(given, tmp_path / "empty", known=report) == (first, report)
    # Another budget, another scaling and other weights are other measurements.
    for other in (
        model_of(tiny_checkpoint, budget=0.6 * error_before),
        model_of(tiny_checkpoint, budget=0.7 * error_before, fp8={"scaling": "tensor"}),
    ):
        with pytest.raises(AssertionError, match="although all is known"):
            resolve(other, tmp_path, known=report.model_copy(update={"budget": 0.123}))


def test_a_damaged_or_unwritable_place_costs_a_measurement_and_no_more(
    tiny_checkpoint: Path,
    tmp_path: Path,
    error_before: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = model_of(tiny_checkpoint, budget=0.7 * error_before)
    expected = resolve(given, tmp_path / "a")
    file = next((tmp_path / "a").glob("*.json"))
    file.write_text('{"component": "dit"')
    assert resolve(given, tmp_path / "a") == expected
    assert json.loads(file.read_text())["component"] == "dit"
    (tmp_path / "b").write_text("a file where a folder should be")
    assert resolve(given, tmp_path / "b") == expected
    assert "can't be written" in caplog.text


def test_without_a_budget_nothing_is_measured(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for given in (model_of(tiny_checkpoint), model_of(tiny_checkpoint, precision="bf16")):
        assert resolve(given, tmp_path / "new") == (given, None)
    assert not (tmp_path / "new").exists()


def test_every_encoded_component_is_measured(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = model_of(tiny_checkpoint)
    vae = {"precision": "fp8", "fp8": {"layers": ["conv"]}}
    values = model.model_dump() | {"text_encoder": {"precision": "fp8"}, "vae": vae}
    reports = measure_encoding(
        ModelConfig.model_validate(values),
        FAMILY,
        device=CPU,
        compute_dtype=torch.float32,
        folder=tmp_path,
    )
    assert [report.component for report in reports] == ["text_encoder", "vae", "dit"]
    assert [report.output_error is None for report in reports] == [True, True, False]
    assert reports[1].layers[0].shape[2:]
    file = tmp_path / "report.json"
    file.write_text(report_json(reports))
    assert read_reports(file) == reports
    worst = reports[2].worst(3)
    assert worst[0].output_share == max(e.output_share or 0 for e in reports[2].layers)


def test_the_summary_says_errors_and_what_the_budget_did() -> None:
    layers = tuple(
        LayerError(layer=name, shape=(2, 3), weight_error=error)
        for name, error in (("a", 0.02), ("b", 0.04), ("c", 0.03))
    )
    report = EncodingReport(component="dit", layers=layers, output_error=0.0123)
    assert "weights 0.03 (median of 3 layers), at most 0.04 (b)" in report.summary
    assert report.summary.endswith("output 0.0123 on a seeded input")
    kept = report.model_copy(
        update={"budget": 0.01, "kept": ("b",), "output_error": 0.009, "output_error_before": 0.02}
    )
    assert "output 0.02, and 0.009 with 1 layer kept in high precision" in kept.summary
    assert "no weight is encoded" in EncodingReport(component="vae", layers=()).summary
    assert report.worst(1) == [layers[1]]


def test_a_report_that_is_not_ours_is_no_report(tmp_path: Path) -> None:
    for text in ("", "[]", '{"components": {"dit": {"component": 3}}}'):
        (tmp_path / "x.json").write_text(text)
        assert read_reports(tmp_path / "x.json") == []
    assert read_reports(tmp_path / "absent.json") == []
