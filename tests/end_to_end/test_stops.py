"""Synchronous runs that are stopped, killed, resumed, shared by two ranks, and evaluated.

- `interrupted`: Ctrl-C after step 3.
- `killed`: the same recipe; kill -9 after step 3, its newest checkpoint damaged, resumed.
- `two_ranks`: two steps, to the end.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distrl.checkpoint import Checkpoints
from distrl.cli.main import main
from distrl.driver.ledger_file import open_to_read
from distrl.metrics import read_jsonl
from tests.end_to_end.process import RAY_AGENTS, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


SYNCHRONOUS = ("--driver.max_staleness", "0", "--driver.steps", "40")


@pytest.fixture(scope="module")
def interrupted(begin: Callable[..., Run]) -> Run:
    run = begin("train", *SYNCHRONOUS)
    run.wait_for_step(3)
    run.interrupt(signal.SIGINT)
    run.end(60)
    return run


@pytest.fixture(scope="module")
def killed(begin: Callable[..., Run]) -> Run:
    run = begin("train", *SYNCHRONOUS)
    run.wait_for_step(3)
    run.wait_until((run.folder / "checkpoints" / "step_000003" / "COMMITTED").exists)
    run.process.kill()
    run.end(10)
    return run


def test_ctrl_c_ends_with_a_checkpoint(interrupted: Run) -> None:
    assert interrupted.process.returncode == 75, interrupted.output
    steps = interrupted.steps()
    assert steps == list(range(1, steps[-1] + 1))
    newest = Checkpoints(interrupted.folder / "checkpoints", keep=50).latest()
    assert newest is not None and newest.step == steps[-1]
    said = interrupted.output
    assert "stopping after this step" in said
    assert f"stopped after step {steps[-1]} of 40" in said and "--resume" in said
    interrupted.assert_quiet()


def test_ctrl_c_leaves_nothing_behind(interrupted: Run) -> None:
    interrupted.assert_nothing_left(within_s=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_a_stop_while_the_actors_start(begin: Callable[..., Run], number: signal.Signals) -> None:
    run = begin("train")
    log = run.folder / "logs" / "generator-0.log"
    # vLLM's first word from there: the engine's own process comes next. Asked of the file, as to
    # look through all processes may take, on a busy machine, longer than an engine's start.
    run.wait_until(lambda: log.exists() and "MainProcess" in log.read_text(errors="replace"))
    time.sleep(2)
    if number == signal.SIGINT:
        run.interrupt(number)
    else:  # which a service manager sends to the first process alone
        run.process.send_signal(number)
    assert run.end(60) == 130, run.output
    assert "distrl train: interrupted" in run.output
    run.assert_quiet()
    run.assert_nothing_left(within_s=15)


def test_kill_9_leaves_nothing_behind(killed: Run) -> None:
    assert killed.process.returncode == -signal.SIGKILL
    killed.assert_nothing_left(within_s=30, but=RAY_AGENTS)


def test_a_synchronous_run_is_the_same_to_the_bit(interrupted: Run, killed: Run) -> None:
    """Policy, critic and both optimizers after step 3, and what was measured on the way."""
    for name in ("policy", "critic", "policy_optimizer", "critic_optimizer"):
        path = Path("checkpoints", "step_000003", "learner", f"{name}.safetensors")
        assert sha256(interrupted.folder / path) == sha256(killed.folder / path), name
    for mine, other in zip(interrupted.rows()[:3], killed.rows()[:3], strict=True):
        assert mine["staleness/max"] == 0
        same = {k for k in mine if k.split("/")[0] in {"reward", "kl", "loss", "value", "ppo"}}
        assert len(same) > 10
        assert {k: mine[k] for k in same} == {k: other[k] for k in same}


def test_resume_after_kill_9_and_a_damaged_checkpoint(
    killed: Run, begin: Callable[..., Run]
) -> None:
    killed.assert_nothing_left(within_s=30, but=RAY_AGENTS)
    newest = max(Checkpoints(killed.folder / "checkpoints").committed())
    weights = killed.folder / f"checkpoints/step_{newest:06d}/learner/policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    last = newest + 1

    words = ("--driver.max_staleness", "0", "--driver.steps", str(last))
    refused = begin("train", *words, folder=killed.folder.parent)
    assert refused.end(60) == 1
    assert "--resume" in refused.output

    scratch = {"TMPDIR": str(killed.scratch)}  # where it finds what the killed run left
    resumed = begin("train", "--resume", *words, folder=killed.folder.parent, **scratch)
    assert resumed.end() == 0, resumed.output
    said = " ".join(resumed.output.split())
    assert "skipping torn checkpoint" in said and f"step_{newest:06d}" in said
    assert f"going on after step {newest - 1}" in said
    assert resumed.steps() == list(range(1, last + 1))
    assert [row["samples/total"] for row in resumed.rows()] == [8 * k for k in range(1, last + 1)]
    tables = read_jsonl(resumed.folder / "tables" / "rollouts.jsonl")
    assert len({(row["step"], row["prompt"], row["response"]) for row in tables}) == len(tables)
    ids = {json.loads(m.read_text())["state"]["wandb_id"] for m in manifests(resumed)}
    assert len(ids) == 1, "one W&B run"
    assert (resumed.folder / "policy" / "model.safetensors").exists()
    assert main(["audit", str(resumed.folder)]) == 0, "rolled back, tried again, counted once"
    assert main(["replay", str(resumed.folder)]) == 0, "through the kill and the resume"
    with open_to_read(resumed.folder / "ledger.sqlite") as ledger:
        seeds = ledger.execute("SELECT DISTINCT seed FROM attempts WHERE seed IS NOT NULL")
        assert len(seeds.fetchall()) == 2, "the sampler went on with other random numbers"
    resumed.assert_nothing_left(within_s=10)
    killed.assert_nothing_left(within_s=60)  # by now the agents too


def manifests(run: Run) -> list[Path]:
    return list(run.folder.glob("checkpoints/step_*/manifest.json"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def two_ranks(begin: Callable[..., Run]) -> Run:
    run = begin("train", "--learn.ranks", "2", *SYNCHRONOUS[:-2], "--driver.steps", "2")
    assert run.end() == 0, run.output
    return run


def test_two_ranks_share_the_learner(interrupted: Run, two_ranks: Run) -> None:
    """The first step is on the same rollouts as that of a run with one; later ones drift apart
    by roundings."""
    run = two_ranks
    mine, other = run.rows()[0], interrupted.rows()[0]
    for name in ("reward/mean", "kl/ref", "loss/policy", "value/loss", "ppo/entropy", "grad/norm"):
        assert mine[name] == pytest.approx(other[name], abs=1e-4), name
    halves = run.folder.glob("checkpoints/step_000002/learner/policy.*-of-00002.safetensors")
    assert len(list(halves)) == 2
    run.assert_quiet()
    run.assert_nothing_left(within_s=10)


def test_nobody_listens_beyond_this_machine(two_ranks: Run) -> None:
    """Ray, the engine, the learner's ranks among each other."""
    names = {name for name, _ in two_ranks.listened}
    for who in ("gcs_server", "raylet", "VLLM::", "ray::LearnerAct"):
        assert any(name.startswith(who) for name in names), names
    at = {(name, ip.removeprefix("::ffff:")) for name, ip in two_ranks.listened}
    assert not {(name, ip) for name, ip in at if not ip.startswith("127.")}


