"""How the loop sees a model: a batch goes in, a loss sum comes out, gradients are added.

`PlainPath` runs transformers' modules with PEFT's forward. It is the reference for every faster path and the
fallback for architectures that have none.

Shapes: B rows, T tokens, V vocabulary, N supervised positions.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fitune.data.batches import IGNORE, Batch, pack
from fitune.data.prepare import Row
from fitune.engine.spec import base_of
from fitune.errors import ConfigError


class Path(Protocol):
    """Forward and backward of one micro batch."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum over supervised tokens of the cross-entropy [nats], fp32 scalar; no gradient."""

    def loss_and_grad(self, batch: Batch, scale: float) -> torch.Tensor:
        """The same sum; adds scale * d(sum)/d(parameter) to the gradients of the trainable parameters."""


class PlainPath:
    """transformers' forward; full logits, cross-entropy in fp32.

    Args:
        model: a causal model of transformers, possibly wrapped by PEFT, on `device`.
        activation_checkpointing: recompute each block's activations in the backward pass.
    """

    def __init__(self, model: nn.Module, device: torch.device, activation_checkpointing: bool = False) -> None:
        self.model = model
        self.device = device
        if activation_checkpointing:
            enable_checkpointing(model)

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Path.loss`."""
        self.model.eval()
        with torch.no_grad():
            return self._loss_sum(batch)

    def loss_and_grad(self, batch: Batch, scale: float) -> torch.Tensor:
        """See `Path.loss_and_grad`."""
        self.model.train()
        loss = self._loss_sum(batch)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        batch = batch.to(self.device)
        logits_BTV = forward(self.model, batch)
        targets_BT = batch.labels_BT[:, 1:]
        learn_BT = targets_BT != IGNORE
        # Only supervised positions are made fp32: a copy of all logits would be the largest tensor of the step.
        logits_NV = logits_BTV[:, :-1][learn_BT].float()
        return F.cross_entropy(logits_NV, targets_BT[learn_BT], reduction="sum")


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (B, T, V) of a batch on the model's device; those of virtual tokens in front of it are left out."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids_BT, "use_cache": False}
    if batch.attention_mask_BT is None:
        # transformers finds documents by restarting positions only when there is no mask at all.
        arguments["position_ids"] = batch.position_ids_BT
    else:
        arguments["attention_mask"] = batch.attention_mask_BT
    if getattr(base_of(model), "reads_token_ids", False):  # PEFT hands embeddings on where it adds virtual tokens
        arguments["token_ids"] = batch.input_ids_BT
    logits: torch.Tensor = model(**arguments).logits
    return logits[:, -batch.input_ids_BT.shape[1] :]


def enable_checkpointing(model: nn.Module) -> None:
    """Turn on activation checkpointing; works with frozen embeddings without any call by the user.

    Non-reentrant checkpointing finds the adapters inside a block by itself, so the embedding output needs no
    gradient and nothing below the first trainable parameter is computed backwards.
    """
    base = base_of(model)
    # Renamed within transformers 5; the old name goes with version 6.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def check_packing(model: nn.Module, device: torch.device, rows: list[Row]) -> None:
    """Refuse packing for a model that lets documents see each other.

    Two short documents are run together and apart. Models differ in whether they honour restarting positions, and
    one that does not trains on contaminated rows without any sign of it.

    Raises:
        ConfigError: the logits of the second document depend on the first.
    """
    heads = [_head_of(row, 24) for row in rows[:2]]
    if len(heads) < 2:
        return
    model.eval()
    with torch.no_grad():
        together_TV = forward(model, pack(heads).to(device))[0].float()
        alone_TV = torch.cat([forward(model, pack([head]).to(device))[0].float() for head in heads])
    error = ((together_TV - alone_TV).norm() / alone_TV.norm()).item()
    # Rows in one sequence share the outlier columns of LLM.int8(), which changes roundings.
    rounds = any(getattr(module, "compute", "") == "llm_int8" for module in model.modules())
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 and not rounds else 5e-2
    if not error <= tolerance:
        raise ConfigError(
            f"data.packing is true, but this model lets packed rows see each other (logits differ by {error:.1%}); "
            "set data.packing=false"
        )


def _head_of(row: Row, num_tokens: int) -> Row:
    return Row(row.input_ids[:num_tokens], row.learn[:num_tokens], row.source)
