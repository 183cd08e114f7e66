"""Family x method x precision x checkpointing: each cell runs as the checks of the library say, or is refused."""

from pathlib import Path

import pytest

from fitune.config import build
from fitune.errors import ConfigError
from fitune.plan.arch import read_arch
from fitune.plan.memory import plan_memory
from matrix.cells import CELLS, docs_page, expected, pairs, pairwise_cover
from matrix.folders import CONFIGS
from matrix.run_cell import run_cell

pytest.importorskip("sentencepiece")


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = CELLS if metafunc.config.getoption("--cells") == "all" else pairwise_cover()
        metafunc.parametrize("cell", cells, ids=str)


def test_a_cell(cell, models, four_rows, tmp_path, record_property, pytestconfig):
    outcome = run_cell(cell, models[cell.family], four_rows, tmp_path, pytestconfig.getoption("--cells-on"))
    record_property("cell", outcome.as_row(cell))
    path, reason = expected(cell)
    assert (outcome.status, outcome.reason) == ("refused" if reason else "trained", reason)
    assert outcome.path == path


def test_the_cover_holds_every_pair():
    cover, possible = pairwise_cover(), [cell for cell in CELLS if expected(cell).reason is None]
    assert len(cover) < len(CELLS) / 5
    assert set().union(*map(pairs, possible)) == set().union(*(pairs(c) for c in cover if c in possible))
    refusals = {(cell.family, cell.method) for cell in CELLS if expected(cell).reason is not None}
    assert refusals == {(cell.family, cell.method) for cell in cover if expected(cell).reason is not None}


def test_the_plan_says_the_same():
    """`fitune plan` of each cell: the same path, or the same refusal."""
    for cell in CELLS:
        arch, path, reason = read_arch(CONFIGS[cell.family]), *expected(cell)
        try:
            plan = plan_memory(arch, build(cell.tree(Path("m"), Path("rows.jsonl"), Path("run"))), "no data")
            said = "fast" if plan.plain_reason is None else "plain"
        except ConfigError as error:
            said = str(error)
        assert said == (path if reason is None else reason), cell


def test_the_docs_page_is_current():
    page = Path(__file__).parent.parent.parent / "docs" / "matrix.md"
    assert page.read_text(encoding="utf-8") == docs_page(), "run `make docs`"
