"""The learner's useful tokens/s over bare forward and backward passes on perfect batches, and the
share of the device's arithmetic that a step makes use of.

    python benchmarks/learner_efficiency.py [--hidden 256] [--rounds 5] [--threads 2]
    python benchmarks/learner_efficiency.py --shape qwen2.5-0.5b --compile   (a GPU, in bfloat16)

Ours: a PPO step (policy, reference and critic read once, then one epoch of minibatches with both
optimizers) on rollouts of mixed length, 12 + 8 to 48 tokens. Bare: as many tokens as ours reads
(all but the last of each sequence) in batches without a pad, and on them only the passes that PPO
cannot do without, by transformers itself: one forward of the reference, one of policy and critic on
all but the first minibatch, and one forward and backward of a language-model loss and of a
critic's, with the same optimizers; torch's threads inside its operations, as it comes. The two in
turns, random weights. Useful tokens are those of prompts and responses. Threshold, set before the
first run: 0.9.

With --shape the learner alone, over a model of that shape with random weights, on 64 rollouts of
256 + 128 to 768 tokens (--samples, --prompt, --shortest, --longest), in bfloat16 with float32
weights on a GPU where there is one. Model FLOPs (`flops.py`) are those of the same passes; the peak
is what a large matrix product reaches here, and the data sheet's. Aim, set before the first run: 45
% of the latter on Hopper. Memory is torch's on a GPU, the process's on a CPU, at its highest.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import GIB, ok, report
from flops import data_sheet, peak_flops, step_flops
from torch.profiler import DeviceType, ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

from distrl.config import LearnConfig, ModelConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.learn.allocator import keep_freed_memory
from distrl.learn.experience import Experience
from distrl.learn.learner import PolicyLearner
from distrl.learn.optimizer import optimizer_for
from distrl.learn.spec import LearnerSpec, Place
from distrl.models import best_device
from distrl.models.heads import ScalarModel
from distrl.models.load import new_llama, save_policy

WORDS = "the movie is a good film and the story was not as bad as it could have been"
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a batch: sequences, tokens of each prompt, and of the shortest and longest response."""

    samples: int = 128
    prompt: int = 12
    shortest: int = 8
    longest: int = 48


SMALL, LARGE = Sizes(), Sizes(samples=64, prompt=256, shortest=128, longest=768)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--kernels", type=int, default=0, help="with --shape: the longest of a GPU")
    parser.add_argument("--micro_tokens", type=int, default=16_384, help="with --shape")
    for name in ("compile", "checkpoint_activations"):
        parser.add_argument(f"--{name}", action="store_true", help="learn's; with --shape")
    for name, value in (("samples", 64), ("prompt", 256), ("shortest", 128), ("longest", 768)):
        parser.add_argument(f"--{name}", type=int, default=value, help="with --shape")
    options = parser.parse_args()
    if options.kernels and not (options.shape and best_device().type == "cuda"):
        parser.error("--kernels are a GPU's, with --shape")
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as scratch:
        keep_freed_memory()
        if options.shape is None:
            _against_bare_passes(Path(scratch), options)
        else:
            _of_a_shape(Path(scratch), options)


