"""
etcd's v3 protocol, as far as the journal speaks it: range, put under conditions, leases, watch.

    one endpoint at a time ─ unreachable, late, without a leader ─> the next one

aetcd brings the generated messages and stubs. Its client is not used: it has no TLS and one endpoint, and its watcher
throws away the revisions that say how far one has come. No retries here and no state: a call is made once, within
`timeout_s`, and raises Unreachable with etcd's own words; the next call goes to the next endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from aetcd import rpc

from pdctl.core.address import Endpoint
from pdctl.errors import PdctlError, Unreachable
from pdctl.lag import patience
from pdctl.persistence.etcd_place import EtcdSettings

PAGE_ROWS: Final = 1000
"""Keys of one answer to `everything`: an answer is held whole in memory at both ends."""

_CHANNEL: Final = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_retries", 0),
)
_OURS: Final = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_WITH_LEADER: Final = ("hasleader", "true")  # a member without one then refuses, and does not keep a watch waiting


class Compacted(PdctlError):
    """The watch was to begin at a revision that etcd has no more: read everything anew."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as etcd has it, or had it: `value` None for one that is gone. `lease` 0: none."""

    key: str
    value: bytes | None
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


Op = Put | Delete


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys of a prefix, as they were at `revision`."""

    revision: int
    keys: Sequence[KeyValue]


class Etcd:
    """One cluster. Open it with `open_etcd`."""

    def __init__(self, endpoints: Sequence[Endpoint], settings: EtcdSettings) -> None:
        self._endpoints = endpoints
        self._settings = settings
        self._credentials = grpc.ssl_channel_credentials(*settings.read()) if settings.is_encrypted else None
        self._at = 0
        self._channel: grpc.aio.Channel | None = None
        self._token: str | None = None

    @property
    def endpoint(self) -> Endpoint:
        """The one that the next call goes to."""
        return self._endpoints[self._at]

    async def aclose(self) -> None:
        await self._let_go()

    async def get(self, key: str) -> KeyValue | None:
        """The key as a majority has it now. Raises Unreachable."""
        answer = await self._call(rpc.KVStub, "Range", rpc.RangeRequest(key=key.encode()))
        return _key_value(answer.kvs[0]) if answer.kvs else None

    async def everything(self, prefix: str) -> Listing:
        """All keys that begin with `prefix`, at one revision. Raises Unreachable."""
        first, end, revision = prefix.encode(), _end_of(prefix), 0
        keys: list[KeyValue] = []
        while True:
            request = rpc.RangeRequest(key=first, range_end=end, limit=PAGE_ROWS, revision=revision)
            answer = await self._call(rpc.KVStub, "Range", request)
            revision = revision or answer.header.revision
            keys += map(_key_value, answer.kvs)
            if not answer.more:
                return Listing(revision, keys)
            first = answer.kvs[-1].key + b"\0"

    async def commit(self, ops: Sequence[Op], *, expected: Mapping[str, bytes | None] | None = None) -> bool:
        """Do all of it if each key of `expected` has that value (None: is not there); else nothing, and return False.

        Not by revision: etcd counts from 1 again when its disk was wiped. Raises Unreachable: then it is not known
        whether it was done, or may still be.
        """
        request = rpc.TxnRequest(
            compare=[_compare(key, value) for key, value in (expected or {}).items()],
            success=[_request_op(op) for op in ops],
        )
        answer = await self._call(rpc.KVStub, "Txn", request)
        return bool(answer.succeeded)

    async def grant(self, ttl_s: int) -> int:
        """A lease; keys put under it go with it. Raises Unreachable."""
        answer = await self._call(rpc.LeaseStub, "LeaseGrant", rpc.LeaseGrantRequest(TTL=ttl_s))
        lease: int = answer.ID
        return lease

    async def revoke(self, lease: int) -> None:
        """The lease, and its keys, are gone now. Raises Unreachable."""
        await self._call(rpc.LeaseStub, "LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease))

    @asynccontextmanager
    async def keep_alive(self) -> AsyncIterator[KeepAlive]:
        """A stream on which leases are kept alive. Raises Unreachable."""
        channel, metadata = await self._connected()
        call = rpc.LeaseStub(channel).LeaseKeepAlive(metadata=metadata)
        try:
            yield KeepAlive(self, channel, call)
        finally:
            call.cancel()

    @asynccontextmanager
    async def watch(self, prefix: str, since: int) -> AsyncIterator[Watch]:
        """What changes under `prefix` from revision `since` on. Raises Unreachable."""
        channel, metadata = await self._connected()
        call = rpc.WatchStub(channel).Watch(metadata=(*metadata, _WITH_LEADER))
        create = rpc.WatchCreateRequest(key=prefix.encode(), range_end=_end_of(prefix), start_revision=since)
        try:
            await self.write(channel, call, rpc.WatchRequest(create_request=create))
            yield Watch(self, channel, call)
        finally:
            call.cancel()

    async def write(self, channel: grpc.aio.Channel, call: Any, message: Any) -> None:
        """On a stream. Raises Unreachable, also where gRPC waits for ever: on a channel that was closed meanwhile."""
        try:
            async with patience(self._settings.timeout_s):  # a loop that packs thousands of rows may stand that long
                await _said(call.write(message))
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, TimeoutError) as error:
            raise await self.failed(error, channel) from error

    async def failed(self, error: Exception, channel: grpc.aio.Channel) -> Unreachable:
        """Turn to the next endpoint, unless another call on `channel` has failed already; returns what to raise."""
        was = self.endpoint
        if channel is self._channel and not _is_our_fault(error):
            await self._let_go()
            self._at = (self._at + 1) % len(self._endpoints)
        return Unreachable(
            f"etcd at {was} does not answer as it should ({_in_words(error)}): is it up, with a majority?"
        )

    async def _call(self, stub: Any, method: str, request: Any) -> Any:
        channel, metadata = await self._connected()
        try:
            return await _said(
                getattr(stub(channel), method)(request, timeout=self._settings.timeout_s, metadata=metadata)
            )
        except grpc.aio.AioRpcError as error:
            raise await self.failed(error, channel) from error

    async def _connected(self) -> tuple[grpc.aio.Channel, tuple[tuple[str, str], ...]]:
        if self._channel is None:
            target = str(self.endpoint)
            self._channel = (
                grpc.aio.insecure_channel(target, _CHANNEL)
                if self._credentials is None
                else grpc.aio.secure_channel(target, self._credentials, _CHANNEL)
            )
        channel = self._channel
        if self._settings.username is not None and self._token is None:
            self._token = await self._authenticated(channel)
        return channel, () if self._token is None else (("token", self._token),)

    async def _authenticated(self, channel: grpc.aio.Channel) -> str:
        request = rpc.AuthenticateRequest(name=self._settings.username, password=self._settings.password)
        try:
            answer = await _said(rpc.AuthStub(channel).Authenticate(request, timeout=self._settings.timeout_s))
        except grpc.aio.AioRpcError as error:
            raise await self.failed(error, channel) from error
        if channel is not self._channel:  # another call has let go of it meanwhile
            raise await self.failed(EOFError("the channel was closed"), channel)
        token: str = answer.token
        return token

    async def _let_go(self) -> None:
        """A token is its channel's: etcd forgets them when it restarts."""
        if self._channel is not None:
            channel, self._channel, self._token = self._channel, None, None
            await channel.close()


