"""The only training loop.

One step: the rows of this step -> micro batches -> gradients of the mean loss per supervised token of the whole
global batch -> finite? -> clip -> optimizer. How rows are cut into micro batches never changes the update.
Randomness (dropout) is seeded by (seed, step, micro step), so a resumed step repeats exactly and no generator state
needs saving.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from fitune.data.batches import Step, micro_batches, pad
from fitune.data.prepare import Row
from fitune.errors import CheckpointError, DivergedError, Interrupted
from fitune.training.evaluate import Stopped, mean_loss
from fitune.training.metrics import memory_bytes
from fitune.training.optim import learning_rate
from fitune.training.saving import save
from fitune.training.session import Session, State

MAX_SKIPPED_IN_A_ROW = 3
MAX_SKIPPED = 20
MAX_FAILED_SAVES = 3


def run(session: Session, state: State) -> None:
    """Train from `state` to the last step; `state` is updated in place.

    Each turn does what is due at `state.step` and then one step, so that a run stopped or killed anywhere finds its
    place again: an evaluation that was given up is done by the resumed run.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was committed.
        DivergedError: several steps in a row had a non-finite loss or gradient.
        CheckpointError: checkpoints cannot be written.
    """
    train, total = session.config.train, session.steps.total_steps
    saver = _Saver(session)
    while True:
        if session.stop.requested:
            save(session, state)
            raise Interrupted(
                f"stopped by {session.stop.requested} after step {state.step} of {total}; everything is saved. "
                f"Continue with: fitune resume {session.folder.path}"
            )
        last = state.step >= total
        due = last or state.step % (train.eval_every_steps or total) == 0
        before = (state.best_step, state.best_eval_loss)
        improved = False
        if due and session.dataset.eval and state.evaluated_step != state.step:
            try:
                improved = _evaluate_and_log(session, state)
            except Stopped:
                continue
        if (last or improved or state.step % train.save_every_steps == 0) and state.step > 0:
            saved = saver.save(state, must=last)
            if improved and not saved:  # nothing on disk to publish it from
                state.best_step, state.best_eval_loss = before
        if last:
            return
        row = _step(session, state)
        state.step += 1
        state.seconds += row["seconds"]
        session.folder.append_metrics(row)
        session.display.step(row) if row["kind"] == "train" else session.display.skipped(row)
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW or state.skipped >= MAX_SKIPPED:
            raise DivergedError(
                f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row ({state.skipped} in all), "
                f"last at step {state.step}, rows {', '.join(row['rows'][:3])}. These steps were not applied; the last "
                f"checkpoint is good. Lower train.learning_rate (now {train.learning_rate:g}), raise "
                "train.warmup_steps, or use model.dtype=bf16 or fp32"
            )


class _Saver:
    """Commits checkpoints; a failure costs that checkpoint, `MAX_FAILED_SAVES` in a row end the run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._failed = 0

    def save(self, state: State, must: bool) -> bool:
        """True if the checkpoint is on disk; with `must` a failure is raised."""
        try:
            save(self._session, state)
        except CheckpointError as error:
            self._failed += 1
            if must or self._failed >= MAX_FAILED_SAVES:
                raise
            self._session.display.note(f"checkpoint of step {state.step} not saved, training goes on: {error}")
            return False
        self._failed = 0
        return True


