"""How a weight is found: the table of methods. The command line, the admin API, the benchmarks and the docs read it.

A new method is one file here, one row in this table, a test with its 8x8 golden file, and a page in docs/methods.
"""

from onebit_core.errors import ConfigError
from onebit_core.methods.arb import ARB
from onebit_core.methods.base import Method
from onebit_core.methods.billm import BILLM
from onebit_core.methods.dbf import DBF
from onebit_core.methods.gptq import GPTQ
from onebit_core.methods.lut2 import LUT2
from onebit_core.methods.nanoquant import NANOQUANT
from onebit_core.methods.omniquant import OMNIQUANT
from onebit_core.methods.pb_llm import PB_LLM
from onebit_core.methods.ptq161 import PTQ161
from onebit_core.methods.residual import RESIDUAL
from onebit_core.methods.rtn import RTN
from onebit_core.methods.svid import SVID

METHODS: dict[str, Method] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "svid": SVID,
    "pb_llm": PB_LLM,
    "lut2": LUT2,
    "billm": BILLM,
    "arb": ARB,
    "ptq161": PTQ161,
    "nanoquant": NANOQUANT,
    "dbf": DBF,
    "residual": RESIDUAL,
    "omniquant": OMNIQUANT,
}

__all__ = ["METHODS", "Method", "method_named"]


def method_named(name: str) -> Method:
    """Return a method of the table.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]
