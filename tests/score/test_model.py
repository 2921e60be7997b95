"""Reward models as scorers: batches, their own tokenizer, failures."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from distrl.config import ModelConfig, RewardPart, ScoreConfig
from distrl.data.tokenizer import encode_example, tokenizer_fingerprint, train_tokenizer
from distrl.models import ScalarModel, new_llama
from distrl.models.crew import Crew
from distrl.records import FinishReason, Prompt, Rollout, Sample, VersionSpan
from distrl.roles import ScoreFailed
from distrl.score import ModelReward, RewardSum

CONFIG = ModelConfig(hidden=32, layers=1, heads=1, vocab=300, context=24)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a good film", "a bad film"], 300, 24)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    model = ScalarModel.from_policy(new_llama(CONFIG, tokenizer, 0), 1)
    model.normalise(2.0, 0.5)
    path = tmp_path_factory.mktemp("rm") / "model"
    model.save(path, tokenizer, {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)})
    return path


@pytest.fixture
def reward(folder, tokenizer):
    return ModelReward("rm", folder, tokenizer, batch_tokens=64)


def rollout(tokenizer, prompt: str, *responses: str, finish: FinishReason = "stop") -> Rollout:
    samples = []
    for text in responses:
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids += [tokenizer.eos_token_id] if finish == "stop" else []
        samples.append(
            Sample(
                text=text,
                token_ids=np.array(ids, np.int32),
                logprobs=np.zeros(len(ids), np.float32),
                spans=(VersionSpan(version=0, start=0, end=len(ids)),),
                finish_reason=finish,
            )
        )
    ids, length = encode_example(tokenizer, prompt, "", 24)
    made = Prompt(index=0, epoch=0, prompt_id="p", text=prompt, token_ids=ids[:length])
    return Rollout(prompt=made, samples=tuple(samples), generator="g")


def test_groups_are_batched_together_and_each_gets_its_own(reward, folder, tokenizer):
    groups = [
        rollout(tokenizer, "a good", " film", " and bad film", " x"),
        rollout(tokenizer, "a", " b"),
        rollout(tokenizer, "the very", " good good good", " g"),
    ]
    model = ScalarModel.load(folder)
    for group, scores in zip(groups, reward.scores(groups), strict=True):
        for sample, score in zip(group.samples, scores, strict=True):
            ids = np.concatenate([group.prompt.token_ids, sample.token_ids])
            alone = model.reward(torch.as_tensor(ids[None]).long(), torch.tensor([len(ids)]))
            assert score == pytest.approx(alone.item(), abs=1e-5)


def test_a_crew_shares_the_passes_and_each_sequence_gets_its_own_score(folder, tokenizer, reward):
    crew = Crew(2)
    shared = ModelReward("rm", folder, tokenizer, batch_tokens=8192, crew=crew)
    rows = [np.arange(3, 3 + n, dtype=np.int32) for n in (7, 2, 9, 4, 12, 1, 5, 3)]
    readers: dict[str, int] = {}
    read = shared.model.reward
    both = threading.Barrier(2, timeout=60)  # one thread alone would wait here

    def noted(ids_BT, lengths_B):
        both.wait()
        readers[threading.current_thread().name] = len(ids_BT)
        return read(ids_BT, lengths_B)

    shared.model.reward = noted
    np.testing.assert_allclose(shared.score_ids(rows), reward.score_ids(rows), atol=1e-5)
    assert len(readers) == 2 and sum(readers.values()) == len(rows)
    unlike = [np.arange(3, 3 + n, dtype=np.int32) for n in (1, 1, 1, 1, 12, 12, 12)]
    shared.score_ids(unlike)  # a third pass would wait, and fail
    crew.close()


def test_half_precision_rounds_the_scores_and_keeps_the_head(folder, tokenizer, reward):
    config = ScoreConfig(dtype="bfloat16", parts=(RewardPart(name="rm", model=str(folder)),))
    (half,) = RewardSum.of(config, tokenizer).rewards
    assert isinstance(half, ModelReward)
    assert {weight.dtype for weight in half.model.body.parameters()} == {torch.bfloat16}
    assert half.model.head.weight.dtype == half.model.gain.dtype == torch.float32
    rows = [np.arange(3, 3 + n, dtype=np.int32) for n in (7, 2, 9, 4, 12, 1, 5, 3)]
    gap = np.abs(half.score_ids(rows) - reward.score_ids(rows))
    assert 0 < gap.max() < 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("without_kernel")
def test_a_compiled_reward_model_gives_the_same_scores(folder, tokenizer, reward):
    quick = ModelReward("rm", folder, tokenizer, batch_tokens=64, compile=True)
    rows = [np.arange(3, 3 + n, dtype=np.int32) for n in (7, 2, 9, 4, 12, 1, 5, 3)]
    before = counters["stats"]["unique_graphs"]
    np.testing.assert_allclose(quick.score_ids(rows), reward.score_ids(rows), atol=1e-5)
    assert counters["stats"]["unique_graphs"] > before, "nothing was compiled"


def test_forward_passes_keep_to_the_token_budget(reward, tokenizer, monkeypatch):
    sizes = []
    forward = reward.model.reward

    def noted(ids_BT, lengths_B):
        sizes.append(ids_BT.numel())
        return forward(ids_BT, lengths_B)

    monkeypatch.setattr(reward.model, "reward", noted)
    reward.scores([rollout(tokenizer, "a", *[" film" * k for k in range(1, 9)])] * 4)
    assert 1 < len(sizes) < 32 and max(sizes) <= 64


def test_a_sequence_beyond_the_budget_goes_alone(folder, tokenizer, reward):
    frugal = ModelReward("rm", folder, tokenizer, batch_tokens=16)
    assert frugal._packed
    rows = [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 24, 6)]  # 24: all of the context
    np.testing.assert_allclose(frugal.score_ids(rows), reward.score_ids(rows), atol=1e-5)


def test_a_model_that_reads_pads_has_little_of_them_to_read(folder, tokenizer, monkeypatch):
    monkeypatch.setattr("distrl.score.model.pack", lambda body: False)
    padded, crew = ScalarModel.load(folder), Crew(2)
    reward = ModelReward("rm", folder, tokenizer, batch_tokens=8192, crew=crew)
    read, sizes = reward.model.reward, []

    def noted(ids_BT, lengths_B):
        sizes.append((ids_BT.numel(), int(lengths_B.sum())))
        return read(ids_BT, lengths_B)

    reward.model.reward = noted
    rows = [np.arange(3, 3 + n, dtype=np.int32) for n in (3, 20) * 32]
    scores_N = reward.score_ids(rows)
    crew.close()
    whole, tokens = (sum(counts) for counts in zip(*sizes, strict=True))
    assert tokens == sum(len(row) + 1 for row in rows)
    assert tokens > 0.95 * whole
    alone = torch.tensor([[*rows[0].tolist(), reward._eos]])
    expected = padded.reward(alone, torch.tensor([alone.shape[1]])).item()
    assert scores_N[0] == pytest.approx(expected, abs=1e-5)


def test_a_cut_response_is_read_at_an_end_of_sequence_token(reward, tokenizer):
    cut, ended = (
        reward.scores([rollout(tokenizer, "a", " film", finish=f)]) for f in ("length", "stop")
    )
    assert cut == ended


def test_texts_and_ids_agree(reward, tokenizer):
    whole, _ = encode_example(tokenizer, "a good", " film", 24)
    (scores,) = reward.scores([rollout(tokenizer, "a good", " film")])
    assert reward.score_ids([whole])[0] == pytest.approx(scores[0], abs=1e-6)
    assert reward.score_ids([]).shape == (0,)


def test_another_tokenizer_means_text_is_read_and_said_so_once(folder, tokenizer, caplog):
    policy_tokenizer = train_tokenizer(["quite other words"] * 9, 280, 24)
    with caplog.at_level(logging.WARNING):
        other = ModelReward("rm", folder, policy_tokenizer, batch_tokens=64)
        group = rollout(policy_tokenizer, "a good", " film")
        (scores,) = other.scores([group])
        other.scores([group])
    assert other.re_encodes and len(caplog.records) == 1
    (expected,) = ModelReward("rm", folder, tokenizer, batch_tokens=64).scores(
        [rollout(tokenizer, "a good", " film")]
    )
    assert scores == pytest.approx(expected, abs=1e-6)


def test_a_sequence_beyond_the_context_fails_and_is_no_number(reward, tokenizer):
    (failure,) = reward.scores([rollout(tokenizer, "a", "x" * 40)])
    assert isinstance(failure, ScoreFailed) and "1 to 24 tokens" in str(failure)
    short, long = rollout(tokenizer, "a", " film", " b"), rollout(tokenizer, "a", " b", "x" * 40)
    (first,) = reward.scores([short])
    one, failure, two = reward.scores([short, long, short])
    assert isinstance(failure, ScoreFailed) and isinstance(first, list)
    assert one == pytest.approx(first, abs=1e-5) and two == pytest.approx(first, abs=1e-5)


def test_a_text_beyond_the_context_fails_too_and_is_not_cut(folder, tokenizer, tmp_path):
    """Two responses with one beginning and other ends would have the same score."""
    ScalarModel.load(folder).save(tmp_path / "rm", train_tokenizer(["other words"], 299, 24), {})
    reward = ModelReward("rm", tmp_path / "rm", tokenizer, batch_tokens=64)
    assert reward.re_encodes
    short, long = rollout(tokenizer, "a", " film"), rollout(tokenizer, "a", "x" * 40 + " good")
    fine, failure = reward.scores([short, long])
    assert isinstance(fine, list)
    assert isinstance(failure, ScoreFailed) and "1 to 24 tokens" in str(failure)
    with pytest.raises(ValueError, match="1 to 24 tokens"):
        reward.score_ids([np.arange(25, dtype=np.int32)])


def test_a_column_called_messages_is_not_the_prompt(folder, tokenizer, tmp_path):
    tokenizer_of_its_own = train_tokenizer(["other words"], 299, 24)
    ScalarModel.load(folder).save(tmp_path / "rm", tokenizer_of_its_own, {})
    reward = ModelReward("rm", tmp_path / "rm", tokenizer, batch_tokens=64)
    assert reward.re_encodes
    plain = rollout(tokenizer, "a good", " film")
    meta = {"messages": [{"role": "user", "content": "something else"}]}
    beside = replace(plain, prompt=replace(plain.prompt, meta=meta))
    assert reward.scores([beside]) == reward.scores([plain])


def test_a_score_that_is_not_finite_fails_its_group_alone(reward, tokenizer):
    bad_id = tokenizer.encode("z", add_special_tokens=False)[0]
    with torch.no_grad():
        reward.model.body.embed_tokens.weight[bad_id] = torch.nan
    good, bad = reward.scores([rollout(tokenizer, "a", " film"), rollout(tokenizer, "a", " z")])
    assert isinstance(bad, ScoreFailed) and "not all finite" in str(bad)
    assert np.isfinite(good).all()
