"""Committed files that code makes are what the code makes today, and the scenario schema judges as the loader does."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from sparkproof.catalog import scenario_files
from sparkproof.generated import documents

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", documents())
def test_committed_documents_are_fresh(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == documents()[path], "run `make schemas`"


def test_the_scenario_schema_serves_editors() -> None:
    schema = json.loads((ROOT / "scenarios/scenario.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    files = scenario_files(ROOT / "scenarios")
    assert len(files) > 20
    for path in files:
        body = yaml.safe_load(path.read_text())
        assert not list(validator.iter_errors(body)), path
        assert list(validator.iter_errors({**body, "no_such_key": 1})), path


def test_every_field_is_described() -> None:
    schema = json.loads((ROOT / "scenarios/scenario.schema.json").read_text())
    for name, definition in schema["$defs"].items():
        for key, field in definition.get("properties", {}).items():
            if key != "kind" and "$ref" not in field:
                assert field.get("description"), f"{name}.{key}"
