"""The stages before PPO: made when they are missing, reused when they are there.

A stage is finished when its folder holds `stage.json` with the very settings that it
would be made with now; that file is written last. What was finished before with other settings
is kept beside it (`sft.old`) until then.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrl.checkpoint import RunDir, RunDirError
from distrl.checkpoint.run_dir import flat, unknown_then
from distrl.config import Config, ConfigError, ScoreConfig, dump_yaml, resolve
from distrl.data.errors import DataError
from distrl.data.rows import read_rows
from distrl.data.smollm2 import resolve_model
from distrl.data.sources import REVIEWS
from distrl.disk import write_whole
from distrl.learn.allocator import return_freed_memory
from distrl.metrics import StageProgress, stage_progress
from distrl.score.compose import with_default_part

if TYPE_CHECKING:
    from distrl.learn.loop import OnStep
    from distrl.learn.reward_model import RewardReport


CALLED = {"samples": "[generate.max_new_tokens, generate.temperature]"}
"""What people know a stage's settings by, where that is not what `stage.json` has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage's folder, and the settings that decide what comes of it."""

    title: str
    folder: Path
    settings: dict[str, Any]

    def finished(self) -> bool:
        return self._made_with() == flat(self.settings)

    def _made_with(self) -> dict[str, Any] | None:
        """The settings of what is there, by dotted names; None where nothing is finished, or nobody
        can tell."""
        try:
            found = json.loads((self.folder / "stage.json").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        if not isinstance(found, dict):
            return None
        then = flat(found)
        return unknown_then(then, flat(self.settings)) | then

    def tell_of_newer(self, config: Config) -> None:
        """Say so where a file of rows was written after the stage was made from it."""
        made_s = (self.folder / "stage.json").stat().st_mtime
        files = [Path(name) for name in (config.data.source, config.data.validation) if name]
        again = f"give 'distrl {self.folder.name} --fresh' before PPO has taken a step, or "
        if RunDir(config.run.dir).has_progress():
            again = "this run goes on from what it held; "
        for file in files:
            if file.is_file() and file.stat().st_mtime > made_s:
                print(
                    f"{self.title}: {file} was written after that; {again}choose another "
                    "--run.name to learn from what it holds now",
                    flush=True,
                )

    @property
    def old(self) -> Stage:
        """Where what was finished lies while another outcome is made."""
        return replace(self, folder=self.folder.with_name(f"{self.folder.name}.old"))

    @property
    def before(self) -> dict[str, Any] | None:
        """What `_made_with` says of what was finished last, here or put aside."""
        return self._made_with() or self.old._made_with()

    def reusable(self) -> bool:
        """Whether what these settings make is there, maybe put aside."""
        return self.finished() or self.old.finished()

    def outlook(self, anew: str = "") -> str:
        """What becomes of it: reused, made, or made anew and why, which is `anew` (empty: reuse it)
        unless its settings have changed."""
        if not anew and self.reusable():
            return f"finished before, reusing {self.folder}"
        if self.before is None:
            return f"made in {self.folder}"
        before, now = self.before, flat(self.settings)
        names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        changed = [
            f"{CALLED.get(name, name)} ({before.get(name)} -> {now.get(name)})" for name in names
        ]
        why = f"other settings: {', '.join(changed)}" if changed else anew
        kept = f"until it is finished, the one before stays in {self.old.folder}"
        return f"made anew in {self.folder}; {why}; {kept}"

    def put_back(self) -> None:
        """What was put aside takes its place again, where these are its settings and what was to
        follow it was never finished."""
        if not self.finished() and self.old.finished():
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self.old.folder, self.folder)

    def make_room(self, anew: str = "--fresh") -> None:
        """For another outcome; of one that was finished, say why, and put it aside."""
        if self.before is not None:
            print(f"{self.title}: {self.outlook(anew)}", flush=True)
        if self._made_with() is not None:
            shutil.rmtree(self.old.folder, ignore_errors=True)
            os.replace(self.folder, self.old.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        write_whole(self.folder / "stage.json", json.dumps(self.settings, indent=1))
        shutil.rmtree(self.old.folder, ignore_errors=True)


OF_ANOTHER_POLICY = "it came of the SFT policy that is made anew"


def sft_stage(config: Config) -> Stage:
    return Stage(
        title="SFT",
        folder=config.run.dir / "sft",
        settings=_settings(config, "model", "data", "sft"),
    )


def reward_stage(config: Config) -> Stage:
    return Stage(
        title="Reward model",
        folder=config.run.dir / "reward-model",
        settings=_settings(config, "model", "data", "sft", "reward_model")
        | {"samples": [config.generate.max_new_tokens, config.generate.temperature]},
    )


def _settings(config: Config, *sections: str) -> dict[str, Any]:
    values = config.model_dump(mode="json", include=set(sections))
    for section, tokens in (
        ("sft", config.sft_tokens),
        ("reward_model", config.reward_model_tokens),
    ):
        if section in values:
            values[section]["max_tokens"] = tokens  # where it is empty, other sections decide
    return values | {"seed": config.run.seed}


def policy_folder(config: Config) -> Path:
    """Where the policy that PPO starts from lies: the SFT stage's, or `model.path` itself."""
    if config.sft.epochs:
        return sft_stage(config).folder / "policy"
    folder = resolve_model(config.model.path)
    if folder is None:
        raise ConfigError("sft.epochs=0 takes the policy as it is, so model.path must name one")
    return folder


