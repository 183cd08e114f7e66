"""Load, override, check and resolve a configuration: the only way a `RunConfig` comes into being.

    config = load("examples/demo.yaml", ["train.learning_rate=1e-4"])

No torch here; a mistake becomes a `ConfigError` that names the key, what was given and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from fitune.config.checks import METHOD_CHECKS
from fitune.config.fields import check_path
from fitune.config.methods import METHODS
from fitune.config.schema import RunConfig
from fitune.config.yaml_text import parse, render
from fitune.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000
MAX_MISTAKES = 10  # shown at once

# The key that a section's scalar most likely meant, and an example for when the scalar tells nothing.
MAIN_KEYS = {
    "model": ("path", "embedded"),
    "method": ("name", "lora"),
    "data": ("train", "rows.jsonl"),
    "train": ("epochs", 1),
    "memory": ("budget", 16),
    "output": ("dir", "runs/first"),
}
FROM_SCALAR = ("model", "data", "memory", "output")
QUOTES = "'\""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides, validate and resolve.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is not allowed, or two settings conflict.
    """
    file = Path(path)
    tree = read_yaml(file)
    apply_overrides(tree, overrides)
    return build(tree, name=file.stem)


def read_yaml(file: Path) -> dict[str, Any]:
    """Parse one YAML mapping; no tags, no aliases, no duplicate keys, at most 1 MB."""
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes; is this a configuration?")
        tree = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file!s:.300}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"cannot read {str(file)!r:.300}: {error}; give the path of a YAML file") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must be a mapping of sections (model, method, data, train, ...), got {shown(tree)}")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.key=value` pairs in `tree`; values are YAML (`1e-4`, `[q_proj, v_proj]`, `null`)."""
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or len(parts) != 2 or not all(parts):
            raise ConfigError(
                f"override `{override:.200}`: write section.key=value, for example train.learning_rate=1e-4"
            )
        try:
            value = parse(text)
        except ConfigError as error:
            raise ConfigError(f"override `{override:.200}`: {error}") from error
        section = tree.setdefault(parts[0], {})
        if section is None:
            section = tree[parts[0]] = {}
        if not isinstance(section, dict):
            raise ConfigError(f"override `{override:.200}`: in the file, {_no_section(parts[0], section)}")
        section[parts[1]] = value


def build(tree: Mapping[str, Any], name: str = "run") -> RunConfig:
    """Validate a nested mapping and fill in what depends on other settings.

    Args:
        tree: sections of keys, as in a YAML file.
        name: names the run folder when `output.dir` is not given.
    """
    # `train:` with every key commented out is an empty section.
    tree = {key: value for key, value in tree.items() if value is not None or key not in RunConfig.model_fields}
    method = tree.get("method")
    if isinstance(method, dict) and "name" not in method:
        tree["method"] = {"name": "lora", **method}
    elif isinstance(method, str):
        tree["method"] = {"name": method}
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        mistakes = error.errors()
        lines = list(dict.fromkeys(_explain(dict(item)) for item in mistakes[:MAX_MISTAKES]))
        if len(mistakes) > MAX_MISTAKES:
            lines.append(f"... and {len(mistakes) - MAX_MISTAKES} more mistakes")
        raise ConfigError("\n".join(lines)) from error
    check(config)
    return _resolve(config, name)


