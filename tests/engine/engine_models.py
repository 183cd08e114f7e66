"""Tiny models of each family for the engine's tests, rows, and the comparison of two paths."""

from array import array

import pytest
import torch
import transformers

from fitune.config import build
from fitune.data.prepare import Row
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.bloom import BloomForCausalLM
from fitune.model.chatglm_v1 import ChatGLMForConditionalGeneration, read_config
from fitune.model.load import Base
from fitune.model.quantize import block_linears, quantize_blocks
from fitune.training.path import PlainPath

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama3": lambda: transformers.LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "glm": lambda: transformers.GlmConfig(**SIZES, head_dim=16, partial_rotary_factor=0.5, attention_bias=True),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=131, hidden_size=96, n_layer=3, n_head=6, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}
CONFIGS["chatglm"] = lambda: read_config(
    {
        "hidden_size": 96,
        "num_layers": 3,
        "num_attention_heads": 4,
        "inner_hidden_size": 160,
        "vocab_size": 131,
        "max_sequence_length": 256,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 127,
        "gmask_token_id": 128,
        "mask_token_id": 129,
        "tie_word_embeddings": False,
    }
)
CLASSES = {"bloom": BloomForCausalLM, "chatglm": ChatGLMForConditionalGeneration}
BIASED = ["qwen2", "glm", "bloom", "chatglm"]
SOP, GMASK = 127, 128
TARGETS = {
    "attention": "attention",
    "linear": "linear",
    "output and down": ["o_proj", "down_proj"],
    "up alone": ["up_proj"],
}
FUSED = {"o_proj": "dense", "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"}
NAMES = {"glm": {"up_proj": "gate_up_proj"}, "bloom": FUSED, "chatglm": FUSED}


def targets_of(kind, targets):
    """A value of `TARGETS` in the names of a family."""
    named = TARGETS[targets]
    return named if isinstance(named, str) else [NAMES.get(kind, {}).get(name, name) for name in named]


def untrained(kind, dtype=torch.float32):
    """A random model without anything trained."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    if kind in CLASSES:
        model = CLASSES[kind](config).to(dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # ones and zeros would hide mistakes in them
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.requires_grad_(False).eval()


def make(kind, targets="linear", dtype=torch.float32, quantization="none", whole=(), **method):
    """The model with adapters; linear layers below a module of `whole` are not quantized."""
    model = untrained(kind, dtype)
    kept = {name: model.get_submodule(name) for name in block_linears(model) if any(f"{w}." in name for w in whole)}
    assert bool(kept) == bool(whole)
    if quantization != "none":
        quantize_blocks(model, quantization, torch.device("cpu"))
    for name, linear in kept.items():
        model.set_submodule(name, linear)
    base = Base(model, None, model.config.model_type, SIZES["vocab_size"], "")
    if method.get("name", "lora") == "lora":
        method = {"name": "lora", "r": 4, "target_modules": targets} | method
    config = build({"model": {"path": "x"}, "method": method})
    model = METHODS[config.method.name].apply(base, config.method)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.1)
    return model, base.model_type


def make_rows(lengths, seed=0):
    """Random ids; rows of five tokens and more end their context with gMASK and sop, which mean nothing to most."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = array("i", torch.randint(3, SOP, (length,), generator=generator).tolist())
        if length >= 5:
            ids[length // 2 - 1 : length // 2 + 1] = array("i", [GMASK, SOP])
        learn = bytes([0, *torch.randint(0, 2, (length - 1,), generator=generator).tolist()])
        rows.append(Row(ids, learn, f"row {number}"))
    return rows


def run(path, model, batch, scale=0.37):
    for parameter in trainable(model).values():
        parameter.grad = None
    loss = path.loss_and_grad(batch, scale)
    return loss.item(), {name: p.grad.detach().clone() for name, p in trainable(model).items()}


def difference(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def compare(model, engine, batch, bound):
    plain_loss, plain = run(PlainPath(model, engine.device), model, batch)
    loss, fast = run(engine, model, batch)
    assert loss == pytest.approx(plain_loss, rel=bound)
    for name in plain:
        assert difference(fast[name], plain[name]) <= bound, name


def only_what_is_declared(model, engine, batch):
    """The same micro-step again, everything that is not kept poisoned before each block's backward; nothing changes.

    The last block does not recompute, as its forward came just before; the second time it must.
    """
    torch.manual_seed(2)
    expected = run(engine, model, batch)
    made_again = []

    def poisoned(backward):
        def run(views, tokens, again):
            made_again.append(again)
            gradient = views["d"].clone()
            for buffer in engine._buffers._shared.values():
                buffer.fill_(float("nan") if buffer.is_floating_point() else 127)  # NaN of codes too
            views["d"].copy_(gradient)
            backward(views, tokens)

        return run

    for block in engine.blocks:
        block.backward = poisoned(block.backward)
    if engine.virtual:
        engine.virtual.gradient.fill_(float("nan"))
    torch.manual_seed(2)
    loss, gradients = run(engine, model, batch)
    assert made_again == [False, True, True]
    assert loss == expected[0]
    for name in gradients:
        assert torch.equal(gradients[name], expected[1][name]), name
