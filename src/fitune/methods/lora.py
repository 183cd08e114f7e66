"""LoRA (arXiv:2106.09685) and its variants: y = W x + s B A x, with s = alpha / r.

rsLoRA and DoRA are PEFT's. PiSSA and OLoRA start from a part of the weight, which is taken out of it: the layer keeps
R = W - s B0 A0. That start is computed here, in fp32: PEFT rounds it to the base's dtype after R was made with the
unrounded one. What is published adds to the unchanged W, since R + s B A = W + s [B | -B0] [A ; A0]: an ordinary LoRA
of twice the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.config import LoraConfig, MethodConfig
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.methods import adapters
from fitune.methods.base import Method, Tensors
from fitune.methods.merging import lora_edits
from fitune.model.families import target_modules, whole_modules
from fitune.model.libraries import import_peft
from fitune.model.load import Base

POWER_ITERATIONS = 16  # of the truncated singular value decomposition, as in PiSSA's own fast variant
INITIAL = "initial."  # in front of the names of A0 and B0 in a checkpoint


def _apply(base: Base, config: MethodConfig) -> nn.Module:
    assert isinstance(config, LoraConfig)
    modules, tied = whole_modules(base.model, config.modules_to_save)
    rows = _new_rows(base, config.new_tokens)
    both = sorted(rows.keys() & {*modules})
    if both:
        raise ConfigError(
            f"method.new_tokens trains some rows of {both[0]}, and method.modules_to_save all of it; remove one of them"
        )
    lora = import_peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=_whole(config.alpha),
        lora_dropout=config.dropout,
        target_modules=target_modules(base.model, base.model_type, config.target_modules),
        use_rslora=config.rslora,
        use_dora=config.dora,
        modules_to_save=modules or None,
        trainable_token_indices=rows or None,
        ensure_weight_tying=tied,
        bias="none",
    )
    model = adapters.wrap(base.model, lora)
    if config.init != "default":
        _start_from_weights(model, config)
    return model


def _new_rows(base: Base, texts: tuple[str, ...]) -> dict[str, list[int]]:
    """Give new tokens their rows: path of embedding, and of a head that is not tied to it, -> ids.

    A row begins as the mean of the rows of the tokens that its text was before. Rows are added where the model has none
    to spare.
    """
    if not texts:
        return {}
    before, after = Tokenizer.load(base.folder), Tokenizer.load(base.folder, texts)
    pieces = {after.token_id(text): before.encode(text) for text in texts}
    ids = [token for token in pieces if token is not None]
    adapters.make_rows(base.model, max(ids) + 1)
    model: Any = base.model
    found = {}
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        with torch.no_grad():
            for token, parts in pieces.items():
                module.weight[token] = module.weight[parts].float().mean(0).to(module.weight.dtype)
        path = next(name for name, other in base.model.named_modules() if other is module)
        if module is model.get_input_embeddings() or module.weight is not model.get_input_embeddings().weight:
            found[path] = ids
    return found


def _whole(alpha: float) -> float:
    """PEFT's files say 16, not 16.0; some readers insist on an integer."""
    return int(alpha) if alpha == int(alpha) else alpha


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter, by the prefix of their names in PEFT's file."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _start_from_weights(model: nn.Module, config: LoraConfig) -> None:
    """Make A and B a part of each weight, and take that part out of it.

    Raises:
        ConfigError: a layer is too small for the rank.
    Memory: at most four fp32 copies of one weight; A and B once more, for as long as the model lives.
    """
    for name, layer in _layers(model):
        weight = _weight(layer)
        if config.r > min(weight.shape):
            raise ConfigError(
                f"method.r is {config.r}, but {name} has only {min(weight.shape)} singular values, and "
                f"method.init={config.init} takes as many as r; set method.r={min(weight.shape)} or less"
            )
        part = _principal if config.init == "pissa" else _first_columns
        B_NR, A_RK = part(weight.float(), config.r, layer.scaling["default"])
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(A_RK)
            layer.lora_B["default"].weight.copy_(B_NR)
        layer.register_buffer("initial_A", A_RK, persistent=False)
        layer.register_buffer("initial_B", B_NR, persistent=False)
        _add(layer, -_product(layer))


