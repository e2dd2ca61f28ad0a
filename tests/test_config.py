"""Every knob once, from four sources with one order of weight, and errors that name the knob and the fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdctl import config
from pdctl.errors import ConfigError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("PDCTL_", "SGLANG_", "MOONCAKE_", "MC_")) or name == "HOST_IP":
            monkeypatch.delenv(name)


def test_the_defaults_are_a_loopback_service_that_probes() -> None:
    settings = config.load()
    assert (settings.serve.host, settings.serve.port, settings.serve.journal) == ("127.0.0.1", 8998, "")
    assert settings.probe.enabled


def test_each_source_outweighs_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pdctl.toml"
    file.write_text("[probe]\ninterval_s = 1\nmax_interval_s = 11\nidle_timeout_s = 111\ndeadline_s = 0.5\n")
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_INTERVAL_S", "2")
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S", "22")
    monkeypatch.setenv("SGLANG_FAILED_SESSION_PROBE_IDLE_TIMEOUT_S", "222")
    monkeypatch.setenv("PDCTL_PROBE__INTERVAL_S", "3")
    monkeypatch.setenv("PDCTL_PROBE__MAX_INTERVAL_S", "33")
    probe = config.load({"probe.interval_s": "4"}, file=file).probe
    assert (probe.interval_s, probe.max_interval_s, probe.idle_timeout_s, probe.deadline_s) == (4, 33, 222, 0.5)


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"STATE_DIRECTORY": "/var/lib/pdctl:/var/lib/other", "XDG_STATE_HOME": "/x"}, Path("/var/lib/pdctl")),
        ({"XDG_STATE_HOME": "/x"}, Path("/x/pdctl")),
        ({"STATE_DIRECTORY": ""}, Path("~/.local/state/pdctl").expanduser()),
    ],
    ids=["systemd", "xdg", "home"],
)
def test_what_outlives_a_service_is_kept_where_its_user_keeps_such_things(
    environ: dict[str, str], directory: Path
) -> None:
    assert config.state_dir(environ) == directory


@pytest.mark.parametrize("off", ["0", "false", "False"])
@pytest.mark.parametrize("name", ["SGLANG_ENABLE_FAILED_SESSION_PROBE", "PDCTL_PROBE__ENABLED"])
def test_the_prober_is_switched_off_by_either_name(name: str, off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, off)
    assert not config.load().probe.enabled


@pytest.mark.parametrize("alias", config.ALIASES)
def test_every_alias_turns_a_knob_that_exists(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section, _, knob = config.ALIASES[alias].partition(".")
    default = getattr(getattr(config.load(), section), knob)
    given = {bool: str(int(not default)), type(None): "1", str: "10.9.8.7"}.get(type(default), "42")
    monkeypatch.setenv(alias, given)
    assert getattr(getattr(config.load(), section), knob) != default


def test_an_unknown_knob_is_refused_and_the_known_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCTL_PROBE__INTREVAL_S", "2")
    with pytest.raises(ConfigError, match=r"probe\.intreval_s is no setting: probe has .*interval_s"):
        config.load()


def test_an_unknown_section_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCTL_PORBE__INTERVAL_S", "2")
    with pytest.raises(ConfigError, match=r"PDCTL_PORBE__INTERVAL_S is no setting: .*probe"):
        config.load()


@pytest.mark.parametrize(
    ("knob", "value", "says"),
    [
        ("serve.port", "70000", "port is 70000"),
        ("serve.port", "http", r"serve\.port: .*integer.*PDCTL_SERVE__PORT"),
        ("serve.journal", "etcd://h", "etcd://HOST:PORT"),
        ("node.registry", "h:8998", "give http://host:port"),
        ("log.format", "xml", r"log\.format: .*'kv' or 'json'"),
    ],
)
def test_a_bad_value_is_refused_with_its_name(knob: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load({knob: value})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml cannot be used"):
        config.load(file=tmp_path / "nothing.toml")


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pdctl.toml"
    file.write_text("[serve]\nprot = 1\n")
    with pytest.raises(ConfigError, match=r"serve\.prot is no setting: serve has host, port"):
        config.load(file=file)
