"""The kernels of a step, compiled for GPUs that are not here: they fit into what those have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compile_kernels import GENERATIONS, WORKS, Compiled

ROOT = Path(__file__).parents[2]


def test_what_does_not_fit_is_named():
    fits = Compiled("kernel", registers=255, shared=99 * 1024, stack=0, warps=8)
    assert fits.problem(GENERATIONS[86]) is None
    assert fits.problem(GENERATIONS[75]) == "kernel takes 101,376 bytes of shared memory of 65,536"
    wide = Compiled("kernel", registers=255, shared=0, stack=0, warps=16)
    assert wide.problem(GENERATIONS[86]) == "kernel takes 255 registers of 512 threads"


def test_a_step_of_llama_on_an_rtx_30():
    """All generations and works: docs/results/kernels.md."""
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), "--gpus", "86", "--works", "0", "--json"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [Compiled(**found) for found in json.loads(done.stdout)["86"]]
    assert WORKS[0].model == "llama-3.2-1b"
    names = {kernel.name for kernel in kernels}
    assert names >= {"forward_kernel", "dq_kernel", "dkv_kernel", "_add_norm", "_swiglu", "_cross_entropy", "_refresh"}
    assert all(kernel.problem(GENERATIONS[86]) is None for kernel in kernels)
    assert max(kernel.stack for kernel in kernels) <= 64
