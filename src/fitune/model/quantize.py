"""Frozen linear layers whose weights are stored in 8 or 4 bits, as plain tensors.

`quantize_blocks` replaces the linear layers of a model's blocks; PEFT then wraps a `QuantLinear` as it does any
nn.Linear. On the plain path weights are expanded once per forward and once per backward and never kept. The engine
calls `dequantize_into` with its scratch matrix. `use_int8` chooses how int8 layers multiply.

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from fitune.errors import ConfigError
from fitune.kernels.dequantize import dequantize_4bit, dequantize_int8
from fitune.kernels.fp8 import E4M3, dequantize_fp8, is_native, multiply_rows, quantize_rows, transpose_codes
from fitune.kernels.int8 import llm_int8
from fitune.model.quantizers import absmax_table, code_table, quantize_4bit, quantize_fp8, quantize_int8

QUANTIZATIONS = ("int8", "nf4", "fp4", "fp8")
_UNREAD: ContextVar[bool] = ContextVar("unread", default=False)  # see `unread_weights`


class QuantLinear(nn.Linear):
    """A linear layer with a frozen quantized weight; its bias, if any, stays a parameter in full precision.

    Buffers, by `quantization`:
        int8: codes (N, K) int8; scale (N,) fp32.
        fp8: codes (N, K) float8_e4m3fn; scale (N,) fp32.
        nf4, fp4: codes (ceil(N K / 2),) uint8; absmax, nested_absmax and offset as in `quantizers.quantize_4bit`; table
            and absmax_table, the values of the codes, which are not part of the state. Layers from a bitsandbytes file
            without double quantization have absmax (G,) fp32 and None for what is nested.

    int8, nf4 and fp4 store weights only: they are expanded to the dtype of the input and multiplied in it. With fp8 the
    rows of the input, and in the backward those of the incoming gradient, are quantized too, see `kernels.fp8`.

    Attributes:
        compute: `llm_int8` quantizes the rows of the input of an int8 layer too, see `kernels.int8`; its gradient is
            that of the expanded weight.
        threshold: magnitude from which a column of the input is an outlier of LLM.int8().

    Args:
        weight_NK: (N, K) fp32, fp16 or bf16, on any device. Read only; not kept.
        bias: (N,) or None.
        quantization: one of `QUANTIZATIONS`.
        device: where the layer is made; None: where the weight is.
        dtype: what weight and bias are rounded to before, slice by slice; None: the weight's.
    Memory: per weight 1 byte (int8, fp8; 4 more per row) or 0.516 bytes (nf4, fp4).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    table: torch.Tensor
    absmax_table: torch.Tensor | None

    compute = "weight_only"
    threshold = 6.0

    def __init__(
        self,
        weight_NK: torch.Tensor,
        bias: torch.Tensor | None,
        quantization: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        device, dtype = device or weight_NK.device, dtype or weight_NK.dtype
        bias = None if bias is None else bias.detach().to(device, dtype)
        stored = _quantize(weight_NK.detach(), quantization, device, dtype)
        self._fill(stored, weight_NK.shape, bias, quantization, dtype)

    @classmethod
    def stored(
        cls,
        buffers: dict[str, torch.Tensor],
        shape: torch.Size,
        bias: torch.Tensor | None,
        quantization: str,
        dtype: torch.dtype,
    ) -> QuantLinear:
        """A layer of codes that exist already.

        Args:
            buffers: as the class describes them, on one device; tables that are missing are the usual ones.
            shape: (N, K).
            dtype: of `weight`.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill(buffers, shape, bias, quantization, dtype)
        return layer

    def _fill(
        self,
        buffers: dict[str, torch.Tensor],
        shape: torch.Size,
        bias: torch.Tensor | None,
        quantization: str,
        dtype: torch.dtype,
    ) -> None:
        self.out_features, self.in_features = shape
        self.quantization = quantization
        self.dtype = dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        device = buffers["codes"].device
        if quantization in ("nf4", "fp4"):
            tables = {"table": code_table(quantization).to(device)}
            if "nested_absmax" in buffers:
                tables["absmax_table"] = absmax_table().to(device)
            for name in ("nested_absmax", "offset", "absmax_table"):
                self.register_buffer(name, None, persistent="table" not in name)
            buffers = tables | buffers
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent="table" not in name)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a parameter in nn.Linear
        """A new (N, K) tensor in the dtype that was quantized; writing to it changes nothing.

        PEFT reads device and dtype off it; initialisations like PiSSA its values. Within `unread_weights` a stand-in.
        """
        if _UNREAD.get():
            return torch.full((), torch.nan, dtype=self.dtype, device=self.codes.device).expand(
                self.out_features, self.in_features
            )
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a new (N, K) tensor."""
        out_NK = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        self.dequantize_into(out_NK)
        return out_NK

    def dequantize_into(self, out_NK: torch.Tensor) -> None:
        """Write the weight into (N, K) fp32, fp16 or bf16 with unit column stride and any row stride."""
        if self.quantization == "int8":
            dequantize_int8(self.codes, self.scale, out_NK)
        elif self.quantization == "fp8":
            dequantize_fp8(self.codes, self.scale, out_NK)
        else:
            dequantize_4bit(
                self.codes, self.absmax, self.table, self.nested_absmax, self.absmax_table, self.offset, out_NK
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + bias for x (..., K) in any floating dtype; the same dtype and (..., N) out."""
        function = _Fp8 if self.quantization == "fp8" else _LlmInt8 if self.compute == "llm_int8" else _WeightOnly
        return cast(torch.Tensor, function.apply(x, self.bias, self))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        compute = f", compute=llm_int8, threshold={self.threshold:g}" if self.compute == "llm_int8" else ""
        return f"{super().extra_repr()}, quantization={self.quantization}{compute}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """model.to(...) moves codes and scales but never converts them: as bf16 they would mean something else."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


class _WeightOnly(torch.autograd.Function):
    """The product with the expanded weight; saves nothing, the backward expands again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QuantLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        dx = dy @ ctx.layer.dequantize(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, _bias_gradient(ctx, dy), None


class _LlmInt8(torch.autograd.Function):
    """The product of 8-bit rows, outlier columns apart; saves nothing, the backward is that of the expanded weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QuantLinear) -> torch.Tensor:
        ctx.layer = layer
        y_TN = llm_int8(x.reshape(-1, x.shape[-1]), layer.codes, layer.scale, bias, layer.threshold)
        return y_TN.view(*x.shape[:-1], -1)

    backward = _WeightOnly.backward


class _Fp8(torch.autograd.Function):
    """The product of quantized rows; saves nothing, the backward transposes the codes into a temporary."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QuantLinear) -> torch.Tensor:
        ctx.layer = layer
        codes_TK, scale_T = _rows(x, None)
        y_TN = multiply_rows(codes_TK, scale_T, layer.codes, layer.scale, x.dtype, bias)
        return y_TN.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        dx = None
        if ctx.needs_input_grad[0]:
            layer = ctx.layer
            codes_TN, scale_T = _rows(dy, layer.scale)
            codes_KN = torch.empty(layer.in_features, layer.out_features, dtype=E4M3, device=dy.device)
            transpose_codes(layer.codes, codes_KN)
            dx_TK = multiply_rows(codes_TN, scale_T, codes_KN, None, dy.dtype)
            dx = dx_TK.view(*dy.shape[:-1], -1)
        return dx, _bias_gradient(ctx, dy), None


def quantize_blocks(
    model: nn.Module, quantization: str, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Replace the linear layers of a model's blocks by `QuantLinear` on `device`, one after another.

    Embeddings, norms and the output head stay as they are, and where they are.

    Args:
        model: any transformers model, usually on CPU; its blocks stand in lists, so their layers have a number in their
            name.
        dtype: see `QuantLinear`.
    Raises:
        ConfigError: the blocks have no nn.Linear.
    Memory: on `device` the quantized layers and a few slices of `quantizers.SLICE` weights; a full-precision weight is
        freed as soon as it is quantized.
    """
    names = block_linears(model)
    if not names:
        raise ConfigError(
            f"model.quantization is {quantization}, but the blocks of this {type(model).__name__} have no linear "
            "layers of the usual kind (nn.Linear); use model.quantization=none"
        )
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, QuantLinear(linear.weight, linear.bias, quantization, device, dtype))
        del linear  # before the next one is quantized
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or the next codes would lie in memory of these slices, and keep it


