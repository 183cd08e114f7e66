"""Every kind of mistake that was tried: how to make it, the exit code, what the message must say.

`test_errors.py` runs each through the command line; `make docs` runs them too and writes docs/errors.md.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from original_chatglm import write_folder

GOOD = {"instruction": "say hello", "output": "hello"}


@dataclass(frozen=True)
class Place:
    """Where a case builds its files.

    Attributes:
        folder: empty, for this case.
        model: a tiny Llama model, not to be changed.
        run: a finished tiny run, not to be changed.
    """

    folder: Path
    model: Path
    run: Path

    def rows(self, *lines: bytes | str | dict, name: str = "rows.jsonl") -> str:
        """A data file; dictionaries become JSON, the rest stands as given."""
        encoded = [
            line if isinstance(line, bytes) else (json.dumps(line) if isinstance(line, dict) else line).encode()
            for line in lines
        ]
        (self.folder / name).write_bytes(b"\n".join(encoded) + b"\n")
        return str(self.folder / name)

    def config(self, *overrides: str, text: str = "", data: str | None = None) -> list[str]:
        """A `fitune train` command with a small complete configuration."""
        file = self.folder / "run.yaml"
        rows = data if data is not None else self.rows(*[GOOD] * 8)
        file.write_text(text or f"model: {{path: {json.dumps(str(self.model))}}}\n", encoding="utf-8")
        given = {text.partition("=")[0] for text in overrides}
        defaults = {
            "data.train": rows,
            "data.template": "tutorial",
            "data.max_length": "64",
            "train.max_steps": "2",
            "train.device": "cpu",
            "output.dir": str(self.folder / "run"),
        }
        fill = [f"{key}={value}" for key, value in defaults.items() if key not in given] if not text else []
        return ["train", str(file), "--quiet", *fill, *overrides]

    def copy_model(self) -> Path:
        """A model folder to damage."""
        return shutil.copytree(self.model, self.folder / "model", dirs_exist_ok=True)

    def copy_run(self) -> Path:
        """A run folder to damage."""
        return shutil.copytree(self.run, self.folder / "run", dirs_exist_ok=True)


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        kind: section of docs/errors.md.
        what: the mistake in words.
        build: makes the files, returns the command's arguments.
        code: exit code.
        says: must occur in the message.
    """

    kind: str
    what: str
    build: Callable[[Place], list[str]]
    code: int
    says: str


def _row(what: str, says: str, *lines: bytes | str | dict) -> Case:
    """A data file whose first row is good; the mistake follows."""
    return Case("Rows", what, lambda p: p.config(data=p.rows(GOOD, *lines)), 3, says)


def _setting(what: str, says: str, *overrides: str) -> Case:
    return Case("Configuration", what, lambda p: p.config(*overrides), 2, says)


def _model(what: str, says: str, damage: Callable[[Path], None]) -> Case:
    def build(place: Place) -> list[str]:
        folder = place.copy_model()
        damage(folder)
        return place.config(f"model.path={folder}")

    return Case("Model folders", what, build, 2, says)


def _chatglm(what: str, says: str, **changes: object) -> Case:
    """An original ChatGLM folder whose config.json is changed."""

    def build(place: Place) -> list[str]:
        folder = write_folder(place.folder / "chatglm")
        _edit_json(folder / "config.json", **changes)
        return place.config(f"model.path={folder}", "data.template=auto")

    return Case("Original ChatGLM folders", what, build, 2, says)


def _run(what: str, says: str, damage: Callable[[Path], None], code: int = 6, *overrides: str) -> Case:
    def build(place: Place) -> list[str]:
        folder = place.copy_run()
        damage(folder)
        return ["resume", str(folder), "--quiet", *overrides]

    return Case("Checkpoints and runs", what, build, code, says)


def _method(what: str, says: str, name: str, *overrides: str) -> Case:
    return Case("Methods", what, lambda p: p.config(f"method.name={name}", *overrides), 2, says)


def _adapter(
    what: str, says: str, *overrides: str, damage: Callable[[Path], None] = lambda run: None, code: int = 2
) -> Case:
    """A run that is to start from the adapter of another one."""

    def build(place: Place) -> list[str]:
        run = shutil.copytree(place.run, place.folder / "first")
        damage(run)
        return place.config(f"method.adapter={run}", *overrides)

    return Case("Methods", what, build, code, says)


def _merged_prompts(place: Place) -> list[str]:
    import yaml

    run = place.copy_run()
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["method"] = {"name": "prompt"}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["export", str(run), "--to", str(place.folder / "out")]


def _bad_rows(place: Place) -> str:
    return place.rows({"instruction": "a", "output": ""}, name="bad.jsonl")


