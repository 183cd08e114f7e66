"""Numbers about a run that do not come out of the model."""

from __future__ import annotations

import platform
import sys

import torch


def memory_bytes(device: torch.device) -> int:
    """Peak so far: allocated on the GPU, or resident in main memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("fitune", "torch", "transformers", "peft", "tokenizers", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
