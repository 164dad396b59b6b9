# /// script
# requires-python = ">=3.10"
# dependencies = ["mysql-connector-python>=9.2"]
# ///
"""idpot hands out serial 64-bit unsigned IDs over HTTP, from MySQL, MariaDB or an SQLite file.

    python3 idpot.py                        # SQLite in ./idpot.db, http://127.0.0.1:8080
    python3 idpot.py --config=idpot.cfg     # MySQL or MariaDB, as the file says

A pot is a named counter:

    POST /pot/create    form name=foo&min=10: 201, or 409 where the pot exists
    GET  /pot/foo       204, or 404
    POST /id/foo        200 and the next ID, first min+1; with count=N (1..10000) N IDs, one per
                        line; with range=N (1..2^32) the first, a tab and the last of N IDs
    GET  /id/foo        200 and the current ID, which stays
    GET  /pot           200, a line per pot: name, tab, current ID
    POST /pot/raise     form name=foo&min=N: the counter goes up to N if it is lower; 200, its value
    GET  /healthz       200 when an ID could be issued now, else 503 and why
    GET  /metrics       Prometheus text format

An ID that was answered is never answered again from that pot, by any process, after any crash that
the storage engine survives; each answer is greater than all answers that ended before its request
began. The value is in the database before the answer leaves, and nothing is fetched ahead.
"""

import _thread
import argparse
import bisect
import collections
import configparser
import contextlib
import email.utils
import errno
import fcntl
import functools
import hmac
import http.client
import http.server
import importlib.util
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
import stat
import sys
import termios
import threading
import time
import types
import urllib.parse

__version__ = "2.0.0"

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


class Broken(Unavailable):
    """The pot's table is not one row with a whole number: no ID until somebody has mended it."""


class Retry(Unavailable):
    """Trying again, on a new connection or a moment later, may help."""


class WentBack(IdpotError):
    """Client: the server answered an ID that is not greater than one that it gave before."""


class StartError(IdpotError):
    """The server cannot start."""
    exit_code = 1


class SettingsError(StartError, argparse.ArgumentTypeError):
    """A setting is wrong, so that starting again cannot help; for an option, wrong usage."""
    exit_code = 78      # EX_CONFIG of sysexits.h


# ---------------------------------------------------------------------------------------- settings

def shown(value):
    """The value in double quotes, cut and escaped, fit for a line of an answer or of the log."""
    text = ascii(value[:100])[1:-1].replace('"', r'\"')
    more = "..." if len(value) > 100 else ""
    return f'"{text}{more}"'


def whole_number(text, low, high, name=""):
    """The number that the text is in plain decimal digits; BadRequest, which begins with the name,
    if it is not one of low..high."""
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


def go_duration(text):
    """Seconds of a Go duration such as 1m30s or 500ms."""
    units = {
        "ns": 1e-9,
        "us": 1e-6,
        "µs": 1e-6,
        "ms": 1e-3,
        "s": 1,
        "m": 60,
        "h": 3600,
    }
    parts = re.findall(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|ms|s|m|h)", text)
    if text == "0":
        return 0
    if not parts or "".join(map("".join, parts)) != text:
        raise SettingsError(f"{shown(text)} is not a duration such as 30s or 500ms")
    return sum(float(amount) * units[unit] for amount, unit in parts)


def engine_name(text):
    if re.fullmatch("[A-Za-z0-9_]+", text):
        return text
    raise SettingsError(f"{shown(text)} is not the name of a storage engine")


def tls_mode(text):
    mode = {"1": "true", "0": "false"}.get(text, text.lower())
    if mode in ("true", "false", "skip-verify", "preferred"):
        return mode
    raise SettingsError(f"{shown(text)} is not true, false, skip-verify or preferred")


DSN_PARAMETERS = {      # of go-sql-driver/mysql -> (name here, converter)
    "timeout": ("connection_timeout", go_duration),
    "readTimeout": ("read_timeout", go_duration),
    "writeTimeout": ("write_timeout", go_duration),
    "collation": ("collation", str),
    "charset": ("charset", lambda text: text.split(",")[0]),
    "tls": ("tls", tls_mode),
}


def parse_dsn(text):
    """What a DSN of go-sql-driver/mysql says: arguments of mysql.connector.connect, and `hosts`,
    the (host, port) pairs to try in order, `tls`, and `ignored`, the names of other parameters.

    The last / ends the address, the last @ before it the credentials, the first : in them the user.
    Raises SettingsError, which never shows the password.
    """
    left, slash, right = text.rpartition("/")
    credentials, at, address = left.rpartition("@")
    user, _, password = credentials.partition(":")
    database, _, query = right.partition("?")
    if not slash or not database:
        raise SettingsError("there is no database name after a last /")
    dsn = {
        "user": user,
        "password": password,
        "database": urllib.parse.unquote(database),
        "ignored": [],
    }
    try:
        dsn.update(parse_dsn_address(address))
    except SettingsError:
        if not at:      # what stands there may be the password
            raise SettingsError("there is no @ before an address, such as tcp(host:port)")
        raise
    for pair in query.split("&"):
        parameter, equals, value = pair.partition("=")
        if parameter in DSN_PARAMETERS:
            name, convert = DSN_PARAMETERS[parameter]
            dsn[name] = convert(urllib.parse.unquote_plus(value))
        elif equals:
            dsn["ignored"].append(parameter)
    return dsn


def parse_dsn_address(address):
    net, parenthesis, inside = address.partition("(")
    if parenthesis and not inside.endswith(")"):
        raise SettingsError(f"{shown(address)} has no closing parenthesis at its end")
    inside = inside[:-1]
    if net == "unix":
        return {"unix_socket": inside or "/tmp/mysql.sock", "hosts": []}
    if net not in ("", "tcp", "tcp4", "tcp6"):
        raise SettingsError(f"{shown(net)} is neither tcp nor unix")
    pairs = [split_address(one.strip(), 3306) for one in (inside or "127.0.0.1").split(",")]
    return {"hosts": [(host or "127.0.0.1", port) for host, port in pairs]}


def limited(low, high):
    """A converter to whole numbers from low to high."""
    return functools.partial(whole_number, low=low, high=high)


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
        "MaxConnections": ("1024", limited(1, 1000000)),
    },
    "Mysql": {
        "ConnectString": ("", lambda text: text and parse_dsn(text)),
        "Hostname": ("127.0.0.1", str),
        "Port": ("3306", limited(1, 65535)),
        "Username": ("root", str),
        "Password": ("", str),
        "Dbname": ("idpot", str),
        "Engine": ("MyISAM", engine_name),
        "Connections": ("8", limited(1, 64)),
    },
    "Sqlite": {"File": ("idpot.db", str)},
}


class SettingsReader(configparser.RawConfigParser):
    """The stock reader for the format of gcfg, which go-idpot used: sections and names in any
    letter case, comments behind them."""
    SECTCRE = re.compile(r"\[\s*(?P<header>[^]\s][^]]*?)\s*\]\s*(?:[;#].*)?$")

    def __init__(self, path):
        super().__init__(delimiters="=", comment_prefixes=(";", "#"), default_section="")
        with open(path, encoding="utf-8-sig") as file:
            # Without their indentation lines do not continue others.
            lines = (line.strip() for line in file)
            named = (line.title() if line[:1] == "[" else line for line in lines)
            self.read_file(named, path)


QUOTED = r'"(?:[^"\\]|\\.)*"'
VALUE = re.compile(rf'((?:{QUOTED}|[^"\\;#])*)(?:[;#].*)?')     # and a comment behind it


def unquote(text):
    """The value that stands in a file, bare or in double quotes, where its escapes are JSON's."""
    match = VALUE.fullmatch(text)
    if not match:
        raise SettingsError("a double quote is not closed, or a backslash stands outside of quotes")
    try:
        return re.sub(
            QUOTED, lambda quoted: json.loads(quoted[0], strict=False), match[1].strip())
    except json.JSONDecodeError:
        raise SettingsError(r'a backslash stands before none of \ " n t')


def read_settings(path):
    """The stock reader with what is in the file; raises SettingsError."""
    try:
        return SettingsReader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or error}")
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        raise SettingsError(f"{path}:{error.lineno}: this is there twice")
    except configparser.Error as error:     # its own text could show a password
        line = getattr(error, "lineno", None) or error.errors[0][0]
        raise SettingsError(f"{path}:{line}: this is neither [section] nor name = value")


def load_settings(path=None):
    """The settings of the file, or the defaults: each name in lower case, and `store`, the class of
    the stores, `dsn` and `path`. An empty value means the default.

    Raises SettingsError with file, section and name.
    """
    reader = read_settings(path) if path else configparser.RawConfigParser()
    given = reader.sections()
    for section in given:
        if section not in SETTINGS:
            raise SettingsError(f"{path}: unknown section [{section}]")
    if "Mysql" in given and "Sqlite" in given:
        raise SettingsError(f"{path}: [Mysql] and [Sqlite] are both given: keep one")
    values = {}
    for section, rows in SETTINGS.items():
        texts = dict(reader[section]) if section in given else {}
        for name, (default, convert) in rows.items():
            try:
                text = unquote(texts.pop(name.lower(), "")) or default
                values[name.lower()] = convert(text)
            except IdpotError as error:
                raise SettingsError(f"{path}: [{section}] {name}: {error}")
        for name in texts:
            raise SettingsError(f"{path}: unknown name {shown(name)} in [{section}]")
    dsn = values["connectstring"] or {
        "user": values["username"],
        "password": values["password"],
        "database": values["dbname"],
        "hosts": [(values["hostname"], values["port"])],
    }
    values["admintoken"] = values["admintoken"] or values["token"]
    store = MysqlStore if "Mysql" in given else SqliteStore
    return types.SimpleNamespace(**values, path=path, dsn=dsn, store=store)


# -------------------------------------------------------------------------------------------- logs