def _against_bare_passes(scratch: Path, options: argparse.Namespace) -> None:
    make_policy(scratch, options.hidden, options.layers)
    learner = PolicyLearner(make_spec(scratch, options.threads))
    ours, bare = _ours(learner, SMALL), _Bare(learner, options.threads)
    for run in (ours, bare):
        run()  # what is allocated once is not timed
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(options.rounds):
        times["bare"].append(_timed(bare))
        times["ours"].append(_timed(ours))
    ratios = [b / o for b, o in zip(times["bare"], times["ours"], strict=True)]
    ratio = statistics.median(ratios)
    tokens = int(make_batch(learner.version).lengths_B.sum())
    figures = {
        "parameters": f"{sum(p.numel() for p in learner.policy.parameters()):,}",
        "useful tokens a step": f"{tokens:,}",
        "ours, tokens/s": f"{tokens / statistics.median(times['ours']):,.0f}",
        "bare, tokens/s": f"{tokens / statistics.median(times['bare']):,.0f}",
        "ours over bare": (
            f"{ok(ratio >= 0.9)} {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        ),
    }
    figures |= _utilisation(learner, SMALL, statistics.median(times["ours"]), options.threads)
    learner.close()
    report(
        "The learner against bare passes",
        figures,
        f"python benchmarks/learner_efficiency.py --hidden {options.hidden} "
        f"--layers {options.layers} --threads {options.threads}",
    )


def _of_a_shape(scratch: Path, options: argparse.Namespace) -> None:
    sizes = Sizes(
        samples=options.samples,
        prompt=options.prompt,
        shortest=options.shortest,
        longest=options.longest,
    )
    tokenizer = train_tokenizer([WORDS] * 8, 2048, 128)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = Qwen2Config.from_dict(SHAPES[options.shape] | ends | {"tie_word_embeddings": True})
    with best_device():  # a CPU alone would take a minute for the random numbers
        model = AutoModelForCausalLM.from_config(shape)
    save_policy(model.cpu(), tokenizer, scratch / "policy")
    del model
    asked = ("micro_tokens", "compile", "checkpoint_activations")
    spec = make_spec(scratch, options.threads, {name: getattr(options, name) for name in asked})
    spec = replace(spec, longest=sizes.longest)
    if best_device().type == "cuda":
        learn = spec.config.model_copy(update={"gpus": 1, "dtype": "bfloat16"})
        place = Place(address=f"127.0.0.1:{_free_port()}")
        spec = replace(spec, config=learn, threads=None, place=place)
    learner = PolicyLearner(spec)
    step = _ours(learner, sizes)
    for _ in range(2):
        step()  # compiled, and what is allocated once
    times = [_timed(step) for _ in range(options.rounds)]
    seconds = statistics.median(times)
    batch = make_batch(learner.version, sizes)
    figures = {
        "parameters": f"{sum(p.numel() for p in learner.policy.parameters()):,}",
        "useful tokens/s": f"{int(batch.lengths_B.sum()) / seconds:,.0f}",
        "seconds a step": f"{seconds:.2f} ({min(times):.2f} to {max(times):.2f})",
    }
    figures |= _utilisation(learner, sizes, seconds, options.threads)
    if options.kernels:
        figures |= _kernels(step, options.kernels)
    learner.close()
    report(f"The learner over {options.shape}", figures, f"python {shlex.join(sys.argv)}")


def _kernels(step: Callable[[], Any], shown: int) -> Mapping[str, Any]:
    """How long a GPU computes of one more step, and at what for the longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as made:
        seconds = _timed(step)
    device = [event for event in made.key_averages() if event.device_type == DeviceType.CUDA]
    device.sort(key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in device) / 1e6
    told = {"the GPU computes": f"{busy:.2f} s of a step's {seconds:.2f}"}
    return told | {
        f"  {event.key[:60]}": f"{event.self_device_time_total / 1e3:.1f} ms, {event.count} times"
        for event in device[:shown]
    }


def _utilisation(
    learner: PolicyLearner, sizes: Sizes, seconds: float, threads: int
) -> Mapping[str, Any]:
    """Model FLOPs over what the device can in that time, and memory beside it."""
    device, batch, config = learner.device, make_batch(learner.version, sizes), learner.config
    flops = step_flops(
        learner.policy,
        batch.lengths_B,
        batch.response_lengths_B,
        epochs=config.epochs,
        minibatches=config.minibatches,
    )
    peak = peak_flops(device, getattr(torch, config.dtype), threads)
    figures = {
        "model FLOPs a step": f"{flops / 1e12:.3g} T",
        "of the device's peak": f"{flops / seconds / peak:.1%} of {peak / 1e12:.3g} TFLOP/s",
    }
    stated = data_sheet(device)
    if stated is not None:
        share = flops / seconds / stated
        figures["of the data sheet's >= 45 %"] = f"{ok(share >= 0.45)} {share:.1%}"
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logits = int(batch.response_lengths_B.sum()) * learner.policy.config.vocab_size * 4
    figures["memory, GiB"] = f"{used / GIB:.2f} (all logits at once would be {logits / GIB:.2f})"
    return figures


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


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


def make_spec(scratch: Path, threads: int, more: Mapping[str, Any] | None = None) -> LearnerSpec:
    """A learner with a critic of its own, from what `make_policy` made; `more` of its section."""
    learn = {"minibatches": 2, "record": False, "value": {"start": "policy"}, **(more or {})}
    return LearnerSpec(
        policy=scratch / "policy",
        reward_model=None,
        config=LearnConfig.model_validate(learn),
        total_steps=1000,
        total_samples=1000 * SMALL.samples,
        longest=SMALL.longest,
        temperature=1.0,
        seed=0,
        canary_tokens=8,
        scratch=scratch,
        threads=threads,
    )


def make_batch(version: int, sizes: Sizes = SMALL) -> Experience:
    """Random rollouts of mixed length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(sizes.shortest, sizes.longest + 1, sizes.samples)
    ids = torch.from_numpy(rng.integers(3, 2000, (sizes.samples, sizes.prompt + lengths.max())))
    places = torch.arange(int(lengths.max()))
    mask = places < torch.from_numpy(lengths)[:, None]
    inside = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None] + sizes.prompt
    return Experience(
        ids_BL=ids * inside,
        prompt_lengths_B=torch.full((sizes.samples,), sizes.prompt),
        response_lengths_B=torch.from_numpy(lengths),
        tokens_BT=ids[:, sizes.prompt :] * mask,
        behaviour_BT=-7.6 * mask,
        versions_BT=torch.full(mask.shape, version),
        scores_B=torch.from_numpy(rng.normal(size=sizes.samples)).float(),
        samples_1=torch.tensor([1]),
    )


def _ours(learner: PolicyLearner, sizes: Sizes) -> Callable[[], Any]:
    return lambda: learner.learn_from(make_batch(learner.version, sizes))


class _Bare:
    """The passes alone, on the learner's own networks, in batches of its size."""

    def __init__(self, learner: PolicyLearner, threads: int) -> None:
        self.threads = threads
        self.networks, self.micro_tokens = learner.networks, learner.config.micro_tokens
        tokens = int((make_batch(learner.version).lengths_B - 1).sum())
        width = SMALL.prompt + (SMALL.shortest + SMALL.longest) // 2 - 1
        rows = round(tokens / width)
        self.batches = torch.randint(3, 2000, (rows, width)).split(-(-rows // 2))
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
