# /// script
# requires-python = ">=3.10"
# dependencies = ["mysql-connector-python>=9.2"]
# ///
"""idpot hands out serial 64-bit unsigned IDs over HTTP, from MySQL, MariaDB or an SQLite file.

    python3 idpot.py                        # SQLite in ./idpot.db, http://127.0.0.1:8080
    python3 idpot.py --config=idpot.cfg     # MySQL or MariaDB, as the file says

A pot is a named counter: POST /pot/create with name and min makes one, POST /id/NAME takes the next
ID, or with count=N or range=N many, GET /id/NAME shows the last one. README.rst has the whole API.

An ID that was answered is never answered again from that pot, by any process, after any crash that
the storage engine survives; each answer is greater than all answers that ended before its request
began. The value is in the database before the answer leaves, and nothing is fetched ahead.
"""

import _thread
import argparse
import bisect
import collections
import configparser
import errno
import functools
import hmac
import http.client
import http.server
import io
import logging
import math
import os
import queue
import random
import re
import resource
import select
import shlex
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from time import monotonic
from typing import Callable, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

__version__ = "2.2.0"

MAX_ID = 2**64 - 1
MAX_COUNT = 10000
MAX_RANGE = 2**32
POT_NAME = re.compile("[A-Za-z0-9_-]{1,60}")    # the table is pot_ + name; MySQL allows 64

log = logging.getLogger("idpot")


# ------------------------------------------------------------------------------------------ errors

class IdpotError(Exception):
    """An answer other than success: `status` is its HTTP status, str() the one line of its body."""
    status = 500
    header = ""     # a header line that belongs to the status
    silent = False  # of a database: whether its address did not answer in time
    exit_code = 1

    def __init__(self, text, **own):
        super().__init__(text)
        self.detail = text      # the log's words for it
        vars(self).update(own)


class BadRequest(IdpotError):
    """The request, or a value in it, is malformed."""
    status = 400


class Unauthorized(IdpotError):
    """The bearer token is missing or wrong (RFC 6750)."""
    status = 401
    header = "WWW-Authenticate: Bearer\r\n"


class Forbidden(IdpotError):
    """The request comes from a web page (it has an Origin) and does not carry the token."""
    status = 403


class NotFound(IdpotError):
    """There is no such pot, or no such path."""
    status = 404


class Exists(IdpotError):
    """The pot to be created exists."""
    status = 409


class Exhausted(IdpotError):
    """Fewer IDs are left in the pot than were asked for."""
    status = 409


class Unavailable(IdpotError):
    """The database cannot issue an ID now; the same request may succeed later."""
    status = 503
    header = "Retry-After: 1\r\n"


class Retry(Unavailable):
    """Trying again, on a new connection or a moment later, may help."""


class Broken(Unavailable):
    """No ID from this pot until somebody mends it: its table cannot count, say."""
    header = ""


class Refused(Unavailable):
    """No ID from any pot until somebody mends it: the account lacks a right, say."""
    header = ""


class WentBack(IdpotError):
    """Client: the server answered an ID that is not greater than one that it gave before."""


class StartError(IdpotError):
    """The server cannot start."""


class SettingsError(StartError, argparse.ArgumentTypeError):
    """A setting is wrong, so that starting again cannot help; for an option, wrong usage."""
    exit_code = 78      # EX_CONFIG of sysexits.h


# ---------------------------------------------------------------------------------------- settings

def shown(value):
    """The value in double quotes, cut and escaped, fit for a line of an answer or of the log."""
    text = ascii(value[:100])[1:-1].replace('"', r'\"')
    return f'"{text}..."' if len(value) > 100 else f'"{text}"'


def whole_number(text, low, high, name=""):
    """The number that the text is in plain digits; raises BadRequest if it is not in low..high."""
    if re.fullmatch("[0-9]{1,20}", text) and low <= int(text) <= high:
        return int(text)
    what = f"{name} {shown(text)}".strip()
    raise BadRequest(f"{what} is not a whole number from {low} to {high}")


def check_name(pot):
    """The name of a pot; raises BadRequest where it cannot be one."""
    if isinstance(pot, str) and POT_NAME.fullmatch(pot):
        return pot
    raise BadRequest(f"name {shown(str(pot))} is not 1 to 60 characters of A-Z a-z 0-9 _ -")


def split_address(text, default_port=None):
    """(host, port) of host:port, [IPv6]:port or :port; the host is empty for all addresses."""
    match = re.fullmatch(r"(?:\[([^]]*)\]|([^:\[\]]*))(?::([0-9]{1,5}))?", text)
    port = match and (match[3] or default_port)
    if not port or int(port) > 65535:
        raise SettingsError(f"{shown(text)} is not host:port")
    return match[1] or match[2] or "", int(port)


def seconds(text):
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?|\.[0-9]+", text) and 0 < float(text) <= 86400:
        return float(text)
    raise SettingsError(f"{shown(text)} is not a number of seconds above 0, at most 86400")


def engine_name(text):
    if re.fullmatch("[A-Za-z0-9_]+", text):
        return text
    raise SettingsError(f"{shown(text)} is not the name of a storage engine")


def tls_mode(text):
    mode = {"1": "true", "0": "false"}.get(text, text.lower())
    if mode in ("true", "false", "skip-verify", "preferred"):
        return mode
    raise SettingsError(f"{shown(text)} is not true, false, skip-verify or preferred")


def parse_dsn_address(address):
    """Each address to try, as the log names it -> arguments of mysql.connector.connect.

    Nothing of it is shown where it is none: it may be the end of a password with an @ in it.
    """
    match = re.fullmatch(r"(tcp[46]?|unix)?(?:\((.*)\))?", address)
    if not match:
        raise SettingsError("what stands behind the last @ is neither tcp(...) nor unix(...)")
    net, inside = match.groups()
    if net == "unix":
        path = inside or "/tmp/mysql.sock"
        return {path: {"unix_socket": path}}
    pairs = [split_address(one.strip(), 3306) for one in (inside or "127.0.0.1").split(",")]
    if len(pairs) > 1 and not all(host for host, _ in pairs):
        raise SettingsError(f"{shown(inside)} has a host without a name")
    return {f"{host}:{port}": {"host": host or "127.0.0.1", "port": port} for host, port in pairs}


def parse_dsn(text):
    """What a DSN of go-sql-driver/mysql says: user, password, database, tls, `addresses` as
    parse_dsn_address() gives them, and `ignored`, the names of other parameters.

    Raises SettingsError, which never shows the password.
    """
    left, slash, right = text.rpartition("/")
    credentials, at, address = left.rpartition("@")
    user, _, password = credentials.partition(":")
    database, _, query = right.partition("?")
    if not slash or not database:
        raise SettingsError("there is no database name after a last /")
    if not at and not re.match(r"(tcp[46]?|unix)?(\(|$)", left):     # it may be the password
        raise SettingsError("there is no @ before an address, such as tcp(host:port)")
    values = dict(parse_qsl(query, keep_blank_values=True))
    return {
        "user": user,
        "password": password,
        "database": unquote(database),
        "addresses": parse_dsn_address(address),
        "tls": tls_mode(values.pop("tls", "preferred")),
        "ignored": ", ".join(values),       # the others
    }


