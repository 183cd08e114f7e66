"""The one typed, closed configuration. See schema.py and methods.py for every knob, load.py for how one is made."""

from fitune.config.load import build, check, dump, leaves, load
from fitune.config.methods import (
    BitfitConfig,
    FreezeConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    PromptLearning,
    PtuningConfig,
    new_tokens,
)
from fitune.config.schema import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BitfitConfig",
    "DataConfig",
    "FreezeConfig",
    "FullConfig",
    "Ia3Config",
    "LoraConfig",
    "MemoryConfig",
    "MethodConfig",
    "ModelConfig",
    "OutputConfig",
    "PrefixConfig",
    "PromptConfig",
    "PromptLearning",
    "PtuningConfig",
    "RunConfig",
    "TrainConfig",
    "build",
    "check",
    "dump",
    "leaves",
    "load",
    "new_tokens",
]
