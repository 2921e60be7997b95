"""Our attention on a CPU against the formula in float64."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distrl.models import attention
from distrl.models.compiling import compile_layers
from distrl.models.packing import pack
from tests.models.test_packing import KINDS, NARROW_VALUES, close, new_model, read

pytestmark = pytest.mark.slow  # the kernel is compiled first
CPU = torch.device("cpu")
IDS_BL = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(1))
CHOSEN_BL = torch.arange(21) < torch.tensor([[21], [2], [17]])


@pytest.fixture(autouse=True)
def kernel(without_kernel):
    """There for these tests alone."""
    attention.build()


def tensors(lengths, heads, groups, size, *, spread=1.0, seed=0):
    """q, k, v, starts and a gradient to come back with."""
    torch.manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, grad = (torch.randn(sum(lengths), h, size) for h in (heads, groups, groups, heads))
    return (spread * q).requires_grad_(), k.requires_grad_(), v.requires_grad_(), starts, grad


def formula(q, k, v, starts, scale):
    """Sequence by sequence, head by head."""
    shared, found = q.shape[1] // k.shape[1], []
    for start, end in pairwise(starts.tolist()):
        keys, values = (x[start:end].repeat_interleave(shared, 1).double() for x in (k, v))
        scores = scale * torch.einsum("ihd,jhd->hij", q[start:end].double(), keys)
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        shares = scores.masked_fill(later, -torch.inf).softmax(-1)
        found.append(torch.einsum("hij,jhd->ihd", shares, values))
    return torch.cat(found).float()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "size"),
    [
        ([1], 1, 1, 16),
        ([1, 2, 3, 15, 16, 17, 31, 32, 33, 59], 8, 8, 32),
        ([5, 130, 64], 9, 3, 64),
        ([300], 4, 1, 80),
    ],
)
def test_it_is_the_formula_there_and_back(lengths, heads, groups, size, threads):
    q, k, v, starts, grad = tensors(lengths, heads, groups, size)
    cores = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attention.attention(q, k, v, starts, 0.3)
        ways = torch.autograd.grad(found, (q, k, v), grad)
    finally:
        torch.set_num_threads(cores)
    wanted = formula(q, k, v, starts, 0.3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for way, other in zip(ways, torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        torch.testing.assert_close(way, other, atol=2e-5, rtol=1e-4)


def test_narrower_registers_give_the_same(monkeypatch):
    """What a machine without AVX-512 would run."""
    q, k, v, starts, grad = tensors([5, 130, 64], 9, 3, 64)
    wide = attention.attention(q, k, v, starts, 0.3)
    wide_ways = torch.autograd.grad(wide, (q, k, v), grad)
    monkeypatch.setattr(attention, "_kernel", None)
    monkeypatch.setattr(attention, "FLAGS", (*attention.FLAGS, "-DNARROW"))
    attention.build()
    narrow = attention.attention(q, k, v, starts, 0.3)
    close(narrow, wide)
    for way, other in zip(torch.autograd.grad(narrow, (q, k, v), grad), wide_ways, strict=True):
        torch.testing.assert_close(way, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "kind"),
    [(4, 2, 24, torch.int32), (4, 3, 32, torch.int32), (4, 2, 32, torch.int64)],
)
def test_what_it_is_not_made_for_is_an_error(heads, groups, size, kind):
    q, k, v, starts, _ = tensors([7], heads, groups, size)
    with pytest.raises(ValueError, match="multiples of 16"):
        attention.attention(q, k, v, starts.to(kind), 0.3)


@pytest.mark.parametrize("change", ["narrower", "fewer tokens", "fewer heads"])
def test_keys_and_values_that_differ_are_an_error(change):
    """It would read past their rows."""
    q, k, v, starts, _ = tensors([7], 4, 2, 32)
    v = {"narrower": v[:, :, :16], "fewer tokens": v[:6], "fewer heads": v[:, :1]}[change]
    with pytest.raises(ValueError, match="sizes must be the same"):
        attention.attention(q, k, v, starts, 0.3)


def test_scores_may_be_large_and_far_apart():
    """Without its maximum taken off, e to the score would be infinite or 0."""
    q, k, v, starts, grad = tensors([40, 9], 2, 2, 32, spread=100.0)
    found = attention.attention(q, k, v, starts, 1.0)
    wanted = formula(q, k, v, starts, 1.0)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(found, (q, k, v), grad))


@pytest.mark.parametrize("bits", [0x7FC00000, -1, 0x7F800001])
@pytest.mark.parametrize("damaged", ["query", "key"])
def test_what_is_not_a_number_stays_so(damaged, bits):
    """Whichever of the many bits it has: whoever reads a damaged model has to see it."""
    q, k, v, starts, _ = tensors([20, 40, 9], 2, 2, 32)
    clean = attention.attention(q, k, v, starts, 0.3)
    token = 20 + 21  # neither its sequence's nor its block's first
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        {"query": q, "key": k}[damaged][token, :, 5] = nan
    found = attention.attention(q, k, v, starts, 0.3)
    places = torch.arange(69)
    sees = (places == token) if damaged == "query" else (places >= token) & (places < 60)
    assert found[sees].isnan().all()
    assert torch.equal(found[~sees], clean[~sees])


def test_tensors_may_lie_in_memory_as_they_like():
    q, k, v, starts, grad = tensors([7, 20], 4, 2, 32)
    wanted = attention.attention(q, k, v, starts, 0.3)
    ways = torch.autograd.grad(wanted, (q, k, v), grad)
    for order in ((1, 0, 2), (2, 0, 1), (2, 1, 0)):
        back = [order.index(place) for place in range(3)]
        lying = [
            x.detach().permute(order).contiguous().permute(back).requires_grad_() for x in (q, k, v)
        ]
        turned = grad.permute(order).contiguous().permute(back)
        found = attention.attention(lying[0], lying[1], lying[2], starts, 0.3)
        assert torch.equal(found, wanted)
        assert all(map(torch.equal, torch.autograd.grad(found, lying, turned), ways))


def test_torch_is_told_all_about_it():
    q, k, v, starts, _ = tensors([3, 20], 4, 2, 32)
    torch.library.opcheck(torch.ops.distrl.attention.default, (q, k, v, starts, 0.3))


def test_a_compiled_packed_model_reads_by_it():
    sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    padded, padded_grads = read(new_model(**sizes), IDS_BL, CHOSEN_BL)
    model = new_model(**sizes)
    assert pack(model)
    compile_layers(model, CPU)
    read(model, IDS_BL, CHOSEN_BL)
    with profile(activities=[ProfilerActivity.CPU]) as made:
        packed, packed_grads = read(model, IDS_BL, CHOSEN_BL)
    calls = {event.key: event.count for event in made.key_averages()}
    assert calls["distrl::attention"] == calls["distrl::attention_back"] == 2
    close(packed, padded)
    for mine, theirs in zip(packed_grads, padded_grads, strict=True):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_near_the_truth_as_torchs(kind):
    """Of each gradient's largest number; torch's own, packed or padded, are up to 1.3e-6 away."""
    _, truth = read(new_model(kind).double(), IDS_BL, CHOSEN_BL)
    model = new_model(kind)
    assert pack(model)
    with profile(activities=[ProfilerActivity.CPU]) as made:
        _, found = read(model, IDS_BL, CHOSEN_BL)
    assert "distrl::attention_back" in {event.key for event in made.key_averages()}
    for mine, true in zip(found, truth, strict=True):
        assert (mine - true).abs().max() < 3e-6 * true.abs().max()


@pytest.mark.parametrize(("size", "dtype"), [(8, torch.float32), (32, torch.float64)])
def test_other_models_keep_torchs(size, dtype):
    heads = torch.zeros(3, 4, size, dtype=dtype)
    assert not attention.takes(heads, heads)
    model = new_model(hidden_size=4 * size).to(dtype)
    padded, _ = read(model, IDS_BL, CHOSEN_BL)
    assert pack(model)
    packed, _ = read(model, IDS_BL, CHOSEN_BL)
    close(packed, padded)


def test_a_model_of_narrower_values_keeps_torchs():
    model = new_model(**NARROW_VALUES)
    padded, padded_grads = read(model, IDS_BL, CHOSEN_BL)
    assert pack(model)
    packed, packed_grads = read(model, IDS_BL, CHOSEN_BL)
    close(packed, padded)
    for mine, theirs in zip(packed_grads, padded_grads, strict=True):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())


def test_where_it_does_not_compile_attention_is_torchs(monkeypatch, tmp_path, caplog):
    (tmp_path / "broken.cpp").write_text("int attention( { }")
    monkeypatch.setattr(attention, "SOURCE", tmp_path / "broken.cpp")
    monkeypatch.setattr(attention, "_kernel", None)
    with caplog.at_level(logging.WARNING):
        attention.build()
    assert "did not compile" in caplog.text
    assert not attention.takes(torch.zeros(3, 4, 32), torch.zeros(3, 4, 32))
