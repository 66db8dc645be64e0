"""How numbers, times, verdicts and kinds read; the same in every view."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from sparkproof.results import Assertion, CaseResult, Measurement, Verdict

# What a reader looks for first comes first.
WORST_FIRST = (Verdict.FAILED, Verdict.BROKEN, Verdict.RETEST, Verdict.SKIPPED, Verdict.PASSED)
SYMBOLS = {
    Verdict.PASSED: "✓",
    Verdict.FAILED: "✗",
    Verdict.BROKEN: "!",
    Verdict.RETEST: "↻",
    Verdict.SKIPPED: "–",
}
MEANING = {
    Verdict.PASSED: "every assertion held",
    Verdict.FAILED: "an assertion about the machine, image or engine did not hold",
    Verdict.BROKEN: "the harness itself failed, which says nothing about the machine",
    Verdict.RETEST: "speed can't be judged: conditions were not steady",
    Verdict.SKIPPED: "something it needs is missing; never counts as passed",
}
KIND_TITLES = {
    "environment": ("Environment", "driver, toolkits, limits and settings that fine-tuning depends on"),
    "kernel": ("Kernels", "fused operations agree with their references, and compile within the device's limits"),
    "train": ("Training", "a real model learns what it is taught, again and again the same way"),
    "comparison": ("Engines", "engines side by side on one model: interleaved, each against hf"),
    "fit": ("What fits", "the largest batch and context that this machine's memory holds"),
    "export": ("Export", "what was trained comes back through the programs that use it"),
    "rollback": ("Rollback", "the machine can be put back as it was"),
    "distributed": ("Distributed", "several machines train as one"),
    "scenario": ("Scenario files", "files that could not be read as scenarios"),
}
ACRONYMS = frozenset({"rss", "gpu", "cpu", "kl", "lora", "sm", "l2", "nf4", "gguf", "hf", "id", "json"})
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# Control characters, which XML forbids or terminals obey; lone surrogates; marks that reorder text for the eye.
UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """`text` fit for XML, HTML and a terminal; of a line redrawn with carriage returns its last state is kept."""
    text = ANSI.sub("", text).replace("\r\n", "\n")
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return UNSAFE.sub("", text)


def one_line(text: str) -> str:
    """Cleaned, on one line."""
    return " ".join(clean(text).split())


def number(value: float | int | str | bool | None) -> str:
    """A number with four significant digits, thousands apart, small and huge ones in powers of ten."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.3e}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    decimals = max(0, 3 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def with_unit(value: float | int | str | bool | None, unit: str) -> str:
    """A number and its unit."""
    unit = one_line(unit)
    return f"{number(value)} {unit}" if unit and value is not None else number(value)


def duration(seconds: float) -> str:
    """'0.4 s', '12 s', '3 min 05 s', '2 h 07 min'."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def direction(m: Measurement) -> str:
    """'higher is better', 'lower is better', or nothing."""
    if m.higher_is_better is None:
        return ""
    return "higher is better" if m.higher_is_better else "lower is better"


def measured(m: Measurement) -> str:
    """A measurement in one line: value, unit, interval, reference."""
    text = with_unit(m.value, m.unit)
    if m.low is not None and m.high is not None:
        text += f" (95%: {number(m.low)} to {number(m.high)})"
    if m.reference is not None:
        text += f", {one_line(m.reference_name) or 'reference'} {with_unit(m.reference, m.unit)}"
    return text


def held(a: Assertion) -> str:
    """What an assertion saw and what it allowed, in one line."""
    seen = with_unit(a.value, a.unit) if a.value is not None else ""
    allowed = f"allowed {one_line(a.bound)}" if a.bound else ""
    return ", ".join(s for s in (seen, allowed) if s)


def main_metric(result: CaseResult) -> Measurement | None:
    """The measurement to show where there is room for one: the first that has a better side."""
    better = (m for m in result.measurements if m.higher_is_better is not None)
    return next(better, next(iter(result.measurements), None))


def label(name: str, unit: str = "") -> str:
    """A name for people: 'peak_rss_gib' in GiB becomes 'peak RSS'; one that is no identifier stays as it is."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        return one_line(name)
    words = name.split("_")
    if unit and len(words) > 1 and words[-1].lower() == unit.lower():
        words = words[:-1]
    elif unit and name.replace("_per_", "/") == unit:
        return "speed"  # 'tokens_per_s' in tokens/s: the unit says it all
    return " ".join(w.upper() if w in ACRONYMS else w for w in words if w)


def by_urgency(results: Iterable[CaseResult]) -> list[CaseResult]:
    """Failures first; within a verdict the order of the run."""
    return sorted(results, key=lambda r: WORST_FIRST.index(r.verdict))


def why_skipped(result: CaseResult) -> str:
    """'no-gpu: There is no GPU.'"""
    return ": ".join(
        s for s in (result.reason_class.value if result.reason_class else "", one_line(result.reason)) if s
    )


def shorten(name: str, width: int) -> str:
    """A name cut in its middle: its beginning and the matrix at its end tell cases apart.

    >>> shorten("train/smollm2/135m_qlora_single_device[engine=hf]", 30)
    'train/sm...e_device[engine=hf]'
    """
    name = one_line(name)
    if len(name) <= width or width < 8:
        return name
    matrix = len(name) - name.index("[") if "[" in name else 0
    tail = max(width - 3 - (width - 3) // 3, matrix if matrix <= width - 6 else 0)
    return f"{name[: width - 3 - tail]}...{name[-tail:]}"
