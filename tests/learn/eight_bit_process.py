"""A learner with Adam in 8 bits beside one with 32, in a process that has torchao.

    python eight_bit_process.py JOB

JOB: a folder with `job.json` (policy, config, world: 1) and `batches.pickle` (a list of groups for
each step, the last of which tells who goes on from a saved state). Prints what it saw, as JSON.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from rank_process import spec_of
from torch import nn

from distrl.config import LearnConfig
from distrl.learn.learner import PolicyLearner
from distrl.learn.optimizer import optimizer_for, set_rate


def weights(learner: PolicyLearner) -> torch.Tensor:
    trained = learner.networks.trained
    return torch.cat([p.detach().flatten() for part in trained for p in part.parameters()])


def apart(one: PolicyLearner, other: PolicyLearner) -> float:
    return float((weights(one) - weights(other)).norm())


def moment_bytes(learner: PolicyLearner) -> int:
    """Of the larger tensors: a small one stays in float32, and so does an embedding."""
    modules = [module for part in learner.networks.trained for module in part.modules()]
    tables = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    moments = [
        state[name]
        for optimizer in learner.optimizers
        for weight, state in optimizer.state.items()
        for name in ("exp_avg", "exp_avg_sq")
        if id(weight) not in tables
    ]
    return sum(
        moment.codes.nbytes + moment.scale.nbytes if hasattr(moment, "codes") else moment.nbytes
        for moment in moments
        if moment.numel() >= 4096
    )


def floats(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What its state stands for."""
    state = optimizer.state_dict()["state"]
    return [tensor for _, of in sorted(state.items()) for _, tensor in sorted(of.items())]


def rarely_seen() -> float:
    """The largest move of a weight, in learning rates, where each step sees other rows of a table:
    Adam's own is 1 in the first, and less later."""
    torch.manual_seed(0)
    model, rate = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 64)), 1e-3
    optimizer = optimizer_for(model, LearnConfig(adam_bits=8))
    set_rate(optimizer, rate)
    largest = 0.0
    for step in range(4):
        before = [weight.detach().clone() for weight in model.parameters()]
        rows = torch.arange(step % 2, 256, 2)
        model(rows).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moves = [(a - b).abs().max() for a, b in zip(before, model.parameters(), strict=True)]
        largest = max(largest, *(float(move) / rate for move in moves))
    return largest


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    *batches, last = pickle.loads((folder / "batches.pickle").read_bytes())

    def learner(bits: int) -> PolicyLearner:
        case: dict[str, Any] = {"config": {**job["config"], "adam_bits": bits}}
        return PolicyLearner(spec_of(job, case, folder / "scratch"))

    narrow, wide = learner(8), learner(32)
    start = weights(wide)
    for batch in batches:
        narrow.learn(batch)
        wide.learn(batch)
    seen: dict[str, Any] = {
        "travelled": float((weights(wide) - start).norm()),
        "apart": apart(narrow, wide),
        "bytes": moment_bytes(narrow) / moment_bytes(wide),
    }
    narrow.save(folder / "saved")
    goes_on, anew, widened = learner(8), learner(8), learner(32)
    for one in (goes_on, anew, widened):
        one.load(folder / "saved")
    seen["widened"] = all(
        torch.equal(kept, taken_up)
        for before, after in zip(narrow.optimizers, widened.optimizers, strict=True)
        for kept, taken_up in zip(floats(before), floats(after), strict=True)
    )
    for optimizer in anew.optimizers:
        optimizer.state.clear()
    for one in (narrow, goes_on, anew):
        one.learn(last)
    seen |= {"goes on": apart(goes_on, narrow), "anew": apart(anew, narrow)}
    print(json.dumps(seen | {"largest": rarely_seen()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
