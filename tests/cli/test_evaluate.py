"""What `distrl evaluate` takes: the final policy, a checkpoint, a folder."""

from __future__ import annotations

import asyncio
import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distrl.actors.launch import learner_spec
from distrl.checkpoint import CheckpointError, Checkpoints, RunDir
from distrl.cli import main
from distrl.cli.evaluate import _compare, candidate, output_to, plot
from distrl.cli.options import config_of as config_of_run
from distrl.config import Config, ConfigError, dump_yaml
from distrl.data.tokenizer import load_tokenizer
from distrl.disk import NotWritten
from distrl.evaluate.judge import JudgeFailed
from distrl.learn.learner import PolicyLearner
from distrl.metrics import JSONLSink
from distrl.models.load import ModelError, load_policy


def config_of(root: Path, model: Path, **learn: Any) -> Config:
    rule = {"name": "rule", "function": "builtins:len"}
    return Config.model_validate(
        {
            "run": {"name": "r", "root": str(root)},
            "model": {"path": str(model)},
            "sft": {"epochs": 0},
            "score": {"parts": [rule]},
            "learn": {"value": {"start": "policy"}, **learn},
        }
    )


def with_policy(config: Config, policy: str) -> Config:
    evaluate = config.evaluate.model_copy(update={"policy": policy})
    return config.model_copy(update={"evaluate": evaluate})


@pytest.mark.parametrize("learn", [{}, {"lora": {"rank": 2}}, {"ema": 0.5}])
def test_a_checkpoint_on_the_way_is_what_a_learner_of_it_would_export(
    tmp_path: Path, tiny_policy: Path, learn: dict[str, Any]
) -> None:
    config = config_of(tmp_path, tiny_policy, **learn)
    directory = RunDir(config.run.dir)
    learner = PolicyLearner(learner_spec(config, tiny_policy, None, tmp_path))
    with torch.no_grad():
        for weight in learner.networks.trained[0].parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    with Checkpoints(directory.checkpoints).write(20, {}) as folder:
        learner.save(folder / "learner")
    learner.export(tmp_path / "wanted")
    learner.close()
    with candidate(with_policy(config, "20"), directory) as (name, folder):
        assert name == "step_000020"
        found = load_policy(folder).state_dict()
    wanted = load_policy(tmp_path / "wanted").state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not folder.exists()


def test_a_folder_is_taken_as_it_is(tmp_path: Path, tiny_policy: Path) -> None:
    config = config_of(tmp_path, tiny_policy)
    chosen = with_policy(config, str(tiny_policy))
    with candidate(chosen, RunDir(config.run.dir)) as (name, folder):
        assert (name, folder) == (tiny_policy.name, tiny_policy)
    export = shutil.copytree(tiny_policy, tmp_path / "another-run" / "policy")
    with candidate(with_policy(config, str(export)), RunDir(config.run.dir)) as (name, folder):
        assert (name, folder) == ("another-run", export), "two runs' policies have two files"


def test_what_is_not_there_is_told_with_what_is(tmp_path: Path, tiny_policy: Path) -> None:
    config = config_of(tmp_path, tiny_policy)
    directory = RunDir(config.run.dir)
    with Checkpoints(directory.checkpoints).write(4, {}) as folder:
        (folder / "x").write_text("x")
    refusals = {
        "7": (CheckpointError, "no whole checkpoint of step 7 .*there are: 4"),
        str(tmp_path / "nowhere"): (ModelError, "no model folder"),
        "²": (ModelError, "no model folder"),  # a digit, and no number
    }
    for policy, (error, message) in refusals.items():
        chosen = with_policy(config, policy)
        with pytest.raises(error, match=message), candidate(chosen, directory):
            pass
    with pytest.raises(ConfigError, match=r"--evaluate\.policy 20"), candidate(config, directory):
        pass


