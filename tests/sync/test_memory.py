"""Weights in shared memory: what is read is what was published, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from distrl.models import load_policy
from distrl.models.crew import Crew
from distrl.sync.canary import probe_ids, probe_logprobs, publish, publish_model
from distrl.sync.image import Image
from distrl.sync.memory import (
    KEPT_VERSIONS,
    NonFiniteWeights,
    SharedMemoryPublisher,
    hold,
)


@pytest.fixture
def publisher():
    publisher = SharedMemoryPublisher()
    yield publisher
    publisher.close()
    publisher.close()


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "float32": torch.randn(7, 3),
        "bfloat16": torch.randn(5, 2).bfloat16(),
        "float16": torch.randn(3).half(),
        "float64": torch.randn(2, 2, 2, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "a view": torch.randn(6, 4).T[1:3],
        "a name beyond ascii: β": torch.randn(2),
    }


def test_what_safetensors_reads_is_what_was_published(publisher):
    sent = tensors()
    path, nbytes = publisher.publish(sent, version=3)
    received = load_file(path)
    assert received.keys() == sent.keys()
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor), name
    assert nbytes == sum(t.numel() * t.element_size() for t in sent.values())


def test_a_tensor_of_many_parts_is_written_by_all_threads_and_whole(monkeypatch):
    monkeypatch.setattr("distrl.sync.memory.PART", 1000)
    sent = {"large": torch.randn(123, 77), "small": torch.randn(5), "last": torch.randn(2001)}
    publisher = SharedMemoryPublisher(threads=3)
    path, _ = publisher.publish(sent, version=0)
    received = load_file(path)
    assert all(torch.equal(received[name], tensor) for name, tensor in sent.items())
    publisher.close()


class Spread:
    """A weight that is put together when it is asked for, and how many there are at a time."""

    dtype, shape = torch.float32, torch.Size([50])
    whole: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most = 0

    def full_tensor(self) -> torch.Tensor:
        tensor = torch.arange(50.0)
        self.whole.add(tensor.untyped_storage())
        Spread.most = max(Spread.most, len(self.whole))
        return tensor


def test_spread_weights_are_put_together_one_at_a_time(publisher):
    sent = {f"w{place}": Spread() for place in range(12)} | tensors()
    received = load_file(publisher.publish(sent, version=0)[0])
    assert len(received) == len(sent)
    assert all(torch.equal(received[f"w{place}"], torch.arange(50.0)) for place in range(12))
    assert Spread.most == 1 and not Spread.whole


def test_a_memory_that_is_short_is_an_error_and_no_end(publisher, monkeypatch):
    publisher.publish(tensors(0), version=0)
    open_before = open_files()

    def short(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", short)
        with pytest.raises(OSError, match="No space left"):
            publisher.publish(tensors(1), version=1)
    assert open_files() == open_before
    path, _ = publisher.publish(tensors(2), version=2)
    assert torch.equal(load_file(path)["float32"], tensors(2)["float32"])


def test_numbers_whose_sum_is_too_large_are_finite_all_the_same(publisher):
    sent = {"weight": torch.full((4,), 6e4, dtype=torch.float16)}
    path, _ = publisher.publish(sent, version=0)
    assert torch.equal(load_file(path)["weight"], sent["weight"])


def test_a_published_version_does_not_change_with_the_model(publisher):
    model = torch.nn.Linear(2, 2)
    path, _ = publisher.publish(model.state_dict(), version=0)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(load_file(path)["weight"], before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(publisher, bad):
    sent = tensors()
    sent["bfloat16"][1, 1] = bad
    open_before = open_files()
    with pytest.raises(NonFiniteWeights, match="bfloat16 holds a NaN or Inf"):
        publisher.publish(sent, version=4)
    assert open_files() == open_before


def test_two_versions_are_kept_and_no_more(publisher):
    open_before = open_files()
    paths = [publisher.publish(tensors(seed), version=seed)[0] for seed in range(5)]
    assert open_files() - open_before == KEPT_VERSIONS == 2
    for seed, path in enumerate(paths[-2:], start=3):
        assert torch.equal(load_file(path)["float32"], tensors(seed)["float32"])
    publisher.close()
    assert open_files() == open_before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_version_has_no_name_in_any_file_system(publisher):
    path, nbytes = publisher.publish(tensors(), version=3)
    target = os.readlink(path)
    assert re.fullmatch(r"/memfd:distrl-weights \(deleted\)", target)
    assert os.stat(path).st_nlink == 0 and os.stat(path).st_size > nbytes


def test_the_oldest_version_is_written_over_unless_it_is_held(publisher):
    first, _ = publisher.publish(tensors(0), version=0)
    publisher.publish(tensors(1), version=1)
    third, _ = publisher.publish(tensors(2), version=2)
    assert third == first, "of the same pages"
    with hold(third, 2) as held:
        publisher.publish(tensors(3), version=3)
        fifth, _ = publisher.publish(tensors(4), version=4)
        assert torch.equal(load(held.read())["float32"], tensors(2)["float32"])
        assert torch.equal(load_file(fifth)["float32"], tensors(4)["float32"])


def test_an_image_is_of_what_it_holds_whatever_its_path_leads_to_by_now(publisher, monkeypatch):
    """The publisher opens another version, of the same number, between the hold and the reading."""
    path, _ = publisher.publish(tensors(1), version=1)
    publisher.publish(tensors(2), version=2)

    def late(*words):
        file = hold(*words)
        assert publisher.publish(tensors(3), version=3)[0] == path
        return file

    monkeypatch.setattr("distrl.sync.image.hold", late)
    read = dict(Image(path, 1).tensors(torch.device("cpu")))
    assert torch.equal(read["float32"], tensors(1)["float32"])


def test_a_smaller_version_leaves_nothing_of_a_larger_one(publisher):
    """safetensors refuses a file that is longer than its header says."""
    for version, numbers in enumerate([1000, 1000, 10, 1000, 999]):
        path, _ = publisher.publish({"w": torch.full((numbers,), float(version))}, version)
        assert torch.equal(load_file(path)["w"], torch.full((numbers,), float(version)))


def test_a_version_that_was_written_over_cannot_be_held(publisher):
    paths = [publisher.publish(tensors(), version)[0] for version in range(3)]
    with pytest.raises(OSError, match="holds version 2 by now"):
        hold(paths[0], 0)
    hold(paths[0], 2).close()
    publisher.close()
    with pytest.raises(OSError, match="No such file"):
        hold(paths[0], 2)
    with open(os.devnull) as other, pytest.raises(OSError, match="is no image by now"):
        hold(f"/proc/self/fd/{other.fileno()}", 2)


def test_an_image_that_is_being_written_cannot_be_held(publisher, monkeypatch):
    path, _ = publisher.publish(tensors(), version=0)
    publisher.publish(tensors(), version=1)
    tried = []

    def write(*_):
        with pytest.raises(OSError, match="is being written over"):
            hold(path, 0)
        tried.append(path)
        return 0

    monkeypatch.setattr("distrl.sync.memory.write_safetensors", write)
    publisher.publish(tensors(), version=2)
    assert tried == [path]


PUBLISH_AND_WAIT = """
import sys, torch
from distrl.sync.memory import SharedMemoryPublisher
publisher = SharedMemoryPublisher()
print(publisher.publish({"w": torch.arange(6.)}, version=1)[0], flush=True)
sys.stdin.read()
"""


def test_another_process_can_read_it_until_its_owner_is_killed():
    owner = subprocess.Popen(
        [sys.executable, "-c", PUBLISH_AND_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        path = owner.stdout.readline().strip()
        assert path.startswith(f"/proc/{owner.pid}/fd/")
        assert load_file(path)["w"].tolist() == [0, 1, 2, 3, 4, 5]
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert not Path(path).exists()


def test_an_image_is_relayed_to_the_byte(publisher):
    path, _ = publisher.publish(tensors(), version=6)
    elsewhere = SharedMemoryPublisher()
    copy = elsewhere.relay(Path(path).read_bytes())
    assert copy != path and Path(copy).read_bytes() == Path(path).read_bytes()
    assert load(Path(copy).read_bytes()).keys() == tensors().keys()
    elsewhere.close()


def test_a_tied_head_is_sent_as_a_tensor_of_its_own(tiny_policy, publisher):
    model = load_policy(tiny_policy)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in dict(model.named_parameters()), "the two are tied"
    sent = model.state_dict()
    assert sent[head].data_ptr() == sent[embedding].data_ptr()
    path, nbytes = publisher.publish(sent, version=0)
    received = load_file(path)
    assert received.keys() == sent.keys()
    assert torch.equal(received[head], received[embedding])
    assert nbytes == sum(tensor.nbytes for tensor in sent.values())


def test_a_publication_carries_the_learners_own_numbers_on_a_probe(tiny_policy, publisher):
    model = load_policy(tiny_policy)
    weights = publish_model(model, publisher, version=2, vocab=300, probe_tokens=16)
    assert (weights.version, weights.transport, len(weights.probe_ids)) == (2, "shm", 16)
    assert weights.nbytes == sum(t.nbytes for t in load_file(weights.locator).values())
    for place in range(1, 16):  # slowly, one prefix after the other
        ids = torch.from_numpy(weights.probe_ids[:place]).long()[None]
        with torch.no_grad():
            expected = torch.log_softmax(model(input_ids=ids).logits[0, -1], -1)
        got = weights.probe_logprobs[place - 1]
        assert got == pytest.approx(expected[weights.probe_ids[place]].item(), abs=1e-5)


class Waiting:
    """A weight that is put together once somebody else has come as far."""

    dtype, shape = torch.float32, torch.Size([2])

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def full_tensor(self) -> torch.Tensor:
        self.barrier.wait()
        return torch.ones(2)


def test_weights_are_written_while_the_model_reads(publisher):
    both = threading.Barrier(2, timeout=10)

    def read(probe):
        both.wait()
        return probe.astype(np.float32)

    crew = Crew(2)
    weights = publish(
        {"w": Waiting(both)},
        publisher,
        version=1,
        probe=probe_ids(9, 3),
        read=read,
        together=crew.together,
    )
    crew.close()
    assert load_file(weights.locator)["w"].tolist() == [1, 1]
    assert np.array_equal(weights.probe_logprobs, weights.probe_ids)


def test_the_probe_sees_a_head_that_stayed_behind(tiny_policy):
    """What makes the canary worth its time: another head gives other numbers, by far."""
    model, moved = load_policy(tiny_policy), load_policy(tiny_policy)
    with torch.no_grad():
        moved.get_parameter("model.embed_tokens.weight").add_(
            0.05 * torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
        )
    probe = probe_ids(300, 24)
    assert np.array_equal(probe, probe_ids(300, 24)) and len(set(probe)) > 16
    assert np.abs(probe_logprobs(model, probe) - probe_logprobs(moved, probe)).max() > 0.01
