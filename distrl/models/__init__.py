"""Models: loading and saving policies, scalar heads for rewards and values, sampling.

Everything here reads *right-padded* batches: ids_BT with lengths_B. What stands at or
after a row's length is never read, so the padding's id may be any id, the
end-of-sequence id included. Under causal attention no real token can see padding that
stands to its right, so no attention mask is needed, and none is passed: attention then
takes its fastest path, and a padded row gives what the row alone would give.
"""

from __future__ import annotations

from distrl.models.heads import ScalarModel, reward_input
from distrl.models.load import best_device, eos_id, load_policy, new_llama, save_policy
from distrl.models.sample import sample

__all__ = [
    "ScalarModel",
    "best_device",
    "eos_id",
    "load_policy",
    "new_llama",
    "reward_input",
    "sample",
    "save_policy",
]