def reward_model_folder(config: Config) -> Path | None:
    """The reward model that the critic may start from: the first of `score.parts` that is one,
    or this run's own; None where only functions reward."""
    models = [part.model for part in scored_by(config).parts if part.model is not None]
    if not models and config.learn.has_critic and config.learn.value.start == "reward_model":
        raise ConfigError(
            "score.parts names no reward model for the critic to start from; "
            "set learn.value.start=policy"
        )
    return Path(models[0]) if models else None


def scored_by(config: Config) -> ScoreConfig:
    """`config.score` with a folder or a function in each part: this run's own reward model lies
    where the run does, and "own" is looked up here alone."""
    own = reward_stage(config).folder / "model"
    return with_default_part(config.score, own.resolve())


def claimed(config: Config, *, resume: bool, fresh: bool) -> RunDir:
    """The run directory, taken for this process; `RunDir.begin` is still to be called.

    Raises RunDirError: another process has it, or it holds a run that was made with other
    settings, or that neither `resume` nor `fresh` was said of.
    """
    directory = RunDir(config.run.dir.resolve())
    return directory.claim(dump_yaml(config), resume=resume, fresh=fresh)


def check_claim(config: Config, *, resume: bool, fresh: bool) -> None:
    """Raise RunDirError where `claimed` would, if nobody else has the directory."""
    RunDir(config.run.dir).check(dump_yaml(config), resume=resume, fresh=fresh)


def check_kept(config: Config, directory: RunDir, anew: Stage | None = None) -> None:
    """Raise RunDirError where a run that goes on would lose a stage that its PPO began from: it is
    `anew`, which is asked for, or it is not there and would be made."""
    stages = [sft_stage(config)] * (config.sft.epochs > 0)
    stages += [reward_stage(config)] * trains_reward_model(config)
    if not directory.has_progress():
        return
    for stage in stages:
        if stage == anew or not stage.finished():
            raise RunDirError(
                f"{stage.title}: {directory.path} holds a run that began from what was made in "
                f"{stage.folder}, "
                + ("so it stays" if stage.finished() else "which is no longer there: put it back")
                + f"; to make it anew choose another --run.name, or remove {directory.path}, the "
                "run and all"
            )


def check_functions(config: Config) -> None:
    """Functions that the configuration names are looked up here once, and what the learner will
    call is tried, so that a mistake is told now and not by an actor. Raises ConfigError."""
    from distrl.learn.rehearse import rehearse

    for part in config.score.parts:
        if part.function is not None:
            resolve(part.function, f"reward {part.name!r}")
    if config.evaluate.judge is not None:
        resolve(config.evaluate.judge, "evaluate.judge")
    rehearse(config.learn, config.generate.samples_per_prompt)


