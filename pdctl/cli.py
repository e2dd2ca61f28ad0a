"""
Flags -> Settings -> run. The only place that prints or exits.

    0   done
    1   the work was done and something in it failed (a check of the demo, a probe), or another process has replaced it
    2   wrong usage or settings; nothing was started
    69  a service that was needed cannot be had (the registry, the engine, the port)
    130 stopped by SIGINT
    141 nobody reads any more what is printed
    143 stopped by SIGTERM before the work was whole; what runs until it is stopped exits 0
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import structlog
import uvloop

from pdctl import config, handed, inquiry, journals, logs, node, succession
from pdctl.beside import beside
from pdctl.commands.base import Commands, add_command, add_credentials, add_service, always, never
from pdctl.config import Settings
from pdctl.core.kvstore import Resolved
from pdctl.core.standing import Depth, State
from pdctl.device.open import open_device
from pdctl.errors import CallerError, ConfigError, NotReady, OperatorError, PdctlError, Superseded, Unreachable
from pdctl.kvstore import check_store, open_store
from pdctl.tracing import open_tracing

log = structlog.get_logger(__name__)

USAGE, UNAVAILABLE = 2, 69
_TRIAL_NBYTES = 64 << 20  # `store warmup` is gone in a second, and what others put there meanwhile with it
_CLOSING_S = 0.9  # from the end of an engine to the end of the process that moved for it


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser(given[0] if given else None).parse_args(given)
    args.argv = given
    flags = {name: value for name, value in vars(args).items() if "." in name}
    try:
        settings = config.load(flags, file=args.config)
        logs.configure(settings.log)
        with asyncio.Runner(loop_factory=args.loop) as runner:
            status = runner.run(_until_told_to_stop(args.run(settings, args), lasting=args.lasts(settings)))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read us has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except PdctlError as error:
        print(f"pdctl: {error}", file=sys.stderr)
        return _status(error)


def _status(error: PdctlError) -> int:
    if isinstance(error, Superseded):
        return 1
    if isinstance(error, ConfigError | CallerError):
        return USAGE
    return UNAVAILABLE if isinstance(error, OperatorError | Unreachable | NotReady) else 1


async def _until_told_to_stop(work: Awaitable[int], *, lasting: bool) -> int:
    """Await `work`; SIGTERM ends it in order, as SIGINT does by asyncio's handler. `lasting`: stopping is its end."""
    task = asyncio.ensure_future(work)
    told = asyncio.Event()

    def stop() -> None:
        told.set()
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if not told.is_set():
            raise
        return 0 if lasting else 128 + signal.SIGTERM


