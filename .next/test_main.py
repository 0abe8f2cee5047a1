"""What Nutshell promises, and an example of how to test FastAPI.

One server runs in a thread of this process, with a database in a temporary folder. Tests talk to it
as a stranger would, over HTTP; constants of main are changed instead of waited for.
"""

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from websockets.sync.client import connect

FOLDER = tempfile.TemporaryDirectory(prefix="nutshell-test-")
ADMIN_EMAIL = "admin@example.com"
PASSWORD = "correct-horse"
SETTINGS = {
    "DATABASE_URL": f"sqlite+aiosqlite:///{FOLDER.name}/test.db",
    "BCRYPT_ROUNDS": "4",  # fast, and good for tests alone
    "RATE_LIMIT": "1000000/minute",
    "AUTH_RATE_LIMIT": "1000000/minute",
    "FIRST_SUPERUSER_EMAIL": ADMIN_EMAIL,
    "FIRST_SUPERUSER_PASSWORD": PASSWORD,
    "ADMIN_EMAIL": "editor@example.com",
}
if "TEST_DATABASE_URL" in os.environ:  # the same promises on PostgreSQL
    SETTINGS["DATABASE_URL"] = os.environ["TEST_DATABASE_URL"]
    SETTINGS["SECRET_KEY"] = "a key of at least 32 bytes for tests"
os.environ.update(SETTINGS)

import main  # noqa: E402  main reads its settings when it is imported

# --- Helpers --------------------------------------------------------------------------------------
# Verbs that the tests below are written in.

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would read all certificates each time
numbers = count(1)
open_clients = ExitStack()
on_sqlite = main.settings.sqlite_file is not None
sqlite_only = pytest.mark.skipif(not on_sqlite, reason="it is about SQLite, or about its memory")


class Person(NamedTuple):
    """Somebody with an account. `api` sends their access token."""

    id: int
    email: str
    api: httpx.Client
    tokens: dict[str, Any]


def wait_until(condition, seconds=5):
    """What the condition returns, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
    return found


def at_once(number, work):
    """What so many calls return that are made at the same time."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(work, range(number)))


def hold_result(monkeypatch, name):
    """The next call of a function of main does its work, but returns only when it may."""
    work, begun, may_return = getattr(main, name), threading.Event(), threading.Event()

    async def held(*args):
        result = await work(*args)
        monkeypatch.setattr(main, name, work)
        begun.set()
        await asyncio.to_thread(may_return.wait, 5)
        return result

    monkeypatch.setattr(main, name, held)
    return begun, may_return


