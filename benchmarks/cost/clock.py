"""Seconds that a measurement may use: of one thread's processor time on a CPU, else of the clock, the device awaited.

On a shared machine the host takes cores away for seconds at a time; processor time leaves that out, and a second thread
would only add how it waits for the first.
"""

from __future__ import annotations

import time

import torch


def one_thread() -> None:
    """To be called first: on a CPU everything is computed by one thread."""
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)


def described() -> str:
    return "wall clock, device awaited" if torch.accelerator.is_available() else "processor time of one thread"


def now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()
