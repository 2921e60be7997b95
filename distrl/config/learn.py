"""The section of the learner. Its parts can be combined freely; a preset is one combination.

What is named by `kind` is either built in or of the form `module:function`, which is how an
algorithm of one's own comes in (`learn/advantages.py` and `learn/objectives.py` say what such a
function is given and answers).
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distrl.config.base import ConfigError, Section

ADVANTAGES = ("gae", "group", "returns")
OBJECTIVES = ("clip", "sequence", "capped_weight", "kl_penalty", "policy_gradient")

CLIP_BOUNDS = {"sequence": (3e-4, 4e-4), "capped_weight": (1.0, 4.0)}
"""Of the objectives whose ratios are not a token's (Zheng et al. 2025, section 5), or are bounded
from above alone (MiniMax 2025)."""


def _known(kind: str, built_in: tuple[str, ...], field: str) -> str:
    if kind not in built_in and not re.fullmatch(r"[\w.]+:\w+", kind):
        raise ConfigError(
            f"{field}={kind!r}: choose one of {', '.join(built_in)}, or name a function of your "
            "own as module:function"
        )
    return kind


class AdvantageConfig(Section):
    """How much better a response was than expected, and than what."""

    kind: str = Field(
        default="gae",
        description="gae: by a critic (PPO, A2C); group: against the prompt's other samples (GRPO, "
        "RLOO); returns: rewards to come (REINFORCE); or module:function",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="gae, returns: discount a token")
    lam: float = Field(
        default=0.95, ge=0, le=1, description="gae: 1 trusts returns alone, 0 the critic alone"
    )
    baseline: Literal["mean", "leave_one_out", "none"] = Field(
        default="mean", description="group: what a sample's reward is held against"
    )
    scale: Literal["std", "none"] = Field(
        default="std", description="group: divide by the group's deviation (GRPO), or do not"
    )
    whiten: bool = Field(default=True, description="bring the batch to mean 0 and variance 1")
    whiten_rewards: bool = Field(
        default=False, description="gae: scale rewards to variance 1 first; their mean stays"
    )

    _check_kind = field_validator("kind")(
        lambda kind: _known(kind, ADVANTAGES, "learn.advantage.kind")
    )

    @model_validator(mode="after")
    def _check(self) -> AdvantageConfig:
        if self.kind == "group" and self.baseline == "none" and self.scale == "std":
            raise ConfigError(
                "learn.advantage.scale=std without a baseline divides by next to nothing where a "
                "group's rewards are all equal, so that group alone is learned from; set "
                "learn.advantage.scale=none, or choose a learn.advantage.baseline"
            )
        if self.kind in ("group", "returns") and self.whiten_rewards:
            raise ConfigError(
                "learn.advantage.whiten_rewards moves each token's reward, and "
                f"learn.advantage.kind={self.kind} adds them up, so a long response would earn "
                "otherwise than a short one; set learn.advantage.whiten_rewards=false"
            )
        return self

    @property
    def learns_from_equal_rewards(self) -> bool:
        """Whether a group of equal rewards teaches anything: it does not where it is its own
        baseline. Of a function of one's own only its author knows, who is believed: False."""
        if self.kind == "group":
            return self.baseline == "none"
        return self.kind in ADVANTAGES


