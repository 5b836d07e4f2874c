"""Settings: flags win, nonsense is refused in one sentence, the page is current."""

from pathlib import Path

import pytest

from service.settings import Settings, is_loopback, read_settings
from service.settings_page import settings_page

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_flag_wins_over_variable(monkeypatch):
    """A flag beats the environment, which beats the default."""
    monkeypatch.setenv("ONEBIT_PORT", "9000")
    monkeypatch.setenv("ONEBIT_MAX_CHOICES", "7")
    settings = read_settings(["a", "b", "--port", "9001"])
    assert (settings.port, settings.max_choices, settings.page_size) == (9001, 7, 16)
    assert settings.artifacts == ["a", "b"]


def test_lists_in_variables_are_split_at_commas(monkeypatch):
    """A list in the environment is separated by commas."""
    monkeypatch.setenv("ONEBIT_ARTIFACTS", "/x,/y")
    monkeypatch.setenv("ONEBIT_JOB_SOURCES", "/data,/models")
    settings = read_settings([])
    assert settings.artifacts == ["/x", "/y"]
    assert settings.job_sources == [Path("/data"), Path("/models")]


def test_unknown_flag_ends_with_code_2():
    """A misspelt flag is not ignored."""
    with pytest.raises(SystemExit) as ended:
        read_settings(["a", "--prot", "9"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "nothing to serve"),
        (["a", "--port", "x"], "--port"),
        (["a", "--port", "70000"], "--port"),
        (["a", "--dtype", "int4"], "--dtype"),
        (["a", "--device", "gpu"], "--device"),
        (["a", "--device", "cuda:"], "--device"),
        (["a", "--host", "0.0.0.0"], "keys_file is required"),
        (["a", "--max-model-len", "0"], "--max-model-len"),
        (["a", "--golden-check", "maybe"], "--golden-check"),
        (["a", "--score-share", "1.5"], "--score-share"),
        (["a", "--score-original", "nothing"], "NAME=FOLDER"),
        (["a", "--score-original", "m=/does/not/exist"], "/does/not/exist"),
    ],
)
def test_impossible_settings_are_one_sentence(arguments, part):
    """Each bad value is refused with one line that names it."""
    with pytest.raises(ValueError, match=part) as refused:
        read_settings(arguments)
    assert "\n" not in str(refused.value)


def test_other_addresses_are_allowed_with_keys():
    """With a key file the server may be reached from elsewhere."""
    assert Settings(artifacts=["a"], host="0.0.0.0", keys_file=Path("keys.json")).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("evil.example", False),
        ("", False),
    ],
)
def test_loopback_is_recognised(host, expected):
    """Only addresses of this machine count as loopback."""
    assert is_loopback(host) is expected


def test_jobs_need_a_folder(tmp_path):
    """Without artifact_root there is nowhere to put jobs."""
    assert Settings(artifacts=["a"]).database_url is None
    assert Settings(artifact_root=tmp_path, jobs_enabled=False).database_url is None
    url = Settings(artifact_root=tmp_path).database_url
    assert url == f"sqlite:///{tmp_path.resolve() / '.jobs' / 'jobs.db'}"


def test_the_page_of_settings_is_current():
    """docs/settings.md is what `python -m service.settings` prints."""
    assert PAGE.read_text(encoding="utf-8") == settings_page()


def test_every_setting_is_explained():
    """No setting without a sentence."""
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