def check_context(config: Config) -> None:
    """A `model.path` without whole weights or of a kind that cannot be trained, and prompt +
    response, or a training text, beyond its positions: said now, not by the engine or after hours.

    A new model's own context is checked with the configuration. Raises ConfigError, or ModelError
    where there is no model.
    """
    from distrl.models.load import check_kind, check_weights, positions, short_range

    folder = resolve_model(config.model.path)
    if folder is None:
        return
    context = positions(folder)
    check_weights(folder)
    check_kind(folder)
    longest = config.engine_tokens
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_prompt_tokens + generate.max_new_tokens (or generate.max_model_len) = "
            f"{longest} is beyond the {context} positions of {folder}; shorten one"
        )
    texts = (
        ("sft.max_tokens", config.sft_tokens),
        ("reward_model.max_tokens", config.reward_model_tokens),
    )
    whole = "data.max_prompt_tokens + generate.max_new_tokens (or generate.max_model_len)"
    near = short_range(folder)
    for name, tokens in ((whole, longest), *texts):
        if near is not None and tokens > near:
            raise ConfigError(
                f"{name} = {tokens} is beyond the {near} positions up to which {folder} has one "
                "set of rotary frequencies (longrope): what else is read with a sequence would "
                "change its numbers, and engine and learner would disagree; shorten it"
            )
    for name, tokens in texts:
        if context is not None and tokens > context:
            raise ConfigError(
                f"{name}={tokens} is beyond the {context} positions of {folder}; lower it, or "
                "leave it empty"
            )


def outlook(
    config: Config, *, fresh: Collection[str] = (), rewards: bool | None = None
) -> Iterator[str]:
    """A line on what would become of each stage. fresh: titles of those that are asked for anew;
    rewards: whether the reward model is made; None: where a part of the reward comes of it."""
    sft, second = sft_stage(config), reward_stage(config)
    anew = "--fresh" if sft.title in fresh else ""
    yield f"{sft.title}: {sft.outlook(anew) if config.sft.epochs else _no_sft(config)}"
    remade = config.sft.epochs > 0 and (bool(anew) or not sft.reusable())
    anew = OF_ANOTHER_POLICY if remade else "--fresh" if second.title in fresh else ""
    made = trains_reward_model(config) if rewards is None else rewards
    if made or (remade and second.before is not None):
        yield f"{second.title}: {second.outlook(anew)}"
    elif rewards is None:
        yield f"{second.title}: {_none_to_train(config)}"


def _no_sft(config: Config) -> str:
    return f"none (sft.epochs=0), the policy is {config.model.path}"


def ensure_sft(config: Config, *, fresh: bool = False) -> None:
    """Run the SFT stage unless it is finished or not wanted (`sft.epochs=0`); a reward model that
    came of what was there goes with it."""
    from distrl.learn.sft import run_sft

    if not config.sft.epochs:
        print(f"SFT: {_no_sft(config)}", flush=True)
        return
    stage, after = sft_stage(config), reward_stage(config)
    if not fresh:
        stage.put_back()
    if stage.finished() and not fresh:
        print(f"SFT: finished before, reusing {stage.folder / 'policy'}", flush=True)
        stage.tell_of_newer(config)
        return
    after.make_room(OF_ANOTHER_POLICY)
    stage.make_room()
    with _progress(stage.title) as on_step:
        report = run_sft(config, stage.folder, on_step)
    (after.old.folder / "stage.json").unlink(missing_ok=True)  # its policy is gone: not put back
    stage.finish()
    return_freed_memory()
    print(
        f"SFT: {report.parameters / 1e6:.1f} M parameters, held-out loss "
        f"{report.validation_loss:.2f} nats a token, {report.seconds:.0f} s",
        flush=True,
    )
    if report.truncated:
        print(
            f"SFT: {report.truncated:,} rows were cut at sft.max_tokens={config.sft_tokens}, so "
            "they have no end, and one whose prompt fills it is left out; raise it to keep them "
            "whole",
            flush=True,
        )


