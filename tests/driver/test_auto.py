"""max_staleness=auto: follows the ESS, with hysteresis, and every change has its cause."""

from __future__ import annotations

from itertools import pairwise

import pytest

from distrl.config import DriverConfig
from distrl.driver import Start
from distrl.driver.audit import audit
from distrl.driver.auto import BACK_OFF, MARGIN, BoundController
from distrl.driver.ledger_file import open_to_read
from distrl.sim import FakeGenerator, FakeLearner, fixed

TARGET = 0.9


def controller(start=1, ceiling=4):
    return BoundController(start=start, ceiling=ceiling, target=TARGET)


def steps(control, ess, count):
    """The causes of `count` steps at this ESS; a function of the bound, or a number."""
    value = ess if callable(ess) else lambda bound: ess
    return [cause for _ in range(count) if (cause := control.update(value(control.bound)))]


def test_it_rises_to_the_ceiling_where_nothing_is_lost():
    control = controller()
    causes = steps(control, 1.0, 60)
    assert control.bound == 4 and len(causes) == 3
    assert causes[0].startswith("1 -> 2: ESS 1.000 is above the target 0.9")


def test_it_falls_to_zero_where_all_is_lost():
    control = controller(start=3)
    assert [cause[:6] for cause in steps(control, 0.5, 60)] == ["3 -> 2", "2 -> 1", "1 -> 0"]
    assert control.bound == 0


def test_a_single_outlier_moves_nothing():
    control = controller()
    for _ in range(20):
        assert not steps(control, 0.5, 2) and not steps(control, TARGET + MARGIN / 2, 1)


def test_within_the_margin_it_stays():
    control = controller()
    assert not steps(control, TARGET + MARGIN / 2, 100)


def test_it_settles_below_what_was_too_much():
    """ESS falls with the bound, below the target from 3 on: it settles at 2, and tries 3 seldom."""
    control, at = controller(), []
    for _ in range(400):
        control.update(1.0 - 0.04 * control.bound)
        at.append(control.bound)
    late = at[50:]
    assert max(late) <= 3 and late.count(2) > 0.85 * len(late)
    tries = sum(b == 3 and a == 2 for a, b in pairwise(late))
    assert tries <= 400 // BACK_OFF / 3, "each try bars the next one for longer"


def test_a_run_keeps_its_promise_while_the_bound_moves(world, tmp_path):
    """ESS of the fake falls with the age that the learner saw last."""
    learner = FakeLearner(seconds=fixed(3.0))
    learner._metrics = lambda: {"ppo/ess": 1.0 - 0.04 * learner.trained[-1].age}
    generators = [FakeGenerator(f"g{i}", length=lambda prompt: 20) for i in (0, 1)]
    run = world(
        steps=120, max_staleness="auto", staleness_ceiling=6, ess_target=TARGET, learner=learner,
        generators=generators,
    )  # fmt: skip
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step, _ in run.sink.rows))
    assert audit(run.ledger, metrics).holds
    bounds = run.column("staleness/bound")
    assert all(age <= bound for age, bound in zip(run.column("staleness/max"), bounds, strict=True))
    assert set(bounds[-40:]) <= {2, 3} and run.trained == list(range(480))
    with open_to_read(run.ledger) as db:
        changes = db.execute("SELECT detail FROM events WHERE what = 'max_staleness'").fetchall()
    assert changes and all(" -> " in detail and "ESS" in detail for (detail,) in changes)


def test_a_resumed_run_goes_on_with_the_bound_that_it_had(world):
    first = world(steps=40, max_staleness="auto", staleness_ceiling=3).run()
    state = first.checkpoints.states[40]
    assert state["bound"] == 3, "nothing spoke against it"
    start = Start.from_state(state, first.checkpoints.folder / "step_000040")
    second = world(steps=42, max_staleness="auto", staleness_ceiling=3, start=start).run()
    assert second.column("staleness/bound") == [3, 3]


def test_a_lead_of_its_own_or_a_window_is_refused_with_auto():
    with pytest.raises(ValueError, match=r"leave driver.lead empty"):
        DriverConfig(max_staleness="auto", lead=3)
    with pytest.raises(ValueError, match=r"set driver.window=0"):
        DriverConfig(max_staleness="auto", window=3)
    with pytest.raises(ValueError, match=r"is less than driver.max_staleness=3"):
        DriverConfig(max_staleness=3, lead=2)
    with pytest.raises(ValueError, match=r"leaves fewer slots than a batch"):
        DriverConfig(max_staleness=1, prompts_per_step=4, window=5)
