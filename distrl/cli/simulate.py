"""`distrl simulate`: the production driver on a virtual clock, at any size, in seconds."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from distrl.checkpoint import RunDir
from distrl.cli.help import print_help
from distrl.cli.options import HELP, Options, merged, parse, shown, validated
from distrl.config import Config, ConfigError, read_yaml
from distrl.disk import writing
from distrl.driver.audit import Audit, audit
from distrl.sim.fit import fitted
from distrl.sim.simulate import Outcome, simulate

SHORT = {
    "generators": "generate.workers",
    "scorers": "score.workers",
    "max_staleness": "driver.max_staleness",
}
"""Names that --sweep takes besides dotted ones."""

LOOKED_AT = re.compile(
    r"simulate\.|driver\.(?!(checkpoint_every|keep_checkpoints|skip_without_signal)$)|score\.workers$"
    r"|generate\.(workers|max_num_seqs|samples_per_prompt|max_new_tokens|request_timeout_s)$"
)
"""Settings that a simulation depends on; all others leave it as it is."""

SHOWN = 20
"""Values of one setting that a dry run prints."""

USAGE = """\
distrl simulate [--from RUN] [--sweep NAME=V1,V2,...]... [--out DIR] [--no-audit] [settings]

The production driver, buffer, staleness rules and ledger run on a virtual clock, over generators,
scorers and a learner that only pass the time: hours of a thousand generators take seconds.

  --from RUN        take configuration and durations from a real run
  --sweep NAME=...  run once for each value (of each combination, where given more than once);
                    NAME is a setting, or generators, scorers, max_staleness
  --out DIR         write simulate.json there, and simulate.png of a sweep (default: runs/simulate)
  --no-audit        keep no ledger, and do not audit it at the end

