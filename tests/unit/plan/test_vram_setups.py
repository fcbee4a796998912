"""The states of weights under each documented set-up, in training and in inference."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.compose import compose_run
from framework.plan.build import build_inference_plan, build_run_plan
from framework.schema.validate import validate

# offload, onload, preparing, computation of what is large: number format and place.
BF16, FP8 = "bf16", "fp8_e4m3"
STATES = {
    "none": [(BF16, "device")] * 4,
    "component_offload": [(BF16, "host"), *[(BF16, "device")] * 3],
    "fp8": [(FP8, "host"), (FP8, "device"), (FP8, "device"), (BF16, "device")],
    "dynamic": [(FP8, "host"), (FP8, "host"), (FP8, "device"), (BF16, "device")],
    "disk": [(FP8, "disk"), (FP8, "disk"), (FP8, "device"), (BF16, "device")],
}
LIMIT_BYTES = {"dynamic": int(15.5 * 2**30), "disk": 10 * 2**30}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("purpose", ["train", "infer"])
def test_the_states_are_those_that_the_page_states(
    name: str, purpose: str, tiny_checkpoint: Path
) -> None:
    source = f"model.source={tiny_checkpoint}"
    composition = compose_run(["recipe=pocket_lora", "data.path=x", source, f"vram={name}"])
    config, _ = validate(composition.values, composition.where)
    plan = (
        build_run_plan(config, device="cuda")
        if purpose == "train"
        else build_inference_plan(config.model, device="cuda")
    )
    assert plan.vram_limit_bytes == LIMIT_BYTES.get(name)
    for part in plan.components:
        # The VAE stays in the compute dtype.
        large = "fp8" if FP8 in dict(STATES[name]) and part.name != "vae" else "high_precision"
        group = next(group for group in part.groups if group.name == large)
        states = group.states
        found = [states.offload, states.onload, states.preparing, states.computation]
        expected = [
            (BF16 if part.name == "vae" else storage_dtype, place)
            for storage_dtype, place in STATES[name]
        ]
        assert [(state.storage_dtype, state.place) for state in found] == expected
        assert part.granularity == ("model" if name in ("component_offload", "fp8") else "layer")
