"""memory.budget as PyTorch's allocator gets it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fitune.config import build
from fitune.errors import OutOfMemoryError
from fitune.training.limits import hold_to_budget, set_up_device

TOTAL = 100_000_000_000


@pytest.fixture
def given(monkeypatch):
    """The shares of an H200's memory that the allocator is held to."""
    shares = []
    properties = SimpleNamespace(total_memory=TOTAL, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", dict)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    return shares


@pytest.mark.parametrize(
    ("budget", "share"),
    [(None, 1.0), (8.0, 0.07188), (200.0, 1.0)],  # less what the context takes: 0.812 GB
)
def test_the_allocator_gets_what_the_context_leaves(tree, given, budget, share):
    tree["memory"] = {"budget": budget}
    set_up_device(build(tree), torch.device("cuda"))
    assert given == [pytest.approx(share)]


def test_the_page_table_of_page_locked_memory_counts(tree, given, monkeypatch):
    tree["memory"] = {"budget": 8.0}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": 1 << 35})
    hold_to_budget(build(tree), torch.device("cuda"))
    assert given == [pytest.approx((8e9 - 812e6 - (1 << 26)) / TOTAL)]


def test_a_budget_below_the_context_is_refused(tree, given, monkeypatch):
    tree["memory"] = {"budget": 0.5}
    with pytest.raises(OutOfMemoryError, match=r"0.5 GB, of which the CUDA context, .*, takes 0.81; raise memory.bu"):
        set_up_device(build(tree), torch.device("cuda"))
    tree["memory"] = {"budget": 0.85}
    set_up_device(build(tree), torch.device("cuda"))
    assert given.pop() > 0
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": 1 << 35})
    with pytest.raises(OutOfMemoryError, match=r"the page table of page-locked memory, takes 0.88; raise"):
        hold_to_budget(build(tree), torch.device("cuda"))
    assert not given


SWITCHES = """
import os, sys
import torch
from fitune.training.limits import process_state

backends, cudnn = torch.backends, torch.backends.cudnn
torch.use_deterministic_algorithms(False)  # imports PyTorch's compiler, once

def read():
    try:
        older = cudnn.allow_tf32
    except RuntimeError:
        older = "contradicts"
    return older, cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision, torch.are_deterministic_algorithms_enabled()

def check(before):
    exec(before)
    found = read()
    with process_state():
        assert cudnn.allow_tf32 is False
        assert cudnn.rnn.fp32_precision == cudnn.conv.fp32_precision == "ieee"
        torch.use_deterministic_algorithms(True)
    assert read() == found, (before, found, read())

for before in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        check(before)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, before
"""
STATES = [
    "",
    "cudnn.allow_tf32 = False",
    "backends.fp32_precision = 'tf32'",
    "backends.fp32_precision = 'ieee'",
    "cudnn.fp32_precision = 'ieee'",
    "cudnn.rnn.fp32_precision = 'ieee'",
    "cudnn.conv.fp32_precision = 'ieee'",
    "cudnn.rnn.fp32_precision = cudnn.conv.fp32_precision = 'ieee'",
    "cudnn.rnn.fp32_precision = cudnn.conv.fp32_precision = 'none'",
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_switches_are_put_back():
    """Each state in a process of its own: PyTorch has two sets of these switches, and some states cannot be left."""
    done = subprocess.run([sys.executable, "-c", SWITCHES, *STATES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