def check_place(what, path):
    """Raises StartError where a file could be neither made nor written; writes nothing."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise StartError(f"{what}: its folder is not there")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise StartError(f"{what}: it cannot be written")


def check_link(path):
    """Raises StartError where no symlink could be set; writes nothing."""
    what = f"LogLinkName {shown(path)}"
    if os.path.lexists(path) and not os.path.islink(path):
        raise StartError(f"{what}: it is there and is not a symlink")
    check_place(what, f"{path}.{os.getpid()}")      # as it is set


SETTINGS = {    # section -> name -> (default as the file writes it, converter)
    "Server": {
        "Listen": ("127.0.0.1:8080", split_address),
        "LogFile": ("", str),               # strftime pattern; empty: stderr
        "LogLinkName": ("", str),           # symlink to the newest log file
        "Token": ("", str),                 # bearer token asked for all but /healthz
        "AdminToken": ("", str),            # asked for create and raise; empty: Token is
        "Timeout": ("10", seconds),         # that a request may wait for the database, then 503
        "RequestTimeout": ("10", seconds),  # for a whole request to arrive, then 408
        "IdleTimeout": ("60", seconds),     # without a request, then the connection is closed
        "MaxConnections": ("1024", functools.partial(whole_number, low=1, high=1000000)),
    },
    "Mysql": {
        "ConnectString": ("", lambda text: text and parse_dsn(text)),
        "Hostname": ("127.0.0.1", str),
        "Port": ("3306", functools.partial(whole_number, low=1, high=65535)),
        "Username": ("root", str),
        "Password": ("", str),
        "Dbname": ("idpot", str),
        "Engine": ("MyISAM", engine_name),      # go-idpot's default
        "Connections": ("8", functools.partial(whole_number, low=1, high=64)),
    },
    "Sqlite": {"File": ("idpot.db", str)},
}


class SettingsReader(configparser.RawConfigParser):
    """The stock reader for the format of gcfg, which go-idpot used: names in any letter case."""
    SECTCRE = re.compile(r"\[\s*(?P<header>[^]\s][^]]*?)\s*\]\s*(?:[;#].*)?$")

    def __init__(self, path):
        super().__init__(delimiters="=", comment_prefixes=(";", "#"), default_section="")
        with open(path, encoding="utf-8-sig") as file:
            lines = map(str.strip, file)        # an indented one would continue another
            self.read_file((line.title() if line[:1] == "[" else line for line in lines), path)


QUOTED = r'"(?:[^"\\\0]|\\.)*"'
VALUE = re.compile(rf'((?:{QUOTED}|[^"\\\0;#])*)(?:[;#].*)?')       # and a comment behind it
ESCAPED = {r"\"": '"', r"\\": "\\", r"\n": "\n", r"\t": "\t"}


def unquoted(quoted):
    """What a match of QUOTED means."""
    try:
        return re.sub(r"\\.", lambda escape: ESCAPED[escape[0]], quoted[0][1:-1])
    except KeyError:
        raise SettingsError(r'a backslash stands before none of \ " n t')


def setting_value(text):
    """The value that stands in a file, bare or in double quotes."""
    match = VALUE.fullmatch(text)
    if not match:
        raise SettingsError("a double quote is not closed, or a backslash stands outside of quotes")
    return re.sub(QUOTED, unquoted, match[1].strip())


def dsn_of_names(values):
    """As parse_dsn(), of Hostname and the others."""
    host, port = values["hostname"], values["port"]
    return {
        "user": values["username"],
        "password": values["password"],
        "database": values["dbname"],
        "addresses": {f"{host}:{port}": {"host": host, "port": port}},
        "tls": "preferred",
        "ignored": "",
    }


def check_token_text(token):
    if not token:
        raise SettingsError("it is written, but empty")
    if re.search(r"^\s|\s\Z", token, re.ASCII):      # no request can carry it
        raise SettingsError("it begins or ends with a space")


def load_settings(path=None):
    """The settings of the file, or the defaults: each name in lower case; `dsn`; `mysql`, whether
    the pots are there; `listens`, whether the file says where. An empty value means the default,
    but for the tokens: without one the server is open. Raises SettingsError."""
    if path is None:
        path = os.devnull
    try:
        reader = SettingsReader(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{path or shown(path)}: {reason}")
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        raise SettingsError(f"{path}:{error.lineno}: this is there twice")
    except configparser.Error as error:     # its own text could show a password
        line = getattr(error, "lineno", None) or error.errors[0][0]
        raise SettingsError(f"{path}:{line}: this is neither [section] nor name = value")
    given = reader.sections()
    for section in given:
        if section not in SETTINGS:
            raise SettingsError(f"{path}: unknown section [{section}]")
    if {"Mysql", "Sqlite"} <= set(given):
        raise SettingsError(f"{path}: [Mysql] and [Sqlite] are both given: keep one")
    values = {}
    for section, rows in SETTINGS.items():
        texts = dict(reader[section]) if section in given else {}
        for name, (default, convert) in rows.items():
            text = texts.pop(name.lower(), None)
            try:
                value = setting_value(text or "")
                if text is not None and name in ("Token", "AdminToken"):
                    check_token_text(value)
                values[name.lower()] = convert(value or default)
            except IdpotError as error:
                hint = ": what has a ; or # in it wants double quotes"
                if not re.search("[;#]", text or ""):
                    hint = ""
                raise SettingsError(f"{path}: [{section}] {name}: {error}{hint}")
        for name in texts:      # what has more than letters may be a value, and that a password
            name = shown(name) if re.fullmatch("[a-z_-]+", name) else "(not shown)"
            raise SettingsError(f"{path}: unknown name {name} in [{section}]")
    dsn = values["connectstring"] or dsn_of_names(values)
    values["admintoken"] = values["admintoken"] or values["token"]
    return types.SimpleNamespace(**values, dsn=dsn, mysql="Mysql" in given,
                                 listens=reader.has_option("Server", "listen"))


# ----------------------------------------------------------------------------------------- metrics

METRICS = {     # name -> (type, help)
    "idpot_http_requests_total": ("counter", "Requests answered."),
    "idpot_http_request_duration_seconds": ("histogram", "From a request's arrival to its answer."),
    "idpot_http_requests_in_flight": ("gauge", "Requests that wait for their answer."),
    "idpot_connections": ("gauge", "Open HTTP connections."),
    "idpot_ids_issued_total": ("counter", "IDs taken from pots."),
    "idpot_db_statements_total": ("counter", "Statements that took IDs, for all who waited."),
    "idpot_db_seconds_total": ("counter", "Time in the database, summed over connections."),
    "idpot_db_errors_total": ("counter", "Errors of the database."),
    "idpot_db_retries_total": ("counter", "Requests that waited for a further try, at each."),
    "idpot_db_connections": ("gauge", "Open connections to the database."),
    "idpot_build_info": ("gauge", "The version that runs."),
    "process_cpu_seconds_total": ("counter", "Processor time."),
    "process_resident_memory_bytes": ("gauge", "Resident memory."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_start_time_seconds": ("gauge", "Start since the epoch."),
}


HISTOGRAM = "idpot_http_request_duration_seconds"
BUCKETS = {f'{HISTOGRAM}_bucket{{le="{limit}"}}': float(limit) for limit in (
    "0.0005", "0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1",
    "2.5", "5", "10", "+Inf")}
COUNTED = (         # the series that are told before there is something to count
    "idpot_ids_issued_total", "idpot_db_statements_total", "idpot_db_seconds_total",
    "idpot_db_retries_total", *BUCKETS, f"{HISTOGRAM}_sum", f"{HISTOGRAM}_count")


class Metrics:
    """What /metrics tells, counted since the start."""

    def __init__(self):
        self._lock = threading.Lock()       # guards the counters
        self._counters = collections.Counter(dict.fromkeys(COUNTED, 0))     # by series
        self._start = time.time()

    def add(self, series, amount=1):
        with self._lock:
            self._counters[series] += amount

    def count(self, answers):
        """Counts answers, as the Writer has them."""
        kinds = collections.Counter([(head.labels, status) for _, head, status, _, _ in answers])
        times = sorted([seconds for _, _, _, _, seconds in answers])
        with self._lock:
            for (labels, status), number in kinds.items():
                self._counters[f'idpot_http_requests_total{{{labels},code="{status}"}}'] += number
            self._counters[f"{HISTOGRAM}_sum"] += sum(times)
            self._counters[f"{HISTOGRAM}_count"] += len(times)
            for series, limit in BUCKETS.items():
                self._counters[series] += bisect.bisect_right(times, limit)

    def text(self, gauges):
        """The Prometheus text format, version 0.0.4; gauges: further series and their values."""
        with self._lock:
            series = {**self._counters, **gauges}
        series[f'idpot_build_info{{version="{__version__}",python="{sys.version.split()[0]}"}}'] = 1
        with suppress(OSError):      # /proc is hidden, or no descriptor is left
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            series["process_open_fds"] = len(os.listdir("/proc/self/fd"))
            series["process_resident_memory_bytes"] = pages * resource.getpagesize()
            series["process_cpu_seconds_total"] = time.process_time()
            series["process_start_time_seconds"] = self._start
        lines = []
        for name, (kind, meaning) in METRICS.items():
            own = re.compile(name + r"(_bucket|_sum|_count)?(\{.*)?")
            found = [f"{one} {value}" for one, value in series.items() if own.fullmatch(one)]
            if found or not name.startswith("process_"):
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *found]
        return "\n".join([*lines, ""])


metrics = Metrics()


# -------------------------------------------------------------------------------------------- logs
# Whatever is to be logged is added to the Writer, whose thread alone writes: neither IDs nor a stop
# wait for a full pipe or a hung disk.

def write_all(descriptor, text):
    """Writes all of the text, as slowly as it is read; raises OSError."""
    data = text.encode("ascii", "backslashreplace")
    while data:
        try:
            data = data[os.write(descriptor, data):]
        except BlockingIOError:     # a pipe that whoever shares it has made non-blocking
            time.sleep(0.01)


class Troubles:
    """What is wrong now: a trouble is logged when it begins and when it ends, not at each request.

    What comes back soon, as conflicts in a cluster do, is told only if it lasts.
    """
    QUIET = 30.0        # seconds after a line in which no other trouble of the subject is told

    def __init__(self):
        self._lock = threading.Lock()   # guards both; end() looks before without it, for speed
        self._told = set()              # subjects of troubles that last
        self._quiet = {}                # subject -> until when nothing is told of it

    def begin(self, subject, text, level=logging.WARNING):
        """Notes that something is wrong with a subject; text is the line that tells it."""
        with self._lock:
            now = monotonic()
            if subject in self._told or now < self._quiet.get(subject, now):
                return
            self._told.add(subject)
            self._quiet[subject] = now + self.QUIET
            log.log(level, "%s", " ".join(text.split()))

    def end(self, subject):
        if subject in self._told:
            with self._lock:
                if subject in self._told:
                    self._told.remove(subject)
                    log.info("%s is well again", subject)


troubles = Troubles()


class StrftimeFileHandler(logging.Handler):
    """Appends to the file that a strftime pattern names now, with a symlink to the newest.

    A file that was moved away is made anew. What cannot be written, or a link that cannot be set,
    is told once and tried again each time.
    """

    def __init__(self, pattern, link="", clock=time.time):
        super().__init__()
        self.pattern = pattern
        self.link = link
        self.clock = clock
        self.file = None        # its descriptor
        self.torn = False       # whether the last line may be half one
        self._point_link(self._open())

    def _open(self):
        """Opens the file of this moment, unless it is open; returns its path."""
        path = time.strftime(self.pattern, time.localtime(self.clock()))
        old = self.file
        with suppress(FileNotFoundError):
            if old and os.path.samestat(os.stat(path), os.fstat(old)):
                return path
        # A FIFO without a reader is an error, not a wait; one that is read slowly loses nothing.
        new = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o640)
        os.set_blocking(new, True)
        self.file = new
        if old:
            os.close(old)
        return path

    def _point_link(self, path):
        """Points the link to the file, atomically: it never misses."""
        if not self.link:
            return
        folder, name = os.path.split(path)
        path = os.path.join(os.path.realpath(folder), name)
        target = os.path.relpath(path, os.path.realpath(os.path.dirname(self.link)))
        if os.path.islink(self.link):
            if os.readlink(self.link) == target:
                return
        elif os.path.exists(self.link):
            raise OSError(errno.EEXIST, "LogLinkName is there and is not a symlink", self.link)
        new = f"{self.link}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(new)      # a crash may have left it
        os.symlink(target, new)
        os.replace(new, self.link)

    def emit(self, record):
        subject, trouble = "the access log", "cannot be written, its lines are lost"
        try:
            path = self._open()
            torn, self.torn = self.torn, True
            write_all(self.file, "\n" * torn + record.getMessage() + "\n")
            self.torn = False
            troubles.end(subject)
            subject, trouble = "LogLinkName", "cannot be set"
            self._point_link(path)
            troubles.end(subject)
        except OSError as error:
            troubles.begin(subject, f"{subject} {trouble}: {error}", logging.ERROR)


ESCAPES = {byte: f"\\x{byte:02x}" for byte in (*range(32), *range(127, 256))}
ESCAPES.update({ord('"'): r'\"', ord("\\"): r"\\"})


def escaped(data):
    """The bytes as text between the quotes of an access line, escaped as Apache does it."""
    return data.decode("latin-1").translate(ESCAPES)


def under_journald():
    """Whether stderr is journald's, and not only a parent's was (systemd.exec(5))."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Writer(logging.Handler):
    """The thread that counts answers, and writes their lines and those of events.

    An answer is (host, head, status, bytes sent, seconds). Where it is sent it is only noted: to
    count it there, and to make its line there, cost a tenth of the speed (wrk -c64).
    """
    LIMIT = 64 << 20        # bytes that wait; what comes then is lost, which is told
    ENTRY = 200             # bytes that an entry takes beside its text
    PAUSE = 0.02            # seconds for more to gather
    PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}

    def __init__(self, file=None, tokens=()):
        super().__init__()
        self._file = file       # the handler of the access lines, if they do not go to stderr
        # Kept out of access lines, wherever they stand; a shorter one may be a part of any path.
        self._tokens = [escaped(token.encode()) for token in tokens if len(token) >= 6]
        self._tokens.sort(key=len, reverse=True)        # one may begin with the other
        self._journald = under_journald()
        if not self._journald:      # which has a time of its own
            self.setFormatter(logging.Formatter(
                "%(asctime)s idpot[%(process)d] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._answers = collections.deque()
        self.note = self._answers.append    # takes no lock
        # The stock handler's lock, which emit() has, guards the next three; nobody writes under it.
        self._lines = []        # (its file, None for stderr; line)
        self._size = 0          # bytes of the lines, and of what is being written
        self._lost = 0          # lines, since that was told

    def start(self):
        threading.Thread(target=self._run, daemon=True).start()

    def count(self):
        """Counts the answers that were noted by now, and makes their lines."""
        moment = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        with self.lock:
            answers = [self._answers.popleft() for _ in range(len(self._answers))]
            metrics.count(answers)
            lines = [f'{host} - - [{moment}] "{head.line}" {status} {size or "-"} {head.tail}'
                     for host, head, status, size, _ in answers]
            text = "\n".join(lines)
            for token in self._tokens:
                text = text.replace(token, "...")
            if text:
                self._add(self._file, "<6>", text)

    def handle(self, record):
        with self.lock:     # which the stock method, in Python, may keep where memory ends
            self.emit(record)

    def emit(self, record):
        self._add(None, self.PRIORITIES[record.levelno], self.format(record))

    def _add(self, file, priority, line):
        """Adds lines, if they may wait too; the lock is held."""
        if self._journald and not file:
            line = priority + line.replace("\n", "\n" + priority)
        if self._size + len(line) > self.LIMIT:
            self._lost += line.count("\n") + 1
        else:
            self._lines.append((file, line))
            self._size += len(line) + self.ENTRY

    def _run(self):
        while True:
            try:
                self._write()
            except Exception:
                log.exception("the writer of the logs")
            time.sleep(self.PAUSE)

    def _write(self):
        self.count()
        with self.lock:
            waiting, self._lines = self._lines, []
            lost, self._lost = self._lost, 0
            size = self._size
        try:
            lines = [line for file, line in waiting if file]
            events = [line for file, line in waiting if not file]
            if events:      # first: they may tell why the file cannot be written
                with suppress(OSError):     # nobody reads stderr any more
                    write_all(2, "\n".join(events) + "\n")
            if lines:
                self._file.emit(logging.makeLogRecord({"msg": "\n".join(lines)}))
        finally:
            with self.lock:
                self._size -= size
        if lost:
            log.error("%d lines of the logs were lost: what waited was not read", lost)

    def drain(self):
        """Waits until all is written, for half a second at most."""
        deadline = monotonic() + 0.5
        while (self._answers or self._size) and monotonic() < deadline:
            time.sleep(0.005)


# ------------------------------------------------------------------------------------------ stores

class Store:
    """The contract: pots in a database, which one thread, the store's worker, uses.

    Each method may raise Retry, where the same call may help later; Broken, where somebody must
    mend that pot, or Refused, the whole database, before anything helps.
    """
    connected = True        # whether it has a connection
    most = 64               # pots that take() may be asked for in one call

    def start(self):
        """Prepares the first use, on one store of all; returns what is served. Raises StartError or
        Refused only where waiting cannot help."""

    def probe(self):
        """Returns what --check found to be well; writes nothing."""

    def connect(self):
        """Sees to a connection to a server that can issue IDs, as far as it is known."""

    def take(self, wants):
        """Adds to the counters; returns the new values, each the last ID of the range taken.

        wants: (pot, count, floor) for each; count is added to the counter, or to the floor, the
        highest number that this server gave or told of the pot, where that is higher. Where there
        are several, they share what a call costs, and any trouble of one is raised as that of all,
        or shows in a value that is too low: no value may be answered then, though counters may have
        moved; each is to be taken by itself. Raises NotFound or Exhausted, too.
        """

    def current(self, pot):
        """Returns the counter; raises NotFound, or Broken where the table could repeat IDs."""

    def create(self, pot, low):
        """Makes the pot, and returns low, which its counter is; raises Exists."""

    def raise_to(self, pot, low):
        """Raises the counter to low unless it is higher; returns it."""

    def pots(self):
        """Yields (pot, counter) of each pot, "-" for the counter of one that cannot be read."""

    def check(self, pot):
        """Raises Unavailable unless an ID could be issued now, from the pot, if that is not ""."""

    def close(self):
        """Ends the connection, if there is one."""


class SqliteStore(Store):
    """One SQLite file that this process locks; WAL with synchronous=FULL survives a power cut.

    SQLite's integers are signed: an ID from 2**63 up is kept as ID - 2**64, and added to in Python.
    """

    @classmethod
    def all(cls, settings):
        return [cls(settings)]

    def __init__(self, settings):
        self._path = settings.file
        self._what = f"SQLite {settings.file}"
        self._place = f"SQLite file {shown(settings.file)}"
        import sqlite3      # only where it is used: 1 MB
        self._sqlite = sqlite3

    def start(self):
        try:
            self._db = self._sqlite.connect(
                self._path, timeout=0, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS pot (name TEXT PRIMARY KEY, id INTEGER NOT NULL)")
            # Takes the lock now, which EXCLUSIVE keeps: a second process is refused at its start.
            self._db.execute("BEGIN IMMEDIATE").execute("COMMIT")
            self._file = os.stat(self._path)
        except (self._sqlite.Error, OSError) as error:
            reason = "another process uses it" if "locked" in str(error) else error
            raise StartError(f"{self._place}: {reason}")
        if mode != "wal":
            raise StartError(f"{self._place} does not take the WAL journal")
        return self._what

    def probe(self):
        check_place(self._place, self._path)        # SQLite itself would write
        return f"{self._what} can be written"

    def _execute(self, statement, *values):
        """The rows of a SELECT, or the number of rows that were changed."""
        start = time.perf_counter()
        try:
            cursor = self._db.execute(statement, values)
            done = not self._db.in_transaction
            if done:
                self._check_file()      # behind the commit: a process on a new file counts on
            if statement.startswith("SELECT"):
                return cursor.fetchall()
            if done:
                troubles.end(self._what)    # a full disk can be read, and lets one begin
            return cursor.rowcount
        except self._sqlite.Error as error:
            metrics.add('idpot_db_errors_total{errno="other"}')
            troubles.begin(self._what, f"{self._what}: {error}")
            raise Unavailable(f"SQLite: {error}")
        finally:
            metrics.add("idpot_db_seconds_total", time.perf_counter() - start)

    def _check_file(self):
        """Raises Refused where the path no longer names the file that is open and locked."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self._path), self._file):
                return
        text = f"{self._place} was moved, removed or replaced: restart idpot"
        troubles.begin(self._what, text)
        raise Refused(text)

    def take(self, wants):
        if len(wants) == 1:
            return [self._take_one(*wants[0])]
        self._execute("BEGIN IMMEDIATE")
        try:
            lasts = [self._take_one(*want) for want in wants]
            self._execute("COMMIT")
            return lasts
        finally:
            if self._db.in_transaction:     # something was raised
                self._db.rollback()

    def _take_one(self, pot, count, floor):
        # Nobody else can write, since the file is locked: the counter is at the floor, unless an
        # error hid what was written. The read that this saves took a fifth of the speed (wrk -c64).
        current = floor
        while True:
            last = max(current, floor) + count
            if last > MAX_ID:
                raise Exhausted(f"pot {shown(pot)} is exhausted: fewer than {count} IDs are left")
            if self._execute("UPDATE pot SET id = ? WHERE name = ? AND id = ?",
                             self._signed(last), pot, self._signed(current)):
                return last
            current = self.current(pot)

    def current(self, pot):
        rows = self._execute("SELECT id FROM pot WHERE name = ?", pot)
        if not rows:
            raise NotFound(f"there is no pot {shown(pot)}")
        value = rows[0][0]
        if type(value) is not int:
            raise Broken(f"pot {shown(pot)} holds no whole number")
        return value % 2**64

    @staticmethod
    def _signed(value):
        return value - 2**64 if value >> 63 else value

    def create(self, pot, low):
        if not self._execute("INSERT OR IGNORE INTO pot (name, id) VALUES (?, ?)",
                             pot, self._signed(low)):
            raise Exists(f"pot {shown(pot)} exists")
        return low

    def raise_to(self, pot, low):
        value = max(self.current(pot), low)
        self._execute("UPDATE pot SET id = ? WHERE name = ?", self._signed(value), pot)
        return value

    def pots(self):
        for name, value in self._execute("SELECT name, id FROM pot ORDER BY name"):
            yield name, value % 2**64 if type(value) is int else "-"

    def check(self, pot):
        self._execute("PRAGMA user_version = 1")    # a write: a full disk lets a transaction begin

    def close(self):
        self._db.close()    # folds the journal into the file


CANNOT = "the database cannot serve this now"
# Errors that last: rights and names that somebody must mend, which only a new connection sees.
# Others are tried again.
LASTING = {1044, 1045, 1049, 1142, 1143, 1227, 1698, 1862, 2026, 2061, 3118, 4151}
ONE_POT = {     # errors of one pot, after which the connection stays sound
    1054: (Broken, "the table of pot {} has no column id"),
    1062: (Exists, "pot {} exists"),
    1146: (NotFound, "there is no pot {}"),
    3098: (Broken, "the table of pot {} is refused by its replication group, which wants InnoDB "
                   "and a primary key (error 3098)"),
    **{number: (Broken, f"the database does not let pot {{}} be made or written (error {number})")
       for number in (1286, 1665, 3161, 3750)},
    **dict.fromkeys(        # the ceiling of a column, of BIGINT, of a CHECK
        (1264, 1292, 1690, 3819, 4025),
        (Exhausted, "pot {} is exhausted: its table holds no greater number")),
}
# For accounts that read_only does not bind; as text: from MariaDB 12 on it is an enumeration. Left
# out with binlog_format=STATEMENT, where the server would warn of each statement that has it.
WRITABLE = " AND CAST(@@global.read_only AS CHAR) IN ('0', 'OFF')"
READ_ONLY = ("read_only", "innodb_read_only", "transaction_read_only", "tx_read_only")
NOT_TOGETHER = {1064, 1105, 1235, 1295}     # what servers and proxies say to several statements
BELIEVED = 1.0          # seconds for which a server is taken to be as it was seen
UNUSED = 60.0           # seconds after which a connection is made anew: a firewall may forget it
SHUNNED = 60.0          # seconds for which an address that was silent, or refused, is tried last


def error_number(error):
    """The number of the driver's or the system's error; 2027, a malformed packet, for others."""
    return getattr(error, "errno", None) or 2027


def execute(connection, statement):
    """The rows of a query, or what the driver tells of another statement."""
    done = connection.cmd_query(statement)      # a cursor would ping the server first
    return connection.get_rows()[0] if "columns" in done else done


def execute_all(connection, statements):
    """What the driver tells of each, none of which is a query; they go in one call."""
    if len(statements) == 1:
        return [connection.cmd_query(statements[0])]
    text = "; ".join(statements)
    if not hasattr(connection, "fetch_eof_status"):     # the driver's form in pure Python
        return list(connection.cmd_query_iter(text))
    told = [connection.cmd_query(text)]
    while connection.more_results:
        connection.next_result()
        told.append(connection.fetch_eof_status())
    return told


def import_driver():
    """mysql.connector, and the errors that its calls raise; only where it is configured."""
    try:
        import mysql.connector
    except ImportError:
        folder = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
        raise StartError("[Mysql] needs mysql-connector-python: python3 -m pip install "
                         f"--target={folder} 'mysql-connector-python>=9.2'")
    own = [mysql.connector.Error]
    if mysql.connector.HAVE_CEXT:       # has another for all but the first of several statements
        import _mysql_connector
        own.append(_mysql_connector.MySQLInterfaceError)
    # The others come where what was received is not MySQL's protocol.
    return mysql.connector, (*own, AttributeError, LookupError, OSError, RuntimeError, ValueError,
                             struct.error)


class MysqlServers:
    """The addresses where the database is, which of them is used, and whether it may issue IDs.

    The first address that can issue IDs is used. One that hung or refused is tried last for a
    minute; who connects after that tries it first again: the handbook says how a server that was
    left is kept from counting for itself. All workers share this object without a lock: what one
    sets is a whole value, or what the others would set.
    """

    def __init__(self, settings):
        self.driver, self.errors = import_driver()
        self.engine = settings.engine
        self.engines = {}       # pot -> its engine in lower case, once it was looked at
        # The address connected to last, None after it was silent: no connection elsewhere is used.
        self.chosen = None
        self.cluster = ""       # what the servers are members of, once one of them told
        self.most = Store.most
        self.writable = ""      # WRITABLE, where statements may ask that
        self.ignored = settings.dsn["ignored"]     # names of parameters
        self._addresses = settings.dsn["addresses"]
        self._tls = settings.dsn["tls"]
        self._shunned = {}      # address -> when it did not answer in time, or refused
        # The first server has Timeout / 2; to connect to it Timeout / 4, at most 3 s, since there
        # may be others to try. The driver takes whole seconds, and 0 as no limit.
        half = settings.timeout / 2
        self._patience = math.ceil(min(3, half / 2))
        self.lock_wait = max(1, math.ceil(half) - 1)    # the server tells of a lock, in its time
        self._arguments = {
            "user": settings.dsn["user"],
            "password": settings.dsn["password"],
            "database": settings.dsn["database"],
            "connection_timeout": self._patience,
            "read_timeout": self.lock_wait + 1,
            "write_timeout": self.lock_wait + 1,
            "collation": "utf8mb4_general_ci",      # older MariaDB lacks the driver's own
            "ssl_disabled": self._tls == "false",
            "client_flags": [self.driver.ClientFlag.FOUND_ROWS],
        }
        if self._tls == "true":
            paths = ssl.get_default_verify_paths()
            self._arguments.update(ssl_verify_cert=True, ssl_verify_identity=True,
                                   ssl_ca=paths.cafile or paths.openssl_cafile)
        self.subject = f"MySQL {','.join(self._addresses)}"        # of troubles
        self.what = f"{self.subject}/{settings.dsn['database']}, {self.engine}"

    def choose(self):
        """(connection, address) of the first address that can issue IDs now.

        Raises Retry if one may do so later, else Refused: with the first address's trouble, and in
        its detail each one's own.
        """
        found = {}
        for address in sorted(self._addresses, key=self._is_shunned):
            start = monotonic()
            try:
                connection = self._log_in(address)
                self.chosen = address
                return connection, address
            except self.errors as error:
                found[address] = self.note_error(error, address, start)
                self._shunned[address] = monotonic()
            except Unavailable as error:
                found[address] = error
        errors = [found[address] for address in self._addresses]
        told = [error.detail for error in errors]
        if len(told) > 1:
            told = map(": ".join, zip(self._addresses, told))
        kind = Refused if all(isinstance(error, Refused) for error in errors) else Retry
        raise kind(str(errors[0]), detail="; ".join(told))

    def _is_shunned(self, address):
        return self._shunned.get(address, -math.inf) > monotonic() - SHUNNED

    def note_error(self, error, address, start):
        """The IdpotError for an error of the driver, after a call that was begun at start.

        An address that did not answer in the time that it had is shunned. The server's own errors
        are answers: a row lock (1205) says nothing of its address.
        """
        number = error_number(error)
        own = 2000 <= number < 3000 or number == 3024       # of the driver; its read_timeout
        silent = own and monotonic() > start + 0.9 * self._patience
        if silent:
            self._shunned[address] = monotonic()
        metrics.add(f'idpot_db_errors_total{{errno="{number}"}}')
        text = str(error)
        if not hasattr(error, "errno"):
            text = f"malformed packet: {type(error).__name__}: {text}"
        detail = re.sub(r"[\0-\x20\x7f-\x9f]+", " ", text)
        # What the two forms of the driver say to caching_sha2_password without TLS.
        if number == (2061 if self.driver.HAVE_CEXT else 1045):
            detail += "; it may need TLS on the server, or its socket: unix(/path)"
        # Without a word of these 2026 tells of a server that died while TLS was agreed on.
        lasts = number in LASTING and (number != 2026 or re.search("certificate|support", detail))
        kind = Refused if lasts else Retry
        return kind(f"{CANNOT} (error {number})", detail=detail, silent=silent)

    def is_transactional(self, pot):
        return self.engines.get(pot) in ("innodb", "rocksdb")

    def note_batch(self, error):
        """After several statements in one call failed, or error None: a reply was missing."""
        if self.most > 1 and (error is None or error_number(error) in NOT_TOGETHER):
            self.most = 1
            log.warning("several statements in one call are refused, by the server or a proxy: "
                        "each goes alone (%s)", error or "a reply was missing")

    def _log_in(self, address):
        # Not with autocommit=True: only where the session sets it from 0, the driver's default, to
        # 1, it also commits what the server's init_connect may have begun.
        connection = self.driver.connect(**self._arguments, **self._addresses[address])
        try:
            connection.cmd_query(       # the promise does not depend on the server's defaults
                f"SET SESSION autocommit=1, completion_type=0, lock_wait_timeout={self.lock_wait}, "
                f"innodb_lock_wait_timeout={self.lock_wait}, sql_safe_updates=0, "
                f"sql_select_limit={MAX_ID}, "
                "sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'")
            if self._tls == "skip-verify" and not execute(
                    connection, "SHOW STATUS LIKE 'Ssl_cipher'")[0][1]:
                raise Retry(f"{CANNOT}: its server offers no TLS")
            self.examine(connection, address)
            if not execute(connection, "SELECT 1 FROM information_schema.engines WHERE support IN "
                                       f"('YES', 'DEFAULT') AND engine = '{self.engine}'"):
                raise Refused(f"Engine: the server has no storage engine {shown(self.engine)}")
            return connection
        except (*self.errors, Unavailable):
            connection.close()
            raise

    def examine(self, connection, address):
        """Raises Retry where the server cannot issue IDs now, Refused where it cannot at all."""
        names = ", ".join(map(repr, (*READ_ONLY, "wsrep_on", "binlog_format",
                                     "group_replication_group_name")))
        state = dict(execute(
            connection, f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({names})"))
        # A member that is started without the plugin, or with wsrep_on=OFF, looks like a server
        # that was never in a cluster, and would count for itself.
        cluster = "the Galera cluster" if state.get("wsrep_on") == "ON" else ""
        group = state.get("group_replication_group_name")
        if group:
            cluster = f"the replication group {group}"
        self.cluster = self.cluster or cluster
        if cluster != self.cluster:
            raise Retry(f"{CANNOT}: its server is not in {self.cluster}")
        if group:
            self._examine_group(connection)
        elif cluster:
            self._examine_node(connection, address)
        if any(state.get(name, "OFF") not in ("OFF", "0") for name in READ_ONLY):
            raise Retry(f"{CANNOT}: it is read-only (error 1290)")
        self.writable = "" if state.get("binlog_format") == "STATEMENT" else WRITABLE
        if cluster and self.engine.lower() != "innodb":     # each node would count for itself
            raise Refused(f"Engine: {cluster} replicates InnoDB only, not {self.engine}")

    def _examine_node(self, connection, address):
        node = dict(execute(
            connection, "SHOW GLOBAL STATUS WHERE Variable_name IN "
                        "('wsrep_ready', 'wsrep_local_state')"))
        if node["wsrep_ready"] != "ON":
            raise Retry(f"{CANNOT}: the Galera node is not ready (error 1047)")
        # One that donates its state may be locked. It is used where no other address can be: when
        # it is met again, and shunned by then.
        donates = node["wsrep_local_state"] != "4" and len(self._addresses) > 1
        if donates and not self._is_shunned(address):
            self._shunned[address] = monotonic()
            raise Retry(f"{CANNOT}: the Galera node is not synced")

    def _examine_group(self, connection):
        """MySQL Group Replication: a server outside its group, or cut off, stays writable."""
        [[own, unreachable, members]] = execute(
            connection, "SELECT MAX(IF(member_id = @@server_uuid, "
                        "CONCAT_WS(' ', member_state, NULLIF(member_role, '')), '')), "
                        "SUM(member_state = 'UNREACHABLE'), COUNT(*) "
                        "FROM performance_schema.replication_group_members")
        if own != "ONLINE PRIMARY":
            raise Retry(f"{CANNOT}: its server is {own or 'no member'} in the replication group")
        # Its own word for it comes 5 to 6 seconds late; then a statement hangs until its timeout.
        if 2 * unreachable >= members:
            raise Retry(f"{CANNOT}: the replication group has lost its majority")


class MysqlConnection(Store):
    """A connection to MySQL or MariaDB, made when it is needed, and thrown away after any trouble
    that is not one pot's."""

    def __init__(self, servers):
        self._servers = servers
        self._connection = None
        self._address = None
        self._seen = 0.0        # when the server was seen to be able to issue IDs

    @property
    def connected(self):
        return self._connection is not None

    @property
    def most(self):
        return self._servers.most

    def start(self):
        try:
            self.probe()
        except Retry as error:      # it may come later
            troubles.begin(self._servers.subject, error.detail)
        if self._servers.ignored:
            log.warning("ConnectString: these parameters are ignored: %s", self._servers.ignored)
        engine = self._servers.engine
        if engine.lower() not in ("innodb", "aria", "rocksdb"):
            log.warning("Engine %s does not survive a power cut: IDs of the last half minute may "
                        "come again; InnoDB loses none", engine)
        return self._servers.what

    def probe(self):
        try:
            self._choose()
        except Unavailable as error:
            error.detail = f"{self._servers.subject}: {error.detail}"
            raise
        return f"{self._servers.what} is reached"

    def connect(self, believed=BELIEVED):
        """Sees to a connection to a server that was seen to be able to issue IDs at most `believed`
        seconds ago; with 0 it is asked now."""
        now = monotonic()
        if self._address != self._servers.chosen or now > self._seen + UNUSED:
            self.close()
        if not self._connection:
            self._guarded((), self._choose)
        elif now > self._seen + believed:
            self._guarded((), self._servers.examine, self._connection, self._address)
            self._seen = now

    def _choose(self):
        now = monotonic()
        self._connection, self._address = self._servers.choose()
        self._seen = now

    def _guarded(self, pots, function, *arguments):
        """What function(*arguments) returns, which concerns these pots.

        The driver's errors become ours, and all but those of one pot end the connection.
        """
        start = monotonic()
        sound = False       # after any surprise a reply could be that of another statement
        try:
            value = function(*arguments)
            sound = True
            return value
        except self._servers.errors as error:
            number = error_number(error)
            if len(pots) == 1 and number in ONE_POT:
                sound = True
                kind, text = ONE_POT[number]
                raise kind(text.format(shown(pots[0]))) from error
            trouble = self._servers.note_error(error, self._address, start)
            if trouble.silent and self._address == self._servers.chosen:
                self._servers.chosen = None     # the other connections there would hang, too
            if len(pots) > 1:       # each is tried by itself now, and tells what it meets
                self._servers.note_batch(error)
            else:
                self._tell(trouble)
            raise trouble from error
        except Unavailable as error:
            self._tell(error)
            raise
        finally:
            metrics.add("idpot_db_seconds_total", monotonic() - start)
            if not sound:
                self.close()

    def _tell(self, trouble):
        troubles.begin(self._servers.subject, f"{self._servers.subject}: {trouble.detail}")

    def _run(self, pots, statement):
        self.connect()
        return self._guarded(pots, execute, self._connection, statement)

    def _confirm(self, complete, asks):
        """Raises Retry where what the server has just told does not count; asks: whether the server
        is to be asked if it may be written, since the statements did not ask that."""
        reason = ""
        if not complete:
            reason = "a reply is missing"
            self._servers.note_batch(None)
        elif self._connection.in_transaction:       # a trigger or a proxy, say, has begun one
            reason = "the statement was not committed"
        else:
            if monotonic() > self._seen + BELIEVED:
                self._guarded((), self._servers.examine, self._connection, self._address)
            if asks and self._servers.writable and not self._guarded(
                    (), execute, self._connection,
                    f"SELECT 1 FROM DUAL WHERE TRUE{self._servers.writable}"):
                reason = "it has become read-only (error 1290)"
            elif self._address != self._servers.chosen:     # it may have waited there meanwhile
                reason = "its address was given up meanwhile"
        if reason:
            self.close()
            raise Retry(f"{CANNOT}: {reason}")

    def close(self):
        connection, self._connection = self._connection, None
        if connection:
            with suppress(*self._servers.errors):
                connection.close()


class MysqlStore(MysqlConnection):
    """Pots in MySQL or MariaDB: each is a table of go-idpot's form, with one row.

    It is `pot_NAME (id BIGINT UNSIGNED NOT NULL)`. InnoDB's has a key beside it that never changes:
    each UPDATE of a key leaves a dead record, which the later ones read while anybody holds a read
    view; and two nodes of a cluster cannot both make the row.
    """

    @classmethod
    def all(cls, settings):
        servers = MysqlServers(settings)
        return [cls(servers) for _ in range(settings.connections)]

    def _update(self, values):
        """Sets counters to SQL values, {pot: value}; returns for each pot the argument of
        LAST_INSERT_ID in its value, from its own statement's reply, or 0 where that was not called.

        Of several pots those whose tables have transactions come last, and share one; always in
        this order: two idpots cannot lock each other out.
        """
        pots, shared = sorted(values), []
        if len(pots) > 1:
            shared = [pot for pot in pots if self._servers.is_transactional(pot)]
            pots = sorted(set(pots).difference(shared)) + shared
        begin = len(pots) - len(shared)
        statements = [f"UPDATE `pot_{pot}` SET id = {values[pot]}" for pot in pots]
        if shared:
            statements.insert(begin, "START TRANSACTION")
            statements.append("COMMIT")
        self.connect()
        told = self._guarded(pots, execute_all, self._connection, statements)
        troubles.end(self._servers.subject)     # a server that takes no writes can be read
        self._confirm(len(told) == len(statements), len(pots) > 1)
        if shared:
            del told[begin], told[-1]
        for pot, done in zip(pots, told):
            if done["affected_rows"] != 1:      # with FOUND_ROWS: the rows there are
                raise Broken(
                    f"the table of pot {shown(pot)} has {done['affected_rows']} rows, not one")
        return {pot: done["insert_id"] for pot, done in zip(pots, told)}

    # The counter is read and written by one statement, whose reply brings the value. So several
    # idpots may use one table, with go-idpot among them: the database lets them in one by one.

    def take(self, wants):
        if len(wants) > 1:
            # Without IF, 27,819 statements a second for 22,506 (the driver alone, in calls of 33 of
            # 200 MyISAM tables). What that refuses is an error then (1264, 1690), or a value that
            # is too low, though the counter has moved: each pot is tried alone after either.
            taken = self._update({pot: f"LAST_INSERT_ID(id + {count})" for pot, count, _ in wants})
            return [taken[pot] for pot, _, _ in wants]
        [(pot, count, floor)] = wants
        fits = f"id BETWEEN {floor} AND {MAX_ID - count}{self._servers.writable}"
        last = self._update({pot: f"IF({fits}, LAST_INSERT_ID(id + {count}), id)"})[pot]
        if not last:
            self._explain(pot, count, floor)
        return [last]

    def _explain(self, pot, count, floor):
        """Raises why no ID was taken: the counter was not from floor up to where the count fits,
        or the server has become read-only; or the reply was not that of our statement."""
        self.connect(believed=0)
        current = self.current(pot)
        if max(current, floor) > MAX_ID - count:
            raise Exhausted(f"pot {shown(pot)} is exhausted: fewer than {count} IDs are left")
        if current < floor:
            log.warning("the counter of pot %s was set back to %d, but %d was given: it goes on "
                        "above that", pot, current, floor)
            self.raise_to(pot, floor)
            raise Retry(f"the counter of pot {shown(pot)} was set back")
        text = f"the counter of pot {shown(pot)} was changed by others, or its table has a trigger"
        troubles.begin(f"pot {pot}", text)
        raise Retry(text)

    def current(self, pot):
        self.connect()      # which finds out about the cluster
        cluster = self._servers.cluster
        engine = self._servers.engines.get(pot)
        if cluster or not engine:
            asks = ("(SELECT engine FROM information_schema.tables "
                    f"WHERE table_schema = DATABASE() AND table_name = 'pot_{pot}')")
        else:
            asks = f"'{engine}'"        # known: to ask takes as long as the rest
        rows = self._run((pot,), f"SELECT id, {asks} FROM `pot_{pot}` LIMIT 2")
        if len(rows) != 1:
            count = "several rows" if rows else "no row"
            raise Broken(f"the table of pot {shown(pot)} has {count}, not one")
        value, engine = rows[0]
        self._servers.engines[pot] = str(engine).lower()
        if cluster and self._servers.engines[pot] != "innodb":      # as in examine()
            raise Broken(
                f"the table of pot {shown(pot)} is {engine}: {cluster} replicates InnoDB only")
        if type(value) is not int or value < 0:     # DOUBLE and VARCHAR would repeat IDs
            raise Broken(f"the table of pot {shown(pot)} holds no whole number from 0 up")
        return value

    def create(self, pot, low):
        """Makes the table, and its row where there is none: a crash may have left it so."""
        engine = self._servers.engine
        key = ", one TINYINT NOT NULL DEFAULT 1 PRIMARY KEY" if engine.lower() == "innodb" else ""
        # A server that has joined a cluster within the second is not left a table of its own.
        self.connect(believed=0)
        self._run((pot,), f"CREATE TABLE IF NOT EXISTS `pot_{pot}` "
                          f"(id BIGINT UNSIGNED NOT NULL{key}) ENGINE={engine}")
        done = self._run((pot,), f"INSERT INTO `pot_{pot}` (id) SELECT {low} FROM DUAL "
                                 f"WHERE NOT EXISTS (SELECT id FROM `pot_{pot}`)")
        if done["affected_rows"] != 1:
            raise Exists(f"pot {shown(pot)} exists")
        with suppress(Retry):       # the pot is made
            self.current(pot)       # raises Broken where its table would not count
        return low

    def raise_to(self, pot, low):
        self.connect(believed=0)    # the statement does not ask whether the server is read-only
        self.current(pot)           # raises Broken
        # MariaDB's GREATEST(id, 5) is signed and fails from 2**63 up: hence CAST.
        self._update({pot: f"GREATEST(CAST(id AS UNSIGNED), CAST({low} AS UNSIGNED))"})
        return self.current(pot)    # whatever a trigger made of it

    def pots(self):
        tables = self._run((), "SELECT table_name FROM information_schema.tables "
                               "WHERE table_schema = DATABASE() AND engine IS NOT NULL")
        for table, in sorted(tables):
            match = re.fullmatch(f"pot_({POT_NAME.pattern})", table)
            if match:
                yield match[1], self._counter(match[1])

    def _counter(self, pot):
        """As current(), but "-" where the pot cannot be read."""
        for _ in range(2):      # a connection may have been lost
            try:
                return self.current(pot)
            except (NotFound, Broken):
                break
            except Unavailable:
                self.connect(believed=0)    # raises where it is the server's trouble
        return "-"

    def check(self, pot):
        try:
            with suppress(Retry):    # finds that the connection was lost while nobody used it
                self.connect(believed=0)
            self.connect()      # then makes a new one
            if pot:     # takes the locks and needs the privilege, and changes nothing
                self._update({pot: "id"})
        except Retry as error:      # a probe is told soon
            raise Unavailable(str(error), detail=error.detail) from error
        except (NotFound, Broken):      # it is that pot's alone
            pass


# -------------------------------------------------------------------------------------- allocation
# Requests that wait together are served by ONE call of a store. A request becomes a Job in its
# pot's queue; a worker, a thread that owns one store for life, takes the pots that wait, adds up
# the counts of each one's jobs, has the store take them all, and hands each job its IDs in order of
# arrival. A job stays in its queue until it is answered: so what is to be tried again keeps its
# order. A pot in trouble, or slow, is served alone then, and tried again at its own pace.

class Question(NamedTuple):
    """What a request asks for: `count` IDs of the pot, or with count 0 what call(allocator, store,
    pot) returns, one run of which answers all who wait with the same call.

    render(value) is the body of the answer: of the last ID, or of what the call returned. An int
    that a call returns is what the next ID will follow.
    """
    pot: str
    count: int = 0
    call: Callable = None
    render: Callable = b"%d".__mod__
    status: int = 200
    patience: float = None      # seconds to wait; None: the setting Timeout


class Job:
    """A question that waits for its answer.

    answer(value, error, crowd) is called once, with a value or an IdpotError: by the worker, whose
    Crowd comes with IDs, and with nothing else; or by expire() when `patience` seconds are over.
    """
    trouble = Unavailable("the database did not answer in")     # or why it is to be tried again

    def __init__(self, question, answer, patience=10.0):
        self.question = question
        self.pot = question.pot
        self.count = question.count
        self.answer = answer
        self.patience = patience
        self.start = monotonic()
        self._answered = threading.Lock()   # taken for good by the thread that answers
        self.answered = self._answered.locked       # answered() tells whether one has

    def finish(self, value=None, error=None, crowd=None):
        """Answers, unless that was done before."""
        if self._answered.acquire(False):
            self.answer(value, error, crowd)

    def expire(self):
        kind = type(self.trouble)       # says whether it may help to ask again
        self.finish(error=kind(f"{self.trouble} {self.patience:g} seconds"))


class Crowd:
    """The connections whose turn a worker has kept, while their threads sleep: it reads for them.

    Who pops a member has its turn, and gives it back or serves a request: dict.pop is atomic, and
    all the locking there is. The main thread pops them, too, where the worker is held up.
    """

    def __init__(self):
        self._epoll = None
        # A descriptor stays registered while its connection comes and goes at each request: that
        # saves a call of the kernel for each.
        self._watched = {}      # descriptor -> the connection that it was registered for
        self.members = {}       # descriptor -> a connection that may send its next request

    def add(self, connection):
        """Keeps its turn, which the caller has; or gives it back, where nothing can be watched."""
        descriptor = connection.descriptor
        if self._watched.get(descriptor) is not connection:
            try:
                self._epoll = self._epoll or select.epoll()
                self._epoll.register(descriptor, select.EPOLLIN)
            except OSError:
                connection.turn.release()
                return
            self._watched[descriptor] = connection
        self.members[descriptor] = connection

    def read(self, patience, jobs):
        """Adds the jobs of those that send a whole request, within `patience` seconds."""
        for descriptor, _ in self._epoll.poll(patience):
            connection = self.members.pop(descriptor, None)
            if connection:
                job = connection.serve_crowded()
                if job:
                    jobs.append(job)
            elif self._watched.pop(descriptor, None):
                # It sends while it waits for an answer, say: epoll would tell that again and again.
                with suppress(OSError):     # it is closed
                    self._epoll.unregister(descriptor)

    def read_on(self, patience, add_all):
        """Hands the jobs to add_all(), until nothing more is there. No other worker is woken for
        them: this one takes next whatever waits."""
        while self.members:
            jobs = []
            try:
                self.read(patience, jobs)
            finally:
                add_all(jobs)
            if not jobs:
                break
            patience = 0

    def give_back(self):
        """Gives all turns back; the threads of the connections read on."""
        while self.members:
            with suppress(KeyError):        # another thread has popped the last one
                self.members.popitem()[1].turn.release()

    def end(self):
        """Gives all turns back, and forgets which connections there were."""
        if self._epoll:
            self.give_back()
            self._epoll.close()
            self._epoll = None
            self._watched.clear()


ALL_POTS = "all pots"       # queues of what concerns no pot: no pot can have these names
HEALTH = "health check"


class Queues:
    """What waits for the workers: pots that have jobs, and workers that have none."""
    PAUSES = (0.0, 0.02, 0.1, 0.4, 1.0)     # seconds until a pot is tried again, by its failures
    ALONE = 10.0        # seconds for which a pot is served by itself after a slow call

    def __init__(self):
        # Guards all, but what a worker writes of its pots in suspects. No call or answer under it.
        # A pot that has jobs is waiting, or paused, or with one worker, which calls release().
        self._lock = threading.Lock()
        self.jobs = {}          # pot -> jobs, oldest first, of which the answered are still to go
        self.waiting = collections.deque()      # pots that any worker may take, oldest first
        self._paused = set()    # pots that are not to be tried before a moment of theirs
        self.suspects = {}      # pots to be served by themselves -> (failures, when to try again)
        # (store, wakes) of the workers without work. The last is the next: the one used last, which
        # has a connection; those that have none are at the bottom.
        self._idle = []

    def add(self, job):
        """Queues a job; who does this is to expire it, if it is not answered in time."""
        with self._lock:
            if self._queue(job):
                self._wake_one()

    def add_all(self, jobs):
        """Queues jobs for the worker that calls this: no other is woken for them."""
        with self._lock:
            for job in jobs:
                self._queue(job)

    def _queue(self, job):
        """Returns whether its pot waits now, and did not before."""
        pot = job.pot
        if pot in self.jobs:
            self.jobs[pot].append(job)
            return False
        self.jobs[pot] = [job]
        return self._let_wait(pot)

    def _let_wait(self, pot):
        if pot in self.suspects and monotonic() < self.suspects[pot][1]:
            self._paused.add(pot)
            return False
        self.waiting.append(pot)
        return True

    def resume(self, now):
        """Lets the pots be tried whose moment has come."""
        with self._lock:
            for pot in list(self._paused):
                if self.suspects[pot][1] <= now:
                    self._paused.remove(pot)
                    self.waiting.append(pot)
                    self._wake_one()

    def _wake_one(self):
        if self._idle:
            self._idle.pop()[1].put(None)

    def go_idle(self, store, wakes):
        """Puts the worker to the idle ones, to be woken by an item of wakes, and returns True; or
        False, where a pot waits for it. One without a connection leaves that to one that has."""
        with self._lock:
            leave = not store.connected and self._idle and self._idle[-1][0].connected
            if self.waiting and not leave:
                return False
            for _ in self.waiting:
                self._wake_one()
            self._idle.insert(len(self._idle) if store.connected else 0, (store, wakes))
            return True

    def next_batch(self, floors, most):
        """{pot: its jobs} of the pots that have waited longest: several, where each has a floor, is
        no suspect, and is asked for nothing but IDs, of which enough are left as far as the floor
        tells. Others are left to another worker.
        """
        batch = {}
        with self._lock:
            while self.waiting and len(batch) < most:
                pot = self.waiting[0]
                jobs = self._unanswered(pot)
                counts = [job.count for job in jobs]
                # A new pot is to be looked at first, a suspect may fail or take long, and what has
                # too few IDs left would fail: that is to cost the others nothing.
                single = (pot not in floors or pot in self.suspects or 0 in counts
                          or floors[pot] > MAX_ID - sum(counts))
                if single and batch:
                    break
                self.waiting.popleft()
                if not jobs:
                    self._forget(pot, floors)
                    continue
                batch[pot] = list(jobs)
                if single:
                    break
            if self.waiting:
                self._wake_one()
        return batch

    def all_waiting(self):
        """As next_batch(), whatever waits."""
        with self._lock:
            pots, self.waiting = self.waiting, collections.deque()
            return {pot: list(self._unanswered(pot)) for pot in pots}

    def _unanswered(self, pot):
        """Drops the pot's jobs that were answered, and returns the others."""
        self.jobs[pot] = [job for job in self.jobs[pot] if not job.answered()]
        return self.jobs[pot]

    def release(self, batch, floors):
        """Has the pots wait again that still have jobs, and forgets the others."""
        with self._lock:
            for pot in batch:
                if self._unanswered(pot):
                    self._let_wait(pot)     # the caller takes it next, or wakes who does
                else:
                    self._forget(pot, floors)

    def _forget(self, pot, floors):
        del self.jobs[pot]
        if pot not in floors:       # there may be no such pot
            self.suspects.pop(pot, None)

    def note_failure(self, batch):
        """One pot waits for a moment of its own, several for a try of their own."""
        for pot in batch:
            failures, moment = self.suspects.get(pot, (0, 0.0))
            if len(batch) == 1:
                moment = monotonic() + self.PAUSES[min(failures, len(self.PAUSES) - 1)]
                failures += 1
            self.suspects[pot] = (failures, moment)

    def note_success(self, batch, slow):
        now = monotonic()
        if slow:        # by one of them, which may be so again
            self.suspects.update(dict.fromkeys(batch, (0, now)))
        elif len(batch) == 1:
            [pot] = batch
            failures, moment = self.suspects.get(pot, (0, 0.0))
            if failures or moment < now - self.ALONE:
                self.suspects.pop(pot, None)


INTERNAL = IdpotError("internal error")


class Allocator:
    """The workers that serve the queues. A pot has one worker at most, which alone writes its
    floor; so a slow pot holds up no other while a worker is free."""
    CROWDED = 0.02      # seconds after a call that served two requests or more: see crowded()
    GATHER = 0.003      # seconds for which a worker waits for what its crowd sends next
    SLOW = 0.2          # seconds of a call, after which its pots are served alone

    def __init__(self, stores, stuck=60.0):
        self.stores = stores
        self._stuck = stuck     # seconds after which a worker that is busy with one thing hangs
        self._queues = Queues()
        self.submit = self._queues.add
        self._crowds = {store: Crowd() for store in stores}
        # An item makes a worker look for work, at once, or when it has nothing else to do.
        self._wakes = {store: queue.SimpleQueue() for store in stores}
        self._threads = [threading.Thread(target=self._work, args=(store,), daemon=True)
                         for store in stores]
        self._stopped = threading.Event()
        self._crowded = 0.0     # until when there is a crowd
        self._floors = {}       # pot -> highest number given or told
        self._taken = ""        # the pot that IDs were taken from last
        self._asked = ""        # the pot that IDs were asked of last, in vain
        self._busy = {}         # store -> when its worker, which writes this, began what it does

    def start(self):
        for thread in self._threads:
            thread.start()

    def crowded(self):
        """Whether many ask now: who has asked then waits for its turn, and not for data."""
        return monotonic() < self._crowded

    def look(self, now):
        """Now and then: lets pots be tried again, and gives back the turns that a worker keeps
        whose call takes long: these clients may want something else."""
        self._queues.resume(now)
        for store, since in list(self._busy.items()):
            if since < now - self.SLOW:
                self._crowds[store].give_back()

    def alive(self):
        """Whether the workers live, and none has been busy with one thing for too long."""
        oldest = monotonic() - self._stuck
        return (all(thread.is_alive() for thread in self._threads)
                and all(since > oldest for since in list(self._busy.values())))

    def stop(self, patience=1.0):
        """Has the workers close their stores and end; waits patience seconds at most."""
        self._stopped.set()
        for wakes in self._wakes.values():
            wakes.put(None)
        deadline = monotonic() + patience
        for thread in self._threads:
            thread.join(max(0, deadline - monotonic()))

    # What questions have called, by a worker with its store. GETs never show less than was given.

    def current(self, store, pot):
        return max(store.current(pot), self._floors.get(pot, 0))

    def raise_to(self, store, pot, low):
        return store.raise_to(pot, max(low, self._floors.get(pot, 0)))

    def list_pots(self, store, _):
        """(pot, current ID) of each; "-" for what cannot be read. Stops where nobody waits."""
        rows = []
        self._crowds[store].give_back()
        for pot, value in store.pots():
            rows.append((pot, value if value == "-" else max(value, self._floors.get(pot, 0))))
            self._busy[store] = monotonic()     # for alive(): it does not hang
            if self._queues.jobs[ALL_POTS][-1].answered():
                raise Retry("nobody waits for the list any more")
        return rows

    def check(self, store, _):
        """Tries the pot that an ID was taken from last; if none was, the one asked for last."""
        store.check(self._taken or self._asked)

    def _work(self, store):
        crowd = self._crowds[store]
        failures = 0
        while not self._stopped.is_set():
            if self._queues.go_idle(store, self._wakes[store]):
                self._busy.pop(store, None)
                crowd.end()
                failures = 0
                self._wakes[store].get()
                continue
            if failures:        # in a row: a random time, at most a second
                longest = min(1.0, 0.02 * 2 ** failures)
                self._stopped.wait(random.uniform(0, longest))
            self._busy[store] = monotonic()
            done = self._serve_next(store, crowd)
            failures = 0 if done else min(failures + 1, 10)
        crowd.end()
        store.close()

    def _serve_next(self, store, crowd):
        """Connects, serves the pots that have waited longest, and reads on for its crowd; returns
        False where it could not connect, or met what nobody expected."""
        batch = {}
        connected = done = False
        try:
            store.connect()
            connected = True
            batch = self._queues.next_batch(self._floors, store.most)
            if batch:       # else another worker was faster
                self._serve(store, batch, crowd)
                self._queues.release(batch, self._floors)
                batch = {}
            if crowd.members:
                patience = 0 if self._queues.waiting else self.GATHER
                crowd.read_on(patience, self._queues.add_all)
            done = True
        except Unavailable as error:
            done = connected
            crowd.give_back()
            if connected:
                self._queues.note_failure(batch)
            else:       # that is what all pots wait for, for days perhaps
                batch = self._queues.all_waiting()
            again = [job for jobs in batch.values() for job in jobs if not job.answered()]
            metrics.add("idpot_db_retries_total", len(again))
            for job in again:
                job.trouble = type(error)(f"{error}, tried for")
                # It lasts; but a worker that has a connection may serve them yet.
                if isinstance(error, Refused) and not any([one.connected for one in self.stores]):
                    job.finish(error=error)
        except Exception:
            log.exception("a worker")
            crowd.give_back()
            self._queues.note_failure(batch)
            if len(batch) == 1:
                [jobs] = batch.values()
                for job in jobs:
                    job.finish(error=INTERNAL)
        finally:
            if batch:
                self._queues.release(batch, self._floors)
        return done

    def _serve(self, store, batch, crowd):
        """Raises Retry where some jobs are to be tried again; others may be answered by then."""
        pot, jobs = next(iter(batch.items()))       # mostly the only ones: see next_batch()
        calls = [job for job in jobs if not job.count]
        if calls:       # first: they need not wait for takes that fail
            self._serve_calls(store, pot, calls)
            jobs = batch[pot] = [job for job in jobs if job.count]
        if not jobs:
            return
        try:
            if pot not in self._floors:
                self._floors[pot] = store.current(pot)  # raises Broken where it could repeat IDs
            self._take(store, batch, crowd)
        except IdpotError as error:
            self._asked = pot
            if isinstance(error, Retry):
                raise
            if len(batch) > 1:      # of one of them: note_failure() has each tried by itself
                raise Retry("a call for several pots failed")
            if isinstance(error, Exhausted) and len(jobs) > 1:
                self._take_what_fits(store, pot, jobs, crowd)
            else:
                self._refuse(pot, jobs, error)

    def _serve_calls(self, store, pot, jobs):
        """Has each call run once, for all jobs with that."""
        groups = collections.defaultdict(list)
        for job in jobs:
            groups[job.question.call].append(job)
        for call, group in groups.items():
            try:
                value = call(self, store, pot)
                if type(value) is int:      # it is told
                    self._floors[pot] = max(value, self._floors.get(pot, 0))
                for job in group:
                    job.finish(value)
            except Retry:
                raise
            except IdpotError as error:
                self._refuse(pot, group, error)

    def _refuse(self, pot, jobs, error):
        """Answers jobs with an error that trying again does not mend."""
        if isinstance(error, Broken):
            troubles.begin(f"pot {pot}", str(error))
        for job in jobs:
            job.finish(error=error)

    def _take_what_fits(self, store, pot, jobs, crowd):
        """Takes for each job by itself, since not all fit."""
        too_many = math.inf     # was refused, and so is anything above
        for job in jobs:
            try:
                if job.count < too_many and not job.answered():
                    self._take(store, {pot: [job]}, crowd)
            except Retry:
                raise
            except IdpotError as error:
                too_many = job.count
                refusal = error
            if job.count >= too_many:
                self._refuse(pot, [job], refusal)

    def _take(self, store, batch, crowd):
        """Takes IDs from all pots of the batch in one call, and hands them to their jobs."""
        wants = []
        for pot, jobs in batch.items():
            wants.append((pot, sum([job.count for job in jobs]), self._floors[pot]))
        lasts = store.take(wants)
        for (pot, count, floor), last in zip(wants, lasts):
            if last < floor + count:    # a column of another type, say
                raise Broken(
                    f"the table of pot {shown(pot)} does not count: {last} is behind {floor}")
            self._floors[pot] = last
        self._taken = wants[-1][0]
        metrics.add("idpot_db_statements_total", len(wants))
        metrics.add("idpot_ids_issued_total", sum([count for _, count, _ in wants]))
        now = monotonic()
        if sum(map(len, batch.values())) > 1:
            self._crowded = now + self.CROWDED
        slow = now > self._busy[store] + self.SLOW
        if slow or self._queues.suspects:
            self._queues.note_success(batch, slow)
        for (pot, count, _), last in zip(wants, lasts):
            troubles.end(f"pot {pot}")
            given = last - count
            for job in batch[pot]:
                given += job.count
                job.finish(given, None, crowd)


# --------------------------------------------------------------------------------- service manager

STOPS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOPS, signal.SIGHUP)
BACKLOG = 1024          # connections that wait to be accepted


@functools.cache
def notify_socket():
    """One for all states, made before the clients come: later no descriptor may be left."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def notify(state):
    """Tells systemd a state such as READY=1, as sd_notify(3) does, if it listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        address = "\0" + path[1:] if path[0] == "@" else path
        with suppress(OSError):      # nobody reads it
            notify_socket().sendto(state.encode(), socket.MSG_DONTWAIT, address)


def listen(host, port, written):
    """The socket that start_server or systemd left open, or one on the address, or StartError;
    written: whether somebody chose the address."""
    try:
        entries = os.environ.get("SERVER_STARTER_PORT", "").split(";")      # host:port=fd, path=fd
        descriptors = [int(entry.rpartition("=")[2]) for entry in entries if entry]
        if os.environ.get("LISTEN_PID") == str(os.getpid()):
            descriptors += range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))
        if len(descriptors) > 1:
            raise StartError(f"{len(descriptors)} sockets were handed over, but one is served: a "
                             "drop-in of the socket unit begins with an empty ListenStream=")
        if descriptors:
            os.set_inheritable(descriptors[0], False)
            listener = socket.socket(fileno=descriptors[0])
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise StartError("the socket that was handed over does not listen")
            if written:
                log.warning("Listen, %s:%d, is not used: a socket was handed over", host, port)
        else:
            both = not host and socket.has_dualstack_ipv6()     # IPv6 and IPv4
            family, _, _, _, address = socket.getaddrinfo(
                host or ("::" if both else "0.0.0.0"), port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(
                address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
        listener.setblocking(False)     # another process may take a connection before this one
        return listener
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(f"cannot listen on {host}:{port}: {reason}")


# ----------------------------------------------------------------------------------------- grammar
# What the bytes of a request say, as strict as RFC 9112 allows; nothing here knows who asks for it.

MAX_LINE = 8192         # bytes of a request line, then 414
MAX_HEAD = 16384        # of the request line and all headers, then 431
MAX_FIELDS = 64         # headers, then 431
SHORT = 1024            # bytes of a head that is kept
SHORT_FORM = 128        # of a form that is kept: parsed it takes many times that
MAX_BODY = 65536        # bytes, then 413
MAX_EXTRA = 8192        # of the size lines and trailers of a chunked body, then 413
CHUNK_COST = 8          # bytes that a chunk counts for beside its size line: it takes as much time

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n")
FIELD = TOKEN + rb":[\t -~\x80-\xff]*\r\n"
HEAD = re.compile(REQUEST_LINE.pattern + b"((?:" + FIELD + rb")*)\r\n")
FIELDS = re.compile(rb"([^:\r\n]+):([^\r\n]*)\r\n")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(|;[\t -~\x80-\xff]*)\r\n")
TRAILER = re.compile(FIELD + rb"|\r\n")
HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
ABSOLUTE = re.compile(rb"(?i)\Ahttps?://(?=[^/?:])" + HOST.pattern + b"(?=[/?]|$)")
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
ONCE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"origin")
FORM = b"application/x-www-form-urlencoded"
PATHS = ("/pot/create", "/pot/raise", "/pot", "/healthz", "/metrics")


def parse_target(target):
    """(path, query, route, pot) of a target (RFC 9112, 3.2); the route is the path's template.

    Nothing in a path is decoded: no pot's name needs a %, and a proxy's rule may have looked at it.
    """
    origin, absolute = ABSOLUTE.subn(b"", target)
    if absolute and origin[:1] != b"/":
        origin = b"/" + origin
    if origin[:1] != b"/" or b"#" in origin:
        raise BadRequest(f"{shown(target.decode())} is not a request target")
    path, _, query = origin.decode().partition("?")
    parent, _, pot = path.rpartition("/")
    route = "other"
    if path in PATHS:
        route = path
    elif parent in ("/id", "/pot") and POT_NAME.fullmatch(pot):
        route = parent + "/{pot}"
    return path, query, route, pot


def parse_headers(lines):
    """The headers by lower-case name; those that say how to read the request must be there once."""
    headers = {}
    for name, value in FIELDS.findall(lines):
        name = name.lower()
        value = value.strip(b" \t")
        if name in headers:
            if name in ONCE:
                raise BadRequest(f"header {name.decode()} is there twice")
            value = headers[name] + b", " + value
        headers[name] = value
    return headers


def parse_length(headers, old):
    """The length of the body; None where it is chunked (RFC 9112, 6)."""
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        if old or b"content-length" in headers:
            raise BadRequest("Transfer-Encoding is there with Content-Length, or in HTTP/1.0")
        if coding.lower() != b"chunked":
            coding = shown(coding.decode("latin-1"))
            raise IdpotError(
                f"Transfer-Encoding {coding} is not supported, but chunked", status=501)
        return None
    length = headers.get(b"content-length", b"0")
    if not re.fullmatch(b"[0-9]{1,19}", length):
        raise BadRequest(f"Content-Length {shown(length.decode('latin-1'))} is not a number")
    if int(length) > MAX_BODY:
        raise IdpotError(f"the body is longer than {MAX_BODY} bytes", status=413)
    return int(length)


def check_beginning(data):
    """Raises what is wrong already with a head, of which this has come."""
    end = data.find(b"\n") + 1
    if (end or len(data)) > MAX_LINE:
        raise IdpotError("the request line is too long", status=414)
    if data.count(b"\n") > data.count(b"\r\n"):
        raise BadRequest("a line ends in a bare LF")
    if end and not REQUEST_LINE.match(data):
        line = data.partition(b"\r\n")[0].decode("latin-1")
        raise BadRequest(f"{shown(line)} is not a request line")
    if len(data) > MAX_HEAD:
        raise IdpotError("the header is too long", status=431)


def parse_head(data):
    """What a head says, the bytes up to the empty line."""
    check_beginning(data)
    match = HEAD.fullmatch(data)
    if not match:
        raise BadRequest("a header line is malformed")
    method, target, version, lines = match.groups()
    if lines.count(b"\n") > MAX_FIELDS:
        raise IdpotError("the header has too many fields", status=431)
    if version not in (b"1.1", b"1.0"):
        raise IdpotError(f"HTTP/{version.decode()} is not spoken here", status=505)
    old = version == b"1.0"
    headers = parse_headers(lines)
    length = parse_length(headers, old)
    if not HOST.fullmatch(headers.get(b"host", b"" if old else b" ")):
        raise BadRequest("header Host is missing or malformed")       # RFC 9112, 3.2
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise IdpotError("Expect is understood as 100-continue only", status=417)
    options = re.findall(TOKEN, headers.get(b"connection", b"").lower())
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    referer = escaped(headers.get(b"referer", b"-"))
    agent = escaped(headers.get(b"user-agent", b"-"))
    path, query, route, pot = parse_target(target)
    name = method.decode()
    label = name if name in ("GET", "HEAD", "POST") else "other"
    return types.SimpleNamespace(
        method=name,
        path=path,
        query=query,
        route=route,
        pot=pot,
        labels=f'route="{route}",method="{label}"',     # of metrics
        old=old,                                    # HTTP/1.0
        keep=b"close" not in options and (not old or b"keep-alive" in options),
        length=length,                              # of the body; None: it is chunked
        expect=b"expect" in headers and not old,    # the client waits for 100 Continue
        form=headers.get(b"content-type", FORM).split(b";")[0].strip().lower(),
        token=token.strip() if scheme.lower() == b"bearer" else b"",
        origin=b"origin" in headers,
        line=escaped(b"%s %s HTTP/%s" % (method, target, version)),     # of the access log
        tail=f'"{referer}" "{agent}"')                                  # and its end


# For heads up to SHORT: a client repeats itself to the byte, and cannot fill it with long ones.
short_head = functools.lru_cache(maxsize=2048)(parse_head)


def malformed_head(data):
    """What the answer to a malformed request, and its line in the access log, need of a head."""
    line = (data.splitlines() or [b""])[0]
    line = escaped(re.sub(rb"(?i)(authorization|bearer).*", rb"\1...", line)) or "-"    # no token
    return types.SimpleNamespace(
        method="other", old=False, keep=False, labels='route="other",method="other"', line=line,
        tail='"-" "-"')


# --------------------------------------------------------------------------------------------- API
# What a request asks for. Nothing here knows a connection: an action takes a head and the fields of
# its form, and returns the Question, or raises the error to be answered.

PROBE = 1.8             # seconds for /healthz: with the 0.2 between looks it is answered within 2
METRICS_TEXT = Question("")     # is answered by the server itself
HEALTH_CHECK = Question(HEALTH, call=Allocator.check, render=lambda _: b"ok", patience=PROBE)
LIST_OF_POTS = Question(ALL_POTS, call=Allocator.list_pots, render=lambda rows: "".join(
    [f"{pot}\t{value}\n" for pot, value in rows]).encode())
FORM_FIELDS = {     # route -> what a POST there may have
    "/id/{pot}": ("count", "range"),
    "/pot/create": ("name", "min"),
    "/pot/raise": ("name", "min"),
}


@functools.lru_cache(maxsize=2048)      # clients repeat themselves
def ids_wanted(pot, count=None, span=None):
    """count and span: the texts of the fields count and range."""
    if count is not None and span is not None:
        raise BadRequest("count and range exclude each other")
    if span is not None:
        size = whole_number(span, 1, MAX_RANGE, "range")
        return Question(pot, size, render=lambda last: b"%d\t%d\n" % (last - size + 1, last))
    if count is not None:
        size = whole_number(count, 1, MAX_COUNT, "count")
        return Question(pot, size, render=lambda last: b"".join(
            [b"%d\n" % one for one in range(last - size + 1, last + 1)]))
    return Question(pot, 1)


def take_ids(head, fields):
    return ids_wanted(head.pot, fields.get("count"), fields.get("range"))


def get_id(head, _):
    return Question(head.pot, call=Allocator.current)


def get_pot(head, _):
    return Question(head.pot, call=Allocator.current, render=lambda _: b"", status=204)


def name_and_min(fields, default):
    pot = check_name(fields.get("name", ""))
    return pot, whole_number(fields.get("min", default), 0, MAX_ID, "min")


def create_pot(_, fields):
    pot, low = name_and_min(fields, "0")
    return Question(pot, call=lambda allocator, store, pot: store.create(pot, low),
                    render=lambda _: b"Created new pot", status=201)


def raise_pot(_, fields):
    pot, low = name_and_min(fields, "")
    return Question(pot, call=lambda allocator, store, pot: allocator.raise_to(store, pot, low))


# Route -> method -> what does it; HEAD is GET. Pots may have the names create and raise.
ACTIONS = {
    "/id/{pot}": {"GET": get_id, "POST": take_ids},
    "/pot/{pot}": {"GET": get_pot},
    "/pot/create": {"GET": get_pot, "POST": create_pot},
    "/pot/raise": {"GET": get_pot, "POST": raise_pot},
    "/pot": {"GET": lambda *_: LIST_OF_POTS},
    "/healthz": {"GET": lambda *_: HEALTH_CHECK},
    "/metrics": {"GET": lambda *_: METRICS_TEXT},
}


def check_token(head, settings):
    """Raises Unauthorized, or Forbidden, where the request lacks the bearer token it needs."""
    admin = head.method == "POST" and head.route in ("/pot/create", "/pot/raise")
    token = (settings.admintoken if admin else settings.token).encode()
    if token and hmac.compare_digest(token, head.token):
        return
    if head.origin:
        raise Forbidden("a request from a web page (it has an Origin) needs the bearer token")
    if token and head.route not in ("other", "/healthz"):
        need = "the bearer token is wrong" if head.token else "a bearer token is needed"
        raise Unauthorized(need)


def parse_form(text):
    """The fields of a form (URL Standard, 5.1) as pairs."""
    try:
        return tuple(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=100))
    except ValueError:
        raise BadRequest("the form is not UTF-8, or has too many fields")


