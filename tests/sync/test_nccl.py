"""The `nccl` transport: vLLM's own classes, on a CPU with all but the collective itself.

What runs here: vLLM's rendezvous between processes, its producer and consumer of packs on either
side, the engine's init and update records. What only the test marked `gpu` runs: NCCL.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distrl.records import Offer
from distrl.sync import nccl
from distrl.sync.image import Image
from distrl.sync.memory import SharedMemoryPublisher
from distrl.sync.nccl import NCCLGroup
from distrl.sync.vllm_calls import arriving, in_memory, meeting

pytestmark = pytest.mark.slow  # vLLM takes seconds to import

LOOPBACK = "127.0.0.1"


@pytest.fixture
def image() -> Image:
    """Tensors of many sizes, one of them larger than a whole pack; the publisher has let go.

    Half-precision ones are even in number: vLLM's packs are not padded, and what follows in the
    same pack must begin where its own dtype may.
    """
    publisher = SharedMemoryPublisher()
    sizes = {"large": 3000, "b": 7, "c": 500, "d": 1, "e": 499, "f": 2}
    tensors = {name: torch.randn(size, 2) for name, size in sizes.items()}
    tensors |= {"half": torch.randn(34).bfloat16(), "scalar": torch.tensor(2.5)}
    path, _ = publisher.publish(tensors, version=1)
    image = Image(path, 1)
    publisher.close()
    return image


def offer(image: Image, port: int = 4321, world: int = 3) -> Offer:
    return Offer(host=LOOPBACK, port=port, world=world, tensors=image.infos)


# -- the calls of vLLM's that are relied on: an upgrade that changes them goes red here ------------


def test_the_engines_half_is_told_what_vllm_expects(image):
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    engine = object.__new__(NCCLWeightTransferEngine)  # its base wants a whole engine's config
    info: Any = engine.parse_init_info(meeting(offer(image)))
    assert (info.master_address, info.master_port) == (LOOPBACK, 4321)
    assert (info.rank_offset, info.world_size, info.packed) == (1, 3, True)
    assert info.packed_buffer_size_bytes == nccl.PACK_BYTES
    assert info.packed_num_buffers == nccl.PACKS
    update: Any = engine.parse_update_info(arriving(offer(image)))
    assert update.names == [info.name for info in image.infos]
    assert dict(zip(update.names, update.dtype_names, strict=True))["half"] == "bfloat16"
    assert dict(zip(update.names, update.shapes, strict=True))["c"] == [500, 2]


def test_memory_is_told_what_our_own_engine_expects():
    from distrl.sync.vllm_transfer import SharedMemoryTransfer

    engine = object.__new__(SharedMemoryTransfer)

    class Published:
        locator, version, nbytes = "/proc/1/fd/0", 5, 8

    published: Any = Published
    assert vars(engine.parse_update_info(in_memory(published))) == {
        "path": "/proc/1/fd/0",
        "version": 5,
        "nbytes": 8,
    }


def test_the_learners_half_calls_vllm_as_it_is():
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
    from vllm.utils.nccl import unpinned_nccl_env

    def accepts(function: Any, *positional: str, **keywords: Any) -> None:
        inspect.signature(function).bind(*positional, **keywords)

    accepts(unpinned_nccl_env)
    accepts(PyNcclCommunicator.__init__, "self", "store", device=0)
    accepts(PyNcclCommunicator.broadcast, "self", "tensor", src=0)
    accepts(PyNcclCommunicator.destroy, "self")
    accepts(
        StatelessProcessGroup,
        rank=0,
        world_size=2,
        store=None,
    )
    accepts(
        packed_nccl_broadcast_producer,
        iterator=iter(()),
        group=None,
        src=0,
        post_iter_func=None,
        buffer_size_bytes=1,
        num_buffers=2,
    )
    assert "ncclCommAbort" in inspect.getsource(PyNcclCommunicator.destroy)


# -- both of vLLM's ends, with a queue where NCCL would be -----------------------------------------


class Wire:
    """As a PyNcclCommunicator on either side: what is broadcast first is received first."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.packs: deque[torch.Tensor] = deque()
        self.destroyed = 0

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        self.packs.append(tensor.clone())

    def destroy(self) -> None:
        self.destroyed += 1


