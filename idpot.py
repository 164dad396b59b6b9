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
import itertools
import json
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
import sys
import threading
import time
import types
from contextlib import AbstractContextManager, suppress
from time import monotonic
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

__version__ = "2.1.0"

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
    detail = ""     # of what concerns the whole database: the log's words for it
    exit_code = 1

    def __init__(self, text, **own):
        super().__init__(text)
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
    """No ID until somebody mends it: a table that cannot count, an account without the right."""
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


def parse_dsn_address(address):
    """Each address to try, as the log names it -> arguments of mysql.connector.connect."""
    net, parenthesis, inside = address.partition("(")
    if parenthesis and not inside.endswith(")"):
        raise SettingsError(f"{shown(address)} has no closing parenthesis at its end")
    inside = inside[:-1]
    if net == "unix":
        path = inside or "/tmp/mysql.sock"
        return {path: {"unix_socket": path}}
    if net not in ("", "tcp", "tcp4", "tcp6"):
        raise SettingsError(f"{shown(net)} is neither tcp nor unix")
    pairs = [split_address(one.strip(), 3306) for one in (inside or "127.0.0.1").split(",")]
    return {f"{host}:{port}": {"host": host or "127.0.0.1", "port": port} for host, port in pairs}


def check_place(what, path):
    """Raises StartError where a file could be neither made nor written; writes nothing."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise StartError(f"{what}: its folder is not there")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise StartError(f"{what}: it cannot be written")


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
        "Engine": ("MyISAM", engine_name),
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


QUOTED = r'"(?:[^"\\\0]|\\[^u])*"'
VALUE = re.compile(rf'((?:{QUOTED}|[^"\\\0;#])*)(?:[;#].*)?')       # and a comment behind it


def setting_value(text):
    """The value that stands in a file, bare or in double quotes, where its escapes are JSON's."""
    match = VALUE.fullmatch(text)
    if not match:
        raise SettingsError("a double quote is not closed, or a backslash stands outside of quotes")
    try:
        return re.sub(QUOTED, lambda quoted: json.loads(quoted[0], strict=False), match[1].strip())
    except json.JSONDecodeError:
        raise SettingsError(r'a backslash stands before none of \ " n t')


def load_settings(path=None):
    """The settings of the file, or the defaults: each name in lower case, and `store`, the class of
    the stores, and `dsn`. An empty value means the default. Raises SettingsError."""
    try:
        reader = SettingsReader(path or os.devnull)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or error}")
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
            try:
                text = setting_value(texts.pop(name.lower(), "")) or default
                values[name.lower()] = convert(text)
            except IdpotError as error:
                raise SettingsError(f"{path}: [{section}] {name}: {error}")
        for name in texts:
            raise SettingsError(f"{path}: unknown name {shown(name)} in [{section}]")
    dsn = values["connectstring"] or {
        "user": values["username"],
        "password": values["password"],
        "database": values["dbname"],
        "addresses": {"{hostname}:{port}".format(**values): {
            "host": values["hostname"], "port": values["port"]}},
        "tls": "preferred",
        "ignored": "",
    }
    values["admintoken"] = values["admintoken"] or values["token"]
    store = MysqlStore if "Mysql" in given else SqliteStore
    return types.SimpleNamespace(**values, dsn=dsn, store=store)


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


class Metrics:
    """What /metrics tells, counted since the start."""
    BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
    COUNTED = ("idpot_ids_issued_total", "idpot_db_statements_total", "idpot_db_seconds_total",
               "idpot_db_retries_total", "idpot_http_request_duration_seconds_sum")

    def __init__(self):
        self._lock = threading.Lock()       # guards the next two
        self._counters = collections.Counter(dict.fromkeys(self.COUNTED, 0))    # by series
        self._durations = [0] * (len(self.BUCKETS) + 1)     # requests by bucket; the last is above
        self._start = time.time()

    def add(self, series, amount=1):
        with self._lock:
            self._counters[series] += amount

    def count(self, answers):
        """Counts answers, as the Writer has them."""
        with self._lock:
            for _, head, status, _, seconds in answers:
                self._counters[f'idpot_http_requests_total{{{head.labels},code="{status}"}}'] += 1
                self._counters["idpot_http_request_duration_seconds_sum"] += seconds
                self._durations[bisect.bisect_left(self.BUCKETS, seconds)] += 1

    def text(self, gauges):
        """The Prometheus text format, version 0.0.4; gauges: further series and their values."""
        histogram = "idpot_http_request_duration_seconds"
        with self._lock:
            series = {**self._counters, **gauges}
            within = list(itertools.accumulate(self._durations))
        for limit, count in zip([*self.BUCKETS, "+Inf"], within):
            series[f'{histogram}_bucket{{le="{limit}"}}'] = count
        series[f"{histogram}_count"] = within[-1]
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
        target = os.path.relpath(path, os.path.dirname(self.link) or ".")
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
    ENTRY = 200             # bytes that a line takes beside its text
    PAUSE = 0.02            # seconds for more to gather
    PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}

    def __init__(self, file=None):
        super().__init__()
        self._file = file       # the handler of the access lines, if they do not go to stderr
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
        threading.Thread(target=self._run, daemon=True).start()

    def count(self):
        """Counts the answers that were noted by now, and makes their lines."""
        moment = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        with self.lock:
            answers = [self._answers.popleft() for _ in range(len(self._answers))]
            metrics.count(answers)
            lines = [f'{host} - - [{moment}] "{head.line}" {status} {size or "-"} {head.tail}'
                     for host, head, status, size, _ in answers]
            if lines:
                self._add(self._file, "<6>", "\n".join(lines))

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
            if lines:
                self._file.emit(logging.makeLogRecord({"msg": "\n".join(lines)}))
            if events:
                write_all(2, "\n".join(events) + "\n")
        except OSError:         # nobody reads stderr any more
            pass
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
# A store keeps the pots; one thread, its worker, uses it. take(pot, count, floor) adds count to the
# counter, or to floor where that is higher, and returns the new value, which ends the range taken;
# floor is the highest number that this server gave or told of the pot. current, create and raise_to
# return the counter, pots() a list of (pot, counter). connect() sees to a connection; check() is
# for /healthz. They raise NotFound, Exists, Exhausted, Broken, Unavailable, or Retry where the same
# call may help. start() fails only where waiting cannot help; probe() does what --check promises.

class SqliteStore:
    """One SQLite file that this process locks; WAL with synchronous=FULL survives a power cut.

    SQLite's integers are signed: an ID from 2**63 up is kept as ID - 2**64, and added to in Python.
    """
    connected = True        # start() has opened the file, and it stays open

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
        except self._sqlite.Error as error:
            reason = "another process uses it" if "locked" in str(error) else error
            raise StartError(f"{self._place}: {reason}")
        if mode != "wal":
            raise StartError(f"{self._place} does not take the WAL journal")
        return self._what

    def probe(self):
        check_place(self._place, self._path)        # SQLite itself would write
        return f"{self._what} can be written"

    def connect(self):
        pass        # start() did

    def _execute(self, statement, *values):
        """The rows of a SELECT, or the number of rows that were changed."""
        start = time.perf_counter()
        try:
            cursor = self._db.execute(statement, values)
            if statement.startswith("SELECT"):
                return cursor.fetchall()
            troubles.end(self._what)    # a full disk can be read
            return cursor.rowcount
        except self._sqlite.Error as error:
            metrics.add('idpot_db_errors_total{errno="other"}')
            troubles.begin(self._what, f"{self._what}: {error}")
            raise Unavailable(f"SQLite: {error}")
        finally:
            metrics.add("idpot_db_seconds_total", time.perf_counter() - start)

    def take(self, pot, count, floor):
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
        return rows[0][0] % 2**64

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
        rows = self._execute("SELECT name, id FROM pot ORDER BY name")
        return [(name, value % 2**64) for name, value in rows]

    def check(self, pot):
        self._execute("PRAGMA user_version = 1")    # a write: a full disk lets a transaction begin

    def close(self):
        self._db.close()    # folds the journal into the file


