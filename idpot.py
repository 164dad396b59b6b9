"""idpot hands out serial 64-bit unsigned IDs over HTTP, from MySQL, MariaDB or an embedded SQLite file.

    python3 idpot.py                        # SQLite in ./idpot.db, http://127.0.0.1:8080
    python3 idpot.py --config=idpot.cfg     # MySQL or MariaDB, as the file says

A pot is a named counter:

    POST /pot/create    form name=foo&min=10: 201, or 409 where the pot exists
    GET  /pot/foo       204, or 404
    POST /id/foo        200 and the next ID, first min+1; with count=N (1..10000) N IDs, one per line
    GET  /id/foo        200 and the current ID, which stays
    GET  /pot           200, a line per pot: name, tab, current ID
    POST /pot/raise     form name=foo&min=N: the counter goes up to N if it is lower; 200 and its value
    GET  /healthz       200 when an ID could be issued now, else 503 and why
    GET  /metrics       Prometheus text format

An ID that was answered is never answered again from that pot, by any process, after any crash that the
storage engine survives; each answer is greater than all answers that ended before its request began. The
value is in the database before the answer leaves, and nothing is fetched ahead.
"""

import argparse
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
import itertools
import logging
import math
import mmap
import os
import random
import re
import resource
import select
import signal
import socket
import sqlite3
import ssl
import stat
import sys
import threading
import time
import types
import urllib.parse

__version__ = "1.0.0"

MAX_ID = 2**64 - 1
MAX_COUNT = 10000
POT_NAME = re.compile("[A-Za-z0-9_-]{1,60}")    # the table is pot_ + name; MySQL allows 64 characters

log = logging.getLogger("idpot")
access_log = logging.getLogger("idpot.access")


# ------------------------------------------------------------------------------------------------ errors

class IdpotError(Exception):
    """An answer other than success: `status` is its HTTP status, str() the one line that its body says."""
    status = 500
    headers = b""


class BadRequest(IdpotError):
    """The request is malformed, or a value in it is; another status than 400 may be given with it."""

    def __init__(self, text, status=400, headers=b""):
        super().__init__(text)
        self.status, self.headers = status, headers


class Unauthorized(IdpotError):
    """The bearer token is missing or wrong (RFC 6750)."""
    status = 401
    headers = b"WWW-Authenticate: Bearer\r\n"


class NotFound(IdpotError):
    """There is no such pot, or no such path."""
    status = 404


class Exists(IdpotError):
    """The pot to be created exists."""
    status = 409


class Exhausted(IdpotError):
    """Fewer IDs are left in the pot, up to 2**64-1, than were asked for."""
    status = 409


class Unavailable(IdpotError):
    """The database cannot issue an ID now; the same request may succeed later."""
    status = 503
    headers = b"Retry-After: 1\r\n"


class Broken(Unavailable):
    """The pot's table has no row, or several, or no column id: there is no ID until somebody has mended it."""


class Retry(Unavailable):
    """Trying again at once, on a new connection, may help."""


class StartError(IdpotError):
    """The server cannot start."""
    exit_code = 1


class SettingsError(StartError, argparse.ArgumentTypeError):
    """A setting is wrong, so that starting again cannot help; argparse shows it as wrong usage for an option."""
    exit_code = 78      # EX_CONFIG of sysexits.h


# ---------------------------------------------------------------------------------------------- settings

def shown(value):
    """The value in double quotes, cut and escaped, fit for a line of an answer or of the log."""
    return '"' + ascii(value[:100])[1:-1].replace('"', r'\"') + ("..." if len(value) > 100 else "") + '"'


def number(text, low, high, name=""):
    """The number that the text is in plain decimal digits; BadRequest when it is not one from low to high."""
    if re.fullmatch("[0-9]{1,20}", text) and low <= int(text) <= high:
        return int(text)
    raise BadRequest(f"{name} {shown(text)} is not a whole number from {low} to {high}".lstrip())


def split_address(text, default_port=None):
    """(host, port) of host:port, [IPv6]:port or :port; the host is empty for all interfaces."""
    match = re.fullmatch(r"(?:\[([^]]*)\]|([^:\[\]]*))(?::([0-9]{1,5}))?", text)
    port = match and (match[3] or default_port)
    if not port or int(port) > 65535:
        raise SettingsError(f"{shown(text)} is not host:port")
    return match[1] or match[2] or "", int(port)


def seconds(text):
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise SettingsError(f"{shown(text)} is not a number of seconds above 0, at most 86400")


def go_duration(text):
    """Seconds of a Go duration such as 1m30s or 500ms."""
    units = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    if text == "0":
        return 0
    parts = re.findall(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|ms|s|m|h)", text)
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
    "timeout": ("connection_timeout", go_duration), "readTimeout": ("read_timeout", go_duration),
    "writeTimeout": ("write_timeout", go_duration), "collation": ("collation", str),
    "charset": ("charset", lambda text: text.split(",")[0]), "tls": ("tls", tls_mode)}
DSN_IGNORED = frozenset("""allowAllFiles allowCleartextPasswords allowFallbackToPlaintext allowNativePasswords
    allowOldPasswords checkConnLiveness clientFoundRows columnsWithAlias compress connectionAttributes
    interpolateParams loc maxAllowedPacket multiStatements parseTime rejectReadOnly serverPubKey strict
    timeTruncate""".split())    # they mean nothing to idpot


def parse_dsn(text):
    """What a DSN of go-sql-driver/mysql says: arguments of mysql.connector.connect, and `hosts`, the
    (host, port) pairs to try in order, `variables`, the session variables to SET, and `tls`.

    Raises SettingsError, which never shows the password.
    """
    left, slash, right = text.rpartition("/")
    credentials, _, address = left.rpartition("@")
    user, _, password = credentials.partition(":")
    net, parenthesis, inside = address.partition("(")
    database, _, query = right.partition("?")
    dsn = {"user": user, "password": password, "database": urllib.parse.unquote(database), "hosts": [],
           "variables": {}, "tls": "preferred"}
    if not slash or not database:
        raise SettingsError("there is no database name after a last /")
    if parenthesis and not inside.endswith(")"):
        raise SettingsError(f"{shown(address)} has no closing parenthesis at its end")
    if net == "unix":
        dsn["unix_socket"] = inside[:-1] or "/tmp/mysql.sock"
    elif net in ("", "tcp", "tcp4", "tcp6"):
        addresses = [split_address(one.strip(), 3306) for one in (inside[:-1] or "127.0.0.1").split(",")]
        dsn["hosts"] = [(host or "127.0.0.1", port) for host, port in addresses]
    else:
        raise SettingsError(f"{shown(net)} is neither tcp nor unix")
    for parameter, equals, value in (pair.partition("=") for pair in query.split("&")):
        value = urllib.parse.unquote_plus(value)
        if parameter in DSN_PARAMETERS:
            name, convert = DSN_PARAMETERS[parameter]
            dsn[name] = convert(value)
        elif equals and parameter not in DSN_IGNORED:
            if parameter.lower().endswith("autocommit"):
                raise SettingsError("autocommit cannot be set: an ID is in the database before it is answered")
            if not re.fullmatch(r"@{0,2}[A-Za-z0-9_.$]+", parameter):
                raise SettingsError(f"{shown(parameter)} is not the name of a session variable")
            dsn["variables"][parameter] = value
    return dsn


SETTINGS = {    # section -> name -> (default as the file writes it, converter)
    "Server": {
        "Listen": ("127.0.0.1:8080", split_address),
        "LogFile": ("", str),               # strftime pattern; empty: the access log goes to stderr
        "LogLinkName": ("", str),           # symlink to the newest log file
        "Token": ("", str),                 # bearer token asked for everything but /healthz
        "AdminToken": ("", str),            # asked for create and raise; empty: Token is
        "Workers": ("1", lambda text: number(text, 1, 64)),
        "Timeout": ("10", seconds),         # that a request may wait for the database, then 503
        "RequestTimeout": ("10", seconds),  # for a whole request to arrive, then 408
        "IdleTimeout": ("60", seconds),     # without a request, then the connection is closed
        "MaxConnections": ("1024", lambda text: number(text, 1, 1000000)),
    },
    "Mysql": {
        "ConnectString": ("", lambda text: text and parse_dsn(text)),
        "Hostname": ("127.0.0.1", str),
        "Port": ("3306", lambda text: number(text, 1, 65535)),
        "Username": ("root", str),
        "Password": ("", str),
        "Dbname": ("idpot", str),
        "Engine": ("MyISAM", engine_name),
    },
    "Sqlite": {"File": ("idpot.db", str)},
}


