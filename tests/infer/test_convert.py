"""`fitune convert`, and what runs on original folders: the same weights, ids and adapters as on the converted ones."""

import itertools
import json
import os
import resource
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

import fitune
from faults import every_failure, every_kill, in_child, touching
from fitune import cli
from fitune.config import build
from fitune.data.tokenizer import Tokenizer
from fitune.errors import CheckpointError, ConfigError
from fitune.infer import convert as conversion
from fitune.infer.convert import convert
from fitune.infer.generate import Sampling, generate
from fitune.model.load import load_base
from fitune.training import run
from original_chatglm import CONFIG, make_weights, reference_logits, write_folder

CPU = torch.device("cpu")
TALK = [
    {"role": "system", "content": "你是一个有用的助手。"},
    {"role": "user", "content": "你好 people"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "sophisticated"},
]


@pytest.fixture(scope="module", params=[2, 3])
def real(request, shared, tmp_path_factory):
    """(version, original folder with the real tokenizer and full vocabulary, the folder it was converted to)."""
    place = tmp_path_factory.mktemp("real")
    name = f"THUDM/chatglm{request.param}-6b"
    form = "bin" if request.param == 3 else "safetensors"
    tokenizer = shared / "tokenizers" / "chatglm3-6b"
    original = write_folder(place / "original", tokenizer, form, padded_vocab_size=65024, _name_or_path=name)
    assert cli.main(["convert", str(original), str(place / "glm")]) == 0
    return request.param, original, place / "glm"


@pytest.fixture
def original(tmp_path):
    """A small original folder whose tokenizer is made in code."""
    return write_folder(tmp_path / "original")


def state(folder, **options):
    return load_base(folder, "fp32", CPU, **options).model.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_transformers_loads_it_without_code(real):
    version, original, glm = real
    model = AutoModelForCausalLM.from_pretrained(glm)
    assert type(model) is GlmForCausalLM
    assert equal(model.state_dict(), state(original))
    assert equal(state(glm), state(original))
    stops = [2, 64795, 64797] if version == 3 else [2]
    assert model.generation_config.eos_token_id == stops
    config = model.config
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id, config.rms_norm_eps) == (2, 0, 1, 1e-5)
    assert not [file.name for file in glm.iterdir() if file.suffix in (".py", ".model")]


def test_transformers_gets_the_ids_of_the_original(real, shared):
    sentencepiece = pytest.importorskip("sentencepiece")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizers/chatglm3-6b/tokenizer.model"))
    version, original, glm = real
    theirs, ours = AutoTokenizer.from_pretrained(glm), fitune.load(glm, device="cpu")
    talk = TALK if version == 3 else TALK[1:]
    if version == 3:
        ids = [64790, 64792]
        for turn in talk:
            role = {"system": 64794, "user": 64795, "assistant": 64796}[turn["role"]]
            ids += [role, 30910, 13, *sp.encode(turn["content"])]
        ids.append(64796)
    else:
        rounds = "[Round 1]\n\n问：你好 people\n\n答：你好！\n\n[Round 2]\n\n问：sophisticated\n\n答："
        ids = [64790, 64792, *sp.encode(rounds)]
    assert theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] == ids
    assert ours.prompt_ids(talk) == ids
    assert fitune.load(original, device="cpu").prompt_ids(talk) == ids
    assert theirs("people sophisticated")["input_ids"] == [64790, 64792, 705, 13301]
    assert theirs.padding_side == "left"
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (0, 2, 64798 if version == 3 else 64794)
    if version == 3:
        tools = [{"name": "f", "description": "天气"}]
        turns = [{"role": "system", "content": "s", "tools": tools}, {"role": "observation", "content": "22"}]
        turns.append({"role": "assistant", "metadata": "f", "content": "x"})
        listed = json.dumps(tools, indent=4, ensure_ascii=False)
        ids = [64790, 64792, 64794, 30910, 13, *sp.encode(f"s\n{listed}"), 64797, 30910, 13, *sp.encode("22")]
        ids += [64796, *sp.encode("f\n"), *sp.encode("x")]
        assert theirs.apply_chat_template(turns)["input_ids"] == ids
        beside = [{"role": "system", "content": "s"}, *turns[1:]]
        assert theirs.apply_chat_template(beside, tools=tools)["input_ids"] == ids
        opening = "Answer the following questions as best as you can. You have access to the following tools:"
        start = [64790, 64792, 64794, 30910, 13, *sp.encode(f"{opening}\n{listed}"), 64797]
        assert theirs.apply_chat_template(turns[1:], tools=tools)["input_ids"][: len(start)] == start


