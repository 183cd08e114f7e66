"""The proof, before the first step of every run, that the fast path computes what the plain one does.

Block by block: both paths get the same input and the same gradient of the output, so that rounding does not add up over
the depth of the model and a wrong kernel stands out. Then the loss of the whole model, which covers what connects the
blocks. What starts without any effect is random meanwhile: the adapters' B, zero, without which A would have no
gradient, and IA3's factors, all one. Blocks of the plain path are called as the model itself calls them, whatever its
family hands them beside their input. Virtual tokens are compared by their gradients where the engine leaves them to
autograd: rows of the first block's input, or keys and values of every block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from fitune.data.batches import Batch, pack, pad
from fitune.data.prepare import Row
from fitune.engine.path import EnginePath
from fitune.errors import FituneError
from fitune.kernels.dropout import drop, drop_reference
from fitune.methods.base import trainable
from fitune.plan.saves import checked_tokens
from fitune.training.path import PlainPath

# Largest relative difference allowed of one tensor of a block, and of the loss. The two paths round in different places
# (the engine multiplies adapters in the base's dtype, PEFT in fp32): on random blocks of 1B and 8B models the worst
# tensor is 1.5 % off in bf16, 0.2 % in fp16. A wrong kernel is off by tens of percent.
TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.float16: (2e-2, 1e-2), torch.bfloat16: (8e-2, 3e-2)}
# Rows of fp8 codes, 7 % there: a value near the middle of two codes falls to either side, and the engine rounds the
# gradients of queries, keys and values as one row where the plain path rounds three.
FP8_TOLERANCE = (25e-2, 5e-2)
# Gradients of queries and keys alone, in 16 bits: much cancels out in them, so rounding is a large part of the rest
# (20 % seen on narrow blocks), and only what cannot be rounding counts. A missing rotation is off by over 100 %.
GROSS = 0.6
# In a row of few or of equal tokens the gradients of queries and keys cancel out, and what is left of them is rounding.
# A gradient counts as at least so much of the largest of its kind in the block, a part as so much of the whole.
LEAST = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}
LEAST_PART = 0.003
PREFIX_PARTS = ("the keys of the prefix", "the values of the prefix")


def self_check(model: nn.Module, engine: EnginePath, row: Row) -> str:
    """Compare both paths on at most 256 tokens of one row, around the first that is supervised.

    Both run on the engine's own stream and in this thread: the libraries' workspaces (32 MiB per thread and stream on
    Hopper) are then those that the engine's graphs use anyway.

    Returns:
        One phrase with the largest differences found.
    Raises:
        FituneError: they differ by more than the dtype's rounding explains.
    """
    count = checked_tokens(engine.vocabulary, row.num_tokens, engine.shape.virtual)
    start = max(0, min(row.learn.find(1) - count // 2, row.num_tokens - count))
    part = Row(row.input_ids[start : start + count], bytes([0]) + bytes([1]) * (count - 1), row.source)
    batch = pad([part], 0) if engine.virtual else pack([part])  # PEFT wants a mask with virtual tokens
    with engine.own_stream(), torch.autograd.set_multithreading_enabled(False), _random_start(model):
        loss, calls = _plain_forward(model, batch.to(engine.device), engine)
        loss_off = abs(engine.loss(batch).item() - loss) / abs(loss)
        worst, where = max([*_block_differences(model, engine, batch, calls), _mask_difference(engine)])
    model.train()
    block_bound, loss_bound = FP8_TOLERANCE if engine.shape.fp8 else TOLERANCE[engine.dtype]
    if not (worst <= block_bound and loss_off <= loss_bound):
        raise FituneError(
            f"the fast path disagrees with the plain path on this machine: {where} differs by {worst:.2%}, "
            f"the loss by {loss_off:.2%}; nothing was trained. Use train.path=plain, and please report this"
        )
    return f"equals the plain path on {count} tokens to {worst:.0e} (each block) and {loss_off:.0e} (loss)"


@contextmanager
def _random_start(model: nn.Module) -> Iterator[None]:
    parameters = {name: p for name, p in trainable(model).items() if ".lora_B." in name or ".ia3_l." in name}
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parameters.items():
            mean, spread = (0.0, 0.01) if ".lora_B." in name else (1.0, 0.2)
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        for parameter in trainable(model).values():
            parameter.grad = None


@dataclass(frozen=True)
class _Call:
    """How the model called one of its blocks: with x (T, H) and what else."""

    x_TH: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def repeat(self, layer: nn.Module, past: Any = None) -> torch.Tensor:
        """The block's output (T, H).

        Args:
            past: a transformers Cache in place of the one it was called with, which has this block's own keys by now.
        """
        args = [past if _is_cache(value) else value for value in self.args]
        kwargs = {name: past if _is_cache(value) else value for name, value in self.kwargs.items()}
        out = layer(self.x_TH[None], *args, **kwargs)
        return cast(torch.Tensor, out[0] if isinstance(out, tuple) else out).view_as(self.x_TH)


def _plain_forward(model: nn.Module, batch: Batch, engine: EnginePath) -> tuple[float, list[_Call]]:
    """Loss of the plain path, and the call of each block."""
    calls: list[_Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            x_1TH, args = args[0], args[1:]
        else:
            x_1TH = kwargs["hidden_states"]
            kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(_Call(x_1TH[0].clone(), args, kwargs))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in engine.layers]
    try:
        return PlainPath(model, engine.device).loss(batch).item(), calls
    finally:
        for handle in handles:
            handle.remove()


def _block_differences(
    model: nn.Module, engine: EnginePath, batch: Batch, calls: list[_Call]
) -> Iterator[tuple[float, str]]:
    """Relative differences of what each block adds to its input and its gradient, and of every trained gradient."""
    generator = torch.Generator().manual_seed(1)
    for number, (layer, call) in enumerate(zip(engine.layers, calls, strict=True)):
        if number < engine.lowest:
            continue
        x = call.x_TH.requires_grad_()
        gradient = torch.randn(x.shape, generator=generator).to(x)
        past, leaves = _past(engine, number)
        out = call.repeat(layer, past)
        torch.autograd.backward(out, gradient)
        expected = _taken(layer)
        fast_out, fast_gradient = _run_block(engine, number, batch, x.detach(), gradient)
        found = _taken(layer)
        if engine.virtual and engine.virtual.embedded and number == 0 and x.grad is not None:
            expected["virtual tokens"] = x.grad[: engine.virtual.count]
            found["virtual tokens"] = engine.virtual.gradient[:, 0]
        for name, leaf_1gPd in leaves.items():
            assert engine.virtual is not None
            assert leaf_1gPd.grad is not None
            expected[name] = leaf_1gPd.grad[0].transpose(0, 1)
            found[name] = engine.virtual.gradient[number, PREFIX_PARTS.index(name)]
        beside = engine.blocks[number].norm1.norm.carried is None  # the residual passes through as it is
        yield _difference(fast_out, out.detach(), x.detach() if beside else None), f"the output of block {number}"
        if fast_gradient is not None and x.grad is not None:
            yield _difference(fast_gradient, x.grad, gradient if beside else None), f"the input of block {number}"
        for name, wanted in expected.items():
            shown = f"{name.removesuffix('.default.weight')} in block {number}"
            largest = max(_norm(other) for key, other in expected.items() if _kind(key) == _kind(name))
            yield _difference(found[name], wanted, least=LEAST[engine.dtype] * largest), shown
            for part, *pair in _fused_parts(engine, name, found[name], wanted):
                off = _difference(pair[0], pair[1], least=LEAST_PART * _norm(wanted))
                if engine.dtype == torch.float32 or off > GROSS:
                    yield off, f"{part} of {shown}"
    for parameter in trainable(model).values():
        parameter.grad = None


def _is_cache(value: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def _past(engine: EnginePath, number: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A new cache that holds the prefix of one block, and what is in it (1, g, P, d); (None, {}) without a prefix."""
    if engine.virtual is None or engine.virtual.embedded:
        return None, {}
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    leaves = [part_Pgd.transpose(0, 1)[None].clone().requires_grad_() for part_Pgd in engine.virtual.table[number]]
    cache.update(*leaves, number)
    return cache, dict(zip(PREFIX_PARTS, leaves, strict=True))


