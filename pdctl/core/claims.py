"""
Which incarnation of an instance a claim belongs to, and whether whoever makes it may.

Decides only; nothing is changed here.

    a claim with the shape of an incarnation belongs to that one;
    a claim with another shape is a restart, and begins a new incarnation, when the newest one
        is complete, or holds the claimed seat, or has not grown for STALLED_AFTER_S, or has nobody left:
        a rank with wrong flags comes while its instance forms, and to a seat that is free;
    otherwise it is refused, with both values. So is one from the very address of a life: a life does not change shape.

Who may take what is held:

    from the holder's host, under the holder's token if it has one: always. It is a restart, or the same process again.
    from elsewhere: not while the holder's lease or witness says that it lives, nor while the row is another token's.
        A stock rank without a witness is vouched for by nobody: whoever comes later wins, as with the stock server,
        since in a cluster a restarted rank has a new address each time and must not be locked out by its own ghost.
    A new incarnation would take all seats: it is for who holds one of them, or when nobody is vouched for. One in
        another role waits until nobody is left of the old, or the rest drains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pdctl.core.instances import Incarnation, InstanceView
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import ERA, Claim, Life, Owner
from pdctl.core.route import Seat
from pdctl.errors import Occupied, Refused, Superseded, UnknownLease

STALLED_AFTER_S = 60.0
"""The ranks of an instance come within seconds of each other. One that is half there for longer has been given up."""


def place(view: InstanceView, claim: Claim, now: float) -> Incarnation | None:
    """The incarnation that the claim belongs to, None for a new one. Raises Refused or Occupied."""
    own = next((incarnation for incarnation in view.incarnations if incarnation.fits(claim)), None)
    for other in view.incarnations:
        if other is not own and any(life.address == claim.address for life in other.alive.values()):
            raise _contradiction(other, claim)
    if own is not None:
        _check_may_take(view, own, claim)
    else:
        _check_is_restart(view.forming or view.served, claim, now)
        _check_role(view, claim)
        _check_may_replace(view, claim)
    return own


def check_may_change(life: Life, owner: Owner | None) -> None:
    """None: whoever called has seen to it. Raises Occupied."""
    if owner is not None and not owner.may_change(life.owner):
        raise occupied(life, owner)


def check_may_end(life: Life, owner: Owner | None) -> None:
    """As `check_may_change`, for goodbyes and drains."""
    if owner is not None and not owner.may_end(life.owner):
        raise Occupied(
            f"seat {life.seat} of {life.claim.instance} was registered by {life.owner}, and {owner} wants it gone: ask "
            "from there, or with a token of the admin role",
            holder=life.owner.host,
            claimant=owner.host,
        )


def occupied(life: Life, claimant: Owner) -> Occupied:
    return Occupied(
        f"seat {life.seat} of {life.claim.instance} is held by {life.owner}, which lives, and was claimed from "
        f"{claimant}: stop one of the two, or wait until the holder's lease is over",
        holder=life.owner.host,
        claimant=claimant.host,
    )


def not_held(view: InstanceView, seat: Seat, epoch: int | None) -> UnknownLease | Superseded:
    """What to tell one who speaks for a life that does not hold the seat, or not any more."""
    if epoch is None:
        return UnknownLease(f"seat {seat} of {view.name} is held by nobody: nothing is there to leave")
    if epoch // ERA != view.last_epoch // ERA:
        return UnknownLease(f"epoch {epoch} is of a registry that has forgotten it: register again")
    loss, held = view.loss(seat, epoch), view.alive.get(seat)
    if loss is not None and loss.kind is ChangeKind.DRAINED:
        return Superseded(
            f"epoch {epoch} in seat {seat} of {view.name} was drained: exit, or start anew to serve again",
            held=0,
            got=epoch,
        )
    if held is not None and held.epoch > epoch:
        return Superseded(
            f"seat {seat} is held by epoch {held.epoch}, got {epoch}: this process was replaced; exit and let the new "
            "one serve",
            held=held.epoch,
            got=epoch,
        )
    if view.served.number > epoch:
        number = view.served.number
        return Superseded(
            f"{view.name} was restarted with epoch {number}, got {epoch}: this process was replaced; exit and let the "
            "new one serve",
            held=number,
            got=epoch,
        )
    return UnknownLease(f"epoch {epoch} in seat {seat} of {view.name} is not known here any more: register again")


def _check_may_take(view: InstanceView, incarnation: Incarnation, claim: Claim) -> None:
    held = incarnation.alive.get(claim.seat)
    if held is not None:
        _check_way_is_free((held,), claim)
    elif incarnation is view.forming:
        _check_may_replace(view, claim)


def _check_may_replace(view: InstanceView, claim: Claim) -> None:
    if not any(_is_same(life.owner, claim.owner) for life in view.lives):
        _check_way_is_free(view.lives, claim)


def _check_way_is_free(lives: Iterable[Life], claim: Claim) -> None:
    for life in lives:
        foreign_row = life.owner.principal is not None and life.owner.principal != claim.owner.principal
        if foreign_row or (life.is_vouched and not _is_same(life.owner, claim.owner)):
            raise occupied(life, claim.owner)


def _is_same(holder: Owner, claimant: Owner) -> bool:
    return holder.host == claimant.host and (holder.principal is None or holder.principal == claimant.principal)


def _check_role(view: InstanceView, claim: Claim) -> None:
    """Raise Occupied where the instance lives in another role: a decode of that name would end a prefill that serves.

    From the holder's own host as well: a restart has the role that it had.
    """
    for life in view.lives:
        if life.claim.role != claim.role and not life.is_draining:
            raise Occupied(
                f"{claim.instance} serves as {life.claim.role} from {life.owner.host}, and {claim.owner.host} wants it "
                f"as {claim.role}: give this rank an instance name of its own, or drain the other one first",
                holder=life.owner.host,
                claimant=claim.owner.host,
            )


def _check_is_restart(newest: Incarnation, claim: Claim, now: float) -> None:
    given_up = not newest.alive or now - newest.newest_at >= STALLED_AFTER_S
    if not (newest.is_complete or claim.seat in newest.alive or given_up):
        raise _contradiction(newest, claim)


_SENTENCES = {  # stock's own words first, for who looks for them
    "dsv41_spec_layout": "DeepSeek-V4.1 DSpark PD layout differs across prefill ranks",
    "decode_allocation_policy": "Inconsistent prefill allocation policies",
}


def _contradiction(held: Incarnation, claim: Claim) -> Refused:
    if held.role != claim.role:
        return _refusal("role", held.role, claim.role)
    return _refusal(*next(held.shape.differences(claim.shape)))


def _refusal(name: str, held: Any, offered: Any) -> Refused:
    ours, theirs = _told_apart(held, offered)
    wire_name = "load_balance_method" if name == "follow_bootstrap_room" else name
    facts = f"{wire_name} is {ours} for this prefill but this rank offers {theirs}"
    text = f"{_SENTENCES[name]}: {facts}" if name in _SENTENCES else facts
    advice = (
        f"start every rank with the same {wire_name}; if the whole prefill was restarted with other settings, "
        f"let the rank try again, or wait {STALLED_AFTER_S:g} s"
    )
    return Refused(f"{text}: {advice}", field=wire_name, held=held, offered=offered)


def _told_apart(held: Any, offered: Any) -> tuple[str, str]:
    """Both values as short text: of two objects only the keys that differ."""
    if isinstance(held, Mapping) and isinstance(offered, Mapping):
        keys = [key for key in sorted({*held, *offered}) if held.get(key) != offered.get(key)]
        held, offered = ({key: values.get(key) for key in keys} for values in (held, offered))
    ours, theirs = (text if len(text) <= 200 else f"{text[:200]}..." for text in (repr(held), repr(offered)))
    return ours, theirs
