"""ChatGLM-6B written down from its formulas, one row, one head, one token at a time."""

from __future__ import annotations

import json
import math
import shutil

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

SIZES = {
    "model_type": "chatglm",
    "vocab_size": 200,
    "hidden_size": 64,
    "inner_hidden_size": 96,
    "num_attention_heads": 4,
    "num_layers": 3,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 256,
    "position_encoding_2d": True,
    "bos_token_id": 194,
    "eos_token_id": 195,
    "pad_token_id": 3,
    "mask_token_id": 190,
    "gmask_token_id": 191,
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "architectures": ["ChatGLMModel"],
    "torch_dtype": "float16",
}


def random_weights(sizes=SIZES, seed=0):
    """Published names -> random values, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, rows = sizes["hidden_size"], sizes["inner_hidden_size"], sizes["vocab_size"]
    shapes = {"transformer.word_embeddings.weight": (rows, width), "lm_head.weight": (rows, width)}
    norms = [
        f"transformer.layers.{n}.{p}_layernorm" for n in range(sizes["num_layers"]) for p in ("input", "post_attention")
    ]
    for name in (*norms, "transformer.final_layernorm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    linears = {
        "attention.query_key_value": (3 * width, width),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (inner, width),
        "mlp.dense_4h_to_h": (width, inner),
    }
    for n in range(sizes["num_layers"]):
        for path, shape in linears.items():
            shapes |= {f"transformer.layers.{n}.{path}.weight": shape, f"transformer.layers.{n}.{path}.bias": shape[:1]}
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: w + 1 if "norm.weight" in name else w for name, w in weights.items()}


def context_length(ids, sizes=SIZES):
    return ids.index(sizes["bos_token_id"])


def position_rows(ids, sizes=SIZES):
    c = context_length(ids, sizes)
    m = ids.index(sizes["gmask_token_id"] if sizes["gmask_token_id"] in ids else sizes["mask_token_id"])
    first = [i if i < c else m for i in range(len(ids))]
    second = [0 if i < c else i - c + 1 for i in range(len(ids))]
    return first, second


def attends(i, j, c):
    return j <= i or j < c


def turned(vector, position, half_angles=False):
    """One half of a head rotated: element i with element i + n/2 by position / 10000^(2i / n)."""
    n = len(vector)
    out = vector.clone()
    for i in range(n // 2):
        frequency = torch.tensor(1 / 10000 ** (2 * i / n), dtype=torch.float32).half()
        if half_angles:
            angle = (torch.tensor(float(position)).half() * frequency).float()
        else:
            angle = torch.tensor(float(position)) * frequency.float()
        cos, sin = torch.cos(angle), torch.sin(angle)
        a, b = vector[i], vector[i + n // 2]
        out[i] = a * cos - b * sin
        out[i + n // 2] = b * cos + a * sin
    return out


def logits(weights, ids, sizes=SIZES):
    """(T, V) of one row without pads."""
    first, second = position_rows(ids, sizes)
    c, heads = context_length(ids, sizes), sizes["num_attention_heads"]
    size = sizes["hidden_size"] // heads
    alpha = math.sqrt(2 * 28)
    x = weights["transformer.word_embeddings.weight"][torch.tensor(ids)]

    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        scaled = (x - mean) / torch.sqrt(variance + sizes["layernorm_epsilon"])
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for number in range(sizes["num_layers"]):
        layer = f"transformer.layers.{number}"
        a = norm(x, f"{layer}.input_layernorm")
        fused = linear(a, f"{layer}.attention.query_key_value")
        seen = torch.zeros(len(ids), sizes["hidden_size"])
        for head in range(heads):
            start = head * 3 * size
            q, k, v = (fused[:, start + part * size : start + (part + 1) * size] for part in range(3))
            halves = (slice(0, size // 2), slice(size // 2, size))
            q, k = (
                torch.stack(
                    [
                        torch.cat([turned(row[half], at[t]) for half, at in zip(halves, (first, second), strict=True)])
                        for t, row in enumerate(rows)
                    ]
                )
                for rows in (q, k)
            )
            for i in range(len(ids)):
                keys = [j for j in range(len(ids)) if attends(i, j, c)]
                shares = torch.softmax(k[keys] @ q[i] / math.sqrt(size), 0)
                seen[i, head * size : (head + 1) * size] = shares @ v[keys]
        x = a * alpha + linear(seen, f"{layer}.attention.dense")
        b = norm(x, f"{layer}.post_attention_layernorm")
        h = linear(b, f"{layer}.mlp.dense_h_to_4h")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = b * alpha + linear(h, f"{layer}.mlp.dense_4h_to_h")
    x = norm(x, "transformer.final_layernorm")
    return F.linear(x, weights["lm_head.weight"])


# The published configuration, made small; ids and vocabulary are the real tokenizer's.
PUBLISHED = {
    "_name_or_path": "THUDM/chatglm-6b",
    "hidden_size": 32,
    "inner_hidden_size": 64,
    "num_attention_heads": 2,
    "num_layers": 2,
}


def write_folder(folder, shared, form="bin", **changes):
    """A tiny ChatGLM-6B folder as published: two .bin shards with stored frequencies, code, the real tokenizer."""
    folder.mkdir(parents=True)
    config = json.loads((shared / "configs" / "chatglm-6b" / "config.json").read_text()) | PUBLISHED | changes
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers" / "chatglm-6b" / name, folder / name)
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_chatglm.py").write_text("raise SystemExit('code of the model folder was run')\n")
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    frequencies = {f"transformer.layers.{n}.attention.rotary_emb.inv_freq": torch.rand(4) for n in range(2)}
    if form == "safetensors":
        save_file({name: w.clone() for name, w in (weights | frequencies).items()}, folder / "model.safetensors")
        return folder
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, chosen in shards.items():
        torch.save({name: weights[name] for name in chosen} | frequencies, folder / file)
    index = {name: file for file, chosen in shards.items() for name in (*chosen, *frequencies)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
