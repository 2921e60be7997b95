"""`distrl sft`: the first stage alone."""

from __future__ import annotations

from distrl.checkpoint import RunDir
from distrl.cli.checks import check_demonstrations, rows_are_here
from distrl.cli.options import Options
from distrl.cli.plan import print_plan
from distrl.cli.stages import (
    check_claim,
    check_context,
    check_kept,
    claimed,
    ensure_sft,
    outlook,
    policy_folder,
    sft_stage,
)


def run(options: Options) -> int:
    anew = sft_stage(options.config) if options.fresh else None
    if options.dry_run:
        fresh = (anew.title,) if anew else ()
        print_plan(options.config, outlook(options.config, fresh=fresh, rewards=False))
        check_claim(options.config, resume=True, fresh=False)
        check_kept(options.config, RunDir(options.config.run.dir), anew)
        if rows_are_here(options.config):
            check_demonstrations(options.config)
        return 0
    with claimed(options.config, resume=True, fresh=False) as directory:
        check_kept(options.config, directory, anew)
        check_context(options.config)
        check_demonstrations(options.config)
        directory.begin()
        ensure_sft(options.config, fresh=options.fresh)
    print(f"policy: {policy_folder(options.config)}")
    return 0
