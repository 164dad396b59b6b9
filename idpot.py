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

import argparse
import bisect
import collections
import configparser
import functools
import hmac
import http.client
import http.server
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
import types
from contextlib import AbstractContextManager, suppress
from time import monotonic
from typing import Callable, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

__version__ = "3.0.0"

MAX_ID = 2**64 - 1
MAX_COUNT = 10000
MAX_RANGE = 2**32
POT_NAME = re.compile("[A-Za-z0-9_-]{1,60}")    # the table is pot_ + name; MySQL allows 64

log = logging.getLogger("idpot")
access = logging.getLogger("idpot.access")


# ------------------------------------------------------------------------------------------ errors

class IdpotError(Exception):
    """An answer other than success, with `status`; str() is its one line. Where it ends the start,
    stderr gets `detail`, which may tell more, and the process ends with `exit_code`."""
    status = 500
    header = ""     # a header line that belongs to the status
    exit_code = 1

    def __init__(self, text, **own):
        super().__init__(text)
        self.detail = text      # the log's words for it
        vars(self).update(own)


class BadRequest(IdpotError):
    """The request, or a value in it, is malformed."""
    status = 400


class Unauthorized(IdpotError):
    """The bearer token is missing or wrong (RFC 6750); 403 where a web page asks."""
    status = 401
    header = "WWW-Authenticate: Bearer\r\n"


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


class SettingsError(IdpotError, argparse.ArgumentTypeError):
    """A setting is wrong, so that starting again cannot help; for an option, wrong usage."""
    exit_code = 78      # EX_CONFIG of sysexits.h


# ---------------------------------------------------------------------------------------- settings

def shown(value):
    """The text or bytes in double quotes, cut and escaped, fit for a line of an answer or a log."""
    text = ascii(value[:100]).removeprefix("b")[1:-1].replace('"', r'\"')
    if len(value) > 100:
        text += "..."
    return f'"{text}"'


def whole_number(text, low, high, name=""):
    """The number that the text is in plain digits; raises BadRequest if it is not in low..high."""
    if re.fullmatch("[0-9]{1,20}", text) and low <= int(text) <= high:
        return int(text)
    what = f"{name} {shown(text)}".strip()
    raise BadRequest(f"{what} is not a whole number from {low} to {high}")


def split_address(text, default_port=None):
    """(host, port) of host:port, [IPv6]:port or :port; the host is empty for all addresses."""
    match = re.fullmatch(r"(?:\[([^]]*)\]|([^:\[\]]*))(?::([0-9]{1,5}))?", text)
    port = match and (match[3] or text and default_port)
    if not port or int(port) > 65535:
        raise SettingsError(f"{shown(text)} is not host:port, such as 127.0.0.1:8080 or :8080")
    return match[1] or match[2] or "", int(port)


def parse_seconds(text):
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?|\.[0-9]+", text) and 0 < float(text) <= 86400:
        return float(text)
    raise SettingsError(f"{shown(text)} is not a number of seconds above 0, at most 86400")


DSN = re.compile(
    r"(?:(?P<user>[^:]*)(?::(?P<password>.*))?@)?"      # up to the last @ before an address
    r"(?P<net>tcp[46]?|unix)?(?:\((?P<inside>.*)\))?"
    r"/(?P<database>[^/?]+)(?:\?(?P<parameters>[^/]*))?", re.DOTALL)


def parse_dsn(text):
    """What a DSN of go-sql-driver/mysql says; `addresses`: each as the log names it -> arguments of
    mysql.connector.connect; `ignored`: names. An error shows nothing that may be a password."""
    match = DSN.fullmatch(text)
    if not match:
        raise SettingsError("it is not of the form user:password@tcp(host:port)/dbname, or with "
                            "unix(/path) for tcp(...)")
    parts = match.groupdict("")
    if parts["net"] == "unix":
        path = parts["inside"] or "/tmp/mysql.sock"
        addresses = {path: {"unix_socket": path}}
    else:
        addresses = {}
        for one in (parts["inside"] or "127.0.0.1").split(","):
            host, port = split_address(one.strip(), 3306)
            addresses[f"{host}:{port}"] = {"host": host or "127.0.0.1", "port": port}
    values = dict(parse_qsl(parts["parameters"], keep_blank_values=True))
    tls = values.pop("tls", "preferred").lower()
    tls = {"1": "true", "0": "false"}.get(tls, tls)
    if tls not in ("true", "false", "skip-verify", "preferred"):
        raise SettingsError(f"tls={shown(tls)} is not true, false, skip-verify or preferred")
    return {
        "user": parts["user"],
        "password": parts["password"],
        "database": unquote(parts["database"]),
        "addresses": addresses,
        "tls": tls,
        "ignored": ", ".join(values),
    }


def parse_token(text):
    # Refuses what no header can carry, and single quotes, which are no quotes here.
    if not text or re.search(r"^[\s']|[\s']\Z", text):
        raise SettingsError("it is empty, or begins or ends with a space or a single quote: double "
                            "quotes are for tokens")
    return text


LISTEN = ("127.0.0.1", 8080)
SETTINGS = {    # section -> name in lower case -> (default, what makes the value of a text)
    "Server": {
        "listen": (LISTEN, split_address),
        "logfile": ("", str),               # strftime pattern; empty: stderr
        "loglinkname": ("", str),           # symlink to the newest log file
        "token": ("", parse_token),         # bearer token asked for all but /healthz
        "admintoken": ("", parse_token),    # asked for create and raise; empty: Token is
        "timeout": (10.0, parse_seconds),           # for the database, then 503
        "requesttimeout": (10.0, parse_seconds),    # for a whole request to arrive, then 408
        "idletimeout": (60.0, parse_seconds),       # without a request, then the client is closed
        "maxconnections": (1024, functools.partial(whole_number, low=1, high=1000000)),
    },
    "Mysql": {
        "connectstring": (None, parse_dsn),
        "hostname": ("127.0.0.1", str),
        "port": (3306, functools.partial(whole_number, low=1, high=65535)),
        "username": ("root", str),
        "password": ("", str),
        "dbname": ("idpot", str),
        "engine": ("MyISAM", str),          # go-idpot's default
        "connections": (8, functools.partial(whole_number, low=1, high=64)),
    },
    "Sqlite": {"file": ("idpot.db", str)},
}
SECTION = re.compile(r"\[\s*(?P<header>[^]\s][^]]*?)\s*\]\s*(?:[;#].*)?$")
VALUE = re.compile(r'''((?:"(?:[^"\\\0]|\\["\\nt])*"|[^"\\\0;#])*)(?:[;#].*)?''')
ESCAPED = {'"': "", r"\"": '"', r"\\": "\\", r"\n": "\n", r"\t": "\t"}


def read_settings(path):
    """The stock reader over a file in the format of gcfg, which go-idpot used; and of each name in
    it, in lower case, the (line number, name as it is spelled)."""
    reader = configparser.RawConfigParser(
        delimiters="=", comment_prefixes=(";", "#"), default_section="")
    reader.SECTCRE = SECTION
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]     # an indented one would continue another
        reader.read_file([line.title() if line.startswith("[") else line for line in lines], path)
    except OSError as error:
        raise SettingsError(f"{path or shown(path)}: {error.strerror}")
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: it is not UTF-8")
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        raise SettingsError(f"{path}:{error.lineno}: this is there twice")
    except configparser.ParsingError as error:      # its own text could show a password
        line = getattr(error, "lineno", 0) or error.errors[0][0]
        raise SettingsError(f"{path}:{line}: this is neither [section] nor name = value")
    names = [line.partition("=")[0].strip() for line in lines]
    return reader, {name.lower(): (number, name) for number, name in enumerate(names, 1)}


def load_settings(path=None):
    """The settings of the file, or the defaults; `dsn`; `mysql`, whether the pots are there. An
    empty value means the default, but not of a token: without one the server is open."""
    reader, places = read_settings(os.devnull if path is None else path)
    folder = os.environ.get("CREDENTIALS_DIRECTORY") or "\0"    # systemd's copy; \0 is in no path
    path = (path or "").replace(folder, "/etc")
    values = {name: row[0] for rows in SETTINGS.values() for name, row in rows.items()}
    settings = types.SimpleNamespace(**values, mysql="Mysql" in reader)
    for section in reader.sections():
        if section not in SETTINGS:
            raise SettingsError(f"{path}: unknown section [{section}]")
        for name, text in reader.items(section):
            number, spelled = places[name]
            if name not in SETTINGS[section]:   # what has more than letters may be a password
                spelled = shown(spelled) if re.fullmatch("[A-Za-z_-]+", name) else "(not shown)"
                raise SettingsError(f"{path}:{number}: unknown name {spelled} in [{section}]")
            _, convert = SETTINGS[section][name]
            try:
                match = VALUE.fullmatch(text)
                if not match:
                    raise SettingsError('a double quote is not closed, or a backslash is not one '
                                        'of \\" \\\\ \\n \\t within double quotes')
                value = re.sub(r'\\.|"', lambda part: ESCAPED[part[0]], match[1].strip())
                if value or convert is parse_token:
                    setattr(settings, name, convert(value))
            except IdpotError as error:
                hint = ""
                if re.search("[;#]", text):
                    hint = ": what has a ; or # in it wants double quotes"
                raise SettingsError(f"{path}:{number}: [{section}] {spelled}: {error}{hint}")
    if settings.mysql and "Sqlite" in reader:
        raise SettingsError(f"{path}: [Mysql] and [Sqlite] are both given: keep one")
    host, port = settings.hostname, settings.port
    settings.dsn = settings.connectstring or {
        "user": settings.username,
        "password": settings.password,
        "database": settings.dbname,
        "addresses": {f"{host}:{port}": {"host": host, "port": port}},
        "tls": "preferred", "ignored": "",
    }
    settings.admintoken = settings.admintoken or settings.token
    return settings


# ----------------------------------------------------------------------------------------- metrics

METRICS = {     # name, with which no other begins -> (type, help)
    "idpot_http_requests_total": ("counter", "Requests answered."),
    "idpot_http_request_duration_seconds": ("histogram", "From a request's arrival to its answer."),
    "idpot_http_requests_in_flight": ("gauge", "Requests that are read, served or answered now."),
    "idpot_connections": ("gauge", "Open HTTP connections."),
    "idpot_ids_issued_total": ("counter", "IDs taken from pots."),
    "idpot_db_statements_total": ("counter", "Statements that took IDs, for all who waited."),
    "idpot_db_seconds_total": ("counter", "Time in the database, summed over connections."),
    "idpot_db_errors_total": ("counter", "Errors of the database."),
    "idpot_db_retries_total": ("counter", "Requests that waited for a further try, at each."),
    "idpot_db_connections": ("gauge", "Open connections to the database."),
    "idpot_log_lines_lost_total": ("counter", "Lines of the logs that were lost."),
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
    "idpot_db_retries_total", "idpot_log_lines_lost_total")