def parser(asked: str | None = None) -> argparse.ArgumentParser:
    """All commands; a flag's dest is the dotted name of the knob that it turns.

    Where `asked` is one of those here, what stands in files of its own is left out: a sidecar need not wait for what
    draws tables.
    """
    top = argparse.ArgumentParser(
        prog="pdctl", description="The control plane for prefill/decode disaggregated LLM serving."
    )
    top.add_argument("--version", action="version", version=f"pdctl {version('pdctl')}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    top.set_defaults(parser=parser)
    here = (_add_serve, _add_register, _add_agent, _add_sessions, _add_probe, _add_store, _add_journal, _add_demo)
    for add in here:
        add(commands)
    if asked not in commands.choices:
        from pdctl.commands import completion, conformance, doctor, drain, events, explain, status

        for each in (completion, conformance, doctor, drain, events, explain, status):
            each.add(commands)
    return top


def _add_serve(commands: Commands) -> None:
    """`pdctl serve`: the sidecar."""
    command = add_command(commands, "serve", _serve, always, "serve the bootstrap registry, and what stands beside it")
    command.set_defaults(loop=uvloop.new_event_loop)
    command.add_argument("--host", dest="serve.host", help="address to listen at (127.0.0.1)")
    command.add_argument("--port", dest="serve.port", help="port to listen at; 0 takes any free one (8998)")
    command.add_argument(
        "--witness-tcp",
        dest="witness.tcp",
        action="store_true",
        help="tell by their control ports whether stock ranks live",
    )
    command.add_argument(
        "--witness-http", dest="witness.http_url", help="stock engines' health: http://{host}:{http_port}/health"
    )
    command.add_argument(
        "--listen", dest="serve.listen", action="append", metavar="NAME=HOST:PORT",
        help="a further address, which speaks for the instance NAME; may be given again",
    )  # fmt: skip
    command.add_argument(
        "--map-host", dest="serve.map_host", action="append", metavar="NAME=HOST",
        help="a host name that stands for the instance NAME, or '*.suffix' for its first label; may be given again",
    )  # fmt: skip
    command.add_argument("--vllm-sizes", dest="vllm.sizes", help="ranks of every vLLM prefill, as dp=1,tp=8,pp=1")
    _add_access(command)
    command.add_argument(
        "--journal",
        dest="serve.journal",
        help="where the rows live: sqlite:PATH, etcd://HOST:PORT or memory: (a file for this port)",
    )


def _add_access(command: argparse.ArgumentParser) -> None:
    """Who may speak to `pdctl serve`: docs/security.md."""
    command.add_argument(
        "--trust", dest="access.trust", help="networks that need no token, by commas; or private (default), any"
    )
    command.add_argument("--token-file", dest="access.token_file", help="name:token a line; with it, /v1 needs a token")
    command.add_argument("--tls-cert", dest="access.tls_cert", help="certificate chain, PEM; with it, TLS only")
    command.add_argument("--tls-key", dest="access.tls_key", help="its key, PEM, where the chain's file has none")
    command.add_argument("--tls-client-ca", dest="access.tls_client_ca", help="clients need a certificate of these")


def _add_register(commands: Commands) -> None:
    """`pdctl register`: for an engine that has no client of its own."""
    command = add_command(
        commands, "register", _register, _if_held, "register one prefill rank for an engine that cannot"
    )
    command.add_argument("--registry", dest="node.registry", help="the registry's URL (http://127.0.0.1:8998)")
    add_credentials(command)
    command.add_argument("--rank-host", dest="rank.host", help="where decode reaches the rank's control port")
    command.add_argument("--rank-port", dest="rank.port", help="the rank's control port (ZMQ)")
    for axis in ("tp", "cp", "dp", "pp"):
        command.add_argument(f"--{axis}-size", dest=f"rank.{axis}_size", help=f"{axis} ranks in the instance (1)")
        command.add_argument(f"--{axis}-rank", dest=f"rank.{axis}_rank", help="this rank among them (0)")
    command.add_argument("--page-size", dest="rank.page_size", help="tokens in a KV page (1)")
    command.add_argument("--kv-cache-dtype", dest="rank.kv_cache_dtype", help="as the engine names it (auto)")
    command.add_argument("--prefill-http-port", dest="rank.prefill_http_port", help="the engine's own API port")
    command.add_argument(
        "--hold",
        dest="rank.hold",
        action="store_true",
        help="stay and hold a lease: the rank is known to live as long as this does",
    )
    command.add_argument("--instance", dest="node.instance", help="the instance that the rank belongs to (default)")
    command.add_argument("--ttl", dest="node.ttl_s", help="seconds of the lease, renewed every third of it (15)")
    command.add_argument("--on-exhaustion", dest="node.exhaustion", help="raise (default), exit or keep-trying")
    command.add_argument("--max-attempts", dest="retry.max_attempts", help="give up after so many (never)")
    command.add_argument("--give-up-after", dest="retry.give_up_after_s", help="give up after so many seconds (never)")


def _add_agent(commands: Commands) -> None:
    """`pdctl agent`: moves KV for engines in other processes."""
    command = add_command(commands, "agent", _agent, always, "move KV for engines in other processes: docs/agent.md")
    command.set_defaults(loop=uvloop.new_event_loop)  # the others move little over sockets of ours
    command.add_argument(
        "--socket", dest="agent.sockets", action="append", metavar="PATH",
        help="where an engine hands its pool over; give one for each rank (agent.sock in the runtime directory)",
    )  # fmt: skip
    command.add_argument(
        "--user", dest="agent.users", action="append", metavar="UID",
        help="a user who may speak to it besides our own; may be given again",
    )  # fmt: skip
    command.add_argument("--registry", dest="node.registry", help="the registry's URL (http://127.0.0.1:8998)")
    command.add_argument("--host", dest="node.host", help="our address, at which peers reach the ranks (127.0.0.1)")
    command.add_argument(
        "--accelerator", dest="node.accelerator", metavar="DEVICE",
        help="cpu, cuda:N, cuda:GPU-<uuid> or npu:N: the only device whose pools are taken (whichever is handed over)",
    )  # fmt: skip
    command.add_argument("--instance", dest="node.instance", help="of prefills whose engine names none (default)")
    command.add_argument("--ttl", dest="node.ttl_s", help="seconds of the lease, renewed every third of it (15)")
    add_credentials(command)
    command.add_argument("--inherited", default=None, help=argparse.SUPPRESS)  # from succession.py, to its child


def _add_sessions(commands: Commands) -> None:
    """`pdctl sessions`: which links are trusted, and why the others are not."""
    command = add_command(
        commands, "sessions", _sessions, never, "list transfer sessions: which are trusted, and why not"
    )
    add_service(command, "the service that keeps the table (http://127.0.0.1:8998)")
    command.add_argument("--state", choices=[state.value for state in State], help="only those that stand so")
    command.add_argument("--lift", metavar="SESSION", help="trust this one again, by hand, whatever is held against it")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.set_defaults(state=None, lift=None, json=False)


def _add_probe(commands: Commands) -> None:
    """`pdctl probe SESSION`: does it work? 0: yes; 1: no, and why."""
    command = add_command(commands, "probe", _probe, never, "ask whether a transfer session works; exit 0 yes, 1 no")
    command.add_argument("session", help="ip:port of the peer's engine")
    add_service(command, "let this service ask, which has the link; else we ask ourselves")
    command.add_argument("--depth", choices=[depth.name.lower() for depth in Depth], help="what must be proven (data)")
    command.add_argument("--deadline", type=float, metavar="SECONDS", help="for the answer (3)")
    command.add_argument(
        "--host", dest="node.host", help="our own address, under which the peer reaches us (127.0.0.1)"
    )
    command.set_defaults(depth="data", deadline=3.0)


def _add_journal(commands: Commands) -> None:
    """`pdctl journal copy FROM TO`: to another store, with every epoch."""
    journal = commands.add_parser("journal", help="what a registry keeps", description="What a registry keeps.")
    actions: Commands = journal.add_subparsers(metavar="ACTION", required=True)
    what = "put all that a journal keeps into an empty one, for a registry that moves; stop the registry first"
    command = add_command(actions, "copy", _copy_journal, never, what)
    command.add_argument("source", metavar="FROM", help="sqlite:PATH or etcd://HOST:PORT[,HOST:PORT...][?prefix=NAME]")
    command.add_argument("target", metavar="TO", help="the same; it has to be empty")


def _add_store(commands: Commands) -> None:
    """`pdctl store config|check|warmup`: Mooncake's shared store (docs/store.md)."""
    what = "Mooncake's shared store: what is configured, whether it can be had, whether it works"
    top = commands.add_parser("store", help=what, description=what)
    inner = top.add_subparsers(metavar="COMMAND", required=True)
    for name, run, about in (
        ("config", _store_config, "print the store's settings, and where each came from"),
        ("check", _store_check, "ask the master and try a set-up that gives no memory; exit 0 when both answer"),
        ("warmup", _store_warmup, "set up, put a key, read it back, remove it; exit 0 when the store works"),
    ):
        command = add_command(inner, name, run, never, about)
        command.add_argument("--extra-config", dest="store.extra", metavar="JSON", help="SGLang's; or @FILE with it")
        command.add_argument(
            "--store-config", dest="store.file", metavar="FILE", help="JSON ($SGLANG_HICACHE_MOONCAKE_CONFIG_PATH)"
        )
        command.add_argument("--local-hostname", dest="store.local_hostname", help="this host, for the other ranks")
        command.add_argument("--device", dest="store.device", help="cpu (default), cuda:N or npu:N")
        for axis in ("tp", "pp"):
            command.add_argument(f"--{axis}-size", dest=f"store.{axis}_size", help=f"{axis} ranks that share it (1)")
        for axis in ("tp", "pp", "dp", "cp"):
            command.add_argument(f"--{axis}-rank", dest=f"store.{axis}", help="this rank among them (0)")
        command.add_argument("--wait", dest="store.wait_s", metavar="SECONDS", help="for a master that is late (60)")
        command.add_argument("--attempts", dest="store.attempts", help="of the warm-up (10)")
        command.add_argument("--json", action="store_true", help="one JSON document")
        command.set_defaults(json=False)


def _add_demo(commands: Commands) -> None:
    """`pdctl demo`: the main job, for people to watch."""
    command = add_command(
        commands, "demo", _demo, never, "move real KV between real processes, break it, watch it heal"
    )
    command.add_argument("--prompt", action="append", help="a prompt to run; may be given again (a built-in set)")
    command.add_argument("--trace", type=Path, help="replay the lengths and shared prefixes of a trace, JSON lines")
    command.add_argument("--requests", type=int, default=20, help="how many requests of the trace (20)")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON document instead of the show")
    how.add_argument(
        "--page", action="store_true", help="slowly, for those who watch its page; stays until it is stopped"
    )
    command.set_defaults(prompt=None, trace=None, requests=20, json=False, page=False)


def _if_held(settings: Settings) -> bool:
    return settings.rank.hold


async def _serve(settings: Settings, args: argparse.Namespace) -> int:  # noqa: ARG001
    async with node.sidecar(settings) as sidecar:
        gc.freeze()  # what the imports have made is no garbage; a pass over it holds the loop for 40 to 200 ms
        print(f"serving at {sidecar.url}", flush=True)
        for name, url in sidecar.listeners:
            print(f"serving {name} at {url}", flush=True)
        await asyncio.Event().wait()
    return 0


async def _register(settings: Settings, args: argparse.Namespace) -> int:  # noqa: ARG001
    await node.register(settings)
    return 0


async def _agent(settings: Settings, args: argparse.Namespace) -> int:
    if args.inherited is not None:
        await _one_agent(settings, args.inherited)
    command = (sys.executable, "-m", "pdctl", *args.argv)
    users = bool(settings.agent.users)
    paths = settings.agent.sockets or (config.runtime_dir(config.environment()) / "agent.sock",)
    with ExitStack() as stack:
        socks = [stack.enter_context(succession.listening(path, for_others=users)) for path in paths]
        loops = {
            str(path): succession.keep(sock, path, command, lambda at: print(f"serving at unix:{at}", flush=True))
            for path, sock in zip(paths, socks, strict=True)
        }
        async with beside(**loops):
            await asyncio.Event().wait()
    return 0


def _agent_is_ready() -> None:
    gc.freeze()  # as in `_serve`
    print("ready", flush=True)


async def _one_agent(settings: Settings, inherited: str) -> NoReturn:
    """One rank, and then this process ends whatever is left in it: that is what lets the pool go."""
    try:
        await handed.serve(
            settings,
            succession.inherited(inherited),
            hurry=lambda: asyncio.get_running_loop().call_later(_CLOSING_S, os._exit, 0),
            ready=_agent_is_ready,
        )
    except asyncio.CancelledError:  # told to stop, and done with it
        os._exit(0)
    except PdctlError:
        raise
    except Exception as error:
        log.error("agent ended by a defect, another takes its place", exc_info=error)
        os._exit(1)
    os._exit(0)


async def _sessions(settings: Settings, args: argparse.Namespace) -> int:
    if args.lift is not None:
        rows = [await inquiry.lift(settings, args.lift)]
    else:
        rows = list(await inquiry.standings(settings, args.state))
    if args.json:
        print(json.dumps({"sessions": rows}))
        return 0
    for row in rows:
        print(f"{row['session']:<24} {row['state']:<8} {row['sentence']}")
    if not rows:
        print("no session is known there" if args.state is None else f"no session is {args.state} there")
    return 0


async def _probe(settings: Settings, args: argparse.Namespace) -> int:
    wanted = Depth[args.depth.upper()]
    if "node.registry" in vars(args):
        verdict = await inquiry.ask_service(settings, args.session)
    else:
        verdict = await inquiry.ask(settings, args.session, args.deadline, wanted)
    works = f"works: {verdict.depth}" if verdict.works else "does not work"
    print(f"{verdict.session} {works} ({verdict.detail}), {verdict.seconds * 1e3:.1f} ms")
    return 0 if verdict.works else 1


async def _copy_journal(settings: Settings, args: argparse.Namespace) -> int:
    copied = await journals.copy_journal(settings, args.source, args.target)
    print(
        f"{copied.lives} lives, {copied.rooms} rooms and {copied.notes} notes copied; "
        f"epochs go on after {copied.last_epoch}"
    )
    return 0


def _resolved(settings: Settings) -> Resolved:
    given = settings.store
    found = config.store_config(given.extra, file=given.file, local_hostname=given.local_hostname or None)
    for warning in found.warnings:
        log.warning("store config", warning=warning)
    return found


async def _store_config(settings: Settings, args: argparse.Namespace) -> int:
    found = _resolved(settings)
    values = asdict(found.config)
    if args.json:
        print(json.dumps({key: {"value": value, "source": found.sources[key]} for key, value in values.items()}))
        return 0
    for key, value in values.items():
        print(f"{key:<24} {value!s:<24} {found.sources[key]}")
    rank = settings.store.rank()
    print(f"{'of which this rank':<24} {found.config.segment_of(rank)} bytes for {rank}")
    return 0


async def _store_check(settings: Settings, args: argparse.Namespace) -> int:
    found, store = _resolved(settings), settings.store
    async with open_device(store.device, environ=config.environment()) as device:
        plan, ability = await check_store(found.config, store.rank(), device, patience=store.patience())
    told = {"ready": True, "master": plan.master, "wheel": ability.version, "setup_takes": sorted(ability.setup)}
    print(json.dumps(told) if args.json else f"{plan.master} answers, and a set-up works (wheel {ability.version})")
    return 0


async def _store_warmup(settings: Settings, args: argparse.Namespace) -> int:
    found, store = _resolved(settings), settings.store
    rank = store.rank()
    most = _TRIAL_NBYTES * rank.tp_size * rank.pp_size
    trial = replace(
        found.config,
        global_segment_size=min(found.config.global_segment_size, most),
        enable_ssd_offload=False,
        ssd_offload_path=None,
    )
    async with (
        open_device(store.device, environ=config.environment()) as device,
        open_tracing(settings.trace, role="store") as spans,
        open_store(trial, rank, device, patience=store.patience(), spans=spans) as opened,
    ):
        report = opened.report
    print(json.dumps(asdict(report) | {"ready": report.ready}) if args.json else report)
    return 0


async def _demo(settings: Settings, args: argparse.Namespace) -> int:  # noqa: ARG001
    from pdctl.demo import story  # rich and a transformer: only the demo pays for them

    return await story.run(story.DemoOptions(args.prompt, args.trace, args.requests, args.json, args.page))
