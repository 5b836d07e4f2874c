"""The 8x8 golden results of the methods: fixed numbers in text files, one file a case.

Renew them after a change that is meant to alter results, and say so in the commit:

    python -m tests.support.golden
"""

import math
from pathlib import Path

import torch

from onebit_core.calibration.statistics import StatisticsAccumulator
from onebit_core.methods import METHODS

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "methods"
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "rtn": ("rtn", {"bits": 3, "group_size": 4}),
    "gptq": ("gptq", {"bits": 3, "group_size": 4}),
    "gptq_act_order": ("gptq", {"bits": 2, "group_size": 4, "act_order": True, "search": True}),
    "svid": ("svid", {}),
    "svid_2_planes": ("svid", {"planes": 2, "importance": "inputs"}),
    "pb_llm": ("pb_llm", {"ratio": 0.2}),
    "lut2": ("lut2", {"group_size": 4}),
    "lut2_act_order": ("lut2", {"group_size": 0, "act_order": True}),
    "billm": ("billm", {"group_size": 4, "salient": 1}),
    "billm_column": ("billm", {"feedback": "column"}),
    "arb": ("arb", {"group_size": 4, "salient": 1}),
    "arb_column": ("arb", {"feedback": "column"}),
    "ptq161": ("ptq161", {"ratio": 0.3}),
    "ptq161_without_feedback": ("ptq161", {"ratio": 0.5, "group_size": 2, "feedback": False}),
    "pb_llm_column": ("pb_llm", {"ratio": 0.3, "granularity": "column"}),
    "pb_llm_fixed": ("pb_llm", {"ratio": 0.2, "granularity": "fixed"}),
    "nanoquant": ("nanoquant", {"bits": 4.0, "iterations": 20}),
    "dbf": ("dbf", {"bits": 4.0, "iterations": 20}),
    "omniquant": ("omniquant", {"bits": 3, "group_size": 4}),
    "residual": ("residual", {}),
    "residual_3_planes_groups": ("residual", {"planes": 3, "group_size": 4, "feedback": False}),
    "pb_llm_row_magnitude": ("pb_llm", {"ratio": 0.2, "base": "row", "metric": "magnitude"}),
}


def golden_cases() -> list[str]:
    """Return the names of all cases."""
    return list(CASES)


def golden_file(case: str) -> Path:
    """Return where a case's numbers are."""
    return FOLDER / f"{case}.txt"


def render_golden(case: str) -> str:
    """Quantize the fixed 8x8 weight and write the result as text, four decimals."""
    method, settings = CASES[case]
    weight = torch.tensor([[math.sin(3 * row + 7 * column + row * column) for column in range(8)] for row in range(8)])
    inputs = torch.tensor([[[math.cos(t * (column + 1)) * (column + 1) for column in range(8)] for t in range(40)]])
    accumulator = StatisticsAccumulator(8)
    accumulator.add(inputs)
    layer = METHODS[method].quantize(weight, accumulator.finish(), METHODS[method].config.from_dict(settings))
    rows = [" ".join(f"{value + 0.0:8.4f}" for value in row) for row in layer.dequantize().tolist()]
    return f"# {method} {settings}\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        golden_file(name).write_text(render_golden(name))