class Metrics:
    """What /metrics tells, counted since the start."""

    def __init__(self):
        self._lock = threading.Lock()       # guards the counters; no other is taken under it
        self._counters = collections.Counter(dict.fromkeys(COUNTED, 0))     # by series
        self._start = time.time()
        self.add_answers([])        # the histogram begins with zeros

    def add(self, series, amount=1):
        with self._lock:
            self._counters[series] += amount

    def add_answers(self, answers):
        """Counts answers, each (host, head, status, bytes sent, seconds)."""
        found = collections.Counter([
            f'idpot_http_requests_total{{{head.labels},code="{status}"}}'
            for _, head, status, _, _ in answers])
        times = sorted([answer[-1] for answer in answers])
        for series, limit in BUCKETS.items():
            found[series] = bisect.bisect_right(times, limit)
        found[f"{HISTOGRAM}_sum"] = sum(times)
        found[f"{HISTOGRAM}_count"] = len(times)
        with self._lock:
            self._counters.update(found)

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
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{one} {value}" for one, value in series.items() if one.startswith(name)]
        return "\n".join(lines) + "\n"


metrics = Metrics()


# -------------------------------------------------------------------------------------------- logs
# Two loggers of the standard library: `log` for events, on stderr, and `access`, whose lines go to
# LogFile, or to stderr as well. Each log has a queue in front, and a thread that writes: so neither
# IDs nor a stop wait for a full pipe or a hung disk.

class Troubles:
    """What is wrong now: a trouble is logged when it begins and when it ends, not at each request.
    What comes back soon, as conflicts in a cluster do, is told only if it lasts."""
    QUIET = 30.0        # seconds after a line in which no other trouble of the subject is told

    def __init__(self):
        self._lock = threading.Lock()   # guards both, but for end(), which is atomic
        self._told = {}                 # subjects of troubles that last -> True
        self._quiet = {}                # subject -> until when nothing is told of it

    def begin(self, subject, text, level=logging.WARNING):
        with self._lock:
            now = monotonic()
            if subject in self._told or now < self._quiet.get(subject, now):
                return
            self._told[subject] = True
            self._quiet[subject] = now + self.QUIET
        if not text.startswith(subject):
            text = f"{subject}: {text}"
        log.log(level, text)

    def end(self, subject):
        if self._told.pop(subject, False):
            log.info("%s is well again", subject)


troubles = Troubles()


class StrftimeFileHandler(logging.Handler):
    """Appends to the file that a strftime pattern names now, with a symlink to the newest. The file
    is opened for each record, which is many lines: one that was moved away is made anew."""

    def __init__(self, pattern, link):
        super().__init__()
        self.pattern = pattern
        self.link = link
        self.append("")     # raises OSError where it cannot be written

    def append(self, text):
        path = time.strftime(self.pattern)
        # A FIFO without a reader is an error, and not a wait.
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
            self.point_link(path)

    def point_link(self, path):
        """Points the link to the file, atomically: it never misses."""
        target = os.path.realpath(path)
        if os.path.exists(self.link) and not os.path.islink(self.link):
            raise FileExistsError(f"{self.link} is there and is not a symlink")
        if os.path.realpath(self.link) == target:
            return
        new = f"{self.link}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(new)      # a crash may have left it
        folder = os.path.realpath(os.path.dirname(self.link))
        os.symlink(os.path.relpath(target, folder), new)
        os.replace(new, self.link)

    def emit(self, record):
        try:
            self.append(record.getMessage() + "\n")
            troubles.end("the access log")
        except OSError as error:
            troubles.begin("the access log", f"the access log cannot be written: {error}",
                           logging.ERROR)


def under_journald():
    """Whether stderr is journald's, and not only a parent's was (systemd.exec(5))."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class StderrFormatter(logging.Formatter):
    """Events with their time, access lines as they are; priorities for journald (sd-daemon(3))."""
    PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}

    def format(self, record):
        text = record.getMessage()
        if under_journald():
            priority = self.PRIORITIES[record.levelno]
            return priority + text.replace("\n", "\n" + priority)
        if record.name == access.name:
            return text
        return super().format(record)


class LogQueueHandler(logging.handlers.QueueHandler):
    """Hands records to the log's thread. A record is lost, and counted, if more than 16 MB would
    wait, where each one counts as much as this one, 16 KB at least."""

    def enqueue(self, record):
        if self.queue.qsize() * max(len(record.msg), 16384) < 16 << 20:
            self.queue.put(record)
        else:
            metrics.add("idpot_log_lines_lost_total", record.msg.count("\n") + 1)


def start_log(logger, handler):
    waiting = queue.Queue()
    logging.handlers.QueueListener(waiting, handler).start()
    logger.handlers = [LogQueueHandler(waiting)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def drain_logs():
    """Waits until all is written, for half a second at most."""
    deadline = monotonic() + 0.5
    for handler in access.handlers + log.handlers:
        while handler.queue.unfinished_tasks and monotonic() < deadline:
            time.sleep(0.005)


ESCAPES = {byte: f"\\x{byte:02x}" for byte in range(256) if not 32 <= byte < 127}
ESCAPES.update({ord('"'): r'\"', ord("\\"): r"\\"})


def escaped(data):
    """The bytes as text between the quotes of an access line, escaped as Apache does it."""
    return data.decode("latin-1").translate(ESCAPES)


# ------------------------------------------------------------------------------------------ stores

class Store:
    """The contract: pots in a database. A store is used by one thread.

    all(settings)   a store for each worker
    start()         is called on one of them, before the first use; returns a phrase for the log
    probe()         tries the database for --check, and writes nothing; returns a phrase, too
    connect()       sees to a connection to a server that can issue IDs, as far as it is known
    take(wants, hasty)  for each (pot, count, floor) the last of `count` new IDs. All are above
                    floor, the highest number that any answer has shown. One trouble fails all,
                    though counters may have moved; the caller then takes each by itself. hasty:
                    a locked pot is an error at once, if the database can do that
    current(pot)    the counter; it raises Broken where the table could repeat IDs
    create(pot, low)    makes it, and returns the counter, from which its IDs go on
    raise_to(pot, low)  the counter then, which never falls
    pots()          (pot, counter) of each, "-" for the counter of one that cannot be read
    check(pot)      raises Unavailable unless an ID could be issued now, from the pot, if not ""
    close()         ends the connection

    They raise NotFound, Exists, Exhausted. Retry: the worker tries again. Unavailable: the client
    may. Broken: somebody must mend the pot. Refused: somebody must mend the database."""
    subject = ""            # the database, as the log names it
    connection = None       # the driver's, while there is one


class SqliteStore(Store):
    """One SQLite file that this process locks; WAL with synchronous=FULL survives a power cut.

    Nobody else can write: so the counters are read once, at the start, and kept. SQLite's integers
    are signed: an ID from 2**63 up is stored as ID - 2**64."""
    # The empty transaction takes the lock that EXCLUSIVE keeps: a second process is refused.
    START = """
        PRAGMA locking_mode=EXCLUSIVE;
        PRAGMA journal_mode=WAL;
        PRAGMA synchronous=FULL;
        CREATE TABLE IF NOT EXISTS pot (name TEXT PRIMARY KEY, id INTEGER NOT NULL);
        BEGIN IMMEDIATE;
        COMMIT
        """
    SET = "INSERT INTO pot (id, name) VALUES {} ON CONFLICT (name) DO UPDATE SET id = excluded.id"

    @classmethod
    def all(cls, settings):
        return [cls(settings)]

    def __init__(self, settings):
        import sqlite3      # only where it is used: 1 MB
        self._sqlite = sqlite3
        self._path = settings.file
        self.subject = f"SQLite {settings.file}"
        self._counters = {}

    def start(self):
        try:
            self.connection = self._sqlite.connect(
                self._path, timeout=0, isolation_level=None, check_same_thread=False)
            self.connection.executescript(self.START)
            [(mode,)] = self.connection.execute("PRAGMA journal_mode")
            self._file = os.stat(self._path)
            self._counters = dict(self.connection.execute("SELECT name, id FROM pot"))
        except (self._sqlite.Error, OSError) as error:
            reason = "another process uses it" if "locked" in str(error) else error
            raise IdpotError(f"SQLite file {shown(self._path)}: {reason}")
        if mode != "wal":
            raise IdpotError(f"SQLite file {shown(self._path)} does not take the WAL journal")
        for pot, value in self._counters.items():
            if (type(pot), type(value)) != (str, int):      # a name may be NULL
                raise IdpotError(
                    f"SQLite file {shown(self._path)}: pot {pot!a} holds no whole number")
            self._counters[pot] = value % 2**64
        return self.subject

    def probe(self):
        path = self._path
        if not os.path.exists(path):
            path = os.path.dirname(path) or "."
        if not os.access(path, os.W_OK):        # SQLite itself would write
            raise IdpotError(f"SQLite file {shown(self._path)} cannot be written")
        return f"{self.subject} can be written"

    def connect(self):
        """Nothing to do: the file is open from start() on."""

    def _check_file(self):
        """Raises Refused where the path no longer names the file that is open and locked."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self._path), self._file):
                return
        raise Refused(f"{self.subject} was moved, removed or replaced: restart idpot")

    def _write(self, counters, statement=SET):
        """Writes the counters of pots, {pot: value}; one statement is one transaction."""
        start = monotonic()
        rows = ", ".join(["(?, ?)"] * len(counters))
        values = []
        for pot, value in counters.items():
            values += [value - 2**64 if value >> 63 else value, pot]
        try:
            self.connection.execute(statement.format(rows), values)
        except self._sqlite.Error as error:
            metrics.add('idpot_db_errors_total{errno="other"}')
            raise Unavailable(f"{self.subject}: {error}")
        finally:
            metrics.add("idpot_db_seconds_total", monotonic() - start)
        self._check_file()      # if it was replaced before, another idpot may count in the new one
        self._counters.update(counters)

    def take(self, wants, hasty=False):
        lasts = {}
        for pot, count, floor in wants:
            lasts[pot] = max(self.current(pot), floor) + count
            if lasts[pot] > MAX_ID:
                raise Exhausted(f'pot "{pot}" is exhausted: fewer than {count} IDs are left')
        self._write(lasts)
        return list(lasts.values())

    def current(self, pot):
        self._check_file()
        if pot not in self._counters:
            raise NotFound(f'there is no pot "{pot}"')
        return self._counters[pot]

    def create(self, pot, low):
        if pot in self._counters:
            raise Exists(f'pot "{pot}" exists')
        self._write({pot: low})
        return low

    def raise_to(self, pot, low):
        value = max(self.current(pot), low)
        self._write({pot: value})
        return value

    def pots(self):
        self._check_file()
        return sorted(self._counters.items())

    def check(self, pot):
        self._write({}, "PRAGMA user_version = 1")  # a write: on a full disk a transaction begins

    def close(self):
        self.connection.close()    # folds the journal into the file


