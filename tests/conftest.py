"""Fixtures every room uses: a tiny model and tokenizer made in code, tiny data, the optional shared folder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; tiny models gain nothing from threads

import pytest

from tiny import make_model, make_rows

ROOT = Path(__file__).parent.parent
# A folder `shared` beside the checkout or one of its parents (a worktree lies deeper).
SHARED = next((p / "shared" / "data" for p in ROOT.parents if (p / "shared" / "data" / "configs").is_dir()), None)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=100, help="SIGKILLs of `make kill-test`")
    parser.addoption("--cells", choices=("pairs", "all"), default="pairs", help="how much of the matrix is run")
    parser.addoption("--cells-on", choices=("cpu", "cuda"), default="cpu", help="where the matrix is run")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout; tests that use it skip without it."""
    if SHARED is None:
        pytest.skip("needs shared/data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a tiny Llama model."""
    return make_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory) -> Path:
    """Folder of a tiny Qwen2 model: biases, tied embeddings."""
    return make_model(tmp_path_factory.mktemp("tiny") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory) -> Path:
    """Folder of a tiny BLOOM model: biases, LayerNorm, ALiBi, tied embeddings."""
    return make_model(tmp_path_factory.mktemp("tiny") / "bloom", "bloom")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """24 good alpaca rows."""
    return make_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def tree(tiny, rows_file, tmp_path):
    """A small complete configuration as a nested dict; tests change what they are about."""
    return {
        "model": {"path": str(tiny), "dtype": "fp32"},
        "method": {"name": "lora", "r": 4},
        "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
        "train": {
            "max_steps": 6,
            "global_batch_rows": 4,
            "micro_batch_rows": 2,
            "learning_rate": 1e-2,
            "save_every_steps": 2,
            "eval_every_steps": 3,
            "device": "cpu",
        },
        "output": {"dir": str(tmp_path / "run")},
    }


@pytest.fixture(autouse=True)
def _quiet_libraries():
    """Deprecation warnings raised inside libraries are not ours to fix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|transformers|peft|jinja2)\b")
        yield
