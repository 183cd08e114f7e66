"""`bench families`: every family at full size learns, with any method, in any precision; random weights.

A few updates with fitune's own settings on rows whose frequent ids can be learnt: the loss of each, which path ran, and
the peak from process start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.children import Runner
from bench.work import Work

FAMILIES = ("llama-3.2-1b", "qwen2.5-1.5b", "qwen3-1.7b", "bloom-1b4", "chatglm3-6b", "chatglm-6b")
METHODS = ("full", "freeze", "bitfit", "prompt", "ptuning", "prefix", "lora", "ia3")
PRECISIONS = ("none", "int8", "nf4", "fp4", "fp8")


def run(runner: Runner, models: Path, cells: Sequence[tuple[str, str, str]], **options: Any) -> None:
    """Measure; the results are in `runner.results`.

    Args:
        cells: family, method, precision of each.
        options: `device` and `updates` of every run.
    """
    for family, method, precision in cells:
        cell = {"family": family, "method": method, "precision": precision}
        if runner.time_is_up():
            runner.record({"kind": "family", **cell, "status": "not started: time is up"})
            continue
        runner.make_model(family, models)
        runner.run("family", {**cell, "models": str(models.absolute()), **options}, {"kind": "family", **cell})


def learn(family: str, method: str, precision: str, models: str, device: str, updates: int) -> dict[str, Any]:
    """The loss of every update, at the method's own learning rate, held constant."""
    from bench import ours
    from bench.curves import made_up_rows
    from bench.measure import peaks
    from bench.models import make, model_config
    from fitune.data.batches import StepPlan, micro_batches

    work = Work("", "", family, 4, 512, method=method, quantization=precision, checkpointing=True)
    train = {"max_steps": updates, "global_batch_rows": 8, "schedule": "constant", "learning_rate": None}
    extra: dict[str, dict[str, Any]] = {"train": train}
    if method == "freeze":  # the last two blocks
        extra["method"] = {"num_layers": 2}
    if method == "prefix":  # as usual it starts from tokens of a tokenizer, and these have none worth the name
        extra["method"] = {"init": "random"}
    folder = make(family, Path(models))
    config, rows = ours.config_of(work, folder, device, extra), made_up_rows(64, 384, model_config(folder))
    run = ours.assemble(config, folder, rows)
    rate = config.train.learning_rate
    assert rate is not None, "the method's own"
    plan, losses = StepPlan([row.num_tokens for row in rows], config.train), []
    for number in range(updates):
        batches = micro_batches([rows[i] for i in plan.step(number).rows], config.data, config.train, 0)
        losses.append(ours.update(run, list(batches), rate)[0])
    return {"path": type(run.path).__name__, "note": run.note, "losses": losses, **peaks()}
