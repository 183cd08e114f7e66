"""Checkpoints: any damage is seen and named, any crash leaves the old or the new one, tensors come back exactly."""

import errno
import itertools
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch

from faults import every_failure, every_kill, fail_at, failing, in_child, names_in
from fitune.errors import CheckpointError
from fitune.training.checkpoint import (
    commit,
    drop_after,
    load_tensors,
    newest,
    prune,
    save_tensors,
    steps,
    verify,
)
from fitune.training.run_folder import RunFolder

FACTS = {"config": {"train.seed": 0, "train.learning_rate": 2e-4}, "base": "山", "sampler": {"epoch": 1, "index": 7}}
PARTS = ["adapter/adapter.safetensors", "optimizer.safetensors", "state.json"]
FILES = [*PARTS, "MANIFEST.json"]


@pytest.fixture(autouse=True)
def _quick_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no test pulls the plug, and a real one takes milliseconds


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "x", "seed: 0\n")


def writer(step: int):
    def write(place: Path) -> None:
        for name in PARTS:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(f"{name} of step {step}, long enough to be damaged in the middle\n")

    return write


def save(folder: RunFolder, *which: int) -> None:
    for step in which:
        commit(folder, step, writer(step), FACTS | {"step": step})


def whole(folder: RunFolder) -> int | None:
    """Step of the newest checkpoint, after a look at its content."""
    checkpoint, problems = newest(folder)
    assert problems == []
    if checkpoint is None:
        return None
    assert checkpoint.facts == FACTS | {"step": checkpoint.step}
    for name in PARTS:
        assert f"of step {checkpoint.step}," in (checkpoint.path / name).read_text()
    return checkpoint.step


def test_commit_makes_a_checkpoint_that_says_what_it_is(folder):
    assert commit(folder, 500, writer(500), FACTS | {"step": 500}) == folder.checkpoints / "step_000500"
    assert whole(folder) == 500
    assert os.listdir(folder.checkpoints) == ["step_000500"]
    manifest = json.loads((folder.checkpoints / "step_000500" / "MANIFEST.json").read_text())
    assert list(manifest) == ["format", "step", "facts", "files", "sha256"]
    assert sorted(manifest["files"]) == PARTS
    assert set(manifest["files"]["state.json"]) == {"size_bytes", "sha256"}


def test_facts_are_what_json_makes_of_them(folder):
    facts = {"tuple": (1, 2), "deep": {10: None, 9: 0.1}, "nan": float("inf")}
    commit(folder, 1, writer(1), facts)
    checkpoint, _ = newest(folder)
    assert checkpoint.facts == {"tuple": [1, 2], "deep": {"10": None, "9": 0.1}, "nan": float("inf")}


def test_no_checkpoint_is_none(folder):
    assert newest(folder) == (None, [])
    shutil.rmtree(folder.checkpoints)
    assert newest(folder) == (None, [])
    save(folder, 1)
    assert whole(folder) == 1


def test_steps_sort_by_number_and_other_names_are_no_checkpoints(folder):
    save(folder, 1000000, 999999, 5)
    for name in (".tmp-step_000007-1", "step_7", "step_0000007", "notes"):
        (folder.checkpoints / name).mkdir()
    assert steps(folder) == [5, 999999, 1000000]
    assert whole(folder) == 1000000


def test_the_same_step_again_is_replaced(folder):
    commit(folder, 3, lambda place: (place / "old").touch(), {})
    save(folder, 3)
    assert whole(folder) == 3
    assert os.listdir(folder.checkpoints) == ["step_000003"]


# Damage


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def delete(file: Path) -> None:
    file.unlink()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lengthen(file: Path) -> None:
    with file.open("ab") as out:
        out.write(b"\n")


def link(file: Path) -> None:
    file.rename(file.parent.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent.parent / "elsewhere")


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [truncate, empty, zero, delete, flip, lengthen, link, folder_instead])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_named_and_passed_over(folder, name, damage):
    save(folder, 1, 2)
    damage(folder.checkpoints / "step_000002" / name)
    checkpoint, problems = newest(folder)
    assert checkpoint.step == 1
    assert len(problems) == 1
    assert "step_000002 is damaged: " in problems[0]
    assert f"{name}: " in problems[0]