short_form = functools.lru_cache(maxsize=2048)(parse_form)      # as short_head


def form_fields(head, body):
    """The fields of the query and of the form, each at most once, and none that is unknown."""
    if head.method != "POST":
        body = b""      # it means nothing
    if body and head.form != FORM:
        form = shown(head.form.decode("latin-1"))
        raise IdpotError(f"the body is {form}, not {FORM.decode()}", status=415)
    text = f"{head.query}&{body.decode('latin-1')}"
    pairs = short_form(text) if len(text) <= SHORT_FORM else parse_form(text)
    known = FORM_FIELDS.get(head.route, ())
    here = f"here are {', '.join(known)}" if known else "there are none here"
    fields = {}
    for name, value in pairs:
        if name not in known:
            raise BadRequest(f"unknown field {shown(name)}: {here}")
        if head.method != "POST":
            raise BadRequest(f"field {shown(name)} is for POST")
        if name in fields:
            raise BadRequest(f"{shown(name)} is given twice")
        fields[name] = value
    return fields


def ask(head, body, settings):
    """The Question of a request, or raises the error to be answered."""
    if settings.admintoken or head.origin:
        check_token(head, settings)
    actions = ACTIONS.get(head.route)
    if not actions:
        raise NotFound(f"there is nothing at {shown(head.path)}")
    action = actions.get("GET" if head.method == "HEAD" else head.method)
    if not action:
        allowed = ", ".join(["GET", "HEAD", *list(actions)[1:]])
        raise IdpotError(f"{head.method[:20]} is not allowed here, but {allowed}", status=405,
                         header=f"Allow: {allowed}\r\n")
    return action(head, form_fields(head, body) if body or head.query else {})


