"""What a running loop holds: the parts that `run.assemble` made, and the state that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fitune.config import RunConfig
from fitune.data.batches import StepPlan
from fitune.data.prepare import Dataset
from fitune.data.tokenizer import Tokenizer
from fitune.methods import Method
from fitune.training.optim import LossScale, MasterOptimizer
from fitune.training.path import Path as ModelPath
from fitune.training.progress import Progress
from fitune.training.run_folder import RunFolder
from fitune.training.signals import StopRequest


@dataclass
class State:
    """Where a run stands after `step` optimizer steps; JSON in every checkpoint.

    Attributes:
        tokens: training tokens seen, padding excluded.
        seconds: time spent training, earlier halves of a resumed run included.
        evaluated_step: step of the last finished evaluation; -1 before the first.
        best_step: step of the lowest held-out loss so far.
        skipped_in_a_row, skipped: steps not applied because loss or gradient was not finite.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int = -1
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    best_step: int | None = None
    best_eval_loss: float | None = None
    skipped_in_a_row: int = 0
    skipped: int = 0
    loss_scale: LossScale = field(default_factory=lambda: LossScale(1.0))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> State:
        """The inverse of `to_json`."""
        return cls(**{**value, "loss_scale": LossScale(**value["loss_scale"])})


@dataclass
class Session:
    """Everything a step needs.

    Attributes:
        path_note: which path runs and why, for whoever watches.
        facts: identify base, data and versions; they go into every manifest.
    """

    config: RunConfig
    dataset: Dataset
    tokenizer: Tokenizer
    steps: StepPlan
    method: Method
    model: nn.Module
    path: ModelPath
    path_note: str
    optimizer: MasterOptimizer
    device: torch.device
    folder: RunFolder
    facts: dict[str, Any]
    display: Progress
    stop: StopRequest

    def note(self, text: str) -> None:
        """Tell the person watching, and keep it in the run's log.txt."""
        self.display.note(text)
        self.folder.append_log(text)

    @property
    def pad_id(self) -> int:
        """Any valid id does: padding is masked by length."""
        return self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.stop_ids[0]
