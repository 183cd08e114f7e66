"""One cell of the matrix as a real run: trained, saved, opened, asked, merged; or refused before a weight is read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fitune
from fitune.config import build
from fitune.data.batches import pad
from fitune.data.prepare import Row
from fitune.errors import ConfigError
from fitune.infer.generate import Sampling, generate
from fitune.infer.load import Loaded
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.families import blocks
from fitune.training import run
from fitune.training.path import forward
from matrix.cells import MAX_STEPS, MICRO_STEPS, PRECISIONS, Cell

PROMPT = "say 3"
NO_TOKEN = 110  # of all vocabularies, and never learnt by a run: an answer that must not stop gets it as its stop id
# Relative error of logits when s B A or a factor is added to a weight that is then rounded to its dtype.
ROUNDING = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}


@dataclass(frozen=True)
class Outcome:
    """How a cell went.

    Attributes:
        status: trained or refused.
        path: fast or plain; None if refused.
        reason: the refusal; None if trained.
        losses: of each step, all of the same rows.
    """

    status: str
    path: str | None = None
    reason: str | None = None
    losses: tuple[float, ...] = ()

    def as_row(self, cell: Cell) -> dict[str, Any]:
        """What stands in the report of a test."""
        return {"cell": asdict(cell), **asdict(self)}


@dataclass
class Seen:
    """The model that a run trained, its trainable parameters as they were at the start, and how often in training the
    first part of the last block was called."""

    model: Any = None
    start: dict[str, torch.Tensor] | None = None
    forwards: int = 0


def run_cell(cell: Cell, model: Path, rows: Path, folder: Path, device: str) -> Outcome:
    """Run a cell; a cell that is refused is refused on a model whose weights cannot be read.

    Args:
        model: the family's folder.
        folder: empty; runs and exports go there.
        device: cpu or cuda.
    """
    try:
        empty = _without_weights(model, folder / "unreadable")
        run.train(build(cell.tree(empty, rows, folder / "refused", device)), quiet=True)
    except ConfigError as error:
        if "unreadable" not in str(error):
            assert not (folder / "refused").exists(), "a refused run leaves nothing behind"
            return Outcome("refused", reason=str(error))
    config = build(cell.tree(model, rows, folder / "run", device))
    said = io.StringIO()
    with watching(cell.method) as seen, redirect_stderr(said):
        run.train(config)
    outcome = _trained(folder / "run", " ".join(said.getvalue().split()))
    if outcome.path == "plain" and cell.precision != "fp16":  # which repeats a step whose gradients overflow
        expected = MICRO_STEPS * (2 if cell.checkpointing else 1)
        assert seen.forwards == expected, f"recomputed, or not: {seen.forwards} forwards for {expected}"
    _check_moved(cell, seen)
    loaded = _check_reloaded(cell, seen, folder, device)
    _check_answers(cell, loaded)
    _check_merged(cell, folder)
    return outcome


def _without_weights(model: Path, target: Path) -> Path:
    """The folder with files of noise in the place of its weights."""
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix in (".safetensors", ".bin"):
            (target / file.name).write_bytes(b"unreadable" * 100)
        else:
            shutil.copyfile(file, target / file.name)
    return target


@contextmanager
def watching(name: str) -> Iterator[Seen]:
    """Keep hold of the model that the runs inside apply a method to."""
    seen, method = Seen(), METHODS[name]

    def count(module: Any, arguments: Any) -> None:
        seen.forwards += module.training

    def apply(base: Any, config: Any) -> Any:
        path, number = blocks(base.model)
        # A part of the block: whether hooks of the block itself run again depends on the release of transformers.
        next(base.model.get_submodule(f"{path}.{number - 1}").children()).register_forward_pre_hook(count)
        seen.model = method.apply(base, config)
        seen.start = {name: p.detach().clone() for name, p in trainable(seen.model).items()}
        return seen.model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, name, replace(method, apply=apply))
        yield seen


def _trained(folder: Path, said: str) -> Outcome:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = tuple(row["loss"] for row in rows if row["kind"] == "train")
    assert len(losses) == MAX_STEPS, "a step was left out"
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    (path,) = [path for path in ("fast", "plain") if f"{path} path: " in said]
    return Outcome("trained", path=path, losses=losses)


def _check_moved(cell: Cell, seen: Seen) -> None:
    """In fp32 every trained tensor has moved; in 16 bits three steps may be too few for some."""
    assert seen.start
    now = trainable(seen.model)
    still = [name for name, start in seen.start.items() if torch.equal(now[name].detach(), start)]
    assert len(still) <= (0 if cell.precision == "fp32" else len(now) // 3), still


def _check_reloaded(cell: Cell, seen: Seen, folder: Path, device: str) -> Loaded:
    """The stored tensors are those of the trained model, and the opened run answers with the same logits."""
    method, loaded = METHODS[cell.method], fitune.load(folder / "run", device=device)
    stored = load_file(folder / "run" / method.folder / method.weights)
    result = method.result(seen.model)
    ours = method.state(seen.model) if result is None else result
    assert stored.keys() == ours.keys()
    assert all(torch.equal(stored[name], ours[name].cpu()) for name in ours)
    ids = loaded.prompt_ids(PROMPT)
    assert torch.equal(_logits(loaded.model, ids), _logits(seen.model, ids))
    assert not trainable(loaded.model)
    return loaded


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        batch = pad([Row(tuple(ids), bytes(len(ids)), "prompt")], 0)
        logits = forward(model, batch.to(next(model.parameters()).device))
    assert torch.isfinite(logits).all()
    return logits.float()


def _check_answers(cell: Cell, loaded: Loaded) -> None:
    """A few tokens, the same alone as beside other prompts (in 16 bits rounding decides), and none after a stop id."""
    prompts = [loaded.prompt_ids(text) for text in (PROMPT, "x", "say 1 say 2")]
    stops, few = loaded.tokenizer.stop_ids, Sampling(max_new_tokens=4)
    together = generate(loaded.model, prompts, stops, few)
    assert all(len(answer.ids) == 4 or answer.stopped for answer in together)
    alone = [generate(loaded.model, [prompt], stops, few)[0] for prompt in prompts]
    if cell.precision == "fp32" and loaded.model.device.type == "cpu":
        assert together == alone
    assert loaded.generate(PROMPT, max_new_tokens=4) == loaded.tokenizer.decode(alone[0].ids)
    (free,) = generate(loaded.model, prompts[:1], [NO_TOKEN], few)
    assert (len(free.ids), free.stopped) == (4, False)
    (stopped,) = generate(loaded.model, prompts[:1], free.ids[1:2], few)
    assert stopped.stopped
    assert stopped.ids == free.ids[: free.ids.index(free.ids[1])]


def _check_merged(cell: Cell, folder: Path) -> None:
    """The exported model gives the logits of the run on the full-precision base; virtual tokens are refused."""
    if METHODS[cell.method].merge is None:
        with pytest.raises(ConfigError, match="--form adapter"):
            fitune.export(folder / "run", folder / "merged")
        return
    merged = fitune.load(
        fitune.export(folder / "run", folder / "merged"), device="cpu", dtype=PRECISIONS[cell.precision][0]
    )
    ours = fitune.load(folder / "run", device="cpu", quantization="none")
    ids = ours.prompt_ids(PROMPT)
    assert merged.prompt_ids(PROMPT) == ids
    found, expected = _logits(merged.model, ids), _logits(ours.model, ids)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= ROUNDING[PRECISIONS[cell.precision][0]], f"merged: {error:.2e} of the logits"
