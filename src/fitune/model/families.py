"""What the layers of each architecture are called: one row per `model_type` of config.json."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fitune.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Module-name suffixes of one architecture.

    Attributes:
        attention: the projections LoRA adapts by default (query and value, or the fused one).
        linear: every linear layer of a block.
    """

    attention: tuple[str, ...]
    linear: tuple[str, ...]


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = Family(("q_proj", "v_proj"), (*_SPLIT, "gate_proj", "up_proj", "down_proj"))
_FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "glm": Family(("q_proj", "v_proj"), (*_SPLIT, "gate_up_proj", "down_proj")),
    "glm4": Family(("q_proj", "v_proj"), (*_SPLIT, "gate_up_proj", "down_proj")),
    "phi3": Family(("qkv_proj",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "bloom": Family(("query_key_value",), _FUSED),
    "chatglm": Family(("query_key_value",), _FUSED),  # the first version; 2 and 3 are glm
    "gpt_neox": Family(("query_key_value",), _FUSED),
}


def target_modules(model: nn.Module, model_type: str, wanted: str | tuple[str, ...]) -> list[str]:
    """Resolve `method.target_modules` to the module-name suffixes of this model.

    Args:
        wanted: `attention`, `linear`, or suffixes to check against the model.

    Raises:
        ConfigError: a name matches no linear layer, or the architecture is unknown and only `attention` was given.
    """
    names = linear_names(model)
    if wanted == "linear":
        family = FAMILIES.get(model_type)
        return sorted(set(family.linear) & set(names)) if family else names
    if wanted == "attention":
        if model_type not in FAMILIES:
            raise ConfigError(
                f"method.target_modules is `attention`, but the attention layers of {model_type!r} models are not "
                f"known; name them: method.target_modules=[...] out of {', '.join(names)}; or use `linear`"
            )
        return list(FAMILIES[model_type].attention)
    # PEFT's rule: the name, or its end after a dot.
    paths = _linear_paths(model)
    missing = [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if missing:
        raise ConfigError(
            f"method.target_modules: {', '.join(missing):.200} is no linear layer of this model; allowed: "
            f"attention, linear, {', '.join(names)}"
        )
    return list(wanted)


def linear_names(model: nn.Module) -> list[str]:
    """Last name components of all linear layers, the output head excluded; sorted."""
    return sorted({path.rsplit(".", 1)[-1] for path in _linear_paths(model)})


def _linear_paths(model: nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = ("Linear", "QuantLinear", "Conv1D")  # GPT-2's Conv1D is a transposed linear layer
    return [path for path, module in model.named_modules() if type(module).__name__ in kinds and module is not head]
