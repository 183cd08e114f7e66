"""What THUDM's own config.json says, in the words of transformers; read by the plan, the tokenizer and the loader.

ChatGLM2 and ChatGLM3 are transformers' GLM model under other names; version 1 is a model of its own. Their folders ask
for code of their own (`auto_map`). It is never run, and no Auto* class of transformers is ever given such a folder: it
would ask on standard input whether to run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fitune.errors import ConfigError

# What must hold for the weights to be those of a GLM model: value there, and where the key is missing.
_NEEDED = {
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "apply_residual_connection_post_layernorm": (False, False),
    "add_bias_linear": (False, False),
    "fp32_residual_connection": (False, False),
    "hidden_dropout": (0, 0),
    "attention_dropout": (0, 0),
}

# Where config.json of ChatGLM-6B names its `Blank`; older revisions have 20,000 ids more in front.
BLANK_IDS = {"bos_token_id": 130004, "gmask_token_id": 130001, "mask_token_id": 130000}


class Blank(NamedTuple):
    """The ids with which ChatGLM-6B marks a blank: `gmask` (else `mask`) stands where it is, `sop` begins its text."""

    sop: int
    gmask: int
    mask: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Blank:
        """Those of a config.json that `check_version_1` let pass."""
        return cls(*(config.get(key, default) for key, default in BLANK_IDS.items()))


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is THUDM's own, of any version."""
    return config.get("model_type") == "chatglm"


def is_version_1(config: Mapping[str, Any]) -> bool:
    """ChatGLM-6B: `inner_hidden_size` and two rows of positions, where later versions have `ffn_hidden_size`."""
    return "inner_hidden_size" in config or config.get("position_encoding_2d") is True


def check_plain(config: Mapping[str, Any]) -> None:
    """Refuse weights that are not the plain 16-bit model: packed integers, or a prefix encoder beside them.

    Raises:
        ConfigError: naming the key.
    """
    for key in ("quantization_bit", "pre_seq_len"):
        if config.get(key):
            raise ConfigError(f"config.json: `{key}` is {config[key]!r:.60}; give the plain 16-bit model without it")


def check_version_1(config: Mapping[str, Any]) -> None:
    """Refuse what is no ChatGLM-6B, as far as sizes do not show it.

    Raises:
        ConfigError: naming the key.
    """
    check_plain(config)
    if config.get("position_encoding_2d", True) is not True:
        raise ConfigError("config.json: `position_encoding_2d` is not true; only ChatGLM-6B models with it are known")
    _number(config, "layernorm_epsilon", 1e-5)
    width, heads = _whole(config, "hidden_size", 4096), _whole(config, "num_attention_heads", 32)
    if width % (4 * heads):
        raise ConfigError(
            f"config.json: hidden_size {width} makes no {heads} heads of a width divisible by 4, which two rotated "
            "halves need"
        )
    vocabulary = _whole(config, "vocab_size", 130528)
    ids = [config.get(key, default) for key, default in BLANK_IDS.items()]
    if not all(type(i) is int and 0 <= i < vocabulary for i in ids) or len(set(ids)) < len(ids):
        raise ConfigError(
            f"config.json: {', '.join(BLANK_IDS)} are {ids!r:.60}; different ids below vocab_size ({vocabulary}) are "
            "needed"
        )


def glm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the GLM model that an original ChatGLM2/3 file describes.

    Sizes are handed on as they stand; `arch.read_arch` checks them.

    Raises:
        ConfigError: a variant whose weights are not those of a GLM model.
    """
    check_plain(config)
    for key, (needed, default) in _NEEDED.items():
        if config.get(key, default) != needed:
            raise ConfigError(
                f"config.json: `{key}` is {config[key]!r:.60}; only ChatGLM models with {needed} are known"
            )
    eos = config.get("eos_token_id", 2)
    if 2 not in (eos if isinstance(eos, list) else [eos]):
        raise ConfigError(
            f"config.json: `eos_token_id` is {eos!r:.60}; ChatGLM2 and 3 end with 2. Of GLM-4 give the version for "
            "transformers, such as THUDM/glm-4-9b-chat-hf"
        )
    heads = config.get("num_attention_heads")
    return {
        "model_type": "glm",
        "vocab_size": config.get("padded_vocab_size"),
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("ffn_hidden_size"),
        "num_hidden_layers": config.get("num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("multi_query_group_num") if config.get("multi_query_attention") else heads,
        "head_dim": config.get("kv_channels"),
        "hidden_act": "silu",
        "attention_bias": config.get("add_qkv_bias", False),
        "attention_dropout": 0.0,
        "rms_norm_eps": _number(config, "layernorm_epsilon", 1e-5),  # GLM-4's default would be 1.6e-7
        "max_position_embeddings": _whole(config, "seq_length", 2048),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * _number(config, "rope_ratio", 1.0),
            "partial_rotary_factor": 0.5,
        },
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        # Those of GLM-4, the defaults, lie beyond these embeddings. Padding is `<unk>`, as in the original tokenizer.
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1e9:
        raise ConfigError(f"config.json: `{key}` is {value!r:.60}; a positive whole number is needed")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
        raise ConfigError(f"config.json: `{key}` is {value!r:.60}; a positive number is needed")
    return float(value)
