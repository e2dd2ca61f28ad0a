"""The whole matrix of configurations: three sources, each good, bad, missing, unknown, and what stands above them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.kvstore import (
    GIB,
    KEYS,
    NOT_OURS,
    PROTOCOLS,
    VARIABLES,
    KVStoreConfig,
    Resolved,
    StoreFile,
    StoreRank,
    parse_size,
    resolve,
    set_up,
)
from pdctl.errors import ConfigError

MASTER = "master_server_address"
PATH = "/etc/mooncake.json"
SOURCES = ("extra", "extra text", "file", "environment")
GOOD: Mapping[str, tuple[Any, Any]] = {
    "master_server_address": ("10.0.0.9:50051", "10.0.0.9:50051"),
    "client_server_address": ("[fd00::1]:50052", "[fd00::1]:50052"),
    "metadata_server": ("http://10.0.0.9:8080/metadata", "http://10.0.0.9:8080/metadata"),
    "global_segment_size": ("512MiB", 512 << 20),
    "local_buffer_size": (1 << 25, 1 << 25),
    "protocol": ("tcp", "tcp"),
    "device_name": ('{"0": "mlx5_0", "1": "mlx5_1"}', {0: "mlx5_0", 1: "mlx5_1"}),
    "master_metrics_port": ("9004", 9004),
    "check_server": ("true", True),
    "standalone_storage": ("no", False),
    "tenant_id": (" acme ", "acme"),
}
BAD: Mapping[str, tuple[Any, ...]] = {
    "master_server_address": ("10.0.0.9", "0.0.0.0:50051", "a:b", "h:70000", "[::]:1"),
    "client_server_address": ("nowhere", "*:1"),
    "global_segment_size": ("4 parsecs", "gb", "-1", "1e9"),
    "local_buffer_size": ("much",),
    "protocol": ("bogus", "TCP"),
    "device_name": ("{not json", '{"a": "mlx5_0"}', '{"0": 5}', "{}x"),
    "master_metrics_port": ("http", "70000", "1.5"),
    "check_server": ("perhaps",),
    "standalone_storage": ("2",),
    "enable_ssd_offload": ("ja",),
    "local_hostname": ("0.0.0.0", "::", "a b", "10.0.0.1,10.0.0.2"),
}
NEVER_IN_THE_ENVIRONMENT = ("local_buffer_size",)


def given_as(source: str, values: Mapping[str, Any]) -> Resolved:
    """What comes of `values` in that source, with nothing in the others."""
    if source == "extra":
        return resolve(dict(values))
    if source == "extra text":
        return resolve(json.dumps(dict(values)))
    if source == "file":
        return resolve(file=StoreFile(PATH, json.dumps(dict(values))))
    variables = {key: name for name, key in VARIABLES.items()}
    return resolve(environ={variables.get(key, key): str(value) for key, value in values.items()})


def named(source: str, key: str) -> str:
    variables = {name: variable for variable, name in VARIABLES.items()}
    return {
        "extra": f"{key} in extra config",
        "extra text": f"{key} in extra config",
        "file": f"{key} in file {PATH}",
        "environment": f"{variables.get(key, key)} in the environment",
    }[source]


def fitting(source: str, table: Mapping[str, Any]) -> list[str]:
    return [key for key in table if source != "environment" or key not in NEVER_IN_THE_ENVIRONMENT]


CELLS = [(source, key) for source in SOURCES for key in fitting(source, GOOD)]


@pytest.mark.parametrize(("source", "key"), CELLS, ids=lambda text: str(text))
def test_a_good_value_is_taken_and_remembers_where_it_came_from(source: str, key: str) -> None:
    raw, meant = GOOD[key]
    found = given_as(source, {MASTER: "h:1", key: raw})
    assert getattr(found.config, key) == meant
    assert found.sources[key] in named(source, key)
    others = set(KEYS) - {key, MASTER}
    assert {found.sources[other] for other in others} == {"default"}
    assert found.config == replace(KVStoreConfig(master_server_address="h:1"), **{key: meant})


BAD_CELLS = [(source, key, raw) for source in SOURCES for key in fitting(source, BAD) for raw in BAD[key]]


@pytest.mark.parametrize(("source", "key", "raw"), BAD_CELLS, ids=lambda text: str(text))
def test_a_bad_value_is_an_error_that_names_key_source_and_fix(source: str, key: str, raw: str) -> None:
    with pytest.raises(ConfigError) as caught:
        given_as(source, {MASTER: "h:1", key: raw})
    said = str(caught.value)
    name = named(source, key)
    assert key in said or name.split(" in ")[0] in said
    assert name.split(" in ")[1].removeprefix("the ") in said
    assert re.search(r": .*(give|mend|write|put|bracket)", said), said


@pytest.mark.parametrize("source", SOURCES)
def test_an_unknown_key_is_an_error_that_guesses_what_was_meant(source: str) -> None:
    wrong = "MOONCAKE_PROTOCOLL" if source == "environment" else "protocoll"
    right = "MOONCAKE_PROTOCOL" if source == "environment" else "protocol"
    with pytest.raises(ConfigError, match=f"{wrong}.*is {right} meant"):
        given_as(source, {MASTER: "h:1", wrong: "tcp"})


@pytest.mark.parametrize("source", SOURCES)
def test_an_unknown_key_that_resembles_nothing_lists_what_there_is(source: str) -> None:
    wrong = "MOONCAKE_ZZZ" if source == "environment" else "zzz"
    with pytest.raises(ConfigError, match=f"{wrong}.*remove it; there are .*(MOONCAKE_MASTER|{MASTER})"):
        given_as(source, {MASTER: "h:1", wrong: "tcp"})


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({}, "MOONCAKE_MASTER in the environment"),
        ({"extra": {}}, "MOONCAKE_MASTER in the environment"),
        ({"extra": ""}, "MOONCAKE_MASTER in the environment"),
        ({"extra": {"protocol": "tcp"}}, "MOONCAKE_MASTER in the environment"),
        ({"environ": {"MOONCAKE_MASTER": "", "MOONCAKE_PROTOCOL": "tcp"}}, "MOONCAKE_MASTER in the environment"),
        ({"file": StoreFile(PATH, "{}")}, f"{MASTER} in file {PATH}"),
        ({"file": StoreFile(PATH, "{}"), "environ": {"MOONCAKE_MASTER": "h:1"}}, f"{MASTER} in file {PATH}"),
        ({"extra": {"client_server_address": "h:1"}}, f"{MASTER} in extra config"),
        ({"environ": {"MOONCAKE_CLIENT": "h:1"}}, "MOONCAKE_MASTER in the environment"),
    ],
    ids=str,
)
def test_a_missing_master_is_an_error_that_says_where_it_was_looked_for(arguments: Any, where: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(where) + " is not given"):
        resolve(**arguments)


@pytest.mark.parametrize("source", SOURCES)
def test_a_path_without_the_switch_is_refused_and_so_is_the_switch_without_a_path(source: str) -> None:
    with pytest.raises(ConfigError, match=r"ssd_offload_path .*: is given but enable_ssd_offload is off: switch it on"):
        given_as(source, {MASTER: "h:1", "ssd_offload_path": "/ssd"})
    with pytest.raises(ConfigError, match=r"ssd_offload_path .*: is not given but enable_ssd_offload is on"):
        given_as(source, {MASTER: "h:1", "enable_ssd_offload": "yes"})
    with pytest.raises(ConfigError, match="relative"):
        given_as(source, {MASTER: "h:1", "enable_ssd_offload": "yes", "ssd_offload_path": "ssd"})
    both = given_as(source, {MASTER: "h:1", "enable_ssd_offload": "yes", "ssd_offload_path": "/ssd"}).config
    assert (both.enable_ssd_offload, both.ssd_offload_path) == (True, "/ssd")


@pytest.mark.parametrize("source", SOURCES)
def test_standalone_storage_needs_its_client_and_no_master(source: str) -> None:
    found = given_as(source, {"client_server_address": "h:1", "standalone_storage": "1"})
    assert found.config.standalone_storage
    with pytest.raises(ConfigError, match="client_server_address"):
        given_as(source, {MASTER: "h:1", "standalone_storage": "1"})


# --- precedence, as SGLang's


FILE = StoreFile(PATH, json.dumps({MASTER: "file:1", "tenant_id": "of-the-file"}))
ENVIRON = {"MOONCAKE_MASTER": "env:1", "MOONCAKE_TENANT_ID": "of-the-environment", "MOONCAKE_DEVICE": "mlx5_9"}


def test_one_source_is_taken_whole_and_extra_config_comes_first() -> None:
    found = resolve({MASTER: "extra:1"}, FILE, ENVIRON)
    assert (found.config.master_server_address, found.config.tenant_id) == ("extra:1", "default")
    assert found.config.device_name == ""


def test_without_a_master_in_extra_config_the_file_is_taken_and_what_is_lost_is_said() -> None:
    found = resolve({"tenant_id": "lost"}, FILE, ENVIRON)
    assert (found.config.master_server_address, found.config.tenant_id) == ("file:1", "of-the-file")
    assert any("tenant_id are not used" in warning for warning in found.warnings)


def test_without_a_file_the_environment_is_taken() -> None:
    found = resolve(None, None, ENVIRON)
    assert (found.config.master_server_address, found.config.tenant_id) == ("env:1", "of-the-environment")


@pytest.mark.parametrize(
    ("arguments", "name", "source"),
    [
        ({"extra": {MASTER: "h:1"}}, "localhost", "default"),
        ({"extra": {MASTER: "h:1", "local_hostname": "a"}}, "a", "extra config"),
        ({"extra": {MASTER: "h:1", "local_hostname": "a"}, "environ": {"LOCAL_HOSTNAME": "b"}}, "b", "LOCAL_HOSTNAME"),
        (
            {
                "extra": {MASTER: "h:1", "local_hostname": "a"},
                "environ": {"LOCAL_HOSTNAME": "b", "MOONCAKE_LOCAL_HOSTNAME": "c"},
            },
            "c",
            "MOONCAKE_LOCAL_HOSTNAME",
        ),
        ({"file": FILE, "environ": {"LOCAL_HOSTNAME": "b"}}, "b", "LOCAL_HOSTNAME"),
        ({"environ": {**ENVIRON, "MOONCAKE_LOCAL_HOSTNAME": "c"}, "local_hostname": "d"}, "d", "the process"),
    ],
)
def test_the_local_host_name_is_the_process_s_first(arguments: Any, name: str, source: str) -> None:
    found = resolve(**arguments)
    assert found.config.local_hostname == name
    assert found.sources["local_hostname"].startswith(source)


def test_the_protocol_of_the_environment_counts_where_the_source_is_silent() -> None:
    environ = {"MOONCAKE_PROTOCOL": "efa"}
    assert resolve({MASTER: "h:1"}, None, environ).config.protocol == "efa"
    assert resolve({MASTER: "h:1", "protocol": "tcp"}, None, environ).config.protocol == "tcp"
    assert resolve(None, FILE, environ).config.protocol == "efa"
    with pytest.raises(ConfigError, match="protocol from MOONCAKE_PROTOCOL in the environment: 'x'"):
        resolve({MASTER: "h:1"}, None, {"MOONCAKE_PROTOCOL": "x"})


def test_a_path_of_the_environment_counts_with_offload_on_as_it_does_for_the_wheel() -> None:
    environ = {"MOONCAKE_OFFLOAD_FILE_STORAGE_PATH": "/ssd"}
    assert resolve({MASTER: "h:1", "enable_ssd_offload": True}, None, environ).config.ssd_offload_path == "/ssd"
    assert resolve({MASTER: "h:1"}, None, environ).config.ssd_offload_path is None


# --- what is no mistake


def test_what_sglang_reads_from_the_same_extra_config_is_no_mistake() -> None:
    assert resolve({MASTER: "h:1", **dict.fromkeys(NOT_OURS, 1)}).config == resolve({MASTER: "h:1"}).config


@pytest.mark.parametrize(
    "name",
    [
        *("MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS", "MOONCAKE_STORE_CHECKSUM", "MOONCAKE_CONFIG_PATH"),
        *("MOONCAKE_MASTER_SERVICE_HOST", "MOONCAKE_MASTER_SERVICE_PORT", "MOONCAKE_MASTER_PORT"),
        *("MOONCAKE_MASTER_PORT_50051_TCP", "MOONCAKE_MASTER_PORT_50051_TCP_ADDR", "MC_LOG_LEVEL", "PATH"),
    ],
)
def test_variables_of_the_wheel_and_of_kubernetes_are_no_mistake(name: str) -> None:
    assert resolve(environ={"MOONCAKE_MASTER": "h:1", name: "tcp://10.0.0.1:50051"})


def test_a_null_in_json_says_nothing() -> None:
    assert resolve(json.dumps({MASTER: "h:1", "protocol": None, "ssd_offload_path": None})).config.protocol == "rdma"


@pytest.mark.parametrize("text", ["[]", "5", "{", "not json"])
def test_what_is_no_object_is_an_error_that_names_the_source(text: str) -> None:
    with pytest.raises(ConfigError, match="extra config"):
        resolve(text)
    with pytest.raises(ConfigError, match=f"file {PATH}"):
        resolve(None, StoreFile(PATH, text))


def test_a_loopback_name_beside_a_far_master_is_warned_of() -> None:
    assert "dial themselves" in resolve({MASTER: "10.0.0.9:1"}).warnings[0]
    assert resolve({MASTER: "10.0.0.9:1", "local_hostname": "10.0.0.1"}).warnings == ()
    assert resolve({MASTER: "127.0.0.1:1"}).warnings == ()


def test_a_config_made_by_hand_is_held_to_the_same() -> None:
    with pytest.raises(ConfigError, match="protocol"):
        KVStoreConfig(master_server_address="h:1", protocol="bogus")
    with pytest.raises(ConfigError, match="master_server_address"):
        KVStoreConfig()


def test_every_protocol_that_is_listed_is_taken() -> None:
    for protocol in PROTOCOLS:
        assert resolve({MASTER: "h:1", "protocol": protocol}).config.protocol == protocol


# --- sizes


@pytest.mark.parametrize(
    ("raw", "nbytes"),
    [
        *((4294967296, 4 * GIB), ("4294967296", 4 * GIB), ("4gb", 4 * GIB), ("4GB", 4 * GIB), (" 4 Gb ", 4 * GIB)),
        *(("512MiB", 512 << 20), ("512mb", 512 << 20), ("1.5g", 3 << 29), ("64k", 1 << 16), ("1tb", 1 << 40)),
        *((0, 0), ("0", 0), ("7b", 7)),
    ],
)
def test_sizes_are_read_as_people_write_them(raw: object, nbytes: int) -> None:
    assert parse_size(raw) == nbytes


@pytest.mark.parametrize("raw", ["", "gb", "4 gigs", "-4gb", -1, 4.5, None, True, "4gbgb", "0x10", "٤gb"])
def test_what_is_no_size_is_refused(raw: object) -> None:
    with pytest.raises(ValueError, match="give bytes"):
        parse_size(raw)


@given(st.integers(0, 1 << 50), st.sampled_from(["", "k", "m", "g"]))
def test_a_whole_size_is_exact_whatever_its_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}b") == number << {"": 0, "k": 10, "m": 20, "g": 30}[unit]


# --- the set-up of one rank


WHEEL = frozenset({"local_hostname", "engine", "enable_ssd_offload", "ssd_offload_path", "tenant_id"})
OLD_WHEEL = frozenset({"local_hostname", "engine"})


def config(**changes: Any) -> KVStoreConfig:
    return KVStoreConfig(master_server_address="h:1", protocol="tcp", **changes)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (8, 1), (4, 2)])
def test_the_segment_is_divided_over_tp_and_pp(tp: int, pp: int) -> None:
    plan, _ = set_up(config(), StoreRank(tp=tp - 1, pp=pp - 1, tp_size=tp, pp_size=pp), WHEEL)
    assert plan.segment_nbytes == 4 * GIB // (tp * pp)


def test_a_segment_too_small_to_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing for each rank"):
        set_up(config(global_segment_size=7), StoreRank(tp_size=8), WHEEL)
    assert set_up(config(global_segment_size=0), StoreRank(tp_size=8), WHEEL)[0].segment_nbytes == 0


def test_each_rank_has_the_device_that_is_meant_for_it() -> None:
    of = config(device_name={0: "mlx5_0", 3: "mlx5_3"})
    assert of.device_of(StoreRank(tp=3, tp_size=4)) == "mlx5_3"
    with pytest.raises(ConfigError, match="none for TP rank 1, only for 0, 3"):
        of.device_of(StoreRank(tp=1, tp_size=4))


def test_a_wheel_that_knows_all_gets_all() -> None:
    wanted = config(enable_ssd_offload=True, ssd_offload_path="/ssd", tenant_id="acme")
    plan, left_out = set_up(wanted, StoreRank(), WHEEL)
    assert plan.options == {"enable_ssd_offload": True, "ssd_offload_path": "/ssd", "tenant_id": "acme"}
    assert left_out == ()


def test_what_is_not_asked_for_is_not_passed() -> None:
    assert set_up(config(), StoreRank(), WHEEL)[0].options == {}


@pytest.mark.parametrize("known", [OLD_WHEEL, OLD_WHEEL | {"enable_ssd_offload"}], ids=["neither", "only the switch"])
def test_an_old_wheel_is_spared_offload_whole_and_it_is_said(known: frozenset[str]) -> None:
    plan, left_out = set_up(config(enable_ssd_offload=True, ssd_offload_path="/ssd"), StoreRank(), known)
    assert plan.options == {}
    assert "ssd_offload_path" in left_out


def test_a_tenant_that_the_wheel_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no tenant_id"):
        set_up(config(tenant_id="acme"), StoreRank(), OLD_WHEEL)
    with pytest.raises(ConfigError, match="has no tenant_id"):
        set_up(config(tenant_id="acme", enable_ssd_offload=True, ssd_offload_path="/s"), StoreRank(), OLD_WHEEL)


@pytest.mark.parametrize("wrong", [{"tp": -1}, {"tp": 1}, {"pp": 2, "pp_size": 2}])
def test_a_rank_outside_of_its_size_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="ranks count from 0"):
        StoreRank(**wrong)


def test_every_key_has_a_parser_and_is_shown() -> None:
    assert set(asdict(config())) == set(KEYS) == set(resolve({MASTER: "h:1"}).sources)
