"""Running ahead of the bound, and overtaking: what is dropped, masked, waited for."""

from __future__ import annotations

import asyncio

from distrl.driver.audit import audit
from distrl.driver.ledger_file import open_to_read
from distrl.sim import FakeGenerator, FakeLearner, Faults, fixed, log_normal


def ahead(world, **settings):
    """A slow learner and quick generators that may run three steps ahead of a bound of 1."""
    return world(
        learner=FakeLearner(seconds=fixed(10.0)), max_staleness=1, lead=3, steps=12, **settings
    )


def audited(run, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step, _ in run.sink.rows))
    report = audit(run.ledger, metrics)
    assert report.holds, report.findings
    return report


def test_what_got_too_old_is_dropped_and_exactly_refilled(world, tmp_path):
    run = ahead(world)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    assert max(run.ages) <= 1
    assert len(run.trained) == 12 * 4 == len(set(run.trained))
    dropped = set(range(run.source.cursor)) - set(run.trained)
    report = audited(run, tmp_path)
    assert sum(report.drops.values()) == len(dropped) > 0
    assert all(reason.startswith("too old") for reason in report.drops)
    waste = report.waste
    assert sum(tokens for _, tokens, _ in waste.values()) == run.column("waste/tokens")[-1] > 0


def test_what_cannot_make_it_is_given_up_before_the_engines_pause(world, tmp_path):
    """Groups that take 35 s outlive the bound in flight; their engines are free at the change."""
    generators = [FakeGenerator("g0", seconds=fixed(1.0)), FakeGenerator("g1", seconds=fixed(35.0))]
    run = ahead(world, generators=generators)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    audited(run, tmp_path)
    assert max(run.ages) <= 1
    with open_to_read(run.ledger) as db:
        ended = db.execute(
            "SELECT ended_s FROM attempts WHERE reason = 'too old' AND generated_s IS NULL"
        ).fetchall()
        learned = [row[0] for row in db.execute("SELECT learned_s FROM steps")]
    assert ended and all(any(abs(at - s) < 1e-6 for s in learned) for (at,) in ended)


def test_a_group_is_as_old_as_the_weights_of_its_own_generator(world, tmp_path):
    """One takes on new weights at once, the other much later: what is tried again on the quick one
    meanwhile is of the new version."""
    generators = [
        FakeGenerator(
            name,
            seconds=log_normal(2.0, 0.5, seed),
            load_seconds=fixed(load_s),
            faults=Faults(rate=0.15, seed=seed + 1),
        )
        for name, load_s, seed in (("quick", 0.05, 2), ("slow", 1.9, 3))
    ]
    run = world(
        generators=generators,
        learner=FakeLearner(seconds=fixed(2.0)),
        max_staleness=1,
        lead=3,
        steps=30,
    )
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    served = sorted((at_s, index, held) for g in generators for index, at_s, held in g.served)
    held = {index: version for _, index, version in served}
    with open_to_read(run.ledger) as db:
        given_up = db.execute(
            "SELECT idx, ended_s FROM attempts WHERE reason = 'too old' AND generated_s IS NULL"
        ).fetchall()
        steps = db.execute("SELECT version_after, learned_s FROM steps").fetchall()
    assert given_up
    for index, ended_s in given_up:
        newest = max(version for version, at_s in steps if at_s <= ended_s + 1e-9)
        assert held[index] < newest - 1


def test_what_waits_for_a_generator_does_not_grow_old(world, tmp_path):
    """The only generator is away for 60 s while the learner lives on its buffer: those who wait
    for it have no token yet, so none of them is given up."""
    generators = [FakeGenerator("g0", restart_seconds=fixed(60.0), faults=Faults(load={4: "die"}))]
    run = ahead(world, generators=generators)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    audited(run, tmp_path)
    with open_to_read(run.ledger) as db:
        waited = "SELECT count(*) FROM attempts WHERE reason = 'too old' AND generated_s IS NULL"
        assert db.execute(waited).fetchone() == (0,)


def test_masked_tokens_stay_out_and_the_group_stays_in(world, tmp_path):
    """A group of 25 s has tokens of three versions: its old ones are left out."""
    generators = [FakeGenerator("g0", seconds=fixed(25.0), length=lambda prompt: 50)]
    run = ahead(world, generators=generators, on_stale="mask")
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    assert max(run.ages) <= 1
    masked = sum(run.column("staleness/masked_tokens"))
    audited(run, tmp_path)
    with open_to_read(run.ledger) as db:
        kept = db.execute("SELECT sum(masked) FROM trainings").fetchone()[0]
    assert kept == masked > 0


def test_the_audit_finds_a_token_that_should_have_been_masked(world, tmp_path):
    import sqlite3

    test_masked_tokens_stay_out_and_the_group_stays_in(world, tmp_path)
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("UPDATE trainings SET masked = masked - 1 WHERE masked > 0")
    db.commit()
    db.close()
    report = audit(tmp_path / "ledger.sqlite", tmp_path / "metrics.jsonl")
    assert [f.promise for f in report.findings if not f.holds] == [
        "no token was older than the staleness bound at its gradient"
    ]


def straggling(world, window):
    """Group 5 takes 60 s, all others 1 s; the learner 2 s."""
    run = world(
        steps=16, max_staleness=3, window=window, learner=FakeLearner(seconds=fixed(2.0)),
        generators=[FakeGenerator("g0")],
    )  # fmt: skip
    generate = run.generators[0].generate

    async def sometimes_slow(prompt):
        if prompt.index == 5:
            await asyncio.sleep(59)
        return await generate(prompt)

    run.generators[0].generate = sometimes_slow
    return run.run()


def test_a_straggler_is_overtaken_within_the_window_and_the_bound(world):
    strict, loose = straggling(world, 0), straggling(world, 8)
    assert strict.trained == list(range(64))
    before = loose.trained.index(5)
    assert 8 < before <= 5 + 8, "at most eight overtake it, then it is waited for"
    assert sorted(loose.trained) == list(range(64)) and max(loose.ages) <= 3
    waiting = [sum(run.column("time/idle_learner")[:2]) for run in (strict, loose)]
    assert waiting[1] < waiting[0] / 2


def test_a_window_is_resumed_without_doing_anything_twice(world):
    """Stopped while group 5 is still under way, with others trained beyond it."""
    first = world(
        steps=6, max_staleness=3, window=8, learner=FakeLearner(seconds=fixed(2.0)),
        generators=[FakeGenerator("g0")],
    )  # fmt: skip
    generate = first.generators[0].generate

    async def never_five(prompt):
        if prompt.index == 5:
            await asyncio.sleep(1e5)
        return await generate(prompt)

    first.generators[0].generate = never_five

    async def stop(driver):
        await asyncio.sleep(20)
        driver.stop()

    first.run(stop)
    step = first.summary.step
    state = first.checkpoints.states[step]
    assert state["cursor"] == 5 and state["ahead"] == [6, 7, 8, 9, 10, 11, 12]
    from distrl.driver import Start

    start = Start.from_state(state, first.checkpoints.folder / f"step_{step:06d}")
    second = world(steps=6, max_staleness=3, window=8, start=start).run()
    assert sorted(first.trained + second.trained) == list(range(24))
