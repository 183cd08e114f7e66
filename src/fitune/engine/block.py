"""The one decoder block: an explicit forward and backward pass over declared buffers.

There is no autograd here. `forward` leaves in the block's buffers what plan/saves.py declares; `backward` recomputes
what the level did not keep, adds the trained parameters' gradients and turns the gradient of the block's output into
that of its input.

Names of buffers (T tokens): x block input, y1 and y2 norm outputs, qkv, a attention output, mid residual after
attention, gate_up, act, branch the last projection's output, d gradient of the residual stream.

The residual stream passes beside a norm (mid = x + branch) or through it (mid = carried * y1 + branch), see `Norm`.
What carries it, the stream below, is x and then mid, or y1 and then y2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from fitune.engine.buffers import carve
from fitune.engine.factors import input_factors, output_factors, refuse_factors
from fitune.engine.groups import Group
from fitune.engine.products import Scratch
from fitune.engine.spec import BlockSpec, frozen_norm
from fitune.engine.trained import Trained
from fitune.engine.virtual import Prefix
from fitune.kernels.attention import QKV, Documents, Scoring, Workspace, attention, attention_backward
from fitune.kernels.dropout import Dropout, Mask
from fitune.kernels.norm import Norm, add_norm, norm_backward, norm_only
from fitune.kernels.rope import HeadNorm, Rotary, qk_norm_rotate, qk_norm_rotate_backward, rotate, rotate_backward
from fitune.kernels.sums import add_column_sums
from fitune.kernels.swiglu import gelu, gelu_backward, swiglu, swiglu_backward
from fitune.plan.saves import GROUPS, BlockShape, Level

Views = dict[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a micro-step stand.

    Attributes:
        positions_AT: within their document, one row per axis of the rotary positions.
        documents: where each token's document starts and ends, and its prefix.
        rotary: cos and sin tables; None: positions are not rotary.
        slopes_h: ALiBi's, per head; None: positions are not ALiBi.
        first_D: the first of each document's virtual tokens, -1 where there is no document; None: there are none.
    """

    positions_AT: torch.Tensor
    documents: Documents
    rotary: Rotary | None
    slopes_h: torch.Tensor | None
    first_D: torch.Tensor | None = None


@dataclass(frozen=True)
class BlockNorm:
    """One of the two norms: what the kernels read, its place in the buffers, the gradient of its bias if trained."""

    norm: Norm
    number: str
    dbias_H: torch.Tensor | None

    def statistics(self, v: Views) -> tuple[torch.Tensor, torch.Tensor | None]:
        """1 / deviation and, of a layer norm, the mean of each row."""
        return v[f"rstd{self.number}"], v.get(f"mean{self.number}")


