"""Real faults of a real fleet, seen by a real Prometheus: the alert that is meant fires, and clears when it is over.

The rules are those of deploy/prometheus, sixty times as quick.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from pdctl.core.address import Endpoint
from pdctl.core.native import Registration
from pdctl.core.route import Announcement, Seat, Shape
from tests.monitoring.fleet import Fleet, fleet, watched
from tests.monitoring.prometheus import Prometheus
from tests.service import service, until

HALF = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="float16")


def test_alerts_fire_while_the_fault_lasts_and_clear_after_it(tmp_path: Path) -> None:
    with fleet(tmp_path) as running, watched(tmp_path, running) as seen:
        for _ in range(3):
            running.move()
        until(lambda: value(seen, "pdctl_rooms_ended_total", side="receiver", phase="success") == 3)
        assert seen.firing() == set()
        a_decode_stops(running, seen)
        a_rank_never_comes(running, seen)
        the_registry_is_killed(running, seen, tmp_path)


def a_decode_stops(running: Fleet, seen: Prometheus) -> None:
    room = running.hold()
    running.decode.stop()
    running.prefill.ask_now("go", room=room)
    assert "timed_out" in running.prefill.ask_now("end", room=room)["why"]
    until(lambda: {"PdctlLinkEjected", "PdctlRankDown"} <= seen.firing())
    (link,) = (each for each in seen.alerts() if each["labels"]["alertname"] == "PdctlLinkEjected")
    assert link["labels"]["instance"] == running.metrics_urls["prefill"].split("/")[2]
    assert "a link has been out for" in link["annotations"]["summary"]
    running.decode.resume()
    until(lambda: not {"PdctlLinkEjected", "PdctlRankDown"} & seen.firing())
    running.move()


def a_rank_never_comes(running: Fleet, seen: Prometheus) -> None:
    claim(running, tp=0)
    until(lambda: "PdctlInstanceIncomplete" in seen.firing())
    claim(running, tp=1)
    until(lambda: "PdctlInstanceIncomplete" not in seen.firing())


def the_registry_is_killed(running: Fleet, seen: Prometheus, at: Path) -> None:
    port = str(running.registry.port)
    running.registry.kill()
    until(lambda: {"PdctlRegistryDown", "PdctlRankUnregistered"} <= seen.firing())
    unregistered = {
        each["labels"]["role"] for each in seen.alerts() if each["labels"]["alertname"] == "PdctlRankUnregistered"
    }
    assert unregistered == {"prefill", "decode"}
    with service(at / "again.log", "--port", port, "--journal", f"sqlite:{at / 'journal'}"):
        until(lambda: not {"PdctlRegistryDown", "PdctlRankUnregistered"} & seen.firing())


def claim(running: Fleet, tp: int) -> None:
    body = Registration.of(Announcement(Seat(0, 0, tp, 0), HALF, Endpoint("127.0.0.1", 9000 + tp)), 60.0).to_body()
    request = urllib.request.Request(
        f"{running.registry.url}/v1/instances/half/ranks/dp0-cp0-tp{tp}-pp0",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


def value(seen: Prometheus, name: str, **labels: str) -> float | None:
    wanted = ",".join(f'{key}="{it}"' for key, it in labels.items())
    return next((found for _, found in seen.query(f"{name}{{{wanted}}} > 0")), None)
