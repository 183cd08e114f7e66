"""Merging file by file: PEFT's own results bit by bit, in bounded memory, or in a loaded model where that is needed."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fitune
from fitune.config import build
from fitune.errors import CheckpointError, ConfigError
from fitune.infer import export as export_module
from fitune.infer import merge
from fitune.infer.convert_quantized import quantize_folder
from fitune.infer.load import run_parts
from fitune.methods import METHODS, merging
from fitune.model import weights
from fitune.model.load import load_base
from fitune.training import run
from original_chatglm import write_folder as write_chatglm
from tiny import make_model, make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, rows_file):
    """Runs of a few steps on tiny bases of several kinds."""
    folder, done = tmp_path_factory.mktemp("merge"), {}

    def make(kind, method="lora", dtype="fp32", base=None, **model):
        key = (kind, method, dtype, str(base), str(model))
        if key not in done:
            base = base or folder / kind
            if not base.is_dir():
                make_model(base, kind)
            settings = {"name": method, **({"target_modules": "linear"} if method in ("lora", "ia3") else {})}
            tree = {
                "model": {"path": str(base), "dtype": dtype, **model},
                "method": settings,
                "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
                "train": {"max_steps": 4, "global_batch_rows": 4, "learning_rate": 3e-2, "device": "cpu"},
                "output": {"dir": str(folder / f"run{len(done)}")},
            }
            done[key] = run.train(build(tree), quiet=True).run
        return done[key]

    return make


def shard(source, target, shard_bytes=20_000):
    """The same model in several files."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    writer = weights.ShardWriter(target, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    return target


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


def in_memory(monkeypatch, folder, target, **options):
    """The other way: through a loaded model."""
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "merge_files", lambda *_: False)
        return fitune.export(folder, target, **options)


def streamed(monkeypatch, folder, target, **options):
    """File by file, or the test fails."""
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "load", None)
        return fitune.export(folder, target, **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom"])
def test_lora_is_merged_as_peft_does(monkeypatch, runs, tmp_path, kind, dtype):
    folder = runs(kind, dtype="bf16")
    target = streamed(monkeypatch, folder, tmp_path / "out", dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        base = transformers.AutoModelForCausalLM.from_pretrained(
            run_parts(folder).folder,
            dtype=getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}.get(dtype, "float16")),
        )
        theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    same(tensors_of(target), tensors_of(tmp_path / "theirs"))
    ours = load_file(run_parts(folder).folder / "model.safetensors")
    changed = [
        name for name, tensor in tensors_of(target).items() if not torch.equal(tensor, ours[name].to(tensor.dtype))
    ]
    assert len(changed) == (8 if kind == "bloom" else 14)


@pytest.mark.parametrize(
    ("kind", "method", "model"),
    [
        ("llama", "lora", {}),
        ("qwen2", "bitfit", {}),
        ("bloom", "bitfit", {"quantization": "nf4"}),
        ("llama", "full", {}),
        ("qwen2", "full", {}),
        ("qwen2", "lora", {"quantization": "int8"}),
        ("qwen2", "ia3", {"quantization": "nf4"}),
    ],
)
def test_both_ways_write_the_same(monkeypatch, runs, tmp_path, kind, method, model):
    folder = runs(kind, method, **model)
    one = streamed(monkeypatch, folder, tmp_path / "one", dtype="bf16")
    two = in_memory(monkeypatch, folder, tmp_path / "two", dtype="bf16")
    same(tensors_of(one), tensors_of(two))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    for file in ("config.json", "generation_config.json"):
        assert json.loads((one / file).read_text()) == json.loads((two / file).read_text())
    assert {path.stat().st_mode & 0o777 for path in one.glob("*.safetensors")} == {0o644}


