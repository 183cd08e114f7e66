"""Held-out loss: inside the loop, and of a finished run (`fitune eval RUN`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch

from fitune.config import RunConfig
from fitune.data.batches import micro_batches
from fitune.data.prepare import Row, prepare
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, DataError
from fitune.infer.load import load
from fitune.training.path import Path, PlainPath


class Stopped(Exception):
    """An evaluation was given up because the run is asked to stop; its caller knows what to do."""


def mean_loss(
    path: Path,
    rows: Sequence[Row],
    config: RunConfig,
    pad_id: int,
    stop: Callable[[], object] = lambda: None,
) -> float:
    """Cross-entropy per supervised token [nats], summed in float64.

    Args:
        stop: asked before each micro batch; a true answer gives up.
    Raises:
        Stopped: `stop` said so.
    """
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches(rows, config.data, config.train, pad_id):
        if stop():
            raise Stopped
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
    rows = held_out_rows(run, config, loaded.tokenizer, files)
    path = PlainPath(loaded.model, loaded.device)
    loss = mean_loss(path, rows, config, loaded.pad_id)
    return {
        "run": str(run),
        "rows": len(rows),
        "supervised_tokens": sum(row.num_supervised for row in rows),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
    }


def held_out_rows(run: FilePath, config: RunConfig, tokenizer: Tokenizer, files: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of `files`, or else those that the run held out.

    Raises:
        ConfigError: the run held none out.
        DataError: rows are bad, or the run's files changed since training.
    """
    if files:
        return prepare(config.data.model_copy(update={"train": files, "eval": None}), tokenizer).train
    if config.data.eval is None:
        raise ConfigError(f"{run} has no held-out rows (data.eval is not set); give files: --data FILE")
    dataset = prepare(config.data, tokenizer)
    _check_data(run, dataset.fingerprint)
    return dataset.eval


def _check_data(run: FilePath, fingerprint: str) -> None:
    """A changed file gives another held-out split, in which rows may stand that were trained on."""
    try:
        recorded = json.loads((run / "result.json").read_text(encoding="utf-8")).get("data_fingerprint")
    except (OSError, ValueError):
        recorded = None
    if recorded != fingerprint:
        raise DataError(
            f"{run}: the data files changed since training, so the held-out rows would be others; put the old files "
            "back, or name what to evaluate: --data FILE"
        )
