"""Each case of cases.py through the command line: exit code, message, no traceback; docs/errors.md is current."""

import re
from pathlib import Path

import pytest

from cases import CASES, Case, Place
from fitune.cli import main
from fitune.config import build
from fitune.training import run
from make_docs import _cell as shown_in_docs

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "errors.md"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny):
    """A finished tiny run that cases copy."""
    place = Place(tmp_path_factory.mktemp("errors"), tiny, tiny)
    tree = {
        "model": {"path": str(tiny), "dtype": "fp32"},
        "data": {"train": [place.rows(*[{"instruction": "say", "output": "x" * i} for i in range(1, 9)])]},
        "train": {"max_steps": 2, "save_every_steps": 1, "device": "cpu"},
        "output": {"dir": str(place.folder / "run")},
    }
    tree["data"] |= {"template": "tutorial", "max_length": 64}
    return run.train(build(tree), quiet=True).run


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.what}" for case in CASES])
def test_each_mistake_is_explained(case: Case, tiny, finished, tmp_path, capsys):
    arguments = case.build(Place(tmp_path, tiny, finished))
    code = main(arguments)
    shown = capsys.readouterr()
    assert code == case.code, shown.err
    assert case.says in shown.err + shown.out
    assert "Traceback" not in shown.err
    said = shown.err or next(line for line in shown.out.splitlines() if case.says in line)
    row = f"| {case.what} | {code} | {shown_in_docs(said, tmp_path.parent)} |\n"
    row = row.partition("<br>")[0]  # which of its files are damaged how is the run's own
    assert without_folders(row) in without_folders(PAGE.read_text(encoding="utf-8")), "run `make docs`"
    if arguments[0] == "train" and "already" not in case.what:
        assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def without_folders(text):
    """Where a case stands differs, and transformers' version; what is said of it does not."""
    text = re.sub(r"transformers \d+\.\d+\.\d+", "transformers", text)
    return re.sub(r"[\w./&-]*\.\.\.[\w./&-]*", "...", text)


def test_the_page_lists_every_case():
    page = PAGE.read_text(encoding="utf-8")
    for case in CASES:
        assert f"| {case.what} |" in page, "run `make docs`"
