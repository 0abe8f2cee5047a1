"""What Nutshell promises, and an example of how to test FastAPI.

One server runs in a thread of this process, with a database in a temporary folder. Tests talk to it
over HTTP, as any client does; constants of main are changed instead of waited for.
"""

import asyncio
import atexit
import json
import os
import re
import shutil
import socket
import socketserver
import sqlite3
import ssl
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from email import message_from_bytes, policy
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import pytest
import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from jose import jws, jwt
from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

FOLDER = tempfile.mkdtemp(prefix="nutshell-test-")
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)  # also when main.py has an error
ADMIN_EMAIL = "admin@example.com"
PASSWORD = "correct-horse"
NEW_PASSWORD = "battery-staple"
SETTINGS = {
    "DATABASE_URL": f"sqlite+aiosqlite:///{FOLDER}/test.db",
    "BCRYPT_ROUNDS": "4",  # fast, and good for tests alone
    "RATE_LIMIT": "1000000/minute",
    "AUTH_RATE_LIMIT": "1000000/minute",
    "FIRST_SUPERUSER_EMAIL": ADMIN_EMAIL,
    "FIRST_SUPERUSER_PASSWORD": PASSWORD,
    "ADMIN_EMAIL": "editor@example.com",
}
if "TEST_DATABASE_URL" in os.environ:  # the same promises on PostgreSQL with Redis
    SETTINGS["DATABASE_URL"] = os.environ["TEST_DATABASE_URL"]
    SETTINGS["REDIS_URL"] = os.environ["TEST_REDIS_URL"]
    SETTINGS["SECRET_KEY"] = "a key of at least 32 bytes for tests"
os.environ.update(SETTINGS)

import main  # noqa: E402  main reads its settings when it is imported

# --- Helpers --------------------------------------------------------------------------------------

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would read all certificates each time
numbers = count(1)
open_clients = ExitStack()
on_sqlite = main.settings.sqlite_file is not None
sqlite_only = pytest.mark.skipif(not on_sqlite, reason="it is about SQLite, or about its memory")
ORIGIN = {"Origin": "http://localhost:3000"}
PREFLIGHT = ORIGIN | {"Access-Control-Request-Method": "PATCH"}
JSON = {"Content-Type": "application/json"}
POST = {"title": "Bees", "content": "They hum."}
PRODUCTION = {"ENVIRONMENT": "production", "SECRET_KEY": "of-production-at-least-32-bytes-long"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SETTINGS}


def wait_until(condition, seconds=5):
    """Returns what the condition returns, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
    return found


def at_once(number, work):
    """Calls work(0), work(1), … in threads at the same time, and returns their results."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(work, range(number)))


@contextmanager
def hold(monkeypatch, name, call, *args):
    """Makes a call that waits, before this function of main returns, for the end of the block."""
    function = getattr(main, name)
    begun, may_return = threading.Event(), threading.Event()

    async def wait_and_return(*args):
        result = await function(*args)
        monkeypatch.setattr(main, name, function)
        begun.set()
        await asyncio.to_thread(may_return.wait, 5)
        return result

    monkeypatch.setattr(main, name, wait_and_return)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, *args)
        assert begun.wait(5)
        yield future
        may_return.set()


@pytest.fixture(scope="session")
def client():
    """Calls a server that is as `python main.py` starts it."""
    options = {"access_log": False, "log_config": None, "ws_max_size": 64 * 1024}
    config = uvicorn.Config(main.app, port=0, timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10) as client:
        yield client
    open_clients.close()
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def url(client):
    return str(client.base_url).removesuffix("/api/v1/")


def try_login(client, email, password=PASSWORD):  # other fields of OAuth2 are ignored
    form = {"username": email, "password": password, "grant_type": "password", "client_id": "x"}
    return client.post("/auth/login", data=form)


def log_in(client, email, password=PASSWORD):
    answer = try_login(client, email, password)
    assert answer.status_code == 200, answer.text
    return answer.json()


def as_person(client, email, password=PASSWORD):
    """Signs in an existing user. Their `api` is a client that sends the access token."""
    tokens = log_in(client, email, password)
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    api = httpx.Client(base_url=client.base_url, headers=headers, timeout=10, verify=NO_TLS)
    open_clients.enter_context(api)
    user_id = int(jwt.get_unverified_claims(tokens["access_token"])["sub"])
    return SimpleNamespace(id=user_id, email=email, api=api, tokens=tokens)


def sign_up(client, **fields):
    body = {"email": f"person{next(numbers)}@example.com", "password": PASSWORD} | fields
    answer = client.post("/auth/register", json=body)
    assert answer.status_code == 201, answer.text
    return as_person(client, body["email"].lower(), body["password"])


@pytest.fixture
def admin(client):
    return as_person(client, ADMIN_EMAIL)


@pytest.fixture
def ann(client):
    return sign_up(client, first_name="Ann", last_name="Lee")


@pytest.fixture
def ben(client):
    return sign_up(client, first_name="Ben")


def write_post(author, **fields):
    """Creates a post, published unless the fields say otherwise."""
    answer = author.api.post("/posts", json=POST | {"is_published": True} | fields)
    assert answer.status_code == 201, answer.text
    return answer.json()


def write_comment(author, post_id, text="Mine too."):
    answer = author.api.post(f"/posts/{post_id}/comments", json={"text": text})
    assert answer.status_code == 201, answer.text
    return answer.json()


def assert_error(answer, status, code):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"detail", "error_code", "request_id"}
    assert body["error_code"] == code
    assert body["request_id"] == answer.headers["x-request-id"]


class Listener:
    """Reads a stream in a thread: `events` is a list of (kind, data)."""

    def __init__(self, response):
        self.events = []
        self.ids = []
        self.thread = threading.Thread(target=self.read, args=[response], daemon=True)
        self.thread.start()

    def read(self, response):
        fields = {}
        with suppress(httpx.TransportError, httpx.StreamError):  # when the stream is closed
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                fields[name] = value
                if not line and "event" in fields:
                    self.ids.append(fields["id"])
                    self.events.append((fields["event"], json.loads(fields["data"])))
                    fields = {}

    def wait(self, number, seconds=5):
        """Returns the events as soon as there are so many."""
        wait_until(lambda: len(self.events) >= number, seconds)
        return self.events


@contextmanager
def listen(client, headers=None, **params):
    """`with listen(client) as listener:` collects the events that happen inside."""
    with client.stream("GET", "/events", params=params, headers=headers) as response:
        listener = Listener(response)
        try:
            yield listener
        finally:
            stream = response.extensions["network_stream"]
            with suppress(OSError):  # the server has hung up already
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)  # wakes the thread
            listener.thread.join()


def enter_room(url, person, post_id, **options):
    address = url.replace("http://", "ws://") + f"/api/v1/ws/posts/{post_id}"
    headers = {"Authorization": person.api.headers["Authorization"]}
    return connect(address, **{"additional_headers": headers} | options)


def hear(room):
    return json.loads(room.recv(5))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def run_main(folder, **settings):
    """Runs `python main.py` in an empty folder. Yields a client; `read_log()` is the output."""
    if not on_sqlite:
        pytest.skip("it would be on SQLite again")
    port = str(free_port())
    environment = ENVIRONMENT | {"PORT": port, "BCRYPT_ROUNDS": "4"} | settings
    command = [sys.executable, str(Path(main.__file__).absolute())]
    address = f"http://127.0.0.1:{port}"
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"{address}/api/v1", timeout=10, verify=NO_TLS) as client,
    ):
        try:
            wait_until(lambda: process.poll() is not None or is_healthy(address), 20)
            client.read_log = (folder / "log").read_text
            yield client
        finally:
            process.terminate()
            process.wait(10)


def is_healthy(address):
    try:
        return httpx.get(f"{address}/health", verify=NO_TLS).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def production(tmp_path_factory):
    settings = PRODUCTION | {"FORWARDED_ALLOW_IPS": "127.0.0.1", "LOG_LEVEL": "debug"}
    settings |= {"REFRESH_TOKEN_EXPIRE_DAYS": "3", "FIRST_SUPERUSER_EMAIL": ADMIN_EMAIL}
    settings["FIRST_SUPERUSER_PASSWORD"] = PASSWORD
    with run_main(tmp_path_factory.mktemp("production"), **settings) as client:
        yield client


