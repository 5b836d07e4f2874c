"""The ways in which quality.py quantizes a model: every method as usual, with reconstruction, and trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to quantize the model.

    Attributes:
        name: of the row, and of its folder under --work.
        method: name in METHODS.
        settings: the method's.
        preset: of reconstruction.
        bits: average true bits to spread over layers, or None.
        start: name of the row whose artifact is trained to make this one; method and settings are that row's.
        training: fields of TrainingConfig, of a row with a start; its text is the calibration's.
        written: share of the training's text that the original writes itself.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "off"
    bits: float | None = None
    start: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    written: float = 0.0


def _trained(start: Row, suffix: str = "", *, written: float = 0.0, **training: Any) -> Row:
    """Return the row of a training."""
    return Row(
        name=f"{start.name}+train{suffix}",
        method=start.method,
        settings=start.settings,
        preset=start.preset,
        start=start.name,
        training={**TRAINING, **training},
        written=written,
    )


TRAINING = {
    "steps": 200,
    "tokens": 512,
    "batch": 4,
    "evaluate_every": 20,
    "alpha": 0.0,
    "sign_rate": 3e-5,
    "scale_rate": 2e-3,
}
"""800 windows of 512 tokens: less than an hour on two cores for SmolLM2-135M."""

WRITTEN = 0.125

SHORT = {"steps": 40}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "-short": {},
    "-short-hidden": {"alpha": 0.1},
    "-short-scales": {"sign_rate": 0.0},
    "-short-adam": {"sign_optimizer": "adam", "latent_rate": 0.04},
    "-short-written": {"written": WRITTEN},
}
"""What each part of a training is worth, in forty steps on the calibration's texts alone."""

SVID_LIGHT = Row(name="svid+light", method="svid", preset="light")
SVID_FULL = Row(name="svid+full", method="svid", preset="full")
PB_LLM_LIGHT = Row(name="pb_llm-10+light", method="pb_llm", settings={"ratio": 0.1}, preset="light")
LUT2_LIGHT = Row(name="lut2+light", method="lut2", preset="light")
LUT2_ROW_LIGHT = Row(name="lut2-row+light", method="lut2", settings={"group_size": 0}, preset="light")

ROWS = (
    *(Row(name=f"rtn-{bits}b", method="rtn", settings={"bits": bits, "group_size": 64}) for bits in (4, 3, 2)),
    *(Row(name=f"gptq-{bits}b", method="gptq", settings={"bits": bits, "group_size": 64}) for bits in (4, 3, 2)),
    *(
        Row(
            name=f"gptq-{bits}b-plain",
            method="gptq",
            settings={"bits": bits, "group_size": 64, "act_order": False, "search": False},
        )
        for bits in (4, 3)
    ),
    Row(name="svid", method="svid"),
    *(
        Row(name=f"pb_llm-{100 * ratio:.0f}", method="pb_llm", settings={"ratio": ratio, "metric": "hessian"})
        for ratio in (0.1, 0.2, 0.3, 0.5)
    ),
    *(
        Row(
            name=f"pb_llm-{100 * ratio:.0f}-row",
            method="pb_llm",
            settings={"ratio": ratio, "metric": "hessian", "base": "row"},
        )
        for ratio in (0.1, 0.2)
    ),
    Row(name="pb_llm-20-magnitude", method="pb_llm", settings={"ratio": 0.2, "metric": "magnitude"}),
    Row(
        name="pb_llm-20-magnitude-row",
        method="pb_llm",
        settings={"ratio": 0.2, "metric": "magnitude", "base": "row"},
    ),
    *(
        Row(
            name=f"pb_llm-{100 * ratio:.0f}-{granularity}",
            method="pb_llm",
            settings={"ratio": ratio, "granularity": granularity},
        )
        for ratio in (0.1, 0.2)
        for granularity in ("fixed", "column")
    ),
    Row(name="lut2", method="lut2"),
    *(
        Row(name=f"{method}{suffix}", method=method, settings={"feedback": feedback})
        for method in ("billm", "arb")
        for suffix, feedback in (("", "block"), ("-column", "column"))
    ),
    *(
        Row(name=f"arb-column+{preset}", method="arb", settings={"feedback": "column"}, preset=preset)
        for preset in ("light", "full")
    ),
    *(Row(name=f"ptq161{suffix}", method="ptq161", preset=suffix[1:] or "off") for suffix in ("", "+light", "+full")),
    Row(name="nanoquant-1b", method="nanoquant", settings={"bits": 1.0}),
    Row(name="dbf-1b", method="dbf", settings={"bits": 1.0}),
    *(
        Row(name=f"dbf-1b+{preset}", method="dbf", settings={"bits": 1.0}, preset=preset)
        for preset in ("light", "full")
    ),
    *(
        Row(
            name=f"residual-{planes}{suffix}",
            method="residual",
            settings={"planes": planes},
            preset=suffix[1:] or "off",
        )
        for planes in (2, 3)
        for suffix in ("", "+light", "+full")
    ),
    Row(name="residual-2-g64", method="residual", settings={"planes": 2, "group_size": 64}),
    *(
        Row(name=f"omniquant-{bits}b{suffix}", method="omniquant", settings={"bits": bits}, preset=suffix[1:] or "off")
        for bits in (4, 3, 2)
        for suffix in ("", "+light")
    ),
    *(
        Row(name=f"gptq-{bits}b+{preset}", method="gptq", settings={"bits": bits, "group_size": 64}, preset=preset)
        for bits in (4, 3, 2)
        for preset in ("light", "full")
    ),
    LUT2_LIGHT,
    Row(name="lut2+full", method="lut2", preset="full"),
    *(
        Row(name=f"nanoquant-{bits}b+{preset}", method="nanoquant", settings={"bits": float(bits)}, preset=preset)
        for bits in ("1", "1.5", "2")
        for preset in ("light", "full")
    ),
    SVID_LIGHT,
    SVID_FULL,
    LUT2_ROW_LIGHT,
    Row(name="lut2-row+full", method="lut2", settings={"group_size": 0}, preset="full"),
    *(
        Row(name=f"gptq-{bits}b-spread{suffix}", method="gptq", bits=float(bits), preset=suffix[1:] or "off")
        for bits in ("2.5", "3.3", "4.1")
        for suffix in ("", "+light")
    ),
    PB_LLM_LIGHT,
    *(_trained(start, written=WRITTEN) for start in (SVID_LIGHT, SVID_FULL)),
    *(_trained(SVID_LIGHT, suffix, **SHORT, **changed) for suffix, changed in ABLATIONS.items()),
    _trained(PB_LLM_LIGHT, written=WRITTEN),
    *(_trained(start) for start in (LUT2_ROW_LIGHT, LUT2_LIGHT)),
)
