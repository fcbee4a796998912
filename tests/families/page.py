"""Makes docs/families.md: what each model family can do, each cell of its table from the tests that prove it.

Run as `python -m tests.families.page > docs/families.md`. It runs the tests that it asks, which takes some minutes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from framework.schema.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
MATRIX = "tests/families/test_matrix.py"
LORA_FILES = "tests/unit/runtime/test_lora_files.py"
PASSED, FAILED = "yes", "**fails**"

Outcomes = Mapping[str, bool]
"""Test id -> whether it passed."""


@dataclass(frozen=True)
class Proof:
    """Tests that stand for one cell: those of a function that have all of these parameters among theirs."""

    file: str
    function: str
    parameters: tuple[str, ...] = ()

    def matches(self, test_id: str) -> bool:
        file, _, rest = test_id.partition("::")
        function, _, parameters = rest.partition("[")
        found = parameters.rstrip("]").split("-")
        return (file, function) == (self.file, self.function) and set(self.parameters) <= set(found)


def marked(family: str, column: str) -> tuple[Proof, ...]:
    """Tests of this folder that say by `@pytest.mark.cell(family, column)` what they prove."""
    found = []
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in tree.body:
            if isinstance(function, ast.FunctionDef) and (family, column) in _cells(function):
                found.append(Proof(file.relative_to(ROOT).as_posix(), function.name))
    return tuple(found)


def _cells(function: ast.FunctionDef) -> list[tuple[object, ...]]:
    return [
        tuple(a.value for a in decorator.args if isinstance(a, ast.Constant))
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.cell"
    ]


# Those of the first family lie elsewhere.
QWEN_IMAGE = (
    Proof("tests/unit/models/test_qwen_image_sampling.py", "test_same_pictures_as_the_pipeline"),
    Proof(
        "tests/unit/models/test_qwen_image.py",
        "test_predict_is_the_pipelines_call_of_the_transformer",
    ),
)


@dataclass(frozen=True)
class About:
    """What a person who chooses a family wants to know.   others: published checkpoints beside that of conf/model."""

    title: str
    licence: str
    trains_on: str
    others: tuple[str, ...] = ()


ABOUT = {
    "qwen_image": About("Qwen-Image (20B)", "Apache-2.0", "pictures with captions"),
    "qwen_image_edit": About(
        "Qwen-Image-Edit (20B)",
        "Apache-2.0",
        "pictures, each with one to three control pictures (the first edition: one) and a caption that says the change",
        ("Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2511"),
    ),
    "sdxl": About(
        "SDXL (2.6B UNet)",
        "CreativeML Open RAIL++-M",
        "pictures with captions; takes `objective=ddpm`, and epsilon or v prediction from the checkpoint",
    ),
    "flux": About(
        "FLUX.1 (12B)",
        "dev: FLUX.1 [dev] Non-Commercial, to be accepted on the hub; schnell: Apache-2.0",
        "pictures with captions",
        ("black-forest-labs/FLUX.1-schnell",),
    ),
    "z_image": About(
        "Z-Image (6B)", "Apache-2.0", "pictures with captions", ("Tongyi-MAI/Z-Image-Turbo",)
    ),
    "wan2_1": About(
        "Wan 2.1 text-to-video (1.3B, 14B)",
        "Apache-2.0",
        "clips with captions; a picture is a clip of one frame",
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
    ),
    "wan2_2": About(
        "Wan 2.2 text-to-video (two experts of 14B)",
        "Apache-2.0",
        "clips with captions; one expert a run, `dit` for high noise or `dit_2` for low noise",
    ),
}
COLUMNS = (
    "LoRA", "full training", "FP8", "offload", "peft", "diffusers", "kohya", "ComfyUI", "equals diffusers",
)  # fmt: skip

HEAD = """# Model families

Made by `python -m tests.families.page > docs/families.md` from the results of the tests that each cell stands for, on
tiny checkpoints in the published layouts.

- **LoRA**: a LoRA on the FP8 base encodes, trains, lowers the loss of a held-out picture, is saved, and changes what is
  made.
- **full training**: every weight of the denoiser likewise; the saved component is read again.
- **FP8**: frozen weights in FP8 change losses by at most 2 %.
- **offload**: each set-up of `conf/vram` gives the losses of the run that keeps the same number formats on the device,
  to the bit, encoders included.
