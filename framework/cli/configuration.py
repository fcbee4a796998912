"""What every command does first: compose, judge, and warn. Nothing here imports torch or writes a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from framework.cli.report import print_warnings
from framework.errors import ConfigError
from framework.judge import judge_run
from framework.judge.verdict import located
from framework.schema.run import RunConfig
from framework.schema.validate import Use


@contextmanager
def judged_config(
    overrides: Sequence[str], *, use: Use, config_dir: Path | None = None
) -> Iterator[RunConfig]:
    """Give the configuration that recipe and overrides describe to the block; warnings go to stderr.

    A fault that the block finds later, for instance a layer name that the checkpoint lacks, is told with the line or
    override that set its key, as faults found here are.   Raises ConfigError with every fault.
    """
    verdict = judge_run(overrides, use=use, config_dir=config_dir)
    config = verdict.valid_config()
    if is_first_process():
        print_warnings(verdict.warnings)
    try:
        yield config
    except ConfigError as error:
        raise ConfigError([located(fault, verdict.where) for fault in error.faults]) from error


def config_text(config: RunConfig) -> str:
    """Write a configuration with every key as YAML; saved in a ./recipes folder, it is a recipe."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def is_first_process() -> bool:
    """False in the further processes of a run, which start the same command and must not print everything again."""
    ranks = (
        os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    )
    return not any(rank.isdigit() and int(rank) > 0 for rank in ranks)
