"""Virtual tokens in front of every row: prompt tuning, P-tuning, prefix tuning.

    prompt    their embeddings are trained                                   arXiv:2104.08691
    ptuning   a small network makes their embeddings                         arXiv:2103.10385
    prefix    every layer's keys and values are trained, or made by a network, arXiv:2101.00190

PEFT has the modules and the file, which holds the finished vectors: networks are training aids and stay in the
checkpoints. Generation goes past PEFT: its own puts padding between virtual tokens and prompt, which shifts the
positions of every row that is not the longest of its batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fitune.config import MethodConfig, PrefixConfig, PromptConfig, PtuningConfig
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.methods import adapters
from fitune.methods.base import Method, Tensors, copy_into, trainable
from fitune.model.libraries import cache_name, import_peft
from fitune.model.load import Base

COMMON_TOKENS = 5_000  # vocabularies begin with what is frequent; the paper draws from as many


def _prompt(base: Base, config: MethodConfig) -> nn.Module:
    assert isinstance(config, PromptConfig)
    settings = import_peft().PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens, prompt_tuning_init="RANDOM"
    )
    model = adapters.wrap(base.model, settings)
    if config.init != "random":
        embedding: Any = base.model.get_input_embeddings()  # type: ignore[operator]  # a transformers model
        ids = start_ids(Tokenizer.load(base.folder), config)
        with torch.no_grad():
            _encoder(model).embedding.weight.copy_(embedding.weight[ids.to(embedding.weight.device)])
    return model


def _ptuning(base: Base, config: MethodConfig) -> nn.Module:
    assert isinstance(config, PtuningConfig)
    settings = import_peft().PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        encoder_reparameterization_type=config.encoder.upper(),
        encoder_hidden_size=config.encoder_hidden_size,
        encoder_dropout=config.dropout,
    )
    return adapters.wrap(base.model, settings)


def _prefix(base: Base, config: MethodConfig) -> nn.Module:
    assert isinstance(config, PrefixConfig)
    peft = import_peft()
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.projection,
        encoder_hidden_size=config.encoder_hidden_size,
    )
    model = adapters.wrap(base.model, settings)
    if config.start != "random":
        ids = start_ids(Tokenizer.load(base.folder), config)[None]
        with torch.no_grad():
            output = base.model(ids.to(next(base.model.parameters()).device), use_cache=True)
            cache = getattr(output, cache_name())
        peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    return model


def start_ids(tokenizer: Tokenizer, config: PromptConfig | PrefixConfig) -> torch.Tensor:
    """Ids (num_virtual_tokens,) of the tokens that virtual ones start as, after what begins every text.

    Raises:
        ConfigError: the text of method.init_text has more tokens than there are virtual ones.
    """
    wanted, first = config.num_virtual_tokens, list(tokenizer.prefix_ids)
    if config.init == "text":
        ids = [*first, *tokenizer.encode(config.init_text or "")]
        if len(ids) > wanted:
            raise ConfigError(
                f"method.init_text has {len(ids)} tokens, but method.num_virtual_tokens is {wanted}, so its end would "
                f"be cut; set method.num_virtual_tokens={len(ids)} or shorten the text"
            )
        return torch.tensor((ids * wanted)[:wanted])
    special = set(tokenizer.special_tokens.values())
    common = torch.tensor([i for i in range(min(COMMON_TOKENS, tokenizer.vocab_size)) if i not in special])
    drawn = common[torch.randint(len(common), (wanted,))].tolist()
    return torch.tensor([*first, *drawn][:wanted])


def check_text(config: MethodConfig, tokenizer: Tokenizer) -> None:
    """Refuse a method.init_text that is too long, before the model loads; raises like `start_ids`."""
    if isinstance(config, PromptConfig | PrefixConfig) and config.init == "text":
        start_ids(tokenizer, config)


def _encoder(model: nn.Module) -> Any:
    return model.prompt_encoder["default"]  # type: ignore[index]  # a PeftModel


def _has_network(model: nn.Module) -> bool:
    return [name for name, _ in _encoder(model).named_parameters()] != ["embedding.weight"]


def _state(model: nn.Module) -> Tensors:
    return dict(trainable(model)) if _has_network(model) else adapters.state(model)


def _load(model: nn.Module, tensors: Tensors) -> None:
    if _has_network(model):
        copy_into(dict(model.named_parameters()), tensors)
    else:
        adapters.load_state(model, tensors)


def _result(model: nn.Module) -> Tensors | None:
    return adapters.state(model) if _has_network(model) else None


def num_virtual_tokens(model: nn.Module) -> int:
    """How many positions virtual tokens take in front of a row; 0 for other models."""
    config = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def generation_inputs(
    model: nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    """The transformers model that generates, and its inputs with virtual tokens right before each prompt.

    Args:
        ids_BT, mask_BT: prompts padded on the left, on the model's device.
    Returns:
        Its answers still begin with `ids_BT`.
    """
    count, rows = num_virtual_tokens(model), ids_BT.shape[0]
    if not count:
        return model, {"input_ids": ids_BT, "attention_mask": mask_BT}
    wrapped: Any = model
    base = cast(nn.Module, wrapped.get_base_model())
    prompt = wrapped.get_prompt(rows)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.cat([mask_BT.new_ones(rows, count), mask_BT], 1)}
    if wrapped.active_peft_config.peft_type == "PREFIX_TUNING":
        return base, {**inputs, cache_name(): prompt}  # positions are counted by the mask
    x_BTD = wrapped.word_embeddings(ids_BT)
    # Stable: among the masked and the real each keeps its order, and virtual tokens stand before the real ones.
    order_BT = inputs["attention_mask"].argsort(dim=1, stable=True)
    x_BTD = torch.cat([prompt.to(x_BTD.dtype), x_BTD], 1).gather(1, order_BT[..., None].expand(-1, -1, x_BTD.shape[2]))
    return base, {**inputs, "attention_mask": inputs["attention_mask"].gather(1, order_BT), "inputs_embeds": x_BTD}


def _method(name: str, apply: Any) -> Method:
    return Method(
        name=name,
        folder="adapter",
        apply=apply,
        state=_state,
        load_state=_load,
        write_config=adapters.write_config,
        open=adapters.open_adapter,
        merge=None,
        result=_result,
    )


PROMPT, PTUNING, PREFIX = _method("prompt", _prompt), _method("ptuning", _ptuning), _method("prefix", _prefix)
