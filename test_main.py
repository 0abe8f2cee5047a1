"""What the service promises, as tests against real servers: `python main.py` on a free port.

Most tests share one server for each database and never meet, since everybody signs up with an email
of their own. Tests that need other settings, or break something, start servers of their own.

    python -m pytest              a few rounds of each
    FULL=1 python -m pytest       all rounds
    TEST_DATABASE_URL=postgresql+asyncpg://… python -m pytest      on PostgreSQL as well
    TEST_REDIS_URL=redis://… python -m pytest                      and with Redis, which is emptied
"""

import ast
import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.client
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default as email_policy
from functools import cache, partial, partialmethod
from itertools import count, cycle, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
import yaml
from ecdsa import NIST256p, NIST384p, NIST521p, SigningKey
from jose import jwt
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import main

HERE = Path(__file__).parent
README = HERE / "README.md"
FULL = os.environ.get("FULL") == "1"
POSTGRES = os.environ.get("TEST_DATABASE_URL")
REDIS = os.environ.get("TEST_REDIS_URL")
KEY = "the signing key of the tests, long enough"
PASSWORD = "correct horse battery"
A_POST = {"title": "A title", "content": "A text"}
ADMIN = {"username": "admin@example.com", "password": "the admin's own password"}
BOSS = "boss@example.com"  # who is told of published posts
NEVER = 2**31 - 1  # an id that nobody has
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would read all certificates each time
UTC_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
CODES = {
    400: {"BAD_REQUEST"},
    401: {"INVALID_CREDENTIALS", "INVALID_TOKEN", "TOKEN_REUSED"},
    403: {"INSUFFICIENT_PERMISSIONS"},
    404: {"NOT_FOUND"},
    405: {"METHOD_NOT_ALLOWED"},
    409: {"EMAIL_TAKEN", "CONFLICT"},
    413: {"BODY_TOO_LARGE"},
    422: {"VALIDATION_ERROR"},
    429: {"RATE_LIMITED"},
    500: {"INTERNAL_ERROR"},
    503: {"UNAVAILABLE"},
}
MAIN = [sys.executable, str(HERE / "main.py")]
UVICORN = [sys.executable, "-m", "uvicorn", "--app-dir", str(HERE), "main:app"]
SECRETS = {KEY, PASSWORD, ADMIN["password"]}  # grows by every token; searched for in the logs


# --- Servers --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@cache
def documented() -> list[tuple[re.Pattern[str], dict[str, set[int]]]]:
    """The statuses that /docs names, for each method of each path."""
    return [
        (
            re.compile(re.sub(r"\{\w+\}", "[^/]+", path)),
            {m.upper(): {int(code) for code in route["responses"]} for m, route in routes.items()},
        )
        for path, routes in main.app.openapi()["paths"].items()
    ]


def check_answer(response: httpx.Response) -> None:
    """What holds for every answer: its headers, the shape of errors, a code that fits the status,
    no hash in it, and that its status stands in /docs."""
    request = response.request
    fits = [methods for path, methods in documented() if path.fullmatch(request.url.path)]
    if fits and request.method in fits[0] and response.status_code != 304:
        assert response.status_code in fits[0][request.method], (request.method, request.url)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["x-request-id"])
    assert re.fullmatch(r"\d+\.\d{4}", response.headers["x-process-time"])
    assert response.headers["x-content-type-options"] == "nosniff"
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return  # it has no end
    body = response.read().decode(errors="replace")
    assert float(response.headers["x-process-time"]) <= response.elapsed.total_seconds()
    assert "$2b$" not in body
    if response.status_code >= 400 and response.request.method != "HEAD":
        problem = json.loads(body)
        assert problem.keys() == {"detail", "error_code", "request_id"}
        assert problem["error_code"] in CODES[response.status_code]
        assert problem["request_id"] == response.headers["x-request-id"]
        assert ("www-authenticate" in response.headers) == (response.status_code == 401)
        assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    if response.status_code == 422:
        assert all(field.keys() == {"loc", "msg", "type"} for field in json.loads(body)["detail"])
    with contextlib.suppress(ValueError, TypeError, KeyError):
        SECRETS.update(json.loads(body)[name] for name in ("access_token", "refresh_token"))


def environment(settings: dict[str, str]) -> dict[str, str]:
    """These settings and no others; what is "unset" is left out."""
    ours = {name.upper() for name in main.Settings.model_fields}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return inherited | {name: value for name, value in settings.items() if value != "unset"}


processes: list[Any] = []


@pytest.fixture(scope="session", autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    """Servers of tests that failed would run for ever."""
    yield
    for process in processes:
        process.kill()
        process.wait()


IN_THE_FORK = """
import multiprocessing.process, os, runpy, sys
os.chdir(folder)
os.environ.clear()
os.environ.update(settings)
for number, file in enumerate(output, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
sys.argv, sys.path[0] = command, here
multiprocessing.process._parent_process = None
runpy.run_path(command[0], run_name="__main__")
"""
LIBRARIES = """aiosqlite asyncpg bcrypt email_validator fastapi.middleware.cors
    fastapi.openapi.docs fastapi.staticfiles httptools jose.jwt multiprocessing.spawn pydantic.v1
    pydantic_settings python_multipart redis.asyncio smtplib sqlalchemy.dialects.postgresql.asyncpg
    sqlalchemy.dialects.sqlite.aiosqlite sqlalchemy.ext.asyncio sqlmodel.ext.asyncio.session
    uvicorn.protocols.http.httptools_impl uvicorn.protocols.websockets.websockets_sansio_impl
    uvloop"""


class Forked:
    """A script of ours, say main.py, forked from a process that has imported the libraries once for
    all tests: they take three quarters of a start. To its users it looks as a Popen does."""

    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")

    def __init__(
        self, command: list[str], folder: Path, settings: dict[str, str], *output: Path
    ) -> None:
        names = {"command": command, "folder": str(folder), "settings": settings}
        names |= {"output": [str(file) for file in output], "here": str(HERE)}
        self.process = self.context.Process(target=exec, args=(IN_THE_FORK, names))
        self.process.start()
        processes.append(self)
        self.pid = self.process.pid
        self.kill, self.terminate = self.process.kill, self.process.terminate

    def poll(self) -> Any:
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self.process.join(seconds)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("the script", seconds or 0)
        return int(self.poll())


if sys.platform == "linux":
    Forked.context.set_forkserver_preload(LIBRARIES.split())


class Service:
    """A server with a database, a folder and settings of its own."""

    def __init__(
        self,
        folder: Path,
        database: str = "sqlite",
        command: list[str] | None = None,
        stderr: Any = None,
        **settings: str,
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.admin: Account | None = None
        usual = {
            "PORT": str(self.port),
            "SECRET_KEY": KEY,
            "BCRYPT_ROUNDS": "4",
            "RATE_LIMIT": "off",
            "AUTH_RATE_LIMIT": "off",
            "DATABASE_URL": f"sqlite+aiosqlite:///{folder}/app.db",
            "FIRST_SUPERUSER_EMAIL": ADMIN["username"],
            "FIRST_SUPERUSER_PASSWORD": ADMIN["password"],
        }
        if database == "postgresql":
            usual["DATABASE_URL"] = new_postgres_database()
        self.settings = usual | settings
        self.database = self.settings["DATABASE_URL"].partition("+")[0]
        self.script = MAIN[1]
        self.stderr = stderr  # where the log goes, if not into the file
        self.command = [*command, "--port", str(self.port)] if command else []
        if command == MAIN or stderr or "WORKERS" in settings:
            self.command = MAIN
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            env, folder = environment(self.settings), self.folder
            errors = self.stderr or log
            if self.command:
                self.process: Any = subprocess.Popen(
                    self.command, cwd=folder, env=env, stdout=log, stderr=errors
                )
                processes.append(self.process)
            else:
                self.process = Forked([self.script], folder, env, self.log, self.log)
        self.client = httpx.Client(
            base_url=f"{self.address}/api/v1",
            timeout=30,
            verify=NO_TLS,
            event_hooks={"response": [check_answer]},
            limits=httpx.Limits(max_connections=300, keepalive_expiry=60),
        )
        until = time.monotonic() + 20
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                self.client.get(f"{self.address}/health").raise_for_status()
                return
            time.sleep(0.02)
        raise AssertionError(f"did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        self.client.close()
        self.process.terminate()
        code: int = self.process.wait(15)
        return code

    def crash(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def log_so_far(self) -> str:
        """The whole log: a thread writes it, so we wait for the line of a request of our own."""
        answer = self.client.get(self.address)
        eventually(lambda: answer.headers["x-request-id"] in self.log.read_text())
        return self.log.read_text()

    def as_(self, token: str) -> "Caller":
        return Caller(self, {"Authorization": f"Bearer {token}"})

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Runs a statement behind the service's back."""
        if self.database == "postgresql":
            return asyncio.run(on_postgres(self.settings["DATABASE_URL"], statement))
        with contextlib.closing(sqlite3.connect(self.folder / "app.db", timeout=10)) as connection:
            rows = connection.execute(statement).fetchall()
            connection.commit()
            return rows

    def ago(self, **span: float) -> str:
        """A time in the past as this database writes it."""
        moment = datetime.now(UTC) - timedelta(**span)
        return f"'{moment:%Y-%m-%d %H:%M:%S.%f}{'+00' if self.database == 'postgresql' else ''}'"


@dataclass
class Caller:
    """Sends requests with somebody's token."""

    service: Service
    headers: dict[str, str]

    def request(self, method: str, path: str, **sent: Any) -> httpx.Response:
        headers = self.headers | sent.pop("headers", {})
        return self.service.client.request(method, path, headers=headers, **sent)

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")
    put = partialmethod(request, "PUT")
    patch = partialmethod(request, "PATCH")
    delete = partialmethod(request, "DELETE")


async def on_postgres(url: str, statement: str) -> list[tuple[Any, ...]]:
    import asyncpg

    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


redis_numbers = cycle(range(15))


def new_redis(number: int | None = None) -> str:
    """One of the sixteen databases that a Redis has; tests use a few at a time."""
    if not REDIS:
        pytest.skip("TEST_REDIS_URL is not set")
    import redis

    url = urlsplit(REDIS)._replace(path=f"/{number or next(redis_numbers)}").geturl()
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


def new_postgres_database() -> str:
    name = f"nutshell_{uuid4().hex[:12]}"
    if not POSTGRES:
        pytest.skip("TEST_DATABASE_URL is not set")
    asyncio.run(on_postgres(str(POSTGRES), f"CREATE DATABASE {name}"))
    return f"{str(POSTGRES).rpartition('/')[0]}/{name}"


def run_main(folder: Path, **settings: str) -> tuple[int, str]:
    """Starts a server that should not start: its exit status, and what it said."""
    printed, errors = folder / "printed", folder / "errors"
    running = Forked(MAIN[1:], folder, environment(settings), printed, errors)
    return running.wait(20), errors.read_text()


def output_of(program: str, folder: Path, *arguments: str, **settings: str) -> str:
    """What a program prints that may import main and has a database of its own."""
    env = environment({"SECRET_KEY": KEY} | settings)
    file, printed, errors = (folder / name for name in ("script.py", "printed", "errors"))
    file.write_text(program)
    running = Forked([str(file), *arguments], folder, env, printed, errors)
    assert running.wait(60) == 0, errors.read_text()
    return printed.read_text()


def run_beside_main(script: str, folder: Path, *arguments: str, **settings: str) -> str:
    """What a coroutine prints that knows the names of main."""
    head = "import asyncio, main\nfrom main import *\nasync def run():\n"
    program = f"{head}{textwrap.indent(script, '    ')}\nasyncio.run(run())\n"
    return output_of(program, folder, *arguments, **settings)


class MailHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server: Any = self.server
        time.sleep(server.pause)
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                server.mails.append(BytesParser(policy=email_policy).parsebytes(b"".join(lines)))
            elif verb == b"AUTH":
                server.credentials.append(base64.b64decode(line.split()[-1]))
            elif verb == b"STAR":
                self.wfile.write(b"220 go on\r\n")
                self.request = server.starttls.wrap_socket(self.request, server_side=True)
                self.setup()
                continue
            able = b"250-here\r\n250-STARTTLS\r\n" if server.starttls else b"250-here\r\n"
            answers = {b"EHLO": able + b"250 AUTH PLAIN", b"AUTH": b"235 yes", b"QUIT": b"221"}
            usual = b"550 who?" if b"<unknown" in line else b"250 fine"
            self.wfile.write(answers.get(verb, usual) + b"\r\n")

    def finish(self) -> None:
        super().finish()
        self.request.close()  # after STARTTLS it is one that the server does not know


class MailServer(socketserver.ThreadingTCPServer):
    """Speaks enough SMTP to take mails, and keeps them."""

    daemon_threads = True

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        starttls: ssl.SSLContext | None = None,
        pause: float = 0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), MailHandler)
        self.starttls, self.pause = starttls, pause
        self.mails: list[EmailMessage] = []
        self.credentials: list[bytes] = []
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def mails_to(self, email: str) -> list[EmailMessage]:
        return [mail for mail in list(self.mails) if mail["to"] == email]


@pytest.fixture(scope="session")
def mail_server() -> Iterator[MailServer]:
    with MailServer() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def shared(
    tmp_path_factory: pytest.TempPathFactory, mail_server: MailServer
) -> Iterator[Callable[[str], Service]]:
    """One server for each database, started when it is first asked for."""
    with contextlib.ExitStack() as stack:

        @cache
        def serve(database: str) -> Service:
            running = Service(
                tmp_path_factory.mktemp(database),
                database,
                REDIS_URL=new_redis(15) if REDIS and database == "postgresql" else "unset",
                SMTP_URL=f"smtp://127.0.0.1:{mail_server.port}",
                LOG_LEVEL="debug",
                ADMIN_EMAIL=BOSS,
            )
            stack.callback(running.stop)
            return running

        yield serve


@pytest.fixture(params=["sqlite", "postgresql"])
def service(request: pytest.FixtureRequest, shared: Callable[[str], Service]) -> Service:
    if request.param == "postgresql" and not POSTGRES:
        pytest.skip("TEST_DATABASE_URL is not set")
    return shared(request.param)


@pytest.fixture(params=["memory", "redis"])
def kept_in(request: pytest.FixtureRequest) -> dict[str, str]:
    """Where counts and events are kept: the settings for it."""
    return {"REDIS_URL": new_redis()} if request.param == "redis" else {}


@pytest.fixture(params=["one process", "two workers"])
def workers(request: pytest.FixtureRequest) -> dict[str, str]:
    """The settings for so many processes, which hear of each other."""
    return {"WORKERS": "2", "REDIS_URL": new_redis()} if request.param == "two workers" else {}


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers with settings of their own; all are stopped in the end."""
    started: list[Service] = []

    def start_one(**settings: Any) -> Service:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Service(folder, **settings))
        return started[-1]

    yield start_one
    for running in started:
        running.client.close()
        if running.process.poll() is None:
            running.stop()


# --- What people do -------------------------------------------------------------------------------


numbers = count(1)


@dataclass
class Account:
    """Somebody who is signed in."""

    service: Service
    id: int
    email: str
    tokens: dict[str, Any]
    api: Caller


def new_email() -> str:
    return f"person{next(numbers)}-{uuid4().hex[:6]}@example.com"


def register(service: Service, **fields: Any) -> httpx.Response:
    body = {"email": new_email(), "password": PASSWORD} | fields
    return service.client.post("/auth/register", json=body)


def log_in(service: Service, username: str, password: str = PASSWORD) -> httpx.Response:
    form = {"username": username, "password": password}
    return service.client.post("/auth/login", data=form)


def refresh(service: Service, token: str) -> httpx.Response:
    return service.client.post("/auth/refresh", data={"refresh_token": token})


def sign_in(service: Service, username: str, password: str = PASSWORD) -> Account:
    response = log_in(service, username, password)
    assert response.status_code == 200, response.text
    api = service.as_(response.json()["access_token"])
    me = api.get("/users/me").json()
    return Account(service, me["id"], me["email"], response.json(), api)


def sign_up(service: Service, **fields: Any) -> Account:
    response = register(service, **fields)
    assert response.status_code == 201, response.text
    return sign_in(service, response.json()["email"], fields.get("password", PASSWORD))


def sign_in_admin(service: Service) -> Account:
    """The first superuser; once for each start of a server, since tests ask for it so often."""
    if service.admin is None or service.admin.api.get("/users/me").status_code != 200:
        service.admin = sign_in(service, **ADMIN)
    return service.admin


def write(person: Account, **fields: Any) -> dict[str, Any]:
    """A draft, if nothing else is said."""
    response = person.api.post("/posts", json=A_POST | fields)
    assert response.status_code == 201, response.text
    return dict(response.json())


publish = partial(write, is_published=True)


def comment(person: Account, post_id: int, text: str = "A comment") -> dict[str, Any]:
    response = person.api.post(f"/posts/{post_id}/comments", json={"text": text})
    assert response.status_code == 201, response.text
    return dict(response.json())


def at_once(times: int, call: Callable[[int], Any]) -> list[Any]:
    """The results of as many calls that begin at the same moment."""
    gate = threading.Barrier(times)

    def one(number: int) -> Any:
        gate.wait()
        return call(number)

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(one, range(times)))


def all_at_once(*calls: Callable[[], Any]) -> list[Any]:
    return at_once(len(calls), lambda number: calls[number]())


def eventually(what: Callable[[], Any], seconds: float = 5) -> Any:
    """Waits for what happens in the background."""
    until = time.monotonic() + seconds
    while not (result := what()) and time.monotonic() < until:
        time.sleep(0.01)
    assert result
    return result


class Load:
    """Readers and writers in threads; keeps what each request took and how it ended."""

    def __init__(self, service: Service, threads: int = 4) -> None:
        self.author, self.threads = sign_in_admin(service), threads
        self.done: list[tuple[float, int]] = []
        self.stopped = False

    def run(self, number: int) -> None:
        while not self.stopped:
            began = time.monotonic()
            if number % 2:
                answer = self.author.api.get("/posts?size=1")
            else:
                answer = self.author.api.post("/posts", json=A_POST | {"is_published": True})
            self.done.append((time.monotonic() - began, answer.status_code))

    def more(self, requests: int) -> list[tuple[float, int]]:
        """Waits for so many more requests and returns them."""
        before = len(self.done)
        eventually(lambda: len(self.done) >= before + requests, 30)
        return self.done[before:]

    def __enter__(self) -> "Load":
        self.pool = ThreadPoolExecutor(self.threads)
        self.works = [self.pool.submit(self.run, number) for number in range(self.threads)]
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped = True
        for work in self.works:
            work.result()
        self.pool.shutdown()


class Listener:
    """Follows the stream of events in a thread, as `curl -N` does."""

    def __init__(self, service: Service, query: str = "", **headers: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", service.port)
        connection.request("GET", f"/api/v1/events{query}", headers=headers)
        self.socket = connection.sock
        self.response = connection.getresponse()
        assert self.response.status == 200
        assert self.response.headers["content-type"].startswith("text/event-stream")
        assert self.response.headers["cache-control"] == "no-store"
        self.ids: list[str] = []
        self.events: list[tuple[str, Any]] = []
        self.pings = 0
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        event: dict[str, str] = {}
        with contextlib.suppress(OSError, http.client.HTTPException):
            while line := self.response.readline().decode():
                name, _, value = line.rstrip("\n").partition(": ")
                event[name] = value
                if line == "\n" and "event" in event:
                    self.ids.append(event.get("id", ""))
                    self.events.append((event["event"], json.loads(event["data"])))
                    event = {}
                self.pings += line == ": ping\n"

    def wait(self, count: int) -> list[tuple[str, Any]]:
        """What was heard so far, as soon as it is so many events."""
        eventually(lambda: len(self.events) >= count, 10)
        return self.events

    def ended(self) -> bool:
        self.thread.join(5)
        return not self.thread.is_alive()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        assert self.ended()
        self.response.close()
        self.socket.close()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def say(room: ClientConnection, **message: Any) -> None:
    room.send(json.dumps(message))


def hear(room: ClientConnection) -> dict[str, Any]:
    return dict(json.loads(room.recv(timeout=5)))


def close_code(room: ClientConnection, seconds: float = 5) -> int:
    """Waits for the end of the room."""
    try:
        while True:
            room.recv(timeout=seconds)
    except ConnectionClosed as closed:
        return int(closed.rcvd.code) if closed.rcvd else 1006


def room_of(service: Service, post_id: object, **options: Any) -> ClientConnection:
    """The socket, before anything was said."""
    url = f"ws://127.0.0.1:{service.port}/api/v1/ws/posts/{post_id}"
    return connect(url, ping_interval=None, **options)  # type: ignore[no-any-return]


def raw_room(service: Service, post_id: int) -> socket.socket:
    """A socket after its handshake, for what no library would send."""
    room = socket.create_connection(("127.0.0.1", service.port))
    upgrade = f"GET /api/v1/ws/posts/{post_id} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
    upgrade += "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    room.sendall(f"{upgrade}Sec-WebSocket-Key: {'a' * 22}==\r\n\r\n".encode())
    assert room.recv(1_000).startswith(b"HTTP/1.1 101 ")
    return room


@contextlib.contextmanager
def in_room(person: Account, post_id: int) -> Iterator[ClientConnection]:
    with room_of(person.service, post_id) as room:
        say(room, type="auth", token=person.tokens["access_token"])
        name = person.api.get("/users/me").json()["full_name"]
        assert hear(room) == {"type": "ready", "user": {"id": person.id, "full_name": name}}
        yield room


def without_content(post: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in post.items() if name != "content"}


# --- Settings -------------------------------------------------------------------------------------


PRODUCTION = {"ENVIRONMENT": "production", "SECRET_KEY": KEY}
WRONG_VALUES = """ENVIRONMENT=staging HOST=nowhere.example PORT=abc PORT=0 PORT=70000 WORKERS=0
    ACCESS_TOKEN_EXPIRE_MINUTES=0 ACCESS_TOKEN_EXPIRE_MINUTES=525601 BCRYPT_ROUNDS=3
    REFRESH_TOKEN_EXPIRE_DAYS=0 REFRESH_TOKEN_EXPIRE_DAYS=3651 BCRYPT_ROUNDS=17
    REGISTRATION=maybe CORS_ORIGINS=http://localhost:3000/ MAIL_FROM=nobody LOG_LEVEL=loud
    DEMO=maybe RATE_LIMIT=lots AUTH_RATE_LIMIT=0/minute CACHE_SECONDS=-1"""
NO_URL = "must be a URL, its password percent-encoded"
WRONG_PAIRS = [pair.split("=") for pair in WRONG_VALUES.split()]
WRONG_SETTINGS = [({name: value}, f"{name}='{value}': ") for name, value in WRONG_PAIRS] + [
    ({"ENVIRONMENT": "production"}, "SECRET_KEY: must be set"),
    ({"SECRET_KEY": "too short"}, "SECRET_KEY: Data should have at least 32 bytes"),
    ({"SECRET_KEY": "\udcff" * 40}, "SECRET_KEY: "),
    ({"DATABASE_URL": "postgresql+asyncpg://u:p@ss:hunter2@h/x"}, NO_URL),
    ({"DATABASE_URL": "sqlite+aiosqlite:///./a.db?timeout=abc"}, NO_URL),
    ({"DATABASE_URL": "sqlite+aiosqlite:///file:x?mode=memory&uri=true"}, "name a file"),
    ({"DATABASE_URL": "postgresql+asyncpg://u:hunter2@localhost/x"}, "SECRET_KEY: must be set"),
    ({"DATABASE_URL": "mysql://u:hunter2@localhost/x"}, "DATABASE_URL='mysql://…': must be"),
    ({"DATABASE_URL": "sqlite:///app.db"}, "DATABASE_URL='sqlite://…': must be"),
    ({"DATABASE_URL": "hunter2@app.db"}, "DATABASE_URL=…: must be"),
    ({"DATABASE_URL": "sqlite+aiosqlite:///:memory:"}, "a :memory: of its own; name a file"),
    ({"FORWARDED_ALLOW_IPS": "10.0.0.0/8, proxy"}, "FORWARDED_ALLOW_IPS='proxy': "),
    ({"CORS_ORIGINS": "*"} | PRODUCTION, "CORS_ORIGINS='*': is refused in production"),
    ({"FIRST_SUPERUSER_EMAIL": "a@b.co"}, "FIRST_SUPERUSER_EMAIL, FIRST_SUPERUSER_PASSWORD: set"),
    (
        {"FIRST_SUPERUSER_EMAIL": "nobody", "FIRST_SUPERUSER_PASSWORD": "hunter2hunter2"},
        "FIRST_SUPERUSER_EMAIL='nobody': An email address must have an @-sign.",
    ),
    (
        {"FIRST_SUPERUSER_EMAIL": "a@b.co", "FIRST_SUPERUSER_PASSWORD": "hunter2"},
        "FIRST_SUPERUSER_PASSWORD: String should have at least 8 characters",
    ),
    ({"REDIS_URL": "http://u:hunter2@localhost"}, ": String should match pattern"),
    ({"REDIS_URL": "redis://u:hunter2@localhost:abc"}, NO_URL),
    ({"REDIS_URL": "redis://u:hunter2@localhost?tls=true"}, NO_URL),
    ({"SMTP_URL": "hunter2@localhost"}, ": String should match pattern"),
    ({"SMTP_URL": "http://u:hunter2@localhost"}, ": String should match pattern"),
    ({"SMTP_URL": "smtp://u:hunter2@localhost:65536"}, NO_URL),
    ({"DEMO": "true"} | PRODUCTION, "DEMO=True: is refused in production"),
    ({"DEMO": "true", "WORKERS": "2"}, "DEMO=True: is refused in production, and with several"),
    ({"DEMO": "true", "DATABASE_URL": "sqlite+aiosqlite:///hunter2"}, "DATABASE_URL: must not be"),
]


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Reads settings that end the start: the one line that is printed."""
    monkeypatch.chdir(tmp_path)
    for name in main.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)

    def read(**settings: str) -> str:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main.read_settings()
        printed = capsys.readouterr().err
        assert (ended.value.code, printed.count("\n")) == (3, 1)
        return printed

    return read


@pytest.mark.parametrize(
    ("settings", "line"),
    WRONG_SETTINGS,
    ids=["; ".join(map("=".join, settings.items()))[:50] for settings, _ in WRONG_SETTINGS],
)
def test_a_wrong_setting_ends_the_start_with_one_clear_line(
    refuse: Callable[..., str], settings: dict[str, str], line: str
) -> None:
    printed = refuse(**settings)
    needed = re.search(r"needs a package: pip install (\w+)$", printed)  # which looks at the URL
    if needed and not importlib.util.find_spec(needed[1]):
        pytest.skip(f"{needed[1]} is not installed")
    assert line in printed
    assert "hunter2" not in printed


@pytest.mark.parametrize(
    ("package", "name", "scheme"),
    [("asyncpg", "DATABASE_URL", "postgresql+asyncpg"), ("redis", "REDIS_URL", "redis")],
    ids=["asyncpg", "redis"],
)
def test_a_package_that_is_missing_ends_the_start_with_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[..., str],
    package: str,
    name: str,
    scheme: str,
) -> None:
    for module in [module for module in sys.modules if f"{module}.".startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    line = f"{name}='{scheme}://…': needs a package: pip install {package}\n"
    assert refuse(**{name: f"{scheme}://u:hunter2@localhost/x"}) == line


def test_asyncpg_and_redis_are_imported_only_when_asked_for(tmp_path: Path) -> None:
    script = "import main, sys; print(sys.modules.keys() & {'asyncpg', 'redis'})"
    command = [sys.executable, "-c", script]
    env = environment({"SECRET_KEY": KEY}) | {"PYTHONPATH": str(HERE)}
    assert subprocess.check_output(command, cwd=tmp_path, env=env) == b"set()\n"


def test_a_wrong_setting_ends_uvicorn_main_app_the_same_way(tmp_path: Path) -> None:
    variables = os.environ | {"WORKERS": "none"}
    ended = subprocess.run(UVICORN, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (3, 1)
    assert ended.stderr.startswith("WORKERS='none': ")


def test_an_env_file_that_is_not_utf_8_is_named(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / ".env").write_bytes("PORT=8123".encode("utf-16"))
    assert refuse() == ".env: must be UTF-8\n"


def test_an_env_file_is_read_and_keys_of_others_in_it_are_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PORT", "SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    secret = "ö" * 16  # 32 bytes
    (tmp_path / ".env").write_text(f"POSTGRES_PASSWORD=x\nPORT=8123\nSECRET_KEY={secret}\n")
    settings = main.Settings()
    assert (settings.port, settings.secret_key) == (8123, secret.encode())


# --- Log ------------------------------------------------------------------------------------------


LINE = re.compile(
    r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?P<level>[A-Z]+) +(?P<method>[A-Z]+) (?P<path>\S+) "
    r"(?P<status>\d+) (?P<ms>\d+\.\d) ms (?P<client>\S+) (?P<who>user \d+|anonymous) (?P<id>\S+)"
)


def test_in_development_people_read_a_line_for_each_request(start: Start) -> None:
    service = start()
    person = sign_up(service)
    answers = [
        (service.client.get("/posts?page=1"), "anonymous", "/api/v1/posts"),
        (person.api.get("/users/me"), f"user {person.id}", "/api/v1/users/me"),
        (person.api.get("/users/0"), f"user {person.id}", "/api/v1/users/0"),
        (service.client.get("/users/me"), "anonymous", "/api/v1/users/me"),
        (service.client.post("/posts%0A2026%20%1b[31m"), "anonymous", None),
        (service.client.options("/posts"), "anonymous", "/api/v1/posts"),
    ]
    lines = service.log_so_far().splitlines()
    for answer, who, path in answers:
        (line,) = (line for line in lines if line.endswith(answer.headers["x-request-id"]))
        found = LINE.fullmatch(line)
        assert found, line
        assert found["method"] == answer.request.method
        assert path in (None, found["path"])
        assert (int(found["status"]), found["who"]) == (answer.status_code, who)
        assert (found["level"], found["client"]) == ("INFO", "127.0.0.1")
        assert float(found["ms"]) >= 1_000 * float(answer.headers["x-process-time"]) - 0.2
    assert not any("\x1b" in line or "page=1" in line for line in lines)


def test_in_production_programs_read_a_line_for_each_request(start: Start) -> None:
    service = start(**PRODUCTION)
    person = sign_up(service)
    answer = person.api.get(f"/users/{person.id}?note=hunter4")
    lines = [json.loads(line) for line in service.log_so_far().splitlines()]
    (line,) = (line for line in lines if line.get("request_id") == answer.headers["x-request-id"])
    assert datetime.fromisoformat(line.pop("time")).utcoffset() == timedelta(0)
    assert 0 <= line.pop("ms") < 1_000
    assert line == {
        "level": "INFO",
        "request_id": answer.headers["x-request-id"],
        "method": "GET",
        "path": f"/api/v1/users/{person.id}",
        "status": 200,
        "client": "127.0.0.1",
        "user_id": person.id,
    }
    service.stop()
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    said = [line["message"] for line in lines if line.keys() == {"time", "level", "message"}]
    assert "Application startup complete." in said
    assert "mail not sent: SMTP_URL is not set" in said
    assert any(message.startswith("Finished server process") for message in said)


def test_rooms_and_streams_have_a_line_when_they_end(start: Start) -> None:
    service = start()
    person = sign_up(service)
    post = publish(person)["id"]
    with in_room(person, post):
        assert "WEBSOCKET" not in service.log_so_far()
    with pytest.raises(InvalidStatus), room_of(service, post, origin="http://evil.example"):
        pass
    assert "connection " not in service.log_so_far()  # what uvicorn says of a socket
    Listener(service).stop()
    line = r"([A-Z]+ /api/v1/\w+)\S* (\d+) \S+ ms \S+ (anonymous|user \d+)"
    ended = {("WEBSOCKET /api/v1/ws", "101", f"user {person.id}")}
    ended |= {("WEBSOCKET /api/v1/ws", "403", "anonymous")}
    ended |= {("GET /api/v1/events", "200", "anonymous")}
    eventually(lambda: set(re.findall(line, service.log_so_far())[-3:]) == ended, 15)
    assert "Traceback" not in service.log_so_far()


def test_no_line_is_lost_at_a_stop_and_none_is_written_below_the_level(start: Start) -> None:
    service = start()
    ids = [service.client.get("/posts").headers["x-request-id"] for _ in range(200)]
    service.stop()
    log = service.log.read_text()
    assert all(request_id in log for request_id in ids)
    quiet = start(LOG_LEVEL="warning")
    quiet.client.get("/posts")
    quiet.stop()
    assert "GET" not in quiet.log.read_text()


@pytest.mark.slow
def test_a_log_that_nobody_reads_stops_nobody(start: Start) -> None:
    """A pipe holds 64 KiB, about 600 lines."""
    service = start(stderr=subprocess.PIPE)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=5)
    for _ in range(600):
        connection.request("GET", "/" + "%ff" * 20_000)
        answer = connection.getresponse()
        assert (answer.read(10), answer.status) == (b'{"detail":', 404)
        answer.read()
    connection.close()
    memory = Path(f"/proc/{service.process.pid}/statm")
    if memory.exists():  # each of these paths takes 180 KB when it is quoted
        assert int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < 150e6
    service.process.terminate()
    assert service.process.wait(7) in (0, -signal.SIGTERM)
    service.process.stderr.close()


