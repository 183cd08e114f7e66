"""Weights -> codes and scales, in plain PyTorch: the bytes that bitsandbytes makes on CPU, on any device.

A weight is read in slices, so that besides the result only some tens of megabytes are ever on the device. The way back
is `kernels.dequantize` and `kernels.fp8`. Legend: N outputs, K inputs, G blocks of 64 weights, S blocks of 256 G.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from fitune.kernels.dequantize import BLOCK_SIZE, NESTED_BLOCK_SIZE
from fitune.kernels.fp8 import E4M3, quantize_rows

SLICE = 2**21  # weights per slice: 8 MB in fp32
_TINY = 1e-38  # instead of an absmax of 0
_GRID = 2**16

# Values of the 16 codes. nf4: quantiles of the normal distribution, QLoRA (arXiv:2305.14314), appendix E. fp4: one bit
# of sign, two of exponent, one of mantissa, in units of the largest.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def code_table(quantization: str) -> torch.Tensor:
    """(16,) fp32 values of the codes of nf4 or fp4."""
    if quantization == "nf4":
        return torch.tensor(_NF4)
    magnitudes = torch.tensor(_FP4_TWELFTHS)
    return torch.cat([magnitudes, -magnitudes]) / magnitudes.max()


@cache
def absmax_table() -> torch.Tensor:
    """(256,) fp32 ascending values of the 8-bit codes of absmax, and of Adam's 8-bit states.

    Seven decades, each cut linearly into twice as many steps as the one below; both signs; 0 and 1.
    Source: 8-bit approximations, arXiv:1511.04561. Differs: the decades' lowest steps, as bitsandbytes has them.
    """
    halves = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        halves.append((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6))
    positive = torch.cat(halves)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


def quantize_int8(
    weight_NK: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """round(weight * 127 / absmax of the row).

    Args:
        weight_NK: (N, K) fp32, fp16 or bf16, on any device. Read only.
        device: where the result goes and the work is done.
        dtype: what weights are rounded to before; None: they are not.
    Returns:
        codes (N, K) int8 and scale (N,) fp32, the largest magnitude of each row.
    Memory: the result and two fp32 slices.
    Source: LLM.int8(), arXiv:2208.07339. Differs: no outlier columns.
    """
    codes_NK = torch.empty(weight_NK.shape, dtype=torch.int8, device=device)
    scale_N = torch.empty(weight_NK.shape[0], device=device)
    for rows in _row_slices(weight_NK):
        part = _rounded(weight_NK[rows], device, dtype).float()
        scale_N[rows] = part.abs().amax(dim=1)
        # A row of zeros has no scale; its codes are 0.
        codes_NK[rows] = (part * (127.0 / scale_N[rows, None])).nan_to_num_(0.0).round_().to(torch.int8)
    return {"codes": codes_NK, "scale": scale_N}


def quantize_fp8(
    weight_NK: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Rows of e4m3 codes, see `kernels.fp8.quantize_rows`.

    Returns:
        codes (N, K) float8_e4m3fn and scale (N,) fp32, the largest magnitude of each row / 448.
    Memory: the result and two fp32 slices.
    """
    codes_NK = torch.empty(weight_NK.shape, dtype=E4M3, device=device)
    scale_N = torch.empty(weight_NK.shape[0], device=device)
    for rows in _row_slices(weight_NK):
        quantize_rows(_rounded(weight_NK[rows], device, dtype), codes_NK[rows], scale_N[rows])
    return {"codes": codes_NK, "scale": scale_N}


def quantize_4bit(
    weight_NK: torch.Tensor, quantization: str, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The nearest of 16 values times the absmax of 64 weights; the absmax values are quantized to 8 bits themselves.

    Blocks run over the flattened matrix, from row to row. The layout is that of `kernels.dequantize.dequantize_4bit`.

    Args:
        quantization: "nf4" or "fp4".
    Returns:
        codes (ceil(N K / 2),) uint8; absmax (G,) uint8; nested_absmax (S,) fp32; offset () fp32.
    Memory: the result, 4 bytes per block, and about six fp32 slices.
    Source: QLoRA, arXiv:2305.14314, sec. 3. Differs: no.
    """
    flat = weight_NK.reshape(-1)
    # What stays is made before the slices, or it would lie in memory of theirs, and keep it.
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=device)
    absmax_codes_G = torch.empty(-(-flat.numel() // BLOCK_SIZE), dtype=torch.uint8, device=device)
    absmax_G = torch.empty(absmax_codes_G.shape, device=device)
    table = code_table(quantization)
    order = table.argsort(stable=True)
    ascending = table[order].to(device)
    bounds, order = (ascending[:-1] + ascending[1:]) / 2, order.to(device, torch.uint8)
    for start in range(0, flat.numel(), SLICE):
        part = _rounded(flat[start : start + SLICE], device, dtype).float()
        scaled, absmax = scaled_blocks(part)
        absmax_G[start // BLOCK_SIZE :][: absmax.numel()] = absmax
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        index = order[torch.bucketize(scaled, bounds, out_int32=True)]
        codes[start // 2 :][: index.numel() // 2] = (index[::2] << 4) | index[1::2]
    # On the CPU, whose order of summation does not depend on the GPU: the same bytes wherever the model is loaded.
    offset = absmax_G.cpu().mean().to(device)
    nested_absmax_S = _quantize_absmax(absmax_G - offset, absmax_codes_G)
    return {"codes": codes, "absmax": absmax_codes_G, "nested_absmax": nested_absmax_S, "offset": offset}


def scaled_blocks(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights / absmax of their block, and the absmax values; the last block may be short."""
    whole = part.numel() // BLOCK_SIZE * BLOCK_SIZE
    blocks = part[:whole].view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1).view(-1)
    if whole < part.numel():
        # bitsandbytes divides here, which rounds once less than multiplying by the reciprocal.
        last = part[whole:].abs().amax().clamp(min=_TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, (part[whole:] / last).clamp_(-1, 1)])
    return scaled, absmax


def _quantize_absmax(values_G: torch.Tensor, codes_G: torch.Tensor) -> torch.Tensor:
    """Write 8-bit codes of blocks of 256 values; return the blocks' largest magnitudes."""
    count = values_G.numel()
    blocks = -(-count // NESTED_BLOCK_SIZE)
    padded = torch.nn.functional.pad(values_G, (0, blocks * NESTED_BLOCK_SIZE - count)).view(blocks, -1)
    largest_S = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / largest_S)[:, None]).clamp_(-1, 1)
    index = ((scaled + 1) * 0.5 * (_GRID - 1) + 0.5).nan_to_num_(0.0).int()  # a block of zeros gets code 0
    codes_G.copy_(_nearest_on_grid().to(values_G.device)[index].view(-1)[:count])
    return largest_S


@cache
def _nearest_on_grid() -> torch.Tensor:
    """(65536,) uint8: the nearest absmax code of evenly spaced values from -1 to 1, as bitsandbytes looks it up."""
    table = absmax_table()
    grid = torch.arange(_GRID) * 2.0 / (_GRID - 1) - 1.0
    return torch.searchsorted((table[:-1] + table[1:]) * 0.5, grid).to(torch.uint8)


def _rounded(part: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return part.to(device).to(dtype or part.dtype)


def _row_slices(weight_NK: torch.Tensor) -> Iterator[slice]:
    step = max(1, SLICE // weight_NK.shape[1])
    return (slice(start, start + step) for start in range(0, weight_NK.shape[0], step))
