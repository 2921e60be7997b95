"""Sections of the ring: who generates, who scores, who learns, how weights travel."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distrl.config.base import ConfigError, Section


class GenerateConfig(Section):
    """The generators: vLLM engines that roll prompts out."""

    workers: int = Field(default=1, ge=1, description="generator actors, one vLLM engine each")
    cpus: float = Field(default=1, ge=0, description="CPU cores of each")
    gpus: float = Field(default=0, ge=0, description="GPUs of each (tensor parallel)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="numbers of the engine's weights and arithmetic"
    )
    samples_per_prompt: int = Field(
        default=4, ge=1, description="responses of each prompt (a group)"
    )
    max_new_tokens: int = Field(default=40, ge=1, description="a response is cut here")
    temperature: float = Field(
        default=1.0, gt=0, description="of sampling; log-probabilities are of logits / temperature"
    )
    max_num_seqs: int = Field(
        default=128, ge=1, description="sequences that an engine decodes at once"
    )
    kv_cache_gib: float = Field(default=0.5, gt=0, description="CPU: memory of the KV cache")
    gpu_memory: float = Field(
        default=0.85, gt=0, le=1, description="GPU: share of memory for the engine"
    )
    max_model_len: int | None = Field(
        default=None, ge=8, description="empty: prompt + response, rounded up"
    )
    start_timeout_s: float = Field(
        default=300, gt=0, description="deadline for an actor to come up"
    )
    request_timeout_s: float = Field(
        default=600, gt=0, description="a group that takes longer is lost"
    )


class RewardPart(Section):
    """One part of the reward. Exactly one of `model` and `function`."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="its metric is reward/<name>")
    model: str | None = Field(default=None, description="folder of a trained reward model")
    function: str | None = Field(
        default=None,
        description="'module:function' called with keyword arguments prompt, response, meta",
    )
    weight: float = Field(default=1.0, description="factor in the sum of the parts")

    @model_validator(mode="after")
    def _check(self) -> RewardPart:
        if (self.model is None) == (self.function is None):
            raise ConfigError(f"reward part {self.name!r} needs either model or function")
        if self.function is not None and self.function.count(":") != 1:
            raise ConfigError(
                f"reward function {self.function!r} is not of the form module:function"
            )
        return self


class ScoreConfig(Section):
    """The scorers: what rewards a response."""

    workers: int = Field(default=1, ge=1, description="scorer actors")
    cpus: float = Field(default=0.25, ge=0, description="CPU cores of each")
    gpus: float = Field(default=0, ge=0, description="GPUs of each")
    parts: tuple[RewardPart, ...] = Field(
        default=(), description="empty: the run's own reward model with weight 1"
    )
    missing_eos_penalty: float | None = Field(
        default=None, description="added to the score of a response that was cut by length"
    )
    batch_tokens: int = Field(
        default=8192, ge=16, description="tokens of a reward-model forward pass"
    )
    timeout_s: float = Field(
        default=120, gt=0, description="a group that takes longer is tried again"
    )


class KLConfig(Section):
    """The leash: what leaving the SFT policy costs."""

    kind: Literal["fixed", "adaptive"] = Field(
        default="fixed",
        description="adaptive: the price follows the measured KL (Ziegler et al. 2019)",
    )
    coef: float = Field(
        default=0.05, ge=0, description="price of a nat of KL to the SFT policy, in reward"
    )
    target: float = Field(default=6.0, gt=0, description="adaptive: nats a response to settle at")
    horizon: int = Field(default=10_000, ge=1, description="adaptive: samples to move by about e")


class LearnConfig(Section):
    """The learner: PPO on scored rollouts."""

    algorithm: Literal["ppo"] = Field(default="ppo", description="how the policy is improved")
    cpus: float = Field(default=1, ge=0, description="CPU cores of the learner")
    gpus: float = Field(default=0, ge=0, description="GPUs of the learner")
    lr: float = Field(default=3e-4, gt=0, description="policy's peak learning rate")
    critic_lr: float = Field(default=6e-4, gt=0, description="critic's peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="course of both learning rates after the warm-up"
    )
    warmup_steps: int = Field(default=2, ge=0, description="learner steps of linear warm-up")
    epochs: int = Field(default=1, ge=1, description="passes over a batch")
    minibatches: int = Field(default=2, ge=1, description="optimizer steps a pass")
    micro_tokens: int = Field(
        default=4096, ge=16, description="padded tokens of a forward-backward pass"
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount a token")
    lam: float = Field(
        default=0.95, ge=0, le=1, description="GAE: 1 trusts returns alone, 0 the critic alone"
    )
    clip: float = Field(default=0.2, gt=0, description="probability-ratio clip of PPO")
    value_clip: float | None = Field(
        default=0.2,
        gt=0,
        description="largest move of a value that its loss rewards; None: no bound",
    )
    value_from: Literal["reward_model", "policy"] = Field(
        default="reward_model",
        description="what the critic starts from; policy: its body with a new head",
    )
    whiten_rewards: bool = Field(
        default=False, description="scale rewards to variance 1; their mean stays"
    )
    whiten_advantages: bool = Field(
        default=True, description="bring advantages to mean 0 and variance 1"
    )
    entropy_bonus: float = Field(
        default=0.0, ge=0, description="worth of a nat of entropy, in the loss"
    )
    importance_cap: float = Field(
        default=2.0, gt=0, description="truncation of behaviour-policy weights"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of each gradient")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay (AdamW)")
    adam_betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="decay of Adam's two moments"
    )
    max_skips: int = Field(
        default=3, ge=1, description="non-finite steps in a row before the run stops"
    )
    record: bool | None = Field(
        default=None,
        description="keep every batch for 'distrl replay'; empty: where the policy has at most "
        "20 M parameters",
    )
    record_mib: float = Field(default=256, gt=0, description="a recording ends at this size, MiB")
    kl: KLConfig = KLConfig()


class SyncConfig(Section):
    """How new weights reach the generators, and the proof that they did."""

    transport: Literal["shm"] = Field(
        default="shm",
        description="shm: shared memory on the learner's machine, Ray's object store to others",
    )
    timeout_s: float = Field(default=120, gt=0, description="deadline of every call of a sync")
    canary_tolerance: float = Field(
        default=1e-3,
        gt=0,
        description="largest log-probability gap (nats) on the probe after a sync",
    )
    canary_tokens: int = Field(default=24, ge=2, description="length of the probe")
