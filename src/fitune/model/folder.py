"""What a model folder holds, read without torch: config.json, weight files, nothing executed.

`resolve_folder` turns model.path into a local folder; `inspect_folder` refuses what cannot or must not be loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fitune.config import RunConfig, check
from fitune.errors import ConfigError
from fitune.plan.arch import ArchSpec, linear_names, read_arch
from fitune.plan.chatglm import glm_config, is_original, is_version_1

MAX_CONFIG_BYTES = 4_000_000
# A hostile config.json must not make us allocate: these are ten times the largest published models.
LIMITS = {"vocab_size": 10_000_000, "hidden_size": 200_000, "num_hidden_layers": 2_000, "intermediate_size": 2_000_000}
_LFS_POINTER = b"version https://git-lfs"
TEXT_PATTERNS = ["*.json", "*.model", "*.jinja", "*.txt"]
HUB_PATTERNS = ["*.safetensors", *TEXT_PATTERNS]


@dataclass(frozen=True)
class ModelFolder:
    """Facts of one model folder.

    Attributes:
        config: config.json; of an original ChatGLM2 or 3 folder that of the GLM model it is read as.
        model_type: its `model_type`; `chatglm` is ChatGLM-6B, the first version.
        weight_files: names inside the folder, all of one format.
        weights_format: "safetensors" or "bin".
        quantization: how bitsandbytes stored the weights: int8, nf4, fp4; "none": it did not.
        original: config.json of an original ChatGLM2 or 3 folder, whose weights have other names; else None.
    """

    config: dict[str, Any]
    model_type: str
    weight_files: tuple[str, ...]
    weights_format: str
    quantization: str = "none"
    original: dict[str, Any] | None = None


def embedded_path() -> Path:
    """Folder of the base model that comes with fitune."""
    return Path(__file__).parent.parent / "embedded"


def resolve_folder(path: str, *, weights: bool = True, name: str = "model.path") -> Path:
    """Local folder of `embedded`, of a local path, or of a hub id (downloaded if needed).

    Args:
        weights: False downloads configuration and tokenizer only.
        name: what the user calls `path`, for messages.

    Raises:
        ConfigError: neither a folder nor a hub id that can be had.
    """
    if path == "embedded":
        return embedded_path()
    try:
        local = Path(path).expanduser()
        local.stat()  # is_dir() and exists() would swallow some of the reasons
        is_folder = local.is_dir()
    except (FileNotFoundError, NotADirectoryError):
        is_folder = None
    except (OSError, ValueError, RuntimeError) as error:  # too long, no permission; a NUL; ~ of an unknown user
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name} {path[:100]!r}: cannot be looked up ({reason}); give another path") from error
    if is_folder:
        return local
    if is_folder is False:
        raise ConfigError(f"{name} {path!r} is a file; give the folder that holds config.json and the weights")
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or local.parent.is_dir():
        raise ConfigError(
            f"{name} {path!r}: no such folder. Give an existing folder, a hub id like "
            "meta-llama/Llama-3.2-1B, or `embedded`"
        )
    return _from_hub(path, weights, name)


def _from_hub(repo: str, weights: bool, name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=HUB_PATTERNS if weights else TEXT_PATTERNS))
        if weights and not any(folder.glob("*.safetensors")):  # an old repository: only then fetch .bin files
            folder = Path(snapshot_download(repo, allow_patterns=[*HUB_PATTERNS, "pytorch_model*.bin"]))
    except (HFValidationError, ValueError) as error:
        raise ConfigError(f"{name} {repo[:100]!r} is neither a folder nor a valid hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{name} {repo!r} is no local folder, and the hub did not give it ({reason:.200}). Check the name, the "
            "network (HF_ENDPOINT selects a mirror) and, for gated models, `hf auth login`"
        ) from error
    return folder


def inspect_folder(folder: Path) -> ModelFolder:
    """Check config.json and list the weight files.

    Raises:
        ConfigError: missing or damaged files, remote code, unknown quantization, absurd sizes.
    """
    config = read_config(folder)
    original = None
    if is_original(config):  # the folder's own code, which its `auto_map` names, is not needed: fitune knows these
        read_arch(config)  # checks the sizes
        if not is_version_1(config):
            config, original = glm_config(config), config
    elif "auto_map" in config:
        raise ConfigError(
            f"{folder}: config.json wants code from the model repository (auto_map), which fitune never runs. Use a "
            "version of the model that transformers supports by itself"
        )
    stored = stored_quantization(config)
    for pattern, weights_format in (("*.safetensors", "safetensors"), ("pytorch_model*.bin", "bin")):
        files = _weight_files(folder, pattern)
        if files and stored != "none" and weights_format == "bin":
            raise ConfigError(f"{folder}: weights of bitsandbytes are read from safetensors only; save the model so")
        if files:
            return ModelFolder(config, config["model_type"], files, weights_format, stored, original)
    raise ConfigError(f"{folder}: no weights (*.safetensors or pytorch_model*.bin) in this folder")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder that needs no weights; its `model_type` is a text.

    Raises:
        ConfigError: missing or damaged, weights quantized by another program, absurd sizes.
    """
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{folder}/config.json: `model_type` is missing; it names the architecture")
    try:
        stored_quantization(config)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    for key, limit in LIMITS.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or not 0 < value <= limit):
            raise ConfigError(f"{folder}/config.json: `{key}` is {value!r}; allowed: 1 to {limit}")
    return config


