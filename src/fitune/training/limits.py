"""What the process is given for a run, and what happens when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    try:
        with _without_tf32():
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(threads)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """An LSTM in fp32 would be rounded to 10 bits by cuDNN otherwise.

    PyTorch has an older and a newer set of these switches, and refuses to read the older while the newer ones say
    otherwise: then it is the opposite of what they say.
    """
    cudnn: Any = torch.backends.cudnn
    newer = cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision
    try:
        older = cudnn.allow_tf32
    except RuntimeError:
        older = newer[0] != "tf32"
    try:
        cudnn.allow_tf32 = False  # first, since it resets the newer ones
        cudnn.rnn.fp32_precision = cudnn.conv.fp32_precision = "ieee"
        yield
    finally:
        cudnn.allow_tf32 = older
        cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision = newer


def set_up_device(config: RunConfig, device: torch.device) -> None:
    """Apply train.deterministic and memory.budget."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when its first handle is made
    torch.use_deterministic_algorithms(config.train.deterministic)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        hold_to_budget(config, device)


def hold_to_budget(config: RunConfig, device: torch.device) -> None:
    """Give PyTorch's allocator what the CUDA context and the page table of page-locked memory leave of memory.budget.

    To be called again when page-locked memory was made.

    Raises:
        OutOfMemoryError: they leave nothing.
    """
    if device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(device)
    total, budget = properties.total_memory, config.memory.budget
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    context = find_gpu(properties.name).outside_bytes(pinned)
    if budget is not None and budget * 1e9 <= context:
        raise OutOfMemoryError(
            f"memory.budget is {budget:g} GB, of which the CUDA context, with the page table of page-locked memory, "
            f"takes {context / 1e9:.2g}; raise memory.budget"
        )
    # Also without a budget: an earlier run in this process may have set one.
    left = total if budget is None else budget * 1e9 - context
    torch.cuda.set_per_process_memory_fraction(min(1.0, left / total), device)


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