class ConfigReader(configparser.RawConfigParser):
    """Reads the format of gcfg, which go-idpot used: values bare or in double quotes, comments after them."""
    SECTCRE = re.compile(r"\[\s*(?P<header>[^]\s][^]]*?)\s*\]\s*(?:[;#].*)?$")
    VALUE = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^";#])*)(?:[;#].*)?')
    ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "t": "\t"}

    def __init__(self):
        super().__init__(delimiters="=", comment_prefixes=(";", "#"), default_section="")
        self.everybody = False      # whether all users can read the file

    def entries(self, path):
        """Yields (line number, section, name in lower case, raw value), and (0, section, None, "") per section."""
        def numbered(file):     # configparser knows no line numbers: they travel at the head of the value
            for at, line in enumerate(file, 1):
                name, equals, value = line.strip().partition("=")
                yield f"{name}={at} {value}" if equals and name[:1] not in ("[", ";", "#") else line.strip()

        with open(path, encoding="utf-8-sig") as file:
            self.everybody = bool(os.fstat(file.fileno()).st_mode & stat.S_IROTH)
            self.read_file(numbered(file), path)
        for section in self.sections():
            yield 0, section, None, ""
            for name, value in self.items(section):
                at, _, text = value.partition(" ")
                yield int(at), section, name, text

    @classmethod
    def unquote(cls, text):
        match = cls.VALUE.fullmatch(text)
        if not match:
            raise SettingsError("a double quote is not closed")
        return re.sub('"((?:[^"\\\\]|\\\\.)*)"', lambda quoted: re.sub(r"\\(.)", cls.unescape, quoted[1]),
                      match[1].strip())

    @classmethod
    def unescape(cls, escaped):
        if escaped[1] not in cls.ESCAPES:
            raise SettingsError(rf"\{escaped[1]} is not one of \\ \" \n \t")
        return cls.ESCAPES[escaped[1]]


def load_settings(path=None):
    """The settings of the file, or the defaults: each name in lower case, and `store`, `dsn`, `path`, `readable`.

    An empty value means the default. Raises SettingsError with file, line and name.
    """
    rows = {(section.lower(), name.lower()): (name, *row) for section in SETTINGS
            for name, row in SETTINGS[section].items()}
    values = {name.lower(): convert(default) for name, default, convert in rows.values()}
    reader, given, where = ConfigReader(), set(), path
    try:
        for line, section, name, text in reader.entries(path) if path else ():
            where = f"{path}:{line}" if line else path
            if section.lower() not in map(str.lower, SETTINGS):
                raise SettingsError(f"unknown section [{section}]")
            given.add(section.lower())
            if name and (section.lower(), name) not in rows:
                raise SettingsError(f"unknown name {shown(name)} in [{section}]")
            if text:
                written, _, convert = rows[section.lower(), name]
                try:
                    text = ConfigReader.unquote(text)
                    values[name] = convert(text) if text else values[name]
                except IdpotError as error:
                    raise SettingsError(f"{written}: {error}")
        where = path
        if given >= {"mysql", "sqlite"}:
            raise SettingsError("[Mysql] and [Sqlite] are both given: keep one")
        if values["workers"] > 1 and "mysql" not in given:
            raise SettingsError("Workers above 1 need [Mysql]: an SQLite file belongs to one process")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or error}")
    except configparser.Error as error:     # its text could show a password
        line = getattr(error, "lineno", None) or error.errors[0][0]
        reason = "is there twice" if "Duplicate" in type(error).__name__ else "is neither [section] nor name = value"
        raise SettingsError(f"{path}:{line}: this {reason}")
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}")
    values["dsn"] = values["connectstring"] or {
        "user": values["username"], "password": values["password"], "database": values["dbname"],
        "hosts": [(values["hostname"], values["port"])], "variables": {}, "tls": "preferred"}
    values.update(admintoken=values["admintoken"] or values["token"], no_token="")
    return types.SimpleNamespace(**values, path=path, readable=reader.everybody,
                                 store=MysqlStore if "mysql" in given else SqliteStore)


# -------------------------------------------------------------------------------------------------- logs

class StrftimeFileHandler(logging.Handler):
    """Appends to the file that a strftime pattern names now, with a symlink to it; a record is one line or many.

    A file that cannot be written is told once on stderr and tried again at the next record.
    """

    def __init__(self, pattern, link="", clock=time.time):
        super().__init__()
        self.pattern, self.link, self.clock = pattern, link, clock
        self.path = self.file = None        # the path is None while no file is open
        self.failed = self.torn = False     # whether the last write failed, and after half a line
        self._open()

    def _open(self):
        """Opens the file of this moment unless it is open."""
        path = time.strftime(self.pattern, time.localtime(self.clock()))
        if path == self.path:
            return
        self.reopen()
        self.file, self.path = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640), path
        if self.link:
            if os.path.lexists(self.link) and not os.path.islink(self.link):
                raise OSError(errno.EEXIST, "LogLinkName is there and is not a symlink", self.link)
            new = f"{self.link}.{os.getpid()}"
            os.symlink(os.path.relpath(path, os.path.dirname(self.link) or "."), new)
            os.replace(new, self.link)      # atomic: the link never misses

    def emit(self, record):
        data = whole = memoryview(("\n" * self.torn + record.getMessage() + "\n").encode("ascii", "backslashreplace"))
        try:
            self._open()
            while data:     # with O_APPEND the lines of several processes do not mix
                data = data[os.write(self.file, data):]
            self.failed = self.torn = False
        except OSError as error:
            self.torn = self.torn or len(data) < len(whole)
            if not self.failed:
                log.error("the access log cannot be written, its lines are lost: %s", error)
            self.failed = True

    def reopen(self):
        """Closes the file; the next record opens it anew, after logrotate has moved it."""
        with self.lock:
            if self.path is not None:
                self.path = None
                os.close(self.file)


class AccessLog:
    """Lines of the NCSA combined format, gathered and written in one piece at each `flush`.

    When the disk hangs, the newest lines are kept, up to a limit.
    """
    UNSAFE = re.compile(rb'["\\\x00-\x1f\x7f-\xff]')

    def __init__(self):
        self._lines = collections.deque(maxlen=200000)

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def times(second):
        """The log's time, and the Date header's (RFC 9110, 6.6.1)."""
        return (time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(second)),
                email.utils.formatdate(second, usegmt=True).encode())

    def add(self, host, moment, line, status, size, tail):
        self._lines.append(f'{host} - - [{moment}] "{line}" {status} {size or "-"} {tail}')

    def flush(self):
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if lines:
            access_log.info("%s", "\n".join(lines))

    @classmethod
    def escape(cls, data):
        """The bytes as Apache logs them: quotes and backslashes escaped, others as \\xhh."""
        return cls.UNSAFE.sub(lambda m: b"\\" + m[0] if m[0] in b'"\\' else b"\\x%02x" % m[0][0], data).decode()


def open_logs(settings):
    """Sends events to stderr and the access log to LogFile, else stderr too; returns its handler."""
    events = logging.StreamHandler()
    events.setFormatter(logging.Formatter("%(asctime)s idpot[%(process)d] %(levelname)s %(message)s",
                                          "%Y-%m-%d %H:%M:%S"))
    try:
        lines = (StrftimeFileHandler(settings.logfile, settings.loglinkname) if settings.logfile
                 else logging.StreamHandler())
    except OSError as error:
        raise StartError(f"LogFile {shown(error.filename or settings.logfile)}: {error.strerror}")
    log.handlers, access_log.handlers, access_log.propagate = [events], [lines], False
    log.setLevel(logging.INFO)
    return lines


# ------------------------------------------------------------------------ what the worker processes share

class Marks:
    """The highest ID given per pot by this server, in memory that forked workers share.

    Each worker has two words in a pot's slot, its highest ID and a number that is odd while it has a statement under
    way. It writes only these, and only from the one thread that serves the pot, so a write needs no lock. A pot gets
    its slot with the first ID that is given, so that unknown names take none: that first statement is not noted. Its
    name is then appended to a file of names, in one write; where two workers do so at once, the first counts for both.
    """
    SLOTS = 1 << 20
    NAME = 64           # bytes of a name

    def __init__(self, workers):
        self._workers, self.worker = workers, 0
        self._names, words = os.memfd_create("names"), os.memfd_create("words")
        fcntl.fcntl(self._names, fcntl.F_SETFL, os.O_APPEND)
        os.write(self._names, bytes(self.NAME))                 # slot 0 is no pot's
        os.ftruncate(words, 8 * 2 * workers * 2 * self.SLOTS)   # sparse, so room for those appended at once costs nothing
        self._words = memoryview(mmap.mmap(words, 0)).cast("Q")
        self._known, self._read = {}, 0         # pot -> its first word's index; the names that were read
        self._lock = threading.Lock()           # guards these

    def get(self, pot):
        at = self._known.get(pot) or self._find(pot)
        return max(self._words[at:at + self._workers]) if at else 0

    def put(self, pot, last):
        at = self._known.get(pot) or self._find(pot) or self._append(pot)
        if last > self._words[at + self.worker]:
            self._words[at + self.worker] = last

    def begin(self, pot):
        """Notes that a statement on the pot is under way, until end()."""
        at = self._known.get(pot) or self._find(pot)
        if at:
            at += self._workers + self.worker
            self._words[at] = self._words[at] + 1 | 1

    def end(self, pot):
        at = self._known.get(pot)
        if at:
            at += self._workers + self.worker
            self._words[at] += self._words[at] & 1

    def settled(self, pot, patience):
        """As get(), once the statements of other workers that are under way have ended, or patience seconds are over,
        longer than one can take: then its worker was killed amid it."""
        self.end(pot)
        at, limit = self._known[pot] + self._workers, time.monotonic() + patience
        before = self._words[at:at + self._workers].tolist()
        while time.monotonic() < limit and any(
                was & 1 and was == now for was, now in zip(before, self._words[at:at + self._workers])):
            time.sleep(0.001)
        self.begin(pot)
        return self.get(pot)

    def _find(self, pot):
        with self._lock:
            while name := os.pread(self._names, self.NAME, self.NAME * self._read):
                self._known.setdefault(name.rstrip(b"\0").decode(), 2 * self._workers * self._read)
                self._read += 1
            return self._known.get(pot)

    def _append(self, pot):
        if self._read >= self.SLOTS:
            raise Unavailable(f"more than {self.SLOTS} pots are in use")
        os.write(self._names, pot.encode().ljust(self.NAME, b"\0"))
        return self._find(pot)


