"""Write the JSON Schemas of run.yaml, study files and plan.json from the classes that read them.

python -m slimvlm_tools.schemas docs/schemas
"""

from __future__ import annotations

import json
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import docstring_parser
from pydantic import TypeAdapter

from slimvlm.core.options import CompressConfig
from slimvlm.planning.plan import PlanFile
from slimvlm.runs.study.config import StudyConfig


def schemas() -> dict[str, dict[str, Any]]:
    """Make each schema: draft 2020-12, unknown keys refused, help texts as descriptions."""
    run = _schema(CompressConfig, "A run of slimvlm compress: run.yaml")
    run["properties"]["model"] = {"type": "string", "description": "Folder, hub id, or demo."}
    (words, _) = run["$defs"]["TrainingConfig"]["properties"]["train"]["anyOf"]  # or null
    run["properties"]["recover"] = {
        "anyOf": [{"$ref": "#/$defs/TrainingConfig"}, words],
        "description": run["properties"]["recover"]["description"],
    }
    for name in ("made_from", "version"):  # in a run's own file
        run["properties"][name] = {"description": "Written by slimvlm; compared on resume."}
    run["required"] = ["model"]
    study = _schema(StudyConfig, "A study: a grid of compressions")
    plan = _schema(PlanFile, "A plan: what stays of a model")
    for schema in (run, study):  # where people write a list, one value needs none
        for part in (schema, *schema.get("$defs", {}).values()):
            for name, row in part.get("properties", {}).items():
                if row.get("type") == "array" and "items" in row:
                    about = {key: row.pop(key) for key in ("default", "description") if key in row}
                    part["properties"][name] = {"anyOf": [row["items"], row], **about}
    return {"run": run, "study": study, "plan": plan}


def _schema(kind: Any, title: str) -> dict[str, Any]:
    schema = TypeAdapter(kind).json_schema()
    homes = {kind.__name__: kind, **_dataclasses_of(sys.modules[kind.__module__])}
    for name, part in [(kind.__name__, schema), *schema.get("$defs", {}).items()]:
        if "properties" not in part:
            continue
        part["additionalProperties"] = False
        part.pop("description", None)
        for each in reversed(homes[name].__mro__[:-1]) if name in homes else ():
            for row in docstring_parser.parse_from_object(each).params:
                if row.arg_name in part["properties"]:
                    text = " ".join((row.description or "").split())
                    part["properties"][row.arg_name]["description"] = text
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return {**about, **{key: value for key, value in schema.items() if key != "title"}}


def _dataclasses_of(module: Any) -> dict[str, Any]:
    return {name: each for name, each in vars(module).items() if is_dataclass(each)}


def main(folder: str) -> None:
    """Write every schema into a folder."""
    for name, schema in schemas().items():
        text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / f"{name}.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
