"""Triton bodies under Triton's interpreter; `test_triton.py` runs this file in a process that has it switched on.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py -n 0
"""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from kernel_cases import ADDED, DTYPES, SMALL, Bench, check_not_finite, judge, triton_bodies

# numpy, which the interpreter computes with, warns of exp(inf - inf) and of rounding past the largest fp16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _products_of_bf16(monkeypatch):
    """The interpreter multiplies the bits of bf16 as if they were integers."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def as_fp32(handle):
        if handle.data.dtype != np.uint16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, as_fp32(a), as_fp32(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def check(name, bench):
    """The interpreter cuts bf16 off where a GPU rounds; with a product that is three times in the same direction."""
    factor = float("inf") if bench.dtype == torch.bfloat16 else 1.5
    judge(bench, SMALL[name](bench), triton_bodies(), factor, slack=2.0 if name in ADDED else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_like_the_reference(name, dtype):
    check(name, Bench(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ADDED)
def test_more_rows_than_a_tile_has(name, dtype):
    check(name, Bench(dtype, tokens=70))


@pytest.mark.parametrize("vocabulary", [100, 33003])
def test_not_finite_logits_are_not_hidden(vocabulary):
    check_not_finite(Bench(DTYPES[0]), triton_bodies(), vocabulary)
