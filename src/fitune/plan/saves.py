"""What the engine keeps from the forward to the backward pass of one block: declared here, read by engine and planner.

Widths are in elements per token; the engine allocates exactly these buffers, once, and nothing else outlives a block's
forward pass. No torch in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["none", "elementwise", "attention", "full", "offload"]
LEVELS: tuple[Level, ...] = ("none", "elementwise", "attention", "full", "offload")


def level_of(setting: bool | str) -> Level:
    """`train.activation_checkpointing` as a level: false is `elementwise`, true is `full`."""
    if setting is True:
        return "full"
    if setting is False:
        return "elementwise"
    return next(level for level in LEVELS if level == setting)


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one decoder block.

    Attributes:
        hidden, heads, kv_heads, head_dim, intermediate: as in config.json; intermediate is the MLP's inner width.
        gated: the MLP has a gate beside its up projection (swiglu).
        qk_norm: queries and keys are normed per head.
        layer_norm: norms subtract the mean, which is then kept beside 1 / deviation.
        axes: positions of a token: 2 with two-dimensional rotary positions.
        prefix: documents have a prefix whose tokens see each other both ways.
        fp8: projections multiply rows of fp8 codes. Their adapters then stand apart: nothing stands beside anything.
        lora: adapter columns R of each group of projections, 0 where a group has no adapter. Keys are `GROUPS`.
        dropout: the adapters' inputs are dropped, so they exist beside the inputs themselves.
        virtual: virtual tokens in front of each document.
        scaled: widest output or input that IA3's factors multiply: it is copied, and the factors stay apart.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool = True
    qk_norm: bool = False
    layer_norm: bool = False
    axes: int = 1
    prefix: bool = False
    fp8: bool = False
    lora: tuple[int, int, int, int] = (0, 0, 0, 0)
    dropout: bool = False
    virtual: int = 0
    scaled: int = 0

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
    def beside(self) -> tuple[int, int, int, int]:
        """Adapter columns of each group that stand beside its inputs and outputs."""
        return (0, 0, 0, 0) if self.fp8 else self.lora

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
    """One kept tensor: (T, width) in the model's dtype, or of `size` bytes per element; in host memory if `host`."""

    name: str
    width: int
    size: int = 0
    host: bool = False

    def bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of one token's row."""
        return self.width * (self.size or dtype_bytes)


def block_saves(shape: BlockShape, level: Level) -> tuple[Saved, ...]:
    """The tensors one block keeps until its backward pass, in the order they are made.

    `h_*` are the adapters' rank-R intermediates x Aᵀ of a group: small enough to keep at every level. `a` and `gate_up`
    are as wide as the GEMM that reads or overwrites them: their group's adapter columns stand at the end.
    """
    qkv, o, up, down = shape.beside
    means = (Saved("mean1", 1, size=4), Saved("mean2", 1, size=4)) if shape.layer_norm else ()
    kept = [Saved("x", shape.hidden, host=level == "offload")]
    apart = {group: width for group, width in zip(GROUPS, shape.lora, strict=True) if width}
    kept += [Saved(f"h_{group}", width) for group, width in apart.items() if group != "o" or shape.fp8]
    if level in ("full", "offload"):
        return tuple(kept)
    kept += [
        Saved("rstd1", 1, size=4),
        Saved("qkv", shape.qkv),
        Saved("a", shape.attention + o),
        Saved("lse", shape.heads, size=4),
        Saved("mid", shape.hidden),
        Saved("rstd2", 1, size=4),
        *means,
    ]
    if level != "attention":
        kept += [Saved("gate_up", shape.inner + up)]
    if level == "none":
        kept += [
            Saved("y1", shape.hidden + qkv),
            Saved("y2", shape.hidden + up),
            Saved("act", shape.intermediate + down),
        ]
    return tuple(kept)


def shared_buffers(shape: BlockShape, level: Level) -> tuple[Saved, ...]:
    """The working set all blocks share: what is not kept at this level, and the gradients in flight.

    `scratch` holds, one after another: the activation and its gradient; the gradients of attention's output and of
    queries, keys and values with their group's adapter columns. `dropped` holds a group's input after dropout, or what
    its adapters add to the input gradient; `scaled` what IA3 made of queries, keys and values or of the activation.
    `x0` and `x1` hold inputs on their way to and from the host. `branch` and `d` have one row more than tokens: where
    the head's last chunk puts its padding.
    """
    kept = {saved.name for saved in block_saves(shape, level)}
    qkv, o, up, down = shape.beside
    made = [saved for saved in block_saves(shape, "elementwise") if saved.name not in kept]
    return (
        *made,
        *([Saved("x0", shape.hidden), Saved("x1", shape.hidden)] if level == "offload" else []),
        *([Saved("normed", shape.attention + shape.kv_heads * shape.head_dim)] if shape.qk_norm else []),
        Saved("y", shape.hidden + max(qkv, up)),
        Saved("branch", shape.hidden),
        Saved("scratch", max(shape.intermediate + down, shape.attention + shape.qkv + qkv)),
        Saved("d", shape.hidden + max(o, down)),
        Saved("delta", shape.heads, size=4),
        *([Saved("dropped", max(ins for _, ins, R in shape.groups.values() if R))] if shape.dropout else []),
        *([Saved("scaled", shape.scaled)] if shape.scaled else []),
        *(_fp8_rows(shape) if shape.fp8 else ()),
    )


