"""Sections of the ring: who generates, who scores, how weights travel. The learner: `learn.py`."""

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
    compile: bool = Field(
        default=False,
        description="CPU: compile the engine's passes (on a GPU they always are): a tenth faster, "
        "and ten seconds more at the start; needs a C++ compiler",
    )
    max_model_len: int | None = Field(default=None, ge=8, description="empty: prompt + response")
    start_timeout_s: float = Field(
        default=300, gt=0, description="deadline for an actor to come up"
    )
    request_timeout_s: float = Field(
        default=600,
        gt=0,
        description="a group that takes longer is lost; an engine that has work, and gives out no "
        "token in so long, is replaced",
    )


RESERVED_PARTS = ("mean", "std", "missing_eos_penalty", "overlong")
"""What reward/<name> means already: the sum's own figures, and its penalties."""


OWN = "own"
"""What a part says for a folder whose reward model is the run's own, wherever the run lies."""


class RewardPart(Section):
    """One part of the reward. Exactly one of `model` and `function`."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="its metric is reward/<name>")
    model: str | None = Field(
        default=None,
        description="folder of a trained reward model, or 'own': the one that this run makes",
    )
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


class OverlongConfig(Section):
    """A penalty that grows with length (DAPO, Yu et al. 2025, eq. 13)."""

    penalty: float = Field(
        default=0.0, ge=0, description="taken off the score at the full length; 0: none"
    )
    start: int = Field(default=32, ge=1, description="tokens of a response that cost nothing")
    full: int = Field(default=40, ge=2, description="tokens from which on all of it is due")

    @model_validator(mode="after")
    def _check(self) -> OverlongConfig:
        if self.full <= self.start:
            raise ConfigError(
                f"score.overlong.full={self.full} must be above score.overlong.start={self.start}"
            )
        return self


class ScoreConfig(Section):
    """The scorers: what rewards a response."""

    workers: int = Field(default=1, ge=1, description="scorer actors")
    cpus: float = Field(default=0.25, ge=0, description="CPU cores of each")
    gpus: float = Field(default=0, ge=0, description="GPUs of each")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the reward models' weights and arithmetic; their heads keep float32",
    )
    parts: tuple[RewardPart, ...] = Field(
        default=(),
        description="each has a name, a model (a folder) or a function (module:function), and a "
        """weight (1 if not given), as '[{"name": "short", "function": "my_rewards:brevity"}]'; """
        "empty: the run's own reward model with weight 1",
    )
    missing_eos_penalty: float | None = Field(
        default=None,
        description="added to the score of a response that was cut by length, so 0 or below",
    )
    missing_eos_score: float | None = Field(
        default=None,
        description="takes the place of that score (the EOS trick of Huang et al. 2024)",
    )
    batch_tokens: int = Field(
        default=8192, ge=16, description="tokens of a reward-model forward pass"
    )
    compile: bool = Field(
        default=False,
        description="compile each layer of the reward models: a little faster on a CPU after ten "
        "seconds at the start; needs a C++ compiler",
    )
    timeout_s: float = Field(
        default=120,
        gt=0,
        description="deadline of the reward models on all groups that wait, and of the functions "
        "on one group; that is dropped where they hang, and the scorer replaced",
    )
    overlong: OverlongConfig = OverlongConfig()

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ConfigError(
                "score.missing_eos_penalty is added to the score of a cut response and "
                "score.missing_eos_score takes its place: leave one of them empty"
            )
        if (self.missing_eos_penalty or 0.0) > 0:
            raise ConfigError(
                f"score.missing_eos_penalty={self.missing_eos_penalty:g} is added to the score of "
                "a response that was cut by length, so it would pay for being cut; give a number "
                "below 0, -1.0 say"
            )
        names = [part.name for part in self.parts]
        for name in names:
            if name in RESERVED_PARTS or names.count(name) > 1:
                raise ConfigError(
                    f"score.parts: the name {name!r} is taken, as each part has its own metric "
                    f"reward/<name> ({', '.join(RESERVED_PARTS)} are distrl's); choose another"
                )
        return self


class SyncConfig(Section):
    """How new weights reach the generators, and the proof that they did."""

    transport: Literal["shm", "gloo", "nccl"] = Field(
        default="shm",
        description="shm: shared memory on the learner's machine, Ray's object store to others; "
        "gloo: sent by the learner over TCP; nccl: sent from GPU to GPU, by vLLM's own back end "
        "(not tried on GPUs yet)",
    )
    timeout_s: float = Field(
        default=120,
        gt=0,
        description="deadline of a sync on each side: to publish, to meet, to send or receive, to "
        "prove it",
    )
    canary_tolerance: float = Field(
        default=2e-4,
        gt=0,
        description="largest log-probability gap (nats) on the probe after a sync",
    )
    canary_tokens: int = Field(default=8, ge=2, description="length of the probe")
