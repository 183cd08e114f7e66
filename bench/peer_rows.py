"""Real rows through the other stacks' own trainer (TRL's SFTTrainer, Unsloth's version of it)."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.rows import FILES

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def measure(stack: str, layout: str, folder: str, data: str, accumulation: int) -> dict[str, Any]:
    """Train for about 150 micro batches of two rows (packed: of two 1,024-token rows); rates after a warm-up.

    Args:
        stack: hf, liger or unsloth.
        layout: padded or packed.
    """
    started = time.perf_counter()
    # Unsloth replaces parts of transformers and TRL while it is imported, so nothing may import those before.
    model, tokenizer = _unsloth(folder) if stack == "unsloth" else _hf(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer, stamps = _trainer(model, tokenizer, _texts(Path(data)), stack == "liger", (layout, accumulation))
    seen = _count_tokens(trainer, tokenizer.pad_token_id)
    import torch

    began = time.perf_counter()
    trainer.train()
    warm, last = max(4, 30 // accumulation), len(stamps)
    counted = seen[warm * accumulation : last * accumulation]
    seconds = stamps[-1] - stamps[warm - 1]
    return {
        "real_tokens_per_second": round(sum(real for real, _ in counted) / seconds),
        "step_ms": round(1e3 * seconds / (last - warm), 2),
        "real_tokens_per_step": round(sum(real for real, _ in counted) / (last - warm)),
        "slots_per_step": round(sum(slots for _, slots in counted) / (last - warm)),
        "startup_seconds": round(began - started + max(0.0, stamps[0] - began - seconds / (last - warm)), 2),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def _texts(data: Path) -> list[str]:
    """The tutorial's layout."""
    rows = [json.loads(line) for name in FILES for line in (data / name).read_text(encoding="utf-8").splitlines()]
    prompts = [f"{row['instruction']}\n{row.get('input', '')}".strip() for row in rows]
    pairs = zip(prompts, rows, strict=True)
    return [f"Human: {prompt}\n\nAssistant: {row['output']}<|end_of_text|>" for prompt, row in pairs]


def _trainer(
    model: Any, tokenizer: Any, texts: list[str], liger: bool, how: tuple[str, int]
) -> tuple[Any, list[float]]:
    """A trainer and the list into which it writes the time at each step's end."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    layout, accumulation = how
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=max(14, 150 // accumulation),
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        report_to="none",
        max_length=1024,
        packing=layout == "packed",
        logging_steps=10,
        save_strategy="no",
        dataset_text_field="text",
        gradient_checkpointing=False,
        use_liger_kernel=liger,
        dataset_num_proc=1,
    )
    dataset = Dataset.from_dict({"text": texts})
    options = {"args": config, "train_dataset": dataset, "processing_class": tokenizer, "callbacks": [Clock()]}
    return SFTTrainer(model=model, **options), stamps


def _count_tokens(trainer: Any, pad_id: int) -> list[tuple[int, int]]:
    """Put a counter before the trainer's collator; the list it fills with (real tokens, slots) of each micro batch."""
    seen: list[tuple[int, int]] = []
    collate = trainer.data_collator

    def counting(features: Any) -> Any:
        batch = collate(features)
        ids_BT, mask_BT = batch["input_ids"], batch.get("attention_mask")
        real = (ids_BT != pad_id).sum() if mask_BT is None else mask_BT.sum()
        seen.append((int(real), ids_BT.numel()))
        return batch

    trainer.data_collator = counting
    return seen


def _unsloth(folder: str) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=1024, dtype=torch.bfloat16, load_in_4bit=False
    )
    more = {"lora_dropout": 0, "bias": "none", "use_gradient_checkpointing": False, "random_state": 0}
    return FastLanguageModel.get_peft_model(model, **LORA, **more), tokenizer


def _hf(folder: str) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)), AutoTokenizer.from_pretrained(folder)
