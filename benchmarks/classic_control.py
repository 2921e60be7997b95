"""The algorithms of `distrl.algo` on problems whose answers are known.

    python benchmarks/classic_control.py [--seeds 5]

CartPole-v1: PPO from `gae`, `clipped_surrogate` and `value_loss`, with the settings that
RL Baselines3 Zoo tuned for it (hyperparams/ppo.yml), over 200,000 steps instead of 100,000.
Short corridor (Sutton and Barto 2018, example 13.1): REINFORCE from `gae` (lam 1, no values) and
`policy_gradient`, an update a step (sections 13.3 and 13.4), with a learnt baseline and without,
100 runs of 1,000 episodes at the same step size. Besides, without a threshold: the step size at
which plain REINFORCE does best, as in figure 13.2.

Thresholds, set before the first run: the mean of 100 episodes of CartPole reaches 475 within
200,000 steps for every seed; with a baseline the corridor's last 100 episodes average -13.5 or
better, without one -16 or worse. The best that there is: 500 and -11.66. Writes
runs/classic_control.png: return against environment steps, and against episodes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium
import numpy as np
import torch
from common import ROOT, ok, report
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from distrl.algo import (
    clipped_surrogate,
    gae,
    masked_whiten,
    policy_gradient,
    token_shares,
    value_loss,
)

ENVS, STEPS, EPOCHS = 8, 32, 20  # all 8 x 32 steps are one minibatch
GAMMA, LAM, CLIP, LR = 0.98, 0.8, 0.2, 1e-3
LIMIT, WINDOW, SOLVED = 200_000, 100, 475
ALPHA, BEST_ALPHA, BASELINE_ALPHA = 2e-3, 2.0**-13, 2.0**-6
RUNS, EPISODES, LAST, FLOOR = 100, 1000, 100, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    began = time.monotonic()
    learned = [cartpole(seed) for seed in range(seeds)]
    walked = {
        "with a baseline": corridor(ALPHA, BASELINE_ALPHA),
        "without": corridor(ALPHA, 0.0),
        "without, alpha 2^-13": corridor(BEST_ALPHA, 0.0),
    }
    plot(ROOT / "runs" / "classic_control.png", learned, walked)
    figures = {**_cartpole_figures(learned), **_corridor_figures(walked)}
    figures["seconds"] = f"{time.monotonic() - began:.0f}"
    report("Classic control", figures, f"python benchmarks/classic_control.py --seeds {seeds}")


def _cartpole_figures(learned: Sequence[Learned]) -> dict[str, str]:
    took = [one.solved for one in learned if one.solved is not None]
    return {
        "CartPole, seeds that got there": f"{ok(len(took) == len(learned))} "
        f"{len(took)}/{len(learned)}",
        "CartPole, steps to 475": ", ".join(
            "never" if one.solved is None else f"{one.solved:,}" for one in learned
        ),
        "CartPole, mean of these": _spread(took, ",.0f"),
    }


def _corridor_figures(walked: Mapping[str, np.ndarray]) -> dict[str, str]:
    ends = {name: returns[-LAST:].mean(0) for name, returns in walked.items()}
    good = {
        "with a baseline": ends["with a baseline"].mean() >= -13.5,
        "without": ends["without"].mean() <= -16,
    }
    return {
        f"corridor {name}": (f"{ok(good[name])} " if name in good else "     ")
        + _spread(end, ".2f")
        for name, end in ends.items()
    }


def _spread(values: Sequence[float] | np.ndarray, how: str) -> str:
    """Mean and the half-width of Student's 95 % interval."""
    if len(values) < 2:
        return f"{np.mean(values):{how}}" if len(values) else "none"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{np.mean(values):{how}} +- {half:{how}} (95 %)"


