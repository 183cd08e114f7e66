"""Run code whose process is killed, or whose disk fails, at its k-th touch of the disk."""

import builtins
import errno
import io
import itertools
import os
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from fitune.errors import CheckpointError

DELETES = ("unlink", "rmdir")
TOUCHES = ("rename", "replace", "mkdir", "fsync", "write", *DELETES)


@contextmanager
def touching(fault):
    """Call fault(k, name) before the k-th change of the disk; it may kill or raise."""
    count = itertools.count(1)

    def touched(name, real):
        def call(*args, **options):
            fault(next(count), name)
            return real(*args, **options)

        return call

    def opened(real, reads):
        def call(path, how="r", *args, **options):
            if reads(how) or isinstance(path, int):
                return real(path, how, *args, **options)
            fault(next(count), "open")
            opened = real(path, how, *args, **options)
            try:
                fault(next(count), "write")  # the file is there, its content is not
            except OSError:
                os.close(opened) if isinstance(opened, int) else opened.close()
                raise
            return opened

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # no test pulls the plug, and a real one takes milliseconds
        for name in TOUCHES:
            patch.setattr(os, name, touched(name, getattr(os, name)))
        patch.setattr(os, "open", opened(os.open, lambda flags: not flags & (os.O_WRONLY | os.O_RDWR)))
        for module in (builtins, io):  # pathlib uses the second
            patch.setattr(module, "open", opened(io.open, lambda mode: "r" in mode))
        yield


def in_child(action) -> str | None:
    """What `action` said when it failed in a forked process, "killed", or None if it came through."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork beside threads; the child uses none
        pid = os.fork()
    if pid == 0:
        text = ""
        try:
            action()
        except BaseException as error:  # noqa: BLE001  # the edge of this process; the parent judges the text
            text = f"{type(error).__name__}: {error}"
        finally:
            with open(writer, "w") as out:
                out.write(text)
            os._exit(0)
    os.close(writer)
    with open(reader) as source:
        text = source.read()
    _, status = os.waitpid(pid, 0)
    return "killed" if os.waitstatus_to_exitcode(status) == -signal.SIGKILL else text or None


def fail_at(k: int, number: int = errno.ENOSPC, spared=DELETES, onwards: bool = False):
    """A fault: the k-th touch fails with this errno, and with `onwards` every later one too."""

    def fault(touch, name):
        if name not in spared and (touch == k or (onwards and touch > k)):
            raise OSError(number, os.strerror(number))

    return fault


def every_kill(prepare, action, check) -> int:
    """Kill `action` before its 1st, 2nd, ... touch until it comes through; `check` what each one leaves.

    Args:
        prepare: makes a fresh start; its value is given to the other two.
    Returns:
        Number of kills.
    """
    for k in itertools.count(1):
        start = prepare()

        def die(touch, name, k=k):
            if touch == k:
                os.kill(os.getpid(), signal.SIGKILL)

        def doomed(start=start, die=die):
            with touching(die):
                action(start)

        outcome = in_child(doomed)
        assert outcome in (None, "killed"), f"touch {k}: {outcome}"
        check(start)
        if outcome is None:
            return k - 1
    raise AssertionError


def every_failure(prepare, action, check) -> int:
    """As every_kill, with a disk that fails at each touch: full for this one, or out of order from there on.

    Returns:
        Number of failures that `action` reported; each had to say `disk`.
    """
    reported = 0
    for options in ({}, {"number": errno.EIO, "spared": (), "onwards": True}):
        for k in itertools.count(1):
            start, touches = prepare(), []
            fault = fail_at(k, **options)

            def noted(touch, name, touches=touches, fault=fault):
                touches.append(name)
                fault(touch, name)

            said = None
            try:
                with touching(noted):
                    action(start)
            except CheckpointError as error:
                said = str(error)
            assert said is None or said.startswith("disk: cannot write"), f"touch {k}: {said}"
            reported += said is not None
            check(start)
            if len(touches) < k:
                break
    return reported


def failing(action, fault) -> str:
    """What `action` says on a disk with this fault."""
    with pytest.raises(CheckpointError) as caught, touching(fault):
        action()
    return str(caught.value)


def names_in(place: Path) -> list[str]:
    """Names that only a crash leaves behind."""
    return [name for name in os.listdir(place) if name.startswith(".")]
