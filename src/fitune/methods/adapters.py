"""What PEFT does for every method that it knows: it wraps our model and owns the names and the format of the file.

Adapters are fp32 whatever the base, so their optimizer needs no separate master copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fitune.errors import CheckpointError, ConfigError
from fitune.methods.base import CONFIG, WEIGHTS, Tensors, check_tensors, read_tensors, write_json
from fitune.model.libraries import import_peft
from fitune.model.load import Base
from fitune.model.quantize import is_quantized, unread_weights


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT 0.21 asks transformers by a name that 5.2x calls deprecated: nothing a user could change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def wrap(model: nn.Module, settings: Any) -> nn.Module:
    """The model with an adapter of PEFT's in it."""
    starts = getattr(settings, "init_lora_weights", True)
    reads = getattr(settings, "use_dora", False) or starts not in (True, False, "gaussian")
    with quiet(), nullcontext() if reads else unread_weights():
        return cast(nn.Module, import_peft().get_peft_model(model, settings, autocast_adapter_dtype=True))


def state(model: nn.Module) -> Tensors:
    """The adapter by the names of PEFT's file; what dropout would change is computed without it."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        tensors = import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    model.train(was_training)
    return cast(Tensors, tensors)


def load_state(model: nn.Module, tensors: Tensors) -> None:
    """Put tensors of such a file into a wrapped model."""
    import_peft().set_peft_model_state_dict(model, tensors)


def open_adapter(base: Base, folder: Path) -> nn.Module:
    """The base with the adapter that stands in a folder, frozen.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
    """
    settings = _read_config(folder)
    rows = getattr(settings, "trainable_token_indices", None) or {}
    make_rows(base.model, 1 + max((token for ids in rows.values() for token in ids), default=-1))
    try:
        model = wrap(base.model, settings)
    except ValueError as error:
        raise CheckpointError(f"{folder}: does not fit this model ({error})") from error
    tensors = read_tensors(folder / WEIGHTS)
    check_tensors(folder / WEIGHTS, tensors, state(model))
    load_state(model, tensors)
    return model.requires_grad_(False)


def make_rows(model: nn.Module, count: int) -> None:
    """Give the embedding, and the head, at least as many rows; what new ones hold is left to whoever needs them."""
    anything: Any = model
    if anything.get_input_embeddings().weight.shape[0] < count:
        anything.resize_token_embeddings(count, mean_resizing=False)
        model.requires_grad_(False)


def _read_config(folder: Path) -> Any:
    """PEFT's settings of a stored adapter; sizes of the model are those of the model it meets, not of the file."""
    try:
        settings = import_peft().PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be read ({error})") from error
    if settings.peft_type is None:
        raise CheckpointError(f"{folder / CONFIG}: cannot be read (it has no peft_type)")
    settings.inference_mode = True
    settings.base_model_name_or_path = None  # PEFT warns about another name
    if settings.is_prompt_learning:
        settings.token_dim = settings.num_layers = settings.num_attention_heads = None
    return settings


def write_config(model: nn.Module, folder: Path, facts: dict[str, Any], **changes: Any) -> None:
    """adapter_config.json as PEFT writes it.

    Args:
        changes: settings that the stored adapter has and the wrapped one has not.
    """
    config = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]  # a PeftModel
    config |= {"inference_mode": True, "base_model_name_or_path": facts["base_model"], **changes}
    write_json(folder / CONFIG, {key: _plain(value) for key, value in sorted(config.items())})


def _plain(value: Any) -> Any:
    """Enum members and sets as JSON."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def merge(model: nn.Module) -> nn.Module:
    """The transformers model with the adapter in its weights."""
    if is_quantized(model):  # PEFT would add to a temporary and drop it
        raise ConfigError(
            "an adapter cannot be merged into quantized weights: the sum would be rounded away. Open the run with "
            "quantization=none, as `fitune export` does"
        )
    return cast(nn.Module, model.merge_and_unload())  # type: ignore[operator]  # a PeftModel
