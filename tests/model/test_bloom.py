"""BLOOM with our attention against transformers' own: the same function, exact padding and packing, less memory."""

import copy
import json
from array import array

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.models.bloom.modeling_bloom import BloomForCausalLM as Stock
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from fitune.config import build
from fitune.data.batches import pack
from fitune.data.rows import Row
from fitune.infer.generate import Sampling, generate
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.bloom import BloomForCausalLM, alibi_bias, alibi_slopes
from fitune.model.libraries import import_peft
from fitune.model.load import load_base
from fitune.training.path import check_packing, enable_checkpointing

CPU = torch.device("cpu")
HEADS, VOCABULARY = 6, 131  # six heads: slopes of a number that is no power of two
TOLERANCE = 1e-5


def make(width=96):
    """The same random weights in transformers' class and in ours."""
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        n_layer=3,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    stock, ours = Stock(config).eval(), BloomForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.12) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.fixture(scope="module")
def pair():
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(4, VOCABULARY, (3, 45), generator=torch.Generator().manual_seed(1))


def padded(kind):
    mask = torch.ones(3, 45, dtype=torch.int64)
    if kind == "right":
        mask[0, 30:], mask[2, 1:] = 0, 0
    elif kind == "left":
        mask[0, :30], mask[2, :44] = 0, 0
    elif kind == "both, and a hole":
        mask[0, :3], mask[0, 40:], mask[2, 10:30] = 0, 0, 0
    return mask


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 16, 112])
def test_slopes_are_those_of_transformers(heads):
    stock = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), stock, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["none", "right", "left", "both, and a hole"])
def test_logits_equal_transformers(pair, ids, kind):
    mask = None if kind == "none" else padded(kind)
    with torch.no_grad():
        expected, found = (model(ids, attention_mask=mask).logits for model in pair)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert found.isfinite().all()
    assert (found - expected)[real].abs().max() <= TOLERANCE < expected.abs().max() * 1e-4


@pytest.mark.parametrize("kind", ["none", "left"])
def test_cached_steps_equal_transformers(pair, ids, kind):
    """A prompt of 30 tokens, then one token at a time."""
    mask = None if kind == "none" else padded(kind)
    if mask is not None:
        mask[2, :44], mask[2, :20] = 1, 0
    logits = []
    for model in pair:
        with torch.no_grad():
            out = model(ids[:, :30], attention_mask=None if mask is None else mask[:, :30], use_cache=True)
            steps = [out.logits[:, -1:]]
            for t in range(30, 45):
                seen = None if mask is None else mask[:, : t + 1]
                out = model(ids[:, t : t + 1], attention_mask=seen, past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
        logits.append(torch.cat(steps, 1))
    rows = slice(None) if mask is None else mask[:, 29:].bool()
    assert (logits[0] - logits[1])[rows].abs().max() <= TOLERANCE


def test_batched_generation_equals_single_rows_and_transformers(pair, ids):
    stock, ours = pair
    prompts = [ids[0, :20].tolist(), ids[1, :7].tolist(), ids[2].tolist()]
    sampling = Sampling(max_new_tokens=12)
    batched = [answer.ids for answer in generate(ours, prompts, [3], sampling)]
    assert batched == [generate(ours, [prompt], [3], sampling)[0].ids for prompt in prompts]
    assert batched == [answer.ids for answer in generate(stock, prompts, [3], sampling)]


def row(ids):
    return Row(array("i", ids), bytes([1]) * len(ids), "test:1")


def test_packed_rows_do_not_see_each_other(pair, ids):
    stock, ours = pair
    rows = [row(ids[0, :17].tolist()), row(ids[1, :1].tolist()), row(ids[2].tolist())]
    batch = pack(rows)
    with torch.no_grad():
        together = ours(batch.input_ids_BT, position_ids=batch.position_ids_BT).logits[0]
        alone = torch.cat([ours(torch.tensor([list(r.input_ids)])).logits[0] for r in rows])
        mixed = stock(batch.input_ids_BT, position_ids=batch.position_ids_BT).logits[0]
    assert (together - alone).abs().max() <= TOLERANCE
    assert (mixed - alone).abs().max() > 0.1, "transformers' own mixes them"


def test_a_packed_run_is_accepted(tiny_bloom, ids):
    base = load_base(tiny_bloom, "fp32", CPU)
    check_packing(base.model, CPU, [row((ids[0] % 100).tolist()), row((ids[1] % 100).tolist())])


def gradients(model, ids, mask):
    logits = model(ids, attention_mask=mask).logits
    torch.nn.functional.cross_entropy(logits[mask.bool()], ids[mask.bool()]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["right", "left"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_transformers(ids, kind, checkpointing):
    stock, ours = make()
    if checkpointing:
        enable_checkpointing(ours)
        ours.config.use_cache = False
    ours.train()
    expected, found = (gradients(model, ids, padded(kind)) for model in (stock, ours))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= TOLERANCE * gradient.norm() + 1e-7, name


def test_half_precision_at_1024_tokens():
    """Relative error of the last 64 logits against fp32; transformers' grows with the length, ours does not."""
    stock, ours = make()
    ids = torch.randint(4, VOCABULARY, (1, 1024), generator=torch.Generator().manual_seed(2))
    errors = {}
    with torch.no_grad():
        exact = stock(ids).logits[:, -64:]
        for name, model in (("transformers", stock), ("ours", ours)):
            half = copy.deepcopy(model).to(torch.bfloat16)
            errors[name] = ((half(ids).logits[:, -64:].float() - exact).norm() / exact.norm()).item()
    assert errors["ours"] < 0.02 < 0.1 < errors["transformers"], errors


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1.6), (torch.bfloat16, 3.5)])
def test_less_is_kept_for_the_backward_pass(dtype, ratio):
    """Bytes of distinct storages that autograd keeps, parameters aside, at 512 tokens."""
    ids = torch.randint(4, VOCABULARY, (1, 512), generator=torch.Generator().manual_seed(3))
    kept = []
    for model in make():
        model = model.to(dtype)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}
        tensors = []  # keeps them alive, or an address could be used twice

        def keep(tensor, storages=storages, tensors=tensors):
            tensors.append(tensor)
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.transformer(ids)
        kept.append(sum(size for address, size in storages.items() if address not in own))
    assert kept[0] > ratio * kept[1], kept


