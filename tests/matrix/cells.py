"""The matrix: combinations of family, method, precision and checkpointing, and what is expected of each.

What is impossible is asked of the library's own checks, those that `fitune train` makes before it reads a weight: the
tests hold the runs to their answers, docs/matrix.md is a table of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from fitune.config import RunConfig, build
from fitune.errors import ConfigError
from fitune.plan.checks import check_run, known_arch, plain_reason
from matrix.folders import CONFIGS

FAMILIES = tuple(CONFIGS)
VIRTUAL = {"num_virtual_tokens": 4}
# Settings of each method, and a learning rate with which three steps are seen in the loss.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 3e-3),
    "freeze": ({"num_layers": 1}, 1e-2),
    "bitfit": ({}, 3e-2),
    "prompt": (VIRTUAL, 0.3),
    "ptuning": (VIRTUAL, 3e-2),
    "prefix": (VIRTUAL, 0.3),
    "lora": ({"r": 4}, 3e-2),
    "ia3": ({}, 0.1),
}
# Quantized weights compute in 16 bits, as they mostly do.
PRECISIONS: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "none"),
    "fp16": ("fp16", "none"),
    "bf16": ("bf16", "none"),
    "int8": ("bf16", "int8"),
    "nf4": ("bf16", "nf4"),
}
MAX_LENGTH, MAX_STEPS = 36, 3
MICRO_STEPS = 2 * MAX_STEPS  # four rows, three at a time


@dataclass(frozen=True)
class Cell:
    """One combination."""

    family: str
    method: str
    precision: str
    checkpointing: bool

    def __str__(self) -> str:
        recompute = "recomputed" if self.checkpointing else "kept"
        return "-".join((self.family.replace(" ", "_"), self.method, self.precision, recompute))

    def tree(self, model: Path, rows: Path, target: Path, device: str = "cpu") -> dict[str, Any]:
        """The configuration of its run: every step sees all rows, so that losses of steps can be compared."""
        (settings, rate), (dtype, quantization) = METHODS[self.method], PRECISIONS[self.precision]
        return {
            "model": {"path": str(model), "dtype": dtype, "quantization": quantization},
            "method": {"name": self.method, **settings},
            "data": {"train": [str(rows)], "max_length": MAX_LENGTH},
            "train": {
                "max_steps": MAX_STEPS,
                "global_batch_rows": 4,
                "micro_batch_rows": 3,
                "learning_rate": rate,
                "schedule": "constant",
                "activation_checkpointing": self.checkpointing,
                "device": device,
            },
            "output": {"dir": str(target)},
        }


class Expected(NamedTuple):
    """What the checks say of a cell: `path` is fast or plain if it can be trained, `reason` says why not."""

    path: str | None
    reason: str | None


CELLS = tuple(Cell(*each) for each in product(FAMILIES, METHODS, PRECISIONS, (False, True)))


@cache
def expected(cell: Cell) -> Expected:
    """Ask the checks of the library, with what stands in the family's config.json."""
    config = CONFIGS[cell.family]
    arch = known_arch(config)
    assert arch is not None, cell.family
    try:
        run: RunConfig = build(cell.tree(Path("m"), Path("rows.jsonl"), Path("run")))
        check_run(run, arch, arch.positions)
    except ConfigError as error:
        return Expected(None, str(error))
    return Expected("fast" if plain_reason(arch, run) is None else "plain", None)


def pairwise_cover() -> list[Cell]:
    """Cells with every pair of settings that any possible cell has, and one refused cell for each family and method.

    Greedy: always the cell with the most pairs that are still missing, the first of those.
    """
    possible = [cell for cell in CELLS if expected(cell).reason is None]
    missing = {pair for cell in possible for pair in pairs(cell)}
    chosen: list[Cell] = []
    while missing:
        best = max(possible, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    refused: dict[tuple[str, str], Cell] = {}
    for cell in CELLS:
        if expected(cell).reason is not None:
            refused.setdefault((cell.family, cell.method), cell)
    return [*chosen, *refused.values()]


def pairs(cell: Cell) -> set[frozenset[tuple[str, object]]]:
    """All pairs of a cell's settings."""
    return {frozenset(pair) for pair in combinations(asdict(cell).items(), 2)}


def table(texts: Mapping[Cell, str], notes: Sequence[str] = ()) -> str:
    """Markdown: methods down, families across; what is said of all cells, precisions with the same text together."""
    lines = [f"| method | {' | '.join(FAMILIES)} |", "|" + "---|" * (len(FAMILIES) + 1)]
    for method in METHODS:
        lines.append(f"| `{method}` | {' | '.join(_group(texts, family, method) for family in FAMILIES)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def _group(texts: Mapping[Cell, str], family: str, method: str) -> str:
    groups: dict[str, list[str]] = {}
    for precision in PRECISIONS:
        kept, recomputed = (texts[Cell(family, method, precision, flag)] for flag in (False, True))
        said = kept if kept == recomputed else f"{kept}; recomputed: {recomputed}"
        groups.setdefault(said, []).append(precision)
    if len(groups) == 1:
        return f"all: {next(iter(groups))}"
    return "<br>".join(f"{' '.join(precisions)}: {said}" for said, precisions in groups.items())


def docs_page() -> str:
    """docs/matrix.md."""
    answers = {cell: expected(cell) for cell in CELLS}
    reasons = list(dict.fromkeys(_general(cell, a.reason) for cell, a in answers.items() if a.reason is not None))
    texts = {
        cell: a.path if a.path is not None else f"no [{reasons.index(_general(cell, a.reason or '')) + 1}]"
        for cell, a in answers.items()
    }
    possible = sum(a.reason is None for a in answers.values())
    return (
        INTRODUCTION.format(total=len(CELLS), possible=possible, refused=len(CELLS) - possible)
        + table(texts, reasons)
        + "\n"
    )


def _general(cell: Cell, reason: str) -> str:
    """A refusal without what differs from cell to cell."""
    _, quantization = PRECISIONS[cell.precision]
    reason = reason.replace(f"this {CONFIGS[cell.family]['model_type']} model", "this model")
    return reason.replace(f"model.quantization is {quantization}", "model.quantization is set")


INTRODUCTION = """# What goes with what

Generated by `make docs` from the checks that `fitune train` makes before it reads a weight. Every combination of
family, method, precision and activation checkpointing is a run of `make matrix` on a tiny model. Of {total},
{possible} are trained, saved, opened again (the same logits, to the bit), asked, and merged where that is defined;
{refused} are refused before weights are read. `make test` runs as many as hold every pair of settings. The last run of
all: [results/matrix.md](results/matrix.md).

`fast` is the engine (docs/engine.md), `plain` the forward of transformers and PEFT. `glm` stands for ChatGLM2 and 3,
too, `chatglm v1` for ChatGLM-6B; int8 and nf4 compute in bf16 here. Other models of transformers train on the plain
path. What changes with activation checkpointing stands behind "recomputed".

"""
