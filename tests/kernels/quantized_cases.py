"""Codes, scales and buffers for the tests of `dequantize` and `fp8`."""

import torch

from fitune.kernels import fp8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Whole blocks per row; rows that share blocks; odd rows; an odd number of weights; more than one nested block.
SHAPES = [(3, 64), (5, 192), (4, 48), (7, 33), (3, 65), (1, 2), (9, 2112)]


def scratch(rows, columns, dtype, padding=8, device="cpu"):
    """A view of the first columns of a wider matrix full of NaN, and that matrix."""
    whole = torch.full((rows, columns + padding), torch.nan, dtype=dtype, device=device)
    return whole[:, :columns], whole


def int8_weight(rows, columns, device="cpu"):
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, generator=generator) + 0.01
    return codes.to(device), scale.to(device)


def four_bit_weight(rows, columns, device="cpu"):
    generator = torch.Generator().manual_seed(rows * columns)
    blocks = -(-rows * columns // 64)
    tensors = (
        torch.randint(0, 256, (-(-rows * columns // 2),), generator=generator, dtype=torch.uint8),
        torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8),
        torch.rand(16, generator=generator) - 0.5,
        torch.rand(-(-blocks // 256), generator=generator) + 0.1,
        torch.rand(256, generator=generator),
        torch.rand((), generator=generator),
    )
    return tuple(tensor.to(device) for tensor in tensors)


def single_weight(rows, columns, device="cpu"):
    """The same without double quantization."""
    packed, absmax, code, *_ = four_bit_weight(rows, columns)
    return tuple(
        t if t is None else t.to(device) for t in (packed, absmax.float() / 100 + 0.01, code, None, None, None)
    )


def values(rows, columns, dtype, device="cpu"):
    """Rows of very different size, one of zeros, in a wider matrix."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns + 3, generator=generator) * torch.logspace(-4, 3, rows)[:, None]
    x[0] = 0
    return x.to(device, dtype)[:, :columns]


def buffers(rows, columns, device="cpu"):
    codes = torch.full((rows, columns + 5), torch.nan, device=device).to(fp8.E4M3)[:, :columns]
    return codes, torch.full((rows,), torch.nan, device=device)


def bits(codes):
    return codes.contiguous().view(torch.uint8)
