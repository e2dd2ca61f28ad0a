"""A wheel's store class that only remembers: with today's signature, or with that of an old wheel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Recorded:
    """What all stand-ins of one test were called with, in order, and what they answer."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers = answers

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, options) for call, arguments, options in self.calls if call == name]

    def told(self, name: str, usual: Any, *arguments: Any, **options: Any) -> Any:
        self.calls.append((name, arguments, options))
        answer = self.answers.get(name, usual)
        if isinstance(answer, list) and answer and name != "batch_is_exist":
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def old_wheel(recorded: Recorded) -> Callable[[], Any]:  # noqa: C901
    """The signature before SSD offload and tenants; no segments apart from set-up, no force, no health."""

    class OldStore:
        def setup(
            self,
            local_hostname: str,
            metadata_server: str,
            global_segment_size: int,
            local_buffer_size: int,
            protocol: str,
            rdma_devices: str,
            master_server_addr: str,
            engine: object = None,
        ) -> int:
            arguments = (local_hostname, metadata_server, global_segment_size, local_buffer_size)
            code = recorded.told("setup", 0, *arguments, protocol, rdma_devices, master_server_addr, engine=engine)
            return int(code)

        def put(self, key: str, value: bytes) -> int:
            recorded.calls.append(("value", (value,), {}))
            return int(recorded.told("put", 0, key))

        def get(self, key: str) -> bytes:
            values = recorded.named("value")
            return bytes(recorded.told("get", values[-1][0][0] if values else b"", key))

        def get_size(self, key: str) -> int:
            return int(recorded.told("get_size", -704, key))

        def batch_is_exist(self, keys: list[str]) -> list[int]:
            return list(recorded.told("batch_is_exist", [1] * len(keys), keys))

        def remove(self, key: str) -> int:
            return int(recorded.told("remove", -706, key))

        def register_buffer(self, pointer: int, nbytes: int) -> int:
            return int(recorded.told("register_buffer", 0, pointer, nbytes))

        def unregister_buffer(self, pointer: int) -> int:
            return int(recorded.told("unregister_buffer", 0, pointer))

        def batch_put_from(self, *arguments: Any) -> list[int]:
            return list(recorded.told("batch_put_from", [0], *arguments))

        batch_get_into = batch_put_from_multi_buffers = batch_get_into_multi_buffers = batch_put_from

        def close(self) -> int:
            return int(recorded.told("close", 0))

    return OldStore


def new_wheel(recorded: Recorded) -> Callable[[], Any]:
    """Today's: what came later is there, and passed on."""
    base: Any = old_wheel(recorded)

    class NewStore(base):  # type: ignore[misc]
        def setup(
            self,
            local_hostname: str,
            metadata_server: str,
            global_segment_size: int,
            local_buffer_size: int,
            protocol: str,
            rdma_devices: str,
            master_server_addr: str,
            engine: object = None,
            enable_ssd_offload: bool = False,
            ssd_offload_path: str = "",
            tenant_id: str = "default",
        ) -> int:
            arguments = (local_hostname, metadata_server, global_segment_size, local_buffer_size)
            options = {
                "enable_ssd_offload": enable_ssd_offload,
                "ssd_offload_path": ssd_offload_path,
                "tenant_id": tenant_id,
            }
            told = recorded.told("setup", 0, *arguments, protocol, rdma_devices, master_server_addr, **options)
            return int(told)

        def remove(self, key: str, force: bool = False) -> int:
            return int(recorded.told("remove", 0 if force else -706, key, force))

        def allocate_and_mount_segment(self, size: int, protocol: str = "tcp") -> dict[str, Any]:
            return dict(recorded.told("mount", {"ret": 0, "segment_ids": ["1-2"]}, size, protocol))

        def unmount_and_free_segment(self, segment_ids: list[str]) -> int:
            return int(recorded.told("unmount", 0, segment_ids))

        def get_hostname(self) -> str:
            return str(recorded.told("get_hostname", "127.0.0.1:12345"))

        def health_check(self) -> int:
            return int(recorded.told("health_check", 0))

    return NewStore
