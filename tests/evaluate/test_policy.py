"""A tiny real model on both sides of the KL; a scripted generator and scorer."""

from __future__ import annotations

import asyncio
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from distrl.evaluate import compare, evaluate_policy, print_report, write_json
from distrl.evaluate.kl import response_kl
from distrl.records import (
    GroupInfo,
    Parcel,
    Prompt,
    Rollout,
    Sample,
    Score,
    ScoredInfo,
    ScoredRollout,
    VersionSpan,
)
from distrl.roles import ScoreFailed

VOCAB = 40


def make_policy(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("policies")
    return make_policy(folder / "before", 1), make_policy(folder / "after", 2)


def prompt_of(index: int) -> Prompt:
    rng = np.random.default_rng(index)
    ids = rng.integers(VOCAB, size=2 + index % 4).astype(np.int32)
    return Prompt(
        index=index, epoch=0, prompt_id=f"p{index}", text=f"prompt {index}", token_ids=ids
    )


def rollout_of(prompt: Prompt, word: str = " good", samples: int = 2) -> Rollout:
    rng = np.random.default_rng(100 + prompt.index)
    lengths = rng.integers(1, 9, size=samples)
    return Rollout(
        prompt=prompt,
        generator="g",
        samples=tuple(
            Sample(
                text=word * int(n),
                token_ids=rng.integers(VOCAB, size=n).astype(np.int32),
                logprobs=np.zeros(n, np.float32),
                spans=(VersionSpan(version=0, start=0, end=int(n)),),
                finish_reason="stop" if n < 8 else "length",
            )
            for n in lengths
        ),
    )


class Generator:
    name = "g"

    def __init__(self, word: str) -> None:
        self.word = word

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        await asyncio.sleep(0.001 * (5 - prompt.index % 5))  # they come back out of order
        rollout = rollout_of(prompt, self.word)
        return Parcel(info=GroupInfo.of(rollout, 0.1), payload=rollout)

    async def hold(self, groups: int) -> None: ...
    async def load_weights(self, weights) -> None: ...
    async def restart(self) -> None: ...
    async def close(self) -> None: ...


class Scorer:
    """Scores by length; `far` hands out an awaitable, as a cluster's reference is."""

    name = "s"

    def __init__(self, *, far: bool = False, fail: bool = False) -> None:
        self.far, self.fail = far, fail

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        if self.fail:
            raise ScoreFailed("no")
        rollout: Rollout = group.payload
        scores = tuple(
            Score(value=2.0 * len(s.token_ids), parts={"length": float(len(s.token_ids))})
            for s in rollout.samples
        )
        scored = ScoredRollout(rollout=rollout, scores=scores)
        info = ScoredInfo(group=group.info, rewards=tuple(s.value for s in scores), seconds=0.1)
        return Parcel(info=info, payload=later(scored) if self.far else scored)

    async def restart(self) -> None: ...
    async def close(self) -> None: ...


async def later(value):
    return value


PROMPTS = [prompt_of(i) for i in range(6)]


@cache
def loaded(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def slow_kl(rollout: Rollout, sample: Sample, policy: Path, reference: Path, temperature: float):
    """One sequence at a time, without padding or batches."""
    ids = torch.tensor(np.concatenate([rollout.prompt.token_ids, sample.token_ids])).long()
    total = 0.0
    for folder, sign in ((policy, 1), (reference, -1)):
        with torch.no_grad():
            logits = loaded(folder)(input_ids=ids[None]).logits[0]
        logprobs = (logits / temperature).log_softmax(-1)
        for place in range(len(rollout.prompt.token_ids), len(ids)):
            total += sign * float(logprobs[place - 1, ids[place]])
    return total


@pytest.mark.parametrize("batch_tokens", [2, 16, 4096])
def test_kl_is_that_of_the_slow_obvious_loop(policies, batch_tokens):
    before, after = policies
    rollouts = [rollout_of(prompt) for prompt in PROMPTS]
    kl = response_kl(rollouts, after, before, temperature=0.7, batch_tokens=batch_tokens)
    expected = [[slow_kl(r, s, after, before, 0.7) for s in r.samples] for r in rollouts]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(kl, expected, atol=1e-4)


def test_kl_of_a_policy_to_itself_is_zero(policies):
    rollouts = [rollout_of(prompt) for prompt in PROMPTS]
    kl = response_kl(rollouts, policies[0], policies[0], temperature=1.0, batch_tokens=4096)
    np.testing.assert_array_equal(kl, np.zeros((6, 2)))


@pytest.mark.parametrize("far", [False, True])
async def test_rows_are_in_the_prompts_order_and_complete(policies, far):
    before, after = policies
    evaluation = await evaluate_policy(
        "PPO", after, before, Generator(" good"), Scorer(far=far), PROMPTS, judge=len, temperature=1
    )
    assert evaluation.prompt_ids == [p.prompt_id for p in PROMPTS]
    assert evaluation.column("reward").shape == (6, 2)
    rollout = rollout_of(PROMPTS[3])
    row, sample = evaluation.rows[3 * 2 + 1], rollout.samples[1]
    assert (row.prompt_id, row.sample, row.response) == ("p3", 1, sample.text)
    assert row.reward == 2.0 * len(sample.token_ids) == 2.0 * row.length
    assert row.parts == {"length": row.length}
    assert row.judge == len("prompt 3" + sample.text)
    assert row.finish_reason == sample.finish_reason
    assert row.kl == pytest.approx(slow_kl(rollout, sample, after, before, 1.0), abs=1e-4)


async def evaluated(policies: tuple[Path, Path], scorer: Scorer, prompts: list[Prompt]):
    before, after = policies
    return await evaluate_policy(
        "x", after, before, Generator(" good"), scorer, prompts, judge=None, temperature=1
    )


async def test_an_evaluation_without_a_reward_is_an_error(policies):
    with pytest.raises(ScoreFailed, match=r"no prompt of \d+ has a reward; the first: no$"):
        await evaluated(policies, Scorer(fail=True), PROMPTS)
    with pytest.raises(ValueError, match="no prompts"):
        await evaluated(policies, Scorer(), [])


class FailsAt(Scorer):
    def __init__(self, *prompt_ids: str) -> None:
        super().__init__()
        self.prompt_ids = prompt_ids

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        if group.info.prompt_id in self.prompt_ids:
            raise ScoreFailed(f"reward [b]'r'[/b] failed on {group.info.prompt_id}")
        return await super().score(group)


async def test_a_prompt_that_a_reward_fails_on_is_left_out_of_both(policies, tmp_path):
    whole = await evaluated(policies, Scorer(), PROMPTS)
    one = await evaluated(policies, FailsAt("p2"), PROMPTS)
    two = await evaluated(policies, FailsAt("p2", "p4"), PROMPTS)
    assert one.failed == {"p2": "reward [b]'r'[/b] failed on p2"}
    assert one.prompt_ids == ["p0", "p1", "p3", "p4", "p5"]
    comparison = compare(one, two, resamples=50)
    assert comparison.before.prompt_ids == comparison.after.prompt_ids == ["p0", "p1", "p3", "p5"]
    kept = whole.column("reward")[[0, 1, 3, 5]]
    assert comparison.measures["reward"].before.value == pytest.approx(kept.mean())
    write_json(comparison, tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert (written["prompts"], written["left_out"]) == (4, 2)
    assert written["left_out_reason"] == "reward [b]'r'[/b] failed on p2"
    out = io.StringIO()
    print_report(comparison, 0, Console(file=out, width=400))
    assert "other: 2 of 6 prompts; the first: reward [b]'r'[/b] failed on p2" in out.getvalue()
    assert compare(whole, whole, resamples=50).left_out_reason is None
    others = await evaluated(policies, FailsAt("p0", "p1", "p3", "p5"), PROMPTS)
    with pytest.raises(ScoreFailed, match=r"no prompt has a reward with both .* on p2"):
        compare(two, others)


async def test_different_prompts_are_not_compared(policies):
    one = await evaluated(policies, Scorer(), PROMPTS)
    two = await evaluated(policies, Scorer(), PROMPTS[::-1])
    with pytest.raises(ValueError, match="different prompts"):
        compare(one, two)
    assert set(compare(one, one).measures) == {"reward", "kl", "length"}  # no judge, no figure
