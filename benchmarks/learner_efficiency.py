"""The learner's useful tokens/s over bare forward and backward passes on perfect batches.

    python benchmarks/learner_efficiency.py [--hidden 256] [--rounds 5] [--threads 2]

Ours: a PPO step (policy, reference and critic read once, then one epoch of minibatches with both
optimizers) on rollouts of mixed length, 12 + 8 to 48 tokens. Bare: as many tokens in batches
without a pad, and on them only the passes that PPO cannot do without, by transformers itself:
one forward of the reference, one of policy and critic on all but the first minibatch, and one
forward and backward of a language-model loss and of a critic's, with the same optimizers; torch's
threads inside its operations, as it comes. The two in turns, random weights. Useful tokens are
those of prompts and responses. Threshold, set before the first run: 0.9.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report

from distrl.config import LearnConfig, ModelConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.learn.allocator import keep_freed_memory
from distrl.learn.experience import Experience
from distrl.learn.learner import PolicyLearner
from distrl.learn.optimizer import optimizer_for
from distrl.learn.spec import LearnerSpec
from distrl.models.heads import ScalarModel
from distrl.models.load import new_llama, save_policy

PROMPT, SHORTEST, LONGEST, SAMPLES = 12, 8, 48, 128
WORDS = "the movie is a good film and the story was not as bad as it could have been"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as scratch:
        keep_freed_memory()
        make_policy(Path(scratch), options.hidden, options.layers)
        learner = PolicyLearner(make_spec(Path(scratch), options.threads))
        ours, bare = _ours(learner), _Bare(learner, options.threads)
        for run in (ours, bare):
            run()  # what is allocated once is not timed
        times: dict[str, list[float]] = {"ours": [], "bare": []}
        for _ in range(options.rounds):
            times["bare"].append(_timed(bare))
            times["ours"].append(_timed(ours))
        learner.close()
    ratios = [b / o for b, o in zip(times["bare"], times["ours"], strict=True)]
    ratio = statistics.median(ratios)
    tokens = int(make_batch(learner.version).lengths_B.sum())
    report(
        "The learner against bare passes",
        {
            "parameters": f"{sum(p.numel() for p in learner.policy.parameters()):,}",
            "useful tokens a step": f"{tokens:,}",
            "ours, tokens/s": f"{tokens / statistics.median(times['ours']):,.0f}",
            "bare, tokens/s": f"{tokens / statistics.median(times['bare']):,.0f}",
            "ours over bare": (
                f"{'ok  ' if ratio >= 0.9 else 'MISS'} {ratio:.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})"
            ),
        },
        f"python benchmarks/learner_efficiency.py --hidden {options.hidden} "
        f"--layers {options.layers} --threads {options.threads}",
    )


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def make_policy(scratch: Path, hidden: int, layers: int) -> None:
    """A new Llama with 2,048 words, in `scratch / "policy"`."""
    tokenizer = train_tokenizer([WORDS] * 8, 2048, 128)
    config = ModelConfig(
        hidden=hidden, heads=max(1, hidden // 32), layers=layers, vocab=2048, context=128
    )
    model = new_llama(config, tokenizer, seed=0)
    model.resize_token_embeddings(2048)
    save_policy(model, tokenizer, scratch / "policy")


def make_spec(scratch: Path, threads: int) -> LearnerSpec:
    """A learner with a critic of its own, from what `make_policy` made."""
    learn = {"minibatches": 2, "record": False, "value": {"start": "policy"}}
    return LearnerSpec(
        policy=scratch / "policy",
        reward_model=None,
        config=LearnConfig.model_validate(learn),
        total_steps=1000,
        total_samples=1000 * SAMPLES,
        longest=LONGEST,
        temperature=1.0,
        seed=0,
        canary_tokens=8,
        scratch=scratch,
        threads=threads,
    )


def make_batch(version: int) -> Experience:
    """Random rollouts of mixed length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, SAMPLES)
    ids = torch.from_numpy(rng.integers(3, 2000, (SAMPLES, PROMPT + lengths.max())))
    places = torch.arange(int(lengths.max()))
    mask = places < torch.from_numpy(lengths)[:, None]
    inside = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None] + PROMPT
    return Experience(
        ids_BL=ids * inside,
        prompt_lengths_B=torch.full((SAMPLES,), PROMPT),
        response_lengths_B=torch.from_numpy(lengths),
        tokens_BT=ids[:, PROMPT:] * mask,
        behaviour_BT=-7.6 * mask,
        versions_BT=torch.full(mask.shape, version),
        scores_B=torch.from_numpy(rng.normal(size=SAMPLES)).float(),
        samples_1=torch.tensor([1]),
    )


def _ours(learner: PolicyLearner) -> Callable[[], Any]:
    return lambda: learner.learn_from(make_batch(learner.version))


class _Bare:
    """The passes alone, on the learner's own networks, in batches of its size."""

    def __init__(self, learner: PolicyLearner, threads: int) -> None:
        self.threads = threads
        self.networks, self.micro_tokens = learner.networks, learner.config.micro_tokens
        tokens = int(make_batch(learner.version).lengths_B.sum())
        width = PROMPT + (SHORTEST + LONGEST) // 2
        rows = round(tokens / width)
        self.batches = torch.randint(3, 2000, (rows, width)).split(rows // 2)
        self.optimizers = [optimizer_for(part, learner.config) for part in self.networks.trained]

    def __call__(self) -> None:
        policy, critic, reference = (
            self.networks.policy, self.networks.critic, self.networks.reference
        )  # fmt: skip
        assert critic is not None and reference is not None
        inner = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        with torch.no_grad():
            for ids in self._micro(torch.cat(self.batches)):
                reference.model(input_ids=ids, use_cache=False)
            for ids in self._micro(torch.cat(self.batches[1:])):
                policy.model(input_ids=ids, use_cache=False)
                _values(critic, ids)
        for batch in self.batches:
            for ids in self._micro(batch):
                policy.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                _values(critic, ids).square().mean().backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        torch.set_num_threads(inner)

    def _micro(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ids.split(max(1, self.micro_tokens // ids.shape[1]))


def _values(critic: ScalarModel, ids: torch.Tensor) -> torch.Tensor:
    return critic.on(critic.body(input_ids=ids, use_cache=False).last_hidden_state)


if __name__ == "__main__":
    main()
