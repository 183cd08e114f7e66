"""ChatGLM-6B, the first version, which transformers does not have: its modules under their published names.

What sets it apart: a prefix-LM mask and two position rows (`prefix_lm.py`); queries, keys and values of one head side
by side in one projection; LayerNorms whose *output* is carried along the residual, times a constant; a plain MLP.
The maths was read from the published model; no code of a model folder runs.

Shapes: B rows, T tokens of this call, S tokens so far, N width, H heads, D = N / H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from fitune.errors import ConfigError
from fitune.model.prefix_lm import Places, find_places, prefix_bias, rotary_tables, rotate
from fitune.plan.chatglm import BLANK_IDS, Blank, check_version_1

# sqrt(2 * 28) in every published model, however many layers it has: the original never passes its number of layers on.
ALPHA = math.sqrt(2 * 28)


class ChatGLMConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """config.json of the original, key by key; other keys are kept and written back."""

    model_type: ClassVar[str] = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    bos_token_id: int = BLANK_IDS["bos_token_id"]
    gmask_token_id: int = BLANK_IDS["gmask_token_id"]
    mask_token_id: int = BLANK_IDS["mask_token_id"]
    eos_token_id: int = 130005
    pad_token_id: int = 3
    use_cache: bool = True
    tie_word_embeddings: bool = True  # what transformers took for granted when the model was published


def read_config(raw: Mapping[str, Any]) -> ChatGLMConfig:
    """The configuration out of config.json.

    Raises:
        ConfigError: a variant whose maths or files are not those of ChatGLM-6B, or a value of the wrong kind.
    """
    check_version_1(raw)
    try:
        return ChatGLMConfig(**raw)
    except (TypeError, ValueError, AttributeError) as error:  # transformers checks the types of the keys
        raise ConfigError(f"config.json: {' '.join(str(error).split()):.300}") from error


class _Attention(nn.Module):
    def __init__(self, config: ChatGLMConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, tables: tuple[torch.Tensor, torch.Tensor], past: Any
    ) -> torch.Tensor:
        fused = self.query_key_value(x).unflatten(-1, (self.num_heads, 3, -1)).transpose(1, 2)  # (B, H, T, 3, D)
        queries, keys, values = fused.unbind(-2)
        queries, keys = rotate(queries, *tables), rotate(keys, *tables)
        if past is not None:
            keys, values = past.update(keys, values, self.number)
        context_BHTD = F.scaled_dot_product_attention(queries, keys, values, bias)
        out: torch.Tensor = self.dense(context_BHTD.transpose(1, 2).flatten(2))
        return out


class _MLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))
        return out


class _Block(GradientCheckpointingLayer):  # type: ignore[misc]
    """a = LN1(x); x = a ALPHA + Attention(a); b = LN2(x); y = b ALPHA + MLP(b)."""

    def __init__(self, config: ChatGLMConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = _Attention(config, number)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = _MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Any = None,
    ) -> torch.Tensor:
        a = self.input_layernorm(x)
        x = a * ALPHA + self.attention(a, bias, tables, past_key_values)
        b = self.post_attention_layernorm(x)
        out: torch.Tensor = b * ALPHA + self.mlp(b)
        return out


class _PreTrained(PreTrainedModel):  # type: ignore[misc]
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["_Block"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$"]  # computed, see rotary_angles


class ChatGLMModel(_PreTrained):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, number) for number in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.word_embeddings = value

    def forward(self, x_BTN: torch.Tensor, places: Places, past_key_values: Any = None) -> torch.Tensor:
        """Hidden states (B, T, N) of embedded tokens, the last T of `places`."""
        num_tokens, head_dim = x_BTN.shape[1], self.config.hidden_size // self.config.num_attention_heads
        bias = prefix_bias(places, num_tokens, x_BTN)
        tables = rotary_tables(places.rows_B2S[:, :, -num_tokens:], head_dim, x_BTN.dtype)
        for layer in self.layers:
            x_BTN = layer(x_BTN, bias, tables, past_key_values=past_key_values)
        out: torch.Tensor = self.final_layernorm(x_BTN)
        return out


class ChatGLMForConditionalGeneration(_PreTrained, GenerationMixin):  # type: ignore[misc]
    """The model with its head; config.json records its name, which is the original's."""

    reads_token_ids = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.blank = Blank(config.bos_token_id, config.gmask_token_id, config.mask_token_id)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, T, V).

        Args:
            input_ids: (B, T), or `inputs_embeds` (B, T, N).
            attention_mask: (B, S), 1 for tokens, 0 for pads on any side; None: no pads.
            position_ids: (B, T); where they restart, a document of a packed row begins. Read without a mask.
            past_key_values: a transformers Cache.
            token_ids: all ids so far, past ones included; by default input_ids. They tell where the answer begins, so
                cached steps need them, and embeddings whose ids are not known otherwise. Virtual tokens (of prompt or
                prefix tuning) have none: they stand before these ids, in the context.
            kwargs: `use_cache`, by default as the configuration says.
        Raises:
            ValueError: nothing tells where the answer begins, or something is asked for that the model does not do.
        """
        use_cache, renamed = kwargs.pop("use_cache", None), kwargs.pop("cache", None)  # in transformers 5.24
        past_key_values = renamed if past_key_values is None else past_key_values
        odd = sorted(key for key, value in kwargs.items() if value is not None and value is not False)
        if odd not in ([], ["return_dict"]):
            raise ValueError(f"fitune's ChatGLM-6B does not take {', '.join(odd)}; it gives logits")
        x_BTN = self.transformer.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        ids = self._all_ids(input_ids, token_ids, past)
        virtual = past + x_BTN.shape[1] - ids.shape[1]
        places = find_places(F.pad(ids, (virtual, 0), value=-1), self.blank, attention_mask, position_ids)
        recomputes = self.transformer.gradient_checkpointing and self.training
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache) and not recomputes:
            past_key_values = DynamicCache(config=self.config)
        hidden_BTN = self.transformer(x_BTN, places, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(None, self.lm_head(hidden_BTN[:, kept]), past_key_values)

    def _all_ids(self, input_ids: torch.Tensor | None, token_ids: torch.Tensor | None, past: int) -> torch.Tensor:
        if token_ids is not None:
            return token_ids
        if input_ids is None:
            raise ValueError("ChatGLM-6B: give token_ids beside inputs_embeds, they tell where the answer begins")
        if past and not (input_ids == self.blank.sop).any(-1).all():
            raise ValueError("ChatGLM-6B: a cached step needs token_ids, all ids so far; `generate` gives them")
        return input_ids

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, cache: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, which cuts `input_ids` to the new ones, with all of them as `token_ids`.

        `generate` refuses a `cache` that is not named here (transformers 5.24).
        """
        if cache is not None:
            kwargs["cache"] = cache
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)  # ours come from the tokens
        return inputs | {"token_ids": input_ids}
