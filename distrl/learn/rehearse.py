"""The user's own advantages and objective, tried on made-up numbers before anything is started."""

from __future__ import annotations

import torch

from distrl.config import ConfigError, LearnConfig
from distrl.learn.advantages import Outcome, estimate
from distrl.learn.objectives import Tokens, surrogate

PROMPTS, LONGEST = 2, 4


def rehearse(config: LearnConfig, samples: int) -> None:
    """Call those that are named as `module:function` once, as the learner will: on `samples`
    responses to each of two prompts, of at most four tokens.

    Raises ConfigError: one of them is not there, fails, answers with something else than is due, or
    with a loss that has no gradient.
    """
    rows = PROMPTS * samples
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(LONGEST) <= (torch.arange(rows) % LONGEST)[:, None]
    noise = torch.randn((rows, LONGEST), generator=generator) * mask
    if ":" in config.advantage.kind:
        made = Outcome(rewards_BT=noise, values_BT=None, mask_BT=mask, samples=samples)
        estimate(made, config.advantage)
    if ":" in config.objective.kind:
        logprobs = (noise - 3).requires_grad_()
        tokens = Tokens(
            logprobs=logprobs, old=logprobs.detach(), advantages=noise, mask=mask, penalty=1.0
        )
        if not surrogate(tokens, config.objective).loss.requires_grad:
            raise ConfigError(
                f"learn.objective.kind={config.objective.kind} gave a loss without a gradient; "
                "compute it from tokens.logprobs, and do not detach it"
            )
