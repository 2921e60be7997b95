"""`distrl train`: PPO on real actors. Only here are all the parts wired together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import signal
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distrl.actors.cluster import check_local_gpus, connected, demands
from distrl.actors.launch import launched
from distrl.checkpoint import Checkpoint, Checkpoints, RunDir, RunDirError
from distrl.cli.checks import (
    check_models,
    check_rows,
    check_what_is_there,
    known_policy,
    pretrain_rows,
    rows_are_here,
)
from distrl.cli.options import Options
from distrl.cli.origin import check_origin, origin_of
from distrl.cli.plan import print_plan
from distrl.cli.stages import (
    check_claim,
    check_context,
    check_functions,
    check_kept,
    claimed,
    ensure_reward_model,
    ensure_sft,
    outlook,
    policy_folder,
    reward_model_folder,
    scored_by,
)
from distrl.config import Config, ConfigError
from distrl.data.sources import load_prompts
from distrl.data.stream import PromptStream
from distrl.data.tokenizer import load_tokenizer
from distrl.driver.driver import Driver
from distrl.driver.ledger import FileLedger, Ledger
from distrl.driver.ledger_file import OTHERWISE, LedgerError, LedgerFile
from distrl.driver.state import Start, Summary
from distrl.learn.pretrain import save_examples
from distrl.learn.sft import encode
from distrl.metrics import (
    ConsoleSink,
    JSONLSink,
    MultiSink,
    Sink,
    WandbSink,
    new_run_id,
    rewind_run,
)
from distrl.models.folder import META_FILE
from distrl.roles import PayloadLost

logger = logging.getLogger(__name__)

STOPPED = 75
"""Exit status of a run that was stopped and can be resumed (EX_TEMPFAIL of sysexits.h)."""


def run(options: Options) -> int:
    if options.resume:
        check_there_is_a_run(options.config)
    if options.dry_run:
        print_plan(options.config, outlook(options.config))
        check_claim(options.config, resume=options.resume, fresh=options.fresh)
        if rows_are_here(options.config):
            check_rows(options.config)
        return 0
    with claimed(options.config, resume=options.resume, fresh=options.fresh) as directory:
        if options.resume and finished(options.config, directory):
            print(
                f"PPO: all {options.config.driver.steps} steps were taken before, the policy is in "
                f"{directory.policy}; raise --driver.steps to go on",
                flush=True,
            )
            return 0
        prepare_stages(options.config, directory, fresh=False)
        return report(options.config, train(options, directory))


def prepare_stages(
    config: Config, directory: RunDir, *, fresh: bool, evaluates: bool = False
) -> None:
    """The stages that PPO stands on, and every check that needs no actor; what is refused before
    the first stage leaves the directory as it was. `evaluates` where an evaluation follows at once.
    """
    if config.cluster.address is None:  # said now, not when SFT is over
        check_local_gpus(demands(config))
    check_kept(config, directory)
    check_functions(config)
    check_context(config)
    tokenizer_is_there = known_policy(config) is not None
    check_what_is_there(config)
    check_rows(config, evaluates=evaluates)
    directory.begin()
    ensure_sft(config, fresh=fresh)
    if not tokenizer_is_there:
        check_what_is_there(config)
        check_rows(config, evaluates=evaluates)
    ensure_reward_model(config, fresh=fresh)


def check_there_is_a_run(config: Config) -> None:
    """RunDirError where `--resume` would begin a run: the name is not what was meant."""
    directory = RunDir(config.run.dir)
    if not directory.config.exists():
        others = sorted(path.parent.name for path in config.run.root.glob("*/config.yaml"))
        raise RunDirError(
            f"{directory.path} holds no run to go on with; {config.run.root} has "
            f"{', '.join(others) or 'none'}. Name one by --run.name, or leave out --resume"
        )


def finished(config: Config, directory: RunDir) -> bool:
    """Whether all steps were taken, and the policy that came of the last one is written."""
    newest = max(Checkpoints(directory.checkpoints).committed(), default=0)
    try:
        written = json.loads((directory.policy / META_FILE).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):  # no mark, or it is damaged
        return False
    return newest >= config.driver.steps and written == newest


def report(config: Config, summary: Summary) -> int:
    """Say how a run ended; returns the exit status."""
    where, dropped = config.run.dir, ""
    if count := sum(summary.drops.values()):
        listed = f" ('distrl audit {where}' lists them)" * config.driver.ledger
        dropped = f"; {count:,} groups dropped{listed}"
    if summary.stopped:
        kept = f"; the checkpoint is in {where / 'checkpoints'}" if summary.step else ""
        print(
            f"stopped after step {summary.step} of {config.driver.steps}{kept}{dropped}. Go on "
            "with the same command and --resume",
            flush=True,
        )
        return STOPPED
    print(
        f"PPO: {summary.step} steps, {summary.samples:,} samples, {summary.tokens:,} tokens, "
        + f"{summary.steps} of the steps now: " * (summary.steps != summary.step)
        + f"{summary.seconds:.0f} s; policy: {where / 'policy'}{dropped}",
        flush=True,
    )
    return 0


def train(options: Options, directory: RunDir) -> Summary:
    """Run PPO in the claimed run directory, from nothing or from its newest checkpoint."""
    config = options.config
    policy, reward_model = policy_folder(config), reward_model_folder(config)
    config = config.model_copy(update={"score": scored_by(config)})
    source = prompt_stream(config, policy)
    check_models(config, policy, reward_model)
    origin = origin_of(config, policy)
    checkpoints = Checkpoints(
        directory.checkpoints,
        config.driver.keep_checkpoints,
        first_bytes=checkpoint_bytes(config, policy, reward_model),
    )
    checkpoints.check_space()
    newest = checkpoints.latest() if options.resume else None
    if newest is not None:
        check_origin(newest, origin)
    if config.learn.pretrain.coef:
        write_pretrain(config, policy, directory.pretrain)
    if newest is None:  # of a life before the first checkpoint
        shutil.rmtree(directory.recording, ignore_errors=True)
    else:
        print(f"PPO: going on after step {newest.step}, from {newest.path}", flush=True)
    with contextlib.closing(open_ledger(config, directory, newest)) as ledger:
        # After the ledger, which may refuse. A run that is killed between the two has rows without
        # a step, which are open; many steps without a row would be a breach (`driver/audit.py`).
        rewind_run(directory.path, newest.step if newest else 0)
        with connected(config):
            work = _train(
                config, directory, checkpoints, newest, source, policy, reward_model, ledger, origin
            )
            return asyncio.run(_interrupted_by_term(work))


def checkpoint_bytes(config: Config, policy: Path, reward_model: Path | None) -> int:
    """Bytes that a checkpoint takes at least: each weight that learns, and Adam's two moments of
    it. 0 where adapters or moments of 8 bits make it small."""
    learn = config.learn
    if learn.lora.rank or learn.adam_bits == 8:
        return 0
    models = [policy]
    if learn.has_critic and learn.value.trunk == "separate":
        from_rewards = learn.value.start == "reward_model"
        models.append((reward_model if from_rewards else None) or policy)
    files = [file for folder in models for file in folder.glob("model*.safetensors")]
    return 3 * sum(file.stat().st_size for file in files)


def open_ledger(config: Config, directory: RunDir, newest: Checkpoint | None) -> Ledger:
    """The run's ledger, with what was not committed rolled back. Raises LedgerError."""
    if not config.driver.ledger:
        return Ledger()
    if newest and newest.step and newest.state.get("ledger") is None and directory.ledger.exists():
        raise LedgerError(
            f"{directory.ledger} has a hole: the checkpoint of step {newest.step} was written with "
            f"the ledger off; {OTHERWISE}"
        )
    file = LedgerFile(
        directory.ledger,
        step=newest.step if newest else 0,
        cursor=newest.state["cursor"] if newest else 0,
        ahead=newest.state.get("ahead", ()) if newest else (),
        run_id=newest.state.get("ledger") if newest else None,
    )
    return FileLedger(file, time.monotonic, offset_s=time.time() - time.monotonic())


