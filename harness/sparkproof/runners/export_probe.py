"""What every consumer of an export is asked, and what the reference answered: one set of questions, made once.

The reference is the model that the record names: base16+adapter (the 16-bit base with PEFT's adapter beside it, not
merged) or base4+adapter (the NF4 base that training ran over). It sets the token ids; each consumer is then fed those
ids, so that distributions are compared position by position on the same prefix (teacher forcing), whatever the
consumer's own tokenizer does. The tokenizers are compared on their own, id by id, on strings that split differently
when the pre-tokenizer is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from numpy import ndarray

# Digits, contractions, CJK, emoji with joiners, white space, specials, bytes that no word covers.
HARD_STRINGS = [
    "007 + 4096 = 4103; 3.14159 and 1,000,000",
    "x86_64v3, 2026-11-24T06:25:00Z",
    "I'll say it's they've WE'RE don't",
    "  two leading spaces, a\ttab,\n\n\ntwo empty lines and trailing   ",
    "你好,世界。12个测试 日本語のテスト 한국어",
    "🙂👩‍👩‍👧‍👦🇩🇪 é e\u0301 ﬁ",
    "مرحبا ١٢٣ Ⅷ ½ ²",
    "def f(x):\n    return x**2  # comment\r\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|>",
    "\u00a0non\u2009breaking\u200bzero",
    "",
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What's 12 * 12?"}],
    [
        {"role": "user", "content": "  你好 🙂 "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Again,\nplease."},
    ],
]
POSITIONS = 9  # of each text: a full distribution from a server costs 0.3 to 0.5 s


@dataclass(frozen=True)
class Said:
    """A greedy answer."""

    text: str
    tokens_per_s: float  # 0 when too short to say
    stopped: bool  # at a stop token, before the tokens ran out


class Unloadable(Exception):
    """The consumer says that it does not know this kind of model: a skip with its words, never a pass."""


class Model(Protocol):
    """A loaded model, by whatever library."""

    template: str
    load_s: float
    made_up: list[str]  # weights that the file lacked and the library filled in, where it tells

    @property
    def vocabulary(self) -> int:
        """Tokens that it gives probabilities for."""
        ...

    def log_probabilities(self, ids: list[int], positions: list[int], vocabulary: int) -> ndarray:
        """Natural-log next-token probabilities after ids[: p + 1] for each p: (positions, vocabulary), fp32; NaN where
        the model has no such token."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, specials parsed, with what the tokenizer adds."""
        ...

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text, ready for an answer."""
        ...

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids that the consumer itself feeds for a conversation."""
        ...

    def generate(self, prompt: str, max_tokens: int) -> Said:
        """Greedy answer to a user's message."""
        ...

    def backend(self) -> dict[str, str]:
        """What ran it, as the consumer itself tells: `device` (cpu or cuda), and its own proof."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def recorded(work: Callable[[], object], cuda: bool) -> tuple[list[str], int]:
    """(names of what `work` ran in torch, how many kernels it launched on a GPU), by torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        work()
    events = seen.key_averages()
    launched = sum(e.count for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return [str(e.key) for e in events], launched


def sequences(tokenizer: Any, prompts: list[str], canary: tuple[str, str]) -> list[dict[str, Any]]:
    """Token ids and positions to compare: the end of each prompt and its answer's first token, the canary's answer.

    Position p asks for the token after ids[: p + 1]. The template's own ending is left out: every model is sure of it.
    """
    found = []
    for prompt in prompts:
        ids = chat_ids(tokenizer, prompt)
        end = len(ids) - _common_ending(ids, chat_ids(tokenizer, f"{prompt} other"))
        positions = [*range(max(0, end - POSITIONS + 1), end), len(ids) - 1]
        found.append({"text": prompt, "ids": ids, "positions": positions})
    prompt, answer = canary
    before = chat_ids(tokenizer, prompt)
    ids = [*before, *tokenizer(answer, add_special_tokens=False)["input_ids"]]
    positions = list(range(len(before) - 1, len(ids)))[:POSITIONS]
    found.append({"text": f"{prompt} -> {answer}", "ids": ids, "positions": positions})
    return found


def _common_ending(a: list[int], b: list[int]) -> int:
    """How many last ids two lists share."""
    return next(
        (n for n, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b))
    )


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a user's message through the chat template, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def ask(model: Model, questions: dict[str, Any], vocabulary: int, tell: Any) -> tuple[ndarray, dict[str, Any]]:
    """Put all questions to `model`: the distributions, and everything else as JSON can carry it."""
    import numpy as np

    rows = []
    for number, sequence in enumerate(questions["sequences"], 1):
        tell(f"distributions of text {number} of {len(questions['sequences'])}")
        rows.append(model.log_probabilities(sequence["ids"], sequence["positions"], vocabulary))
    tell("asking for the canary")
    said = model.generate(questions["canary_prompt"], questions["canary_tokens"])
    return np.concatenate(rows), {
        "ids": [model.tokenize(text) for text in HARD_STRINGS],
        "renders": [model.render(messages) for messages in CONVERSATIONS],
        "chats": [model.chat_tokens(messages) for messages in CONVERSATIONS],
        "template": model.template,
        "made_up": model.made_up,
        "vocabulary": model.vocabulary,
        "canary": said.text,
        "stopped": said.stopped,
        "tokens_per_s": said.tokens_per_s,
        "load_s": model.load_s,
    }
