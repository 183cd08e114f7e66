"""Changing files and folders by steps that a crash cannot cut in half; run folders and converted models are made so.

Whatever must not be seen half-written is built beside its place as `.tmp-NAME-PID`, fsynced and renamed. What it
replaces is moved to `.old-NAME-PID` first and comes back if the process dies in between; what is to be deleted is
renamed to `.trash-NAME-PID` first. `recover` settles all three after a crash.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from fitune.errors import CheckpointError, ConfigError

LEFTOVER = re.compile(r"\.(tmp|old|trash)-(.+)-\d+")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EIO: "the disk reported an input/output error",
    errno.EROFS: "the disk is mounted read-only",
    errno.ESTALE: "the network disk lost the file (stale handle)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.ENOLCK: "this file system has no file locks",
}


def disk_error(error: Exception, path: Path, need_bytes: int = 0) -> CheckpointError:
    """Say what the disk refused at `path`, with bytes needed and free where space may be the cause.

    Args:
        error: OSError, or SafetensorError, which hides one in its text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (hidden := re.search(r"os error (\d+)", str(error))):
        number = int(hidden[1])
    if number is None:
        return CheckpointError(f"disk: cannot write {path}: {error}")
    reason = REASONS.get(number) or os.strerror(number)
    if number in FULL or need_bytes:
        reason += f"; about {_amount(need_bytes)} needed, {_amount(free_bytes(path))} free"
    advice = "free some space, or " if number in FULL else "make it writable, or " if number in READ_ONLY else ""
    return CheckpointError(
        f"disk: cannot write {path}: {reason}; {advice}choose another folder (a run's is output.dir)"
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the CheckpointError that says `disk` and names `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the disk of `path`, or of its nearest parent that exists."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


def _amount(num_bytes: int) -> str:
    size, unit = (num_bytes / 2**30, "GiB") if num_bytes >= 2**30 else (num_bytes / 2**20, "MiB")
    return f"{num_bytes:,} bytes ({size:,.1f} {unit})"


def beside(target: Path, kind: str) -> Path:
    """Name of the temporary sibling of `target`: kind `tmp`, `old` or `trash`."""
    return target.with_name(f".{kind}-{target.name}-{os.getpid()}")


def sync(path: Path) -> None:
    """Force one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot fsync a folder; they order renames themselves.
        if not stat.S_ISDIR(os.fstat(handle).st_mode) or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def files_in(root: Path) -> dict[str, os.stat_result]:
    """Every non-folder below `root` by its relative path, links not followed, in a fixed order."""
    found = {}
    for parent, folders, names in os.walk(root, onerror=_raise):
        folders.sort()
        for name in sorted(names + [name for name in folders if os.path.islink(os.path.join(parent, name))]):
            file = Path(parent, name)
            found[file.relative_to(root).as_posix()] = file.lstat()
    return found


def tree_bytes(root: Path) -> int:
    """Bytes of all files below `root`; 0 if it cannot be read."""
    with suppress(OSError):
        return sum(status.st_size for status in files_in(root).values())
    return 0


def _raise(error: OSError) -> None:
    raise error


def sync_tree(root: Path) -> None:
    """Force every file and folder below `root`, and `root`, to the disk."""
    for name, status in files_in(root).items():
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{root / name} is a link or device; only plain files can be stored")
        sync(root / name)
    for parent, _, _ in os.walk(root, topdown=False, onerror=_raise):
        sync(Path(parent))


def remove(path: Path) -> None:
    """Delete a file or folder as far as possible; what stays is a leftover that `recover` tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def discard(path: Path) -> None:
    """Delete `path` so that a half-deleted one is never found under its name."""
    match = LEFTOVER.fullmatch(path.name)
    trash = beside(path.with_name(match[2]) if match else path, "trash")
    remove(trash)
    os.rename(path, trash)
    remove(trash)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace the file `path`; after a crash it holds the old or the new content, never a part."""
    temp = beside(path, "tmp")
    try:
        with writing(path):
            with open(temp, "wb") as file:
                _fill_synced(file, content)
            os.replace(temp, path)
            sync(path.parent)
    finally:
        remove(temp)


def _fill_synced(file: IO[bytes], content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def replace_folder(target: Path, fill: Callable[[Path], None], need_bytes: int = 0, replace: bool = True) -> None:
    """Fill a temporary folder, force it to the disk and rename it to `target`: the commit.

    Args:
        target: its parent must exist. An old `target` is replaced if `replace`, else it must be missing or empty.
        fill: puts files and folders into the folder it is given; its own errors pass through.
        need_bytes: expected size, for the message when the disk is full.
    Raises:
        CheckpointError: the disk refused. `target` is what it was (or, if only the last fsync failed, the new one).
    """
    temp = beside(target, "tmp")
    remove(temp)
    try:
        os.mkdir(temp)
        fill(temp)
        sync_tree(temp)
        _swap_in(temp, target, replace)
    except (OSError, SafetensorError) as error:
        written = tree_bytes(temp)
        remove(temp)  # first, so that the free bytes of the message are those of the next try
        raise disk_error(error, target, max(need_bytes, written)) from error
    finally:
        remove(temp)


def check_free(target: Path, option: str) -> None:
    """Refuse a place that already holds something.

    Raises:
        ConfigError: `target` is a file or a folder with something in it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{option} {target}: exists and is not an empty folder; give a new one")


def new_folder(target: Path, fill: Callable[[Path], None], need_bytes: int = 0) -> None:
    """Make a folder that appears, filled, by one rename; what a killed attempt at the same place has left is removed.

    Args:
        target: must not exist, or be an empty folder; missing parents are made.
        fill, need_bytes: see `replace_folder`.
    Raises:
        CheckpointError: the disk refused; nothing is left there.
    """
    preflight(target, need_bytes)
    make_parents(target)
    with writing(target):
        recover(target.absolute().parent, lambda name, _: name == target.name)
    replace_folder(target.absolute(), fill, need_bytes, replace=False)


def _swap_in(temp: Path, target: Path, replace: bool) -> None:
    old = beside(target, "old")
    moved = replace and target.exists()
    if moved:
        if old.exists():
            discard(old)
        os.rename(target, old)
    try:
        os.rename(temp, target)
    except OSError:
        if moved:
            os.rename(old, target)
        raise
    sync(target.parent)
    with suppress(OSError):  # the new one is in place; what fails here is deleted by the next recover
        if old.exists():
            discard(old)


def recover(parent: Path, wanted: Callable[[str, Path], bool] = lambda name, leftover: True) -> None:
    """Settle what a killed process left in `parent`: bring back a replaced folder without successor, delete the rest.

    Args:
        parent: a folder that no other process writes to now.
        wanted: chooses leftovers by the name they stand for and their path; all of them if not given.
    """
    for entry in sorted(parent.iterdir()):
        match = LEFTOVER.fullmatch(entry.name)
        if not match or not wanted(match[2], entry):
            continue
        target = parent / match[2]
        if match[1] == "old" and not target.exists():
            os.rename(entry, target)
            sync(parent)
        elif match[1] == "old":
            discard(entry)
        else:
            remove(entry)


def preflight(target: Path, need_bytes: int = 0) -> None:
    """Ask for free space and write a probe where `target` will be, before any work is done; nothing stays behind.

    Raises:
        CheckpointError: too little space, read-only, or no permission.
    """
    if free_bytes(target) < need_bytes:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise disk_error(full, target, need_bytes) from full
    nearest = next(place for place in target.absolute().parents if os.path.lexists(place))
    with writing(target), tempfile.TemporaryFile(dir=nearest) as probe:  # nameless: a kill leaves nothing either
        _fill_synced(probe, bytes(4096))


def make_parents(target: Path) -> None:
    """Make the missing parents of `target`, each forced to the disk."""
    with writing(target):
        for place in reversed(target.absolute().parents):
            if not place.is_dir():
                with suppress(FileExistsError):
                    os.mkdir(place)
                sync(place.parent)