# ------------------------------------------------------------------------------------- connections
# Threads: the main one accepts (serve_forever) and looks at all connections (service_actions); each
# connection has one; the allocator's workers; the Writer; one for each answer that waits for its
# client. What is not here is socketserver's: its loop calls get_request(), process_request() and
# service_actions(); its process_request_thread() makes a Connection, and calls that one's setup(),
# handle() and finish().
#
# Locks: who has a turn may take any other; Troubles' is held when the Writer's is taken, and that
# when Metrics' is. Under the Queues' none is taken.
#
# A connection's `turn` is a lock. Who holds it does the next thing for the connection, alone: reads
# a request, answers it, or keeps it in a Crowd. The turn goes from thread to thread with a request
# until its answer has been sent: so answers come in order. Its holder also writes `state`, a tuple
# (name, since, job); for ASKING, since is when the request began, and job its Job:
#
#   IDLE      until the client sends its next request; nobody has the turn, or a Crowd keeps it
#   READING   a request arrives: serve_request(), by the connection's thread, or a worker if whole
#   ASKING    a Job is with the allocator; whoever answers it has the turn
#   SENDING   the client did not take the answer at once; a short-lived thread sends the rest
#   CLOSING   the last answer was sent; only the connection's thread closes
#
# Whoever has the answer, mostly a worker, sends it without waiting for the client (wrk -c64:
# 31,004/s; 12,589/s where the connection's thread is woken to send).
#
# Who reads the next request? (1) While calls of the store serve two requests or more, and for 20 ms
# after, a thread that has asked is `parked`: it waits for its turn and not for data. (2) The worker
# that gives IDs to a parked connection keeps its turn, in its Crowd. (3) After each call the worker
# reads what the members of its Crowd have sent, and queues it; their threads sleep on. (4) What is
# no whole request, an error, an end, or more than one request goes back to the thread, with the
# turn. (5) So do all turns when the worker goes idle, fails, or is in one call for over 0.2 s.
# Without this each request hands Python's lock from thread to thread twice (c=64: half the speed).
#
# What takes too long the main thread ends by shutdown(2), which the connection's thread sees: for
# reading where the client is to send (what has arrived is still read), altogether where it is to
# read an answer.

