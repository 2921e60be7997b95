"""`distrl reward-model`: the second stage, after the first where that is missing."""

from __future__ import annotations

from distrl.checkpoint import RunDir
from distrl.cli.checks import (
    check_comparisons,
    check_demonstrations,
    check_reference_prompts,
    rows_are_here,
)
from distrl.cli.options import Options
from distrl.cli.plan import print_plan
from distrl.cli.stages import (
    check_claim,
    check_context,
    check_kept,
    claimed,
    ensure_sft,
    make_reward_model,
    outlook,
    reward_stage,
)
from distrl.config import Config


def run(options: Options) -> int:
    anew = reward_stage(options.config) if options.fresh else None
    if options.dry_run:
        fresh = (anew.title,) if anew else ()
        print_plan(options.config, outlook(options.config, fresh=fresh, rewards=True))
        check_claim(options.config, resume=True, fresh=False)
        check_kept(options.config, RunDir(options.config.run.dir), anew)
        if rows_are_here(options.config):
            check_all_rows(options.config)
        return 0
    with claimed(options.config, resume=True, fresh=False) as directory:
        check_kept(options.config, directory, anew)
        check_context(options.config)
        check_all_rows(options.config)
        directory.begin()
        ensure_sft(options.config)
        make_reward_model(options.config, fresh=options.fresh)
    print(f"reward model: {reward_stage(options.config).folder / 'model'}")
    return 0


def check_all_rows(config: Config) -> None:
    """Read every row that the command will use, before its first stage. Raises DataError."""
    check_demonstrations(config)
    check_comparisons(config)
    check_reference_prompts(config)
