"""What a run's YAML may say. No torch, no I/O: a configuration is judged before anything is read."""

from framework.schema.families import FAMILIES, FamilySpec
from framework.schema.model import (
    ComponentConfig,
    DitConfig,
    Fp8Config,
    LoraConfig,
    ModelConfig,
)
from framework.schema.run import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LoggerConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    RunSection,
    SampleConfig,
    TrainerConfig,
    ValidationConfig,
    WandbConfig,
)

__all__ = [
    "FAMILIES",
    "CheckpointConfig",
    "ComponentConfig",
    "DataConfig",
    "DitConfig",
    "EmaConfig",
    "FamilySpec",
    "Fp8Config",
    "LoggerConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "RunSection",
    "SampleConfig",
    "TrainerConfig",
    "ValidationConfig",
    "WandbConfig",
]
