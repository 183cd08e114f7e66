"""Checkpoints: committed by one rename, verified file by file before they are trusted. safetensors and JSON only.

    checkpoints/step_000500/{whatever the caller wrote, MANIFEST.json}

The manifest is written last and lists size and sha256 of every other file; its own sha256 is inside. Try it:

    commit(folder, 500, lambda temp: save_tensors(temp / "optimizer.safetensors", tensors), {"seed": 0})
    checkpoint, problems = newest(folder)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fitune.errors import CheckpointError
from fitune.infer.disk import discard, disk_error, files_in, make_parents, replace_folder, tree_bytes, writing
from fitune.training.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

FORMAT = 1
MANIFEST = "MANIFEST.json"
HEADER_CAP_BYTES = 8 * 2**20
STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was checked against its manifest."""

    path: Path
    step: int
    manifest: dict[str, Any]  # Any: JSON values

    @property
    def facts(self) -> dict[str, Any]:  # Any: JSON values
        """What the caller of `commit` recorded."""
        facts: dict[str, Any] = self.manifest["facts"]
        return facts


def commit(folder: RunFolder, step: int, write: Callable[[Path], None], facts: Mapping[str, object]) -> Path:
    """Store a checkpoint so that a crash at any point leaves this one or the one before, complete.

    Args:
        folder: the run, locked by this process.
        step: optimizer steps done. A checkpoint of this step that is already there is replaced.
        write: puts files (and folders) into the folder it is given.
        facts: what a resume compares: settings, fingerprints, versions, sampler position. JSON values.
    Returns:
        checkpoints/step_000500.
    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched and training may go on.
    """
    target = _path(folder, step)
    plain_facts = json.loads(json.dumps(dict(facts)))  # what a reader will see: string keys, lists

    def fill(temp: Path) -> None:
        write(temp)
        files = {
            name: {"size_bytes": status.st_size, "sha256": _sha256(temp / name)}
            for name, status in files_in(temp).items()
            if name != MANIFEST
        }
        manifest = {"format": FORMAT, "step": step, "facts": plain_facts, "files": files}
        (temp / MANIFEST).write_bytes(_seal(manifest))

    folder.sync_metrics()
    make_parents(target)
    before = steps(folder)
    need_bytes = tree_bytes(_path(folder, before[-1])) if before else 0
    replace_folder(target, fill, need_bytes)
    return target


def steps(folder: RunFolder) -> list[int]:
    """Steps that have a checkpoint, oldest first; not verified."""
    try:
        names = os.listdir(folder.checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder.checkpoints}: {error.strerror}") from error
    found = (int(match[1]) for name in names if (match := STEP.fullmatch(name)))
    return sorted(step for step in found if _path(folder, step).name in names)


