"""Nutshell: a complete API service in one file.

Read it from top to bottom: each chapter uses only the chapters above it. From "Application" on you
may cut the file at any banner: what stands above the cut is a working service.

    Settings              what the environment says, read once
    Logging               a line for each request
    Errors                every error has one shape
    Database              many readers, one writer; what is remembered until the next commit
    Schemas               what tables and bodies have in common
    Application           the app, what every request passes, and where chapters attach
    Docs                  Swagger UI without a network
    Rate limiter          how many requests a client may send in a minute
    Passwords and tokens  bcrypt and JWTs
    Accounts              users, logins, and who is asking
                          (up to here: a service for accounts and tokens)
    Posts                 drafts, publishing, lists
    Comments              the smallest example of it all
                          (up to here: the minimal microservice)
    Users                 what people and admins do with accounts
    Cache                 anonymous answers come from memory
    Live events           what happens to posts, as a stream
    Rooms                 a WebSocket for each post
    Mail                  sent in the background
    The gate              a sign-in page and a cookie for apps behind a proxy
    Forgotten passwords   a link by mail
    Redis                 several processes share limits, events and what is fresh
    Demo                  people and posts to begin with
    The page              all of it, in a browser
    python main.py        what is printed at the start, and the server
"""

# `uv run main.py` needs nothing but this file. The same packages stand in requirements.txt.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "fastapi==0.165.0", "starlette==1.10.0", "uvicorn[standard]==0.54.0", "SQLAlchemy==2.1.9",
#     "sqlmodel[asyncio]==0.0.50", "aiosqlite==0.22.1", "pydantic==2.14.3", "bcrypt==5.0.0",
#     "pydantic-settings==2.16.3", "python-jose==3.5.0", "python-multipart==0.0.34",
#     "email-validator==2.4.0", "fastapi-swagger==0.4.64",
# ]
# ///

import asyncio
import base64
import hashlib
import html
import json
import logging
import os
import re
import secrets
import smtplib
import socket
import sqlite3
import ssl
import string
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from email.message import EmailMessage
from errno import EADDRINUSE
from functools import cache, lru_cache, partial
from http import HTTPStatus
from importlib.util import find_spec
from ipaddress import IPv6Address, ip_address
from math import ceil
from multiprocessing import current_process, parent_process
from operator import methodcaller
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar
from urllib.parse import quote, unquote
from weakref import WeakSet

import anyio
import bcrypt
import sqlalchemy as sa
import uvicorn
from email_validator import validate_email
from fastapi import APIRouter, Depends, FastAPI, Form, Header, Query, Request, Response, WebSocket
from fastapi.background import BackgroundTasks
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.requests import HTTPConnection
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.security import OAuth2PasswordBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from jose import jwk, jwt
from pydantic import AfterValidator, BaseModel, BeforeValidator, StringConstraints, ValidationError
from pydantic.functional_validators import field_validator, model_validator
from pydantic.json_schema import Examples
from pydantic.networks import AnyUrl, IPvAnyAddress, IPvAnyNetwork, UrlConstraints
from pydantic.types import StrictBool, StrictInt
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.orm.exc import StaleDataError
from sqlmodel import AutoString, Field, Relationship, Session, SQLModel, col, func, select
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

API = "/api/v1"


def utc_now() -> datetime:
    return datetime.now(UTC)


# --- Settings -------------------------------------------------------------------------------------
# Everything that can be configured, read once from the environment, `.env` or /run/secrets. A wrong
# value ends the start with one line: the variable and the rule, never the value.

NO_NUL = StringConstraints(pattern=r"^[^\x00]*$")  # PostgreSQL cannot store it
SECRETS_FOLDER = "/run/secrets" if Path("/run/secrets").is_dir() else None
COMMON_PASSWORDS = """password passw0rd password1 12345678 123456789 1234567890 87654321 11111111
    00000000 qwertyui qwertyuiop qwerty123 1q2w3e4r 1qaz2wsx abcd1234 iloveyou sunshine trustno1
    football baseball princess"""


def normalize_email(value: str) -> str:
    if len(value) > 254:  # a long one would take minutes to check
        raise ValueError("must have at most 254 characters")
    return validate_email(value.strip().lower(), check_deliverability=False).normalized


def check_password(value: str) -> str:
    if value.lower() in COMMON_PASSWORDS.split():
        raise ValueError("is one of the passwords that are guessed first")
    return value


def check_database_url(value: str) -> str:
    if ":memory:" in value or "mode=memory" in value:
        raise ValueError("must name a file: each connection would have a :memory: of its own")
    if not re.fullmatch(r"sqlite\+aiosqlite:///[^?]*[^?/.]|postgresql\+asyncpg://.+", value):
        raise ValueError("must be sqlite+aiosqlite:///FILE or postgresql+asyncpg://…")
    if value.startswith("postgresql") and find_spec("asyncpg") is None:
        raise ValueError("needs a package: pip install asyncpg==0.32.0")
    try:
        sa.make_url(value)
    except (exc.ArgumentError, ValueError):  # the error's own text contains the password
        raise ValueError("must be a URL, its password percent-encoded") from None
    return value


def check_redis_url(value: AnyUrl) -> AnyUrl:
    if find_spec("redis") is None:
        raise ValueError("needs a package: pip install redis==8.1.0")
    if value.query:
        raise ValueError("must have no options behind a ?")
    return value


EmailRules = Field(max_length=254, schema_extra={"json_schema_extra": {"format": "email"}})
Email = Annotated[str, EmailRules, AfterValidator(normalize_email), Examples(["dora@example.com"])]
PasswordRules = StringConstraints(min_length=8, max_length=128)
PasswordExample = Examples(["correct-horse"])
Password = Annotated[str, PasswordRules, NO_NUL, AfterValidator(check_password), PasswordExample]
DatabaseUrl = Annotated[str, AfterValidator(check_database_url)]
PublicUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s?#]*[^\s?#/]$")]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z\d+.-]*://[^/\s?#@A-Z]+)$")]
Rate = Annotated[str, StringConstraints(pattern=r"^(off|[1-9]\d{0,8}/(second|minute|hour))$")]
RedisRules = UrlConstraints(allowed_schemes=["redis", "rediss"], host_required=True)
RedisUrl = Annotated[AnyUrl, RedisRules, AfterValidator(check_redis_url)]
SmtpUrl = Annotated[AnyUrl, UrlConstraints(allowed_schemes=["smtp", "smtps"], host_required=True)]


class Settings(BaseSettings):
    """README says what each one means. An empty value counts as not set. Defaults are validated,
    too: that is why some of them are strings."""

    model_config = SettingsConfigDict(
        env_file=".env", secrets_dir=SECRETS_FOLDER, extra="ignore", env_ignore_empty=True
    )

    environment: Literal["development", "production"] = "development"
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    # the database
    database_url: DatabaseUrl = "sqlite+aiosqlite:///./app.db"
    cache_seconds: int = Field(default=60, ge=0, le=86_400)
    redis_url: RedisUrl | None = None
    # requests
    cors_origins: Annotated[list[Origin], NoDecode] = Field(default="http://localhost:3000")
    rate_limit: Rate = "600/minute"
    auth_rate_limit: Rate = "30/minute"
    otel_exporter_otlp_endpoint: str | None = None
    # passwords, tokens and accounts
    secret_key: Annotated[bytes, Field(min_length=32)] | None = None
    access_token_expire_minutes: int = Field(default=30, ge=1, le=525_600)
    refresh_token_expire_days: int = Field(default=7, ge=1, le=3_650)
    bcrypt_rounds: int = Field(default=12, ge=4, le=16)
    registration: Literal["open", "closed"] = "open"
    first_superuser_email: Email | None = None
    first_superuser_password: Password | None = None
    # mail
    public_url: PublicUrl = "http://localhost:8000"
    smtp_url: SmtpUrl | None = None
    mail_from: Email = "nutshell@example.com"
    admin_email: Email | None = None
    # the demo
    demo: bool = False
    # python main.py
    host: IPvAnyAddress | Literal["localhost"] = Field(default="127.0.0.1")
    port: int = Field(default=8000, ge=1, le=65_535)
    web_concurrency: int = Field(default=1, ge=1, le=256)
    forwarded_allow_ips: Annotated[list[IPvAnyNetwork | Literal["*"]], NoDecode] = Field(default="")

    @field_validator("forwarded_allow_ips", "cors_origins", mode="before")
    @classmethod
    def split_at_commas(cls, value: str) -> list[str]:
        return [part.strip() for part in value.split(",") if part.strip()]

    @model_validator(mode="after")
    def check_combinations(self) -> Self:
        given = self.model_fields_set
        problems = []
        if self.secret_key is None and (self.production or self.sqlite_file is None):
            problems.append("SECRET_KEY: must be set in production and with PostgreSQL")
        if self.production and "cors_origins" not in given:
            self.cors_origins = []
        if self.production and "*" in self.cors_origins:
            problems.append("CORS_ORIGINS: must not be * in production")
        if (self.first_superuser_email is None) != (self.first_superuser_password is None):
            problems.append("FIRST_SUPERUSER_EMAIL, FIRST_SUPERUSER_PASSWORD: set both or none")
        if self.demo and (self.production or "database_url" in given or self.web_concurrency > 1):
            problems.append("DEMO: not in production, with DATABASE_URL or with WEB_CONCURRENCY")
        if problems:
            raise ValueError("\n".join(problems))
        if self.demo:
            self.database_url = f"sqlite+aiosqlite:///./demo-{os.getpid()}.db"
        return self

    @property
    def production(self) -> bool:
        return self.environment == "production"

    @property
    def sqlite_file(self) -> Path | None:
        url = sa.make_url(self.database_url)
        return Path(url.database or "") if url.drivername == "sqlite+aiosqlite" else None


def load_settings() -> Settings:
    try:
        return Settings()
    except UnicodeDecodeError:
        print(".env: must be UTF-8", file=sys.stderr)
    except SettingsError as error:  # a secret file that cannot be read
        print(error, file=sys.stderr)
    except ValidationError as error:
        lines: dict[str, str] = {}  # one for each name: of a union every type complains
        for problem in error.errors():
            name = str(problem["loc"][0]).upper() if problem["loc"] else ""
            rule = problem["msg"].removeprefix("Value error, ")
            lines.setdefault(name, f"{name}: {rule}" if name else rule)
        print("\n".join(lines.values()), file=sys.stderr)
    raise SystemExit(3)  # for uvicorn this means: do not start this process again


settings = load_settings()


# --- Logging --------------------------------------------------------------------------------------
# Python's own logging with one handler: lines for people or, in production, JSON for programs. No
# line holds a query, a body, a token, a password or an email.

logger = logging.getLogger("nutshell")
log_handler = logging.StreamHandler()
DROPPED_MESSAGES = (  # of uvicorn
    '%s - "WebSocket',  # with its query
    "connection ",  # is open, is closed
    "Invalid UTF-8",  # in a frame, which closes the WebSocket
    "ASGI callable returned without completing handshake",  # for each WebSocket that is refused
)


class JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += f"\n{self.formatException(record.exc_info)}"
        entry = {"time": utc_now().isoformat(), "level": record.levelname, "message": message}
        return json.dumps(entry | getattr(record, "request", {}))


def set_up_logging() -> None:
    """Safe to call twice. At debug level only SQL is added: other libraries log secrets."""
    text_formatter = logging.Formatter("%(asctime)s %(levelname)-8s %(message)s")
    log_handler.setFormatter(JSONFormatter() if settings.production else text_formatter)
    root = logging.getLogger()
    root.addHandler(log_handler)
    root.setLevel(max(logging.INFO, getattr(logging, settings.log_level.upper())))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
    logging.getLogger("uvicorn").propagate = True
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not str(record.msg).startswith(DROPPED_MESSAGES)
    )
    logging.getLogger("uvicorn.access").propagate = False  # we write a line for each request
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs parts of bodies
    if settings.log_level == "debug":
        logging.getLogger("sqlalchemy.engine").setLevel(logging.INFO)


# --- Errors ---------------------------------------------------------------------------------------
# Every error is `{"detail", "error_code", "request_id"}`. Routes raise APIError; the handlers bring
# what FastAPI and the database raise into the same shape.

ERROR_STATUS = {
    "BAD_REQUEST": 400, "INVALID_CREDENTIALS": 401, "INVALID_TOKEN": 401, "TOKEN_REUSED": 401,
    "INSUFFICIENT_PERMISSIONS": 403, "NOT_FOUND": 404, "CONFLICT": 409, "EMAIL_TAKEN": 409,
    "BODY_TOO_LARGE": 413, "VALIDATION_ERROR": 422, "RATE_LIMITED": 429, "INTERNAL_ERROR": 500,
    "UNAVAILABLE": 503,
}  # fmt: skip
ERROR_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
STATUS_NAMES = {status.value: status.name for status in HTTPStatus}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
SQLITE_UNAVAILABLE = {5, 6, 10, 13, 14}  # busy, locked, I/O error, disk full, cannot open
POSTGRES_UNAVAILABLE = {"08", "28", "3D", "40", "53", "55", "57", "58"}  # classes of SQLSTATE


class APIError(HTTPException):
    """`raise APIError("NOT_FOUND", "Post not found")`: the code decides the status."""

    def __init__(self, code: str, detail: Any, headers: dict[str, str] | None = None) -> None:
        status = ERROR_STATUS[code]
        super().__init__(status, detail, ERROR_HEADERS.get(status, {}) | (headers or {}))
        self.code = code


