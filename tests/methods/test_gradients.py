"""Loss and gradients of every method against PEFT set up by hand, row by row, nothing padded."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fitune.data.batches import pad
from fitune.data.prepare import Row
from fitune.methods.base import trainable
from fitune.training.path import PlainPath
from methods.cases import CPU, apply, randomize

TOLERANCE = 1e-5
ROWS = [
    Row(tuple(5 + (7 * i + number) % 110 for i in range(length)), bytes([0] * 3 + [1] * (length - 3)), f"row {number}")
    for number, length in enumerate((9, 14, 6, 14, 11))
]


def by_hand(kind, bloom):
    """(PEFT's settings, or which parameters of the model are trained)."""
    import peft

    attention = ["query_key_value"] if bloom else ["q_proj", "v_proj"]
    linear = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    linear = linear if bloom else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    scaled = ["query_key_value", "dense_4h_to_h"] if bloom else ["k_proj", "v_proj", "down_proj"]
    lora = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16}
    prompt = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    blocks = "transformer.h.1." if bloom else "model.layers.1."
    end = ("transformer.ln_f.", "transformer.word_embeddings_layernorm.") if bloom else ("model.norm.",)
    return {
        "lora": peft.LoraConfig(**lora, target_modules=attention),
        "lora linear": peft.LoraConfig(**lora, target_modules=linear),
        "rslora": peft.LoraConfig(**lora, target_modules=attention, use_rslora=True),
        "dora": peft.LoraConfig(**lora, target_modules=attention, use_dora=True),
        "prompt": peft.PromptTuningConfig(**prompt),
        "ptuning": peft.PromptEncoderConfig(**prompt, encoder_hidden_size=24),
        "prefix": peft.PrefixTuningConfig(**prompt),
        "prefix projection": peft.PrefixTuningConfig(**prompt, prefix_projection=True, encoder_hidden_size=24),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=scaled, feedforward_modules=scaled[-1:]),
        "freeze": lambda name: name.startswith((blocks, *end)),
        "bitfit": lambda name: name.endswith("bias"),
        "full": lambda name: True,
    }[kind]


def reference(folder, kind):
    """The same model without anything of ours."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = by_hand(kind, "bloom" in str(folder))
    if callable(settings) and not isinstance(settings, peft.PeftConfig):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(settings(name))
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        return peft.get_peft_model(model, settings)


def loss_and_gradients(model):
    """Mean over all supervised tokens, row by row."""
    total = sum(row.num_supervised for row in ROWS)
    loss_sum = 0.0
    for row in ROWS:
        ids = torch.tensor([list(row.input_ids)])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logits = logits[0, -len(row.input_ids) : -1]
        learnt = torch.tensor([bool(flag) for flag in row.learn[1:]])
        loss = F.cross_entropy(logits[learnt], ids[0, 1:][learnt], reduction="sum")
        (loss / total).backward()
        loss_sum += loss.item()
    return loss_sum / total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


KINDS = ("lora", "lora linear", "rslora", "dora", "prompt", "ptuning", "prefix", "prefix projection", "ia3", "freeze",
         "bitfit", "full")  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_plain_libraries(families, family, kind, checkpointing):
    if kind == "bitfit" and family == "llama":
        family = "qwen2"
    if kind.startswith("prefix") and checkpointing:
        pytest.skip("refused before loading")
    theirs = reference(families[family], kind)
    randomize(theirs)
    ours = apply(families[family], kind)
    with torch.no_grad():  # starts differ: ours are drawn from the vocabulary or as PEFT's were, from the same seed
        for name, parameter in trainable(ours).items():
            parameter.copy_(trainable(theirs)[name])
    path = PlainPath(ours, CPU, checkpointing)
    total = sum(row.num_supervised for row in ROWS)
    loss = sum(path.loss_and_grad(pad(ROWS[at : at + 2], 2), 1 / total).item() for at in range(0, 5, 2)) / total
    expected_loss, expected = loss_and_gradients(theirs)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    gradients = {name: p.grad for name, p in trainable(ours).items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        size = expected[name].norm()
        assert size > 0, name
        # Biases of keys have no gradient but rounding: softmax does not see a shift of all scores.
        assert (gradient - expected[name]).norm() <= TOLERANCE * size + 1e-7, name
