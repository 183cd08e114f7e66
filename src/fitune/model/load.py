"""A model folder or hub id -> a transformers model of ours, checked before a byte of weight is read.

No code from a model repository runs: `auto_map` is refused, weights come from safetensors, or from .bin files
through `torch.load(weights_only=True, mmap=True)`, which stands in this module and nowhere else.

    base = load_base("embedded", "fp32", "cpu")
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fitune.errors import ConfigError
from fitune.model.chatglm import glm_weights
from fitune.model.folder import ModelFolder, inspect_folder
from fitune.model.host_embedding import HostEmbedding
from fitune.model.quantize import QuantLinear, quantize_blocks
from fitune.model.standins import load_stored
from fitune.model.weights import WeightFiles
from fitune.plan.arch import read_arch
from fitune.plan.checks import known_arch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Written by `fitune convert`: "fingerprint" of the weights beside it, and "source_fingerprint" of those it read.
CONVERTED = "fitune.json"

_NO_MEMORY = ("cannot allocate memory", "can't allocate memory", "not enough memory", "bad_alloc")


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        model: frozen, in eval mode.
        folder: where it was read from.
        model_type: config.json's `model_type`; `glm` for original ChatGLM2 and 3 folders.
        vocab_size: rows of the embedding.
        fingerprint: identifies the weights; adapters record it.
    """

    model: nn.Module
    folder: Path
    model_type: str
    vocab_size: int
    fingerprint: str


def pick_device(wanted: str) -> torch.device:
    """Turn train.device into a device; `auto` is cuda if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but PyTorch sees no CUDA device here; use train.device=cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device("cpu")


def pick_dtype(wanted: str | None, device: torch.device) -> str:
    """Turn model.dtype into a name of `DTYPES`."""
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return "fp32"
    # Emulated bf16 (T4, 20xx) is slower than fp16 and is not what anybody wants by default.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def load_base(folder: Path, dtype: str, device: torch.device, quantization: str = "none") -> Base:
    """Load the weights of `folder`, frozen.

    Families that the planner knows are mapped from their files, if those hold one dtype, and go to the device weight by
    weight, cast and quantized on the way, so that the device can give the memory of each back. Others are placed by
    transformers, which may convert them.

    Args:
        folder: a local model folder (see `model.folder.resolve_folder`).
        dtype: storage and compute dtype, a key of `DTYPES`.
        quantization: how the linear layers of the blocks are stored, see `model.quantize`; "none": as in the folder.

    Raises:
        ConfigError: unreadable or unsupported folder, missing or surplus weights, remote code wanted.
        MemoryError: the host has too little memory (torch.OutOfMemoryError: the GPU has).
    Memory: on the device the result; quantized at most 100 MB besides. On the host pages of the weight files; quantized
        models of other families or of several dtypes also leave a copy of what is not in `dtype`.
    """
    raw = inspect_folder(folder)
    if raw.quantization != "none" and quantization not in ("none", raw.quantization):
        raise ConfigError(f"{folder} holds weights in {raw.quantization}, which cannot become {quantization}")
    model_class, options = class_and_options(folder, raw, dtype)
    weights, wanted = open_weights(folder, raw), DTYPES[dtype]
    stored = _check_shapes(folder, raw, weights)
    mapped = len(stored) == 1 and stored <= set(DTYPES.values())
    if mapped:
        (options["dtype"],) = stored  # not cast, so still pages of the files
    elif quantization == raw.quantization == "none":
        options["device_map"] = {"": device}
    model: Any  # a transformers model
    with reading(folder):
        if raw.quantization != "none":
            model, report = load_stored(model_class, options, folder, weights, device)
        elif raw.weights_format == "safetensors" and raw.original is None:
            options |= {"use_safetensors": True, "local_files_only": True}
            model, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
        else:
            state = _read_weights(folder, raw)
            model, report = model_class.from_pretrained(None, state_dict=state, output_loading_info=True, **options)
            del state
        del weights
        check_report(folder, model, report)
        if quantization != "none" and raw.quantization == "none":
            quantize_blocks(model, quantization, device, wanted if mapped else None)
        if mapped:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(device, wanted)
            model.config.dtype = wanted
        model = model.to(device)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.eval()
    rows = model.get_input_embeddings().weight.shape[0]
    return Base(model, folder, raw.model_type, rows, identity(folder, raw.weight_files))


def class_and_options(folder: Path, raw: ModelFolder, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The class of a folder's model, and arguments of its `from_pretrained`: configuration, dtype, attention.

    Raises:
        ConfigError: there is no causal language model of this `model_type`.
    """
    import transformers

    # Progress bars and load reports of the library would tear through our own display; our errors say more.
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, model_class = _architecture(folder, raw)
    if raw.quantization != "none":
        del config.quantization_config  # or transformers would want bitsandbytes
    attention = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    options: dict[str, Any] = {"config": config, "dtype": DTYPES[dtype], "attn_implementation": attention}
    options["ignore_mismatched_sizes"] = True  # they come back in the report, and are refused with their names
    return model_class, options


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Errors of the libraries that read weight files, in our words."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        _raise_if_out_of_memory(error)
        raise ConfigError(f"{folder}: the weights cannot be loaded: {_first_line(error)}") from error


