"""Flags and the configuration file of onebit quantize."""

import json

import pytest

from onebit_core.cli.quantize import quantize
from onebit_core.errors import ConfigError


@pytest.mark.parametrize("part", ["settings", "calibration"])
@pytest.mark.parametrize("value", [None, [], "x"])
def test_a_part_of_the_configuration_that_is_no_object_is_refused(tmp_path, part, value):
    """Before flags are merged into it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model": "x", "method": "rtn", part: value}))
    with pytest.raises(ConfigError, match=f"--config: {part} is"):
        quantize(config=file, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("texts", "weights", "message"),
    [
        (["a", "b"], [1.0], "1 weights for 2 texts"),
        (["a"], [0.0], "must be positive"),
        (["a", "a"], None, "a is named twice"),
    ],
)
def test_shares_that_cannot_be_meant_are_refused(tmp_path, texts, weights, message):
    """A weight for each text, and each text once; before any work."""
    with pytest.raises(ConfigError, match=message):
        quantize("x", tmp_path / "out", "gptq", calibration=texts, calibration_weight=weights)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_torch_does_not_take_is_refused(tmp_path, seed):
    """Before any work."""
    with pytest.raises(ConfigError, match=rf"calibration\.seed {seed}"):
        quantize("x", tmp_path / "out", "gptq", seed=seed)
