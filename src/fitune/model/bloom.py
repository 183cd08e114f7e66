"""BLOOM with attention that scales: fused softmax, relative ALiBi, packed rows.

transformers' BloomAttention keeps every score in fp32 for the backward pass, adds ALiBi (arXiv:2108.12409) as
slope * key position, which 16-bit numbers cannot hold far from the start, and ignores position_ids. Softmax is
invariant to a shift of a query's scores, so slope * (key - query) is the same function with small numbers where the
weights are large. These classes are transformers' own with other forwards: names, weights and files are the same.

Shapes: B rows, T queries, S keys (past ones included), H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.bloom import modeling_bloom as stock

from fitune.model.masks import causal, documents, empty_bias, is_right_padded, same_document, without_pads


class BloomAttention(stock.BloomAttention):  # type: ignore[misc]  # transformers is untyped
    """Self-attention over a ready-made bias.

    Kept for the backward pass: queries, keys and values (one tensor), the output and one fp32 number per query and
    head; the bias is shared by all layers.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: None,
        attention_mask: torch.Tensor,
        layer_past: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Residual plus attention (B, T, H D).

        Args:
            attention_mask: the bias of `alibi_bias`, in the dtype of hidden_states.
            layer_past: a transformers Cache that this layer's keys and values are appended to.
        """
        queries, keys, values = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            keys, values = layer_past.update(keys, values, self.layer_idx)
        dropout = self.attention_dropout.p if self.training else 0.0
        context_BHTD = F.scaled_dot_product_attention(
            queries, keys, values, attention_mask, dropout, scale=self.inv_norm_factor
        )
        output = self.dense(context_BHTD.transpose(1, 2).flatten(2))
        return stock.dropout_add(output, residual, self.hidden_dropout, self.training), None


class BloomModel(stock.BloomModel):  # type: ignore[misc]
    """Embedding, blocks, final norm; the bias is built once and handed to every block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, block in enumerate(self.h):
            block.self_attention = BloomAttention(config, number)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """See `BloomForCausalLM.forward`."""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.word_embeddings_layernorm(inputs_embeds)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        bias = alibi_bias(hidden_states, self.num_heads, past, attention_mask, position_ids)
        for block in self.h:
            hidden_states, _ = block(hidden_states, alibi=None, attention_mask=bias, layer_past=past_key_values)
        return BaseModelOutputWithPast(self.ln_f(hidden_states), past_key_values)


class BloomForCausalLM(stock.BloomForCausalLM):  # type: ignore[misc]
    """The model with its head; named like transformers' class, since config.json records the name."""

    def __init__(self, config: Any) -> None:
        super(stock.BloomForCausalLM, self).__init__(config)  # its own would make transformers' blocks first
        self.transformer = BloomModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, T, V).

        Args:
            attention_mask: (B, S), 1 for tokens, 0 for pads on either side; None: no pads.
            position_ids: (B, T); where they restart, a document of a packed row begins. Read only when there is neither
                a mask nor a past: ALiBi itself needs no positions.
        Raises:
            ValueError: something asked for that these classes do not do (labels, attention weights, hidden states).
        """
        past = kwargs.pop("cache", None) if past_key_values is None else past_key_values  # transformers 5.24 renamed it
        odd = sorted(key for key, value in kwargs.items() if value is not None and value is not False)
        if odd not in ([], ["return_dict"]):
            raise ValueError(f"fitune's BLOOM does not take {', '.join(odd)}; it gives logits")
        outputs = self.transformer(input_ids, past, attention_mask, inputs_embeds, position_ids, use_cache)
        hidden_BTN, *now = outputs.to_tuple()
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(None, self.lm_head(hidden_BTN[:, kept]), *now)


def alibi_bias(
    like: torch.Tensor,
    num_heads: int,
    past: int,
    attention_mask_BS: torch.Tensor | None,
    position_ids_BT: torch.Tensor | None,
) -> torch.Tensor:
    """slope * (key - query) where the query sees the key, else -infinity: (1 or B, H, T, S).

    Args:
        like: (B, T, anything); gives dtype, device and T.
        past: keys before the first query.
        attention_mask_BS, position_ids_BT: see `BloomForCausalLM.forward`. Distances count tokens, not pads.
    Memory: itself, and while it is built one fp32 tensor without H. One for all rows unless pads stand on the left.
    """
    num_queries, device = like.shape[1], like.device
    num_keys = past + num_queries
    visible_BTS = causal(num_queries, num_keys, device)
    places_BS = torch.arange(num_keys, device=device)[None]
    if attention_mask_BS is None:
        if position_ids_BT is not None and not past:
            visible_BTS = visible_BTS & same_document(documents(position_ids_BT), num_queries)
    elif not is_right_padded(attention_mask_BS):
        visible_BTS = without_pads(visible_BTS, attention_mask_BS)
        places_BS = attention_mask_BS.cumsum(-1)
    distance_BTS = (places_BS[:, None] - places_BS[:, past:, None]).float().masked_fill(~visible_BTS, float("-inf"))
    bias_BHTS = empty_bias(len(distance_BTS), num_heads, num_queries, num_keys, like)
    for head, slope in enumerate(alibi_slopes(num_heads)):
        bias_BHTS[:, head] = distance_BTS * slope
    return bias_BHTS


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head: 2^(-8 i / n) for the power of two n not above `num_heads`, then every second one of 2n."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power) + 1, 2)]
