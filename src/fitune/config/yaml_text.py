"""YAML as configurations need it: plain mappings, lists, text, numbers, true, false, null; nothing that surprises.

YAML 1.1 reads `no` as false, `010` as 8, `1:30` as 90 and `2024-01-01` as a date. Here `true` and `false` are the only
booleans, `010` is refused and the others are text. Every mistake is a `ConfigError`.
"""

from __future__ import annotations

import io
import re
from typing import Any

import yaml

from fitune.errors import ConfigError

_TEXT_TAG = "tag:yaml.org,2002:str"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan"
)
# YAML 1.1 reads 1e-4 as text (it wants 1.0e-4); everybody writes 1e-4.
_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("!leading-zero", r"[-+]?0[0-9_]+", list("-+0")),
)


class _StrictLoader(yaml.SafeLoader):
    """No aliases (a billion laughs in 200 bytes), no tags, no duplicate keys, keys are text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - ours alone, filled below; PyYAML declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise ConfigError("YAML aliases (*name) are not allowed in a configuration; write the value out")
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"not valid YAML: tags ({event.tag:.60}) are not allowed here; write the plain value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            line = f"line {key_node.start_mark.line + 1}"
            if key_node.tag != _TEXT_TAG:
                raise ConfigError(f"{line}: a key must be text, not {_shown(key_node.value)}; quote it if it is meant")
            if key_node.value in keys:
                raise ConfigError(f"{line}: key `{key_node.value:.60}` is given twice; keep one")
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)

    def refuse_leading_zero(self, node: Any) -> None:
        raise ConfigError(
            f"line {node.start_mark.line + 1}: {node.value:.60} starts with 0, which YAML may read as an octal number; "
            "write the number without it, or quote it if it is text"
        )


for _tag, _pattern, _first in _RESOLVERS:
    _StrictLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
_StrictLoader.add_constructor("!leading-zero", _StrictLoader.refuse_leading_zero)


def parse(text: str) -> Any:
    """The value that `text` writes.

    Raises:
        ConfigError: no valid YAML, or YAML that configurations do not use.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML: {reason:.300}; quote text that has special characters") from error
    except RecursionError as error:
        raise ConfigError("not valid YAML: nested too deeply; a configuration has sections and keys") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        # Python refuses to convert thousands of digits (CVE-2020-10735).
        raise ConfigError("not valid YAML: a number has too many digits") from error


def render(tree: dict[str, Any]) -> str:
    """YAML that `parse` reads back to an equal tree of JSON values."""
    node = yaml.SafeDumper(io.StringIO(), sort_keys=False).represent_data(tree)
    _quote(node)
    return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True)


def _quote(node: Any) -> None:
    """PyYAML leaves text plain that only this module's rules read as a number (`1e4`, `08`): quote it."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _TEXT_TAG and any(re.fullmatch(pattern, node.value) for _, pattern, _ in _RESOLVERS):
            node.style = "'"
        return
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _quote(part)


def _shown(value: object) -> str:
    return f"`{value:.60}`" if isinstance(value, str) else "a list or mapping"
