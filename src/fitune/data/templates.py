"""Messages -> ids, with the tokens of the answers marked: the one layout of training and of inference.

A template is a jinja text, the model's own or one of `layouts.py`. What it writes is trusted and its special tokens
become ids; what stands in messages stays text, whatever it looks like. The ids of an answer always begin where the
ids of its prompt end, so that a model is asked with exactly the ids it was trained on.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from fitune.data.example import Message
from fitune.data.layouts import LAYOUTS, Layout
from fitune.data.render import Renderer
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, DataError

# Characters that mean nothing to anyone; they stand for special tokens in message contents while a template renders.
_PRIVATE = range(0xE000, 0xF900)

ROLES = ("system", "user", "assistant", "tool")


class Encoded(NamedTuple):
    """A conversation as ids; `learn` has one byte per id, 1 where an answer (its end included) is learnt."""

    ids: list[int]
    learn: bytes


class _Piece(NamedTuple):
    """A text to encode, or the id of a special token."""

    part: str | int
    learn: bool
    at_start: bool


class Template:
    """A conversation layout bound to a tokenizer.

    Attributes:
        name: model, tutorial, alpaca, chatml or llama3.
        source: the jinja text, complete with what comes before the first turn.
        hash: sha256 of the source.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise ConfigError(
                f"{tokenizer.folder}: the tokenizer has no end-of-sequence token, so answers would never end; "
                "name one as eos_token in tokenizer_config.json"
            )
        self.name = name
        self.source = source
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._eos_id = tokenizer.eos_id
        self._stop_ids = frozenset(tokenizer.stop_ids)
        self._renderer = Renderer(name, source, tokenizer.named_tokens)

    def chat_template(self, tokenizer: Tokenizer | None = None) -> str:
        """The jinja text that an exported model carries.

        Args:
            tokenizer: the one to export with, if it is not the template's own.
        """
        return self.source if tokenizer is None else resolve_template(self.name, tokenizer).source

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that ask for the next answer; what inference gives to the model.

        Raises:
            DataError: the template refuses these messages.
        """
        turns, hidden = self._turns(messages)
        text = self._renderer.render(turns, True)
        cuts = []
        for i in _answers(messages):
            prompt = self._renderer.render(turns[:i], True)
            # A template may show the past differently (Qwen3 drops old thoughts); then this answer is not cut off.
            if text.startswith(prompt):
                cuts.append(len(prompt))
        bounds = [0, *cuts, len(text)]
        pieces = [
            _Piece(part, False, start == 0 and i == 0)
            for start, end in pairwise(bounds)
            for i, part in enumerate(self._tokenizer.split(text[start:end]))
        ]
        return self._encode([_restore(pieces, hidden)])[0].ids

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them are learnt.

        Raises:
            DataError: the template refuses these messages, or shows a prompt differently once its answer follows.
        """
        encoded = self.conversations([messages])[0]
        if isinstance(encoded, DataError):
            raise encoded
        return encoded.ids, [flag == 1 for flag in encoded.learn]

    def conversations(self, batch: Sequence[Sequence[Message]]) -> list[Encoded | DataError]:
        """`conversation` of many at once; one that cannot be had is returned as its error."""
        laid_out: list[list[_Piece] | DataError] = []
        for messages in batch:
            try:
                laid_out.append(self._lay_out(messages))
            except DataError as error:
                laid_out.append(
                    DataError(f"{error}; data.template=tutorial takes it") if self._helps(messages) else error
                )
        encoded = iter(self._encode([pieces for pieces in laid_out if not isinstance(pieces, DataError)]))
        return [item if isinstance(item, DataError) else next(encoded) for item in laid_out]

    def _helps(self, messages: Sequence[Message]) -> bool:
        """Whether the tutorial layout takes what the model's own template refuses."""
        if self.name != "model":
            return False
        try:
            resolve_template("tutorial", self._tokenizer)._lay_out(messages)
        except (ConfigError, DataError):
            return False
        return True

    def _turns(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[int, str]]:
        """Messages as jinja sees them, special tokens in them hidden; and the map that brings those back."""
        for message in messages:
            if message.role not in ROLES:
                raise DataError(f"unknown role '{message.role}'; allowed are {', '.join(ROLES)}")
        texts = [text for m in messages for text in (m.content, m.instruction, m.input) if text]
        joined = "\n".join(texts)
        if not joined.isascii() and any("\ud800" <= character <= "\udfff" for character in joined):
            raise DataError("a message has an unpaired surrogate, which is no character")
        found = sorted(self._tokenizer.special_in(joined))
        free = (chr(code) for code in _PRIVATE if chr(code) not in joined)
        shown = dict(zip(found, free, strict=False))
        if len(shown) < len(found):
            raise DataError("too many special tokens and private-use characters in one conversation")

        def hide(text: str) -> str:
            return self._tokenizer.hide_special(text, shown) if shown else text

        turns = []
        for message in messages:
            turn = {"role": message.role, "content": hide(message.content)}
            if message.instruction is not None:
                turn["instruction"] = hide(message.instruction)
                turn["input"] = hide(message.input or "")
            turns.append(turn)
        return turns, {ord(character): token for token, character in shown.items()}

    def _lay_out(self, messages: Sequence[Message]) -> list[_Piece]:
        turns, hidden = self._turns(messages)
        full = self._renderer.render(turns, False)
        answers = _answers(messages)
        starts: list[int] = []
        for number, i in enumerate(answers, 1):
            prompt = self._renderer.render(turns[:i], True)
            if not full.startswith(prompt) or (starts and len(prompt) <= starts[-1]):
                raise DataError(
                    f"template {self.name}: what stands before answer {number} is rendered differently once the "
                    "answer follows, so the model could not be asked for it; use another data.template"
                )
            starts.append(len(prompt))
        head = full[: starts[0]] if starts else full
        pieces = [_Piece(part, False, i == 0) for i, part in enumerate(self._tokenizer.split(head))]
        for number, start in enumerate(starts):
            last = number == len(starts) - 1
            text = full[start:] if last else full[start : starts[number + 1]]
            parts = self._tokenizer.split(text)
            end = self._first_special(parts)
            if end is None or parts[end] not in self._stop_ids:
                parts, end = self._bounded(turns[: answers[number] + 1], full, (start, start + len(text)), last)
            pieces += [_Piece(part, i <= end, False) for i, part in enumerate(parts)]
        return _restore(pieces, hidden)

    def _first_special(self, parts: Sequence[str | int]) -> int | None:
        return next((i for i, part in enumerate(parts) if isinstance(part, int)), None)

    def _bounded(
        self, turns: list[dict[str, str]], full: str, span: tuple[int, int], last: bool
    ) -> tuple[list[str | int], int]:
        """Parts of an answer that no stop token ends directly, and the index of its last learnt one.

        The answer reaches as far as the conversation that ends with it; a stop token behind that belongs to it.
        """
        start, end = span
        until = end
        if not last:
            whole = self._renderer.render(turns, False)
            if not full.startswith(whole) or not start < len(whole) <= end:
                raise DataError(
                    f"template {self.name}: writes no end-of-turn token after an answer, and where the answer ends "
                    "cannot be told; use another data.template"
                )
            until = len(whole)
        answer = self._tokenizer.split(full[start:until])
        rest = self._tokenizer.split(full[until:end])
        stop = next((i for i, part in enumerate(answer) if part in self._stop_ids), None)
        if stop is not None:
            return answer + rest, stop
        if rest and rest[0] in self._stop_ids:
            return answer + rest, len(answer)
        if last:
            return [*answer, self._eos_id], len(answer)
        return answer + rest, len(answer) - 1

    def _encode(self, rows: Sequence[list[_Piece]]) -> list[Encoded]:
        """Ids of rows of pieces; each distinct text is encoded once."""
        ids: dict[tuple[str, bool], list[int]] = {}
        for at_start in (True, False):
            texts = list(
                dict.fromkeys(p.part for row in rows for p in row if isinstance(p.part, str) and p.at_start is at_start)
            )
            if texts:
                encoded = self._tokenizer.encode_batch(texts, at_start=at_start)
                ids.update(zip(((text, at_start) for text in texts), encoded, strict=True))
        return [_join(row, ids) for row in rows]


