"""What every section of the configuration is made of: closed frozen models, numbers that are no booleans, paths."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Far above any real run: a slip of the finger must not hang or allocate.
MANY = 10**9


def no_boolean(value: object) -> object:
    """Pydantic alone would read true as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Whole = Annotated[int, BeforeValidator(no_boolean)]
Number = Annotated[float, BeforeValidator(no_boolean)]
Switch = Annotated[bool, Field(strict=True)]  # else `yes` and 1 pass for true


class Section(BaseModel):
    """A closed, immutable group of settings: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def check_path(value: str) -> str:
    """Refuse what no file system can hold, before anything fails on it halfway."""
    if not value.strip():
        raise ValueError("a path cannot be empty")
    if any(ord(character) < 32 for character in value):
        raise ValueError("a path cannot hold control characters")
    if any(0xD800 <= ord(character) < 0xE000 for character in value):
        raise ValueError("a path must be valid Unicode")
    if len(value.encode()) > 4000 or any(len(part.encode()) > 255 for part in value.split(os.sep)):
        raise ValueError("a path can have 4000 bytes, and 255 between two slashes")
    return value


def check_files(value: object, also: str = "") -> object:
    """One file or several, each with a possible name."""
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"give a file, a list of files{also}")
    return tuple(check_path(file) for file in files)
