"""From files to cases: load, name what is wrong and where, expand matrices, select.

A wrong file never hides the others: it becomes a `Problem` with file, line, key, what was expected and the nearest valid name,
and the rest of the catalog loads.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sparkproof.errors import UserError
from sparkproof.scenario import KINDS, SCENARIO_ADAPTER, Case, Profile

KIND_ORDER = ["environment", "kernel", "train", "comparison", "fit", "export", "rollback"]
NOT_SCENARIOS = "profiles"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one file."""

    file: str
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        return f"{self.file}:{self.line}: {key}{self.message}"


@dataclass
class Catalog:
    """All that was found under one root."""

    root: Path
    cases: dict[str, Case] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def select(
        self,
        *,
        profile: Profile | None = None,
        patterns: Iterable[str] = (),
        kinds: Iterable[str] = (),
        tags: Iterable[str] = (),
    ) -> list[Case]:
        """Cases of a profile that match any pattern (exact name, part of a name, or * and ?), kind and tag; in run order.

        A name or pattern that matches nothing is an error with the nearest names, never an empty run. Cases named exactly
        are selected whatever the profile.
        """
        patterns, kinds, tags = list(patterns), list(kinds), list(tags)
        pool = [
            c
            for c in self.cases.values()
            if (not kinds or c.kind in kinds) and (not tags or set(tags) & set(c.scenario.tags))
        ]
        in_profile = [c for c in pool if profile is None or c.scenario.profile.level <= profile.level]
        if not patterns:
            return in_run_order(in_profile)
        chosen: dict[str, Case] = {}
        for p in patterns:
            exact = [c for c in pool if p in (c.name, c.name.split("[")[0])]
            hits = exact or [c for c in in_profile if matches(c.name, p)]
            if not hits:
                elsewhere = [c for c in pool if matches(c.name, p)]
                if elsewhere:
                    needed = min(elsewhere, key=lambda c: c.scenario.profile.level).scenario.profile
                    raise UserError(f"'{p}' matches no case of profile {profile}.", f"Add --profile {needed}.")
                raise UserError(
                    f"No case matches '{p}'{self._broken_hint(p)}.", nearest(p, [c.name for c in self.cases.values()])
                )
            chosen.update((c.name, c) for c in hits)
        return in_run_order(chosen.values())

    def _broken_hint(self, pattern: str) -> str:
        broken = [x for x in self.problems if pattern.split("[")[0] in x.file]
        return f" ({broken[0]})" if broken else ""


def in_run_order(cases: Iterable[Case]) -> list[Case]:
    """Environment first, export after train; by name inside a kind."""
    return sorted(cases, key=lambda c: (KIND_ORDER.index(c.kind), c.file, c.name))


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern selects a name: part of it, or a shell pattern in which [ and ] stand for themselves."""
    return pattern in name or fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def nearest(word: str, known: Iterable[str], label: str = "Did you mean") -> str:
    """'Did you mean X?' for a mistyped name, or the list when nothing is near and it is short."""
    known = list(known)
    hits = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    score = [difflib.SequenceMatcher(None, word, h).ratio() for h in hits]
    hits = [h for h, s in zip(hits, score, strict=True) if s > score[0] - 0.15]  # a near hit silences far ones
    if hits:
        return f"{label} {' or '.join(repr(h) for h in hits)}?"
    return f"Known: {', '.join(known)}." if 0 < len(known) <= 12 else ""


def scenarios_root(explicit: str | Path | None = None) -> Path:
    """`--scenarios`, else ./scenarios, else this checkout's, else the copy inside the installed package."""
    if explicit:
        path = Path(explicit)
        if not path.is_dir():
            raise UserError(f"No folder {path} with scenarios.", "Give --scenarios a folder that has YAML files.")
        return path
    package = Path(__file__).resolve().parent
    for path in (Path("scenarios"), package.parent.parent / "scenarios", package / "_scenarios"):
        if path.is_dir() and any(path.rglob("*.yaml")):
            return path
    raise UserError("No scenarios were found.", "Run from a checkout, or give --scenarios FOLDER.")


def scenario_files(root: Path) -> list[Path]:
    """All YAML files that hold scenarios, in order."""
    found = [*root.rglob("*.yaml"), *root.rglob("*.yml")]
    return sorted(f for f in found if NOT_SCENARIOS not in f.relative_to(root).parts)


def load(root: Path, overrides: dict[str, dict[str, Any]] | None = None) -> Catalog:
    """Read every scenario under `root`; `overrides` maps a kind to fields that the command line sets."""
    catalog = Catalog(root)
    for path in scenario_files(root):
        cases, problems = load_file(path, root, overrides)
        catalog.problems += problems
        for case in cases:
            if case.name in catalog.cases:
                other = catalog.cases[case.name].file
                catalog.problems.append(Problem(case.file, 1, "", f"the name {case.name} is taken by {other}"))
            else:
                catalog.cases[case.name] = case
    return catalog


