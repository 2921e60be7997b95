"""From records to tensors: everything in its place, and cut without loss."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import torch

from distrl.learn.experience import to_experience
from distrl.records import RolloutBatch, VersionSpan


def pairs(groups):
    """(prompt ids, sample, score) of each sequence, in order."""
    return [
        (group.rollout.prompt.token_ids, sample, score)
        for group in groups
        for sample, score in zip(group.rollout.samples, group.scores, strict=True)
    ]


def test_every_token_is_in_its_place(make_groups):
    groups = make_groups(seed=1)
    batch = to_experience(RolloutBatch(groups=tuple(groups)))
    assert len(batch) == 12
    for row, (prompt, sample, score) in enumerate(pairs(groups)):
        p, t = len(prompt), len(sample.token_ids)
        assert batch.ids_BL[row].tolist()[: p + t] == [*prompt, *sample.token_ids]
        assert not batch.ids_BL[row, p + t :].any()
        assert batch.tokens_BT[row, :t].tolist() == sample.token_ids.tolist()
        assert batch.behaviour_BT[row, :t].tolist() == sample.logprobs.tolist()
        assert (batch.prompt_lengths_B[row], batch.response_lengths_B[row]) == (p, t)
        assert batch.lengths_B[row] == p + t
        assert batch.scores_B[row] == np.float32(score.value)
        assert batch.mask_BT[row].tolist() == [True] * t + [False] * (batch.mask_BT.shape[1] - t)


def test_versions_follow_their_spans(make_groups):
    (group,) = make_groups(seed=1, groups=1)
    samples = list(group.rollout.samples)
    n = len(samples[1].token_ids)
    assert n > 1
    spans = (VersionSpan(version=4, start=0, end=1), VersionSpan(version=6, start=1, end=n))
    samples[1] = dataclasses.replace(samples[1], spans=spans)
    rollout = dataclasses.replace(group.rollout, samples=tuple(samples))
    batch = to_experience(RolloutBatch(groups=(dataclasses.replace(group, rollout=rollout),)))
    assert batch.versions_BT[1, :n].tolist() == [4] + [6] * (n - 1)


def test_the_mask_is_of_lengths_and_never_of_ids(make_groups):
    """The padding id is 0 and the end is 2; both occur as tokens, and count."""
    groups = make_groups(seed=3, groups=40)
    batch = to_experience(RolloutBatch(groups=tuple(groups)))
    assert (batch.tokens_BT[batch.mask_BT] == 0).any()
    assert int(batch.mask_BT.sum()) == sum(len(s.token_ids) for _, s, _ in pairs(groups))


def test_rows_are_cut_to_the_longest_among_them(make_groups):
    batch = to_experience(RolloutBatch(groups=tuple(make_groups(seed=2))))
    index = torch.tensor([7, 2])
    part = batch.rows(index)
    assert part.ids_BL.shape[1] == int(batch.lengths_B[index].max())
    assert part.tokens_BT.shape[1] == int(batch.response_lengths_B[index].max())
    for row, old in enumerate(index.tolist()):
        t, n = int(batch.response_lengths_B[old]), int(batch.lengths_B[old])
        assert torch.equal(part.ids_BL[row, :n], batch.ids_BL[old, :n])
        assert torch.equal(part.behaviour_BT[row, :t], batch.behaviour_BT[old, :t])
        assert part.scores_B[row] == batch.scores_B[old]


def test_arrays_out_of_an_object_store_are_taken_without_a_word(make_groups):
    """Ray hands out read-only views; torch warns of those where it would share them."""
    groups = make_groups(seed=1)
    for prompt, sample, _ in pairs(groups):
        for array in (prompt, sample.token_ids, sample.logprobs):
            array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_experience(RolloutBatch(groups=tuple(groups)))
