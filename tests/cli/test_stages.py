"""A stage is made once for the same settings, and made again where they changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrl.checkpoint import RunDir, RunDirError
from distrl.cli import main
from distrl.cli.stages import (
    _accuracy,
    claimed,
    ensure_reward_model,
    ensure_sft,
    outlook,
    policy_folder,
    reward_model_folder,
    reward_stage,
    scored_by,
    sft_stage,
)
from distrl.config import Config, ConfigError, dump_yaml


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training replaced by a note that it was begun; what it writes is one file."""
    notes: list[str] = []

    def sft(config: Config, out: Path, on_step: Any) -> Any:
        notes.append("sft")
        (out / "policy").mkdir(parents=True)
        on_step(1, 1, {"loss": 1.0})
        return SimpleNamespace(parameters=1e6, validation_loss=1.0, truncated=0, seconds=1.0)

    def reward_model(config: Config, policy: Path, out: Path, on_step: Any) -> Any:
        assert policy == sft_stage(config).folder / "policy"
        notes.append("reward model")
        (out / "model").mkdir(parents=True)
        accuracy = {"0.5": SimpleNamespace(value=0.75, pairs=1000)}
        held_out = SimpleNamespace(accuracy=accuracy)
        return SimpleNamespace(held_out=held_out, truncated=30, alike=4, seconds=1.0)

    monkeypatch.setattr("distrl.learn.sft.run_sft", sft)
    monkeypatch.setattr("distrl.learn.reward_model.run_reward_model", reward_model)
    return notes


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not looked at: the policy of `made` has no tokenizer to read them with."""
    for what in ("comparisons", "reference_prompts"):
        monkeypatch.setattr(f"distrl.cli.reward_model.check_{what}", lambda _: None)


def config(root: Path, **sections: Any) -> Config:
    return Config.model_validate({"run": {"name": "r", "root": str(root)}, **sections})


def both(settings: Config, *, fresh: bool = False) -> None:
    ensure_sft(settings, fresh=fresh)
    ensure_reward_model(settings, fresh=fresh)


def test_a_finished_stage_is_reused(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both(config(tmp_path))
    assert "75.0% of 1,000 held-out pairs" in capsys.readouterr().out
    both(config(tmp_path, driver={"steps": 7}, learn={"lr": 1e-6}, score={"workers": 2}))
    assert made == ["sft", "reward model"]
    assert capsys.readouterr().out.count("finished before, reusing") == 2


def test_what_an_earlier_version_finished_is_reused_while_what_is_new_is_left_as_it_was(
    made: list[str], tmp_path: Path
) -> None:
    both(config(tmp_path))
    for name in ("sft", "reward-model"):
        file = tmp_path / "r" / name / "stage.json"
        settings = json.loads(file.read_text())
        del settings["data"]["chosen_column"], settings["sft"]["weight_decay"]
        file.write_text(json.dumps(settings))
    both(config(tmp_path))
    assert made == ["sft", "reward model"]
    both(config(tmp_path, sft={"weight_decay": 0.3}))
    assert made == ["sft", "reward model"] * 2


def test_ratings_that_lie_close_together_are_said_too() -> None:
    def report(*margins: str) -> Any:
        accuracy = {margin: SimpleNamespace(value=0.75, pairs=1000) for margin in margins}
        return SimpleNamespace(held_out=SimpleNamespace(accuracy=accuracy))

    assert _accuracy(report("0")) == "75.0% of 1,000 held-out pairs"
    far = "75.0% of 1,000 held-out pairs rated more than 0.5 apart"
    assert _accuracy(report("0", "0.5")) == far


def test_what_was_cut_is_said(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both(config(tmp_path, reward_model={"max_tokens": 50}))
    said = capsys.readouterr().out
    assert "30 responses were cut at reward_model.max_tokens=50, and 4 of them left out" in said
    assert "raise it" in said


@pytest.mark.parametrize("command", ["sft", "reward-model", "train"])
def test_what_is_refused_costs_nothing(
    made: list[str], tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a stage that was finished before, nor a run's progress, nor is a folder left."""
    words = ["--run.root", str(tmp_path), "--data.source", str(tmp_path / "nowhere.jsonl")]
    if command == "train":
        words.append("--fresh")
    assert main([command, *words, "--run.name", "new"]) != 0
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with claimed(config(tmp_path), resume=False, fresh=False) as directory:
        both(config(tmp_path))
        directory.begin().metrics.write_text('{"step": 1}\n')
    before = directory.config.read_text()
    for stage in (sft_stage, reward_stage):
        (stage(config(tmp_path)).folder / "weights").touch()
    assert main([command, *words, "--run.name", "r"]) != 0
    assert directory.metrics.exists() and directory.config.read_text() == before
    for stage in (sft_stage, reward_stage):
        assert (stage(config(tmp_path)).folder / "weights").exists()
    assert made == ["sft", "reward model"]


