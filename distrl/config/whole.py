"""The whole recipe, and what must fit across sections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from distrl.config.base import ConfigError, Section
from distrl.config.learn import LearnConfig
from distrl.config.ring import GenerateConfig, ScoreConfig, SyncConfig
from distrl.config.run import ClusterConfig, DriverConfig, MetricsConfig, SimulateConfig
from distrl.config.stages import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)

HALF_PRECISION_GAP = 0.02
"""Nats: engine and learner are no closer where one of them computes in half precision."""

TRAINED_MODEL_RATES = {
    "sft": {"lr": 2e-5},
    "reward_model": {"lr": 3e-5},
    "learn": {"lr": 2e-6, "critic_lr": 5e-6},
}
"""Peak learning rates for a model that `model.path` names, unless set: a hundredth of what suits a
small one that knows nothing yet. Those of the preset `smollm2`, and a usual one of SFT."""

PRESETS = Path(__file__).parent.parent / "presets"


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

    @model_validator(mode="before")
    @classmethod
    def _rates_of_a_trained_model(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or model.get("path") is None:
            return values
        given = {name: values.get(name, {}) for name in TRAINED_MODEL_RATES}
        return values | {
            name: TRAINED_MODEL_RATES[name] | section
            for name, section in given.items()
            if isinstance(section, dict)
        }

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.samples_per_step % self.learn.minibatches:
            raise ConfigError(
                f"learn.minibatches={self.learn.minibatches} does not divide the "
                f"{self.samples_per_step} samples of a step (driver.prompts_per_step x "
                f"generate.samples_per_prompt); choose one of {_divisors(self.samples_per_step)}"
            )
        rows = self.samples_per_step // self.learn.minibatches
        if self.learn.ranks > rows:
            raise ConfigError(
                f"learn.ranks={self.learn.ranks} cannot share the {rows} samples of an optimizer "
                "step (driver.prompts_per_step x generate.samples_per_prompt by "
                f"learn.minibatches); use at most {rows} ranks, or fewer minibatches"
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
        if self.model.path is None and max(self.sft_tokens, self.reward_model_tokens) > (
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
        longest = self.engine_tokens
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
        if self.sync.transport == "nccl" and min(self.learn.gpus, self.generate.gpus) < 1:
            raise ConfigError(
                "sync.transport=nccl goes from a GPU of the learner's to other GPUs, and "
                f"learn.gpus={self.learn.gpus:g}, generate.gpus={self.generate.gpus:g}; give each "
                "at least 1, or set sync.transport=gloo (over TCP) or shm (through memory)"
            )
        halves = [
            f"{name}={dtype}"
            for name, dtype in (
                ("learn.dtype", self.learn.dtype),
                ("generate.dtype", self.generate.dtype),
            )
            if dtype != "float32"
        ]
        if halves and self.sync.canary_tolerance < HALF_PRECISION_GAP:
            raise ConfigError(
                f"{' and '.join(halves)} rounds log-probabilities to some hundredths of a nat, so "
                f"every sync would fail at sync.canary_tolerance={self.sync.canary_tolerance:g}; "
                "set it to 0.1 or so: weights that did not arrive are nats off"
            )
        kl = self.learn.kl
        if kl.kind == "adaptive" and self.samples_per_step >= 5 * kl.horizon:
            raise ConfigError(
                f"learn.kl.horizon={kl.horizon} is too short for the {self.samples_per_step} "
                "samples of a step: one step could take the price of KL to zero for good; raise "
                f"it to at least {self.samples_per_step // 5 + 1}"
            )
        return self

    @model_validator(mode="after")
    def _check_deadlines(self) -> Config:
        stall_s = self.driver.stall_timeout_s
        for name, limit_s in (
            ("generate.request_timeout_s", self.generate.request_timeout_s),
            ("score.timeout_s", self.score.timeout_s),
        ):
            if limit_s >= stall_s:
                raise ConfigError(
                    f"driver.stall_timeout_s={stall_s:g} would end the run before {name}="
                    f"{limit_s:g} can mend anything; lower {name}, or raise "
                    "driver.stall_timeout_s well above it: a worker that hangs has to be replaced "
                    "in the rest"
                )
        return self

    @model_validator(mode="after")
    def _check_algorithm(self) -> Config:
        learn, samples = self.learn, self.generate.samples_per_prompt
        advantage = learn.advantage
        if advantage.kind == "group" and advantage.baseline != "none" and samples < 2:
            raise ConfigError(
                f"learn.advantage.baseline={advantage.baseline} holds a sample against the others "
                "of its prompt, and generate.samples_per_prompt=1 leaves none; sample at least 2, "
                "or set learn.advantage.baseline=none and learn.advantage.scale=none"
            )
        if self.driver.skip_without_signal and samples < 2:
            raise ConfigError(
                "driver.skip_without_signal leaves out groups whose rewards are all equal, and a "
                "group of one always is; set generate.samples_per_prompt to 2 or more"
            )
        if self.driver.skip_without_signal and advantage.learns_from_equal_rewards:
            unless = ""
            if advantage.kind == "group":
                unless = " without a learn.advantage.baseline"
            raise ConfigError(
                "driver.skip_without_signal leaves out groups whose rewards are all equal, and "
                f"learn.advantage.kind={advantage.kind}{unless} learns from them too; set "
                "driver.skip_without_signal=false, or hold samples against their group "
                "(learn.advantage.kind=group, learn.advantage.baseline=mean)"
            )
        if learn.value.warmup_steps and not learn.has_critic:
            raise ConfigError(
                f"learn.value.warmup_steps={learn.value.warmup_steps} trains a critic alone, and "
                f"learn.advantage.kind={advantage.kind} has none; set it to 0"
            )
        if learn.value.warmup_steps >= self.driver.steps:
            raise ConfigError(
                f"learn.value.warmup_steps={learn.value.warmup_steps} leaves the policy no step of "
                f"driver.steps={self.driver.steps}; set it lower"
            )
        if self.score.overlong.penalty and self.score.overlong.start >= (
            self.generate.max_new_tokens
        ):
            raise ConfigError(
                f"score.overlong.start={self.score.overlong.start} is never passed, as responses "
                f"end at generate.max_new_tokens={self.generate.max_new_tokens}; set it lower"
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
    def engine_tokens(self) -> int:
        """Tokens that an engine can hold of a sequence, no fewer than the longest has."""
        return self.generate.max_model_len or self.sequence_tokens

    @property
    def sft_tokens(self) -> int:
        """Where an SFT example is cut: `sft.max_tokens`, or the longest sequence of the run."""
        return self.sft.max_tokens or self.sequence_tokens

    @property
    def reward_model_tokens(self) -> int:
        """Where the reward model's training texts are cut: `reward_model.max_tokens`, or the
        longest sequence of the run."""
        return self.reward_model.max_tokens or self.sequence_tokens


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError names the file and the trouble: a name that is given
    twice is one, as YAML's own reader would keep the last alone."""
    try:
        loader = yaml.SafeLoader(path.read_text())
        root = loader.get_single_node()
        twice = next(_twice(root, "", set()), None)
        values = None if root is None or twice else loader.construct_document(root)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file that can be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if twice:
        name, first, line = twice
        raise ConfigError(
            f"{path}:{line}: {name} is given already in line {first}, and one of them would be "
            "lost; put them together, or leave one out"
        )
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} should hold a mapping of sections, found {type(values).__name__}"
        )
    return _without_empty(values, Config)


def _without_empty(values: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """`values` but for sections that say nothing, as their lines are all commented out: YAML has
    null there, which is a value where a setting has it."""
    out = {}
    for name, value in values.items():
        field = section.model_fields.get(name)
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, Section):
            if value is None:
                continue
            value = _without_empty(value, kind) if isinstance(value, dict) else value
        out[name] = value
    return out


def _twice(node: yaml.Node | None, above: str, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    """(dotted name, line of the first, line of the second) of what a mapping has twice. What an
    alias names again was `seen`."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value, above, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = key.value, key.start_mark.line + 1
        if name in lines and name != "<<":
            yield f"{above}{name}", lines[name], line
        lines[name] = line
        yield from _twice(value, f"{above}{name}.", seen)


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
