# /// script
# requires-python = ">=3.10"
# dependencies = ["mysql-connector-python>=9.2"]
# ///
"""idpot issues serial 64-bit unsigned IDs over HTTP, from MySQL, MariaDB or an SQLite file.

    python3 idpot.py                        # SQLite in ./idpot.db, http://127.0.0.1:8080
    python3 idpot.py --config=idpot.cfg     # MySQL or MariaDB, as the file says

A pot is a named counter. POST /pot/create with the fields name and min creates one. POST /id/NAME
takes the next ID, or several with count=N or range=N. GET /id/NAME returns the last ID that was
issued. README.rst describes the whole API.

The promise: an ID that was returned to a client is never returned again from that pot, by any
process, after any crash that the storage engine survives; and each ID is greater than all IDs whose
responses ended before its request began. The database has committed an ID before the response
leaves, and idpot prefetches nothing.
"""

import argparse
import bisect
import collections
import configparser
import enum
import functools
import hmac
import http.client
import http.server
import importlib
import logging
import logging.handlers
import math
import os
import queue
import re
import resource
import select
import shlex
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from time import monotonic
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol, TypeVar, get_type_hints
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

__version__ = "3.1.0"

MAX_ID = 2**64 - 1
MAX_COUNT = 10000
MAX_RANGE = 2**32
POT_NAME = re.compile("[A-Za-z0-9_-]{1,60}")    # the table is pot_ + name; MySQL allows 64

log = logging.getLogger("idpot")
access_log = logging.getLogger("idpot.access")      # it writes to `log` if it has no handler


# ---------------------------------------------------------------------------------------- overview
#
# Each section uses only what stands above it. Errors, settings, metrics and logs come first, then
# the stores (pots in SQLite or MySQL), the allocator (which turns requests into database calls),
# HTTP (parsing, routes, connections), the client, and the command line.
#
# Threads. Each worker (eight with MySQL, one with SQLite) owns a store, and so a connection to the
# database. One worker at a time leads: it reads requests from all clients, has its store take the
# IDs for them in one call, and sends the responses. The main thread enforces deadlines and looks
# after the workers. A thread for each log writes what the others have logged.
#
# The path of a request: Server.handle_events() -> Connection.read_request() -> dispatch() -> a Job
# in Scheduler -> Allocator._take() -> Store.take() -> Job.complete() -> Connection.send_response().


# ------------------------------------------------------------------------------------------ errors

class IdpotError(Exception):
    """An error that becomes a response, or one line on stderr if it prevents startup.

    str() of it is the text that the client gets. `detail` is the text for the log and for stderr,
    which may say more than a client should learn.
    """
    status = 500        # of the response
    header = ""         # a header line that belongs to the status, with its CRLF
    exit_code = 1       # of the process, if the error prevents startup

    def __init__(self, text: str, detail: str = "") -> None:
        super().__init__(text)
        self.detail = detail or text


