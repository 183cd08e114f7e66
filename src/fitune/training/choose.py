"""Which path a run takes, and the proof that the fast one computes what the plain one does."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from fitune.config import RunConfig
from fitune.data.batches import pack
from fitune.data.prepare import Dataset, Row
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported
from fitune.errors import ConfigError, FituneError
from fitune.methods.base import trainable
from fitune.model.load import Base
from fitune.plan.lengths import Lengths, micro_step
from fitune.plan.saves import check_tokens, level_of
from fitune.training.optim import MasterOptimizer
from fitune.training.path import Path, PlainPath, check_packing

# Largest relative difference of loss and of all adapter gradients together. 16-bit paths round differently (the engine
# keeps adapters in the base's dtype for the products, PEFT in fp32); a wrong kernel is off by tens of percent.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
FP8_TOLERANCE = 1e-1  # the engine rounds the gradients of q, k and v as one row, the plain path as three


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
            engine = EnginePath(model, base.model_type, level, check_tokens(base.vocab_size), config.data.max_length)
            check = self_check(model, engine, dataset.train[0])
            engine.reserve(largest_micro_step(config, dataset))
            return engine, f"fast path: {base.model_type} block, keeps `{level}`; {check}"
        except Unsupported as unsupported:
            reason = str(unsupported)
            if config.train.path == "fast":
                raise ConfigError(
                    f"train.path=fast, but the engine cannot run this: {reason}; use train.path=auto or plain"
                ) from unsupported
    if config.data.packing:
        check_packing(model, device, list(dataset.train[:2]))
    return PlainPath(model, device, level in ("attention", "full", "offload")), f"plain path: {reason}"


def largest_micro_step(config: RunConfig, dataset: Dataset) -> int:
    """Upper bound of the tokens in one micro-batch of this data; the plan uses the same."""
    lengths = Lengths(*(tuple(row.num_tokens for row in rows) for rows in (dataset.train, dataset.eval)))
    return micro_step(config, lengths).real


def optimizer_for(model: nn.Module, path: Path, config: RunConfig) -> MasterOptimizer:
    """The optimizer of a run; the engine keeps all adapters in one vector, which is then one tensor to update."""
    return MasterOptimizer(trainable(model), config.train, path.vectors if isinstance(path, EnginePath) else None)


def self_check(model: nn.Module, engine: EnginePath, row: Row) -> str:
    """One row of at most 256 tokens through both paths: loss and adapter gradients, with a random B.

    Both run on the engine's own stream and in this thread: the libraries' workspaces (32 MiB per thread and stream on
    Hopper) are then those that the engine's graphs use anyway.

    Returns:
        One phrase with the differences found.
    Raises:
        FituneError: they differ by more than the dtype's rounding explains.
    """
    count = min(check_tokens(engine.vocabulary), row.num_tokens)
    batch = pack([Row(row.input_ids[:count], bytes([0]) + bytes([1]) * (count - 1), row.source)])
    parameters = trainable(model)
    zeros = {name: p.detach().clone() for name, p in parameters.items() if ".lora_B." in name}
    generator = torch.Generator().manual_seed(0)
    with engine.own_stream(), torch.autograd.set_multithreading_enabled(False):
        with torch.no_grad():
            for name in zeros:  # zero at the start, which would leave A without gradient
                parameters[name].copy_(torch.randn(zeros[name].shape, generator=generator) * 0.01)
        loss = PlainPath(model, engine.device).loss_and_grad(batch, 1.0 / count).item() / count
        expected = {name: cast(torch.Tensor, p.grad) for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        fast_loss = engine.loss_and_grad(batch, 1.0 / count).item() / count
        off = [_squares(cast(torch.Tensor, p.grad), expected[name]) for name, p in parameters.items()]
        with torch.no_grad():
            for name, zero in zeros.items():
                parameters[name].copy_(zero)
    for parameter in parameters.values():
        parameter.grad = None
    model.train()
    loss_off = abs(fast_loss - loss) / abs(loss)
    gradient_off = math.sqrt(sum(o for o, _ in off) / sum(size for _, size in off))
    tolerance = max(TOLERANCE[engine.dtype], FP8_TOLERANCE if engine.shape.fp8 else 0.0)
    if not max(loss_off, gradient_off) <= tolerance:
        raise FituneError(
            f"the fast path disagrees with the plain path on this machine: loss {fast_loss:.6g} and {loss:.6g}, "
            f"adapter gradients differ by {gradient_off:.2%}; nothing was trained. Use train.path=plain, and please "
            "report this"
        )
    return f"equals the plain path on {count} tokens to {loss_off:.0e} (loss) and {gradient_off:.0e} (gradients)"


def _squares(gradient: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Squared norms of the difference and of what was expected."""
    expected = expected.float()
    return (gradient.float() - expected).square().sum().item(), expected.square().sum().item()
