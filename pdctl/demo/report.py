"""
What the demo has found: checks with what was measured and what was expected, and the figures worth a table.

A check is made where it is measured and judged here; nothing is printed. No check at all is not a success.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest


@dataclass(frozen=True, slots=True)
class Check:
    """`evidence`: the lines that a person needs when it is not ok."""

    act: int
    name: str
    ok: bool
    measured: str
    expected: str
    evidence: tuple[str, ...] = ()

    def with_evidence(self, more: Iterable[str]) -> Check:
        return replace(self, evidence=(*self.evidence, *more))


@dataclass(frozen=True, slots=True)
class Moved:
    """What the transfers of some requests came to. `seconds`: while at least one byte was to be moved."""

    requests: int = 0
    tokens: int = 0
    pages: int = 0
    blocks: int = 0
    nbytes: int = 0
    aux_nbytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            *(mine + theirs for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )

    @property
    def gigabytes_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(slots=True)
class Report:
    """Grows with the acts. `figures`: what took how long, in the order told; `metric_lines`: as scraped."""

    checks: list[Check] = field(default_factory=list)
    moved: Moved = Moved()
    figures: dict[str, str] = field(default_factory=dict)
    metric_lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def exit_status(self) -> int:
        return 0 if self.ok else 1

    def document(self) -> dict[str, object]:
        """For `--json`."""
        moved = asdict(self.moved) | {"gigabytes_per_s": round(self.moved.gigabytes_per_s, 3)}
        return {
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "checks": [asdict(check) for check in self.checks],
            "moved": moved,
            "figures": self.figures,
            "metrics": self.metric_lines,
            "notes": self.notes,
        }


def same_tokens(act: int, name: str, expected: Sequence[int], got: Sequence[int]) -> Check:
    """Every token equal, and as many of them; the evidence names the first that is not."""
    unlike = [n for n, (a, b) in enumerate(zip_longest(expected, got)) if a != b]
    equal = len(expected) - sum(1 for n in unlike if n < len(expected))
    evidence: tuple[str, ...] = ()
    if unlike:
        first = unlike[0]
        evidence = (
            f"first difference at token {first}: expected {list(expected[first : first + 8])}, "
            f"got {list(got[first : first + 8])}",
        )
    ok = bool(expected) and not unlike
    return Check(act, name, ok, f"{equal} of {len(expected)} equal", "every token equal, at least one", evidence)


def all_same_tokens(act: int, name: str, pairs: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> Check:
    """`same_tokens` over (prompt name, expected, got), as one check."""
    checks = [same_tokens(act, prompt, expected, got) for prompt, expected, got in pairs]
    evidence = tuple(f"{check.name}: {line}" for check in checks if not check.ok for line in check.evidence)
    n = sum(len(expected) for _, expected, _ in pairs)
    n_good = sum(check.ok for check in checks)
    measured = f"{n} tokens, {n_good} of {len(checks)} prompts equal"
    ok = bool(checks) and n_good == len(checks)
    return Check(act, name, ok, measured, "equal to the run in one process, every token", evidence)