def _fp8_rows(shape: BlockShape) -> tuple[Saved, ...]:
    widest = max(max(outs, ins) for outs, ins, _ in shape.groups.values())
    adapters = max(16, *shape.lora)
    return Saved("codes", widest, size=1), Saved("scales", 1, size=4), Saved("h", adapters), Saved("t", adapters)


ONE_ROW_MORE = ("branch", "d")


def integers(shape: BlockShape) -> tuple[str, ...]:
    """The integers of each token that travel to the device in each micro-step, as rows of int64, in their order.

    ids of the vocabulary; positions; first token of the document, the one past its last and the one past its prefix.
    index and targets belong to supervised positions: which token, and what comes after it. first belongs to documents
    with virtual tokens: the first of those.
    """
    positions = ("positions", "positions2")[: shape.axes]
    return ("ids", *positions, *documents(shape), "index", "targets", *(["first"] if shape.virtual else []))


def documents(shape: BlockShape) -> tuple[str, ...]:
    """Those of `integers` that attention reads, as int32."""
    return ("start", "end", "until") if shape.prefix else ("start", "end")


def virtual_bytes(shape: BlockShape, layers: int, dtype_bytes: int, prefix: bool) -> int:
    """Bytes of what virtual tokens write over rows of a micro-step, and of its gradient in fp32.

    Args:
        prefix: keys and values of every block; else rows of the first block's input.
    """
    width = layers * 2 * shape.kv_heads * shape.head_dim if prefix else shape.hidden
    return shape.virtual * width * (dtype_bytes + 4)


def most_documents(shape: BlockShape, tokens: int) -> int:
    """Documents that rows with virtual tokens can hold at most: each has a token besides."""
    return tokens // (shape.virtual + 1)


def shared_bytes(shape: BlockShape, level: Level, tokens: int, dtype_bytes: int) -> int:
    """Bytes of the working set for micro-steps of up to `tokens`."""
    return sum(
        (tokens + (saved.name in ONE_ROW_MORE)) * saved.bytes_per_token(dtype_bytes)
        for saved in shared_buffers(shape, level)
    )


def head_rows(vocabulary: int, dtype_bytes: int) -> int:
    """Rows of one head chunk: about 64 MB of logits, at least 128 and at most 4,096 rows."""
    rows = 2**26 // (vocabulary * dtype_bytes)
    return max(128, min(4096, 1 << max(0, rows.bit_length() - 1)))


def padded_vocabulary(vocabulary: int) -> int:
    """Elements from one row of the head's logits to the next."""
    return -(-vocabulary // 64) * 64


def head_bytes(shape: BlockShape, vocabulary: int, dtype_bytes: int) -> int:
    """Bytes of the head's buffers: logits, three (rows, hidden) matrices, the norm's statistics and loss per row."""
    rows = head_rows(vocabulary, dtype_bytes)
    return rows * (
        padded_vocabulary(vocabulary) * dtype_bytes + 3 * shape.hidden * dtype_bytes + (12 if shape.layer_norm else 8)
    )


def check_tokens(vocabulary: int) -> int:
    """Tokens of the self-check: at most 256, and logits of the plain path (14 bytes each) of about 64 MB."""
    return max(32, min(256, 2**26 // (14 * vocabulary)))


def checked_tokens(vocabulary: int, row: int, virtual: int) -> int:
    """How many of a row's tokens the self-check takes: with the virtual ones a multiple of 16, where there are enough.

    Triton compiles kernels again for sizes that are none. Those of micro-steps on a GPU are.
    """
    most = min(check_tokens(vocabulary), row)
    rounded = most - (most + virtual) % 16
    return rounded if rounded >= 16 else most


def bucket(tokens: int, largest: int) -> int:
    """The static size a micro-step of `tokens` runs at on a GPU: eighths of the largest, in steps of 64."""
    step = max(64, -(-largest // (8 * 64)) * 64)
    return min(-(-tokens // step) * step, -(-largest // 64) * 64)


def saved_bytes(shape: BlockShape, level: Level, tokens: int, layers: int, dtype_bytes: int, host: bool = False) -> int:
    """Bytes all blocks keep on the device (or the host) from forward to backward for a micro-step of `tokens`."""
    kept = [saved for saved in block_saves(shape, level) if saved.host == host]
    return layers * tokens * sum(saved.bytes_per_token(dtype_bytes) for saved in kept)