def test_a_run_that_measured_no_kl_has_no_plot_and_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDir(tmp_path)
    sink = JSONLSink(directory.metrics)
    sink.log(1, {"reward/mean": 1.0})
    plot(directory, None)
    assert not (tmp_path / "reward_vs_kl.png").exists()
    said = capsys.readouterr().out
    assert "no reward_vs_kl.png" in said and "learn.kl.watch=true" in said
    for step in (2, 3):
        sink.log(step, {"reward/mean": 1.0, "kl/ref": 0.5})
    sink.close()
    plot(directory, None)
    assert (tmp_path / "reward_vs_kl.png").exists()
    assert not capsys.readouterr().out


def test_what_the_run_was_made_with_holds(
    tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for what is said now; the folder may have moved."""
    made = config_of(tmp_path / "before", tiny_policy, ema=0.5)
    cooler = made.generate.model_copy(update={"temperature": 0.7})
    looser = made.driver.model_copy(update={"max_staleness": 4})
    made = made.model_copy(update={"generate": cooler, "driver": looser})
    RunDir(tmp_path / "now").claim(dump_yaml(made)).begin().close()
    words = ["--run.root", str(tmp_path), "--run.name", "now", "--evaluate.prompts", "3"]
    assert main(["evaluate", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    found = Config.model_validate(yaml.safe_load(said[: said.index("What follows from it")]))
    assert (found.run.dir, found.evaluate.prompts) == (tmp_path / "now", 3)
    assert (found.generate.temperature, found.learn.ema) == (0.7, 0.5)
    assert main(["evaluate", "--dry-run", *words, "--generate.temperature", "0.9"]) == 0
    assert "temperature: 0.9" in capsys.readouterr().out
    wide = "--driver.window", "64"  # which the defaults, without that bound, would refuse
    assert main(["evaluate", "--dry-run", *words, *wide]) == 0


def test_a_preset_does_not_undo_what_the_run_was_made_with(
    tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config_of(tmp_path, tiny_policy)
    RunDir(made.run.dir).claim(dump_yaml(made)).begin().close()
    words = ["--run.root", str(made.run.root), "--run.name", made.run.name]
    assert main(["evaluate", "--dry-run", *words, "--preset", "smollm2"]) == 0
    said = capsys.readouterr().out
    found = Config.model_validate(yaml.safe_load(said[: said.index("What follows from it")]))
    assert found.model.path == made.model.path and found.generate == made.generate


def test_a_policy_of_another_tokenizer_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    config = config_of(tmp_path, tiny_policy)
    other = tmp_path / "other"
    shutil.copytree(tiny_policy, other)
    tokenizer = load_tokenizer(tiny_policy)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    chosen = with_policy(config, str(other))
    with (
        pytest.raises(ConfigError, match="has another tokenizer than the one in"),
        candidate(chosen, RunDir(config.run.dir)),
    ):
        pass


def test_a_judge_is_tried_before_an_engine_is_started(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any) -> Any:
        pytest.fail("an engine was made")

    monkeypatch.setattr("distrl.cli.evaluate.VLLMGenerator", started)
    monkeypatch.setattr("distrl.cli.evaluate.LocalScorer", lambda *_: None)
    config = config_of(tmp_path, tiny_policy)
    judged = config.evaluate.model_copy(update={"judge": "operator:add"})
    config = config.model_copy(update={"evaluate": judged})
    with pytest.raises(JudgeFailed, match=r"evaluate\.judge=operator:add raised TypeError"):
        asyncio.run(_compare(config, tiny_policy, ("PPO", tiny_policy), []))


def test_an_empty_config_is_no_run_s(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml is empty"):
        config_of_run(RunDir(tmp_path / "r"))


def test_a_folder_that_takes_no_log_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    with (
        pytest.raises(NotWritten, match=r"log could not be .*evaluator\.log: Read-only.*again"),
        output_to(tmp_path / "evaluator.log"),
    ):
        pass
