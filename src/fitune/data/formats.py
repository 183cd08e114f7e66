"""Row formats: which one an object is in, and its checked translation into messages or text.

Every check adds `field: reason` to a list instead of stopping, so that a row is reported with all that is wrong.
To add a format: one function here, one row in FORMATS, the name in config's DataConfig.format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fitune.data.example import Message, system_turn
from fitune.data.scan import describe

Row = Mapping[str, object]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "developer": "system",
}

MAX_TURNS = 1000  # a template is rendered once per answer, so the work grows with the square

# What may follow a role; None is the beginning of the conversation.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

_TURNS = frozenset({"messages", "conversations"})
_PAIR = frozenset({"prompt", "completion"})

# Keys of a turn that would change what it means and have no place in a Message.
_CALL_KEYS = ("tool_calls", "function_call")


class Parsed(NamedTuple):
    """What a row says; meaningless if it has problems."""

    messages: tuple[Message, ...] | None
    text: str | None


def recognise(row: Row) -> str | None:
    """Name the format of a row by its keys, None if it is none of ours."""
    if "messages" in row or "conversations" in row:
        return "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "messages"
    return "text" if "text" in row else None


def parse(row: Row, name: str, problems: list[str]) -> Parsed:
    """Translate a row of format `name`; what is wrong with it is appended to `problems`."""
    return FORMATS[name].parse(row, problems)


def _alpaca(row: Row, problems: list[str]) -> Parsed:
    instruction = _filled(row, "instruction", "empty", problems)
    given = _optional(row, "input", problems) or ""
    output = _filled(row, "output", "empty answer", problems)
    turns = _system(row, problems)
    turns += _history(row, problems)
    turns.append(Message("user", f"{instruction}\n{given}".strip(), instruction, given))
    turns.append(Message("assistant", output))
    return Parsed(tuple(turns), None)


def _history(row: Row, problems: list[str]) -> list[Message]:
    history = row.get("history")
    if history is None:
        return []
    if not isinstance(history, list):
        problems.append(f"history: must be a list of [user, assistant] pairs, got {describe(history)}")
        return []
    turns = []
    if len(history) > MAX_TURNS // 2:
        problems.append(f"history: {len(history):,} pairs; at most {MAX_TURNS // 2:,}")
        return []
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            problems.append(f"history[{i}]: must be a pair [user, assistant]")
            continue
        turns.append(Message("user", _check_filled(f"history[{i}][0]", pair[0], "empty", problems)))
        turns.append(Message("assistant", _check_filled(f"history[{i}][1]", pair[1], "empty answer", problems)))
    return turns


def _messages(row: Row, problems: list[str]) -> Parsed:
    if "messages" in row and "conversations" in row:
        problems.append("messages: stands beside conversations; only one of them is allowed")
    if row.keys() & _PAIR and not row.keys() & _TURNS:
        return _prompt_completion(row, problems)
    key = "messages" if "messages" in row else "conversations"
    turns = row.get(key)
    if key not in row:
        problems.append("messages: missing")
    turns = _turn_list(key, turns, problems) if key in row else []
    messages = _system(row, problems)
    outside = len(messages)
    messages += [_turn(f"{key}[{i}]", turn, problems) for i, turn in enumerate(turns)]
    outside = _join_tools(row, messages, outside)
    if all(message.role for message in messages[outside:]):
        _check_order([f"{key}[{i}]" for i in range(len(turns))] or [key], messages, outside, problems)
    return Parsed(tuple(messages), None)


def _turn_list(key: str, turns: object, problems: list[str]) -> list[object]:
    if not isinstance(turns, list):
        problems.append(f"{key}: must be a list of turns, got {describe(turns)}")
        return []
    if not turns:
        problems.append(f"{key}: empty")
    elif len(turns) > MAX_TURNS:
        problems.append(f"{key}: {len(turns):,} turns; at most {MAX_TURNS:,}")
        return []
    return turns


def _prompt_completion(row: Row, problems: list[str]) -> Parsed:
    """TRL's pair: two texts, or two lists of turns which together are the conversation."""
    messages = _system(row, problems)
    outside = len(messages)
    names = []
    for key, role, empty in (("prompt", "user", "empty"), ("completion", "assistant", "empty answer")):
        value = row.get(key)
        if isinstance(value, list):
            turns = _turn_list(key, value, problems)
            messages += [_turn(f"{key}[{i}]", turn, problems) for i, turn in enumerate(turns)]
            names += [f"{key}[{i}]" for i in range(len(turns))]
        else:
            messages.append(Message(role, _filled(row, key, empty, problems)))
            names.append(key)
    outside = _join_tools(row, messages, outside)
    if names and all(message.role for message in messages[outside:]):
        _check_order(names, messages, outside, problems)
    return Parsed(tuple(messages), None)


