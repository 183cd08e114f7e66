"""Quantized linear layers: the bytes of bitsandbytes, exact gradients, PEFT's adapters on them, loading."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fitune.config import build
from fitune.errors import ConfigError
from fitune.kernels import fp8
from fitune.kernels.int8 import llm_int8
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model import quantizers
from fitune.model.families import linear_names
from fitune.model.load import count_parameters, load_base
from fitune.model.quantize import QUANTIZATIONS, QuantLinear, emulation_note, quantize_blocks, use_int8
from fitune.plan.budget import unused_bytes
from tiny import make_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 20, 33, 7, 2]])
# Whole blocks, blocks that run over rows, odd counts, one weight, more than 256 blocks.
SHAPES = [(64, 64), (1, 64), (3, 65), (7, 33), (1, 1), (130, 1000), (512, 128)]


def weights(shape, kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[0])
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "ties":  # many values halfway between two codes
        return (torch.randint(-8, 9, shape, generator=generator) / 8).to(dtype)
    weight = torch.randn(shape, generator=generator) * 0.02
    return (weight * torch.randint(0, 2, shape, generator=generator) if kind == "sparse" else weight).to(dtype)


def same_bytes(one, two):
    return one.dtype == two.dtype and torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def bitsandbytes():
    # HF_HUB_OFFLINE (tests/conftest.py) keeps its import from asking a hub for kernels of some CPUs.
    return pytest.importorskip("bitsandbytes", reason="compares bytes with bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "sparse", "zeros", "ties"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_bitsandbytes(bitsandbytes, shape, kind, dtype):
    functional = bitsandbytes.functional
    weight = weights(shape, kind, dtype)
    for name in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type=name, blocksize=64)
        ours = QuantLinear(weight, None, name)
        assert torch.equal(ours.codes, packed.view(-1))
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
        assert torch.equal(ours.table, state.code)
        assert torch.equal(ours.absmax_table, state.state2.code)
        if weight.shape[1] % 2 == 0:  # bitsandbytes' own unpacking on CPU is exact for these
            theirs = functional.dequantize_4bit(packed, state)
            torch.testing.assert_close(ours.weight, theirs, rtol=torch.finfo(dtype).eps, atol=0)
    codes, scale, _ = functional.int8_vectorwise_quant(weight.clone())
    ours = QuantLinear(weight, None, "int8")
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.dequantize(torch.float32), functional.int8_vectorwise_dequant(codes, scale))


def test_the_absmax_table_is_a_set_of_decades():
    table = quantizers.absmax_table()
    assert table.shape == (256,)
    assert (table.diff() > 0).all()
    assert table[-1] == 1
    assert torch.equal(table[table < 0].abs().sort().values, table[(table > 0) & (table < 1)])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_make_no_difference(monkeypatch, shape, quantization):
    weight = weights(shape, "normal")
    whole = QuantLinear(weight, None, quantization)
    monkeypatch.setattr(quantizers, "SLICE", 128)
    parts = QuantLinear(weight, None, quantization)
    for (name, first), (_, second) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        assert same_bytes(first, second), name


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.009), ("nf4", 0.10), ("fp4", 0.125), ("fp8", 0.03)])
def test_errors_and_sizes(quantization, error):
    weight = weights((512, 1024), "normal")
    layer = QuantLinear(weight, None, quantization)
    assert 0.2 * error < (layer.weight - weight).norm() / weight.norm() < error
    per_weight = sum(b.nbytes for name, b in layer.named_buffers() if "table" not in name) / weight.numel()
    assert per_weight == pytest.approx(0.516 if quantization in ("nf4", "fp4") else 1.004, rel=1e-3)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_page_says_what_is_measured(quantization):
    """The table of docs/quantization.md: bytes per weight, errors of weights and of products."""
    page = (Path(__file__).parent.parent.parent / "docs" / "quantization.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{quantization}` |")]
    stated = [float(cell.strip(" %")) for cell in row.strip("|").split("|")[2:5]]
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1024, 4096, generator=generator) * 0.02, torch.randn(64, 4096, generator=generator)
    layer = QuantLinear(weight, None, quantization)
    measured = [
        sum(b.nbytes for name, b in layer.named_buffers() if "table" not in name) / weight.numel(),
        100 * ((layer.weight - weight).norm() / weight.norm()).item(),
        100 * ((layer(x) - x @ weight.T).norm() / (x @ weight.T).norm()).item(),
    ]
    assert stated == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_weight_only_layers_are_their_expanded_weight(quantization, dtype):
    layer = QuantLinear(weights((24, 40), "normal", dtype), torch.randn(24, dtype=dtype), quantization)
    layer.bias.requires_grad_(True)
    plain = nn.Linear(40, 24, dtype=dtype)
    plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    plain.bias = nn.Parameter(layer.bias.detach().clone())
    x = torch.randn(2, 3, 40, dtype=dtype)
    results = []
    for module in (layer, plain):
        own = x.clone().requires_grad_(True)
        y = module(own)
        y.backward(torch.ones_like(y).cumsum(-1))
        results.append((y, own.grad, module.bias.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    y = layer(x)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llm_int8_has_the_gradient_of_the_expanded_weight(dtype):
    layer = QuantLinear(weights((24, 40), "normal", dtype), torch.randn(24, dtype=dtype), "int8")
    layer.bias.requires_grad_(True)
    use_int8(layer, "llm_int8", 2.0)
    assert "quantization=int8, compute=llm_int8, threshold=2" in repr(layer)
    x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.ones_like(y).cumsum(-1)
    y.backward(dy)
    assert torch.equal(x.grad, dy @ layer.dequantize(dtype))
    assert torch.equal(layer.bias.grad, dy.flatten(0, 1).sum(0))
    expected = llm_int8(x.detach().view(6, 40), layer.codes, layer.scale, layer.bias.detach(), 2.0)
    assert torch.equal(y.detach().view(6, 24), expected)
    exact = F.linear(x, layer.dequantize(dtype), layer.bias)
    assert 1e-4 < (y - exact).norm() / exact.norm() < 0.02


def test_only_int8_layers_have_two_computations():
    model = nn.Sequential(*(QuantLinear(weights((8, 64), "normal"), None, name) for name in QUANTIZATIONS))
    use_int8(model, "llm_int8", 6.0)
    assert [layer.compute == "llm_int8" for layer in model] == [name == "int8" for name in QUANTIZATIONS]


def test_fp8_follows_the_formulas():
    """Row-quantized inputs and gradients, emulated here in float64 with the rounding of a cast."""

    def rounded(x_TK):
        scale_T1 = (x_TK.abs().amax(1, keepdim=True) / 448).float().double()
        return (x_TK / scale_T1).float().clamp(-448, 448).to(fp8.E4M3).double() * scale_T1

    layer = QuantLinear(weights((24, 40), "normal"), torch.randn(24), "fp8")
    weight_NK = layer.codes.double() * layer.scale.double()[:, None]
    x = torch.randn(5, 40, requires_grad=True)
    dy_TN = torch.randn(5, 24)
    y = layer(x)
    y.backward(dy_TN)
    torch.testing.assert_close(
        y.double(), rounded(x.detach().double()) @ weight_NK.T + layer.bias, rtol=1e-5, atol=1e-6
    )
    # The scales of the weight's rows belong to the columns of the gradient, before it is rounded.
    expected = rounded(dy_TN.double() * layer.scale.double()) @ layer.codes.double()
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-6)
    exact = dy_TN.double() @ weight_NK
    assert 0.005 < (x.grad - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_nothing_is_saved_for_the_backward(quantization):
    layer = QuantLinear(weights((24, 40), "normal"), None, quantization)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(torch.randn(3, 40, requires_grad=True))
    assert y.requires_grad
    assert not saved


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_rows_without_gradient_and_odd_strides(quantization):
    layer = QuantLinear(weights((24, 40), "normal"), None, quantization)
    x = torch.randn(40, 3).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer(torch.randn(40)).shape == (24,)
    y = layer(x.requires_grad_(True))
    y.sum().backward()  # an expanded gradient: strides of 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_conversion_leaves_the_codes_alone(quantization):
    layer = QuantLinear(weights((24, 64), "normal"), torch.randn(24), quantization)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    for (name, old), (_, new) in zip(layer.named_buffers(), half.named_buffers(), strict=True):
        assert same_bytes(old, new), name
    assert half.bias.dtype == half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, layer.weight.bfloat16())
    assert layer.weight.dtype == torch.float32


def test_the_weight_cannot_be_replaced():
    layer = QuantLinear(weights((8, 64), "normal"), None, "nf4")
    for value in (nn.Parameter(torch.zeros(8, 64)), torch.zeros(8, 64)):
        with pytest.raises((KeyError, AttributeError)):
            layer.weight = value
    assert [name for name, _ in layer.named_parameters()] == []
    assert "quantization=nf4" in repr(layer)


def test_an_unknown_quantization():
    with pytest.raises(ConfigError, match="quantization is 'int3'; allowed: int8, nf4, fp4, fp8"):
        QuantLinear(torch.zeros(8, 64), None, "int3")


@pytest.mark.parametrize("family", ["tiny", "tiny_qwen"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_linear_layers_of_the_blocks_are_quantized(family, quantization, request):
    folder = request.getfixturevalue(family)
    plain, base = load_base(folder, "bf16", CPU), load_base(folder, "bf16", CPU, quantization)
    assert base.fingerprint == plain.fingerprint
    assert count_parameters(base.model) == count_parameters(plain.model)
    assert linear_names(base.model) == linear_names(plain.model)
    assert not base.model.training
    kinds = {name: type(module) for name, module in base.model.named_modules()}
    for name, module in plain.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            expected = QuantLinear(module.weight, module.bias, quantization)
            assert kinds[name] is QuantLinear
            assert torch.equal(base.model.get_submodule(name).weight, expected.weight)
        else:
            assert kinds[name] is type(module)
    head, embedding = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == base.model.config.tie_word_embeddings
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in base.model.parameters())
    note = emulation_note(base.model)
    assert (note is not None) == (quantization == "fp8")
    assert note is None or "emulated in 14 of 14 layers" in note


def test_bin_files_are_quantized_too(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = shutil.copytree(tiny, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    one, two = (load_base(path, "fp32", CPU, "nf4").model.state_dict() for path in (tiny, folder))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_model_without_the_usual_layers_is_refused(tmp_path):
    folder = make_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel have no linear layers .* use model\.quantization=none"):
        load_base(folder, "fp32", CPU, "int8")


def apply(model_folder, quantization, **keys):
    method = {"name": "lora", "r": 4, "target_modules": "linear", **keys}
    config = build({"model": {"path": str(model_folder)}, "method": method}).method
    torch.manual_seed(0)
    model = METHODS["lora"].apply(load_base(model_folder, "fp32", CPU, quantization), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable(model).values():  # B = 0 would leave A without gradient
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def expanded(model):
    """The same model with every quantized layer replaced by its expanded weight."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(module.weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
    return model