CANNOT = "the database cannot serve this now"
# Errors that last: rights and names that somebody must mend. Others are tried again.
LASTING = {1044, 1045, 1049, 1142, 1143, 1227, 1286, 1698, 2061}
ONE_POT = {     # errors of one pot, after which the connection stays sound
    1054: (Broken, "the table of pot {} has no column id"),
    1062: (Exists, "pot {} exists"),
    1146: (NotFound, "there is no pot {}"),
    3098: (Broken, "the table of pot {} is refused by its replication group, which wants InnoDB "
                   "and a primary key (error 3098)"),
    **dict.fromkeys(        # the ceiling of a column, of BIGINT, of a CHECK
        (1264, 1292, 1690, 3819, 4025),
        (Exhausted, "pot {} is exhausted: its table holds no greater number")),
}
# For accounts that read_only does not bind; as text: from MariaDB 12 on it is an enumeration. A log
# of statements would call it unsafe.
WRITABLE = " AND CAST(@@global.read_only AS CHAR) IN ('0', 'OFF')"
ENGINE_OF = ("(SELECT engine FROM information_schema.tables "
             "WHERE table_schema = DATABASE() AND table_name = 'pot_{}')")
BELIEVED = 1.0          # seconds for which a server is taken to be as it was seen
SHUNNED = 60.0          # seconds for which an address that did not answer is tried last


def execute(connection, statement):
    """The rows of a query, or what the driver tells of another statement."""
    done = connection.cmd_query(statement)      # a cursor would ping the server first
    return connection.get_rows()[0] if "columns" in done else done


class MysqlServers:
    """The addresses where the database is, which of them is used, and whether it may issue IDs."""

    def __init__(self, settings):
        try:
            import mysql.connector      # only where it is configured
        except ImportError:
            folder = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
            raise StartError("[Mysql] needs mysql-connector-python: python3 -m pip install "
                             f"--target={folder} 'mysql-connector-python>=9.2'")
        self.driver = mysql.connector
        self.engine = settings.engine
        self.chosen = None      # the address connected to last: no connection elsewhere is used
        self.cluster = ""       # the kind of cluster that the servers are, if any
        self.writable = ""      # WRITABLE, where statements may ask that
        self.ignored = settings.dsn["ignored"]     # names of parameters
        self._addresses = settings.dsn["addresses"]
        self._tls = settings.dsn["tls"]
        self._group = ""        # name of the replication group, once a server told one
        self._silent = {}       # address -> when it did not answer in time
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
            "autocommit": True,
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

    def connect(self):
        """(connection, address) of the first address that can issue IDs now.

        Raises Retry if one may do so later, else Broken: with the first address's trouble, and in
        its detail each one's own.
        """
        found = {}
        for address in sorted(self._addresses, key=self._is_shunned):
            start = monotonic()
            try:
                connection = self._open(address)
                self.chosen = address
                return connection, address
            except self.driver.Error as error:
                found[address] = self.note_error(error, address, start)
            except Unavailable as error:
                found[address] = error
        errors = [found[address] for address in self._addresses]
        told = [error.detail or str(error) for error in errors]
        if len(told) > 1:
            told = map(": ".join, zip(self._addresses, told))
        kind = Broken if all(isinstance(error, Broken) for error in errors) else Retry
        raise kind(str(errors[0]), detail=f"{self.subject}: {'; '.join(told)}")

    def _is_shunned(self, address):
        return self._silent.get(address, -math.inf) > monotonic() - SHUNNED

    def note_error(self, error, address, start):
        """The IdpotError for an error of the driver, after a call that was begun at start.

        An address that did not answer in the time that it had is noted. The server's own errors
        are answers: a row lock (1205) says nothing of its address.
        """
        number = error.errno
        silent = 2000 <= number <= 3024 and monotonic() > start + 0.9 * self._patience
        if silent:
            self._silent[address] = monotonic()
        metrics.add(f'idpot_db_errors_total{{errno="{number}"}}')
        detail = " ".join(str(error).split())
        # What the two forms of the driver say to caching_sha2_password without TLS.
        if number == (2061 if self.driver.HAVE_CEXT else 1045):
            detail += "; it may need TLS on the server, or its socket: unix(/path)"
        kind = Broken if number in LASTING else Retry
        return kind(f"{CANNOT} (error {number})", detail=detail, silent=silent)

    def _open(self, address):
        connection = self.driver.connect(**self._arguments, **self._addresses[address])
        try:
            connection.cmd_query(       # the promise does not depend on the server's defaults
                f"SET SESSION autocommit=1, lock_wait_timeout={self.lock_wait}, "
                f"innodb_lock_wait_timeout={self.lock_wait}, sql_safe_updates=0, "
                "sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'")
            if self._tls == "skip-verify" and not execute(
                    connection, "SHOW STATUS LIKE 'Ssl_cipher'")[0][1]:
                raise Retry(f"{CANNOT}: its server offers no TLS")
            self.check(connection, address)
            if not execute(connection, "SELECT 1 FROM information_schema.engines WHERE support IN "
                                       f"('YES', 'DEFAULT') AND engine = '{self.engine}'"):
                raise Broken(f"Engine: the server has no storage engine {shown(self.engine)}")
            return connection
        except (self.driver.Error, Unavailable):
            connection.close()
            raise

    def check(self, connection, address):
        """Raises Retry where the server cannot issue IDs now, Broken where it cannot at all."""
        state = dict(execute(
            connection, "SHOW GLOBAL VARIABLES WHERE Variable_name IN ('read_only', 'wsrep_on', "
                        "'binlog_format', 'group_replication_group_name')"))
        # A member that is started without the plugin looks like a server that never had a group.
        group = state.get("group_replication_group_name", "")
        self._group = self._group or group
        if group != self._group:
            raise Retry(f"{CANNOT}: its server is not in the replication group {self._group}")
        cluster = ""
        if group:
            cluster = "a replication group"
            self._check_group(connection)
        if state.get("wsrep_on") == "ON":
            cluster = "Galera"
            node = dict(execute(
                connection, "SHOW GLOBAL STATUS WHERE Variable_name IN "
                            "('wsrep_ready', 'wsrep_local_state')"))
            if node["wsrep_ready"] != "ON":
                raise Retry(f"{CANNOT}: the Galera node is not ready (error 1047)")
            # One that donates its state may be locked; it is used where no other address can be.
            donates = node["wsrep_local_state"] != "4" and len(self._addresses) > 1
            if donates and not self._is_shunned(address):
                self._silent[address] = monotonic()
                raise Retry(f"{CANNOT}: the Galera node is not synced")
        if state.get("read_only", "OFF") not in ("OFF", "0"):
            raise Retry(f"{CANNOT}: it is read-only (error 1290)")
        self.cluster = cluster
        self.writable = "" if state.get("binlog_format") == "STATEMENT" else WRITABLE
        if cluster and self.engine.lower() != "innodb":     # each node would count for itself
            raise Broken(f"Engine: {cluster} replicates InnoDB only, not {self.engine}")

    def _check_group(self, connection):
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


