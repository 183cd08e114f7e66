"""The plain PyTorch bodies against the functions of transformers whose meaning they have."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import bloom_gelu_back, bloom_gelu_forward
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fitune.kernels.cross_entropy import cross_entropy_
from fitune.kernels.norm import Norm, add_norm, norm_backward
from fitune.kernels.rope import HeadNorm, Rotary, qk_norm_rotate, qk_norm_rotate_backward, rotate
from fitune.kernels.swiglu import gelu, gelu_backward, swiglu
from kernel_cases import DTYPES, NAN, Bench

T, H = 5, 48
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def hugging(bench, kind, width):
    module = kind(width, eps=1e-5).to(bench.dtype)
    module.weight.data.copy_(bench.random(width))
    return module


def within_rounding(got, expected):
    """One rounding here against one for each step there: a few units of the last place."""
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(got.dtype).eps, atol=4 * torch.finfo(got.dtype).eps)


@each_dtype
def test_rms_norm_is_llamas_bit_for_bit(dtype):
    bench = Bench(dtype)
    module = hugging(bench, modeling_llama.LlamaRMSNorm, H)
    x, branch, y, total = bench.random(T, H), bench.random(T, H), bench.empty(H), bench.empty(H)
    add_norm(x, branch, Norm(module.weight.data, None, 1e-5), total, y, bench.vector(), None)
    assert torch.equal(total, x + branch)
    assert torch.equal(y, module(x + branch))


def test_rms_norm_gradient_is_llamas():
    bench = Bench(torch.float32)
    module = hugging(bench, modeling_llama.LlamaRMSNorm, H)
    x, dy, d, rstd = bench.random(T, H).requires_grad_(), bench.random(T, H), bench.random(T, H), bench.vector()
    module(x).backward(dy)
    frozen = Norm(module.weight.data, None, 1e-5)
    add_norm(x.data, None, frozen, None, bench.empty(H), rstd, None)
    expected = d + x.grad
    norm_backward(dy, x.data, frozen, rstd, None, d, None)
    torch.testing.assert_close(d, expected, rtol=1e-5, atol=1e-5)


@each_dtype
def test_layer_norm_is_pytorchs(dtype):
    bench = Bench(dtype)
    x, weight, bias, y = bench.random(T, H), bench.random(H), bench.random(H), bench.empty(H)
    add_norm(x, None, Norm(weight, bias, 1e-5), None, y, bench.vector(), bench.vector())
    expected = torch.nn.functional.layer_norm(x.float(), (H,), weight.float(), bias.float(), 1e-5)
    within_rounding(y, expected.to(dtype))


@each_dtype
@pytest.mark.parametrize("family", [modeling_llama, modeling_glm], ids=["llama", "glm"])
def test_rotation_is_transformers(family, dtype):
    """Llama rotates whole heads in halves, GLM half of a head in neighbours."""
    bench, heads, kv_heads, d = Bench(dtype), 3, 2, 16
    interleaved = family is modeling_glm
    pairs = d // 4 if interleaved else d // 2
    angle = torch.arange(40)[:, None] * torch.logspace(0, -3, pairs)
    rotary = Rotary(angle.cos().to(dtype), angle.sin().to(dtype), d, interleaved)
    positions = torch.tensor([3, 0, 39, 7, 7], dtype=torch.int32)
    qkv = bench.random(T, (heads + 2 * kv_heads) * d)
    q, k = (part.unflatten(1, (-1, d)).transpose(0, 1)[None] for part in qkv.split([48, 32, 32], 1)[:2])
    cos, sin = (torch.cat([table[positions]] * 2, 1)[None] for table in (rotary.cos_PR, rotary.sin_PR))
    expected = [x[0].transpose(0, 1).flatten(1) for x in family.apply_rotary_pos_emb(q, k, cos, sin)]
    value = qkv[:, 80:].clone()
    rotate(qkv, rotary, positions[None], heads + kv_heads, qkv)
    within_rounding(qkv[:, :80], torch.cat(expected, 1))
    assert torch.equal(qkv[:, 80:], value)


@each_dtype
def test_q_and_k_norm_are_qwen3s(dtype):
    bench, heads, kv_heads, d = Bench(dtype), 4, 2, 16
    q_norm, k_norm = hugging(bench, Qwen3RMSNorm, d), hugging(bench, Qwen3RMSNorm, d)
    angle = torch.arange(40)[:, None] * torch.logspace(0, -3, d // 2)
    rotary, positions = Rotary(angle.cos(), angle.sin(), d, False), torch.tensor([3, 0, 39, 7, 7])
    qkv = bench.random(T, (heads + 2 * kv_heads) * d).requires_grad_()
    q, k, v = (part.unflatten(1, (-1, d)).transpose(0, 1)[None] for part in qkv.split([64, 32, 32], 1))
    cos, sin = (torch.cat([table[positions]] * 2, 1)[None] for table in (rotary.cos_PR, rotary.sin_PR))
    pair = modeling_llama.apply_rotary_pos_emb(q_norm(q), k_norm(k), cos, sin)
    q_out, k_out, v_out = (x[0].transpose(0, 1).flatten(1) for x in (*pair, v))
    frozen = HeadNorm(q_norm.weight.data, k_norm.weight.data, 1e-5)
    got_q, got_k = bench.empty(64), bench.empty(32)
    qk_norm_rotate(qkv.data, frozen, rotary, positions[None], got_q, got_k)
    within_rounding(got_q, q_out.to(dtype))
    within_rounding(got_k, k_out.to(dtype))
    grads = (bench.random(T, 64), bench.random(T, 32), bench.random(T, 32))
    torch.autograd.backward([q_out, k_out, v_out], [g.to(x) for g, x in zip(grads, (q_out, k_out, v_out), strict=True)])
    out = bench.empty(128)
    qk_norm_rotate_backward(grads, qkv.data, frozen, rotary, positions[None], out)
    assert (out.double() - qkv.grad.double()).norm() < 4 * torch.finfo(dtype).eps * qkv.grad.double().norm()


@each_dtype
def test_swiglu_rounds_as_llamas_mlp(dtype):
    bench = Bench(dtype)
    gate_up, act = bench.random(T, 2 * H), bench.empty(H)
    swiglu(gate_up, act)
    assert torch.equal(act, torch.nn.functional.silu(gate_up[:, :H]) * gate_up[:, H:])


def test_gelu_is_blooms():
    bench = Bench(torch.float32)
    x, d, y, dx = 2 * bench.random(T, H), bench.random(T, H), bench.empty(H), bench.empty(H)
    gelu(x, y)
    torch.testing.assert_close(y, bloom_gelu_forward(x), rtol=1e-5, atol=1e-6)
    gelu_backward(d, x, dx, None)
    torch.testing.assert_close(dx, bloom_gelu_back(d, (x,)), rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_pytorchs():
    bench = Bench(torch.float32)
    logits, targets = bench.random(T, 31).requires_grad_(), torch.tensor([0, -100, 30, 7, -100])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected / 3).backward()
    rows, loss = logits.data.clone(), torch.full((T,), NAN)
    cross_entropy_(rows, targets, torch.tensor(1 / 3), loss)
    torch.testing.assert_close(loss.sum(), expected.detach())
    torch.testing.assert_close(rows, logits.grad)
