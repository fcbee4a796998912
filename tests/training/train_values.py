"""Train as a YAML file says, in a process of its own: for tests that kill it or need several."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from framework.errors import OctavoError
from framework.schema import RunConfig
from framework.training import reproducibility
from framework.training.fit import fit


def main() -> int:
    """Exit code 1 and a message for errors that are meant for a person."""
    parser = argparse.ArgumentParser()
    parser.add_argument("values", type=Path)
    parser.add_argument("--seconds-per-step", type=float, default=0.0)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    original = reproducibility.SeedEachMicroStep.on_train_batch_start

    def slowed(self: Any, trainer: pl.Trainer, *rest: Any) -> None:
        original(self, trainer, *rest)
        time.sleep(arguments.seconds_per_step)

    reproducibility.SeedEachMicroStep.on_train_batch_start = slowed
    text = arguments.values.read_text()
    try:
        fit(RunConfig.model_validate(yaml.safe_load(text)), config_yaml=text)
    except OctavoError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
