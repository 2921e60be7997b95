"""The algorithms of `distrl.algo` on problems whose answers are known.

    python benchmarks/classic_control.py [--seeds 5]

CartPole-v1: PPO from `gae`, `clipped_surrogate` and `value_loss`; a row is an episode, or a part.
Short corridor (Sutton and Barto, example 13.1): REINFORCE from `gae` (lam 1, no values) and
`policy_gradient`, an update a step as in the book, with a learnt baseline and without, 100 runs of
1,000 episodes at the same step size. Thresholds, set before the first run: the mean of 100 episodes
of CartPole reaches 475 within 200,000 steps for every seed; with a baseline the corridor's last 100
episodes average -13.5 or better, without one -16 or worse. The best that there is: 500 and -11.66.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import deque
from typing import Any

import gymnasium
import numpy as np
import torch
from common import report
from torch import Tensor, nn

from distrl.algo import (
    clipped_surrogate,
    gae,
    masked_whiten,
    policy_gradient,
    token_shares,
    value_loss,
)

ENVS, STEPS, EPOCHS, MINIBATCH = 8, 32, 20, 256
GAMMA, LAM, CLIP, LR = 0.98, 0.8, 0.2, 1e-3
LIMIT = 200_000
ALPHA = 2e-3
BASELINE_ALPHA = 2.0**-6
RUNS, EPISODES, LONGEST = 100, 1000, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    took = [cartpole(seed) for seed in range(options.seeds)]
    ends = {baseline: corridor(baseline) for baseline in (True, False)}
    solved = sum(steps <= LIMIT for steps in took)
    report(
        "Classic control",
        {
            "CartPole, steps to 475": ", ".join(
                f"{steps:,}" if steps <= LIMIT else "never" for steps in took
            ),
            "CartPole, seeds that got there": f"{_ok(solved == len(took))} {solved}/{len(took)}",
            "corridor with a baseline": f"{_ok(ends[True][0] >= -13.5)} {_spread(ends[True])}",
            "corridor without": f"{_ok(ends[False][0] <= -16)} {_spread(ends[False])}",
        },
        f"python benchmarks/classic_control.py --seeds {options.seeds}",
    )


def _ok(good: bool) -> str:
    return "ok  " if good else "MISS"


def _spread(end: tuple[float, float]) -> str:
    return f"{end[0]:.2f} +- {end[1]:.2f} (95 %)"


# -- CartPole --------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Two small towers: logits of the actions, and the state's value."""

    def __init__(self, inputs: int, actions: int) -> None:
        super().__init__()

        def tower(outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                nn.Linear(64, outputs),
            )  # fmt: skip

        self.actor, self.critic = tower(actions), tower(1)

    def logprobs(self, states: Tensor, actions: Tensor) -> Tensor:
        logits = self.actor(states).log_softmax(-1)
        return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def values(self, states: Tensor) -> Tensor:
        return self.critic(states).squeeze(-1)


def cartpole(seed: int) -> int:
    """Environment steps until 100 episodes average 475; LIMIT + 1 where they never did."""
    torch.manual_seed(seed)
    envs = [gymnasium.make("CartPole-v1") for _ in range(ENVS)]
    states = [env.reset(seed=100 * seed + place)[0] for place, env in enumerate(envs)]
    model = ActorCritic(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    lengths, running, done, began = deque[int](maxlen=100), [0] * ENVS, 0, time.monotonic()
    while done < LIMIT:
        rows: list[dict[str, Any]] = []
        for place, env in enumerate(envs):
            states[place], mine, ended, running[place] = _roll(
                env, states[place], model, running[place]
            )
            rows += mine
            lengths.extend(ended)
        done += ENVS * STEPS
        share = done / LIMIT
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - share)
        _learn(model, optimizer, rows, CLIP * (1 - share))
        if len(lengths) == 100 and statistics.fmean(lengths) >= 475:
            print(f"CartPole seed {seed}: {done:,} steps, {time.monotonic() - began:.0f} s")
            return done
    print(f"CartPole seed {seed}: {statistics.fmean(lengths):.0f} after {done:,} steps")
    return LIMIT + 1


@torch.no_grad()
def _roll(
    env: Any, state: np.ndarray, model: ActorCritic, length: int
) -> tuple[np.ndarray, list[dict[str, Any]], list[int], int]:
    """STEPS steps of one environment, a row an episode (or the part of it)."""
    rows: list[dict[str, Any]] = []
    ended: list[int] = []
    row: dict[str, Any] = {"states": [], "actions": []}
    for step in range(STEPS):
        seen = torch.from_numpy(state)
        action = int(torch.distributions.Categorical(logits=model.actor(seen)).sample())
        row["states"].append(seen)
        row["actions"].append(action)
        state, _, over, cut, _ = env.step(action)
        length += 1
        if over or cut or step == STEPS - 1:
            # Only a fall ends the rewards; a cut by time goes on as far as the critic knows.
            row["after"] = 0.0 if over else float(model.values(torch.from_numpy(state)))
            rows.append(row)
            row = {"states": [], "actions": []}
        if over or cut:
            ended.append(length)
            length = 0
            state, _ = env.reset()
    return state, rows, ended, length


