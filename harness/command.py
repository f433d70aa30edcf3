"""The frame of the command lines `python -m harness.<name>` that take adapters."""

import argparse
import os
import sys
from collections.abc import Callable


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """One whose help begins with a module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(act: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Do what was asked for. A user's mistake ends it with one sentence and exit code 1; where
    nobody reads on, as after `| head`, it ends silently."""
    try:
        act(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
