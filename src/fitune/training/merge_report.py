"""What merging changed: the merged model against the run it came from, token by token on held-out rows.

Rounding happens twice. An adapter that learnt on a quantized base is added to the full one, for which it was not made;
and a merged model that is quantized again is rounded once more, after the adapter could still answer to it.

    report = measure(Path("runs/demo"), Path("merged"), rows)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fitune.config import RunConfig
from fitune.data.batches import IGNORE, micro_batches
from fitune.data.prepare import Row
from fitune.errors import ConfigError, DataError
from fitune.infer.disk import check_free
from fitune.infer.export import export
from fitune.infer.load import load, run_parts
from fitune.methods.base import write_json
from fitune.model.load import load_base, pick_device, pick_dtype
from fitune.model.quantize import use_int8
from fitune.training.evaluate import held_out_rows
from fitune.training.path import forward

FILE = "merge_report.json"
# Rows are measured until the reference's logits would take more than this [fp32 elements: 1 GB].
MAX_LOGITS = 2**28
# Perplexity up by one percent: more than runs with another seed differ by.
LOSS_LIMIT = 0.01
# By Pinsker's inequality at most √(0.02 / 2) = a tenth of the probability moved: one sampled token in ten is another.
KL_LIMIT = 0.02


@dataclass(frozen=True)
class Measured:
    """One model on the measured rows.

    Attributes:
        what: in words.
        loss: cross-entropy per supervised token [nats].
        kl: Kullback-Leibler divergence from the run's own model per supervised token [nats].
        changed: share of supervised tokens for which another token is the most likely one.
        device: where it ran.
    """

    what: str
    loss: float
    kl: float
    changed: float
    device: str


@dataclass(frozen=True)
class MergeReport:
    """What was measured.

    Attributes:
        models: the run's own first; none: there were no rows to measure on.
        warnings: where rounding hurts; or why nothing was measured.
    """

    models: tuple[Measured, ...]
    rows: int
    supervised_tokens: int
    warnings: tuple[str, ...]

    def text(self) -> str:
        """A small table and the warnings."""
        if not self.models:
            return f"not measured: {self.warnings[0]}"
        width = max(len(model.what) for model in self.models)
        lines = [f"{self.rows:,} held-out rows, {self.supervised_tokens:,} supervised tokens"]
        lines.append(f"{'':{width}}    loss  KL [nats]  other first choice")
        for model in self.models:
            lines.append(f"{model.what:{width}}  {model.loss:6.4f}  {max(model.kl, 0.0):9.5f}  {model.changed:8.2%}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def export_and_measure(run: Path, target: Path, files: tuple[str, ...] = (), dtype: str | None = None) -> MergeReport:
    """Merge a run into `target` and compare the two.

    Args:
        files: rows to measure on, read before anything is written; none: those that the run held out.
        dtype: of the merged weights; None: as trained.
    Raises:
        FituneError: see `infer.export.export`; or rows of `files` are bad.
    """
    check_free(target, "--to")
    rows: tuple[Row, ...] = ()
    why = ""
    if (run / "config.yaml").is_file():  # else the export says what is wrong
        parts = run_parts(run)
        try:
            rows = held_out_rows(run, parts.config, parts.tokenizer, files)
        except (ConfigError, DataError) as error:
            if files:
                raise
            why = str(error)
    export(run, target, dtype=dtype)
    return measure(run, target, rows, dtype) if rows else MergeReport((), 0, 0, (why,))


def measure(run: Path, merged: Path, rows: Sequence[Row], dtype: str | None = None) -> MergeReport:
    """Compare a merged model with its run and write `merged`/merge_report.json.

    Args:
        merged: the folder that `export` wrote.
        rows: held-out rows; the first ones, as far as `MAX_LOGITS` allows, are measured.
        dtype: of the merged weights; None: as trained.
    Memory: one model at a time, and the logits of the run's model in fp32 on the host.
    """
    parts = run_parts(run)
    config, quantization = parts.config, parts.config.model.quantization
    weights_dtype = pick_dtype(dtype or config.model.dtype, torch.device("cpu"))
    trained_as = config.model.dtype if quantization == "none" else quantization
    comparison = Comparison(rows, config, parts.tokenizer.pad_id or 0)

    def open_merged(device: torch.device, stored: str) -> nn.Module:
        model = load_base(merged, weights_dtype, device, stored).model
        use_int8(model, config.model.int8_compute, config.model.int8_threshold)
        return model

    whole = parts.method.folder == "model"
    as_trained = f"{'model' if whole else 'adapter on the base'} in {trained_as}, as trained"
    models = [
        comparison.add(as_trained, lambda device: load(run, device=device.type).model),
        comparison.add(f"merged, {weights_dtype}", lambda device: open_merged(device, "none")),
    ]
    if quantization != "none":
        again = f"merged, quantized to {quantization} again"
        models.append(comparison.add(again, lambda device: open_merged(device, quantization)))
    report = MergeReport(
        tuple(models),
        len(comparison.rows),
        sum(row.num_supervised for row in comparison.rows),
        tuple(_warnings(models, quantization)),
    )
    thresholds = {"loss_limit": LOSS_LIMIT, "kl_limit": KL_LIMIT}
    write_json(merged / FILE, {"run": str(run), **asdict(report), **thresholds})
    return report


def _warnings(models: Sequence[Measured], quantization: str) -> Iterator[str]:
    advice = (
        "export it with --dtype fp32, or serve what was trained as it is"
        if quantization == "none"
        else f"serve the adapter on the base in {quantization}, or train on model.quantization=none",
        "serve the merged model as it is, or the adapter on the quantized base",
    )
    for model, what_to_do in zip(models[1:], advice, strict=False):
        rise = model.loss - models[0].loss
        if not rise <= LOSS_LIMIT:
            yield f"{model.what}: rounding hurts, the loss rises by {rise:.4f} (limit {LOSS_LIMIT}); {what_to_do}"
        elif not model.kl <= KL_LIMIT:
            yield (
                f"{model.what}: answers will differ from the run's (KL divergence {model.kl:.4f} nats a token, limit "
                f"{KL_LIMIT}), though the loss changes by {rise:+.4f} only; {what_to_do}"
            )


class Comparison:
    """Runs models over the same batches; the first one's logits are kept to compare the others with.

    Args:
        rows: cut, when the first model's vocabulary is known, to as many as `MAX_LOGITS` allows.
    """

    def __init__(self, rows: Sequence[Row], config: RunConfig, pad_id: int) -> None:
        self.rows = tuple(rows)
        self._config, self._pad_id = config, pad_id
        self._reference: list[torch.Tensor] = []  # log-probabilities (N, V) of each batch

    def add(self, what: str, open_model: Callable[[torch.device], nn.Module]) -> Measured:
        """Measure a model; one that is too large for the GPU runs on CPU, and the report says where."""
        device = pick_device("auto")
        try:
            return self._run(what, open_model(device), device)
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
        torch.cuda.empty_cache()
        cpu = torch.device("cpu")
        return self._run(what, open_model(cpu), cpu)

    def _run(self, what: str, model: nn.Module, device: torch.device) -> Measured:
        first, kept = not self._reference, []
        if first:
            self.rows = _as_many_as_fit(self.rows, _vocabulary(model))
        loss = kl = changed = 0.0
        model.eval()
        with torch.no_grad():
            batches = micro_batches(self.rows, self._config.data, self._config.train, self._pad_id)
            for number, batch in enumerate(batches):
                logits_NV, targets_N = _supervised(model, batch.to(device))
                logs_NV = logits_NV.log_softmax(-1)
                loss += F.nll_loss(logs_NV, targets_N, reduction="sum").item()
                if first:
                    kept.append(logs_NV.cpu())
                    continue
                reference_NV = self._reference[number].to(device)
                kl += F.kl_div(logs_NV, reference_NV, reduction="sum", log_target=True).item()
                changed += (logs_NV.argmax(-1) != reference_NV.argmax(-1)).sum().item()
        self._reference = kept or self._reference
        tokens = sum(row.num_supervised for row in self.rows)
        return Measured(what, loss / tokens, kl / tokens, changed / tokens, str(device))


def _as_many_as_fit(rows: Sequence[Row], vocabulary: int) -> tuple[Row, ...]:
    tokens = 0
    for number, row in enumerate(rows):
        tokens += row.num_supervised
        if number and tokens * vocabulary > MAX_LOGITS:
            return tuple(rows[:number])
    return tuple(rows)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _supervised(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) in fp32 and target ids (N,) of the supervised positions."""
    logits_BTV = forward(model, batch)
    targets_BT = batch.labels_BT[:, 1:]
    learn_BT = targets_BT != IGNORE
    return logits_BTV[:, :-1][learn_BT].float(), targets_BT[learn_BT]
