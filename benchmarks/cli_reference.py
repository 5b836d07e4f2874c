"""Prints docs/cli.md: the help of every command, as the commands print it.

python -m benchmarks.cli_reference > docs/cli.md
"""

import re
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from onebit_core.cli.main import app

group: Any = get_command(app)
COMMANDS = ("", *group.commands)


def render() -> str:
    """Return the page."""
    runner = CliRunner(env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})
    parts = [
        "# Command line\n\n<!-- Printed by `python -m benchmarks.cli_reference`; edit onebit_core/cli instead. -->\n"
    ]
    for name in COMMANDS:
        output = runner.invoke(app, [*([name] if name else []), "--help"], prog_name="onebit").output
        plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
        text = "\n".join(line.rstrip() for line in plain.strip().splitlines())
        parts.append(f"## onebit {name}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(render(), end="")