def test_a_finished_run_is_evaluated(two_ranks: Run, begin: Callable[..., Run]) -> None:
    """The table on the screen, the same in a file, the plot; nothing of the engine is left."""
    words = ("--evaluate.prompts", "12", "--evaluate.samples_shown", "1")
    run = begin("evaluate", *words, folder=two_ranks.folder.parent, COLUMNS="160")
    assert run.end() == 0, run.output
    for row in ("reward", "KL", "tokens", "judge", "win rate by reward", "distinct-2", "cut by"):
        assert row in run.output, f"no {row!r} in:\n{run.output}"
    assert "1 prompts drawn by seed 0, not picked" in run.output
    run.assert_quiet()

    found = json.loads((run.folder / "evaluation.json").read_text())
    assert found["prompts"] == 12
    assert list(found["measures"]) == ["reward", "kl", "length", "judge"]
    assert list(found["wins"]) == ["reward", "judge"]
    pairs = [found["measures"][name] for name in found["measures"]]
    intervals = [*found["wins"].values(), found["gain"]]
    intervals += [pair[side] for pair in pairs for side in ("before", "after", "change")]
    assert all(each["low"] <= each["value"] <= each["high"] for each in intervals)
    assert found["measures"]["kl"]["before"]["value"] == 0, "of the reference to itself"
    assert found["measures"]["kl"]["after"]["value"] != 0
    assert all(
        0 <= share <= 1
        for name in ("distinct-1", "distinct-2")
        for share in found["distinct"][name]
    )
    for side, name in (("before", "SFT"), ("after", "PPO")):
        policy = found[side]
        assert policy["name"] == name and len(policy["rows"]) == 12 * 2
        for measure in ("reward", "kl", "length", "judge"):
            mean = sum(row[measure] for row in policy["rows"]) / 24
            assert found["measures"][measure][side]["value"] == pytest.approx(mean), measure
    texts = [[row["response"] for row in found[side]["rows"]] for side in ("before", "after")]
    assert texts[0] != texts[1]
    assert (run.folder / "reward_vs_kl.png").read_bytes().startswith(b"\x89PNG")
    run.assert_nothing_left(within_s=10)
