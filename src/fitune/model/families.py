"""What the layers of each architecture are called: one row per `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fitune.errors import ConfigError
from fitune.model.quantize import QuantLinear


@dataclass(frozen=True)
class Family:
    """Module-name suffixes of one architecture.

    Attributes:
        attention: the projections LoRA adapts by default (query and value, or the fused one).
        linear: every linear layer of a block.
        keys_values: the projections that make keys and values; IA3 scales them by default.
        mlp_out: the MLP's last layer, which IA3 scales by default, at its input.
    """

    attention: tuple[str, ...]
    linear: tuple[str, ...]
    keys_values: tuple[str, ...]
    mlp_out: str


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = Family(("q_proj", "v_proj"), (*_SPLIT, "gate_proj", "up_proj", "down_proj"), ("k_proj", "v_proj"), "down_proj")
_GLM = Family(("q_proj", "v_proj"), (*_SPLIT, "gate_up_proj", "down_proj"), ("k_proj", "v_proj"), "down_proj")
_FUSED = Family(
    ("query_key_value",),
    ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ("query_key_value",),
    "dense_4h_to_h",
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "glm": _GLM,
    "glm4": _GLM,
    "phi3": Family(("qkv_proj",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ("qkv_proj",), "down_proj"),
    "bloom": _FUSED,
    "chatglm": _FUSED,  # the first version; 2 and 3 are glm
    "gpt_neox": _FUSED,
}


def target_modules(model: nn.Module, model_type: str, wanted: str | tuple[str, ...]) -> list[str]:
    """Resolve `method.target_modules` to the module-name suffixes of this model.

    Args:
        wanted: `attention`, `linear`, `default` (IA3's), or suffixes to check against the model.

    Raises:
        ConfigError: a name matches no linear layer, or the architecture is unknown and only `attention` was given.
    """
    names = linear_names(model)
    if wanted == "linear":
        family = FAMILIES.get(model_type)
        return sorted(set(family.linear) & set(names)) if family else names
    if wanted in ("attention", "default"):
        family = FAMILIES.get(model_type)
        if family is None:
            raise ConfigError(
                f"method.target_modules is `{wanted}`, but the attention layers of {model_type!r} models are not "
                f"known; name them: method.target_modules=[...] out of {', '.join(names)}; or use `linear`"
            )
        return list(family.attention if wanted == "attention" else (*family.keys_values, family.mlp_out))
    # PEFT's rule: the name, or its end after a dot.
    paths = _linear_paths(model)
    missing = [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if missing:
        raise ConfigError(
            f"method.target_modules: {', '.join(missing):.200} is no linear layer of this model; allowed: "
            f"attention, linear, {', '.join(names)}"
        )
    return list(wanted)


def feedforward_modules(model_type: str, targets: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Which of IA3's targets are scaled at their inputs.

    Args:
        wanted: as the user says; None: the MLP's last layer.

    Raises:
        ConfigError: it is no target, or the architecture is unknown and nothing was said.
    """
    if wanted is None:
        if model_type not in FAMILIES:
            raise ConfigError(
                f"the MLP's last layer of {model_type!r} models is not known; name it: method.feedforward_modules=[...]"
            )
        return [name for name in targets if name.rsplit(".", 1)[-1] == FAMILIES[model_type].mlp_out]
    others = [name for name in wanted if name not in targets]
    if others:
        raise ConfigError(
            f"method.feedforward_modules: {', '.join(others):.200} is not among method.target_modules "
            f"({', '.join(targets)})"
        )
    return list(wanted)


def whole_modules(model: nn.Module, wanted: Sequence[str]) -> tuple[list[str], bool]:
    """Resolve `method.modules_to_save` to paths of modules.

    A tied embedding or head is named by the head's path: PEFT knows it by that name on every architecture.

    Args:
        wanted: names, or ends of paths after a dot.

    Returns:
        The paths, and whether PEFT has to tie the head to the embedding's copy.

    Raises:
        ConfigError: a name matches nothing, or something that consists of other modules, or a layer of the blocks.
    """
    layers = set(_linear_paths(model))
    allowed = [
        path
        for path, module in model.named_modules()
        if path not in layers and any(True for _ in module.parameters(recurse=False))
    ]
    found: list[str] = []
    for name in wanted:
        hits = [path for path in allowed if f".{path}".endswith(f".{name}")]
        if not hits:
            ends = sorted({path.rsplit(".", 1)[-1] for path in allowed})
            raise ConfigError(
                f"method.modules_to_save: {name:.200} is no module of this model that can be trained whole; allowed: "
                f"{', '.join(ends)} (linear layers of the blocks get adapters: method.target_modules)"
            )
        found += hits
    anything: Any = model
    ends_of = {id(anything.get_input_embeddings()), id(anything.get_output_embeddings())}
    modules = dict(model.named_modules())
    if anything.get_input_embeddings().weight is not anything.get_output_embeddings().weight:
        return sorted(set(found)), False
    both = [path for path in found if id(modules[path]) in ends_of]
    head = next(path for path, module in modules.items() if module is anything.get_output_embeddings())
    return sorted(set(found) - set(both) | ({head} if both else set())), bool(both)


def blocks(model: nn.Module) -> tuple[str, int]:
    """Path of the list of a model's blocks, and how many there are."""
    config: Any = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, len(module)
    raise ConfigError(f"the blocks of this {type(model).__name__} are not found; give method.patterns instead")


def parameters_like(model: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that a pattern (`*` for any characters) matches.

    Raises:
        ConfigError: none, or a quantized weight, which cannot be trained.
    """
    quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    frozen = sorted(name for name in quantized if fnmatchcase(name, pattern))
    if frozen:
        raise ConfigError(
            f"method.patterns: {pattern:.200} matches {frozen[0]}, which model.quantization keeps frozen; give a "
            "pattern that does not, or set model.quantization=none"
        )
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(
            f"method.patterns: {pattern:.200} matches no parameter of this model; its names look like "
            f"{', '.join(names[:: max(1, len(names) // 3)][:3])}"
        )
    return found


def linear_names(model: nn.Module) -> list[str]:
    """Last name components of all linear layers, the output head excluded; sorted."""
    return sorted({path.rsplit(".", 1)[-1] for path in _linear_paths(model)})


def _linear_paths(model: nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = ("Linear", "QuantLinear", "Conv1D")  # GPT-2's Conv1D is a transposed linear layer
    return [path for path, module in model.named_modules() if type(module).__name__ in kinds and module is not head]
