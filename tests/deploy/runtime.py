#!/usr/bin/python3
"""runc for a machine without cgroups of its own and without CAP_SYS_RESOURCE, such as a build sandbox.

podman calls this as its OCI runtime. Limits on memory, processes and open files, which such a machine cannot set, are
taken out of the container's configuration; everything else (user, capabilities, read-only root, mounts, networks) is
left as asked for. So what runs here is confined as in production, only not limited.
"""

import json
import os
import sys
from pathlib import Path

CANNOT_BE_SET = ("rlimits", "oomScoreAdj")


def main() -> None:
    """Rewrite the configuration named on the command line, then become runc."""
    arguments = without_cgroup_manager(sys.argv[1:])
    if "create" in arguments or "run" in arguments:
        edit_container(Path(value_of(arguments, "--bundle", "-b") or ".") / "config.json")
    if "exec" in arguments and (process := value_of(arguments, "--process", "-p")):
        edit_process(Path(process))
    os.execvp("runc", ["runc", *arguments])


def without_cgroup_manager(arguments: list[str]) -> list[str]:
    """Drop the flag that crun knows and runc does not."""
    kept = []
    words = iter(arguments)
    for word in words:
        if word == "--cgroup-manager":
            next(words)
        elif not word.startswith("--cgroup-manager="):
            kept.append(word)
    return kept


def value_of(arguments: list[str], *flags: str) -> str | None:
    """Return what follows a flag, or what stands behind its equals sign."""
    for number, word in enumerate(arguments):
        if word in flags:
            return arguments[number + 1]
        if word.startswith(f"{flags[0]}="):
            return word.partition("=")[2]
    return None


def edit_container(path: Path) -> None:
    """Take the limits out of a container's configuration."""
    document = json.loads(path.read_text())
    for name in CANNOT_BE_SET:
        document["process"].pop(name, None)
    for name in ("resources", "cgroupsPath"):
        document["linux"].pop(name, None)
    path.write_text(json.dumps(document))


def edit_process(path: Path) -> None:
    """Take the limits out of the configuration of a process that joins a container."""
    document = json.loads(path.read_text())
    for name in CANNOT_BE_SET:
        document.pop(name, None)
    path.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
