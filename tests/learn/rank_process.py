"""One rank of a learner, in a process of its own: takes the steps that a job asks for.

    python rank_process.py JOB RANK

JOB: a folder with `job.json` (world, policy, cases: name -> address, config, examples, resume) and
`batches.pickle` (a list of groups for each step). Of each case, `NAME/` gets the metrics of each
step, the published image, a checkpoint and an export, and at its end `done.RANK`.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from distrl.config import LearnConfig
from distrl.learn.learner import PolicyLearner
from distrl.learn.spec import LearnerSpec, Place


def spec_of(job: dict[str, Any], case: dict[str, Any], scratch: Path) -> LearnerSpec:
    return LearnerSpec(
        policy=Path(job["policy"]),
        reward_model=None,
        config=LearnConfig.model_validate(case["config"]),
        total_steps=10,
        total_samples=120,
        longest=12,
        temperature=0.8,
        seed=3,
        canary_tokens=8,
        scratch=scratch,
        pretrain=Path(case["examples"]) if case.get("examples") else None,
        threads=1,
    )


def run(learner: PolicyLearner, case: dict[str, Any], batches: list[Any], folder: Path) -> None:
    """Resume, learn, publish, save and export; rank 0 tells how it went."""
    if case.get("resume"):
        learner.load(Path(case["resume"]))
    metrics = [dict(learner.learn(groups).metrics) for groups in batches[learner.step :]]
    weights = learner.publish()
    learner.save(folder / "checkpoint")
    learner.export(folder / "policy")
    if learner.ranks.first:
        shutil.copyfile(weights.locator, folder / "published.safetensors")
        probe = weights.probe_logprobs.tolist()
        (folder / "told.json").write_text(json.dumps({"metrics": metrics, "probe": probe}))


def main(folder: Path, rank: int) -> None:
    job = json.loads((folder / "job.json").read_text())
    batches = pickle.loads((folder / "batches.pickle").read_bytes())
    for name, case in job["cases"].items():
        place = Place(rank=rank, world=job["world"], address=case["address"], timeout_s=120)
        spec = spec_of(job, case, folder / name)
        learner = PolicyLearner(replace(spec, place=place))
        try:
            run(learner, case, batches, folder / name)
        finally:
            learner.close()
        (folder / name / f"done.{rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