def test_one_bias_serves_all_rows_unless_pads_stand_on_the_left():
    like = torch.zeros(3, 45, 8)
    assert alibi_bias(like, HEADS, 0, None, None).shape == (1, HEADS, 45, 45)
    assert alibi_bias(like, HEADS, 0, padded("right"), None).shape == (1, HEADS, 45, 45)
    left = alibi_bias(like, HEADS, 0, padded("left"), None)
    assert left.shape == (3, HEADS, 45, 45)
    assert left.stride(2) % 8 == 0
    assert left.amax(-1).eq(0).all(), "every query, a pad's too, sees itself"


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_methods_train_and_reload(tiny_bloom, ids, method, tmp_path):
    """One step; the files load into a fresh model, and a whole model loads in transformers."""
    config = build({"model": {"path": str(tiny_bloom)}, "method": {"name": method}}).method
    model = METHODS[method].apply(load_base(tiny_bloom, "fp32", CPU), config)
    small = ids % 100
    model(small).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.sub_(0.1 * parameter.grad + 0.01)
    METHODS[method].save(model, tmp_path, {"base_model": str(tiny_bloom), "base_fingerprint": "x"})
    again = METHODS[method].apply(load_base(tiny_bloom, "fp32", CPU), config)
    METHODS[method].load(again, tmp_path)
    model.eval(), again.eval()
    with torch.no_grad():
        logits = model(small).logits
        assert torch.equal(logits, again(small).logits)
        if method == "full":
            assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BloomForCausalLM"]
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert type(theirs) is Stock
            assert (theirs(small).logits - logits).abs().max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers by an old name
def test_prefix_tuning_works_as_with_transformers(ids):
    """PEFT hands its prefix over as past keys and values, with a mask that covers them."""
    peft = import_peft()
    logits = []
    for model in make():
        torch.manual_seed(4)
        wrapped = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
        with torch.no_grad():
            for parameter in trainable(wrapped).values():
                parameter.normal_(std=0.5)
        mask = padded("right")
        out = wrapped(input_ids=ids, attention_mask=mask).logits
        out[mask.bool()].square().mean().backward()
        logits.append((out.detach(), wrapped.prompt_encoder.default.embedding.weight.grad))
    assert (logits[0][0] - logits[1][0])[padded("right").bool()].abs().max() <= TOLERANCE
    assert (logits[0][1] - logits[1][1]).norm() <= TOLERANCE * logits[0][1].norm()


def test_what_it_does_not_do_is_refused(pair, ids):
    with pytest.raises(ValueError, match="does not take output_attentions"):
        pair[1](ids, output_attentions=True)
