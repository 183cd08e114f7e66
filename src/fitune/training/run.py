"""Assemble a run from its configuration: the only place that unpacks the whole tree.

result = train(config.load("examples/demo.yaml"))
result = resume(Path("runs/demo"))
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fitune.config import RunConfig, build, dump, new_tokens
from fitune.config.load import apply_overrides, read_yaml
from fitune.data.batches import StepPlan
from fitune.data.prepare import Dataset, prepare, write_rejected
from fitune.data.templates import resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import CheckpointError, ConfigError, DivergedError, FituneError, Interrupted
from fitune.methods import METHODS
from fitune.methods.base import WEIGHTS, read_tensors
from fitune.methods.prompts import check_text
from fitune.model.adapter import check_base, with_adapter
from fitune.model.folder import (
    ModelFolder,
    inspect_folder,
    resolve_folder,
    with_stored_layers,
    with_stored_quantization,
)
from fitune.model.load import count_parameters, identity, load_base, pick_device, pick_dtype
from fitune.model.quantize import emulation_note, use_int8
from fitune.plan.arch import ArchSpec
from fitune.plan.checks import check_run, known_arch
from fitune.training import checkpoint, loop, samples
from fitune.training.choose import choose_path, optimizer_for
from fitune.training.limits import hold_to_budget, memory_errors, process_state, set_up_device
from fitune.training.metrics import memory_bytes, versions
from fitune.training.optim import LossScale
from fitune.training.progress import Progress
from fitune.training.report import write_report
from fitune.training.run_folder import RunFolder
from fitune.training.saving import check_changes, computing, publish, restore
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
    """What is known before any weight is read; `start`: an adapter to begin with, instead of the method's own start."""

    config: RunConfig
    start: Path | None
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
    RunFolder.check_free(target, replace)
    with process_state(), StopRequest() as stop:
        prepared = _prepare(config, quiet, anew=True)
        session = _assemble(prepared, target, stop, quiet)
        need_bytes = (config.train.keep_checkpoints + 2) * _checkpoint_bytes(session)
        session.folder = RunFolder.create(target, dump(prepared.config), replace=replace, need_bytes=need_bytes)
        with session.folder.lock():
            write_rejected(session.folder.path / "rejected.jsonl", session.dataset.rejected)
            return _run(session, _fresh_state(session))


