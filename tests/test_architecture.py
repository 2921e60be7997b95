"""The import table: which room may import which, and which library lives where.

Imports are read from the syntax tree, so one inside a function, under `if TYPE_CHECKING`
or spelled `importlib.import_module("…")` counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distrl"

BASE = {"records", "config", "disk", "errors"}
ALGORITHMS = BASE | {"roles", "algo", "data", "models"}
ROOMS: dict[str, set[str]] = {
    "__init__": set(),
    "records": set(),
    "errors": set(),
    "config": {"errors"},
    "disk": {"errors"},
    "algo": set(),
    "roles": {"records", "errors"},
    "metrics": BASE,
    "checkpoint": BASE,
    "models": BASE,
    "data": BASE,
    "sync": BASE,
    "generate": BASE | {"roles", "data", "sync"},
    "score": ALGORITHMS,
    "learn": ALGORITHMS | {"sync", "metrics", "checkpoint"},
    "evaluate": ALGORITHMS | {"metrics"},
    "driver": BASE | {"roles", "metrics", "checkpoint"},
    "sim": BASE | {"roles", "driver"},
}
ROOMS["actors"] = set(ROOMS) - {"sim"}
ROOMS["cli"] = set(ROOMS)
ROOMS["__main__"] = {"cli"}

TORCH_FREE = BASE | {"roles", "metrics", "checkpoint", "driver", "sim"}
LIBRARIES: dict[str, set[str]] = {
    "torch": set(ROOMS) - TORCH_FREE,
    "wandb": {"metrics"},
    "vllm": {"generate", "sync"},
    "ray": {"actors"},
    "transformers": {"data", "models", "score", "learn"},
    # What they read can run code, and checkpoints and payloads come from elsewhere.
    "pickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "joblib": set(),
    "shelve": set(),
}


def violations(package: Path) -> list[str]:
    """'file:line: what is wrong' for every module below `package`, in order."""
    return [
        f"{path.relative_to(package.parent)}:{line}: {problem}"
        for path in sorted(package.rglob("*.py"))
        for line, problem in sorted(module_violations(package, path))
    ]


def module_violations(package: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) in one module."""
    parts = path.relative_to(package).with_suffix("").parts
    room = parts[0]
    if room not in ROOMS:
        yield 1, f"room {room} is not in the import table; give it a row"
        return
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        line = getattr(node, "lineno", 1)
        for name in imported_names(node, (package.name, *parts)):
            yield from ((line, problem) for problem in import_problems(room, name, package.name))
        yield from ((line, problem) for problem in unsafe_uses(node))


def imported_names(node: ast.AST, module: tuple[str, ...]) -> list[str]:
    """Dotted names that `node` imports, relative ones resolved against `module`.

    `from a import b` gives a.b: whether b is a module or an attribute makes no difference here.
    """
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=source, names=names, level=level):
            # Level 1 is the module's own package, which for a/__init__.py is a as well.
            base = module[: len(module) - level] if level else ()
            prefix = ".".join((*base, source) if source else base)
            return [f"{prefix}.{alias.name}" for alias in names]
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(func) in (
            "__import__",
            "import_module",
            "importlib.import_module",
        ):
            return [name]
    return []


def import_problems(room: str, name: str, package: str) -> Iterator[str]:
    """What the table says against `room` importing `name`."""
    top, *rest = name.split(".")
    if top == package:
        target = rest[0] if rest else "__init__"
        attribute = target.startswith("__") and target != "__main__"
        if not attribute and target not in ROOMS[room] | {room}:
            yield f"{room} may not import {target} ({name})"
    elif top in LIBRARIES and room not in LIBRARIES[top]:
        where = ", ".join(sorted(LIBRARIES[top] - {"__init__", "__main__"})) or "nowhere"
        yield f"{room} may not import {top}, which is at home in: {where}"
    if name in ("torch.load", "torch.serialization.load"):
        yield f"{name} runs code from the file; use safetensors"


def unsafe_uses(node: ast.AST) -> Iterator[str]:
    """Ways to run code that came from elsewhere."""
    match node:
        case ast.Attribute(attr="load") if ast.unparse(node) in (
            "torch.load",
            "torch.serialization.load",
        ):
            yield "torch.load runs code from the file; use safetensors"
        case ast.keyword(arg="trust_remote_code" | "allow_pickle" as name, value=value):
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{name} runs code that came with a file"
        case ast.Constant(value="trust_remote_code" | "VLLM_ALLOW_INSECURE_SERIALIZATION" as name):
            yield f"{name} lets others run code here"


def plant(tmp_path: Path, file: str, source: str) -> Path:
    """A package `distrl` whose only module is `file`."""
    package = tmp_path / "distrl"
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return package


def test_package_keeps_to_the_import_table() -> None:
    assert (PACKAGE / "records.py").exists()
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("algo/gae.py", "import distrl.config"),
        ("algo/gae.py", "from distrl import config"),
        ("algo/gae.py", "from distrl.learn.update import Update"),
        ("algo/gae.py", "from .. import learn"),
        ("algo/gae.py", "from ..learn import ppo"),
        ("algo/deep/gae.py", "from ...learn import ppo"),
        ("algo/__init__.py", "from ..learn import ppo"),
        ("records.py", "from . import config"),
        ("records.py", "from .config import Config"),
        ("driver/loop.py", "def f():\n    import torch.nn as nn"),
        ("driver/loop.py", "async def f():\n    from torch import Tensor"),
        ("metrics.py", "if TYPE_CHECKING:\n    import torch"),
        ("driver/loop.py", "import ray"),
        ("cli/train.py", "from ray import init"),
        ("learn/ppo.py", "import wandb"),
        ("learn/ppo.py", "importlib.import_module('wandb.sdk')"),
        ("learn/ppo.py", "from vllm import LLM"),
        ("generate/engine.py", "from transformers import AutoTokenizer"),
        ("actors/generator.py", "from distrl.sim import clock"),
        ("actors/generator.py", "import distrl.cli"),
        ("sim/clock.py", "from distrl.metrics import Sink"),
        ("checkpoint.py", "import pickle"),
        ("actors/generator.py", "from cloudpickle import dumps"),
        ("learn/ppo.py", "state = torch.load(path)"),
        ("learn/ppo.py", "from torch import load"),
        ("models/load.py", "AutoModel.from_pretrained(path, trust_remote_code=True)"),
        ("models/load.py", "AutoModel.from_pretrained(path, trust_remote_code=flag)"),
        ("models/load.py", "options = {'trust_remote_code': True}"),
        ("data/read.py", "np.load(path, allow_pickle=True)"),
        ("generate/engine.py", "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'"),
        ("attic/old.py", "import json"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    found = violations(plant(tmp_path, file, f"import json\n{source}\n"))
    assert len(found) == 1, found
    assert found[0].startswith(f"distrl/{file}:")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("algo/gae.py", "import torch\nfrom .masked import masked_mean\nfrom . import kl"),
        ("algo/__init__.py", "from .gae import gae\nfrom distrl.algo import kl"),
        ("roles.py", "from distrl.records import Prompt"),
        ("driver/loop.py", "from ..roles import Learner\nfrom distrl import __version__"),
        ("cli/train.py", "from distrl.actors import cluster\nfrom distrl import sim"),
        ("actors/learner.py", "import ray\nfrom distrl.learn import ppo"),
        ("models/load.py", "import transformers\nload(path, trust_remote_code=False)"),
    ],
)
def test_allowed_import_passes(tmp_path: Path, file: str, source: str) -> None:
    assert violations(plant(tmp_path, file, source)) == []
