"""`distrl replay RUN`: the recorded batches again, to the same weights."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from distrl.checkpoint import RunDir
from distrl.cli.options import config_of
from distrl.metrics import stage_progress

DIFFERS = 1
"""Exit status where the weights came out otherwise."""


def _step(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is no step; the first one is 1")
    return int(word)


def run(about: str, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distrl replay",
        description=f"{about}: the batches that the learner was given, in order, to a new learner "
        "that starts as that one did. On a CPU the weights must come out equal to the bit after "
        "every step. Exit status 0 only where they do.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, as runs/demo")
    parser.add_argument("--until", type=_step, metavar="STEP", help="stop after this step")
    options = parser.parse_args(argv)
    directory = RunDir(options.run.resolve())
    config = config_of(directory)
    from distrl.actors.launch import learner_spec
    from distrl.cli.origin import check_same_start, origin_of
    from distrl.cli.stages import policy_folder, reward_model_folder, scored_by
    from distrl.learn.record import length, recorded
    from distrl.learn.replay import replay

    next(recorded(directory.recording))  # a clear error before the models are loaded
    policy, reward_model = policy_folder(config), reward_model_folder(config)
    began = origin_of(config.model_copy(update={"score": scored_by(config)}), policy)
    check_same_start(directory, began, "a replay")
    total = min(length(directory.recording), options.until or sys.maxsize)
    with (
        tempfile.TemporaryDirectory(prefix="distrl-replay-") as scratch,
        stage_progress("Replay", total) as tick,
    ):
        spec = learner_spec(
            config,
            policy,
            reward_model,
            Path(scratch),
            pretrain=directory.pretrain,
        )
        done = replay(
            spec,
            directory.recording,
            options.until,
            lambda step, equal: tick(step, {"equal": float(equal)}),
        )
    if done.differs is not None:
        print(
            f"step {done.differs} differs: its weights have the digest\n  {done.found} instead of\n"
            f"  {done.expected}\n"
            + "The steps before it are equal to the bit. " * (done.differs > 1)
            + "Is it the same machine, torch and distrl, with as many threads (learn.cpus)?"
        )
        return DIFFERS
    print(f"{done.steps} steps, weights equal to the bit after each; the last: {done.found}")
    return 0