CANNOT = "the database cannot serve this now"
# Errors that last: rights and names that somebody must mend, which only a new connection sees.
LASTING = {1044, 1045, 1049, 1142, 1143, 1227, 1698, 1862, 2061, 3118, 4151}
ONE_POT = {     # errors of one pot, after which the connection stays sound
    1054: (Broken, 'the table of pot "{}" has no column id'),
    1062: (Exists, 'pot "{}" exists'),
    1146: (NotFound, 'there is no pot "{}"'),
    1205: (Retry, CANNOT + ': the table of pot "{}" is locked (error {})'),
    3098: (Broken, 'the table of pot "{}" is refused by its replication group, which wants InnoDB '
                   "and a primary key (error {})"),
    **dict.fromkeys(
        (1286, 1665, 3161, 3750),
        (Broken, 'the database does not let pot "{}" be made or written (error {})')),
    **dict.fromkeys(        # the ceiling of a column, of BIGINT, of a CHECK
        (1264, 1292, 1690, 3819, 4025),
        (Exhausted, 'pot "{}" is exhausted: its table holds no greater number')),
}
# For accounts that read_only does not bind; as text: from MariaDB 12 on it is an enumeration. Left
# out with binlog_format=STATEMENT, where the server would warn of each statement that has it.
WRITABLE = " WHERE CAST(@@global.read_only AS CHAR) IN ('0', 'OFF')"
# The session's own values: a Galera session that began while wsrep_on was OFF stays so.
STATE = ("SHOW VARIABLES WHERE Variable_name LIKE '%read\\_only' OR Variable_name IN "
         "('wsrep_on', 'binlog_format', 'group_replication_group_name')")
GALERA = "SHOW GLOBAL STATUS WHERE Variable_name = 'wsrep_ready'"
GROUP = ("SELECT MAX(IF(member_id = @@server_uuid, "
         "CONCAT_WS(' ', member_state, NULLIF(member_role, '')), '')), "
         "SUM(member_state = 'UNREACHABLE'), COUNT(*) "
         "FROM performance_schema.replication_group_members")
# A lock of the table, or of its row, is waited for one second: that bounds what a locked pot costs
# those that share its call. The rest does not leave the promise to the server's defaults.
SESSION = ("SET SESSION autocommit=1, completion_type=0, lock_wait_timeout=1, "
           f"innodb_lock_wait_timeout=1, sql_safe_updates=0, sql_select_limit={MAX_ID}, "
           "sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'")
REPLY = 3               # seconds to connect or for a reply: more than two locks, see SESSION
# In MariaDB the statement waits for no lock; to MySQL this is a comment.
HASTY = "/*M!100300 SET STATEMENT lock_wait_timeout=0, innodb_lock_wait_timeout=0 FOR */ "
BELIEVED = 1.0          # seconds for which a server is taken to be as it was seen
UNUSED = 60.0           # seconds after which a connection is made anew: a firewall may forget it


def execute_all(connection, statements):
    """What the driver tells of each, none of which is a query; they go in one call."""
    text = "; ".join(statements)
    if not hasattr(connection, "fetch_eof_status"):     # which only the driver's C form has
        return list(connection.cmd_query_iter(text))
    told = [connection.cmd_query(text)]
    while connection.more_results:
        connection.next_result()
        told.append(connection.fetch_eof_status())
    return told


class MysqlConnection(Store):
    """A store's connection to MySQL or MariaDB, made anew after any trouble but one pot's own.
    All connections use the same address: whose turn it is, until it cannot issue IDs or does not
    answer in time; then the next one has its turn. A server that comes back is not used before all
    behind it have failed: it may count for itself."""

    @classmethod
    def all(cls, settings):
        try:
            import mysql.connector      # only where it is configured
        except ImportError:
            folder = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
            raise IdpotError("[Mysql] needs mysql-connector-python: python3 -m pip install "
                             f"--target={folder} 'mysql-connector-python>=9.2'")
        # Shared without a lock: what one worker sets is a whole value, or what others would set.
        shared = types.SimpleNamespace(
            driver=mysql.connector,
            turn=0,         # counts on; the address of a turn is turn % the number of addresses
            cluster="",     # what the servers are members of, once one of them told
            engines={})     # pot -> its engine, once it was looked at
        return [cls(settings, shared) for _ in range(settings.connections)]

    def __init__(self, settings, shared):
        dsn = self._dsn = settings.dsn
        self._shared = shared
        self._engine = settings.engine
        self._addresses = list(dsn["addresses"].items())
        self._turn = 0          # in which the connection was made
        self._seen = 0.0        # when the server was seen to be able to issue IDs
        self._writable = ""     # WRITABLE, where statements may ask that
        self.subject = f"MySQL {','.join(dsn['addresses'])}"
        self._arguments = {
            "user": dsn["user"],
            "password": dsn["password"],
            "database": dsn["database"],
            "connection_timeout": REPLY,
            "read_timeout": REPLY,
            "write_timeout": REPLY,
            "collation": "utf8mb4_general_ci",      # older MariaDB lacks the driver's own
            "ssl_disabled": dsn["tls"] == "false",
            "client_flags": [shared.driver.ClientFlag.FOUND_ROWS],
        }
        if dsn["tls"] == "true":
            paths = ssl.get_default_verify_paths()
            self._arguments.update(ssl_verify_cert=True, ssl_verify_identity=True,
                                   ssl_ca=paths.cafile or paths.openssl_cafile)

    def start(self):
        try:
            self.probe()
        except Retry as error:      # it may come later
            troubles.begin(self.subject, f"{error.detail}: waiting for it; requests are answered "
                                         "503 until then")
        return f"{self.subject}/{self._dsn['database']}, {self._engine}"

    def probe(self):
        self.connect()
        if self._dsn["ignored"]:
            log.warning("ConnectString: these parameters are ignored: %s", self._dsn["ignored"])
        if self._engine.lower() not in ("innodb", "aria", "rocksdb"):
            log.warning("Engine %s does not survive a power cut: IDs of the last half minute may "
                        "come again; InnoDB loses none", self._engine)
        return f"{self.subject} is reached"

    def connect(self, believed=BELIEVED):
        """Sees to a connection to a server that was seen to be able to issue IDs at most `believed`
        seconds ago; with 0 it is asked now. Raises Retry if one may help later, else Refused, with
        the trouble of each address, from that on whose turn it is."""
        now = monotonic()
        if self._turn != self._shared.turn or now > self._seen + UNUSED:
            self.close()
        if self.connection and now > self._seen + believed:
            with suppress(Retry):       # it was lost: then another one
                self._call(self._examine)
        found = {}
        while not self.connection:
            self._turn = self._shared.turn
            address, arguments = self._addresses[self._turn % len(self._addresses)]
            try:
                self._call(self._log_in, arguments)
            except Unavailable as error:
                found[address] = error
                if len(self._addresses) > 1:        # with one, others may be connected to it
                    self._shared.turn = max(self._shared.turn, self._turn + 1)
            if len(found) == len(self._addresses):
                told = "; ".join([f"{name}: {error.detail}" for name, error in found.items()])
                kinds = {type(error) for error in found.values()}
                kind = Refused if kinds == {Refused} else Retry
                raise kind(str(next(iter(found.values()))), detail=f"MySQL {told}")

    def _call(self, function, *arguments, pot=""):
        """What function(*arguments) returns, which talks to the server; pot: if it is of one alone.
        The driver's errors become ours, and all but those of one pot end the connection: after any
        surprise a reply could be that of another statement."""
        start = monotonic()
        try:
            return function(*arguments)
        except IdpotError:      # from _log_in() or _examine(): this server is of no use
            self.close()
            raise
        except Exception as error:      # the driver's, and what it makes of bytes that are no MySQL
            number = getattr(error, "errno", None) or 2027      # "malformed packet"
            metrics.add(f'idpot_db_errors_total{{errno="{number}"}}')
            if pot and number in ONE_POT:
                kind, text = ONE_POT[number]
                raise kind(text.format(pot, number))
            self.close()
            # Numbers of the driver; 3024 is its read_timeout. Others are the server's answers.
            silent = 2000 <= number < 3000 or number == 3024
            if silent and monotonic() > start + 0.9 * REPLY:
                self._shared.turn = max(self._shared.turn, self._turn + 1)
            detail = (str(error) or repr(error)).translate(ESCAPES)
            # What the two forms of the driver say to caching_sha2_password without TLS.
            if number == (2061 if self._shared.driver.HAVE_CEXT else 1045):
                detail += "; it may need TLS on the server, or its socket: unix(/path)"
            # 2026 without one of these words: the server died while TLS was agreed on.
            untrusted = number == 2026 and re.search("certificate|support", detail)
            kind = Refused if untrusted or number in LASTING else Retry
            raise kind(f"{CANNOT} (error {number})", detail=detail)
        finally:
            metrics.add("idpot_db_seconds_total", monotonic() - start)

    def _log_in(self, arguments):
        # Not with autocommit=True: only where the session sets it from 0, the driver's default, to
        # 1, it also commits what the server's init_connect may have begun.
        self.connection = self._shared.driver.connect(**self._arguments, **arguments)
        self._execute(SESSION)
        if self._dsn["tls"] == "skip-verify":
            if not self._execute("SHOW STATUS LIKE 'Ssl_cipher'")[0][1]:
                raise Retry(f"{CANNOT}: its server offers no TLS")
        self._examine()
        engines = self._execute("SELECT LOWER(engine) FROM information_schema.engines "
                                "WHERE support IN ('YES', 'DEFAULT')")
        if (self._engine.lower(),) not in engines:
            raise Refused(f'Engine: the server has no storage engine "{self._engine}"')

    def _execute(self, statement):
        """The rows of a query, or what the driver tells of another statement."""
        done = self.connection.cmd_query(statement)    # a cursor would ping the server first
        return self.connection.get_rows()[0] if "columns" in done else done

    def _examine(self):
        """Raises Retry where the server cannot issue IDs now, Refused where it cannot at all."""
        now = monotonic()
        state = dict(self._execute(STATE))
        # A member that is started without the plugin, or with wsrep_on=OFF, looks like a server
        # that was never in a cluster, and would count for itself.
        cluster = "the Galera cluster" if state.get("wsrep_on") == "ON" else ""
        group = state.get("group_replication_group_name")
        if group:
            cluster = f"the replication group {group}"
        self._shared.cluster = self._shared.cluster or cluster
        if cluster != self._shared.cluster:
            raise Retry(f"{CANNOT}: its server is not in {self._shared.cluster}")
        if group:       # a server outside its group, or cut off, stays writable
            [[own, unreachable, members]] = self._execute(GROUP)
            if own != "ONLINE PRIMARY":
                raise Retry(f"{CANNOT}: its server is {own or 'no member'} in the replication "
                            "group")
            # Its own word for it comes 5 to 6 seconds late; until then a statement would hang.
            if 2 * unreachable >= members:
                raise Retry(f"{CANNOT}: the replication group has lost its majority")
        elif "wsrep_on" in state:
            ready = self._execute(GALERA) == [("wsrep_ready", "ON")]
            if ready != bool(cluster):      # one of node and session replicates, the other not
                raise Retry(f"{CANNOT}: the Galera node is not ready (error 1047), or its wsrep_on "
                            "is OFF")
        if {value for name, value in state.items() if name.endswith("read_only")} - {"OFF", "0"}:
            raise Retry(f"{CANNOT}: it is read-only (error 1290)")
        self._writable = "" if state.get("binlog_format") == "STATEMENT" else WRITABLE
        if cluster and self._engine.lower() != "innodb":    # each node would count for itself
            raise Refused(f"Engine: {cluster} replicates InnoDB only, not {self._engine}")
        self._seen = now

    def close(self):
        connection, self.connection = self.connection, None
        if connection:
            with suppress(Exception):       # it may be lost already
                connection.close()


