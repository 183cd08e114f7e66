"""How many parameters each method trains: one formula per method, without torch.

count(arch, config.method)     -> Count(trainable=851968, total=1236666368)

`total` is what PEFT prints as all parameters: the base with everything the method adds. The tests hold each formula
to the real modules, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal

from fitune.config import (
    BitfitConfig,
    FreezeConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    PtuningConfig,
)
from fitune.errors import ConfigError
from fitune.plan.arch import ArchSpec, Linear, Parameter


@dataclass(frozen=True)
class Count:
    """Trained parameters, and all parameters with what the method adds."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trained share [percent]."""
        return 100 * self.trainable / self.total


@dataclass(frozen=True)
class Tensors:
    """Trainable tensors of one size.

    Attributes:
        elements, copies: elements of each, how many there are.
        kind: `own` parameters of the model; `beside` it, in fp32; `copy` of own ones, in the model's dtype.
        lowest: the first block that gradients reach on their behalf; as many as there are blocks: none.
    """

    elements: int
    copies: int = 1
    kind: Literal["own", "beside", "copy"] = "own"
    lowest: int = 0


def count(arch: ArchSpec, method: MethodConfig) -> Count:
    """Parameters of a run.

    Raises:
        ConfigError: the method does not fit the model: a name that matches nothing, BitFit without biases, ...
    """
    tensors = trainable(arch, method)
    trained, added = (sum(t.elements * t.copies for t in tensors if t.kind in kinds) for kinds in (KINDS, KINDS[1:]))
    return Count(trained, arch.total + added)


KINDS = ("own", "beside", "copy")


def trainable(arch: ArchSpec, method: MethodConfig) -> tuple[Tensors, ...]:
    """The tensors a method trains; raises like `count`."""
    return tuple(FORMULAS[method.name](arch, method))


def adapted(arch: ArchSpec, wanted: str | Sequence[str]) -> tuple[tuple[Linear, frozenset[int]], ...]:
    """Linear layers that `method.target_modules` names, and in which blocks.

    Args:
        wanted: `attention`, `linear`, `default` (IA3's), or names; a name is the end of a module's path, whole
            components (PEFT's rule).

    Raises:
        ConfigError: a name matches no linear layer.
    """
    if wanted == "linear":
        return tuple((linear, frozenset(range(arch.layers))) for linear in arch.linears)
    names = _keyword(arch, wanted) if isinstance(wanted, str) else tuple(wanted)
    hits = {name: [(linear, _blocks(arch, linear.path, name)) for linear in arch.linears] for name in names}
    missing = [name for name, found in hits.items() if not any(blocks for _, blocks in found)]
    if missing:
        raise ConfigError(
            f"method.target_modules: {', '.join(missing):.200} is no linear layer of this model; allowed: attention, "
            f"linear, {', '.join(sorted(linear.name for linear in arch.linears))}"
        )
    chosen = [
        (linear, frozenset().union(*(found[i][1] for found in hits.values()))) for i, linear in enumerate(arch.linears)
    ]
    return tuple((linear, blocks) for linear, blocks in chosen if blocks)


def _keyword(arch: ArchSpec, wanted: str) -> tuple[str, ...]:
    if wanted == "attention":
        return arch.targets
    keys_values = [linear.name for linear in arch.linears if linear.group == "qkv" and linear.name != "q_proj"]
    return (*keys_values, _mlp_out(arch))


def _mlp_out(arch: ArchSpec) -> str:
    return next(linear.name for linear in arch.linears if linear.group == "down")


def _blocks(arch: ArchSpec, path: str, name: str) -> frozenset[int]:
    """The blocks in which a path inside a block ends with a name."""
    if f".{path}".endswith(f".{name}"):
        return frozenset(range(arch.layers))
    paths = (f".{arch.block.format(number)}.{path}" for number in range(arch.layers))
    return frozenset(number for number, path in enumerate(paths) if path.endswith(f".{name}"))