class FarEnd(Wire):
    def __init__(self, packs: deque[torch.Tensor]) -> None:
        self.packs = packs

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        tensor.copy_(self.packs.popleft())


class Model:
    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.loaded |= dict(weights)


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has none, and does everything in order."""
    from vllm.distributed.weight_transfer import packed_tensor

    class Stream:
        def synchronize(self) -> None: ...

    monkeypatch.setattr(packed_tensor, "_get_streams", lambda index, n: (Stream(),) * n)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda _: contextlib.nullcontext())


@pytest.mark.filterwarnings("ignore:Tensor 'large' has size")
@pytest.mark.parametrize(("pack_bytes", "packs"), [(4096, 3), (2**30, 1)])
def test_an_image_goes_through_vllms_packs(image, no_streams, monkeypatch, pack_bytes, packs):
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    monkeypatch.setattr(nccl, "PACK_BYTES", pack_bytes)
    wire = Wire()
    NCCLGroup(wire).send(image)
    assert len(wire.packs) == packs

    engine: Any = object.__new__(NCCLWeightTransferEngine)
    told = engine.parse_init_info(meeting(offer(image)))
    vars(engine).update(
        model=Model(),
        device=wire.device,
        model_update_group=FarEnd(wire.packs),
        packed=told.packed,
        packed_buffer_size_bytes=told.packed_buffer_size_bytes,
        packed_num_buffers=told.packed_num_buffers,
    )
    engine.receive_weights(engine.parse_update_info(arriving(offer(image))))
    assert not wire.packs
    sent = dict(image.tensors(wire.device))
    assert list(engine.model.loaded) == list(sent)
    assert all(torch.equal(engine.model.loaded[name], tensor) for name, tensor in sent.items())


def test_giving_up_aborts_the_collective():
    wire = Wire()
    NCCLGroup(wire).destroy()
    assert wire.destroyed == 1


# -- vLLM's rendezvous ----------------------------------------------------------------------------


def test_nobody_comes_to_the_rendezvous():
    from torch.distributed import DistStoreError

    began = time.monotonic()
    with pytest.raises(DistStoreError, match="1/2 clients joined"):
        NCCLGroup.meet(socket.create_server((LOOPBACK, 0)), world=2, timeout_s=1)
    assert time.monotonic() - began < 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a NCCL library here")
def test_a_learner_without_nccl_says_so(monkeypatch):
    """vLLM's communicator would be disabled, and every send of it would do nothing."""
    from vllm.distributed.utils import StatelessProcessGroup

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    other = threading.Thread(
        target=StatelessProcessGroup.create, args=(LOOPBACK, port, 1, 2), daemon=True
    )
    other.start()
    with pytest.raises(RuntimeError, match="no NCCL library"):
        NCCLGroup.meet(listener, world=2, timeout_s=20)
    other.join(5)
    assert not other.is_alive()


# -- on two GPUs ----------------------------------------------------------------------------------

TAKER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

port, told, folder = int(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
group = stateless_init_process_group("127.0.0.1", port, 1, 2, device=0)
arrived = {}
shapes = zip(told["names"], told["shapes"], told["dtype_names"])
packed_nccl_broadcast_consumer(
    iterator=iter([(name, (shape, getattr(torch, dtype))) for name, shape, dtype in shapes]),
    group=group,
    src=0,
    post_unpack_func=lambda pairs: arrived.update({name: t.cpu().clone() for name, t in pairs}),
    buffer_size_bytes=int(sys.argv[4]),
    num_buffers=2,
)
save_file(arrived, folder / "arrived.safetensors")
"""


@pytest.mark.gpu
def test_an_image_goes_from_one_gpu_to_another(image: Image, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL does not make a group on one GPU")
    listener = socket.create_server((LOOPBACK, 0))
    told = json.dumps(arriving(offer(image, world=2)))
    words = [str(listener.getsockname()[1]), told, str(tmp_path), str(nccl.PACK_BYTES)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1"}
    with subprocess.Popen([sys.executable, "-c", TAKER, *words], env=environment) as taker:
        group = NCCLGroup.meet(listener, world=2, timeout_s=120)
        group.send(image)
        assert taker.wait(60) == 0
        group.destroy()
    sent = dict(image.tensors(torch.device("cpu")))
    save_file(sent, tmp_path / "sent.safetensors")
    arrived = load_file(tmp_path / "arrived.safetensors")
    assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())
