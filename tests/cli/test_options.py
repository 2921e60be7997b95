"""From words to a configuration: what goes over what, and what is refused with its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distrl.cli import main
from distrl.cli.options import Options, merged, parse
from distrl.config import ConfigError, dump_yaml


def options(*argv: str, default_preset: str | None = None) -> Options:
    return parse("train", "trains", list(argv), default_preset)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {name: mine}\nlearn: {lr: 1.0e-5, kl: {coef: 0.3}}\n")
    return path


def test_words_go_over_the_file_and_the_file_over_the_preset(recipe: Path) -> None:
    config = options(
        "--preset", "smollm2", "--config", str(recipe), "--learn.kl.target", "3"
    ).config
    assert config.driver.prompts_per_step == 8, "the preset's"
    assert (config.run.name, config.learn.lr, config.learn.kl.coef) == ("mine", 1e-5, 0.3)
    assert config.learn.kl.target == 3, "the command line's, beside what the file says of kl"
    assert config.learn.critic_lr == 5e-6, "the preset's, in a section that the file has too"


def test_a_word_beats_the_file(recipe: Path) -> None:
    config = options("--config", str(recipe), "--learn.lr=2e-6", "--run.name", "other").config
    assert (config.learn.lr, config.run.name) == (2e-6, "other")


def test_the_preset_of_a_command_is_beneath_a_file_unless_another_is_named(recipe: Path) -> None:
    assert options(default_preset="demo").config.run.name == "demo"
    given = options("--config", str(recipe), default_preset="demo").config
    assert (given.run.name, given.learn.lr, given.learn.kl.coef) == ("mine", 1e-5, 0.3)
    assert (given.sft.epochs, given.learn.minibatches, given.learn.kl.kind) == (3, 4, "adaptive")
    other = options("--config", str(recipe), "--preset", "smollm2", default_preset="demo").config
    assert other.driver.prompts_per_step == 8 and other.learn.schedule != "cosine"


@pytest.mark.parametrize("words", ["--metrics.wandb false", "--metrics.wandb=False"])
def test_a_flag_may_be_said_as_messages_say_it(words: str) -> None:
    assert not options(*words.split()).config.metrics.wandb
    said = options(*words.split(), "--data.chat", "true", "--learn.compile=true").config
    assert said.data.chat and said.learn.compile and not said.metrics.wandb
    assert options("--learn.record", "false", "--learn.compile").config.learn.record is False


def test_what_is_no_json_is_shown() -> None:
    with pytest.raises(ConfigError, match=r'^\["q_proj": this is no JSON \('):
        options("--learn.lora.targets", '["q_proj"')
    with pytest.raises(ConfigError, match=r"^\[\{name: short\}\]: this is no JSON \("):
        options("--score.parts", "[{name: short}]")
    with pytest.raises(ConfigError, match=r"^--learn\.adam_betas=\[0\.9,0\.99: this is no JSON"):
        options("--learn.adam_betas=[0.9,0.99")


@pytest.mark.parametrize(
    "words", [["--learn.adam_betas", ".9,.95"], ["--learn.adam_betas=.9,.95"]], ids=["two", "one"]
)
def test_numbers_that_are_no_json_are_shown_with_their_setting(words: list[str]) -> None:
    good = ["--data.prompt_words", "1,3", "--learn.lora.targets", "q_proj,k_proj"]
    with pytest.raises(ConfigError, match=r"^--learn\.adam_betas \.9,\.95, .* 0\.9 or 10: this"):
        options(*good, *words)


def test_values_of_every_kind() -> None:
    config = options(
        *("--data.prompt_words", "1,3"),
        *("--data.limit", "None"),
        *("--learn.adam_betas", "0.8,0.9"),
        *("--score.parts", '[{"name": "short", "function": "mine:short", "weight": -1}]'),
        "--no-metrics.wandb",
        "--data.chat",
    ).config
    assert config.data.prompt_words == (1, 3)
    assert config.data.limit is None
    assert config.learn.adam_betas == (0.8, 0.9)
    assert config.score.parts[0].weight == -1
    assert (config.metrics.wandb, config.data.chat) == (False, True)


def test_flags() -> None:
    given = options("--dry-run", "--resume")
    assert (given.dry_run, given.resume, given.fresh) == (True, True, False)
    assert options("--dry_run", "--fresh").fresh
    given = options("--dry-run=true", "--resume", "false", "--fresh", "True")
    assert (given.dry_run, given.resume, given.fresh) == (True, False, True)
    assert not options("--dry_run=false").dry_run


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("run.name", "from-the-environment")
    monkeypatch.setenv("RUN", '{"name": "from-the-environment"}')
    assert options().config.run.name == "run"


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = options("--preset", "smollm2", "--learn.lr", "1e-6").config
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert options("--config", str(path)).config == config


def test_merging_leaves_both_sides_alone() -> None:
    below, above = {"a": {"x": 1, "y": {"z": 1}}, "b": 1}, {"a": {"y": {"w": 2}}, "b": {"c": 3}}
    assert merged(below, above) == {"a": {"x": 1, "y": {"z": 1, "w": 2}}, "b": {"c": 3}}
    assert below == {"a": {"x": 1, "y": {"z": 1}}, "b": 1}


# What is refused, and what the message has to name: the field, and the way out.
REFUSED = {
    "unknown word": (["--learn.lrr", "1"], ["--learn.lrr", "--learn.lr?"]),
    "two presets": (
        ["--preset", "demo", "--preset=grpo"],
        ["--preset is given twice, demo and grpo, ", "name one"],
    ),
    "two files": (
        ["--config=a.yaml", "--learn.lr", "1e-5", "--config", "b.yaml"],
        ["--config is given twice, a.yaml and b.yaml, ", "one file"],
    ),
    "unknown section": (["--lern.lr", "1"], ["--lern.lr", "--learn.lr?"]),
    "stray word": (["train"], ["unrecognized arguments: train"]),
    "no value": (["--learn.lr"], ["--learn.lr", "expected one argument"]),
    "wrong type": (["--learn.lr", "fast"], ["learn.lr", "valid number", "'fast'"]),
    "wrong choice": (["--learn.schedule", "odd"], ["learn.schedule", "'linear' or 'cosine'"]),
    "not a number": (["--score.missing_eos_score", "nan"], ["score.missing_eos_score", "finite"]),
    "a seed that vLLM has no room for": (["--run.seed", "4294967296"], ["run.seed", "less than"]),
    "out of range": (["--generate.temperature", "0"], ["generate.temperature", "greater than 0"]),
    "no preset": (["--preset", "nope"], ["'nope'", "bai, dapo, demo, grpo, "]),
    "no file": (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
    "minibatches": (["--learn.minibatches", "3"], ["learn.minibatches=3", "[1, 2, 4, 8"]),
    "context": (["--generate.max_new_tokens", "500"], ["model.context=128", "raise"]),
    "engine's context": (["--generate.max_model_len", "40"], ["generate.max_model_len=40"]),
    "engine beyond the model": (["--generate.max_model_len", "512"], ["model.context=128"]),
    "microbatch": (["--learn.micro_tokens", "16"], ["learn.micro_tokens=16", "raise it"]),
    "canary": (["--sync.canary_tokens", "99"], ["sync.canary_tokens=99", "51 or less"]),
    "heads": (["--model.heads", "7"], ["model.hidden=192", "model.heads=7"]),
    "no policy": (["--sft.epochs", "0"], ["sft.epochs=0", "model.path"]),
    "no such transport": (["--sync.transport", "pigeon"], ["sync.transport", "'shm', 'gloo'"]),
    "GPUs of a transport": (
        ["--sync.transport", "nccl", "--generate.gpus", "1"],
        ["sync.transport=nccl", "learn.gpus=0", "generate.gpus=1", "sync.transport=gloo"],
    ),
    "a part of a GPU": (
        ["--sync.transport", "nccl", "--generate.gpus", "0.5", "--learn.gpus", "0.5"],
        ["generate.gpus=0.5", "give each at least 1"],
    ),
    "a lost group": (
        ["--generate.request_timeout_s", "1800"],
        ["driver.stall_timeout_s=1800", "generate.request_timeout_s=1800", "well above it"],
    ),
    "a late score": (
        ["--driver.stall_timeout_s", "601", "--score.timeout_s", "700"],
        ["driver.stall_timeout_s=601", "score.timeout_s=700", "lower score.timeout_s"],
    ),
    "reward part": (
        ["--score.parts", '[{"name": "a"}]'],
        ["'a'", "needs either model or function"],
    ),
    "ranks": (["--learn.ranks", "65"], ["learn.ranks=65", "64 samples", "at most 64 ranks"]),
    "GPUs of a rank": (
        ["--learn.ranks", "2", "--learn.gpus", "2"],
        ["learn.gpus=2", "2 ranks", "set it to 1"],
    ),
    "half precision": (
        ["--learn.dtype", "bfloat16"],
        ["learn.dtype=bfloat16", "sync.canary_tolerance=0.0002", "0.1 or so"],
    ),
    "offload": (["--learn.offload"], ["learn.gpus=0", "learn.offload=false"]),
    "replay of ranks": (
        ["--learn.ranks", "2", "--learn.record", "true"],
        ["learn.record", "one process", "learn.record=false"],
    ),
    "controller": (
        ["--learn.kl.kind", "adaptive", "--learn.kl.horizon", "25"],
        ["learn.kl.horizon=25", "at least 26"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_status_2_before_any_stage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, named = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distrl.cli.train.ensure_sft", lambda *_, **__: pytest.fail("it began"))
    assert main(["train", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("distrl train: ")
    for part in named:
        assert part in said
    assert "Traceback" not in said


def test_the_horizon_that_the_message_asks_for_is_taken() -> None:
    options("--learn.kl.kind", "adaptive", "--learn.kl.horizon", "26")
    options("--learn.kl.horizon", "1")  # fixed: the horizon is not used


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learn: {lrr: 1}", ["learn.lrr: no such setting", "learn.lr?"]),
        ("lurn: {lr: 1}", ["lurn: no such setting"]),
        (
            "score: {parts: [{name: r, func: 'x:y'}]}",
            ["score.parts.0.func: no such setting (did you mean function?)", "model, function, we"],
        ),
        ("learn: 3", ["learn:"]),
        ("- a\n- b", ["mapping of sections"]),
        ("learn: {lr: [", ["not YAML"]),
        ("learn: {lr: -1}\ndriver: {steps: 0}", ["learn.lr:", "driver.steps:"]),
        ("learn.lr: 1.0e-5", ["learn.lr: dotted names are", "nest `lr:` under `learn:`"]),
        ("learn: {kl.coef: 1}", ["learn.kl.coef: dotted", "`coef:` under `kl:` under `learn:`"]),
        ("learn.lrr: 1.0e-5", ["learn.lrr: no such setting", "learn.lr?"]),
        ("a: &a [*a]", ["a: no such setting"]),
        (
            "learn: {lr: 1.0e-5}\nsft: {epochs: 1}\nlearn:\n  epochs: 2",
            ["wrong.yaml:3: learn is given already in line 1", "put them together"],
        ),
        (
            "learn:\n  kl:\n    coef: 1\n    'coef': 2",
            ["wrong.yaml:4: learn.kl.coef is given already in line 3", "leave one out"],
        ),
        ("learn: {lr: 1, lr: 1}", ["wrong.yaml:1: learn.lr is given"]),
        ("score:\n  parts:\n  - name: a\n    name: b", ["wrong.yaml:4: score.parts.name is"]),
    ],
)
def test_a_wrong_file_is_refused(text: str, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        options("--config", str(path))
    for part in named:
        assert part in str(refused.value)


def test_what_a_file_says_again_by_an_alias_is_not_said_twice(tmp_path: Path) -> None:
    path = tmp_path / "aliased.yaml"
    path.write_text(
        "sft: &stage {lr: 1.0e-5, grad_clip: 2.0}\nreward_model: {<<: *stage, lr: 3.0e-5}\n"
    )
    config = options("--config", str(path)).config
    assert (config.reward_model.lr, config.reward_model.grad_clip) == (3e-5, 2.0)
    for text in ("", "# nothing\n", "---\n"):
        path.write_text(text)
        assert options("--config", str(path)).config == options().config


def test_sections_whose_lines_are_all_commented_out_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(
        "driver:\n  # steps: 3\nlearn:\n  kl:\n    # coef: 1\nreward_model:\n  max_tokens:\n"
    )
    preset = ("--preset", "smollm2", "--model.path=smollm2")
    expected = options(*preset, "--reward_model.max_tokens", "None").config
    assert options(*preset, "--config", str(path)).config == expected


@pytest.mark.parametrize("word", ["none", "null", "None"])
def test_the_judge_can_be_left_out(word: str) -> None:
    assert options("--evaluate.judge", word).config.evaluate.judge is None
    assert options("--evaluate.judge=mine:judge").config.evaluate.judge == "mine:judge"


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match=f"{path} is not a YAML file"):
            options("--config", str(path))


def test_every_preset_is_a_valid_recipe_with_a_name_of_its_own() -> None:
    for name in ("demo", "smollm2"):
        assert yaml.safe_load(dump_yaml(options("--preset", name).config))["run"]["name"] == name
