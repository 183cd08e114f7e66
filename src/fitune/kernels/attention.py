"""Attention inside documents: the rows of a micro-step stand one after another and see only their own document.

A token sees itself, what stands before it, and all of its document's prefix, if documents have one. Forward keeps the
output and one log-sum-exp per query and head; backward makes the scores again from those (FlashAttention-2,
arXiv:2307.08691), so nothing quadratic is stored. On CPU each document goes through PyTorch's own blocked kernel; on
CUDA `attention_triton` does all documents in one launch. Shapes decide everything there, no value is read by the host,
so a CUDA graph can hold both.

Shapes: T tokens, h query heads, g key/value heads (h is a multiple of g), d head width, n tokens of one document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fitune.errors import ConfigError
from fitune.kernels.launch import use_triton

MAX_HEAD_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Documents:
    """Where the document of each token starts and ends; padding is a document too, or one per token.

    Attributes:
        start_T: (T,) int32, index of the first token of the token's document.
        end_T: (T,) int32, index past the last token of the token's document.
        until_T: (T,) int32, index past the last token of the document's prefix, whose tokens see each other both ways
            (UniLM, arXiv:1905.03197); from start (no prefix) to end. None: no document has one.
    """

    start_T: torch.Tensor
    end_T: torch.Tensor
    until_T: torch.Tensor | None = None


@dataclass(frozen=True)
class Scoring:
    """How a query scores the keys it sees.

    Attributes:
        documents: which keys a query sees.
        scale: factor of q . k, positive.
        slopes_h: (h,) fp32 or None; ALiBi (arXiv:2108.12409) adds slope * (key index - query index).
    """

    documents: Documents
    scale: float
    slopes_h: torch.Tensor | None = None


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values, or the gradients of them: bf16, fp16 or fp32, unit stride in d, any stride of rows.

    Attributes:
        q_Thd: (T, h, d). Query head i reads key head i // (h / g).
        k_Tgd, v_Tgd: (T, g, d). The stride of heads is that of q.
    """

    q_Thd: torch.Tensor
    k_Tgd: torch.Tensor
    v_Tgd: torch.Tensor

    @staticmethod
    def of_rows(rows_Tn: torch.Tensor, heads: int, kv_heads: int) -> QKV:
        """Views into one buffer of rows [q | k | v], n = (h + 2 g) d."""
        every = heads + 2 * kv_heads
        rows_Thd = rows_Tn.view(len(rows_Tn), every, rows_Tn.shape[1] // every)
        return QKV(rows_Thd[:, :heads], rows_Thd[:, heads : heads + kv_heads], rows_Thd[:, heads + kv_heads :])

    @staticmethod
    def of_heads(rows_Tn: torch.Tensor, heads: int) -> QKV:
        """Views into one buffer of rows that hold [q | k | v] of one head after another, n = 3 h d."""
        rows_Th3d = rows_Tn.view(len(rows_Tn), heads, 3, rows_Tn.shape[1] // (3 * heads))
        return QKV(*rows_Th3d.unbind(2))


class Workspace(NamedTuple):
    """Memory of the backward pass.

    Attributes:
        delta_hT: (h, T) fp32, contiguous.
        spare: (n,) memory of any dtype that starts on 16 bytes: with it few key/value heads keep more of the GPU
            busy. None: there is none.
    """

    delta_hT: torch.Tensor
    spare: torch.Tensor | None = None


def attention(qkv: QKV, scoring: Scoring, out_Thd: torch.Tensor, lse_hT: torch.Tensor) -> None:
    """Write softmax(scale q k^T + slope (key - query)) v over the keys a query sees.

    Args:
        qkv: read only.
        scoring: documents, scale, slopes.
        out_Thd: (T, h, d) of q's dtype, unit stride in d. Written.
        lse_hT: (h, T) fp32, contiguous: natural logarithm of the sum of exp(score). Written.
    Raises:
        ConfigError: heads wider than 256, or a dtype that is not bf16, fp16 or fp32.
    Memory: on CUDA nothing. On CPU the output of one document; with slopes or a prefix one (n, n) mask besides.
    Source: FlashAttention-2, arXiv:2307.08691. Differs: documents by index range, not by a list of lengths.
    """
    _check(qkv)
    if use_triton(qkv.q_Thd):
        from fitune.kernels.attention_triton import attention_triton

        attention_triton(qkv, scoring, out_Thd, lse_hT)
    else:
        attention_reference(qkv, scoring, out_Thd, lse_hT)


def attention_backward(
    qkv: QKV,
    scoring: Scoring,
    dout_Thd: torch.Tensor,
    out_Thd: torch.Tensor,
    lse_hT: torch.Tensor,
    dqkv: QKV,
    workspace: Workspace,
) -> None:
    """Write the gradients of q, k and v; the same bits in every run on GPUs with as many processors.

    Args:
        qkv, scoring: as in the forward pass. Read only.
        dout_Thd: (T, h, d) gradient of the output, q's dtype, unit stride in d. Read only.
        out_Thd, lse_hT: what the forward pass wrote. Read only.
        dqkv: shapes and dtype of qkv, unit stride in d. Written, not added to. dk may be k's own memory and dv v's, and
            dq may be out's; dq may not share memory with q or dout.
        workspace: used on CUDA.
    Raises:
        ConfigError: heads wider than 256, or a dtype that is not bf16, fp16 or fp32.
    Memory: on CUDA nothing. On CPU the gradients of one document; with slopes or a prefix one (n, n) mask besides.
    Source: FlashAttention-2, arXiv:2307.08691. Differs: dq has its own pass over the keys; no atomic sums.
    """
    _check(qkv)
    if use_triton(qkv.q_Thd):
        from fitune.kernels.attention_triton import attention_backward_triton

        attention_backward_triton(qkv, scoring, dout_Thd, out_Thd, lse_hT, dqkv, workspace)
    else:
        attention_backward_reference(qkv, scoring, dout_Thd, out_Thd, lse_hT, dqkv)


def _check(qkv: QKV) -> None:
    width, dtype = qkv.q_Thd.shape[2], qkv.q_Thd.dtype
    if width > MAX_HEAD_DIM:
        raise ConfigError(
            f"The model's attention heads are {width} wide; the engine's attention takes at most {MAX_HEAD_DIM}. "
            "Train this model on the plain path."
        )
    if dtype not in _DTYPES:
        raise ConfigError(f"Attention got {dtype}; it takes bf16, fp16 or fp32. Set model.dtype to one of them.")


def attention_reference(qkv: QKV, scoring: Scoring, out_Thd: torch.Tensor, lse_hT: torch.Tensor) -> None:
    """`attention` in plain PyTorch on CPU, document by document."""
    group = qkv.q_Thd.shape[1] // qkv.k_Tgd.shape[1]
    alone_N = _one_token_documents(scoring.documents)
    out_Thd[alone_N] = qkv.v_Tgd[alone_N].repeat_interleave(group, 1)
    k_Nhd = qkv.k_Tgd[alone_N].repeat_interleave(group, 1).float()
    lse_hT[:, alone_N] = (qkv.q_Thd[alone_N].float() * k_Nhd).sum(-1).T * scoring.scale
    for span in _spans(scoring.documents):
        for part in _parts(qkv, scoring, span):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _batched(qkv.q_Thd, span, part.q),
                _batched(qkv.k_Tgd, span, part.kv),
                _batched(qkv.v_Tgd, span, part.kv),
                0.0,
                part.mask is None,
                attn_mask=part.mask,
                scale=scoring.scale,
            )
            _batched(out_Thd, span, part.q).copy_(out)
            lse_hT[part.q, span] = lse[0]


def attention_backward_reference(
    qkv: QKV, scoring: Scoring, dout_Thd: torch.Tensor, out_Thd: torch.Tensor, lse_hT: torch.Tensor, dqkv: QKV
) -> None:
    """`attention_backward` in plain PyTorch on CPU, document by document."""
    kv_heads, width = qkv.k_Tgd.shape[1:]
    group = qkv.q_Thd.shape[1] // kv_heads
    alone_N = _one_token_documents(scoring.documents)
    dqkv.q_Thd[alone_N] = 0
    dqkv.k_Tgd[alone_N] = 0
    dout_Nhd = dout_Thd[alone_N].float()
    dqkv.v_Tgd[alone_N] = dout_Nhd.view(len(alone_N), kv_heads, group, width).sum(2).to(dout_Thd.dtype)
    for span in _spans(scoring.documents):
        dk_gnd = torch.zeros(kv_heads, span.stop - span.start, width)
        dv_gnd = torch.zeros_like(dk_gnd)
        for part in _parts(qkv, scoring, span):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _batched(dout_Thd, span, part.q),
                _batched(qkv.q_Thd, span, part.q),
                _batched(qkv.k_Tgd, span, part.kv),
                _batched(qkv.v_Tgd, span, part.kv),
                _batched(out_Thd, span, part.q),
                lse_hT[None, part.q, span],
                0.0,
                part.mask is None,
                attn_mask=part.mask,
                scale=scoring.scale,
            )
            _batched(dqkv.q_Thd, span, part.q).copy_(dq)
            dk_gnd[part.kv] += dk[0]
            dv_gnd[part.kv] += dv[0]
        dqkv.k_Tgd[span] = dk_gnd.transpose(0, 1).to(dqkv.k_Tgd.dtype)
        dqkv.v_Tgd[span] = dv_gnd.transpose(0, 1).to(dqkv.v_Tgd.dtype)


