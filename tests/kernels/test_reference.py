"""The plain PyTorch bodies, through the public functions on CPU: against float64, and what buffers are refused."""

import subprocess
import sys

import pytest
import torch

from fitune.kernels.cross_entropy import cross_entropy_, loss_only
from fitune.kernels.norm import Norm, add_norm, norm_backward
from fitune.kernels.rope import HeadNorm, Rotary, qk_norm_rotate, qk_norm_rotate_backward, rotate
from fitune.kernels.sums import add_column_sums
from fitune.kernels.swiglu import Added, gelu_backward, swiglu, swiglu_backward
from kernel_cases import DTYPES, SMALL, Bench, check_not_finite, judge, public


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_near_float64(name, dtype):
    bench = Bench(dtype)
    judge(bench, SMALL[name](bench), public())


@pytest.mark.parametrize("tokens", [4, 17])
def test_other_numbers_of_tokens(tokens):
    for case in SMALL.values():
        bench = Bench(torch.float32, tokens=tokens, before=0, after=0)
        judge(bench, case(bench), public())


def test_not_finite_logits_are_not_hidden():
    check_not_finite(Bench(torch.float32), public(), 100)


def test_a_target_outside_the_vocabulary_is_refused():
    for target in (-1, 7):
        with pytest.raises(RuntimeError, match="out of bounds"):
            loss_only(torch.randn(1, 7), torch.tensor([target]), torch.empty(1))


X, VECTOR = torch.zeros(4, 8), torch.zeros(4)
RMS = Norm(torch.ones(8), None, 1e-5)
AXES = torch.ones(9, 1), torch.zeros(9, 1)
TURN_BOTH = torch.ones(9, 2), torch.zeros(9, 2)
TURN = Rotary(*TURN_BOTH, 4, False)
AT = torch.arange(4)[None]
HEADS = HeadNorm(VECTOR, VECTOR, 0.0)
REFUSED = {
    "column stride 1": lambda: add_norm(torch.zeros(8, 4).T, None, RMS, None, X, VECTOR, None),
    "at most 16384": lambda: add_norm(torch.zeros(1, 16385), None, RMS, None, X, VECTOR, None),
    "pass branch_TH and sum_TH together": lambda: add_norm(X, X, RMS, None, X, VECTOR, None),
    "only sum_TH": lambda: add_norm(X, None, RMS, X, X, VECTOR, None),
    "pass mean_T": lambda: add_norm(X, None, Norm(VECTOR, VECTOR, 0.0), None, X, VECTOR, None),
    r"rstd_T .*at least 4": lambda: norm_backward(X, X, RMS, VECTOR[:3], None, X, None),
    r"y_TH .*\(4, at least 8\)": lambda: norm_backward(X, X, RMS, VECTOR, None, X, X[:, :7]),
    r"gate_up_T2I .*\(4, at least 16\)": lambda: swiglu(X, X),
    "h_TR has 8 columns, B_2IR 7": lambda: swiglu(X, X[:, :4], Added(X, X[:, :7])),
    "1 to 64": lambda: swiglu(X, X[:, :4], Added(torch.zeros(4, 65), torch.zeros(8, 65))),
    r"B_2IR .*\(8, at least 8\)": lambda: swiglu_backward(X[:, :4], X, X, None, Added(X, X)),
    "one dtype": lambda: swiglu(X, X[:, :4], Added(X.half(), torch.zeros(8, 8))),
    r"act_TI .*\(4, at least 4\)": lambda: swiglu_backward(X[:, :4], X, X, X[:3]),
    r"dx_TI .*\(4, at least 8\)": lambda: gelu_backward(X, X, X[:, :2], None),
    "two of the same shape": lambda: rotate(X, Rotary(torch.ones(9, 3), torch.ones(9, 3), 4, False), AT, 2, X),
    r"out_Tn .*\(4, at least 8\)": lambda: rotate(X, TURN, AT, 2, X[:, :4]),
    r"positions_AT .*\(2, at least 4\)": lambda: rotate(X, Rotary(*AXES, 4, False, axes=2), AT, 2, X),
    "2 axes; pass": lambda: rotate(X, Rotary(*TURN_BOTH, 4, False, axes=2), AT.expand(2, 4), 2, X),
    r"x_Tn .*at least 24": lambda: rotate(X, Rotary(*TURN_BOTH, 8, False, fused=True), AT, 2, X),
    "cannot be normed": lambda: qk_norm_rotate(X, HEADS, Rotary(*TURN_BOTH, 4, False, fused=True), AT, X, X),
    "pass whole heads": lambda: qk_norm_rotate_backward((X[:, :6], X, X), X, HEADS, TURN, AT, X),
    "as many of v as of k": lambda: qk_norm_rotate_backward((X, X[:, :4], X), X, HEADS, TURN, AT, X),
    r"x_TN .*at least 9": lambda: add_column_sums(X, 1.0, torch.zeros(9)),
    r"times_TN .*at least 8": lambda: add_column_sums(X, 1.0, torch.zeros(8), X[:, :4]),
    "into_N": lambda: add_column_sums(X, 1.0, torch.zeros(8)[::2]),
    "k_weight_d .*at least 4": lambda: qk_norm_rotate(X, HeadNorm(VECTOR, VECTOR[:2], 0.0), TURN, AT, X, X),
    "qkv_Tn .*at least 24": lambda: qk_norm_rotate(X, HeadNorm(VECTOR, VECTOR, 0.0), TURN, AT, X, X),
    "pass int64": lambda: cross_entropy_(X, AT[0].int(), torch.tensor(1.0), VECTOR),
    "pass as many": lambda: loss_only(X, torch.arange(5), VECTOR),
    r"shape \(\)": lambda: cross_entropy_(X, AT[0], torch.ones(1), VECTOR),
}


@pytest.mark.parametrize("message", REFUSED)
def test_buffers_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_works_without_triton():
    code = "import sys; sys.modules['triton'] = None\n"
    code += "import torch\nfrom fitune.kernels import cross_entropy, norm, rope, sums, swiglu\n"
    code += "x = torch.ones(2, 4)\nswiglu.gelu(x, x)\nprint(x.sum().item() < 8)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