METHODS = ("GET", "HEAD", "POST", "other")
STATUSES = (200, 201, 204, 400, 401, 404, 405, 408, 409, 413, 414, 415, 417, 431, 500, 501, 503, 505)
# MySQL's errors that a new connection or a moment may mend: 1047, 1180, 1205 and 1213 of Galera and locks; 1290, 1792
# and 1836 of a server that became read-only; 2xxx, 3024 and -1 of a connection that is lost or too slow.
RETRY = (-1, 1020, 1021, 1040, 1047, 1053, 1114, 1129, 1152, 1158, 1159, 1160, 1161, 1180, 1194, 1195, 1203, 1205, 1213,
         1290, 1317, 1792, 1836, 1927, 1969, 2002, 2003, 2005, 2006, 2013, 2055, 3024, 3100, 3101, 4031)
ERRNOS = (*RETRY, 1044, 1045, 1142, "other")
ROUTES = ("/id/{pot}", "/pot/{pot}", "/pot/create", "/pot/raise", "/pot", "/healthz", "/metrics", "other")
METRICS = {     # name -> (help, label names, all label values)
    "idpot_http_requests_total": ("Requests answered.", ("route", "method", "code"),
                                  list(itertools.product(ROUTES, METHODS, STATUSES))),
    "idpot_ids_issued_total": ("IDs taken from pots.", (), [()]),
    "idpot_db_statements_total": ("Statements that took IDs, each for all who waited.", (), [()]),
    "idpot_db_seconds_total": ("Time spent in the database, summed over connections.", (), [()]),
    "idpot_db_errors_total": ("Errors of the database.", ("errno",), [(number,) for number in ERRNOS]),
    "idpot_db_retries_total": ("Requests that were put into a further statement.", (), [()]),
    "idpot_connections": ("Open HTTP connections.", (), [()]),
}


class Counters:
    """Whole numbers for /metrics in memory that forked workers share: each adds to its own row, all are summed."""
    INDEX = {key: at for at, key in enumerate(
        [("heartbeat",), *((name, *labels) for name, metric in METRICS.items() for labels in metric[2])])}

    def __init__(self, workers):
        self._words = memoryview(mmap.mmap(-1, 8 * workers * len(self.INDEX))).cast("Q", (workers, len(self.INDEX)))
        self._lock, self._workers, self.worker = threading.Lock(), workers, 0
        self.started = time.time()

    def add(self, amount, *key):
        with self._lock:
            self._words[self.worker, self.INDEX[key]] += amount

    def set(self, amount, *key):
        self._words[self.worker, self.INDEX[key]] = amount

    def rows(self, *key):
        """The number of each worker."""
        return [self._words[worker, self.INDEX[key]] for worker in range(self._workers)]

    def text(self, backend):
        """The Prometheus text format, version 0.0.4; a series with labels appears when it has counted."""
        python, lines = sys.version.split()[0], []
        for name, (meaning, labels, values) in METRICS.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {'counter' if '_total' in name else 'gauge'}"]
            for value in values:
                total = sum(self.rows(name, *value))
                pairs = ",".join(f'{label}="{text}"' for label, text in zip(labels, value))
                if pairs and total:
                    lines.append(f"{name}{{{pairs}}} {total}")
                elif not pairs:     # time is counted in nanoseconds
                    lines.append(f"{name} {total / 1e9 if 'seconds' in name else total}")
        return "\n".join([
            *lines, "# HELP idpot_build_info The version that runs.", "# TYPE idpot_build_info gauge",
            f'idpot_build_info{{version="{__version__}",python="{python}",backend="{backend}"}} 1',
            "# HELP process_start_time_seconds Start of the server since the epoch.",
            "# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {self.started:.3f}", ""])


# ------------------------------------------------------------------------------------------------ stores
#
# A store keeps the pots and is used by one thread at a time. take(pot, count, marks) adds count to the larger of the
# counter and the pot's mark, durably as far as the engine goes, and returns the new value, which ends the range taken.
# current, create, raise_to, pots and check do what the API says. They raise NotFound, Exists, Exhausted, Broken,
# Unavailable, and Retry where the same call may help. start() connects, logs what the engine does not promise,
# returns a description of the store, and raises StartError.

class SqliteStore:
    """One SQLite file that this process locks; WAL with synchronous=FULL loses nothing at a power cut.

    SQLite's integers are signed, so an ID from 2**63 up is kept as ID - 2**64, and IDs are added to in Python.
    """
    backend = "sqlite"
    connections = 1

    def __init__(self, settings, counters):
        self._path, self._counters, self._db = settings.file, counters, None

    def start(self):
        try:
            self._db = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("CREATE TABLE IF NOT EXISTS pot (name TEXT PRIMARY KEY, id INTEGER NOT NULL)")
            self._db.execute("BEGIN IMMEDIATE").execute("COMMIT")
        except sqlite3.Error as error:
            reason = "another process uses it" if "locked" in str(error) else error
            raise StartError(f"SQLite file {shown(self._path)}: {reason}")
        if mode != "wal":
            raise StartError(f"SQLite file {shown(self._path)} does not take the WAL journal, but {mode}")
        return f"SQLite {self._path}"

    def _execute(self, statement, *values):
        try:
            return self._db.execute(statement, values)
        except sqlite3.IntegrityError:
            raise Exists(f"pot {shown(values[0])} exists")
        except sqlite3.Error as error:
            self._counters.add(1, "idpot_db_errors_total", "other")
            log.warning("SQLite: %s", error)
            raise Unavailable(f"SQLite: {error}")

    def take(self, pot, count, marks):
        last = max(self.current(pot), marks.get(pot)) + count
        if last > MAX_ID:
            raise Exhausted(f"pot {shown(pot)} is exhausted: fewer than {count} IDs are left")
        return self._set(pot, last)

    def current(self, pot):
        row = self._execute("SELECT id FROM pot WHERE name = ?", pot).fetchone()
        if not row:
            raise NotFound(f"there is no pot {shown(pot)}")
        return row[0] % 2**64

    def _set(self, pot, value):
        self._execute("UPDATE pot SET id = ? WHERE name = ?", value - 2**64 if value >> 63 else value, pot)
        return value

    def create(self, pot, low):
        self._execute("INSERT INTO pot (name, id) VALUES (?, ?)", pot, low - 2**64 if low >> 63 else low)

    def raise_to(self, pot, low):
        return self._set(pot, max(self.current(pot), low))

    def pots(self):
        return [(name, value % 2**64) for name, value in self._execute("SELECT name, id FROM pot ORDER BY name")]

    def check(self):
        self._execute("PRAGMA user_version = 1")    # a write: a full disk lets a transaction begin

    def close(self):
        self._db.close()


