"""A tiny artifact, made by the real pipeline in a second or two."""

from pathlib import Path
from typing import Any

from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.run import quantize_model
from onebit_core.progress import Watch

SETTINGS: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 32},
    "gptq": {"group_size": 32},
    "svid": {"planes": 2},
    "pb_llm": {"ratio": 0.2},
    "lut2": {"group_size": 32},
    "billm": {"group_size": 32},
    "arb": {"group_size": 32},
    "ptq161": {"group_size": 16},
    "nanoquant": {"bits": 3.0},
    "dbf": {"bits": 3.0, "iterations": 10},
    "residual": {},
    "omniquant": {"group_size": 32},
}


def tiny_config(model: Path, method: str = "rtn", **changes: Any) -> QuantizeConfig:
    """Return a configuration that fits a tiny model: 4 samples of 32 tokens."""
    values: dict[str, Any] = {
        "model": str(model),
        "method": method,
        "settings": SETTINGS[method],
        "calibration": {"samples": 4, "tokens": 32},
        "device": "cpu",
    }
    values.update(changes)
    return QuantizeConfig.from_dict(values)


def quantize_tiny(model: Path, out: Path, method: str = "rtn", *, watch: Watch | None = None, **changes: Any) -> Path:
    """Quantize a tiny model; `changes` go into its configuration."""
    return quantize_model(tiny_config(model, method, **changes), out, watch=watch or Watch())
