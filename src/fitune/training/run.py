"""Assemble a run from its configuration: the only place that unpacks the whole tree.

result = train(config.load("examples/demo.yaml"))
result = resume(Path("runs/demo"))
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fitune.config import RunConfig, build, dump
from fitune.config.load import apply_overrides, read_yaml
from fitune.data.batches import StepPlan
from fitune.data.prepare import Dataset, prepare, write_rejected
from fitune.data.templates import resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, DivergedError, FituneError, Interrupted
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.folder import inspect_folder, resolve_folder
from fitune.model.load import count_parameters, load_base, pick_device, pick_dtype
from fitune.training import checkpoint, loop, samples
from fitune.training.metrics import memory_bytes, versions
from fitune.training.optim import LossScale, MasterOptimizer
from fitune.training.path import PlainPath, check_packing
from fitune.training.progress import Progress
from fitune.training.report import write_report
from fitune.training.run_folder import RunFolder
from fitune.training.saving import check_changes, publish, restore
from fitune.training.session import Session, State
from fitune.training.signals import StopRequest


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        run: the run folder.
        step: optimizer steps done.
        best_step: the step whose weights were published (lowest held-out loss), or the last one.
        first_eval_loss, best_eval_loss: held-out loss [nats per supervised token] before training and of best_step.
    """

    run: Path
    step: int
    best_step: int
    first_eval_loss: float | None
    best_eval_loss: float | None


@dataclass(frozen=True)
class _Prepared:
    """What is known before any weight is read."""

    config: RunConfig
    model_folder: Path
    tokenizer: Tokenizer
    dataset: Dataset
    device: torch.device


def train(config: RunConfig, *, quiet: bool = False, replace: bool = False) -> Result:
    """Run a configuration from the start.

    Args:
        quiet: print nothing.
        replace: remove a finished or stopped run in the same folder first.

    Raises:
        FituneError: see `fitune.errors`; nothing is left behind unless training had begun.
    """
    target = Path(config.output.dir or "runs/run")
    if not replace:
        RunFolder.check_free(target)
    prepared = _prepare(config)
    with StopRequest() as stop:
        session = _assemble(prepared, target, stop, quiet)
        _check_packing(session)
        session.folder = RunFolder.create(target, dump(prepared.config), replace=replace)
        with session.folder.lock():
            write_rejected(session.folder.path / "rejected.jsonl", session.dataset.rejected)
            return _run(session, _fresh_state(session), time.perf_counter())


def resume(run: Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Result:
    """Continue a stopped run from its newest good checkpoint, or from the start if it has none.

    Args:
        overrides: `section.key=value`; those that cannot be applied to a running run are refused.
    """
    folder = RunFolder.open(run)
    with folder.lock():
        tree = read_yaml(folder.path / "config.yaml")
        apply_overrides(tree, overrides)
        config = build(tree, name=folder.path.name)
        stored, problems = checkpoint.newest(folder)
        changes = check_changes(stored, config) if stored else []
        if stored:  # bit-identical sums need the same number of threads
            torch.set_num_threads(min(stored.manifest["facts"]["num_threads"], os.cpu_count() or 1))
        prepared = _prepare(config)
        with StopRequest() as stop:
            session = _assemble(prepared, folder.path, stop, quiet)
            session.folder = folder
            for problem in problems:
                session.display.note(problem)
            for change in changes:
                session.display.note(f"changed: {change}")
            state = restore(session, stored) if stored else _fresh_state(session)
            checkpoint.drop_after(folder, state.step)  # damaged newer ones would stand in the way of their successors
            if changes:
                folder.write_text("config.yaml", dump(prepared.config))
            folder.cut_metrics(state.step if stored else -1)
            session.display.note(f"continuing at step {state.step} of {session.steps.total_steps}")
            return _run(session, state, time.perf_counter())


def _prepare(config: RunConfig) -> _Prepared:
    """Everything that can go wrong before the model loads goes wrong here."""
    if not config.data.train:
        raise ConfigError("data.train is not set; give one or more .json or .jsonl files: data.train=FILE")
    device = pick_device(config.train.device)
    tree = config.model_dump()
    tree["model"]["dtype"] = pick_dtype(config.model.dtype, device)
    config = RunConfig.model_validate(tree)
    model_folder = resolve_folder(config.model.path)
    raw = inspect_folder(model_folder)
    longest = raw.config.get("max_position_embeddings")
    if isinstance(longest, int) and config.data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but this model has {longest} positions; "
            f"set data.max_length={longest} or less"
        )
    tokenizer = Tokenizer.load(model_folder)
    dataset = prepare(config.data, tokenizer)
    return _Prepared(config, model_folder, tokenizer, dataset, device)


