"""`distrl sft`: the first stage alone."""

from __future__ import annotations

from distrl.cli.options import parse
from distrl.cli.plan import print_plan
from distrl.cli.stages import check_claim, claimed, ensure_sft, policy_folder


def run(about: str, argv: list[str]) -> int:
    options = parse("sft", about, argv)
    if options.dry_run:
        print_plan(options.config)
        check_claim(options.config, resume=True, fresh=False)
        return 0
    with claimed(options.config, resume=True, fresh=False):
        ensure_sft(options.config, fresh=options.fresh)
    print(f"policy: {policy_folder(options.config)}")
    return 0
