"""Whole simulated runs: promises kept, the same seed the same trace, sizes that no machine has."""

from __future__ import annotations

import json
import math
import sqlite3
import statistics
from dataclasses import replace
from typing import Any

import pytest

from distrl.config import Config
from distrl.driver.audit import audit
from distrl.driver.ledger_file import open_to_read
from distrl.sim.fit import NoTimings, fitted
from distrl.sim.simulate import simulate


def config(**sections):
    base = {
        "driver": {"steps": 12, "prompts_per_step": 8, "max_staleness": 1},
        "generate": {"workers": 2, "samples_per_prompt": 4, "max_num_seqs": 32},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return Config.model_validate(merged)


def time_of(row: Any, name: str) -> Any:
    return row[f"time/{name}"]


def same(outcome):
    return replace(outcome, real_s=0.0)


def test_the_same_seed_gives_the_same_trace(tmp_path):
    faulty = config(simulate={"death_rate": 0.02, "fail_rate": 0.05, "seed": 3})
    outcomes = [simulate(faulty, tmp_path / name) for name in ("a", "b")]
    assert same(outcomes[0]) == same(outcomes[1])
    traces = []
    for name in ("a", "b"):
        with open_to_read(tmp_path / name) as db:
            tables = ("attempts", "samples", "trainings", "events")
            traces.append([db.execute(f"SELECT * FROM {table}").fetchall() for table in tables])
    assert traces[0] == traces[1]
    other = faulty.model_copy(update={"simulate": faulty.simulate.model_copy(update={"seed": 4})})
    assert same(simulate(other)) != same(outcomes[0])


def test_lockstep_leaves_each_side_idle_while_the_other_works():
    lock = simulate(config(driver={"max_staleness": 0}))
    ahead = simulate(config(driver={"max_staleness": 1}))
    assert lock.ages == {0: 1.0}
    assert set(ahead.ages) <= {0, 1}
    assert ahead.samples_per_second > 1.1 * lock.samples_per_second
    # One of the two works, or neither (scores and weights are under way).
    assert 1.0 <= lock.idle["learner"] + lock.idle["generators"] < 1.3


def test_a_slow_learner_idles_the_generators_and_the_other_way_round():
    slow_learner = simulate(config(simulate={"learn_s": 20.0}))
    assert slow_learner.idle["learner"] < 0.1 < slow_learner.idle["generators"]
    slow_engine = simulate(config(simulate={"iteration_s": 1.0}))
    assert slow_engine.idle["generators"] < 0.25 < slow_engine.idle["learner"]


def test_faults_cost_time_and_no_promise(tmp_path):
    """Deaths, hangs, failures and slow generators: the audit holds."""
    run = config(
        driver={"steps": 30, "max_staleness": 2, "max_restarts": 1000},
        generate={"workers": 6, "request_timeout_s": 50},
        simulate={
            "death_rate": 0.02, "fail_rate": 0.05, "hang_rate": 0.01, "slow_rate": 0.3,
            "restart_s": 5,
        },
    )  # fmt: skip
    outcome = simulate(run, tmp_path / "ledger.sqlite")
    assert outcome.restarts > 0 and outcome.retries > 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {n}}}\n' for n in range(1, 31)))
    report = audit(tmp_path / "ledger.sqlite", metrics)
    assert report.holds, report.findings
    assert max(outcome.ages) <= 2


def test_waste_is_what_the_ledger_says_it_is(tmp_path):
    """Running three steps ahead of a bound of 1 behind a slow learner: groups get too old."""
    run = config(driver={"steps": 15, "max_staleness": 1, "lead": 4}, simulate={"learn_s": 20.0})
    outcome = simulate(run, tmp_path / "ledger.sqlite")
    with open_to_read(tmp_path / "ledger.sqlite") as db:
        thrown = db.execute(
            "SELECT sum(s.tokens) FROM samples s JOIN attempts a ON a.idx = s.idx AND "
            "a.attempt = s.attempt WHERE a.ended = 'dropped'"
        ).fetchone()[0]
    assert outcome.wasted_tokens == thrown > 0
    assert simulate(config()).wasted_tokens == 0


