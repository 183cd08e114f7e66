"""Rows of fp8: codes and scales, their products, the transpose; Triton bodies against the references."""

import pytest
import torch

from fitune.kernels import fp8
from quantized_cases import DTYPES, bits, buffers, values

units = pytest.mark.skipif(
    not torch.cuda.is_available() or not fp8.has_units(torch.device("cuda")), reason="needs a GPU with fp8 units"
)


def test_every_code_comes_back():
    """All 254 finite numbers of the format, of which 448 is the largest, are their own nearest."""
    every = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3)
    numbers = every.float()[every.float().isfinite()][None, :]
    assert numbers.numel() == 254
    assert numbers.max() == fp8.LARGEST
    codes, scale = buffers(1, 254)
    fp8.quantize_rows(numbers, codes, scale)
    assert scale.item() == 1
    assert torch.equal(codes.float(), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_reference_rounds_to_the_nearest_code(dtype, scaled):
    x = values(6, 50, dtype)
    factors = torch.rand(50) + 0.5 if scaled else None
    codes, scale = buffers(6, 50)
    fp8.quantize_rows(x, codes, scale, factors)
    exact = x.double() * (factors.double() if scaled else 1.0)
    assert torch.equal(codes[0].float(), torch.zeros(50))
    torch.testing.assert_close(scale[1:].double(), exact[1:].abs().amax(1) / 448, rtol=1e-6, atol=0)
    every = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).double()
    numbers = every[every.isfinite()]
    nearest = (exact[1:, :, None] / scale[1:, None, None].double() - numbers).abs().amin(-1)
    error = (exact[1:] / scale[1:, None].double() - codes[1:].double()).abs()
    assert (error <= nearest + 1e-3 * error).all()
    back = torch.full((6, 50), torch.nan)
    fp8.dequantize_fp8(codes, scale, back)
    assert (back[1:] - exact[1:]).norm() / exact[1:].norm() < 0.04


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_stay_so(bad):
    x = torch.ones(3, 40)
    x[1, 7] = bad
    codes, scale = buffers(3, 40)
    fp8.quantize_rows(x, codes, scale)
    assert scale.isinf().tolist() == [False, True, False]
    assert not (codes.float() * scale[:, None])[1].isfinite().any()


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-12, 1e30])
def test_rows_of_any_size_keep_finite_scales(factor):
    codes, scale = buffers(2, 30)
    x = torch.rand(2, 30) * factor
    fp8.quantize_rows(x, codes, scale)
    assert scale.isfinite().all()
    assert scale.reciprocal().isfinite().all()
    back = codes.float() * scale[:, None]
    assert (back - x).abs().max() <= max(0.07 * factor, 2.0**-120)


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (131, 16), (128, 128)])
def test_transposes_bytes(shape):
    rows, columns = shape
    whole = torch.randint(0, 256, (rows, columns + 7), dtype=torch.uint8)
    out = torch.full((columns, rows + 9), 77, dtype=torch.uint8)
    fp8.transpose_codes(whole[:, :columns], out[:, :rows])
    assert torch.equal(out[:, :rows], whole[:, :columns].T)
    assert (out[:, rows:] == 77).all(), "written outside the view"


