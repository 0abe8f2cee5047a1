"""What the tests beside this file share: README, services, databases, proxies, a browser."""
# ruff: noqa: S101, S603

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path
from typing import NamedTuple

import httpx
import redis
from websockets.sync.client import connect

import test_main
from test_main import PASSWORD, SETTINGS, at_once, free_port, is_healthy, wait_until

ROOT = Path(test_main.__file__).parent
MAIN = [sys.executable, str(ROOT / "main.py")]
UVICORN = [sys.executable, "-m", "uvicorn"]
KEY = "a key of at least 32 bytes for tests"
README = (ROOT / "README.md").read_text()


def blocks(kind, text):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def in_readme(kind, word=""):
    """The block of README that is of this kind and has this word."""
    (block,) = (block for block in blocks(kind, README) if word in block)
    return block


def is_listening(port):
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
        return True


def megabytes(process_id):
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def time_of(work):
    started = time.monotonic()
    work()
    return time.monotonic() - started


def patience():
    """How many times longer than on an idle machine work takes here that keeps all cores busy."""

    def work(_):
        started, cpu = time.monotonic(), time.thread_time()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000)
        return (time.monotonic() - started) / (time.thread_time() - cpu)

    return max(1, *at_once(os.cpu_count(), work))


def times_of_reads(service, seconds=3):
    """The median, and the one that one of a hundred exceeds."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        times.append(time_of(lambda: service.client.get("/posts").raise_for_status()))
        time.sleep(0.005)
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def requests_per_second(service, path, person, body, folder):
    script = 'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
    (folder / "post.lua").write_text(f"{script}wrk.body = {json.dumps(json.dumps(body))}")
    command = ["wrk", "-t1", "-c32", "-d2s", service.url + path]
    command += ["-s", folder / "post.lua"] if body else []
    if body or path.endswith("/me"):
        command += ["-H", f"Authorization: {person.api.headers['Authorization']}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in told, told
    return float(re.search(r"Requests/sec: +([\d.]+)", told)[1])


def send_raw(port, lines, body="", address="127.0.0.1"):
    """A connection on which a request was sent. Little of the answer arrives until it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.bind((address, 0))
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"{lines}\r\nHost: x\r\n\r\n{body}".encode())
    return closing(connection)


class Service(NamedTuple):
    """A server of its own, in a folder of its own."""

    url: str
    port: int
    process: subprocess.Popen
    client: httpx.Client  # somebody without an account
    folder: Path
    seconds: float  # that the start took

    def log(self):
        return (self.folder / "log").read_text()

    def sql(self, script):
        with closing(sqlite3.connect(self.folder / "app.db", timeout=10)) as connection, connection:
            return connection.execute(script).fetchall()

    def stop(self):
        self.process.terminate()
        return self.process.wait(10)


def environment(**settings):
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    plain |= {"BCRYPT_ROUNDS": "4", "RATE_LIMIT": "off", "AUTH_RATE_LIMIT": "off"}
    plain["PORT"] = str(free_port())  # 8000 may be taken on this machine
    return plain | {"PYTHONPATH": str(ROOT)} | settings


