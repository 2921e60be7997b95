"""Every setting is explained, in every command, before anything heavy is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distrl.cli import main
from distrl.cli.help import did_you_mean, sections, settings
from distrl.cli.main import COMMANDS
from distrl.cli.options import parse
from distrl.config import RewardPart


def test_every_setting_has_a_description_in_one_line() -> None:
    found = dict(settings()) | {
        f"score.parts.{name}": field for name, field in RewardPart.model_fields.items()
    }
    assert len(found) > 90
    for name, field in found.items():
        assert field.description, f"{name} has no description"
        assert "\n" not in field.description


OF_A_RUN = ("audit", "replay", "simulate")


def test_every_section_says_what_it_is() -> None:
    found = dict(sections())
    assert {"run", "learn", "learn.kl", "cluster"} < found.keys()
    for name, model in found.items():
        assert model.__doc__ and model.__doc__.splitlines()[0].endswith("."), name


@pytest.mark.parametrize("command", ["audit", "replay"])
def test_help_of_what_takes_a_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: distrl {command} [-h]") and "run directory" in said
    assert "Exit status 0 only where" in said


def test_a_step_to_replay_to_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("²", "0", "two"):
        with pytest.raises(SystemExit):
            main(["replay", "runs/none", "--until", word])
        assert f"{word!r} is no step; the first one is 1" in capsys.readouterr().err


def test_help_of_simulate_tells_what_it_alone_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    said = capsys.readouterr().out
    assert "--sweep NAME=" in said and "--from RUN" in said
    assert "--simulate.death_rate" in said and "--driver.max_staleness" in said


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in OF_A_RUN])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: distrl {command} [--preset NAME]")
    price = r"0\.2" if command == "demo" else r"0\.05"
    assert re.search(rf"--learn\.kl\.coef FLOAT +{price} +price of a nat of KL", said)
    assert re.search(r"--generate\.dtype NAME +float32 .*\(float32, bfloat16,", said)
    assert re.search(r"--metrics\.wandb +yes ", said)
    assert re.search(r"--learn\.epochs INT +1 ", said), "1 is a number, not a yes"
    assert "learn.kl: The leash" in said
    assert "bai, dapo, demo, grpo, " in said
    for name, _ in settings():
        assert f"--{name}" in said


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_shows_what_the_command_would_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = told(capsys, "demo")
    assert re.search(r"--run\.name TEXT +demo ", demo)
    assert re.search(r"--learn\.lr FLOAT +0\.0006 ", demo)
    assert re.search(r"--learn\.schedule NAME +cosine ", demo)
    assert re.search(r"--sft\.epochs INT +3 ", demo)
    file = tmp_path / "mine.yaml"
    file.write_text("score: {parts: [{name: short, function: 'mine:short'}]}\nlearn: {lr: 0.5}\n")
    for command in ("demo", "train", "simulate"):
        said = told(capsys, command, "--preset", "smollm2", "--config", str(file))
        assert re.search(r"--run\.name TEXT +smollm2 ", said)
        assert re.search(r"--learn\.lr FLOAT +0\.5 ", said)
        assert re.search(r"--score\.parts JSON +short ", said)
    said = told(capsys, "simulate", "--sweep", "generators=1,2", "--sft.epochs", "7")
    assert re.search(r"--sft\.epochs INT +7 ", said)


def test_help_is_there_for_words_that_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"--run\.name TEXT +demo ", told(capsys, "demo", "--learn.lrr", "1"))
    assert re.search(r"--sft\.epochs INT +4 ", told(capsys, "train", "--preset", "nope"))


@pytest.mark.parametrize(
    ("command", "flags"),
    {
        "demo": {"--resume", "--fresh"},
        "train": {"--resume", "--fresh"},
        "sft": {"--fresh"},
        "reward-model": {"--fresh"},
        "evaluate": set(),
        "simulate": set(),
    }.items(),
)
def test_only_flags_that_a_command_honours_are_listed_and_taken(
    command: str, flags: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert set(re.findall(r"^  (--resume|--fresh) ", said, re.MULTILINE)) == flags
    for flag in ("--resume", "--fresh"):
        if flag not in flags:
            assert main([command, "--dry-run", flag]) == 2
            told = capsys.readouterr().err
            assert f"'distrl {command}' takes no {flag}; leave it out" in told and "train" in told
        else:
            assert parse(command, "", [flag]).config


def test_a_demo_cannot_go_on_and_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrl.cli.demo.prepare_stages", lambda *_, **__: pytest.fail("it began"))
    assert main(["demo", "--resume", "--fresh", "--run.root", str(tmp_path)]) == 1
    assert "resume and fresh exclude each other" in capsys.readouterr().err


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert all(command in said for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"distrl \d+\.\d+\S*\n", capsys.readouterr().out)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "no command 'trian'" in said and "reward-model" in said


def test_a_near_miss_gets_a_hint_and_a_far_one_none() -> None:
    assert did_you_mean("driver.max_stalenes") == " (did you mean driver.max_staleness?)"
    assert did_you_mean("quux.zzz") == ""


def test_the_keys_of_a_part_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    _, _, said = " ".join(capsys.readouterr().out.split()).partition("--score.parts JSON")
    said = said.partition("--score.")[0]
    for key in RewardPart.model_fields:
        assert re.search(rf"\b{key}\b", said)
    assert '[{"name": "short", "function": "my_rewards:brevity"}]' in said