def test_fresh_makes_them_again(made: list[str], tmp_path: Path) -> None:
    both(config(tmp_path))
    (tmp_path / "r" / "sft" / "leftover").touch()
    both(config(tmp_path), fresh=True)
    assert made == ["sft", "reward model"] * 2
    assert not (tmp_path / "r" / "sft" / "leftover").exists()


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"sft": {"lr": 1e-4}}, ["sft", "reward model"]),
        ({"model": {"layers": 2}}, ["sft", "reward model"]),
        ({"data": {"limit": 10}}, ["sft", "reward model"]),
        ({"run": {"name": "r", "seed": 1}}, ["sft", "reward model"]),
        ({"reward_model": {"lr": 1e-4}}, ["reward model"]),
        # Its scale is measured on samples of the policy, so how these are drawn counts.
        ({"generate": {"temperature": 0.7}}, ["reward model"]),
        ({"generate": {"max_num_seqs": 7}}, []),
        # Where no cut is set, a training text is as long as a sequence of the run.
        ({"generate": {"max_new_tokens": 30}}, ["sft", "reward model"]),
        (
            {
                "generate": {"max_new_tokens": 30},
                "sft": {"max_tokens": 52},
                "reward_model": {"max_tokens": 52},
            },
            ["reward model"],
        ),
    ],
)
def test_changed_settings_make_them_again(
    changed: dict[str, Any], again: list[str], made: list[str], tmp_path: Path
) -> None:
    both(config(tmp_path))
    made.clear()
    if "run" in changed:
        changed = {"run": changed["run"] | {"root": str(tmp_path)}}
    both(config(tmp_path, **changed))
    assert made == again