def _learn(
    model: ActorCritic, optimizer: torch.optim.Optimizer, rows: list[dict[str, Any]], clip: float
) -> None:
    """PPO's epochs over rows of unequal length, padded."""
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones(len(row["actions"])) for row in rows], batch_first=True
    ).bool()
    states = nn.utils.rnn.pad_sequence(
        [torch.stack(row["states"]) for row in rows], batch_first=True
    )
    actions = nn.utils.rnn.pad_sequence(
        [torch.tensor(row["actions"]) for row in rows], batch_first=True
    )
    with torch.no_grad():
        old, values = model.logprobs(states, actions), model.values(states)
    after = torch.tensor([row["after"] for row in rows])
    advantages, returns = gae(mask.float(), values * mask, mask, GAMMA, LAM, after)
    advantages = masked_whiten(advantages, mask)
    places = mask.nonzero()
    for _ in range(EPOCHS):
        for part in places[torch.randperm(len(places))].split(MINIBATCH):
            chosen = torch.zeros_like(mask)
            chosen[part[:, 0], part[:, 1]] = True
            new = model.logprobs(states, actions)
            surrogate = clipped_surrogate(
                new, old, advantages, chosen, clip_low=clip, clip_high=clip
            )
            critic = value_loss(model.values(states), values, returns, chosen)
            loss = (token_shares(chosen) * surrogate.loss).sum() + critic.loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()


# -- the short corridor ----------------------------------------------------------------------


def corridor(baseline: bool) -> tuple[float, float]:
    """Mean return of the last 100 of 1,000 episodes over 100 runs, and its 95 % half-width.

    Three states that look the same; in the second, left and right are swapped. Preferences start
    at 5 % for right, as far off as in the book's figure 13.1.
    """
    rng = np.random.default_rng(0)
    theta = np.zeros((RUNS, 2))
    theta[:, 1] = math.log(0.05 / 0.95)
    value = np.zeros(RUNS)
    last: list[np.ndarray] = []
    for episode in range(EPISODES):
        actions, mask = _walk(_right(theta), rng)
        rewards = -torch.from_numpy(mask).double()
        returns, _ = gae(rewards, torch.zeros_like(rewards), torch.from_numpy(mask), 1.0, 1.0)
        slopes = _slopes(returns, mask).numpy()
        for t in range(mask.shape[1]):
            error = (returns[:, t].numpy() - value) * mask[:, t]
            # The loss is linear in the advantage: its slope at A = 1, times A.
            slope = slopes[:, t] * (error if baseline else returns[:, t].numpy())
            right = _right(theta)
            theta[:, 1] -= ALPHA * slope * (actions[:, t] - right)
            theta[:, 0] -= ALPHA * slope * (right - actions[:, t])
            value += BASELINE_ALPHA * error
        if episode >= EPISODES - 100:
            last.append(returns[:, 0].numpy())
    means = np.mean(last, axis=0)
    return float(means.mean()), float(1.96 * means.std(ddof=1) / math.sqrt(RUNS))


def _right(theta: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(theta[:, 0] - theta[:, 1]))


def _slopes(like: Tensor, mask: np.ndarray) -> Tensor:
    """d loss / d logp of `policy_gradient` where each advantage is 1: 0 after an episode's end."""
    logprobs = torch.zeros_like(like, requires_grad=True)
    kept = torch.from_numpy(mask)
    loss = policy_gradient(logprobs, torch.zeros_like(like), torch.ones_like(like), kept).loss
    return torch.autograd.grad(loss.sum(), logprobs)[0]


def _walk(right: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One episode of each run: [RUNS, T] actions (1 is right) and the mask of steps taken."""
    state, alive = np.zeros(RUNS, int), np.ones(RUNS, bool)
    actions, masks = [], []
    while alive.any() and len(actions) < LONGEST:
        action = rng.random(RUNS) < right
        actions.append(action.astype(np.int64))
        masks.append(alive.copy())
        forward = np.where(state == 1, ~action, action)
        state = np.where(alive, np.maximum(state + np.where(forward, 1, -1), 0), state)
        alive &= state < 3
    return np.stack(actions, 1), np.stack(masks, 1)


if __name__ == "__main__":
    main()
