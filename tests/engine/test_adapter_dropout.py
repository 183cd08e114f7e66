"""Dropout on the adapters' input: the engine against PEFT's forward with the same masks, and when masks change."""

import pytest
import torch
from torch import nn

from engine_models import CONFIGS, NEEDS_CUDA, TARGETS, difference, make, make_rows, run, targets_of
from fitune.data.batches import pack
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported, base_of
from fitune.kernels.dropout import keeps
from fitune.methods.base import trainable
from fitune.plan.saves import LEVELS
from fitune.training.path import PlainPath

P = 0.3


class Masked(nn.Module):
    """Stands where PEFT's nn.Dropout stood: multiplies by the mask the engine's group has now."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        self.dropped = 0

    def forward(self, x):
        kept = keeps(self.mask, x.shape[-2], x.shape[-1])
        self.dropped += int((~kept).sum())
        return x * kept / (1 - P)


def with_masks_of(engine, model):
    """The same model for the plain path; the masks it was given."""
    masks = []
    for layer, block in zip(engine.layers, engine.blocks, strict=True):
        groups = {path: block.groups[name] for name, paths in block.spec.names().items() for path in paths}
        for name, module in layer.named_modules():
            if hasattr(module, "lora_dropout"):
                group = groups[name]
                module.lora_dropout["default"] = Masked(group.mask)
                masks.append(module.lora_dropout["default"])
    assert masks
    return masks


def seeded(engine, model, batch, seed):
    torch.manual_seed(seed)
    return run(engine, model, batch)


def check(model, engine, bound, seed=7, gradients=None):
    """The engine's masks stay as its last micro-step set them, so the plain path runs after it."""
    batch = pack(make_rows([17, 5, 30, 2]))
    loss, fast = seeded(engine, model, batch, seed)
    masks = with_masks_of(engine, model)
    plain_loss, plain = run(PlainPath(model, engine.device), model, batch)
    assert all(mask.dropped for mask in masks)
    assert loss == pytest.approx(plain_loss, rel=bound)
    for name in plain:
        assert difference(fast[name], plain[name]) <= (gradients or bound), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["llama", "glm"])
def test_equal_to_the_plain_path_with_the_same_masks(kind, targets, level):
    model, model_type = make(kind, targets_of(kind, targets), dropout=P)
    check(model, EnginePath(model, model_type, level, 64, 128), 1e-5)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("llama", "glm")])
def test_other_families(kind):
    model, model_type = make(kind, dropout=P)
    check(model, EnginePath(model, model_type, "full", 64, 128), 1e-5)


