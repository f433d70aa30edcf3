"""Ending a run between two steps when a signal asks for it, so that no step is lost."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Request:
    """The signal that this process has received so far."""

    name: str | None = None  # of the signal


def end(name: str, step: int) -> NoReturn:
    """Exit after a step as a process that a signal ended, with 128 + the signal's number."""
    print(f"ended by {name} after step {step}; the same command goes on from it")
    sys.exit(128 + int(getattr(signal, name)))


@contextlib.contextmanager
def noted_by(
    note: Callable[[int, FrameType | None], None],
) -> Iterator[Callable[[], None]]:
    """Within the block signals call `note` and nothing else; yields the function that ends this
    early. Nothing is noted outside the main thread, where Python has no signals."""
    main = threading.current_thread() is threading.main_thread()
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS if main}

    def restore() -> None:
        for name, handler in before.items():
            if handler is not None:  # None: not set by Python
                signal.signal(getattr(signal, name), handler)

    for name, handler in before.items():
        if handler is not signal.SIG_IGN:  # whoever started this wants it ignored, as nohup does
            signal.signal(getattr(signal, name), note)
    try:
        yield restore
    finally:
        restore()


@contextlib.contextmanager
def on_signal() -> Iterator[Request]:
    """Within the block the first signal is only noted in the request; a second one ends the process
    as it would have."""
    request = Request()

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        print(
            f"{request.name}: ending after this step; once more ends it at once.", file=sys.stderr
        )
        restore()

    with noted_by(note) as restore:
        yield request
