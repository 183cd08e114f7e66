"""Virtual tokens in front of every document: prompt tuning, P-tuning, prefix tuning.

Each document of a micro-step has P rows more, which run through all blocks like tokens. What PEFT's encoder makes is
written over some of their values, and the gradients found there, summed over documents in fp32, are the gradient of
the encoder's output, which autograd takes on to the encoder's parameters:

    prompt, P-tuning: rows of the first block's input (behind the norm of the embedding, if there is one)
    prefix: keys and values of every block. Nothing else of such a row reaches a real token, and its gradient is zero.

The encoder runs outside the blocks' functions and graphs, once for each micro-step; tables and gradients between them
are static.

Shapes: L blocks, P virtual tokens of a document, g key/value heads, d their width, H hidden, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitune.engine.spec import BlockSpec, Unsupported, base_of
from fitune.kernels.attention import QKV
from fitune.kernels.virtual import place_rows, take_rows

EMBEDDED, PREFIX = ("PROMPT_TUNING", "P_TUNING"), "PREFIX_TUNING"  # PEFT's names


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one block's virtual tokens, and where their gradients go (fp32): (P, g, d) each."""

    keys_Pgd: torch.Tensor
    values_Pgd: torch.Tensor
    dkeys_Pgd: torch.Tensor
    dvalues_Pgd: torch.Tensor

    def place(self, qkv: QKV, first_D: torch.Tensor) -> None:
        """Put them where the virtual tokens' own keys and values stand, which are rotated already: these are not."""
        place_rows(self.keys_Pgd, first_D, qkv.k_Tgd)
        place_rows(self.values_Pgd, first_D, qkv.v_Tgd)

    def take(self, dqkv: QKV, first_D: torch.Tensor) -> None:
        """Keep their gradients; nothing else learns from those."""
        take_rows(dqkv.k_Tgd, first_D, self.dkeys_Pgd)
        take_rows(dqkv.v_Tgd, first_D, self.dvalues_Pgd)


class Virtual:
    """The virtual tokens of a model that PEFT wrapped; `virtual_tokens` makes one.

    Args:
        model: PEFT's, with one active encoder.
        layers: blocks.
        dtype: of the model.

    Memory: `plan.saves.virtual_bytes`; while a micro-step runs also what autograd keeps of the encoder.
    """

    def __init__(self, model: Any, spec: BlockSpec, layers: int, dtype: torch.dtype) -> None:
        name, settings = model.active_adapter, model.active_peft_config
        self.count: int = settings.num_virtual_tokens
        self.embedded = settings.peft_type in EMBEDDED
        self._encoder, self._tokens_P = model.prompt_encoder[name], model.prompt_tokens[name][: self.count]
        self._norm = (
            base_of(model).get_submodule(spec.embedding_norm) if spec.embedding_norm and self.embedded else None
        )
        device = self._encoder.embedding.weight.device
        self._dtype, self._tokens_P = dtype, self._tokens_P.to(device)
        width: int = settings.token_dim
        if self.embedded:
            shape: tuple[int, ...] = (self.count, 1, width)
        else:
            heads: int = settings.num_attention_heads  # PEFT counts key/value heads here
            shape = (layers, 2, self.count, heads, width // heads)
        self.table = torch.empty(shape, dtype=dtype, device=device)
        self.gradient = torch.zeros(shape, device=device)
        self._made: torch.Tensor | None = None

    def refresh(self, training: bool) -> None:
        """Run the encoder; in training with its dropout, and autograd keeps what `hand_back` needs."""
        self._encoder.train(training)
        with torch.set_grad_enabled(training):
            made = self._encoder(self._tokens_P[None])[0]
            if self.embedded:
                if self._norm is not None:
                    made = self._norm(made.to(self._dtype))
                made = made[:, None]
            else:  # PEFT's rows are L times keys and values of all heads
                layers, _, count, *heads = self.table.shape
                made = made.view(count, layers, 2, *heads).permute(1, 2, 0, 3, 4)
        self.table.copy_(made.detach())
        self._made = made if training else None

    def hand_back(self) -> None:
        """Add to the gradients of the encoder's parameters what the backward pass left in `gradient`."""
        assert self._made is not None, "the encoder has not run in training"
        # In this thread: in autograd's own the libraries would make themselves another workspace.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.backward(self._made, self.gradient.to(self._made.dtype))
        self._made = None

    def prefix(self, layer: int) -> Prefix | None:
        """What a block has to place; None if virtual tokens are embedded."""
        if self.embedded:
            return None
        return Prefix(*self.table[layer], *self.gradient[layer])

    def place(self, x_TH: torch.Tensor, first_D: torch.Tensor) -> None:
        """Put embedded virtual tokens into the first block's input."""
        if self.embedded:
            place_rows(self.table, first_D, x_TH[:, None])

    def take(self, d_TH: torch.Tensor, first_D: torch.Tensor) -> None:
        """Keep the gradient of embedded virtual tokens from that of the first block's input."""
        if self.embedded:
            take_rows(d_TH[:, None], first_D, self.gradient)


def virtual_tokens(model: Any, spec: BlockSpec, layers: int, dtype: torch.dtype) -> Virtual | None:
    """The virtual tokens that a model trains; None if it has none.

    Raises:
        Unsupported: it has some of another kind, or trains something besides.
    """
    settings = getattr(model, "active_peft_config", None)
    if settings is None or not settings.is_prompt_learning:
        return None
    if settings.peft_type not in (*EMBEDDED, PREFIX):
        raise Unsupported(f"virtual tokens of the kind {settings.peft_type.value}")
    _check_trained(model)
    return Virtual(model, spec, layers, dtype)


def _check_trained(model: nn.Module) -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name in trained if not name.startswith("prompt_encoder.")]
    if others or not trained:
        raise Unsupported(f"trains {others[0]} beside virtual tokens" if others else "trains nothing")
