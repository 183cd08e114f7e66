"""Cases that any body of a kernel must pass: inputs, one call, float64 truth.

A case makes its inputs once and returns `run` and `truth`. `run(body)` copies the inputs into strided views of
NaN-filled buffers, calls the body and returns what it wrote; `truth` are the same outputs in float64.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fitune.kernels import cross_entropy, norm, rope, sums, swiglu

NAN = float("nan")
EPS = 1e-5
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(BOUND)

Outputs = dict[str, torch.Tensor]
Case = tuple[Callable[[types.SimpleNamespace], Outputs], Outputs]


def reference() -> types.SimpleNamespace:
    """The plain PyTorch bodies under the names of the public functions."""
    found = {}
    for module in (norm, rope, swiglu, sums, cross_entropy):
        for name, function in vars(module).items():
            if name.endswith("_reference"):
                found[name.removesuffix("_reference")] = function
    found["cross_entropy_"] = found.pop("cross_entropy")
    return types.SimpleNamespace(**found)


def triton_bodies() -> types.SimpleNamespace:
    """The Triton bodies; the caller decides whether they run on a GPU or under the interpreter."""
    from fitune.kernels import cross_entropy_triton, norm_triton, rope_triton, sums_triton, swiglu_triton

    names = vars(reference())
    modules = (norm_triton, rope_triton, swiglu_triton, sums_triton, cross_entropy_triton)
    return types.SimpleNamespace(**{name: getattr(m, name) for m in modules for name in names if hasattr(m, name)})


def public() -> types.SimpleNamespace:
    """The public functions, which choose by device; `rotate` takes the direction as the bodies do."""
    found = {name: getattr(m, name) for m in (norm, rope, swiglu, sums, cross_entropy) for name in dir(m)}

    def rotate(x, rotary, positions, heads, out, inverse):
        (rope.rotate_backward if inverse else rope.rotate)(x, rotary, positions, heads, out)

    return types.SimpleNamespace(**(found | {"rotate": rotate}))


@dataclass
class Bench:
    """Makes tensors of one test: dtype, device, tokens, and how views lie in their buffers."""

    dtype: torch.dtype
    tokens: int = 5
    device: str = "cpu"
    before: int = 1  # columns of NaN on both sides of a view
    after: int = 2
    buffers: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def __post_init__(self):
        self.generator = torch.Generator(self.device).manual_seed(self.tokens)

    def random(self, *shape, dtype=None):
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.to(dtype or self.dtype)

    def empty(self, width, dtype=None):
        """A (T, width) view full of NaN."""
        shape = (self.tokens, self.before + width + self.after)
        whole = torch.full(shape, NAN, device=self.device, dtype=dtype or self.dtype)
        self.buffers.append((whole, width))
        return whole[:, self.before : self.before + width]

    def view(self, x):
        out = self.empty(x.shape[1], x.dtype)
        out.copy_(x)
        return out

    def vector(self):
        return torch.full((self.tokens,), NAN, device=self.device)

    def check_margins(self):
        """Nothing beside a view was written."""
        for whole, width in self.buffers:
            assert whole[:, : self.before].isnan().all()
            assert whole[:, self.before + width :].isnan().all()
        self.buffers.clear()


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||; infinite if anything is not finite or was not written."""
    difference = (got.double() - truth).norm() / truth.norm().clamp(min=1e-30)
    return difference.item() if difference.isfinite() else float("inf")


def judge(bench: Bench, case: Case, body: types.SimpleNamespace, factor: float = 1.5, slack: float = 1.0) -> None:
    """Every output of the body is near the truth and, in 2-byte dtypes, within a factor as near as the reference's."""
    run, truth = case
    got, expected = run(body), run(reference())
    bench.check_margins()
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        mine, theirs = error(got[name], value), error(expected[name], value)
        assert mine < BOUND[bench.dtype] * slack, f"{name}: {mine}"
        if bench.dtype != torch.float32:
            assert mine <= factor * theirs + 1e-6, f"{name}: {mine}, reference {theirs}"


def _norm64(x, weight, bias, layer):
    centred = x - x.mean(1, keepdim=True) if layer else x
    y = centred * torch.rsqrt(centred.pow(2).mean(1, keepdim=True) + EPS) * weight
    return y if bias is None else y + bias


