"""State on disk: what comes back is what was saved, bit for bit, and nothing else fits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distrl.learn.state import (
    StateMismatch,
    load_module,
    load_optimizer,
    save_module,
    save_optimizer,
)


class Tied(nn.Module):
    """An embedding that is its own output head, and a buffer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.gain = nn.Buffer(torch.rand(()))


def stepped(module, steps=3):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        module.head(module.embedding(torch.tensor([step]))).square().sum().backward()
        optimizer.step()
    return optimizer


def test_a_module_comes_back_with_its_buffers_and_its_ties(tmp_path):
    module, other = Tied(), Tied()
    save_module(module, tmp_path / "m.safetensors")
    load_module(other, tmp_path / "m.safetensors")
    assert torch.equal(other.embedding.weight, module.embedding.weight)
    assert torch.equal(other.gain, module.gain)
    assert other.head.weight is other.embedding.weight


def test_a_module_of_another_shape_is_refused(tmp_path):
    save_module(Tied(), tmp_path / "m.safetensors")
    with pytest.raises(StateMismatch, match=r"embedding.weight has shape \(6, 4\)"):
        load_module(Tied(width=8), tmp_path / "m.safetensors")
    with pytest.raises(StateMismatch, match=r"other tensors: .*embedding"):
        load_module(nn.Linear(2, 2), tmp_path / "m.safetensors")


def test_halves_that_an_earlier_version_wrote_are_put_together(tmp_path):
    """It had an entry of its own for where a rank's rows begin."""
    whole = torch.arange(24.0).view(6, 4)
    for rank, first in enumerate((0, 3)):
        about = {"first_rows": json.dumps({"weight": first})} if first else {}
        part = {"weight": whole[first : first + 3].contiguous()}
        save_file(part, tmp_path / f"m.{rank:05d}-of-00002.safetensors", about)
    module = nn.Linear(4, 6, bias=False)
    load_module(module, tmp_path / "m.safetensors")
    assert torch.equal(module.weight, whole)


def test_an_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path):
    torch.manual_seed(0)
    module = Tied()
    optimizer = stepped(module)
    save_module(module, tmp_path / "m.safetensors")
    save_optimizer(optimizer, tmp_path / "o.safetensors")
    other = Tied()
    resumed = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    load_module(other, tmp_path / "m.safetensors")
    load_optimizer(resumed, tmp_path / "o.safetensors")
    for mine, by in ((module, optimizer), (other, resumed)):
        by.zero_grad()
        mine.head(mine.embedding(torch.tensor([1]))).square().sum().backward()
        by.step()
    assert torch.equal(other.embedding.weight, module.embedding.weight)
    again = resumed.state_dict()["state"]
    for place, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], again[place][key]) for key in state)
        assert state["step"] == 4


def test_an_optimizer_that_never_stepped_comes_back_so(tmp_path):
    module = Tied()
    fresh = torch.optim.AdamW(module.parameters())
    save_optimizer(fresh, tmp_path / "o.safetensors")
    load_optimizer(fresh, tmp_path / "o.safetensors")
    assert fresh.state_dict()["state"] == {}


def test_the_same_state_is_the_same_file(tmp_path):
    torch.manual_seed(0)
    optimizer = stepped(Tied())
    for turn in range(8):
        save_optimizer(optimizer, tmp_path / f"{turn}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_weight_that_no_gradient_reaches_is_no_hindrance(tmp_path):
    """As a vision tower's is where text alone is read."""
    tied = Tied()
    module = nn.ModuleList([nn.Linear(2, 2), tied])
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    tied.embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, tmp_path / "o.safetensors")
    resumed = torch.optim.AdamW(module.parameters(), fused=True)
    load_optimizer(resumed, tmp_path / "o.safetensors")
    before, again = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert list(before) == list(again) == [2]
    assert all(torch.equal(before[2][key], again[2][key]) for key in before[2])


def test_an_optimizer_of_another_module_is_refused(tmp_path):
    save_optimizer(stepped(Tied()), tmp_path / "o.safetensors")
    other = nn.Linear(3, 3)
    with pytest.raises(StateMismatch, match="with 1 tensors, not 2"):
        load_optimizer(torch.optim.AdamW(other.parameters()), tmp_path / "o.safetensors")
    narrow = torch.optim.AdamW(Tied(width=2).parameters())
    with pytest.raises(StateMismatch, match="shape"):
        load_optimizer(narrow, tmp_path / "o.safetensors")
