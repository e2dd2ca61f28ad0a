"""
Every exception that pdctl raises, as one tree, split by who must act.

    PdctlError
    ├── OperatorError          someone has to change a setting, a package or a host
    │   ├── ConfigError
    │   ├── EngineUnavailable      no Mooncake wheel, or a system library is missing
    │   ├── DeviceUnavailable      the device is not there, or its driver or runtime is not
    │   ├── AddressTaken           the port to listen on has another holder
    │   ├── JournalUnusable        the journal's file is another's, a newer version's, or cannot be made
    │   ├── RegistrationGaveUp     every attempt that the policy allows has failed
    │   └── ChecksumsMissing       a peer sums nothing, and this side requires it
    ├── CallerError            the request itself is wrong; sending it again changes nothing
    │   ├── BadField               names the field
    │   ├── Refused                contradicts what is registered; carries both values
    │   ├── Occupied               what is asked for belongs to another, who lives; carries both hosts
    │   ├── Superseded             a later life holds the seat; carries both epochs
    │   ├── UnknownLease           nobody of that epoch holds the seat: register again
    │   ├── RegistryRefused        the registry has answered no, for good; carries its status and words
    │   ├── BadFrames              a peer's message that cannot be read
    │   ├── TooLarge               a body over the limit that the text names
    │   ├── LayoutMismatch         two pools that cannot be paired, or pages of them; carries both values
    │   │   └── Unpairable             the two ranks' memory, whichever pages
    │   └── IllegalEvent           a phase that knows no such event
    └── NotNow                 nobody: wait, or look at the cause
        ├── NotReady               the instance is not complete, or not known, yet
        │   ├── PutOff                 the registry has answered "not now"; carries its status and words
        │   └── StoreNotReady          the shared store did not come up in time; carries the report
        ├── LimitReached           a bounded table is full; the text names the limit
        ├── JournalUnavailable     the journal does not take rows now; nothing was changed
        ├── TooSlow                a request's body did not arrive in time
        ├── Unreachable            the registry or a peer does not answer
        ├── SessionBlocked         this transfer session has failed and has not been proven well
        ├── TransferFailed         the engine's verdict, with its Cause
        ├── StoreFailed            the shared store's verdict, with its StoreCause
        └── RoomFailed             a room ended in FAILED; carries the first cause

Message style: what happened: what to do. The values stand beside the text as attributes.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """Why a transfer or a probe failed, decided once, at the engine adapter."""

    REFUSED = "refused"  # nothing listens at the peer's address
    TIMED_OUT = "timed_out"  # no answer in time: unknown, not dead
    PEER_GONE = "peer_gone"  # the connection broke, or blocks ended FAILED
    PEER_CHANGED = "peer_changed"  # another process, or another life, answers at that address
    NO_DATA = "no_data"  # it answers as the life that is meant, but its memory cannot be reached
    NOT_AN_ENGINE = "not_an_engine"  # something answers that is no Mooncake engine
    REJECTED_ADDRESS = "rejected_address"  # outside what the peer has announced
    LAYOUT = "layout"  # the two sides do not fit each other
    LOCAL = "local"  # this side's own fault: a bad pointer, a closed engine, a full window

    @property
    def speaks_of_peer(self) -> bool:
        """Whether this counts against the peer's session."""
        return self not in (Cause.REJECTED_ADDRESS, Cause.LAYOUT, Cause.LOCAL)


class StoreCause(StrEnum):
    """Why the shared store did not do what was asked, decided once, at the store's adapter."""

    MISSING = "missing"  # no such key
    LEASED = "leased"  # it was read a moment ago: removing it has to wait
    NO_SPACE = "no_space"  # no segment has room, or none is mounted (yet)
    BAD_ARGUMENT = "bad_argument"  # an empty value, one larger than a segment or the local buffer, memory unknown
    OWNER_UNREACHABLE = "owner_unreachable"  # the process that holds, or shall hold, the bytes does not take them
    MASTER_UNREACHABLE = "master_unreachable"  # no connection to the master, or it broke
    TIMED_OUT = "timed_out"  # the master did not answer in time
    NO_OFFLOAD = "no_offload"  # SSD offload is asked for, and the master was started without it
    SET_UP_REFUSED = "set_up_refused"  # the wheel took no such arguments
    WRONG_DATA = "wrong_data"  # what came back is not what was put
    CLOSED = "closed"  # this store was closed
    OTHER = "other"  # a code that nobody here knows; it stands in the text


class PdctlError(Exception):
    """Root of the tree."""


class OperatorError(PdctlError):
    """Someone has to change a setting, a package or a host."""


class ConfigError(OperatorError):
    """A setting is missing, unknown or contradicts another."""


class EngineUnavailable(OperatorError):
    """The transfer engine cannot be loaded; the text names the extra or the apt package."""


class DeviceUnavailable(OperatorError):
    """The device cannot be set; the text names what is missing, or the runtime's own code."""


class AddressTaken(OperatorError):
    """The address to listen on is in use; names the holder where that can be known."""


class JournalUnusable(OperatorError):
    """The journal cannot be opened, and waiting will not mend it; the text says what will."""


class RegistrationGaveUp(OperatorError):
    """Every attempt that the policy allows has failed.

    `attempts`: how many; `cause`: the root cause of the last one, in words.
    """

    def __init__(self, message: str, *, attempts: int, cause: str) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.cause = cause


