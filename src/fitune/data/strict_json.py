"""JSON decoding that refuses what Python's reader lets pass: duplicate keys, NaN, depth without end."""

from __future__ import annotations

import json
import re
from collections import Counter

MAX_DEPTH = 64
MAX_DIGITS = 400
MAX_FAULTS = 5

_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class _NotANumber:
    """Stands where NaN or Infinity was, until the field's name is known."""


class StrictDecoder:
    """Decodes one value after another and names what is wrong with each.

    Faults which leave the end of the value known (a duplicate key, NaN) are reported beside the value, so that
    reading a list can go on after them; only broken syntax raises json.JSONDecodeError.
    """

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._num_constants = 0
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def decode(self, text: str, start: int) -> tuple[object, int, str | None]:
        """Decode the value at `start`.

        Returns:
            The value, the position after it, and what is wrong with it, if anything.
        Raises:
            json.JSONDecodeError: broken syntax.
        """
        self._faults.clear()
        self._num_constants = 0
        value: object
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            value, end = None, end_of_value(text, start)
            self._faults.append(f"nested deeper than {MAX_DEPTH}")
        else:
            if self._num_constants:
                self._faults.append("NaN and Infinity are not JSON")
            if self._is_deep(text, start, end):
                self._faults.append(f"nested deeper than {MAX_DEPTH}")
        more = [f"{len(self._faults) - MAX_FAULTS:,} more problems"] if len(self._faults) > MAX_FAULTS else []
        return value, end, "; ".join(self._faults[:MAX_FAULTS] + more) or None

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            self._faults += [f"{key}: duplicate key" for key, count in counts.items() if count > 1]
        if self._num_constants:
            for key, item in pairs:
                if isinstance(item, _NotANumber):
                    self._faults.append(f"{key}: NaN and Infinity are not JSON")
                    self._num_constants -= 1
        return value

    def _constant(self, name: str) -> _NotANumber:
        self._num_constants += 1
        return _NotANumber()

    def _integer(self, digits: str) -> int:
        # Python refuses more than 4,300 digits with an error that has no position.
        if len(digits) > MAX_DIGITS:
            self._faults.append(f"a number of {len(digits):,} digits")
            return 0
        return int(digits)

    def _is_deep(self, text: str, start: int, end: int) -> bool:
        if text.count("{", start, end) + text.count("[", start, end) <= MAX_DEPTH:
            return False
        return _deepest(text, start, end)[0] > MAX_DEPTH


def end_of_value(text: str, start: int) -> int:
    """Find where the list or object at `start` ends, by matching brackets; the end of the text if it does not."""
    return _deepest(text, start, len(text))[1]


def _deepest(text: str, start: int, end: int) -> tuple[int, int]:
    depth = deepest = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text, start, end):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
            if depth == 0:
                return deepest, match.end()
    return deepest, end