def _step(session: Session, state: State) -> dict[str, Any]:
    """One optimizer step; returns its metrics row."""
    started = time.perf_counter()
    step = session.steps.step(state.step)
    rows = [session.dataset.train[i] for i in step.rows]
    num_supervised = sum(row.num_supervised for row in rows)
    train = session.config.train
    scale = state.loss_scale.scale
    while True:
        loss_sum, padded = _accumulate(session, state, rows, num_supervised)
        norm, loss = _norm_and_loss(session, loss_sum, state.loss_scale.scale, num_supervised)
        # Only an overflow of gradients gets better by a smaller scale; the loss itself is not scaled.
        if math.isfinite(norm) or not math.isfinite(loss) or not state.loss_scale.can_shrink():
            break
        state.loss_scale.shrink()
    facts: dict[str, Any] = {"step": state.step + 1, "epoch": round(step.epoch + _share(session, step), 4)}
    if not (math.isfinite(norm) and math.isfinite(loss)):
        reason = "non-finite loss" if not math.isfinite(loss) else "non-finite gradient"
        names = _culprits(session, state, rows)
        session.optimizer.zero()
        state.loss_scale.scale = scale  # it was not the scale
        state.skipped_in_a_row += 1
        state.skipped += 1
        took = round(time.perf_counter() - started, 4)
        return {"kind": "skipped", **facts, "reason": reason, "rows": names, "seconds": took}
    rate = learning_rate(train, state.step, session.steps.total_steps)
    clip = min(1.0, train.max_grad_norm / norm) if train.max_grad_norm and norm > 0 else 1.0
    if clip / state.loss_scale.scale != 1.0:
        torch._foreach_mul_(session.optimizer.gradients(), clip / state.loss_scale.scale)
    session.optimizer.step(rate)
    session.optimizer.zero()
    state.loss_scale.grew_after_step(session.config.model.dtype == "fp16")
    state.skipped_in_a_row = 0
    tokens = sum(row.num_tokens for row in rows)
    state.tokens += tokens
    return {
        "kind": "train",
        **facts,
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": rate,
        "tokens": tokens,
        "supervised_tokens": num_supervised,
        "padded_tokens": padded,
        "loss_scale": state.loss_scale.scale,
        "seconds": round(time.perf_counter() - started, 4),
        "memory_bytes": memory_bytes(session.device),
    }


def _accumulate(session: Session, state: State, rows: Sequence[Row], num_supervised: int) -> tuple[torch.Tensor, int]:
    """Gradients of loss_scale * (mean loss over the global batch); returns the loss sum and the tokens computed."""
    session.optimizer.zero()
    loss_sum = torch.zeros((), device=session.device)
    padded = 0
    config = session.config
    for micro, batch in enumerate(micro_batches(rows, config.data, config.train, session.pad_id)):
        seed_generators(_seed(config.train.seed, state.step, micro), session.device)
        loss_sum += session.path.loss_and_grad(batch, state.loss_scale.scale / num_supervised)
        padded += batch.input_ids_BT.numel()
    return loss_sum, padded


def _norm_and_loss(session: Session, loss_sum: torch.Tensor, scale: float, num_supervised: int) -> tuple[float, float]:
    """Gradient norm and mean loss with one device synchronization; a norm is finite only if every element is."""
    norm = torch.nn.utils.get_total_norm(session.optimizer.gradients()).to(session.device)
    both: list[float] = torch.stack([norm.float() / scale, loss_sum / num_supervised]).tolist()
    return both[0], both[1]


def _culprits(session: Session, state: State, rows: Sequence[Row]) -> list[str]:
    """Which rows alone give a non-finite loss or gradient; all of them if none does."""
    named = []
    for row in rows:
        session.optimizer.zero()
        loss = session.path.loss_and_grad(pad([row], session.pad_id), state.loss_scale.scale / row.num_supervised)
        norm, value = _norm_and_loss(session, loss, state.loss_scale.scale, row.num_supervised)
        if not (math.isfinite(norm) and math.isfinite(value)):
            named.append(row.source)
    return named or [row.source for row in rows]


def _evaluate_and_log(session: Session, state: State) -> bool:
    """Held-out loss per supervised token; True if it is the lowest so far (the untrained model does not count).

    Raises:
        Stopped: the run was asked to stop meanwhile; nothing was recorded.
    """
    rows = session.dataset.eval
    started = time.perf_counter()
    loss = mean_loss(session.path, rows, session.config, session.pad_id, lambda: session.stop.requested)
    improved = state.step > 0 and math.isfinite(loss) and (state.best_eval_loss is None or loss < state.best_eval_loss)
    if state.step == 0:
        state.first_eval_loss = loss
    if improved:
        state.best_step, state.best_eval_loss = state.step, loss
    state.last_eval_loss = loss
    state.evaluated_step = state.step
    seconds = round(time.perf_counter() - started, 4)
    state.seconds += seconds
    row = {
        "kind": "eval",
        "step": state.step,
        "loss": loss,
        "supervised_tokens": sum(row.num_supervised for row in rows),
        "best": improved,
        "seconds": seconds,
    }
    session.folder.append_metrics(row)
    session.display.eval(row)
    return improved


def _share(session: Session, step: Step) -> float:
    return (step.index + 1) / session.steps.steps_of_epoch(step.epoch)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the CPU and of the device; torch.manual_seed asks every backend there is, 0.1 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _seed(seed: int, step: int, micro: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{step}:{micro}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch wants a non-negative int64