KEPT_THREADS = 16       # that stay for the next connection
LOOK = 0.2              # seconds between looks at all connections
HURRIED = 0.5           # seconds that a client has to send at a stop
LINGER = 2.0            # seconds for which a closed connection is read, see Connection.finish
RECEIVED = 2048         # bytes that are received at once
IDLE, READING, ASKING, SENDING, CLOSING = "idle", "reading", "asking", "sending", "closing"

PLAIN = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@functools.lru_cache(maxsize=256)
def answer_head(status, media, header, length):
    """The head of an answer; because of its Date the cache is cleared every LOOK seconds."""
    phrase = http.HTTPStatus(status).phrase
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    if status != 204:       # RFC 9110, 8.6
        header = f"Content-Type: {media}\r\n{header}Content-Length: {length}\r\n"
    return (f"HTTP/1.1 {status} {phrase}\r\nCache-Control: no-store\r\nDate: {date}\r\n"
            f"{header}\r\n").encode()


class CutOff(BadRequest):
    """The client ended its sending within a request."""


class Incoming:
    """What a client sends: a buffer of what was received and not yet read, and the reading."""

    def __init__(self, connection):
        self.buffer = b""
        self._connection = connection       # the socket

    def receive(self, flags=0):
        """Adds to the buffer what comes next; returns False at the end of the client's sending."""
        data = self._connection.recv(RECEIVED, flags)
        self.buffer += data
        return bool(data)

    def begins(self):
        """Waits for the beginning of a request, behind empty lines if any come (RFC 9112, 2.2);
        returns False at the end of the client's sending."""
        for _ in range(8):      # then RequestTimeout begins: nobody stays by sending only these
            if not self.buffer and not self.receive():
                return False
            if self.buffer[:2] != b"\r\n":
                break
            self.buffer = EMPTY_LINES.sub(b"", self.buffer, 1)
        return True

    def _receive_more(self):
        if not self.receive():
            raise CutOff("the request is cut off")

    def read_whole(self):
        """Receives once, without waiting. Returns (head, body) of the request that has come, if all
        of it has; None where its reading would wait, send or raise an error, and where it is long
        or chunked."""
        try:
            self.receive(socket.MSG_DONTWAIT)
            data = self.buffer
            begin = data.find(b"\r\n\r\n") + 4      # of the body
            if not 4 < begin <= SHORT:
                return None
            head = short_head(data[:begin])
        except (OSError, IdpotError):       # whoever reads next meets it, too
            return None
        if head.length is None or head.expect:
            return None
        end = begin + head.length
        if len(data) < end:
            return None
        self.buffer = data[end:]
        return head, data[begin:end]

    def read_head(self):
        """Reads and parses the next head, however it comes; raises what is wrong as soon as that
        has come, and leaves it in the buffer then."""
        searched = 0
        while (end := self.buffer.find(b"\r\n\r\n", searched) + 4) < 4:
            check_beginning(self.buffer)
            searched = max(0, len(self.buffer) - 3)
            self._receive_more()
            if self.buffer[:2] == b"\r\n":      # an empty line came in two pieces
                self.buffer = EMPTY_LINES.sub(b"", self.buffer, 1)
                searched = 0
        parse = short_head if end <= SHORT else parse_head
        head = parse(self.buffer[:end])
        self.buffer = self.buffer[end:]
        return head

    def read_body(self, head):
        return self._read_chunks() if head.length is None else self._read_exactly(head.length)

    def _read_exactly(self, length):
        while len(self.buffer) < length:
            self._receive_more()
        data = self.buffer[:length]
        self.buffer = self.buffer[length:]
        return data

    def _read_line(self, limit):
        """The next line of a chunked body; raises IdpotError where it is longer than the limit."""
        while (end := self.buffer.find(b"\n") + 1) == 0 and len(self.buffer) <= limit:
            self._receive_more()
        if not 0 < end <= limit:
            raise IdpotError("the size lines or trailers of the body are too long", status=413)
        line = self._read_exactly(end)
        if line[-2:] != b"\r\n":
            raise BadRequest("a line ends in a bare LF")
        return line

    def _read_chunks(self):
        """The body of chunks (RFC 9112, 7.1); extensions and trailers mean nothing here."""
        body = b""
        left = MAX_EXTRA
        size = 1
        while size:
            line = self._read_line(left)
            left -= len(line) + CHUNK_COST
            match = CHUNK.fullmatch(line)
            if not match:
                raise BadRequest(f"{shown(line.decode('latin-1').rstrip())} is not a chunk's size")
            size = int(match[1], 16)
            if len(body) + size > MAX_BODY:
                raise IdpotError(f"the body is longer than {MAX_BODY} bytes", status=413)
            if size:
                body += self._read_exactly(size)
                if self._read_exactly(2) != b"\r\n":
                    raise BadRequest("a chunk is longer than its size")
        while line != b"\r\n":
            line = self._read_line(left)
            left -= len(line)
            if not TRAILER.fullmatch(line):
                raise BadRequest("a trailer line is malformed")
        return body


