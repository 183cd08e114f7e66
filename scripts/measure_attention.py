"""Time the attention kernels on this GPU with many tiles, beside PyTorch's own, and check every tile against fp64.

    PYTHONPATH=src python scripts/measure_attention.py [--steps forward dq dkv] [--shapes 1b 8b] [--top 6]

Every tile is compiled and checked on short documents first, several at a time in processes of their own; then each is
timed on the shapes in one CUDA graph of many launches, so that the time is the GPU's alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fitune.kernels.attention import QKV, Documents, Scoring, Workspace, attention, attention_backward
from fitune.kernels.attention_triton import (
    Tile,
    attention_triton,
    keys_backward_triton,
    queries_backward_triton,
    tile_of,
)


class Shape(NamedTuple):
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    alibi: bool = False


def random_lengths(tokens: int, documents: int) -> tuple[int, ...]:
    cuts = sorted(random.Random(0).sample(range(1, tokens), documents - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True))


SHAPES = {
    "1b": Shape((1024,) * 2, 32, 8, 64),
    "1b16": Shape(random_lengths(2048, 16), 32, 8, 64),
    "8b": Shape((2048,) * 4, 32, 8, 128),
    "long": Shape((16384,), 32, 8, 128),
    "glm": Shape((1024,) * 2, 32, 2, 128),
    "alibi": Shape((2048,) * 2, 16, 16, 128, True),
}
# rows, keys, warps, stages. All with descriptors; the first two also without. What spills much or waits for every
# product (four warps with 128 x 128 sums) is left out: the compiler says so without a GPU.
CUTS = {
    ("forward", 64): [
        (128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3), (128, 128, 8, 3),
    ],
    ("forward", 128): [
        (128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 3), (64, 128, 4, 2),
        (128, 32, 4, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2),
    ],
    ("dq", 64): [
        (64, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2), (128, 32, 8, 2), (128, 32, 4, 2),
        (64, 32, 4, 3), (128, 64, 8, 3), (128, 64, 4, 2),
    ],
    ("dq", 128): [
        (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2),
        (128, 64, 8, 3), (64, 128, 4, 2), (128, 128, 8, 2),
    ],
    ("dkv", 64): [
        (64, 64, 4, 2), (64, 128, 8, 2), (64, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 3),
        (32, 128, 4, 2), (128, 64, 4, 2), (32, 128, 8, 3),
    ],
    ("dkv", 128): [
        (32, 64, 4, 2), (64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (32, 128, 8, 3),
        (64, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 3),
    ],
}  # fmt: skip


class Problem:
    """Inputs and outputs of one shape, bf16, as views into rows of q, k and v."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        tokens, n = sum(shape.lengths), (shape.heads + 2 * shape.kv_heads) * shape.width
        ends = torch.tensor(shape.lengths).cumsum(0)
        lengths = torch.tensor(shape.lengths)
        start, end = ((x.repeat_interleave(lengths)).int().cuda() for x in (ends - lengths, ends))
        slopes_h = torch.tensor([2 ** (-8 * (i + 1) / shape.heads) for i in range(shape.heads)]).cuda()
        self.scoring = Scoring(Documents(start, end), shape.width**-0.5, slopes_h if shape.alibi else None)
        self.qkv = QKV.of_rows(torch.randn(tokens, n, device="cuda").bfloat16(), shape.heads, shape.kv_heads)
        self.dqkv = QKV.of_rows(torch.zeros(tokens, n, device="cuda").bfloat16(), shape.heads, shape.kv_heads)
        self.dout = torch.randn_like(self.qkv.q_Thd.contiguous())
        self.out = torch.zeros_like(self.dout)
        self.lse = torch.zeros(shape.heads, tokens, device="cuda")
        self.delta = torch.zeros_like(self.lse)
        # as much as the widest group of query heads can take, so that nothing but the GPU limits how it is shared out
        self.workspace = Workspace(self.delta, torch.empty(2 * self.dout.numel(), device="cuda"))

    def run(self, step: str, tile: Tile | None = None) -> None:
        if step == "forward":
            attention_triton(self.qkv, self.scoring, self.out, self.lse, tile)
        elif step == "dq":
            saved = self.dout, self.out, self.lse
            queries_backward_triton(self.qkv, self.scoring, saved, self.dqkv, self.delta, tile)
        else:
            saved = self.dout, self.lse
            keys_backward_triton(self.qkv, self.scoring, saved, self.dqkv, self.workspace, tile)

    def exact(self) -> dict[str, torch.Tensor]:
        """Everything in fp64, head by head."""
        group = self.qkv.q_Thd.shape[1] // self.qkv.k_Tgd.shape[1]
        q, k, v = (x.double().requires_grad_() for x in (self.qkv.q_Thd, self.qkv.k_Tgd, self.qkv.v_Tgd))
        index = torch.arange(len(q), device="cuda")
        seen = (index <= index[:, None]) & (index >= self.scoring.documents.start_T[:, None])
        outs, lses = [], []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T * self.scoring.scale
            if self.scoring.slopes_h is not None:
                scores = scores + self.scoring.slopes_h[head].double() * (index - index[:, None])
            scores = scores.masked_fill(~seen, float("-inf"))
            outs.append(scores.softmax(-1) @ v[:, head // group])
            lses.append(scores.logsumexp(-1))
        out = torch.stack(outs, 1)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.dout.double())
        return {"out": out.detach(), "lse": torch.stack(lses).detach(), "dq": dq, "dk": dk, "dv": dv}

    def results(self) -> dict[str, torch.Tensor]:
        return {"out": self.out, "lse": self.lse, "dq": self.dqkv.q_Thd, "dk": self.dqkv.k_Tgd, "dv": self.dqkv.v_Tgd}


def check(step: str, shape: Shape, tile: Tile) -> str:
    """Compile one tile, run it on short documents; what is wrong with it, or nothing."""
    problem = Problem(
        shape._replace(lengths=(130, 1, 257, 1, 43, 80), heads=2 * shape.heads // shape.kv_heads, kv_heads=2)
    )
    exact = problem.exact()
    problem.out.copy_(exact["out"])
    problem.lse.copy_(exact["lse"])
    problem.delta.copy_((exact["out"] * problem.dout.double()).sum(-1).T)
    written = {"forward": ("out", "lse"), "dq": ("dq",), "dkv": ("dk", "dv")}[step]
    bits = []
    try:
        for _ in range(20):
            problem.run(step, tile)
            bits.append([x.clone() for name, x in problem.results().items() if name in written])
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  any tile may be too large in any of a compiler's ways
        return repr(error)[:90]
    changing = sum(not all(map(torch.equal, x, bits[0])) for x in bits)
    wrong = [where(name, problem.results()[name], exact[name]) for name in written]
    return "; ".join([*filter(None, wrong), *([f"other bits in {changing} of 20 runs"] if changing else [])])


def where(name: str, got: torch.Tensor, want: torch.Tensor) -> str:
    """How far off and at which rows and heads, or nothing if near."""
    error = ((got - want).abs() / want.abs().max()).nan_to_num(float("inf"))
    if error.max() < 1e-2:
        return ""
    bad_Th = (error.T if name == "lse" else error.amax(2)) >= 1e-2
    rows = bad_Th.any(1).nonzero()[:, 0].tolist()
    return f"{name} off by {float(error.max()):.2g} at {len(rows)} rows {rows[:6]}, heads {bad_Th.any(0).tolist()}"


def milliseconds(run) -> float:
    """GPU time of one call: the fastest of four replays of a graph of as many calls as take about 10 ms."""
    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        run()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    repeats = max(2, min(20, int(10 / begin.elapsed_time(end))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            run()
    times = []
    for _ in range(4):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return min(times)


def flop(shape: Shape, products: int) -> float:
    """Two per multiply-add, over the scores below the diagonal."""
    return products * 2 * shape.width * shape.heads * sum(n * (n + 1) / 2 for n in shape.lengths)


def baselines(shape: Shape) -> dict[str, tuple[float, float]]:
    """Forward and backward milliseconds of PyTorch's kernels; cuDNN's only where documents are equally long."""
    problem, aten = Problem(shape), torch.ops.aten
    longest, scale = max(shape.lengths), problem.scoring.scale
    ends = torch.tensor([0, *shape.lengths]).cumsum(0).int().cuda()
    times = {}
    q, k, v = problem.qkv.q_Thd, problem.qkv.k_Tgd, problem.qkv.v_Tgd

    def flash():
        return aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scale)

    out, lse, seed, offset, _ = flash()

    def flash_backward():
        rest = ends, ends, longest, longest, 0.0, True, seed, offset
        aten._flash_attention_backward(problem.dout, q, k, v, out, lse, *rest, scale=scale)

    if not shape.alibi:
        times["FlashAttention-2 varlen"] = milliseconds(flash), milliseconds(flash_backward)
    if len(set(shape.lengths)) == 1 and not shape.alibi:
        dense = [x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v, problem.dout)]

        dense, grad = [x.requires_grad_() for x in dense[:3]], dense[3]

        def cudnn():
            return scaled_dot_product_attention(*dense, is_causal=True, scale=scale, enable_gqa=True)

        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                forward = milliseconds(cudnn)
                both = milliseconds(lambda: torch.autograd.grad(cudnn(), dense, grad))
            times["cuDNN dense"] = forward, both - forward
        except RuntimeError as error:
            print(f"cuDNN: {str(error)[:90]}")
    return times


def candidates(step: str, shape: Shape) -> list[Tile]:
    problem = Problem(shape._replace(lengths=(16,)))
    tiles = [tile_of(step, problem.qkv, problem.scoring, torch.cuda.get_device_capability())]
    for i, cut in enumerate(CUTS[step, shape.width]):
        tiles += [Tile(*cut, tma=True)] + ([Tile(*cut)] if i < 2 else [])
    return list(dict.fromkeys(tiles))


def short(tile: Tile) -> str:
    return f"{tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}{' tma' * tile.tma}"


def checked(steps: list[str], shapes: dict[str, Shape]) -> dict[tuple[str, int, bool], list[Tile]]:
    """Tiles of each kernel that compile and are right, in the order of `candidates`."""
    kernels = {(s.width, s.alibi, s.heads // s.kv_heads): s for s in shapes.values()}
    jobs = [(step, shape, tile) for step in steps for shape in kernels.values() for tile in candidates(step, shape)]
    good: dict[tuple[str, int, bool], list[Tile]] = {}
    with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
        for (step, shape, tile), wrong in zip(jobs, pool.map(check, *zip(*jobs, strict=True)), strict=True):
            if wrong:
                print(f"{step} {shape.width}{' alibi' * shape.alibi} {short(tile)}: {wrong}")
            else:
                good.setdefault((step, shape.width, shape.alibi), []).append(tile)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=["forward", "dq", "dkv"], choices=["forward", "dq", "dkv"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--top", type=int, default=6, help="tiles to print per kernel")
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for name in options.shapes}
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    good = checked(options.steps, shapes)
    for name, shape in shapes.items():
        report(name, shape, options.steps, good, options.top)


def report(name: str, shape: Shape, steps: list[str], good: dict[tuple[str, int, bool], list[Tile]], top: int) -> None:
    text = f"{len(shape.lengths)} documents, {sum(shape.lengths)} tokens, {shape.heads}/{shape.kv_heads} heads"
    print(f"\n== {name}: {text} of {shape.width}{', alibi' * shape.alibi}")
    for kernel, (forward, backward) in baselines(shape).items():
        rates = flop(shape, 2) / forward / 1e9, flop(shape, 5) / backward / 1e9
        print(
            f"{kernel:24} forward {forward:.4f} ms {rates[0]:4.0f} TFLOP/s   backward {backward:.4f} ms {rates[1]:4.0f}"
        )
    problem = Problem(shape)
    for step in ("forward", "dq", "dkv"):
        problem.run(step)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rest = problem.dout, problem.out, problem.lse, problem.dqkv, problem.workspace
    forward = milliseconds(lambda: attention(problem.qkv, problem.scoring, problem.out, problem.lse))
    backward = milliseconds(lambda: attention_backward(problem.qkv, problem.scoring, *rest))
    rates = flop(shape, 2) / forward / 1e9, flop(shape, 5) / backward / 1e9
    print(f"{'ours, as in the table':24} forward {forward:.4f} ms {rates[0]:4.0f} TFLOP/s   ", end="")
    extra = torch.cuda.max_memory_allocated() - before
    print(f"backward {backward:.4f} ms {rates[1]:4.0f}   temporaries {extra} bytes")
    first = [x.clone() for x in (problem.dqkv.q_Thd, problem.dqkv.k_Tgd, problem.dqkv.v_Tgd)]
    attention_backward(problem.qkv, problem.scoring, *rest)
    again = problem.dqkv.q_Thd, problem.dqkv.k_Tgd, problem.dqkv.v_Tgd
    print("same bits again:", all(torch.equal(x, y) for x, y in zip(first, again, strict=True)))
    for step in steps:
        tiles = good.get((step, shape.width, shape.alibi), [])
        times = sorted((milliseconds(partial(problem.run, step, tile)), tile) for tile in tiles)
        products = {"forward": 2, "dq": 3, "dkv": 4}[step]
        for time, tile in times[:top]:
            print(f"  {step:8} {time:.4f} ms {flop(shape, products) / time / 1e9:4.0f} TFLOP/s  {short(tile)}")


if __name__ == "__main__":
    main()