class MysqlStore(MysqlConnection):
    """Pots in MySQL or MariaDB: each is a table `pot_NAME (id BIGINT UNSIGNED NOT NULL)` with one
    row, as go-idpot's. InnoDB's has a key `one`, which never changes: updating a key leaves dead
    records, which slow later updates while anybody holds a read view. And two nodes of a cluster
    cannot both make the row."""

    def _run(self, statement, pot=""):
        self.connect()
        return self._call(self._execute, statement, pot=pot)

    def _update(self, values, hasty=False):
        """Sets counters to SQL values, {pot: value}; returns for each pot the argument of
        LAST_INSERT_ID in its value, from its own statement's reply, or 0 where that was not called.
        Several go in one call, always in this order: two idpots cannot lock each other out. If all
        are InnoDB, they are one transaction."""
        pots = sorted(values)
        first = HASTY if hasty else ""
        statements = [f"{first}UPDATE `pot_{pot}` SET id = {values[pot]}" for pot in pots]
        self.connect()
        statements[-1] += self._writable        # the server may have changed since it was asked
        single = pots[0] if len(pots) == 1 else ""
        together = not single and {self._shared.engines.get(pot) for pot in pots} == {"InnoDB"}
        if together:
            statements = ["START TRANSACTION", *statements, "COMMIT"]
        told = self._call(execute_all, self.connection, statements, pot=single)
        if monotonic() > self._seen + BELIEVED:     # the call may have waited meanwhile
            self._call(self._examine)
        # An open transaction is not committed: a trigger or a proxy may have begun one.
        if (len(told) != len(statements) or self.connection.in_transaction
                or self._turn != self._shared.turn):
            self.close()
            raise Retry(f"{CANNOT}: its reply is not whole, not committed, or too late")
        if together:
            told = told[1:-1]
        for pot, done in zip(pots, told):
            if done["affected_rows"] != 1:      # with FOUND_ROWS: met, not changed
                self._call(self._examine)       # raises Retry, if WRITABLE met none
                self.current(pot)               # raises Broken, or Retry
                raise Retry("the pot was just changed by others")
        return {pot: done["insert_id"] for pot, done in zip(pots, told)}

    def take(self, wants, hasty=False):
        # The counter is read and written by one statement, whose reply brings the value. So several
        # idpots may use one table, go-idpot among them: the database lets them in one by one.
        taken = self._update(
            {pot: f"LAST_INSERT_ID(id + {count})" for pot, count, _ in wants}, hasty)
        for pot, count, floor in wants:
            if taken[pot] >= floor + count:
                continue
            if len(wants) == 1:
                self.raise_to(pot, floor)       # the mend; raises Broken where that fails
                if taken[pot]:
                    log.warning("the counter of pot %s was set back to %d, but %d was given: it "
                                "goes on above that", pot, taken[pot] - count, floor)
            raise Retry(f'the counter of pot "{pot}" was set back, was changed by others, or its '
                        "table has a trigger")
        return [taken[pot] for pot, _, _ in wants]

    def current(self, pot):
        rows = self._run(
            "SELECT id, (SELECT engine FROM information_schema.tables WHERE table_schema = "
            f"DATABASE() AND table_name = 'pot_{pot}') FROM `pot_{pot}` LIMIT 2", pot)
        if not rows:        # another idpot may be just making it
            raise Retry(f'the table of pot "{pot}" has no row')
        if len(rows) > 1:
            raise Broken(f'the table of pot "{pot}" has several rows, not one')
        value, engine = rows[0]
        self._shared.engines[pot] = engine
        cluster = self._shared.cluster
        if cluster and engine != "InnoDB":      # as in _examine()
            raise Broken(
                f'the table of pot "{pot}" is {engine}: {cluster} replicates InnoDB only')
        if type(value) is not int or value < 0:     # DOUBLE and VARCHAR would repeat IDs
            raise Broken(f'the table of pot "{pot}" holds no whole number from 0 up')
        return value

    def create(self, pot, low):
        """Makes the table, and its row where there is none: a crash may have left it so."""
        key = ""
        if self._engine.lower() == "innodb":
            key = ", one TINYINT NOT NULL DEFAULT 1 PRIMARY KEY"
        # A server that has joined a cluster within the second is not left a table of its own.
        self.connect(believed=0)
        self._run(f"CREATE TABLE IF NOT EXISTS `pot_{pot}` (id BIGINT UNSIGNED NOT NULL{key}) "
                  f"ENGINE={self._engine}", pot)
        done = self._run(f"INSERT INTO `pot_{pot}` (id) SELECT {low} FROM DUAL "
                         f"WHERE NOT EXISTS (SELECT id FROM `pot_{pot}`)", pot)
        if done["affected_rows"] != 1:
            raise Exists(f'pot "{pot}" exists')
        return self.current(pot)    # raises Broken where its table would not count

    def raise_to(self, pot, low):
        self.connect(believed=0)
        self.current(pot)           # raises Broken
        # MariaDB's GREATEST(id, 5) is signed and fails from 2**63 up: hence CAST.
        self._update({pot: f"GREATEST(CAST(id AS UNSIGNED), CAST({low} AS UNSIGNED))"})
        return self.current(pot)    # whatever a trigger made of it

    def pots(self):
        tables = self._run("SELECT table_name FROM information_schema.tables "
                           "WHERE table_schema = DATABASE() AND engine IS NOT NULL")
        for table, in sorted(tables):
            pot = table.removeprefix("pot_")
            if table != pot and POT_NAME.fullmatch(pot):
                value = "-"
                for _ in range(2):      # a connection may have been lost
                    self.connect()      # raises Retry where it is the server that is gone
                    with suppress(NotFound, Unavailable):
                        value = self.current(pot)
                        break
                yield pot, value

    def check(self, pot):
        self.connect(believed=0)
        if pot:
            with suppress(NotFound, Broken):    # it is that pot's alone
                self._update({pot: "id"})       # takes the locks and needs the privilege


# -------------------------------------------------------------------------------------- allocation
# Requests that wait together are served by ONE call of a store. A request becomes a Job of its pot.
# A worker is a thread that owns one store for life. For the pots that have waited longest it has
# the store take the sum of each one's counts, and gives the IDs to the jobs in order of arrival. A
# job stays with its pot until it is answered.
#
# One worker LEADS. Meanwhile it alone reads what clients have sent, which brings jobs, and chooses
# what is served next; it calls, answers, and reads on: a request meets one thread, and no other is
# woken for it. For what may take long (a pot in trouble, one that was not looked at yet, the list
# of pots) the leader leaves the lead first, and one of the idle workers, who wait for it, reads on;
# it wakes that one where it gives pots back. The main thread frees the lead of a leader whose call
# lasts too long, for another worker; where none is free to lead, it reads itself.

MOST_POTS = 64          # pots that are served together
SLOW = 0.2              # seconds of a call, after which its pots are served by themselves
HELD = 0.1              # seconds of a call, after which the next look frees the lead
PAUSE = 0.1             # seconds before a worker tries again to connect
ALL_POTS = "all pots"   # what concerns no pot: no pot can have these names
HEALTH = "health check"


class Question(NamedTuple):
    """What a request asks for: `count` IDs of the pot, or with count 0 what call(allocator, store,
    pot) returns, once for all who wait with the same call; an int is the pot's counter.
    render(value) is the body of the answer: of the last ID, or of what the call returned."""
    pot: str
    count: int = 0
    call: Callable = None
    render: Callable = b"%d".__mod__
    status: int = 200
    patience: float = None      # seconds to wait; None: the setting Timeout


class Job:
    """A question that waits for its answer: asker(value, error) is called once, with a value or an
    IdpotError, by a worker, or by expire() where `patience` seconds are over."""
    trouble = "the database did not answer in"      # or why it is to be tried again

    def __init__(self, question, asker, patience=10.0):
        self.question = question
        self.count = question.count
        self.began = monotonic()
        self.moment = self.began + bool(self.count)     # in trouble, GETs go a second before IDs
        self.deadline = self.began + patience
        self.asker = [asker]        # taken by the thread that answers: list.pop is atomic

    def answer(self, value=None, error=None):
        """Answers, unless that was done before."""
        try:
            asker = self.asker.pop()
        except IndexError:
            return
        asker(value, error)

    def expire(self):
        waited = round(min(monotonic(), self.deadline) - self.began, 1)     # less at a stop
        self.answer(error=Unavailable(f"{self.trouble} {waited:g} seconds"))


class Pot:
    """A pot's jobs, oldest first, and what this server knows of it."""

    def __init__(self, name):
        self.name = name
        self.jobs = []          # oldest first; some may be answered, see _next_jobs()
        self.floor = None       # the highest number given or told; None: it was not looked at yet
        self.failures = 0       # calls in a row that failed, or took long: it is in trouble
        self.moment = monotonic()       # before which it is not tried again

    @property
    def alone(self):
        """Whether it is served by itself, without the lead: it is in trouble, or was not looked at.
        Not the health check, whatever its failures: it would wait behind pots in trouble."""
        return self.name != HEALTH and (self.failures or self.floor is None)


