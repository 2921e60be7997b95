"""`distrl demo`: the whole loop on real parts, from human ratings to a better policy."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path

from distrl.checkpoint import RunDir
from distrl.cli.checks import check_rows, rows_are_here
from distrl.cli.evaluate import evaluate
from distrl.cli.options import Options
from distrl.cli.plan import print_plan
from distrl.cli.stages import check_claim, claimed, outlook, reward_stage, sft_stage
from distrl.cli.train import finished, prepare_stages, report, train
from distrl.config import Config


def run(options: Options) -> int:
    config = options.config
    options = _going_on(options)
    if options.dry_run:
        fresh = (sft_stage(config).title, reward_stage(config).title) if options.fresh else ()
        print_plan(config, outlook(config, fresh=fresh))
        check_claim(config, resume=options.resume, fresh=options.fresh)
        if rows_are_here(config):
            check_rows(config, evaluates=True)
        return 0
    began = time.monotonic()
    with claimed(config, resume=options.resume, fresh=options.fresh) as directory:
        prepare_stages(config, directory, fresh=options.fresh, evaluates=True)
        if finished(config, directory):
            print(f"PPO: finished before, reusing {config.run.dir / 'policy'}", flush=True)
        elif status := report(config, train(options, directory)):
            return status
    evaluate(config)
    print(_next(config, time.monotonic() - began), flush=True)
    return 0


def _going_on(options: Options) -> Options:
    """A demo that was stopped goes on by itself."""
    there = RunDir(options.config.run.dir).has_progress() and not options.fresh
    return dataclasses.replace(options, resume=options.resume or there)


def _next(config: Config, seconds: float) -> str:
    where, me = config.run.dir, called()
    return f"""
Done in {seconds / 60:.1f} minutes. Run directory: {where}
  {where}/evaluation.json    every figure and response of the table above
  {where}/reward_vs_kl.png   what the reward cost in KL
  {where}/metrics.jsonl      one line a step; W&B files in {where}/wandb

What to try next:
  {me} demo --run.name leash --learn.kl.target 4       a shorter leash
  {me} demo --run.name sync --driver.max_staleness 0   the same, synchronous
  {me} train --preset smollm2                          a 135M instruct model on this CPU
  {me} train --help                                    every setting, explained"""


def called() -> str:
    """What this program is called by, for commands to copy: the script as it was given where it is
    not on the path, as after `make demo`."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return "python -m distrl.cli"
    found = shutil.which("distrl")
    if script.name != "distrl" or (found and Path(found).samefile(script)):
        return "distrl"
    return str(script)