def _lora(arch: ArchSpec, method: LoraConfig) -> Iterator[Tensors]:
    for linear, blocks in adapted(arch, method.target_modules):
        if method.init != "default" and method.r > min(linear.ins, linear.outs):
            raise ConfigError(
                f"method.r is {method.r}, but {linear.path} has only {min(linear.ins, linear.outs)} singular values, "
                f"and method.init={method.init} takes as many as r; lower method.r"
            )
        rows = [method.r * linear.ins, method.r * linear.outs, *([linear.outs] if method.dora else [])]
        yield from (Tensors(elements, len(blocks), "beside", min(blocks)) for elements in rows)
    yield from _copies(arch, method.modules_to_save)
    if method.new_tokens:  # rows that the embedding has to grow by are no parameters of the method
        yield Tensors(len(method.new_tokens) * arch.hidden, 1 if arch.tied else 2, "beside")


def _copies(arch: ArchSpec, names: Sequence[str]) -> Iterator[Tensors]:
    """Parameters of the modules that `method.modules_to_save` names; a tied head is the embedding."""
    layers = {linear.path for linear in arch.linears}
    found: dict[str, set[int]] = {}
    for name in names:
        hits = {p.name: blocks for p in arch.parameters if (blocks := _whole(arch, p, name, layers))}
        if arch.tied and ".lm_head".endswith(f".{name}"):
            hits[_embedding(arch)] = {0}
        if not hits:
            modules = {
                p.name.split(".")[-2] for p in arch.parameters if _inside(arch, p).rpartition(".")[0] not in layers
            }
            raise ConfigError(
                f"method.modules_to_save: {name:.200} is no module of this model that can be trained whole; allowed: "
                f"{', '.join(sorted(modules | {'lm_head'}))} (linear layers of the blocks get adapters: "
                "method.target_modules)"
            )
        for parameter, blocks in hits.items():
            found.setdefault(parameter, set()).update(blocks)
    for owned in arch.parameters:
        if owned.name in found:
            blocks = found[owned.name]
            yield Tensors(owned.elements, len(blocks), "copy", _lowest(arch, owned, blocks))


def _whole(arch: ArchSpec, parameter: Parameter, name: str, layers: set[str]) -> set[int]:
    """Where a parameter belongs to a module of that name: blocks, or {0} outside them; never a linear layer's."""
    inside = _inside(arch, parameter)
    module = inside.rpartition(".")[0]
    if inside == parameter.name:
        return {0} if f".{module}".endswith(f".{name}") else set()
    return set() if module in layers else set(_blocks(arch, module, name))


def _inside(arch: ArchSpec, parameter: Parameter) -> str:
    """A parameter's name inside its block; outside the blocks the whole name."""
    return parameter.name.removeprefix(f"{arch.block}.")


def _lowest(arch: ArchSpec, parameter: Parameter, blocks: set[int]) -> int:
    if "{}" in parameter.name:
        return min(blocks)
    return 0 if parameter.name == _embedding(arch) or "embedding" in parameter.name else arch.layers


def _embedding(arch: ArchSpec) -> str:
    return next(p.name for p in arch.parameters if p.name.endswith(("embed_tokens.weight", "word_embeddings.weight")))


def _full(arch: ArchSpec, method: FullConfig) -> Iterator[Tensors]:
    return (Tensors(parameter.elements, parameter.copies) for parameter in arch.parameters)


def _bitfit(arch: ArchSpec, method: BitfitConfig) -> Iterator[Tensors]:
    biases = [parameter for parameter in arch.parameters if parameter.name.endswith("bias")]
    if not biases:
        raise ConfigError(
            f"method.name=bitfit trains biases, but this {arch.model_type} model has none; use method.name=lora"
        )
    return (Tensors(parameter.elements, parameter.copies) for parameter in biases)


def _freeze(arch: ArchSpec, method: FreezeConfig) -> Iterator[Tensors]:
    wanted = method.num_blocks
    if wanted > arch.layers:
        raise ConfigError(
            f"method.num_layers is {wanted}, but this {arch.model_type} model has {arch.layers} blocks; set "
            f"method.num_layers={arch.layers} or less"
        )
    last = set(range(arch.layers - wanted, arch.layers))
    for pattern in method.patterns:
        if not any(matching(arch, parameter, pattern) for parameter in arch.parameters):
            names = [parameter.name.replace("{}", "0") for parameter in arch.parameters]
            raise ConfigError(
                f"method.patterns: {pattern:.200} matches no parameter of this model; its names look like "
                f"{', '.join(names[:: max(1, len(names) // 3)][:3])}"
            )
    for parameter in arch.parameters:
        blocks = set().union(*(matching(arch, parameter, pattern) for pattern in method.patterns))
        if "{}" in parameter.name:
            blocks |= last
        elif _part(arch, parameter) & {*method.also}:
            blocks |= {0}
        if blocks:
            yield Tensors(parameter.elements, len(blocks), "own", _lowest(arch, parameter, blocks))


