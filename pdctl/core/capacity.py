"""What one registry holds at most, of ranks and of what they tell, and what of a claim is too large for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdctl.core.seconds import check_seconds
from pdctl.errors import ConfigError, TooLarge

if TYPE_CHECKING:
    from pdctl.core.lives import Claim


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """What one registry holds at most.

    max_instances        names; those that nobody is left of go first
    max_ranks            lives over all instances, lost ones that are remembered included
    max_labels           labels of one rank
    max_metadata_nbytes  labels and metadata of one rank, as JSON
    """

    max_instances: int = 10_000
    max_ranks: int = 200_000
    max_labels: int = 32
    max_metadata_nbytes: int = 16_384

    def __post_init__(self) -> None:
        if self.max_instances < 1 or self.max_ranks < 1 or self.max_labels < 0 or self.max_metadata_nbytes < 0:
            raise ConfigError(
                "max_instances and max_ranks need at least 1, max_labels and max_metadata_nbytes 0 or more"
            )

    def check(self, claim: Claim) -> None:
        """Raises TooLarge."""
        if len(claim.labels) > self.max_labels:
            raise TooLarge(
                f"labels: {len(claim.labels)} are over {self.max_labels}, the limit (max_labels): send fewer"
            )
        if not claim.labels and not claim.metadata:
            return
        nbytes = len(json.dumps([claim.labels, claim.metadata]))
        if nbytes > self.max_metadata_nbytes:
            raise TooLarge(
                f"metadata: {nbytes} bytes with the labels are over {self.max_metadata_nbytes}, the limit "
                "(max_metadata_nbytes): send less"
            )


@dataclass(frozen=True, slots=True)
class ReportLimits:
    """What ranks may tell of themselves (docs/overview.md).

    max_reports     ranks whose last report is held; one more is answered 429
    max_nbytes      of all of them together; one that does not fit is answered 429
    again_s         how soon at the latest the next one is wanted
    expire_after_s  a report that none has followed for so long is dropped, and that is an event
    per_s           of more ranks than report so often a second, each is asked to report less often, and is waited for
                    longer; with 200, and links to 64 peers each, reports take a twelfth of a core (docs/overview.md)
    """

    max_reports: int = 20_000
    max_nbytes: int = 256 << 20
    again_s: float = 5.0
    expire_after_s: float = 15.0
    per_s: float = 200.0

    def __post_init__(self) -> None:
        check_seconds(self, "reports")
        if not self.per_s > 0:
            raise ConfigError(f"reports per_s is {self.per_s}: give reports a second, above 0")
        if self.max_reports < 0 or self.max_nbytes < 0:
            raise ConfigError("reports max_reports and max_nbytes cannot be below 0: give 0 to hold none")
        if self.expire_after_s <= self.again_s:
            raise ConfigError(
                f"reports expire_after_s is {self.expire_after_s:g} and again_s {self.again_s:g}: give a report longer "
                "than until the next one"
            )