class MysqlStore:
    """A connection to MySQL or MariaDB, made when it is first needed and thrown away after any trouble.

    A pot is go-idpot's table: `pot_NAME (id BIGINT UNSIGNED NOT NULL)` with one row.
    """
    backend = "mysql"
    connections = 8     # so many slow pots do not hold up the others; MySQL allows 151 connections by default

    NOT_REPLICATED = "a Galera node replicates InnoDB only, not {}"

    def __init__(self, settings, counters):
        try:
            import mysql.connector      # only where it is configured: SQLite is served with nothing installed
        except ImportError:
            raise StartError("[Mysql] needs mysql-connector-python: python3 -m pip install 'mysql-connector-python>=9.2'")
        self._driver, self._counters, self._engine = mysql.connector, counters, settings.engine
        # Of the time that a request may wait, half is for the first server to answer, the rest for the next one.
        self._lock_wait = max(1, math.ceil(settings.timeout / 2) - 1)
        dsn = dict(settings.dsn)
        self._hosts, self._variables, self._tls = dsn.pop("hosts"), dsn.pop("variables"), dsn.pop("tls")
        self._where = dsn.get("unix_socket") or ",".join(f"{host}:{port}" for host, port in self._hosts)
        self._arguments = {"autocommit": True, "client_flags": [mysql.connector.ClientFlag.FOUND_ROWS],
                           "ssl_disabled": self._tls == "false", **dsn}
        half = settings.timeout / 2
        for name, limit in (("connection_timeout", min(3, half / 2)), ("read_timeout", half), ("write_timeout", half)):
            self._arguments[name] = math.ceil(dsn.get(name) or limit)       # the driver takes whole seconds, 0 is none
        if dsn.get("charset", "utf8mb4") == "utf8mb4":      # the driver's own default is unknown to older MariaDB
            self._arguments.setdefault("collation", "utf8mb4_general_ci")
        if self._tls == "true":
            paths = ssl.get_default_verify_paths()
            self._arguments.update(ssl_verify_cert=True, ssl_verify_identity=True,
                                   ssl_ca=paths.cafile or paths.openssl_cafile)
        self._connection = None
        self._trouble = None    # the error number that was logged last, until the database answers again

    def start(self):
        try:
            self._connection = self._connect()
            self._check_engine()
        except self._driver.Error as error:
            kind = SettingsError if error.errno in (1193, 1231, 1232) else StartError   # of a session variable
            raise kind(f"MySQL {self._where}: {error.msg}")
        return f"MySQL {self._where}/{self._arguments['database']}, {self._engine}"

    def _connect(self):
        """A connection to the first address where IDs can be issued; raises the last address's error.

        A Galera node that feeds a joining one says that it is ready, and lets every write hang: it comes last.
        """
        spare = None
        for host, port in self._hosts or [(None, None)]:
            try:
                connection = self._driver.connect(**self._arguments, **({"host": host, "port": port} if host else {}))
                try:
                    if self._prepare(connection):
                        return connection
                except self._driver.Error:
                    connection.close()
                    raise
                spare = spare or connection
            except self._driver.Error as error:
                last = error
        if spare:
            return spare
        raise last

    def _prepare(self, connection):
        variables = {"lock_wait_timeout": self._lock_wait, "innodb_lock_wait_timeout": self._lock_wait,
                     "sql_safe_updates": 0, "sql_mode": "'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'", **self._variables}
        connection.cmd_query("SET SESSION " + ", ".join(f"{name}={value}" for name, value in variables.items()))
        if self._tls == "skip-verify" and not self._select(connection, "SHOW STATUS LIKE 'Ssl_cipher'")[0][1]:
            raise self._driver.Error("the server offers no TLS", errno=2026)
        return self._check_writable(connection)

    def _check_writable(self, connection):
        """Whether the server is no Galera node in a state transfer; raises the driver's error where it takes no writes."""
        state = self._variables_of(connection, "read_only", "wsrep_on")
        node = {"wsrep_ready": "ON", "wsrep_local_state": "4"}      # 4: Synced
        if state.get("wsrep_on") == "ON":
            node.update(self._select(connection, f"SHOW GLOBAL STATUS WHERE Variable_name IN {tuple(node)}"))
        if node["wsrep_ready"] != "ON":
            raise self._driver.Error("the Galera node is not ready", errno=1047)
        if state.get("read_only", "OFF") not in ("OFF", "0"):
            raise self._driver.Error("the server is read-only", errno=1290)
        return node["wsrep_local_state"] == "4"

    @staticmethod
    def _select(connection, query):
        connection.cmd_query(query)     # a cursor would ping the server first
        return connection.get_rows()[0]

    def _variables_of(self, connection, *names):
        return dict(self._select(connection, f"SHOW GLOBAL VARIABLES WHERE Variable_name IN {names}"))

    def _has_engine(self, connection):
        return any(name.lower() == self._engine.lower() and support in ("YES", "DEFAULT")
                   for name, support, *_ in self._select(connection, "SHOW ENGINES"))

    def _check_engine(self):
        """Warns of an engine that forgets IDs at a power cut; refuses one that is missing or wrong for Galera."""
        state = self._variables_of(self._connection, "wsrep_on", "innodb_flush_log_at_trx_commit", "flush")
        if not self._has_engine(self._connection):
            raise SettingsError(f"Engine: the server has no storage engine {shown(self._engine)}")
        engines = {self._engine.lower(): (self._engine, "Engine")}      # of new pots, and of those that are there
        for table, engine in self._tables():
            engines.setdefault(engine.lower(), (engine, f"table {table}"))
        for name, (engine, where) in engines.items():
            if name != "innodb" and state.get("wsrep_on") == "ON":
                raise SettingsError(f"{where}: {self.NOT_REPLICATED.format(engine)}")
        if "innodb" in engines and state.get("innodb_flush_log_at_trx_commit") != "1":
            log.warning("innodb_flush_log_at_trx_commit is not 1: IDs of the last second come again after a power cut")
        weak = [engine for name, (engine, _) in engines.items() if name not in ("innodb", "aria", "rocksdb")]
        if weak and state.get("flush") != "ON":
            log.warning("Engine %s does not survive a power cut: IDs of the last half minute may come again; "
                        "InnoDB loses none", ", ".join(weak))

    def _tables(self):
        query = (r"SELECT table_name, engine FROM information_schema.tables WHERE table_schema = DATABASE() "
                 r"AND table_name LIKE 'pot\_%' AND engine IS NOT NULL")
        return [row for row in self._select(self._connection, query) if POT_NAME.fullmatch(row[0][4:])]

    @contextlib.contextmanager
    def _connected(self, pot=""):
        """The connection; errors of the driver become ours, and all but those about one pot end the connection."""
        sound = False
        try:
            if not self._connection:
                self._connection = self._connect()
            yield self._connection
            sound = True
            if self._trouble:
                self._trouble = None
                log.info("MySQL %s answers again", self._where)
        except self._driver.Error as error:
            sound = error.errno in (1146, 1054, 1264, 1690)
            if error.errno == 1146:
                raise NotFound(f"there is no pot {shown(pot)}")
            if error.errno == 1054:
                raise Broken(f"the table of pot {shown(pot)} has no column id")
            if error.errno in (1264, 1690):     # a column that is smaller than go-idpot's
                raise Exhausted(f"pot {shown(pot)} is exhausted: its column holds no greater number")
            self._counters.add(1, "idpot_db_errors_total", error.errno if error.errno in ERRNOS else "other")
            if self._trouble != error.errno:
                self._trouble = error.errno
                log.warning("MySQL %s: %s", self._where, error)
            kind = Retry if error.errno in RETRY else Unavailable
            raise kind(f"the database cannot serve this now (error {error.errno})")
        finally:
            if not sound:
                self.close()

    def _update(self, pot, value):
        """Sets the counter and returns the argument of LAST_INSERT_ID in one round trip; 0 where it was not called."""
        with self._connected(pot) as connection:
            done = connection.cmd_query(f"UPDATE `pot_{pot}` SET id = {value}")
        if done["affected_rows"] != 1:      # with FOUND_ROWS: the rows there are
            raise Broken(f"the table of pot {shown(pot)} has {done['affected_rows']} rows instead of one")
        return done["insert_id"]

    def take(self, pot, count, marks):
        # MariaDB's GREATEST(id, 5) is signed and fails from 2**63 up: with a CAST it serves the rare counter that is
        # below its mark; the statement of every day asks for a counter that is not.
        with self._connected(pot):      # first: others may give IDs while this one connects
            floor, limit = marks.get(pot), MAX_ID - count
        last = self._update(pot, f"IF(id BETWEEN {floor} AND {limit}, LAST_INSERT_ID(id + {count}), id)")
        if last:
            return last
        current = self.current(pot)
        if current < floor:
            floor = marks.settled(pot, self._arguments["read_timeout"] + 1)
            log.warning("the counter of pot %s was set back to %d, but %d was given: it goes on above that",
                        pot, current, floor)
        if max(current, floor) > limit:
            raise Exhausted(f"pot {shown(pot)} is exhausted: fewer than {count} IDs are left")
        higher = f"GREATEST(id, CAST({floor} AS UNSIGNED))"
        last = self._update(pot, f"IF(id <= {limit}, LAST_INSERT_ID({higher} + {count}), id)")
        if not last:
            raise Retry(f"the counter of pot {shown(pot)} is being changed by others")
        return last

    def current(self, pot):
        with self._connected(pot) as connection:
            rows = self._select(connection, f"SELECT id FROM `pot_{pot}` LIMIT 2")
        if len(rows) != 1:
            raise Broken(f"the table of pot {shown(pot)} has {'several rows' if rows else 'no row'} instead of one")
        if type(rows[0][0]) is not int:
            raise Broken(f"the table of pot {shown(pot)} holds no number")
        return rows[0][0]

    def create(self, pot, low):
        """Makes the table and its row under a lock, as go-idpot does: so a table without a row was left by a crash."""
        with self._connected(pot) as connection:
            if self._engine.lower() != "innodb" and self._variables_of(connection, "wsrep_on", "").get("wsrep_on") == "ON":
                raise Unavailable(self.NOT_REPLICATED.format(self._engine))
            if not self._select(connection, f"SELECT GET_LOCK('pot_{pot}', {self._lock_wait})")[0][0]:
                raise Retry(f"another create of pot {shown(pot)} takes too long")
            try:
                key = " PRIMARY KEY" if self._engine.lower() == "innodb" else ""    # Galera, Group Replication need one
                connection.cmd_query(f"CREATE TABLE IF NOT EXISTS `pot_{pot}` (id BIGINT UNSIGNED NOT NULL{key}) "
                                     f"ENGINE={self._engine}")
                empty = not self._select(connection, f"SELECT id FROM `pot_{pot}` LIMIT 1")
                if empty:
                    connection.cmd_query(f"INSERT INTO `pot_{pot}` (id) VALUES ({low})")
                self._select(connection, f"SELECT RELEASE_LOCK('pot_{pot}')")
            except self._driver.Error:
                self.close()    # and with it the lock
                raise
        if not empty:
            raise Exists(f"pot {shown(pot)} exists")

    def raise_to(self, pot, low):
        return self._update(pot, f"LAST_INSERT_ID(GREATEST(id, CAST({low} AS UNSIGNED)))")

    def pots(self):
        with self._connected():
            names = [table[4:] for table, _ in self._tables()]
        return sorted(row for at in range(0, len(names), 100) for row in self._currents(names[at:at + 100]))

    def _currents(self, pots):
        """(pot, current ID) of each, in one statement; "-" for a pot that has none."""
        with contextlib.suppress(NotFound, Broken), self._connected() as connection:
            rows = self._select(connection, " UNION ALL ".join(
                f"(SELECT '{pot}', id FROM `pot_{pot}` LIMIT 2)" for pot in pots))
            if sorted(pots) == sorted(pot for pot, _ in rows) and all(type(value) is int for _, value in rows):
                return rows
        return [(pots[0], "-")] if len(pots) == 1 else [row for pot in pots for row in self._currents([pot])]

    def check(self):
        with self._connected() as connection:
            self._check_writable(connection)
            if not self._has_engine(connection):
                raise Unavailable(f"the server has no storage engine {shown(self._engine)} now")

    def close(self):
        connection, self._connection = self._connection, None
        if connection:
            with contextlib.suppress(self._driver.Error):
                connection.close()


