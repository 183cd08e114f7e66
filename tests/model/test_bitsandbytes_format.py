"""Checkpoints of transformers and bitsandbytes: theirs load here, ours load there, with the same codes and results."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fitune
from fitune.cli import main
from fitune.config import build
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported
from fitune.errors import CheckpointError, ConfigError
from fitune.infer.convert_quantized import quantize_folder
from fitune.kernels import int8
from fitune.methods import METHODS
from fitune.model.bitsandbytes_format import stored_weights
from fitune.model.folder import inspect_folder, with_stored_layers
from fitune.model.libraries import import_bitsandbytes
from fitune.model.load import Base, load_base, open_weights
from fitune.model.quantize import QuantLinear, use_int8
from fitune.model.quantizers import absmax_table
from fitune.model.weights import ShardWriter
from fitune.plan.arch import read_arch
from fitune.plan.checks import check_run
from original_chatglm import write_folder as write_chatglm
from original_chatglm_v1 import write_folder as write_chatglm_6b
from tiny import make_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 20, 33, 7, 2]])
THEIRS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4 single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 in bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.fixture(scope="module")
def bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="compares with transformers and bitsandbytes")
    library = import_bitsandbytes()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # says that it casts inputs to fp16
    return library


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of full-precision models: split and fused projections, biases, a shape that is no whole blocks."""
    folder = tmp_path_factory.mktemp("sources")
    return {kind: make_model(folder / kind, kind) for kind in ("llama", "qwen2", "bloom")}