class ErrorRead(BaseModel):
    """The body of every error. For a 422, `detail` is a list of the wrong fields."""

    detail: str | list[dict[str, Any]]
    error_code: str
    request_id: str


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For /docs: the errors of a route, of all routes of a router, or of the whole app."""
    return {code: {"model": ErrorRead, "description": HTTPStatus(code).phrase} for code in statuses}


async def handle_http_error(request: HTTPConnection, error: Any) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 405:  # FastAPI names the methods of one route, not of the whole path
        scopes = [dict(request.scope, method=method) for method in METHODS]
        routes = request.app.routes
        found = [s for s in scopes if any(r.matches(s)[0] is Match.FULL for r in routes)]
        headers["Allow"] = ", ".join(scope["method"] for scope in found)
    body = {
        "detail": error.detail,
        "error_code": getattr(error, "code", STATUS_NAMES.get(error.status_code, "ERROR")),
        "request_id": request.state.request_id,
    }
    # json.dumps writes ASCII: a name of a field may hold half a surrogate pair.
    return Response(json.dumps(body), error.status_code, headers, "application/json")


async def handle_validation_error(request: HTTPConnection, error: Any) -> Response:
    """Says which fields are wrong and why, never the value: it may be a password."""
    fields = [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]
    if fields[0]["type"] == "json_invalid":
        return await handle_http_error(request, APIError("BAD_REQUEST", "The body is not JSON"))
    return await handle_http_error(request, APIError("VALIDATION_ERROR", fields))


def is_unavailable(error: Any) -> bool:
    """True for a lock, a lost connection or a full disk; False for a bug, such as wrong SQL."""
    if isinstance(error, (exc.TimeoutError, TimeoutError)):
        return True
    if getattr(error, "connection_invalidated", False):
        return True
    original = getattr(error, "orig", error)
    sqlite_code = getattr(original, "sqlite_errorcode", 0) & 0xFF
    sqlstate = getattr(original, "sqlstate", None) or ""
    return sqlite_code in SQLITE_UNAVAILABLE or sqlstate[:2] in POSTGRES_UNAVAILABLE


async def handle_database_error(request: HTTPConnection, error: Any) -> Response:
    """Constraints and version counters are checked by the database, which cannot race."""
    if isinstance(error, (exc.IntegrityError, StaleDataError)):
        logger.warning("the database refused a write: %s", str(error).partition("\n")[0])
        detail = "This has changed in the meantime"
        return await handle_http_error(request, APIError("CONFLICT", detail))
    if not is_unavailable(error):
        raise error
    reason = str(error).partition("\n")[0] or type(error).__name__
    logger.error("the database is unavailable: %s", reason)
    detail = "The database is busy, try again"
    return await handle_http_error(request, APIError("UNAVAILABLE", detail))


exception_handlers: dict[Any, Any] = {
    HTTPException: handle_http_error,
    RequestValidationError: handle_validation_error,
    WebSocketRequestValidationError: handle_validation_error,
    exc.SQLAlchemyError: handle_database_error,
    sqlite3.Error: handle_database_error,
}


# --- Database -------------------------------------------------------------------------------------
# SQLite takes many readers beside one writer, so it has two engines: readers, which do not wait for
# the writer, and a writer with one connection, where requests queue instead of being "locked".
# PostgreSQL needs one engine. What was read may be remembered until the next commit.

MAX_REMEMBERED = 2_000
MAX_REMEMBERED_BYTES = 16 * 1024 * 1024
# The timeout comes first: the switch to WAL may have to wait for another process.
PRAGMAS = """PRAGMA busy_timeout=5000; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
    PRAGMA foreign_keys=ON"""
ANY_TABLE = "*"  # what a statement such as DELETE writes to
postgres_connections: WeakSet[Any] = WeakSet()


class StartError(Exception):
    """Ends the start with its text as one line."""


# SQLAlchemy calls the next five functions. `sa.event.listen`, below, says when.


def set_pragmas(connection: Any, _: Any) -> None:
    connection.run_async(lambda raw: raw.executescript(PRAGMAS))


def forbid_writes(connection: Any, _: Any) -> None:
    connection.run_async(lambda raw: raw.execute_fetchall("PRAGMA query_only=ON"))


def on_begin(connection: sa.Connection) -> None:
    """Takes the write lock before the first read, so that what was read is still true later."""
    sqlite: Any = connection.connection.dbapi_connection
    sqlite.run_async(lambda raw: raw.execute_fetchall("BEGIN IMMEDIATE"))


def on_reset(connection: Any, _: Any, __: Any) -> None:
    """SQLAlchemy leaves the transaction open when a COMMIT fails."""
    if connection.driver_connection.in_transaction:
        connection.rollback()


def on_connect_postgres(dialect: Any, _: Any, args: Any, kwargs: Any) -> Any:
    try:
        connection = dialect.connect(*args, **kwargs)
    except OSError as error:  # no server listens there, or it does not answer in time
        logger.error("the database cannot be reached: %s", type(error).__name__)
        raise APIError("UNAVAILABLE", "The database cannot be reached, try again") from error
    postgres_connections.add(connection.driver_connection)
    return connection


options: dict[str, Any] = {"pool_timeout": 5, "hide_parameters": True}
if settings.sqlite_file:
    # AUTOCOMMIT: the driver begins nothing by itself, on_begin does.
    options |= {"max_overflow": 0, "isolation_level": "AUTOCOMMIT"}
    write_engine = create_async_engine(settings.database_url, pool_size=1, **options)
    # A reader has nothing to roll back.
    options |= {"pool_reset_on_return": None, "skip_autocommit_rollback": True}
    read_engine = create_async_engine(settings.database_url, pool_size=2, **options)
    health_engine = create_async_engine(settings.database_url, pool_size=1, **options)
    for engine in (write_engine, read_engine, health_engine):
        sa.event.listen(engine.sync_engine, "connect", set_pragmas)
    sa.event.listen(write_engine.sync_engine, "begin", on_begin)
    sa.event.listen(write_engine.sync_engine, "reset", on_reset)
    sa.event.listen(read_engine.sync_engine, "connect", forbid_writes)
else:
    options |= {"connect_args": {"timeout": 5, "command_timeout": 5}, "pool_pre_ping": True}
    exception_handlers[TimeoutError] = handle_database_error  # asyncpg's, after these 5 s
    write_engine = create_async_engine(settings.database_url, **options)
    read_engine = write_engine.execution_options(postgresql_readonly=True)
    health_engine = create_async_engine(settings.database_url, pool_size=1, **options)
    for engine in (write_engine, health_engine):
        sa.event.listen(engine.sync_engine, "do_connect", on_connect_postgres)


class Generation:
    """A random value, replaced at each commit: what was remembered under another one is stale.
    None (PostgreSQL, several workers, CACHE_SECONDS=0) if nothing is remembered."""

    def __init__(self) -> None:
        self.value = secrets.token_hex(8)
        alone = settings.web_concurrency == 1 and parent_process() is None
        self.is_known = bool(settings.sqlite_file) and alone and settings.cache_seconds > 0

    async def get(self) -> str | None:
        return self.value if self.is_known else None

    async def renew(self) -> None:
        self.value = secrets.token_hex(8)


memories: list["Memory"] = []


class Memory:
    """Remembers what was read until a commit, or for CACHE_SECONDS. Commits to the tables that it
    is independent of do not count."""

    def __init__(self, independent_of: frozenset[str] = frozenset()) -> None:
        self.independent_of = independent_of
        self.generation = Generation()
        self.clear(None)
        memories.append(self)

    def clear(self, generation: str | None) -> None:
        self.current = generation
        self.entries: dict[Any, Any] = {}
        self.bytes = 0
        self.expires = perf_counter() + settings.cache_seconds

    async def get(self, key: Any) -> tuple[str | None, Any]:
        """The generation, and what is remembered under this key."""
        generation = await self.generation.get()
        if generation != self.current or perf_counter() > self.expires:
            self.clear(generation)
        return generation, self.entries.get(key)

    def keep(self, key: Any, value: Any, size: int, generation: str | None) -> None:
        """Remembers what was read after `get` had returned this generation."""
        if generation is None or generation != self.current or size > MAX_REMEMBERED_BYTES:
            return  # another request has seen a newer generation: this value may be stale
        if len(self.entries) >= MAX_REMEMBERED or self.bytes + size > MAX_REMEMBERED_BYTES:
            self.clear(generation)
        self.entries[key] = value
        self.bytes += size


# How what was remembered becomes stale: a session notes the tables that it writes to, its commit
# calls `forget`, which renews the generation of each Memory, and that drops what it holds.


@sa.event.listens_for(Session, "after_flush")
def note_rows(session: Session, _: Any) -> None:
    for row in (*session.new, *session.dirty, *session.deleted):
        session.info.setdefault("written", set()).add(row.__tablename__)


@sa.event.listens_for(Session, "do_orm_execute")
def note_statement(state: Any) -> None:
    if not state.is_select:
        state.session.info["written"] = {ANY_TABLE}


async def forget(tables: set[str]) -> None:
    for memory in memories:
        if not tables <= memory.independent_of:
            await memory.generation.renew()


class TrackedSession(AsyncSession):
    """Notes which tables it writes to. Each commit makes what was remembered of them stale."""

    async def connection(self, *args: Any, **options: Any) -> AsyncConnection:
        self.info["written"] = {ANY_TABLE}  # its statements are not seen
        return await super().connection(*args, **options)

    async def commit(self) -> None:
        try:
            await super().commit()
        finally:  # a COMMIT that was cut off may have been done, and every commit counts
            await forget(self.info.pop("written", {ANY_TABLE}))

    async def close(self) -> None:
        try:
            await super().close()
        finally:  # what was written without commit(), as in `async with session.begin():`
            await forget(self.info.pop("written", set()))


async def get_read_session() -> AsyncIterator[AsyncSession]:
    session = AsyncSession(read_engine, expire_on_commit=False)
    try:
        yield session
    finally:
        if session.in_transaction():  # to close one that was not used takes 50 µs
            await session.close()


async def get_write_session() -> AsyncIterator[AsyncSession]:
    """Waits for the writer at its first statement. What was not committed is undone."""
    async with TrackedSession(write_engine, expire_on_commit=False) as session:
        yield session
        if session.new or session.dirty or session.deleted:
            logger.warning("what a route wrote is undone: `await session.commit()` is missing")


# With scope "function" a connection is free when the route returns, before the answer is sent.
ReadSession = Annotated[AsyncSession, Depends(get_read_session, scope="function")]
WriteSession = Annotated[AsyncSession, Depends(get_write_session, scope="function")]


# On SQLite the first statement, whatever it is, takes the write lock: see on_begin.
# 7361 is any number that all processes share.
START_LOCK = select(1 if settings.sqlite_file else func.pg_advisory_xact_lock(7361))


@asynccontextmanager
async def prepare_database() -> AsyncIterator[AsyncSession]:
    """A session for the start. Processes enter one after the other: the first makes what is
    missing."""
    async with TrackedSession(write_engine, expire_on_commit=False) as session:
        await session.exec(START_LOCK)
        yield session
        await session.commit()


def make_tables(connection: sa.Connection) -> None:
    """Makes tables that are missing. One that lacks a column is not changed but refused."""
    SQLModel.metadata.create_all(connection)
    inspector = sa.inspect(connection)
    data = settings.sqlite_file or "the tables"
    for table in SQLModel.metadata.sorted_tables:
        found = [*inspector.get_columns(table.name), *inspector.get_indexes(table.name)]
        names = [part["name"] for part in found]
        for part in (*table.columns, *table.indexes):
            if part.name not in names:
                problem = f'table "{table.name}" has no column or index "{part.name}"'
                advice = f"README says how to change a table. If you need no data, delete {data}"
                raise StartError(f"DATABASE_URL: {problem}. {advice}")


@asynccontextmanager
async def open_database() -> AsyncIterator[None]:
    if settings.sqlite_file and not settings.sqlite_file.exists():
        settings.sqlite_file.touch(mode=0o600)
    async with prepare_database() as session:
        await (await session.connection()).run_sync(make_tables)
    yield
    for connection in postgres_connections:
        connection.terminate()  # close() would wait for a server that is frozen
    for engine in (read_engine, health_engine, write_engine):
        await engine.dispose()


# --- Schemas --------------------------------------------------------------------------------------
# What tables and bodies have in common: ids, times, bodies that refuse unknown fields.

Id = Annotated[int, Field(ge=1, le=2**31 - 1)]
OneLine = StringConstraints(strip_whitespace=True, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
Trimmed = StringConstraints(strip_whitespace=True, pattern=NO_NUL.pattern)
NotBlank = StringConstraints(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")


class TableBase(SQLModel):
    __table_args__: Any = {"sqlite_autoincrement": True}  # ids of deleted rows are not reused

    id: int = Field(default=None, primary_key=True)
    created_at: datetime = Field(default_factory=utc_now)


class StrictBody(SQLModel):
    """A JSON body. Unknown fields are refused: a client cannot set columns such as role."""

    model_config = {"extra": "forbid"}

    @model_validator(mode="before")
    @classmethod
    def check_number_of_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > 50:  # to list each would block the event loop
            raise ValueError("has too many fields")
        return value


# --- Application ----------------------------------------------------------------------------------
# The app, and what every request passes. This is all that it knows of the chapters below:
#
#   1. Start and stop   `@at_start`: Database, Passwords, Accounts, Users, Live events, Mail, Redis,
#                       Demo and python main.py.
#   2. What happened    `await announce(kind, schema)` after a commit calls each of the `listeners`:
#                       Live events and Mail.
#   3. Each request     `app.user_middleware`, in this order: RequestMiddleware and CORS,
#                       RateLimitMiddleware, CacheMiddleware, then FastAPI with its routes.
#   4. Shared stores    `limiter.store`, `events.publish`, `chat.publish` and the `generation` of
#                       each Memory: Redis replaces them.
#
# Chapters also add their paths to `body_limits` and `path_limits`, what /docs says of them to
# `tags` and `app.description`, and the demo its `demo_accounts`.

MAX_BODY_BYTES = 256 * 1024
MAX_FORM_BYTES = 16 * 1024
# The ASGI messages that carry the headers of an answer.
FIRST_MESSAGES = "http.response.start", "websocket.http.response.start", "websocket.accept"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
REQUEST_HEADERS = "Authorization, Content-Type, If-None-Match, Last-Event-ID, X-Request-ID"
RESPONSE_HEADERS = "ETag, Location, Retry-After, RateLimit, RateLimit-Policy"
RESPONSE_HEADERS += ", X-Request-ID, X-Process-Time, X-Cache"
EventKind = Literal[
    "user.registered", "user.invited", "user.forgot_password",
    "post.published", "post.updated", "post.deleted", "comment.created", "comment.deleted",
]  # fmt: skip
StartFunction = Callable[[], AsyncIterator[None]]

body_limits: dict[str, int] = {}  # by the beginning of a path
lifespans: list[Callable[[], AbstractAsyncContextManager[None]]] = [open_database]
listeners: list[Callable[[EventKind, Any], Awaitable[None]]] = []
demo_accounts: list[dict[str, str]] = []  # shown at the start, and buttons on the page
tags: list[dict[str, str]] = []  # the headings of /docs, in this order


def at_start(function: StartFunction) -> StartFunction:
    """A decorator: what stands before `yield` is done at the start, what follows at the stop."""
    lifespans.append(asynccontextmanager(function))
    return function


async def announce(kind: EventKind, subject: SQLModel) -> None:
    """Tells the listeners what has been committed. The subject is an outgoing schema."""
    for listener in listeners:
        await listener(kind, subject)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    set_up_logging()
    async with AsyncExitStack() as stack:
        for enter in lifespans:
            await stack.enter_async_context(enter())
        yield


async def send_start(send: Send, message: Message) -> None:
    """A StartError is shown as one line, without its traceback."""
    error = sys.exception()  # Starlette sends the message while it handles the error
    if message["type"] == "lifespan.startup.failed" and isinstance(error, StartError):
        message["message"] = str(error)
    await send(message)


def add_state(scope: Scope) -> dict[str, Any]:
    """Makes `request.state`: what chapters read of a request, and the headers that they add."""
    headers = dict(scope["headers"])
    if b"cookie" in headers:  # CVE-2024-7592: older Pythons read its backslashes for seconds
        pairs = scope["headers"]
        scope["headers"] = [(n, v.replace(b"\\", b"") if n == b"cookie" else v) for n, v in pairs]
    sent_id = headers.get(b"x-request-id", b"").decode("latin-1")
    request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else os.urandom(8).hex()
    root_path = scope.get("root_path", "")
    is_below = scope["path"].startswith(f"{root_path}/")
    state: dict[str, Any] = scope.setdefault("state", {})
    state["request_id"] = request_id
    path = scope["path"].removeprefix(root_path) if is_below else scope["path"]
    state["path"] = path.removesuffix("\n")  # routes match with and without it, so limits must too
    state["client"] = scope["client"][0] if scope.get("client") else ""
    state["status"] = 0
    state["request_headers"] = headers
    state["response_headers"] = {
        b"x-content-type-options": b"nosniff",
        b"x-request-id": request_id.encode(),
    }
    if b"authorization" in headers:  # no cache may keep what is private
        state["response_headers"][b"cache-control"] = b"private, no-store"
    return state


def limit_body(scope: Scope, receive: Receive) -> Receive:
    """The body, or an error as soon as it is too large."""
    path = scope["state"]["path"]
    limits = [limit for start, limit in body_limits.items() if path.startswith(start)]
    limit = min(limits, default=MAX_BODY_BYTES)
    received = 0

    def check(size: int) -> None:
        if size > limit:
            raise APIError("BODY_TOO_LARGE", f"The body is larger than {limit // 1024} KiB")

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        check(received)
        return message

    check(int(scope["state"]["request_headers"].get(b"content-length", 0)))
    return receive_limited


async def answer_uncaught(scope: Scope, error: BaseException) -> Response:
    if isinstance(error, asyncio.CancelledError):  # the grace period of a stop is over
        error = APIError("UNAVAILABLE", "The service is stopping, try again")
    elif not isinstance(error, APIError):
        logger.exception("request %s failed", scope["state"]["request_id"])
        error = APIError("INTERNAL_ERROR", "Internal error: the log has its traceback")
    return await handle_http_error(HTTPConnection(scope), error)


def is_hung_up(error: BaseException) -> bool:
    """True for FastAPI's error when the client of a stream disconnects while an event is sent."""
    return isinstance(error, ExceptionGroup) and error.split(anyio.BrokenResourceError)[1] is None


