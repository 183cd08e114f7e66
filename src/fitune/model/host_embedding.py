"""An embedding in the host's memory: only the rows of a micro-step's tokens are needed, which are few."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class HostEmbedding(nn.Module):
    """A frozen embedding whose weight is page-locked in the host's memory; its output is where the ids are.

    The weight is no parameter: model.to(...) leaves it where it is, and what asks a model's parameters for their device
    hears of the GPU.

    Args:
        embedding: any module with a weight (V, H), on a GPU. Not kept.
    Memory: V * H elements of page-locked host memory; none on the device but the output.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        source_VH = embedding.weight.detach()
        self.weight = torch.empty(source_VH.shape, dtype=source_VH.dtype, pin_memory=source_VH.is_cuda)
        self.weight.copy_(source_VH)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight: (..., H) on the device of `input_ids`."""
        return F.embedding(input_ids.to(self.weight.device), self.weight).to(input_ids.device)


def host_embedding(model: nn.Module, wrapped: nn.Module | None = None) -> torch.Tensor | None:
    """Move a model's frozen input embedding into the host's memory, unless the output head needs it.

    Args:
        model: a transformers model on a GPU, not wrapped.
        wrapped: what PEFT made of it; where tokens are virtual it holds the embedding as well.
    Returns:
        The weight (V, H), page-locked; None where the embedding stayed.
    """
    own: Any = model
    embedding, head = own.get_input_embeddings(), own.get_output_embeddings()
    if isinstance(embedding, HostEmbedding):
        return embedding.weight
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.requires_grad or (head is not None and head.weight is weight):
        return None
    hosted = HostEmbedding(embedding)
    own.set_input_embeddings(hosted)
    whole = model if wrapped is None else wrapped
    for name, module in list(whole.named_modules(remove_duplicate=False)):
        if module is embedding:
            whole.set_submodule(name, hosted)
    return hosted.weight
