"""Kill a tiny run again and again; prints one JSON line. Run by test_kill.py, or by hand:

    python tests/training/kill_server.py MODEL ROWS WORKDIR --kills 100

Everything is imported once, then each run is a forked child, so a kill costs a fraction of a second. One thread:
forking a process with running thread pools is not safe, and equal sums need equal thread counts anyway.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from fitune.config import build
from fitune.errors import FituneError
from fitune.training import loop, run  # noqa: F401  # imported here once, so that children start at once

CLOCK = {"seconds", "memory_bytes"}


def configuration(model: str, rows: str, target: Path):
    return build(
        {
            "model": {"path": model, "dtype": "fp32"},
            "method": {"name": "lora", "r": 2, "dropout": 0.1},
            "data": {"train": [rows], "eval": 0.2, "template": "tutorial", "max_length": 64},
            "train": {
                "max_steps": 24,
                "global_batch_rows": 4,
                "micro_batch_rows": 2,
                "learning_rate": 1e-2,
                "save_every_steps": 3,
                "eval_every_steps": 6,
                "device": "cpu",
                "activation_checkpointing": True,
            },
            "output": {"dir": str(target)},
        }
    )


def fork_run(config) -> int:
    """Start or resume the run in a child; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        target = Path(config.output.dir)
        if target.exists():
            run.resume(target, quiet=True)
        else:
            run.train(config, quiet=True)
        code = 0
    except FituneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    finally:
        sys.stderr.flush()
        os._exit(code)


def outcome(target: Path):
    """What must not depend on kills: metric rows without clock fields, adapter bytes."""
    lines = (target / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]
    return rows, (target / "adapter" / "adapter_model.safetensors").read_bytes()


def saving(target: Path) -> bool:
    """True while a checkpoint is being written."""
    folder = target / "checkpoints"
    return folder.is_dir() and any(name.startswith(".tmp-") for name in os.listdir(folder))


def wait(pid: int, seconds: float, until=lambda: False) -> int | None:
    """Exit code, or None if it still runs after `seconds` or when `until` says so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.0005)
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = configuration(options.model, options.rows, options.workdir / "whole")
    run.train(configuration(options.model, options.rows, options.workdir / "warm"), quiet=True)  # lazy imports
    started = time.monotonic()
    assert wait(fork_run(whole), 120) == 0
    duration = time.monotonic() - started
    expected = outcome(options.workdir / "whole")

    chance = random.Random(options.seed)
    killed = finished = resumes = in_save = 0
    failures: list[str] = []
    config = configuration(options.model, options.rows, options.workdir / "killed")
    target = Path(config.output.dir)
    while killed < options.kills or target.exists():
        resumes += target.exists()
        pid = fork_run(config)
        if killed >= options.kills:
            code = wait(pid, 120)
        elif chance.random() < 0.3:
            code = wait(pid, 120, lambda: saving(target))
            if code is None:
                time.sleep(chance.random() * 0.004)  # a save of this size takes a few milliseconds
                in_save += saving(target)
        else:
            code = wait(pid, chance.random() * duration * 1.1)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            continue
        if code != 0:
            failures.append(f"exit code {code}")
            break
        finished += 1
        if outcome(target) != expected:
            failures.append("another result than the uninterrupted run")
            break
        shutil.rmtree(target)
    print(
        json.dumps(
            {
                "kills": killed,
                "in_save": in_save,
                "resumes": resumes,
                "finished": finished,
                "failures": failures,
                "metric_rows": len(expected[0]),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
