"""`shardwise serve`: jobs by HTTP, queued and run on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from pathlib import Path

import click

from orchestrator.cli.errors import CommandError, ExitCode


@click.command("serve")
@click.option(
    "--root", default=".", show_default=True, metavar="FOLDER", help="All files of jobs are in it, and no others."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8700, show_default=True, help="Port; 0: any that is free."
)
@click.option("--users", metavar="FILE", help="Users: names, hashes of tokens, roles, quotas. Needed off loopback.")
@click.option("--tls-cert", metavar="FILE", help="Certificate (PEM). Needed off loopback.")
@click.option("--tls-key", metavar="FILE", help="Key of the certificate (PEM).")
@click.option("--state", metavar="FOLDER", help="Folder of the service's own files [default: .shardwise in the root].")
def command(
    root: str, host: str, port: int, users: str | None, tls_cert: str | None, tls_key: str | None, state: str | None
) -> int:
    """Takes jobs by HTTP, queues them and runs them on this machine, until it is stopped. Jobs that train go on without it, and
    it takes them up again when it is started again."""
    try:
        import uvicorn

        from orchestrator.control.service import make_app
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed", "pip install 'shardwise[serve]'") from None
    from clusters.inventory.local import discover
    from orchestrator.control.admission import users_in
    from orchestrator.control.controller import Controller, Site, alone
    from orchestrator.control.folder import RunRefused
    from orchestrator.control.store import Refused

    refuse_open(host, users, tls_cert, tls_key)
    for file in (tls_cert, tls_key):
        if file is not None and not Path(file).is_file():
            raise CommandError("there is no such file", "name a PEM file", where=file)
    folder = Path(root).resolve()
    if not folder.is_dir():
        raise CommandError("the root is no folder", "--root FOLDER, where the jobs' data is", where=str(folder))
    site = Site(
        root=folder,
        state=Path(state).resolve() if state else folder / ".shardwise",
        cluster=discover(),
        users=users_in(Path(users)) if users else (),
    )
    try:
        with alone(site):
            site.store().close()  # made, or refused, before anything listens
            controller = Controller(site=site)
            thread = threading.Thread(target=controller.run, name="controller", daemon=True)
            config = uvicorn.Config(
                make_app(controller), host=host, port=port, ssl_certfile=tls_cert, ssl_keyfile=tls_key,
                log_level="warning", server_header=False, timeout_keep_alive=30,
            )  # fmt: skip
            socket = config.bind_socket()
            socket.listen()  # whoever reads the line below may connect
            scheme, bound = "https" if tls_cert else "http", socket.getsockname()[1]
            gpus = f"{site.cluster.gpus_per_node} {site.cluster.accelerator.name}"
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"serves    {scheme}://{shown}:{bound}, jobs in {folder}, {gpus}")
            thread.start()
            with contextlib.closing(socket), contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[socket])
            controller.stop()
            thread.join(timeout=30)
    except RunRefused as error:
        raise CommandError(error.message, error.fix, where=error.where) from None
    except Refused as error:
        raise CommandError(error.message, error.fix) from None
    return ExitCode.DONE


def refuse_open(host: str, users: str | None, tls_cert: str | None, tls_key: str | None) -> None:
    """Raise CommandError where others could reach the service without a token, or read tokens on their way."""
    if (tls_cert is None) != (tls_key is None):
        raise CommandError("a certificate and its key go together", "--tls-cert FILE --tls-key FILE")
    if is_loopback(host):
        return
    if users is None:
        raise CommandError(
            f"{host} can be reached by others, and there are no users", "--users FILE, or --host 127.0.0.1"
        )
    if tls_cert is None:
        fix = "--tls-cert FILE --tls-key FILE, or --host 127.0.0.1 behind a proxy that does TLS"
        raise CommandError(f"{host} can be reached by others, and tokens would travel in the clear", fix)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
