"""`fitune quantize-report`: every layer with its real inputs, one weight in memory at a time; table, JSON, page."""

import html.parser
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fitune.cli import main
from fitune.errors import ConfigError, DataError
from fitune.infer import quantize_report as module
from fitune.infer.convert_quantized import quantize_folder
from fitune.infer.quantize_report import quantize_report, text
from fitune.model.load import load_base
from fitune.model.quantize import block_linears
from fitune.model.rounding import measure_layer
from fitune.training.quantize_page import render, write_page
from original_chatglm import write_folder as write_chatglm
from original_chatglm_v1 import write_folder as write_chatglm_6b
from tiny import make_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / kind, kind) for kind in ("llama", "qwen2", "bloom")}


@pytest.fixture(scope="module")
def report(folders):
    return quantize_report(str(folders["llama"]), threshold=1.5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom"])
def test_inputs_are_those_of_the_whole_model(folders, kind):
    """Hooks on a model that is loaded as usual see the same."""
    report = quantize_report(str(folders[kind]), threshold=1.5)
    model = load_base(folders[kind], "fp32", torch.device("cpu")).model
    ids = module._rows(folders[kind], ())
    assert ids.shape == (report.rows, report.tokens // report.rows)
    seen = {}
    for name in block_linears(model):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: seen.update({name: x[0].flatten(0, 1)})
        )
    with torch.no_grad():
        model(input_ids=ids)
    assert [layer.name for layer in report.layers] == list(seen)
    for layer in report.layers:
        expected = measure_layer(layer.name, model.get_submodule(layer.name).weight, seen[layer.name], 1.5)
        assert layer.to_json() == expected.to_json()


def test_bin_files_and_names_that_transformers_converts_give_the_same(folders, report, monkeypatch, tmp_path):
    copy = shutil.copytree(folders["llama"], tmp_path / "bin")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert quantize_report(str(copy), threshold=1.5).layers == report.layers
    monkeypatch.setattr(module, "names_in_model", lambda *_: None)  # then the whole model is loaded
    assert quantize_report(str(folders["llama"]), threshold=1.5).layers == report.layers


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_an_original_chatglm3_folder(tmp_path, form):
    report = quantize_report(str(write_chatglm(tmp_path / "chatglm", form=form)))
    assert [kind.name for kind in report.kinds][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert report.tokens > 0
    assert report.all.output_ratio("nf4") > report.all.output_ratio("int8") > 0


def test_chatglm_6b(shared, tmp_path):
    report = quantize_report(str(write_chatglm_6b(tmp_path / "chatglm-6b", shared)))
    assert [kind.name for kind in report.kinds] == [
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "all",
    ]  # fmt: skip
    assert report.all.output_ratio("nf4") > 0.03


def test_one_weight_is_in_memory_at_a_time(folders, monkeypatch):
    opened, most = {}, []

    def open_model(*arguments):
        result = open_(*arguments)
        opened["model"] = result[0]
        return result

    def measure(*arguments):
        linears = [opened["model"].get_submodule(name) for name in block_linears(opened["model"])]
        most.append(sum(linear.weight.untyped_storage().nbytes() for linear in linears))
        return measure_(*arguments)

    open_, measure_ = module._open, module.measure_layer
    monkeypatch.setattr(module, "_open", open_model)
    monkeypatch.setattr(module, "measure_layer", measure)
    report = quantize_report(str(folders["llama"]))
    assert len(most) == 14
    assert max(most) == 14 * 4  # stand-ins of one element each
    assert report.all.weights > 50_000


def test_kinds_are_sums(report):
    assert [kind.name for kind in report.kinds] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all",
    ]  # fmt: skip
    assert (
        report.all.weights == sum(layer.weights for layer in report.layers) == sum(k.weights for k in report.kinds[:-1])
    )
    assert report.all.outliers == sum(layer.outliers for layer in report.layers) > 0


def test_the_table_shows_layers_and_kinds(report, monkeypatch):
    table = text(report, 140)
    assert "14 linear layers" in table
    assert "[42, -127, 106, 64, -21], and comes back as [0.099, -0.3, 0.250, 0.151, -0.050]" in table
    assert f"{report.rows} rows, {report.tokens} tokens" in table
    for name in ("0.self_attn.q_proj", "1.mlp.down_proj", "gate_proj", "all"):
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
        assert len(re.findall(r"\d%", line)) == 9
    assert re.search(r"size: 16 bit [\d.]+ MB, int8 [\d.]+ MB, nf4", table)
    assert max(map(len, text(report, 80).splitlines())) <= 120
    monkeypatch.setattr(module, "SHOWN_LAYERS", 4)
    short = text(report, 140)
    assert "10 layers with smaller errors in nf4 are in --json and --to DIR" in short
    assert len(short.splitlines()) < len(table.splitlines())


def test_a_folder_without_tokenizer_measures_weights(folders, tmp_path, capsys):
    copy = shutil.copytree(folders["llama"], tmp_path / "bare")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert main(["quantize-report", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 0
    assert len(found["layers"]) == 14
    assert all(layer["weight_error"]["nf4"] > 0.05 and layer["output_error"] == {} for layer in found["layers"])
    bare = quantize_report(str(copy))
    assert "products with real inputs were not measured" in text(bare, 100)
    page = render(bare)
    assert "Outliers</h2>" not in page
    assert "levels of nf4</h2>" in page
    with pytest.raises(ConfigError, match="no tokenizer"):
        quantize_report(str(copy), files=("rows.jsonl",))


def test_rows_of_the_user(folders, rows_file, tmp_path):
    report = quantize_report(str(folders["llama"]), files=(str(rows_file),))
    assert report.rows == 4
    assert report.tokens % 4 == 0
    with pytest.raises(DataError, match="does not exist"):
        quantize_report(str(folders["llama"]), files=(str(tmp_path / "none.jsonl"),))


def test_a_tokenizer_with_more_entries_than_the_model(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="gives id 500, but the model has only 128 embedding rows"):
        quantize_report(str(folder))


def test_what_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="--threshold is -1; allowed: 0 to 65504"):
        quantize_report(str(folders["llama"]), threshold=-1)
    with pytest.raises(ConfigError, match="a GPT2LMHeadModel have no linear layers of the usual kind"):
        quantize_report(str(make_model(tmp_path / "gpt2", "gpt2")))
    stored = quantize_folder(str(folders["llama"]), tmp_path / "nf4", "nf4")
    with pytest.raises(ConfigError, match="holds weights in nf4; the report needs the 16- or 32-bit model"):
        quantize_report(str(stored))


class Tags(html.parser.HTMLParser):
    """Counts tags; refuses unbalanced ones."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_runs_nothing(report):
    page = render(report)
    assert page == render(report)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names
    assert not [value for _, attributes in tags.seen for key, value in attributes.items() if key in ("src", "href")]
    assert names.count("svg") == 1 + 2 + 8  # errors, outliers and their share, a histogram of each kind
    assert names.count("circle") == 14 * 6
    assert names.count("tr") == 1 + 8 + 1 + 14
    for layer in report.layers:
        assert module.short(layer.name) in page
    numbers = [
        float(value) for _, attributes in tags.seen for key, value in attributes.items() if key in ("cx", "x1", "y1")
    ]
    assert all(-1 <= number <= 1010 for number in numbers)


def test_names_are_escaped(report, folders, tmp_path):
    copy = shutil.copytree(folders["llama"], tmp_path / "<b>model")
    page = render(quantize_report(str(copy)))
    assert "&lt;b&gt;model" in page
    assert "<b>model" not in page


def test_files_are_written(folders, tmp_path, capsys):
    target = tmp_path / "out"
    assert (
        main(["quantize-report", str(folders["qwen2"]), "--to", str(target), "--threshold", "2", "--dtype", "bf16"])
        == 0
    )
    printed = capsys.readouterr()
    assert "read in bf16" in printed.out
    assert f"written: {target}/report.html" in printed.err
    assert json.loads((target / "report.json").read_text())["threshold"] == 2
    assert "</html>" in (target / "report.html").read_text()
    assert main(["quantize-report", str(folders["qwen2"]), "--to", str(target)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        write_page(quantize_report(str(folders["qwen2"])), target)