@pytest.mark.parametrize("extra", ["notes.txt", "adapter/more.safetensors", "adapter/link"])
def test_a_file_too_many_is_damage(folder, extra):
    save(folder, 1, 2)
    file = folder.checkpoints / "step_000002" / extra
    if extra.endswith("link"):
        file.symlink_to(folder.path)
    else:
        file.touch()
    checkpoint, problems = newest(folder)
    assert checkpoint.step == 1
    assert f"step_000002 is damaged: {extra}: not part of the checkpoint" in problems[0]


def test_a_flipped_bit_anywhere_in_the_manifest_is_seen(folder):
    commit(folder, 2, lambda place: (place / "a").touch(), {"k": 0.5})
    file = folder.checkpoints / "step_000002" / "MANIFEST.json"
    data = file.read_bytes()
    for position, bit in itertools.product(range(len(data)), (1, 32)):  # 32 turns a into A
        changed = bytearray(data)
        changed[position] ^= bit
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"MANIFEST.json"):
            verify(file.parent)
    file.write_bytes(data)
    verify(file.parent)


def test_several_damaged_files_are_all_named(folder):
    save(folder, 2)
    for name in PARTS[:2]:
        flip(folder.checkpoints / "step_000002" / name)
    with pytest.raises(CheckpointError) as caught:
        verify(folder.checkpoints / "step_000002")
    assert [name in str(caught.value) for name in PARTS] == [True, True, False]
    verify(folder.checkpoints / "step_000002", hashes=False)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(folder):
    save(folder, 1, 2)
    delete(folder.checkpoints / "step_000001" / "state.json")
    flip(folder.checkpoints / "step_000002" / "optimizer.safetensors")
    with pytest.raises(CheckpointError) as caught:
        newest(folder)
    assert "step_000002 is damaged: optimizer.safetensors: content changed" in str(caught.value)
    assert "step_000001 is damaged: state.json: missing" in str(caught.value)


def test_a_checkpoint_that_is_a_file_is_damaged(folder):
    save(folder, 1)
    (folder.checkpoints / "step_000002").touch()
    checkpoint, problems = newest(folder)
    assert checkpoint.step == 1
    assert "step_000002 is damaged: MANIFEST.json: Not a directory" in problems[0]


def test_a_renamed_checkpoint_is_refused(folder):
    save(folder, 1)
    shutil.copytree(folder.checkpoints / "step_000001", folder.checkpoints / "step_000009")
    checkpoint, problems = newest(folder)
    assert checkpoint.step == 1
    assert "is of step 1; the folder was renamed" in problems[0]


def reseal(file: Path, **changes) -> None:
    from fitune.training import checkpoint

    manifest = json.loads(file.read_text()) | changes
    del manifest["sha256"]
    file.write_bytes(checkpoint._seal(manifest))


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"format": 2}, "checkpoint format 2; this fitune reads format 1"), ({"files": ["a"]}, "no list of files")],
)
def test_manifests_of_another_make_are_refused(folder, changes, text):
    save(folder, 1)
    reseal(folder.checkpoints / "step_000001" / "MANIFEST.json", **changes)
    with pytest.raises(CheckpointError, match=text):
        newest(folder)