def plot(path: Path, learned: Sequence[Learned], walked: Mapping[str, np.ndarray]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for seed, one in enumerate(learned):
        left.plot(*zip(*one.curve, strict=True), label=seed)
    left.axhline(SOLVED, color="grey", linestyle=":")
    left.set(title="CartPole-v1", xlabel="environment steps", ylabel="return, last 100 episodes")
    left.legend(title="seed")
    for name, returns in walked.items():
        right.plot(returns.mean(1), label=name, linewidth=0.8)
    right.axhline(-11.66, color="grey", linestyle=":")
    right.set(
        title="Short corridor", xlabel="episodes", ylabel=f"return, {RUNS} runs", ylim=(-100, 0)
    )
    right.legend(title="REINFORCE")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


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


@dataclass
class Row:
    """An episode, or the part of it that one roll saw."""

    states: list[Tensor] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    after: Tensor = field(default_factory=lambda: torch.zeros(4))
    fell: bool = False


@dataclass(frozen=True)
class Learned:
    """(steps, mean of the last 100 episodes), and the steps to 475, None where it never did."""

    curve: list[tuple[int, float]]
    solved: int | None


def cartpole(seed: int) -> Learned:
    """PPO until 475 or LIMIT; learning rate and clip fall in a line that ends at 0 at LIMIT."""
    torch.manual_seed(seed)
    poles, model, began = Poles(seed), ActorCritic(4, 2), time.monotonic()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, eps=1e-5)
    curve: list[tuple[int, float]] = []
    solved = None
    for done in range(ENVS * STEPS, LIMIT + 1, ENVS * STEPS):
        rows = poles.roll(model)
        if len(poles.lengths) == WINDOW:
            curve.append((done, float(np.mean(poles.lengths))))
            if curve[-1][1] >= SOLVED:
                solved = done
                break
        left = 1 - done / LIMIT
        optimizer.param_groups[0]["lr"] = LR * left
        _learn(model, optimizer, rows, CLIP * left)
    print(f"CartPole seed {seed}: {solved} steps, {time.monotonic() - began:.0f} s", flush=True)
    return Learned(curve, solved)


class Poles:
    """Eight environments side by side, and how long their last 100 episodes were."""

    def __init__(self, seed: int) -> None:
        self.envs = [gymnasium.make("CartPole-v1") for _ in range(ENVS)]
        self.lengths: deque[int] = deque(maxlen=WINDOW)
        self._states = np.stack(
            [env.reset(seed=ENVS * seed + place)[0] for place, env in enumerate(self.envs)]
        )
        self._running = [0] * ENVS

    @torch.no_grad()
    def roll(self, model: ActorCritic) -> list[Row]:
        """STEPS steps of each environment."""
        rows: list[Row] = []
        current = [Row() for _ in self.envs]
        for _ in range(STEPS):
            states = torch.from_numpy(self._states.copy())
            actions = model.actor(states).softmax(-1).multinomial(1).squeeze(1)
            for place, action in enumerate(actions.tolist()):
                row = current[place]
                row.states.append(states[place])
                row.actions.append(actions[place])
                if self._step(place, action, row):
                    rows.append(row)
                    current[place] = Row()
        return rows + [row for row in current if row.actions]

    def _step(self, place: int, action: int, row: Row) -> bool:
        """Did the episode end? Only a fall ends the rewards; after a cut by time they go on."""
        state, _, fell, cut, _ = self.envs[place].step(action)
        row.after, row.fell = torch.from_numpy(state), fell
        self._running[place] += 1
        if fell or cut:
            self.lengths.append(self._running[place])
            self._running[place] = 0
            state, _ = self.envs[place].reset()
        self._states[place] = state
        return fell or cut