def open_theirs(folder, **options):
    """As bitsandbytes computes it; the packing that it does in place on some CPUs is kept off."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture(scope="module")
def made(bitsandbytes, sources, tmp_path_factory):
    """Writes a checkpoint with transformers and bitsandbytes, once."""
    folder, done = tmp_path_factory.mktemp("made"), {}

    def make(kind, how, **more):
        key = (kind, how, str(more))
        if key not in done:
            config = transformers.BitsAndBytesConfig(**THEIRS[how], **more)
            model = open_theirs(sources[kind], quantization_config=config, dtype=torch.float32)
            done[key] = folder / f"{len(done)}"
            model.save_pretrained(done[key])
            for file in sources[kind].glob("tokenizer*"):
                shutil.copy(file, done[key])
        return done[key]

    return make


def whole_rows(layer):
    """Rows are whole blocks. Where they are not, bitsandbytes 0.50 takes the wrong scales on CPUs with AVX512."""
    return layer.in_features % 64 == 0


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("how", THEIRS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom"])
def test_theirs_load_here(made, sources, kind, how):
    folder, quantization = made(kind, how), how.split()[0]
    base = load_base(folder, "fp32", CPU)
    found = layers(base.model)
    plain = load_base(sources[kind], "fp32", CPU).model
    assert len(found) == len([m for m in plain.modules() if type(m) is torch.nn.Linear]) - 1  # all but the head
    for name, layer in found.items():
        weight = plain.get_submodule(name).weight
        # transformers rounds to fp16 before it quantizes to 8 bits.
        expected = QuantLinear(weight.half().float() if quantization == "int8" else weight, None, quantization)
        assert torch.equal(layer.codes, expected.codes)
        if quantization == "int8":
            assert torch.equal(layer.scale, expected.scale)
        elif "double" in str(THEIRS[how]):
            assert torch.equal(layer.absmax, expected.absmax)
            assert torch.equal(layer.nested_absmax, expected.nested_absmax)
            assert layer.offset.item() == expected.offset.item()
        else:
            assert layer.absmax.dtype == torch.float32
            assert layer.nested_absmax is layer.offset is layer.absmax_table is None
    if quantization != "int8" and not all(whole_rows(layer) for layer in found.values()):
        return
    theirs = open_theirs(folder)
    theirs.train(quantization == "int8")  # in eval mode their 8-bit layers run LLM.int8(): below
    expected = logits(theirs)
    assert (logits(base.model) - expected).norm() / expected.norm() <= 1e-6


@pytest.mark.parametrize("threshold", [1.5, 6.0])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_llm_int8_answers_as_theirs(monkeypatch, made, kind, threshold):
    """A whole model, with the constant that bitsandbytes has on CPU (see kernels/int8.py); without it a code here and
    there falls to the other side."""
    folder = made(kind, "int8", llm_int8_threshold=threshold)
    model = load_base(folder, "fp32", CPU).model
    use_int8(model, "llm_int8", threshold)
    expected = logits(open_theirs(folder).eval())
    assert (logits(model) - expected).norm() / expected.norm() <= 0.01
    monkeypatch.setattr(int8, "PRODUCT_STEP", 6.200124e-05)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_their_absmax_table_is_ours(made):
    folder = made("llama", "nf4")
    tensors = load_file(folder / "model.safetensors")
    tables = [tensor for name, tensor in tensors.items() if name.endswith("nested_quant_map")]
    assert len(tables) == 14
    assert all(torch.equal(table, absmax_table()) for table in tables)
    found = layers(load_base(folder, "fp32", CPU).model)
    assert {layer.absmax_table.data_ptr() for layer in found.values()} == {absmax_table().data_ptr()}


def test_another_absmax_table_is_the_file_s(made, tmp_path):
    folder = shutil.copytree(made("llama", "nf4"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.nested_quant_map"
    tensors[name] = tensors[name] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    one, two = (layers(load_base(f, "fp32", CPU).model) for f in (made("llama", "nf4"), folder))
    changed = [path for path in one if not torch.equal(one[path].weight, two[path].weight)]
    assert changed == ["model.layers.0.mlp.up_proj"]


def assert_same_4_bits(parameter, layer, functional):
    """All that the weight is made of and, where rows are whole blocks, the weight."""
    state = parameter.quant_state
    assert torch.equal(parameter.data.view(torch.uint8).view(-1), layer.codes)
    assert torch.equal(state.absmax, layer.absmax)
    assert torch.equal(state.code, layer.table)
    assert torch.equal(state.state2.absmax, layer.nested_absmax)
    assert torch.equal(state.state2.code, layer.absmax_table)
    assert state.offset.item() == layer.offset.item()
    assert (state.blocksize, state.state2.blocksize) == (64, 256)
    assert state.dtype == layer.weight.dtype
    if whole_rows(layer):
        assert torch.equal(functional.dequantize_4bit(parameter.data, state), layer.weight)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom"])
def test_ours_load_there(bitsandbytes, sources, tmp_path, kind, quantization, dtype):
    target = quantize_folder(str(sources[kind]), tmp_path / "out", quantization, dtype)
    functional = bitsandbytes.functional
    theirs = open_theirs(target)
    back = load_base(target, dtype, CPU).model
    ours = load_base(sources[kind], dtype, CPU, quantization).model
    for name, layer in layers(ours).items():
        parameter = theirs.get_submodule(name).weight
        if quantization == "int8":
            weight = functional.int8_vectorwise_dequant(parameter.data, parameter.SCB)
            assert torch.equal(weight, layer.dequantize(torch.float32))
        else:
            assert_same_4_bits(parameter, layer, functional)
        assert torch.equal(back.get_submodule(name).weight, layer.weight)
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if name.rpartition(".")[0] not in layers(ours):
            assert torch.equal(state[name], tensor), name
    assert torch.equal(logits(back), logits(ours))


def test_an_original_chatglm3_folder(bitsandbytes, tmp_path):
    source = write_chatglm(tmp_path / "chatglm")
    theirs = open_theirs(quantize_folder(str(source), tmp_path / "out", "nf4", "fp32"))
    assert type(theirs).__name__ == "GlmForCausalLM"
    ours = load_base(source, "fp32", CPU, "nf4").model
    assert layers(ours)
    for name, layer in layers(ours).items():
        assert_same_4_bits(theirs.get_submodule(name).weight, layer, bitsandbytes.functional)


def test_chatglm_6b_is_refused(shared, tmp_path):
    source = write_chatglm_6b(tmp_path / "chatglm-6b", shared)
    with pytest.raises(ConfigError, match="is ChatGLM-6B, which transformers does not load"):
        quantize_folder(str(source), tmp_path / "out", "nf4")


def test_what_stands_beside_the_weights(sources, tmp_path, capsys):
    target = tmp_path / "out"
    assert main(["convert", str(sources["qwen2"]), str(target), "--quantization", "nf4", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == f"written: {target}\n"
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert "lm_head.weight" not in load_file(target / "model.safetensors")  # tied
    assert fitune.load(target, device="cpu").generate("say 3", max_new_tokens=3) is not None
    assert inspect_folder(target).quantization == "nf4"


def test_nothing_to_convert(sources, tmp_path, capsys):
    assert main(["convert", str(sources["llama"]), str(tmp_path / "out")]) == 2
    assert "is a llama folder, which needs no conversion" in capsys.readouterr().err
    assert main(["convert", str(sources["llama"]), str(tmp_path / "out"), "--dtype", "bf16"]) == 2
    assert "give --quantization as well" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_sources_and_targets(sources, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(ConfigError, match="DST .*full: exists and is not an empty folder"):
        quantize_folder(str(sources["llama"]), tmp_path / "full", "nf4")
    with pytest.raises(ConfigError, match="--quantization is fp8; allowed: int8, nf4, fp4"):
        quantize_folder(str(sources["llama"]), tmp_path / "out", "fp8")
    once = quantize_folder(str(sources["llama"]), tmp_path / "once", "nf4")
    with pytest.raises(ConfigError, match="holds weights in nf4 already"):
        quantize_folder(str(once), tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="holds weights in nf4, which cannot become int8"):
        load_base(once, "fp32", CPU, "int8")
    copy = shutil.copytree(sources["llama"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float8"}))
    with pytest.raises(ConfigError, match=r"`dtype` is 'float8'; say what to read weights in: --dtype bf16"):
        quantize_folder(str(copy), tmp_path / "out", "nf4")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a part of this path is a file"):
        quantize_folder(str(sources["llama"]), tmp_path / "file" / "out", "nf4")
    assert not (tmp_path / "out").exists()


def edited(folder, tmp_path, tensors=None, **section):
    """A copy with other tensors or another quantization_config."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    if tensors is not None:
        state = load_file(copy / "model.safetensors")
        tensors(state)
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= section
    (copy / "config.json").write_text(json.dumps(config))
    return copy


STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


def facts(**change):
    def edit(state):
        found = json.loads(bytes(state[STATE].tolist())) | change
        state[STATE] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return edit


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (facts(blocksize=128), "quantized in blocks of 128 and 256; fitune reads blocks of 64 and 256"),
        (facts(shape=[64]), r"is no description of a 4-bit weight \(nf4 of shape \[64\]\)"),
        (facts(shape=[64, 96]), "another shape than config.json says"),
        (lambda s: s.update({STATE.replace(".quant_state.bitsandbytes__nf4", ""): torch.zeros(9, 1)}),
         "codes has 36 values, needed are 3072"),
        (facts(nested_offset=None), "do not fit a nf4 weight"),
        (lambda s: s.pop(STATE.replace("quant_state.bitsandbytes__nf4", "absmax")), "do not fit a nf4 weight"),
        (lambda s: s.update({STATE: torch.zeros(4, dtype=torch.uint8)}), "is no description of a 4-bit weight"),
        (lambda s: [s.pop(name) for name in list(s) if "bitsandbytes__" in name], "another shape|none is stored so"),
    ],
)  # fmt: skip
def test_damaged_4_bit_folders(sources, tmp_path, tensors, message):
    folder = quantize_folder(str(sources["llama"]), tmp_path / "nf4", "nf4", "fp32")
    with pytest.raises(ConfigError, match=message):
        load_base(edited(folder, tmp_path, tensors), "fp32", CPU)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda s: s.update({"model.layers.0.mlp.up_proj.weight_format": torch.tensor(2)}), "old versions of bitsand"),
        (lambda s: s.pop("model.layers.0.mlp.up_proj.weight"), "there is no matrix model.layers.0.mlp.up_proj.weight"),
        (lambda s: s.update({"model.layers.0.mlp.up_proj.SCB": torch.ones(3)}), "SCB has 3 values, needed are 96"),
        (lambda s: s.update({"lm_head.weight": torch.ones(128, 64, dtype=torch.int8), "lm_head.SCB": torch.ones(128)}),
         r"lm_head is no linear layer of a block.*llm_int8_skip_modules=\['lm_head'\]"),
    ],
)  # fmt: skip
def test_damaged_8_bit_folders(sources, tmp_path, tensors, message):
    folder = quantize_folder(str(sources["llama"]), tmp_path / "int8", "int8", "fp32")
    with pytest.raises(ConfigError, match=message):
        load_base(edited(folder, tmp_path, tensors), "fp32", CPU)


