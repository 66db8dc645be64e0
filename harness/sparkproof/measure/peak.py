"""How much a piece of work makes this process grow: the kernel's own high-water mark, which misses no short peak.

Resident memory counts pages of mapped files too (safetensors and GGUF files are mapped), as long as they are resident.
"""

from __future__ import annotations

from pathlib import Path

from sparkproof.measure.memory import GIB

RESET = "5"  # proc_pid_clear_refs(5): the peak begins anew at what is resident now


class HostPeak:
    """From its making on: `gib()` is the peak of resident memory above the start."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self.proc = proc
        self.why_not = ""
        try:
            (proc / "clear_refs").write_text(RESET)
            self.start = self._of("VmRSS")
        except (OSError, StopIteration) as error:  # a kernel without it, as some sandboxes have
            self.why_not = f"the peak of this process can't be set back ({type(error).__name__})"

    def gib(self) -> float | None:
        """GiB; None where it can't be told, and `why_not` says why."""
        return None if self.why_not else max(0, self._of("VmHWM") - self.start) / GIB

    def _of(self, key: str) -> int:
        lines = (self.proc / "status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
