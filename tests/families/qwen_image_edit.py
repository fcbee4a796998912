"""Builds tiny Qwen-Image-Edit checkpoints in the published layout, with random weights, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from tests import checkpoints

PIPELINES = {"edit": "QwenImageEditPipeline", "plus": "QwenImageEditPlusPipeline"}

# As published: the processor's settings go by the names of transformers 4.
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def build_checkpoint(
    folder: Path, *, seed: int = 0, edition: str = "plus", zero_cond_t: bool = False
) -> Path:
    """Qwen-Image's tiny checkpoint with the picture processor beside it.

    edition: "edit" for the first one, "plus" for the later ones.   zero_cond_t: as in 2511.
    """
    checkpoints.build_checkpoint(folder, seed=seed)
    (folder / "processor").mkdir()
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    _change(
        folder / "model_index.json",
        _class_name=PIPELINES[edition],
        processor=["transformers", "Qwen2VLProcessor"],
    )
    if zero_cond_t:
        _change(folder / "transformer" / "config.json", zero_cond_t=True)
    return folder


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2))
