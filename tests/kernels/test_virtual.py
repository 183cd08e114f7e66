"""Rows of virtual tokens to the head of every document, and their gradients back."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import virtual_cases as cases
from fitune.kernels.virtual import place_rows, take_rows

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_place_and_take(dtype, shape, layout, device):
    cases.check_place(place_rows, cases.make(shape, layout, dtype, device))
    cases.check_take(take_rows, cases.make(shape, layout, dtype, device))


def test_what_does_not_fit_is_refused():
    table, first, rows, _ = cases.make((3, 2, 8), "fused", torch.float32)
    with pytest.raises(ValueError, match=r"table_Pgd has shape \(3, 1, 8\)"):
        place_rows(table[:, :1].contiguous(), first, rows)
    with pytest.raises(ValueError, match="needed: contiguous"):
        take_rows(rows, first, table[:, :, :4].expand(3, 2, 4))
    with pytest.raises(ValueError, match="needed: stride 1"):
        place_rows(table, first, torch.zeros(50, 8, 2).transpose(1, 2))
    with pytest.raises(ValueError, match="first_D"):
        place_rows(table, first[:, None], rows)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_under_the_interpreter():
    file = Path(__file__).with_name("interpreted_virtual.py")
    command = [sys.executable, "-m", "pytest", str(file), "-n", "0", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    ended = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(".") >= len(cases.LAYOUTS) * len(cases.SHAPES) * len(cases.DTYPES)
