"""memory.budget as PyTorch's allocator gets it."""

from types import SimpleNamespace

import pytest
import torch

from fitune.config import build
from fitune.training.limits import process_state, set_up_device

TOTAL = 100_000_000_000


@pytest.mark.parametrize(
    ("budget", "share"),
    [(None, 1.0), (8.0, 0.072), (0.5, 0.0), (200.0, 1.0)],  # less what the context takes: 0.8 GB on an H200
)
def test_the_allocator_gets_what_the_context_leaves(tree, monkeypatch, budget, share):
    given = []
    properties = SimpleNamespace(total_memory=TOTAL, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: given.append(share))
    tree["memory"] = {"budget": budget}
    set_up_device(build(tree), torch.device("cuda"))
    assert given == [pytest.approx(share)]


def test_switches_are_put_back():
    before = torch.backends.cudnn.allow_tf32
    with process_state():
        assert not torch.backends.cudnn.allow_tf32
        torch.use_deterministic_algorithms(True)
    assert torch.backends.cudnn.allow_tf32 == before
    assert not torch.are_deterministic_algorithms_enabled()
