"""The tokenizer of an original ChatGLM2 or ChatGLM3 folder, as the files of the GLM folder it is converted to.

An original folder and the one that `fitune convert` writes are read by the same code: the first is turned into the
files of the second here. Special tokens are not in tokenizer.model; the original's own code adds them behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitune.data.layouts import LAYOUTS, write_first
from fitune.data.sentencepiece_model import read_model, tokenizer_json
from fitune.errors import ConfigError
from fitune.plan.chatglm import glm_config

# In the order of their ids. The original calls two of them sop and eop; as tokens of those names they would cut
# "people" and "sophisticated" in pieces.
_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")  # version 3 alone
_STOPS = ("<|user|>", "<|observation|>")
_FIRST = ("[gMASK]", "<sop>")

TEMPLATE_NOTE = (
    "the chat template published with ChatGLM3 writes one wrong token per turn (a space before the line break); the "
    "layout chatglm3 is used instead"
)


def layout_of(special_tokens: Mapping[str, int]) -> str | None:
    """The layout of a model whose tokenizer has the special tokens of ChatGLM, whoever made its folder."""
    if "<dBLOCK>" in special_tokens:  # the first version alone
        return "chatglm"
    if special_tokens.get("[gMASK]") != 64790:
        return None
    return "chatglm3" if "<|user|>" in special_tokens else "chatglm2"


def is_wrong_template(template: str) -> bool:
    """Whether it is the chat template of later ChatGLM3 revisions, whose ids differ from those of the original code."""
    return "<|{{ message['role'] }}|> \n {{ message['content'] }}" in template


def converted_files(
    folder: Path, config: Mapping[str, Any], published: Mapping[str, Any], model_file: bytes | None
) -> dict[str, bytes]:
    """The files that say how a GLM folder made of an original one reads and writes text, by name.

    Args:
        config: config.json.
        published: tokenizer_config.json.
        model_file: tokenizer.model.

    Raises:
        ConfigError: no or another tokenizer.model, or neither version 2 nor 3 by any sign.
    """
    if model_file is None:
        raise ConfigError(f"{folder}: has no tokenizer.model, with which ChatGLM is published; download it again")
    model = read_model(model_file, str(folder / "tokenizer.model"))
    if model.unsupported:
        raise ConfigError(f"{folder / 'tokenizer.model'}: is not that of ChatGLM: {model.unsupported}")
    is_version_3 = _version(folder, config, published) == 3
    names = _SPECIAL + (_ROLES if is_version_3 else ())
    special = {name: len(model.pieces) + i for i, name in enumerate(names)}
    layout = LAYOUTS["chatglm3" if is_version_3 else "chatglm2"]
    mapped = glm_config(config)
    ids = {key: mapped[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stops = [ids["eos_token_id"], *(special[name] for name in _STOPS if name in special)]
    return {
        "config.json": _json(mapped),
        "generation_config.json": _json(ids | {"eos_token_id": stops}),
        "tokenizer.json": tokenizer_json(model, special, _FIRST),
        "tokenizer_config.json": _json(_TOKENIZER_CONFIG),
        "chat_template.jinja": (write_first(_FIRST) + layout.source).encode(),
    }


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _version(folder: Path, config: Mapping[str, Any], published: Mapping[str, Any]) -> int:
    """2 or 3. Weights, sizes and tokenizer.model are the same in both; the signs are in what lies beside them."""
    code = folder / "tokenization_chatglm.py"  # read as text: version 3 names its roles there
    if code.is_file():
        return 3 if "<|user|>" in code.read_text(encoding="utf-8", errors="replace") else 2
    if "<|user|>" in str(published.get("chat_template")):
        return 3
    cached = [part for part in folder.absolute().parts if part.startswith("models--")]  # the hub's cache
    for name in (config.get("_name_or_path"), published.get("name_or_path"), folder.absolute().name, *cached):
        found = re.search(r"chatglm-?([23])", str(name), re.IGNORECASE)
        if found:
            return int(found[1])
    raise ConfigError(
        f"{folder}: ChatGLM2 or ChatGLM3? Their weights and tokenizers look alike, and nothing in this folder says "
        "which it is; give it a name with chatglm2 or chatglm3 in it"
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