def test_fp8_codes_are_transposed_as_bytes():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)  # NaN and -0 among them
    out = torch.zeros(16, 16, dtype=torch.uint8)
    fp8.transpose_codes(codes.view(fp8.E4M3), out.view(fp8.E4M3))
    assert torch.equal(out, codes.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_codes(dtype, biased):
    (a, a_scale), (b, b_scale) = buffers(5, 48), buffers(7, 48)
    fp8.quantize_rows(values(5, 48, torch.float32) / 50, a, a_scale)
    fp8.quantize_rows(values(7, 48, torch.float32), b, b_scale)
    bias = torch.randn(7).to(dtype) if biased else None
    exact = (a.double() * a_scale.double()[:, None]) @ (b.double() * b_scale.double()[:, None]).T
    exact = exact + bias.double() if biased else exact
    out = fp8.multiply_rows(a.contiguous(), a_scale, b.contiguous(), b_scale, dtype, bias)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < max(torch.finfo(dtype).eps, 1e-6)
    ones = fp8.multiply_rows(a.contiguous(), a_scale, b.contiguous(), None, torch.float32)
    torch.testing.assert_close(ones, (a.float() * a_scale[:, None]) @ b.float().T, rtol=1e-5, atol=1e-4)


def test_what_is_native():
    cpu = torch.device("cpu")
    assert not fp8.has_units(cpu)
    assert not fp8.is_native(cpu, torch.bfloat16, 64, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TK": torch.zeros(4, 7)}, "of one shape"),
        ({"x_TK": torch.zeros(4, 8, dtype=torch.int8)}, "of one shape"),
        ({"out8_TK": torch.zeros(4, 8)}, "float8_e4m3fn"),
        ({"scale_T": torch.zeros(3)}, "at least 4 adjacent values"),
        ({"column_scale_K": torch.zeros(7)}, "at least 8 adjacent values"),
        ({"x_TK": torch.zeros(8, 4).T}, "not a transpose"),
    ],
)
def test_buffers_that_do_not_fit(change, message):
    given = {"x_TK": torch.zeros(4, 8), "out8_TK": torch.zeros(4, 8).to(fp8.E4M3), "scale_T": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        fp8.quantize_rows(**given | change)
    with pytest.raises(ValueError, match="one-byte"):
        fp8.transpose_codes(torch.zeros(4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"needed: \(4, at least 4\)"):
        fp8.transpose_codes(torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.uint8))


@pytest.mark.gpu
@units
@pytest.mark.parametrize("shape", [(2048, 4096), (2048, 14336), (77, 28672)])
@pytest.mark.parametrize("scaled", [False, True])
def test_real_shapes_on_a_gpu(shape, scaled):
    rows, columns = shape
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    factors = torch.rand(columns, device="cuda") + 0.5 if scaled else None
    (codes, scale), (expected, expected_scale) = buffers(*shape, "cuda"), buffers(*shape, "cuda")
    fp8.quantize_rows(x, codes, scale, factors)
    fp8.quantize_rows_reference(x, expected, expected_scale, factors)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)  # division rounds otherwise on a GPU
    assert (bits(codes) != bits(expected)).float().mean() < 1e-3
    exact = x.double() * (factors.double() if scaled else 1.0)
    assert (codes.double() * scale.double()[:, None] - exact).norm() / exact.norm() < 0.04
    back, expected_back = (torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    fp8.dequantize_fp8(codes, scale, back)
    fp8.dequantize_fp8_reference(codes, scale, expected_back)
    assert torch.equal(back, expected_back)
    out = torch.zeros(columns, rows + 16, dtype=torch.uint8, device="cuda").view(fp8.E4M3)[:, :rows]
    fp8.transpose_codes(codes, out)
    assert torch.equal(bits(out), bits(codes).T)


@pytest.mark.gpu
@units
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [1, 77, 2048])
def test_native_products_follow_float64(rows, fast):
    (a, a_scale), (b, b_scale) = buffers(rows, 4096, "cuda"), buffers(1024, 4096, "cuda")
    fp8.quantize_rows(torch.randn(rows, 4096, device="cuda"), a, a_scale)
    fp8.quantize_rows(torch.randn(1024, 4096, device="cuda") * 0.02, b, b_scale)
    a, b = a.contiguous(), b.contiguous()
    assert fp8.is_native(b.device, torch.bfloat16, *b.shape)
    exact = (a.double() * a_scale.double()[:, None]) @ (b.double() * b_scale.double()[:, None]).T
    out = fp8.multiply_rows(a, a_scale, b, b_scale, torch.bfloat16, fast_accumulation=fast)
    assert (out.double() - exact).norm() / exact.norm() < (2e-2 if fast else 5e-3)
