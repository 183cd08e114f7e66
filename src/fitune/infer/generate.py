"""Ids in, ids out: batched generation with transformers' generate, stopping where the template says.

`fitune.load(...)` wraps it with a tokenizer and a template: text in, text out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from fitune.errors import DataError
from fitune.infer.sampling import Sampling
from fitune.methods.prompts import generation_inputs, num_virtual_tokens

__all__ = ["Generated", "Sampling", "generate", "stream"]


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        ids: new ids, the stop id excluded.
        stopped: it ended by itself, by a stop id, before max_new_tokens.
    """

    ids: list[int]
    stopped: bool


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    *,
    batch_rows: int = 32,
) -> list[Generated]:
    """Continue each prompt; the order of answers is that of the prompts.

    Args:
        prompts: non-empty id lists; they are padded on the left inside a batch, masked by length.
        stop_ids: ids that end an answer.
        batch_rows: prompts per forward pass.

    Raises:
        DataError: a prompt fills all positions of the model; near its end, answers are cut short.
    """
    fitted = [_fit(model, len(prompt), sampling) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
    answers: list[Generated | None] = [None] * len(prompts)
    with _generating(model):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        # One batch has one limit of new tokens: an answer must not depend on the prompts beside it.
        for _, group in groupby(order, key=lambda i: fitted[i].max_new_tokens):
            alike = list(group)
            for start in range(0, len(alike), batch_rows):
                chosen = alike[start : start + batch_rows]
                batch = _generate_batch(model, [prompts[i] for i in chosen], stop_ids, fitted[chosen[0]])
                for i, answer in zip(chosen, batch, strict=True):
                    answers[i] = answer
    return [answer for answer in answers if answer is not None]


def _fit(model: nn.Module, prompt_tokens: int, sampling: Sampling) -> Sampling:
    """`sampling` with max_new_tokens cut to the positions that the model has left after the prompt."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(positions, int):  # relative positions: no end
        return sampling
    positions -= num_virtual_tokens(model)
    if prompt_tokens >= positions:
        raise DataError(
            f"the prompt has {prompt_tokens:,} tokens, but the model has {positions:,} positions for prompt and answer "
            "together; shorten the prompt"
        )
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, positions - prompt_tokens))


def _generate_batch(
    model: nn.Module, prompts: list[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
) -> list[Generated]:
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids_BT = torch.full((len(prompts), width), stop_ids[0], dtype=torch.int64)
    mask_BT = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids_BT[i, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[i, width - len(prompt) :] = 1
    generator, inputs = generation_inputs(model, ids_BT.to(device), mask_BT.to(device))
    out_BT = generator.generate(  # type: ignore[operator]  # a transformers or PEFT model
        **inputs, generation_config=_settings(stop_ids, sampling)
    )
    return [_cut(row, stop_ids) for row in out_BT[:, width:].tolist()]


def _settings(stop_ids: Sequence[int], sampling: Sampling) -> Any:
    """A transformers GenerationConfig."""
    from transformers import GenerationConfig

    settings: dict[str, Any] = {"do_sample": sampling.temperature > 0, "use_cache": True}
    if sampling.temperature > 0:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        repetition_penalty=sampling.repetition_penalty,
        **settings,
    )


def stream(
    model: nn.Module, prompt: Sequence[int], stop_ids: Sequence[int], sampling: Sampling
) -> Generator[int, None, None]:
    """Continue one prompt, yielding each new id as it is chosen; the stop id is not yielded.

    Closing the iterator ends the generation; it has ended when `close` returns.

    Raises:
        DataError: the prompt fills all positions of the model.
    """
    return _stream(model, prompt, stop_ids, _fit(model, len(prompt), sampling))


def _stream(
    model: nn.Module, prompt: Sequence[int], stop_ids: Sequence[int], sampling: Sampling
) -> Generator[int, None, None]:
    tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        try:
            with _generating(model):
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                ids_BT = torch.tensor([list(prompt)], device=next(model.parameters()).device)
                generator, inputs = generation_inputs(model, ids_BT, torch.ones_like(ids_BT))
                generator.generate(  # type: ignore[operator]  # a transformers or PEFT model
                    **inputs,
                    generation_config=_settings(stop_ids, sampling),
                    streamer=_QueueStreamer(tokens, len(prompt)),
                    stopping_criteria=[_stop_when(closed)],
                )
        except BaseException as error:  # noqa: BLE001  # handed to the thread that reads, and raised there
            tokens.put(error)
        tokens.put(None)

    # transformers pushes tokens; a thread turns that into an iterator. It is no daemon: a thread that is killed
    # inside torch while Python exits aborts the process.
    worker = threading.Thread(target=work)
    worker.start()
    try:
        while (token := tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            if token not in stop_ids:
                yield token
    finally:
        closed.set()
        worker.join()


def _stop_when(closed: threading.Event) -> Any:
    """A stopping criterion of transformers: nobody reads any more, or Python is exiting with the iterator open."""

    def criterion(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        over = closed.is_set() or not threading.main_thread().is_alive()
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)

    return criterion


class _QueueStreamer:
    """transformers' streamer interface: `put` gets the prompt first, then each new id."""

    def __init__(self, tokens: queue.SimpleQueue[int | BaseException | None], prompt_length: int) -> None:
        self._tokens = tokens
        self._skip = prompt_length

    def put(self, value: torch.Tensor) -> None:
        """Called by generate with ids on the CPU."""
        ids = value.flatten().tolist()
        skipped = min(self._skip, len(ids))
        self._skip -= skipped
        for token in ids[skipped:]:
            self._tokens.put(token)

    def end(self) -> None:
        """Called when generation ends; the worker puts the end mark itself."""


def _cut(ids: list[int], stop_ids: Sequence[int]) -> Generated:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Generated(ids[:position], stopped=True)
    return Generated(ids, stopped=False)


@contextmanager
def _generating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients and without activation checkpointing (which switches the KV cache off)."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
