"""Imports at first use, and of modules of the user's, which lie in the folder in which a command is started."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from probe.errors.exceptions import nearest
from probe.text import error_text


class UserImportError(Exception):
    """A module cannot be imported; the text says why, without saying who wanted it."""


def import_module(name: str) -> ModuleType:
    """Import a module, also from the current directory.

    Raises:
        UserImportError: it is not there, a package that it needs is missing, or it fails.
    """
    try:
        with current_directory_importable():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserImportError(
                f"module {name!r} was not found; start in the folder that holds it, or put that folder on PYTHONPATH"
            ) from error
        raise UserImportError(f"module {name!r} needs a package that is missing: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # `sys.exit` in a module is a fault of the module, too
        raise UserImportError(f"importing module {name!r} failed with {error_text(error)}") from error


def why_no_class(path: str, base: type) -> str | None:
    """Why `module.Class` is not a class derived from `base`; None where it is one.

    Args:
        path: the dotted path.
        base: the class that it is to be derived from.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        return f"expected module.Class (for example my_callbacks.Announce), found {path!r}"
    try:
        module = import_module(module_name)
    except UserImportError as error:
        return str(error)
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        where = getattr(module, "__file__", None)
        return f"module {module_name!r} ({where}) has no class {name!r}{nearest(name, classes)}"
    found = getattr(module, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"expected {path} to be derived from {base.__module__}.{base.__name__}"
    return None


@contextmanager
def current_directory_importable() -> Iterator[None]:
    """Let imports see the current directory first; a console script, unlike `python -m`, does not have it."""
    importlib.invalidate_caches()
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with suppress(ValueError):  # the imported module may have changed the path itself
            sys.path.remove("")


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Let the logger of a library log errors only while this lasts."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def at_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are imported when they are asked for.

    Args:
        package: its `__name__`.
        homes: the modules of the names.
    """

    def get(name: str) -> Any:
        if name in homes:
            # peft imports it where it is there, and it warns of every kernel it lacks
            with errors_only("bitsandbytes"):
                return getattr(importlib.import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
