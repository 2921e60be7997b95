"""`--dry-run`: the whole configuration, what follows from it, what goes where."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import GPT2Config

from distrl.cli import main
from distrl.cli.plan import parameters
from distrl.config import Config


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("an actor system was started"))


@pytest.mark.parametrize("command", ["demo", "sft", "reward-model", "train", "evaluate"])
def test_dry_run_prints_and_touches_nothing(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    words = ["--run.root", str(root), "--generate.workers", "2", "--driver.max_staleness", "3"]
    assert main([command, "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    resolved = yaml.safe_load(said[: said.index("What follows from it")])
    assert Config.model_validate(resolved).generate.workers == 2
    assert "128 = (lead 3 + 1) x 32" in said
    for role in ("learner", "generator", "scorer"):
        assert role in said[said.index("Placement") :]
    assert "GiB" in said
    if command != "evaluate":  # which makes none
        name = "demo" if command == "demo" else "run"
        assert f"SFT: made in {root / name / 'sft'}\n" in said
    assert ("Reward model: made in" in said) is (command not in ("evaluate", "sft"))
    assert not root.exists()


@pytest.mark.parametrize("command", ["demo", "sft", "reward-model", "train", "evaluate"])
def test_rows_are_looked_at_after_the_plan_is_shown(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "nowhere.jsonl"
    words = ["--run.root", str(tmp_path / "runs"), "--data.source", str(rows)]
    assert main([command, "--dry-run", *words]) == 1
    said = capsys.readouterr()
    assert "Placement" in said.out and f"{rows} does not exist" in said.err
    rows.write_text('{"prompt": "p", "response": "a", "responses": ["a"], "ratings": [1]}\n')
    assert main([command, "--dry-run", *words, "--data.validation", str(rows)]) == (
        1 if command not in ("sft", "evaluate") else 0
    )
    wrong = f"{rows}:1: column 'responses' needs two responses"
    assert (wrong in capsys.readouterr().err) is (command not in ("sft", "evaluate"))


@pytest.mark.parametrize("command", ["demo", "sft", "reward-model", "train", "evaluate"])
def test_a_dry_run_fetches_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("distrl.data.reviews.load_reviews", lambda: pytest.fail("fetched"))
    monkeypatch.setattr("distrl.data.sources.load_reviews", lambda: pytest.fail("fetched"))
    assert main([command, "--dry-run", "--run.root", str(tmp_path / "runs")]) == 0
    assert not (tmp_path / "cache").exists()


def test_more_gpus_than_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main(["train", "--dry-run", "--generate.gpus", "2"]) == 1
    said = capsys.readouterr().err
    assert "needs 2 GPUs (1 generator(s) x 2), and this machine has 1; lower generate.gpus" in said


def test_the_sum_of_gpus_counts_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    words = ["--generate.gpus", "1", "--learn.gpus", "1"]
    assert main(["train", "--dry-run", *words]) == 1
    assert "needs 2 GPUs (1 learner(s) x 1, 1 generator(s) x 1)" in capsys.readouterr().err


def test_gpus_are_missed_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("distrl.learn.sft.run_sft", lambda *_: pytest.fail("SFT was begun"))
    assert main(["train", "--run.root", str(tmp_path), "--learn.gpus", "1"]) == 1
    said = capsys.readouterr().err
    assert "needs 1 GPUs (1 learner(s) x 1), and this machine has 0; lower learn.gpus" in said


def test_a_checkpoint_with_too_short_a_context(
    tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.path", str(tiny_policy), "--generate.max_new_tokens", "117"]
    assert main(["train", "--dry-run", *words]) == 2
    said = capsys.readouterr().err
    assert "129 is beyond the 128 positions" in said and "shorten" in said
    assert main(["train", "--dry-run", *words[:-1], "116"]) == 0


def test_a_context_by_another_name(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 calls it n_positions."""
    folder = shutil.copytree(tiny_policy, tmp_path / "gpt2")
    GPT2Config(n_positions=64, vocab_size=300).save_pretrained(folder)
    words = ["--model.path", str(folder), "--generate.max_new_tokens"]
    assert main(["train", "--dry-run", *words, "53"]) == 2
    assert "65 is beyond the 64 positions" in capsys.readouterr().err
    (folder / "config.json").write_text('{"model_type": "no such kind"}')
    assert main(["train", "--dry-run", *words, "50"]) == 1
    assert "holds no model that transformers knows" in capsys.readouterr().err


def test_training_texts_are_as_long_as_the_run_s_sequences(
    tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.max_prompt_tokens", "60", "--generate.max_new_tokens", "50"]
    assert main(["train", "--dry-run", *words, "--sft.max_tokens", "70"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"SFT examples are cut at .* 70 tokens", said)
    assert re.search(r"reward model's training texts are cut at .* 110 tokens", said)
    beyond = ["--model.path", str(tiny_policy), "--reward_model.max_tokens", "129"]
    assert main(["train", "--dry-run", *beyond]) == 2
    said = capsys.readouterr().err
    assert "reward_model.max_tokens=129 is beyond the 128 positions" in said and "lower it" in said


def test_parameters_are_those_of_the_model(tiny_policy: Path, tmp_path: Path) -> None:
    from distrl.data.tokenizer import load_tokenizer
    from distrl.models import load_policy, new_llama

    counted = sum(p.numel() for p in load_policy(tiny_policy).parameters())
    assert parameters(Config.model_validate({"model": {"path": str(tiny_policy)}})) == counted
    halves = load_policy(tiny_policy).bfloat16()
    halves.save_pretrained(tmp_path / "halves")
    assert parameters(Config.model_validate({"model": {"path": str(tmp_path / "halves")}})) == (
        counted
    )
    config = Config.model_validate({"model": {"vocab": 300}})
    new = new_llama(config.model, load_tokenizer(tiny_policy), seed=0)
    assert parameters(config) == sum(p.numel() for p in new.parameters())
