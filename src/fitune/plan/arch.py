"""config.json -> every parameter of the model with its shape, without torch or transformers.

    arch = read_arch(json.loads(Path("model/config.json").read_text()))
    arch.total, arch.block_shape()

Shapes are those of transformers' causal language models, so the sums are exact; the tests hold each family to the
real class on the meta device. Original ChatGLM2/3 files are read as the GLM model they are converted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fitune.errors import ConfigError
from fitune.plan.chatglm import check_version_1, glm_config, is_version_1
from fitune.plan.saves import BlockShape

Config = Mapping[str, Any]  # config.json is whatever its author wrote
# Ten times the largest published models: nothing here may loop for long over what a file says.
MAX_SIZE, MAX_LAYERS = 10_000_000, 2_000
Flag = bool | tuple[str, bool]  # a constant, or a key of config.json with its default


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: where it stands in the block, its group of `saves.GROUPS`, its sizes."""

    path: str
    group: str
    outs: int
    ins: int
    bias: bool = False

    @property
    def name(self) -> str:
        """Last component of the path, as `method.target_modules` names it."""
        return self.path.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Parameter:
    """Parameters of one name; `{}` in the name stands for the layer, `copies` is the number of layers or 1."""

    name: str
    shape: tuple[int, ...]
    copies: int = 1

    @property
    def elements(self) -> int:
        """Elements of one copy."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ArchSpec:
    """Sizes of one model.

    Attributes:
        model_type: as config.json says.
        family: the transformers family whose modules these are (`glm` for original ChatGLM2/3 files).
        heads, kv_heads, head_dim: query heads, key and value heads, width of each.
        intermediate: inner width of the MLP.
        vocab: rows of the embedding.
        tied: the output head is the embedding.
        gated: the MLP has a gate.
        norm: RMSNorm, or LayerNorm with a bias.
        qk_norm: queries and keys are normalised per head.
        rotary: width of a head that one axis of rotary positions turns; 0 without them (ALiBi).
        positions: longest sequence the model knows, if it says so.
        plain: what in config.json keeps the model off the engine (docs/engine.md); None: nothing does.
        targets: what `method.target_modules=attention` stands for.
        linears: the linear layers of a block, in module order.
        block: path of a block, `{}` for its number.
        parameters: every parameter of the model, tied ones once.
        quantized: the linear layers are quantized in the files, by bitsandbytes.
        whole: (block, path) of those that are not.
        patterns: regular expressions in config.json that may name more such layers.
        double_quant: absmax values of 4-bit weights are in 8 bits; bitsandbytes may have stored them in fp32.
        axes: positions of a token.
        prefix: a document's tokens see all of what stands before its answer.
    """

    model_type: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool
    norm: Literal["rms", "layer"]
    qk_norm: bool
    rotary: int
    positions: int | None
    plain: str | None
    targets: tuple[str, ...]
    linears: tuple[Linear, ...]
    block: str
    parameters: tuple[Parameter, ...]
    quantized: bool = False
    whole: frozenset[tuple[int, str]] = frozenset()
    patterns: tuple[str, ...] = ()
    double_quant: bool = True
    axes: int = 1
    prefix: bool = False

    @property
    def total(self) -> int:
        """Parameters of the base model."""
        return sum(parameter.elements * parameter.copies for parameter in self.parameters)

    def block_shape(self, lora: tuple[int, int, int, int] = (0, 0, 0, 0)) -> BlockShape:
        """What `saves.block_saves` wants to know of a block."""
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate)
        return BlockShape(
            *sizes,
            gated=self.gated,
            qk_norm=self.qk_norm,
            layer_norm=self.norm == "layer",
            axes=self.axes,
            prefix=self.prefix,
            lora=lora,
        )


@dataclass(frozen=True)
class _Split:
    """How a family with split projections (Llama's modules) differs from the others."""

    qkv_bias: Flag = False
    o_bias: Flag = False
    mlp_bias: Flag = False
    kv_heads: int | None = None  # where config.json says nothing; None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qk_norm: bool = False
    fused_gate: bool = False  # gate and up are one layer
    rotary_share: float = 1.0


_PATTERN = frozenset("*+?[](){}|^$\\")
_ATTENTION: Flag = ("attention_bias", False)
_SPLIT: dict[str, _Split] = {
    "llama": _Split(qkv_bias=_ATTENTION, o_bias=_ATTENTION, mlp_bias=("mlp_bias", False)),
    "mistral": _Split(kv_heads=8),
    "qwen2": _Split(qkv_bias=True, kv_heads=32),
    "qwen3": _Split(qkv_bias=_ATTENTION, o_bias=_ATTENTION, kv_heads=32, head_dim=128, qk_norm=True),
    "glm": _Split(qkv_bias=("attention_bias", True), kv_heads=2, head_dim=128, fused_gate=True, rotary_share=0.5),
}


def read_arch(config: Config) -> ArchSpec:
    """Sizes and parameters of the model that a config.json describes.

    Raises:
        ConfigError: an unknown `model_type`, a missing or impossible size, or a variant with other parameters.
    """
    arch, stored = _read(config), config.get("quantization_config")
    if not isinstance(stored, dict):
        return arch
    single = stored.get("load_in_4bit") and not stored.get("bnb_4bit_use_double_quant")
    return _left_out(replace(arch, quantized=True, double_quant=not single), stored.get("llm_int8_skip_modules"))


def linear_names(arch: ArchSpec) -> Iterator[tuple[tuple[int, str], str]]:
    """(block, path) of every linear layer, and its name in the model."""
    for number in range(arch.layers):
        yield from (((number, one.path), f"{arch.block.format(number)}.{one.path}") for one in arch.linears)


def _left_out(arch: ArchSpec, skipped: Any) -> ArchSpec:
    """Without the layers that bitsandbytes was told to leave whole, by a part of their names or the end of it.

    So transformers 4 or 5 read them. Both also take regular expressions; one from a file could run for ever.
    """
    keys = {key.strip(".") for key in skipped if isinstance(key, str)} if isinstance(skipped, list) else set()
    ends = {one.path for one in arch.linears if any(key and one.path.endswith(key) for key in keys)}
    whole = {place for place, name in linear_names(arch) if place[1] in ends or not keys.isdisjoint(_parts(name))}
    return replace(arch, whole=frozenset(whole), patterns=tuple(sorted(key for key in keys if _PATTERN & set(key))))


def _parts(name: str) -> set[str]:
    words = name.split(".")  # of a.b.c: a, a.b, a.b.c, b, b.c, c
    return {".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def _read(config: Config) -> ArchSpec:
    model_type = config.get("model_type")
    if model_type in _SPLIT:
        return _split(config, str(model_type))
    reader = _OTHERS.get(str(model_type))
    if reader is None:
        known = ", ".join(sorted({*_SPLIT, *_OTHERS}))
        raise ConfigError(
            f"config.json: model_type {str(model_type)[:60]!r} cannot be planned; known: {known}. Training does not "
            "need the plan: `fitune train` takes every causal language model of transformers"
        )
    return reader(config)


def _split(config: Config, family: str) -> ArchSpec:
    row = _SPLIT[family]
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", row.kv_heads or heads, null=heads)
    head_dim = _size(config, "head_dim", row.head_dim or hidden // heads, null=hidden // heads)
    inner, queries, keys = _size(config, "intermediate_size"), heads * head_dim, kv_heads * head_dim
    if heads % kv_heads:
        raise ConfigError(f"config.json: {heads} attention heads cannot share {kv_heads} key and value heads evenly")
    qkv_bias, mlp_bias = _flag(config, row.qkv_bias), _flag(config, row.mlp_bias)
    up = ("gate_up_proj",) if row.fused_gate else ("gate_proj", "up_proj")
    linears = (
        Linear("self_attn.q_proj", "qkv", queries, hidden, qkv_bias),
        Linear("self_attn.k_proj", "qkv", keys, hidden, qkv_bias),
        Linear("self_attn.v_proj", "qkv", keys, hidden, qkv_bias),
        Linear("self_attn.o_proj", "o", hidden, queries, _flag(config, row.o_bias)),
        *(Linear(f"mlp.{name}", "up", 2 * inner // len(up), hidden, mlp_bias) for name in up),
        Linear("mlp.down_proj", "down", hidden, inner, mlp_bias),
    )
    layers, vocab = _size(config, "num_hidden_layers"), _size(config, "vocab_size")
    tied = _flag(config, ("tie_word_embeddings", False))
    share = config.get("partial_rotary_factor", _rope(config).get("partial_rotary_factor"))
    share = share if isinstance(share, int | float) and 0 < share <= 1 else row.rotary_share
    norms = ["input_layernorm", "post_attention_layernorm"]
    heads_normed = ["self_attn.q_norm", "self_attn.k_norm"] if row.qk_norm else []
    block = "model.layers.{}"
    parameters = (
        Parameter("model.embed_tokens.weight", (vocab, hidden)),
        *_of_block(block, linears, layers),
        *(Parameter(f"{block}.{name}.weight", (head_dim,), layers) for name in heads_normed),
        *(Parameter(f"{block}.{name}.weight", (hidden,), layers) for name in norms),
        Parameter("model.norm.weight", (hidden,)),
        *([] if tied else [Parameter("lm_head.weight", (vocab, hidden))]),
    )
    return ArchSpec(
        model_type=str(config.get("model_type")),
        family=family,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocab=vocab,
        tied=tied,
        gated=True,
        norm="rms",
        qk_norm=row.qk_norm,
        rotary=int(head_dim * share),
        positions=_positions(config),
        plain=_plain(config, family),
        targets=("q_proj", "v_proj"),
        linears=linears,
        block=block,
        parameters=parameters,
    )


def _chatglm(config: Config) -> ArchSpec:
    """THUDM's own files: version 1 has modules of its own, versions 2 and 3 are GLM models."""
    if not is_version_1(config):
        return replace(_split(glm_config(config), "glm"), model_type=str(config["model_type"]))
    check_version_1(config)
    return _fused(
        config,
        sizes=(_size(config, "hidden_size"), _size(config, "num_layers"), _size(config, "num_attention_heads")),
        inner=_size(config, "inner_hidden_size"),
        attention="attention",
        block="transformer.layers.{}",
    )


def _bloom(config: Config) -> ArchSpec:
    hidden = _size(config, "n_embed" if config.get("n_embed") is not None else "hidden_size")
    layers = _size(config, "n_layer" if "n_layer" in config else "num_hidden_layers")
    heads = _size(config, "n_head" if "n_head" in config else "num_attention_heads")
    return _fused(
        config, (hidden, layers, heads), inner=4 * hidden, attention="self_attention", block="transformer.h.{}"
    )


_OTHERS: dict[str, Callable[[Config], ArchSpec]] = {"bloom": _bloom, "chatglm": _chatglm}


def _fused(config: Config, sizes: tuple[int, int, int], inner: int, attention: str, block: str) -> ArchSpec:
    """BLOOM and ChatGLM version 1: fused queries, keys and values, LayerNorm, biases everywhere but in the head."""
    hidden, layers, heads = sizes
    vocab, tied = _size(config, "vocab_size"), _flag(config, ("tie_word_embeddings", True))
    is_bloom = attention == "self_attention"
    linears = (
        Linear(f"{attention}.query_key_value", "qkv", 3 * hidden, hidden, True),
        Linear(f"{attention}.dense", "o", hidden, hidden, True),
        Linear("mlp.dense_h_to_4h", "up", inner, hidden, True),
        Linear("mlp.dense_4h_to_h", "down", hidden, inner, True),
    )
    ends = ("weight", "bias")
    norms = ("input_layernorm", "post_attention_layernorm")
    outer = ("word_embeddings_layernorm", "ln_f") if is_bloom else ("final_layernorm",)
    parameters = (
        Parameter("transformer.word_embeddings.weight", (vocab, hidden)),
        *_of_block(block, linears, layers),
        *(Parameter(f"{block}.{name}.{end}", (hidden,), layers) for name in norms for end in ends),
        *(Parameter(f"transformer.{name}.{end}", (hidden,)) for name in outer for end in ends),
        *([] if tied else [Parameter("lm_head.weight", (vocab, hidden))]),
    )
    return ArchSpec(
        model_type=str(config["model_type"]),
        family=str(config["model_type"]),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        vocab=vocab,
        tied=tied,
        gated=False,
        norm="layer",
        qk_norm=False,
        rotary=0 if is_bloom else hidden // heads // 2,
        positions=_positions(config),
        plain=next((key for key in _REFUSED if config.get(key)), None),
        targets=("query_key_value",),
        linears=linears,
        block=block,
        parameters=parameters,
        axes=1 if is_bloom else 2,
        prefix=not is_bloom,
    )


def _of_block(block: str, linears: tuple[Linear, ...], layers: int) -> Iterator[Parameter]:
    for linear in linears:
        yield Parameter(f"{block}.{linear.path}.weight", (linear.outs, linear.ins), layers)
        if linear.bias:
            yield Parameter(f"{block}.{linear.path}.bias", (linear.outs,), layers)


def _size(config: Config, key: str, default: int | None = None, null: int | None = None) -> int:
    """A positive whole number; `default` where the key is missing, `null` where it is null."""
    value = config.get(key, default)
    value = null if value is None and null is not None else value
    if value is None:
        raise ConfigError(f"config.json: `{key}` is missing; it is needed to count the parameters")
    most = MAX_LAYERS if "layer" in key else MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ConfigError(f"config.json: `{key}` is {_shown(value)}; a whole number from 1 to {most:,} is needed")
    return value


def _shown(value: object) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python refuses to print thousands of digits
        return "a number too large to show"


def _flag(config: Config, flag: Flag) -> bool:
    if isinstance(flag, bool):
        return flag
    value = config.get(*flag)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: `{flag[0]}` is {_shown(value)}; true or false is needed")
    return value


def _rope(config: Config) -> Config:
    found = config.get("rope_parameters") or config.get("rope_scaling")
    return found if isinstance(found, dict) else {}


# What the engine's block does not do (engine/spec.py).
_REFUSED = ("attention_dropout", "hidden_dropout", "apply_residual_connection_post_layernorm")
# Angles of the other kinds depend on the length of the row.
_ROPE = ("default", "linear", "llama3")


def _plain(config: Config, family: str) -> str | None:
    """The engine's own refusals (engine/spec.py), from config.json with transformers' defaults."""
    rope = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    # Mistral alone has sliding windows unless it says otherwise; Qwen has the switch.
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if family.startswith("qwen") and not config.get("use_sliding_window", False):
        window = None
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"hidden_act {config['hidden_act']!r}"
    if rope not in _ROPE:
        return f"rope_type {rope!r}"
    if config.get("attention_dropout"):
        return "attention_dropout"
    return "sliding-window attention" if window else None


def _positions(config: Config) -> int | None:
    value = config.get("max_position_embeddings", config.get("max_sequence_length"))
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