def _plan(what: str, says: str, keys: dict[str, object], code: int = 2, *overrides: str) -> Case:
    """`fitune plan` of a model whose config.json has other keys."""

    def build(place: Place) -> list[str]:
        folder = place.copy_model()
        _edit_json(folder / "config.json", **keys)
        given = [text.replace("ROWS", _bad_rows(place)) if "ROWS" in text else text for text in overrides]
        _, file, _, *settings = place.config(f"model.path={folder}", *given)
        return ["plan", file, *settings]

    return Case("Plans", what, build, code, says)


def _edit_json(file: Path, **keys: object) -> None:
    value = json.loads(file.read_text(encoding="utf-8")) | keys
    file.write_text(json.dumps(value), encoding="utf-8")


def _more_tokens(file: Path) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    value["model"]["vocab"] |= {f"word{i}": 200 + i for i in range(50)}
    file.write_text(json.dumps(value), encoding="utf-8")


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _each_checkpoint(action: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for folder in (run / "checkpoints").glob("step_*"):
            action(folder)

    return damage


def _evil_bin(folder: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (print, ("code ran",))

    torch.save({"w": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _gzip_cut(place: Place) -> list[str]:
    data = gzip.compress(b"\n".join(json.dumps(GOOD | {"n": i}).encode() for i in range(500)))
    file = place.folder / "rows.jsonl.gz"
    file.write_bytes(data[: len(data) // 2])
    return place.config(data=str(file))


ROWS = (
    _row("invalid JSON", "rows.jsonl:2", '{"instruction": "a", "output": }'),
    _row("a truncated last line", "rows.jsonl:2", '{"instruction": "a", "outp'),
    _row("missing field", "output", {"instruction": "a"}),
    _row("number in a text field", "output", {"instruction": "a", "output": 5}),
    _row("list in a text field", "output", {"instruction": "a", "output": ["b"]}),
    _row("null answer", "output", {"instruction": "a", "output": None}),
    _row("empty answer", "output", {"instruction": "a", "output": ""}),
    _row("answer of white space only", "output", {"instruction": "a", "output": " \n"}),
    _row("empty instruction", "instruction", {"instruction": "", "output": "b"}),
    _row("duplicate key", "output", '{"instruction": "a", "output": "b", "output": "c"}'),
    _row("NaN literal", "NaN", '{"instruction": "a", "output": "b", "score": NaN}'),
    _row("invalid UTF-8", "UTF-8", b'{"instruction": "a", "output": "\xff\xfe"}'),
    _row("blank line in the middle", "blank", "", GOOD),
    _row("a list instead of an object", "object", '["a", "b"]'),
    _row("two objects on one line", "rows.jsonl:2", json.dumps(GOOD) + json.dumps(GOOD)),
    _row("nested 5,000 deep", "rows.jsonl:2", '{"instruction": "a", "output": "b", "x": ' + "[" * 5000 + "]" * 5000 + "}"),
    _row("a row of another format", "rows.jsonl:2", {"messages": [{"role": "user", "content": "a"}]}),
    _row("broken history", "history", {"instruction": "a", "output": "b", "history": [["only one"]]}),
    Case("Rows", "an answer that would be cut", lambda p: p.config(data=p.rows(GOOD, GOOD | {"output": "b" * 500})), 3,
         "data.on_long_rows"),
    Case("Rows", "unknown role",
         lambda p: p.config(data=p.rows({"messages": [{"role": "boss", "content": "a"}]})), 3, "boss"),
    Case("Rows", "the conversation ends with the user",
         lambda p: p.config(data=p.rows({"messages": [{"role": "user", "content": "a"}]})), 3, "assistant"),
    Case("Rows", "two answers in a row", lambda p: p.config(data=p.rows({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}]})),
        3, "assistant"),
    Case("Rows", "no known format", lambda p: p.config(data=p.rows({"question": "a", "answer": "b"})), 3, "format"),
    Case("Rows", "empty file", lambda p: p.config(data=p.rows(b"")), 3, "has no rows"),
    Case("Rows", "no such file", lambda p: p.config(data=str(p.folder / "none.jsonl")), 3, "none.jsonl"),
    Case("Rows", "a folder instead of a file", lambda p: p.config(data=str(p.folder)), 3, "is a directory"),
    Case("Rows", "unknown file type", lambda p: p.config(data=p.rows(GOOD, name="rows.csv")), 3, ".jsonl"),
    Case("Rows", "gzip cut short", _gzip_cut, 3, "rows.jsonl.gz"),
    Case("Rows", "not gzip at all", lambda p: p.config(data=p.rows(GOOD, name="rows.jsonl.gz")), 3, "gzip"),
    Case("Rows", "the doctor finds bad rows",
         lambda p: ["data", p.rows(GOOD, {"instruction": "a"}), "--model", str(p.model)], 3, "rows.jsonl:2"),
)  # fmt: skip

CONFIGURATION = (
    _setting("unknown section", "did you mean `train`", "trian.seed=1"),
    _setting("unknown key", "did you mean `train.learning_rate`", "train.learning_rat=1"),
    _setting("key of another section", "did you mean `method.r`", "train.r=8"),
    _setting("unknown method", "allowed: lora, full, freeze, bitfit", "method.name=lroa"),
    _setting("value out of range", "`method.r` is 0", "method.r=0"),
    _setting("value of another type", "`train.epochs` is 'many'", "train.epochs=many"),
    _setting("unknown choice", "'constant', 'linear' or 'cosine'", "train.schedule=step"),
    _setting("held-out fraction of 90 %", "above 0 and at most 0.5", "data.eval=0.9"),
    _setting("rows and tokens per step", "keep one", "train.global_batch_rows=4", "train.global_batch_tokens=64"),
    _setting("padded micro-batch with packing", "data.packing is true", "data.packing=true", "train.micro_batch_rows=2"),
    _setting("Adam in fp16 with epsilon 1e-8", "epsilon becomes 0", "train.optimizer_dtype=fp16"),
    _setting("8-bit Adam with 16-bit masters", "8-bit", "train.optimizer=adamw8bit", "train.optimizer_dtype=bf16"),
    _setting("unknown quantization", "'none', 'int8', 'nf4', 'fp4' or 'fp8'", "model.quantization=int4"),
    _setting("full fine-tuning of quantized weights", "Set model.quantization=none or method.name=lora",
             "model.quantization=nf4", "method.name=full"),
    _setting("LLM.int8() of other weights", "set model.quantization=int8 or model.int8_compute=weight_only",
             "model.quantization=nf4", "model.int8_compute=llm_int8"),
    _setting("unknown template", "tutorial", "data.template=tutorail"),
    _setting("template whose tokens the tokenizer lacks", "<|im_start|>", "data.template=chatml"),
    _setting("longer than the model's positions", "256 positions", "data.max_length=1000"),
    _setting("BitFit without biases", "has none; use method.name=lora", "method.name=bitfit"),
    _setting("adapter on a layer that is not there", "no linear layer", "method.target_modules=[q_prj]"),
    _setting("override without a section", "section.key=value", "seed=1"),
    _setting("no training file", "data.train is not set", "data.train=[]"),
    Case("Configuration", "no model", lambda p: p.config(text="train: {seed: 1}\n"), 2, "`model.path` is required"),
    Case("Configuration", "invalid YAML", lambda p: p.config(text="model: [\n"), 2, "not valid YAML"),
    Case("Configuration", "a key twice", lambda p: p.config(text="model: {path: a}\nmodel: {path: b}\n"), 2, "given twice"),
    Case("Configuration", "a YAML alias", lambda p: p.config(text="a: &a 1\nb: *a\n"), 2, "aliases"),
    Case("Configuration", "a YAML tag that runs code",
         lambda p: p.config(text="model: !!python/object/apply:os.getcwd []\n"), 2, "not valid YAML"),
    Case("Configuration", "no such file", lambda p: ["train", str(p.folder / "none.yaml")], 2, "cannot read"),
    Case("Configuration", "a run is already there", lambda p: p.config(f"output.dir={p.copy_run()}"), 2, "fitune resume"),
    Case("Configuration", "nothing to generate", lambda p: ["generate", str(p.model)], 2, "--prompt"),
    Case("Configuration", "sampling out of range",
         lambda p: ["generate", str(p.model), "--prompt", "a", "--top-p", "2"], 2, "--top-p"),
    Case("Configuration", "export over something", lambda p: ["export", str(p.run), "--to", str(p.model)], 2,
         "not an empty folder"),
)  # fmt: skip

MODELS = (
    Case("Model folders", "no such folder", lambda p: p.config("model.path=/none/here"), 2, "no such folder"),
    Case("Model folders", "a file", lambda p: p.config(f"model.path={p.rows(GOOD)}"), 2, "is a file"),
    _model("no config.json", "config.json: cannot be read", lambda f: (f / "config.json").unlink()),
    _model("config.json is not JSON", "not valid JSON", lambda f: (f / "config.json").write_text("{")),
    _model("no model_type", "`model_type` is missing",
           lambda f: (f / "config.json").write_text('{"vocab_size": 128}')),
    _model("unknown architecture", "'perceptron' is not a causal language model",
           lambda f: _edit_json(f / "config.json", model_type="perceptron")),
    _model("wants remote code", "fitune never runs",
           lambda f: _edit_json(f / "config.json", auto_map={"AutoModel": "m.M"})),
    _model("already quantized", "already quantized (gptq)",
           lambda f: _edit_json(f / "config.json", quantization_config={"quant_method": "gptq"})),
    _model("absurd sizes", "`vocab_size` is 1000000000000", lambda f: _edit_json(f / "config.json", vocab_size=10**12)),
    _model("no weights", "no weights", lambda f: (f / "model.safetensors").unlink()),
    _model("empty weight file", "is empty", lambda f: (f / "model.safetensors").write_bytes(b"")),
    _model("weight file cut short", "model", lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100])),
    _model("weights that run code", "it wants to run", _evil_bin),
    _model("a shard is missing", "weight files are missing", lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')),
    _model("weights of another shape", "down_proj.weight: 64 x 96 stored, 64 x 80 by config.json", lambda f: _edit_json(f / "config.json", intermediate_size=80)),
    _model("no tokenizer", "tokenizer", lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")]),
    _model("damaged tokenizer", "tokenizer", lambda f: (f / "tokenizer.json").write_text("{")),
    _model("tokenizer larger than the model", "do not belong together",
           lambda f: _more_tokens(f / "tokenizer.json")),
)  # fmt: skip

RUNS = (
    Case("Checkpoints and runs", "no such run", lambda p: ["resume", str(p.folder / "none")], 6, "none"),
    Case("Checkpoints and runs", "not a run folder", lambda p: ["resume", str(p.folder)], 6, "config.yaml"),
    _run("every checkpoint has a flipped bit", "optimizer.safetensors",
         _each_checkpoint(lambda f: _flip(f / "optimizer.safetensors"))),
    _run("every manifest is missing", "MANIFEST.json", _each_checkpoint(lambda f: (f / "MANIFEST.json").unlink())),
    _run("every state file is cut", "state.json", _each_checkpoint(lambda f: (f / "state.json").write_text("{"))),
    _run("resumed with another rank", "cannot be resumed with method.r", lambda f: None, 2, "method.r=2"),
    _run("resumed with another quantization", "cannot be resumed with model.quantization", lambda f: None, 2,
         "model.quantization=nf4"),
    _run("resumed with another seed", "cannot be resumed with train.seed", lambda f: None, 2, "train.seed=9"),
    _run("config.yaml damaged", "not valid YAML", lambda f: (f / "config.yaml").write_text("[") and None, 2),
    Case("Checkpoints and runs", "chat with an unfinished run",
         lambda p: (shutil.rmtree(p.copy_run() / "adapter"), ["chat", str(p.folder / "run")])[1], 2, "has no result yet"),
    Case("Checkpoints and runs", "the adapter is damaged",
         lambda p: ((p.copy_run() / "adapter" / "adapter_model.safetensors").write_bytes(b"x"),
                    ["generate", str(p.folder / "run"), "--prompt", "a"])[1], 6, "cannot be read"),
    Case("Checkpoints and runs", "the adapter belongs to another base",
         lambda p: (_edit_json(p.copy_run() / "adapter" / "fitune.json", base_fingerprint="0"),
                    ["generate", str(p.folder / "run"), "--prompt", "a"])[1], 6, "trained on other weights"),
    Case("Checkpoints and runs", "evaluate a bare model", lambda p: ["eval", str(p.model)], 2, "not a run folder"),
)  # fmt: skip

PLANS = (
    _plan("an architecture that cannot be planned", "'perceptron' cannot be planned", {"model_type": "perceptron"}),
    _plan("a size is missing", "`hidden_size` is missing", {"hidden_size": None}),
    _plan("a size is no number", "`num_hidden_layers` is 'two'", {"num_hidden_layers": "two"}),
    _plan("heads that cannot share keys", "cannot share 3", {"num_key_value_heads": 3}),
    _plan("the engine where it cannot run", "hidden_act 'gelu'", {"hidden_act": "gelu"}, 2, "train.path=fast"),
    _plan(
        "more memory than the budget", "offload it still takes 0.93 GB", {}, 4, "memory.budget=0.5", "train.device=cuda"
    ),
    _plan("a row longer than the model's positions", "256 positions", {}, 2, "data.max_length=1000"),
    _plan("rows that training would refuse", "bad.jsonl:1", {}, 3, "data.train=ROWS"),
)

CHATGLM = (
    _chatglm("weights packed into integers", "`quantization_bit` is 4", quantization_bit=4),
    _chatglm("a prefix encoder beside the model", "`pre_seq_len` is 128", pre_seq_len=128),
    _chatglm("neither version 2 nor 3", "ChatGLM2 or ChatGLM3?", _name_or_path="mine"),
    Case("Original ChatGLM folders", "nothing to convert",
         lambda p: ["convert", str(p.model), str(p.folder / "glm")], 2, "is a llama folder, which needs no conversion"),
    Case("Original ChatGLM folders", "converted over something",
         lambda p: ["convert", str(write_folder(p.folder / "chatglm")), str(p.model)], 2, "not an empty folder"),
)  # fmt: skip

METHODS = (
    _method("a setting of another method", "it belongs to method.name=lora", "prompt", "method.r=8"),
    _method("a text start without a text", "method.init_text is not set", "prompt", "method.init=text"),
    _method("a text longer than the prompt", "set method.num_virtual_tokens=11", "prompt", "method.init=text",
            "method.init_text=hello there", "method.num_virtual_tokens=5"),
    _method("rows and virtual tokens beyond the positions", "together are more than the 256 positions", "prefix",
            "data.max_length=250"),
    _method("a prefix with recomputation", "train.activation_checkpointing=false, or use method.name=prompt", "prefix",
            "train.activation_checkpointing=true", "train.path=plain"),
    _method("virtual tokens in packed rows", "of several rows in one sequence only the first", "prompt",
            "data.packing=true", "train.path=plain"),
    _method("factors the engine does not have", "IA3's factors on other layers", "ia3", "train.path=fast",
            "method.target_modules=linear"),
    _method("a projected prefix that starts as a text", "set method.init=random or method.projection=false", "prefix",
            "method.projection=true", "method.init=text", "method.init_text=hello"),
    _method("dropout without an LSTM", "set method.encoder=lstm", "ptuning", "method.dropout=0.1"),
    _method("more trained blocks than there are", "has 2 blocks", "freeze", "method.num_layers=5"),
    _method("nothing left to train", "nothing would be trained", "freeze", "method.num_layers=0"),
    _method("a pattern without a match", "matches no parameter", "freeze", "method.patterns=['*.bias']"),
    _method("trained blocks in 4 bits", "quantized weights are frozen", "freeze", "model.quantization=nf4"),
    _method("a pattern that matches quantized weights", "model.layers.*.mlp.gate_proj.weight", "freeze",
            "model.quantization=nf4", "method.patterns=['*.mlp.*']"),
    _method("scaled inputs that are no targets", "q_proj is not among method.target_modules", "ia3",
            "method.feedforward_modules=[q_proj]"),
    _method("PiSSA on quantized weights", "the adapter would no longer fit", "lora", "method.init=pissa",
            "model.quantization=int8"),
    _method("PiSSA with DoRA", "does not add up", "lora", "method.init=pissa", "method.dora=true"),
    _method("PiSSA with a rank above the weights'", "has only 32 singular values", "lora", "method.init=pissa",
            "method.r=40"),
    _method("a linear layer trained whole", "linear layers of the blocks get adapters", "lora",
            "method.modules_to_save=[q_proj]"),
    _method("a new token that is none", "is a token of", "lora", "method.new_tokens=[a]"),
    Case("Methods", "no adapter to start from", lambda p: p.config("method.adapter=/none/here"), 2, "no run with an adapter"),
    Case("Methods", "a model given as an adapter", lambda p: p.config(f"method.adapter={p.model}"), 2,
         "give it as model.path"),
    _adapter("an adapter of another method", "peft_type 'LORA', but method.name is ia3", "method.name=ia3"),
    _adapter("an adapter of another rank", "method.r is 4, but the adapter", "method.r=4"),
    _adapter("an adapter on other layers", "method.target_modules is 'linear', but the adapter", "method.target_modules=linear"),
    _adapter("an adapter with what fitune does not train", "`rank_pattern`: {'q_proj': 2}",
             damage=lambda run: _edit_json(run / "adapter" / "adapter_config.json", rank_pattern={"q_proj": 2})),
    _adapter("an adapter of another base", "trained on other weights", code=6,
             damage=lambda run: _edit_json(run / "adapter" / "fitune.json", base_fingerprint="0" * 64)),
    _adapter("a damaged adapter", "adapter_model.safetensors: cannot be read", code=6,
             damage=lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x")),
    Case("Methods", "merging virtual tokens", _merged_prompts, 2, "no weights of the model could hold them"),
)  # fmt: skip

CASES = (*ROWS, *CONFIGURATION, *MODELS, *CHATGLM, *METHODS, *RUNS, *PLANS)
