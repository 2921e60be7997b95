"""The names of metrics: one place says what each means and in which unit.

Names are part of the interface: alarms, reports and other people's notebooks read
them. Add one here before logging it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

METRICS: dict[str, str] = {
    "reward/mean": "mean score of the step's responses, before the KL price (reward units)",
    "reward/std": "standard deviation of those scores (reward units)",
    "kl/ref": "KL of the policy to the reference policy, k1, summed over a response (nats)",
    "kl/coef": "price of a nat of KL (reward units per nat), in the reward or the loss (kl.place)",
    "ppo/clip_fraction": "share of response tokens whose probability ratio was clipped (0..1)",
    "ppo/approx_kl": "KL to the proximal policy that each minibatch finds before its update, their "
    "mean (nats a token); 0 where a step has one minibatch",
    "ppo/moved": "KL after a step to what its ratios are from, a token (objective.penalty_target)",
    "ppo/entropy": "entropy of the policy's next-token distribution (nats a token)",
    "ppo/ess": "effective sample size of the importance ratios, uncut, over their number (0..1)",
    "ppo/capped": "share of tokens whose importance weight was cut or rejected (0..1)",
    "value/loss": "squared-error loss of the critic (reward units squared)",
    "value/clip_fraction": "share of response tokens whose value was clipped (0..1)",
    "value/mean": "mean value that the critic gave to response tokens (reward units)",
    "value/explained_variance": "1 - Var(return - value) / Var(return); 1 is perfect, 0 useless",
    "ppo/penalty": "price of a nat between old and new policy (objective.kind=kl_penalty)",
    "loss/policy": "the policy's loss: objective, KL price in the loss and entropy bonus",
    "loss/pretrain": "PPO-ptx: -log p of its texts (the SFT examples, or pretrain.source), before "
    "its coefficient (nats a token)",
    "grad/norm": "norm of the policy's gradient before clipping; 0 while the critic learns alone",
    "learn/lr": "the policy's learning rate in the step",
    "learn/optimizer_steps": "optimizer steps of the learner step",
    "learn/padding": "share of the tokens of the gradient's passes that are padding",
    "learn/skipped_steps": "steps since the start of the run whose loss or gradient was not finite",
    "staleness/bound": "largest age that a token of the step was allowed (versions)",
    "staleness/max": "age of the oldest token that reached the gradient (versions)",
    "staleness/mean": "mean age of the tokens that reached the gradient (versions)",
    "staleness/hist": "list: entry k is the number of tokens of age k",
    "staleness/in_flight": "part of staleness/mean that passed while a group was in flight",
    "staleness/in_buffer": "part of staleness/mean that passed while a group waited in the buffer",
    "staleness/masked_tokens": "tokens of the step left out of the gradient as too old",
    "mismatch/lag0_abs_mean": "mean |log p(learner) - log p(engine)| on tokens of age 0 (nats)",
    "rollout/tokens_per_second": "response tokens generated a second of wall-clock",
    "rollout/length_mean": "mean length of the step's responses (tokens)",
    "rollout/truncated_fraction": "share of responses that were cut by length (0..1)",
    "buffer/groups": "scored groups that wait for the learner when its step is over",
    "buffer/mib": "memory of the scored groups that wait for the learner (MiB)",
    "driver/lead": "batches that were admitted ahead of the one that is trained",
    "driver/in_flight": "groups that are being generated or scored",
    "driver/generators": "generators that can take a prompt",
    "driver/drops": "groups dropped since the start of the run",
    "driver/retries": "groups tried again since the run was started or resumed",
    "driver/restarts": "workers restarted since the run was started or resumed",
    "waste/tokens": "response tokens generated for nothing, since start or resume",
    "waste/seconds": "generator seconds spent for nothing, since start or resume (s)",
    "driver/reloads": "weights sent again after a failed canary, since start or resume",
    "time/step": "wall-clock from one learner step's end to the next's (s)",
    "time/generate": "mean time to generate a group of the step (s)",
    "time/score": "mean time to score a group of the step (s)",
    "time/in_flight": "mean time from a group's admission to its arrival in the buffer (s)",
    "time/in_buffer": "mean time that a group waited in the buffer (s)",
    "time/learn": "time in the learner's update (s)",
    "time/learn_compute": "part of time/learn inside the learner's own process (s)",
    "time/sync": "time from the weights' publication to the last generator holding them (s)",
    "time/publish": "part of time/sync in which the learner publishes and does nothing else (s)",
    "time/idle_learner": "time that the learner waited for a full batch, or for a load to end (s)",
    "samples/total": "responses trained on since the start of the run",
    "tokens/total": "response tokens trained on since the start of the run",
}

BY_LAG: dict[str, str] = {
    "tokens": "number of tokens of this age",
    "kl": "KL(behaviour || proximal) a token, k3 (nats): at lag 0 numerical, beyond it drift",
    "ess": "effective sample size of their importance weights, uncapped, over their number",
    "ratio_mean": "mean of proximal over behaviour probability; 1 but for chance",
    "clip_fraction": "share of tokens whose ratio (GSPO: their sequence's) the clip would bound; "
    "none where the objective has no clip (kl_penalty, policy_gradient)",
}
"""Metrics by the age of tokens: `offpolicy/<name>/lag<versions>`. All are of the tokens that the
learner computed: of learn.trust_engine_logprobs' own age those alone that check the engine."""

_BY_LAG = re.compile(rf"offpolicy/({'|'.join(BY_LAG)})/lag\d+")
# Each part of the reward has a metric of its own, by the name that the config gives it.
_COMPONENT = re.compile(r"reward/[a-z0-9_]+")


def unknown_names(values: Iterable[str]) -> list[str]:
    """The names in `values` that are neither in METRICS, nor `reward/<component>`, nor by lag.

    "step" and "time", which every JSONL row carries, are known.
    """
    return sorted(
        name
        for name in values
        if name not in METRICS
        and name not in {"step", "time"}
        and not _COMPONENT.fullmatch(name)
        and not _BY_LAG.fullmatch(name)
    )
