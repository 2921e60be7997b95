"""`distrl train` as a user runs it: a process of its own, real Ray, real vLLM, a tiny recipe.

Few runs, much asked of each, because an engine takes half a minute to start:

- `survivor`: two generators, one of them killed on the way; runs to its end. Once with each
  transport that needs no GPU.
- `interrupted`: synchronous; Ctrl-C after step 3.
- `killed`: the same recipe; kill -9 after step 3, its newest checkpoint damaged, resumed.
- on two machines: two raylets, learner and generator apart; ended by SIGTERM.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from distrl.checkpoint import Checkpoints
from distrl.cli.main import main
from distrl.metrics import read_jsonl, unknown_names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DISTRL = Path(sys.executable).with_name("distrl")
MARK = "DISTRL_TEST_RUN"
SHARED = re.compile(r"/dev/shm/\S+")
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""When all of Ray is killed, these try for a minute to tell it so, and end then."""
START_S = 480
"""Ray and the engines are up within this time, on a loaded machine too."""

RECIPE: dict[str, Any] = {
    "run": {"name": "run", "root": "."},
    "model": {"hidden": 64, "heads": 2, "layers": 2, "vocab": 512, "context": 128},
    "data": {"limit": 500},
    "sft": {"epochs": 1, "batch_tokens": 2048},
    "reward_model": {"epochs": 1, "reference_prompts": 16},
    "generate": {"samples_per_prompt": 2, "max_new_tokens": 100, "kv_cache_gib": 0.1},
    "learn": {"micro_tokens": 1024},
    "driver": {"steps": 6, "prompts_per_step": 4, "checkpoint_every": 1, "keep_checkpoints": 50},
    "metrics": {"table_every": 1},
}


