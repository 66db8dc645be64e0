"""Conversations to train on: the PyPI package `chatterbot-corpus` (BSD) or a JSON Lines file of messages.

A conversation is a list of messages `{"role": "system" | "user" | "assistant", "content": text}` that ends with the
assistant. The package is read as files and never imported. In its lists a third entry is sometimes a further turn
and sometimes another answer to the first question, so only the first exchange of each is used.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import yaml

from sparkproof.errors import UserError

Message = dict[str, str]
Conversation = list[Message]
ROLES = ("system", "user", "assistant")
CHATTERBOT_FIX = "pip install chatterbot-corpus==1.3.3"


def load_conversations(dataset: str) -> list[Conversation]:
    """All conversations of 'chatterbot:<language>' or of a JSON Lines file, in the source's order, without repeats."""
    found = (
        chatterbot(dataset.removeprefix("chatterbot:")) if dataset.startswith("chatterbot:") else json_lines(dataset)
    )
    unique = {json.dumps(conversation, sort_keys=True): conversation for conversation in found}
    if not unique:
        raise UserError(
            f"The dataset '{dataset}' holds no conversation.", "Give at least one question with its answer."
        )
    return list(unique.values())


def chatterbot(language: str) -> list[Conversation]:
    """First exchanges of every YAML file of one language of chatterbot-corpus, files in the order of their names."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("The package chatterbot-corpus is not installed.", CHATTERBOT_FIX, skip_class="not-installed")
    data = Path(next(iter(spec.submodule_search_locations))) / "data"
    folder = data / language
    if not language or not folder.is_dir():
        there = ", ".join(sorted(p.name for p in data.iterdir() if p.is_dir())) if data.is_dir() else "none"
        raise UserError(f"chatterbot-corpus has no language '{language}'.", f"It has: {there}.")
    found: list[Conversation] = []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in sorted(folder.glob("*.yml")):
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # a safe loader, in C where it exists
        for entry in document.get("conversations", []):
            texts = [str(text).strip() for text in entry[:2]] if isinstance(entry, list) else []
            if len(texts) == 2 and all(texts):
                found.append(exchange(*texts))
    return found


def exchange(question: str, answer: str) -> Conversation:
    """One question with its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def json_lines(dataset: str) -> list[Conversation]:
    """Conversations of a JSON Lines file; each line is `{"messages": [...]}` or the list itself."""
    path = Path(dataset).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"The dataset file '{dataset}' does not exist.",
            "Give a JSON Lines file, or chatterbot:english.",
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"The dataset file '{dataset}' is not UTF-8 ({error.reason}).", "Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"The dataset file '{dataset}' can't be read: {error.strerror}.", "Check the path.") from error
    return [_conversation(line, f"{dataset}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _conversation(line: str, where: str) -> Conversation:
    shape = 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.'
    try:
        document: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}).", shape) from error
    messages = document.get("messages") if isinstance(document, dict) else document
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: no list of messages.", shape)
    for number, message in enumerate(messages, 1):
        at = f"{where}, message {number}"
        if not isinstance(message, dict) or set(message) < {"role", "content"}:
            raise UserError(f"{at}: needs 'role' and 'content'.", shape)
        if message["role"] not in ROLES:
            raise UserError(f"{at}: unknown role {message['role']!r}.", f"One of {', '.join(ROLES)}.")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise UserError(f"{at}: 'content' is not a text.", shape)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is not the assistant's, so there is nothing to learn.", shape)
    return [{"role": m["role"], "content": m["content"]} for m in messages]
