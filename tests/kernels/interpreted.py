"""Triton bodies under Triton's interpreter; `test_triton.py` runs this file in a process that has it switched on.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py -n 0
"""

import pytest
import torch

from kernel_cases import DTYPES, SMALL, Bench, check_not_finite, judge, triton_bodies

# numpy, which the interpreter computes with, warns of exp(inf - inf) and of rounding past the largest fp16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_like_the_reference(name, dtype):
    bench = Bench(dtype)
    factor = float("inf") if dtype == torch.bfloat16 else 1.5  # the interpreter cuts bf16 off where a GPU rounds
    judge(bench, SMALL[name](bench), triton_bodies(), factor)


@pytest.mark.parametrize("vocabulary", [100, 33003])
def test_not_finite_logits_are_not_hidden(vocabulary):
    check_not_finite(Bench(DTYPES[0]), triton_bodies(), vocabulary)
