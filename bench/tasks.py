"""What a child process can be asked to do: name -> `module.function` of this package.

Modules are imported in the child alone: a stack that replaces parts of transformers must be first, and the parent never
touches the GPU.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from bench.children import MARK

TASKS = {
    "model": "tasks.make_model",
    "gemm": "gemm.measure",
    "ours": "ours.step",
    "peer": "peers.step",
    "ours_rows": "rows.ours",
    "peer_rows": "peer_rows.measure",
    "ours_fit": "sweep.probe_task",
    "curve": "curves.curve",
    "family": "families.learn",
    "cpu": "cpu.measure",
    "profile": "profile.measure",
}


def make_model(name: str, models: str) -> dict[str, Any]:
    """Write a random model."""
    from pathlib import Path

    from bench.models import make

    return {"folder": make(name, Path(models)).name}


def run(name: str, arguments: str) -> int:
    """Run a task with JSON arguments and print its result as the one marked line."""
    module, _, function = TASKS[name].partition(".")
    result = getattr(importlib.import_module(f"bench.{module}"), function)(**json.loads(arguments))
    print(f"{MARK}{json.dumps(result)}", flush=True)
    return 0