def test_many_files_in_many_files_out(monkeypatch, runs, tmp_path):
    base = shard(run_parts(runs("llama")).folder, tmp_path / "base")
    folder = runs("llama", base=base)
    monkeypatch.setattr(merge, "ShardWriter", lambda out: weights.ShardWriter(out, 30_000))
    target = streamed(monkeypatch, folder, tmp_path / "one")
    assert len(list(target.glob("model-0*-of-0*.safetensors"))) > 3
    assert not (target / "model.safetensors").exists()
    same(tensors_of(target), tensors_of(in_memory(monkeypatch, folder, tmp_path / "two")))
    assert fitune.load(target, device="cpu").generate("say 3", max_new_tokens=3) is not None


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_a_base_that_is_stored_quantized_is_expanded(monkeypatch, runs, tmp_path, quantization):
    base = quantize_folder(str(run_parts(runs("llama")).folder), tmp_path / "base", quantization, "fp32")
    folder = runs("llama", base=base)
    target = streamed(monkeypatch, folder, tmp_path / "one")
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    same(tensors_of(target), tensors_of(in_memory(monkeypatch, folder, tmp_path / "two")))
    expanded = load_base(base, "fp32", CPU).model.get_submodule("model.layers.0.mlp.down_proj").weight
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj"
    delta = 2 * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
    merged = tensors_of(target)["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(merged, expanded + delta, rtol=1e-5, atol=1e-6)


def bloom_without_prefix(folder):
    """As BLOOM's own files are: names without the head's `transformer.`."""
    make_model(folder, "bloom")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_names_without_the_prefix_of_the_model(monkeypatch, runs, tmp_path):
    folder = runs("bloom", base=bloom_without_prefix(tmp_path / "base"))
    one, two = (way(monkeypatch, folder, tmp_path / way.__name__) for way in (streamed, in_memory))
    same(tensors_of(one), tensors_of(two))


def adapter(tmp_path, config, seed=3):
    """An adapter that PEFT made on a tiny Qwen2, with values."""
    base = make_model(tmp_path / "base", "qwen2")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return model, tmp_path / "adapter"


LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "edits"),
    [
        (peft.LoraConfig(**LORA), merging.lora_edits),
        (peft.LoraConfig(**LORA, use_rslora=True), merging.lora_edits),
        (peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
         merging.ia3_edits),
    ],
    ids=["lora", "rslora", "ia3"],
)  # fmt: skip
def test_edits_are_peft_s_merge(tmp_path, config, edits, dtype):
    _, folder = adapter(tmp_path, config)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    found = edits(folder)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ours = {name: found.pop(name, lambda w: w)(tensor) for name, tensor in state.items()}
    assert not [name for name in found if not name.endswith(".bias")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        theirs = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    same(ours, dict(theirs.state_dict()))
    assert sum(not torch.equal(ours[name], tensor) for name, tensor in state.items()) >= 4


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"q_proj": 2}},
        {"lora_bias": True},
        {"some_variant_of_the_future": {"x": 1}},
    ],
)
def test_variants_of_lora_need_a_model(tmp_path, change):
    _, folder = adapter(tmp_path, peft.LoraConfig(**LORA))
    assert merging.lora_edits(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    assert merging.lora_edits(folder) is None


def test_a_method_without_edits_is_merged_in_a_model(monkeypatch, runs, tmp_path):
    folder = runs("llama")
    expected = tensors_of(streamed(monkeypatch, folder, tmp_path / "one"))
    monkeypatch.setitem(METHODS, "lora", dataclasses.replace(METHODS["lora"], edits=merging.no_edits))
    with pytest.raises(TypeError):
        streamed(monkeypatch, folder, tmp_path / "two")
    same(expected, tensors_of(fitune.export(folder, tmp_path / "two")))


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: as_bin(make_model(folder, "qwen2")),
        lambda folder: write_chatglm(folder, form="bin"),
        lambda folder: write_chatglm(folder, form="safetensors"),
    ],
    ids=["bin", "original chatglm, bin", "original chatglm"],
)
def test_other_files_are_merged_one_by_one_too(monkeypatch, runs, tmp_path, make):
    folder = runs("other", base=make(tmp_path / "base"))
    one, two = (way(monkeypatch, folder, tmp_path / way.__name__) for way in (streamed, in_memory))
    same(tensors_of(one), tensors_of(two))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((one / file).read_text()) == json.loads((two / file).read_text())


def test_names_that_transformers_converts_need_a_model(monkeypatch, runs, tmp_path):
    folder = runs("llama")
    expected = tensors_of(streamed(monkeypatch, folder, tmp_path / "one"))
    monkeypatch.setattr(merge, "names_in_model", lambda *_: None)
    same(expected, tensors_of(fitune.export(folder, tmp_path / "two")))


def test_an_adapter_of_another_base_is_refused(runs, tmp_path):
    folder = shutil.copytree(runs("llama"), tmp_path / "run")
    other = make_model(tmp_path / "other", seed=1)
    text = (folder / "config.yaml").read_text().replace(str(run_parts(folder).folder), str(other))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        fitune.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit_adapter(folder, change):
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def rename(tensors):
    for name in [name for name in tensors if "layers.0.mlp.down" in name]:
        tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.update({A: torch.ones(8, 95)}), CheckpointError, "does not fit model.layers.0.mlp.down_proj"),
        (lambda t: t.update({A: t[A][:4]}), CheckpointError, "no A and B of rank 8 for it"),
        (lambda t: t.pop(A), CheckpointError, "no A and B of rank 8 for it"),
        (rename, CheckpointError, "it changes model.layers.9.mlp.down_proj.weight, which is not there"),
        (
            lambda t: t.update({A: t[A] * float("nan")}),
            CheckpointError,
            "lora_A.weight holds values that are not finite",
        ),
        (lambda t: t.update({A: t[A] * 1e9}), ConfigError, "not finite after merging in torch.float16; use --dtype"),
    ],
)
def test_adapters_that_do_not_fit(runs, tmp_path, change, error, message):
    folder = shutil.copytree(runs("llama"), tmp_path / "run")
    edit_adapter(folder, change)
    with pytest.raises(error, match=message):
        fitune.export(folder, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"r": 0, "lora_alpha": 16}', '{"r": 8, "lora_alpha": null}'])
def test_damaged_settings(runs, tmp_path, text):
    folder = shutil.copytree(runs("llama"), tmp_path / "run")
    (folder / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
        fitune.export(folder, tmp_path / "out")


MEASURE = """
import sys
from pathlib import Path
from fitune.infer import merge
from fitune.infer.convert_quantized import quantize_folder
from fitune.infer.load import run_parts
from fitune.model import weights

run, warm, out = map(Path, sys.argv[1:])
parts = run_parts(run)
merge.ShardWriter = lambda folder: weights.ShardWriter(folder, 2**22)
assert merge.merge_files(parts, "bf16", warm)  # imports


def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))


Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
before = kilobytes("VmRSS")
assert merge.merge_files(parts, "bf16", out)
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory as Linux tells it")
def test_memory_is_that_of_a_shard(tmp_path):
    """A model of 50 MB in 4 MB files: one that is read, one that is written."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=20, num_attention_heads=4, vocab_size=128
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "one")
    folder = shard(tmp_path / "one", tmp_path / "run" / "model", 2**22)
    make_tokenizer(folder)
    (tmp_path / "run" / "config.yaml").write_text("model: {path: embedded}\nmethod: {name: full}\n")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 50e6
    for name in ("warm", "out"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("run", "warm", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout.split()[-1]) < 14e6, done.stdout
