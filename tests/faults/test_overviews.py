"""
What ranks told one registry is shown by every other over the same etcd: real processes, a real etcd, real faults.

Ranks report by plain HTTP here; what real ones say stands in tests/test_reporting.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdctl.commands.status import sections
from pdctl.core.explain import explain
from pdctl.core.findings import Culprit, Scope
from pdctl.core.seen import Seen
from tests.faults.replicas import Fleet, call, claim, fleet, signalled
from tests.persistence.etcd import cluster
from tests.service import Service, service
from tests.service import until as until_soon

LOOK_S = 1.0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """For all tests that leave both alive."""
    with fleet(tmp_path_factory.mktemp("two")) as made:
        agree(made)
        yield made


def agree(made: Fleet) -> Fleet:
    """Once they know of each other."""
    for each in made.replicas:
        until(lambda each=each: answering(each) == 1)  # type: ignore[misc]
    return made


def until(what: Callable[[], bool]) -> None:
    """As `tests.service.until`, ten times a second: an overview costs more than a look at a log."""

    def rested() -> bool:
        time.sleep(0.1)
        return what()

    until_soon(rested)


def overview(at: Service) -> Any:
    answer = call("GET", f"{at.url}/v1/overview", timeout_s=30.0)
    assert answer.status == 200, answer
    return answer.body


def answering(at: Service) -> int:
    return sum(each["answers"] for each in overview(at)["service"]["replicas"])


def tell(at: Service, instance: str, epoch: int, **more: Any) -> None:
    report = {"role": "prefill", "epoch": epoch, **more}
    answer = call("PUT", f"{at.url}/v1/instances/{instance}/ranks/tp0/report", report)
    assert answer.status == 200, answer


def report(at: Service, instance: str) -> dict[str, Any] | None:
    """Of its one rank."""
    found = [row for row in overview(at)["reports"] if row["instance"] == instance]
    assert len(found) <= 1
    return found[0] if found else None


def nbytes(at: Service, instance: str) -> int | None:
    found = report(at, instance)
    return None if found is None else int(found["bytes"])


def rank(at: Service, instance: str) -> int:
    """One, without a lease, that is its whole instance; its epoch."""
    answer = claim(at, instance, 0, size=1, ttl_s=None)
    assert answer.status == 200, answer
    return int(answer.body["epoch"])


def leave(at: Service, instance: str) -> None:
    assert call("DELETE", f"{at.url}/v1/instances/{instance}/ranks/tp0").status == 200


def events(at: Service, **wanted: str) -> list[dict[str, Any]]:
    query = "&".join(f"{name}={value}" for name, value in wanted.items())
    found: list[dict[str, Any]] = call("GET", f"{at.url}/v1/events?{query}").body["events"]
    return found


def knows(at: Service, instance: str, epoch: int) -> bool:
    rows = (call("GET", f"{at.url}/v1/instances/{instance}").body or {}).get("alive_seats", [])
    return any(row["epoch"] == epoch for row in rows)


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pdctl", *words], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def test_what_a_rank_told_one_registry_every_other_one_shows_with_its_age_and_no_longer_than_it_lives(
    two: Fleet,
) -> None:
    a, b = two.replicas
    epoch = rank(a, "shown")
    out = {"session": "10.0.0.9:16001", "state": "blocked", "cause": "timed_out", "sentence": "no answer"}
    store = {"attached": False, "sentence": "warming up: wait", "state": "warming"}
    tell(a, "shown", epoch, bytes=7, links=[out], store=store)
    until(lambda: report(b, "shown") is not None)
    here, there = report(a, "shown"), report(b, "shown")
    assert here is not None
    assert there is not None
    assert ("registry" in here, there["registry"], there["age_s"] >= 0) == (False, a.url, True)
    assert {**there, "age_s": 0} == {**here, "age_s": 0, "registry": a.url}
    told = overview(b)
    (row,) = told["service"]["replicas"]
    assert (row["url"], row["answers"], row["why"], told["reports_from"]) == (a.url, True, None, "all")
    assert row["reports"] >= 1

    shown = run("status", "--at", b.url)
    assert "10.0.0.9:16001" in shown
    assert "warming up" in shown
    found = json.loads(run("explain", "shown", "--at", b.url, "--json"))
    assert {"ejected_link", "store_not_ready"} <= {finding["what"] for finding in found["findings"]}

    tell(a, "shown", epoch, bytes=8)
    until(lambda: nbytes(b, "shown") == 8)
    leave(b, "shown")
    until(lambda: report(a, "shown") is None and report(b, "shown") is None)


def test_of_a_rank_that_turns_to_another_registry_the_last_word_is_shown_once(two: Fleet) -> None:
    a, b = two.replicas
    epoch = rank(a, "turns")
    until(lambda: knows(b, "turns", epoch))
    tell(a, "turns", epoch, bytes=1)
    until(lambda: nbytes(b, "turns") == 1)
    tell(b, "turns", epoch, bytes=2)
    assert nbytes(b, "turns") == 2, "what it was told itself later"
    until(lambda: nbytes(a, "turns") == 2)
    tell(a, "turns", epoch, bytes=3)
    assert nbytes(a, "turns") == 3
    until(lambda: nbytes(b, "turns") == 3)


def test_what_one_registry_has_seen_happen_every_other_one_tells_once(two: Fleet) -> None:
    a, b = two.replicas
    claim(a, "here", 0, size=2, ttl_s=None)
    assert claim(a, "here", 1, size=4, ttl_s=None).status == 400
    until(lambda: bool(events(b, kind="refused", instance="here")))
    (here,), (there,) = (events(each, kind="refused", instance="here") for each in two.replicas)
    assert (here["registry"], there["registry"]) == (None, a.url)
    assert {**here, "id": 0, "registry": None} == {**there, "id": 0, "registry": None}
    for at, other, instance in ((b, a, "there"), (a, b, "again"), (b, a, "at-last")):  # an echo would come before these
        claim(at, instance, 0, size=2, ttl_s=None)
        assert claim(at, instance, 1, size=4, ttl_s=None).status == 400
        until(lambda other=other, instance=instance: bool(events(other, kind="refused", instance=instance)))  # type: ignore[misc]
    for each in two.replicas:
        assert len(events(each, kind="refused", instance="here")) == 1
        assert len(events(each, kind="seated", instance="here")) == 1, "lives are known to both as it is"
    assert "tp_mismatch" in run("explain", "here", "--at", b.url, "--json")
    assert a.url in run("events", "--at", b.url)


def test_the_page_at_one_registry_follows_what_ranks_tell_another(two: Fleet) -> None:
    a, b = two.replicas
    epoch = rank(a, "watched")
    until(lambda: knows(b, "watched", epoch))
    with urllib.request.urlopen(f"{b.url}/v1/overview/watch", timeout=60.0) as stream:
        kinds = watched(stream)
        assert next(kind for kind, _ in kinds) == "overview"
        tell(a, "watched", epoch, bytes=5)
        first = next(data for kind, data in kinds if kind == "report" and data["instance"] == "watched")
        assert (first["bytes"], first["registry"]) == (5, a.url)
        leave(a, "watched")
        assert next(data for kind, data in kinds if kind == "report" and data.get("gone"))["instance"] == "watched"


def watched(stream: Any) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in stream:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def test_a_registry_that_hangs_costs_a_bounded_wait_once_is_named_and_comes_back(two: Fleet) -> None:
    a, b = two.replicas
    epoch = rank(a, "hung")
    tell(a, "hung", epoch, bytes=3)
    until(lambda: nbytes(b, "hung") == 3)
    looks: list[Any] = []

    def is_told() -> bool:
        looks.append(overview(b))
        return any(not row["answers"] for row in looks[-1]["service"]["replicas"])

    signalled(a, signal.SIGSTOP)
    try:
        until(is_told)
        began = time.monotonic()
        for _ in range(30):
            overview(b)
        assert time.monotonic() - began < 30 * LOOK_S, "who does not answer is waited for once"
    finally:
        signalled(a, signal.SIGCONT)
    (row,) = looks[-1]["service"]["replicas"]
    assert (row["url"], row["answers"]) == (a.url, False)
    assert "no answer" in row["why"] or "imeout" in row["why"]
    assert a.url in next(sections(looks[-1], b.url)).note
    silent = [each for each in explain(Seen(looks[-1]), Scope()) if each.what is Culprit.REPLICA_SILENT]
    assert [each.who for each in silent] == [f"registry {a.url}"]
    tell(a, "hung", epoch, bytes=4)
    until(lambda: nbytes(b, "hung") == 4)
    until(lambda: answering(b) == 1)


def test_a_registry_that_is_killed_is_forgotten_and_what_its_ranks_told_it_too(tmp_path: Path) -> None:
    with fleet(tmp_path) as made:
        a, b = agree(made).replicas
        epoch = rank(a, "p")
        tell(a, "p", epoch, bytes=3)
        until(lambda: nbytes(b, "p") == 3)
        a.kill()
        until(lambda: overview(b)["service"]["replicas"] == [])  # its lease in etcd is over
        assert report(b, "p") is None
        assert knows(b, "p", epoch), "the rank is no less alive for it"


def test_registries_with_tokens_ask_each_other_with_one(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("registry:rrrrrrrrrrrrrrrrrrrr\n")
    (tmp_path / "own").write_text("rrrrrrrrrrrrrrrrrrrr")
    with cluster(tmp_path) as etcd:
        words = ("--journal", etcd.url("fleet"), "--token-file", str(tmp_path / "tokens"))
        token = {"PDCTL_CLIENT__TOKEN_FILE": str(tmp_path / "own")}
        with service(tmp_path / "a.log", *words, **token) as a, service(tmp_path / "b.log", *words) as b:
            until(lambda: "another registry" in b.log())

            def seen(at: Service) -> list[Any]:
                request = urllib.request.Request(f"{at.url}/v1/overview")
                request.add_header("Authorization", "Bearer rrrrrrrrrrrrrrrrrrrr")
                with urllib.request.urlopen(request, timeout=30.0) as answer:
                    found: list[Any] = json.load(answer)["service"]["replicas"]
                return found

            until(lambda: [row["answers"] for row in seen(a)] == [True])
            (row,) = seen(b)
            assert not row["answers"]
            assert "401" in row["why"]
            signalled(b, signal.SIGTERM)
            until(lambda: seen(a) == [])  # who says goodbye is no neighbour any more
