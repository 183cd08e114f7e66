"""Launches of the attention kernels: block sizes by head width and GPU generation.

`scripts/measure_attention.py` times many tiles on the GPU it runs on. The rows (90, 64) and (90, 128) are its best on
an H200; the others were not timed and follow what the compiler says of registers and shared memory (86: 99 KB, 80: 163
KB, 90: 227 KB).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fitune.kernels.attention import QKV, Scoring, Workspace
from fitune.kernels.attention_tiles import dkv_kernel, dq_kernel, forward_kernel, sum_parts_kernel

Pass = Literal["forward", "dq", "dkv"]
SUM_ROWS = 16


class Tile(NamedTuple):
    """How one kernel is cut: rows of queries and keys per block, warps, pipeline stages, and how blocks are fetched.

    `tma` fetches the blocks of the loop with Hopper's copy unit. That needs a head width that is a power of two and
    rows that start on 16 bytes; other inputs are fetched without.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


# (oldest compute capability, largest head width padded to a power of two) -> tile; the first that applies is taken
_TILES: dict[Pass, dict[tuple[int, int], Tile]] = {
    "forward": {
        (90, 64): Tile(64, 64, 4, 3, tma=True),
        (90, 128): Tile(128, 128, 8, 3, tma=True),
        (90, 256): Tile(128, 64, 8, 2, tma=True),
        (86, 64): Tile(128, 64, 4, 2),
        (86, 128): Tile(128, 32, 4, 2),
        (86, 256): Tile(64, 32, 4, 1),
        (80, 64): Tile(128, 64, 4, 3),
        (80, 128): Tile(128, 64, 8, 2),
        (80, 256): Tile(64, 32, 4, 2),
    },
    "dq": {
        (90, 64): Tile(64, 64, 4, 3, tma=True),
        (90, 128): Tile(128, 64, 8, 3, tma=True),
        (90, 256): Tile(64, 32, 4, 2, tma=True),
        (86, 64): Tile(64, 64, 4, 2),
        (86, 128): Tile(64, 32, 4, 2),
        (86, 256): Tile(32, 16, 4, 1),
        (80, 64): Tile(128, 64, 8, 2),
        (80, 128): Tile(64, 64, 4, 2),
        (80, 256): Tile(32, 32, 4, 2),
    },
    "dkv": {
        (90, 64): Tile(64, 64, 4, 3, tma=True),
        (90, 128): Tile(64, 64, 4, 2, tma=True),
        (90, 256): Tile(32, 64, 8, 2, tma=True),
        (86, 64): Tile(32, 64, 4, 2),
        (86, 128): Tile(32, 64, 4, 2),
        (86, 256): Tile(16, 32, 4, 1),
        (80, 64): Tile(32, 128, 4, 2),
        (80, 128): Tile(32, 64, 4, 2),
        (80, 256): Tile(16, 32, 4, 2),
    },
}
# Plain multiply-adds: fp32 has no tensor core that keeps its precision, and Triton uses none before 80
_SCALAR_TILES = {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)}


# With slopes, width 128: the best of those timed on an H200; the others follow what the compiler says
_SLOPES_TILES: dict[tuple[Pass, int, int], Tile] = {
    ("forward", 90, 128): Tile(64, 64, 4, 3, tma=True),
    ("dq", 90, 128): Tile(64, 64, 4, 2, tma=True),
    ("dkv", 90, 64): Tile(32, 64, 4, 2),
    ("dkv", 90, 128): Tile(64, 64, 4, 2, tma=True),
    ("dkv", 90, 256): Tile(16, 32, 4, 2),
}


def tile_of(step: Pass, qkv: QKV, scoring: Scoring, capability: tuple[int, int]) -> Tile:
    """The tile for one kernel on a GPU of that compute capability."""
    width, dtype = qkv.q_Thd.shape[2], qkv.q_Thd.dtype
    generation = capability[0] * 10 + capability[1]
    if dtype == torch.float32 or generation < 80:
        return next(tile for widest, tile in _SCALAR_TILES.items() if width <= widest)
    if generation >= 120:  # consumer GPUs again have 99 KB of shared memory
        generation = 86
    oldest, widest = next(key for key in _TILES[step] if generation >= key[0] and width <= key[1])
    tile = _TILES[step][oldest, widest]
    return tile if scoring.slopes_h is None else _SLOPES_TILES.get((step, oldest, widest), tile)