@pytest.mark.parametrize("level", ["none", "full"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp8"])
def test_quantized_weights(quantization, level):
    model, model_type = make("qwen2", quantization=quantization, dropout=P)
    check(model, EnginePath(model, model_type, level, 64, 128), 0.08 if quantization == "fp8" else 1e-5)


def test_upper_layers_only():
    """Frozen adapters below drop as well, and nothing is computed below the lowest trained one."""
    model, model_type = make("llama", dropout=P)
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or ".layers.1." in name:
            parameter.requires_grad_(False)
    check(model, EnginePath(model, model_type, "elementwise", 64, 128), 1e-5)


def test_every_group_of_every_block_has_its_own_mask():
    model, model_type = make("llama", dropout=P)
    engine = EnginePath(model, model_type, "full", 64, 128)
    streams = [group.mask.stream for block in engine.blocks for group in block.groups.values()]
    assert len(set(streams)) == 4 * len(engine.blocks)


@pytest.mark.parametrize("level", LEVELS)
def test_the_seed_decides(level):
    """The loop seeds each micro-step: the same seed repeats it bit by bit, on a new engine too."""
    batch = pack(make_rows([17, 5, 30, 2]))
    model, model_type = make("qwen3", dropout=P)
    engine = EnginePath(model, model_type, level, 64, 128)
    loss, gradients = seeded(engine, model, batch, 3)
    second, _ = run(engine, model, batch)  # not seeded again: the generator has moved on
    other, _ = seeded(engine, model, batch, 4)
    assert len({loss, second, other}) == 3
    model, model_type = make("qwen3", dropout=P)
    for path in (engine := EnginePath(model, model_type, level, 8, 128), engine):
        again, repeated = seeded(path, model, batch, 3)
        assert again == loss
        for name in gradients:
            assert torch.equal(gradients[name], repeated[name]), name


def test_nothing_is_dropped_in_evaluation():
    batch = pack(make_rows([17, 5, 30]))
    without, model_type = make("llama")
    expected = EnginePath(without, model_type, "full", 64, 128).loss(batch)
    model, model_type = make("llama", dropout=P)
    engine = EnginePath(model, model_type, "full", 64, 128)
    state = torch.get_rng_state()
    assert torch.equal(engine.loss(batch), expected)
    assert torch.equal(torch.get_rng_state(), state)
    trained, _ = run(engine, model, batch)
    assert trained != expected.item()
    assert torch.equal(engine.loss(batch), expected)


def test_without_dropout_nothing_is_drawn():
    model, model_type = make("llama")
    engine = EnginePath(model, model_type, "full", 64, 128)
    state = torch.get_rng_state()
    run(engine, model, pack(make_rows([17, 5])))
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.dropout is None
    assert all(group.mask is None for block in engine.blocks for group in block.groups.values())


def test_the_gradient_is_that_of_the_mean_on_average():
    """Over many masks the loss's gradient by B of the last projection is close to that without dropout."""
    batch = pack(make_rows([30]))
    model, model_type = make("llama", ["down_proj"])
    with torch.no_grad():  # at B = 0 dropout does not act on the loss, so dB is linear in the mask
        for name, parameter in trainable(model).items():
            if ".lora_B." in name:
                parameter.zero_()
    exact = run(EnginePath(model, model_type, "full", 64, 128), model, batch)[1]
    model, model_type = make("llama", ["down_proj"], dropout=P)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if ".lora_B." in name:
                parameter.zero_()
    engine = EnginePath(model, model_type, "full", 64, 128)
    found = [seeded(engine, model, batch, seed)[1] for seed in range(100)]
    for name in exact:
        if ".lora_B." in name:
            one = difference(found[0][name], exact[name])
            mean = difference(sum(gradients[name] for gradients in found) / len(found), exact[name])
            assert mean < 2 * one / len(found) ** 0.5
            assert one > 0.05, "nothing was dropped"


def test_dropout_that_is_not_the_same_everywhere_is_named():
    model, model_type = make("llama", dropout=P)
    module = base_of(model).model.layers[1].self_attn.q_proj
    module.lora_dropout["default"] = nn.Dropout(0.5)
    with pytest.raises(Unsupported, match=r"adapters with different dropout: \[0.3, 0.5\]"):
        EnginePath(model, model_type, "full", 8, 8)
    module.lora_dropout["default"] = nn.AlphaDropout(P)
    with pytest.raises(Unsupported, match="AlphaDropout on the adapters' input"):
        EnginePath(model, model_type, "full", 8, 8)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_on_a_gpu(quantization, level):
    """Captured graphs follow the seed and the switch to evaluation; masks are those of the CPU.

    The bound of gradients is rounding's, also against the plain path of the same GPU: each path is 3e-6 from fp64 on a
    CPU, noise of one unit in the last place of the weights moves a gradient here by up to 6e-6, and a GPU's exp2 and
    rsqrt are coarser (1.2e-5 seen).
    Products in tf32 would move every gradient by 2e-3 and more, one wrong element of one mask by 1e-3.
    """
    batch = pack(make_rows([17, 5, 30, 2]))
    model, model_type = make("llama", quantization=quantization, dropout=P)
    slow = EnginePath(model, model_type, level, 64, 128)
    expected = {seed: seeded(slow, model, batch, seed) for seed in (1, 2)}
    evaluated = slow.loss(batch).item()
    model, model_type = make("llama", quantization=quantization, dropout=P)
    model.cuda()
    engine = EnginePath(model, model_type, level, 512, 128)
    for seed in (1, 2, 1):
        loss, gradients = seeded(engine, model, batch, seed)
        assert loss == pytest.approx(expected[seed][0], rel=1e-5)
        for name in gradients:
            assert difference(gradients[name].cpu(), expected[seed][1][name]) < 3e-5, name
        assert engine.loss(batch).item() == pytest.approx(evaluated, rel=1e-5)
    check(model, engine, 1e-5, gradients=3e-5)
