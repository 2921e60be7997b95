from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distrl.checkpoint import CheckpointError, Checkpoints, RunDir, RunDirError
from distrl.checkpoint import store as store_module
from distrl.config import Config, dump_yaml
from distrl.disk import NotWritten


def write(store: Checkpoints, step: int) -> Path:
    with store.write(step, {"version": step}) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "model.bin").write_bytes(bytes(range(256)) * 4 + bytes([step % 256]))
        (folder / "driver.json").write_text(json.dumps({"cursor": step}))
        path = folder
    return store.folder / path.name.split(".")[0]


def found(store: Checkpoints) -> int | None:
    """The step that a fresh process would resume from."""
    checkpoint = Checkpoints(store.folder, store.keep).latest()
    if checkpoint is None:
        return None
    assert checkpoint.state == {"version": checkpoint.step}
    assert json.loads((checkpoint.path / "driver.json").read_text()) == {"cursor": checkpoint.step}
    return checkpoint.step


@pytest.fixture
def store(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


# --- committing ----------------------------------------------------------------------------


def test_a_checkpoint_comes_back_with_its_state(store):
    assert store.latest() is None
    path = write(store, 50)
    assert path.name == "step_000050"
    checkpoint = store.latest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.path, checkpoint.state) == (50, path, {"version": 50})
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema"] == 1 and manifest["step"] == 50
    assert manifest["files"]["learner/model.bin"]["bytes"] == 1025


def test_begin_and_commit_apart(store):
    folder = store.begin(10)
    (folder / "driver.json").write_text('{"cursor": 10}')
    assert found(store) is None
    store.commit(10, {"version": 10})
    assert found(store) == 10
    assert [p.name for p in store.folder.iterdir()] == ["step_000010"]


def test_retention_keeps_the_newest(store):
    for step in (10, 20, 30, 40):
        write(store, step)
    assert store.committed() == [30, 40]
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_000030", "step_000040"]


def test_the_newest_is_by_number_not_by_name(store):
    write(store, 999_999)
    write(store, 1_000_000)
    assert found(store) == 1_000_000


def test_an_exception_while_writing_leaves_no_trace(store):
    write(store, 10)
    with pytest.raises(RuntimeError), store.write(20, {}) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert [p.name for p in store.folder.iterdir()] == ["step_000010"]


def test_a_write_that_was_never_committed_is_swept_away(store):
    write(store, 10)
    (store.folder / "step_000020.tmp-12345").mkdir()
    shutil.copytree(store.folder / "step_000010", store.folder / "step_000030")
    (store.folder / "step_000030" / "COMMITTED").unlink()
    (store.folder / "notes").mkdir()
    write(store, 20)
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "notes",
        "step_000010",
        "step_000020",
    ]


def test_a_step_is_committed_once(store):
    write(store, 10)
    with pytest.raises(CheckpointError, match="committed already"):
        store.begin(10)
    assert found(store) == 10


# --- crashes -------------------------------------------------------------------------------

CRASH = """
import os, pathlib, sys
from distrl.checkpoint import Checkpoints, store
folder, point, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
owner, name = {"fsync": (os, "fsync"), "rename": (pathlib.Path, "rename"),
    "replace": (pathlib.Path, "replace"), "rmtree": (store.shutil, "rmtree"),
    "unlink": (pathlib.Path, "unlink"), "write_bytes": (pathlib.Path, "write_bytes")}[point]
real, calls = getattr(owner, name), 0
def dying(*args, **options):
    global calls
    if calls == count:
        os._exit(9)
    calls += 1
    return real(*args, **options)
checkpoints = Checkpoints(folder, keep=2)
path = checkpoints.begin(30)
setattr(owner, name, dying)
(path / "driver.json").write_text('{"cursor": 30}')
checkpoints.commit(30, {"version": 30})
"""

POINTS = [("fsync", k) for k in range(7)] + [
    ("write_bytes", 0),
    ("rename", 0),
    ("replace", 0),
    ("unlink", 0),
    ("rmtree", 0),
]


@pytest.mark.parametrize(("point", "count"), POINTS)
def test_a_crash_at_any_point_leaves_a_whole_one(store, point, count):
    write(store, 10)
    write(store, 20)
    argv = [sys.executable, "-c", CRASH, str(store.folder), point, str(count)]
    done = subprocess.run(argv, check=False)
    assert done.returncode == 9, "the point was never reached"
    after_commit = point in {"unlink", "rmtree"} or (
        point == "fsync" and count >= 5
    )  # the marker is there
    assert found(store) == (30 if after_commit else 20)
    write(store, 40)  # and the run goes on
    assert found(store) == 40
    assert len(list(store.folder.iterdir())) == 2


