#!/opt/pdctl/bin/python -IS
"""
Does the registry of this container live? Exit 0 yes, 1 no, with a sentence. The image's HEALTHCHECK.

Asks /livez and not /readyz: who restarts containers by this must not restart a registry that serves what it knows
while its journal is away. Starts in a twentieth of a second because it imports nothing of pdctl: so it learns the port
as the process did, from its flags and its environment, and not from a file of settings.
A container that runs another command is alive while that command runs.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

DEADLINE_S = 2.0


def main() -> str | None:
    """What is wrong, or None."""
    command = _command()
    if "serve" not in command:
        return None
    port = _said(command, "--port") or os.environ.get("PDCTL_SERVE__PORT") or "8998"
    host = _said(command, "--host") or os.environ.get("PDCTL_SERVE__HOST") or "127.0.0.1"
    secured = _said(command, "--tls-cert") or os.environ.get("PDCTL_ACCESS__TLS_CERT")
    url = f"{'https' if secured else 'http'}://{_dialled(host)}:{port}/livez"
    closed = _said(command, "--tls-client-ca") or os.environ.get("PDCTL_ACCESS__TLS_CLIENT_CA")
    return _ask(url, closed=bool(closed))


def _command() -> list[str]:
    """The words that the container's first process was started with."""
    with open("/proc/1/cmdline", "rb") as file:
        return file.read().decode(errors="replace").split("\0")


def _said(command: list[str], flag: str) -> str | None:
    """The value of `--flag value` or `--flag=value`; the last one holds, as it does for pdctl."""
    found = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _dialled(host: str) -> str:
    """Where a service that listens at `host` is reached from beside it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _ask(url: str, *, closed: bool) -> str | None:
    """`closed`: it wants a certificate, which a health check has not. That it turns us away shows that it lives."""
    unverified = ssl.create_default_context()  # this asks itself: whose certificate it is does not matter
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
    )
    try:
        with direct.open(url, timeout=DEADLINE_S):
            return None
    except urllib.error.HTTPError as error:
        return f"{url} answered {error.code}"
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if closed and isinstance(reason, ssl.SSLError | ConnectionResetError):
            return None
        return f"{url}: {reason}"


if __name__ == "__main__":
    sys.exit(main())