def add_norm(bench, width, layer, branch=True, in_place=False, weight_dtype=None) -> Case:
    x, b = bench.random(bench.tokens, width) + 0.5, bench.random(bench.tokens, width)
    frozen = norm.Norm(
        bench.random(width, dtype=weight_dtype), bench.random(width, dtype=weight_dtype) if layer else None, EPS
    )

    def run(body):
        rows, add = bench.view(x), bench.view(b) if branch else None
        total = None if add is None else rows if in_place else bench.empty(width)
        y = add if in_place and branch else bench.empty(width)
        again = bench.empty(width)
        rstd, mean = bench.vector(), bench.vector() if layer else None
        body.add_norm(rows, add, frozen, total, y, rstd, mean)
        body.norm_only(rows if total is None else total, frozen, rstd, mean, again)
        torch.testing.assert_close(y, again, rtol=1e-6, atol=1e-6)
        return {"y": y, "rstd": rstd} | ({} if mean is None else {"mean": mean}) | ({"sum": total} if branch else {})

    # truth starts from the rounded sum, which is an output of its own
    s = (x.float() + b.float()).to(x.dtype).double() if branch else x.double()
    centred = s - s.mean(1, keepdim=True) if layer else s
    bias = None if frozen.bias_H is None else frozen.bias_H.double()
    truth = {"y": _norm64(s, frozen.weight_H.double(), bias, layer)}
    truth["rstd"] = torch.rsqrt(centred.pow(2).mean(1) + EPS)
    if layer:
        truth["mean"] = s.mean(1)
    if branch:
        truth["sum"] = x.double() + b.double()
    return run, truth


def norm_backward(bench, width, layer, in_place=False, want_y=True, carried=None) -> Case:
    x, dy, d = (bench.random(bench.tokens, width) for _ in range(3))
    x = x + 0.5
    frozen = norm.Norm(bench.random(width), bench.random(width) if layer else None, EPS, carried)
    x64 = x.double().requires_grad_()
    y64 = _norm64(x64, frozen.weight_H.double(), None if frozen.bias_H is None else frozen.bias_H.double(), layer)
    # The stream's gradient is d whether it passes beside the norm or through it.
    stream64 = x64 if carried is None else carried * y64
    torch.autograd.backward([y64, stream64], [dy.double(), d.double()])
    mean = x.float().mean(1) if layer else None
    centred = x.float() if mean is None else x.float() - mean[:, None]
    rstd = torch.rsqrt(centred.pow(2).mean(1) + EPS)

    def run(body):
        grad, stream = bench.view(dy), bench.view(d)
        y = None if not want_y else grad if in_place else bench.empty(width)
        body.norm_backward(grad, bench.view(x), frozen, rstd, mean, stream, y)
        return {"d": stream} | ({} if y is None else {"y": y})

    return run, {"d": x64.grad} | ({"y": y64.detach()} if want_y else {})


def adapters(bench, width, rank):
    """Factory of what is added to gate and up, in float64 too; NaN beside and behind. Rank 0: nothing."""
    if not rank:
        return lambda: None, 0
    h, B = bench.random(bench.tokens, rank), 0.2 * bench.random(2 * width, rank)

    def added():
        whole = torch.full((2 * width + 2, rank + bench.after), NAN, dtype=bench.dtype, device=bench.device)
        whole[: 2 * width, :rank] = B
        return swiglu.Added(bench.view(h), whole[: 2 * width, :rank])

    return added, h.double() @ B.double().T


def swiglu_case(bench, width, rank=0) -> Case:
    x = bench.random(bench.tokens, 2 * width)
    added, more = adapters(bench, width, rank)
    total = x.double() + more

    def run(body):
        out = bench.empty(width)
        body.swiglu(bench.view(x), out, added())
        return {"act": out}

    return run, {"act": torch.nn.functional.silu(total[:, :width]) * total[:, width:]}


def swiglu_backward(bench, width, in_place=False, want_act=True, rank=0) -> Case:
    x, d = bench.random(bench.tokens, 2 * width), bench.random(bench.tokens, width)
    added, more = adapters(bench, width, rank)
    x64 = (x.double() + more).requires_grad_()
    act64 = torch.nn.functional.silu(x64[:, :width]) * x64[:, width:]
    act64.backward(d.double())

    def run(body):
        grad, gate_up = bench.view(d), bench.view(x)
        out = gate_up if in_place else bench.empty(2 * width)
        act = None if not want_act else grad if in_place else bench.empty(width)
        body.swiglu_backward(grad, gate_up, out, act, added())
        return {"dgate_up": out} | ({} if act is None else {"act": act})

    return run, {"dgate_up": x64.grad} | ({"act": act64.detach()} if want_act else {})


