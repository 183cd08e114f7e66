"""How weights reach the device: cast on the way, without a copy of the model on the host, each in memory of its own."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fitune.model.load import DTYPES, load_base
from fitune.model.quantize import quantize_blocks
from tiny import make_model

CPU = torch.device("cpu")


def store(folder, dtypes):
    """Write a folder's weights again, the i-th in the i-th of these dtypes, over and over."""
    file = folder / "model.safetensors"
    names = enumerate(load_file(file).items())
    save_file({name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in names}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("wanted", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("stored", [["fp16"], ["bf16"], ["fp32"], ["fp16", "fp32"]], ids="-".join)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom", "gpt2"])
def test_weights_are_those_that_transformers_casts(tmp_path, kind, stored, wanted):
    folder = store(make_model(tmp_path / "model", kind), [DTYPES[name] for name in stored])
    ours = load_base(folder, wanted, CPU).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[wanted])
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    tables = dict(theirs.named_buffers())
    assert tables.keys() == dict(ours.named_buffers()).keys()
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == tables[name].dtype, name
        assert torch.equal(buffer, tables[name]), name
    assert ours.config.dtype == ours.dtype == DTYPES[wanted]
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom"])
def test_weights_are_rounded_before_they_are_quantized(tmp_path, kind, quantization):
    folder = store(make_model(tmp_path / "model", kind), [torch.float32])
    ours = load_base(folder, "bf16", CPU, quantization).model.state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    quantize_blocks(theirs, quantization, CPU)
    expected = theirs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor.float(), expected[name].float()) for name, tensor in ours.items())
    assert all(tensor.dtype == expected[name].dtype for name, tensor in ours.items())


MEASURE = """
import re, sys, threading, time
import torch, transformers
from pathlib import Path
from fitune.model.load import load_base

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, tiny, dtype, quantization = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
load_base(tiny, dtype, torch.device("cpu"), quantization)  # imports and code take memory once
before, most, done = private(), 0, threading.Event()

def watch():
    global most
    while not done.wait(0.002):
        most = max(most, private())

watcher = threading.Thread(target=watch)
watcher.start()
base = load_base(folder, dtype, torch.device("cpu"), quantization)
time.sleep(0.01)
done.set()
watcher.join()
print(most - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 205 MB in fp16: with safetensors, with a table in fp32 beside the weights, and as a .bin file."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=1000)).to(torch.float16)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("plain", "table", "bin")}
    for folder in folders.values():
        model.config.save_pretrained(folder)
    state = model.state_dict()
    save_file(state, folders["plain"] / "model.safetensors", {"format": "pt"})
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    save_file(state | table, folders["table"] / "model.safetensors", {"format": "pt"})
    torch.save(state, folders["bin"] / "pytorch_model.bin")
    return folders, sum(tensor.nbytes for tensor in state.values())


def in_a_child(code, *arguments):
    """What a Python process prints last; large blocks go back to the system at once there, so that nothing varies."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("files", "dtype", "quantization", "most"),
    [
        ("plain", "fp16", "none", 0.05),
        ("plain", "bf16", "nf4", 0.6),
        ("plain", "bf16", "int8", 0.7),
        ("table", "bf16", "int8", 0.7),
        ("bin", "bf16", "int8", 0.7),
    ],
)
def test_no_copy_of_the_model_on_the_host(large, tmp_path, files, dtype, quantization, most):
    """Shares of the bytes of fp16 files; the quantized weights are there. With a copy in bf16 it was 1.05 and more."""
    folders, num_bytes = large
    small = store(make_model(tmp_path / "small"), [torch.float16])
    highest = int(in_a_child(MEASURE, folders[files], small, dtype, quantization))
    assert highest < most * num_bytes, highest / num_bytes


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_too_little_memory_for_a_cast_is_said(tiny, monkeypatch, quantization):
    """PyTorch's CPU allocator says it as a RuntimeError, wherever in loading that is."""
    to = torch.Tensor.to

    def refuse(tensor, *args, **options):
        caller = sys._getframe(1).f_code.co_filename
        if caller.endswith(("model/load.py", "model/quantizers.py")):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    with pytest.raises(MemoryError, match="tried to allocate 9 bytes"):
        load_base(tiny, "bf16", CPU, quantization)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stored", ["fp16", "bf16"])
def test_the_memory_of_a_block_can_be_given_back(tmp_path, stored):
    """transformers reads all weights into one large piece; PyTorch gives back nothing of it as long as any is used."""
    cuda = torch.device("cuda")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=16, vocab_size=1000)
    transformers.LlamaForCausalLM(config).to(DTYPES[stored]).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = load_base(tmp_path, "bf16", cuda).model
    taken = torch.cuda.memory_reserved() - before
    num_bytes = sum(p.nbytes for p in model.parameters())
    assert taken < 1.05 * num_bytes + 40e6
    for layer in model.model.layers[1:3]:
        for parameter in layer.mlp.parameters():
            parameter.data = torch.empty(0, device=cuda)
    torch.cuda.empty_cache()
    given_back = taken - (torch.cuda.memory_reserved() - before)
    assert given_back >= 2 * 3 * 2048 * 8192 * 2
