"""onebit_core: quantize a language model to one or two bits a weight, and prove what it cost."""

__version__ = "0.1.0"