def attention_triton(
    qkv: QKV, scoring: Scoring, out_Thd: torch.Tensor, lse_hT: torch.Tensor, tile: Tile | None = None
) -> None:
    """`attention` on CUDA in one launch; `tile` is for tests and measurements."""
    tile = tile or _tile_for("forward", qkv, scoring)
    tokens, heads, _ = qkv.q_Thd.shape
    k, v = _loop_inputs([qkv.k_Tgd, qkv.v_Tgd], tile.keys, tile)
    grid = heads, triton.cdiv(tokens, tile.rows)
    forward_kernel[grid](
        qkv.q_Thd, k, v, out_Thd, lse_hT, scoring.documents.start_T, _until(scoring), _slopes(scoring, lse_hT),
        qkv.q_Thd.stride(0), qkv.k_Tgd.stride(0), qkv.v_Tgd.stride(0), out_Thd.stride(0),
        tokens, scoring.scale, _paired(grid, lse_hT.device), **_constants(qkv, qkv, scoring, tile, k),
    )  # fmt: skip


def attention_backward_triton(
    qkv: QKV,
    scoring: Scoring,
    dout_Thd: torch.Tensor,
    out_Thd: torch.Tensor,
    lse_hT: torch.Tensor,
    dqkv: QKV,
    workspace: Workspace,
) -> None:
    """`attention_backward` on CUDA in two launches; three if the work on keys and values is cut into more parts."""
    queries_backward_triton(qkv, scoring, (dout_Thd, out_Thd, lse_hT), dqkv, workspace.delta_hT)
    keys_backward_triton(qkv, scoring, (dout_Thd, lse_hT), dqkv, workspace)


def queries_backward_triton(
    qkv: QKV,
    scoring: Scoring,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dqkv: QKV,
    delta_hT: torch.Tensor,
    tile: Tile | None = None,
) -> None:
    """The first launch of the backward pass: `dqkv.q_Thd` and `delta_hT`; saved is dout_Thd, out_Thd, lse_hT."""
    tile = tile or _tile_for("dq", qkv, scoring)
    dout_Thd, out_Thd, lse_hT = saved
    tokens, heads, _ = qkv.q_Thd.shape
    k, v = _loop_inputs([qkv.k_Tgd, qkv.v_Tgd], tile.keys, tile)
    grid = heads, triton.cdiv(tokens, tile.rows)
    dq_kernel[grid](
        qkv.q_Thd, k, v, out_Thd, dout_Thd, dqkv.q_Thd, lse_hT, delta_hT,
        scoring.documents.start_T, _until(scoring), _slopes(scoring, lse_hT),
        qkv.q_Thd.stride(0), qkv.k_Tgd.stride(0), qkv.v_Tgd.stride(0),
        out_Thd.stride(0), dout_Thd.stride(0), dqkv.q_Thd.stride(0),
        tokens, scoring.scale, _paired(grid, lse_hT.device), **_constants(qkv, dqkv, scoring, tile, k),
    )  # fmt: skip


def keys_backward_triton(
    qkv: QKV,
    scoring: Scoring,
    saved: tuple[torch.Tensor, torch.Tensor],
    dqkv: QKV,
    workspace: Workspace,
    tile: Tile | None = None,
) -> None:
    """The second launch: `dqkv.k_Tgd` and `dqkv.v_Tgd` from the first one's `delta_hT`; saved is dout_Thd, lse_hT."""
    tile = tile or _tile_for("dkv", qkv, scoring)
    dout_Thd, lse_hT = saved
    tokens, kv_heads, width = qkv.k_Tgd.shape
    blocks = triton.cdiv(tokens, tile.keys)
    parts = _parts(qkv, blocks, workspace.spare)
    out = _into_parts(dqkv, parts, workspace.spare) if parts > 1 else dqkv
    q, dout = _loop_inputs([qkv.q_Thd, dout_Thd], tile.rows, tile)
    grid = kv_heads * parts, blocks
    constants = _constants(qkv, dqkv, scoring, tile, q)
    constants |= {
        "GROUP": constants["GROUP"] // parts,
        "PARTS": parts,
        "OUT": width if parts > 1 else constants["HEAD"],
    }
    dkv_kernel[grid](
        q, qkv.k_Tgd, qkv.v_Tgd, dout, out.k_Tgd, out.v_Tgd, lse_hT, workspace.delta_hT,
        scoring.documents.start_T, scoring.documents.end_T, _until(scoring), _slopes(scoring, lse_hT),
        qkv.q_Thd.stride(0), qkv.k_Tgd.stride(0), qkv.v_Tgd.stride(0),
        dout_Thd.stride(0), out.k_Tgd.stride(0), out.v_Tgd.stride(0),
        tokens, scoring.scale, _paired(grid, lse_hT.device), **constants,
    )  # fmt: skip
    if parts > 1:
        sum_parts_kernel[kv_heads, triton.cdiv(tokens, SUM_ROWS)](
            out.k_Tgd, dqkv.k_Tgd, dqkv.v_Tgd, dqkv.k_Tgd.stride(0), dqkv.v_Tgd.stride(0), tokens,
            PARTS=parts, D=width, HEAD=constants["HEAD"], WIDTH=constants["WIDTH"], ROWS=SUM_ROWS, num_warps=4,
        )  # fmt: skip