- **peft, diffusers, kohya, ComfyUI**: what the program reads from an exported LoRA predicts what the trained one does
  (ComfyUI: by its published key names).
- **equals diffusers**: the whole picture (PSNR of at least 40 dB) is that of diffusers' own pipeline, in float32 from
  the same weights, noise and prompt.
"""


RECIPES = """\
Each has two recipes, `recipes/<family>_lora.yaml` on the FP8 base and `recipes/<family>_full.yaml`; their headers say
what to prepare, and `octavo plan` with the same arguments what memory is needed. Other checkpoints of a family are
taken by `model.source`, a hub id or a folder. How to add a family: [adding_a_family.md](adding_a_family.md).
"""


def proofs(family: str) -> dict[str, tuple[Proof, ...]]:
    """Column -> what must pass."""
    one = (family,)
    return {
        "LoRA": (Proof(MATRIX, "test_a_lora_on_the_fp8_base_is_learnt_saved_and_used", one),),
        "full training": (Proof(MATRIX, "test_full_training_is_learnt_saved_and_used", one),),
        "FP8": (Proof(MATRIX, "test_fp8_storage_changes_losses_little", one),),
        "offload": tuple(
            Proof(MATRIX, "test_where_weights_rest_changes_no_loss", (family, path.stem))
            for path in sorted((ROOT / "conf" / "vram").glob("*.yaml"))
            if path.stem != "none"  # what the others are compared with
        ),
        "peft": (Proof(LORA_FILES, "test_peft_reads_its_folder", one),),
        "diffusers": (Proof(LORA_FILES, "test_diffusers_reads_its_own_form", one),),
        "kohya": (
            Proof(LORA_FILES, "test_diffusers_reads_the_forms_of_others", (family, "kohya")),
        ),
        "ComfyUI": (Proof(LORA_FILES, "test_comfyui_finds_a_weight_for_every_key", one),),
        "equals diffusers": marked(family, "diffusers")
        or (QWEN_IMAGE if family == "qwen_image" else ()),
    }


def render_cell(needed: tuple[Proof, ...], outcomes: Outcomes) -> str:
    """What is known: `yes` where each proof has tests and all have passed, nothing where one of them has none."""
    found = [[passed for name, passed in outcomes.items() if p.matches(name)] for p in needed]
    if not found or not all(found):
        return ""
    return PASSED if all(all(each) for each in found) else FAILED


def render_page(cells: Mapping[str, Mapping[str, str]]) -> str:
    """The whole page.   cells: family -> column -> text."""
    return "\n".join([HEAD, _table(cells), _about()])


def run_tests() -> dict[str, bool]:
    """Run the tests of all cells in this process."""
    needed = {p for name in FAMILIES for column in proofs(name).values() for p in column}
    recorder = _Recorder()
    names = sorted({f"{proof.file}::{proof.function}" for proof in needed})
    with redirect_stdout(sys.stderr):
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names], plugins=[recorder])
    return recorder.outcomes


class _Recorder:
    def __init__(self) -> None:
        self.outcomes: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid] = report.passed


def _table(cells: Mapping[str, Mapping[str, str]]) -> str:
    rows = [
        f"| family | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for family in FAMILIES:
        texts = [cells[family][column] for column in COLUMNS]
        rows.append(f"| `{family}` | {' | '.join(texts)} |")
    return "\n".join([*rows, ""])


def _about() -> str:
    rows = ["| family | | published as | licence | trains on |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        about = ABOUT[family]
        config = (ROOT / "conf" / "model" / f"{family}.yaml").read_text(encoding="utf-8")
        ids = (yaml.safe_load(config)["source"], *about.others)
        published = "<br>".join(f"`{name}`" for name in ids)
        rows.append(
            f"| `{family}` | {about.title} | {published} | {about.licence} | {about.trains_on} |"
        )
    return "\n".join(["## What they are", "", RECIPES, *rows, ""])


if __name__ == "__main__":
    results = run_tests()
    sys.stdout.write(
        render_page(
            {
                name: {column: render_cell(p, results) for column, p in proofs(name).items()}
                for name in FAMILIES
            }
        )
    )
