"""Jinja as transformers sets it up for chat templates, so that a template means the same here and there.

Two differences: the `{% generation %}` tag passes its text through unmarked (answers are found from the prompt, see
templates.py), and `strftime_now` always tells the same day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fitune.errors import ConfigError, DataError

# The day that templates believe it is; the one Llama 3.1 has as its default. A run that is resumed another day, or
# a model that is served later, must see the ids it was trained with.
TODAY = datetime(2024, 7, 26)

Turn = Mapping[str, str]

# What a template of somebody else can raise while it renders, apart from jinja's own errors.
_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class Renderer:
    """One compiled chat template and the named tokens it may use."""

    def __init__(self, name: str, source: str, tokens: Mapping[str, str]) -> None:
        self._name = name
        environment = _environment()
        try:
            # What from_string does, but with the globals as one plain dict: rendering copies them each time.
            self._template = jinja2.Template.from_code(
                environment, environment.compile(source), {**environment.globals, **tokens}
            )
        except jinja2.TemplateError as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ConfigError(f"template {name}: is not valid jinja: {error}{line}") from error

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
            DataError: the template refuses these turns or fails on them.
        """
        try:
            return self._template.render(
                messages=list(turns),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _FAULTS as error:
            raise DataError(f"template {self._name} refuses the conversation: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which transformers uses to mark answers; jinja asks for a subclass."""

    tags = {"generation"}  # noqa: RUF012  (jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML characters, which are text here.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
