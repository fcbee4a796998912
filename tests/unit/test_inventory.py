"""Reading headers: every damage is named, with the file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from framework.errors import SourceError
from framework.inventory import choose_index, file_variant, read_inventory


@pytest.fixture
def sharded(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the sharded transformer that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer"))


def write(folder: Path, name: str = "model.safetensors", **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    save_file(tensors, folder / name)
    return folder / name


def test_names_shapes_dtypes_and_offsets_are_those_in_the_files(tiny_checkpoint: Path) -> None:
    for component in ("transformer", "text_encoder", "vae"):
        folder = tiny_checkpoint / component
        inventory = read_inventory(folder)
        found = {}
        for file in folder.glob("*.safetensors"):
            for key, value in load_file(file).items():
                found[key] = value
                stored = inventory[key]
                assert stored.file == str(file)
                assert stored.shape == tuple(value.shape)
                assert stored.dtype == "BF16"
                data = file.read_bytes()[stored.start : stored.end]
                assert data == value.contiguous().view(torch.uint8).numpy().tobytes()
        assert found.keys() == inventory.keys()


def test_every_float_dtype_is_known(tmp_path: Path) -> None:
    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "U8": torch.uint8,
    }
    write(tmp_path, **{name: torch.zeros(2, 3).to(dtype) for name, dtype in dtypes.items()})
    assert {key: stored.dtype for key, stored in read_inventory(tmp_path).items()} == {
        name: name for name in dtypes
    }


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    write(tmp_path, scalar=torch.tensor(1.0), empty=torch.empty(0, 4))
    inventory = read_inventory(tmp_path)
    assert inventory["scalar"].shape == ()
    assert inventory["scalar"].num_bytes == 4
    assert inventory["empty"].num_bytes == 0


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "diffusion_pytorch_model-00003-of-00008.safetensors").unlink()
    with pytest.raises(SourceError, match=r"1 of 8 weight files are missing: .*00003-of-00008"):
        read_inventory(sharded)


def test_truncated_file_and_its_tensor_are_named(sharded: Path) -> None:
    file = sharded / "diffusion_pytorch_model-00002-of-00008.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"(?s)00002-of-00008.*cut short.*transformer_blocks"):
        read_inventory(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header is damaged"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cut short"),
        (b"\xff" * 16, "header is damaged"),
        (b"\x03\x00\x00\x00\x00\x00\x00\x00{}}", "header is damaged"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "header isn't an object"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        read_inventory(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "header is damaged"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, "header is damaged"),
        ({"dtype": "F32", "shape": [1]}, "header is damaged"),
        ({"dtype": "F6_E3M2", "shape": [4], "data_offsets": [0, 3]}, "unknown dtype F6"),
    ],
)
def test_entries_that_contradict_themselves(tmp_path: Path, entry: object, message: str) -> None:
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(SourceError, match=message):
        read_inventory(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        SourceError, match=r"(?s)no safetensors.*only pickled weights \(pytorch_model.bin\)"
    ):
        read_inventory(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no safetensors file in the folder"):
        read_inventory(tmp_path)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", w=torch.zeros(1))
    write(tmp_path, "b.safetensors", v=torch.zeros(1))
    with pytest.raises(SourceError, match="2 safetensors files and no index"):
        read_inventory(tmp_path)


def test_a_variant_beside_the_plain_file_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "model.fp16.safetensors", w=torch.zeros(1).half())
    write(tmp_path, "model.safetensors", w=torch.zeros(1))
    assert read_inventory(tmp_path)["w"].dtype == "F32"


def test_index_that_promises_too_much(sharded: Path) -> None:
    index = next(sharded.glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"1 tensors are not in the file .*ghost\.weight"):
        read_inventory(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}'])
def test_broken_index(sharded: Path, text: str) -> None:
    next(sharded.glob("*.index.json")).write_text(text)
    with pytest.raises(SourceError, match="index of weight files isn't valid"):
        read_inventory(sharded)


def test_index_must_stay_in_its_folder(sharded: Path) -> None:
    index = next(sharded.glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"w": "../../secret.safetensors"}}))
    with pytest.raises(SourceError, match="outside its folder"):
        read_inventory(sharded)


def test_headers_are_read_without_torch(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from framework.inventory import read_inventory;"
        f"assert read_inventory(Path({str(tiny_checkpoint / 'vae')!r}));"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(SourceError, match="Git LFS pointer") as caught:
        read_inventory(tmp_path)
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00003.safetensors", None),
        ("diffusion_pytorch_model.bf16-00001-of-00003.safetensors", "bf16"),
        ("diffusion_pytorch_model-00001-of-00003.fp16.safetensors", "fp16"),
        ("wan_2.1_vae.safetensors", None),
        ("qwen_2.5_vl_7b.safetensors", None),
    ],
)
def test_variants_are_told_by_the_names_that_are_given_to_them(
    name: str, variant: str | None
) -> None:
    assert file_variant(name) == variant


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"]
)
def test_the_index_of_a_variant_is_found(name: str) -> None:
    names = ["model.safetensors.index.json", name]
    assert choose_index(names, "fp16") == name
    assert choose_index(names, None) == "model.safetensors.index.json"
    assert choose_index(names, "bf16") is None


def test_a_part_of_a_tensor_is_its_rows(tmp_path: Path) -> None:
    values = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    file = write(tmp_path, w=values)
    whole = read_inventory(tmp_path)["w"]
    part = whole.cut((2, 4), first_row=3)
    data = file.read_bytes()[part.start : part.end]
    assert data == values[3:5].numpy().tobytes()
    assert whole.cut_like((2, 4), part.excerpt) == part
    assert whole.cut_like((6, 4), None) is whole


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="only pickled weights") as caught:
        read_inventory(tmp_path)
    [command] = re.findall(r'python -c "(.*)"', caught.value.hint)
    subprocess.run([sys.executable, "-c", command], check=True, cwd=tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert read_inventory(tmp_path)["w"].shape == (2,)
