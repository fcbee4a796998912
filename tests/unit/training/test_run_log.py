from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.atomic import write_text
from framework.schema import RunConfig
from framework.training.run_log import build_loggers


def test_weights_and_biases_gets_the_id_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch.loggers as loggers

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(loggers, "WandbLogger", lambda **arguments: given.append(arguments))
    config = RunConfig.model_validate(
        {
            "model": {"family": "qwen_image", "source": "x", "dit": {"trainable": "full"}},
            "data": {"path": "pictures"},
            "logger": {"csv": False, "tensorboard": False, "wandb": {"project": "p"}},
            "run": {"name": "test"},
        }
    )
    write_text(tmp_path / "run.json", '{"id": "abc"}')
    build_loggers(config, tmp_path, resume_step=None)
    assert (given[0]["id"], given[0]["resume"]) == ("abc", "allow")
    assert given[0]["name"] == f"test/{tmp_path.name}"