@pytest.mark.parametrize("content", [b"[]", b"[" * 200_000, b"\xff", b"{}"])
def test_hostile_manifests_are_refused(folder, content):
    save(folder, 1)
    (folder.checkpoints / "step_000001" / "MANIFEST.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"MANIFEST.json: (not|content changed)"):
        newest(folder)


# Crashes and full disks


@pytest.fixture
def started(tmp_path):
    """A function that makes a new run with checkpoints 1 and 2 each time."""
    count = itertools.count()

    def make() -> RunFolder:
        made = RunFolder.create(tmp_path / f"run{next(count)}", "seed: 0\n")
        made.append_metrics({"step": 1})
        save(made, 1, 2)
        return made

    return make


def settled(folder: RunFolder, allowed: list[list[int]]) -> None:
    """After a crash: what is there is whole, `open` brings back what was in between, the lock clears the rest."""
    opened = RunFolder.open(folder.path)
    assert whole(opened) == steps(opened)[-1]
    assert steps(opened) in allowed
    for step in steps(opened):
        verify(opened.checkpoints / f"step_{step:06d}")
    with opened.lock():
        assert names_in(opened.checkpoints) == []
    assert steps(opened) in allowed
    save(opened, 3)
    assert whole(opened) == 3


def test_after_any_fault_in_a_commit_the_newest_is_the_old_or_the_new(started, tmp_path):
    def check(folder):
        settled(folder, [[1, 2], [1, 2, 3]])

    assert every_kill(started, lambda folder: save(folder, 3), check) >= 12
    assert every_failure(started, lambda folder: save(folder, 3), check) >= 20


def test_after_any_fault_in_a_second_commit_of_a_step_one_of_them_is_there(started, tmp_path):
    def check(folder):
        settled(folder, [[1, 2]])

    assert every_kill(started, lambda folder: save(folder, 2), check) >= 20
    assert every_failure(started, lambda folder: save(folder, 2), check) >= 20


def test_after_any_fault_in_pruning_the_newest_is_still_there(started, tmp_path):
    def check(folder):
        settled(folder, [[1, 2], [2]])

    assert every_kill(started, lambda folder: prune(folder, 1), check) >= 6
    assert every_failure(started, lambda folder: prune(folder, 1), check) >= 1


def test_a_full_disk_is_said_with_bytes_and_leaves_nothing(started):
    folder = started()
    outcome = failing(lambda: save(folder, 3), fail_at(5))
    assert "disk: cannot write" in outcome
    assert "step_000003: the disk is full; about " in outcome
    needed = sum(file.stat().st_size for file in (folder.checkpoints / "step_000002").rglob("*.*"))
    assert f"about {needed:,} bytes (0.0 MiB) needed, " in outcome
    assert whole(folder) == 2
    assert sorted(os.listdir(folder.checkpoints)) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("limit_bytes", [0, 1, 7, 8, 100, 500, 1000, 4100])
def test_a_disk_that_fills_up_at_any_byte_of_the_tensors_is_said(started, tmp_path, limit_bytes):
    folder = started()
    tensors = {"a": torch.ones(10, 100), "b": torch.tensor(1.0)}

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        commit(folder, 3, lambda place: save_tensors(place / "optimizer.safetensors", tensors), {})

    outcome = in_child(fill_up)
    assert "disk: cannot write" in outcome
    assert "optimizer.safetensors: the file size limit is reached; about 4,004 bytes" in outcome
    assert whole(folder) == 2
    assert sorted(os.listdir(folder.checkpoints)) == ["step_000001", "step_000002"]


def test_a_library_that_fails_to_write_is_a_disk_error_too(folder, tmp_path):
    from safetensors.torch import save_file

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        commit(folder, 3, lambda place: save_file({"a": torch.ones(100)}, place / "adapter.safetensors"), {})

    assert "CheckpointError: disk: cannot write" in in_child(fill_up)
    assert os.listdir(folder.checkpoints) == []


def test_an_error_of_the_caller_passes_through_and_leaves_nothing(folder):
    def write(place):
        (place / "half").touch()
        raise ZeroDivisionError

    save(folder, 1)
    with pytest.raises(ZeroDivisionError):
        commit(folder, 2, write, {})
    with pytest.raises(TypeError):
        commit(folder, 2, writer(2), {"not json": object()})
    assert os.listdir(folder.checkpoints) == ["step_000001"]


def test_everything_is_on_the_disk_before_the_rename(folder, monkeypatch):
    """What a power cut may lose is what was not fsynced: nothing of the new checkpoint, nor the rename."""
    synced, renames = [], []
    real = os.rename

    def rename(source, target):
        inside = [source, *Path(source).rglob("*"), folder.metrics]
        renames.append((target, {os.stat(path).st_ino for path in inside} - set(synced)))
        synced.clear()
        real(source, target)

    folder.append_metrics({"step": 1})
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "rename", rename)
    save(folder, 1)
    assert renames == [(folder.checkpoints / "step_000001", set())]
    assert synced == [folder.checkpoints.stat().st_ino]


# Pruning


def test_prune_keeps_the_newest_and_the_protected(folder):
    save(folder, 1, 2, 3, 4, 5)
    assert prune(folder, keep=2, protect={1}) == [2, 3]
    assert steps(folder) == [1, 4, 5]
    assert prune(folder, keep=3, protect={9}) == []
    assert os.listdir(folder.path / "checkpoints") != []


