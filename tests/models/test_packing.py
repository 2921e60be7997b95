"""Reading without pads: the same states and gradients as with them, and one by one."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from distrl.models import compiling, packing
from distrl.models.compiling import compile_layers
from distrl.models.packing import PACKED, is_packed, pack, token_states
from distrl.models.sharding import shard

pytestmark = pytest.mark.usefixtures("without_kernel")  # which rounds otherwise than torch's

LENGTHS_B = torch.tensor([1, 9, 4, 17])
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


def new_model(kind: str = "llama", **more):
    """A two-layer model from a config; four heads on two of keys and values where it can."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        **more,
    }
    if kind not in ("gpt_neox", "opt", "gpt2"):
        sizes.setdefault("num_key_value_heads", 2)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


NARROW_VALUES = {
    "kind": "deepseek_v3",
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,  # no experts
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
"""A model whose heads of queries are 48 wide and those of values 32."""


@pytest.fixture
def ids_BL():
    ids = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(1))
    return ids * (torch.arange(17) < LENGTHS_B[:, None])


def chosen_BL():
    """Some tokens of each sequence, the last among them."""
    places = torch.arange(17)
    return (places >= LENGTHS_B[:, None] // 2) & (places < LENGTHS_B[:, None])


def read(model, ids_BL, chosen):
    """States and the gradients of a loss in which every state counts differently."""
    model.zero_grad(set_to_none=True)
    states_ND = token_states(model.base_model, ids_BL, chosen)
    weights = torch.linspace(-1, 1, states_ND.numel()).view_as(states_ND).to(states_ND.device)
    (states_ND.sin() * weights).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return states_ND.detach(), grads


KINDS = ["llama", "qwen2", "qwen3", "gpt_neox", "olmo2", "phi", "granite", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_passes_agree(kind, ids_BL):
    model = new_model(kind)
    padded, padded_grads = read(model, ids_BL, chosen_BL())
    assert pack(model)
    assert model.config._attn_implementation == PACKED
    packed, packed_grads = read(model, ids_BL, chosen_BL())
    close(packed, padded)
    assert len(packed_grads) == len(padded_grads) > 10
    for mine, theirs in zip(packed_grads, padded_grads, strict=True):
        close(mine, theirs)


def test_packed_sequences_are_as_if_alone(ids_BL):
    model = new_model()
    assert pack(model)
    inside_BL = torch.arange(17) < LENGTHS_B[:, None]
    together = token_states(model.base_model, ids_BL, inside_BL)
    alone = [
        model.base_model(input_ids=row[None, :length], use_cache=False).last_hidden_state[0]
        for row, length in zip(ids_BL, LENGTHS_B.tolist(), strict=True)
    ]
    close(together, torch.cat(alone))


def test_what_stands_on_pads_is_never_read(ids_BL):
    model = new_model()
    assert pack(model)
    clean, clean_grads = read(model, ids_BL, chosen_BL())
    inside_BL = torch.arange(17) < LENGTHS_B[:, None]
    other, other_grads = read(model, torch.where(inside_BL, ids_BL, 95), chosen_BL())
    assert torch.equal(clean, other)
    assert all(map(torch.equal, clean_grads, other_grads))


def test_layers_compute_on_tokens_alone(ids_BL):
    model = new_model()
    assert pack(model)
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    token_states(model.base_model, ids_BL, chosen_BL())
    read = int(chosen_BL().sum())
    assert seen == [(1, int(LENGTHS_B.sum()), 64), (1, read, 64)], "the last on what is read"


@pytest.mark.parametrize(("kind", "cut"), [(k, k in ("llama", "qwen2", "qwen3")) for k in KINDS])
def test_the_last_layer_is_cut_where_it_is_of_llamas_kind(kind, cut, ids_BL):
    """Granite's has the same parts, but weighs what they give."""
    model = new_model(kind, **({"residual_multiplier": 0.5} if kind == "granite" else {}))
    assert pack(model)
    seen = []
    model.base_model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state))
    token_states(model.base_model, ids_BL, chosen_BL())
    assert seen[0].shape[1] == (chosen_BL().sum() if cut else LENGTHS_B.sum())


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_read_as_far_as_their_last_chosen_token(packed, ids_BL):
    """A learner has no use for what comes after a response's last token."""
    model = new_model()
    assert not packed or pack(model)
    whole = token_states(model.base_model, ids_BL, torch.arange(17) < LENGTHS_B[:, None])
    ends_B = torch.tensor([0, 8, 1, 16])  # nothing is asked of the first
    chosen = torch.arange(17) == ends_B[:, None] - 1
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    states_ND = token_states(model.base_model, ids_BL, chosen)
    close(states_ND, whole[(LENGTHS_B.cumsum(0) - LENGTHS_B + ends_B - 1)[1:]])
    assert seen == ([(1, 1 + 8 + 1 + 16, 64)] if packed else [(4, 16, 64)])


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"head_dim": 16}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_models_whose_tokens_see_less_or_more_keep_their_pads(kind, more, ids_BL):
    model = new_model(kind, **more)
    before, _ = read(model, ids_BL, chosen_BL())
    assert not pack(model)
    assert model.config._attn_implementation == "sdpa"
    after, _ = read(model, ids_BL, chosen_BL())
    assert torch.equal(before, after)


