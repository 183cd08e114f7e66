"""The same step by other stacks: transformers + PEFT (`hf`), with Liger kernels (`liger`), Unsloth (`unsloth`).

Same ids, same adapter shape, fused AdamW, bf16 autocast, their own checkpointing and quantization. Their peaks are
given twice: since a reset after the warm-up, and since the process began.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.work import WORKS, Work, step_flop

_SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def step(stack: str, key: str, models: str, change: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure one work item with one stack.

    Args:
        stack: hf, liger or unsloth.
        change: fields of the work item to replace.
    """
    work, folder = replace(WORKS[key], **(change or {})), Path(models) / WORKS[key].model
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; make it: python -m bench models {work.model}")
    started = time.perf_counter()
    # Unsloth replaces parts of transformers while it is imported, so nothing may import that before.
    model = _unsloth(work, folder) if stack == "unsloth" else _hf(work, folder, liger=stack == "liger")
    import torch

    from bench.measure import DeviceUse, peaks, pinned_bytes, timed
    from bench.models import model_config

    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - started
    use = DeviceUse()
    use.sample()
    facts = model_config(folder)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights_bytes = torch.cuda.memory_allocated()
    update = _update(model, parameters, _ids(work, facts["vocab_size"]))
    found = timed(update, work.warmup, work.steps, use, reset=True)
    after = peaks()
    return {
        **found.report(work.rows * work.tokens),
        **after,
        "allocated_from_start_bytes": max(after["allocated_bytes"], found.before_reset["allocated_bytes"]),
        "reserved_from_start_bytes": max(after["reserved_bytes"], found.before_reset["reserved_bytes"]),
        "weights_bytes": weights_bytes,
        "device_sampled_bytes": use.highest_bytes,
        "device_after_bytes": use.sample(),
        "pinned_bytes": pinned_bytes(),
        "load_seconds": round(load_seconds, 2),
        "startup_seconds": round(load_seconds + max(0.0, found.first_seconds - found.median), 2),
        "trainable": sum(p.numel() for p in parameters),
        "useful_flop": step_flop(facts, work.rows, work.tokens),
        "flop": step_flop(facts, work.rows, work.tokens, recompute=work.checkpointing),
    }


def _update(model: Any, parameters: list[Any], ids_BT: Any) -> Any:
    """A function that does one step and returns the loss."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    mask_BT, labels_BT = torch.ones_like(ids_BT), ids_BT.clone()

    def update() -> float:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT)
            loss = output.loss if hasattr(output, "loss") else output[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return update


def _ids(work: Work, vocab: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, vocab - 10, (work.rows, work.tokens), generator=generator).cuda()


def targets(work: Work) -> list[str]:
    """Module names that get an adapter."""
    if work.model.startswith("bloom"):
        return ["query_key_value"]
    return _SPLIT if work.targets == "linear" else ["q_proj", "v_proj"]


def _unsloth(work: Work, folder: Path) -> Any:
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    torch.manual_seed(0)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=work.tokens,
        dtype=torch.bfloat16,
        load_in_4bit=work.quantization == "nf4",
        load_in_8bit=work.quantization == "int8",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=work.r,
        target_modules=targets(work),
        lora_alpha=2 * work.r,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if work.checkpointing else False,
        random_state=0,
    )
    return model.train()


def _hf(work: Work, folder: Path, liger: bool) -> Any:
    import torch

    if liger:
        _apply_liger(work)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    if not work.model.startswith("bloom"):
        options["attn_implementation"] = "sdpa"
    quantization = _bitsandbytes(work)
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=quantization, **options)
    model.config.use_cache = False
    how = {"use_reentrant": False}
    if quantization is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=work.checkpointing, gradient_checkpointing_kwargs=how
        )
    elif work.checkpointing:
        model.gradient_checkpointing_enable(how)
    if work.method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("bias" in name)
    else:
        lora = LoraConfig(
            r=work.r, lora_alpha=2 * work.r, lora_dropout=0.0, target_modules=targets(work), task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    return model.train()


def _apply_liger(work: Work) -> None:
    from liger_kernel import transformers as liger

    name = {"llama": "llama", "qwen3": "qwen3", "qwen2.5": "qwen2"}.get(work.model.split("-")[0])
    if name is None:
        raise ValueError(f"Liger has no kernels for {work.model}")
    options = {"rope": True, "rms_norm": True, "swiglu": True}
    getattr(liger, f"apply_liger_kernel_to_{name}")(cross_entropy=False, fused_linear_cross_entropy=True, **options)


def _bitsandbytes(work: Work) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if work.quantization == "none":
        return None
    if work.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if work.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    raise ValueError(f"{work.quantization}: bitsandbytes has none and int8, nf4")
