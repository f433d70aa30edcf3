"""The frame of the command lines `python -m harness.<name>`."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from harness.words import did_you_mean

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, with the nearest option."""

    def error(self, message: str) -> NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        options = (o for o in self._option_string_actions if o.startswith("--"))
        hint = did_you_mean(unknown.split()[0], options) if unknown.startswith("-") else ""
        self.exit(2, f"error: {message}.{hint}\n")


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring."""
    return _Parser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def path(text: str) -> Path:
    """A path as it is typed, from the home folder if it begins with ~."""
    return Path(text).expanduser()


def needs(module: str) -> Any:
    """A module of the extra `pages`. Raises ValueError with the thing to type if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise ValueError(f'{package} is missing; pip install -e ".[pages]"') from None


def run(act: Callable[[T], object], options: T) -> None:
    """Do what was asked for. A user's mistake ends it with one sentence and exit code 1; where
    nobody reads on, as after `| head`, it ends silently."""
    try:
        act(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