class StrftimeFileHandler(logging.Handler):
    """Appends to the file that a strftime pattern names now, with a symlink to the newest.

    One thread writes; reopen() is for others. A file that cannot be written, or a link that cannot
    be set, is told once and tried again each time.
    """

    def __init__(self, pattern, link="", clock=time.time):
        super().__init__()
        self.pattern = pattern
        self.link = link
        self.clock = clock
        self.file = None
        self.path = None        # of the open file
        self.moved = False      # whether another thread has called reopen()
        self.linked = False     # whether the link names the open file
        self.torn = False       # whether the last line may be half one
        self._open()
        self._point_link()

    def _open(self):
        """Opens the file of this moment unless it is open."""
        path = time.strftime(self.pattern, time.localtime(self.clock()))
        if path == self.path and not self.moved:
            return
        self.moved = False      # before the file is opened: what comes later is for the next line
        self.path = None
        new = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o640)
        old = self.file
        self.file = new
        self.path = path
        self.linked = False
        if old is not None:
            os.close(old)

    def _point_link(self):
        """Points the link to the open file."""
        if self.linked or not self.link:
            return
        if os.path.lexists(self.link) and not os.path.islink(self.link):
            raise OSError(errno.EEXIST, "LogLinkName is there and is not a symlink", self.link)
        new = f"{self.link}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)      # a crash may have left it
        target = os.path.relpath(self.path, os.path.dirname(self.link) or ".")
        os.symlink(target, new)
        # Atomic: the link never misses.
        os.replace(new, self.link)
        self.linked = True

    def emit(self, record):
        data = ("\n" * self.torn + record.getMessage() + "\n").encode("ascii", "backslashreplace")
        try:
            self._open()
            if os.write(self.file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.torn = False
            troubles.end("the access log")
        except OSError as error:
            self.torn = True
            text = f"the access log cannot be written, its lines are lost: {error}"
            troubles.begin("the access log", text, logging.ERROR)
            return
        try:
            self._point_link()
            troubles.end("LogLinkName")
        except OSError as error:
            troubles.begin("LogLinkName", f"LogLinkName cannot be set: {error}", logging.ERROR)

    def reopen(self):
        """Has the next line open the file anew, after logrotate has moved it."""
        self.moved = True


class StderrHandler(logging.Handler):
    """Writes to stderr, past Python's buffer: its lock would hang the exit while a pipe is full."""

    def emit(self, record):
        with contextlib.suppress(OSError):      # nobody reads it any more
            os.write(2, (record.getMessage() + "\n").encode("ascii", "backslashreplace"))


class Background:
    """A thread that works on what others add, as lists, so that they need not wait for it.

    Where too much waits, the oldest is lost.
    """

    def __init__(self, work, pause):
        self._work = work
        self._pause = pause     # seconds for more to gather
        self._items = collections.deque(maxlen=200000)
        self._lock = threading.Lock()   # held by who works, so that the lists keep their order
        self._news = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, *items):
        self._items.extend(items)
        if not self._news.is_set():     # set() takes a lock
            self._news.set()

    def _run(self):
        while True:
            try:
                self._news.wait()
                self._news.clear()      # what is added from here on sets it again
                self.work_off()
            except (MemoryError, RuntimeError):
                pass
            time.sleep(self._pause)

    def work_off(self):
        """Works on what is there now, in the thread that calls."""
        with self._lock:
            items = [self._items.popleft() for _ in range(len(self._items))]
            if items:
                self._work(items)

    def flush(self):
        """Waits until all is done, for half a second at most."""
        deadline = time.monotonic() + 0.5
        while (self._items or self._lock.locked()) and time.monotonic() < deadline:
            time.sleep(0.005)


class BackgroundHandler(logging.Handler):
    """Passes lines on to another handler in the background: neither IDs nor a stop wait for a full
    pipe or a hung disk."""

    def __init__(self, target):
        super().__init__()
        self.target = target
        self._lines = Background(self._pass_on, 0.1)
        self.add = self._lines.add      # without logging's own cost
        self.flush = self._lines.flush

    def emit(self, record):
        self.add(self.format(record))

    def _pass_on(self, lines):
        self.target.emit(logging.makeLogRecord({"msg": "\n".join(lines)}))


class Troubles:
    """What is wrong now: a trouble is logged when it begins and when it ends, not at each request.

    What comes back soon, as conflicts in a cluster do, is told only if it lasts.
    """
    QUIET = 30.0        # seconds after a line in which no other trouble of the subject is told

    def __init__(self):
        self._lock = threading.Lock()   # guards both; end() looks before without it, for speed
        self._now = {}                  # subject of a trouble -> whether that was told
        self._quiet = {}                # subject -> until when nothing is told of it

    def begin(self, subject, text, level=logging.WARNING):
        """Notes that something is wrong with a subject; text is the line that tells it."""
        with self._lock:
            now = time.monotonic()
            told = self._now.setdefault(subject, False)
            if told or now < self._quiet.get(subject, now):
                return
            self._now[subject] = True
            self._quiet[subject] = now + self.QUIET
        log.log(level, "%s", " ".join(text.split()))

    def end(self, subject):
        """Notes that the subject is well."""
        if subject in self._now:
            with self._lock:
                told = self._now.pop(subject, False)
            if told:
                log.info("%s is well again", subject)


troubles = Troubles()


def log_exception(what):
    """Logs the exception at hand with its traceback, if there is memory for that."""
    try:
        log.exception("%s", what)
    except (MemoryError, RuntimeError):
        pass


class AccessLog(Background):
    """Makes lines of the NCSA combined format of answers, and counts them for the metrics.

    An answer is (host, head, status, bytes sent, start, end), these by time.monotonic(). Where it
    is sent it is only added: what a worker does between two answers decides the speed.
    """
    # Apache's way to write what could end a field or a line
    ESCAPES = {byte: f"\\x{byte:02x}" for byte in (*range(32), *range(127, 256))}
    ESCAPES.update({ord('"'): r'\"', ord("\\"): r"\\"})

    def __init__(self, handler, metrics, prefix=""):
        self._handler = handler
        self._metrics = metrics
        self._prefix = prefix
        super().__init__(self._log, 0.02)

    def _log(self, answers):
        self._metrics.answered(answers)
        moment = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        lines = []
        for host, head, status, size, _, _ in answers:
            request = f'{host} - - [{moment}] "{head.line}"'
            lines.append(f'{self._prefix}{request} {status} {size or "-"} {head.tail}')
        self._handler.add(*lines)

    @classmethod
    def escape(cls, data):
        return data.decode("latin-1").translate(cls.ESCAPES)


class EventFormatter(logging.Formatter):
    """The stock one reads source files for a traceback, but a descriptor may be what is short."""

    def formatException(self, exc_info):
        try:
            return super().formatException(exc_info)
        except OSError:
            return repr(exc_info[1])


class JournalFormatter(EventFormatter):
    """For journald, which has a time of its own: a syslog priority before each line."""
    PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}

    def format(self, record):
        prefix = self.PRIORITIES.get(record.levelno, "<6>")
        return prefix + super().format(record).replace("\n", "\n" + prefix)