def ensure_reward_model(config: Config, *, fresh: bool = False) -> None:
    """Run the reward-model stage unless it is finished, or no part of the reward comes of it."""
    if trains_reward_model(config):
        make_reward_model(config, fresh=fresh)
    else:
        print(f"Reward model: {_none_to_train(config)}", flush=True)


def _none_to_train(config: Config) -> str:
    """Whose the reward models are, where no part of the reward is this run's own."""
    owners = {}
    for part in config.score.parts:
        lies = Path(part.model or "").resolve()
        if part.model and lies.parts[-2:] == ("reward-model", "model"):
            owners[part.name] = lies.parents[1]
    root = config.run.root
    theirs = [
        f"{name!r} is {root / owner.name}'s"
        for name, owner in owners.items()
        if owner.parent == root.resolve()
    ]
    if not theirs:
        return "none to train, score.parts names the rewards"
    own = "; for one that learns from this run's ratings, say 'model: own' there"
    return f"none to train; {', '.join(theirs)}" + own * _has_ratings(config)


def _has_ratings(config: Config) -> bool:
    """Whether the run's rows are rated, going by the first of them."""
    if config.data.source == REVIEWS:
        return True
    try:
        _, row = next(read_rows(config.data.source))
    except DataError:  # told by whoever needs the rows
        return False
    data = config.data
    rated = (data.responses_column, data.ratings_column)
    pair = (data.chosen_column, data.rejected_column)
    return any({*columns} <= row.keys() for columns in (rated, pair))


def trains_reward_model(config: Config) -> bool:
    """Whether a part of the reward is the run's own reward model."""
    named = [part.model for part in scored_by(config).parts if part.model is not None]
    return any(is_own(config, model) for model in named)


def is_own(config: Config, model: str | Path) -> bool:
    """Whether a folder is where this run's own reward model lies, or will lie."""
    return Path(model).resolve() == (reward_stage(config).folder / "model").resolve()


def make_reward_model(config: Config, *, fresh: bool = False) -> None:
    """Run the reward-model stage unless it is finished."""
    from distrl.learn.reward_model import run_reward_model

    stage = reward_stage(config)
    if not fresh:
        stage.put_back()
    if stage.finished() and not fresh:
        print(f"Reward model: finished before, reusing {stage.folder / 'model'}", flush=True)
        stage.tell_of_newer(config)
        return
    stage.make_room()
    with _progress(stage.title) as on_step:
        report = run_reward_model(config, policy_folder(config), stage.folder, on_step)
    stage.finish()
    return_freed_memory()
    print(f"Reward model: {_accuracy(report)}, {report.seconds:.0f} s", flush=True)
    if report.truncated:
        print(
            f"Reward model: {report.truncated:,} responses were cut at reward_model.max_tokens="
            f"{config.reward_model_tokens}"
            + f", and {report.alike:,} of them left out, as so cut they equal another to the same "
            "prompt; raise it" * (report.alike > 0),
            flush=True,
        )


def _accuracy(report: RewardReport) -> str:
    """By how far apart people rated a pair; where none is further than a hair, of all of them."""
    found = {float(margin): each for margin, each in report.held_out.accuracy.items()}
    return "; ".join(
        f"{each.value:.1%} of {each.pairs:,} held-out pairs"
        + f" rated more than {margin:g} apart" * (margin > 0)
        for margin, each in found.items()
        if margin > 0 or len(found) == 1
    )


@contextmanager
def _progress(title: str) -> Iterator[OnStep]:
    """Progress of a stage that knows its length with its first step."""
    with ExitStack() as stack:
        tick: StageProgress | None = None

        def on_step(step: int, total: int, values: Mapping[str, float]) -> None:
            nonlocal tick
            if tick is None:
                tick = stack.enter_context(stage_progress(title, total))
            if values:
                tick(step, values)

        yield on_step
