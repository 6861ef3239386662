"""The most memory that this process held at once, since the last time somebody asked."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 2**20  # mallopt(3); bytes
RESET_PEAK = "5"  # proc(5): sets VmHWM to what is resident now


def return_large_blocks() -> None:
    """Let what is freed go back to the system at once, where the C library is glibc.

    glibc would keep blocks of up to 32 MiB for later: a backward pass then frees its activations
    without the process growing any smaller. Costs page faults.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def start() -> None:
    """Forget earlier peaks, of main memory where the system lets a process do so."""
    with contextlib.suppress(OSError):  # else the peak is that of the whole process so far
        CLEAR.write_text(RESET_PEAK)
    torch = sys.modules.get("torch")  # who has not imported it uses no GPU
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int]:
    """Return the peaks since `start`, in bytes, as far as they are known.

    Returns
    -------
    dict
        ``memory/peak_bytes``, resident in main memory (Linux's VmHWM, shared pages among it), and
        ``memory/gpu_peak_bytes``, allocated by torch on its current GPU.
    """
    found = {}
    try:
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        found["memory/peak_bytes"] = 1024 * int(fields["VmHWM"].split()[0])
    except (OSError, KeyError):
        pass  # no Linux
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["memory/gpu_peak_bytes"] = int(torch.cuda.max_memory_allocated())
    return found