def under_journald():
    """Whether stderr is journald's (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(2)
    # Else the variable was inherited from a parent whose stderr was another one.
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def open_logs(settings, metrics):
    """Sends events to stderr, and access lines to LogFile or else to stderr too.

    Returns the handler of the events, that of the lines, and the AccessLog.
    """
    journald = under_journald()
    events = lines = BackgroundHandler(StderrHandler())
    events.setFormatter(JournalFormatter() if journald else EventFormatter(
        "%(asctime)s idpot[%(process)d] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [events]
    log.setLevel(logging.INFO)
    log.propagate = False
    if settings.logfile:
        try:
            lines = BackgroundHandler(StrftimeFileHandler(settings.logfile, settings.loglinkname))
        except OSError as error:
            place = shown(error.filename or settings.logfile)
            raise StartError(f"LogFile {place}: {error.strerror}")
    prefix = "<6>" if journald and lines is events else ""
    return events, lines, AccessLog(lines, metrics, prefix)


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
    "idpot_db_retries_total": ("counter", "Requests that were put into a further statement."),
    "idpot_db_connections": ("gauge", "Open connections to the database."),
    "idpot_build_info": ("gauge", "The version that runs."),
    "process_cpu_seconds_total": ("counter", "Processor time."),
    "process_resident_memory_bytes": ("gauge", "Resident memory."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_start_time_seconds": ("gauge", "Start since the epoch."),
}


class Metrics:
    """What /metrics tells, counted since the start."""
    BUCKETS = (         # seconds, as the labels have them
        "0.0005", "0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5",
        "1", "2.5", "5", "10", "+Inf")

    def __init__(self):
        self._lock = threading.Lock()       # guards the counters
        self._counters = collections.Counter()      # series, a name with its labels -> number
        for name in ("ids_issued", "db_statements", "db_seconds", "db_retries"):
            self._counters[f"idpot_{name}_total"] = 0
        self._start = time.time()
        self.answered([])       # the histogram is there from the start

    def add(self, series, amount=1):
        with self._lock:
            self._counters[series] += amount

    def answered(self, answers):
        """Counts answers, as the AccessLog notes them."""
        durations = sorted([end - start for _, _, _, _, start, end in answers])
        alike = collections.Counter([(head, status) for _, head, status, _, _, _ in answers])
        histogram = "idpot_http_request_duration_seconds"
        with self._lock:
            for limit in self.BUCKETS:
                within = bisect.bisect_right(durations, float(limit))
                self._counters[f'{histogram}_bucket{{le="{limit}"}}'] += within
            self._counters[f"{histogram}_sum"] += sum(durations)
            self._counters[f"{histogram}_count"] += len(durations)
            for (head, status), count in alike.items():
                method = head.method if head.method in ("GET", "HEAD", "POST") else "other"
                labels = f'route="{head.route}",method="{method}",code="{status}"'
                self._counters[f"idpot_http_requests_total{{{labels}}}"] += count

    def text(self, gauges):
        """The Prometheus text format, version 0.0.4; gauges: further series and their values."""
        with self._lock:
            series = {**self._counters, **gauges}
        series.update(self._process())
        lines = []
        for name, (kind, meaning) in METRICS.items():
            own = re.compile(name + r"(_bucket|_sum|_count)?(\{.*)?")
            lines.append(f"# HELP {name} {meaning}")
            lines.append(f"# TYPE {name} {kind}")
            lines += [f"{one} {value}" for one, value in series.items() if own.fullmatch(one)]
        return "\n".join([*lines, ""])

    def _process(self):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        python = sys.version.split()[0]
        return {
            f'idpot_build_info{{version="{__version__}",python="{python}"}}': 1,
            "process_cpu_seconds_total": time.process_time(),
            "process_resident_memory_bytes": pages * resource.getpagesize(),
            "process_open_fds": len(os.listdir("/proc/self/fd")),
            "process_start_time_seconds": self._start,
        }


# ------------------------------------------------------------------------------------------ stores
#
# A store keeps the pots; one thread, its worker, uses it. take(pot, count, floor) adds count to the
# counter, or to floor where the counter is below it, durably as far as the engine goes, and returns
# the new value, which ends the range taken; floor is the highest ID that this server gave from the
# pot, None before the first. connect, current, create, raise_to, pots and check do what their names
# and the API say. They raise NotFound, Exists, Exhausted, Broken, Unavailable, and Retry where the
# same call may help. `connected` is False where connect() is needed; SQLite needs none.
#
# start() raises StartError where waiting cannot help; where it can, it does not fail. probe() does
# what --check promises. Both return a description.

class SqliteStore:
    """One SQLite file that this process locks; WAL with synchronous=FULL survives a power cut.

    SQLite's integers are signed: an ID from 2**63 up is kept as ID - 2**64, and added to in Python.
    """
    connected = True        # start() has opened the file, and it stays open

    @classmethod
    def all(cls, settings, metrics):
        """The stores of a server: one."""
        return [cls(settings, metrics)]

    def __init__(self, settings, metrics):
        self._path = settings.file
        self._what = f"SQLite {settings.file}"
        self._metrics = metrics
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
            raise StartError(f"SQLite file {shown(self._path)}: {reason}")
        if mode != "wal":
            raise StartError(f"SQLite file {shown(self._path)} does not take the WAL journal")
        return self._what

    def probe(self):
        """Opens nothing by SQLite, which would write; another process may use the file."""
        what = f"SQLite file {shown(self._path)}"
        folder = os.path.dirname(self._path) or "."
        for place in (self._path, folder):
            if os.path.exists(place) and not os.access(place, os.W_OK):
                raise StartError(f"{what}: {shown(place)} cannot be written")
        try:
            with open(self._path, "rb") as file:
                if file.read(16) not in (b"", b"SQLite format 3\0"):
                    raise StartError(f"{what}: file is not a database")
                # SQLite's own locks are on these bytes: https://sqlite.org/lockingv3.html
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 510, 0x40000002)
        except BlockingIOError:
            return f"{self._what} is in use by another process"
        except FileNotFoundError:
            if not os.path.isdir(folder):
                raise StartError(f"{what}: its folder is not there")
            return f"{self._what} can be made"
        except OSError as error:
            raise StartError(f"{what}: {error.strerror}")
        return f"{self._what} can be used"

    def _execute(self, statement, *values):
        try:
            cursor = self._db.execute(statement, values)
            if not statement.startswith("SELECT"):      # a full disk can be read
                troubles.end(self._what)
            return cursor
        except self._sqlite.Error as error:
            self._metrics.add('idpot_db_errors_total{errno="other"}')
            troubles.begin(self._what, f"{self._what}: {error}")
            raise Unavailable(f"SQLite: {error}")

    def take(self, pot, count, floor):
        # Nobody else can write, since the file is locked: the counter is at the floor, unless an
        # error hid what was written. The read that this saves took a fifth of the speed (wrk -c64).
        current = self.current(pot) if floor is None else floor
        while True:
            last = max(current, floor or 0) + count
            if last > MAX_ID:
                raise Exhausted(f"pot {shown(pot)} is exhausted: fewer than {count} IDs are left")
            done = self._execute("UPDATE pot SET id = ? WHERE name = ? AND id = ?",
                                 self._signed(last), pot, self._signed(current))
            if done.rowcount == 1:
                return last
            current = self.current(pot)

    def current(self, pot):
        row = self._execute("SELECT id FROM pot WHERE name = ?", pot).fetchone()
        if not row:
            raise NotFound(f"there is no pot {shown(pot)}")
        return row[0] % 2**64

    @staticmethod
    def _signed(value):
        return value - 2**64 if value >> 63 else value

    def create(self, pot, low):
        done = self._execute(
            "INSERT OR IGNORE INTO pot (name, id) VALUES (?, ?)", pot, self._signed(low))
        if done.rowcount != 1:
            raise Exists(f"pot {shown(pot)} exists")

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
RETRIED = frozenset((   # MySQL's errors that a new connection or a moment may mend
    1047, 1180, 1205, 1213,                 # Galera, locks
    3092, 3100, 3101,                       # Group Replication
    1015, 1290, 1792, 1836, 3032, 6400,     # the server takes no writes now
    1020, 1021, 1114, 1194, 1195,           # a row, a disk or a table
    1040, 1129, 1203, 1226,                 # too many connections or errors
    # A connection or a statement was ended, is lost or too slow.
    -1, 1053, 1152, 1158, 1159, 1160, 1161, 1317, 1927, 1969,
    2002, 2003, 2005, 2006, 2013, 2055, 3024, 4031))
# Of these, the ones that a server gives, or the driver, where one of the limits of time is over.
HUNG = frozenset((1205, 2006, 2013, 2055, 3024))
CEILING = frozenset((1264, 1292, 1690, 3819, 4025))     # of a column, of BIGINT, of a CHECK
OF_ONE_POT = CEILING | frozenset((1054, 1146, 3098))    # the connection stays sound


class Refused(Unavailable):
    """The server cannot be used as it is, and waiting does not mend that."""


def import_driver():
    """mysql.connector; raises StartError that says how to install it."""
    try:
        import mysql.connector      # only where it is configured
        return mysql.connector
    except ImportError:
        folder = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
        install = f"python3 -m pip install --target={folder} 'mysql-connector-python>=9.2'"
        if not importlib.util.find_spec("pip"):
            install = f"apt-get install -y --no-install-recommends python3-pip && {install}"
        raise StartError(f"[Mysql] needs mysql-connector-python: {install}")


class MysqlServers:
    """The addresses where the database is, and how to connect to one that can issue IDs now."""

    def __init__(self, settings):
        self.driver = import_driver()
        self.engine = settings.engine
        dsn = dict(settings.dsn)
        self.ignored = dsn.pop("ignored", [])
        self._tls = dsn.pop("tls", "preferred")
        self._addresses = dsn.pop("hosts") or [None]    # None: the socket
        self.hung = {}          # address -> when a statement hung there
        self._group = ""        # name of the replication group, once a server told one
        self._warned = False    # whether warn_of_engines() has looked
        if "unix_socket" in dsn:
            self.where = dsn["unix_socket"]
        else:
            self.where = ",".join(f"{host}:{port}" for host, port in self._addresses)
        # Of the time that a request may wait, half is for the first server to answer. To connect is
        # given half of that, at most 3 seconds, since other addresses may have to be tried.
        half = settings.timeout / 2
        limits = {
            "connection_timeout": min(3, half / 2),
            "read_timeout": half,
            "write_timeout": half,
        }
        for name, limit in limits.items():      # the driver takes whole seconds, and 0 as no limit
            dsn[name] = math.ceil(dsn.get(name) or limit)
        self.lock_wait = max(1, math.ceil(half) - 1)
        if dsn.get("charset", "utf8mb4") == "utf8mb4":      # older MariaDB lacks the driver's own
            dsn.setdefault("collation", "utf8mb4_general_ci")
        if self._tls == "true":
            paths = ssl.get_default_verify_paths()
            dsn["ssl_verify_cert"] = True
            dsn["ssl_verify_identity"] = True
            dsn["ssl_ca"] = paths.cafile or paths.openssl_cafile
        self.arguments = {
            **dsn,
            "autocommit": True,
            "ssl_disabled": self._tls == "false",
            "client_flags": [self.driver.ClientFlag.FOUND_ROWS],
        }

    def connect(self):
        """(connection, address) of the first address that can issue IDs now; one where a statement
        hung within the last minute comes last.

        Raises Refused, or else the last address's trouble: the driver's error or Retry.
        """
        since = time.monotonic() - 60
        trouble = None
        for address in sorted(self._addresses, key=lambda one: self.hung.get(one, since) > since):
            try:
                return self._open(address), address
            except (self.driver.Error, Unavailable) as error:
                # Refused says more than a later address that is merely down.
                trouble = trouble if isinstance(trouble, Refused) else error
        raise trouble

    def _open(self, address):
        place = {"host": address[0], "port": address[1]} if address else {}
        connection = self.driver.connect(**self.arguments, **place)
        try:
            # Whatever the server's defaults are, the promise does not depend on them.
            connection.cmd_query(
                f"SET SESSION autocommit=1, lock_wait_timeout={self.lock_wait}, "
                f"innodb_lock_wait_timeout={self.lock_wait}, sql_safe_updates=0, "
                "sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'")
            if self._tls == "skip-verify":
                if not select_rows(connection, "SHOW STATUS LIKE 'Ssl_cipher'")[0][1]:
                    raise Retry(f"{CANNOT}: its server offers no TLS")
            self.check_server(connection)
            self.warn_of_engines(connection)
            return connection
        except (self.driver.Error, Unavailable):
            connection.close()
            raise

    def check_server(self, connection):
        """Raises Retry or Refused where the server cannot issue IDs."""
        state = dict(select_rows(
            connection, "SHOW GLOBAL VARIABLES WHERE Variable_name IN "
                        "('read_only', 'wsrep_on', 'group_replication_group_name')"))
        if state.get("wsrep_on") == "ON":
            ready = select_rows(connection, "SHOW GLOBAL STATUS LIKE 'wsrep_ready'")
            if ready[0][1] != "ON":
                raise Retry(f"{CANNOT}: the Galera node is not ready (error 1047)")
        # A member that is started without the plugin looks like a server that never had a group.
        group = state.get("group_replication_group_name", "")
        self._group = self._group or group
        if group != self._group:
            raise Retry(f"{CANNOT}: its server is not in the replication group {self._group}")
        if group:
            self._check_group(connection)
        if state.get("read_only", "OFF") not in ("OFF", "0"):
            raise Retry(f"{CANNOT}: it is read-only (error 1290)")
        cluster = "a Group Replication member" if group else ""
        if state.get("wsrep_on") == "ON":
            cluster = "a Galera node"
        if cluster:
            for table, engine in [("Engine", self.engine), *pot_tables(connection)]:
                if engine.lower() != "innodb":      # each node would count for itself
                    where = table.replace("pot_", "table pot_", 1)
                    raise Refused(f"{where}: {cluster} replicates InnoDB only, not {engine}")
        engines = select_rows(connection, "SHOW ENGINES")
        known = {name.lower() for name, support, *_ in engines if support in ("YES", "DEFAULT")}
        if self.engine.lower() not in known:
            raise Refused(f"Engine: the server has no storage engine {shown(self.engine)}")

    def _check_group(self, connection):
        """MySQL Group Replication: a server outside its group, or cut off, stays writable."""
        try:
            members = select_rows(
                connection, "SELECT member_id = @@server_uuid, member_state, member_role "
                            "FROM performance_schema.replication_group_members")
        except self.driver.Error as error:
            if error.errno != 1142:
                raise
            raise Refused("on Group Replication the account needs GRANT SELECT ON "
                          "performance_schema.replication_group_members (error 1142)")
        own = "no member"
        unreachable = 0
        for mine, state, role in members:
            unreachable += state == "UNREACHABLE"
            if mine:
                own = f"{state} {role}".strip()
        if own != "ONLINE PRIMARY":
            raise Retry(f"{CANNOT}: its server is {own} in the replication group")
        # Its own word for it comes 5 to 6 seconds late; then a statement hangs until its timeout.
        if 2 * unreachable >= len(members):
            raise Retry(f"{CANNOT}: the replication group has lost its majority")

    def warn_of_engines(self, connection):
        """Tells once which engines forget IDs at a power cut."""
        if self._warned:
            return
        # Without a lock: all workers would set the same.
        self._warned = True
        state = dict(select_rows(
            connection, "SHOW GLOBAL VARIABLES WHERE Variable_name IN "
                        "('innodb_flush_log_at_trx_commit', 'flush')"))
        engines = {engine.lower(): engine for _, engine in pot_tables(connection)}
        engines[self.engine.lower()] = self.engine
        if "innodb" in engines and state.get("innodb_flush_log_at_trx_commit") != "1":
            log.warning("innodb_flush_log_at_trx_commit is not 1: IDs of the last second come "
                        "again after a power cut")
        weak = [engines[one] for one in engines if one not in ("innodb", "aria", "rocksdb")]
        if weak and state.get("flush") != "ON":
            log.warning("Engine %s does not survive a power cut: IDs of the last half minute may "
                        "come again; InnoDB loses none", ", ".join(weak))


def run_statement(connection, statement):
    return connection.cmd_query(statement)


def select_rows(connection, query):
    """The rows of a query."""
    connection.cmd_query(query)     # a cursor would ping the server first
    return connection.get_rows()[0]


def pot_tables(connection):
    """(table, engine) of each pot."""
    rows = select_rows(connection, "SELECT table_name, engine FROM information_schema.tables WHERE "
                                   r"table_schema = DATABASE() AND table_name LIKE 'pot\_%' "
                                   "AND engine IS NOT NULL")
    return [(table, engine) for table, engine in rows if POT_NAME.fullmatch(table[4:])]


class MysqlStore:
    """A connection to MySQL or MariaDB, thrown away after any trouble that is not one pot's.

    A pot is go-idpot's table: `pot_NAME (id BIGINT UNSIGNED NOT NULL)` with one row.
    """
    @classmethod
    def all(cls, settings, metrics):
        """The stores of a server, each with a connection of its own."""
        servers = MysqlServers(settings)
        return [cls(servers, metrics) for _ in range(settings.connections)]

    def __init__(self, servers, metrics):
        self._servers = servers
        self._metrics = metrics
        self._connection = None
        self._address = None
        self._subject = f"MySQL {servers.where}"
        self._what = f"{self._subject}/{servers.arguments['database']}, {servers.engine}"

    @property
    def connected(self):
        return self._connection is not None

    def start(self):
        if self._servers.ignored:
            log.warning("ConnectString: these parameters are ignored: %s",
                        ", ".join(self._servers.ignored))
        try:
            self._connect()
        except Retry as error:      # it may come later
            self._tell(error.__cause__ or error)
        except Unavailable as error:
            raise self._start_error(error)
        return self._what

    def probe(self):
        try:
            self._connect()
        except Unavailable as error:
            raise self._start_error(error)
        return f"{self._what} is reached"

    def _start_error(self, error):
        if isinstance(error, Refused):
            return SettingsError(str(error))
        cause = error.__cause__
        reason = cause.msg if cause else str(error)
        # What the two forms of the driver say to caching_sha2_password without TLS.
        if cause and cause.errno == (2061 if self._servers.driver.HAVE_CEXT else 1045):
            reason += "; such an account may need TLS on the server, or its socket: unix(/path)"
        return StartError(f"{self._subject}: {' '.join(reason.split())}")

    def connect(self):
        """Connects where there is no connection; raises Retry, Refused or Unavailable."""
        try:
            self._connect()
        except Unavailable as error:
            self._tell(error.__cause__ or error)    # the driver's own says more
            raise

    def _connect(self):
        if not self._connection:
            try:
                self._connection, self._address = self._servers.connect()
            except self._servers.driver.Error as error:
                raise self._translated(error) from error

    def _tell(self, error):
        """Logs an error that is not one pot's."""
        troubles.begin(self._subject, f"{self._subject}: {error}")

    def _run(self, pot, function, *arguments):
        """What function(connection, *arguments) returns.

        The driver's errors become ours, and all but those of one pot end the connection.
        """
        self.connect()
        start = time.monotonic()
        sound = False       # after any surprise a reply could be that of another statement
        try:
            value = function(self._connection, *arguments)
            sound = True
            return value
        except self._servers.driver.Error as error:
            sound = pot and error.errno in OF_ONE_POT
            if error.errno in HUNG and time.monotonic() - start > 0.9 * self._servers.lock_wait:
                self._servers.hung[self._address] = time.monotonic()
            if not sound:
                self._tell(error)
            raise self._translated(error, pot) from error
        except Unavailable as error:
            self._tell(error)
            raise
        finally:
            if not sound:
                self.close()

    def _select(self, query, pot=""):
        return self._run(pot, select_rows, query)

    def _translated(self, error, pot=""):
        """The IdpotError for an error of the driver; without a pot none is one pot's."""
        if pot and error.errno == 1146:
            return NotFound(f"there is no pot {shown(pot)}")
        if pot and error.errno == 1054:
            return Broken(f"the table of pot {shown(pot)} has no column id")
        if pot and error.errno in CEILING:
            return Exhausted(f"pot {shown(pot)} is exhausted: its table holds no greater number")
        self._metrics.add(f'idpot_db_errors_total{{errno="{error.errno}"}}')
        kind = Retry if error.errno in RETRIED else Unavailable
        return kind(f"{CANNOT} (error {error.errno})")

    def _update(self, pot, value):
        """Sets the counter to an SQL value; returns the argument of LAST_INSERT_ID in it, from the
        same reply, or 0 where that was not called."""
        done = self._run(pot, run_statement, f"UPDATE `pot_{pot}` SET id = {value}")
        troubles.end(self._subject)
        if done["affected_rows"] != 1:      # with FOUND_ROWS: the rows there are
            raise Broken(f"the table of pot {shown(pot)} has {done['affected_rows']} rows, not one")
        return done["insert_id"]

    def take(self, pot, count, floor):
        if floor is None:
            self.current(pot)       # raises Broken where the table would not count
            floor = 0
        # The statement of every day asks for a counter that is not below the floor.
        limit = MAX_ID - count
        last = self._update(
            pot, f"IF(id BETWEEN {floor} AND {limit}, LAST_INSERT_ID(id + {count}), id)")
        # 0: LAST_INSERT_ID() was not called. It is no ID, since count is 1 at least.
        return last or self._take_above(pot, count, floor, limit)

    def _take_above(self, pot, count, floor, limit):
        """As take(), for a counter that is below the floor or above the limit."""
        current = self.current(pot)
        if current < floor:
            log.warning("the counter of pot %s was set back to %d, but %d was given: it goes on "
                        "above that", pot, current, floor)
        if max(current, floor) > limit:
            raise Exhausted(f"pot {shown(pot)} is exhausted: fewer than {count} IDs are left")
        # MariaDB's GREATEST(id, 5) is signed and fails from 2**63 up: hence the CAST.
        higher = f"GREATEST(id, CAST({floor} AS UNSIGNED))"
        last = self._update(pot, f"IF(id <= {limit}, LAST_INSERT_ID({higher} + {count}), id)")
        if not last:
            raise Retry(f"the counter of pot {shown(pot)} is being changed by others")
        return last

    def current(self, pot):
        rows = self._select(f"SELECT id FROM `pot_{pot}` LIMIT 2", pot)
        if len(rows) != 1:
            count = "several rows" if rows else "no row"
            raise Broken(f"the table of pot {shown(pot)} has {count}, not one")
        value = rows[0][0]
        if type(value) is not int or value < 0:     # DOUBLE and VARCHAR would repeat IDs
            raise Broken(f"the table of pot {shown(pot)} holds no whole number from 0 up")
        return value

    def create(self, pot, low):
        """Makes the table and its row under a lock: a table without a row was left by a crash."""
        engine = self._servers.engine
        try:
            self._run("", self._servers.check_server)
        except Refused as error:
            raise Unavailable(str(error).removeprefix("Engine: "))
        if not self._select(f"SELECT GET_LOCK('pot_{pot}', {self._servers.lock_wait})")[0][0]:
            raise Retry(f"another create of pot {shown(pot)} takes too long")
        try:
            # Galera and Group Replication need a primary key; go-idpot's tables have none.
            key = " PRIMARY KEY" if engine.lower() == "innodb" else ""
            self._run(pot, run_statement, f"CREATE TABLE IF NOT EXISTS `pot_{pot}` "
                                          f"(id BIGINT UNSIGNED NOT NULL{key}) ENGINE={engine}")
            there = self._select(f"SELECT id FROM `pot_{pot}` LIMIT 1", pot)
            if not there:
                self._run(pot, run_statement, f"INSERT INTO `pot_{pot}` (id) VALUES ({low})")
            with contextlib.suppress(Unavailable):      # the row is there, whatever happens now
                self._select(f"SELECT RELEASE_LOCK('pot_{pot}')")
        except IdpotError:
            self.close()    # and with it the lock
            raise
        if there:
            raise Exists(f"pot {shown(pot)} exists")

    def raise_to(self, pot, low):
        self.current(pot)       # raises Broken
        value = self._update(pot, f"LAST_INSERT_ID(GREATEST(id, CAST({low} AS UNSIGNED)))")
        if value < low:     # MariaDB, where the column is signed
            raise Exhausted(f"pot {shown(pot)} is exhausted: its table holds no greater number")
        return value

    def pots(self):
        names = [table[4:] for table, _ in self._run("", pot_tables)]
        rows = []
        for at in range(0, len(names), 100):
            rows += self._currents(names[at:at + 100])
        return sorted(rows)

    def _currents(self, pots):
        """(pot, current ID) of each, in one statement; "-" for a pot that has none."""
        with contextlib.suppress(NotFound, Broken):
            query = " UNION ALL ".join(
                f"(SELECT '{pot}', id FROM `pot_{pot}` LIMIT 2)" for pot in pots)
            rows = self._select(query, pots[0])
            whole = all(type(value) is int and value >= 0 for _, value in rows)
            if whole and sorted(pots) == sorted(pot for pot, _ in rows):
                return rows
        if len(pots) == 1:
            return [(pots[0], "-")]
        return [row for pot in pots for row in self._currents([pot])]

    def check(self, pot):
        """Raises Unavailable where no ID could be issued now; pot: the one used last, if any."""
        self._run("", self._servers.check_server)
        tables = [] if pot else self._run("", pot_tables)
        for table, _ in tables[:1]:
            pot = table[4:]
        if pot:     # takes the locks and needs the privilege
            with contextlib.suppress(NotFound, Broken):
                self._run(pot, run_statement, f"UPDATE `pot_{pot}` SET id = id")

    def close(self):
        connection, self._connection = self._connection, None
        if connection:
            with contextlib.suppress(self._servers.driver.Error):
                connection.close()


