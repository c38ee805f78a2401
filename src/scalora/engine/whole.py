"""What an event writes belongs together: the store, A and B and the optimizer's state change as one, or say so.

A Ctrl-C waits for the end. After an error in the middle, memory that runs out say, the layers refuse to compute.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..layers.peft_lora import AdapterLayer


@contextmanager
def whole(layers: Sequence[AdapterLayer]) -> Iterator[None]:
    """Within, what the layers compute is changed and restored."""
    with _undisturbed():
        for layer in layers:
            layer.module.torn = True  # pyright: ignore[reportAttributeAccessIssue]
        yield
        for layer in layers:
            layer.module.torn = False  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, Python's handler of Ctrl-C is not called; it is at the end. Other threads are not disturbed anyway."""
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return
    came: list[object] = []
    signal.signal(signal.SIGINT, lambda *_: came.append(None))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if came:
        signal.raise_signal(signal.SIGINT)
