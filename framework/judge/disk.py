"""Holds a configuration against the files that it names: checkpoint, data, run to resume from, LoRA to start from.

Only names, times and headers are read, and only on this disk; nothing is fetched. What isn't here is a fault for a run
(`need`) and a warning otherwise, since a configuration is often checked on another machine than it runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from framework.errors import Fault, SourceError
from framework.judge.data_places import check_data
from framework.judge.layers import check_layers, lora_file_ranks
from framework.judge.places import Findings, nearest_entries, source_fault
from framework.judge.resume import RESUME_READS, check_resume
from framework.schema.families import FAMILIES
from framework.schema.model import LoraConfig
from framework.schema.paths import overlaps
from framework.schema.run import RunConfig
from framework.schema.validate import Use


@dataclass(frozen=True)
class FileCheck:
    """What the disk says.

    checked_layers: whether patterns of layer names were held against the checkpoint; False where it isn't on this disk.
    """

    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()
    checked_layers: bool = False


def check_files(
    config: RunConfig,
    where: Callable[[str], str],
    *,
    use: Use,
    need: bool,
    stand_ins: Collection[str] = (),
) -> FileCheck:
    """Judge what a configuration names on this disk. Raises nothing for what a person wrote, and asks no network.

    where: path -> what set it.   use: planning and generating read no data and resume nothing.
    need: True where the run is about to start, so that what is missing stops it.
    stand_ins: paths of `config` whose value isn't what a person wrote, so that nothing is said of them.
    """
    findings = Findings(where, need)
    checked = check_layers(config, findings, use=use)
    _check_init_from(config, findings, use)
    if use == "train":
        check_data(config, findings)
        if not any(overlaps(path, read) for path in stand_ins for read in RESUME_READS):
            check_resume(config, findings)

    def known(faults: list[Fault]) -> tuple[Fault, ...]:
        return tuple(f for f in faults if not any(overlaps(f.path, path) for path in stand_ins))

    return FileCheck(known(findings.faults), known(findings.warnings), checked)


def _check_init_from(config: RunConfig, findings: Findings, use: Use) -> None:
    """The LoRA files that components start from: there, readable, and of the rank that the configuration says."""
    for name, component in config.model.components.items():
        lora = component.lora or LoraConfig()
        if component.trainable != "lora":
            continue
        if lora.preset is not None:
            _check_is_there(lora.preset, f"model.{name}.lora.preset", findings)
        if lora.init_from is None:
            continue
        key = f"model.{name}.lora.init_from"
        path = Path(lora.init_from).expanduser()
        if not _check_is_there(lora.init_from, key, findings) or path.is_dir():
            continue
        try:
            ranks = lora_file_ranks(path.absolute(), path.stat().st_mtime_ns)
        except SourceError as error:
            findings.faults.append(source_fault(key, error, findings.where, lora.init_from))
            continue
        held = ranks.get(FAMILIES[config.model.family].components[name].subfolder)
        if held is not None and held != lora.rank and use != "plan":
            rank = f"model.{name}.lora.rank"
            findings.refuse(
                key,
                f"the adapter in {lora.init_from} has rank {held}, but {rank}={lora.rank}",
                hint=f"Set {rank}={held}, or start from another file.",
                code="rule",
                value=lora.init_from,
            )


def _check_is_there(given: str, key: str, findings: Findings) -> bool:
    """Whether a LoRA file, or a folder of peft's or of a run, is there; tells it otherwise."""
    path = Path(given).expanduser()
    is_lora = path.is_file() or (path.is_dir() and any(path.glob("*.safetensors")))
    if not is_lora:
        what = "is a folder without a LoRA" if path.is_dir() else "does not exist"
        findings.missing(
            key,
            f'"{given}" {what}',
            hint=f"Give a LoRA `.safetensors` file, or {key}=null to start from nothing.",
            value=given,
            nearest=_lora_files(given, path),
            allowed="a LoRA .safetensors file, or null",
        )
    return is_lora


def _lora_files(typed: str, path: Path) -> tuple[str, ...]:
    """LoRA files that were probably meant: those inside a folder that was given, else those of a close name."""
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        return tuple(f"{typed.rstrip('/')}/{name}" for name in inside[:3])
    return nearest_entries(typed, (Path.cwd(),))