# -------------------------------------------------------------------------------------- allocation
#
# Requests on one pot that wait together are served by ONE statement. A request becomes a Job;
# submit() puts it into its pot's queue; a worker, a thread that owns one store for life, takes a
# whole queue, adds up its counts, runs the statement, and hands each job its IDs in order of
# arrival. While the statement runs, arrivals gather for the next one.

class Job:
    """What a request wants of a pot: `count` IDs, or with count 0 what `call` says, a store's
    method and its arguments.

    answer(value, error) is called once: with the last of the IDs or what the method returned, or
    with an IdpotError, by the worker, or by expire() when `patience` seconds are over. It is tried
    again `retries` times at most. gone() tells whether its client has gone.
    """
    tries = 0
    trouble = None      # the last error after which it was to be tried again

    def __init__(self, answer, count=0, call=None, patience=10.0, gone=lambda: False,
                 retries=math.inf):
        self.answer = answer
        self.count = count
        self.call = call
        self.patience = patience
        self.gone = gone
        self.retries = retries
        self.start = time.monotonic()
        self._answered = threading.Lock()   # taken for good by the thread that answers

    def finish(self, value=None, error=None):
        """Answers, unless that was done before."""
        if self._answered.acquire(blocking=False):
            self.answer(value, error)

    def expire(self):
        """Answers that the time is over, and why."""
        trouble = self.trouble
        reason = f"{trouble}, tried for" if trouble else "the database did not answer in"
        self.finish(error=Unavailable(f"{reason} {self.patience:g} seconds"))

    def answered(self):
        return self._answered.locked()


def still_wanted(jobs):
    """Those that were not answered, and whose clients have not gone after a second of waiting."""
    now = time.monotonic()
    for job in jobs:
        if now - job.start > 1 and job.gone():
            job.finish(error=Unavailable("the client has closed its side"))
    return [job for job in jobs if not job.answered()]


class Worker:
    """A thread of the allocator, and the store that it owns."""

    def __init__(self, store):
        self.store = store
        self.wakes = queue.SimpleQueue()
        self.thread = None
        self.busy_since = None      # None while it waits for work
        self.failures = 0           # of connecting, in a row


# Queues for what concerns no pot, with names that no pot can have.
ALL_POTS = "all pots"
HEALTH = "health"


INTERNAL = IdpotError("internal error")


