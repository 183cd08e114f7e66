"""What is trained: one `Method` per name of `method.name`.

A method turns a frozen base model into one with trainable parameters, and owns the folder those are stored in. Those of
own.py train the model's own parameters; the others are PEFT's, which adapters.py wraps.
"""

from __future__ import annotations

from fitune.methods.base import Method
from fitune.methods.ia3 import IA3
from fitune.methods.lora import LORA
from fitune.methods.own import BITFIT, FREEZE, FULL
from fitune.methods.prompts import PREFIX, PROMPT, PTUNING

METHODS: dict[str, Method] = {
    "lora": LORA,
    "full": FULL,
    "freeze": FREEZE,
    "bitfit": BITFIT,
    "prompt": PROMPT,
    "ptuning": PTUNING,
    "prefix": PREFIX,
    "ia3": IA3,
}

__all__ = ["METHODS", "Method"]