class Pots:
    """The pots that have jobs, and those that were looked at. A pot that has jobs is in `waiting`,
    or with one worker, which gives it back: that one alone writes its floor, failures, moment."""

    def __init__(self):
        self._lock = threading.Lock()   # guards all, and the pots' jobs; no other is taken under it
        self.known = {}         # by name
        self.waiting = []       # to be served, oldest first
        self._alone_next = False        # whose turn it is, where both kinds wait

    def add(self, job):
        name = job.question.pot
        with self._lock:
            pot = self.known.get(name)
            if not pot:
                pot = self.known[name] = Pot(name)
            if not pot.jobs:
                self.waiting.append(pot)
            pot.jobs.append(job)

    def choose(self, room):
        """{pot: jobs} to serve next, to be given back: a pot that is served alone, whose moment has
        come, if there is room for it; in turns with such, all the others."""
        now = monotonic()
        batch = {}
        with self._lock:
            chosen = [pot for pot in self.waiting if not pot.alone]
            due = [pot for pot in self.waiting if pot.alone and room and pot.moment <= now]
            self._alone_next = not self._alone_next
            if due and (self._alone_next or not chosen):
                # The one that has waited longest; each failure in a row puts it back a second.
                chosen = [min(due, key=lambda one: one.moment + one.failures)]
            for pot in chosen[:MOST_POTS]:
                jobs = self._next_jobs(pot)
                single = jobs and jobs[0].question.call
                if single and batch:
                    break
                self.waiting.remove(pot)
                pot.moment = now
                if jobs:
                    batch[pot] = jobs
                if single:
                    break
        return batch

    def _next_jobs(self, pot):
        """The pot's oldest job, and those that are served with it, by the same call. Drops what was
        answered, and forgets a pot of which nothing is known."""
        pot.jobs = [job for job in pot.jobs if job.asker]
        if pot.failures:
            pot.jobs.sort(key=lambda job: job.moment)
        if pot.jobs:
            call = pot.jobs[0].question.call
            return [job for job in pot.jobs if job.question.call == call]
        if pot.floor is None:
            del self.known[pot.name]
        return []

    def give_back(self, batch):
        with self._lock:
            self.waiting += [pot for pot in batch if self._next_jobs(pot)]

    def next_moment(self, room):
        """Seconds until something is to be served, as far as it is known; 0.2 at most."""
        now = monotonic()
        with self._lock:
            waits = [pot.moment - now for pot in self.waiting if room or not pot.alone]
        return max(0.0, min([0.2, *waits]))

    def jobs(self):
        with self._lock:
            return [job for pot in self.known.values() for job in pot.jobs]


class Allocator:
    """The workers that serve the pots."""

    def __init__(self, stores, stuck=60.0):
        self.stores = stores
        self._stuck = stuck     # seconds after which a worker that is busy counts as hung
        self._max_alone = max(1, len(stores) - 2)       # one leads, one is free to take the lead
        self._pots = Pots()
        self.add = self._pots.add       # called by who has the lead
        self._lead = threading.Lock()   # who has it reads and chooses; it is kept during calls
        self._hand = threading.Lock()   # guards _leader, and that the lead is left once
        self._leader = None     # the store whose worker has the lead; None: nobody, or main thread
        self._busy = {}         # store -> when its worker, which writes this, began what it does
        self._taken = ""        # the pot that IDs were taken from last
        self._asked = ""        # the pot that IDs were asked of last
        self._moment = 0.0      # before which no worker tries again to connect
        self._stopped = False
        self._threads = [threading.Thread(target=self._work, args=(store,), daemon=True)
                         for store in stores]

    def start(self, read, wake):
        """read(timeout) adds the jobs of requests that have come, and returns whether there were
        any; wake() has it return."""
        self._read = read
        self._wake = wake
        for thread in self._threads:
            thread.start()

    def look(self, now):
        """By the main thread, now and then: frees the lead of who is in a call for too long, and
        reads if no worker is free to lead; returns whether none is busy for very long."""
        leader = self._leader
        if self._busy.get(leader, now) < now - HELD:
            self._leave(leader)
        if self._lead.acquire(False):
            try:
                self._read(0)
            finally:
                self._lead.release()
        return min([now, *self._busy.values()]) > now - self._stuck

    def stop(self):
        """Has the workers close their stores and end; waits a second at most."""
        self._stopped = True
        self._wake()
        for thread in self._threads:
            thread.join(1 / len(self._threads))

    def list_pots(self, store, _):
        rows = []
        for pot, value in store.pots():
            known = self._pots.known.get(pot)
            if known and value != "-":
                value = max(value, known.floor or 0)
            rows.append(f"{pot}\t{value}\n".encode())
            self._busy[store] = monotonic()     # for look(): it does not hang
        return b"".join(rows)

    def check(self, store, _):
        """Tries the pot that an ID was taken from last; if none was, the one asked for last. A
        probe is told soon: nothing is tried again."""
        try:
            store.check(self._taken or self._asked)
        except Retry as error:
            raise IdpotError(str(error), status=error.status, header=error.header)
        troubles.end(store.subject)
        return b"ok"

    def _work(self, store):
        while not self._stopped:
            if self._leader is not store:
                self._lead.acquire()
                self._leader = store
                continue        # it may have stopped
            pause = 0.0
            if not store.connection:
                if any(one.connection and one not in self._busy for one in self.stores):
                    self._leave(store)
                    time.sleep(0.01)        # an idle worker that has a connection leads instead
                    continue
                pause = max(0.0, self._moment - monotonic())
            room = len(self._busy) < self._max_alone
            timeout = pause or self._pots.next_moment(room)
            while self._read(timeout):      # until no more comes: 10 % more IDs/s (wrk -c64)
                timeout = 0.0
            batch = {} if pause else self._pots.choose(room)
            if batch:
                self._serve(store, batch)
        self._leave(store)
        store.close()

    def _leave(self, store):
        """Leaves the lead to another worker, if this store's has it still."""
        with self._hand:
            if self._leader is store:
                self._leader = None
                self._lead.release()

    def _serve(self, store, batch):
        """Connects, if need be, and serves the pots."""
        self._busy[store] = monotonic()
        if next(iter(batch)).alone:     # then it is the only one
            self._leave(store)
        try:
            store.connect()
            self._try(store, batch)
        except IdpotError as error:
            if any([one.connection for one in self.stores]):     # they can serve
                error = Retry(str(error), detail=error.detail)
            self._settle(store.subject, self._pots.jobs(), error)
            self._moment = monotonic() + PAUSE
        finally:
            self._pots.give_back(batch)
            del self._busy[store]
            if self._leader is not store:
                self._wake()

    def _try(self, store, batch):
        """Takes IDs from all pots of the batch, or calls what is asked of its only one."""
        pot, jobs = next(iter(batch.items()))       # mostly the only ones
        try:
            if jobs[0].count:
                self._take(store, batch)
            else:
                value = jobs[0].question.call(self, store, pot)     # once for all of them
                if type(value) is int:      # no answer shows less than was given; IDs are above
                    value = pot.floor = max(value, pot.floor or 0)
                for job in jobs:
                    job.answer(value)
        except IdpotError as error:
            if not isinstance(error, Exists):
                for one in batch:       # each is tried by itself now
                    one.failures = min(one.failures + 1, 7)
            if len(batch) > 1:
                return
            if isinstance(error, Exhausted) and len(jobs) > 1:
                try:        # they do not all fit: where one does not, no greater one does
                    for job in sorted(jobs, key=lambda one: one.count):
                        self._take(store, {pot: [job]})
                except IdpotError as own:
                    error = own
            subject = store.subject
            if isinstance(error, (Retry, Broken)) and store.connection:
                subject = f"pot {pot.name}"
            if isinstance(error, Retry):
                pot.moment = monotonic() + 2**pot.failures / 128    # a second at most
            self._settle(subject, jobs, error)

    def _settle(self, subject, jobs, error):
        """Answers jobs with the error, unless it may help to try again."""
        if isinstance(error, Unavailable):
            troubles.begin(subject, error.detail)
        if not isinstance(error, Retry):
            for job in jobs:
                job.answer(error=error)
            return
        metrics.add("idpot_db_retries_total", len(jobs))
        for job in jobs:
            job.trouble = f"{error}, tried for"
            job.moment = monotonic() + 1.0      # what comes meanwhile goes first

    def _take(self, store, batch):
        """Takes IDs from all pots of the batch in one call, and hands them to their jobs."""
        first = next(iter(batch))
        self._asked = first.name
        if first.floor is None:
            first.floor = store.current(first.name)     # raises Broken if it could repeat IDs
        wants = [(pot.name, sum([job.count for job in jobs]), pot.floor)
                 for pot, jobs in batch.items()]
        start = monotonic()
        lasts = store.take(wants, first.failures == 1)      # hasty: its call failed, maybe not it
        slow = monotonic() > start + SLOW and len(self.stores) > 1
        self._taken = first.name
        metrics.add("idpot_db_statements_total", len(wants))
        metrics.add("idpot_ids_issued_total", sum([want[1] for want in wants]))
        troubles.end(store.subject)
        for pot, last in zip(batch, lasts):
            pot.floor = last
            pot.failures = slow
            troubles.end(f"pot {pot.name}")
            for job in reversed(batch[pot]):
                job.answer(last)
                last -= job.count


# --------------------------------------------------------------------------------- service manager

STOPS = (signal.SIGTERM, signal.SIGINT)