class KeepAlive:
    """Renewals of leases, one after another."""

    def __init__(self, etcd: Etcd, channel: grpc.aio.Channel, call: Any) -> None:
        self._etcd = etcd
        self._channel = channel
        self._call = call

    async def renew(self, lease: int) -> None:
        """Ask; the answer comes by `answer`. Raises Unreachable."""
        await self._etcd.write(self._channel, self._call, rpc.LeaseKeepAliveRequest(ID=lease))

    async def answer(self) -> tuple[int, int]:
        """A lease, and the seconds that it has left: 0 for one that is over. Raises Unreachable."""
        try:
            answer = await _said(self._call.read())
        except grpc.aio.AioRpcError as error:
            raise await self._etcd.failed(error, self._channel) from error
        if answer is grpc.aio.EOF:
            raise await self._etcd.failed(EOFError("the stream has ended"), self._channel)
        return answer.ID, answer.TTL


class Watch:
    """Changes as they come, those of one revision together."""

    def __init__(self, etcd: Etcd, channel: grpc.aio.Channel, call: Any) -> None:
        self._etcd = etcd
        self._channel = channel
        self._call = call

    async def news(self) -> Sequence[KeyValue]:
        """The next changes, in order; empty for a sign of life. Raises Compacted, Unreachable."""
        try:
            answer = await _said(self._call.read())
        except grpc.aio.AioRpcError as error:
            raise await self._etcd.failed(error, self._channel) from error
        if answer is grpc.aio.EOF:
            raise await self._etcd.failed(EOFError("the watch has ended"), self._channel)
        if answer.compact_revision:
            raise Compacted(f"etcd was compacted up to revision {answer.compact_revision}")
        if answer.canceled:
            raise await self._etcd.failed(EOFError(answer.cancel_reason or "the watch was cancelled"), self._channel)
        return [_event(event) for event in answer.events]


@asynccontextmanager
async def open_etcd(endpoints: Sequence[Endpoint], settings: EtcdSettings) -> AsyncIterator[Etcd]:
    """Nothing is connected before the first call."""
    etcd = Etcd(endpoints, settings)
    try:
        yield etcd
    finally:
        await etcd.aclose()


async def _said(call: Awaitable[Any]) -> Any:
    """What `call` gives. A channel that is closed cancels its calls, which is no reason to cancel who waits."""
    try:
        return await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "the channel was closed"
        ) from None


def _key_value(found: Any) -> KeyValue:
    return KeyValue(found.key.decode(), found.value, found.lease)


def _event(event: Any) -> KeyValue:
    is_gone = event.type == rpc.Event.DELETE
    return KeyValue(event.kv.key.decode(), None if is_gone else event.kv.value, event.kv.lease)


def _compare(key: str, value: bytes | None) -> Any:
    compare = rpc.Compare
    if value is None:
        return compare(key=key.encode(), target=compare.VERSION, result=compare.EQUAL, version=0)
    return compare(key=key.encode(), target=compare.VALUE, result=compare.EQUAL, value=value)


def _request_op(op: Op) -> Any:
    if isinstance(op, Delete):
        return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=op.key.encode()))
    return rpc.RequestOp(request_put=rpc.PutRequest(key=op.key.encode(), value=op.value, lease=op.lease))


def _end_of(prefix: str) -> bytes:
    """The first key behind all that begin with `prefix`, which ends in a character below the last one."""
    first = prefix.encode()
    return first[:-1] + bytes([first[-1] + 1])


def _is_our_fault(error: Exception) -> bool:
    """Whether another endpoint would say the same."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _OURS


def _in_words(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details() or 'no details'}"
    return str(error) or type(error).__name__