@pytest.mark.parametrize("method", [{"name": "lora", "r": 4}, {"name": "bitfit"}])
def test_training_with_the_whole_vocabulary(real, rows_file, tmp_path, method):
    version, original, glm = real
    if version == 2:
        pytest.skip("the same model")
    result = run.train(configuration(original, tmp_path / "run", rows_file, method), quiet=True)
    assert result.best_eval_loss < result.first_eval_loss
    stored = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert stored.stat().st_size < 200_000, "no embeddings beside it"
    facts = json.loads((stored.parent / "fitune.json").read_text())
    assert facts["base_fingerprint"] == load_base(glm, "fp32", CPU).fingerprint


def test_changed_weights_are_another_model(original, tmp_path):
    glm = convert(original, tmp_path / "glm")
    source = load_base(original, "fp32", CPU).fingerprint
    assert load_base(glm, "fp32", CPU).fingerprint == source
    file = next(glm.glob("model*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert load_base(glm, "fp32", CPU).fingerprint != source


def configuration(base, folder, rows_file, method, **train):
    steps = {"max_steps": 6, "global_batch_rows": 4, "micro_batch_rows": 4, "learning_rate": 1e-2, "device": "cpu"}
    return build(
        {
            "model": {"path": str(base), "dtype": "fp32"},
            "method": method,
            "data": {"train": [str(rows_file)], "eval": 0.2, "max_length": 96},
            "train": steps | {"eval_every_steps": 6, "save_every_steps": 3} | train,
            "output": {"dir": str(folder)},
        }
    )


@pytest.mark.parametrize("method", [{"name": "lora", "r": 4, "target_modules": "linear"}, {"name": "bitfit"}])
def test_adapters_of_the_original_folder_fit_the_converted_one(original, rows_file, tmp_path, method, capsys):
    glm = convert(original, tmp_path / "glm")
    assert Tokenizer.load(original).hash == Tokenizer.load(glm).hash
    run.train(configuration(original, tmp_path / "run", rows_file, method), quiet=True)
    asked = fitune.load(tmp_path / "run", device="cpu")
    moved = shutil.copytree(tmp_path / "run", tmp_path / "moved")
    config = (moved / "config.yaml").read_text().replace(str(original), str(glm))
    (moved / "config.yaml").write_text(config)
    answered = fitune.load(moved, device="cpu")
    ids = torch.tensor([asked.prompt_ids("say 3")])
    assert answered.prompt_ids("say 3") == ids[0].tolist()
    with torch.no_grad():
        logits = asked.model(input_ids=ids).logits
        assert torch.equal(logits, answered.model(input_ids=ids).logits)
        assert not torch.equal(logits, fitune.load(glm, device="cpu").model(input_ids=ids).logits)
    assert asked.generate("say 3", max_new_tokens=4) == answered.generate("say 3", max_new_tokens=4)
    if method["name"] == "lora":
        for folder, noted in ((tmp_path / "run", True), (moved, False)):
            assert cli.main(["export", str(folder), "--to", str(tmp_path / f"{noted}"), "--form", "adapter"]) == 0
            assert (f"fitune convert {original} DST" in capsys.readouterr().out) == noted
    assert run.resume(moved, ["train.max_steps=8"], quiet=True).step == 8


def test_a_merged_export_is_an_ordinary_folder(original, rows_file, tmp_path):
    method = {"name": "lora", "r": 4}
    run.train(configuration(original, tmp_path / "run", rows_file, method, max_steps=2), quiet=True)
    target = fitune.export(tmp_path / "run", tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(target), fitune.load(tmp_path / "run", device="cpu")
    ids = theirs.apply_chat_template(TALK[1:2], add_generation_prompt=True)["input_ids"]
    assert ids == ours.prompt_ids(TALK[1:2])
    model = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        logits = [m(input_ids=torch.tensor([ids])).logits for m in (model, ours.model)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert not list(target.glob("*.py"))


def test_an_answer_ends_where_a_stop_token_comes(original):
    loaded = fitune.load(original, device="cpu")
    prompt = loaded.prompt_ids("say")
    free = generate(loaded.model, [prompt], [351], Sampling(max_new_tokens=8))[0].ids
    assert loaded.tokenizer.stop_ids[0] == 2
    assert len(loaded.tokenizer.stop_ids) == 3
    stopped = generate(loaded.model, [prompt], [free[3]], Sampling(max_new_tokens=8))[0]
    assert stopped.ids == free[: free.index(free[3])]
    assert stopped.stopped


def test_full_fine_tuning_from_an_original_folder(original, rows_file, tmp_path):
    config = configuration(original, tmp_path / "run", rows_file, {"name": "full"}, max_steps=2)
    run.train(config, quiet=True)
    answer = fitune.load(tmp_path / "run", device="cpu")
    assert answer.base.model_type == "glm"
    assert answer.prompt_ids("say") == fitune.load(original, device="cpu").prompt_ids("say")


# --- converting


def test_shards_are_split_by_size(original, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 20_000)
    glm = convert(original, tmp_path / "glm")
    files = sorted(file.name for file in glm.glob("*.safetensors"))
    assert len(files) > 4
    index = json.loads((glm / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state(original).values())
    large = [file for file in files if (glm / file).stat().st_size > 25_000]
    assert all(list(index["weight_map"].values()).count(file) == 1 for file in large)
    assert equal(state(glm), state(original))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_kept(tmp_path, dtype):
    glm = convert(write_folder(tmp_path / "original", dtype=dtype), tmp_path / "glm")
    model = AutoModelForCausalLM.from_pretrained(glm)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_converted_model_follows_the_formulas(tmp_path):
    changes = {"rope_ratio": 50, "layernorm_epsilon": 1e-3}
    glm = convert(write_folder(tmp_path / "original", **changes), tmp_path / "glm")
    ids = torch.randint(0, 352, (2, 17), generator=torch.Generator().manual_seed(0))
    config = CONFIG | changes
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(glm)(input_ids=ids).logits
    assert (logits - reference_logits(make_weights(config), config, ids)).abs().max() <= 1e-5


def test_what_cannot_be_converted(original, tiny, tmp_path, capsys):
    assert cli.main(["convert", str(original), str(original)]) == 2
    assert "exists and is not an empty folder; give a new one" in capsys.readouterr().err
    assert cli.main(["convert", str(tiny), str(tmp_path / "glm")]) == 2
    assert "is a llama folder, which needs no conversion" in capsys.readouterr().err
    assert cli.main(["convert", "./nowhere", str(tmp_path / "glm")]) == 2
    first = {"model_type": "chatglm", "inner_hidden_size": 64, "hidden_size": 32, "num_layers": 2}
    (tmp_path / "first").mkdir()
    first |= {"num_attention_heads": 4, "vocab_size": 130528}
    (tmp_path / "first" / "config.json").write_text(json.dumps(first))
    (tmp_path / "first" / "pytorch_model.bin").write_text("weights")
    with pytest.raises(ConfigError, match="is a chatglm folder, which transformers has no model for"):
        convert(tmp_path / "first", tmp_path / "glm")
    file = original / "pytorch_model-00002-of-00002.bin"
    whole = file.read_bytes()

    def refused(match):
        with pytest.raises(ConfigError, match=match):
            convert(original, tmp_path / "glm")
        assert not (tmp_path / "glm").exists()
        assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []

    weights = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in weights.items() if "output_layer" not in k}, file)
    refused(r"1 weights are missing, surplus or of another shape .*\(lm_head.weight is missing\)")
    torch.save(weights | {"transformer.output_layer.weight": torch.ones(3, 32)}, file)
    refused(r"lm_head.weight is of shape \[3, 32\], not \[352, 32\]")
    torch.save({k: v.half() for k, v in weights.items()}, file)
    refused(r"weights are torch.float16, torch.float32; one kind is needed")
    torch.save(weights | {"transformer.encoder.layers.2.input_layernorm.weight": torch.ones(32)}, file)
    refused(r"\(model.layers.2.input_layernorm.weight is surplus\)")
    file.write_bytes(whole[:-100])
    refused("is damaged or no weight file; download it again")
    (original / "tokenizer.model").unlink()
    refused("has no tokenizer.model")


def test_a_vocabulary_beyond_the_embeddings_is_refused(tmp_path):
    original = write_folder(tmp_path / "original", padded_vocab_size=300)
    with pytest.raises(ConfigError, match="the model only 300 embedding rows"):
        convert(original, tmp_path / "glm")


# --- crashes and full disks


@pytest.fixture
def places(original, tmp_path):
    """A function that names a new target each time."""
    count = itertools.count()
    return lambda: tmp_path / "out" / f"glm{next(count)}"


def test_after_any_fault_the_folder_is_whole_or_not_there(places, original):
    def content(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    expected = content(convert(original, places()))

    def check(target):
        if not target.exists():
            with touching(lambda k, name: None):  # without fsync
                convert(original, target)
        assert content(target) == expected
        assert [name for name in os.listdir(target.parent) if name.startswith(".")] == []

    assert every_kill(places, lambda target: convert(original, target), check) >= 30
    assert every_failure(places, lambda target: convert(original, target), check) >= 50


def test_a_full_disk_is_said_and_leaves_nothing(original, tmp_path, monkeypatch):
    target = tmp_path / "glm"

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        convert(original, target)

    said = in_child(fill_up)
    assert "CheckpointError: disk: cannot write" in said
    assert "the file size limit is reached; about " in said
    assert os.listdir(tmp_path) == ["original"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match="the disk is full; about .* needed, 0 bytes .* free"):
        convert(original, target)
    assert os.listdir(tmp_path) == ["original"]
