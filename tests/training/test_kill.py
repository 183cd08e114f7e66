"""SIGKILL at random moments, some inside a save: every resume works and ends at the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).parent / "kill_server.py"


def kill(tiny, rows_file, workdir, kills):
    command = [sys.executable, str(SERVER), str(tiny), str(rows_file), str(workdir), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["failures"] == [], done.stderr[-2000:]
    assert result["kills"] == kills
    assert result["finished"] >= 1
    return result


@pytest.mark.slow
def test_killed_runs_end_like_the_uninterrupted_one(tiny, rows_file, tmp_path):
    result = kill(tiny, rows_file, tmp_path, 25)
    assert result["in_save"] >= 1


def test_hundred_kills(tiny, rows_file, tmp_path, request):
    """`make kill-test`."""
    if "hundred" not in (request.config.option.keyword or ""):
        pytest.skip("only by `make kill-test`")
    result = kill(tiny, rows_file, tmp_path, request.config.getoption("--kills"))
    assert result["in_save"] >= 5
