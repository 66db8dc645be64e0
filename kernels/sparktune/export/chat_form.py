"""A chat template as the texts between a conversation's messages, found by rendering it, and proven by rendering it.

A Hugging Face template is a program; Ollama's is another language with other inputs. What most programs do is put fixed texts
between the messages:

    HEAD u REPLY a TURN u OPENING                 BEFORE s AFTER u REPLY a TURN u OPENING

so HEAD holds a default system prompt if there is one, and AFTER whatever stands between a system prompt and the first question.
Some (Mistral's) put the system prompt beside the last question instead. The texts are cut out of renderings of marked messages;
then both sides render other conversations, and any difference is an error: a template that does more than this (tools aside,
which no conversation here has) is refused, not approximated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparktune.export.files import ExportError

Messages = list[dict[str, str]]
Render = Callable[[Messages, str], str]  # messages, ending in a question, and a date for strftime_now
FIX = "Give a Go template of your own (template=...), or serve the merged folder with vLLM, which runs the template itself."
DATES = ("2020-02-03", "2021-11-28")
S, U, A = "SYSTEMTEXT", "QUESTION", "ANSWER"


class RefusedError(ExportError):
    """The template fails on a conversation."""


@dataclass(frozen=True)
class ChatForm:
    """The fixed texts. `before` and `after` are None where the template refuses system messages."""

    head: str
    before: str | None
    after: str | None
    reply: str
    turn: str
    opening: str
    system_last: tuple[str, str] | None = None  # the texts around a system prompt that stands before the last question
    notes: list[str] = field(default_factory=list)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """What Ollama makes of a conversation that ends in a question; system messages are joined."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        rest = [m for m in messages if m["role"] != "system"]
        at_the_end = system and self.system_last is not None and len(rest) > 1
        text = f"{self.before}{system}{self.after}" if system and not at_the_end else self.head
        for i, message in enumerate(rest):
            last = i == len(rest) - 1
            if message["role"] == "user":
                text += message["content"] + (self.opening if last else self.reply)
            elif at_the_end and i == len(rest) - 2 and self.system_last is not None:
                text += message["content"] + self.system_last[0] + system + self.system_last[1]
            else:
                text += message["content"] + self.turn
        return text


def derive(render: Render, days: tuple[str, str] = DATES) -> ChatForm:
    """The form of a template on the first of `days`; the second tells whether it writes the date.

    Errors: ExportError naming the first conversation that comes out otherwise.
    """
    day, other = days

    def cut(messages: Messages, *marks: str) -> list[str]:
        """The rendering, cut at every message's text."""
        text = render(messages, day)
        parts = []
        for mark in marks:
            if text.count(mark) != 1:
                raise ExportError("The chat template leaves out or repeats a message.", FIX)
            part, text = text.split(mark)
            parts.append(part)
        return [*parts, text]

    question = [{"role": "user", "content": U}]
    head, opening = cut(question, U)
    dialogue = [{"role": "user", "content": "FIRST"}, {"role": "assistant", "content": A}, *question]
    _, reply, turn, _ = cut(dialogue, "FIRST", A, U)
    before = after = None
    last = None
    system = [{"role": "system", "content": S}]
    with contextlib.suppress(RefusedError):
        before, after, _ = cut([*system, *question], S, U)
    if before is not None and _swapped(render([*system, *dialogue], day)):
        _, _, *around, _ = cut([*system, *dialogue], "FIRST", A, S, U)
        last = (around[0], around[1])
    form = ChatForm(head, before, after, reply, turn, opening, last)
    _check(form, render, day)
    notes = []
    if render(question, other) != render(question, day):
        notes.append("The chat template writes the current date; in Ollama it stays that of this export.")
    spaced = [{"role": "user", "content": f" {U}\n"}]
    if render(spaced, day) != form.render(spaced):
        notes.append("The chat template strips white space around messages; Ollama does not.")
    if before is None:
        notes.append("The chat template refuses system messages.")
    return ChatForm(head, before, after, reply, turn, opening, last, notes)


def _swapped(text: str) -> bool:
    """Whether the system prompt comes after the answer."""
    return S in text and text.index(S) > text.index(A)


def _check(form: ChatForm, render: Render, day: str) -> None:
    texts = ["Is 1 + 1 = 2?", 'Yes: 你好 🙂, "it\'s" <b>.', "And\n\n  then?", "No. {{ x }} {% y %}", "Why not", "So."]
    for turns in (1, 2, 3):
        for system in (None, "Be brief.", "Two\n\nparts: {a} \\ \"q\" '''"):
            if system is not None and form.before is None:
                continue
            talk: Messages = [] if system is None else [{"role": "system", "content": system}]
            for i in range(2 * turns - 1):
                talk.append({"role": "assistant" if i % 2 else "user", "content": texts[i]})
            theirs, ours = render(talk, day), form.render(talk)
            if theirs != ours:
                raise ExportError(
                    f"The chat template can't be written for Ollama: a conversation of {turns} questions"
                    f"{' with a system prompt' if system else ''} becomes {theirs[:200]!r}, not {ours[:200]!r}.",
                    FIX,
                )


def renderer(tokenizer: Any) -> Render:
    """`tokenizer`'s chat template. Errors: ExportError where it has none, or several."""
    from datetime import datetime

    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        why = "has no chat template" if not template else "has several chat templates"
        raise ExportError(f"The tokenizer {why}.", "Set tokenizer.chat_template to the one that training used.")

    def render(messages: Messages, date: str) -> str:
        now = datetime.fromisoformat(date)
        options = {"tokenize": False, "add_generation_prompt": True, "strftime_now": now.strftime}
        try:
            return str(tokenizer.apply_chat_template(messages, **options))
        except Exception as error:  # whatever the program in the template raises
            what = f"{type(error).__name__}: {error}"[:200]
            raise RefusedError(
                f"The chat template fails on a conversation of {len(messages)} messages ({what}).", FIX
            ) from error

    return render
