"""A server for a checkpoint: a playground in the browser, and OpenAI's API."""

import contextlib
import errno
import ipaddress
import os
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro

from minillm_cli.console import parse, say
from minillm_cli.process import let_threads_sleep
from minillm_core.errors import InputError, missing_package
from minillm_core.files import user_path
from minillm_core.training.checkpoints import FRAMEWORKS, checkpoint_steps, find_checkpoint

GRACE = 5
"""Seconds that running requests have after Ctrl-C."""
KEY = "MINILLM_API_KEY"
"""The environment variable with the API key: on the command line, every user of the machine could read it."""


def main() -> None:
    parse(serve)


def serve(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[RUN]")]] = "runs/quickstart",
    backend: Literal["jax", "torch", "both"] = "jax",
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_batch: int = 16,
    max_queue: int = 256,
    time_limit: float = 600,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
) -> None:
    """Opens a page on http://127.0.0.1:8000 where a model continues prompts, and OpenAI's API under /v1.

    With --backend both, the page shows the same checkpoint in JAX and in PyTorch side by side. /health says whether the
    model is loaded, /metrics has numbers for Prometheus. For any address that other machines can reach, set an API key
    in the environment variable MINILLM_API_KEY. Ctrl-C ends the server.

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        backend: the framework that runs the model, or both.
        host: the address to listen on.
        port: the port to listen on; 0 for any free one.
        name: the model's name in the API; by default that of the run, with -jax or -torch if there are both.
        max_batch: requests of similar length that are decoded together. 1 is fastest for a single user.
        max_queue: requests that may wait; more are refused.
        time_limit: seconds that a request may take, waiting included.
        dtype: dtype of the parameters and the computation.
    """
    let_threads_sleep(decoding=True)
    try:
        import uvicorn

        from minillm_core.serving.app import create_app
        from minillm_core.serving.models import Limits, Models
    except ModuleNotFoundError as error:
        raise missing_package(error, "serve") from error
    key = os.environ.get(KEY) or None
    names = _names(host)
    if names is None and key is None:
        expected = f"127.0.0.1, or an API key in the environment variable {KEY}"
        raise InputError("other machines could use this server", expected=expected, found=f"--host {host}")
    checkpoint = _checkpoint(path, backend)
    frameworks = list(FRAMEWORKS) if backend == "both" else [backend]
    id = name or _run_name(checkpoint)
    ids = {f"{id}-{framework}" if backend == "both" else id: (framework, checkpoint) for framework in frameworks}
    with _listen(host, port) as listener:
        models = Models(ids, dtype, Limits(max_batch, max_queue, time_limit))
        app = create_app(models, checkpoint, api_key=key, hosts=names)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=1024,
            timeout_graceful_shutdown=2 * GRACE,
            timeout_keep_alive=75,  # longer than clients keep connections: httpx's clients keep them for 5 seconds
        )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                """After a signal, running requests have GRACE seconds; then they are answered with an error."""
                timer = threading.Timer(GRACE, models.close)  # in a thread: a signal handler must not wait for a lock
                timer.daemon = True
                timer.start()
                super().handle_exit(sig, frame)

        server = Server(config)
        models.on_failure = lambda: setattr(server, "should_exit", True)
        found_port = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {checkpoint} on http://{shown}:{found_port} (API: /v1, models: {', '.join(ids)})")
        server.run(sockets=[listener])
        if models.failure is not None:
            raise models.failure


def _checkpoint(path: str, backend: str) -> Path:
    """The checkpoint to serve. For both frameworks it is one checkpoint, JAX's if there are two."""
    if backend != "both":
        return find_checkpoint(path, backend)
    place = user_path(path)
    for framework in FRAMEWORKS:
        if checkpoint_steps(place / framework / "checkpoints"):
            return find_checkpoint(path, framework)
    try:
        return find_checkpoint(path, FRAMEWORKS[0])
    except InputError:
        return find_checkpoint(path, FRAMEWORKS[1])


def _run_name(checkpoint: Path) -> str:
    """`quickstart` for runs/quickstart/jax/checkpoints/100."""
    parents = [parent.name for parent in checkpoint.absolute().parents]
    return parents[2] if parents[:1] == ["checkpoints"] and len(parents) > 2 else checkpoint.name


def _names(host: str) -> frozenset[str] | None:
    """The names that a client on this machine uses; None if other machines can reach the address."""
    with contextlib.suppress(ValueError):
        if not ipaddress.ip_address(host).is_loopback:
            return None
        return frozenset({"127.0.0.1", "localhost", "[::1]", host, f"[{host}]"})
    return frozenset({"127.0.0.1", "localhost", "[::1]"}) if host == "localhost" else None


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError if the address cannot be used."""
    if not 0 <= port < 1 << 16:
        raise InputError("--port is out of range", expected="0 to 65535", found=port)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
            undo.pop_all()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = f"stop the program that uses it, or choose a different one: --port {port + 1}"
            raise InputError(f"port {port} is in use", where=host, hint=hint) from error
        hint = "choose a different --host or --port"
        raise InputError(
            "cannot listen on this address", found=error.strerror, where=f"{host}:{port}", hint=hint
        ) from error
    return listener