def log_request(scope: Scope, seconds: float) -> None:
    state = scope["state"]
    fields = {
        "request_id": state["request_id"],
        "method": scope.get("method", "WEBSOCKET"),
        "path": scope["raw_path"][:200].decode("ascii", "replace"),  # percent-encoded, one line
        "status": state["status"],
        "ms": round(seconds * 1000, 1),
        "client": state["client"][:50],
        "user_id": state.get("user_id"),
    }
    line = "%(method)s %(path)s %(status)s %(ms)s ms %(client)s user=%(user_id)s %(request_id)s"
    logger.info(line, fields, extra={"request": fields})


class RequestMiddleware:
    """Gives each request an id, its headers and a line in the log, limits its body, and turns
    uncaught exceptions into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.cors = CORSMiddleware(
            self.respond,
            allow_origins=settings.cors_origins,
            allow_credentials="*" not in settings.cors_origins,
            allow_methods=["*"],
            allow_headers=REQUEST_HEADERS.split(", "),
            expose_headers=RESPONSE_HEADERS.split(", "),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, partial(send_start, send))
        started = perf_counter()
        state = add_state(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] in FIRST_MESSAGES:
                state["status"] = message.get("status", 101)
                ours = state["response_headers"]
                ours[b"x-process-time"] = b"%.4f" % (perf_counter() - started)
                headers = message.get("headers", [])
                others = [pair for pair in headers if pair[0].lower() not in ours]
                message["headers"] = [*others, *ours.items()]
            elif message["type"] == "websocket.close":
                state["status"] = state["status"] or 403  # how it is answered before an accept
            await send(message)

        try:  # CORS takes time, and adds nothing without an Origin
            handler = self.cors if b"origin" in state["request_headers"] else self.respond
            await handler(scope, receive, send_with_headers)
        finally:
            if logger.isEnabledFor(logging.INFO):
                log_request(scope, perf_counter() - started)

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Inside of CORS, so that errors have its headers too."""
        try:
            await self.app(scope, limit_body(scope, receive), send)
        except (Exception, asyncio.CancelledError) as error:
            is_stop = isinstance(error, asyncio.CancelledError)
            if not scope["state"]["status"]:  # no answer has begun
                response = await answer_uncaught(scope, error)
                await response(scope, receive, send)
            elif not is_stop and not is_hung_up(error):
                raise  # half an answer: the server logs the error and hangs up
            elif is_stop and scope["type"] == "http":  # it ends a stream
                await send({"type": "http.response.body"})


otel = settings.otel_exporter_otlp_endpoint is not None
app = FastAPI(
    title="Nutshell",
    summary="A complete API service in one file",
    lifespan=lifespan,
    docs_url=None,
    redoc_url=None,
    openapi_tags=tags,
    openapi_url=None if settings.production else "/openapi.json",
    redirect_slashes=False,  # the redirect would repeat the Host that the client sent
    generate_unique_id_function=lambda route: route.name,
    responses=errors(400, 413, 500, 503),
    telemetry={"tracing": otel, "metrics": otel, "logs": otel, "auto_configure": otel},
    middleware=[Middleware(RequestMiddleware)],
    exception_handlers=exception_handlers,
)
tags.append({"name": "health", "description": "For monitors and load balancers"})


async def is_database_up() -> bool:
    """Asks on a connection of its own, since all others may be busy."""
    try:
        async with AsyncSession(health_engine) as session:
            await session.exec(select(1))
    except (exc.SQLAlchemyError, sqlite3.Error, TimeoutError, APIError) as error:
        logger.error("the database does not answer: %s", type(error).__name__)
        return False
    return True


@app.head("/health", include_in_schema=False)
@app.get("/health", tags=["health"])
async def get_health() -> dict[str, str]:
    """Check that the database answers within a second."""
    ping = getattr(app.state, "ping", None)
    if ping is None or ping.done():  # requests at the same time share one
        ping = app.state.ping = asyncio.create_task(is_database_up())
    await asyncio.wait([ping], timeout=1)  # one that hangs cannot be cancelled: it is left behind
    if not ping.done() or not ping.result():
        raise APIError("UNAVAILABLE", "The database does not answer")
    return {"status": "healthy"}


# --- Docs -----------------------------------------------------------------------------------------
# Swagger UI, with its files from a package, so that it works without a network.


async def get_docs() -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Nutshell",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
        swagger_ui_parameters={"persistAuthorization": True, "tryItOutEnabled": True},
    )


def make_openapi() -> dict[str, Any]:
    """FastAPI's, but a docstring's first paragraph is the summary, the rest the description."""
    if app.openapi_schema:  # made before
        return app.openapi_schema
    schema = FastAPI.openapi(app)
    for operation in [one for path in schema["paths"].values() for one in path.values()]:
        default_summary = operation["operationId"].replace("_", " ").title()
        if operation["summary"] == default_summary and "description" in operation:
            summary, _, description = operation["description"].partition("\n\n")
            operation |= {"summary": summary.replace("\n", " "), "description": description}
    return schema


app.openapi = make_openapi  # type: ignore[method-assign]
if not settings.production:
    app.add_api_route("/docs", get_docs, include_in_schema=False)
    app.mount("/docs", StaticFiles(packages=[("fastapi_swagger", "resources")]))


# --- Rate limiter ---------------------------------------------------------------------------------
# Each client may send a number of requests in a window of time, which opens with the first of them.
# Around the end of a window twice as many may pass: the price of counting without a history.

SECONDS = {"second": 1, "minute": 60, "hour": 3_600}
MAX_WINDOWS = 20_000


class Limit(NamedTuple):
    name: str
    quota: int
    seconds: int


def make_limit(name: str, rate: str, times: int = 1) -> Limit | None:
    if rate == "off":
        return None
    number, _, unit = rate.partition("/")
    return Limit(name, int(number) * times, SECONDS[unit])


DEFAULT_LIMIT = make_limit("default", settings.rate_limit)
AUTH_LIMIT = make_limit("auth", settings.auth_rate_limit)  # by address
EMAIL_LIMIT = make_limit("auth", settings.auth_rate_limit, times=10)  # by email
# By path, or by method and path.
path_limits: dict[str, Limit | None] = {"/health": None, "/openapi.json": None, "/docs": None}


class WindowStore:
    """Bounded: when `new` is full or an hour old, it becomes `old`, and what was old is dropped."""

    def __init__(self) -> None:
        self.new: dict[str, tuple[int, float]] = {}  # how many so far, and when the window ends
        self.old: dict[str, tuple[int, float]] = {}
        self.turn = 0.0

    async def hit(self, key: str, seconds: int) -> tuple[int, float]:
        """Counts one request: how many so far, and the seconds until the window ends."""
        now = perf_counter()
        if now >= self.turn or len(self.new) >= MAX_WINDOWS:
            self.old = self.new
            self.new = {}
            self.turn = now + 3_600
        count, end = self.new.get(key) or self.old.get(key) or (0, now)
        if now >= end:
            count = 0
            end = now + seconds
        self.new[key] = (count + 1, end)
        return count + 1, end - now


class Limiter:
    def __init__(self) -> None:
        self.store = WindowStore()

    async def check(self, limit: Limit | None, key: str, state: dict[str, Any]) -> None:
        """Counts a request, sets the headers, and refuses what is over the limit."""
        if limit is None:
            return
        name, quota, seconds = limit
        count, left = await self.store.hit(f"{name}:{quota}:{key}", seconds)
        wait = max(1, min(seconds, ceil(left)))
        headers = state["response_headers"]
        # Of several limits the headers describe the first, or the one that is exceeded.
        if count > quota or b"ratelimit" not in headers:
            headers[b"ratelimit-policy"] = f'"{name}";q={quota};w={seconds}'.encode()
            headers[b"ratelimit"] = f'"{name}";r={max(0, quota - count)};t={wait}'.encode()
        if count > quota:
            detail = f"Too many requests, try again in {wait} s"
            raise APIError("RATE_LIMITED", detail, {"Retry-After": str(wait)})


limiter = Limiter()


@lru_cache(1_000)
def client_key(address: str) -> str:
    """An IPv6 client counts by its /64 network, an IPv4-mapped address as IPv4."""
    try:
        ip = ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(ip, IPv6Address):
        return str(ip.ipv4_mapped or ip.packed[:8].hex())
    return str(ip)


class RateLimitMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            state = scope["state"]
            path_limit = path_limits.get(state["path"], DEFAULT_LIMIT)
            limit = path_limits.get(f"{scope.get('method')} {state['path']}", path_limit)
            if not state["path"].startswith("/docs/"):
                await limiter.check(limit, client_key(state["client"]), state)
        await self.app(scope, receive, send)


app.user_middleware.append(Middleware(RateLimitMiddleware))


# --- Passwords and tokens -------------------------------------------------------------------------
# Passwords become bcrypt hashes, in threads and never while a connection is held: one takes 0.2 s.
# Tokens are JWTs, signed with HS256 and no other algorithm.

MAX_WAITING_PASSWORDS = 64
# The end of a signature has four spellings in base64: one of them counts.
TOKEN = re.compile(r"[\w-]{1,200}\.[\w-]{1,2000}\.[\w-]{42}[AEIMQUYcgkosw048]", re.ASCII)
# Checking a password against it takes as long as a real check, and always fails.
DECOY_HASH = f"$2b${settings.bcrypt_rounds:02}${'.' * 53}"
hashing_threads = anyio.CapacityLimiter(os.cpu_count() or 1)
TokenType = Literal["access", "refresh", "cookie", "reset"]


def check_waiting_passwords(part: float = 1) -> None:
    """Refuses when this part of MAX_WAITING_PASSWORDS is waiting already."""
    if hashing_threads.statistics().tasks_waiting >= part * MAX_WAITING_PASSWORDS:
        raise APIError("UNAVAILABLE", "Too many passwords are waiting, try again")


def digest_password(password: str) -> bytes:
    """bcrypt looks at 72 bytes and stops at a NUL: with a digest every character counts."""
    return base64.b64encode(hashlib.sha256(password.encode(errors="surrogatepass")).digest())


async def hash_password(password: str) -> str:
    check_waiting_passwords()
    work = partial(bcrypt.hashpw, digest_password(password), bcrypt.gensalt(settings.bcrypt_rounds))
    return (await anyio.to_thread.run_sync(work, limiter=hashing_threads)).decode()


async def verify_password(password: str, hashed_password: str) -> bool:
    check_waiting_passwords()
    work = partial(bcrypt.checkpw, digest_password(password), hashed_password.encode())
    return await anyio.to_thread.run_sync(work, limiter=hashing_threads)


def read_or_make_secret(file: Path) -> bytes:
    file.touch(mode=0o600)
    if not file.read_bytes():
        file.write_text(secrets.token_urlsafe(48))
    return file.read_bytes().strip()


@cache
def get_signing_key() -> Any:
    secret = settings.secret_key or read_or_make_secret(Path(f"{settings.sqlite_file}.key"))
    if len(secret) < 32:
        raise StartError("SECRET_KEY: its file beside the database has less than 32 bytes")
    encoded = base64.urlsafe_b64encode(secret).decode()
    # Given a string, python-jose would construct this key again for each token.
    return jwk.construct({"kty": "oct", "k": encoded}, "HS256")


@at_start
async def load_signing_key() -> AsyncIterator[None]:
    if settings.secret_key is None:
        async with prepare_database():  # of processes that start together the first one makes it
            get_signing_key()
    yield


class TokenClaims(BaseModel):
    """What every token must say."""

    sub: Id  # a string in the JWT
    sid: Annotated[str | None, NO_NUL] = None  # in all but reset tokens; None finds no session
    jti: str
    type: TokenType
    iat: int
    exp: int


def create_token(kind: TokenType, user_id: int, expires: datetime, **claims: Any) -> str:
    """More claims may be given, or others than these for jti and iat."""
    claims = {"jti": secrets.token_urlsafe(), "iat": utc_now()} | claims
    claims |= {"type": kind, "sub": str(user_id), "exp": expires}
    return str(jwt.encode(claims, get_signing_key(), "HS256"))


def decode_token(token: str, kind: TokenType) -> TokenClaims:
    """Whatever is wrong with it, the answer is the same."""
    try:
        if not TOKEN.fullmatch(token):
            raise ValueError("malformed")
        claims = TokenClaims.model_validate(jwt.decode(token, get_signing_key(), ["HS256"]))
        if claims.type != kind:
            raise ValueError("another type")
    except Exception:  # python-jose lets errors of all kinds escape
        raise APIError("INVALID_TOKEN", "The token is malformed, expired or revoked") from None
    return claims


# --- Accounts -------------------------------------------------------------------------------------
# Users and their logins. A token names its login session, and is worth something only while the
# row of that session and its active user are there.

REFRESH_GRACE = timedelta(seconds=10)  # for answers that were lost, and for second tabs
Name = Annotated[str | None, Field(max_length=100), OneLine, Examples(["Dora"])]
Age = Annotated[StrictInt | None, Field(ge=1, le=149), Examples([36])]
Bio = Annotated[str | None, Field(max_length=2_000), NO_NUL]
WebAddress = StringConstraints(pattern=r"^https?://[^\s/?#\x00-\x1f\x7f][^\s\x00-\x1f\x7f]*$")
AvatarUrl = Annotated[str | None, Field(max_length=500), WebAddress]
Role = Literal["user", "admin"]


class UserBase(StrictBody):
    first_name: Name = None
    last_name: Name = Field(default=None, schema_extra={"examples": ["Lee"]})
    age: Age = None


class UserCreate(UserBase):
    email: Email
    password: Password


class User(UserBase, TableBase, table=True):
    email: Email = Field(unique=True)
    hashed_password: str = Field(exclude=True)  # from every answer
    bio: Bio = None
    avatar_url: AvatarUrl = None
    role: Role = Field(default="user", sa_type=AutoString)
    is_active: bool = True
    updated_at: datetime = Field(default_factory=utc_now, sa_column_kwargs={"onupdate": utc_now})

    @property
    def full_name(self) -> str:
        names = [name for name in (self.first_name, self.last_name) if name]
        return " ".join(names) or f"user {self.id}"

    @property
    def is_superuser(self) -> bool:
        return self.role == "admin"


class Author(SQLModel):
    id: int
    full_name: str


class UserPublic(Author):
    """What signed-in users may see of each other."""

    bio: Bio
    avatar_url: AvatarUrl
    created_at: datetime


class UserRead(UserPublic):
    """What only the user and admins may see. Frozen: it is a value, and changes no row."""

    model_config = {"frozen": True}

    email: str
    first_name: Name
    last_name: Name
    age: Age
    role: Role
    is_superuser: bool
    is_active: bool
    updated_at: datetime


class LoginSession(SQLModel, table=True):
    """One login. Each refresh replaces `refresh_jti` and keeps the one before it."""

    id: str = Field(default_factory=secrets.token_urlsafe, primary_key=True)
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    refresh_jti: str = Field(default_factory=secrets.token_urlsafe)
    previous_jti: str | None = None
    refreshed_at: datetime = Field(default_factory=utc_now)
    expires_at: datetime


class Token(BaseModel):
    access_token: str
    refresh_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105
    expires_in: int


class TokenBearer(OAuth2PasswordBearer):
    """The token of a request, or of a WebSocket's handshake. None if none is sent."""

    async def __call__(self, request: HTTPConnection) -> str | None:
        header = request.headers.get("Authorization")
        protocols = request.scope.get("subprotocols", [])  # of a WebSocket alone
        if header is None and protocols[:1] == ["bearer"]:  # how a browser sends it
            return str(protocols[-1])
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        return token if scheme.lower() == "bearer" else ""  # refused, like any bad token


async def check_origin(request: HTTPConnection) -> None:
    """Refuses requests that a browser sends for a page of another site (CSRF)."""
    origin = request.headers.get("origin")
    host = request.headers.get("host")
    allowed = {f"http://{host}", f"https://{host}", *settings.cors_origins}
    if origin and origin not in allowed and "*" not in allowed:
        raise APIError("INSUFFICIENT_PERMISSIONS", "This Origin is not in CORS_ORIGINS")