def newest(folder: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint that verifies, falling back past damaged ones.

    Returns:
        checkpoint: None only if the run has no checkpoint at all.
        problems: one text for each newer checkpoint that was passed over, naming its damaged files.
    Raises:
        CheckpointError: there are checkpoints but none verifies; a run never silently starts over.
    """
    problems: list[str] = []
    for step in reversed(steps(folder)):
        try:
            return verify(_path(folder, step)), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"no checkpoint of {folder.path} can be used:\n  " + "\n  ".join(problems) + "\n"
            "bring a damaged file back from a copy, or train anew into another output.dir"
        )
    return None, []


def verify(path: Path, hashes: bool = True) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Args:
        path: checkpoints/step_000500.
        hashes: False compares names and sizes only, which misses changed bytes.
    Raises:
        CheckpointError: names every damaged, missing or extra file.
    """
    manifest = _read_manifest(path)
    listed: dict[str, dict[str, object]] = manifest["files"]
    problems: list[str] = []
    try:
        found = files_in(path)
        del found[MANIFEST]
        problems += [f"{name}: missing" for name in listed if name not in found]
        problems += [f"{name}: not part of the checkpoint" for name in found if name not in listed]
        for name in [name for name in listed if name in found]:
            problem = _compare(path / name, found[name], listed[name], hashes)
            problems += [f"{name}: {problem}"] if problem else []
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
    if problems:
        raise CheckpointError(f"{path} is damaged: " + "; ".join(problems))
    return Checkpoint(path, manifest["step"], manifest)


def _compare(file: Path, status: os.stat_result, entry: Mapping[str, object], hashes: bool) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "a link or device, not a file"
    if status.st_size != entry.get("size_bytes"):
        return f"{status.st_size} bytes instead of {entry.get('size_bytes')}"
    if hashes and _sha256(file) != entry.get("sha256"):
        return "content changed (sha256 differs)"
    return None


def prune(folder: RunFolder, keep: int, protect: Set[int] = frozenset()) -> list[int]:
    """Delete all but the newest `keep` checkpoints and the protected ones; call it after a commit.

    Ones that are visibly damaged do not count as kept, and nothing is deleted unless a sound one stays.

    Args:
        keep: at least 1.
        protect: steps that stay in any case, such as the best one and the one just committed.
    Returns:
        Steps deleted.
    """
    have = steps(folder)
    sound = [step for step in have if _is_sound(_path(folder, step))]
    stay = set(sound[-max(keep, 1) :]) | set(protect)
    if not stay & set(sound):
        return []
    return _delete(folder, [step for step in have if step not in stay])


def drop_after(folder: RunFolder, step: int) -> list[int]:
    """Delete checkpoints past `step`, for a resume from `step`: they are damaged or of a course not taken."""
    return _delete(folder, [later for later in steps(folder) if later > step])


def _is_sound(path: Path) -> bool:
    try:
        verify(path, hashes=False)
    except CheckpointError:
        return False
    return True


def _delete(folder: RunFolder, doomed: list[int]) -> list[int]:
    with writing(folder.checkpoints):
        for step in doomed:
            discard(_path(folder, step))
    return doomed


def _path(folder: RunFolder, step: int) -> Path:
    return folder.checkpoints / f"step_{step:06d}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _encode(manifest: Mapping[str, object]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _seal(manifest: Mapping[str, object]) -> bytes:
    """Manifest as bytes, with the sha256 of its other keys."""
    return _encode({**manifest, "sha256": hashlib.sha256(_encode(manifest)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:  # Any: JSON values
    file = path / MANIFEST
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise CheckpointError(f"{path} is damaged: {MANIFEST}: not a file")
        content = file.read_bytes()
        manifest = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: not JSON") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: not a manifest")
    # Written out again it must give the same bytes: then not even a changed space goes unseen.
    if content != _seal({key: value for key, value in manifest.items() if key != "sha256"}):
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: content changed (sha256 differs)")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {manifest.get('format')}; this fitune reads format {FORMAT}; "
            "use the version that wrote it"
        )
    step = manifest.get("step")
    if not isinstance(step, int) or path.name != f"step_{step:06d}":
        raise CheckpointError(f"{path}: {MANIFEST} is of step {step}; the folder was renamed")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: no list of files")
    return manifest


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], require_finite: bool = False) -> None:
    """Write tensors as one safetensors file; any device, layout or sharing, 0-dim too.

    Args:
        path: the file; call it inside `commit` or `publish`, which force it to the disk.
        tensors: read only; names are kept.
        require_finite: refuse nan and inf instead of storing them.
    Raises:
        CheckpointError: a tensor is not finite, by name, and nothing is written; or the disk refused.
    Memory: CPU copies of the tensors that are on another device, not contiguous, or share their storage.
    """
    from safetensors.torch import save_file

    copies: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in seen:
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        if require_finite and (bad := _num_non_finite(copy)):
            raise CheckpointError(
                f"{path}: tensor `{name}` has {bad} non-finite values (nan or inf) of {copy.numel()}; not saved"
            )
        copies[name] = copy
    need_bytes = sum(copy.nbytes for copy in copies.values())
    try:
        # save_file renames a private file of mode 0600 to `path`: take the mode that `open` gives instead.
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(copies, path)
        path.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, path, need_bytes) from error


def _num_non_finite(tensor: torch.Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite does not know 8-bit floats
    return tensor.numel() - int(wide.isfinite().sum())


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file into CPU tensors that do not depend on the file afterwards.

    Raises:
        CheckpointError: missing, damaged, or with a header above 8 MiB.
    """
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > HEADER_CAP_BYTES:
            raise CheckpointError(
                f"{path}: header of {header_bytes} bytes, at most {HEADER_CAP_BYTES} are read; "
                "the file is damaged or not safetensors"
            )
        tensors: dict[str, torch.Tensor] = load_file(path, backend="pread")  # mmap would tie them to the file
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return tensors
