"""`distrl sft`: the first stage alone."""

from __future__ import annotations

from distrl.cli.checks import check_demonstrations
from distrl.cli.options import Options
from distrl.cli.plan import print_plan
from distrl.cli.stages import check_claim, check_context, claimed, ensure_sft, policy_folder


def run(options: Options) -> int:
    if options.dry_run:
        print_plan(options.config)
        check_claim(options.config, resume=True, fresh=False)
        return 0
    with claimed(options.config, resume=True, fresh=False) as directory:
        check_context(options.config)
        check_demonstrations(options.config)
        directory.begin()
        ensure_sft(options.config, fresh=options.fresh)
    print(f"policy: {policy_folder(options.config)}")
    return 0
