"""Runs that start at the same moment encode each picture and caption once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.training.runs import change, run_values, write_pictures

ROOT = Path(__file__).resolve().parents[2]
# Trains as a YAML file says; every entry that is put into the cache is noted, and takes its time. The run of several
# processes looks for what is missing only when the other has begun to encode.
SCRIPT = """
import sys, time
from pathlib import Path
import yaml
from framework.data.cache import EncodedCache
from framework.schema import RunConfig
from framework.training.data_module import DiffusionDataModule
from framework.training.fit import fit

log = Path(sys.argv[2])
put, missing = EncodedCache.put, DiffusionDataModule._missing

def noted(self, kind, key, value):
    with log.open("a") as file:
        file.write(f"{kind} {key}\\n")
    time.sleep(0.5)
    put(self, kind, key, value)

def waiting(self):
    if self.trainer.world_size > 1:
        log.with_name("others are ready").touch()
    while self.trainer.world_size > 1 and not log.exists():
        time.sleep(0.05)
    return missing(self)

EncodedCache.put, DiffusionDataModule._missing = noted, waiting
text = Path(sys.argv[1]).read_text()
config = RunConfig.model_validate(yaml.safe_load(text))
if config.trainer.devices == 1:
    while not log.with_name("others are ready").exists():
        time.sleep(0.05)
fit(config, config_yaml=text)
"""


@pytest.mark.slow
def test_a_run_of_two_processes_and_another_run_encode_each_entry_once(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    script = tmp_path / "train_noting.py"
    script.write_text(SCRIPT)
    log = tmp_path / "puts.txt"
    values = run_values(tiny_checkpoint, write_pictures(tmp_path / "pictures"), tmp_path)
    values = change(values, trainer__max_steps=1, sample={"prompts": [], "size_px": [32, 32]})
    two = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__batch_size": 1}
    runs = []
    for name, changes in (("one", {}), ("two", two)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(change(values, run__name=name, **changes)))
        runs.append(
            subprocess.Popen(
                [sys.executable, str(script), str(file), str(log)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    printed = [run.communicate(timeout=200)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    entries = Counter(log.read_text().splitlines())
    assert set(entries.values()) == {1}, entries
    assert Counter(entry.split()[0] for entry in entries) == {"latents": 6, "text": 6}
    waiting = "waiting for another run that encodes the same data"
    assert [text.count(waiting) for text in printed] == [0, 1], printed
