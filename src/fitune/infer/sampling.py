"""How the next token is chosen: checked values, no torch, so that the command line refuses a bad one at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fitune.errors import ConfigError

MIN_TEMPERATURE = 1e-5  # below it, logits divided by the temperature overflow; 0 is greedy and fine


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: stop after so many, even without an end-of-sequence token.
        temperature: 0 is greedy.
        top_p: nucleus sampling, arXiv:1904.09751; 1 keeps all tokens.
        repetition_penalty: above 1 makes tokens already written less likely.
        seed: of the sampling; None leaves the global generator alone.

    Raises:
        ConfigError: a value is not allowed.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        seed, temperature = self.seed, self.temperature
        self._check("max_new_tokens", _whole(self.max_new_tokens) and self.max_new_tokens >= 1, "1 or more, whole")
        self._check(
            "temperature",
            _finite(temperature) and (temperature == 0 or temperature >= MIN_TEMPERATURE),
            f"0 (greedy), or {MIN_TEMPERATURE:g} and more",
        )
        self._check("top_p", _finite(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1")
        self._check("repetition_penalty", _finite(self.repetition_penalty) and self.repetition_penalty > 0, "above 0")
        self._check("seed", seed is None or (_whole(seed) and 0 <= seed < 2**63), "0 to 2**63 - 1, whole, or none")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            option = name.replace("_", "-")
            raise ConfigError(f"{name} (--{option}) is {getattr(self, name)!r}; allowed: {allowed}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Sampling:
        """Make one from keyword arguments.

        Raises:
            ConfigError: an unknown name, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        odd = sorted(set(given) - set(known))
        if odd:
            raise ConfigError(f"unknown argument {', '.join(odd)}; allowed: {', '.join(known)}, raw")
        return cls(**given)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
