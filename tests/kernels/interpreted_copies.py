"""Triton bodies of the copies under the interpreter; `test_copies.py` runs this file in a process that has it on."""

import pytest
import torch

import copies_cases as cases
from fitune.kernels import refresh_triton, rows_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_refresh(dtype):
    made = cases.copies(dtype)
    table = [[c.source.data_ptr(), c.to.data_ptr(), *c.to.shape, c.to.stride(0)] for c, _ in made]
    scales = torch.tensor([c.scale for c, _ in made])
    largest = max(c.to.numel() for c, _ in made)
    refresh_triton.refresh(torch.tensor(table), scales, made[0][0].source, made[0][0].to, largest)
    # the interpreter cuts bf16 off where a GPU rounds
    cases.check_copies(made, 2**-7 if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_rows(dtype):
    x, index, out = cases.rows(dtype)
    rows_triton.scatter_rows(x, index, out)
    cases.check_rows(x, index, out)
