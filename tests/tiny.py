"""A tiny model, tokenizer and data file, made in code."""

from __future__ import annotations

import json
from pathlib import Path


def make_tokenizer(folder: Path) -> None:
    """Characters of ASCII and a few Chinese ones; bos, eos and pad ids 1, 2, 0."""
    from tokenizers import Tokenizer, decoders, models

    characters = [chr(c) for c in range(32, 127)] + list("\n，。春夏秋冬山水风月花鸟人心天地日夜")
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>", "<unk>"])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A random 2-layer model of width 64 with a tokenizer, as a Hugging Face folder."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    common = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, **common)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(**sizes, **common, tie_word_embeddings=True)
    elif kind == "bloom":
        config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **common)
    elif kind == "mpt":
        config = transformers.MptConfig(d_model=64, n_layers=2, n_heads=4, **common)
    else:
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **common)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases of zero would hide mistakes in them
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def make_rows(file: Path, count: int = 24) -> Path:
    """Alpaca rows of varied length that a tiny model can learn."""
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            row = {"instruction": f"say {i % 7}", "input": "x" * (i % 5), "output": "春山" * (1 + i % 6) + str(i % 7)}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file