def resolve_template(name: str, tokenizer: Tokenizer) -> Template:
    """Make the template of that name for a tokenizer.

    Args:
        name: `model` (the tokenizer's own), a key of LAYOUTS, or `auto`: the model's own if there is one, else
            tutorial.
    Raises:
        ConfigError: unknown name, no template in the model, special tokens missing, or no end-of-sequence token.
    """
    if name == "auto":
        name = "model" if tokenizer.chat_template else "tutorial"
    if name == "model":
        if not tokenizer.chat_template:
            raise ConfigError(
                f"data.template is model, but {tokenizer.folder} has no chat template; use {_listed(LAYOUTS)}"
            )
        return Template(name, tokenizer.chat_template, tokenizer)
    if name not in LAYOUTS:
        allowed = ["auto", "model", *LAYOUTS]
        near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"data.template is {name}; allowed are {_listed(allowed)}{hint}")
    layout = LAYOUTS[name]
    missing = [token for token in layout.needs if token not in tokenizer.special_tokens]
    if missing:
        raise ConfigError(
            f"data.template {name} needs the special token{'s' * (len(missing) > 1)} {_listed(missing, 'and')}, which "
            f"the tokenizer of {tokenizer.folder} does not have; use tutorial or alpaca"
        )
    return Template(name, _prefix(layout, tokenizer) + layout.source, tokenizer)


def _prefix(layout: Layout, tokenizer: Tokenizer) -> str:
    """Jinja that writes what the tokenizer puts before a text, unless the layout does so itself."""
    if layout.writes_bos or not tokenizer.prefix_ids:
        return ""
    if tokenizer.prefix_ids == (tokenizer.bos_id,):
        return "{{- bos_token -}}"
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    if not texts.keys() >= set(tokenizer.prefix_ids):
        raise ConfigError(f"{tokenizer.folder}: puts ids {tokenizer.prefix_ids} first, which are no special tokens")
    return "{{- " + json.dumps("".join(texts[i] for i in tokenizer.prefix_ids)) + " -}}"


def _answers(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message.role == "assistant"]


def _restore(pieces: list[_Piece], hidden: dict[int, str]) -> list[_Piece]:
    if not hidden:
        return pieces
    return [p if isinstance(p.part, int) else p._replace(part=p.part.translate(hidden)) for p in pieces]


def _join(row: Iterable[_Piece], ids: Mapping[tuple[str, bool], list[int]]) -> Encoded:
    joined: list[int] = []
    learn = bytearray()
    for part, learnt, at_start in row:
        if isinstance(part, int):
            joined.append(part)
            learn.append(learnt)
        else:
            piece = ids[part, at_start]
            joined += piece
            learn += bytes((learnt,)) * len(piece)
    return Encoded(joined, bytes(learn))


def _listed(names: Iterable[str], last: str = "or") -> str:
    items = list(names)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