@pytest.mark.slow
def test_a_full_disk_stops_nobody(start: Start, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has a disk that is always full")
    with Path("/dev/full").open("wb") as full:
        service = start(stderr=full)
    service.process.terminate()
    assert service.process.wait(7) in (0, -signal.SIGTERM)
    script = """
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
main.log_writer.add("INFO", "lost", {})  # else the thread that writes would end here
print("alive")
"""
    assert run_beside_main(script, tmp_path) == "alive\n"


def test_lines_that_wait_are_bounded(tmp_path: Path) -> None:
    script = """
main.log_writer.thread = threading.current_thread()  # which writes nothing
for number in range(20_000):
    main.log_writer.add("INFO", str(number), {})
print(len(main.log_writer.lines))
"""
    assert run_beside_main(script, tmp_path) == "10000\n"


# --- Errors ---------------------------------------------------------------------------------------


JSON = {"content-type": "application/json"}
ERRORS: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "half an object": (400, "POST", "/auth/register", {"content": b"{", "headers": JSON}),
    "no token": (401, "GET", "/users/me", {}),
    "a wrong password": (401, "POST", "/auth/login", {"data": {"username": "x", "password": "y"}}),
    "an unknown path": (404, "GET", "/nowhere", {}),
    "an unknown method": (405, "DELETE", "/auth/login", {}),
    "a large body": (413, "POST", "/auth/register", {"content": b" " * (2**20 + 1)}),
    "a large body for nobody": (413, "POST", "/nowhere", {"content": b" " * (2**20 + 1)}),
    "no fields": (422, "POST", "/auth/register", {"json": {}}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_cors_headers_and_keeps_the_connection(
    service: Service, error: str
) -> None:
    status, method, path, sent = ERRORS[error]
    origin = {"Origin": "http://localhost:3000"} | sent.get("headers", {})
    answer = service.client.request(method, path, **sent | {"headers": origin})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.headers["access-control-allow-credentials"] == "true"
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    assert exposed == {
        *("ETag", "Location", "Retry-After", "RateLimit", "RateLimit-Policy"),
        *("X-Request-ID", "X-Process-Time", "X-Cache"),
    }
    assert "connection" not in answer.headers
    origin |= {"Origin": "http://evil.example"}
    foreign = service.client.request(method, path, **sent | {"headers": origin})
    assert foreign.status_code == status
    assert "access-control-allow-origin" not in foreign.headers


def test_405_names_the_methods_of_the_path(service: Service) -> None:
    allowed = service.client.put("/users/me").headers["allow"]
    assert set(allowed.split(", ")) == {"GET", "PATCH", "DELETE"}
    allowed = service.client.delete(f"{service.address}/health").headers["allow"]
    assert set(allowed.split(", ")) == {"GET", "HEAD"}


def test_405_names_the_methods_that_the_docs_show(service: Service) -> None:
    """A path of its own is looked up before one with a parameter, so it has to name all of them."""
    paths = service.client.get(f"{service.address}/openapi.json").json()["paths"]
    for path, methods in paths.items():
        answer = service.client.options(service.address + re.sub(r"\{\w+\}", "1", path))
        assert set(answer.headers["allow"].lower().split(", ")) - {"head"} == methods.keys(), path


def test_a_slash_too_many_is_404_and_not_redirected(service: Service) -> None:
    assert service.client.get("/users/").status_code == 404


def test_a_mistake_of_ours_is_a_500_with_its_traceback_in_the_log_alone(start: Start) -> None:
    service = start(CACHE_SECONDS="0")
    person = sign_up(service)
    service.sql("UPDATE user SET created_at = 'not a time'")
    for _ in range(2):
        mistake = person.api.get("/users/me", headers={"Origin": "http://localhost:3000"})
        assert mistake.json()["error_code"] == "INTERNAL_ERROR"
        assert mistake.json()["detail"] == "The service made a mistake; its log has the details"
        assert mistake.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert "connection" not in mistake.headers
    eventually(lambda: "Traceback" in service.log.read_text())


# --- Tables ---------------------------------------------------------------------------------------


FORM = {"content-type": "application/x-www-form-urlencoded"}
BAD_BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "nothing": (b"", {}),
    "50,000 fields": (json.dumps(dict.fromkeys(map(str, range(50_000)))).encode(), JSON),
    "nothing, called JSON": (b"", JSON),
    "a NUL": (
        b'{"email":"a\\u0000@b.co","password":"\\u0000aaaaaaaaa","first_name":"\\u0000"}',
        JSON,
    ),
    "a NUL in a post": (b'{"title":"a","content":"a\\u0000"}', JSON),
    "a NUL in a comment": (b'{"text":"a\\u0000"}', JSON),
    "half a surrogate pair": (b'{"email":"a@b.co","password":"aaaaaaaaaa","bio":"\\ud800"}', JSON),
    "half a surrogate pair in a post": (b'{"title":"\\ud800","content":"\\udfff"}', JSON),
    "half a surrogate pair in a comment": (b'{"text":"\\ud800"}', JSON),
    "half a surrogate pair as a name": (b'{"\\ud800":1}', JSON),
    "NaN": (b'{"age":NaN}', JSON),
    "Infinity": (b'{"age":-Infinity}', JSON),
    "1e999": (b'{"age":1e999}', JSON),
    "100,000 [": (b"[" * 100_000, JSON),
    "5,000 digits": (b'{"age":' + b"9" * 5_000 + b"}", JSON),
    "bad UTF-8": (b'{"first_name":"\xff\xfe"}', JSON),
    "an array": (b"[1]", JSON),
    "null": (b"null", JSON),
    "half an object": (b'{"email":', JSON),
    "text": (b"hello", {"content-type": "text/plain"}),
    "JSON called text": (b'{"email":"a@b.co"}', {"content-type": "text/plain"}),
    "a form": (b"username=%00&password=%ff%fe&refresh_token=%ED%A0%80", FORM),
    "a long form": (b"username=a&password=b&refresh_token=" + b"c" * 60_000, FORM),
    "1,500 fields": (b"&".join(b"f%d=1" % n for n in range(1_500)), FORM),
    "broken multipart": (b"--x\r\nno", {"content-type": "multipart/form-data; boundary=x"}),
    "half a surrogate pair in an odd charset": (
        b'--x\r\nContent-Disposition: form-data; name="username"\r\n\r\na@b.co\r\n'
        b'--x\r\nContent-Disposition: form-data; name="password"\r\n\r\n\\ud800\r\n'
        b'--x\r\nContent-Disposition: form-data; name="refresh_token"\r\n\r\n\\ud800\r\n--x--\r\n',
        {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"},
    ),
    "multipart without a boundary": (b"x", {"content-type": "multipart/form-data"}),
    "a file for a field": (
        b'--x\r\nContent-Disposition: form-data; name="username"; filename="f"\r\n\r\na\r\n'
        b"--x--\r\n",
        {"content-type": "multipart/form-data; boundary=x"},
    ),
}


@pytest.mark.parametrize("bad", BAD_BODIES)
def test_a_bad_body_is_refused_by_every_route(service: Service, bad: str) -> None:
    body, headers = BAD_BODIES[bad]
    person = sign_up(service)
    post = write(person)["id"]
    admin = sign_in_admin(service)
    for caller, method, path in (
        (service.client, "POST", "/auth/register"),
        (service.client, "POST", "/auth/login"),
        (service.client, "POST", "/auth/refresh"),
        (person.api, "PATCH", "/users/me"),
        (admin.api, "POST", "/users"),
        (person.api, "POST", "/posts"),
        (person.api, "PATCH", f"/posts/{post}"),
        (person.api, "PUT", f"/posts/{post}"),
        (person.api, "POST", f"/posts/{post}/comments"),
    ):
        answer = caller.request(method, path, content=body, headers=headers)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert len(answer.content) < 5_000
    assert person.api.get("/users/me").status_code == 200


def test_of_a_field_sent_twice_the_last_counts(service: Service) -> None:
    person = sign_up(service)
    twice = person.api.patch("/users/me", content=b'{"bio":"one","bio":"two"}', headers=JSON)
    assert twice.json()["bio"] == "two"


BAD_IDS = ["0", "-1", str(2**31), str(2**63), "9" * 5_000, "abc", "1.5"]


@pytest.mark.parametrize("bad", [*BAD_IDS, "%00", "%ED%A0%80", "me%20"], ids=lambda bad: bad[:20])
def test_an_id_out_of_range_is_422(service: Service, bad: str) -> None:
    admin = sign_in_admin(service)
    for method, path in (
        ("GET", "/users/{}"),
        ("PATCH", "/users/{}"),
        ("DELETE", "/users/{}"),
        ("GET", "/posts/{}"),
        ("PATCH", "/posts/{}"),
        ("PUT", "/posts/{}"),
        ("DELETE", "/posts/{}"),
        ("POST", "/posts/{}/publish"),
        ("GET", "/posts/{}/comments"),
        ("POST", "/posts/{}/comments"),
        ("DELETE", "/comments/{}"),
        ("GET", "/events?post_id={}"),
        ("GET", "/posts?before={}"),
    ):
        good = {"text": "x"} if path.endswith("comments") else {}
        assert admin.api.request(method, path.format(bad), json=good).status_code == 422, path


@pytest.mark.parametrize(
    "query",
    f"page=0 page=-1 page={2**31} page=x page=%00 size=0 size=-1 size=101".split(),
)
def test_a_page_out_of_range_is_422(service: Service, query: str) -> None:
    admin = sign_in_admin(service)
    post = write(admin)["id"]
    for path in ("/users", "/posts", "/users/me/posts", f"/posts/{post}/comments"):
        assert admin.api.get(f"{path}?{query}").status_code == 422, path


BAD_QUERIES = [
    *("POST /auth/logout?everywhere=2", "POST /auth/logout?everywhere=%00"),
    "GET /users?is_active=x",
    *(f"GET /posts?sort={sort}" for sort in ("hashed_password", "id", "--title", "")),
    *(f"GET /posts?min_date={date}" for date in ("yesterday", "", "1700000000", "2024-13-01")),
    *(f"GET /posts?max_date={date}" for date in ("2024-02-30", "2024-01-01T25:00", "%00")),
    "GET /posts?min_date=0001-01-01T00:00:00%2B23:59",
    "GET /posts?max_date=9999-12-31T23:59:59-23:59",
    "GET /posts?min_date=2024-01-01%ED%A0%80",
    "GET /posts?min_date=" + "9" * 5_000,
    *(f"GET /posts?before=5&{other}" for other in ("page=1", "sort=title")),
]


@pytest.mark.parametrize("query", BAD_QUERIES, ids=lambda query: query[:50])
def test_a_bad_query_is_422(service: Service, query: str) -> None:
    refused = sign_up(service).api.request(*query.split(" "))
    assert refused.status_code == 422
    value = query.rpartition("=")[2]
    assert len(value) < 3 or value not in refused.text  # what was wrong is not repeated


BAD_EMAILS = ["Name <a@b.co>", "a@b.co, c@d.co", "@b.co", "a@", "a", "", "a\n@b.co", "a b@c.co"]


@pytest.mark.parametrize(
    "email", [*BAD_EMAILS, "a" * 290 + "@example.com", None, 1], ids=lambda email: repr(email)[:20]
)
def test_only_one_plain_email_is_taken(service: Service, email: object) -> None:
    assert register(service, email=email).status_code == 422


@pytest.mark.parametrize(
    "password",
    ["x" * 7, "x" * 129, "password", "12345678", "QwertyUIOP", "nul\u0000nul\u0000nul"],
    ids=["7 x", "129 x", "password", "12345678", "QwertyUIOP", "a NUL"],
)
def test_weak_and_endless_passwords_are_refused(service: Service, password: str) -> None:
    person, admin = sign_up(service), sign_in_admin(service)
    assert register(service, password=password).status_code == 422
    change = {"password": password, "current_password": PASSWORD}
    assert person.api.patch("/users/me", json=change).status_code == 422
    body = {"email": new_email(), "password": password}
    assert admin.api.post("/users", json=body).status_code == 422
    assert register(service, password="password123").status_code == 201


def bounds(**fields: tuple[list[Any], list[Any]]) -> pytest.MarkDecorator:
    """Asks a test for each field about values that it takes, and then about others."""
    rows, ids = [], []
    for field, (good, bad) in fields.items():
        for taken, value in [
            *((True, value) for value in good),
            *((False, value) for value in bad),
        ]:
            rows.append((field, value, taken))
            length = len(str(value))
            shown = repr(value) if length < 30 else f"of {length} characters"
            ids.append(f"{field} {shown} is {'taken' if taken else 'refused'}")
    return pytest.mark.parametrize(("field", "value", "taken"), rows, ids=ids)


@bounds(
    first_name=(["x" * 100], ["x" * 101, "line\nbreak"]),
    last_name=([None], ["bell\u0007", "del\u007f", "next\u0085line"]),
    age=([1, 149, None], [0, 150, "36", 36.0, True]),
    bio=(["lines\nand 李\U0001f600", "x" * 2_000], ["x" * 2_001, "nul\u0000"]),
    avatar_url=(
        ["https://example.com/a.png", "http://example.com"],
        ["https://example.com/" + "x" * 481, "javascript:alert(1)", "ftp://example.com/a.png"]
        + ["https://", "https://a b", "https://a/\u0001"],
    ),
    email=([], [None]),
    password=([], [None]),
    role=([], [None, "root"]),
    is_active=([], [None, 0, "off"]),
)
def test_each_field_of_a_user_keeps_its_bounds(
    service: Service, field: str, value: object, taken: bool
) -> None:
    person = sign_up(service)
    answer = sign_in_admin(service).api.patch(f"/users/{person.id}", json={field: value})
    assert answer.status_code == (200 if taken else 422)
    if taken:
        assert answer.json()[field] == value
    else:
        assert str(value) not in answer.text or len(str(value)) < 5


def test_names_are_trimmed_and_make_the_full_name(service: Service) -> None:
    person = sign_up(service, first_name="  Ann ", last_name="")
    assert person.api.get("/users/me").json()["full_name"] == "Ann"
    both = person.api.patch("/users/me", json={"last_name": " Lee\n"}).json()
    assert (both["first_name"], both["last_name"], both["full_name"]) == ("Ann", "Lee", "Ann Lee")
    none = person.api.patch("/users/me", json={"first_name": None, "last_name": None}).json()
    assert none["full_name"] == f"user {person.id}"


@bounds(
    title=(["x" * 255, "  x  "], ["x" * 256, "", " \u3000\n", "line\nbreak", "bell\u0007", None]),
    content=(
        ["x" * 100_000, "lines\n\tand 李\U0001f600"],
        ["x" * 100_001, "", " \n\u2003", "nul\u0000", None],
    ),
    version=([], [None, "1", True, 1.5]),
    is_published=([], [True]),
)
def test_each_field_of_a_post_keeps_its_bounds(
    service: Service, field: str, value: Any, taken: bool
) -> None:
    author = sign_up(service)
    post = write(author)
    changed = author.api.patch(f"/posts/{post['id']}", json={field: value})
    assert changed.status_code == (200 if taken else 422)
    if field in ("title", "content"):
        made = author.api.post("/posts", json=A_POST | {field: value})
        assert made.status_code == (201 if taken else 422)
    if taken:
        assert changed.json()[field] == (value.strip() if field == "title" else value)
    else:
        assert author.api.get(f"/posts/{post['id']}").json() == post


@pytest.mark.parametrize("flag", [0, 1, "true", "off", None])
def test_a_flag_is_true_or_false_and_nothing_like_it(service: Service, flag: object) -> None:
    person, admin = sign_up(service), sign_in_admin(service)
    assert person.api.post("/posts", json=A_POST | {"is_published": flag}).status_code == 422
    account = {"email": new_email(), "password": PASSWORD, "is_active": flag}
    assert admin.api.post("/users", json=account).status_code == 422
    assert person.api.get("/users/me/posts").json()["total"] == 0


@bounds(text=(["x" * 500], ["x" * 501, "", " \n\u2003", "a\u0000", 1]))
def test_the_text_of_a_comment_keeps_its_bounds(
    service: Service, field: str, value: Any, taken: bool
) -> None:
    author = sign_up(service)
    answer = author.api.post(f"/posts/{publish(author)['id']}/comments", json={field: value})
    assert answer.status_code == (201 if taken else 422)


NOT_THEIRS = """id is_superuser hashed_password author_id created_at full_name sid author post_id
    updated_at"""


@pytest.mark.parametrize("field", NOT_THEIRS.split())
def test_nobody_assigns_what_is_not_theirs(service: Service, field: str) -> None:
    person, admin = sign_up(service), sign_in_admin(service)
    post = write(person)
    before = person.api.get("/users/me").json()
    account = {"email": new_email(), "password": PASSWORD}
    for caller, method, path, body in (
        (service.client, "POST", "/auth/register", account),
        (person.api, "PATCH", "/users/me", {}),
        (admin.api, "PATCH", f"/users/{person.id}", {}),
        (admin.api, "POST", "/users", account),
        (person.api, "POST", "/posts", {"title": "x", "content": "x"}),
        (person.api, "PATCH", f"/posts/{post['id']}", {"title": "x"}),
        (person.api, "PUT", f"/posts/{post['id']}", {"title": "x"}),
        (person.api, "POST", f"/posts/{post['id']}/comments", {"text": "x"}),
    ):
        assert caller.request(method, path, json=body | {field: 1}).status_code == 422
    assert person.api.get("/users/me").json() == before
    assert person.api.get("/users/me/posts").json()["items"] == [post]


def test_alembic_finds_nothing_to_do(service: Service) -> None:
    migration = pytest.importorskip("alembic.runtime.migration")
    autogenerate = pytest.importorskip("alembic.autogenerate")
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlmodel import SQLModel

    def differences(connection: Connection) -> Any:
        context = migration.MigrationContext.configure(connection)
        return autogenerate.compare_metadata(context, SQLModel.metadata)

    async def compare() -> Any:
        engine = create_async_engine(service.settings["DATABASE_URL"])
        async with engine.connect() as connection:
            found = await connection.run_sync(differences)
        await engine.dispose()
        return found

    assert asyncio.run(compare()) == []


# --- Database -------------------------------------------------------------------------------------


def test_every_connection_is_opened_for_durability(tmp_path: Path) -> None:
    script = """
for engine in (main.readers, main.writer):
    async with engine.connect() as connection:
        for name in ("busy_timeout", "journal_mode", "synchronous", "foreign_keys"):
            print((await connection.exec_driver_sql(f"PRAGMA {name}")).scalar(), end=" ")
    await engine.dispose()
"""
    assert run_beside_main(script, tmp_path) == "5000 wal 2 1 " * 2


def test_a_statement_costs_one_trip_to_the_thread_of_its_connection(tmp_path: Path) -> None:
    script = """
import aiosqlite

trips, usual = [], aiosqlite.Connection._execute

def count(*work):
    trips.append(work)
    return usual(*work)

async with main.readers.connect() as connection:
    aiosqlite.Connection._execute = count
    rows = await connection.exec_driver_sql("SELECT 1, 'one' UNION SELECT 2, 'two'")
    print(len(trips), rows.all())
    await connection.exec_driver_sql("CREATE TABLE t (a)")
    many = await connection.exec_driver_sql("INSERT INTO t VALUES (?)", [(1,), (2,)])
    print(len(trips), many.rowcount)
"""
    assert run_beside_main(script, tmp_path) == "1 [(1, 'one'), (2, 'two')]\n3 2\n"


def test_who_waits_for_a_connection_is_served_before_who_comes_later(tmp_path: Path) -> None:
    script = """
served = []

async def read(name):
    async with main.readers.connect():
        served.append(name)

held = [await main.readers.connect() for _ in range(2)]
waiting = [asyncio.create_task(read(name)) for name in "abc"]
await asyncio.sleep(0.1)
await held[0].close()
await read("late")
await asyncio.gather(*waiting)
await held[1].close()
print(*served)
"""
    assert run_beside_main(script, tmp_path) == "a b c late\n"


def test_the_pool_for_postgresql_has_5_connections_and_10_more(tmp_path: Path) -> None:
    pytest.importorskip("asyncpg")
    script = "pool = main.readers.pool; print(pool._pre_ping, pool._max_overflow)"
    script += "; print(pool.size(), main.readers is main.writer)"
    url = "postgresql+asyncpg://nobody@127.0.0.1:1/nothing"
    assert run_beside_main(script, tmp_path, DATABASE_URL=url) == "True 10\n5 True\n"


def test_a_writer_takes_the_lock_before_it_reads(tmp_path: Path) -> None:
    script = """
async with main.AsyncSession(main.writer) as db:
    await db.exec(main.select(1))
    other = sqlite3.connect("app.db", timeout=0)
    try:
        other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        print(error)
"""
    assert run_beside_main(script, tmp_path) == "database is locked\n"


def test_nothing_is_answered_or_told_before_its_commit(tmp_path: Path) -> None:
    script = """
import httpx

order, usual = [], main.events.tell

async def tell(*what):
    order.append("told")
    await usual(*what)

async def app(scope, receive, send):
    async def noted(message):
        if message["type"] == "http.response.start":
            order.append("answered")
        await send(message)
    await main.app(scope, receive, noted)

async def call(method, path, **sent):
    order.clear()
    answer = await client.request(method, path, **sent)
    print(*order)
    return answer.json() if answer.is_success and answer.content else answer.text

main.events.tell = tell
main.event.listen(main.writer.sync_engine, "commit", lambda _: order.append("committed"))
url, door = "http://x/api/v1", httpx.ASGITransport(app)
async with main.lifespan(main.app), httpx.AsyncClient(transport=door, base_url=url) as client:
    person = {"email": "a@example.com", "password": "correct horse"}
    await call("POST", "/auth/register", json=person)
    form = {"username": "admin@example.com", "password": "correct horse"}
    tokens = await call("POST", "/auth/login", data=form)
    form = {"refresh_token": tokens["refresh_token"]}
    tokens = await call("POST", "/auth/refresh", data=form)
    client.headers["Authorization"] = f"Bearer {tokens['access_token']}"
    await call("POST", "/users", json=person | {"email": "b@example.com"})
    await call("PATCH", "/users/2", json={"bio": "x"})
    post = {"title": "x", "content": "x"}
    await call("POST", "/posts", json=post)
    await call("POST", "/posts/1/publish")
    await call("POST", "/posts", json=post | {"is_published": True})
    await call("PATCH", "/posts/2", json=post)
    await call("POST", "/posts/2/comments", json={"text": "x"})
    await call("DELETE", "/comments/1")
    await call("DELETE", "/posts/2")
    await call("DELETE", "/users/2")
    await call("POST", "/auth/logout")
"""
    named = {"FIRST_SUPERUSER_EMAIL": "admin@example.com"}
    named |= {"FIRST_SUPERUSER_PASSWORD": "correct horse", "LOG_LEVEL": "warning"}
    orders = run_beside_main(script, tmp_path, BCRYPT_ROUNDS="4", **named).splitlines()
    assert orders.count("committed told answered") == 6, orders
    assert orders.count("committed answered") == 8, orders


def test_who_was_deleted_behind_the_service_writes_no_more(start: Start) -> None:
    service = start()
    person = sign_up(service)
    service.sql(f"DELETE FROM user WHERE id = {person.id}")
    refused = person.api.post("/posts", json=A_POST)
    assert (refused.status_code, refused.json()["error_code"]) == (409, "CONFLICT")


@pytest.mark.slow
def test_of_200_writers_at_once_all_succeed(service: Service) -> None:
    person = sign_up(service)
    ids = {post["id"] for post in at_once(200, lambda _: write(person))}
    assert len(ids) == person.api.get("/users/me/posts").json()["total"] == 200


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(100 if FULL else 2))
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_kill_9_loses_nothing_that_was_answered(start: Start, database: str, turn: int) -> None:
    began = time.monotonic()
    service = start(database=database)
    first_start = time.monotonic() - began
    person = sign_up(service)
    acknowledged: list[str] = []

    def write_or_kill(number: int) -> None:
        if number == 0:
            try:
                eventually(lambda: len(acknowledged) > 20 + turn % 17)
            finally:
                service.process.kill()
        with contextlib.suppress(httpx.TransportError):
            while number:
                acknowledged.append(register(service).json()["email"])

    at_once(5, write_or_kill)
    service.crash()
    began = time.monotonic()
    service.start()
    assert time.monotonic() - began < first_start + 2  # recovering takes no time to speak of
    stored = {email for (email,) in service.sql('SELECT email FROM "user"')}
    assert stored >= set(acknowledged)
    if database == "sqlite":
        assert service.sql("PRAGMA integrity_check") == [("ok",)]
    assert service.as_(person.tokens["access_token"]).get("/users/me").status_code == 200


def test_a_commit_that_fails_is_503_and_nothing_is_stored(start: Start) -> None:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux can limit the files of another process")
    service = start()
    sign_up(service)
    limit = partial(resource.prlimit, service.process.pid, resource.RLIMIT_FSIZE)
    limits = limit()
    limit((service.log.stat().st_size + 9_000, limits[1]))
    email = new_email()
    assert register(service, email=email).status_code == 503
    eventually(lambda: "the database failed: " in service.log.read_text())
    limit(limits)
    assert log_in(service, email).status_code == 401
    assert register(service, email=email).status_code == 201
    assert service.sql("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.slow
def test_a_locked_database_is_503_for_writers_and_open_to_readers(start: Start) -> None:
    service = start()
    person = sign_up(service)
    file = service.folder / "app.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with ThreadPoolExecutor(2) as pool:
            change = partial(person.api.patch, "/users/me", json={"bio": "x"})
            # One waits 5 s for the lock; of two, the other waits as long for the first.
            writes = [pool.submit(change) for _ in range(2 if FULL else 1)]
            assert person.api.get("/users/me").json()["bio"] is None
            assert service.client.get(f"{service.address}/health").status_code == 200
            assert {write.result().status_code for write in writes} == {503}
        other.execute("ROLLBACK")
    assert person.api.patch("/users/me", json={"bio": "x"}).status_code == 200


def test_no_connection_in_five_seconds_is_503(tmp_path: Path) -> None:
    script = """
import httpx

person = {"email": "a@example.com", "password": "correct horse"}
door = httpx.ASGITransport(main.app)
async with main.lifespan(main.app), httpx.AsyncClient(transport=door) as client:
    print(main.readers.pool._timeout, main.writer.pool._timeout)
    main.writer.pool._timeout = 0.1
    async with main.writer.connect():
        answer = await client.post("http://x/api/v1/auth/register", json=person)
    print(answer.status_code, answer.headers["Retry-After"])
"""
    assert run_beside_main(script, tmp_path, BCRYPT_ROUNDS="4") == "5 5\n503 5\n"


@pytest.mark.slow
def test_a_lock_that_postgresql_does_not_give_is_503(start: Start) -> None:
    service = start(database="postgresql")
    person = sign_up(service)

    async def patch_while_locked() -> Any:
        import asyncpg

        url = service.settings["DATABASE_URL"].replace("+asyncpg", "")
        other = await asyncpg.connect(url)
        async with other.transaction():
            await other.execute('LOCK TABLE "user" IN ACCESS EXCLUSIVE MODE')
            began = time.monotonic()
            health = await asyncio.to_thread(service.client.get, f"{service.address}/health")
            assert (health.status_code, time.monotonic() - began < 2) == (503, True)
            answer = await asyncio.to_thread(person.api.patch, "/users/me", json={"bio": "x"})
        await other.close()
        return answer

    assert asyncio.run(patch_while_locked()).status_code == 503
    assert person.api.patch("/users/me", json={"bio": "x"}).status_code == 200


class PostgresServer:
    """One of our own, to restart."""

    def __init__(self) -> None:
        debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
        self.pg_ctl, port = str([Path("pg_ctl"), *debian][-1]), free_port()
        if not shutil.which(self.pg_ctl) or not POSTGRES:
            pytest.skip("TEST_DATABASE_URL is not set, or PostgreSQL is not installed")
        self.folder = tempfile.mkdtemp()
        self.as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.as_user:  # PostgreSQL refuses to run as root
            shutil.chown(self.folder, "postgres")
        self.url = f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres"
        self.options = f"-p {port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self.call("init", "-o", "-A trust -U postgres")

    def call(self, *command: str) -> None:
        log = ["-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-w"]
        done = [*self.as_user, self.pg_ctl, *command, *log]
        subprocess.run(done, check=True, stdout=subprocess.DEVNULL, cwd=self.folder)

    def start(self) -> None:
        self.call("start", "-o", self.options)

    def stop(self, mode: str = "immediate") -> None:
        self.call("stop", "-m", mode)


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    server.start()
    yield server
    server.stop()
    shutil.rmtree(server.folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_postgresql_that_restarts_under_load_costs_503s_and_loses_nothing(
    start: Start, postgres_server: PostgresServer, mode: str
) -> None:
    service = start(DATABASE_URL=postgres_server.url)
    with Load(service, threads=20) as load:
        load.more(100)
        postgres_server.stop(mode)
        while_gone = load.more(100)
        postgres_server.start()
        eventually(lambda: {status for _, status in load.more(50)} == {200, 201}, 20)
        load.more(100)
    assert 503 in {status for _, status in while_gone}
    assert {status for _, status in load.done} == {200, 201, 503}
    stored = service.sql("SELECT count(*) FROM post")[0][0]
    assert stored >= [status for _, status in load.done].count(201)
    assert "Traceback" not in service.log.read_text()


# --- Security -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "password",
    ["x" * 73, "\U0001f600" * 25, "\U0001f600" * 64, "Pässwört " * 14, "  spaces  ", "x" * 128],
    ids=["73 x", "25 emoji", "64 emoji", "umlauts", "spaces", "128 x"],
)
def test_every_character_of_a_password_counts(service: Service, password: str) -> None:
    email = sign_up(service, password=password).email
    shorter = password[:-1]
    others = {shorter, f"{shorter}y", f"{password}x", password.swapcase(), password.strip()}
    for wrong in others - {password}:
        assert log_in(service, email, wrong).json()["error_code"] == "INVALID_CREDENTIALS"


def test_a_digest_that_begins_with_nul_is_told_from_another(service: Service) -> None:
    words = (f"password {number}" for number in count())
    nul_first = (w for w in words if not hashlib.sha256(w.encode()).digest()[0])
    one, other = next(nul_first), next(nul_first)
    person = sign_up(service, password=one)
    assert log_in(service, person.email, other).status_code == 401


@pytest.mark.slow
def test_a_refused_login_takes_the_same_time_whatever_the_reason(start: Start) -> None:
    service = start(BCRYPT_ROUNDS="10")
    known, gone = sign_up(service), sign_up(service)
    sign_in_admin(service).api.patch(f"/users/{gone.id}", json={"is_active": False})
    wrong = {"known": known.email, "unknown": new_email(), "deactivated": gone.email}

    def usual_times() -> list[float]:
        times: dict[str, list[float]] = {name: [] for name in wrong}
        for _ in range(30 if FULL else 12):
            for name, email in wrong.items():
                began = time.perf_counter()
                assert log_in(service, email, "wrong password").status_code == 401
                times[name].append(time.perf_counter() - began)
        usual = statistics.median if FULL else min  # the least says most on a busy machine
        return [usual(spans) for spans in times.values()]

    def same() -> bool:
        found = usual_times()
        return max(found) < min(found) * 1.1

    assert any(same() for _ in range(6))  # what is there each time is more than noise


@pytest.mark.slow
def test_hashing_holds_up_neither_the_event_loop_nor_a_connection(start: Start) -> None:
    service = start(BCRYPT_ROUNDS="13")
    person = sign_in_admin(service)
    with ThreadPoolExecutor(5) as pool:
        wrong = {"email": new_email(), "current_password": "wrong password"}
        hashing = [pool.submit(log_in, service, **ADMIN) for _ in range(2)]
        hashing += [pool.submit(person.api.patch, "/users/me", json=wrong) for _ in range(2)]
        hashing += [pool.submit(register, service)]
        reads = [person.api.get("/users/me").status_code for _ in range(5)]
        write = person.api.patch("/users/me", json={"bio": "x"}).status_code
        assert not any(one.done() for one in hashing)
        assert {*reads, write} == {200}
        assert {one.result().status_code for one in hashing} == {200, 403, 201}


@pytest.mark.slow
def test_no_more_passwords_are_hashed_at_once_than_there_are_cores(start: Start) -> None:
    service = start(BCRYPT_ROUNDS="11")
    began = time.monotonic()

    def end_of_a_login(_: int) -> float:
        assert log_in(service, **ADMIN).status_code == 200
        return time.monotonic() - began

    ends = sorted(at_once(6 * (os.cpu_count() or 1), end_of_a_login))
    assert ends[0] < ends[-1] / 2  # all at once would end together


@pytest.mark.parametrize(("cores", "each"), [(9, "2\n"), (3, "1\n")])
def test_workers_share_the_cores_among_them(tmp_path: Path, cores: int, each: str) -> None:
    program = f"import os\nos.cpu_count = lambda: {cores}\n"
    program += "import main\nprint(main.cores.total_tokens)\n"
    assert output_of(program, tmp_path, WORKERS="4") == each


@pytest.mark.slow
def test_too_many_waiting_passwords_are_turned_away(start: Start) -> None:
    service = start(BCRYPT_ROUNDS="10")
    answers = at_once(100, lambda n: log_in(service, f"nobody{n}@example.com"))
    assert {answer.status_code for answer in answers} == {401, 503}


@pytest.mark.slow
def test_without_any_setting_it_starts_and_keeps_its_key_beside_the_database(start: Start) -> None:
    empty = {"FIRST_SUPERUSER_EMAIL": "", "FIRST_SUPERUSER_PASSWORD": "", "SMTP_URL": ""}
    unset = dict.fromkeys(("SECRET_KEY", "DATABASE_URL", "BCRYPT_ROUNDS"), "unset")
    service = start(command=MAIN, **unset, **empty)
    person = sign_up(service)
    assert person.id == 1
    eventually(lambda: f"Mail to\n{person.email}\n" in service.log.read_text())
    kept = service.folder / "app.db.key"
    assert len(kept.read_text()) >= 32
    assert kept.stat().st_mode & 0o777 == 0o600
    service.stop()
    service.start()
    assert service.as_(person.tokens["access_token"]).get("/users/me").status_code == 200
    assert [file.name for file in service.folder.iterdir() if "key" in file.name] == [kept.name]


def test_a_kept_key_that_is_too_short_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "app.db.key").write_text("short")
    status, said = run_main(tmp_path)
    assert status == 3
    assert "app.db.key is shorter than 32 bytes" in said


def test_where_there_are_no_links_no_key_is_left_behind(tmp_path: Path) -> None:
    script = """
def fail(*_):
    raise OSError("there are no links")

Path.hardlink_to = fail
with suppress(OSError):
    main.kept_secret()
print(sorted(os.listdir()))
"""
    assert run_beside_main(script, tmp_path) == "['errors', 'printed', 'script.py']\n"


def test_of_keys_made_at_once_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main.settings, "secret_key", None)
    for turn in range(10):
        url = f"sqlite+aiosqlite:///{tmp_path}/{turn}.db"
        monkeypatch.setattr(main.settings, "database_url", url)
        keys = at_once(8, lambda _: main.signing_key.__wrapped__().to_dict()["k"])
        assert len(set(keys)) == 1
    assert {file.name for file in tmp_path.iterdir()} == {f"{n}.db.key" for n in range(10)}


