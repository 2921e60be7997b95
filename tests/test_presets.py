"""Each recipe's preset says what its source says: figures by hand from the papers' tables."""

from __future__ import annotations

import re
from functools import reduce
from typing import Any

import pytest

from distrl.config import PRESETS, Config, ConfigError, preset_path, read_yaml
from distrl.config.whole import TRAINED_MODEL_RATES

GAE = {"learn.advantage.kind": "gae", "learn.advantage.gamma": 1.0, "learn.advantage.lam": 0.95}
CLIP = {
    "learn.objective.kind": "clip",
    "learn.objective.clip_low": 0.2,
    "learn.objective.clip_high": 0.2,
}
GROUP = {
    "learn.advantage.kind": "group",
    "learn.advantage.baseline": "mean",
    "learn.advantage.scale": "std",
    "learn.advantage.whiten": False,
    "learn.epochs": 1,
}
TLDR = {"samples": 512, "episodes": 1_000_000, "learn.epochs": 4, "learn.schedule": "linear"}

SOURCES: dict[str, dict[str, Any]] = {
    # Section 2.2: "2M episodes, gamma = 1, four PPO epochs per batch with one minibatch each",
    # batch 1024, 1.41e-5; the code: kl 0.15, target 6, horizon 10,000, Adam's epsilon 1e-5 (TF),
    # gradients as they are.
    "ziegler": GAE | CLIP | {
        "samples": 1024, "episodes": 2_000_000, "learn.epochs": 4, "learn.minibatches": 1,
        "learn.lr": 1.41e-5, "learn.schedule": "linear", "learn.adam_epsilon_in": "tf",
        "learn.adam_eps": 1e-5, "learn.value.trunk": "shared", "learn.value.coef": 0.1,
        "learn.kl.kind": "adaptive", "learn.kl.coef": 0.15, "learn.kl.target": 6.0,
        "learn.kl.horizon": 10_000, "generate.temperature": 0.7, "generate.max_new_tokens": 24,
        "learn.advantage.whiten_rewards": True, "learn.grad_clip": None,
    },
    # Appendix B.1.
    "stiennon": GAE | CLIP | TLDR | {
        "learn.lr": 1.5e-5, "learn.kl.coef": 0.05, "learn.value.trunk": "separate",
        "learn.value.start": "reward_model", "generate.max_new_tokens": 48,
    },
    # Appendix C.4: 256k episodes, batches of 512, minibatches of 64, one inner epoch; warm-up over
    # ten iterations; 8 times more pretraining examples than episodes, gamma 27.8, beta 0.02.
    "instructgpt": GAE | CLIP | {
        "samples": 512, "episodes": 256_000, "minibatch": 64, "learn.epochs": 1,
        "learn.warmup_steps": 10, "learn.schedule": "constant", "learn.ema": 0.992,
        "learn.kl.coef": 0.02, "learn.kl.kind": "fixed", "learn.pretrain.coef": 27.8,
        "learn.pretrain.sequences": 8 * 64, "learn.critic_lr": 9e-6, "generate.temperature": 1.0,
        "learn.value.start": "reward_model", "learn.value.trunk": "separate",
        "learn.adam_betas": (0.9, 0.95),
    },
    # Section 4.1: lambda_KL.
    "bai": GAE | {"learn.kl.coef": 0.001, "learn.kl.kind": "fixed", "learn.kl.place": "reward"},
    # The paper's table of PPO; the code clips no gradient.
    "nplus": GAE | CLIP | TLDR | {
        "learn.lr": 3e-6, "learn.minibatches": 1, "learn.kl.coef": 0.05, "learn.value.clip": 0.2,
        "generate.temperature": 0.7, "generate.max_new_tokens": 53, "learn.adam_eps": 1e-5,
        "learn.adam_epsilon_in": "torch", "score.missing_eos_score": -1.0,
        "learn.advantage.whiten_rewards": False, "learn.grad_clip": None,
    },
    # Section 4.2.
    "grpo": GROUP | {
        "samples": 1024, "generate.samples_per_prompt": 64, "generate.max_new_tokens": 1024,
        "learn.lr": 1e-6, "learn.kl.coef": 0.04, "learn.kl.place": "loss",
        "learn.kl.estimator": "k3", "learn.minibatches": 1, "learn.objective.aggregate": "sequence",
    },
    # Section 4.1: 512 prompts of 16 responses, minibatches of 512 responses; 16,384 tokens and
    # 4,096 of soft punishment.
    "dapo": GROUP | {
        "driver.prompts_per_step": 512, "generate.samples_per_prompt": 16, "minibatch": 512,
        "learn.lr": 1e-6, "learn.warmup_steps": 20, "learn.objective.clip_low": 0.2,
        "learn.objective.clip_high": 0.28, "learn.objective.aggregate": "token",
        "learn.kl.coef": 0.0, "score.overlong.start": 16_384, "score.overlong.full": 20_480,
        "generate.max_new_tokens": 20_480, "driver.skip_without_signal": True,
    },
    # Appendix, training details, TL;DR: 600 steps of 512 rollouts in two minibatches, a warm-up
    # over 3 % of them.
    "rloo": {
        "learn.advantage.kind": "group", "learn.advantage.baseline": "leave_one_out",
        "learn.advantage.scale": "none", "learn.objective.kind": "policy_gradient",
        "generate.samples_per_prompt": 4, "learn.kl.coef": 0.03, "learn.lr": 1e-6,
        "learn.epochs": 1, "samples": 512, "minibatch": 256, "driver.steps": 600,
        "learn.warmup_steps": 18,
    },
    # Section 5.1.
    "gspo": GROUP | {
        "learn.objective.kind": "sequence", "learn.objective.clip_low": 3e-4,
        "learn.objective.clip_high": 4e-4, "learn.objective.aggregate": "sequence",
        "learn.minibatches": 4,
    },
}  # fmt: skip


