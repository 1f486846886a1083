"""Notices Ctrl-C, so that what runs is stopped between two steps."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator


class Stopped(Exception):
    """Says that Ctrl-C was pressed; what is done is kept, and a checkpoint is written."""


@contextlib.contextmanager
def interrupts_noticed() -> Iterator[Callable[[], bool]]:
    """Yields what says whether Ctrl-C was pressed, so that no step is cut in two.

    A second Ctrl-C stops at once.
    """
    pressed: list[int] = []

    def notice(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        # print() is not to be called again while it runs
        os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once\n")

    try:
        before = signal.signal(signal.SIGINT, notice)
    except ValueError:
        # not the main thread, which alone gets signals
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
