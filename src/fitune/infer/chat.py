"""`fitune chat`: a conversation in the terminal, answers streamed as they are written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping

from fitune.infer.load import Loaded

HELP = "commands: /reset forgets the conversation, /quit (or Ctrl-D) leaves"


def chat(model: Loaded, system: str | None, sampling: Mapping[str, int | float | None]) -> None:
    """Read prompts from standard input until it ends; Ctrl-C stops an answer, not the chat."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
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
        if not said:
            continue
        turns.append({"role": "user", "content": said})
        answer = _answer(model, turns, sampling)
        turns.append({"role": "assistant", "content": answer})


def _answer(model: Loaded, turns: list[dict[str, str]], sampling: Mapping[str, int | float | None]) -> str:
    pieces: list[str] = []
    try:
        for piece in model.stream(turns, **sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(pieces)
