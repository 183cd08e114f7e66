"""Everything generated from the schema is complete and up to date."""

import json
from pathlib import Path

from fitune.config.load import every_key, load
from fitune.config.reference import as_markdown, as_schema, as_text

ROOT = Path(__file__).parent.parent.parent


def test_every_key_is_described():
    for text in (as_text(), as_markdown()):
        for key in every_key():
            assert key in text
    assert "| `method.r` | whole number | `8` |" in as_markdown()


def test_schema_is_json():
    assert json.loads(as_schema())["additionalProperties"] is False


def test_the_docs_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == as_markdown(), "run `make docs`"


def test_examples_load():
    for file in sorted((ROOT / "examples").glob("*.yaml")):
        assert load(file).output.dir == f"runs/{file.stem}"
