"""Continue from an adapter: what its folder says about the method's settings, and which base it belongs to. No torch.

config = with_adapter(config, arch)     method.adapter=runs/first -> method.r, method.alpha, ... of that adapter
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitune.config import FreezeConfig, LoraConfig, RunConfig, build
from fitune.errors import CheckpointError, ConfigError
from fitune.plan.arch import ArchSpec
from fitune.plan.params import adapted, trainable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
FACTS = "fitune.json"  # ours stand apart: PEFT warns about keys it does not know
MAX_BYTES = 10_000_000
Json = Mapping[str, Any]  # Any: JSON values

# Which kinds of files a method can start from. A prompt is a prompt, whatever network has made it.
KINDS = {
    "lora": ("LORA",),
    "ia3": ("IA3",),
    "prompt": ("PROMPT_TUNING", "P_TUNING"),
    "prefix": ("PREFIX_TUNING",),
    "bitfit": ("BITFIT",),
    "freeze": ("FREEZE",),
}
# PEFT's key -> ours; what else is in its file must be switched off, or be one of those that decide nothing here.
KEYS = {
    "lora": {
        "r": "r",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "target_modules",
        "use_rslora": "rslora",
        "use_dora": "dora",
        "modules_to_save": "modules_to_save",
    },
    "ia3": {"target_modules": "target_modules", "feedforward_modules": "feedforward_modules"},
    "prompt": {"num_virtual_tokens": "num_virtual_tokens"},
    "prefix": {"num_virtual_tokens": "num_virtual_tokens"},
}
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "init_weights",
    "layers_pattern",
    "loftq_config",
    "megatron_core",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
# What the absence of a key means, by our names: releases of PEFT that lacked it, and PEFT's null.
ABSENT: dict[str, dict[str, Any]] = {
    "lora": {
        "r": 8,
        "alpha": 8,
        "dropout": 0.0,
        "rslora": False,
        "dora": False,
        "modules_to_save": (),
        "new_tokens": (),
    }
}
FREE = {"dropout"}  # may be another one from now on
TIED = ("lm_head", "embed_tokens", "word_embeddings")  # are one tensor where the head is tied
KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # starts of LoRA that leave the weights as they are


def find_adapter(path: str) -> Path:
    """The adapter folder of a run, or a folder that is one.

    Raises:
        ConfigError: there is none, or its weights are not in a safetensors file.
    """
    given = Path(path).expanduser()
    for folder in (given / "adapter", given):
        if (folder / CONFIG).is_file():
            if not (folder / WEIGHTS).is_file():
                raise ConfigError(
                    f"method.adapter {path}: {folder} has no {WEIGHTS}; other files are not read, store it as one"
                )
            return folder
    raise ConfigError(
        f"method.adapter {path}: no run with an adapter/ and no folder with {CONFIG}; give one of the two. A whole "
        "model is no adapter: give it as model.path"
    )


def with_adapter(config: RunConfig, arch: ArchSpec | None) -> RunConfig:
    """The configuration with the settings of `method.adapter`; unchanged without one.

    Args:
        arch: to compare what `attention` or `linear` stand for with the adapter's modules; None: unknown.

    Raises:
        ConfigError: no adapter there, one of another method, or a setting given here that it does not have.
        CheckpointError: its files are damaged.
    """
    path: str | None = getattr(config.method, "adapter", None)
    if path is None:
        return config
    folder, method = find_adapter(path), config.method
    settings = _settings(folder, method.name, arch is not None and arch.tied)
    tree = config.model_dump()
    for key, value in settings.items():
        if key in method.model_fields_set and key not in FREE and not _same(config, arch, key, value):
            given = getattr(method, key)
            raise ConfigError(
                f"method.{key} is {given!r:.100}, but the adapter in {folder} has {value!r:.200}; leave the key out, "
                "or start anew without method.adapter"
            )
        if key not in method.model_fields_set or key not in FREE:
            tree["method"][key] = value
    tree["method"]["adapter"] = str(folder.absolute())
    return build(tree)


def _settings(folder: Path, name: str, tied: bool) -> dict[str, Any]:
    stored = _read(folder / CONFIG)
    kind = stored.get("peft_type")
    if name == "ptuning" and kind == "P_TUNING":
        raise ConfigError(
            f"method.adapter: {folder} holds the prompts that P-tuning has made, not the network that made them. Use "
            "method.name=prompt, which goes on training the prompts themselves"
        )
    if kind not in KINDS.get(name, ()):
        raise ConfigError(
            f"method.adapter: {folder} is an adapter of peft_type {kind!r:.60}, but method.name is {name}, which "
            f"continues from {' or '.join(KINDS.get(name, ('none',)))}"
        )
    keys = KEYS.get(name)
    if keys is None:  # fitune's own files
        recorded = _recorded(folder) if name == "freeze" else {}
        if recorded:  # what null stands for depends on the patterns
            recorded["num_layers"] = FreezeConfig.model_construct(**recorded).num_blocks
        return recorded
    added = _recorded(folder).get("new_tokens")
    ours = {"trainable_token_indices"} if added else set()  # the ids of method.new_tokens
    for key, value in stored.items():
        if key not in ours and key not in keys and key not in NEUTRAL and value not in (None, False, "none", [], {}):
            raise ConfigError(
                f"method.adapter: {folder / CONFIG} has `{key}`: {value!r:.100}, which fitune does not train; it "
                "cannot continue from this adapter"
            )
    if name == "lora" and stored.get("init_lora_weights", True) not in KEEP_THE_BASE:
        raise ConfigError(
            f"method.adapter: {folder} started as {stored['init_lora_weights']!r:.60}, which changed the weights of "
            "its base, and those are not stored. Convert it to an ordinary LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    whole = stored.get("modules_to_save")
    apart = [m for m in whole if str(m).rpartition(".")[2] in TIED] if isinstance(whole, list) else []
    if tied and apart and not stored.get("ensure_weight_tying"):
        raise ConfigError(
            f"method.adapter: {folder} has a {apart[0]} of its own, but embedding and head of this model are one, and "
            "fitune trains them as one; it cannot continue from this adapter (PEFT: ensure_weight_tying=True makes one "
            "that fits)"
        )
    given = {key: stored[theirs] for theirs, key in keys.items() if stored.get(theirs) is not None}
    settings = ABSENT.get(name, {}) | given
    if settings.get("target_modules") == "all-linear":
        settings["target_modules"] = "linear"
    elif isinstance(settings.get("target_modules"), str):
        raise ConfigError(
            f"method.adapter: {folder / CONFIG} has a pattern for target_modules ({settings['target_modules']:.100}); "
            "write the names of the modules there instead"
        )
    if added:
        settings["new_tokens"] = tuple(added)
    return settings | ({"projection": False} if name == "prefix" else {})


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings of the method that fitune has written beside an adapter of its own."""
    recorded = _read(folder / FACTS).get("settings", {}) if (folder / FACTS).is_file() else {}
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{folder / FACTS}: `settings` is no JSON object; it is damaged")
    return recorded


