"""Compiled passes: what they come to, and by whom their products are made."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distrl.learn import forward
from distrl.learn.forward import PolicyModel
from distrl.models import compiling, load_policy
from distrl.models.compiling import compiled

pytestmark = pytest.mark.slow  # what it measures is compiled first


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_product_takes_factors_as_they_lie_in_memory(rows):
    torch.manual_seed(0)
    lying, standing = torch.randn(rows, 7), torch.randn(7, rows).T
    for x in (lying, standing):
        for weight in (torch.randn(3, 7), torch.randn(7, 3).T, torch.randn(6, 7)[::2]):
            found = torch.ops.distrl.product(x, weight)
            torch.testing.assert_close(found, x @ weight.T, atol=1e-5, rtol=1e-5)


def calls(made: profile) -> Counter[str]:
    return Counter({event.key: event.count for event in made.key_averages()})


@pytest.mark.parametrize(("dtype", "ours"), [(torch.float32, 3), (torch.float64, 0)])
def test_onednn_makes_the_products_of_both_ways_but_weights_gradients(dtype, ours):
    torch.manual_seed(0)
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
    plain = nn.Sequential(first, nn.SiLU(), second).to(dtype)
    quick = compiled(lambda x: plain(x))  # of torch itself nothing is compiled

    def gradients(model, rows: int) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, rows * 8, dtype=dtype).view(rows, 8)
        return list(torch.autograd.grad(model(x).square().sum(), list(plain.parameters())))

    for rows in (4, 9):
        torch.testing.assert_close(gradients(quick, rows), gradients(plain, rows))
    with profile(activities=[ProfilerActivity.CPU]) as made:
        gradients(quick, 11)
    # There and back through two layers, but nobody asks for the gradient of the first one's input.
    assert calls(made)["distrl::product"] == ours
    assert calls(made)["aten::mm"] == 5 - ours


def test_it_stays_compiled_where_many_threads_begin_at_once():
    """Each compiles for itself what no other has ready; after eight torch would give up."""
    layer, threads = nn.Linear(8, 16, bias=False), 10
    quick, start = compiled(lambda x: layer(x).relu()), threading.Barrier(threads, timeout=60)

    def member(_: int) -> None:
        start.wait()
        quick(torch.ones(3, 8))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(member, range(threads)))
    with torch.no_grad():
        quick(torch.ones(5, 8))  # and this is another way to compile it
        with profile(activities=[ProfilerActivity.CPU]) as made:
            quick(torch.ones(5, 8))
    assert calls(made)["distrl::product"] == 1


@pytest.mark.parametrize("kept", [2**28, 0])
def test_a_compiled_head_tells_the_same(tiny_policy, kept, monkeypatch):
    """Where its logits are kept, and where they are made in blocks and made anew."""
    monkeypatch.setattr(forward, "KEPT_BYTES", kept)
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (3, 9))
    chosen, tokens = torch.ones_like(ids, dtype=torch.bool), ids.flatten()
    plain, quick = (PolicyModel(load_policy(tiny_policy)) for _ in range(2))
    quick.compile_head()
    for temperature, with_entropy in ((1.0, True), (0.7, True), (0.7, False)):
        found = []
        for model in (plain, quick):
            states, logprobs, entropy = model(ids, chosen, tokens, temperature, with_entropy)
            ((logprobs * 0.3).sum() + (entropy.sum() if with_entropy else 0)).backward()
            head = model.model.lm_head.weight
            found.append((states, logprobs, entropy, head.grad))
            head.grad = None
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        quick(ids, chosen, tokens, 1.0, True)  # compiled once more, as nobody asks for gradients
        with profile(activities=[ProfilerActivity.CPU]) as made:
            quick(ids, chosen, tokens, 1.0, True)
    assert calls(made)["distrl::product"] == 1, "the head's own; layers are not compiled here"


class SwiGLU(nn.Module):
    """A layer's, 7 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(7, 19, bias=False) for _ in range(2))
        self.down = nn.Linear(19, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("gpu", [True, False])
def test_what_follows_from_what_is_kept_is_not_kept_too_on_a_gpu(gpu, monkeypatch):
    """SwiGLU's product is as large as each of its factors, and these are kept anyway."""
    monkeypatch.setattr(compiling, "_made_anew", lambda inputs: gpu)
    torch.compiler.reset()  # what the other way compiled would serve
    torch.manual_seed(0)
    plain, kept = SwiGLU(), Counter[torch.Size]()
    quick = compiled(lambda x: plain(x))

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.shape] += 1
        return tensor

    found = []
    for model in (plain, quick):
        kept.clear()
        x = torch.linspace(-1, 1, 5 * 7).view(5, 7).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            out = model(x)
        found.append(torch.autograd.grad(out.square().sum(), [x, *plain.parameters()]))
    torch.testing.assert_close(found[1], found[0])
    assert kept[torch.Size((5, 19))] == (2 if gpu else 3)
