"""What 8- and 4-bit formats do to one linear layer, measured: errors of its weight and of its products, outliers, size.

The idea of all of them, on five numbers (absmax quantization): divide by the largest magnitude, multiply by 127, round;
and back.

    >>> import torch
    >>> from fitune.model.quantizers import quantize_int8
    >>> made = quantize_int8(torch.tensor([[0.1, -0.3, 0.25, 0.15, -0.05]]), torch.device("cpu"))
    >>> made["codes"].tolist()
    [[42, -127, 106, 64, -21]]
    >>> [round(value, 3) for value in (made["codes"] * made["scale"] / 127)[0].tolist()]
    [0.099, -0.3, 0.25, 0.151, -0.05]

One outlier makes the grid so coarse that the others are lost; what LLM.int8() does about it is in kernels/int8.py:

    >>> made = quantize_int8(torch.tensor([[0.1, -0.3, 0.25, 0.15, -0.05, 60.0]]), torch.device("cpu"))
    >>> made["codes"].tolist()
    [[0, -1, 1, 0, 0, 127]]

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fitune.kernels.dequantize import BLOCK_SIZE
from fitune.kernels.int8 import quantize_rows
from fitune.model.quantize import QUANTIZATIONS, QuantLinear, use_int8
from fitune.model.quantizers import SLICE, scaled_blocks

BINS = 80  # of the histogram of weights / absmax of their block, from -1 to 1
# How a product is computed: name -> storage of W, computation of int8, whether outliers are taken out.
PRODUCTS = {
    "int8": ("int8", "weight_only"),
    "absmax": ("int8", "llm_int8"),
    "LLM.int8()": ("int8", "llm_int8"),
    "nf4": ("nf4", "weight_only"),
    "fp4": ("fp4", "weight_only"),
    "fp8": ("fp8", "weight_only"),
}


@dataclass
class Rounding:
    """Sums over one layer, or over several: add them with `total`.

    Attributes:
        name: of the layer, or what the layers have in common.
        weights: number of weights.
        tokens: rows of inputs that were seen; 0: products were not measured.
        weight_square, weight_error: ‖W‖² and, by storage, ‖Ŵ - W‖².
        output_square, output_error: ‖x Wᵀ‖² and, by `PRODUCTS`, the squared norm of what rounding changed of it.
        columns, outliers: columns of the inputs, and how many of them hold an outlier.
        histogram: weights / absmax of their block of 64, counted in `BINS`.
        nf4_codes: how often each of the 16 codes of nf4 is used.
        size_bytes: by storage; "16 bit" is what it takes unquantized.
    """

    name: str
    weights: int = 0
    tokens: int = 0
    weight_square: float = 0.0
    output_square: float = 0.0
    columns: int = 0
    outliers: int = 0
    weight_error: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    nf4_codes: list[int] = field(default_factory=lambda: [0] * 16)

    def weight_ratio(self, storage: str) -> float:
        """‖Ŵ - W‖ / ‖W‖."""
        return _ratio(self.weight_error[storage], self.weight_square)

    def output_ratio(self, product: str) -> float | None:
        """‖error of x Wᵀ‖ / ‖x Wᵀ‖; None: not measured."""
        return _ratio(self.output_error[product], self.output_square) if self.tokens else None

    @property
    def outlier_share(self) -> float | None:
        """Share of the squared error of absmax products that goes when outlier columns are taken out."""
        if not self.tokens or not self.output_error["absmax"]:
            return None
        return max(0.0, 1 - self.output_error["LLM.int8()"] / self.output_error["absmax"])

    def to_json(self) -> dict[str, Any]:
        """Ratios, counts and bytes."""
        return {
            "name": self.name,
            "weights": self.weights,
            "size_bytes": self.size_bytes,
            "weight_error": {storage: self.weight_ratio(storage) for storage in self.weight_error},
            "output_error": {product: self.output_ratio(product) for product in self.output_error},
            "columns": self.columns,
            "outlier_columns": self.outliers if self.tokens else None,
            "outlier_share_of_absmax_error": self.outlier_share,
            "nf4_code_shares": [count / max(1, self.weights) for count in self.nf4_codes],
            "histogram": self.histogram,
        }


def total(name: str, parts: Sequence[Rounding]) -> Rounding:
    """The sums of several layers."""
    return Rounding(
        name,
        weights=sum(part.weights for part in parts),
        tokens=min((part.tokens for part in parts), default=0),
        weight_square=sum(part.weight_square for part in parts),
        output_square=sum(part.output_square for part in parts),
        columns=sum(part.columns for part in parts),
        outliers=sum(part.outliers for part in parts),
        weight_error=_sums([part.weight_error for part in parts]),
        output_error=_sums([part.output_error for part in parts]),
        size_bytes=_sums([part.size_bytes for part in parts]),
        histogram=[sum(counts) for counts in zip(*(part.histogram for part in parts), strict=True)],
        nf4_codes=[sum(counts) for counts in zip(*(part.nf4_codes for part in parts), strict=True)],
    )


def _sums(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def measure_layer(name: str, weight_NK: torch.Tensor, x_TK: torch.Tensor | None, threshold: float = 6.0) -> Rounding:
    """Quantize a weight in each format and compare.

    Args:
        weight_NK: (N, K) fp32, fp16 or bf16. Read only.
        x_TK: (T, K) inputs of the layer, or None: products are not measured.
        threshold: magnitude from which a column of x holds an outlier.
    Memory: four fp32 copies of the weight.
    """
    weight_NK = weight_NK.float()
    found = Rounding(name, weights=weight_NK.numel(), weight_square=_square(weight_NK))
    found.size_bytes["16 bit"] = 2 * weight_NK.numel()
    exact_TN = None
    if x_TK is not None:
        x_TK = x_TK.float()
        exact_TN = x_TK @ weight_NK.T
        found.tokens, found.columns = x_TK.shape
        found.output_square = _square(exact_TN)
        found.outliers = len(quantize_rows(x_TK, threshold)[2])
    for storage in QUANTIZATIONS:
        layer = QuantLinear(weight_NK, None, storage)
        found.size_bytes[storage] = sum(b.nbytes for key, b in layer.named_buffers() if "table" not in key)
        found.weight_error[storage] = _square(layer.dequantize(torch.float32).sub_(weight_NK))
        if storage == "nf4":
            halves = torch.stack([layer.codes >> 4, layer.codes & 15]).flatten().int()
            found.nf4_codes = halves.bincount(minlength=16).tolist()
            found.nf4_codes[7] -= halves.numel() - weight_NK.numel()  # the half byte that an odd number leaves is 0
        for product, (wanted, compute) in PRODUCTS.items():
            if wanted == storage and x_TK is not None:
                use_int8(layer, compute, 0.0 if product == "absmax" else threshold)
                found.output_error[product] = _square(layer(x_TK).sub_(exact_TN))
    found.histogram = _histogram(weight_NK)
    return found


def _histogram(weight_NK: torch.Tensor) -> list[int]:
    counts = torch.zeros(BINS)
    flat = weight_NK.reshape(-1)
    for part in torch.split(flat, SLICE // BLOCK_SIZE * BLOCK_SIZE):
        counts += torch.histc(scaled_blocks(part)[0].cpu(), BINS, -1.0, 1.0)
    return [int(count) for count in counts]


def _square(x: torch.Tensor) -> float:
    """‖x‖², summed in float64 slice by slice."""
    return float(sum(part.double().square().sum() for part in torch.split(x.flatten(), SLICE)))


def _ratio(error: float, square: float) -> float:
    return (error / square) ** 0.5 if square else 0.0