def _parts(qkv: QKV, blocks: int, spare: torch.Tensor | None) -> int:
    """How many programs share the query heads of a key/value head: as many as can start at once and find room.

    ChatGLM3 has two key/value heads for 32: a row of 2,048 tokens in blocks of 64 keys is 64 programs, on half of the
    processors.
    """
    tokens, kv_heads, width = qkv.k_Tgd.shape
    group = qkv.q_Thd.shape[1] // kv_heads
    room = 0 if spare is None else spare.numel() * spare.element_size()
    most = min(2 * _processors(qkv.q_Thd.device) // (kv_heads * blocks), room // (2 * tokens * kv_heads * width * 4))
    return max((parts for parts in range(1, group + 1) if group % parts == 0 and parts <= most), default=1)


def _into_parts(dqkv: QKV, parts: int, spare: torch.Tensor | None) -> QKV:
    """Places in `spare` for the sums of every program, (T, kv heads * parts, d) fp32 of keys, then of values."""
    assert spare is not None
    tokens, kv_heads, width = dqkv.k_Tgd.shape
    size = 2 * tokens * kv_heads * parts * width
    both = spare.view(torch.uint8)[: size * 4].view(torch.float32).view(2, tokens, kv_heads * parts, width)
    return QKV(dqkv.q_Thd, both[0], both[1])


def _tile_for(step: Pass, qkv: QKV, scoring: Scoring) -> Tile:
    return tile_of(step, qkv, scoring, torch.cuda.get_device_capability(qkv.q_Thd.device))


def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; on CPU, for the interpreter, so few that some grids are paired and others are not."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _slopes(scoring: Scoring, unused: torch.Tensor) -> torch.Tensor:
    return unused if scoring.slopes_h is None else scoring.slopes_h  # a kernel without slopes never reads the pointer


def _until(scoring: Scoring) -> torch.Tensor:
    """Ends of prefixes; a kernel for documents without prefixes never reads the pointer."""
    return scoring.documents.start_T if scoring.documents.until_T is None else scoring.documents.until_T


def _loop_inputs(sources: list[torch.Tensor], rows: int, tile: Tile) -> list[Any]:
    """Descriptors of both if the tile wants them and both can have them, else the tensors."""
    width = sources[0].shape[2]
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in sources)
    if not tile.tma or not aligned or width != triton.next_power_of_2(width):
        return list(sources)
    columns = [(x.shape[1] - 1) * x.stride(1) + width for x in sources]
    return [
        TensorDescriptor(x, [len(x), wide], [x.stride(0), 1], [rows, width])
        for x, wide in zip(sources, columns, strict=True)
    ]


def _head_stride(*every: QKV) -> int:
    """The distance of two heads, which queries, keys, values and their gradients share."""
    tensors = [x for qkv in every for x in (qkv.q_Thd, qkv.k_Tgd, qkv.v_Tgd)]
    found = {x.stride(1) for x in tensors if x.shape[1] > 1} or {tensors[0].shape[2]}
    if len(found) > 1:
        raise ValueError(f"heads of q, k and v are {sorted(found)} elements apart; pass views with one distance")
    return found.pop()


def _paired(grid: tuple[int, int], device: torch.device) -> int:
    """1 where all programs start at once: with most tiles two fit on a processor.

    An argument and no constant: the kernels of the self-check, which are few programs, are then those that train.
    """
    return int(grid[0] * grid[1] <= 2 * _processors(device))


def _constants(qkv: QKV, dqkv: QKV, scoring: Scoring, tile: Tile, source: object) -> dict[str, Any]:
    width = qkv.q_Thd.shape[2]
    return {
        "GROUP": qkv.q_Thd.shape[1] // qkv.k_Tgd.shape[1],
        "D": width,
        "HEAD": _head_stride(qkv, dqkv),
        "WIDTH": max(triton.next_power_of_2(width), 16),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "ALIBI": scoring.slopes_h is not None,
        "PREFIX": scoring.documents.until_T is not None,
        "TMA": isinstance(source, TensorDescriptor),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