class MysqlStore:
    """A connection to MySQL or MariaDB, thrown away after any trouble that is not one pot's.

    A pot is go-idpot's table, `pot_NAME (id BIGINT UNSIGNED NOT NULL)`, with one row. InnoDB's has
    a key beside it that never changes: each UPDATE of a key leaves a dead record, which the later
    ones read while anybody holds a read view; and two nodes of a cluster cannot both make the row.
    """
    @classmethod
    def all(cls, settings):
        servers = MysqlServers(settings)
        return [cls(servers) for _ in range(settings.connections)]

    def __init__(self, servers):
        self._servers = servers
        self._connection = None
        self._address = None
        self._checked = 0.0     # when the server was seen to be able to issue IDs
        self._subject = servers.subject

    @property
    def connected(self):
        return self._connection is not None

    def start(self):
        try:
            self._open()
        except Retry as error:      # it may come later
            troubles.begin(self._subject, error.detail)
        if self._servers.ignored:
            log.warning("ConnectString: these parameters are ignored: %s", self._servers.ignored)
        engine = self._servers.engine
        if engine.lower() not in ("innodb", "aria", "rocksdb"):
            log.warning("Engine %s does not survive a power cut: IDs of the last half minute may "
                        "come again; InnoDB loses none", engine)
        return self._servers.what

    def probe(self):
        self._open()
        return f"{self._servers.what} is reached"

    def _open(self):
        now = monotonic()
        self._connection, self._address = self._servers.connect()
        self._checked = now

    def connect(self):
        """Sees to a connection where IDs could be issued a second ago; raises Retry or Broken."""
        if self._address != self._servers.chosen:
            self.close()
        if not self._connection:
            self._guarded("", self._open)
        self._check()

    def _check(self):
        """Asks the server again, where its last answer is a second old; raises Retry or Broken."""
        now = monotonic()
        if now > self._checked + BELIEVED:
            self._guarded("", self._servers.check, self._connection, self._address)
            self._checked = now

    def _guarded(self, pot, function, *arguments):
        """What function(*arguments) returns.

        The driver's errors become ours, and all but those of one pot end the connection.
        """
        start = monotonic()
        sound = False       # after any surprise a reply could be that of another statement
        try:
            value = function(*arguments)
            sound = True
            return value
        except self._servers.driver.Error as error:
            if pot and error.errno in ONE_POT:
                sound = True
                kind, text = ONE_POT[error.errno]
                raise kind(text.format(shown(pot))) from error
            trouble = self._servers.note_error(error, self._address, start)
            if trouble.silent:
                self._servers.chosen = None     # the other connections there would hang, too
            troubles.begin(self._subject, f"{self._subject}: {trouble.detail}")
            raise trouble from error
        except Unavailable as error:
            error.detail = error.detail or f"{self._subject}: {error}"
            troubles.begin(self._subject, error.detail)
            raise
        finally:
            metrics.add("idpot_db_seconds_total", monotonic() - start)
            if not sound:
                self.close()

    def _run(self, pot, statement):
        self.connect()
        return self._guarded(pot, execute, self._connection, statement)

    def _update(self, pot, value):
        """Sets the counter to an SQL value; returns the argument of LAST_INSERT_ID in it, from the
        same reply, or 0 where that was not called."""
        done = self._run(pot, f"UPDATE `pot_{pot}` SET id = {value}")
        troubles.end(self._subject)     # a server that takes no writes can be read
        # It may have waited there, while another server took over: then it does not count.
        if self._address != self._servers.chosen:
            self.close()
            raise Retry(f"{CANNOT}: another address was chosen meanwhile")
        self._check()
        if done["affected_rows"] != 1:      # with FOUND_ROWS: the rows there are
            raise Broken(f"the table of pot {shown(pot)} has {done['affected_rows']} rows, not one")
        return done["insert_id"]

    def take(self, pot, count, floor):
        limit = MAX_ID - count
        asks = f"id BETWEEN {floor} AND {limit}{self._servers.writable}"
        last = self._update(pot, f"IF({asks}, LAST_INSERT_ID(id + {count}), id)")
        if last:        # 0, which is no ID: the counter is not in that range, or the server is not
            return last
        self._checked = 0.0     # the server may have become read-only
        current = self.current(pot)
        if max(current, floor) > limit:
            raise Exhausted(f"pot {shown(pot)} is exhausted: fewer than {count} IDs are left")
        if current < floor:
            log.warning("the counter of pot %s was set back to %d, but %d was given: it goes on "
                        "above that", pot, current, floor)
            self.raise_to(pot, floor)
        raise Retry(f"the counter of pot {shown(pot)} was changed by others")

    def current(self, pot):
        self.connect()      # which finds out about the cluster
        cluster = self._servers.cluster
        engine = ENGINE_OF.format(pot) if cluster else "''"
        rows = self._run(pot, f"SELECT id, {engine} FROM `pot_{pot}` LIMIT 2")
        if len(rows) != 1:
            count = "several rows" if rows else "no row"
            raise Broken(f"the table of pot {shown(pot)} has {count}, not one")
        value, engine = rows[0]
        if cluster and str(engine).lower() != "innodb":     # each node would count for itself
            raise Broken(f"the table of pot {shown(pot)} is {engine}: {cluster} replicates InnoDB "
                         "only")
        if type(value) is not int or value < 0:     # DOUBLE and VARCHAR would repeat IDs
            raise Broken(f"the table of pot {shown(pot)} holds no whole number from 0 up")
        return value

    def create(self, pot, low):
        """Makes the table, and its row where there is none: a crash may have left it so."""
        engine = self._servers.engine
        key = ", one TINYINT NOT NULL DEFAULT 1 PRIMARY KEY" if engine.lower() == "innodb" else ""
        # A server that has joined a cluster within the second is not left a table of its own.
        self._checked = 0.0
        self._run(pot, f"CREATE TABLE IF NOT EXISTS `pot_{pot}` "
                       f"(id BIGINT UNSIGNED NOT NULL{key}) ENGINE={engine}")
        done = self._run(pot, f"INSERT INTO `pot_{pot}` (id) SELECT {low} FROM DUAL "
                              f"WHERE NOT EXISTS (SELECT id FROM `pot_{pot}`)")
        if done["affected_rows"] != 1:
            raise Exists(f"pot {shown(pot)} exists")
        with suppress(Retry):       # the pot is made
            self.current(pot)       # raises Broken where its table would not count
        return low

    def raise_to(self, pot, low):
        self._checked = 0.0     # the statement does not ask whether the server is read-only
        self.current(pot)       # raises Broken
        # MariaDB's GREATEST(id, 5) is signed and fails from 2**63 up: hence CAST.
        higher = f"GREATEST(CAST(id AS UNSIGNED), CAST({low} AS UNSIGNED))"
        return self._update(pot, f"LAST_INSERT_ID({higher})")

    def pots(self):
        tables = self._run(
            "", "SELECT table_name FROM information_schema.tables "
                "WHERE table_schema = DATABASE() AND engine IS NOT NULL")
        rows = []
        for table, in sorted(tables):
            match = re.fullmatch(f"pot_({POT_NAME.pattern})", table)
            if match:
                try:
                    rows.append((match[1], self.current(match[1])))
                except (NotFound, Broken) as error:
                    if error.detail:
                        raise
                    rows.append((match[1], "-"))
        return rows

    def check(self, pot):
        """Raises Unavailable where no ID could be issued now; pot: the one used last, if any."""
        try:
            self._checked = 0.0
            with suppress(Retry):    # it may have been lost while nobody used it
                self.connect()
            self.connect()
            if pot:     # takes the locks and needs the privilege, and changes nothing
                self._update(pot, "id")
        except Retry as error:      # a probe is told soon
            raise Unavailable(str(error), detail=error.detail) from error
        except (NotFound, Broken) as error:
            if error.detail:        # else it is that pot's alone
                raise

    def close(self):
        connection, self._connection = self._connection, None
        if connection:
            with suppress(self._servers.driver.Error):
                connection.close()


# -------------------------------------------------------------------------------------- allocation
# Requests on one pot that wait together are served by ONE statement. A request becomes a Job in its
# pot's queue; a worker, a thread that owns one store for life, adds up the counts of those there,
# runs the statement, and hands each its IDs in order of arrival. A job stays in its queue until it
# is answered: so what is to be tried again keeps its order.

