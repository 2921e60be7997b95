"""`distrl simulate` and `distrl audit` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distrl.checkpoint import Checkpoints
from distrl.cli.main import main
from distrl.config import Config, dump_yaml
from distrl.driver.ledger_file import LedgerFile
from distrl.sim.simulate import simulate

SMALL = ["--driver.steps", "4", "--driver.prompts_per_step", "4", "--generate.workers", "2"]


def simulated(tmp_path: Path, *words: str) -> tuple[int, list[dict]]:
    status = main(["simulate", *SMALL, "--out", str(tmp_path), *words])
    return status, json.loads((tmp_path / "simulate.json").read_text())


def test_one_run_says_what_it_would_come_to(tmp_path, capsys):
    status, (point,) = simulated(tmp_path)
    assert status == 0 and point["audit"] is True and point["steps"] == 4
    assert point["samples"] == 64 and set(point["idle"]) == {"generators", "scorers", "learner"}
    said = capsys.readouterr().out
    assert "4 steps in" in said and "holds" in said


def test_a_sweep_of_two_settings_gives_every_combination_and_a_picture(tmp_path, capsys):
    status, points = simulated(
        tmp_path, "--sweep", "generators=1,2", "--sweep", "driver.max_staleness=0,1,2"
    )
    assert status == 0 and len(points) == 6
    assert points[0]["point"] == {"generate.workers": 1, "driver.max_staleness": 0}
    assert (tmp_path / "simulate.png").stat().st_size > 1000
    assert "Simulated runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sweep", "values", "drawn"),
    [
        ("generators=4,1,2", [4, 1, 2], [1, 2, 4]),
        ("simulate.learn_token_s=1e-3,1e-5", [1e-3, 1e-5], [1e-5, 1e-3]),
        ("driver.lead=None,4,null", [None, 4, None], ["None", "4", "None"]),
        ("simulate.lengths=[10,20],[30]", [[10, 20], [30]], ["[10, 20]", "[30]"]),
    ],
)
def test_a_picture_is_in_the_order_of_its_numbers(
    tmp_path, capsys, monkeypatch, sweep, values, drawn
):
    """However they were written; nothing that was simulated is missing from it."""
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda _, x, y, **how: lines.append(list(x)))
    _, points = simulated(tmp_path, "--sweep", sweep)
    assert [value for point in points for value in point["point"].values()] == values
    assert lines == [drawn]


def test_columns_of_settings_that_are_called_alike_have_their_full_names(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    sweeps = ("generators=1,2", "scorers=1,2", "max_staleness=1")
    simulated(tmp_path, *(word for sweep in sweeps for word in ("--sweep", sweep)))
    header = next(line for line in capsys.readouterr().out.splitlines() if "samples/s" in line)
    assert "generate.workers" in header and "score.workers" in header
    assert "max_staleness" in header and "driver.max_staleness" not in header


def test_help_promises_a_picture_of_a_sweep_alone(capsys):
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    assert "write simulate.json there, and simulate.png of a sweep" in capsys.readouterr().out


def test_a_single_run_leaves_no_picture_of_an_earlier_sweep(tmp_path, capsys):
    simulated(tmp_path, "--sweep", "generators=1,2")
    assert (tmp_path / "simulate.png").exists()
    simulated(tmp_path)
    assert not (tmp_path / "simulate.png").exists()


def test_what_a_simulation_does_not_depend_on_is_said(tmp_path, capsys):
    sweeps = ("learn.compile=true,false", "driver.checkpoint_every=1,2", "scorers=1,2")
    simulated(tmp_path, *(word for sweep in sweeps for word in ("--sweep", sweep)))
    said = capsys.readouterr().out
    assert "--sweep learn.compile: a simulation does not depend on it" in said
    assert "--sweep driver.checkpoint_every: a sim" in said and "score.workers: a sim" not in said
    assert "driver.skip_without_signal" not in said

    group = ("--learn.advantage.kind", "group", "--driver.skip_without_signal")
    simulated(tmp_path, *group)
    assert "driver.skip_without_signal: a simulation has no rewards" in capsys.readouterr().out


def test_a_dry_run_prints_the_range_of_many_values(tmp_path, capsys):
    many = json.dumps(list(range(5, 1005)))
    assert main(["simulate", "--dry-run", "--simulate.lengths", many]) == 0
    said = capsys.readouterr().out
    assert "1,000 values of the run, 5 to 1004" in said and len(said.splitlines()) < 400
    names = json.dumps([f"layer_{place}" for place in range(30)])
    assert main(["simulate", "--dry-run", "--learn.lora.targets", names]) == 0


def test_what_cannot_be_simulated_is_told_before_anything_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distrl.cli.simulate.simulate", lambda *_: pytest.fail("simulated"))
    out = tmp_path / "out"
    assert main(["simulate", *SMALL, "--out", str(out), "--sweep", "generators=1,2,0"]) == 2
    assert "generate.workers" in capsys.readouterr().err
    out.write_text("a file")
    assert main(["simulate", *SMALL, "--out", str(out)]) == 2
    assert f"--out {out} is a file" in capsys.readouterr().err


def test_a_replay_has_a_first_step(tmp_path, capsys):
    for step in ("0", "-3", "x"):
        with pytest.raises(SystemExit):
            main(["replay", str(tmp_path), f"--until={step}"])
        assert "is no step; the first one is 1" in capsys.readouterr().err


def test_faults_and_auto_by_the_settings(tmp_path, capsys):
    status, (point,) = simulated(
        tmp_path, "--simulate.fail_rate", "0.2", "--driver.max_staleness", "auto"
    )
    assert status == 0 and point["retries"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no data whose effective sample size could hold the bound down" in said


def test_what_a_run_cannot_tell_of_its_engines_is_said(tmp_path, capsys):
    run = Config.model_validate(
        {"driver": {"steps": 5, "max_staleness": 0}, "simulate": {"length_sigma": 0}}
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    rows = simulate(run, tmp_path / "ledger.sqlite").rows
    lines = [json.dumps({"step": n, **row}) for n, row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out = str(tmp_path / "out")
    assert main(["simulate", "--from", str(tmp_path), "--out", out]) == 0
    assert f"--from {tmp_path}: its groups ran in like company" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "trouble"),
    [
        (["--sweep", "generators"], "should be NAME=V1,V2"),
        (["--sweep", "max_staleness=0,["], "--sweep max_staleness=0,[: should be NAME=V1,V2"),
        (["--sweep", "scorers=1", "--sweep", "score.workers=2"], "names a setting twice"),
        (["--sweep", "driver.nothing=1,2"], "no such setting"),
        (["--from", "nowhere"], "has no config.yaml; --from takes a run directory"),
        (["--simulate.jitter", "-1"], "simulate.jitter"),
    ],
)
def test_bad_words_are_told(tmp_path, capsys, words, trouble):
    assert main(["simulate", *SMALL, "--out", str(tmp_path), *words]) == 2
    assert trouble in capsys.readouterr().err


def test_a_run_without_a_ledger_or_times_is_told(tmp_path, capsys):
    assert main(["audit", str(tmp_path)]) == 1
    assert "there is no ledger" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    assert main(["simulate", "--from", str(tmp_path)]) == 1
    assert "is this a run directory" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' * 5)
    LedgerFile(tmp_path / "ledger.sqlite").close()
    before = (tmp_path / "ledger.sqlite").read_bytes()
    assert main(["simulate", "--from", str(tmp_path)]) == 1
    assert "no times of steps" in capsys.readouterr().err
    assert (tmp_path / "ledger.sqlite").read_bytes() == before
    assert main(["replay", str(tmp_path)]) == 1
    assert "no recorded step" in capsys.readouterr().err


def test_an_empty_run_breaks_no_promise(tmp_path, capsys):
    LedgerFile(tmp_path / "ledger.sqlite").close()
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["audit", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["prompts issued"] == 0


def test_the_newest_checkpoint_says_how_far_the_ledger_must_go(tmp_path, capsys):
    """Steps that were taken with the ledger off are none that it was only about to write."""
    LedgerFile(tmp_path / "ledger.sqlite")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert main(["audit", str(tmp_path)]) == 0
    assert "step 2 is still open" in " ".join(capsys.readouterr().out.split())
    with Checkpoints(tmp_path / "checkpoints").write(2, {"step": 2, "ledger": None}) as folder:
        (folder / "x").write_text("x")
    assert main(["audit", str(tmp_path)]) == 1
    assert "step 2 is not in the ledger" in " ".join(capsys.readouterr().out.split())