def open_weights(folder: Path, raw: ModelFolder) -> WeightFiles:
    """The weights of a folder by transformers' names, to be read one by one.

    Raises:
        ConfigError: a file is damaged.
    """
    with reading(folder):
        return WeightFiles(raw.weight_files, partial(_read_file, folder, raw))


def _architecture(folder: Path, raw: ModelFolder) -> tuple[Any, Any]:
    """Configuration and class of the model: transformers' own, or ours where we have one."""
    import transformers

    # No Auto* class on an original ChatGLM folder: it would ask whether to run the code in it.
    if raw.original is not None:
        settings = {key: value for key, value in raw.config.items() if key != "model_type"}
        return transformers.GlmConfig(**settings), transformers.GlmForCausalLM
    if raw.model_type == "chatglm":
        from fitune.model.chatglm_v1 import ChatGLMForConditionalGeneration, read_config

        return read_config(raw.config), ChatGLMForConditionalGeneration
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except StrictDataclassError as error:  # a value of the wrong kind, or two that do not go together
        raise ConfigError(f"{folder / 'config.json'}: {' '.join(str(error).split()):.300}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{folder}: model_type {raw.model_type!r} is not a causal language model that transformers "
            f"{transformers.__version__} knows; check config.json or update transformers"
        ) from error
    if raw.model_type == "bloom":
        from fitune.model.bloom import BloomForCausalLM

        return config, BloomForCausalLM
    return config, model_class


def _check_shapes(folder: Path, raw: ModelFolder, weights: WeightFiles) -> set[torch.dtype]:
    """Refuse weights of another shape than config.json says, from the headers of the files; dtypes of the model's own.

    transformers would read the weights first, and fail in other words where one of two tied ones is of another shape.
    Families that the planner does not know are left to its report.
    """
    arch = known_arch(raw.config)
    if arch is None or raw.quantization != "none":
        return set()
    wanted = {p.name.format(i): p.shape for p in arch.parameters for i in range(p.copies)}
    wanted.setdefault("lm_head.weight", (arch.vocab, arch.hidden))  # tied, it may be in the files as well
    prefix = arch.block.partition(".")[0] + "."  # files of a model without its head lack it
    own = {name: needed for name in weights.shapes if (needed := wanted.get(name) or wanted.get(prefix + name))}
    odd = [
        _differs(name, weights.shapes[name], needed)
        for name, needed in own.items()
        if needed != tuple(weights.shapes[name])
    ]
    if odd:
        raise _belongs_elsewhere(folder, "of another shape than config.json says", odd)
    return {weights.dtypes[name] for name in own}


def _belongs_elsewhere(folder: Path, kind: str, keys: list[str]) -> ConfigError:
    count = "1 weight is" if len(keys) == 1 else f"{len(keys)} weights are"
    return ConfigError(
        f"{folder}: {count} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}); "
        "config.json belongs to another model or files are missing; download the folder again"
    )


