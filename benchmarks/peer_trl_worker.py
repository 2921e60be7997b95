"""TRL's side of `peer_trl.py` and `peer_trl_reward.py`: PPO steps by its trainer, each timed.

    runs/peer_trl_venv/bin/python -I benchmarks/peer_trl_worker.py JOB.json

Runs in TRL's own virtual environment and knows nothing of distrl. The job names the policy's
folder, the prompts and the sizes, and a reward model where rewards are to mean something; what was
measured is written where its `out` says. What is left of a step when generation is taken off:
reference, reward and values, then the updates.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging
from trl.experimental.ppo import (  # pyright: ignore[reportMissingImports]
    PPOConfig,
    PPOTrainer,
    ppo_trainer,
)


class Clock(TrainerCallback):
    """Seconds of each step and of the generation in it, the tokens of its responses, their scores
    and their KL to the reference."""

    def __init__(self) -> None:
        self.last = 0.0
        self.step_s: list[float] = []
        self.generate_s: list[float] = []
        self.tokens: list[int] = []
        self.scores: list[float] = []
        self.kl: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.step_s.append(now - self.last)
        self.last = now

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "objective/scores" in logs:
            self.scores.append(logs["objective/scores"])
            self.kl.append(logs["objective/kl"])

    def around(self, generation: Callable[..., Any]) -> Callable[..., Any]:
        """`generation` with its seconds noted."""

        def timed(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
            began = time.perf_counter()
            answer = generation(model, queries, *rest)
            self.generate_s.append(time.perf_counter() - began)
            self.tokens.append(answer[0].shape[1] - queries.shape[1])
            return answer

        return timed


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    clock = Clock()
    trainer = _trainer(job, clock)
    ppo_trainer.batch_generation = clock.around(ppo_trainer.batch_generation)
    ppo_trainer.get_reward = _ending(ppo_trainer.get_reward, trainer)
    trainer.train()
    measured = {name: value for name, value in vars(clock).items() if isinstance(value, list)}
    Path(job["out"]).write_text(json.dumps(measured))


def _trainer(job: dict[str, Any], clock: Clock) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    prompts = json.loads(Path(job["prompts"]).read_text())
    return PPOTrainer(
        args=_config(job),
        processing_class=tokenizer,
        model=_language_model(job, use_cache=True),
        ref_model=_language_model(job, use_cache=False),
        reward_model=_scalar_model(job),
        value_model=_scalar_model(job),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[clock],
    )


def _language_model(job: dict[str, Any], *, use_cache: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)
    model.config.use_cache = use_cache
    return model


def _scalar_model(job: dict[str, Any]) -> Any:
    """The reward model of the job; where it has none, the policy's body with a random head."""
    model = AutoModelForSequenceClassification.from_pretrained(
        job.get("reward_model", job["policy"]), num_labels=1, dtype=torch.float32
    )
    model.config.use_cache = False
    if "reward_bias" in job:
        head = torch.nn.Linear(model.score.in_features, 1)
        head.weight = model.score.weight
        torch.nn.init.constant_(head.bias, job["reward_bias"])
        model.score = head
    return model


def _ending(get_reward: Callable[..., Any], trainer: Any) -> Callable[..., Any]:
    """`get_reward`, but the reward model reads an end of sequence after a response without one."""
    end = trainer.processing_class.eos_token_id

    def ending(model: Any, ids: torch.Tensor, pad: int, context: int) -> Any:
        if model is trainer.reward_model:
            ids = torch.cat([ids, ids.new_full((len(ids), 1), pad)], 1)
            places = torch.arange(ids.shape[1])
            after = torch.where(ids[:, context:] == pad, places[context:], ids.shape[1]).amin(1)
            ended = ids.gather(1, after.unsqueeze(1) - 1) == end
            ids = ids.scatter(1, after.unsqueeze(1), torch.where(ended, pad, end))
        return get_reward(model, ids, pad, context)

    return ending


def _config(job: dict[str, Any]) -> Any:
    """A whole batch at once wherever TRL would cut it; nothing saved, evaluated or shown.

    The accumulation stays 1: TRL would leave out optimizer steps with more, as its minibatches
    already are of the size that is wanted.
    """
    batch = job["batch"]
    return PPOConfig(
        output_dir=str(Path(job["out"]).parent / "trl"),
        seed=job["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        dataloader_pin_memory=False,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        total_episodes=batch * job["steps"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=batch,
        num_ppo_epochs=job["epochs"],
        num_mini_batches=job["minibatches"],
        response_length=job["response"],
        temperature=1.0,
        stop_token="eos" if "reward_model" in job else None,
        missing_eos_penalty=None,
        kl_coef=job.get("kl_coef", 0.05),
        adam_beta1=job.get("adam_betas", (0.9, 0.999))[0],
        adam_beta2=job.get("adam_betas", (0.9, 0.999))[1],
    )


if __name__ == "__main__":
    main()
