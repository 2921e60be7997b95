"""Dynamic sampling: groups without signal are dropped and exactly refilled."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from distrl.cli.audit import show
from distrl.driver import roll
from distrl.driver.audit import audit
from distrl.driver.errors import DriverError
from distrl.roles import ScoreFailed
from distrl.sim import FakeScorer


class Graded(FakeScorer):
    """The samples of a group differ in reward, but for those of every third prompt."""

    def __init__(self, silent_from: int | None = None) -> None:
        super().__init__("s0")
        self.silent_from = silent_from

    async def score(self, group):
        scored = await super().score(group)
        index, n = group.info.index, len(group.info.lengths)
        silent = index % 3 == 0 or (self.silent_from is not None and index >= self.silent_from)
        rewards = (1.0,) * n if silent else tuple(map(float, range(n)))
        return dataclasses.replace(scored, info=dataclasses.replace(scored.info, rewards=rewards))


def test_groups_without_signal_are_dropped_and_refilled(world, tmp_path):
    run = world(scorers=[Graded()], steps=9, skip_without_signal=True)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    trained = [group.index for group in run.learner.trained]
    batch = run.config.prompts_per_step
    assert len(trained) == 9 * batch, "no step is short of a group"
    assert not [index for index in trained if index % 3 == 0]
    _, last = run.sink.rows[-1]
    assert last["driver/drops"] >= len(trained) / 2 - batch
    assert last["waste/tokens"] > 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step, _ in run.sink.rows))
    report = audit(run.ledger, metrics)
    assert report.holds, report.findings
    assert report.drops.keys() == {roll.SILENT}
    assert report.waste.keys() == {f"dropped: {roll.SILENT}"}


class Lengthy(FakeScorer):
    """The samples of odd prompts are liked differently; all differ in length, which costs."""

    async def score(self, group):
        scored = await super().score(group)
        index, n = group.info.index, len(group.info.lengths)
        liked = tuple(map(float, range(n))) if index % 2 else (1.0,) * n
        overlong = tuple(-0.1 * place for place in range(n))
        info = dataclasses.replace(
            scored.info,
            rewards=tuple(map(sum, zip(liked, overlong, strict=True))),
            parts={"liked": liked, "tokens": tuple(map(float, range(n))), "overlong": overlong},
            merits=liked,
        )
        return dataclasses.replace(scored, info=info)


def test_lengths_are_no_signal(world):
    """DAPO's condition is on what is right; its penalty of length would let all groups pass."""
    run = world(scorers=[Lengthy("s0")], steps=4, skip_without_signal=True).run()
    assert run.learner.trained and all(group.index % 2 for group in run.learner.trained)


def test_they_are_trained_on_where_nobody_asked(world):
    run = world(scorers=[Graded()], steps=3).run()
    assert [group.index for group in run.learner.trained][:4] == [0, 1, 2, 3]


class Broken(FakeScorer):
    """Fails at every group of `from_` on."""

    def __init__(self, from_: int) -> None:
        super().__init__("s0")
        self.from_ = from_

    async def score(self, group):
        scored = await super().score(group)
        if group.info.index >= self.from_:
            raise ScoreFailed("reward 'b' raised KeyError: 'meta'")
        return scored


@pytest.mark.parametrize("from_", [0, 9])
def test_a_reward_that_always_fails_stops_the_run_and_says_why(world, monkeypatch, from_):
    monkeypatch.setattr(roll, "MIN_LOST", 20)
    monkeypatch.setattr(roll, "LOST_BATCHES", 2)
    run = world(scorers=[Broken(from_)], steps=9)
    with pytest.raises(DriverError, match=r"20 groups in a row were given up.*KeyError: 'meta'"):
        run.run()


class Wordy(FakeScorer):
    """Fails at two groups of three, each time in other words."""

    async def score(self, group):
        scored = await super().score(group)
        if index := group.info.index % 3:
            raise ScoreFailed(
                f"reward 'b' (m:{'fg'[index - 1]}) raised KeyError: {group.info.index} "
                f"(m.py, line 3); prompt 'p{group.info.index}'"
            )
        return scored


def test_the_first_failure_and_the_first_drop_of_each_kind_are_told_once(world, tmp_path, caplog):
    run = world(scorers=[Wordy("s0")], steps=6, attempts=2)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    said = [record.getMessage() for record in caplog.records if record.name == roll.__name__]
    again, dropped = ([line for line in said if word in line] for word in ("again", "dropped"))
    assert len(said) == len(again) + len(dropped) == 4
    assert sum(" is tried again " in line and "s0: ScoreFailed: reward" in line for line in said)
    assert sum(" is dropped " in line and "m:f) raised KeyError: 1 (m.py" in line for line in said)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step, _ in run.sink.rows))
    report = audit(run.ledger, metrics)
    kinds = [
        f"dropped: scorer: ScoreFailed: reward 'b' (m:{f}) raised KeyError (m.py, line 3)"
        for f in "fg"
    ]
    assert list(report.waste) == kinds and set(report.examples) == set(kinds)
    assert sum(attempts for attempts, _, _ in report.waste.values()) == sum(report.drops.values())
    assert report.examples[kinds[0]] in report.drops and len(report.drops) > 2
    out = io.StringIO()
    show(report, Console(file=out, width=400))
    assert out.getvalue().count("one of them: scorer: ScoreFailed: reward 'b'") == 2


class BrokenOrSilent(Graded):
    """Fails at every second group, and the others are equal."""

    async def score(self, group):
        scored = await super().score(group)
        if group.info.index % 2:
            raise ScoreFailed("no")
        return scored


def test_groups_that_are_scored_and_dropped_have_come_through(world, monkeypatch):
    monkeypatch.setattr(roll, "MIN_LOST", 20)
    monkeypatch.setattr(roll, "LOST_BATCHES", 2)
    monkeypatch.setattr(roll, "MAX_SILENT", 50)
    run = world(scorers=[BrokenOrSilent(silent_from=0)], steps=9, skip_without_signal=True)
    with pytest.raises(DriverError, match="50 groups in a row had equal rewards"):
        run.run()


def test_a_reward_that_has_nothing_to_say_stops_the_run(world, monkeypatch):
    monkeypatch.setattr(roll, "MAX_SILENT", 20)
    run = world(scorers=[Graded(silent_from=10)], steps=9, skip_without_signal=True)
    with pytest.raises(DriverError, match="20 groups in a row had equal rewards"):
        run.run()
