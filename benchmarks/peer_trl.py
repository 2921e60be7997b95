"""PPO's samples/s over those of TRL's PPOTrainer: the same work, on two cores, in float32.

    python benchmarks/peer_trl.py [--workloads a,b] [--rounds 3] [--steps 12]

Workload a: a Llama of 4.3 M parameters, prompts of up to 12 tokens, responses of 48, batches of 64,
2 epochs of 2 minibatches. Workload b: SmolLM2-135M-Instruct, responses of 32, batches of 8, one
epoch of one. Policy, reference, reward model and critic are of one shape, the last two with new
heads. The work is all of a PPO step: generation, reward, reference, updates.

TRL's trainer has two threads and a virtual environment of its own (runs/peer_trl_venv), generates
with transformers, and is spared what takes time only: checkpointing of activations, bfloat16,
smaller batches, saving, evaluation. Ours is `distrl train` as a user would run it: asynchronous, a
step behind (`peer_trl_reward.py` has what that costs), vLLM on one core, learner and scorer on
both, all of them compiled. The two take turns, with the same weights, prompts and seeds. A step's
time runs to the end of the next; the first two are left out, and our last one, which has no
generation beside it. So that all responses are equally long, the token that ends one is never
sampled: workload a's output head is made so, workload b takes one for it that SmolLM2 never writes
(6e-7). "Alone" is what TRL does in a step after generation against our scorer and learner in one
process with two threads.

Thresholds, set before the first run, in samples/s over TRL's. Critic of its own: 1.5, aim 2. Shared
trunk and the engine's log-probabilities trusted (where they are of the present weights: a step
behind there are none, but the pass for values has them at the price of the head): 2.5, aim 3 on
workload a; 1.5, aim 2 on b. --lockstep has generation and learning take turns on both cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import GIB, ROOT, apart, distrl, memory_watch, metrics, middle, report

# torch is loaded in processes of their own alone, so that the memory measured is not this one's.

CORES, WARM_UP, LR, PROMPT, ALONE = 2, 2, 3e-6, 12, 3
WATCH_S = 15
"""Memory is asked for so often: it costs a tenth of a core's second, ours having 13 processes."""
VENV = ROOT / "runs" / "peer_trl_venv"
WORKER = ROOT / "benchmarks" / "peer_trl_worker.py"
SHARED = ("--learn.value.trunk", "shared", "--learn.value.start", "policy")
VARIANTS = {"separate critic": (), "shared, trusted": (*SHARED, "--learn.trust_engine_logprobs")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of a PPO step; `wanted` of each variant: the threshold and the aim."""

    batch: int
    response: int
    epochs: int
    minibatches: int
    steps: int
    rounds: int
    wanted: dict[str, tuple[float, float]]


WORKLOADS = {
    "a": Workload(
        batch=64,
        response=48,
        epochs=2,
        minibatches=2,
        steps=12,
        rounds=3,
        wanted={"separate critic": (1.5, 2), "shared, trusted": (2.5, 3)},
    ),
    "b": Workload(
        batch=8,
        response=32,
        epochs=1,
        minibatches=1,
        steps=8,
        rounds=2,
        wanted={"separate critic": (1.5, 2), "shared, trusted": (1.5, 2)},
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One turn of one side. The folder holds `policy`, `reward-model` and `prompts.json`."""

    name: str
    workload: Workload
    folder: Path
    steps: int
    seed: int
    lockstep: bool

    def samples_s(self, seconds: Sequence[float]) -> float:
        """Of steps that took so long."""
        return self.workload.batch * len(seconds) / sum(seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one turn gave. `parts`: mean seconds of a step, by what they went on."""

    samples_s: float
    step_s: float
    parts: dict[str, float]
    tokens: float
    peak_gib: float
    alone_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", default="a,b")
    parser.add_argument("--rounds", type=int, help="default: 3 for a, 2 for b")
    parser.add_argument("--steps", type=int, help="default: 12 for a, 8 for b; 2 are warm-up")
    parser.add_argument("--lockstep", action="store_true", help="ours without any overlap")
    options = parser.parse_args()
    if options.steps is not None and options.steps <= WARM_UP + 1:
        parser.error(f"--steps {options.steps}: {WARM_UP + 1} are left out, so say more")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    python = trl_environment()
    for name in options.workloads.split(","):
        with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as scratch:
            _measure(name, Path(scratch), python, options)


def trl_environment() -> Path:
    """The interpreter of TRL's virtual environment, made where it is not there."""
    python, note = VENV / "bin" / "python", VENV / "peer_trl.json"
    first = [f"torch=={version('torch').partition('+')[0]}"]
    then = ["trl==1.8.0", f"transformers=={version('transformers')}"]
    if note.exists() and json.loads(note.read_text()) == first + then:
        print(f"TRL: reusing {VENV}", flush=True)
        return python
    print(f"TRL: installing {', '.join(first + then)} into {VENV}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    for words in (first, first + then):
        pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *words]
        subprocess.run(pip, check=True)
    note.write_text(json.dumps(first + then))
    return python


def _measure(name: str, folder: Path, python: Path, options: argparse.Namespace) -> None:
    """All rounds of a workload, and their report."""
    workload, lockstep = WORKLOADS[name], options.lockstep
    rounds, steps = options.rounds or workload.rounds, options.steps or workload.steps
    apart(_prepare, name, folder, workload.batch * steps)
    turns: dict[str, list[Turn]] = {side: [] for side in ("TRL", *VARIANTS)}
    for seed in range(rounds):
        job = Job(
            name=name, workload=workload, folder=folder, steps=steps, seed=seed, lockstep=lockstep
        )
        for side, those in turns.items():
            those.append(_trl(job, python) if side == "TRL" else _ours(job, side))
            print(f"{side}, {those[-1].samples_s:.2f} samples/s; {_parts(those[-1:])}", flush=True)
    report(
        f"PPO against TRL, workload {name}",
        _figures(workload, turns),
        f"python benchmarks/peer_trl.py --workloads {name} --rounds {rounds} --steps {steps}"
        + " --lockstep" * lockstep,
    )


# -- models and prompts, the same for both ---------------------------------------


def _prepare(name: str, folder: Path, samples: int) -> None:
    """Policy, reward model and prompts of a workload, below `folder`."""
    from distrl.config import DataConfig
    from distrl.data.sources import load_prompts
    from distrl.models import ScalarModel
    from distrl.models.load import load_policy, save_policy

    model, tokenizer = _llama() if name == "a" else _smollm2()
    save_policy(model, tokenizer, folder / "policy")
    body = load_policy(folder / "policy")
    ScalarModel.from_policy(body, seed=0).save(folder / "reward-model", tokenizer, {})
    rows = load_prompts(DataConfig(max_prompt_tokens=PROMPT), tokenizer, "train")[:samples]
    lines = [json.dumps({"prompt": row.text}) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "prompts.json").write_text(json.dumps([row.token_ids.tolist() for row in rows]))
    print(f"workload {name}: {model.num_parameters():,} parameters, {len(rows)} prompts")


def _llama() -> tuple[Any, Any]:
    """A small Llama with an output head of its own that neither ends a response nor pads it.

    The embedding's first dimension is 1 for all tokens, 50 deviations above the rest, which no
    layer takes back; the head weighs it -10 for the two marks and 0 for the others.
    """
    import torch

    from distrl.config import ModelConfig
    from distrl.data.reviews import load_reviews
    from distrl.data.tokenizer import train_tokenizer
    from distrl.models.load import new_llama

    tokenizer = train_tokenizer((review.text for review in load_reviews()), 2048, 128)
    config = ModelConfig(hidden=256, heads=8, layers=4, vocab=2048, context=128)
    model = new_llama(config, tokenizer, seed=0)
    model.config.tie_word_embeddings = False
    head = model.lm_head.weight.detach().clone()
    head[:, 0] = 0
    head[[1, 2], 0] = -10  # the ids of the two marks
    model.lm_head.weight = torch.nn.Parameter(head)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
    return model, tokenizer


def _smollm2() -> tuple[Any, Any]:
    """SmolLM2 with two marks for the end and for padding that it never writes."""
    from distrl.data.smollm2 import smollm2_checkpoint
    from distrl.data.tokenizer import load_tokenizer
    from distrl.models.load import load_policy

    tokenizer, model = load_tokenizer(smollm2_checkpoint()), load_policy(smollm2_checkpoint())
    tokenizer.eos_token, tokenizer.pad_token = "<empty_output>", "<file_sep>"
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model, tokenizer


# -- a turn of each side ---------------------------------------------------------


def _trl(job: Job, python: Path) -> Turn:
    path, out = job.folder / "job.json", job.folder / "trl.json"
    sizes = {k: v for k, v in asdict(job.workload).items() if isinstance(v, int)}
    path.write_text(
        json.dumps(
            sizes
            | {"steps": job.steps, "seed": job.seed, "threads": CORES, "lr": LR, "out": str(out)}
            | {"policy": str(job.folder / "policy"), "prompts": str(job.folder / "prompts.json")}
        )
    )
    silent = {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    print(f"$ TRL, workload {job.name}, {job.steps} steps, seed {job.seed}", flush=True)
    with memory_watch(WATCH_S) as memory:
        subprocess.run(
            [python, "-I", WORKER, path],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | silent | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(CORES)},
        )
    measured = json.loads(out.read_text())
    steps, generate = measured["step_s"][WARM_UP:], measured["generate_s"][WARM_UP:]
    rest = [whole - part for whole, part in zip(steps, generate, strict=True)]
    return Turn(
        samples_s=job.samples_s(steps),
        step_s=statistics.fmean(steps),
        parts={"generate": statistics.fmean(generate), "all else": statistics.fmean(rest)},
        tokens=statistics.fmean(measured["tokens"]),
        peak_gib=memory.peak_bytes / GIB,
        alone_s=statistics.median(rest),
    )


def _ours(job: Job, variant: str) -> Turn:
    place = list(VARIANTS).index(variant)
    run = ROOT / "runs" / f"benchmark-peer-trl-{job.name}-{place}-{job.seed}"
    with memory_watch(WATCH_S) as memory:
        distrl("train", "--fresh", "--run.name", run.name, *_words(job), *VARIANTS[variant])
    for large in ("checkpoints", "policy"):
        shutil.rmtree(run / large)
    rows = metrics(run)[WARM_UP : None if job.lockstep else -1]
    names = ("learn", "idle_learner", "sync", "generate", "score", "in_buffer")
    return Turn(
        samples_s=job.samples_s([row["time/step"] for row in rows]),
        step_s=_mean(rows, "time/step"),
        parts={name: _mean(rows, f"time/{name}") for name in names},
        tokens=_mean(rows, "rollout/length_mean"),
        peak_gib=memory.peak_bytes / GIB,
        alone_s=apart(_alone, job, VARIANTS[variant]),
    )


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _words(job: Job) -> list[str]:
    """The recipe of a workload, as words of the command line."""
    workload, folder = job.workload, job.folder
    part = {"name": "model", "model": str(folder / "reward-model")}
    held_out = str(folder / "prompts.jsonl")
    return [
        "--run.seed", str(job.seed), "--model.path", str(folder / "policy"), "--sft.epochs", "0",
        # Named as held-out rows too, a file's rows are all for training.
        "--data.source", held_out, "--data.validation", held_out,
        "--data.max_prompt_tokens", str(PROMPT), "--score.parts", json.dumps([part]),
        "--generate.samples_per_prompt", "1",
        "--generate.max_new_tokens", str(workload.response),
        "--learn.epochs", str(workload.epochs), "--learn.minibatches", str(workload.minibatches),
        "--learn.lr", str(LR), "--learn.critic_lr", str(LR), "--learn.record", "false",
        "--driver.steps", str(job.steps), "--driver.prompts_per_step", str(workload.batch),
        "--driver.checkpoint_every", str(job.steps),
        "--driver.max_staleness", "0" if job.lockstep else "1",
        "--generate.cpus", str(CORES if job.lockstep else 1),
        "--learn.cpus", str(CORES), "--learn.compile",
        "--score.cpus", str(CORES), "--score.compile", "--generate.compile",
        "--no-metrics.wandb",
    ]  # fmt: skip


def _alone(job: Job, words: Sequence[str]) -> float:
    """Seconds of scoring and learning a batch with nothing beside it, the median of some."""
    from distrl.learn.allocator import keep_freed_memory
    from distrl.score.model import ModelReward

    keep_freed_memory()  # as the actors do
    learner = _learner(job, words)
    rewards = ModelReward(
        "model", job.folder / "reward-model", learner.tokenizer, batch_tokens=8192,
        crew=learner.ranks.crew, compile=True,
    )  # fmt: skip
    times = []
    for seed in range(ALONE + 1):
        batch = _experience(job, learner, seed)
        rows = [r[:n].numpy() for r, n in zip(batch.ids_BL, batch.lengths_B, strict=True)]
        began = time.perf_counter()
        rewards.score_ids(rows)
        learner.learn_from(batch)
        times.append(time.perf_counter() - began)
    learner.close()
    return statistics.median(times[1:])


def _learner(job: Job, words: Sequence[str]) -> Any:
    """The learner that `distrl train` would have with these words, with all the cores."""
    from dataclasses import replace

    from distrl.actors.launch import learner_spec
    from distrl.cli.options import parse
    from distrl.learn.learner import PolicyLearner

    config = parse("train", "", [*_words(job), *words]).config
    spec = learner_spec(config, job.folder / "policy", job.folder / "reward-model", job.folder)
    return PolicyLearner(replace(spec, threads=CORES))


def _experience(job: Job, learner: Any, seed: int) -> Any:
    """A batch of prompts with responses at random, as if its present policy had sampled them."""
    from dataclasses import replace

    import torch

    from distrl.learn.experience import Experience
    from distrl.learn.forward import response_logprobs

    count, width = job.workload.batch, job.workload.response
    prompts = json.loads((job.folder / "prompts.json").read_text())
    prompts = [prompts[(seed * count + place) % len(prompts)] for place in range(count)]
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, len(learner.tokenizer), (count, width), generator=random)
    whole = [torch.tensor([*p, *t]) for p, t in zip(prompts, tokens.tolist(), strict=True)]
    batch = Experience(
        ids_BL=torch.nn.utils.rnn.pad_sequence(whole, batch_first=True),
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts]),
        response_lengths_B=torch.full((count,), width),
        tokens_BT=tokens,
        behaviour_BT=torch.zeros(count, width),
        versions_BT=torch.full((count, width), learner.version),
        scores_B=torch.randn(count, generator=random),
        samples_1=torch.tensor([1]),
    )
    with torch.no_grad():
        sampled, _, _ = response_logprobs(learner.networks.policy, batch, 1.0, with_entropy=False)
    return replace(batch, behaviour_BT=sampled)


