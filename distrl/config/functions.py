"""What a configuration names as `module:function`."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distrl.config.base import ConfigError


def resolve(path: str, what: str) -> Callable[..., Any]:
    """The function that 'module:function' names. Raises ConfigError that says which half of it is
    not there; `what` it should be stands in the message."""
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise ConfigError(f"{what} {path!r} is not of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{what} {path!r}: cannot import {module_name} ({error}); install it, or put it "
            "into the working directory or a folder on PYTHONPATH, on every machine"
        ) from error
    except Exception as error:  # of the module's own
        raise ConfigError(
            f"{what} {path!r}: {module_name} fails as it is imported: {type(error).__name__}: "
            f"{error}"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        there = [n for n, f in vars(module).items() if callable(f) and not n.startswith("_")]
        raise ConfigError(
            f"{what} {path!r}: {module_name} has no {name}; it has {', '.join(there[:10])}"
        )
    if not callable(function):
        raise ConfigError(f"{what} {path!r} is a {type(function).__name__}, not a function")
    return function


@contextmanager
def blamed(path: str, what: str) -> Iterator[None]:
    """Within it the function of 'module:function' is called: what it raises becomes a ConfigError
    that says whose error it is, and in which line of it. A built-in's goes on as it is."""
    try:
        yield
    except Exception as error:
        if ":" not in path:
            raise
        raise ConfigError(f"{what} {path!r} failed: {told(error, behind=2)}") from error


def told(error: BaseException, behind: int) -> str:
    """What a user's function raised, and in which of its lines. `behind`: the calls of ours that
    the traceback begins with; a built-in has no line of its own."""
    calls = traceback.extract_tb(error.__traceback__)[behind:]
    place = f" ({calls[0].filename}, line {calls[0].lineno})" if calls else ""
    return f"{type(error).__name__}: {error}{place}"
