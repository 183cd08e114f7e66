"""Write the generated pages of docs/: run by `make docs`, checked by the suite."""

from __future__ import annotations

from pathlib import Path

from fitune.config.reference import as_markdown

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Write every generated page."""
    (DOCS / "configuration.md").write_text(as_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
