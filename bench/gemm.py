"""What this GPU's matrix units reach: the ceiling that step times are held against."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# rows, inputs, outputs: an 8B MLP with 8,192 and 2,048 tokens, a 1B MLP (gate and up side by side) with 2,048.
SHAPES = ((8192, 4096, 14336), (2048, 4096, 14336), (2048, 2048, 16384))
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "liger-kernel", "unsloth", "trl")


def measure() -> dict[str, Any]:
    """Rates [TFLOP/s] of forward and input-gradient products, and of a device copy [GB/s]; medians."""
    import torch

    products = []
    for rows, inputs, outputs in SHAPES:
        x_TK = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        weight_NK = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        dy_TN = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
        flop = 2 * rows * inputs * outputs
        rates = {
            "bf16": _rate(flop, lambda x=x_TK, w=weight_NK: x @ w.t()),
            "bf16_input_gradient": _rate(flop, lambda dy=dy_TN, w=weight_NK: dy @ w),
        }
        if torch.cuda.get_device_capability() >= (8, 9):
            rates["fp8_rowwise"] = _fp8_rate(flop, x_TK, weight_NK)
        products.append({"rows": rows, "inputs": inputs, "outputs": outputs, **rates})
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "gpu": torch.cuda.get_device_name(),
        "products": products,
        "copy_gb_per_second": round(2 * 2**30 / _milliseconds(lambda: target.copy_(source)) / 1e6),
        "versions": versions(),
    }


def _fp8_rate(flop: int, x_TK: Any, weight_NK: Any) -> float:
    import torch

    x8_TK, weight8_NK = x_TK.to(torch.float8_e4m3fn), weight_NK.to(torch.float8_e4m3fn)
    scale_T1 = torch.ones(x_TK.shape[0], 1, device="cuda")
    scale_1N = torch.ones(1, weight_NK.shape[0], device="cuda")

    def product() -> Any:
        return torch._scaled_mm(
            x8_TK, weight8_NK.t(), scale_a=scale_T1, scale_b=scale_1N, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _rate(flop, product)


def _rate(flop: int, product: Any) -> float:
    return round(flop / _milliseconds(product) / 1e9, 1)


def _milliseconds(call: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def rate_for(gemm: dict[str, Any], tokens: int) -> float:
    """bf16 rate [TFLOP/s] of the product with the most rows not above `tokens` (else with the fewest)."""
    products = gemm["products"]
    fewest = min(p["rows"] for p in products)
    most = max((p["rows"] for p in products if p["rows"] <= tokens), default=fewest)
    return float(max(p["bf16"] for p in products if p["rows"] == most))
