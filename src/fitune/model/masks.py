"""Which keys a query may see: documents in a packed row, and padding.

Shapes: B rows, T queries (the last T of the keys), S keys; B is 1 where all rows agree.
"""

from __future__ import annotations

import torch


def documents(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """Number of the document each token belongs to (B, T): a new one begins wherever positions do not go up by one."""
    starts_BT = torch.ones_like(position_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = position_ids_BT.diff() != 1
    return starts_BT.cumsum(-1)


def same_document(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, T) bool: query and key stand in one document of a packed row."""
    documents_BT = documents(position_ids_BT)
    return documents_BT[:, :, None] == documents_BT[:, None, :]


def is_right_padded(attention_mask_BS: torch.Tensor) -> bool:
    """Whether pads, if any, stand behind all tokens: a causal query then never meets one, and no mask is needed."""
    return bool((attention_mask_BS[:, 1:] <= attention_mask_BS[:, :-1]).all())


def causal(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(1, T, S) bool: the key does not stand behind the query."""
    return torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def without_pads(visible_BTS: torch.Tensor, attention_mask_BS: torch.Tensor) -> torch.Tensor:
    """`visible_BTS` without padded keys; every query keeps itself, so that a pad's softmax has something to sum."""
    _, num_queries, num_keys = visible_BTS.shape
    itself_TS = torch.eye(num_keys, dtype=torch.bool, device=visible_BTS.device)[-num_queries:]
    return visible_BTS & attention_mask_BS.bool()[:, None] | itself_TS
