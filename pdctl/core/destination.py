"""
Where one decode rank wants one room, and the copies that bring it there.

Values in, plans out: what a rank has registered and named is paired with our pools once, and a rank that this prefill
cannot serve is refused with both values. Never asks whether the rank may be written to: the sender's gate knows that.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.core.layout import Pool, check_pair
from pdctl.core.plan import CopyPlan, Ints, item_plan
from pdctl.core.wire import Metadata, RegisterBuffers
from pdctl.errors import LayoutMismatch

_REMEDY = "start both with the same page size, and count from the same prefix"


@dataclass(frozen=True, slots=True)
class Destination:
    """`kv` and `aux` are the decode rank's pools; methods take ours."""

    kv: Pool
    aux: Pool
    named: Metadata

    @classmethod
    def of(cls, said: RegisterBuffers, named: Metadata, kv: Pool, aux: Pool) -> Destination:
        """Raises a PdctlError, with its reason, when memory so registered and named cannot be paired with our pools."""
        _check_supported(said, named)
        it = cls(said.kv_pool(), said.aux_pool(aux.item_lens), named)
        check_pair(kv, it.kv, "KV")
        return it

    @property
    def session(self) -> str:
        return self.named.session

    def chunk(self, kv: Pool, source: Ints, start: int) -> CopyPlan:
        """Our pages `source`, shape (n,), into the n of the named pages that begin with number `start`."""
        named, end = self.named.pages, start + len(source)
        if end > len(named):
            raise LayoutMismatch(
                f"KV: decode session {self.session} named {len(named)} pages and page {end} is being sent: {_REMEDY}"
            )
        return item_plan(kv, self.kv, source, named[start:end], "KV")

    def last(self, aux: Pool, n_sent: int, aux_row: int | None) -> CopyPlan:
        """Our aux row, when `n_sent` pages have been all that were named; nothing where either side has no row."""
        if n_sent != len(self.named.pages):
            raise LayoutMismatch(
                f"KV: decode session {self.session} named {len(self.named.pages)} pages and {n_sent} were sent: "
                f"{_REMEDY}"
            )
        if aux_row is None or self.named.aux_row is None:
            return CopyPlan.of()
        return item_plan(aux, self.aux, [aux_row], [self.named.aux_row], "aux")


def _check_supported(said: RegisterBuffers, named: Metadata) -> None:
    wanted = {
        f"a DCP size of {said.dcp_size}": said.dcp_size != 1,
        "state beside KV": any(named.state_rows),
        "device pages beside host pages": named.device_pages is not None,
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise LayoutMismatch(
                f"decode session {named.session} wants {what}, this prefill moves KV and aux rows: start decode without"
            )