class _Part(NamedTuple):
    """Heads that go through PyTorch's kernel together: as many query as key/value heads, so nothing is expanded."""

    q: slice
    kv: slice
    mask: torch.Tensor | None


def _parts(qkv: QKV, scoring: Scoring, span: slice) -> Iterator[_Part]:
    heads, kv_heads = qkv.q_Thd.shape[1], qkv.k_Tgd.shape[1]
    group, dtype = heads // kv_heads, qkv.q_Thd.dtype
    unseen_nn = _unseen(scoring.documents, span)
    if scoring.slopes_h is None:
        zeros_11 = torch.zeros(1, 1, dtype=dtype)
        mask = None if unseen_nn is None else zeros_11.where(~unseen_nn, float("-inf"))[None, None]
        for member in range(group):
            yield _Part(slice(member, None, group), slice(None), mask)
        return
    position_n = torch.arange(span.stop - span.start, dtype=torch.float32)
    unseen_nn = position_n > position_n[:, None] if unseen_nn is None else unseen_nn
    for head in range(heads):
        mask_nn = (position_n - position_n[:, None]).mul_(scoring.slopes_h[head])
        mask_nn.masked_fill_(unseen_nn, float("-inf"))
        kv_head = head // group
        yield _Part(slice(head, head + 1), slice(kv_head, kv_head + 1), mask_nn.to(dtype)[None, None])


def _unseen(documents: Documents, span: slice) -> torch.Tensor | None:
    """(n, n) bool, True where a query of the document does not see a key; None if that is what comes after it."""
    prefix = 0 if documents.until_T is None else int(documents.until_T[span.start]) - span.start
    if prefix < 2:  # one token sees itself anyway
        return None
    position_n = torch.arange(span.stop - span.start)
    return (position_n > position_n[:, None]) & (position_n >= prefix)


def _batched(x_Thd: torch.Tensor, span: slice, part: slice) -> torch.Tensor:
    return x_Thd[span, part].transpose(0, 1)[None]


def _one_token_documents(documents: Documents) -> torch.Tensor:
    return (documents.end_T - documents.start_T == 1).nonzero()[:, 0]


def _spans(documents: Documents) -> list[slice]:
    """Documents of two tokens and more, in order."""
    start_T, end_T = documents.start_T, documents.end_T
    first_T = (start_T == torch.arange(len(start_T))) & (end_T - start_T > 1)
    return [slice(start, end) for start, end in zip(start_T[first_T].tolist(), end_T[first_T].tolist(), strict=True)]