class Allocator:
    """The queues of the pots and the workers that serve them.

    A pot has one worker at most, so a slow pot holds up no other while a worker is free. A worker
    connects before it takes a pot: one that cannot leaves the pot to the others.
    """

    def __init__(self, stores, metrics, stuck=60.0):
        self._metrics = metrics
        self._stuck = stuck     # seconds after which a busy worker is taken for dead
        self._workers = [Worker(store) for store in stores]
        self._stopped = threading.Event()
        self._lock = threading.Lock()       # guards the next three; no statement or answer under it
        # Pot -> jobs that wait. A pot that is here is in _pots too, or one worker is serving it.
        self._queues = {}
        self._pots = collections.deque()    # pots with jobs that no worker has, oldest first
        # Workers without work; the last is the next: the one used last, which has a connection.
        self._idle = []
        self._highest = {}                  # pot -> highest ID given; its worker writes it
        # For /healthz: the pot that IDs were taken from last, or could not be.
        self.last_pot = ""

    def start(self):
        for worker in self._workers:
            worker.thread = threading.Thread(target=self._work, args=(worker,), daemon=True)
            worker.thread.start()

    def submit(self, pot, job):
        """Queues a job; it is answered whatever happens, if somebody expires it in the end."""
        with self._lock:
            if pot in self._queues:
                self._queues[pot].append(job)
                return
            # In this order nothing is lost where memory is short: a worker may find nothing to do.
            self._wake_one()
            self._pots.append(pot)
            self._queues[pot] = [job]

    def alive(self):
        """Whether each worker lives and has not been busy with one thing for too long."""
        oldest = time.monotonic() - self._stuck
        return all(worker.thread.is_alive() and (worker.busy_since or math.inf) > oldest
                   for worker in self._workers)

    def connections(self):
        """How many stores are connected."""
        return sum(worker.store.connected for worker in self._workers)

    def stop(self, patience=1.0):
        """Has the workers close their stores and end; waits patience seconds at most."""
        self._stopped.set()
        for worker in self._workers:
            worker.wakes.put(None)
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.thread.join(max(0, deadline - time.monotonic()))

    def _wake_one(self):
        """Wakes the next worker, if one is idle. The lock is held."""
        if self._idle:
            self._idle[-1].wakes.put(None)
            self._idle.pop()

    def _work(self, worker):
        """What a worker's thread does."""
        while not self._stopped.is_set():
            try:
                self._work_once(worker)
            except Exception:       # MemoryError, say: the worker lives on
                log_exception("a worker")
                time.sleep(0.2)     # what repeats must not spin
        worker.store.close()

    def _work_once(self, worker):
        """Serves the pot that has waited longest, or waits for one, or for a connection."""
        connected = worker.store.connected
        pot = None
        with self._lock:
            waiting = bool(self._pots)
            if waiting and connected:
                pot = self._pots.popleft()
            elif connected:
                self._idle.append(worker)
            elif not waiting:       # to the bottom: its client would wait for TLS
                self._idle.insert(0, worker)
        if pot:
            self._serve_pot(pot, worker.store)
        elif waiting:
            self._connect(worker)
        else:
            worker.busy_since = None
            worker.wakes.get()
        worker.busy_since = time.monotonic()

    def _connect(self, worker):
        """Connects; where that fails another worker may have a connection, and this one waits."""
        try:
            worker.store.connect()
            worker.failures = 0
        except Unavailable as error:
            with self._lock:
                for pot in self._pots:      # an outage may last for days
                    self._queues[pot] = [job for job in self._queues[pot] if not job.answered()]
                waiting = [job for pot in self._pots for job in self._queues[pot]]
                # No connection here may be none anywhere, but another worker may still have one.
                self._wake_one()
            for job in waiting:
                job.trouble = error
            if not self.connections():      # else one of those is to try it
                self._count_try(waiting, error)
            worker.failures += 1
            self._pause(worker.failures)

    @staticmethod
    def _count_try(jobs, error):
        for job in jobs:
            job.trouble = error
            job.tries += 1
            if job.tries > job.retries:
                job.finish(error=error)

    def _pause(self, tries):
        """Waits a random time, longer after more tries, at most a second."""
        longest = min(1.0, 0.02 * 2 ** min(tries, 10))
        self._stopped.wait(random.uniform(0, longest))

    def _serve_pot(self, pot, store):
        """Serves the jobs that wait for the pot; those to be tried again come before later ones."""
        jobs = again = ()
        try:
            with self._lock:
                jobs, self._queues[pot] = self._queues[pot], []
            again = self._try_jobs(pot, jobs, store)
        finally:
            try:
                if not again:       # all are answered, unless something unexpected was raised
                    for job in jobs:
                        job.finish(error=INTERNAL)
            finally:
                with self._lock:
                    if again or self._queues[pot]:
                        self._pots.append(pot)      # behind those that wait
                        self._queues[pot][:0] = again
                    else:
                        del self._queues[pot]

    def _try_jobs(self, pot, jobs, store):
        """Serves the jobs; returns those to be tried again."""
        try:
            self._serve_jobs(pot, still_wanted(jobs), store)
            return ()
        except Retry as error:
            self._count_try(jobs, error)
            again = still_wanted(jobs)
            self._metrics.add("idpot_db_retries_total", len(again))
            # The pot stays here meanwhile: no other worker meets the same trouble with it.
            self._pause(max(job.tries for job in jobs))
            return again

    def _serve_jobs(self, pot, jobs, store):
        """Raises Retry where some jobs are to be tried again; others may be answered by then."""
        takes = [job for job in jobs if job.count]
        if takes:
            self._take(pot, takes, store)
        calls = {}      # one call answers all who ask the same, except that only one creates a pot
        for job in jobs:
            if not job.count:
                key = job if job.call[0] == "create" else job.call
                calls.setdefault(key, []).append(job)
        for group in calls.values():
            self._call(pot, group, store)

    def _call(self, pot, jobs, store):
        name, *arguments = jobs[0].call
        value = failure = None
        try:
            value = self._timed(getattr(store, name), *arguments)
            if name == "raise_to":
                self._highest[pot] = max(value, self._highest.get(pot, 0))
            elif name == "create":      # its row is as it should be, without a look
                self._highest.setdefault(pot, arguments[1])
        except Retry:
            raise
        except IdpotError as error:
            failure = error
        for job in jobs:
            job.finish(value, failure)

    def _take(self, pot, jobs, store):
        """Takes the sum of the counts from the pot, and hands the IDs out in order."""
        total = sum([job.count for job in jobs])
        try:
            last = self._timed(store.take, pot, total, self._highest.get(pot))
        except Retry:
            raise
        except IdpotError as error:
            self._fail(pot, jobs, store, error)
            return
        self._highest[pot] = last
        self.last_pot = pot
        self._metrics.add("idpot_db_statements_total")
        self._metrics.add("idpot_ids_issued_total", total)
        troubles.end(f"pot {pot}")
        given = last - total
        for job in jobs:
            given += job.count
            job.finish(given)

    def _fail(self, pot, jobs, store, error):
        """Answers the error, but where too many IDs were asked for together some may fit alone."""
        if isinstance(error, Broken):
            troubles.begin(f"pot {pot}", str(error))
        elif isinstance(error, Unavailable):
            self.last_pot = pot
        if isinstance(error, Exhausted) and len(jobs) > 1:
            for job in jobs:
                self._take(pot, [job], store)
        else:
            for job in jobs:
                job.finish(error=error)

    def _timed(self, call, *arguments):
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self._metrics.add("idpot_db_seconds_total", time.perf_counter() - start)


# -------------------------------------------------------------------------------------------- HTTP
#
# Threads: one accepts (serve_forever) and every fifth of a second looks at all connections; each
# connection has a thread, its Handler, that reads requests; the allocator's workers take IDs. A
# request goes from the connection's thread to a worker and never back: the worker itself sends a
# short answer, without waiting for the client, while the thread is already reading again. Waking
# the thread for that halved the throughput (wrk -c64: 12,589/s with it, 31,004/s without). Long or
# rare answers, and those of clients that have sent more already, are waited for and sent by the
# thread, so that a slow reader holds up nobody else.
#
# Life of a connection: its thread reads a request (until RequestTimeout, or IdleTimeout before its
# first byte), takes `turn`, has it answered, and reads on; whoever has sent the answer gives `turn`
# back, which keeps answers in order. Only the thread closes the connection. Others end it by
# shutdown(2): for reading, so that what has arrived is still served before the thread sees the end;
# or, where the client does not read an answer, altogether.

MAX_LINE = 8192         # bytes of a request line, then 414
MAX_HEAD = 16384        # of the request line and all headers, then 431
MAX_FIELDS = 64         # headers, then 431
MAX_BODY = 65536        # bytes, then 413

BACKLOG = 1024          # connections that wait to be accepted
LOCAL = "127.0.0.1"     # what the access log has for a client on a Unix socket
KEPT_THREADS = 16       # that stay for the next connection
LOOK = 0.2              # seconds between looks at all connections
HURRIED = 0.5           # seconds that a client has to send at a stop
LINGER = 2.0            # seconds for which a closed connection is read, see Handler.finish

PATHS = ("/pot/create", "/pot/raise", "/pot", "/healthz", "/metrics")
REQUEST_LINE = rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9]\.[0-9])\r\n"
FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n"
HEAD = re.compile(REQUEST_LINE + b"((?:" + FIELD + rb")*)\r\n")
FIELDS = re.compile(rb"([^:\r\n]+):([^\r\n]*)\r\n")
# Control characters, bare CR and bare LF.
FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
# The beginning of an absolute-form target (RFC 9112, 3.2.2).
ABSOLUTE = re.compile(rb"(?i)\Ahttps?://(?=[^/?:])" + HOST.pattern + b"(?=[/?]|$)")
ONCE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"origin")
FORM = b"application/x-www-form-urlencoded"
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
PLAIN = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class HttpError(IdpotError):
    """The form of the request is refused; its status says why (RFC 9110, 15.5, 15.6; RFC 6585)."""

    def __init__(self, status, text, header=""):
        super().__init__(text)
        self.status = status
        self.header = header


class Head:
    """The head of a request, with the fields that parse_head() gives. A malformed one has only its
    line for the access log, and these:"""
    method = "other"
    route = "other"
    keep = False
    tail = '"-" "-"'

    def __init__(self, **fields):
        vars(self).update(fields)


def parse_target(target):
    """Fields of a Head: the path, decoded once; the query; the route, the template that the path
    matches, or "other"; and the pot."""
    origin, absolute = ABSOLUTE.subn(b"", target)
    if absolute and origin[:1] != b"/":
        origin = b"/" + origin
    if origin[:1] != b"/" or b"#" in origin:
        raise BadRequest(f"{shown(target.decode())} is not a request target")
    path, _, query = origin.decode().partition("?")
    if re.search("%(?![0-9A-Fa-f]{2})", path):
        raise BadRequest(f"{shown(path)} has a % without two hexadecimal digits")
    path = urllib.parse.unquote(path)
    parent, _, pot = path.rpartition("/")
    route = "other"
    if path in PATHS:
        route = path
    elif parent in ("/id", "/pot") and POT_NAME.fullmatch(pot):
        route = parent + "/{pot}"
    return {"path": path, "query": query, "route": route, "pot": pot}


def check_beginning(head, start=0):
    """Raises the error that a head deserves, which need not be whole; before start it is known."""
    end = head.find(b"\r\n")
    whole = end >= 0        # the request line
    length = end if whole else len(head)
    if length > MAX_LINE:
        raise HttpError(414, "the request line is too long")
    if len(head) > MAX_HEAD or head.count(b"\n") > MAX_FIELDS + 2:
        raise HttpError(431, "the header is too long")
    if FORBIDDEN.search(head, max(0, start - 1)):
        raise BadRequest("a control character, bare CR or bare LF is in the header")
    # The request line is looked at when it has just become whole, not again with each piece.
    if whole and start <= end + 2:
        if not re.fullmatch(REQUEST_LINE, head[:end + 2]):
            line = head[:end].decode("latin-1")
            raise BadRequest(f"{shown(line)} is not a request line")