def _same(config: RunConfig, arch: ArchSpec | None, key: str, stored: Any) -> bool:
    """Whether a setting means what the adapter has; names of modules are compared by what they name."""
    method = config.method
    given = getattr(method, key)
    if not isinstance(given, str | tuple) or key not in ("target_modules", "modules_to_save", "feedforward_modules"):
        if key in ("patterns", "also"):
            return set(given) == set(stored)
        return bool(given == stored) or (isinstance(given, tuple) and list(given) == stored)
    if arch is None:
        return isinstance(given, str) or set(given) == set(stored)
    if key == "modules_to_save":
        assert isinstance(method, LoraConfig)
        return trainable(arch, method) == trainable(arch, method.model_copy(update={key: tuple(stored)}))
    wanted = stored if isinstance(stored, str) else tuple(stored)
    return _resolved(arch, given) == _resolved(arch, wanted)


def _resolved(arch: ArchSpec, names: str | tuple[str, ...]) -> object:
    return adapted(arch, names) if names else ()


def base_of(folder: Path) -> str | None:
    """Fingerprint of the base that an adapter was trained on; None if it does not say."""
    recorded = _read(folder / FACTS).get("base_fingerprint") if (folder / FACTS).is_file() else None
    return recorded if isinstance(recorded, str) else None


def check_base(folder: Path, base_folder: Path, fingerprint: str, *, must_say: bool) -> None:
    """Refuse an adapter that was trained on other base weights.

    Args:
        must_say: an adapter that does not say on which is refused as well.

    Raises:
        CheckpointError: it was; or its record is damaged.
    """
    recorded = base_of(folder)
    if recorded is None and must_say:
        raise CheckpointError(
            f"{folder / FACTS}: does not say which base the adapter belongs to; is this an adapter made by fitune?"
        )
    if recorded is not None and recorded != fingerprint:
        raise CheckpointError(
            f"{folder} was trained on other weights than those in {base_folder} (fingerprints differ). Use the base "
            "model it was trained on"
        )


def _read(file: Path) -> Json:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{file}: larger than {MAX_BYTES} bytes, which no {file.name} is")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not valid JSON ({error!s:.200}); it is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object; it is damaged")
    return value