def gelu_case(bench, width, in_place=False) -> Case:
    """Forward and backward of gelu."""
    x, d = 2 * bench.random(bench.tokens, width), bench.random(bench.tokens, width)
    x64 = x.double().requires_grad_()
    y64 = x64 * 0.5 * (1 + torch.tanh(0.79788456 * x64 * (1 + 0.044715 * x64 * x64)))
    y64.backward(d.double())

    def run(body):
        rows = bench.view(x)
        y = rows if in_place else bench.empty(width)
        body.gelu(rows, y)
        rows, grad = bench.view(x), bench.view(d)
        dx = rows if in_place else bench.empty(width)
        act = grad if in_place else bench.empty(width)
        body.gelu_backward(grad, rows, dx, act)
        return {"y": y, "dx": dx, "act": act}

    return run, {"y": y64.detach(), "dx": x64.grad, "act": y64.detach()}


def sums_case(bench, width, times=False) -> Case:
    x, old, scale = bench.random(bench.tokens, width), bench.random(width, dtype=torch.float32), 0.37
    factor = bench.random(bench.tokens, width) if times else None

    def run(body):
        into = torch.full((width + 2,), NAN, device=bench.device)
        into[1:-1] = old
        body.add_column_sums(bench.view(x), scale, into[1:-1], None if factor is None else bench.view(factor))
        assert into[[0, -1]].isnan().all()
        return {"sums": into[1:-1]}

    products = x.double() if factor is None else x.double() * factor.double()
    return run, {"sums": old.double() + scale * products.sum(0)}


