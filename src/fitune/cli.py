"""The command line: arguments in, exit code out; each command imports what it runs.

fitune train examples/demo.yaml train.learning_rate=1e-4
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitune.errors import ConfigError, FituneError, OutOfMemoryError

if TYPE_CHECKING:
    from fitune.config import RunConfig
    from fitune.infer.load import Conversation
    from fitune.plan.arch import ArchSpec

EPILOG = """exit codes: 0 done, 2 configuration, 3 data, 4 out of memory, 5 diverged, 6 storage,
75 interrupted and resumable. Every setting: fitune config, or docs/configuration.md."""
OOM_ADVICE = "free memory on the device, give shorter or fewer prompts, or hide the GPU with CUDA_VISIBLE_DEVICES="


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is a message, never a traceback."""
    options = _parse(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except FituneError as error:
        print(f"fitune: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fitune: stopped at once; committed checkpoints are untouched", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fitune data ... | head`; what is buffered would fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        first = str(error).strip().split("\n")[0]
        print(f"fitune: out of memory{f' ({first:.200})' if first else ''}; {OOM_ADVICE}", file=sys.stderr)
        return OutOfMemoryError.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    """Only a torch that is there already can have run out of memory; `fitune --help` does not load it."""
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, letting settings stand before or after options: argparse alone takes them in one place only."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    odd = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(options, "overrides")]
    if odd:
        how = "; settings are written section.key=value" if hasattr(options, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(odd)}{how}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fitune",
        description="Fine-tune language models in the memory you have.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a configuration")
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    _settings(train)
    train.add_argument("--quiet", action="store_true", help="print errors only")
    train.add_argument("--replace", action="store_true", help="remove an earlier run in the same folder first")
    train.set_defaults(command=_train)

    resume = commands.add_parser("resume", help="continue a stopped run")
    resume.add_argument("run", metavar="RUN", help="run folder")
    _settings(resume)
    resume.add_argument("--quiet", action="store_true", help="print errors only")
    resume.set_defaults(command=_resume)

    predicts = "predict memory by part, before any weight is read"
    for name, command, does in (("params", _params, "count trained and all parameters"), ("plan", _plan, predicts)):
        planned = commands.add_parser(name, help=does)
        planned.add_argument("config", metavar="CONFIG", help="YAML file")
        _settings(planned)
        planned.add_argument("--json", action="store_true", help="print JSON")
        planned.set_defaults(command=command)

    data = commands.add_parser("data", help="examine data files: bad rows, lengths, what is learnt")
    data.add_argument("files", nargs="+", metavar="FILE", help=".json, .jsonl, either also .gz")
    data.add_argument("--model", default="embedded", help="model whose tokenizer and template are used")
    data.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a data setting: max_length=512")
    render = "show the first N rows (1 without a number) token by token: ids, what is learnt, positions"
    data.add_argument("--render", type=_count, nargs="?", const=1, default=0, metavar="N", help=render)
    data.add_argument("--json", action="store_true", help="print JSON")
    data.set_defaults(command=_data)

    chat = commands.add_parser("chat", help="talk to a run or a model")
    _model_arguments(chat)
    chat.add_argument("--system", help="system message")
    chat.set_defaults(command=_chat)

    generate = commands.add_parser("generate", help="answer prompts")
    _model_arguments(generate)
    generate.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    generate.add_argument("--file", help="text file with one prompt a line, - for standard input")
    generate.add_argument("--system", help="system message of every prompt")
    raw = "continue prompts as text, without a template (default for a run trained on text)"
    generate.add_argument("--raw", action=argparse.BooleanOptionalAction, default=None, help=raw)
    generate.add_argument("--json", action="store_true", help="one JSON object per prompt")
    generate.set_defaults(command=_generate)

    evaluate = commands.add_parser("eval", help="held-out loss of a finished run")
    evaluate.add_argument("run", metavar="RUN", help="run folder")
    evaluate.add_argument("--data", nargs="+", default=[], metavar="FILE", help="evaluate these files instead")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(command=_eval)

    export = commands.add_parser("export", help="write a finished run as a model folder")
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("--to", required=True, metavar="DIR", help="new folder")
    form = "merged model, or adapter: PEFT's files, or fitune's own for bitfit and freeze; default: merged"
    export.add_argument("--form", choices=("merged", "adapter"), default="merged", help=form)
    export.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of merged weights; default: as trained")
    export.add_argument("--data", nargs="+", default=[], metavar="FILE", help="measure what merging changed on these")
    no_measure = "do not compare the merged model with the run on held-out rows"
    export.add_argument("--no-measure", action="store_true", help=no_measure)
    export.set_defaults(command=_export)

    convert = commands.add_parser("convert", help="write a model folder in another format")
    convert.add_argument("source", metavar="SRC", help="original ChatGLM2 or 3; with --quantization any model")
    convert.add_argument("target", metavar="DST", help="new folder")
    formats = "blocks in 8 or 4 bits, as transformers and bitsandbytes store them"
    convert.add_argument("--quantization", choices=("int8", "nf4", "fp4"), help=formats)
    read = "with --quantization: what weights are read in first; default: as in config.json"
    convert.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help=read)
    convert.set_defaults(command=_convert)

    report = commands.add_parser("quantize-report", help="what 8- and 4-bit formats do to a model, layer by layer")
    report.add_argument("model", metavar="MODEL", help="model folder, hub id or `embedded`")
    rows = "rows to run through the model; default: some text"
    report.add_argument("--data", nargs="+", default=[], metavar="FILE", help=rows)
    report.add_argument("--threshold", type=float, default=6.0, help="an input from here on is an outlier (default 6)")
    report.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="to compute in; default: as in config.json")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--to", metavar="DIR", help="new folder for report.html with plots, and report.json")
    report.set_defaults(command=_quantize_report)

    config = commands.add_parser("config", help="list every setting with its default")
    config.add_argument("--schema", action="store_true", help="print the JSON schema")
    config.set_defaults(command=_config)
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    does = "settings that replace others: train.learning_rate=1e-4"
    # Without a default, argparse says that they are required.
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=does)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text:.40} is no number of rows; a whole number from 1 to 10000 is needed")
    return int(text)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, model folder, hub id or `embedded`")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default 1: off)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (default 1: off)")
    parser.add_argument("--seed", type=int, help="of the sampling")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict, fields

    from fitune.infer.sampling import Sampling

    # Checked here, before torch and the model load.
    return asdict(Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)}))


def _version() -> str:
    from fitune import __version__

    return f"fitune {__version__}"


def _train(options: argparse.Namespace) -> int:
    from fitune import train

    result = train(options.config, options.overrides, quiet=options.quiet, replace=options.replace)
    _say_where(result.run, options.quiet)
    return 0


def _resume(options: argparse.Namespace) -> int:
    from fitune import resume

    result = resume(options.run, options.overrides, quiet=options.quiet)
    _say_where(result.run, options.quiet)
    return 0


def _say_where(run: Path, quiet: bool) -> None:
    if not quiet:
        print(f"done: {run}/report.html shows the run; talk to it: fitune chat {run}", flush=True)


def _params(options: argparse.Namespace) -> int:
    from fitune.plan.text import params_json, params_text

    config, arch, _ = _planned(options)
    print(params_json(arch, config) if options.json else params_text(arch, config))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from fitune.config import new_tokens
    from fitune.data.lengths import row_lengths
    from fitune.plan.budget import check_budget
    from fitune.plan.memory import plan_memory
    from fitune.plan.text import plan_json, plan_text

    config, arch, folder = _planned(options)
    lengths = row_lengths(config.data, folder, new_tokens(config.method))
    plan = plan_memory(arch, config, lengths)
    print(plan_json(plan, config) if options.json else plan_text(plan, config))
    check_budget(plan, config, lengths)
    return 0


def _planned(options: argparse.Namespace) -> tuple[RunConfig, ArchSpec, Path]:
    """Configuration, architecture and model folder; no weights are looked for, and none downloaded."""
    from fitune.config import load
    from fitune.model.adapter import with_adapter
    from fitune.model.folder import read_config, resolve_folder, with_stored_layers, with_stored_quantization
    from fitune.plan.arch import read_arch

    config = load(options.config, options.overrides)
    folder = resolve_folder(config.model.path, weights=False)
    arch = with_stored_layers(read_arch(read_config(folder)), folder)
    return with_adapter(with_stored_quantization(config, folder), arch), arch, folder


def _data(options: argparse.Namespace) -> int:
    from fitune.config import build
    from fitune.data.doctor import examine, render_text, to_json
    from fitune.data.tokenizer import Tokenizer
    from fitune.errors import DataError
    from fitune.model.folder import resolve_folder

    settings = dict(_pair(text) for text in options.set)
    for key in ("train", "eval"):
        if key in settings:
            raise ConfigError(f"--set {key}=...: the files are given on the command line: fitune data FILE ...")
    config = build({"model": {"path": options.model}, "data": settings})
    tokenizer = Tokenizer.load(resolve_folder(options.model, weights=False, name="--model"))
    report = examine(tuple(options.files), config.data, tokenizer, options.render)
    print(to_json(report) if options.json else render_text(report))
    return DataError.exit_code if report.num_bad_rows else 0


def _pair(text: str) -> tuple[str, object]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: write KEY=VALUE, for example max_length=512")
    try:
        return key.removeprefix("data."), yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"--set {text:.80}: the value is no YAML ({reason}); put it in quotes") from error


def _chat(options: argparse.Namespace) -> int:
    from fitune.infer.chat import chat
    from fitune.infer.load import load

    sampling = _sampling(options)
    chat(load(options.run), options.system, sampling)
    return 0


def _generate(options: argparse.Namespace) -> int:
    prompts = list(options.prompt)
    if options.file:
        try:
            text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {options.file}: cannot be read as UTF-8 text ({error})") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("nothing to answer; give --prompt TEXT or --file FILE")
    if options.system and options.raw:
        raise ConfigError("--system needs a template, and --raw means none; leave one of them out")
    sampling = _sampling(options)
    from fitune.infer.load import load

    asked = [_conversation(options.system, prompt) for prompt in prompts]
    answers = load(options.run).generate_many(asked, raw=options.raw, **sampling)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if options.json:
            print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))
        elif len(prompts) == 1:
            print(answer)
        else:
            blank = "\n" if number else ""
            print(f"{blank}> {prompt}\n{answer}")
    return 0


def _conversation(system: str | None, prompt: str) -> Conversation:
    if not system:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _eval(options: argparse.Namespace) -> int:
    from fitune.training.evaluate import evaluate_run

    result = evaluate_run(Path(options.run), tuple(options.data))
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(
            f"held-out loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f} "
            f"({result['rows']} rows, {result['supervised_tokens']} supervised tokens)"
        )
    return 0


def _export(options: argparse.Namespace) -> int:
    run, target, files = Path(options.run), Path(options.to), tuple(options.data)
    if options.form == "merged" and not options.no_measure:
        from fitune.training.merge_report import export_and_measure

        print(f"written: {target}\n{export_and_measure(run, target, files, options.dtype).text()}")
        return 0
    if files:
        raise ConfigError("--data names rows to measure merging on, but nothing will be measured; leave it out")
    from fitune.infer.export import base_note, export

    print(f"written: {export(run, target, form=options.form, dtype=options.dtype)}{base_note(run, options.form)}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    target = Path(options.target)
    if options.quantization is not None:
        from fitune.infer.convert_quantized import quantize_folder

        quantize_folder(options.source, target, options.quantization, options.dtype)
    elif options.dtype is not None:
        raise ConfigError("--dtype is what weights are read in before they are quantized; give --quantization as well")
    else:
        from fitune.infer.convert import convert
        from fitune.model.folder import resolve_folder

        convert(resolve_folder(options.source, name="model"), target)
    print(f"written: {target}")
    return 0


def _quantize_report(options: argparse.Namespace) -> int:
    from fitune.infer.disk import check_free
    from fitune.infer.quantize_report import quantize_report, text
    from fitune.training.quantize_page import write_page

    if options.to:
        check_free(Path(options.to), "--to")
    report = quantize_report(options.model, tuple(options.data), options.threshold, options.dtype)
    print(json.dumps(report.to_json(), ensure_ascii=False) if options.json else text(report))
    if options.to:
        print(f"written: {write_page(report, Path(options.to))}/report.html", file=sys.stderr)
    return 0


def _config(options: argparse.Namespace) -> int:
    from fitune.config.reference import as_schema, as_text

    print(as_schema() if options.schema else as_text())
    return 0