class Job:
    """What a request wants: `count` IDs, or with count 0 what call(store, pot, floor) returns.

    answer(value, error) is called once: with the last of the IDs or what the call returned, or with
    an IdpotError, by the worker, or by expire() when `patience` seconds are over. The floor is the
    highest number given or told of the pot, 0 before the first; an int that is returned is told.
    """
    trouble = Unavailable("the database did not answer in")     # or why it is to be tried again

    def __init__(self, answer, count=0, call=None, patience=10.0):
        self.answer = answer
        self.count = count
        self.call = call
        self.patience = patience
        self.start = monotonic()
        self._answered = threading.Lock()   # taken for good by the thread that answers

    def finish(self, value=None, error=None):
        """Answers, unless that was done before."""
        if self._answered.acquire(blocking=False):
            self.answer(value, error)

    def expire(self):
        kind = type(self.trouble)       # says whether it may help to ask again
        self.finish(error=kind(f"{self.trouble} {self.patience:g} seconds"))

    def answered(self):
        return self._answered.locked()


ALL_POTS = "all pots"       # queues of what concerns no pot: no pot can have these names
HEALTH = "health check"

INTERNAL = IdpotError("internal error")


class Allocator:
    """The queues of the pots and the workers that serve them.

    A pot has one worker at most, so a slow pot holds up no other while a worker is free.
    """

    def __init__(self, stores, stuck=60.0):
        self.stores = stores
        self.last_pot = ""      # for /healthz: that IDs were taken from last, or could not be
        self._stuck = stuck     # seconds after which a worker that is busy with one thing hangs
        self._threads = [threading.Thread(target=self._work, args=(store,), daemon=True)
                         for store in stores]
        self._stopped = threading.Event()
        self._lock = threading.Lock()   # guards the next three; no statement or answer under it
        self._queues = {}       # pot -> jobs, oldest first, of which the answered are still to go
        self._waiting = collections.deque()     # pots with jobs that no worker serves, oldest first
        # (store, wakes) of the workers without work. The last is the next: the one used last, which
        # has a connection; those that have none are at the bottom.
        self._idle = []
        self._busy = {}         # store -> when its worker, which writes this, began what it does
        self._floors = {}       # pot -> highest number given or told; its worker writes it

    def start(self):
        for thread in self._threads:
            thread.start()

    def submit(self, pot, job):
        """Queues a job; who does this is to expire it, if it is not answered in time."""
        with self._lock:
            if pot in self._queues:
                self._queues[pot].append(job)
            else:
                self._queues[pot] = [job]
                self._waiting.append(pot)
                self._wake_one()

    def alive(self):
        """Whether the workers live, and none has been busy with one thing for too long."""
        oldest = monotonic() - self._stuck
        return (all(thread.is_alive() for thread in self._threads)
                and all(since > oldest for since in list(self._busy.values())))

    def stop(self, patience=1.0):
        """Has the workers close their stores and end; waits patience seconds at most."""
        self._stopped.set()
        with self._lock:
            while self._idle:
                self._wake_one()
        deadline = monotonic() + patience
        for thread in self._threads:
            thread.join(max(0, deadline - monotonic()))

    def list_pots(self, store, *_):
        """(pot, current ID) of each, never less than was given; "-" for a table that holds none."""
        return [(pot, value if value == "-" else max(value, self._floors.get(pot, 0)))
                for pot, value in store.pots()]

    def _work(self, store):
        wakes = queue.SimpleQueue()
        failures = 0
        while not self._stopped.is_set():
            if self._go_idle(store, wakes):
                self._busy.pop(store, None)
                failures = 0
                wakes.get()
                continue
            if failures:        # in a row: a random time, at most a second
                longest = min(1.0, 0.02 * 2 ** failures)
                self._stopped.wait(random.uniform(0, longest))
            self._busy[store] = monotonic()
            done = self._serve_next(store)
            failures = 0 if done else min(failures + 1, 10)
        store.close()

    def _go_idle(self, store, wakes):
        """Puts the worker to the idle ones, to be woken by an item of wakes, and returns True; or
        False, where a pot waits for it. One without a connection leaves that to one that has."""
        with self._lock:
            better = not store.connected and self._idle and self._idle[-1][0].connected
            if self._waiting and not better:
                return False
            for _ in self._waiting:
                self._wake_one()
            self._idle.insert(len(self._idle) if store.connected else 0, (store, wakes))
            if self._stopped.is_set():      # stop() may not have met this one
                wakes.put(None)
            return True

    def _wake_one(self):
        """The lock is held."""
        if self._idle:
            _, wakes = self._idle.pop()
            wakes.put(None)

    def _serve_next(self, store):
        """Connects, and serves the pot that has waited longest; False: it is to be tried again."""
        pots = []
        jobs = []
        try:
            store.connect()
            pots, jobs = self._next_pots(1)
            if pots:
                self._serve(pots[0], jobs, store)
            return True
        except Unavailable as error:
            if not pots:        # connect() failed: that is what all pots wait for, for days perhaps
                pots, jobs = self._next_pots(len(self._waiting))
            for job in jobs:
                job.trouble = type(error)(f"{error}, tried for")
            again = sum(not job.answered() for job in jobs)
            metrics.add("idpot_db_retries_total", again)
        except Exception:
            log.exception("a worker")
            for job in jobs:
                job.finish(error=INTERNAL)
        finally:
            with self._lock:
                for pot in pots:
                    if self._unanswered(pot):
                        self._waiting.append(pot)
                    else:
                        del self._queues[pot]
        return False

    def _next_pots(self, most):
        """(pots, jobs): the pots that have waited longest, and what is to be done for them."""
        with self._lock:
            pots = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            return pots, [job for pot in pots for job in self._unanswered(pot)]

    def _unanswered(self, pot):
        """Drops the pot's jobs that were answered, and returns the others. The lock is held."""
        left = self._queues[pot] = [job for job in self._queues[pot] if not job.answered()]
        return list(left)

    def _serve(self, pot, jobs, store):
        """Raises Retry where some jobs are to be tried again; others may be answered by then."""
        takes = [job for job in jobs if job.count]
        to_do = [takes, *[[job] for job in jobs if not job.count]]
        for group in to_do:
            group = [job for job in group if not job.answered()]
            try:
                if group:
                    self._serve_group(pot, group, store)
            except Retry:
                raise
            except IdpotError as error:
                failed = group
                if isinstance(error, Exhausted) and group[0].count:
                    if len(group) > 1:      # some may fit alone: they come last
                        to_do += [[job] for job in group]
                        continue
                    # Whatever wants as much does not fit either.
                    failed = [job for job in takes if job.count >= group[0].count]
                if isinstance(error, Broken) and not error.detail:
                    troubles.begin(f"pot {pot}", str(error))
                for job in failed:
                    job.finish(error=error)

    def _serve_group(self, pot, jobs, store):
        """Does what one job wants; or takes the sum of the counts and hands out the IDs."""
        total = sum([job.count for job in jobs])
        floor = self._floors.get(pot, 0)
        if not total:
            value = jobs[0].call(store, pot, floor)
            if type(value) is int:
                self._floors[pot] = max(value, floor)
            jobs[0].finish(value)
            return
        if pot not in self._floors:
            floor = store.current(pot)      # raises Broken where the table would not count
        self.last_pot = pot
        last = store.take(pot, total, floor)
        if last < floor + total:    # a column of another type, say
            raise Broken(f"the table of pot {shown(pot)} does not count: {last} is behind {floor}")
        self._floors[pot] = last
        metrics.add("idpot_db_statements_total")
        metrics.add("idpot_ids_issued_total", total)
        troubles.end(f"pot {pot}")
        given = last - total
        for job in jobs:
            given += job.count
            job.finish(given)


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