# -------------------------------------------------------------------------------------------- allocation

class Job:
    """What a request wants of a pot's store: `count` IDs, or with count 0 the method and arguments of `call`.

    done(value, error) is called once, by the worker, or by Allocator.expire when the time is over.
    """
    __slots__ = ("count", "call", "done", "gone", "start", "tries", "_open")

    def __init__(self, count, call, done, gone):
        self.count, self.call, self.done, self.gone = count, call, done, gone
        self.start, self.tries, self._open = time.monotonic(), 0, [True]

    def pending(self):
        return bool(self._open)

    def finish(self, value=None, error=None):
        try:
            self._open.pop()    # atomic: one of the threads that try gets it
        except IndexError:
            return
        self.done(value, error)


class Allocator:
    """Gathers jobs; all that wait for one pot are served together, by threads that take() a pot and serve() it.

    While a pot's statement runs, arrivals gather; the next statement takes the sum of their counts. A pot has one
    thread at most, so a slow pot holds up no other while a thread is free.
    """

    def __init__(self, settings, marks, counters, stores):
        self._settings, self._marks, self._counters = settings, marks, counters
        self._lock = threading.Lock()       # guards these four
        self._stores = stores               # that no thread uses; the one that was used last is the next
        self._jobs = {}                     # pot -> jobs that wait; it is there while a thread has the pot or should
        self._serving = {}                  # pot -> jobs that a thread has taken from there
        self._pots = collections.deque()    # pots that wait for a thread
        # Held while a group's answers are sent, and while the server reads what has come: two threads that take the
        # GIL from each other at each system call get less done (wrk -c64: 17,300/s; so 19,100/s).
        self.turn = threading.RLock()

    def submit(self, pot, job):
        with self._lock:
            if pot in self._jobs:
                return self._jobs[pot].append(job)
            self._jobs[pot] = [job]
            self._pots.append(pot)

    def waiting(self):
        """Whether a pot waits for a thread, and a store for a pot."""
        return bool(self._pots and self._stores)

    def take(self):
        """The next pot and a store, for serve(); None where no pot waits, or each store has one."""
        with self._lock:
            if not self.waiting():
                return None
            pot = self._pots.popleft()
            self._serving[pot], self._jobs[pot] = self._jobs[pot], []
            return pot, self._stores.pop()

    def expire(self, limit):
        """Fails the jobs that have waited for more than limit seconds."""
        oldest = time.monotonic() - limit
        with self._lock:
            late = [job for jobs in (*self._jobs.values(), *self._serving.values()) for job in jobs if job.start < oldest]
        for job in late:
            job.finish(error=Unavailable(f"the database did not answer in {self._settings.timeout:g} seconds"))

    def serve(self, pot, store):
        """Serves the jobs of a pot that was taken; after a random wait those that may be tried again wait anew."""
        jobs, again = self._serving[pot], []
        try:
            self._serve(pot, [job for job in jobs if self._wanted(job)], store)
        except Retry:
            again = [job for job in jobs if job.pending()]
            for job in again:
                job.tries += 1
            self._counters.add(len(again), "idpot_db_retries_total")
            time.sleep(random.uniform(0, min(1.0, 0.02 * 2 ** max((job.tries for job in again), default=0))))
        except Exception:
            log.exception("pot %s", pot)
            for job in jobs:
                job.finish(error=IdpotError("internal error"))
        with self._lock:
            self._stores.append(store)
            del self._serving[pot]
            self._jobs[pot][:0] = again     # before later ones
            if self._jobs[pot]:
                self._pots.append(pot)      # behind those that wait
            else:
                del self._jobs[pot]

    @staticmethod
    def _wanted(job):
        """False for a job that was told to wait no more, or whose client has closed after a second of waiting."""
        if time.monotonic() - job.start > 1 and job.gone():
            job.finish(error=Unavailable("the client has closed its side"))
        return job.pending()

    def _serve(self, pot, jobs, store):
        takes = [job for job in jobs if job.count]
        if takes:
            self._take(pot, takes, store)
        others = {}     # one statement answers all who ask the same, except that only one creates a pot
        for job in jobs:
            if job.call and job.pending():
                others.setdefault(job if job.call[0] == "create" else job.call, []).append(job)
        for group in others.values():
            self._call(pot, group, store)

    def _call(self, pot, jobs, store):
        (name, *arguments), value, failure = jobs[0].call, None, None
        try:
            value = self._timed(getattr(store, name), *arguments)
            if name == "raise_to":
                self._marks.put(pot, value)
        except IdpotError as error:
            # A probe is told soon, but the store's connection may have been lost while nobody used it.
            if isinstance(error, Retry) and (name != "check" or not any(job.tries for job in jobs)):
                raise
            failure = error
        with self.turn:
            for job in jobs:
                job.finish(value, failure)

    def _timed(self, call, *arguments):
        start = time.perf_counter_ns()
        try:
            return call(*arguments)
        finally:
            self._counters.add(time.perf_counter_ns() - start, "idpot_db_seconds_total")

    def _take(self, pot, jobs, store):
        total = sum(job.count for job in jobs)
        self._counters.add(1, "idpot_db_statements_total")
        self._marks.begin(pot)
        try:
            last = self._timed(store.take, pot, total, self._marks)
            self._marks.put(pot, last)
        except Retry:
            raise
        except IdpotError as error:
            if isinstance(error, Exhausted) and len(jobs) > 1:      # some of them may fit
                for job in jobs:
                    self._take(pot, [job], store)
            else:
                for job in jobs:
                    job.finish(error=error)
            return
        finally:
            self._marks.end(pot)
        self._counters.add(total, "idpot_ids_issued_total")
        last -= total
        with self.turn:
            for job in jobs:
                last += job.count
                job.finish(last)


# -------------------------------------------------------------------------------------------------- HTTP

MAX_LINE = 8192         # bytes of a request line, then 414
MAX_HEAD = 16384        # of the request line and all headers, then 431
MAX_FIELDS = 64         # headers, then 431
MAX_BODY = 65536        # bytes, then 413

REQUEST_LINE = rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9]\.[0-9])\r\n"
FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n"
HEAD = re.compile(REQUEST_LINE + b"((?:" + FIELD + rb")*)\r\n")
FIELDS = re.compile(rb"([^:\r\n]+):([^\r\n]*)\r\n")
FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")     # bare CR and LF too
HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
ABSOLUTE = re.compile(rb"(?i)https?://(?=[^/?:])" + HOST.pattern + b"(?=[/?]|$)")       # RFC 9112, 3.2.2
FORM = b"application/x-www-form-urlencoded"

ANSWER_HEADS = {status: b"HTTP/1.1 %d %s\r\nCache-Control: no-store\r\n" % (
    status, http.HTTPStatus(status).phrase.encode()) for status in STATUSES}
PLAIN = b"Content-Type: text/plain; charset=utf-8\r\n"
PROMETHEUS = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"

Request = collections.namedtuple("Request", "method path query route pot keep old length expect form token line tail")


def parse_target(target):
    """(path decoded once, query, route template, pot) of a request target; the route of an unknown path is other."""
    origin, absolute = ABSOLUTE.subn(b"", target, 1)
    if absolute and origin[:1] != b"/":
        origin = b"/" + origin
    if origin[:1] != b"/" or b"#" in origin:
        raise BadRequest(f"{shown(target.decode())} is not a request target")
    path, _, query = origin.decode().partition("?")
    if re.search("%(?![0-9A-Fa-f]{2})", path):
        raise BadRequest(f"{shown(path)} has a % without two hexadecimal digits")
    path = urllib.parse.unquote(path)
    parent, _, pot = path.rpartition("/")
    if path in ("/pot/create", "/pot/raise", "/pot", "/healthz", "/metrics"):
        route = path
    else:
        route = parent + "/{pot}" if parent in ("/id", "/pot") and POT_NAME.fullmatch(pot) else "other"
    return path, query, route, pot