class ChecksumsMissing(OperatorError):
    """A peer does not sum what it sends or is sent, and this side requires it; the text names the peer."""


class StoreUnusable(OperatorError):
    """The shared store cannot come up as it is configured. `report`: core.warmup's Report of how far it came."""

    def __init__(self, report: object) -> None:
        super().__init__(str(report))
        self.report = report


class CallerError(PdctlError):
    """The request itself is wrong; sending it again changes nothing."""


class BadField(CallerError):
    """One field of a request cannot be used; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class Refused(CallerError):
    """A claim contradicts what is registered: `held` is registered, `offered` was refused."""

    def __init__(self, message: str, *, field: str, held: object, offered: object) -> None:
        super().__init__(message)
        self.field = field
        self.held = held
        self.offered = offered


class Occupied(CallerError):
    """What is asked for belongs to `holder`, who lives; `claimant` asked. Both are hosts."""

    def __init__(self, message: str, *, holder: str, claimant: str) -> None:
        super().__init__(message)
        self.holder = holder
        self.claimant = claimant


class Superseded(CallerError):
    """A replaced life has spoken: `held` is the epoch in its place (0: none, or not known here), `got` its own."""

    def __init__(self, message: str, *, held: int, got: int) -> None:
        super().__init__(message)
        self.held = held
        self.got = got


class UnknownLease(CallerError):
    """Nobody of that epoch holds the seat, and nobody has replaced it: register again."""


class RegistryRefused(CallerError):
    """The registry has answered no, and asking again would change nothing: `status` and `text` are its own."""

    def __init__(self, message: str, *, status: int, text: str) -> None:
        super().__init__(message)
        self.status = status
        self.text = text


class BadFrames(CallerError):
    """A peer's message cannot be read; the text names the frame by number and meaning."""


class TooLarge(CallerError):
    """A body is over the limit that the text names."""


class LayoutMismatch(CallerError):
    """Two pools cannot be paired; both values are in the text."""


class Unpairable(LayoutMismatch):
    """The memory of two ranks does not fit, whichever pages are meant: no room between them can go well."""


class IllegalEvent(CallerError):
    """The phase's row has no such event; nothing was changed."""


class NotNow(PdctlError):
    """Nobody has to act: wait, or read the cause."""


class NotReady(NotNow):
    """Not complete, or not known, yet."""


class StoreNotReady(NotReady):
    """The shared store did not come up in the time that it was given. `report`: core.warmup's Report."""

    def __init__(self, report: object) -> None:
        super().__init__(str(report))
        self.report = report


class LimitReached(NotNow):
    """A bounded table is full; the text names the limit."""


class PutOff(NotReady):
    """The registry has answered "not now": `status` and `text` are its own.

    `retry_after_s`: for how long it wants to be left alone; None where it did not say.
    """

    def __init__(self, message: str, *, status: int, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.text = text
        self.retry_after_s = retry_after_s


class JournalUnavailable(NotNow):
    """The journal does not take rows now; what was asked for has not happened. `cause`: why, in words."""

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Behind(JournalUnavailable):
    """Another writer of the journal was faster; decide again on what it has written."""

    def __init__(self) -> None:
        faster = "another registry was faster"
        super().__init__(f"{faster}: ask again", cause=faster)


class TooSlow(NotNow):
    """A request's body did not arrive in time."""


class Unreachable(NotNow):
    """The registry or a peer does not answer; the text gives the root cause."""


class SessionBlocked(NotNow):
    """The transfer session has failed and has not been proven well since; the text says why and until when."""

    def __init__(self, session: str, reason: str) -> None:
        super().__init__(f"session {session} is blocked: {reason}")
        self.session = session
        self.reason = reason


class TransferFailed(NotNow):
    """A transfer or a probe did not do what was asked.

    `settled` says whether this side's memory is at rest: False means that blocks are still in the engine's
    hands, and the pages must stay quarantined until `Engine.settle(session)` returns.
    """

    def __init__(self, cause: Cause, session: str, detail: str, *, settled: bool = True) -> None:
        super().__init__(f"transfer with {session} failed ({cause}): {detail}")
        self.cause = cause
        self.session = session
        self.detail = detail
        self.settled = settled


class StoreFailed(NotNow):
    """The shared store did not do what was asked: `step` of `key`, with the store's own `code` where it gave one.

    `cause` is what the code means.
    """

    def __init__(self, cause: StoreCause, step: str, detail: str, *, key: str = "", code: int | None = None) -> None:
        of = f" of {key}" if key else ""
        said = "" if code is None else f", code {code}"
        super().__init__(f"store {step}{of} failed ({cause}{said}): {detail}")
        self.cause = cause
        self.step = step
        self.detail = detail
        self.key = key
        self.code = code


class RoomFailed(NotNow):
    """A room ended in FAILED. `reason` is the first cause, in words; later ones are symptoms.

    `is_permanent`: as far as this side knows, no other room between these two can go better until someone changes one
    of them (their layouts do not fit, one does not sum what the other requires): give the request to another pair. Else
    try again, in a room of another number.
    """

    def __init__(self, room: int, reason: str, *, is_permanent: bool = False) -> None:
        super().__init__(f"room {room} failed: {reason}")
        self.room = room
        self.reason = reason
        self.is_permanent = is_permanent
