"""How many parameters each method trains: one formula per method, without torch.

count(arch, config.method)     -> Count(trainable=851968, total=1236666368)

`total` is what PEFT prints as all parameters: the base with everything the method adds. The tests hold each formula
to the real modules. IA3, prompt tuning, P-tuning and prefix tuning are formulas of PEFT's modules; no run file can ask
for them in this release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fitune.config import BitfitConfig, LoraConfig, MethodConfig
from fitune.errors import ConfigError
from fitune.plan.arch import ArchSpec, Linear


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
    """Trainable tensors of one size: elements of each, how many there are."""

    elements: int
    copies: int


def count(arch: ArchSpec, method: MethodConfig) -> Count:
    """Parameters of a run.

    Raises:
        ConfigError: a target that is no linear layer of the model; BitFit on a model without biases.
    """
    trained = sum(tensors.elements * tensors.copies for tensors in trainable(arch, method))
    return Count(trained, arch.total + (trained if isinstance(method, LoraConfig) else 0))


def trainable(arch: ArchSpec, method: MethodConfig) -> tuple[Tensors, ...]:
    """The tensors a method trains; raises like `count`."""
    if isinstance(method, LoraConfig):
        return tuple(
            Tensors(elements, len(blocks))
            for linear, blocks in adapted(arch, method.target_modules)
            for elements in (method.r * linear.ins, method.r * linear.outs)
        )
    wanted = [p for p in arch.parameters if p.name.endswith("bias") or not isinstance(method, BitfitConfig)]
    if not wanted:
        raise ConfigError(
            f"method.name=bitfit trains biases, but this {arch.model_type} model has none; use method.name=lora"
        )
    return tuple(Tensors(parameter.elements, parameter.copies) for parameter in wanted)


def adapted(arch: ArchSpec, wanted: str | Sequence[str]) -> tuple[tuple[Linear, frozenset[int]], ...]:
    """Linear layers that `method.target_modules` names, and in which blocks.

    Args:
        wanted: `attention`, `linear`, or names; a name is the end of a module's path, whole components (PEFT's rule).

    Raises:
        ConfigError: a name matches no linear layer.
    """
    if wanted == "linear":
        return tuple((linear, frozenset(range(arch.layers))) for linear in arch.linears)
    names = arch.targets if wanted == "attention" else tuple(wanted)
    hits = {name: [(linear, _blocks(arch, linear, name)) for linear in arch.linears] for name in names}
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


def _blocks(arch: ArchSpec, linear: Linear, name: str) -> frozenset[int]:
    if f".{linear.path}".endswith(f".{name}"):
        return frozenset(range(arch.layers))
    paths = (f".{arch.block.format(number)}.{linear.path}" for number in range(arch.layers))
    return frozenset(number for number, path in enumerate(paths) if path.endswith(f".{name}"))


def ia3(arch: ArchSpec, targets: Sequence[str], feedforward: Sequence[str]) -> int:
    """IA3 (arXiv:2205.05638): one factor per output of a target, per input of those that are also `feedforward`."""
    inputs = {linear.name for linear, _ in adapted(arch, feedforward)} if feedforward else set()
    widths = (
        (linear.ins if linear.name in inputs else linear.outs, blocks) for linear, blocks in adapted(arch, targets)
    )
    return sum(width * len(blocks) for width, blocks in widths)


def prompt_tuning(arch: ArchSpec, virtual_tokens: int) -> int:
    """Prompt tuning (arXiv:2104.08691): one trained embedding per virtual token."""
    return virtual_tokens * arch.hidden


def p_tuning(arch: ArchSpec, virtual_tokens: int, encoder_hidden: int) -> int:
    """P-tuning (arXiv:2103.10385) with PEFT's MLP encoder: embeddings, then three layers with biases."""
    layers = ((arch.hidden, encoder_hidden), (encoder_hidden, encoder_hidden), (encoder_hidden, arch.hidden))
    return virtual_tokens * arch.hidden + sum((ins + 1) * outs for ins, outs in layers)


def prefix_tuning(arch: ArchSpec, virtual_tokens: int, projection: bool, encoder_hidden: int | None = None) -> int:
    """Prefix tuning (arXiv:2101.00190): a key and a value per virtual token and layer, trained or projected.

    Args:
        projection: make them with two layers from one embedding per virtual token.
        encoder_hidden: inner width of the projection; None: the width of a layer's keys.
    """
    keys = arch.kv_heads * arch.head_dim
    outs = arch.layers * 2 * keys
    if not projection:
        return virtual_tokens * outs
    inner = encoder_hidden or keys
    return virtual_tokens * keys + (keys + 1) * inner + (inner + 1) * outs
