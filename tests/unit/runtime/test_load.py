"""Loading: planned bytes are allocated bytes, weights are those of the files, what doesn't fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from framework.errors import PlanError, SourceError
from framework.models import get_family
from framework.plan.build import build_inference_plan, build_run_plan
from framework.plan.types import ComponentPlan, VramPlan
from framework.runtime.load import adapter_parameters, load_component, resting_bytes
from framework.schema import RunConfig
from framework.storage.fp8 import decode_e4m3
from framework.storage.managed import is_managed
from tests.checkpoints import rename_keys

CPU = torch.device("cpu")
ALL_KINDS = ["linear", "conv", "embedding"]
COMPONENTS = ["dit", "text_encoder", "vae"]
NOTHING_TRAINS = {"dit": {"trainable": "none"}}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def make_plan(
    source: Path, *, compute: str = "bf16", purpose: str = "train", **parts: Any
) -> VramPlan:
    model = {"family": "qwen_image", "source": str(source), "compute_dtype": compute, **parts}
    config = RunConfig.model_validate(
        {
            "model": model,
            "data": {"path": "p", "cache": False},
            "run": {"name": "t"},
            "sample": {"prompts": ["a"]},
        }
    )
    if purpose == "infer":
        return build_inference_plan(config.model, device="cpu")
    return build_run_plan(config, device="cpu")


def load(plan: ComponentPlan, *, compute: str = "bf16", **options: Any) -> nn.Module:
    return load_component(
        plan, get_family("qwen_image"), device=CPU, compute_dtype=DTYPES[compute], **options
    )


def trains(component: str, **settings: Any) -> dict[str, Any]:
    """Parts of a model in which only `component` trains."""
    parts: dict[str, Any] = {name: {} for name in COMPONENTS}
    parts[component] = settings
    return parts


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("scaling", ["row", "tensor", "none"])
def test_planned_bytes_are_allocated_bytes_in_fp8(
    tiny_checkpoint: Path, component: str, scaling: str
) -> None:
    fp8 = {"scaling": scaling, "layers": ALL_KINDS, "keep_high_precision": []}
    plan = make_plan(
        tiny_checkpoint, purpose="infer", **trains(component, precision="fp8", fp8=fp8)
    )
    part = plan.component(component)
    module = load(part)
    assert resting_bytes(module) == part.resting_bytes
    assert sum(is_managed(m) for m in module.modules()) == len(part.groups[0].tensors)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("compute", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_planned_bytes_are_allocated_bytes_in_every_compute_dtype(
    tiny_checkpoint: Path, component: str, compute: str, precision: str
) -> None:
    settings: dict[str, Any] = {"precision": precision, "fp8": {"layers": ALL_KINDS}}
    plan = make_plan(
        tiny_checkpoint, purpose="infer", compute=compute, **trains(component, **settings)
    )
    part = plan.component(component)
    module = load(part, compute=compute)
    assert resting_bytes(module) == part.resting_bytes
    assert {p.dtype for p in module.parameters()} == {DTYPES[compute]}


@pytest.mark.parametrize("component", COMPONENTS)
def test_full_training_is_float32_and_all_of_it_trains(
    tiny_checkpoint: Path, component: str
) -> None:
    plan = make_plan(tiny_checkpoint, **trains(component, trainable="full"))
    part = plan.component(component)
    module = load(part)
    assert resting_bytes(module) == part.resting_bytes
    assert module.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) == part.trained_numel


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_planned_adapter_is_the_attached_adapter(
    tiny_checkpoint: Path, component: str, dora: bool, precision: str
) -> None:
    settings = {
        "trainable": "lora",
        "precision": precision,
        "fp8": {"layers": ALL_KINDS},
        "lora": {"rank": 3, "use_dora": dora, "dropout": 0.1},
    }
    plan = make_plan(tiny_checkpoint, **trains(component, **settings))
    part = plan.component(component)
    module = load(part, seed=1)
    adapters = adapter_parameters(module)
    assert part.lora is not None
    assert sum(p.numel() for p in adapters.values()) == part.lora.numel == part.trained_numel
    assert sum(p.numel() * p.element_size() for p in adapters.values()) == part.adapter_bytes
    assert sorted(tuple(p.shape) for p in adapters.values()) == sorted(part.lora.parameter_shapes())
    assert resting_bytes(module) == part.resting_bytes
    assert {n for n, p in module.named_parameters() if p.requires_grad} == set(adapters)


def test_bf16_weights_are_those_of_the_files(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, purpose="infer", dit={})
    wanted = QwenImageTransformer2DModel.from_pretrained(
        tiny_checkpoint / "transformer", dtype=torch.bfloat16
    ).state_dict()
    got = load(plan.component("dit")).state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    vae = load(plan.component("vae")).state_dict()
    wanted = AutoencoderKLQwenImage.from_pretrained(tiny_checkpoint / "vae").state_dict()
    assert vae.keys() == wanted.keys()
    assert all(torch.equal(vae[key].float(), wanted[key].float()) for key in wanted)


def test_fp8_weights_are_the_encoded_weights_of_the_files(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, purpose="infer", dit={"precision": "fp8"})
    plain = load(make_plan(tiny_checkpoint, purpose="infer", dit={}).component("dit"))
    module = load(plan.component("dit"))
    for name, layer in module.named_modules():
        if is_managed(layer):
            weight = plain.get_submodule(name).weight.float()
            error = (layer.weight.float() - weight).norm() / weight.norm()
            assert float(error) < 0.03
    assert module.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["published", "newer", "nested"])
def test_text_encoder_in_every_layout(tiny_checkpoint: Path, tmp_path: Path, layout: str) -> None:
    reference = load(make_plan(tiny_checkpoint, purpose="infer").component("text_encoder"))
    folder = Path(shutil.copytree(tiny_checkpoint / "text_encoder", tmp_path / "text_encoder"))
    if layout == "newer":
        rename_keys(folder, r"^visual\.", "model.visual.")
        rename_keys(folder, r"^model\.(?!visual)", "model.language_model.")
    if layout == "nested":
        rename_keys(folder, r"^model\.", "language_model.model.")
    plan = make_plan(tiny_checkpoint, purpose="infer", text_encoder={"source": str(folder)})
    module = load(plan.component("text_encoder"))
    assert set(module.state_dict()) == set(reference.state_dict())
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in module.state_dict().items())
    ids = torch.tensor([[1, 20, 30]])
    with torch.no_grad():
        assert torch.isfinite(module(input_ids=ids).last_hidden_state).all()


def test_published_fp8_is_used_as_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer"))
    published: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(file).items()}
        published |= tensors
        save_file(tensors, file)
    for precision in ("fp8", "bf16"):
        dit = {"source": str(folder), "precision": precision}
        part = make_plan(tiny_checkpoint, purpose="infer", dit=dit).component("dit")
        module = load(part)
        assert resting_bytes(module) == part.resting_bytes
        for key, value in published.items():
            owner = module.get_submodule(key.rpartition(".")[0])
            leaf = key.rpartition(".")[2]
            if leaf == "weight" and is_managed(owner):
                assert torch.equal(owner.codes, value.view(torch.uint8))
                assert owner.dequant_scale is None
            else:
                assert torch.equal(
                    getattr(owner, leaf), decode_e4m3(value.view(torch.uint8), torch.bfloat16)
                )


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_nan_in_a_published_fp8_file_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # converted weights go to the current folder
    folder = Path(shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer"))
    for file in folder.glob("*.safetensors"):
        tensors = {
            key: value.to(torch.float8_e4m3fn) if "attn.to_" in key and value.ndim == 2 else value
            for key, value in load_file(file).items()
        }
        for key, value in tensors.items():
            if key == "transformer_blocks.0.attn.to_q.weight":
                value.view(torch.uint8)[0, 0] = 0x7F
        save_file(tensors, file)
    plan = make_plan(
        tiny_checkpoint,
        purpose="infer",
        dit={
            "source": str(folder),
            "precision": "fp8",
            "offload": offload,
            # Other layers would have to be converted first, which looks at all of them.
            "fp8": {
                "keep_high_precision": ["*mlp*", "*_mod*", "*add_*", "*_in", "*out*", "*embed*"]
            },
        },
    )
    with pytest.raises(PlanError, match=r"transformer_blocks\.0\.attn\.to_q\.weight holds NaN"):
        load(plan.component("dit"))


@pytest.mark.parametrize(
    ("value", "scaling", "message"),
    [(float("nan"), "row", "aren't finite"), (500.0, "none", r"(?s)above 448.*scaling=row")],
)
def test_weights_that_fp8_can_not_hold(
    tiny_checkpoint: Path, tmp_path: Path, value: float, scaling: str, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer"))
    key = "transformer_blocks.0.attn.to_q.weight"
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key][3, 2] = value
            save_file(tensors, file)
    dit = {"source": str(folder), "precision": "fp8", "fp8": {"scaling": scaling}}
    with pytest.raises(PlanError, match=message) as caught:
        load(make_plan(tiny_checkpoint, purpose="infer", dit=dit).component("dit"))
    assert key in str(caught.value)


def test_progress_counts_every_byte_that_is_read(tiny_checkpoint: Path) -> None:
    part = make_plan(tiny_checkpoint, purpose="infer").component("vae")
    counts: list[int] = []
    load(part, on_progress=counts.append)
    assert sum(counts) == 2 * part.numel
    assert len(counts) == sum(len(group.tensors) for group in part.groups)


def test_seed_decides_the_adapter(tiny_checkpoint: Path) -> None:
    part = make_plan(tiny_checkpoint, dit={"trainable": "lora", "precision": "fp8"}).component(
        "dit"
    )
    first, again, other = (adapter_parameters(load(part, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"transformer_blocks\.2\.\S+ is missing in the checkpoint"),
        ({"num_layers": 1}, r"transformer_blocks\.1\.\S+ has no place in the module"),
        (
            {"attention_head_dim": 32, "axes_dims_rope": [16, 8, 8]},
            r"img_in\.weight is \[48, 64\] in the checkpoint",
        ),
    ],
)
def test_config_of_another_model_is_refused_before_weights_are_read(
    tiny_checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    part = make_plan(tiny_checkpoint, purpose="infer", dit={"source": str(folder)}).component("dit")
    read: list[int] = []
    with pytest.raises(PlanError, match=message):
        load(part, on_progress=read.append)
    assert read == []


def test_files_that_changed_since_the_plan(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint / "vae", tmp_path / "vae"))
    part = make_plan(tiny_checkpoint, purpose="infer", vae={"source": str(folder)}).component("vae")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"].float()
    save_file(tensors, file)
    with pytest.raises(PlanError, match=r"(?s)changed since the plan.*decoder\.conv_in\.bias.*F32"):
        load(part)


def test_layers_that_no_managed_layer_stands_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A 2-D weight that belongs to no linear layer is seen before anything is read."""
    part = make_plan(tiny_checkpoint, purpose="infer", dit={"precision": "fp8"}).component("dit")

    class Other(type(get_family("qwen_image"))):  # type: ignore[misc]
        def build_module(self, component: str, folder: Path) -> nn.Module:
            module = super().build_module(component, folder)
            layer = module.transformer_blocks[0].attn.to_q
            twin = nn.Bilinear(1, 1, 1)
            twin.weight, twin.bias = layer.weight, layer.bias
            module.transformer_blocks[0].attn.to_q = twin
            return module

    with pytest.raises(PlanError, match=r"(?s)to_q: Bilinear can't be stored.*keep_high_precision"):
        load_component(part, Other(), device=CPU, compute_dtype=torch.bfloat16)


