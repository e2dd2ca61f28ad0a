"""Who listens at a port of this host, and what processes were told: read from /proc, with nothing more given away."""

from __future__ import annotations

from pdctl import listeners
from tests.explain.planted import LISTENS, WAITS, program
from tests.ports import free_port


def test_the_holder_of_a_port_is_found_and_what_follows_its_program_is_not_shown() -> None:
    port = free_port()
    assert list(listeners.holders(port)) == []
    with program(LISTENS, str(port), "--token=secret") as child:
        [holder] = listeners.holders(port)
        assert port in listeners.ports()
        assert [ports for process, ports in listeners.listening() if process.pid == child.pid] == [{port}]
    assert holder.pid == child.pid
    assert "python" in holder.command
    assert "secret" not in str(holder)


def test_only_the_options_that_are_asked_for_are_read() -> None:
    with program(WAITS, "--token", "secret", "--port-of-mine", "81", "--port-of-mine=82") as child:
        said = [(flag, value) for who, flag, value in listeners.options(["--port-of-mine"]) if who.pid == child.pid]
        assert not any(who.pid == child.pid for who, _, _ in listeners.options(["--another"]))
    assert said == [("--port-of-mine", "81"), ("--port-of-mine", "82")]
