"""`distrl reward-model`: the second stage, after the first where that is missing."""

from __future__ import annotations

from distrl.checkpoint import RunDir
from distrl.cli.checks import check_comparisons, check_demonstrations, check_reference_prompts
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


def run(options: Options) -> int:
    anew = reward_stage(options.config) if options.fresh else None
    if options.dry_run:
        fresh = (anew.title,) if anew else ()
        print_plan(options.config, outlook(options.config, fresh=fresh, rewards=True))
        check_claim(options.config, resume=True, fresh=False)
        check_kept(options.config, RunDir(options.config.run.dir), anew)
        return 0
    with claimed(options.config, resume=True, fresh=False) as directory:
        check_kept(options.config, directory, anew)
        check_context(options.config)
        check_demonstrations(options.config)
        check_comparisons(options.config)
        check_reference_prompts(options.config)
        directory.begin()
        ensure_sft(options.config)
        make_reward_model(options.config, fresh=options.fresh)
    print(f"reward model: {reward_stage(options.config).folder / 'model'}")
    return 0
