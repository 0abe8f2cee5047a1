"""Nutshell: a complete API service in one file.

Read it from top to bottom: nothing is used above the line that defines it.

    Settings      what the environment may say, read once
    Log           a line for each request
    Errors        one shape for every refusal
    Tables        what is stored, what comes in, what goes out
    Database      many readers, one writer
    Security      passwords, the signing key, tokens
    Redis         what several processes share
    Rate limiter  so many requests in a window of time
    Cache         what was read is remembered until the next write
    Live events   a log that listeners follow
    Mail          sent in the background
    Dependencies  who is asking, and may they?
    Routes        accounts and tokens, users, posts, comments, live
    Demo          people and posts to begin with
    Pages         health, docs, and a page to try it all on
    Front door    what every request passes
    Assembly      the parts put together, and the server
"""

# For `uv run main.py`, the same as in requirements.txt:
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "fastapi==0.165.0", "starlette==1.10.0", "uvicorn[standard]==0.54.0", "bcrypt==5.0.0",
#     "sqlmodel[asyncio]==0.0.50", "SQLAlchemy==2.1.9", "aiosqlite==0.22.1", "pydantic==2.14.3",
#     "pydantic-settings==2.16.3", "python-jose==3.5.0", "python-multipart==0.0.34",
#     "email-validator==2.4.0", "fastapi-swagger==0.4.64",
# ]
# ///

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import secrets
import signal
import smtplib
import sqlite3
import ssl
import string
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from datetime import UTC, date, datetime, time, timedelta
from email.message import EmailMessage
from functools import cache, lru_cache, partial
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from ipaddress import IPv6Address, ip_address
from math import ceil
from multiprocessing import parent_process
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from time import perf_counter, sleep
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

import bcrypt
import uvicorn
from anyio import CapacityLimiter, move_on_after, to_thread
from email_validator import validate_email
from fastapi import APIRouter, Depends, FastAPI, Form, Header, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import OAuth2PasswordBearer
from fastapi.staticfiles import StaticFiles
from jose import jwk, jwt
from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError
from pydantic.functional_validators import BeforeValidator, field_validator, model_validator
from pydantic.json_schema import Examples
from pydantic.networks import IPvAnyAddress, IPvAnyNetwork
from pydantic.types import StrictBool, StrictInt
from pydantic_core import to_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import Column, Connection, Integer, bindparam, delete, event, exc, make_url, update
from sqlalchemy.dialects.sqlite import aiosqlite
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_
from sqlalchemy.util.queue import AsyncAdaptedQueue, Empty
from sqlmodel import AutoString, Field, Relationship, SQLModel, col, func, not_, or_, select
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

API = "/api/v1"
now = partial(datetime.now, UTC)  # the one clock: UTC, like all that is stored and sent


# --- Settings -------------------------------------------------------------------------------------
# All that the service may be told, read once from the environment or `.env`; nothing below looks
# there again. A wrong value ends the start with one line: the name, the value, the rule.

NO_NUL = r"^[^\x00]*$"
COMMON_PASSWORDS = """password passw0rd password1 12345678 123456789 1234567890 87654321 11111111
    00000000 qwertyui qwertyuiop qwerty123 1q2w3e4r 1qaz2wsx abcd1234 iloveyou sunshine trustno1"""


def plain_email(address: str) -> str:
    """One address and nothing around it, in lower case: nobody tells A@b.co from a@b.co."""
    if len(address) > 254:  # reading a long one takes minutes
        raise ValueError("must have at most 254 characters")
    return validate_email(address.strip().lower(), check_deliverability=False).normalized


def uncommon(password: str) -> str:
    if password.lower() in COMMON_PASSWORDS.split():
        raise ValueError("is among the passwords that are guessed first")
    return password


def usable(client_of: Callable[[str], Any], url: str) -> str:
    try:
        client_of(url)  # does not connect yet
    except ModuleNotFoundError as error:
        raise ValueError(f"needs a package: pip install {error.name}") from None
    except Exception:  # its text may hold the password
        raise ValueError("must be a URL, its password percent-encoded") from None
    return url


def known_database(url: str) -> str:
    if ":memory:" in url or "mode=memory" in url:
        raise ValueError("every connection would have a :memory: of its own; name a file")
    if not re.match(r"sqlite\+aiosqlite:///[^?]|postgresql\+asyncpg://", url):
        raise ValueError("must be sqlite+aiosqlite:///FILE or postgresql+asyncpg://…")
    return usable(create_async_engine, url)


def redis_client(url: str) -> Any:
    """The package has to be there only for those who use it. Its own timeouts cost a lot."""
    package: Any = import_module("redis")
    client = package.asyncio.from_url(url, decode_responses=True, socket_timeout=None)
    client.connection_pool.make_connection()  # knows what from_url does not look at
    return client


EmailRules = Field(max_length=254, schema_extra={"json_schema_extra": {"format": "email"}})
Email = Annotated[str, EmailRules, AfterValidator(plain_email)]
PasswordRules = StringConstraints(min_length=8, max_length=128, pattern=NO_NUL)
Password = Annotated[str, PasswordRules, AfterValidator(uncommon)]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+)$")]
MAIL_HOST = r"(\[[\da-f:]+\]|[^@:/\s\[\]]+)(:\d{1,5})?"
Rate = Annotated[str, StringConstraints(pattern=r"^([1-9]\d{0,8}/(second|minute|hour)|off)$")]
RedisRules = StringConstraints(pattern=r"^(rediss?|unix)://")
DatabaseUrl = Annotated[str, AfterValidator(known_database)]
RedisUrl = Annotated[str, RedisRules, AfterValidator(partial(usable, redis_client))]
SmtpRules = StringConstraints(pattern=rf"^smtps?://([^@/\s]*@)?{MAIL_HOST}/?$")
SmtpUrl = Annotated[str, SmtpRules, AfterValidator(partial(usable, lambda url: urlsplit(url).port))]


class Settings(BaseSettings):
    """README says what each one means. An empty value counts as not set."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    environment: Literal["development", "production"] = "development"
    host: IPvAnyAddress | Literal["localhost"] = Field(default="127.0.0.1")
    port: int = Field(default=8000, ge=1, le=65_535)
    workers: int = Field(default=1, ge=1, le=256)
    forwarded_allow_ips: Annotated[list[IPvAnyNetwork | Literal["*"]], NoDecode] = Field(default="")
    database_url: DatabaseUrl = "sqlite+aiosqlite:///./app.db"
    secret_key: Annotated[bytes, Field(min_length=32)] | None = None
    access_token_expire_minutes: int = Field(default=30, ge=1, le=525_600)
    refresh_token_expire_days: int = Field(default=7, ge=1, le=3_650)
    bcrypt_rounds: int = Field(default=12, ge=4, le=16)
    first_superuser_email: Email | None = None
    first_superuser_password: Password | None = None
    registration: Literal["open", "closed"] = "open"
    cors_origins: Annotated[list[Origin], NoDecode] = Field(default="http://localhost:3000")
    rate_limit: Rate = "600/minute"
    auth_rate_limit: Rate = "30/minute"
    cache_seconds: int = Field(default=60, ge=0, le=86_400)
    redis_url: RedisUrl | None = None
    smtp_url: SmtpUrl | None = None
    mail_from: Email | None = None
    admin_email: Email | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    demo: bool = False

    @field_validator("forwarded_allow_ips", "cors_origins", mode="before")
    @classmethod
    def comma_list(cls, value: str) -> list[str]:
        return [part.strip() for part in value.split(",") if part.strip()]

    @model_validator(mode="after")
    def fit_together(self) -> "Settings":
        if self.secret_key is None and (self.production or self.sqlite_file is None):
            raise ValueError("SECRET_KEY: must be set in production and with PostgreSQL")
        if self.production and "*" in self.cors_origins:
            raise ValueError("CORS_ORIGINS='*': is refused in production")
        if (self.first_superuser_email is None) != (self.first_superuser_password is None):
            raise ValueError("FIRST_SUPERUSER_EMAIL, FIRST_SUPERUSER_PASSWORD: set both or none")
        if self.demo and (self.production or self.workers > 1):
            raise ValueError("DEMO=True: is refused in production, and with several WORKERS")
        if self.demo and "database_url" in self.model_fields_set:
            raise ValueError("DATABASE_URL: must not be set with DEMO, which has its own")
        return self

    @property
    def production(self) -> bool:
        return self.environment == "production"

    @property
    def sqlite_file(self) -> str | None:
        url = make_url(self.database_url)
        return url.database if url.drivername == "sqlite+aiosqlite" else None


def what_is_wrong(problem: Any) -> str:
    rule = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:  # it is about several of them, and names them
        return rule
    name, value = str(problem["loc"][0]).upper(), repr(problem["input"])
    if name.endswith(("_KEY", "_PASSWORD")):
        return f"{name}: {rule}"
    if name.endswith("_URL"):  # it may hold a password: no more than its scheme is shown
        value = value.partition("://")[0] + "://…'" if "://" in value else "…"
    return f"{name}={value}: {rule}"


def read_settings() -> Settings:
    try:
        return Settings()
    except UnicodeDecodeError:
        line = ".env: must be UTF-8"
    except ValidationError as error:
        line = what_is_wrong(error.errors()[0])
    print(line, file=sys.stderr)
    raise SystemExit(3)  # to uvicorn 3 means: do not start this worker again


settings = read_settings()
if settings.demo:  # the folder is removed when the service ends
    settings.database_url = f"sqlite+aiosqlite:///{mkdtemp(prefix='nutshell-')}/demo.db"


# --- Log ------------------------------------------------------------------------------------------
# A line for each request and each thing that happened, for people or, in production, for programs.
# While we serve a thread writes them, many at once: a terminal that stands still stops nobody.

log = logging.getLogger("nutshell")


class LogWriter(logging.Handler):
    """When nobody reads the log and 10,000 lines wait, the oldest are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=10_000)
        self.some = threading.Event()
        self.thread: threading.Thread | None = None  # before and after it, lines go out at once

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)  # with its traceback
            self.add(record.levelname, "%(message)s", {"message": message})
        except Exception:
            self.handleError(record)

    def add(self, level: str, text: str, fields: dict[str, Any]) -> None:
        moment = now().isoformat(" ", "milliseconds")
        if settings.production:
            line = json.dumps({"time": moment, "level": level} | fields)
        else:
            line = f"{moment[:23]} {level:8} {text % fields}"
        self.lines.append(f"{line}\n")
        if self.thread is None:
            self.write()
        elif not self.some.is_set():
            self.some.set()

    def next_piece(self) -> str:
        """Up to 4 KiB, which stay whole in a pipe that several processes share."""
        piece = self.lines.popleft()
        with suppress(IndexError):  # there are no more, or another thread was faster
            while len(piece) + len(self.lines[0]) < 4_096:
                piece += self.lines.popleft()
        return piece

    def write(self) -> None:
        while self.lines:
            with suppress(IndexError, OSError):  # another thread was faster, or the disk is full
                os.write(sys.stderr.fileno(), self.next_piece().encode())

    def run(self) -> None:
        while self.thread:
            self.some.wait()
            self.some.clear()
            self.write()
            sleep(0.05)  # more may come

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        self.thread = thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        yield
        self.thread = None
        self.some.set()
        thread.join(1)
        if thread.is_alive():  # nobody reads: what is said from now on waits in vain
            self.thread = thread


log_writer = LogWriter()


def log_request(scope: Scope, status: int, seconds: float) -> None:
    """Not through `logging`, which alone takes as long as an answer from memory."""
    state = scope["state"]
    line = {
        "request_id": state["request_id"],
        "method": scope.get("method", "WEBSOCKET"),
        "path": quote(scope["path"][:200]),  # so that no line can look like two
        "status": status,
        "ms": round(seconds * 1000, 1),
        "client": quote(state["client"][:50], safe=":"),
        "user_id": state.get("user_id"),
    }
    who = "user %(user_id)s" if line["user_id"] else "anonymous"
    text = f"%(method)s %(path)s %(status)s %(ms)s ms %(client)s {who} %(request_id)s"
    log_writer.add("INFO", text, line)