def resume(run: Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Result:
    """Continue a stopped run from its newest good checkpoint, or from the start if it has none.

    Args:
        overrides: `section.key=value`; those that cannot be applied to a running run are refused.
    """
    folder = RunFolder.open(run)
    with folder.lock(), process_state(), StopRequest() as stop:
        config = _config_to_resume(folder, overrides)
        stored, problems = checkpoint.newest(folder)
        changes = check_changes(stored, config) if stored else list(overrides)
        if stored:  # bit-identical sums need the same number of threads
            torch.set_num_threads(min(stored.manifest["facts"]["num_threads"], os.cpu_count() or 1))
        prepared = _prepare(config, quiet, anew=stored is None)
        session = _assemble(prepared, folder.path, stop, quiet)
        for text in (*problems, *(f"changed: {change}" for change in changes)):
            session.note(text)
        state = restore(session, stored) if stored else _fresh_state(session)
        total = session.steps.total_steps
        if state.step > total:
            raise ConfigError(
                f"{run} is at step {state.step}, but the settings ask for {total} steps in all; raise train.max_steps "
                "or train.epochs"
            )
        if state.step == total and not changes and _finished(folder):
            session.note(f"already done: all {total} steps; raise train.max_steps or train.epochs to go on")
            return _result(session, state, folder.read_json("result.json")["best_step"])
        checkpoint.drop_after(folder, state.step)  # damaged newer ones would stand in the way of their successors
        folder.write_text("config.yaml", dump(prepared.config))
        folder.cut_metrics(state.step if stored else -1, evaluated=state.evaluated_step == state.step)
        if not stored:
            write_rejected(folder.path / "rejected.jsonl", session.dataset.rejected)
        begun = "continuing" if stored else "no checkpoint was committed; starting again"
        session.note(f"{begun} at step {state.step} of {total}")
        return _run(session, state)


def _config_to_resume(folder: RunFolder, overrides: Sequence[str]) -> RunConfig:
    if any(override.strip().startswith("output.dir") for override in overrides):
        raise ConfigError("a run stays where it is: output.dir cannot be changed on resume; move the folder instead")
    tree = read_yaml(folder.path / "config.yaml")
    apply_overrides(tree, overrides)
    apply_overrides(tree, [f"output.dir={json.dumps(str(folder.path))}"])  # it may have been moved
    return build(tree, name=folder.path.name)


def _finished(folder: RunFolder) -> bool:
    file = folder.path / "result.json"
    return file.is_file() and folder.read_json("result.json").get("status") == "done"


def _checkpoint_bytes(session: Session) -> int:
    """Room for one checkpoint: trainable weights, the result where it is another, masters and two states in fp32."""
    stored = [session.method.state(session.model), session.method.result(session.model) or {}]
    weights = sum(tensor.nbytes for tensors in stored for tensor in tensors.values())
    return weights + 12 * count_parameters(session.model)[0]


def _prepare(config: RunConfig, quiet: bool, anew: bool) -> _Prepared:
    """Everything that can go wrong before the model loads goes wrong here.

    Args:
        anew: the run has no checkpoint, so it starts from method.adapter if that is set.
    """
    if not config.data.train:
        raise ConfigError("data.train is not set; give one or more .json or .jsonl files: data.train=FILE")
    device = pick_device(config.train.device)
    model_folder = resolve_folder(config.model.path)
    raw = inspect_folder(model_folder)
    config = with_stored_quantization(config, model_folder)
    arch, start = known_arch(raw.config), None
    arch = arch and with_stored_layers(arch, model_folder)
    if anew:
        config, start = _from_adapter(config, arch, raw, model_folder)
    config = _with_facts_of_this_machine(config, device)
    keys = ("max_position_embeddings", "n_positions", "max_sequence_length")
    longest = next((raw.config[key] for key in keys if raw.config.get(key)), None)
    check_run(config, arch, longest if isinstance(longest, int) else None)
    tokenizer = Tokenizer.load(model_folder, new_tokens(config.method))
    if isinstance(rows := raw.config.get("vocab_size"), int):  # else it stands in a section of its own: once loaded
        tokenizer.check_rows(rows)
    check_text(config.method, tokenizer)
    resolve_template(config.data.template, tokenizer)  # also for raw text: whoever opens the run asks for it
    if not quiet:
        print(f"reading {', '.join(config.data.train)}", file=sys.stderr, flush=True)
    return _Prepared(config, start, model_folder, tokenizer, prepare(config.data, tokenizer), device)


def _from_adapter(
    config: RunConfig, arch: ArchSpec | None, raw: ModelFolder, folder: Path
) -> tuple[RunConfig, Path | None]:
    """The configuration with the settings of method.adapter, and its folder; it must belong to this base."""
    config = with_adapter(config, arch)
    adapter: str | None = getattr(config.method, "adapter", None)
    if adapter is None:
        return config, None
    check_base(Path(adapter), folder, identity(folder, raw.weight_files), must_say=False)
    read_tensors(Path(adapter) / WEIGHTS)  # a damaged file is found before the model is read
    return config, Path(adapter)


def _with_facts_of_this_machine(config: RunConfig, device: torch.device) -> RunConfig:
    """Fill in the dtype; make local paths absolute, so that the run can be opened from any folder."""
    tree = config.model_dump()
    tree["model"]["dtype"] = pick_dtype(config.model.dtype, device)
    if Path(config.model.path).expanduser().is_dir() and config.model.path != "embedded":
        tree["model"]["path"] = str(Path(config.model.path).expanduser().absolute())
    tree["data"]["train"] = [str(Path(file).absolute()) for file in config.data.train]
    if isinstance(config.data.eval, tuple):
        tree["data"]["eval"] = [str(Path(file).absolute()) for file in config.data.eval]
    return RunConfig.model_validate(tree)


def _assemble(prepared: _Prepared, target: Path, stop: StopRequest, quiet: bool) -> Session:
    config, device, dataset = prepared.config, prepared.device, prepared.dataset
    set_up_device(config, device)
    steps = StepPlan([row.num_tokens for row in dataset.train], config.train)
    assert config.model.dtype is not None, "resolved"
    with memory_errors(config, "loading the model", None):
        base = load_base(prepared.model_folder, config.model.dtype, device, config.model.quantization)
    use_int8(base.model, config.model.int8_compute, config.model.int8_threshold)
    prepared.tokenizer.check_rows(base.vocab_size)
    method = METHODS[config.method.name]
    with memory_errors(config, "adding trainable weights", None):
        torch.manual_seed(config.train.seed)  # adapter initialisation
        model = method.apply(base, config.method)
        if prepared.start is not None:
            method.load(model, prepared.start)
    with memory_errors(config, "preparing the micro-steps", None):
        path, path_note = choose_path(model, base, config, dataset)
        hold_to_budget(config, device)
        optimizer = optimizer_for(model, path, config)
    return Session(
        config=config,
        dataset=dataset,
        tokenizer=prepared.tokenizer,
        steps=steps,
        method=method,
        model=model,
        path=path,
        path_note=path_note,
        optimizer=optimizer,
        device=device,
        folder=RunFolder(target),
        facts={
            "base_fingerprint": base.fingerprint,
            "base_config": computing(base.model.config),
            "tokenizer_hash": prepared.tokenizer.hash,
            "data_fingerprint": dataset.fingerprint,
            "versions": versions(),
        },
        display=Progress(steps.total_steps, 0, quiet),
        stop=stop,
    )


def _fresh_state(session: Session) -> State:
    assert session.config.model.dtype is not None, "resolved"
    return State(loss_scale=LossScale.for_dtype(session.config.model.dtype))


def _run(session: Session, state: State) -> Result:
    """Train, publish the result, write the report; a failure is recorded before it travels on."""
    session.display.start_step = state.step
    folder = session.folder
    try:
        with memory_errors(session.config, "training", folder.path):
            _write_result(session, state, "running", None)
            with session.display:
                _introduce(session)
                if state.step == 0 and not folder.samples.is_file():
                    samples.write_before(session)
                loop.run(session, state)
            published = publish(session, state)
            samples.write_after(session)
    except FituneError as error:
        with suppress(CheckpointError):  # a full disk must not hide what went wrong first
            _write_result(session, state, _status(error), None)
            write_report(folder.path)
        raise
    _write_result(session, state, "done", published)
    write_report(folder.path)
    return _result(session, state, published)


def _result(session: Session, state: State, published: int) -> Result:
    return Result(session.folder.path, state.step, published, state.first_eval_loss, state.best_eval_loss)


def _introduce(session: Session) -> None:
    """Say what is about to happen, and what of the data is not used."""
    config, summary = session.config, session.dataset.summary
    trained, total = count_parameters(session.model)
    layout = f"template {summary['template']}" if summary["template"] else "raw text"
    session.display.note(
        f"data: {summary['train_rows']:,} rows to train on, {summary['eval_rows']:,} held out, "
        f"{summary['rejected_rows']:,} rejected, {summary['truncated_rows']:,} cut at {config.data.max_length:,} "
        f"tokens; {layout}"
    )
    for note in cast(list[str], summary["template_notes"]):
        session.display.note(note)
    if summary["eval_rows_also_in_train"]:
        session.display.note(f"{summary['eval_rows_also_in_train']:,} held-out rows are also in the training files")
    stored = "" if config.model.quantization == "none" else f", blocks in {config.model.quantization}"
    session.display.note(
        f"model: {config.model.path}, {config.model.dtype}{stored} on {session.device}; {config.method.name} trains "
        f"{trained:,} of {total:,} parameters ({trained / total:.4%})"
    )
    if getattr(config.method, "adapter", None) is not None:
        session.display.note(f"the run began with the adapter in {config.method.adapter}")  # type: ignore[union-attr]
    session.display.note(session.path_note)
    emulated = emulation_note(session.model)
    if emulated:
        session.display.note(emulated)
    _warn_without_effect(session)


def _warn_without_effect(session: Session) -> None:
    if session.config.memory.budget is not None and session.device.type != "cuda":
        session.display.note("memory.budget has no effect on CPU")
    if session.config.train.warmup_steps >= session.steps.total_steps:
        session.display.note(
            f"train.warmup_steps is {session.config.train.warmup_steps}, but the run has only "
            f"{session.steps.total_steps} steps: the learning rate never reaches its peak"
        )
    if session.config.train.max_steps is not None and session.config.train.epochs != 1.0:
        session.display.note("train.epochs has no effect: train.max_steps decides")


def _status(error: FituneError) -> str:
    if isinstance(error, Interrupted):
        return "interrupted"
    return "diverged" if isinstance(error, DivergedError) else "failed"


def _write_result(session: Session, state: State, status: str, published: int | None) -> None:
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
        "seconds": round(state.seconds, 2),
        "trainable_parameters": trainable_count,
        "total_parameters": total,
        "peak_memory_bytes": memory_bytes(session.device),
        "device": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu",
        "data": session.dataset.summary,
        "data_fingerprint": session.dataset.fingerprint,
        **{key: value for key, value in asdict(state.loss_scale).items() if key == "scale"},
        "versions": session.facts["versions"],
    }
    session.folder.write_json("result.json", value)