class ObjectiveConfig(Section):
    """What the policy's update minimises."""

    kind: str = Field(
        default="clip",
        description="clip: PPO; sequence: GSPO, by its form for tokens; capped_weight: CISPO; "
        "kl_penalty: PPO with a KL price instead of a clip; policy_gradient: REINFORCE, A2C; or "
        "module:function",
    )
    clip_low: float = Field(
        default=0.2,
        ge=0,
        description="a ratio may fall to 1 - this (GSPO: 3e-4, CISPO: 1 unless set)",
    )
    clip_high: float = Field(
        default=0.2,
        ge=0,
        description="a ratio may rise to 1 + this (GSPO: 4e-4, CISPO: 4 unless set)",
    )
    dual_clip: float | None = Field(
        default=None, gt=1, description="clip: bound of the ratio where the advantage is negative"
    )
    penalty: float = Field(
        default=1.0, gt=0, description="kl_penalty: price of a nat between old and new policy"
    )
    penalty_target: float | None = Field(
        default=None,
        gt=0,
        description="kl_penalty: nats a token to settle at, by doubling and halving the price",
    )
    aggregate: Literal["token", "sequence", "constant"] = Field(
        default="token",
        description="token: mean over tokens; sequence: over sequences of their mean (GRPO); "
        "constant: sum over tokens by generate.max_new_tokens (Dr. GRPO)",
    )
    entropy_bonus: float = Field(
        default=0.0, ge=0, description="worth of a nat of entropy, in the loss"
    )
    target_kl: float | None = Field(
        default=None,
        gt=0,
        description="a step's remaining epochs and minibatches are left out once the policy is "
        "this many nats a token from where the step began",
    )

    _check_kind = field_validator("kind")(
        lambda kind: _known(kind, OBJECTIVES, "learn.objective.kind")
    )

    @model_validator(mode="before")
    @classmethod
    def _bounds_of_its_paper(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") in CLIP_BOUNDS:
            low, high = CLIP_BOUNDS[values["kind"]]
            return {"clip_low": low, "clip_high": high} | values
        return values

    @property
    def has_clip(self) -> bool:
        """Whether the clip bounds anything; a function of one's own may use it."""
        return self.kind not in ("kl_penalty", "policy_gradient")


class OffPolicyConfig(Section):
    """What is done about tokens that an older policy sampled."""

    anchor: Literal["proximal", "behaviour"] = Field(
        default="proximal",
        description="the policy that ratios are taken from: the learner's before the step "
        "(decoupled PPO), or the one that sampled (PPO as it was)",
    )
    weight: Literal["token", "sequence", "geometric", "none"] = Field(
        default="token", description="importance of the proximal over the behaviour policy"
    )
    cap: float = Field(default=2.0, gt=0, description="largest weight")
    floor: float = Field(default=0.0, ge=0, description="smallest weight")
    reject: bool = Field(
        default=False, description="what is beyond cap and floor weighs 0 instead of being cut"
    )

    @model_validator(mode="after")
    def _check(self) -> OffPolicyConfig:
        if self.floor > self.cap:
            raise ConfigError(f"off_policy.floor={self.floor} is above off_policy.cap={self.cap}")
        if self.reject and self.weight == "none":
            raise ConfigError(
                "learn.off_policy.reject leaves out what weighs too much or too little, and "
                "learn.off_policy.weight=none weighs nothing; set it to token, sequence or "
                "geometric, or learn.off_policy.reject=false"
            )
        if self.reject and not self.floor <= 1 <= self.cap:
            raise ConfigError(
                f"learn.off_policy.reject with floor={self.floor:g} and cap={self.cap:g} leaves "
                "out every token of the present policy, as these weigh 1; set the two around 1"
            )
        return self


class ValueConfig(Section):
    """The critic, where advantages need one."""

    start: Literal["reward_model", "policy"] = Field(
        default="reward_model",
        description="what it starts from; policy: the policy's body with a new head",
    )
    trunk: Literal["separate", "shared"] = Field(
        default="separate", description="shared: one more head on the policy, trained with it"
    )
    clip: float | None = Field(
        default=0.2,
        gt=0,
        description="largest move of a value that its loss rewards; None: no bound",
    )
    coef: float = Field(
        default=0.1, gt=0, description="shared: weight of the value loss beside the policy's"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="first steps in which the critic alone learns"
    )


class KLConfig(Section):
    """The leash: what leaving the SFT policy costs."""

    place: Literal["reward", "loss"] = Field(
        default="reward",
        description="reward: from each token's reward (InstructGPT); loss: beside the "
        "objective (GRPO)",
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="loss: estimator of a token's KL (Schulman 2020); k1 "
        "has no gradient there, so with a price it is refused",
    )
    kind: Literal["fixed", "adaptive", "linear"] = Field(
        default="fixed",
        description="adaptive: the price follows the measured KL (Ziegler et al. 2019); linear: "
        "it goes from coef to final over the run",
    )
    coef: float = Field(default=0.05, ge=0, description="price of a nat of KL to the SFT policy")
    final: float = Field(default=0.0, ge=0, description="linear: the price at the run's end")
    target: float = Field(default=6.0, gt=0, description="adaptive: nats a response to settle at")
    horizon: int = Field(
        default=10_000,
        ge=1,
        description="adaptive: samples within which the price moves by a fifth at most",
    )
    watch: bool = Field(
        default=True,
        description="measure the KL to the SFT policy even where it costs nothing",
    )

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        costs = self.coef > 0 or (self.kind == "linear" and self.final > 0)
        if self.place == "loss" and self.estimator == "k1" and costs:
            raise ConfigError(
                "learn.kl.estimator=k1 in the loss holds nothing back: its expected gradient is 0 "
                "on the policy's own samples; set learn.kl.estimator to k2 or k3, or "
                "learn.kl.place=reward, where k1 is right"
            )
        if self.kind == "adaptive" and not self.coef:
            raise ConfigError(
                "learn.kl.kind=adaptive multiplies the price that it starts from, and "
                "learn.kl.coef=0 stays 0 for ever; start from 0.05 or so"
            )
        return self

    @property
    def used(self) -> bool:
        """Whether anybody asks for the reference's log-probabilities."""
        return self.watch or self.kind != "fixed" or self.coef > 0


class PretrainConfig(Section):
    """PPO-ptx: the language-modelling gradient mixed in (Ouyang et al. 2022, eq. 2)."""

    coef: float = Field(
        default=0.0, ge=0, description="gamma, the weight of its loss a token; 0: none"
    )
    source: str | None = Field(
        default=None,
        description="a .jsonl, .parquet or Hugging Face dataset folder with plain text in "
        "data.response_column, a fifth of it held out by hash; empty: the SFT examples",
    )
    sequences: int = Field(
        default=8, ge=1, description="texts of each optimizer step, in order and round"
    )


class LoRAConfig(Section):
    """Low-rank adapters, trained instead of the policy's own weights."""

    rank: int = Field(default=0, ge=0, description="columns of the adapters; 0: none")
    alpha: int = Field(default=32, ge=1, description="they are scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the layers that get one",
    )


class LearnConfig(Section):
    """The learner: policy optimisation on scored rollouts."""

    cpus: float = Field(default=1, ge=0, description="CPU cores of each of the learner's ranks")
    gpus: float = Field(default=0, ge=0, description="GPUs of each of the learner's ranks")
    ranks: int = Field(
        default=1,
        ge=1,
        description="processes that share the learner's work, each with a part of every weight "
        "(FSDP2)",
    )
    rank_timeout_s: float = Field(
        default=600, gt=0, description="how long one rank waits for another, seconds"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of forward and backward passes; what is trained, and the sums of gradients, "
        "are float32 in any case",
    )
    packing: bool = Field(
        default=True,
        description="read sequences end to end, without pads, where the model's kind allows it",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="keep each layer's input alone and compute the rest again on the way back: "
        "a third more time, far less memory",
    )
    compile: bool = Field(
        default=False,
        description="compile each layer (torch.compile): a fifth faster on a CPU and half as fast "
        "again on a GPU, after the first steps, which take a minute longer; needs a C++ compiler",
    )
    offload: bool = Field(
        default=False,
        description="weights, gradients and moments wait in the CPU's memory (GPUs only)",
    )
    lr: float = Field(
        default=3e-4,
        gt=0,
        description="policy's peak learning rate; with model.path, 2e-6 unless set",
    )
    critic_lr: float = Field(
        default=6e-4,
        gt=0,
        description="critic's peak learning rate, not used with learn.value.trunk=shared; with "
        "model.path, 5e-6 unless set",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="course of both learning rates after the warm-up"
    )
    schedule_floor: float = Field(
        default=0.1, ge=0, le=1, description="cosine: share of the peak that is left at the end"
    )
    warmup_steps: int = Field(
        default=2, ge=0, description="first steps of each network, in which its rate rises"
    )
    epochs: int = Field(default=1, ge=1, description="passes over a batch")
    minibatches: int = Field(default=2, ge=1, description="optimizer steps a pass")
    micro_tokens: int = Field(
        default=2048,
        ge=16,
        description="tokens of a forward-backward pass, pads included; on a GPU as "
        "many as its memory holds",
    )
    grad_clip: float | None = Field(
        default=1.0, gt=0, description="largest norm of each gradient; None: no bound"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay (AdamW)")
    adam_betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="decay of Adam's two moments"
    )
    adam_eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon")
    adam_epsilon_in: Literal["torch", "tf"] = Field(
        default="torch",
        description="tf: epsilon beside the uncorrected second moment, as in the OpenAI recipes; "
        "their 1e-5 bites far harder there while gradients are small",
    )
    adam_bits: Literal[8, 32] = Field(
        default=32,
        description="8: Adam's moments take a quarter of the memory, but for embeddings (torchao); "
        "the step is compiled, which needs a C++ compiler on a CPU",
    )
    trust_engine_logprobs: bool = Field(
        default=False,
        description="tokens of the present weights keep the engine's log-probabilities as the "
        "proximal ones; a sixteenth is computed all the same, to check them",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of an average of the policy's weights (with learn.lora of the adapters' "
        "factors, each by itself), exported in its place",
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
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    off_policy: OffPolicyConfig = OffPolicyConfig()
    value: ValueConfig = ValueConfig()
    kl: KLConfig = KLConfig()
    pretrain: PretrainConfig = PretrainConfig()
    lora: LoRAConfig = LoRAConfig()

    @field_validator("adam_betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"learn.adam_betas={betas}: each keeps a share from 0 to below 1")
        return betas

    @model_validator(mode="after")
    def _check(self) -> LearnConfig:
        off, kind = self.off_policy, self.objective.kind
        if off.anchor == "behaviour" and kind == "policy_gradient":
            raise ConfigError(
                "learn.objective.kind=policy_gradient takes no ratios, so with "
                "learn.off_policy.anchor=behaviour nothing would be done about tokens that an "
                "older policy sampled; set learn.off_policy.anchor=proximal, and "
                "learn.off_policy.weight=token to weigh them"
            )
        if off.anchor == "behaviour" and off.weight != "none":
            raise ConfigError(
                "learn.off_policy.anchor=behaviour takes its ratios from the policy that sampled, "
                "so there is nothing left to weight; set learn.off_policy.weight=none"
            )
        if kind == "sequence" and self.objective.aggregate != "sequence":
            raise ConfigError(
                "learn.objective.kind=sequence (GSPO) is a mean over sequences; set "
                "learn.objective.aggregate=sequence"
            )
        if self.adam_bits == 8 and self.adam_epsilon_in == "tf":
            raise ConfigError(
                "learn.adam_bits=8 is torchao's AdamW, whose epsilon is where torch has it; set "
                "learn.adam_epsilon_in=torch"
            )
        shared = self.has_critic and self.value.trunk == "shared"
        if shared and self.lora.rank:
            raise ConfigError(
                "learn.lora freezes the policy's body, so a critic cannot share it; set "
                "learn.value.trunk=separate"
            )
        if self.offload and not self.gpus:
            raise ConfigError(
                "learn.offload moves a GPU's weights into the CPU's memory, and learn.gpus=0: they "
                "are there already; set learn.offload=false"
            )
        if self.ranks > 1 and self.gpus not in (0, 1):
            raise ConfigError(
                f"learn.gpus={self.gpus:g} is of each of the {self.ranks} ranks, and a rank "
                "computes on one; set it to 1, or to 0 for CPUs"
            )
        if self.record and not self.replayable:
            raise ConfigError(
                "learn.record keeps batches for a replay to the bit, which takes a learner of one "
                "process in float32, and Adam of 32 bits; set learn.record=false"
            )
        if shared and self.value.start != "policy":
            raise ConfigError(
                "learn.value.trunk=shared puts the critic's head on the policy, so it cannot start "
                "from the reward model; set learn.value.start=policy"
            )
        return self

    @property
    def spread(self) -> bool:
        """Whether the networks are handled by FSDP2: spread over ranks, or in two precisions."""
        return self.ranks > 1 or self.dtype != "float32" or self.offload

    @property
    def replayable(self) -> bool:
        """Whether the same batches give the same weights to the bit, through a resume too: moments
        of 8 bits are rounded once more when they are read back."""
        return not self.spread and self.adam_bits == 32

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a critic. An algorithm of one's own does without."""
        return self.advantage.kind == "gae"
