"""python -m bench COMMAND, from the checkout; see bench/README.md."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from bench import cpu, curves, families, plan, profile, rows, step, sweep, table, tasks
from bench.children import Runner
from bench.models import SHAPES
from bench.work import DEFAULT_ROWS, STACKS, WORKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "child":
        return tasks.run(options.task, options.arguments)
    if options.command in TEXTS:
        return _write(TEXTS[options.command](table.read(options.file)), options.out)
    runner = Runner(options.out, options.seconds, options.child_seconds)
    COMMANDS[options.command](runner, options)
    text = table.markdown(table.read(runner.results))
    (runner.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="fitune beside other stacks, measured.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=Path("runs/bench"), help="results.jsonl, tables.md and logs")
    common.add_argument("--models", type=Path, default=Path("runs/bench/models"), help="where the random models are")
    common.add_argument("--seconds", type=float, help="start no measurement later than this")
    common.add_argument("--child-seconds", type=float, default=300, help="end a measurement that takes longer")
    common.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    one = commands.add_parser("step", parents=[common], help="one training step")
    one.add_argument("--rows", type=_listed(WORKS), default=list(DEFAULT_ROWS), help=f"of {','.join(WORKS)}")
    one.add_argument("--stacks", type=_listed(STACKS), default=list(STACKS), help=f"of {','.join(STACKS)}")
    one.add_argument("--warmup", type=int, help="steps before the clock runs")
    one.add_argument("--steps", type=int, help="timed steps")
    _add_rows(commands.add_parser("rows", parents=[common], help="real rows through each stack's own trainer"))
    lengths = commands.add_parser("sweep", parents=[common], help="fitune over row lengths")
    lengths.add_argument("--rows", type=_listed(WORKS), default=["1b", "8b"])
    lengths.add_argument("--micro-tokens", type=_numbers(int), default=list(sweep.MICRO_TOKENS))
    longest = commands.add_parser("fit", parents=[common], help="the longest row that trains in a memory cap")
    longest.add_argument("--caps", type=_numbers(float), default=[8.0, 16.0, 24.0], help="GB, CUDA context included")
    paths = commands.add_parser("curves", parents=[common], help="the fast path against the plain one")
    paths.add_argument("--cases", type=_listed(curves.CASES), default=list(curves.CASES))
    paths.add_argument("--precisions", type=_listed(curves.PRECISIONS), default=list(curves.PRECISIONS))
    paths.add_argument("--paths", type=_listed(("plain", "fast", "default")), default=["plain", "fast"])
    paths.add_argument("--updates", type=int, default=200)
    learn = commands.add_parser("families", parents=[common], help="families x methods x precisions at full size learn")
    learn.add_argument("--families", type=_listed(SHAPES), default=list(families.FAMILIES))
    learn.add_argument("--methods", type=_listed(families.METHODS), default=["lora"])
    learn.add_argument("--precisions", type=_listed(families.PRECISIONS), default=["none", "int8", "nf4"])
    learn.add_argument("--updates", type=int, default=20)
    demo = commands.add_parser("cpu", parents=[common], help="the demo's steps on CPU, both paths in turns")
    demo.add_argument("--pairs", type=int, default=40, help="timed updates of each path")
    demo.add_argument("--paths", type=_listed(("plain", "fast", "default")), default=["fast", "plain"])
    kernels = commands.add_parser("profile", parents=[common], help="where the time of fitune's step goes")
    kernels.add_argument("--rows", type=_listed(WORKS), default=["1b", "8b"], help=f"of {','.join(WORKS)}")
    commands.add_parser("gemm", parents=[common], help="the GPU's ceilings")
    make = commands.add_parser("models", parents=[common], help="make the random models")
    make.add_argument("names", type=_listed(SHAPES), nargs="?", default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    for name, what in (("table", "Markdown from a results.jsonl"), ("plan", "its peaks beside what is planned")):
        show = commands.add_parser(name, help=what)
        show.add_argument("file", type=Path)
        show.add_argument("--out", type=Path, help="write it here; default: print")
    child = commands.add_parser("child", help="what a measurement's own process runs")
    child.add_argument("task", choices=tasks.TASKS)
    child.add_argument("arguments")
    return parser


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {' and '.join(rows.FILES)}")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the Llama-3 tokenizer")
    parser.add_argument("--updates", type=_numbers(int), default=list(rows.STEPS), help="rows per update: 32,2")
    parser.add_argument("--against-plain", type=int, metavar="N", help="also N updates on each of fitune's two paths")
    parser.add_argument("--stacks", type=_listed(STACKS), default=list(STACKS), help=f"of {','.join(STACKS)}")


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of comma-separated numbers."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse


def _listed(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}; allowed: {','.join(allowed)}")
        return names

    return parse


def _write(text: str, out: Path | None) -> int:
    if out is None:
        print(text)
    else:
        out.write_text(text, encoding="utf-8")
    return 0


def _step(runner: Runner, options: argparse.Namespace) -> None:
    change = {name: getattr(options, name) for name in ("warmup", "steps") if getattr(options, name) is not None}
    step.run(runner, options.rows, options.stacks, options.models, options.device, change)


def _rows(runner: Runner, options: argparse.Namespace) -> None:
    where = (options.data, options.tokenizer, options.models)
    rows.run(runner, *where, options.updates, options.stacks)
    if options.against_plain:
        rows.both_paths(runner, *where, options.against_plain)


def _sweep(runner: Runner, options: argparse.Namespace) -> None:
    sweep.run(runner, options.rows, options.micro_tokens, options.models)


def _fit(runner: Runner, options: argparse.Namespace) -> None:
    sweep.fit(runner, options.caps, options.models)


def _curves(runner: Runner, options: argparse.Namespace) -> None:
    how = {"device": options.device, "updates": options.updates, "paths": options.paths}
    curves.run(runner, options.cases, options.precisions, options.models, **how)


def _families(runner: Runner, options: argparse.Namespace) -> None:
    cells = list(itertools.product(options.families, options.methods, options.precisions))
    families.run(runner, options.models, cells, device=options.device, updates=options.updates)


def _cpu(runner: Runner, options: argparse.Namespace) -> None:
    cpu.run(runner, options.pairs, options.paths)


def _profile(runner: Runner, options: argparse.Namespace) -> None:
    profile.run(runner, options.rows, options.models)


def _gemm(runner: Runner, options: argparse.Namespace) -> None:
    runner.run("gemm", {}, {"kind": "gemm"})


def _models(runner: Runner, options: argparse.Namespace) -> None:
    for name in options.names:
        runner.make_model(name, options.models)


TEXTS: dict[str, Callable[[Sequence[table.Record]], str]] = {"table": table.markdown, "plan": plan.markdown}
COMMANDS: dict[str, Callable[[Runner, argparse.Namespace], None]] = {
    "step": _step,
    "rows": _rows,
    "sweep": _sweep,
    "fit": _fit,
    "curves": _curves,
    "families": _families,
    "cpu": _cpu,
    "profile": _profile,
    "gemm": _gemm,
    "models": _models,
}

if __name__ == "__main__":
    sys.exit(main())
