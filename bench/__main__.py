"""python -m bench COMMAND, from the checkout; see bench/README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from bench import step, table, tasks
from bench.children import Runner
from bench.models import SHAPES
from bench.work import DEFAULT_ROWS, STACKS, WORKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "child":
        return tasks.run(options.task, options.arguments)
    if options.command == "table":
        return _table(options)
    runner = Runner(options.out, options.seconds, options.child_seconds)
    {"step": _step, "gemm": _gemm, "models": _models}[options.command](runner, options)
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
    commands.add_parser("gemm", parents=[common], help="the GPU's ceilings")
    make = commands.add_parser("models", parents=[common], help="make the random models")
    make.add_argument("names", type=_listed(SHAPES), nargs="?", default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    show = commands.add_parser("table", help="Markdown from a results.jsonl")
    show.add_argument("file", type=Path)
    show.add_argument("--out", type=Path, help="write it here; default: print")
    child = commands.add_parser("child", help="what a measurement's own process runs")
    child.add_argument("task", choices=tasks.TASKS)
    child.add_argument("arguments")
    return parser


def _listed(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}; allowed: {','.join(allowed)}")
        return names

    return parse


def _table(options: argparse.Namespace) -> int:
    text = table.markdown(table.read(options.file))
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


def _step(runner: Runner, options: argparse.Namespace) -> None:
    step.run(runner, options.rows, options.stacks, options.models, options.device, (options.warmup, options.steps))


def _gemm(runner: Runner, options: argparse.Namespace) -> None:
    runner.run("gemm", {}, {"kind": "gemm"})


def _models(runner: Runner, options: argparse.Namespace) -> None:
    for name in options.names:
        runner.make_model(name, options.models)


if __name__ == "__main__":
    sys.exit(main())
