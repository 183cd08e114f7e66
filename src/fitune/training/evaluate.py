"""Held-out loss: inside the loop, and of a finished run (`fitune eval RUN`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import torch

from fitune.config import RunConfig
from fitune.data.batches import micro_batches
from fitune.data.prepare import Row, prepare
from fitune.errors import ConfigError
from fitune.infer.load import load
from fitune.training.path import Path, PlainPath


def mean_loss(path: Path, rows: Sequence[Row], config: RunConfig, pad_id: int) -> float:
    """Cross-entropy per supervised token [nats], summed in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches(rows, config.data, config.train, pad_id):
        total += path.loss(batch).double().cpu()
    return (total / sum(row.num_supervised for row in rows)).item()


def evaluate_run(run: FilePath, files: tuple[str, ...] = ()) -> dict[str, Any]:
    """Held-out loss and perplexity of a run's published weights.

    Args:
        files: evaluate these instead of the run's own held-out rows.
    """
    loaded = load(run)
    config = loaded.config
    if config is None:
        raise ConfigError(f"{run} is not a run folder; `fitune eval` needs one, made by `fitune train`")
    data = config.data
    if files:
        data = data.model_copy(update={"train": files, "eval": None})
        rows = prepare(data, loaded.tokenizer).train
    elif data.eval is None:
        raise ConfigError(f"{run} has no held-out rows (data.eval is not set); give files: --data FILE")
    else:
        rows = prepare(data, loaded.tokenizer).eval
    path = PlainPath(loaded.model, loaded.device)
    loss = mean_loss(path, rows, config, loaded.pad_id)
    return {
        "run": str(run),
        "rows": len(rows),
        "supervised_tokens": sum(row.num_supervised for row in rows),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
    }
