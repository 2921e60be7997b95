"""The check at consumption, and what is reported of a batch."""

from __future__ import annotations

import pytest

from distrl.driver import StalenessBreach
from distrl.driver.buffer import Landed
from distrl.driver.row import batch_row, staleness_row
from distrl.driver.staleness import StalenessRule, check_ages
from distrl.records import GroupInfo, Parcel, ScoredInfo, VersionSpan


def never(bound):
    return StalenessRule(bound=bound, on_stale=None)


def landed(lengths, rewards, oldest, newest, version, bound=2):
    spans = tuple(
        (
            VersionSpan(version=oldest, start=0, end=1),
            VersionSpan(version=newest, start=1, end=length),
        )
        for length in lengths
    )
    group = GroupInfo(
        index=3,
        prompt_id="p3",
        generator="g1",
        lengths=lengths,
        spans=spans,
        finish_reasons=("stop",) * (len(lengths) - 1) + ("length",),
        nbytes=10,
        seconds=2.0,
    )
    info = ScoredInfo(group=group, rewards=rewards, seconds=0.5)
    parcel = Parcel(info=info, payload=None)
    return Landed(parcel=parcel, bound=bound, admitted_s=1.0, landed_s=4.0, landed_version=version)


def test_the_oldest_token_has_to_be_within_the_bound():
    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=6, bound=3)]
    assert check_ages(batch, 7, never(3)) == [0]
    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=6, bound=2)]
    with pytest.raises(StalenessBreach, match=r"group 3 .* version 4 at a learner of version 7"):
        check_ages(batch, 7, never(2))


def test_a_group_is_held_to_the_bound_that_it_was_admitted_under():
    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=6, bound=3)]
    assert check_ages(batch, 7, never(1)) == [0]
    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=6, bound=1)]
    with pytest.raises(StalenessBreach):
        check_ages(batch, 7, never(3))


def test_masked_tokens_are_counted_and_one_has_to_be_left():
    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=6, bound=1)]
    rule = StalenessRule(bound=1, on_stale="mask")
    assert check_ages(batch, 7, rule) == [2]
    assert rule.masks_below(7) == 6
    assert StalenessRule(bound=1, on_stale="drop").masks_below(7) == 0
    with pytest.raises(StalenessBreach):  # nothing of it is young enough
        check_ages(batch, 8, rule)


@pytest.mark.parametrize(
    ("on_stale", "oldest", "newest", "doomed"),
    [
        (None, 0, 0, False), ("drop", 5, 5, False), ("drop", 4, 9, True), ("mask", 4, 5, False),
        ("mask", 4, 4, True),
    ],
)  # fmt: skip
def test_what_is_given_up_at_version_7_with_a_bound_of_2(on_stale, oldest, newest, doomed):
    assert StalenessRule(bound=2, on_stale=on_stale).dooms(oldest, newest, 7) is doomed


def test_a_token_from_the_future_is_a_breach():
    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=5)]
    with pytest.raises(StalenessBreach, match="has not published"):
        check_ages(batch, 5, never(3))


def test_a_token_is_as_old_as_the_version_that_sampled_it():
    """Also in a group with older ones, and one that is masked has no age."""
    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=5)]
    row = staleness_row(batch, check_ages(batch, 6, never(2)), 6, 2)
    assert row["staleness/hist"] == [6, 0, 2] and row["staleness/max"] == 2
    assert (row["staleness/mean"], row["staleness/in_flight"]) == (4 / 8, 2 / 8)
    assert row["staleness/in_buffer"] == 2 / 8

    batch = [landed((3, 5), (0.0, 1.0), oldest=4, newest=6, version=6, bound=1)]
    masked = check_ages(batch, 7, StalenessRule(bound=1, on_stale="mask"))
    row = staleness_row(batch, masked, 7, 1)
    assert row["staleness/hist"] == [0, 6] and row["staleness/masked_tokens"] == 2
    assert (row["staleness/max"], row["staleness/mean"]) == (1, 1)


def test_rows_by_hand():
    batch = [
        landed((1, 3), (0.0, 1.0), oldest=4, newest=4, version=4),
        landed((6, 6), (2.0, 5.0), oldest=6, newest=6, version=6),
    ]
    row = staleness_row(batch, check_ages(batch, 6, never(2)), 6, 2)
    assert row == {
        "staleness/bound": 2,
        "staleness/max": 2,
        "staleness/mean": 0.5,  # 4 tokens of age 2, 12 of age 0
        "staleness/hist": [12, 0, 4],
        "staleness/in_flight": 0.0,
        "staleness/in_buffer": 0.5,
        "staleness/masked_tokens": 0,
    }
    row = batch_row(batch, consumed_s=5.0)
    assert row["reward/mean"] == 2.0
    assert row["reward/std"] == pytest.approx(3.5**0.5)
    assert row["rollout/length_mean"] == 4.0
    assert row["rollout/truncated_fraction"] == 0.5
    assert (row["time/generate"], row["time/score"]) == (2.0, 0.5)
    assert (row["time/in_flight"], row["time/in_buffer"]) == (3.0, 1.0)