Settings, with those of section 'simulate' saying how long things take:
"""


def run(about: str, argv: list[str]) -> int:
    own, rest = _own_options().parse_known_args(argv)
    if HELP & set(argv):
        print(USAGE)
        print_help("simulate", about, shown(rest))
        raise SystemExit(0)
    options, doubt = _options(own.source, about, rest)
    base = options.config.model_dump(mode="json")
    axes = dict(map(_swept, own.sweep))
    if len(axes) < len(own.sweep):
        raise ConfigError("--sweep names a setting twice: give all its values to one, NAME=V1,V2")
    configs = [validated(merged(base, _nested(point))) for point in _points(axes)]
    points = [{name: _value(config, name) for name in axes} for config in configs]
    if own.out.exists() and not own.out.is_dir():
        raise ConfigError(f"--out {own.out} is a file; name a folder")
    if options.dry_run:
        print(yaml.safe_dump(_shortened(base), sort_keys=False))
        return 0
    results = []
    pairs = list(zip(points, configs, strict=True))
    for point, config in track(pairs, "simulating", disable=len(pairs) < 2):
        results.append((point, *_run(config, audited=own.audit)))
    _show(results, Console())
    if doubt:
        print(f"--from {own.source}: {doubt}")
    for remark in _remarks(axes, configs):
        print(remark)
    with writing("the figures", own.out, "simulate again, or name another --out"):
        _write(own.out, results)
    return 0 if all(report is None or report.holds for _, _, report in results) else 1


def _remarks(swept: Iterable[str], configs: Sequence[Config]) -> Iterator[str]:
    """What of the settings a simulation cannot take as a real run does."""
    if any(config.driver.max_staleness == "auto" for config in configs):
        yield (
            "driver.max_staleness=auto: a simulation has no data whose effective sample size could "
            "hold the bound down, so it rises to driver.staleness_ceiling; of a real run this is "
            "the best case. Bounds of their own: --sweep max_staleness=0,1,2,4"
        )
    if any(config.driver.skip_without_signal for config in configs):
        yield (
            "driver.skip_without_signal: a simulation has no rewards, so no group is without a "
            "signal; a real run generates another one for each that it replaces, and is that much "
            "slower"
        )
    for name in swept:
        if not LOOKED_AT.match(name):
            yield (
                f"--sweep {name}: a simulation does not depend on it. How long things take with "
                "another value is for simulate.* to say, or for a short real run and --from"
            )


def _own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distrl simulate", add_help=False, allow_abbrev=False)
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/simulate"))
    parser.add_argument("--no-audit", dest="audit", action="store_false")
    return parser


def _options(source: Path | None, about: str, argv: list[str]) -> tuple[Options, str]:
    """Defaults, then the run's own configuration with its durations, then the command line; and
    what of the durations is in doubt."""
    if source is None:
        return parse("simulate", about, argv), ""
    directory = RunDir(source)
    if not directory.config.exists():
        raise ConfigError(f"{source} has no config.yaml; --from takes a run directory")
    theirs = validated(read_yaml(directory.config))
    fit = fitted(directory.ledger, directory.metrics, theirs)
    values = theirs.model_dump(mode="json") | {"simulate": fit.model.model_dump(mode="json")}
    return parse("simulate", about, argv, beneath=values), fit.doubt


def _shortened(values: Any) -> Any:
    """Settings as people read them: of the many lengths of a run the range alone."""
    if isinstance(values, dict):
        return {name: _shortened(value) for name, value in values.items()}
    if isinstance(values, list) and len(values) > SHOWN and not isinstance(values[0], str):
        return f"{len(values):,} values of the run, {min(values):g} to {max(values):g}"
    return values


def _points(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the swept values, by dotted name."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _swept(sweep: str) -> tuple[str, list[Any]]:
    """The setting that NAME=V1,V2,... names, and its values, of which some may be lists."""
    name, _, values = sweep.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = None
    if not found:
        raise ConfigError(f"--sweep {sweep}: should be NAME=V1,V2,...")
    return SHORT.get(name, name), [None if value == "None" else value for value in found]


def _value(config: Config, name: str) -> Any:
    """What a setting came to: a number is one, however it was written."""
    value: Any = config.model_dump(mode="json")
    for part in name.split("."):
        value = value[part]
    return value


def _nested(point: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} becomes {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for name, value in point.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        out = merged(out, value)
    return out


def _run(config: Config, *, audited: bool) -> tuple[Outcome, Audit | None]:
    if not (audited and config.driver.ledger):
        return simulate(config), None
    with tempfile.TemporaryDirectory(prefix="distrl-simulate-") as folder:
        ledger, metrics = Path(folder) / "ledger.sqlite", Path(folder) / "metrics.jsonl"
        outcome = simulate(config, ledger)
        metrics.write_text(
            "".join(f"{json.dumps({'step': n, **row})}\n" for n, row in outcome.rows)
        )
        return outcome, audit(ledger, metrics)


def _show(results: list[tuple[dict[str, Any], Outcome, Audit | None]], console: Console) -> None:
    names = list(results[0][0])
    table = Table(
        title="Simulated runs",
        caption="idle: % of time that generators, scorers, learner did nothing; ages: % of tokens, "
        "by versions; wasted: tokens",
    )
    for column in (*_called(names), "samples/s", "tokens/s"):
        table.add_column(column, justify="right")
    for column in ("idle", "ages", "wasted", "audit"):
        table.add_column(column, justify="right")
    for point, outcome, report in results:
        table.add_row(
            *(str(point[name]) for name in names),
            f"{outcome.samples_per_second:,.1f}",
            f"{outcome.tokens_per_second:,.0f}",
            ", ".join(f"{100 * share:.0f}" for share in outcome.idle.values()),
            " ".join(f"{age}:{100 * share:.0f}" for age, share in outcome.ages.items()),
            f"{outcome.wasted_tokens:,}",
            "-" if report is None else "holds" if report.holds else "BROKEN",
        )
    console.print(table)
    for point, outcome, report in results:
        if len(results) == 1 or outcome.restarts or outcome.drops:
            console.print(
                f"{point or 'run'}: {outcome.steps} steps in {outcome.seconds:,.1f} virtual "
                f"seconds ({outcome.real_s:.1f} real), {outcome.drops} drops, "
                f"{outcome.retries} retries, {outcome.restarts} restarts"
            )
        for finding in () if report is None else report.findings:
            if not finding.holds:
                console.print(f"{finding.promise}: {finding.offenders[:3]}", style="red")


def _called(names: Sequence[str]) -> list[str]:
    """Dotted names by their last part, but for those that share it."""
    last = [name.split(".")[-1] for name in names]
    return [
        name if last.count(short) > 1 else short for name, short in zip(names, last, strict=True)
    ]


def _write(out: Path, results: list[tuple[dict[str, Any], Outcome, Audit | None]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    body = [
        {"point": point, **_figures(outcome), "audit": report.holds if report else None}
        for point, outcome, report in results
    ]
    (out / "simulate.json").write_text(json.dumps(body, indent=1))
    print(f"figures: {out / 'simulate.json'}")
    picture = out / "simulate.png"
    if len(results) > 1:
        _plot(picture, results)
        print(f"picture: {picture}")
    else:
        picture.unlink(missing_ok=True)  # of an earlier sweep


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(outcome).items() if name != "rows"}


def _plot(path: Path, results: list[tuple[dict[str, Any], Outcome, Audit | None]]) -> None:
    """Samples/s against the last swept name, a line for each value of the others: in the order of
    its numbers, or by name where some are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    *others, axis = names = list(results[0][0])
    called = dict(zip(names, _called(names), strict=True))
    lines: dict[str, list[tuple[Any, float]]] = {}
    for point, outcome, _ in results:
        label = ", ".join(f"{called[name]} {point[name]}" for name in others)
        lines.setdefault(label, []).append((point[axis], outcome.samples_per_second))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    numbers = all(type(point[axis]) in (int, float) for point, _, _ in results)
    for label, line in lines.items():
        drawn = sorted(line) if numbers else [(str(value), rate) for value, rate in line]
        axes.plot(*zip(*drawn, strict=True), marker="o", label=label or None)
    axes.set(xlabel=axis, ylabel="samples/s")
    axes.set_ylim(bottom=0)
    if others:
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
