"""Positions, mask and rotation of ChatGLM-6B, the first version: a context seen as a whole, then an answer.

GLM (arXiv:2103.10360) fills in a blank: the context ends with [gMASK], the answer begins with `sop`. Tokens before sop
see the whole context, those from sop on see what stands before them. Each token has two positions: its place in the
context (in the answer: that of the blank), and its place in the answer (0 in the context).

    context  gMASK  sop  answer        5 74874 130001 130004 5 74874 35
    row 0    0 1    2    2   2 2 2     row 1    0 0 0 1 2 3 4

Shapes: B rows, T queries (the last T of the keys), S keys, H heads, D width of a head, F = D / 4 frequencies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fitune.model.masks import additive, causal, documents, same_document, without_pads
from fitune.plan.chatglm import Blank

BASE = 10000.0


class Places(NamedTuple):
    """Where each token stands.

    Attributes:
        rows_B2S: int64, the two position rows; 0 for pads.
        documents_BS: int64, the document of a packed row, 0 for pads; None: one document and no pads.
    """

    rows_B2S: torch.Tensor
    documents_BS: torch.Tensor | None

    @property
    def context_BS(self) -> torch.Tensor:
        """Bool: the token stands before its document's sop, so everybody in the document sees it."""
        return self.rows_B2S[:, 1] == 0


def find_places(
    input_ids_BS: torch.Tensor,
    blank: Blank,
    attention_mask_BS: torch.Tensor | None = None,
    position_ids_BS: torch.Tensor | None = None,
) -> Places:
    """Both position rows, from the tokens alone.

    Args:
        input_ids_BS: all tokens, past ones included. A document without sop is all context, its answer still to come.
        attention_mask_BS: 1 for tokens, 0 for pads, on any side; None: no pads.
        position_ids_BS: ordinary positions; where they restart, a document of a packed row begins. Read without a mask.
    """
    if attention_mask_BS is not None:
        real_BS = attention_mask_BS.bool()
        index_BS = (real_BS.cumsum(-1) - 1).clamp(min=0)
        documents_BS = real_BS.long()
    elif position_ids_BS is not None:
        index_BS = position_ids_BS.expand_as(input_ids_BS)
        documents_BS = documents(index_BS)
    else:
        index_BS = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device).expand_as(input_ids_BS)
        documents_BS = torch.ones_like(index_BS)
    far = input_ids_BS.shape[1]

    def first(token: int) -> torch.Tensor:
        """Index of the first such token in each token's document; `far` if there is none."""
        hits_BS = torch.where((input_ids_BS == token) & (documents_BS > 0), index_BS, far)
        table = hits_BS.new_full((len(hits_BS), far + 1), far)
        return table.scatter_reduce(1, documents_BS, hits_BS, "amin").gather(1, documents_BS)

    sop_BS, gmask_BS, mask_BS = (first(token) for token in blank)
    blank_BS = torch.where(gmask_BS < far, gmask_BS, torch.where(mask_BS < far, mask_BS, (sop_BS - 1).clamp(min=0)))
    in_context = index_BS < sop_BS
    rows = (torch.where(in_context, index_BS, blank_BS), torch.where(in_context, 0, index_BS - sop_BS + 1))
    rows_B2S = torch.stack(rows, 1) * (documents_BS > 0)[:, None]
    known = attention_mask_BS is not None or position_ids_BS is not None
    return Places(rows_B2S, documents_BS if known else None)


def prefix_bias(places: Places, num_queries: int, like: torch.Tensor) -> torch.Tensor | None:
    """0 where a query sees a key, else -infinity (B, 1, T, S); None where every query sees every key.

    Args:
        like: gives the dtype.
    """
    context_BS, documents_BS = places.context_BS, places.documents_BS
    if num_queries == 1 and documents_BS is None:
        return None
    num_keys = context_BS.shape[1]
    visible_BTS = causal(num_queries, num_keys, context_BS.device) | context_BS[:, None]
    if documents_BS is not None:
        visible_BTS = visible_BTS & same_document(documents_BS, num_queries)
        visible_BTS = without_pads(visible_BTS, documents_BS)
    return additive(visible_BTS, like)


def rotary_angles(rows_B2T: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Angles of both position rows [radian], (B, 2, T, F).

    The frequencies are rounded to fp16, as they are stored. In fp16 the published code rounds the angles, too, by up to
    0.5 rad beyond position 1024: the model was trained with those, so fp16 repeats them. Else fp32.
    """
    half = head_dim // 2
    frequencies_F = 1.0 / (BASE ** (torch.arange(0, half, 2, device=rows_B2T.device).float() / half))
    frequencies_F = frequencies_F.half()
    if dtype == torch.float16:
        return rows_B2T[..., None].half() * frequencies_F
    return rows_B2T[..., None].float() * frequencies_F.float()


def rotary_tables(rows_B2T: torch.Tensor, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for `rotate`, (B, 1, T, 2, F) in `dtype`."""
    angles_BT2F = rotary_angles(rows_B2T, head_dim, dtype).transpose(1, 2)
    return angles_BT2F.cos().to(dtype)[:, None], angles_BT2F.sin().to(dtype)[:, None]


def rotate(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first half of each head by row 0, the second by row 1; pairs are (i, i + F) inside a half."""
    a, b = x_BHTD.view(*x_BHTD.shape[:-1], 2, 2, -1).unbind(-2)  # (B, H, T, 2, F) each
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -2).flatten(-3)
