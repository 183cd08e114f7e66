"""Every family on int8, nf4, fp4: LoRA's gradients are the dequantized model's, before and after an evaluation."""

import pytest
import torch

from fitune.config import build
from fitune.data.batches import pad
from fitune.data.prepare import prepare
from fitune.data.tokenizer import Tokenizer
from fitune.engine.path import EnginePath
from fitune.infer.generate import Sampling, generate
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.load import load_base
from fitune.model.quantize import is_quantized
from fitune.training.path import PlainPath
from matrix.cells import FAMILIES, MAX_LENGTH, Cell
from methods.cases import CPU, dequantize, randomize

pytest.importorskip("sentencepiece")
TOLERANCE = 1e-5


def gradients(path, model, batch):
    for parameter in trainable(model).values():
        parameter.grad = None
    loss = path.loss_and_grad(batch, 0.1).item()
    return loss, {name: p.grad.clone() for name, p in trainable(model).items()}


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_an_evaluation(family, quantization, path, models, four_rows):
    tree = Cell(family, "lora", "fp32", False).tree(models[family], four_rows, "unused")
    tree["method"]["target_modules"] = "linear"
    config = build(tree)
    rows = prepare(config.data, Tokenizer.load(models[family])).train
    bases = [load_base(models[family], "fp32", CPU, quantization) for _ in range(2)]
    dequantize(bases[1].model)
    adapted = []
    for base in bases:
        torch.manual_seed(0)
        adapted.append(METHODS["lora"].apply(base, config.method))
        randomize(adapted[-1], scale=0.1)
    model, expanded = adapted
    assert is_quantized(model)
    assert not is_quantized(expanded)
    batch = pad(rows[:3], 2)
    loss, expected = gradients(PlainPath(expanded, CPU), expanded, batch)
    runs = PlainPath(model, CPU)
    if path == "fast":
        runs = EnginePath(model, bases[0].model_type, "elementwise", 4 * MAX_LENGTH, MAX_LENGTH)
    for moment in ("before", "after"):
        found_loss, found = gradients(runs, model, batch)
        assert found_loss == pytest.approx(loss, rel=TOLERANCE), moment
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error <= TOLERANCE, f"{name} {moment}: {error}"
        runs.loss(pad(rows, 2))
        generate(model, [list(rows[0].input_ids[:5])], [2], Sampling(max_new_tokens=3))