@pytest.mark.parametrize("secret", ["-----BEGIN PUBLIC KEY-----", "ssh-rsa ", '{"keys": []}'])
def test_a_secret_key_may_look_like_anything(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    key = secret.ljust(40, "x").encode()
    monkeypatch.setattr(main.settings, "secret_key", key)
    signed = jwt.encode({"a": 1}, main.signing_key.__wrapped__(), "HS256")
    digest = hmac.digest(key, signed.rpartition(".")[0].encode(), "sha256")
    assert signed.endswith(base64.urlsafe_b64encode(digest).decode().rstrip("="))


def test_tokens_hold_their_claims_and_nothing_more(service: Service) -> None:
    answer = log_in(service, sign_up(service).email)
    tokens = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert tokens.keys() == {"access_token", "refresh_token", "token_type", "expires_in"}
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 1800)
    for kind, lifetime in (("access", 1800), ("refresh", 7 * 86400)):
        claims = jwt.decode(tokens[f"{kind}_token"], KEY, ["HS256"])
        assert claims.keys() == {"sub", "exp", "iat", "jti", "sid", "type"}
        assert claims["type"] == kind
        assert isinstance(claims["sub"], str)
        assert claims["exp"] - claims["iat"] == lifetime


def test_the_longest_life_of_a_session_bounds_its_tokens(start: Start) -> None:
    service = start(ACCESS_TOKEN_EXPIRE_MINUTES="525600", REFRESH_TOKEN_EXPIRE_DAYS="1")
    person = sign_up(service)
    assert 86_390 <= person.tokens["expires_in"] <= 86_400
    service.sql(f"UPDATE session SET expires_at = {service.ago(hours=-1)}")
    again = refresh(service, person.tokens["refresh_token"]).json()
    assert 3_590 <= again["expires_in"] <= 3_600
    tokens = again["access_token"], again["refresh_token"]
    assert len({jwt.get_unverified_claims(token)["exp"] for token in tokens}) == 1


def forge(
    account: Account, kind: str = "access", drop: str = "", key: str = KEY, **changes: Any
) -> str:
    """A token as the service makes them, but for the changes."""
    claims = jwt.get_unverified_claims(account.tokens[f"{kind}_token"]) | changes
    return str(jwt.encode({k: v for k, v in claims.items() if k != drop}, key, "HS256"))


def raw_token(header: object, claims: object) -> str:
    """Put together by hand, for what no library would sign."""

    def part(value: object) -> str:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(text).rstrip(b"=").decode()

    signed = f"{part(header)}.{part(claims)}"
    return f"{signed}.{part(hmac.digest(KEY.encode(), signed.encode(), 'sha256'))}"


def forgeries(person: Account, kind: str = "access") -> dict[str, tuple[str, ...]]:
    """Tokens of that kind that must not be taken, by what is wrong with them."""
    token, other = person.tokens[f"{kind}_token"], {"access": "refresh", "refresh": "access"}[kind]
    claims = jwt.get_unverified_claims(token)
    header, payload, _ = token.split(".")
    make = partial(forge, person, kind)
    deep = base64.urlsafe_b64encode(b"[" * 5_000).decode()
    forged: dict[str, tuple[str, ...]] = {
        "signature stripped": (f"{header}.{payload}.", f"{header}.{payload}"),
        "another key": (make(key="another key, which is long enough too"),),
        "another payload": (
            f"{header}.{raw_token({}, claims | {'sub': '1'}).split('.')[1]}.{token[-43:]}",
        ),
        "5,000 [": (deep, f"{deep}.{deep}.{token[-43:]}", f"{header}.{deep}.{token[-43:]}"),
        "60 KB": ("a" * 60_000, f"{header}.{'a' * 60_000}.{token[-43:]}"),
        "a claim missing": tuple(make(drop=name) for name in claims),
        "exp of a strange kind": tuple(
            raw_token({"alg": "HS256"}, claims | {"exp": exp})
            for exp in (None, "soon", [1], {"a": 1}, True, 1e400, float("nan"), -1)
        ),
        "expired": (make(exp=int(time.time()) - 1),),
        "sub of a strange kind": tuple(make(sub=sub) for sub in ("0", "01", "x", "9" * 30)),
        "sid of a strange kind": tuple(make(sid=sid) for sid in ("", "x", "\u0000", "a" * 43)),
        "sub of a strange type": (raw_token({"alg": "HS256"}, claims | {"sub": 1}),),
        "claims that are no object": (
            raw_token({"alg": "HS256"}, [1]),
            raw_token({"alg": "HS256"}, b"[" * 2_000),
        ),
        "a token of the other kind": (person.tokens[f"{other}_token"], make(type=other)),
        "another type": (make(type=kind.upper()), make(type=[kind])),
        "junk behind it": tuple(token + junk for junk in ("A", "=", ".A", "\u00e9", " x")),
        "nothing": (".", ".."),
    }
    for alg in ("none", "None", "NONE", "nOnE", "", "HS384", "RS256", ["HS256"], "HS", None):
        signed = raw_token({"typ": "JWT", "alg": alg}, claims)
        forged[f"alg {alg!r}"] = (signed, signed[: signed.rindex(".") + 1])
    return forged


@pytest.mark.parametrize("kind", ["access", "refresh"])
def test_no_forged_token_is_taken(service: Service, kind: str) -> None:
    person = sign_up(service)
    for wrong, tokens in forgeries(person, kind).items():
        for token in tokens:
            if kind == "access":
                headers = {b"Authorization": b"Bearer " + token.encode("latin-1")}
                answer = service.client.get("/users/me", headers=headers)
            else:
                answer = refresh(service, token)
            assert answer.json()["error_code"] == "INVALID_TOKEN", wrong
    assert person.api.get("/users/me").status_code == 200
    assert refresh(service, person.tokens["refresh_token"]).status_code == 200


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "ES384", "ES512", "EdDSA"])
def test_no_asymmetric_algorithm_is_ever_accepted(service: Service, algorithm: str) -> None:
    """So a weakness of the packages that python-jose has for them is none here: README says so."""
    person = sign_up(service)
    claims = jwt.get_unverified_claims(person.tokens["access_token"])
    tokens = [raw_token({"typ": "JWT", "alg": algorithm}, claims)]  # signed with our key, too
    if curve := {"ES256": NIST256p, "ES384": NIST384p, "ES512": NIST521p}.get(algorithm):
        tokens.append(jwt.encode(claims, SigningKey.generate(curve).to_pem().decode(), algorithm))
    for token in tokens:
        assert service.as_(token).get("/users/me").status_code == 401


# --- Redis ----------------------------------------------------------------------------------------


class RedisServer:
    """One of our own, to stop and to freeze."""

    def __init__(self, folder: Path) -> None:
        if not shutil.which("redis-server"):
            pytest.skip("redis-server is not installed")
        pytest.importorskip("redis")
        self.port, self.folder = free_port(), folder
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        options = f"--port {self.port} --save '' --dir {self.folder} --logfile redis.log"
        self.process = subprocess.Popen(["redis-server", *shlex.split(options)])
        processes.append(self.process)
        eventually(lambda: self.call("PING"))

    def call(self, *command: object) -> Any:
        import redis

        with contextlib.suppress(redis.ConnectionError), redis.Redis.from_url(self.url) as client:
            return client.execute_command(*command)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


StartTwo = Callable[..., tuple[Service, Service]]


@pytest.fixture
def two(start: Start, tmp_path: Path) -> StartTwo:
    """Starts two processes with one database and one Redis."""

    def start_two(url: str, **settings: str) -> tuple[Service, Service]:
        settings |= {"DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/app.db", "REDIS_URL": url}
        return start(**settings), start(**settings)

    return start_two


def test_processes_share_their_limits(two: StartTwo) -> None:
    both = two(new_redis(), RATE_LIMIT="6/hour", AUTH_RATE_LIMIT="3/hour")
    answers = [both[number % 2].client.get("/posts") for number in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429] * 2
    left = [answer.headers["ratelimit"].partition(";t=")[0] for answer in answers]
    assert left == [f'"default";r={number}' for number in (5, 4, 3, 2, 1, 0, 0, 0)]
    logins = [log_in(both[number % 2], "a@example.com").status_code for number in range(5)]
    assert logins == [401, 401, 401, 429, 429]


@pytest.mark.slow
def test_two_workers_share_limits_and_events(start: Start) -> None:
    service = start(WORKERS="2", REDIS_URL=new_redis(), AUTH_RATE_LIMIT="20/hour")
    admin = sign_in_admin(service)
    anew = {"Connection": "close"}  # the next connection may meet the other worker
    form = {"username": "a@example.com", "password": "x"}
    logins = at_once(
        30, lambda _: service.client.post("/auth/login", data=form, headers=anew).status_code
    )
    assert sorted(logins) == [401] * 19 + [429] * 11
    listeners = [Listener(service) for _ in range(8)]
    posts = [publish(admin)["id"] for _ in range(10)]
    for listener in listeners:
        with listener:
            assert [post["id"] for _, post in listener.wait(10)] == posts
    assert "Without REDIS_URL" not in service.log.read_text()


def test_events_and_talk_reach_the_listeners_of_all_processes(two: StartTwo) -> None:
    here, there = two(new_redis())
    author, other = sign_up(here), sign_up(there)
    post = publish(author)["id"]
    with (
        Listener(here) as near,
        Listener(there) as far,
        in_room(author, post) as room,
        in_room(other, post) as other_room,
    ):
        for number in range(10):
            comment((author, other)[number % 2], post, f"Number {number}")
        assert [data["text"] for _, data in near.wait(10)] == [f"Number {n}" for n in range(10)]
        assert (far.wait(10), far.ids) == (near.events, near.ids)
        for one in (room, other_room):
            assert [hear(one)["id"] for _ in range(10)] == near.ids
        say(room, type="message", text="Hello over there")
        for one in (room, other_room):
            message = hear(one)
            assert (message["text"], message["from"]["id"]) == ("Hello over there", author.id)
    with Listener(there, f"?last_event_id={near.ids[4]}") as late:
        assert late.wait(5) == near.events[5:]
    there.stop()
    missed = publish(author)["id"]
    there.start()
    with Listener(there, f"?last_event_id={near.ids[7]}") as later:
        assert later.wait(3)[:2] == near.events[8:]
        assert later.events[2][1]["id"] == missed


def test_what_is_asked_at_once_goes_in_few_trips_and_each_gets_its_answer(tmp_path: Path) -> None:
    script = """
await main.redis.meet()
trips, send = [], main.redis.asking.send_packed_command
async def counted(packed):
    trips.append(packed)
    await send(packed)
main.redis.asking.send_packed_command = counted
first = asyncio.create_task(main.redis.ask("ECHO", "first"))
await asyncio.sleep(0.01)
texts = [str(number) for number in range(500)]
answers = await asyncio.gather(*(main.redis.ask("ECHO", text) for text in texts))
print(await first, answers == texts, len(trips))
"""
    found = run_beside_main(script, tmp_path, REDIS_URL=new_redis())
    assert found == "first True 2\n"


def test_a_trip_with_an_error_leaves_no_answer_for_the_next(tmp_path: Path) -> None:
    script = """
await main.redis.meet()
wrong = ("ECHO", "x"), ("LPUSH", "a list", "1"), ("INCR", "a list"), ("ECHO", "z")
print(await asyncio.gather(*(main.redis.ask(*command) for command in wrong)), main.redis.up)
await main.redis.meet()
print(await main.redis.ask("ECHO", "y"))
"""
    found = run_beside_main(script, tmp_path, REDIS_URL=new_redis())
    assert found == "[None, None, None, None] False\ny\n"


@pytest.mark.slow
def test_no_request_waits_longer_than_one_trip(tmp_path: Path, redis_server: RedisServer) -> None:
    """Also those who come while others wait; and what comes too late is nobody's answer."""
    script = """
import os, signal, statistics, sys, time
async def ask(delay):
    await asyncio.sleep(delay)
    began = time.monotonic()
    answer = await main.redis.ask("ECHO", f"asked after {delay}")
    return time.monotonic() - began, answer
pid = int(sys.argv[1])
await main.redis.meet()
os.kill(pid, signal.SIGSTOP)
found = await asyncio.gather(*(ask(number / 100) for number in range(16)))
os.kill(pid, signal.SIGCONT)
print(statistics.median(seconds for seconds, _ in found), {answer for _, answer in found})
await main.redis.meet()
print((await ask(0))[1])
"""
    pid = str(redis_server.process.pid)
    waited, answer = run_beside_main(script, tmp_path, pid, REDIS_URL=redis_server.url).splitlines()
    assert float(waited.split()[0]) < 0.07
    assert waited.endswith(" {None}")
    assert answer == "asked after 0"


@pytest.mark.slow
def test_redis_stopped_or_frozen_under_load_costs_no_error_and_little_time(
    start: Start, redis_server: RedisServer
) -> None:
    service = start(REDIS_URL=redis_server.url, RATE_LIMIT="100000/hour")

    def changes() -> list[str]:
        return re.findall(r"Redis (answers|fails \(\w+\)|does not answer)", service.log.read_text())

    with Listener(service) as listener:
        with Load(service) as load:
            usual = statistics.median(seconds for seconds, _ in load.more(100))
            for stop, mend in (("freeze", "thaw"), ("stop", "start")):
                getattr(redis_server, stop)()
                eventually(lambda: changes()[-1] != "answers")
                alone = load.more(200)
                left = service.client.get("/posts").headers["ratelimit"]
                assert 99_000 < int(left.partition("r=")[2].partition(";")[0]) < 100_000
                getattr(redis_server, mend)()
                eventually(lambda: changes()[-1] == "answers")
                load.more(100)
                assert sorted(seconds for seconds, _ in alone)[-20] < usual * 5 + 0.1
        assert {status for _, status in load.done} == {200, 201}
        published = service.sql("SELECT id FROM post ORDER BY id")
        ids = [data["id"] for _, data in listener.wait(len(published))]
        assert sorted(ids) == [post for (post,) in published]  # each once
    said = changes()
    assert {"does not answer", "fails (ConnectionError)"} <= set(said)
    assert all((one == "answers") != (next == "answers") for one, next in pairwise(said))


@pytest.mark.slow
def test_an_event_that_a_frozen_redis_takes_too_late_is_heard_once(
    two: StartTwo, redis_server: RedisServer
) -> None:
    here, there = two(redis_server.url)
    author = sign_up(here)
    with Listener(here) as near, Listener(there) as far:
        redis_server.freeze()
        frozen = publish(author)["id"]
        assert near.wait(1)[0][1]["id"] == frozen
        assert far.events == []
        redis_server.thaw()
        eventually(lambda: here.log.read_text().count("Redis answers") > 1)
        later = publish(author)["id"]
        assert [post["id"] for _, post in far.wait(2)] == [frozen, later]
        assert [post["id"] for _, post in near.wait(2)] == [frozen, later]
        publish(author)
        assert len(near.wait(3)) == 3


def test_a_pause_of_our_own_does_not_count_as_one_of_redis(tmp_path: Path) -> None:
    script = """
import time

await main.redis.meet()
asked = asyncio.create_task(main.redis.ask("ECHO", "answer"))
await asyncio.sleep(0)
time.sleep(2 * main.TRIP_SECONDS)
print(await asked)
"""
    assert run_beside_main(script, tmp_path, REDIS_URL=new_redis()) == "answer\n"


def test_what_others_told_while_redis_was_out_of_reach_is_heard_later(tmp_path: Path) -> None:
    script = """
await main.redis.meet()
told = {"text": '["another-1", "post.deleted", 1, "{}"]'}
await main.redis.hearing.xadd("nutshell:events", told)
main.redis.up = False
following = asyncio.create_task(main.redis.follow())
async with asyncio.timeout(5):
    print((await anext(main.events.follow(main.events.count)))[0].id)
"""
    assert run_beside_main(script, tmp_path, REDIS_URL=new_redis()) == "another-1\n"


def test_a_redis_that_is_gone_is_looked_for_twice_a_second(tmp_path: Path) -> None:
    script = """
looked = []

async def meet():
    looked.append(1)
    raise OSError

main.redis.meet = meet
following = asyncio.create_task(main.redis.follow())
await asyncio.sleep(0.9)
print(len(looked) in (1, 2))
"""
    assert run_beside_main(script, tmp_path, REDIS_URL=new_redis()) == "True\n"


@pytest.mark.slow
def test_a_redis_that_comes_later_is_found_and_its_old_events_are_no_news(
    two: StartTwo, redis_server: RedisServer
) -> None:
    here, there = two(redis_server.url)
    author = sign_up(here)
    publish(author)  # which is old
    there.stop()
    redis_server.freeze()
    there.start()
    assert "Redis fails (TimeoutError)" in there.log.read_text()
    with Listener(there) as listener:
        redis_server.thaw()
        eventually(lambda: there.log.read_text().count("Redis answers") > 1)
        new = publish(author)["id"]
        assert [post["id"] for _, post in listener.wait(1)] == [new]


@pytest.mark.slow
def test_a_redis_that_takes_no_writes_counts_as_gone(
    start: Start, redis_server: RedisServer
) -> None:
    service = start(REDIS_URL=redis_server.url, RATE_LIMIT="1000/hour")
    redis_server.call("CONFIG", "SET", "maxmemory", "1")
    with Listener(service) as listener:
        published = publish(sign_up(service))
        assert listener.wait(1) == [("post.published", without_content(published))]
        for _ in range(3):
            assert service.client.get("/posts").status_code == 200

        def refused() -> int:
            said = redis_server.call("INFO", "errorstats").get("errorstat_OOM", {})
            return int(said.get("count", 0))

        eventually(lambda: refused() >= 4)  # it asks again and again, and is not deceived
        assert service.log.read_text().count("Redis answers") == 1
        redis_server.call("CONFIG", "SET", "maxmemory", "0")
        eventually(lambda: service.log.read_text().count("Redis answers") > 1)
    assert "Redis fails (OutOfMemoryError)" in service.log.read_text()


@pytest.mark.slow
def test_what_stands_in_the_log_of_redis_and_is_no_event_is_passed_over(
    start: Start, redis_server: RedisServer
) -> None:
    service = start(REDIS_URL=redis_server.url)
    with Listener(service) as listener:
        for text in ("{", "[]", '["too", "few"]'):
            redis_server.call("XADD", "nutshell:events", "*", "text", text)
        redis_server.call("XADD", "nutshell:events", "*", "other", "field")
        eventually(lambda: "Redis fails" in service.log.read_text())
        published = publish(sign_up(service))
        assert listener.wait(1) == [("post.published", without_content(published))]
        other = ("XADD", "nutshell:events", "*", "text", '["x-1", "post.deleted", 1, "{}"]')
        eventually(lambda: redis_server.call(*other) and len(listener.events) > 1)


# --- Rate limiter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_limiter_counts_as_a_slow_model_does(seed: int) -> None:
    """The model keeps every hit; a window opens at the first hit that no window covers."""
    chance = random.Random(seed)  # noqa: S311
    quota, seconds = chance.randint(1, 5), 60
    limiter = main.Limiter("default", f"{quota}/minute")
    opened: dict[str, list[float]] = {}
    moment = 1_000.0
    for _ in range(5_000):
        moment += chance.choice([0, 0, 0.5, 3, 10, 59, 60, 61])
        key = f"client {chance.randrange(8)}"
        hits = opened.get(key, [])
        if not hits or moment - hits[0] >= seconds:
            hits = opened[key] = []
        hits.append(moment)
        left, wait = limiter.hit(key, moment)
        assert left == quota - len(hits)
        assert hits[0] + seconds <= moment + wait < hits[0] + seconds + 1