def _assemble(prepared: _Prepared, target: Path, stop: StopRequest, quiet: bool) -> Session:
    config, device, dataset = prepared.config, prepared.device, prepared.dataset
    _set_up_device(config, device)
    steps = StepPlan([row.num_tokens for row in dataset.train], config.train)
    assert config.model.dtype is not None, "resolved"
    with loop.memory_errors(config, "loading the model"):
        base = load_base(prepared.model_folder, config.model.dtype, device)
    if base.vocab_size < prepared.tokenizer.vocab_size:
        raise ConfigError(
            f"{prepared.model_folder}: the tokenizer has {prepared.tokenizer.vocab_size} entries, the model only "
            f"{base.vocab_size} embedding rows; tokenizer and model do not belong together"
        )
    method = METHODS[config.method.name]
    torch.manual_seed(config.train.seed)  # adapter initialisation
    model = method.apply(base, config.method)
    return Session(
        config=config,
        dataset=dataset,
        tokenizer=prepared.tokenizer,
        steps=steps,
        method=method,
        model=model,
        path=PlainPath(model, device, config.train.activation_checkpointing),
        optimizer=MasterOptimizer(trainable(model), config.train),
        device=device,
        folder=RunFolder(target),
        facts={
            "base_fingerprint": base.fingerprint,
            "tokenizer_hash": prepared.tokenizer.hash,
            "data_fingerprint": dataset.fingerprint,
            "versions": versions(),
        },
        display=Progress(steps.total_steps, 0, quiet),
        stop=stop,
    )


def _set_up_device(config: RunConfig, device: torch.device) -> None:
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when its first handle is made
    torch.use_deterministic_algorithms(config.train.deterministic)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        total = torch.cuda.get_device_properties(device).total_memory
        # Also without a budget: an earlier run in this process may have set one.
        budget = total if config.memory.budget is None else config.memory.budget * 1e9
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def _check_packing(session: Session) -> None:
    if session.config.data.packing:
        check_packing(session.model, session.device, list(session.dataset.train[:2]))


def _fresh_state(session: Session) -> State:
    assert session.config.model.dtype is not None, "resolved"
    return State(loss_scale=LossScale.for_dtype(session.config.model.dtype))


def _run(session: Session, state: State, started: float) -> Result:
    """Train, publish the result, write the report; a failure is recorded before it travels on."""
    session.display.start_step = state.step
    try:
        with session.display:
            _warn_without_effect(session)
            if state.step == 0:
                samples.write_before(session)
            loop.run(session, state)
        published = publish(session, state)
        samples.write_after(session)
    except FituneError as error:
        _write_result(session, state, started, _status(error), None)
        write_report(session.folder.path)
        raise
    _write_result(session, state, started, "done", published)
    write_report(session.folder.path)
    return Result(session.folder.path, state.step, published, state.first_eval_loss, state.best_eval_loss)


def _warn_without_effect(session: Session) -> None:
    if session.config.memory.budget is not None and session.device.type != "cuda":
        session.display.note("memory.budget has no effect on CPU")
    if session.config.train.max_steps is not None and session.config.train.epochs != 1.0:
        session.display.note("train.epochs has no effect: train.max_steps decides")


def _status(error: FituneError) -> str:
    if isinstance(error, Interrupted):
        return "interrupted"
    return "diverged" if isinstance(error, DivergedError) else "failed"


def _write_result(session: Session, state: State, started: float, status: str, published: int | None) -> None:
    trainable_count, total = count_parameters(session.model)
    value: dict[str, Any] = {
        "status": status,
        "step": state.step,
        "total_steps": session.steps.total_steps,
        "best_step": published if published is not None else state.best_step,
        "first_eval_loss": state.first_eval_loss,
        "best_eval_loss": state.best_eval_loss,
        "last_eval_loss": state.last_eval_loss,
        "skipped_steps": state.skipped,
        "tokens": state.tokens,
        "seconds": round(time.perf_counter() - started, 2),
        "trainable_parameters": trainable_count,
        "total_parameters": total,
        "peak_memory_bytes": memory_bytes(session.device),
        "device": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu",
        "template": resolve_template(session.config.data.template, session.tokenizer).name,
        "data": session.dataset.summary,
        **{key: value for key, value in asdict(state.loss_scale).items() if key == "scale"},
        "versions": session.facts["versions"],
    }
    session.folder.write_json("result.json", value)
