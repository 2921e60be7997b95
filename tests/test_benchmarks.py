"""What the benchmarks read of a run, and which run that is."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from distrl.driver.ledger import FileLedger, Step
from distrl.driver.ledger_file import LedgerFile
from distrl.records import GroupInfo, Prompt, ScoredInfo, VersionSpan

LAG0 = "mismatch/lag0_abs_mean"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmark(name)`: a module of benchmarks/, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))

    def load(name: str) -> ModuleType:
        return import_module(name)

    return load


def told(ledger: FileLedger, index: int, reward: float) -> None:
    """A group of two samples of 3 tokens, from its prompt to the buffer."""
    ids = np.zeros(2, np.int32)
    ledger.issued(Prompt(index=index, epoch=0, prompt_id=f"p{index}", text="", token_ids=ids))
    group = GroupInfo(
        index=index, prompt_id=f"p{index}", generator="g0", lengths=(3, 3),
        spans=((VersionSpan(version=0, start=0, end=3),),) * 2, finish_reasons=("stop",) * 2,
        nbytes=8, seconds=0.1, seed=0,
    )  # fmt: skip
    ledger.generated(group)
    ledger.scored(ScoredInfo(group=group, rewards=(reward, reward), seconds=0.1, scorer="s0"))
    ledger.admitted(index)


def resumed(run: Path) -> Path:
    """A run of three steps of a group, each after one that is dropped; after the second it died,
    its checkpoint was of the first, and what it did beyond had rewards of -9."""
    run.mkdir()
    path = run / "ledger.sqlite"
    for first, last, dropped in ((1, 2, -9.0), (2, 3, 0.0)):
        cursor = 2 * (first - 1)
        ledger = FileLedger(LedgerFile(path, step=first - 1, cursor=cursor), time.monotonic)
        for step in range(first, last + 1):
            told(ledger, 2 * step - 2, 0.0 if step == 1 else dropped)
            ledger.dropped(2 * step - 2, "no signal")
            told(ledger, 2 * step - 1, 1.0)
            done = Step(number=step, version=step - 1, version_after=step, bound=1)
            ledger.trained(done, [2 * step - 1], [0])
            if step == 1:
                ledger.committed(1, 2)
        asyncio.run(ledger.flush())
        ledger.close()
    rows = [{"step": n, "reward/mean": 1.0, "samples/total": 2 * n} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return run


def test_the_ledger_of_a_resumed_run_is_told_once(benchmark: Any, tmp_path: Path) -> None:
    cost = benchmark("ledger_cost")
    story = cost._story(resumed(tmp_path / "run") / "ledger.sqlite")
    assert [words[0] for _, what, words in story if what == "trained"] == [1, 2, 3]
    assert [words[0] for _, what, words in story if what == "admitted"] == [1, 3, 5]
    assert cost._retell(story)[0] > 0


def test_rewards_of_dynamic_sampling_are_those_of_replaced_groups_too(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampling, run = benchmark("dynamic_sampling"), resumed(tmp_path / "run")
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(sys, "argv", ["dynamic_sampling.py", "--seeds", "1"])
    monkeypatch.setattr(sampling, "train_on", lambda *_, **__: run)
    monkeypatch.setattr(sampling, "plot_rewards", lambda path, runs, title: drawn.update(runs))
    monkeypatch.setattr(sampling, "report", lambda *_: None)
    monkeypatch.setattr(sampling, "_silent", lambda _: 0.0)
    monkeypatch.setattr(sampling, "total", lambda *_: 0.0)
    whole = [{**row, "driver/drops": 3} for row in sampling.metrics(run)]
    monkeypatch.setattr(sampling, "metrics", lambda _: whole)
    sampling.main()
    for (curve,) in drawn.values():
        assert [row["reward/mean"] for row in curve] == [0.5] * 3
        assert [row["samples/total"] for row in curve] == [2, 4, 6]
    assert drawn.keys() == {"with", "without"} and sampling._reward(run) == 0.5


def test_a_run_from_other_weights_is_made_anew(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common, made = benchmark("common"), []

    def distrl(*words: str) -> None:
        (tmp_path / "runs" / words[-1]).mkdir(parents=True, exist_ok=True)
        made.append(words[-1])

    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "distrl", distrl)
    source = tmp_path / "demo"
    for stage in ("sft/policy", "reward-model/model"):
        (source / stage).mkdir(parents=True)
        (source / stage / "model.safetensors").write_bytes(b"first")
    for _ in range(2):
        common.train_on(source, steps=2)
    assert made == ["benchmark-staleness-1-0"]
    (source / "reward-model" / "model" / "model.safetensors").write_bytes(b"other")
    for _ in range(2):
        common.train_on(source, steps=2)
    assert made == ["benchmark-staleness-1-0"] * 2


def test_times_are_of_runs_that_no_other_benchmark_made(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    against, labels = benchmark("async_vs_sync"), []
    monkeypatch.setattr(against, "metrics", lambda _: [{}] * 3)
    monkeypatch.setattr(against, "train_on", lambda *_, label=None, **__: labels.append(label))
    for staleness in (0, 1):
        against._run(tmp_path, 3, 0, staleness=staleness)
    assert labels == ["async-vs-sync-0", "async-vs-sync-1"]


@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_a_mismatch_that_nobody_measured_is_not_a_small_one(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    module = benchmark(name)
    run = tmp_path / "runs" / "benchmark-demo-0"
    (run / "reward-model").mkdir(parents=True)
    number = {"value": 9.0, "low": 9.0, "high": 9.0}
    measures = {"kl": {"after": number}, "judge": {"change": number}}
    (run / "evaluation.json").write_text(json.dumps({"gain": number, "measures": measures}))
    held_out = {"accuracy": {"0.5": number, "2": number}}
    (run / "reward-model" / "report.json").write_text(json.dumps({"held_out": held_out}))
    row = {"reward/mean": 0.0, "kl/ref": 0.0, "staleness/max": 0, "time/step": 1.0}
    rows, figures = [row, row], {}
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "distrl", lambda *_: None)
    monkeypatch.setattr(module, "metrics", lambda _: rows)
    monkeypatch.setattr(module, "report", lambda title, seen, again: figures.update(seen))
    with pytest.raises(KeyError, match=f"no row of the run has {LAG0}"):
        module.main()
    rows[1] = row | {LAG0: 3e-5}
    module.main()
    ((label, shown),) = [(k, v) for k, v in figures.items() if "lag-0" in k]
    assert "mean over a step's tokens, 1 of 2 steps have any" in label and "3.0e-05" in shown


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.86, "ok 0.86"), (1.14, "ok 1.14"), (0.84, "MISS 0.84"), (1.16, "MISS 1.16")],
)
def test_the_simulator_is_held_to_its_threshold(benchmark: Any, ratio: float, said: str) -> None:
    assert benchmark("simulator_accuracy")._told(ratio) == said