@pytest.mark.slow
def test_a_million_clients_cost_at_most_20_mb(tmp_path: Path) -> None:
    """Hit by hit as fast as for one of them."""
    script = f"""
import time
def size(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
limiter, before = main.Limiter("default", "600/hour"), size()
times = []
for block in range({10 if FULL else 2}):
    began = time.process_time()
    for number in range(100_000):
        limiter.hit(f"2001:db8:{{block:x}}:{{number:x}}", float(block))
    times.append(time.process_time() - began)
for number in range(100_000):
    main.client_key(f"10.{{number >> 16}}.{{number >> 8 & 255}}.{{number & 255}}")
print((size() - before) / 1e6, max(times))
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells how much memory a process has")
    grown, seconds = map(float, run_beside_main(script, tmp_path).split())
    assert grown < 20
    assert seconds < 2


def test_every_answer_tells_where_the_client_stands(start: Start, kept_in: dict[str, str]) -> None:
    service = start(RATE_LIMIT="4/minute", AUTH_RATE_LIMIT="2/hour", **kept_in)
    origin = {"Origin": "http://localhost:3000"}
    left = []
    for path in ("/posts", "/posts/1", "/nothing", "/users/me"):  # whatever the answer
        answer = service.client.get(path)
        assert answer.headers["ratelimit-policy"] == '"default";q=4;w=60'
        found = re.fullmatch(r'"default";r=(\d);t=(\d+)', answer.headers["ratelimit"])
        assert found
        assert 58 <= int(found[2]) <= 60
        left.append(int(found[1]))
    assert left == [3, 2, 1, 0]
    refused = service.client.get("/posts", headers=origin)
    assert refused.json()["error_code"] == "RATE_LIMITED"
    assert refused.headers["access-control-allow-origin"] == origin["Origin"]
    wait = refused.headers["retry-after"]
    assert refused.headers["ratelimit"] == f'"default";r=0;t={wait}'
    assert 50 <= int(wait) <= 60
    for number in (1, 0):
        answer = register(service)
        assert answer.status_code == 201
        assert answer.headers["ratelimit-policy"] == '"auth";q=2;w=3600'
        assert answer.headers["ratelimit"] == f'"auth";r={number};t=3600'
    assert register(service).status_code == 429
    assert log_in(service, "a@example.com").status_code == 429
    assert log_in(service, "a@example.com").headers["retry-after"] == "3600"


def test_health_verify_docs_and_preflights_are_not_limited(start: Start) -> None:
    service = start(RATE_LIMIT="1/hour", AUTH_RATE_LIMIT="1/hour")
    service.client.get("/posts")
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "GET"}
    for _ in range(3):
        for path in ("/health", "/docs", "/redoc", "/docs/swagger-ui.css", "/openapi.json"):
            answer = service.client.get(service.address + path)
            assert answer.status_code == 200, path
            assert "ratelimit" not in answer.headers
        assert service.client.get("/auth/verify").status_code == 401
        assert service.client.options("/posts", headers=asked).status_code == 200
    assert service.client.get("/posts").status_code == 429
    for path in ("/healthy", "/docsy", "/api/v1/auth/verify/x"):
        assert service.client.get(service.address + path).status_code == 429
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = b"GET /api/v1/posts HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(1_000).startswith(b"HTTP/1.1 429 ")


def test_a_window_ends_when_it_said(start: Start, kept_in: dict[str, str]) -> None:
    service = start(RATE_LIMIT="2/second", **kept_in)
    assert [service.client.get("/posts").status_code for _ in range(3)] == [200, 200, 429]
    began = time.monotonic()
    eventually(lambda: service.client.get("/posts").status_code == 200, 3)
    assert time.monotonic() - began < 1.5


def test_limits_that_are_off_show_nothing(start: Start) -> None:
    service = start(RATE_LIMIT="off", AUTH_RATE_LIMIT="1/minute")
    assert "ratelimit" not in service.client.get("/posts").headers
    assert register(service).headers["ratelimit"] == '"auth";r=0;t=60'
    assert register(service).status_code == 429


def test_a_stranger_cannot_choose_to_be_somebody_else(start: Start) -> None:
    service = start(RATE_LIMIT="150/hour", AUTH_RATE_LIMIT="3/hour")
    strangers = [{"X-Forwarded-For": f"10.0.{number}.1"} for number in range(200)]
    answers = [service.client.get("/posts", headers=stranger) for stranger in strangers]
    assert [answer.status_code for answer in answers] == [200] * 150 + [429] * 50
    for _ in range(3):
        assert log_in(service, "a@example.com").status_code == 401
    odd = service.client.post("/auth/login%0A", data={"username": "a@example.com", "password": "x"})
    assert odd.status_code == 429  # whatever leads to the same route
    assert odd.headers["ratelimit-policy"].startswith('"auth"')


def test_behind_a_proxy_each_client_has_its_own_limit(
    start: Start, kept_in: dict[str, str]
) -> None:
    service = start(RATE_LIMIT="2/hour", FORWARDED_ALLOW_IPS="127.0.0.1", **kept_in)

    def get(*addresses: str) -> list[int]:
        sent = [{"X-Forwarded-For": address} for address in addresses]
        return [service.client.get("/posts", headers=headers).status_code for headers in sent]

    assert get("10.0.0.1", "10.0.0.1", "10.0.0.1") == [200, 200, 429]
    assert get("10.0.0.2:5000", "10.0.0.2", "::ffff:10.0.0.2") == [200, 200, 429]
    assert get("2001:db8::1", "2001:db8:0:0:ffff::2", "[2001:db8::3]:443") == [200, 200, 429]
    assert get("2001:db8:0:1::1") == [200]  # the next /64
    assert get("nonsense", '1.2.3.4 user 1 "', "x" * 5_000) == [200, 200, 429]
    assert "1.2.3.4 user" not in service.log_so_far()


def test_logins_are_limited_by_email_too(start: Start, kept_in: dict[str, str]) -> None:
    service = start(AUTH_RATE_LIMIT="1/hour", FORWARDED_ALLOW_IPS="127.0.0.1", **kept_in)
    addresses = (f"10.1.0.{number}" for number in count(1))

    def log_in_from_anywhere(email: str, password: str = "wrong password") -> httpx.Response:  # noqa: S107
        form = {"username": email, "password": password}
        headers = {"X-Forwarded-For": next(addresses)}
        return service.client.post("/auth/login", data=form, headers=headers)

    for _ in range(10):
        answer = log_in_from_anywhere(ADMIN["username"])
        assert answer.status_code == 401
        assert answer.headers["ratelimit"] == '"auth";r=0;t=3600'
    refused = log_in_from_anywhere(ADMIN["username"].upper(), ADMIN["password"])
    assert refused.status_code == 429
    assert refused.headers["ratelimit-policy"] == '"auth";q=10;w=3600'
    assert 3_590 <= int(refused.headers["retry-after"]) <= 3_600
    assert log_in_from_anywhere("somebody@example.com").status_code == 401
    if kept_in:
        import redis

        with redis.Redis.from_url(kept_in["REDIS_URL"]) as client:
            assert client.keys("nutshell:auth:*")
            assert not client.keys("*@*")  # of an email only a digest


def test_rooms_count_as_requests(start: Start, kept_in: dict[str, str]) -> None:
    service = start(RATE_LIMIT="1/hour", **kept_in)
    with room_of(service, 1) as first, room_of(service, 1) as second:
        say(first, type="auth", token="x")  # noqa: S106
        assert close_code(first) == 4401
        assert close_code(second) == 1013


@pytest.mark.slow
def test_50_logins_at_once_hold_up_no_reader(start: Start) -> None:
    service = start(BCRYPT_ROUNDS="12", AUTH_RATE_LIMIT="12/minute")
    post = publish(sign_up(service))["id"]
    for path in (f"/posts/{post}", "/posts?size=1"):
        service.client.get(path)
    with ThreadPoolExecutor(50) as pool:
        logins = [pool.submit(log_in, service, ADMIN["username"], "wrong one") for _ in range(50)]
        times: list[float] = []
        while not all(login.done() for login in logins) or len(times) < 100:
            began = time.perf_counter()
            assert service.client.get(f"/posts/{post}").status_code == 200
            times.append(time.perf_counter() - began)
    statuses = [login.result().status_code for login in logins]
    assert set(statuses) == {401, 429}
    assert statistics.quantiles(times, n=100)[98] < 0.1


# --- Cache ----------------------------------------------------------------------------------------


def test_what_anybody_may_read_is_answered_from_memory(service: Service) -> None:
    author = sign_up(service)
    post = publish(author)["id"]
    comment(author, post)
    remembers = service.database == "sqlite"
    for path in ("/posts", "/posts?size=2", f"/posts/{post}/comments", f"/posts/{post}"):
        first, second = service.client.get(path), service.client.get(path)
        assert first.headers.get("x-cache") == ("miss" if remembers else None)
        assert second.headers.get("x-cache") == ("hit" if remembers else None)
        assert first.content == second.content
        for answer in (first, second):
            assert answer.headers["cache-control"] == "public, max-age=0, must-revalidate"
            assert answer.headers["vary"] == "Origin, Authorization"
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["etag"] == first.headers["etag"]
        etag = first.headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            same = service.client.get(path, headers={"If-None-Match": known})
            assert (same.status_code, same.content) == (304, b"")
            assert same.headers["etag"] == etag
            assert same.headers["vary"] == "Origin, Authorization"
            assert "cache-control" in same.headers
            assert "content-type" not in same.headers
        for other in ('"other"', "", etag.strip('"')[:-1]):
            assert service.client.get(path, headers={"If-None-Match": other}).status_code == 200
    changed = author.api.patch(path, json={"title": "Another"})
    newer = service.client.get(path, headers={"If-None-Match": etag})
    assert newer.json() == changed.json()


def test_origins_do_not_share_their_headers(service: Service) -> None:
    path = f"/posts/{publish(sign_up(service))['id']}"
    for origin in ("http://localhost:3000", "http://evil.example", None, "http://localhost:3000"):
        answer = service.client.get(path, headers={"Origin": origin} if origin else {})
        allowed = origin if origin == "http://localhost:3000" else None
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert answer.headers["vary"] == "Origin, Authorization"


def test_answers_to_a_token_and_errors_are_not_kept(service: Service) -> None:
    author = sign_up(service)
    draft, post = write(author)["id"], publish(author)["id"]
    for path in (f"/posts/{post}", f"/posts/{draft}", f"/posts/{draft}/comments", "/posts"):
        for _ in range(2):
            answer = author.api.get(path)
            assert answer.status_code == 200
            assert answer.headers["cache-control"] == "private, no-cache"
            assert "Authorization" in answer.headers["vary"]
            assert not {"etag", "x-cache"} & answer.headers.keys()
    for path in (f"/posts/{draft}", f"/posts/{NEVER}", "/posts?size=0", f"/posts/{draft}/comments"):
        for _ in range(2):
            refused = service.client.get(path, headers={"If-None-Match": "*"})
            assert refused.status_code in (404, 422)
            assert not {"etag", "x-cache", "cache-control"} & refused.headers.keys()


def test_a_bad_token_is_never_answered_from_memory(service: Service) -> None:
    path = f"/posts/{publish(sign_up(service))['id']}"
    for _ in range(2):
        service.client.get(path)
        assert service.as_("junk").get(path).status_code == 401
        assert service.client.get(path, headers={"Authorization": ""}).status_code == 401


WRITES: dict[str, Callable[[Account, dict[str, Any]], httpx.Response]] = {
    "registering": lambda me, post: register(me.service),
    "a new name": lambda me, post: me.api.patch("/users/me", json={"first_name": new_email()}),
    "a new post": lambda me, post: me.api.post("/posts", json={"title": "T", "content": "C"}),
    "a change": lambda me, post: me.api.patch(f"/posts/{post['id']}", json={"title": "New"}),
    "publishing": lambda me, post: me.api.post(f"/posts/{write(me)['id']}/publish"),
    "deleting": lambda me, post: me.api.delete(f"/posts/{write(me)['id']}"),
    "a comment": lambda me, post: me.api.post(f"/posts/{post['id']}/comments", json={"text": "C"}),
    "deleting a comment": lambda me, post: me.api.delete(
        f"/comments/{comment(me, post['id'])['id']}"
    ),
    "deleting a user": lambda me, post: sign_in_admin(me.service).api.delete(
        f"/users/{register(me.service).json()['id']}"
    ),
}


@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES.keys())
def test_each_commit_empties_the_memory(
    service: Service, act: Callable[[Account, dict[str, Any]], httpx.Response]
) -> None:
    if service.database != "sqlite":
        pytest.skip("nothing is remembered there")
    me = sign_up(service)
    post = publish(me)
    for path in (f"/posts/{post['id']}", f"/posts/{post['id']}/comments", "/posts"):
        service.client.get(path)
        assert service.client.get(path).headers["x-cache"] == "hit"
        assert act(me, post).is_success
        assert service.client.get(path).headers["x-cache"] == "miss"


def test_sessions_do_not_empty_the_memory(service: Service) -> None:
    if service.database != "sqlite":
        pytest.skip("nothing is remembered there")
    me = sign_up(service)
    service.client.get("/posts")
    tokens = log_in(service, me.email).json()
    assert refresh(service, tokens["refresh_token"]).status_code == 200
    assert service.as_(tokens["access_token"]).post("/auth/logout").status_code == 204
    assert service.client.get("/posts").headers["x-cache"] == "hit"


@pytest.mark.slow
def test_nobody_is_answered_what_was_true_before(service: Service) -> None:
    """A change is seen by the next request, whoever reads beside it."""
    author = sign_up(service)
    draft, post = (f"/posts/{kind(author)['id']}" for kind in (write, publish))
    assert author.api.get(draft).status_code == 200
    assert service.client.get(draft).status_code == 404
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            assert service.client.get(draft).status_code == 404
            service.client.get(post)
            service.client.get("/posts")

    def change() -> None:
        try:
            for number in range(1_000 if FULL else 30):
                changed = author.api.patch(post, json={"title": f"Number {number}"})
                assert service.client.get(post).json() == changed.json()
                assert service.client.get("/posts?size=1").json()["items"] == [changed.json()]
        finally:
            done.set()

    all_at_once(change, read, read, read)


RACE = """
async with main.lifespan(main.app):
    async with AsyncSession(writer) as db:
        db.add(User(id=1, email="a@example.com", hashed_password=""))
        db.add(Post(id=1, title="old", content="c", author_id=1, is_published=True))
        await db.commit()
    begun, go_on, asked = asyncio.Event(), asyncio.Event(), []

    async def slow(scope, receive, send):
        async with reading() as db:
            title = (await find_post(db, 1, None)).title
        asked.append(title)
        begun.set()
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": title.encode()})

    door, answered = AnswerCache(slow), []

    async def get():
        scope = {"type": "http", "method": "GET", "path": "/api/v1/posts/1"}
        state = {"asked": {}, "told": {}, "path": scope["path"]}
        scope |= {"query_string": b"", "state": state}
        async def send(message):
            answered.append(message.get("body"))
        await door(scope, None, send)
        return answered[-1], scope["state"]["told"][b"x-cache"]

    async def begin():
        begun.clear(); go_on.clear()
        task = asyncio.create_task(get())
        await begun.wait()
        return task

    async def finish(task):
        go_on.set()
        return await task

    # Begun before a commit, answered after it: never kept.
    task = await begin()
    async with AsyncSession(writer) as db:
        (await db.get(Post, 1)).title = "new"
        await db.commit()
    assert await finish(task) == (b"old", b"miss")
    assert await get() == (b"new", b"miss")
    assert await get() == (b"new", b"hit")

    # While a write is under way: neither what was kept, nor what is read now, is used again.
    async with AsyncSession(writer) as db:
        (await db.get(Post, 1)).title = "newer"
        assert await get() == (b"new", b"hit")
        await db.flush()
        assert await get() == (b"new", b"miss")
        task = await begin()
        assert (await finish(task)) == (b"new", b"miss")
        task = await begin()
        await db.commit()
    assert await finish(task) == (b"new", b"miss")
    assert await get() == (b"newer", b"miss")
    assert await get() == (b"newer", b"hit")

    # A write that was undone changes nothing, and the memory is of use again.
    async with AsyncSession(writer) as db:
        (await db.get(Post, 1)).title = "never"
        await db.flush()
    assert await get() == (b"newer", b"miss")
    assert await get() == (b"newer", b"hit")

    # A write by hand counts as well, in whatever words; a session's does not.
    from sqlalchemy import text
    for words, found in [
        ("UPDATE session SET user_id = 1", b"hit"),
        ("UPDATE post SET title = 'other'", b"miss"),
        ("REPLACE INTO post SELECT * FROM post", b"miss"),
        ("WITH x AS (SELECT 1) DELETE FROM post WHERE id = 9", b"miss"),
    ]:
        await get()
        async with writer.begin() as connection:
            await connection.execute(text(words))
        assert (await get())[1] == found, words
print("held")
"""


def test_no_answer_begun_before_a_commit_is_kept_after_it(tmp_path: Path) -> None:
    assert run_beside_main(RACE, tmp_path) == "held\n"


IDENTITY_RACE = """
async with main.lifespan(main.app):
    async with AsyncSession(writer, expire_on_commit=False) as db:
        db.add(User(id=1, email="a@example.com", hashed_password=""))
        session = LoginSession(user_id=1)
        db.add(session)
        await db.commit()
    token = issue(session, Response()).access_token
    begun, go_on, usual = asyncio.Event(), asyncio.Event(), main.live_session

    async def slow(db, claims):
        found = await usual(db, claims)
        begun.set()
        await go_on.wait()
        return found

    main.live_session = slow
    task = asyncio.create_task(session_of(token))
    await begun.wait()
    async with AsyncSession(writer) as db:
        await db.exec(delete(LoginSession))
        await db.commit()
    go_on.set()
    await task
    try:
        await session_of(token)
    except Refusal as refused:
        print(refused.code)
