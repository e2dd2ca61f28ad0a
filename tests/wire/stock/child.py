"""
The stock side of these tests: a process that holds stock SGLang ranks and does with them what it is told.

One JSON object a line comes in on stdin: {"do": name, ...}; one goes out on stdout: {"result": ...} or {"error": ...}.
Started by conftest.py with the stock wheel on PYTHONPATH. It decides nothing: every answer is what stock code returned.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.wire.stock import surroundings

surroundings.install()

from sglang.srt.disaggregation.common.conn import KVTransferError  # noqa: E402
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver, MooncakeKVSender  # noqa: E402
from sglang.srt.managers.disagg_service import start_disagg_service  # noqa: E402

from tests.e2e.model import Model, Split  # noqa: E402
from tests.wire.stock import ranks  # noqa: E402
from tests.wire.stock.instances import Instance  # noqa: E402

JSON = dict[str, Any]
PAGES, PAGE_NBYTES, ENTRIES = 16, 2048, 4
POLL_S = 0.005


class Heard(logging.Handler):
    """What stock code has logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Child:
    """The ranks and rooms of this process, by the names that the test gave them."""

    def __init__(self) -> None:
        self.managers: dict[str, Any] = {}
        self.pools: dict[str, ranks.Pool] = {}
        self.rooms: dict[int, Any] = {}
        self.instance: Instance | None = None
        self.service: Any = None

    def serve(self, host: str, port: int) -> JSON:
        """Start the bootstrap service as a prefill's tokenizer process does, and say what came of it."""
        surroundings.tell("serving", host=host)
        surroundings.tell("disagg", disaggregation_bootstrap_port=port)
        heard = Heard()
        logging.getLogger("sglang.srt.disaggregation.common.conn").addHandler(heard)
        logging.getLogger("sglang.srt.disaggregation.common.conn").setLevel(logging.INFO)
        self.service = start_disagg_service()
        wait_for(lambda: bool(heard.said), "the bootstrap service says neither that it serves nor that it cannot", 60)
        return {"said": heard.said[0]}

    def serves(self) -> bool:
        """Whether the thread of the bootstrap service still runs."""
        return bool(self.service.thread.is_alive())

    def seat(self, role: str, registry: str, model: JSON, split: JSON, seed: int = 0, **more: Any) -> int:
        """Build all ranks of an instance, of which there is one at a time; `seed` fills a prefill's pages."""
        self.instance = Instance(role, registry, Model.of(model), Split(**split), **more)
        if role == "prefill":
            self.instance.fill(seed)
        return len(self.instance.seated)

    def instance_does(self, what: str, **given: Any) -> Any:
        """What the seated instance does."""
        assert self.instance is not None
        return getattr(self.instance, what)(**given)

    def unseat(self) -> None:
        assert self.instance is not None
        self.instance.close()
        self.instance = None

    def rank(self, name: str, role: str, registry: str, moves: bool = False, **parallel: Any) -> JSON:
        """Build a manager; a prefill one PUTs itself to `registry` (host:port) while it is built."""
        host, _, port = registry.rpartition(":")
        surroundings.tell("parallel", **{**surroundings.PARALLEL, **parallel})
        surroundings.tell("serving", host=host.strip("[]"))
        surroundings.tell("disagg", disaggregation_bootstrap_port=int(port))
        engine = ranks.real_engine() if moves else ranks.Motionless("127.0.0.1:1")
        pool = ranks.Pool(ENTRIES, PAGES, PAGE_NBYTES)
        args = ranks.args_of(pool, engine_rank=parallel.get("attn_tp_rank", 0))
        manager = ranks.manager(role, args, engine)
        self.managers[name], self.pools[name] = manager, pool
        return {"rank_ip": manager.local_ip, "rank_port": manager.rank_port, "session": manager.get_session_id()}

    def change_args(self, name: str, **changes: Any) -> None:
        """Start over with other settings, as far as stock's checks see."""
        for each, value in changes.items():
            setattr(self.managers[name].kv_args, each, value)

    def topology(self, name: str, address: str) -> JSON | None:
        """try_ensure_parallel_info: what decode then knows of the instance, or None."""
        manager = self.managers[name]
        if not manager.try_ensure_parallel_info(address):
            return None
        return dataclasses.asdict(manager.prefill_info_table[address])

    def lookup(self, name: str, address: str, dp: int, cp: int, tp: int, pp: int) -> JSON | None:
        receiver = MooncakeKVReceiver(self.managers[name], address, 0)
        found: JSON | None = receiver._get_bootstrap_info_from_server(dp, cp, tp, pp)
        return found

    def query_rooms(self, address: str, rooms: list[int]) -> dict[str, int]:
        answer: dict[str, int] = MooncakeKVReceiver.query_prefill_dp_ranks(address, rooms)
        return answer

    def beats(self, name: str, address: str, until: str) -> JSON:
        """Wait for stock's heartbeat to say that the address is `alive` or `gone`."""
        manager = self.managers[name]
        manager.heartbeat_interval = 0.05  # its floor of 2 s holds for the first beat only
        said = {
            "alive": lambda: manager.heartbeat_failures.get(address) == 0,
            "gone": lambda: address not in manager.prefill_info_table,
        }
        wait_for(said[until], f"the heartbeat never called {address} {until}", within_s=20)
        return {"known": list(manager.prefill_info_table), "misses": dict(manager.heartbeat_failures)}

    def fill(self, name: str, seed: int) -> None:
        self.pools[name].fill(seed)

    def page_bytes(self, name: str, pages: list[int]) -> list[str]:
        """The named pages of every entry, entry by entry."""
        return [base64.b64encode(array[pages].tobytes()).decode() for array in self.pools[name].kv]

    def row_bytes(self, name: str, row: int) -> list[str]:
        return [base64.b64encode(array[row].tobytes()).decode() for array in self.pools[name].aux]

    def open_sender(self, name: str, room: int, address: str, pages: int, row: int) -> None:
        sender = MooncakeKVSender(self.managers[name], address, room)
        sender.init(pages, row)
        self.rooms[room] = sender

    def send(self, room: int, pages: list[int]) -> None:
        self.rooms[room].send(np.array(pages, np.int32))

    def open_receiver(self, name: str, room: int, address: str) -> None:
        receiver = MooncakeKVReceiver(self.managers[name], address, room)
        receiver.init(prefill_dp_rank=0)
        self.rooms[room] = receiver

    def send_metadata(self, room: int, pages: list[int], row: int) -> None:
        self.rooms[room].send_metadata(np.array(pages, np.int32), row)

    def abort(self, room: int) -> None:
        self.rooms[room].abort()

    def poll_until(self, room: int, status: list[int], within_s: float = 20) -> int:
        one = self.rooms[room]
        wait_for(lambda: one.poll() in status, f"room {room} stays at {one.poll()}, not {status}", within_s)
        return int(one.poll())

    def reason(self, room: int) -> str:
        """Why a room failed, as the scheduler would hear it."""
        try:
            self.rooms[room].failure_exception()
        except KVTransferError as error:
            return str(error.failure_reason)
        return ""

    def is_release_safe(self, name: str, room: int, acks: int, within_s: float = 10) -> bool:
        """Whether every prefill rank acknowledged the abort, so that the pages may be used again."""
        manager = self.managers[name]
        wait_for(lambda: manager.is_abort_release_safe(room, acks), f"room {room}: no {acks} acks came", within_s)
        return True


def wait_for(said: Callable[[], bool], otherwise: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not said():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(POLL_S)


def answer(child: Child, command: JSON) -> JSON:
    name = command.pop("do")
    try:
        return {"result": getattr(child, name)(**command)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    child = Child()
    print(json.dumps({"result": "ready"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(child, json.loads(line))), flush=True)
    os._exit(0)  # stock threads and the engine's own never end by themselves


if __name__ == "__main__":
    main()