# -- figures ---------------------------------------------------------------------


def _figures(workload: Workload, turns: dict[str, list[Turn]]) -> dict[str, str]:
    figures = {f"{s}, samples/s": middle([t.samples_s for t in turns[s]]) for s in turns}
    for variant in VARIANTS:
        pairs = list(zip(turns[variant], turns["TRL"], strict=True))
        least, aim = workload.wanted[variant]
        ratios = [ours.samples_s / theirs.samples_s for ours, theirs in pairs]
        figures[f"{variant} over TRL >= {least:g}"] = f"{_ok(ratios, least)} {middle(ratios)}"
        figures[f"{variant} over TRL, aim {aim:g}"] = _ok(ratios, aim)
        alone = [theirs.alone_s / ours.alone_s for ours, theirs in pairs]
        figures[f"{variant}, learner alone over TRL's"] = middle(alone)
    for side, those in turns.items():
        figures[f"{side}, seconds of a step"] = _parts(those)
    for side, those in turns.items():
        figures[f"{side}, tokens a response"] = f"{min(turn.tokens for turn in those):.2f}"
        figures[f"{side}, memory, PSS GiB"] = f"{max(turn.peak_gib for turn in those):.2f}"
    return figures


def _ok(ratios: list[float], threshold: float) -> str:
    return "ok  " if statistics.median(ratios) >= threshold else "MISS"


def _parts(turns: Sequence[Turn]) -> str:
    """Where the time of a step goes; our parts overlap and are of a group, so they do not add."""
    names = turns[0].parts
    means = {name: statistics.median(turn.parts[name] for turn in turns) for name in names}
    listed = ", ".join(f"{name} {seconds:.2f}" for name, seconds in means.items())
    alone = statistics.median(turn.alone_s for turn in turns)
    return f"{statistics.median(turn.step_s for turn in turns):.2f}: {listed}; alone {alone:.2f}"


if __name__ == "__main__":
    main()
