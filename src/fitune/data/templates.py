"""Messages -> ids, with the tokens of the answers marked: the one layout of training and of inference.

A template is a jinja text, the model's own or one of `layouts.py`. What it writes is trusted and its special tokens
become ids; what stands in messages stays text, whatever it looks like. The ids of an answer always begin where the
ids of its prompt end, so that a model is asked with exactly the ids it was trained on.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from fitune.data.chatglm import TEMPLATE_NOTE, is_wrong_template, layout_of
from fitune.data.example import Message
from fitune.data.layouts import LAYOUTS, Layout, write_first
from fitune.data.render import Renderer
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, DataError

# Characters that mean nothing to anyone; they stand for special tokens in message contents while a template renders.
_PRIVATE = range(0xE000, 0xF900)

ROLES = ("system", "user", "assistant", "tool")
# What a turn may have beside its role and content, see `Message`.
_EXTRAS = ("instruction", "input", "metadata", "plain", "tools_json")


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
        name: model, or a key of LAYOUTS.
        source: the jinja text, complete with what comes before the first turn.
        hash: sha256 of the source.
        note: which template of the model is not used, and why; for people.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, note: str | None = None) -> None:
        if tokenizer.eos_id is None:
            raise ConfigError(
                f"{tokenizer.folder}: the tokenizer has no end-of-sequence token, so answers would never end; "
                "name one as eos_token in tokenizer_config.json"
            )
        self.name = name
        self.source = source
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self.note = note
        self._altered = self._led = 0  # answers
        self._tokenizer = tokenizer
        self._eos_id = tokenizer.eos_id
        self._end_ids = frozenset({*tokenizer.stop_ids, tokenizer.next_id} - {None})
        # An exported or converted folder carries a layout of ours as its own template.
        self._last_answer_only = any(
            layout.last_answer_only and source.strip().endswith(layout.source.strip()) for layout in LAYOUTS.values()
        )
        self._renderer = Renderer(name, source, tokenizer.named_tokens)

    def chat_template(self, tokenizer: Tokenizer | None = None) -> str:
        """The jinja text that an exported model carries.

        Args:
            tokenizer: the one to export with, if it is not the template's own.
        """
        return self.source if tokenizer is None else resolve_template(self.name, tokenizer).source

    @property
    def remarks(self) -> list[str]:
        """`note`, and what the model's own layout has done to the answers laid out so far; for people."""
        see = "`fitune data FILE --render` shows what is learnt"
        found = [self.note] if self.note else []
        if self._altered:
            found.append(
                f"the model's chat template leaves out or changes part of answers ({self._altered:,}), as some do with "
                f"thoughts of earlier turns, and that is not learnt: {see}"
            )
        if self._led:
            found.append(
                f"the model's chat template puts text in front of answers ({self._led:,}), as some do with an empty "
                f"thought in the last turn, and that is learnt: {see}"
            )
        return found

    def _compare(self, content: str, text: str) -> None:
        """Note what a layout of the model's own made of an answer; ours change nothing."""
        content = content.strip()
        if self.name == "model" and content:
            self._altered += content not in text
            self._led += content in text and not text.lstrip().startswith(content)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that ask for the next answer; what inference gives to the model.

        Raises:
            DataError: the template refuses these messages.
        """
        turns, hidden = self._turns(messages)
        text = self._renderer.render(turns, True)
        cuts = []
        for i in [] if self._last_answer_only else _answers(messages):
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

    def answer_text(self, ids: Sequence[int]) -> str:
        """What generated ids say: no special tokens, and not the white space with which the layout begins an answer.

        Several turns of the model's own in a row (a thought, then a call) are lines.
        """
        ends = [i for i, token in enumerate(ids) if token == self._tokenizer.next_id]
        turns = [self._tokenizer.decode(ids[start + 1 : end]) for start, end in pairwise([-1, *ends, len(ids)])]
        text = "\n".join(_without_lead(turn, self._lead) for turn in turns)
        if self._tokenizer.blank:  # as ChatGLM-6B's own code
            text = text.strip().replace("[[训练时间]]", "2023年")
        return text

    @cached_property
    def _lead(self) -> str:
        """White space that the layout writes between a prompt and the content of its answer."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": chr(_PRIVATE[0])}]
        try:
            prompt, whole = self._renderer.render(turns[:1], True), self._renderer.render(turns, False)
        except DataError:
            return ""
        lead = whole.removeprefix(prompt).partition(chr(_PRIVATE[0]))[0]
        return lead if whole.startswith(prompt) and lead.isspace() else ""

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
            if message.metadata and "metadata" not in self.source:
                other = set(LAYOUTS["chatglm3"].needs) <= self._tokenizer.special_tokens.keys()
                raise DataError(
                    f"template {self.name} has no place for metadata '{message.metadata:.60}'; leave it out"
                    f"{', or use data.template=chatglm3' if other else ', only ChatGLM3 has one'}"
                )
        extras = [{key: text for key in _EXTRAS if (text := getattr(m, key)) is not None} for m in messages]
        texts = [text for m, extra in zip(messages, extras, strict=True) for text in (m.content, *extra.values())]
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

        turns = [
            {"role": message.role, "content": hide(message.content), **{key: hide(text) for key, text in extra.items()}}
            for message, extra in zip(messages, extras, strict=True)
        ]
        return turns, {ord(character): token for token, character in shown.items()}

    def _lay_out(self, messages: Sequence[Message]) -> list[_Piece]:
        turns, hidden = self._turns(messages)
        full = self._renderer.render(turns, False)
        answers = _answers(messages)[-1 if self._last_answer_only else 0 :]
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
        self._check_blank(pieces)
        for number, start in enumerate(starts):
            last = number == len(starts) - 1
            text = full[start:] if last else full[start : starts[number + 1]]
            self._compare(turns[answers[number]]["content"], text)
            parts = self._tokenizer.split(text)
            end = self._first_special(parts)
            if end is None or parts[end] not in self._end_ids:
                parts, end = self._bounded(turns[: answers[number] + 1], full, (start, start + len(text)), last)
            pieces += [_Piece(part, i <= end, False) for i, part in enumerate(parts)]
        return _restore(pieces, hidden)

    def _check_blank(self, pieces: list[_Piece]) -> None:
        """ChatGLM-6B: what stands before sop is seen as a whole. Where sop ends the prompt, the blank's token gives it.

        So it is learnt, as in the published recipe, and what was trained is asked for with sop in the prompt.
        """
        blank = self._tokenizer.blank
        if blank is None:
            return
        if all(piece.part != blank.sop for piece in pieces):
            raise DataError(
                f"template {self.name}: writes no <sop> before the answer, so ChatGLM-6B would see the answer while it "
                "learns it; use data.template=chatglm"
            )
        if len(pieces) > 1 and pieces[-1].part == blank.sop:
            pieces[-1] = pieces[-1]._replace(learn=True)

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
        stop = next((i for i, part in enumerate(answer) if part in self._end_ids), None)
        if stop is not None:
            return answer + rest, stop
        if rest and rest[0] in self._end_ids:
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
        name: `model` (the tokenizer's own), a key of LAYOUTS, or `auto`: the model's own if there is one, else that of
            ChatGLM for its tokenizers, else tutorial.
    Raises:
        ConfigError: unknown name, no template in the model, special tokens missing, or no end-of-sequence token.
    """
    note = None
    if name == "auto":
        name, note = _automatic(tokenizer)
    if name == "model":
        if not tokenizer.chat_template:
            raise ConfigError(
                f"data.template is model, but {tokenizer.folder} has no chat template; use {_listed(LAYOUTS)}"
            )
        return Template(name, tokenizer.chat_template, tokenizer, tokenizer.note)
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
    return Template(name, _prefix(layout, tokenizer) + layout.source, tokenizer, note)


def _automatic(tokenizer: Tokenizer) -> tuple[str, str | None]:
    """The name that `auto` stands for, and what to say about it."""
    chatglm = layout_of(tokenizer.special_tokens)
    own = tokenizer.chat_template
    if own and not (chatglm and is_wrong_template(own)):
        return "model", None
    return chatglm or "tutorial", TEMPLATE_NOTE if own else None


def _prefix(layout: Layout, tokenizer: Tokenizer) -> str:
    """Jinja that writes what stands before the first turn, unless the layout does so itself."""
    ids = tokenizer.prefix_ids
    if layout.first:
        start = tokenizer.special_tokens[layout.first]
        ids = (start, start + 2)
    if layout.writes_bos or not ids:
        return ""
    if ids == (tokenizer.bos_id,):
        return "{{- bos_token -}}"
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    if not texts.keys() >= set(ids):
        raise ConfigError(f"{tokenizer.folder}: ids {ids} should stand first, but they are not all special tokens")
    return write_first([texts[i] for i in ids])


def _answers(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message.role == "assistant"]


def _without_lead(text: str, lead: str) -> str:
    """A text without as much of `lead` as it begins with: while an answer is written, that may be a part."""
    for character in lead:
        if not text.startswith(character):
            break
        text = text[1:]
    return text


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
