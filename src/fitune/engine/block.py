"""The one decoder block: an explicit forward and backward pass over declared buffers.

There is no autograd here. `forward` leaves in the block's buffers what plan/saves.py declares; `backward` recomputes what
the level did not keep, adds the adapters' gradients and turns the gradient of the block's output into that of its input.

Names of buffers (T tokens): x block input, y1 and y2 norm outputs, qkv, a attention output, mid residual after attention,
gate_up, act, branch the last projection's output, d gradient of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitune.engine.groups import Group, Scratch
from fitune.engine.spec import BlockSpec
from fitune.kernels.attention import Documents, attention, attention_backward
from fitune.kernels.norm import Norm, add_norm, norm_backward, norm_only
from fitune.kernels.rope import Rotary, pack_gradients, qk_norm_rotate, qk_norm_rotate_backward, rotate
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
        self.q_norm = _norm(layer, spec.q_norm) if spec.q_norm else None
        self.k_norm = _norm(layer, spec.k_norm) if spec.k_norm else None
        self.shape: BlockShape  # set once the adapters of all blocks are known
        self.first = False  # nothing trains below: no gradient of the block's input is needed

    @property
    def lora(self) -> tuple[int, int, int, int]:
        """Adapter columns per group."""
        qkv, o, up, down = (self.groups[name].R for name in GROUPS)
        return qkv, o, up, down

    def refresh(self) -> None:
        """Take over the adapters' current parameters."""
        for group in self.groups.values():
            group.refresh()

    def forward(self, v: Views, tokens: Tokens, residual: torch.Tensor | None) -> None:
        """From the residual (None: already in `x`) and `branch` of the block below to `mid` and `branch` of this one.

        The block's output is mid + branch; the sum is fused into the next norm.
        """
        y1 = self._buffer(v, "y1", "qkv")
        if residual is None:
            add_norm(self.norm1, v["x"], None, None, y1[:, : self.shape.hidden], v["rstd1"])
        else:
            add_norm(self.norm1, residual, v["branch"], v["x"], y1[:, : self.shape.hidden], v["rstd1"])
        self._attention(v, y1, tokens, keep_h=True)
        y2 = self._buffer(v, "y2", "up")
        add_norm(self.norm2, v["x"], v["branch"], v["mid"], y2[:, : self.shape.hidden], v["rstd2"])
        self._gate_up(v, y2, keep_h=True)
        act = self._buffer(v, "act", "down")
        swiglu(v["gate_up"][:, : self.shape.inner], act[:, : self.shape.intermediate])
        self._down_project("down", v, act, keep_h=True)
        self.groups["down"].forward(act, v["branch"])

    def backward(self, v: Views, tokens: Tokens) -> None:
        """`d` (first H columns): gradient of the block's output in, of its input out."""
        if self.level == "full":
            self._recompute_attention(v, tokens)
        if self.level in ("full", "attention"):
            self._recompute_gate_up(v)
        self._backward_mlp(v)
        self._backward_attention(v, tokens)

    def _recompute_attention(self, v: Views, tokens: Tokens) -> None:
        y1 = self._buffer(v, "y1", "qkv")
        add_norm(self.norm1, v["x"], None, None, y1[:, : self.shape.hidden], v["rstd1"])
        self._attention(v, y1, tokens, keep_h=False)

    def _recompute_gate_up(self, v: Views) -> None:
        y2 = self._buffer(v, "y2", "up")
        if self.level == "full":
            add_norm(self.norm2, v["x"], v["branch"], v["mid"], y2[:, : self.shape.hidden], v["rstd2"])
        else:
            norm_only(self.norm2, v["mid"], v["rstd2"], y2[:, : self.shape.hidden])
        self._gate_up(v, y2, keep_h=False)

    def _attention(self, v: Views, y1: torch.Tensor, tokens: Tokens, keep_h: bool) -> None:
        """y1 -> qkv (rotated) -> a -> branch."""
        shape, a = self.shape, v["a"]
        self._down_project("qkv", v, y1, keep_h)
        qkv = v["qkv"][:, : shape.qkv]
        self.groups["qkv"].forward(y1, qkv)
        q, k, value = self._queries_keys_values(v, tokens, rotated=False)
        attention(q, k, value, tokens.documents, shape.head_dim**-0.5, _heads(a, shape.attention, shape), v["lse"])
        if self.groups["o"].R:
            self.groups["o"].down_project(a)
        self.groups["o"].forward(a, v["branch"])

    def _queries_keys_values(self, v: Views, tokens: Tokens, rotated: bool) -> tuple[torch.Tensor, ...]:
        """Rotated queries and keys, and values, (T, heads, d) each.

        Without per-head norms the rotation is done in place, once. With them `qkv` keeps the projections' output, from
        which normed and rotated queries and keys are made in `scratch`, again in the backward pass.
        """
        shape, rotary = self.shape, tokens.rotary
        qkv = v["qkv"][:, : shape.qkv]
        if self.q_norm is None or self.k_norm is None:
            if not rotated:
                rotate(qkv, rotary, tokens.positions_T, shape.heads + shape.kv_heads, qkv)
            q, k = qkv[:, : shape.attention], qkv[:, shape.attention : -shape.kv_heads * shape.head_dim]
        else:
            normed = v["normed"]
            q, k = normed[:, : shape.attention], normed[:, shape.attention :]
            qk_norm_rotate(qkv, (self.q_norm, self.k_norm), rotary, tokens.positions_T, q, k)
        return tuple(_split(part, shape) for part in (q, k, qkv[:, -shape.kv_heads * shape.head_dim :]))

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
        q, k, value = self._queries_keys_values(v, tokens, rotated=True)
        da, grads = scratch[:, : shape.attention], scratch[:, shape.attention : shape.attention + shape.qkv]
        o.input_gradient(d, da)
        dq, dk, dv = (grads[:, part] for part in _parts(shape))
        attention_backward(
            (q, k, value, _heads(a, shape.attention, shape), v["lse"]),
            _split(da, shape),
            tokens.documents,
            shape.head_dim**-0.5,
            (_split(dq, shape), _split(dk, shape), _split(dv, shape)),
            v["delta"],
        )
        qkv = v["qkv"]
        if self.q_norm is None or self.k_norm is None:
            pack_gradients((dq, dk, dv), tokens.rotary, tokens.positions_T, qkv[:, : shape.qkv])
        else:
            norms = (self.q_norm, self.k_norm)
            qk_norm_rotate_backward(
                (dq, dk, dv), qkv[:, : shape.qkv], norms, tokens.rotary, tokens.positions_T, qkv[:, : shape.qkv]
            )
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
                norm_only(norm, source, rstd, y)
        else:
            group.input_gradient(dout, y)
            recomputed = y if group.R and kept is None else None
            norm_backward(norm, y, source, rstd, v["d"][:, :hidden], recomputed)
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
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight.detach(), None, float(eps))


def _split(x_Tn: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """(T, heads * d) as (T, heads, d)."""
    return x_Tn.unflatten(1, (-1, shape.head_dim))


def _heads(x_Tn: torch.Tensor, width: int, shape: BlockShape) -> torch.Tensor:
    return _split(x_Tn[:, :width], shape)


def _parts(shape: BlockShape) -> tuple[slice, slice, slice]:
    """Columns of queries, keys and values."""
    kv = shape.kv_heads * shape.head_dim
    return (
        slice(0, shape.attention),
        slice(shape.attention, shape.attention + kv),
        slice(shape.attention + kv, shape.attention + 2 * kv),
    )
