"""The settings as people read them: terminal list, docs page and JSON schema, all made from schema.py."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fitune.config.load import METHODS
from fitune.config.schema import RunConfig


def as_schema() -> str:
    """JSON schema of the whole configuration."""
    return json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False)


def as_text() -> str:
    """One paragraph per setting, for the terminal."""
    lines = []
    for title, fields in _sections():
        lines.append(f"{title}:")
        lines += [f"  {key} ({kind}; default {default})\n      {text}" for key, kind, default, text in fields]
    return "\n".join(lines)


def as_markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from `src/fitune/config/schema.py` by `make docs`. YAML file, `section.key=value` on the command",
        "line, `fitune.train({...})` in Python: the same keys. An unknown key is an error.",
    ]
    for title, fields in _sections():
        lines += ["", f"## {title}", "", "| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {kind} | `{default}` | {text} |" for key, kind, default, text in fields]
    return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    for section, field in RunConfig.model_fields.items():
        if section == "method":
            for name, model in METHODS.items():
                yield f"method (name: {name})", list(_fields(section, model))
        else:
            yield section, list(_fields(section, cast(type[BaseModel], field.annotation)))


def _fields(section: str, model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    for key, field in model.model_fields.items():
        yield f"{section}.{key}", _kind(field.annotation), _default(field), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "none" if field.default is None else json.dumps(field.default)


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if annotation is type(None):
        return "none"
    if origin is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if origin is tuple:
        return "list of text"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return names.get(annotation, str(annotation))