def stored_quantization(config: Mapping[str, Any]) -> str:
    """How the weights beside a config.json are quantized: int8, nf4, fp4 (by bitsandbytes) or "none".

    Raises:
        ConfigError: by another program, or in a way that fitune does not read.
    """
    section = config.get("quantization_config")
    if not section:
        return "none"
    section = section if isinstance(section, dict) else {}
    method = section.get("quant_method", "bitsandbytes" if "load_in_4bit" in section else "unknown")
    in_4_bits = section.get("bnb_4bit_quant_type", "fp4")
    if method == "bitsandbytes" and section.get("load_in_8bit") and not section.get("llm_int8_has_fp16_weight"):
        return "int8"
    if method == "bitsandbytes" and section.get("load_in_4bit") and in_4_bits in ("nf4", "fp4"):
        return str(in_4_bits)
    raise ConfigError(
        f"the weights are already quantized ({str(method)[:60]}), and of those fitune reads bitsandbytes' int8, nf4 "
        "and fp4; give the 16- or 32-bit model, and set model.quantization to have fitune quantize it"
    )


def with_stored_quantization(config: RunConfig, folder: Path) -> RunConfig:
    """A configuration whose model.quantization says how the weights are stored, if bitsandbytes stored them.

    Raises:
        ConfigError: it asks for another quantization, or for what cannot be done with these weights.
    """
    stored, wanted = stored_quantization(read_config(folder)), config.model.quantization
    if stored != "none" and wanted not in ("none", stored):
        raise ConfigError(
            f"model.quantization is {wanted}, but {folder} holds weights in {stored}, which would be rounded twice; "
            f"leave it out, or give the 16-bit model"
        )
    if stored != wanted and stored != "none":
        config = config.model_copy(update={"model": config.model.model_copy(update={"quantization": stored})})
        check(config)
    if config.model.int8_compute == "llm_int8" and config.model.quantization == "none":
        raise ConfigError(
            "model.int8_compute is llm_int8, but model.quantization is none; set model.quantization=int8 or "
            "model.int8_compute=weight_only"
        )
    return config


def with_stored_layers(arch: ArchSpec, folder: Path) -> ArchSpec:
    """An architecture that knows from the weight files which layers bitsandbytes left whole; as it is without them."""
    if not arch.quantized:
        return arch
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    try:
        for file in _weight_files(folder, "*.safetensors"):
            with safe_open(folder / file, framework="np") as opened:
                names.update(opened.keys())
    except (ConfigError, SafetensorError, OSError):
        return arch  # whoever loads them says what is wrong
    quantized = {name.partition(".weight.quant_state.")[0] for name in names if ".weight.quant_state." in name}
    quantized |= {name.removesuffix(".SCB") for name in names if name.endswith(".SCB")}
    whole = frozenset(place for place, name in linear_names(arch) if name not in quantized)
    if len(whole) == arch.layers * len(arch.linears):  # no weights here, or under other names
        return arch
    return replace(arch, whole=whole, patterns=())


def _weight_files(folder: Path, pattern: str) -> tuple[str, ...]:
    names = found = tuple(sorted(file.name for file in folder.glob(pattern)))
    for index in folder.glob(pattern + ".index.json"):
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ConfigError(f"{index}: `weight_map` is missing or maps to something else than file names")
        names = tuple(sorted(set(listed.values())))
        absent = [name for name in names if name not in found]
        if found and absent:  # none at all: the index came along with weights of another format
            raise ConfigError(
                f"{folder}: {len(absent)} of {len(names)} weight files are missing ({absent[0]}); download them again"
            )
        break
    if not found:
        return ()
    for name in names:
        _check_start(folder / name)
    return names


def _check_start(file: Path) -> None:
    """Refuse what stands in the place of a weight file after a download that was none."""
    if not file.is_file():
        raise ConfigError(f"{file}: is no file, or a link to nothing; download it again")
    with file.open("rb") as opened:
        start = opened.read(len(_LFS_POINTER))
    if not start:
        raise ConfigError(f"{file}: is empty; download it again")
    if start == _LFS_POINTER:
        raise ConfigError(f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` there, or download it")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES and file.name == "config.json":
            raise ConfigError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes; this is no model configuration")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); is this a model folder?") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: must hold a JSON object")
    return value
