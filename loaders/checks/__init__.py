"""What can be wrong with a data set: one concept a module, and what they all report, one line each."""

from typing import List, NamedTuple, Optional, Sequence

OK, WARNING, ERROR = 'ok', 'warning', 'error'


class Finding(NamedTuple):
    """One line of a report.

    Attributes:
        level: ``ok``, ``warning`` or ``error``.
        text: one sentence; names the file and the remedy where something is wrong.
    """

    level: str
    text: str

    def line(self) -> str:
        return f'[{self.level}] {self.text}'


class Look(NamedTuple):
    """How closely to look.

    Attributes:
        full: at every file, with a progress bar; else at some.
        decode: decode images; else look at both ends of each file.
        processes: worker processes; None = all cores.
        level: of a single file that is missing or damaged.
        shown: most files named one by one per kind.
        needs_mask: labels without ``mask_camera`` cannot be used.
    """

    full: bool = False
    decode: bool = False
    processes: Optional[int] = 1
    level: str = ERROR
    shown: int = 10
    needs_mask: bool = False


def spread(count: int, wanted: int) -> List[int]:
    """At most ``wanted`` of the indices 0..count-1, first and last among them, evenly spread."""
    if wanted >= count:
        return list(range(count))
    return sorted({round(step * (count - 1) / max(wanted - 1, 1)) for step in range(wanted)})


def name_some(messages: Sequence[str], what: str, level: str, shown: int) -> List[Finding]:
    """A finding per message up to ``shown``, then one that counts the rest."""
    findings = [Finding(level, message) for message in messages[:shown]]
    if len(messages) > shown:
        findings.append(Finding(level, f'... and {len(messages) - shown} more {what}'))
    return findings
