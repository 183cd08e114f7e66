"""The run folder: made whole by one rename, locked by one process, changed only by steps that survive a crash.

It is the interface between training and everything after it. Try it:

    folder = RunFolder.create("runs/demo", dump(config))
    with folder.lock():
        folder.append_metrics({"step": 1, "loss": 2.5})
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fitune.errors import CheckpointError, ConfigError, MissingDependencyError
from fitune.infer.disk import make_parents, preflight, recover, replace_folder, sync, write_atomic, writing

try:
    import fcntl
except ImportError as error:
    raise MissingDependencyError("training locks its run folder by fcntl, which Windows lacks; use WSL2") from error

CONFIG = "config.yaml"
LOCK = "run.lock"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """One run on disk; `create` makes it, `open` finds it, `lock` makes this process its only writer."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, config_yaml: str, replace: bool = False, need_bytes: int = 0) -> RunFolder:
        """Make a run folder that appears by one rename with its configuration inside.

        Args:
            path: must be missing or an empty folder; parents are made.
            config_yaml: the resolved configuration, kept as config.yaml.
            replace: delete a run that is already there, unless a live process holds its lock.
            need_bytes: free space this run will need.
        Raises:
            ConfigError: `path` is taken.
            CheckpointError: not writable, too little space, or the run to replace is in use.
        """
        cls.check_free(path, replace, need_bytes)
        shown, target = Path(path), _real(Path(path))
        make_parents(target)
        with ExitStack() as held:
            with writing(shown):
                _recover_run(target)
                _refuse_taken(shown, target, replace)
            if replace and (target / CONFIG).exists():
                held.enter_context(cls(target).lock())

            def fill(temp: Path) -> None:
                held.enter_context(cls(temp).lock())  # tells others that this folder is being made
                (temp / "checkpoints").mkdir()
                (temp / CONFIG).write_text(config_yaml, encoding="utf-8")

            try:
                replace_folder(target, fill, replace=replace)
            except CheckpointError as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    _refuse_taken(shown, target, replace)  # another process made the same run meanwhile
                raise
        return cls(target)

    @classmethod
    def check_free(cls, path: str | Path, replace: bool = False, need_bytes: int = 0) -> None:
        """Refuse early what `create` would refuse, without making anything.

        Raises:
            ConfigError: `path` is taken.
            CheckpointError: not writable, or too little space.
        """
        shown, target = Path(path), _real(Path(path))
        with writing(shown):
            _refuse_taken(shown, target, replace)
        preflight(target, need_bytes)

    @classmethod
    def open(cls, path: str | Path, for_writing: bool = False, need_bytes: int = 0) -> RunFolder:
        """Find an existing run, undoing what a crash left half-replaced.

        Raises:
            CheckpointError: no run folder, with what is missing; or, `for_writing`, not writable or too little space.
        """
        shown, target = Path(path), _real(Path(path))
        with suppress(OSError):
            if not target.exists():
                _recover_run(target)
        if not target.is_dir():
            raise CheckpointError(f"{shown} is no run folder: {'it is a file' if target.exists() else 'not found'}")
        if not (target / CONFIG).is_file():
            raise CheckpointError(f"{shown} is no run folder: it has no {CONFIG}; give the folder of a fitune run")
        folder = cls(target)
        if for_writing:
            preflight(target / CONFIG, need_bytes)
        if any(target.glob(".old-*")) or any(folder.checkpoints.glob(".old-*")):
            with suppress(CheckpointError), folder.lock():
                pass  # taking the lock recovers; refused, its live writer has it in hand, or the disk is read-only
        return folder

    @property
    def checkpoints(self) -> Path:
        """Folder of committed checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter, published at the end."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model of method `full`, published at the end."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """One JSON row per line, in the order of training."""
        return self.path / METRICS

    @property
    def rejected(self) -> Path:
        """Rows of data that were refused, with file, line and reason."""
        return self.path / "rejected.jsonl"

    @property
    def samples(self) -> Path:
        """Texts generated before and after training."""
        return self.path / "samples.json"

    @property
    def result(self) -> Path:
        """How the run ended."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer; clean up after a crash first. The lock goes with the process, however it ends.

        Raises:
            CheckpointError: another process has it; the message says which.
        """
        with writing(self.path):
            handle = self._take_lock()
        owner = os.getpid()
        try:
            with writing(self.path):
                recover(self.path)
                if self.checkpoints.is_dir():
                    recover(self.checkpoints)
            yield
        finally:
            if os.getpid() == owner:  # a forked child shares the lock and must not give it away
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _take_lock(self) -> int:
        file = self.path / LOCK
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        with ExitStack() as on_failure:
            on_failure.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.path} is in use by {_holder(handle)}; wait for it, stop it, or choose another output.dir"
                ) from None
            if not os.path.samestat(os.fstat(handle), os.stat(file)):
                raise CheckpointError(f"{self.path} was replaced by another process just now; try again")
            started = datetime.now(UTC).isoformat(timespec="seconds")
            line = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n"
            os.pwrite(handle, line.encode(), 0)
            os.ftruncate(handle, len(line))  # after the write: a second process never reads an empty lock
            on_failure.pop_all()
        return handle

    def config_text(self) -> str:
        """The configuration this run was made with, as YAML."""
        return self._read(CONFIG)

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add one row; it is safe from a kill at once, from a power cut after the next commit."""
        line = (json.dumps(row) + "\n").encode()
        with writing(self.metrics):
            handle = os.open(self.metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                before = os.fstat(handle).st_size
                if os.write(handle, line) != len(line):
                    os.ftruncate(handle, before)  # else the next row would be glued to this half
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)

    def append_log(self, text: str) -> None:
        """Add a line to log.txt: what was said besides metrics (fallbacks, changed settings, retries)."""
        with writing(self.path / "log.txt"), (self.path / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")

    def sync_metrics(self) -> None:
        """Force the metrics to the disk; part of a commit, so that no checkpoint is ahead of its rows."""
        if self.metrics.exists():
            with writing(self.metrics):
                sync(self.metrics)

    def read_metrics(self) -> list[dict[str, Any]]:  # Any: JSON values
        """All whole rows; a line cut by a crash is left out."""
        return [row for _, row in self._metric_lines()]

    def cut_metrics(self, after_step: int, evaluated: bool = True) -> int:
        """Remove rows past `after_step` and damaged lines, so that a resumed run writes each row once.

        Args:
            evaluated: False drops the evaluation of `after_step` too: the resumed run will do it.
        Returns:
            Bytes removed; kept rows are unchanged to the byte.
        """
        if not self.metrics.exists():
            return 0
        again = None if evaluated else ("eval", after_step)
        kept = b"".join(
            line
            for line, row in self._metric_lines()
            if row.get("step", after_step) <= after_step and (row.get("kind"), row.get("step")) != again
        )
        removed_bytes = self.metrics.stat().st_size - len(kept)
        if removed_bytes:
            write_atomic(self.metrics, kept)
        return removed_bytes

    def _metric_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:  # Any: JSON values
        try:
            content = self.metrics.read_bytes() if self.metrics.exists() else b""
        except OSError as error:
            raise CheckpointError(f"cannot read {self.metrics}: {error.strerror}") from error
        for line in content.splitlines(keepends=True):
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and line.endswith(b"\n"):
                    yield line, row

    def write_text(self, name: str, text: str) -> None:
        """Replace the file `name` of this run at once and for good."""
        write_atomic(self.path / name, text.encode("utf-8", "backslashreplace"))

    def write_json(self, name: str, value: object) -> None:
        """Replace the JSON file `name` of this run at once and for good."""
        # backslashreplace turns a lone surrogate into its JSON escape: generated text never breaks the file.
        self.write_text(name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    def read_json(self, name: str) -> Any:  # Any: JSON values
        """Content of the JSON file `name`."""
        try:
            return json.loads(self._read(name))
        except ValueError as error:
            raise CheckpointError(f"{self.path / name} is damaged: not JSON ({error})") from error

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path / name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path / name} is damaged: not UTF-8 (byte {error.start})") from error

    def publish(self, name: str, write: Callable[[Path], None]) -> Path:
        """Make or replace the folder `name` of this run; readers find the old or the new one, complete.

        Args:
            name: for example `adapter`.
            write: puts the files into the folder it is given.
        """
        target = self.path / name
        replace_folder(target, write)
        return target


def _recover_run(target: Path) -> None:
    """Settle leftovers of this run folder beside it, but not those that a live process is working on."""
    recover(target.parent, lambda name, leftover: name == target.name and not _is_locked(leftover))


def _is_locked(run: Path) -> bool:
    try:
        handle = os.open(run / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _real(path: Path) -> Path:
    """Follow a link at `path` itself: a rename onto a link would put the run beside what the link points to."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _refuse_taken(shown: Path, target: Path, replace: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{shown} is a file; choose another output.dir")
    if not any(target.iterdir()):
        return
    if not (target / CONFIG).is_file():
        raise ConfigError(f"{shown} is not empty and holds no fitune run; choose another output.dir")
    if not replace:
        raise ConfigError(
            f"{shown} already holds a run; continue it with `fitune resume {shown}`, choose another output.dir, or "
            "delete it by `fitune train --replace`"
        )
    if not (target / LOCK).is_file():  # config.yaml is a common name; every run of ours has both
        raise ConfigError(f"{shown} has a {CONFIG} but no {LOCK}, so it may be no fitune run; delete it yourself")


def _holder(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0).splitlines()[0])
        return f"process {owner['pid']} on {owner['host']} (since {owner['started']})"
    except (ValueError, LookupError, TypeError):
        return "another process"
