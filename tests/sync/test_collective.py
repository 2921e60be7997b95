"""Lines between a learner and engines, over gloo: real groups, engines played by processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distrl.records import Offer, Receiver, Weights
from distrl.sync import collective
from distrl.sync.canary import publish_model
from distrl.sync.collective import Switchboard, TransferFailed
from distrl.sync.image import Image
from distrl.sync.memory import SharedMemoryPublisher
from distrl.sync.nccl import NCCLGroup
from distrl.sync.vllm_plugin import BACKENDS

LOOPBACK = "127.0.0.1"

TAKER = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from distrl.records import TensorInfo
from distrl.sync.gloo import GlooGroup

port, rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
group = GlooGroup.join("127.0.0.1", port, rank, world, 60)
for line in sys.stdin:  # one a version
    infos = [TensorInfo(**info) for info in json.loads(line)]
    save_file({name: t.clone() for name, t in group.receive(infos)}, folder / f"{rank}.safetensors")
    print("taken", flush=True)
"""
"""An engine's worker, without the engine: takes what it is told to, and writes it down."""


class Takers:
    """The processes of one engine."""

    def __init__(self, offer: Offer, folder: Any) -> None:
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", TAKER, str(offer.port), str(rank), str(offer.world), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(1, offer.world)
        ]

    def take(self, offer: Offer) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([asdict(info) for info in offer.tensors]) + "\n")
            process.stdin.flush()

    def taken(self) -> list[dict[str, torch.Tensor]]:
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "taken\n"
        return [load_file(self.folder / f"{rank}.safetensors") for rank in self.ranks]

    @property
    def ranks(self) -> range:
        return range(1, 1 + len(self.processes))

    def end(self) -> None:
        """May be called twice."""
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


@pytest.fixture
def engine(tmp_path) -> Iterator[Callable[[Offer], Takers]]:
    started: list[Takers] = []

    def start(offer: Offer) -> Takers:
        started.append(Takers(offer, tmp_path))
        return started[-1]

    yield start
    for takers in started:
        takers.end()


@pytest.fixture
def publisher() -> Iterator[SharedMemoryPublisher]:
    publisher = SharedMemoryPublisher()
    yield publisher
    publisher.close()


@pytest.fixture
def board() -> Iterator[Switchboard]:
    board = Switchboard()
    yield board
    board.close()


def receiver(name: str = "g0", timeout_s: float = 60, **settings: Any) -> Receiver:
    return Receiver(
        name=name, timeout_s=timeout_s, **{"start": 1, "workers": 1, "near": True} | settings
    )


def weights(
    publisher: SharedMemoryPublisher, tensors: dict[str, torch.Tensor], version: int = 1
) -> Weights:
    locator, nbytes = publisher.publish(tensors, version)
    return Weights(
        version=version,
        transport="gloo",
        locator=locator,
        nbytes=nbytes,
        probe_ids=np.zeros(2, dtype=np.int32),
        probe_logprobs=np.zeros(1, dtype=np.float32),
    )


SMALL = {"w": torch.arange(6.0).view(2, 3)}


# -- the image ------------------------------------------------------------------------------------


