"""What the formats do to a layer, against the formulas in float64; the tutorial's example as a doctest."""

import doctest

import pytest
import torch

from fitune.model import rounding
from fitune.model.quantize import QUANTIZATIONS
from fitune.model.quantizers import code_table
from fitune.model.rounding import BINS, PRODUCTS, measure_layer, total


def test_the_examples_of_the_docstring():
    result = doctest.testmod(rounding)
    assert result.attempted == 7
    assert result.failed == 0


def case(outputs=24, inputs=192, tokens=50):
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    x = torch.randn(tokens, inputs, generator=generator)
    x[:, 5] *= 15
    x[7, 9] = -40.0
    return weight, x


def rounded(matrix, largest=127):
    """Rows to `largest` steps and back, in float64."""
    scale = matrix.abs().amax(1, keepdim=True)
    return (matrix * largest / scale).round() * scale / largest


def square(x):
    return x.square().sum().item()


def test_errors_are_those_of_the_formulas():
    weight, x = case()
    found = measure_layer("layer", weight, x)
    w, x = weight.double(), x.half().double()
    exact = x @ w.T
    outlier = (x.abs() >= 6).any(0)
    regular = x.masked_fill(x.abs() >= 6, 0)
    codes = rounded(regular)
    codes[:, outlier] = 0
    int8 = rounded(w)
    assert found.outliers == int(outlier.sum()) >= 2
    assert found.columns == 192
    assert found.tokens == 50
    assert found.weight_square == pytest.approx(square(w))
    assert found.weight_error["int8"] == pytest.approx(square(int8 - w), rel=1e-3)
    levels = code_table("nf4").double()
    blocks = w.view(-1, 64) / w.view(-1, 64).abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] - levels).abs().argmin(-1)
    nf4 = (levels[nearest] * w.view(-1, 64).abs().amax(1, keepdim=True)).view_as(w)
    assert found.weight_error["nf4"] == pytest.approx(square(nf4 - w), rel=0.05)  # absmax is rounded too
    assert found.nf4_codes == nearest.flatten().bincount(minlength=16).tolist()
    assert found.histogram == torch.histc(blocks.float(), BINS, -1, 1).int().tolist()
    for product, inputs in (("int8", x), ("absmax", rounded(x))):
        assert found.output_error[product] == pytest.approx(square(inputs @ int8.T - exact), rel=0.02), product
    taken_out = codes @ int8.T + x[:, outlier] @ int8[:, outlier].T
    assert found.output_error["LLM.int8()"] == pytest.approx(square(taken_out - exact), rel=0.02)
    assert found.output_ratio("absmax") == pytest.approx(
        (found.output_error["absmax"] / square(exact)) ** 0.5, rel=1e-3
    )
    assert found.outlier_share == pytest.approx(1 - found.output_error["LLM.int8()"] / found.output_error["absmax"])
    assert found.outlier_share > 0.7


def test_sizes_and_counts_of_odd_shapes():
    weight = torch.randn(3, 65, dtype=torch.bfloat16)
    found = measure_layer("odd", weight, None)
    blocks = -(-195 // 64)
    four_bit = 98 + blocks + 4 + 4
    assert found.size_bytes == {"16 bit": 390, "int8": 195 + 12, "nf4": four_bit, "fp4": four_bit, "fp8": 195 + 12}
    assert sum(found.nf4_codes) == sum(found.histogram) == found.weights == 195
    assert min(found.nf4_codes) >= 0
    assert found.output_ratio("nf4") is found.outlier_share is None
    assert found.to_json()["outlier_columns"] is None


def test_without_outliers_nothing_is_taken_out():
    weight, x = case()
    found = measure_layer("layer", weight, x.clamp(-3, 3))
    assert found.outliers == 0
    assert found.outlier_share == 0
    assert found.output_error["absmax"] == found.output_error["LLM.int8()"]
    assert measure_layer("layer", weight, x, threshold=2.0).outliers > 20


def test_zeros_have_no_error():
    found = measure_layer("zeros", torch.zeros(4, 64), torch.zeros(3, 64))
    assert [found.weight_ratio(storage) for storage in QUANTIZATIONS] == [0.0] * 4
    assert [found.output_ratio(product) for product in PRODUCTS] == [0.0] * 6
    assert found.outlier_share is None


def test_sums_of_layers_are_those_of_one_large_layer():
    """Two halves of a weight, one above the other: the same rows, blocks and inputs."""
    weight, x = case(24)
    whole, (top, bottom) = measure_layer("w", weight, x), (measure_layer("w", half, x) for half in weight.split(12))
    both = total("w", [top, bottom])
    assert (both.weights, both.tokens, both.columns, both.outliers) == (24 * 192, 50, 384, 2 * whole.outliers)
    assert both.histogram == whole.histogram
    assert both.nf4_codes == whole.nf4_codes
    for storage in ("int8", "fp8"):
        assert both.weight_ratio(storage) == pytest.approx(whole.weight_ratio(storage), rel=1e-6)
        assert both.size_bytes[storage] == whole.size_bytes[storage]
    for product in ("int8", "absmax", "LLM.int8()", "fp8"):
        assert both.output_ratio(product) == pytest.approx(whole.output_ratio(product), rel=1e-5)