@contextmanager
def run(*command, **options):
    """A program beside this one, until the end of the block."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def serve(folder, *command, prefix="", port=None, **settings):
    """`python main.py`, or another command; its database is app.db in the folder. Whatever it is
    asked for, and when it is stopped, its log has no traceback."""
    folder.mkdir(exist_ok=True)
    port = port or free_port()
    url = f"http://127.0.0.1:{port}{prefix}"
    env = environment(PORT=str(port), UVICORN_PORT=str(port), **settings)
    limits = httpx.Limits(max_connections=300)
    with (
        (folder / "log").open("a") as log,
        run(*(command or MAIN), cwd=folder, env=env, stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"{url}/api/v1", timeout=30, limits=limits) as client,
    ):
        started = time.monotonic()
        wait_until(lambda: process.poll() is not None or is_healthy(url), 30)
        assert process.poll() is None, (folder / "log").read_text()
        yield Service(url, port, process, client, folder, time.monotonic() - started)
    assert "Traceback" not in (folder / "log").read_text()


class Postgres:
    """A cluster of its own. PostgreSQL refuses to run as root."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="nutshell-postgres-")
        self.port = free_port()
        self.options = {"cwd": self.folder, "stderr": subprocess.DEVNULL}
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
            self.options |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        command = self.command("initdb", "-A trust -U postgres -D data -N")
        subprocess.run(command, **self.options, check=True, stdout=subprocess.DEVNULL)
        self.start()

    def command(self, program, options):
        return [sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))[-1], *options.split()]

    def start(self):
        options = f"-D data -F -p {self.port} -k {self.folder} -c max_connections=200"
        command = self.command("postgres", f"{options} -c listen_addresses=127.0.0.1")
        self.process = subprocess.Popen(command, **self.options)
        wait_until(lambda: self.psql("SELECT 1") == "1", 20)

    def stop(self):
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(10)

    def signal(self, number):
        """Sends a signal to all of its processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for process in (self.process.pid, *children.split()):
            os.kill(int(process), number)

    def psql(self, sql, database="postgres"):
        server = f"-h {self.folder} -p {self.port} -U postgres -qAt -d {database} -c"
        command = [*self.command("psql", server), sql]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def settings(self, database):
        """For a service with a database that is new."""
        self.psql(f"CREATE DATABASE {database}")
        url = f"postgresql+asyncpg://postgres:hunter2@127.0.0.1:{self.port}/{database}"
        return {"DATABASE_URL": url, "SECRET_KEY": KEY}


class Redis:
    """A server of its own that keeps nothing on the disk."""

    def __init__(self):
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: is_listening(self.port))

    def stop(self):
        self.process.kill()
        self.process.wait(10)

    def configure(self, name, value, password=None):
        with redis.Redis(port=self.port, password=password) as client:
            client.config_set(name, value)

    def lock(self):
        """All have to connect anew, and then need a password."""
        with redis.Redis(port=self.port) as client:
            client.config_set("requirepass", "hunter2")
            client.client_kill_filter(_type="normal")

    def flush(self):
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def spoil(self):
        """Puts in what is not ours."""
        with redis.Redis(port=self.port) as client:
            client.mset({f"nutshell:generation:{number}": b"\xff\xfe" for number in range(2)})
            client.xadd("nutshell:events", {"foo": "bar"})

    def count_events(self, more):
        """How many the stream holds after so many more, which nobody listens to."""
        event = {"kind": "post.deleted", "post_id": 1, "data": "{}"}
        with redis.Redis(port=self.port) as client:
            pipeline = client.pipeline()
            for _ in range(more):
                pipeline.xadd("nutshell:events", event)
            pipeline.execute()
            return client.xlen("nutshell:events")

    def count_commands(self):
        with redis.Redis(port=self.port) as client:
            return client.info("stats")["total_commands_processed"]

    def allow(self, user, is_allowed):
        with redis.Redis(port=self.port) as client:
            client.acl_setuser(user, enabled=is_allowed, nopass=True, keys="*", commands=["+@all"])
            if not is_allowed:
                client.client_kill_filter(user=user)


class Echo(BaseHTTPRequestHandler):
    """An app behind a proxy: it answers with the headers that it was sent."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.headers.items()).encode())

    do_POST = do_GET

    def log_message(self, *_): ...


def run_nginx(folder, servers):
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    head = f"user root; daemon off; pid {folder}/pid; events {{}} http {{ access_log off;"
    (folder / "nginx.conf").write_text(f"{head} {folders} {servers} }}")
    return run("nginx", "-c", folder / "nginx.conf", "-e", folder / "errors")


