"""All pages: commands parse, links lead somewhere. The tutorial: configurations plan, tables and pictures current."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import make_pictures
import tutorial_tables
from fitune import cli
from fitune.config import load
from fitune.data.example import Message
from fitune.data.row_view import causal, prefix_lm
from fitune.data.templates import resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.plan.arch import read_arch
from fitune.plan.memory import plan_memory
from plan.shapes import published
from tutorial_tables import WORDS, names, read, tutorial_page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / name for name in WORDS]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
WRITTEN = [ROOT / name for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")]
EVERY_PAGE = [*READMES, *WRITTEN, *sorted((ROOT / "docs").glob("*.md")), *(ROOT / "examples").rglob("*.md")]
CODE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^):]+))?\)")


def commands(page: Path) -> list[str]:
    """The lines of a page's code blocks that call fitune, without their comments."""
    blocks = "\n".join(CODE.findall(page.read_text(encoding="utf-8"))).splitlines()
    return [re.sub(r"\s{2,}#.*", "", line) for line in blocks if line.startswith("fitune ")]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_commands_parse(page):
    for command in commands(page):
        options = cli._parse(shlex.split(command)[1:])
        file = getattr(options, "config", "my.yaml")
        if file != "my.yaml":
            load(ROOT / file, options.overrides)


@pytest.mark.parametrize(("pages", "least"), [(PAGES, 20), (READMES, 10)], ids=["tutorial", "README"])
def test_both_languages_have_the_same_commands(pages, least):
    english, chinese = ([re.sub(r'--prompt ".*"', "", each) for each in commands(page)] for page in pages)
    assert english == chinese
    assert len(english) >= least


@pytest.mark.parametrize("name", names())
def test_configurations_load_and_plan(name):
    config, arch = read(name)
    assert config.output.dir == f"runs/{name}"
    assert config.data.train == ("alpaca_data_zh.json",)
    assert plan_memory(arch, config, "no data").peak_bytes > 1e9
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert f"../examples/tutorial/{name}.yaml" in text.split(tutorial_tables.MARKS["params"][0])[0]
    train = f"#   fitune train examples/tutorial/{name}.yaml\n"
    assert train in (tutorial_tables.EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WORDS)
def test_tables_are_current(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert tutorial_page(name, text) == text, "run `make docs`"


def test_shapes_are_the_published_ones(shared):
    """The sizes behind the tables, against config.json of the models themselves."""
    folders = {
        "Langboat/bloom-1b4-zh": "bloom-1b4-zh",
        "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
        "meta-llama/Llama-2-7b-hf": "llama-2-7b-chat",
        "meta-llama/Llama-2-13b-hf": "llama-2-13b",
        "THUDM/chatglm3-6b-base": "chatglm3-6b",
    }
    assert set(folders) == set(tutorial_tables.SHAPES)
    for path, folder in folders.items():
        assert read_arch(tutorial_tables.SHAPES[path]).parameters == read_arch(published(shared, folder)).parameters


def test_pictures_are_current():
    drawn = make_pictures.draw()
    assert set(drawn) == {file.name for file in make_pictures.IMAGES.iterdir()}
    for name, svg in drawn.items():
        assert (make_pictures.IMAGES / name).read_text(encoding="utf-8") == svg, "run `make docs`"


def test_pictures_show_what_render_prints():
    """Batches of the model and rows of the data room say the same of positions and masks."""
    ids = make_pictures.V1.ids
    seen, told = make_pictures.prefix(ids), prefix_lm(ids, make_pictures.BLANK)
    assert seen.rows == list(told.positions.values()) == [[0, 1] + [2] * 6, [0, 0, 0, 1, 2, 3, 4, 5]]
    assert [sum(line) for line in seen.visible] == told.sees == [3, 3, 3, 4, 5, 6, 7, 8]
    assert causal(make_pictures.V3.ids).sees == list(range(1, 15))


PICTURED = {
    "chatglm-6b": (make_pictures.V1, "chatglm"),
    "chatglm2-6b": (make_pictures.V2, "chatglm2"),
    "chatglm3-6b": (make_pictures.V3, "chatglm3"),
}


@pytest.mark.parametrize("name", PICTURED)
def test_pictured_rows_are_those_of_the_tokenizer(shared, tmp_path, name):
    exchange, layout = PICTURED[name]
    if name == "chatglm-6b":
        pytest.importorskip("sentencepiece")
    for file in (
        shared / "configs" / name / "config.json",
        *(shared / "tokenizers" / name).glob("*.model"),
        *(shared / "tokenizers" / "chatglm3-6b").glob("tokenizer.model"),  # that of version 2, too
    ):
        shutil.copyfile(file, tmp_path / file.name)
    tokenizer = Tokenizer.load(tmp_path)
    talk = [Message("user", "你好"), Message("assistant", "你好！")]
    ids, learn = resolve_template(layout, tokenizer).conversation(talk)
    assert ids == exchange.ids
    assert learn == [number >= exchange.learnt for number in range(len(ids))]
    spelt = [tokenizer.spell(token).strip("<>|").replace("0x0A", "\\n") for token in ids]
    assert spelt == [text.strip("<>") for text in exchange.texts]


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end with, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        place = page.parent / target if target else page
        assert place.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_times_and_peaks_were_measured(page):
    """Each row of the README's table is a cell of docs/results, rounded."""
    text = page.read_text(encoding="utf-8")
    told = re.findall(r"\| ([\d.]+) ms \| ([\d.]+) GB \|", text)
    others = re.findall(r"\| ([\d.,]+) ms[,，] ?([\d.]+) GB \|", text)
    results = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "results").glob("*.md"))
    found = re.findall(r"([\d.]+) \([\d.]+\) ms, ([\d.]+)/", results)
    assert (len(told), len(others)) == (8, 5)
    for ms, gb in [*told, *((ms.replace(",", ""), gb) for ms, gb in others)]:
        digits = len(ms.partition(".")[2])
        assert any(f"{float(t):.{digits}f}" == ms and m == gb for t, m in found), (ms, gb)
