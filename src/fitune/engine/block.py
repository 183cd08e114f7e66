"""The one decoder block: an explicit forward and backward pass over declared buffers.

There is no autograd here. `forward` leaves in the block's buffers what plan/saves.py declares; `backward` recomputes
what the level did not keep, adds the adapters' gradients and turns the gradient of the block's output into that of its
input.

Names of buffers (T tokens): x block input, y1 and y2 norm outputs, qkv, a attention output, mid residual after
attention, gate_up, act, branch the last projection's output, d gradient of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitune.engine.groups import Group, Scratch
from fitune.engine.spec import BlockSpec
from fitune.kernels.attention import QKV, Documents, Scoring, attention, attention_backward
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
        y1 = self._buffer(v, "y1", "qkv")
        if residual is None:
            add_norm(v["x"], None, self.norm1, None, y1[:, : self.shape.hidden], v["rstd1"], None)
        else:
            add_norm(residual, v["branch"], self.norm1, v["x"], y1[:, : self.shape.hidden], v["rstd1"], None)
        self._attention(v, y1, tokens, keep_h=True)
        y2 = self._buffer(v, "y2", "up")
        add_norm(v["x"], v["branch"], self.norm2, v["mid"], y2[:, : self.shape.hidden], v["rstd2"], None)
        self._gate_up(v, y2, keep_h=True)
        act = self._buffer(v, "act", "down")
        swiglu(v["gate_up"][:, : self.shape.inner], act[:, : self.shape.intermediate])
        self._down_project("down", v, act, keep_h=True)
        self.groups["down"].forward(act, v["branch"])

    def backward(self, v: Views, tokens: Tokens) -> None:
        """`d` (first H columns): gradient of the block's output in, of its input out."""
        if self.level in ("full", "offload"):
            self._recompute_attention(v, tokens)
        if self.level in ("full", "offload", "attention"):
            self._recompute_gate_up(v)
        self._backward_mlp(v)
        self._backward_attention(v, tokens)

    def _recompute_attention(self, v: Views, tokens: Tokens) -> None:
        y1 = self._buffer(v, "y1", "qkv")
        add_norm(v["x"], None, self.norm1, None, y1[:, : self.shape.hidden], v["rstd1"], None)
        self._attention(v, y1, tokens, keep_h=False)

    def _recompute_gate_up(self, v: Views) -> None:
        y2 = self._buffer(v, "y2", "up")
        if self.level in ("full", "offload"):
            add_norm(v["x"], v["branch"], self.norm2, v["mid"], y2[:, : self.shape.hidden], v["rstd2"], None)
        else:
            norm_only(v["mid"], self.norm2, v["rstd2"], None, y2[:, : self.shape.hidden])
        self._gate_up(v, y2, keep_h=False)

    def _attention(self, v: Views, y1: torch.Tensor, tokens: Tokens, keep_h: bool) -> None:
        """y1 -> qkv (rotated) -> a -> branch."""
        shape, a = self.shape, v["a"]
        self._down_project("qkv", v, y1, keep_h)
        qkv = v["qkv"][:, : shape.qkv]
        self.groups["qkv"].forward(y1, qkv)
        inputs = self._queries_keys_values(v, tokens, rotated=False)
        scoring = Scoring(tokens.documents, shape.head_dim**-0.5)
        attention(inputs, scoring, _split(a[:, : shape.attention], shape), v["lse"])
        if self.groups["o"].R:
            self.groups["o"].down_project(a)
        self.groups["o"].forward(a, v["branch"])

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

    def _gate_up(self, v: Views, y2: torch.Tensor, keep_h: bool) -> None:
        self._down_project("up", v, y2, keep_h)
        self.groups["up"].forward(y2, v["gate_up"][:, : self.shape.inner])

    def _down_project(self, name: str, v: Views, x: torch.Tensor, keep_h: bool) -> None:
        """Fill the adapter columns of an input buffer: computed and kept, or put back from where they were kept."""
        group = self.groups[name]
        if not group.R:
            return
        columns = x[:, group.ins : group.ins + group.R]
        if keep_h:
            group.down_project(x)
            v[f"h_{name}"].copy_(columns)
        else:
            columns.copy_(v[f"h_{name}"])

    def _backward_mlp(self, v: Views) -> None:
        shape, up, down = self.shape, self.groups["up"], self.groups["down"]
        d, gate_up = v["d"], v["gate_up"]
        if down.R:
            down.up_project(d)
        dact = v["scratch"][:, : shape.intermediate]
        down.input_gradient(d, dact)
        act = v["act"][:, : shape.intermediate] if "act" in v else (dact if down.R else None)
        swiglu_backward(dact, gate_up[:, : shape.inner], gate_up[:, : shape.inner], None if "act" in v else act)
        if down.R and act is not None:
            down.adapter_gradients(d, v["h_down"], act)
        if up.R:
            up.up_project(gate_up)
        self._through_norm(v, up, gate_up, "2", stop=self.first and not self.groups["o"].R and not self.groups["qkv"].R)

    def _backward_attention(self, v: Views, tokens: Tokens) -> None:
        shape, qkv_group, o = self.shape, self.groups["qkv"], self.groups["o"]
        d, a, scratch = v["d"], v["a"], v["scratch"]
        if o.R:
            o.up_project(d)
            o.adapter_gradients(d, a[:, o.ins :], a[:, : o.ins])
        if self.first and not qkv_group.R:
            return
        inputs = self._queries_keys_values(v, tokens, rotated=True)
        da, grads = scratch[:, : shape.attention], scratch[:, shape.attention : shape.attention + shape.qkv]
        o.input_gradient(d, da)
        scoring, out = Scoring(tokens.documents, shape.head_dim**-0.5), _split(a[:, : shape.attention], shape)
        dqkv = QKV.of_rows(grads, shape.heads, shape.kv_heads)
        attention_backward(inputs, scoring, _split(da, shape), out, v["lse"], dqkv, v["delta"])
        qkv, rotary, positions = v["qkv"], tokens.rotary, tokens.positions_T
        dq, dk, dv = grads.split([shape.attention, *[shape.kv_heads * shape.head_dim] * 2], 1)
        if self.head_norm is None:
            pack_gradients(dq, dk, dv, rotary, positions, qkv[:, : shape.qkv])
        else:
            before = qkv[:, : shape.qkv]
            qk_norm_rotate_backward((dq, dk, dv), before, self.head_norm, rotary, positions, before)
        if qkv_group.R:
            qkv_group.up_project(qkv)
        self._through_norm(v, qkv_group, qkv, "1", stop=self.first)

    def _through_norm(self, v: Views, group: Group, dout: torch.Tensor, which: str, stop: bool = False) -> None:
        """Input gradient of a group, then of the norm before it (added to `d`), then the group's adapter gradients."""
        hidden = self.shape.hidden
        norm, source = (self.norm1, v["x"]) if which == "1" else (self.norm2, v["mid"])
        rstd, kept = v[f"rstd{which}"], v.get(f"y{which}")
        y = v["y"][:, :hidden]
        if stop:
            if kept is None:
                norm_only(source, norm, rstd, None, y)
        else:
            group.input_gradient(dout, y)
            recomputed = y if group.R and kept is None else None
            norm_backward(y, source, norm, rstd, None, v["d"][:, :hidden], recomputed)
        if group.R:
            name = "qkv" if which == "1" else "up"
            group.adapter_gradients(dout, v[f"h_{name}"], y if kept is None else kept[:, :hidden])

    def _buffer(self, v: Views, kept: str, group: str) -> torch.Tensor:
        """The input buffer of a group: kept per block at level `none`, else shared."""
        if kept in v:
            return v[kept]
        shared = v["scratch"] if kept == "act" else v["y"]
        return shared[:, : self.groups[group].ins + self.groups[group].R]


def _norm(layer: nn.Module, name: str) -> Norm:
    module: Any = layer.get_submodule(name)
    return Norm(module.weight.detach(), None, epsilon(module))


def _head_norm(layer: nn.Module, spec: BlockSpec) -> HeadNorm | None:
    if not spec.q_norm:
        return None
    q, k = layer.get_submodule(spec.q_norm), layer.get_submodule(spec.k_norm)
    return HeadNorm(q.weight.detach(), k.weight.detach(), epsilon(q))


def epsilon(norm: Any) -> float:
    """What an RMS norm of transformers adds to the mean square."""
    return float(norm.variance_epsilon)


def _split(x_Tn: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """(T, heads * d) as (T, heads, d)."""
    return x_Tn.unflatten(1, (-1, shape.head_dim))
