"""Run folders: made whole or not at all, one writer, every change survives a kill and a full disk."""

import errno
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults import every_failure, every_kill, fail_at, failing, in_child, names_in, touching
from fitune.errors import CheckpointError, ConfigError, MissingDependencyError
from fitune.training.run_folder import RunFolder

HOLD = """
import sys, time
from fitune.training.run_folder import RunFolder
with RunFolder.open(sys.argv[1]).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no test pulls the plug, and a real one takes milliseconds


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "runs" / "x", "seed: 0\n")


@pytest.fixture
def fresh(tmp_path):
    """A function that makes a new empty place each time."""
    count = itertools.count()

    def make() -> Path:
        place = tmp_path / f"place{next(count)}"
        place.mkdir()
        return place

    return make


@pytest.fixture
def holder(folder):
    """Another process that has the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


# Making and finding


def test_create_makes_the_whole_folder(folder, tmp_path):
    assert folder.path == tmp_path / "runs" / "x"
    assert folder.config_text() == "seed: 0\n"
    assert sorted(os.listdir(folder.path)) == ["checkpoints", "config.yaml", "run.lock"]
    assert names_in(folder.path.parent) == []
    assert RunFolder.open(str(folder.path)) == folder


def test_names_of_parts(folder):
    parts = [folder.checkpoints, folder.adapter, folder.model, folder.metrics]
    parts += [folder.rejected, folder.samples, folder.result, folder.report]
    names = "checkpoints adapter model metrics.jsonl rejected.jsonl samples.json result.json report.html"
    assert [str(part.relative_to(folder.path)) for part in parts] == names.split()


def test_an_existing_run_is_refused_and_unchanged(folder):
    for refuse in (lambda: RunFolder.create(folder.path, "seed: 1\n"), lambda: RunFolder.check_free(folder.path)):
        with pytest.raises(ConfigError, match=r"already holds a run; continue it with `fitune resume .*x`, choose"):
            refuse()
    assert folder.config_text() == "seed: 0\n"


def test_an_empty_folder_is_used(tmp_path):
    assert RunFolder.create(tmp_path, "seed: 2\n").config_text() == "seed: 2\n"


@pytest.mark.parametrize("replace", [False, True])
def test_folders_of_other_people_are_refused(tmp_path, replace):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no fitune run"):
        RunFolder.create(tmp_path, "", replace=replace)
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.create(tmp_path / "notes.txt", "", replace=replace)
    (tmp_path / "config.yaml").write_text("of another program")
    with pytest.raises(ConfigError, match=r"no run.lock" if replace else "already holds a run"):
        RunFolder.create(tmp_path, "", replace=replace)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_replace_removes_the_old_run(folder):
    folder.append_metrics({"step": 1})
    new = RunFolder.create(folder.path, "seed: 1\n", replace=True)
    assert new.config_text() == "seed: 1\n"
    assert new.read_metrics() == []
    assert names_in(folder.path.parent) == []
    RunFolder.create(folder.path.parent / "y", "seed: 1\n", replace=True)


def test_replace_refuses_a_live_run(folder, holder):
    with pytest.raises(CheckpointError, match=f"in use by process {holder.pid}"):
        RunFolder.create(folder.path, "seed: 1\n", replace=True)
    assert folder.config_text() == "seed: 0\n"


def test_a_link_as_output_folder_puts_the_run_where_it_points(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "big")
    made = RunFolder.create(tmp_path / "x", "seed: 0\n")
    assert (tmp_path / "x").is_symlink()
    assert RunFolder.open(tmp_path / "x") == made
    assert (tmp_path / "big" / "config.yaml").is_file()


def test_open_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder: not found"):
        RunFolder.open(tmp_path / "nothing" / "here")
    with pytest.raises(CheckpointError, match=r"no run folder: it has no config.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no run folder: it is a file"):
        RunFolder.open(tmp_path / "file")


# Preflight


