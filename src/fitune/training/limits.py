"""What the process is given for a run, and what happens when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fitune.config import RunConfig
from fitune.errors import OutOfMemoryError
from fitune.plan.hardware import find_gpu
from fitune.plan.saves import level_of


@contextmanager
def process_state() -> Iterator[None]:
    """No TF32 in cuDNN inside; put back all switches of PyTorch that a run sets: a caller's process is not ours."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "benchmark_limit", "deterministic")}
    try:
        with cudnn.flags(**kept, allow_tf32=False):  # an LSTM in fp32 would be rounded to 10 bits otherwise
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(threads)


def set_up_device(config: RunConfig, device: torch.device) -> None:
    """Apply train.deterministic and memory.budget: PyTorch's allocator gets what the CUDA context leaves of it."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when its first handle is made
    torch.use_deterministic_algorithms(config.train.deterministic)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        properties = torch.cuda.get_device_properties(device)
        total = properties.total_memory
        # Also without a budget: an earlier run in this process may have set one.
        budget = total if config.memory.budget is None else config.memory.budget * 1e9
        outside = 0 if config.memory.budget is None else find_gpu(properties.name).context_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, budget - outside) / total), device)


@contextmanager
def memory_errors(config: RunConfig, doing: str, run: Path | None) -> Iterator[None]:
    """Turn running out of memory into an `OutOfMemoryError` that says what to change.

    Args:
        doing: what was going on, in words.
        run: the run folder that can be resumed, if there is one already.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _explained(config, doing, run, str(error)) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error).lower():  # PyTorch's CPU allocator has no exception class of its own
            raise
        raise _explained(config, doing, run, str(error)) from error


def _explained(config: RunConfig, doing: str, run: Path | None, reason: str) -> OutOfMemoryError:
    train, data = config.train, config.data
    micro = "micro_batch_tokens" if data.packing else "micro_batch_rows"
    hints = [f"halve train.{micro} (now {getattr(train, micro)}; the update stays the same)"]
    if level_of(train.activation_checkpointing) not in ("full", "offload"):
        hints.append("set train.activation_checkpointing=true")
    if config.model.quantization == "none" and config.method.name != "full":
        hints.append("set model.quantization=nf4 (the base in 4 bits)")
    hints.append(f"lower data.max_length (now {data.max_length})")
    if config.memory.budget is not None:
        hints.append(f"raise memory.budget (now {config.memory.budget:g} GB)")
    how = f"continue with `fitune resume {run} KEY=VALUE`, or start again" if run else "start again"
    first = (reason.splitlines() or ["?"])[0]
    return OutOfMemoryError(f"out of memory while {doing}: {first:.200}. What helps: {'; '.join(hints)}. Then {how}")
