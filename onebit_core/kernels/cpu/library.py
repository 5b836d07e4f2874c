"""The C library of the CPU kernels: found beside this file, loaded once, bound by one table of functions.

Promise: `load()` returns the library with every function typed and an instruction set chosen, or raises
BackendUnavailable with what is missing and the remedy; nothing else of the library is called before its version has
been compared with ours.

setup.py compiles src/*.c into _onebit_cpu.so. The library uses OpenMP through libgomp.so.1, which torch brings and
loads: torch is imported first, so that the dynamic linker finds that very copy by its name. A second copy would keep a
second pool of threads, and both would spin against each other.

ONEBIT_CPU_ISA names an instruction set (portable, avx2, avx512, ...) for tests and measurements; unset or auto takes
the fastest one of this machine that passes its self-test. It is the core's only environment variable: the choice
belongs to the process, before any model is loaded, and every process of a server inherits it.
"""

import ctypes
import functools
import logging
import os
import threading
from pathlib import Path

import torch  # noqa: F401  # first: it loads the libgomp.so.1 that the library asks for

from onebit_core.errors import BackendUnavailable, KernelError

ABI_VERSION = 3
"""The ob_version() that this code speaks with: functions, arguments and the layout of packed weights."""

PATH = Path(__file__).with_name("_onebit_cpu.so")

_REINSTALL = "install onebit again where a C compiler such as gcc is (pip install --force-reinstall --no-cache-dir)"

_pointer, _int, _int64, _text = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p

# name: (result, arguments), in the order of src/onebit_cpu.h.
FUNCTIONS = {
    "ob_version": (_int, ()),
    "ob_error_text": (_text, (_int,)),
    "ob_isa_available": (_text, ()),
    "ob_select_isa": (_int, (_text,)),
    "ob_isa_name": (_text, ()),
    "ob_isa_refused": (_text, ()),
    "ob_pack_size": (_int64, (_pointer, _int64)),
    "ob_pack": (_int, (_pointer, _int64, _pointer, _int64, _int)),
    "ob_matmul": (_int, (_pointer, _int64, _int64, _int64, _pointer, _int, _int64, _int64, _pointer, _int)),
    "ob_decode": (_int, (_pointer, _int64, _pointer, _int)),
}


class WrongInstructionSet(BackendUnavailable):
    """ONEBIT_CPU_ISA names one that does not exist or that this machine cannot run."""


_log = logging.getLogger(__name__)
_lock = threading.Lock()


def load() -> ctypes.CDLL:
    """Return the library; the first call loads it and chooses the instruction set.

    Raises:
        BackendUnavailable: it is not there, does not load, or is of another version; or ONEBIT_CPU_ISA cannot be meant.
    """
    loaded = _loaded()
    if isinstance(loaded, str):
        raise BackendUnavailable(f"backend 'cpu' cannot run here: {loaded}")
    return loaded


def why_missing() -> str | None:
    """Return one sentence on why the library cannot be used here, with the remedy; None if it can.

    Raises:
        WrongInstructionSet: ONEBIT_CPU_ISA cannot be meant.
    """
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def check(library: ctypes.CDLL, status: int) -> None:
    """Raise what a status of the library means; nothing for OB_OK.

    Raises:
        KernelError: the library refused or failed.
    """
    if status != 0:
        raise KernelError(f"cpu kernels: {library.ob_error_text(status).decode()}")


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or why it cannot be had; a lookup without a lock after the first call."""
    with _lock:  # of two threads at once, the second gets the first one's answer
        return _attempt()


@functools.cache
def _attempt() -> ctypes.CDLL | str:
    try:
        return open_library(PATH, os.environ.get("ONEBIT_CPU_ISA", ""))
    except WrongInstructionSet:
        raise  # somebody asked for it by name: no other backend may take its place in silence
    except BackendUnavailable as error:
        return str(error)


def open_library(path: Path, isa: str) -> ctypes.CDLL:
    """Load a library, compare versions, bind its functions and choose an instruction set.

    Args:
        path: the shared library.
        isa: name of an instruction set; auto or nothing for the fastest.

    Raises:
        BackendUnavailable: any of that failed; the text is one sentence.
    """
    library = _bind(path)
    status = library.ob_select_isa(isa.encode())
    if status != 0:
        available = library.ob_isa_available().decode()
        reason = library.ob_error_text(status).decode()
        raise WrongInstructionSet(f"ONEBIT_CPU_ISA={isa!r}: {reason}; this machine can run auto,{available}")
    if refused := library.ob_isa_refused().decode():
        _log.error(
            "cpu kernels: %s disagreed with portable C and will not be used; please report the processor", refused
        )
    return library


def _bind(path: Path) -> ctypes.CDLL:
    """Load the file, compare its version, and type its functions."""
    if not path.exists():
        raise BackendUnavailable(
            f"the C library {path.name} was not built, for want of a working C compiler; {_REINSTALL}"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"the C library cannot be loaded ({error}); {_remedy(str(error))}") from error
    version = getattr(library, "ob_version", None)
    found = "none" if version is None else version()
    if found != ABI_VERSION:
        raise BackendUnavailable(f"{path} has interface version {found}, needed is {ABI_VERSION}; {_REINSTALL}")
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise BackendUnavailable(f"{path} has no function {name}; {_REINSTALL}") from None
        function.restype, function.argtypes = result, arguments
    return library


def _remedy(error: str) -> str:
    """Return what helps against a failure of the dynamic linker."""
    if "libgomp" in error:
        return "install libgomp (Debian package libgomp1) or a build of torch that brings it"
    return _REINSTALL
