"""One vector for all adapters is the same AdamW, and checkpoints are the same files."""

import pytest
import torch
from torch import nn

from fitune.config import TrainConfig
from fitune.training.optim import MasterOptimizer


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in {"b": (3, 4), "a": (7,)}.items()
    }


def in_one_vector(named):
    order = [named["a"], named["b"]]  # another order than the names'
    values = torch.cat([p.detach().flatten() for p in order])
    gradient, at = torch.zeros_like(values), 0
    for p in order:
        p.data, p.grad = values[at : at + p.numel()].view(p.shape), gradient[at : at + p.numel()].view(p.shape)
        at += p.numel()
    return values, gradient, order


def train(optimizer, named, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in named.values():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
        assert optimizer.gradients()  # collects them, as the loop does for their norm
        optimizer.step(1e-2)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_same_values_and_states(weight_decay):
    config = TrainConfig(learning_rate=1e-2, weight_decay=weight_decay)
    apart, together = parameters(0), parameters(0)
    one = MasterOptimizer(apart, config)
    vectors = in_one_vector(together)
    two = MasterOptimizer(together, config, vectors)
    train(one, apart, 4)
    train(two, together, 4)
    assert len(two.gradients()) == 1
    places = [p.grad.data_ptr() for p in together.values()]
    two.zero()  # in place: captured graphs add to these very gradients
    assert not vectors[1].any()
    assert [p.grad.data_ptr() for p in together.values()] == places
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-6, atol=0)  # a CPU rounds ends of vectors apart
    assert one.state().keys() == two.state().keys()
    for name, value in one.state().items():
        torch.testing.assert_close(two.state()[name], value, rtol=1e-6, atol=0)
    resumed = parameters(0)
    with torch.no_grad():
        for name, p in resumed.items():
            p.copy_(apart[name])
    again = MasterOptimizer(resumed, config, in_one_vector(resumed))
    again.load_state({name: value.clone() for name, value in one.state().items()})
    train(one, apart, 3, seed=9)
    train(again, resumed, 3, seed=9)
    for name in apart:
        torch.testing.assert_close(resumed[name], apart[name], rtol=1e-6, atol=0)


def test_other_optimizers_keep_parameters_apart():
    named = parameters(0)
    optimizer = MasterOptimizer(
        named, TrainConfig(learning_rate=1e-2, optimizer_dtype="bf16", adam_epsilon=1e-5), in_one_vector(named)
    )
    train(optimizer, named, 1)
    assert len(optimizer.masters) == 2
    assert all(m.dtype == torch.bfloat16 for m in optimizer.masters.values())


def test_parameters_with_rates_of_their_own_are_updated_apart():
    config = TrainConfig(learning_rate=1e-2)
    apart, together = parameters(0), parameters(0)
    one = MasterOptimizer(apart, config, rates={"b": 3.0})
    two = MasterOptimizer(together, config, in_one_vector(together), {"b": 3.0})
    train(one, apart, 4)
    train(two, together, 4)
    assert len(two.gradients()) == 2
    assert all(torch.equal(together[name], apart[name]) for name in apart)
