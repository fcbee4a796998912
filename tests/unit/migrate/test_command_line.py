"""Shell text is read as a shell reads it, as far as training scripts go."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.migrate.command_line import num_processes, read_commands, split_commands
from framework.migrate.flags import read_table

TABLE = read_table("diffsynth")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a b  c", [["a", "b", "c"]]),
        ("a \\\n  b\nc", [["a", "b"], ["c"]]),
        ("a \\\r\n b\r\nc", [["a", "b"], ["c"]]),
        ("a 'b c' \"d 'e'\" f\"g\"h", [["a", "b c", "d 'e'", "fgh"]]),
        ("a # b\n# c\nd#e", [["a"], ["d#e"]]),
        ("a && b; c | d", [["a"], ["b"], ["c"], ["d"]]),
        ("a \"\" b", [["a", "", "b"]]),
        ("a\\ b \"c\\\"d\"", [["a b", 'c"d']]),
        ("a 'open", [["a", "open"]]),
        ("", []),
    ],
)  # fmt: skip
def test_words(text: str, words: list[list[str]]) -> None:
    assert [found for _, found in split_commands(text)] == words


def test_lines_are_counted_over_continuations_and_quotes() -> None:
    assert [line for line, _ in split_commands("a \\\n b\n\nc 'x\ny'\nd")] == [1, 4, 6]


def test_flags_of_a_training_command() -> None:
    text = (
        "export X=1\nBASE=data\nmodelscope download --local_dir ./data\n"
        "CUDA_VISIBLE_DEVICES=0 accelerate launch --num_processes 4 ex/train.py --lora_rank=32 \\\n"
        '  --dataset_base_path "$BASE/set" --use_gradient_checkpointing --output_path $ELSEWHERE stray\n'
    )
    (command,) = read_commands(text, TABLE)
    assert command.line == 4
    assert command.script == "ex/train.py"
    assert command.launch == {"num_processes": "4"}
    assert command.flags == {
        "lora_rank": "32",
        "dataset_base_path": "data/set",
        "use_gradient_checkpointing": True,
        "output_path": "$ELSEWHERE",
    }
    assert command.stray == ("stray",)


def test_a_name_may_be_shortened_where_only_one_begins_so() -> None:
    (command,) = read_commands("python train.py --lora_r 8 --dataset 1", TABLE)
    assert command.flags == {"lora_rank": "8", "dataset": "1"}


def test_flags_alone_are_a_command() -> None:
    (command,) = read_commands("--lora_rank 8", TABLE)
    assert (command.script, command.flags) == ("", {"lora_rank": "8"})


def test_a_switch_takes_no_value_and_a_list_takes_several() -> None:
    table = read_table("kohya")
    text = 'python flux_train_network.py --sdpa --optimizer_args "a=1" "b=2,3" --network_dim 4 5'
    (command,) = read_commands(text, table)
    assert command.flags == {"sdpa": True, "optimizer_args": ["a=1", "b=2,3"], "network_dim": "4"}
    assert command.stray == ("5",)


def test_processes_come_from_the_launcher_or_its_file(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 8\n")
    assert num_processes({"num_processes": "2"})[0] == 2
    assert num_processes({"config_file": str(file)})[0] == 8
    file.write_text(": :")
    assert num_processes({"config_file": str(file)})[0] is None
    assert num_processes({"config_file": "nowhere.yaml"})[0] is None
    assert num_processes({})[0] is None
