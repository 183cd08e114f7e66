"""LLM.int8(): bitsandbytes' results, exact sums, and what outlier columns are for."""

import logging

import pytest
import torch

from fitune.kernels import int8
from fitune.model.quantizers import quantize_int8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 24, 40), (5, 24, 40), (33, 130, 1000), (7, 64, 4096)]  # T, N, K; the last sums past 2^24
CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def case(tokens, outputs, inputs, dtype, outliers=True):
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(tokens, inputs, generator=generator)
    if outliers:
        x[:, 3] *= 20
        x[0, inputs // 2] = -30.0
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    bias = torch.randn(outputs, generator=generator)
    stored = quantize_int8(weight.to(dtype), CPU)
    return x.to(dtype), stored["codes"], stored["scale"], bias.to(dtype), weight.to(dtype)


def theirs(x, codes, scale, bias, threshold):
    pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
    from fitune.model.libraries import import_bitsandbytes

    functions = import_bitsandbytes().autograd._functions
    logging.getLogger(functions.__name__).setLevel(logging.ERROR)  # says that it casts inputs to fp16
    state = functions.MatmulLtState()
    state.CB, state.SCB, state.threshold = codes, scale, threshold
    state.has_fp16_weights = state.is_training = False
    return functions.MatMul8bitLt.apply(x.clone(), codes, None, bias, state)


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_those_of_bitsandbytes(monkeypatch, shape, dtype, threshold):
    x, codes, scale, bias, _ = case(*shape, dtype)
    expected = theirs(x, codes, scale, bias, threshold)
    ours = int8.llm_int8(x, codes, scale, bias, threshold)
    codes_x, scale_x, _ = int8.quantize_rows(x, threshold)
    inner = int8.multiply_codes(codes_x, codes) * (scale_x[:, None] * scale) / 127**2
    # Their digit, 2e-5 of the 8-bit part, and one rounding of that part and of the sum.
    bound = 2e-5 * inner.abs() + torch.finfo(dtype).eps * ((inner + bias).abs() + expected.float().abs())
    assert ((ours.float() - expected.float()).abs() <= bound).all()
    monkeypatch.setattr(int8, "PRODUCT_STEP", 6.200124e-05)
    assert torch.equal(int8.llm_int8(x, codes, scale, bias, threshold), expected)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_codes_are_exact(monkeypatch, shape, units):
    tokens, outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, inputs), generator=generator, dtype=torch.int8) for n in (tokens, outputs))
    a[0], b[0] = 127, 127  # the largest sum there is
    monkeypatch.setattr(int8, "_has_avx512", lambda: units)
    sums = int8.multiply_codes(a, b)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_follow_the_formula(dtype):
    x, *_ = case(6, 8, 50, dtype)
    codes, scale, outliers = int8.quantize_rows(x, 6.0)
    half = x.half().double()
    assert outliers.tolist() == [k for k in range(50) if (half[:, k].abs() >= 6).any()]
    assert {3, 25} <= set(outliers.tolist())
    regular = half.masked_fill(half.abs() >= 6, 0)
    assert torch.equal(scale.double(), regular.abs().amax(1))
    expected = regular * 127 / scale.double()[:, None]
    expected[:, outliers] = 0
    assert (codes.double() - expected).abs().max() <= 0.5 + 1e-4
    assert (codes[:, outliers] == 0).all()


def test_an_outlier_spoils_its_row_unless_it_is_taken_out():
    x, codes, scale, _, weight = case(64, 128, 512, torch.float32)
    exact = x @ weight.T
    errors = {t: ((int8.llm_int8(x, codes, scale, None, t) - exact).norm() / exact.norm()).item() for t in (0.0, 6.0)}
    assert errors[6.0] < 0.012
    assert errors[0.0] > 3 * errors[6.0]


def test_rows_of_zeros_give_the_bias():
    x, codes, scale, bias, _ = case(3, 8, 40, torch.float32)
    x[1] = 0
    assert torch.equal(int8.llm_int8(x, codes, scale, bias, 6.0)[1], bias)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(bad, threshold):
    x, codes, scale, bias, _ = case(3, 8, 40, torch.float32)
    codes[:, 5] = 9
    x[1, 5] = bad
    y = int8.llm_int8(x, codes, scale, bias, threshold)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens", [1, 16, 17, 260])
def test_a_gpu_follows_the_cpu(tokens):
    x, codes, scale, bias, _ = case(tokens, 256, 1024, torch.float16)
    y = int8.llm_int8(*(t.cuda() for t in (x, codes, scale, bias)), 6.0).cpu()
    torch.testing.assert_close(y, int8.llm_int8(x, codes, scale, bias, 6.0), rtol=2e-3, atol=2e-3)
