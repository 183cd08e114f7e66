"""`fitune chat`: a conversation in the terminal, answers streamed as they are written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from fitune.errors import ConfigError, FituneError
from fitune.infer.load import Conversation, Loaded

HELP = "commands: /reset forgets the conversation, /quit (or Ctrl-D) leaves, /help shows this"
RAW = "this run was trained on text: each line is continued as it stands, and nothing is remembered"


def chat(model: Loaded, system: str | None, sampling: Mapping[str, Any]) -> None:
    """Read prompts from standard input until it ends; Ctrl-C stops an answer, not the chat.

    Raises:
        ConfigError: a system message for a model that was trained on raw text.
    """
    if system and model.raw:
        raise ConfigError(f"--system: {RAW}")
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
        if model.raw:
            print(RAW)
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # line editing and history for input()
    opening = [{"role": "system", "content": system}] if system else []
    turns = list(opening)
    while True:
        try:
            said = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if said == "/quit":
            return
        if said == "/reset":
            turns = list(opening)
            continue
        if said.startswith("/"):
            print(HELP)
            continue
        if not said:
            continue
        turns.append({"role": "user", "content": said})
        try:
            answer = _answer(model, said if model.raw else turns, sampling)
        except FituneError as error:  # the conversation has outgrown the model, or its template refuses it
            if not interactive:
                raise
            print(f"fitune: {error}", file=sys.stderr)
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": answer})


def _answer(model: Loaded, prompt: Conversation, sampling: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    try:
        with contextlib.closing(model.stream(prompt, **sampling)) as answer:
            for piece in answer:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(pieces)
