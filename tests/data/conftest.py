"""Real tokenizers beside the checkout, and a tiny one made in code."""

import gzip
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from fitune.data.tokenizer import Tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.fixture(scope="session")
def real_folder(shared, tmp_path_factory):
    """A folder as a model has it, of llama3, qwen2.5, qwen3 or chatglm3."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            source = shared / "tokenizers" / {"chatglm3": "chatglm3-6b"}.get(name, name)
            vocabulary = source if name != "qwen3" else shared / "tokenizers" / "qwen2.5"
            target = made[name] = tmp_path_factory.mktemp(name)
            (target / "tokenizer.json").write_bytes(gzip.decompress((vocabulary / "tokenizer.json.gz").read_bytes()))
            for file in ("tokenizer_config.json", "special_tokens_map.json"):
                if (source / file).is_file():
                    (target / file).write_bytes((source / file).read_bytes())
        return made[name]

    return folder


@pytest.fixture(scope="session")
def real(real_folder):
    """A real tokenizer by name."""
    made: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in made:
            made[name] = Tokenizer.load(real_folder(name))
        return made[name]

    return load


@pytest.fixture(scope="session")
def theirs(real_folder):
    """The same real tokenizer as transformers loads it."""
    made = {}

    def load(name: str):
        from transformers import AutoTokenizer

        if name not in made:
            made[name] = AutoTokenizer.from_pretrained(
                real_folder(name), local_files_only=True, trust_remote_code=False
            )
        return made[name]

    return load


def _write_tokenizer(folder: Path, special=CHATML + LLAMA3, bos_first=False, chat_template=None, **config) -> Path:
    """A byte-level tokenizer without merges, ids 0 pad, 1 bos, 2 eos, then `special`, then the bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    named = ["<pad>", "<bos>", "<eos>", *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={text: i for i, text in enumerate([*named, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(named)
    if bos_first:
        backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    tree = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **config}
    if chat_template is not None:
        tree["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    return folder


@pytest.fixture(scope="session")
def write_tokenizer():
    """Writes the tiny tokenizer's files into a folder."""
    return _write_tokenizer


@pytest.fixture
def make_tokenizer(tmp_path):
    """Makes tiny tokenizers with given settings."""

    def make(**settings) -> Tokenizer:
        return Tokenizer.load(_write_tokenizer(tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}", **settings))

    return make


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Tokenizer:
    """The toy tokenizer: no chat template, no bos in front."""
    return Tokenizer.load(_write_tokenizer(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def write(tmp_path):
    """Writes a data file: rows as JSON Lines or, for .json, as one list; bytes and text as they are."""

    def write(content, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        if isinstance(content, list):
            lines = [json.dumps(row, ensure_ascii=False) for row in content]
            content = "[\n" + ",\n".join(lines) + "\n]\n" if ".jsonl" not in name else "\n".join(lines) + "\n"
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write
