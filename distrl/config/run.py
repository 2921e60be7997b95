"""Sections of a run as a whole: driver, metrics, cluster, simulation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distrl.config.base import ConfigError, Section


class DriverConfig(Section):
    """What runs when: steps, staleness, retries, checkpoints."""

    steps: int = Field(default=40, ge=1, description="learner steps of the whole run")
    prompts_per_step: int = Field(default=32, ge=1, description="groups of a learner step")
    max_staleness: int | Literal["auto"] = Field(
        default=1,
        description="hard bound on a token's age, in versions; auto: moved by the data's "
        "effective sample size",
    )
    staleness_ceiling: int = Field(default=8, ge=0, description="auto: largest bound")
    ess_target: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="auto: effective sample size (share) below which the bound is lowered",
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
    skip_without_signal: bool = Field(
        default=False,
        description="drop groups whose rewards are all equal, which teach nothing where a group is "
        "its own baseline, and take others for them (DAPO's dynamic sampling)",
    )
    attempts: int = Field(default=3, ge=1, description="tries of a group before it is dropped")
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="restarts of each worker before it is given up; the run goes on with the "
        "others, and ends when all of a role are gone",
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
        default=1800,
        gt=0,
        description="no progress for this long stops the run; longer than a hanging engine takes "
        "to be missed (generate.request_timeout_s) and replaced (generate.start_timeout_s)",
    )
    ledger: bool = Field(
        default=True, description="keep ledger.sqlite: what became of every prompt (distrl audit)"
    )

    @property
    def steps_ahead(self) -> int:
        """Learner steps that generation may run ahead, at most."""
        return self.largest_bound if self.lead is None else self.lead

    @property
    def largest_bound(self) -> int:
        """`max_staleness`, or what it may become."""
        return self.staleness_ceiling if self.max_staleness == "auto" else self.max_staleness

    @property
    def slots(self) -> int:
        """Groups that may be under way at once (`driver/admission.py` says why)."""
        return (self.steps_ahead + 1) * self.prompts_per_step - self.window

    @property
    def lockstep(self) -> bool:
        """Generate a batch, learn from it, and only then the next."""
        return self.steps_ahead == 0

    def slots_at(self, bound: int) -> int:
        """Slots while the bound is `bound`: all of them, unless it is moved."""
        return self.slots - (self.largest_bound - bound) * self.prompts_per_step

    @model_validator(mode="after")
    def _check(self) -> DriverConfig:
        if self.largest_bound < 0:
            raise ConfigError(f"driver.max_staleness={self.max_staleness} must be 0 or more")
        if self.max_staleness == "auto" and self.lead is not None:
            raise ConfigError(
                "driver.max_staleness=auto moves the lead itself; leave driver.lead empty"
            )
        if self.max_staleness == "auto" and self.window:
            raise ConfigError(
                "driver.window needs a fixed driver.max_staleness: with auto the bound may fall to "
                "0, where nothing may be overtaken; set driver.window=0"
            )
        if self.steps_ahead < self.largest_bound:
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


class MetricsConfig(Section):
    """What a run says of itself."""

    wandb: bool = Field(default=True, description="log to W&B; offline where there is no key")
    wandb_project: str = Field(
        default="distrl", description="W&B project that the run is logged to"
    )
    table_every: int = Field(default=10, ge=1, description="steps between tables of rollouts")
    table_rows: int = Field(default=8, ge=0, description="rollouts in a table")


class ClusterConfig(Section):
    """The Ray cluster that the actors live on."""

    address: str | None = Field(
        default=None,
        description="a Ray cluster that is there ('auto' or host:port); empty: start one here",
    )
    placement_timeout_s: float = Field(
        default=60, gt=0, description="how long to wait for others to free what is needed"
    )


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
