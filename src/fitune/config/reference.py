"""The settings as people read them: terminal list, docs page and JSON schema, all made from schema.py."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fitune.config.fields import MANY
from fitune.config.methods import METHODS
from fitune.config.schema import RunConfig

REQUIRED = "required"


def as_schema() -> str:
    """JSON schema of the whole configuration."""
    return json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False)


def as_text() -> str:
    """One paragraph per setting, for the terminal."""
    lines = []
    for title, fields in _sections():
        lines.append(f"{title}:")
        lines += [
            f"  {key} ({kind}; {default if default == REQUIRED else f'default {default}'})\n      {text}"
            for key, kind, default, text in fields
        ]
    return "\n".join(lines)


def as_markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from `src/fitune/config/schema.py` by `make docs`. YAML file, `section.key=value` on the command",
        "line, `fitune.train({...})` in Python: the same keys. An unknown key is an error. Default `none`: the key may",
        "be unset (`null` in YAML), and its meaning says what happens then.",
    ]
    for title, fields in _sections():
        lines += ["", f"## {title}", "", "| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key}` | {kind} | {default if default == REQUIRED else f'`{default}`'} | {text} |"
            for key, kind, default, text in fields
        ]
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
        yield f"{section}.{key}", _kind(field.annotation, field.metadata), _default(field), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return REQUIRED
    return "none" if field.default is None else json.dumps(field.default)


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _kind(inner, [*metadata, *more])
    if origin is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):  # the default column says whether a key may be unset
        return " or ".join(_kind(part, metadata) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return "list of text"
    if annotation in (int, float):
        return ("whole number" if annotation is int else "number") + _range(metadata)
    return {str: "text", bool: "true, false"}.get(annotation, str(annotation))


def _range(metadata: Sequence[Any]) -> str:
    """` above 0`, ` from 0 to below 1`, ...: the bounds as words."""
    bounds: dict[str, float] = {}
    for item in metadata:
        for name in ("gt", "ge", "lt", "le"):
            # A whole Field(...) carries its bounds one level down.
            for carrier in (item, *getattr(item, "metadata", ())):
                if getattr(carrier, name, None) is not None:
                    bounds[name] = getattr(carrier, name)
    if bounds.get("le") == MANY:
        del bounds["le"]  # a guard against slips, nothing to know
    words = {name: f"{value:,.0f}" if value == int(value) else f"{value:g}" for name, value in bounds.items()}
    low = f" above {words['gt']}" if "gt" in words else f" from {words['ge']}" if "ge" in words else ""
    if "le" in words:
        return f"{low}{' up' if 'gt' in words else ''} to {words['le']}"
    return f"{low} to below {words['lt']}" if "lt" in words else low + (" up" if "ge" in words else "")
