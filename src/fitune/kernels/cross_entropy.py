"""Cross entropy of logits, which become their own gradient in place.

The head calls `cross_entropy_` on one chunk of logits at a time; evaluation calls `loss_only`. Numbers that are
not finite are not hidden: a NaN or +inf logit makes its row's loss NaN or inf.
"""

from __future__ import annotations

import torch

from fitune.kernels.launch import require, require_vector, use_triton

IGNORED = -100  # target of a row without a loss, as in torch.nn.functional.cross_entropy


def cross_entropy_(logits_NV: torch.Tensor, targets_N: torch.Tensor, scale: torch.Tensor, loss_N: torch.Tensor) -> None:
    """Write each row's loss and turn the logits into scale * d(sum of losses) / d(logits).

    Args:
        logits_NV: (N, V) read, then overwritten by scale * (softmax - onehot).
        targets_N: (N,) int64 in [0, V), or -100: loss 0 and a zero row of gradient, whatever the logits are.
        scale: () fp32 on the logits' device, so that a graph can be replayed with another one.
        loss_N: (N,) fp32 written: logsumexp(row) - row[target].
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
        RuntimeError: a target outside the vocabulary (on CPU; on CUDA the loss of that row is NaN).
    Memory: none on CUDA (two passes over a row); on CPU about two fp32 copies of the logits.
    """
    _check(logits_NV, targets_N, loss_N)
    if scale.dim() or scale.dtype != torch.float32 or scale.device != logits_NV.device:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, {scale.dtype} on {scale.device}; needed: a float32 tensor of "
            f"shape () on {logits_NV.device}"
        )
    if use_triton(logits_NV):
        from fitune.kernels import cross_entropy_triton

        cross_entropy_triton.cross_entropy_(logits_NV, targets_N, scale, loss_N)
    else:
        cross_entropy_reference(logits_NV, targets_N, scale, loss_N)


def cross_entropy_reference(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, scale: torch.Tensor, loss_N: torch.Tensor
) -> None:
    """Plain PyTorch `cross_entropy_`."""
    counted_N, index_N1, lse_N = _rows(logits_NV, targets_N)
    loss_N.copy_(torch.where(counted_N, lse_N - logits_NV.gather(1, index_N1)[:, 0].float(), 0.0))
    p_NV = torch.exp(logits_NV.float() - lse_N[:, None])
    p_NV.scatter_add_(1, index_N1, torch.full_like(lse_N[:, None], -1.0))
    logits_NV.copy_((p_NV * scale).masked_fill_(~counted_N[:, None], 0.0))


def loss_only(logits_NV: torch.Tensor, targets_N: torch.Tensor, loss_N: torch.Tensor) -> None:
    """Write each row's loss and leave the logits as they are.

    Args:
        logits_NV: (N, V) read.
        targets_N: (N,) int64 in [0, V), or -100: loss 0.
        loss_N: (N,) fp32 written: logsumexp(row) - row[target].
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
        RuntimeError: a target outside the vocabulary (on CPU; on CUDA the loss of that row is NaN).
    Memory: none on CUDA; on CPU one fp32 copy of the logits.
    """
    _check(logits_NV, targets_N, loss_N)
    if use_triton(logits_NV):
        from fitune.kernels import cross_entropy_triton

        cross_entropy_triton.loss_only(logits_NV, targets_N, loss_N)
    else:
        loss_only_reference(logits_NV, targets_N, loss_N)


def loss_only_reference(logits_NV: torch.Tensor, targets_N: torch.Tensor, loss_N: torch.Tensor) -> None:
    """Plain PyTorch `loss_only`."""
    counted_N, index_N1, lse_N = _rows(logits_NV, targets_N)
    loss_N.copy_(torch.where(counted_N, lse_N - logits_NV.gather(1, index_N1)[:, 0].float(), 0.0))


def _rows(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rows count, an index that is valid for the others too, and the logsumexp of each row."""
    counted_N = targets_N != IGNORED
    return counted_N, torch.where(counted_N, targets_N, 0)[:, None], torch.logsumexp(logits_NV.float(), 1)


def _check(logits_NV: torch.Tensor, targets_N: torch.Tensor, loss_N: torch.Tensor) -> None:
    rows, vocabulary = logits_NV.shape
    require("logits_NV", logits_NV, rows, vocabulary)
    require_vector("targets_N", targets_N, rows)
    require_vector("loss_N", loss_N, rows)
    if targets_N.shape != loss_N.shape or targets_N.shape[0] != rows:
        raise ValueError(f"{rows} rows of logits, {targets_N.shape[0]} targets, {loss_N.shape[0]} losses; pass as many")
    if targets_N.dtype != torch.int64 or loss_N.dtype != torch.float32:
        raise ValueError(f"targets are {targets_N.dtype} and losses {loss_N.dtype}; pass int64 and float32")
