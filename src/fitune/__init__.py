"""Fine-tune language models in the memory you have.

    import fitune
    result = fitune.train("examples/demo.yaml")
    print(fitune.load(result.run).generate("以“春雨”为题，写一首五言绝句"))

Importing this loads no torch; each function brings what it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitune.errors import FituneError

if TYPE_CHECKING:
    from fitune.config import RunConfig
    from fitune.infer.load import Loaded
    from fitune.training.run import Result

__version__ = "0.1.0"
__all__ = ["FituneError", "RunConfig", "embedded_path", "export", "load", "resume", "train"]


def __getattr__(name: str) -> Any:
    if name == "RunConfig":  # pydantic takes longer to import than everything else here
        from fitune.config import RunConfig

        return RunConfig
    raise AttributeError(f"module 'fitune' has no attribute {name!r}")


def train(
    config: RunConfig | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    quiet: bool = False,
    replace: bool = False,
) -> Result:
    """Run a configuration from the start.

    Args:
        config: a YAML file, a nested mapping as in one, or a `RunConfig`.
        overrides: `section.key=value` pairs over it.
        quiet: print nothing.
        replace: remove an earlier run in the same folder first.

    Raises:
        FituneError: its subclass tells what went wrong (`fitune.errors`).
    """
    from fitune.config import load as load_config
    from fitune.config.load import apply_overrides, build

    if isinstance(config, str | Path):
        resolved = load_config(config, overrides)
    else:  # a RunConfig may be unresolved and unchecked: `build` does both
        tree = copy.deepcopy(dict(config)) if isinstance(config, Mapping) else config.model_dump(exclude_unset=True)
        apply_overrides(tree, overrides)
        resolved = build(tree)
    from fitune.training.run import train as run_config

    return run_config(resolved, quiet=quiet, replace=replace)


def resume(run: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Result:
    """Continue a stopped run from its newest good checkpoint."""
    from fitune.training.run import resume as resume_run

    return resume_run(Path(run), overrides, quiet=quiet)


def load(
    path: str | Path, *, device: str = "auto", dtype: str | None = None, quantization: str | None = None
) -> Loaded:
    """Open a finished run or a base model; `.generate(...)` and `.stream(...)` answer prompts."""
    from fitune.infer.load import load as load_model

    return load_model(path, device=device, dtype=dtype, quantization=quantization)


def export(run: str | Path, to: str | Path, *, form: str = "merged", dtype: str | None = None) -> Path:
    """Write a finished run as a model folder (`form="merged"`) or a PEFT adapter (`form="adapter"`).

    What merging changed is measured by `fitune.training.merge_report.measure`, as `fitune export` does.
    """
    from fitune.infer.export import export as export_run

    return export_run(Path(run), Path(to), form=form, dtype=dtype)


def embedded_path() -> Path:
    """Folder of the small base model that comes with fitune (model.path=embedded)."""
    from fitune.model.folder import embedded_path as path

    return path()
