"""What the engine keeps from the forward to the backward pass of one block: declared here, read by engine and planner.

Widths are in elements per token; the engine allocates exactly these buffers, once, and nothing else outlives a block's
forward pass. No torch in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["none", "elementwise", "attention", "full"]
LEVELS: tuple[Level, ...] = ("none", "elementwise", "attention", "full")


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one decoder block.

    Attributes:
        hidden, heads, kv_heads, head_dim, intermediate: as in config.json; intermediate is the MLP's inner width.
        gated: the MLP has a gate beside its up projection (swiglu).
        lora: adapter columns R of each group of projections, 0 where a group has no adapter. Keys are `GROUPS`.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool = True
    lora: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def qkv(self) -> int:
        """Width of queries, keys and values side by side."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention(self) -> int:
        """Width of the attention output."""
        return self.heads * self.head_dim

    @property
    def inner(self) -> int:
        """Width of the first MLP projection's output."""
        return self.intermediate * (2 if self.gated else 1)

    @property
    def groups(self) -> dict[str, tuple[int, int, int]]:
        """Projections that read the same input: name -> (outputs, inputs, adapter columns)."""
        sizes = {
            "qkv": (self.qkv, self.hidden),
            "o": (self.hidden, self.attention),
            "up": (self.inner, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        return {name: (*size, self.lora[i]) for i, (name, size) in enumerate(sizes.items())}


GROUPS = ("qkv", "o", "up", "down")


@dataclass(frozen=True)
class Saved:
    """One kept tensor: (T, width) in the model's dtype, or in fp32 (4 bytes) if `fp32`."""

    name: str
    width: int
    fp32: bool = False

    def bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of one token's row."""
        return self.width * (4 if self.fp32 else dtype_bytes)


def block_saves(shape: BlockShape, level: Level) -> tuple[Saved, ...]:
    """The tensors one block keeps until its backward pass, in the order they are made.

    `gate_up` and `qkv` carry the adapter columns of their group, because the backward pass overwrites them with their
    own gradients and the adapter's part of that gradient stands beside them.
    """
    qkv, o, up, down = shape.lora
    if level == "full":
        return (Saved("x", shape.hidden),)
    kept = [
        Saved("x", shape.hidden),
        Saved("rstd1", 1, fp32=True),
        *([Saved("y1", shape.hidden + qkv)] if level == "none" else []),
        Saved("qkv", shape.qkv + qkv),
        Saved("a", shape.attention + o),
        Saved("lse", shape.heads, fp32=True),
        Saved("mid", shape.hidden),
        Saved("rstd2", 1, fp32=True),
    ]
    if level != "attention":
        kept += [Saved("y2", shape.hidden + up)] if level == "none" else []
        kept += [Saved("gate_up", shape.inner + up)]
        kept += [Saved("act", shape.intermediate + down)] if level == "none" else []
    return tuple(kept)


def saved_bytes(shape: BlockShape, level: Level, tokens: int, layers: int, dtype_bytes: int) -> int:
    """Bytes all blocks keep between their forward and backward passes for a micro-step of `tokens`."""
    return layers * tokens * sum(saved.bytes_per_token(dtype_bytes) for saved in block_saves(shape, level))