def marked(mark: str) -> list[psutil.Process]:
    """Every living process that carries a mark, whoever its parent is now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def named(process: psutil.Process, prefixes: tuple[str, ...]) -> bool:
    with suppress(psutil.Error):
        return process.name().startswith(prefixes)
    return False


def heed_ctrl_c() -> None:
    """A shell has its background jobs ignore it, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """One `distrl` process, all that it started, and the run directory."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.folder = folder / "run"
        self.mark = uuid.uuid4().hex
        self.shared_memory: set[str] = set()
        self.scratch = Path(tempfile.mkdtemp(prefix="run-"))  # short: sockets are put there
        self._output = folder / f"output-{self.mark}"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [DISTRL, *words, "--config", "recipe.yaml"],
                cwd=folder,
                env={**os.environ, "TMPDIR": str(self.scratch), **environment, MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_ctrl_c,
            )
        threading.Thread(target=self._note_shared_memory, daemon=True).start()

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows()]

    def family(self) -> list[psutil.Process]:
        """Every living process that carries this run's mark, whoever its parent is now."""
        return marked(self.mark)

    def wait_until(self, happened: Callable[[], Any], timeout_s: float = START_S) -> Any:
        """Wait for something while the run lives."""
        deadline = time.monotonic() + timeout_s
        while not (result := happened()):
            assert self.process.poll() is None, f"ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"did not happen in time:\n{self.output}"
            time.sleep(0.5)
        return result

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: step in self.steps())

    def _note_shared_memory(self) -> None:
        """Until the run has ended, what its processes have mapped. In a thread of its own: a
        process that is busy with its own maps keeps a reader waiting for seconds."""
        while self.process.poll() is None:
            for process in self.family():
                with suppress(OSError):
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    self.shared_memory = self.shared_memory | set(SHARED.findall(maps))
            time.sleep(0.5)

    def end(self, timeout_s: float = START_S) -> int:
        """Wait for the exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s:g} s:\n{self.output}")

    def interrupt(self, number: signal.Signals) -> None:
        """As a terminal does: the whole process group gets the signal."""
        os.killpg(self.process.pid, number)

    def assert_nothing_left(self, within_s: float, but: tuple[str, ...] = ()) -> None:
        """No process but those named so, and no file in shared memory."""
        deadline = time.monotonic() + within_s
        while left := [p for p in self.family() if not named(p, but)]:
            assert time.monotonic() < deadline, f"left running after {within_s:g} s: {left}"
            time.sleep(0.2)
        files = [path for path in self.shared_memory if Path(path).exists()]
        assert not files, f"left in shared memory: {files}"
        if not but:  # a run that was not killed itself
            left = list(self.scratch.glob("distrl-*"))
            assert not left, f"left among temporary files: {left}"

    def kill_all(self) -> None:
        for process in self.family():
            process.kill()
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, and its SFT and reward-model stages done."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run = Run(folder, "reward-model", OMP_NUM_THREADS="1")  # two would wait for each other
    try:
        assert run.end() == 0, run.output
    finally:
        run.kill_all()
    assert "SFT: 0.1 M parameters" in run.output
    assert "Reward model: " in run.output
    return folder


@pytest.fixture(scope="module")
def begin(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """`begin("train", ...)` starts a command on a copy of the stages, or in `folder`."""
    runs: list[Run] = []

    def start(*words: str, folder: Path | None = None, **environment: str) -> Run:
        if folder is None:
            folder = tmp_path_factory.mktemp("run") / "here"
            shutil.copytree(stages, folder)
        runs.append(Run(folder, *words, **environment))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()


# -- a run that survives the death of a generator -------------------------------------------------


@pytest.fixture(scope="module", params=["shm", "gloo"])
def survivor(begin: Callable[..., Run], request: pytest.FixtureRequest) -> Run:
    """Two generators; one is killed after the first step, and the run goes on with the other.

    It is stopped for a while before, so that groups are with it that are lost with it.
    """
    slow = ("--generate.max_num_seqs", "1", "--driver.prompts_per_step", "8")
    sync = ("--sync.transport", request.param)
    run = begin("train", "--generate.workers", "2", "--driver.steps", "8", *slow, *sync)
    run.wait_for_step(1)
    generators = [p for p in run.family() if p.name().startswith("ray::GeneratorAc")]
    assert len(generators) == 2, [p.name() for p in run.family()]
    generators[0].suspend()
    time.sleep(3)
    generators[0].kill()
    assert run.end() == 0, run.output
    return run


def test_every_step_is_there_once(survivor: Run) -> None:
    assert survivor.steps() == list(range(1, 9))


def test_a_generators_death_costs_no_prompt(survivor: Run) -> None:
    last = survivor.rows()[-1]
    assert last["driver/restarts"] == 1
    assert last["driver/retries"] >= 1
    assert last["driver/drops"] == 0


def test_the_ledger_proves_it(survivor: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The killed generator's groups were tried again, and the audit holds."""
    assert main(["audit", str(survivor.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] and len(report["findings"]) == 6
    counts = report["counts"]
    assert counts["trained"] == counts["committed"] == counts["prompts issued"] == 64
    assert counts["attempts"] > 64 and report["retries"]


def test_a_replay_gives_the_same_weights(survivor: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(survivor.folder)]) == 0
    assert "8 steps, weights equal to the bit after each" in capsys.readouterr().out


def test_a_simulation_can_be_fitted_to_it(
    survivor: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", str(survivor.folder), "--out", str(tmp_path)]
    assert main(["simulate", *words, "--sweep", "max_staleness=0,1"]) == 0
    points = json.loads((tmp_path / "simulate.json").read_text())
    assert [point["point"] for point in points] == [{"driver.max_staleness": n} for n in (0, 1)]
    assert all(point["audit"] and point["samples_per_second"] > 0 for point in points)
    assert (tmp_path / "simulate.png").exists()
    assert "idle" in capsys.readouterr().out


def test_metrics_are_known_and_within_bounds(survivor: Run) -> None:
    for row in survivor.rows():
        assert not unknown_names(row)
        assert row["staleness/max"] <= 1
        assert len(row["staleness/hist"]) == 2
        if row["staleness/hist"][0]:
            assert row["mismatch/lag0_abs_mean"] < 1e-4
        assert row["samples/total"] == 16 * row["step"]
        assert row["kl/ref"] > -1


def test_weights_were_updated_in_flight(survivor: Run) -> None:
    """Some response has tokens of two versions."""
    rows = read_jsonl(survivor.folder / "tables" / "rollouts.jsonl")
    assert {row["step"] for row in rows} == set(range(1, 9))
    assert any("," in row["versions"] for row in rows), [row["versions"] for row in rows]


def test_the_policy_loads_in_transformers(survivor: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = survivor.folder / "policy"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the film", return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0])
    start = AutoModelForCausalLM.from_pretrained(survivor.folder / "sft" / "policy")
    assert any((a != b).any() for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_wandb_has_the_run_offline(survivor: Run) -> None:
    assert list(survivor.folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_checkpoints_are_whole(survivor: Run) -> None:
    newest = Checkpoints(survivor.folder / "checkpoints", keep=50).latest()
    assert newest is not None
    assert (newest.step, newest.state["step"], newest.state["samples"]) == (8, 8, 128)


def test_the_output_is_for_people(survivor: Run) -> None:
    said = survivor.output
    assert "finished before, reusing" in said
    assert "PPO 8/8  reward" in said
    assert f"policy: {survivor.folder.name}/policy" in said or "policy: run/policy" in said
    assert "WARNING distrl.actors.handles: restarting generator-" in said
    for noise in ("Traceback", "FutureWarning", "INFO", "[W"):
        assert noise not in said, said


def test_the_end_leaves_nothing_behind(survivor: Run) -> None:
    assert survivor.shared_memory, "the engines' shared memory was looked for in vain"
    survivor.assert_nothing_left(within_s=10)


# -- Ctrl-C, kill -9, and what synchronous runs have in common ------------------------------------

SYNCHRONOUS = ("--driver.max_staleness", "0", "--driver.steps", "40")


@pytest.fixture(scope="module")
def interrupted(begin: Callable[..., Run]) -> Run:
    run = begin("train", *SYNCHRONOUS)
    run.wait_for_step(3)
    run.interrupt(signal.SIGINT)
    run.end(60)
    return run


@pytest.fixture(scope="module")
def killed(begin: Callable[..., Run]) -> Run:
    run = begin("train", *SYNCHRONOUS)
    run.wait_for_step(3)
    run.wait_until((run.folder / "checkpoints" / "step_000003" / "COMMITTED").exists)
    run.process.kill()
    run.end(10)
    return run


def test_ctrl_c_ends_with_a_checkpoint(interrupted: Run) -> None:
    assert interrupted.process.returncode == 75, interrupted.output
    steps = interrupted.steps()
    assert steps == list(range(1, steps[-1] + 1))
    newest = Checkpoints(interrupted.folder / "checkpoints", keep=50).latest()
    assert newest is not None and newest.step == steps[-1]
    said = interrupted.output
    assert "stopping after this step" in said
    assert f"stopped after step {steps[-1]} of 40" in said and "--resume" in said
    assert "Traceback" not in said and "(raylet)" not in said, said


def test_ctrl_c_leaves_nothing_behind(interrupted: Run) -> None:
    interrupted.assert_nothing_left(within_s=10)


def test_ctrl_c_while_the_actors_start(begin: Callable[..., Run]) -> None:
    run = begin("train")
    log = run.folder / "logs" / "generator-0.log"
    # vLLM's first word from there: the engine's own process comes next. Asked of the file, as to
    # look through all processes may take, on a busy machine, longer than an engine's start.
    run.wait_until(lambda: log.exists() and "MainProcess" in log.read_text(errors="replace"))
    time.sleep(2)
    run.interrupt(signal.SIGINT)
    assert run.end(60) == 130, run.output
    assert "distrl train: interrupted" in run.output
    assert "Traceback" not in run.output, run.output
    run.assert_nothing_left(within_s=15)


def test_kill_9_leaves_nothing_behind(killed: Run) -> None:
    assert killed.process.returncode == -signal.SIGKILL
    killed.assert_nothing_left(within_s=30, but=RAY_AGENTS)


def test_a_synchronous_run_is_the_same_to_the_bit(interrupted: Run, killed: Run) -> None:
    """Policy, critic and both optimizers after step 3, and what was measured on the way."""
    for name in ("policy", "critic", "policy_optimizer", "critic_optimizer"):
        path = Path("checkpoints", "step_000003", "learner", f"{name}.safetensors")
        assert sha256(interrupted.folder / path) == sha256(killed.folder / path), name
    for mine, other in zip(interrupted.rows()[:3], killed.rows()[:3], strict=True):
        assert mine["staleness/max"] == 0
        same = {k for k in mine if k.split("/")[0] in {"reward", "kl", "loss", "value", "ppo"}}
        assert len(same) > 10
        assert {k: mine[k] for k in same} == {k: other[k] for k in same}


def test_resume_after_kill_9_and_a_damaged_checkpoint(
    killed: Run, begin: Callable[..., Run]
) -> None:
    killed.assert_nothing_left(within_s=30, but=RAY_AGENTS)
    newest = max(Checkpoints(killed.folder / "checkpoints").committed())
    weights = killed.folder / f"checkpoints/step_{newest:06d}/learner/policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    last = newest + 1

    words = ("--driver.max_staleness", "0", "--driver.steps", str(last))
    refused = begin("train", *words, folder=killed.folder.parent)
    assert refused.end(60) == 1
    assert "--resume" in refused.output

    scratch = {"TMPDIR": str(killed.scratch)}  # where it finds what the killed run left
    resumed = begin("train", "--resume", *words, folder=killed.folder.parent, **scratch)
    assert resumed.end() == 0, resumed.output
    said = " ".join(resumed.output.split())
    assert "skipping torn checkpoint" in said and f"step_{newest:06d}" in said
    assert f"going on after step {newest - 1}" in said
    assert resumed.steps() == list(range(1, last + 1))
    assert [row["samples/total"] for row in resumed.rows()] == [8 * k for k in range(1, last + 1)]
    tables = read_jsonl(resumed.folder / "tables" / "rollouts.jsonl")
    assert len({(row["step"], row["prompt"], row["response"]) for row in tables}) == len(tables)
    ids = {json.loads(m.read_text())["state"]["wandb_id"] for m in manifests(resumed)}
    assert len(ids) == 1, "one W&B run"
    assert (resumed.folder / "policy" / "model.safetensors").exists()
    assert main(["audit", str(resumed.folder)]) == 0, "rolled back, tried again, counted once"
    assert main(["replay", str(resumed.folder)]) == 0, "through the kill and the resume"
    resumed.assert_nothing_left(within_s=10)
    killed.assert_nothing_left(within_s=60)  # by now the agents too


def manifests(run: Run) -> list[Path]:
    return list(run.folder.glob("checkpoints/step_*/manifest.json"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- a learner of two processes -------------------------------------------------------------------


def test_two_ranks_share_the_learner_and_one_goes_on_from_there(
    interrupted: Run, begin: Callable[..., Run]
) -> None:
    """The first step is on the same rollouts as that of a run with one; later ones drift apart
    by roundings."""
    run = begin("train", "--learn.ranks", "2", *SYNCHRONOUS[:-2], "--driver.steps", "2")
    assert run.end() == 0, run.output
    mine, other = run.rows()[0], interrupted.rows()[0]
    for name in ("reward/mean", "kl/ref", "loss/policy", "value/loss", "ppo/entropy", "grad/norm"):
        assert mine[name] == pytest.approx(other[name], abs=1e-4), name
    halves = run.folder.glob("checkpoints/step_000002/learner/policy.*-of-00002.safetensors")
    assert len(list(halves)) == 2
    run.assert_nothing_left(within_s=10)


# -- a cluster that is already there: two machines, by the look of it ------------------------------


@pytest.fixture
def machines() -> Iterator[tuple[str, dict[str, str], str]]:
    """Two raylets with two CPUs each and token authentication: (address, environment, mark)."""
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets there
    token, mark = uuid.uuid4().hex, uuid.uuid4().hex
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"]
    nodes: list[subprocess.Popen[bytes]] = []
    for which in (head, [f"--address={address}"]):
        nodes.append(start_ray(which, {**os.environ, **secret, MARK: mark}, Path(scratch)))
    yield address, secret, mark
    for node in reversed(nodes):
        node.terminate()
        node.wait(60)
    left = marked(mark)
    for process in left:
        process.kill()
    shutil.rmtree(scratch, ignore_errors=True)


def start_ray(words: list[str], env: dict[str, str], scratch: Path) -> subprocess.Popen[bytes]:
    """`ray start --block`, ready; its children end with it."""
    log = scratch / f"node-{uuid.uuid4().hex}.log"
    command = [DISTRL.with_name("ray"), "start", *words, "--num-cpus=2", "--block"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    command += [f"--temp-dir={scratch}", "--node-ip-address=127.0.0.1"]
    with log.open("wb") as output:
        node = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    return node


def test_learner_and_generator_on_two_machines(
    machines: tuple[str, dict[str, str], str], begin: Callable[..., Run]
) -> None:
    """Each machine has room for one of the two, so weights are relayed; adapters are what learns,
    and the engine gets them merged; generation runs ahead of the bound, and what got too old is
    dropped; SIGTERM ends it."""
    address, secret, mark = machines
    placement = ("--learn.cpus", "1.5", "--generate.cpus", "1.5", "--cluster.address", address)
    ahead = ("--driver.lead", "3", "--driver.on_stale", "drop", "--driver.window", "2")
    lora = ("--learn.lora.rank", "4", "--learn.lr", "3e-3")
    run = begin("train", *placement, *ahead, *lora, "--driver.steps", "40", **secret)
    run.wait_for_step(4)
    actors = {p.name()[:9]: p for p in marked(mark) if p.name().startswith("ray::")}
    generator, learner = actors["ray::Gene"], actors["ray::Lear"]
    assert generator.ppid() != learner.ppid(), "both on one machine"
    held = [os.readlink(link) for link in Path(f"/proc/{generator.pid}/fd").iterdir()]
    assert any("distrl-weights" in file for file in held), "the generator holds no relayed image"

    run.process.send_signal(signal.SIGTERM)
    assert run.end(60) == 75, run.output
    steps = run.steps()
    assert steps == list(range(1, steps[-1] + 1))
    lag0 = [row["mismatch/lag0_abs_mean"] for row in run.rows() if "mismatch/lag0_abs_mean" in row]
    assert lag0 and max(lag0) < 1e-4
    assert run.rows()[-1]["kl/ref"] != 0, "the adapters have not reached the engine"
    assert max(row["staleness/max"] for row in run.rows()) <= 1
    assert max(row["driver/lead"] for row in run.rows()) > 1, "it ran ahead of the bound"
    assert main(["audit", str(run.folder)]) == 0
    run.assert_nothing_left(within_s=10)
    names = ("ray::Gene", "ray::Lear", "ray::Scor", "VLLM")
    deadline = time.monotonic() + 10
    while left := [p for p in marked(mark) if named(p, names)]:
        assert time.monotonic() < deadline, f"left on the cluster: {left}"
        time.sleep(0.5)
