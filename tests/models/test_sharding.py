"""Layers that are computed again on the way back, and weights that are gathered for passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from distrl.models import load_policy
from distrl.models.sharding import checkpoint_activations, layers, shard

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


def test_who_is_alone_gathers_weights_once_for_a_way_back_and_the_passes_before_it(
    mesh, tiny_policy
):
    body = load_policy(tiny_policy).base_model
    shard(body, mesh, torch.bfloat16)

    def states() -> torch.Tensor:
        return body(input_ids=IDS, use_cache=False).last_hidden_state

    @torch.no_grad()
    def without_gradient() -> None:
        states()

    def gathered() -> bool:
        return next(body.parameters()).dtype == torch.bfloat16

    def gathers(*passes: Callable[[], object]) -> int:
        """How often they have an embedding in bfloat16 made of the one in float32."""
        size = body.get_parameter("embed_tokens.weight").numel()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as made:
            for each in passes:
                each()
        casts = [e for e in made.events() or [] if e.name == "aten::_to_copy"]
        return sum(math.prod(event.input_shapes[0]) == size for event in casts)

    ways: list[torch.Tensor] = []
    assert gathers(without_gradient) == 1
    assert not gathered()
    assert gathers(lambda: ways.append(states()), without_gradient, without_gradient) == 1
    assert gathered(), "for the way back"
    ways.pop().float().square().sum().backward()
    assert not gathered()
    assert {p.grad.dtype for p in body.parameters() if p.grad is not None} == {torch.float32}
    assert gathers(without_gradient) == 1
    assert not gathered()


def test_what_never_changes_is_left_as_it_is_where_nobody_shares_it(mesh, tiny_policy):
    """A reference has nothing to gather: its weights are those of its passes already."""
    model = load_policy(tiny_policy).bfloat16()
    for frozen, dtype, whole in (
        (False, torch.bfloat16, False),
        (True, torch.float32, False),
        (True, torch.bfloat16, True),
    ):
        body = copy.deepcopy(model.base_model).requires_grad_(not frozen)
        shard(body, mesh, dtype)
        weights = list(body.parameters())
        assert all(isinstance(weight, DTensor) is not whole for weight in weights)
        with torch.no_grad():
            assert body(input_ids=IDS, use_cache=False).last_hidden_state.dtype == dtype
