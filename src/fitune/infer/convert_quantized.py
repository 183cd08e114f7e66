"""A model folder -> a folder that transformers and bitsandbytes load, with the blocks in 8 or 4 bits.

fitune convert meta-llama/Llama-3.2-1B llama-nf4 --quantization nf4
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.infer.disk import check_free, new_folder
from fitune.methods.base import write_json
from fitune.model.bitsandbytes_format import FORMATS, quantization_config, to_stored
from fitune.model.folder import inspect_folder, resolve_folder
from fitune.model.load import DTYPES, load_base
from fitune.model.quantize import QuantLinear
from fitune.model.weights import ShardWriter

_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def quantize_folder(source: str, target: Path, quantization: str, dtype: str | None = None) -> Path:
    """Write a model with its blocks quantized, as transformers saves one that bitsandbytes quantized.

    Args:
        source: `embedded`, a folder or a hub id.
        target: must not exist, or be an empty folder.
        quantization: int8, nf4 or fp4, the latter two with double quantization.
        dtype: fp32, fp16 or bf16, what weights are read in before they are quantized, and of those that are not; None:
            as config.json says.

    Raises:
        ConfigError: an unknown format or dtype, a source that is quantized already or cannot be read, a taken target.
        CheckpointError: the disk does not take it; nothing is left at `target`.
    Memory: the quantized model, one shard, and pages of the source's files.
    """
    if quantization not in FORMATS:
        raise ConfigError(f"--quantization is {quantization}; allowed: {', '.join(FORMATS)}")
    check_free(target, "DST")
    folder = resolve_folder(source, name="model")
    raw = inspect_folder(folder)
    if raw.quantization != "none":
        raise ConfigError(f"{folder} holds weights in {raw.quantization} already; give the 16- or 32-bit model")
    if raw.model_type == "chatglm":
        raise ConfigError(f"{folder} is ChatGLM-6B, which transformers does not load, with or without bitsandbytes")
    tokenizer = Tokenizer.load(folder)
    base = load_base(folder, dtype or _dtype_of(folder, raw.config), torch.device("cpu"), quantization)
    model: Any = base.model  # a transformers model

    def fill(out: Path) -> None:
        writer = ShardWriter(out)
        for name, tensor in _tensors(model):
            writer.add(name, tensor)
        writer.finish()
        model.config.use_cache = True
        model.config.save_pretrained(out)
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        write_json(out / "config.json", config | {"quantization_config": quantization_config(model, quantization)})
        tokenizer.save(out)
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")

    new_folder(target, fill)
    return target


def _dtype_of(folder: Path, config: dict[str, Any]) -> str:
    found = config.get("dtype", config.get("torch_dtype"))
    if found not in _NAMES:
        raise ConfigError(f"{folder}/config.json: `dtype` is {found!r}; say what to read weights in: --dtype bf16")
    return _NAMES[found]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, tied ones once."""
    seen: set[int] = set()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, layer in layers.items():
        yield from to_stored(layer, name).items()
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if (path in layers and last != "bias") or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        yield name, tensor
