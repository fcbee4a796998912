"""Settings of sd-scripts and musubi-tuner become recipes: their defaults, arithmetic and data set files."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import ConfigError
from framework.migrate import Trainer, migrate, read_table
from tests.unit.migrate.judging import assert_valid, notes, recipe, settings

FLUX = (
    "accelerate launch flux_train_network.py --pretrained_model_name_or_path=flux1-dev.safetensors "
    "--clip_l=c.safetensors --t5xxl=t.safetensors --ae=a.safetensors --network_module=networks.lora_flux "
    "--output_name=x --mixed_precision=bf16"
)
QWEN = (
    "accelerate launch src/musubi_tuner/qwen_image_train_network.py --dit d.safetensors --vae v.safetensors "
    "--text_encoder t.safetensors --network_module networks.lora_qwen_image --output_name x"
)
DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = [1024, 768]
batch_size = 2
enable_bucket = true
  [[datasets.subsets]]
  image_dir = "pictures"
  num_repeats = 10
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # no extra is missing
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.jpg", "c.webp", "a.txt"):
        (tmp_path / "pictures" / name).touch()


def flux(flags: str = "", dataset: str = DATASET) -> dict[str, object]:
    return settings(recipe(f"{FLUX} {flags}", "kohya", dataset=dataset))


def qwen(flags: str = "", dataset: str = "") -> dict[str, object]:
    return settings(recipe(f"{QWEN} {flags}", "musubi", dataset=dataset))


def test_a_flux_lora(tmp_path: Path) -> None:
    found = recipe(
        f"{FLUX} --network_dim 16 --blocks_to_swap 18 --fp8_base", "kohya", dataset=DATASET
    )
    assert_valid(found, tmp_path)
    written = settings(found)
    assert written["model.family"] == "flux"
    assert written["model.dit.source"] == "flux1-dev.safetensors"
    assert written["model.text_encoder.source"] == "c.safetensors"
    assert written["model.text_encoder_2.source"] == "t.safetensors"
    assert written["model.vae.source"] == "a.safetensors"
    assert written["model.dit.lora.rank"] == 16
    assert written["model.dit.lora.alpha"] == 1
    assert written["model.text_encoder.trainable"] == "lora"  # CLIP trains unless it is told not to
    assert "model.text_encoder_2.trainable" not in written
    assert written["model.dit.precision"] == written["model.text_encoder_2.precision"] == "fp8"
    assert (written["model.dit.offload"], written["model.dit.granularity"]) == ("host", "block")
    assert written["data.path"] == "pictures"
    assert written["data.repeats"] == 10
    assert written["data.batch_size"] == 2
    assert written["data.max_px"] == 1024 * 768
    assert "data.max_aspect_ratio" not in written
    assert written["optim.lr"] == 2e-6
    assert written["trainer.max_steps"] == 1600
    assert written["objective.guidance"] == 3.5
    assert written["export.formats"] == ["kohya"]


def test_defaults_that_differ() -> None:
    written = flux("--network_train_unet_only")
    assert (written["model.dit.lora.rank"], written["model.dit.lora.alpha"]) == (4, 1)
    assert "model.text_encoder.trainable" not in written
    assert flux("--network_dim 8 --network_alpha 0")["model.dit.lora.alpha"] == 8
    assert settings(recipe(FLUX.replace("bf16", "no"), "kohya"))["model.compute_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--max_train_steps 300", 300),
        ("--max_train_epochs 4", 4 * 15),  # 3 pictures x 10 / 2
        ("--max_train_epochs 4 --max_train_steps 300", 4 * 15),
        ("--max_train_epochs 4 --gradient_accumulation_steps 4", 4 * 4),
    ],
)
def test_length(flags: str, steps: int) -> None:
    assert flux(flags)["trainer.max_steps"] == steps
    text = f"{FLUX} {flags}".replace("launch", "launch --num_processes 2")
    if "epochs" in flags and "accumulation" not in flags:
        assert settings(recipe(text, "kohya", dataset=DATASET))["trainer.max_steps"] == 4 * 8


def test_without_pictures_the_length_is_left_open() -> None:
    dataset = DATASET.replace("pictures", "nowhere")
    found = recipe(f"{FLUX} --max_train_epochs 4 --lr_warmup_steps 0.1", "kohya", dataset=dataset)
    assert "trainer.max_steps" not in settings(found)
    assert {"max_train_epochs", "lr_warmup_steps"} <= set(notes(found, "check"))


@pytest.mark.parametrize(
    ("text", "warmup"), [("100", 100), ("0.1", 30), ("5%", 15), ("0", None), ("1", 1)]
)
def test_warm_up_as_a_share(text: str, warmup: int | None) -> None:
    written = flux(f"--max_train_steps 300 --lr_warmup_steps {text} --lr_scheduler cosine")
    assert written.get("optim.warmup_steps") == warmup
    assert written["optim.schedule"] == "cosine"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", ("uniform", None, None, 3.0)),
        ("--timestep_sampling sigmoid --sigmoid_scale 2", ("logit_normal", 0, 2, 1.0)),
        ("--timestep_sampling shift --discrete_flow_shift 2.2", ("logit_normal", 0, 1, 2.2)),
        ("--timestep_sampling flux_shift", ("logit_normal", 0, 1, "scheduler")),
        ("--timestep_sampling uniform", ("uniform", None, None, 1.0)),
        ("--weighting_scheme logit_normal --logit_mean 0.5", ("logit_normal", -0.5, 1, 3.0)),
        ("--timestep_sampling magic", ("logit_normal", 0, 1, 1.0)),
    ],
)
def test_noise_levels(flags: str, expected: tuple[object, ...]) -> None:
    written = flux(flags)
    keys = ("timestep_sampling", "logit_mean", "logit_std", "shift")
    assert tuple(written.get(f"objective.{key}") for key in keys) == expected


def test_the_weight_of_the_loss() -> None:
    undone = recipe(f"{FLUX} --weighting_scheme sigma_sqrt", "kohya")
    assert settings(undone)["objective.weighting"] == "none"
    raw = recipe(f"{FLUX} --model_prediction_type raw --weighting_scheme sigma_sqrt", "kohya")
    assert "objective.weighting" not in settings(raw)
    assert "model_prediction_type sigma_scaled" in notes(recipe(FLUX, "kohya"), "lost")
    assert qwen("--weighting_scheme cosmap")["objective.weighting"] == "cosmap"


def test_an_sdxl_file(tmp_path: Path) -> None:
    text = """
    [model]
    pretrained_model_name_or_path = "ponyXL.safetensors"
    network_module = "networks.lora"
    [rest]
    min_snr_gamma = 5
    noise_offset = 0.05
    max_timestep = 900
    train_data_dir = "kd"
    resolution = "1024,768"
    max_train_epochs = 2
    max_grad_norm = 0
    unet_lr = 5e-5
    text_encoder_lr = [1e-5]
    optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99", "eps=1e-6"]
    lr_scheduler = "cosine_with_restarts"
    output_dir = "out"
    output_name = "pony ink"
    shuffle_caption = false
    flip_aug = true
    bogus = 1
    """
    for folder, count in (("10_sks girl", 2), ("3_x", 1), ("plain", 5)):
        (tmp_path / "kd" / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "kd" / folder / f"{number}.png").touch()
    found = recipe(text, "kohya", is_command=False)
    assert_valid(found, tmp_path)
    written = settings(found)
    assert written["model.family"] == "sdxl"
    assert written["objective.name"] == "ddpm"
    assert written["objective.min_snr_gamma"] == 5
    assert written["objective.sigma_max"] == 0.9
    assert "objective.shift" not in written
    for part in ("dit", "text_encoder", "text_encoder_2", "vae"):
        assert written[f"model.{part}.source"] == "ponyXL.safetensors"
    assert written["model.text_encoder_2.trainable"] == "lora"
    assert written["data.path"] == "kd"
    assert written["data.max_aspect_ratio"] == 1.333
    assert written["trainer.max_steps"] == 2 * 23
    assert written["trainer.gradient_clip_val"] is None
    assert written["optim.betas"] == [0.9, 0.99]
    assert (written["run.name"], written["run.output_dir"]) == ("pony_ink", "out")
    lost = set(notes(found, "lost"))
    assert {
        "text_encoder_lr",
        "optimizer_args eps=1e-6",
        "lr_scheduler",
        "flip_aug",
        "bogus",
    } <= lost
    assert "shuffle_caption" not in lost


def test_several_folders_are_sources(tmp_path: Path) -> None:
    dataset = """
    [[datasets]]
    resolution = 512
    [[datasets.subsets]]
    image_dir = "pictures"
    [[datasets.subsets]]
    image_dir = "more"
    num_repeats = 3
    [[datasets.subsets]]
    image_dir = "reg"
    is_reg = true
    [[datasets]]
    resolution = 768
    [[datasets.subsets]]
    image_dir = "big"
    """
    found = recipe(FLUX, "kohya", dataset=dataset)
    written = settings(found)
    assert written["data.path"] is None
    assert written["data.sources"] == [
        {"path": "pictures", "repeats": 1}, {"path": "more", "repeats": 3}, {"path": "big", "repeats": 1},
    ]  # fmt: skip
    assert (
        written["data.max_aspect_ratio"] == 1
    )  # without buckets every picture is cropped to a square
    assert {"resolution", "is_reg reg"} <= set(notes(found, "lost"))
    assert_valid(found, tmp_path)


def test_the_data_set_file_that_a_command_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(DATASET)
    assert settings(recipe(f"{FLUX} --dataset_config d.toml", "kohya"))["data.path"] == "pictures"
    found = recipe(f"{FLUX} --dataset_config nowhere.toml", "kohya")
    assert settings(found)["data.path"] == "???"
    assert "dataset_config" in notes(found, "check")


def test_prompts_are_copied_without_their_options(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# comment\na cat --w 512 --n blurry\n\nred, apple\n")
    written = flux("--sample_prompts p.txt --sample_every_n_epochs 2")
    assert written["sample.prompts"] == ["a cat", "red, apple"]
    assert written["sample.every_n_steps"] == 30


def test_saving() -> None:
    written = flux("--save_every_n_epochs 2 --save_last_n_epochs 3")
    assert (written["checkpoint.every_n_steps"], written["checkpoint.keep_last"]) == (30, 3)
    written = flux("--save_every_n_steps 100 --save_last_n_steps 250")
    assert (written["checkpoint.every_n_steps"], written["checkpoint.keep_last"]) == (100, 3)


def test_musubi_qwen(tmp_path: Path) -> None:
    found = recipe(
        f"{QWEN} --fp8_base --fp8_scaled --fp8_vl --blocks_to_swap 30 --timestep_sampling shift "
        "--discrete_flow_shift 2.2 --weighting_scheme none --network_dim 16 --learning_rate 5e-5 "
        "--optimizer_type adamw8bit --max_train_epochs 16",
        "musubi",
        dataset=DATASET.replace("[[datasets.subsets]]", "").replace("image_dir", "image_directory"),
    )
    assert_valid(found, tmp_path)
    written = settings(found)
    assert written["model.family"] == "qwen_image"
    assert written["model.compute_dtype"] == "bf16"
    assert written["model.dit.source"] == "d.safetensors"
    assert (written["model.dit.lora.rank"], written["model.dit.lora.alpha"]) == (16, 1)
    assert "img_mlp.net.2" in written["model.dit.lora.target_modules"]
    assert written["model.dit.precision"] == written["model.text_encoder.precision"] == "fp8"
    assert written["objective.shift"] == 2.2
    assert written["optim.name"] == "adamw_8bit"
    assert written["trainer.max_steps"] == 16 * 15


@pytest.mark.parametrize(
    ("script", "flags", "family", "source"),
    [
        ("qwen_image_train_network.py", "--model_version edit-2511", "qwen_image_edit", "Qwen/Qwen-Image-Edit-2511"),
        ("qwen_image_train_network.py", "--edit_plus", "qwen_image_edit", "Qwen/Qwen-Image-Edit-2509"),
        ("zimage_train_network.py", "", "z_image", "Tongyi-MAI/Z-Image-Turbo"),
        ("wan_train_network.py", "--task t2v-1.3B", "wan2_1", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("wan_train_network.py", "--task t2v-A14B --dit_high_noise h", "wan2_2", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    ],
)  # fmt: skip
def test_musubi_families(tmp_path: Path, script: str, flags: str, family: str, source: str) -> None:
    text = f"python {script} --dit d.safetensors --network_module networks.lora --network_dim 4 {flags}"
    found = recipe(
        text, "musubi", dataset='[[datasets]]\nimage_directory = "pictures"\nresolution = 512'
    )
    written = settings(found)
    assert (written["model.family"], written["model.source"]) == (family, source)
    assert_valid(found, tmp_path)


def test_an_expert_of_wan() -> None:
    text = "python wan_train_network.py --task t2v-A14B --dit low.safetensors --network_module networks.lora_wan"
    assert settings(recipe(text, "musubi"))["model.dit_2.trainable"] == "lora"
    both = settings(
        recipe(f"{text} --dit_high_noise high.safetensors --timestep_boundary 900", "musubi")
    )
    assert both["model.dit.source"] == "high.safetensors"
    assert both["model.dit_2.source"] == "low.safetensors"
    assert both["objective.sigma_min"] == 0.9


@pytest.mark.parametrize("trainer", ["kohya", "musubi"])
def test_no_setting_vanishes(trainer: Trainer) -> None:
    """Every setting that is given is written, or told of."""
    base = FLUX if trainer == "kohya" else QWEN
    for name, row in read_table(trainer).rows.items():
        if f"--{name}" in base or name in ("model_type", "task", "is_reg"):
            continue
        value = "" if row.takes == "switch" else {"resolution": "512"}.get(name, "7")
        found = recipe(f"{base} --save_every_n_steps 5 --{name} {value}", trainer, dataset=DATASET)
        told = {note.name.split()[0].rstrip(",") for note in found.notes}
        told |= {part for note in found.notes for part in note.name.split(", ")}
        if row.fate in ("lost", "unneeded"):
            assert name in told, name


@pytest.mark.parametrize(
    ("trainer", "text", "phrase"),
    [
        ("kohya", "x = [", "not readable as TOML"),
        ("kohya", "network_dim = 4", "name no model"),
        ("kohya", 'pretrained_model_name_or_path = "sd15.safetensors"', "no recipe can be made for the model"),
        ("kohya", '[[datasets]]\nresolution = 512', "this is a data set file"),
        ("musubi", 'dit = "a"\nnetwork_module = "networks.lora_framepack"', "Families that can be trained"),
        ("musubi", 'dit = "a"\ntask = "i2v-14B"', "no recipe can be made"),
        ("kohya", 'pretrained_model_name_or_path = "xl.safetensors"\nnetwork_dim = "x"', "'x' isn't a number"),
    ],
)  # fmt: skip
def test_what_makes_no_recipe(trainer: Trainer, text: str, phrase: str) -> None:
    with pytest.raises(ConfigError, match="fault") as caught:
        migrate(trainer, text, where="a.toml", is_command=False)
    assert phrase in str(caught.value)
