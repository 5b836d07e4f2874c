"""Devices and backends are chosen by name; what cannot run says why."""

import os
import subprocess
import sys

import pytest
import torch

from onebit_core.errors import BackendUnavailable
from onebit_core.kernels import BACKENDS, describe_backend, packed_backend, resolve_backend, resolve_device


def test_auto_is_the_gpu_where_there_is_one():
    """And the CPU elsewhere."""
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "", "cuda:999"])
def test_a_device_that_is_not_there_is_refused(name):
    """The name is in the message."""
    with pytest.raises(BackendUnavailable, match=f"device '{name}'"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["fast", "", "CPU"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name):
    """So that a typo is mended without a look at the documentation."""
    with pytest.raises(BackendUnavailable, match=f"backend '{name}' does not exist; .*auto, {', '.join(BACKENDS)}"):
        resolve_backend(name)


@pytest.mark.parametrize(("name", "device"), [("triton", "cpu"), ("cpu", "cuda"), ("cpu", "cuda:1")])
def test_a_backend_of_another_device_is_refused(name, device):
    """Both are named, and nothing falls back."""
    with pytest.raises(BackendUnavailable, match=f"backend '{name}' computes on .*, the device is {device}"):
        resolve_backend(name, device)


def test_auto_takes_the_packed_kernels_or_says_why_not(caplog):
    """On the CPU: cpu, or dense with one warning that holds the reason."""
    reason = packed_backend("cpu").why_unavailable()
    with caplog.at_level("WARNING"):
        chosen = resolve_backend("auto")
    assert chosen == ("cpu" if reason is None else "dense")
    assert [reason in message for message in caplog.messages] == ([] if reason is None else [True])


def test_a_backend_that_cannot_run_names_its_reason():
    """Triton without a GPU, for one."""
    reason = packed_backend("triton").why_unavailable()
    if reason is None:
        assert resolve_backend("triton", "cuda") == "triton"
        return
    with pytest.raises(BackendUnavailable, match="backend 'triton' cannot run here: ") as caught:
        resolve_backend("triton", "cuda")
    assert reason in str(caught.value)


def test_an_instruction_set_asked_for_in_vain_is_an_error_under_auto_too():
    """ONEBIT_CPU_ISA is a choice by name: dense must not take its place in silence."""
    if packed_backend("cpu").why_unavailable() is not None:
        pytest.skip("the C library is missing")
    code = "from onebit_core.kernels import resolve_backend; resolve_backend('auto')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEBIT_CPU_ISA": "avx9000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "ONEBIT_CPU_ISA='avx9000'" in done.stderr


def test_what_runs_is_described_in_one_line():
    """For the log and the metrics."""
    assert describe_backend("dense") == "dense"
    if packed_backend("cpu").why_unavailable() is None:
        line = describe_backend("cpu")
        assert line.startswith("cpu ")
        assert "\n" not in line