def preset(name: str) -> Config:
    return Config.model_validate(read_yaml(preset_path(name)))


@pytest.mark.parametrize("name", SOURCES)
def test_a_preset_is_what_its_source_says(name):
    config = preset(name)
    derived = {
        "samples": config.samples_per_step,
        "minibatch": config.samples_per_step // config.learn.minibatches,
    }
    for field, wanted in SOURCES[name].items():
        if field == "episodes":
            episodes = config.driver.steps * config.samples_per_step
            assert abs(episodes - wanted) < config.samples_per_step, "to the step"
        elif field in derived:
            assert derived[field] == wanted, field
        else:
            assert reduce(getattr, field.split("."), config) == wanted, field


@pytest.mark.parametrize("name", [*SOURCES, "demo", "smollm2"])
def test_the_reward_model_reads_whole_sequences_of_the_run(name):
    config = preset(name)
    sizes = {"demo": (96, 96), "smollm2": (36, 64)}
    whole = (config.sequence_tokens, config.sequence_tokens)
    assert (config.sft_tokens, config.reward_model_tokens) == sizes.get(name, whole)
    assert config.reward_model_tokens >= config.sequence_tokens


@pytest.mark.parametrize("name", sorted({*SOURCES, "demo", "smollm2"} - {"dapo"}))
def test_another_objective_on_a_preset_brings_its_own_bounds(name):
    """A bound that a preset gives counts as set; DAPO's alone are its own."""
    papers = {"clip": (0.2, 0.2), "sequence": (3e-4, 4e-4), "capped_weight": (1.0, 4.0)}
    for kind, bounds in papers.items():
        values = read_yaml(preset_path(name))
        chosen = {"kind": kind, "aggregate": "sequence"}
        learn = values["learn"]
        learn["objective"] = learn.get("objective", {}) | chosen
        found = Config.model_validate(values).learn.objective
        assert (found.clip_low, found.clip_high) == bounds, kind


