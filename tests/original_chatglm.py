"""Tiny ChatGLM2/3 folders as THUDM publishes them, and a forward pass written from the formulas.

Nothing here is taken from fitune: names, fused projections, rotation in neighbours, groups of keys and values.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

AUTO_MAP = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMModel"}
CONFIG = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": AUTO_MAP,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 48,
    "fp32_residual_connection": False,
    "hidden_size": 32,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "padded_vocab_size": 352,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What would happen if anybody ran it.
CODE = "raise SystemExit('code of the model folder was run')\n"


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer message: varint, 32-bit float, or text and embedded messages."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


# BPE, byte fallback; identity normalizer, dummy space, spaces kept.
TRAINER = {3: 2, 35: 1}
NORMALIZER = {1: b"identity", 3: 1, 4: 0}
WORDS = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,!你好春夏山水", "ay", "say", "▁say", "你好", "▁你好", "春山"]


def sentencepiece_file(words=WORDS, trainer=TRAINER, normalizer=NORMALIZER, extra=()) -> bytes:
    """A `tokenizer.model`: <unk>, <s>, </s>, the bytes, and words, each scored lower than the one before."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, -float(i), 1) for i, text in enumerate(words)]
    messages = [field(1, t.encode()) + field(2, score) + field(3, kind) for t, score, kind in (*pieces, *extra)]
    tail = [(2, b"".join(field(*item) for item in trainer.items()))]
    tail.append((3, b"".join(field(*item) for item in normalizer.items())))
    return b"".join(field(*item) for item in [*((1, message) for message in messages), *tail])


def make_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by their original names, large enough that each of them matters."""
    width, inner = config["hidden_size"], config["ffn_hidden_size"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * config["kv_channels"], groups * config["kv_channels"]
    shapes = {"transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], width)}
    for i in range(config["num_layers"]):
        block = f"transformer.encoder.layers.{i}"
        shapes |= {
            f"{block}.input_layernorm.weight": (width,),
            f"{block}.self_attention.query_key_value.weight": (queries + 2 * keys, width),
            f"{block}.self_attention.query_key_value.bias": (queries + 2 * keys,),
            f"{block}.self_attention.dense.weight": (width, queries),
            f"{block}.post_attention_layernorm.weight": (width,),
            f"{block}.mlp.dense_h_to_4h.weight": (2 * inner, width),
            f"{block}.mlp.dense_4h_to_h.weight": (width, inner),
        }
    shapes["transformer.encoder.final_layernorm.weight"] = (width,)
    shapes["transformer.output_layer.weight"] = (config["padded_vocab_size"], width)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.3)
        if "layernorm" in name:
            weights[name] += 1
    return weights


def write_folder(folder: Path, tokenizer: Path | None = None, form="bin", dtype=torch.float32, **changes) -> Path:
    """A folder with two shards of random weights.

    Args:
        tokenizer: folder with a real tokenizer.model; without it, `sentencepiece_file` is written.
        form: "bin" or "safetensors".
        changes: of CONFIG; `...` takes a key away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_chatglm.py").write_text(CODE)
    (folder / "configuration_chatglm.py").write_text(CODE)
    weights = {name: tensor.to(dtype) for name, tensor in make_weights(config).items()}
    weights["transformer.rotary_pos_emb.inv_freq"] = torch.ones(config["kv_channels"] // 4)
    ending, names = ("safetensors", list(weights)) if form == "safetensors" else ("bin", list(weights))
    stem = "model" if form == "safetensors" else "pytorch_model"
    half, weight_map = len(names) // 2, {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"{stem}-{number:05d}-of-00002.{ending}"
        tensors = {name: weights[name] for name in part}
        if form == "safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if tokenizer is None:
        (folder / "tokenizer.model").write_bytes(sentencepiece_file())
    else:
        shutil.copyfile(tokenizer / "tokenizer.model", folder / "tokenizer.model")
    return folder


def reference_logits(weights: dict[str, torch.Tensor], config: dict, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) ids -> (B, T, V) logits in the weights' dtype: dense attention, one head after another."""
    heads, width = config["num_attention_heads"], config["kv_channels"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    length = ids.shape[1]
    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    eps = config["layernorm_epsilon"]

    def norm(h, name):
        return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[name]

    turned = width // 2  # half of each head is rotated, neighbours together
    base = 10000.0 * config.get("rope_ratio", 1)
    angles = torch.arange(length)[:, None] * base ** (-torch.arange(0, turned, 2) / turned)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def rotate(h):
        even, odd = h[..., 0:turned:2], h[..., 1:turned:2]
        out = h.clone()
        out[..., 0:turned:2], out[..., 1:turned:2] = even * cos - odd * sin, odd * cos + even * sin
        return out

    future = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
    for i in range(config["num_layers"]):
        block = f"transformer.encoder.layers.{i}."
        h = norm(x, block + "input_layernorm.weight")
        fused = h @ weights[block + "self_attention.query_key_value.weight"].T
        fused = fused + weights[block + "self_attention.query_key_value.bias"]
        attended = []
        for head in range(heads):
            group = head * groups // heads
            q = rotate(fused[..., head * width : (head + 1) * width])
            k_at = (heads + group) * width
            v_at = (heads + groups + group) * width
            k, v = rotate(fused[..., k_at : k_at + width]), fused[..., v_at : v_at + width]
            attended.append(((q @ k.transpose(1, 2)) / width**0.5 + future).softmax(-1) @ v)
        x = x + torch.cat(attended, -1) @ weights[block + "self_attention.dense.weight"].T
        h = norm(x, block + "post_attention_layernorm.weight") @ weights[block + "mlp.dense_h_to_4h.weight"].T
        gate, up = h.chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ weights[block + "mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm.weight") @ weights["transformer.output_layer.weight"].T