def _learn(
    model: ActorCritic, optimizer: torch.optim.Optimizer, rows: Sequence[Row], clip: float
) -> None:
    """PPO's epochs (Schulman et al. 2017, algorithm 1) over rows of unequal length, padded."""
    states = pad_sequence([torch.stack(row.states) for row in rows], batch_first=True)
    actions = pad_sequence([torch.stack(row.actions) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.actions) for row in rows])
    mask = torch.arange(states.shape[1]) < lengths.unsqueeze(1)
    shares = token_shares(mask)
    with torch.no_grad():
        old, values = model.logprobs(states, actions), model.values(states)
        advantages, returns = _advantages(model, rows, values, mask)
    for _ in range(EPOCHS):
        new = model.logprobs(states, actions)
        policy = clipped_surrogate(new, old, advantages, mask, clip_low=clip, clip_high=clip)
        critic = value_loss(model.values(states), values, returns, mask)
        optimizer.zero_grad()
        ((shares * policy.loss).sum() + critic.loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def _advantages(
    model: ActorCritic, rows: Sequence[Row], values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns; where a row did not end by a fall, the critic goes on."""
    fell = torch.tensor([row.fell for row in rows])
    after = model.values(torch.stack([row.after for row in rows])) * ~fell
    advantages, returns = gae(mask.float(), values, mask, GAMMA, LAM, after)
    return masked_whiten(advantages, mask), returns


# -- the short corridor ----------------------------------------------------------------------


def corridor(alpha: float, baseline_alpha: float) -> np.ndarray:
    """REINFORCE; the returns of all episodes, [EPISODES, RUNS]. Without a baseline at rate 0.

    Three states that look the same; in the second, left and right are swapped. So a policy is one
    number: by how much the preference for right leads that for left. It starts at 5 % for right,
    example 13.1's epsilon-greedy left.
    """
    rng = np.random.default_rng(0)
    lead = np.full(RUNS, math.log(FLOOR / (1 - FLOOR)))
    value = np.zeros(RUNS)
    all_returns: list[np.ndarray] = []
    for _ in range(EPISODES):
        actions, mask = _walk(_right(lead), rng)
        returns = _returns(mask)
        errors = _errors(returns, mask, value, baseline_alpha)
        slopes = _slopes(errors, mask)
        for action, slope in zip(actions.T, slopes.T, strict=True):
            # d logp / d lead is action - right. Either preference moves by alpha: the lead by two.
            lead -= 2 * alpha * slope * (action - _right(lead))
        all_returns.append(returns[:, 0])
    return np.stack(all_returns)


def _right(lead: np.ndarray) -> np.ndarray:
    """Probability of going right, kept between 5 and 95 %.

    So each episode ends, and a policy that one bad episode has thrown to an edge still sees both
    actions. The bounds are the two epsilon-greedy policies of example 13.1. The book's text does
    not speak of them in its experiment; the Python code that its site points to (S. Zhang,
    reinforcement-learning-an-introduction, chapter13/short_corridor.py) has them.
    """
    return (1 / (1 + np.exp(-lead))).clip(FLOOR, 1 - FLOOR)


def _walk(right: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One episode of each run: [RUNS, T] actions (1 is right) and the mask of steps taken."""
    state, alive = np.zeros(RUNS, int), np.ones(RUNS, bool)
    actions, masks = [], []
    while alive.any():
        action = rng.random(RUNS) < right
        actions.append(action)
        masks.append(alive)
        forward = action ^ (state == 1)
        state = np.where(alive, np.maximum(state + np.where(forward, 1, -1), 0), state)
        alive = state < 3
    return np.stack(actions, 1), np.stack(masks, 1)


def _returns(mask: np.ndarray) -> np.ndarray:
    """G_t, -1 a step."""
    kept = torch.from_numpy(mask)
    rewards = -kept.double()
    return gae(rewards, torch.zeros_like(rewards), kept, 1.0, 1.0)[1].numpy()


def _errors(returns: np.ndarray, mask: np.ndarray, value: np.ndarray, rate: float) -> np.ndarray:
    """G_t - w for each step, w learning from each in turn (in `value`): the box of section 13.4."""
    errors = np.zeros_like(returns)
    for t in range(returns.shape[1]):
        errors[:, t] = (returns[:, t] - value) * mask[:, t]
        value += rate * errors[:, t]
    return errors


def _slopes(advantages: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """d loss / d logp of `policy_gradient`, whatever logp is: the loss is linear in it."""
    logprobs = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    constants = torch.from_numpy(advantages), torch.from_numpy(mask)
    loss = policy_gradient(logprobs, logprobs, *constants).loss
    return torch.autograd.grad(loss.sum(), logprobs)[0].numpy()


if __name__ == "__main__":
    main()