def gradients(model):
    model.train()
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    F.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    return torch.cat([p.grad.flatten() for p in trainable(model).values()])


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["tiny", "tiny_qwen"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_adapters_get_the_gradients_of_the_expanded_model(family, quantization, request):
    model = apply(request.getfixturevalue(family), quantization)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    plain = expanded(model)
    expected, before = gradients(plain), gradients(model)
    tolerance = 0.3 if quantization == "fp8" else 1e-5  # fp8 rounds activations too
    assert (before - expected).norm() / expected.norm() <= tolerance
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert error <= (0.1 if quantization == "fp8" else 1e-6)
    after = gradients(model)
    assert torch.equal(after, before), "an evaluation changed the gradients"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_adapters_are_saved_and_loaded_bit_equal(quantization, tiny, tmp_path):
    model = apply(tiny, quantization)
    METHODS["lora"].save(model, tmp_path, {"base_model": "tiny", "base_fingerprint": "abc"})
    fresh = apply(tiny, quantization)
    with torch.no_grad():
        for parameter in trainable(fresh).values():
            parameter.zero_()
    assert not torch.equal(logits(fresh), logits(model))
    METHODS["lora"].load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_peft_opens_the_adapter_on_the_full_base(tiny, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    model = apply(tiny, "int8")
    METHODS["lora"].save(model, tmp_path, {"base_model": "tiny", "base_fingerprint": "abc"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    error = (logits(model) - logits(theirs)).norm() / logits(theirs).norm()
    assert 0 < error < 0.02


def test_merging_into_quantized_weights_is_refused(tiny):
    with pytest.raises(ConfigError, match="cannot be merged into quantized weights"):
        METHODS["lora"].merge(apply(tiny, "nf4"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_gpu_makes_the_same_bytes_with_little_memory(quantization):
    """Six blocks with 308 million weights: at no time more than the result and 100 MB are on the GPU."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=16, vocab_size=1000
    )
    cuda = torch.device("cuda")
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    expected = copy.deepcopy(model)
    quantize_blocks(expected, quantization, CPU)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    quantize_blocks(model, quantization, cuda)
    final = torch.cuda.memory_allocated()
    assert torch.cuda.max_memory_allocated() - final <= 100e6
    stored = dict(model.named_buffers(remove_duplicate=False))  # a constant table may be one tensor of all layers
    on_gpu = [buffer for buffer in stored.values() if buffer.is_cuda]
    slack = 2**20 * len(on_gpu)  # the allocator hands out a whole block where less than 1 MiB of it would be left
    assert final - start < sum(buffer.nbytes for buffer in on_gpu) + slack
    for (name, ours), cpu in zip(
        stored.items(), dict(expected.named_buffers(remove_duplicate=False)).values(), strict=True
    ):
        if "rotary" not in name:
            assert same_bytes(ours.cpu(), cpu), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_on_a_gpu_codes_do_not_lie_in_memory_of_slices(quantization):
    """Codes of 16 MiB, for which a free segment of 20 is large enough, and scales of 1.75 MB."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=27392, num_hidden_layers=4, num_attention_heads=32, vocab_size=1000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    quantize_blocks(model, quantization, torch.device("cuda"))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert held - start <= unused_bytes(config.num_hidden_layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_gpu_layer_follows_the_cpu_layer(quantization):
    weight = weights((512, 1024), "normal", torch.bfloat16)
    layer = QuantLinear(weight, torch.randn(512).bfloat16(), quantization)
    x = torch.randn(33, 1024).bfloat16()
    results = []
    for device in ("cpu", "cuda"):
        module, own = copy.deepcopy(layer).to(device), x.to(device).detach().requires_grad_(True)
        y = module(own)
        y.backward(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).bfloat16())
        results.append((y.cpu().double(), own.grad.cpu().double()))
    for cpu, gpu in zip(*results, strict=True):
        assert (gpu - cpu).norm() / cpu.norm() < 5e-3