def matching(arch: ArchSpec, parameter: Parameter, pattern: str) -> set[int]:
    """The blocks in which a pattern of `method.patterns` matches a parameter; {0} for one outside the blocks."""
    numbers = range(arch.layers if "{}" in parameter.name else 1)
    return {number for number in numbers if fnmatchcase(parameter.name.replace("{}", str(number)), pattern)}


def _part(arch: ArchSpec, parameter: Parameter) -> set[str]:
    """Which of embedding, norm and head a parameter outside the blocks is; a tied embedding is the head, too."""
    if parameter.name == _embedding(arch):
        return {"embedding", "head"} if arch.tied else {"embedding"}
    return {"head"} if parameter.name.startswith("lm_head.") else {"norm"}


def _prompt(arch: ArchSpec, method: PromptConfig) -> Iterator[Tensors]:
    yield Tensors(method.num_virtual_tokens * arch.hidden, kind="beside")


def _ptuning(arch: ArchSpec, method: PtuningConfig) -> Iterator[Tensors]:
    inner = method.encoder_hidden_size or arch.hidden
    yield Tensors(method.num_virtual_tokens * arch.hidden, kind="beside")
    if method.encoder == "mlp":
        yield from _network(arch.hidden, inner, inner, arch.hidden)
        return
    for ins in (arch.hidden, 2 * inner):  # two layers in two directions, four gates each
        yield from (Tensors(4 * inner * size, 2, "beside") for size in (ins, inner, 1, 1))
    yield from _network(2 * inner, 2 * inner, arch.hidden)


def _prefix(arch: ArchSpec, method: PrefixConfig) -> Iterator[Tensors]:
    keys = arch.kv_heads * arch.head_dim
    outs = arch.layers * 2 * keys
    yield Tensors(method.num_virtual_tokens * (keys if method.projection else outs), kind="beside")
    if method.projection:
        yield from _network(keys, method.encoder_hidden_size or keys, outs)


def _network(*widths: int) -> Iterator[Tensors]:
    """Linear layers with biases."""
    for ins, outs in pairwise(widths):
        yield from (Tensors(elements, kind="beside") for elements in (ins * outs, outs))


def scaled_inputs(arch: ArchSpec, method: Ia3Config) -> set[str]:
    """Names of the layers whose inputs IA3 scales.

    Raises:
        ConfigError: one of method.feedforward_modules is no target.
    """
    names = [linear.name for linear, _ in adapted(arch, method.target_modules)]
    if method.feedforward_modules is None:
        return {*names} & {_mlp_out(arch)}
    scaled = adapted(arch, method.feedforward_modules) if method.feedforward_modules else ()
    inputs = {linear.name for linear, _ in scaled}
    if not inputs <= {*names}:
        raise ConfigError(
            f"method.feedforward_modules: {', '.join(method.feedforward_modules):.200} is not among "
            f"method.target_modules ({', '.join(names)})"
        )
    return inputs


def _ia3(arch: ArchSpec, method: Ia3Config) -> Iterator[Tensors]:
    targets, inputs = adapted(arch, method.target_modules), scaled_inputs(arch, method)
    for linear, blocks in targets:
        width = linear.ins if linear.name in inputs else linear.outs
        yield Tensors(width, len(blocks), "beside", min(blocks))


FORMULAS: dict[str, Callable[[ArchSpec, Any], Iterator[Tensors]]] = {  # Any: each takes its own section
    "lora": _lora,
    "full": _full,
    "freeze": _freeze,
    "bitfit": _bitfit,
    "prompt": _prompt,
    "ptuning": _ptuning,
    "prefix": _prefix,
    "ia3": _ia3,
}