@pytest.fixture(scope="session")
def development(tmp_path_factory):
    settings = {"HOST": "0.0.0.0", "CORS_ORIGINS": "*", "RATE_LIMIT": "20/hour"}  # noqa: S104  as in a container
    settings["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"  # where nothing listens
    with run_main(tmp_path_factory.mktemp("development"), **settings) as client:
        yield client


# --- Settings -------------------------------------------------------------------------------------


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads settings from an environment in which no others are set."""
    monkeypatch.chdir(tmp_path)
    for name in main.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)

    def load(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return main.load_settings()

    return load


BAD_SETTINGS = """
    ENVIRONMENT=staging LOG_LEVEL=loud DEMO=maybe HOST=nowhere.example PORT=abc PORT=0 PORT=65536
    DATABASE_URL=hunter2@app.db DATABASE_URL=sqlite:///hunter2.db CACHE_SECONDS=-1
    DATABASE_URL=sqlite+aiosqlite:///:memory: DATABASE_URL=postgresql+asyncpg://u:p@ss:hunter2@h/x
    REDIS_URL=http://:hunter2@localhost REDIS_URL=redis://:hunter2@localhost?db=0
    CORS_ORIGINS=http://localhost:3000/ RATE_LIMIT=lots CACHE_SECONDS=86401 AUTH_RATE_LIMIT=0/minute
    SECRET_KEY=hunter2 ACCESS_TOKEN_EXPIRE_MINUTES=525601 ACCESS_TOKEN_EXPIRE_MINUTES=0
    REFRESH_TOKEN_EXPIRE_DAYS=0 REFRESH_TOKEN_EXPIRE_DAYS=3651 BCRYPT_ROUNDS=3 BCRYPT_ROUNDS=17
    REGISTRATION=maybe FIRST_SUPERUSER_EMAIL=ann@example.com FIRST_SUPERUSER_PASSWORD=hunter2hunter2
    FIRST_SUPERUSER_PASSWORD=hunter2 PUBLIC_URL=hunter2 SMTP_URL=http://u:hunter2@localhost
    MAIL_FROM=nobody ADMIN_EMAIL=nobody SMTP_URL=smtp://u:hunter2@localhost:65536 WEB_CONCURRENCY=0
    WEB_CONCURRENCY=257 WEB_CONCURRENCY=two FORWARDED_ALLOW_IPS=10.0.0.0/8,proxy
"""

EXTREMES = {
    "PORT": ("1", "65535"), "CACHE_SECONDS": ("0", "86400"), "BCRYPT_ROUNDS": ("4", "16"),
    "ACCESS_TOKEN_EXPIRE_MINUTES": ("1", "525600"), "REFRESH_TOKEN_EXPIRE_DAYS": ("1", "3650"),
    "WEB_CONCURRENCY": ("1", "256"), "SECRET_KEY": ("x" * 32, "x" * 999),
    "RATE_LIMIT": ("1/second", "999999999/hour"), "AUTH_RATE_LIMIT": ("off", "1/minute"),
}  # fmt: skip


def test_settings_may_be_as_low_and_as_high_as_their_rules_say(load):
    for extreme in (0, 1):
        settings = load(**{name: values[extreme] for name, values in EXTREMES.items()})
        for name, values in EXTREMES.items():
            value = getattr(settings, name.lower())
            assert (value.decode() if name == "SECRET_KEY" else str(value)) == values[extreme]


@pytest.mark.parametrize("setting", BAD_SETTINGS.split())
def test_an_invalid_setting_stops_the_start_and_only_its_name_is_printed(load, capsys, setting):
    name, value = setting.split("=", 1)
    with pytest.raises(SystemExit, match="3"):
        load(**{name: value})
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line.partition(": ")[0]
    assert "hunter2" not in line
    assert len(value) < 2 or value not in line


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ENVIRONMENT": "production"}, "SECRET_KEY: "),
        (
            {"DATABASE_URL": "postgresql+asyncpg://u:hunter2@h/x"},
            "SECRET_KEY: must be set in production and with ",
        ),
        (PRODUCTION | {"CORS_ORIGINS": "*"}, "CORS_ORIGINS: "),
        (PRODUCTION | {"CORS_ORIGINS": "*", "DEMO": "true"}, "CORS_ORIGINS: .+\nDEMO: "),
        ({"DEMO": "true", "DATABASE_URL": "sqlite+aiosqlite:///hunter2"}, "DEMO: "),
        ({"DEMO": "true", "WEB_CONCURRENCY": "2"}, "DEMO: "),
        ({"DATABASE_URL": "postgresql+asyncpg://h/x"}, "DATABASE_URL: .*pip install asyncpg=="),
        ({"REDIS_URL": "redis://:hunter2@h"}, "REDIS_URL: .*pip install redis=="),
    ],
)
def test_contradicting_settings_stop_the_start(load, monkeypatch, capsys, settings, problem):
    is_installed = "pip install" not in problem
    monkeypatch.setattr(main, "find_spec", lambda name: name if is_installed else None)
    with pytest.raises(SystemExit, match="3"):
        load(**settings)
    assert re.fullmatch(rf"(?!.*hunter2){problem}.+\n", capsys.readouterr().err)


def test_lists_are_separated_by_commas_and_an_empty_value_is_not_set(load):
    lists = {"CORS_ORIGINS": "http://a.b, https://c.d,", "FORWARDED_ALLOW_IPS": "10.0.0.0/8,::1"}
    settings = load(**lists, SMTP_URL="")
    assert settings.cors_origins == ["http://a.b", "https://c.d"]
    assert [str(proxy) for proxy in settings.forwarded_allow_ips] == ["10.0.0.0/8", "::1/128"]
    assert settings.smtp_url is None


def test_settings_come_from_env_and_secret_files(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(main.Settings.model_config, "secrets_dir", tmp_path)  # for /run/secrets
    (tmp_path / "secret_key").write_text("ö" * 16)  # 32 bytes
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=of another service\nPORT=8123\n")
    settings = load()
    assert (settings.port, settings.secret_key) == (8123, ("ö" * 16).encode())
    (tmp_path / ".env").write_bytes("PORT=8123".encode("utf-16"))
    with pytest.raises(SystemExit):
        load()
    assert capsys.readouterr().err == ".env: must be UTF-8\n"
    (tmp_path / ".env").unlink()
    (tmp_path / "secret_key").write_bytes(b"hunter2\xff")
    with pytest.raises(SystemExit):
        load()
    assert re.fullmatch('(?!.*hunter2).*"secret_key".*\n', capsys.readouterr().err)


# --- Logging --------------------------------------------------------------------------------------


def find_line(client, answer):
    pattern = f".*{answer.headers['x-request-id']}.*"
    return wait_until(lambda: re.findall(pattern, client.read_log()))[-1]


def test_each_request_logs_a_line_of_text_or_json_in_production(development, production):
    line = find_line(development, development.get("/me%0A%1b[31m?page=1"))
    start = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO +GET /api/v1/me%0A%1[bB]\S+ 404 "
    assert re.match(start + r"\d+\.\d ms 127\.0\.0\.1 user=None ", line)
    ann = sign_up(production)
    answer = ann.api.get("/posts?author=Ann", headers={"X-Forwarded-For": "10.0.0.1"})
    entry = json.loads(find_line(production, answer))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", entry.pop("time"))
    assert entry.pop("message")
    assert 0 < entry.pop("ms") < 5_000
    called = {"method": "GET", "path": "/api/v1/posts", "status": 200, "user_id": ann.id}
    origin = {"client": "10.0.0.1", "request_id": answer.headers["x-request-id"]}
    assert entry == called | origin | {"level": "INFO"}
    for line in production.read_log().splitlines():  # nothing else is printed
        assert {"time", "level", "message"} <= json.loads(line).keys()


def test_a_websocket_logs_one_line_without_its_query(url, admin, caplog):
    with enter_room(url, admin, f"{write_post(admin)['id']}?token=hunter2"):
        pass
    for path in ("/nowhere", "/api/v1/ws/posts/1?token=hunter2"):
        with pytest.raises(InvalidStatus), connect(url.replace("http", "ws") + path):
            pass
    pattern = r"INFO .* WEBSOCKET /[\w/]+ (\d+) "
    wait_until(lambda: sorted(re.findall(pattern, caplog.text)) == ["101", "401", "403"])
    assert not re.search("hunter2|ERROR", caplog.text)


def test_no_secret_is_logged(production):
    ann = sign_up(production, first_name="hunter2")
    try_login(production, ann.email, "hunter2hunter2")
    production.post("/auth/register", json={"email": ann.email, "password": "hunter2"})
    production.post("/auth/register", json={"email": ann.email, "password": PASSWORD})
    production.post("/auth/refresh", data={"refresh_token": ann.tokens["refresh_token"]})
    production.get("/users/me?token=hunter2", headers={"Authorization": "Bearer hunter2"})
    write_post(ann, title="hunter2", content="hunter2")
    ann.api.patch("/users/me", json={"bio": "hunter2", "hunter2": 1})
    change = {"password": NEW_PASSWORD, "current_password": PASSWORD}
    find_line(production, ann.api.patch("/users/me", json=change))
    log = production.read_log()
    assert "SELECT" in log  # it runs with LOG_LEVEL=debug
    assert "changed at the start" not in log  # since the first superuser is new
    tokens = (ann.tokens["access_token"], ann.tokens["refresh_token"])
    for secret in (ann.email, PASSWORD, NEW_PASSWORD, "hunter2", "$2b$", "of-production", *tokens):
        assert secret not in log


# --- Errors ---------------------------------------------------------------------------------------

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
ADMIN = {"email": ADMIN_EMAIL.upper(), "password": PASSWORD}
own = APIRouter(prefix=f"{main.API}/own", include_in_schema=False)
locked, full = sqlite3.OperationalError("made up"), sqlite3.OperationalError("made up")
locked.sqlite_errorcode, full.sqlite_errorcode = sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL
RAISED = {"locked": locked, "full": full, "late": exc.TimeoutError(), "bug": FileNotFoundError()}
RAISED |= {"conflict": exc.IntegrityError("made up", {}, Exception()), "tea": HTTPException(418)}
RAISED["stale"] = StaleDataError("made up")


@own.get("/raise/{name}")
def raise_error(name: str):
    raise RAISED[name]


@own.get("/half", response_class=StreamingResponse)
def get_half():
    yield "half an answer"
    raise ExceptionGroup("of a task group", [RAISED["bug"]])


@own.get("/{role}")
async def run_sql(role: str, sql: str, reader: main.ReadSession, writer: main.WriteSession):
    return (await (writer if role == "writer" else reader).exec(sa.text(sql))).scalar()


@own.post("/promote")
async def promote(me: main.CurrentUser, request: Request):
    await request.body()
    me.role = "admin"


@own.post("/dismiss/{user_id}")
async def dismiss(user_id: int, session: main.WriteSession):
    async with session.begin():  # another way to commit
        async with session.begin_nested():
            (await session.get(main.User, user_id)).role = "user"
        session.add(main.Post(title="T", content="C", author_id=user_id))


@own.get("/write/{how}")
async def write_somehow(how: str, me: main.CurrentUser, session: main.WriteSession):
    user = await session.get(main.User, me.id)
    statement = sa.update(main.User).values(bio=how).where(main.User.id == me.id)
    if "post" in how:
        session.add(main.Post(title="T", content="C", author_id=me.id))
    if "delete" in how:
        await session.delete(user)
    if "change" in how:
        user.bio = how
    if "statement" in how:
        await session.exec(statement)
    if "text" in how:
        await session.exec(sa.text(f"UPDATE \"user\" SET bio = '{how}' WHERE id = {me.id}"))
    if "connection" in how:
        await (await session.connection()).execute(statement)
    for end in ("rollback", "commit"):
        if end in how:
            await getattr(session, end)()
    return [me.bio, user]


main.app.include_router(own)


@pytest.mark.parametrize(
    ("status", "code", "method", "path", "body"),
    [
        (400, "BAD_REQUEST", "POST", "/auth/register", "{"),
        (401, "INVALID_TOKEN", "GET", "/users/me", ""),
        (401, "INVALID_CREDENTIALS", "POST", "/auth/login", "username=x&password=y"),
        (404, "NOT_FOUND", "GET", "/nowhere", ""),
        (404, "NOT_FOUND", "GET", "/posts/", ""),
        (405, "METHOD_NOT_ALLOWED", "PUT", "/users/me", ""),
        (409, "EMAIL_TAKEN", "POST", "/auth/register", json.dumps(ADMIN)),  # in upper case
        (409, "CONFLICT", "GET", "/own/raise/conflict", ""),
        (409, "CONFLICT", "GET", "/own/raise/stale", ""),
        (413, "BODY_TOO_LARGE", "POST", "/nowhere", "x" * 300_000),
        (418, "IM_A_TEAPOT", "GET", "/own/raise/tea", ""),
        (422, "VALIDATION_ERROR", "POST", "/auth/register", "{}"),
        (500, "INTERNAL_ERROR", "GET", "/own/raise/bug", ""),
        *((503, "UNAVAILABLE", "GET", f"/own/raise/{e}", "") for e in ("locked", "full", "late")),
    ],
    ids=lambda value: str(value)[:25],
)
def test_every_error_has_the_same_shape_and_cors_headers(client, status, code, method, path, body):
    headers = ORIGIN | (FORM if path == "/auth/login" else JSON)
    answer = client.request(method, path, content=body, headers=headers)
    assert_error(answer, status, code)
    assert answer.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert ("retry-after" in answer.headers) == (status == 503)
    methods = answer.headers.get("allow", "GET, PATCH, DELETE")  # of the whole path
    assert set(methods.split(", ")) == {"GET", "PATCH", "DELETE"}


@pytest.mark.parametrize(
    ("path", "limit"), [("/own/promote", 2**18), ("/auth/login", 2**14), ("/auth/refresh", 2**14)]
)
def test_a_body_that_is_too_large_is_413(admin, path, limit):
    for body in (b"x" * (limit + 1), [b"x" * limit, b"x"]):  # of declared length, and in chunks
        assert_error(admin.api.post(path, content=body, headers=FORM), 413, "BODY_TOO_LARGE")
    assert admin.api.post(path, content=b"x" * limit, headers=FORM).status_code in (422, 500)


def test_a_bug_in_a_route_is_500_with_its_traceback_in_the_log_only(client, caplog):
    for path, cause in ("raise/bug", "FileNotFoundError"), ("reader?sql=SELECT emial", "emial"):
        assert_error(client.get(f"/own/{path}"), 500, "INTERNAL_ERROR")
        assert cause in caplog.text
    caplog.clear()
    client.get("/own/raise/locked")
    client.get("/own/raise/conflict")
    assert "the database is unavailable: made up" in caplog.text
    assert "the database refused a write: (builtins.Exception)" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_bug_in_the_middle_of_an_answer_cuts_it_off_and_is_in_the_log(client, caplog):
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/own/half")
    wait_until(lambda: "FileNotFoundError" in caplog.text)


FAULTS = {
    "sqlite_errorcode": [
        sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR_READ,
        sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
    ],
    "sqlstate": ["08006", "28P01", "3D000", "40001", "40P01", "53300", "55P03", "57014", "58030"],
}  # fmt: skip
BUGS = {
    "sqlite_errorcode": [sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT],
    "sqlstate": ["42703", "22001", "25006"],
}


@pytest.mark.parametrize(("codes", "expected"), [(FAULTS, True), (BUGS, False)])
def test_locks_lost_connections_and_full_disks_are_no_bugs(codes, expected):
    for field, values in codes.items():
        for code in values:
            error = exc.OperationalError("made up", {}, SimpleNamespace(**{field: code}))
            assert main.is_unavailable(error) == expected, code
    error = exc.OperationalError("made up", {}, Exception(), connection_invalidated=expected)
    assert main.is_unavailable(error) == expected


# --- Database -------------------------------------------------------------------------------------


@sqlite_only
def test_sqlite_is_durable_and_its_files_are_private(client):
    names = ("busy_timeout", "journal_mode", "synchronous", "query_only", "foreign_keys")
    readers = [client.get(f"/own/reader?sql=PRAGMA {name}").json() for name in names]
    writers = [client.get(f"/own/writer?sql=PRAGMA {name}").json() for name in names]
    assert readers == [5000, "wal", 2, 1, 1]
    assert writers == [5000, "wal", 2, 0, 1]
    modes = {file.name: file.stat().st_mode & 0o777 for file in Path(FOLDER).iterdir()}
    assert modes.keys() == {"test.db", "test.db-wal", "test.db-shm", "test.db.key"}
    assert os.name == "nt" or set(modes.values()) == {0o600}


def test_every_foreign_key_has_an_index():  # or deleting a user reads all posts and comments
    for table in main.SQLModel.metadata.sorted_tables:
        first_columns = {index.columns[0].name for index in table.indexes}
        assert {key.parent.name for key in table.foreign_keys} <= first_columns, table


def test_the_read_session_and_the_current_user_are_read_only(client, ann):
    sql = {"sql": "UPDATE \"user\" SET role = 'admin'"}
    assert_error(client.get("/own/reader", params=sql), 500, "INTERNAL_ERROR")
    assert_error(ann.api.post("/own/promote"), 500, "INTERNAL_ERROR")
    assert ann.api.get("/users/me").json()["role"] == "user"


@pytest.mark.parametrize("how", ["post", "delete", "change"])
def test_a_route_without_a_commit_writes_nothing_and_is_named_in_the_log(ann, caplog, how):
    before = ann.api.get("/users/me").json()
    assert ann.api.get(f"/own/write/{how}").status_code == 200
    assert "`await session.commit()` is missing" in caplog.text
    assert ann.api.get("/users/me").json() == before


SAVED = ["change", "statement", "connection", "post connection", "post statement", "post text"]


@pytest.mark.parametrize("how", [*(f"{how} commit" for how in SAVED), "change rollback", "nothing"])
def test_what_a_route_commits_is_seen_by_the_next_request(ann, caplog, how):
    before = ann.api.get("/users/me").json()
    _, row = ann.api.get(f"/own/write/{how}").json()
    assert "hashed_password" not in row  # which a table has, and no answer
    bio = how if "commit" in how else before["bio"]
    assert ann.api.get("/own/write/nothing").json()[0] == bio
    assert "is missing" not in caplog.text


@sqlite_only
def test_a_failed_commit_or_a_lock_is_503_and_stores_nothing(client, ann, url):
    failure = (main.write_engine.sync_engine, "commit", lambda _: raise_error("full"))
    sa.event.listen(*failure)
    assert_error(ann.api.post("/posts", json=POST), 503, "UNAVAILABLE")
    sa.event.remove(*failure)
    assert client.get("/own/writer?sql=PRAGMA busy_timeout=50").json() == 50
    with closing(sqlite3.connect(main.settings.sqlite_file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert_error(ann.api.post("/posts", json=POST), 503, "UNAVAILABLE")
        # It locks before it reads, or what was read would be old when it writes.
        assert_error(client.get("/own/writer?sql=SELECT 1"), 503, "UNAVAILABLE")
        assert ann.api.get("/users/me/posts").json()["total"] == 0  # readers need not wait
        assert client.get(f"{url}/health").status_code == 200
    assert client.get("/own/writer?sql=PRAGMA busy_timeout=5000").json() == 5000
    assert ann.api.post("/posts", json=POST).status_code == 201


def test_concurrent_writers_never_find_the_database_locked(ann, caplog):
    answers = at_once(80, lambda _: ann.api.post("/posts", json=POST))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {201, 503}  # 503: not within 5 s, on a machine that has much to do
    assert ann.api.get("/users/me/posts").json()["total"] == statuses.count(201) > 0
    assert "locked" not in caplog.text


# --- Schemas --------------------------------------------------------------------------------------

BAD_JSON = ["", '{"email":', "[1]", '{"age":NaN}', '{"age":-Infinity,"version":Infinity}']
BAD_JSON += ['{"age":1e999,"version":1e999}', f'{{"age":{"9" * 5_000}}}', "[" * 100_000]
BAD_JSON += [r'{"email":"\u0000","title":"\u0000","text":"\u0000","content":"\u0000"}']
BAD_JSON += [r'{"email":"\ud800","title":"\ud800","text":"\ud800","bio":"\udfff"}']
BAD_JSON += [r'{"\ud800":1}', b'{"bio":"\xff"}', json.dumps(dict.fromkeys(range(1_500)))]
PART = "--x\r\nContent-Disposition: form-data; name="
HALF_A_CHARACTER = f'{PART}"username"\r\n\r\na@b.co\r\n{PART}"password"\r\n\r\n\\ud800\r\n--x--'
BAD_BODIES = [
    *(("application/json", body) for body in BAD_JSON),
    ("application/x-www-form-urlencoded", "username=%00&password=%ff&refresh_token=%ED%A0%80"),
    ("application/x-www-form-urlencoded", "&" * 16_000),
    ("multipart/form-data", "x"),
    ("multipart/form-data; boundary=x", f'{PART}"username"; filename="f"\r\n\r\na\r\n--x--\r\n'),
    ("multipart/form-data; boundary=x; charset=unicode_escape", HALF_A_CHARACTER),
    ("text/plain", '{"email":"a@example.com"}'),
]
BAD_NUMBERS = ["0", "-1", str(2**31), str(2**63), "1.5", ""]
BAD_PARAMETERS = ["%00", "%ED%A0%80", "NaN", "-Infinity", "1e999", "9" * 5_000, "[" * 5_000]
BAD_PARAMETERS += ["%25" * 99, "_", "'%20OR%201=1--", "%0A", "%F0%9F%8C%B0"]


@pytest.fixture(scope="module")
def calls(client, url):
    """All routes of the docs, as (client of an admin, method, path, valid path, description)."""
    admin = as_person(client, ADMIN_EMAIL)
    post_id = write_post(admin)["id"]
    good = {"post_id": post_id, "comment_id": write_comment(admin, post_id)["id"], "user": "me"}
    paths = client.get(f"{url}/openapi.json").json()["paths"]
    return [
        (admin.api, method, url + path, url + path.format(**good), about)
        for path, methods in paths.items()
        for method, about in methods.items()
    ]


def test_every_route_refuses_a_bad_body(calls):
    for api, method, _, path, about in calls:
        for kind, body in BAD_BODIES if "requestBody" in about else []:
            answer = api.request(method, path, content=body, headers={"Content-Type": kind})
            assert 400 <= answer.status_code < 500, (path, body)
            assert_error(answer, answer.status_code, answer.json()["error_code"])
            assert len(answer.content) < 5_000


def test_every_route_refuses_bad_parameters(calls):
    for api, method, path, good_path, about in calls:
        for parameter in about.get("parameters", []):
            name, schema = parameter["name"], json.dumps(parameter["schema"])
            is_text = '"string"' in schema and not re.search('"(enum|const|format)"', schema)
            numbers = BAD_NUMBERS if "integer" in schema else []
            for value in BAD_PARAMETERS + numbers:
                in_path = path.replace(f"{{{name}}}", value or "x")
                bad_path = in_path if in_path != path else f"{good_path}?{name}={value}"
                with api.stream(method, bad_path) as answer:
                    if answer.status_code == 200:
                        assert is_text, bad_path
                        continue
                    answer.read()
                    assert answer.status_code == 422, f"{bad_path}: is it declared as Id?"
                    assert_error(answer, 422, "VALIDATION_ERROR")
                    assert answer.json()["detail"][0].keys() == {"loc", "msg", "type"}
                    assert len(value) < 5 or value not in answer.text


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("email", ["Ann <a@b.co>", "a" * 300 + "@b.co", "a", "a@b", "\0@b.co", None]),
        ("password", ["7777777", "x" * 129, "PassWord", "12345678", "a\0bcdefgh", None]),
        ("first_name", ["x" * 101, "a\nb", "a\0b", "a\x7fb", "a\x9fb", "\ud800", 1]),
        ("age", [0, 150, "36"]),
        ("bio", ["x" * 2_001, "a\0b"]),
        ("avatar_url", ["ftp://a.b", "//a.b", "http://" + "x" * 494]),
        ("role", ["root", None]),
        ("is_active", ["yes", None]),
        ("title", ["", " ", "x" * 256, "a\nb", "\0", "\ud800", None, 1]),
        ("content", ["", " \n", "x" * 20_001, "\0", "\ud800", None, 1]),
        ("is_published", [1]),
        ("text", ["", " \n", "x" * 501, "\0", "\ud800", None, 1]),
    ],
)
def test_an_invalid_field_is_refused_by_name(ann, admin, field, values):
    user, post = f"/users/{ann.id}", f"/posts/{write_post(ann)['id']}"
    before = [ann.api.get(path).json() for path in (user, post)]
    account = {"email": "new@example.com", "password": PASSWORD}
    calls = [("POST", "/auth/register", account), ("PATCH", user, account)]
    if field in ("title", "content", "is_published"):
        calls = [("POST", "/posts", POST), ("PATCH", post, {}), ("PUT", post, {})]
    if field == "text":
        calls = [("POST", f"{post}/comments", {})]
    for value in values:
        for method, path, body in calls:
            content = json.dumps(body | {field: value})
            answer = admin.api.request(method, path, content=content, headers=JSON)
            assert_error(answer, 422, "VALIDATION_ERROR")
            assert [problem["loc"] for problem in answer.json()["detail"]] == [["body", field]]
    assert [ann.api.get(path).json() for path in (user, post)] == before


# --- Application ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["HEAD /health", "HEAD /", "GET /docs", "PUT /no", "OPTIONS /"])
def test_every_response_has_an_id_a_time_and_nosniff(client, url, call):
    method, path = call.split()
    answer = client.request(method, url + path, headers=PREFLIGHT)
    assert answer.status_code == (404 if method == "PUT" else 200)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    assert re.fullmatch(r"\d\.\d{4}", answer.headers["x-process-time"])
    least = 0 if method == "OPTIONS" else 0.0001  # a preflight takes less than can be shown
    assert least <= float(answer.headers["x-process-time"]) < answer.elapsed.total_seconds()
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("sent", ["abc", "a" * 64, "A.b_c-9", "", "a" * 65, "a b", "a/b", "é"])
def test_a_valid_request_id_is_kept_and_an_invalid_one_replaced(client, sent):
    answer = client.get("/users/me", headers={b"X-Request-ID": sent.encode()})
    is_good = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", sent) is not None
    assert (answer.headers["x-request-id"] == sent) == is_good


def test_a_cookie_full_of_backslashes_takes_no_time(client):
    answer = client.get("/auth/verify", headers={"Cookie": f'x="{60_000 * chr(92)}"'})
    assert answer.elapsed < timedelta(seconds=1)


def test_cors_headers_are_sent_to_allowed_origins_only(client, production, development):
    headers = "authorization, content-type, if-none-match, last-event-id, x-request-id"
    preflight = PREFLIGHT | {"Access-Control-Request-Headers": headers}
    foreign = {"Origin": "http://any.example"}
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        asked = preflight | {"Access-Control-Request-Method": method}
        assert client.options("/", headers=asked).status_code == 200, method
    assert client.options("/", headers=preflight | foreign).status_code == 400
    exposed = client.get("/posts", headers=ORIGIN).headers["access-control-expose-headers"]
    names = "ETag Location Retry-After RateLimit RateLimit-Policy X-Request-ID X-Process-Time"
    assert set(exposed.split(", ")) == {*names.split(), "X-Cache"}
    assert "access-control-allow-origin" not in client.get("/", headers=foreign).headers
    assert "access-control-allow-origin" not in production.get("/", headers=ORIGIN).headers
    open_to_all = development.get("/", headers=foreign).headers  # CORS_ORIGINS=*
    assert open_to_all["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in open_to_all


def test_health_is_503_when_the_database_does_not_answer(client, url, monkeypatch):
    assert client.get(f"{url}/health").json() == {"status": "healthy"}
    with hold(monkeypatch, "is_database_up", client.get, f"{url}/health") as answer:
        assert_error(answer.result(), 503, "UNAVAILABLE")
    assert answer.result().elapsed < timedelta(seconds=2)


@pytest.mark.parametrize("name", ["get_read_session", "get_write_session"])
def test_every_route_uses_an_overridden_session(calls, monkeypatch, name):
    session = getattr(main, name)
    monkeypatch.setitem(main.app.dependency_overrides, session, lambda: raise_error("tea"))
    for api, method, _, path, about in calls:
        reads = "security" in about or path.endswith(("/login", "/forgot-password"))
        writes = method != "get" and not path.endswith("/forgot-password")
        is_used = reads if name == "get_read_session" else writes
        with api.stream(method, path) as answer:
            assert (answer.status_code == 418) == is_used, path


@pytest.mark.parametrize("name", ["get_optional_user", "get_current_user"])
def test_the_current_user_can_be_overridden(client, admin, monkeypatch, name):
    draft = f"/posts/{write_post(admin, is_published=False)['id']}"
    user = main.UserRead.model_validate(admin.api.get("/users/me").json())
    with monkeypatch.context() as patch:
        patch.setitem(main.app.dependency_overrides, getattr(main, name), lambda: user)
        assert client.get("/users").json()["items"][0]["email"] == ADMIN_EMAIL
        assert client.post("/posts", json=POST).json()["author"]["id"] == admin.id
        assert client.get(draft).is_success == (name == "get_optional_user")
        assert_error(client.post("/auth/logout"), 401, "INVALID_TOKEN")  # of which session?
    assert client.get(draft).status_code == 404  # nothing of it is remembered


# --- Docs -----------------------------------------------------------------------------------------


def test_the_docs_load_without_internet_and_are_off_in_production(client, url, production):
    page = client.get(f"{url}/docs").text
    assert not re.findall("https?://", page)
    for file in ("docs", "openapi.json", *re.findall(r'(?:src|href)="(docs/.+?)"', page)):
        assert client.get(f"{url}/{file}").status_code == 200, file
        assert_error(production.get(production.base_url.join(f"/{file}")), 404, "NOT_FOUND")


def test_the_docs_describe_routes_in_sentences_and_give_schemas_plain_names(client, url, calls):
    document = client.get(f"{url}/openapi.json").json()
    for *_, about in calls:
        if "description" in about:  # it has a docstring
            assert re.fullmatch("[A-Z].{10,70}[.]", about["summary"]), "the docstring's first line"
        assert about["tags"][0] in {tag["name"] for tag in document["tags"] if tag["description"]}
    for name in document["components"]["schemas"]:
        assert re.fullmatch("([A-Z][a-z]+)+", name)
    assert re.search(r"Authorize.+\(\./\)", document["info"]["description"], re.DOTALL)
    flow = document["components"]["securitySchemes"]["TokenBearer"]["flows"]["password"]
    assert flow["tokenUrl"].startswith("./")  # so that it works under a prefix, as the page does


def propose(schema, schemas):
    """What Swagger UI proposes: an example, the default, or something of the type."""
    schema = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
    if "examples" in schema:
        return schema["examples"][0]
    if "default" in schema or "example" in schema:
        return schema.get("default", schema.get("example"))
    if "properties" in schema:
        return {name: propose(part, schemas) for name, part in schema["properties"].items()}
    assert "pattern" not in schema, "give it an example, or random characters are proposed"
    if "anyOf" in schema:
        return propose(schema["anyOf"][0], schemas)
    text = "string".ljust(schema.get("minLength", 0), "g")
    return {"string": text, "integer": schema.get("minimum", 0), "boolean": True}[schema["type"]]


def test_the_bodies_that_the_docs_propose_are_accepted(client, url, calls):
    schemas = client.get(f"{url}/openapi.json").json()["components"]["schemas"]
    for api, method, _, path, about in calls:
        content = about.get("requestBody", {}).get("content", {})
        if "application/json" in content:
            body = propose(content["application/json"]["schema"], schemas)
            answer = api.request(method, path, json=body)
            is_token_made_up = path.endswith("/reset-password") and answer.status_code == 401
            assert answer.is_success or is_token_made_up, (path, body, answer.text)


# --- Rate limiter ---------------------------------------------------------------------------------


def set_limits(monkeypatch, default="off", auth="off"):
    """Sets other limits, and starts to count anew."""
    monkeypatch.setattr(main.limiter, "store", main.WindowStore())
    monkeypatch.setattr(main, "DEFAULT_LIMIT", main.make_limit("default", default))
    for path in [path for path, limit in main.path_limits.items() if limit]:
        monkeypatch.setitem(main.path_limits, path, main.make_limit("auth", auth))


def get_as(client, *addresses):
    """Returns the statuses of requests that a proxy forwards from these addresses."""
    headers = [{"X-Forwarded-For": address} for address in addresses]
    return [client.get("/posts", headers=header).status_code for header in headers]


@pytest.mark.parametrize(
    ("name", "rate", "seconds", "paths"),
    [
        ("default", "3/minute", 60, ["/posts", "/nowhere", "/users/me"]),
        ("auth", "3/hour", 3_600, ["/auth/login", "/auth/register", "/auth/login%0A"]),
    ],
)
def test_rate_limit_headers_count_down_to_429(client, monkeypatch, name, rate, seconds, paths):
    set_limits(monkeypatch, **{name: rate})
    for left, path in zip((2, 1, 0), paths, strict=True):
        headers = client.post(path).headers
        assert headers["ratelimit-policy"] == f'"{name}";q=3;w={seconds}'
        assert headers["ratelimit"] == f'"{name}";r={left};t={seconds}'
    refused = client.post(paths[0], headers=ORIGIN)
    assert_error(refused, 429, "RATE_LIMITED")
    assert refused.headers["ratelimit"] == f'"{name}";r=0;t={seconds}'
    assert refused.headers["retry-after"] == f"{seconds}"
    assert refused.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert ("ratelimit" in client.get("/posts").headers) == (name == "default")


def test_a_limit_is_for_a_second_a_minute_or_an_hour():
    limits = [main.make_limit("default", f"3/{unit}") for unit in ("second", "minute", "hour")]
    assert limits == [("default", 3, 1), ("default", 3, 60), ("default", 3, 3_600)]


def test_health_verify_docs_and_preflights_are_not_limited(client, url, monkeypatch):
    set_limits(monkeypatch, "1/hour")
    client.get("/posts")
    for path in ("/health", "/docs", "/docs/swagger-ui.css", "/openapi.json"):
        answer = client.get(url + path)
        assert (answer.status_code, "ratelimit" in answer.headers) == (200, False), path
    assert client.get("/auth/verify").status_code == 401
    assert client.options("/posts", headers=PREFLIGHT).status_code == 200
    for path in ("/healthy", "/docsy", "/api/v1/auth/verify/x"):
        assert client.get(url + path).status_code == 429, path


def test_clients_are_counted_by_an_address_that_they_cannot_forge(client, development, monkeypatch):
    set_limits(monkeypatch, "2/hour")
    assert get_as(client, "10.0.0.1", "10.0.0.1", "10.0.0.1") == [200, 200, 429]
    assert get_as(client, "10.0.0.2", "::ffff:10.0.0.2", "10.0.0.2") == [200, 200, 429]
    assert get_as(client, "2001:db8::1", "2001:db8::2", "2001:db8:0:0:f::3") == [200, 200, 429]
    assert get_as(client, "2001:db8:0:1::1") == [200]  # the next /64
    assert get_as(client, "nonsense", "x" * 5_000, '1.2.3.4"') == [200, 200, 429]
    statuses = get_as(development, *(f"10.0.{number}.1" for number in range(30)))
    assert set(statuses) == {200, 429}  # this server trusts no proxy
    assert statuses == sorted(statuses)


def test_windows_start_at_the_first_request_and_take_bounded_memory(monkeypatch):
    async def hit_all():
        return [await store.hit(key, 60) for key in ["key"] * 5 + list(range(50_000))]

    store = main.WindowStore()
    clock = iter([100, 130, 159, 160, 161] + [200] * 50_000)
    monkeypatch.setattr(main, "perf_counter", lambda: next(clock))
    assert asyncio.run(hit_all())[:5] == [(1, 60), (2, 30), (3, 1), (1, 60), (2, 59)]
    assert len(store.new) + len(store.old) <= 40_000  # about 12 MB


def test_a_window_is_not_forgotten_before_its_end(monkeypatch):
    async def hit(store, keys, seconds):
        return [await store.hit(key, seconds) for key in keys][-1]

    others = map(str, range(main.MAX_WINDOWS))
    assert asyncio.run(hit(main.WindowStore(), ["key", *others, "key"], 60))[0] == 2
    clock = iter([0, 1_000, 2_000, 3_000, 3_500])
    monkeypatch.setattr(main, "perf_counter", lambda: next(clock))
    assert asyncio.run(hit(main.WindowStore(), "abbba", 3_600)) == (2, 100)


# --- Passwords and tokens -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "password",
    ["password123", "8 things", "x" * 73, "x" * 128, "😀" * 25, "😀" * 64, "Pässwört 1 "],
)
def test_every_character_of_a_password_counts(client, password):
    ann = sign_up(client, password=password)  # it signs in, too
    others = {password[:-1], password[:-1] + "y", password + "x", password.swapcase()}
    for other in others - {password}:
        assert_error(try_login(client, ann.email, other), 401, "INVALID_CREDENTIALS")


def test_a_login_holds_no_connection_while_it_hashes(client, ann, ben, admin, monkeypatch):
    with (  # as many logins as there are connections for readers
        hold(monkeypatch, "verify_password", try_login, client, ann.email) as first,
        hold(monkeypatch, "verify_password", try_login, client, ben.email) as second,
    ):
        assert client.get("/posts?size=1").status_code == 200
        admin.api.patch(f"/users/{ann.id}", json={"is_active": False})
        admin.api.patch(f"/users/{ben.id}", json={"password": NEW_PASSWORD})
    for login in (first, second):  # the accounts have changed meanwhile
        assert_error(login.result(), 401, "INVALID_CREDENTIALS")
    assert main.read_engine.pool.timeout() == main.write_engine.pool.timeout() == 5
    monkeypatch.setattr(main, "MAX_WAITING_PASSWORDS", 0)
    assert_error(try_login(client, ADMIN_EMAIL), 503, "UNAVAILABLE")


def refresh(client, tokens):
    return client.post("/auth/refresh", data={"refresh_token": tokens["refresh_token"]})


def test_tokens_name_their_user_and_expire_with_their_session(client, ann, monkeypatch):
    monkeypatch.setattr(main.settings, "access_token_expire_minutes", 525_600)
    monkeypatch.setattr(main.settings, "refresh_token_expire_days", 1)
    tokens = log_in(client, ann.email)
    monkeypatch.setattr(main.settings, "refresh_token_expire_days", 2)  # for other logins
    for kind in "access", "refresh", "refresh":
        claims = jwt.get_unverified_claims(tokens[f"{kind}_token"])
        assert claims.keys() == {"sub", "sid", "jti", "type", "iat", "exp"}
        assert (claims["sub"], claims["type"]) == (str(ann.id), kind)
        assert 86_300 < claims["exp"] - time.time() <= 86_400
        assert tokens["expires_in"] in range(86_300, 86_401)
        tokens = refresh(client, tokens).json()
    assert tokens["token_type"] == "bearer"
    assert tokens.keys() == {"access_token", "refresh_token", "token_type", "expires_in"}
    soon = main.utc_now() + timedelta(seconds=1)
    token = main.create_token("access", ann.id, soon, sid=claims["sid"])
    ann.api.headers["Authorization"] = f"Bearer {token}"
    assert ann.api.get("/users/me").status_code == 200
    wait_until(lambda: ann.api.get("/users/me").status_code == 401)  # though it is remembered


ALGORITHMS = ["none", "None", "NONE", "nOnE", "", "HS384", "RS256", "ES256", ["HS256"], "HS", None]
ODD_CLAIMS = [{"exp": exp} for exp in (None, "soon", [1], True, -1, float("inf"), 1_700_000_000)]
ODD_CLAIMS += [{"sub": sub} for sub in ("", "x", "0", "-1", "9" * 30, 1, None)]
ODD_CLAIMS += [{"sid": sid} for sid in ("", "x", "\0", "\ud800", 1, None)]
ODD_CLAIMS += [{"type": kind} for kind in ("", "ACCESS", ["access"], "cookie", "reset")]


def sign(claims, algorithm="HS256"):
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return jws.sign(payload, main.get_signing_key(), {"alg": algorithm})


def forge(token):  # most of these have a good signature
    claims, (header, payload, signature) = jwt.get_unverified_claims(token), token.split(".")
    boss, deep = (sign(part).split(".")[1] for part in (claims | {"sub": "1"}, b"[" * 2_000))
    for algorithm in ALGORITHMS:
        yield sign(claims, algorithm)
        yield sign(claims, algorithm).rpartition(".")[0] + "."
    yield from (sign({key: claims[key] for key in claims.keys() - {name}}) for name in claims)
    yield from (sign(claims | odd) for odd in ODD_CLAIMS)
    yield from (f"{header}.{payload}", f"{header}.{payload}.", f"{header}.{boss}.{signature}")
    yield from (f"{deep}.{payload}.{signature}", f"{header}.{deep}.{signature}", "W1tb" * 1_000)
    yield from (sign(b"[" * 2_000), sign([1]), "a" * 15_000, ".", "..", "\x80", "x")
    yield from (f"{token}{junk}" for junk in ("A", "=", "@@", ".A"))
    letters = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"  # base64
    yield from (token[:-1] + letter for letter in letters if letter != token[-1])
    yield jwt.encode(claims, "x" * 40)


@pytest.mark.parametrize(("kind", "other"), [("access", "refresh"), ("refresh", "access")])
def test_a_forged_token_is_refused_even_on_public_routes(client, ann, kind, other):
    paths = ["/users/me", "/posts", "/posts/1", "/events", "/auth/verify"] * 40
    for token in [ann.tokens[f"{other}_token"], *forge(ann.tokens[f"{kind}_token"])]:
        headers = {"Authorization": f"Bearer {token}".encode("latin-1")}
        answer = client.get(paths.pop(), headers=headers)
        if kind == "refresh":
            answer = refresh(client, {"refresh_token": token})
        assert answer.json().get("error_code") == "INVALID_TOKEN", token
        assert answer.headers["www-authenticate"] == "Bearer"
    headers = {"Sec-WebSocket-Protocol": f"bearer, {ann.tokens['access_token']}"}
    assert client.get("/users/me", headers=headers).status_code == 401  # it is for WebSockets


# --- Accounts -------------------------------------------------------------------------------------


def test_register_returns_the_new_user(client):
    body = {"email": "Ann@Example.com", "password": PASSWORD, "first_name": " Ann ", "age": 36}
    user = client.post("/auth/register", json=body).json()
    assert user.pop("id") > 0
    assert user.pop("created_at").endswith("Z")
    assert user.pop("updated_at").endswith("Z")
    names = {"first_name": "Ann", "last_name": None, "full_name": "Ann"}
    profile = {"email": "ann@example.com", "age": 36, "bio": None, "avatar_url": None}
    assert user == names | profile | {"role": "user", "is_superuser": False, "is_active": True}


def test_of_50_registrations_of_one_email_one_succeeds(client):
    body = {"email": "one@example.com", "password": PASSWORD}
    answers = at_once(50, lambda _: client.post("/auth/register", json=body))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 49
    assert {answer.json().get("error_code") for answer in answers} == {None, "EMAIL_TAKEN"}


def test_the_longest_values_are_accepted(client):
    email = f"{64 * 'a'}@{63 * 'b'}.{63 * 'c'}.{57 * 'd'}.com"  # 254 characters
    ann = sign_up(client, email=email, first_name="x" * 100, last_name="y" * 100, age=149)
    profile = {"bio": "x" * 2_000, "avatar_url": f"http://{493 * 'x'}", "age": 1}
    me = ann.api.patch("/users/me", json=profile).json()
    assert me == me | profile | {"email": email, "full_name": f"{100 * 'x'} {100 * 'y'}"}


def test_a_failed_login_does_not_reveal_the_reason(client, admin, monkeypatch, caplog):
    assert main.DECOY_HASH.startswith("$2b$04$")  # costs what BCRYPT_ROUNDS says
    monkeypatch.setattr(main, "DECOY_HASH", main.DECOY_HASH.replace("$04$", "$10$"))
    monkeypatch.setattr(main.settings, "bcrypt_rounds", 10)
    ann, ben = sign_up(client), sign_up(client)
    admin.api.patch(f"/users/{ben.id}", json={"is_active": False})
    for email in ann.email.upper(), ben.email, "unknown@example.com", "no\0email":
        answer = try_login(client, email, PASSWORD if email == ben.email else "wrong one")
        assert_error(answer, 401, "INVALID_CREDENTIALS")
        assert answer.json()["detail"] == "Wrong email or password"
        assert answer.elapsed > timedelta(seconds=0.03), email  # so long takes a hash, at least
    assert f"user {ann.id} signed in" in caplog.text  # the log names them by id or digest
    assert len(re.findall("failed to sign in: email [0-9a-f]{16}", caplog.text)) == 4


def test_logins_and_checks_of_the_current_password_share_a_limit(client, monkeypatch):
    assert main.EMAIL_LIMIT.quota == main.AUTH_LIMIT.quota * 10
    monkeypatch.setattr(main, "EMAIL_LIMIT", main.Limit("auth", 3, 60))
    ann = sign_up(client)
    change = {"email": "x@example.com", "current_password": "wrong"}
    for _ in range(2):  # to sign in was the first of three
        assert_error(ann.api.patch("/users/me", json=change), 403, "INSUFFICIENT_PERMISSIONS")
    change["current_password"] = PASSWORD
    assert_error(ann.api.patch("/users/me", json=change), 429, "RATE_LIMITED")
    assert_error(try_login(client, ann.email.upper()), 429, "RATE_LIMITED")
    answer = client.post("/auth/forgot-password", json={"email": ann.email})
    assert_error(answer, 429, "RATE_LIMITED")
    assert not any("@" in key for key in main.limiter.store.new)  # they are digests


def assert_signed_out(client, *logins):
    for tokens in logins:
        for junk in "", "=", "A":
            headers = {"Authorization": f"Bearer {tokens['access_token']}{junk}"}
            assert_error(client.get("/users/me", headers=headers), 401, "INVALID_TOKEN")
        assert_error(refresh(client, tokens), 401, "INVALID_TOKEN")


@pytest.mark.parametrize("is_late", [True, False], ids=["after 10 s", "before the last one"])
def test_a_refresh_token_may_be_reused_only_at_once(client, ann, monkeypatch, caplog, is_late):
    now = main.utc_now() + timedelta(minutes=1)
    monkeypatch.setattr(main, "utc_now", lambda: now)
    answers = at_once(20, lambda _: refresh(client, ann.tokens))
    assert {(a.status_code, a.headers["cache-control"]) for a in answers} == {(200, "no-store")}
    latest, *others = (answer.json() for answer in answers)
    assert {tokens["refresh_token"] for tokens in others} == {latest["refresh_token"]}
    for seconds in (1, 4, 10):  # each time the same, and the 10 s start at the first use
        monkeypatch.setattr(main, "utc_now", lambda: now + timedelta(seconds=seconds))  # noqa: B023
        assert refresh(client, ann.tokens).json()["refresh_token"] == latest["refresh_token"]
    monkeypatch.setattr(main, "utc_now", lambda: now + timedelta(seconds=10 + is_late))
    latest = latest if is_late else refresh(client, latest).json()
    assert_error(refresh(client, ann.tokens), 401, "TOKEN_REUSED")
    assert_signed_out(client, latest)
    assert f"user {ann.id}: a used refresh token came again" in caplog.text


def test_logout_deactivation_and_deletion_end_sessions_immediately(client, admin, caplog):
    ann, gone, deleted = sign_up(client), sign_up(client), sign_up(client)
    here, there = as_person(client, ann.email), log_in(client, ann.email)
    assert_error(client.post("/auth/logout"), 401, "INVALID_TOKEN")
    assert ann.api.post("/auth/logout").status_code == 204
    assert_signed_out(client, ann.tokens)
    assert here.api.post("/auth/logout?everywhere=true").status_code == 204
    assert_signed_out(client, there)
    admin.api.delete(f"/users/{deleted.id}")
    assert sign_up(client).id > deleted.id  # no id is used twice
    for is_active in False, True:
        admin.api.patch(f"/users/{gone.id}", json={"is_active": is_active})
        assert_signed_out(client, gone.tokens, deleted.tokens)
    log_in(client, gone.email)
    assert f"user {gone.id}: is_active changed by user {admin.id}" in caplog.text


# --- Posts ----------------------------------------------------------------------------------------

NEVER = 2**31 - 1  # an id that nothing has


def without_content(post):
    return {name: value for name, value in post.items() if name != "content"}


def test_a_new_post_is_a_draft_at_its_location(ann):
    fields = {"title": "🐝" * 255, "content": " \n" + "🐝" * 19_998}
    answer = ann.api.post("/posts", json=fields | {"title": f" {fields['title']} "})
    post = answer.json()
    assert answer.headers["location"] == f"/api/v1/posts/{post['id']}"
    assert ann.api.get(f"/posts/{post['id']}").json() == post
    assert post["created_at"].endswith("Z")
    names = ("id", "created_at", "updated_at", *main.PostCreate.model_fields)  # and yours
    expected = {name: post[name] for name in names} | fields
    expected |= {"author": {"id": ann.id, "full_name": "Ann Lee"}}
    assert post == expected | {"is_published": False, "version": 1}


def test_drafts_are_listed_only_for_their_author(client, ann, admin):
    post = write_post(ann)
    total = client.get("/posts?size=1").json()["total"]
    draft = write_post(ann, is_published=False)
    for api in (client, ann.api, admin.api):
        assert api.get(f"/posts?size=1&before={NEVER}").json()["items"] == [post]
        page = {"items": [post], "total": total, "page": 1, "size": 1, "pages": total}
        assert api.get("/posts?size=1").json() == page
    own = {"items": [draft, post], "total": 2, "page": 1, "size": 20, "pages": 1}
    assert ann.api.get("/users/me/posts").json() == own


@pytest.fixture(scope="session")
def listed(client):
    """Three posts of one author by their titles, and the values for the queries below."""
    author = sign_up(client, first_name="Zed%Ann_", last_name="O'ZEDLee")
    posts = {title: write_post(author, title=title) for title in "acb"}
    first, second, last = (post["created_at"] for post in posts.values())
    posts["a"] = author.api.patch(f"/posts/{posts['a']['id']}", json={"content": "New"}).json()
    time = datetime.fromisoformat(second)
    west = time.astimezone(timezone(timedelta(hours=-5))).isoformat()
    earlier, later = (time + timedelta(days=days) for days in (-2, 2))
    values = {"time": second, "naive": second.removesuffix("Z"), "west": west}
    values |= {"first_day": first[:10], "last_day": last[:10]}
    values |= {"earlier": earlier.date(), "later": later.date()}
    return posts, values | {title: post["id"] for title, post in posts.items()}


FOUND = {  # what these queries find: the titles of the posts above, in this order
    "bca": ["size=20", "sort=-created_at", "author=zed%25aNN_", "author=o'zedl"]
    + ["min_date={first_day}", "max_date={last_day}", "min_date=0001-01-01&max_date=9999-12-31"],
    "acb": ["sort=created_at"],
    "abc": ["sort=title", "sort=-updated_at"],
    "cba": ["sort=-title", "sort=updated_at"],
    "bc": ["min_date={time}", "min_date={naive}", "min_date={west}"],
    "ca": ["max_date={time}", "max_date={naive}", "max_date={west}", "before={b}"],
    "c": ["before={b}&size=1", "min_date={west}&before={b}"],
    "a": ["page=2&size=2"],
    "": ["page=100&size=100", "before={a}", "max_date={earlier}", "min_date={later}"]
    + [f"author={name}" for name in ("zed_", "_zed", "%25zed", "zed%25%25", "zed/", "zed\\")]
    + ["author='%20OR%201=1--"],
}
QUERIES = [(query, titles) for titles, queries in FOUND.items() for query in queries]


@pytest.mark.parametrize(("query", "titles"), QUERIES)
def test_posts_are_filtered_sorted_and_paginated(client, listed, query, titles):
    posts, values = listed
    query = httpx.QueryParams("author=zed").merge(query.format(**values))
    items = [posts[title] for title in titles]
    total, size = 3 if "page" in query else len(items), int(query.get("size", 20))
    place = {"total": total, "page": int(query.get("page", 1)), "pages": -(-total // size)}
    if "before" in query:
        place = dict.fromkeys(place)
    assert client.get("/posts", params=query).json() == {"items": items, "size": size} | place


def test_a_max_date_includes_its_last_microsecond():
    last = main.PostQuery(max_date="2024-01-31").max_date
    assert last == datetime(2024, 1, 31, 23, 59, 59, 999_999, timezone(timedelta(0)))


BAD_QUERIES = f"""
    size=101 page=101&size=100 before=9&page=1 before=9&sort=title sort= sort=-id min_date=
    sort=hashed_password min_date=x max_date=now max_date=NaN min_date=1e9 min_date=1704067200
    max_date=%00 max_date=2024-02-30 min_date=2024-01-01T25:00 min_date=0001-01-01T00:00:00%2B23:59
    max_date=9999-12-31T23:59:59-23:59 author={"%25" * 101} author={"_" * 50_001}
"""


def test_an_invalid_list_parameter_is_refused(client):
    for query in BAD_QUERIES.split():
        assert client.get(f"/posts?{query}").status_code == 422, query


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_an_update_changes_only_sent_fields_of_the_current_version(client, ann, method):
    post = write_post(ann)
    path = f"/posts/{post['id']}"
    changed = ann.api.request(method, path, json={"content": "New", "version": 1}).json()
    assert changed == post | {"content": "New", "version": 2, "updated_at": changed["updated_at"]}
    assert changed["updated_at"] > post["updated_at"]
    assert ann.api.request(method, path, json={}).json() == changed
    for version in (0, -1, 1, 3, 2**63, 10**400, "2", 2.5, True):
        answer = ann.api.request(method, path, json={"title": "No", "version": version})
        assert answer.status_code == (409 if type(version) is int else 422)
    assert client.get(path).json() == changed


def test_concurrent_edits_are_not_lost_and_one_per_version_succeeds(client, ann):
    post = write_post(ann)["id"]

    def edit(version):
        bodies = [{"title": f"Number {number}", "version": version} for number in range(20)]
        return at_once(20, lambda number: ann.api.patch(f"/posts/{post}", json=bodies[number]))

    with listen(client, post_id=post) as listener:
        edits = sorted((answer.json() for answer in edit(None)), key=lambda edit: edit["version"])
        assert [edit["version"] for edit in edits] == list(range(2, 22))
        assert sorted(answer.status_code for answer in edit(21)) == [200] + [409] * 19
        edits.append(client.get(f"/posts/{post}").json())
        heard = listener.wait(21)
        if not on_sqlite:  # which commits one after the other: else `version` tells the order
            heard.sort(key=lambda event: event[1]["version"])
        assert heard == [("post.updated", without_content(edit)) for edit in edits]


# --- Comments -------------------------------------------------------------------------------------


def test_comments_are_listed_oldest_first(client, ann, ben):
    post = write_post(ann)["id"]
    texts = ("🐝" * 500, "Lines\nand 李", "Mine too.")
    comments = [write_comment(ben, post, f" {text} ") for text in texts]
    for comment, text in zip(comments, texts, strict=True):
        expected = {"text": text, "author": {"id": ben.id, "full_name": "Ben"}, "post_id": post}
        assert comment == expected | {name: comment[name] for name in ("id", "created_at")}
    page = client.get(f"/posts/{post}/comments?page=2&size=2").json()
    assert page == {"items": comments[2:], "total": 3, "page": 2, "size": 2, "pages": 2}
    assert client.get(f"/posts/{post}/comments").json()["items"] == comments
    ann.api.delete(f"/comments/{comments[1]['id']}")
    assert client.get(f"/posts/{post}/comments").json()["items"] == [comments[0], comments[2]]


# --- Users ----------------------------------------------------------------------------------------


def test_users_see_public_profiles_and_superusers_see_all_fields(ben, ann, admin):
    me = ann.api.get("/users/me").json()
    public = {name: me[name] for name in ("id", "full_name", "bio", "avatar_url", "created_at")}
    total = ben.api.get("/users").json()["total"]
    page = {"total": total, "page": total, "size": 1, "pages": total}
    for api, seen in (ben.api, public), (admin.api, me):
        assert api.get(f"/users/{ann.id}").json() == seen
        assert api.get(f"/users?size=1&page={total}").json() == {"items": [seen]} | page
    assert ann.api.get(f"/users/{ann.id}").json() == me
    admin.api.patch(f"/users/{ann.id}", json={"is_active": False})
    for value in True, False:
        users = admin.api.get(f"/users?is_active={value}&size=100").json()["items"]
        assert {user["is_active"] for user in users} == {value}


def test_an_update_of_a_user_changes_only_sent_fields(client):
    ann = sign_up(client, first_name="Ann", last_name="Lee", age=36)
    before = ann.api.get("/users/me").json()
    assert before["full_name"] == "Ann Lee"
    fields = {"first_name": None, "age": None, "bio": "Hi\n", "avatar_url": "https://a.b/c"}
    after = ann.api.patch("/users/me", json=fields).json()
    assert after["updated_at"] > before["updated_at"]
    assert after == before | fields | {"full_name": "Lee", "updated_at": after["updated_at"]}
    assert ann.api.patch("/users/me", json={}).json() == after == ann.api.get("/users/me").json()
    cleared = ann.api.patch("/users/me", json=dict.fromkeys([*fields, "last_name"])).json()
    assert cleared["full_name"] == f"user {ann.id}"
    assert cleared["bio"] is cleared["avatar_url"] is None


def test_a_new_email_or_password_needs_the_current_password(client, ann, ben, admin):
    for change in {"email": "own@example.com"}, {"password": NEW_PASSWORD}:
        for wrong in {}, {"current_password": "wrong"}, {"current_password": PASSWORD.upper()}:
            for api in ann.api, admin.api:
                answer = api.patch("/users/me", json=change | wrong)
                assert_error(answer, 403, "INSUFFICIENT_PERMISSIONS")
    change = {"email": ben.email.upper(), "current_password": PASSWORD}
    assert_error(ann.api.patch("/users/me", json=change), 409, "EMAIL_TAKEN")
    assert ann.api.patch("/users/me", json=change | {"email": "Own@b.co"}).status_code == 200
    log_in(client, "own@b.co")


def test_a_new_password_ends_all_sessions(client, ann, admin, caplog):
    sessions = [ann.tokens, log_in(client, ann.email)]
    change = {"password": NEW_PASSWORD, "current_password": PASSWORD}
    assert ann.api.patch("/users/me", json=change).status_code == 200
    sessions.append(log_in(client, ann.email, NEW_PASSWORD))
    admin.api.patch(f"/users/{ann.id}", json={"password": PASSWORD})
    assert_signed_out(client, *sessions)
    changed = re.findall(f"user {ann.id}: password changed by user ([0-9]+)", caplog.text)
    assert changed == [str(ann.id), str(admin.id)]


def test_a_password_that_changes_meanwhile_is_no_longer_current(ann, admin, monkeypatch):
    change = {"email": "late@b.co", "current_password": PASSWORD}
    call = partial(ann.api.patch, "/users/me", json=change)
    with hold(monkeypatch, "verify_password", call) as answer:
        admin.api.patch(f"/users/{ann.id}", json={"password": NEW_PASSWORD})
    assert_error(answer.result(), 409, "CONFLICT")


def make_admin(client, admin):
    ann = sign_up(client)
    admin.api.patch(f"/users/{ann.id}", json={"role": "admin"})
    return ann


@pytest.mark.parametrize("dismissal", [{"role": "user"}, {"is_active": False}], ids=str)
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_an_admin_dismissed_meanwhile_is_refused(client, admin, monkeypatch, method, dismissal):
    boss, ben = make_admin(client, admin), sign_up(client)
    path = "/users" if method == "POST" else f"/users/{ben.id}"
    user = {"email": "late@example.com", "password": NEW_PASSWORD}
    change = partial(boss.api.request, method, path, json=user)
    with hold(monkeypatch, "hash_password", change) as answer:
        assert admin.api.patch(f"/users/{boss.id}", json=dismissal).status_code == 200
    assert_error(answer.result(), 403, "INSUFFICIENT_PERMISSIONS")
    assert try_login(client, user["email"], NEW_PASSWORD).status_code == 401


@pytest.mark.parametrize("body", [{"role": "user"}, {"is_active": False}, None], ids=str)
def test_of_two_superusers_who_dismiss_each_other_one_stays(client, admin, body):
    method = "PATCH" if body else "DELETE"
    for _ in range(2):
        one, two = make_admin(client, admin), make_admin(client, admin)
        dismiss_one = partial(two.api.request, method, f"/users/{one.id}", json=body)
        dismiss_two = partial(one.api.request, method, f"/users/{two.id}", json=body)
        at_once(2, lambda number, calls=(dismiss_one, dismiss_two): calls[number]())
        assert [me.api.get("/users?is_active=1").status_code for me in (one, two)].count(200) == 1


def test_deleting_a_user_deletes_their_posts_and_publishes_events(client, ann, ben, admin):
    mine, other, theirs = (write_post(author)["id"] for author in (ann, ann, ben))
    draft = write_post(ann, is_published=False)["id"]
    write_comment(ben, mine)
    write_comment(ann, theirs)
    with listen(client) as listener:
        assert admin.api.delete(f"/users/{ann.id}").status_code == 204
        write_post(ben)  # the next event
        events = listener.wait(3)
    assert [kind for kind, _ in events] == ["post.deleted", "post.deleted", "post.published"]
    assert {event["id"] for _, event in events[:2]} == {mine, other}
    for path in f"/users/{ann.id}", f"/posts/{mine}", f"/posts/{other}", f"/posts/{draft}":
        assert_error(admin.api.get(path), 404, "NOT_FOUND")
    assert client.get(f"/posts/{theirs}/comments").json()["total"] == 0


def test_a_start_makes_a_superuser_and_deletes_old_logins(client, ann, ben, monkeypatch, tmp_path):
    logins = {"sql": f"SELECT count(*) FROM loginsession WHERE user_id = {ben.id}"}
    monkeypatch.setattr(main.settings, "refresh_token_expire_days", -1)
    for _ in range(2):
        log_in(client, ben.email)
    assert client.get("/own/reader", params=logins).json() == 2  # a login deletes them, too
    settings = {name: SETTINGS[name] for name in {"DATABASE_URL", "SECRET_KEY"} & SETTINGS.keys()}
    settings |= {"FIRST_SUPERUSER_EMAIL": ann.email, "FIRST_SUPERUSER_PASSWORD": NEW_PASSWORD}
    with run_main(tmp_path, **settings) as later:
        assert client.get("/own/reader", params=logins).json() == 1
        assert f"user {ann.id}: role and password changed at the start" in later.read_log()
        assert_signed_out(later, ann.tokens)
        assert try_login(later, ann.email).status_code == 401
        assert as_person(later, ann.email, NEW_PASSWORD).api.get("/users?is_active=1").is_success


# --- Permissions ----------------------------------------------------------------------------------

PERMISSIONS = [  # the statuses for an anonymous client, another user, the owner and a superuser
    ([401, 200, 200, 200], None, ["GET /auth/verify", "GET /users", "GET /users/{user}"]),
    ([401, 200, 200, 200], None, ["GET /users/me", "GET /users/me/posts"]),
    ([401, 403, 403, 200], None, ["GET /auth/verify?role=admin", "GET /users?is_active=true"]),
    ([401, 403, 200, 200], {"bio": "x"}, ["PATCH /users/{user}"]),
    ([401, 403, 403, 200], {"role": "user"}, ["PATCH /users/{user}"]),
    ([401, 403, 403, 200], {"password": NEW_PASSWORD}, ["PATCH /users/{user}"]),
    ([401, 403, 403, 409], {"role": "user"}, ["PATCH /users/me"]),
    ([401, 403, 403, 409], {"is_active": False}, ["PATCH /users/me"]),
    ([401, 403, 403, 409], None, ["DELETE /users/me"]),
    ([401, 403, 403, 404], None, ["DELETE /users/{missing}"]),
    ([401, 403, 403, 204], None, ["DELETE /users/{user}"]),
    ([401, 403, 403, 422], {}, ["POST /users"]),
    ([401, 404, 404, 404], None, ["GET /users/{missing}"]),
    ([401, 403, 403, 404], {"bio": "x"}, ["PATCH /users/{missing}"]),
    ([200, 200, 200, 200], None, ["GET /posts", "GET /posts/{post}", "GET /posts/{post}/comments"]),
    ([200, 200, 200, 200], None, ["GET /events"]),
    ([404, 404, 200, 200], None, ["GET /posts/{draft}", "GET /posts/{draft}/comments"]),
    ([404, 404, 404, 404], None, ["GET /posts/{missing}", "GET /posts/{missing}/comments"]),
    ([401, 201, 201, 201], POST, ["POST /posts"]),
    ([401, 403, 200, 200], {"title": "x"}, ["PATCH /posts/{post}", "PUT /posts/{post}"]),
    ([401, 404, 200, 200], {"title": "x"}, ["PATCH /posts/{draft}", "PUT /posts/{draft}"]),
    ([401, 403, 200, 403], None, ["POST /posts/{post}/publish"]),
    ([401, 404, 200, 403], None, ["POST /posts/{draft}/publish"]),
    ([401, 201, 201, 201], {"text": "x"}, ["POST /posts/{post}/comments"]),
    ([401, 404, 201, 201], {"text": "x"}, ["POST /posts/{draft}/comments"]),
    ([401, 403, 204, 204], None, ["DELETE /comments/{comment}", "DELETE /comments/{reply}"]),
    ([401, 403, 204, 204], None, ["DELETE /posts/{post}"]),
    ([401, 404, 204, 204], None, ["DELETE /posts/{draft}", "DELETE /comments/{note}"]),
    ([401, 404, 404, 404], None, ["DELETE /posts/{missing}", "DELETE /comments/{missing}"]),
]
CALLS = [(call, body, statuses) for statuses, body, calls in PERMISSIONS for call in calls]
OBJECTS = {  # creates what a name in these paths stands for
    "user": lambda owner, other: owner.id,
    "post": lambda owner, other: write_post(owner)["id"],
    "draft": lambda owner, other: write_post(owner, is_published=False)["id"],
    "comment": lambda owner, other: write_comment(other, write_post(owner)["id"])["id"],
    "note": lambda owner, other: write_comment(other, OBJECTS["draft"](owner, other))["id"],
    "reply": lambda owner, other: write_comment(owner, write_post(other)["id"])["id"],
    "missing": lambda owner, other: NEVER,
}


@pytest.fixture(scope="module")
def others(client):
    """Another user and a superuser, whom nothing in the table signs out."""
    return sign_up(client, first_name="Ben"), as_person(client, ADMIN_EMAIL)


@pytest.mark.parametrize(("call", "body", "statuses"), CALLS)
def test_permissions(client, ann, others, call, body, statuses):
    ben, admin = others
    method, path = call.split()
    for api, status in zip((client, ben.api, ann.api, admin.api), statuses, strict=True):
        ids = {name: OBJECTS[name](ann, admin) for name in re.findall(r"{(\w+)}", path)}
        with api.stream(method, path.format(**ids), json=body) as answer:
            assert answer.status_code == status
            text = "" if path == "/events" else answer.read().decode()
        assert "$2b$" not in text
        assert api in (ann.api, admin.api) or ann.email not in text


def test_every_route_has_its_permissions_tested_or_needs_a_token(url, client):
    tested = {re.sub(r"\{\w+\}", "{}", call.partition("?")[0]) for call, *_ in CALLS}
    tested |= {f"POST /auth/{name}" for name in ("register", "login", "refresh", "logout")}
    tested |= {f"POST /auth/{name}-password" for name in ("forgot", "reset")}
    paths = client.get(f"{url}/openapi.json").json()["paths"]
    for path in paths.keys() - {"/", "/health"}:
        for method in paths[path]:
            call = f"{method.upper()} {path.removeprefix(main.API)}"
            if re.sub(r"\{\w+\}", "{}", call) not in tested:
                answer = client.request(method, url + re.sub(r"\{\w+\}", "1", path))
                assert answer.status_code == 401, f"{call} has no guard: add it to PERMISSIONS"


def test_read_only_fields_cannot_be_set(admin):
    post = f"/posts/{write_post(admin)['id']}"
    calls = [("POST", "/auth/register"), ("PATCH", "/users/me"), ("POST", "/posts")]
    calls += [("PATCH", post), ("PUT", post), ("POST", f"{post}/comments"), ("POST", "/users")]
    calls += [("POST", "/auth/forgot-password"), ("POST", "/auth/reset-password")]
    for method, path in calls:
        names = ["id", "author_id", "post_id", "hashed_password", "is_superuser", "created_at"]
        names += [] if path.startswith("/users") else ["role", "is_active"]
        names += ["is_published"] if path == post else []
        answer = admin.api.request(method, path, json=dict.fromkeys(names, 1))
        problems = [problem for problem in answer.json()["detail"] if "extra" in problem["type"]]
        assert {problem["loc"][1] for problem in problems} == set(names)


# --- Cache ----------------------------------------------------------------------------------------

VARY = {"vary": "Origin, Authorization"}
PUBLIC = VARY | {"cache-control": "public, max-age=0, must-revalidate"}


def get_cache_headers(answer):
    names = ["cache-control", "vary", "etag"] + ["x-cache"] * on_sqlite
    return {name: answer.headers[name] for name in names if name in answer.headers}


def test_public_answers_are_cached_and_have_etags(client, ann, monkeypatch):
    post = f"/posts/{write_post(ann)['id']}"
    miss, hit = ({"x-cache": source} if on_sqlite else {} for source in ("miss", "hit"))
    for path in ("/posts", "/posts?size=2", f"{post}/comments", post):
        first = client.get(path, headers=ORIGIN)
        second = client.get(path)
        allowed = [answer.headers.get("access-control-allow-origin") for answer in (first, second)]
        assert allowed == [ORIGIN["Origin"], None]
        assert first.content == second.content
        assert second.headers["content-type"] == "application/json"
        etag = first.headers["etag"]
        expected = PUBLIC | {"etag": etag}
        assert get_cache_headers(first) == expected | miss
        assert get_cache_headers(second) == expected | hit
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = client.get(path, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content) == (304, b"")
            assert get_cache_headers(answer) == expected | hit
        for known in ('"other"', "", etag.strip('"'), f'{etag[:-2]}"'):
            assert client.get(path, headers={"If-None-Match": known}).content == second.content
    monkeypatch.setattr(main.answers, "expires", 0)  # CACHE_SECONDS are over
    assert get_cache_headers(client.get(post)) == expected | miss


def test_private_answers_and_errors_are_never_cached(client, ann):
    post, draft = (f"/posts/{write_post(ann, is_published=p)['id']}" for p in (True, False))
    for path in ("/posts", post, draft, f"{draft}/comments") * 2:
        answer = ann.api.get(path)
        assert answer.status_code == 200
        assert get_cache_headers(answer) == VARY | {"cache-control": "private, no-store"}
    for path in (draft, f"{draft}/comments", f"/posts/{NEVER}", "/posts?size=0") * 2:
        answer = client.get(path, headers={"If-None-Match": "*"})
        assert answer.status_code in (404, 422)
        assert get_cache_headers(answer) == VARY
    for token in ("Bearer junk", "Bearer", "", f"Basic {ann.tokens['access_token']}"):
        assert client.get(post).status_code == 200
        assert client.get(post, headers={"Authorization": token}).status_code == 401


def test_concurrent_reads_are_never_stale_or_private(client, ann):
    draft, post = (f"/posts/{write_post(ann, is_published=p)['id']}" for p in (False, True))

    def write_or_read(reader):
        for number in range(8):
            if reader:
                assert client.get(draft).status_code == 404
                assert client.get(f"{post}/comments").status_code == 200
                continue
            assert ann.api.get(draft).status_code == 200
            changed = ann.api.patch(post, json={"title": f"Number {number}"}).json()
            assert client.get(post).json() == changed
            assert client.get("/posts?size=1").json()["items"] == [changed]
            ann.api.patch("/users/me", json={"first_name": f"{number}"})
            assert client.get(post).json()["author"]["full_name"] == f"{number} Lee"
            client.get(f"{post}/comments")
            comment = write_comment(ann, changed["id"])
            assert client.get(f"{post}/comments").json()["items"][-1] == comment

    at_once(4, write_or_read)


def test_an_answer_begun_before_a_commit_is_not_cached(client, ann, monkeypatch):
    post = write_post(ann)
    path = f"/posts/{post['id']}"
    with hold(monkeypatch, "collect_answer", client.get, path) as slow:
        changed = ann.api.patch(path, json={"title": "New"}).json()
        assert client.get(path).json() == changed
    assert slow.result().json() == post
    assert client.get(path).json() == changed


@sqlite_only
def test_the_current_user_is_cached_until_a_commit(ann, monkeypatch):
    assert ann.api.get("/users/me").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(main, "find_login", None)  # is not called
        write_post(ann)
        assert ann.api.get("/users/me").json()["full_name"] == "Ann Lee"
    ann.api.patch("/users/me", json={"first_name": "Anna"})
    with hold(monkeypatch, "find_login", ann.api.get, "/users/me") as slow:
        assert ann.api.post("/auth/logout").status_code == 204
    assert slow.result().json()["full_name"] == "Anna Lee"
    assert_error(ann.api.get("/users/me"), 401, "INVALID_TOKEN")


@sqlite_only
def test_what_is_remembered_is_bounded():
    async def fill(size):
        for key in range(5_000):
            generation, _ = await memory.get(key)
            memory.keep(key, "x", size, generation)
            assert len(memory.entries) <= 2_000
            assert memory.bytes <= 16 * 2**20

    memory = main.Memory()
    main.memories.remove(memory)
    for size in (1, 9_000):
        asyncio.run(fill(size))


def test_with_cache_seconds_0_nothing_is_cached(client, monkeypatch):
    monkeypatch.setattr(main.settings, "cache_seconds", 0)
    monkeypatch.setattr(main.answers, "generation", main.Generation())
    for answer in client.get("/posts"), client.get("/posts"):
        assert get_cache_headers(answer) == PUBLIC | {"etag": answer.headers["etag"]}
    assert client.get("/posts", headers={"If-None-Match": "*"}).status_code == 304


def test_a_commit_of_your_own_route_makes_what_is_remembered_stale(client, ann, admin):
    path = f"/posts/{write_post(ann)['id']}"
    boss = make_admin(client, admin)
    assert boss.api.get("/users/me").json()["role"] == "admin"
    assert client.get(path).headers.get("x-cache") != "hit"
    assert client.post(f"/own/dismiss/{boss.id}").status_code == 200
    assert boss.api.get("/users/me").json()["role"] == "user"
    assert client.get(path).headers.get("x-cache") != "hit"


# --- Live events ----------------------------------------------------------------------------------

UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
UPGRADE["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="


def test_events_are_only_about_published_posts(client, ann, ben):
    with listen(client) as listener:
        draft = write_post(ann, is_published=False)
        path = f"/posts/{draft['id']}"
        ann.api.patch(path, json={"title": "Still a draft"})
        ann.api.delete(f"/comments/{write_comment(ann, draft['id'])['id']}")
        ann.api.delete(f"/posts/{write_post(ann, is_published=False)['id']}")
        published, _ = (ann.api.post(f"{path}/publish").json() for _ in range(2))
        updated = ann.api.patch(path, json={"title": "New"}).json()
        ann.api.patch(path, json={"title": "Too late", "version": 1})
        ann.api.patch(path, json={})
        comment = write_comment(ben, draft["id"])
        ben.api.delete(f"/comments/{comment['id']}")
        ann.api.delete(path)
        last = write_post(ann)
        assert listener.wait(6) == [
            ("post.published", without_content(published)),
            ("post.updated", without_content(updated)),
            ("comment.created", comment),
            ("comment.deleted", {"id": comment["id"], "post_id": draft["id"]}),
            ("post.deleted", {"id": draft["id"]}),
            ("post.published", without_content(last)),
        ]


ANNOUNCED = [  # calls that are announced
    ("POST", "/posts", POST | {"is_published": True}),
    ("PATCH", "/posts/{post}", {"title": "New"}),
    ("POST", "/posts/{draft}/publish", None),
    ("DELETE", "/posts/{post}", None),
    ("POST", "/posts/{post}/comments", {"text": "x"}),
    ("DELETE", "/comments/{comment}", None),
    ("DELETE", "/users/{user}", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ANNOUNCED)
def test_an_event_is_sent_after_the_commit(ann, ben, admin, monkeypatch, method, path, body):
    write_post(ann)
    ids = {name: make(ann, ben) for name, make in OBJECTS.items() if name in path}
    api = admin.api if "user" in path else ann.api
    steps = []

    async def note(kind, _):
        steps.append(kind)

    async def commit(session, commit=main.AsyncSession.commit):
        await commit(session)
        steps.append("commit")

    async def forget(tables, forget=main.forget):
        await forget(tables)
        steps.append("forget")

    monkeypatch.setattr(main, "listeners", [note])
    monkeypatch.setattr(main, "forget", forget)
    monkeypatch.setattr(main.AsyncSession, "commit", commit)
    assert api.request(method, path.format(**ids), json=body).is_success
    assert (steps[:2], len(steps)) == (["commit", "forget"], 4)  # and once more at the end


def test_a_stream_continues_after_the_last_event_id_or_is_reset(client, ann):
    with listen(client) as listener:
        posts = [write_post(ann)["id"] for _ in range(3)]
        listener.wait(3)
    posts += [write_post(ann)["id"] for _ in range(2)]
    first, _, third = listener.ids
    for headers, query, expected in (
        ({"Last-Event-ID": first}, {}, posts[1:]),
        ({}, {"last_event_id": first}, posts[1:]),
        ({"Last-Event-ID": third}, {"last_event_id": first}, posts[3:]),
        ({"Last-Event-ID": first}, {"post_id": posts[3]}, posts[3:4]),
    ):
        with listen(client, headers, **query) as again:
            assert [post["id"] for _, post in again.wait(len(expected))] == expected
    run, newest = main.events.run, None
    for unknown in ("x", "-", "x-1", f"{run}-", f"{run}-999999", f"{run}--1", f"{run}-1e3"):
        with listen(client, last_event_id=unknown) as anew:
            post = write_post(ann)
            assert anew.wait(2) == [("reset", {}), ("post.published", without_content(post))]
            assert newest in (None, anew.ids[0])  # from which it can go on
            newest = anew.ids[1]


def test_a_slow_client_does_not_delay_others(url, client, ann, ben, monkeypatch):
    async def publish_often(kind, subject):  # more than the buffers of a socket take
        for _ in range(1_500):
            await main.events.publish(kind, subject.id, json.dumps("x" * 5_000))

    post = write_post(ann)["id"]
    with (
        socket.create_connection(url.removeprefix("http://").split(":")) as deaf,
        enter_room(url, ben, post, max_queue=1, close_timeout=0),
        enter_room(url, ben, post) as room,
        listen(client) as listener,
    ):
        deaf.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: len(main.listening) == 4)
        monkeypatch.setattr(main, "listeners", [publish_often])
        ann.api.patch(f"/posts/{post}", json={"content": "New"})
        assert {kind for kind, _ in listener.wait(1_500, 30)} == {"post.updated"}
        assert len(set(listener.ids)) == 1_500
        assert [hear(room)["id"] for _ in range(1_500)] == listener.ids
    with listen(client, last_event_id=listener.ids[499]) as again:
        assert len(again.wait(1_000, 30)) == 1_000
        assert again.ids == listener.ids[500:]
    with listen(client, last_event_id=listener.ids[498]) as too_late:
        assert too_late.wait(1) == [("reset", {})]
    if not on_sqlite:  # from Redis they come one by one: nobody falls behind
        return
    monkeypatch.setattr(main.events, "log", deque(maxlen=100))
    with listen(client) as too_slow:
        ann.api.patch(f"/posts/{post}", json={"content": "Newer"})
        assert too_slow.wait(1) == [("reset", {})]


def test_a_client_has_at_most_60_listeners_and_a_process_1000(url, client, ann, monkeypatch):
    post = write_post(ann)["id"]
    assert main.MAX_LISTENERS == 1_000
    for number in (60, 3):
        wait_until(lambda: not main.listening)  # those before have left
        with ExitStack() as stack:
            stack.enter_context(enter_room(url, ann, post))
            for _ in range(number - 1):
                assert stack.enter_context(client.stream("GET", "/events")).is_success
            for path in ("/events", f"/ws/posts/{post}"):
                answer = ann.api.get(path, headers=UPGRADE if "ws" in path else {})
                assert_error(answer, 503, "UNAVAILABLE")
        monkeypatch.setattr(main, "MAX_LISTENERS", 3)


def test_an_ipv6_network_is_one_client_of_streams(client):
    wait_until(lambda: not main.listening)
    with ExitStack() as stack:
        headers = [{"X-Forwarded-For": f"2001:db8::{number}"} for number in range(1, 62)]
        streams = [client.stream("GET", "/events", headers=header) for header in headers]
        assert [stack.enter_context(stream).status_code for stream in streams] == 60 * [200] + [503]


# --- Rooms ----------------------------------------------------------------------------------------


def get_close_code(room):
    with pytest.raises(ConnectionClosed):  # noqa: PT012
        while True:
            room.recv(5)
    return room.close_code


def say(room, text):
    room.send(json.dumps({"type": "message", "text": text}))


def test_a_room_gets_the_messages_and_events_of_its_post_only(url, client, ann, ben):
    post, other = write_post(ann)["id"], write_post(ann)["id"]
    subprotocols = ["bearer", ben.tokens["access_token"]]  # as a browser sends its token
    with (
        enter_room(url, ann, post) as room,
        enter_room(url, ben, post, additional_headers={}, subprotocols=subprotocols) as same,
        enter_room(url, ben, other) as elsewhere,
        listen(client, post_id=post) as listener,
    ):
        assert same.subprotocol == "bearer"
        say(room, "  Hello\n🐝 ")
        said = {"type": "message", "from": {"id": ann.id, "full_name": "Ann Lee"}}
        assert hear(room) == hear(same) == said | {"text": "Hello\n🐝"}
        write_comment(ben, other)
        write_comment(ben, post)
        ann.api.delete(f"/posts/{post}")
        for (kind, data), event_id in zip(listener.wait(2), listener.ids, strict=True):
            assert hear(room) == hear(same) == {"type": kind, "id": event_id, "data": data}
        assert (get_close_code(room), get_close_code(same)) == (4404, 4404)
        say(elsewhere, "Still here")
        assert [hear(elsewhere)["type"] for _ in range(2)] == ["comment.created", "message"]


def test_a_refused_handshake_is_an_http_error(url, client, ann, ben, monkeypatch):
    post, draft = write_post(ann)["id"], write_post(ann, is_published=False)["id"]
    host = url.removeprefix("http://")
    foreign = ("http://evil.example", "null", host, f"{url}.evil.example", f"http://x/{url}")
    refusals = [
        ({"Authorization": f"Bearer {ben.tokens['refresh_token']}"}, post, 401, "INVALID_TOKEN"),
        ({"Authorization": ""}, post, 401, "INVALID_TOKEN"),
        *(({}, post_id, 404, "NOT_FOUND") for post_id in (draft, NEVER)),
        *(({}, post_id, 422, "VALIDATION_ERROR") for post_id in (0, 2**31, "abc", "%00")),
        *(({"Origin": name}, post, 403, "INSUFFICIENT_PERMISSIONS") for name in foreign),
    ]
    assert_error(client.get(f"/ws/posts/{post}", headers=UPGRADE), 401, "INVALID_TOKEN")
    for headers, post_id, status, code in refusals:
        assert_error(ben.api.get(f"/ws/posts/{post_id}", headers=UPGRADE | headers), status, code)
    for origin in (url, f"https://{host}", "http://localhost:3000"):
        with enter_room(url, ben, post, origin=origin):
            pass
    monkeypatch.setattr(main, "DEFAULT_LIMIT", main.Limit("default", 0, 60))
    assert_error(ben.api.get(f"/ws/posts/{post}", headers=UPGRADE), 429, "RATE_LIMITED")


BAD_FRAMES = ["", "{", "null", "[" * 60_000, '{"type":"message"}', '{"text":"x"}', b"{}", b"\xff"]
BAD_FRAMES += ['{"type":"shout","text":"x"}', '{"type":"message","text":"x","id":1}', "x" * 65_537]
BAD_MESSAGES = ['" "', '"\\u0000"', '"\\ud800"', "1", "null", f'"{"x" * 501}"']
BAD_FRAMES += [f'{{"type":"message","text":{text}}}' for text in BAD_MESSAGES]


def test_an_invalid_message_closes_the_connection(url, ann, ben, caplog):
    post = write_post(ann)["id"]
    with enter_room(url, ann, post) as other:
        for frame in BAD_FRAMES:
            with enter_room(url, ben, post) as room:
                room.send(frame, text=frame == b"\xff" or None)  # text that is not UTF-8
                code = 1007 if frame == b"\xff" else 1009 if len(frame) > 65_536 else 1008
                assert get_close_code(room) == code, frame
        say(other, "x" * 500)
        assert hear(other)["text"] == "x" * 500  # and nothing came before
    assert not [record for record in caplog.records if record.exc_info]


def test_a_user_sends_at_most_20_messages_in_10_seconds(url, ann, ben):
    assert main.CHAT_LIMIT == ("chat", 20, 10)
    post = write_post(ann)["id"]
    with ExitStack() as stack:
        rooms = [stack.enter_context(enter_room(url, person, post)) for person in (ben, ben, ann)]
        for number in range(20):
            say(rooms[number % 2], f"{number}")
            assert [hear(room)["text"] for room in rooms] == [f"{number}"] * 3
        say(rooms[0], "20")
        assert get_close_code(rooms[0]) == 1008


def test_a_connection_is_closed_when_its_access_ends(url, client, ann, ben, admin, monkeypatch):
    assert main.CHECK_SECONDS < 30
    monkeypatch.setattr(main, "CHECK_SECONDS", 0.05)
    eve = sign_up(client)
    post, draft = write_post(ann)["id"], write_post(ann, is_published=False)["id"]
    with ExitStack() as stack:
        places = ((ben, post), (eve, post), (ann, draft), (ann, post))
        rooms = [stack.enter_context(enter_room(url, *place)) for place in places]
        ben.api.post("/auth/logout")
        admin.api.patch(f"/users/{eve.id}", json={"is_active": False})
        ann.api.delete(f"/posts/{draft}")
        assert [get_close_code(room) for room in rooms[:3]] == [4401, 4401, 4404]
        say(rooms[3], "Still here")
        assert hear(rooms[3])["text"] == "Still here"


def test_a_room_stays_open_for_an_overridden_user(url, admin, monkeypatch):
    draft = write_post(admin, is_published=False)["id"]
    user = main.UserRead.model_validate(admin.api.get("/users/me").json())
    monkeypatch.setitem(main.app.dependency_overrides, main.get_optional_user, lambda: user)
    monkeypatch.setattr(main, "CHECK_SECONDS", 0.05)
    with enter_room(url, admin, draft, additional_headers={}) as room, pytest.raises(TimeoutError):
        room.recv(0.3)


# --- Mail -----------------------------------------------------------------------------------------
# Mails by STARTTLS and smtps are in .ci/test_beyond.py, since they need a certificate.


class MailHandler(socketserver.StreamRequestHandler):
    def setup(self):
        super().setup()
        self.wfile.write(b"220 hello\r\n")

    def handle(self):  # as much of SMTP as smtplib needs
        for line in self.rfile:
            self.server.heard.append(line)
            if line == b"data\r\n":
                self.wfile.write(b"354 go on\r\n")
                mail = b"".join(iter(self.rfile.readline, b".\r\n"))
                time.sleep(self.server.seconds)
                self.server.mails.append(message_from_bytes(mail, policy=policy.default))
            is_login = line.startswith(b"AUTH")
            self.wfile.write(b"235 fine\r\n" if is_login else b"250-fine\r\n250 AUTH PLAIN\r\n")


@contextmanager
def run_mail_server(handler):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.seconds, server.heard, server.mails = 0, [], []
        server.address = f"127.0.0.1:{server.server_address[1]}"
        server.mails_to = lambda email: [mail for mail in server.mails if mail["To"] == email]
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield server
        server.shutdown()


@pytest.fixture
def mail_server(monkeypatch):
    with run_mail_server(MailHandler) as server:
        monkeypatch.setattr(main.settings, "smtp_url", main.AnyUrl(f"smtp://{server.address}"))
        yield server


def test_a_welcome_mail_contains_no_user_input(client, mail_server, monkeypatch):
    monkeypatch.setattr(main.settings, "public_url", "https://bees.example/nut")
    monkeypatch.setattr(main.settings, "mail_from", "bees@example.com")
    ann = sign_up(client, first_name="Win at http://evil.example", last_name="Now")
    (mail,) = wait_until(lambda: mail_server.mails_to(ann.email))
    assert (mail["From"], mail["Subject"]) == ("bees@example.com", "Welcome")
    assert "https://bees.example/nut" in mail.get_content()
    assert not re.search("evil|Now", mail.as_string())


def test_closed_registration_is_open_to_superusers(client, admin, mail_server, monkeypatch):
    monkeypatch.setattr(main.settings, "registration", "closed")
    account = {"email": "silent@b.co", "password": PASSWORD, "role": "admin", "is_active": False}
    answer = client.post("/auth/register", json={"email": "a@b.co", "password": PASSWORD})
    assert_error(answer, 403, "INSUFFICIENT_PERMISSIONS")
    user = admin.api.post("/users", json=account).json()
    assert (user["is_superuser"], user["is_active"]) == (True, False)
    assert user == admin.api.get(f"/users/{user['id']}").json()
    admin.api.post("/users?send_welcome=true", json=account | {"email": "greeted@b.co"})
    wait_until(lambda: mail_server.mails_to("greeted@b.co"))
    assert not mail_server.mails_to("silent@b.co")


def test_a_post_is_published_once_and_the_editor_gets_one_mail(client, ann, mail_server):
    draft = write_post(ann, is_published=False)
    path = f"/posts/{draft['id']}"
    published, *again = at_once(5, lambda _: ann.api.post(f"{path}/publish").json())
    changes = {"is_published": True, "version": 2, "updated_at": published["updated_at"]}
    assert published == client.get(path).json() == draft | changes
    assert again == [published] * 4
    ann.api.patch(path, json={"title": "New"})
    other = f"/posts/{write_post(ann)['id']}"
    wait_until(lambda: not main.mail_threads)
    told = "".join(mail.as_string() for mail in mail_server.mails_to("editor@example.com"))
    assert sorted(re.findall(r"http.*/api/v1(/.*)", told)) == sorted([path, other])


def test_without_starttls_no_password_is_sent(client, mail_server, monkeypatch, caplog):
    url = main.AnyUrl(f"smtp://us:hunter2@{mail_server.address}")
    monkeypatch.setattr(main.settings, "smtp_url", url)
    sign_up(client)
    wait_until(lambda: "mail not sent: the server has no STARTTLS" in caplog.text)
    assert {line[:4].lower() for line in mail_server.heard} <= {b"ehlo", b"quit"}
    assert "hunter2" not in caplog.text


def test_many_posts_leave_places_for_mails_to_people(client, ann, mail_server, monkeypatch, caplog):
    wait_until(lambda: not main.mail_threads)
    monkeypatch.setattr(main, "MAX_MAILS", 4)
    mail_server.seconds = 0.5
    at_once(3, lambda _: write_post(ann))
    assert "mail not sent: 2 are under way" in caplog.text
    ben = sign_up(client)
    wait_until(lambda: mail_server.mails_to(ben.email))


def test_where_no_thread_can_be_started_only_the_mail_is_lost(client, monkeypatch, caplog):
    class Thread(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    system = SimpleNamespace(Thread=Thread, current_thread=threading.current_thread)
    with monkeypatch.context() as patch:
        patch.setattr(main, "threading", system)
        sign_up(client)
    assert "mail not sent: the system has no thread left" in caplog.text
    wait_until(lambda: not main.mail_threads)


@pytest.mark.parametrize("user", ["=?utf-8?q?a=40b?=", "=?utf-8?q?a=0d=0a?=", "李", "'a'"])
def test_an_unusual_email_logs_no_traceback(client, mail_server, caplog, user):
    ann = sign_up(client, email=f"{user}@example.com")
    wait_until(lambda: mail_server.mails_to(ann.email) or "mail not sent: " in caplog.text)
    assert ann.email not in caplog.text


def test_mails_without_smtp_are_printed_or_logged_in_production(client, monkeypatch, caplog, capfd):
    ann = sign_up(client)
    wait_until(lambda: not main.mail_threads)
    assert f"--- Mail to {ann.email}: Welcome" in capfd.readouterr().out
    monkeypatch.setattr(main.settings, "environment", "production")
    sign_up(client)
    assert "mail not sent: SMTP_URL is not set" in caplog.text


# --- The gate -------------------------------------------------------------------------------------

VERIFY = "/api/v1/auth/verify"
PATH = "/app?a=1&b=%20"


@pytest.fixture
def browser(url):
    """A client that asks for pages and keeps cookies."""
    with httpx.Client(base_url=url, headers={"Accept": "text/html"}, verify=NO_TLS) as browser:
        yield browser


def sign_in(browser, user, **fields):
    return browser.post("/sign-in", data={"username": user.email, "password": PASSWORD} | fields)


def test_verify_returns_the_user_in_headers_and_refuses_misspelled_parameters(client):
    ann = sign_up(client, email="Ann+%25~李@exämple.com", first_name="Änn %", last_name='"Lee",')
    answer = ann.api.get("/auth/verify")
    assert (answer.status_code, answer.content) == (200, b"")
    assert {name: value for name, value in answer.headers.items() if "remote" in name} == {
        "remote-user": str(ann.id),
        "remote-name": '%C3%84nn %25 "Lee",',
        "remote-email": "ann+%2525~%E6%9D%8E@ex%C3%A4mple.com",
        "remote-groups": "user",
    }
    assert answer.headers["cache-control"] == "private, no-store"
    typos = "Role=admin roles=admin role role= role=Admin role=root role[]=admin x= sign_in"
    doubles = "role=admin&role=user role=user&role=admin sign_in=true&sign_in=true"
    for query in f"{typos} {doubles}".split():
        assert_error(ann.api.get(f"/auth/verify?{query}"), 422, "VALIDATION_ERROR")
    many = "&".join(str(number) for number in range(10_000))
    assert len(client.get(f"/auth/verify?{many}").content) < 1_000  # and not a line for each


def test_a_browser_signs_in_on_the_way_to_an_app(browser, ann):
    answer = browser.get(f"{VERIFY}?sign_in=true", headers={"X-Forwarded-Uri": PATH})
    assert (answer.status_code, answer.headers["cache-control"]) == (302, "private, no-store")
    assert answer.headers["location"] == "/sign-in?next=%2Fapp%3Fa%3D1%26b%3D%2520"
    for address in answer.headers["location"], f"/sign-in?next={PATH}":  # nginx escapes nothing
        assert 'name="next" type="hidden" value="/app?a=1&amp;b=%20"' in browser.get(address).text
    raw = browser.get(f"{VERIFY}?sign_in=true", headers={"X-Forwarded-Uri": "/é".encode()})
    assert raw.headers["location"].endswith("next=%2F%C3%A9")
    answer = sign_in(browser, ann, next=PATH)
    assert (answer.status_code, answer.headers["location"]) == (303, PATH)
    answer = browser.get(VERIFY)
    assert answer.headers["remote-user"] == str(ann.id)
    assert answer.headers["cache-control"] == "private, no-store"
    assert browser.get(f"{VERIFY}?role=admin").status_code == 403
    assert "You are signed in as <b>Ann Lee</b>" in browser.get("/sign-in").text


def test_signing_out_ends_the_session_of_the_cookie_alone(browser, client, ann):
    sign_in(browser, ann)
    cookie = {"Cookie": f"nutshell={browser.cookies['nutshell']}"}
    answer = browser.post("/sign-out")
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    assert not browser.cookies
    assert browser.get(VERIFY, headers=cookie).status_code == 401
    assert 'action="sign-in"' in browser.get("/sign-in").text
    assert browser.post("/sign-out").status_code == 303
    assert ann.api.get("/users/me").status_code == 200


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("sign_in=true", {"Accept": "application/json"}),
        ("sign_in=true", {"X-Forwarded-Method": "POST"}),
        ("sign_in=false", {}),
        ("", {}),
    ],
)
def test_only_a_browser_that_opens_a_page_is_led_to_sign_in(browser, query, headers):
    assert_error(browser.get(f"{VERIFY}?{query}", headers=headers), 401, "INVALID_TOKEN")


def test_the_cookie_lives_as_long_as_its_session_and_is_secure_on_https(production):
    form = {"username": sign_up(production).email, "password": PASSWORD}
    https = {"X-Forwarded-Proto": "https"}
    answer = production.post(production.base_url.join("/sign-in"), data=form, headers=https)
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    claims = jwt.get_unverified_claims(cookie.partition("=")[2])
    assert 259_190 < claims["exp"] - claims["iat"] <= 259_200
    assert sorted(attributes) == ["HttpOnly", "Max-Age=259200", "Path=/", "SameSite=lax", "Secure"]


def test_a_wrong_password_shows_the_page_again(browser, ann):
    answer = sign_in(browser, ann, password=NEW_PASSWORD, next=PATH)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert 'role="alert">Wrong email or password<' in answer.text
    assert f'value="{ann.email}"' in answer.text
    assert 'value="/app?a=1&amp;b=%20"' in answer.text
    assert not browser.cookies
    answer = browser.post("/sign-in", data={"username": '"><script>', "password": PASSWORD})
    assert 'value="&quot;&gt;&lt;script&gt;"' in answer.text
    form = {"username": (None, "+2AA-"), "password": (None, PASSWORD), "token": (None, "+2AA-")}
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=utf-7"}  # half a pair
    for path in "/sign-in", "/reset-password":
        assert browser.post(path, files=form, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["", "app", "//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example"]
    + ["/\t/evil.example", "/\n/evil.example", " //evil.example", "/" + "a" * 3_000]
    + ["https://evil.example", "https:evil.example", "javascript:alert(1)", "/\r\nX: y"],
)
def test_next_never_leaves_this_host(browser, ann, path):
    for query in path, quote(path, safe=""):
        with suppress(httpx.InvalidURL):
            page = browser.get(f"/sign-in?next={query}").text
            assert 'name="next" type="hidden" value="/">' in page
    assert sign_in(browser, ann, next=path).headers["location"] == "/"


def test_a_cookie_is_no_token_and_a_token_is_no_cookie(browser, ann):
    sign_in(browser, ann)
    cookie = browser.cookies["nutshell"]
    assert (browser.get(VERIFY).status_code, ann.api.get("/users/me").status_code) == (200, 200)
    for path in "/api/v1/users/me", "/api/v1/posts", VERIFY:
        answer = browser.get(path, headers={"Authorization": f"Bearer {cookie}"})
        assert_error(answer, 401, "INVALID_TOKEN")
    assert_error(browser.post("/api/v1/posts", json=POST), 401, "INVALID_TOKEN")
    for kind in "access_token", "refresh_token":
        browser.cookies.set("nutshell", ann.tokens[kind])
        assert_error(browser.get(VERIFY), 401, "INVALID_TOKEN")


def test_a_cookie_ends_with_its_user(browser, ann, admin, caplog):
    sign_in(browser, ann)
    admin.api.patch(f"/users/{ann.id}", json={"role": "admin"})
    assert browser.get(f"{VERIFY}?role=admin").status_code == 200
    assert f"user {ann.id}: role changed by user {admin.id}" in caplog.text
    admin.api.patch(f"/users/{ann.id}", json={"is_active": False})
    answer = browser.get(f"{VERIFY}?sign_in=true")  # a cookie that is no longer good counts as none
    assert answer.headers["location"] == "/sign-in?next=%2F"


FORMS = {
    "/sign-in": {"username": "nobody@example.com", "password": PASSWORD},
    "/sign-out": {},
    "/forgot-password": {"email": "nobody@example.com"},
    "/reset-password": {"token": "x", "password": PASSWORD},
}


@pytest.mark.parametrize(("path", "form"), FORMS.items())
def test_the_form_of_another_site_is_refused(browser, url, path, form):
    for origin in "http://evil.example", "null", f"{url}.evil.example":
        answer = browser.post(path, data=form, headers={"Origin": origin})
        assert_error(answer, 403, "INSUFFICIENT_PERMISSIONS")
    assert browser.post(path, data=form, headers={"Origin": url}).status_code in (200, 303, 401)


def test_pages_have_no_script_and_stay_out_of_frames_and_caches(browser, ann):
    answers = [browser.get(path) for path in ("/sign-in", "/forgot-password", "/reset-password")]
    answers += [browser.post(path, data=form) for path, form in FORMS.items()]
    answers.append(sign_in(browser, ann))
    assert {a.headers["cache-control"] for a in answers} == {"private, no-store"}
    for answer in [a for a in answers if not a.is_redirect]:
        policy = answer.headers["content-security-policy"]
        assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
        assert "script" not in answer.text + policy


def test_forms_are_limited_like_logins_and_looking_at_them_is_not(client, browser, monkeypatch):
    set_limits(monkeypatch, auth="2/minute")
    for path, form in FORMS.items():
        assert [browser.get(path.replace("out", "in")).status_code for _ in range(5)] == [200] * 5
        assert browser.post(path, data={"next": 17_000 * "x"}).status_code == 413
        answers = [browser.post(path, data=form).status_code for _ in range(3)]
        assert (429 in answers) == (path != "/sign-out")
        set_limits(monkeypatch, auth="2/minute")
    for path in "/auth/forgot-password", "/auth/reset-password":
        assert [client.post(path).status_code for _ in range(3)] == [422, 422, 429]
        set_limits(monkeypatch, auth="2/minute")


# --- Forgotten passwords --------------------------------------------------------------------------


def forget(client, email):
    answer = client.post("/auth/forgot-password", json={"email": email})
    assert (answer.status_code, answer.text) == (202, "null")


def get_links(mail_server, user, number=1):
    wait_until(lambda: len(mail_server.mails_to(user.email)) >= number)
    mails = [mail.get_payload() for mail in mail_server.mails_to(user.email)]
    link = rf"(?m)^{main.settings.public_url}/reset-password\?token=(\S+)\s*$"
    return re.findall(link, "".join(mails))


def reset(client, token, password=NEW_PASSWORD):
    return client.post("/auth/reset-password", json={"token": token, "password": password})


def test_a_link_is_for_one_new_password(client, ann, mail_server, caplog, monkeypatch):
    monkeypatch.setattr(main.settings, "public_url", "https://bees.example/nut")
    for host in "localhost", "evil.example":
        client.post("/auth/forgot-password", json={"email": ann.email}, headers={"Host": host})
    first, second = get_links(mail_server, ann, 2)
    claims = jwt.get_unverified_claims(first)
    assert claims["exp"] - claims["iat"] == 30 * 60
    assert_error(reset(client, first, "password"), 422, "VALIDATION_ERROR")
    assert reset(client, first).status_code == 204
    assert f"user {ann.id}: password changed by a link" in caplog.text
    assert_signed_out(client, ann.tokens)
    assert try_login(client, ann.email, PASSWORD).status_code == 401
    assert try_login(client, ann.email, NEW_PASSWORD).status_code == 200
    for token in first, second:
        assert_error(reset(client, token), 401, "INVALID_TOKEN")


def test_forgot_password_does_not_reveal_who_has_an_account(client, ann, admin, mail_server):
    admin.api.patch(f"/users/{ann.id}", json={"is_active": False})
    for email in ann.email, "nobody@example.com", ADMIN_EMAIL.upper():
        forget(client, email)
    wait_until(lambda: mail_server.mails_to(ADMIN_EMAIL))
    assert len(mail_server.mails) == 1


@pytest.mark.parametrize(
    "change", [{"email": "new@b.co"}, {"password": "another-horse"}, {"is_active": False}, {}]
)
def test_a_link_ends_when_the_account_changes(client, ann, admin, mail_server, change):
    forget(client, ann.email)
    (token,) = get_links(mail_server, ann)
    method = "PATCH" if change else "DELETE"
    assert admin.api.request(method, f"/users/{ann.id}", json=change).is_success
    assert_error(reset(client, token), 401, "INVALID_TOKEN")


def test_a_link_ends_after_half_an_hour(client, ann, mail_server, monkeypatch):
    monkeypatch.setattr(main, "RESET_MINUTES", -1)
    forget(client, ann.email)
    (token,) = get_links(mail_server, ann)
    assert_error(reset(client, token), 401, "INVALID_TOKEN")


def test_a_forgotten_password_is_changed_in_a_browser(browser, ann, mail_server):
    assert 'href="forgot-password"' in browser.get("/sign-in").text
    answer = browser.post("/forgot-password", data={"email": ann.email})
    assert (answer.status_code, "a link is under way" in answer.text) == (200, True)
    (token,) = get_links(mail_server, ann)
    form = {"token": token, "password": "password"}
    assert f'value="{token}"' in browser.get(f"/reset-password?token={token}").text
    answer = browser.post("/reset-password", data=form)
    assert (answer.status_code, 'role="alert">Choose another' in answer.text) == (422, True)
    answer = browser.post("/reset-password", data=form | {"password": NEW_PASSWORD})
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    assert sign_in(browser, ann, password=NEW_PASSWORD).status_code == 303
    answer = browser.post("/reset-password", data=form | {"password": NEW_PASSWORD})
    assert (answer.status_code, "This link was used before" in answer.text) == (401, True)


# --- Demo -----------------------------------------------------------------------------------------

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def test_the_demo_has_data_and_its_end_waits_for_mails_and_deletes_it(tmp_path, mail_server):
    mail_server.seconds = 0.5
    with run_main(tmp_path, DEMO="true", SMTP_URL=f"smtp://{mail_server.address}") as client:
        lines = re.findall("^sign in +(.+)$", client.read_log(), re.MULTILINE)
        page = client.get(client.base_url.join("/"), headers=BROWSER).text
        assert re.findall("Sign in as (\\w+)\\s+<mark>(\\w+)", page)[2] == ("Cleo", "admin")
        ann, _, cleo = (as_person(client, *line.split()[:2]) for line in lines)
        roles = [user["role"] for user in cleo.api.get("/users").json()["items"]]
        assert roles == ["user", "user", "admin"]
        posts = client.get("/posts?sort=-created_at").json()["items"]
        comments = [client.get(f"/posts/{post['id']}/comments").json() for post in posts]
        assert [post["id"] for post in posts] == list(range(12, 0, -1))
        assert all(post["updated_at"] == post["created_at"] for post in posts)
        assert sum(page["total"] for page in comments) >= 10
        story = [[post, *page["items"]] for post, page in zip(posts, comments, strict=True)]
        times = [[datetime.fromisoformat(one["created_at"]) for one in part] for part in story]
        ages = [[main.utc_now() - time for time in part] for part in times]
        assert ages[0][0] < timedelta(minutes=1.5)
        assert timedelta(days=4.5) < ages[11][0] < timedelta(days=5.5)
        assert all(older[0] > newer[0] * 1.5 for newer, older in pairwise(ages))
        ages = [age for part in reversed(ages) for age in part]
        assert [*ages, timedelta(0)] == sorted([*ages, timedelta(0)], reverse=True)
        about = client.get(client.base_url.join("/openapi.json")).json()["info"]["description"]
        assert all(part in about for line in lines for part in line.split())
        assert "everybody who reaches" not in client.read_log()
        assert not ann.api.get("/users/me/posts").json()["items"][0]["is_published"]
        with enter_room(str(client.base_url.join("/"))[:-1], ann, 1) as room:
            room.send("x" * 65_537)
            assert get_close_code(room) == 1009
        client.post("/auth/register", json={"email": "wait@b.co", "password": PASSWORD})
        assert not mail_server.mails_to("wait@b.co")  # it is sent after the response
    assert mail_server.mails_to("wait@b.co")
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_a_demo_that_others_reach_warns_that_its_passwords_are_known(tmp_path, development):
    with run_main(tmp_path, DEMO="true", HOST="0.0.0.0", LOG_LEVEL="warning") as client:  # noqa: S104
        assert re.search("(?m)^warning .+ knows these passwords$", client.read_log())
        assert re.search("(?m)^admin +cleo@example.com$", client.read_log())
    assert " INFO " not in client.read_log()
    assert "knows these passwords" not in development.read_log()


# --- The page -------------------------------------------------------------------------------------


def test_the_root_is_json_for_programs_and_a_page_for_browsers(url, client, production):
    assert production.get(production.base_url.join("/"), headers=BROWSER).json() == {"status": "ok"}
    for accept in ("", "*/*", "application/json", "text/plain"):
        answer = client.get(url, headers={"Accept": accept})
        assert (answer.json(), answer.headers["vary"]) == ({"status": "ok"}, "Accept")
    assert client.head(url, headers=BROWSER).headers["content-type"] == "text/html; charset=utf-8"
    pages = [client.get(url, headers=BROWSER) for _ in range(2)]
    nonces = [set(re.findall('<(?:style|script) nonce="(.{22,}?)"', page.text)) for page in pages]
    assert nonces[0] != nonces[1]
    for page, (nonce,) in zip(pages, nonces, strict=True):
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["vary"] == "Accept"
        policy = page.headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        assert {"base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} < set(policy)
        assert {"connect-src 'self'", "require-trusted-types-for 'script'"} < set(policy)
        assert policy[-2:] == [f"{kind}-src 'nonce-{nonce}'" for kind in ("script", "style")]
        assert not re.search("""https?:|["'`]/(api|docs)""", page.text)


# --- python main.py -------------------------------------------------------------------------------


def try_own_application():
    assert not list(Path(FOLDER).iterdir())  # the import makes no file

    @main.app.get("/shop")
    def get_email(me: main.CurrentUser) -> str:
        """Get Email

        Of who buys."""
        return me.email

    main.app.get("/pay", name="pay", summary="Pay now")(get_email)
    main.app.get("/leave", name="leave_shop")(lambda: None)
    parent = FastAPI(lifespan=main.lifespan)
    parent.mount("/nut", main.app)
    for app, root in ((main.app, ""), (main.app, ""), (parent, "/nut")):
        with TestClient(app) as client:
            form = {"username": ADMIN_EMAIL, "password": PASSWORD}
            login = client.post(f"{root}/api/v1/auth/login", data=form)
            assert login.headers["ratelimit"].startswith('"auth"')
            headers = {"Authorization": f"Bearer {login.json()['access_token']}"}
            assert client.get(f"{root}/shop", headers=headers).json() == ADMIN_EMAIL
            assert client.get(f"{root}/shop").json()["error_code"] == "INVALID_TOKEN"
            post = POST | {"is_published": True}
            answer = client.post(f"{root}/api/v1/posts", json=post, headers=headers)
            reads = [client.get(answer.headers["location"]) for _ in range(2)]
            assert [answer.headers["x-cache"] for answer in reads] == ["miss", "hit"]
            room = f"{root}/api/v1/ws/posts/{answer.json()['id']}"
            with client.websocket_connect(room, headers=headers) as socket:
                socket.send_json({"type": "message", "text": "Hello"})
                assert socket.receive_json()["text"] == "Hello"
            paths = client.get(f"{root}/openapi.json").json()["paths"]
            abouts = [paths[path]["get"] for path in ("/shop", "/pay", "/leave")]
            assert [(about["summary"], about.get("description")) for about in abouts] == [
                ("Get Email", "Of who buys."),
                ("Pay now", "Get Email\n\nOf who buys."),
                ("Leave Shop", None),
            ]
            assert client.get(f"{root}/docs/swagger-ui.css").status_code == 200
        main.settings.first_superuser_password = NEW_PASSWORD  # not for an admin that exists


@sqlite_only
def test_your_own_routes_work_in_test_client_and_mounted():
    command = [sys.executable, "-c", "import test_main; test_main.try_own_application()"]
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    ended = subprocess.run(command, timeout=60, **options)  # one app lives in one event loop
    assert ended.returncode == 0, ended.stderr


def test_the_start_prints_its_addresses_and_folder(development):
    log = development.read_log()
    lines = dict(re.findall(r"(?m)^(\w+) {2,}(.+)", log))
    address = f"http://{socket.gethostname()}:{development.base_url.port}"
    assert (lines["Nutshell"], lines["docs"]) == (address, f"{address}/docs")
    assert Path(lines["data"]).exists()
    assert "FIRST_SUPERUSER_EMAIL" in lines["admin"]
    assert main.find_spec("opentelemetry.sdk") or "fastapi[opentelemetry]" in log


SQLITE = "sqlite+aiosqlite:///"
LACKS_INDEX = '(?s)(?!.*Traceback).* ERROR .* "comment" .* "ix_comment_.*'
PORT_TAKEN = r"PORT: \d+ is in use\. Stop what runs there, or set another PORT\n"
FAILING_STARTS = [
    ("uvicorn main:app", {"PORT": "abc", "DEMO": "maybe"}, "DEMO: .*\nPORT: .*\n"),
    ("main", {"DATABASE_URL": f"{SQLITE}old.db"}, '.* "post" .* "created_at".* old.db\n.*\n'),
    ("uvicorn main:app", {"DATABASE_URL": f"{SQLITE}older.db"}, LACKS_INDEX),
    ("main", {"DATABASE_URL": f"{SQLITE}/nowhere/a.db"}, "(?s).*Traceback .*/nowhere/a.db.*"),
    ("main", {"DATABASE_URL": f"{SQLITE}short.db"}, ".* SECRET_KEY: .* 32 bytes\n.*\n"),
    ("main", {"HOST": "203.0.113.1"}, r"HOST, PORT: .*assign.*\n"),  # not of this machine
    ("main", {}, PORT_TAKEN),  # by the server of these tests
    ("main", {"HOST": "localhost"}, PORT_TAKEN),
]


def test_a_start_that_fails_says_why(tmp_path, url):
    with closing(sqlite3.connect(tmp_path / "old.db")) as old:
        old.execute("CREATE TABLE post (id INTEGER PRIMARY KEY, title TEXT)")
    with closing(sqlite3.connect(tmp_path / "older.db")) as older:  # it lacks an index
        older.execute("CREATE TABLE comment (id, text, post_id, author_id, created_at, updated_at)")
    (tmp_path / "short.db.key").write_text("hunter2")
    common = {"PORT": str(free_port()), "PYTHONPATH": str(Path(main.__file__).parent)}

    def start(number):
        module, settings, problem = FAILING_STARTS[number]
        port = {"PORT": url.rpartition(":")[2]} if "in use" in problem else {}
        options = {"cwd": tmp_path, "env": ENVIRONMENT | common | settings | port, "text": True}
        command = [sys.executable, "-m", *module.split()]
        return subprocess.run(command, timeout=60, capture_output=True, **options)

    for number, ended in enumerate(at_once(len(FAILING_STARTS), start)):
        assert re.fullmatch(FAILING_STARTS[number][2], ended.stderr), ended.stderr
        assert ended.returncode == (1 if ended.stderr.startswith("Traceback") else 3)
    assert not (tmp_path / "app.db").exists()
