"""Adapters into their matrices, rows to their places."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import copies_cases as cases
from fitune.kernels.refresh import Copy, Refresh
from fitune.kernels.rows import scatter_rows

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_refresh(dtype, device):
    made = cases.copies(dtype, device)
    refresh = Refresh([copy for copy, _ in made])
    refresh.run()
    cases.check_copies(made)
    for copy, _ in made:
        copy.source.add_(1)  # the same memory, as after an optimizer step
    refresh.run()
    cases.check_copies(made)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_rows(dtype, device):
    x, index, out = cases.rows(dtype, device)
    scatter_rows(x, index, out)
    cases.check_rows(x, index, out)


@needs_cuda
@pytest.mark.gpu
def test_a_copy_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cannot copy"):
        Refresh([Copy(torch.zeros(3, 4, device="cuda"), torch.zeros(4, 3, device="cuda"), 1.0)])


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="index_M"):
        scatter_rows(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 4))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_under_the_interpreter():
    file = Path(__file__).with_name("interpreted_copies.py")
    command = [sys.executable, "-m", "pytest", str(file), "-n", "0", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    ended = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"6 passed", ended.stdout) or ended.stdout.count(".") >= 6