def write_pretrain(config: Config, policy: Path, path: Path) -> None:
    """The texts for PPO-ptx, shuffled. Raises DataError, or ConfigError where there are
    none, before any actor starts."""
    rows = pretrain_rows(config)
    examples, _ = encode(rows, load_tokenizer(policy), config.sft_tokens)
    order = np.random.default_rng(config.run.seed).permutation(len(examples))
    try:
        save_examples([examples[place].ids.tolist() for place in order], path)
    except ValueError as error:
        raise ConfigError(
            f"learn.pretrain.coef={config.learn.pretrain.coef} needs text to train on: "
            f"{error} within sft.max_tokens={config.sft_tokens}; raise that, see the data section, "
            "or set it to 0"
        ) from None


def prompt_stream(config: Config, policy: Path) -> PromptStream:
    """The training prompts. Raises DataError or ConfigError before any actor starts."""
    tokenizer = load_tokenizer(policy)
    rows = load_prompts(config.data, tokenizer, "train")
    if not rows:
        raise ConfigError(f"data.source={config.data.source} has no training prompt")
    return PromptStream(rows, seed=config.run.seed)


async def _train(
    config: Config,
    directory: RunDir,
    checkpoints: Checkpoints,
    newest: Checkpoint | None,
    source: PromptStream,
    policy: Path,
    reward_model: Path | None,
    ledger: Ledger,
    origin: dict[str, str],
) -> Summary:
    start = Start.from_state(newest.state, newest.path) if newest else Start()
    wandb_id = newest.state["wandb_id"] if newest else new_run_id()
    print(
        f"starting {config.generate.workers} generator(s), {config.score.workers} scorer(s) and "
        f"the learner (vLLM takes half a minute); logs: {directory.logs}",
        flush=True,
    )
    async with launched(
        config,
        policy=policy,
        reward_model=reward_model,
        logs=directory.logs,
        recording=directory.recording,
        pretrain=directory.pretrain,
        step=start.step,
    ) as cast:
        sink = _sink(config, directory, start, wandb_id)
        driver = Driver(
            config.driver,
            source=source,
            generators=cast.generators,
            scorers=cast.scorers,
            learner=cast.learner,
            sink=sink,
            checkpoints=checkpoints,
            samples_per_prompt=config.generate.samples_per_prompt,
            start=start,
            on_rollouts=_Tables(config, sink),
            extra_state={"wandb_id": wandb_id, "origin": origin},
            ledger=ledger,
        )
        try:
            summary = await _until_signal(driver)
        finally:
            sink.close()
        if not summary.stopped:
            await cast.learner.export(directory.policy)
        return summary