class Connection(http.server.BaseHTTPRequestHandler):
    """A client's connection, and its thread. The head of this section tells its life."""

    def setup(self):
        address = self.client_address
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"    # for a Unix socket
        self.host = host.removeprefix("::ffff:")
        self.settings = self.server.settings
        self.descriptor = self.request.fileno()
        self.turn = threading.Lock()
        self.state = (IDLE, monotonic(), None)
        # Whether the thread, once it has asked, waits for the turn and not for data. Written by the
        # thread while it has the turn.
        self.parked = False
        # The thread's; while that is parked, of whoever has the turn.
        self.incoming = Incoming(self.request)
        self.server.connections[self.request] = self

    def handle(self):
        """The thread: serves requests, until the client or an answer ends the connection."""
        with suppress(OSError):         # the client has gone
            while self.next_turn():
                self.parked = self.server.allocator.crowded()
                job = self.serve_request()
                if job:
                    self.server.allocator.submit(job)

    def next_turn(self):
        """Waits for the next request, at least its beginning, and for the turn, which the caller
        then has; or returns False without it, at the end of the connection."""
        if self.parked:
            met = None
            while not self.turn.acquire(timeout=self.server.turn_limit):
                # A crowd may last for days; where nothing happens for so long, but for a time in
                # which the process was stopped, a fault has kept the turn.
                if self.state is met:
                    return False
                met = self.state
            self.parked = False
            self.turn.release()
        if not self.incoming.begins():
            return False
        if not self.turn.acquire(timeout=self.server.turn_limit):
            return False
        if self.state[0] == CLOSING:
            self.turn.release()
            return False
        return True

    def serve_crowded(self):
        """For the worker whose Crowd kept the turn, when something has come: as serve_request(),
        without waiting; or gives the turn, and what came, to the thread."""
        job = None
        done = False
        try:
            whole = self.incoming.read_whole()
            if whole:
                job = self.serve_request(whole)
            done = True
        finally:
            if not done:        # a surprise, as lack of memory is, ends the connection
                self.end_turn(keep=False)
        if not whole:
            self.turn.release()
        return job

    def serve_request(self, whole=None):
        """Serves a request: the (head, body) `whole`, or what it reads, whose beginning has come.

        Returns the Job that is to be submitted, whose answer then ends the turn, or None where that
        was done. The caller has the turn.
        """
        began = monotonic()
        self.state = (READING, began, None)
        self.head = None
        keep = False        # until all is read, where the next request begins is unknown
        try:
            if whole:
                self.head, body = whole
            else:
                self.head = self.incoming.read_head()
                if self.head.expect:
                    self.send_continue()
                body = b"" if self.head.length == 0 else self.incoming.read_body(self.head)
            keep = self.head.keep
            asked = ask(self.head, body, self.settings)
            if asked is METRICS_TEXT:
                self.answer(200, self.server.metrics_text(), keep, media=PROMETHEUS)
                return None
            job = Job(asked, self.answer_job, asked.patience or self.settings.timeout)
            self.state = (ASKING, began, job)
            return job
        except OSError:     # the client has gone
            self.end_turn(keep=False)
        except Exception as error:
            self.head = self.head or malformed_head(self.incoming.buffer)
            if not isinstance(error, IdpotError):
                log.exception("request from %s", self.host)
                error, keep = INTERNAL, False
            late = monotonic() > began + self.settings.requesttimeout or self.server.stopping
            if isinstance(error, CutOff) and late:      # RFC 9110, 15.5.9
                error = IdpotError("the request did not arrive in time", status=408)
            self.answer_error(error, keep)
        return None

    def send_continue(self):
        """Asks for the body. What is sent of that must be all; or none, to a client that has much
        to read first: it need not wait for it (RFC 9110, 10.1.1)."""
        line = b"HTTP/1.1 100 Continue\r\n\r\n"
        with suppress(BlockingIOError):
            if self.request.send(line, socket.MSG_DONTWAIT) < len(line):
                raise ConnectionError("half a 100 Continue was sent")

    # Answering, by whoever has the answer, and with it the turn.

    def answer_job(self, value, error, crowd):
        """Job.answer: called by a worker, with its crowd where it gives IDs, or the main thread."""
        done = False
        try:
            if error:
                self.answer_error(error, self.head.keep)
            else:
                asked = self.state[2].question
                self.answer(asked.status, asked.render(value), self.head.keep, crowd=crowd)
            done = True
        except MemoryError:     # costs nobody else an answer
            pass
        finally:
            if not done:        # as in serve_crowded()
                self.end_turn(keep=False)

    def answer_error(self, error, keep):
        self.answer(error.status, f"{error}\n".encode(), keep, header=error.header)

    def answer(self, status, body, keep, header="", media=PLAIN, crowd=None):
        """Sends an answer without waiting for the client, and ends the turn; a thread of its own
        does that where the client does not take all at once."""
        head = self.head
        keep = keep and not self.server.stopping
        if not keep:
            header += "Connection: close\r\n"
        elif head.old:
            header += "Connection: keep-alive\r\n"
        sent = b"" if head.method == "HEAD" else body
        data = answer_head(status, media, header, len(body)) + sent
        # Noted before it is sent: who has an answer finds it counted.
        now = monotonic()
        self.server.writer.note((self.host, head, status, len(sent), now - self.state[1]))
        rest = b""
        try:
            rest = data[self.request.send(data, socket.MSG_DONTWAIT):]
        except BlockingIOError:     # the client is to read first
            rest = data
        except OSError:             # it has gone: whatever else it sent is served no more
            keep = False
        if rest:
            self.state = (SENDING, now, None)
            try:
                _thread.start_new_thread(self.send_rest, (rest, keep))
                return
            except RuntimeError:    # no thread is left: the client is to see that this is not all
                keep = False
        self.end_turn(keep, crowd)

    def send_rest(self, rest, keep):
        """Sends as slowly as the client reads; look() ends what takes too long."""
        try:
            self.request.sendall(rest)
        except OSError:
            keep = False
        self.end_turn(keep)

    def end_turn(self, keep, crowd=None):
        """Lets the next request have the turn, in the crowd or not; or the client see the end."""
        self.state = (IDLE if keep else CLOSING, monotonic(), None)
        if keep and crowd is not None and self.parked and not self.incoming.buffer:
            crowd.add(self)
            return
        if not keep:
            with suppress(OSError):
                self.request.shutdown(socket.SHUT_WR)
        self.turn.release()

    def finish(self):
        """Returns when the connection can be closed: its last answer has been sent.

        What the client still sends is read for a moment: to close with unread input would reset the
        connection, and could destroy the answer on its way (RFC 9112, 9.6).
        """
        with suppress(OSError):
            while self.request.recv(4096):
                name, since, _ = self.state
                if name == CLOSING and monotonic() > since + LINGER:
                    break
        if self.state[0] in (ASKING, SENDING):
            self.turn.acquire(timeout=self.server.turn_limit)

    # By the main thread, which has no turn.

    def shut(self):
        """Ends the wait for a client that is to send, or to read."""
        reads = self.state[0] == SENDING
        with suppress(OSError):     # its thread has just closed it
            self.request.shutdown(socket.SHUT_RDWR if reads else socket.SHUT_RD)

    def look(self, now):
        """Ends what takes too long: a wait for the database, for a client to read, or to send."""
        name, since, job = self.state
        stopping = self.server.stopping
        if name == ASKING:
            deadline = min(job.start + job.patience, self.server.end)
            if now > deadline and not job.answered():
                job.expire()
        else:
            deadline = since + self.server.limits[name]
            if stopping and name != SENDING:
                deadline = min(deadline, max(since, stopping) + HURRIED)
            if now > deadline:
                self.shut()


