"""SmolLM2-135M-Instruct on this machine: how long ten real PPO steps take, and what they need.

    python benchmarks/smollm2.py

Policy, critic and reward model all start from the checkpoint; the reward model is trained on the
human ratings first. Threshold, set before the first run: 16 GiB.
"""

from __future__ import annotations

from common import GIB, ROOT, distrl, memory_watch, metrics, mismatch, report, stopwatch, total

NAME = "benchmark-smollm2"


def main() -> None:
    times: dict[str, float] = {}
    with memory_watch() as memory, stopwatch(times, "all"):
        distrl("train", "--preset", "smollm2", "--fresh", "--run.name", NAME)
    rows = metrics(ROOT / "runs" / NAME)
    ok = memory.peak_bytes <= 16 * GIB
    rewards = [row["reward/mean"] for row in rows]
    gap, of = mismatch(rows)
    report(
        "SmolLM2-135M-Instruct",
        {
            "minutes": f"{times['all'] / 60:.1f}",
            "PPO steps": f"{len(rows)} in {total(rows, 'time/step') / 60:.1f} minutes",
            "reward, first and last": f"{rewards[0]:.2f}, {rewards[-1]:.2f}",
            "KL, last (nats)": f"{rows[-1]['kl/ref']:.2f}",
            f"lag-0 mismatch ({of})": f"{gap:.1e}",
            "memory, PSS GiB <= 16": f"{'ok  ' if ok else 'MISS'} {memory.peak_bytes / GIB:.2f}",
        },
        "python benchmarks/smollm2.py",
    )


if __name__ == "__main__":
    main()