def check_beginning(head):
    """Raises the BadRequest that the head, which need not be whole, already deserves."""
    line, end, _ = head.partition(b"\r\n")
    if len(line) > MAX_LINE:
        raise BadRequest("the request line is too long", 414)
    if len(head) > MAX_HEAD or head.count(b"\n") > MAX_FIELDS + 2:
        raise BadRequest("the header is too long", 431)
    if FORBIDDEN.search(head):
        raise BadRequest("a control character, bare CR or bare LF is in the header")
    if end and not re.fullmatch(REQUEST_LINE, line + end):
        raise BadRequest(f"{shown(line.decode('latin-1'))} is not a request line")


def parse_fields(lines):
    """The headers by lower-case name; those that say how the request is read must not come twice."""
    fields = {}
    for name, value in FIELDS.findall(lines):
        name, value = name.lower(), value.strip(b" \t")
        if name in fields and name in (b"host", b"content-length", b"transfer-encoding", b"authorization"):
            raise BadRequest(f"header {name.decode()} is there twice")
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


@functools.lru_cache(maxsize=2048)      # a client repeats its head to the byte: then 0.2 instead of 20 microseconds
def parse_head(head):
    """The Request of a whole head, up to its empty line; as strict as RFC 9112 allows. Raises BadRequest."""
    check_beginning(head)
    match = HEAD.fullmatch(head)
    if not match:
        raise BadRequest("a header line is malformed")
    method, target, version, lines = match.groups()
    if version not in (b"1.1", b"1.0"):
        raise BadRequest(f"HTTP/{version.decode()} is not spoken here", 505)
    fields, old = parse_fields(lines), version == b"1.0"
    if b"transfer-encoding" in fields:
        raise BadRequest("Transfer-Encoding is not supported: send Content-Length", 501)
    if not HOST.fullmatch(fields.get(b"host", b"" if old else b" ")):
        raise BadRequest("header Host is missing or malformed")       # RFC 9112, 3.2
    length = fields.get(b"content-length", b"0")
    if not re.fullmatch(b"[0-9]{1,19}", length):
        raise BadRequest(f"Content-Length {shown(length.decode('latin-1'))} is not a number")
    if int(length) > MAX_BODY:
        raise BadRequest(f"the body is longer than {MAX_BODY} bytes", 413)
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise BadRequest("Expect is understood as 100-continue only", 417)
    connection = {option.strip() for option in fields.get(b"connection", b"").lower().split(b",")}
    scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
    return Request(
        method.decode(), *parse_target(target), old=old, length=int(length), expect=b"expect" in fields and not old,
        keep=b"close" not in connection and (not old or b"keep-alive" in connection),
        form=fields.get(b"content-type", FORM).split(b";")[0].strip().lower(),
        token=token.strip() if scheme.lower() == b"bearer" else b"",
        line=AccessLog.escape(b"%s %s HTTP/%s" % (method, target, version)),
        tail=f'"{AccessLog.escape(fields.get(b"referer", b"-"))}" "{AccessLog.escape(fields.get(b"user-agent", b"-"))}"')


