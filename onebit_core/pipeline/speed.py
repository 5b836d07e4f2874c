"""How fast a device multiplies and moves bytes, measured here and now, for forecasts of time."""

import time

import torch

PROBE_SECONDS = 0.3

MOVED_BYTES = 1 << 26
"""Copied to measure how fast memory is; more than a cache holds."""


def products_a_second(hidden: int, tokens: int, device: str, dtype: torch.dtype = torch.float32) -> float:
    """Return how many multiplications and additions a second a device does, in products of a model's size.

    Args:
        hidden: width of the model; the weight is four times as high.
        tokens: rows of what is multiplied.
        device: where.
        dtype: of both.
    """
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight = torch.randn(4 * hidden, hidden, device=device, dtype=dtype)
    done = 0
    torch.nn.functional.linear(x, weight)  # the first call chooses and packs
    wait(device)
    started = time.perf_counter()
    while done < 2 or time.perf_counter() - started < PROBE_SECONDS:
        torch.nn.functional.linear(x, weight)
        wait(device)
        done += 1
    return done * 2 * tokens * weight.numel() / (time.perf_counter() - started)


def bytes_a_second(device: str) -> float:
    """Return how many bytes this device reads and writes."""
    source = torch.zeros(MOVED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    done = 0
    wait(device)
    started = time.perf_counter()
    while done < 2 or time.perf_counter() - started < PROBE_SECONDS:
        target.copy_(source)
        wait(device)
        done += 1
    return done * 2 * MOVED_BYTES / (time.perf_counter() - started)


def wait(device: str) -> None:
    """Let a GPU finish what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
