"""The benchmark package: its tables, its counts, and one tiny step through the whole of it on CPU."""

import json

import pytest

from bench.__main__ import main
from bench.children import Runner
from bench.gemm import rate_for
from bench.goals import GOALS
from bench.models import SHAPES, make, model_config, with_tokenizer
from bench.table import markdown, read
from bench.work import DEFAULT_ROWS, STACKS, WORKS, block_weights, step_flop

LLAMA_1B = {"model_type": "llama", **SHAPES["llama-3.2-1b"][1]}


def record(stack, ms, gigabytes, **more):
    memory = {f"{name}_bytes": int(gigabytes * 1e9) for name in ("allocated", "reserved", "device_sampled", "pinned")}
    facts = {"tokens_per_second": round(2048 / ms * 1e3), "startup_seconds": 1.0, "useful_flop": int(11e12)}
    times = {"step_ms": ms, "min_ms": ms - 1}
    return {"kind": "step", "row": "1b", "stack": stack, "status": "ok", **times, **memory, **facts, **more}


def test_every_goal_and_row_names_known_work():
    assert set(GOALS) <= set(WORKS)
    assert set(DEFAULT_ROWS) < set(WORKS)
    for work in WORKS.values():
        assert work.model in SHAPES
        assert set(work.stacks) <= set(STACKS)


def test_flop_of_the_first_row_is_what_the_design_says():
    assert block_weights(LLAMA_1B) == 973_078_528
    linear = 4 * block_weights(LLAMA_1B) * 2048
    assert linear / 690e12 == pytest.approx(11.6e-3, rel=0.01)
    head = 4 * 128256 * 2048 * 2048
    attention = 7 * 2 * 1024 * 1024 * 2048 * 16
    assert step_flop(LLAMA_1B, 2, 1024) == linear + head + attention
    assert step_flop(LLAMA_1B, 2, 1024, recompute=True) == linear * 3 // 2 + head + attention * 9 // 7


def test_shares_use_the_ceiling_of_like_size():
    products = [{"rows": 8192, "bf16": 690.0}, {"rows": 2048, "bf16": 600.0}, {"rows": 2048, "bf16": 620.0}]
    assert rate_for({"products": products}, 8192) == 690.0
    assert rate_for({"products": products}, 4096) == 620.0
    assert rate_for({"products": products}, 16) == 620.0


def test_the_table_compares_with_the_best_other_and_the_goal():
    records = [record("ours", 30.0, 9.0), record("hf", 54.6, 8.99), record("unsloth", 45.0, 5.0)]
    records.append({"kind": "step", "row": "1b", "stack": "liger", "status": "failed", "error": "no | such\nthing"})
    records.append(record("ours", 20.0, 4.5))  # newer
    text = markdown(records)
    assert "| 20.0 (19.0) ms, 4.50/4.50 GB | 54.6 (53.6) ms, 8.99/8.99 GB | failed: no / such thing |" in text
    assert "| 0.44 | 0.90 | 21 ms, 4.4 GB: time met, memory missed |" in text


def test_the_table_gives_the_share_of_the_measured_rate():
    gemm = {"kind": "gemm", "status": "ok", "gpu": "a GPU", "copy_gb_per_second": 4000, "versions": {"torch": "2"}}
    gemm["products"] = [{"rows": 2048, "inputs": 4096, "outputs": 14336, "bf16": 550.0, "bf16_input_gradient": 600.0}]
    text = markdown([gemm, record("ours", 40.0, 4.0, path="FastPath")])
    assert "| `1b` | ours | FastPath | 51,200 | 50% |" in text
    assert "| 2048 x 4096 x 14336 | 550 | 600 | - |" in text


def test_a_step_on_cpu_from_the_command_line(tmp_path, capsys):
    options = ["--out", str(tmp_path / "out"), "--models", str(tmp_path / "models"), "--device", "cpu"]
    options += ["--warmup", "1", "--steps", "2"]
    assert main(["step", "--rows", "tiny", "--stacks", "ours,hf", *options[:4], "--seconds", "0"]) == 0
    assert [row["status"] for row in read(tmp_path / "out" / "results.jsonl")] == ["not started: time is up"] * 2
    assert main(["step", "--rows", "tiny", "--stacks", "ours", *options]) == 0
    row = read(tmp_path / "out" / "results.jsonl")[-1]
    assert row["status"] == "ok", row
    assert len(row["times_ms"]) == 2
    assert row["losses"][0] > row["losses"][-1]
    assert row["tokens_per_second"] == pytest.approx(128 / row["step_ms"] * 1e3, rel=1e-2)
    assert f"({row['min_ms']:.1f}) ms" in capsys.readouterr().out
    assert main(["table", str(tmp_path / "out" / "results.jsonl"), "--out", str(tmp_path / "t.md")]) == 0
    assert "| `tiny` | ours |" in (tmp_path / "t.md").read_text()


def test_a_failing_and_a_slow_child_are_recorded(tmp_path):
    runner = Runner(tmp_path, child_seconds=60)
    row = runner.run("model", {"name": "no-such-model", "models": str(tmp_path)}, {"kind": "model", "name": "x"})
    assert (row["status"], row["error"]) == ("failed", "KeyError: 'no-such-model'")
    slow = Runner(tmp_path, child_seconds=0.0)
    assert slow.run("gemm", {}, {"kind": "gemm"})["status"] == "timeout"
    assert [r["status"] for r in read(runner.results)] == ["failed", "timeout"]


def test_a_real_tokenizer_must_fit_the_model(tmp_path):
    folder = make("llama-tiny", tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    vocab = {f"t{i}": i for i in range(model_config(folder)["vocab_size"])}
    text = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}}
    (own / "tokenizer.json").write_text(json.dumps(text))
    (own / "tokenizer_config.json").write_text("{}")
    both = with_tokenizer(folder, own)
    assert (both / "tokenizer.json").read_text() == json.dumps(text)
    assert (both / "model.safetensors").samefile(folder / "model.safetensors")
    text["model"]["vocab"].popitem()
    (own / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="1023 entries, llama-tiny has 1024"):
        with_tokenizer(folder, own.rename(tmp_path / "other"))


def test_rows_and_stacks_are_checked(capsys):
    with pytest.raises(SystemExit):
        main(["step", "--rows", "1b,2b"])
    assert "2b; allowed: 1b,1b-ckpt" in capsys.readouterr().err
