"""DiffSynth-Studio's commands become recipes with the right numbers, and no flag vanishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.errors import ConfigError
from framework.migrate import migrate, read_table
from tests.unit.migrate.judging import (
    COMMAND,
    DATA,
    LORA,
    MODEL,
    OUTPUT,
    START,
    assert_valid,
    notes,
    recipe,
    settings,
)

VALUES = {
    "height": "512 --width 512",
    "width": "512 --height 512",
    "extra_inputs": "edit_image",
    "model_id_with_origin_paths": "Qwen/Qwen-Image-2512:transformer/*",
    "model_paths": "transformer/a.safetensors",
    "fp8_models": "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
    "offload_models": "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
    "quant_options": "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors:torchao_fp8_w8a16",
    "cpu_offload_split_threshold": "5 --enable_model_cpu_offload",
    "task": "direct_distill",
    "trainable_models": "text_encoder",
    "lora_base_model": "text_encoder",
    "preset_lora_model": "text_encoder --preset_lora_path a.safetensors",
    "customized_optimizer": "bitsandbytes.optim.Adam8bit",
    "wandb_project": "p --enable_wandb_log",
    "dataset_metadata_path": "data/set/other.json",
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "set"
    folder.mkdir(parents=True)
    (folder / "metadata.csv").write_text('image,prompt\na.png,x\nb.png,"y\nz"\nc.png,w\n')


def test_a_lora_command(tmp_path: Path) -> None:
    found = recipe(f"{COMMAND} --num_epochs 5 --dataset_repeat 50 --use_gradient_checkpointing")
    assert_valid(found, tmp_path)
    written = settings(found)
    assert found.name == written["run.name"] == "Qwen-Image_lora"
    assert written["run.output_dir"] == "models/train"
    assert written["model.family"] == "qwen_image"
    assert written["model.source"] == "Qwen/Qwen-Image"
    assert written["model.dit.trainable"] == "lora"
    assert written["model.dit.lora.rank"] == 32
    assert written["model.dit.lora.alpha"] == 32
    assert written["model.dit.gradient_checkpointing"] is True
    assert written["data.path"] == "data/set/metadata.csv"
    assert written["data.max_px"] == 1024 * 1024
    assert written["data.repeats"] == 50
    assert written["objective.timestep_sampling"] == "uniform"
    assert written["objective.shift"] == 2.2255
    assert written["optim.lr"] == 1e-4
    assert written["trainer.gradient_clip_val"] is None
    assert written["trainer.max_steps"] == 5 * 3 * 50
    assert "rank: 32  # --lora_rank 32" in found.text
    assert "(loss)" in notes(found, "changed")


@pytest.mark.parametrize(
    ("flags", "processes", "steps"),
    [
        ("", 1, 3),
        ("--num_epochs 2 --dataset_repeat 5", 1, 30),
        ("--num_epochs 2 --dataset_repeat 5", 2, 2 * 8),
        ("--num_epochs 2 --dataset_repeat 5 --gradient_accumulation_steps 4", 2, 2 * 2),
        ("--num_epochs 3 --dataset_repeat 5 --gradient_accumulation_steps 4", 1, 3 * 4),
    ],
)
def test_epochs_become_optimizer_steps(flags: str, processes: int, steps: int) -> None:
    command = COMMAND.replace("launch", f"launch --num_processes {processes}")
    written = settings(recipe(f"{command} {flags}"))
    assert written["trainer.max_steps"] == steps
    assert written.get("trainer.devices", 1) == processes


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_of_json_files_are_counted(tmp_path: Path, suffix: str) -> None:
    rows = [{"image": "a.png", "prompt": "x"}] * 4
    text = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "data" / "set" / f"m.{suffix}").write_text(text)
    command = COMMAND.replace("metadata.csv", f"m.{suffix}")
    assert settings(recipe(command))["trainer.max_steps"] == 4


def test_without_the_metadata_file_the_length_is_left_open(tmp_path: Path) -> None:
    found = recipe(COMMAND.replace("metadata.csv", "nowhere.csv") + " --num_epochs 5")
    assert "trainer.max_steps" not in settings(found)
    assert "--num_epochs" in notes(found, "check")
    assert "5 x ceil(ceil(rows x 1 / 1) / 1)" in found.text
    assert_valid(found, tmp_path)


def test_a_metadata_file_elsewhere_keeps_its_base_folder(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,prompt\na.png,x\n")
    written = settings(recipe(COMMAND.replace("data/set/metadata.csv", "m.csv")))
    assert (written["data.path"], written["data.base_dir"]) == ("m.csv", "data/set")


def test_saving_counts_micro_batches_there() -> None:
    flags = "--save_steps 40 --gradient_accumulation_steps 4"
    assert settings(recipe(f"{COMMAND} {flags}"))["checkpoint.every_n_steps"] == 10
    assert settings(recipe(f"{COMMAND} --dataset_repeat 7"))["checkpoint.every_n_steps"] == 21


def test_split_training_is_one_run(tmp_path: Path) -> None:
    encode = f"{START} {DATA} {MODEL} {LORA} --task sft:data_process --output_path cache"
    model = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"
    train = (
        f"{START} --dataset_base_path cache --task sft:train --num_epochs 2 --dataset_repeat 50 {LORA} {OUTPUT} "
        f'--model_id_with_origin_paths "{model}"'
    )
    found = recipe(f"{encode}\n\n{train}\n")
    assert_valid(found, tmp_path)
    written = settings(found)
    assert written["data.cache"] is True
    assert written["data.path"] == "data/set/metadata.csv"
    assert written["trainer.max_steps"] == 2 * 3 * 50
    assert found.name == "Qwen-Image_lora"
    assert "--dataset_base_path" not in notes(found, "check")
    other = recipe(f"{encode}\n{train.replace('path cache', 'path other')}")
    assert "--dataset_base_path" in notes(other, "check")


def test_a_second_stage_alone_asks_for_the_pictures() -> None:
    found = recipe(f"{START} --dataset_base_path cache --task sft:train {MODEL} {LORA} {OUTPUT}")
    assert settings(found)["data.path"] == "???"
    assert "--dataset_base_path" in notes(found, "check")


def test_two_commands_are_two_recipes(tmp_path: Path) -> None:
    second = f"{COMMAND} --preset_lora_path a/epoch-4.safetensors --preset_lora_model dit"
    first, other = migrate("diffsynth", f"{COMMAND}\n{second}", where="a.sh")
    assert (first.name, other.name) == ("Qwen-Image_lora_1", "Qwen-Image_lora_2")
    assert settings(other)["model.dit.lora.preset"] == "a/epoch-4.safetensors"
    assert_valid(other, tmp_path)


def test_distillation_takes_its_steps_from_the_data(tmp_path: Path) -> None:
    file = tmp_path / "data" / "set" / "metadata.csv"
    file.write_text(
        "image,prompt,seed,rand_device,num_inference_steps,cfg_scale\na.png,x,0,cpu,8,1\n"
    )
    inputs = "--extra_inputs seed,rand_device,num_inference_steps,cfg_scale"
    found = recipe(f"{COMMAND} --task direct_distill {inputs} --height 1328 --width 1328")
    written = settings(found)
    assert written["objective.name"] == "direct_distill"
    assert written["objective.distill_steps"] == 8
    assert written["data.max_px"] == 1328 * 1328
    assert written["data.max_aspect_ratio"] == 1
    assert "objective.shift" not in written
    assert "--extra_inputs" not in notes(found, "lost")
    assert_valid(found, tmp_path)


def test_timestep_boundaries_are_noise_levels_after_the_shift(tmp_path: Path) -> None:
    """0.417 and 0.358 of the schedule of Wan, counted from its noisy end, are the noise levels 0.875 and 0.9."""
    text = (
        f"{START} {DATA} {OUTPUT} --lora_base_model dit --model_id_with_origin_paths "
        "Wan-AI/Wan2.2-T2V-A14B:EXPERT/diffusion_pytorch_model*.safetensors,"
        "Wan-AI/Wan2.2-T2V-A14B:models_t5_umt5-xxl-enc-bf16.pth,Wan-AI/Wan2.2-T2V-A14B:Wan2.1_VACE.pth"
    ).replace("VACE", "VAE")
    high = text.replace("EXPERT", "high_noise_model") + " --max_timestep_boundary 0.417"
    low = text.replace("EXPERT", "low_noise_model") + " --min_timestep_boundary 0.358"
    found = recipe(f"{high} --height 480 --width 832 --num_frames 49")
    written = settings(found)
    assert written["model.family"] == "wan2_2"
    assert written["model.source"] == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert written["objective.sigma_min"] == pytest.approx(0.875, abs=5e-4)
    assert written["data.max_px"] == 480 * 832
    assert written["data.num_frames"] == 49
    # Its own names of layers, which are those of the default too.
    assert written["model.dit.lora.target_modules"][:4] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert written["model.dit.gradient_checkpointing"] is True
    assert_valid(found, tmp_path)
    other = recipe(low)
    assert settings(other)["model.dit_2.trainable"] == "lora"
    assert settings(other)["objective.sigma_max"] == pytest.approx(0.9, abs=5e-4)
    assert settings(other)["data.num_frames"] == 81
    assert_valid(other, tmp_path)


@pytest.mark.parametrize(
    ("model", "family", "ending"),
    [
        ("Qwen/Qwen-Image-Edit-2511:transformer/d*,Qwen/Qwen-Image:vae/d*", "qwen_image_edit", ""),
        ("black-forest-labs/FLUX.1-dev:flux1-dev.safetensors", "flux", ""),
        ("Tongyi-MAI/Z-Image-Turbo:transformer/*.safetensors", "z_image", ""),
        ("Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*.safetensors", "wan2_1", "-Diffusers"),
        ("stabilityai/stable-diffusion-xl-base-1.0:unet/d*.safetensors", "sdxl", ""),
    ],
)  # fmt: skip
def test_families(tmp_path: Path, model: str, family: str, ending: str) -> None:
    component = "unet" if family == "sdxl" else "dit"
    flags = f"--lora_base_model {component} --lora_target_modules to_q"
    found = recipe(f"{START} {DATA} {OUTPUT} --model_id_with_origin_paths {model} {flags}")
    written = settings(found)
    assert written["model.family"] == family
    assert written["model.source"] == model.partition(":")[0] + ending
    assert "--lora_target_modules" in notes(found, "check")
    assert_valid(found, tmp_path)


def test_a_transformer_from_elsewhere_has_its_own_source() -> None:
    model = (
        "DiffSynth-Studio/Qwen-Image-Distill-Full:diffusion_pytorch_model*,Qwen/Qwen-Image:vae/v*"
    )
    found = recipe(f"{START} {DATA} {OUTPUT} {LORA} --model_id_with_origin_paths {model}")
    written = settings(found)
    assert written["model.source"] == "Qwen/Qwen-Image"
    assert written["model.dit.source"] == "DiffSynth-Studio/Qwen-Image-Distill-Full"


def test_local_files_are_sources_of_their_components() -> None:
    paths = '["m/Qwen/Qwen-Image/transformer/a.safetensors", ["m/Qwen/Qwen-Image/text_encoder/b-1.safetensors", "b-2"]]'
    found = recipe(f"{START} {DATA} {OUTPUT} {LORA} --model_paths '{paths}'")
    written = settings(found)
    assert (written["model.family"], written["model.source"]) == ("qwen_image", "Qwen/Qwen-Image")
    assert written["model.dit.source"] == "m/Qwen/Qwen-Image/transformer/a.safetensors"
    assert written["model.text_encoder.source"].endswith("b-1.safetensors")
    assert "--model_paths" in notes(found, "check")  # shards want a folder with their index
    given = recipe(f"{START} {DATA} {OUTPUT} {LORA} --model_paths dit.safetensors", family="flux")
    assert settings(given)["model.source"] == "black-forest-labs/FLUX.1-dev"
    assert settings(given)["model.dit.source"] == "dit.safetensors"


def test_layers_of_flux_are_translated() -> None:
    model = "--model_id_with_origin_paths black-forest-labs/FLUX.1-dev:flux1-dev.safetensors"
    lora = "--lora_base_model dit --lora_target_modules a_to_qkv,b_to_out,proj_out"
    written = settings(recipe(f"{START} {DATA} {OUTPUT} {model} {lora}"))
    assert written["model.dit.lora.target_modules"] == [
        "transformer_blocks.*.attn.to_q", "transformer_blocks.*.attn.to_k", "transformer_blocks.*.attn.to_v",
        "attn.to_add_out", "single_transformer_blocks.*.proj_out",
    ]  # fmt: skip


def test_storage_flags() -> None:
    dit = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"
    text = "Qwen/Qwen-Image:text_encoder/model*.safetensors"
    found = recipe(f"{COMMAND} --fp8_models {dit},typo --offload_models {text}")
    written = settings(found)
    assert written["model.dit.precision"] == "fp8"
    assert written["model.text_encoder.offload"] == "disk"
    assert "--fp8_models" in notes(found, "lost")
    full = COMMAND.replace("--lora_base_model", "--trainable_models")
    found = recipe(f"{full} --fp8_models {dit} --offload_models {dit}")
    assert "model.dit.precision" not in settings(found)
    assert {"--fp8_models", "--offload_models"} <= set(notes(found, "lost"))
    written = settings(recipe(f"{COMMAND} --quant_options {dit}:bitsandbytes_nf4/img_in,proj_out"))
    assert written["model.dit.fp8.keep_high_precision"] == ["img_in", "proj_out"]
    offload = COMMAND.replace("launch", "launch --config_file deepspeed_zero3_cpuoffload.yaml")
    written = settings(recipe(offload))
    assert (written["model.dit.offload"], written["model.dit.granularity"]) == ("host", "block")


@pytest.mark.parametrize("flag", sorted(read_table("diffsynth").rows))
def test_no_flag_vanishes(flag: str) -> None:
    """Each flag changes the recipe or is told of; a recipe without it has neither."""
    row = read_table("diffsynth").rows[flag]
    if flag.startswith("dmd2_"):
        with pytest.raises(ConfigError, match="1 fault"):
            recipe(f"{COMMAND} --{flag} 1")
        return
    value = "" if row.takes == "switch" else VALUES.get(flag, "7")
    plain, given = recipe(COMMAND), recipe(f"{COMMAND} --{flag} {value}")
    written, told = settings(given), {note.name for note in given.notes}
    named = any(f"--{flag}" in name for name in told) or f"--{flag}" in given.text
    assert named, flag
    assert written != settings(plain) or given.notes != plain.notes or f"--{flag}" in plain.text
    if row.here and flag not in ("swanlab_project",):
        assert set(notes(given, "unneeded")) == set(notes(plain, "unneeded")), flag


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("", "no training command of DiffSynth-Studio was found"),
        ("python infer.py --x", "no training command"),
        (f"{START} {DATA} {LORA}", "names no model"),
        (f"{COMMAND} --task trajectory_imitation", "isn't offered"),
        (f"{COMMAND} --lora_rank many", "'many' isn't a number"),
        (COMMAND.replace("Qwen/Qwen-Image:", "black-forest-labs/FLUX.2-dev:"), "FLUX.2 isn't among"),
        (COMMAND.replace("Qwen/Qwen-Image:", "Wan-AI/Wan2.1-I2V-14B-480P:"), "from text alone"),
        (COMMAND.replace("Qwen/Qwen-Image:", "someone/Else:"), "Families that can be trained: qwen_image"),
        (COMMAND.replace('--lora_base_model "dit"', "--trainable_models controlnet"), "nothing that the family"),
    ],
)  # fmt: skip
def test_what_makes_no_recipe(text: str, phrase: str) -> None:
    with pytest.raises(ConfigError, match="fault") as caught:
        migrate("diffsynth", text, where="train.sh")
    assert phrase in str(caught.value)


def test_a_family_can_be_given() -> None:
    found = recipe(COMMAND.replace("Qwen/Qwen-Image:", "someone/Else:"), family="qwen_image")
    written = settings(found)
    assert (written["model.family"], written["model.source"]) == ("qwen_image", "someone/Else")


def test_an_unknown_flag_is_named_with_the_nearest() -> None:
    found = recipe(f"{COMMAND} --learning_rat3 1e-3")
    (note,) = [note for note in found.notes if note.name == "--learning_rat3"]
    assert note.kind == "lost"
    assert "nearest: --learning_rate" in note.text


def test_the_arguments_that_a_run_leaves() -> None:
    flags = {
        "model_id_with_origin_paths": "Qwen/Qwen-Image:transformer/d*", "dataset_base_path": "data/set",
        "dataset_metadata_path": "data/set/metadata.csv", "lora_base_model": "dit", "lora_rank": 8, "num_epochs": 2,
        "learning_rate": 5e-5, "height": None, "use_gradient_checkpointing": True, "zero_cond_t": False,
        "swanlab_project": "DiffSynth-Studio", "lora_target_modules": "to_q,to_v", "output_path": "./models/x",
    }  # fmt: skip
    found = recipe(json.dumps(flags), is_command=False)
    written = settings(found)
    assert written["model.dit.lora.rank"] == 8
    assert written["trainer.max_steps"] == 6
    assert written["optim.lr"] == 5e-5
    assert not {"--swanlab_project", "--zero_cond_t"} & {note.name for note in found.notes}
    for text in ("{", "[1]"):
        with pytest.raises(ConfigError, match="1 fault"):
            migrate("diffsynth", text, where="training_args.json", is_command=False)


def test_a_family_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="there is no family called 'qwen_imge'"):
        migrate("diffsynth", COMMAND, where="", family="qwen_imge")
