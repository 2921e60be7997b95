"""The engine's half of the transport, inside vLLM but without an engine."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from distrl.sync import vllm_plugin
from distrl.sync.memory import SharedMemoryPublisher

pytestmark = pytest.mark.slow  # vLLM takes seconds to import


def test_the_plugin_is_found_by_vllm_and_registers_once(monkeypatch):
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="distrl")
    register = entry.load()
    registered = []
    add = WeightTransferEngineFactory.register_engine
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", {})
    monkeypatch.setattr(
        WeightTransferEngineFactory,
        "register_engine",
        lambda name, *where: (registered.append(name), add(name, *where)),
    )
    register()
    register()
    assert registered == ["distrl_shm", "distrl_gloo"]
    engines = [WeightTransferEngineFactory._registry[name]().__name__ for name in registered]
    assert engines == ["SharedMemoryTransfer", "GlooTransfer"]


def test_tables_without_weights_are_no_news():
    vllm_plugin.register()
    logger = logging.getLogger(vllm_plugin.RELOADS)

    def passes(message):
        record = logger.makeRecord(
            logger.name, logging.WARNING, "f", 1, "%s: Failed to load weights", (message,), None
        )
        return bool(logger.filter(record))

    assert passes("QKVParallelLinear")
    assert not passes("RotaryEmbedding") and not passes("Llama3RotaryEmbedding")


class Model:
    def load_weights(self, weights):
        self.loaded = dict(weights)


@pytest.fixture
def transfer():
    from distrl.sync.vllm_transfer import SharedMemoryTransfer

    transfer = object.__new__(SharedMemoryTransfer)  # its base wants a whole engine's config
    vars(transfer).update(model=Model(), device=torch.device("cpu"))
    return transfer


def test_an_image_reaches_the_models_loader(transfer):
    from distrl.sync.vllm_transfer import SharedMemoryUpdate

    publisher = SharedMemoryPublisher()
    sent = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    path, nbytes = publisher.publish(sent, version=1)
    assert nbytes == 32
    transfer.receive_weights(SharedMemoryUpdate(path=path, version=1, nbytes=nbytes))
    assert all(torch.equal(transfer.model.loaded[name], sent[name]) for name in sent)
    with pytest.raises(ValueError, match="32 bytes of weights where 40 were sent"):
        transfer.receive_weights(SharedMemoryUpdate(path=path, version=1, nbytes=40))
    with pytest.raises(OSError, match="holds version 1 by now"):
        transfer.receive_weights(SharedMemoryUpdate(path=path, version=2, nbytes=nbytes))
    publisher.close()


def test_one_tensor_after_the_other_is_made(transfer, monkeypatch):
    """All of them at once would be a second model, on the engine's GPU."""
    from distrl.sync import vllm_transfer

    made = []

    class Image:
        def __init__(self, path, **_):
            self.names = ["a", "b"]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.names

        def get_tensor(self, name):
            made.append(name)
            return torch.zeros(2)

    class Slow(Model):
        def load_weights(self, weights):
            for place, _ in enumerate(weights, start=1):
                assert len(made) == place

    monkeypatch.setattr(vllm_transfer, "safe_open", Image)
    transfer.model = Slow()
    publisher = SharedMemoryPublisher()
    path, nbytes = publisher.publish({"a": torch.zeros(2), "b": torch.zeros(2)}, version=1)
    update = vllm_transfer.SharedMemoryUpdate(path=path, version=1, nbytes=nbytes)
    transfer.receive_weights(update)
    assert made == ["a", "b"]
    publisher.close()


def test_an_image_is_held_until_its_load_is_finished(transfer, monkeypatch):
    """vLLM may keep tensors of it for so long."""
    from distrl.sync import vllm_transfer

    monkeypatch.setattr(vllm_transfer, "finalize_layerwise_reload", lambda *_: None)
    transfer.model_config = None
    publisher = SharedMemoryPublisher()
    paths = []
    for version in range(1, 6):
        path, nbytes = publisher.publish({"a": torch.full((4,), float(version))}, version)
        paths.append(path)
        if version in (1, 4):
            update = vllm_transfer.SharedMemoryUpdate(path=path, version=version, nbytes=nbytes)
            transfer.receive_weights(update)
        if version == 3:
            assert transfer.model.loaded["a"].tolist() == [1, 1, 1, 1], "still as it was"
    transfer.finish_weight_update()
    written_over, _ = publisher.publish({"a": torch.zeros(4)}, version=6)
    assert written_over == paths[3], "the one that was held until now"
    publisher.close()


def test_all_that_is_sent_is_taken_whatever_the_loader_asks_for():
    """The learner would wait for the rest until its deadline."""
    from distrl.sync.vllm_gloo import GlooTransfer

    class Picky(Model):
        def load_weights(self, weights):
            self.loaded = dict([next(iter(weights))])

    class Group:
        taken = 0

        def receive(self, infos):
            for info in infos:
                self.taken += 1
                yield info.name, torch.zeros(info.shape)

    transfer: Any = object.__new__(GlooTransfer)
    vars(transfer).update(model=Picky(), device=torch.device("cpu"))
    told = {"names": ["a", "b"], "dtype_names": ["float32"] * 2, "shapes": [[2], []]}
    update = transfer.parse_update_info(told)
    with pytest.raises(RuntimeError, match="not met before"):
        transfer.receive_weights(update)
    group = transfer._group = Group()
    transfer.receive_weights(update)
    assert list(transfer.model.loaded) == ["a"] and group.taken == 2
    transfer.shutdown()
    assert transfer._group is None


def test_a_registered_child_ends_with_the_process_that_started_it():
    """Only where it is told so: other users of vLLM on this machine must not notice us."""
    for mark, ends in [("{pid}", True), ("1", False)]:
        assert child_ends_with_parent(mark) is ends


CHILD = """
import sys, time
from unittest.mock import MagicMock
sys.modules["vllm.distributed.weight_transfer.factory"] = MagicMock()  # slow to import
from distrl.sync.vllm_plugin import register
register()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import os, subprocess, sys, time
env = os.environ | {{"{vllm_plugin.DIE_WITH_PARENT}": sys.argv[1].format(pid=os.getpid())}}
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], env=env, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_whose_starter_is_gone_already_ends_at_once():
    """It was killed while the child was importing; vLLM itself would wait for five minutes."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    code = "from distrl.sync.vllm_plugin import end_with_starter; end_with_starter(); print('on')"
    for mark, output in [(str(gone.pid), ""), (str(os.getpid()), "on\n")]:
        env = os.environ | {vllm_plugin.DIE_WITH_PARENT: mark}
        child = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert (child.stdout, child.returncode == 0) == (output, bool(output))


def child_ends_with_parent(mark: str) -> bool:
    import psutil

    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, mark, CHILD], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        gone, alive = psutil.wait_procs([child], timeout=3)
        for process in alive:
            os.kill(process.pid, 9)
        return bool(gone)
