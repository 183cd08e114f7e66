"""What a configuration and a model's config.json must agree on before a weight is read.

`fitune plan` and `fitune train` ask the same small functions. Each answers with what is wrong and what to do, or None.
What the engine can do and the plain path cannot stands in `PLAIN_PATH` and holds only for runs that take that path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fitune.config import BitfitConfig, FreezeConfig, Ia3Config, LoraConfig, PrefixConfig, PromptLearning, RunConfig
from fitune.errors import ConfigError
from fitune.plan.arch import ArchSpec, read_arch
from fitune.plan.params import adapted, matching, scaled_inputs, trainable
from fitune.plan.saves import level_of


def check_run(config: RunConfig, arch: ArchSpec | None, positions: int | None) -> None:
    """Refuse what cannot work.

    Args:
        arch: None where the architecture is unknown to the planner; what it would know is then found out later.
        positions: longest sequence of the model, if it has an end.

    Raises:
        ConfigError: with the first problem.
    """
    reason = plain_reason(arch, config)
    if reason is not None and config.train.path == "fast":
        raise ConfigError(f"train.path=fast, but the engine cannot run this: {reason}; use train.path=auto or plain")
    problems = [_rows_fit_positions(config, positions)]
    if arch is not None:
        trainable(arch, config.method)  # raises
        problems.append(_patterns_spare_quantized_weights(config, arch))
    problem = next((problem for problem in problems if problem), None)
    if problem is None and reason is not None:
        problem = plain_path_problem(config)
    if problem is not None:
        raise ConfigError(problem)


def known_arch(config: Mapping[str, Any]) -> ArchSpec | None:  # Any: JSON values
    """The architecture of a config.json; None if the planner does not know it, which training need not."""
    try:
        return read_arch(config)
    except ConfigError:
        return None


def plain_reason(arch: ArchSpec | None, config: RunConfig) -> str | None:
    """Why a run takes the plain path, in the engine's words; None if it takes the engine."""
    method = config.method
    if config.train.path == "plain":
        return "train.path=plain"
    if arch is None:
        return "an architecture the planner does not know"
    if arch.plain is not None:
        return arch.plain
    if config.model.int8_compute == "llm_int8":
        return "model.int8_compute=llm_int8"
    if config.model.quantization != "none" and _stored_in_two_ways(arch):
        return f"projections of one input stored as {config.model.quantization} and none"
    if isinstance(method, BitfitConfig | PromptLearning):
        return None
    if isinstance(method, Ia3Config):
        return _factors_elsewhere(arch, method)
    if not isinstance(method, LoraConfig):
        return f"method.name={method.name}; the engine trains adapters, biases and virtual tokens"
    if method.modules_to_save or method.new_tokens:
        key = "modules_to_save" if method.modules_to_save else "new_tokens"
        return f"method.{key}; the engine trains LoRA adapters"
    return "DoRA" if method.dora else None


def _stored_in_two_ways(arch: ArchSpec) -> bool:
    """Some group of a block has layers that are quantized and layers that are not."""
    ways: dict[tuple[int, str], set[bool]] = {}
    for number in range(arch.layers):
        for linear in arch.linears:
            ways.setdefault((number, linear.group), set()).add((number, linear.path) in arch.whole)
    return any(len(found) > 1 for found in ways.values())


def _factors_elsewhere(arch: ArchSpec, method: Ia3Config) -> str | None:
    """The engine's own refusals (engine/factors.py)."""
    inputs = scaled_inputs(arch, method)
    for linear, _ in adapted(arch, method.target_modules):
        if linear.group not in ("qkv", "down"):
            return "IA3's factors on other layers than queries, keys, values and the MLP's last"
        if linear.group == "qkv" and linear.name in inputs:
            return "IA3's factors on the input of queries, keys or values"
        if linear.group == "down" and linear.name not in inputs:
            return "IA3's factors on the output of the MLP's last projection"
    return None


def plain_path_problem(config: RunConfig) -> str | None:
    """What transformers' and PEFT's own forward cannot do of this configuration."""
    return next((problem for check in PLAIN_PATH if (problem := check(config))), None)


def _rows_fit_positions(config: RunConfig, positions: int | None) -> str | None:
    longest = config.data.max_length
    if positions is None:
        return None
    if longest > positions:
        return (
            f"data.max_length is {longest}, but this model has {positions} positions; set data.max_length={positions} "
            "or less"
        )
    virtual = config.method.num_virtual_tokens if isinstance(config.method, PromptLearning) else 0
    if longest + virtual > positions:
        return (
            f"data.max_length ({longest}) and method.num_virtual_tokens ({virtual}) together are more than the "
            f"{positions} positions of this model; lower one of them"
        )
    return None


def _patterns_spare_quantized_weights(config: RunConfig, arch: ArchSpec) -> str | None:
    if config.model.quantization == "none" or not isinstance(config.method, FreezeConfig):
        return None
    paths = {f"{arch.block}.{linear.path}.weight": linear.path for linear in arch.linears}
    way_out = "" if arch.quantized else ", or set model.quantization=none"
    for pattern in config.method.patterns:
        for parameter in arch.parameters:
            path = paths.get(parameter.name)
            if path and any((number, path) not in arch.whole for number in matching(arch, parameter, pattern)):
                return (
                    f"method.patterns: {pattern:.200} matches {parameter.name.replace('{}', '*')}, which "
                    f"model.quantization={config.model.quantization} keeps frozen; give a pattern that does not"
                    f"{way_out}"
                )
    return None


def _a_prefix_is_not_recomputed(config: RunConfig) -> str | None:
    if not isinstance(config.method, PrefixConfig):
        return None
    if level_of(config.train.activation_checkpointing) not in ("attention", "full", "offload"):
        return None
    setting = str(config.train.activation_checkpointing).lower()
    return (
        f"train.activation_checkpointing is {setting}, but method.name=prefix hands its keys and values to "
        "transformers in a cache, and a block that is computed again would find its own keys in it. Set "
        "train.activation_checkpointing=false, or use method.name=prompt or ptuning"
    )


def _virtual_tokens_are_not_packed(config: RunConfig) -> str | None:
    if not config.data.packing or not isinstance(config.method, PromptLearning):
        return None
    return (
        f"data.packing is true, but method.name={config.method.name} puts virtual tokens in front of each sequence: "
        "of several rows in one sequence only the first would have them in front. Set data.packing=false"
    )


PLAIN_PATH: tuple[Callable[[RunConfig], str | None], ...] = (
    _a_prefix_is_not_recomputed,
    _virtual_tokens_are_not_packed,
)