"""


def test_no_identity_read_before_a_logout_is_kept_after_it(tmp_path: Path) -> None:
    assert run_beside_main(IDENTITY_RACE, tmp_path) == "INVALID_TOKEN\n"


def test_the_memory_is_bounded_by_entries_and_by_bytes() -> None:
    memory = main.Memory("post")
    for number in range(10_000):
        memory.keep(number, b"", 1_000, memory.ticket)
        assert len(memory.kept) <= main.MAX_KEPT
    assert memory.get(9_999) == b""
    for number in range(100):
        memory.keep(number, b"", 1024 * 1024, memory.ticket)
        assert len(memory.kept) <= main.MAX_KEPT_BYTES / 1024 / 1024
    memory.keep("huge", b"", main.MAX_KEPT_BYTES + 1, memory.ticket)
    assert memory.get("huge") is None


@pytest.mark.slow
def test_the_memory_is_emptied_after_cache_seconds(start: Start) -> None:
    service = start(CACHE_SECONDS="1")
    time.sleep(1.1)  # of rest, which must not count
    found = [service.client.get("/posts").headers["x-cache"] for _ in range(2)]
    assert found == ["miss", "hit"]
    publish(sign_up(service))
    old = service.client.get("/posts").json()
    service.sql("UPDATE post SET title = 'Changed from outside'")
    assert service.client.get("/posts").json() == old
    numbers = count(1)

    def changed() -> bool:
        service.client.get(f"/posts?page={next(numbers)}")  # what is new does not keep the old
        return bool(service.client.get("/posts").json() != old)

    eventually(changed, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reason", ["CACHE_SECONDS=0", "WORKERS=2", "REDIS_URL=", "a child process"]
)
def test_nothing_is_remembered_where_others_may_write(start: Start, reason: str) -> None:
    """Each of several processes answers what is true now, whichever of them wrote it."""
    name, _, value = reason.partition("=")
    if name == "REDIS_URL":
        value = new_redis()
    service = start(**{name: value}) if value else start(command=[*UVICORN, "--workers", "2"])
    author = sign_up(service)
    post = publish(author)["id"]
    anew = {"Connection": "close"}  # the next connection may meet the other process
    for number in range(15):
        changed = author.api.patch(f"/posts/{post}", json={"title": f"Number {number}"})
        for _ in range(3):
            answer = service.client.get(f"/posts/{post}", headers=anew)
            assert answer.json() == changed.json()
            assert "x-cache" not in answer.headers
            assert "etag" in answer.headers
    same = service.client.get(f"/posts/{post}", headers={"If-None-Match": "*"})
    assert same.status_code == 304
    for _ in range(10):
        assert author.api.get("/users/me", headers=anew).status_code == 200
    assert author.api.post("/auth/logout", headers=anew).status_code == 204
    for _ in range(10):
        assert author.api.get("/users/me", headers=anew).status_code == 401
    alone = "Without REDIS_URL limits, events and rooms are those of each process"
    warned = service.log.read_text().count(alone)
    assert warned == (1 if name == "WORKERS" else 0)


def statements(service: Service, path: str, get: Any = None) -> list[str]:
    """What the service asks its database for a GET, of a stranger if nobody else is named."""
    before = service.log_so_far()
    joint = "&" if "?" in path else "?"
    unheard = f"{path}{joint}n={next(numbers)}"  # so that it is not remembered
    assert (get or service.client.get)(unheard).status_code == 200
    log = service.log_so_far().removeprefix(before)
    return re.findall(r"INFO +(SELECT .*?)\n\d{4}-\d\d-", log, re.DOTALL)


def test_a_signed_in_request_asks_the_database_once_or_never(service: Service) -> None:
    person = sign_up(service)
    person.api.get("/users/me")
    remembers = service.database == "sqlite"
    asked = partial(statements, service, get=person.api.get)
    assert len(asked("/users/me")) == (0 if remembers else 1)
    post = publish(person)["id"]
    assert len(asked(f"/posts/{post}")) == (1 if remembers else 2)


def test_a_token_that_is_remembered_expires_all_the_same(service: Service) -> None:
    soon = service.as_(forge(sign_up(service), exp=int(time.time()) + 2))
    assert soon.get("/users/me").status_code == 200
    eventually(lambda: soon.get("/users/me").status_code == 401)


# --- Live events ----------------------------------------------------------------------------------


def test_events_tell_of_published_posts_and_of_nothing_else(service: Service) -> None:
    author, other = sign_up(service), sign_up(service)
    with Listener(service) as listener:
        draft = write(author)
        author.api.patch(f"/posts/{draft['id']}", json={"title": "Still a draft"})
        note = comment(author, draft["id"])
        author.api.delete(f"/comments/{note['id']}")
        author.api.delete(f"/posts/{draft['id']}")
        gone = sign_up(service)
        write(gone)
        sign_in_admin(service).api.delete(f"/users/{gone.id}")

        first = publish(author)
        post = write(author)
        published = author.api.post(f"/posts/{post['id']}/publish").json()
        author.api.post(f"/posts/{post['id']}/publish")
        updated = author.api.patch(f"/posts/{post['id']}", json={"title": "New"}).json()
        author.api.patch(f"/posts/{post['id']}", json={"title": "Too late", "version": 1})
        said = comment(other, post["id"])
        other.api.delete(f"/comments/{said['id']}")
        author.api.delete(f"/posts/{post['id']}")
        last = publish(other)
        assert listener.wait(7) == [
            ("post.published", without_content(first)),
            ("post.published", without_content(published)),
            ("post.updated", without_content(updated)),
            ("comment.created", said),
            ("comment.deleted", {"id": said["id"], "post_id": post["id"]}),
            ("post.deleted", {"id": post["id"]}),
            ("post.published", without_content(last)),
        ]
        run, _, number = listener.ids[0].partition("-")
        assert listener.ids == [f"{run}-{int(number) + more}" for more in range(7)]


def test_an_event_comes_after_the_commit(service: Service) -> None:
    author = sign_up(service)
    with Listener(service) as listener:
        for number in range(1, 11):
            threading.Thread(target=publish, args=(author,)).start()
            _, post = listener.wait(number)[-1]
            assert service.client.get(f"/posts/{post['id']}").status_code == 200


def test_who_comes_back_with_the_last_event_misses_nothing(service: Service) -> None:
    author = sign_up(service)
    with Listener(service) as first:
        ids = [publish(author)["id"] for _ in range(3)]
        first.wait(3)
    missed = [publish(author)["id"] for _ in range(2)]
    by_header = Listener(service, **{"Last-Event-ID": first.ids[0]}, **author.api.headers)
    by_query = Listener(service, f"?last_event_id={first.ids[0]}")
    by_both = Listener(service, f"?last_event_id={first.ids[0]}", **{"Last-Event-ID": first.ids[2]})
    by_post = Listener(service, f"?last_event_id={first.ids[0]}&post_id={missed[0]}")
    newest = publish(author)["id"]
    for listener, expected in (
        (by_header, [*ids[1:], *missed, newest]),
        (by_query, [*ids[1:], *missed, newest]),
        (by_both, [*missed, newest]),
        (by_post, [missed[0]]),
    ):
        with listener:
            heard = [post["id"] for _, post in listener.wait(len(expected))]
            assert heard == expected


@pytest.mark.parametrize(
    "last", ["another-1", "{run}-999999", "{run}-", "{run}--1", "{run}-1e3", "x", "%ED%A0%80", "-"]
)
def test_who_names_an_unknown_event_is_told_to_start_anew(service: Service, last: str) -> None:
    author = sign_up(service)
    with Listener(service) as first:
        publish(author)
        first.wait(1)
    run = first.ids[0].partition("-")[0]
    with Listener(service, f"?last_event_id={last.replace('{run}', run)}") as listener:
        assert listener.wait(1) == [("reset", {})]
    post = publish(author)
    with Listener(service, **{"Last-Event-ID": listener.ids[0]}) as again:
        assert again.wait(1) == [("post.published", without_content(post))]


def test_a_listener_who_falls_out_of_the_log_is_dropped_and_hears_nothing_with_a_gap() -> None:
    async def listen() -> tuple[list[list[str]], list[list[str]]]:
        hub = main.Hub("test")
        fast, slow = hub.follow(hub.count), hub.follow(hub.count)
        heard: tuple[list[list[str]], list[list[str]]] = ([], [])
        for number in range(1_003):
            await hub.tell("post.deleted", number, {})
            heard[0].append([event.data for event in await anext(fast)])
            if number == 0:
                heard[1].append([event.data for event in await anext(slow)])
        heard[1].extend([[event.data for event in found] async for found in slow])
        return heard

    fast, slow = asyncio.run(listen())
    assert fast == [["{}"]] * 1_003
    assert slow == [["{}"]]
    nowhere: Any = None
    guest = main.Guest(nowhere, 1)
    guest.places = {main.chat: main.chat.count - 2_000}
    with pytest.raises(main.Refusal) as dropped:
        asyncio.run(guest.hear(main.chat))
    assert dropped.value.code == "UNAVAILABLE"


def insert_posts(service: Service, author: Account, times: int) -> None:
    values = f"'x', 'x', true, 1, {author.id}, {service.ago()}, {service.ago()}"
    service.sql(
        "INSERT INTO post"
        " (title, content, is_published, version, author_id, created_at, updated_at)"
        f" SELECT {values} FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL"
        f" SELECT i + 1 FROM n WHERE i < {times}) SELECT i FROM n) AS numbers"
    )


def test_1500_events_reach_everyone_in_order_past_a_stream_that_never_reads(
    service: Service,
) -> None:
    author, other = sign_up(service), sign_up(service)
    insert_posts(service, author, 1_500)
    ids = [post for (post,) in service.sql(f"SELECT id FROM post WHERE author_id = {author.id}")]
    with (
        socket.create_connection(("127.0.0.1", service.port)) as deaf,
        Listener(service) as listener,
        in_room(other, max(ids)) as room,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_024)
        deaf.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        before = publish(other)
        assert sign_in_admin(service).api.delete(f"/users/{author.id}").status_code == 204
        events = listener.wait(1_501)
        assert events[0] == ("post.published", without_content(before))
        assert [kind for kind, _ in events[1:]] == ["post.deleted"] * 1_500
        assert sorted(post["id"] for _, post in events[1:]) == sorted(ids)
        numbers = [int(name.partition("-")[2]) for name in listener.ids]
        assert numbers == list(range(numbers[0], numbers[0] + 1_501))
        gone = hear(room)
        assert (gone["type"], gone["data"]) == ("post.deleted", {"id": max(ids)})
        assert close_code(room) == 4404
    if "REDIS_URL" in environment(service.settings):
        import redis

        with redis.Redis.from_url(service.settings["REDIS_URL"]) as client:
            assert client.xlen("nutshell:events") == 1_001
    with Listener(service, f"?last_event_id={listener.ids[500]}") as late:
        assert [post["id"] for _, post in late.wait(1_000)] == [p["id"] for _, p in events[501:]]
    with Listener(service, f"?last_event_id={listener.ids[499]}") as too_late:
        assert too_late.wait(1) == [("reset", {})]


# --- Mail -----------------------------------------------------------------------------------------


def test_a_welcome_mail_is_sent(service: Service, mail_server: MailServer) -> None:
    email = register(service, first_name="Ann").json()["email"]
    (mail,) = eventually(lambda: mail_server.mails_to(email))
    assert (mail["subject"], mail["from"]) == ("Welcome", "nutshell@localhost")
    assert "Hello Ann," in mail.get_content()


def test_superusers_choose_whether_a_welcome_is_sent(
    service: Service, mail_server: MailServer
) -> None:
    admin, silent, greeted = sign_in_admin(service), new_email(), new_email()
    for email, query in ((silent, ""), (greeted, "?send_welcome=true")):
        body = {"email": email, "password": PASSWORD}
        assert admin.api.post(f"/users{query}", json=body).status_code == 201
    eventually(lambda: mail_server.mails_to(greeted))
    assert not mail_server.mails_to(silent)


def test_a_receiver_who_is_refused_is_not_named_in_the_log(service: Service) -> None:
    email = register(service, email=f"unknown-{new_email()}").json()["email"]
    refused = "mail not sent: SMTPRecipientsRefused"
    log = eventually(lambda: refused in (said := service.log_so_far()) and said)
    assert email not in log


def test_mail_is_encrypted_where_the_server_offers_it(start: Start) -> None:
    said: list[bytes] = []

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"220 here\r\n")
            connection.recv(1000)
            connection.sendall(b"250-here\r\n250 STARTTLS\r\n")
            said.append(connection.recv(1000))
            connection.sendall(b"220 go on\r\n")
            said.append(connection.recv(1))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        service = start(SMTP_URL=f"smtp://127.0.0.1:{server.getsockname()[1]}")
        register(service)
        eventually(lambda: "mail not sent: " in service.log.read_text(), 8)
    assert said == [b"STARTTLS\r\n", b"\x16"]  # the first byte of TLS, and no mail


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
@pytest.mark.parametrize("scheme", ["smtps", "smtp"])
def test_where_mail_is_encrypted_the_password_is_sent(
    start: Start, tmp_path: Path, scheme: str
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with MailServer(tls) if scheme == "smtps" else MailServer(starttls=tls) as server:
        url = f"{scheme}://us%40example.com:hunter%202@localhost:{server.port}"
        service = start(SMTP_URL=url, MAIL_FROM="us@example.com", SSL_CERT_FILE=str(certificate))
        email = register(service).json()["email"]
        (mail,) = eventually(lambda: server.mails_to(email))
        assert mail["from"] == "us@example.com"
        assert server.credentials == [b"\0us@example.com\0hunter 2"]
        server.shutdown()


def test_where_nothing_is_encrypted_neither_the_password_nor_the_mail_is_sent(start: Start) -> None:
    """A server without STARTTLS, or somebody on the way to it who says that it has none."""
    with MailServer() as server:
        service = start(SMTP_URL=f"smtp://us:hunter2@127.0.0.1:{server.port}")
        register(service)
        line = "mail not sent: the server offers no encryption, and SMTP_URL has a password\n"
        eventually(lambda: line in service.log.read_text(), 8)
        assert (server.credentials, server.mails) == ([], [])
        assert "hunter2" not in service.log.read_text()
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["refused", "silent"])
def test_a_failing_mail_is_a_line_in_the_log_and_no_failed_request(
    start: Start, failure: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1] if failure == "silent" else free_port()
        url = f"smtp://user:hunter2@127.0.0.1:{port}"
        service = start(SMTP_URL=url, MAIL_FROM="us@example.com")
        began = time.monotonic()
        email = register(service).json()["email"]
        assert time.monotonic() - began < 2
        line = eventually(lambda: re.search("mail not sent: .*", service.log.read_text()), 8)
        assert email not in line[0]
        assert "hunter2" not in service.log.read_text()


def test_a_mail_under_way_leaves_before_the_stop(start: Start) -> None:
    with MailServer(pause=0.2) as server:
        service = start(SMTP_URL=f"smtp://127.0.0.1:{server.port}")
        email = register(service).json()["email"]
        service.stop()
        assert server.mails_to(email)
        server.shutdown()


@pytest.mark.slow
def test_sigterm_does_not_wait_for_a_mail_server_that_hangs(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        service = start(SMTP_URL=f"smtp://127.0.0.1:{deaf.getsockname()[1]}")
        register(service)
        began = time.monotonic()
        assert service.stop() in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 4
    assert "Traceback" not in service.log.read_text()


# --- Dependencies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer bad", "Basic YTpi", "Token x", "Bearer \udcff"], ids=repr
)
def test_anything_but_a_good_bearer_token_is_401(service: Service, header: str) -> None:
    sent = {b"Authorization": header.encode("utf-8", "surrogateescape")}
    for path in ("/users/me", "/posts", "/events"):
        answer = service.client.get(path, headers=sent)
        assert answer.json()["error_code"] == "INVALID_TOKEN"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_bad_token_does_not_matter_where_none_is_needed(service: Service) -> None:
    person = sign_up(service)
    bad = {"Authorization": "Bearer bad"}
    form = {"username": person.email, "password": PASSWORD}
    token = {"refresh_token": person.tokens["refresh_token"]}
    assert service.client.post("/auth/login", data=form, headers=bad).status_code == 200
    assert service.client.post("/auth/refresh", data=token, headers=bad).status_code == 200
    for path in ("/health", "/", "/docs"):
        assert service.client.get(service.address + path, headers=bad).status_code == 200


def test_who_loses_a_right_is_refused_on_the_very_next_request(service: Service) -> None:
    admin = sign_in_admin(service)
    deactivated, deleted, demoted = sign_up(service), sign_up(service), sign_up(service)
    admin.api.patch(f"/users/{demoted.id}", json={"role": "admin"})
    assert demoted.api.get("/auth/verify?role=admin").status_code == 200
    admin.api.patch(f"/users/{demoted.id}", json={"role": "user"})
    assert demoted.api.get("/auth/verify?role=admin").status_code == 403
    assert demoted.api.post("/users", json={}).status_code == 403
    admin.api.patch(f"/users/{deactivated.id}", json={"is_active": False})
    admin.api.delete(f"/users/{deleted.id}")
    for gone in (deactivated, deleted):
        for junk in ("", "A"):
            again = service.as_(gone.tokens["access_token"] + junk)
            assert again.get("/users/me").status_code == 401
        refused = refresh(service, gone.tokens["refresh_token"])
        assert refused.json()["error_code"] == "INVALID_TOKEN"
    admin.api.patch(f"/users/{deactivated.id}", json={"is_active": True})
    assert deactivated.api.get("/users/me").status_code == 401
    assert log_in(service, deactivated.email).status_code == 200


def test_who_is_deactivated_by_another_process_is_refused(start: Start) -> None:
    service = start(CACHE_SECONDS="0")
    person = sign_up(service)
    service.sql(f"""UPDATE "user" SET is_active = false WHERE id = {person.id}""")
    assert person.api.get("/users/me").status_code == 401
    assert refresh(service, person.tokens["refresh_token"]).json()["error_code"] == "INVALID_TOKEN"


def test_an_old_token_does_not_fit_the_next_person(service: Service) -> None:
    newest = sign_up(service)
    sign_in_admin(service).api.delete(f"/users/{newest.id}")
    next_one = sign_up(service)
    assert next_one.id > newest.id
    assert newest.api.get("/users/me").status_code == 401


# Who gets what: anonymous, another user, the owner, a superuser. {comment} stands below {post} and
# is somebody else's, {note} below {draft}, {reply} is the owner's and stands below another's post.
TABLE: list[tuple[str, str, Any, tuple[int, int, int, int]]] = [
    ("POST", "/auth/logout", None, (401, 204, 204, 204)),
    ("GET", "/auth/verify", None, (401, 200, 200, 200)),
    ("GET", "/auth/verify?role=user", None, (401, 200, 200, 200)),
    ("GET", "/auth/verify?role=admin", None, (401, 403, 403, 200)),
    ("GET", "/users/{user}", None, (401, 200, 200, 200)),
    ("GET", "/users/me", None, (401, 200, 200, 200)),
    ("GET", f"/users/{NEVER}", None, (401, 404, 404, 404)),
    ("PATCH", "/users/{user}", {"bio": "x"}, (401, 403, 200, 200)),
    ("PATCH", "/users/{user}", {}, (401, 403, 200, 200)),
    ("PATCH", "/users/{user}", {"id": 1}, (401, 403, 422, 422)),
    ("PATCH", "/users/{user}", {"role": "user"}, (401, 403, 403, 200)),
    ("PATCH", "/users/{user}", {"is_active": True}, (401, 403, 403, 200)),
    ("PATCH", "/users/{user}", {"password": "a new password"}, (401, 403, 403, 200)),
    ("PATCH", "/users/me", {"role": "user"}, (401, 403, 403, 409)),
    ("PATCH", "/users/me", {"is_active": False}, (401, 403, 403, 409)),
    ("PATCH", "/users/me", {"email": "new@example.com"}, (401, 403, 403, 403)),
    ("PATCH", "/users/me", {"password": "a new password"}, (401, 403, 403, 403)),
    ("PATCH", f"/users/{NEVER}", {"bio": "x"}, (401, 403, 403, 404)),
    ("GET", "/users", None, (401, 200, 200, 200)),
    ("POST", "/users", {}, (401, 403, 403, 422)),
    ("DELETE", f"/users/{NEVER}", None, (401, 403, 403, 404)),
    ("DELETE", "/users/me", None, (401, 403, 403, 409)),
    ("DELETE", "/users/{user}", None, (401, 403, 403, 204)),
    ("GET", "/users/me/posts", None, (401, 200, 200, 200)),
    ("GET", "/posts", None, (200, 200, 200, 200)),
    ("POST", "/posts", {"title": "x", "content": "x"}, (401, 201, 201, 201)),
    ("POST", "/posts", {}, (401, 422, 422, 422)),
    ("GET", "/posts/{post}", None, (200, 200, 200, 200)),
    ("GET", "/posts/{draft}", None, (404, 404, 200, 200)),
    ("GET", f"/posts/{NEVER}", None, (404, 404, 404, 404)),
    ("PATCH", "/posts/{post}", {"title": "x"}, (401, 403, 200, 200)),
    ("PATCH", "/posts/{draft}", {"title": "x"}, (401, 404, 200, 200)),
    ("PATCH", "/posts/{post}", {"id": 1}, (401, 403, 422, 422)),
    ("PATCH", f"/posts/{NEVER}", {"title": "x"}, (401, 404, 404, 404)),
    ("PUT", "/posts/{post}", {"title": "x"}, (401, 403, 200, 200)),
    ("PUT", "/posts/{draft}", {"title": "x"}, (401, 404, 200, 200)),
    ("DELETE", "/posts/{post}", None, (401, 403, 204, 404)),
    ("DELETE", "/posts/{draft}", None, (401, 404, 204, 404)),
    ("DELETE", f"/posts/{NEVER}", None, (401, 404, 404, 404)),
    ("POST", "/posts/{post}/publish", None, (401, 403, 200, 403)),
    ("POST", "/posts/{draft}/publish", None, (401, 404, 200, 403)),
    ("POST", f"/posts/{NEVER}/publish", None, (401, 404, 404, 404)),
    ("GET", "/posts/{post}/comments", None, (200, 200, 200, 200)),
    ("GET", "/posts/{draft}/comments", None, (404, 404, 200, 200)),
    ("GET", f"/posts/{NEVER}/comments", None, (404, 404, 404, 404)),
    ("POST", "/posts/{post}/comments", {"text": "x"}, (401, 201, 201, 201)),
    ("POST", "/posts/{draft}/comments", {"text": "x"}, (401, 404, 201, 201)),
    ("POST", f"/posts/{NEVER}/comments", {"text": "x"}, (401, 404, 404, 404)),
    ("DELETE", "/comments/{comment}", None, (401, 403, 204, 404)),
    ("DELETE", "/comments/{reply}", None, (401, 403, 204, 404)),
    ("DELETE", "/comments/{note}", None, (401, 404, 204, 404)),
    ("DELETE", f"/comments/{NEVER}", None, (401, 404, 404, 404)),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    TABLE,
    ids=[" ".join([row[0], row[1], *(row[2] or ())]) for row in TABLE],
)
def test_who_may_do_what(
    service: Service, method: str, path: str, body: Any, expected: tuple[int, ...]
) -> None:
    owner, somebody, other = (sign_up(service) for _ in range(3))
    callers = (service.client, other.api, owner.api, sign_in_admin(service).api)
    things: dict[str, Callable[[], Any]] = {
        "user": lambda: owner.id,
        "post": lambda: publish(owner)["id"],
        "draft": lambda: write(owner)["id"],
        "comment": lambda: comment(somebody, publish(owner)["id"])["id"],
        "reply": lambda: comment(owner, publish(somebody)["id"])["id"],
        "note": lambda: comment(owner, write(owner)["id"])["id"],
    }
    path = re.sub(r"\{(\w+)\}", lambda found: str(things[found[1]]()), path)
    got = tuple(c.request(method, path, json=body).status_code for c in callers)
    assert got == expected


def test_every_route_stands_in_the_table_of_who_may_do_what(service: Service) -> None:
    paths = service.client.get(f"{service.address}/openapi.json").json()["paths"]
    routes = {(m.upper(), path) for path, methods in paths.items() for m in methods}
    there = {(row[0], "/api/v1" + row[1].partition("?")[0]) for row in TABLE}
    there = {(m, re.sub(r"\{(post|draft)\}", "{post_id}", p)) for m, p in there}
    there = {(m, re.sub(r"\{(comment|note|reply)\}", "{comment_id}", p)) for m, p in there}
    assert routes - there == {  # what is open to all
        ("GET", "/"),
        ("GET", "/health"),
        *(("POST", f"/api/v1/auth/{name}") for name in ("register", "login", "refresh")),
        ("GET", "/api/v1/events"),
    }


# --- Routes: accounts and tokens ------------------------------------------------------------------


def test_registering_answers_the_whole_user_and_nothing_more(service: Service) -> None:
    email = new_email()
    user = register(service, email=email, first_name="Ann", last_name="Lee", age=30).json()
    assert UTC_TIME.fullmatch(user["created_at"])
    assert UTC_TIME.fullmatch(user["updated_at"])
    assert user == {
        "id": user["id"],
        "full_name": "Ann Lee",
        "bio": None,
        "avatar_url": None,
        "created_at": user["created_at"],
        "email": email,
        "first_name": "Ann",
        "last_name": "Lee",
        "age": 30,
        "role": "user",
        "is_superuser": False,
        "is_active": True,
        "updated_at": user["updated_at"],
    }


def test_emails_are_stored_and_compared_in_lower_case(service: Service) -> None:
    email = new_email()
    first = register(service, email=email.upper().replace("PERSON", "Person"))
    assert first.json()["email"] == email
    assert register(service, email=email).json()["error_code"] == "EMAIL_TAKEN"
    assert log_in(service, email.upper()).status_code == 200


def test_of_50_registrations_of_one_email_at_once_one_succeeds(service: Service) -> None:
    email = new_email()
    answers = at_once(50, lambda _: register(service, email=email))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 49
    assert {a.json()["error_code"] for a in answers if a.status_code == 409} == {"EMAIL_TAKEN"}


def test_closed_registration_leaves_it_to_superusers_to_make_accounts(start: Start) -> None:
    service = start(REGISTRATION="closed")
    assert register(service).json()["error_code"] == "INSUFFICIENT_PERMISSIONS"
    body = {"email": new_email(), "password": PASSWORD}
    assert sign_in_admin(service).api.post("/users", json=body).status_code == 201
    assert sign_in(service, body["email"]).id == 2


def test_login_takes_the_forms_of_oauth2_and_ignores_the_rest(service: Service) -> None:
    form = {"username": sign_up(service).email, "password": PASSWORD}
    extra = {"grant_type": "password", "scope": "", "client_id": "x", "client_secret": "y"}
    assert service.client.post("/auth/login", data=form | extra).status_code == 200
    form = {"refresh_token": sign_up(service).tokens["refresh_token"]}
    extra = {"grant_type": "refresh_token", "scope": "", "client_id": "x"}
    assert service.client.post("/auth/refresh", data=form | extra).status_code == 200


def test_a_refused_login_does_not_tell_why(service: Service) -> None:
    person, admin = sign_up(service), sign_in_admin(service)
    gone = sign_up(service)
    admin.api.patch(f"/users/{gone.id}", json={"is_active": False})
    refused = [
        log_in(service, new_email()),
        log_in(service, person.email, "wrong password"),
        log_in(service, gone.email),
        log_in(service, "not an email"),
        log_in(service, "nul\u0000@example.com"),
        log_in(service, person.email, "x" * 5_000),
    ]
    assert all(answer.json()["error_code"] == "INVALID_CREDENTIALS" for answer in refused)
    assert len({answer.json()["detail"] for answer in refused}) == 1


def test_a_login_with_an_endless_email_is_refused_at_once(service: Service) -> None:
    form = {"username": "a" + "\u0301\u0327" * 100_000 + "@example.com", "password": "x" * 10}
    files = {name: (None, value) for name, value in form.items()}
    began = time.monotonic()
    assert service.client.post("/auth/login", files=files).status_code == 401
    assert time.monotonic() - began < 2


@pytest.mark.slow
def test_a_login_that_waits_while_its_account_changes_is_refused(start: Start) -> None:
    service = start(BCRYPT_ROUNDS="11")
    closed, changed = sign_up(service), sign_up(service)
    admin = sign_in_admin(service)
    with ThreadPoolExecutor(20) as pool:
        others = 4 * (os.cpu_count() or 1)
        queue = [pool.submit(log_in, service, new_email()) for _ in range(others)]
        logins = [pool.submit(log_in, service, p.email) for p in (closed, changed)]
        eventually(lambda: queue[0].done())
        admin.api.patch(f"/users/{closed.id}", json={"is_active": False})
        service.sql(f"""UPDATE "user" SET hashed_password = 'new' WHERE id = {changed.id}""")
        assert not logins[0].done()
        assert {login.result().status_code for login in logins} == {401}


def test_expired_sessions_go_at_the_next_login_and_at_the_start(start: Start) -> None:
    service = start()
    one, other = sign_up(service), sign_up(service)
    expire = f"UPDATE session SET expires_at = {service.ago(seconds=1)} WHERE user_id IN"
    service.sql(f"{expire} ({one.id}, {other.id})")
    sign_in(service, one.email)
    owners = "SELECT user_id FROM session ORDER BY user_id"
    assert service.sql(owners) == [(one.id,), (other.id,)]
    service.stop()
    service.start()
    assert service.sql(owners) == [(one.id,)]


def test_a_refresh_gives_two_new_tokens(service: Service) -> None:
    person = sign_up(service)
    answer = refresh(service, person.tokens["refresh_token"])
    assert answer.headers["cache-control"] == "no-store"
    for name in ("access_token", "refresh_token"):
        assert answer.json()[name] != person.tokens[name]
    assert service.as_(answer.json()["access_token"]).get("/users/me").json()["id"] == person.id


def test_who_asks_again_within_ten_seconds_gets_the_same_refresh_token(service: Service) -> None:
    person = sign_up(service)
    rotate = f"UPDATE session SET rotated_at = %s WHERE user_id = {person.id}"
    service.sql(rotate % service.ago(hours=1))
    first, again = (refresh(service, person.tokens["refresh_token"]).json() for _ in range(2))
    assert again["refresh_token"] == first["refresh_token"]
    assert again["access_token"] != first["access_token"]
    service.sql(rotate % service.ago(seconds=8))
    late = refresh(service, person.tokens["refresh_token"]).json()["refresh_token"]
    assert jwt.get_unverified_claims(late)["iat"] < time.time() - 7  # it is not made anew


def test_20_refreshes_at_once_share_one_new_token(service: Service) -> None:
    person = sign_up(service)
    answers = at_once(20, lambda _: refresh(service, person.tokens["refresh_token"]))
    assert {answer.status_code for answer in answers} == {200}
    (new,) = {answer.json()["refresh_token"] for answer in answers}
    assert refresh(service, new).status_code == 200


def assert_reuse_ends_the_session(person: Account, used: str, latest: dict[str, Any]) -> None:
    assert refresh(person.service, used).json()["error_code"] == "TOKEN_REUSED"
    assert refresh(person.service, latest["refresh_token"]).json()["error_code"] == "INVALID_TOKEN"
    assert person.service.as_(latest["access_token"]).get("/users/me").status_code == 401


def test_a_used_refresh_token_after_ten_seconds_ends_the_session(service: Service) -> None:
    person = sign_up(service)
    elsewhere = sign_in(service, person.email)
    latest = refresh(service, person.tokens["refresh_token"]).json()
    sid = jwt.get_unverified_claims(latest["access_token"])["sid"]
    service.sql(f"UPDATE session SET rotated_at = {service.ago(seconds=10.1)} WHERE id = '{sid}'")
    assert_reuse_ends_the_session(person, person.tokens["refresh_token"], latest)
    assert elsewhere.api.get("/users/me").status_code == 200


def test_a_reused_refresh_token_sent_many_times_at_once_is_no_line_in_the_log(
    service: Service,
) -> None:
    person = sign_up(service)
    refresh(service, refresh(service, person.tokens["refresh_token"]).json()["refresh_token"])
    answers = at_once(10, lambda _: refresh(service, person.tokens["refresh_token"]))
    codes = {answer.json()["error_code"] for answer in answers}
    assert "TOKEN_REUSED" in codes <= {"TOKEN_REUSED", "INVALID_TOKEN"}
    assert "Warning" not in service.log_so_far()


def test_the_refresh_token_before_the_last_one_ends_the_session(service: Service) -> None:
    person = sign_up(service)
    second = refresh(service, person.tokens["refresh_token"]).json()
    third = refresh(service, second["refresh_token"]).json()
    assert_reuse_ends_the_session(person, person.tokens["refresh_token"], third)


def test_logout_ends_this_session_or_all_at_once(service: Service) -> None:
    here, somebody = sign_up(service), sign_up(service)
    there, far = sign_in(service, here.email), sign_in(service, here.email)
    assert here.api.post("/auth/logout").status_code == 204
    assert here.api.get("/users/me").status_code == 401
    assert refresh(service, here.tokens["refresh_token"]).status_code == 401
    assert there.api.get("/users/me").status_code == 200
    assert there.api.post("/auth/logout?everywhere=true").status_code == 204
    assert [who.api.get("/users/me").status_code for who in (there, far)] == [401, 401]
    assert somebody.api.get("/users/me").status_code == 200


def test_verify_tells_a_proxy_who_it_is(service: Service) -> None:
    person = sign_up(service, email=f"李+%{uuid4().hex[:6]}@exämple.com")
    answer = person.api.get("/auth/verify")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["remote-user"] == str(person.id)
    assert answer.headers["remote-groups"] == "user"
    sent = person.email.replace("李", "%E6%9D%8E").replace("ä", "%C3%A4")
    assert answer.headers["remote-email"] == sent
    assert answer.headers["cache-control"] == "no-store"
    admin = sign_in_admin(service).api.get("/auth/verify?role=admin")
    assert (admin.status_code, admin.headers["remote-email"]) == (200, ADMIN["username"])


# --- Routes: users --------------------------------------------------------------------------------


PUBLIC = {"id", "full_name", "bio", "avatar_url", "created_at"}
WHOLE = {"email", "first_name", "last_name", "age", "role", "is_superuser", "is_active"}
WHOLE |= {"updated_at"} | PUBLIC


def test_others_see_what_is_public_and_superusers_the_whole(service: Service) -> None:
    owner, other, admin = sign_up(service), sign_up(service), sign_in_admin(service)
    assert other.api.get(f"/users/{owner.id}").json().keys() == PUBLIC
    assert owner.api.get(f"/users/{owner.id}").json().keys() == WHOLE
    assert admin.api.get(f"/users/{owner.id}").json() == owner.api.get("/users/me").json()
    last = {"page": other.api.get("/users?size=1").json()["pages"], "size": 1}
    (seen,) = other.api.get("/users", params=last).json()["items"]
    me = other.api.get("/users/me").json()
    assert seen == {name: me[name] for name in PUBLIC}
    assert admin.api.get("/users", params=last).json()["items"] == [me]


def test_users_are_listed_by_id_in_pages_and_by_is_active(start: Start) -> None:
    service = start()
    people = [sign_up(service) for _ in range(4)]
    admin = sign_in_admin(service)
    admin.api.patch(f"/users/{people[3].id}", json={"is_active": False})
    second = people[0].api.get("/users?page=2&size=2").json()
    assert [user["id"] for user in second.pop("items")] == [3, 4]
    assert second == {"total": 5, "page": 2, "size": 2, "pages": 3}
    beyond = people[0].api.get(f"/users?page={NEVER}&size=100")
    assert (beyond.status_code, beyond.json()["items"], beyond.json()["total"]) == (200, [], 5)
    assert people[0].api.get("/users").json()["size"] == 20
    gone = admin.api.get("/users?is_active=false").json()
    assert [user["id"] for user in gone["items"]] == [5]
    assert admin.api.get("/users?is_active=true").json()["total"] == 4


def test_superusers_make_accounts_of_any_role(service: Service) -> None:
    admin = sign_in_admin(service)
    email = new_email()
    body = {"email": email, "password": PASSWORD, "role": "admin", "is_active": False}
    made = admin.api.post("/users", json=body)
    assert made.status_code == 201
    assert made.json().keys() == WHOLE
    assert (made.json()["is_superuser"], made.json()["is_active"]) == (True, False)
    assert log_in(service, email).status_code == 401
    plain = admin.api.post("/users", json={"email": new_email(), "password": PASSWORD}).json()
    assert (plain["role"], plain["is_active"]) == ("user", True)


def test_only_the_fields_of_a_user_that_are_sent_change(service: Service) -> None:
    person = sign_up(service, first_name="Ann", age=30)
    before = person.api.get("/users/me").json()
    after = person.api.patch("/users/me", json={"age": None, "bio": "hello"}).json()
    assert after["updated_at"] > before["updated_at"]
    changed = {"age": None, "bio": "hello", "updated_at": after["updated_at"]}
    assert after == before | changed == person.api.get(f"/users/{person.id}").json()
    assert person.api.patch("/users/me", json={}).json() == after


@pytest.mark.parametrize("field", [{"role": "admin"}, {"is_active": True}], ids=str)
def test_role_and_is_active_are_for_superusers(service: Service, field: dict[str, Any]) -> None:
    person = sign_up(service)
    assert register(service, **field).status_code == 422
    assert person.api.patch("/users/me", json=field).status_code == 403
    assert person.api.patch("/users/me", json=field | {"bio": "x"}).status_code == 403
    assert person.api.get("/users/me").json()["bio"] is None


@pytest.mark.parametrize("field", ["email", "password"])
def test_ones_own_email_and_password_need_the_current_password(
    service: Service, field: str
) -> None:
    person = sign_up(service)
    change = {field: new_email() if field == "email" else "a new password"}
    for current in ({}, {"current_password": "wrong password"}, {"current_password": ""}):
        refused = person.api.patch("/users/me", json=change | current)
        assert refused.json()["error_code"] == "INSUFFICIENT_PERMISSIONS"
    done = person.api.patch("/users/me", json=change | {"current_password": PASSWORD})
    assert done.status_code == 200
    sign_in(service, change.get("email", person.email), change.get("password", PASSWORD))
    assert log_in(service, person.email, PASSWORD).status_code == 401


def test_an_email_that_is_taken_is_409(service: Service) -> None:
    person, other, admin = sign_up(service), sign_up(service), sign_in_admin(service)
    change = {"email": other.email.upper(), "current_password": PASSWORD}
    assert person.api.patch("/users/me", json=change).json()["error_code"] == "EMAIL_TAKEN"
    taken = {"email": other.email, "password": PASSWORD}
    assert admin.api.post("/users", json=taken).json()["error_code"] == "EMAIL_TAKEN"


def test_a_new_password_ends_all_other_sessions(service: Service) -> None:
    here = sign_up(service)
    there = sign_in(service, here.email)
    change = {"password": "a new password", "current_password": PASSWORD}
    assert here.api.patch("/users/me", json=change).status_code == 200
    assert here.api.get("/users/me").status_code == 200
    assert there.api.get("/users/me").status_code == 401
    sign_in_admin(service).api.patch(f"/users/{here.id}", json={"password": PASSWORD})
    assert here.api.get("/users/me").status_code == 401


def test_of_two_new_passwords_at_once_one_counts(service: Service) -> None:
    person = sign_up(service)
    new = [{"password": f"new password {n}", "current_password": PASSWORD} for n in range(2)]
    answers = at_once(2, lambda n: person.api.patch("/users/me", json=new[n]))
    statuses = [answer.status_code for answer in answers]
    assert sorted(statuses) in ([200, 403], [200, 409])
    logins = [log_in(service, person.email, body["password"]).status_code for body in new]
    assert logins == [200 if status == 200 else 401 for status in statuses]


@pytest.mark.parametrize(
    "removal",
    [{"role": "user"}, {"is_active": False}, None],
    ids=["demoted", "deactivated", "deleted"],
)
def test_two_admins_who_remove_each_other_leave_one(
    service: Service, removal: dict[str, Any] | None
) -> None:
    def remove(caller: Account, other: Account) -> Any:
        if removal is None:
            return caller.api.delete(f"/users/{other.id}")
        return caller.api.patch(f"/users/{other.id}", json=removal)

    for _ in range(5):
        pair = [sign_up(service), sign_up(service)]
        for person in pair:
            sign_in_admin(service).api.patch(f"/users/{person.id}", json={"role": "admin"})
        all_at_once(partial(remove, *pair), partial(remove, *reversed(pair)))
        ids = f"({pair[0].id}, {pair[1].id})"
        left = f"""SELECT count(*) FROM "user" WHERE id IN {ids} AND role = 'admin' AND is_active"""
        assert service.sql(left) == [(1,)]


def test_deleting_a_user_leaves_nothing_behind(service: Service) -> None:
    person, other = sign_up(service), sign_up(service)
    sign_in(service, person.email)
    mine, theirs = publish(person), publish(other)
    comment(other, mine["id"])
    comment(person, theirs["id"])
    kept = comment(other, theirs["id"])
    assert sign_in_admin(service).api.delete(f"/users/{person.id}").status_code == 204
    assert service.sql(f"SELECT id FROM session WHERE user_id = {person.id}") == []
    assert service.sql(f"SELECT id FROM post WHERE author_id = {person.id}") == []
    below = f"SELECT id FROM comment WHERE post_id IN ({mine['id']}, {theirs['id']})"
    assert service.sql(below) == [(kept["id"],)]
    assert sign_in_admin(service).api.get(f"/users/{person.id}").status_code == 404
    assert service.client.get(f"/posts/{mine['id']}").status_code == 404


def test_a_user_is_deleted_while_they_and_others_write(service: Service) -> None:
    other, admin = sign_up(service), sign_in_admin(service)
    elsewhere = publish(other)["id"]
    for _ in range(5):
        person = sign_up(service)
        post, draft = publish(person)["id"], write(person)["id"]
        deleted, *others = all_at_once(
            partial(admin.api.delete, f"/users/{person.id}"),
            partial(person.api.post, f"/posts/{post}/comments", json={"text": "x"}),
            partial(other.api.post, f"/posts/{post}/comments", json={"text": "x"}),
            partial(person.api.post, f"/posts/{elsewhere}/comments", json={"text": "x"}),
            partial(person.api.post, f"/posts/{draft}/publish"),
            partial(person.api.post, "/posts", json=A_POST),
        )
        assert deleted.status_code == 204
        assert {answer.status_code for answer in others} <= {200, 201, 401, 404, 409}
        for column in ("post.author_id", "comment.author_id", "session.user_id"):
            table = column.partition(".")[0]
            assert service.sql(f"SELECT id FROM {table} WHERE {column} = {person.id}") == []


def beside_another(service: Service, statement: str, call: Callable[[], Any]) -> tuple[bool, Any]:
    """Did a call wait for the end of a transaction that ran the statement, and its answer."""

    async def run() -> tuple[bool, Any]:
        import asyncpg

        other = await asyncpg.connect(service.settings["DATABASE_URL"].replace("+asyncpg", ""))
        async with other.transaction():
            await other.execute(statement)
            calling = asyncio.create_task(asyncio.to_thread(call))
            waits = not (await asyncio.wait([calling], timeout=0.5))[0]
        await other.close()
        return waits, await calling

    return asyncio.run(run())


def test_who_is_deleted_while_a_post_of_theirs_is_stored_leaves_nothing_untold(
    start: Start,
) -> None:
    service = start(database="postgresql")
    person, admin = sign_up(service), sign_in_admin(service)
    post = f"""INSERT INTO post (title, content, is_published, version, author_id, created_at,
        updated_at) VALUES ('x', 'x', true, 1, {person.id}, now(), now())"""
    change = partial(admin.api.patch, f"/users/{person.id}", json={"bio": "x"})
    waits, changed = beside_another(service, post, change)
    assert (waits, changed.status_code) == (False, 200)
    with Listener(service) as listener:
        delete = partial(admin.api.delete, f"/users/{person.id}")
        waits, deleted = beside_another(service, post, delete)
        assert (waits, deleted.status_code) == (True, 204)
        assert [kind for kind, _ in listener.wait(2)] == ["post.deleted"] * 2


# --- Routes: posts --------------------------------------------------------------------------------


def ids_of(service: Service, query: str) -> list[int]:
    answer = service.client.get(f"/posts?{query}")
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["items"]]


def test_posts_are_listed_newest_first_in_pages_and_by_key(service: Service) -> None:
    name = uuid4().hex
    author = sign_up(service, first_name=name)
    ids = [publish(author)["id"] for _ in range(5)][::-1]
    second = service.client.get(f"/posts?author={name}&page=2&size=2").json()
    assert [item["id"] for item in second.pop("items")] == ids[2:4]
    assert second == {"total": 5, "page": 2, "size": 2, "pages": 3}
    beyond = service.client.get(f"/posts?author={name}&page={NEVER}&size=100").json()
    assert (beyond["items"], beyond["total"], beyond["pages"]) == ([], 5, 1)
    none = service.client.get("/posts?author=nobody-is-called-so").json()
    assert (none["items"], none["total"], none["pages"]) == ([], 0, 0)
    read, before = [], NEVER
    while page := ids_of(service, f"author={name}&size=2&before={before}"):
        read += page
        before = page[-1]
    assert read == ids
    by_key = service.client.get(f"/posts?author={name}&size=2&before={ids[0]}").json()
    assert [item["id"] for item in by_key.pop("items")] == ids[1:3]
    assert by_key == {"total": None, "page": None, "size": 2, "pages": None}


def test_posts_are_sorted_as_asked(service: Service) -> None:
    name = uuid4().hex
    author = sign_up(service, first_name=name)
    a, c, b = (publish(author, title=title)["id"] for title in ("a", "c", "b"))
    author.api.patch(f"/posts/{a}", json={})
    for sort, expected in {
        "title": [a, b, c],
        "-title": [c, b, a],
        "created_at": [a, c, b],
        "-created_at": [b, c, a],
        "updated_at": [c, b, a],
        "-updated_at": [a, b, c],
    }.items():
        assert ids_of(service, f"author={name}&sort={sort}") == expected, sort


def test_the_author_filter_takes_part_of_a_name_literally(service: Service) -> None:
    mark = uuid4().hex[:8]
    first = publish(sign_up(service, first_name=f"{mark}%Ann_"))["id"]
    last = publish(sign_up(service, last_name=f"x{mark.upper()}Lee"))["id"]
    nameless = publish(sign_up(service))["id"]
    assert ids_of(service, f"author={mark}") == [last, first]
    assert ids_of(service, f"author={mark.upper()}l") == [last]
    assert ids_of(service, f"author={mark}%25aNN_") == [first]
    for nobody in (f"{mark}_", f"{mark}%25%25", "%25" + mark + "_", "' OR 1=1--", f"{mark}\\", "/"):
        assert ids_of(service, f"author={nobody}") == [], nobody
    assert nameless in ids_of(service, "author=&size=100")
    for too_long in ("%25" * 101, "%25" * 20_000, "_" * 50_001, "%00", "%ED%A0%80"):
        answer = service.client.get(f"/posts?author={too_long}")
        assert answer.status_code == 422 or answer.json()["items"] == []


def test_posts_are_filtered_by_dates_inclusively(service: Service) -> None:
    name = uuid4().hex
    author = sign_up(service, first_name=name)
    early, midnight, noon = (publish(author)["id"] for _ in range(3))
    zone = "+00" if service.database == "postgresql" else ""
    for post, moment in (
        (early, "2024-01-01 23:59:59.999999"),
        (midnight, "2024-01-02 00:00:00.000000"),
        (noon, "2024-01-02 12:30:00.000000"),
    ):
        service.sql(f"UPDATE post SET created_at = '{moment}{zone}' WHERE id = {post}")
    for query, expected in {
        "min_date=2024-01-02": [noon, midnight],
        "max_date=2024-01-02": [noon, midnight, early],
        "max_date=2024-01-01": [early],
        "min_date=2024-01-02T12:30:00": [noon],
        "min_date=2024-01-02T12:30:00Z&max_date=2024-01-02T12:30": [noon],
        "min_date=2024-01-02T14:30:00.000001%2B02:00": [],
        "max_date=2024-01-02T14:30:00%2B02:00": [noon, midnight, early],
        "min_date=2024-01-02T00:00:00Z&max_date=2024-01-02T00:00:00Z": [midnight],
        "min_date=0001-01-01&max_date=9999-12-31": [noon, midnight, early],
        f"min_date=2024-01-02&before={noon}": [midnight],
    }.items():
        assert ids_of(service, f"author={name}&{query}") == expected, query


@pytest.mark.slow
def test_a_page_of_20_posts_costs_two_statements_and_by_key_one(service: Service) -> None:
    for _ in range(20):
        publish(sign_up(service))
    assert len(service.client.get("/posts").json()["items"]) == 20
    assert len(statements(service, "/posts")) == 2
    assert len(statements(service, f"/posts?before={NEVER}")) == 1
    assert len(statements(service, f"/posts/{publish(sign_up(service))['id']}")) == 1


def test_what_strangers_read_is_found_by_indexes(service: Service) -> None:
    if service.database != "sqlite":
        pytest.skip("the plans are SQLite's")
    post = publish(sign_up(service))["id"]
    paths = ["/posts", f"/posts?before={NEVER}", f"/posts/{post}", f"/posts/{post}/comments"]
    asked = [statement for path in paths for statement in statements(service, path)]
    assert len(asked) == 7
    for statement in asked:
        plan = service.sql(f"EXPLAIN QUERY PLAN {statement.replace('?', '1')}")
        steps = [step for *_, step in plan if not step.startswith("SCALAR SUBQUERY")]
        if steps[0] == "SCAN CONSTANT ROW":  # the count: of all, which is quick, less the drafts
            steps = steps[2:]
        assert all(step.startswith("SEARCH") for step in steps), (statement, steps)


def test_a_post_is_answered_whole_with_its_location(service: Service) -> None:
    author = sign_up(service, first_name="Ann", last_name="Lee")
    answer = author.api.post("/posts", json={"title": "  Bees ", "content": " They\nhum. "})
    post = answer.json()
    assert UTC_TIME.fullmatch(post["created_at"])
    assert UTC_TIME.fullmatch(post["updated_at"])
    assert post == {
        "id": post["id"],
        "title": "Bees",
        "content": " They\nhum. ",
        "is_published": False,
        "version": 1,
        "author": {"id": author.id, "full_name": "Ann Lee"},
        "created_at": post["created_at"],
        "updated_at": post["updated_at"],
    }
    assert answer.headers["location"] == f"/api/v1/posts/{post['id']}"
    assert author.api.get(f"/posts/{post['id']}").json() == post


def test_a_draft_is_in_no_list_but_its_authors(service: Service) -> None:
    author = sign_up(service)
    draft, post = write(author), publish(author)
    for caller in (service.client, author.api, sign_in_admin(service).api):
        for query in ("", f"?before={NEVER}", "?sort=-created_at"):
            ids = [item["id"] for item in caller.get(f"/posts{query}").json()["items"]]
            assert post["id"] in ids
            assert draft["id"] not in ids
    mine = author.api.get("/users/me/posts").json()
    assert [item["id"] for item in mine["items"]] == [post["id"], draft["id"]]
    assert (mine["total"], mine["page"], mine["size"], mine["pages"]) == (2, 1, 20, 1)


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_only_the_fields_of_a_post_that_are_sent_change(service: Service, method: str) -> None:
    author = sign_up(service)
    post = publish(author)
    after = author.api.request(method, f"/posts/{post['id']}", json={"content": "New"}).json()
    assert after["updated_at"] > post["updated_at"]
    assert after == post | {"content": "New", "version": 2, "updated_at": after["updated_at"]}
    empty = author.api.request(method, f"/posts/{post['id']}", json={}).json()
    assert empty == after | {"version": 3, "updated_at": empty["updated_at"]}
    assert service.client.get(f"/posts/{post['id']}").json() == empty


@pytest.mark.parametrize("version", [0, -1, 1, 3, 2**31, 2**63, 10**400], ids=lambda v: str(v)[:9])
def test_a_version_that_is_not_the_current_one_changes_nothing(
    service: Service, version: int
) -> None:
    author = sign_up(service)
    post = write(author)
    now_at_two = author.api.patch(f"/posts/{post['id']}", json={"version": 1}).json()
    body = {"title": "Too late", "version": version}
    late = author.api.patch(f"/posts/{post['id']}", json=body)
    assert late.json()["error_code"] == "CONFLICT"
    assert author.api.get(f"/posts/{post['id']}").json() == now_at_two


def test_of_20_edits_of_one_version_at_once_one_wins(service: Service) -> None:
    author = sign_up(service)
    post = write(author)
    bodies = [{"title": f"{number}", "version": 1} for number in range(20)]
    answers = at_once(20, lambda n: author.api.patch(f"/posts/{post['id']}", json=bodies[n]))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 19
    (winner,) = (answer.json() for answer in answers if answer.status_code == 200)
    assert author.api.get(f"/posts/{post['id']}").json() == winner


def test_of_20_edits_without_a_version_at_once_none_is_lost(service: Service) -> None:
    author = sign_up(service)
    post = write(author)
    path = f"/posts/{post['id']}"
    answers = at_once(20, lambda n: author.api.patch(path, json={"title": f"{n}"}))
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(answer.json()["version"] for answer in answers) == list(range(2, 22))
    last = max((answer.json() for answer in answers), key=lambda body: int(body["version"]))
    assert author.api.get(path).json() == last


def test_publishing_happens_once_and_tells_the_admin_once(
    service: Service, mail_server: MailServer
) -> None:
    author, title = sign_up(service), f"Bees {uuid4().hex}"
    draft = write(author, title=title)
    assert author.api.patch(f"/posts/{draft['id']}", json={}).status_code == 200
    first, *more = at_once(5, lambda _: author.api.post(f"/posts/{draft['id']}/publish"))
    assert (first.status_code, first.json()["is_published"]) == (200, True)
    assert first.json()["version"] == 3
    assert all(answer.json() == first.json() for answer in more)
    assert author.api.post(f"/posts/{draft['id']}/publish").json() == first.json()
    at_last = publish(author, title=f"{title}, at once")

    def told() -> list[str]:
        return [mail.get_content() for mail in mail_server.mails_to(BOSS) if title in str(mail)]

    eventually(lambda: len(told()) == 2)
    for post in (draft, at_last):
        assert sum(f"/api/v1/posts/{post['id']}" in body.split() for body in told()) == 1


def test_a_post_takes_its_comments_with_it_and_its_id_is_not_given_again(service: Service) -> None:
    author = sign_up(service)
    post = publish(author)["id"]
    said = comment(author, post)["id"]
    assert author.api.delete(f"/posts/{post}").status_code == 204
    assert service.sql(f"SELECT id FROM comment WHERE post_id = {post}") == []
    assert author.api.delete(f"/comments/{said}").status_code == 404
    assert publish(author)["id"] > post


# --- Routes: comments -----------------------------------------------------------------------------


def test_comments_are_answered_whole_and_listed_oldest_first(service: Service) -> None:
    author, other = sign_up(service), sign_up(service, first_name="Bo")
    post = publish(author)["id"]
    said = comment(other, post, "  lines\nand 李 ")
    assert UTC_TIME.fullmatch(said["created_at"])
    assert said == {
        "id": said["id"],
        "text": "lines\nand 李",
        "author": {"id": other.id, "full_name": "Bo"},
        "post_id": post,
        "created_at": said["created_at"],
    }
    more = [comment(author, post), comment(other, post)]
    page = service.client.get(f"/posts/{post}/comments").json()
    assert page == {"items": [said, *more], "total": 3, "page": 1, "size": 20, "pages": 1}
    second = service.client.get(f"/posts/{post}/comments?page=2&size=2").json()
    assert (second["items"], second["pages"]) == ([more[1]], 2)
    assert comment(author, publish(author)["id"])["id"] > more[1]["id"]


def test_superusers_delete_posts_drafts_and_comments(service: Service) -> None:
    author, admin = sign_up(service), sign_in_admin(service)
    post, draft = publish(author)["id"], write(author)["id"]
    said = comment(author, post)["id"]
    for path in (f"/comments/{said}", f"/posts/{draft}", f"/posts/{post}"):
        assert admin.api.delete(path).status_code == 204
    assert author.api.get("/users/me/posts").json()["total"] == 0


def test_of_deletions_at_once_one_succeeds(service: Service) -> None:
    author = sign_up(service)
    said = comment(author, publish(author)["id"])["id"]
    answers = at_once(20, lambda _: author.api.delete(f"/comments/{said}"))
    assert sorted(answer.status_code for answer in answers) == [204] + [404] * 19
    post = publish(author)["id"]
    answers = at_once(5, lambda _: author.api.delete(f"/posts/{post}"))
    assert sorted(answer.status_code for answer in answers) == [204] + [404] * 4


def test_a_comment_on_a_post_that_goes_is_refused_or_goes_too(service: Service) -> None:
    author, other = sign_up(service), sign_up(service)
    for _ in range(5):
        post = publish(author)["id"]
        comment_on_it = partial(other.api.post, f"/posts/{post}/comments", json={"text": "x"})
        calls = [partial(author.api.delete, f"/posts/{post}"), *[comment_on_it] * 4]
        deleted, *commented = all_at_once(*calls)
        assert deleted.status_code == 204
        assert {answer.status_code for answer in commented} <= {201, 404}
        assert service.sql(f"SELECT id FROM comment WHERE post_id = {post}") == []


def test_who_deletes_a_comment_waits_for_who_holds_its_post(start: Start) -> None:
    """So what is told of a post comes in the order of the commits."""
    service = start(database="postgresql")
    author = sign_up(service)
    post = publish(author)["id"]
    delete = partial(author.api.delete, f"/comments/{comment(author, post)['id']}")
    hold = f"SELECT FROM post WHERE id = {post} FOR UPDATE"
    waits, deleted = beside_another(service, hold, delete)
    assert (waits, deleted.status_code) == (True, 204)


# --- Routes: live ---------------------------------------------------------------------------------


def test_the_stream_of_one_post_ends_with_it(service: Service) -> None:
    author = sign_up(service)
    post, other = publish(author), publish(author)
    with Listener(service, f"?post_id={post['id']}") as listener:
        comment(author, other["id"])
        said = comment(author, post["id"])
        author.api.delete(f"/posts/{other['id']}")
        author.api.delete(f"/posts/{post['id']}")
        assert listener.ended()
        assert listener.events == [("comment.created", said), ("post.deleted", {"id": post["id"]})]


def test_people_in_a_room_hear_the_post_and_each_other(service: Service) -> None:
    author, other = sign_up(service, first_name="Ann"), sign_up(service)
    post, elsewhere = publish(author)["id"], publish(author)["id"]
    with in_room(author, post) as ann, in_room(other, post) as bo, in_room(other, elsewhere) as far:
        say(ann, type="message", text="  Hello 李\n ")
        ann_said = {"type": "message", "from": {"id": author.id, "full_name": "Ann"}}
        assert hear(ann) == hear(bo) == ann_said | {"text": "Hello 李"}
        with Listener(service) as listener:
            comment(author, elsewhere)
            new = comment(other, post)
            listener.wait(2)
        assert hear(ann) == hear(bo)
        assert hear(far)["type"] == "comment.created"
        say(far, type="message", text="x")
        assert hear(far)["text"] == "x"
        updated = author.api.patch(f"/posts/{post}", json={}).json()
        event = hear(ann)
        told = {"type": "post.updated", "data": without_content(updated)}
        assert event == told | {"id": event["id"]}
        assert event["id"].split("-")[0] == listener.ids[0].split("-")[0]
        assert new["post_id"] == post
        author.api.delete(f"/posts/{post}")
        assert hear(bo) == event
        for room in (ann, bo):
            gone = hear(room)
            assert (gone["type"], gone["data"]) == ("post.deleted", {"id": post})
            assert close_code(room) == 4404
        say(far, type="message", text="y")
        assert hear(far)["text"] == "y"


BAD_FRAMES: dict[str, str | bytes] = {
    "half an object": "{",
    "nothing": "",
    "bytes": b'{"type":"message","text":"x"}',
    "100,000 [ in a small frame": "[" * 60_000,
    "null": "null",
    "no type": '{"text":"x"}',
    "another type": '{"type":"shout","text":"x"}',
    "no text": '{"type":"message"}',
    "blank text": '{"type":"message","text":" \\n"}',
    "501 characters": json.dumps({"type": "message", "text": "x" * 501}),
    "a NUL": '{"type":"message","text":"\\u0000"}',
    "half a surrogate pair": '{"type":"message","text":"\\ud800"}',
    "text that is a number": '{"type":"message","text":1}',
    "a field too many": '{"type":"message","text":"x","from":{"id":1}}',
    "another token": '{"type":"auth","token":"x"}',
}


@pytest.mark.parametrize("frame", BAD_FRAMES)
def test_anything_but_a_message_closes_the_room_with_1008(service: Service, frame: str) -> None:
    person = sign_up(service)
    post = publish(person)["id"]
    with in_room(person, post) as other:
        with in_room(person, post) as room:
            room.send(BAD_FRAMES[frame])
            assert close_code(room) == 1008
        with room_of(service, post) as stranger:
            stranger.send(BAD_FRAMES[frame])
            assert close_code(stranger) == (4401 if "token" in frame else 1008)
        say(other, type="message", text="still here")
        assert hear(other)["text"] == "still here"


@pytest.mark.parametrize("size", [65_537, 2**20])
def test_a_frame_over_64_kb_closes_the_room_with_1009(service: Service, size: int) -> None:
    person = sign_up(service)
    with in_room(person, publish(person)["id"]) as room:
        room.send("x" * size)
        assert close_code(room) == 1009


def test_more_than_20_messages_in_10_seconds_close_the_room_with_1008(service: Service) -> None:
    person, other = sign_up(service), sign_up(service)
    post = publish(person)["id"]
    with in_room(other, post) as listener, in_room(person, post) as room:
        with contextlib.suppress(ConnectionClosed):
            for number in range(40):
                say(room, type="message", text=f"{number}")
        assert close_code(room) == 1008
        assert [hear(listener)["text"] for _ in range(20)] == [f"{number}" for number in range(20)]
        say(listener, type="message", text="next")
        assert hear(listener)["text"] == "next"


def test_bad_utf_8_closes_the_room_and_leaves_no_traceback(service: Service) -> None:
    person = sign_up(service)
    with in_room(person, publish(person)["id"]) as room:
        room.send(b"\xff", text=True)
        assert close_code(room) == 1007
    assert "Invalid UTF-8" not in service.log_so_far()


def test_a_bad_token_closes_the_room_with_4401(service: Service) -> None:
    person = sign_up(service)
    post = publish(person)["id"]
    forged = [token for tokens in forgeries(person).values() for token in tokens]
    left = sign_up(service)
    left.api.post("/auth/logout")
    for token in [*forged, left.tokens["access_token"], "", "\u0000", "x" * 50_000]:
        with room_of(service, post) as room:
            say(room, type="auth", token=token)
            assert close_code(room) == 4401, token[:80]


def test_a_token_in_the_url_is_not_taken(service: Service) -> None:
    person = sign_up(service)
    query = f"?token={person.tokens['access_token']}"
    bearer = person.api.headers
    with room_of(service, f"{publish(person)['id']}{query}", additional_headers=bearer) as room:
        say(room, type="message", text="x")
        assert close_code(room) == 1008


def test_a_post_that_one_does_not_see_closes_the_room_with_4404(service: Service) -> None:
    author, other = sign_up(service), sign_up(service)
    draft = write(author)["id"]
    for person, post in ((other, draft), (other, NEVER), (author, NEVER)):
        with room_of(service, post) as room:
            say(room, type="auth", token=person.tokens["access_token"])
            assert close_code(room) == 4404
    for person in (author, sign_in_admin(service)):
        with in_room(person, draft) as room:
            say(room, type="message", text="x")
            assert hear(room)["text"] == "x"


def test_a_database_that_fails_closes_the_room_with_1013(start: Start) -> None:
    service = start()
    person = sign_up(service)
    post = publish(person)["id"]
    service.sql("ALTER TABLE post RENAME TO somewhere_else")
    with room_of(service, post) as room:
        say(room, type="auth", token=person.tokens["access_token"])
        assert close_code(room) == 1013


@pytest.mark.parametrize("post_id", ["0", "-1", str(2**31), "9" * 400, "abc", "1.5", "%00"])
def test_a_room_with_an_impossible_id_is_refused_with_403(service: Service, post_id: str) -> None:
    with pytest.raises(InvalidStatus) as refused, room_of(service, post_id):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    "origin", [None, "http://localhost:3000", "http://{host}", "https://{host}"]
)
def test_a_known_origin_is_let_into_a_room(service: Service, origin: str | None) -> None:
    sent = origin and origin.replace("{host}", f"127.0.0.1:{service.port}")
    with room_of(service, publish(sign_up(service))["id"], origin=sent) as room:
        say(room, type="auth", token="x")
        assert close_code(room) == 4401


FOREIGN = ["http://evil.example", "http://localhost:3001", "null", "{host}"]
FOREIGN += ["http://{host}.evil.example", "http://evil.example/http://{host}"]


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_origin_is_refused_with_403(service: Service, origin: str) -> None:
    sent = origin.replace("{host}", f"127.0.0.1:{service.port}")
    post = publish(sign_up(service))["id"]
    with pytest.raises(InvalidStatus) as refused, room_of(service, post, origin=sent):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.slow
def test_200_people_in_a_room_hear_100_messages_in_order(service: Service) -> None:
    people = [sign_up(service) for _ in range(5)]
    post = publish(people[0])["id"]
    url = f"ws://127.0.0.1:{service.port}/api/v1/ws/posts/{post}"

    async def listen(person: Account, ready: asyncio.Barrier, speaks: bool) -> list[str]:
        async with connect_async(url, ping_interval=None, compression=None) as room:
            await room.send(json.dumps({"type": "auth", "token": person.tokens["access_token"]}))
            assert json.loads(await room.recv())["type"] == "ready"
            await ready.wait()
            for number in range(20 if speaks else 0):
                text = f"{person.id} {number}"
                await room.send(json.dumps({"type": "message", "text": text}))
            return [json.loads(await room.recv())["text"] for _ in range(100)]

    async def all_of_them() -> list[list[str]]:
        ready = asyncio.Barrier(200)
        many = (listen(people[number % 5], ready, number < 5) for number in range(200))
        async with asyncio.timeout(30):
            return await asyncio.gather(*many)

    heard = asyncio.run(all_of_them())
    assert all(messages == heard[0] for messages in heard)
    for person in people:
        mine = [text for text in heard[0] if text.startswith(f"{person.id} ")]
        assert mine == [f"{person.id} {number}" for number in range(20)]


@pytest.mark.slow
def test_beyond_1000_listeners_the_answer_is_503_or_1013(start: Start) -> None:
    service = start()
    person = sign_up(service)
    post = publish(person)["id"]
    crowd = []
    for _ in range(999):
        crowd.append(socket.create_connection(("127.0.0.1", service.port)))
        crowd[-1].sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
    for listener in crowd:
        assert listener.recv(1_000).startswith(b"HTTP/1.1 200 ")
    with in_room(person, post):
        with service.client.stream("GET", "/events") as full:
            assert full.status_code == 503
        with room_of(service, post) as room:
            assert close_code(room) == 1013

    def welcome() -> bool:
        with contextlib.suppress(ConnectionClosed), room_of(service, post) as room:
            say(room, type="auth", token=person.tokens["access_token"])
            return "ready" in str(room.recv(timeout=5))
        return False

    for _ in range(3):  # there is one seat, and who leaves gives it back
        eventually(welcome)
    for listener in crowd:
        listener.close()
    eventually(lambda: service.client.stream("GET", "/events").__enter__().status_code == 200)


@pytest.mark.slow
def test_who_may_not_stay_or_does_not_speak_or_read_has_to_go(start: Start) -> None:
    """All of it takes ten seconds, so all of it is waited for at once."""
    service = start()
    author, admin = sign_up(service), sign_in_admin(service)
    out, barred, deleted = (sign_up(service) for _ in range(3))
    post, draft = publish(author)["id"], write(author)["id"]
    expiring = forge(author, exp=int(time.time()) + 3)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        listener = enter(Listener(service, f"?post_id={draft}"))
        kept = enter(contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port)))
        kept.request("GET", "/health")
        kept.getresponse().read()
        kept.auto_open = 0  # a proxy would not look either whether it is still there
        silent = enter(room_of(service, post))
        stays = enter(in_room(author, post))
        ending = {person.id: enter(in_room(person, post)) for person in (out, barred, deleted)}
        in_draft = enter(in_room(author, draft))
        expires = enter(room_of(service, post))
        say(expires, type="auth", token=expiring)
        deaf = enter(raw_room(service, post))
        hello = json.dumps({"type": "auth", "token": author.tokens["access_token"]}).encode()
        deaf.sendall(b"\x81\xfe" + len(hello).to_bytes(2) + b"\0\0\0\0" + hello)
        out.api.post("/auth/logout")
        admin.api.patch(f"/users/{barred.id}", json={"is_active": False})
        admin.api.delete(f"/users/{deleted.id}")
        author.api.delete(f"/posts/{draft}")
        began = time.monotonic()
        deaf.settimeout(15)
        with contextlib.suppress(ConnectionResetError):
            while deaf.recv(10_000):  # it reads, but never answers a ping
                pass
        assert time.monotonic() - began < 12
        assert close_code(silent, 12) == 1008
        assert [close_code(room, 12) for room in ending.values()] == [4401] * 3
        assert close_code(expires, 12) == 4401
        assert close_code(in_draft, 12) == 4404
        eventually(lambda: listener.pings, 12)
        assert listener.events == []
        say(stays, type="message", text="still here")
        while hear(stays).get("text") != "still here":
            pass
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b'{"status":"healthy"}'


# --- Demo -----------------------------------------------------------------------------------------


DEMO: dict[str, Any] = {"DEMO": "true", "DATABASE_URL": "unset", "SECRET_KEY": "unset"}
DEMO |= {"FIRST_SUPERUSER_EMAIL": "unset", "FIRST_SUPERUSER_PASSWORD": "unset"}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("demo"), **DEMO)
    yield running
    running.stop()


def banner_of(service: Service) -> dict[str, str]:
    """What was printed at the start, by the words in front."""
    names = "^(Nutshell|docs|health|data|admin|sign in|try) +(.*)$"
    known = re.findall(names, service.log.read_text(), re.MULTILINE)
    lines = dict(known)
    assert len(lines) == len(known)
    return lines


HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def test_the_demo_has_people_posts_comments_and_a_draft(demo: Service) -> None:
    lines = banner_of(demo)
    assert lines["admin"] == "cleo@example.com"
    assert lines["sign in"].startswith("ann@example.com ")
    told = re.findall(r"(\w+@example.com) +(\S+) \((\w+)\)$", demo.log.read_text(), re.MULTILINE)
    assert [role for _, _, role in told] == ["user", "user", "admin"]
    ann, ben, cleo = people = [sign_in(demo, email, password) for email, password, _ in told]
    assert [p.api.get("/users/me").json()["role"] for p in people] == ["user", "user", "admin"]
    page = demo.client.get(demo.address, headers=HTML).text
    assert all(f"{email} " in page for email, _, _ in told)
    assert cleo.api.get("/users").json()["total"] >= 3
    posts = [p for p in demo.client.get("/posts?size=100").json()["items"] if p["id"] < 13]
    assert [post["id"] for post in posts] == list(range(12, 0, -1))
    assert {post["author"]["full_name"] for post in posts} == {"Ann", "Ben", "Cleo"}
    times = [post["created_at"] for post in posts]
    assert times == sorted(times, reverse=True)
    pages = [demo.client.get(f"/posts/{number}/comments").json() for number in range(1, 13)]
    said = [one for page in pages for one in page["items"]]
    assert len(said) >= 10
    assert {one["author"]["full_name"] for one in said} == {"Ann", "Ben", "Cleo"}
    bread = [(one["author"]["full_name"], one["text"]) for one in said if one["post_id"] == 2]
    assert bread == [("Cleo", "How long?"), ("Ben", "A night.")]
    drafts = [p for p in ann.api.get("/users/me/posts").json()["items"] if not p["is_published"]]
    assert [post["id"] for post in drafts] == [13]


def test_the_demo_is_new_at_every_start_and_leaves_nothing_behind(start: Start) -> None:
    service = start(**DEMO)
    first = Path(banner_of(service)["data"])
    assert first.exists()
    assert service.folder not in first.parents
    assert register(service).status_code == 201
    assert service.stop() in (0, -signal.SIGTERM)
    assert not first.parent.exists()
    service.log.unlink()
    service.start()
    cleo = sign_in(service, "cleo@example.com", "correct-horse")
    assert cleo.api.get("/users").json()["total"] == 3
    assert Path(banner_of(service)["data"]) != first
    assert [file.name for file in service.folder.iterdir()] == ["log"]


# --- Pages ----------------------------------------------------------------------------------------


def test_health_and_root_answer_get_and_head(service: Service) -> None:
    for path, body in (("/health", {"status": "healthy"}), ("/", {"status": "ok"})):
        got, head = (service.client.request(m, service.address + path) for m in ("GET", "HEAD"))
        assert (got.status_code, got.json()) == (200, body)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]


def test_health_answers_503_when_the_database_does_not(start: Start) -> None:
    service = start()
    service.sql("ALTER TABLE user RENAME TO somewhere_else")
    assert service.client.get(f"{service.address}/health").status_code == 503


@pytest.mark.slow
def test_health_waits_a_second_for_a_database_that_hangs(start: Start) -> None:
    fcntl = pytest.importorskip("fcntl")
    service = start()
    with (service.folder / "app.db-shm").open("r+b") as shared:
        fcntl.lockf(shared, fcntl.LOCK_EX, 8, 120)  # all the locks that SQLite's WAL knows
        began = time.monotonic()
        assert service.client.get(f"{service.address}/health").status_code == 503
        assert 0.9 < time.monotonic() - began < 2
    eventually(lambda: service.client.get(f"{service.address}/health").status_code == 200, 12)


@pytest.mark.slow
def test_a_health_check_is_answered_under_load(service: Service) -> None:
    person = sign_up(service)
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            person.api.get("/users/me")

    def check() -> None:
        try:
            for _ in range(5):
                began = time.monotonic()
                assert service.client.get(f"{service.address}/health").status_code == 200
                assert time.monotonic() - began < 2
        finally:
            done.set()

    all_at_once(check, *[load] * 16)


def test_the_docs_work_without_a_network(service: Service) -> None:
    page = service.client.get(f"{service.address}/docs")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="(.+?)"', page.text)
    assert len(links) == 3
    for link in links:
        assert link.startswith("/docs/")
        assert service.client.get(service.address + link).status_code == 200


REFUSALS = [  # besides those that every route may answer
    ([401, 422, 429], "login refresh logout list_users list_own_posts list_posts"),
    ([401, 422, 429], "stream_events"),
    ([401, 404, 422, 429], "get_user get_post list_comments"),
    ([401, 403, 404, 422, 429], "delete_post publish_post delete_comment"),
    ([401, 403, 404, 409, 422, 429], "update_user delete_user update_post put_post"),
    ([401, 403, 409, 422, 429], "create_user"),
    ([401, 404, 409, 422, 429], "add_comment"),
    ([401, 409, 422, 429], "create_post"),
    ([403, 409, 422, 429], "register"),
    ([401, 403, 422], "verify"),
    ([429], "root"),
    ([], "health"),
]
REFUSED = {route: codes for codes, routes in REFUSALS for route in routes.split()}


def test_openapi_describes_answers_and_errors(service: Service) -> None:
    page = service.client.get(f"{service.address}/openapi.json").json()
    schemas = page["components"]["schemas"]
    assert schemas["Problem"]["required"] == ["detail", "error_code", "request_id"]
    routes = [route for methods in page["paths"].values() for route in methods.values()]
    assert len({route["operationId"] for route in routes}) == len(routes) > 20
    for route in routes:
        assert re.fullmatch("[a-z]+(_[a-z]+)?(_[a-z]+)?", route["operationId"])
        assert route["summary"]
        assert route["description"]
        assert len(route["tags"]) == 1
        refused = [int(code) for code in route["responses"] if int(code) >= 400]
        assert sorted(refused) == sorted([400, 413, 500, 503, *REFUSED[route["operationId"]]])
        for code, answer in route["responses"].items():
            if int(code) >= 400:
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}
    email = schemas["UserCreate"]["properties"]["email"]
    assert (email["format"], email["maxLength"]) == ("email", 254)
    verify = page["paths"]["/api/v1/auth/verify"]["get"]["responses"]["200"]
    assert "content" not in verify


def test_the_bodies_that_the_docs_show_work_as_they_are(start: Start) -> None:
    """In the order of a first visit. What shows no example of its own is put together from those of
    its fields, as Swagger UI does it."""
    service = start()
    page = service.client.get(f"{service.address}/openapi.json").json()

    def shown(schema: dict[str, Any]) -> Any:
        if "$ref" in schema:
            schema = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        if "examples" in schema:
            return schema["examples"][0]
        if "properties" in schema:
            return {name: shown(field) for name, field in schema["properties"].items()}
        return schema.get("default", schema.get("const"))

    bodies = {
        (route["operationId"], kind): shown(content["schema"])
        for methods in page["paths"].values()
        for route in methods.values()
        for kind, content in route.get("requestBody", {}).get("content", {}).items()
    }
    as_json = {name: body for (name, kind), body in bodies.items() if kind == "application/json"}
    forms = {name: body for (name, kind), body in bodies.items() if "form" in kind}
    assert forms.keys() == {"login", "refresh"}
    assert service.client.post("/auth/register", json=as_json.pop("register")).status_code == 201
    tokens = service.client.post("/auth/login", data=forms["login"]).json()
    dora, admin = service.as_(tokens["access_token"]), sign_in_admin(service).api
    assert admin.post("/users", json=as_json.pop("create_user")).status_code == 201
    assert dora.patch("/users/me", json=as_json.pop("update_user")).status_code == 200
    assert dora.post("/posts", json=as_json.pop("create_post")).status_code == 201
    assert dora.patch("/posts/1", json=as_json.pop("update_post")).status_code == 200
    assert dora.put("/posts/1", json=as_json.pop("put_post")).status_code == 200
    assert dora.post("/posts/1/comments", json=as_json.pop("add_comment")).status_code == 201
    assert as_json == {}


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "text/plain"])
def test_programs_get_json_at_the_root(demo: Service, accept: str | None) -> None:
    headers = {"Accept": accept} if accept else {}
    answer = demo.client.get(demo.address, headers=headers)
    assert answer.json() == {"status": "ok"}
    assert answer.headers["vary"] == "Accept"


POLICY = "content-security-policy"


def test_a_browser_gets_a_page_that_may_ask_nobody_else(demo: Service) -> None:
    first, second, head = (
        demo.client.request(method, demo.address, headers=HTML) for method in ("GET", "GET", "HEAD")
    )
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["vary"] == "Accept"
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == first.headers["content-type"]
    nonce, again = re.findall('<(?:style|script) nonce="(.+?)"', first.text)
    assert nonce == again
    assert len(nonce) >= 22
    assert nonce not in second.text
    policy = dict(part.strip().split(" ", 1) for part in first.headers[POLICY].split(";"))
    assert policy == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "require-trusted-types-for": "'script'",
    }
    assert "http" not in first.text


def test_in_production_there_are_neither_docs_nor_a_page(start: Start) -> None:
    service = start(**PRODUCTION)
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/swagger-ui-bundle.js"):
        assert service.client.get(service.address + path).status_code == 404
    assert service.client.get(service.address, headers=HTML).json() == {"status": "ok"}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """Chromium without a window, told what to do over its DevTools protocol. It finds no host but
    this machine."""

    def __init__(self, folder: Path) -> None:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        options += [f"--user-data-dir={folder}", "--remote-debugging-port=0"]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        processes.append(self.process)
        told = folder / "DevToolsActivePort"
        eventually(lambda: told.exists() and len(told.read_text().split()) == 2, 30)
        port, path = told.read_text().split()
        self.stack = contextlib.ExitStack()
        address = f"ws://127.0.0.1:{port}{path}"
        self.socket = self.stack.enter_context(connect(address, max_size=None))
        self.numbers = count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **named: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": named}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while (got := json.loads(self.socket.recv(timeout=30))).get("id") != number:
            self.events.append(got)
        assert "error" not in got, got
        return dict(got["result"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stack.close()


class Window:
    """One window, with a storage of its own. It keeps what it asked for, and what went wrong."""

    def __init__(self, browser: Browser, address: str, **shape: Any) -> None:
        self.browser = browser
        self.storage = browser.call("Target.createBrowserContext")
        target = browser.call("Target.createTarget", url="about:blank", **self.storage)
        attached = browser.call("Target.attachToTarget", **target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Log", "Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")
        shape = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False} | shape
        self.call("Emulation.setDeviceMetricsOverride", **shape)
        self.call("Page.navigate", url=address)

    def call(self, method: str, **named: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **named)

    def close(self) -> None:
        self.browser.call("Target.disposeBrowserContext", **self.storage)

    def do(self, script: str) -> Any:
        wanted = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        got = self.call("Runtime.evaluate", expression=script, **wanted)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def reload(self) -> None:
        """Ends when the new page is there: Page.reload ends while the old one may still be."""
        self.do("window.old = true")
        self.call("Page.reload")
        eventually(lambda: self.do("!window.old && document.readyState === 'complete'"), 20)

    def text(self) -> str:
        return " ".join(self.do("document.body?.innerText ?? ''").split())

    def see(self, *texts: str, seconds: float = 10) -> None:
        try:
            eventually(lambda: all(text in self.text() for text in texts), seconds)
        except AssertionError:
            raise AssertionError(f"{texts} is not in: {self.text()}") from None

    def find(self, kind: str, name: str) -> str:
        """A script for the first visible thing of that name, as soon as it is there."""
        fits = f"(e) => e.checkVisibility() && e.innerText.trim() === {json.dumps(name)}"
        script = f"[...document.querySelectorAll({json.dumps(kind)})].filter({fits})[0]"
        eventually(lambda: self.do(f"!!{script}"))
        return script

    def fill(self, label: str, text: str) -> None:
        self.do(f"{self.find('label', label)}.control.focus()")
        self.call("Input.insertText", text=text)

    def press(self, name: str) -> None:
        self.do(f"{self.find('a, button', name)}.click()")

    def key(self, key: str, text: str = "") -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("keyDown", "keyUp"):
            named = {"type": kind, "key": key, "windowsVirtualKeyCode": code, "text": text}
            self.call("Input.dispatchKeyEvent", **named)

    def copied(self, which: str) -> str:
        """What somebody gets who selects and copies it, pasted into a field."""
        self.do(f"getSelection().selectAllChildren(document.getElementById('{which}'))")
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", commands=["copy"])
        self.do("document.body.append(document.createElement('textarea'))")
        self.do("document.body.lastElementChild.focus()")
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", commands=["paste"])
        text = self.do("document.body.lastElementChild.value")
        self.do("document.body.lastElementChild.remove()")
        return str(text)

    def visible(self, which: str) -> str:
        """The letters of it that are not transparent."""
        hidden = "getComputedStyle(node.parentElement).color === 'rgba(0, 0, 0, 0)'"
        walk = f"createTreeWalker(document.getElementById('{which}'), NodeFilter.SHOW_TEXT)"
        script = (
            f"const walk = document.{walk}; let text = '', node; while (node = walk.nextNode())"
        )
        script += f" text += {hidden} ? '***' : node.data"
        return str(self.do(f"(() => {{ {script}; return text; }})()"))

    def heard(self, *methods: str) -> list[dict[str, Any]]:
        self.do("1")  # all that was sent before this
        found = [e for e in self.browser.events if e.get("sessionId") == self.session]
        return [e["params"] for e in found if e["method"] in methods]

    def asked(self) -> list[str]:
        urls = [e["request"]["url"] for e in self.heard("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def complaints(self) -> list[Any]:
        said = [e["entry"] for e in self.heard("Log.entryAdded")]
        said = [entry for entry in said if entry["level"] in ("warning", "error")]
        return said + self.heard("Runtime.exceptionThrown", "Page.javascriptDialogOpening")

    def sign_up(self, name: str) -> str:
        email = new_email()
        self.fill("Email", email)
        self.fill("Password", PASSWORD)
        self.fill("First name, if you are new", name)
        self.press("Sign up")
        self.see(f"You are {name}")
        return email

    def write(self, title: str, content: str, how: str = "Publish") -> None:
        self.fill("Title", title)
        self.fill("Text", content)
        self.press(how)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    running = Browser(tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()


Windows = Callable[..., Window]


@pytest.fixture
def windows(browser: Browser, demo: Service) -> Iterator[Windows]:
    """Opens windows on the page. Whatever happens in them, nobody else is asked for anything."""
    opened: list[Window] = []

    def open_one(path: str = "/", **shape: Any) -> Window:
        opened.append(Window(browser, demo.address + path, **shape))
        return opened[-1]

    yield open_one
    strange = [url for w in opened for url in w.asked() if not url.startswith(demo.address)]
    for window in opened:
        window.close()
    assert strange == []


@pytest.mark.aside
def test_what_one_window_writes_another_sees_at_once(windows: Windows) -> None:
    mine, theirs = windows(), windows()
    theirs.see("Events: open", "Welcome by Ann")
    mine.sign_up("Dora")
    mine.write("Bees & ants", "They hum.\nThey dance.", "Save as draft")
    mine.see("Bees & ants, a draft", "They hum. They dance.")
    mine.press("Publish this draft")
    mine.see("Bees & ants by Dora")
    theirs.see("Events: post.published", "Bees & ants by Dora")
    theirs.press("Bees & ants")
    theirs.see("They hum. They dance.")
    mine.fill("Your comment", "Mine too.")
    mine.key("Enter", "\r")
    mine.see("Dora Mine too.", '"text": "Mine too."')
    theirs.see("Events: comment.created", "Dora Mine too.")
    assert "Your comment" not in theirs.text()
    mine.press("Sign out")
    mine.see("Sign up")
    assert "You are" not in mine.text()
    assert mine.complaints() + theirs.complaints() == []


@pytest.mark.aside
def test_what_people_write_is_never_html(windows: Windows) -> None:
    """The policy would stop a script, but there is nothing to stop: it stays text."""
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    mine, theirs = windows(), windows()
    mine.sign_up(evil)
    mine.write(evil, evil)
    mine.fill("Your comment", evil)
    mine.press("Send")
    theirs.press(evil)
    for window in (mine, theirs):
        window.see(f"{evil} by {evil}", f"{evil} {evil}")
        assert window.do("document.querySelectorAll('main img, main script').length") == 0
        assert window.complaints() == []


@pytest.mark.aside
def test_the_policy_of_the_page_stops_what_is_foreign(
    browser: Browser, demo: Service, start: Start
) -> None:
    """Had a script got in, it could make no HTML, load no script, and tell nobody else."""
    other = start()
    window = Window(browser, demo.address)
    window.see("Events: open")
    for forbidden in (
        "document.body.innerHTML = 'x'",
        f"document.createElement('script').src = '{other.address}/script'",
        "document.createElement('script').textContent = 'x'",
    ):
        attempt = f"(() => {{ try {{ {forbidden} }} catch (error) {{ return error.message }} }})()"
        assert "Trusted" in window.do(attempt)
    ask = f"fetch('{other.address}/fetched').catch((error) => error.message)"
    assert window.do(ask) == "Failed to fetch"
    window.do(
        "new Promise((done) => Object.assign(new Image(),"
        f" {{ onerror: done, src: '{other.address}/image' }})).then(() => true)"
    )
    assert not re.search("/(script|fetched|image)", other.log_so_far())
    window.close()


@pytest.mark.aside
def test_the_page_stays_signed_in_and_renews_an_expired_token_once(
    windows: Windows, demo: Service
) -> None:
    window = windows()
    window.sign_up("Dora")
    window.reload()
    window.see("You are Dora")
    expired = "sessionStorage.tokens = JSON.stringify({ ...tokens, access_token: 'e.x.pired' })"
    window.do(f"{expired}; tokens = JSON.parse(sessionStorage.tokens)")
    before = len(window.asked())
    window.write("With an old token", "It works.")
    window.see("With an old token by Dora")
    asked = [url.removeprefix(demo.address) for url in window.asked()[before:]]
    assert asked[:3] == ["/api/v1/posts", "/api/v1/auth/refresh", "/api/v1/posts"]
    assert asked.count("/api/v1/auth/refresh") == 1
    window.reload()
    window.see("You are Dora")
    window.do("tokens = { access_token: 'e.x.pired', refresh_token: 'e.x.pired' }")
    window.write("With no session", "It fails.")
    window.see("The token is missing, malformed, expired or revoked", "Sign up")
    window.see("With an old token by Dora")


@pytest.mark.aside
def test_the_page_shows_its_last_call_as_a_command_that_does_the_same(
    windows: Windows, demo: Service
) -> None:
    """Secrets are not to be seen, and whole when they are copied."""
    window = windows()
    window.press("Welcome")
    window.see("curl -X GET", f"{demo.address}/api/v1/posts/12", '"title": "Welcome"')

    def run() -> dict[str, Any]:
        command = ["bash", "-c", f"{window.copied('call')} -s"]
        return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))

    email = window.sign_up("Dora")
    assert f"username={email.replace('@', '%40')}&password=***" in window.visible("call")
    assert "eyJ" not in window.visible("answer")
    assert len(re.findall(r"eyJ[\w-]+\.[\w-]+\.[\w-]{43}", window.copied("answer"))) == 2
    assert run().keys() == {"access_token", "refresh_token", "token_type", "expires_in"}
    window.write('It\'s "quoted" \\ $HOME `id`', "A\n'text'")
    window.see("$HOME `id` by Dora")
    assert "Authorization: Bearer ***'" in window.visible("call")
    again, first = run(), json.loads(window.copied("answer").partition(" ")[2])
    assert again["title"] == first["title"] == 'It\'s "quoted" \\ $HOME `id`'
    assert again["content"] == first["content"] == "A\n'text'"
    assert again["id"] != first["id"]
    window.press("Sign out")
    window.see("auth/logout", "204")
    assert window.visible("answer").strip() == "204"


@pytest.mark.aside
def test_the_page_tells_what_was_refused(windows: Windows, demo: Service) -> None:
    window = windows()
    window.see("Events: open")
    window.fill("Email", "ann@example.com")
    window.fill("Password", "no such horse")
    window.press("Sign in")
    window.see("The email or the password is wrong")
    assert window.do("document.querySelector('[name=email]').value") == "ann@example.com"
    window.press("Sign up")
    window.see("There is an account with this email")
    assert '"password":***' in window.visible("call")
    window.do("document.querySelector('[name=password]').value = 'iloveyou'")
    window.press("Sign up")
    window.see("password: Value error, is among the passwords that are guessed first")


@pytest.mark.aside
def test_the_page_comes_back_after_a_restart(browser: Browser, start: Start) -> None:
    service = start()
    ann = sign_up(service, first_name="Ann")
    window = Window(browser, service.address)
    window.see("Events: open")
    service.stop()
    window.see("Events: reconnecting")
    service.start()
    publish(sign_in(service, ann.email), title="Written meanwhile")
    window.see("Written meanwhile by Ann", "Events: open", seconds=20)
    window.close()


@pytest.mark.aside
def test_the_page_goes_on_without_the_stream(browser: Browser, start: Start) -> None:
    """Refused, EventSource gives up for good: the page itself tries again."""
    service = start(RATE_LIMIT="5/second")
    publish(sign_up(service), title="There anyhow")
    window = Window(browser, "about:blank")
    window.call("Network.setBlockedURLs", urls=["*/api/v1/events"])
    window.call("Page.navigate", url=service.address)
    window.see("There anyhow", "Events: reconnecting")
    window.call("Network.setBlockedURLs", urls=[])
    window.see("Events: open")
    window.close()


@pytest.mark.aside
def test_who_reads_a_post_keeps_it_while_others_come_and_go(
    windows: Windows, demo: Service
) -> None:
    ann = sign_in(demo, "ann@example.com", "correct-horse")
    post = publish(ann, title="Read me")
    for number in range(201):
        comment(ann, post["id"], f"Comment {number}")
    window = windows()
    window.see("Read me Ann, ", " Ann Comment 100 Ann Comment 101 ", "Ann Comment 200")
    assert "Ann Comment 99 " not in window.text()
    ann.api.patch(f"/posts/{post['id']}", json={"title": "Read me again"})
    window.see("Read me again Ann, ")
    newer = publish(ann, title="Newer, but not asked for", content="Not this.")
    window.see("Newer, but not asked for by Ann")
    assert "Not this." not in window.text()
    window.sign_up("Dora")
    window.fill("Your comment", "To what I read")
    window.press("Send")
    window.see("Dora To what I read")
    assert demo.client.get(f"/posts/{newer['id']}/comments").json()["total"] == 0
    window.fill("Your comment", "For what is gone")
    ann.api.delete(f"/posts/{post['id']}")
    window.see("There is no such thing", "Events: post.deleted")
    assert "Your comment" not in window.text()
    window.press("Newer, but not asked for")
    window.see("Not this.")
    assert window.do("document.querySelector('[name=text]').value") == ""


@pytest.mark.aside
def test_the_page_looks_once_a_second_at_many_events_and_sees_the_last(
    windows: Windows, demo: Service
) -> None:
    window = windows()
    window.see("Welcome by Ann", "Events: open")
    ben = sign_in(demo, "ben@example.com", "correct-horse")
    before = len(window.asked())
    began = time.monotonic()
    for number in range(50):
        publish(ben, title=f"Number {number} of many")
    window.see("Number 49 of many by Ben")
    looks = sum(url.endswith("/posts?size=100") for url in window.asked()[before:])
    assert looks <= 2 + time.monotonic() - began


@pytest.mark.aside
def test_a_double_click_on_the_page_writes_once(windows: Windows, demo: Service) -> None:
    window = windows()
    window.sign_up("Dora")
    window.fill("Title", "Only once")
    window.fill("Text", "x")
    button = window.find("button", "Publish")
    window.do(f"{button}.click(); {button}.click()")
    window.see("Only once by Dora")
    assert window.text().count("Only once by Dora") == 1


@pytest.mark.aside
def test_the_page_works_by_keyboard_and_names_everything(windows: Windows, demo: Service) -> None:
    window = windows()
    window.see("Events: open")
    focused = "(document.activeElement.labels?.[0] ?? document.activeElement).innerText.trim()"
    order = []
    for _ in range(5):
        window.key("Tab")
        order.append(window.do(focused))
        text = {"Email": "ann@example.com", "Password": "correct-horse"}.get(order[-1], "")
        window.call("Input.insertText", text=text)
    assert order == ["All calls", "Email", "Password", "First name, if you are new", "Sign in"]
    window.key("Enter", "\r")
    window.see("You are Ann")
    eventually(lambda: window.do("document.activeElement.id") == "title")
    window.do(f"{window.find('a', 'Night train')}.focus()")
    publish(sign_in(demo, "ben@example.com", "correct-horse"), title="While the focus is there")
    window.see("While the focus is there by Ben")
    window.key("Enter", "\r")
    window.see("Berth 61")
    window.call("Accessibility.enable")
    nodes = window.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "link", "textbox", "heading", "region", "list", "status")
    named = [(n["role"]["value"], n["name"]["value"]) for n in nodes if n["role"]["value"] in roles]
    assert [role for role, name in named if not name and role not in ("status", "list")] == []
    assert {"Title", "Text", "Your comment"} <= {name for role, name in named if role == "textbox"}
    assert window.do("document.documentElement.lang") == "en"


@pytest.mark.aside
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_in_light_and_dark(windows: Windows, scheme: str) -> None:
    """The contrast of WCAG 2, level AA, is 4.5; measured on text, links and buttons."""
    window = windows()
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    window.call("Emulation.setEmulatedMedia", features=features)
    window.see("Welcome by Ann")

    def light(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text, ground in (
        ("#content", "section"),
        ("#posts a", "section"),
        ("label", "section"),
        ("h1", "body"),
        ("#sign button", "#sign button"),
        ("#call", "section"),
    ):
        ink = window.do(f"getComputedStyle(document.querySelector('{text}')).color")
        paper = window.do(f"getComputedStyle(document.querySelector('{ground}')).backgroundColor")
        brighter, darker = sorted((light(ink), light(paper)), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, (text, ink, paper)
    dark_paper = light(window.do("getComputedStyle(document.body).backgroundColor")) < 0.5
    assert dark_paper == (scheme == "dark")


@pytest.mark.aside
def test_the_page_fits_a_phone(windows: Windows) -> None:
    window = windows(width=360, height=700, mobile=True)
    window.sign_up("Dora")
    window.write("W" * 200, "https://example.com/" + "x" * 300)
    window.see("W" * 200)
    assert window.do("document.documentElement.scrollWidth") <= 360


@pytest.mark.aside
def test_the_docs_work_in_a_browser_without_a_network(windows: Windows, demo: Service) -> None:
    window = windows("/docs")
    routes = sum(len(methods) for methods in main.app.openapi()["paths"].values())
    blocks = "document.querySelectorAll('.opblock').length"
    eventually(lambda: window.do(blocks) == routes, 20)
    window.press("Authorize")
    eventually(lambda: window.do("!!document.querySelector('#oauth_username')"))
    for field, text in (("username", "ann@example.com"), ("password", "correct-horse")):
        window.do(f"document.querySelector('#oauth_{field}').focus()")
        window.call("Input.insertText", text=text)
    window.do("document.querySelector('.auth-btn-wrapper .authorize').click()")
    window.find(".modal-ux button", "Logout")
    window.reload()
    eventually(lambda: window.do(blocks) == routes, 20)
    window.do("document.querySelector('#operations-posts-create_post button').click()")
    execute = "document.querySelector('#operations-posts-create_post .execute')"
    body = "ui.oas3Selectors.requestBodyValue('/api/v1/posts', 'post')"  # there after the button
    eventually(lambda: window.do(f"!!{execute} && !!{body}"))
    window.do(f"{execute}.click()")
    window.see('"title": "Bees"', '"full_name": "Ann"')
    assert window.complaints() == []


# --- Front door -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["abc", "a" * 64, "A.b_c-9"])
def test_a_request_id_is_taken_over(service: Service, sent: str) -> None:
    answer = service.client.get("/users/me", headers={"X-Request-ID": sent})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == sent


@pytest.mark.parametrize("sent", ["", "a" * 65, "a b", "a/b", "é"])
def test_a_strange_request_id_is_replaced(service: Service, sent: str) -> None:
    answer = service.client.get("/users/me", headers={b"X-Request-ID": sent.encode()})
    assert answer.headers["x-request-id"] != sent


def test_a_preflight_names_what_may_be_sent(service: Service) -> None:
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "PATCH"}
    headers = "authorization,content-type,if-none-match,last-event-id,x-request-id"
    asked["Access-Control-Request-Headers"] = headers
    assert service.client.options("/users/me", headers=asked).status_code == 200
    with httpx.Client() as plain:  # Starlette refuses in its own words
        for wrong in (
            {"Origin": "http://evil.example"},
            {"Access-Control-Request-Headers": "x-evil"},
        ):
            refused = plain.options(f"{service.address}/api/v1/users/me", headers=asked | wrong)
            assert refused.status_code == 400
            assert "x-request-id" in refused.headers


def test_any_origin_is_allowed_without_credentials(start: Start) -> None:
    service = start(CORS_ORIGINS="*")
    answer = service.client.get("/users/me", headers={"Origin": "http://any.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


def test_behind_a_path_of_a_proxy_all_is_as_without(start: Start) -> None:
    service = start(command=[*UVICORN, "--root-path", "/app"], AUTH_RATE_LIMIT="1/hour")
    assert service.client.get("/posts").headers["x-cache"] == "miss"
    assert service.client.get("/posts").headers["x-cache"] == "hit"
    assert register(service).headers["ratelimit"] == '"auth";r=0;t=3600'
    assert register(service).status_code == 429


def test_a_body_of_1_mib_is_read(service: Service) -> None:
    body = b'{"email": 1}'.ljust(2**20)
    assert service.client.post("/auth/register", content=body, headers=JSON).status_code == 422


@pytest.mark.skipif(not Path("/proc").exists(), reason="there is no /proc to read memory from")
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_100_mb_are_refused_without_being_kept(service: Service, announced: bool) -> None:
    def memory() -> int:
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    before = memory()
    headers = JSON | ({"content-length": str(100 * 2**20)} if announced else {})
    answer = service.client.post("/auth/register", content=chunks(), headers=headers)
    assert answer.json()["error_code"] == "BODY_TOO_LARGE"
    assert memory() - before < 20_000


@pytest.mark.parametrize(
    "frame",
    [b"\x8a\x80\0\0\0\0", b"\x89\x80\0\0\0\0", b"\x80\x80\0\0\0\0"],
    ids=["pong", "ping", "empty"],
)
def test_a_flood_of_frames_is_cut_off_and_delays_nobody(service: Service, frame: bytes) -> None:
    first = b"\x01\x80\0\0\0\0" if frame[0] == 0x80 else b""  # a text in endless pieces
    with raw_room(service, 1) as flooder:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            flooder.sendall(first + frame * 200_000)
            flooder.settimeout(2)
            while flooder.recv(10_000):
                pass
        assert service.client.get(f"{service.address}/health").status_code == 200
        assert time.monotonic() - began < 2


@pytest.mark.skipif(not FULL, reason="it takes half a minute to fill the buffers of a connection")
def test_a_stream_that_never_reads_is_cut_off(start: Start) -> None:
    service = start()
    author = sign_up(service)
    post = publish(author)["id"]
    with socket.socket() as deaf, Listener(service) as listener:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_024)
        deaf.connect(("127.0.0.1", service.port))
        deaf.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        until, count = time.monotonic() + 25, 0
        while time.monotonic() < until:
            comment(author, post, "\u0001" * 500)
            count += 1
        assert len(listener.wait(count)) == count
        began = time.monotonic()
        assert service.stop() in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 2  # nothing is waited for
    assert "ERROR" not in service.log.read_text()


# --- Assembly -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(10 if FULL else 1))
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_four_processes_that_start_on_one_empty_database_all_serve(
    tmp_path: Path, database: str, turn: int
) -> None:
    settings: Any = {"DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/app.db"}
    settings |= {"SECRET_KEY": "unset"}  # the first of them makes it
    if database == "postgresql":
        settings = {"DATABASE_URL": new_postgres_database()}
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    services = at_once(4, lambda number: Service(folders[number], **settings))
    admin = sign_in_admin(services[0])
    for service in services:
        assert service.as_(admin.tokens["access_token"]).get("/users").json()["total"] == 1
        assert service.stop() in (0, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("sqlite+aiosqlite:////nowhere/app.db", {"SECRET_KEY": "unset"}),
        ("sqlite+aiosqlite:////nowhere/app.db", {}),
        ("sqlite+aiosqlite:////dev/null", {}),
        ("postgresql+asyncpg://u:hunter2@127.0.0.1:1/x", {}),
        ("sqlite+aiosqlite:////dev/null", {"WORKERS": "2"}),
    ],
    ids=["no folder for the key", "no folder", "no database", "no server", "two workers"],
)
def test_a_database_that_cannot_be_used_ends_the_start_with_one_clear_line(
    tmp_path: Path, url: str, settings: dict[str, str]
) -> None:
    if "postgresql" in url:
        pytest.importorskip("asyncpg")
    status, said = run_main(tmp_path, **{"DATABASE_URL": url, "SECRET_KEY": KEY} | settings)
    assert status == 3
    assert "DATABASE_URL: the database or the key" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert "hunter2" not in said


@pytest.mark.skipif(not POSTGRES, reason="TEST_DATABASE_URL is not set")
def test_on_postgresql_one_process_at_a_time_makes_the_tables(tmp_path: Path) -> None:
    script = """
