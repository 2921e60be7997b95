"""`distrl evaluate`: the trained policy against the one it started from.

What the run was made with (its config.yaml) holds, but for what the command line says otherwise:
another temperature, or weights that are not averaged, would be another policy's figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distrl.actors.launch import learner_spec
from distrl.actors.process import log_to, tail
from distrl.checkpoint import Checkpoints, RunDir
from distrl.cli.checks import check_held_out_prompts, rows_are_here
from distrl.cli.options import Options
from distrl.cli.origin import check_same_start, policy_origin
from distrl.cli.plan import print_plan
from distrl.cli.stages import policy_folder, reward_model_folder, scored_by
from distrl.config import Config, ConfigError
from distrl.data.order import permutation
from distrl.data.sources import PromptRow, load_prompts
from distrl.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from distrl.disk import writing
from distrl.evaluate import Comparison, compare, evaluate_policy, resolve_judge
from distrl.evaluate.report import NothingToPlot, plot_reward_vs_kl, print_report, write_json
from distrl.generate.engine import EngineSpec
from distrl.generate.generator import VLLMGenerator
from distrl.learn.learner import PolicyLearner
from distrl.learn.names import CheckpointNames
from distrl.models import load_policy
from distrl.models.load import checked_folder
from distrl.records import Prompt
from distrl.roles import EngineFailed, WorkerDied
from distrl.score import LocalScorer
from distrl.sync.canary import publish_model
from distrl.sync.memory import SharedMemoryPublisher


def run(options: Options) -> int:
    if options.dry_run:
        print_plan(options.config)
        if rows_are_here(options.config):
            check_held_out_prompts(options.config)
        return 0
    evaluate(options.config)
    return 0


def evaluate(config: Config) -> Comparison:
    """Compare a policy of the run with the one that PPO started from.

    Prints the table, and writes evaluation.json and reward_vs_kl.png to the run directory; of a
    policy that is not the final one, evaluation_<its name>.json alone.
    """
    directory = RunDir(config.run.dir)
    before = policy_folder(config)
    check_same_start(directory, policy_origin(config, before), "a comparison with it")
    with candidate(config, directory) as (name, after):
        prompts = held_out_prompts(config, before)
        label = "PPO" if config.evaluate.policy is None else name
        print(
            f"evaluating on {len(prompts)} held-out prompts (vLLM takes half a minute)", flush=True
        )
        log = directory.logs / "evaluator.log"
        try:
            with output_to(log):
                comparison = asyncio.run(_compare(config, before, (label, after), prompts))
        except EngineFailed as error:
            raise WorkerDied(f"{error}\n{tail(log)}") from error
    print_report(comparison, config.evaluate.samples_shown)
    with writing("the evaluation", directory.path, "evaluate again"):
        if config.evaluate.policy is not None:
            write_json(comparison, directory.path / f"evaluation_{name}.json")
            return comparison
        write_json(comparison, directory.path / "evaluation.json")
        plot(directory, comparison)
    return comparison


def plot(directory: RunDir, comparison: Comparison | None) -> None:
    """Reward against KL over the run, or a word where none was measured."""
    try:
        plot_reward_vs_kl(directory.metrics, directory.path / "reward_vs_kl.png", comparison)
    except NothingToPlot as error:
        print(f"no reward_vs_kl.png: {error}; learn.kl.watch=true measures the KL", flush=True)


@contextlib.contextmanager
def candidate(config: Config, directory: RunDir) -> Iterator[tuple[str, Path]]:
    """The name and the folder of what `evaluate.policy` says, for as long as the block lasts.

    Raises ConfigError or CheckpointError where it is not there.
    """
    wanted = config.evaluate.policy
    if wanted is None:
        if not directory.policy.exists():
            raise ConfigError(
                f"{directory.policy} is not there yet; 'distrl train' ends with it. To evaluate a "
                "checkpoint on the way, name its step: --evaluate.policy 20"
            )
        yield "final", directory.policy
    elif wanted.isdecimal():
        checkpoint = Checkpoints(directory.checkpoints).at(int(wanted))
        with tempfile.TemporaryDirectory(prefix="distrl-evaluate-") as scratch:
            folder = Path(scratch) / "policy"
            _export(config, directory, checkpoint.path / "learner", folder)
            yield checkpoint.path.name, folder
    else:
        folder, before = checked_folder(wanted), policy_folder(config)
        own, theirs = (tokenizer_fingerprint(load_tokenizer(each)) for each in (before, folder))
        if own != theirs:
            raise ConfigError(
                f"the policy in {folder} has another tokenizer than the one in {before}, which the "
                "run began with: they would not read the same prompts. Evaluate it with a run of "
                "its own"
            )
        whole = folder.resolve()  # what a run writes is called "policy", all of it
        yield whole.parent.name if whole.name == directory.policy.name else whole.name, folder


def _export(config: Config, directory: RunDir, state: Path, folder: Path) -> None:
    """What a learner of that state would export: weights averaged, adapters merged."""
    spec = learner_spec(
        config,
        policy_folder(config),
        reward_model_folder(config),
        folder.parent,
        pretrain=directory.pretrain,
    )
    learner = PolicyLearner(spec)
    try:
        learner.load(state)
        learner.export(folder)
    finally:
        learner.close()


def held_out_prompts(config: Config, policy: Path) -> list[Prompt]:
    """`evaluate.prompts` of the test split, drawn by the run's seed: files are often sorted
    (the reviews are, by how good they are), so the first rows would not stand for all."""
    rows = load_prompts(config.data, load_tokenizer(policy), "test")
    drawn = permutation(len(rows), config.run.seed)[: config.evaluate.prompts]
    return [_prompt(index, rows[place]) for index, place in enumerate(drawn)]


async def _compare(
    config: Config, before: Path, after: tuple[str, Path], prompts: list[Prompt]
) -> Comparison:
    scorer = LocalScorer(scored_by(config), load_tokenizer(before))
    judge = resolve_judge(config.evaluate.judge) if config.evaluate.judge else None
    if judge is not None:
        judge("A text to try it on, before an engine is started.")
    here = config.sync.model_copy(update={"transport": "shm"})  # there is no learner to send
    generator = VLLMGenerator("evaluator", _spec(config, before), here)
    publisher = SharedMemoryPublisher()
    try:
        await generator.start()
        evaluations = []
        for version, (name, folder) in enumerate([("SFT", before), after]):
            model = load_policy(folder)
            weights = publish_model(
                model,
                publisher,
                state=CheckpointNames(model).of(model.state_dict()),
                version=version,
                vocab=len(generator.tokenizer),
                probe_tokens=config.sync.canary_tokens,
            )
            await generator.load_weights(weights)
            evaluations.append(
                await evaluate_policy(
                    name,
                    folder,
                    before,
                    generator,
                    scorer,
                    prompts,
                    judge=judge,
                    temperature=config.generate.temperature,
                )
            )
    finally:
        await generator.close()
        await scorer.close()
        publisher.close()
    return compare(*evaluations, resamples=config.evaluate.bootstrap, seed=config.run.seed)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Within it, what this process and its children print goes to `path` (appended): the
    engine's log is for a file, the table for the screen. Raises NotWritten."""
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(stream.fileno()) for stream in streams]
    try:
        with writing("the evaluation's log", path, "evaluate again"):
            log_to(path)
        yield
    finally:
        for stream, old in zip(streams, kept, strict=True):
            stream.flush()
            os.dup2(old, stream.fileno())
            os.close(old)


def _spec(config: Config, policy: Path) -> EngineSpec:
    return EngineSpec(
        model=policy,
        config=config.generate,
        max_model_len=config.engine_tokens,
        seed=config.run.seed,
    )


def _prompt(index: int, row: PromptRow) -> Prompt:
    return Prompt(
        index=index,
        epoch=0,
        prompt_id=row.prompt_id,
        text=row.text,
        token_ids=row.token_ids,
        meta=row.meta,
    )