def listen(host, port):
    """The socket that start_server or systemd left open, or one on the address, or StartError."""
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


# -------------------------------------------------------------------------------------------- HTTP
# Threads: the main one accepts (serve_forever) and looks at all connections (service_actions); each
# connection has one, which reads requests and asks. Whoever has the answer, mostly a worker, sends
# it without waiting for the client (wrk -c64: 31,004/s; 12,589/s where the connection's thread is
# woken to send). What a client does not take at once is sent by a short-lived thread.
#
# Life of a connection: its thread waits for the first byte of a request, takes `turn`, reads the
# rest, and has it answered; whoever has sent the answer gives `turn` back, which keeps answers in
# order. Only the thread closes the connection. Who is late follows from `began`, the arrival of the
# request that has the turn, `answered_at`, the time of the last answer, and `job`: see look(). The
# main thread ends them by shutdown(2), which the connection's thread sees: for reading where the
# client is to send (what has arrived is still read), altogether where it is to read.

MAX_LINE = 8192         # bytes of a request line, then 414
MAX_HEAD = 16384        # of the request line and all headers, then 431
MAX_FIELDS = 64         # headers, then 431
MAX_BODY = 65536        # bytes, then 413
MAX_EXTRA = 8192        # of the extensions and trailers of a chunked body, then 413

KEPT_THREADS = 16       # that stay for the next connection
LOOK = 0.2              # seconds between looks at all connections
HURRIED = 0.5           # seconds that a client has to send at a stop
LINGER = 2.0            # seconds for which a closed connection is read, see Handler.finish
PROBE = 1.8             # seconds for /healthz: with LOOK it is answered within 2

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n")
FIELD = TOKEN + rb":[\t -~\x80-\xff]*\r\n"
HEAD = re.compile(REQUEST_LINE.pattern + b"((?:" + FIELD + rb")*)\r\n")
FIELDS = re.compile(rb"([^:\r\n]+):([^\r\n]*)\r\n")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(|;[\t -~\x80-\xff]*)\r\n")
TRAILER = re.compile(FIELD + rb"|\r\n")
HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
ABSOLUTE = re.compile(rb"(?i)\Ahttps?://(?=[^/?:])" + HOST.pattern + b"(?=[/?]|$)")
ONCE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"origin")
FORM = b"application/x-www-form-urlencoded"
PLAIN = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
DIGITS = b"%d".__mod__      # a number as it is answered
PATHS = ("/pot/create", "/pot/raise", "/pot", "/healthz", "/metrics")
FORM_FIELDS = {     # route -> what a POST there may have
    "/id/{pot}": ("count", "range"),
    "/pot/create": ("name", "min"),
    "/pot/raise": ("name", "min"),
}


def parse_target(target):
    """(path, query, route, pot) of a target (RFC 9112, 3.2); the route is the path's template."""
    origin, absolute = ABSOLUTE.subn(b"", target)
    if absolute and origin[:1] != b"/":
        origin = b"/" + origin
    if origin[:1] != b"/" or b"#" in origin:
        raise BadRequest(f"{shown(target.decode())} is not a request target")
    path, _, query = origin.decode().partition("?")
    if re.search("%(?![0-9A-Fa-f]{2})", path):
        raise BadRequest(f"{shown(path)} has a % without two hexadecimal digits")
    separates = "%2f" not in path.lower()       # a proxy's rule may have looked at the raw path
    path = unquote(path)
    parent, _, pot = path.rpartition("/")
    route = "other"
    if separates and path in PATHS:
        route = path
    elif separates and parent in ("/id", "/pot") and POT_NAME.fullmatch(pot):
        route = parent + "/{pot}"
    return path, query, route, pot


def parse_fields(lines):
    """The headers by lower-case name; those that say how to read the request must be there once."""
    fields = {}
    for name, value in FIELDS.findall(lines):
        name = name.lower()
        value = value.strip(b" \t")
        if name in fields:
            if name in ONCE:
                raise BadRequest(f"header {name.decode()} is there twice")
            value = fields[name] + b", " + value
        fields[name] = value
    return fields


def parse_length(fields, old):
    """The length of the body; None where it is chunked (RFC 9112, 6)."""
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        if old or b"content-length" in fields:
            raise BadRequest("Transfer-Encoding is there with Content-Length, or in HTTP/1.0")
        if coding.lower() != b"chunked":
            coding = shown(coding.decode("latin-1"))
            raise IdpotError(
                f"Transfer-Encoding {coding} is not supported, but chunked",
                status=501)
        return None
    length = fields.get(b"content-length", b"0")
    if not re.fullmatch(b"[0-9]{1,19}", length):
        raise BadRequest(f"Content-Length {shown(length.decode('latin-1'))} is not a number")
    if int(length) > MAX_BODY:
        raise IdpotError(f"the body is longer than {MAX_BODY} bytes", status=413)
    return int(length)


def check_request_line(data):
    if not REQUEST_LINE.match(data):
        line = data.partition(b"\r\n")[0].decode("latin-1")
        raise BadRequest(f"{shown(line)} is not a request line")


@functools.lru_cache(maxsize=2048)      # a client repeats itself to the byte
def parse_head(data):
    """What a head says, the bytes up to the empty line; as strict as RFC 9112 allows."""
    match = HEAD.fullmatch(data)
    if not match:
        check_request_line(data)
        raise BadRequest("a header line is malformed")
    method, target, version, lines = match.groups()
    if lines.count(b"\n") > MAX_FIELDS:
        raise IdpotError("the header has too many fields", status=431)
    if version not in (b"1.1", b"1.0"):
        raise IdpotError(f"HTTP/{version.decode()} is not spoken here", status=505)
    old = version == b"1.0"
    fields = parse_fields(lines)
    length = parse_length(fields, old)
    if not HOST.fullmatch(fields.get(b"host", b"" if old else b" ")):
        raise BadRequest("header Host is missing or malformed")       # RFC 9112, 3.2
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise IdpotError("Expect is understood as 100-continue only", status=417)
    options = re.findall(TOKEN, fields.get(b"connection", b"").lower())
    scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
    referer = escaped(fields.get(b"referer", b"-"))
    agent = escaped(fields.get(b"user-agent", b"-"))
    path, query, route, pot = parse_target(target)
    name = method.decode()
    label = name if name in ("GET", "HEAD", "POST") else "other"
    return types.SimpleNamespace(
        method=name,
        path=path, query=query, route=route, pot=pot,
        labels=f'route="{route}",method="{label}"',     # of metrics
        old=old,                                    # HTTP/1.0
        keep=b"close" not in options and (not old or b"keep-alive" in options),
        length=length,                              # of the body; None: it is chunked
        expect=b"expect" in fields and not old,     # the client waits for 100 Continue
        form=fields.get(b"content-type", FORM).split(b";")[0].strip().lower(),
        token=token.strip() if scheme.lower() == b"bearer" else b"",
        origin=b"origin" in fields,
        line=escaped(b"%s %s HTTP/%s" % (method, target, version)),     # of the access log
        tail=f'"{referer}" "{agent}"')                                  # and its end


def malformed_head(data):
    """What the answer to a malformed request, and its line in the access log, need of a head."""
    line = (data.splitlines() or [b""])[0]
    line = escaped(re.sub(rb"(?i)(authorization|bearer).*", rb"\1...", line)) or "-"    # no token
    return types.SimpleNamespace(
        method="other", old=False, labels='route="other",method="other"', line=line, tail='"-" "-"')


