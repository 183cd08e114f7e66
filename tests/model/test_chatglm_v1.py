"""ChatGLM-6B against its formulas: positions, mask, rotation, logits with every kind of padding, packing, caching."""

from array import array

import pytest
import torch

from fitune.data.batches import pack, pad
from fitune.data.rows import Row
from fitune.errors import ConfigError
from fitune.infer.generate import Sampling, generate
from fitune.methods.base import trainable
from fitune.model.chatglm_v1 import ALPHA, ChatGLMForConditionalGeneration, read_config
from fitune.model.families import target_modules
from fitune.model.libraries import import_peft
from fitune.model.prefix_lm import find_places, prefix_bias, rotary_angles
from fitune.model.quantize import QuantLinear, quantize_blocks
from fitune.plan.chatglm import Blank
from fitune.training.path import check_packing, enable_checkpointing, forward
from original_chatglm_v1 import SIZES, attends, logits, position_rows, random_weights, turned

CPU = torch.device("cpu")
SOP, GMASK, MASK, EOP, PAD = 194, 191, 190, 195, 3
BLANK = Blank(SOP, GMASK, MASK)
TOLERANCE = 1e-5


def load(weights):
    model = ChatGLMForConditionalGeneration(read_config(SIZES | {"tie_word_embeddings": False})).eval()
    model.load_state_dict(weights)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def model(weights):
    return load(weights)