import asyncpg

other = await asyncpg.connect(main.settings.database_url.replace("+asyncpg", ""))
async with other.transaction():
    await other.execute("SELECT pg_advisory_xact_lock(7361)")
    making = asyncio.create_task(main.prepare_database())
    print((await asyncio.wait([making], timeout=1))[0])
await making
await other.close()
"""
    said = run_beside_main(script, tmp_path, DATABASE_URL=new_postgres_database())
    assert said == "set()\n"


def test_a_database_that_lacks_a_column_is_refused_and_left_alone(start: Start) -> None:
    service = start()
    service.stop()
    service.sql("ALTER TABLE post DROP COLUMN content")
    service.sql("DROP TABLE session")
    before = service.sql("SELECT sql FROM sqlite_master")
    status, said = run_main(service.folder, **service.settings)
    assert status == 3
    assert "no such column: post.content" in said
    assert "Traceback" not in said
    assert service.sql("SELECT sql FROM sqlite_master") == before


def test_the_first_superuser_is_made_admin_once_and_then_left_alone(start: Start) -> None:
    service = start(FIRST_SUPERUSER_EMAIL="unset", FIRST_SUPERUSER_PASSWORD="unset")
    person = sign_up(service, email=ADMIN["username"])
    service.sql("UPDATE user SET is_active = false")
    service.stop()
    named = {"FIRST_SUPERUSER_EMAIL": "Admin@Example.com"}
    service.settings |= named | {"FIRST_SUPERUSER_PASSWORD": ADMIN["password"]}
    service.start()
    assert service.as_(person.tokens["access_token"]).get("/users/me").status_code == 401
    assert log_in(service, ADMIN["username"], PASSWORD).status_code == 401
    admin = sign_in_admin(service)
    assert (admin.id, admin.api.get("/users/me").json()["role"]) == (person.id, "admin")
    service.stop()
    service.settings |= {"FIRST_SUPERUSER_PASSWORD": "not the admin's password"}
    service.start()
    assert service.as_(admin.tokens["access_token"]).get("/users/me").status_code == 200
    assert sign_in_admin(service).id == person.id


def test_the_banner_says_where_all_is_and_who_is_admin(start: Start) -> None:
    everywhere = {"HOST": "0.0.0.0"}  # noqa: S104
    service = start(DATABASE_URL="unset", FIRST_SUPERUSER_EMAIL="Boss@b.co", **everywhere)
    lines = banner_of(service)
    assert lines == {
        "Nutshell": f"http://localhost:{service.port}",
        "docs": f"http://localhost:{service.port}/docs",
        "health": f"http://localhost:{service.port}/health",
        "data": str((service.folder / "app.db").resolve()),
        "admin": "boss@b.co",
        "try": f"curl http://localhost:{service.port}/api/v1/posts",
    }
    for name in ("Nutshell", "docs", "health"):
        assert service.client.get(lines[name]).status_code == 200
    assert (service.folder / "app.db").exists()
    ran = subprocess.run(shlex.split(lines["try"]), capture_output=True, check=True)
    assert json.loads(ran.stdout)["items"] == []


def test_the_banner_tells_how_to_name_an_admin(start: Start) -> None:
    service = start(FIRST_SUPERUSER_EMAIL="unset", FIRST_SUPERUSER_PASSWORD="unset")
    told = "none yet: set FIRST_SUPERUSER_EMAIL and FIRST_SUPERUSER_PASSWORD"
    assert banner_of(service)["admin"] == told


def test_the_banner_writes_an_ipv6_address_as_a_browser_takes_it(tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    settings = environment({"HOST": "::1", "PORT": str(free_port())})
    log = tmp_path / "log"
    running = Forked(MAIN[1:], tmp_path, settings, log, log)
    address = f"http://[::1]:{settings['PORT']}"
    eventually(lambda: log.exists() and f"running on {address}" in log.read_text(), 20)
    assert f"Nutshell  {address}\n" in log.read_text()
    assert httpx.get(f"{address}/health", verify=NO_TLS).status_code == 200
    running.terminate()
    running.wait(10)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_terminal_that_is_gone_stops_nobody(start: Start) -> None:
    service = start(command=["sh", "-c", 'exec "$@" >/dev/full', "sh", *MAIN])
    assert service.client.get("/posts").status_code == 200


def test_the_banner_hides_the_password_of_postgresql(start: Start) -> None:
    service = start(database="postgresql")
    server = urlsplit(service.settings["DATABASE_URL"])
    assert banner_of(service)["data"] == f"{server.hostname}, database {server.path[1:]}"


@pytest.mark.aside
def test_the_banner_is_printed_once_by_several_workers_and_never_in_production(
    start: Start,
) -> None:
    assert banner_of(start(WORKERS="2"))["admin"] == ADMIN["username"]
    assert banner_of(start(command=MAIN, **PRODUCTION)) == {}
    assert banner_of(start(command=UVICORN)) == {}  # which does not tell where it listens


@pytest.mark.slow
def test_sigterm_lets_a_slow_request_finish_and_ends_a_stuck_one(
    start: Start, workers: dict[str, str]
) -> None:
    service = start(BCRYPT_ROUNDS="13", **workers)
    body = json.dumps({"email": "slow@example.com", "password": PASSWORD}).encode()
    head = b"POST /api/v1/auth/register HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", service.port)
        connections = (stack.enter_context(socket.create_connection(address)) for _ in range(3))
        slow, stuck, _idle = connections
        slow.sendall(head + body)
        stuck.sendall(head + body[:5])
        for _ in range(20):  # once these are answered, they were read, whichever worker has them
            service.client.get(f"{service.address}/health", headers={"Connection": "close"})
        began = time.monotonic()
        service.process.terminate()
        assert slow.recv(1000).startswith(b"HTTP/1.1 201 ")
        assert stuck.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert service.process.wait(10) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < (10 if workers else 7)  # 5 s, on an idle machine
    assert service.sql("SELECT count(*) FROM user WHERE email='slow@example.com'") == [(1,)]
    assert "Traceback" not in service.log.read_text()


@pytest.mark.slow
def test_sigterm_ends_rooms_and_streams_at_once(start: Start, workers: dict[str, str]) -> None:
    service = start(**workers)
    person = sign_up(service)
    post = publish(person)["id"]
    with (
        Listener(service) as listener,
        in_room(person, post) as room,
        room_of(service, post) as stranger,
    ):
        comment(person, post)
        listener.wait(1)
        began = time.monotonic()
        assert service.stop() in (0, -signal.SIGTERM)
        assert time.monotonic() - began < (7 if workers else 2)
        assert listener.ended()
        assert close_code(room) == 1012
        assert close_code(stranger) == 1012
    assert "Traceback" not in service.log.read_text()
    assert "ERROR" not in service.log.read_text()


# --- README ---------------------------------------------------------------------------------------
# What it shows works, and what it says of main.py is true.


def in_readme(kind: str) -> list[str]:
    """The blocks of README that are of this kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def stored_names(node: ast.AST) -> set[str]:
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return {n.id for n in names} | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def early_names(node: ast.AST, defined: dict[str, int], local: set[str]) -> Iterator[str]:
    """Names read above the line that defines them, where no name of the function hides them."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
        local = local | stored_names(node)
    if (
        isinstance(node, ast.Name)
        and node.id not in local
        and node.lineno < defined.get(node.id, 0)
    ):
        yield f"{node.id} in line {node.lineno}"
    for child in ast.iter_child_nodes(node):
        yield from early_names(child, defined, local)


def test_no_name_is_used_above_its_definition() -> None:
    """Inside functions too: a reader meets the use before the definition."""
    tree = ast.parse((HERE / "main.py").read_text())
    defined: dict[str, int] = {}
    for part in tree.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.setdefault(part.name, part.lineno)
        else:
            for name in stored_names(part):
                defined.setdefault(name, part.lineno)
    assert len(defined) > 50
    assert list(early_names(tree, defined, set())) == []


BLOCKS = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.TryStar | ast.FunctionDef
BLOCKS |= ast.AsyncFor | ast.AsyncWith | ast.AsyncFunctionDef


def depth(node: ast.AST) -> int:
    """How deep blocks stand in blocks; an elif stands beside its if."""
    beside = node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 else []
    elifs = [child for child in beside if isinstance(child, ast.If)]
    inside = [depth(child) - (child in elifs) for child in ast.iter_child_nodes(node)]
    return isinstance(node, BLOCKS) + max(inside, default=0)


def test_functions_are_short_and_nest_no_deeper_than_two() -> None:
    tree = ast.walk(ast.parse((HERE / "main.py").read_text()))
    functions = [n for n in tree if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(functions) > 100
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 30] == []
    assert [f.name for f in functions if depth(f) > 1 + 2] == []


def test_readme_tells_on_which_lines_each_section_stands() -> None:
    lines = (HERE / "main.py").read_text().splitlines()
    banners = {
        found[1]: number
        for number, line in enumerate(lines, 1)
        if (found := re.fullmatch("# --- (.+?) -+", line))
    }
    table = {}
    for part, (first, end) in zip(
        banners, pairwise([*banners.values(), len(lines) + 1]), strict=True
    ):
        table[part] = f"[{first}–{end - 1}](main.py#L{first}-L{end - 1})"
    shown = README.read_text().partition("## Read it")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([A-Z].*?) \| (.*?) \| \w", shown, re.MULTILINE))
    assert rows == {name: lines.rstrip() for name, lines in table.items()}, table
    (map_of_parts,) = re.findall(r'"""(.+?)"""', "\n".join(lines), re.DOTALL)[:1]
    for part in banners:
        assert f"    {part.partition(':')[0]}" in map_of_parts


def pinned() -> set[str]:
    """What main.py needs: in requirements.txt all that stands above the tests."""
    return set((HERE / "requirements.txt").read_text().partition("\n\n# tests")[0].splitlines())


def test_main_py_names_the_packages_of_requirements_txt() -> None:
    """The metadata that `uv run` reads, found and parsed as PEP 723 says."""
    block = r"^# /// (\w+)\n((?:#(?:| .*)\n)+?)# ///$"
    ((kind, lines),) = re.findall(block, (HERE / "main.py").read_text(), re.MULTILINE)
    script = tomllib.loads("".join(line[2:] for line in lines.splitlines(keepends=True)))
    assert kind == "script"
    assert script["requires-python"] == ">=3.11"
    assert set(script["dependencies"]) == pinned()
    assert len(script["dependencies"]) == len(pinned())


@pytest.mark.aside
def test_uv_runs_a_lone_main_py(tmp_path: Path) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not uv or "TEST_NETWORK" not in os.environ:
        pytest.skip("uv is not installed, or TEST_NETWORK is not set")
    assert "DEMO=true uv run main.py" in README.read_text()
    shutil.copy(HERE / "main.py", tmp_path)
    service = Service(tmp_path, command=[uv, "run", "--python", sys.executable, "main.py"], **DEMO)
    assert service.client.get("/posts").json()["total"] == 12
    assert service.stop() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def test_the_tour_in_readme_works_as_shown(start: Start) -> None:
    service = start(FIRST_SUPERUSER_EMAIL="unset", FIRST_SUPERUSER_PASSWORD="unset")
    blocks = in_readme("console")
    (watched,) = (block for block in blocks if "curl -N" in block)
    tour = "".join(block for block in blocks if block != watched)
    steps = re.findall(r"^\$ (.*?(?:\\\n.*?)*)\n((?:(?!\$ ).*\n)*)", tour, re.MULTILINE)
    assert len(steps) >= 10
    script = "".join(f"{command}\necho; echo ----\n" for command, _ in steps)

    def plain(text: str) -> str:
        text = re.sub(r"20\d\d-[\d:.T-]+Z", "TIME", text)
        text = re.sub(r'"ey[^"]*"', '"TOKEN"', text)
        text = re.sub(r"^id: [0-9a-f]{8}-", "id: RUN-", text, flags=re.MULTILINE)
        return re.sub(r'"[0-9a-f]{16}"', '"ID"', text).strip()

    def here(command: str) -> list[str]:
        return ["bash", "-euc", command.replace("http://localhost:8000", service.address)]

    watching, events = watched.removeprefix("$ ").split("\n", 1)
    headers = service.folder / "headers"
    command = here(f"exec {watching} -s -D {headers}")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watch:
        eventually(lambda: headers.exists() and headers.read_text().endswith("\n\n"))
        ran = subprocess.run(here(script), capture_output=True, text=True, timeout=30)
        service.stop()
        seen = watch.communicate(timeout=5)[0].decode()
    printed = ran.stdout.split("----\n")
    assert len(printed) == len(steps) + 1, ran.stderr
    for (command, shown), got in zip(steps, printed, strict=False):
        assert plain(got) == plain(shown), command
    assert plain(seen) == plain(events)


def exercises() -> list[tuple[str, str]]:
    """The test and the change of each, as the workshop in README shows them."""
    tests = [text for text in in_readme("python") if text.startswith("def test_")]
    return list(zip(tests, in_readme("diff"), strict=True))


def changed(program: str, diff: str) -> str:
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -").rstrip("\n")
        after = "".join(line[1:] for line in lines if line[0] in " +").rstrip("\n")
        assert program.count(before) == 1, before
        program = program.replace(before, after)
    return program


@pytest.mark.aside
@pytest.mark.parametrize("solved", [False, True], ids=["before the change", "after it"])
def test_the_exercises_of_the_workshop_pass(tmp_path: Path, solved: bool) -> None:
    assert len(exercises()) == 5
    program = (HERE / "main.py").read_text()
    for _, diff in exercises():
        program = changed(program, diff) if solved else program
    (tmp_path / "main.py").write_text(program)
    tests = "\n\n".join(test for test, _ in exercises())
    (tmp_path / "test_main.py").write_text(f"{Path(__file__).read_text()}\n\n{tests}")
    shutil.copy(HERE / ".pytest.ini", tmp_path)
    names = re.findall(r"def (test_\w+)", tests)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", " or ".join(names)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("TEST_")}
    ran = subprocess.run([*command, "-rA"], cwd=tmp_path, env=alone, capture_output=True, text=True)
    verdict = "PASSED" if solved else "FAILED"
    assert all(f"{verdict} test_main.py::{name}[sqlite]" in ran.stdout for name in names), (
        ran.stdout
    )


def test_every_setting_stands_in_readme_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `?([A-Z_]+)`? \| (.*?) \|", README.read_text(), re.MULTILINE))
    fields = {name.upper(): field for name, field in main.Settings.model_fields.items()}
    assert rows.keys() == fields.keys()
    for name, shown in rows.items():
        default = fields[name].default
        plain = str(default).lower() if isinstance(default, bool) else default
        expected = "none" if default in (None, "") else f"`{plain}`"
        assert name == "SECRET_KEY" or shown == expected


@pytest.mark.slow
@pytest.mark.parametrize("extras", [[], ["asyncpg", "redis"]], ids=["alone", "with extras"])
def test_the_compose_files_in_readme_start(start: Start, extras: Any) -> None:
    """Their settings at least: no engine runs here that would start the containers."""
    (shown,) = (text for text in in_readme("yaml") if ("DATABASE_URL" in text) == bool(extras))
    services = yaml.safe_load(shown)["services"]
    nutshell, app = services["nutshell"], services["app"]
    assert nutshell["read_only"] is True
    assert app["depends_on"] == {"nutshell": {"condition": "service_healthy"}}
    secrets = {"SECRET_KEY": KEY, "FIRST_SUPERUSER_EMAIL": ADMIN["username"]}
    secrets |= {"FIRST_SUPERUSER_PASSWORD": ADMIN["password"], "POSTGRES_PASSWORD": "x"}
    settings = {
        name: re.sub(r"\$\{(\w+):\?.*?\}", lambda found: secrets[found[1]], str(value))
        for name, value in nutshell["environment"].items()
    }
    assert settings.keys() <= {name.upper() for name in main.Settings.model_fields}
    if extras:
        assert settings["REDIS_URL"] == "redis://redis:6379/0"
        assert settings["DATABASE_URL"] == "postgresql+asyncpg://postgres:x@database/postgres"
        settings |= {"REDIS_URL": new_redis(), "DATABASE_URL": new_postgres_database()}
    service = start(**settings)
    assert sign_in_admin(service).api.get("/users").json()["total"] == 1
    assert register(service).status_code == 403


def shown_proxy(kind: str, service: Service, app: int) -> str:
    """What README shows for it, with the ports that are there."""
    (shown,) = in_readme(kind)
    shown = shown.replace("nutshell:8000", f"127.0.0.1:{service.port}")
    return shown.replace("app:3000", f"127.0.0.1:{app}")


@contextlib.contextmanager
def running(folder: Path, *command: str) -> Iterator[None]:
    home = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command, env=home, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def check_guard(service: Service, front: int) -> None:
    """What a proxy does for the app behind it, which answers with whom it was told of."""
    url = f"http://127.0.0.1:{front}/anything?x=1"
    person, admin = sign_up(service), sign_in_admin(service)
    with httpx.Client(verify=NO_TLS) as client:

        def begun() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get(url).status_code == 401
            return False

        eventually(begun)
        bearer = {"Authorization": person.api.headers["Authorization"]}
        lies = {"Remote-User": "1", "Remote-Groups": "admin", "Remote-Email": "a@b.co"}
        lies |= {"Remote_User": "1"}  # which some apps do not tell from the other
        mine = client.post(url, headers=bearer | lies, content="x" * 1000)
        assert (mine.status_code, mine.text.strip()) == (200, f"{person.id} user {person.email}")
        assert client.get(url, headers=lies).status_code == 401
        form = {"username": person.email, "password": PASSWORD}
        login = client.post(url.replace("/anything?x=1", "/api/v1/auth/login"), data=form)
        new = {"Authorization": f"Bearer {login.json()['access_token']}"}
        assert client.get(url, headers=new).status_code == 200
        assert client.get(url, headers=lies | {"Authorization": "Bearer bad"}).status_code == 401
        for path in ("/admin/anything", "/admin"):
            only_admins = url.replace("/anything", path)
            assert client.get(only_admins, headers=bearer | lies).status_code == 403
        bearer = {"Authorization": admin.api.headers["Authorization"]}
        told = client.get(only_admins, headers=bearer).text.strip()
        assert told == f"{admin.id} admin {admin.email}"


def test_nginx_guards_an_app_as_readme_shows(service: Service, tmp_path: Path) -> None:
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    app, front = free_port(), free_port()
    shown = shown_proxy("nginx", service, app).replace("listen 80", f"listen 127.0.0.1:{front}")
    told = "'$http_remote_user $http_remote_groups $http_remote_email'"
    guarded = f"server {{ listen 127.0.0.1:{app}; location / {{ return 200 {told}; }} }}"
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors; events {{}}"
        f"http {{ access_log off; {folders} {shown} {guarded} }}"
    )
    with running(tmp_path, "nginx", "-c", str(config), "-e", str(tmp_path / "errors")):
        check_guard(service, front)


def test_caddy_guards_an_app_as_readme_shows(service: Service, tmp_path: Path) -> None:
    if not shutil.which("caddy"):
        pytest.skip("caddy is not installed")
    app, front = free_port(), free_port()
    shown = shown_proxy("caddyfile", service, app)
    shown = shown.replace(":80 {", f"http://127.0.0.1:{front} {{")
    told = "{header.Remote-User} {header.Remote-Groups} {header.Remote-Email} {header.Remote_User}"
    guarded = f'http://127.0.0.1:{app} {{\n\trespond "{told}"\n}}'
    config = tmp_path / "Caddyfile"
    config.write_text(f"{{\n\tadmin off\n\tauto_https off\n}}\n{shown}\n{guarded}\n")
    with running(tmp_path, "caddy", "run", "--config", str(config), "--adapter", "caddyfile"):
        check_guard(service, front)


def test_an_app_may_check_tokens_by_itself_as_readme_shows(service: Service) -> None:
    names: dict[str, Any] = {}
    (shown,) = (text for text in in_readme("python") if "user_id" in text)
    exec(shown, names)  # noqa: S102
    user_id = names["user_id"]
    person = sign_up(service)
    assert user_id(person.tokens["access_token"], KEY) == person.id
    person.api.post("/auth/logout")
    assert user_id(person.tokens["access_token"], KEY) == person.id  # as README warns
    claims = jwt.get_unverified_claims(person.tokens["access_token"])
    for short in ("", "x" * 31):
        with pytest.raises(ValueError, match="32 bytes"):
            user_id(jwt.encode(claims, short, algorithm="HS256"), short)
    forged = forgeries(person)
    for wrong in ("sid of a strange kind", "sub of a strange kind", "junk behind it"):
        del forged[wrong]  # only the service itself looks so closely
    forged["a claim missing"] = tuple(forge(person, drop=name) for name in ("exp", "sub", "type"))
    for token in (token for tokens in forged.values() for token in tokens):
        with pytest.raises(Exception):  # noqa: B017, PT011
            print(token, user_id(token, KEY))


@pytest.mark.aside
def test_a_backup_made_under_load_is_restored_as_readme_shows(start: Start) -> None:
    service = start(SECRET_KEY="unset", command=MAIN)
    backup, restore = (text for text in in_readme("sh") if "copy.db" in text)
    run = partial(subprocess.run, check=True, cwd=service.folder)
    with Load(service) as load:
        load.more(100)
        known = service.sql("SELECT max(id) FROM post")[0][0]
        run(["sh", "-euc", backup])
        load.more(100)
    later = service.sql("SELECT max(id) FROM post")[0][0]
    token = load.author.tokens["access_token"]
    service.crash()  # what it leaves beside the file must not come back
    (service.folder / "app.db.key").unlink()
    run(["sh", "-euc", restore])
    service.start()
    assert service.sql("PRAGMA integrity_check") == [("ok",)]
    assert known <= service.sql("SELECT max(id) FROM post")[0][0] < later
    assert service.as_(token).get("/users/me").status_code == 200


@pytest.mark.aside
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_column_is_added_as_readme_shows(start: Start, tmp_path: Path, database: str) -> None:
    pytest.importorskip("alembic")
    service = start(database=database)
    person = sign_up(service)
    before, age, after = (HERE / "main.py").read_text().partition("    age: Age = None\n")
    (tmp_path / "main.py").write_text(f"{before}{age}    nickname: Name = None\n{after}")
    service.stop()
    service.script = str(tmp_path / "main.py")
    with pytest.raises(AssertionError, match="nickname"):
        service.start()
    first, then = (text for text in in_readme("sh") if "alembic" in text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(service.settings) | {"PATH": path}
    script = first.removeprefix("pip install alembic\n") + then
    done = subprocess.run(
        ["sh", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    service.start()
    named = service.as_(person.tokens["access_token"]).patch("/users/me", json={"nickname": "Bee"})
    assert named.json()["nickname"] == "Bee"
    check = ["alembic", "check"]
    assert subprocess.run(check, cwd=tmp_path, env=env, capture_output=True).returncode == 0


def rate(service: Service, path: str, *options: str, connections: int = 16) -> float:
    """Requests in a second, of which none may be refused; wrk asks."""
    url = f"{service.address}{path}"
    command = ["wrk", "-t1", f"-c{connections}", "-d3s", *options, url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in said
    return float(said.partition("Requests/sec:")[2].split()[0])


def test_two_workers_against_one(start: Start) -> None:
    """Prints the table in README, with -s."""
    if not FULL or not shutil.which("wrk"):
        pytest.skip("FULL=1 is not set, or wrk is not installed")
    usual = {"LOG_LEVEL": "warning", "RATE_LIMIT": "1000000/second"}
    shared = {"DATABASE_URL": new_postgres_database(), "REDIS_URL": new_redis(), "WORKERS": "2"}
    services = {
        "one, SQLite": start(**usual),
        "one, SQLite, CACHE_SECONDS=0": start(**usual, CACHE_SECONDS="0"),
        "two, PostgreSQL, Redis": start(**usual, **shared),
    }
    with_redis = start(**usual, REDIS_URL=new_redis())
    rates: dict[str, dict[str, list[float]]] = {}
    for name, service in services.items():
        author = sign_in_admin(service)
        assert [publish(author)["id"] for _ in range(50)][0] == 1
        script = service.folder / "create.lua"
        headers = author.api.headers | {"Content-Type": "application/json"}
        lines = [f'wrk.headers["{key}"] = "{value}"' for key, value in headers.items()]
        lines += ['wrk.method = "POST"', f"wrk.body = '{json.dumps(A_POST)}'"]
        script.write_text("\n".join(lines))
        rates[name] = {"list": [], "one post": [], "create": []}
    for _ in range(3):
        for name, service in services.items():
            rates[name]["list"].append(rate(service, "/api/v1/posts"))
            rates[name]["one post"].append(rate(service, "/api/v1/posts/1"))
            create = f"-s{service.folder}/create.lua"
            rates[name]["create"].append(rate(service, "/api/v1/posts", create))
    print()
    for name, found in rates.items():
        first = rates["one, SQLite"]
        medians = {row: statistics.median(found[row]) for row in found}
        ratios = {row: medians[row] / statistics.median(first[row]) for row in found}
        print(name, *(f"| {row} {medians[row]:.0f}/s {ratios[row]:.2f}" for row in found))
    alone = services["one, SQLite, CACHE_SECONDS=0"]
    times = [
        [1_000 / rate(service, "/", connections=1) for _ in range(3)]
        for service in (alone, with_redis)
    ]
    added = statistics.median(times[1]) - statistics.median(times[0])
    print(f"Redis adds {added:.2f} ms to each request")
    assert added < 5


def test_nothing_secret_and_no_email_is_in_the_log(service: Service) -> None:
    """Last, since the shared server ran at LOG_LEVEL=debug through all the tests above."""
    person = sign_up(service)
    person.api.get("/users?page=1&note=hunter3")
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert service.client.post("/auth/login", content=b"--xhunter5", headers=broken).is_client_error
    log = re.sub(r"^admin .*", "", service.log_so_far(), flags=re.MULTILINE)  # of the banner
    assert "oundary" not in log  # what python_multipart says of it
    assert "SELECT" in log
    assert "INSERT" in log
    for secret in SECRETS | {person.email, "@example.com", "$2b$", "Bearer ey", "hunter3"}:
        assert secret not in log