def test_an_image_says_what_is_in_it_and_outlives_its_publisher(publisher):
    sent = {
        "z": torch.arange(6.0).view(2, 3),
        "a": torch.ones(4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.ones(1, 1, 2, dtype=torch.float16),
    }
    path, _ = publisher.publish(sent, version=1)
    image = Image(path, 1)
    publisher.close()
    described = [(info.name, info.dtype, info.shape) for info in image.infos]
    assert described == [
        ("z", "float32", (2, 3)),
        ("a", "bfloat16", (4,)),
        ("scalar", "float64", ()),
        ("half", "float16", (1, 1, 2)),
    ]
    read = list(image.tensors(torch.device("cpu")))
    assert [name for name, _ in read] == list(sent)
    assert all(torch.equal(tensor, sent[name]) for name, tensor in read)


def test_tensors_are_read_one_at_a_time(publisher, monkeypatch):
    """A device never holds more of the image than who iterates does."""
    path, _ = publisher.publish({f"w{n}": torch.full((1000,), n) * 1.0 for n in range(5)}, 1)
    image = Image(path, 1)
    read: list[str] = []

    class Spy:
        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return torch.zeros(1)

    monkeypatch.setattr(image, "_file", Spy())
    tensors = image.tensors(torch.device("cpu"))
    assert read == []
    next(tensors)
    assert read == ["w0"]


# -- sending --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tied_model_arrives_whole_at_every_worker_and_the_group_lasts(
    board, publisher, engine, tiny_policy
):
    """Head and embedding both; one rendezvous for many versions."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    takers, places = None, set()
    for version in (1, 2):
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.5)
        published = publish_model(model, publisher, version=version, vocab=300, probe_tokens=8)
        offer = board.offer(published_as_gloo(published), receiver(workers=2), LOOPBACK)
        places.add((offer.host, offer.port, offer.world))
        takers = takers or engine(offer)
        takers.take(offer)
        board.send("g0")
        for arrived in takers.taken():
            assert set(arrived) == set(model.state_dict())
            assert all(torch.equal(arrived[k], t) for k, t in model.state_dict().items())
            assert torch.equal(arrived["lm_head.weight"], arrived["model.embed_tokens.weight"])
    assert len(places) == 1 and places.pop()[2] == 3


def published_as_gloo(published: Weights) -> Weights:
    return replace(published, transport="gloo")


def test_every_dtype_arrives_to_the_bit(board, publisher, engine, tmp_path):
    sent = {
        str(dtype): torch.randn(7, 3).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    } | {"scalar": torch.tensor(2.5)}
    offer = board.offer(weights(publisher, sent), receiver(), LOOPBACK)
    takers = engine(offer)
    takers.take(offer)
    board.send("g0")
    (arrived,) = takers.taken()
    save_file(sent, tmp_path / "sent.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "sent.safetensors").read_bytes()
    assert set(arrived) == set(sent)


def test_who_does_not_come_is_named_in_time_and_the_next_is_served(board, publisher, engine):
    version = weights(publisher, SMALL)
    absent = board.offer(version, receiver("g0", timeout_s=1), LOOPBACK)
    other = board.offer(version, receiver("g1"), LOOPBACK)
    began = time.monotonic()
    late: list[float] = []

    def send() -> None:
        with pytest.raises(
            TransferFailed, match=rf"g0 \(start 1\) did not come to .*{absent.port}"
        ):
            board.send("g0")
        late.append(time.monotonic() - began)

    waiting = threading.Thread(target=send)
    waiting.start()
    takers = engine(other)
    takers.take(other)
    board.send("g1")
    waiting.join(10)
    assert 0.9 < late[0] < 3
    assert torch.equal(takers.taken()[0]["w"], SMALL["w"])
    assert board.offer(version, receiver("g0", timeout_s=1), LOOPBACK).port != absent.port


def test_an_image_that_was_offered_in_vain_is_written_over(board, publisher):
    offered = weights(publisher, SMALL, 1)
    board.offer(offered, receiver(), LOOPBACK)
    board.hang_up("g0")
    written = Path(offered.locator).stat().st_ino
    publisher.publish(SMALL, 2)
    path, _ = publisher.publish(SMALL, 3)
    assert Path(path).stat().st_ino == written, "two images are enough where nobody reads one"


@pytest.mark.slow
def test_one_that_stands_still_is_named_in_time(board, publisher, engine):
    """It came, and takes nothing: more is sent than fits between two sockets."""
    offer = board.offer(weights(publisher, SMALL), receiver(), LOOPBACK)
    takers = engine(offer)
    takers.take(offer)
    board.send("g0")
    takers.taken()
    slow = receiver("g0", timeout_s=1, start=2)
    offer = board.offer(weights(publisher, big(), 2), slow, LOOPBACK)
    takers = engine(offer)
    with pytest.raises(TransferFailed, match=r"g0 \(start 2\) did not take the weights at"):
        wait_for_group(board, "g0", send=True)
    assert board._lines["g0"].dead


def big() -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.zeros(4_000_000) for n in range(4)}


def wait_for_group(board: Switchboard, name: str, send: bool) -> None:
    """Meet first, and count the deadline of the send alone: a process takes seconds to start."""
    line = board._lines[name]
    line._group = line._meet(line._listener, 1 + line.receiver.workers, 60)
    if send:
        board.send(name)


def test_one_that_dies_on_the_way_is_told_at_once(board, publisher, engine):
    offer = board.offer(weights(publisher, big()), receiver(timeout_s=60), LOOPBACK)
    takers = engine(offer)
    wait_for_group(board, "g0", send=False)
    threading.Timer(0.5, takers.end).start()
    began = time.monotonic()
    with pytest.raises(TransferFailed, match=r"g0 \(start 1\): .*Connection"):
        board.send("g0")
    assert time.monotonic() - began < 20


def test_who_hangs_up_frees_the_send(board, publisher):
    board.offer(weights(publisher, SMALL), receiver(timeout_s=10), LOOPBACK)
    threading.Timer(0.3, board.hang_up, ["g0"]).start()
    began = time.monotonic()
    with pytest.raises(TransferFailed, match=r"g0 \(start 1\): its load failed"):
        board.send("g0")
    assert time.monotonic() - began < 5
    board.hang_up("nobody")


def test_another_start_gets_another_group(board, publisher):
    version = weights(publisher, SMALL)
    first, again, second = (
        board.offer(version, receiver(start=start), LOOPBACK) for start in (1, 1, 2)
    )
    assert first.port == again.port != second.port
    with socket.socket() as probe:
        assert probe.connect_ex((LOOPBACK, first.port)) != 0, "the old one is closed"


def test_nothing_is_sent_twice_or_without_an_offer(board, publisher):
    board.offer(weights(publisher, SMALL), receiver(timeout_s=0.2), LOOPBACK)
    for reason in ("did not come", "nothing is offered"):
        with pytest.raises(TransferFailed, match=reason):
            board.send("g0")


def test_an_old_version_is_offered_while_it_is_kept(board, publisher):
    """Its descriptor is another version's later on; it must not be sent under the old name."""
    versions = [weights(publisher, SMALL, version) for version in range(1, 5)]
    for version in versions[-2:]:
        assert board.offer(version, receiver(), LOOPBACK).tensors[0].name == "w"
    for gone in versions[:2]:
        with pytest.raises(TransferFailed, match=f"version {gone.version} any more"):
            board.offer(gone, receiver(), LOOPBACK)


def test_a_group_that_is_met_after_all_is_closed(board, publisher, monkeypatch):
    met = threading.Event()
    ended = threading.Event()

    class Late:
        def send(self, image: Image) -> None:
            raise RuntimeError("nobody is there")

        def destroy(self) -> None:
            ended.set()

    monkeypatch.setitem(collective.MEET, "gloo", lambda *_: (met.wait(10), Late())[1])
    board.offer(weights(publisher, SMALL), receiver(timeout_s=0.2), LOOPBACK)
    with pytest.raises(TransferFailed, match="did not come"):
        board.send("g0")
    met.set()
    assert ended.wait(5)


def test_every_transport_has_both_ends():
    assert set(collective.MEET) | {"shm"} == set(BACKENDS)
    assert collective.MEET["nccl"] == NCCLGroup.meet