def parse_fields(lines):
    """The headers by lower-case name; those that say how to read the request must be there once."""
    fields = {}
    for name, value in FIELDS.findall(lines):
        name = name.lower()
        value = value.strip(b" \t")
        if name in fields and name in ONCE:
            raise BadRequest(f"header {name.decode()} is there twice")
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def parse_length(fields):
    """The length of the body (RFC 9112, 6)."""
    if b"transfer-encoding" in fields:
        raise HttpError(501, "Transfer-Encoding is not supported: send Content-Length")
    length = fields.get(b"content-length", b"0")
    if not re.fullmatch(b"[0-9]{1,19}", length):
        raise BadRequest(f"Content-Length {shown(length.decode('latin-1'))} is not a number")
    if int(length) > MAX_BODY:
        raise HttpError(413, f"the body is longer than {MAX_BODY} bytes")
    return int(length)


@functools.lru_cache(maxsize=2048)      # a client repeats itself to the byte
def parse_head(data):
    """The Head of bytes up to the empty line, as strict as RFC 9112 allows; raises IdpotError."""
    check_beginning(data)
    match = HEAD.fullmatch(data)
    if not match:
        raise BadRequest("a header line is malformed")
    method, target, version, lines = match.groups()
    if version not in (b"1.1", b"1.0"):
        raise HttpError(505, f"HTTP/{version.decode()} is not spoken here")
    old = version == b"1.0"
    fields = parse_fields(lines)
    length = parse_length(fields)
    if not HOST.fullmatch(fields.get(b"host", b"" if old else b" ")):
        raise BadRequest("header Host is missing or malformed")       # RFC 9112, 3.2
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise HttpError(417, "Expect is understood as 100-continue only")
    options = fields.get(b"connection", b"").lower().split(b",")
    connection = {option.strip() for option in options}
    stays = b"close" not in connection and (not old or b"keep-alive" in connection)
    scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
    referer = AccessLog.escape(fields.get(b"referer", b"-"))
    agent = AccessLog.escape(fields.get(b"user-agent", b"-"))
    parts = parse_target(target)
    return Head(
        method=method.decode(),
        **parts,
        action=ACTIONS.get((parts["route"], method.decode())),    # the Handler's method
        old=old,                                    # HTTP/1.0
        keep=stays,                                 # the client would keep the connection
        length=length,                              # of the body
        expect=b"expect" in fields and not old,     # the client waits for 100 Continue
        form=fields.get(b"content-type", FORM).split(b";")[0].strip().lower(),
        token=token.strip() if scheme.lower() == b"bearer" else b"",
        origin=b"origin" in fields,
        # These two as the access log has them.
        line=AccessLog.escape(b"%s %s HTTP/%s" % (method, target, version)),
        tail=f'"{referer}" "{agent}"')


@functools.lru_cache(maxsize=64)
def answer_beginning(status, form, header):
    """The head of an answer but for its length. The accepting thread clears this cache every LOOK
    seconds, so that the Date is right (RFC 9110, 6.6.1)."""
    phrase = http.HTTPStatus(status).phrase
    lines = [
        f"HTTP/1.1 {status} {phrase}",
        "Cache-Control: no-store",
        f"Date: {email.utils.formatdate(usegmt=True)}",
    ]
    if status != 204:
        lines.append(f"Content-Type: {form}")
    return "\r\n".join([*lines, header]).encode()


def error_answer(error):
    return error.status, f"{error}\n".encode(), error.header


INTERNAL_ERROR = error_answer(INTERNAL)


def id_answer(value):
    return 200, b"%d" % value, ""