class Connection:
    """A client's connection; its requests are answered one after another.

    One thread at a time has it: the one that was told of an event on it, then the one that has the answer, which sends
    it, as that spares a switch to another. Then it waits for the client in Server.watch. Nothing here blocks.
    """

    def __init__(self, server, sock, host):
        self.server, self.sock, self.host = server, sock, host
        self.descriptor, self.events = sock.fileno(), 0
        self.buffer = self.body = self.rest = b""
        self.closing = self.continued = self.discarding = False
        self.since, self.deadline = 0.0, time.monotonic() + server.settings.idletimeout     # of waiting for the client

    def proceed(self):
        """Sends what is left of an answer, or answers one request, or leaves it to the allocator."""
        if self.rest:
            data, self.rest = self.rest, b""
            return self._send(data)
        request = None
        try:
            request = self._read()
            if not request:
                raise BlockingIOError
            self.closing = not request.keep or bool(self.server.stopping)
            self.server.answer(request, self)
        except BlockingIOError:
            if self.deadline:
                self.server.watch(self, select.EPOLLIN)
            else:       # it is being ended
                self.close()
        except (OSError, EOFError):     # the client has gone
            self.close()
        except IdpotError as error:
            self._fail(request, error)
        except Exception:
            log.exception("request from %s", self.host)
            self._fail(request, IdpotError("internal error"))

    def _fail(self, request, error):
        if request:
            return self.reply_error(request, error)
        line = AccessLog.escape(re.match(rb"[^\r\n]*", self.buffer)[0][:MAX_LINE]) or "-"     # no token of a header
        self.buffer, self.discarding = b"", True
        self.reply_error(Request("other", "", "", "other", *[None] * 7, line, '"-" "-"'), error)

    def close(self):
        self.server.connections.discard(self)
        self.server.count_connections()
        self.sock.close()

    def _read(self):
        """The next request, its body in self.body; None where it is not whole yet.

        Raises BlockingIOError where nothing has come, EOFError where the client has closed between requests, and
        BadRequest for what is no request, ends too soon or takes too long.
        """
        request = self._next_in_buffer() if self.buffer else None
        if request:
            return request
        late = self.buffer and time.monotonic() > self.deadline
        try:
            data = self.sock.recv(16384, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if not late:
                raise
        else:
            if not data:
                raise BadRequest("the request is cut off") if self.buffer.strip(b"\r\n") else EOFError
            if self.discarding:
                return None
            if not self.buffer:
                self.deadline = time.monotonic() + self.server.settings.requesttimeout
            self.buffer += data
            request = self._next_in_buffer()
        if late and not request:
            raise BadRequest("the request did not arrive in time", 408)
        return request

    def _next_in_buffer(self):
        if self.buffer.startswith(b"\r\n"):     # RFC 9112, 2.2; one stays, so that the time for a request runs
            self.buffer = re.sub(rb"\A(?:\r\n)+", b"", self.buffer) or b"\r\n"
            if self.buffer == b"\r\n":
                return None
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end == 3:
            return check_beginning(self.buffer)
        request = (parse_head if end <= 1024 else parse_head.__wrapped__)(self.buffer[:end])    # bounds the cache's size
        whole = end + request.length
        if len(self.buffer) < whole:
            if request.expect and not self.continued:
                self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
                self.continued = True
            return None
        self.body, self.buffer, self.continued = self.buffer[end:whole], self.buffer[whole:], False
        return request

    def reply_error(self, request, error):
        self.reply(request, error.status, f"{error}\n".encode(), error.headers)

    def reply(self, request, status, body, headers=b""):
        """Logs, counts and sends the answer in one piece."""
        server, method = self.server, request.method if request.method in METHODS else "other"
        sent = b"" if request.method == "HEAD" else body
        moment, date = server.access.times(int(time.time()))
        server.access.add(self.host, moment, request.line, status, len(sent), request.tail)
        server.counters.add(1, "idpot_http_requests_total", request.route, method, status)
        if status != 204:       # RFC 9110, 8.6
            headers += b"%sContent-Length: %d\r\n" % (b"" if headers == PROMETHEUS else PLAIN, len(body))
        if self.closing or not request.keep:
            headers += b"Connection: close\r\n"
        elif request.old:
            headers += b"Connection: keep-alive\r\n"
        self.deadline = time.monotonic() + server.settings.requesttimeout
        self._send(b"%sDate: %s\r\n%s\r\n%s" % (ANSWER_HEADS[status], date, headers, sent))

    def _send(self, data):
        try:
            data = data[self.sock.send(data, socket.MSG_DONTWAIT):]
        except BlockingIOError:
            pass
        except OSError:     # the client has gone: what else it has sent is not served
            return self.close()
        if data:
            self.rest = data        # until the client reads
            self.server.watch(self, select.EPOLLOUT)
        elif self.closing:
            self.close()
        else:
            self._sent()

    def _sent(self):
        settings, now, events = self.server.settings, time.monotonic(), select.EPOLLIN
        if self.discarding:
            # Closing with unread input would reset the connection and could destroy the answer (RFC 9112, 9.6).
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.deadline = now + 2
        elif self.buffer:
            self.deadline = now + settings.requesttimeout
            events |= select.EPOLLOUT       # a further request may be there, for a client that reads its answers
        else:
            self.deadline = now + settings.idletimeout
        self.server.watch(self, events)

    def gone(self):
        """Whether the client has closed its side; it may still read."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def fields(self, request):
        """The fields of the query and of the form in the body, each at most once."""
        if self.body and request.form != FORM:
            raise BadRequest(f"the body is {shown(request.form.decode('latin-1'))}, not {FORM.decode()}", 415)
        text, fields = f"{request.query}&{self.body.decode('latin-1')}", {}
        try:
            pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            raise BadRequest("the form is not UTF-8, or has too many fields")
        for name, value in pairs:
            if name in fields:
                raise BadRequest(f"{shown(name)} is given twice")
            fields[name] = value
        return fields


def digits(value):
    return 200, b"%d" % value


class Server(http.server.ThreadingHTTPServer):
    """The HTTP server: its threads, its limits, and what each route answers.

    Threads are kept, and two wait for all clients together. One that is told of requests reads them, serves their
    pots and sends the answers: a lone client's request meets one thread, which takes 2 switches of threads instead of
    3 (wrk -c1: 1,630/s -> 1,970/s). While a thread is in the database another one waits for clients.
    """

    def __init__(self, settings, listener, allocator, counters):
        super().__init__(listener.getsockname(), None, bind_and_activate=False)
        self.socket.close()
        self.socket, self.unix = listener, listener.family == socket.AF_UNIX
        if not self.unix:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # connections inherit it
        self.settings, self.allocator, self.counters = settings, allocator, counters
        self.access, self.connections = AccessLog(), set()
        self.stopping = 0.0         # when stop() was called
        self._waiting = {}          # descriptor -> connection that waits for its client; it is taken from here in turn
        self._resting = 0.0         # when to accept again
        self._rested = False        # whether the next client is accepted in any case
        self._idle = threading.Condition()      # guards these two; a thread that nobody needs waits for it
        self._polling = 0           # threads that wait for clients
        self._looked = 0.0          # when one has last looked for what takes too long
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN | select.EPOLLONESHOT)

    # Threads

    def start(self):
        """Starts the threads: one for each connection to the database, and two to wait for clients."""
        try:
            for _ in range(self.settings.store.connections + 2):
                threading.Thread(target=self.serve_forever, daemon=True).start()
        except RuntimeError as error:
            raise StartError(str(error))

    def serve_forever(self, poll_interval=0.2):
        """What each thread does."""
        while True:
            pause = 0.02 if self.stopping else poll_interval
            self._look_at_all(pause)
            taken = self.allocator.take()
            if taken:
                if not self._polling or self.allocator.waiting():
                    with self._idle:
                        self._idle.notify()
                self.allocator.serve(*taken)
                continue
            with self._idle:
                surplus = self._polling == 2    # more would take the events from each other
                if not surplus:
                    self._polling += 1
                elif not self.allocator.waiting():
                    self._idle.wait()
            if not surplus:
                self._poll(pause)

    def _poll(self, pause):
        """Waits for clients, and reads what they send."""
        events = self._epoll.poll(max(0, self._resting - time.monotonic()) if self._resting else pause)
        with self.allocator.turn:
            for descriptor, _ in events:
                connection = self._waiting.pop(descriptor, None)
                if connection:
                    connection.proceed()
                elif descriptor == self.socket.fileno():
                    self._handle_request_noblock()      # of socketserver: the three hooks below
                    self._listen()
        with self._idle:
            self._polling -= 1

    # Connections

    def get_request(self):
        """Accepts a connection; at a limit it ends the one that has been silent longest, or lets the backlog wait.

        With many more connections than another worker it waits a moment: both are told of a client, and the quicker
        one would take most of them.
        """
        rested, self._rested = self._rested, False
        if not rested and len(self.connections) > min(self.counters.rows("idpot_connections")) + 7:
            self._resting = time.monotonic() + 0.001
            raise BlockingIOError("another worker has fewer connections")
        try:
            if len(self.connections) >= self.settings.maxconnections:
                raise OSError(errno.EMFILE, "all connections are in use")
            return self.socket.accept()
        except OSError as error:
            scarce = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            if scarce and not (error.errno == errno.EMFILE and self._make_room()):
                self._resting = time.monotonic() + 0.05
            raise

    def process_request(self, request, client_address):
        connection = Connection(self, request, "127.0.0.1" if self.unix else client_address[0])
        self.connections.add(connection)
        self.count_connections()
        connection.proceed()

    def handle_error(self, request, client_address):
        log.warning("a connection could not be served: %s", sys.exc_info()[1])

    def count_connections(self):
        self.counters.set(len(self.connections), "idpot_connections")

    def _listen(self):
        """Has a thread told of the next client, unless that is to wait."""
        if not self._resting and not self.stopping:
            with contextlib.suppress(OSError, ValueError):      # stopped meanwhile
                self._epoll.modify(self.socket, select.EPOLLIN | select.EPOLLONESHOT)

    def watch(self, connection, events):
        """Leaves the connection to the thread that will be told of one of the events."""
        tell = self._epoll.modify if connection.events else self._epoll.register
        connection.events, connection.since = events, time.monotonic()
        with self.allocator.turn:   # when another thread had ended it in between, its descriptor could be a newcomer's
            self._waiting[connection.descriptor] = connection
            try:
                tell(connection.descriptor, events | select.EPOLLONESHOT)
            except OSError:         # ENOSPC: its time will be over
                pass

    def _look_at_all(self, interval):
        """Ends what has taken too long, if no thread has looked for an interval."""
        now = time.monotonic()
        if self._resting and now >= self._resting:
            self._resting, self._rested = 0.0, True
            self._listen()
        with self._idle:
            if now < self._looked + interval:
                return
            self._looked = now
        self.counters.set(int(now), "heartbeat")
        self.count_connections()
        timeout = self.settings.timeout
        self.allocator.expire(timeout - min(1, timeout / 4) if self.stopping else timeout)     # then there is time to answer
        with self.allocator.turn:
            for connection in list(self._waiting.values()):
                if now > self._end_of(connection):
                    self._end(connection)

    def _end_of(self, connection):
        """The time to end a connection. At a stop it is silent for half a second first: a request may be on its way."""
        if not self.stopping or connection.rest or connection.discarding:
            return connection.deadline
        return self.stopping + 1 if connection.buffer else connection.since + 0.5

    def _end(self, connection):
        """Ends a connection that waits, unless a request has come: with 408 for half of one (RFC 9110, 15.5.9)."""
        del self._waiting[connection.descriptor]
        connection.deadline = 0
        if connection.events == select.EPOLLIN:
            connection.proceed()
        else:       # it does not read its answers
            connection.close()

    def _make_room(self):
        """Ends the connection that has been silent longest; returns whether there was one."""
        silent = time.monotonic() - 0.1
        for connection in list(self._waiting.values()):
            if connection.since < silent and connection.events == select.EPOLLIN:
                connection.closing = True
                self._end(connection)
                if connection not in self.connections:
                    return True
        return False

    def stop(self):
        """Stops accepting, after what waits in the backlog; every answer from now on closes its connection."""
        self.stopping = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(1024):       # the backlog; under load there would always be one more
                self.process_request(*self.socket.accept())
        self.socket.close()

    # Routes

    def answer(self, request, connection):
        """Answers the request, or leaves it to the allocator; raises IdpotError for any answer but success."""
        if request.route not in self.ROUTES:
            raise NotFound(f"there is nothing at {shown(request.path)}")
        actions, token = self.ROUTES[request.route]
        action = actions.get("GET" if request.method == "HEAD" else request.method)
        if not action:
            allowed = "GET, HEAD, POST" if "POST" in actions else "GET, HEAD"
            raise BadRequest(f"{request.method[:20]} is not allowed here, but {allowed}", 405,
                             f"Allow: {allowed}\r\n".encode())
        token = getattr(self.settings, "token" if action == Server.do_exists else token).encode()
        if token and not hmac.compare_digest(token, request.token):
            raise Unauthorized("the bearer token is wrong" if request.token else "a bearer token is needed")
        action(self, request, connection)

    def _submit(self, request, connection, pot, render, *call, count=0):
        """Leaves the request to the allocator; it is answered with the (status, body) of render(value)."""
        def done(value, error):
            if error:
                connection.reply_error(request, error)
            else:
                connection.reply(request, *render(value))
        self.allocator.submit(pot, Job(count, call, done, connection.gone))

    def do_next(self, request, connection):
        fields = connection.fields(request) if request.query or connection.body else {}
        if "count" not in fields:
            return self._submit(request, connection, request.pot, digits, count=1)
        count = number(fields["count"], 1, MAX_COUNT, "count")
        self._submit(request, connection, request.pot, count=count, render=lambda last: (
            200, b"".join([b"%d\n" % one for one in range(last - count + 1, last + 1)])))

    def do_current(self, request, connection):
        self._submit(request, connection, request.pot, digits, "current", request.pot)

    def do_exists(self, request, connection):
        self._submit(request, connection, request.pot, lambda _: (204, b""), "current", request.pot)

    def do_create(self, request, connection):
        pot, low = self.pot_and_min(request, connection, "0")
        self._submit(request, connection, pot, lambda _: (201, b"Created new pot"), "create", pot, low)

    def do_raise(self, request, connection):
        pot, low = self.pot_and_min(request, connection, "")
        self._submit(request, connection, pot, digits, "raise_to", pot, low)

    @staticmethod
    def pot_and_min(request, connection, default):
        fields = {"name": "", "min": default, **connection.fields(request)}
        if not POT_NAME.fullmatch(fields["name"]):
            raise BadRequest(f"name {shown(fields['name'])} is not 1 to 60 characters of A-Z a-z 0-9 _ -")
        return fields["name"], number(fields["min"], 0, MAX_ID, "min")

    def do_list(self, request, connection):
        self._submit(request, connection, request.path, lambda pots: (
            200, "".join(f"{pot}\t{value}\n" for pot, value in pots).encode()), "pots")

    def do_health(self, request, connection):
        self._submit(request, connection, request.path, lambda _: (200, b"ok"), "check")

    def do_metrics(self, request, connection):
        connection.reply(request, 200, self.counters.text(self.settings.store.backend).encode(), PROMETHEUS)

    ROUTES = {      # route template -> ({method: action}, the setting that holds the token); HEAD is GET
        "/id/{pot}": ({"GET": do_current, "POST": do_next}, "token"),
        "/pot/{pot}": ({"GET": do_exists}, "token"),
        "/pot/create": ({"GET": do_exists, "POST": do_create}, "admintoken"),
        "/pot/raise": ({"GET": do_exists, "POST": do_raise}, "admintoken"),
        "/pot": ({"GET": do_list}, "token"),
        "/healthz": ({"GET": do_health}, "no_token"),
        "/metrics": ({"GET": do_metrics}, "token"),
    }


# ------------------------------------------------------------------------------------------------ client

class Client:
    """A client of an idpot server at a URL, over one connection that is kept; for one thread at a time.

    Its methods raise BadRequest, Unauthorized, NotFound, Exists, Exhausted or Unavailable as the server answers,
    IdpotError for any other status, and OSError where the server cannot be reached or a timeout, in seconds, is over.
    """

    def __init__(self, url, token=None, timeout=15):
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection, self._prefix = kind(parts.netloc, timeout=timeout), parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def create(self, pot, min=0):
        """Creates the pot; its first ID is min + 1."""
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
        return int(self._request("POST", "id", pot))

    def next_many(self, pot, count):
        """Returns a range of count (1..10000) new IDs."""
        first = int(self._request("POST", "id", pot, count=count).split(None, 1)[0])
        return range(first, first + count)

    def raise_to(self, pot, min):
        """Raises the counter to min unless it is higher; returns the counter."""
        return int(self._request("POST", "pot", "raise", name=pot, min=min))

    def _request(self, method, *path, **fields):
        connection, poll = self._connection, select.poll()
        if connection.sock:
            poll.register(connection.sock, select.POLLIN)
            if poll.poll(0):
                connection.close()      # it was ended meanwhile, or has an answer that nobody asked for
        kept = connection.sock is not None
        target = "/".join([self._prefix, *(urllib.parse.quote(part, safe="") for part in path)])
        body = urllib.parse.urlencode(fields) if fields else None
        headers = {**self._headers, "Content-Type": FORM.decode()} if body else self._headers
        try:
            connection.request(method, target, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if kept and isinstance(error, ConnectionError):     # it was ended while the request was on its way
                return self._request(method, *path, **fields)
            raise error if isinstance(error, OSError) else ConnectionError(f"half an answer: {error!r}") from error
        if answer.status < 300:
            return text
        errors = {400: BadRequest, 401: Unauthorized, 404: NotFound, 503: Unavailable,
                  409: Exists if path == ("pot", "create") else Exhausted}
        raise errors.get(answer.status, IdpotError)(text.strip())

    def close(self):
        self._connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# --------------------------------------------------------------------------------------- service manager

def notify(state):
    """Tells systemd a state such as READY=1, as sd_notify(3) does; nothing where no service manager listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path[0] == "@" else path)
            sock.sendall(state.encode())