def test_what_was_simulated_is_found_again_by_the_fit(tmp_path):
    """A run simulated with known durations; the fit reads them off its ledger and metrics."""
    truth = {
        "iteration_s": 0.02, "sequence_s": 0.001, "learn_s": 0.2, "learn_token_s": 0.002,
        "score_s": 0.05, "score_token_s": 1e-4, "publish_s": 0.05, "load_s": 0.15, "jitter": 0.0,
    }  # fmt: skip
    run = config(driver={"steps": 30, "max_staleness": 2}, generate={"workers": 1}, simulate=truth)
    outcome, rows = simulate(run, tmp_path / "ledger.sqlite"), []
    rows = outcome.rows
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": n, **row}) + "\n" for n, row in rows))
    model = fitted(tmp_path / "ledger.sqlite", metrics, run).model
    assert model.iteration_s == pytest.approx(0.02, rel=0.25)
    assert model.sequence_s == pytest.approx(0.001, rel=0.25)
    assert model.learn_s == pytest.approx(0.2, rel=0.05)
    assert model.learn_token_s == pytest.approx(0.002, rel=0.05)
    assert (model.publish_s, model.load_s) == pytest.approx((0.05, 0.15), rel=0.05)
    again = simulate(run.model_copy(update={"simulate": model}))
    assert again.samples_per_second == pytest.approx(outcome.samples_per_second, rel=0.05)


def test_jitter_is_of_all_that_a_step_takes():
    """As the fit measures it, also where nothing is but tokens."""
    shape = {"learn_s": 0.0, "learn_token_s": 0.01, "jitter": 0.3, "length_sigma": 0.0}
    outcome = simulate(config(driver={"steps": 300}, simulate=shape))
    seconds = [math.log(time_of(row, "learn")) for _, row in outcome.rows]
    assert statistics.stdev(seconds) == pytest.approx(0.3, rel=0.2)


def test_publishing_is_work():
    busy = {"learn_s": 1.0, "learn_token_s": 0.0, "publish_s": 2.0, "other_s": 0.0}
    outcome = simulate(config(driver={"steps": 20}, simulate=busy))
    idle, step = (
        sum(time_of(row, name) for _, row in outcome.rows) for name in ("idle_learner", "step")
    )
    assert outcome.idle["learner"] == pytest.approx(idle / step, abs=0.05)


@pytest.mark.parametrize("longest", [40, 80])
def test_lengths_of_another_run_end_where_this_one_cuts(longest):
    drawn = {"lengths": (200, 300)}
    outcome = simulate(config(generate={"max_new_tokens": longest}, simulate=drawn))
    assert outcome.tokens_per_second == pytest.approx(longest * outcome.samples_per_second)


def test_dynamic_sampling_has_nothing_to_drop_here():
    group = {"advantage": {"kind": "group"}}
    outcome = simulate(config(driver={"skip_without_signal": True}, learn=group))
    assert (outcome.steps, outcome.drops) == (12, 0)


def test_a_half_written_last_line_is_left_out(tmp_path):
    run = config(driver={"steps": 6})
    outcome = simulate(run, tmp_path / "ledger.sqlite")
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, **row}) for n, row in outcome.rows]
    metrics.write_text("\n".join(lines) + '\n{"step": 7, "time/le')
    assert fitted(tmp_path / "ledger.sqlite", metrics, run).model.lengths
    assert audit(tmp_path / "ledger.sqlite", metrics).holds


def test_lengths_that_a_resume_rolled_back_are_not_there_twice(tmp_path):
    run = config(driver={"steps": 6})
    outcome = simulate(run, tmp_path / "ledger.sqlite")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": n, **row}) + "\n" for n, row in outcome.rows))
    before = fitted(tmp_path / "ledger.sqlite", metrics, run).model.lengths
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("INSERT INTO attempts (idx, attempt, undone) SELECT idx, 9, 1 FROM attempts")
    db.execute(
        "INSERT INTO samples (idx, attempt, sample, tokens) SELECT idx, 9, sample, 99 FROM samples"
    )
    db.commit()
    db.close()
    assert fitted(tmp_path / "ledger.sqlite", metrics, run).model.lengths == before


def test_a_run_without_times_is_refused(tmp_path):
    simulate(config(driver={"steps": 2}), tmp_path / "ledger.sqlite")
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(NoTimings, match="is this a run directory"):
        fitted(tmp_path / "ledger.sqlite", metrics, config())
    metrics.write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(NoTimings, match="no times of steps"):
        fitted(tmp_path / "ledger.sqlite", metrics, config())
    metrics.write_text('{"step": 1, "time/learn": 1.0}\n' * 3)
    with pytest.raises(NoTimings, match="of an older distrl"):
        fitted(tmp_path / "ledger.sqlite", metrics, config())
