"""IA3 (arXiv:2205.05638): y = l * (W x + b), or y = W (l * x) + b in the MLP's last layer; l is trained."""

from __future__ import annotations

from torch import nn

from fitune.config import Ia3Config, MethodConfig
from fitune.methods import adapters
from fitune.methods.base import Method
from fitune.methods.merging import ia3_edits
from fitune.model.families import feedforward_modules, target_modules
from fitune.model.libraries import import_peft
from fitune.model.load import Base


def _apply(base: Base, config: MethodConfig) -> nn.Module:
    assert isinstance(config, Ia3Config)
    targets = target_modules(base.model, base.model_type, config.target_modules)
    settings = import_peft().IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=feedforward_modules(base.model_type, targets, config.feedforward_modules),
    )
    return adapters.wrap(base.model, settings)


IA3 = Method(
    name="ia3",
    folder="adapter",
    apply=_apply,
    state=adapters.state,
    load_state=adapters.load_state,
    write_config=adapters.write_config,
    open=adapters.open_adapter,
    merge=adapters.merge,
    edits=ia3_edits,
)
