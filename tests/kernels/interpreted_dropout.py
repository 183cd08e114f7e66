"""The Triton bodies of `dropout` against the references, on small and odd shapes.

`test_dropout.py` runs this file in a process that has Triton's interpreter on, and on a GPU without it. By hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_dropout.py -n 0
"""

import os

import pytest
import torch

from fitune.kernels import dropout_triton
from fitune.kernels.dropout import Dropout, Mask, drop_add_reference, drop_reference, keeps

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SHAPES = [(1, 1), (3, 4), (5, 7), (2, 96), (3, 1024), (2, 2500)]
SEEDS = [0, 1, 2**63 - 1, -1, -(2**63), 123456789012345678]


def make(seed, stream=5, probability=0.3):
    dropout = Dropout(probability, DEVICE)
    dropout.draw(seed)
    return Mask(dropout, stream)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_are_equal(shape, seed):
    for stream in (0, 1, 2**31 - 1):
        mask = make(seed, stream)
        out = torch.full(shape, float("nan"), device=DEVICE)
        dropout_triton.drop(torch.ones(shape, device=DEVICE), mask, out)
        assert torch.equal(out != 0, keeps(mask, *shape))
        expected = torch.empty(shape, device=DEVICE)
        drop_reference(torch.ones(shape, device=DEVICE), mask, expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padding", [0, 3, 16])
def test_values_are_those_of_the_references(shape, dtype, padding):
    torch.manual_seed(0)
    rows, width = shape
    wide = torch.randn(2, rows, width + padding).to(DEVICE, dtype)
    x, before = wide[0][:, :width], wide[1][:, :width]
    for mask in (make(7), make(7, probability=0.0)):
        for ours, theirs in (
            (dropout_triton.drop, drop_reference),
            (dropout_triton.drop_add, drop_add_reference),
        ):
            out, expected = wide[1].clone(), before.clone()
            ours(x, mask, out[:, :width])
            theirs(x, mask, expected)
            assert torch.equal(out[:, width:], wide[1][:, width:]), "wrote beside"
            # fused multiply-add rounds once less; the interpreter cuts bf16 off where a GPU rounds
            bound = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 0.5)
            torch.testing.assert_close(out[:, :width], expected, rtol=2 * bound, atol=2 * bound)
    mask = make(7)
    expected = before.clone()
    drop_reference(x, mask, expected)
    dropout_triton.drop(x, mask, x)
    torch.testing.assert_close(x, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
