"""Loading, overriding, checking, explaining."""

import pytest

from fitune.config import RunConfig, build, dump, leaves, load
from fitune.config.load import METHODS, every_key, valid_keys
from fitune.errors import ConfigError

DATES = ("2024-13-45", "2024-01-01")
MINIMAL = {"model": {"path": "embedded"}}


def test_only_the_model_is_required():
    config = build(MINIMAL, name="demo")
    assert config.output.dir == "runs/demo"
    assert config.method.name == "lora"
    assert config.train.global_batch_rows == 16
    assert config.train.learning_rate == 2e-4
    assert config.train.micro_batch_rows == 4
    assert config.train.micro_batch_tokens is None


@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-4), ("full", 2e-5), ("bitfit", 1e-3), ("ia3", 3e-3)])
def test_learning_rate_depends_on_the_method(method, rate):
    assert build({**MINIMAL, "method": {"name": method}}).train.learning_rate == rate


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "`model.path` is required"),
        ({"model": {}}, "`model.path` is required"),
        ({**MINIMAL, "trian": {}}, "unknown key `trian`; did you mean `train`"),
        ({**MINIMAL, "train": {"learning_rat": 1}}, "did you mean `train.learning_rate`"),
        ({**MINIMAL, "train": {"r": 1}}, "did you mean `method.r`"),
        ({**MINIMAL, "method": {"rank": 1}}, "unknown key `method.rank`"),
        (
            {**MINIMAL, "method": {"name": "lroa"}},
            "'lroa'; allowed: lora, full, freeze, bitfit, prompt, ptuning, prefix, ia3",
        ),
        ({**MINIMAL, "method": {"name": "full", "r": 8}}, "unknown key `method.r`"),
        ({**MINIMAL, "method": {"r": 0}}, "`method.r` is 0: input should be greater than 0"),
        ({**MINIMAL, "method": {"target_modules": []}}, "adapts nothing"),
        ({**MINIMAL, "train": {"epochs": -1}}, "`train.epochs` is -1"),
        ({**MINIMAL, "train": {"learning_rate": float("nan")}}, "`train.learning_rate` is nan"),
        ({**MINIMAL, "train": {"schedule": "cosin"}}, "'constant', 'linear' or 'cosine'"),
        ({**MINIMAL, "train": 5}, "`train` is 5"),
        ({**MINIMAL, "data": {"eval": 0.9}}, "above 0 and at most 0.5"),
        ({**MINIMAL, "data": {"max_length": 2}}, "`data.max_length` is 2"),
        ({**MINIMAL, "train": {"global_batch_rows": 4, "global_batch_tokens": 4}}, "keep one"),
        ({**MINIMAL, "train": {"micro_batch_tokens": 4096}}, "data.packing is false"),
        ({**MINIMAL, "data": {"packing": True}, "train": {"micro_batch_rows": 2}}, "data.packing is true"),
        ({**MINIMAL, "data": {"packing": True}, "train": {"micro_batch_tokens": 64}}, "less than data.max_length"),
        ({**MINIMAL, "train": {"optimizer_dtype": "fp16"}}, "smallest fp16 number is 6e-8"),
        ({**MINIMAL, "train": {"optimizer_dtype": "fp16", "adam_epsilon": 5e-8}}, "epsilon becomes 0"),
        ({**MINIMAL, "train": {"optimizer": "adamw8bit", "optimizer_dtype": "bf16"}}, "8-bit"),
    ],
)
def test_a_mistake_is_explained(tree, message):
    with pytest.raises(ConfigError) as caught:
        build(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": "embedded"}, "write `model: {path: embedded}`"),
        ({**MINIMAL, "data": "rows.jsonl"}, "write `data: {train: rows.jsonl}`"),
        ({**MINIMAL, "data": ["a"]}, "write `data: {train: rows.jsonl}`"),
        ({**MINIMAL, "train": 3}, "write `train: {epochs: 1}`"),
        ({**MINIMAL, "method": 5}, "write `method: {name: lora}`"),
        ({**MINIMAL, "method": ["lora"]}, "write `method: {name: lora}`"),
        ({**MINIMAL, "memory": 8}, "write `memory: {budget: 8}`"),
        ({**MINIMAL, "output": "runs/a"}, "write `output: {dir: runs/a}`"),
    ],
)
def test_a_section_given_as_one_value(tree, message):
    with pytest.raises(ConfigError) as caught:
        build(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.max_steps", True, "not true or false"),
        ("train.epochs", True, "not true or false"),
        ("data.eval", True, "not true or false"),
        ("data.packing", "yes", "boolean"),
        ("data.packing", 1, "boolean"),
        ("data.train", {"a": "b"}, "give a file, a list of files"),
        ("data.train", 5, "give a file, a list of files"),
        ("data.train", ["a.jsonl", None], "give a file, a list of files"),
        ("data.train", [""], "cannot be empty"),
        ("data.train", "a\0b", "control characters"),
        ("data.eval", {"a": 1}, "or a fraction such as 0.05"),
        ("data.eval", 0, "above 0 and at most 0.5"),
        ("data.eval", "x" * 256, "255 between two slashes"),
        ("model.path", "a\0b", "control characters"),
        ("model.path", "a\ud800", "unicode"),
        ("model.path", "a/" * 2500, "4000 bytes"),
        ("output.dir", "字" * 86, "255 between two slashes"),
        ("output.dir", "a\0b", "control characters"),
        ("method.target_modules", "q_proj", "a list of module names such as [q_proj, v_proj]"),
        ("method.target_modules", [5], "a list of module names such as [q_proj, v_proj]"),
        ("method.r", 65537, "less than or equal to 65536"),
        ("train.epochs", 10001, "less than or equal to 10000"),
        ("train.epochs", 10**400, "`train.epochs`"),
        pytest.param("train.seed", 10**5000, "`train.seed` is a number too large to show", id="digits"),
        ("train.max_steps", 10**9 + 1, "less than or equal to 1000000000"),
        ("data.max_length", 10_000_001, "less than or equal to 10000000"),
    ],
)
def test_absurd_values_are_refused_once(key, value, message):
    section, name = key.split(".")
    with pytest.raises(ConfigError) as caught:
        build({**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(caught.value).count("\n") == 0


def test_an_empty_section_is_no_mistake():
    assert build({**MINIMAL, "train": None}) == build(MINIMAL)


def test_epsilon_that_fp16_can_hold_is_accepted():
    assert build({**MINIMAL, "train": {"optimizer_dtype": "fp16", "adam_epsilon": 1e-5}}).train.adam_epsilon == 1e-5


def test_overrides_are_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  path: embedded\ntrain:\n")
    overrides = ["train.learning_rate=1e-4", "method.target_modules=[q_proj, v_proj]", "train.max_steps=null"]
    config = load(file, overrides)
    assert config.train.learning_rate == 1e-4
    assert config.method.target_modules == ("q_proj", "v_proj")
    assert config.output.dir == "runs/a"


@pytest.mark.parametrize("override", ["learning_rate=1", "train.learning_rate", "a.b.c=1", ".x=1", "train.seed=[1"])
def test_bad_overrides(tmp_path, override):
    file = tmp_path / "a.yaml"
    file.write_text("model: {path: embedded}")
    with pytest.raises(ConfigError, match="override"):
        load(file, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=!!int abc", "tags"),
        ("train.seed=!!timestamp x", "tags"),
        ("train.seed=! x", "tags"),
        ("train.seed=" + "1" * 5000, "too many digits"),
        ("data.train=" + "[" * 3000, "nested too deeply"),
        ("data.train=" + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("data.train={[a]: 1}", "a key must be text"),
        ("data.train={? {a: b} : 1}", "a key must be text"),
        ("data.train={1: a}", "a key must be text"),
        ("train.seed=010", "octal"),
        ("train.epochs=1:30", "number"),
        ("data.packing=yes", "boolean"),
        ("data.packing=on", "boolean"),
        ("train.max_steps=true", "not true or false"),
        ("train.learning_rate=.nan", "finite"),
        ("train.learning_rate=1e999", "finite"),
        ('output.dir="a\\0b"', "control characters"),
        ("output.dir=a\0b", "not valid YAML"),
    ],
)
def test_yaml_that_surprises(tmp_path, override, message):
    file = tmp_path / "a.yaml"
    file.write_text("model: {path: embedded}")
    with pytest.raises(ConfigError) as caught:
        load(file, [override])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "text",
    [
        *DATES,
        "1:30",
        "yes",
        "no",
        "on",
        "off",
        "0x10",
        "0o10",
        "08",
        "1e4",
        "1_0",
        "null",
        "true",
        "~",
        ".5",
        ".inf",
        "=",
        "<<",
        "''",
        "#a",
        "-",
        "1.",
        "字",
        "a:b",
    ],
)
def test_text_stays_text(tmp_path, text):
    file = tmp_path / "a.yaml"
    config = build({"model": {"path": text}, "output": {"dir": text}})
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config
    if text in (*DATES, "1:30", "yes", "no", "on", "off", "0x10", "0o10"):
        assert load(file, [f"output.dir={text}"]).output.dir == text


def test_many_mistakes_are_cut_short(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("".join(f"k{i}: 1\n" for i in range(2_000)))
    with pytest.raises(ConfigError, match="and 1991 more mistakes"):
        load(file)


def test_a_file_name_that_names_no_folder():
    with pytest.raises(ConfigError, match="set output.dir"):
        build(MINIMAL, name="a\nb")


def test_a_config_path_that_cannot_be(tmp_path):
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="cannot read"):
            load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: 1\na: 2\n", "given twice"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match="larger than"):
        load(tmp_path / "big.yaml")


def test_dump_loads_back_equal(tmp_path):
    config = build({**MINIMAL, "method": {"name": "full"}, "data": {"eval": 0.1, "packing": True}})
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load(file) == config
    assert leaves(config)["data.eval"] == 0.1


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        build(MINIMAL).train.seed = 3  # type: ignore[misc]


def test_keys_are_frozen():
    """Renaming or removing a key breaks users' files; adding one is a decision: then change this list."""
    for method in METHODS:
        assert sum(len(valid_keys(section, method)) for section in RunConfig.model_fields) <= 60
    keys = {
        "model": "path dtype quantization int8_compute int8_threshold",
        "method": "name r alpha dropout target_modules rslora dora init lora_plus_ratio modules_to_save adapter "
        "num_layers patterns also num_virtual_tokens init_text encoder encoder_hidden_size projection "
        "feedforward_modules",
        "data": "train eval format template max_length packing on_bad_rows",
        "train": "epochs max_steps global_batch_rows global_batch_tokens micro_batch_rows micro_batch_tokens "
        "learning_rate schedule warmup_steps weight_decay max_grad_norm optimizer optimizer_dtype adam_epsilon seed "
        "deterministic activation_checkpointing save_every_steps eval_every_steps keep_checkpoints",
        "memory": "budget",
        "output": "dir",
    }
    needed = {f"{section}.{key}" for section, names in keys.items() for key in names.split()}
    assert set(needed) <= set(every_key())