def test_a_stage_that_is_made_anew_says_why(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both(config(tmp_path))
    assert "made anew" not in capsys.readouterr().out
    both(config(tmp_path, sft={"lr": 0.5}))
    said = capsys.readouterr().out
    assert f"SFT: made anew in {tmp_path / 'r' / 'sft'}; other settings: sft.lr (0." in said
    assert "-> 0.5)" in said and "Reward model: made anew" in said
    both(config(tmp_path, sft={"lr": 0.5}), fresh=True)
    assert "made anew" in (said := capsys.readouterr().out) and "--fresh" in said


def cut_short(patch: pytest.MonkeyPatch, which: str) -> None:
    """The stage is interrupted as soon as its folder is there."""

    def interrupted(*given: Any) -> Any:
        given[-2].mkdir(parents=True)
        raise KeyboardInterrupt

    patch.setattr(f"distrl.learn.{which}.run_{which}", interrupted)


@pytest.mark.parametrize(
    ("which", "changed"),
    [("sft", {"sft": {"lr": 0.5}}), ("reward_model", {"generate": {"temperature": 0.5}})],
)
def test_what_was_finished_is_kept_until_its_successor_is(
    made: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    which: str,
    changed: dict[str, Any],
) -> None:
    both(config(tmp_path))
    (tmp_path / "r/sft/policy/weights").touch()
    (tmp_path / "r/reward-model/model/weights").touch()
    made.clear()
    with monkeypatch.context() as patch:
        cut_short(patch, which)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                both(config(tmp_path, **changed))
            said = capsys.readouterr().out
            assert "until it is finished, the one before stays in" in said
            assert (tmp_path / "r/reward-model.old/model/weights").exists()
    both(config(tmp_path))
    assert made == [] and capsys.readouterr().out.count("finished before, reusing") == 2
    assert (tmp_path / "r/sft/policy/weights").exists()
    assert (tmp_path / "r/reward-model/model/weights").exists()
    both(config(tmp_path, **changed))
    assert not list((tmp_path / "r").glob("*.old"))
    assert all(stage(config(tmp_path, **changed)).finished() for stage in (sft_stage, reward_stage))


def test_a_reward_model_of_a_policy_that_is_gone_is_kept_but_not_put_back(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(config(tmp_path))
    with monkeypatch.context() as patch:
        cut_short(patch, "reward_model")
        with pytest.raises(KeyboardInterrupt):
            both(config(tmp_path, sft={"lr": 0.5}))
    assert (tmp_path / "r" / "reward-model.old" / "model").exists()
    made.clear()
    both(config(tmp_path))
    assert made == ["sft", "reward model"] and not list((tmp_path / "r").glob("*.old"))


def test_the_plan_says_what_becomes_of_the_stages(made: list[str], tmp_path: Path) -> None:
    sft, rewards = (tmp_path / "r" / name for name in ("sft", "reward-model"))
    assert [*outlook(config(tmp_path))] == [
        f"SFT: made in {sft}",
        f"Reward model: made in {rewards}",
    ]
    both(config(tmp_path))
    assert all("finished before, reusing" in line for line in outlook(config(tmp_path)))
    first, second = outlook(config(tmp_path, generate={"temperature": 0.5}))
    assert first == f"SFT: finished before, reusing {sft}"
    assert f"made anew in {rewards}; other settings: [generate.max_new_tokens, gen" in second
    assert "generate.temperature] ([40, 1.0] -> [40, 0.5])" in second
    first, second = outlook(config(tmp_path, sft={"lr": 0.5}))
    assert "other settings: sft.lr (0.002 -> 0.5)" in first and "sft.lr" in second
    first, second = outlook(config(tmp_path), fresh=["SFT"], rewards=False)
    assert "made anew" in first and "; --fresh; " in first and "came of the SFT policy" in second
    assert len([*outlook(config(tmp_path), rewards=False)]) == 1
    rule = {"parts": [{"name": "rule", "function": "m:f"}]}
    (*_, told) = outlook(config(tmp_path, score=rule))
    assert told == "Reward model: none to train, score.parts names the rewards"
    assert made == ["sft", "reward model"]


def test_a_stage_that_was_cut_short_is_made_again(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        (tmp_path / "r" / "sft" / "policy").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distrl.learn.sft.run_sft", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_sft(config(tmp_path))
    assert not sft_stage(config(tmp_path)).finished()
    ensure_sft(config(tmp_path))
    assert made == ["sft"]
    assert sft_stage(config(tmp_path)).finished()


@pytest.mark.parametrize("content", ["", "[]", '{"model"'])
def test_a_damaged_mark_is_no_finished_stage(made: list[str], tmp_path: Path, content: str) -> None:
    both(config(tmp_path))
    (tmp_path / "r" / "sft" / "stage.json").write_text(content)
    made.clear()
    ensure_sft(config(tmp_path))
    assert made == ["sft"] and sft_stage(config(tmp_path)).finished()


def test_rows_that_were_written_since_are_told_of(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    settings = config(tmp_path, data={"source": str(rows)})
    os.utime(rows, (1, 1))
    both(settings)
    both(settings)
    assert "was written after that" not in capsys.readouterr().out
    os.utime(rows)
    os.utime(tmp_path / "r" / "sft" / "stage.json", (2, 2))
    both(settings)
    said = capsys.readouterr().out
    assert f"SFT: {rows} was written after that" in said and "'distrl sft --fresh'" in said
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 1}\n')
    both(settings)
    said = capsys.readouterr().out
    assert f"SFT: {rows} was written after that; this run goes on from what it held" in said
    assert "another --run.name" in said and "--fresh" not in said


def test_the_settings_are_kept_for_people_to_read(made: list[str], tmp_path: Path) -> None:
    both(config(tmp_path))
    kept = json.loads((tmp_path / "r" / "reward-model" / "stage.json").read_text())
    assert kept["reward_model"]["epochs"] == config(tmp_path).reward_model.epochs
    assert kept == reward_stage(config(tmp_path)).settings


def test_without_sft_the_policy_is_the_models(
    made: list[str], tiny_policy: Path, tmp_path: Path
) -> None:
    settings = config(tmp_path, sft={"epochs": 0}, model={"path": str(tiny_policy)})
    ensure_sft(settings)
    assert made == []
    assert policy_folder(settings) == tiny_policy


def test_the_critics_start(tmp_path: Path) -> None:
    assert reward_model_folder(config(tmp_path)) == tmp_path / "r" / "reward-model" / "model"
    rule = {"name": "rule", "function": "m:f"}
    parts = [rule, {"name": "rm", "model": "there"}]
    assert reward_model_folder(config(tmp_path, score={"parts": parts})) == Path("there")
    with pytest.raises(ConfigError, match=r"learn\.value\.start=policy"):
        reward_model_folder(config(tmp_path, score={"parts": [rule]}))
    fixed = config(tmp_path, score={"parts": [rule]}, learn={"value": {"start": "policy"}})
    assert reward_model_folder(fixed) is None


def test_no_reward_model_is_trained_where_others_reward(made: list[str], tmp_path: Path) -> None:
    parts = [{"name": "rule", "function": "m:f"}]
    ensure_reward_model(config(tmp_path, score={"parts": parts}))
    assert made == []


def test_a_part_may_be_the_run_s_own_reward_model_whatever_the_run_is_called(
    made: list[str], tmp_path: Path
) -> None:
    parts = [{"name": "other", "model": "there"}, {"name": "taste", "model": "own"}]
    for name in ("first", "second"):
        run = {"name": name, "root": str(tmp_path)}
        settings = config(tmp_path, run=run, score={"parts": parts})
        both(settings)
        assert [part.model for part in scored_by(settings).parts] == [
            "there",
            str(tmp_path / name / "reward-model" / "model"),
        ]
        assert "model: own" in dump_yaml(settings), "so that a run that is moved finds it"
        alone = config(tmp_path, run=run, score={"parts": parts[1:]})
        assert reward_model_folder(alone) == tmp_path / name / "reward-model" / "model"
    assert made == ["sft", "reward model"] * 2


@pytest.mark.parametrize(
    "rated", [{"responses": ["a", "b"], "ratings": [1, 0]}, {"chosen": "a", "rejected": "b"}, {}]
)
def test_another_run_s_reward_model_is_called_so(
    made: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rated: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "p"} | rated))
    columns = {f"{name}_column": name for name in rated}
    parts = [{"name": "taste", "model": "runs/mine/reward-model/model"}]
    run = {"name": "second", "root": "runs"}
    data = {"source": "rows.jsonl", **columns}
    settings = config(tmp_path, run=run, score={"parts": parts}, data=data)
    ensure_reward_model(settings)
    said = capsys.readouterr().out
    assert said.startswith("Reward model: none to train; 'taste' is runs/mine's")
    assert ("'model: own'" in said) is bool(rated) and made == []


def test_commands_make_the_stage_before(
    made: list[str], unread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run.root", str(tmp_path), "--run.name", "r"]
    assert main(["reward-model", *words]) == 0
    assert made == ["sft", "reward model"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"reward model: {tmp_path / 'r' / 'reward-model' / 'model'}"
    )
    assert main(["sft", "--fresh", *words]) == 0
    assert made == ["sft", "reward model", "sft"]
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"policy: {tmp_path / 'r/sft/policy'}"
    assert "Reward model: made anew" in said and "it came of the SFT policy" in said
    assert main(["reward-model", *words]) == 0
    assert made == ["sft", "reward model"] * 2, "the one that came of another policy is gone"


def test_a_reward_model_of_other_settings_goes_with_its_policy_too(
    made: list[str], tmp_path: Path
) -> None:
    """Or it would be taken up again once its settings are back."""
    both(config(tmp_path))
    other = config(tmp_path, reward_model={"lr": 1e-4})
    ensure_sft(other, fresh=True)
    both(config(tmp_path))
    assert made == ["sft", "reward model", "sft", "reward model"]


@pytest.fixture
def begun(made: list[str], unread: None, tmp_path: Path) -> list[str]:
    """A run that has taken a step of PPO; the words that name it."""
    both(config(tmp_path))
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "r" / "config.yaml").write_text(dump_yaml(config(tmp_path)))
    made.clear()
    return ["--run.root", str(tmp_path), "--run.name", "r"]


@pytest.mark.parametrize(
    "command, title", [("sft", "SFT"), ("reward-model", "Reward model")], ids=["sft", "rewards"]
)
def test_fresh_leaves_what_a_run_began_from(
    begun: list[str],
    made: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    title: str,
) -> None:
    for more in ([], ["--dry-run"]):
        assert main([command, "--fresh", *begun, *more]) == 1
        said = capsys.readouterr().err
        assert f"{title}: {tmp_path / 'r'} holds a run that began from what was made in" in said
        assert f"choose another --run.name, or remove {tmp_path / 'r'}" in said
        assert main([command, *begun, *more]) == 0, "as it is, it is reused"
    assert made == []
    assert all(stage(config(tmp_path)).finished() for stage in (sft_stage, reward_stage))


@pytest.mark.parametrize("lost", ["sft", "reward-model"])
def test_a_stage_that_a_run_began_from_is_not_made_up_for(
    begun: list[str],
    made: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lost: str,
) -> None:
    (tmp_path / "r" / lost / "stage.json").unlink()
    for command in (["sft"], ["reward-model"], ["train", "--resume"]):
        assert main([*command, *begun]) == 1
        said = capsys.readouterr().err
        assert f"made in {tmp_path / 'r' / lost}, which is no longer there: put it back" in said
    assert made == []


def test_a_reward_model_that_no_run_has_begun_from_is_made(
    begun: list[str], made: list[str], tmp_path: Path
) -> None:
    """The run's rewards are functions alone."""
    rule = ["--score.parts", '[{"name": "r", "function": "builtins:len"}]']
    settings = config(tmp_path, score={"parts": [{"name": "r", "function": "builtins:len"}]})
    (tmp_path / "r" / "config.yaml").write_text(dump_yaml(settings))
    assert main(["reward-model", "--fresh", *begun, *rule]) == 0
    assert made == ["reward model"]


@pytest.mark.parametrize("command", ["sft", "reward-model", "train", "demo"])
def test_a_run_keeps_the_stages_that_it_stands_on(
    command: str, made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both(config(tmp_path))
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "r" / "config.yaml").write_text(dump_yaml(config(tmp_path)))
    made.clear()
    words = ["--run.root", str(tmp_path), "--run.name", "r", "--sft.lr", "1e-4"]
    assert main([command, *words]) == 1
    assert made == []
    said = capsys.readouterr().err
    assert "--run.name" in said
    if command != "train":  # which would begin another run here
        assert "sft.lr: 0.002 -> 0.0001" in said


def test_two_processes_do_not_share_a_run_directory(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed(config(tmp_path), resume=False, fresh=False):
        assert main(["train", "--run.root", str(tmp_path), "--run.name", "r"]) == 1
        with pytest.raises(RunDirError, match="in use by process"):
            claimed(config(tmp_path), resume=True, fresh=False)
    assert made == []
    assert "in use by process" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["def f(:\n", "import math\n\nmath.nothing\n"])
def test_a_module_that_fails_as_it_is_imported(
    made: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"fails_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    run = ["--run.name", "r", "--run.root", str(tmp_path), "--learn.value.start", "policy"]
    parts = f'[{{"name": "r", "function": "{name}:f"}}]'
    assert main(["train", *run, "--score.parts", parts]) == 2
    assert f"{name} fails as it is imported: " in capsys.readouterr().err and made == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["--learn.advantage.kind", "no_such_module:f"], "cannot import no_such_module"),
        (["--learn.objective.kind", "builtins:lenn"], "builtins has no lenn"),
        (["--score.parts", '[{"name": "r", "function": "builtins:lenn"}]'], "has no lenn"),
        (["--learn.objective.kind", "builtins:len"], "'builtins:len' failed: TypeError: len()"),
        (["--learn.advantage.kind", "builtins:max"], "'builtins:max' failed: TypeError: "),
        (["--evaluate.judge", "builtins:lenn"], "evaluate.judge 'builtins:lenn'"),
        (["--evaluate.judge", "builtins.len"], "not of the form module:function"),
    ],
)
def test_functions_are_looked_up_before_any_stage(
    made: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    run = ["--run.name", "r", "--run.root", str(tmp_path)]
    for more in ([], ["--dry-run"]):
        assert main(["train", *run, *words, "--learn.value.start", "policy", *more]) == 2
        assert message in capsys.readouterr().err
    assert made == []


def test_there_is_nothing_to_go_on_with(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped name does not begin a run."""
    RunDir(tmp_path / "mine").claim("{}").begin().close()
    assert main(["train", "--run.root", str(tmp_path), "--run.name", "nine", "--resume"]) == 1
    said = capsys.readouterr().err
    assert "nine holds no run to go on with" in said and "has mine." in said
    assert not (tmp_path / "nine").exists() and made == []


@pytest.mark.parametrize("name", [".", "..", ".hidden"])
def test_a_run_has_a_folder_of_its_own(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dry-run", "--run.root", str(tmp_path), "--run.name", name]) == 2
    assert "run.name" in capsys.readouterr().err
