"""On int8, nf4 and fp4 weights every method has the gradients of the dequantized model, before and after evaluating."""

import pytest
import torch

from fitune.data.batches import pad
from fitune.data.prepare import Row
from fitune.infer.generate import Sampling, generate
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.quantize import QuantLinear, unread_weights
from fitune.training.path import PlainPath
from methods.cases import CPU, KINDS, base, dequantize, randomize, section

TOLERANCE = 1e-5
ROWS = [Row(tuple(range(5, 17)), bytes([0] * 2 + [1] * 10), "a"), Row(tuple(range(40, 49)), bytes([0] + [1] * 8), "b")]
CASES = [
    *(("qwen2", kind) for kind in ("lora", "lora linear", "rslora", "dora", "whole head", "bitfit", "freeze patterns")),
    *(("qwen2", kind) for kind in ("prompt", "ptuning", "prefix", "prefix projection", "ia3 linear")),
    *(("bloom", kind) for kind in ("lora linear", "bitfit", "prompt", "ia3")),
]  # fmt: skip


def gradients(path):
    for parameter in trainable(path.model).values():
        parameter.grad = None
    loss = path.loss_and_grad(pad(ROWS, 2), 0.1).item()
    return loss, {name: p.grad.clone() for name, p in trainable(path.model).items()}


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gradients_are_those_of_the_dequantized_model(families, family, kind, quantization):
    method, config = METHODS[KINDS[kind]["name"]], section(kind)
    bases = [base(families[family], quantization=quantization) for _ in range(2)]
    dequantize(bases[1].model)
    paths = []
    for one in bases:
        torch.manual_seed(0)
        model = method.apply(one, config)
        randomize(model)
        paths.append(PlainPath(model, CPU))
    stored, full = paths
    assert any(isinstance(module, QuantLinear) for module in stored.model.modules())
    for moment in ("before", "after"):
        (loss, found), (expected_loss, expected) = gradients(stored), gradients(full)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE), moment
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert expected[name].norm() > 0, name
            error = (gradient - expected[name]).norm()
            assert error <= TOLERANCE * expected[name].norm() + 1e-7, f"{name} {moment}: {error}"
        stored.loss(pad(ROWS, 2))
        generate(stored.model, [[5, 6, 7], [8]], [2], Sampling(max_new_tokens=3))


@pytest.mark.parametrize("kind", ["lora linear", "rslora", "whole head", "ia3 linear", "dora"])
def test_weights_are_expanded_only_for_their_values(families, kind, monkeypatch):
    """PEFT asks each layer for its weight again and again while it wraps a model."""
    asked = []
    expand = QuantLinear.dequantize
    monkeypatch.setattr(QuantLinear, "dequantize", lambda layer, dtype: asked.append(layer) or expand(layer, dtype))
    one, config = base(families["qwen2"], quantization="int8"), section(kind)
    model = METHODS[config.name].apply(one, config)
    adapted = sum(hasattr(module, "base_layer") for module in model.modules())
    assert adapted >= 4
    if kind == "dora":
        assert len(set(asked)) == adapted
    else:
        assert not asked
    randomize(model)
    assert torch.isfinite(PlainPath(model, CPU).loss(pad(ROWS, 2)))
    assert asked, "training reads them"


def test_weights_are_read_again_after_an_error(families):
    one = base(families["qwen2"], quantization="int8")
    layer = next(module for module in one.model.modules() if isinstance(module, QuantLinear))
    with unread_weights():
        assert layer.weight.isnan().all()
        assert (layer.weight.shape, layer.weight.dtype) == ((layer.out_features, layer.in_features), layer.dtype)
        assert layer.weight.untyped_storage().nbytes() == layer.dtype.itemsize
    assert layer.weight.isfinite().all()
    with pytest.raises(KeyError), unread_weights():
        raise KeyError
    assert layer.weight.isfinite().all()
