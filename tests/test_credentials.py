"""Files that are read again when they change: the new holds from then on, the broken changes nothing but the log."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
from cryptography.hazmat.primitives import serialization

from pdctl.core.access import Rules
from pdctl.credentials import (
    AccessSettings,
    Credentials,
    Reloaded,
    client_tls,
    follow,
    own_token,
    rules,
    server_tls,
)
from pdctl.errors import ConfigError

OLD, NEW = "the-old-token-of-old", "the-new-token-of-new"


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"prefill:{OLD}\n")
    return file


def holder(held: Reloaded[Rules], token: str) -> str | None:
    tokens = held.refresh().tokens
    assert tokens is not None
    return tokens.holder(token)


def test_a_changed_file_holds_from_the_next_look_on(token_file: Path) -> None:
    held = rules(AccessSettings(token_file=token_file))
    assert holder(held, OLD) == "prefill"
    token_file.write_text(f"prefill:{NEW}\n")
    assert holder(held, NEW) == "prefill"
    assert holder(held, OLD) is None


def test_a_broken_file_keeps_the_old_tokens_and_says_so_once(token_file: Path, lines: list[Any]) -> None:
    held = rules(AccessSettings(token_file=token_file))
    token_file.write_text(f"prefill {NEW}\n")
    for _ in range(3):
        assert holder(held, OLD) == "prefill"
    said = [line for line in lines if line["log_level"] == "error"]
    assert len(said) == 1
    assert "line 1: is not name:token" in said[0]["cause"]
    assert NEW not in str(said)
    assert held.trouble is not None
    token_file.write_text(f"prefill:{NEW}\nmore:{OLD}\n")
    assert holder(held, NEW) == "prefill"
    assert held.trouble is None


def test_a_file_that_is_gone_or_being_written_locks_nobody_out(token_file: Path) -> None:
    held = rules(AccessSettings(token_file=token_file))
    token_file.write_text("")
    assert holder(held, OLD) == "prefill"
    token_file.unlink()
    assert holder(held, OLD) == "prefill"
    assert held.trouble is not None
    token_file.write_text(f"prefill:{NEW}\n")
    assert holder(held, NEW) == "prefill"


def test_a_link_that_is_turned_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes mounts a secret: the file is a link into a folder, and the folder's link is replaced."""
    for name, token in (("v1", OLD), ("v2", NEW)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens").write_text(f"prefill:{token}\n")
        os.utime(tmp_path / name / "tokens", (1e9, 1e9))
    (tmp_path / "data").symlink_to("v1")
    held = rules(AccessSettings(token_file=tmp_path / "data" / "tokens"))
    assert holder(held, OLD) == "prefill"
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").replace(tmp_path / "data")
    assert holder(held, NEW) == "prefill"


def test_what_has_not_changed_is_not_read_again(token_file: Path) -> None:
    reads: list[int] = []
    held = Reloaded("tokens", [token_file], lambda: reads.append(1))
    for _ in range(5):
        held.refresh()
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such file"), (b"", "no token in it"), (b"\xff\xfe", "is no text"), (b"#" * (1 << 20 | 1), "more than")],
)
def test_the_first_reading_must_succeed(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?i){says}") as refusal:
        rules(AccessSettings(token_file=file))
    assert str(file) in str(refusal.value)


def change(file: Path, text: str) -> None:
    file.write_text(text)


async def test_a_follower_sees_a_change_without_being_asked(token_file: Path) -> None:
    held = rules(AccessSettings(token_file=token_file))
    asked: asyncio.Queue[None] = asyncio.Queue()
    go = asyncio.Event()

    async def turn(_: float) -> None:
        asked.put_nowait(None)
        await go.wait()
        go.clear()

    follower = asyncio.create_task(follow(held, sleep=turn))
    await asked.get()
    change(token_file, f"prefill:{NEW}\n")
    go.set()
    await asked.get()
    tokens = held.value.tokens
    assert tokens is not None
    assert tokens.holder(NEW) == "prefill"
    follower.cancel()
    await asyncio.wait({follower})


# --- what a client shows


def test_a_client_reads_its_token_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{OLD}\n")
    shown = own_token(Credentials(token_file=file))
    assert shown.value == OLD
    file.write_text(f"{NEW}\n")
    assert shown.refresh() == NEW


def test_no_repr_shows_a_token() -> None:
    assert OLD not in repr(Credentials(token=OLD))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"token": "short"}, "5 characters"),
        ({"token": OLD, "token_file": Path("/t")}, "both given"),
        ({"tls_key": Path("/k")}, "without tls_cert"),
    ],
)
def test_credentials_that_contradict_each_other_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Credentials(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"trust": "everybody"}, "everybody"),
        ({"open_paths": "metrics"}, "no path"),
        ({"tls_key": Path("/k")}, "without tls_cert"),
        ({"tls_client_ca": Path("/c")}, "without tls_cert"),
    ],
)
def test_access_that_cannot_be_meant_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AccessSettings(**given)


# --- certificates


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(trustme.CA(), tmp_path)


def write_pair(ca: trustme.CA, folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """A certificate of `ca` for `host`, and its key, in `folder`."""
    issued, cert, key = ca.issue_cert(host), folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return cert, key


def test_a_half_changed_pair_keeps_the_old_one_until_the_key_is_there(
    pair: tuple[Path, Path], tmp_path: Path, lines: list[Any]
) -> None:
    cert, key = pair
    held = server_tls(AccessSettings(tls_cert=cert, tls_key=key))
    assert held is not None
    first = held.value
    (tmp_path / "new").mkdir()
    new_cert, new_key = write_pair(trustme.CA(), tmp_path / "new")
    new_cert.replace(cert)
    assert held.refresh() is first
    assert "key values mismatch" in str(held.trouble)
    new_key.replace(key)
    assert held.refresh() is not first
    assert held.trouble is None


def test_a_key_with_a_passphrase_does_not_ask_the_terminal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(pair[1].read_bytes(), password=None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"nobody types it"),
        )
    )
    with pytest.raises(ConfigError, match="has a passphrase"):
        server_tls(AccessSettings(tls_cert=pair[0], tls_key=locked))


@pytest.mark.parametrize("broken", ["gone", "empty", "garbage"])
def test_a_certificate_that_cannot_be_used_is_named(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    if broken != "gone":
        file.write_text("" if broken == "empty" else "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match=f"certificate {file} cannot be used"):
        server_tls(AccessSettings(tls_cert=file))
    with pytest.raises(ConfigError, match=f"authorities {file} cannot be used"):
        client_tls(Credentials(tls_ca=file))


def test_a_client_verifies_whom_it_speaks_to(pair: tuple[Path, Path]) -> None:
    context = client_tls(Credentials(tls_ca=pair[0])).value
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
