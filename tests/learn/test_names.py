"""Weights as a checkpoint has them, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from distrl.learn.names import CheckpointNames, Part
from distrl.models.load import ModelError
from distrl.sync.memory import whole

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "olmoe": OlmoeConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=64),
}


def model_of(config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_have_the_names_and_numbers_that_save_pretrained_gives_them(
    kind: str, tmp_path: Path
) -> None:
    model = model_of(MIXTURES[kind])
    model.save_pretrained(tmp_path)
    wanted = load_file(tmp_path / "model.safetensors")
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        found = CheckpointNames(loaded).of(loaded.state_dict())
        assert set(found) == set(wanted)
        assert sum("experts" in name for name in found) == 2 * 4 * 3
        for name, weight in found.items():
            assert (weight.shape, weight.dtype) == (wanted[name].shape, wanted[name].dtype)
            assert torch.equal(whole(weight), wanted[name]), name


def test_no_more_than_one_weight_is_taken_apart_at_a_time() -> None:
    model = model_of(MIXTURES["olmoe"])
    found = CheckpointNames(model).of(model.state_dict())
    sources = {id(part.source): part.source for part in found.values() if isinstance(part, Part)}
    assert len(sources) == 4
    for weight in found.values():
        whole(weight)
        assert sum(bool(source.parts) for source in sources.values()) <= 1
    assert not any(source.parts for source in sources.values())


def test_other_models_keep_their_tensors() -> None:
    model = model_of(LlamaConfig(**SIZES))
    state = model.state_dict()
    found = CheckpointNames(model).of(state)
    assert list(found) == list(state) and all(found[name] is state[name] for name in state)


def test_weights_that_a_checkpoint_puts_together_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def together(model: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return (
            state if len(state) == 1 else {"all": torch.cat([x.view(-1) for x in state.values()])}
        )

    monkeypatch.setattr("distrl.learn.names.revert_weight_conversion", together)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM are put together.*another model"):
        CheckpointNames(model_of(LlamaConfig(**SIZES)))