class HttpError(IdpotError):
    """A request that HTTP forbids or that idpot does not support, with the status that says so."""

    def __init__(self, status: int, text: str, header: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.header = header


class BadRequest(IdpotError):
    """The request, or a value in it, is malformed."""
    status = 400


class Unauthorized(IdpotError):
    """The bearer token is missing or wrong (RFC 6750)."""
    status = 401
    header = "WWW-Authenticate: Bearer\r\n"


class Forbidden(IdpotError):
    """The request comes from a web page and lacks the bearer token."""
    status = 403


class NotFound(IdpotError):
    """There is no such pot, or no such path."""
    status = 404


class Exists(IdpotError):
    """The pot that was to be created exists."""
    status = 409


class Exhausted(IdpotError):
    """The pot has fewer IDs left than the request asked for."""
    status = 409


class Unavailable(IdpotError):
    """The database cannot issue an ID now. With Retry-After the same request may succeed later."""
    status = 503
    header = "Retry-After: 1\r\n"


class Transient(Unavailable):
    """A database call failed for a reason that may pass.

    Inside idpot it is tried again until the request times out; then the client gets a 503.
    """


class PotUnusable(Unavailable):
    """The pot issues no ID until an operator repairs it: its table has several rows, say."""
    header = ""


class DatabaseUnusable(Unavailable):
    """No pot issues an ID until an operator repairs the database: the account lacks rights, say."""
    header = ""


class ProbeFailed(IdpotError):
    """A health check failed. Unlike Unavailable it is not logged, only reported in the response."""
    status = 503
    header = Unavailable.header


class WentBack(IdpotError):
    """Raised by Client: the server issued an ID that is not greater than an earlier one."""


class SettingsError(IdpotError, argparse.ArgumentTypeError):
    """A setting is wrong, so a restart cannot help. argparse turns it into a usage error."""
    exit_code = 78      # EX_CONFIG of sysexits.h


# ---------------------------------------------------------------------------------------- settings
#
# A settings file has the format of gcfg, which go-idpot used: [section] and name = value, where a
# value stands bare or in double quotes. configparser reads the lines, a regular expression checks
# and unquotes each value, and the converter of the setting turns the string into its value. Each
# converter raises SettingsError or BadRequest with a message that names the value. The
# settings are loaded before any other thread is started, and do not change while idpot serves.

T = TypeVar("T")


def quoted(value: str | bytes) -> str:
    """Return the value in double quotes for a message, escaped and cut to 100 characters."""
    text = ascii(value[:100]).removeprefix("b")[1:-1].replace('"', r'\"')
    if len(value) > 100:
        text += "..."
    return f'"{text}"'


def parse_integer(text: str, minimum: int, maximum: int, name: str = "") -> int:
    """Return the integer that a string of decimal digits stands for.

    Raises BadRequest, with the name of the value if there is one, unless it is in the range. The
    largest number in idpot, 2**64 - 1, has 20 digits.
    """
    if re.fullmatch("[0-9]{1,20}", text) and minimum <= int(text) <= maximum:
        return int(text)
    what = f"{name} {quoted(text)}".strip()
    raise BadRequest(f"{what} is not a whole number from {minimum} to {maximum}")


class Address(NamedTuple):
    """A TCP address to listen on or to connect to. The host "" means all addresses."""
    host: str
    port: int


HOST_AND_PORT = re.compile(r"(?:\[(?P<ipv6>[^]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[0-9]{1,5}))?")


def parse_address(text: str, default_port: int | None = None) -> Address:
    """Return the address of a string such as host:port, [IPv6]:port or :port."""
    match = HOST_AND_PORT.fullmatch(text)
    port = default_port
    if match and match["port"]:
        port = int(match["port"])
    if not text or not match or port is None or port > 65535:
        raise SettingsError(f"{quoted(text)} is not host:port, such as 127.0.0.1:8080 or :8080")
    return Address(match["ipv6"] or match["host"] or "", port)


def parse_seconds(text: str) -> float:
    """Return a number of seconds, with or without a fraction."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?|\.[0-9]+", text) and 0 < float(text) <= 86400:
        return float(text)
    raise SettingsError(f"{quoted(text)} is not a number of seconds above 0, at most 86400")


def parse_token(text: str) -> str:
    """Return a bearer token.

    An empty one is an error, because without a token the server is open to everybody. So is white
    space at either end, which no header field can carry, and a single quote at either end, which
    would be a part of the token: only double quotes quote in this format.
    """
    if not text or re.search(r"^[\s']|[\s']\Z", text):
        raise SettingsError("it is empty, or begins or ends with a space or a single quote: put "
                            "the token into double quotes")
    return text


class ServerAddress(NamedTuple):
    """One database server of a DSN."""
    name: str                           # for messages: host:port, or the path of a Unix socket
    arguments: dict[str, str | int]     # the arguments of mysql.connector.connect for it


class Dsn(NamedTuple):
    """What [Mysql] says about the database servers and the account."""
    user: str
    password: str
    database: str
    addresses: list[ServerAddress]      # in the order in which they are tried
    tls: str = "preferred"              # or true, false, skip-verify
    ignored: str = ""                   # names of parameters that idpot does not know


# The password is greedy: it ends at the last "@" after which the rest of the pattern matches. So it
# may contain any of "@:/()?&".
DSN_PATTERN = re.compile(
    r"(?:(?P<user>[^:]*)(?::(?P<password>.*))?@)?"
    r"(?P<net>tcp[46]?|unix)?(?:\((?P<inside>.*)\))?"
    r"/(?P<database>[^/?]+)(?:\?(?P<parameters>[^/]*))?", re.DOTALL)


def tcp_server(host: str, port: int) -> ServerAddress:
    return ServerAddress(f"{host}:{port}", {"host": host or "127.0.0.1", "port": port})


def parse_dsn(text: str) -> Dsn:
    """Return the parts of a DSN of go-sql-driver/mysql.

    No error message contains a part of the password: they quote only what stands within the
    parentheses, or the value of tls, and both are behind the password.
    """
    match = DSN_PATTERN.fullmatch(text)
    if not match:
        raise SettingsError("it is not of the form user:password@tcp(host:port)/dbname, or with "
                            "unix(/path) for tcp(...); with a ; or # in it, it needs double quotes")
    parts = match.groupdict("")
    if parts["net"] == "unix":
        path = parts["inside"] or "/tmp/mysql.sock"
        addresses = [ServerAddress(path, {"unix_socket": path})]
    else:
        hosts = (parts["inside"] or "127.0.0.1").split(",")
        servers = [tcp_server(*parse_address(host.strip(), 3306)) for host in hosts]
        addresses = list({server.name: server for server in servers}.values())      # each once
    parameters = dict(parse_qsl(parts["parameters"], keep_blank_values=True))
    tls = parameters.pop("tls", "preferred").lower()
    tls = {"1": "true", "0": "false"}.get(tls, tls)
    if tls not in ("true", "false", "skip-verify", "preferred"):
        raise SettingsError(f"tls={quoted(tls)} is not true, false, skip-verify or preferred")
    return Dsn(parts["user"], parts["password"], unquote(parts["database"]), addresses, tls,
               ignored=", ".join(parameters))


def integer_between(minimum: int, maximum: int) -> Callable[[str], int]:
    return functools.partial(parse_integer, minimum=minimum, maximum=maximum)


DEFAULT_LISTEN = Address("127.0.0.1", 8080)


class Settings:
    """The settings, with their defaults. Each annotation lists type, section and converter.

    SETTINGS, below, is made of these annotations. In the file a name has no underscores and may be
    in any letter case. No name occurs in two sections, so a name alone identifies a setting. If
    admin_token is not set, load_settings() sets it to token.
    """
    listen: Annotated[Address, "Server", parse_address] = DEFAULT_LISTEN
    log_file: Annotated[str, "Server", str] = ""            # a strftime pattern; "" means stderr
    log_link_name: Annotated[str, "Server", str] = ""       # a symlink to the newest log file
    token: Annotated[str, "Server", parse_token] = ""       # needed for all but /healthz
    admin_token: Annotated[str, "Server", parse_token] = ""         # for create and raise, or token
    timeout: Annotated[float, "Server", parse_seconds] = 10.0       # for the database, then 503
    request_timeout: Annotated[float, "Server", parse_seconds] = 10.0   # to arrive, then 408
    idle_timeout: Annotated[float, "Server", parse_seconds] = 60.0      # between requests
    max_connections: Annotated[int, "Server", integer_between(1, 1000000)] = 1024   # of clients

    connect_string: Annotated[Dsn | None, "Mysql", parse_dsn] = None
    hostname: Annotated[str, "Mysql", str] = "127.0.0.1"
    port: Annotated[int, "Mysql", integer_between(1, 65535)] = 3306
    username: Annotated[str, "Mysql", str] = "root"
    password: Annotated[str, "Mysql", str] = ""
    dbname: Annotated[str, "Mysql", str] = "idpot"
    engine: Annotated[str, "Mysql", str] = "MyISAM"         # go-idpot's default
    connections: Annotated[int, "Mysql", integer_between(1, 64)] = 8    # to the database

    file: Annotated[str, "Sqlite", str] = "idpot.db"

    uses_mysql: bool = False    # whether the file has a section [Mysql]; no setting itself

    @property
    def dsn(self) -> Dsn:
        """ConnectString or, without it, the DSN of Hostname, Port, Username, Password, Dbname."""
        server = tcp_server(self.hostname, self.port)
        return self.connect_string or Dsn(self.username, self.password, self.dbname, [server])


class Setting(NamedTuple):
    """How a name in the file becomes a field of Settings."""
    field: str
    section: str
    converter: Callable[[str], object]


SETTINGS = {    # by the name in the file, in lower case
    field.replace("_", ""): Setting(field, *hint.__metadata__)
    for field, hint in get_type_hints(Settings, include_extras=True).items()
    if hasattr(hint, "__metadata__")}
SECTIONS = {setting.section for setting in SETTINGS.values()}
SECTION_PATTERN = re.compile(r"\[\s*(?P<header>[^]\s][^]]*?)\s*\]\s*(?:[;#].*)?$")
VALUE_PATTERN = re.compile(r'''((?:"(?:[^"\\\0]|\\["\\nt])*"|[^"\\\0;#])*)(?:[;#].*)?''')
UNESCAPED = {'"': "", r"\"": '"', r"\\": "\\", r"\n": "\n", r"\t": "\t"}


def read_settings(
    path: str, shown_path: str
) -> tuple[configparser.RawConfigParser, dict[str, tuple[int, str]]]:
    """Return the sections of a settings file, and the places of the names in it.

    The places map each name in lower case to the number of its line and to its spelling there.
    """
    reader = configparser.RawConfigParser(
        delimiters="=", comment_prefixes=(";", "#"), default_section="")
    reader.SECTCRE = SECTION_PATTERN
    try:
        with open(path, encoding="utf-8-sig") as file:
            # To configparser an indented line would continue the value above it.
            lines = [line.strip() for line in file]
        # Section names may be in any letter case: [MYSQL] becomes [Mysql]. A comment on the same
        # line is changed, too, which does not matter.
        reader.read_file([line.title() if line.startswith("[") else line for line in lines], path)
    except OSError as error:
        raise SettingsError(f"{shown_path or quoted(path)}: {error.strerror}")
    except UnicodeDecodeError:
        raise SettingsError(f"{shown_path}: the file is not in UTF-8")
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        raise SettingsError(f"{shown_path}:{error.lineno}: the file has this section or name twice")
    except configparser.ParsingError as error:      # its own text could contain a password
        line = getattr(error, "lineno", 0) or error.errors[0][0]
        raise SettingsError(f"{shown_path}:{line}: this line is neither [section] nor name = value")
    names = [line.partition("=")[0].strip() for line in lines]
    return reader, {name.lower(): (number, name) for number, name in enumerate(names, 1)}


def unquote_value(text: str) -> str:
    """Return the value of the text after the "=" of a line, without quotes and comment."""
    match = VALUE_PATTERN.fullmatch(text)
    if not match:
        raise SettingsError('a double quote is not closed, or a backslash is not part of \\" \\\\ '
                            '\\n or \\t within double quotes')
    # VALUE_PATTERN admits no other escapes than those in UNESCAPED. A quote by itself is removed.
    return re.sub(r'\\.|"', lambda part: UNESCAPED[part[0]], match[1].strip())


def load_settings(path: str | None = None) -> Settings:
    """Return the settings of the file, or the defaults if the path is None.

    An empty value means the default, except for a token: see parse_token(). Raises SettingsError
    with the file, the line and the name of what is wrong.
    """
    real_path = os.devnull if path is None else path
    # systemd passes a copy of /etc/idpot.cfg in this folder. Messages name the original.
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    path = real_path.replace(credentials, "/etc") if credentials else real_path
    reader, places = read_settings(real_path, path)
    settings = Settings()
    settings.uses_mysql = "Mysql" in reader
    for section in reader.sections():
        if section not in SECTIONS:
            raise SettingsError(f"{path}: unknown section [{section}]")
        for name, text in reader.items(section):
            line, spelling = places[name]
            setting = SETTINGS.get(name)
            if not setting or setting.section != section:
                # A name with other characters than these may be a part of a password.
                shown = quoted(spelling) if re.fullmatch("[a-z_-]+", name) else "(not shown)"
                raise SettingsError(f"{path}:{line}: unknown name {shown} in [{section}]")
            try:
                value = unquote_value(text)
                if value or setting.converter is parse_token:
                    setattr(settings, setting.field, setting.converter(value))
            except IdpotError as error:
                raise SettingsError(f"{path}:{line}: [{section}] {spelling}: {error}")
    if settings.uses_mysql and "Sqlite" in reader:
        raise SettingsError(f"{path}: [Mysql] and [Sqlite] are both given: keep one")
    settings.admin_token = settings.admin_token or settings.token
    return settings


# ----------------------------------------------------------------------------------------- metrics
#
# The counters that GET /metrics exports, in the text format of Prometheus. A series is a name with
# its labels, written as the format has it. Any thread may count.

# Name -> (type, help text). No name may be the beginning of another one, since Metrics.render()
# finds the series of a metric by their common beginning.
METRICS = {
    "idpot_http_requests_total": ("counter", "Requests that were responded to."),
    "idpot_http_request_duration_seconds": (
        "histogram", "Time from the arrival of a request to its response."),
    "idpot_http_requests_in_flight": (
        "gauge", "Requests that are being read, served or responded to."),
    "idpot_connections": ("gauge", "Open HTTP connections."),
    "idpot_ids_issued_total": ("counter", "IDs that were taken from pots."),
    "idpot_db_statements_total": (
        "counter", "Statements that took IDs. One serves all requests that wait for a pot."),
    "idpot_db_seconds_total": (
        "counter", "Time spent in the database, summed over all connections."),
    "idpot_db_errors_total": ("counter", "Errors of the database."),
    "idpot_db_retries_total": (
        "counter", "Failed attempts that are repeated, one for each request that waits."),
    "idpot_db_connections": ("gauge", "Open connections to the database."),
    "idpot_log_lines_lost_total": ("counter", "Lines of the logs that were lost."),
    "idpot_build_info": ("gauge", "The version that runs."),
    "process_cpu_seconds_total": ("counter", "Processor time."),
    "process_resident_memory_bytes": ("gauge", "Resident memory."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_start_time_seconds": ("gauge", "Start of the process since the epoch."),
}
DURATION = "idpot_http_request_duration_seconds"
BUCKETS = {f'{DURATION}_bucket{{le="{limit}"}}': float(limit) for limit in (
    "0.0005", "0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1",
    "2.5", "5", "10", "+Inf")}
EXPORTED_AS_ZERO = (        # series that are exported before anything was counted
    "idpot_ids_issued_total", "idpot_db_statements_total", "idpot_db_seconds_total",
    "idpot_db_retries_total", "idpot_log_lines_lost_total")


class Metrics:
    """The counters since the start of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()       # guards the counters; no other lock is taken under it
        self._counters: dict[str, float] = collections.defaultdict(     # by series
            int, dict.fromkeys(EXPORTED_AS_ZERO, 0))
        self._started_at = time.time()
        self.add_responses([], [])          # the histogram begins with zeros

    def add(self, series: str, amount: float = 1) -> None:
        """Add the amount to the counter of a series."""
        with self._lock:
            self._counters[series] += amount

    def add_responses(self, label_sets: Iterable[str], durations: Iterable[float]) -> None:
        """Count responses, given the set of labels and the duration in seconds of each."""
        ordered = sorted(durations)     # a bucket counts all that are not greater than its limit
        added: dict[str, float] = {
            series: bisect.bisect_right(ordered, limit) for series, limit in BUCKETS.items()}
        added[f"{DURATION}_sum"] = sum(ordered)
        added[f"{DURATION}_count"] = len(ordered)
        for label_set, number in collections.Counter(label_sets).items():
            added[f"idpot_http_requests_total{{{label_set}}}"] = number
        with self._lock:
            for series, amount in added.items():
                self._counters[series] += amount

    def render(self, gauges: Mapping[str, float]) -> str:
        """Return all metrics in the text format of Prometheus, version 0.0.4.

        `gauges` are further series, of which the caller knows the present values.
        """
        with self._lock:
            series = {**self._counters, **gauges}
        series[f'idpot_build_info{{version="{__version__}",python="{sys.version.split()[0]}"}}'] = 1
        with suppress(OSError):      # /proc is hidden, or no descriptor is left
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            series["process_open_fds"] = len(os.listdir("/proc/self/fd"))
            series["process_resident_memory_bytes"] = pages * resource.getpagesize()
            series["process_cpu_seconds_total"] = time.process_time()
            series["process_start_time_seconds"] = self._started_at
        lines = []
        for name, (kind, text) in METRICS.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{key} {value}" for key, value in series.items() if key.startswith(name)]
        return "\n".join(lines) + "\n"


metrics = Metrics()


# -------------------------------------------------------------------------------------------- logs
#
# There are two loggers of the standard library: `log` for events, which go to stderr, and
# `access_log`, whose lines go to LogFile, or to stderr as well if that is not set. Each log has a
# queue and a thread that writes what the queue holds. So neither requests nor a shutdown wait for a
# full pipe or a disk that hangs. A record of the access log holds the lines of many responses.

class Incidents:
    """The faults that last, each under its subject: a database, a pot, or the access log.

    Whoever meets a fault calls open() each time. The first call logs the fault, and resolve() logs
    the recovery. After a fault of a subject was logged, further ones are logged only if they are
    still there when QUIET_INTERVAL is over. So faults that come and go, such as conflicts in a
    cluster, do not flood the log.
    """
    QUIET_INTERVAL = 30.0       # seconds

    def __init__(self) -> None:
        self._lock = threading.Lock()       # makes open() atomic
        self._open: dict[str, bool] = {}            # the subjects; all values are True
        self._quiet_until: dict[str, float] = {}    # subject -> point in time; never removed

    def open(self, subject: str, text: str, level: int = logging.WARNING) -> None:
        """Log the text, unless the incident is open or was logged within QUIET_INTERVAL.

        The line begins with the subject, which is prepended if the text does not begin with it.
        """
        with self._lock:
            now = monotonic()
            if subject in self._open or now < self._quiet_until.get(subject, now):
                return
            self._open[subject] = True
            self._quiet_until[subject] = now + self.QUIET_INTERVAL
        if not text.startswith(subject):
            text = f"{subject}: {text}"
        log.log(level, text)

    def resolve(self, subject: str) -> None:
        """Log that the subject has recovered, if an incident is open.

        This runs after every database call, so it takes no lock: dict.pop() is atomic. In a
        close race the two lines may be logged in the wrong order.
        """
        if self._open.pop(subject, False):
            log.info("%s has recovered", subject)


incidents = Incidents()


class StrftimeFileHandler(logging.Handler):
    """Appends to the file that a strftime pattern names now, and keeps a symlink to the newest one.

    The file is opened for each record. If it was moved or deleted, it is created anew, so that
    logrotate needs no signal.
    """

    def __init__(self, pattern: str, link: str) -> None:
        """Raises OSError if the file or the link cannot be written."""
        super().__init__()
        self.pattern = pattern
        self.link = link
        self.append("")

    def append(self, text: str) -> None:
        """Append the text; raise OSError and count its lines as lost if that fails."""
        path = time.strftime(self.pattern)
        # With O_NONBLOCK the opening of a FIFO that has no reader is an error, and not a wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags, 0o640)
            os.set_blocking(descriptor, True)       # a FIFO that is read slowly loses nothing
            with open(descriptor, "a", encoding="ascii", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            metrics.add("idpot_log_lines_lost_total", text.count("\n"))
            raise
        if self.link:
            self.update_link(path)

    def update_link(self, path: str) -> None:
        """Make the link point to the file. It is replaced atomically, so it is never missing."""
        target = os.path.realpath(path)
        if os.path.exists(self.link) and not os.path.islink(self.link):
            raise FileExistsError(f"{self.link} exists and is not a symlink")
        if os.path.realpath(self.link) == target:
            return
        new_link = f"{self.link}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(new_link)     # a crash may have left it
        folder = os.path.realpath(os.path.dirname(self.link))
        os.symlink(os.path.relpath(target, folder), new_link)
        os.replace(new_link, self.link)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.append(record.getMessage() + "\n")
            incidents.resolve("the access log")
        except OSError as error:
            incidents.open("the access log", f"the access log cannot be written: {error}",
                           logging.ERROR)


def is_journald_on_stderr() -> bool:
    """Whether stderr goes to journald (systemd.exec(5)).

    The variable alone does not say so: a child inherits it even if its stderr goes elsewhere.
    """
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class StderrFormatter(logging.Formatter):
    """Formats events with their time, and leaves access lines as they are.

    journald adds the time itself, and wants the priority before each line (sd-daemon(3)).
    """
    PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}    # all used

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if is_journald_on_stderr():
            priority = self.PRIORITIES[record.levelno]
            return priority + text.replace("\n", "\n" + priority)
        if record.name == access_log.name:
            return text
        return super().format(record)


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Passes records to the thread of the log, and drops them while the queue holds too much.

    The size of the queue is estimated: each record in it counts as much as the new one, and at
    least MIN_RECORD. Records that are dropped are counted as lost lines.
    """
    MAX_QUEUE = 16 << 20        # characters
    MIN_RECORD = 16384          # characters

    def __init__(self, records: "queue.Queue[logging.LogRecord]") -> None:
        super().__init__(records)
        self.records = records

    def enqueue(self, record: logging.LogRecord) -> None:
        # QueueHandler.prepare() has merged the arguments into record.msg.
        if self.records.qsize() * max(len(record.msg), self.MIN_RECORD) < self.MAX_QUEUE:
            self.records.put(record)
        else:
            metrics.add("idpot_log_lines_lost_total", record.msg.count("\n") + 1)


def start_logger(logger: logging.Logger, handler: logging.Handler) -> None:
    """Start the thread that writes what is logged by the logger. Raises IdpotError if it cannot."""
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    try:
        # Its thread is a daemon that ends with the process; before that drain_logs() waits for it.
        logging.handlers.QueueListener(records, handler).start()
    except RuntimeError as error:       # "can't start new thread": a limit of the system
        raise IdpotError(f"the thread of a log cannot be started: {error}")
    logger.handlers = [BoundedQueueHandler(records)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def drain_logs() -> None:
    """Wait until all records have been written, for half a second at most."""
    deadline = monotonic() + 0.5
    for handler in access_log.handlers + log.handlers:
        if isinstance(handler, BoundedQueueHandler):
            # QueueListener calls task_done() when a record has been written.
            while handler.records.unfinished_tasks and monotonic() < deadline:
                time.sleep(0.005)


LOG_ESCAPES = {byte: f"\\x{byte:02x}" for byte in range(256) if not 32 <= byte < 127}
LOG_ESCAPES.update({ord('"'): r'\"', ord("\\"): r"\\"})


def escape_for_log(data: bytes) -> str:
    """Return the bytes as Apache writes them between the quotes of an access line."""
    return data.decode("latin-1").translate(LOG_ESCAPES)


# ------------------------------------------------------------------------------------------ stores
#
# A store keeps pots in a database. Workers are the threads that serve requests; each owns one store
# and is the only thread that uses it. Store is the contract, which another database would have to
# implement. The allocator, which has the workers, comes after the stores.
#
# Words. The counter of a pot is what the database holds: the last ID that was issued, by whichever
# process. The floor of a pot is the highest ID that this process has issued or reported. A claim is
# what a store is to take from one pot. Several claims go in one call.

MAX_BATCH_POTS = 64         # claims in one call

class Claim(NamedTuple):
    """What a call is to take from a pot: `size` IDs, all of them above the floor."""
    pot: str
    size: int
    floor: int


class Store(Protocol):
    """Pots in a database. To support another database, write such a class, add its settings to
    Settings and load_settings(), and choose it in run().

    Each method may raise these errors, which say who has to act:

    - Transient: nobody. The worker tries again, until the request times out.
    - Unavailable: the client, who may try again.
    - PotUnusable: an operator, who has to repair the pot.
    - DatabaseUnusable: an operator, who has to repair the database.

    The allocator calls current() of a pot before its first take(). If a call for one pot alone
    fails with Transient or PotUnusable, and `is_connected` is still true, the incident is that of
    the pot; else it is that of the database. A store counts idpot_db_seconds_total and
    idpot_db_errors_total, and resolves the incident of the database whenever a statement has
    succeeded.
    """
    subject: str        # the name of the database in the log

    @classmethod
    def create_stores(cls, settings: Settings) -> "list[Store]":
        """Return a store for each worker."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection. It may have been lost without anybody having noticed."""

    @property
    def was_slow(self) -> bool:
        """Whether the last successful take() was much slower than the database is at the moment.

        Then the pots are the cause, and not a slow database or network.
        """

    def start(self) -> str:
        """Prepare the database; return a description of it for the log.

        The main thread calls it on one store, before the workers start. If the database is down,
        but may come later, this opens an incident and returns. Any other error ends the process.
        """

    def probe(self) -> str:
        """Try the database for --check without writing to it; return a phrase about the result."""

    def connect(self) -> None:
        """Ensure that there is a connection to a server that could issue IDs a second ago."""

    def take(self, claims: Sequence[Claim], nowait: bool = False) -> list[int]:
        """Take IDs for all claims in one call; return the last, greatest ID of each.

        There are at most MAX_BATCH_POTS claims, each of another pot. If one of them fails, the call
        fails, though counters may have moved: the caller then repeats them one by one. A counter
        that is below its floor must not issue IDs up to the floor; a store may correct it and raise
        Transient, so that the call is repeated. With nowait the call raises Transient at once if
        a pot is locked, if the database can do that. Raises NotFound or Exhausted.
        """

    def current(self, pot: str) -> int:
        """Return the counter. Raises NotFound, and PotUnusable if the pot could repeat IDs."""

    def create(self, pot: str, minimum: int) -> int:
        """Create the pot; return its counter, above which its IDs begin. Raises Exists."""

    def raise_to(self, pot: str, minimum: int) -> int:
        """Raise the counter to the minimum, unless it is higher already; return the counter."""

    def pots(self) -> Iterator[tuple[str, int | None]]:
        """Yield each pot with its counter, or with None if that cannot be read."""

    def check(self, pot: str) -> None:
        """Raise Unavailable unless an ID could be issued now.

        Try that pot, unless the name is empty. Ignore that it does not exist or is unusable. Do not
        ignore that it is locked, because the whole database may be.
        """

    def close(self) -> None:
        """End the connection. The worker calls it last."""


class SqliteStore:
    """Pots in one SQLite file, which this process locks.

    Since nobody else can write, the counters are read once, at the start, and kept in memory. A
    take is one write. The WAL journal with synchronous=FULL survives a power loss.

    SQLite's integers are signed: an ID from 2**63 up is stored as ID - 2**64.
    """

    # The empty transaction acquires the lock that EXCLUSIVE keeps: a second process is refused.
    START_SCRIPT = """
        PRAGMA locking_mode=EXCLUSIVE;
        PRAGMA journal_mode=WAL;
        PRAGMA synchronous=FULL;
        CREATE TABLE IF NOT EXISTS pot (name TEXT PRIMARY KEY, id INTEGER NOT NULL);
        BEGIN IMMEDIATE;
        COMMIT
        """
    WRITE = "INSERT INTO pot (id, name) VALUES {} ON CONFLICT (name) DO UPDATE SET id = excluded.id"
    WRITE_NOTHING = "PRAGMA user_version = 1"       # fails on a full disk, unlike BEGIN

    is_connected = True         # the file is open from start() on
    was_slow = False            # all pots are in one file, so none is slower than its neighbours

    @classmethod
    def create_stores(cls, settings: Settings) -> "list[Store]":
        return [cls(settings)]

    def __init__(self, settings: Settings) -> None:
        import sqlite3  # it takes 1 MB of memory, so it is imported only where it is used

        self._sqlite = sqlite3
        self._path = settings.file
        self._shown_path = f"SQLite file {quoted(settings.file)}"
        self.subject = f"SQLite {settings.file}"
        self._counters: dict[str, int] = {}

    def start(self) -> str:
        try:
            # The main thread opens the file, and one worker uses it from then on.
            self._connection = self._sqlite.connect(
                self._path, timeout=0, isolation_level=None, check_same_thread=False)
            self._connection.executescript(self.START_SCRIPT)
            [(mode,)] = self._connection.execute("PRAGMA journal_mode")
            self._file = os.stat(self._path)        # for _check_file()
            rows = self._connection.execute("SELECT name, id FROM pot").fetchall()
        except (self._sqlite.Error, OSError) as error:
            reason = "another process uses it" if "locked" in str(error) else str(error)
            raise IdpotError(f"{self._shown_path}: {reason}")
        if mode != "wal":
            raise IdpotError(f"{self._shown_path} does not accept the WAL journal")
        for pot, value in rows:
            # SQLite keeps any type in any column, and NULL in a primary key.
            if not isinstance(pot, str) or not isinstance(value, int):
                raise IdpotError(f"{self._shown_path}: pot {pot!a} holds no whole number")
            self._counters[pot] = value % 2**64
        return self.subject

    def probe(self) -> str:
        path = self._path
        if not os.path.exists(path):
            path = os.path.dirname(path) or "."
        if not os.access(path, os.W_OK):        # to open the file would write to it
            raise IdpotError(f"{self._shown_path} cannot be written")
        return f"{self.subject} can be written"

    def connect(self) -> None:
        """Do nothing: start() has opened the file."""

    def _check_file(self) -> None:
        """Raise DatabaseUnusable if the path no longer names the file that is open and locked."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self._path), self._file):
                return
        raise DatabaseUnusable(f"{self.subject} was moved, removed or replaced: restart idpot")

    def _write(self, counters: Mapping[str, int], statement: str = WRITE) -> None:
        """Write the counters of pots, by name; one statement is one transaction.

        The order matters. The counters in memory are raised after the write, so that a failed write
        uses up no ID. The file is checked after the write: if somebody has replaced it, the write
        went to a file without a name, and another idpot may issue the same IDs from the new one.
        Then no ID of this write may be returned.
        """
        start = monotonic()
        rows = ", ".join(["(?, ?)"] * len(counters))
        values: list[int | str] = []
        for pot, value in counters.items():
            values += [value - 2**64 if value >> 63 else value, pot]
        try:
            self._connection.execute(statement.format(rows), values)
        except self._sqlite.Error as error:
            metrics.add('idpot_db_errors_total{errno="other"}')
            # Not Transient: to repeat this at once would not help, as on a full disk.
            raise Unavailable(f"{self.subject}: {error}")
        finally:
            metrics.add("idpot_db_seconds_total", monotonic() - start)
        self._check_file()
        self._counters.update(counters)
        incidents.resolve(self.subject)

    def take(self, claims: Sequence[Claim], nowait: bool = False) -> list[int]:
        # All claims are checked before anything is written: an exhausted pot fails the whole call.
        last_ids = {}
        for pot, size, floor in claims:
            last_ids[pot] = max(self.current(pot), floor) + size
            if last_ids[pot] > MAX_ID:
                raise Exhausted(f'pot "{pot}" is exhausted: fewer than {size} IDs are left')
        self._write(last_ids)
        return list(last_ids.values())

    def current(self, pot: str) -> int:
        self._check_file()
        if pot not in self._counters:
            raise NotFound(f'there is no pot "{pot}"')
        return self._counters[pot]

    def create(self, pot: str, minimum: int) -> int:
        if pot in self._counters:
            raise Exists(f'pot "{pot}" exists')
        self._write({pot: minimum})
        return minimum

    def raise_to(self, pot: str, minimum: int) -> int:
        value = max(self.current(pot), minimum)
        self._write({pot: value})
        return value

    def pots(self) -> Iterator[tuple[str, int | None]]:
        self._check_file()
        yield from sorted(self._counters.items())

    def check(self, pot: str) -> None:      # all pots are in one file
        self._write({}, self.WRITE_NOTHING)

    def close(self) -> None:
        self._connection.close()    # moves the WAL journal into the file


# ------------------------------------------------------------------------------- MySQL and MariaDB
#
# Three classes. MysqlServers is what the connections of the process share: which server of
# the DSN is in use, and which cluster it belongs to. MysqlConnection is the connection of one
# store: it connects, checks the state of the server, runs statements, and turns the driver's errors
# into ours. MysqlStore has a MysqlConnection, and the SQL of the pots.
#
# All connections use the same server until it cannot issue IDs or does not reply in time; then all
# use the next one. A server that comes back is not used before all those after it have failed: it
# may have missed the IDs that the others issued meanwhile.

CANNOT_SERVE = "the database cannot serve this now"

# Errors that last until an operator changes the rights, the account or the server. The connection
# is closed after them, because the server applies such changes to new connections only.
PERMANENT_ERRORS = {
    1044,       # the account has no access to the database
    1045,       # the user or the password is wrong
    1049,       # there is no such database
    1142,       # the account lacks a privilege on a table
    1143,       # the account lacks a privilege on a column
    1227,       # the account lacks a global privilege
    1698,       # the account has to authenticate in another way
    1862,       # the password has expired
    2061,       # the driver: the authentication plugin failed, or it needs TLS
    3118,       # the account is locked (MySQL)
    4151,       # the account is locked (MariaDB)
}

REJECTED = PotUnusable, (
    'the database does not let pot "{}" be created or written (error {})')
NO_GREATER_NUMBER = Exhausted, 'pot "{}" is exhausted: its table holds no greater number'

# Errors that concern one pot, after which the connection remains usable. Each becomes an error of
# that kind with that text, in which the first {} is the pot and the second one the number.
POT_ERRORS: dict[int, tuple[type[IdpotError], str]] = {
    1054: (PotUnusable, 'the table of pot "{}" has no column id'),
    1062: (Exists, 'pot "{}" exists'),
    1146: (NotFound, 'there is no pot "{}"'),
    1205: (Transient, CANNOT_SERVE + ': the table of pot "{}" is locked (error {})'),
    3098: (PotUnusable, 'the table of pot "{}" is refused by its replication group, which needs '
                        "InnoDB and a primary key (error {})"),
    1286: REJECTED,        # the server does not know the storage engine
    1665: REJECTED,        # binlog_format=STATEMENT, and the engine needs another one
    3161: REJECTED,        # disabled_storage_engines has the engine
    3750: REJECTED,        # sql_require_primary_key, and a MyISAM pot has none
    1264: NO_GREATER_NUMBER,    # out of range for the column
    1292: NO_GREATER_NUMBER,    # truncated value, with some types of columns
    1690: NO_GREATER_NUMBER,    # out of range for BIGINT UNSIGNED
    3819: NO_GREATER_NUMBER,    # a CHECK failed (MySQL)
    4025: NO_GREATER_NUMBER,    # a CHECK failed (MariaDB)
}

# How a session must be set, whatever the defaults of the server are. A statement waits for a lock
# for one second at most, which bounds what a locked pot costs the pots that share its call.
SET_SESSION = (
    "SET SESSION autocommit=1, completion_type=0, lock_wait_timeout=1, "
    f"innodb_lock_wait_timeout=1, sql_safe_updates=0, sql_select_limit={MAX_ID}, "
    "sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'")
# The variables that say whether the server can issue IDs. They are the session's own, not the
# global ones: a Galera session that began while wsrep_on was OFF does not replicate later either.
SHOW_STATE = (
    "SHOW VARIABLES WHERE Variable_name LIKE '%read\\_only' OR Variable_name IN "
    "('wsrep_on', 'wsrep_provider', 'binlog_format', 'group_replication_group_name')")
SHOW_GALERA_READY = "SHOW GLOBAL STATUS WHERE Variable_name = 'wsrep_ready'"
# One row: the state and role of this member, the number of unreachable members, and that of all.
SELECT_GROUP = (
    "SELECT MAX(IF(member_id = @@server_uuid, "
    "CONCAT_WS(' ', member_state, NULLIF(member_role, '')), '')), "
    "SUM(member_state = 'UNREACHABLE'), COUNT(*) "
    "FROM performance_schema.replication_group_members")
SELECT_ENGINES = (
    "SELECT LOWER(engine) FROM information_schema.engines WHERE support IN ('YES', 'DEFAULT')")
# A condition for UPDATE, which matches no row on a server that has become read-only: some accounts
# may write to it nevertheless. From MariaDB 12 on the variable is an enumeration, hence CHAR. With
# binlog_format=STATEMENT the condition is left out, since the server would warn of each such
# statement; then the check of the state every second is the only guard.
UNLESS_READ_ONLY = " WHERE CAST(@@global.read_only AS CHAR) IN ('0', 'OFF')"
# MariaDB runs the statement without waiting for a lock. To MySQL this is a comment: there the
# statement waits for a second, as always.
NOWAIT = "/*M!100300 SET STATEMENT lock_wait_timeout=0, innodb_lock_wait_timeout=0 FOR */ "

REPLY_TIMEOUT = 3           # seconds to connect or for a reply: a statement may wait for two locks,
                            # that of the table and that of the row
STATE_MAX_AGE = 1.0         # seconds for which the checked state of a server is trusted
MAX_IDLE = 60.0             # seconds; a connection unused for longer may be cut by a firewall
SLOW_CALL = 0.2             # seconds; a take is slow if it needs more than this, ...
SLOW_RATIO = 3              # ... and more than this many times the latency of the server
DURABLE_ENGINES = ("innodb", "aria", "rocksdb")     # they survive a power loss

Row = tuple[Any, ...]       # a row of a query: the driver returns what the columns hold


class DriverConnection(Protocol):
    """What idpot uses of a connection of mysql-connector-python.

    The driver has two forms. For several statements in one call, the pure Python form has
    cmd_query_iter(); the C extension has more_results, next_result() and fetch_eof_status().
    """
    in_transaction: bool

    def cmd_query(self, query: str) -> dict[str, int]: ...
    def cmd_query_iter(self, statements: str) -> Iterable[dict[str, int]]: ...
    def get_rows(self) -> tuple[list[Row], object]: ...
    def close(self) -> None: ...

    more_results: bool

    def next_result(self) -> None: ...
    def fetch_eof_status(self) -> dict[str, int]: ...


class Reply(NamedTuple):
    """The server's reply to a statement that is not a query."""
    affected_rows: int      # matched rows, even if they did not change: FOUND_ROWS is set
    insert_id: int          # what the statement passed to LAST_INSERT_ID(), else 0


def import_driver() -> Any:     # the module: mypy has no types of an optional package
    """Return the module mysql.connector, which is needed only with [Mysql]."""
    try:
        return importlib.import_module("mysql.connector")
    except ImportError:
        folder = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
        raise IdpotError("[Mysql] needs mysql-connector-python: python3 -m pip install "
                         f"--target={folder} 'mysql-connector-python>=9.2'")


class MysqlServers:
    """What the connections of the process share.

    `generation` counts the failovers. The server in use is the one at the index
    `generation % len(addresses)`. When a worker fails over, the others notice it at their next
    connect(): they close their connections and use the new server, too.

    `cluster` is the name of the cluster that the servers belong to, from the first server that was
    in one. It never changes in the life of the process: a server that was started outside its
    cluster would issue IDs independently of it (split brain). Two workers that set it at once have
    asked the same server.

    `engines` has the storage engine of each pot whose counter was read. Any worker may write it.
    """

    def __init__(self, addresses: Sequence[ServerAddress]) -> None:
        self.addresses = addresses
        self.generation = 0
        self.cluster = ""
        self.engines: dict[str, str] = {}
        self._lock = threading.Lock()       # makes "compare the generation, then count" one step

    def fail_over(self, generation: int) -> None:
        """Let all connections use the next server, unless they have left that generation already.

        So two workers that fail at the same time move on by one server. If there is only one
        address, all connections to it are made anew.
        """
        with self._lock:
            if self.generation == generation:
                self.generation += 1


class MysqlConnection:
    """The connection of one store, made anew after every error but one that concerns a pot."""

    def __init__(self, settings: Settings, driver: Any, servers: MysqlServers) -> None:
        dsn = settings.dsn
        self._driver = driver       # see import_driver()
        self._servers = servers
        self._engine = settings.engine      # of new pots
        self._tls = dsn.tls
        self.connection: DriverConnection | None = None     # the driver's
        self._generation = 0        # MysqlServers.generation when the connection was made
        # When the server was last found to be able to issue IDs. That is checked every second while
        # the connection is used. So a time long ago also means that the connection was not used.
        self._checked_at = 0.0
        self._latency = 0.0         # seconds that it took to reply then
        self.unless_read_only = ""  # UNLESS_READ_ONLY, or "" if this server would warn of it
        self.was_slow = False       # see Store
        self.subject = "MySQL " + ",".join([address.name for address in dsn.addresses])
        self._arguments: dict[str, object] = {
            "user": dsn.user,
            "password": dsn.password,
            "database": dsn.database,
            "connection_timeout": REPLY_TIMEOUT,
            "read_timeout": REPLY_TIMEOUT,
            "write_timeout": REPLY_TIMEOUT,
            "collation": "utf8mb4_general_ci",      # older MariaDB lacks the driver's default
            "ssl_disabled": dsn.tls == "false",
            "client_flags": [driver.ClientFlag.FOUND_ROWS],
        }
        if dsn.tls == "true":
            paths = ssl.get_default_verify_paths()
            self._arguments.update(ssl_verify_cert=True, ssl_verify_identity=True,
                                   ssl_ca=paths.cafile or paths.openssl_cafile)

    def connect(self, max_age: float = STATE_MAX_AGE) -> None:
        """Ensure a connection to a server whose state was checked at most `max_age` seconds ago.

        If there is none, or if the check fails, opens a new one. Tries each address, beginning with
        the server in use. If no server can be used, raises DatabaseUnusable if all of them
        need an operator, else Transient. The client gets the message of the first one, and the log
        gets all messages.
        """
        now = monotonic()
        if self._generation != self._servers.generation or now > self._checked_at + MAX_IDLE:
            self.close()
        if self.connection and now > self._checked_at + max_age:
            with suppress(Unavailable):     # call_driver() has closed it; go on below
                self.call_driver(self.check_server)
        addresses = self._servers.addresses
        errors: dict[str, Unavailable] = {}     # by address
        while not self.connection:
            self._generation = self._servers.generation
            name, arguments = addresses[self._generation % len(addresses)]
            try:
                self.call_driver(self._open, arguments)
            except Unavailable as error:
                errors[name] = error
                # If there is a single address, other workers keep their connections to it. These
                # may still work, since a server may refuse new ones only. If the server was silent,
                # call_driver() has failed over.
                if len(addresses) > 1:
                    self._servers.fail_over(self._generation)
            if len(errors) == len(addresses):
                kinds = {type(error) for error in errors.values()}
                kind = DatabaseUnusable if kinds == {DatabaseUnusable} else Transient
                details = "; ".join([f"{name}: {error.detail}" for name, error in errors.items()])
                raise kind(str(next(iter(errors.values()))), f"MySQL {details}")

    def call_driver(self, function: Callable[..., T], *arguments: object, pot: str = "") -> T:
        """Return function(*arguments), which uses the connection.

        The driver's errors become ours. All of them close the connection, since after an error the
        next reply could be that of an earlier statement; except those in POT_ERRORS, if `pot` says
        that the call concerns this pot alone. An IdpotError of the function closes the connection,
        too: it means that the server is of no use.
        """
        start = monotonic()
        try:
            return function(*arguments)
        except IdpotError:
            self.close()
            raise
        except Exception as error:
            # The driver raises many kinds of errors, at worst if the server does not speak MySQL.
            number = getattr(error, "errno", None) or 2027      # 2027 is "malformed packet"
            metrics.add(f'idpot_db_errors_total{{errno="{number}"}}')
            if pot and number in POT_ERRORS:
                kind, text = POT_ERRORS[number]
                raise kind(text.format(pot, number))
            self.close()
            # If the server was silent until the timeout, all connections fail over, since the
            # others would wait as long. 2000 to 2999 are the driver's own errors, and 3024 is its
            # read_timeout; other numbers are replies of the server.
            is_silent = 2000 <= number < 3000 or number == 3024
            if is_silent and monotonic() > start + 0.9 * REPLY_TIMEOUT:
                self._servers.fail_over(self._generation)
            raise self._translate(error, number)
        finally:
            metrics.add("idpot_db_seconds_total", monotonic() - start)

    def _translate(self, error: Exception, number: int) -> Unavailable:
        """Return our error for the driver's error with that number."""
        detail = (str(error) or repr(error)).translate(LOG_ESCAPES)
        # caching_sha2_password needs TLS or a Unix socket. Without them the C extension reports
        # 2061, and the pure Python form 1045, as for a wrong password.
        if number == (2061 if self._driver.HAVE_CEXT else 1045):
            detail += "; it may need TLS on the server, or its socket: unix(/path)"
        # 2026 is any error of TLS. Without one of these words the server died during the handshake.
        is_untrusted = number == 2026 and re.search("certificate|support", detail)
        kind = DatabaseUnusable if is_untrusted or number in PERMANENT_ERRORS else Transient
        return kind(f"{CANNOT_SERVE} (error {number})", detail)

    def _open(self, arguments: Mapping[str, str | int]) -> None:
        """Connect to a server and prepare the session."""
        # The server's init_connect may have begun a transaction. To switch autocommit from off to
        # on commits it; to set it on while it is on does not. The driver switches it off unless
        # autocommit=True is passed, and SET_SESSION switches it on. So it must not be passed here.
        self.connection = self._driver.connect(**self._arguments, **arguments)
        self.execute(SET_SESSION)
        if self._tls == "skip-verify" and not self.query("SHOW STATUS LIKE 'Ssl_cipher'")[0][1]:
            raise Transient(f"{CANNOT_SERVE}: its server offers no TLS")
        self.check_server()
        if (self._engine.lower(),) not in self.query(SELECT_ENGINES):
            raise DatabaseUnusable(f'Engine: the server has no storage engine "{self._engine}"')

    def query(self, statement: str) -> list[Row]:
        """Return the rows of a query. A cursor would ping the server first, so none is used."""
        assert self.connection
        self.connection.cmd_query(statement)
        return self.connection.get_rows()[0]

    def execute(self, *statements: str) -> list[Reply]:
        """Send statements that are not queries in one call; return the reply to each."""
        connection = self.connection
        assert connection
        text = "; ".join(statements)
        if hasattr(connection, "fetch_eof_status"):
            results = [connection.cmd_query(text)]
            while connection.more_results:
                connection.next_result()
                results.append(connection.fetch_eof_status())
        else:
            results = list(connection.cmd_query_iter(text))
        return [Reply(result["affected_rows"], result["insert_id"]) for result in results]

    def check_server(self) -> None:
        """Raise Transient if the server cannot issue IDs now, DatabaseUnusable if it never can.

        Notes the latency, the cluster, and the time of the check. It is run by call_driver(), which
        closes the connection if it raises.
        """
        now = monotonic()
        state: dict[str, str] = dict(self.query(SHOW_STATE))
        self._latency = monotonic() - now
        group = state.get("group_replication_group_name")
        cluster = "the Galera cluster" if state.get("wsrep_on") == "ON" else ""
        if group:
            cluster = f"the replication group {group}"
        # A member that was started outside its cluster looks like a server that never was in one.
        self._servers.cluster = self._servers.cluster or cluster
        if cluster != self._servers.cluster:
            raise Transient(f"{CANNOT_SERVE}: its server is not in {self._servers.cluster}")
        if group:
            self._check_group_member()
        elif cluster or state.get("wsrep_provider", "none") not in ("", "none"):
            # wsrep_ready says whether the node replicates, and wsrep_on whether this session does.
            # If only one of them does, IDs would be issued independently of the other nodes.
            is_ready = self.query(SHOW_GALERA_READY) == [("wsrep_ready", "ON")]
            if is_ready != bool(cluster):
                raise Transient(f"{CANNOT_SERVE}: the Galera node is not ready (error 1047), or "
                                "its wsrep_on is OFF")
        read_only = {value for name, value in state.items() if name.endswith("read_only")}
        if read_only - {"OFF", "0"}:
            raise Transient(f"{CANNOT_SERVE}: it is read-only (error 1290)")
        if cluster and self._engine.lower() != "innodb":
            raise DatabaseUnusable(f"Engine: {cluster} replicates InnoDB only, not {self._engine}")
        is_safe = state.get("binlog_format") != "STATEMENT"
        self.unless_read_only = UNLESS_READ_ONLY if is_safe else ""
        self._checked_at = now

    def _check_group_member(self) -> None:
        """Raise Transient unless the server is the primary, and the group has its majority.

        A member that has left its group, or that was cut off from it, can still be written.
        """
        [(own_state, unreachable, members)] = self.query(SELECT_GROUP)
        if own_state != "ONLINE PRIMARY":
            raise Transient(f"{CANNOT_SERVE}: its server is {own_state or 'no member'} in the "
                            "replication group")
        # The group itself notices that 5 to 6 seconds later; until then a statement would hang.
        if 2 * unreachable >= members:
            raise Transient(f"{CANNOT_SERVE}: the replication group has lost its majority")

    def write(self, statements: Sequence[str], pot: str = "") -> list[Reply]:
        """Run statements in one call; return the replies if what was written is sure to last.

        If the call has taken long, the server is checked again: it may have become read-only, or it
        may be slow itself. If another worker has failed over meanwhile, the reply of this server
        does not count. A trigger or a proxy may have begun a transaction, which would not be
        committed.
        """
        start = monotonic()
        replies = self.call_driver(self.execute, *statements, pot=pot)
        end = monotonic()
        seconds = end - start
        is_slow = seconds > SLOW_CALL and seconds > SLOW_RATIO * self._latency
        if is_slow or end > self._checked_at + STATE_MAX_AGE:
            self.call_driver(self.check_server)
            is_slow = is_slow and seconds > SLOW_RATIO * self._latency      # the present latency
        self.was_slow = is_slow
        assert self.connection
        reason = ""
        if len(replies) != len(statements):
            reason = "its reply is not complete"
        elif self.connection.in_transaction:
            reason = "a transaction is open after its reply"
        elif self._generation != self._servers.generation:
            reason = "another server is in use since its reply"
        if reason:
            self.close()
            raise Transient(f"{CANNOT_SERVE}: {reason}")
        return replies

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection:
            with suppress(Exception):       # it may be lost already
                connection.close()


class MysqlStore:
    """Pots in MySQL or MariaDB, each a table `pot_NAME (id BIGINT UNSIGNED NOT NULL)` with one row.

    These are go-idpot's tables, and both servers may use them at once. InnoDB tables also have a
    primary key, the column `one`, whose value never changes. With `id` as the key each update would
    leave a deleted record, and later updates would become slower while anybody holds a read view.
    The key also keeps two nodes of a cluster from both inserting a row.
    """

    @classmethod
    def create_stores(cls, settings: Settings) -> "list[Store]":
        driver = import_driver()
        servers = MysqlServers(settings.dsn.addresses)
        return [cls(settings, MysqlConnection(settings, driver, servers), servers)
                for _ in range(settings.connections)]

    def __init__(
        self, settings: Settings, connection: MysqlConnection, servers: MysqlServers
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._servers = servers
        self.subject = connection.subject

    @property
    def is_connected(self) -> bool:
        return self._connection.connection is not None

    @property
    def was_slow(self) -> bool:
        return self._connection.was_slow

    def start(self) -> str:
        try:
            self.probe()
        except Transient as error:
            # The database may come later. Other errors end the process.
            incidents.open(self.subject, f"{error.detail}: waiting for it; requests get 503 until "
                                         "then")
        return f"{self.subject}/{self._settings.dsn.database}, {self._settings.engine}"

    def probe(self) -> str:
        ignored = self._settings.dsn.ignored
        if ignored:
            log.warning("ConnectString: these parameters are ignored: %s", ignored)
        engine = self._settings.engine
        if engine.lower() not in DURABLE_ENGINES:
            log.warning("Engine %s does not survive a power cut: IDs of the last half minute may "
                        "come again; InnoDB loses none", engine)
        self.connect()
        return f"{self.subject} can be reached"

    def connect(self, max_age: float = STATE_MAX_AGE) -> None:
        self._connection.connect(max_age)

    def close(self) -> None:
        self._connection.close()

    def _run(self, function: Callable[[str], T], statement: str, pot: str = "") -> T:
        """Return function(statement), which is query() or execute() of the connection."""
        self.connect()
        result = self._connection.call_driver(function, statement, pot=pot)
        incidents.resolve(self.subject)
        return result

    def _update(self, values: Mapping[str, str], nowait: bool = False) -> dict[str, int]:
        """Set counters to SQL expressions, given by pot; return the insert_id of each reply.

        The statements go in one call, sorted by pot, so that two idpots cannot lock each other out.
        If all tables are InnoDB, the call is one transaction.
        """
        connection = self._connection
        connection.connect()
        pots = sorted(values)
        prefix = NOWAIT if nowait else ""
        statements = [f"{prefix}UPDATE `pot_{pot}` SET id = {values[pot]}" for pot in pots]
        # The server may have become read-only since it was checked. The condition in the last
        # statement is enough: a server that was writable then was writable before.
        statements[-1] += connection.unless_read_only
        # The engine is known from current(), which the allocator calls first. If somebody alters it
        # meanwhile, the call is still correct: each UPDATE takes effect by itself then.
        in_transaction = (
            len(pots) > 1 and {self._servers.engines.get(pot) for pot in pots} == {"InnoDB"})
        if in_transaction:
            statements = ["START TRANSACTION", *statements, "COMMIT"]
        replies = connection.write(statements, pots[0] if len(pots) == 1 else "")
        if in_transaction:
            replies = replies[1:-1]
        insert_ids = {}
        for pot, reply in zip(pots, replies, strict=True):
            if reply.affected_rows != 1:
                # Each of these raises an error if it finds the reason.
                connection.call_driver(connection.check_server)    # the server is read-only
                self.current(pot)                       # the table has no row, or several
                raise Transient(f'the table of pot "{pot}" was just changed by others')
            insert_ids[pot] = reply.insert_id
        incidents.resolve(self.subject)
        return insert_ids

    def take(self, claims: Sequence[Claim], nowait: bool = False) -> list[int]:
        # One statement reads and writes the counter, and its own reply has the value. So several
        # idpots may use one table, go-idpot among them: the database serves one after the other.
        last_ids = self._update(
            {pot: f"LAST_INSERT_ID(id + {size})" for pot, size, _ in claims}, nowait)
        for pot, size, floor in claims:
            last_id = last_ids[pot]
            if last_id >= floor + size:
                continue
            # Either the counter was below the floor, or a trigger has run, which makes last_id 0.
            # If this is the only claim, the counter is raised, and the worker takes again.
            if len(claims) == 1:
                self.raise_to(pot, floor)
                if last_id:
                    log.warning("the counter of pot %s was set back to %d, but %d was issued: it "
                                "continues above that", pot, last_id - size, floor)
            raise Transient(f'the counter of pot "{pot}" was set back, was changed by others, or '
                            "its table has a trigger")
        return [last_ids[pot] for pot, _, _ in claims]

    def current(self, pot: str) -> int:
        rows = self._run(
            self._connection.query,
            "SELECT id, (SELECT engine FROM information_schema.tables WHERE table_schema = "
            f"DATABASE() AND table_name = 'pot_{pot}') FROM `pot_{pot}` LIMIT 2", pot)
        if not rows:        # another idpot may be about to insert it
            raise Transient(f'the table of pot "{pot}" has no row')
        if len(rows) > 1:
            raise PotUnusable(f'the table of pot "{pot}" has several rows, not one')
        value, engine = rows[0]
        self._servers.engines[pot] = engine
        cluster = self._servers.cluster
        if cluster and engine != "InnoDB":      # each node would have a counter of its own
            raise PotUnusable(
                f'the table of pot "{pot}" is {engine}: {cluster} replicates InnoDB only')
        # A DOUBLE or a VARCHAR would repeat IDs.
        if not isinstance(value, int) or value < 0:
            raise PotUnusable(f'the table of pot "{pot}" holds no whole number from 0 up')
        return value

    def create(self, pot: str, minimum: int) -> int:
        # An older state will not do: a server that has just left its cluster would create a table
        # that the cluster does not have.
        self.connect(max_age=0)
        engine = self._settings.engine
        key = ", one TINYINT NOT NULL DEFAULT 1 PRIMARY KEY" if engine.lower() == "innodb" else ""
        execute = self._connection.execute
        self._run(execute, f"CREATE TABLE IF NOT EXISTS `pot_{pot}` "
                           f"(id BIGINT UNSIGNED NOT NULL{key}) ENGINE={engine}", pot)
        # A crash may have left a table without its row, so the row decides whether the pot exists.
        [reply] = self._run(execute, f"INSERT INTO `pot_{pot}` (id) SELECT {minimum} FROM DUAL "
                                     f"WHERE NOT EXISTS (SELECT id FROM `pot_{pot}`)", pot)
        if reply.affected_rows != 1:
            raise Exists(f'pot "{pot}" exists')
        return self.current(pot)    # raises PotUnusable if that table was made by somebody else

    def raise_to(self, pot: str, minimum: int) -> int:
        self.connect(max_age=0)
        self.current(pot)           # raises PotUnusable
        # In MariaDB GREATEST(id, 5) is signed, and fails from 2**63 up: hence the casts.
        self._update({pot: f"GREATEST(CAST(id AS UNSIGNED), CAST({minimum} AS UNSIGNED))"})
        return self.current(pot)    # a trigger may have written something else

    def pots(self) -> Iterator[tuple[str, int | None]]:
        tables = self._run(self._connection.query,
                           "SELECT table_name FROM information_schema.tables "
                           "WHERE table_schema = DATABASE() AND engine IS NOT NULL")
        for (table,) in sorted(tables):
            pot = table.removeprefix("pot_")
            if table != pot and POT_NAME.fullmatch(pot):
                value = None
                for _ in range(2):      # the connection may have been lost
                    self.connect()      # raises Transient if the server is gone
                    with suppress(NotFound, Unavailable):
                        value = self.current(pot)
                        break
                yield pot, value

    def check(self, pot: str) -> None:
        self.connect(max_age=0)
        if pot:
            # An error of this pot says nothing about the others.
            with suppress(NotFound, PotUnusable):
                self._update({pot: "id"})       # takes the locks and needs the privilege


# -------------------------------------------------------------------------------------- allocation
#
# The allocator turns the requests that wait at the same time into one database call.
#
# An Operation is what a request asks for. A Job is an operation that waits in the queue of its pot.
# A batch is a set of pots that are served together: a worker adds up how many IDs the jobs of each
# pot want, which makes one Claim per pot, its store takes all claims in one call, and the worker
# completes the jobs.
#
# Threads. Each worker is a thread that owns one store, and so one database connection, for life.
# The workers follow the Leader/Followers pattern (Schmidt et al., 2000). One of them, the leader,
# reads from clients, which queues jobs, and starts batches. It keeps the lead while its call runs.
# So in the common case one thread reads a request, serves it and responds. Waking another thread
# would cost more than the call itself.
#
# A leader gives up the lead in two ways:
#   - It releases the lead before an operation that may be slow: one on an isolated pot, or the list
#     of all pots.
#   - The main thread takes the lead away if a call lasts longer than LEADER_CALL_LIMIT.
# Either way an idle worker acquires the lead and goes on reading. If no worker is idle, the main
# thread reads, so that requests that need no database still get their response.
#
# Isolation. A pot whose table may be locked must not delay the others. It is isolated: served by
# itself, by a worker that does not lead.
#
#   A pot is   if                              and its next call                     until
#   unread     its counter was never read      reads the counter first               a call succeeds
#   suspect    one call has failed, or the     does not wait for locks: the cause    a take succeeds
#              last take was slow              may be another pot of the batch
#   failing    several calls in a row failed   waits for locks                       a take succeeds
#   healthy    none of these is true           is made with others, by the leader
#
# Isolated and healthy pots are served in turns. Of the isolated pots that are due, the one that has
# been due for longest is next, but each failure in a row puts a pot back by FAILURE_PENALTY.
#
# Retries. A job that has failed with Transient stays in its queue, and put_back() has its pot
# served again, until the job times out. If the call was for several pots, each is tried again at
# once. If it was for one pot, that is due after a backoff: 16 ms, then twice as long after each
# further failure, 1 s at most. Meanwhile its jobs that have failed stand behind new ones, and takes
# behind reads, since a table that is locked for a backup can often be read.
#
# For example, a backup locks the table of pot a for ten minutes (Timeout is 10 seconds):
#
#   0 s      A call for a, b and c waits for the lock. After 0.1 s another worker leads.
#   1 s      The call fails, and all three are suspect. b and c are taken one by one and are healthy
#            again. With nowait a fails at once, and is failing.
#   1-10 s   A worker that does not lead tries a again after 31 ms, 62 ms, ... 1 s. Each try waits
#            for the lock for a second. Reads of a succeed if the lock permits that.
#   10 s     The main thread times out the first jobs of a: 503 with the reason. New ones wait, too.
#   600 s    The lock ends, the next try succeeds, and a is healthy.
#
# For a moment there can be two readers: a leader that has lost the lead notices it only when its
# call returns. That is safe. The kernel reports an event of a connection to one of them only (see
# the section on connections), and Scheduler.next_batch() hands out a pot to one of them only.

LEADER_CALL_LIMIT = 0.1     # seconds of a call, after which the main thread takes the lead away
RECONNECT_INTERVAL = 0.1    # seconds after a failed attempt to connect, in which no worker tries it
BACKOFF_UNIT = 1 / 128      # seconds; the backoff is this times 2 ** failures: 16 ms at the first
MAX_FAILURES = 7            # more failures in a row are not counted: 2 ** 7 / 128 is one second
FAILURE_PENALTY = 1.0       # seconds by which a failure puts a pot behind other isolated ones
READ_ADVANTAGE = 1.0        # seconds by which reads go before takes in the queue of a failing pot
POLL_INTERVAL = 0.2         # seconds that the leader waits for requests at most
# Operations that concern no pot queue under these names, which no pot can have. Since such a "pot"
# has no counter that could be read, ALL_POTS is always isolated: its list may take long.
ALL_POTS = "all pots"
HEALTH_CHECK = "health check"

Result = int | str          # an ID or a counter; or the text of a list
BodyFormat = Callable[["Operation", Result], bytes]


class OperationKind(enum.Enum):
    """What an operation does.

    Operations of one kind that wait for the same pot share one call. Creates and raises do not: of
    two clients that create a pot, one must get 409.
    """
    TAKE = "take"
    READ = "read"
    CREATE = "create"
    RAISE = "raise"
    LIST = "list"
    CHECK = "check"
    METRICS = "metrics"     # the connection itself responds, without a job


def format_result(operation: "Operation", result: Result) -> bytes:
    """The result as text: one ID, a counter, or a list."""
    return str(result).encode()


class Operation(NamedTuple):
    """What a request asks of a pot, and how the result becomes the response."""
    kind: OperationKind
    pot: str
    size: int = 0           # of a TAKE: how many IDs
    minimum: int = 0        # of a CREATE or a RAISE: the least value of the counter
    status: int = 200       # of the response
    format_body: BodyFormat = format_result
    timeout: float | None = None        # seconds, if it is not the setting Timeout


class Waiter(Protocol):
    """Whatever waits for a job: a connection."""

    def on_complete(self, operation: Operation, outcome: "Result | IdpotError") -> None: ...


class Job:
    """An operation that waits in the queue of its pot.

    It stays in the queue until it has been completed, so that a failed call can be repeated. Two
    threads may try to complete it at the same time: the worker that has the result, and the main
    thread when the deadline has passed. Only the first one calls the waiter. From then on that
    thread owns the connection that was waiting.
    """
    # The beginning of the message at the timeout, to which time_out() adds the seconds. When an
    # attempt fails, the allocator replaces it.
    reason = "the database did not answer in"

    def __init__(self, operation: Operation, waiter: Waiter, timeout: float = 10.0) -> None:
        self.operation = operation
        self.started_at = monotonic()
        # A point in time: the sort key in the queue of a failing pot.
        self.position = self.started_at
        if operation.kind is OperationKind.TAKE:
            self.position += READ_ADVANTAGE
        self.deadline = self.started_at + timeout
        # Whoever completes the job pops the waiter: list.pop() is atomic. A job without a waiter is
        # completed.
        self.waiters = [waiter]

    def complete(self, outcome: "Result | IdpotError") -> None:
        """Pass the result or the error on, unless the job was completed before."""
        try:
            waiter = self.waiters.pop()
        except IndexError:
            return
        waiter.on_complete(self.operation, outcome)

    def time_out(self) -> None:
        """Complete the job with a 503. A shutdown may call this before the deadline."""
        waited = round(min(monotonic(), self.deadline) - self.started_at, 1)
        self.complete(Unavailable(f"{self.reason} {waited:g} seconds"))


class PotQueue:
    """The jobs of one pot, and what this process knows about its counter.

    A pot with jobs is either in Scheduler.queued or with exactly one worker, which serves it. Only
    that worker writes `floor`, `failures`, `was_slow` and `due_at`, so these need no lock. The lock
    of Scheduler guards `jobs`.

    The introduction of this section has a table of the conditions of a pot.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs: list[Job] = []       # the oldest first; completed ones are removed later
        self.floor: int | None = None   # the highest ID issued or reported; None: not read yet
        self.failures = 0               # failed calls in a row, MAX_FAILURES at most
        self.was_slow = False           # see Store.was_slow
        # Point in time. An isolated pot is not served before it, and the one that has been due for
        # longest is served first. A pot that is handed out becomes due now, behind all the others.
        self.due_at = monotonic()

    @property
    def is_isolated(self) -> bool:
        """Whether the table may be locked: the last call failed or was slow, or there was none.

        The health check is never isolated, since it would wait behind the isolated pots.
        """
        may_be_locked = self.failures > 0 or self.was_slow or self.floor is None
        return may_be_locked and self.name != HEALTH_CHECK

    @property
    def is_suspect(self) -> bool:
        """Whether the next call must not wait for locks: another pot may be the cause."""
        return self.failures == 1 or (self.was_slow and self.failures == 0)

    def next_jobs(self) -> list[Job]:
        """Return the jobs to serve next: the first one, and those that share its call.

        The caller holds the lock of Scheduler.
        """
        if self.failures or self.was_slow:
            self.jobs.sort(key=lambda job: job.position)
        if not self.jobs:
            return []
        kind = self.jobs[0].operation.kind
        if kind in (OperationKind.CREATE, OperationKind.RAISE):
            return self.jobs[:1]
        return [job for job in self.jobs if job.operation.kind is kind]


Batch = dict[PotQueue, list[Job]]        # the pots of one call, each with the jobs that it serves


class Scheduler:
    """Decides which pots are served next. It knows all pots with jobs, and all that were read."""

    def __init__(self, can_serve_isolated: Callable[[], bool]) -> None:
        self._can_serve_isolated = can_serve_isolated   # whether an isolated pot may be served now
        self._lock = threading.Lock()       # guards this object and the jobs of the pots
        self.pots: dict[str, PotQueue] = {}     # by name
        self.queued: list[PotQueue] = []     # those with jobs that no worker serves; oldest first
        self._isolated_are_next = False     # isolated and healthy pots take turns

    def add(self, job: Job) -> None:
        """Queue a job."""
        name = job.operation.pot
        with self._lock:
            pot = self.pots.get(name)
            if not pot:
                pot = self.pots[name] = PotQueue(name)
            # A pot that a worker serves keeps the jobs of the batch. So an empty queue means that
            # no worker has the pot.
            if not pot.jobs:
                self.queued.append(pot)
            pot.jobs.append(job)

    def next_batch(self) -> Batch:
        """Hand out the pots to serve next. The calling worker has them until put_back().

        A batch is either one isolated pot, one pot with an operation other than a take, or up to
        MAX_BATCH_POTS healthy pots with takes. It is empty if nothing is due.
        """
        now = monotonic()
        batch: Batch = {}
        with self._lock:
            for pot in self._pick_candidates(now)[:MAX_BATCH_POTS]:
                self._remove_completed_jobs(pot)
                jobs = pot.next_jobs()
                is_take = not jobs or jobs[0].operation.kind is OperationKind.TAKE
                if batch and not is_take:
                    break       # it is the first of a later batch
                self.queued.remove(pot)
                pot.due_at = now
                if jobs:
                    batch[pot] = jobs
                if not is_take:
                    break
        return batch

    def _pick_candidates(self, now: float) -> list[PotQueue]:
        """Return the healthy pots, the oldest first; or, every other time, one isolated pot."""
        healthy = [pot for pot in self.queued if not pot.is_isolated]
        due = []
        if len(healthy) < len(self.queued) and self._can_serve_isolated():
            due = [pot for pot in self.queued if pot.is_isolated and pot.due_at <= now]
        self._isolated_are_next = not self._isolated_are_next
        if due and (self._isolated_are_next or not healthy):
            return [min(due, key=lambda pot: pot.due_at + pot.failures * FAILURE_PENALTY)]
        return healthy

    def _remove_completed_jobs(self, pot: PotQueue) -> None:
        """Remove jobs that were completed. Forget a pot that has no jobs and was never read.

        Clients may ask for any name, and the memory must not grow by that.
        """
        pot.jobs = [job for job in pot.jobs if job.waiters]
        if not pot.jobs and pot.floor is None:
            del self.pots[pot.name]

    def put_back(self, batch: Batch) -> None:
        """Take back the pots that next_batch() handed out."""
        with self._lock:
            for pot in batch:
                self._remove_completed_jobs(pot)
                if pot.jobs:
                    self.queued.append(pot)

    def seconds_until_due(self) -> float:
        """Return the time until a pot that waits is to be served, POLL_INTERVAL at most."""
        with self._lock:
            if not self.queued:
                return POLL_INTERVAL
            if any(not pot.is_isolated for pot in self.queued):
                return 0.0
            if not self._can_serve_isolated():
                return POLL_INTERVAL
            due_at = min([pot.due_at for pot in self.queued])
        return max(0.0, min(POLL_INTERVAL, due_at - monotonic()))

    def all_jobs(self) -> list[Job]:
        with self._lock:
            return [job for pot in self.pots.values() for job in pot.jobs]


NOT_BUSY = math.inf         # a point in time that never is in the past


class Worker(threading.Thread):
    """A thread that serves pots, with the store that it owns. It runs Allocator's methods.

    Only this thread writes `busy_since`; the main thread and the leader read it.
    """

    def __init__(self, store: Store, run_worker: "Callable[[Worker], None]") -> None:
        super().__init__(target=run_worker, args=(self,), daemon=True)
        self.store = store
        self.busy_since = NOT_BUSY      # when it began to serve its batch


class Leadership:
    """The right to read from clients and to start batches, which one thread has at a time.

    A worker waits in acquire() until nobody leads. The main thread may take the lead away from it
    at any time, so release() says whose lead is meant, and has no effect if that worker has lost it
    already. Otherwise a slow worker that comes back would release its successor's lead.
    """

    def __init__(self) -> None:
        self._lead_lock = threading.Lock()  # held as long as anybody leads
        self._guard = threading.Lock()      # makes "compare the leader, then release" one step
        # None means that nobody leads, or the main thread. A worker that has just acquired the lead
        # writes it without the guard, since release() has no effect before. The leader's busy_since
        # tells since when it has been in a call.
        self.leader: Worker | None = None

    def acquire(self, worker: Worker) -> None:
        """Wait until nobody leads, then lead."""
        self._lead_lock.acquire()
        self.leader = worker

    def release(self, worker: Worker) -> None:
        """End the worker's lead, if it still has it."""
        with self._guard:
            if self.leader is worker:
                self.leader = None
                self._lead_lock.release()

    def run_if_free(self, action: Callable[[], object]) -> None:
        """Run the action in this thread, which leads meanwhile, unless anybody leads."""
        if self._lead_lock.acquire(blocking=False):
            try:
                action()
            finally:
                self._lead_lock.release()


class Allocator:
    """The workers, and the pots that they serve.

    start() is given two functions of the server. handle_events(timeout) waits for events of
    clients, handles them, and adds the jobs of their requests; it returns whether it has added any.
    wake_up() makes it return at once.
    """

    def __init__(self, stores: Sequence[Store], hang_limit: float = 60.0) -> None:
        self._hang_limit = hang_limit       # seconds of one batch, after which a worker hangs
        self.workers = [Worker(store, self._run_worker) for store in stores]
        self._scheduler = Scheduler(self._can_serve_isolated)
        self._leadership = Leadership()
        # The workers write these without a lock. Each is one value, and any recent one will do.
        self._last_issued_pot = ""      # for the health check: the pot of the last take
        self._last_claimed_pot = ""     # the pot of the last attempt to take
        self._reconnect_at = 0.0        # point in time: no worker tries to connect before it
        self._is_stopped = False
        self.add = self._scheduler.add       # handle_events() calls it

    def start(
        self, handle_events: Callable[[float], bool], wake_up: Callable[[], object]
    ) -> None:
        """Start the workers. Raises RuntimeError if the system has no more threads."""
        self._handle_events = handle_events
        self._wake_up = wake_up
        for worker in self.workers:
            worker.start()

    def supervise(self, now: float) -> bool:
        """Keep requests being read. Return False if a worker hangs, which the watchdog must notice.

        The main thread calls this often. It takes the lead from a worker whose call takes too long,
        and handles the events itself if no worker is free to lead.
        """
        leader = self._leadership.leader
        if leader and leader.busy_since < now - LEADER_CALL_LIMIT:
            self._leadership.release(leader)
        self._leadership.run_if_free(lambda: self._handle_events(0))
        return min([worker.busy_since for worker in self.workers]) > now - self._hang_limit

    def stop(self) -> None:
        """Have the workers close their stores and end. Waits for them for a second at most."""
        self._is_stopped = True
        self._wake_up()
        for worker in self.workers:
            worker.join(1 / len(self.workers))

    def _can_serve_isolated(self) -> bool:
        """Whether one worker can lead, and one more is free; of up to three, all must be free."""
        busy = sum([worker.busy_since < NOT_BUSY for worker in self.workers])
        return busy < max(1, len(self.workers) - 2)

    def count_connections(self) -> int:
        return sum(worker.store.is_connected for worker in self.workers)

    # What a worker does, outermost level first. Unexpected exceptions reach end_process().

    def _run_worker(self, worker: Worker) -> None:
        """Wait for the lead, then read and serve, until the process stops."""
        while not self._is_stopped:
            if self._leadership.leader is not worker:
                self._leadership.acquire(worker)    # the process may have stopped meanwhile
            elif not worker.store.is_connected and any(
                    other.store.is_connected and other.busy_since == NOT_BUSY
                    for other in self.workers):
                # An idle worker that has a connection can serve at once, so let it lead instead.
                self._leadership.release(worker)
                time.sleep(0.01)        # gives it the time to acquire the lead
            else:
                self._read_and_serve(worker)
        self._leadership.release(worker)
        worker.store.close()

    def _read_and_serve(self, worker: Worker) -> None:
        """Read what clients have sent, then serve the next batch."""
        delay = 0.0
        if not worker.store.is_connected:
            delay = max(0.0, self._reconnect_at - monotonic())
        timeout = delay or self._scheduler.seconds_until_due()
        # To read until nothing more has arrived makes larger batches: 10 % more IDs/s (wrk -c64).
        while self._handle_events(timeout):
            timeout = 0.0
        batch = {} if delay else self._scheduler.next_batch()
        if batch:
            self._serve(worker, batch)

    def _serve(self, worker: Worker, batch: Batch) -> None:
        """Connect if that is necessary, serve a batch, and put its pots back."""
        store = worker.store
        worker.busy_since = monotonic()
        if next(iter(batch)).is_isolated:       # then it is the only pot: see next_batch()
            self._leadership.release(worker)
        try:
            store.connect()
            self._call_store(worker, batch)
        except IdpotError as error:     # of connect()
            # It concerns all jobs. IDs that another worker is just taking for some become a gap.
            if self.count_connections():
                error = Transient(str(error), error.detail)     # other workers can serve them
            self._fail_or_keep(store.subject, self._scheduler.all_jobs(), error)
            self._reconnect_at = monotonic() + RECONNECT_INTERVAL
        finally:
            self._scheduler.put_back(batch)
            worker.busy_since = NOT_BUSY
            if self._leadership.leader is not worker:
                self._wake_up()     # whoever reads now has to see the pots that are back

    def _call_store(self, worker: Worker, batch: Batch) -> None:
        """Run what the jobs of the batch ask for, and deal with a failure. Raises nothing."""
        pot, jobs = next(iter(batch.items()))       # mostly the only pot; else all jobs are takes
        try:
            if jobs[0].operation.kind is OperationKind.TAKE:
                self._take(worker.store, batch)
            else:
                result = self._run_operation(worker, pot, jobs[0].operation)
                for job in jobs:
                    job.complete(result)
        except IdpotError as error:
            # Exists is a normal result. Any other error isolates the pots: each costs a call.
            if not isinstance(error, Exists):
                for failed in batch:
                    failed.failures = min(failed.failures + 1, MAX_FAILURES)
            if len(batch) == 1:
                self._handle_pot_failure(worker.store, pot, jobs, error)
            else:       # any of the pots may be the cause: from now on each is tried by itself
                for jobs in batch.values():
                    self._count_retry(jobs, error)

    def _handle_pot_failure(
        self, store: Store, pot: PotQueue, jobs: list[Job], error: IdpotError
    ) -> None:
        """Decide what becomes of the jobs of a pot whose call failed."""
        if isinstance(error, Exhausted) and len(jobs) > 1:
            try:
                # Not all claims fit. Serve those that do, the smallest first: if one does not fit,
                # no greater one does. Jobs that are completed here stay so.
                for job in sorted(jobs, key=lambda job: job.operation.size):
                    self._take(store, {pot: [job]})
            except IdpotError as last_error:
                error = last_error
        # If the store is still connected, the pot is at fault: see Store.
        subject = store.subject
        if isinstance(error, (Transient, PotUnusable)) and store.is_connected:
            subject = f"pot {pot.name}"
        if isinstance(error, Transient):
            pot.due_at = monotonic() + 2**pot.failures * BACKOFF_UNIT
        self._fail_or_keep(subject, jobs, error)

    def _fail_or_keep(self, subject: str, jobs: list[Job], error: IdpotError) -> None:
        """Keep the jobs queued for another attempt if that may help, else fail them."""
        if isinstance(error, Unavailable):
            incidents.open(subject, error.detail)
        if isinstance(error, Transient):
            self._count_retry(jobs, error)
            for job in jobs:        # behind new jobs, of which some may succeed
                job.position = monotonic() + READ_ADVANTAGE
        else:
            for job in jobs:
                job.complete(error)

    def _count_retry(self, jobs: list[Job], error: IdpotError) -> None:
        """Count a retry for each job, and keep the reason for the message at its timeout."""
        metrics.add("idpot_db_retries_total", len(jobs))
        if isinstance(error, Transient):    # other errors may concern another pot of the batch
            for job in jobs:
                job.reason = f"{error}, tried for"

    def _take(self, store: Store, batch: Batch) -> None:
        """Take the IDs for all jobs of the batch in one call, and complete the jobs."""
        first = next(iter(batch))
        self._last_claimed_pot = first.name
        if first.floor is None:     # a pot that was never read is isolated, and so the only one
            first.floor = store.current(first.name)     # raises PotUnusable if it could repeat IDs
        claims = [Claim(pot.name, sum([job.operation.size for job in jobs]), pot.floor or 0)
                  for pot, jobs in batch.items()]
        last_ids = store.take(claims, nowait=first.is_suspect)      # then it is the only pot
        self._last_issued_pot = first.name
        metrics.add("idpot_db_statements_total", len(claims))
        metrics.add("idpot_ids_issued_total", sum([claim.size for claim in claims]))
        for pot, last_id in zip(batch, last_ids, strict=True):
            pot.floor = last_id
            pot.failures = 0
            pot.was_slow = store.was_slow and len(self.workers) > 1    # one worker gains nothing
            incidents.resolve(f"pot {pot.name}")
            # The last job gets the last IDs, so IDs rise in the order in which jobs arrived.
            for job in reversed(batch[pot]):
                job.complete(last_id)
                last_id -= job.operation.size

    def _run_operation(self, worker: Worker, pot: PotQueue, operation: Operation) -> Result:
        """Run an operation that is not a take, and return its result."""
        store = worker.store
        if operation.kind is OperationKind.LIST:
            return self._list_pots(worker)
        if operation.kind is OperationKind.CHECK:
            return self._check(store)
        if operation.kind is OperationKind.CREATE:
            value = store.create(pot.name, operation.minimum)
        elif operation.kind is OperationKind.RAISE:
            value = store.raise_to(pot.name, max(operation.minimum, pot.floor or 0))
        else:
            assert operation.kind is OperationKind.READ
            value = store.current(pot.name)
        if operation.kind is not OperationKind.READ:    # a locked pot can often be read
            incidents.resolve(f"pot {pot.name}")
        # No response shows less than this process has issued, and later IDs are above it.
        pot.floor = max(value, pot.floor or 0)
        return pot.floor

    def _list_pots(self, worker: Worker) -> str:
        lines = []
        for name, value in worker.store.pots():
            pot = self._scheduler.pots.get(name)    # without the lock: dict.get() is atomic
            floor = pot.floor if pot else None
            lines.append(f"{name}\t{'-' if value is None else max(value, floor or 0)}\n")
            worker.busy_since = monotonic()     # it makes progress: a long list is no hang
        return "".join(lines)

    def _check(self, store: Store) -> str:
        """Try the pot of the last take; if there was none, the pot of the last attempt.

        A probe has to get its response soon, so nothing is tried again.
        """
        try:
            store.check(self._last_issued_pot or self._last_claimed_pot)
        except Transient as error:
            raise ProbeFailed(str(error), error.detail)
        incidents.resolve(store.subject)
        return "ok"


# --------------------------------------------------------------------------------- service manager
#
# How idpot talks to the program that has started it: systemd, or Server::Starter, which restarts
# servers without closing their sockets (its program is start_server).

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def notify_systemd(state: str) -> None:
    """Send systemd a state such as READY=1, as sd_notify(3) does, if it asked for that."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        address = re.sub("^@", "\0", path)      # "@" stands for an abstract socket
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), socket.MSG_DONTWAIT, address)     # never wait


def inherited_descriptors() -> list[int]:
    """Return the sockets that Server::Starter or systemd (sd_listen_fds(3)) have opened for idpot.

    Raises ValueError if a variable of the environment is malformed.
    """
    # Server::Starter's entries are host:port=descriptor or path=descriptor; a path may contain "=".
    entries = os.environ.get("SERVER_STARTER_PORT", "").split(";")
    descriptors = [int(entry.rpartition("=")[2]) for entry in entries if entry]
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        descriptors += range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))
    return descriptors


def open_listener(address: Address) -> socket.socket:
    """Return the socket that was handed over, or else a new one that listens on the address.

    It does not block, because another process may accept a connection first. Raises IdpotError.
    """
    host, port = address
    try:
        descriptors = inherited_descriptors()
        if len(descriptors) > 1:
            raise IdpotError(f"{len(descriptors)} sockets were handed over, but one is served: "
                             "begin the drop-in of the socket unit with an empty ListenStream=")
        if descriptors:
            listener = socket.socket(fileno=descriptors[0])
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise IdpotError("the socket that was handed over does not listen")
            if address != DEFAULT_LISTEN:
                log.warning("Listen, %s:%d, is not used: a socket was handed over", host, port)
        else:
            both = not host and socket.has_dualstack_ipv6()     # IPv6 and IPv4
            family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
            listener = socket.create_server(
                address, family=family, backlog=1024, dualstack_ipv6=both)
        listener.setblocking(False)
        return listener
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise IdpotError(f"cannot listen on {host}:{port}: {reason}")


# ------------------------------------------------------------------------------------ HTTP parsing
#
# What the bytes of a request say, as strictly as RFC 9112 allows. These are pure functions of the
# bytes: they do no I/O, and they know neither connections nor routes. Each raises BadRequest or
# HttpError with the text of the response.

MAX_REQUEST_LINE = 8192     # bytes, then 414
MAX_HEAD = 16384            # bytes of the request line and all header fields, then 431
MAX_BODY = 65536            # bytes, then 413
MAX_CHUNK_OVERHEAD = 8192   # bytes of the size lines and trailers of a chunked body, then 413
CHUNK_LINE_COST = 8         # bytes that are added for each of these lines: many short lines take
                            # longer to parse than a few long ones

TOKEN_PATTERN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN_PATTERN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n")
FIELD_LINE = TOKEN_PATTERN + rb":[\t -~\x80-\xff]*\r\n"
HEAD_PATTERN = re.compile(REQUEST_LINE.pattern + b"((?:" + FIELD_LINE + rb")*)\r\n")
FIELD_PARTS = re.compile(rb"([^:\r\n]+):([^\r\n]*)\r\n")
CHUNK_SIZE_LINE = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})(?:[\t ]*;[\t -~\x80-\xff]*)?\r\n")
TRAILER_LINE = re.compile(FIELD_LINE + rb"|\r\n")
HOST_PATTERN = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
ABSOLUTE_FORM = re.compile(rb"(?i)\Ahttps?://(?=[^/?:])" + HOST_PATTERN.pattern + b"(?=[/?]|$)")
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
FORM = b"application/x-www-form-urlencoded"


class RequestHead(NamedTuple):
    """What the request line and the header fields of a request say."""
    method: str
    target: bytes
    is_http10: bool             # else it is HTTP/1.1
    path: str                   # of the target, not decoded
    query: str
    keep_alive: bool            # the client wants the connection to stay open
    content_length: int | None  # of the body in bytes; None: it is chunked
    expects_continue: bool      # the client waits for 100 Continue before it sends the body
    media_type: bytes           # of the body, in lower case, without parameters; FORM by default
    bearer_token: bytes         # b"" if there is none
    has_origin: bool            # a web page sends the request
    referer: bytes
    user_agent: bytes


def parse_target(target: bytes) -> tuple[str, str]:
    """Return the path and the query of a request target (RFC 9112, 3.2).

    Nothing in the path is percent-decoded. The name of a pot needs no "%", and a proxy in front may
    have applied its rules to the path as it stands.
    """
    origin_form, is_absolute = ABSOLUTE_FORM.subn(b"", target)
    if is_absolute and not origin_form.startswith(b"/"):
        origin_form = b"/" + origin_form
    if not origin_form.startswith(b"/") or b"#" in origin_form:
        raise BadRequest(f"{quoted(target)} is not a request target")
    path, _, query = origin_form.decode("ascii").partition("?")
    return path, query


def parse_fields(lines: bytes) -> dict[bytes, bytes]:
    """Return the values of the header fields by their name in lower case.

    Fields of the same name are joined by commas (RFC 9110, 5.3). A second Host, Content-Length,
    Transfer-Encoding or Authorization thereby becomes a malformed value.
    """
    fields: dict[bytes, bytes] = {}
    for name, value in FIELD_PARTS.findall(lines):
        name = name.lower()
        value = value.strip(b" \t")
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def parse_content_length(fields: Mapping[bytes, bytes], is_http10: bool) -> int | None:
    """Return the length of the body in bytes, or None if the body is chunked (RFC 9112, 6)."""
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        if is_http10 or b"content-length" in fields:
            raise BadRequest("Transfer-Encoding excludes Content-Length and HTTP/1.0")
        if coding.lower() != b"chunked":
            raise HttpError(501, f"Transfer-Encoding {quoted(coding)} is not chunked")
        return None
    length = fields.get(b"content-length", b"0")
    if not re.fullmatch(b"[0-9]{1,19}", length):
        raise BadRequest(f"Content-Length {quoted(length)} is not a number")
    if int(length) > MAX_BODY:
        raise HttpError(413, f"the body is longer than {MAX_BODY} bytes")
    return int(length)


def check_head_so_far(data: bytes) -> None:
    """Raise an error if data, the beginning of a head or all of it, cannot become a valid head."""
    line_end = data.find(b"\n") + 1
    if (line_end or len(data)) > MAX_REQUEST_LINE:
        raise HttpError(414, "the request line is too long")
    if data.count(b"\n") > data.count(b"\r\n"):
        raise BadRequest("a line ends in a bare LF")
    if line_end and not REQUEST_LINE.match(data):
        raise BadRequest(f"{quoted(data[:line_end].strip())} is not a request line")
    if len(data) > MAX_HEAD:
        raise HttpError(431, "the header is too long")


def parse_head(data: bytes) -> RequestHead:
    """Return what a complete head says, which ends with an empty line."""
    check_head_so_far(data)
    match = HEAD_PATTERN.fullmatch(data)
    if not match:
        raise BadRequest("a header line is malformed")
    method, target, version, lines = match.groups()
    if version not in (b"1.1", b"1.0"):
        raise HttpError(505, f"HTTP/{version.decode()} is not supported")
    is_http10 = version == b"1.0"
    fields = parse_fields(lines)
    content_length = parse_content_length(fields, is_http10)
    # HTTP/1.1 requires Host (RFC 9112, 3.2), though its value may be empty.
    is_host_missing = b"host" not in fields and not is_http10
    if is_host_missing or not HOST_PATTERN.fullmatch(fields.get(b"host", b"")):
        raise BadRequest("header Host is missing or malformed")
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise HttpError(417, "Expect is understood as 100-continue only")
    options = re.findall(TOKEN_PATTERN, fields.get(b"connection", b"").lower())
    scheme, _, credentials = fields.get(b"authorization", b"").partition(b" ")
    path, query = parse_target(target)
    return RequestHead(
        method=method.decode(),
        target=target,
        is_http10=is_http10,
        path=path,
        query=query,
        keep_alive=b"close" not in options and (not is_http10 or b"keep-alive" in options),
        content_length=content_length,
        expects_continue=b"expect" in fields and not is_http10,
        media_type=fields.get(b"content-type", FORM).split(b";")[0].strip().lower(),
        bearer_token=credentials.strip() if scheme.lower() == b"bearer" else b"",
        has_origin=b"origin" in fields,
        referer=fields.get(b"referer", b"-"),
        user_agent=fields.get(b"user-agent", b"-"),
    )


def parse_chunked_body(data: bytes, begin: int) -> tuple[bytes | None, int]:
    """Return the content of a chunked body (RFC 9112, 7.1), and where it ends in the data.

    If it is not complete, returns None, and the length that the data must have before it is worth
    parsing again. Extensions and trailers are ignored.

    The pattern of a size line begins with the CRLF that ends the chunk before it. The first one has
    the CRLF of the empty line that ends the head, hence `begin - 2`.
    """
    content = b""
    overhead = 0
    pattern = CHUNK_SIZE_LINE       # of the next line; after the last chunk TRAILER_LINE
    position = begin - 2
    while position <= len(data):
        match = pattern.match(data, position)
        line_end = match.end() if match else len(data)
        overhead += line_end - position + CHUNK_LINE_COST
        if overhead > MAX_CHUNK_OVERHEAD:
            raise HttpError(413, "the size lines or trailers of the body are too long")
        if not match:
            if b"\n" in data[position:].removeprefix(b"\r\n"):
                raise BadRequest(
                    f"{quoted(data[position:])} is neither a chunk size line nor a trailer")
            break       # the line is not complete
        position = line_end
        if pattern is CHUNK_SIZE_LINE:
            size = int(match[1], 16)
            if len(content) + size > MAX_BODY:
                raise HttpError(413, f"the body is longer than {MAX_BODY} bytes")
            content += data[position:position + size]
            position += size
            if size == 0:
                pattern = TRAILER_LINE
        elif match[0] == b"\r\n":
            return content, position
    # The next line begins at `position`, which may lie beyond the data; one byte more is needed.
    return None, max(position, len(data) + 1)


# --------------------------------------------------------------------------------------------- API
#
# ROUTES says what idpot does: a request is dispatched to a route, which builds an Operation from
# the name of the pot and the form fields. Nothing here knows connections or stores.

HEALTH_TIMEOUT = 1.7        # seconds; with 0.2 s between checks of deadlines it is below 2 s
MAX_CACHED_HEAD = 1024      # bytes of a head
MAX_CACHED_BODY = 128       # bytes of a form
UNKNOWN = "other"           # the label of a method or a path that idpot does not know


def format_nothing(operation: Operation, result: Result) -> bytes:
    return b""


def format_created(operation: Operation, result: Result) -> bytes:
    return b"Created new pot"


def format_lines(operation: Operation, result: Result) -> bytes:
    """All IDs of a take, one on each line."""
    end = int(result) + 1
    return b"".join([b"%d\n" % one for one in range(end - operation.size, end)])


def format_range(operation: Operation, result: Result) -> bytes:
    """The first and the last ID of a take."""
    last_id = int(result)
    return b"%d\t%d\n" % (last_id - operation.size + 1, last_id)


Fields = Mapping[str, str]


def build_take(pot: str, fields: Fields) -> Operation:
    if len(fields) > 1:
        raise BadRequest("count and range exclude each other")
    if "range" in fields:
        count = parse_integer(fields["range"], 1, MAX_RANGE, "range")
        return Operation(OperationKind.TAKE, pot, count, format_body=format_range)
    if "count" in fields:
        count = parse_integer(fields["count"], 1, MAX_COUNT, "count")
        return Operation(OperationKind.TAKE, pot, count, format_body=format_lines)
    return Operation(OperationKind.TAKE, pot, size=1)


def build_read(pot: str, fields: Fields) -> Operation:
    return Operation(OperationKind.READ, pot)


def build_exists(pot: str, fields: Fields) -> Operation:
    return Operation(OperationKind.READ, pot, status=204, format_body=format_nothing)


def parse_name_and_min(fields: Fields, default_min: str) -> tuple[str, int]:
    name = fields.get("name", "")
    if not POT_NAME.fullmatch(name):
        raise BadRequest(f"name {quoted(name)} is not 1 to 60 characters of A-Z a-z 0-9 _ -")
    return name, parse_integer(fields.get("min", default_min), 0, MAX_ID, "min")


def build_create(pot: str, fields: Fields) -> Operation:
    name, minimum = parse_name_and_min(fields, "0")
    return Operation(
        OperationKind.CREATE, name, minimum=minimum, status=201, format_body=format_created)


def build_raise(pot: str, fields: Fields) -> Operation:
    name, minimum = parse_name_and_min(fields, "")
    return Operation(OperationKind.RAISE, name, minimum=minimum)


def build_list(pot: str, fields: Fields) -> Operation:
    return Operation(OperationKind.LIST, ALL_POTS)


def build_health_check(pot: str, fields: Fields) -> Operation:
    return Operation(OperationKind.CHECK, HEALTH_CHECK, timeout=HEALTH_TIMEOUT)


def build_metrics(pot: str, fields: Fields) -> Operation:
    return Operation(OperationKind.METRICS, "")


class Route(NamedTuple):
    """One method of one path.

    404, 405 and its Allow field, 400 for unknown form fields, authorization, and the labels of the
    metrics all follow from this table. HEAD is served as GET. {pot} must be the last segment of the
    path: see match_path().
    """
    method: str
    path: str
    build: Callable[[str, Fields], Operation]   # of the pot in the path, and the form fields
    fields: tuple[str, ...] = ()                # the names of the form fields that it accepts
    needs_admin: bool = False                   # AdminToken is needed, if it is set, not Token
    is_public: bool = False                     # no token is needed


ROUTES = [
    Route("GET", "/id/{pot}", build_read),
    Route("POST", "/id/{pot}", build_take, fields=("count", "range")),
    Route("GET", "/pot/{pot}", build_exists),
    Route("GET", "/pot/create", build_exists),      # a pot may have this name; see match_path()
    Route("POST", "/pot/create", build_create, fields=("name", "min"), needs_admin=True),
    Route("GET", "/pot/raise", build_exists),       # and this one
    Route("POST", "/pot/raise", build_raise, fields=("name", "min"), needs_admin=True),
    Route("GET", "/pot", build_list),
    Route("GET", "/healthz", build_health_check, is_public=True),
    Route("GET", "/metrics", build_metrics),
]
ROUTES_BY_PATH: dict[str, dict[str, Route]] = {}       # path -> method -> route
for _route in ROUTES:
    ROUTES_BY_PATH.setdefault(_route.path, {})[_route.method] = _route


def match_path(path: str) -> tuple[str, str]:
    """Return the path of a route and the pot in it; UNKNOWN if no route has that path.

    A literal path such as /pot/create has precedence over /pot/{pot}.
    """
    parent, _, pot = path.rpartition("/")
    if path in ROUTES_BY_PATH and "{" not in path:
        return path, pot
    template = parent + "/{pot}"
    if template in ROUTES_BY_PATH and POT_NAME.fullmatch(pot):
        return template, pot
    return UNKNOWN, ""


class RoutedHead:
    """A request head with all that follows from it alone. It is shared by all connections.

    `operations` caches the operations of short bodies. Several threads may add to it at once: each
    adds a complete entry, and any of two equal ones will do. Nothing else is written.
    """

    def __init__(self, data: bytes) -> None:
        head = self.head = parse_head(data)
        self.route_path, self.pot = match_path(head.path)
        self.methods = ROUTES_BY_PATH.get(self.route_path, {})
        self.route = self.methods.get("GET" if head.method == "HEAD" else head.method)
        self.operations: dict[bytes, Operation] = {}
        method = head.method if head.method in ("GET", "HEAD", "POST") else UNKNOWN
        self.metric_labels = f'route="{self.route_path}",method="{method}"'
        # The access line: what comes before the status and the length, and what comes after them.
        version = "HTTP/1.0" if head.is_http10 else "HTTP/1.1"
        self.logged_request = f"{head.method} {escape_for_log(head.target)} {version}"
        self.logged_client = (
            f'"{escape_for_log(head.referer)}" "{escape_for_log(head.user_agent)}"')


# Most clients send the same head again and again. parse_request() uses the cache for heads up to
# MAX_CACHED_HEAD bytes, so that long ones cannot fill the memory.
cached_head = functools.lru_cache(maxsize=2048)(RoutedHead)

# Stands for the head of a request that could not be parsed.
UNREADABLE = RoutedHead(b"UNREADABLE / HTTP/1.0\r\n\r\n")
UNREADABLE.logged_request = "-"


def authorize(routed: RoutedHead, settings: Settings) -> None:
    """Raise Unauthorized or Forbidden if the request lacks the bearer token that it needs."""
    needs_admin = routed.route and routed.route.needs_admin
    token = (settings.admin_token if needs_admin else settings.token).encode()
    if token and hmac.compare_digest(token, routed.head.bearer_token):
        return
    # Against cross-site request forgery: a page could use up a pot in the network of its visitor.
    if routed.head.has_origin:
        raise Forbidden("a request from a web page (it has an Origin) needs the bearer token")
    # With an unknown path there are no methods, and so nothing to protect.
    if token and not all(route.is_public for route in routed.methods.values()):
        is_wrong = bool(routed.head.bearer_token)
        raise Unauthorized("the bearer token is wrong" if is_wrong else "a bearer token is needed")


def parse_form(routed: RoutedHead, body: bytes) -> dict[str, str]:
    """Return the fields of the query and of the body (URL Standard, 5.1).

    Raises BadRequest for a field that the path does not have, or that is given twice.
    """
    text = routed.head.query
    is_post = routed.head.method == "POST"
    if body and is_post:        # with other methods a body has no meaning
        if routed.head.media_type != FORM:
            raise HttpError(
                415, f"the body is {quoted(routed.head.media_type)}, not {FORM.decode()}")
        text += "&" + body.decode("latin-1")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise BadRequest("the form is not UTF-8, or has too many fields")
    post = routed.methods.get("POST")       # no other method has fields
    known = post.fields if post else ()
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name not in known:
            expected = "the fields here are " + " and ".join(known) if known else "it takes none"
            raise BadRequest(f"unknown field {quoted(name)}: {expected}")
        if not is_post:
            raise BadRequest(f'field "{name}" is for POST')
        if name in fields:
            raise BadRequest(f'field "{name}" is given twice')
        fields[name] = value
    return fields


def dispatch(routed: RoutedHead, body: bytes, settings: Settings) -> Operation:
    """Return the operation that a request asks for, or raise the error to respond with."""
    # This comes first, so that the cache cannot let anybody in. If Token is set, so is admin_token:
    # see load_settings().
    if settings.admin_token or routed.head.has_origin:
        authorize(routed, settings)
    cached = routed.operations.get(body)
    if cached:
        return cached
    if not routed.methods:
        raise NotFound(f"there is nothing at {quoted(routed.head.path)}")
    if not routed.route:
        allowed = ", ".join(routed.methods).replace("GET", "GET, HEAD")
        raise HttpError(405, f"{routed.head.method:.20} is not allowed here, but {allowed}",
                        header=f"Allow: {allowed}\r\n")
    fields = parse_form(routed, body) if body or routed.head.query else {}
    operation = routed.route.build(routed.pot, fields)
    if len(body) <= MAX_CACHED_BODY and len(routed.operations) < 16:
        routed.operations[body] = operation
    return operation


# ------------------------------------------------------------------------------------- connections
#
# Ownership. Every connection is registered with one epoll instance, using EPOLLONESHOT. The kernel
# reports an event to one thread, and disarms the connection until it is armed again. That thread
# owns the connection until it re-arms it or hands it to a job; so connections need no lock.
#
# The life of a request. The kernel reports new connections to the leader, too, which accepts them.
# It receives what the client has sent into the buffer of the connection. As soon as that holds a
# complete request, it is dispatched, and its job is added to the allocator. Whoever completes the
# job owns the connection from then on: mostly the leader after its call, or the main thread at the
# timeout. It sends the response without waiting for the client, and re-arms the connection. The
# next request of the client is not parsed before that, so responses leave in order. What the
# client does not accept at once is kept, and sent when the kernel reports that it is writable.
#
# The state. The owner replaces `state`, a pair of the phase and the point in time when it began.
# The main thread reads it, in order to enforce deadlines:
#
#   IDLE        the client has not begun its next request
#   READING     a part of a request has arrived
#   WAITING     a job waits for the database; the time is that of the request's arrival
#   SENDING     the client has not accepted all of the response
#   LINGERING   the last response was sent. What the client still sends is read and dropped for a
#               while: to close a socket with unread input could destroy the response on its way
#               (RFC 9112, 9.6)
#
# Deadlines. The main thread does not own connections, so it closes none. It times out a job, which
# sends the 503; or it calls abort(), which shuts the socket down (shutdown(2)). The kernel reports
# that as an event, and the thread that gets the event owns the connection and closes it.
#
#   Phase            armed for   abort() shuts down   and the event is
#   IDLE, READING,   reading     reading              EPOLLIN: recv() returns what has arrived, then
#   LINGERING                                         nothing
#   IDLE, with the   writing     both directions      EPOLLOUT with EPOLLHUP
#   next request in
#   the buffer
#   SENDING          writing     both directions      EPOLLOUT with EPOLLHUP: send() fails
#   WAITING          nothing     reading              none: the 503 is sent first

SERVICE_INTERVAL = 0.2      # seconds between two checks of all deadlines, in service_actions()
DRAIN_GRACE = 0.5           # seconds that a client has during a shutdown to send a request
LINGER_TIMEOUT = 2.0        # seconds in the phase LINGERING
MIN_EVICTION_AGE = 0.1      # seconds; a younger phase is not ended to make room for a newcomer
RECEIVE_SIZE = 16384        # bytes
READABLE = select.EPOLLIN | select.EPOLLONESHOT
WRITABLE = select.EPOLLOUT | select.EPOLLONESHOT

Phase = Literal["idle", "reading", "waiting", "sending", "lingering"]
IDLE: Final = "idle"
READING: Final = "reading"
WAITING: Final = "waiting"
SENDING: Final = "sending"
LINGERING: Final = "lingering"
# Two plain tuples instead of classes, for speed: a request makes four of them within 16 us. A tuple
# takes 0.04 us and a NamedTuple 0.15 (python3.13 -m timeit).
State = tuple[Phase, float]         # the phase, and when it began
# A response that was sent, for the access log and the metrics: the host of the client, the head of
# the request, the status, the bytes of the body that were sent, the seconds since the request came.
AccessEntry = tuple[str, RoutedHead, int, int, float]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PLAIN_TEXT = "text/plain; charset=utf-8"
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@functools.lru_cache(maxsize=256)
def response_head(status: int, media_type: str, fields: str, length: int) -> bytes:
    """Return the head of a response.

    Because of its Date the cache is cleared every SERVICE_INTERVAL seconds.
    """
    phrase = http.HTTPStatus(status).phrase
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    if status != 204:       # RFC 9110, 8.6
        fields = f"Content-Type: {media_type}\r\n{fields}Content-Length: {length}\r\n"
    return (f"HTTP/1.1 {status} {phrase}\r\nCache-Control: no-store\r\nDate: {date}\r\n"
            f"{fields}\r\n").encode()


class Connection:
    """A client's connection. The beginning of this section describes its life.

    Only the owner calls its methods and writes its attributes. The exceptions are abort() and
    enforce_deadline(): the main thread calls them for any connection, and the leader calls abort()
    for the one that makes room for a new one.
    """

    def __init__(self, client: socket.socket, address: object, server: "Server") -> None:
        client.setblocking(False)
        # The access log needs an IP address; a client on a Unix socket is local.
        host = str(address[0]) if isinstance(address, tuple) else "127.0.0.1"
        self.host = host.removeprefix("::ffff:")        # an IPv4 client of a dual-stack socket
        self.socket = client
        self.descriptor = client.fileno()
        self.server = server
        self.state: State = (IDLE, monotonic())
        self.job: Job | None = None     # in the phase WAITING; set before the phase
        self.received = b""             # and not parsed yet
        self.bytes_needed = 0           # length of `received` from which on parsing is worth a try
        self.has_sent_continue = False  # for the current request
        self.routed = UNREADABLE        # the head of the current request
        self.unsent = b""               # the rest of the response in the phase SENDING
        self.keep_alive = True          # in the phase SENDING: the connection is to stay open
        self.was_aborted = False        # abort() has shut the socket down
        server.connections[self.descriptor] = self
        try:
            server.epoll.register(self.descriptor, READABLE)
        except OSError:     # the kernel has no memory left for it
            self.close()

    def handle_event(self, events: int) -> None:
        """Go on with the connection that the kernel has reported to this thread."""
        phase, since = self.state
        try:
            if phase == SENDING:
                unsent, self.unsent = self.unsent, b""
                self.send(unsent, self.keep_alive, since)
            elif events & select.EPOLLHUP and events & select.EPOLLOUT:
                self.close()            # abort() has shut it down in both directions
            elif events & select.EPOLLOUT:
                self.read_request()     # send() asked for this event: there is more in the buffer
            else:
                data = self.socket.recv(RECEIVE_SIZE)
                if data and phase != LINGERING:
                    self.received += data
                    self.read_request()
                elif data:
                    self.rearm(READABLE)
                elif phase == LINGERING or not self.received:
                    self.close()
                elif self.was_aborted:      # by the main thread, within a request
                    self.send_error(HttpError(408, "the request did not arrive in time"), False)
                else:                       # by the client, within a request
                    self.send_error(BadRequest("the request is cut off"), False)
        except BlockingIOError:     # recv() found nothing after all
            self.rearm(READABLE)
        except OSError:             # the client has gone
            self.close()

    def read_request(self) -> None:
        """Dispatch the request in the buffer, if it is complete."""
        phase, since = self.state
        arrived_at = since if phase == READING else monotonic()
        self.state = (READING, arrived_at)
        self.routed = UNREADABLE
        keep_alive = False      # as long as it is not known where the next request begins
        try:
            body = self.parse_request()
            if body is None:
                self.rearm(READABLE)
                return
            keep_alive = self.routed.head.keep_alive
            operation = dispatch(self.routed, body, self.server.settings)
            if operation.kind is OperationKind.METRICS:
                text = self.server.render_metrics()
                self.send_response(200, text, keep_alive, media_type=PROMETHEUS_TEXT)
                return
            job = Job(operation, self, operation.timeout or self.server.settings.timeout)
            # As soon as the job is added, another thread may complete it and own the connection.
            self.job = job
            self.state = (WAITING, arrived_at)
            self.server.allocator.add(job)
        except IdpotError as error:
            self.send_error(error, keep_alive)
        except OSError:
            raise
        except Exception:       # a fault of idpot
            log.exception("request from %s", self.host)
            self.send_error(IdpotError("internal error"), False)

    def parse_request(self) -> bytes | None:
        """Remove a complete request from the buffer; set its head and return its body.

        Returns None if it is not complete.
        """
        if self.received.startswith(b"\r\n"):       # empty lines before it (RFC 9112, 2.2)
            self.received = EMPTY_LINES.sub(b"", self.received, count=1)
        data = self.received
        if len(data) < self.bytes_needed:
            return None
        begin = data.find(b"\r\n\r\n") + 4       # of the body
        if begin < 4:
            check_head_so_far(data)
            return None
        self.routed = (cached_head if begin <= MAX_CACHED_HEAD else RoutedHead)(data[:begin])
        head = self.routed.head
        if head.content_length is None:
            content, end = parse_chunked_body(data, begin)
        else:
            end = begin + head.content_length
            content = data[begin:end] if len(data) >= end else None
        if content is None:
            if head.expects_continue and not self.has_sent_continue:
                self.has_sent_continue = True
                with suppress(BlockingIOError):     # the client need not wait (RFC 9110, 10.1.1)
                    if self.socket.send(CONTINUE) < len(CONTINUE):
                        raise ConnectionError("only a part of it was sent")
            self.bytes_needed = end
            return None
        self.received = data[end:]
        self.bytes_needed = 0
        self.has_sent_continue = False
        return content

    def on_complete(self, operation: Operation, outcome: Result | IdpotError) -> None:
        """Send the response to a job. The thread that has completed it owns the connection now."""
        keep_alive = self.routed.head.keep_alive
        if isinstance(outcome, IdpotError):
            self.send_error(outcome, keep_alive)
        else:
            body = operation.format_body(operation, outcome)
            self.send_response(operation.status, body, keep_alive)

    def send_error(self, error: IdpotError, keep_alive: bool) -> None:
        self.send_response(error.status, f"{error}\n".encode(), keep_alive, error.header)

    def send_response(
        self, status: int, body: bytes, keep_alive: bool, fields: str = "",
        media_type: str = PLAIN_TEXT
    ) -> None:
        """Send a response, and close the connection after it unless it is to be kept alive."""
        head = self.routed.head
        keep_alive = keep_alive and not self.server.is_stopping
        if not keep_alive:
            fields += "Connection: close\r\n"
        elif head.is_http10:
            fields += "Connection: keep-alive\r\n"
        sent_body = b"" if head.method == "HEAD" else body
        now = monotonic()
        # It is counted before it is sent: whoever has the response finds it in the metrics.
        self.server.responses.append(
            (self.host, self.routed, status, len(sent_body), now - self.state[1]))
        self.job = None
        self.send(
            response_head(status, media_type, fields, len(body)) + sent_body, keep_alive, now)

    def send(self, data: bytes, keep_alive: bool, since: float) -> None:
        """Send what the client accepts now, and re-arm the connection for what comes next.

        `since` is the point in time when the sending of the response began.
        """
        try:
            sent = self.socket.send(data)
        except BlockingIOError:     # the client has to receive earlier responses first
            sent = 0
        except OSError:             # it has gone: whatever else it has sent is not served
            self.close()
            return
        if sent < len(data):
            self.unsent = data[sent:]
            self.keep_alive = keep_alive
            self.state = (SENDING, since)
            self.rearm(WRITABLE)
        elif keep_alive:
            self.state = (IDLE, monotonic())
            # If the buffer holds more, nothing may come that the kernel could report. But the
            # socket is writable, so the event comes at once.
            self.rearm(WRITABLE if self.received else READABLE)
        else:
            self.state = (LINGERING, monotonic())
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            self.rearm(READABLE)

    def rearm(self, events: int) -> None:
        """End the ownership: the next event may be reported to another thread at once.

        The caller must not touch the connection after this.
        """
        self.server.epoll.modify(self.descriptor, events)

    def close(self) -> None:
        """Close the connection. The owner does this once, and does not re-arm it."""
        # It is removed first, because a new connection may get the same descriptor.
        del self.server.connections[self.descriptor]
        self.socket.close()

    def abort(self) -> None:
        """Time out the job, if there is one, and have the owner close the connection soon.

        The table at the head of this section says which event tells the owner.

        The owner may replace `state` meanwhile. At worst a client is cut off that has just become
        active.
        """
        phase, _ = self.state
        job = self.job
        if phase == WAITING and job:
            job.time_out()
        self.was_aborted = True
        is_armed_for_writing = phase == SENDING or phase == IDLE and self.received
        with suppress(OSError):     # it was just closed
            self.socket.shutdown(socket.SHUT_RDWR if is_armed_for_writing else socket.SHUT_RD)

    def enforce_deadline(self, now: float) -> None:
        """Time out the job, or abort the connection, if its phase lasts too long."""
        phase, since = self.state
        job = self.job
        server = self.server
        if phase == WAITING:
            # The owner may have replaced the job since `state` was read. Any job has its deadline.
            if job and now > min(job.deadline, server.jobs_end_at):
                job.time_out()
        elif now > max(since, server.stopped_at) + server.limits[phase]:
            self.abort()


class Server(http.server.ThreadingHTTPServer):
    """Accepts and bounds connections, and does in the main thread what has to be done regularly.

    The base class contributes the handling of the listening socket (get_request, fileno,
    server_close) and the hook service_actions, which does what its documentation says. Its
    serve_forever, and with it process_request and RequestHandlerClass, is not used, since the
    workers accept and read; the main thread has a loop of its own, in serve().

    Why not a thread for each client? Version 2.2 had that. 5,000 idle clients took 117 MB, where
    3.0 takes 34 (with SQLite). One client got 1.9 times the rate of go-idpot, and gets 3.1 times,
    because handing a request from a client's thread to a worker and back costs two context
    switches. (These are figures of contrib/bench.py on two cores.)
    """

    def __init__(
        self, settings: Settings, listener: socket.socket, allocator: Allocator
    ) -> None:
        super().__init__(("", 0), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        if listener.family != socket.AF_UNIX:
            # Connections inherit it: without it the kernel delays the second of two small packets.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.settings = settings
        self.allocator = allocator
        # Responses wait here until they are counted and logged, many at once: one by one costs a
        # tenth of the speed (wrk -c64). A deque may be used by several threads without a lock.
        self.responses: collections.deque[AccessEntry] = collections.deque()
        self._responses_lock = threading.Lock()     # only one thread at a time empties the deque
        # By descriptor. Owners add and remove connections while other threads copy the dict to a
        # list: in CPython both are atomic.
        self.connections: dict[int, Connection] = {}
        self.epoll = select.epoll()
        self.epoll.register(listener, select.EPOLLIN)
        wakeup = os.eventfd(0, os.EFD_CLOEXEC)
        # With EPOLLET it is reported once for each write, and need not be read.
        self.epoll.register(wakeup, select.EPOLLIN | select.EPOLLET)
        self.wake_up = functools.partial(os.eventfd_write, wakeup, 1)   # ends handle_events()
        self.is_stopping = False
        self.stopped_at = -math.inf     # when the shutdown began; -inf: it has not begun
        self.jobs_end_at = math.inf     # point in time: the end of all jobs at a shutdown
        # How many seconds a phase may last. drain() shortens them, and counts from its own start.
        self.limits: dict[Phase, float] = {
            IDLE: settings.idle_timeout, READING: settings.request_timeout,
            SENDING: settings.idle_timeout, LINGERING: LINGER_TIMEOUT}
        max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        reserved = len(allocator.workers) + 16      # database, logs, /proc, and one client more
        self._max_connections = max(1, min(settings.max_connections, max_files - reserved))
        self._serviced_at = 0.0         # when service_actions() last did everything

    def handle_events(self, timeout: float) -> bool:
        """Accept and go on with the connections that the kernel reports, as the leader.

        Waits up to `timeout` seconds for the first event. Returns whether a job was added.
        """
        # No event is out of date. Only the owner closes a connection, and with EPOLLONESHOT that is
        # the thread that the event is reported to.
        has_job = False
        can_accept = False
        for descriptor, events in self.epoll.poll(timeout):
            connection = self.connections.get(descriptor)
            if connection:
                connection.handle_event(events)
                # Its job may be completed already. Then the caller looks for a batch in vain.
                has_job |= connection.state[0] == WAITING
            elif descriptor == self.fileno():       # anything else is the wakeup
                can_accept = True
        if can_accept:      # only now, when connections that make room have been closed
            self.accept_connections()
        if len(self.responses) > 500:
            self.log_responses()
        return has_job

    def accept_connections(self) -> None:
        """Accept all connections that wait.

        If there are more than allowed then, the connection that has been in its phase for longest
        makes room, even if it waits for the database: then its job is timed out. If all are young,
        accepting stops until service_actions() resumes it.
        """
        try:
            for _ in range(self._max_connections + 1 - len(self.connections)):
                Connection(*self.get_request(), self)
        except BlockingIOError:     # no more of them wait
            return
        except OSError:             # no descriptor is left
            pass
        oldest = min(list(self.connections.values()), default=None,
                     key=lambda connection: connection.state[1])
        if oldest and oldest.state[1] < monotonic() - MIN_EVICTION_AGE:
            oldest.abort()
        else:
            with suppress(OSError, ValueError):     # a shutdown has just closed the socket
                self.epoll.modify(self, 0)

    def log_responses(self) -> None:
        """Count and log the responses that have been sent."""
        with self._responses_lock:
            entries = [self.responses.popleft() for _ in range(len(self.responses))]
        if entries:
            metrics.add_responses(
                [f'{routed.metric_labels},code="{status}"' for _, routed, status, _, _ in entries],
                [seconds for _, _, _, _, seconds in entries])
            date = time.strftime("%d/%b/%Y:%H:%M:%S %z")
            access_log.info("\n".join([
                f'{host} - - [{date}] "{routed.logged_request}" {status} {size or "-"} '
                f'{routed.logged_client}'
                for host, routed, status, size, _ in entries]))

    def render_metrics(self) -> bytes:
        """Return the body of GET /metrics."""
        phases = [connection.state[0] for connection in list(self.connections.values())]
        inactive = phases.count(IDLE) + phases.count(LINGERING)
        self.log_responses()
        return metrics.render({
            "idpot_connections": len(phases),
            "idpot_http_requests_in_flight": len(phases) - inactive,
            "idpot_db_connections": self.allocator.count_connections(),
        }).encode()

    def service_actions(self) -> None:
        """Supervise the workers; every SERVICE_INTERVAL seconds enforce deadlines and the like."""
        now = monotonic()
        makes_progress = self.allocator.supervise(now)
        if now < self._serviced_at + SERVICE_INTERVAL:
            return
        self._serviced_at = now
        response_head.cache_clear()
        for connection in list(self.connections.values()):
            connection.enforce_deadline(now)
        self.log_responses()
        # If this thread itself hangs, it feeds no watchdog either.
        if makes_progress and "WATCHDOG_USEC" in os.environ:
            notify_systemd("WATCHDOG=1")
        if not self.is_stopping:
            self.epoll.modify(self, select.EPOLLIN)     # accept_connections() may have stopped
        # SIGHUP asks idpot to reopen LogFile, which each write does anyway.
        if signal.sigtimedwait([signal.SIGHUP], 0):
            notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            notify_systemd("READY=1")

    def drain(self) -> None:
        """Shut down gracefully: accept what is in the backlog, then no more, and respond to all.

        Each response from now on closes its connection. When all connections are closed, or after
        Timeout, the stores are closed. At a second stop signal they are not, which loses nothing.
        """
        self.stopped_at = monotonic()
        self.is_stopping = True
        self.limits.update({IDLE: DRAIN_GRACE, READING: DRAIN_GRACE, LINGERING: DRAIN_GRACE})
        # A quarter of Timeout is left for the clients to receive the responses.
        self.jobs_end_at = self.stopped_at + 0.75 * self.settings.timeout
        self.epoll.unregister(self)     # from now on only this thread accepts
        self.accept_connections()
        self.server_close()
        while self.connections and monotonic() < self.stopped_at + self.settings.timeout:
            time.sleep(0.02)
            self.service_actions()
            if signal.sigtimedwait(STOP_SIGNALS, 0):
                return
        self.allocator.stop()


# ------------------------------------------------------------------------------------------ client

class Client(AbstractContextManager["Client"]):
    """A client of an idpot server, over one connection that is kept open. It is for one thread.

    Its methods raise, by the status of the response, BadRequest, Unauthorized, NotFound, Exists,
    Exhausted or Unavailable. They raise IdpotError if the response is not one of idpot's, WentBack
    if an ID is not above those before, as after a restore of the database, and OSError if nothing
    arrives for `timeout` seconds.
    """
    ERRORS = {      # a 409 in response to a create is Exists
        400: BadRequest, 401: Unauthorized, 403: Unauthorized, 404: NotFound, 409: Exhausted,
        503: Unavailable}

    def __init__(self, url: str, token: str | None = None, timeout: float = 15) -> None:
        """Raises ValueError if the URL is not http://host:port or https://host:port."""
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        parts = urlsplit(url)
        if parts.scheme not in kinds or not parts.hostname or parts.port == 0:
            raise ValueError(f"{url!r} is not http://host:port or https://host:port")
        self._connection = kinds[parts.scheme](parts.netloc, timeout=timeout)
        self._path_prefix = parts.path.rstrip("/")
        self._headers: dict[str, str | bytes] = {"Content-Type": FORM.decode()}
        if token:
            self._headers["Authorization"] = f"Bearer {token}".encode()
        self._highest: dict[str, int] = {}      # the greatest ID of each pot so far

    def create(self, pot: str, min: int = 0) -> None:
        """Create the pot. Its first ID is min + 1.

        It is tried once: a second attempt could find the pot that the first one has created.
        """
        self.close()        # _exchange() repeats only what fails on a connection that was kept
        try:
            self._request(201, "Created new pot", "POST", "/pot/create", name=pot, min=min)
        except Exhausted as error:
            raise Exists(str(error))

    def exists(self, pot: str) -> bool:
        """Return whether there is such a pot."""
        try:
            self._request(204, "", "GET", f"/pot/{pot}")
            return True
        except NotFound:
            return False

    def current(self, pot: str) -> int:
        """Return the ID that was issued last, or the pot's min if none was."""
        return int(self._request(200, "[0-9]{1,20}", "GET", f"/id/{pot}"))

    def next(self, pot: str) -> int:
        """Return a new ID."""
        return self._take(pot, 1)[0]

    def next_many(self, pot: str, count: int) -> range:
        """Return `count` new IDs, 10,000 at most. The server lists each of them."""
        return self._take(pot, count, count=count)

    def next_range(self, pot: str, count: int) -> range:
        """Return `count` new IDs, 2**32 at most. The server names the first and the last."""
        return self._take(pot, count, range=count)

    def raise_to(self, pot: str, min: int) -> int:
        """Raise the counter to min, unless it is higher already; return the counter."""
        text = self._request(200, "[0-9]{1,20}", "POST", "/pot/raise", name=pot, min=min)
        if int(text) < min:
            raise IdpotError(f"{text} is below {min}, to which the pot was to be raised")
        return int(text)

    def _take(self, pot: str, wanted: int, **fields: int) -> range:
        """Return new IDs. The response contains all of them, or the first and the last."""
        pattern = r"[0-9]{1,20}(\s[0-9]{1,20})*\s?"
        text = self._request(200, pattern, "POST", f"/id/{pot}", **fields)
        numbers = [int(number) for number in text.split()]
        first_id = numbers[0]
        last_id = first_id + wanted - 1
        new_ids = range(first_id, last_id + 1)
        expected = [*new_ids] if len(numbers) == wanted else [first_id, last_id]
        if first_id == 0 or last_id > MAX_ID or numbers != expected:
            raise IdpotError(f"{quoted(text)} are not the {wanted} IDs that were asked for")
        highest = self._highest.get(pot, 0)
        if first_id <= highest:
            raise WentBack(f'pot "{pot}" issued {first_id} after {highest}')
        self._highest[pot] = last_id
        return new_ids

    def _request(
        self, status: int, pattern: str, method: str, path: str, **fields: str | int
    ) -> str:
        """Return the text of the response, if it has that status and matches the pattern."""
        response, text = self._exchange(
            method, self._path_prefix + quote(path), urlencode(fields) or None)
        if response.status in self.ERRORS and re.fullmatch("[^\n]+\n", text):
            raise self.ERRORS[response.status](text.strip())
        # http.client sets the length to None if the response has no Content-Length. Then nobody
        # knows whether it is complete.
        is_complete = response.length is not None
        if response.status == status and re.fullmatch(pattern, text) and is_complete:
            return text
        self.close()
        raise IdpotError(f"this is no response of idpot: {response.status} {quoted(text)}")

    def _exchange(
        self, method: str, target: str, body: str | None
    ) -> tuple[http.client.HTTPResponse, str]:
        """Send a request and return the response with its text.

        A connection that was kept open may have been closed by the server meanwhile. Then, and only
        then, the request is sent once more, on a new connection.
        """
        can_retry = self._connection.sock is not None
        while True:
            try:
                self._connection.request(method, target, body, self._headers)
                with self._connection.getresponse() as response:
                    return response, response.read().decode("utf-8", "replace")
            except OSError as error:
                self.close()    # a late response would be taken for that to the next request
                if not can_retry or not isinstance(error, ConnectionError):
                    raise
                can_retry = False
            except (ValueError, http.client.HTTPException) as error:
                self.close()
                raise IdpotError(f"this is no response of idpot: {error!r}")

    def close(self) -> None:
        """Close the connection. The next request opens it again."""
        self._connection.close()

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------ command line

def end_process(args: threading.ExceptHookArgs) -> None:
    """End the process because a thread has met an unexpected exception; a threading.excepthook.

    The most likely one is MemoryError. Without that thread idpot might never serve again. systemd,
    or whatever else has started idpot, starts it again.
    """
    try:
        drain_logs()
        threading.__excepthook__(args)      # prints the traceback
    finally:
        os._exit(1)


def serve(settings: Settings, stores: Sequence[Store]) -> None:
    """Serve until a stop signal. Raises IdpotError if the server cannot be started."""
    try:
        # A silent database may be tried for long. Meanwhile a stop signal ends the process, which
        # is its default effect. A process with the PID 1 has none; there the signal stays pending.
        if os.getpid() > 1:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        description = stores[0].start()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # A worker may have to wait at each address of the database.
        allocator = Allocator(stores, hang_limit=10 * settings.timeout + 10)
        listener = open_listener(settings.listen)
        server = Server(settings, listener, allocator)
        threading.excepthook = end_process
        allocator.start(server.handle_events, server.wake_up)
    except (OSError, RuntimeError) as error:    # the system has no more files, or threads
        raise IdpotError(str(error))
    url = f"unix:{listener.getsockname()}"
    if listener.family != socket.AF_UNIX:
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if not (host.startswith("127.") or host == "::1" or settings.admin_token):
            log.warning("%s is not a loopback address and no Token is set: anybody who reaches it "
                        "can create, raise and use up pots", host)
    log.info("listening on %s (%s)", url, description)
    if not settings.log_file and sys.stderr.isatty():
        log.info("a line for each request follows; LogFile = /dev/null in the settings ends that")
    notify_systemd(f"READY=1\nSTATUS={description}")
    # The signals are blocked, and polled here. sigtimedwait() with a timeout could report a signal
    # twice after a SIGSTOP. Allocator.supervise() needs the short interval.
    while not signal.sigtimedwait(STOP_SIGNALS, 0):
        time.sleep(0.05)
        server.service_actions()
    notify_systemd("STOPPING=1")
    server.drain()
    server.log_responses()
    log.info("stopped")


def start_logs(settings: Settings) -> None:
    """Start the log of events on stderr, and the access log. Raises IdpotError."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(StderrFormatter(
        "%(asctime)s idpot[%(process)d] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    start_logger(log, stderr)
    if settings.log_file:
        try:
            file_handler = StrftimeFileHandler(settings.log_file, settings.log_link_name)
        except OSError as error:
            raise IdpotError(f"LogFile or LogLinkName: {error}")
        start_logger(access_log, file_handler)


def run(arguments: argparse.Namespace) -> None:
    """Check the settings, or serve. A server that stops ends the process, with the exit code 0."""
    settings = load_settings(arguments.config)
    settings.listen = arguments.listen or settings.listen
    create_stores = MysqlStore.create_stores if settings.uses_mysql else SqliteStore.create_stores
    stores = create_stores(settings)
    if arguments.check:
        print(f"idpot: the settings are valid, {stores[0].probe()}")
        return
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):     # a service manager may forbid it
        # The soft limit is low for the sake of select(2), which idpot does not use.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, signal.SIGHUP])
    try:
        start_logs(settings)
        serve(settings, stores)
    finally:
        drain_logs()
    # sys.exit() would wait for a thread of the logs, which may be in a write for ever.
    os._exit(0)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return config, listen and check. A usage error ends the process with the exit code 2."""
    parser = argparse.ArgumentParser(
        prog="idpot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE",
                        help="the settings file; without it the pots are in ./idpot.db")
    parser.add_argument("--listen", metavar="HOST:PORT", type=parse_address,
                        help="the address to listen on, instead of the file's")
    parser.add_argument("--check", action="store_true",
                        help="check the settings and the database, then exit")
    parser.add_argument("--version", action="version", version=f"idpot {__version__}")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized: {unknown[0]}; a settings file is given as --config=FILE")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 after --check, 1 if idpot cannot start, 78 if
    the settings are wrong."""
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no KeyboardInterrupt
    # If standard descriptors are closed, the next files would get their numbers, and what is
    # written to stderr would end up in a database or a socket.
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    try:
        run(arguments)
        return 0
    except IdpotError as error:
        prefix = "<3>" if is_journald_on_stderr() else "idpot: "
        print(prefix + error.detail, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
