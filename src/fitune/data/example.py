"""What a data file is made of: messages, examples, and the rows that cannot be used.

The vocabulary of this room; `sources.py` makes these from files, `templates.py` turns messages into ids.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field

MAX_RAW_CHARACTERS = 2000
MAX_REASON_CHARACTERS = 1000

# A quoted name as group 1, or a number that is no part of a word (llama3, UTF-8) or of a setting.
_VARIES = re.compile(r"((?<!\w)'[^']*'(?!\w))|(?<![\w=.-])\d+(?:,\d{3})*")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: system, user, assistant or tool.
        content: the whole text of the turn.
        instruction: on a user turn from an alpaca row, its `instruction`; `input` likewise. The alpaca template
            lays the two out apart, every other template uses `content`.
        metadata: on an assistant turn of ChatGLM3, the name of the tool that it calls.
        plain: on a system turn with tools, its own text, and the tools in `tools_json`. ChatGLM3 lays the two out
            apart, every other template uses `content`.
    """

    role: str
    content: str
    instruction: str | None = None
    input: str | None = None
    metadata: str | None = None
    plain: str | None = None
    tools_json: str | None = None


def system_turn(text: str, tools: str) -> Message:
    """A system turn that offers tools, described by a JSON text or in other words."""
    described = f"You have access to these tools:\n{tools}"
    content = f"{text}\n\n{described}" if text.strip() else described
    return Message("system", content, plain=text if text.strip() else "", tools_json=_indented(tools))


def _indented(listed: str) -> str:
    with suppress(ValueError, RecursionError):  # tools may be described in any words
        return json.dumps(json.loads(listed), indent=4, ensure_ascii=False)
    return listed


@dataclass(frozen=True, slots=True)
class Example:
    """One good row: either a conversation or a raw text, where it stands, and as which JSON."""

    file: str
    line: int
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    raw: str = field(default="", compare=False, repr=False)

    @property
    def source(self) -> str:
        """The row as messages name it, `file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and every reason why.

    Args:
        reason: `field: reason`, several joined with `; `.
        raw: the row's own JSON, ready to be repaired; of what could not be read, the first MAX_RAW_CHARACTERS.
    """

    file: str
    line: int
    reason: str
    raw: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"

    @property
    def kind(self) -> str:
        """The reason without positions and counts, for counting; quoted names and settings (max_length=512) stay."""
        return _VARIES.sub(lambda match: match[1] or "N", self.reason)


def clean(text: str, limit: int = MAX_REASON_CHARACTERS) -> str:
    """Text from a file made safe for one line of a terminal: control characters and surrogates become `?`."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def writable(raw: str) -> str:
    """A row's text with unpaired surrogates as `?`, so that it can be written."""
    return raw if raw.isascii() else raw.encode("utf-8", "replace").decode("utf-8")


def cap(raw: str) -> str:
    """Shorten a text that is no row, so that a broken file is not kept whole beside its reason."""
    return writable(raw[:MAX_RAW_CHARACTERS])