@contextmanager
def unread_weights() -> Iterator[None]:
    """Inside, `QuantLinear.weight` has shape, dtype and device as ever, but no memory, and no value is a number.

    PEFT 0.21 asks each layer 21 times for these while it wraps a model. To expand 4 layers of a 1B model so often took
    two CPU cores 14 s in int8 and 31 in nf4.
    """
    before = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(before)


def dequantize_blocks(model: nn.Module) -> None:
    """Replace every `QuantLinear` of a model by an nn.Linear with the weight it stands for, one after another."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.weight, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)


def use_int8(model: nn.Module, compute: str, threshold: float) -> None:
    """Set how the int8 layers of a model multiply: `weight_only`, or `llm_int8` with this threshold."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.quantization == "int8":
            module.compute, module.threshold = compute, threshold


def block_linears(model: nn.Module) -> list[str]:
    """Names of the nn.Linear in a model's blocks: those with a number in their name, the output head excluded."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and re.search(r"\.\d+\.", name)
    ]


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model is a `QuantLinear`."""
    return any(isinstance(module, QuantLinear) for module in model.modules())


def emulation_note(model: nn.Module) -> str | None:
    """One line if some fp8 layer of this model cannot run on fp8 units where it is, in its dtype."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and m.quantization == "fp8"]
    slow = [m for m in layers if not is_native(m.codes.device, m.dtype, m.out_features, m.in_features)]
    if not slow:
        return None
    return (
        f"model.quantization=fp8 is emulated in {len(slow)} of {len(layers)} layers: the same rounding, but slower "
        "than none. fp8 units need a GPU of compute capability 8.9 or later, model.dtype=bf16 and sizes divisible by 16"
    )


def _quantize(
    weight_NK: torch.Tensor, quantization: str, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    if quantization == "int8":
        return quantize_int8(weight_NK, device, dtype)
    if quantization == "fp8":
        return quantize_fp8(weight_NK, device, dtype)
    if quantization in ("nf4", "fp4"):
        return quantize_4bit(weight_NK, quantization, device, dtype)
    raise ConfigError(f"quantization is {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")


def _rows(x: torch.Tensor, column_scale_K: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    x_TK = x.reshape(-1, x.shape[-1]).contiguous()
    codes_TK = torch.empty(x_TK.shape, dtype=E4M3, device=x.device)
    scale_T = torch.empty(x_TK.shape[0], device=x.device)
    quantize_rows(x_TK, codes_TK, scale_T, column_scale_K)
    return codes_TK, scale_T


def _bias_gradient(ctx: Any, dy: torch.Tensor) -> torch.Tensor | None:
    return dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