class Block:
    """One decoder block over a transformers layer's own weights.

    Args:
        layer: the decoder layer; its weights and biases become views of the groups'.
        scratch: where quantized groups are expanded.
        trained: where gradients are added up.
    """

    def __init__(
        self, layer: nn.Module, spec: BlockSpec, level: Level, dtype: torch.dtype, scratch: Scratch, trained: Trained
    ) -> None:
        self.level, self.spec = level, spec
        modules = {name: [layer.get_submodule(path) for path in paths] for name, paths in spec.names().items()}
        later = "up" if spec.mlp == "swiglu" else ""  # whose adapters may be added where the output is read
        self.groups = {name: Group(found, dtype, scratch, trained, name == later) for name, found in modules.items()}
        refuse_factors([*modules["o"], *modules["up"]])
        self.qkv_factors = output_factors(modules["qkv"], trained)
        self.act_factors = input_factors(modules["down"][0], trained)
        self.norm1, self.norm2 = (_norm(layer, spec, number, trained) for number in "12")
        self.head_norm = _head_norm(layer, spec)
        self.shape: BlockShape  # set once the adapters of all blocks are known
        self.first = False  # nothing trains below: no gradient of the block's input is needed
        self.prefix: Prefix | None = None

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
    def scaled(self) -> int:
        """Width of the buffer for what factors multiply."""
        widths = (self.groups["qkv"].outs, self.qkv_factors), (self.groups["down"].ins, self.act_factors)
        return max(width if factors is not None else 0 for width, factors in widths)

    @property
    def trains(self) -> bool:
        """Some parameter of this block is trained."""
        norms = (self.norm1.dbias_H, self.norm2.dbias_H)
        others = self.prefix is not None or any(bias is not None for bias in norms)
        others |= any(factors is not None and factors.trains for factors in (self.qkv_factors, self.act_factors))
        return others or any(group.trains for group in self.groups.values())

    def forward(self, v: Views, tokens: Tokens, stream: torch.Tensor | None) -> torch.Tensor:
        """From the block below, its stream (None: the input is in `x` already) and its `branch`, to `branch`.

        Returns:
            This block's stream; `output` makes the block's output of it. The sum is fused into the next norm.
        """
        y1, _ = self._input(v, "qkv")
        if stream is None:
            add_norm(v["x"], None, self.norm1.norm, None, y1, *self.norm1.statistics(v))
        else:
            self._join(v, stream, self.norm1, v["x"], y1)
        self._attention(v, tokens, again=False)
        y2, _ = self._input(v, "up")
        self._join(v, self._stream(v["x"], y1), self.norm2, v["mid"], y2)
        self._up(v, again=False)
        act, h = self._input(v, "down")
        self._activate(v, act)
        self._down_project("down", v, again=False)
        if self.act_factors is not None:
            act = self.act_factors.scale(act, carve(v["scaled"], 0, self.shape.intermediate))
        self.groups["down"].forward(act, h, v["branch"])
        return self._stream(v["mid"], y2)

    def output(self, v: Views, stream: torch.Tensor, out: torch.Tensor) -> None:
        """The block's output from its stream and `branch`; out may be `branch`."""
        carried = self.norm2.norm.carried
        torch.add(v["branch"], stream, alpha=1.0 if carried is None else carried, out=out)

    def backward(self, v: Views, tokens: Tokens, again: bool = True) -> None:
        """`d` (first H columns): gradient of the block's output in, of its input out.

        Args:
            again: make what the level did not keep again; False straight after this block's forward, where the shared
                buffers still hold it.
        """
        self._backward_down(v)
        if again:
            self._recompute(v, tokens)
        self._backward_mlp(v, expanded=again and self.level not in ("none", "elementwise"))
        self._backward_attention(v, tokens)

    def _recompute(self, v: Views, tokens: Tokens) -> None:
        y2, _ = self._input(v, "up")
        if self.level in ("full", "offload"):
            y1, _ = self._input(v, "qkv")
            add_norm(v["x"], None, self.norm1.norm, None, y1, *self.norm1.statistics(v))
            self._attention(v, tokens, again=True)
            self._join(v, self._stream(v["x"], y1), self.norm2, v["mid"], y2)
            self._up(v, again=True)
        elif self.level == "attention":
            rstd, mean = self.norm2.statistics(v)
            norm_only(v["mid"], self.norm2.norm, rstd, mean, y2)
            self._up(v, again=True)

    def _stream(self, beside: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
        return beside if self.norm1.norm.carried is None else through

    def _join(self, v: Views, stream: torch.Tensor, norm: BlockNorm, into: torch.Tensor, y: torch.Tensor) -> None:
        """A branch joins the stream: into = stream + branch, y = norm(into)."""
        rstd, mean = norm.statistics(v)
        if norm.norm.carried is None:
            add_norm(stream, v["branch"], norm.norm, into, y, rstd, mean)
        else:  # y may stand where the stream does, so the sum comes first
            torch.add(v["branch"], stream, alpha=norm.norm.carried, out=into)
            add_norm(into, None, norm.norm, None, y, rstd, mean)

    def _attention(self, v: Views, tokens: Tokens, again: bool) -> None:
        """y1 -> qkv (rotated) -> a -> branch."""
        shape = self.shape
        self._down_project("qkv", v, again)
        self.groups["qkv"].forward(*self._input(v, "qkv"), v["qkv"])
        inputs = self._queries_keys_values(v, tokens, rotated=False)
        a, h = self._input(v, "o")
        attention(inputs, self._scoring(tokens), _split(a, shape), v["lse"])
        self._down_project("o", v, again)
        self.groups["o"].forward(a, h, v["branch"])

    def _scoring(self, tokens: Tokens) -> Scoring:
        return Scoring(tokens.documents, self.shape.head_dim**-0.5, tokens.slopes_h)

    def _heads(self, rows_Tn: torch.Tensor) -> QKV:
        """Views of queries, keys and values, or of their gradients."""
        if self.spec.fused:
            return QKV.of_heads(rows_Tn, self.shape.heads)
        return QKV.of_rows(rows_Tn, self.shape.heads, self.shape.kv_heads)

    def _queries_keys_values(self, v: Views, tokens: Tokens, rotated: bool) -> QKV:
        """Rotated queries and keys, and values; those of a prefix in their places.

        Without per-head norms the rotation is done in place, once. With them `qkv` keeps the projections' output, from
        which normed and rotated queries and keys are made in `normed`, again in the backward pass. With factors, too;
        what they make of it, in `scaled`, takes its place.
        """
        shape, rotary, qkv = self.shape, tokens.rotary, self._projected(v)
        if self.qkv_factors is not None:
            self.qkv_factors.scale(v["qkv"], qkv)
            rotated = False
        if self.head_norm is None or rotary is None:
            if rotary is not None and not rotated:
                rotate(qkv, rotary, tokens.positions_AT, shape.heads + shape.kv_heads, qkv)
            return self._with_prefix(self._heads(qkv), tokens)
        q, k = v["normed"][:, : shape.attention], v["normed"][:, shape.attention :]
        qk_norm_rotate(qkv, self.head_norm, rotary, tokens.positions_AT, q, k)
        return self._with_prefix(QKV(_split(q, shape), _split(k, shape), _split(qkv[:, -k.shape[1] :], shape)), tokens)

    def _projected(self, v: Views) -> torch.Tensor:
        """Queries, keys and values behind their factors, if there are any."""
        return v["qkv"] if self.qkv_factors is None else carve(v["scaled"], 0, self.shape.qkv)

    def _with_prefix(self, qkv: QKV, tokens: Tokens) -> QKV:
        if self.prefix is not None:
            assert tokens.first_D is not None
            self.prefix.place(qkv, tokens.first_D)
        return qkv

    def _up(self, v: Views, again: bool) -> None:
        self._down_project("up", v, again)
        self.groups["up"].forward(*self._input(v, "up"), v["gate_up"][:, : self.shape.inner])

    def _down_project(self, name: str, v: Views, again: bool) -> None:
        """Make dropout(x) Aᵀ of a group where its product wants it, and keep it; `again`: put back what was kept."""
        x, h = self._input(v, name)
        if not (R := self.groups[name].R):
            return
        kept = v[f"h_{name}"][:, :R] if f"h_{name}" in v else None  # made for the block with most
        if again and kept is not None:
            h.copy_(kept)
            return
        self.groups[name].down_project(x, h, v.get("dropped"))
        if kept is not None and not again:
            kept.copy_(h)

    def _backward_down(self, v: Views) -> None:
        """Gradient of the activation, into `scratch`: it needs nothing that is recomputed.

        Coming first it leaves a quantized `up`, recomputed last, expanded for its own input gradient.
        """
        down = self.groups["down"]
        d, t = self._gradient(v, v["d"], down)
        down.bias_gradient(d)
        if down.R:
            down.up_project(d, t)
        down.input_gradient(d, t, carve(v["scratch"], 0, self.shape.intermediate), v.get("dropped"))

    def _backward_mlp(self, v: Views, expanded: bool) -> None:
        shape, up, down = self.shape, self.groups["up"], self.groups["down"]
        d, t = self._gradient(v, v["d"], down)
        gate_up = v["gate_up"][:, : shape.inner]
        dact = carve(v["scratch"], 0, shape.intermediate)
        kept = v["act"][:, : shape.intermediate] if "act" in v else None
        if self.act_factors is not None:
            scaled = carve(v["scaled"], 0, shape.intermediate)  # the activation is made again where its copy was
            self.act_factors.backward(dact, self._activate(v, scaled) if kept is None else kept)
        act = dact if down.R and kept is None else None  # made again where the gradient was
        if shape.gated:
            swiglu_backward(dact, gate_up, gate_up, act, up.left_out(v.get("h_up")))
        else:
            gelu_backward(dact, gate_up, gate_up, act)
        if down.R:
            down.adapter_gradients(d, t, v["h_down"], dact if kept is None else kept, v.get("dropped"))
        stop = self.first and not self.groups["o"].needs_gradient and not self._trains_before_attention
        self._through_norm(v, self.norm2, up, self._gradient(v, v["gate_up"], up), stop, expanded)

    def _activate(self, v: Views, out: torch.Tensor) -> torch.Tensor:
        """The activation of gate_up, to which an fp8 product left the adapters to be added here: `h_up` is kept."""
        gate_up = v["gate_up"][:, : self.shape.inner]
        if self.shape.gated:
            swiglu(gate_up, out, self.groups["up"].left_out(v.get("h_up")))
        else:
            gelu(gate_up, out)
        return out

    @property
    def _trains_before_attention(self) -> bool:
        factors = self.qkv_factors is not None and self.qkv_factors.trains
        others = factors or self.norm1.dbias_H is not None or self.prefix is not None
        return others or self.groups["qkv"].needs_gradient

    def _backward_attention(self, v: Views, tokens: Tokens) -> None:
        shape, qkv_group, o = self.shape, self.groups["qkv"], self.groups["o"]
        d, t = self._gradient(v, v["d"], o)
        a, h = self._input(v, "o")
        o.bias_gradient(d)
        if o.R:
            o.up_project(d, t)
            o.adapter_gradients(d, t, v.get("h_o", h), a, v.get("dropped"))
        if self.first and not self._trains_before_attention:
            return
        da = carve(v["scratch"], 0, shape.attention)
        o.input_gradient(d, t, da, v.get("dropped"))
        beside = 0 if shape.fp8 else qkv_group.R
        dout = self._gradient(v, carve(v["scratch"], shape.attention, shape.qkv + beside), qkv_group)
        inputs, grads = self._queries_keys_values(v, tokens, rotated=True), self._heads(dout[0])
        scoring = self._scoring(tokens)
        workspace = Workspace(v["delta"], v["gate_up"].view(-1))  # gate_up's gradient has gone into all it is for
        attention_backward(inputs, scoring, _split(da, shape), _split(a, shape), v["lse"], grads, workspace)
        if self.prefix is not None:
            assert tokens.first_D is not None
            self.prefix.take(grads, tokens.first_D)
        self._rotate_back(v, tokens, dout[0])
        if self.qkv_factors is not None:
            self.qkv_factors.backward(dout[0], v["qkv"])
        self._through_norm(v, self.norm1, qkv_group, dout, stop=self.first)

    def _rotate_back(self, v: Views, tokens: Tokens, dqkv: torch.Tensor) -> None:
        """Gradients of rotated queries and keys into those of the projections' output, in place."""
        shape, rotary, positions = self.shape, tokens.rotary, tokens.positions_AT
        if rotary is None:
            return
        if self.head_norm is None:
            rotate_backward(dqkv, rotary, positions, shape.heads + shape.kv_heads, dqkv)
            return
        kv = shape.kv_heads * shape.head_dim
        parts = dqkv[:, : shape.attention], dqkv[:, shape.attention : -kv], dqkv[:, -kv:]
        qk_norm_rotate_backward(parts, self._projected(v), self.head_norm, rotary, positions, dqkv)

    def _through_norm(
        self, v: Views, norm: BlockNorm, group: Group, dout: Pair, stop: bool, expanded: bool = False
    ) -> None:
        """Input gradient of a group, then of the norm before it (added to `d`), then what the group trains.

        Args:
            dout: gradient of the group's output, and the place of dy B.
            stop: nothing below the norm is trained.
            expanded: the group was the last to multiply.
        """
        (dy, t), hidden = dout, self.shape.hidden
        group.bias_gradient(dy)
        if group.R:
            group.up_project(dy, t)
        rstd, mean = norm.statistics(v)
        source, kept = (v["x"] if norm is self.norm1 else v["mid"]), v.get(f"y{norm.number}")
        y, d = carve(v["y"], 0, hidden), v["d"][:, :hidden]
        if not stop or norm.dbias_H is not None:
            group.input_gradient(dy, t, y, v.get("dropped"), expanded)
        if norm.dbias_H is not None:
            add_column_sums(y, 1.0, norm.dbias_H)
            if norm.norm.carried is not None:
                add_column_sums(d, norm.norm.carried, norm.dbias_H)
        again = y if group.R and kept is None else None  # the norm's output, made again where its gradient was
        if not stop:
            norm_backward(y, source, norm.norm, rstd, mean, d, again)
        elif again is not None:
            norm_only(source, norm.norm, rstd, mean, again)
        if group.R:
            h = v["h_qkv" if norm is self.norm1 else "h_up"]
            group.adapter_gradients(dy, t, h, y if kept is None else kept[:, :hidden], v.get("dropped"))

    def _input(self, v: Views, name: str) -> Pair:
        """Input x of a group and the place of x Aᵀ: beside x, or apart for fp8."""
        group = self.groups[name]
        kept = {"qkv": "y1", "o": "a", "up": "y2", "down": "act"}[name]
        width = group.ins + (0 if self.shape.fp8 else group.R)
        buffer = v[kept] if kept in v else carve(v["scratch" if name == "down" else "y"], 0, width)
        return buffer[:, : group.ins], v["h"][:, : group.R] if self.shape.fp8 else buffer[:, group.ins : width]

    def _gradient(self, v: Views, buffer: torch.Tensor, group: Group) -> Pair:
        """Gradient of a group's output in its buffer and the place of dy B: beside it, or apart for fp8."""
        t = v["t"][:, : group.R] if self.shape.fp8 else buffer[:, group.outs : group.outs + group.R]
        return buffer[:, : group.outs], t


def _norm(layer: nn.Module, spec: BlockSpec, number: str, trained: Trained) -> BlockNorm:
    module = layer.get_submodule(spec.norm1 if number == "1" else spec.norm2)
    norm = replace(frozen_norm(module), carried=spec.carried)
    return BlockNorm(norm, number, trained.gradient(getattr(module, "bias", None)))


def _head_norm(layer: nn.Module, spec: BlockSpec) -> HeadNorm | None:
    if not spec.q_norm:
        return None
    q, k = frozen_norm(layer.get_submodule(spec.q_norm)), frozen_norm(layer.get_submodule(spec.k_norm))
    return HeadNorm(q.weight_H, k.weight_H, q.eps)


def _split(x_Tn: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """(T, heads * d) as (T, heads, d)."""
    return x_Tn.view(x_Tn.shape[0], -1, shape.head_dim)
