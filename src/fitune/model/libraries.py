"""The one place that imports PEFT and bitsandbytes, so that neither import reaches for a network.

On CPUs with AVX512-BF16 bitsandbytes asks the package `kernels`, when that is installed, for a compiled kernel from a
hub, at import; and PEFT imports bitsandbytes when that is installed. Code from a hub must never run without being asked
for, and a machine without a network would wait for it. So `kernels` cannot be imported while bitsandbytes is.

    peft = import_peft()
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


def import_peft() -> Any:
    """The module `peft`; bitsandbytes, if it is installed, is imported first, by `import_bitsandbytes`."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        import_bitsandbytes()
    import peft

    return peft


def cache_name() -> str:
    """What transformers calls keys and values of the past, in calls and outputs: `cache` since 5.24.

    Before that, and for PEFT 0.21, they are `past_key_values`.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def import_bitsandbytes() -> Any:
    """The module `bitsandbytes`, without any kernel from a hub; its multiplications on CPU take its own library.

    Raises:
        ImportError: it is not installed.
    """
    with _no_hub_kernels():
        import bitsandbytes

    return bitsandbytes


@contextmanager
def _no_hub_kernels() -> Iterator[None]:
    """Inside, `import kernels` fails, and bitsandbytes does not warn that it did; afterwards all is as before."""
    before = sys.modules.get("kernels", _ABSENT)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    modules: dict[str, Any] = sys.modules  # None is what the import system itself takes for "cannot be imported"
    modules["kernels"] = None
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is _ABSENT:
            del modules["kernels"]
        else:
            modules["kernels"] = before
