"""The plain path against transformers + PEFT used by hand: same loss, same gradients, however a batch is cut."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fitune.config import build
from fitune.data.batches import micro_batches
from fitune.data.prepare import prepare
from fitune.data.tokenizer import Tokenizer
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.load import load_base
from fitune.training.path import PlainPath

CPU = torch.device("cpu")
TOLERANCE = 1e-5


def randomize(model):
    """A and B random and non-zero: with B = 0 the gradient of A is 0 and proves nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def reference(folder, rows, targets):
    """Row by row, nothing padded or packed, mean over all supervised tokens."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        model = peft.get_peft_model(model, config)
    randomize(model)
    total = sum(sum(row.learn[1:]) for row in rows)
    loss_sum = 0.0
    for row in rows:
        ids = torch.tensor([list(row.input_ids)])
        logits = model(input_ids=ids).logits[0, :-1]
        learnt = torch.tensor([bool(flag) for flag in row.learn[1:]])
        loss = F.cross_entropy(logits[learnt], ids[0, 1:][learnt], reduction="sum")
        (loss / total).backward()
        loss_sum += loss.item()
    return loss_sum / total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


TARGETS = {"tiny": ["q_proj", "v_proj", "down_proj"], "tiny_bloom": ["query_key_value", "dense_4h_to_h"]}


@pytest.mark.parametrize("family", ["tiny", "tiny_qwen", "tiny_bloom"])
@pytest.mark.parametrize(
    ("packing", "micro"), [(False, 8), (False, 1), (False, 2), (False, 3), (True, 1000), (True, 70)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_plain_libraries(family, packing, micro, checkpointing, rows_file, request):
    folder, targets = request.getfixturevalue(family), TARGETS.get(family, TARGETS["tiny"])
    key = "micro_batch_tokens" if packing else "micro_batch_rows"
    config = build(
        {
            "model": {"path": str(folder)},
            "method": {"name": "lora", "r": 4, "target_modules": targets},
            "data": {"train": [str(rows_file)], "template": "tutorial", "max_length": 64, "packing": packing},
            "train": {key: micro, "activation_checkpointing": checkpointing},
        }
    )
    rows = prepare(config.data, Tokenizer.load(folder)).train[:8]
    assert len({row.num_tokens for row in rows}) > 2, "rows of one length would test no padding"
    model = METHODS["lora"].apply(load_base(folder, "fp32", CPU), config.method)
    randomize(model)
    path = PlainPath(model, CPU, checkpointing)
    total = sum(row.num_supervised for row in rows)
    batches = list(micro_batches(rows, config.data, config.train, pad_id=2))
    loss = sum(path.loss_and_grad(batch, 1 / total).item() for batch in batches) / total

    expected_loss, expected = reference(folder, rows, targets)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    gradients = {name: p.grad for name, p in trainable(model).items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= TOLERANCE, f"{name}: {error}"
    if packing and micro == 1000:
        assert len(batches) == 1


def test_the_loss_does_not_depend_on_the_pad_id(tiny, rows_file):
    """pad may equal eos: padding is masked by length."""
    config = build({"model": {"path": str(tiny)}, "data": {"train": [str(rows_file)], "template": "tutorial"}})
    rows = prepare(config.data, Tokenizer.load(tiny)).train[:4]
    path = PlainPath(load_base(tiny, "fp32", CPU).model, CPU)
    losses = {
        pad: [path.loss(batch).item() for batch in micro_batches(rows, config.data, config.train, pad)]
        for pad in (0, 2, 50)
    }
    assert losses[0] == losses[2] == losses[50]
