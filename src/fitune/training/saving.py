"""What of a run goes into a checkpoint, and back; the crash-safe storing itself is checkpoint.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fitune.config import RunConfig, leaves
from fitune.data.templates import resolve_template
from fitune.errors import CheckpointError, ConfigError
from fitune.infer.export import stop_settings, write_companions
from fitune.methods.base import write_json
from fitune.training import checkpoint
from fitune.training.checkpoint import Checkpoint
from fitune.training.session import Session, State

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

# What may change between two halves of one run: none of these alters which rows form a step or what is trained.
# Everything else would make the second half another run, and is refused.
RESUMABLE = frozenset(
    {
        "train.epochs",
        "train.max_steps",
        "train.micro_batch_rows",
        "train.micro_batch_tokens",
        "train.learning_rate",
        "train.schedule",
        "train.warmup_steps",
        "train.weight_decay",
        "train.max_grad_norm",
        "train.adam_epsilon",
        "train.activation_checkpointing",
        "train.deterministic",
        "train.path",
        "train.device",
        "train.save_every_steps",
        "train.eval_every_steps",
        "train.keep_checkpoints",
        "memory.budget",
        # Where files are; what they hold is guarded by fingerprints.
        "model.path",
        "data.train",
        "data.eval",
    }
)


_ASIDE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def save(session: Session, state: State) -> None:
    """Commit a checkpoint of the current step and prune older ones.

    Raises:
        CheckpointError: disk trouble, or a value that is not finite.
    """

    def write(folder: Path) -> None:
        weights = folder / session.method.folder
        weights.mkdir()
        session.method.save(session.model, weights, base_facts(session), to_resume=True)
        checkpoint.save_tensors(folder / OPTIMIZER, session.optimizer.state(), require_finite=True)
        write_json(folder / STATE, state.to_json())

    stored = session.folder.checkpoints / f"step_{state.step:06d}" / STATE
    if stored.is_file() and _same(stored, state):
        return  # already there: a stop right after a regular save, or right after a resume
    facts = {**session.facts, "config": leaves(session.config), "num_threads": torch.get_num_threads()}
    checkpoint.commit(session.folder, state.step, write, facts)
    protect = {state.step} | ({state.best_step} if state.best_step is not None else set())
    checkpoint.prune(session.folder, session.config.train.keep_checkpoints, protect)


def _same(stored: Path, state: State) -> bool:
    try:
        return bool(json.loads(stored.read_text(encoding="utf-8")) == state.to_json())
    except (OSError, ValueError):
        return False


def restore(session: Session, stored: Checkpoint) -> State:
    """Put a verified checkpoint into the model and the optimizer.

    Raises:
        CheckpointError: it belongs to another base model, dataset or tokenizer.
    """
    for key, what in (
        ("base_fingerprint", "the base model's weights"),
        ("tokenizer_hash", "the tokenizer"),
        ("data_fingerprint", "the data (files, template or their order of rows)"),
    ):
        if stored.manifest["facts"].get(key) != session.facts[key]:
            raise CheckpointError(
                f"{stored.path}: {what} changed since this checkpoint was written, so the run cannot be continued "
                "as the same run. Put the old one back, or start a new run with another output.dir"
            )
    _check_base_config(session, stored)
    session.method.load(session.model, stored.path / session.method.folder)
    session.optimizer.load_state(checkpoint.load_tensors(stored.path / OPTIMIZER))
    return State.from_json(json.loads((stored.path / STATE).read_text(encoding="utf-8")))


def computing(config: Any) -> dict[str, Any]:
    """What of a transformers configuration decides what the model computes, as JSON values.

    Not where it came from, which ids end a text, how it is stored and how transformers runs it.
    """
    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in sorted(tree.items()) if key not in _ASIDE and not key.endswith("_token_id")}


def _check_base_config(session: Session, stored: Checkpoint) -> None:
    """Refuse a base whose config.json computes something else; another release of transformers may read it anew."""
    old, new = stored.facts.get("base_config"), session.facts["base_config"]
    releases = [facts["versions"].get("transformers") for facts in (stored.facts, session.facts)]
    if old is None or releases[0] != releases[1]:
        return
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if changed:
        shown = ", ".join(f"{key}: {old.get(key)!r:.60} -> {new.get(key)!r:.60}" for key in changed[:3])
        raise CheckpointError(
            f"{stored.path}: the base model's config.json changed since this checkpoint was written ({shown}), so the "
            "run cannot be continued as the same run. Put the old one back, or start a new run with another output.dir"
        )


def check_changes(stored: Checkpoint, config: RunConfig) -> list[str]:
    """Compare the configuration of a checkpoint with the one to resume with.

    Returns:
        The changes that take effect, as `key: old -> new`.

    Raises:
        ConfigError: a setting changed that would make this another run.
    """
    old: dict[str, Any] = stored.manifest["facts"]["config"]
    new = leaves(config)
    changed = sorted(key for key in (old | new).keys() - {"output.dir"} if old.get(key) != new.get(key))
    lines = {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed}
    refused = [lines[key] for key in changed if key not in RESUMABLE]
    if refused:
        raise ConfigError(
            f"this run cannot be resumed with {'; '.join(refused)}: that would be another run. Undo the change, or "
            "start a new one with another output.dir"
        )
    return list(lines.values())


def publish(session: Session, state: State) -> int:
    """Put the result, the best held-out checkpoint or else the last state, at its final place; returns its step."""
    step = state.step
    if state.best_step is not None and state.best_step != state.step:
        path = session.folder.checkpoints / f"step_{state.best_step:06d}"
        try:
            checkpoint.verify(path)
            session.method.load(session.model, path / session.method.folder)
            step = state.best_step
        except CheckpointError as error:
            session.note(
                f"the best held-out step {state.best_step} cannot be used ({error}); the last step is published"
            )

    def write(folder: Path) -> None:
        session.method.save(session.model, folder, base_facts(session))
        if session.method.folder == "model":
            template = resolve_template(session.config.data.template, session.tokenizer)
            write_companions(folder, template, session.tokenizer)
            stop_settings(session.tokenizer).save_pretrained(folder)

    session.folder.publish(session.method.folder, write)
    return step


def base_facts(session: Session) -> dict[str, Any]:
    """What an adapter records about the model it belongs to, and how it was trained."""
    return {
        "base_model": session.config.model.path,
        "base_fingerprint": session.facts["base_fingerprint"],
        "settings": session.config.method.model_dump(mode="json", exclude={"name", "adapter"}),
    }
