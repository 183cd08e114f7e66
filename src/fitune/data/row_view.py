"""A row token by token, for people who want to see what a layout does; `fitune data FILE --render`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fitune.data.rows import Row
from fitune.data.tokenizer import Tokenizer
from fitune.plan.chatglm import Blank

PICTURE = 32  # lines of a picture, or a few more


class Geometry(NamedTuple):
    """Where the tokens of a row stand for the model, and what they see.

    Args:
        positions: name -> one number per token; most models have one row of positions.
        sees: how many tokens, counted from the first, each token attends to. That says all of a causal mask, and of one
            that lets the tokens of a prefix see each other.
    """

    positions: dict[str, list[int]]
    sees: list[int]


def causal(ids: Sequence[int]) -> Geometry:
    """Positions from 0 on; each token sees those before it and itself."""
    return Geometry({"position": list(range(len(ids)))}, list(range(1, len(ids) + 1)))


def prefix_lm(ids: Sequence[int], blank: Blank) -> Geometry:
    """ChatGLM-6B: the tokens before sop see each other, and each has a place in the context and one in the answer.

    The same as `model.prefix_lm`, which computes it for batches.
    """

    def first(token: int, otherwise: int) -> int:
        return ids.index(token) if token in ids else otherwise

    start = first(blank.sop, len(ids))
    place = first(blank.gmask, first(blank.mask, max(start - 1, 0)))
    answer = range(1, len(ids) - start + 1)
    rows = {"position": [*range(start), *(place for _ in answer)], "block": [*(0 for _ in range(start)), *answer]}
    return Geometry(rows, [max(start, i) for i in range(1, len(ids) + 1)])


def geometry(ids: Sequence[int], tokenizer: Tokenizer) -> Geometry:
    """That of the model whose tokenizer it is."""
    return causal(ids) if tokenizer.blank is None else prefix_lm(ids, tokenizer.blank)


def picture(sees: Sequence[int]) -> Iterator[str]:
    """A mask, one line per query and one character per key (or several of them, in a long row)."""
    step = -(-len(sees) // PICTURE)
    for number in sees[step - 1 :: step]:
        seen = number // step
        yield "      " + "█" * seen + "·" * (len(sees) // step - seen)


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token: its id, how the vocabulary writes it, whether it is learnt, its positions, how many it sees."""

    id: int
    token: str
    learnt: bool
    positions: dict[str, int]
    sees: int


@dataclass(frozen=True, slots=True)
class RowView:
    """One row, `file:line`."""

    source: str
    num_supervised: int
    tokens: tuple[TokenView, ...]


def view(row: Row, tokenizer: Tokenizer) -> RowView:
    """Spell out a row."""
    ids = row.input_ids.tolist()
    positions, sees = geometry(ids, tokenizer)
    tokens = (
        TokenView(
            token, tokenizer.spell(token), row.learn[i] == 1, {name: at[i] for name, at in positions.items()}, sees[i]
        )
        for i, token in enumerate(ids)
    )
    return RowView(row.source, row.num_supervised, tuple(tokens))


def table(row: RowView) -> Iterator[str]:
    """Lines for a terminal: one per token, its text last, since not all characters are one column wide."""
    yield f"--- {row.source}: {len(row.tokens):,} tokens, {row.num_supervised:,} learnt"
    names = list(row.tokens[0].positions) if row.tokens else []
    yield "  ".join(["    #", "      id", "learnt", *names, " sees", "token"])
    for i, token in enumerate(row.tokens):
        places = (f"{at:>{len(name)}}" for name, at in token.positions.items())
        mark = "*" if token.learnt else ""
        yield "  ".join([f"{i:>5}", f"{token.id:>8}", f"{mark:^6}", *places, f"{token.sees:>5}", _visible(token.token)])
    sees = [token.sees for token in row.tokens]
    if sees != list(range(1, len(sees) + 1)):
        yield "who (lines) sees whom (columns):"
        yield from picture(sees)


def _visible(text: str) -> str:
    """White space and control characters as something that can be seen and does no harm to a terminal."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace(" ", "␣"))
    return "".join(shown)
