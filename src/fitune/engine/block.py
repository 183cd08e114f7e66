"""The one decoder block: an explicit forward and backward pass over declared buffers.

There is no autograd here. `forward` leaves in the block's buffers what plan/saves.py declares; `backward` recomputes
what the level did not keep, adds the adapters' gradients and turns the gradient of the block's output into that of its
input.

Names of buffers (T tokens): x block input, y1 and y2 norm outputs, qkv, a attention output, mid residual after
attention, gate_up, act, branch the last projection's output, d gradient of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fitune.engine.groups import Group
from fitune.engine.products import Scratch
from fitune.engine.spec import BlockSpec
from fitune.kernels.attention import QKV, Documents, Scoring, attention, attention_backward
from fitune.kernels.dropout import Dropout, Mask
from fitune.kernels.norm import Norm, add_norm, norm_backward, norm_only
from fitune.kernels.rope import HeadNorm, Rotary, pack_gradients, qk_norm_rotate, qk_norm_rotate_backward, rotate
from fitune.kernels.swiglu import swiglu, swiglu_backward
from fitune.plan.saves import GROUPS, BlockShape, Level

Views = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a micro-step stand.

    Attributes:
        positions_T: within their document.
        documents: where each token's document starts and ends.
        rotary: cos and sin tables.
    """

    positions_T: torch.Tensor
    documents: Documents
    rotary: Rotary