async def _interrupted_by_term(work: Coroutine[Any, Any, Summary]) -> Summary:
    """Until the driver runs, SIGTERM is as Ctrl-C: it would abort in the midst of starting actors,
    by the handler that Ray has set when it connected."""
    working = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, working.cancel)
    try:
        return await working
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def _until_signal(driver: Driver) -> Summary:
    """Run the driver; the first Ctrl-C or SIGTERM stops it with a checkpoint, a second at once."""
    running = asyncio.ensure_future(driver.run())
    loop = asyncio.get_running_loop()
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked:
            running.cancel()
        else:
            asked = True
            print("\nstopping after this step; again to stop at once", flush=True)
            driver.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await running
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if (whole := asyncio.current_task()) is not None:  # the policy is still to be written
            loop.add_signal_handler(signal.SIGTERM, whole.cancel)


def _sink(config: Config, directory: RunDir, start: Start, wandb_id: str) -> Sink:
    sinks: list[Sink] = [
        JSONLSink(directory.metrics),
        ConsoleSink(config.driver.steps, start=start.step),
    ]
    if config.metrics.wandb:
        sinks.append(
            WandbSink(
                directory.path,
                project=config.metrics.wandb_project,
                name=config.run.name,
                config=config.model_dump(mode="json"),
                run_id=wandb_id,
            )
        )
    return MultiSink(*sinks)


class _Tables:
    """Every k steps a few rollouts, for people to read."""

    COLUMNS = ("step", "prompt", "response", "reward", "parts", "versions", "finish_reason")

    def __init__(self, config: Config, sink: Sink) -> None:
        self._every, self._rows = config.metrics.table_every, config.metrics.table_rows
        self._sink = sink

    async def __call__(self, step: int, payloads: Sequence[Any]) -> None:
        if step % self._every and step != 1:
            return
        rows = []
        for payload in payloads[: self._rows]:
            try:
                group = await payload
            except PayloadLost as lost:  # it was trained on; people can do without it
                logger.warning("not in the table of step %d: %s", step, lost)
                continue
            sample, score = group.rollout.samples[0], group.scores[0]
            versions = sorted({span.version for span in sample.spans})
            rows.append(
                [
                    step,
                    group.rollout.prompt.text,
                    sample.text,
                    score.value,
                    ", ".join(f"{name} {value:.3g}" for name, value in score.parts.items()),
                    ", ".join(str(version) for version in versions),
                    sample.finish_reason,
                ]
            )
        self._sink.table(step, "rollouts", self.COLUMNS, rows)