def test_check_free_leaves_nothing_behind(tmp_path):
    RunFolder.check_free(tmp_path / "a" / "b", need_bytes=1000)
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_said_first(tmp_path, folder):
    text = r"disk: .*the disk is full; about 1,125,899,906,842,624 bytes .*needed, [\d,]+ bytes .*free; free some space"
    for refuse in (
        lambda: RunFolder.create(tmp_path / "a" / "b", "", need_bytes=2**50),
        lambda: RunFolder.check_free(tmp_path / "a", need_bytes=2**50),
        lambda: RunFolder.open(folder.path, for_writing=True, need_bytes=2**50),
    ):
        with pytest.raises(CheckpointError, match=text):
            refuse()
    assert os.listdir(tmp_path) == ["runs"]
    assert RunFolder.open(folder.path, for_writing=True, need_bytes=1000) == folder


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"disk: .*a part of this path is a file"):
        RunFolder.create(tmp_path / "file" / "deep" / "x", "")


@pytest.mark.parametrize(
    ("number", "text"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied"), (errno.ESTALE, "stale")]
)
def test_unwritable_disks_are_named(tmp_path, folder, number, text):
    for action in (
        lambda: RunFolder.check_free(tmp_path / "new"),
        lambda: RunFolder.open(folder.path, for_writing=True),
    ):
        said = failing(action, fail_at(1, number, onwards=True))
        assert said.startswith("disk: cannot write")
        assert text in said


# Lock


def test_a_second_run_is_refused_at_once(folder, holder):
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on {socket.gethostname()} .since 2"):
        folder.lock().__enter__()
    assert time.monotonic() - started < 1


def test_a_killed_process_leaves_no_lock(folder, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with folder.lock():
        assert json.loads((folder.path / "run.lock").read_text())["pid"] == os.getpid()
    with folder.lock():
        pass


def test_the_lock_holds_within_one_process_too(folder):
    with folder.lock(), pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        folder.lock().__enter__()


def test_a_damaged_lock_file_is_still_a_lock(folder, holder):
    (folder.path / "run.lock").write_bytes(b"\xff[")
    with pytest.raises(CheckpointError, match="in use by another process"):
        folder.lock().__enter__()


def test_the_lock_is_released_after_an_error_of_the_run(folder):
    with pytest.raises(FileNotFoundError), folder.lock():
        raise FileNotFoundError  # of the run's own making: not to be reported as a storage problem
    with folder.lock():
        pass


def test_leftovers_are_removed_under_the_lock(folder):
    for place in (folder.path, folder.checkpoints):
        for name in (".tmp-a-1", ".trash-a-1", ".old-a-1"):
            (place / name).mkdir()
            (place / name / "file").touch()
        (place / "a").mkdir()
        (place / ".tmp-result.json-5").touch()
        (place / ".keep").touch()
    with folder.lock():
        assert names_in(folder.path) == names_in(folder.checkpoints) == [".keep"]


# Metrics


def test_metrics_come_back_and_are_cut(folder):
    rows = [{"step": step, "loss": 1 / (step + 3), "note": "春"} for step in range(5)]
    for row in rows:
        folder.append_metrics(row)
    folder.sync_metrics()
    assert folder.read_metrics() == rows
    before = folder.metrics.read_bytes()
    assert folder.cut_metrics(after_step=4) == 0
    removed = folder.cut_metrics(after_step=2)
    assert folder.read_metrics() == rows[:3]
    assert before.startswith(folder.metrics.read_bytes())
    assert removed == len(before) - folder.metrics.stat().st_size


def test_a_run_without_metrics_has_none(folder):
    folder.sync_metrics()
    assert folder.read_metrics() == []
    assert folder.cut_metrics(3) == 0


@pytest.mark.parametrize("torn", [b'{"step": 1, "lo', b'{"step": 1}', b"\0\0\0\0", b"\xff\xfe\n", b"5\n"])
def test_a_torn_line_is_dropped(folder, torn):
    folder.append_metrics({"step": 0})
    with folder.metrics.open("ab") as file:
        file.write(torn)
    assert folder.read_metrics() == [{"step": 0}]
    assert folder.cut_metrics(9) == len(torn)
    folder.append_metrics({"step": 1})
    assert folder.read_metrics() == [{"step": 0}, {"step": 1}]


def test_a_disk_that_fills_up_inside_a_row_leaves_no_half_row(folder, tmp_path):
    folder.append_metrics({"step": 0})

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        folder.append_metrics({"step": 1, "loss": 1.0})

    assert "disk: " in in_child(fill_up)
    folder.append_metrics({"step": 2})
    assert folder.read_metrics() == [{"step": 0}, {"step": 2}]


def test_a_kill_while_cutting_loses_no_row(fresh, tmp_path):
    def prepare():
        made = RunFolder.create(fresh() / "x", "")
        for step in range(4):
            made.append_metrics({"step": step})
        return made

    def check(made):
        assert [row["step"] for row in made.read_metrics()] in ([0, 1, 2, 3], [0, 1])
        with made.lock():
            assert names_in(made.path) == []

    assert every_kill(prepare, lambda made: made.cut_metrics(1), check) >= 4


# Files


def test_files_are_replaced_and_read(folder):
    for value in ({"a": [1, None, "山"]}, {"lone": "\ud800"}):
        folder.write_json("result.json", value)
        assert folder.read_json("result.json") == value
    assert "山" not in folder.result.read_text()
    folder.write_text("config.yaml", "seed: 5\n")
    assert folder.config_text() == "seed: 5\n"
    assert names_in(folder.path) == []


def test_unreadable_files_are_named(folder):
    with pytest.raises(CheckpointError, match=r"cannot read .*samples.json: No such file"):
        folder.read_json("samples.json")
    folder.samples.write_text("{")
    with pytest.raises(CheckpointError, match=r"samples.json is damaged: not JSON"):
        folder.read_json("samples.json")
    folder.samples.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"samples.json is damaged: not UTF-8 .byte 0"):
        folder.read_json("samples.json")


def test_a_file_is_old_or_new_after_any_fault(fresh, tmp_path):
    def prepare():
        made = RunFolder.create(fresh() / "x", "")
        made.write_json("result.json", "old")
        return made

    def write(made):
        made.write_json("result.json", "new")

    def check(made):
        assert made.read_json("result.json") in ("old", "new")
        with made.lock():
            assert names_in(made.path) == []

    assert every_kill(prepare, write, check) >= 4
    assert every_failure(prepare, write, check) >= 8


# Publishing


def fill(text):
    def write(place: Path):
        (place / "weights").write_text(text)
        (place / "sub").mkdir()
        (place / "sub" / "more").write_text(text)

    return write


def content(place: Path) -> str:
    texts = {(place / "weights").read_text(), (place / "sub" / "more").read_text()}
    assert sorted(os.listdir(place)) == ["sub", "weights"]
    assert len(texts) == 1
    return texts.pop()


def test_publish_makes_and_replaces(folder):
    assert folder.publish("adapter", fill("1")) == folder.adapter
    assert content(folder.adapter) == "1"
    folder.publish("adapter", fill("2"))
    assert content(folder.adapter) == "2"
    assert names_in(folder.path) == []


def test_a_failing_writer_changes_nothing(folder):
    def write(place):
        (place / "weights").write_text("half")
        raise KeyboardInterrupt

    folder.publish("adapter", fill("1"))
    with pytest.raises(KeyboardInterrupt):
        folder.publish("adapter", write)
    with pytest.raises(CheckpointError, match="link or device"):
        folder.publish("adapter", lambda place: (place / "link").symlink_to("weights"))
    assert content(folder.adapter) == "1"
    assert names_in(folder.path) == []


def test_a_failed_rename_puts_the_old_one_back_at_once(folder):
    """Not only at the next start: this process goes on."""
    renames = []

    def second_rename(touch, name):
        renames.extend([name] * (name == "rename"))
        if renames == ["rename"] * 2 and name == "rename":
            raise OSError(errno.EIO, "")

    folder.publish("adapter", fill("old"))
    assert "input/output error" in failing(lambda: folder.publish("adapter", fill("new")), second_rename)
    assert content(folder.adapter) == "old"
    assert names_in(folder.path) == []


def test_what_is_published_is_old_or_new_after_any_fault(fresh, tmp_path):
    def prepare():
        made = RunFolder.create(fresh() / "x", "")
        made.publish("adapter", fill("old"))
        return made

    def publish(made):
        made.publish("adapter", fill("new"))

    def check(made):
        assert content(RunFolder.open(made.path).adapter) in ("old", "new")
        with made.lock():
            assert names_in(made.path) == []
        made.publish("adapter", fill("next"))
        assert content(made.adapter) == "next"

    assert every_kill(prepare, publish, check) >= 15
    assert every_failure(prepare, publish, check) >= 20


def test_open_leaves_a_live_writer_alone(folder, holder):
    (folder.path / ".old-adapter-1").mkdir()
    assert RunFolder.open(folder.path) == folder
    assert names_in(folder.path) == [".old-adapter-1"]
    holder.kill()
    holder.wait()
    RunFolder.open(folder.path)
    assert names_in(folder.path) == []
    assert folder.adapter.is_dir()


# Faults while making a run


def whole(path: Path) -> str:
    made = RunFolder.open(path)
    assert made.checkpoints.is_dir()
    return made.config_text()


def test_a_new_run_is_whole_or_absent_after_any_fault(fresh, tmp_path):
    def check(place):
        path = place / "runs" / "x"
        if path.exists():
            assert whole(path) == "seed: 1\n"
            shutil.rmtree(path)
        RunFolder.create(path, "seed: 2\n")
        assert whole(path) == "seed: 2\n"
        assert names_in(path.parent) == names_in(place) == []

    def create(place):
        RunFolder.create(place / "runs" / "x", "seed: 1\n")

    assert every_kill(fresh, create, check) >= 12
    assert every_failure(fresh, create, check) >= 20


def test_a_replaced_run_is_old_or_new_after_any_fault(fresh, tmp_path):
    def prepare():
        place = fresh()
        RunFolder.create(place / "x", "seed: 0\n").append_metrics({"step": 7})
        return place

    def replace(place):
        RunFolder.create(place / "x", "seed: 1\n", replace=True)

    def check(place):
        old = whole(place / "x") == "seed: 0\n"
        assert RunFolder.open(place / "x").read_metrics() == ([{"step": 7}] if old else [])
        assert old or whole(place / "x") == "seed: 1\n"
        RunFolder.create(place / "x", "seed: 2\n", replace=True)
        assert whole(place / "x") == "seed: 2\n"
        assert names_in(place) == []

    assert every_kill(prepare, replace, check) >= 15
    assert every_failure(prepare, replace, check) >= 20


def test_two_processes_making_one_run_make_it_once(fresh, tmp_path):
    """The second one makes the run just before the first one's last rename."""
    place = fresh()
    done = []

    def meanwhile(touch, name):
        if name == "rename" and not done:
            done.append(name)
            shutil.copytree(next(place.glob(".tmp-x-*")), place / "y")
            os.rename(place / "y", place / "x")
            (place / "x" / "config.yaml").write_text("seed: 2\n")

    with pytest.raises(ConfigError, match="already holds a run"), touching(meanwhile):
        RunFolder.create(place / "x", "seed: 1\n")
    assert whole(place / "x") == "seed: 2\n"
    assert names_in(place) == []


def test_windows_is_told_what_to_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delitem(sys.modules, "fitune.training.run_folder")
    with pytest.raises(MissingDependencyError, match="WSL2"):
        importlib.import_module("fitune.training.run_folder")
