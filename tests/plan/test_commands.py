"""`fitune params` and `fitune plan` as a user sees them: numbers, unknown lengths, budgets, JSON, no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fitune import cli
from fitune.config import load
from fitune.model.folder import embedded_path
from fitune.plan.arch import read_arch
from fitune.plan.memory import plan_memory
from fitune.plan.params import FORMULAS
from plan.shapes import BLOOM_1B4, CHATGLM3, LLAMA_1B

ROOT = Path(__file__).parent.parent.parent


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def yaml(tmp_path):
    """A run file for a folder that has nothing but a config.json."""

    def write(model=LLAMA_1B, text=""):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(model))
        file = tmp_path / "run.yaml"
        file.write_text(f"model: {{path: {tmp_path / 'model'}, dtype: bf16}}\n{text}")
        return file

    return write


def test_params(yaml, capsys):
    code, out, _ = run(capsys, "params", yaml())
    assert code == 0
    assert "lora trains 851,968 of 1,236,666,368 parameters (0.0689 %)" in out
    _, out, _ = run(capsys, "params", yaml(CHATGLM3), "method.target_modules=[q_proj, k_proj, v_proj]", "--json")
    found = json.loads(out)
    assert (found["trainable_parameters"], found["base_parameters"]) == (3_784_704, 6_243_584_000)


@pytest.mark.parametrize(
    ("folder", "overrides", "shown"),
    [
        ("llama-3.2-1b", [], "851,968 of 1,236,666,368 parameters (0.0689 %)"),
        ("llama-2-13b", [], "6,553,600 of 13,022,417,920"),
        ("bloom-1b4-zh", [], "1,572,864 of"),
        ("bloom-1b4-zh", ["method.name=bitfit"], "544,768 of 1,303,111,680 parameters (0.0418 %)"),
        ("bloom-1b4-zh", ["method.name=prompt", "method.num_virtual_tokens=10"], "20,480 of"),
        ("bloom-1b4-zh", ["method.name=ptuning", "method.num_virtual_tokens=10", "method.encoder_hidden_size=1024"],
         "5,267,456 of"),
        ("bloom-1b4-zh", ["method.name=prefix", "method.num_virtual_tokens=10"], "983,040 of"),
        ("bloom-1b4-zh", ["method.name=prefix", "method.num_virtual_tokens=10", "method.projection=true"],
         "205,641,728 of 1,508,753,408 parameters (13.6299 %)"),
        ("bloom-1b4-zh", ["method.name=ia3"], "344,064 of"),
        ("chatglm3-6b", ["method.target_modules=[q_proj, k_proj, v_proj]"], "3,784,704 of"),
        ("chatglm3-6b", ["method.name=bitfit"], "129,024 of 6,243,584,000"),
    ],
)  # fmt: skip
def test_params_of_published_models(shared, tmp_path, capsys, folder, overrides, shown):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {shared / 'configs' / folder}}}\n")
    code, out, _ = run(capsys, "params", file, *overrides)
    assert code == 0
    assert f" trains {shown}" in out


def test_params_refuses_what_training_would(yaml, capsys):
    code, _, error = run(capsys, "params", yaml(), "method.name=bitfit")
    assert code == 2
    assert "has none; use method.name=lora" in error


def test_demo_without_torch_in_three_seconds():
    """CPU seconds: the machine may have other work."""
    code = (
        "import sys, time\nfrom fitune.cli import main\n"
        "assert main(['plan', 'examples/demo.yaml']) == 0 == main(['params', 'examples/demo.yaml'])\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "print('seconds', time.process_time())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert float(shown.split()[-1]) < 3
    assert "at most 1,283 tokens in 16 rows" in shown
    assert "573,440 of 8,130,816" in shown


def test_the_table_adds_up(yaml, capsys):
    code, out, _ = run(capsys, "plan", yaml(), "--json")
    found = json.loads(out)
    assert code == 0
    for phase, size in found["phases"].items():
        assert size == sum(part["bytes"] for part in found["parts"] if phase in part["phases"])
    assert found["peak_bytes"] == found["phases"][found["peak_phase"]] == max(found["phases"].values())
    assert found["fits"] is None
    assert found["lower_bound"] is False
    _, text, _ = run(capsys, "plan", yaml())
    for part in found["parts"]:
        assert f"{part['name']} " in text
        assert f" {part['bytes'] / 1e6:,.1f} " in text
    assert f"peak     {found['peak_bytes'] / 1e9:.3f} GB in the phase `{found['peak_phase']}`" in text
    assert "planned as on a Hopper GPU" in text


def test_real_lengths_of_a_tiny_model(tiny, rows_file, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    data = f"{{train: {rows_file}, eval: 0.2, template: tutorial, max_length: 64}}"
    file.write_text(f"model: {{path: {tiny}}}\ndata: {data}\n")
    _, out, _ = run(capsys, "plan", file)
    assert "tokens in 4 rows" in out
    assert "model.dtype is not set: planned as bf16" in out


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{}", "data.train is not set"),
        ("{train: none.jsonl}", "none.jsonl is not there"),
        ("{train: ROWS, eval: none.jsonl}", "none.jsonl is not there"),
        ("{train: ROWS}", "has no tokenizer"),
    ],
)
def test_unknown_lengths_are_said(yaml, rows_file, capsys, data, reason):
    code, out, _ = run(capsys, "plan", yaml(text=f"data: {data.replace('ROWS', str(rows_file))}"))
    assert code == 0
    assert "lengths unknown: planned at max_length, 4 x 1,024 tokens (" in out
    assert reason in out


def test_bad_rows_are_refused_as_by_training(tiny, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": ""}\n')
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tiny}}}\ndata: {{train: {tmp_path / 'rows.jsonl'}, template: tutorial}}\n")
    code, _, error = run(capsys, "plan", file, "data.max_length=64")
    assert code == 3
    assert "rows.jsonl:1" in error


def test_weights_are_not_needed_and_not_looked_at(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {folder}}}\n")
    assert run(capsys, "plan", file, "data.max_length=64")[0] == 0
    code, _, error = run(capsys, "plan", file, "data.max_length=257")
    assert code == 2
    assert "256 positions" in error


def test_a_budget_that_is_kept(yaml, capsys):
    code, out, _ = run(capsys, "plan", yaml(), "memory.budget=80")
    assert code == 0
    assert "budget   80 GB: fits" in out


@pytest.mark.parametrize(
    ("budget", "overrides", "advice"),
    [
        (5.5, ["train.micro_batch_rows=4"], "train.micro_batch_rows=2 brings it to 5.26 GB"),
        (4.7, ["train.micro_batch_rows=4"], "train.micro_batch_rows=1 brings it to"),
        (4.25, ["train.micro_batch_rows=1"], "train.activation_checkpointing=attention brings it to"),
        (4.5, ["data.packing=true"], "train.micro_batch_tokens=1024 brings it to"),
        (3.5, ["train.micro_batch_rows=1"], "model.quantization=int8 brings it to"),
        (3, ["train.micro_batch_rows=16"], "No single setting is enough; train.micro_batch_rows=1 train.activation"),
        (2, ["train.micro_batch_rows=4"], "No setting of this release makes it fit; with train.micro_batch_rows=1"),
    ],
)
def test_a_budget_that_is_passed_names_the_way_out(yaml, capsys, budget, overrides, advice):
    code, out, error = run(capsys, "plan", yaml(), f"memory.budget={budget}", *overrides)
    assert code == 4
    assert "block weights" in out, "the table is printed all the same"
    assert f"memory.budget is {budget:g} GB, but this run takes" in error
    assert "The largest part is `" in error
    assert advice in error


def test_what_is_advised_fits(yaml, capsys):
    file = yaml()
    _, _, error = run(capsys, "plan", file, "memory.budget=5.5", "train.micro_batch_rows=4")
    setting = next(word for word in error.split() if word.startswith("train."))
    assert run(capsys, "plan", file, "memory.budget=5.5", setting)[0] == 0


def test_the_plain_path_is_never_said_to_fit(yaml, capsys):
    file = yaml(BLOOM_1B4 | {"hidden_dropout": 0.1})
    code, out, _ = run(capsys, "plan", file, "memory.budget=80")
    assert code == 0
    assert "budget   80 GB: not decided" in out
    assert "at least" in out
    assert "note: plain path (hidden_dropout)" in out
    code, _, error = run(capsys, "plan", file, "memory.budget=1")
    assert code == 4
    assert "takes at least" in error


def test_on_cpu_a_budget_has_no_effect(yaml, capsys):
    code, out, _ = run(capsys, "plan", yaml(), "memory.budget=1", "train.device=cpu")
    assert code == 0
    assert "memory.budget has no effect on CPU" in out
    assert "CUDA context" not in out


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_can_be_planned(file):
    """Those on the embedded model as they are; the BLOOM one, whose files are on a hub, with every method."""
    embedded = json.loads((embedded_path() / "config.json").read_text())
    for name in FORMULAS if file.stem.startswith("bloom") else [None]:
        config = load(file, [] if name is None else [f"method.name={name}"])
        arch = read_arch(embedded if config.model.path == "embedded" else BLOOM_1B4)
        assert plan_memory(arch, config, "no data").peak_bytes > 0


def test_the_page_is_current(monkeypatch):
    """The table of docs/memory.md, made anew, and its claims."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_docs import memory_page

    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert memory_page(text) == text, "run `make docs`"


