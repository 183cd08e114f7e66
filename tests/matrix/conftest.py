"""Model folders of the families, rows that they learn, and the table of outcomes after `make matrix`."""

import json

import pytest

from matrix.cells import CELLS
from matrix.folders import CONFIGS, make_folder
from matrix.results import write_page


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Family -> model folder."""
    root = tmp_path_factory.mktemp("matrix")
    return {family: make_folder(root / family.replace(" ", "-"), family) for family in CONFIGS}


@pytest.fixture(scope="session")
def four_rows(tmp_path_factory):
    """Rows of varied length."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"say {i}", "output": "春山" * (1 + i % 3) + str(i)} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pytest_terminal_summary(terminalreporter, config):
    """Write docs/results/matrix.md when all cells were run, well or not."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    on_cpu = config.getoption("--cells-on") == "cpu"  # as the page says
    if on_cpu and sum("::test_a_cell[" in report.nodeid for report in reports) == len(CELLS):
        terminalreporter.write_line(write_page(terminalreporter.stats, config.rootpath))