def range_answer(count, last):
    return 200, b"%d\t%d\n" % (last - count + 1, last), ""


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection; its thread reads the requests. The head of this section tells its life.

    The stock rfile and wfile are not made: what has arrived must be known when the time is over.
    """

    def setup(self):
        self.host = self.client_address[0].removeprefix("::ffff:") if self.client_address else LOCAL
        self.settings = self.server.settings
        self.buffer = b""       # what has arrived and was not read as a request
        self.began = None       # when the request that is being read began to arrive, if it did
        # Held from a whole request until its answer was sent; guards head, body, keep, start and
        # render, which belong to that request, job, what the allocator was asked for, and unsent.
        # look() and finish() read job without it.
        self.turn = threading.Lock()
        self.job = None
        self.unsent = b""       # rest of an answer that a worker could not send at once
        self.sending = False    # whether the thread waits for the client to read
        # since and limit, which allow() sets, need no lock: the thread, whoever answers, and
        # hurry() write them, and look() reads them again 0.2 seconds later.
        self.allow(self.server.idle_patience)
        self.unread = b""       # how much the client had not read at the last look
        self.ended = False      # whether end() was called
        self.server.connections[self.request.fileno()] = self
        if self.server.stopping:        # stop() may not have met this one
            self.hurry()

    def allow(self, seconds):
        """From now on the client has so many seconds to send, or to read."""
        self.since = time.monotonic()
        self.limit = seconds

    def begin(self):
        """A request has begun to arrive."""
        self.began = self.since = time.monotonic()
        self.limit = self.server.request_patience

    # Reading, in the connection's thread

    def handle_one_request(self):
        """Has one request answered; the stock handle() repeats it until close_connection is set."""
        self.close_connection = True
        try:
            if self.parse_request():
                self.close_connection = not self.keep
                self.respond()
        except OSError:         # the client has gone
            self.close_connection = True

    def parse_request(self):
        """Reads a whole request and takes the turn. As the stock method it returns False where
        there is none to serve, and has then answered any error."""
        head = None
        failure = None
        body = b""
        try:
            head = self.read_head()
            if head and head.length:
                body = self.read_body(head)
        except IdpotError as error:     # where the next request would begin is unknown
            failure = error
            head = head or self.malformed_head()
        if not head:
            return False
        self.turn.acquire()
        self.head = head
        self.body = body
        self.keep = head.keep and not (failure or self.ended or self.server.stopping)
        self.start = self.began
        self.began = None
        if failure:
            self.reply(*error_answer(failure))
        return not failure

    def read_head(self):
        """The Head of the next request; None where the client has closed between requests.

        Raises IdpotError for what is no head, ends too soon or takes too long.
        """
        if self.buffer:
            self.begin()
        else:
            self.buffer = self.receive()
        seen = 0        # bytes of the buffer that were looked at
        while self.buffer:
            if self.buffer[:2] == b"\r\n":      # RFC 9112, 2.2
                self.buffer = self.buffer[EMPTY_LINES.match(self.buffer).end():]
                seen = 0
            end = self.buffer.find(b"\r\n\r\n", max(0, seen - 3))
            if end >= 0:
                # No client can fill the cache with long ones.
                parse = parse_head if end < 1024 else parse_head.__wrapped__
                head = parse(self.buffer[:end + 4])
                self.buffer = self.buffer[end + 4:]
                return head
            check_beginning(self.buffer, seen)
            seen = len(self.buffer)
            data = self.receive()
            if not data and self.buffer:
                raise self.cut_off()
            self.buffer += data
        return None

    def read_body(self, head):
        """The request's body; raises IdpotError where it ends too soon or takes too long."""
        body = bytearray(self.buffer)
        if head.expect and len(body) < head.length:
            with self.turn:     # behind the answer to the request before
                self.send_and_wait(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(body) < head.length:
            data = self.receive()
            if not data:
                raise self.cut_off()
            body += data
        self.buffer = bytes(body[head.length:])
        return bytes(body[:head.length])

    def receive(self):
        """What comes next; nothing at the end."""
        data = self.request.recv(4096)
        if data and not self.began:
            self.begin()
        return data

    def cut_off(self):
        if self.ended:
            # RFC 9110, 15.5.9
            return HttpError(408, "the request did not arrive in time")
        return BadRequest("the request is cut off")

    def malformed_head(self):
        line = re.match(rb"[^\r\n]*", self.buffer)[0][:MAX_LINE]
        # What may be a token is left away.
        line = re.sub(rb"(?is)(authorization|bearer).*", rb"\1...", line)
        return Head(line=AccessLog.escape(line) or "-")

    def finish(self):
        """Returns when the connection can be closed: a worker has sent the last answer.

        What the client still sends is read for a moment: to close with unread input would reset the
        connection, and could destroy the answer on its way (RFC 9112, 9.6).
        """
        if not self.job:
            self.allow(LINGER)
        with contextlib.suppress(OSError):
            while self.request.recv(4096) and (
                    self.job or time.monotonic() < self.since + self.limit):
                pass
        # A worker answers sooner, unless a fault has kept it from that.
        self.turn.acquire(timeout=self.settings.timeout + LINGER)
        if self.unsent:
            with contextlib.suppress(OSError):
                self.send_and_wait(b"")

    # Answering

    def respond(self):
        """Answers the request, or leaves that to a worker."""
        head = self.head
        try:
            if self.settings.admintoken or head.origin:
                self.check_token(head)
            if not head.action:
                raise self.no_action(head)
            head.action(self)
        except IdpotError as error:
            self.reply(*error_answer(error))
        except Exception as error:
            self.close_connection = True
            if self.turn.locked():      # it is not answered yet
                log_exception(f"request from {self.host}")
                self.keep = False
                self.reply(*INTERNAL_ERROR)
            elif not isinstance(error, OSError):    # else the client has gone
                log_exception(f"request from {self.host}")

    def check_token(self, head):
        """Raises Unauthorized, or Forbidden, where the request lacks the bearer token it needs."""
        admin = head.method == "POST" and head.route in ("/pot/create", "/pot/raise")
        token = (self.settings.admintoken if admin else self.settings.token).encode()
        if token and hmac.compare_digest(token, head.token):
            return
        if head.origin:
            raise Forbidden("a request from a web page (it has an Origin) needs the bearer token")
        if token and head.action and head.route != "/healthz":
            need = "the bearer token is wrong" if head.token else "a bearer token is needed"
            raise Unauthorized(need)

    @staticmethod
    def no_action(head):
        if (head.route, "GET") not in ACTIONS:
            return NotFound(f"there is nothing at {shown(head.path)}")
        allowed = "GET, HEAD, POST" if (head.route, "POST") in ACTIONS else "GET, HEAD"
        return HttpError(405, f"{head.method[:20]} is not allowed here, but {allowed}",
                         f"Allow: {allowed}\r\n")

    def leave_to_worker(self, render, count=0, call=None):
        """Has a worker send render(value), a (status, body, header).

        A client that has sent more already may never read its answers: for that one this thread
        waits and sends; also while a rest of the last answer is unsent, which goes first.
        """
        pot = self.head.pot
        if self.buffer or self.unsent:
            self.reply(*render(self.wait_for(pot, count, call)))
        else:
            self.render = render
            self.job = job = Job(self.deliver, count, call, self.settings.timeout, self.gone)
            self.server.allocator.submit(pot, job)

    def wait_for(self, pot, count=0, call=None, retries=math.inf):
        """What the allocator answers to a Job; raises its IdpotError."""
        # A thread that waits for an answer is woken once; it cannot see its client close meanwhile.
        inbox = queue.SimpleQueue()
        self.job = job = Job(lambda *answer: inbox.put(answer), count, call,
                             self.settings.timeout, self.gone, retries)
        self.server.allocator.submit(pot, job)
        # The job expires sooner, unless memory was too short even for that: then queue.Empty.
        value, error = inbox.get(timeout=self.settings.timeout + LINGER)
        if error:
            raise error.with_traceback(None)    # others raise it too: each would make it longer
        return value

    def deliver(self, value, error):
        """Answers in a worker, or at a timeout: waits for no client."""
        answer = INTERNAL_ERROR     # where memory is short
        try:
            answer = error_answer(error) if error else self.render(value)
        finally:
            self.reply(*answer, send=self.send_at_once)

    def reply(self, status, body, header="", form=PLAIN, send=None):
        """Sends an answer, as slowly as the client reads, or by send; then the next one may go."""
        data = b""
        try:
            data = self.compose(status, body, header, form)
            (send or self.send_and_wait)(data)
        finally:
            if not data:        # no memory: the client is to see the end
                self.keep = False
            try:
                if not self.keep and not self.unsent:
                    self.request.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            self.limit = self.server.idle_patience if self.keep else LINGER
            if self.began:      # the next request's; begin() notes it before it sets the limit
                self.limit = self.server.request_patience
            self.job = None
            self.turn.release()

    def compose(self, status, body, header, form):
        """Notes the answer, so that who has it finds it counted, and returns it as one piece; the
        client's time begins anew."""
        head = self.head
        if not self.keep:
            header += "Connection: close\r\n"
        elif head.old:
            header += "Connection: keep-alive\r\n"
        beginning = answer_beginning(status, form, header)
        sent = b"" if head.method == "HEAD" else body
        self.since = now = time.monotonic()
        answer = (self.host, head, status, len(sent), self.start, now)
        self.server.access.add(answer)
        if status == 204:       # RFC 9110, 8.6
            return beginning + b"\r\n"
        return b"%sContent-Length: %d\r\n\r\n%s" % (beginning, len(body), sent)

    def send_at_once(self, data):
        """Sends what can be sent without waiting; the connection's thread is to send the rest."""
        with contextlib.suppress(OSError):      # the client has gone, as the thread will see
            try:
                sent = self.request.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                self.unsent = data[sent:]
                # Wakes the thread: what has come is still read, and then the end is seen.
                self.request.shutdown(socket.SHUT_RD)

    def send_and_wait(self, data):
        """Sends all, as slowly as the client reads."""
        data = self.unsent + data
        self.unsent = b""
        self.allow(self.settings.requesttimeout)
        self.sending = True
        try:
            self.request.sendall(data)
            self.since = time.monotonic()
        finally:
            self.sending = False

    # Limits, in the accepting thread

    def look(self, now):
        """Ends what takes too long: a wait for the database, for a client to read, or to send."""
        job = self.job
        if self.sending:
            # tcp(7), SIOCOUTQ: bytes of what was sent that the client has not acknowledged
            unread = fcntl.ioctl(self.request, termios.TIOCOUTQ, bytes(4))
            if unread != self.unread:
                self.unread = unread
                self.allow(self.settings.requesttimeout)
            elif now > self.since + self.limit:
                self.request.shutdown(socket.SHUT_RDWR)
        elif job:
            # At a stop there is a second for the answers to leave before the server's time is over.
            reserve = min(1, job.patience / 4) if self.server.stopping else 0
            if now > job.start + job.patience - reserve:
                job.expire()
        elif now > self.since + self.limit:
            self.end()

    def hurry(self):
        """At a stop there is only a moment for a request that is still on its way."""
        if not self.sending:
            passed = time.monotonic() - self.since if self.began else 0
            self.limit = min(self.limit, passed + HURRIED)

    def silent(self):
        """Whether it is the client's turn to send."""
        return not (self.turn.locked() or self.ended)

    def end(self):
        """Has the thread see the end of the client's input, behind what has arrived."""
        self.ended = True
        # Linux: what has arrived stays readable, and the end comes behind it (tcp(7)).
        self.request.shutdown(socket.SHUT_RD)

    def gone(self):
        """Whether the client has closed its side; it may still read."""
        try:
            # After end() the socket says so in any case.
            return not (self.ended or self.request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except OSError:
            return True

    # What each route does

    def fields(self, *known):
        """The fields of the query and of the form, each at most once, and none that is unknown."""
        head = self.head
        # Elsewhere than in a POST a body means nothing.
        body = self.body if head.method == "POST" else b""
        if not (body or head.query):
            return {}
        if body and head.form != FORM:
            form = shown(head.form.decode("latin-1"))
            raise HttpError(415, f"the body is {form}, not {FORM.decode()}")
        text = f"{head.query}&{body.decode('latin-1')}"
        try:
            pairs = urllib.parse.parse_qsl(
                text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            raise BadRequest("the form is not UTF-8, or has too many fields")
        fields = {}
        for name, value in pairs:
            if name not in known:
                here = f"here are {', '.join(known)}" if known else "there are none here"
                raise BadRequest(f"unknown field {shown(name)}: {here}")
            if name in fields:
                raise BadRequest(f"{shown(name)} is given twice")
            fields[name] = value
        return fields

    def take_ids(self):
        fields = self.fields("count", "range")
        if not fields:
            self.leave_to_worker(id_answer, 1)
        elif len(fields) == 2:
            raise BadRequest("count and range exclude each other")
        elif "range" in fields:
            count = whole_number(fields["range"], 1, MAX_RANGE, "range")
            self.leave_to_worker(functools.partial(range_answer, count), count)
        else:
            count = whole_number(fields["count"], 1, MAX_COUNT, "count")
            last = self.wait_for(self.head.pot, count)
            ids = range(last - count + 1, last + 1)
            self.reply(200, b"".join([b"%d\n" % one for one in ids]))

    def get_id(self):
        self.fields()
        self.leave_to_worker(id_answer, call=("current", self.head.pot))

    def get_pot(self):
        self.fields()
        self.wait_for(self.head.pot, call=("current", self.head.pot))
        self.reply(204, b"")

    def create_pot(self):
        pot, low = self.name_and_min("0")
        self.wait_for(pot, call=("create", pot, low))
        self.reply(201, b"Created new pot")

    def raise_pot(self):
        pot, low = self.name_and_min("")
        self.reply(*id_answer(self.wait_for(pot, call=("raise_to", pot, low))))

    def name_and_min(self, default):
        fields = {"name": "", "min": default, **self.fields("name", "min")}
        pot = fields["name"]
        if not POT_NAME.fullmatch(pot):
            raise BadRequest(f"name {shown(pot)} is not 1 to 60 characters of A-Z a-z 0-9 _ -")
        return pot, whole_number(fields["min"], 0, MAX_ID, "min")

    def get_pots(self):
        self.fields()
        rows = self.wait_for(ALL_POTS, call=("pots",))
        lines = [f"{pot}\t{value}\n" for pot, value in rows]
        self.reply(200, "".join(lines).encode())

    def get_health(self):
        """A probe is told soon, but the connection may have been lost while nobody used it."""
        self.fields()
        self.wait_for(HEALTH, call=("check", self.server.allocator.last_pot), retries=1)
        self.reply(200, b"ok")

    def get_metrics(self):
        self.fields()
        self.server.access.work_off()
        text = self.server.metrics.text(self.server.gauges())
        self.reply(200, text.encode(), form=PROMETHEUS)


ACTIONS = {     # (route, method) -> what does it; HEAD is GET
    ("/id/{pot}", "GET"): Handler.get_id,
    ("/id/{pot}", "POST"): Handler.take_ids,
    ("/pot/{pot}", "GET"): Handler.get_pot,
    ("/pot/create", "GET"): Handler.get_pot,
    ("/pot/create", "POST"): Handler.create_pot,
    ("/pot/raise", "GET"): Handler.get_pot,
    ("/pot/raise", "POST"): Handler.raise_pot,
    ("/pot", "GET"): Handler.get_pots,
    ("/healthz", "GET"): Handler.get_health,
    ("/metrics", "GET"): Handler.get_metrics,
}
ACTIONS.update({(route, "HEAD"): action
                for (route, method), action in ACTIONS.items() if method == "GET"})


class Server(http.server.ThreadingHTTPServer):
    """The HTTP server: accepts, keeps threads for connections, and bounds these."""
    SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

    def __init__(self, settings, listener, allocator, metrics, access):
        super().__init__(None, Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        if listener.family != socket.AF_UNIX:       # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.settings = settings
        self.allocator = allocator
        self.metrics = metrics
        self.access = access
        # Descriptor -> its Handler, None until its thread has made that. Not by socket: until then
        # the thread alone holds that, so one that dies for lack of memory closes it.
        self.connections = {}
        self.idle_patience = settings.idletimeout
        self.request_patience = settings.requesttimeout
        self.stopping = False
        self.looked = time.monotonic()              # when service_actions looked last
        self._accepted = queue.SimpleQueue()        # connections for the kept threads
        self._free = queue.SimpleQueue()            # an item for each kept thread that waits
        self._closed = threading.Event()            # a connection was closed

    def accept(self):
        """What the accepting thread does, until stop()."""
        # Inherited by the connections' threads: one that wakes, because its client has sent, does
        # not push aside the thread that runs and has the GIL (sched(7)).
        with contextlib.suppress(OSError):      # a service manager may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        while True:
            try:
                return self.serve_forever(LOOK)
            except Exception:       # MemoryError, say
                log_exception("the accepting thread")
                time.sleep(LOOK)
                if self.stopping:
                    return None

    def stop(self):
        """Stops accepting, after what waits in the backlog; requests read from now on are answered
        with a close."""
        self.stopping = True
        self.idle_patience = self.request_patience = HURRIED
        self.shutdown()
        end = time.monotonic() + HURRIED    # under load there would always be one more
        while time.monotonic() < end and select.select([self.socket], [], [], 0)[0]:
            self.handle_request()
        self.server_close()
        for handler in self.handlers():
            handler.hurry()

    def handlers(self):
        return [handler for handler in list(self.connections.values()) if handler]

    def gauges(self):
        """Series of /metrics that are looked up."""
        return {
            "idpot_connections": len(self.connections),
            "idpot_http_requests_in_flight": sum(one.turn.locked() for one in self.handlers()),
            "idpot_db_connections": self.allocator.connections(),
        }

    # Hooks of socketserver

    def get_request(self):
        """Accepts a connection; at a limit it makes room first, or the backlog waits: OSError."""
        if len(self.connections) >= self.settings.maxconnections:
            self._make_room()
            if len(self.connections) >= self.settings.maxconnections:
                # The accepting loop comes again at once: _make_room() has waited.
                raise OSError(errno.EMFILE, "all connections are in use")
        try:
            request, address = super().get_request()
        except OSError as error:
            if error.errno in self.SCARCE:
                self._make_room()
            raise
        self.connections[request.fileno()] = None
        return request, address

    def process_request(self, request, client_address):
        """Gives the connection to a thread that waits, or to a new one: that takes 0.1 ms more."""
        try:
            self._free.get_nowait()
            self._accepted.put((request, client_address))
        except queue.Empty:
            bytes(2 << 20)      # MemoryError here rather than in the new thread
            # threading.Thread would wait until it runs: of 1,000 busy clients that came together
            # the last was answered after 0.8 s, without that wait after 0.2 s.
            _thread.start_new_thread(self._serve_connections, (request, client_address))
        troubles.end("accepting")

    def _serve_connections(self, request, client_address):
        """What a thread for connections does: it serves one after another."""
        while True:
            try:
                self.process_request_thread(request, client_address)
            except (MemoryError, RuntimeError):
                pass
            self.close_request(request)     # again, where memory was short
            if self._free.qsize() >= KEPT_THREADS:
                return
            # The promise to take one item of _accepted.
            self._free.put(None)
            request, client_address = self._accepted.get()

    def shutdown_request(self, request):
        """Closes a connection. The stock one's SHUT_WR came with the last answer."""
        self.close_request(request)

    def close_request(self, request):
        self.connections.pop(request.fileno(), None)
        request.close()
        self._closed.set()

    def handle_error(self, request, client_address):
        """A connection could not be served, for lack of threads or memory, say."""
        with contextlib.suppress(MemoryError):      # the connection is to be closed in any case
            error = sys.exc_info()[1]
            troubles.begin("accepting", f"a connection could not be served: {error!r}")

    def service_actions(self):
        now = time.monotonic()
        if now < self.looked + LOOK:
            return
        self.looked = now
        answer_beginning.cache_clear()
        for descriptor, handler in list(self.connections.items()):
            try:
                if handler:
                    handler.look(now)
                elif not os.path.exists(f"/proc/self/fd/{descriptor}"):     # its thread died
                    self.connections.pop(descriptor, None)
            except (OSError, ValueError):       # its thread has just closed it
                pass

    def _make_room(self):
        """Ends the connection that has been silent longest, and waits until one is closed."""
        self._closed.clear()
        earliest = time.monotonic() - 0.1
        silent = [one for one in self.handlers() if one.since < earliest and one.silent()]
        if silent:
            with contextlib.suppress(OSError):
                min(silent, key=lambda handler: handler.since).end()
        self._closed.wait(0.05)


# ------------------------------------------------------------------------------------------ client

class Client:
    """A client of an idpot server at a URL, over one connection that is kept; for one thread.

    Its methods raise BadRequest, Unauthorized, Forbidden, NotFound, Exists, Exhausted or
    Unavailable as the server answers, IdpotError for any other status, WentBack where an ID is not
    greater than those before (after a restore without a raise, say), and OSError where the server
    cannot be reached or a timeout, in seconds, is over.
    """
    # By their status; a 409 to a create is Exists.
    ERRORS = {kind.status: kind for kind in (
        BadRequest, Unauthorized, Forbidden, NotFound, Exhausted, Unavailable)}

    def __init__(self, url, token=None, timeout=15):
        parts = urllib.parse.urlsplit(url)
        https = parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=timeout)
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._highest = {}      # pot -> greatest ID that was answered

    def create(self, pot, min=0):
        """Creates the pot; its first ID is min + 1. It is tried once: a repetition could find the
        pot that it has just made."""
        self._request("POST", "pot", "create", name=pot, min=min)

    def exists(self, pot):
        try:
            self._request("GET", "pot", pot)
            return True
        except NotFound:
            return False

    def current(self, pot):
        """Returns the ID that was given last, or min."""
        return int(self._request("GET", "id", pot))

    def next(self, pot):
        """Returns a new ID."""
        new = int(self._request("POST", "id", pot))
        return self._checked(pot, range(new, new + 1))[0]

    def next_many(self, pot, count):
        """Returns a range of count (1..10000) new IDs."""
        return self.next_range(pot, count, "count")

    def next_range(self, pot, count, field="range"):
        """Returns a range of count (1..2**32) new IDs."""
        answer = self._request("POST", "id", pot, **{field: count})
        first = int(answer.split(None, 1)[0])
        return self._checked(pot, range(first, first + count))

    def raise_to(self, pot, min):
        """Raises the counter to min unless it is higher; returns the counter."""
        return int(self._request("POST", "pot", "raise", name=pot, min=min))

    def _checked(self, pot, new):
        highest = self._highest.get(pot, -1)
        if new[0] <= highest:
            raise WentBack(f"pot {shown(pot)} gave {new[0]} after {highest}")
        self._highest[pot] = new[-1]
        return new

    def _request(self, method, *path, **fields):
        connection = self._connection
        creates = path == ("pot", "create")
        if connection.sock:
            poll = select.poll()        # select() fails on descriptors from 1024 up
            poll.register(connection.sock, select.POLLIN)
            if poll.poll(0):    # it was ended meanwhile, or has an answer that nobody asked for
                connection.close()
        # On a kept connection the server may have ended it while the request was on its way.
        kept = connection.sock is not None
        quoted = [urllib.parse.quote(part, safe="") for part in path]
        target = "/".join([self._prefix, *quoted])
        body = urllib.parse.urlencode(fields) if fields else None
        headers = {**self._headers, "Content-Type": FORM.decode()} if body else self._headers
        try:
            connection.request(method, target, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if kept and not creates and isinstance(error, ConnectionError):
                return self._request(method, *path, **fields)
            if isinstance(error, OSError):
                raise
            raise ConnectionError(f"half an answer: {error!r}") from error
        if answer.status >= 300:
            kind = self.ERRORS.get(answer.status, IdpotError)
            raise (Exists if creates and kind is Exhausted else kind)(text.strip())
        return text

    def close(self):
        self._connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# --------------------------------------------------------------------------------- service manager

@functools.cache
def notify_socket():
    """One for all states, made before the clients come: later no descriptor may be left."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def notify(state):
    """Tells systemd a state such as READY=1, as sd_notify(3) does, if it listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError):
            address = "\0" + path[1:] if path[0] == "@" else path
            notify_socket().sendto(state.encode(), address)


def inherited_listener():
    """The listening socket that systemd (LISTEN_FDS) or start_server left open, or None."""
    entries = os.environ.pop("SERVER_STARTER_PORT", "").split(";")
    # host:port=fd or path=fd
    descriptors = [int(entry.rpartition("=")[2]) for entry in entries if entry]
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        descriptors += range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if len(descriptors) > 1:
        raise StartError(f"{len(descriptors)} sockets were handed over, but one is served")
    if not descriptors:
        return None
    os.set_inheritable(descriptors[0], False)
    return socket.socket(fileno=descriptors[0])


def listen(host, port):
    """The inherited listening socket, or one on the address; raises StartError."""
    try:
        listener = inherited_listener()
        if not listener and not host and socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        elif not listener:
            family, _, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listener = socket.create_server(address, family=family, backlog=BACKLOG)
        listener.setblocking(False)     # another process may take a connection before this one
        return listener
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(f"cannot listen on {host}:{port}: {reason}")


# ------------------------------------------------------------------------------------ command line

STOPS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOPS, signal.SIGHUP)


def warn_of_exposure(settings, host):
    """Tells what others can reach or read."""
    local = host.startswith("127.") or host == "::1"
    if not (local or settings.token or settings.admintoken):
        log.warning("%s is not a loopback address and no Token is set: anybody who reaches it can "
                    "create, raise and use up pots", host)
    secret = settings.token or settings.admintoken or settings.dsn["password"]
    if settings.path and secret and os.stat(settings.path).st_mode & stat.S_IROTH:
        log.warning("%s holds secrets, and everybody can read it: chmod o-r", settings.path)


def serve(settings, metrics, lines, access):
    """Serves until a stop signal; raises StartError."""
    stores = settings.store.all(settings, metrics)
    description = stores[0].start()
    # A worker may meet the driver's timeouts, half of Timeout or the DSN's, at several addresses.
    limits = [settings.dsn.get(name, 0) for name in ("connection_timeout", "read_timeout")]
    allocator = Allocator(stores, metrics, stuck=3 * max(settings.timeout, *limits) + 10)
    listener = listen(*settings.listen)
    server = Server(settings, listener, allocator, metrics, access)
    try:
        allocator.start()
        threading.Thread(target=server.accept, daemon=True).start()
    except RuntimeError as error:       # the system has no more threads
        raise StartError(str(error))
    if listener.family == socket.AF_UNIX:
        where = f"unix:{listener.getsockname()}"
    else:
        host, port = listener.getsockname()[:2]
        warn_of_exposure(settings, host)
        name = f"[{host}]" if ":" in host else host
        where = f"http://{name}:{port}"
    log.info("listening on %s (%s)", where, description)
    log.handlers[0].flush()
    notify(f"READY=1\nSTATUS={description}")
    wait_for_stop(settings, lines, server)
    notify("STOPPING=1")
    server.stop()
    end = time.monotonic() + settings.timeout
    # Answers under way may need Timeout; closing the stores takes a second at most.
    second = None
    while server.connections and time.monotonic() < end and not second:
        second = signal.sigtimedwait(STOPS, 0.02)
        server.service_actions()
    if not second:      # that one stops at once
        allocator.stop()
    log.info("stopped")


def wait_for_stop(settings, lines, server):
    """Returns at a stop signal; reopens LogFile at SIGHUP, and feeds systemd's watchdog."""
    while True:
        number = getattr(signal.sigtimedwait(SIGNALS, 1.0), "si_signo", None)
        if number in STOPS:
            return
        try:
            if number == signal.SIGHUP:
                reload(settings, lines)
            # systemd must hear of a hang of the accepting thread and of workers, too.
            accepting = time.monotonic() < server.looked + 5
            if "WATCHDOG_USEC" in os.environ and accepting and server.allocator.alive():
                notify("WATCHDOG=1")
        except MemoryError:     # there may be some in a second
            pass


def reload(settings, lines):
    if settings.logfile:
        lines.target.reopen()
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    notify("READY=1")


def check(settings):
    """Tries what a start needs and writes nothing; returns what was found; raises StartError."""
    if settings.logfile:
        path = time.strftime(settings.logfile)
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise StartError(f"LogFile {shown(path)}: its folder is not there")
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise StartError(f"LogFile {shown(path)}: it cannot be written")
        if not os.path.exists(path) and not os.access(folder, os.W_OK):
            raise StartError(f"LogFile {shown(path)}: its folder cannot be written")
    return settings.store.all(settings, Metrics())[0].probe()


def run(arguments):
    """Does what the command line asks for; raises StartError."""
    settings = load_settings(arguments.config)
    settings.listen = arguments.listen or settings.listen
    if arguments.check:
        print(f"idpot: the settings are valid, {check(settings)}")
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):      # a service manager may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # the soft one is for select(2)
    # Before any thread is made: the main thread alone waits for signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.stack_size(512 * 1024)    # with 8 MB a limit of address space is soon reached
    # The GIL lets one thread run in any case; on one CPU it is free when a thread's turn comes, and
    # with SCHED_BATCH (see accept) each runs until it waits. wrk -c64, of 582e2c9's rate: 0.7 to
    # 0.9 with neither, 0.8 to 1.1 with SCHED_BATCH, 1.3 with both; beside endless loops on both
    # cores 1.3. idpots on neighbouring ports take different CPUs.
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):      # a service manager may forbid it
        os.sched_setaffinity(0, {cpus[settings.listen[1] % len(cpus)]})
    # Each thread that waits for the GIL wakes so often: of thousands, nobody would get on.
    sys.setswitchinterval(0.2)
    metrics = Metrics()
    events, lines, access = open_logs(settings, metrics)
    try:
        serve(settings, metrics, lines, access)
    finally:
        access.work_off()
        lines.flush()
        events.flush()


def main(argv=None):
    """Runs the command line; returns the exit code: 0 stopped, 1 cannot start, 78 wrong settings.

    Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="idpot", description="Serial 64-bit IDs over HTTP.")
    parser.add_argument("--config", metavar="FILE",
                        help="settings; without it SQLite in ./idpot.db")
    parser.add_argument("--listen", metavar="HOST:PORT", type=split_address,
                        help="address, in place of the file's")
    parser.add_argument("--check", action="store_true",
                        help="check the settings, reach the database, write nothing, and exit")
    parser.add_argument("--version", action="version", version=f"idpot {__version__}")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
        return 0
    except StartError as error:
        print(f"<3>{error}" if under_journald() else f"idpot: {error}", file=sys.stderr)
        return 1 if arguments.check else error.exit_code
    except KeyboardInterrupt:       # before it serves; later the signal is waited for
        print("idpot: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
