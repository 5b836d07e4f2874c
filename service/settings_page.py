"""Writes docs/settings.md from the settings themselves."""

from typing import Any

from pydantic.fields import FieldInfo

from service.settings import ENVIRONMENT_PREFIX, Settings, flag_of


def settings_page() -> str:
    """Return docs/settings.md."""
    rows = [_row(name, field) for name, field in Settings.model_fields.items()]
    return "\n".join(
        [
            "# Settings of onebit-serve",
            "",
            "<!-- Printed by `python -m service.settings`; edit service/settings.py instead. -->",
            "",
            "Flags win over environment variables, variables over defaults. A list is a repeated flag, or commas in a",
            "variable. Bytes and seconds are plain numbers.",
            "",
            "| flag | variable | type | default | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _row(name: str, field: FieldInfo) -> str:
    flag = "`ARTIFACT ...`" if name == "artifacts" else f"`{flag_of(name)}`"
    default = "none" if field.default in (None, []) else f"`{field.default}`"
    return (
        f"| {flag} | `{ENVIRONMENT_PREFIX}{name.upper()}` | {_type_name(field.annotation)} | {default} "
        f"| {field.description} |"
    )


def _type_name(annotation: Any) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    if "Literal[" in text:
        return text[text.index("[") + 1 : text.rindex("]")].replace("'", "").replace(", ", " \\| ")
    names = {
        "Path | None": "path",
        "Path]": "list of paths",
        "str]": "list of paths",
        "int | None": "int",
        "str | None": "str",
    }
    return next((name for ending, name in names.items() if text.endswith(ending)), text)