def notify(state):
    """Tells systemd a state such as READY=1, as sd_notify(3) does, if it listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        address = re.sub("^@", "\0", path)      # an abstract one
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), socket.MSG_DONTWAIT, address)     # if somebody reads it


def listen(host, port):
    """The socket that start_server or systemd left open (sd_listen_fds(3)), or one on the address.
    Raises IdpotError."""
    try:
        entries = os.environ.get("SERVER_STARTER_PORT", "").split(";")      # host:port=fd, path=fd
        descriptors = [int(entry.rpartition("=")[2]) for entry in entries if entry]
        if os.environ.get("LISTEN_PID") == str(os.getpid()):
            descriptors += range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))
        if len(descriptors) > 1:
            raise IdpotError(f"{len(descriptors)} sockets were handed over, but one is served: a "
                             "drop-in of the socket unit begins with an empty ListenStream=")
        if descriptors:
            listener = socket.socket(fileno=descriptors[0])
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise IdpotError("the socket that was handed over does not listen")
            if (host, port) != LISTEN:
                log.warning("Listen, %s:%d, is not used: a socket was handed over", host, port)
        else:
            both = not host and socket.has_dualstack_ipv6()     # IPv6 and IPv4
            family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
            listener = socket.create_server(
                (host, port), family=family, backlog=1024, dualstack_ipv6=both)
        listener.setblocking(False)     # another process may take a connection before this one
        return listener
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise IdpotError(f"cannot listen on {host}:{port}: {reason}")


# ----------------------------------------------------------------------------------------- grammar
# What the bytes of a request say, as strict as RFC 9112 allows; nothing here knows who asks for it.

MAX_LINE = 8192         # bytes of a request line, then 414
MAX_HEAD = 16384        # of the request line and all headers, then 431
SHORT = 1024            # bytes of a head that is kept
SHORT_FORM = 128        # of a form whose question is kept
MAX_BODY = 65536        # bytes, then 413
MAX_EXTRA = 8192        # of the size lines and trailers of a chunked body, then 413
LINE_COST = 8           # bytes that each of these counts for beside its own: it takes as much time

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n")
FIELD = TOKEN + rb":[\t -~\x80-\xff]*\r\n"
HEAD = re.compile(REQUEST_LINE.pattern + b"((?:" + FIELD + rb")*)\r\n")
FIELDS = re.compile(rb"([^:\r\n]+):([^\r\n]*)\r\n")
CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})(?:[\t ]*;[\t -~\x80-\xff]*)?\r\n")
TRAILER = re.compile(FIELD + rb"|\r\n")
HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
ABSOLUTE = re.compile(rb"(?i)\Ahttps?://(?=[^/?:])" + HOST.pattern + b"(?=[/?]|$)")
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
FORM = b"application/x-www-form-urlencoded"
PATHS = ("/pot/create", "/pot/raise", "/pot", "/healthz", "/metrics")


def parse_target(target):
    """(path, query, route, pot) of a target (RFC 9112, 3.2); the route is the path's template. In a
    path nothing is decoded: no pot's name needs a %, and a proxy's rule may have looked at it."""
    origin, absolute = ABSOLUTE.subn(b"", target)
    if absolute and not origin.startswith(b"/"):
        origin = b"/" + origin
    if not origin.startswith(b"/") or b"#" in origin:
        raise BadRequest(f"{shown(target)} is not a request target")
    path, _, query = origin.decode().partition("?")
    parent, _, pot = path.rpartition("/")
    route = "other"
    if path in PATHS:
        route = path
    elif parent in ("/id", "/pot") and POT_NAME.fullmatch(pot):
        route = parent + "/{pot}"
    return path, query, route, pot


def parse_headers(lines):
    """The headers by lower-case name; several of one name are joined by commas (RFC 9110, 5.3),
    which makes a second Host, Content-Length, Transfer-Encoding, Authorization malformed."""
    headers = {}
    for name, value in FIELDS.findall(lines):
        name = name.lower()
        value = value.strip(b" \t")
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def parse_length(headers, old):
    """The length of the body; None where it is chunked (RFC 9112, 6)."""
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        if old or b"content-length" in headers:
            raise BadRequest("Transfer-Encoding is there with Content-Length, or in HTTP/1.0")
        if coding.lower() != b"chunked":
            raise IdpotError(f"Transfer-Encoding {shown(coding)} is not chunked", status=501)
        return None
    length = headers.get(b"content-length", b"0")
    if not re.fullmatch(b"[0-9]{1,19}", length):
        raise BadRequest(f"Content-Length {shown(length)} is not a number")
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
        raise BadRequest(f"{shown(data[:end].strip())} is not a request line")
    if len(data) > MAX_HEAD:
        raise IdpotError("the header is too long", status=431)


def parse_head(data):
    """What a head says, the bytes up to the empty line."""
    check_beginning(data)
    match = HEAD.fullmatch(data)
    if not match:
        raise BadRequest("a header line is malformed")
    method, target, version, lines = match.groups()
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
        takes={},                                   # short bodies -> the question, if for IDs
        line=escaped(b"%s %s HTTP/%s" % (method, target, version)),     # of the access log
        tail=f'"{referer}" "{agent}"')                                  # and its end


# Up to SHORT: a client repeats itself to the byte, and cannot fill memory with long ones.
short_head = functools.lru_cache(maxsize=2048)(parse_head)
# Stands in for the head where it cannot be read: what answer() and the access log use of it.
MALFORMED = types.SimpleNamespace(
    method="other", old=False, labels='route="other",method="other"', line="-",
    tail='"-" "-"')


def find_head(data):
    """(head, where it ends) of the request with which the data begins; (None, 0) where not all of
    the head has come. Raises what is wrong as soon as that has come."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        check_beginning(data)
        return None, 0
    return (short_head if end <= SHORT else parse_head)(data[:end]), end


def find_chunks(data, begin):
    """(body, where it ends) of a body of chunks (RFC 9112, 7.1), whose extensions and trailers mean
    nothing here; where not all has come (None, the length of data from which on to look again)."""
    body = b""
    extra = 0
    line = CHUNK        # what comes next; then TRAILER
    at = begin - 2      # a chunk's line begins with the CRLF before it: the head ends with one
    while at <= len(data):
        match = line.match(data, at)
        end = match.end() if match else len(data)
        extra += end - at + LINE_COST
        if extra > MAX_EXTRA:
            raise IdpotError("the size lines or trailers of the body are too long", status=413)
        if not match:
            if b"\n" in data[at:].removeprefix(b"\r\n"):
                raise BadRequest(f"{shown(data[at:])} is no size line of a chunk, or no trailer")
            break
        at = end
        if line is CHUNK:
            size = int(match[1], 16)
            if len(body) + size > MAX_BODY:
                raise IdpotError(f"the body is longer than {MAX_BODY} bytes", status=413)
            body += data[at:at + size]
            at += size
            if size == 0:
                line = TRAILER
        elif match[0] == b"\r\n":
            return body, at
    return None, max(at, len(data) + 1)


# --------------------------------------------------------------------------------------------- API
# What a request asks for. Nothing here knows a connection: an action takes a head and the fields of
# its form, and returns the Question, or raises the error to be answered.

PROBE = 1.7             # seconds for /healthz: with the 0.2 between looks it is answered within 2
METRICS_TEXT = Question("")     # is answered by the server itself
HEALTH_CHECK = Question(HEALTH, call=Allocator.check, render=bytes, patience=PROBE)
LIST_OF_POTS = Question(ALL_POTS, call=Allocator.list_pots, render=bytes)
FORM_FIELDS = {     # route -> what a POST there may have
    "/id/{pot}": ("count", "range"),
    "/pot/create": ("name", "min"),
    "/pot/raise": ("name", "min"),
}


def take_ids(head, fields):
    if len(fields) > 1:
        raise BadRequest("count and range exclude each other")
    if "range" in fields:
        size = whole_number(fields["range"], 1, MAX_RANGE, "range")
        return Question(head.pot, size, render=lambda last: b"%d\t%d\n" % (last - size + 1, last))
    if "count" in fields:
        size = whole_number(fields["count"], 1, MAX_COUNT, "count")
        return Question(head.pot, size, render=lambda last: b"".join(
            [b"%d\n" % one for one in range(last - size + 1, last + 1)]))
    return Question(head.pot, 1)


def last_id(_, store, pot):
    return store.current(pot.name)


def name_and_min(fields, default):
    pot = fields.get("name", "")
    if not POT_NAME.fullmatch(pot):
        raise BadRequest(f"name {shown(pot)} is not 1 to 60 characters of A-Z a-z 0-9 _ -")
    return pot, whole_number(fields.get("min", default), 0, MAX_ID, "min")


def create_pot(_, fields):
    pot, low = name_and_min(fields, "0")
    return Question(pot, call=lambda _, store, pot: store.create(pot.name, low),
                    render=lambda _: b"Created new pot", status=201)


def raise_pot(_, fields):
    pot, low = name_and_min(fields, "")
    return Question(pot, call=lambda _, store, pot: store.raise_to(
        pot.name, max(low, pot.floor or 0)))


# Route -> method -> what does it; HEAD is GET. Pots may have the names create and raise.
IS_THERE = {"GET": lambda head, _: Question(
    head.pot, call=last_id, render=lambda _: b"", status=204)}
ACTIONS = {
    "/id/{pot}": {"GET": lambda head, _: Question(head.pot, call=last_id), "POST": take_ids},
    "/pot/{pot}": IS_THERE,
    "/pot/create": {**IS_THERE, "POST": create_pot},
    "/pot/raise": {**IS_THERE, "POST": raise_pot},
    "/pot": {"GET": lambda *_: LIST_OF_POTS},
    "/healthz": {"GET": lambda *_: HEALTH_CHECK},
    "/metrics": {"GET": lambda *_: METRICS_TEXT},
}


def check_access(head, settings):
    """Raises Unauthorized where the request lacks the bearer token that it needs."""
    admin = head.method == "POST" and head.route in ("/pot/create", "/pot/raise")
    token = (settings.admintoken if admin else settings.token).encode()
    if token and hmac.compare_digest(token, head.token):
        return
    if head.origin:
        raise Unauthorized("a request from a web page (it has an Origin) needs the bearer token",
                           status=403, header="")
    if token and head.route not in ("other", "/healthz"):
        need = "the bearer token is wrong" if head.token else "a bearer token is needed"
        raise Unauthorized(need)


def form_fields(head, body):
    """The fields of query and form (URL Standard, 5.1), each known and given once."""
    text = head.query
    if body and head.method == "POST":      # else a body means nothing
        if head.form != FORM:
            raise IdpotError(f"the body is {shown(head.form)}, not {FORM.decode()}", status=415)
        text += "&" + body.decode("latin-1")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise BadRequest("the form is not UTF-8, or has too many fields")
    known = FORM_FIELDS.get(head.route, ())
    fields = {}
    for name, value in pairs:
        if name not in known:
            here = f"here are {', '.join(known)}" if known else "there are none here"
            raise BadRequest(f"unknown field {shown(name)}: {here}")
        if head.method != "POST":
            raise BadRequest(f'field "{name}" is for POST')
        if name in fields:
            raise BadRequest(f'"{name}" is given twice')
        fields[name] = value
    return fields


def ask(head, body, settings):
    """The Question of a request, or raises the error to be answered."""
    if body in head.takes:      # a client that takes IDs repeats itself to the byte
        return head.takes[body]
    if settings.admintoken or head.origin:
        check_access(head, settings)
    actions = ACTIONS.get(head.route)
    if not actions:
        raise NotFound(f"there is nothing at {shown(head.path)}")
    action = actions.get("GET" if head.method == "HEAD" else head.method)
    if not action:
        allowed = ", ".join(actions).replace("GET", "GET, HEAD")
        raise IdpotError(f"{head.method:.20} is not allowed here, but {allowed}", status=405,
                         header=f"Allow: {allowed}\r\n")
    question = action(head, form_fields(head, body) if body or head.query else {})
    if question.count and len(body) <= SHORT_FORM and len(head.takes) < 16:
        head.takes[body] = question
    return question