def test_a_crash_in_the_first_commit_is_a_run_without_checkpoints(store):
    path = write(store, 10)
    (path / "COMMITTED").unlink()
    assert store.latest() is None
    write(store, 10)
    assert found(store) == 10


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_full_disk_leaves_the_last_one_whole(store, monkeypatch, call):
    """And says what could not be written, where, and the way on."""
    write(store, 10)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(NotWritten, match="No space") as told:
        patch.setattr(os, call, full)
        write(store, 20)
    said = str(told.value)
    assert f"the checkpoint of step 20 could not be written to {store.folder}" in said
    assert "it needs about 0.0 MiB" in said and "MiB are free" in said and "--resume" in said
    assert found(store) == 10
    write(store, 20)
    assert found(store) == 20


def test_too_little_space_is_known_before_anything_is_written(store, monkeypatch):
    write(store, 10)
    tight = SimpleNamespace(free=500)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: tight)
    with pytest.raises(CheckpointError, match=r"MiB free; free some"):
        store.begin(20)
    assert [p.name for p in store.folder.iterdir()] == ["step_000010"]


def test_space_for_the_first_one_is_looked_for_too(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path / "checkpoints", first_bytes=3 * 2**20)
    store.check_space()
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    for check in (store.check_space, lambda: store.begin(1)):
        with pytest.raises(CheckpointError, match=r"about 3\.0 MiB and .* has 1\.0 MiB free"):
            check()


def test_a_bug_is_no_full_disk(store, monkeypatch):
    def bug(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "a bug")

    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError, match="a bug") as told:
        patch.setattr(os, "fsync", bug)
        write(store, 10)
    assert not isinstance(told.value, NotWritten)


# --- damage --------------------------------------------------------------------------------

