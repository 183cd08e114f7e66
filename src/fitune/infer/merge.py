"""Fold an adapter into the weight files of its base, one tensor after another; the model is never in memory.

The result is what `methods` would save after merging into a loaded model, bit by bit, under transformers' names. A base
that exists only as bitsandbytes stored it is expanded tensor by tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fitune.errors import CheckpointError, ConfigError
from fitune.infer.load import RunParts
from fitune.methods.merging import Edits
from fitune.model.adapter import check_base
from fitune.model.bitsandbytes_format import StoredWeight, read_stored, stored_weights
from fitune.model.folder import inspect_folder
from fitune.model.load import DTYPES, class_and_options, identity, open_weights
from fitune.model.quantize import QuantLinear
from fitune.model.weights import ShardWriter, WeightFiles, names_in_model


def merge_files(parts: RunParts, dtype: str, out: Path) -> bool:
    """Write weights and config.json of a run's merged model into an existing folder.

    Args:
        dtype: of the merged weights, a key of `DTYPES`.
    Returns:
        False, with nothing written, if only a loaded model can be merged: the method has no edits, or the base has
        names that transformers converts.
    Raises:
        CheckpointError: the adapter belongs to another base, is damaged, or does not fit.
        ConfigError: the base cannot be read, or merged weights are too large for `dtype`.
    Memory: the adapter, one shard of `weights.SHARD_BYTES`, and two fp32 copies of one weight.
    """
    raw = inspect_folder(parts.folder)
    edits = parts.method.edits(parts.result)
    if edits is None:
        return False
    if parts.method.folder == "adapter":
        check_base(parts.result, parts.folder, identity(parts.folder, raw.weight_files), must_say=True)
    model_class, options = class_and_options(parts.folder, raw, dtype)
    with torch.device("meta"):
        model = model_class(options["config"])
    weights = open_weights(parts.folder, raw)
    stored = stored_weights(weights) if raw.quantization != "none" else {}
    companions = {name for one in stored.values() for name in one.companions}
    shapes = {name: stored[name].shape if name in stored else shape for name, shape in weights.shapes.items()}
    names = names_in_model(model, {name: shape for name, shape in shapes.items() if name not in companions})
    if names is None:
        return False
    _check_edits(parts.result, edits, set(names.values()))
    writer = ShardWriter(out)
    for source, name in names.items():
        weight = _read(weights, source, stored.get(source), DTYPES[dtype])
        writer.add(name, _edited(parts.result, name, weight, edits))
    writer.finish()
    config: Any = options["config"]
    config.dtype, config.architectures, config.use_cache = DTYPES[dtype], [model_class.__name__], True
    config.save_pretrained(out)
    return True


def _check_edits(adapter: Path, edits: Edits, names: set[str]) -> None:
    absent = edits.keys() - names
    # IA3 scales biases where there are any.
    unknown = sorted(n for n in absent if not n.endswith(".bias") or n.removesuffix("bias") + "weight" not in edits)
    if unknown:
        raise CheckpointError(f"{adapter}: does not fit the base: it changes {unknown[0]}, which is not there")


def _read(weights: WeightFiles, name: str, stored: StoredWeight | None, dtype: torch.dtype) -> torch.Tensor:
    if stored is not None:
        return QuantLinear.stored(read_stored(weights, stored), stored.shape, None, stored.quantization, dtype).weight
    weight = weights.read(name)
    return weight.to(dtype) if weight.is_floating_point() else weight


def _edited(adapter: Path, name: str, weight: torch.Tensor, edits: Edits) -> torch.Tensor:
    edit = edits.get(name)
    if edit is None:
        return weight
    try:
        merged = edit(weight)
    except RuntimeError as error:
        raise CheckpointError(f"{adapter}: does not fit {name} of the base ({error})") from error
    if merged.shape != weight.shape:
        raise CheckpointError(f"{adapter}: does not fit {name}: {list(merged.shape)} instead of {list(weight.shape)}")
    if not torch.isfinite(merged).all():
        raise ConfigError(f"{name} has values that are not finite after merging in {weight.dtype}; use --dtype bf16")
    return merged