# ------------------------------------------------------------------------------------- connections
# Threads: the workers, one of which leads; the main one, which looks at the connections each 0.2 s,
# at the lead each 0.05 s.
#
# All connections are in one epoll, armed with EPOLLONESHOT: whom it tells of a connection has it,
# alone, until it is armed again. That is all the locking there is. Who has the lead reads it. (A
# lead that is freed a moment too late may leave two readers: a connection goes to one of them.)
#
# The life of a request: the leader, whom the epoll tells of new connections, too, accepts; receives
# what came, into the connection's buffer; and as soon as that holds a whole request asks the
# allocator: the connection is with a Job then. Who answers the job, mostly the leader after its
# call, has the connection, sends without waiting, and arms it for the next request, which is read
# no earlier: so answers come in order. What the client does not take at once stays with the
# connection, armed for writing.
#
# Who has a connection writes its `state`, a tuple (name, since, more); the main thread reads it:
#   IDLE      until the client sends its next request
#   READING   a request arrives, since then
#   ASKING    the Job, more, is with the allocator; since is when the request began
#   SENDING   the client has not taken all of its answer: more is (the rest, whether to keep it)
#   CLOSING   the last answer was sent; what the client still sends is read for a moment: to close
#             with unread input could destroy the answer on its way (RFC 9112, 9.6)
# The main thread ends what takes too long. A job gets its 503. A client that is to send is shut for
# reading (what has come is still read); one that is to read, both ways. Of that the epoll tells,
# and who has the connection then closes it.

LOOK = 0.2              # seconds between looks at all connections
HURRIED = 0.5           # seconds that a client has to send at a stop
LINGER = 2.0            # seconds for which a closed connection is read
RECEIVED = 16384        # bytes that are received at once
READ = select.EPOLLIN | select.EPOLLONESHOT
WRITE = select.EPOLLOUT | select.EPOLLONESHOT
IDLE, READING, ASKING, SENDING, CLOSING = "idle", "reading", "asking", "sending", "closing"

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
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


class Connection:
    """A client's connection. The head of this section tells its life."""

    def __init__(self, request, address, server):
        request.setblocking(False)
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"    # for a Unix socket
        self.host = host.removeprefix("::ffff:")
        self.request = request
        self.descriptor = request.fileno()
        self.server = server
        self.state = (IDLE, monotonic(), None)
        self.buffer = b""       # what was received, and is no part of a request that was read
        self.enough = 0         # bytes of it that may be a whole request; 0: no head was found
        self.head = MALFORMED   # of the request that is read or answered
        server.connections[self.descriptor] = self
        try:
            server.epoll.register(self.descriptor, READ)
        except OSError:         # the kernel has no memory left for it
            self.close()

    def go_on(self, events):
        """By who has the lead, whom the epoll tells of the connection: the client has sent, or
        takes more of an answer, or has gone."""
        name, since, more = self.state
        try:
            if name == SENDING:
                self.send(*more, since)
            elif events & select.EPOLLHUP and events & select.EPOLLOUT:     # by shut()
                self.close()
            elif events & select.EPOLLOUT:      # there is a further request in the buffer
                self.read_request()
            else:
                data = self.request.recv(RECEIVED)
                if name == CLOSING and data:
                    self.arm(READ)
                elif data:
                    self.buffer += data
                    self.read_request()
                elif name == CLOSING or not self.buffer:
                    self.close()
                else:       # the client ended its sending within a request, or shut() did that
                    error = BadRequest("the request is cut off")
                    if self.server.stopping or monotonic() > since + self.server.limits[READING]:
                        error = IdpotError("the request did not arrive in time", status=408)
                    self.answer_error(error, keep=False)
        except BlockingIOError:     # there is nothing to receive after all
            self.arm(READ)
        except OSError:             # the client has gone
            self.close()

    def read_request(self):
        """Asks for what the next request in the buffer wants, if it has come whole."""
        name, since, _ = self.state
        began = since if name == READING else monotonic()
        self.state = (READING, began, None)
        self.head = MALFORMED
        keep = False        # until all is read, where the next request begins is unknown
        try:
            body = self.find_request()
            if body is None:
                self.arm(READ)
                return
            keep = self.head.keep
            question = ask(self.head, body, self.server.settings)
            if question is METRICS_TEXT:
                self.answer(200, self.server.metrics_text(), keep, media=PROMETHEUS)
                return
            job = Job(question, self.answer_job, question.patience or self.server.settings.timeout)
            self.state = (ASKING, began, job)
            self.server.allocator.add(job)
        except IdpotError as error:
            self.answer_error(error, keep)
        except OSError:
            raise
        except Exception:
            log.exception("request from %s", self.host)
            self.answer_error(IdpotError("internal error"), keep=False)

    def find_request(self):
        """Returns the body of the request, and leaves its head; None where not all has come."""
        if self.buffer.startswith(b"\r\n"):     # empty lines before it (RFC 9112, 2.2)
            self.buffer = EMPTY_LINES.sub(b"", self.buffer, 1)
        data = self.buffer
        if len(data) < self.enough:
            return None
        head, begin = find_head(data)
        if not head:
            return None
        self.head = head
        if head.length is None:
            body, end = find_chunks(data, begin)
        else:
            end = begin + head.length
            body = data[begin:end] if len(data) >= end else None
        if body is None:
            if head.expect and not self.enough:
                with suppress(BlockingIOError):     # it need not wait for it (RFC 9110, 10.1.1)
                    if self.request.send(CONTINUE) < len(CONTINUE):
                        raise ConnectionError("half of it was sent")
            self.enough = end
            return None
        self.buffer = data[end:]
        self.enough = 0
        return body

    def answer_job(self, value, error):
        """The Job's asker: who has taken it from the job has the connection now."""
        question = self.state[2].question
        if error:
            self.answer_error(error, self.head.keep)
        else:
            self.answer(question.status, question.render(value), self.head.keep)

    def answer_error(self, error, keep):
        self.answer(error.status, f"{error}\n".encode(), keep, header=error.header)

    def answer(self, status, body, keep, header="", media=PLAIN):
        head = self.head
        keep = keep and not self.server.stopping
        if not keep:
            header += "Connection: close\r\n"
        elif head.old:
            header += "Connection: keep-alive\r\n"
        sent = b"" if head.method == "HEAD" else body
        now = monotonic()
        # Noted before it is sent: who has an answer finds it counted.
        self.server.answers.append((self.host, head, status, len(sent), now - self.state[1]))
        self.send(answer_head(status, media, header, len(body)) + sent, keep, now)

    def send(self, data, keep, since):
        """Sends what the client takes now. Behind the last byte it is the client's turn."""
        try:
            rest = data[self.request.send(data):]
        except BlockingIOError:     # the client is to read first
            rest = data
        except OSError:             # it has gone: whatever else it sent is served no more
            self.close()
            return
        if rest:
            self.state = (SENDING, since, (rest, keep))
            self.arm(WRITE)
        elif keep:
            self.state = (IDLE, monotonic(), None)
            self.arm(WRITE if self.buffer else READ)
        else:
            self.state = (CLOSING, monotonic(), None)
            with suppress(OSError):
                self.request.shutdown(socket.SHUT_WR)
            self.arm(READ)

    def arm(self, events):
        """Gives the connection back to the epoll."""
        self.server.epoll.modify(self.descriptor, events)

    def close(self):
        del self.server.connections[self.descriptor]    # before another one has its descriptor
        self.request.close()

    def shut(self):
        """By any thread, though others may have it: a job that waits gets its 503, and the socket
        is shut, of which the epoll tells whoever closes it."""
        name, _, more = self.state
        if name == ASKING:
            more.expire()
        writes = name == SENDING or name == IDLE and self.buffer        # armed for writing
        with suppress(OSError):     # it was just closed
            self.request.shutdown(socket.SHUT_RDWR if writes else socket.SHUT_RD)

    def look(self, now):
        """By the main thread: ends a wait for the database or the client that takes too long."""
        name, since, more = self.state
        if name == ASKING and now > min(more.deadline, self.server.limits[ASKING]):
            more.expire()
        elif now > max(since, self.server.stopping) + self.server.limits[name]:
            self.shut()


