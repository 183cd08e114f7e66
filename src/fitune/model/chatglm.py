"""Weights of an original ChatGLM2 or ChatGLM3 folder -> those of transformers' GLM model.

Nothing is computed: names change, and the fused projection of queries, keys and values is cut in three. What a
config.json of THUDM's says is in `plan/chatglm.py`; version 1 is another model and not handled here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fitune.errors import ConfigError
from fitune.plan.arch import ArchSpec

_OUTSIDE = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",  # the gate first, as in GLM
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_FUSED = "self_attention.query_key_value"
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_DROPPED = "transformer.rotary_pos_emb.inv_freq"  # follows from the configuration
_BLOCK = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def glm_weights(original: Mapping[str, torch.Tensor], arch: ArchSpec, source: Path) -> dict[str, torch.Tensor]:
    """Tensors by GLM's names; any part of a model's.

    Args:
        original: by THUDM's names.
        arch: the model's sizes.
        source: where they come from, for messages.

    Returns:
        The same tensors, or views of them; keys and values are copies, so that no two results share their storage.

    Raises:
        ConfigError: a name that ChatGLM2 and 3 do not have, or a fused projection of another shape.
    """
    rows = [next(linear.outs for linear in arch.linears if linear.path == path) for path in _SPLIT]
    found: dict[str, torch.Tensor] = {}
    for name, tensor in original.items():
        block = _BLOCK.fullmatch(name)
        if name in _OUTSIDE:
            found[_OUTSIDE[name]] = tensor
        elif block and block[2] in _IN_BLOCK:
            found[f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"] = tensor
        elif block and block[2] == _FUSED:
            if tensor.shape[:1] != (sum(rows),):
                raise ConfigError(f"{source}: {name} has {list(tensor.shape)} values; {sum(rows)} rows are needed")
            # Blocks of rows, all queries first; not head by head as in version 1.
            parts = tensor.split(rows)  # type: ignore[no-untyped-call]  # torch's own
            for i, (path, part) in enumerate(zip(_SPLIT, parts, strict=True)):
                found[f"model.layers.{block[1]}.{path}.{block[3]}"] = part.clone() if i else part
        elif name != _DROPPED:
            raise ConfigError(f"{source}: {name[:100]!r} is no weight of ChatGLM2 or ChatGLM3; give the plain model")
    return found
