"""Model folders: what loads, what is refused before weights are read."""

import errno
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from fitune.errors import ConfigError
from fitune.model.families import target_modules
from fitune.model.folder import inspect_folder, resolve_folder
from fitune.model.load import load_base, pick_device, pick_dtype
from tiny import make_model

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def edit(folder, **keys):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_loads_frozen_in_its_dtype(tiny, dtype, expected):
    base = load_base(tiny, dtype, CPU)
    assert {p.dtype for p in base.model.parameters()} == {expected}
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert (base.model_type, base.vocab_size) == ("llama", 128)


def test_bin_files_load_without_running_code(copy):
    expected = load_base(copy, "fp32", CPU).model.state_dict()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    loaded = load_base(copy, "fp32", CPU)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_that_runs_code_is_refused(copy, capsys):
    torch.save({"w": Evil()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"refused, it wants to run (builtins\.)?print"):
        load_base(copy, "fp32", CPU)
    assert "code ran" not in capsys.readouterr().out


def test_fingerprint_tells_weights_apart(copy):
    first = load_base(copy, "fp32", CPU).fingerprint
    assert load_base(copy, "bf16", CPU).fingerprint == first, "of the files, not of the dtype"
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][5] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_base(copy, "fp32", CPU).fingerprint != first


def test_missing_weights_are_not_replaced_by_random_ones(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weight is missing \(model.layers.1.mlp.up_proj.weight\)"):
        load_base(copy, "fp32", CPU)


def test_a_head_of_its_own_that_is_missing_is_missing(copy):
    """transformers would tie it if config.json said so; here it would be random numbers."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weight is missing \(lm_head.weight\)"):
        load_base(copy, "fp32", CPU)
    edit(copy, tie_word_embeddings=True)
    model = load_base(copy, "fp32", CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_of_another_shape_are_refused(copy, tiny_qwen):
    edit(copy, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"6 weights .*down_proj.weight: 64 x 96 stored, 64 x 80 by config.json"):
        load_base(copy, "fp32", CPU)
    # Of two tied weights in the files, transformers compares the values, which are gone by then.
    shutil.copyfile(tiny_qwen / "config.json", copy / "config.json")
    edit(copy, vocab_size=130)
    with pytest.raises(ConfigError, match="lm_head.weight: 128 x 64 stored, 130 x 64 by"):
        load_base(copy, "fp32", CPU)


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_weights_that_would_be_dropped_are_refused(tmp_path, kind):
    """A config.json with fewer layers would cut the model off; published files of BLOOM lack the prefix."""
    folder = make_model(tmp_path, kind)
    tensors = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, folder / "model.safetensors")
    load_base(folder, "fp32", CPU)
    edit(folder, **{"num_hidden_layers" if kind == "llama" else "n_layer": 1})
    with pytest.raises(ConfigError, match=r"weights are not in the model that config.json describes \(.*\.1\."):
        load_base(folder, "fp32", CPU)


def test_damaged_weights_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model.safetensors: is damaged or cut short .* download it again"):
        load_base(copy, "fp32", CPU)


def test_settings_that_contradict_each_other(copy):
    edit(copy, hidden_act=5)
    with pytest.raises(ConfigError, match=r"config.json: .*hidden_act"):
        load_base(copy, "fp32", CPU)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "wants code from the model repository"),
        ({"model_type": ...}, "`model_type` is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"vocab_size": 10**9}, "`vocab_size` is 1000000000; allowed: 1 to"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` is -1"),
        ({"hidden_size": "64"}, "`hidden_size` is '64'"),
    ],
)
def test_configurations_that_are_refused_unread(copy, keys, message):
    edit(copy, **keys)
    with pytest.raises(ConfigError, match=message):
        inspect_folder(copy)


def test_unknown_architecture(copy):
    edit(copy, model_type="notamodel")
    with pytest.raises(ConfigError, match="'notamodel' is not a causal language model"):
        load_base(copy, "fp32", CPU)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": ' * 3])
def test_damaged_config(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        inspect_folder(copy)


def test_missing_files(copy):
    file, index = copy / "model.safetensors", copy / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-1.safetensors"}}')
    with pytest.raises(ConfigError, match=r"1 of 2 weight files are missing \(model-1.safetensors\)"):
        inspect_folder(copy)
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    for content, message in ((b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            inspect_folder(copy)
    file.unlink()
    with pytest.raises(ConfigError, match="no weights"):
        inspect_folder(copy)
    (copy / "pytorch_model.bin").write_bytes(b"there")  # the index stands for weights that nobody fetched
    assert inspect_folder(copy).weight_files == ("pytorch_model.bin",)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        inspect_folder(copy)


def test_paths(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        resolve_folder(str(file))
    for path in ("./none", "/none/at/all", "nothing", "a/b/c"):
        with pytest.raises(ConfigError, match="no such folder"):
            resolve_folder(path)
    with pytest.raises(ConfigError, match="neither a folder|hub did not give it"):
        resolve_folder("nobody/nothing-like-this")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "x" * 256, "/" + "x" * 300, "~nobody-here/model", "a/\0"])
def test_paths_that_cannot_be(path):
    with pytest.raises(ConfigError, match="cannot be looked up"):
        resolve_folder(path)


def test_damaged_folders(copy):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["x"]}}')
    with pytest.raises(ConfigError, match="weight_map"):
        inspect_folder(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="link to nothing"):
        inspect_folder(copy)
    edit(copy, quantization_config="int4")
    with pytest.raises(ConfigError, match="already quantized"):
        inspect_folder(copy)


NO_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("unable to mmap 99 bytes from file <a>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_too_little_memory_is_no_mistake_in_the_configuration(copy, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "from_pretrained", fail)
        with pytest.raises(MemoryError):
            load_base(copy, "fp32", CPU)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        load_base(copy, "fp32", CPU)


def test_target_modules_are_ends_of_real_names(tiny):
    model = load_base(tiny, "fp32", CPU).model
    for name in ("q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj"):
        assert target_modules(model, "llama", (name,)) == [name]
    for name in ("self_atn.q_proj", "proj", "n.q_proj", "lm_head", ".q_proj", "q_proj.", "layers.9.self_attn.q_proj"):
        with pytest.raises(ConfigError, match=f"{re.escape(name)} is no linear layer"):
            target_modules(model, "llama", ("v_proj", name))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    assert pick_dtype(None, CPU) == "fp32"
    assert pick_dtype("bf16", CPU) == "bf16"
    with pytest.raises(ConfigError, match="no CUDA device"):
        pick_device("cuda")
