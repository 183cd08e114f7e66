"""One measurement, one process: start it, watch the GPU's memory meanwhile, take its one line of result.

A measurement in a used process would see the memory, the compiled kernels and the patched libraries of the one before.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = "RESULT "
POLL_SECONDS = 0.005


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Gpu:
    """Memory in use on the first visible GPU as the driver counts it; no CUDA context is made for it.

    A child cannot watch itself as often: cudaMemGetInfo from a second thread would disturb launches and graph capture.
    """

    def __init__(self) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        if library.nvmlInit_v2() != 0:
            return
        if visible.startswith("GPU-"):
            found = library.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(self._handle))
        else:
            index = int(visible) if visible.isdigit() else 0
            found = library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._handle))
        if found == 0:
            self._library = library

    def used_bytes(self) -> int | None:
        """Bytes in use by everybody; None where the driver's library is missing."""
        memory = _Memory()
        if self._library is None or self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)):
            return None
        return int(memory.used)


@dataclass
class Runner:
    """Starts children one after another and appends what they found to a file.

    Attributes:
        out: folder of results.jsonl and of the children's logs.
        seconds: no child is started later than this after the first; None: no limit.
        child_seconds: a child that takes longer is ended and recorded as such.
    """

    out: Path
    seconds: float | None = None
    child_seconds: float = 300
    _started: float = field(default_factory=time.monotonic)
    _gpu: Gpu = field(default_factory=Gpu)

    def __post_init__(self) -> None:
        self.out = self.out.absolute()
        (self.out / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def results(self) -> Path:
        """One JSON object per line, newest last."""
        return self.out / "results.jsonl"

    def time_is_up(self) -> bool:
        """True if no further child should be started."""
        return self.seconds is not None and time.monotonic() - self._started > self.seconds

    def has(self, kind: str) -> bool:
        """True if the file holds a good measurement of that kind, from this call or an earlier one."""
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.is_file() else []
        return any(row["kind"] == kind and row["status"] == "ok" for row in map(json.loads, lines))

    def run(self, task: str, arguments: dict[str, Any], labels: dict[str, Any]) -> dict[str, Any]:
        """Run `bench.tasks.TASKS[task](**arguments)` in a process of its own; record and return what came out.

        Args:
            labels: go into the record: `kind` and what tells it from others of its kind.
        """
        name = "-".join(str(value) for value in labels.values()).replace("/", "_")
        log = self.out / "logs" / f"{name}.txt"
        started, idle = time.monotonic(), self._gpu.used_bytes()
        status, highest = self._watch([sys.executable, "-m", "bench", "child", task, json.dumps(arguments)], log)
        row = {**labels, "status": status, "wall_seconds": round(time.monotonic() - started, 2)}
        if idle is not None and highest is not None:
            row |= {"device_idle_bytes": idle, "device_used_bytes": highest - idle}
        text = log.read_text(encoding="utf-8", errors="replace")
        found = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
        if status == "ok" and not found:
            row["status"] = "failed"
        if row["status"] == "ok":
            row |= json.loads(found[-1])
        else:
            row["error"] = _last_line(text)
        self.record(row)
        return row

    def make_model(self, name: str, models: Path) -> Path:
        """The folder of a random model, made by a child if it is not there yet."""
        folder = models.absolute() / name
        if not folder.is_dir():
            self.run("model", {"name": name, "models": str(folder.parent)}, {"kind": "model", "name": name})
        return folder

    def record(self, row: dict[str, Any]) -> None:
        """Append a row to the results and print it in short."""
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "times_ms"}), flush=True)

    def _watch(self, command: list[str], log: Path) -> tuple[str, int | None]:
        """Run a command; its status and the highest memory use seen."""
        scratch = self.out / "scratch"  # some stacks write compiled code into the working folder
        scratch.mkdir(exist_ok=True)
        highest = self._gpu.used_bytes()
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=scratch, env=environment(), start_new_session=True
            )
            try:
                while child.poll() is None:
                    if time.monotonic() - started > self.child_seconds:
                        return "timeout", highest
                    used = self._gpu.used_bytes()
                    highest = used if highest is None or used is None else max(highest, used)
                    time.sleep(POLL_SECONDS)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        return ("ok" if child.returncode == 0 else "failed"), highest


def environment() -> dict[str, str]:
    """The child's environment: this checkout first on the path, nobody calls home."""
    inherited = os.environ.get("PYTHONPATH")
    path = [str(ROOT), str(ROOT / "src"), *([inherited] if inherited else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "WANDB_DISABLED": "true",
    }


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no output"