def test_prune_does_not_count_damaged_ones(folder):
    save(folder, 1, 2, 3, 4)
    delete(folder.checkpoints / "step_000004" / "state.json")
    truncate(folder.checkpoints / "step_000003" / "MANIFEST.json")
    assert prune(folder, keep=1) == [1, 3, 4]
    assert whole(folder) == 2


def test_prune_deletes_nothing_if_nothing_sound_would_stay(folder):
    save(folder, 1, 2)
    for step in (1, 2):
        delete(folder.checkpoints / f"step_{step:06d}" / "state.json")
    assert prune(folder, keep=1, protect={2}) == []
    assert steps(folder) == [1, 2]


def test_a_resume_from_an_older_one_drops_the_later(folder):
    save(folder, 1, 2, 3)
    flip(folder.checkpoints / "step_000003" / "state.json")
    assert drop_after(folder, 2) == [3]
    assert whole(folder) == 2


# Tensors

TENSORS = {
    "fp32": torch.arange(6.0).reshape(2, 3),
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "fp16": torch.tensor([[0.5]], dtype=torch.float16),
    "fp64": torch.tensor([1 / 3], dtype=torch.float64),
    "fp8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "int64": torch.tensor(2**60),
    "scalar": torch.tensor(3.0),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def test_tensors_come_back_exactly(tmp_path):
    file = tmp_path / "t.safetensors"
    save_tensors(file, TENSORS, require_finite=True)
    loaded = load_tensors(file)
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert loaded[name].tolist() == tensor.tolist()


def test_tensors_that_share_memory_are_all_stored(tmp_path):
    base = torch.arange(10.0)
    tensors = {"all": base, "tied": base, "part": base[2:5], "rest": base[5:], "strided": base[::2]}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    save_tensors(tmp_path / "part.safetensors", {"part": base[2:5]})
    assert (tmp_path / "part.safetensors").stat().st_size < 100


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    file = tmp_path / "t.safetensors"
    save_tensors(file, {"a": torch.ones(1000)})
    loaded = load_tensors(file)
    zero(file)
    loaded["a"].add_(1)
    assert loaded["a"].sum() == 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused_by_name(tmp_path, dtype, value):
    tensors = {"good": torch.ones(2), "layers.0.bad": torch.tensor([1.0, value, value]).to(dtype)}
    with pytest.raises(CheckpointError, match=r"tensor `layers.0.bad` has 2 non-finite values .nan or inf. of 3"):
        save_tensors(tmp_path / "t.safetensors", tensors, require_finite=True)
    assert os.listdir(tmp_path) == []
    save_tensors(tmp_path / "t.safetensors", tensors)


def test_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    save_tensors(tmp_path / "tensors", {"a": torch.ones(1)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "tensors")}
    assert len(modes) == 1


def header(length: int, rest: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + rest


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is damaged"),
        (b"\x01", "is damaged"),
        (header(5, b"{"), "is damaged"),
        (header(2, b"[]"), "is damaged"),
        (header(2**63), "header of 9223372036854775808 bytes, at most 8388608"),
        (header(9_000_000, b" " * 9_000_000), "header of 9000000 bytes"),
        (header(60, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     '), "is damaged"),
    ],
)
def test_damaged_tensor_files_are_named(tmp_path, content, text):
    file = tmp_path / "t.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"t.safetensors.*{text}"):
        load_tensors(file)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*t.safetensors: No such file"):
        load_tensors(tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=r"disk: cannot write .*nowhere/t.safetensors: No such file"):
        save_tensors(tmp_path / "nowhere" / "t.safetensors", TENSORS)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot"):
        commit(RunFolder(tmp_path / "file" / "x"), 1, writer(1), {})


def test_a_disk_error_while_reading_is_damage(folder, monkeypatch):
    from fitune.training import checkpoint

    def fail(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    save(folder, 1)
    monkeypatch.setattr(checkpoint, "_sha256", fail)
    with pytest.raises(CheckpointError, match=r"step_000001 is damaged: .*: Input/output error"):
        newest(folder)