class Server(http.server.ThreadingHTTPServer):
    """Accepts and bounds connections; does in the main thread what is to be done now and then."""

    def __init__(self, settings, listener, allocator, writer):
        super().__init__(None, Connection, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        if listener.family != socket.AF_UNIX:       # connections inherit both
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            patience = int(1000 * settings.idletimeout)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        self.settings = settings
        self.allocator = allocator
        self.writer = writer
        self.connections = {}       # socket -> its Connection, or until that is made when it came
        self.stopping = 0.0         # when the stop began, 0.0 before
        self.end = math.inf         # when all must be answered, after that
        self.limits = {     # seconds in a state, but for ASKING
            IDLE: settings.idletimeout,
            READING: settings.requesttimeout,
            SENDING: settings.idletimeout,
            CLOSING: LINGER,
        }
        # Seconds that a turn takes at most, from the question to the end of a slow answer.
        self.turn_limit = settings.timeout + settings.idletimeout + LINGER
        # A store needs one for its connection, one for a crowd; so do the log, /proc, a newcomer.
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, min(settings.maxconnections, files - 2 * len(allocator.stores) - 16))
        self._looked = monotonic()
        self._free = []             # a queue for each kept thread that waits for a connection

    def stop(self):
        """Stops accepting, after what waits in the backlog; returns when all is answered, or after
        Timeout. Requests that are answered from now on are answered with a close."""
        self.stopping = monotonic()
        self.end = self.stopping + 0.75 * self.settings.timeout     # answers need a moment, too
        backlog = select.poll()
        backlog.register(self.socket, select.POLLIN)
        while monotonic() < self.stopping + HURRIED and backlog.poll(0):    # there may be no end
            self.handle_request()
        self.server_close()
        while self.connections and monotonic() < self.stopping + self.settings.timeout:
            time.sleep(0.02)
            self.service_actions()

    def service_actions(self):
        """Every LOOK seconds: deadlines, watchdog, signals; raises KeyboardInterrupt to stop."""
        now = monotonic()
        if now < self._looked + LOOK:
            return
        self._looked = now
        answer_head.cache_clear()
        with suppress(MemoryError):     # the rest is left to the next look
            for request, connection in list(self.connections.items()):     # first: it may free
                if isinstance(connection, Connection):
                    connection.look(now)
                elif now > connection + self.settings.requesttimeout:   # its thread died at birth
                    self.shutdown_request(request)
            self.allocator.look(now)
            self.writer.count()     # lines take less memory than notes, if they cannot be written
        if "WATCHDOG_USEC" in os.environ and self.allocator.alive():
            notify("WATCHDOG=1")        # that this thread hangs shows of itself
        if signal.sigtimedwait(STOPS, 0):
            raise KeyboardInterrupt
        if signal.sigtimedwait([signal.SIGHUP], 0):     # a moved LogFile is seen at each write
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            notify("READY=1")

    def made(self):
        """The connections that have a thread."""
        return [one for one in list(self.connections.values()) if isinstance(one, Connection)]

    def metrics_text(self):
        waiting = sum(one.state[0] in (READING, ASKING, SENDING) for one in self.made())
        gauges = {
            "idpot_connections": len(self.connections),
            "idpot_http_requests_in_flight": waiting,
            "idpot_db_connections": sum(store.connected for store in self.allocator.stores),
        }
        self.writer.count()
        return metrics.text(gauges).encode()

    def get_request(self):
        """Accepts a connection; at a limit it makes room for the next try, and raises OSError."""
        try:
            if len(self.connections) >= self._most:
                raise OSError("all connections are in use")
            request, address = super().get_request()
            self.connections[request] = monotonic()
            return request, address
        except MemoryError as error:
            raise OSError("no memory is left") from error
        except BlockingIOError:         # another process has taken it
            raise
        except OSError:                 # the accepting loop comes again at once
            self._make_room()
            raise

    def process_request(self, request, client_address):
        """Gives the connection to a thread that waits, or to a new one, which takes 0.1 ms more."""
        deadline = monotonic() + LOOK
        while True:
            try:
                # Each has a queue of its own: get() of a shared one wakes the next waiter, too.
                self._free.pop().put((request, client_address))
                return
            except IndexError:
                pass
            try:
                # threading.Thread waits until it runs: 0.8 s for the last of 1,000 clients, not 0.2
                _thread.start_new_thread(self._serve_connections, (request, client_address))
                return
            except RuntimeError:        # no more can be started: one that becomes free takes it
                if monotonic() > deadline:
                    raise
                self._make_room()

    def _serve_connections(self, request, client_address):
        own = queue.SimpleQueue()
        while True:
            troubles.end("accepting")
            self.process_request_thread(request, client_address)
            if len(self._free) >= KEPT_THREADS:
                return
            self._free.append(own)
            request, client_address = own.get()

    def shutdown_request(self, request):
        request.close()
        self.connections.pop(request, None)

    def handle_error(self, request, client_address):
        """A connection could not be served, for lack of threads or memory, say."""
        error = sys.exc_info()[1]
        troubles.begin("accepting", f"a connection could not be served: {error!r}")

    def _make_room(self):
        """Ends the connection that has been silent longest, and waits until one is closed."""
        # No threading.Event: that is Python code, where a lack of memory may leave its lock taken.
        before = len(self.connections)
        silent = [one for one in self.made() if one.state[0] != ASKING]
        longest = min(silent, key=lambda one: one.state[1], default=None)
        if longest and longest.state[1] < monotonic() - 0.1:
            longest.shut()
        deadline = monotonic() + 0.05
        while len(self.connections) >= before and monotonic() < deadline:
            time.sleep(0.002)


