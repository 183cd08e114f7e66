"""The Triton bodies of `dequantize` and `fp8` against the references, on small and odd shapes.

`test_dequantize.py` runs this file in a process that has Triton's interpreter on, and on a GPU without it. By hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_quantized.py -n 0
"""

import os

import pytest
import torch

from fitune.kernels import dequantize as kernels
from fitune.kernels import dequantize_triton, fp8, fp8_triton
from quantized_cases import DTYPES, SHAPES, four_bit_weight, int8_weight, scratch, single_weight, values

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def equal(out, expected):
    """Bit by bit, except that the interpreter rounds to bf16 by cutting off."""
    if out.dtype == torch.bfloat16 and DEVICE == "cpu":
        out, expected = out.float(), expected.float()
        assert (out.abs() <= expected.abs()).all()
        assert ((expected - out).abs() <= 2**-7 * expected.abs()).all()
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 5, 8])
def test_triton_bodies_equal_the_references(shape, dtype, padding):
    codes, scale = int8_weight(*shape, DEVICE)
    (out, whole), (expected, _) = scratch(*shape, dtype, padding, DEVICE), scratch(*shape, dtype, 8, DEVICE)
    dequantize_triton.dequantize_rows(codes, scale, kernels.INT8_STEP, out)
    kernels.dequantize_int8_reference(codes, scale, expected)
    equal(out, expected)
    for packed in (four_bit_weight(*shape, DEVICE), single_weight(*shape, DEVICE)):
        dequantize_triton.dequantize_4bit(*packed, out)
        kernels.dequantize_4bit_reference(*packed, expected)
        equal(out, expected)
    assert whole[:, shape[1] :].isnan().all(), "written outside the view"


def test_the_select_tree_gives_the_same_values(monkeypatch):
    monkeypatch.setattr(dequantize_triton, "_SELECT", True)
    packed = four_bit_weight(5, 192, DEVICE)
    out, expected = scratch(5, 192, torch.float32, 8, DEVICE)[0], scratch(5, 192, torch.float32, 8, DEVICE)[0]
    dequantize_triton.dequantize_4bit(*packed, out)
    kernels.dequantize_4bit_reference(*packed, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word for inf * 0
def test_rows_that_are_not_finite_stay_so(bad):
    x = torch.ones(3, 40, device=DEVICE)
    x[1, 7] = bad
    codes, scale = torch.zeros(3, 40, device=DEVICE), torch.zeros(3, device=DEVICE)
    fp8_triton.quantize_rows(x, codes, scale, None)
    assert scale.isinf().tolist() == [False, True, False]
    assert not (codes * scale[:, None])[1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 50, 700])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("held", [True, False])
def test_triton_scales_as_the_reference(monkeypatch, dtype, columns, scaled, held):
    """Everything but the rounding to 8 bits, which the interpreter gets wrong: the output is fp32 here."""
    if not held:
        monkeypatch.setattr(fp8_triton, "_HELD", 64)
    x = values(5, columns, dtype, DEVICE)
    factors = torch.linspace(0.5, 2, columns, device=DEVICE) if scaled else None
    whole = torch.full((5, columns + 5), torch.nan, device=DEVICE)
    scale, expected_scale = torch.zeros(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    fp8_triton.quantize_rows(x, whole[:, :columns], scale, factors)
    expected = torch.full((5, columns), torch.nan, device=DEVICE)
    fp8.quantize_rows_reference(x, expected, expected_scale, factors)
    ulp = 0.0 if DEVICE == "cpu" else 2.0**-23  # PyTorch's division on a GPU multiplies by a reciprocal
    torch.testing.assert_close(scale, expected_scale, rtol=ulp, atol=0)
    torch.testing.assert_close(whole[:, :columns], expected, rtol=2 * ulp, atol=0)
    assert whole[:, columns:].isnan().all(), "written outside the view"


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (131, 16), (128, 128)])
def test_transposes_bytes(shape):
    rows, columns = shape
    whole = torch.randint(0, 256, (rows, columns + 7), dtype=torch.uint8, device=DEVICE)
    out = torch.full((columns, rows + 9), 77, dtype=torch.uint8, device=DEVICE)
    fp8_triton.transpose_codes(whole[:, :columns], out[:, :rows])
    assert torch.equal(out[:, :rows], whole[:, :columns].T)
    assert (out[:, rows:] == 77).all(), "written outside the view"
