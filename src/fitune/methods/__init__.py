"""What is trained: one `Method` per name of `method.name`, each in its own file.

A method turns a frozen base model into one with trainable parameters, and owns the folder those are stored in.
"""

from __future__ import annotations

from fitune.methods.base import Method
from fitune.methods.bitfit import BITFIT
from fitune.methods.full import FULL
from fitune.methods.lora import LORA

METHODS: dict[str, Method] = {"lora": LORA, "full": FULL, "bitfit": BITFIT}

__all__ = ["METHODS", "Method"]
