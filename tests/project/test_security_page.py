"""SECURITY.md speaks of tests and flags that exist."""

import re
from pathlib import Path

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()


def test_every_attack_has_a_test_that_exists():
    """The table has all 36 rows, and each names at least one test by a name that some file defines."""
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", PAGE, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 37))
    for number, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, number
        assert not set(named) - defined, number


def test_flags_on_the_page_exist():
    """A renamed setting is renamed here."""
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)", PAGE)}
    assert len(flags) >= 10
    assert flags <= set(Settings.model_fields)