def tables(bench, pairs, positions=64, dtype=torch.float32):
    angle = torch.arange(positions, device=bench.device)[:, None] * torch.logspace(0, -3, pairs, device=bench.device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned64(x, rotary, positions, inverse=False):
    """(T, n) float64 rotated pair by pair, as complex numbers."""
    pairs, d = rotary.cos_PR.shape[1], rotary.head_dim
    x = x.unflatten(1, (-1, d))
    out = x.clone()
    turned = torch.arange(x.shape[1]) % 3 < 2 if rotary.fused else torch.ones(x.shape[1], dtype=torch.bool)
    for axis in range(rotary.axes):
        first = torch.arange(0, 2 * pairs, 2) if rotary.interleaved else torch.arange(pairs)
        first = first + 2 * pairs * axis
        second = first + 1 if rotary.interleaved else first + pairs
        angle = torch.complex(rotary.cos_PR.double(), rotary.sin_PR.double())[positions[axis].long()][:, None]
        z = torch.complex(x[..., first], x[..., second])[:, turned] * (angle.conj() if inverse else angle)
        for part, values in ((first, z.real), (second, z.imag)):
            kept = out[..., part]
            kept[:, turned] = values
            out[..., part] = kept
    return out.flatten(1)


def _positions(bench, dtype=torch.int64, axes=1):
    drawn = torch.randint(0, 64, (axes, bench.tokens), generator=bench.generator, device=bench.device)
    wide = torch.zeros(axes, bench.tokens + 3, dtype=dtype, device=bench.device)
    wide[:, : bench.tokens] = drawn
    return wide[:, : bench.tokens]


def rotate_case(bench, heads, rotary_of, in_place=False, inverse=False) -> Case:
    """`rotary_of`: (pairs, head_dim) and then what else `Rotary` takes; of fused heads a third is not turned."""
    pairs, *rest = rotary_of
    rotary = rope.Rotary(*tables(bench, pairs, dtype=bench.dtype), *rest)
    width = heads * rotary.head_dim
    x, positions = bench.random(bench.tokens, width), _positions(bench, torch.int32, rotary.axes)

    def run(body):
        rows = bench.view(x)
        out = rows if in_place else bench.empty(width)
        body.rotate(rows, rotary, positions, heads * 2 // 3 if rotary.fused else heads, out, inverse)
        if rotary.fused and not in_place:
            values = out.unflatten(1, (-1, 3, rotary.head_dim))[:, :, 2]
            assert values.isnan().all(), "values were written"
            values.copy_(x.unflatten(1, (-1, 3, rotary.head_dim))[:, :, 2])
        return {"out": out}

    return run, {"out": turned64(x.double(), rotary, positions, inverse)}


def _head_norm64(x, weight, head_dim):
    x = x.unflatten(1, (-1, head_dim))
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight).flatten(1)


def qk_norm_case(bench, heads, kv_heads, rotary_of, in_place="") -> Case:
    """Forward and backward of the q and k norms with rotation."""
    pairs, head_dim, *rest = rotary_of
    rotary = rope.Rotary(*tables(bench, pairs), head_dim, *(rest or [False]))
    frozen = rope.HeadNorm(bench.random(head_dim), bench.random(head_dim), EPS)
    q_end, k_end, end = (n * head_dim for n in (heads, heads + kv_heads, heads + 2 * kv_heads))
    x, positions = bench.random(bench.tokens, end), _positions(bench)
    grads = tuple(bench.random(bench.tokens, n * head_dim) for n in (heads, kv_heads, kv_heads))

    def run(body):
        q, k, rows = bench.empty(q_end), bench.empty(k_end - q_end), bench.view(x)
        body.qk_norm_rotate(rows, frozen, rotary, positions, q, k)
        assert torch.equal(rows, x)
        joined = bench.view(torch.cat(grads, 1))
        parts = joined[:, :q_end], joined[:, q_end:k_end], joined[:, k_end:]
        out = {"": bench.empty(end), "x": rows, "gradients": joined}[in_place]
        body.qk_norm_rotate_backward(parts, rows, frozen, rotary, positions, out)
        return {"q": q, "k": k, "dqkv": out}

    x64 = x.double().requires_grad_()
    q64 = turned64(_head_norm64(x64[:, :q_end], frozen.q_weight_d.double(), head_dim), rotary, positions)
    k64 = turned64(_head_norm64(x64[:, q_end:k_end], frozen.k_weight_d.double(), head_dim), rotary, positions)
    torch.autograd.backward([q64, k64, x64[:, k_end:] * 1], [g.double() for g in grads])
    return run, {"q": q64.detach(), "k": k64.detach(), "dqkv": x64.grad}


def cross_entropy_case(bench, vocabulary) -> Case:
    logits = 3 * bench.random(bench.tokens, vocabulary)
    targets = torch.randint(0, vocabulary, (bench.tokens,), generator=bench.generator, device=bench.device)
    targets[1], targets[2], targets[3] = -100, vocabulary - 1, 0
    scale = torch.tensor(0.25, device=bench.device)
    x64 = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(x64, targets, reduction="none")
    losses.sum().backward()

    def run(body):
        rows, loss, only = bench.view(logits), bench.vector(), bench.vector()
        body.loss_only(rows, targets, only)
        assert torch.equal(rows, logits)
        body.cross_entropy_(rows, targets, scale, loss)
        assert torch.equal(loss, only)
        assert loss[1] == 0
        assert (rows[1] == 0).all()
        return {"loss": loss, "gradient": rows}

    return run, {"loss": losses.detach(), "gradient": 0.25 * x64.grad}


def check_not_finite(bench, body, vocabulary):
    """NaN and +inf logits give a loss that is not finite; an ignored row hides them, another row is unharmed."""
    logits = bench.random(bench.tokens, vocabulary)
    targets = torch.zeros(bench.tokens, dtype=torch.int64, device=bench.device)
    logits[0, vocabulary - 1], logits[1, vocabulary // 2], logits[2, 3] = NAN, float("inf"), NAN
    targets[2] = -100
    rows, loss, only = bench.view(logits), bench.vector(), bench.vector()
    body.loss_only(rows, targets, only)
    body.cross_entropy_(rows, targets, torch.tensor(1.0, device=bench.device), loss)
    assert not loss[:2].isfinite().any()
    assert not only[:2].isfinite().any()
    assert loss[2:].isfinite().all()
    assert (rows[2] == 0).all()
    assert rows[3:].isfinite().all()


ADDED: dict[str, Callable[[Bench], Case]] = {
    "swiglu, added": lambda b: swiglu_case(b, 48, rank=16),
    "swiglu, three columns added": lambda b: swiglu_case(b, 97, rank=3),
    "swiglu, 48 columns added": lambda b: swiglu_case(b, 200, rank=48),
    "swiglu backward, added": lambda b: swiglu_backward(b, 48, rank=16),
    "swiglu backward in place, added": lambda b: swiglu_backward(b, 200, in_place=True, rank=32),
    "swiglu backward, no act, added": lambda b: swiglu_backward(b, 97, want_act=False, rank=3),
}
SMALL: dict[str, Callable[[Bench], Case]] = {
    "rms": lambda b: add_norm(b, 96, False),
    "rms, no branch": lambda b: add_norm(b, 24, False, branch=False),
    "rms in place": lambda b: add_norm(b, 48, False, in_place=True),
    "rms, fp32 weight": lambda b: add_norm(b, 48, False, weight_dtype=torch.float32),
    "layer": lambda b: add_norm(b, 96, True),
    "layer, no branch": lambda b: add_norm(b, 24, True, branch=False),
    "layer in place": lambda b: add_norm(b, 48, True, in_place=True),
    "rms backward": lambda b: norm_backward(b, 96, False),
    "rms backward in place": lambda b: norm_backward(b, 48, False, in_place=True),
    "rms backward, no y": lambda b: norm_backward(b, 24, False, want_y=False),
    "layer backward": lambda b: norm_backward(b, 96, True),
    "layer backward in place": lambda b: norm_backward(b, 48, True, in_place=True),
    "rms backward, carried": lambda b: norm_backward(b, 48, False, carried=7.5),
    "layer backward, carried": lambda b: norm_backward(b, 48, True, in_place=True, carried=7.5),
    "swiglu": lambda b: swiglu_case(b, 48),
    "swiglu, two blocks": lambda b: swiglu_case(b, 1100),
    "swiglu backward": lambda b: swiglu_backward(b, 48),
    "swiglu backward in place": lambda b: swiglu_backward(b, 1100, in_place=True),
    "swiglu backward, no act": lambda b: swiglu_backward(b, 24, want_act=False),
    **ADDED,
    "gelu": lambda b: gelu_case(b, 96),
    "gelu in place": lambda b: gelu_case(b, 1100, in_place=True),
    "column sums": lambda b: sums_case(b, 96),
    "column sums, odd": lambda b: sums_case(b, 35),
    "column sums of products": lambda b: sums_case(b, 96, times=True),
    "rotate": lambda b: rotate_case(b, 6, (8, 16, False)),
    "rotate in place": lambda b: rotate_case(b, 3, (12, 24, False), in_place=True),
    "rotate, part of a head": lambda b: rotate_case(b, 3, (4, 20, False)),
    "rotate back": lambda b: rotate_case(b, 3, (8, 16, False), inverse=True),
    "rotate, many heads": lambda b: rotate_case(b, 40, (32, 64, False)),
    "interleaved": lambda b: rotate_case(b, 3, (8, 16, True)),
    "interleaved, part, in place": lambda b: rotate_case(b, 3, (6, 24, True), in_place=True),
    "interleaved, part, back": lambda b: rotate_case(b, 3, (6, 24, True), inverse=True),
    "two axes": lambda b: rotate_case(b, 6, (4, 16, False, 2)),
    "two axes, part, back": lambda b: rotate_case(b, 3, (3, 20, False, 2), inverse=True),
    "two axes, interleaved": lambda b: rotate_case(b, 3, (4, 16, True, 2)),
    "fused": lambda b: rotate_case(b, 9, (8, 16, False, 1, True)),
    "fused, two axes, in place": lambda b: rotate_case(b, 9, (4, 16, False, 2, True), in_place=True),
    "fused, two axes, many heads": lambda b: rotate_case(b, 60, (16, 64, False, 2, True), inverse=True),
    "q k norm": lambda b: qk_norm_case(b, 6, 2, (8, 16)),
    "q k norm in place": lambda b: qk_norm_case(b, 7, 3, (12, 24), in_place="x"),
    "q k norm in place of gradients": lambda b: qk_norm_case(b, 7, 3, (12, 24), in_place="gradients"),
    "q k norm, part": lambda b: qk_norm_case(b, 4, 2, (4, 12), in_place="gradients"),
    "q k norm, interleaved, part": lambda b: qk_norm_case(b, 4, 2, (4, 12, True)),
    "q k norm, many heads": lambda b: qk_norm_case(b, 40, 33, (32, 64), in_place="gradients"),
    "cross entropy": lambda b: cross_entropy_case(b, 100),
    "cross entropy, three blocks": lambda b: cross_entropy_case(b, 33003),
}
