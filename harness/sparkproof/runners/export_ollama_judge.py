"""Judging Ollama: pure functions from what it answered, or from what Go made of its template.

Ollama gives texts and counts, no distributions. The fine-tune made one answer certain, so that answer must come back letter by
letter, both past every template (the weights and the tokenizer are right) and through Ollama's own (the template is right); and
every conversation must be fed as so many tokens as the chat template makes, which tells a doubled or lost beginning.
"""

from __future__ import annotations

from typing import Any

from sparkproof.results import Assertion
from sparkproof.runners import export_judge
from sparkproof.runners.export_talks import first_difference


def parity(found: dict[str, Any]) -> Assertion:
    """Go makes of the exported template what the chat template makes."""
    differ = found["differ"]
    return Assertion(
        name="conversations that Go renders otherwise from Ollama's template",
        passed=found["conversations"] > 0 and not differ,
        value=len(differ),
        bound=f"0 of {found['conversations']}",
        detail=differ[0] if differ else "",
    )


def answers(said: dict[str, Any], questions: dict[str, Any], canary_answer: str) -> list[Assertion]:
    """All that the server's answers show; `said` is what the phase `converse` returned."""
    want = questions["answers"]
    chat, raw = said["chat"], said["raw"]
    return [
        template(*said["template"]),
        export_judge.canary(chat["text"], canary_answer),
        text("answer of Ollama to the bare prompt", want["canary"], raw["text"]),
        text("answer of Ollama through its template", want["canary"], chat["text"]),
        export_judge.stops(want["stopped"], chat["stopped"] and raw["stopped"]),
        markers(said["stops"], chat["text"] + raw["text"]),
        fed(said["fed"]),
        firsts(said["firsts"]),
    ]


def template(exported: str, shown: str) -> Assertion:
    """Ollama's model has the template that was exported."""
    same = bool(exported) and exported.strip() == shown.strip()
    return Assertion(
        name="template that Ollama keeps", passed=same, value="equal" if same else "different", bound="the Modelfile's",
        detail="" if same else f"It differs {first_difference(exported, shown)}.",
    )  # fmt: skip


def text(name: str, want: str, got: str) -> Assertion:
    """A greedy answer is the reference's, letter by letter."""
    same = bool(want.strip()) and want.strip() == got.strip()
    return Assertion(
        name=name, passed=same, value=got[:200], bound=repr(want[:200]),
        detail="" if same else f"It differs {first_difference(want.strip(), got.strip())}.",
    )  # fmt: skip


def markers(stops: list[str], said: str) -> Assertion:
    """No stop text is in an answer."""
    found = [stop for stop in stops if stop in said]
    return Assertion(
        name="stop texts in Ollama's answers", passed=bool(stops) and not found, value=len(found), bound=f"0 of {len(stops)}",
        detail=f"{found[0]!r} was said." if found else "" if stops else "The Modelfile names no stop.",
    )  # fmt: skip


def fed(counts: list[list[int]]) -> Assertion:
    """Ollama feeds as many tokens for each conversation as the chat template makes."""
    wrong = [(i, want, got) for i, (want, got) in enumerate(counts, 1) if want != got]
    detail = "{0[2]} tokens where {0[1]} are right, in number {0[0]}.".format(wrong[0]) if wrong else ""
    return Assertion(
        name="prompts that Ollama feeds as another number of tokens", passed=bool(counts) and not wrong, value=len(wrong),
        bound=f"0 of {len(counts)}", detail=detail,
    )  # fmt: skip


def firsts(tokens: list[dict[str, str]]) -> Assertion:
    """The first token is the reference's wherever that one leads by the margin; none to tell is no fault: the canary is one."""
    wrong = [t for t in tokens if t["want"].strip() != t["got"].strip()]
    detail = f"{wrong[0]['got']!r}, not {wrong[0]['want']!r}, after {wrong[0]['prompt'][:60]!r}." if wrong else ""
    return Assertion(
        name="first tokens of Ollama's answers that differ", passed=not wrong, value=len(wrong), bound=f"0 of {len(tokens)}",
        detail=detail,
    )  # fmt: skip