def test_a_file_that_shrinks_while_it_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from framework.inventory import read_inventory
    from framework.runtime.streaming import read_tensors

    folder = Path(shutil.copytree(tiny_checkpoint / "vae", tmp_path / "vae"))
    inventory = read_inventory(folder)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SourceError, match="cut short"):
        list(read_tensors(inventory.values()))
    file.unlink()
    with pytest.raises(SourceError, match="can't be read"):
        list(read_tensors(inventory.values()))


def test_streaming_reuses_one_buffer(tiny_checkpoint: Path) -> None:
    from framework.inventory import read_inventory
    from framework.runtime.streaming import read_tensors

    inventory = read_inventory(tiny_checkpoint / "transformer")
    storages = set()
    wanted = {}
    for file in (tiny_checkpoint / "transformer").glob("*.safetensors"):
        wanted |= load_file(file)
    for stored, values in read_tensors(inventory.values()):
        storages.add(values.untyped_storage().data_ptr())
        assert torch.equal(values, wanted.pop(stored.key))
    assert not wanted
    assert len(storages) == 1
    assert list(read_tensors([])) == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_another_default_device_changes_nothing(tiny_checkpoint: Path, component: str) -> None:
    """A trainer builds its model with the GPU as the default device; the meta device stands for it here."""
    fp8 = {"layers": ALL_KINDS}
    parts = trains(component, trainable="lora", precision="fp8", fp8=fp8, lora={"rank": 2})
    if component == "vae":
        parts["vae"]["lora"]["target_modules"] = ["to_qkv"]
    part = make_plan(tiny_checkpoint, **parts).component(component)
    expected = load(part)
    with torch.device("meta"):
        module = load(part)
        assert torch.empty(0).device.type == "meta"
    assert module.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert tensor.device == CPU, name
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
