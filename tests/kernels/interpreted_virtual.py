"""Triton bodies of `virtual` under the interpreter; `test_virtual.py` runs this file in a process that has it on."""

import pytest

import virtual_cases as cases
from fitune.kernels import virtual_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_place_and_take(dtype, shape, layout):
    cases.check_place(virtual_triton.place_rows, cases.make(shape, layout, dtype))
    cases.check_take(virtual_triton.take_rows, cases.make(shape, layout, dtype))