def test_the_page_of_methods_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_docs import methods_page

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert methods_page(text) == text, "run `make docs`"


def test_the_numbers_of_the_readmes(yaml, capsys):
    """Both show how a plan of Llama 3.2 1B with four rows of at most 1,024 tokens ends."""
    _, out, _ = run(capsys, "plan", yaml(), "data.train=alpaca_data_zh.json", "data.eval=0.02", "method.r=8")
    peak = next(line for line in out.splitlines() if line.startswith("peak")).replace("`", "")
    shown = " ".join(peak.split())
    for name in ("README.md", "README.zh-CN.md"):
        assert shown in (ROOT / name).read_text(encoding="utf-8"), f"write into {name}: {shown}"


@pytest.mark.parametrize("version", [2, 3])
def test_an_original_chatglm_folder(shared, rows_file, tmp_path, capsys, version):
    """No weights, no conversion, none of the code that its config.json asks for; lengths from tokenizer.model."""
    folder = tmp_path / "chatglm"
    folder.mkdir()
    shutil.copyfile(shared / f"configs/chatglm{version}-6b/config.json", folder / "config.json")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {folder}, dtype: bf16}}\ndata: {{train: {rows_file}}}\n")
    targets = "method.target_modules=[q_proj, k_proj, v_proj]"
    for overrides, trained in (([targets], 3_784_704), (["method.name=bitfit"], 129_024)):
        code, out, _ = run(capsys, "params", file, *overrides, "--json")
        found = json.loads(out)
        assert (code, found["trainable_parameters"], found["base_parameters"]) == (0, trained, 6_243_584_000)
    _, out, _ = run(capsys, "plan", file)
    assert "lengths unknown: planned at max_length" in out
    shutil.copyfile(shared / "tokenizers/chatglm3-6b/tokenizer.model", folder / "tokenizer.model")
    code, out, _ = run(capsys, "plan", file, "--json")
    plan = json.loads(out)
    assert code == 0
    assert 2 * 6_243_584_000 < plan["peak_bytes"] < 16e9
    assert "tokens in 4 rows" in run(capsys, "plan", file)[1]