# The address is relative: /docs may stand under a prefix.
BearerToken = Annotated[str | None, Depends(TokenBearer(f".{API}/auth/login"))]
ANONYMOUS_TOO: Any = {"security": [{}, {"TokenBearer": []}]}  # for /docs


identities = Memory(independent_of=frozenset({"post", "comment"}))
LOGIN_OF_TOKEN = (
    select(User, LoginSession)
    .join(LoginSession, col(LoginSession.user_id) == User.id)
    .where(LoginSession.id == sa.bindparam("sid"), User.id == sa.bindparam("sub"), User.is_active)
)


async def find_login(
    session: AsyncSession, claims: TokenClaims, statement: Any = LOGIN_OF_TOKEN
) -> tuple[User, LoginSession]:
    """The active user of a token, and its login session."""
    ids = {"sid": claims.sid, "sub": claims.sub}
    found = (await session.exec(statement, params=ids)).first()
    if found is None:
        raise APIError("INVALID_TOKEN", "The token is malformed, expired or revoked")
    return found.User, found.LoginSession


async def identify(
    request: HTTPConnection, token: str, kind: TokenType, session: AsyncSession
) -> UserRead:
    """The user that this token stands for: read once, then remembered until it may have changed."""
    generation, remembered = await identities.get((kind, token))
    expires, me = remembered or (0, None)
    if me is None or expires <= utc_now().timestamp():
        claims = decode_token(token, kind)
        user, _ = await find_login(session, claims)
        await session.close()  # hold no reader while waiting for the writer or for bcrypt
        me = UserRead.model_validate(user)
        size = len(token) + 12_000  # a user's, at most: a bio of emoji takes 8,000
        identities.keep((kind, token), (claims.exp, me), size, generation)
    request.state.user_id = me.id  # for the log
    return me


async def get_optional_user(
    request: HTTPConnection, token: BearerToken, session: ReadSession
) -> UserRead | None:
    """None without a token. A token that is sent must be valid."""
    return None if token is None else await identify(request, token, "access", session)


OptionalUser = Annotated[UserRead | None, Depends(get_optional_user)]


async def get_current_user(user: OptionalUser) -> UserRead:
    if user is None:
        raise APIError("INVALID_TOKEN", "Not signed in: send Authorization: Bearer …")
    return user


CurrentUser = Annotated[UserRead, Depends(get_current_user)]


async def commit_user(session: AsyncSession) -> None:
    """If two requests use one email, the unique constraint decides."""
    try:
        await session.commit()
    except exc.IntegrityError:
        raise APIError("EMAIL_TAKEN", "There is an account with this email") from None


async def limit_email(email: str, request: Request) -> str:
    """Counts one attempt for this email. Returns its digest, for the log."""
    digest = hashlib.sha256(email.encode()).hexdigest()[:16]
    await limiter.check(EMAIL_LIMIT, digest, request.scope["state"])
    return digest


async def add_user(session: AsyncSession, body: UserCreate, hashed_password: str) -> UserRead:
    user = User.model_validate(body, update={"hashed_password": hashed_password})
    session.add(user)
    await commit_user(session)
    return UserRead.model_validate(user)


class LoginForm(BaseModel):  # OAuth2 has more fields, which are ignored
    username: str
    password: str


class RefreshForm(BaseModel):
    refresh_token: str


async def authenticate(
    form: Annotated[LoginForm, Form()],
    request: Request,
    read_session: ReadSession,
    session: WriteSession,
) -> User:
    """The user with this email and password. Neither the text of the error nor its time tells
    which of the two is wrong."""
    try:
        email = normalize_email(form.username)
    except ValueError:
        email = ""  # no account has it
    digest = await limit_email(email, request)
    found = (await read_session.exec(select(User).where(User.email == email))).first()
    await read_session.close()  # hashing takes a while: others need the connection
    hashed_password = found.hashed_password if found else DECOY_HASH
    is_correct = await verify_password(form.password, hashed_password)
    user = None
    if found and found.is_active and is_correct:  # look again: hashing has taken a while
        user = await session.get(User, found.id, with_for_update=True)
    if user is None or user.hashed_password != hashed_password or not user.is_active:
        logger.info("failed to sign in: email %s", digest)
        raise APIError("INVALID_CREDENTIALS", "Wrong email or password")
    return user


async def open_login_session(session: AsyncSession, user: User) -> LoginSession:
    expired = col(LoginSession.expires_at) < utc_now()
    await session.exec(sa.delete(LoginSession).where(col(LoginSession.user_id) == user.id, expired))
    expires_at = utc_now() + timedelta(days=settings.refresh_token_expire_days)
    login_session = LoginSession(user_id=user.id, expires_at=expires_at)
    session.add(login_session)
    await session.commit()
    logger.info("user %s signed in", user.id)
    return login_session


def create_tokens(row: LoginSession, response: Response) -> Token:
    """The refresh token follows from the row alone: two requests at once get the same one."""
    response.headers["Cache-Control"] = "no-store"
    now = utc_now()
    expires = min(row.expires_at, now + timedelta(minutes=settings.access_token_expire_minutes))
    access = create_token("access", row.user_id, expires, sid=row.id)
    claims = {"sid": row.id, "jti": row.refresh_jti, "iat": row.refreshed_at}
    refresh = create_token("refresh", row.user_id, row.expires_at, **claims)
    seconds = int((expires - now).total_seconds())
    return Token(access_token=access, refresh_token=refresh, expires_in=seconds)


tags.append({"name": "auth", "description": "Accounts, logins and tokens"})
tags.append({"name": "users", "description": "Your own account, and those of others"})
app.description += "To sign in, press **Authorize**: the username is your email."
auth = APIRouter(prefix=f"{API}/auth", tags=["auth"], responses=errors(422, 429))
path_limits[f"{API}/auth/register"] = AUTH_LIMIT
path_limits[f"{API}/auth/login"] = AUTH_LIMIT
body_limits[f"{API}/auth/"] = MAX_FORM_BYTES


@auth.post("/register", status_code=201, responses=errors(403, 409))
async def register(body: UserCreate, session: WriteSession) -> UserRead:
    """Make yourself an account."""
    if settings.registration == "closed":
        raise APIError("INSUFFICIENT_PERMISSIONS", "Only admins make accounts here")
    user = await add_user(session, body, await hash_password(body.password))
    await announce("user.registered", user)
    return user


@auth.post("/login", responses=errors(401))
async def login(
    user: Annotated[User, Depends(authenticate)], session: WriteSession, response: Response
) -> Token:
    """Sign in, with your email as the username."""
    return create_tokens(await open_login_session(session, user), response)


@auth.post("/refresh", responses=errors(401))
async def refresh(
    form: Annotated[RefreshForm, Form()], session: WriteSession, response: Response
) -> Token:
    """Exchange a refresh token for new tokens; a used one ends the session."""
    claims = decode_token(form.refresh_token, "refresh")
    # Locked until the commit: of two requests at once the second sees what the first has written.
    locked = LOGIN_OF_TOKEN.with_for_update(of=LoginSession)
    _, login_session = await find_login(session, claims, locked)
    is_late = utc_now() - login_session.refreshed_at > REFRESH_GRACE
    if login_session.refresh_jti == claims.jti:
        login_session.refresh_jti = secrets.token_urlsafe()
        login_session.previous_jti = claims.jti
        login_session.refreshed_at = utc_now()
    elif login_session.previous_jti != claims.jti or is_late:
        await session.delete(login_session)
        await session.commit()
        logger.warning("user %s: a used refresh token came again, session ended", claims.sub)
        raise APIError("TOKEN_REUSED", "This refresh token was used before: sign in again")
    # Otherwise it is the token before this one, just replaced: it gets the same new ones again.
    await session.commit()
    return create_tokens(login_session, response)


@auth.post("/logout", status_code=204, responses=errors(401))
async def logout(
    me: CurrentUser, token: BearerToken, session: WriteSession, everywhere: bool = False
) -> None:
    """End this session, or all of yours."""
    condition = col(LoginSession.user_id) == me.id
    if not everywhere:
        condition &= col(LoginSession.id) == decode_token(token or "", "access").sid
    await session.exec(sa.delete(LoginSession).where(condition))
    await session.commit()


@at_start
async def delete_expired_sessions() -> AsyncIterator[None]:
    async with prepare_database() as session:
        await session.exec(sa.delete(LoginSession).where(col(LoginSession.expires_at) < utc_now()))
    yield


app.include_router(auth)


@app.get(f"{API}/users/me", tags=["users"], responses=errors(401, 429))
async def get_me(me: CurrentUser) -> UserRead:
    """Show your own account."""
    return me


# --- Posts ----------------------------------------------------------------------------------------
# Table, schemas, guards and routes of posts. Drafts are visible only to their author and to
# admins. What happens to a published post is announced after the commit.

Title = Annotated[str, Field(min_length=1, max_length=255), OneLine, Examples(["Bees"])]
Content = Annotated[str, Field(min_length=1, max_length=20_000), NotBlank, Examples(["They hum."])]
Item = TypeVar("Item", bound=BaseModel)
AnyPage = TypeVar("AnyPage", bound="Page[Any]")
FILTERED_BY = ("author_id", "created_at")
Sort = Literal["created_at", "-created_at", "updated_at", "-updated_at", "title", "-title"]


class PostCreate(StrictBody):
    title: Title
    content: Content
    is_published: StrictBool = False


class PostUpdate(StrictBody):
    """Only the fields that are sent change: the defaults are never used. A version that is sent
    must be the current one."""

    model_config = {"json_schema_extra": {"example": {"title": "Bees", "content": "They dance."}}}

    title: Title = Field(default="")
    content: Content = Field(default="")
    version: StrictInt | None = None


# Each UPDATE adds 1 to it, and fails if another request has changed it since.
VERSION = sa.Column("version", sa.Integer, nullable=False)


class Post(PostCreate, TableBase, table=True):
    # Each order has an index that holds what lists filter by: only what is shown is read.
    __table_args__: Any = (
        sa.Index("ix_post_id", "is_published", "id", *FILTERED_BY),
        sa.Index("ix_post_created_at", "is_published", "created_at", "id", "author_id"),
        sa.Index("ix_post_updated_at", "is_published", "updated_at", "id", *FILTERED_BY),
        sa.Index("ix_post_title", "is_published", "title", "id", *FILTERED_BY),
        sa.Index("ix_post_author", "is_published", "author_id", "created_at"),
        sa.Index("ix_post_author_id", "author_id"),
        {"sqlite_autoincrement": True},
    )
    __mapper_args__ = {"version_id_col": VERSION}

    is_published: bool = False
    version: int = Field(default=None, sa_column=VERSION)
    updated_at: datetime = Field(default_factory=utc_now, sa_column_kwargs={"onupdate": utc_now})
    author_id: int = Field(foreign_key="user.id", ondelete="CASCADE")
    author: User = Relationship(sa_relationship_kwargs={"lazy": "joined", "innerjoin": True})


class PostRead(PostCreate):
    id: int
    is_published: bool
    version: int
    author: Author
    created_at: datetime
    updated_at: datetime


class PostDeleted(SQLModel):
    id: int


def parse_time(value: str, time_of_day: str = "00:00") -> datetime:
    """A time, or a date at this time of the day. UTC where no zone is given."""
    try:
        if len(value) <= 10:
            value = f"{date.fromisoformat(value)}T{time_of_day}"
        parsed = datetime.fromisoformat(value)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be a date or a time in the years 1 to 9999") from None


class PageQuery(BaseModel):
    page: int = Field(default=1, ge=1)
    size: int = Field(default=20, ge=1, le=100)

    @model_validator(mode="after")
    def check_depth(self) -> Self:
        if self.page * self.size > 10_000:  # OFFSET reads all rows that it skips
            raise ValueError("page * size must be at most 10000")
        return self


class Page(BaseModel, Generic[Item]):
    items: list[Item]
    total: int | None = None
    page: int | None = None
    size: int
    pages: int | None = None


class PostPage(Page[PostRead]): ...  # Page[PostRead] would be Page_PostRead_ in /docs


async def paginate(
    session: AsyncSession,
    statement: Any,
    order: tuple[Any, ...],
    query: PageQuery,
    model: type[AnyPage],
    count: Any = None,
) -> AnyPage:
    """One page of what the statement selects. The database sorts ids, which are small, and then
    reads the rows of this page alone."""
    table = statement.column_descriptions[0]["entity"]
    if count is None:
        count = statement.with_only_columns(func.count(), maintain_column_froms=True)
    total = (await session.exec(count)).one()
    offset = (query.page - 1) * query.size
    rows: list[Any] = []
    if offset < total:
        ids = statement.with_only_columns(table.id).order_by(*order)
        ids = ids.offset(offset).limit(query.size)
        rows = list(await session.exec(select(table).where(table.id.in_(ids)).order_by(*order)))
    pages = ceil(total / query.size)
    return model(items=rows, total=total, page=query.page, size=query.size, pages=pages)


PageParams = Annotated[PageQuery, Query()]


class PostQuery(PageQuery):
    author: Annotated[str, StringConstraints(max_length=100), NO_NUL] = ""
    min_date: Annotated[datetime | None, BeforeValidator(parse_time, str)] = None
    max_date: Annotated[
        datetime | None, BeforeValidator(partial(parse_time, time_of_day="23:59:59.999999"), str)
    ] = None
    sort: Sort | None = None
    before: Id | None = None

    @model_validator(mode="after")
    def check_before(self) -> Self:
        if self.before and self.model_fields_set & {"page", "sort"}:
            raise ValueError("before goes with neither page nor sort")
        return self


POST_BY_ID = select(Post).where(Post.id == sa.bindparam("post_id"))
PUBLISHED = select(Post).where(Post.is_published)
ALL_POSTS = select(func.count()).select_from(Post).scalar_subquery()
DRAFTS = select(func.count()).where(~col(Post.is_published)).scalar_subquery()
COUNT_PUBLISHED = select(ALL_POSTS - DRAFTS)  # of a million posts ten times as fast as counting


def may_change(me: UserRead | None, author_id: int) -> bool:
    return me is not None and (me.is_superuser or me.id == author_id)


async def find_post(
    session: AsyncSession, post_id: int, me: UserRead | None, statement: Any = POST_BY_ID
) -> Post:
    """Drafts are visible only to their author and to admins."""
    post: Post | None = (await session.exec(statement, params={"post_id": post_id})).first()
    if post is None or not (post.is_published or may_change(me, post.author_id)):
        raise APIError("NOT_FOUND", "Post not found")
    return post


async def get_visible_post(post_id: Id, me: OptionalUser, session: ReadSession) -> Post:
    return await find_post(session, post_id, me)


async def get_locked_post(post_id: Id, me: CurrentUser, session: WriteSession) -> Post:
    """Visible to the user, and locked until the commit."""
    return await find_post(session, post_id, me, POST_BY_ID.with_for_update(of=Post))


VisiblePost = Annotated[Post, Depends(get_visible_post)]
LockedPost = Annotated[Post, Depends(get_locked_post)]


async def get_own_post(post: LockedPost, me: CurrentUser) -> Post:
    if not may_change(me, post.author_id):
        raise APIError("INSUFFICIENT_PERMISSIONS", "This post is somebody else's")
    return post


OwnPost = Annotated[Post, Depends(get_own_post)]


async def announce_post(kind: EventKind, post: Post, subject: SQLModel | None = None) -> None:
    """Events are announced for published posts only."""
    if post.is_published:
        await announce(kind, subject or PostRead.model_validate(post))


