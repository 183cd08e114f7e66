"""A few held-out prompts answered before and after training, for the report and for the person watching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fitune.data.prepare import Row
from fitune.data.templates import resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.infer.generate import Sampling, generate
from fitune.training.session import Session

NUM_SAMPLES = 4
MAX_PROMPT_TOKENS = 512
TEXT_PROMPT_TOKENS = 16
FILE = "samples.json"


def write_before(session: Session) -> None:
    """Answer the sample prompts with the untrained model and store them; not while being asked to stop."""
    if session.stop.requested:
        return
    rows = _rows(session)
    entries: list[dict[str, Any]] = []
    said = _reads(session)
    for row, answer in zip(rows, _answers(session, rows), strict=True):
        split = prompt_length(row, session.tokenizer)
        entries.append(
            {
                "source": row.source,
                "prompt": session.tokenizer.decode(list(row.input_ids[:split])),
                "reference": said(list(row.input_ids[split : _answer_end(row, split)])),
                "before": answer,
            }
        )
    session.folder.write_json(FILE, entries)


def write_after(session: Session) -> None:
    """Answer the same prompts with the published weights."""
    if not session.folder.samples.is_file():
        return
    rows = _rows(session)
    entries = session.folder.read_json(FILE)
    for entry, answer in zip(entries, _answers(session, rows), strict=True):
        entry["after"] = answer
    session.folder.write_json(FILE, entries)


def prompt_length(row: Row, tokenizer: Tokenizer) -> int:
    """Tokens before the first supervised one; for raw text a short opening."""
    first = row.learn.find(1)
    if first > 1 and tokenizer.blank and row.input_ids[first] == tokenizer.blank.sop:
        first += 1  # learnt, but always given
    return first if first > 1 else min(TEXT_PROMPT_TOKENS, max(1, row.num_tokens // 2))


def _answer_end(row: Row, start: int) -> int:
    """End of the answer that starts at `start`: a conversation may go on after it."""
    end = row.learn.find(0, start)
    return end if end > 0 else row.num_tokens


def _rows(session: Session) -> list[Row]:
    rows = session.dataset.eval or session.dataset.train
    short = [row for row in rows if prompt_length(row, session.tokenizer) <= MAX_PROMPT_TOKENS]
    return [short[i * len(short) // NUM_SAMPLES] for i in range(min(NUM_SAMPLES, len(short)))]


def _answers(session: Session, rows: list[Row]) -> list[str]:
    if not rows:
        return []
    prompts = [list(row.input_ids[: prompt_length(row, session.tokenizer)]) for row in rows]
    sampling = Sampling(max_new_tokens=min(128, session.config.data.max_length))
    answers = generate(session.model, prompts, session.tokenizer.stop_ids, sampling)
    said = _reads(session)
    return [said(answer.ids) for answer in answers]


def _reads(session: Session) -> Callable[[Sequence[int]], str]:
    """What turns the ids of an answer into text."""
    if session.dataset.summary["template"] is None:
        return session.tokenizer.decode
    return resolve_template(session.config.data.template, session.tokenizer).answer_text