def _turn(name: str, turn: object, problems: list[str]) -> Message:
    if not isinstance(turn, dict):
        problems.append(f"{name}: must be an object, got {describe(turn)}")
        return Message("", "")
    role_key, text_key = ("from", "value") if turn.keys() & {"from", "value"} else ("role", "content")
    spelled = turn.get(role_key)
    role = ROLES.get(spelled, "") if isinstance(spelled, str) else ""
    if role_key not in turn:
        problems.append(f"{name}.{role_key}: missing")
    elif not role:
        given = f"'{spelled}'" if isinstance(spelled, str) else describe(spelled)
        problems.append(f"{name}.{role_key}: unknown role {given}; known are {', '.join(ROLES)}")
    for key in _CALL_KEYS:
        if turn.get(key):
            problems.append(f"{name}.{key}: not supported; write the call into {text_key}")
    if turn.get("weight") in (0, False) and "weight" in turn:
        problems.append(f"{name}.weight: 0 is not supported; every answer is learnt")
    where = f"{name}.{text_key}"
    if text_key not in turn:
        problems.append(f"{where}: missing")
        return Message(role, "")
    num_problems = len(problems)
    content = _joined(where, turn[text_key], problems)
    if len(problems) > num_problems:
        return Message(role, "")
    if role in ("user", "assistant"):
        empty = "empty answer" if role == "assistant" else "empty"
        metadata = _metadata(name, role, turn, problems)
        return Message(role, _check_filled(where, content, empty, problems), metadata=metadata)
    return Message(role, _check_text(where, content, problems))


def _metadata(name: str, role: str, turn: Row, problems: list[str]) -> str | None:
    """ChatGLM3's name of the called tool; it stands on a line of its own before the call."""
    value = turn.get("metadata")
    if role != "assistant" or value in (None, ""):
        return None
    text = _check_text(f"{name}.metadata", value, problems)
    if "\n" in text:
        problems.append(f"{name}.metadata: must be one line")
    return text


def _joined(name: str, content: object, problems: list[str]) -> object:
    """OpenAI's list of text parts as one text; what is no list is handed back."""
    if not isinstance(content, list):
        return content
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else None
            got = f"type '{kind}'" if isinstance(kind, str) and kind != "text" else "another shape"
            problems.append(f'{name}[{i}]: must be {{"type": "text", "text": ...}}, got {got}')
    return "".join(texts)


def _check_order(names: list[str], messages: list[Message], outside: int, problems: list[str]) -> None:
    before: str | None = None
    for i, message in enumerate(messages):
        again = before == message.role == "assistant" and message.metadata  # a thought, then the call of a tool
        if message.role not in _NEXT[before] and not again:
            after = f"after {before}" if before else "at the beginning"
            where = names[i - outside] if i >= outside else "system"
            problems.append(f"{where}: {message.role} {after}; expected {' or '.join(_NEXT[before])}")
            return
        before = message.role
    if before in ("user", "tool"):
        problems.append(f"{names[-1]}: the last turn is {before}; expected assistant")
    elif before == "system":
        problems.append(f"{names[-1].partition('[')[0]}: only a system turn")


def _system(row: Row, problems: list[str]) -> list[Message]:
    """The `system` key, with the row's tools written after it, as a message."""
    system = _optional(row, "system", problems) or ""
    tools = _tools(row, problems)
    if tools:
        return [system_turn(system, tools)]
    return [Message("system", system)] if system.strip() else []


def _tools(row: Row, problems: list[str]) -> str:
    tools = row.get("tools")
    if isinstance(tools, list):
        tools = json.dumps(tools, ensure_ascii=False) if tools else ""
    if tools is not None and not isinstance(tools, str):
        problems.append(f"tools: must be text or a list, got {describe(tools)}")
    elif tools and tools.strip() not in ("", "[]"):
        return _check_text("tools", tools, problems)
    return ""


def _join_tools(row: Row, messages: list[Message], outside: int) -> int:
    """Put a row's tools into the system turn that its conversation begins with; how many messages stand outside now."""
    if outside and messages[0].plain == "" and len(messages) > 1 and messages[1].role == "system":
        messages[:2] = [system_turn(messages[1].content, _tools(row, []))]
        return 0
    return outside


def _text(row: Row, problems: list[str]) -> Parsed:
    return Parsed(None, _filled(row, "text", "empty", problems))


def _filled(row: Row, key: str, empty: str, problems: list[str]) -> str:
    if key not in row:
        problems.append(f"{key}: missing")
        return ""
    return _check_filled(key, row[key], empty, problems)


def _optional(row: Row, key: str, problems: list[str]) -> str | None:
    value = row.get(key)
    return None if value is None else _check_text(key, value, problems)


def _check_filled(name: str, value: object, empty: str, problems: list[str]) -> str:
    text = _check_text(name, value, problems)
    if isinstance(value, str) and not text.strip():
        problems.append(f"{name}: {empty}")
    return text


def _check_text(name: str, value: object, problems: list[str]) -> str:
    if not isinstance(value, str):
        problems.append(f"{name}: must be text, got {describe(value)}")
        return ""
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            problems.append(f"{name}: an unpaired surrogate, which is no character")
    return value


class Format(NamedTuple):
    """A row format: how to read it, the keys it knows, and how to say so."""

    parse: Callable[[Row, list[str]], Parsed]
    keys: frozenset[str]


FORMATS = {
    "alpaca": Format(_alpaca, frozenset({"instruction", "input", "output", "system", "history", "tools"})),
    "messages": Format(_messages, _TURNS | _PAIR | {"system", "tools"}),
    "text": Format(_text, frozenset({"text"})),
}

# Keys of which at least one stands in every row of a format.
MARKS = {"alpaca": frozenset({"instruction", "output"}), "messages": _TURNS | _PAIR, "text": frozenset({"text"})}


def unused_keys(row: Row, name: str) -> list[str]:
    """Keys of a row that say nothing in format `name`; a prompt beside messages repeats their first turn."""
    known = FORMATS[name].keys - (_PAIR if row.keys() & _TURNS else frozenset())
    return [key for key in row if key not in known]