def test_every_recipe_has_a_source_and_a_name_of_its_own():
    there = {path.stem for path in PRESETS.glob("*.yaml")}
    assert there - {"demo", "smollm2"} == set(SOURCES)
    assert {preset(name).run.name for name in there} == there


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"learn": {"advantage": {"kind": "group", "baseline": "leave_one_out"}}, "n": 1},
            r"generate\.samples_per_prompt=1 leaves none; sample at least 2",
        ),
        ({"driver": {"skip_without_signal": True}, "n": 1}, "samples_per_prompt to 2 or more"),
        (
            {"driver": {"skip_without_signal": True}},
            r"advantage\.kind=gae learns from them too; set driver\.skip_without_signal=false",
        ),
        (
            {
                "driver": {"skip_without_signal": True},
                "learn": {"advantage": {"kind": "returns"}},
            },
            r"advantage\.kind=returns learns from them too",
        ),
        (
            {
                "driver": {"skip_without_signal": True},
                "learn": {"advantage": {"kind": "group", "baseline": "none", "scale": "none"}},
            },
            r"advantage\.kind=group without a learn\.advantage\.baseline learns from them too",
        ),
        (
            {"learn": {"advantage": {"kind": "returns"}, "value": {"warmup_steps": 2}}},
            r"learn\.advantage\.kind=returns has none; set it to 0",
        ),
        ({"learn": {"value": {"warmup_steps": 40}}}, "leaves the policy no step"),
        (
            {"score": {"overlong": {"penalty": 1, "start": 50, "full": 60}}},
            r"never passed, as responses end at generate\.max_new_tokens=40",
        ),
        ({"score": {"overlong": {"start": 9, "full": 9}}}, r"must be above score\.overlong\.start"),
        (
            {"learn": {"kl": {"place": "loss", "estimator": "k1", "coef": 0.1}}},
            r"expected gradient is 0 .*learn\.kl\.estimator to k2 or k3",
        ),
        (
            {
                "learn": {
                    "kl": {
                        "place": "loss",
                        "estimator": "k1",
                        "coef": 0,
                        "kind": "linear",
                        "final": 0.1,
                    }
                }
            },
            r"learn\.kl\.estimator to k2 or k3",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused_with_the_fix(values, message):
    samples = values.pop("n", 4)
    with pytest.raises((ConfigError, ValueError), match=message):
        Config.model_validate(values | {"generate": {"samples_per_prompt": samples}})


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"context": 52}},
        {"generate": {"max_model_len": 52}},
        {"learn": {"micro_tokens": 52}},
        {"learn": {"ranks": 64}},
        {"learn": {"gpus": 2}},
        {"learn": {"ranks": 2, "gpus": 1}},
        {"learn": {"dtype": "bfloat16"}, "sync": {"canary_tolerance": 0.02}},
        {"learn": {"gpus": 1}, "generate": {"gpus": 1}, "sync": {"transport": "nccl"}},
        {"learn": {"value": {"warmup_steps": 39}}},
        {"learn": {"off_policy": {"floor": 1.0, "cap": 1.0, "reject": True}}},
        {"sft": {"max_tokens": 128}, "reward_model": {"max_tokens": 128}},
        {"sync": {"canary_tokens": 51}},
        {"score": {"overlong": {"penalty": 1, "start": 39, "full": 40}}},
        {"score": {"missing_eos_penalty": 0.0}},
        {"driver": {"max_staleness": 0}},
        {"driver": {"max_staleness": 2, "lead": 2}},
        {"driver": {"max_staleness": 2, "window": 64}},
        {"driver": {"max_staleness": 1, "lead": 3, "window": 96}},
    ],
)
def test_what_just_fits_is_taken(values):
    """Prompt and response are 52 tokens, a step 32 x 4 samples in 2 minibatches, a run 40 steps."""
    Config.model_validate(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sft": {"max_tokens": 129}}, "sft.max_tokens and reward_model.max_tokens must be"),
        ({"reward_model": {"max_tokens": 129}}, "sft.max_tokens and reward_model.max_tokens must"),
        ({"score": {"overlong": {"penalty": 1, "start": 40, "full": 41}}}, "is never passed"),
        ({"score": {"missing_eos_penalty": 0.1}}, "would pay for being cut"),
        ({"driver": {"max_staleness": -1}}, "must be 0 or more"),
        ({"learn": {"adam_bits": 8, "record": True}}, "set learn.record=false"),
    ],
)
def test_what_is_just_beyond_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate(values)


@pytest.mark.parametrize(
    "advantage",
    [
        {"kind": "group"},
        {"kind": "group", "baseline": "leave_one_out", "scale": "none"},
        {"kind": "mine:advantage"},
    ],
)
def test_groups_without_signal_are_skipped_where_a_group_is_its_own_baseline(advantage):
    values = {"driver": {"skip_without_signal": True}, "learn": {"advantage": advantage}}
    assert Config.model_validate(values).driver.skip_without_signal


@pytest.mark.parametrize(
    "kl",
    [
        {"place": "reward", "estimator": "k1", "coef": 0.1},
        {"place": "loss", "estimator": "k1", "coef": 0.0},
        {"place": "loss", "estimator": "k2", "coef": 0.1},
    ],
)
def test_the_first_estimator_is_refused_only_where_its_gradient_would_have_to_hold(kl):
    assert Config.model_validate({"learn": {"kl": kl}}).learn.kl.estimator == kl["estimator"]


def rates(config: Config) -> tuple[float, float, float, float]:
    return config.sft.lr, config.reward_model.lr, config.learn.lr, config.learn.critic_lr


def test_help_names_the_rates_of_a_trained_model() -> None:
    for section, found in TRAINED_MODEL_RATES.items():
        fields = type(getattr(Config(), section)).model_fields
        for name, rate in found.items():
            told = re.search(r"with model\.path, (\S+) unless set", fields[name].description)
            assert told and float(told[1]) == rate, f"{section}.{name}"


def test_a_model_from_elsewhere_learns_at_rates_for_a_trained_one() -> None:
    """Unless they are set, by a recipe or by hand; what is resolved stays as it is."""
    elsewhere = {"model": {"path": "smollm2"}}
    given = Config.model_validate(elsewhere)
    assert rates(given) == (2e-5, 3e-5, 2e-6, 5e-6)
    assert rates(Config.model_validate(given.model_dump())) == rates(given)
    assert rates(Config()) == rates(Config.model_validate({"model": {"path": None}}))
    assert min(rates(Config())) > 50 * 2e-6
    mine = elsewhere | {"learn": {"lr": 1e-4, "epochs": 1}, "sft": {"epochs": 1}}
    assert rates(Config.model_validate(mine)) == (2e-5, 3e-5, 1e-4, 5e-6)
    assert Config.model_validate(mine).learn.epochs == 1
    recipe = Config.model_validate(read_yaml(preset_path("instructgpt")) | elsewhere)
    assert rates(recipe)[1:] == (3e-5, preset("instructgpt").learn.lr, 9e-6)
