"""Importing PEFT and bitsandbytes never asks a hub for kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
# Stands for the package of that name: any kernel it is asked for is written down. Its version is one that transformers
# does not know, so that only bitsandbytes asks.
FAKE = """
import os

def get_kernel(name, *args, **kwargs):
    with open(os.environ["ASKED"], "a") as file:
        print(name, file=file)
    raise RuntimeError("no network here")
"""
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def run(tmp_path):
    """Run code beside a fake `kernels`: what was asked of it, and what was printed."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    metadata = tmp_path / "site" / "kernels-0.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    asked = tmp_path / "asked"

    def run(code):
        path = os.pathsep.join([str(tmp_path / "site"), str(SRC)])
        environment = os.environ | {"PYTHONPATH": path, "ASKED": str(asked), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return asked.read_text().split() if asked.exists() else [], done.stdout + done.stderr

    return run


@needs_bitsandbytes
def test_a_plain_import_does_ask(run):
    """The control: without it the tests below could not fail."""
    asked, printed = run("import bitsandbytes.functional as f; print(bool(f.has_avx512bf16()))")
    if "True" not in printed:
        pytest.skip("bitsandbytes asks on CPUs with AVX512-BF16 only")
    assert asked
    assert all(name.startswith("kernels-community/") for name in asked)


@pytest.mark.parametrize("before", ["", "import kernels\n"], ids=["", "imported before"])
@pytest.mark.parametrize("library", ["peft", pytest.param("bitsandbytes", marks=needs_bitsandbytes)])
def test_ours_does_not(run, library, before):
    code = f"""{before}
from fitune.model.libraries import import_{library}
import logging, sys
assert not {{"peft", "bitsandbytes"}} & set(sys.modules)
there = "kernels" in sys.modules
assert import_{library}().__name__ == "{library}"
assert import_{library}() is sys.modules["{library}"]
assert ("kernels" in sys.modules) == there
import kernels
assert callable(kernels.get_kernel)
assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET
"""
    asked, printed = run(code)
    assert asked == []
    assert "kernels-community" not in printed


def test_applying_lora_does_not(run, tiny):
    """PEFT imports parts of itself late, and bitsandbytes with them."""
    code = f"""
import torch
from pathlib import Path
from fitune.config import LoraConfig
from fitune.methods.lora import LORA
from fitune.model.load import load_base
from fitune.training.run import train  # all that a run imports
model = LORA.apply(load_base(Path({str(tiny)!r}), "fp32", torch.device("cpu")), LoraConfig(name="lora"))
LORA.state(model)
"""
    asked, printed = run(code)
    assert asked == []
    assert "kernels-community" not in printed


def test_a_failed_import_leaves_no_trace(run):
    """Without bitsandbytes `kernels` can be imported again and the error is ImportError."""
    code = """
import sys
from fitune.model.libraries import import_bitsandbytes
sys.modules["bitsandbytes"] = None
try:
    import_bitsandbytes()
except ImportError:
    import kernels
else:
    raise SystemExit("no error")
"""
    assert run(code)[0] == []
