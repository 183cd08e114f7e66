"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the loop to stop after the current step; a second SIGINT stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)  # Windows has neither of the last two


class StopRequest:
    """Context manager that notes stop signals while it is active.

    `requested` is the name of the first signal, or None. Outside the main thread Python allows no handlers; then
    nothing is installed and `requested` stays None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in SIGNALS if not _by_nohup(number)]
            self._previous = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name


def _by_nohup(number: int) -> bool:
    """Ignored by whoever started us, so that a terminal may close."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