def example(context, answer, seed, blank=GMASK, then=()):
    """`context` random ids, the blank, more context, sop, `answer` random ids."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(4, 180, (context + answer,), generator=generator).tolist()
    return [*random[:context], blank, *then, SOP, *random[context:]]


EXAMPLES = {
    "gmask": example(9, 6, 1),
    "short context": example(1, 14, 2),
    "long context": example(13, 1, 3),
    "mask inside the context": example(5, 5, 4, blank=MASK, then=(17, 18, 19, 20)),
    "both": example(4, 6, 5, blank=MASK, then=(17, GMASK)),
    "no answer yet": example(8, 0, 6),
}


@pytest.fixture(scope="module")
def expected(weights):
    """Logits of each example by the formulas."""
    return {name: logits(weights, ids) for name, ids in EXAMPLES.items()}


def test_positions_of_the_published_example():
    ids = torch.tensor([[7, 8, 9, GMASK, SOP, 10, 11, 12]])
    rows = find_places(ids, BLANK).rows_B2S[0].tolist()
    assert rows == [[0, 1, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_positions_and_mask(name):
    ids = EXAMPLES[name]
    places = find_places(torch.tensor([ids]), BLANK)
    assert places.rows_B2S[0].tolist() == list(position_rows(ids))
    bias = prefix_bias(places, len(ids), torch.zeros(1))
    c = ids.index(SOP)
    for i in range(len(ids)):
        assert [value == 0 for value in bias[0, 0, i].tolist()] == [attends(i, j, c) for j in range(len(ids))]


def test_a_document_without_sop_is_context():
    """Its answer is still to come: what would be sop stands where it would stand."""
    whole = example(6, 0, 7)
    rows = find_places(torch.tensor([whole]), BLANK).rows_B2S[0, :, :-1]
    cut = find_places(torch.tensor([whole[:-1]]), BLANK)
    assert torch.equal(cut.rows_B2S[0], rows)
    assert prefix_bias(cut, 7, torch.zeros(1)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_angles_are_rounded_as_in_the_published_code(dtype):
    """fp16: the product of position and frequency is rounded, half a radian beyond 1024; else only the frequency is."""
    positions = torch.tensor([0, 1, 255, 300, 1027, 2046])
    angles = rotary_angles(positions.expand(1, 2, 6), 128, dtype)[0, 0].float()
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for t, position in enumerate(positions.tolist()):
        cos, sin = angles[t].cos(), angles[t].sin()
        found = torch.cat([vector[:32] * cos - vector[32:] * sin, vector[32:] * cos + vector[:32] * sin])
        wanted = turned(vector, position, half_angles=dtype == torch.float16)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    exact = rotary_angles(positions.expand(1, 2, 6), 128, torch.float32)[0, 0]
    off = (angles - exact).abs().amax(-1)
    assert (0.2 < off[-1] <= 0.5 and off[2] <= 0.0625) if dtype == torch.float16 else off.max() == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_row(model, expected, name):
    found = model(torch.tensor([EXAMPLES[name]])).logits[0]
    assert (found - expected[name]).abs().max() <= TOLERANCE < expected[name].abs().max() * 1e-4


def test_a_batch_of_one_length_and_different_contexts(model, expected):
    names = ["gmask", "short context"]
    assert len({len(EXAMPLES[name]) for name in names}) == 1 < len({EXAMPLES[name].index(SOP) for name in names})
    found = model(torch.tensor([EXAMPLES[name] for name in names])).logits
    for row, name in zip(found, names, strict=True):
        assert (row - expected[name]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(model, expected, side):
    width = max(map(len, EXAMPLES.values())) + 3
    ids, mask = torch.full((len(EXAMPLES), width), PAD), torch.zeros(len(EXAMPLES), width, dtype=torch.int64)
    starts = {}
    for i, (name, row) in enumerate(EXAMPLES.items()):
        room = width - len(row)
        start = starts[name] = {"left": room, "right": 0, "both": room // 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    found = model(ids, attention_mask=mask).logits
    assert found.isfinite().all()
    for i, (name, start) in enumerate(starts.items()):
        row = found[i, start : start + len(EXAMPLES[name])]
        assert (row - expected[name]).abs().max() <= TOLERANCE, name


def as_rows():
    return [Row(array("i", ids), b"\0" + b"\1" * (len(ids) - 1), "test:1") for ids in EXAMPLES.values()]


def test_packed_rows(model, expected):
    batch = pack(as_rows())
    assert batch.attention_mask_BT is None
    found = forward(model, batch)[0]
    assert (found - torch.cat(list(expected.values()))).abs().max() <= TOLERANCE
    check_packing(model, CPU, as_rows())


def test_cached_steps(model, expected):
    """Prompt, then one token at a time; every step gets all ids so far, as `generate` gives them."""
    ids = torch.tensor([EXAMPLES["gmask"], EXAMPLES["short context"]])
    for prompt in (11, 13):
        out = model(ids[:, :prompt], use_cache=True)
        steps = [out.logits]
        for t in range(prompt, ids.shape[1]):
            past = out.past_key_values
            out = model(ids[:, t : t + 1], token_ids=ids[:, : t + 1], past_key_values=past, use_cache=True)
            steps.append(out.logits)
        found = torch.cat(steps, 1)
        for row, name in zip(found, ("gmask", "short context"), strict=True):
            first = 0 if EXAMPLES[name].index(SOP) < prompt else prompt
            assert (row - expected[name])[first:].abs().max() <= TOLERANCE


def test_generation_in_batches_equals_single_rows_and_no_cache(model):
    """Different lengths (pads on the left) and contexts; a prompt that ends before its sop, too."""
    prompts = [EXAMPLES["gmask"][:11], EXAMPLES["long context"], EXAMPLES["short context"][:3], [5, 6, 7, GMASK]]
    sampling = Sampling(max_new_tokens=10)
    batched = [answer.ids for answer in generate(model, prompts, [EOP], sampling)]
    assert batched == [generate(model, [prompt], [EOP], sampling)[0].ids for prompt in prompts]
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = list(prompt)
        for token in answer:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        if SOP not in prompt and SOP in answer:
            pytest.fail("a context grows while its answer is awaited; choose another seed")


def test_a_cached_step_without_its_ids_is_refused(model):
    past = model(torch.tensor([[7, GMASK, SOP]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a cached step needs token_ids"):
        model(torch.tensor([[9]]), past_key_values=past)
    with pytest.raises(ValueError, match="give token_ids beside inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match="does not take output_attentions"):
        model(torch.tensor([[9]]), output_attentions=True)


def test_half_precision(weights, expected):
    """Also that fp16 angles, large rounding, are only used in fp16."""
    ids = torch.tensor([EXAMPLES["gmask"]])
    for dtype, bound in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        found = load(weights).to(dtype)(ids).logits[0].float()
        assert (found - expected["gmask"]).norm() / expected["gmask"].norm() < bound


def gradients(model, checkpointing=False):
    model.train()
    if checkpointing:
        enable_checkpointing(model)
        model.config.use_cache = False
    model.requires_grad_(True)
    batch = pad(as_rows(), PAD)
    found = forward(model, batch)
    targets = batch.labels_BT[:, 1:]
    torch.nn.functional.cross_entropy(found[:, :-1].transpose(1, 2), targets).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_activation_checkpointing_changes_no_gradient(weights):
    plain, again = gradients(load(weights)), gradients(load(weights), checkpointing=True)
    assert plain.keys() == again.keys() == weights.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_blocks_are_quantized(weights, quantization):
    """Like the same model with the dequantized weights; embedding and head stay."""
    quantized = load(weights)
    quantize_blocks(quantized, quantization, CPU)
    layers = {name: m for name, m in quantized.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 4 * SIZES["num_layers"]
    expanded = weights | {f"{name}.weight": layer.dequantize(torch.float32) for name, layer in layers.items()}
    ids = torch.tensor([EXAMPLES["gmask"]])
    torch.testing.assert_close(quantized(ids).logits, load(expanded)(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(
        expanded["transformer.layers.0.mlp.dense_h_to_4h.weight"],
        weights["transformer.layers.0.mlp.dense_h_to_4h.weight"],
    )


def test_targets(model):
    assert target_modules(model, "chatglm", "attention") == ["query_key_value"]
    assert target_modules(model, "chatglm", "linear") == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


VIRTUAL = 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_belong_to_the_context(weights, kind):
    """They shift positions, everybody sees them; generation repeats what training saw."""
    peft = import_peft()
    torch.manual_seed(3)
    model = load(weights)
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    with torch.no_grad():
        for parameter in trainable(wrapped).values():
            parameter.normal_(std=0.5)
    batch = pad(as_rows(), PAD)
    wrapped.eval()

    found = forward(wrapped, batch)[:, -batch.input_ids_BT.shape[1] :]
    if kind == "PromptTuningConfig":
        ids = torch.tensor([EXAMPLES["gmask"]])
        embedded = torch.cat([wrapped.get_prompt(1), model.transformer.word_embeddings(ids)], 1)
        # Ordinary tokens in their place, embedded by hand, are seen the same way.
        by_hand = model(inputs_embeds=embedded, token_ids=torch.cat([torch.full((1, VIRTUAL), 5), ids], 1)).logits
        assert (by_hand[0, VIRTUAL:] - found[0, : ids.shape[1]]).abs().max() <= TOLERANCE
    prompt = EXAMPLES["gmask"][:11]
    (answer,) = generate(wrapped, [prompt], [EOP], Sampling(max_new_tokens=5))
    ids = list(prompt)
    for token in answer.ids:
        row = pad([Row(array("i", ids), bytes(len(ids)), "test:1")], PAD)
        assert forward(wrapped, row)[0, -1].argmax() == token
        ids.append(token)
    found.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(wrapped).values())


def test_alpha_is_that_of_28_layers():
    assert 7.483 < ALPHA < 7.484


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantization_bit": 4}, "`quantization_bit` is 4; give the plain 16-bit model"),
        ({"pre_seq_len": 128}, "`pre_seq_len` is 128"),
        ({"position_encoding_2d": False}, "`position_encoding_2d` is not true"),
        ({"num_attention_heads": 6}, "makes no 6 heads of a width divisible by 4"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0; a positive whole number"),
        ({"hidden_size": "64"}, "`hidden_size` is '64'; a positive whole number"),
        ({"layernorm_epsilon": "x"}, "`layernorm_epsilon` is 'x'"),
        ({"bos_token_id": 200}, r"are \[200, 191, 190\]; different ids below vocab_size \(200\)"),
        ({"mask_token_id": 191}, "different ids"),
        ({"torch_dtype": "float"}, None),
        ({"torch_dtype": "nonsense"}, "nonsense"),
        ({"quantization_bit": 0, "pre_seq_len": None}, None),
    ],
)
def test_configurations(keys, message):
    if message is None:
        read_config(SIZES | keys)
    else:
        with pytest.raises(ConfigError, match=message):
            read_config(SIZES | keys)