def load_file(
    path: Path, root: Path, overrides: dict[str, dict[str, Any]] | None = None
) -> tuple[list[Case], list[Problem]]:
    """The cases of one file, or what is wrong with it."""
    shown = os.path.relpath(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except UnicodeDecodeError:
        return [], [Problem(shown, 1, "", "not UTF-8 text")]
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        return [], [Problem(shown, mark.line + 1 if mark else 1, "", f"not valid YAML: {e.problem or e.context}")]
    except yaml.YAMLError as e:
        return [], [Problem(shown, 1, "", f"not valid YAML: {e}")]
    except OSError as e:
        return [], [Problem(shown, 1, "", f"cannot be read: {e.strerror}")]
    if not isinstance(node, yaml.MappingNode) or not isinstance(data, dict):
        return [], [Problem(shown, 1, "", f"expected keys and values, beginning with `kind:` ({', '.join(KINDS)})")]
    problems = _duplicate_keys(node, shown)
    name = path.relative_to(root).with_suffix("").as_posix()
    data = {**data, **(overrides or {}).get(str(data.get("kind")), {})}
    cases: list[Case] = []
    try:
        expanded = list(expand(data))
    except ValueError as e:
        return [], [*problems, Problem(shown, _line(node, ("matrix",)), "matrix", str(e))]
    for suffix, fields in expanded:
        try:
            scenario = SCENARIO_ADAPTER.validate_python(fields)
        except ValidationError as e:
            found = [_problem(x, shown, node, str(data.get("kind"))) for x in e.errors()]
            problems += [p for p in found if p not in problems]
        else:
            cases.append(Case(name=name + suffix, file=shown, scenario=scenario))
    return ([] if problems else cases), problems


def expand(data: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (suffix of the name, fields) for every combination of the matrix, in the order written."""
    matrix = data.get("matrix") or {}
    if not isinstance(matrix, dict) or not all(isinstance(v, list) and v for v in matrix.values()):
        raise ValueError("expected a list with at least one value for each field, such as `dtype: [fp32, bf16]`")
    model = KINDS.get(str(data.get("kind")))
    for key in matrix:
        if model and (key not in model.model_fields or key in ("kind", "matrix")):
            known = [k for k in model.model_fields if k not in ("kind", "matrix")]
            raise ValueError(f"'{key}' is not a field of kind {data['kind']}. {nearest(key, known)}")
    if matrix.get("op") == ["all"] and model is KINDS["kernel"]:
        from sparktune.ops import op_names

        matrix = {**matrix, "op": op_names()}
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(matrix, values, strict=True))
        suffix = f"[{','.join(f'{k}={_short(v)}' for k, v in chosen.items())}]" if chosen else ""
        yield suffix, {**data, **chosen}


def _short(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float | bool) else json.dumps(value, separators=(",", ":"))


def digest(case: Case) -> str:
    """Digest of what a case would run; a resumed run repeats cases whose digest changed."""
    body = case.scenario.model_dump(mode="json", exclude={"matrix", "summary", "tags"})
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _line(node: yaml.Node, loc: tuple[Any, ...]) -> int:
    """Line of the deepest part of `loc` that the file has."""
    line = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _duplicate_keys(node: yaml.Node, shown: str) -> list[Problem]:
    problems = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                problems.append(Problem(shown, key.start_mark.line + 1, key.value, "written twice"))
            seen.add(key.value)
            problems += _duplicate_keys(value, shown)
    return problems


def _problem(error: ErrorDetails, shown: str, node: yaml.Node, kind: str) -> Problem:
    """A pydantic error as a sentence with its place in the file."""
    loc = tuple(p for p in error["loc"] if p not in KINDS)
    key = ".".join(str(p) for p in loc)
    got = error.get("input")
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            message = f"unknown key. {nearest(str(loc[-1]), _known_keys(kind, loc[:-1]))}".strip()
        case "missing":
            message = "required, and not there"
        case "literal_error" | "enum":
            expected = str(context.get("expected", ""))
            known = [w.strip(" '") for w in expected.replace(" or ", ",").split(",")]
            message = f"expected {expected}, got {got!r}. {nearest(str(got), known)}".strip()
        case "union_tag_not_found":
            key, message = "kind", f"required, and not there; one of {', '.join(KINDS)}"
        case "union_tag_invalid":
            tag = str(context.get("tag"))
            key, message = "kind", f"expected one of {', '.join(KINDS)}, got {tag!r}. {nearest(tag, KINDS)}".strip()
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
        case _:
            message = f"{error['msg'][0].lower()}{error['msg'][1:]}, got {got!r}"
    return Problem(shown, _line(node, loc or (key,)), key, message)


def _known_keys(kind: str, loc: tuple[Any, ...]) -> list[str]:
    model: Any = KINDS.get(kind)
    for part in loc:
        annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
        model = annotation if hasattr(annotation, "model_fields") else None
    return list(model.model_fields) if model else []