def run_caddy(folder, site):
    (folder / "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https off\n}}\n{site}")
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", folder / "Caddyfile"]
    env = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    return run(*command, env=env, stderr=subprocess.DEVNULL)


class Window:
    """A window of Chromium with a storage of its own, told what to do over its DevTools."""

    numbers = count(1)

    def __init__(self, socket, url):
        self.socket = socket
        self.session = {}
        self.heard = []
        storage = self.call("Target.createBrowserContext")
        target = self.call("Target.createTarget", url="about:blank", **storage)
        session = self.call("Target.attachToTarget", **target, flatten=True)
        self.session = {"sessionId": session["sessionId"]}
        for domain in ("Log", "Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if it were in front
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        self.socket.send(json.dumps(message | self.session))
        while (answer := json.loads(self.socket.recv(30))).get("id") != number:
            self.heard.append(answer)
        return answer["result"]

    def do(self, script):
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self):
        try:
            return " ".join(self.do("document.body?.innerText ?? ''").split())
        except KeyError:  # there is no result while a page is left
            return ""

    def see(self, *texts):
        try:
            wait_until(lambda: all(text in self.text() for text in texts), 15)
        except AssertionError:
            raise AssertionError(f"{texts} is not in: {self.text()[-5000:]}") from None

    def find(self, kind, name):
        """A script for the first visible thing of that name, as soon as it is there."""
        is_it = f"e.checkVisibility() && e.firstChild?.textContent.trim() === {json.dumps(name)}"
        script = f"[...document.querySelectorAll({json.dumps(kind)})].find((e) => {is_it})"
        wait_until(lambda: self.do(f"!!{script}"), 15)
        return script

    def fill(self, label, text):
        self.do(f"{self.find('label', label)}.control.focus()")
        self.call("Input.insertText", text=text)

    def key(self, name, **more):
        code = {"Tab": 9, "Enter": 13, "v": 86}[name]
        options = {"key": name, "windowsVirtualKeyCode": code, "text": "\r" if code == 13 else ""}
        self.call("Input.dispatchKeyEvent", type="keyDown", **options, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def press(self, name):
        self.do(f"element = {self.find('a, button', name)}; element.focus(); element.click()")

    def events(self, *methods):
        self.do("1")  # all that was sent before this
        return [event["params"] for event in self.heard if event["method"] in methods]

    def complaints(self):
        entries = [event["entry"] for event in self.events("Log.entryAdded")]
        entries = [entry for entry in entries if entry["level"] in ("warning", "error")]
        return entries + self.events("Runtime.exceptionThrown", "Page.javascriptDialogOpening")

    def sign_up(self, name):
        fields = {"Email": f"{id(self)}@example.com", "Password": PASSWORD}
        for label, text in (fields | {"Name, if you are new": name}).items():
            self.fill(label, text)
        self.press("Sign up")
        self.see(f"{name} user Sign out")

    def size(self, width, height, **more):
        options = {"deviceScaleFactor": 1, "mobile": False} | more
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **options)

    def open(self, title):
        self.press(title)
        shown = "document.getElementById('title').innerText"
        wait_until(lambda: self.do(shown) == title, 15)

    def write(self, title, content, button):
        self.fill("Title", title)
        self.fill("Text", content)
        self.press(button)


@contextmanager
def run_chromium(folder):
    """Yields a function that opens a window. The browser reaches this machine alone."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command += [f"--user-data-dir={folder}", "--remote-debugging-port=0"]
    told = folder / "DevToolsActivePort"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        port, path = wait_until(lambda: told.exists() and told.read_text().split()[:2], 30)
        with ExitStack() as stack:
            options = {"max_size": None, "max_queue": None, "close_timeout": 1}
            sockets = (connect(f"ws://127.0.0.1:{port}{path}", **options) for _ in count())
            yield lambda url: Window(stack.enter_context(next(sockets)), url)
    finally:
        process.terminate()  # it ends its own processes first
        process.wait(20)