@pytest.fixture(scope="session")
def url():
    """A server as `python main.py` starts it."""
    options = {"access_log": False, "log_config": None, "ws_max_size": 64 * 1024}
    config = uvicorn.Config(main.app, port=0, timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    open_clients.close()
    server.should_exit = True
    thread.join()
    FOLDER.cleanup()


@pytest.fixture(scope="session")
def client(url):
    """Somebody without an account."""
    with httpx.Client(base_url=f"{url}/api/v1", timeout=10) as client:
        yield client


def log_in(client, email, password=PASSWORD):
    answer = client.post("/auth/login", data={"username": email, "password": password})
    assert answer.status_code == 200, answer.text
    return answer.json()


def as_person(client, email, password=PASSWORD):
    """Signs in somebody who has an account."""
    tokens = log_in(client, email, password)
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    api = httpx.Client(base_url=client.base_url, headers=headers, timeout=10, verify=NO_TLS)
    open_clients.enter_context(api)
    return Person(api.get("/users/me").json()["id"], email, api, tokens)


def sign_up(client, **fields):
    """A new account, and its person signed in."""
    body = {"email": f"person{next(numbers)}@example.com", "password": PASSWORD} | fields
    answer = client.post("/auth/register", json=body)
    assert answer.status_code == 201, answer.text
    return as_person(client, body["email"].lower(), body["password"])


@pytest.fixture(scope="session")
def admin(client):
    return as_person(client, ADMIN_EMAIL)


def write_post(author, **fields):
    """A published post, unless the fields say otherwise."""
    body = {"title": "Bees", "content": "They hum.", "is_published": True} | fields
    answer = author.api.post("/posts", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def write_comment(author, post_id, text="Mine too."):
    answer = author.api.post(f"/posts/{post_id}/comments", json={"text": text})
    assert answer.status_code == 201, answer.text
    return answer.json()


def assert_error(answer, status, code):
    """The one shape of all errors."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"detail", "error_code", "request_id"}
    assert body["error_code"] == code
    assert body["request_id"] == answer.headers["x-request-id"]


class Listener:
    """Hears the events of a stream: `.events` is a list of (kind, data)."""

    def __init__(self, client, headers, **params):
        self.events = []
        self.ids = []
        self.request = client.stream("GET", "/events", params=params, headers=headers)

    def __enter__(self):
        self.response = self.request.__enter__()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        return self

    def read(self):
        fields = {}
        try:
            for line in self.response.iter_lines():
                name, _, value = line.partition(": ")
                fields[name] = value
                if not line and "event" in fields:
                    self.ids.append(fields["id"])
                    self.events.append((fields["event"], json.loads(fields["data"])))
                    fields = {}
        except (httpx.TransportError, httpx.StreamError):
            pass  # the test is over

    def wait(self, number):
        """The first so many events."""
        wait_until(lambda: len(self.events) >= number)
        return self.events

    def __exit__(self, *error):
        stream = self.response.extensions["network_stream"]
        with suppress(OSError):  # the server has hung up already
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.thread.join()
        self.request.__exit__(None, None, None)


def listen(client, last_event_id="", **params):
    """`with listen(client) as listener:` hears what happens inside."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    return Listener(client, headers, **params)


def enter_room(url, person, post_id, **options):
    """A WebSocket in the room of a post."""
    address = url.replace("http://", "ws://") + f"/api/v1/ws/posts/{post_id}"
    headers = {"Authorization": person.api.headers["Authorization"]}
    return connect(address, **{"additional_headers": headers} | options)


@contextmanager
def run_main(folder, **settings):
    """`python main.py` with other settings, in an empty folder. Yields its address and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment = plain | {"PORT": port, "BCRYPT_ROUNDS": "4"} | settings
    command = [sys.executable, str(Path(main.__file__).absolute())]
    log = open(folder / "log", "w+")  # noqa: SIM115
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or is_healthy(address), 20)
        yield address, process
    finally:
        process.terminate()
        process.wait(10)
        log.close()


probe = httpx.Client(headers={"Connection": "close"})  # to make one for each try takes long


def is_healthy(address):
    try:
        return probe.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


# --- Accounts -------------------------------------------------------------------------------------


def test_a_new_account_is_shown_to_its_owner(client):
    body = {"email": "Ann@Example.com", "password": PASSWORD, "first_name": " Ann ", "age": 36}
    answer = client.post("/auth/register", json=body)
    assert answer.status_code == 201
    account = answer.json()
    assert account.pop("id") > 0
    assert account.pop("created_at").endswith("Z")
    assert account.pop("updated_at").endswith("Z")
    assert account == {
        "email": "ann@example.com",
        "first_name": "Ann",
        "last_name": None,
        "full_name": "Ann",
        "age": 36,
        "bio": None,
        "avatar_url": None,
        "role": "user",
        "is_superuser": False,
        "is_active": True,
    }


def test_an_email_has_one_account_whatever_its_case(client):
    ann = sign_up(client)
    body = {"email": ann.email.upper(), "password": PASSWORD}
    assert_error(client.post("/auth/register", json=body), 409, "EMAIL_TAKEN")


def test_listeners_hear_of_published_posts(client):
    ann = sign_up(client)
    with listen(client) as listener:
        post = write_post(ann)
        (kind, data), *_ = listener.wait(1)
    assert kind == "post.published"
    assert data == {name: value for name, value in post.items() if name != "content"}


def test_people_in_a_room_hear_each_other(url, client):
    ann, ben = sign_up(client, first_name="Ann"), sign_up(client)
    post = write_post(ann)
    with enter_room(url, ann, post["id"]) as room, enter_room(url, ben, post["id"]) as other:
        room.send('{"type": "message", "text": "Hello"}')
        said = {"type": "message", "from": {"id": ann.id, "full_name": "Ann"}, "text": "Hello"}
        assert json.loads(room.recv(5)) == said
        assert json.loads(other.recv(5)) == said


def test_python_main_starts_a_server(tmp_path):
    with run_main(tmp_path) as (address, process):
        assert httpx.get(f"{address}/health").json() == {"status": "healthy"}
