"""Dequantization: the references against float64 formulas, the Triton bodies against the references."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fitune.kernels import dequantize as kernels
from quantized_cases import DTYPES, SHAPES, four_bit_weight, int8_weight, scratch, single_weight

REAL = [(14336, 4096), (4096, 14336), (2048, 8192), (1000, 11008)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def four_bit_float64(packed, absmax, code, nested_absmax, nested_code, offset, shape):
    """Weight by weight, as the docstring says."""
    rows, columns = shape
    index = torch.arange(rows * columns, device=packed.device)
    byte = packed[index // 2].long()
    value = code.double()[torch.where(index % 2 == 0, byte // 16, byte % 16)]
    block = index // 64
    scale = absmax.double()[block]
    if offset is not None:
        scale = nested_code.double()[absmax[block].long()] * nested_absmax.double()[block // 256] + offset.double()
    return (value * scale).view(shape)


def close(out, expected, dtype):
    # One rounding to the dtype, and in fp32 those of three operations.
    epsilon = 2 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.502 * torch.finfo(dtype).eps
    error = (out.double() - expected).abs()
    assert (error <= epsilon * expected.abs() + 1e-7 * expected.abs().max()).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_references_follow_the_formulas(shape, dtype):
    codes, scale = int8_weight(*shape, "cpu")
    out, whole = scratch(*shape, dtype, device="cpu")
    kernels.dequantize_int8(codes, scale, out)
    close(out, codes.double() * scale.double()[:, None] / 127, dtype)
    for packed in (four_bit_weight(*shape, "cpu"), single_weight(*shape, "cpu")):
        kernels.dequantize_4bit(*packed, out)
        close(out, four_bit_float64(*packed, shape), dtype)
    assert whole[:, shape[1] :].isnan().all(), "written outside the view"


def run_bodies(**environment):
    """In a process of its own: the interpreter must be switched on, or not, before anything imports triton."""
    file = Path(__file__).with_name("interpreted_quantized.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-n", "0", "-p", "no:cacheprovider", "-p", "no:benchmark"],
        cwd=file.parent.parent.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.count(".") >= 100, done.stdout
    assert "skipped" not in done.stdout


def test_the_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    run_bodies(TRITON_INTERPRET="1")


@pytest.mark.gpu
@gpu
def test_small_shapes_on_a_gpu():
    run_bodies(TRITON_INTERPRET="0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes_NK": torch.zeros(4, 7, dtype=torch.int8)}, "of the same shape"),
        ({"codes_NK": torch.zeros(4, 8)}, "codes_NK is torch.float32; needed: torch.int8"),
        ({"scale_N": torch.zeros(3)}, "at least 4 adjacent values"),
        ({"out_NK": torch.zeros(8, 4).T}, "not a transpose"),
        ({"out_NK": torch.zeros(4, 8, dtype=torch.float64)}, "fp32, fp16 or bf16"),
    ],
)
def test_int8_buffers_that_do_not_fit(change, message):
    given = {"codes_NK": torch.zeros(4, 8, dtype=torch.int8), "scale_N": torch.zeros(4), "out_NK": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match=message):
        kernels.dequantize_int8(**given | change)


@pytest.mark.parametrize("position", range(5))
def test_4_bit_buffers_that_do_not_fit(position):
    packed = list(four_bit_weight(9, 2112, "cpu"))
    packed[position] = packed[position][:-1]
    with pytest.raises(ValueError, match="needed: at least"):
        kernels.dequantize_4bit(*packed, torch.zeros(9, 2112))
    packed[position] = packed[position].double()
    with pytest.raises(ValueError, match=r"is torch\.float64; needed: torch\."):
        kernels.dequantize_4bit(*packed, torch.zeros(9, 2112))


def test_double_quantization_is_whole_or_not_at_all():
    packed, absmax, code, nested, nested_code, _ = four_bit_weight(9, 2112, "cpu")
    with pytest.raises(ValueError, match="needs nested_code_256 and offset"):
        kernels.dequantize_4bit(packed, absmax, code, nested, nested_code, None, torch.zeros(9, 2112))
    with pytest.raises(ValueError, match=r"absmax_G is torch\.uint8; needed: torch\.float32"):
        kernels.dequantize_4bit(packed, absmax, code, None, None, None, torch.zeros(9, 2112))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_on_a_gpu(shape, dtype):
    codes, scale = int8_weight(*shape, "cuda")
    out, whole = scratch(*shape, dtype, device="cuda")
    kernels.dequantize_int8(codes, scale, out)
    close(out, codes.double() * scale.double()[:, None] / 127, dtype)
    packed = four_bit_weight(*shape, "cuda")
    kernels.dequantize_4bit(*packed, out)
    close(out, four_bit_float64(*packed, shape), dtype)
    expected = scratch(*shape, dtype, device="cuda")[0]
    kernels.dequantize_4bit_reference(*packed, expected)
    assert torch.equal(out, expected)
    assert whole[:, shape[1] :].isnan().all()
