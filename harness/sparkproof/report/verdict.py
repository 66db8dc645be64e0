"""What a run says as a whole: VALIDATED or not, the one sentence, and whether this machine can fine-tune. Pure.

VALIDATED is only ever said of the target device, after a whole profile in which nothing failed, broke, is missing, must
be measured again, or was skipped for want of something that the device could have. Everything else says what it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from sparkproof.facts.model import Facts
from sparkproof.results import CaseResult, ReasonClass, Verdict

# A case that asks for another architecture, platform or compute capability is not meant for the target at all;
# any other skip is something that the target could have had.
NOT_FOR_TARGET = frozenset({ReasonClass.ARCH, ReasonClass.PLATFORM, ReasonClass.COMPUTE_CAPABILITY})
# An engine that nobody installed says nothing about the machine; the sentence names it.
NOT_NEEDED = NOT_FOR_TARGET | {ReasonClass.ENGINE}
REAL_MODE = "gpu"

Answer = Literal["yes", "no", "not shown"]


@dataclass(frozen=True)
class RunVerdict:
    """The judgement of a run."""

    validated: bool
    sentence: str  # begins with VALIDATED or NOT VALIDATED
    answer: Answer  # can this machine fine-tune?
    answer_sentence: str
    counts: dict[str, int]  # verdict value -> cases, "missing" and "total" included


def plural(n: int, word: str) -> str:
    """'1 case', '2 cases'."""
    return f"{n} {word}{'' if n == 1 else 's'}"


def judge(
    *,
    facts: Facts,
    results: list[CaseResult],
    missing: list[str],
    profile: str,
    whole_profile: bool,
    interrupted: bool,
    ended: bool,
) -> RunVerdict:
    """Judge a run from what its record holds.

    `missing` are planned cases without a result; `whole_profile` says that everything the profile asks for was planned,
    unaltered; `ended` is false for a run that was killed, or is still going on.
    """
    seen = Counter(r.verdict.value for r in results)
    counts = {v.value: seen.get(v.value, 0) for v in Verdict}
    counts |= {"missing": len(missing), "total": len(results) + len(missing)}
    reasons = _faults(results, missing, interrupted, ended) + _device(facts, results)
    needed = [r for r in results if r.verdict is Verdict.SKIPPED and r.reason_class not in NOT_NEEDED]
    if facts.is_target and needed:
        classes = ", ".join(sorted({r.reason_class.value for r in needed if r.reason_class}))
        reasons.append(f"{plural(len(needed), 'case')} that the profile requires could not run ({classes})")
    if not whole_profile:
        reasons.append(f"only a selection of profile {profile} was run")
    if not counts["passed"]:
        reasons.append("nothing passed")
    answer, answer_sentence = can_fine_tune(facts, results, missing)
    if not reasons and answer != "yes":
        reasons.append("no training was shown to learn on the GPU")
    validated = not reasons
    if validated:
        engines = sum(r.reason_class is ReasonClass.ENGINE for r in results)
        apart = counts["skipped"] - engines
        said = [f"{plural(apart, 'case')} {'is' if apart == 1 else 'are'} not for this device"] if apart else []
        said += [f"{plural(engines, 'case')} of engines that are not installed did not run"] if engines else []
        note = f" ({'; '.join(said)})" if said else ""
        passed = plural(counts["passed"], "case")
        sentence = f"VALIDATED: {facts.device_sentence()} passed all {passed} of profile {profile}{note}."
    else:
        sentence = f"NOT VALIDATED: {'; '.join(reasons)}; {_tally(counts)}."
    return RunVerdict(validated, sentence, answer, answer_sentence, counts)


def _tally(counts: dict[str, int]) -> str:
    not_run = counts["skipped"] + counts["missing"]
    tail = f", {not_run} not run" if not_run else ""
    return f"{counts['passed']} of {plural(counts['total'], 'case')} passed{tail}"


def _faults(results: list[CaseResult], missing: list[str], interrupted: bool, ended: bool) -> list[str]:
    out = []
    for verdict, one, many in (
        (Verdict.FAILED, "failed", "failed"),
        (Verdict.BROKEN, "is broken", "are broken"),
        (Verdict.RETEST, "must be measured again", "must be measured again"),
    ):
        hit = [r.name for r in results if r.verdict is verdict]
        if hit:
            named = hit[0] if len(hit) == 1 else f"first {hit[0]}"
            out.append(f"{plural(len(hit), 'case')} {one if len(hit) == 1 else many} ({named})")
    left = f" with {plural(len(missing), 'case')} left" if missing else ""
    if not ended:
        out.append(f"the run did not end{left}")
    elif interrupted:
        out.append(f"the run was interrupted{left}")
    elif missing:
        out.append(f"{plural(len(missing), 'planned case')} left no result")
    return out


def _device(facts: Facts, results: list[CaseResult]) -> list[str]:
    """Why this is not the target, and how cases ran instead."""
    modes = {r.mode for r in results if r.verdict is not Verdict.SKIPPED}
    how = []
    if "interpreter" in modes:
        how.append("kernels ran in the interpreter")
    if "reference" in modes:
        how.append("training used the references, not the kernels")
    so = f", so {' and '.join(how)}" if how else ""
    if facts.gpu is None:
        gpu = "an NVIDIA GPU that could not be used" if facts.has_nvidia_hardware else "no GPU"
        return [f"{gpu}{so}"]
    if not facts.is_target:
        return [f"not the target device but {facts.device_sentence()}{so}"]
    replayed = [] if facts.origin.startswith("read on") else [f"the facts were not read here ({facts.origin})"]
    return replayed + ([f"though there is a GPU, {' and '.join(how)}"] if how else [])


def can_fine_tune(facts: Facts, results: list[CaseResult], missing: list[str]) -> tuple[Answer, str]:
    """Can this machine fine-tune? Yes only from training that learnt on its GPU, with nothing that contradicts it."""
    training = [r for r in results if r.kind == "train"]
    failed = [r for r in training if r.verdict is Verdict.FAILED]
    learnt = [r for r in training if r.verdict in (Verdict.PASSED, Verdict.RETEST)]  # a retest is about speed alone
    on_gpu = [r for r in learnt if r.mode == REAL_MODE]
    wrong = [r for r in results if r.kind in ("kernel", "environment") and r.verdict is Verdict.FAILED]
    if failed and not on_gpu:
        return "no", f"No: {failed[0].name} failed. {failed[0].reason}".strip()
    if failed:
        return (
            "no",
            f"No, not dependably: {_names(on_gpu)} learnt, but {failed[0].name} failed. {failed[0].reason}".strip(),
        )
    if on_gpu and wrong:
        why = wrong[0].reason or "It failed."
        return "not shown", f"Not shown: training learnt on the GPU, yet {wrong[0].name} failed. {why}".strip()
    if on_gpu:
        return (
            "yes",
            f"Yes: training learnt on {facts.device_sentence()} ({_names(on_gpu)}){_left_out(results, training)}.",
        )
    if learnt:
        where = "there is no GPU" if facts.gpu is None else "the GPU was not used"
        return (
            "not shown",
            f"Not shown: {where}. Training learnt on the CPU ({_names(learnt)}): that proves software, not the device.",
        )
    broken = [r for r in training if r.verdict is Verdict.BROKEN]
    if broken:
        return "not shown", f"Not shown: {broken[0].name} could not be judged. {broken[0].reason}".strip()
    if training:
        why = f" {training[0].reason}" if training[0].reason else ""
        return "not shown", f"Not shown: no training case ran to a verdict.{why}"
    if any(n.startswith("train/") for n in missing):
        return "not shown", "Not shown: the run ended before a training case did."
    return "not shown", "Not shown: no training case was part of this run."


def _names(results: list[CaseResult]) -> str:
    bases = {r.name.partition("[")[0] for r in results}
    if len(bases) == 1 and len(results) > 1:
        return f"{bases.pop()} with {' and '.join(r.name.partition('[')[2].removesuffix(']') for r in results)}"
    shown = [r.name for r in results[:2]]
    if len(results) > 2:
        return f"{', '.join(shown)} and {len(results) - 2} more"
    return " and ".join(shown)


def _left_out(results: list[CaseResult], training: list[CaseResult]) -> str:
    """What a reader of 'yes' must also know."""
    notes = []
    untried = [r for r in training if r.verdict in (Verdict.SKIPPED, Verdict.BROKEN)]
    if untried:
        notes.append(f"{plural(len(untried), 'training case')} gave no verdict")
    again = sum(r.verdict is Verdict.RETEST for r in training)
    if again:
        notes.append(f"the speed of {plural(again, 'training case')} must be measured again")
    other = [r for r in results if r.verdict is Verdict.FAILED and r.kind not in ("train", "kernel", "environment")]
    if other:
        kinds = " and ".join(sorted({r.kind for r in other}))
        notes.append(f"{plural(len(other), 'case')} of {kinds} failed")
    return f"; but {' and '.join(notes)}" if notes else ""