def _weight(layer: Any) -> torch.Tensor:
    """The frozen (N, K) weight under an adapter; a view, in its own dtype."""
    weight: torch.Tensor = layer.get_base_layer().weight.detach()
    return weight.t() if layer.fan_in_fan_out else weight


def _principal(weight_NK: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B, A with scale B A = the r largest singular values and their vectors, shared out evenly.

    Source: PiSSA, arXiv:2404.02948, sec. 3 and its fast SVD. Differs: twice as many vectors are iterated as are kept.
    """
    wanted = min(2 * r, *weight_NK.shape)
    U_NQ, S_Q, V_KQ = torch.svd_lowrank(weight_NK, q=wanted, niter=POWER_ITERATIONS)
    root_R = (S_Q[:r] / scale).sqrt()
    return U_NQ[:, :r] * root_R, (V_KQ[:, :r] * root_R).t().contiguous()


def _first_columns(weight_NK: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B, A = the first r columns of Q and rows of R in W = Q R. The scale stands outside, as in PEFT.

    Source: OLoRA, arXiv:2406.01775, alg. 1. Differs: no; those columns and rows need the first r columns of W only.
    """
    Q_NR = torch.linalg.qr(weight_NK[:, :r]).Q
    return Q_NR, Q_NR.t() @ weight_NK


def _product(layer: Any) -> torch.Tensor:
    """s B0 A0, (N, K) fp32."""
    product: torch.Tensor = layer.scaling["default"] * (layer.initial_B @ layer.initial_A)
    return product


def _add(layer: Any, change_NK: torch.Tensor) -> None:
    weight_NK = _weight(layer)
    weight_NK.copy_((weight_NK.float() + change_NK).to(weight_NK.dtype))


def _starts(model: nn.Module) -> Tensors:
    """A0 and B0 by the names of A and B; empty where adapters started at nothing."""
    return {
        f"{name}.lora_{part}.weight": getattr(layer, f"initial_{part}")
        for name, layer in _layers(model)
        if hasattr(layer, "initial_A")
        for part in "AB"
    }


def _state(model: nn.Module) -> Tensors:
    return adapters.state(model) | {INITIAL + name: tensor for name, tensor in _starts(model).items()}


def _load(model: nn.Module, tensors: Tensors) -> None:
    adapters.load_state(model, {name: t for name, t in tensors.items() if not name.startswith(INITIAL)})
    for name, layer in _layers(model):
        if not hasattr(layer, "initial_A"):
            continue
        stored = {part: tensors[f"{INITIAL}{name}.lora_{part}.weight"].to(_weight(layer).device) for part in "AB"}
        if all(torch.equal(stored[part], getattr(layer, f"initial_{part}")) for part in "AB"):
            continue
        # Another library or machine finds the same part of the weight with other rounding.
        before = _product(layer)
        layer.initial_A, layer.initial_B = stored["A"], stored["B"]
        _add(layer, before - _product(layer))


def _result(model: nn.Module) -> Tensors | None:
    starts = _starts(model)
    if not starts:
        return None
    tensors = adapters.state(model)
    for name, start in starts.items():
        tensors[name] = torch.cat([tensors[name], -start], 1) if "lora_B" in name else torch.cat([tensors[name], start])
    return tensors


def _write_config(model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    config: Any = model.peft_config["default"]  # type: ignore[index]  # a PeftModel
    changes: dict[str, Any] = {}
    if _starts(model):  # twice the rank, the same scale
        alpha = 2 * config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
        changes |= {"r": 2 * config.r, "lora_alpha": _whole(alpha), "use_rslora": False}
    if config.ensure_weight_tying:  # PEFT put the embedding's name in the place of the head's, see `whole_modules`
        others = [name for name in config.modules_to_save if name != _embedding(model)]
        changes["modules_to_save"] = sorted([*others, *config.modules_to_tie])
    adapters.write_config(model, folder, facts, **changes)


def _embedding(model: nn.Module) -> str:
    base: nn.Module = model.get_base_model()  # type: ignore[operator]  # a PeftModel
    embedding = base.get_input_embeddings()  # type: ignore[operator]
    path: str = next(name for name, module in base.named_modules() if module is embedding)
    return path


LORA = Method(
    name="lora",
    folder="adapter",
    apply=_apply,
    state=_state,
    load_state=_load,
    write_config=_write_config,
    open=adapters.open_adapter,
    merge=adapters.merge,
    result=_result,
    edits=lora_edits,
)
