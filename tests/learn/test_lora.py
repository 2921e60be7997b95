"""Adapters: what learns, what it is held to, and what the engine is sent."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from distrl.config import LoRAConfig
from distrl.learn.learner import PolicyLearner
from distrl.models.load import ModelError, load_policy
from distrl.models.lora import (
    Merged,
    _layers,
    add_adapter,
    check_targets,
    merged_tensors,
    without_adapter,
)
from distrl.sync.memory import whole

LORA = {"lora": {"rank": 4, "alpha": 8}}
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
IDS = torch.arange(20, 50)[None]


@pytest.fixture(params=[False, True], ids=["", "activations anew"])
def learner(new_learner, request):
    return new_learner(**LORA, checkpoint_activations=request.param)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_only_the_adapter_and_the_critic_learn(learner, make_groups, tiny_policy):
    base = load_policy(tiny_policy)
    torch.testing.assert_close(logits(learner.policy), logits(base), **EXACT)
    first = learner.learn(make_groups(seed=1)).metrics
    assert first["kl/ref"] == pytest.approx(0, abs=1e-5), "an adapter adds nothing at first"
    second = learner.learn(make_groups(seed=2)).metrics
    assert second["kl/ref"] != pytest.approx(0, abs=1e-5)
    kept = {n: p for n, p in learner.policy.named_parameters() if ".lora_" not in n}
    assert all(
        torch.equal(p, base.get_parameter(n.replace(".base_layer", ""))) for n, p in kept.items()
    )
    assert not any(p.requires_grad for p in kept.values())
    count = sum(p.numel() for p in learner.networks.trained[0].parameters())
    assert 0 < count < sum(p.numel() for p in base.parameters()) / 3


def test_without_it_the_policy_is_the_reference(learner, make_groups, tiny_policy):
    learner.learn(make_groups(seed=1))
    with learner.networks.as_reference() as reference:
        torch.testing.assert_close(
            logits(reference.model), logits(load_policy(tiny_policy)), **EXACT
        )
    assert not torch.allclose(logits(learner.policy), logits(load_policy(tiny_policy)), **EXACT)
    with pytest.raises(RuntimeError, match="in the block"), without_adapter(learner.policy):
        raise RuntimeError("in the block")
    assert not torch.allclose(logits(learner.policy), logits(load_policy(tiny_policy)), **EXACT)


def test_the_engine_is_sent_the_merged_weights_under_its_own_names(
    learner, make_groups, tiny_policy
):
    learner.learn(make_groups(seed=1))
    base = load_policy(tiny_policy)
    before = {n: p.clone() for n, p in learner.policy.state_dict().items()}
    sent = {name: whole(weight) for name, weight in learner.networks.policy_state().items()}
    assert sent.keys() == base.state_dict().keys()
    base.load_state_dict(sent)
    torch.testing.assert_close(logits(base), logits(learner.policy), **EXACT)
    assert all(torch.equal(p, before[n]) for n, p in learner.policy.state_dict().items())
    assert learner.publish().version == 1


def test_no_merged_weight_outlives_its_writing(learner, make_groups, monkeypatch):
    """A publication holds one sum at a time, never the whole model again."""
    learner.learn(make_groups(seed=1))
    plain, made = Merged.full_tensor, []

    def watched(self):
        assert not [ref for ref in made if ref() is not None]
        found = plain(self)
        made.append(weakref.ref(found.untyped_storage()))  # whichever tensor has it
        return found

    monkeypatch.setattr(Merged, "full_tensor", watched)
    learner.publish()
    assert len(made) == len(list(_layers(learner.policy)))


def test_the_export_is_an_ordinary_policy(learner, make_groups, tmp_path):
    learner.learn(make_groups(seed=1))
    learner.export(tmp_path / "policy")
    exported = load_policy(tmp_path / "policy")
    torch.testing.assert_close(logits(exported), logits(learner.policy), **EXACT)
    names = {name for name, _ in exported.named_parameters()}
    assert not [name for name in names if "lora" in name]


def test_a_checkpoint_holds_the_adapter_alone(
    learner: PolicyLearner, new_learner, make_groups, tmp_path
):
    learner.learn(make_groups(seed=1))
    learner.save(tmp_path / "state")
    resumed = new_learner(**LORA)
    resumed.load(tmp_path / "state")
    torch.testing.assert_close(logits(resumed.policy), logits(learner.policy), atol=0, rtol=0)
    critic = (tmp_path / "state" / "critic.safetensors").stat().st_size
    assert (tmp_path / "state" / "policy.safetensors").stat().st_size < critic / 3


def test_targets_that_name_nothing_are_refused_with_those_there_are(tiny_policy):
    config = LoRAConfig(rank=2, targets=("q_proj", "query"))
    with pytest.raises(ModelError, match=r"no layer .* called 'query'; it has down_proj, gate"):
        add_adapter(load_policy(tiny_policy), config, seed=0)
    with pytest.raises(ModelError, match="called 'query'"):
        check_targets(tiny_policy, config)
    check_targets(tiny_policy, LoRAConfig(rank=2))
    with pytest.raises(ModelError, match=r"called 'lm_head'; it has (?!.*lm_head)"):
        check_targets(tiny_policy, LoRAConfig(rank=2, targets=("lm_head",)))


def test_merging_adds_the_scaled_product(tiny_policy):
    model = load_policy(tiny_policy)
    adapter = add_adapter(model, LoRAConfig(rank=2, alpha=6, targets=("q_proj",)), seed=0)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(torch.randn(weight.shape))
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    a, b = (layer.get_parameter(f"lora_{x}.default.weight") for x in "AB")
    plain = layer.get_parameter("base_layer.weight")
    merged = merged_tensors(model)["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(whole(merged), plain + 3 * b @ a)
