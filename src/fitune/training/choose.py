"""Which path a run takes, and why."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fitune.config import LoraConfig, MethodConfig, RunConfig
from fitune.data.prepare import Dataset
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported
from fitune.errors import ConfigError
from fitune.methods.base import trainable
from fitune.methods.prompts import num_virtual_tokens
from fitune.model.load import Base
from fitune.plan.checks import plain_path_problem
from fitune.plan.lengths import Lengths, micro_step
from fitune.plan.saves import check_tokens, level_of
from fitune.training.optim import MasterOptimizer
from fitune.training.path import Path, PlainPath, check_packing
from fitune.training.self_check import self_check


def choose_path(model: nn.Module, base: Base, config: RunConfig, dataset: Dataset) -> tuple[Path, str]:
    """The path of a run and one line that says which and why.

    Raises:
        ConfigError: train.path=fast cannot be had, or packing cannot.
        FituneError: fast and plain path disagree.
    """
    device = next(model.parameters()).device
    level = level_of(config.train.activation_checkpointing)
    reason = "train.path=plain"
    if config.train.path != "plain":
        try:
            tokens = check_tokens(base.vocab_size) + num_virtual_tokens(model)
            engine = EnginePath(model, base.model_type, level, tokens, config.data.max_length)
            check = self_check(model, engine, dataset.train[0])
            engine.reserve(largest_micro_step(config, dataset, engine.shape.virtual))
            return engine, f"fast path: {base.model_type} block, keeps `{level}`; {check}"
        except Unsupported as unsupported:
            reason = str(unsupported)
            if config.train.path == "fast":
                raise ConfigError(
                    f"train.path=fast, but the engine cannot run this: {reason}; use train.path=auto or plain"
                ) from unsupported
    problem = plain_path_problem(config)  # of a run that was expected on the engine
    if problem is not None:
        raise ConfigError(f"{problem} (plain path: {reason})")
    if config.data.packing:
        check_packing(model, device, list(dataset.train[:2]))
    return PlainPath(model, device, level in ("attention", "full", "offload")), f"plain path: {reason}"


def largest_micro_step(config: RunConfig, dataset: Dataset, virtual: int) -> int:
    """Upper bound of the rows of one micro-batch of this data, virtual tokens included; the plan uses the same."""
    lengths = Lengths(*(tuple(row.num_tokens for row in rows) for rows in (dataset.train, dataset.eval)))
    return micro_step(config, lengths).tokens(virtual)


def optimizer_for(model: nn.Module, path: Path, config: RunConfig) -> MasterOptimizer:
    """The optimizer of a run; the engine keeps all adapters in one vector, which is then one tensor to update."""
    parameters = trainable(model)
    vectors = path.vectors if isinstance(path, EnginePath) else None
    return MasterOptimizer(parameters, config.train, vectors, rates(parameters, config.method))


def rates(parameters: Iterable[str], method: MethodConfig) -> dict[str, float]:
    """What multiplies the learning rate, by name: that of B in LoRA+ (arXiv:2402.12354)."""
    ratio = method.lora_plus_ratio if isinstance(method, LoraConfig) else 1.0
    return {} if ratio == 1.0 else {name: ratio for name in parameters if ".lora_B." in name}