def inherited_listener():
    """The listening socket that systemd (LISTEN_FDS) or start_server (SERVER_STARTER_PORT) left open, or None."""
    entries = [entry for entry in os.environ.pop("SERVER_STARTER_PORT", "").split(";") if entry]
    descriptors = [int(entry.rpartition("=")[2]) for entry in entries]      # host:port=fd, or path=fd
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


# ------------------------------------------------------------------------------------------ command line

STOP = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP, signal.SIGHUP, signal.SIGCHLD)


def listen(host, port):
    """The inherited listening socket, or one on the address; raises StartError."""
    try:
        listener = inherited_listener()
        if not listener:
            family, _, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listener = socket.create_server(address, family=family, backlog=1024)
        listener.setblocking(False)     # another process may take a connection between select and accept
        return listener
    except (OSError, ValueError) as error:
        raise StartError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}")


class Service:
    """A server as a whole: settings, listener, counters and marks, and the signals; in one process or several."""

    def __init__(self, settings):
        self.settings, self.first = settings, os.getpid()
        self.lines = open_logs(settings)
        self.counters, self.marks = Counters(settings.workers), Marks(settings.workers)
        self.store = settings.store(settings, self.counters)
        self.description = self.store.start()
        self.listener = listen(*settings.listen)

    def run(self):
        """Serves until a stop signal."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # before threads: the main thread waits for them
        settings, name = self.settings, self.listener.getsockname()
        unix = self.listener.family == socket.AF_UNIX
        host, port = ("", 0) if unix else name[:2]
        if not (unix or host.startswith("127.") or host == "::1" or settings.token or settings.admintoken):
            log.warning("%s is not a loopback address and no Token is set: anybody who reaches it can create, raise "
                        "and use up pots", host)
        secret = settings.token or settings.admintoken or settings.dsn["password"]
        if secret and settings.readable:
            log.warning("%s holds secrets, and everybody can read it: chmod o-r", settings.path)
        where = f"unix:{name}" if unix else f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("listening on %s (%s)", where, self.description)
        notify(f"READY=1\nSTATUS={self.description}")
        if settings.workers == 1:
            self.serve()
        else:
            self.store.close()      # processes do not share a connection
            self.supervise()
        if os.getpid() == self.first:
            log.info("stopped")

    def serve(self):
        """Serves in this process until a stop signal, or until the first process is gone."""
        settings, counters, number = self.settings, self.counters, None
        stores = [settings.store(settings, counters) for _ in range(self.store.connections - 1)]
        server = Server(settings, self.listener, Allocator(settings, self.marks, counters, [*stores, self.store]), counters)
        server.start()
        while number not in STOP and self.first in (os.getpid(), os.getppid()):
            number = getattr(signal.sigtimedwait(SIGNALS, 0.2), "si_signo", None)
            server.access.flush()
            self.tend(number)
        server.stop()
        end = time.monotonic() + settings.timeout
        while server.connections and time.monotonic() < end:
            if signal.sigtimedwait(STOP, 0.02) and settings.workers == 1:       # a second one stops at once
                break
        server.access.flush()
        if not stores and not server.connections:
            self.store.close()      # folds SQLite's journal into the file

    def supervise(self):
        """Keeps settings.workers processes running until a stop signal, and then until they have ended.

        Returns in each of them, too, when it has served.
        """
        pids, stopping = {}, False                      # pid -> worker
        starts = [0.0] * self.settings.workers          # when each was started, or is to be
        delays = [0.1] * self.settings.workers          # seconds before it is replaced
        while pids or not stopping:
            now = time.monotonic()
            for worker, start in enumerate(starts):
                if stopping or start > now or worker in pids.values():
                    continue
                starts[worker] = now
                try:
                    pid = os.fork()
                except OSError as error:        # the system has no more processes
                    log.error("worker %d cannot be started: %s", worker, error)
                    starts[worker] = now + 1
                    continue
                if not pid:
                    self.marks.worker = self.counters.worker = worker
                    return self.serve()
                pids[pid] = worker
            number = getattr(signal.sigtimedwait(SIGNALS, 0.2), "si_signo", None)
            if number in (*STOP, signal.SIGHUP):
                for pid in pids:    # workers do not count stop signals: systemd and Ctrl-C send them to all processes
                    os.kill(pid, signal.SIGKILL if stopping and number in STOP else number)
            if number in STOP:
                stopping = True
                self.listener.close()
            self.tend(number)
            for pid in [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]:
                worker = pids.pop(pid)
                delays[worker] = 0.1 if now - starts[worker] > 10 else min(30, 2 * delays[worker])
                starts[worker] = now + delays[worker]
                if not stopping:
                    log.error("worker %d (pid %d) has ended; it is replaced in %.1f s", worker, pid, delays[worker])

    def tend(self, number):
        """Does what a signal, or a moment without one, asks of each process; systemd knows the first one only."""
        if number == signal.SIGHUP and self.settings.logfile:
            self.lines.reopen()
        if os.getpid() != self.first:
            return
        if number == signal.SIGHUP:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            notify("READY=1")
        elif number in STOP:
            notify("STOPPING=1")
        if "WATCHDOG_USEC" in os.environ and min(self.counters.rows("heartbeat")) > time.monotonic() - 5:
            notify("WATCHDOG=1")    # only while each process waits for clients


def main(argv=None):
    """Runs the command line; returns the exit code: 0 stopped, 1 cannot start, 78 wrong settings. Usage errors exit with 2."""
    parser = argparse.ArgumentParser(prog="idpot", description="Serial 64-bit IDs over HTTP.")
    parser.add_argument("--config", metavar="FILE", help="settings; without it SQLite in ./idpot.db")
    parser.add_argument("--listen", metavar="HOST:PORT", type=split_address, help="address, in place of the file's")
    parser.add_argument("--check", action="store_true", help="check the settings, reach the database, and exit")
    parser.add_argument("--version", action="version", version=f"idpot {__version__}")
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings(arguments.config)
        settings.listen = arguments.listen or settings.listen
        if arguments.check:
            settings.logfile = ""       # a check leaves no file behind
            open_logs(settings)
            print(f"idpot: the settings are valid, {settings.store(settings, Counters(1)).start()} is reached")
            return 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):      # a service manager may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))      # the soft limit of 1024 is for select(2)
        Service(settings).run()
        return 0
    except StartError as error:
        print(f"idpot: {error}", file=sys.stderr)
        return 1 if arguments.check else error.exit_code
    except KeyboardInterrupt:       # before it serves; later the signal is waited for
        print("idpot: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
