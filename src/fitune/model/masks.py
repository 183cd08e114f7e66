"""Which keys a query may see, and the bias that tells scaled_dot_product_attention.

Shapes: B rows, T queries (the last T of the keys), S keys, H heads; B is 1 where all rows agree.
"""

from __future__ import annotations

import torch

_ALIGNMENT = 8  # elements: the fused CUDA kernels copy a bias whose rows begin elsewhere, in every layer


def documents(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """Number of the document each token belongs to, from 1 (B, T): one begins where positions do not go up by one."""
    starts_BT = torch.ones_like(position_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = position_ids_BT.diff() != 1
    return starts_BT.cumsum(-1)


def same_document(documents_BS: torch.Tensor, num_queries: int) -> torch.Tensor:
    """(B, T, S) bool: query and key stand in one document."""
    return documents_BS[:, -num_queries:, None] == documents_BS[:, None, :]


def is_right_padded(attention_mask_BS: torch.Tensor) -> bool:
    """Whether pads, if any, stand behind all tokens: a causal query then never meets one, and no mask is needed."""
    return bool((attention_mask_BS[:, 1:] <= attention_mask_BS[:, :-1]).all())


def causal(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(1, T, S) bool: the key does not stand behind the query."""
    return torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def without_pads(visible_BTS: torch.Tensor, attention_mask_BS: torch.Tensor) -> torch.Tensor:
    """`visible_BTS` without padded keys; every query keeps itself, so that a pad's softmax has something to sum."""
    _, num_queries, num_keys = visible_BTS.shape
    index_S = torch.arange(num_keys, device=visible_BTS.device)
    itself_TS = index_S[-num_queries:, None] == index_S
    return visible_BTS & attention_mask_BS.bool()[:, None] | itself_TS


def empty_bias(rows: int, heads: int, queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised bias (rows, heads, queries, keys) in dtype and on device of `like`, its rows aligned."""
    width = -(-keys // _ALIGNMENT) * _ALIGNMENT
    return torch.empty(rows, heads, queries, width, dtype=like.dtype, device=like.device)[..., :keys]


def additive(visible_BTS: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """0 where a key is seen, -infinity elsewhere: (B, 1, T, S), for all heads."""
    rows, num_queries, num_keys = visible_BTS.shape
    bias_B1TS = empty_bias(rows, 1, num_queries, num_keys, like).zero_()
    return bias_B1TS.masked_fill_(~visible_BTS[:, None], float("-inf"))
