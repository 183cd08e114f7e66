"""The optimizer against torch's own, masters, schedules, loss scale."""

import pytest
import torch
from torch import nn

from fitune.config import TrainConfig, build
from fitune.errors import CheckpointError
from fitune.training.optim import LossScale, MasterOptimizer, learning_rate


def config(**train) -> TrainConfig:
    return build({"model": {"path": "x"}, "train": {"learning_rate": 1e-2, **train}}).train


def drive(parameter, optimizer_step, steps=5):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        (parameter * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)).sum().backward()
        optimizer_step()


def test_fp32_parameters_follow_torchs_adamw():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6)) for _ in range(2))
    mine = MasterOptimizer({"w": ours}, config(weight_decay=0.1))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, eps=1e-8)
    drive(ours, lambda: (mine.step(1e-2), mine.zero()))
    drive(theirs, lambda: (reference.step(), reference.zero_grad()))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert mine.masters["w"] is ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_fp32_masters(dtype):
    """A step far below the parameter's resolution is not lost: it adds up in the master."""
    parameter = nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = MasterOptimizer({"w": parameter}, config())
    for _ in range(100):
        parameter.sum().backward()
        assert parameter.grad is None
        assert optimizer.masters["w"].grad.dtype == torch.float32
        optimizer.step(1e-5)
        optimizer.zero()
    assert optimizer.masters["w"].dtype == torch.float32
    assert torch.allclose(optimizer.masters["w"], torch.full((8,), 1 - 1e-3), atol=2e-5)
    assert torch.equal(parameter, optimizer.masters["w"].to(dtype))


def test_micro_batches_accumulate_in_fp32():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"w": parameter}, config())
    for _ in range(300):  # bf16 stops counting at 256
        parameter.sum().backward()
    assert torch.equal(optimizer.gradients()[0], torch.full((4,), 300.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_continues_bit_identically(dtype):
    def make():
        parameter = nn.Parameter(torch.linspace(-1, 1, 8).to(dtype))
        return parameter, MasterOptimizer({"w": parameter}, config())

    first, one = make()
    drive(first, lambda: (one.step(1e-2), one.zero()))
    second, two = make()
    two.load_state({key: value.clone() for key, value in one.state().items()})
    if dtype == torch.float32:
        with torch.no_grad():
            second.copy_(first)
    drive(first, lambda: (one.step(1e-2), one.zero()))
    drive(second, lambda: (two.step(1e-2), two.zero()))
    assert torch.equal(first, second)


def test_state_of_other_parameters_is_refused():
    optimizer = MasterOptimizer({"w": nn.Parameter(torch.ones(2))}, config())
    with pytest.raises(CheckpointError, match="'v'"):
        optimizer.load_state({"v/exp_avg": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="dtype"):
        optimizer.load_state({"w/master": torch.zeros(2)})


def test_fp16_optimizer_loses_epsilon_but_not_a_large_one():
    """The tutorial's trap: 1e-8 is 0 in fp16."""
    assert torch.tensor(1e-8, dtype=torch.float16) == 0
    assert torch.tensor(1e-5, dtype=torch.float16) > 0
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = MasterOptimizer({"w": parameter}, config(optimizer_dtype="fp16", adam_epsilon=1e-5))
    assert optimizer.masters["w"] is parameter
    (parameter * torch.tensor([0.0, 1.0, 1e-4, 1.0], dtype=torch.float16)).sum().backward()
    optimizer.step(1e-2)
    assert torch.isfinite(parameter).all()


@pytest.mark.parametrize(
    ("schedule", "at", "expected"),
    [
        ("constant", 99, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 99, 1 / 90),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", 0, 0.1),
        ("linear", 4, 0.5),
    ],
)
def test_schedules(schedule, at, expected):
    rate = learning_rate(config(schedule=schedule, warmup_steps=10), at, 100)
    assert rate == pytest.approx(1e-2 * expected)


def test_loss_scale_shrinks_on_overflow_and_grows_slowly():
    scale = LossScale.for_dtype("fp16")
    assert scale.scale == 65536
    scale.shrink()
    assert scale.scale == 32768
    for _ in range(scale.growth_interval):
        scale.grew_after_step(True)
    assert scale.scale == 65536
    assert not LossScale.for_dtype("bf16").can_shrink()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_rates_are_multiples_of_the_learning_rate(optimizer):
    """LoRA+: B learns faster than A; the same as two optimizers of torch."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    ours, theirs = ({name: nn.Parameter(torch.linspace(-1, 1, 8)) for name in "AB"} for _ in range(2))
    mine = MasterOptimizer(ours, config(weight_decay=0.1, optimizer=optimizer), rates={"B": 4.0})
    apart = [MasterOptimizer({name: p}, config(weight_decay=0.1, optimizer=optimizer)) for name, p in theirs.items()]
    for step in range(1, 5):
        for named in (ours, theirs):
            for p in named.values():
                (p * p * step).sum().backward()
        mine.step(1e-2 / step)
        mine.zero()
        for one, rate in zip(apart, (1.0, 4.0), strict=True):
            one.step(rate * 1e-2 / step)
            one.zero()
    for name in "AB":
        assert torch.equal(ours[name], theirs[name])
    assert not torch.equal(ours["A"], ours["B"])
    again = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    resumed = MasterOptimizer(again, config(weight_decay=0.1, optimizer=optimizer), rates={"B": 4.0})
    resumed.load_state({key: value.clone() for key, value in mine.state().items()})
    for named, one in ((ours, mine), (again, resumed)):
        for p in named.values():
            (p * p).sum().backward()
        one.step(1e-2)
    assert all(torch.equal(again[name], ours[name]) for name in "AB")
