"""What one registry holds at most, and what of a claim is too large for it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pdctl.core.lives import Claim
from pdctl.errors import ConfigError, TooLarge


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
