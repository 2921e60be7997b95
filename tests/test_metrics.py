from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from distrl.disk import NotWritten
from distrl.metrics import (
    METRICS,
    ConsoleSink,
    JSONLSink,
    ListSink,
    MetricsError,
    MultiSink,
    Sink,
    WandbSink,
    new_run_id,
    read_jsonl,
    rewind,
    rewind_run,
    stage_progress,
    unknown_names,
)
from distrl.metrics.wandb_sink import without_secrets


def write_steps(path: Path, steps: range) -> None:
    sink = JSONLSink(path)
    for step in steps:
        sink.log(step, {"reward/mean": step / 7})
    sink.close()


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(path)]


# --- JSONL ---------------------------------------------------------------------------------


def test_a_row_is_one_flat_json_object_that_is_there_at_once(tmp_path):
    sink = JSONLSink(tmp_path / "metrics.jsonl")
    sink.log(1, {"reward/mean": np.float64(0.5), "staleness/hist": [3, 1], "buffer/groups": 4})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())  # before close
    assert abs(row.pop("time") - time.time()) < 60
    assert row == {"step": 1, "reward/mean": 0.5, "staleness/hist": [3, 1], "buffer/groups": 4}


def test_numbers_that_json_has_no_word_for_become_null(tmp_path):
    sink = JSONLSink(tmp_path / "m.jsonl")
    sink.log(1, {"a": math.nan, "b": math.inf, "c": np.float64("-inf"), "d": [math.nan, 1]})
    text = (tmp_path / "m.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, None, [None, 1])


def test_a_metric_cannot_hide_the_step(tmp_path):
    with pytest.raises(MetricsError, match="step"):
        JSONLSink(tmp_path / "m.jsonl").log(1, {"step": 3})


def test_tables_lie_beside_the_metrics(tmp_path):
    sink = JSONLSink(tmp_path / "metrics.jsonl")
    sink.table(10, "rollouts", ["prompt", "reward"], [["a film", 0.5], ["the plot", math.nan]])
    assert read_jsonl(tmp_path / "tables" / "rollouts.jsonl") == [
        {"step": 10, "prompt": "a film", "reward": 0.5},
        {"step": 10, "prompt": "the plot", "reward": None},
    ]


def test_rewind_leaves_no_gap_and_no_duplicate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    before = path.read_text().splitlines()[:5]
    assert rewind(path, 5) == 5
    assert path.read_text().splitlines() == before  # to the byte, floats and times included
    write_steps(path, range(6, 9))
    assert steps_in(path) == list(range(1, 9))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_covers_the_tables(tmp_path):
    sink = JSONLSink(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        sink.log(step, {})
        sink.table(step, "rollouts", ["x"], [[step], [step]])
    assert rewind_run(tmp_path, 2) == 2
    assert steps_in(tmp_path / "tables" / "rollouts.jsonl") == [1, 1, 2, 2]


def test_rewind_of_a_run_that_never_logged(tmp_path):
    assert rewind_run(tmp_path, 5) == 0
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("torn", ['{"step": 4, "rew', '{"step": 4}'])
def test_a_half_written_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    with path.open("a") as file:
        file.write(torn)
    assert steps_in(path) == [1, 2, 3]
    write_steps(path, range(4, 5))  # opening it again does not glue two lines together
    assert steps_in(path) == [1, 2, 3, 4]


def full():
    """A file on a disk without room."""
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/full", "w")))


def test_a_full_disk_is_told_and_the_rows_before_are_there(tmp_path, monkeypatch):
    closed = []

    class Last(ListSink):
        def close(self):
            closed.append(self)

    path = tmp_path / "metrics.jsonl"
    sink = JSONLSink(path)
    sink.log(1, {"reward/mean": 1.0})
    sink._file.close()
    sink._file = full()
    with pytest.raises(NotWritten, match="the metrics of step 2 could not be written") as told:
        sink.log(2, {"reward/mean": 2.0})
    assert all(part in str(told.value) for part in (str(path), "No space left", "--resume"))
    with pytest.raises(NotWritten, match="the last metrics"):
        MultiSink(sink, Last()).close()
    assert closed, "the other sinks are closed all the same"
    assert [row["step"] for row in read_jsonl(path)] == [1]

    monkeypatch.setattr(Path, "open", lambda *_, **__: full())
    with pytest.raises(NotWritten, match="the table of step 2"):
        sink.table(2, "rollouts", ["prompt"], [["x"]])


def test_damage_that_a_crash_does_not_explain_is_an_error_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    damaged = '{"step": 1}\n{"st\n{"step": 3}\n'
    path.write_text(damaged)
    with pytest.raises(MetricsError, match="line 2"):
        rewind(path, 1)
    assert path.read_text() == damaged


def test_what_was_logged_survives_kill_9(tmp_path):
    code = (
        "import os, signal, pathlib; from distrl.metrics import JSONLSink\n"
        f"s = JSONLSink(pathlib.Path({str(tmp_path / 'm.jsonl')!r}))\n"
        "for k in range(1, 4): s.log(k, {})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert steps_in(tmp_path / "m.jsonl") == [1, 2, 3]


# --- names, small sinks --------------------------------------------------------------------


def test_unknown_names():
    known = [*METRICS, "reward/sentiment", "step", "time"]
    assert unknown_names(known) == []
    assert unknown_names(["reward/Mean", "kl/reff", "reward/a/b"]) == [
        "kl/reff",
        "reward/Mean",
        "reward/a/b",
    ]


def test_every_sink_meets_the_protocol_and_multi_reaches_all(tmp_path):
    one, two = ListSink(), ListSink()
    multi = MultiSink(one, two)
    multi.log(1, {"reward/mean": 1.0})
    multi.table(1, "t", ["a"], [["b"]])
    multi.close()
    for sink in (one, two):
        assert sink.rows == [(1, {"reward/mean": 1.0})]
        assert sink.tables == [(1, "t", ["a"], [["b"]])]
        assert sink.closed
    console = ConsoleSink(3, console=Console(file=io.StringIO()))
    for sink in (multi, one, console, JSONLSink(tmp_path / "m.jsonl")):
        assert isinstance(sink, Sink)


# --- console -------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    sink = ConsoleSink(40, every_s=0, console=Console(file=out, width=40))
    sink.log(3, {"reward/mean": 0.1234, "kl/ref": math.nan, "rollout/tokens_per_second": 2412.3})
    sink.close()
    (line,) = out.getvalue().splitlines()
    assert line.startswith("PPO 3/40  reward 0.123  KL nan  tokens/s 2,412  ")
    assert line.endswith(" left")


def test_dropped_groups_show_where_there_are_some():
    out = io.StringIO()
    sink = ConsoleSink(40, every_s=0, console=Console(file=out))
    for step, drops in enumerate([0, 3], 1):
        sink.log(step, {"reward/mean": 1.0, "driver/drops": drops})
    first, second = out.getvalue().splitlines()
    assert "dropped" not in first and "  dropped 3  " in second


def test_plain_lines_are_rate_limited_but_the_last_step_shows():
    out = io.StringIO()
    with stage_progress("SFT", 50, console=Console(file=out)) as tick:
        for step in range(1, 51):
            tick(step, {"loss": 1 / step})
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["SFT 1/50", "SFT 50/50"]
    assert "loss 0.02" in lines[1] and lines[1].endswith("0:00 left")


def test_a_live_line_on_a_terminal():
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=120)
    with stage_progress("reward model", 2, console=terminal) as tick:
        tick(1, {"loss": 0.5})
        tick(2, {"loss": 0.25})
    text = out.getvalue()
    assert "reward model" in text and "2/2" in text and "loss 0.25" in text


def test_time_left_counts_from_where_the_run_was_resumed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    sink = ConsoleSink(40, start=20, every_s=0, console=Console(file=out))
    now[0] += 10.0
    sink.log(21, {})  # 10 s a step, 19 steps to go
    assert out.getvalue().strip().endswith("3:10 left")


def test_a_console_that_is_gone_or_full_ends_no_run(caplog):
    with Path("/dev/full").open("w") as full:
        sink = ConsoleSink(3, every_s=0, console=Console(file=full))
        for step in (1, 2, 3):
            sink.log(step, {"reward/mean": 1.0})
        sink.close()
        with suppress(OSError):
            full.close()
    assert caplog.text.count("cannot be shown any more") == 1


UNREAD = """
import sys, time
from distrl.metrics import ConsoleSink
sink = ConsoleSink(3, every_s=0)
for step in (1, 2, 3):
    sink.log(step, {})
    time.sleep(0.2)
sink.close()
print("more", flush=True)
print("went on", file=sys.stderr)
"""


def test_a_reader_that_has_gone_ends_no_run():
    """`distrl train | head`: the first line is read, and the pipe closed."""
    run = subprocess.Popen(
        [sys.executable, "-c", UNREAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stdout is not None and run.stderr is not None
    assert run.stdout.readline().startswith(b"PPO 1/3")
    run.stdout.close()
    assert run.stderr.read().endswith(b"went on\n")
    assert run.wait() == 0


# --- W&B -----------------------------------------------------------------------------------


def wandb_sink(run_dir: Path, **options) -> WandbSink:
    return WandbSink(run_dir, project="p", name="n", config={"a": 1}, run_id="abcd1234", **options)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


class FakeRun:
    def __init__(self) -> None:
        self.rows, self.finished, self.defined = [], False, []

    def define_metric(self, name, **options):
        self.defined.append((name, options))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, init) -> types.ModuleType:
    module = types.ModuleType("wandb")
    module.Settings = lambda **options: options  # pyright: ignore
    module.Histogram = lambda np_histogram: ("histogram", np_histogram)  # pyright: ignore
    module.Table = lambda columns, data: ("table", columns, data)  # pyright: ignore
    module.init = init  # pyright: ignore
    module.setup = lambda settings: None  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_rows_reach_wandb_with_their_own_x_axis(monkeypatch, tmp_path, no_key):
    run, options = FakeRun(), {}
    fake_wandb(monkeypatch, lambda **given: options.update(given) or run)
    sink = wandb_sink(tmp_path)
    sink.log(7, {"reward/mean": 0.5, "staleness/hist": [5, 2]})
    sink.table(7, "rollouts", ["prompt"], [["a"]])
    sink.close()
    assert run.rows == [
        {
            "learner_step": 7,
            "reward/mean": 0.5,
            "staleness/hist": ("histogram", ([5, 2], [0, 1, 2])),
        },
        {"learner_step": 7, "rollouts": ("table", ["prompt"], [["a"]])},
    ]
    assert ("*", {"step_metric": "learner_step"}) in run.defined
    assert options["id"] == "abcd1234" and options["resume"] == "allow"
    assert options["mode"] == "offline"
    assert run.finished and not sink.failed


def test_the_mode_follows_the_key_and_the_environment(monkeypatch, tmp_path, no_key):
    modes = []
    fake_wandb(monkeypatch, lambda **given: modes.append(given["mode"]) or FakeRun())
    wandb_sink(tmp_path).close()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb_sink(tmp_path).close()
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb_sink(tmp_path).close()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb_sink(tmp_path).close()
    assert modes == ["offline", "online", "online", "disabled"]


def test_a_wandb_that_raises_is_reported_once(monkeypatch, tmp_path, no_key, caplog):
    run = FakeRun()

    def broken(row):
        raise ConnectionError("no route")

    run.log = broken
    fake_wandb(monkeypatch, lambda **_: run)
    sink = wandb_sink(tmp_path)
    for step in range(1, 20):
        sink.log(step, {})
    sink.close()
    sink.log(20, {})
    assert sink.failed
    assert caplog.text.count("no route") == 1 and len(caplog.records) == 1


def test_a_wandb_that_is_not_installed(monkeypatch, tmp_path, no_key, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb_sink(tmp_path).close()
    assert "goes on without it" in caplog.text


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_wandb_that_hangs_holds_nothing_up(mode, monkeypatch, tmp_path, no_key, caplog):
    monkeypatch.setenv("WANDB_MODE", mode)
    forever = threading.Event()
    fake_wandb(monkeypatch, lambda **_: forever.wait() and FakeRun())
    began = time.monotonic()
    start_s = {"online": 30.0, "offline": 0.3}[mode]
    sink = wandb_sink(tmp_path, queue_rows=10, close_timeout_s=0.3, start_timeout_s=start_s)
    for step in range(1, 101):
        sink.log(step, {"reward/mean": 1.0})
    assert time.monotonic() - began < 0.2
    assert sink.dropped == 90
    sink.close()
    sink.close()
    assert time.monotonic() - began < 1.0
    assert "90 rows" in caplog.text
    forever.set()


@pytest.mark.parametrize(
    ("mode", "slow"), [("offline", "setup"), ("offline", "init"), ("online", "setup")]
)
def test_a_slow_start_of_wandb_costs_no_row(mode, slow, monkeypatch, tmp_path, no_key):
    """Where it is this machine's, and no server's."""
    monkeypatch.setenv("WANDB_MODE", mode)
    run = FakeRun()
    module = fake_wandb(monkeypatch, lambda **_: run)
    quick = getattr(module, slow)
    monkeypatch.setattr(
        module, slow, lambda *given, **named: time.sleep(1.0) or quick(*given, **named)
    )
    sink = wandb_sink(tmp_path, close_timeout_s=0.3)
    sink.log(1, {"reward/mean": 1.0})
    sink.close()
    assert run.finished and len(run.rows) == 1 and not sink.failed


def test_secrets_stay_out_of_the_config():
    config = {"hub_token": "s3", "api_key": "s3", "generate": {"max_new_tokens": 4, "secret": "s3"}}
    cleaned = without_secrets(config)
    assert "s3" not in repr(cleaned)
    assert cleaned["generate"]["max_new_tokens"] == 4


REAL = """
import pathlib, signal, sys
from distrl.metrics import WandbSink
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.stdout
sink = WandbSink(pathlib.Path(sys.argv[1]), project="p", name="n", config={"learn": {"lr": 1}},
                 run_id=sys.argv[2])
by_age = {f"offpolicy/{name}/lag{lag}": 0.5 for name in ("kl", "ess", "tokens") for lag in (0, 1)}
for step in (1, 10):
    sink.log(step, {"reward/mean": step / 2, "staleness/hist": [4, 1], **by_age})
sink.table(10, "rollouts", ["prompt", "reward"], [["a film", 0.5]])
sink.close()
assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.stdout)
print("failed" if sink.failed else "logged")
"""


def real_wandb(run_dir: Path, run_id: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    clean["NETRC"] = str(run_dir / "no-netrc")
    return subprocess.run(
        [sys.executable, "-c", REAL, str(run_dir), run_id],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_real_wandb_offline_is_quiet_and_resumes_the_same_run(tmp_path):
    run_id = new_run_id()
    for _ in range(2):
        done = real_wandb(tmp_path, run_id)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "logged\n" and done.stderr == ""
        time.sleep(1.1)  # W&B names an offline folder by the second
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    data = b"".join(file.read_bytes() for file in files)
    assert b"reward/mean" in data and b"learner_step" in data
    assert b"offpolicy/by_age" in data and b"by age of tokens" in data


@pytest.mark.slow
def test_real_wandb_without_a_server_lets_the_process_end(tmp_path):
    began = time.monotonic()
    done = real_wandb(tmp_path, "x1", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert time.monotonic() - began < 20  # W&B itself would try for 30 s and more
    assert done.returncode == 0 and done.stdout == "failed\n"
    assert len(done.stderr.splitlines()) == 1, done.stderr  # and nothing of W&B's own
    assert "goes on without it" in done.stderr