def check_report(folder: Path, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuse what transformers lets pass: it fills missing weights with random numbers and drops surplus ones.

    Surplus are blocks beyond the last, and biases of layers without; what stands beside the model is of no account.
    """
    missing = sorted(report.get("missing_keys") or ())
    mismatched = [_differs(name, stored, wanted) for name, stored, wanted in report.get("mismatched_keys") or ()]
    layers = {_layer(name) for name in model.state_dict()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    surplus = [key for key in report.get("unexpected_keys") or () if {_layer(key), prefix + _layer(key)} & layers]
    # The class lists what may be tied; whether it is stands in the configuration.
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if is_tied else set()
    missing = [key for key in missing if not any(re.search(pattern, key) for pattern in tied)]
    for kind, keys in (
        ("missing", missing),
        ("of another shape than config.json says", mismatched),
        ("not in the model that config.json describes", surplus),
    ):
        if keys:
            raise _belongs_elsewhere(folder, kind, sorted(keys))


def _layer(name: str) -> str:
    """The layer of a weight, whatever the number of its block."""
    return re.sub(r"\.\d+\.", ".{}.", name).rpartition(".")[0]


def _differs(name: str, stored: Sequence[int], wanted: Sequence[int]) -> str:
    found, expected = (" x ".join(f"{size:,}" for size in shape) for shape in (stored, wanted))
    return f"{name}: {found} stored, {expected} by config.json"


def _read_weights(folder: Path, raw: ModelFolder) -> dict[str, torch.Tensor]:
    """All weights by transformers' names, as pages of their files."""
    return {name: tensor for file in raw.weight_files for name, tensor in _read_file(folder, raw, file).items()}


def _read_file(folder: Path, raw: ModelFolder, file: str) -> dict[str, torch.Tensor]:
    tensors = read_tensors(folder / file)
    return tensors if raw.original is None else glm_weights(tensors, read_arch(raw.original), folder / file)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file, mapped into memory: read when they are touched.

    Raises:
        ConfigError: the file wants to run code, or is damaged.
        MemoryError: it cannot be mapped.
    """
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            _raise_if_out_of_memory(error)
            raise ConfigError(f"{file}: is damaged or cut short ({error}); download it again") from error
    try:
        part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling raises anything; each means: not usable
        _raise_if_out_of_memory(error)
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ConfigError(f"{file}: is damaged or no weight file; download it again") from error
        raise ConfigError(
            f"{file}: refused, it wants to run {wanted[1]}. Only plain tensors are read; convert the model to "
            "safetensors"
        ) from error
    if not isinstance(part, dict) or not all(isinstance(v, torch.Tensor) for v in part.values()):
        raise ConfigError(f"{file}: is no plain dictionary of tensors; convert it to safetensors")
    return part


def identity(folder: Path, weight_files: tuple[str, ...]) -> str:
    """What adapters know a base by: its fingerprint, or that of the folder it was converted from.

    A converted folder says so in `CONVERTED`, with its own fingerprint; once its weights are changed, that counts.
    """
    own = fingerprint(folder, weight_files)
    try:
        facts = json.loads((folder / CONVERTED).read_text(encoding="utf-8"))
        return str(facts["source_fingerprint"]) if facts["fingerprint"] == own else own
    except (OSError, ValueError, KeyError, TypeError):
        return own


def fingerprint(folder: Path, weight_files: tuple[str, ...]) -> str:
    """Identify weights in milliseconds: sha256 over sizes, headers and 64 evenly spaced blocks of each file.

    It tells models apart; it is not a proof against tampering (a full hash of 16 GB would cost half a minute).
    """
    digest = hashlib.sha256()
    for name in sorted(weight_files):
        size = (folder / name).stat().st_size
        digest.update(f"{size}\n".encode())
        with (folder / name).open("rb") as file:
            for block in range(64):
                file.seek(size * block // 64)
                digest.update(file.read(65536))
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters, tied weights once; a quantized weight counts what it stands for."""
    parameters = list(model.parameters())
    apart = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    apart += sum(m.weight.numel() for m in model.modules() if isinstance(m, HostEmbedding))
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + apart


def _raise_if_out_of_memory(error: Exception) -> None:
    """PyTorch's CPU allocator, mmap and safetensors have no exception of their own for it."""
    said = str(error).lower()
    if getattr(error, "errno", None) == errno.ENOMEM or any(words in said for words in _NO_MEMORY):
        raise MemoryError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return json.dumps(str(error).strip().split("\n")[0], ensure_ascii=False)[1:-1][:300]