class Block:
    """One decoder block over a transformers layer's own weights.

    Args:
        layer: the decoder layer; its weights become views of the groups' matrices.
        scratch: where quantized groups are expanded.
    """

    def __init__(self, layer: nn.Module, spec: BlockSpec, level: Level, dtype: torch.dtype, scratch: Scratch) -> None:
        self.level = level
        self.groups = {
            name: Group([layer.get_submodule(path) for path in paths], dtype, scratch)
            for name, paths in spec.names().items()
        }
        self.norm1, self.norm2 = _norm(layer, spec.norm1), _norm(layer, spec.norm2)
        self.head_norm = _head_norm(layer, spec)
        self.shape: BlockShape  # set once the adapters of all blocks are known
        self.first = False  # nothing trains below: no gradient of the block's input is needed

    def use_dropout(self, dropout: Dropout, number: int) -> None:
        """Drop inputs of this block's adapters: one mask per group, its stream is that of block and group."""
        for index, group in enumerate(self.groups.values()):
            if group.R:
                group.mask = Mask(dropout, number * len(self.groups) + index)

    @property
    def lora(self) -> tuple[int, int, int, int]:
        """Adapter columns per group."""
        qkv, o, up, down = (self.groups[name].R for name in GROUPS)
        return qkv, o, up, down

    @property
    def trains(self) -> bool:
        """Some adapter of this block is trained."""
        return any(group.trains for group in self.groups.values())

    def forward(self, v: Views, tokens: Tokens, residual: torch.Tensor | None) -> None:
        """From the residual (None: already in `x`) and `branch` of the block below to `mid` and `branch` of this one.

        The block's output is mid + branch; the sum is fused into the next norm.
        """
        y1, _ = self._input(v, "qkv")
        if residual is None:
            add_norm(v["x"], None, self.norm1, None, y1, v["rstd1"], None)
        else:
            add_norm(residual, v["branch"], self.norm1, v["x"], y1, v["rstd1"], None)
        self._attention(v, tokens, again=False)
        y2, _ = self._input(v, "up")
        add_norm(v["x"], v["branch"], self.norm2, v["mid"], y2, v["rstd2"], None)
        self._gate_up(v, again=False)
        act, h = self._input(v, "down")
        swiglu(v["gate_up"][:, : self.shape.inner], act)
        self._down_project("down", v, again=False)
        self.groups["down"].forward(act, h, v["branch"])

    def backward(self, v: Views, tokens: Tokens) -> None:
        """`d` (first H columns): gradient of the block's output in, of its input out."""
        if self.level in ("full", "offload"):
            y1, _ = self._input(v, "qkv")
            add_norm(v["x"], None, self.norm1, None, y1, v["rstd1"], None)
            self._attention(v, tokens, again=True)
            y2, _ = self._input(v, "up")
            add_norm(v["x"], v["branch"], self.norm2, v["mid"], y2, v["rstd2"], None)
            self._gate_up(v, again=True)
        elif self.level == "attention":
            y2, _ = self._input(v, "up")
            norm_only(v["mid"], self.norm2, v["rstd2"], None, y2)
            self._gate_up(v, again=True)
        self._backward_mlp(v)
        self._backward_attention(v, tokens)

    def _attention(self, v: Views, tokens: Tokens, again: bool) -> None:
        """y1 -> qkv (rotated) -> a -> branch."""
        shape = self.shape
        self._down_project("qkv", v, again)
        self.groups["qkv"].forward(*self._input(v, "qkv"), v["qkv"][:, : shape.qkv])
        inputs = self._queries_keys_values(v, tokens, rotated=False)
        a, h = self._input(v, "o")
        attention(inputs, Scoring(tokens.documents, shape.head_dim**-0.5), _split(a, shape), v["lse"])
        self._down_project("o", v, again)
        self.groups["o"].forward(a, h, v["branch"])

    def _queries_keys_values(self, v: Views, tokens: Tokens, rotated: bool) -> QKV:
        """Rotated queries and keys, and values.

        Without per-head norms the rotation is done in place, once. With them `qkv` keeps the projections' output, from
        which normed and rotated queries and keys are made in `normed`, again in the backward pass.
        """
        shape, rotary = self.shape, tokens.rotary
        qkv = v["qkv"][:, : shape.qkv]
        if self.head_norm is None:
            if not rotated:
                rotate(qkv, rotary, tokens.positions_T, shape.heads + shape.kv_heads, qkv)
            return QKV.of_rows(qkv, shape.heads, shape.kv_heads)
        q, k = v["normed"][:, : shape.attention], v["normed"][:, shape.attention :]
        qk_norm_rotate(qkv, self.head_norm, rotary, tokens.positions_T, q, k)
        return QKV(_split(q, shape), _split(k, shape), _split(qkv[:, -k.shape[1] :], shape))

    def _gate_up(self, v: Views, again: bool) -> None:
        self._down_project("up", v, again)
        self.groups["up"].forward(*self._input(v, "up"), v["gate_up"][:, : self.shape.inner])

    def _down_project(self, name: str, v: Views, again: bool) -> None:
        """Make dropout(x) Aᵀ of a group where its product wants it, and keep it; `again`: put back what was kept."""
        x, h = self._input(v, name)
        kept = v.get(f"h_{name}")
        if not self.groups[name].R:
            return
        if again and kept is not None:
            h.copy_(kept)
            return
        self.groups[name].down_project(x, h, v.get("dropped"))
        if kept is not None and not again:
            kept.copy_(h)

    def _backward_mlp(self, v: Views) -> None:
        shape, up, down = self.shape, self.groups["up"], self.groups["down"]
        d, t = self._gradient(v, "d", down)
        gate_up = v["gate_up"][:, : shape.inner]
        if down.R:
            down.up_project(d, t)
        dact = _carve(v["scratch"], 0, shape.intermediate)
        down.input_gradient(d, t, dact, v.get("dropped"))
        kept = v["act"][:, : shape.intermediate] if "act" in v else None
        act = dact if down.R and kept is None else None  # made again where the gradient was
        swiglu_backward(dact, gate_up, gate_up, act)
        if down.R:
            down.adapter_gradients(d, t, v["h_down"], dact if kept is None else kept, v.get("dropped"))
        done = self.first and not self.groups["o"].R and not self.groups["qkv"].R
        self._through_norm(v, up, self._gradient(v, "gate_up", up), "2", stop=done)

    def _backward_attention(self, v: Views, tokens: Tokens) -> None:
        shape, qkv_group, o = self.shape, self.groups["qkv"], self.groups["o"]
        d, t = self._gradient(v, "d", o)
        a, h = self._input(v, "o")
        if o.R:
            o.up_project(d, t)
            o.adapter_gradients(d, t, v.get("h_o", h), a, v.get("dropped"))
        if self.first and not qkv_group.R:
            return
        inputs = self._queries_keys_values(v, tokens, rotated=True)
        da, grads = _carve(v["scratch"], 0, shape.attention), _carve(v["scratch"], shape.attention, shape.qkv)
        o.input_gradient(d, t, da, v.get("dropped"))
        scoring, dqkv = Scoring(tokens.documents, shape.head_dim**-0.5), QKV.of_rows(grads, shape.heads, shape.kv_heads)
        attention_backward(inputs, scoring, _split(da, shape), _split(a, shape), v["lse"], dqkv, v["delta"])
        rotary, positions, qkv = tokens.rotary, tokens.positions_T, v["qkv"][:, : shape.qkv]
        kv = shape.kv_heads * shape.head_dim
        dq, dk, dv = grads[:, : shape.attention], grads[:, shape.attention : -kv], grads[:, -kv:]
        if self.head_norm is None:
            pack_gradients(dq, dk, dv, rotary, positions, qkv)
        else:
            qk_norm_rotate_backward((dq, dk, dv), qkv, self.head_norm, rotary, positions, qkv)
        self._through_norm(v, qkv_group, self._gradient(v, "qkv", qkv_group), "1", stop=self.first)

    def _through_norm(
        self, v: Views, group: Group, dout: tuple[torch.Tensor, torch.Tensor], which: str, stop: bool
    ) -> None:
        """Input gradient of a group, then of the norm before it (added to `d`), then the group's adapter gradients."""
        (dy, t), hidden = dout, self.shape.hidden
        if group.R:
            group.up_project(dy, t)
        norm, source = (self.norm1, v["x"]) if which == "1" else (self.norm2, v["mid"])
        rstd, kept = v[f"rstd{which}"], v.get(f"y{which}")
        y = _carve(v["y"], 0, hidden)
        if not stop:
            group.input_gradient(dy, t, y, v.get("dropped"))
            recomputed = y if group.R and kept is None else None
            norm_backward(y, source, norm, rstd, None, v["d"][:, :hidden], recomputed)
        elif kept is None and group.R:
            norm_only(source, norm, rstd, None, y)
        if group.R:
            h = v["h_qkv" if which == "1" else "h_up"]
            group.adapter_gradients(dy, t, h, y if kept is None else kept[:, :hidden], v.get("dropped"))

    def _input(self, v: Views, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Input x of a group and the place of x Aᵀ: beside x, or apart for fp8."""
        group = self.groups[name]
        kept = {"qkv": "y1", "o": "a", "up": "y2", "down": "act"}[name]
        width = group.ins + (0 if self.shape.fp8 else group.R)
        buffer = v[kept] if kept in v else _carve(v["scratch" if name == "down" else "y"], 0, width)
        return buffer[:, : group.ins], v["t"][:, : group.R] if self.shape.fp8 else buffer[:, group.ins : width]

    def _gradient(self, v: Views, name: str, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of a group's output and the place of dy B: beside it, or apart for fp8."""
        buffer = v[name]
        t = v["t"][:, : group.R] if self.shape.fp8 else buffer[:, group.outs : group.outs + group.R]
        return buffer[:, : group.outs], t


def _carve(buffer: torch.Tensor, start: int, width: int) -> torch.Tensor:
    """A contiguous (T, width) part of a contiguous (T, n) buffer, behind `start` columns' worth of memory."""
    tokens = buffer.shape[0]
    return buffer.view(-1)[tokens * start : tokens * (start + width)].view(tokens, width)


def _norm(layer: nn.Module, name: str) -> Norm:
    module: Any = layer.get_submodule(name)
    return Norm(module.weight.detach(), None, epsilon(module))


def _head_norm(layer: nn.Module, spec: BlockSpec) -> HeadNorm | None:
    if not spec.q_norm:
        return None
    q, k = layer.get_submodule(spec.q_norm), layer.get_submodule(spec.k_norm)
    weights = cast(nn.Parameter, q.weight), cast(nn.Parameter, k.weight)
    return HeadNorm(weights[0].detach(), weights[1].detach(), epsilon(q))


def epsilon(norm: Any) -> float:
    """What an RMS norm of transformers adds to the mean square."""
    return float(norm.variance_epsilon)


def _split(x_Tn: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """(T, heads * d) as (T, heads, d)."""
    return x_Tn.view(x_Tn.shape[0], -1, shape.head_dim)