def check(config: RunConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: with the first problem.
    """
    for find in (*CHECKS, *METHOD_CHECKS):
        problem = find(config)
        if problem:
            raise ConfigError(problem)


def dump(config: RunConfig) -> str:
    """YAML text that loads back to an equal configuration."""
    return render(config.model_dump(mode="json"))


def leaves(config: RunConfig) -> dict[str, Any]:
    """`{"section.key": value}` of every setting, as JSON values; for diffs."""
    tree = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def _resolve(config: RunConfig, name: str) -> RunConfig:
    tree = config.model_dump()
    tree["method"] = config.method.model_dump(exclude_unset=True)  # method.adapter fills in what was not said
    train, data = tree["train"], config.data
    if train["global_batch_rows"] is None and train["global_batch_tokens"] is None:
        train["global_batch_rows"] = 16
    if data.packing:
        train["micro_batch_tokens"] = train["micro_batch_tokens"] or 2 * data.max_length
    else:
        train["micro_batch_rows"] = train["micro_batch_rows"] or 4
    if train["learning_rate"] is None:
        train["learning_rate"] = config.method.default_learning_rate
    if train["eval_every_steps"] is None:
        train["eval_every_steps"] = train["save_every_steps"]
    if tree["output"]["dir"] is None:
        try:
            tree["output"]["dir"] = check_path(f"runs/{name}")
        except ValueError as error:
            raise ConfigError(f"the file's name cannot name a run folder ({error}); set output.dir") from error
    return RunConfig.model_validate(tree)


def _one_global_batch(config: RunConfig) -> str | None:
    train = config.train
    if train.global_batch_rows is not None and train.global_batch_tokens is not None:
        return "train.global_batch_rows and train.global_batch_tokens are both set; keep one, remove the other"
    return None


def _micro_batch_matches_packing(config: RunConfig) -> str | None:
    train, data = config.train, config.data
    if data.packing and train.micro_batch_rows is not None:
        return "train.micro_batch_rows is for padded batches, but data.packing is true; set train.micro_batch_tokens"
    if not data.packing and train.micro_batch_tokens is not None:
        return "train.micro_batch_tokens is for packed batches, but data.packing is false; set train.micro_batch_rows"
    if train.micro_batch_tokens is not None and train.micro_batch_tokens < data.max_length:
        return (
            f"train.micro_batch_tokens is {train.micro_batch_tokens}, less than data.max_length "
            f"({data.max_length}): a longest row would not fit; raise the first or lower the second"
        )
    return None


def _adam_epsilon_exists_in_fp16(config: RunConfig) -> str | None:
    train = config.train
    if train.optimizer_dtype == "fp16" and train.adam_epsilon < 6e-8:
        return (
            f"train.adam_epsilon is {train.adam_epsilon:g} and train.optimizer_dtype is fp16: the smallest fp16 number "
            "is 6e-8, so epsilon becomes 0 and Adam divides by zero (the loss turns into nan after a step or two). "
            "Set train.adam_epsilon=1e-5, or better train.optimizer_dtype=fp32"
        )
    return None


def _eight_bit_states_have_their_own_dtype(config: RunConfig) -> str | None:
    train = config.train
    if train.optimizer == "adamw8bit" and train.optimizer_dtype != "fp32":
        return (
            f"train.optimizer_dtype is {train.optimizer_dtype}, but train.optimizer=adamw8bit keeps 8-bit "
            "states beside fp32 masters; set train.optimizer_dtype=fp32"
        )
    return None


def _full_trains_what_quantization_freezes(config: RunConfig) -> str | None:
    if config.model.quantization != "none" and config.method.name == "full":
        return (
            f"model.quantization is {config.model.quantization}, but method.name=full trains every weight, and "
            "quantized weights are frozen: a small update would be rounded away. Set model.quantization=none or "
            "method.name=lora"
        )
    return None


def _llm_int8_is_for_int8(config: RunConfig) -> str | None:
    model = config.model
    if model.int8_compute == "llm_int8" and model.quantization not in ("int8", "none"):
        return (
            f"model.int8_compute is llm_int8, but model.quantization is {model.quantization}; set "
            "model.quantization=int8 or model.int8_compute=weight_only"
        )
    return None


CHECKS = (
    _one_global_batch,
    _micro_batch_matches_packing,
    _adam_epsilon_exists_in_fp16,
    _eight_bit_states_have_their_own_dtype,
    _full_trains_what_quantization_freezes,
    _llm_int8_is_for_int8,
)


def valid_keys(section: str | None = None, method: str = "lora") -> tuple[str, ...]:
    """Keys allowed at the top, or inside `section` (of `method`, for the method section)."""
    if section is None:
        return tuple(RunConfig.model_fields)
    if section == "method":
        return tuple(METHODS[method].model_fields)
    annotation = RunConfig.model_fields[section].annotation
    return tuple(cast(type[BaseModel], annotation).model_fields)


def every_key() -> Iterator[str]:
    """All valid `section.key` names."""
    for section in RunConfig.model_fields:
        for method in METHODS if section == "method" else ("lora",):
            yield from (f"{section}.{key}" for key in valid_keys(section, method))


def _explain(item: dict[str, Any]) -> str:
    """One pydantic error as: what was given, what is allowed, what to do."""
    location = [str(part) for part in item["loc"]]
    in_method = location[0] == "method" and len(location) > 1 and location[1] in METHODS
    method = location.pop(1) if in_method else "lora"
    known = set(every_key()) | set(RunConfig.model_fields)
    while len(location) > 1 and ".".join(location[:2]) in known and len(location) > 2:
        location.pop()  # drop union branches and tuple indexes: users think in keys
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        section = location[0] if len(location) > 1 else None
        allowed = valid_keys(section, method)
        near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.4)
        elsewhere = [name for name in every_key() if name.endswith("." + location[-1])]
        owners = [name for name in METHODS if in_method and location[-1] in valid_keys("method", name)]
        if owners:
            hint = f"it belongs to method.name={' or '.join(owners)}; {method} has {', '.join(allowed)}"
        elif near:
            hint = f"did you mean `{f'{section}.' if section else ''}{near[0]}`?"
        elif elsewhere:
            hint = f"did you mean `{elsewhere[0]}`?"
        else:
            hint = f"allowed here: {', '.join(allowed)}"
        return f"unknown key `{key:.200}`; {hint}"
    if item["type"] == "missing":
        return f"`{key}` is required; for example {key}=embedded" if key == "model.path" else _missing(key)
    if item["type"] == "union_tag_invalid":
        return f"`method.name` is {item['ctx']['tag']!r:.80}; allowed: {', '.join(METHODS)}"
    if len(location) == 1 and item["type"] in ("model_type", "model_attributes_type"):
        return _no_section(location[0], item["input"])
    if item["type"] == "invalid_key":
        return f"`{key:.200}` is no text: a key must be text"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"`{key}` is {shown(item['input'])}: {message[:1].lower()}{message[1:]}"


def _missing(key: str) -> str:
    return "`model.path` is required; for example model.path=embedded" if key == "model" else f"`{key}` is required"


def _no_section(section: str, value: object) -> str:
    """What to write instead of `model: embedded`."""
    main = MAIN_KEYS.get(section)
    if main is None:
        return f"unknown section `{section:.60}`; allowed: {', '.join(RunConfig.model_fields)}"
    inside = value if isinstance(value, (str, int, float)) and section in FROM_SCALAR else main[1]
    example = f"{{{main[0]}: {shown(inside).strip(QUOTES)}}}"
    return f"`{section}` is {shown(value)}: it is a section of keys; write `{section}: {example}`"


def shown(value: object) -> str:
    """`repr` of what a user gave, short; Python refuses to print numbers of thousands of digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {'number' if isinstance(value, int) else type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."
