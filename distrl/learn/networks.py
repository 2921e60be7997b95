"""The networks of a learner: the policy, what it is held to, and the critic where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distrl.config import LearnConfig
from distrl.data.tokenizer import load_tokenizer
from distrl.learn.forward import PolicyModel
from distrl.learn.names import CheckpointNames
from distrl.learn.ranks import ALONE, Ranks
from distrl.models.compiling import compile_layers
from distrl.models.heads import ScalarModel
from distrl.models.load import ModelError, after_head, load_policy
from distrl.models.lora import Adapter, Merged, add_adapter, merged_tensors, without_adapter
from distrl.models.packing import pack
from distrl.models.sharding import checkpoint_activations, shard
from distrl.sync.memory import Weight

PROBE = 8
"""Tokens whose logits are compared with what the head makes of the last states."""


@dataclass(kw_only=True, slots=True)
class Networks:
    """`reference` is frozen; None: the policy without its `adapter`, or nobody asks. `critic` is
    None where advantages need none; where `shared`, it stands on the policy's own body.
    `packed`: all read sequences without pads. `names`: the policy's in its checkpoint."""

    policy: PolicyModel
    reference: PolicyModel | None
    critic: ScalarModel | None
    shared: bool = False
    adapter: Adapter | None = None
    packed: bool = False
    names: CheckpointNames | None = None

    @classmethod
    def load(
        cls,
        policy: Path,
        reward_model: Path | None,
        config: LearnConfig,
        *,
        seed: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> Networks:
        """Policy and reference from one folder, the critic from the reward model's where it is
        given; spread over `ranks` where these have a mesh. Raises ModelError."""
        trained = load_policy(policy, tokenizer=load_tokenizer(policy))
        check_head(trained, policy)
        names = CheckpointNames(trained)
        critic = None
        shared = config.has_critic and config.value.trunk == "shared"
        if shared:
            critic = ScalarModel.upon(trained)
        elif config.has_critic and reward_model is not None:
            critic = ScalarModel.load(reward_model)
        elif config.has_critic:
            critic = ScalarModel.from_policy(trained, seed, zero_head=True)
        bodies = [trained] if critic is None or shared else [trained, critic.body]
        adapter = add_adapter(trained, config.lora, seed) if config.lora.rank else None
        reference = None
        if config.kl.used and adapter is None:
            reference = PolicyModel(load_policy(policy).requires_grad_(False))
            bodies.append(reference.model)
        networks = cls(
            policy=PolicyModel(trained),
            reference=reference,
            critic=critic,
            shared=shared,
            adapter=adapter,
            packed=config.packing and all([pack(body) for body in bodies]),
            names=names,
        )
        networks._place(config, device, ranks)
        return networks

    def _place(self, config: LearnConfig, device: torch.device, ranks: Ranks) -> None:
        """Bring everything to where it is computed."""
        everyone = (self.policy, self.reference, self.critic_part)
        roots = [root for root in everyone if root is not None]
        if config.checkpoint_activations:
            for root in roots:
                checkpoint_activations(root)
        if config.compile:
            for root in roots:
                compile_layers(root, device)
                if isinstance(root, PolicyModel):
                    root.compile_head()
        for root in roots:
            if ranks.mesh is None:
                root.to(device)
                continue
            if isinstance(root, ScalarModel):  # values keep float32's digits
                shard(root.head, ranks.mesh, torch.float32, offload=config.offload)
            compute = torch.float32 if isinstance(root, nn.Linear) else getattr(torch, config.dtype)
            if root is self.reference:
                for weight in root.parameters():  # passes are all that it is there for
                    weight.data = weight.data.to(compute)
            shard(root, ranks.mesh, compute, offload=config.offload)
        if self.adapter is not None:
            self.adapter = Adapter(self.policy.model)

    @contextmanager
    def as_reference(self) -> Iterator[PolicyModel]:
        """The reference, for as long as the block lasts: nothing else may run the policy."""
        if self.reference is not None:
            yield self.reference
            return
        with without_adapter(self.policy.model):
            yield self.policy

    @property
    def critic_part(self) -> nn.Module | None:
        """What is the critic's alone: its head where the body is shared."""
        return self.critic.head if self.critic is not None and self.shared else self.critic

    @property
    def trained(self) -> tuple[nn.Module, ...]:
        """What learns, each weight in one of them: the policy or its adapter, then the critic."""
        first = self.policy.model if self.adapter is None else self.adapter
        return (first,) if self.critic_part is None else (first, self.critic_part)

    def policy_state(self) -> dict[str, Tensor | Merged]:
        """The policy's weights, adapters to be merged; each is put together by `whole`."""
        model = self.policy.model
        return model.state_dict() if self.adapter is None else merged_tensors(model)

    def checkpoint_state(self) -> dict[str, Weight]:
        """`policy_state` under the names of the policy's checkpoint, as an engine wants it."""
        state = self.policy_state()
        return dict(state) if self.names is None else self.names.of(state)


@torch.no_grad()
def check_head(policy: PreTrainedModel, folder: Path) -> None:
    """ModelError where logits are more than the output head's: the learner reads the head alone,
    and would disagree with the engine."""
    head, config = policy.get_output_embeddings(), policy.config.get_text_config()
    if not isinstance(head, nn.Linear) or policy.base_model is policy:
        raise ModelError(f"the policy in {folder} has no plain linear output head on a body")
    found = after_head(config)
    ids_1L = torch.linspace(0, head.out_features - 1, PROBE).long()[None]
    states_1LD = policy.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state
    logits_1LV = policy(input_ids=ids_1L, use_cache=False).logits
    alike = torch.allclose(head(states_1LD), logits_1LV, rtol=1e-4, atol=1e-4, equal_nan=True)
    if not found and alike:
        return
    raise ModelError(
        f"the policy in {folder} does something to its logits after the head "
        f"({', '.join(found) or 'they are not what the head makes of the last states'}), which the "
        "learner does not know; choose another model"
    )