def _run_block(
    engine: EnginePath, number: int, batch: Batch, x_TH: torch.Tensor, gradient_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`run_block` on rows as the plain path has them: those of a prefix are no rows there, and nothing reads them."""
    if engine.virtual is None or engine.virtual.embedded:
        return engine.run_block(number, batch, x_TH, gradient_TH)
    count = engine.virtual.count
    x_TH, gradient_TH = (F.pad(rows_TH, (0, 0, count, 0)) for rows_TH in (x_TH, gradient_TH))
    out_TH, below_TH = engine.run_block(number, batch, x_TH, gradient_TH)
    return out_TH[count:], None if below_TH is None else below_TH[count:]


def _fused_parts(
    engine: EnginePath, name: str, *tensors: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Gradients of queries, keys and values in one projection's B or bias, where that of values hides the others.

    The keys' bias is left out: it shifts all scores of a query alike, if keys are not turned, so its gradient is noise.
    """
    spec, shape = engine.blocks[0].spec, engine.shape
    if not spec.fused or not name.startswith(spec.qkv[0]) or ".lora_A." in name:
        return
    found, wanted = (tensor.view(shape.heads, 3, shape.head_dim, -1).unbind(1) for tensor in tensors)
    for part, *pair in zip(("queries", "keys", "values"), found, wanted, strict=True):
        if part != "keys" or ".lora_B." in name:
            yield part, pair[0], pair[1]


def _mask_difference(engine: EnginePath) -> tuple[float, str]:
    """Of a few rows under dropout from what the mask's definition gives; blocks are compared without dropout."""
    name = "what dropout keeps"
    masked = [group for block in engine.blocks for group in block.groups.values() if group.mask is not None]
    if engine.dropout is None or not masked:
        return 0.0, name
    mask, x_TK = masked[-1].mask, torch.ones(8, masked[-1].ins, dtype=engine.dtype, device=engine.device)
    assert mask is not None
    found_TK, expected_TK = torch.empty_like(x_TK), torch.empty_like(x_TK)
    engine.dropout.draw(1)
    drop(x_TK, mask, found_TK)
    drop_reference(x_TK, mask, expected_TK)
    engine.dropout.off()
    return _difference(found_TK, expected_TK), name


def _taken(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a layer's gradients, which start anew."""
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    for parameter in layer.parameters():
        parameter.grad = None
    return gradients


def _kind(name: str) -> str:
    """Gradients of one kind have one scale: those of A, of B, of biases and the like."""
    return next((kind for kind in (".lora_A.", ".lora_B.") if kind in name), "")


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


def _difference(
    found: torch.Tensor, expected: torch.Tensor, carried: torch.Tensor | None = None, least: float = 0.0
) -> float:
    """||found - expected|| / ||expected||; infinite if anything is not a number.

    Args:
        carried: the residual that both contain. It is not part of what is compared, but it is rounded, so one unit in
            its last place is forgiven.
        least: of what is divided by.
    """
    off = _norm(found.double() - expected.double())
    size = max(_norm(expected), least)
    if carried is not None:
        off = max(0.0, off - torch.finfo(expected.dtype).eps * size) if math.isfinite(off) else off
        size = _norm(expected.double() - carried.double())
    value = off / size if size else float(off > 0)
    return value if math.isfinite(value) else math.inf