@functools.lru_cache(maxsize=64)
def answer_beginning(status, form, header):
    """The head of an answer but for its length; for the Date the cache is cleared every LOOK s."""
    phrase = http.HTTPStatus(status).phrase
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    if status != 204:
        header = f"Content-Type: {form}\r\n{header}"
    return (f"HTTP/1.1 {status} {phrase}\r\nCache-Control: no-store\r\nDate: {date}\r\n"
            f"{header}").encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection; its thread reads the requests. The head of this section tells its life."""

    def setup(self):
        # The stock rfile, over the descriptor: that of makefile() runs Python code at each read.
        self.rfile = open(self.request.fileno(), "rb", buffering=2048, closefd=False)
        address = self.client_address
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"    # for a Unix socket
        self.host = host.removeprefix("::ffff:")
        self.settings = self.server.settings
        # Acquired by the connection's thread at a request's first byte, released by whoever has
        # sent its answer. Guards head, body and keep; look() reads keep without it.
        self.turn = threading.Lock()
        self.began = None                   # when the request that has the turn began to arrive
        self.answered_at = monotonic()      # when the last answer was ready, or was sent late
        self.job = None                     # what the allocator is asked for
        self.keep = True                    # whether the connection stays after the answer
        self.server.connections[self.request] = self

    def handle_one_request(self):
        """Has one request answered; the stock handle() repeats it until close_connection is set."""
        self.close_connection = True
        try:
            data = self.rfile.peek(1)
            while data[:2] == b"\r\n":      # RFC 9112, 2.2
                self.rfile.read(re.match(rb"(?:\r\n)+", data).end())
                data = self.rfile.peek(1)
        except OSError:
            return
        if not data or not self.turn.acquire(timeout=self.server.patience):
            return
        self.began = monotonic()
        self.keep = False       # until all is read, where the next request begins is unknown
        self.head = self.first = None       # the head, and its first line where that came alone
        try:
            self.read_request(data)
            self.close_connection = not self.keep       # from here on keep is of whoever answers
            self.respond()
        except OSError:         # the client has gone
            self.keep = False
            self.end_turn()
        except Exception as error:
            self.head = self.head or malformed_head(self.first or data)
            if not isinstance(error, IdpotError):
                log.exception("request from %s", self.host)
                self.close_connection = True
                self.keep = False
                error = INTERNAL
            self.answer_error(error)

    def read_request(self, data):
        """Reads the request that begins with this data, or raises the error to be answered."""
        head = self.head = self.read_head(data)
        if head.expect:
            with suppress(BlockingIOError):      # the client has much to read first
                self.request.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        self.body = self.read_chunks() if head.length is None else self.read_body(head.length)
        self.keep = head.keep and not self.server.stopping

    def read_head(self, data):
        whole = data.find(b"\r\n\r\n") + 4
        if whole > 4:       # it fits into the buffer, as nearly always; by lines: a tenth slower
            head = self.rfile.read(whole)
        else:
            head = b"\r\n"
            while head == b"\r\n":      # an empty line may have come in two pieces
                head = self.read_line(MAX_LINE, "the request line is too long", 414)
            check_request_line(head)        # before the client has sent the rest
            while head[-4:] != b"\r\n\r\n":
                head += self.read_line(MAX_HEAD - len(head), "the header is too long", 431)
        # No client can fill the cache with long ones.
        return parse_head(head) if len(head) < 1024 else parse_head.__wrapped__(head)

    def read_line(self, limit, text, status):
        """The next line; raises IdpotError(text, status) if it has more bytes than the limit."""
        line = self.rfile.readline(limit + 1)
        self.first = self.first or line
        if len(line) > limit:
            raise IdpotError(text, status=status)
        if line[-1:] != b"\n":
            raise self.cut_off()
        if line[-2:] != b"\r\n":
            raise BadRequest("a line ends in a bare LF")
        return line

    def read_body(self, length):
        body = self.rfile.read(length)
        if len(body) < length:
            raise self.cut_off()
        return body

    def read_chunks(self):
        """The body of chunks (RFC 9112, 7.1); extensions and trailers mean nothing here."""
        too_long = ("the extensions or trailers of the body are too long", 413)
        body = b""
        left = MAX_EXTRA
        size = 1
        while size:
            line = self.read_line(left, *too_long)
            match = CHUNK.fullmatch(line)
            if not match:
                raise BadRequest(f"{shown(line.decode('latin-1').rstrip())} is not a chunk's size")
            size = int(match[1], 16)
            left -= len(match[2])
            if len(body) + size > MAX_BODY:
                raise IdpotError(f"the body is longer than {MAX_BODY} bytes", status=413)
            if size:
                body += self.read_body(size)
                if self.read_body(2) != b"\r\n":
                    raise BadRequest("a chunk is longer than its size")
        while line != b"\r\n":
            line = self.read_line(left, *too_long)
            left -= len(line)
            if not TRAILER.fullmatch(line):
                raise BadRequest("a trailer line is malformed")
        return body

    def cut_off(self):
        """The error of a request whose end did not come (RFC 9110, 15.5.9)."""
        late = monotonic() > self.began + self.settings.requesttimeout
        if late or self.server.stopping:
            return IdpotError("the request did not arrive in time", status=408)
        return BadRequest("the request is cut off")

    def finish(self):
        """Returns when the connection can be closed: its last answer has been sent.

        What the client still sends is read for a moment: to close with unread input would reset the
        connection, and could destroy the answer on its way (RFC 9112, 9.6).
        """
        with suppress(OSError):
            while self.request.recv(4096):
                if not self.began and monotonic() > self.answered_at + LINGER:
                    break
        self.turn.acquire(timeout=self.server.patience)

    def respond(self):
        head = self.head
        if self.settings.admintoken or head.origin:
            self.check_token(head)
        actions = ACTIONS.get(head.route)
        if not actions:
            raise NotFound(f"there is nothing at {shown(head.path)}")
        action = actions.get("GET" if head.method == "HEAD" else head.method)
        if not action:
            allowed = ", ".join(["GET", "HEAD", *list(actions)[1:]])
            raise IdpotError(f"{head.method[:20]} is not allowed here, but {allowed}", status=405,
                            header=f"Allow: {allowed}\r\n")
        action(self, self.fields())

    def check_token(self, head):
        """Raises Unauthorized, or Forbidden, where the request lacks the bearer token it needs."""
        admin = head.method == "POST" and head.route in ("/pot/create", "/pot/raise")
        token = (self.settings.admintoken if admin else self.settings.token).encode()
        if token and hmac.compare_digest(token, head.token):
            return
        if head.origin:
            raise Forbidden("a request from a web page (it has an Origin) needs the bearer token")
        if token and head.route not in ("other", "/healthz"):
            need = "the bearer token is wrong" if head.token else "a bearer token is needed"
            raise Unauthorized(need)

    def ask(self, render, count=0, call=None, pot=None, patience=None, status=200):
        """Has a worker answer, with the status and render(value): see Job."""
        def answer(value, error):
            if error:
                self.answer_error(error)
            else:
                self.answer(status, render(value))
        self.job = job = Job(answer, count, call, patience or self.settings.timeout)
        self.server.allocator.submit(pot or self.head.pot, job)

    def answer_error(self, error):
        self.answer(error.status, f"{error}\n".encode(), error.header)

    def answer(self, status, body, header="", form=PLAIN):
        """Sends an answer without waiting for the client, and ends the turn; a thread of its own
        does that where the client does not take all at once. Whoever has the answer calls this."""
        head = self.head
        if not self.keep:
            header += "Connection: close\r\n"
        elif head.old:
            header += "Connection: keep-alive\r\n"
        data = answer_beginning(status, form, header)
        if status != 204:       # RFC 9110, 8.6
            data += b"Content-Length: %d\r\n" % len(body)
        sent = b"" if head.method == "HEAD" else body
        data += b"\r\n" + sent
        # Noted before it is sent: who has an answer finds it counted.
        self.answered_at = now = monotonic()
        self.server.writer.note((self.host, head, status, len(sent), now - self.began))
        try:
            rest = data[self.request.send(data, socket.MSG_DONTWAIT):]
        except OSError:     # the client is to read first, or has gone
            rest = data
        if rest:
            self.job = None     # it is the client's turn now
            try:
                _thread.start_new_thread(self.send_rest, (rest,))
                return
            except RuntimeError:    # no thread is left: the client is to see that this is not all
                self.keep = False
        self.end_turn()

    def send_rest(self, rest):
        """Sends as slowly as the client reads; look() ends what takes too long."""
        with suppress(OSError):
            self.request.sendall(rest)
        self.answered_at = monotonic()
        self.end_turn()

    def end_turn(self):
        """Lets the next request of the connection have the turn, or tells the client of the end."""
        if not self.keep:
            with suppress(OSError):
                self.request.shutdown(socket.SHUT_WR)
        self.began = self.job = None
        self.turn.release()

    def silent_since(self):
        """Since when it is the client's turn to send; infinity while it is not."""
        began = self.began
        if self.job or (began and self.answered_at > began):
            return math.inf
        return began or self.answered_at

    def look(self, now):
        """Ends what takes too long: a wait for the database, for a client to read, or to send."""
        job = self.job
        began = self.began
        answered = self.answered_at
        stopping = self.server.stopping
        if job:
            deadline = min(job.start + job.patience, self.server.end)
            if now > deadline and not job.answered():
                job.expire()
            elif now > deadline + LINGER:       # a fault has kept its answer
                self.request.shutdown(socket.SHUT_RDWR)
        elif began and answered > began:
            if now > answered + self.settings.idletimeout:
                self.request.shutdown(socket.SHUT_RDWR)
        else:
            patience = self.settings.idletimeout if self.keep else LINGER
            if began:
                patience = self.settings.requesttimeout
            if stopping:
                patience = min(patience, HURRIED)
            if now > max(began or answered, stopping) + patience:
                self.request.shutdown(socket.SHUT_RD)

    def fields(self):
        """The fields of the query and of the form, each at most once, and none that is unknown."""
        head = self.head
        body = self.body if head.method == "POST" else b""      # elsewhere it means nothing
        if not (body or head.query):
            return {}
        if body and head.form != FORM:
            form = shown(head.form.decode("latin-1"))
            raise IdpotError(f"the body is {form}, not {FORM.decode()}", status=415)
        text = f"{head.query}&{body.decode('latin-1')}"
        try:
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            raise BadRequest("the form is not UTF-8, or has too many fields")
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

    def take_ids(self, fields):
        if len(fields) == 2:
            raise BadRequest("count and range exclude each other")
        if "range" in fields:
            count = whole_number(fields["range"], 1, MAX_RANGE, "range")
            self.ask(lambda last: b"%d\t%d\n" % (last - count + 1, last), count)
        elif "count" in fields:
            count = whole_number(fields["count"], 1, MAX_COUNT, "count")
            self.ask(lambda last: b"".join(
                [b"%d\n" % one for one in range(last - count + 1, last + 1)]), count)
        else:
            self.ask(DIGITS, 1)

    def get_id(self, _):
        self.ask(DIGITS, call=lambda store, pot, floor: max(store.current(pot), floor))

    def get_pot(self, _):
        self.ask(lambda _: b"", call=lambda store, pot, _: store.current(pot), status=204)

    def create_pot(self, fields):
        pot, low = self.name_and_min(fields, "0")
        self.ask(lambda _: b"Created new pot", pot=pot, status=201,
                 call=lambda store, pot, _: store.create(pot, low))

    def raise_pot(self, fields):
        pot, low = self.name_and_min(fields, "")
        self.ask(DIGITS, pot=pot,
                 call=lambda store, pot, floor: store.raise_to(pot, max(low, floor)))

    @staticmethod
    def name_and_min(fields, default):
        pot = fields.get("name", "")
        if not POT_NAME.fullmatch(pot):
            raise BadRequest(f"name {shown(pot)} is not 1 to 60 characters of A-Z a-z 0-9 _ -")
        return pot, whole_number(fields.get("min", default), 0, MAX_ID, "min")

    def get_pots(self, _):
        self.ask(lambda rows: "".join([f"{pot}\t{value}\n" for pot, value in rows]).encode(),
                 pot=ALL_POTS, call=self.server.allocator.list_pots)

    def get_health(self, _):
        allocator = self.server.allocator
        self.ask(lambda _: b"ok", pot=HEALTH, patience=min(PROBE, self.settings.timeout),
                 call=lambda store, *_: store.check(allocator.last_pot))

    def get_metrics(self, _):
        server = self.server
        gauges = {
            "idpot_connections": len(server.connections),
            "idpot_http_requests_in_flight": sum(bool(one.began) for one in server.handlers()),
            "idpot_db_connections": sum(store.connected for store in server.allocator.stores),
        }
        server.writer.count()
        self.answer(200, metrics.text(gauges).encode(), form=PROMETHEUS)


