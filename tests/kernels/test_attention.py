"""Attention inside documents: both bodies against a softmax written out in fp64."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attention_cases import LENGTHS, TOLERANCE, Case, assert_near, documents_of, naive
from fitune.errors import ConfigError
from fitune.kernels.attention import Workspace, attention, attention_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["", "alibi", "prefix", "alibi prefix"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_the_reference_is_a_softmax_over_the_own_document(heads, kv_heads, kind, dtype):
    case = Case(LENGTHS, heads, kv_heads, 24, dtype, kind + (" fused" if heads == kv_heads else ""))
    assert_near(case.run(), naive(case.qkv, case.scoring, case.dout_Thd), TOLERANCE[dtype])
    assert case.drows_Tn[:, -8:].isnan().all()


def test_heads_that_are_too_wide_are_refused():
    case = Case([4], 1, 1, 264, torch.float32)
    with pytest.raises(ConfigError, match="264 wide"):
        case.run()


def test_a_dtype_without_kernel_is_refused():
    case = Case([4], 1, 1, 16, torch.float64)
    with pytest.raises(ConfigError, match="float64"):
        case.run()


def test_heads_at_different_distances_are_refused():
    pytest.importorskip("triton")
    from fitune.kernels.attention_triton import _head_stride

    fused, blocks = (Case([4], 2, 2, 16, torch.float32, kind) for kind in ("fused", ""))
    with pytest.raises(ValueError, match=r"\[16, 48\] elements apart"):
        _head_stride(fused.qkv, blocks.dqkv)


def test_the_kernels_under_the_interpreter():
    """In a process of its own: the interpreter must be switched on before anything imports triton."""
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted_attention.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-n", "0", "-p", "no:cacheprovider", "-p", "no:benchmark"],
        cwd=file.parent.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("parts", [4, 16])
def test_adding_up_parts_needs_no_stack(parts, tmp_path):
    """For an H200, without one: what a thread keeps in local memory is taken of the GPU for as long as a run lasts."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fitune.kernels.attention_tiles import sum_parts_kernel as kernel

    (assembler, *_) = Path(triton.__file__).parent.rglob("bin/ptxas")
    constants = {"PARTS": parts, "D": 128, "HEAD": 128, "WIDTH": 128, "ROWS": 16}
    types = {"parts": "*fp32", "dk": "*bf16", "dv": "*bf16", "dk_stride": "i32", "dv_stride": "i32", "T": "i32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    multiples_of_16 = {places[name]: [["tt.divisibility", 16]] for name in types}
    source = ASTSource(kernel, signature, {places[name]: n for name, n in constants.items()}, multiples_of_16)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    (tmp_path / "kernel.ptx").write_text(code)
    command = [str(assembler), "-v", "--gpu-name=sm_90a", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes stack frame" in said
    assert int(re.search(r"Used (\d+) registers", said)[1]) < 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["", "alibi", "prefix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (4, 4)])
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
def test_the_kernels_on_a_gpu(width, heads, kv_heads, dtype, kind):
    kind += " fused" if heads == kv_heads else ""
    case = Case([700, 1, 1, 1025, 3, 330], heads, kv_heads, width, dtype, kind, "cuda")
    assert_near(case.run(), naive(case.qkv, case.scoring, case.dout_Thd), TOLERANCE[dtype])
    assert case.drows_Tn[:, -8:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["", "prefix"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 2, 128), (12, 2, 128), (8, 1, 64), (6, 2, 96)])
def test_several_programs_share_a_key_value_head_on_a_gpu(heads, kv_heads, width, kind):
    case = Case([700, 1, 323], heads, kv_heads, width, torch.bfloat16, kind, "cuda")
    spare = torch.full((heads * 1024 * 2 * width,), float("nan"), device="cuda")
    assert_near(case.run(spare=spare), naive(case.qkv, case.scoring, case.dout_Thd), TOLERANCE[torch.bfloat16])
    assert spare.isfinite().any(), "one program did all of it"
    first = case.drows_Tn.clone()
    case.run(spare=spare)
    assert torch.equal(case.drows_Tn.nan_to_num(9.0), first.nan_to_num(9.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_repeat_their_bits_and_allocate_nothing():
    case = Case([1024, 1024], 32, 8, 64, torch.bfloat16, device="cuda")
    first, workspace = [x.clone() for x in case.run()], Workspace(case.delta_hT)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention(case.qkv, case.scoring, case.out_Thd, case.lse_hT)
    attention_backward(case.qkv, case.scoring, case.dout_Thd, case.out_Thd, case.lse_hT, case.dqkv, workspace)
    assert torch.cuda.max_memory_allocated() == before
    again = case.out_Thd, case.lse_hT, case.dqkv.q_Thd, case.dqkv.k_Tgd, case.dqkv.v_Tgd
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["", "prefix"])
def test_one_graph_serves_other_documents_of_as_many_tokens(kind):
    case = Case([300, 212], 4, 2, 64, torch.bfloat16, kind, "cuda")
    case.run()
    workspace = Workspace(case.delta_hT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(case.qkv, case.scoring, case.out_Thd, case.lse_hT)
        attention_backward(case.qkv, case.scoring, case.dout_Thd, case.out_Thd, case.lse_hT, case.dqkv, workspace)
    other, documents = documents_of([1, 130, 381], "cuda", prefix=True), case.scoring.documents
    documents.start_T.copy_(other.start_T)
    documents.end_T.copy_(other.end_T)
    if documents.until_T is not None:
        documents.until_T.copy_(other.until_T)
    graph.replay()
    got = case.out_Thd, case.lse_hT, case.dqkv.q_Thd, case.dqkv.k_Tgd, case.dqkv.v_Tgd
    assert_near(got, naive(case.qkv, case.scoring, case.dout_Thd), TOLERANCE[torch.bfloat16])
