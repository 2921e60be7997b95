"""From known durations to a run, from the run to durations, and from these to what it foretells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrl.cli.options import merged
from distrl.config import Config
from distrl.driver.ledger_file import open_to_read
from distrl.sim import fit
from distrl.sim.engine import Pace
from distrl.sim.pace import replayed
from distrl.sim.simulate import simulate

A, B = 0.01, 0.0003
"""Seconds of an iteration, and those that a sequence adds: the defaults."""

QUICK = {"learn_s": 0.01, "learn_token_s": 1e-5}


def config(**sections: Any) -> Config:
    base = {"driver": {"steps": 8, "max_staleness": 1, "prompts_per_step": 16}}
    return Config.model_validate(merged(base, sections))


def rate(run: Config, **simulated: Any) -> float:
    return simulate(run.model_copy(update=simulated)).samples_per_second


def run_of(folder: Path, run: Config) -> tuple[Path, Path]:
    """The ledger and the metrics of a run with these durations."""
    ledger, metrics = folder / "ledger.sqlite", folder / "metrics.jsonl"
    rows = simulate(run, ledger).rows
    metrics.write_text("".join(json.dumps({"step": n, **row}) + "\n" for n, row in rows))
    return ledger, metrics


QUEUED = {"driver": {"prompts_per_step": 32}, "generate": {"max_num_seqs": 16}}
LOCKSTEP = {"driver": {"max_staleness": 0}, "simulate": QUICK}
BOUND_4 = {"driver": {"prompts_per_step": 32, "max_staleness": 4}, "simulate": QUICK}


@pytest.mark.parametrize(
    ("made_with", "others"),
    [
        (QUEUED, []),
        ({"driver": {"prompts_per_step": 128, "steps": 5}}, []),
        (BOUND_4, []),
        (LOCKSTEP, [{"generate": {"workers": 4}}, {"driver": {"max_staleness": 4}}]),
    ],
)
def test_a_run_foretells_itself_and_others(tmp_path, made_with, others):
    model = fit.fitted(*run_of(tmp_path, config(**made_with)), config(**made_with)).model
    for other in [{}, *others]:
        run = config(**merged(made_with, other))
        assert rate(run, simulate=model) == pytest.approx(rate(run), rel=0.15)


def test_a_replay_at_the_true_pace_takes_what_the_run_took(tmp_path):
    """Queue, weights that were taken on, and groups that began together, included."""
    run = config(**QUEUED, simulate=QUICK)
    ledger, metrics = run_of(tmp_path, run)
    with open_to_read(ledger) as db:
        found, learned = fit._groups(db), fit._learned(db)
    groups = sorted(fit._engines_groups(found, learned), key=lambda group: group.index)
    stops = fit._stops(fit._steps(metrics), learned)
    assert len(stops) == 8
    seconds, _ = replayed(groups, stops, Pace(iteration_s=A, sequence_s=B, max_seqs=16))
    assert seconds == pytest.approx(np.array([group.seconds for group in groups]), rel=1e-6)


def test_where_all_ran_in_the_same_company_it_is_told(tmp_path):
    """Equal lengths in lockstep: nobody can say what of an iteration grows with its sequences."""
    run = config(driver={"max_staleness": 0}, simulate={"length_sigma": 0, **QUICK})
    found = fit.fitted(*run_of(tmp_path, run), run)
    assert "a short run with driver.max_staleness=1" in found.doubt
    sequences = 16 * 4
    assert found.model.iteration_s == pytest.approx(found.model.sequence_s * sequences, rel=0.05)
    assert found.model.iteration_s * 2 == pytest.approx(A + B * sequences, rel=0.02)
    assert rate(run, simulate=found.model) == pytest.approx(rate(run), rel=0.15)


def test_as_that_line_says_a_run_one_step_ahead_tells_them_apart(tmp_path):
    run = config(simulate={"length_sigma": 0, **QUICK})
    found = fit.fitted(*run_of(tmp_path, run), run)
    assert not found.doubt
    pace = (found.model.iteration_s, found.model.sequence_s)
    assert pace == pytest.approx((A, B), rel=0.05)
