"""What the chart refuses: values that its schema does not know, and combinations that could not work.

Tests that render are skipped where helm is missing (docs/operations.md, "Tools").
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.chart import CHART, KEDA, POSTGRES, ROOT, WITH_KEYS, WORKERS, render

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def objects(schema: dict[str, Any], path: str = "values") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the schema that lists its properties."""
    if "properties" in schema:
        yield path, schema
        for name, inner in schema["properties"].items():
            yield from objects(inner, f"{path}.{name}")


def test_default_values_fit_their_schema() -> None:
    """The values that a user starts from are allowed."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)


def test_schema_refuses_names_it_does_not_know() -> None:
    """A misspelt value is an error, not a setting that silently does nothing."""
    assert all(schema["additionalProperties"] is False for _, schema in objects(SCHEMA))


def test_schema_knows_exactly_the_values_that_exist() -> None:
    """A value added to values.yaml is in the schema, and the schema lists nothing else."""
    for path, schema in objects(SCHEMA):
        if path.startswith("values.imagePullSecrets"):
            continue
        at: Any = VALUES
        for part in path.split(".")[1:]:
            at = at[part]
        assert set(schema["properties"]) - {"global"} == set(at) or path.endswith(".resources"), path


@pytest.mark.parametrize(
    "wrong",
    [
        {"server": {"replicas": 2}},
        {"server": {"replicaCount": "2"}},
        {"server": {"engine": {"dtype": "int8"}}},
        {"server": {"logLevel": "verbose"}},
        {"service": {"port": 99999}},
        {"artifacts": {"load": ["../outside"]}},
        {"artifacts": {"accessModes": []}},
        {"image": {"digest": "latest"}},
        {"server": {"pdb": {"maxUnavailable": 0}}},
    ],
    ids=str,
)
def test_schema_refuses_values_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    """Wrong types, unknown choices and paths that leave the volume."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize(
    ("packed", "source"),
    [
        ("rules.yml", "docker/prometheus/rules.yml"),
        *((f"{name}.json", f"docker/grafana/dashboards/{name}.json") for name in ("serving", "accuracy", "jobs")),
    ],
)
def test_chart_carries_the_same_alerts_and_dashboards_as_compose(packed: str, source: str) -> None:
    """There is one set of alerts and one of dashboards; the chart links to them."""
    assert (CHART / "files" / packed).resolve() == ROOT / source


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"auth": {"existingSecret": ""}}, "auth.existingSecret is empty"),
        ({"server": {"replicaCount": 2}}, "jobs are recorded in an SQLite file"),
        ({"server": {"replicaCount": 2}, "jobs": {"enabled": False}}, "which one node can mount"),
        (POSTGRES | {"worker": {"enabled": True}}, "which one node can mount"),
        (WORKERS | {"artifacts": {"accessModes": ["ReadOnlyMany"]}}, "but jobs write there"),
        ({"jobs": {"database": {"kind": "postgres"}}}, "jobs.database.existingSecret is empty"),
        ({"jobs": {"database": {"existingSecret": "x"}}}, "nothing would read it"),
        ({"worker": {"enabled": True}}, "which the server's pod alone may open"),
        ({"worker": {"enabled": True}, "jobs": {"enabled": False}}, "there would be nothing to do"),
        ({"worker": {"gpu": {"migProfile": "1g.10gb"}}}, "the worker would get no GPU"),
        ({"server": {"gpu": {"migProfile": "1g.10gb"}}}, "the pod would get no GPU"),
        ({"server": {"autoscaling": {"kind": "hpa"}}}, "which has one writer"),
        (KEDA | {"server": {"autoscaling": {"kind": "keda"}}}, "prometheusAddress is empty"),
        (KEDA | {"server": {"autoscaling": {"kind": "hpa", "minReplicas": 9}}}, "over maxReplicas"),
        ({"httpRoute": {"enabled": True}}, "name the gateway"),
        ({"ingress": {"enabled": True, "host": "x", "path": "/admin"}}, "has a port of its own"),
        ({"artifacts": {"readOnly": True}}, "jobs write their artifacts there"),
        ({"jobs": {"enabled": False, "allowHub": True}}, "nothing would use it"),
        ({"server": {"gpu": {"enabled": True}, "engine": {"device": "cpu"}}}, "the GPU would idle"),
        ({"server": {"engine": {"device": "cuda:0"}}}, "the pod would get no GPU"),
        ({"server": {"terminationGracePeriodSeconds": 35}}, "streams would be cut off"),
        ({"ingress": {"enabled": True}}, "ingress.host is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_combinations_fail_with_a_sentence(tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    """What could only fail later, in a pod, fails at render and says what to change."""
    done = render(tmp_path, WITH_KEYS, values)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_a_misspelt_value_fails_at_render(tmp_path: Path) -> None:
    """Helm enforces the schema."""
    done = render(tmp_path, WITH_KEYS, {"server": {"replica": 1}})
    assert done.returncode != 0
    assert "replica" in done.stderr
