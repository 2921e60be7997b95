"""A run with two generators, one of them killed on the way, that goes on to its end: once with each
transport that needs no GPU. Few runs, much asked of each, because an engine takes half a minute to
start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrl.checkpoint import Checkpoints
from distrl.cli.main import main
from distrl.driver.ledger_file import open_to_read
from distrl.metrics import read_jsonl, unknown_names
from tests.end_to_end.process import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

QUIET_S = 8.0
"""No group came back for so long: more than one takes on a slow machine, and the ledger is written
every second."""


@pytest.fixture(scope="module", params=["shm", "gloo"])
def survivor(begin: Callable[..., Run], request: pytest.FixtureRequest) -> Run:
    """Two generators; one is killed after the first step, with groups that are lost with it, and
    the run goes on with the other."""
    slow = ("--generate.max_num_seqs", "1", "--driver.prompts_per_step", "8")
    slow += ("--generate.max_new_tokens", "48")  # sequences come one by one
    sync = ("--sync.transport", request.param)
    run = begin("train", "--generate.workers", "2", "--driver.steps", "8", *slow, *sync)
    run.wait_for_step(1)
    generators = [p for p in run.family() if p.name().startswith("ray::GeneratorAc")]
    assert len(generators) == 2, [p.name() for p in run.family()]
    run.wait_until(lambda: _stopped_at_work(run, generators[0]))
    generators[0].kill()
    assert run.end() == 0, run.output
    return run


def _stopped_at_work(run: Run, generator: psutil.Process) -> bool:
    """Stop a generator; True where groups are left with it, which nobody else has in hand: the
    other one has ended all of its own, however long these take. Where none are it goes on."""
    generator.suspend()
    before, since = _awaited(run), time.monotonic()
    while time.monotonic() < since + QUIET_S:
        time.sleep(0.5)
        if (now := _awaited(run)) != before:
            before, since = now, time.monotonic()
    if not before:
        generator.resume()
    return bool(before)


def _awaited(run: Run) -> set[int]:
    """The prompts that went to a generator and have not come back, as the ledger has them."""
    wanted = "SELECT idx FROM attempts WHERE generated_s IS NULL AND ended IS NULL"
    with open_to_read(run.folder / "ledger.sqlite") as ledger:
        return {row[0] for row in ledger.execute(wanted)}


def test_every_step_is_there_once(survivor: Run) -> None:
    assert survivor.steps() == list(range(1, 9))


def test_a_generators_death_costs_no_prompt(survivor: Run) -> None:
    last = survivor.rows()[-1]
    assert last["driver/restarts"] == 1
    assert last["driver/retries"] >= 1
    assert last["driver/drops"] == 0


def test_the_ledger_proves_it(survivor: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The killed generator's groups were tried again, and the audit holds."""
    assert main(["audit", str(survivor.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] and len(report["findings"]) == 6
    counts = report["counts"]
    assert counts["trained"] == counts["committed"] == counts["prompts issued"] == 64
    assert counts["attempts"] > 64 and report["retries"]


def test_a_replay_gives_the_same_weights(survivor: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(survivor.folder)]) == 0
    assert "8 steps, weights equal to the bit after each" in capsys.readouterr().out


def test_a_simulation_can_be_fitted_to_it(
    survivor: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", str(survivor.folder), "--out", str(tmp_path)]
    assert main(["simulate", *words, "--sweep", "max_staleness=0,1"]) == 0
    points = json.loads((tmp_path / "simulate.json").read_text())
    assert [point["point"] for point in points] == [{"driver.max_staleness": n} for n in (0, 1)]
    assert all(point["audit"] and point["samples_per_second"] > 0 for point in points)
    assert (tmp_path / "simulate.png").exists()
    assert "idle" in capsys.readouterr().out


def test_metrics_are_known_and_within_bounds(survivor: Run) -> None:
    for row in survivor.rows():
        assert not unknown_names(row)
        assert row["staleness/max"] <= 1
        assert len(row["staleness/hist"]) == 2
        if row["staleness/hist"][0]:
            assert row["mismatch/lag0_abs_mean"] < 1e-4
        assert row["samples/total"] == 16 * row["step"]
        assert row["kl/ref"] > -1


def test_weights_were_updated_in_flight(survivor: Run) -> None:
    """Some response has tokens of two versions."""
    rows = read_jsonl(survivor.folder / "tables" / "rollouts.jsonl")
    assert {row["step"] for row in rows} == set(range(1, 9))
    assert any("," in row["versions"] for row in rows), [row["versions"] for row in rows]


def test_the_policy_loads_in_transformers(survivor: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = survivor.folder / "policy"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the film", return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0])
    start = AutoModelForCausalLM.from_pretrained(survivor.folder / "sft" / "policy")
    assert any((a != b).any() for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_wandb_has_the_run_offline(survivor: Run) -> None:
    assert list(survivor.folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_checkpoints_are_whole(survivor: Run) -> None:
    newest = Checkpoints(survivor.folder / "checkpoints", keep=50).latest()
    assert newest is not None
    assert (newest.step, newest.state["step"], newest.state["samples"]) == (8, 8, 128)


def test_the_output_is_for_people(survivor: Run) -> None:
    said = survivor.output
    assert "finished before, reusing" in said
    assert "PPO 8/8  reward" in said
    assert f"policy: {survivor.folder.name}/policy" in said or "policy: run/policy" in said
    assert "WARNING distrl.actors.handles: restarting generator-" in said
    for noise in ("Traceback", "FutureWarning", "INFO", "[W"):
        assert noise not in said, said


def test_the_end_leaves_nothing_behind(survivor: Run) -> None:
    assert survivor.shared_memory, "the engines' shared memory was looked for in vain"
    survivor.assert_nothing_left(within_s=10)
