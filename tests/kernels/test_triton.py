"""The Triton bodies: under Triton's interpreter on any machine, and on a GPU at the shapes of real models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_cases import (
    DTYPES,
    SMALL,
    Bench,
    add_norm,
    check_not_finite,
    cross_entropy_case,
    gelu_case,
    judge,
    norm_backward,
    public,
    qk_norm_case,
    rotate_case,
    sums_case,
    swiglu_backward,
    swiglu_case,
)

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

REAL = {
    "rms 2048": lambda b: add_norm(b, 2048, False),
    "rms 4096": lambda b: add_norm(b, 4096, False),
    "rms 16384": lambda b: add_norm(b, 16384, False),
    "rms backward 2048": lambda b: norm_backward(b, 2048, False, in_place=True),
    "rms backward 4096": lambda b: norm_backward(b, 4096, False, in_place=True),
    "layer 4096": lambda b: add_norm(b, 4096, True),
    "layer backward 4096": lambda b: norm_backward(b, 4096, True, in_place=True),
    "swiglu 8192": lambda b: swiglu_case(b, 8192),
    "swiglu backward 8192": lambda b: swiglu_backward(b, 8192, in_place=True),
    "swiglu backward 14336": lambda b: swiglu_backward(b, 14336, in_place=True),
    "swiglu 14336, added": lambda b: swiglu_case(b, 14336, rank=32),
    "swiglu backward 14336, added": lambda b: swiglu_backward(b, 14336, in_place=True, rank=32),
    "swiglu backward 13696, added": lambda b: swiglu_backward(b, 13696, in_place=True, rank=64),
    "gelu 10240": lambda b: gelu_case(b, 10240, in_place=True),
    "layer backward, carried 4096": lambda b: norm_backward(b, 4096, True, in_place=True, carried=7.5),
    "column sums 8192": lambda b: sums_case(b, 8192),
    "column sums 6144": lambda b: sums_case(b, 6144),
    "column sums of products 1024": lambda b: sums_case(b, 1024, times=True),
    "rotate 40 heads of 128": lambda b: rotate_case(b, 40, (64, 128, False), in_place=True),
    "rotate 40 heads of 64": lambda b: rotate_case(b, 40, (32, 64, False), in_place=True),
    "rotate back 40 heads of 128": lambda b: rotate_case(b, 40, (64, 128, False), in_place=True, inverse=True),
    "interleaved, half of 128": lambda b: rotate_case(b, 34, (32, 128, True), in_place=True),
    "fused, two axes, 96 heads of 128": lambda b: rotate_case(b, 96, (32, 128, False, 2, True), in_place=True),
    "q k norm 16 + 8 heads of 128": lambda b: qk_norm_case(b, 16, 8, (64, 128), in_place="gradients"),
    "cross entropy 128256": lambda b: cross_entropy_case(b, 128256),
    "cross entropy 151936": lambda b: cross_entropy_case(b, 151936),
    "cross entropy 50257": lambda b: cross_entropy_case(b, 50257),
}


def test_under_the_interpreter():
    """In a process of its own: the interpreter must be switched on before anything imports triton."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(here / "interpreted.py"),
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
    ]
    done = subprocess.run(
        command, cwd=here.parent.parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.count(".") >= len(SMALL) * len(DTYPES), done.stdout
    assert not re.search(r"skipped|xfailed", done.stdout)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("margin", [3, 16], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_shapes_on_a_gpu(name, dtype, margin):
    bench = Bench(dtype, device="cuda", before=margin, after=margin)
    judge(bench, SMALL[name](bench), public())


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REAL)
def test_real_shapes_on_a_gpu(name, dtype):
    tokens = 260 if name.startswith("cross") else 2048
    bench = Bench(dtype, tokens=tokens, device="cuda", before=16, after=16)
    judge(bench, REAL[name](bench), public())


@pytest.mark.gpu
@no_gpu
def test_not_finite_logits_are_not_hidden_on_a_gpu():
    check_not_finite(Bench(torch.bfloat16, device="cuda", before=16, after=16), public(), 128256)