# ------------------------------------------------------------------------------------------ client

class Reply(io.RawIOBase):
    """What a socket receives until a deadline, in place of the socket for http.client."""

    def __init__(self, connection, deadline):
        self._connection = connection
        self._file = connection.makefile("rb", buffering=0)
        self._deadline = deadline

    def makefile(self, _):
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self._deadline - monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)
        return self._file.readinto(buffer)

    def close(self):
        self._file.close()
        super().close()


class Client(AbstractContextManager):
    """A client of an idpot server at a URL, over one connection that is kept; for one thread.

    Its methods raise BadRequest, Unauthorized, Forbidden, NotFound, Exists, Exhausted or
    Unavailable as the server answers, BadRequest before anything is sent for an argument that
    cannot be, IdpotError for any other status and for what is no answer of idpot's, WentBack where
    an ID is not greater than those before (after a restore without a raise, say), and OSError where
    the server cannot be reached or has not answered in `timeout` seconds.
    """
    ERRORS = {kind.status: kind for kind in (       # but a 409 to a create is Exists
        BadRequest, Unauthorized, Forbidden, NotFound, Exhausted, Unavailable)}
    NUMBER = "[0-9]{1,20}"

    def __init__(self, url, token=None, timeout=15):
        parts = urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname or parts.port == 0:
            raise ValueError(f"{url!r} is not http://host:port or https://host:port")
        if not 0 < timeout <= 86400:
            raise ValueError(f"timeout {timeout!r} is not above 0, at most 86400")
        self._timeout = timeout
        self._connection = kinds[parts.scheme](parts.netloc, timeout=timeout)
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Content-Type": FORM.decode()}
        if token:
            if re.search("[\0-\x1f\x7f]", token):
                raise ValueError("a token has no control characters")
            self._headers["Authorization"] = f"Bearer {token}".encode()
        self._highest = {}      # pot -> greatest ID that was answered

    def create(self, pot, min=0):
        """Creates the pot; its first ID is min + 1. Tried once: again it could find its own pot."""
        self.close()
        low = whole_number(str(min), 0, MAX_ID, "min")
        try:
            self._ask(201, "Created new pot", "POST", "/pot/create", pot, name=pot, min=low)
        except Exhausted as error:
            raise Exists(str(error)) from None

    def exists(self, pot):
        try:
            self._ask(204, "", "GET", f"/pot/{pot}", pot)
            return True
        except NotFound:
            return False

    def current(self, pot):
        """Returns the ID that was given last, or min."""
        return int(self._ask(200, self.NUMBER, "GET", f"/id/{pot}", pot))

    def next(self, pot):
        """Returns a new ID."""
        return self._take(pot, 1, lambda ids: str(ids[0]))[0]

    def next_many(self, pot, count):
        """Returns a range of count (1..10000) new IDs."""
        count = whole_number(str(count), 1, MAX_COUNT, "count")
        return self._take(pot, count, lambda ids: "".join([f"{one}\n" for one in ids]), count=count)

    def next_range(self, pot, count):
        """Returns a range of count (1..2**32) new IDs."""
        count = whole_number(str(count), 1, MAX_RANGE, "range")
        return self._take(pot, count, lambda ids: f"{ids[0]}\t{ids[-1]}\n", range=count)

    def raise_to(self, pot, min):
        """Raises the counter to min unless it is higher; returns the counter."""
        low = whole_number(str(min), 0, MAX_ID, "min")
        text = self._ask(200, self.NUMBER, "POST", "/pot/raise", pot, name=pot, min=low)
        if int(text) < low:
            raise IdpotError(f"{text} is below {low}, to which the pot was to be raised")
        return int(text)

    def _take(self, pot, wanted, render, **fields):
        text = self._ask(200, rf"{self.NUMBER}(\s[0-9\s]*)?", "POST", f"/id/{pot}", pot, **fields)
        first = int(text.split()[0])
        new = range(first, first + wanted)
        if text != render(new) or not 0 < first <= new[-1] <= MAX_ID:
            raise IdpotError(f"{shown(text)} are not the {wanted} IDs that were asked for")
        highest = self._highest.get(pot, 0)
        if first <= highest:
            raise WentBack(f"pot {shown(pot)} gave {first} after {highest}")
        self._highest[pot] = new[-1]
        return new

    def _ask(self, wanted, pattern, method, path, pot, **fields):
        """The text of an answer with the wanted status, if it matches the pattern."""
        check_name(pot)
        deadline = monotonic() + self._timeout
        self._connection.response_class = lambda connection, **more: http.client.HTTPResponse(
            Reply(connection, deadline), **more)
        longest = 4096 + 21 * fields.get("count", 1)
        kept = self._connection.sock is not None
        while True:
            try:
                self._connection.request(
                    method, self._prefix + path, urlencode(fields) or None, self._headers)
                with self._connection.getresponse() as answer:
                    data = answer.read(longest + 1)
                break
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.close()        # a late answer would be taken for that of the next request
                if kept and isinstance(error, ConnectionError):     # it had died
                    kept = False
                    continue
                if isinstance(error, OSError):
                    raise
                raise IdpotError(f"this is no answer of idpot: {error!r}") from error
        text = data.decode("utf-8", "replace")
        whole = answer.length == 0 or answer.chunked    # as far as can be told
        if not whole or len(data) > longest:
            self.close()
        elif answer.status in self.ERRORS and re.fullmatch("[^\n]+\n", text):
            raise self.ERRORS[answer.status](text.strip())
        elif answer.status == wanted and re.fullmatch(pattern, text):
            return text
        raise IdpotError(f"this is no answer of idpot: {answer.status} {shown(text)}")

    def close(self):
        self._connection.close()

    def __exit__(self, *_):
        self.close()


# ------------------------------------------------------------------------------------ command line

def start_or_stop(store):
    """What store.start() returns. A stop signal meanwhile ends the process at once, whatever a
    silent database keeps waiting; as PID 1, too, to which the kernel brings no signal's default."""
    # In a thread of its own: no handler of a signal runs while the driver waits.
    start = ThreadPoolExecutor(1).submit(store.start)
    while not start.done():
        if signal.sigtimedwait(STOPS, 0.02):
            os._exit(0)
    return start.result()


def give_up(writer, died):
    """Ends the process with a worker or the Writer, which lack of memory can end wherever it is:
    idpot without one would never serve again, and whoever started it starts it again."""
    try:
        writer.drain()
        threading.__excepthook__(died)      # its traceback, on stderr
    finally:
        os._exit(1)


def serve(settings, writer):
    """Serves until a stop signal; raises StartError."""
    try:
        writer.start()
        stores = (MysqlStore if settings.mysql else SqliteStore).all(settings)
        description = start_or_stop(stores[0])
        allocator = Allocator(stores, 10 * settings.timeout + 10)   # it may wait at each address
        listener = listen(*settings.listen, settings.listens)
        server = Server(settings, listener, allocator, writer)
        allocator.start()
    except (OSError, RuntimeError) as error:    # the system has no more files, or threads
        raise StartError(str(error))
    threading.excepthook = functools.partial(give_up, writer)
    # Inherited by the connections' threads, not by the workers: one that wakes, because its client
    # has sent, does not push aside the thread that runs and has the GIL (sched(7)). New connections
    # (ab -c10) 8,091/s for 6,519; a crowd's threads sleep, and it makes no difference there.
    with suppress(OSError):      # a service manager may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if listener.family == socket.AF_UNIX:
        where = f"unix:{listener.getsockname()}"
    else:
        host, port = listener.getsockname()[:2]
        if not (host.startswith("127.") or host == "::1" or settings.admintoken):
            log.warning("%s is not a loopback address and no Token is set: anybody who reaches it "
                        "can create, raise and use up pots", host)
        name = f"[{host}]" if ":" in host else host
        where = f"http://{name}:{port}"
    log.info("listening on %s (%s)", where, description)
    notify(f"READY=1\nSTATUS={description}")
    with suppress(KeyboardInterrupt):
        server.serve_forever(LOOK)
    notify("STOPPING=1")
    with suppress(KeyboardInterrupt):        # the second signal: it stops at once
        server.stop()
        allocator.stop()
    log.info("stopped")


def run(arguments):
    settings = load_settings(arguments.config)
    if arguments.listen:
        settings.listen = arguments.listen
        settings.listens = True
    if arguments.check:
        path = time.strftime(settings.logfile)
        if path:
            check_place(f"LogFile {shown(path)}", path)
            if settings.loglinkname:
                check_link(settings.loglinkname)
        found = (MysqlStore if settings.mysql else SqliteStore).all(settings)[0].probe()
        print(f"idpot: the settings are valid, {found}")
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):      # a service manager may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # the soft one is for select(2)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # in all threads: see service_actions
    threading.stack_size(512 * 1024)    # with 8 MB a limit of address space is soon reached
    # Thousands of threads that wait for the GIL would do nothing else than wake each 5 ms.
    sys.setswitchinterval(0.2)
    try:
        file = settings.logfile and StrftimeFileHandler(settings.logfile, settings.loglinkname)
    except OSError as error:
        name, place = "LogFile", error.filename or settings.logfile
        if error.filename2:     # of symlink(2)
            name, place = "LogLinkName", error.filename2
        raise StartError(f"{name} {shown(place)}: {error.strerror}")
    writer = Writer(file, (settings.token, settings.admintoken))
    log.handlers = [writer]
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        serve(settings, writer)
    finally:
        writer.drain()


def main(argv=None):
    """Runs the command line; returns the exit code: 0 stopped, 1 no start, 78 wrong settings."""
    parser = argparse.ArgumentParser(
        prog="idpot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="settings; else SQLite in ./idpot.db")
    parser.add_argument("--listen", metavar="HOST:PORT", type=split_address,
                        help="address, in place of the file's")
    parser.add_argument("--check", action="store_true", help="check settings and database, exit")
    parser.add_argument("--version", action="version", version=f"idpot {__version__}")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where standard descriptors are closed, the next files must not be taken for them.
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    try:
        run(arguments)
        return 0
    except IdpotError as error:
        prefix = "<3>" if under_journald() else "idpot: "
        print(f"{prefix}{error.detail}", file=sys.stderr)
        return 1 if arguments.check else error.exit_code


if __name__ == "__main__":
    sys.exit(main())