def test_a_model_that_keeps_its_own_attention_is_not_called_packed():
    config = FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).eval()
    assert not pack(model) and not is_packed(model)


def test_a_model_that_carries_something_along_is_found_out(caplog):
    """Its config says nothing, its states do."""
    model = new_model()
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + out.cumsum(1))
    with caplog.at_level(logging.WARNING):
        assert not pack(model)
    assert "without pads" in caplog.text
    assert model.config._attn_implementation == "sdpa"


def test_a_packed_model_is_otherwise_what_it_was(ids_BL):
    """Called by itself, with a padding mask on either side, it answers as before."""
    model, packed = new_model(), new_model()
    assert pack(packed)
    right_BL = (torch.arange(17) < LENGTHS_B[:, None]).long()
    for mask in (None, right_BL, right_BL.flip(1)):
        theirs = model(input_ids=ids_BL, attention_mask=mask).logits
        mine = packed(input_ids=ids_BL, attention_mask=mask).logits
        rows = slice(None) if mask is None else mask.bool()
        close(mine[rows], theirs[rows])


@pytest.mark.parametrize(
    ("size", "values", "kind", "takes"),
    [
        (64, 64, torch.bfloat16, True),
        (256, 256, torch.float16, True),
        (48, 32, torch.bfloat16, False),
        (36, 36, torch.bfloat16, False),
        (264, 264, torch.bfloat16, False),
        (64, 64, torch.float32, False),
    ],
)
def test_the_variable_length_kernel_gets_what_it_is_made_for(size, values, kind, takes):
    query, value = (
        cast(Tensor, SimpleNamespace(is_cuda=True, dtype=kind, shape=(1, 4, 8, width)))
        for width in (size, values)
    )
    assert packing._flashes(query, value) == takes


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [{"hidden_size": 256}, NARROW_VALUES])
def test_the_variable_length_kernel_agrees(sizes, ids_BL):
    """Or torch's own attention, where values are narrower."""
    model, padded_model = new_model(**sizes), new_model(**sizes)
    assert pack(model)
    args = (ids_BL.cuda(), chosen_BL().cuda())
    padded, padded_grads = read(padded_model.cuda().bfloat16(), *args)
    packed, packed_grads = read(model.cuda().bfloat16(), *args)
    torch.testing.assert_close(packed, padded, atol=3e-2, rtol=3e-2)
    for mine, theirs in zip(packed_grads, padded_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-2, rtol=5e-2)


def test_a_compiler_reads_layers_of_grouped_heads_in_one_piece(mesh, ids_BL):
    """Where a model is spread, all its sizes are open; a flag made from them would end a graph in
    the midst of each layer."""
    model = new_model("qwen2")
    assert pack(model)
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="eager")
    shard(model.base_model, mesh, torch.bfloat16)
    counters.clear()
    token_states(model.base_model, ids_BL, chosen_BL()).sum().backward()
    assert counters["frames"]["ok"] > 0 and not counters["graph_break"]


def test_a_compiler_leaves_nothing_open_but_the_sizes_of_a_batch(mesh, ids_BL, monkeypatch):
    """A head's width among them had a GPU find its places by dividing by it."""
    model = new_model("qwen2")
    assert pack(model)
    numbers: list[str] = []

    def listening(graph, inputs):
        for place in graph.graph.find_nodes(op="placeholder"):
            if isinstance(place.meta["example_value"], torch.SymInt):
                numbers.append(place.meta["grapharg"].source.name)
        return graph

    monkeypatch.setattr(compiling, "_backend", lambda: listening)
    compile_layers(model, torch.device("cuda"))  # where there is no kernel of ours to build
    shard(model.base_model, mesh, torch.bfloat16)
    token_states(model.base_model, ids_BL, chosen_BL())
    assert numbers
    assert not [name for name in numbers if ".size()" not in name]