def without_query(record: logging.LogRecord) -> bool:
    """Of a WebSocket uvicorn logs the query, where a token may stand; of bad UTF-8 a traceback."""
    return not re.search("WebSocket|Invalid UTF-8|^connection ", str(record.msg))


def set_up_logging() -> None:
    """One handler for all. At debug the libraries would tell too much: only the SQL is added."""
    level = max(logging.INFO, getattr(logging, settings.log_level.upper()))
    logging.basicConfig(level=level, handlers=[log_writer], format="%(message)s", force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    logging.getLogger("uvicorn.error").addFilter(without_query)  # once, however often this runs
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs pieces of bodies
    if settings.log_level == "debug":
        logging.getLogger("sqlalchemy.engine").setLevel(logging.INFO)


# --- Errors ---------------------------------------------------------------------------------------
# Every refusal has one shape: what is wrong, a code for programs, the id of the request. Routes
# raise `Refusal`; the handlers bring what the libraries raise into the same shape.

REFUSALS = {
    "BAD_REQUEST": (400, "This cannot be parsed"),
    "INVALID_CREDENTIALS": (401, "The email or the password is wrong"),
    "INVALID_TOKEN": (401, "The token is missing, malformed, expired or revoked"),
    "TOKEN_REUSED": (401, "This refresh token was used before, so its session has ended"),
    "INSUFFICIENT_PERMISSIONS": (403, "You may not do this"),
    "NOT_FOUND": (404, "There is no such thing"),
    "EMAIL_TAKEN": (409, "There is an account with this email"),
    "CONFLICT": (409, "What this is about has changed in the meantime"),
    "BODY_TOO_LARGE": (413, "The body is larger than 1 MiB"),
    "VALIDATION_ERROR": (422, "Some fields are wrong"),
    "RATE_LIMITED": (429, "Too many requests, try again later"),
    "INTERNAL_ERROR": (500, "The service made a mistake; its log has the details"),
    "UNAVAILABLE": (503, "The service is busy, try again"),
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
DATABASE_ERRORS = (exc.DBAPIError, exc.TimeoutError, sqlite3.Error, OSError)
REFUSAL_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}


class Refusal(HTTPException):
    """`raise Refusal("NOT_FOUND")`: the table above knows the rest."""

    def __init__(self, code: str, detail: Any = None, headers: Any = None) -> None:
        status, usual = REFUSALS[code]
        super().__init__(status, detail or usual, headers or REFUSAL_HEADERS.get(status))
        self.code = code


class Problem(BaseModel):
    """What every error looks like; of a 422, detail lists the fields."""

    detail: str | list[dict[str, Any]]
    error_code: str
    request_id: str


def errors(*statuses: int) -> Any:
    """For /docs: the refusals of a route, of all routes of a router, or of the whole app."""
    return {code: {"model": Problem, "description": HTTPStatus(code).phrase} for code in statuses}


async def on_refusal(request: Request, error: Any) -> Response:
    """Our own refusals, and those of Starlette and FastAPI: 400, 404, 405."""
    code = getattr(error, "code", HTTPStatus(error.status_code).name)
    headers = error.headers
    if error.status_code == 405:  # FastAPI names the methods of one route, not all of the path
        asked = [(dict(request.scope, method=m), r) for m in METHODS for r in request.app.routes]
        found = [scope["method"] for scope, r in asked if r.matches(scope)[0] is Match.FULL]
        headers = {"Allow": ", ".join(found)}
    body = {"detail": error.detail, "error_code": code, "request_id": request.state.request_id}
    # json.dumps writes ASCII: even half of a surrogate pair in the name of a field gets out.
    return Response(json.dumps(body), error.status_code, headers, "application/json")


async def on_invalid_input(request: Request, error: Any) -> Response:
    """What is wrong and where, never the value: it may be a password."""
    fields = [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]
    unreadable = fields[0]["type"] == "json_invalid"
    refusal = Refusal("BAD_REQUEST") if unreadable else Refusal("VALIDATION_ERROR", fields)
    return await on_refusal(request, refusal)


async def on_database_error(request: Request, error: Any) -> Response:
    """The database keeps the rules, so that no check can race; here its refusals get names.
    All else is a lock or connection that came too late, a full disk, a server that is gone."""
    if isinstance(error, exc.IntegrityError):
        taken = re.search("user[._]email", str(error.orig))
        return await on_refusal(request, Refusal("EMAIL_TAKEN" if taken else "CONFLICT"))
    log.error("the database failed: %s", str(error).partition("\n")[0] or type(error).__name__)
    return await on_refusal(request, Refusal("UNAVAILABLE"))


# --- Tables ---------------------------------------------------------------------------------------
# A table inherits what people say of themselves and adds what only we know; Create and Update say
# what may come in, Public and Read what goes out. Each constraint is written once, as a named type.

OneLine = StringConstraints(strip_whitespace=True, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
WebAddress = StringConstraints(pattern=r"^https?://[^\s/?#\x00-\x1f\x7f][^\s\x00-\x1f\x7f]*$")
Trimmed = StringConstraints(strip_whitespace=True, pattern=NO_NUL)
AnyText = StringConstraints(pattern=NO_NUL)
NotBlank = StringConstraints(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")
Name = Annotated[str | None, Field(max_length=100), OneLine, Examples(["Dora"])]
Age = Annotated[StrictInt | None, Field(ge=1, le=149), Examples([36])]  # not strict: "36", too
Bio = Annotated[str | None, Field(max_length=2_000), AnyText, Examples(["I keep bees."])]
AN_AVATAR = Examples(["https://example.com/dora.png"])
AvatarUrl = Annotated[str | None, Field(max_length=500), WebAddress, AN_AVATAR]
Role = Literal["user", "admin"]
Id = Annotated[int, Field(ge=1, le=2**31 - 1)]
Title = Annotated[str, Field(min_length=1, max_length=255), OneLine, Examples(["Bees"])]
Content = Annotated[str, Field(max_length=100_000), NotBlank, Examples(["They hum."])]
CommentText = Annotated[str, Field(min_length=1, max_length=500), Trimmed, Examples(["Mine too."])]
Sort = Literal["created_at", "-created_at", "updated_at", "-updated_at", "title", "-title"]
SESSION_LIFE = timedelta(days=settings.refresh_token_expire_days)
Item = TypeVar("Item")


def example(fields: dict[str, str]) -> Any:
    """What /docs sends if nobody changes it, where the examples above do not fit together."""
    return {"json_schema_extra": {"examples": [fields]}}


class Stored(SQLModel):
    """What has an id of its own."""

    __table_args__ = {"sqlite_autoincrement": True}  # no id is ever given to something else

    id: int = Field(default=None, primary_key=True)
    created_at: datetime = Field(default_factory=now)


class Body(SQLModel):
    """What people write: known fields alone, so that nobody assigns what is not theirs."""

    model_config = {"extra": "forbid"}

    @model_validator(mode="before")
    @classmethod
    def few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > 50:  # to refuse each would take seconds
            raise ValueError("has too many fields")
        return value


class Person(Body):
    """What people say of themselves when they sign up."""

    first_name: Name = None
    last_name: Name = None
    age: Age = None


class UserCreate(Person):
    model_config = example({"email": "dora@example.com", "password": "correct-horse"})

    email: Email
    password: Password


class UserCreateByAdmin(UserCreate):
    model_config = example({"email": "emil@example.com", "password": "correct-horse"})

    role: Role = "user"
    is_active: StrictBool = True


class UserUpdate(Person):
    """All may be left out; null clears what may be empty and is refused for the rest."""

    model_config = example({"first_name": "Dora", "bio": "I keep bees."})

    bio: Bio = None
    avatar_url: AvatarUrl = None
    email: Email = Field(default=None)
    password: Password = Field(default=None)
    current_password: str = Field(default="", max_length=128)
    role: Role = Field(default=None)
    is_active: StrictBool = Field(default=None)


class User(Person, Stored, table=True):
    email: Email = Field(unique=True)
    hashed_password: str
    bio: Bio = None
    avatar_url: AvatarUrl = None
    role: Role = Field(default="user", sa_type=AutoString)
    is_active: bool = True
    updated_at: datetime = Field(default_factory=now, sa_column_kwargs={"onupdate": now})

    @property
    def full_name(self) -> str:
        return " ".join(filter(None, (self.first_name, self.last_name))) or f"user {self.id}"

    @property
    def is_superuser(self) -> bool:
        return self.role == "admin"


class Author(SQLModel):
    id: int
    full_name: str


class UserPublic(Author):
    """What everybody who is signed in may know of somebody."""

    bio: Bio
    avatar_url: AvatarUrl
    created_at: datetime


class UserRead(UserPublic, Person):
    """What only they themselves and superusers may know."""

    email: str
    role: Role
    is_superuser: bool
    is_active: bool
    updated_at: datetime


class LoginSession(SQLModel, table=True):
    """One login. Each refresh replaces `refresh_jti` and keeps the one before it."""

    __tablename__ = "session"

    id: str = Field(default_factory=secrets.token_urlsafe, primary_key=True)
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    refresh_jti: str = Field(default_factory=secrets.token_urlsafe)
    previous_jti: str | None = None
    rotated_at: datetime = Field(default_factory=now)
    expires_at: datetime = Field(default_factory=lambda: now() + SESSION_LIFE)
    user: User = Relationship(sa_relationship_kwargs={"lazy": "joined"})


class Credentials(BaseModel):
    """The form of OAuth2, as far as it matters here."""

    username: Annotated[str, Examples(["dora@example.com"])]
    password: Annotated[str, Examples(["correct-horse"])]
    grant_type: Literal["password"] = "password"  # noqa: S105


class Tokens(BaseModel):
    access_token: str
    refresh_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105
    expires_in: int


class PostCreate(Body):
    title: Title
    content: Content
    is_published: StrictBool = False


class PostUpdate(Body):
    """All may be left out. A version that is sent must be the current one."""

    model_config = example({"title": "Bees", "content": "They hum and dance."})

    title: Title = Field(default=None)
    content: Content = Field(default=None)
    version: StrictInt = Field(default=None)


VERSION = Column("version", Integer, nullable=False)


class Post(PostCreate, Stored, table=True):
    __mapper_args__ = {"version_id_col": VERSION}  # each change adds one, and finds the one before

    is_published: bool = Field(default=False, index=True)
    version: int = Field(default=None, sa_column=VERSION)
    updated_at: datetime = Field(default_factory=now, sa_column_kwargs={"onupdate": now})
    author_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    author: User = Relationship(sa_relationship_kwargs={"lazy": "joined", "innerjoin": True})


class PostRead(PostCreate):
    id: int
    is_published: bool
    version: int
    author: Author
    created_at: datetime
    updated_at: datetime


class CommentCreate(Body):
    text: CommentText


class Comment(CommentCreate, Stored, table=True):
    author_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    post_id: int = Field(foreign_key="post.id", ondelete="CASCADE", index=True)
    author: User = Relationship(sa_relationship_kwargs={"lazy": "joined", "innerjoin": True})


class CommentRead(CommentCreate):
    id: int
    author: Author
    post_id: int
    created_at: datetime


class PageQuery(BaseModel):
    page: int = Field(default=1, ge=1, le=2**31 - 1)
    size: int = Field(default=20, ge=1, le=100)


class UserQuery(PageQuery):
    is_active: bool | None = None


def read_moment(text: str, at: time = time.min) -> datetime:
    """A time, or a date at its first moment or another; UTC where no zone is given."""
    with suppress(ValueError):
        return datetime.combine(date.fromisoformat(text), at, UTC)
    with suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
    raise ValueError("must be a date or a time in the years 1 to 9999")


last_moment = partial(read_moment, at=time.max)


class PostQuery(PageQuery):
    author: Annotated[str, StringConstraints(max_length=100, pattern=NO_NUL)] = ""
    min_date: Annotated[datetime | None, BeforeValidator(read_moment, str)] = None
    max_date: Annotated[datetime | None, BeforeValidator(last_moment, str)] = None
    sort: Sort | None = None
    before: Id | None = None

    @model_validator(mode="after")
    def by_key_or_by_page(self) -> "PostQuery":
        if self.before and self.model_fields_set & {"page", "sort"}:
            raise ValueError("before goes with neither page nor sort")
        return self


class Page(BaseModel, Generic[Item]):
    """Of a page that was found by its key nobody knows the number."""

    items: list[Item]
    total: int | None = None
    page: int | None = None
    size: int
    pages: int | None = None


# --- Database -------------------------------------------------------------------------------------
# SQLite takes many readers beside one writer, so there are two engines: readers that do not wait
# for the writer, and a writer with one connection, where writers queue instead of being "locked".
# PostgreSQL needs no such care: there both names mean one engine.


def on_connect(connection: Any, _: Any) -> None:
    """The timeout comes first: even the switch to WAL may have to wait for another process."""
    cursor = connection.cursor()
    for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def on_begin(connection: Connection) -> None:
    """Takes the lock before the first read: a reader who wants to write later may be too late."""
    sqlite: Any = connection.connection.dbapi_connection
    sqlite.run_async(lambda raw: raw.execute_fetchall("BEGIN IMMEDIATE"))


class OneTrip(aiosqlite.AsyncAdapt_aiosqlite_cursor):
    """Runs a statement in one trip to the thread of its connection, where SQLAlchemy makes four."""

    __slots__ = ()
    _awaitable_cursor_close = False

    def _make_new_cursor(self, connection: Any) -> Any:
        return None  # the thread makes one for each statement

    def _aenter_cursor(self, cursor: Any) -> Any:
        return None

    def run(self, method: str, *statement: Any) -> None:
        cursor = self._connection._conn.cursor()
        getattr(cursor, method)(*statement)
        self._cursor, self._rows = cursor, deque(cursor.fetchall())

    async def _execute_async(self, statement: Any, values: Any) -> None:
        await self._connection._execute(self.run, "execute", statement, values or ())

    async def _executemany_async(self, statement: Any, values: Any) -> None:
        await self._connection._execute(self.run, "executemany", statement, values)


class FirstComeFirstServed(AsyncAdaptedQueue[Any]):
    """The free connections. SQLAlchemy's own queue lets latecomers pass those who wait."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.free = asyncio.Semaphore(0)

    def put_nowait(self, item: Any) -> None:
        super().put_nowait(item)
        self.free.release()

    async def wait(self, seconds: float | None) -> None:
        async with asyncio.timeout(seconds):
            await self.free.acquire()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        with suppress(TimeoutError):
            if block or not self.free.locked():
                await_(self.wait(timeout))
                return self.get_nowait()
        raise Empty


aiosqlite.AsyncAdapt_aiosqlite_connection._cursor_cls = OneTrip
AsyncAdaptedQueuePool._queue_class = FirstComeFirstServed
options: dict[str, Any] = {"pool_timeout": 5, "hide_parameters": True}
if settings.sqlite_file is None:
    options |= {"connect_args": {"timeout": 5, "command_timeout": 5}, "pool_pre_ping": True}
    options |= {"pool_size": 5, "max_overflow": 10}
    readers = writer = create_async_engine(settings.database_url, **options)
else:
    # There is no transaction but the one that on_begin begins.
    options |= {"max_overflow": 0, "isolation_level": "AUTOCOMMIT"}
    writer = create_async_engine(settings.database_url, pool_size=1, **options)
    options |= {"pool_reset_on_return": None, "skip_autocommit_rollback": True}  # saves round trips
    readers = create_async_engine(settings.database_url, pool_size=2, **options)
    event.listen(writer.sync_engine, "begin", on_begin)
    for engine in (readers, writer):
        event.listen(engine.sync_engine, "connect", on_connect)


def reading() -> AsyncSession:
    return AsyncSession(readers, expire_on_commit=False)


async def read_db() -> AsyncIterator[AsyncSession]:
    async with reading() as db:
        yield db


async def write_db() -> AsyncIterator[AsyncSession]:
    """Waits for the writer at its first statement; what was not committed in the end is undone."""
    async with AsyncSession(writer, expire_on_commit=False) as db:
        yield db


# With scope "function" the connection goes back when the route returns, not when all is sent.
ReadDB = Annotated[AsyncSession, Depends(read_db, scope="function")]
WriteDB = Annotated[AsyncSession, Depends(write_db, scope="function")]


async def page_of(
    db: AsyncSession, rows: Any, asked: PageQuery, kind: type[Page[Item]], count: Any = None
) -> Page[Item]:
    """The page that was asked for; its kind says what is shown of a row."""
    if count is None:
        count = rows.with_only_columns(func.count(), maintain_column_froms=True).order_by(None)
    total = (await db.exec(count)).one()
    items = (await db.exec(rows.offset((asked.page - 1) * asked.size).limit(asked.size))).all()
    found = {"items": items, "total": total, "pages": -(-total // asked.size)}
    return kind.model_validate(found | {"page": asked.page, "size": asked.size})


# --- Security -------------------------------------------------------------------------------------
# Passwords become bcrypt hashes, in threads and never while a connection is held: one takes 0.2 s.
# A token names its session, and is worth something only while the row of that session exists.

MAX_WAITING_PASSWORDS = 64
REFRESH_GRACE = timedelta(seconds=10)
DECOY = f"$2b${settings.bcrypt_rounds:02}${'.' * 53}"  # costs what a real hash costs, fits nothing
TOKEN = re.compile(r"[\w-]{1,1000}\.[\w-]{1,3000}\.[\w-]{43}", re.ASCII)
cores = CapacityLimiter(max(1, (os.cpu_count() or 1) // settings.workers))


async def run_bcrypt(work: Callable[[bytes, bytes], Item], password: str, salt: bytes) -> Item:
    """bcrypt looks at 72 bytes and stops at a NUL: with a digest every character counts."""
    if cores.statistics().tasks_waiting >= MAX_WAITING_PASSWORDS:
        raise Refusal("UNAVAILABLE", "Too many passwords are waiting")
    digest = hashlib.sha256(password.encode(errors="surrogatepass")).digest()
    return await to_thread.run_sync(work, base64.b64encode(digest), salt, limiter=cores)


async def hash_password(password: str) -> str:
    salt = bcrypt.gensalt(settings.bcrypt_rounds)
    return (await run_bcrypt(bcrypt.hashpw, password, salt)).decode()


async def password_fits(password: str, user: User | None) -> bool:
    """For nobody it takes as long as for somebody: the time must not tell who has an account."""
    hashed = user.hashed_password if user else DECOY
    return await run_bcrypt(bcrypt.checkpw, password, hashed.encode())


def kept_secret() -> bytes:
    """The key beside the database: linked into place, so that of several processes one wins."""
    kept = Path(f"{settings.sqlite_file}.key")
    if not kept.exists():
        with TemporaryDirectory(dir=kept.parent) as folder, suppress(FileExistsError):
            aside = Path(folder, "key")
            aside.touch(mode=0o600)
            aside.write_text(secrets.token_urlsafe(48))
            kept.hardlink_to(aside)
    secret = kept.read_bytes().strip()
    if len(secret) < 32:
        raise ValueError(f"the key in {kept} is shorter than 32 bytes")
    return secret


@cache
def signing_key() -> Any:
    # As plain text jose would refuse a secret that looks like a public key.
    encoded = base64.urlsafe_b64encode(settings.secret_key or kept_secret())
    return jwk.construct({"kty": "oct", "k": encoded.decode()}, "HS256")


class Claims(BaseModel):
    """What every token must say."""

    sub: str
    sid: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")]
    jti: str
    type: Literal["access", "refresh"]
    iat: int
    exp: int


def sign(session: LoginSession, kind: str, jti: str, issued: datetime, expires: datetime) -> str:
    claims = {"sub": str(session.user_id), "sid": session.id, "jti": jti, "type": kind}
    return str(jwt.encode(claims | {"iat": issued, "exp": expires}, signing_key(), "HS256"))


def issue(session: LoginSession, response: Response) -> Tokens:
    """The refresh token follows from the row alone: whoever asks again in time gets the same."""
    response.headers["Cache-Control"] = "no-store"
    issued, end = now(), session.expires_at
    expires = min(end, issued + timedelta(minutes=settings.access_token_expire_minutes))
    return Tokens(
        access_token=sign(session, "access", secrets.token_urlsafe(), issued, expires),
        refresh_token=sign(session, "refresh", session.refresh_jti, session.rotated_at, end),
        expires_in=int((expires - issued).total_seconds()),
    )


def read_token(token: str, kind: str) -> Claims:
    """Whatever is wrong with it, the answer is the same."""
    if not TOKEN.fullmatch(token):
        raise Refusal("INVALID_TOKEN")
    with suppress(Exception):  # jose lets errors of all kinds escape
        claims = Claims.model_validate(jwt.decode(token, signing_key(), ["HS256"]))
        if claims.type == kind:
            return claims
    raise Refusal("INVALID_TOKEN")


# --- Redis ----------------------------------------------------------------------------------------
# What processes share where REDIS_URL is set: counts of requests and logs of events. While Redis
# does not answer, each process goes on by itself.

TRIP_SECONDS = 0.045  # a request makes two at most, and shall not wait longer than 0.1
COUNT = """
    local count = redis.call('INCR', KEYS[1])
    if count == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
    return {count, redis.call('PTTL', KEYS[1])}"""


class Redis:
    """Carries texts; what they mean is known below."""

    def __init__(self) -> None:
        self.up: bool | None = None  # None: nobody has tried
        self.readers: dict[str, Callable[[list[str]], None]] = {}  # by the name of their log
        self.places: dict[str, str] = {}
        self.commands: list[tuple[Any, ...]] = []
        self.trip: asyncio.Task[list[Any]] | None = None
        self.road = asyncio.Lock()
        if settings.redis_url:
            self.hearing = redis_client(settings.redis_url)
            self.asking = self.hearing.connection_pool.make_connection()

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except Exception as error:  # whatever it is, no request fails for it
            self.note(False, f"fails ({type(error).__name__})")

    def note(self, up: bool, what: str) -> None:
        if up != self.up:
            self.up = up
            log.warning("Redis %s; limits and events are %sshared", what, "" if up else "not ")

    async def ask(self, *command: Any) -> Any:
        """The answer, or None. Whoever comes while a trip is under way shares the next one."""
        self.trip = trip = self.trip or asyncio.create_task(self.travel())
        self.commands.append(command)
        place = len(self.commands) - 1
        for _ in range(8):  # in parts, so that a pause of our own does not count as one of theirs
            if not (await asyncio.wait([trip], timeout=TRIP_SECONDS / 8))[1]:
                return trip.result()[place] if trip.result() else None
        self.note(False, "does not answer in time")

    async def travel(self) -> list[Any]:
        """All that was asked meanwhile, in one trip; one at a time is on the road."""
        async with self.road, self.within(1):
            commands, self.commands, self.trip = self.commands, [], None
            if self.up:
                await self.asking.send_packed_command(self.asking.pack_commands(commands))
                return [await self.asking.read_response() for _ in commands]
        return []

    async def meet(self) -> None:
        """Can it count, and where do its logs end? What stands there is read at the start alone."""
        await self.hearing.eval(COUNT, 1, "nutshell:up", 1)
        await self.asking.disconnect(nowait=True)  # who still waits there, waits in vain
        async with self.road:
            await self.asking.connect()
        for name in self.readers.keys() - self.places.keys():
            old = await self.hearing.xrange(name)
            self.places[name] = old[-1][0] if old else "0-0"
            if self.up is None:
                self.readers[name]([entry["text"] for _, entry in old])
        self.note(True, "answers")

    async def listen(self) -> None:
        """Waits a second for what is written to the logs, by anyone, and hands it on."""
        if not self.up:
            await self.meet()
        await self.ask("PING")  # so that nobody on the way thinks this connection idle
        for name, new in await self.hearing.xread(self.places, count=100, block=1_000):
            self.places[name] = new[-1][0]
            self.readers[name]([entry["text"] for _, entry in new])

    async def follow(self) -> None:
        while True:
            async with self.within(3):
                await self.listen()
            if not self.up:
                await asyncio.sleep(0.5)


redis = Redis()


@asynccontextmanager
async def in_touch() -> AsyncIterator[None]:
    """With the other processes, for as long as we serve."""
    async with redis.within(1):
        await redis.meet()
    following = asyncio.create_task(redis.follow())
    yield
    following.cancel()
    async with redis.within(1):
        await redis.hearing.aclose()
        await redis.asking.disconnect()


# --- Rate limiter ---------------------------------------------------------------------------------
# Each client has so many requests in a window of time, which opens at the first of them. So at the
# edge of two windows twice as many may pass: that is the price of a count that needs no history.
# The front door keeps the headers of a request as `asked`, and adds to the answer what is `told`.

SECONDS = {"second": 1, "minute": 60, "hour": 3_600}
MAX_WINDOWS = 20_000
UNLIMITED = ("/health", f"{API}/auth/verify", "/docs", "/redoc", "/openapi.json")
STRICT = (f"{API}/auth/register", f"{API}/auth/login")


class Limiter:
    """Two dictionaries take turns: when a window is over, or one is full, the older is dropped."""

    def __init__(self, name: str, rate: str, times: int = 1) -> None:
        number, _, unit = rate.partition("/")
        self.quota, self.seconds = (int(number) * times, SECONDS[unit]) if unit else (0, 0)
        self.name, self.policy = name, f'"{name}";q={self.quota};w={self.seconds}'.encode()
        self.new: dict[str, tuple[int, float]] = {}  # how many so far, and when the window ends
        self.old: dict[str, tuple[int, float]] = {}
        self.turn = 0.0  # when the new ones become the old ones

    async def hit_together(self, key: str) -> tuple[int, int] | None:
        """The same as below for all processes at once; None while Redis does not answer."""
        name = f"nutshell:{self.name}:{self.seconds}:{key}"
        found = await redis.ask("EVAL", COUNT, 1, name, self.seconds * 1_000)
        return (self.quota - found[0], max(1, ceil(found[1] / 1_000))) if found else None

    def hit(self, key: str, moment: float) -> tuple[int, int]:
        """Counts one more. How many are left, and the seconds until the window ends."""
        if moment >= self.turn or len(self.new) >= MAX_WINDOWS:
            self.old, self.new, self.turn = self.new, {}, moment + self.seconds
        count, end = self.new.get(key) or self.old.get(key) or (0, moment)
        if moment >= end:
            count, end = 0, moment + self.seconds
        self.new[key] = count + 1, end
        return self.quota - count - 1, min(self.seconds, ceil(end - moment))


limits = Limiter("default", settings.rate_limit)
auth_limits = Limiter("auth", settings.auth_rate_limit)
email_limits = Limiter("auth", settings.auth_rate_limit, times=10)


@lru_cache(1_000)
def client_key(address: str) -> str:
    """IPv6 by the /64 that one customer has, IPv4 as such however it comes, all else as one."""
    with suppress(ValueError):
        ip = ip_address(address)
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is None:
            return ip.packed[:8].hex()
        return str(getattr(ip, "ipv4_mapped", None) or ip)
    return "unknown"


async def limit(limiter: Limiter, key: str, scope: Scope) -> None:
    """Counts a request and tells the client where it stands, or refuses it."""
    if limiter.quota == 0:
        return
    together = await limiter.hit_together(key) if redis.up else None
    left, wait = together or limiter.hit(key, perf_counter())
    told = scope["state"]["told"]
    if left < 0 or b"ratelimit" not in told:
        told[b"ratelimit-policy"] = limiter.policy
        told[b"ratelimit"] = f'"{limiter.name}";r={max(left, 0)};t={wait}'.encode()
    if left < 0:
        raise Refusal("RATE_LIMITED", headers={"Retry-After": str(wait)})


async def limit_client(scope: Scope) -> None:
    path = scope["state"]["path"]
    if path not in UNLIMITED and not path.startswith("/docs/"):
        limiter = auth_limits if path.startswith(STRICT) else limits
        await limit(limiter, client_key(scope["state"]["client"]), scope)


# --- Cache ----------------------------------------------------------------------------------------
# What was read is remembered until somebody writes to the tables it came from. The database layer
# tells of every write, so no route can forget to; where others may write unseen, nothing is kept.

MAX_KEPT = 2_000
MAX_KEPT_BYTES = 16 * 1024 * 1024
WRITE = re.compile(r'(?:INSERT INTO|UPDATE|DELETE FROM) "?(\w+)')
alone = settings.sqlite_file is not None and settings.workers == 1 and parent_process() is None
remembers = alone and settings.redis_url is None and settings.cache_seconds > 0


class Memory:
    """It is emptied whole: by a write, when it is full, when it is old. To keep what you read, take
    the ticket before you read: it changes each time that the memory is emptied."""

    def __init__(self, *tables: str) -> None:
        self.tables, self.ticket, self.writing = tables, 0, False
        self.forget()
        if remembers:
            event.listen(writer.sync_engine, "before_cursor_execute", self.on_statement)
            event.listen(writer.sync_engine, "checkin", self.on_checkin)

    def forget(self) -> None:
        self.kept: dict[Any, Any] = {}
        self.bytes = 0
        self.until = perf_counter() + settings.cache_seconds
        self.ticket += 1

    def get(self, key: Any) -> Any:
        if perf_counter() > self.until:
            self.forget()
        return self.kept.get(key)

    def keep(self, key: Any, value: Any, size: int, ticket: int) -> None:
        if not remembers or self.writing or ticket != self.ticket or size > MAX_KEPT_BYTES:
            return
        if len(self.kept) >= MAX_KEPT or self.bytes + size > MAX_KEPT_BYTES:
            self.forget()
        self.kept[key] = value
        self.bytes += size

    def on_statement(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        """From the first write until its transaction ends nothing is known for sure."""
        written = WRITE.match(statement)
        if not statement.startswith("SELECT") and (not written or written[1] in self.tables):
            self.writing = True
            self.forget()

    def on_checkin(self, connection: Any, record: Any) -> None:
        if self.writing:
            self.writing = False
            self.forget()


answers = Memory("user", "post", "comment")
identities = Memory("user", "session")


class AnswerCache:
    """Stands before FastAPI: what anybody may read is answered from memory, ready as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "GET" or not scope["state"]["path"].startswith(f"{API}/posts"):
            return await self.app(scope, receive, send)
        asked, told = scope["state"]["asked"], scope["state"]["told"]
        told[b"vary"] = b"Authorization" if b"origin" in asked else b"Origin, Authorization"
        if b"authorization" in asked:
            told[b"cache-control"] = b"private, no-cache"
            return await self.app(scope, receive, send)
        key = scope["path"], scope["query_string"]
        answer, found = answers.get(key), b"hit"
        if answer is None:
            answer, found = await self.ask(key, scope, receive), b"miss"
        status, headers, etag, body = answer
        if etag:
            told |= {b"etag": etag, b"cache-control": b"public, max-age=0, must-revalidate"}
            told |= {b"x-cache": found} if remembers else {}
            known = asked.get(b"if-none-match", b"")
            if etag in known or known.strip() == b"*":
                status, headers, body = 304, [], b""
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def ask(self, key: tuple[str, bytes], scope: Scope, receive: Receive) -> Any:
        ticket, parts = answers.ticket, []

        async def collect(part: Message) -> None:
            parts.append(part)

        await self.app(scope, receive, collect)
        status, headers = parts[0]["status"], parts[0]["headers"]
        body = b"".join(part.get("body", b"") for part in parts)
        if status != 200:
            return status, headers, b"", body
        etag = b'"%b"' % hashlib.blake2b(body, digest_size=16).hexdigest().encode()
        answer = status, headers, etag, body
        answers.keep(key, answer, len(body) + len(key[0]) + len(key[1]) + 1_000, ticket)
        return answer


# --- Live events ----------------------------------------------------------------------------------
# A hub is a log of the last events. Every listener keeps its own place in it, so that what was
# missed and what is new are read by the same lines. There are no queues: who is too slow falls out
# of the log and is dropped, and delays nobody.

PATIENCE_SECONDS = 10.0  # for a client that does not speak or read; and between signs of life
MAX_LISTENERS = 1_000
MAX_EVENTS = 1_001  # who heard the first of them misses a thousand


class Event(NamedTuple):
    id: str
    kind: str
    post_id: int
    data: str  # JSON


class Hub:
    def __init__(self, name: str) -> None:
        self.name, self.run, self.told = f"nutshell:{name}", secrets.token_hex(4), 0
        self.log = deque([Event(f"{self.run}-0", "start", 0, "")], maxlen=MAX_EVENTS)
        self.count = 1  # of all that were ever in the log, and so the place behind the newest
        self.news = asyncio.Event()
        self.seats = CapacityLimiter(MAX_LISTENERS)
        self.closed = False
        redis.readers[self.name] = self.hear

    async def tell(self, kind: str, post_id: int, data: Any) -> None:
        """Tells the listeners of all processes, or, while Redis does not answer, our own."""
        self.told += 1
        new = Event(f"{self.run}-{self.told}", kind, post_id, to_json(data).decode())
        entry = "XADD", self.name, "MAXLEN", MAX_EVENTS, "*", "text", to_json(new)
        if not (redis.up and await redis.ask(*entry)):
            self.add(new)

    def hear(self, texts: list[str]) -> None:
        for new in (Event(*json.loads(text)) for text in texts):
            if new not in self.log:  # else Redis took it, but too late for us to know
                self.add(new)

    def add(self, event: Event) -> None:
        self.log.append(event)
        self.count += 1
        self.wake()

    def wake(self) -> None:
        """Wakes those who wait now; later ones wait for the next event."""
        self.news.set()
        self.news = asyncio.Event()

    def close(self) -> None:
        self.closed = True
        self.wake()

    def place_after(self, event_id: str) -> int | None:
        """None for an event that is not, or no longer, in the log."""
        found = (place for place, event in enumerate(self.log, 1) if event.id == event_id)
        return next((self.count - len(self.log) + place for place in found), None)

    async def follow(self, place: int, post_id: int | None = None) -> AsyncIterator[list[Event]]:
        """Events as they come, every ten seconds none. Ends for those who fell out of the log."""
        pulse = perf_counter() + PATIENCE_SECONDS
        while not self.closed and self.count - place <= len(self.log):
            news = self.news  # what comes while we look and tell is not slept through
            new = [self.log[i] for i in range(place - self.count, 0)]
            place = self.count
            if found := [event for event in new if post_id in (None, event.post_id)]:
                yield found
            if perf_counter() >= pulse:
                yield []
                pulse = perf_counter() + PATIENCE_SECONDS
            with move_on_after(pulse - perf_counter()):
                await news.wait()

    def seat(self) -> CapacityLimiter:
        """Take it with `async with`: it is free again when the listener leaves."""
        if self.seats.available_tokens == 0:
            raise Refusal("UNAVAILABLE", "Too many are listening")
        return self.seats


events, chat = Hub("events"), Hub("chat")  # what happens to posts, and what is said in rooms


async def announce(kind: str, post: Any, data: Any = None) -> None:
    """Call it after the commit. What happens to a draft is no news."""
    if post.is_published:
        data = data or PostRead.model_validate(post).model_dump(exclude={"content"})
        await events.tell(kind, post.id, data)


# --- Mail -----------------------------------------------------------------------------------------
# Each mail has a thread that ends with the process, so that a mail server that hangs delays neither
# an answer nor a stop. What cannot be sent is a line in the log, and not retried.


class NoEncryption(Exception):
    """Everybody on the way to the mail server could read the password."""


def deliver(to: str, subject: str, body: str) -> None:
    """Speaks SMTP, encrypted where the server offers it; smtps:// insists, and so do passwords."""
    url = urlsplit(settings.smtp_url or "")
    tls = ssl.create_default_context()
    mail = EmailMessage()
    mail["From"] = settings.mail_from or "nutshell@localhost"
    mail["To"], mail["Subject"] = to, subject
    mail.set_content(body)
    connect = partial(smtplib.SMTP_SSL, context=tls) if url.scheme == "smtps" else smtplib.SMTP
    with connect(url.hostname or "", url.port or 0, timeout=5) as server:
        server.ehlo_or_helo_if_needed()
        if server.has_extn("starttls"):
            server.starttls(context=tls)
        elif url.username and url.scheme == "smtp":
            raise NoEncryption("the server offers no encryption, and SMTP_URL has a password")
        if url.username:
            server.login(unquote(url.username), unquote(url.password or ""))
        server.send_message(mail)


def deliver_or_log(*mail: str) -> None:
    try:
        text = "\n".join(("Mail to", *mail, ""))  # in one piece, between the lines of the log
        deliver(*mail) if settings.smtp_url else print(text, end="", flush=True)
    except NoEncryption as error:
        log.error("mail not sent: %s", error)
    except (OSError, ValueError) as error:  # their text may name the receiver
        log.error("mail not sent: %s", type(error).__name__)


def mails_under_way() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mail"]


def send_mail(to: str, subject: str, body: str) -> None:
    if settings.smtp_url is None and settings.production:
        log.warning("mail not sent: SMTP_URL is not set")
    elif len(mails_under_way()) >= 50:
        log.error("mail not sent: too many are under way")
    else:
        mail = (to, subject, body)
        threading.Thread(target=deliver_or_log, args=mail, name="mail", daemon=True).start()


# --- Dependencies ---------------------------------------------------------------------------------
# Who is asking, and may they? Every answer is a noun that a route takes as an argument.

bearer = OAuth2PasswordBearer(f"{API}/auth/login", auto_error=False)
SentToken = Annotated[str | None, Depends(bearer)]


async def live_session(db: AsyncSession, claims: Claims) -> LoginSession:
    """The session that a token names, while it and its user are there and active."""
    session = await db.get(LoginSession, claims.sid)
    if session is None or str(session.user_id) != claims.sub or not session.user.is_active:
        raise Refusal("INVALID_TOKEN")
    return session


async def session_of(token: str) -> LoginSession:
    """The live session that an access token names."""
    known, ticket = identities.get(token), identities.ticket
    if known and now().timestamp() < known[0]:
        session: LoginSession = known[1]
        return session
    claims = read_token(token, "access")
    async with reading() as db:
        session = await live_session(db, claims)
    identities.keep(token, (claims.exp, session), len(token) + 5_000, ticket)
    return session


async def current_session(request: Request, token: SentToken) -> LoginSession:
    session = await session_of(token or "")
    request.state.user_id = session.user_id
    return session


CurrentSession = Annotated[LoginSession, Depends(current_session)]


async def current_user(session: CurrentSession) -> User:
    return session.user


CurrentUser = Annotated[User, Depends(current_user)]


async def maybe_user(request: Request, token: SentToken) -> User | None:
    """Nobody has to sign in here, but a token that is sent must be good."""
    if "authorization" not in request.headers:
        return None
    return (await current_session(request, token)).user


MaybeUser = Annotated[User | None, Depends(maybe_user)]
FOR_ANYONE: Any = {"security": [{}]}  # for /docs: the token may be left out


def require_role(role: Role) -> Callable[[User], Awaitable[User]]:
    """Makes a guard: `Depends(require_role("admin"))`."""

    async def guard(me: CurrentUser) -> User:
        if me.role != role:
            raise Refusal("INSUFFICIENT_PERMISSIONS")
        return me

    return guard


Superuser = Annotated[User, Depends(require_role("admin"))]
LoginForm = Annotated[Credentials, Form()]
AskedPage = Annotated[PageQuery, Query()]
AskedUsers = Annotated[UserQuery, Query()]
AskedPosts = Annotated[PostQuery, Query()]


async def user_id(user: Literal["me"] | Id, me: CurrentUser) -> int:
    return me.id if user == "me" else user


UserId = Annotated[int, Depends(user_id)]


async def own_user_id(user_id: UserId, me: CurrentUser) -> int:
    """One's own id, or any for a superuser; the refusal does not tell which ids exist."""
    if user_id != me.id and not me.is_superuser:
        raise Refusal("INSUFFICIENT_PERMISSIONS")
    return user_id


OwnId = Annotated[int, Depends(own_user_id)]


def may_change(me: User | None, theirs: Post | Comment) -> bool:
    return me is not None and (me.is_superuser or me.id == theirs.author_id)


ONE_POST = select(Post).where(Post.id == bindparam("post_id"))
HELD_POST = ONE_POST.with_for_update(of=Post)


async def find_post(db: AsyncSession, post_id: int, me: User | None, hold: bool = False) -> Post:
    """To all but its author and superusers a draft does not exist. Whoever holds a post is the
    only one to write to it, or below it, until the commit."""
    rows = HELD_POST if hold else ONE_POST
    post = (await db.exec(rows, params={"post_id": post_id})).first()
    if post is None or not (post.is_published or may_change(me, post)):
        raise Refusal("NOT_FOUND")
    return post


async def visible_post(post_id: Id, me: MaybeUser, db: ReadDB) -> Post:
    return await find_post(db, post_id, me)


async def held_post(post_id: Id, me: CurrentUser, db: WriteDB) -> Post:
    return await find_post(db, post_id, me, hold=True)


VisiblePost = Annotated[Post, Depends(visible_post)]
HeldPost = Annotated[Post, Depends(held_post)]


async def own_post(post: HeldPost, me: CurrentUser) -> Post:
    if not may_change(me, post):
        raise Refusal("INSUFFICIENT_PERMISSIONS")
    return post


OwnPost = Annotated[Post, Depends(own_post)]


# --- Routes: accounts and tokens ------------------------------------------------------------------
# The database decides who wins a refresh: the request that still finds its token's jti in the row
# replaces it. Whoever comes with the one just replaced, within 10 s, gets the same new token.

auth = APIRouter(prefix=f"{API}/auth", tags=["auth"], responses=errors(422))


async def add_user(db: AsyncSession, body: UserCreate, send_welcome: bool = True) -> User:
    hashed = await hash_password(body.password)
    user = User.model_validate(body, update={"hashed_password": hashed})
    db.add(user)
    await db.commit()
    if send_welcome:
        send_mail(user.email, "Welcome", f"Hello {user.full_name},\n\nyour account is ready.\n")
    return user


@auth.post("/register", status_code=201, response_model=UserRead, responses=errors(403, 409, 429))
async def register(body: UserCreate, db: WriteDB) -> User:
    """Make yourself an account."""
    if settings.registration == "closed":
        raise Refusal("INSUFFICIENT_PERMISSIONS", "Only admins make accounts here")
    return await add_user(db, body)


@auth.post("/login", responses=errors(401, 429))
async def login(request: Request, form: LoginForm, db: WriteDB, response: Response) -> Tokens:
    """Sign in: send the email as `username`."""
    email = ""
    with suppress(ValueError):
        email = plain_email(form.username)
    await limit(email_limits, hashlib.sha256(email.encode()).hexdigest(), request.scope)
    async with reading() as reader:  # and gives the connection back: hashing takes a while
        known = (await reader.exec(select(User).where(User.email == email))).first()
    if not await password_fits(form.password, known) or known is None:
        raise Refusal("INVALID_CREDENTIALS")
    user = await db.get(User, known.id, with_for_update=True)  # look again
    if user is None or not user.is_active or user.hashed_password != known.hashed_password:
        raise Refusal("INVALID_CREDENTIALS")
    mine, expired = col(LoginSession.user_id) == user.id, col(LoginSession.expires_at) < now()
    await db.exec(delete(LoginSession).where(mine, expired))
    session = LoginSession(user_id=user.id)
    db.add(session)
    await db.commit()
    return issue(session, response)


@auth.post("/refresh", responses=errors(401, 429))
async def refresh(refresh_token: Annotated[str, Form()], db: WriteDB, response: Response) -> Tokens:
    """Trade a refresh token for new ones. One used more than 10 s ago ends the session."""
    claims = read_token(refresh_token, "refresh")
    moment = now()
    await db.exec(
        update(LoginSession)
        .where(col(LoginSession.id) == claims.sid, col(LoginSession.refresh_jti) == claims.jti)
        .values(refresh_jti=secrets.token_urlsafe(), previous_jti=claims.jti, rotated_at=moment)
    )
    session = await live_session(db, claims)
    if session.previous_jti != claims.jti or moment - session.rotated_at > REFRESH_GRACE:
        await db.exec(delete(LoginSession).where(col(LoginSession.id) == session.id))
        await db.commit()
        raise Refusal("TOKEN_REUSED")
    await db.commit()
    return issue(session, response)


@auth.post("/logout", status_code=204, responses=errors(401, 429))
async def logout(session: CurrentSession, db: WriteDB, everywhere: bool = False) -> None:
    """End this session, or all of your sessions."""
    mine, this = col(LoginSession.user_id) == session.user_id, col(LoginSession.id) == session.id
    await db.exec(delete(LoginSession).where(mine if everywhere else this))
    await db.commit()


@auth.get("/verify", response_class=Response, responses=errors(401, 403))
async def verify(me: CurrentUser, role: Role | None = None) -> Response:
    """For a proxy that guards another app: who is this, and do they have that role?"""
    if role == "admin" and not me.is_superuser:
        raise Refusal("INSUFFICIENT_PERMISSIONS")
    email = quote(me.email, safe=string.punctuation)
    who = {"Remote-User": str(me.id), "Remote-Groups": me.role, "Remote-Email": email}
    return Response(headers=who | {"Cache-Control": "no-store"})


# --- Routes: users --------------------------------------------------------------------------------
# `{user}` in a path is an id or `me`. Superusers may change others, and nobody their own role: so
# an admin always remains.

users = APIRouter(prefix=f"{API}/users", tags=["users"], responses=errors(401, 422, 429))


async def hold_user(db: AsyncSession, user_id: int, me: User) -> User:
    """Locks the user to change and the one who asks, in order of id, and looks whether the latter
    is still who they were: of two admins who remove each other at once, one comes too late.
    Whoever writes posts of theirs need not wait (`key_share`)."""
    both = select(User).where(col(User.id).in_((user_id, me.id))).order_by(col(User.id))
    found = {user.id: user for user in await db.exec(both.with_for_update(key_share=True))}
    if user_id not in found:
        raise Refusal("NOT_FOUND")
    for field in ("role", "is_active", "hashed_password"):
        if getattr(found.get(me.id), field, None) != getattr(me, field):
            raise Refusal("CONFLICT")
    return found[user_id]


@users.get("", response_model=Page[UserRead] | Page[UserPublic])
async def list_users(asked: AskedUsers, me: CurrentUser, db: ReadDB) -> Page[Any]:
    """All users, by id. Superusers see every field."""
    rows = select(User).order_by(col(User.id))
    if asked.is_active is not None:
        rows = rows.where(User.is_active == asked.is_active)
    return await page_of(db, rows, asked, Page[UserRead] if me.is_superuser else Page[UserPublic])


@users.post("", status_code=201, response_model=UserRead, responses=errors(403, 409))
async def create_user(
    body: UserCreateByAdmin, me: Superuser, db: WriteDB, send_welcome: bool = False
) -> User:
    """Make an account for somebody."""
    return await add_user(db, body, send_welcome)


@users.get("/me", response_model=UserRead, include_in_schema=False)  # as {user}, but faster
async def get_me(me: CurrentUser) -> User:
    """You yourself."""
    return me


@users.get("/{user}", response_model=UserRead | UserPublic, responses=errors(404))
async def get_user(user_id: UserId, me: CurrentUser, db: ReadDB) -> UserPublic:
    """One user. You yourself and superusers see every field."""
    user = me if user_id == me.id else await db.get(User, user_id)
    if user is None:
        raise Refusal("NOT_FOUND")
    kind = UserRead if user is me or me.is_superuser else UserPublic
    return kind.model_validate(user)


@users.patch("/{user}", response_model=UserRead, responses=errors(403, 404, 409))
async def update_user(user_id: OwnId, body: UserUpdate, this: CurrentSession, db: WriteDB) -> User:
    """Change the fields that are sent. Your own email or password needs `current_password`."""
    me, sent = this.user, body.model_fields_set
    own = user_id == me.id
    if sent & {"role", "is_active"} and not me.is_superuser:
        raise Refusal("INSUFFICIENT_PERMISSIONS")
    if sent & {"role", "is_active"} and own:
        raise Refusal("CONFLICT", "Nobody changes this of themselves, so that an admin remains")
    if own and sent & {"email", "password"} and not await password_fits(body.current_password, me):
        raise Refusal("INSUFFICIENT_PERMISSIONS", "current_password is missing or wrong")
    values = body.model_dump(exclude_unset=True, exclude={"password", "current_password"})
    if "password" in sent:
        values["hashed_password"] = await hash_password(body.password)
    user = await hold_user(db, user_id, me)
    user.sqlmodel_update(values)
    if "password" in sent or not user.is_active:
        theirs, other = col(LoginSession.user_id) == user_id, col(LoginSession.id) != this.id
        await db.exec(delete(LoginSession).where(theirs, other))
    await db.commit()
    return user


@users.delete("/{user}", status_code=204, responses=errors(403, 404, 409))
async def delete_user(user_id: UserId, me: Superuser, db: WriteDB) -> None:
    """Delete a user and everything they own."""
    if user_id == me.id:
        raise Refusal("CONFLICT", "Nobody removes themselves, so that an admin remains")
    user = await hold_user(db, user_id, me)
    removal = delete(Post).where(col(Post.author_id) == user_id)
    theirs = removal.returning(col(Post.id), col(Post.is_published))
    # Posts first and then the user, as all who write take them, or two would wait for each other.
    gone = (await db.exec(theirs)).all()
    await db.refresh(user, with_for_update=True)  # from here on they write no more
    gone = [*gone, *(await db.exec(theirs)).all()]  # what they wrote meanwhile
    await db.delete(user)
    await db.commit()
    for start in range(0, len(gone), 100):  # so that listeners read before these leave the log
        some = gone[start : start + 100]
        await asyncio.gather(*(announce("post.deleted", post, {"id": post.id}) for post in some))


@users.get("/me/posts")
async def list_own_posts(asked: AskedPage, me: CurrentUser, db: ReadDB) -> Page[PostRead]:
    """Your own posts, newest first, drafts included."""
    rows = select(Post).where(Post.author_id == me.id).order_by(col(Post.id).desc())
    return await page_of(db, rows, asked, Page[PostRead])


# --- Routes: posts --------------------------------------------------------------------------------
# A draft is there for its author and superusers alone. What is published is told to listeners, each
# change after its commit.

posts = APIRouter(prefix=f"{API}/posts", tags=["posts"], responses=errors(401, 422, 429))


async def tell_of_publication(post: Post) -> None:
    await announce("post.published", post)
    if settings.admin_email:
        what = f'{post.author.full_name} published "{post.title}": {API}/posts/{post.id}\n'
        send_mail(settings.admin_email, "A post was published", what)


ALL_POSTS = select(func.count()).select_from(Post).scalar_subquery()
DRAFTS = select(func.count()).where(not_(col(Post.is_published))).scalar_subquery()
PUBLISHED = select(ALL_POSTS - DRAFTS)  # of a million 20 times faster than to count them


@posts.get("", openapi_extra=FOR_ANYONE)
async def list_posts(asked: AskedPosts, me: MaybeUser, db: ReadDB) -> Page[PostRead]:
    """Published posts, newest first. `before` reads on from a post, fast however many there are."""
    rows = select(Post).where(Post.is_published)
    if asked.author:
        names = col(User.first_name), col(User.last_name)
        fits = or_(*(name.icontains(asked.author, autoescape=True) for name in names))
        rows = rows.where(col(Post.author_id).in_(select(User.id).where(fits)))
    if asked.min_date:
        rows = rows.where(Post.created_at >= asked.min_date)
    if asked.max_date:
        rows = rows.where(Post.created_at <= asked.max_date)
    sort = asked.sort or "-id"
    order = getattr(Post, sort.removeprefix("-"))
    rows = rows.order_by(order.desc() if sort.startswith("-") else order, col(Post.id).desc())
    if asked.before is None:
        plain = not (asked.author or asked.min_date or asked.max_date)
        return await page_of(db, rows, asked, Page[PostRead], PUBLISHED if plain else None)
    items = (await db.exec(rows.where(Post.id < asked.before).limit(asked.size))).all()
    return Page[PostRead].model_validate({"items": items, "size": asked.size})


@posts.post("", status_code=201, response_model=PostRead, responses=errors(409))
async def create_post(body: PostCreate, me: CurrentUser, db: WriteDB, response: Response) -> Post:
    """Write a post: a draft, if you do not publish it at once."""
    post = Post.model_validate(body, update={"author_id": me.id})
    db.add(post)
    await db.commit()
    set_committed_value(post, "author", me)  # asking for it would cost a round trip
    if post.is_published:
        await tell_of_publication(post)
    response.headers["Location"] = f"{API}/posts/{post.id}"
    return post


@posts.get("/{post_id}", response_model=PostRead, responses=errors(404), openapi_extra=FOR_ANYONE)
async def get_post(post: VisiblePost) -> Post:
    """One post; a draft is there for its author and superusers alone."""
    return post


@posts.put("/{post_id}", name="put_post", response_model=PostRead, responses=errors(403, 404, 409))
@posts.patch("/{post_id}", response_model=PostRead, responses=errors(403, 404, 409))
async def update_post(post: OwnPost, body: PostUpdate, db: WriteDB) -> Post:
    """Change the fields that are sent. With `version` only if nobody was faster."""
    if body.version not in (None, post.version):
        raise Refusal("CONFLICT")
    values = body.model_dump(exclude_unset=True, exclude={"version"})
    post.sqlmodel_update(values | {"updated_at": now()})
    await db.commit()
    await announce("post.updated", post)
    return post


@posts.delete("/{post_id}", status_code=204, responses=errors(403, 404))
async def delete_post(post: OwnPost, db: WriteDB) -> None:
    """Delete a post and its comments."""
    await db.delete(post)
    await db.commit()
    await announce("post.deleted", post, {"id": post.id})


@posts.post("/{post_id}/publish", response_model=PostRead, responses=errors(403, 404))
async def publish_post(post: HeldPost, me: CurrentUser, db: WriteDB) -> Post:
    """Publish your draft. There is no way back; doing it twice changes nothing."""
    if post.author_id != me.id:
        raise Refusal("INSUFFICIENT_PERMISSIONS")
    if not post.is_published:
        post.is_published = True
        await db.commit()
        await tell_of_publication(post)
    return post


# --- Routes: comments -----------------------------------------------------------------------------
# They belong to a post: whoever does not see it does not see them.

comments = APIRouter(prefix=API, tags=["comments"], responses=errors(401, 404, 422, 429))


@comments.get("/posts/{post_id}/comments", openapi_extra=FOR_ANYONE)
async def list_comments(post: VisiblePost, asked: AskedPage, db: ReadDB) -> Page[CommentRead]:
    """The comments on a post, oldest first."""
    rows = select(Comment).where(Comment.post_id == post.id).order_by(col(Comment.id))
    return await page_of(db, rows, asked, Page[CommentRead])


@comments.post(
    "/posts/{post_id}/comments",
    status_code=201,
    response_model=CommentRead,
    responses=errors(409),
)
async def add_comment(post: HeldPost, body: CommentCreate, me: CurrentUser, db: WriteDB) -> Comment:
    """Comment on a post that you see."""
    comment = Comment.model_validate(body, update={"author_id": me.id, "post_id": post.id})
    db.add(comment)
    await db.commit()
    set_committed_value(comment, "author", me)
    await announce("comment.created", post, CommentRead.model_validate(comment))
    return comment


@comments.delete("/comments/{comment_id}", status_code=204, responses=errors(403))
async def delete_comment(comment_id: Id, me: CurrentUser, db: WriteDB) -> None:
    """Delete a comment of yours, or on your post."""
    comment = await db.get(Comment, comment_id)
    if comment is None:
        raise Refusal("NOT_FOUND")
    post = await find_post(db, comment.post_id, me, hold=True)
    if not (may_change(me, comment) or may_change(me, post)):
        raise Refusal("INSUFFICIENT_PERMISSIONS")
    gone = await db.exec(delete(Comment).where(col(Comment.id) == comment_id))
    if gone.rowcount == 0:  # somebody was faster
        raise Refusal("NOT_FOUND")
    await db.commit()
    await announce("comment.deleted", post, {"id": comment_id, "post_id": post.id})


# --- Routes: live ---------------------------------------------------------------------------------
# Everybody may listen to the stream of events. The room of a post is a WebSocket for people who
# are signed in: they hear of the post, and each other.

live = APIRouter(prefix=API, tags=["live"], responses=errors(401, 422, 429))
CLOSE_CODES = {"INVALID_TOKEN": 4401, "NOT_FOUND": 4404, "BAD_REQUEST": 1008}  # else 1013
AS_EVENTS: Any = {200: {"content": {"text/event-stream": {}}}}  # for /docs
Resumed = Annotated[str, Header(alias="Last-Event-ID")]


class EventStream(StreamingResponse):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers.update({"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        self.headers["X-Accel-Buffering"] = "no"
        async with events.seat():
            with suppress(Refusal):  # of a body that is too large: it just ends
                await super().__call__(scope, receive, send)


@live.get("/events", response_class=EventStream, responses=AS_EVENTS, openapi_extra=FOR_ANYONE)
async def stream_events(
    me: MaybeUser, post_id: Id | None = None, last_event_id: str = "", resumed: Resumed = ""
) -> AsyncIterator[str]:
    """What happens to published posts, or to one. Name your last event to get what you missed."""
    last = resumed or last_event_id
    place = events.place_after(last) if last else events.count
    if place is None:
        place = events.count
        yield f"id: {events.log[-1].id}\nevent: reset\ndata: {{}}\n\n"
    async for found in events.follow(place, post_id):
        lines = (f"id: {e.id}\nevent: {e.kind}\ndata: {e.data}\n\n" for e in found)
        yield "".join(lines) or ": ping\n\n"
        if post_id and any(event.kind == "post.deleted" for event in found):
            return


class Hello(Body):
    type: Literal["auth"]
    token: str


class Words(CommentCreate):
    type: Literal["message"]


class Guest:
    """One person in the room of a post. What ends it is a refusal."""

    def __init__(self, socket: WebSocket, post_id: int) -> None:
        self.socket, self.post_id = socket, post_id

    async def read(self, kind: type[Body], seconds: float | None = None) -> Any:
        with suppress(KeyError, ValidationError), move_on_after(seconds):  # KeyError: no text
            return kind.model_validate_json(await self.socket.receive_text())
        raise Refusal("BAD_REQUEST")

    async def check(self) -> User:
        """May they be here, now?"""
        me = (await session_of(self.token)).user
        async with reading() as db:
            await find_post(db, self.post_id, me)
        return me

    async def enter(self) -> None:
        self.token = (await self.read(Hello, PATIENCE_SECONDS)).token
        self.places = {events: events.count, chat: chat.count}  # from here on nothing is missed
        self.me = Author.model_validate(await self.check()).model_dump()
        self.socket.state.user_id = self.me["id"]  # for the log
        await self.socket.send_json({"type": "ready", "user": self.me})

    async def speak(self) -> None:
        said = deque([-PATIENCE_SECONDS] * 20, maxlen=20)
        while True:
            words = await self.read(Words)
            if perf_counter() - said[0] < PATIENCE_SECONDS:
                raise Refusal("BAD_REQUEST")
            said.append(perf_counter())
            message = {"type": "message", "from": self.me, "text": words.text}
            await chat.tell("message", self.post_id, message)

    async def hear(self, hub: Hub) -> None:
        async for found in hub.follow(self.places[hub], self.post_id):
            for e in found:
                frame = f'{{"type":"{e.kind}","id":"{e.id}","data":{e.data}}}'
                await self.socket.send_text(e.data if hub is chat else frame)
            if any(e.kind == "post.deleted" for e in found):
                raise Refusal("NOT_FOUND")
            if not found and hub is events:
                await self.check()
        if not hub.closed:  # else uvicorn says goodbye
            raise Refusal("UNAVAILABLE")


@live.websocket("/ws/posts/{post_id}")
async def visit(socket: WebSocket, post_id: Id) -> None:
    origin, host = socket.headers.get("origin", ""), socket.headers.get("host")
    known = origin.partition("://")[2] == host or {origin, "*"} & set(settings.cors_origins)
    if origin and not known:
        return await socket.close()  # before it was accepted, so the answer is 403
    await socket.accept()
    guest = Guest(socket, post_id)
    try:
        await limit_client(socket.scope)
        async with events.seat(), asyncio.TaskGroup() as works:
            await guest.enter()
            works.create_task(guest.speak())
            works.create_task(guest.hear(events))
            works.create_task(guest.hear(chat))
    except* (Refusal, WebSocketDisconnect, RuntimeError, *DATABASE_ERRORS) as ended:
        code = CLOSE_CODES.get(getattr(ended.exceptions[0], "code", ""), 1013)
        with suppress(WebSocketDisconnect, RuntimeError):  # it was closed already
            await socket.close(code)


# --- Demo -----------------------------------------------------------------------------------------
# With DEMO=true there are people and posts from the start, and all of it ends with the service.

DEMO_PASSWORD = "correct-horse"  # noqa: S105
DEMO_PEOPLE = {"ann@example.com": "user", "ben@example.com": "user", "cleo@example.com": "admin"}
DEMO_HINT = "".join(f"{who:18}{DEMO_PASSWORD} ({role})\n" for who, role in DEMO_PEOPLE.items())
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


async def fill_demo(db: AsyncSession) -> None:
    """Three people, twelve posts with what was said below them, and last a draft."""
    hashed, people = await hash_password(DEMO_PASSWORD), {}
    for email, role in DEMO_PEOPLE.items():
        name = email.partition("@")[0].capitalize()
        person = {"email": email, "first_name": name, "role": role, "hashed_password": hashed}
        people[name] = User.model_validate(person)
    db.add_all(people.values())
    await db.flush()  # gives them ids
    lines = DEMO_POSTS.strip().splitlines()
    for number, line in enumerate(lines, 1):
        (name, title, content), *said = (part.split(": ") for part in line.split(" | "))
        when = now() - timedelta(hours=5 * (len(lines) - number))
        shown = {"title": title, "content": content, "is_published": number < len(lines)}
        known = {"author_id": people[name].id, "created_at": when, "updated_at": when}
        post = Post.model_validate(shown, update=known)
        db.add(post)
        await db.flush()
        for name, text in said:
            known = {"author_id": people[name].id, "post_id": post.id}
            db.add(Comment.model_validate({"text": text}, update=known))


# --- Pages ----------------------------------------------------------------------------------------
# For those who watch over the service, for those who write programs, and for a browser.

pages = APIRouter(tags=["pages"])


async def ask_database() -> None:
    async with AsyncSession(readers) as db:
        await db.exec(select(User.id).limit(1))


@pages.head("/health", include_in_schema=False)
@pages.get("/health")
async def health() -> dict[str, str]:
    """Does the database answer within a second, the wait for a connection included?"""
    # A statement that hangs cannot be cancelled: it is left behind, not waited for.
    await asyncio.wait_for(asyncio.shield(ask_database()), 1)
    return {"status": "healthy"}


async def swagger_ui() -> Response:
    """Its scripts come from a package, so that it works without a network; else from a CDN."""
    files: dict[str, Any] = {}
    if find_spec("fastapi_swagger"):
        files["swagger_js_url"] = "/docs/swagger-ui-bundle.js"
        files["swagger_css_url"] = "/docs/swagger-ui.css"
        files["swagger_favicon_url"] = "/docs/favicon-32x32.png"
    files["swagger_ui_parameters"] = {"persistAuthorization": True, "tryItOutEnabled": True}
    return get_swagger_ui_html(openapi_url="/openapi.json", title="Nutshell", **files)


# The page that a browser gets: all of it stands here. Its headers, below, allow nothing foreign.
PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Nutshell</title><link rel="icon" href="data:,">
<style nonce="NONCE">
  :root { color-scheme: light dark; --paper: light-dark(#f8f3ec, #191512);
    --card: light-dark(#fff, #26201b); --nut: light-dark(#85480f, #f0b566); --line: #8f8071 }
  * { box-sizing: border-box; margin: 0; font: inherit; overflow-wrap: anywhere }
  body { padding: 1em; background: var(--paper); font: clamp(16px, 1.1vw, 26px)/1.5 system-ui }
  header, form { display: flex; flex-wrap: wrap; gap: .6em; align-items: center }
  main, section { display: grid; gap: 1em; align-content: start; min-width: 0 }
  main { margin-top: 1em; grid: auto / repeat(auto-fit, minmax(min(100%, 21em), 1fr)) }
  section, input, textarea, button { padding: .6em .9em; border: 1px solid var(--line);
    border-radius: .5em; background: var(--card); color: inherit }
  button { background: var(--nut); color: var(--card) } label, input, textarea { width: 100% }
  h1, h2, a, b { font-weight: 600; color: var(--nut) } h1 { font-size: 2em }
  ul { padding-left: 1.2em } p, pre, li { white-space: pre-wrap; unicode-bidi: plaintext }
  pre { font: .8em/1.5 ui-monospace, monospace; max-height: 45vh; overflow: auto }
  pre b, pre b::selection { color: transparent; background: var(--line); vertical-align: bottom }
  pre b { display: inline-block; width: 4em; overflow: hidden; white-space: nowrap }  /* secrets */
  body:not(.in) .members, .in .guests, [hidden] { display: none }
</style>
<header><h1>Nutshell</h1> <a href="/docs">All calls</a> <span id="live" role="status"></span>
  <form id="leave" class="members">You are <b id="me"></b> <button>Sign out</button></form></header>
<pre class="guests">HINT</pre><p id="note" role="status"></p>
<main><section aria-label="Posts">
  <form id="sign" class="guests">
    <label>Email <input name="email" type="email" required autocomplete="email"></label>
    <label>Password <input name="password" type="password" required minlength="8"></label>
    <label>First name, if you are new <input name="first_name" maxlength="100"></label>
    <button>Sign in</button> <button value="new">Sign up</button></form>
  <form id="write" class="members">
    <label>Title <input name="title" required maxlength="255"></label>
    <label>Text <textarea name="content" required rows="3"></textarea></label>
    <button>Save as draft</button> <button value="publish">Publish</button></form>
  <ul id="posts"></ul>
</section><section id="one" hidden aria-labelledby="title">
  <h2 id="title" tabindex="-1"></h2><p id="by"></p><p id="content"></p>
  <form id="publish"><button>Publish this draft</button></form>
  <ul id="comments" aria-label="Comments"></ul>
  <form id="comment" class="members"><label>Your comment
    <input name="text" required maxlength="500"></label> <button>Send</button></form>
</section><section aria-labelledby="last"><h2 id="last">Your last call, and its answer</h2>
  <pre id="call" tabindex="0"></pre><pre id="answer" tabindex="0"></pre></section></main>
<script nonce="NONCE">
const SECRET = /((?<="password":)"(?:[^"\\]|\\.)*"|(?<=password=)[^&']*|eyJ[\w-]+\.[\w.-]+)/;
const $ = (id) => document.getElementById(id), quoted = (s) => `'${s.replaceAll("'", "'\\''")}'`;
const show = (texts) => { for (const id in texts) $(id).textContent = texts[id]; };
const tell = (error) => show({ note: error?.message });
let tokens, post, busy = false, again = false, loading = null;

function made(tag, ...inside) {  // append() makes text of what people wrote, never HTML
  const element = document.createElement(tag);
  element.append(...inside);
  return element;
}

function keep(found) {  // for this tab alone, so that two tabs can be two people
  sessionStorage.tokens = JSON.stringify(tokens = found);
  document.body.className = found ? "in" : "";
}

async function call(method, path, body, shown = method !== "GET", once = false) {
  const sent = body instanceof URLSearchParams ? body : JSON.stringify(body);  // a form, or JSON
  const url = `${location.origin}/api/v1${path}`, headers = {};
  if (tokens) headers.Authorization = `Bearer ${tokens.access_token}`;
  if (typeof sent === "string") headers["Content-Type"] = "application/json";
  const answer = await fetch(url, { method, headers, body: sent }), text = await answer.text();
  if (answer.status === 401 && tokens && !once) {  // expired: once more, with a new token or none
    const old = new URLSearchParams({ refresh_token: tokens.refresh_token });
    const ended = ({ cause }) => cause === 401 && keep(null);
    await call("POST", "/auth/refresh", old, false, true).then(keep, ended);
    return call(method, path, body, shown, true);
  }
  const found = text && JSON.parse(text), pretty = text && JSON.stringify(found, null, 2);
  let curl = `curl -X ${method} ${quoted(url)}`;
  for (const name in headers) curl += ` \\\n  -H ${quoted(`${name}: ${headers[name]}`)}`;
  if (body) curl += ` \\\n  -d ${quoted(`${sent}`)}`;
  const said = { call: curl, answer: `${answer.status} ${pretty}` };
  for (const id in shown ? said : {}) $(id).replaceChildren(  // at odd places stands what fits
    ...said[id].split(SECRET).map((part, at) => at % 2 ? made("b", part) : part));
  if (answer.ok) return found;
  const wrong = [found.detail].flat().map((e) => e.msg ? `${e.loc.at(-1)}: ${e.msg}` : e);
  throw Error(wrong.join("\n"), { cause: answer.status });
}

async function look() {
  const posts = (await call("GET", "/posts?size=100")).items;
  const me = tokens && await call("GET", "/users/me");
  const own = me ? (await call("GET", "/users/me/posts?size=100")).items : [];
  posts.unshift(...own.filter((one) => !one.is_published));
  const id = Number(location.hash.slice(1)) || post?.id || posts[0]?.id;  // who reads one keeps it
  const found = id && await call("GET", `/posts/${id}`, undefined, id !== post?.id).catch(tell);
  const below = (page) => call("GET", `/posts/${id}/comments?size=100&page=${page}`);
  const { items, pages } = found ? await below(1) : { items: [] };
  if (pages > 2) items.splice(0, 100, ...(await below(pages - 1)).items);
  if (pages > 1) items.push(...(await below(pages)).items);
  const focus = document.activeElement.hash;  // of a link, which is replaced
  $("posts").replaceChildren(...posts.map((one) => made("li",
    Object.assign(made("a", one.title), { href: `#${one.id}` }),
    one.is_published ? ` by ${one.author.full_name}` : ", a draft")));
  $("comments").replaceChildren(
    ...items.map(({ author, text }) => made("li", made("b", author.full_name), ` ${text}`)));
  if (focus) document.querySelector(`a[href="${focus}"]`)?.focus();
  const by = found && `${found.author.full_name}, ${new Date(found.created_at).toLocaleString()}`;
  show({ me: me?.full_name, title: found?.title, by, content: found?.content });
  $("one").hidden = !found;
  $("publish").hidden = found?.is_published;
  if (found?.id !== post?.id) $("comment").reset();  // it was for another post
  post = found;
}

function load() {  // an event only says that something has changed: then all is read anew
  again = true;
  loading ??= (async () => {
    while (again) {  // at once, and while more comes once a second
      again = false;
      await look().catch((error) => show({ live: error.message }));
      if (again) await new Promise((done) => setTimeout(done, 1000));
    }
    loading = null;
  })();
  return loading;
}

const actions = {
  async sign({ email, password, first_name }, isNew) {
    if (isNew) await call("POST", "/auth/register", { email, password, first_name });
    keep(await call("POST", "/auth/login", new URLSearchParams({ username: email, password })));
  },
  async write(fields, publish) {
    post = await call("POST", "/posts", { ...fields, is_published: !!publish });
    location.hash = post.id;
  },
  publish: () => call("POST", `/posts/${post.id}/publish`),
  comment: (fields) => call("POST", `/posts/${post.id}/comments`, fields),
  leave: () => call("POST", "/auth/logout").finally(() => keep(null)),
};
document.onsubmit = async (event) => {
  event.preventDefault();
  if (busy) return;
  busy = true;
  const { target, submitter } = event, fields = Object.fromEntries(new FormData(target));
  await actions[target.id](fields, submitter.value).then(() => target.reset()).then(tell, tell);
  busy = false;
  await load();
  if (!target.checkVisibility()) $("title").focus();  // the form has gone, and the focus with it
};
window.onhashchange = () => load().then(() => $("title").focus());

function listen() {
  const stream = new EventSource("/api/v1/events");
  const hear = ({ type }) => { show({ live: `Events: ${type}` }); load(); };
  for (const type of ["open", "post.published", "post.updated", "post.deleted", "comment.created",
    "comment.deleted"]) stream.addEventListener(type, hear);
  stream.onerror = () => {
    show({ live: "Events: reconnecting" });
    if (stream.readyState === stream.CLOSED) setTimeout(listen, 3000);  // the browser gave up
  };
}
keep(JSON.parse(sessionStorage.tokens ?? null));
load();
listen();
</script>
"""
NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
OURS = "connect-src 'self'; img-src data:; require-trusted-types-for 'script'; "
AS_PAGE: Any = {200: {"content": {"text/html": {}}}} | errors(429)  # for /docs


@pages.head("/", include_in_schema=False)
@pages.get("/", response_model=dict[str, str], responses=AS_PAGE)
async def root(request: Request) -> Response:
    """For programs a sign of life, for browsers a page to try it all on."""
    headers = {"Vary": "Accept"}
    if settings.production or "text/html" not in request.headers.get("accept", "").lower():
        return JSONResponse({"status": "ok"}, headers=headers)
    nonce = secrets.token_urlsafe(16)  # only a script or style that carries it is run
    policy = f"{NOTHING_ELSE}{OURS}script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
    page = PAGE.replace("HINT", DEMO_HINT if settings.demo else "").replace("NONCE", nonce)
    return HTMLResponse(page, headers=headers | {"Content-Security-Policy": policy})


# --- Front door -----------------------------------------------------------------------------------
# What every request passes, in this order, before the cache: plain ASGI, a small class each.

MAX_BODY_BYTES = 1024 * 1024
MAX_FRAMES = 200  # of a WebSocket, in one piece
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
TAKEN_HEADERS = ["Authorization", "Content-Type", "If-None-Match", "Last-Event-ID", "X-Request-ID"]
EXPOSED_HEADERS = ["ETag", "Location", "Retry-After", "RateLimit", "RateLimit-Policy"]
EXPOSED_HEADERS += ["X-Request-ID", "X-Process-Time", "X-Cache"]


async def send_in_time(message: Message, send: Send, receive: Any) -> None:
    """A client that does not read is cut off. ASGI cannot say it: uvicorn's transport can."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await send(message)
    except TimeoutError:
        receive.__self__.transport.abort()


class Frames(WebSocketsSansIOProtocol):
    """uvicorn reads any number of frames at once, so a flood of small ones would hold up everyone;
    and to those who answer no ping it says goodbye, which waits for what they do not read."""

    def data_received(self, data: bytes) -> None:
        self.seen = 0
        for start in range(0, len(data), 1_024):
            if not self.transport.is_closing():
                super().data_received(data[start : start + 1_024])

    def handle_events(self) -> None:
        self.seen += len(self.conn.events)
        super().handle_events()
        if self.seen > MAX_FRAMES and not self.transport.is_closing():
            self.conn.fail(1008)
            self.handle_parser_exception()  # sends that, and hangs up

    def keepalive_timeout(self) -> None:
        self.transport.abort()

    def send_keepalive_ping(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        super().send_keepalive_ping()


class FrontDoor:
    """Names, times and logs every answer. CORS, which is slow, is only for those with an Origin."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.cors = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_credentials="*" not in settings.cors_origins,
            allow_methods=["*"],
            allow_headers=TAKEN_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        started, asked = perf_counter(), dict(scope["headers"])
        name = asked.get(b"x-request-id", b"").decode("latin-1")
        request_id = name if REQUEST_ID.fullmatch(name) else secrets.token_hex(8)
        told = {b"x-content-type-options": b"nosniff", b"x-request-id": request_id.encode()}
        state = {"request_id": request_id, "asked": asked, "told": told}
        state["path"] = scope["path"].removeprefix(scope.get("root_path", ""))
        state["client"] = (scope.get("client") or ("",))[0]
        scope.setdefault("state", {}).update(state)
        status = 403  # of a socket that is not accepted

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told[b"x-process-time"] = b"%.4f" % (perf_counter() - started)
                message["headers"] = [*message["headers"], *told.items()]
            elif message["type"] == "websocket.accept":
                status = 101
            waits = "more_body" in message or scope["type"] == "websocket"
            await (send_in_time(message, send, receive) if waits else send(message))

        try:
            await (self.cors if b"origin" in asked else self.app)(scope, receive, send_named)
        finally:
            if log.isEnabledFor(logging.INFO):
                log_request(scope, status, perf_counter() - started)


class Guard:
    """Refuses those who ask too often, and bodies over 1 MiB; answers for what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        left = MAX_BODY_BYTES

        async def receive_some() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise Refusal("BODY_TOO_LARGE")
            return message

        try:
            await limit_client(scope)
            if int(scope["state"]["asked"].get(b"content-length", 0)) > MAX_BODY_BYTES:
                raise Refusal("BODY_TOO_LARGE")
            await self.app(scope, receive_some, send)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):  # a stop has waited for it long enough
                error = Refusal("UNAVAILABLE")
            elif not isinstance(error, Refusal):
                log.exception("nobody caught this")
                error = Refusal("INTERNAL_ERROR")
            answer = await on_refusal(Request(scope), error)
            await answer(scope, receive, send)  # after half an answer the server hangs up instead


# --- Assembly -------------------------------------------------------------------------------------
# The parts put together.


def make_tables(connection: Connection) -> None:
    """New tables for a new database. What an old one lacks fails here, and all is undone."""
    SQLModel.metadata.create_all(connection)
    for table in SQLModel.metadata.sorted_tables:
        connection.execute(table.select().limit(0))  # names the first column that is not there


async def prepare_database() -> None:
    """In one transaction, which processes that start together enter one after the other."""
    email, password = settings.first_superuser_email, settings.first_superuser_password
    hashed = await hash_password(password) if password else ""
    async with AsyncSession(writer) as db:
        if settings.sqlite_file is None:
            await db.exec(select(func.pg_advisory_xact_lock(7361)))
        await (await db.connection()).run_sync(make_tables)
        if settings.demo:
            await fill_demo(db)
        await db.exec(delete(LoginSession).where(col(LoginSession.expires_at) < now()))
        user = (await db.exec(select(User).where(User.email == email))).first()
        if email and (user is None or not user.is_superuser):
            user = user or User(email=email, hashed_password=hashed)
            user.role, user.is_active, user.hashed_password = "admin", True, hashed
            await db.exec(delete(LoginSession).where(col(LoginSession.user_id) == user.id))
            db.add(user)
        await db.commit()


def banner(address: str, admins: str) -> str:
    """What somebody at a terminal wants to know first."""
    url, file = make_url(settings.database_url), settings.sqlite_file
    lines = {
        "Nutshell": address,
        "docs": f"{address}/docs",
        "health": f"{address}/health",
        "data": os.path.abspath(file) if file else f"{url.host}, database {url.database}",
        "admin": admins or "none yet: set FIRST_SUPERUSER_EMAIL and FIRST_SUPERUSER_PASSWORD",
        "sign in": DEMO_HINT.rstrip().replace("\n", f"\n{'':10}") if settings.demo else "",
        "try": f"curl {address}{API}/posts",
    }
    return "\n".join(f"{name:10}{line}" for name, line in lines.items() if line)


def end_streams(usual: Any, number: int, frame: Any) -> None:
    """uvicorn waits for open streams before it tells the lifespan: the signal itself ends them."""
    events.close()
    chat.close()
    usual(number, frame)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    set_up_logging()
    try:
        await prepare_database()
        signing_key()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        log.critical("DATABASE_URL: the database or the key beside it cannot be used: %s", reason)
        os._exit(3)  # raising would print a traceback after this line
    for number in uvicorn.server.HANDLED_SIGNALS:
        usual = signal.getsignal(number)
        if callable(usual) and threading.current_thread() is threading.main_thread():
            signal.signal(number, partial(end_streams, usual))
    if address := getattr(app.state, "address", None):
        admins = select(User.email).where(User.role == "admin", User.is_active)
        async with reading() as db:
            emails = await db.exec(admins.order_by(col(User.id)).limit(3))
        with suppress(OSError):  # nobody reads it
            print(banner(address, ", ".join(emails)), flush=True)
    async with in_touch() if settings.redis_url else nullcontext():
        with log_writer.in_thread():
            yield
    with move_on_after(1):  # for the mails under way to leave
        for mail in mails_under_way():
            await to_thread.run_sync(mail.join, 1.0, abandon_on_cancel=True)
    await readers.dispose()
    await writer.dispose()
    if settings.demo and settings.sqlite_file:
        rmtree(Path(settings.sqlite_file).parent, ignore_errors=True)


app = FastAPI(
    title="Nutshell", summary="A complete API service in one file", lifespan=lifespan,
    docs_url=None, openapi_url=None if settings.production else "/openapi.json",
    redirect_slashes=False, generate_unique_id_function=lambda route: route.name,
    responses=errors(400, 413, 500, 503),
    telemetry={"tracing": False, "metrics": False, "logs": False},  # asking for them costs a lot
    middleware=[Middleware(FrontDoor), Middleware(Guard), Middleware(AnswerCache)],
    exception_handlers={
        HTTPException: on_refusal, RequestValidationError: on_invalid_input,
        **dict.fromkeys(DATABASE_ERRORS, on_database_error),
    },
)  # fmt: skip
for router in (auth, users, posts, comments, live, pages):
    app.include_router(router)
if not settings.production:
    app.add_api_route("/docs", swagger_ui, include_in_schema=False)
    if find_spec("fastapi_swagger"):
        app.mount("/docs", StaticFiles(packages=[("fastapi_swagger", "resources")]))


async def rehearse() -> None:
    """With several workers uvicorn itself would end with status 0 when none of them can start."""
    async with lifespan(app):
        log.info("The database is ready for %d workers", settings.workers)


if __name__ == "__main__":
    set_up_logging()
    if not settings.production:
        unspecified = getattr(settings.host, "is_unspecified", False)
        host = "localhost" if unspecified else str(settings.host)
        app.state.address = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    if settings.workers > 1 and settings.redis_url is None:
        log.warning("Without REDIS_URL limits, events and rooms are those of each process")
    if settings.workers > 1:
        asyncio.run(rehearse())
    proxies = [str(network) for network in settings.forwarded_allow_ips]
    uvicorn.run(
        "__main__:app", host=str(settings.host), port=settings.port, workers=settings.workers,
        timeout_keep_alive=75,  # longer than nginx keeps a connection, or it meets a closed one
        timeout_worker_healthcheck=30,  # a worker that is slow to start is not to be killed for it
        proxy_headers=bool(proxies), forwarded_allow_ips=proxies, server_header=False,
        log_config=None, access_log=False, timeout_graceful_shutdown=4,
        ws=Frames, ws_max_size=64 * 1024, ws_per_message_deflate=False,
        ws_ping_interval=PATIENCE_SECONDS / 2, ws_ping_timeout=PATIENCE_SECONDS / 2,
    )  # fmt: skip