def filter_posts(query: PostQuery) -> Any:
    statement = PUBLISHED
    # coalesce() hides the column from its index: else the planner sorts a year's posts by title.
    created_at = func.coalesce(Post.created_at, Post.created_at)
    if query.min_date:
        statement = statement.where(created_at >= query.min_date)
    if query.max_date:
        statement = statement.where(created_at <= query.max_date)
    if query.author:  # last, since it takes the longest to look at
        names = [col(User.first_name), col(User.last_name)]
        matches = sa.or_(*(name.icontains(query.author, autoescape=True) for name in names))
        statement = statement.where(col(Post.author_id).in_(select(User.id).where(matches)))
    return statement


tags.append({"name": "posts", "description": "Drafts, publishing and lists"})
posts = APIRouter(prefix=f"{API}/posts", tags=["posts"], responses=errors(401, 422, 429))


@posts.get("", openapi_extra=ANONYMOUS_TOO)
async def list_posts(
    query: Annotated[PostQuery, Query()], me: OptionalUser, session: ReadSession
) -> PostPage:
    """List published posts, newest first, or those before a given post."""
    statement = filter_posts(query)
    if query.before:
        statement = statement.where(Post.id < query.before).order_by(col(Post.id).desc())
        rows = await session.exec(statement.limit(query.size))
        return PostPage(items=list(rows), size=query.size)
    sort = query.sort or "-id"
    column = getattr(Post, sort.removeprefix("-"))
    order = (column.desc(), col(Post.id).desc()) if sort.startswith("-") else (column, Post.id)
    count = COUNT_PUBLISHED if statement is PUBLISHED else None
    return await paginate(session, statement, order, query, PostPage, count)


@posts.post("", status_code=201, responses=errors(409))
async def create_post(
    body: PostCreate, me: CurrentUser, session: WriteSession, request: Request, response: Response
) -> PostRead:
    """Write a post: a draft, unless you publish it at once."""
    post = Post.model_validate(body, update={"author_id": me.id})
    session.add(post)
    await session.commit()
    created = PostRead.model_validate(post, update={"author": me})
    await announce_post("post.published", post, created)
    response.headers["Location"] = request.url_for("get_post", post_id=post.id).path
    return created


@posts.get("/{post_id}", responses=errors(404), openapi_extra=ANONYMOUS_TOO)
async def get_post(post: VisiblePost) -> PostRead:
    """Show a post; drafts only to their author and to admins."""
    return PostRead.model_validate(post)


# An operationId, which is the name of the route, must be unique: so PUT has a name of its own.
@posts.put("/{post_id}", name="put_post", responses=errors(403, 404, 409))
@posts.patch("/{post_id}", responses=errors(403, 404, 409))
async def update_post(post: OwnPost, body: PostUpdate, session: WriteSession) -> PostRead:
    """Change a post; a version that is sent must be the current one."""
    if body.version not in (None, post.version):
        raise APIError("CONFLICT", f"The post has changed: its version is {post.version}")
    changes = body.model_dump(exclude_unset=True, exclude={"version"})
    if changes:  # the time makes it an UPDATE even where all else is as it was
        post.sqlmodel_update(changes | {"updated_at": utc_now()})
        await session.commit()
        await announce_post("post.updated", post)
    return PostRead.model_validate(post)


@posts.delete("/{post_id}", status_code=204, responses=errors(403, 404))
async def delete_post(post: OwnPost, session: WriteSession) -> None:
    """Delete a post and its comments."""
    await session.delete(post)
    await session.commit()
    await announce_post("post.deleted", post, PostDeleted(id=post.id))


@posts.post("/{post_id}/publish", responses=errors(403, 404))
async def publish_post(post: LockedPost, me: CurrentUser, session: WriteSession) -> PostRead:
    """Publish your draft, for good; doing it twice changes nothing."""
    if post.author_id != me.id:
        raise APIError("INSUFFICIENT_PERMISSIONS", "Only its author publishes a post")
    if not post.is_published:
        post.is_published = True
        await session.commit()
        await announce_post("post.published", post)
    return PostRead.model_validate(post)


app.include_router(posts)


@app.get(f"{API}/users/me/posts", tags=["posts"], responses=errors(401, 422, 429))
async def list_my_posts(query: PageParams, me: CurrentUser, session: ReadSession) -> PostPage:
    """List your own posts, newest first, drafts included."""
    statement = select(Post).where(Post.author_id == me.id)
    return await paginate(session, statement, (col(Post.id).desc(),), query, PostPage)


# --- Comments -------------------------------------------------------------------------------------
# The smallest example of it all: a table, its schemas, three routes. Comments are visible to those
# who can see the post.

CommentText = Annotated[str, Field(min_length=1, max_length=500), Trimmed, Examples(["Me too."])]


class CommentCreate(StrictBody):
    text: CommentText


class Comment(CommentCreate, TableBase, table=True):
    author_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    post_id: int = Field(foreign_key="post.id", ondelete="CASCADE", index=True)
    author: User = Relationship(sa_relationship_kwargs={"lazy": "joined", "innerjoin": True})


class CommentRead(CommentCreate):
    id: int
    author: Author
    post_id: int
    created_at: datetime


class CommentPage(Page[CommentRead]): ...


class CommentDeleted(SQLModel):
    id: int
    post_id: int


tags.append({"name": "comments", "description": "What people say about a post"})
comments = APIRouter(prefix=API, tags=["comments"], responses=errors(401, 404, 422, 429))


@comments.get("/posts/{post_id}/comments", openapi_extra=ANONYMOUS_TOO)
async def list_comments(post: VisiblePost, query: PageParams, session: ReadSession) -> CommentPage:
    """List the comments on a post, oldest first."""
    statement = select(Comment).where(Comment.post_id == post.id)
    return await paginate(session, statement, (col(Comment.id),), query, CommentPage)


@comments.post("/posts/{post_id}/comments", status_code=201, responses=errors(409))
async def create_comment(
    post: LockedPost, body: CommentCreate, me: CurrentUser, session: WriteSession
) -> CommentRead:
    """Comment on a post that you see."""
    comment = Comment.model_validate(body, update={"author_id": me.id, "post_id": post.id})
    session.add(comment)
    await session.commit()
    created = CommentRead.model_validate(comment, update={"author": me})
    await announce_post("comment.created", post, created)
    return created


@comments.delete("/comments/{comment_id}", status_code=204, responses=errors(403, 409))
async def delete_comment(comment_id: Id, me: CurrentUser, session: WriteSession) -> None:
    """Delete a comment of yours, or one on your post."""
    comment = await session.get(Comment, comment_id)
    if comment is None:
        raise APIError("NOT_FOUND", "Comment not found")
    post = await find_post(session, comment.post_id, me)
    if not (may_change(me, comment.author_id) or may_change(me, post.author_id)):
        raise APIError("INSUFFICIENT_PERMISSIONS", "This comment is somebody else's")
    await session.delete(comment)
    await session.commit()
    await announce_post("comment.deleted", post, CommentDeleted(id=comment_id, post_id=post.id))


app.include_router(comments)


# --- Users ----------------------------------------------------------------------------------------
# What people do with their own account, and admins with all of them. `{user}` in a path is an id or
# `me`. Admins cannot change their own role, so one always remains.


def require_role(role: Role) -> Callable[[UserRead], Awaitable[UserRead]]:
    """Makes a dependency: `Depends(require_role("admin"))`."""

    async def check_role(me: CurrentUser) -> UserRead:
        if me.role != role:
            raise APIError("INSUFFICIENT_PERMISSIONS", f"Only for the role {role}")
        return me

    return check_role


Superuser = Annotated[UserRead, Depends(require_role("admin"))]


class UserCreateByAdmin(UserCreate):
    email: Email = Field(schema_extra={"examples": ["eve@example.com"]})
    role: Role = "user"
    is_active: StrictBool = True


class UserUpdate(UserBase):
    """Only the fields that are sent change: the defaults are never used. null clears what may be
    empty."""

    model_config = {"json_schema_extra": {"example": {"first_name": "Dora", "bio": "Bees!"}}}

    bio: Bio = None
    avatar_url: AvatarUrl = None
    email: Email = Field(default="")
    password: Password = Field(default="")
    current_password: Annotated[str, StringConstraints(max_length=128)] = ""
    role: Role = Field(default="user")
    is_active: StrictBool = Field(default=True)


class UserPage(Page[UserRead]): ...


class UserPublicPage(Page[UserPublic]): ...


class UserQuery(PageQuery):
    is_active: bool | None = None


async def get_user_id(user: Literal["me"] | Id, me: CurrentUser) -> int:
    return me.id if user == "me" else user


UserId = Annotated[int, Depends(get_user_id)]


async def get_own_user_id(user_id: UserId, me: CurrentUser) -> int:
    """Their own id, or any for an admin. The refusal does not tell which ids exist."""
    if user_id != me.id and not me.is_superuser:
        raise APIError("INSUFFICIENT_PERMISSIONS", "This account is somebody else's")
    return user_id


async def check_still_superuser(session: AsyncSession, me: UserRead) -> None:
    """Looked at again where it counts: in the transaction, locked until the commit."""
    row = await session.get(User, me.id, with_for_update=True, populate_existing=True)
    if row is None or not (row.is_superuser and row.is_active):
        raise APIError("INSUFFICIENT_PERMISSIONS", "Only for the role admin")


async def find_user(session: AsyncSession, user_id: int, lock: bool = False) -> User:
    user = await session.get(User, user_id, with_for_update=lock or None)
    if user is None:
        raise APIError("NOT_FOUND", "User not found")
    return user


async def check_current_password(
    me: UserRead, password: str, request: Request, session: AsyncSession
) -> str:
    """Counts by email, as a login does: it is another way to guess. Returns the hash."""
    await limit_email(me.email, request)
    row = await session.get(User, me.id)
    await session.close()
    check_waiting_passwords(part=0.25)  # the other places are for signing in
    if row is None or not await verify_password(password, row.hashed_password):
        raise APIError("INSUFFICIENT_PERMISSIONS", "current_password is missing or wrong")
    return row.hashed_password


def check_may_change_role(sent: set[str], user_id: int, me: UserRead) -> None:
    if not sent & {"role", "is_active"}:
        return
    if not me.is_superuser:
        raise APIError("INSUFFICIENT_PERMISSIONS", "Only admins change role and is_active")
    if user_id == me.id:
        raise APIError("CONFLICT", "You cannot change your own role, so that an admin remains")


async def end_logins(session: AsyncSession, user_id: int) -> None:
    await session.exec(sa.delete(LoginSession).where(col(LoginSession.user_id) == user_id))


users = APIRouter(prefix=f"{API}/users", tags=["users"], responses=errors(401, 422, 429))


@users.get("", responses=errors(403))
async def list_users(
    query: Annotated[UserQuery, Query()], me: CurrentUser, session: ReadSession
) -> UserPage | UserPublicPage:
    """List users by id; admins see all fields and filter by is_active."""
    statement = select(User)
    if query.is_active is not None:
        if not me.is_superuser:
            raise APIError("INSUFFICIENT_PERMISSIONS", "Only admins filter by is_active")
        statement = statement.where(User.is_active == query.is_active)
    model = UserPage if me.is_superuser else UserPublicPage
    return await paginate(session, statement, (col(User.id),), query, model)


@users.post("", status_code=201, responses=errors(403, 409))
async def create_user(
    body: UserCreateByAdmin, me: Superuser, session: WriteSession, send_welcome: bool = False
) -> UserRead:
    """Make an account for somebody."""
    hashed_password = await hash_password(body.password)
    await check_still_superuser(session, me)
    user = await add_user(session, body, hashed_password)
    if send_welcome:
        await announce("user.invited", user)
    return user


@users.get("/{user}", responses=errors(404))
async def get_user(user_id: UserId, me: CurrentUser, session: ReadSession) -> UserRead | UserPublic:
    """Show a user, with every field to themselves and to admins."""
    user = await find_user(session, user_id)
    if user_id == me.id or me.is_superuser:
        return UserRead.model_validate(user)
    return UserPublic.model_validate(user)


@users.patch("/{user}", responses=errors(403, 404, 409))
async def update_user(
    user_id: Annotated[int, Depends(get_own_user_id)],
    body: UserUpdate,
    me: CurrentUser,
    request: Request,
    read_session: ReadSession,
    session: WriteSession,
) -> UserRead:
    """Change an account; your own email or password needs current_password."""
    sent = body.model_fields_set
    check_may_change_role(sent, user_id, me)
    old_hash = None
    if user_id == me.id and sent & {"email", "password"}:
        old_hash = await check_current_password(me, body.current_password, request, read_session)
    changes = body.model_dump(exclude_unset=True, exclude={"password", "current_password"})
    if "password" in sent:
        changes["hashed_password"] = await hash_password(body.password)
    if user_id != me.id:
        await check_still_superuser(session, me)
    user = await find_user(session, user_id, lock=True)
    if old_hash and old_hash != user.hashed_password:
        raise APIError("CONFLICT", "Your password has changed in the meantime")
    user.sqlmodel_update(changes)
    if "password" in sent or not user.is_active:
        await end_logins(session, user_id)
    await commit_user(session)
    for field in sent & {"password", "role", "is_active"}:
        logger.info("user %s: %s changed by user %s", user_id, field, me.id)
    return UserRead.model_validate(user)


@users.delete("/{user}", status_code=204, responses=errors(403, 404, 409))
async def delete_user(user_id: UserId, me: Superuser, session: WriteSession) -> None:
    """Delete a user and everything that is theirs."""
    if user_id == me.id:
        raise APIError("CONFLICT", "You cannot delete yourself, so that an admin remains")
    await check_still_superuser(session, me)
    user = await find_user(session, user_id)
    statement = sa.delete(Post).where(col(Post.author_id) == user_id)
    rows = await session.exec(statement.returning(col(Post.id), col(Post.is_published)))
    deleted = [row.id for row in rows if row.is_published]
    await session.delete(user)
    await session.commit()
    for post_id in deleted:
        await announce("post.deleted", PostDeleted(id=post_id))


async def make_superuser(email: str, password: str) -> None:
    """An admin who is there already is left alone."""
    hashed_password = await hash_password(password)
    async with prepare_database() as session:
        found = (await session.exec(select(User).where(User.email == email))).first()
        if found and found.is_superuser:
            return
        user = found or User(email=email, hashed_password="")
        user.hashed_password = hashed_password
        user.role = "admin"
        user.is_active = True
        session.add(user)
        await session.flush()
        await end_logins(session, user.id)
        if found:
            logger.info("user %s: role and password changed at the start", user.id)


@at_start
async def make_first_superuser() -> AsyncIterator[None]:
    if settings.first_superuser_email and settings.first_superuser_password:
        await make_superuser(settings.first_superuser_email, settings.first_superuser_password)
    yield


app.include_router(users)


# --- Cache ----------------------------------------------------------------------------------------
# Anonymous answers come from memory, ready as they were sent before, until the next commit.

answers = Memory()


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    etag: bytes


async def collect_answer(app: ASGIApp, scope: Scope, receive: Receive) -> Answer:
    messages: list[Message] = []

    async def collect(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, collect)
    body = b"".join(message.get("body", b"") for message in messages)
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'.encode()
    return Answer(messages[0]["status"], messages[0]["headers"], body, etag)