# Route -> method -> what does it; HEAD is GET. Pots may have the names create and raise.
ACTIONS = {
    "/id/{pot}": {"GET": Handler.get_id, "POST": Handler.take_ids},
    "/pot/{pot}": {"GET": Handler.get_pot},
    "/pot/create": {"GET": Handler.get_pot, "POST": Handler.create_pot},
    "/pot/raise": {"GET": Handler.get_pot, "POST": Handler.raise_pot},
    "/pot": {"GET": Handler.get_pots},
    "/healthz": {"GET": Handler.get_health},
    "/metrics": {"GET": Handler.get_metrics},
}


class Server(http.server.ThreadingHTTPServer):
    """Accepts and bounds connections; does in the main thread what is to be done now and then."""

    def __init__(self, settings, listener, allocator, writer):
        super().__init__(None, Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        if listener.family != socket.AF_UNIX:       # connections inherit both
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            patience = int(1000 * settings.idletimeout)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        self.settings = settings
        self.allocator = allocator
        self.writer = writer
        self.connections = {}       # socket -> its Handler, None until its thread has made that
        self.stopping = 0.0         # when the stop began, 0.0 before
        self.end = math.inf         # when all must be answered, after that
        self.patience = settings.timeout + settings.idletimeout + LINGER    # a turn takes no longer
        self._looked = monotonic()
        self._accepted = queue.SimpleQueue()        # connections for the kept threads
        self._free = queue.SimpleQueue()            # an item for each kept thread that waits
        self._closed = threading.Event()            # a connection was closed

    def stop(self):
        """Stops accepting, after what waits in the backlog; returns when all is answered, or after
        Timeout. Requests that are read from now on are answered with a close."""
        self.stopping = monotonic()
        self.end = self.stopping + 0.75 * self.settings.timeout     # answers need a moment, too
        while (monotonic() < self.stopping + HURRIED        # under load there is always one more
               and select.select([self.socket], [], [], 0)[0]):
            self.handle_request()
        self.server_close()
        while self.connections and monotonic() < self.stopping + self.settings.timeout:
            time.sleep(0.02)
            self.service_actions()

    def handlers(self):
        return filter(None, list(self.connections.values()))

    def service_actions(self):
        """Every LOOK seconds: deadlines, watchdog, signals; raises KeyboardInterrupt to stop."""
        now = monotonic()
        if now < self._looked + LOOK:
            return
        self._looked = now
        answer_beginning.cache_clear()
        self.writer.count()     # lines take less memory than notes, where the Writer cannot write
        for handler in self.handlers():
            with suppress(OSError):         # its thread has just closed it
                handler.look(now)
        if "WATCHDOG_USEC" in os.environ and self.allocator.alive():
            notify("WATCHDOG=1")        # that this thread hangs shows of itself
        if signal.sigtimedwait(STOPS, 0):
            raise KeyboardInterrupt
        if signal.sigtimedwait([signal.SIGHUP], 0):     # a moved LogFile is seen at each write
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            notify("READY=1")

    def get_request(self):
        """Accepts a connection; at a limit it makes room for the next try, and raises OSError."""
        try:
            if len(self.connections) >= self.settings.maxconnections:
                raise OSError("all connections are in use")
            request, address = super().get_request()
        except BlockingIOError:         # another process has taken it
            raise
        except OSError:                 # the accepting loop comes again at once
            self._make_room()
            raise
        self.connections[request] = None
        return request, address

    def process_request(self, request, client_address):
        """Gives the connection to a thread that waits, or to a new one, which takes 0.1 ms more."""
        connection = (request, client_address)
        try:
            self._free.get_nowait()
        except queue.Empty:
            try:
                # threading.Thread waits until it runs: 0.8 s for the last of 1,000 clients, not 0.2
                _thread.start_new_thread(self._serve_connections, connection)
                return
            except RuntimeError:        # no more can be started: one that becomes free takes it
                self._make_room()
                self._free.get(timeout=LOOK)    # or queue.Empty: handle_error()
        self._accepted.put(connection)

    def _serve_connections(self, request, client_address):
        while True:
            troubles.end("accepting")
            self.process_request_thread(request, client_address)
            if self._free.qsize() >= KEPT_THREADS:
                return
            self._free.put(None)        # the promise to take one item of _accepted
            request, client_address = self._accepted.get()

    def shutdown_request(self, request):
        self.connections.pop(request, None)
        request.close()
        self._closed.set()

    def handle_error(self, request, client_address):
        """A connection could not be served, for lack of threads or memory, say."""
        error = sys.exc_info()[1]
        troubles.begin("accepting", f"a connection could not be served: {error!r}")

    def _make_room(self):
        """Ends the connection that has been silent longest, and waits until one is closed."""
        self._closed.clear()
        longest = min(self.handlers(), key=Handler.silent_since, default=None)
        if longest and longest.silent_since() < monotonic() - 0.1:
            with suppress(OSError):
                longest.request.shutdown(socket.SHUT_RD)
        self._closed.wait(0.05)


# ------------------------------------------------------------------------------------------ client

class Client(AbstractContextManager):
    """A client of an idpot server at a URL, over one connection that is kept; for one thread.

    Its methods raise BadRequest, Unauthorized, Forbidden, NotFound, Exists, Exhausted or
    Unavailable as the server answers, IdpotError for any other status and for what is no answer of
    idpot's, WentBack where an ID is not greater than those before (after a restore without a raise,
    say), and OSError where the server cannot be reached or a timeout, in seconds, is over.
    """
    ERRORS = {kind.status: kind for kind in (       # but a 409 to a create is Exists
        BadRequest, Unauthorized, Forbidden, NotFound, Exhausted, Unavailable)}
    NUMBER = "[0-9]{1,20}"

    def __init__(self, url, token=None, timeout=15):
        parts = urlsplit(url)
        https = parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=timeout)
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Content-Type": FORM.decode()}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._highest = {}      # pot -> greatest ID that was answered

    def create(self, pot, min=0):
        """Creates the pot; its first ID is min + 1. Tried once: again it could find its own pot."""
        self.close()
        try:
            self._ask(201, "Created new pot", "POST", "pot", "create", name=pot, min=min)
        except Exhausted as error:
            raise Exists(str(error)) from None

    def exists(self, pot):
        try:
            self._ask(204, "", "GET", "pot", pot)
            return True
        except NotFound:
            return False

    def current(self, pot):
        """Returns the ID that was given last, or min."""
        return int(self._ask(200, self.NUMBER, "GET", "id", pot))

    def next(self, pot):
        """Returns a new ID."""
        return self._take(pot, 1, lambda ids: str(ids[0]))[0]

    def next_many(self, pot, count):
        """Returns a range of count (1..10000) new IDs."""
        return self._take(pot, count, lambda ids: "".join([f"{one}\n" for one in ids]), count=count)

    def next_range(self, pot, count):
        """Returns a range of count (1..2**32) new IDs."""
        return self._take(pot, count, lambda ids: f"{ids[0]}\t{ids[-1]}\n", range=count)

    def raise_to(self, pot, min):
        """Raises the counter to min unless it is higher; returns the counter."""
        return int(self._ask(200, self.NUMBER, "POST", "pot", "raise", name=pot, min=min))

    def _take(self, pot, wanted, render, **fields):
        text = self._ask(200, rf"{self.NUMBER}(\s[0-9\s]*)?", "POST", "id", pot, **fields)
        first = int(text.split()[0])
        new = range(first, first + wanted)
        if text != render(new) or not 0 < first <= new[-1] <= MAX_ID:
            raise IdpotError(f"{shown(text)} are not the {wanted} IDs that were asked for")
        highest = self._highest.get(pot, 0)
        if first <= highest:
            raise WentBack(f"pot {shown(pot)} gave {first} after {highest}")
        self._highest[pot] = new[-1]
        return new

    def _ask(self, wanted, pattern, method, *path, **fields):
        """The text of an answer with the wanted status, if it matches the pattern."""
        target = "/".join([self._prefix, *[quote(part, safe="") for part in path]])
        body = urlencode(fields) or None
        kept = self._connection.sock is not None
        try:
            self._connection.request(method, target, body, self._headers)
            answer = self._connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()        # a late answer would be taken for that of the next request
            if kept and isinstance(error, ConnectionError):     # it had died
                return self._ask(wanted, pattern, method, *path, **fields)
            if isinstance(error, OSError):
                raise
            raise IdpotError(f"this is no answer of idpot: {error!r}") from error
        if answer.status in self.ERRORS and re.fullmatch("[^\n]+\n", text):
            raise self.ERRORS[answer.status](text.strip())
        if answer.status != wanted or not re.fullmatch(pattern, text):
            raise IdpotError(f"this is no answer of idpot: {answer.status} {shown(text)}")
        return text

    def close(self):
        self._connection.close()

    def __exit__(self, *_):
        self.close()


