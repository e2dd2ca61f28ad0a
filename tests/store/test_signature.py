"""What a wheel's set-up takes is read from its signature, whichever way that is stated."""

from __future__ import annotations

from typing import Any

import pytest

from pdctl.store.signature import parameters

OLD = """setup(self: mooncake.store.MooncakeDistributedStore, local_hostname: str, metadata_server: str, \
global_segment_size: int = 16777216, local_buffer_size: int = 16777216, protocol: str = 'tcp', rdma_devices: str = '', \
master_server_addr: str, engine: object = None) -> int
"""
NEW = """setup(*args, **kwargs)
Overloaded function.

1. setup(self: mooncake.store.MooncakeDistributedStore, local_hostname: str, config: dict[str, int] = {'a: b': 1}, \
replicas: mooncake.store.ReplicateConfig = <mooncake.store.ReplicateConfig object at 0x7f61a720d5b0>, \
enable_ssd_offload: bool = False, tenant_id: str = 'default: none') -> int

2. setup(self: mooncake.store.MooncakeDistributedStore, config: dict) -> int

Setup the store with a configuration dictionary.
Supported keys:
  local_hostname (required): Local hostname.
  quite_another: no parameter.
"""


def stated(text: str) -> Any:
    """A function with no signature but this docstring, as pybind makes them."""

    class Function:
        __doc__ = text
        __signature__ = "none"

        def __call__(self) -> None: ...

    return Function()


def test_of_a_pybind_function_the_docstring_tells() -> None:
    assert parameters(stated(OLD)) == {
        *("local_hostname", "metadata_server", "global_segment_size", "local_buffer_size", "protocol"),
        *("rdma_devices", "master_server_addr", "engine"),
    }


def test_of_several_overloads_the_one_with_names_counts_and_no_other_text() -> None:
    assert parameters(stated(NEW)) == {"local_hostname", "config", "replicas", "enable_ssd_offload", "tenant_id"}


def test_of_a_python_function_the_signature_tells() -> None:
    def setup(self: object, local_hostname: str, *, tenant_id: str = "") -> None: ...

    assert parameters(setup) == {"local_hostname", "tenant_id"}


@pytest.mark.parametrize("text", ["", "setup: does things", "setup(*args, **kwargs)"])
def test_where_nothing_tells_nothing_is_known(text: str) -> None:
    assert parameters(stated(text)) == frozenset()


def test_the_installed_wheel_tells() -> None:
    store = pytest.importorskip("mooncake.store")
    known = parameters(store.MooncakeDistributedStore.setup)
    assert known >= {"local_hostname", "master_server_addr", "enable_ssd_offload", "ssd_offload_path", "tenant_id"}
    assert "force" in parameters(store.MooncakeDistributedStore.remove)