class CacheMiddleware:
    """In front of FastAPI, for GETs of posts and comments without a token."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_get = scope.get("method") == "GET"
        is_public = is_get and f"{scope['state']['path']}/".startswith(f"{API}/posts/")
        if not is_public or app.dependency_overrides:  # an override may know the user otherwise
            return await self.app(scope, receive, send)
        request_headers = scope["state"]["request_headers"]
        response_headers = scope["state"]["response_headers"]
        response_headers[b"vary"] = b"Origin, Authorization"
        if b"authorization" in request_headers:
            return await self.app(scope, receive, send)
        key = (scope["path"], scope["query_string"], scope.get("root_path"))
        generation, remembered = await answers.get(key)
        answer = remembered or await collect_answer(self.app, scope, receive)
        if answer.status == 200:
            if remembered is None:
                size = len(answer.body) + len(scope["path"]) + len(scope["query_string"]) + 1_000
                answers.keep(key, answer, size, generation)
            if generation:
                response_headers[b"x-cache"] = b"hit" if remembered else b"miss"
            response_headers[b"etag"] = answer.etag
            response_headers[b"cache-control"] = b"public, max-age=0, must-revalidate"
            known = request_headers.get(b"if-none-match", b"")
            if answer.etag in known or known.strip() == b"*":
                answer = Answer(304, [], b"", answer.etag)
        start = {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
        await send(start)
        await send({"type": "http.response.body", "body": answer.body})


app.user_middleware.append(Middleware(CacheMiddleware))


# --- Live events ----------------------------------------------------------------------------------
# What happens to published posts, as a stream. The hub is a log of the last events that each
# listener follows at its own pace: there are no queues, and a slow client does not delay others.

MAX_LISTENERS = 1_000
MAX_LISTENERS_OF_CLIENT = 60
MAX_EVENTS = 1_000  # that can be replayed
MAX_BEHIND = 10_000  # events that a connected listener may be behind, as while a user is deleted


class Event(NamedTuple):
    id: str
    kind: str
    post_id: int
    data: str  # JSON


class EventHub:
    """`publish` is `add`; or, with Redis, it has every process `add` the event."""

    def __init__(self) -> None:
        self.publish: Callable[[str, int, str], Awaitable[None]] = self.add
        self.reset()
        at_start(self.start)

    async def start(self) -> AsyncIterator[None]:
        self.reset()
        yield

    def reset(self) -> None:
        self.run = secrets.token_hex(4)
        self.position = 1  # the number that the next event gets
        # Never empty: the first entry gives an id to clients that listen before anything happens.
        self.log = deque([Event(f"{self.run}-0", "reset", 0, "{}")], maxlen=MAX_BEHIND)
        self.changed = asyncio.Event()

    async def add(self, kind: str, post_id: int, data: str, event_id: str | None = None) -> None:
        self.log.append(Event(event_id or f"{self.run}-{self.position}", kind, post_id, data))
        self.position += 1
        self.changed.set()  # wakes the listeners that wait now
        self.changed = asyncio.Event()  # for those that wait from now on

    def position_after(self, event_id: str) -> int:
        """-1 if this id is unknown or too old."""
        for missed, event in enumerate(reversed(self.log)):
            if event.id == event_id and missed <= MAX_EVENTS:
                return self.position - missed
        return -1

    async def subscribe(self, position: int, post_id: int | None = None) -> AsyncIterator[Event]:
        """The events from this number on, or `reset` where the log no longer has them."""
        while True:
            if position >= self.position:
                await self.changed.wait()
            elif position < 0 or self.position - position > len(self.log):
                position = self.position
                yield self.log[-1]._replace(kind="reset", data="{}")
            else:
                event = self.log[position - self.position]  # counted from the end
                position += 1
                if post_id in (None, event.post_id):
                    yield event


events = EventHub()
listening: list[str] = []  # clients, each as often as it listens


async def publish_event(kind: EventKind, subject: Any) -> None:
    if not kind.startswith("user."):
        post_id = getattr(subject, "post_id", subject.id)
        await events.publish(kind, post_id, subject.model_dump_json(exclude={"content"}))


listeners.append(publish_event)


async def get_listener_place(request: HTTPConnection) -> AsyncIterator[None]:
    """Counts open streams and rooms, until they are closed."""
    client = client_key(request.state.client)
    if len(listening) >= MAX_LISTENERS or listening.count(client) >= MAX_LISTENERS_OF_CLIENT:
        raise APIError("UNAVAILABLE", "Too many listeners, try again")
    listening.append(client)
    try:
        yield
    finally:
        listening.remove(client)


ListenerPlace = Annotated[None, Depends(get_listener_place)]
tags.append({"name": "live", "description": "What happens to posts, as a stream"})
live = APIRouter(prefix=API, tags=["live"], responses=errors(401, 422, 429))


@live.get("/events", response_class=EventSourceResponse, openapi_extra=ANONYMOUS_TOO)
async def stream_events(
    me: OptionalUser,
    place: ListenerPlace,
    post_id: Id | None = None,
    last_event_id: str = "",
    resumed: Annotated[str, Header(alias="Last-Event-ID")] = "",
) -> AsyncIterator[ServerSentEvent]:
    """Stream what happens to published posts, from your last event on."""
    last_id = resumed or last_event_id
    position = events.position_after(last_id) if last_id else events.position
    async for event in events.subscribe(position, post_id):
        yield ServerSentEvent(id=event.id, event=event.kind, raw_data=event.data)


app.include_router(live)


# --- Rooms ----------------------------------------------------------------------------------------
# Each post has a room, a WebSocket for people who are signed in: they see the post's events, and
# what others write there. Nothing of it is stored.

CHAT_LIMIT = Limit("chat", 20, 10)
CHECK_SECONDS = 20.0
CLOSE_CODES = {"INVALID_TOKEN": 4401, "NOT_FOUND": 4404, "BAD_REQUEST": 1008, "RATE_LIMITED": 1008}
chat = EventHub()


class ChatMessage(StrictBody):
    type: Literal["message"]
    text: CommentText


async def receive_messages(websocket: WebSocket, post_id: int, me: UserRead) -> None:
    author = Author.model_validate(me).model_dump()
    while True:
        try:
            message = ChatMessage.model_validate_json(await websocket.receive_text())
        except (KeyError, ValidationError):  # KeyError: the frame is binary
            raise APIError("BAD_REQUEST", "Not a message") from None
        await limiter.check(CHAT_LIMIT, str(me.id), websocket.scope["state"])
        data = {"type": "message", "from": author, "text": message.text}
        await chat.publish("message", post_id, json.dumps(data))


async def send_events(websocket: WebSocket, post_id: int, position: int) -> None:
    async for event in events.subscribe(position, post_id):
        data = f'{{"type":"{event.kind}","id":"{event.id}","data":{event.data}}}'
        await websocket.send_text(data)
        if event.kind == "post.deleted":
            raise APIError("NOT_FOUND", "Post not found")


async def send_messages(websocket: WebSocket, post_id: int, position: int) -> None:
    async for event in chat.subscribe(position, post_id):
        if event.kind == "reset":
            raise APIError("UNAVAILABLE", "This client is too slow")
        await websocket.send_text(event.data)


async def check_access(
    websocket: WebSocket, post_id: int, me: UserRead, token: str | None, session: AsyncSession
) -> None:
    """Ends the room when the token is no longer valid, or the post no longer visible."""
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        # Without a token `me` comes from an override.
        me = await get_optional_user(websocket, token, session) or me
        await find_post(session, post_id, me)
        await session.close()


@app.websocket(f"{API}/ws/posts/{{post_id}}", dependencies=[Depends(check_origin)])
async def join_room(
    websocket: WebSocket,
    token: BearerToken,
    me: CurrentUser,
    post: VisiblePost,
    place: ListenerPlace,
    session: ReadSession,
) -> None:
    await session.close()  # the socket may stay open for days
    event_position = events.position
    chat_position = chat.position
    is_browser = "bearer" in websocket.scope["subprotocols"]
    await websocket.accept("bearer" if is_browser else None)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_messages, websocket, post.id, me)
            tasks.start_soon(send_events, websocket, post.id, event_position)
            tasks.start_soon(send_messages, websocket, post.id, chat_position)
            tasks.start_soon(check_access, websocket, post.id, me, token, session)
    except* WebSocketDisconnect:
        pass  # the client has gone
    except* (APIError, exc.SQLAlchemyError) as group:
        code = getattr(group.exceptions[0], "code", "")
        with suppress(WebSocketDisconnect):  # the client has gone in the meantime
            await websocket.close(CLOSE_CODES.get(code, 1013))


# --- Mail -----------------------------------------------------------------------------------------
# Each mail has a thread of its own that ends with the process: a mail server that hangs delays
# neither an answer nor a stop. What cannot be sent is a line in the log, and is not tried again.

MAX_MAILS = 50
STOP_SECONDS = 2.0
mail_threads: set[threading.Thread] = set()
get_tls_context = cache(ssl.create_default_context)  # to make one takes 50 ms


def deliver(to: str, subject: str, body: str) -> None:
    url = settings.smtp_url
    mail = EmailMessage()
    mail["From"] = settings.mail_from
    mail["To"] = to
    mail["Subject"] = subject
    mail.set_content(body, cte="8bit")
    if url is None:
        print(f"--- Mail to {to}: {subject}\n{body}---\n", end="", flush=True)
        return
    host = (url.host or "").strip("[]")
    is_smtps = url.scheme == "smtps"
    connect = partial(smtplib.SMTP_SSL, context=get_tls_context()) if is_smtps else smtplib.SMTP
    with connect(host, url.port or 0, timeout=5) as server:
        server.ehlo()
        if server.has_extn("starttls") and not is_smtps:
            server.starttls(context=get_tls_context())
        elif url.username and not is_smtps:
            logger.error("mail not sent: the server has no STARTTLS, and SMTP_URL has a password")
            return
        if url.username:
            server.login(unquote(url.username), unquote(url.password or ""))
        server.send_message(mail, settings.mail_from, [to])


def deliver_or_log(to: str, subject: str, body: str) -> None:
    try:
        if to:  # no address: nothing is sent, and it takes as long as if it were
            deliver(to, subject, body)
    except Exception as error:  # the email package raises all kinds; its text may hold the email
        logger.error("mail not sent: %s", type(error).__name__)
    finally:
        mail_threads.discard(threading.current_thread())


def send_mail(to: str, subject: str, body: str, places: int = MAX_MAILS) -> None:
    if settings.smtp_url is None and settings.production:
        logger.warning("mail not sent: SMTP_URL is not set")
    elif len(mail_threads) >= places:
        logger.error("mail not sent: %s are under way", places)
    else:
        thread = threading.Thread(target=deliver_or_log, args=(to, subject, body), daemon=True)
        mail_threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            mail_threads.discard(thread)
            logger.error("mail not sent: the system has no thread left")


async def mail_what_happened(kind: EventKind, subject: Any) -> None:
    """A welcome mail repeats nothing from the form: it could send spam to any address."""
    if kind in ("user.registered", "user.invited"):
        body = f"Welcome!\n\nThere is an account with this email at {settings.public_url}\n"
        send_mail(subject.email, "Welcome", body)
    if kind == "user.forgot_password":
        body = f"Choose a new password within half an hour:\n\n{subject.link}\n"
        send_mail(subject.email, "Your password", body)
    if kind == "post.published" and settings.admin_email:
        link = f"{settings.public_url}{API}/posts/{subject.id}"
        body = f"{subject.author.full_name} published: {subject.title}\n\n{link}\n"
        # Many posts at once leave places for the mails above.
        send_mail(settings.admin_email, "A post was published", body, MAX_MAILS // 2)


@at_start
async def wait_for_mails() -> AsyncIterator[None]:
    yield
    with anyio.move_on_after(STOP_SECONDS):
        for thread in list(mail_threads):
            await anyio.to_thread.run_sync(thread.join, STOP_SECONDS, abandon_on_cancel=True)


listeners.append(mail_what_happened)


# --- The gate -------------------------------------------------------------------------------------
# Guards apps that know nothing of accounts: their proxy asks /auth/verify before each request.
# People sign in on a page without a script, and get a cookie that is good for this chapter alone.

COOKIE = "nutshell"
LOCAL_PATH = re.compile(r"/(?!/)[!-\[\]-~]{0,2000}")  # `//` and `\` may lead to another host
GATE_STYLE = """
  :root { color-scheme: light dark; --nut: light-dark(#85480f, #f0b566);
    --card: light-dark(#fff, #26201b); --alert: light-dark(#b3261e, #ff9d94) }
  * { box-sizing: border-box; font: inherit; overflow-wrap: anywhere }
  body { min-height: 100vh; margin: 0; padding: 1em; display: grid; place-items: center;
    background: light-dark(#f8f3ec, #191512); font: clamp(17px, 1.2vw, 28px)/1.5 system-ui }
  main { width: min(100%, 24em); padding: 2em; background: var(--card) }
  main, input, button { border: 1px solid #8f8071; border-radius: .5em }
  input, button { width: 100%; margin: .2em 0 1em; padding: .6em .9em; background: none }
  button { background: var(--nut); color: var(--card); cursor: pointer }
  h1, a { margin: 0; color: var(--nut) } h1 { font-size: 1.5em } .alert { color: var(--alert) }
"""
GATE_PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title><link rel="icon" href="data:,"><style>$style</style>
<main><h1>$title</h1><p class="alert" role="alert">$alert</p>$form</main>
""")
SIGN_IN_FORM = string.Template("""<form method="post" action="sign-in">
<label>Email <input name="username" type="email" value="$username" required autofocus
  autocomplete="username"></label>
<label>Password <input name="password" type="password" required
  autocomplete="current-password"></label>
<input name="next" type="hidden" value="$next"><button>Sign in</button></form>$links""")
SIGN_OUT_FORM = string.Template("""<p>You are signed in as <b>$name</b>.</p>
<form method="post" action="sign-out"><button>Sign out</button></form>
<a href="$next">Continue</a>""")
# A browser applies only the style that has this hash.
STYLE_HASH = base64.b64encode(hashlib.sha256(GATE_STYLE.encode()).digest()).decode()
GATE_HEADERS = {
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "strict-origin",  # with no-referrer the Origin of a form would be null
}
sign_in_links: list[str] = []  # that chapters add below the form


def gate_page(
    title: str, form: string.Template, error: APIError | None = None, **values: str
) -> Response:
    """The values may come from any client, so they are escaped."""
    safe = {name: html.escape(value) for name, value in values.items()}
    filled = form.substitute(safe, links="\n".join(sign_in_links))
    alert = html.escape(str(error.detail)) if error else ""
    page = GATE_PAGE.substitute(title=title, style=GATE_STYLE, alert=alert, form=filled)
    content = page.encode(errors="replace")  # a form may hold half of a surrogate pair
    if error is None:
        return HTMLResponse(content, headers=GATE_HEADERS)
    return HTMLResponse(content, error.status_code, GATE_HEADERS | dict(error.headers or {}))


def redirect_to_sign_in(request: Request, status: int = 303, query: str = "") -> Response:
    path = request.url_for("show_sign_in").path
    return RedirectResponse(f"{path}{query}", status, GATE_HEADERS)


def local_path(path: str) -> str:
    return path if LOCAL_PATH.fullmatch(path) else "/"


async def get_visitor(request: Request, me: OptionalUser, session: ReadSession) -> UserRead | None:
    """Who is signed in, by token or cookie. A cookie that is no longer good counts as none."""
    request.state.response_headers[b"cache-control"] = b"private, no-store"
    cookie = request.cookies.get(COOKIE)
    if me or cookie is None:
        return me
    try:
        return await identify(request, cookie, "cookie", session)
    except APIError as error:
        if error.status_code != 401:
            raise
        return None


Visitor = Annotated[UserRead | None, Depends(get_visitor)]


class VerifyQuery(StrictBody):
    """A parameter that is not known is refused, so that a typo never opens a gate."""

    # Lists, since of several values a plain field takes the last: ?role=admin&role=user must fail.
    role: list[Role] = Field(default=["user"], max_length=1)
    sign_in: list[bool] = Field(default=[False], max_length=1)


class SignInForm(LoginForm):
    next: str = "/"


gate = APIRouter(tags=["auth"])


@gate.get(f"{API}/auth/verify", response_class=Response, responses=errors(401, 403, 422))
async def verify(
    query: Annotated[VerifyQuery, Query()], visitor: Visitor, request: Request
) -> Response:
    """Tell a proxy who is asking, by token or by cookie.

    With `role=admin` only admins pass, with `sign_in=true` browsers get the sign-in page."""
    if visitor is None:
        headers = request.headers
        is_page = "text/html" in headers.get("accept", "").lower()
        if query.sign_in[0] and is_page and headers.get("x-forwarded-method", "GET") == "GET":
            path = quote(headers.get("x-forwarded-uri", "/").encode("latin-1"), safe="")
            return redirect_to_sign_in(request, 302, f"?next={path}")
        raise APIError("INVALID_TOKEN", "Not signed in: send Authorization: Bearer …")
    if "admin" in query.role and not visitor.is_superuser:
        raise APIError("INSUFFICIENT_PERMISSIONS", "Only for the role admin")
    plain = string.punctuation.replace("%", "") + " "  # printable ASCII stays as it is
    return Response(
        headers={
            "Remote-User": str(visitor.id),
            "Remote-Name": quote(visitor.full_name, safe=plain),
            "Remote-Email": quote(visitor.email, safe=plain),
            "Remote-Groups": visitor.role,
        }
    )


@gate.get("/sign-in", include_in_schema=False)
async def show_sign_in(request: Request, visitor: Visitor) -> Response:
    """The path is all that stands behind `next=`, `&` too: nginx does not escape it, Caddy does."""
    _, _, path = request.url.query.partition("next=")
    path = local_path(path if path.startswith("/") else unquote(path))
    if visitor:
        return gate_page("Welcome", SIGN_OUT_FORM, name=visitor.full_name, next=path)
    return gate_page("Sign in", SIGN_IN_FORM, username="", next=path)


@gate.post("/sign-in", dependencies=[Depends(check_origin)], include_in_schema=False)
async def sign_in(
    form: Annotated[SignInForm, Form()],
    request: Request,
    read_session: ReadSession,
    session: WriteSession,
) -> Response:
    path = local_path(form.next)
    try:
        user = await authenticate(form, request, read_session, session)
    except APIError as error:
        return gate_page("Sign in", SIGN_IN_FORM, error, username=form.username, next=path)
    login_session = await open_login_session(session, user)
    cookie = create_token("cookie", user.id, login_session.expires_at, sid=login_session.id)
    response = RedirectResponse(path, 303, GATE_HEADERS)
    response.set_cookie(
        COOKIE,
        cookie,
        max_age=settings.refresh_token_expire_days * 24 * 3_600,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",
    )
    return response


@gate.post("/sign-out", dependencies=[Depends(check_origin)], include_in_schema=False)
async def sign_out(request: Request, session: WriteSession) -> Response:
    response = redirect_to_sign_in(request)
    response.delete_cookie(COOKIE)
    try:
        claims = decode_token(request.cookies.get(COOKIE, ""), "cookie")
    except APIError:  # a cookie that is no longer valid has no session
        return response
    await session.exec(sa.delete(LoginSession).where(col(LoginSession.id) == claims.sid))
    await session.commit()
    return response


path_limits[f"{API}/auth/verify"] = None
path_limits["POST /sign-in"] = AUTH_LIMIT
body_limits["/sign-"] = MAX_FORM_BYTES
app.include_router(gate)


# --- Forgotten passwords --------------------------------------------------------------------------
# A link by mail, good for half an hour and for one use. It needs no table: its token holds a digest
# of the password's hash, so a new password ends all links.

RESET_MINUTES = 30
FORGOT_FORM = string.Template("""<form method="post" action="forgot-password">
<label>Email <input name="email" type="email" required autofocus autocomplete="username"></label>
<button>Send me a link</button></form><a href="sign-in">Sign in</a>""")
SENT_TEXT = string.Template("<p>If there is an account with this email, a link is under way.</p>")
RESET_FORM = string.Template("""<form method="post" action="reset-password">
<label>New password <input name="password" type="password" required minlength="8" autofocus
  autocomplete="new-password"></label>
<input name="token" type="hidden" value="$token"><button>Change password</button></form>
<a href="forgot-password">Send me a new link</a>""")


class PasswordForgotten(StrictBody):
    email: Email


class PasswordReset(StrictBody):
    token: str
    password: Password


class ResetLink(SQLModel):
    email: str  # empty if there is no account
    link: str


def fingerprint(user: User) -> str:
    return hashlib.sha256(f"{user.email} {user.hashed_password}".encode()).hexdigest()


async def announce_link(user: User) -> None:
    expires = utc_now() + timedelta(minutes=RESET_MINUTES)
    token = create_token("reset", user.id, expires, jti=fingerprint(user))
    link = f"{settings.public_url}/reset-password?token={token}"
    await announce("user.forgot_password", ResetLink(email=user.email, link=link))


passwords = APIRouter(tags=["auth"], responses=errors(422, 429))


@passwords.post(f"{API}/auth/forgot-password", status_code=202)
async def forgot_password(
    body: PasswordForgotten, request: Request, background: BackgroundTasks, session: ReadSession
) -> None:
    """Send a link for a new password; every email gets the same answer."""
    await limit_email(body.email, request)
    statement = select(User).where(User.email == body.email, User.is_active)
    found = (await session.exec(statement)).first()
    # The same work where there is no account, or the time would tell.
    decoy = User(id=0, email="", hashed_password=DECOY_HASH)
    background.add_task(announce_link, found or decoy)


@passwords.post(f"{API}/auth/reset-password", status_code=204, responses=errors(401))
async def reset_password(body: PasswordReset, session: WriteSession) -> None:
    """Choose a new password with the token of the link; all sessions end."""
    claims = decode_token(body.token, "reset")
    hashed_password = await hash_password(body.password)
    user = await session.get(User, claims.sub, with_for_update=True)
    if user is None or not user.is_active or fingerprint(user) != claims.jti:
        raise APIError("INVALID_TOKEN", "This link was used before, or is too old")
    user.hashed_password = hashed_password
    await end_logins(session, user.id)
    await session.commit()
    logger.info("user %s: password changed by a link", user.id)


@passwords.get("/forgot-password", include_in_schema=False)
async def show_forgot_password() -> Response:
    return gate_page("Forgotten password", FORGOT_FORM)


@passwords.post("/forgot-password", dependencies=[Depends(check_origin)], include_in_schema=False)
async def send_forgot_password(
    form: Annotated[PasswordForgotten, Form()],
    request: Request,
    background: BackgroundTasks,
    session: ReadSession,
) -> Response:
    await forgot_password(form, request, background, session)
    return gate_page("Look into your mail", SENT_TEXT)


@passwords.get("/reset-password", include_in_schema=False)
async def show_reset_password(token: str = "") -> Response:
    return gate_page("New password", RESET_FORM, token=token)


@passwords.post("/reset-password", dependencies=[Depends(check_origin)], include_in_schema=False)
async def send_reset_password(
    token: Annotated[str, Form()],
    password: Annotated[str, Form()],
    request: Request,
    session: WriteSession,
) -> Response:
    try:
        await reset_password(PasswordReset(token=token, password=password), session)
    except ValidationError:
        detail = "Choose another one: 8 to 128 characters, and none that is guessed first"
        wrong = APIError("VALIDATION_ERROR", detail)
        return gate_page("New password", RESET_FORM, wrong, token=token)
    except APIError as error:
        return gate_page("New password", RESET_FORM, error, token=token)
    return redirect_to_sign_in(request)


sign_in_links.append('<a href="forgot-password">Forgot your password?</a>')
for path in ("/forgot-password", "/reset-password"):
    path_limits[f"{API}/auth{path}"] = AUTH_LIMIT
    path_limits[f"POST {path}"] = AUTH_LIMIT
    body_limits[path] = MAX_FORM_BYTES
app.include_router(passwords)


# --- Redis ----------------------------------------------------------------------------------------
# With REDIS_URL (Redis 7 or newer) several processes share limits, events, and the proof that what
# they remember is fresh. While Redis does not answer, each goes on alone and remembers nothing.

if settings.redis_url:  # an optional package
    from redis import asyncio as redis

REDIS_TIMEOUT = 0.15  # seconds
REDIS_PAUSE = 1.0  # between attempts to reach it again: no request waits for them
# For this long after Redis is back, another process may not have noticed it, and commit without
# telling Redis: until then nothing is remembered.
REDIS_DOUBT = 2 * (REDIS_PAUSE + REDIS_TIMEOUT)
# Redis runs this script in one step.
HIT = """local count = redis.call("INCR", KEYS[1])
    if count == 1 then redis.call("EXPIRE", KEYS[1], ARGV[1]) end
    return {count, redis.call("PTTL", KEYS[1])}"""
generation_keys = [f"nutshell:generation:{number}" for number in range(len(memories))]


class SharedRedis:
    """Commands that are called at the same time are sent in one pipeline. With a connection for
    each call lists were half as fast."""

    is_up: bool | None = None  # None: not tried yet
    trusted_from = 0.0
    client: Any
    hubs: dict[str, "EventHub"]  # quoted, since Live events may be taken out

    async def start(self) -> AsyncIterator[None]:
        self.client = redis.from_url(str(settings.redis_url), decode_responses=True)
        self.waiting: list[tuple[Callable[[Any], Any], asyncio.Future[Any]]] = []
        self.called = asyncio.Event()
        self.last_ids: dict[str, str] = {}
        tasks = [asyncio.create_task(self.repeat(step)) for step in (self.send, self.follow)]
        yield
        self.is_up = None
        for task in tasks:
            task.cancel()
        await self.client.aclose()

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        """What this method of redis-py returns, or None while Redis does not answer."""
        if not self.is_up:
            return None
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append((methodcaller(method, *args, **options), answer))
        self.called.set()
        return await answer

    async def execute(self, commands: list[Callable[[Any], Any]]) -> list[Any]:
        pipeline = self.client.pipeline(transaction=False)
        for command in commands:
            command(pipeline)
        async with asyncio.timeout(REDIS_TIMEOUT):
            return list(await pipeline.execute())

    async def repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # also what Redis holds that is not ours
                self.give_up(error)
                await asyncio.sleep(REDIS_PAUSE)

    def give_up(self, error: Exception) -> None:
        if self.is_up is not False:
            name = type(error).__name__
            logger.error("Redis does not answer (%s): each process goes on alone", name)
        self.is_up = False
        for _, answer in self.waiting:
            if not answer.done():
                answer.set_result(None)
        self.waiting = []
        self.called.set()  # wakes `send`, which then tries to reach it again

    async def send(self) -> None:
        if not self.is_up:
            await self.execute([methodcaller("set", "nutshell:up", 1)])
            if self.is_up is False:
                logger.warning("Redis answers again")
            self.is_up = True
            self.trusted_from = perf_counter() + REDIS_DOUBT
            # The others have not heard of this process's commits in the meantime.
            await self.execute([methodcaller("delete", *generation_keys)])
        await self.called.wait()
        self.called.clear()
        waiting = self.waiting
        results = await self.execute([command for command, _ in waiting])
        for (_, answer), result in zip(waiting, results, strict=False):
            if not answer.done():  # it is, when its request was cancelled
                answer.set_result(result)
        del waiting[: len(results)]  # more may have come

    async def follow(self) -> None:
        """Hands on what all processes publish, this one included."""
        if not self.last_ids:
            seconds, microseconds = await self.client.time()
            now = f"{seconds * 1000 + microseconds // 1000}-0"
            self.last_ids = dict.fromkeys(self.hubs, now)
        for key, entries in await self.client.xread(self.last_ids, block=1000):
            for event_id, event in entries:
                self.last_ids[key] = event_id
                post_id = int(event["post_id"])
                await self.hubs[key].add(event["kind"], post_id, event["data"], event_id)

    async def publish(self, key: str, kind: str, post_id: int, data: str) -> None:
        event = {"kind": kind, "post_id": post_id, "data": data}
        if await self.call("xadd", key, event, maxlen=MAX_EVENTS) is None:
            await self.hubs[key].add(kind, post_id, data)


shared = SharedRedis()


class RedisWindows(WindowStore):
    async def hit(self, key: str, seconds: int) -> tuple[int, float]:
        answer = await shared.call("eval", HIT, 1, f"nutshell:limit:{key}", seconds)
        if answer is None:
            return await super().hit(key, seconds)
        count, milliseconds = answer
        return count, milliseconds / 1000


class RedisGeneration(Generation):
    """A commit deletes the value, which even a full Redis allows. The next process that asks sets
    a new one, and gets None."""

    def __init__(self, key: str) -> None:
        self.key = key

    async def get(self) -> str | None:
        if settings.cache_seconds == 0 or perf_counter() < shared.trusted_from:
            return None
        new = secrets.token_hex(8)
        # nx: it is set only where none is; get: the answer is what was there before, or None.
        value: str | None = await shared.call("set", self.key, new, nx=True, get=True)
        return value

    async def renew(self) -> None:
        await shared.call("delete", self.key)


if settings.redis_url:
    limiter.store = RedisWindows()
    for memory, key in zip(memories, generation_keys, strict=True):
        memory.generation = RedisGeneration(key)
    shared.hubs = {"nutshell:events": events, "nutshell:chat": chat}
    for key, hub in shared.hubs.items():
        hub.publish = partial(shared.publish, key)
    at_start(shared.start)


# --- Demo -----------------------------------------------------------------------------------------
# With DEMO=true the service starts with people and posts. Their database is deleted at its end.

DEMO_PASSWORD = "correct-horse"  # noqa: S105
DEMO_ROLES = {"Ann": "user", "Ben": "user", "Cleo": "admin"}
DEMO_POSTS = """
Ann: Bees in November: They hang in a ball and shiver. Who is cold moves in. | Ben: Who decides?
Ben: Bread without a tin: Fold it four times, then leave it alone. | Cleo: How long? | Ben: A night.
Cleo: House rules: Be kind. Whoever signs up may write, and I may delete.
Ann: A letter from the coast: Fog until ten, then gulls. | Ben: Bring some of both.
Ben: Reading aloud: This file, from top to bottom, takes an afternoon.
Ann: Two windows: Open this page twice, and be somebody else in the second. | Cleo: As now!
Cleo: What is a draft?: A post that nobody sees but its author, and admins, until it is published.
Ben: The last call: Beside this stands what you did last, as a line for your terminal.
Ann: Walnuts: Dry them for three weeks, or they go black. | Cleo: Mine did. | Ben: Mine too.
Cleo: Backups: A copy that was never restored is a wish. | Ann: Ours is tested.
Ben: Night train: Berth 61, on top. The world is quiet up here. | Ann: Send a picture!
Ann: Welcome: Sign in and write. Whoever has this page open sees it at once. | Ben: Hello!
Ann: Not done yet: The story of the walnut that fell up.
"""


async def own_demo_files() -> AsyncIterator[None]:
    files = [Path(f"{settings.sqlite_file}{suffix}") for suffix in ("", "-wal", "-shm", ".key")]
    for file in files:
        file.unlink(missing_ok=True)
    try:
        yield
    finally:
        for file in files:
            file.unlink(missing_ok=True)


async def fill_demo() -> AsyncIterator[None]:
    """Twelve posts with their comments, the oldest five days old, and last a draft."""
    now = utc_now()
    hashed_password = await hash_password(DEMO_PASSWORD)
    lines = DEMO_POSTS.strip().splitlines()
    async with prepare_database() as session:
        people = {}
        for account in demo_accounts:
            name = account["name"]
            person = User(email=account["email"], hashed_password=hashed_password)
            people[name] = person.sqlmodel_update({"first_name": name, "role": account["role"]})
        session.add_all(people.values())
        await session.flush()
        for number, line in enumerate(lines, 1):
            first, *replies = line.split(" | ")
            name, title, content = first.split(": ")
            post = Post(title=title, content=content, author_id=people[name].id)
            post.is_published = number < len(lines)
            age = timedelta(seconds=10 * 2.43 ** (len(lines) - number))
            post.created_at = post.updated_at = now - age
            session.add(post)
            await session.flush()
            for position, reply in enumerate(replies, 1):
                name, text = reply.split(": ")
                comment = Comment(text=text, author_id=people[name].id, post_id=post.id)
                comment.created_at = now - age * 0.9**position  # before the next post
                session.add(comment)
    yield


if settings.demo:
    lifespans.insert(0, asynccontextmanager(own_demo_files))  # around all others: it ends last
    at_start(fill_demo)
    app.description += "\n\nIn this demo you can sign in as:\n"
    for name, role in DEMO_ROLES.items():
        account = {"name": name, "email": f"{name.lower()}@example.com", "role": role}
        demo_accounts.append(account | {"password": DEMO_PASSWORD})
        app.description += f"\n- `{account['email']}`, password `{DEMO_PASSWORD}` ({role})"


# --- The page -------------------------------------------------------------------------------------
# What a browser gets at /: one constant, and headers that allow nothing else.

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Nutshell</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style nonce="NONCE">:root { color-scheme: light dark; --paper: light-dark(#f7f2eb, #17140f);
    --card: light-dark(#fff, #231e18); --nut: light-dark(#964c0a, #f5b765); --soft: #a864 }
  * { box-sizing: border-box; margin: 0; padding: 0; font: inherit; overflow-wrap: anywhere }
  body { padding: 1.5em; font: clamp(16px, 1.15vw, 28px)/1.5 system-ui; background: var(--paper) }
  header, form { display: flex; flex-wrap: wrap; gap: .6em; align-items: center }
  main, section, ul { display: grid; gap: 1em; align-items: start; min-width: 0; list-style: none }
  main { margin-top: 1em; grid: auto / repeat(auto-fit, minmax(min(100%, 22em), 1fr)) }
  label, input, textarea, form > :is(ul, p, div) { width: 100% } small, mark { font-size: .8em }
  .card { position: relative; padding: 1em; background: var(--card); border-radius: .7em }
  .card, button { border: 1px solid var(--soft) } a, b, h1, h2 { font-weight: 700; color: inherit }
  h1 { font-size: 2em; color: var(--nut) } h2 { display: inline; font-size: 1.2em }
  input, textarea, button { padding: .4em .8em; border-radius: .5em; background: var(--paper) }
  input, textarea { border: 1px solid #8f8071 } [role=alert] { color: light-dark(#b3261e, #ff9d94) }
  button, mark, .new, #feed li:first-child { background: var(--soft); color: inherit }
  form.card > button:first-of-type, #login button { background: var(--nut); color: var(--card) }
  mark { padding: .1em .6em; border-radius: 1em } #posts p { max-height: 3em; overflow: clip }
  #posts a::after { content: ""; position: absolute; inset: 0 } #leave { margin-left: auto }
  .card:has([aria-current=true]) { outline: 3px solid var(--nut) } p, pre { white-space: pre-wrap }
  pre { max-height: 40vh; overflow: auto; font: .9em/1.4 ui-monospace, monospace; margin: 1em 0 0 }
  @media (min-width: 75em) { #one, #side { position: sticky; top: 1em } } #feed { gap: .2em }
  body:not(.in) .members, .in .guests, #login:empty, #one:has(#by:empty) #comment { display: none }
</style><header><h1>Nutshell</h1> <a href="docs">API docs</a> <form id="leave" class="members">
  <b id="name"></b> <mark id="role"></mark> <button>Sign out</button></form></header>
<main><section aria-label="Posts"><form id="login" class="card guests">BUTTONS</form>
  <form id="enter" class="card guests" novalidate><label>Email <input name="email" id="username"
    type="email" autocomplete="username"></label> <label>Password <input name="password"
    type="password"></label> <label>Name, if you are new <input name="first_name"></label>
    <button>Sign in</button> <button value="new">Sign up</button></form>
  <form id="write" class="card members" novalidate><label>Title <input name="title"></label>
    <label>Text <textarea name="content" rows="3"></textarea></label> <button value="publish">
    Publish</button> <button>Save as draft</button></form> <ul id="posts"></ul></section>
<section id="one" aria-labelledby="title"><form id="change" class="card"><div>
    <h2 id="title" tabindex="-1"></h2> <small id="by"></small></div> <p id="content"></p>
    <button id="publish" value="/publish" hidden>Publish</button> <button id="delete" hidden>
    Delete</button></form> <form id="uncomment"><ul id="comments" aria-label="Comments"></ul></form>
  <form id="comment" class="card members" novalidate><label>Your comment <input name="text"></label>
    <button>Send</button></form></section> <section id="side" aria-label="What happens">
  <div class="card"><h2>Live</h2> <mark id="live" role="status"></mark> <ul id="feed" role="log">
  </ul></div> <div class="card"><h2>Last call</h2> <button id="copy">Copy</button>
    <pre id="call" tabindex="0"></pre> <pre id="answer" tabindex="0"></pre></div></section></main>
<script nonce="NONCE">
const KINDS = "post.published post.updated post.deleted comment.created comment.deleted";
const SECRET = /(?<="password":)"(?:[^"\\]|\\.)*"|(?<=password=)[^&']*|eyJ[\w-]+\.[\w.-]+/g;
const $ = (id) => document.getElementById(id), quoted = (s) => `'${s.replaceAll("'", "'\\''")}'`;
const show = (texts) => { for (const id in texts) $(id).textContent = texts[id]; };
let tokens, me, post, shown, newest, command, stream, busy, timer, waiting, loading, shownAt = 0;
function make(tag, properties, ...inside) {  // append() makes text of what people wrote, never HTML
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}
const setTokens = (found) => { sessionStorage.nutshell = JSON.stringify(tokens = found); load(); };
async function call(method, path, body, isShown = method !== "GET") {  // shown as "Last call"
  const url = new URL(`api/v1${path}`, location).href;
  const headers = tokens ? { Authorization: `Bearer ${tokens.access_token}` } : {};
  const sent = body instanceof URLSearchParams ? body : JSON.stringify(body);  // a form, or JSON
  if (typeof sent === "string") headers["Content-Type"] = "application/json";
  const answer = await fetch(url, { method, headers, body: sent }), { status } = answer;
  const text = await answer.text(), found = text && JSON.parse(text);
  if (isShown) {
    command = `curl -X ${method} ${quoted(url)}`;
    for (const name in headers) command += ` \\\n  -H ${quoted(`${name}: ${headers[name]}`)}`;
    if (body) command += ` \\\n  -d ${quoted(`${sent}`)}`;
    const pretty = `${status} ${text && JSON.stringify(found, null, 2)}`.replace(SECRET, "…");
    show({ call: command.replace(SECRET, "…"), answer: pretty, copy: "Copy" });
  }
  if (status === 401 && headers.Authorization?.endsWith(tokens?.access_token)) setTokens(null);
  if (!answer.ok) throw Object.assign(Error(found.detail ?? status), { ...found, status });
  return found;
}
const list = async (path) => (await call("GET", `${path}?size=100`, undefined, !command)).items;
const byline = (one) => `${one.author.full_name}, ${new Date(one.created_at).toLocaleString()}`;
const mayDelete = (...all) => me?.is_superuser || all.some((one) => one?.author.id === me?.id);
const card = (id, one, head, tail) => make("li", { id, className: "card" }, head,
  make("p", {}, one.text ?? one.content), make("small", {}, byline(one)), " ", tail);
const commentCard = (one) => card(`comment${one.id}`, one, "",
  mayDelete(one, post) ? make("button", { value: one.id }, "Delete") : "");
const postCard = (one) => card(`post${one.id}`, one,
  make("a", { href: `#${one.id}`, ariaCurrent: one.id === post?.id }, one.title),
  one.is_published ? "" : make("mark", {}, "draft"));
const ifMissing = (error) => { if (error.status !== 404 && error.status !== 422) throw error; };
async function refresh() {
  me = tokens && await call("GET", "/users/me");
  const drafts = me ? (await list("/users/me/posts")).filter((one) => !one.is_published) : [];
  const posts = [...drafts, ...await list("/posts")];
  const id = Number(location.hash.slice(1)) || (shownAt ? post : posts[0])?.id;
  const found = id && await call("GET", `/posts/${id}`, undefined, id !== shown).catch(ifMissing);
  shown = id;
  const comments = found ? await list(`/posts/${id}/comments`) : [];
  const focus = document.activeElement.closest("li")?.id;  // of what is replaced
  shownAt = performance.now();
  post = found;  // here, at once with what is shown: the buttons are for it
  $("posts").replaceChildren(...posts.map(postCard));
  $("comments").replaceChildren(...comments.map(commentCard));
  $(focus)?.querySelector("a, button")?.focus({ preventScroll: true });
  $(newest)?.classList.add("new");
  const { title = "Choose a post", content } = post ?? {}, by = post && byline(post);
  show({ name: me?.full_name, role: me?.role, title, by, content });
  document.body.className = me ? "in" : "";
  $("publish").hidden = !post || post.is_published || me?.id !== post.author.id;
  $("delete").hidden = !post || !mayDelete(post);
}
const load = () => waiting ??= new Promise((done) => setTimeout(done)).then(() => loading)
  .then(() => { waiting = null; return loading = refresh().then(report, report); });  // one for all
const loadIn = (ms) => timer ??= setTimeout(() => { timer = null; load(); }, ms);
function report(error) {
  show({ live: stream.readyState !== 1 ? "reconnecting" : error?.message ?? "connected" });
  if (error) loadIn(5000);
}
const actions = {  // of each form: its fields, and the value of the button that was pressed
  login: (_, account) => call("POST", "/auth/login", new URLSearchParams(account)).then(setTokens),
  async enter(fields, isNew) {
    if (isNew) await call("POST", "/auth/register", fields);
    await actions.login(fields, { username: fields.email, password: fields.password });
  },
  write: (fields, publish) => call("POST", "/posts", { ...fields, is_published: !!publish })
    .then(({ id }) => { shown = id; history.pushState(null, "", `#${id}`); }),
  change: (_, publish) => call(publish ? "POST" : "DELETE", `/posts/${post?.id}${publish}`),
  comment: (fields) => call("POST", `/posts/${post?.id}/comments`, fields),
  uncomment: (_, id) => call("DELETE", `/comments/${id}`),
  leave: () => call("POST", "/auth/logout").then(() => { setTokens(null); location.replace("."); }),
};
function showError(form, wrong) {  // at the field that is wrong, or below the form
  const field = form.elements[wrong.loc?.at(-1)];
  (field?.parentNode ?? form).append(make("div", { role: "alert" }, wrong.msg ?? wrong));
  field?.focus();
}
const focusTitle = () => document.activeElement.matches("input, textarea") || $("title").focus();
document.onclick = (event) => { if (event.detail > 1) event.preventDefault(); };  // a double click
document.onsubmit = async (event) => {
  event.preventDefault();
  if (busy) return;
  busy = true;
  const { target, submitter } = event, fields = Object.fromEntries(new FormData(target));
  document.querySelectorAll("[role=alert]").forEach((alert) => alert.remove());
  await actions[target.id](fields, submitter?.value).then(() => target.reset(), (error) =>
    [error.detail ?? error.message].flat().reverse().forEach((wrong) => showError(target, wrong)));
  busy = false;
  await load().then(focusTitle);
};
window.onhashchange = $("posts").onclick = () => load().then(focusTitle);
const onCopy = (event) => { event.clipboardData.setData("text", command); event.preventDefault(); };
$("copy").onclick = () => {  // navigator.clipboard is only there with https or localhost
  document.addEventListener("copy", onCopy, { once: true });
  show({ copy: document.execCommand("copy") ? "Copied" : "Not copied" });
};
function onEvent({ type, data }) {
  const { id, post_id, title, text, author } = JSON.parse(data), [kind, happened] = type.split(".");
  const about = title ?? text ?? $(`post${post_id ?? id}`)?.querySelector("a").innerText ?? "";
  const by = make("small", {}, `${new Date().toLocaleTimeString()} ${author?.full_name ?? ""}`);
  $("feed").prepend(make("li", {}, by, ` ${kind} ${happened}: ${about}`));
  $("feed").children[8]?.remove();
  newest = kind + id;
  loadIn(shownAt + 3000 - performance.now());
}
function listen() {
  stream = new EventSource("api/v1/events");
  for (const kind of KINDS.split(" ")) stream.addEventListener(kind, onEvent);
  stream.onopen = load;
  stream.onerror = () => { report(); if (stream.readyState === 2) setTimeout(listen, 3000); };
}
listen();
setTokens(JSON.parse(sessionStorage.nutshell ?? null));  // of this tab: two tabs can be two people
</script>"""
CONTENT_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
CONTENT_POLICY += "connect-src 'self'; img-src data:; require-trusted-types-for 'script'; "
CONTENT_POLICY += "script-src 'nonce-NONCE'; style-src 'nonce-NONCE'"
BUTTON = """<button value="username={email}&amp;password={password}">Sign in as {name}
    <mark>{role}</mark></button>"""
app.description += "\n\n[The page](./) shows what the service does, without a command."


@app.head("/", include_in_schema=False)
@app.get("/", tags=["health"], response_model=dict[str, str], responses=errors(429))
async def get_page(request: Request) -> Response:
    """Tell programs that it runs, and show browsers a page."""
    if settings.production or "text/html" not in request.headers.get("accept", "").lower():
        return JSONResponse({"status": "ok"}, headers={"Vary": "Accept"})
    nonce = secrets.token_urlsafe(16)  # only a script or style that carries it is run
    buttons = "".join(BUTTON.format(**account) for account in demo_accounts)
    page = PAGE.replace("NONCE", nonce).replace("BUTTONS", buttons)
    policy = CONTENT_POLICY.replace("NONCE", nonce)
    return HTMLResponse(page, headers={"Vary": "Accept", "Content-Security-Policy": policy})


# --- python main.py -------------------------------------------------------------------------------
# What is printed at the start, and the server. What bounds sockets, proxies and stops is set here.


async def print_start_lines() -> AsyncIterator[None]:
    host = str(settings.host)
    if getattr(settings.host, "is_unspecified", False):
        host = socket.gethostname()
    if ":" in host:
        host = f"[{host}]"
    address = f"http://{host}:{settings.port}"
    url = sa.make_url(settings.database_url)
    file = settings.sqlite_file
    data = file.absolute() if file else f"{url.host}, database {url.database}"
    statement = select(User.email).where(User.role == "admin", User.is_active).limit(3)
    async with AsyncSession(read_engine) as session:
        admins = ", ".join(await session.exec(statement))
    how = "none yet: set FIRST_SUPERUSER_EMAIL and FIRST_SUPERUSER_PASSWORD"
    lines = [f"Nutshell  {address}", f"docs      {address}/docs", f"data      {data}"]
    lines.append(f"admin     {admins or how}")
    for account in demo_accounts:
        lines.append(f"sign in   {account['email']}  {account['password']}  ({account['role']})")
    if demo_accounts and not getattr(settings.host, "is_loopback", True):
        lines.append("warning   everybody who reaches this address knows these passwords")
    with suppress(OSError):  # where nobody reads them the service starts, too
        print("\n".join(lines), flush=True)
    yield


def check_port() -> None:
    """uvicorn would find it taken only after the database was opened."""
    host = str(settings.host)
    try:
        for family, *_, address in socket.getaddrinfo(host, settings.port, 0, socket.SOCK_STREAM):
            socket.create_server(address, family=family).close()
    except OSError as error:
        problem = f"HOST, PORT: {error.strerror}"
        if error.errno == EADDRINUSE:
            problem = f"PORT: {settings.port} is in use. Stop what runs there, or set another PORT"
        print(problem, file=sys.stderr)
        raise SystemExit(3) from None


# Each of several processes imports this file as __mp_main__. Only the first of them prints.
if __name__ in ("__main__", "__mp_main__"):
    is_first = current_process().name in ("MainProcess", "SpawnProcess-1")
    if is_first and not settings.production:
        at_start(print_start_lines)

if __name__ == "__main__":
    check_port()
    proxies = [str(network) for network in settings.forwarded_allow_ips]
    uvicorn.run(
        "__main__:app",  # a string, since each of several processes imports it
        host=str(settings.host),
        port=settings.port,
        workers=settings.web_concurrency,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
        server_header=False,
        log_config=None,  # ours is set up in the lifespan
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,  # longer than nginx keeps a connection, or it meets a closed one
        timeout_graceful_shutdown=4,
        timeout_worker_healthcheck=30,  # of several processes: a slow machine imports for a while
        ws_max_size=64 * 1024,
        ws_per_message_deflate=False,
    )
