"""Conversations as the fine-tuned model's own chat template writes them: what Ollama's template is held to, letter by letter.

No message begins or ends in white space and no two of one role follow each other: there Ollama is known to differ (it strips
nothing and joins), and the exported Modelfile says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]

SYSTEM = {"role": "system", "content": 'Say "yes" & <no>, {{ .System }} too.'}
TURNS = [
    {"role": "user", "content": "Grüße, 12345 {{ if }} ?"},
    {"role": "assistant", "content": "日本語\n\n  two lines"},
    {"role": "user", "content": "back\\slash and 🙂"},
    {"role": "assistant", "content": "`quoted`"},
    {"role": "user", "content": "last"},
]
TALKS: list[Messages] = [talk for n in (1, 3, 5) for talk in (TURNS[:n], [SYSTEM, *TURNS[:n]])]


@dataclass(frozen=True)
class Talk:
    """A conversation that ends in a question."""

    messages: Messages
    text: str  # without what the runtime itself puts in front
    tokens: int  # with it


class Writer:
    """A tokenizer with its chat template."""

    def __init__(self, folder: Path) -> None:
        """Load it. Errors: ExportError where it adds what a GGUF can't say."""
        from sparktune.export.vocabulary import adds_ends
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        put_in_front = adds_ends(folder)["tokenizer.ggml.add_bos_token"]
        self.front: str = (self.tokenizer.bos_token or "") if put_in_front else ""

    def talk(self, messages: Messages) -> Talk:
        """One conversation. Errors: what the template raises for a role that it does not take."""
        whole = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        text = whole.removeprefix(self.front)
        return Talk(messages, text, len(ids) + (0 if text != whole or not self.front else 1))

    def talks(self) -> list[Talk]:
        """Those of TALKS that the template takes: some refuse system prompts. The first has none."""
        import jinja2

        found = [self.talk(TALKS[0])]
        for messages in TALKS[1:]:
            try:
                found.append(self.talk(messages))
            except jinja2.TemplateError:  # its own raise_exception
                continue
        return found


def first_difference(want: str, got: str) -> str:
    """Where two texts part, with what stands there on both sides."""
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    start = max(0, at - 20)
    return f"from character {at}: {got[start : at + 40]!r}, not {want[start : at + 40]!r}"
