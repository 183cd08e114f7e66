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
    assert "| `method.r` | whole number above 0 up to 65,536 | `8` |" in as_markdown()


def test_values_and_defaults_are_words():
    page = as_markdown()
    assert "| `train.max_steps` | whole number above 0 | `none` |" in page
    assert "| `method.dropout` | number from 0 to below 1 | `0.0` |" in page
    assert "| `train.max_grad_norm` | number from 0 up | `1.0` |" in page
    assert "| `model.path` | text | required |" in page
    assert "model.path (text; required)" in as_text()
    for text in (page, as_text()):
        assert not any(words in text for words in ("Annotated", "typing", "or none", "default required", "<class"))


def test_schema_is_json():
    assert json.loads(as_schema())["additionalProperties"] is False


def test_the_docs_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == as_markdown(), "run `make docs`"


def test_examples_load():
    for file in sorted((ROOT / "examples").rglob("*.yaml")):
        assert load(file).output.dir == f"runs/{file.stem}"
