"""The one typed, closed configuration. See schema.py for every knob, load.py for how one is made."""

from fitune.config.load import build, dump, leaves, load
from fitune.config.schema import (
    BitfitConfig,
    DataConfig,
    FullConfig,
    LoraConfig,
    MemoryConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BitfitConfig",
    "DataConfig",
    "FullConfig",
    "LoraConfig",
    "MemoryConfig",
    "MethodConfig",
    "ModelConfig",
    "OutputConfig",
    "RunConfig",
    "TrainConfig",
    "build",
    "dump",
    "leaves",
    "load",
]
