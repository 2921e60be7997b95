"""`distrl sft`: the first stage alone."""

from __future__ import annotations

from distrl.cli.options import parse
from distrl.cli.plan import print_plan
from distrl.cli.stages import ensure_sft, sft_stage


def run(about: str, argv: list[str]) -> int:
    options = parse("sft", about, argv)
    if options.dry_run:
        print_plan(options.config)
        return 0
    ensure_sft(options.config, fresh=options.fresh)
    print(f"policy: {sft_stage(options.config).folder / 'policy'}")
    return 0
