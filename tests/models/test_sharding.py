"""Layers that are computed again on the way back."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from distrl.models import load_policy
from distrl.models.sharding import checkpoint_activations, layers

IDS = torch.arange(30)[None]


def test_each_layer_keeps_its_input_alone_and_is_computed_again(tiny_policy):
    def kept(model: PreTrainedModel) -> tuple[int, int, torch.Tensor]:
        """Numbers that the way back needs, runs of a layer's inside, and a gradient."""
        runs = []
        for layer in layers(model):
            layer.get_submodule("mlp").register_forward_pre_hook(lambda *_: runs.append(1))
        held = 0

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            states = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        states.sum().backward()
        gradient = model.get_parameter("model.embed_tokens.weight").grad
        assert gradient is not None
        return held, len(runs), gradient

    plain, anew = load_policy(tiny_policy), load_policy(tiny_policy)
    names = list(anew.state_dict()), [name for name, _ in anew.named_parameters()]
    checkpoint_activations(anew)
    assert (list(anew.state_dict()), [name for name, _ in anew.named_parameters()]) == names
    (held, runs, wanted), (held_anew, runs_anew, found) = kept(plain), kept(anew)
    assert runs_anew == 2 * runs == 2 * len(list(layers(plain)))
    assert held_anew < held / 4
    torch.testing.assert_close(found, wanted)