# ------------------------------------------------------------------------------------ command line

def serve(settings, writer):
    """Serves until a stop signal; raises StartError."""
    stores = settings.store.all(settings)
    # Until it serves, a stop signal ends it at once, whatever a silent database keeps waiting.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    description = stores[0].start()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    allocator = Allocator(stores, 10 * settings.timeout + 10)   # it may wait at each address
    listener = listen(*settings.listen)
    server = Server(settings, listener, allocator, writer)
    try:
        allocator.start()
    except RuntimeError as error:       # the system has no more threads
        raise StartError(str(error))
    # Inherited by the connections' threads: one that wakes, because its client has sent, does not
    # push aside the thread that runs and has the GIL (sched(7)). wrk -c64: 42,000/s for 32,000.
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
    settings.listen = arguments.listen or settings.listen
    if arguments.check:
        path = time.strftime(settings.logfile)
        if path:
            check_place(f"LogFile {shown(path)}", path)
        found = settings.store.all(settings)[0].probe()
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
        place = shown(error.filename or settings.logfile)
        raise StartError(f"LogFile {place}: {error.strerror}")
    writer = Writer(file)
    log.handlers = [writer]
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        serve(settings, writer)
    finally:
        writer.drain()


def main(argv=None):
    """Runs the command line; returns the exit code: 0 stopped, 1 no start, 78 wrong settings."""
    parser = argparse.ArgumentParser(prog="idpot", description="Serial 64-bit IDs over HTTP.")
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
        print(f"{prefix}{error.detail or error}", file=sys.stderr)
        return 1 if arguments.check else error.exit_code


if __name__ == "__main__":
    sys.exit(main())