@pytest.mark.parametrize(
    "section", [{"quant_method": "gptq"}, {"load_in_4bit": False}, {"bnb_4bit_quant_type": "int3"}]
)
def test_other_quantizers_are_refused(sources, tmp_path, section):
    folder = quantize_folder(str(sources["llama"]), tmp_path / "nf4", "nf4", "fp32")
    with pytest.raises(
        ConfigError, match=r"already quantized .* of those fitune reads bitsandbytes' int8, nf4 and fp4"
    ):
        load_base(edited(folder, tmp_path, **section), "fp32", CPU)


def test_a_16_bit_model_that_claims_to_be_quantized(sources, tmp_path):
    copy = shutil.copytree(sources["llama"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    with pytest.raises(ConfigError, match="none is stored so; remove quantization_config"):
        load_base(copy, "fp32", CPU)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="read from safetensors only"):
        load_base(copy, "fp32", CPU)


def test_layers_that_were_left_out_stay_whole(made):
    folder = made("llama", "nf4", llm_int8_skip_modules=["lm_head", "model.layers.1.mlp", "q_proj"])
    base = load_base(folder, "fp32", CPU)
    found = set(layers(base.model))
    arch = read_arch(json.loads((folder / "config.json").read_text()))
    planned = {f"{arch.block.format(number)}.{path}" for number, path in arch.whole}
    assert planned == {name for name, _ in base.model.named_modules() if name.endswith("_proj")} - found
    assert {name.rsplit(".", 1)[-1] for name in found if ".0." in name} == {
        "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {name.rsplit(".", 1)[-1] for name in found if ".1." in name} == {"k_proj", "v_proj", "o_proj"}
    method = build({"model": {"path": "x"}, "method": {"name": "lora"}}).method
    model = METHODS["lora"].apply(Base(base.model, folder, "llama", 128, ""), method)
    with pytest.raises(Unsupported, match="projections of one input stored as nf4 and none"):
        EnginePath(model, "llama", "elementwise", 64, 64)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_files_say_which_layers_are_whole(sources, tmp_path, capsys, quantization):
    """config.json may name layers by patterns, or in ways that versions of transformers read differently."""
    folder = quantize_folder(str(sources["llama"]), tmp_path / "model", quantization, "fp32")
    tensors, plain = load_file(folder / "model.safetensors"), load_file(sources["llama"] / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".1.mlp." not in name}
    tensors |= {name: tensor for name, tensor in plain.items() if ".1.mlp." in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "self_attn.q_proj", r"model\.layers\.1\.mlp.*"]
    (folder / "config.json").write_text(json.dumps(config))
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{path: {folder}}}\ntrain: {{path: fast, device: cpu}}\ndata: {{max_length: 64}}\n")
    arch = with_stored_layers(read_arch(config), folder)
    assert arch.whole == {(1, f"mlp.{name}_proj") for name in ("gate", "up", "down")}
    assert main(["plan", str(run)]) == 0
    told = capsys.readouterr().out
    assert "3 layers whole" in told
    assert "pattern" not in told
    base = load_base(folder, "fp32", CPU)
    model = METHODS["lora"].apply(base, build({"model": {"path": "x"}, "method": {"name": "lora"}}).method)
    EnginePath(model, "llama", "elementwise", 64, 64)
    patterns = {"method": {"name": "freeze", "patterns": ["model.layers.1.mlp.*"]}, "data": {"max_length": 64}}
    check_run(build(patterns | {"model": {"path": "x", "quantization": quantization}}), arch, 256)
    (folder / "model.safetensors").unlink()  # without them it is what config.json says
    assert with_stored_layers(read_arch(config), folder) == read_arch(config)
    assert read_arch(config).whole == {(0, "self_attn.q_proj"), (1, "self_attn.q_proj")}
    assert main(["plan", str(run), "train.path=auto"]) == 0
    assert r"llm_int8_skip_modules names layers by a pattern (model\.layers\.1\.mlp.*)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"quantization={quantization} keeps frozen; give a pattern that does not$"):
        check_run(build(patterns | {"model": {"path": "x", "quantization": quantization}}), read_arch(config), 256)


def test_files_of_several_shards(sources, tmp_path):
    folder = quantize_folder(str(sources["llama"]), tmp_path / "nf4", "nf4", "fp32")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    writer = ShardWriter(folder, shard_bytes=20_000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    files = inspect_folder(folder).weight_files
    assert len(files) > 3
    assert len(stored_weights(open_weights(folder, inspect_folder(folder)))) == 14
    ours = load_base(sources["llama"], "fp32", CPU, "nf4").model
    assert torch.equal(logits(load_base(folder, "fp32", CPU).model), logits(ours))


@pytest.fixture
def stored(sources, tmp_path):
    return {q: quantize_folder(str(sources["llama"]), tmp_path / q, q, "fp32") for q in ("int8", "nf4")}


def test_a_run_trains_on_stored_weights_as_on_quantized_ones(stored, sources, tree, tmp_path):
    """The same rows, seed and codes: the same adapter, bit by bit; and none of it needs bitsandbytes."""
    adapters = []
    for path, quantization in ((stored["nf4"], "none"), (sources["llama"], "nf4")):
        tree["model"] = {"path": str(path), "dtype": "fp32", "quantization": quantization}
        result = fitune.train(tree, quiet=True, replace=True)
        adapters.append(load_file(result.run / "adapter" / "adapter_model.safetensors"))
        assert "quantization: nf4" in (result.run / "config.yaml").read_text()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_a_stored_base_answers_expands_and_exports(stored, tree, tmp_path):
    tree["model"] = {"path": str(stored["nf4"]), "dtype": "fp32"}
    run = fitune.train(tree, quiet=True).run
    assert layers(fitune.load(run, device="cpu").model)
    expanded = fitune.load(run, device="cpu", quantization="none").model
    assert not layers(expanded)
    torch.testing.assert_close(logits(expanded), logits(fitune.load(run, device="cpu").model), rtol=1e-5, atol=1e-6)
    target = fitune.export(run, tmp_path / "merged")
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    torch.testing.assert_close(logits(load_base(target, "fp32", CPU).model), logits(expanded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stored_as", "change", "message"),
    [
        ("nf4", {"model": {"quantization": "int8"}}, "holds weights in nf4, which would be rounded twice"),
        ("nf4", {"model": {"int8_compute": "llm_int8"}}, "int8_compute is llm_int8, but model.quantization is nf4"),
        ("nf4", {"method": {"name": "full"}}, "quantized weights are frozen"),
        ("llama", {"model": {"int8_compute": "llm_int8"}}, "but model.quantization is none; set"),
    ],
)
def test_settings_that_stored_weights_do_not_allow(sources, tree, tmp_path, capsys, stored_as, change, message):
    path = sources["llama"]
    if stored_as != "llama":
        path = quantize_folder(str(path), tmp_path / "stored", stored_as, "fp32")
    tree["model"] = {"path": str(path), **change.get("model", {})}
    tree["method"] = change.get("method", tree["method"])
    with pytest.raises(ConfigError, match=message):
        fitune.train(tree, quiet=True)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(tree))
    assert main(["plan", str(file)]) == 2
    assert "fitune: " in capsys.readouterr().err