class Server(http.server.ThreadingHTTPServer):
    """Accepts and bounds connections; does in the main thread what is to be done now and then."""

    def __init__(self, settings, listener, allocator):
        super().__init__(None, Connection, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        if listener.family != socket.AF_UNIX:       # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.settings = settings
        self.allocator = allocator
        # The answers that were sent, each as (host, head, status, bytes sent, seconds), until they
        # are counted and logged, many at once: one by one costs a tenth of the speed (wrk -c64).
        self.answers = collections.deque()
        self._counting = threading.Lock()       # who has it takes them
        self.connections = {}       # descriptor -> Connection
        self.epoll = select.epoll()
        self.epoll.register(listener, select.EPOLLIN)
        bell = os.eventfd(0, os.EFD_CLOEXEC)
        self.epoll.register(bell, select.EPOLLIN | select.EPOLLET)
        self.wake = functools.partial(os.eventfd_write, bell, 1)        # has read() return
        self.stopping = 0.0         # when the stop began, 0.0 before
        self.limits = {             # seconds in a state, from a stop on; but when ASKING ends
            IDLE: settings.idletimeout, READING: settings.requesttimeout, ASKING: math.inf,
            SENDING: settings.idletimeout, CLOSING: LINGER}
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        others = len(allocator.stores) + 16     # files: database, logs, /proc, one more client
        self._max_connections = max(1, min(settings.maxconnections, files - others))
        self._looked = 0.0

    def read(self, timeout):
        """Accepts, and goes on with the connections of which the epoll tells, by who has the lead;
        returns whether one has asked for something."""
        asked = False
        waiting = False
        for descriptor, events in self.epoll.poll(timeout):
            connection = self.connections.get(descriptor)
            if connection:
                connection.go_on(events)
                asked |= connection.state[0] == ASKING
            elif descriptor == self.fileno():       # else it is the bell
                waiting = True
        if waiting:         # now that those are closed that make room
            self.accept()
        if len(self.answers) > 500:
            self.count_answers()
        return asked

    def accept(self):
        """Accepts all that wait. If one is too many, the connection that has waited longest goes,
        and gets its 503 if it waits for an answer; if all are young, the next look comes again."""
        try:
            for _ in range(self._max_connections + 1 - len(self.connections)):
                self.finish_request(*self.get_request())    # makes a Connection
        except BlockingIOError:     # no more of them wait
            return
        except OSError:             # no descriptor is left
            pass
        longest = min(self.connections.copy().values(), key=lambda one: one.state[1], default=None)
        if longest and longest.state[1] < monotonic() - 0.1:
            longest.shut()
        else:
            with suppress(OSError, ValueError):     # a stop has just closed it
                self.epoll.modify(self, 0)

    def count_answers(self):
        with self._counting:
            answers = [self.answers.popleft() for _ in range(len(self.answers))]
        if answers:
            metrics.add_answers(answers)
            moment = time.strftime("%d/%b/%Y:%H:%M:%S %z")
            access.info("\n".join(
                [f'{host} - - [{moment}] "{head.line}" {status} {size or "-"} {head.tail}'
                 for host, head, status, size, _ in answers]))

    def stop(self):
        """Accepts what waits in the backlog, then no more; returns when all connections are closed,
        after Timeout, or at the next stop signal. Each answer from now on closes its connection."""
        self.stopping = monotonic()
        self.limits.update({IDLE: HURRIED, READING: HURRIED, CLOSING: HURRIED})
        self.limits[ASKING] = self.stopping + 0.75 * self.settings.timeout  # answers take a moment
        self.epoll.unregister(self)
        self.accept()
        self.server_close()
        while self.connections and monotonic() < self.stopping + self.settings.timeout:
            time.sleep(0.02)
            self.look()
            if signal.sigtimedwait(STOPS, 0):
                return
        self.allocator.stop()

    def look(self):
        """Every LOOK seconds: deadlines, watchdog, SIGHUP."""
        now = monotonic()
        well = self.allocator.look(now)
        if now < self._looked + LOOK:
            return
        self._looked = now
        answer_head.cache_clear()
        for connection in list(self.connections.values()):
            connection.look(now)
        self.count_answers()
        if well and "WATCHDOG_USEC" in os.environ:
            notify("WATCHDOG=1")        # that this thread hangs shows of itself
        if not self.stopping:
            self.epoll.modify(self, select.EPOLLIN)     # accept() may have ended that
        if signal.sigtimedwait([signal.SIGHUP], 0):     # a moved LogFile is seen at each write
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            notify("READY=1")

    def metrics_text(self):
        states = [one.state[0] for one in list(self.connections.values())]
        silent = states.count(IDLE) + states.count(CLOSING)
        gauges = {
            "idpot_connections": len(states),
            "idpot_http_requests_in_flight": len(states) - silent,
            "idpot_db_connections": len([1 for one in self.allocator.stores if one.connection]),
        }
        self.count_answers()
        return metrics.text(gauges).encode()


# ------------------------------------------------------------------------------------------ client

class Client(AbstractContextManager):
    """A client of an idpot server at a URL, over one connection that is kept; for one thread. Its
    methods raise BadRequest, Unauthorized, NotFound, Exists, Exhausted or Unavailable as the server
    answers; IdpotError for what is no answer of idpot's; WentBack where an ID is not above those
    before, as after a restore; OSError where nothing comes for `timeout` seconds."""
    ERRORS = {      # but a 409 to a create is Exists
        400: BadRequest, 401: Unauthorized, 403: Unauthorized, 404: NotFound, 409: Exhausted,
        503: Unavailable}

    def __init__(self, url, token=None, timeout=15):
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        parts = urlsplit(url)
        if parts.scheme not in kinds or not parts.hostname or parts.port == 0:
            raise ValueError(f"{url!r} is not http://host:port or https://host:port")
        self._connection = kinds[parts.scheme](parts.netloc, timeout=timeout)
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Content-Type": FORM.decode()}
        if token:
            self._headers["Authorization"] = f"Bearer {token}".encode()
        self._highest = {}      # pot -> greatest ID that was answered

    def create(self, pot, min=0):
        """Creates the pot; its first ID is min + 1. Tried once: again it could find its own pot."""
        self.close()        # only on a connection that was kept is anything tried again
        try:
            self._ask(201, "Created new pot", "POST", "/pot/create", name=pot, min=min)
        except Exhausted as error:
            raise Exists(str(error))

    def exists(self, pot):
        try:
            self._ask(204, "", "GET", f"/pot/{pot}")
            return True
        except NotFound:
            return False

    def current(self, pot):
        """Returns the ID that was given last, or min."""
        return int(self._ask(200, "[0-9]{1,20}", "GET", f"/id/{pot}"))

    def next(self, pot):
        """Returns a new ID."""
        return self._take(pot, 1)[0]

    def next_many(self, pot, count):
        """Returns a range of count (1..10000) new IDs."""
        return self._take(pot, count, count=count)

    def next_range(self, pot, count):
        """Returns a range of count (1..2**32) new IDs."""
        return self._take(pot, count, range=count)

    def raise_to(self, pot, min):
        """Raises the counter to min unless it is higher; returns the counter."""
        text = self._ask(200, "[0-9]{1,20}", "POST", "/pot/raise", name=pot, min=min)
        if int(text) < min:
            raise IdpotError(f"{text} is below {min}, to which the pot was to be raised")
        return int(text)

    def _take(self, pot, wanted, **fields):
        """A range of the wanted IDs; the answer has all of them, or the first and the last."""
        text = self._ask(200, r"[0-9]{1,20}(\s[0-9]{1,20})*\s?", "POST", f"/id/{pot}", **fields)
        told = [int(one) for one in text.split()]
        first = told[0]
        last = first + wanted - 1
        new = range(first, last + 1)
        expected = [*new] if len(told) == wanted else [first, last]
        if first == 0 or last > MAX_ID or told != expected:
            raise IdpotError(f"{shown(text)} are not the {wanted} IDs that were asked for")
        highest = self._highest.get(pot, 0)
        if first <= highest:
            raise WentBack(f'pot "{pot}" gave {first} after {highest}')
        self._highest[pot] = last
        return new

    def _ask(self, wanted, pattern, method, path, **fields):
        """The text of an answer with the wanted status, if it matches the pattern."""
        for last in (self._connection.sock is None, True):      # a kept connection may have died
            try:
                self._connection.request(
                    method, self._prefix + quote(path), urlencode(fields) or None, self._headers)
                with self._connection.getresponse() as answer:
                    text = answer.read().decode("utf-8", "replace")
                break
            except OSError as error:
                self.close()        # a late answer would be taken for that of the next request
                if last or not isinstance(error, ConnectionError):
                    raise
            except (ValueError, http.client.HTTPException) as error:
                self.close()
                raise IdpotError(f"this is no answer of idpot: {error!r}")
        if answer.status in self.ERRORS and re.fullmatch("[^\n]+\n", text):
            raise self.ERRORS[answer.status](text.strip())
        if answer.status == wanted and re.fullmatch(pattern, text) and answer.length is not None:
            return text
        self.close()
        raise IdpotError(f"this is no answer of idpot: {answer.status} {shown(text)}")

    def close(self):
        self._connection.close()

    def __exit__(self, *_):
        self.close()


# ------------------------------------------------------------------------------------ command line

def end_process(died):
    """threading.excepthook: a thread met what nobody expects, as lack of memory is. Without it
    idpot might never serve again; whoever started it starts it again."""
    try:
        drain_logs()
        threading.__excepthook__(died)      # its traceback, on stderr
    finally:
        os._exit(1)


def serve(settings, stores):
    """Serves until a stop signal; raises IdpotError where it cannot start."""
    try:
        # A stop signal ends a start that waits for a silent database, as the kernel does it; as
        # PID 1, which the kernel spares, it is obeyed when that try is over.
        if os.getpid() > 1:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        description = stores[0].start()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        allocator = Allocator(stores, 10 * settings.timeout + 10)   # it may wait at each address
        listener = listen(*settings.listen)
        server = Server(settings, listener, allocator)
        threading.excepthook = end_process
        allocator.start(server.read, server.wake)
    except (OSError, RuntimeError) as error:    # the system has no more files, or threads
        raise IdpotError(str(error))
    where = f"unix:{listener.getsockname()}"
    if listener.family != socket.AF_UNIX:
        host, port = listener.getsockname()[:2]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if not (host.startswith("127.") or host == "::1" or settings.admintoken):
            log.warning("%s is not a loopback address and no Token is set: anybody who reaches it "
                        "can create, raise and use up pots", host)
    log.info("listening on %s (%s)", where, description)
    if not settings.logfile and sys.stderr.isatty():
        log.info("a line for each request follows; LogFile = /dev/null in the settings ends that")
    notify(f"READY=1\nSTATUS={description}")
    while not signal.sigtimedwait(STOPS, 0):    # to wait in it tells one twice after a SIGSTOP
        time.sleep(0.05)        # for Allocator.look()
        server.look()
    notify("STOPPING=1")
    server.stop()
    server.count_answers()
    log.info("stopped")


def run(arguments):
    settings = load_settings(arguments.config)
    settings.listen = arguments.listen or settings.listen
    stores = (MysqlStore if settings.mysql else SqliteStore).all(settings)
    if arguments.check:
        print(f"idpot: the settings are valid, {stores[0].probe()}")
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):      # a service manager may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # the soft one is for select(2)
    signal.pthread_sigmask(signal.SIG_BLOCK, [*STOPS, signal.SIGHUP])   # it is asked for them
    stderr = logging.StreamHandler()
    stderr.setFormatter(StderrFormatter(
        "%(asctime)s idpot[%(process)d] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    start_log(log, stderr)
    if settings.logfile:
        try:
            start_log(access, StrftimeFileHandler(settings.logfile, settings.loglinkname))
        except OSError as error:
            raise IdpotError(f"LogFile or LogLinkName: {error}")
    try:
        serve(settings, stores)
    finally:
        drain_logs()
    os._exit(0)     # a log's thread may be in a write for ever, which sys.exit() would wait for


def main(argv=None):
    """Runs the command line; returns the exit code: 0 after --check, 1 no start, 78 wrong settings.
    A server that stops ends the process by itself, with 0."""
    parser = argparse.ArgumentParser(
        prog="idpot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="settings; else SQLite in ./idpot.db")
    parser.add_argument("--listen", metavar="HOST:PORT", type=split_address,
                        help="address, in place of the file's")
    parser.add_argument("--check", action="store_true", help="check settings and database, exit")
    parser.add_argument("--version", action="version", version=f"idpot {__version__}")
    arguments, others = parser.parse_known_args(argv)
    if others:
        parser.error(f"unrecognized: {others[0]}; a settings file is given as --config=FILE")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where standard descriptors are closed, the next files must not be taken for them.
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    try:
        run(arguments)
        return 0
    except IdpotError as error:
        prefix = "<3>" if under_journald() else "idpot: "
        print(prefix + error.detail, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
