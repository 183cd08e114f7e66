"""fitune's own step, put together from its public pieces as `fitune train` does it.

What the loop does once per step is done here once per step: gradients dropped, random numbers seeded, gradient norm and
loss fetched to the host, clipping, optimizer. What it does besides (metrics file, display) is in `bench rows`.
"""

from __future__ import annotations

import math
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.measure import DeviceUse, peaks, pinned_bytes, synchronize, timed
from bench.models import make, model_config
from bench.work import WORKS, Work, step_flop
from fitune.config import RunConfig, build
from fitune.data.batches import Batch, pad
from fitune.data.prepare import Dataset, Row
from fitune.methods import METHODS
from fitune.model.load import count_parameters, load_base, pick_device
from fitune.training.choose import choose_path, optimizer_for
from fitune.training.limits import hold_to_budget, set_up_device
from fitune.training.loop import seed_generators
from fitune.training.optim import MasterOptimizer
from fitune.training.path import Path as ModelPath


@dataclass
class Assembled:
    """A run ready for its first step.

    Attributes:
        note: which path was chosen and why.
        load_seconds: reading weights, adding adapters.
        path_seconds: choosing and building the path, its self-check and compilation included; the optimizer.
    """

    config: RunConfig
    model: nn.Module
    path: ModelPath
    note: str
    optimizer: MasterOptimizer
    device: torch.device
    load_seconds: float
    path_seconds: float


def config_of(work: Work, folder: Path, device: str, extra: dict[str, dict[str, Any]] | None = None) -> RunConfig:
    """The configuration of a work item.

    Args:
        extra: section -> settings that go over those of the work item.
    """
    method: dict[str, Any] = {"name": work.method}
    if work.method == "lora":
        method |= {"r": work.r, "alpha": 2.0 * work.r, "target_modules": work.targets}
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "dtype": "bf16" if device == "cuda" else "fp32"},
        "method": method,
        "data": {"max_length": max(8, work.tokens)},
        "train": {
            "device": device,
            "learning_rate": 1e-4,
            "micro_batch_rows": work.rows,
            "global_batch_rows": work.rows,
            "activation_checkpointing": work.level or work.checkpointing,
        },
    }
    if work.quantization != "none":
        tree["model"]["quantization"] = work.quantization
    for section, settings in (extra or {}).items():
        tree[section] = {**tree.get(section, {}), **settings}
    return build(tree)


def assemble(config: RunConfig, folder: Path, rows: Sequence[Row], use: DeviceUse | None = None) -> Assembled:
    """Load, adapt, choose the path, optimize: the order of `fitune train`.

    Args:
        rows: the training rows; the largest micro batch follows from them, and the path's self-check takes the first.
        use: sampled after loading and after the path is built.
    """
    use = use or DeviceUse()
    device = pick_device(config.train.device)
    set_up_device(config, device)
    started = time.perf_counter()
    assert config.model.dtype is not None, "given by the bench"
    if config.model.quantization == "none":
        base = load_base(folder, config.model.dtype, device)
    else:
        base = load_base(folder, config.model.dtype, device, config.model.quantization)
    torch.manual_seed(config.train.seed)
    model = METHODS[config.method.name].apply(base, config.method)
    synchronize()
    loaded = time.perf_counter()
    use.sample()
    dataset = Dataset(train=tuple(rows), eval=(), rejected=(), fingerprint="", summary={})
    path, note = choose_path(model, base, config, dataset)
    hold_to_budget(config, device)
    optimizer = optimizer_for(model, path, config)
    synchronize()
    use.sample()
    return Assembled(config, model, path, note, optimizer, device, loaded - started, time.perf_counter() - loaded)


def random_rows(count: int, tokens: int, vocab: int, seed: int = 1) -> list[Row]:
    """Full-length rows of random ids, every token supervised (the first never is)."""
    draw = random.Random(seed)
    ids = [array("i", [draw.randrange(10, vocab - 10) for _ in range(tokens)]) for _ in range(count)]
    return [Row(row, b"\0" + b"\1" * (tokens - 1), f"random:{i}") for i, row in enumerate(ids)]


def update(run: Assembled, batches: Sequence[Batch], rate: float = 1e-4) -> tuple[float, float]:
    """One optimizer step as the loop does it; mean loss and gradient norm.

    Raises:
        FloatingPointError: one of them is not finite: a wrong step is no measurement.
    """
    loss, norm = gradients(run, batches)
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: not finite")
    limit = run.config.train.max_grad_norm
    clip = min(1.0, limit / norm) if limit and norm > 0 else 1.0
    if clip != 1.0:
        torch._foreach_mul_(run.optimizer.gradients(), clip)
    run.optimizer.step(rate)
    run.optimizer.zero()
    return loss, norm


def gradients(run: Assembled, batches: Sequence[Batch]) -> tuple[float, float]:
    """Gradients of the mean loss over all batches, left where the optimizer finds them; loss and gradient norm."""
    run.optimizer.zero()
    num_supervised = sum(batch.num_supervised for batch in batches)
    loss_sum = torch.zeros((), device=run.device)
    for micro, batch in enumerate(batches):
        seed_generators(micro, run.device)
        loss_sum += run.path.loss_and_grad(batch, 1.0 / num_supervised)
    norm = torch.nn.utils.get_total_norm(run.optimizer.gradients()).to(run.device)
    both: list[float] = torch.stack([norm.float(), loss_sum / num_supervised]).tolist()
    return both[1], both[0]


def step(
    key: str,
    models: str,
    device: str,
    change: dict[str, Any] | None = None,
    extra: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure one work item; peaks count from the process start and are never reset.

    Args:
        change: fields of the work item to replace.
        extra: section -> settings over those of the work item.
    """
    work, use = replace(WORKS[key], **(change or {})), DeviceUse()
    folder = make(work.model, Path(models))
    facts = model_config(folder)
    rows = random_rows(work.rows, work.tokens, facts["vocab_size"])
    run = assemble(config_of(work, folder, device, extra), folder, rows, use)
    built_bytes = torch.cuda.memory_allocated() if device == "cuda" else 0
    batch = pad(rows, 0)
    found = timed(lambda: update(run, [batch])[0], work.warmup, work.steps, use)
    prepare = run.path_seconds + max(0.0, found.first_seconds - found.median)
    return {
        **found.report(work.rows * work.tokens),
        **peaks(),
        "path": type(run.path).__name__,
        "note": run.note,
        "built_bytes": built_bytes,
        "device_sampled_bytes": use.highest_bytes,
        "device_after_bytes": use.sample(),
        "pinned_bytes": pinned_bytes(),
        "load_seconds": round(run.load_seconds, 2),
        "path_seconds": round(run.path_seconds, 2),
        "startup_seconds": round(run.load_seconds + prepare, 2),
        "trainable": count_parameters(run.model)[0],
        "useful_flop": step_flop(facts, work.rows, work.tokens),
        "flop": step_flop(facts, work.rows, work.tokens, recompute=work.checkpointing),
    }
