"""Runs a command that dies with the process that started it: `python -m service.jobs.child PARENT COMMAND...`.

A worker killed with SIGKILL can end nobody. The kernel can: PR_SET_PDEATHSIG asks it to kill this process when its
parent dies, and the request survives exec. It is asked here, after fork and exec, because code between the two
(preexec_fn) may deadlock in a process with threads. Elsewhere than on Linux there is no such call, and a killed worker
leaves its child to finish.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and become the command.

    Args:
        arguments: the parent's process id, then the command.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(arguments[0]):  # it died before we asked
        sys.exit(1)
    os.execv(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
