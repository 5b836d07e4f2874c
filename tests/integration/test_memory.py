"""Quantizing holds one block in memory, not the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_model import save_tiny_model

FOLLOW = """
import json, sys
from pathlib import Path
from onebit_core.progress import Watch
from tests.support.quantized import quantize_tiny

peak = 0
def look(event):
    global peak
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    peak = max(peak, int(line.split()[1]) * 1024)
quantize_tiny(Path(sys.argv[1]), Path(sys.argv[2]), "rtn", settings={"bits": 1}, watch=Watch(sink=look))
print(json.dumps(peak))
"""
# Freed memory goes back at once, so that only what is held is counted.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parents[2])}
BLOCK_BYTES = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 2048)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """Sixteen more blocks of 16 MB each cost a few packed megabytes, not 250."""
    peaks = []
    for layers in (4, 20):
        model = save_tiny_model(
            tmp_path / f"model-{layers}", hidden_size=512, intermediate_size=2048, num_layers=layers, num_heads=8,
            num_kv_heads=4,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", FOLLOW, str(model), str(tmp_path / f"artifact-{layers}")],
            capture_output=True, text=True, check=True, env=ENVIRONMENT,
        )  # fmt: skip
        peaks.append(json.loads(done.stdout))
    assert 16 * BLOCK_BYTES > 200e6
    assert peaks[1] - peaks[0] < 3 * BLOCK_BYTES