FILES = ["learner/model.bin", "driver.json", "manifest.json", "COMMITTED"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(store, caplog, name, damage):
    write(store, 10)
    damage(write(store, 20) / name)
    assert found(store) == 10
    assert "step_000020" in caplog.text
    assert (name in caplog.text) or "manifest.json" in caplog.text


def test_no_silent_fresh_start_where_none_is_whole(store):
    for step in (10, 20):
        flip(write(store, step) / "learner" / "model.bin")
    with pytest.raises(CheckpointError, match=r"step_000020: learner/model.bin has other contents"):
        store.latest()


def test_a_torn_one_is_replaced_when_its_step_comes_again(store):
    write(store, 10)
    flip(write(store, 20) / "driver.json")
    assert found(store) == 10
    write(store, 20)
    assert found(store) == 20


def test_torn_ones_do_not_push_whole_ones_out(store):
    write(store, 10)
    truncate(write(store, 20) / "driver.json")
    resumed = Checkpoints(store.folder, keep=2)
    assert resumed.latest().step == 10  # pyright: ignore[reportOptionalMemberAccess]
    write(resumed, 25)
    assert resumed.committed() == [10, 25]


def test_the_abandoned_future_is_not_taken_for_the_newest(store):
    write(store, 10)
    truncate(write(store, 50) / "driver.json")
    write(store, 20)
    assert store.committed() == [10, 20]


def test_a_renamed_folder_is_not_another_step(store):
    write(store, 10).rename(store.folder / "step_000099")
    with pytest.raises(CheckpointError, match="is of step 10"):
        store.latest()


def test_a_newer_schema_is_not_taken_for_damage(store, monkeypatch):
    write(store, 10)
    monkeypatch.setattr(store_module, "SCHEMA", 2)
    write(store, 20)
    monkeypatch.setattr(store_module, "SCHEMA", 1)
    with pytest.raises(CheckpointError, match="newer distrl"):
        store.latest()


# --- the run directory ---------------------------------------------------------------------


def yaml_of(**sections) -> str:
    return dump_yaml(Config.model_validate(sections))


def test_a_new_run_directory(tmp_path):
    with RunDir(tmp_path / "runs" / "r").claim(yaml_of()).begin() as run:
        assert run.config.read_text() == yaml_of()
        assert run.checkpoints.is_dir() and run.logs.is_dir()
        assert not run.has_progress()
    with RunDir(run.path).claim(yaml_of(learn={"lr": 1e-3})).begin():  # nothing was done there yet
        pass


def test_progress_is_not_overwritten(tmp_path):
    run = RunDir(tmp_path).claim(yaml_of()).begin()
    run.metrics.write_text('{"step": 1}\n')
    run.close()
    with pytest.raises(RunDirError, match="--resume"):
        RunDir(tmp_path).claim(yaml_of())
    with RunDir(tmp_path).claim(yaml_of(), resume=True).begin() as run:
        assert run.metrics.exists()


def test_fresh_deletes_progress_and_nothing_else(tmp_path):
    run = RunDir(tmp_path).claim(yaml_of()).begin()
    write(Checkpoints(run.checkpoints), 10)
    figures = [tmp_path / name for name in ("evaluation_20.json", "reward_vs_kl.png")]
    for path in (run.metrics, run.ledger, tmp_path / "ledger.sqlite-wal", run.logs / "x.log"):
        path.write_text("x")
    for path in figures:  # of the policy that goes
        path.write_text("x")
    (tmp_path / "sft").mkdir()
    run.close()
    with RunDir(tmp_path).claim(yaml_of(), fresh=True).begin() as run:
        assert not run.has_progress() and list(run.checkpoints.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "logs",
        "sft",
        "tables",
    ]
    assert (run.logs / "x.log").exists()


def test_resume_refuses_a_configuration_that_learns_something_else(tmp_path):
    run = RunDir(tmp_path).claim(yaml_of()).begin()
    run.metrics.write_text('{"step": 1}\n')
    run.close()
    with pytest.raises(RunDirError) as error:
        RunDir(tmp_path).claim(yaml_of(learn={"lr": 1e-3, "kl": {"coef": 0.1}}), resume=True)
    assert "learn.lr: 0.0003 -> 0.001" in str(error.value)
    assert "learn.kl.coef: 0.05 -> 0.1" in str(error.value)
    assert run.config.read_text() == yaml_of()  # and leaves what is there
    longer = yaml_of(
        driver={"steps": 99}, metrics={"wandb": False}, sync={"timeout_s": 300, "canary_tokens": 9},
        generate={"workers": 2, "request_timeout_s": 900}, score={"timeout_s": 900},
    )  # fmt: skip
    with RunDir(tmp_path).claim(longer, resume=True).begin():
        assert run.config.read_text() == longer


def test_a_setting_that_an_earlier_version_did_not_know_has_its_default(tmp_path):
    run = RunDir(tmp_path).claim(yaml_of()).begin()
    run.metrics.write_text('{"step": 1}\n')
    run.close()
    then = yaml.safe_load(yaml_of())
    del then["score"]["dtype"], then["data"]["chosen_column"]
    run.config.write_text(yaml.safe_dump(then))
    with pytest.raises(RunDirError, match=r"score\.dtype: float32 -> bfloat16\n[^:]*$"):
        RunDir(tmp_path).claim(yaml_of(score={"dtype": "bfloat16"}), resume=True)
    with RunDir(tmp_path).claim(yaml_of(), resume=True).begin():
        pass
    with pytest.raises(RunDirError, match=r"score\.dtype: float32 -> \(absent\)"):
        RunDir(tmp_path).claim(yaml.safe_dump(then), resume=True)


def test_resume_and_fresh_exclude_each_other(tmp_path):
    with pytest.raises(RunDirError, match="exclude"):
        RunDir(tmp_path).claim(yaml_of(), resume=True, fresh=True)


HOLD = """
import pathlib, sys
from distrl.checkpoint import RunDir
run = RunDir(pathlib.Path(sys.argv[1])).claim("{}")
print("held", flush=True)
sys.stdin.read()
"""


def test_what_was_claimed_and_not_begun_is_as_it_was(tmp_path):
    """A run that is refused leaves no folder behind, and costs an earlier one nothing."""
    with RunDir(tmp_path / "new").claim(yaml_of()) as run:
        assert (run.path / ".lock").exists()
    assert not run.path.exists()
    run.close()  # twice
    with RunDir(tmp_path / "gone").claim(yaml_of()).begin() as run:
        shutil.rmtree(run.path)
    with RunDir(tmp_path / "old").claim(yaml_of()).begin() as run:
        run.metrics.write_text('{"step": 1}\n')
    with RunDir(run.path).claim(yaml_of(learn={"lr": 1e-3}), fresh=True):
        pass
    assert run.metrics.exists() and run.config.read_text() == yaml_of()


def test_two_processes_cannot_drive_one_run(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunDirError, match=f"process {holder.pid} on "):
        RunDir(tmp_path).claim("{}", fresh=True)
    holder.kill()  # the kernel frees the lock of a process that was killed
    holder.communicate()
    RunDir(tmp_path).claim("{}").close()


def test_a_place_where_no_folder_can_be_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"file is no folder; choose another run\.root"):
        RunDir(tmp_path / "file" / "run").claim("")

    with pytest.raises(RunDirError, match=r"no folder can be made at /proc/no/run"):
        RunDir(Path("/proc/no/run")).claim("")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(NotWritten, match=r"run directory .*Read-only.*choose another run\.root"):
        RunDir(tmp_path / "run").claim("")
