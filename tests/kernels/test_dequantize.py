"""Dequantization: the references against float64 formulas, the Triton bodies against the references."""

import pytest
import torch

from fitune.kernels import dequantize as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU, Triton bodies run in its interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Whole blocks per row; rows that share blocks; odd rows; an odd number of weights; more than one nested block.
SHAPES = [(3, 64), (5, 192), (4, 48), (7, 33), (3, 65), (1, 2), (9, 2112)]
REAL = [(14336, 4096), (4096, 14336), (2048, 8192), (1000, 11008)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def triton_body():
    pytest.importorskip("triton")
    from fitune.kernels import dequantize_triton

    return dequantize_triton


def scratch(rows, columns, dtype, padding=8, device=DEVICE):
    """A view of the first columns of a wider matrix full of NaN, and that matrix."""
    whole = torch.full((rows, columns + padding), torch.nan, dtype=dtype, device=device)
    return whole[:, :columns], whole


def int8_weight(rows, columns, device=DEVICE):
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, generator=generator) + 0.01
    return codes.to(device), scale.to(device)


def four_bit_weight(rows, columns, device=DEVICE):
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


def four_bit_float64(packed, absmax, code, nested_absmax, nested_code, offset, shape):
    """Weight by weight, as the docstring says."""
    rows, columns = shape
    index = torch.arange(rows * columns, device=packed.device)
    byte = packed[index // 2].long()
    value = code.double()[torch.where(index % 2 == 0, byte // 16, byte % 16)]
    block = index // 64
    scale = nested_code.double()[absmax[block].long()] * nested_absmax.double()[block // 256] + offset.double()
    return (value * scale).view(shape)


def close(out, expected, dtype):
    # One rounding to the dtype, and in fp32 those of three operations.
    epsilon = 2 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.502 * torch.finfo(dtype).eps
    error = (out.double() - expected).abs()
    assert (error <= epsilon * expected.abs() + 1e-7 * expected.abs().max()).all(), error.max()


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
def test_references_follow_the_formulas(shape, dtype):
    codes, scale = int8_weight(*shape, "cpu")
    out, whole = scratch(*shape, dtype, device="cpu")
    kernels.dequantize_int8(codes, scale, out)
    close(out, codes.double() * scale.double()[:, None] / 127, dtype)
    packed = four_bit_weight(*shape, "cpu")
    kernels.dequantize_4bit(*packed, out)
    close(out, four_bit_float64(*packed, shape), dtype)
    assert whole[:, shape[1] :].isnan().all(), "written outside the view"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 5, 8])
def test_triton_bodies_equal_the_references(triton_body, shape, dtype, padding):
    codes, scale = int8_weight(*shape)
    (out, whole), (expected, _) = scratch(*shape, dtype, padding), scratch(*shape, dtype)
    triton_body.dequantize_rows(codes, scale, kernels.INT8_STEP, out)
    kernels.dequantize_int8_reference(codes, scale, expected)
    equal(out, expected)
    packed = four_bit_weight(*shape)
    triton_body.dequantize_4bit(*packed, out)
    kernels.dequantize_4bit_reference(*packed, expected)
    equal(out, expected)
    assert whole[:, shape[1] :].isnan().all(), "written outside the view"


def test_the_select_tree_gives_the_same_values(triton_body, monkeypatch):
    monkeypatch.setattr(triton_body, "_SELECT", True)
    packed = four_bit_weight(5, 192)
    out, expected = scratch(5, 192, torch.float32)[0], scratch(5, 192, torch.float32)[0]
    triton_body.dequantize_4bit(*packed, out)
    kernels.dequantize_4bit_reference(*packed, expected)
    assert torch.equal(out, expected)


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


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_on_a_gpu(shape, dtype):
    codes, scale = int8_weight(*shape)
    out, whole = scratch(*shape, dtype)
    kernels.dequantize_int8(codes, scale, out)
    close(out, codes.double() * scale.double()[:, None] / 127, dtype)
    packed = four_bit_weight(*shape)
    kernels.dequantize_4bit(*packed, out)
    close(out, four_bit_float64(*packed, shape), dtype)
    expected = scratch(*shape, dtype)[0]
    kernels.dequantize_4bit_reference(*packed, expected)
    assert torch.equal(out, expected)
    assert whole[:, shape[1] :].isnan().all()
