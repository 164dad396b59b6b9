"""Tests of idpot over a real MariaDB or MySQL server and SQLite, through real HTTP.

    tox                         # or: python3 -m pytest

The database server is started here, in a temporary directory on a free port, and ended here.
IDPOT_TEST_MYSQLD names the program where it is not the installed mariadbd or mysqld. Where there is
none its tests are skipped with the reason, except under CI=true: there they fail.
"""

import collections
import email.utils
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import select
import shutil
import socket
import socketserver
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from threading import Barrier, Event, Thread
from time import monotonic

import pytest
from pytest import fixture, mark, raises

import idpot

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(f"{HERE}/contrib")
import prove

MAX_ID = 2**64 - 1
parametrize, slow = mark.parametrize, mark.slow


def pytest_collection_modifyitems(items):
    """Leaves a half of the tests where HALF=1 or HALF=2 is set: tox runs both side by side."""
    half = os.environ.get("HALF")
    if half:
        middle = len(items) * 4 // 5    # they take the same time
        items[:] = items[:middle] if half == "1" else items[middle:]


# ---------------------------------------------------------------- real parts: programs and ports

def wait_until(condition, seconds=10.0, every=0.02):
    """Returns the first true value of condition(); fails after that many seconds."""
    deadline = monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(every)


@contextmanager
def within(seconds):
    """The block takes less than so long."""
    start = monotonic()
    yield
    assert monotonic() - start < seconds


def at_once(*calls):
    """Runs the calls in threads that start together; returns their results in order."""
    barrier = Barrier(len(calls))

    def start(call):
        barrier.wait(10)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(start, calls))


def at_once_with(items, call):
    """Calls the function with each of the items, all at once; returns the results in order."""
    return at_once(*[partial(call, item) for item in items])


def assert_words(text, *words):
    """All of these are in the text."""
    for word in words:
        assert word in text


@contextmanager
def meanwhile(count, call):
    """A block in which so many threads, each with its number, make the call again and again."""
    over = Event()

    def again(number):
        while not over.is_set():
            call(number)

    with ThreadPoolExecutor(count) as pool:
        done = pool.map(again, range(count))
        try:
            yield
        finally:
            over.set()
        assert list(done) == [None] * count


def missing(reason):
    """Skips the test for that reason; under CI=true, where nothing may be missing, it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def needs(program):
    """The program's path; without it the test is skipped, and fails under CI=true."""
    return shutil.which(program) or missing(f"{program} is not installed")


def refused(port):
    """Whether nobody listens on the port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


GIVEN_PORTS = set()


def free_port():
    """A free TCP port below the ephemeral range, so that no outgoing connection takes it.

    No port is given twice; parallel runs of the tests begin at different ones.
    """
    first = 21000 + os.getpid() * 97 % 9000
    for port in range(first, 32000):
        if port not in GIVEN_PORTS and refused(port):
            GIVEN_PORTS.add(port)
            return port
    raise RuntimeError("no free port")


# ---------------------------------------------------------------- real parts: a database server

def database_program():
    """The path of the database server that the tests use; where there is none they are skipped."""
    named = os.environ.get("IDPOT_TEST_MYSQLD")
    if named:
        return shutil.which(named) or missing(f"IDPOT_TEST_MYSQLD: {named} is no program")
    return (shutil.which("mariadbd") or shutil.which("mysqld")
            or shutil.which("mysqld", path="/usr/sbin")
            or missing("no mariadbd or mysqld is installed: apt-get install mariadb-server"))


def is_stopped(process):
    """Whether all threads of the process are stopped: a signal takes a moment."""
    states = [Path(task, "stat").read_text().rpartition(")")[2].split()[0]
              for task in Path(f"/proc/{process.pid}/task").iterdir()]
    return set(states) == {"T"}


class Database:
    """A MariaDB or MySQL server of our own; root has no password and may come over TCP.

    It has an empty database `idpot`. The options are added to the server's command line.
    """

    def __init__(self, *options):
        self.program = database_program()
        # MariaDB has a program of the name mysqld, too.
        version = subprocess.check_output([self.program, "--no-defaults", "-V"], text=True)
        self.is_mysql = "MariaDB" not in version
        self.options, self.port = list(options), free_port()
        self.dir = tempfile.mkdtemp(prefix="idpot-db-")
        self.socket, self.log = f"{self.dir}/s.sock", f"{self.dir}/error.log"
        self.process = None
        self.as_user = []
        if os.getuid() == 0:
            # As root, Galera's state transfer by rsync drops to nobody, and fails.
            user = "root" if self.is_mysql else "mysql"
            shutil.chown(self.dir, user)
            self.as_user = [f"--user={user}"]
        self.install()
        self.start()
        if not self.is_mysql:
            self.sql("CREATE DATABASE IF NOT EXISTS idpot")

    def install(self):
        """Fills the data directory."""
        command = ["mariadb-install-db", "--no-defaults", "--skip-test-db",
                   "--auth-root-authentication-method=normal"]
        if self.is_mysql:
            # MySQL's root is root@localhost, who may come over the socket only.
            init = Path(self.dir, "init.sql")
            init.write_text("CREATE USER root@'%';\n"
                            "GRANT ALL ON *.* TO root@'%' WITH GRANT OPTION;\n"
                            "CREATE DATABASE idpot;\n")
            command = [self.program, "--no-defaults", "--initialize-insecure",
                       f"--init-file={init}"]
        places = [f"--datadir={self.dir}/data", f"--tmpdir={self.dir}"]
        done = subprocess.run([*command, *places, *self.as_user],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        """Starts the server and returns when it answers."""
        command = [self.program, "--no-defaults", f"--datadir={self.dir}/data",
                   f"--socket={self.socket}", f"--pid-file={self.dir}/pid",
                   f"--port={self.port}", "--bind-address=127.0.0.1", "--skip-name-resolve",
                   f"--log-error={self.log}", f"--tmpdir={self.dir}",
                   "--innodb-buffer-pool-size=64M"]
        if self.is_mysql:
            command.append("--mysqlx=OFF")      # its port is one for all servers of the host
        self.process = subprocess.Popen([*command, *self.as_user, *self.options],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers, 60)

    def answers(self):
        assert self.process.poll() is None, Path(self.log).read_text()[-3000:]
        with suppress(Exception):
            return self.sql("SELECT 1") == [(1,)]

    def connect(self, **options):
        """A mysql-connector connection as root, autocommit on."""
        import mysql.connector
        arguments = {"host": "127.0.0.1", "port": self.port, "user": "root", "autocommit": True,
                     "collation": "utf8mb4_general_ci", "ssl_disabled": not self.is_mysql,
                     "connection_timeout": 10,
                     "read_timeout": 90}
        return mysql.connector.connect(**{**arguments, **options})

    def sql(self, statement, **options):
        """Runs one statement as root and returns its rows."""
        with closing(self.connect(**options)) as connection:
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def counter(self, pot, database="idpot"):
        """What the table of the pot holds."""
        [(value,)] = self.sql(f"SELECT id FROM {database}.pot_{pot}")
        return value

    def dsn(self, database="idpot", parameters="", credentials="root"):
        return f"{credentials}@tcp(127.0.0.1:{self.port})/{database}{parameters}"

    def signal(self, number):
        """Sends a signal; SIGKILL and SIGTERM are waited for."""
        self.process.send_signal(number)
        if number in (SIGKILL, SIGTERM):
            self.process.wait(60)
        if number == SIGSTOP:
            wait_until(lambda: is_stopped(self.process))

    def remove(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)
        shutil.rmtree(self.dir, ignore_errors=True)


@fixture(scope="session")
def database():
    server = Database()
    yield server
    server.remove()


@contextmanager
def between(harm, mend):
    """A block before which the harm is done, and after which it is mended."""
    harm()
    try:
        yield
    finally:
        mend()


def switched_on(database, variable):
    return between(lambda: database.sql(f"SET GLOBAL {variable} = 1"),
                   lambda: database.sql(f"SET GLOBAL {variable} = 0"))


def read_only(database):
    return switched_on(database, "read_only")


def killed(database):
    return between(lambda: database.signal(SIGKILL), database.start)


def down(database):
    return between(lambda: database.signal(SIGTERM), database.start)


def hung(database):
    return between(lambda: database.signal(SIGSTOP), lambda: database.signal(SIGCONT))


@contextmanager
def session_on(database, *statements, name="idpot"):
    """The cursor of a connection of root to a database, which has run the statements."""
    with closing(database.connect(database=name)) as connection:
        cursor = connection.cursor(buffered=True)
        for statement in statements:
            cursor.execute(statement)
        yield cursor


def pot_locked(database, pot, name="host"):
    """Another session holds the table of a pot."""
    return session_on(database, f"LOCK TABLES pot_{pot} WRITE", name=name)


def waiting_for_lock(database, pot):
    """The statements that wait for a lock on the pot."""
    return database.sql("SELECT id FROM information_schema.processlist "
                        f"WHERE state LIKE 'Wait%' AND info LIKE '%pot_{pot}%'")


def until_locked(database, pot):
    """Waits for a statement that waits for a lock on the pot."""
    return wait_until(lambda: waiting_for_lock(database, pot))


def kill_connections(database, user):
    """Kills the connections that the user's idpots have; returns how many there were."""
    numbers = database.sql("SELECT id FROM information_schema.processlist "
                           f"WHERE user = '{user}' AND db IS NOT NULL")
    for (number,) in numbers:
        with suppress(Exception):    # it ended by itself
            database.sql(f"KILL {number}")
    return len(numbers)


@contextmanager
def small_disk(path, size):
    """The new directory is a small file system; who may not mount one skips the test."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "idpot", path]
    if subprocess.run(mount, timeout=20).returncode:
        missing("only root may mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True, timeout=20)


@fixture
def mysql(database):
    """mysql(Timeout=1, ...) is the settings for a new database, of a user with least rights."""
    database.sql("DROP DATABASE IF EXISTS host")
    database.sql("CREATE DATABASE host")
    database.sql("DROP USER IF EXISTS least")
    database.sql("CREATE USER least IDENTIFIED BY 'secret'")
    database.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON host.* TO least")
    return partial(dict, Port=database.port, Username="least", Password="secret", Dbname="host")


# ---------------------------------------------------------------- real parts: idpot

MYSQL = "ConnectString Hostname Port Username Password Dbname Engine Connections".split()
SECTIONS = {**dict.fromkeys(MYSQL, "Mysql"), "File": "Sqlite"}


def config_text(**settings):
    """The text of a settings file; each setting stands in the section where it belongs."""
    texts = {}
    for name, value in settings.items():
        section = SECTIONS.get(name, "Server")
        texts[section] = texts.get(section, f"[{section}]\n") + f"{name} = {value}\n"
    return "".join(texts.values())


class Idpot:
    """`python idpot.py --config=...` in a directory of its own, with these settings.

    With config=False there is no file and no --config. `python` is the command that runs idpot.py;
    `pass_fds` are descriptors that it gets, `pot` is the name of one to make.
    """

    def __init__(self, folder, *arguments, config=True, listen="127.0.0.1:0", wait=True,
                 environment=None, python=(sys.executable,), pass_fds=(), pot=None, **settings):
        self.folder = str(folder)
        os.makedirs(self.folder, exist_ok=True)
        self.stderr = os.path.join(self.folder, "stderr")
        self.command = [*python, os.path.join(HERE, "idpot.py")]
        self.settings = settings
        if config:
            path = Path(self.folder, "idpot.cfg")
            path.write_text(config_text(**settings))
            path.chmod(0o600)
            self.command.append(f"--config={path}")
        if listen:
            self.command.append(f"--listen={listen}")
        self.command.extend(arguments)
        self.environment = os.environ | (environment or {})
        self.pass_fds = pass_fds
        self.start(wait)
        if pot:
            self.create(pot)

    def start(self, wait=True):
        """Starts it and, unless told otherwise, returns when it listens."""
        with open(self.stderr, "a") as stderr:
            seen = stderr.tell()
            self.process = subprocess.Popen(self.command, cwd=self.folder, stderr=stderr,
                                            env=self.environment, pass_fds=self.pass_fds)
        if wait:
            self.host, self.port = wait_until(lambda: self.address(seen), 30)

    def address(self, seen=0):
        """The host and port that it listens on, by what it wrote after `seen`; None before."""
        assert self.process.poll() is None, self.errors()
        found = re.search(r"listening on http://(\S+):(\d+)", self.errors()[seen:])
        return found and (found[1], int(found[2]))

    def path(self, name):
        """The path of a file in its directory."""
        return Path(self.folder, name)

    def errors(self):
        """What it has written on stderr."""
        return Path(self.stderr).read_text()

    def until_says(self, text):
        """Waits until the text is on its stderr."""
        wait_until(lambda: text in self.errors())

    def events(self):
        """(level, text) of each event on its stderr."""
        pattern = r"(?m)^[-0-9]+ [:0-9]+ idpot\[\d+\] ([A-Z]+) (.*)$"
        return re.findall(pattern, self.errors())

    def request(self, method, path, body=None, headers=None):
        """One request on a connection of its own; returns (status, body text, headers)."""
        headers = dict(headers or {})
        if body is not None:
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

    def answer(self, method, path, body=None):
        """The (status, body text) of a request()."""
        status, text, _ = self.request(method, path, body)
        return status, text

    def status(self, method, path, body=None, headers=None):
        """The status of a request()."""
        return self.request(method, path, body, headers)[0]

    def create(self, pot, min=0):
        answer = self.answer("POST", "/pot/create", f"name={pot}&min={min}")
        assert answer == (201, "Created new pot")

    def next(self, pot, count=None):
        """The next ID; with count, the list of IDs."""
        status, text = self.answer("POST", f"/id/{pot}", count and f"count={count}")
        assert status == 200, text
        ids = [int(line) for line in text.splitlines()]
        return ids if count else ids[0]

    def stop(self, number=SIGTERM):
        """Sends the signal, waits for the end and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


def python_with(*lines):
    """A command that runs idpot.py, after these lines of Python."""
    before = "import os, sys; sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))"
    code = "\n".join([before, *lines, "import idpot", "sys.exit(idpot.main())"])
    return sys.executable, "-c", code


START, CHECK = "--listen=127.0.0.1:0", "--check"


def ended(folder, *arguments, before=(), environment=None, **settings):
    """(exit code, stdout, stderr) of an idpot that ends by itself; `before` begins the command."""
    Path(folder, "f.cfg").write_text(config_text(**settings))
    command = [*before, sys.executable, f"{HERE}/idpot.py", "--config=f.cfg", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | (environment or {}),
                          capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout, done.stderr


def refusal(folder, *arguments, **settings):
    """The line with which an idpot ends that does not start; before it may be warnings."""
    code, out, errors = ended(folder, *arguments, **settings)
    assert code == 1
    assert out == ""
    assert "secret" not in errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert re.fullmatch("idpot: [ -~]+", last)
    return last


def healthy(server):
    """Whether the server says that it could issue an ID now."""
    return server.answer("GET", "/healthz") == (200, "ok")


def logged(server):
    """All that the server has logged on stderr by now; it writes it a moment later."""
    mark = f"/mark-{time.monotonic_ns()}"
    server.request("GET", mark)
    return wait_until(lambda: mark in server.errors() and server.errors())


def metrics(server):
    """{series of /metrics: value}"""
    text = server.request("GET", "/metrics")[1]
    return {name: float(value) for name, value in re.findall("(?m)^([^#].*) (.*)$", text)}


def memory(server):
    """The bytes of resident memory that the server says that it has."""
    return metrics(server)["process_resident_memory_bytes"]


def connections(server):
    """How many are open, but for the one that asks."""
    return metrics(server)["idpot_connections"] - 1


def assert_refused(answer, pattern, again=None):
    """A request() had a 503 with such a text, which says when to come again if that may help."""
    status, text, headers = answer
    assert status == 503
    assert headers["Retry-After"] == again
    assert re.search(pattern, text)


ERROR_1205 = 'idpot_db_errors_total{errno="1205"}'      # in metrics(): a lock was waited for


def in_flight(server):
    """How many requests wait for their answer, but for the one that asks."""
    return metrics(server)["idpot_http_requests_in_flight"] - 1


def until_in_flight(server, count):
    wait_until(lambda: in_flight(server) == count)


def stopped(server):
    """In this block the server is stopped: at the end it meets at once all that came meanwhile."""
    def stop():
        server.process.send_signal(SIGSTOP)
        wait_until(lambda: is_stopped(server.process))

    return between(stop, lambda: server.process.send_signal(SIGCONT))


@fixture
def run(tmp_path):
    """Starts idpots: run(Timeout=1, ...) with settings; each is ended after the test."""
    started = []

    def start(*arguments, **options):
        folder = tmp_path / f"idpot{len(started)}"
        started.append(Idpot(folder, *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop(SIGKILL)


# ---------------------------------------------------------------- clients that send bytes

GOOD = b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n"
OTHER = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"


class Raw(AbstractContextManager):
    """A connection that sends bytes and reads whole answers, each as (status, fields, body).

    The answers end where the server closes; a reset is a ConnectionError. `buffer`: SO_RCVBUF.
    """

    HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+\r\n((?:[\w-]+: [ -~]*\r\n)*)\r\n")

    def __init__(self, server, data=b"", buffer=None):
        self.socket = socket.socket()
        self.socket.settimeout(20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect(("127.0.0.1", server.port))
        self.came = b""
        self.send(data)

    def __exit__(self, *_):
        self.socket.close()

    def __iter__(self):
        return iter(self.answer, None)

    def send(self, data):
        self.socket.sendall(data)

    def end(self, data=b""):
        """Sends the data, and says that it was the last."""
        self.send(data)
        self.socket.shutdown(socket.SHUT_WR)

    def receive(self):
        """Returns what comes next; b"" where the server closes."""
        data = self.socket.recv(65536)
        self.came += data
        return data

    def answer(self, body=True):
        """The next answer, or None where the server closes; one to HEAD comes without its body."""
        while not (head := self.HEAD.match(self.came)):
            if not self.receive():
                assert not self.came
                return None
        fields = re.findall(r"([\w-]+): (.*)\r\n", head[2].decode())
        status, named = int(head[1]), dict(fields)
        assert len(named) == len(fields)
        end = head.end() + int(named.get("Content-Length", 0)) * body
        while len(self.came) < end:
            assert self.receive(), "half an answer"
        content, self.came = self.came[head.end():end], self.came[end:]
        if status >= 400 and body:
            assert re.fullmatch(rb"[ -~]+\n", content)
            assert named["Content-Type"] == "text/plain; charset=utf-8"
        return status, named, content

    def status(self):
        """The status of the next answer()."""
        status, _, _ = self.answer()
        return status


def asking(server, pot):
    """A connection on which an ID was asked for."""
    return Raw(server, b"POST /id/%s HTTP/1.1\r\nHost: x\r\n\r\n" % pot.encode())


@contextmanager
def all_of(blocks):
    """A block within all of these, which yields the list of what they yield."""
    with ExitStack() as stack:
        yield [stack.enter_context(block) for block in blocks]


def assert_served(clients):
    """Each of them is still connected, and has its next request answered."""
    for client in clients:
        client.send(OTHER)
        assert client.status() == 404


@contextmanager
def clients(server, count, data, answered=None):
    """That many connections, each of which has sent the bytes, and got that status if any."""
    with all_of([Raw(server, data) for _ in range(count)]) as opened:
        if answered:
            assert {client.status() for client in opened} == {answered}
        yield opened


def nothing_comes(client, seconds):
    """For so long there is no answer, and the connection is not closed."""
    return not select.select([client.socket], [], [], seconds)[0]


def exchange(server, data):
    """All answers to the bytes, after which the client ends; it reads while it sends."""
    with Raw(server) as client, ThreadPoolExecutor(1) as pool:
        pool.submit(client.end, data)
        return list(client)


def statuses(answers):
    return [status for status, _, _ in answers]


def issued(answers):
    """The numbers in the answers with status 200."""
    bodies = [body for status, _, body in answers if status == 200]
    return [int(number) for number in b" ".join(bodies).split()]


EIGHT = ["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"]


def answers_at_once(server):
    """The (status, text) for an ID of each of the eight pots, asked for together."""
    return at_once_with(EIGHT, lambda pot: server.answer("POST", f"/id/{pot}"))


def eight_pots(server):
    """Makes the pots, and takes an ID of each."""
    for pot in EIGHT:
        server.create(pot)
    assert answers_at_once(server) == [(200, "1")] * 8
    return server


# ---------------------------------------------------------------- clients that take IDs all along

PATIENCE = 2    # seconds: idpot's Timeout in these tests


class Load:
    """A with block in which twelve clients ask for IDs of one pot, each over its own connection.

    Client n asks the n-th server in turn, for one ID; client 0 asks for five at once, and each
    third client has its connection closed each time. What they see is in `history`, where the
    status is 200 for a right answer only, prove.LOST where there was none.
    """

    def __init__(self, servers, pot="p", patience=PATIENCE, **headers):
        self.servers, self.pot, self.patience, self.headers = servers, pot, patience, headers
        self.recovered = math.inf
        self.history = []
        self.stopping = Event()
        self.deadline = monotonic() + 120
        self.threads = [Thread(target=self.client, args=(n,)) for n in range(12)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def client(self, number):
        server = self.servers[number % len(self.servers)]
        field, count = ("", 1) if number else ("count", 5)
        connection = prove.Connection(f"http://127.0.0.1:{server.port}", token=None)
        connection.headers = {"Connection": "close" if number % 3 == 2 else "keep-alive"}
        connection.headers.update(self.headers)
        client = prove.Client(connection, [self.pot], number, self.history, self.stopping)
        while not self.stopping.is_set() and monotonic() < self.deadline:
            connection.connection.port = server.port    # it may have been started again
            start = monotonic()
            status, first = client.ask(self.pot, field, count)
            end = monotonic()
            answer = prove.Answer(start, end, first, first + count - 1, status, number)
            self.history.append(answer)
            if status != 200:
                self.stopping.wait(0.02)
        connection.close()

    def served(self, since=0):
        """The answers with IDs that came after that moment."""
        return [answer for answer in self.history if answer.status == 200 and answer.end > since]

    def statuses(self, since=0):
        """The statuses of the requests that began after that moment, with their numbers."""
        return collections.Counter(answer.status for answer in self.history if answer.start > since)

    def refused(self):
        """Whether the last that each client got is a 503."""
        last = {answer.client: answer.status for answer in self.history.copy()}
        return list(last.values()) == [503] * 12

    def issued(self, since=0):
        """How many IDs were answered after that moment."""
        return sum(answer.last - answer.first + 1 for answer in self.served(since))

    def more(self, ids=200):
        """Waits until each client is served again, and all together get so many IDs more."""
        since = monotonic()
        wait_until(lambda: len({answer.client for answer in self.served(since)}) == 12, 15)
        wait_until(lambda: self.issued(since) >= ids, 30)

    def recover(self):
        """Waits until each client is served again: then nothing may be refused any more."""
        self.more(12)
        self.recovered = monotonic()
        self.more()

    def all_served(self):
        """How many IDs were answered; every request was, and rightly."""
        assert prove.check_history(self.history) == []
        assert self.statuses().keys() == {200}
        return self.issued()

    def verdict(self, counter, may_lose=()):
        """Asserts what must hold after faults and the last recovery, by the pot's counter.

        Connections may be lost of the servers with these numbers.
        """
        assert prove.check_history(self.history) == []
        assert self.statuses().keys() <= {200, 503, prove.LOST}
        assert self.statuses(self.recovered).keys() == {200}
        for answer in self.history:
            assert answer.status != prove.LOST or answer.client % len(self.servers) in may_lose
            assert answer.last <= counter
            assert answer.end - answer.start < self.patience + 1


# ---------------------------------------------------------------- settings files

LOCALHOST = [("127.0.0.1:3306", {"host": "127.0.0.1", "port": 3306})]


@fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text):
    """The settings of a file with that text; what its DSN says is among them."""
    Path("f.cfg").write_text(text, newline="")
    settings = idpot.load_settings("f.cfg")
    values = {field: getattr(settings, field) for field in idpot.Settings.__annotations__}
    return {**values, **settings.dsn._asdict()}


@parametrize("text, expected", [
    ("[Server]\nLogFile = /log/access.%Y%m%d.log", {"log_file": "/log/access.%Y%m%d.log"}),
    ("[SERVER]\r\nlogFILE=a%\r\nToken = a=b:c", {"log_file": "a%", "token": "a=b:c"}),
    ("\ufeff[Server] ; comment\n  LogFile   =  a b  # comment", {"log_file": "a b"}),
    ('[Server]\n; LogFile = x\n# LogFile = y\nLogFile = "a;b#c" ; d', {"log_file": "a;b#c"}),
    ('[Server]\nLogFile = ""', {"log_file": ""}),
    ('[Server]\nToken = "q\\"b\\\\t\\t\\n="', {"token": 'q"b\\t\t\n='}),
    ("[Server]\nListen = [::1]:80\nTimeout = 0.5", {"listen": ("::1", 80), "timeout": 0.5}),
    ("[Server]\nListen = :80\nMaxConnections =", {"listen": ("", 80), "max_connections": 1024}),
    ("[Server]\nIdleTimeout = 86400\nMaxConnections = 1000000", {
        "idle_timeout": 86400, "max_connections": 1000000}),
    ("[Server]\nToken = t", {"token": "t", "admin_token": "t"}),
    ("[Server]\nToken = t\nAdminToken = a", {"token": "t", "admin_token": "a"}),
    ("[Mysql]\nConnections = 64", {"connections": 64}),
    ("[Mysql]", {
        "user": "root", "password": "", "addresses": LOCALHOST, "database": "idpot",
        "engine": "MyISAM", "connections": 8}),
    ('[Mysql]\nUsername = u\nPassword = "p#"\nHostname = h\nPort = 1\nDbname = d', {
        "user": "u", "password": "p#", "addresses": [("h:1", {"host": "h", "port": 1})],
        "database": "d"}),
    ("[Mysql]\nConnectString = u:p%40@/d", {"user": "u", "password": "p%40", "database": "d"}),
    ("[Sqlite]\nFile = a/b.db", {"file": "a/b.db"}),
])
def test_how_settings_are_read(folder, text, expected):
    settings = load(text)
    assert {name: settings[name] for name in expected} == expected


@parametrize("other", ["Mysql", "Sqlite"])      # both at once are refused
def test_the_example_file_has_every_name_once_and_says_the_defaults(folder, other):
    example = Path(HERE, "idpot.cfg.example").read_text()
    names = re.findall(r"(?m)^;(\w+) =", example)
    assert len(names) == len(set(names)) == 18
    whole = re.sub(r"(?m)^;(\[|(?!\w*Token )\w+ =)", r"\1", example)   # no token is empty
    without_other = re.sub(rf"(?ms)^\[{other}\].*?(?=^\[|\Z)", "", whole)
    assert without_other != whole != example
    defaults = load("")
    for text in (example, without_other):
        settings = load(text)
        for name in names:
            field = idpot.SETTINGS[name.lower()].field
            assert settings[field] == defaults[field]


def test_a_file_of_go_idpot_starts_as_it_is(run, database, tmp_path):
    settings = tmp_path / "go.cfg"
    settings.write_text(
        "; idpot\n[server]\nlisten = 127.0.0.1:0\nLogFile = access_log-%Y%m%d\n"
        "LogLinkName = access_log\n\n[mysql]\nengine = InnoDB\n"
        f'connectstring = "{database.dsn("idpot", "?charset=utf8&timeout=5s")}"  ; DSN\n')
    server = run(f"--config={settings}", config=False, listen=None)
    server.create("of-go", 10)
    assert server.next("of-go") == 11
    server.stop()
    lines = server.path("access_log").read_text()
    assert lines.count('"POST /id/of-go HTTP/1.1" 200 2 ') == 1
    [ignored] = [text for _, text in server.events() if "ignored" in text]
    assert "charset, timeout" in ignored


@parametrize("text, expected", [
    ("/db", {"user": "", "password": "", "addresses": LOCALHOST, "tls": "preferred"}),
    ("u:a@b:c/d(e)?f&g@tcp(h:1)/d", {"user": "u", "password": "a@b:c/d(e)?f&g", "database": "d"}),
    ("u@tcp/db", {"user": "u", "password": "", "addresses": LOCALHOST}),
    ("u:p@tcp(db1,db2:3307,[fe80::1])/db", {
        "addresses": [
            ("db1:3306", {"host": "db1", "port": 3306}),
            ("db2:3307", {"host": "db2", "port": 3307}),
            ("fe80::1:3306", {"host": "fe80::1", "port": 3306})]}),
    ("u:p@tcp([::1]:3307)/d%2Fb%25", {
        "addresses": [("::1:3307", {"host": "::1", "port": 3307})], "database": "d/b%"}),
    ("u:p@unix(/run/my(sql)/s.sock)/db", {
        "addresses": [("/run/my(sql)/s.sock", {"unix_socket": "/run/my(sql)/s.sock"})]}),
    ("/db?tls=1", {"tls": "true"}),
    ("/db?tls=0", {"tls": "false"}),
    ("/db?tls=TRUE", {"tls": "true"}),
    ("/db?tls=skip-verify&x=%27a+b%27", {"tls": "skip-verify", "ignored": "x"}),
    ("/db?timeout=1m&readTimeout=5ms&writeTimeout=no&charset=utf8&collation=x_bin", {
        "ignored": "timeout, readTimeout, writeTimeout, charset, collation"}),
    ("/db?autocommit=0&a`b=1&loc=Asia%2FTokyo", {"ignored": "autocommit, a`b, loc"}),
])
def test_what_a_dsn_says(text, expected):
    settings = idpot.parse_dsn(text)._asdict()
    assert {name: settings[name] for name in expected} == expected


# ---------------------------------------------------------------- settings that are refused

SECONDS = "is not a number of seconds above 0, at most 86400"

REFUSED = [     # the text of f.cfg, words of the line that is said, with its number
    ("[Server]\nListn = 127.0.0.1:0", [":2: ", '"Listn" in [Server]']),
    ("# x\n[server]\n\nTIMEOUT = 1\nHostname=x", [":5: ", '"Hostname" in [Server]']),
    ("[Postgres]\nHost = x", ["[Postgres]"]),
    ("[Mysql]\nPort = 1\n[Sqlite]\nFile = x", ["[Mysql] and [Sqlite]"]),
    ("[Mysql]\nPassword: secret", [":2: "]),
    ("Listen = x", [":1: "]),
    ("[Server]\nTimeout = 1\n\ntimeOUT = 2", [":4: "]),
    ("[Server]\nTimeout = 1\n[SERVER]\nListen = :80", [":3: "]),
    ("[Server]\nTimeout = 0", [":2: [Server] Timeout: ", f'"0" {SECONDS}']),
    ("[Server]\nTimeout = 86401", [":2: [Server] Timeout: ", f'"86401" {SECONDS}']),
    ("[Server]\nRequestTimeout = 86400.5", ["[Server] RequestTimeout: ", f'"86400.5" {SECONDS}']),
    ("[Server]\n\nidleTimeout = nan", [":3: [Server] idleTimeout: ", f'"nan" {SECONDS}']),
    ("[Server]\nMaxConnections = 0", ["[Server] MaxConnections: ", '"0"', "1 to 1000000"]),
    ("[Server]\nMaxConnections = 1000001", ["MaxConnections: ", '"1000001"', "1 to 1000000"]),
    ("[Mysql]\nConnections = 65", [":2: [Mysql] Connections: ", '"65"', "1 to 64"]),
    ("[Mysql]\nPort = 65536", [":2: [Mysql] Port: ", '"65536"', "1 to 65535"]),
    ("[Server]\nListen = localhost", [":2: [Server] Listen: ", '"localhost"', "127.0.0.1:8080"]),
    ("[Server]\nListen = 8080", [":2: [Server] Listen: ", '"8080"', "127.0.0.1:8080"]),
    ("[Server]\nListen = :65536", [":2: [Server] Listen: ", '":65536"']),
    ('[Server]\nToken = "secret', [":2: [Server] Token: ", "double quote"]),
    ("[Server]\nLogFile = a\\b", [":2: [Server] LogFile: ", "backslash"]),
    ("[Server]\nLogFile = a\\\n", [":2: [Server] LogFile: ", "backslash"]),
    *[(f'[Server]\nToken = "a\\{letter}c"', [":2: [Server] Token: ", "backslash"])
      for letter in "qbfr/'x"],
    ("[Server]\nToken =", [":2: [Server] Token: ", "empty"]),
    ("[Server]\nToken = #secret", [":2: [Server] Token: ", "empty", "double quotes"]),
    ("[Server]\nToken = ;secret", [":2: [Server] Token: ", "empty", "double quotes"]),
    ('[Server]\nToken = t\nAdminToken = ""', [":3: [Server] AdminToken: ", "empty"]),
    ('[Server]\nToken = "secret "', [":2: [Server] Token: ", "space"]),
    ("[Server]\nToken = 'secret'", [":2: [Server] Token: ", "double quotes"]),
    ("[Mysql]\nConnectString: u:secret@/d?tls=true", [":2: ", "[Mysql]", "not shown"]),
    ("[Mysql]\nPassword: secret=", [":2: ", "[Mysql]", "not shown"]),
    ("[Mysql]\nConnectString = u:p;secret@/d", [":2: [Mysql] ConnectString: ", "double quotes"]),
    ("[Mysql]\nConnectString = u:p#secret@/d", [":2: [Mysql] ConnectString: ", "double quotes"]),
    *[(f"[Mysql]\nConnectString = {dsn}", [":2: [Mysql] ConnectString: ", "@tcp("]) for dsn in (
        "u:secret@tcp(h:1)", "u:secret@tcp(h:1)/", "u:secret/d", "u:secret@tcp(h/d",
        "u:secret@udp(h)/d", "u:pass@secret/d", "u:p@secret:3306/d", "mysql://u:secret@h:3306/d")],
    *[(f"[Mysql]\nConnectString = {dsn}", [":2: [Mysql] ConnectString: "]) for dsn in (
        "u:secret@tcp(h:x)/d", "u:secret@tcp(h:65536)/d", "u:secret@tcp([::1)/d", "u@tcp(a,b,)/d")],
    ("[Mysql]\nConnectString = u:secret@/d?tls=maybe", ["ConnectString: ", '"maybe"']),
]


@parametrize("text, words", REFUSED)
def test_a_setting_that_is_refused_is_named_in_one_line(folder, capsys, text, words):
    Path("f.cfg").write_text(text)
    code = idpot.main(["--config=f.cfg", "--listen=192.0.2.1:8"])   # no address of this host
    out, errors = capsys.readouterr()
    assert code == 78
    assert out == ""
    assert re.fullmatch("idpot: f.cfg:[ -~]+\n", errors)
    assert_words(errors, *words)
    assert "secret" not in errors


def test_an_error_names_the_file_of_which_systemd_has_made_a_copy(folder, capsys, monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    Path("f.cfg").write_text("[Server]\nTimeout = 0")
    assert idpot.main([f"--config={folder}/f.cfg"]) == 78
    assert capsys.readouterr().err.startswith("idpot: /etc/f.cfg:2: ")


@parametrize("path, shown", [("no.cfg", "no.cfg"), ("", '""')])
@parametrize("arguments", [[], ["--check"]])
def test_a_settings_file_that_is_not_there(folder, capsys, path, shown, arguments):
    assert idpot.main([f"--config={path}", *arguments]) == 78
    assert capsys.readouterr() == ("", f"idpot: {shown}: No such file or directory\n")


@parametrize("arguments, words", [
    (["--listen=x"], ['--listen: "x"', "127.0.0.1:8080"]),
    (["--listen=8080"], ['--listen: "8080"', "127.0.0.1:8080"]),
    (["idpot.cfg"], ["--config=FILE"]),
    (["--port=80"], ["--port=80"]),
])
def test_wrong_usage_is_told_the_right_one(capsys, arguments, words):
    with raises(SystemExit, match="^2$"):
        idpot.main(arguments)
    out, errors = capsys.readouterr()
    last = errors.splitlines()[-1]
    assert out == ""
    assert last.startswith("idpot: error: ")
    assert_words(last, *words)


def test_version(capsys):
    with raises(SystemExit, match="^0$"):
        idpot.main(["--version"])
    assert capsys.readouterr() == (f"idpot {idpot.__version__}\n", "")


# ---------------------------------------------------------------- TLS of the database

@fixture(scope="module")
def tls_servers(database):
    """Servers with a certificate of our own authority, with one of their own, and with none."""
    folder = Path(database.dir, "tls")      # its user can come there
    folder.mkdir()
    new = f"{needs('openssl')} req -x509 -newkey rsa:2048 -nodes -days 2"
    subprocess.run(
        f"{new} -subj /CN=authority -keyout authority.key -out authority.pem && "
        f"{new} -subj /CN=server -keyout key -out pem -CA authority.pem -CAkey authority.key "
        "-addext subjectAltName=IP:127.0.0.1 && chmod 644 key",
        shell=True, cwd=folder, check=True, capture_output=True)
    trusted = Database(f"--ssl-cert={folder}/pem", f"--ssl-key={folder}/key")
    without = Database("--tls-version=" if trusted.is_mysql else "--skip-ssl")
    yield {"authority": f"{folder}/authority.pem", "trusted": trusted, "foreign": database,
           "without": without}
    trusted.remove()
    without.remove()


@parametrize("tls, server, host, why", [
    ("true", "trusted", "127.0.0.1", ""),
    ("true", "trusted", "localhost", "2026"),       # the certificate has another name
    ("true", "foreign", "127.0.0.1", "2026"),
    ("true", "without", "127.0.0.1", "2026"),
    ("skip-verify", "foreign", "127.0.0.1", ""),
    ("skip-verify", "without", "127.0.0.1", "TLS"),
    ("preferred", "without", "127.0.0.1", ""),
    ("false", "foreign", "127.0.0.1", ""),
])
def test_what_tls_verifies(tls_servers, tmp_path, tls, server, host, why):
    dsn = f"root@tcp({host}:{tls_servers[server].port})/idpot?tls={tls}"
    trusted = {"SSL_CERT_FILE": tls_servers["authority"]}
    code, _, errors = ended(tmp_path, CHECK, environment=trusted, ConnectString=dsn)
    assert (code == 0) == (not why)
    assert why in errors


# ---------------------------------------------------------------- the access log

COMBINED = re.compile(
    r"127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] (\".*\")")


def access_lines(*paths):
    """What is behind the time in each access line in the files."""
    lines = "".join(path.read_text() for path in paths).splitlines()
    return [found[1] for found in map(COMBINED.fullmatch, lines) if found]


LOGGED = [      # what is sent; what is logged of it, where an error's size is 0 here
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\n\r\n", '"GET /id/p HTTP/1.1" 200 1 "-" "-"'),
    (b"HEAD /id/p HTTP/1.1\r\nHost: x\r\n\r\n", '"HEAD /id/p HTTP/1.1" 200 - "-" "-"'),
    (b"GET /pot/p HTTP/1.0\r\n\r\n", '"GET /pot/p HTTP/1.0" 204 - "-" "-"'),
    (b'POST /id/p HTTP/1.1\r\nHost: x\r\nReferer: q" "200" \\\r\n\r\n',
     r'"POST /id/p HTTP/1.1" 200 1 "q\" \"200\" \\" "-"'),
    (b'POST /id/p HTTP/1.1\r\nHost: x\r\nUser-Agent: q" \\ \xe9\xc2\x85\t\xff\r\n\r\n',
     r'"POST /id/p HTTP/1.1" 200 1 "-" "q\" \\ \xe9\xc2\x85\x09\xff"'),
    (b"GET /pot?%0d%0a%22 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n\r\n",
     '"GET /pot?%0d%0a%22 HTTP/1.1" 400 0 "-" "-"'),
    (b"POST /pot/create?name=a%0d%0a%1b%22+ HTTP/1.1\r\nHost: x\r\n\r\n",
     '"POST /pot/create?name=a%0d%0a%1b%22+ HTTP/1.1" 400 0 "-" "-"'),
    (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
     '"GET /' + "a" * 3000 + ' HTTP/1.1" 404 0 "-" "-"'),
    # A malformed head is shown nowhere: it may hold a token.
    (b"Authorization: Bearer sesame\r\n\r\n", '"-" 400 0 "-" "-"'),
    (b"GET /p HTTP/1.1 Authorization: Bearer sesame\r\nHost: x\r\n\r\n", '"-" 400 0 "-" "-"'),
    (b"GET /id/p HTTP/1.1\tAuthorization: sesame\r\n\r\n", '"-" 400 0 "-" "-"'),
    (b"GET /id/p\0Bearer sesame HTTP/1.1\r\nHost: x\r\n\r\n", '"-" 400 0 "-" "-"'),
    (b"GET /id/p HTTP/1.1\nAuthorization: Bearer sesame\r\n\r\n", '"-" 400 0 "-" "-"'),
    (b"GET /p HTTP/1.1\r\nX : y\r\nAuthorization: Bearer sesame\r\n\r\n", '"-" 400 0 "-" "-"'),
    (b"\x00\x1b]0;x\x07\x9b\x7f\"\\\n\n", '"-" 400 0 "-" "-"'),
    (b'GET /"\\\x1b[31m\x07\xff\x85 HTTP/1.1\r\nHost: x\r\n\r\n', '"-" 400 0 "-" "-"'),
]


def test_every_answer_costs_one_line_that_goaccess_reads_with_nothing_raw_and_no_token(run):
    server = run(LogFile="log", pot="p")
    for data, _ in LOGGED:
        with Raw(server, data) as client:
            client.end()
            assert client.answer(body=not data.startswith(b"HEAD"))
            assert client.answer() is None
    assert server.stop() == 0
    log = server.path("log")
    assert re.fullmatch(rb"[ -~\n]*", log.read_bytes())
    assert "sesame" not in log.read_text() + server.errors()
    assert "Traceback" not in server.errors()
    create, *lines = access_lines(log)
    assert create == '"POST /pot/create HTTP/1.1" 201 15 "-" "-"'
    for line, (_, expected) in zip(lines, LOGGED, strict=True):
        assert re.sub(r'" (4..) \d+ "', r'" \1 0 "', line) == expected
    subprocess.run(
        [needs("goaccess"), "log", "--log-format=COMBINED", "--no-global-config",
         "--output=out.json"], cwd=server.folder, check=True, capture_output=True, timeout=60)
    found = json.loads(server.path("out.json").read_text())["general"]
    assert found["valid_requests"] == len(LOGGED) + 1
    assert found["failed_requests"] == 0


# ---------------------------------------------------------------- log files

@parametrize("file, link, target", [
    ("log", "newest", "log"),
    ("100%%", "newest", "100%"),
    ("logs/log", "logs/newest", "log"),
    ("log", "logs/newest", "../log"),
    ("log", "short/newest", "../../log"),       # short is a link to deep/er
    ("short/log", "short/newest", "log"),
])
def test_the_link_points_to_the_file_from_wherever_it_is(run, tmp_path, file, link, target):
    folder = tmp_path / "idpot0"
    folder.joinpath("logs").mkdir(parents=True)
    folder.joinpath("deep/er").mkdir(parents=True)
    folder.joinpath("short").symlink_to("deep/er")
    server = run(LogFile=file, LogLinkName=link)
    assert os.readlink(folder / link) == target
    server.answer("GET", "/none")
    assert server.stop() == 0
    assert len(access_lines(folder / link)) == 1


def test_the_file_changes_with_its_pattern_and_the_link_follows(run):
    server = run(LogFile="log.%Y-%m-%d %H:%M:%S", LogLinkName="newest")
    sent = 0

    def files():
        return sorted(server.path("").glob("log.*"))

    while len(files()) < 4:
        sent += len(exchange(server, OTHER * 20))
        assert sent < 500_000
    assert server.stop() == 0
    assert os.readlink(server.path("newest")) == files()[-1].name
    assert len(access_lines(*files())) == sent
    for file in files():
        named = time.mktime(time.strptime(file.name, "log.%Y-%m-%d %H:%M:%S"))
        for moment in re.findall(r"\[(.+) [-+]\d+\]", file.read_text()):
            asked = time.mktime(time.strptime(moment, "%d/%b/%Y:%H:%M:%S"))
            assert named - asked in (0, 1)


def test_a_log_file_is_private_and_a_temporary_link_that_was_left_over_stops_no_start(run):
    # A process whose pid comes again had made this link, and was killed before it renamed it.
    server = run(LogFile="log", LogLinkName="newest", python=python_with(
        "os.umask(0)", "os.symlink('gone', f'newest.{os.getpid()}')"))
    assert os.readlink(server.path("newest")) == "log"
    assert server.path("log").stat().st_mode & 0o027 == 0
    server.stop()
    assert list(server.path("").glob("newest.*")) == []


CANNOT_WRITE = "ERROR the access log cannot be written: "


def lost_lines(server):
    return metrics(server)["idpot_log_lines_lost_total"]


def test_logs_that_are_moved_and_links_that_are_deleted_are_made_anew_without_losing_a_line(run):
    server = run(LogFile="log", LogLinkName="newest", pot="p")
    log, newest, *moved = map(server.path, ("log", "newest", "1", "2"))
    with Load([server]) as load:
        for path in moved:
            wait_until(lambda: len(access_lines(log)) >= 200)
            log.rename(path)
            newest.unlink()
            load.more(20)
            server.process.send_signal(SIGHUP)
            wait_until(lambda: log.exists() and newest.is_symlink())
        load.more()
    assert server.stop() == 0
    assert os.readlink(newest) == "log"
    load.all_served()
    assert len(access_lines(log, *moved)) == len(load.history) + 1


# ---------------------------------------------------------------- logs that cannot be written

def test_a_log_folder_that_is_gone_stops_no_ids_and_each_line_is_written_or_counted(run, tmp_path):
    logs, away = tmp_path / "logs", tmp_path / "away"
    logs.mkdir()
    server = run(LogFile=f"{logs}/%S", pot="p")
    with Load([server], Referer="x" * 997) as load:
        logs.rename(away)       # at once: a file that is deleted is made anew
        server.until_says(CANNOT_WRITE)
        load.more(500)
        logs.mkdir()
        wait_until(lambda: access_lines(*logs.iterdir()))
    assert load.all_served() == server.next("p") - 1
    lost = lost_lines(server)
    assert server.stop() == 0
    assert [level for level, _ in server.events()[1:-1]] == ["ERROR", "INFO"]
    assert lost > 0
    written = access_lines(*logs.iterdir(), *away.iterdir())
    assert lost + len(written) == len(load.history) + 3     # create, next, the metrics


def test_a_full_disk_stops_no_ids_and_is_said_once(run, tmp_path):
    with small_disk(tmp_path / "logs", "64k") as logs:
        log, ballast = logs / "log", logs / "ballast"
        server = run(LogFile=log, pot="p")
        ballast.write_bytes(bytes(61440))    # but for a page
        with Load([server], Referer="x" * 997) as load:
            server.until_says(CANNOT_WRITE)
            load.more(500)
            ballast.unlink()
            wait_until(lambda: log.stat().st_size > 8192)
        assert load.all_served() == server.next("p") - 1
        assert server.stop() == 0
        assert server.errors().count(CANNOT_WRITE) == 1


@contextmanager
def full_pipe():
    """The write end of a pipe with room for nothing, which nobody reads."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    yield write_end
    os.close(read_end)
    os.close(write_end)


def redirected(run, stderr, **options):
    """An idpot with a pot p, whose stderr bash redirects so."""
    port = free_port()
    server = run(listen=f"127.0.0.1:{port}", wait=False, **options, python=[
        needs("bash"), "-c", f'exec "$@" {stderr}', "bash", sys.executable])
    wait_until(lambda: not refused(port))
    server.port = port
    server.create("p")
    return server


def assert_ids_and_a_stop_wait_for_nobody(server):
    with Load([server], Referer="x" * 1000) as load:
        load.more(500)      # half a megabyte of access lines: a pipe holds 64 KB
    assert load.all_served() >= 500
    with within(11):
        assert server.stop() == 0


@parametrize("settings", [{}, {"LogFile": "log"}])
def test_neither_ids_nor_a_stop_wait_for_who_reads_stderr(run, settings):
    with full_pipe() as write_end:
        server = redirected(run, f"2>&{write_end}", pass_fds=[write_end], **settings)
        assert_ids_and_a_stop_wait_for_nobody(server)


def test_neither_ids_nor_a_stop_wait_for_who_reads_a_fifo_as_log(run, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDWR)
    assert_ids_and_a_stop_wait_for_nobody(run(LogFile=tmp_path / "fifo", pot="p"))
    os.close(reader)


def test_lines_that_nobody_reads_are_bounded_and_counted(run):
    request = b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: %s\r\n\r\n" % (b"x" * 8000)
    with full_pipe() as write_end:
        server = redirected(run, f"2>&{write_end}", pass_fds=[write_end])
        for _ in range(10):
            exchange(server, request * 500)
        assert lost_lines(server) > 1000        # of 40 MB, of which 16 may wait
        assert server.stop() == 0


def test_a_pipe_that_is_read_late_gets_every_line(run):
    read_end, write_end = os.pipe()
    server = redirected(run, f"2>&{write_end}", pass_fds=[write_end])
    os.close(write_end)
    exchange(server, OTHER * 5000)      # a pipe holds a tenth of their lines
    with open(read_end) as pipe, within(20):
        text = "".join([pipe.readline() for _ in range(5002)])
    assert text.count('"GET /x ') == 5000       # others say that it listens, and of the create
    assert server.stop() == 0


@parametrize("stderr", ["2>&-", "2> >(:)"], ids=["closed", "a pipe nobody reads"])
def test_the_file_gets_its_lines_though_nobody_gets_those_of_stderr(run, stderr):
    server = redirected(run, stderr, LogFile="log", LogLinkName="newest")
    server.path("newest").unlink()
    server.path("newest").mkdir()       # of which stderr is told
    assert statuses(exchange(server, GOOD * 100)) == [200] * 100
    assert server.stop() == 0
    assert server.errors() == ""
    assert len(access_lines(server.path("log"))) == 101
    for file in server.path("").glob("idpot.db*"):
        assert b"listening on" not in file.read_bytes()


# ---------------------------------------------------------------- lines of events

@parametrize("trouble, pots, says", [
    (killed, EIGHT, "MySQL 127.0.0.1:"),
    (lambda database: pot_locked(database, "p0"), ["p0"], "pot p0: ")], ids=["down", "locked"])
def test_a_trouble_is_said_when_it_begins_and_when_it_ends(
        trouble, pots, says, run, mysql, database):
    server = eight_pots(run(**mysql(Timeout=1, LogFile="log")))

    def asked():
        return set(at_once_with(pots, lambda pot: server.status("POST", f"/id/{pot}")))

    before = len(server.events())
    with trouble(database):
        for _ in range(2):
            assert asked() == {503}
    wait_until(lambda: asked() == {200}, 20)
    assert server.stop() == 0
    begin, end, stopped = server.events()[before:]
    assert begin[0] == "WARNING"
    assert begin[1].startswith(says)
    assert re.search(r"\(error 1205\)| 20\d\d ", begin[1])
    assert end[0] == "INFO"
    assert stopped == ("INFO", "stopped")


@parametrize("method, target", [
    ("GET", "/id/p"), ("GET", "/pot/p"), ("GET", "/pot"), ("POST", "/pot/raise?name=p&min=5"),
    ("POST", "/pot/create?name=q"), ("POST", "/id/p")])
def test_any_use_of_the_database_that_succeeds_ends_its_incident(
        method, target, run, mysql, database):
    server = run(**mysql(Timeout=0.5, LogFile="log"), pot="p")
    before = len(server.events())
    with read_only(database):
        assert server.status("POST", "/id/p") == 503
    wait_until(lambda: server.status(method, target) < 300)
    assert server.stop() == 0
    begin, end, _ = server.events()[before:]
    assert begin[0] == "WARNING"
    assert end == ("INFO", f"MySQL 127.0.0.1:{database.port} has recovered")


@fixture
def journal(tmp_path):
    """The environment of an idpot whose stderr is journald's."""
    stderr = tmp_path / "idpot0" / "stderr"
    stderr.parent.mkdir()
    stderr.touch()
    status = stderr.stat()
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def test_under_journald_each_line_has_a_priority_and_no_time(run, journal):
    server = run(listen="0.0.0.0:0", environment=journal)
    exchange(server, OTHER * 200)
    assert server.stop() == 0
    warning, listening, *lines, stopped = server.errors().splitlines()
    assert warning.startswith("<4>0.0.0.0 is not a loopback address and no Token is")
    assert listening == f"<6>listening on http://0.0.0.0:{server.port} (SQLite idpot.db)"
    assert [line[:12] for line in lines] == ["<6>127.0.0.1"] * 200
    assert stopped == "<6>stopped"


# ---------------------------------------------------------------- between idpot and its database

class OddServer(socketserver.ThreadingTCPServer):
    """A with block in which these bytes are sent to whoever connects, and these when something
    comes; None ends the connection then."""
    daemon_threads, block_on_close = True, False

    def __init__(self, data=b"", answer=b""):
        super().__init__(("127.0.0.1", 0), None)
        self.data, self.answer, self.port = data, answer, self.server_address[1]

    def __enter__(self):
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def finish_request(self, client, _):
        with suppress(OSError):
            client.sendall(self.data)
            while client.recv(65536) and self.answer is not None:
                client.sendall(self.answer)


class Proxy(OddServer):
    """Relays TCP to a port as ask() and reply() make each piece; less than came ends it.

    New connections are served only while `answering` is set; those that are older than the last of
    the `losses` hang for ever, as behind a firewall that forgot them.
    """

    def __init__(self, port, ask=bytes, reply=bytes):
        super().__init__()
        self.target, self.ask, self.reply = port, ask, reply
        self.answering = Event()
        self.answering.set()
        self.losses = 0

    def finish_request(self, client, _):
        if self.answering.wait(30):
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with suppress(OSError):
                    self.relay(client, server)

    def relay(self, client, server):
        losses = self.losses
        while True:
            for end in select.select([client, server], [], [])[0]:
                data = end.recv(65536)
                other, alter = (server, self.ask) if end is client else (client, self.reply)
                passed = alter(data)
                if losses == self.losses:
                    other.sendall(passed)
                if not data or len(passed) < len(data):
                    return


@fixture(params=[False, True], ids=["C", "pure"])
def driver(request, monkeypatch):
    """Each form of mysql-connector in turn: that in pure Python is used where the other is not."""
    import mysql.connector
    connect, made = mysql.connector.connect, []

    def connect_so(**options):
        made.append(connect(use_pure=request.param, **options))
        return made[-1]

    monkeypatch.setattr(mysql.connector, "connect", connect_so)
    yield
    for connection in made:
        assert isinstance(connection, mysql.connector.MySQLConnection) == request.param


# ---------------------------------------------------------------- stores: their contract

def stores_of(folder, **settings):
    """A store of this process for each worker; for SQLite that is one."""
    path = Path(folder, "store.cfg")
    path.write_text(config_text(**{"Timeout": 2, **settings}))
    kind = idpot.SqliteStore if "File" in settings else idpot.MysqlStore
    return kind.create_stores(idpot.load_settings(str(path)))


def store_of(folder, **settings):
    """A connected store of this process."""
    [store, *_] = stores_of(folder, **settings)
    store.start()
    store.connect()
    return store


def take_once(store, *claims):
    """What take() returns for these (pot, count, floor)."""
    return store.take([idpot.Claim(*claim) for claim in claims])


def taken(store, *wants):
    """What take() returns; asked again, as a worker does, where that may help."""
    for _ in range(3):
        with suppress(idpot.Transient):
            store.connect()
            return take_once(store, *wants)
    return take_once(store, *wants)


ABC = [("c", 3, 30), ("a", 1, 10), ("b", 2, 20)]


def assert_exhausted(store, pot, count, floor):
    with raises(idpot.Exhausted, match=f'^pot "{pot}" is exhausted: '):
        taken(store, (pot, count, floor))


class StoreContract:
    """What every store does; its pots a, b and c are at 10, 20 and 30, and were looked at."""
    together = True     # whether a call for several pots is one transaction

    @fixture
    def settings(self, tmp_path):
        return {"File": tmp_path / "ids.db"}

    @fixture
    def store(self, settings, tmp_path):
        with closing(store_of(tmp_path, **settings)) as maker:
            for pot, low in zip("abc", (10, 20, 30)):
                maker.create(pot, low)
        with closing(store_of(tmp_path, **settings)) as store:   # a create commits
            assert [store.current(pot) for pot in "abc"] == [10, 20, 30]
            yield store

    @fixture
    def stored(self, tmp_path):
        """stored(): the counters that are left where the process is killed now."""
        def counters():
            # By another process: SQLite's lock ends when its own one closes the file.
            subprocess.run("mkdir -p copy && cp ids.db* copy", shell=True, cwd=tmp_path, check=True)
            with closing(sqlite3.connect(tmp_path / "copy/ids.db")) as file:
                rows = file.execute("SELECT id FROM pot ORDER BY name").fetchall()
                return [value % 2**64 for value, in rows]

        return counters

    @parametrize("count, floor, last", [
        (3, 10, 13),
        (1, 0, 11),         # another idpot has raised the counter
        (1, 4, 11),
        (2**32, 10, 2**32 + 10)])
    def test_a_take_is_above_the_counter_and_stored(self, store, stored, count, floor, last):
        assert taken(store, ("a", count, floor)) == [last]
        assert stored() == [last, 20, 30]
        assert store.current("a") == last

    def test_several_pots_are_taken_in_one_call_each_by_its_own_count(self, store, stored):
        assert taken(store, *ABC) == [33, 11, 22]
        assert stored() == [11, 22, 33]
        assert taken(store, ("b", 1, 22), ("c", 9, 33)) == [23, 42]
        assert stored() == [11, 23, 42]

    def test_a_pot_that_gives_none_fails_the_call_and_no_other_pot(self, store, stored):
        assert store.raise_to("b", MAX_ID - 1) == MAX_ID - 1
        with raises(idpot.IdpotError):
            take_once(store, ("c", 3, 30), ("b", 2, MAX_ID - 1), ("a", 1, 10))
        a, b, c = stored()
        assert b == MAX_ID - 1
        assert (a, c) == (10, 30) or not self.together
        assert taken(store, ("c", 3, c), ("a", 1, a)) == [c + 3, a + 1]

    def test_ids_go_on_above_the_signed_numbers(self, store):
        store.create("high", 2**63 - 3)
        assert taken(store, ("high", 2, 2**63 - 3)) == [2**63 - 1]
        assert taken(store, ("high", 2, 2**63 - 1)) == [2**63 + 1]
        assert store.raise_to("high", 2**63 - 1) == 2**63 + 1
        assert store.raise_to("high", 2**63 + 5) == 2**63 + 5

    def test_each_id_up_to_the_greatest_is_given_and_nothing_behind_it_is_burnt(self, store):
        store.create("whole", MAX_ID - 3)
        assert taken(store, ("whole", 1, MAX_ID - 3)) == [MAX_ID - 2]
        assert_exhausted(store, "whole", 3, MAX_ID - 2)
        assert taken(store, ("whole", 2, MAX_ID - 2)) == [MAX_ID]
        assert_exhausted(store, "whole", 1, MAX_ID)
        assert store.current("whole") == MAX_ID

    def test_pots_are_made_once_listed_raised_forward_and_found_again(
            self, store, settings, tmp_path):
        for pot in ("select", "-", "X" * 60, "x" * 60):
            store.create(pot, 5)
            with raises(idpot.Exists, match=f'^pot "{pot}" exists$'):
                store.create(pot, 99)
        for low in (2**63 + 9, 7):
            assert store.raise_to("select", low) == 2**63 + 9
        assert taken(store, ("-", 1, 5)) == [6]
        store.close()
        again = store_of(tmp_path, **settings)
        assert sorted(again.pots()) == [
            ("-", 6), ("X" * 60, 5), ("a", 10), ("b", 20), ("c", 30), ("select", 2**63 + 9),
            ("x" * 60, 5)]
        again.close()

    def test_a_pot_that_is_not_there(self, store):
        with raises(idpot.NotFound, match='^there is no pot "none"$'):
            store.current("none")
        with raises(idpot.NotFound, match='^there is no pot "none"$'):
            store.raise_to("none", 9)

    def test_a_check_changes_nothing(self, store, stored):
        for pot in ("a", "", "none"):
            store.check(pot)
        assert stored() == [10, 20, 30]


class TestStoreSqlite(StoreContract):
    def test_it_syncs_before_each_answer_and_is_its_alone(self, settings, tmp_path, monkeypatch):
        opened, connect = [], sqlite3.connect

        def connect_so(*rest, **options):
            opened.append(connect(*rest, **options))
            return opened[-1]

        monkeypatch.setattr(sqlite3, "connect", connect_so)
        store = store_of(tmp_path, **settings)
        [file] = opened
        assert file.execute("PRAGMA synchronous").fetchone() == (2,)        # FULL
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert file.execute("PRAGMA locking_mode").fetchone() == ("exclusive",)
        store.close()
        assert sorted(os.listdir(tmp_path)) == ["ids.db", "store.cfg"]


class TestStoreMyisam(StoreContract):
    engine, together = "MyISAM", False

    @fixture(scope="class")
    @classmethod
    def clerk(cls, database):
        """Has all the rights that idpot needs; without a password it needs no TLS."""
        database.sql("CREATE USER clerk")
        database.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON stores.* TO clerk")
        yield
        database.sql("DROP USER clerk")

    @fixture
    def settings(self, database, clerk):
        database.sql("DROP DATABASE IF EXISTS stores")
        database.sql("CREATE DATABASE stores")
        return {"ConnectString": database.dsn("stores", "?tls=false", "clerk"),
                "Engine": self.engine}

    @fixture
    def stored(self, database):
        pots = ", ".join(f"(SELECT id FROM stores.pot_{pot})" for pot in "abc")
        return lambda: list(database.sql(f"SELECT {pots}")[0])

    @parametrize("count, floor", [
        (3, 50),            # somebody has set it back
        (3, 12),            # ... and of its next three not all are above the floor
        (1, 11)])
    def test_a_take_is_above_the_floor_where_the_counter_is_not(self, store, stored, count, floor):
        [last] = taken(store, ("a", count, floor))
        assert floor + count <= last <= floor + 2 * count       # some may be burnt
        assert stored() == [last, 20, 30]

    @parametrize("column, last", [
        ("TINYINT UNSIGNED", 255),
        ("INT UNSIGNED", 4294967295),
        ("BIGINT", 9223372036854775807),
        ("BIGINT UNSIGNED, CHECK (id <= 9007199254740991)", 9007199254740991)])
    def test_a_ceiling_of_the_table_exhausts_it_and_burns_nothing(
            self, store, database, column, last):
        database.sql(f"CREATE TABLE stores.pot_low (id {column}) ENGINE = {self.engine}")
        database.sql(f"INSERT INTO stores.pot_low VALUES ({last - 2})")
        assert store.current("low") == last - 2
        assert_exhausted(store, "low", 3, last - 2)
        with raises(idpot.Exhausted, match="its table holds no greater number$"):
            store.raise_to("low", last + 1)
        assert taken(store, ("low", 2, last - 2)) == [last]
        assert_exhausted(store, "low", 1, last)
        assert store.current("low") == last

    def test_a_connection_that_is_lost_within_a_list_hides_no_counter(self, store, database):
        pots = iter(store.pots())
        assert next(pots) == ("a", 10)
        assert kill_connections(database, "clerk")
        assert list(pots) == [("b", 20), ("c", 30)]

    def test_a_session_that_does_not_commit_gives_no_id(self, store, stored, database, tmp_path):
        altered = []

        def ask(data):
            altered.append(data.replace(b"autocommit=1", b"autocommit=0"))
            return altered[-1]

        with Proxy(database.port, ask) as proxy:
            odd = store_of(tmp_path, Engine=self.engine, ConnectString=(
                f"clerk@tcp(127.0.0.1:{proxy.port})/stores?tls=false"))
            assert b"autocommit=0" in b"".join(altered)
            if self.together:       # MyISAM has no transactions
                with raises(idpot.Transient):
                    take_once(odd, ("a", 1, 10))
                assert stored() == [10, 20, 30]
            odd.close()


class TestStoreInnodb(TestStoreMyisam):
    engine, together = "InnoDB", True

    def test_two_idpots_do_not_lock_each_other_out(self, store, settings, tmp_path):
        other = store_of(tmp_path, **settings)
        wants = [(pot, 1, other.current(pot)) for pot in "abc"]

        def take_from(one, wants):
            return [take_once(one, *wants) for _ in range(100)]

        here, there = at_once(partial(take_from, store, wants),
                              partial(take_from, other, wants[::-1]))
        other.close()
        for at, low in enumerate((10, 20, 30)):
            given = [lasts[at] for lasts in here] + [lasts[2 - at] for lasts in there]
            assert sorted(given) == list(range(low + 1, low + 201))


@mark.usefixtures("driver")
@parametrize("driver", [True], indirect=True)
class TestStoreInPurePython(TestStoreInnodb):
    """By the driver's other form."""


class TestStoreOnAnOddServer(TestStoreInnodb):
    """No variable of the server weakens the promise."""

    @fixture(scope="class", autouse=True, params=[
        "init_connect = 'BEGIN'",
        "init_connect = 'SET autocommit = 0'",
        "completion_type = 1",
        "sql_safe_updates = 1, GLOBAL sql_mode = '', GLOBAL sql_select_limit = 1"])
    @classmethod
    def variables(cls, request, database):
        names = re.findall(r"(\w+) = ", request.param.partition("'SET")[0])
        usual = ", GLOBAL ".join(f"{name} = DEFAULT" for name in names)
        with between(lambda: database.sql(f"SET GLOBAL {request.param}"),
                     lambda: database.sql(f"SET GLOBAL {usual}")):
            yield


# ---------------------------------------------------------------- tables, and what they may be

GO = "id BIGINT UNSIGNED NOT NULL"      # go-idpot's column
NO_NUMBER = "holds no whole number from 0 up"


class TestTables:
    """Tables that were made, altered or written by others; idpot serves them as pots."""

    @fixture(scope="class", params=["MyISAM", "InnoDB"])
    @classmethod
    def server(cls, request, database, tmp_path_factory):
        database.sql("DROP DATABASE IF EXISTS tables_test")
        database.sql("CREATE DATABASE tables_test")
        server = Idpot(tmp_path_factory.mktemp("tables"), Timeout=1, Engine=request.param,
                       ConnectString=database.dsn("tables_test"))
        yield server
        server.stop(SIGKILL)

    @fixture
    def sql(self, database):
        return partial(database.sql, database="tables_test")

    @fixture
    def table(self, server, sql):
        """table(pot, columns, value, ...) makes a pot's table by hand, and a row of each value."""
        def make(pot, columns, *values):
            sql(f"CREATE TABLE pot_{pot} ({columns}) ENGINE = {server.settings['Engine']}")
            for value in values:
                sql(f"INSERT INTO pot_{pot} (id) VALUES ({value})")

        return make

    def test_a_table_made_by_go_idpot_is_used_as_it_is_and_no_other(self, server, sql, table):
        table("from_go", GO, 1000)
        sql("CREATE TABLE potXother (id INT)")
        sql("CREATE VIEW pot_view AS SELECT * FROM potXother")
        assert server.answer("GET", "/pot/from_go") == (204, "")
        assert server.answer("GET", "/id/from_go") == (200, "1000")
        assert server.next("from_go") == 1001
        assert server.answer("POST", "/pot/create", "name=from_go&min=5") == (
            409, 'pot "from_go" exists\n')
        assert sql("SELECT * FROM pot_from_go") == [(1001,)]
        _, pots = server.answer("GET", "/pot")
        assert "from_go\t1001\n" in pots
        assert not re.search("other|view", pots)

    @parametrize("pot, columns", [("keyless", GO), ("keyed", f"{GO} PRIMARY KEY")])
    def test_go_idpot_and_idpot_take_turns(self, server, database, table, pot, columns):
        table(pot, columns, 0)
        with session_on(database, name="tables_test") as go:
            for last in range(1, 20, 2):
                assert server.next(pot) == last
                go.execute(f"UPDATE pot_{pot} SET id = LAST_INSERT_ID(id + 1)")
                assert go.lastrowid == last + 1

    def test_the_table_of_a_new_pot(self, server, sql):
        """InnoDB's has a key that never changes: an open read view makes IDs no dearer."""
        engine = server.settings["Engine"]
        server.create("made")
        [(_, made)] = sql("SHOW CREATE TABLE pot_made")
        made = re.sub(r"int\(\d+\)", "int", made).replace("DEFAULT '1'", "DEFAULT 1")   # MySQL's
        key = ",\n  `one` tinyint NOT NULL DEFAULT 1,\n  PRIMARY KEY (`one`)"
        assert made.startswith("CREATE TABLE `pot_made` (\n  `id` bigint unsigned NOT NULL"
                               f"{key if engine == 'InnoDB' else ''}\n) ENGINE={engine} ")

    def test_twelve_creates_of_one_name_at_two_servers_make_one_row(self, server, sql, run):
        other = run(**server.settings)
        for pot in ("row0", "row1", "row2", "row3"):
            answers = at_once_with([server, other] * 6, lambda one: one.answer(
                "POST", "/pot/create", f"name={pot}&min=7"))
            assert answers.count((201, "Created new pot")) == 1
            assert answers.count((409, f'pot "{pot}" exists\n')) == 11
            assert sql(f"SELECT id FROM pot_{pot}") == [(7,)]

    @parametrize("pot, columns, values, says", [
        ("same", GO, [5, 5], "has several rows, not one"),
        ("top", GO, [5, 18446744073709551615], "has several rows, not one"),
        ("double", "id DOUBLE", [9007199254740992], NO_NUMBER),
        ("decimals", "id DECIMAL(20,2)", [5.5], NO_NUMBER),
        ("varchar", "id VARCHAR(20)", ["'5'"], NO_NUMBER),
        ("null", "id BIGINT UNSIGNED", ["NULL"], NO_NUMBER),
        ("negative", "id BIGINT", [-5], NO_NUMBER),
        ("columnless", "number BIGINT UNSIGNED", [], "has no column id")])
    def test_a_table_that_holds_no_counter_gives_no_id_and_stays_as_it_is(
            self, server, sql, table, pot, columns, values, says):
        table(pot, columns, *values)
        before = sql(f"SELECT * FROM pot_{pot}")
        text = f'the table of pot "{pot}" {says}'
        for method, target, form in [
                ("POST", f"/id/{pot}", None),
                ("POST", f"/id/{pot}", "count=2"),
                ("POST", f"/id/{pot}", "range=2"),
                ("GET", f"/id/{pot}", None),
                ("POST", "/pot/raise", f"name={pot}&min=9"),
                ("POST", f"/id/{pot}", None)]:
            assert_refused(server.request(method, target, form), f"^{text}\n")
        assert sql(f"SELECT * FROM pot_{pot}") == before
        assert f"{pot}\t-\n" in server.answer("GET", "/pot")[1]
        assert logged(server).count(text) == 1

    def test_a_table_without_a_row_is_waited_for_and_a_create_mends_it(self, server, sql, table):
        table("empty", GO)
        with within(3):
            answer = server.request("POST", "/id/empty")
        assert_refused(answer, '^the table of pot "empty" has no row', again="1")
        with Raw(server, b"POST /id/empty HTTP/1.1\r\nHost: x\r\n\r\n") as early:
            server.create("empty", 8)
            assert issued([early.answer()]) == [9]
        assert sql("SELECT id FROM pot_empty") == [(9,)]

    @parametrize("column, low", [
        ("DOUBLE", 2**53 - 2), ("DOUBLE", 2**63 + 5000), ("FLOAT", 2**53 - 3),
        ("VARCHAR(20)", 10**18)])
    def test_a_column_that_is_altered_while_idpot_serves_gives_no_id_twice(
            self, server, sql, column, low):
        pot = f"altered{column[:3]}{low}"
        server.create(pot, low)
        ids = [server.next(pot)]
        sql(f"ALTER TABLE pot_{pot} MODIFY id {column} NOT NULL")
        for _ in range(5):
            status, text = server.answer("POST", f"/id/{pot}")
            if status == 200:
                ids.append(int(text))
        assert ids == sorted(set(ids))
        assert status in (409, 503)

    def test_a_second_row_costs_the_pot_until_it_is_gone(self, server, sql):
        server.create("second")
        assert server.next("second") == 1
        if server.settings["Engine"] == "InnoDB":
            sql("ALTER TABLE pot_second DROP PRIMARY KEY")
        sql("INSERT INTO pot_second (id) VALUES (500)")
        for _ in range(3):
            assert server.status("POST", "/id/second") == 503
        sql("DELETE FROM pot_second WHERE id = 500 OR id > 502")
        assert server.next("second") < 10

    def test_a_counter_that_was_set_back_goes_on_above_what_was_given(self, server, sql):
        server.create("back")
        assert server.next("back", 200)[-1] == 200
        sql("UPDATE pot_back SET id = 100")
        assert server.answer("GET", "/id/back") == (200, "200")
        assert "back\t200\n" in server.answer("GET", "/pot")[1]
        assert server.next("back") == 201
        warning = "the counter of pot back was set back to 100, but 200 was issued: it continues"
        assert logged(server).count(warning) == 1
        server.next("back", 99)
        sql("UPDATE pot_back SET id = 100")
        status, raised = server.answer("POST", "/pot/raise", "name=back&min=150")
        assert status == 200
        assert server.next("back") == int(raised) + 1 > 300

    def test_a_counter_that_was_set_back_above_the_signed_numbers(self, server, sql, run):
        """GREATEST of MariaDB is signed."""
        server.create("high", 9223372036854775900)
        assert server.next("high") == 9223372036854775901
        sql("UPDATE pot_high SET id = 9223372036854775810")
        assert server.next("high") == 9223372036854775902
        sql("UPDATE pot_high SET id = 3")
        assert server.next("high") == 9223372036854775903
        for one in (server, run(**server.settings)):        # the second has given none
            assert one.answer("POST", "/pot/raise", "name=high&min=5") == (
                200, "9223372036854775903")

    def test_pots_that_are_asked_for_together_one_of_which_was_set_back(self, server, sql):
        pots = [f"together{number}" for number in range(8)]
        for pot in pots:
            server.create(pot)
        before = at_once_with(pots, server.next)
        for value in (0, 1, 0):
            sql(f"UPDATE pot_together3 SET id = {value}")
            after = at_once_with(pots, server.next)
            for low, last in zip(before, after):
                assert low < last < low + 9     # a call that fails may burn IDs of its pots
            before = after


def test_a_trigger_is_told_once_and_burns_little(run, mysql, database):
    server = run(**mysql(Timeout=1))
    database.sql(f"CREATE TABLE host.pot_p ({GO})")
    database.sql("INSERT INTO host.pot_p VALUES (9)")
    database.sql("CREATE TRIGGER host.on_p BEFORE UPDATE ON host.pot_p FOR EACH ROW SET @x = 1")
    for _ in range(2):
        status, text = server.answer("POST", "/id/p")
        assert status == 503
        assert "or its table has a trigger" in text
    assert database.counter("p", "host") <= 25
    assert server.answer("POST", "/pot/raise", "name=p&min=5000") == (200, "5000")
    assert logged(server).count("has a trigger") == 1


# ---------------------------------------------------------------- rights, and what a server refuses

def needs_mysql():
    """Skips the test where the server is no MySQL; no failure in CI: Debian has MariaDB only."""
    if "IDPOT_TEST_MYSQLD" not in os.environ:
        pytest.skip("this needs a MySQL server: let IDPOT_TEST_MYSQLD name one")


def test_a_create_that_the_account_may_not_make(run, mysql, database):
    database.sql("REVOKE CREATE ON host.* FROM least")
    server = run(**mysql())
    with within(5):
        answer = server.request("POST", "/pot/create", "name=p")
    assert_refused(answer, "error (1142|1044)")


@parametrize("change, number", [
    ("IDENTIFIED BY 'other'", 1045), ("PASSWORD EXPIRE", 1862), ("ACCOUNT LOCK", 3118)])
def test_an_account_that_was_changed(change, number, run, mysql, database):
    if number == 3118:
        needs_mysql()
    server = run(**mysql(Timeout=1), pot="p")
    if not database.is_mysql:
        database.sql("SET GLOBAL disconnect_on_expired_password = ON")
    database.sql(f"ALTER USER least {change}")
    kill_connections(database, "least")
    assert_refused(server.request("POST", "/id/p"), f"error {number}")


@parametrize("options, setting, target, number", [
    (["--log-bin", "--server-id=1", "--transaction-isolation=READ-COMMITTED"],
     "binlog_format = STATEMENT", "/id/p", 1665),
    (["--disabled-storage-engines=MyISAM"], "sql_require_primary_key = OFF", "/pot/create", 3161),
    ([], "sql_require_primary_key = ON", "/pot/create", 3750)])
def test_what_a_server_refuses_for_good(options, setting, target, number, run, request):
    if number > 3000:
        needs_mysql()
    server = Database(*options)
    request.addfinalizer(server.remove)
    server.sql("CREATE TABLE idpot.pot_p (id BIGINT UNSIGNED NOT NULL) ENGINE = InnoDB")
    server.sql("INSERT INTO idpot.pot_p VALUES (5)")
    server.sql(f"SET GLOBAL {setting}")
    form = "name=q" if target == "/pot/create" else None
    with within(8):
        answer = run(ConnectString=server.dsn()).request("POST", target, form)
    assert_refused(answer, f"error {number}")


PURE = ("sys.modules['_mysql_connector'] = None",)     # the driver without C
GREETING = (        # of a MySQL that offers TLS
    b"\x49\0\0\0\x0a9.7.0\0\x07\0\0\0saltsalt\0\xff\xff\x2d\x02\0\xff\xdf\x15" + bytes(10)
    + b"saltsaltsalt\0caching_sha2_password\0")


@parametrize("driver, answer", [
    ((), b"\x02\0\0\x02\x01\x04"),                              # go on in plain text, by TLS
    (PURE, b"\x16\0\0\x02\xff\x15\x04#28000Access denied")], ids=["C", "pure"])
def test_a_login_that_needs_tls_says_so(driver, answer, run):
    with OddServer(GREETING, answer) as odd:
        server = run(wait=False, python=python_with(*driver), Engine="InnoDB",
                     ConnectString=f"sha:p@tcp(127.0.0.1:{odd.port})/idpot?tls=false")
        assert server.process.wait(10) == 1
    assert re.fullmatch(r"idpot: MySQL [ -~]* (2061|1045) [ -~]*; it may need TLS on the server, "
                        r"or its socket: unix\(/path\)\n", server.errors())


# ---------------------------------------------------------------- SQLite

def test_sqlite_is_killed_under_load_on_several_pots(run):
    server = run(Timeout=PATIENCE, LogFile="log")
    loads = [Load([server], pot) for pot in "abc"]
    for load in loads:
        server.create(load.pot)
    with all_of(loads):
        for _ in range(3):
            for load in loads:
                load.more()
            server.stop(SIGKILL)
            server.start()
        for load in loads:
            load.recover()
    for load in loads:
        counter = server.next(load.pot) - 1
        load.verdict(counter, may_lose=[0])
        assert counter - load.issued() <= 3 * 16    # twelve clients had no more in flight


def test_a_file_is_refused_to_a_second_idpot(run, tmp_path):
    server = run(File=tmp_path / "ids.db", LogFile="log", pot="mine")
    with Load([server], "mine") as load:
        load.more()
        line = refusal(tmp_path, START, File="ids.db")
        load.more()
    assert line == 'idpot: SQLite file "ids.db": another process uses it'
    assert load.all_served() == server.next("mine") - 1


@parametrize("change", [
    os.remove,
    lambda path: os.rename(path, f"{path}.old"),
    lambda path: os.rename(shutil.copy(path, f"{path}.copy"), path)],
    ids=["removed", "moved", "replaced"])
def test_a_file_that_is_not_there_any_more_gives_no_id(change, run, tmp_path):
    server = run(Timeout=1, File=tmp_path / "ids.db")
    server.create("p", 41)
    server.stop()       # so that all is in the one file
    server.start()
    assert server.next("p") == 42
    change(tmp_path / "ids.db")
    for method, target in [("POST", "/id/p"), ("GET", "/healthz"), ("POST", "/id/p?count=2"),
                           ("POST", "/id/none")]:
        assert_refused(server.request(method, target), "removed or replaced: restart")
    second = run(File=tmp_path / "ids.db")
    second.create("q")
    for pot in "qp":
        assert server.status("POST", f"/id/{pot}") == 503


def test_a_value_that_is_no_whole_number_stops_the_start_and_is_named(tmp_path):
    with closing(sqlite3.connect(tmp_path / "ids.db")) as file, file:
        file.execute("CREATE TABLE pot (name TEXT PRIMARY KEY, id INTEGER NOT NULL)")
        file.execute("INSERT INTO pot VALUES ('sound', 5), ('half', 5.5)")
    line = refusal(tmp_path, START, File="ids.db")
    assert re.match('idpot: SQLite file "ids.db": .*half', line)


def test_a_full_disk_is_said_when_it_begins_and_when_it_ends(run, tmp_path):
    with small_disk(tmp_path / "disk", "16m") as disk:
        server = run(Timeout=PATIENCE, LogFile="log", File=disk / "ids.db", pot="full")
        assert server.next("full", 20)[-1] == 20
        ballast = disk / "ballast"
        with open(ballast, "wb", buffering=0) as file, raises(OSError, match="No space"):
            while True:
                file.write(bytes(65536))
        with Load([server], "full") as load:
            wait_until(load.refused)
            assert load.statuses().keys() == {503}
            assert not healthy(server)
            ballast.unlink()
            load.recover()
        load.verdict(server.next("full") - 1)
        assert min(answer.first for answer in load.served()) > 20
        assert server.stop() == 0
    _, (level, text), end, _ = server.events()
    assert (level, end[0]) == ("WARNING", "INFO")
    assert "database or disk is full" in text


# ---------------------------------------------------------------- allocation

@parametrize("asked", [[1] * 60, [3] * 60, [2, 3] * 30], ids=["1", "3", "2 or 3"])
def test_of_the_last_ten_ids_each_is_given_that_is_asked_for(asked, run, mysql):
    server = run(**mysql())
    server.create("p", MAX_ID - 10)
    with clients(server, 60, OTHER, 404) as crowd:
        with stopped(server):
            for client, count in zip(crowd, asked):
                client.send(b"POST /id/p?count=%d HTTP/1.1\r\nHost: x\r\n\r\n" % count)
        answers = [client.answer() for client in crowd]
    given = sorted(issued(answers))
    last = given[-1]
    assert given == list(range(MAX_ID - 9, last + 1))
    assert set(statuses(answers)) == {200, 409}
    refused = [count for count, status in zip(asked, statuses(answers)) if status == 409]
    assert min(refused) > MAX_ID - last
    assert server.answer("GET", "/id/p") == (200, str(last))
    assert sum([value for name, value in metrics(server).items() if "db_errors" in name]) < 20


def asked_all_along(server, request=b"POST /id/none%d HTTP/1.1\r\nHost: x\r\n\r\n"):
    """A block in which sixteen clients send the request again and again, with their numbers."""
    def ask(number):
        count = 40 + 40 * number        # they are not to end together
        with Raw(server, request % number * count) as client:
            while client.came.count(b"HTTP/1.1 ") < count:
                assert client.receive()

    return meanwhile(16, ask)


@parametrize("others", [[], [b"POST /id/full HTTP/1.1\r\nHost: %d\r\n\r\n"]], ids=["404", "409"])
@parametrize("connections", [0, 1, 8], ids=["SQLite", "1", "8"])
def test_pots_that_give_no_id_hold_up_no_pot_and_no_list(connections, others, mysql, run):
    settings = mysql(Connections=connections) if connections else {}
    server = run(**settings, python=python_with(*CLOCK))
    server.create("full", MAX_ID)
    assert server.answer("POST", "/id/full")[0] == 409
    server.path("later").touch()        # a failure puts a pot back for a time
    with asked_all_along(server, *others):
        server.create("p")
        for last in range(1, 21):
            assert server.next("p") == last
            assert server.answer("GET", "/pot") == (200, f"full\t{MAX_ID}\np\t{last}\n")


@parametrize("others", [[], [b"GET /id/p HTTP/1.1\r\nHost: %d\r\n\r\n"]], ids=["404", "GET"])
def test_a_pot_whose_lock_is_over_does_not_wait_behind_what_others_ask_all_along(
        others, mysql, run, database):
    server = run(**mysql(Connections=1, Timeout=12), pot="p")
    with asked_all_along(server, *others), Raw(server) as client:
        with pot_locked(database, "p"):
            client.send(GOOD)
            wait_until(lambda: ERROR_1205 in metrics(server))
        assert client.status() == 200


def test_a_pot_that_was_refused_a_thousand_times_is_served_when_its_lock_is_over(
        mysql, run, database):
    server = run(**mysql())
    server.create("p", MAX_ID - 1)
    two = b"POST /id/p?count=2 HTTP/1.1\r\nHost: x\r\n\r\n"
    assert statuses(exchange(server, two * 1100)) == [409] * 1100
    with Raw(server) as client:
        with pot_locked(database, "p"):
            client.send(GOOD)
            wait_until(lambda: ERROR_1205 in metrics(server))
        with within(3):
            assert client.status() == 200


def test_after_a_call_that_failed_the_next_ones_wait_for_locks_again(mysql, run, database):
    server = run(**mysql(Connections=1), pot="p")
    server.create("full", MAX_ID)
    with clients(server, 2, OTHER, 404) as [sound, exhausted]:
        with stopped(server):       # so that both are served by one call, which fails
            sound.send(GOOD)
            exhausted.send(b"POST /id/full HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (sound.status(), exhausted.status()) == (200, 409)
    with Raw(server) as client:
        with pot_locked(database, "p"):
            client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
            until_locked(database, "p")


CLOCK = (       # for python_with(): it is 70 seconds later when there is a file "later"
    "import time", "real = time.monotonic",
    "time.monotonic = lambda: real() + 70 * os.path.exists('later')")


def slowly(name, seconds, *before):
    """The command of an idpot with a slow disk or database: this of its stores takes so long."""
    return python_with(
        *before, "import idpot, threading", f"call = idpot.{name}",
        f"wait = lambda: threading.Event().wait({seconds})",
        f"idpot.{name} = lambda *given, **more: wait() or call(*given, **more)")


def test_pots_on_a_slow_disk_are_still_served_together(run):
    server = eight_pots(run(python=slowly("SqliteStore.take", 0.5)))
    for last in ("2", "3"):
        for pot in EIGHT:       # that this is refused is no trouble of the pot
            assert server.status("POST", "/pot/create", f"name={pot}") == 409
        with within(3):     # one after the other they take 4 s
            assert answers_at_once(server) == [(200, last)] * 8


def test_pots_of_a_slow_database_take_turns(mysql, run):
    server = run(**mysql(Connections=2, Timeout=4), python=slowly("MysqlStore.take", 0.3), pot="p")
    server.create("q")
    assert (server.next("p"), server.next("q")) == (1, 1)
    with meanwhile(12, lambda _: server.next("p")):
        for last in (2, 3, 4):
            assert server.next("q") == last


def test_while_a_pot_is_looked_at_others_are_answered_and_who_asks_for_it_is_next(mysql, run):
    server = run(**mysql(), python=slowly("MysqlStore.current", 0.05))
    early = soon = 0
    with clients(server, 2, OTHER, 404) as [asked, too]:
        for _ in range(20):
            send_apart(server, asked, GOOD)
            early += nothing_comes(asked, 0)        # though another client has its answer
            send_apart(server, too, GOOD)
            assert asked.status() == 404
            soon += not nothing_comes(too, 0.12)    # 0.2 s, where nobody is woken
            assert too.status() == 404
    assert min(early, soon) > 12


def test_what_was_answered_503_is_not_done_afterwards(run):
    server = run(Timeout=0.3, pot="p", python=slowly("SqliteStore.raise_to", 1.5))
    with clients(server, 5, OTHER, 404) as crowd:
        with stopped(server):       # so that one worker has all
            for client, low in zip(crowd, (10, 20, 30, 40, 50)):
                client.send(b"POST /pot/raise?name=p&min=%d HTTP/1.1\r\nHost: x\r\n\r\n" % low)
        assert {client.status() for client in crowd} == {503}
    wait_until(lambda: server.status("GET", "/id/p") == 200)
    assert current_p(server) < 50       # the first had begun


TROUBLES = {    # engine; what makes a pot at 1 give no ID, in a session of its own; what mends it
    "locked tables": ("MyISAM", "LOCK TABLES {} WRITE", "UNLOCK TABLES"),
    "locked rows": ("InnoDB", "BEGIN; UPDATE {} SET id = id", "ROLLBACK"),
    "without a row": ("MyISAM", "DELETE FROM {}", "INSERT INTO {} VALUES (1)"),
    "error 1644": (
        "MyISAM", "CREATE TRIGGER {0}_no BEFORE UPDATE ON {0} FOR EACH ROW SIGNAL SQLSTATE '45000'",
        "DROP TRIGGER {0}_no"),
}


def test_no_more_than_64_pots_are_taken_in_one_call(run):
    server = run(python=python_with(
        "import idpot", "call = idpot.SqliteStore.take",
        "say = lambda claims: print(len(claims), file=sys.stderr)",
        "idpot.SqliteStore.take = lambda *given, **more: say(given[1]) or call(*given, **more)"))
    pots = [f"p{number}" for number in range(70)]
    for pot in pots:
        server.create(pot)
        assert server.next(pot) == 1
    with clients(server, 70, OTHER, 404) as crowd:
        with stopped(server):
            for client, pot in zip(crowd, pots):
                client.send(b"POST /id/%s HTTP/1.1\r\nHost: x\r\n\r\n" % pot.encode())
        assert issued([client.answer() for client in crowd]) == [2] * 70
    assert max(map(int, re.findall(r"(?m)^\d+$", server.errors()))) == 64


def test_after_a_batch_has_failed_the_jobs_of_all_its_pots_count_a_retry_and_know_the_reason(
        mysql, run, database):
    with Proxy(database.port) as proxy:
        server = run(**mysql(Connections=1, Timeout=2) | {"Port": proxy.port}, pot="p")
        server.create("q")
        assert (server.next("p"), server.next("q")) == (1, 1)
        retries = metrics(server)["idpot_db_retries_total"]
        with clients(server, 2, OTHER, 404) as both:
            with session_on(database, "LOCK TABLES pot_p WRITE, pot_q WRITE", name="host"):
                with stopped(server):       # so that one call serves both
                    for client, pot in zip(both, (b"p", b"q")):
                        client.send(b"POST /id/%s HTTP/1.1\r\nHost: x\r\n\r\n" % pot)
                wait_until(lambda: waiting_for_lock(database, "p"))
                proxy.answering.clear()     # no other connection can be made
                assert kill_connections(database, "least") == 1
            answers = [client.answer() for client in both]
        for status, _, body in answers:
            assert status == 503
            assert re.search(rb"\(error \d+\), tried for 2 seconds\n$", body)
        assert metrics(server)["idpot_db_retries_total"] == retries + 2
        proxy.answering.set()


@slow
def test_a_database_that_is_slow_or_far_isolates_no_pot(first, run):
    pots = [f"p{number}" for number in range(20)]
    delay = [0.0]       # seconds that each reply takes longer
    def ask(data):
        time.sleep(delay[0])
        return data

    with Proxy(first.port, ask) as proxy:
        server = run(**on_servers(proxy.port, timeout=10))
        for pot in pots:
            server.create(pot)
            server.next(pot)
        delay[0] = 0.3
        taken = []

        def take(number):
            taken.append(server.next(pots[number % 20]))

        with meanwhile(64, take):
            wait_until(lambda: len(taken) > 400, 40)    # until then each worker connects, in 3 s
            before, start = len(taken), monotonic()
            wait_until(lambda: monotonic() > start + 4)
            rate = (len(taken) - before) / (monotonic() - start)
    assert rate > 50        # 76 to 100 here; 32 where each pot is isolated in turn


@contextmanager
def troubled(database, pots, harm, mend, name="host"):
    """A block in which the harm is done to each of the pots in that database."""
    sessions = []
    for pot in pots:
        statements = harm.format(f"pot_{pot}").split("; ")
        sessions.append(session_on(database, *statements, name=name))
    with all_of(sessions) as cursors:
        yield
        for pot, cursor in zip(pots, cursors):
            cursor.execute(mend.format(f"pot_{pot}"))


@slow
@parametrize("engine, harm, mend", TROUBLES.values(), ids=TROUBLES)
def test_twelve_pots_in_trouble_do_not_hold_up_a_sound_one(
        engine, harm, mend, mysql, run, database):
    server = run(**mysql(Timeout=60, Engine=engine))
    bad = [f"bad{number}" for number in range(12)]
    for pot in ["p", *bad]:
        server.create(pot)
        assert server.next(pot) == 1
    took = []
    with troubled(database, bad, harm, mend):
        waiting = [asking(server, pot) for pot in bad]
        until_in_flight(server, 12)
        begin = monotonic()
        while monotonic() < begin + 2.5:
            start = monotonic()
            server.next("p")
            took.append(monotonic() - start)
        with within(2):
            assert healthy(server)
        assert in_flight(server) == 12
    with all_of(waiting):
        assert {client.status() for client in waiting} == {200}
    assert max(took) < 3        # 4 to 10 s, where a lock is waited for by all workers
    assert len(took) > 50


def test_a_pot_that_gives_no_id_can_be_read_meanwhile(mysql, run, database):
    server = run(**mysql())
    server.create("p", 1)
    with troubled(database, ["p"], *TROUBLES["error 1644"][1:]):
        waiting = [asking(server, "p") for _ in range(3)]
        until_in_flight(server, 3)
        with within(2):
            assert server.answer("GET", "/id/p") == (200, "1")
            assert server.answer("GET", "/pot/p") == (204, "")
            assert server.answer("GET", "/pot") == (200, "p\t1\n")
    with all_of(waiting):
        assert {client.status() for client in waiting} == {200}


def test_forty_that_wait_share_a_statement_and_a_lone_one_costs_one(run, mysql, database):
    server = run(**mysql(), pot="p")
    with pot_locked(database, "p"):
        waiting = [asking(server, "p") for _ in range(40)]
        until_in_flight(server, 40)
    with all_of(waiting):
        assert sorted(issued([client.answer() for client in waiting])) == list(range(1, 41))
    statements = metrics(server)["idpot_db_statements_total"]
    assert statements < 15      # the lock may have been waited for several times
    assert [server.next("p") for _ in range(20)] == list(range(41, 61))
    assert metrics(server)["idpot_db_statements_total"] == statements + 20


def test_a_connection_that_is_refused_costs_those_that_there_are_nothing(mysql, database, tmp_path):
    one, other, *_ = stores_of(tmp_path, **mysql())
    database.sql("ALTER USER least WITH MAX_USER_CONNECTIONS 1")
    one.create("p", 0)
    with ThreadPoolExecutor(1) as pool:
        with pot_locked(database, "p"):
            answer = pool.submit(take_once, one, ("p", 1, 0))
            until_locked(database, "p")
            with raises(idpot.Transient):
                other.connect()
        assert answer.result() == [1]


# ---------------------------------------------------------------- grammar

FORM = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: 7\r\n\r\ncount=2")
CHUNKED = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
           b"Transfer-Encoding: chunked\r\n\r\n")
EXPECTING = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
             b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 7\r\n\r\n")
RESET_AT_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)

# Each is answered with 400, costs no ID and ends the connection.
MALFORMED = [
    # RFC 9112, 3: the request line
    b"POST HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST  /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST\t/id/p\tHTTP/1.1\r\nHost: x\r\n\r\n",
    b"PO(ST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    # RFC 9112, 2.3: the version; 9.8: other protocols
    b"POST /id/p http/1.1\r\nHost: x\r\n\r\n",
    b"POST /id/p HTTP/1.10\r\nHost: x\r\n\r\n",
    b"POST /id/p HTTP\r\nHost: x\r\n\r\n",
    b"PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\nPOST /id/p HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(100)),
    # RFC 9112, 2.2: bare LF, bare CR, white space before the first header
    b"POST /id/p HTTP/1.1\nHost: x\n\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\rX: b\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\n Host: x\r\n\r\n",
    # RFC 9110, 5.5: control bytes in a header's value
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x7fb\r\n\r\n",
    # RFC 9112, 5: no colon; 5.1: space before the colon; 5.2: folded lines
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nXa\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n\tchunked\r\n\r\n",
    # RFC 9110, 5.1: header names
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX@y: 1\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\n: 1\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\xe9: 1\r\n\r\n",
    # RFC 9112, 3.2: header Host
    b"POST /id/p HTTP/1.1\r\n\r\n",
    b"POST /id/p HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nhOST: x\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: a@b\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: [::1\r\n\r\n",
    # RFC 9110, 8.6: Content-Length; RFC 9112, 6.3: two of them; 11.2: one that hides a request
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: \r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\xa0\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0_5\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: \xb2\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\ncontent-length: 0\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 32\r\n\r\n"
    b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551617\r\n\r\n",
    # RFC 9112, 3.2: targets of no form, or of a form that is for a proxy or another method
    b"POST http:///id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST http://u@x/id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST ftp://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /id/p#x HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST \\id\\p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    # RFC 9112, 3.2: bytes in the target
    b"POST /id/p\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /id/\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
    # RFC 9112, 6.1 and 6.3: chunked with a length, twice, or in HTTP/1.0
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /id/p HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
]

# Each is answered with 200 and costs one ID, and the connection stays.
SERVED = [
    GOOD,
    b"\r\n" * 30 + GOOD,
    # RFC 9110, 5.5 and RFC 9112, 5: headers that are right, if unusual
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\tb\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nUser-Agent: caf\xe9\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length:\t 0 \t \r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length:0\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 499 + b"\r\n",
    # RFC 9110, 7.2: hosts
    b"POST /id/p HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost:\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: id-pot.example.\r\n\r\n",
    # RFC 9112, 3.2.2: absolute targets
    b"POST HTTP://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST http://y:80/id/p? HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /id/p? HTTP/1.1\r\nHost: x\r\n\r\n",
    # RFC 9112, 9.3: options that do not end the connection
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: closed, x-close\r\n\r\n",
    b"POST /id/p HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
    # RFC 9110, 10.1.1: the expectation means nothing in HTTP/1.0, nor without a body
    b"POST /id/p HTTP/1.0\r\nExpect: 100-continue\r\nConnection: keep-alive\r\n\r\n",
]

# What is sent, the statuses of the answers in order, how many IDs of pot p that costs, and what the
# connection does then.
KEPT, CLOSED = "kept", "closed"
OTHERS = [
    # RFC 9110, 15.6.6: versions that are not spoken; RFC 9113, 3.4: HTTP/2
    (b"POST /id/p HTTP/0.9\r\nHost: x\r\n\r\n", [505], 0, CLOSED),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04", [505], 0, CLOSED),
    # RFC 9110, 9.1: methods
    (b"post /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], 0, KEPT),
    # RFC 9112, 9.3: when the connection closes
    (b"POST /id/p HTTP/1.0\r\n\r\n", [200], 1, CLOSED),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: foo , ,\tClOsE,bar\r\n\r\n", [200], 1, CLOSED),
    (b"POST /id/p HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n", [200], 1, CLOSED),
    # RFC 9110, 15.5.14: the body is too long; a GET's means nothing
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n\r\n" + b"a" * 65536,
     [200], 0, KEPT),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n", [413], 0, CLOSED),
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 32\r\n\r\n" + GOOD, [200], 0, KEPT),
    # RFC 9110, 15.5.16: the type of a form; no type is a form's
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nContent-Type: "
     b"Application/X-WWW-Form-URLencoded;charset=UTF-8\r\n\r\ncount=2", [200], 2, KEPT),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\ncount=2", [200], 2, KEPT),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
     b"Content-Length: 11\r\n\r\n{\"count\":2}", [415], 0, KEPT),
    # RFC 9110, 15.5.15: the target is too long; RFC 6585, 5: the head is
    (b"POST /" + b"p" * 8175 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /" + b"p" * 8176 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [414], 0, CLOSED),
    (b"POST /id/p?" + b"p" * 300000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [414], 0, CLOSED),
    (b"A" * 300000, [414], 0, CLOSED),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 16347 + b"\r\n\r\n", [200], 1, KEPT),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 16348 + b"\r\n\r\n", [431], 0, CLOSED),
    # RFC 9110, 10.1.1 and 15.5.18: expectations
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 7\r\n"
     b"Content-Type: application/x-www-form-urlencoded\r\n\r\ncount=2", [200], 2, KEPT),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 70000\r\n\r\n",
     [413], 0, CLOSED),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue, a-miracle\r\n\r\n",
     [417], 0, CLOSED),
    # RFC 9112, 9.3.2: several requests in one send
    (FORM * 50, [200] * 50, 100, KEPT),
    (b"POST /id/none HTTP/1.1\r\nHost: x\r\n\r\n" + GOOD, [404, 200], 1, KEPT),
    (GOOD + b"POST /id/p HTTP/1.1\r\nHost: x\r\nXa\r\n\r\n" + GOOD, [200, 400], 1, CLOSED),
    (GOOD + b"\r\n" + GOOD, [200, 200], 2, KEPT),
    # RFC 6454, 7: two Origins are one, too; codings other than chunked
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nOrigin: x\r\nOrigin: x\r\n\r\n", [403], 0, KEPT),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
     b"0\r\n\r\n", [501], 0, CLOSED),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
     b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [501], 0, CLOSED),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n", [501], 0, CLOSED),
    # No name needs an escape, and a proxy's rule may have looked at the raw path
    (b"POST /id/%70 HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /%69d/p HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /id%2Fp HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /id%2fp HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /id/p% HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /id/p%0d%0aX:1 HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /pot%2fraise?name=p&min=9999999 HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    # The absolute form is known at the very start of a target only
    (b"POST http://x HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST http://x/id%2fp HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /idhttp://x/p HTTP/1.1\r\nHost: x\r\n\r\n", [404], 0, KEPT),
    (b"POST /id/p?http://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400], 0, KEPT),
]

# Chunked bodies (RFC 9112, 7.1), behind CHUNKED: the body, the status, how many IDs that costs.
CHUNKS = [
    (b"0\r\n\r\n", 200, 1),
    (b"3\r\ncou\r\n4\r\nnt=3\r\n0\r\n\r\n", 200, 3),
    (b"00B\r\nc%6Funt=%33\r\n0\r\n\r\n", 200, 3),
    (b"7;a=b;c=\"d\"\r\ncount=3\r\n0;e\r\n\r\n", 200, 3),
    (b"7 ;a\r\ncount=3\r\n0\t; e\r\n\r\n", 200, 3),     # RFC 9110, 5.6.3
    (b"7\r\ncount=3\r\n0\r\nX: y\r\nContent-Length: 9\r\n\r\n", 200, 3),
    (b"7;" + b"x" * 7000 + b"\r\ncount=3\r\n0\r\n\r\n", 200, 3),
    (b"7\r\ncount=3\r\n0\r\nX: " + b"x" * 7000 + b"\r\n\r\n", 200, 3),
    (b"1\r\n&\r\n" * 90 + b"7\r\ncount=3\r\n0\r\n\r\n", 200, 3),
    (b"+7\r\ncount=3\r\n0\r\n\r\n", 400, 0),
    (b"0x7\r\ncount=3\r\n0\r\n\r\n", 400, 0),
    (b" 7\r\ncount=3\r\n0\r\n\r\n", 400, 0),
    (b"\xd9\xa7\r\ncount=3\r\n0\r\n\r\n", 400, 0),
    (b"7\ncount=3\r\n0\r\n\r\n", 400, 0),
    (b"7;a\nb\r\ncount=3\r\n0\r\n\r\n", 400, 0),
    (b"7\r\ncount=3\n0\r\n\r\n", 400, 0),
    (b"7\r\ncount=3xx0\r\n\r\n", 400, 0),
    (b"7\r\ncount=3\r\n0\n\n", 400, 0),
    (b"7\r\ncount=3\r\n0\r\nX y\r\n\r\n", 400, 0),
    (b"fffffffffffffffff\r\n", 400, 0),
    (b"ffffffffffffffff\r\n", 413, 0),
    (b"10001\r\n", 413, 0),
    (b"8000\r\n" + b"x" * 32768 + b"\r\n8000\r\n" + b"x" * 32768 + b"\r\n1\r\n", 413, 0),
    # More than 8 KiB of sizes, extensions and trailers; each chunk counts for some bytes more
    (b"7;" + b"x" * 9000 + b"\r\ncount=3\r\n0\r\n\r\n", 413, 0),
    (b"7\r\ncount=3\r\n0\r\n" + b"X: y\r\n" * 2000 + b"\r\n", 413, 0),
    (b"1;" + b"x" * 5000 + b"\r\nc\r\n1;" + b"x" * 5000 + b"\r\no\r\n", 413, 0),
    (b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n", 413, 0),
]

HOSTILE = [(data, [400], 0, CLOSED) for data in MALFORMED]
HOSTILE += [(data, [200], 1, KEPT) for data in SERVED]
HOSTILE += OTHERS
HOSTILE += [(CHUNKED + body, [status], ids, KEPT if ids else CLOSED)
            for body, status, ids in CHUNKS]
HOSTILE_NAMES = [repr(data.removeprefix(CHUNKED)[:90])[2:-1] for data, *_ in HOSTILE]


@fixture(scope="module")
def http_server(tmp_path_factory):
    """An idpot over SQLite with pots p, big and fixed, which the tests of these sections share."""
    server = Idpot(tmp_path_factory.mktemp("http"))
    server.create("p")
    server.create("big", 10**18)
    server.create("fixed", 41)
    yield server
    server.stop(SIGKILL)


def current_p(server):
    return int(server.answer("GET", "/id/p")[1])


def cpu_seconds(server):
    """The CPU time that the server's process has used, by its clock (clock_getcpuclockid(3))."""
    return time.clock_gettime(~server.process.pid << 3 | 2)


def send_apart(server, client, *pieces):
    """Sends the pieces so that the server reads each by itself."""
    for piece in pieces:
        client.send(piece)
        server.answer("GET", "/meanwhile")      # what came before it has been read by then


@parametrize("data, answers, ids, then", HOSTILE, ids=HOSTILE_NAMES)
def test_whatever_comes_is_answered_and_costs_what_it_asks_for(
        http_server, data, answers, ids, then):
    before = current_p(http_server)
    if then == KEPT:
        got = exchange(http_server, data + GOOD)
        assert statuses(got) == [*answers, 200]
        assert "close" not in [fields.get("Connection") for _, fields, _ in got]
        assert current_p(http_server) == before + ids + 1
    else:
        for sent in (data, data + GOOD):
            with Raw(http_server, sent) as client:
                got = list(client)      # the server closes, though the client does not
            assert statuses(got) == answers
            assert got[-1][1]["Connection"] == "close"
        assert current_p(http_server) == before + 2 * ids


@parametrize("data", [
    GOOD, FORM, CHUNKED + b"3;a=b\r\ncou\r\n4\r\nnt=3\r\n0\r\nX: y\r\n\r\n"],
    ids=["head", "form", "chunks"])
def test_no_proper_prefix_of_a_request_costs_an_id(http_server, data):
    before = current_p(http_server)
    for length in range(len(data)):
        assert statuses(exchange(http_server, data[:length])) == ([400] if length else [])
        with Raw(http_server, data[:length]), Raw(http_server, data[:length]) as reset:
            reset.socket.setsockopt(*RESET_AT_CLOSE)
    assert current_p(http_server) == before
    assert statuses(exchange(http_server, data + b"9")) == [200, 400]


@parametrize("data", [
    FORM, b"\r\n\r\n" + CHUNKED + b"3;a=b\r\ncou\r\n4\r\nnt=2\r\n0\r\nX: y\r\n\r\n"],
    ids=["form", "chunks"])
def test_a_request_may_be_cut_at_any_byte_and_into_single_bytes(http_server, data):
    last = current_p(http_server)
    cuts = [(data[:at], data[at:]) for at in range(1, len(data))]
    cuts.append([data[at:at + 1] for at in range(len(data))])
    with Raw(http_server) as client:
        for pieces in cuts:
            send_apart(http_server, client, *pieces)
            assert issued([client.answer()]) == [last + 1, last + 2]
            last += 2


def test_empty_lines_that_come_by_themselves_do_not_end_the_connection(http_server):
    last = current_p(http_server)
    with Raw(http_server) as client:
        for pieces in ([b"\r\n"] * 12 + [GOOD], [b"\r", b"\n\r\n\r\n\r", b"\n\r\n" + GOOD],
                       [GOOD + b"\r\n"], [b"\r\n", GOOD]):
            send_apart(http_server, client, *pieces)
            last += 1
            assert issued([client.answer()]) == [last]


@parametrize("data, body", [
    (EXPECTING, b"count=2"),
    (CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n", b"7\r\ncount=2\r\n0\r\n\r\n")],
    ids=["length", "chunks"])
def test_a_body_is_asked_for_with_100_continue_and_then_read(http_server, data, body):
    with Raw(http_server, data) as client:
        assert client.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
        send_apart(http_server, client, body[:3], body[3:])
        assert statuses([client.answer(), client.answer()]) == [100, 200]


@parametrize("data, head, body", [
    (b"GET /id/big HTTP/1.1\r\nHost: x\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nContent-Length: 19\r\n"
     b"Content-Type: text/plain; charset=utf-8\r\nDate: now", b"1000000000000000000"),
    (b"HEAD /id/big HTTP/1.1\r\nHost: x\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nContent-Length: 19\r\n"
     b"Content-Type: text/plain; charset=utf-8\r\nDate: now", b""),
    (b"GET /pot/big HTTP/1.1\r\nHost: x\r\n\r\n",
     b"HTTP/1.1 204 No Content\r\nCache-Control: no-store\r\nDate: now", b""),
    (b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
     b"HTTP/1.1 404 Not Found\r\nCache-Control: no-store\r\nConnection: keep-alive\r\n"
     b"Content-Length: 25\r\nContent-Type: text/plain; charset=utf-8\r\nDate: now",
     b'there is nothing at "/x"\n')])
def test_answers_to_the_byte_but_for_the_order_of_their_fields(http_server, data, head, body):
    with Raw(http_server) as client:
        client.end(data)
        while client.receive():
            pass
    answer = re.sub(rb"Date: \w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", b"Date: now", client.came)
    got, _, content = answer.partition(b"\r\n\r\n")
    status, *fields = got.split(b"\r\n")
    assert (b"\r\n".join([status, *sorted(fields)]), content) == (head, body)


@parametrize("path", ["/id/{pot}", "/pot/{pot}"])
def test_the_template_of_a_path_is_no_path(http_server, path):
    for method in ("GET", "POST"):
        assert http_server.answer(method, path) == (404, f'there is nothing at "{path}"\n')


def test_the_date_is_now_in_gmt_all_along(run):
    server = run(environment={"TZ": "XYZ-9"})
    seen = set()

    def is_now():
        before = time.time()
        date = server.request("GET", "/")[2]["Date"]
        now = email.utils.parsedate_to_datetime(date).timestamp()
        assert before - 2.5 < now < time.time() + 0.5
        seen.add(date)
        return len(seen) == 3

    wait_until(is_now)


@parametrize("data, status", [
    (b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    (b"POST /id/big?count=10000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    (b"POST /id/big?count=10000 HTTP/1.0\r\n\r\n", 200),
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n", 400),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n", 413)],
    ids=["short answer", "long answer", "HTTP/1.0", "error", "unread body"])
def test_an_answer_before_a_close_reaches_a_client_that_still_sends(http_server, data, status):
    with Raw(http_server, data, buffer=4096) as client:
        client.socket.recv(1, socket.MSG_PEEK)      # it has answered: what follows is late
        client.send(b"x" * 4000000)
        answers = list(client)
    assert statuses(answers) == [status]
    if status == 200:
        last = int(http_server.answer("GET", "/id/big")[1])
        assert issued(answers) == list(range(last - 9999, last + 1))


def test_long_input_is_parsed_in_linear_time(http_server):
    data = b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a%sb\r\n\r\n"
    before = cpu_seconds(http_server)
    for _ in range(10):
        assert statuses(exchange(http_server, data % (b" " * 16000))) == [200]
    assert cpu_seconds(http_server) - before < 2    # an expression that tries all ways: minutes


@parametrize("end", [b"", b"\r\nContent-Length: 65536\r\n\r\n"], ids=["head", "body"])
def test_single_bytes_cost_no_more_behind_many_than_behind_few(http_server, end):
    cpu = {}
    for length in (10, 13000):
        head = b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: " + b"a" * length
        with Raw(http_server, head + end) as one:
            before = cpu_seconds(http_server)
            for _ in range(1000):
                one.send(b"a")
                assert not select.select([one.socket], [], [], 0.0003)[0]
            cpu[length] = cpu_seconds(http_server) - before
    assert cpu[13000] < 2 * cpu[10] + 0.1       # where each byte has all looked at again: 0.8 s


@parametrize("data, count, most", [
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: %015000d\r\n\r\n", 3000, 23_000_000),   # kept it is 34 MB
    (b"POST /id/%060d HTTP/1.1\r\nHost: x\r\n\r\n", 14000, 3_000_000)], ids=["head", "name"])
def test_what_clients_make_up_is_not_kept_in_memory(run, data, count, most):
    server = run(LogFile="/dev/null")
    requests = [data % number for number in range(count)]
    assert set(statuses(exchange(server, b"".join(requests[:count // 4])))) == {404}
    before = memory(server)
    assert set(statuses(exchange(server, b"".join(requests[count // 4:])))) == {404}
    assert memory(server) - before < most


MUTATED = [*SERVED, FORM, FORM + GOOD, CHUNKED + b"7\r\ncount=3\r\n0\r\n\r\n"]


def mutated(dice):
    """A request with one to four random changes."""
    data = dice.choice(MUTATED)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) + 1)
        end = at + dice.choice([0, 1, 1, 2, 5, 40])
        piece = data[at:end]
        other = dice.choice(MUTATED)[at:end]
        odd = dice.choice([b"\0", b"\r", b"\n", b" ", b"%", b"&", b":", b"\xff", b"7"])
        data = data[:at] + dice.choice([b"", piece * 2, other, odd, odd + piece]) + data[end:]
    return data


@parametrize("seed", range(10))
def test_mutated_requests_cost_no_more_ids_than_are_answered(http_server, seed):
    dice = random.Random(seed)
    before = current_p(http_server)
    with ThreadPoolExecutor(8) as pool:
        requests = [mutated(dice) for _ in range(150)]
        each = pool.map(lambda data: exchange(http_server, data), requests)
        answers = list(itertools.chain(*each))
    assert {200, 400, 404} < set(statuses(answers))
    assert not {500, 503} & set(statuses(answers))
    assert sorted(issued(answers)) == list(range(before + 1, current_p(http_server) + 1))
    assert "Traceback" not in http_server.errors()


# ---------------------------------------------------------------- API

API_ANSWERS = [     # one after the other
    ("GET", "/pot", None, 200, ""),
    ("GET", "/healthz", None, 200, "ok"),
    ("POST", "/pot/create", "name=first&min=10", 201, "Created new pot"),
    ("GET", "/pot/first", None, 204, ""),
    ("GET", "/id/first", None, 200, "10"),
    ("GET", "/healthz", None, 200, "ok"),
    ("POST", "/id/first", "", 200, "11"),
    ("GET", "/id/first", None, 200, "11"),
    ("HEAD", "/id/first", None, 200, ""),
    ("HEAD", "/id/none", None, 404, ""),
    ("POST", "/id/first?count=1", None, 200, "12\n"),
    ("POST", "/id/first", "count=2", 200, "13\n14\n"),
    ("POST", "/pot/raise", "name=first&min=30", 200, "30"),
    ("POST", "/pot/raise", "name=first&min=7", 200, "30"),
    ("POST", "/pot/raise?name=first&min=0", None, 200, "30"),
    ("POST", "/id/first", None, 200, "31"),
    ("POST", "/id/first?count=10000", None, 200, "".join(f"{id}\n" for id in range(32, 10032))),
    ("POST", "/id/first?range=1", None, 200, "10032\t10032\n"),
    ("POST", "/id/first", "range=4294967296", 200, "10033\t4294977328\n"),
    ("GET", "/id/first", None, 200, "4294977328"),
    ("POST", "/pot/create?name=no-min", None, 201, "Created new pot"),
    ("POST", "/id/no-min", None, 200, "1"),
    # Every ID up to 2^64-1 is given once, also over the middle
    ("POST", "/pot/create", "name=whole&min=9223372036854775799", 201, "Created new pot"),
    ("POST", "/id/whole?range=7", None, 200, "9223372036854775800\t9223372036854775806\n"),
    ("POST", "/id/whole?count=2", None, 200, "9223372036854775807\n9223372036854775808\n"),
    ("POST", "/pot/raise", "name=whole&min=5", 200, "9223372036854775808"),
    ("POST", "/pot/raise", "name=whole&min=18446744069414584314", 200, "18446744069414584314"),
    ("POST", "/id/whole", "range=4294967296", 200, "18446744069414584315\t18446744073709551610\n"),
    ("POST", "/pot/raise", "name=whole&min=18446744073709551613", 200, "18446744073709551613"),
    ("POST", "/id/whole?count=3", None, 409,
     'pot "whole" is exhausted: fewer than 3 IDs are left\n'),
    ("POST", "/id/whole?range=3", None, 409,
     'pot "whole" is exhausted: fewer than 3 IDs are left\n'),
    ("POST", "/id/whole?count=2", None, 200, "18446744073709551614\n18446744073709551615\n"),
    ("POST", "/id/whole", None, 409, 'pot "whole" is exhausted: fewer than 1 IDs are left\n'),
    ("POST", "/pot/raise", "name=whole&min=18446744073709551615", 200, "18446744073709551615"),
    ("GET", "/id/whole", None, 200, "18446744073709551615"),
    ("GET", "/pot", None, 200, "first\t4294977328\nno-min\t1\nwhole\t18446744073709551615\n"),
]

MIN = "is not a whole number from 0 to 18446744073709551615\n"
COUNT = "is not a whole number from 1 to 10000\n"
RANGE = "is not a whole number from 1 to 4294967296\n"
NAME = "is not 1 to 60 characters of A-Z a-z 0-9 _ -\n"
API_REFUSALS = [    # pot fixed is at 41; there is no pot none
    ("POST", "/id/fixed", "count=2%ff", 400, "the form is not UTF-8, or has too many fields\n"),
    ("POST", "/id/fixed", "count=1&" * 200, 400, "the form is not UTF-8, or has too many fields\n"),
    ("POST", "/pot/create", "name=a&name=b", 400, 'field "name" is given twice\n'),
    ("POST", "/id/fixed?count=2", "count=2", 400, 'field "count" is given twice\n'),
    ("POST", "/id/fixed?count=2&range=2", None, 400, "count and range exclude each other\n"),
    # What is no name, as it is sent and as the answer shows it
    ("POST", "/pot/create", "min=1", 400, f'name "" {NAME}'),
    ("POST", "/pot/create", "name=a%20b", 400, f'name "a b" {NAME}'),
    ("POST", "/pot/create", "name=%C3%A9", 400, f'name "\\xe9" {NAME}'),
    ("POST", "/pot/create", "name=a%0A", 400, f'name "a\\n" {NAME}'),
    ("POST", "/pot/create", "name=%60%3B--", 400, f'name "`;--" {NAME}'),
    ("POST", "/pot/create", f"name={'x' * 61}", 400, f'name "{"x" * 61}" {NAME}'),
    ("POST", f"/id/{'x' * 61}", None, 404, f'there is nothing at "/id/{"x" * 61}"\n'),
    # What is no number
    ("POST", "/pot/raise", "name=fixed", 400, f'min "" {MIN}'),
    ("POST", "/pot/create", "name=a&min=", 400, f'min "" {MIN}'),
    ("POST", "/pot/create", "name=a&min=-1", 400, f'min "-1" {MIN}'),
    ("POST", "/pot/create", "name=a&min=1_0", 400, f'min "1_0" {MIN}'),
    ("POST", "/pot/create", "name=a&min=1%0A", 400, f'min "1\\n" {MIN}'),
    ("POST", "/pot/create", "name=a&min=%D9%A3", 400, f'min "\\u0663" {MIN}'),
    ("POST", "/pot/create", f"name=a&min={'9' * 5000}", 400, f'min "{"9" * 100}..." {MIN}'),
    ("POST", "/pot/create", "name=a&min=18446744073709551616", 400,
     f'min "18446744073709551616" {MIN}'),
    ("POST", "/id/fixed", "count=", 400, f'count "" {COUNT}'),
    ("POST", "/id/fixed?count=+1", None, 400, f'count " 1" {COUNT}'),
    ("POST", "/id/fixed?count=0", None, 400, f'count "0" {COUNT}'),
    ("POST", "/id/fixed", "count=10001", 400, f'count "10001" {COUNT}'),
    ("POST", "/id/fixed?range=0", None, 400, f'range "0" {RANGE}'),
    ("POST", "/id/fixed", "range=4294967297", 400, f'range "4294967297" {RANGE}'),
    # Fields that are not known, or not there
    ("POST", "/pot/create", "name=a&mn=5", 400,
     'unknown field "mn": the fields here are name and min\n'),
    ("POST", "/id/fixed", "counts=5", 400,
     'unknown field "counts": the fields here are count and range\n'),
    ("POST", "/id/fixed?min=5", "range=2", 400,
     'unknown field "min": the fields here are count and range\n'),
    ("GET", "/id/fixed?count=5", None, 400, 'field "count" is for POST\n'),
    ("GET", "/healthz?verbose=", None, 400, 'unknown field "verbose": it takes none\n'),
    # What is there, and what is not
    ("POST", "/pot/create", "name=fixed&min=99", 409, 'pot "fixed" exists\n'),
    ("POST", "/pot/raise", "name=none&min=9", 404, 'there is no pot "none"\n'),
    ("POST", "/id/none", None, 404, 'there is no pot "none"\n'),
    ("GET", "/id/none", None, 404, 'there is no pot "none"\n'),
    ("GET", "/pot/none", None, 404, 'there is no pot "none"\n'),
    ("POST", "/id", None, 404, 'there is nothing at "/id"\n'),
    ("POST", "/id/fixed/", None, 404, 'there is nothing at "/id/fixed/"\n'),
    ("POST", "/id/../id/fixed", None, 404, 'there is nothing at "/id/../id/fixed"\n'),
    ("POST", "/pot", None, 405, "POST is not allowed here, but GET, HEAD\n"),
    ("POST", "/pot/fixed", None, 405, "POST is not allowed here, but GET, HEAD\n"),
    ("DELETE", "/id/fixed", None, 405, "DELETE is not allowed here, but GET, HEAD, POST\n"),
    ("post", "/pot/raise", None, 405, "post is not allowed here, but GET, HEAD, POST\n"),
]


def test_what_is_answered(run):
    server = run()
    for method, target, form, status, text in API_ANSWERS:
        got, answer, headers = server.request(method, target, form)
        assert (method, target, got, answer) == (method, target, status, text)
        assert headers["Cache-Control"] == "no-store"
        kind = None if status == 204 else "text/plain; charset=utf-8"
        assert headers["Content-Type"] == kind
    media = server.request("GET", "/metrics")[2]["Content-Type"]
    assert media == "text/plain; version=0.0.4; charset=utf-8"


@parametrize("method, target, form, status, text", API_REFUSALS)
def test_what_is_refused_changes_nothing(http_server, method, target, form, status, text):
    pots = http_server.answer("GET", "/pot")
    got, answer, headers = http_server.request(method, target, form)
    assert got == status
    assert answer == text
    allowed = text.rpartition(", but ")[2].strip() if status == 405 else None
    assert headers["Allow"] == allowed
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Length"] == str(len(text))
    assert "Retry-After" not in headers
    assert http_server.answer("GET", "/pot") == pots


def test_names_that_are_allowed_and_the_list(run):
    server = run()
    for number, name in enumerate(["create", "raise", "0", "_", "A-b_9", "-", "a-B_9", "X" * 60]):
        server.create(name, number)
        assert server.next(name) == number + 1
    assert server.answer("GET", "/pot") == (200, (
        f"-\t6\n0\t3\nA-b_9\t5\n{'X' * 60}\t8\n_\t4\na-B_9\t7\ncreate\t1\nraise\t2\n"))


# ---------------------------------------------------------------- tokens and web pages

TOKEN_REQUESTS = [
    ("POST", "/id/p", None), ("HEAD", "/pot/p", None), ("GET", "/pot", None),
    ("GET", "/metrics", None), ("OPTIONS", "/pot/raise", None), ("POST", "/pot/create", "name=p"),
    ("POST", "/pot/raise", "name=p&min=5"), ("GET", "/pot/create", None), ("GET", "/nowhere", None),
    ("GET", "/healthz", None)]
WRONG_TOKENS = [
    "", "Bearer", "sesame", "Basic sesame", "Bearer sesam", "Bearer sesamee", "Bearer SESAME",
    "Bearer x sesame", "Bearer sesam\xe9", "Bearer sesame sesame", "Bearersesame"]
OPEN = [200, 204, 200, 200, 405, 409, 200, 404, 404, 200]
FOR_READERS = [200, 204, 200, 200, 405, 401, 401, 404, 404, 200]
FOR_ADMINS = [401, 401, 401, 401, 401, 409, 200, 401, 404, 200]
FOR_NOBODY = [401, 401, 401, 401, 401, 401, 401, 401, 404, 200]
PAGE = "http://page.example"


def statuses_with(server, **headers):
    """The statuses of TOKEN_REQUESTS with these headers; no answer may show a token."""
    seen = []
    for request in TOKEN_REQUESTS:
        status, text, answered = server.request(*request, headers)
        assert answered["WWW-Authenticate"] == ("Bearer" if status == 401 else None)
        assert "Access-Control-Allow-Origin" not in answered
        assert not re.search("sesam|shibb", text, re.IGNORECASE)
        seen.append(status)
    return seen


@parametrize("tokens, without, answers", [
    ({"Token": "sesame"}, FOR_NOBODY, {"Bearer sesame": OPEN, "bearer  sesame": OPEN}),
    ({"Token": "sesame", "AdminToken": "shibboleth"}, FOR_NOBODY, {
        "Bearer sesame": FOR_READERS, "Bearer shibboleth": FOR_ADMINS}),
    ({"AdminToken": "shibboleth"}, FOR_READERS, {"Bearer shibboleth": OPEN})],
    ids=["Token", "both", "AdminToken"])
def test_which_token_is_asked_for_what(run, tokens, without, answers):
    server = run(**tokens)
    for right in answers:
        server.request("POST", "/pot/create", "name=p", {"Authorization": right})
    for wrong in WRONG_TOKENS:
        assert statuses_with(server, Authorization=wrong) == without
        assert statuses_with(server, Authorization=wrong, Origin=PAGE) == [403] * 10
    for right, expected in answers.items():
        assert statuses_with(server, Authorization=right) == expected
    command = Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert server.stop() == 0
    assert not re.search("sesam|shibb", command + server.errors(), re.IGNORECASE)


@parametrize("tokens, served", [
    ({"Token": "sesame"}, OPEN),
    ({"AdminToken": "sesame"}, [403] * 5 + [409, 200] + [403] * 3)], ids=["Token", "AdminToken"])
def test_a_web_page_is_served_with_the_right_token_only(run, tokens, served):
    server = run(**tokens)
    right = {"Authorization": "Bearer sesame", "Origin": PAGE}
    assert server.status("POST", "/pot/create", "name=p", right) == 201
    assert statuses_with(server, **right) == served
    for headers, text in [
            ({}, "a bearer token is needed\n"),
            ({"Authorization": "Bearer x"}, "the bearer token is wrong\n"),
            ({"Origin": PAGE},
             "a request from a web page (it has an Origin) needs the bearer token\n")]:
        assert server.request("POST", "/pot/create", "name=q", headers)[1] == text


@parametrize("origin", [PAGE, "null", "http://127.0.0.1:8080", ""])
def test_a_web_page_is_refused_where_no_token_is_set(http_server, origin):
    pots = http_server.answer("GET", "/pot")
    assert statuses_with(http_server, Origin=origin) == [403] * 10
    assert statuses_with(http_server, Origin=origin, Authorization="Bearer") == [403] * 10
    assert http_server.answer("GET", "/pot") == pots


# ---------------------------------------------------------------- health

def read_lock(database):
    return session_on(database, "FLUSH TABLES WITH READ LOCK")


def seen_anew(harm, mend, database):
    """A trouble that new connections see only."""
    return between(lambda: database.sql(harm) or kill_connections(database, "least"),
                   lambda: database.sql(mend))


@parametrize("trouble, why", [
    (read_only, r"\(error 1290\)"),
    (read_lock, r"\(error 1205\)|did not answer"),
    (partial(seen_anew, "REVOKE UPDATE ON host.* FROM least", "GRANT UPDATE ON host.* TO least"),
     r"\(error 1142\)"),
    (partial(seen_anew, "SET GLOBAL init_connect = 'SET transaction_read_only = 1'",
             "SET GLOBAL init_connect = ''"), r"\(error 1290\)"),
    (hung, r"\(error (2013|2055|3024)\)|did not answer"),
    (down, r"\(error (2002|2003|2013|2055)\)"),
])
def test_health_says_why_no_id_could_be_issued_and_costs_none(trouble, why, mysql, run, database):
    server = run(**mysql(Timeout=4))
    server.create("p", 41)
    assert server.next("p") == 42
    assert healthy(server)
    with trouble(database), within(2.5):
        status, text = server.answer("GET", "/healthz")
    assert status == 503
    assert re.search(f"^.*({why}).*\n$", text)
    wait_until(lambda: healthy(server))
    assert metrics(server)["idpot_ids_issued_total"] == 1
    assert server.next("p") == 43


def test_health_tries_the_pot_that_an_id_was_taken_from_last_and_waits_for_no_other(
        mysql, run, database):
    server = run(**mysql(Timeout=1), pot="p")
    server.create("health")
    with pot_locked(database, "health"):
        assert server.status("POST", "/id/health") == 503
        assert not healthy(server)      # none was taken: it is the one asked for
        assert server.next("p") == 1
        assert server.status("POST", "/id/missing") == 404
        with asking(server, "health"):
            until_locked(database, "health")
            with within(1):
                assert healthy(server)


# ---------------------------------------------------------------- metrics

def requests_to(route, method, code):
    """The series of /metrics that counts them."""
    return f'idpot_http_requests_total{{route="{route}",method="{method}",code="{code}"}}'


def test_metrics_tell_what_was_served_and_of_the_process(mysql, run):
    server = run(**mysql(), pot="p")
    with Load([server]) as load:
        load.more()
    server.next("p", 100)
    requests = len(load.history) + 1
    first, second = metrics(server), metrics(server)
    assert first["idpot_ids_issued_total"] == load.all_served() + 100
    assert first[requests_to("/id/{pot}", "POST", 200)] == requests
    assert second[requests_to("/metrics", "GET", 200)] == 1
    assert first["idpot_db_connections"] >= 1
    assert 0 < first["idpot_db_statements_total"] <= requests
    assert first["idpot_db_seconds_total"] > 0
    assert first["idpot_log_lines_lost_total"] == 0
    assert 10_000_000 < memory(server) < 100_000_000
    assert 0 < first["process_cpu_seconds_total"] < 60
    assert 6 < first["process_open_fds"] < 100
    assert first["process_start_time_seconds"] == pytest.approx(time.time(), abs=30)
    for name in first:
        assert "_total" not in name or first[name] <= second[name]


ASKED = [      # method, target, status, route and method of /metrics
    ("POST", "/id/secret", 404, "/id/{pot}", "POST"),
    ("GET", "/id/secret", 404, "/id/{pot}", "GET"),
    ("HEAD", "/pot/secret", 404, "/pot/{pot}", "HEAD"),
    ("GET", "/pot", 200, "/pot", "GET"),
    ("PUT", "/id/secret", 405, "/id/{pot}", "other"),
    ("POST", "/pot/create", 400, "/pot/create", "POST"),
    ("POST", "/pot/raise", 400, "/pot/raise", "POST"),
    ("GET", "/healthz", 200, "/healthz", "GET"),
    ("GET", "/secret", 404, "other", "GET"),
]


def test_metrics_please_promtool_and_count_by_route_method_and_code_and_show_no_name(
        mysql, run, database):
    server = run(**mysql(), pot="p")
    kill_connections(database, "least")
    assert server.next("p") == 1
    for method, target, status, _, _ in ASKED:
        assert server.status(method, target) == status
    assert statuses(exchange(server, b"secret\r\n\r\n")) == [400]
    text = server.request("GET", "/metrics")[1]
    assert "secret" not in text
    for _, _, status, route, method in ASKED:
        assert f"\n{requests_to(route, method, status)} 1\n" in text
    assert f'\n{requests_to("other", "other", 400)} 1\n' in text
    assert re.search(r'(?m)^idpot_db_errors_total\{errno="\d+"\} [1-9]$', text)
    python = sys.version.split()[0]
    info = f'idpot_build_info{{version="{idpot.__version__}",python="{python}"}}'
    assert f"\n{info} 1\n" in text
    promtool = [needs("promtool"), "check", "metrics"]
    told = subprocess.run(promtool, input=text, text=True, capture_output=True, timeout=20)
    assert told.returncode == 0
    assert told.stdout + told.stderr == ""


def test_metrics_have_a_histogram_of_the_time_until_the_answer(mysql, run, database):
    server = run(**mysql(), pot="p")
    with pot_locked(database, "p"), asking(server, "p") as client:
        assert nothing_comes(client, 0.6)
    wait_until(lambda: metrics(server)["idpot_ids_issued_total"] == 1)
    name = "idpot_http_request_duration_seconds"
    found = metrics(server)
    buckets = [value for bucket, value in found.items() if bucket.startswith(f"{name}_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found[f"{name}_count"] > found[f'{name}_bucket{{le="0.5"}}'] > 1
    assert 0.6 < found[f"{name}_sum"] < 10


# ---------------------------------------------------------------- connections

LONG = b"POST /id/p?count=10000 HTTP/1.1\r\nHost: x\r\n\r\n"


def on_socket(listener):
    """The options of an idpot that is started on the socket, as start_server does."""
    entry = f"127.0.0.1:{listener.getsockname()[1]}={listener.fileno()}"
    return {"listen": None, "pass_fds": [listener.fileno()],
            "environment": {"SERVER_STARTER_PORT": entry}}


@fixture
def narrow(run):
    """Starts idpots whose answers wait at the server when a client does not read 10 KB."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):     # connections inherit both
            listener.setsockopt(socket.SOL_SOCKET, buffer, 4096)
        yield partial(run, **on_socket(listener))


def test_who_was_silent_longest_makes_room_and_no_more_than_max_connections_are_open(run):
    server = run(MaxConnections=20)
    with clients(server, 5, OTHER, 404) as silent:
        assert nothing_comes(silent[0], 0.05)
        with clients(server, 20, OTHER, 404) as others:
            assert [client.answer() for client in silent] == [None] * 5
            assert_served(others)


def test_busy_clients_are_all_served_where_there_are_more_than_max_connections(run):
    server = run(MaxConnections=8)
    with ThreadPoolExecutor(30) as pool:
        for answers in pool.map(lambda _: exchange(server, OTHER * 200), range(30)):
            assert statuses(answers) == [404] * 200


def test_whose_answer_is_awaited_longest_gets_its_503_and_makes_room(mysql, run, database):
    server = run(**mysql(Timeout=20, MaxConnections=4), pot="p")
    with pot_locked(database, "p"), clients(server, 1, GOOD) as [longest]:
        until_locked(database, "p")
        with clients(server, 3, GOOD), within(2):
            assert server.status("GET", "/x") == 404
            status, fields, _ = longest.answer()
            assert status == 503
            assert fields["Retry-After"] == "1"
            assert longest.answer() is None
    assert server.status("POST", "/id/p") == 200


def test_thirty_clients_that_give_up_on_a_locked_pot_keep_nobody_out(mysql, run, database):
    server = run(**mysql(MaxConnections=32), pot="p")
    server.create("q")

    def give_up(_):
        with Raw(server, GOOD) as client:
            nothing_comes(client, 0.2)

    took = []
    with pot_locked(database, "p"), meanwhile(30, give_up):
        until_locked(database, "p")
        for _ in range(20):
            start = monotonic()
            server.next("q")
            took.append(monotonic() - start)
            assert healthy(server)
    assert sorted(took)[10] < 0.5       # 10 s, where nobody makes room


def test_idpots_on_one_socket_close_no_client_of_each_other_and_can_be_replaced(mysql, run):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        options = {**mysql(), **on_socket(listener)}
        old, new = run(**options, pot="p"), run(**options)
        with clients(old, 20, OTHER, 404) as silent:
            assert nothing_comes(silent[0], 0.2)
            for _ in range(20):
                with clients(old, 40, OTHER, 404):
                    pass
            assert_served(silent)
        with Load([old]) as load:       # start_server stops the old one when the new one is there
            load.more()
            assert old.stop() == 0
            load.more()
        assert new.next("p") == load.all_served() + 1


SILENT = [      # what is sent, and what is answered until the server closes
    (b"", []),
    (OTHER, [404]),
    (b"\r\n" + OTHER + b"\r\n", [404]),
    (GOOD[:-1], [408]),
    (FORM[:-1], [408]),
    (CHUNKED + b"7\r\ncou", [408]),
    (EXPECTING, [100, 408]),
    (OTHER + GOOD[:-2], [404, 408]),
]


def test_who_is_silent_for_too_long_is_told_so_within_a_request_and_closed(run):
    server = run(RequestTimeout=0.8, IdleTimeout=1.5, pot="p")
    begin = monotonic()
    opened = [Raw(server, data) for data, _ in SILENT]
    with all_of(opened), Raw(server, b"P") as slow, within(6):
        while nothing_comes(slow, 0.1):
            slow.send(b"O")
            assert monotonic() < begin + 5
        assert monotonic() > begin + 0.8
        assert statuses(slow) == [408]
        for client, (_, answers) in zip(opened, SILENT):
            assert statuses(client) == answers
        assert monotonic() > begin + 1.5
    assert server.next("p") == 1


def test_who_reads_late_gets_all_and_who_reads_too_slowly_is_cut_off(narrow):
    server = narrow(Timeout=1, RequestTimeout=1, IdleTimeout=2)
    server.create("p", 10**18)
    with Raw(server, LONG, buffer=4096) as slow, Raw(server, LONG, buffer=4096) as late:

        def drip(other):
            """Reads all along, while nothing comes to the other one for 1.2 s."""
            begin = monotonic()
            while monotonic() < begin + 1.2:
                with suppress(ConnectionError):
                    slow.came += slow.socket.recv(1500)
                assert nothing_comes(other, 0.02)

        until_in_flight(server, 2)
        with Raw(server) as other:
            drip(other)
        assert len(issued([late.answer()])) == 10000
        drip(late)      # its idle time began when it had its answer
        late.send(GOOD)
        assert issued([late.answer()]) == [10**18 + 20001]
        with raises((AssertionError, ConnectionError)):
            slow.answer()


def test_clients_that_never_read_make_room_though_they_ask_on_and_on(narrow):
    server = narrow(MaxConnections=8)
    server.create("p", 10**18)
    with all_of([Raw(server, buffer=4096) for _ in range(8)]) as [on_and_on, *others]:
        for client in others:
            client.send(LONG)
        on_and_on.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while select.select([], [on_and_on.socket], [], 0.5)[1]:
            on_and_on.socket.send(OTHER * 30)
        with all_of([Raw(server) for _ in range(8)]) as newcomers:
            for client in newcomers:
                with within(3):
                    client.send(OTHER)
                    assert client.status() == 404


def test_requests_beyond_all_buffers_are_answered_in_order_when_the_client_reads(narrow):
    server = narrow(pot="p")
    data = (GOOD + b"GET /id/p HTTP/1.1\r\nHost: x\r\n\r\n") * 750
    sent = 0
    with Raw(server, buffer=4096) as client, ThreadPoolExecutor(1) as pool:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while select.select([], [client.socket], [], 0.3)[1]:
            sent += client.socket.send(data[sent:sent + 1000])
            assert sent < len(data)     # a server that reads on and on has no bound
        pool.submit(client.end, data[sent:])
        numbers = issued(client)
    assert numbers[::2] == numbers[1::2] == list(range(1, 751))


def test_clients_that_leave_or_never_do_leave_nothing_behind_and_are_served_no_further(run):
    server = run(pot="p")
    server.create("left")
    before = metrics(server)["process_open_fds"]
    with Load([server]) as load:
        for data in (b"", GOOD[:-1], GOOD, LONG * 3):
            for _ in range(100):
                with Raw(server, data) as client:
                    client.socket.setsockopt(*RESET_AT_CLOSE)
        load.more()
    load.all_served()
    with Raw(server) as client, stopped(server):
        client.send(b"POST /id/left HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
        client.socket.close()
    wait_until(lambda: connections(server) == 0)
    assert server.next("left") <= 100
    with Raw(server, b"GET /x HTTP/1.0\r\n\r\n") as client:
        assert statuses(client) == [404]
        wait_until(lambda: connections(server) == 0, 5)     # though this one does not close
    assert metrics(server)["process_open_fds"] < before + 10
    assert "Traceback" not in server.errors()


def test_a_thousand_idle_clients_take_few_threads_and_little_memory(run):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # idpot raises its own
    server = run(MaxConnections=1100, pot="p", python=[
        "sh", "-c", 'ulimit -S -n 64; exec "$@"', "sh", sys.executable])
    with Load([server]) as load:
        before = memory(server)
        with clients(server, 1000, OTHER, 404) as idle:
            load.more()
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            assert int(re.search(r"Threads:\s+(\d+)", status)[1]) <= 12
            assert memory(server) - before < 20_000_000
            assert_served(idle)
    assert server.next("p") == load.all_served() + 1


def test_without_descriptors_it_waits_without_spinning_and_then_serves_again(run):
    server = run(python=["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable], pot="p")
    with clients(server, 200, GOOD[:-1]):
        assert current_p(server) == 0       # silent ones made room
        assert 30 < connections(server) < 60
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, 64))
    with Raw(server, GOOD) as client:
        before = cpu_seconds(server)
        assert nothing_comes(client, 1)
        assert cpu_seconds(server) - before < 0.4
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        assert client.status() == 200
    assert "Traceback" not in server.errors()


FULL_EPOLL = (      # as the kernel does it at its limit of watches, while a file "full" is there
    "import select", "real = select.epoll", "class Epoll:",
    "    def __init__(self): self.real = real()",
    "    def __getattr__(self, name): return getattr(self.real, name)",
    "    def register(self, *given):",
    "        if os.path.exists('full'): raise OSError(28, 'No space left on device')",
    "        self.real.register(*given)",
    "select.epoll = Epoll")


def test_without_room_in_the_epoll_a_connection_is_closed_and_later_ones_are_served(run):
    server = run(python=python_with(*FULL_EPOLL), pot="p")
    server.path("full").touch()
    with Raw(server) as client:
        assert client.answer() is None
    server.path("full").unlink()
    assert server.next("p") == 1
    wait_until(lambda: connections(server) == 0)
    assert "Traceback" not in server.errors()


def test_a_request_that_came_in_time_is_served_however_late_it_is_read(run):
    server = run(RequestTimeout=1, pot="p")
    with Raw(server, OTHER + GOOD[:-2]) as client:
        assert client.status() == 404
        with stopped(server):
            client.send(GOOD[-2:])
            assert nothing_comes(client, 1.2)
        assert client.status() == 200


# ---------------------------------------------------------------- connections at a stop

@parametrize("number", [SIGTERM, SIGINT])
def test_a_stop_answers_what_is_in_flight_and_closes_the_rest(number, mysql, run, database):
    server = run(**mysql(Timeout=10), pot="p")
    half = OTHER[:-1]
    others = [Raw(server, data) for data in (b"", OTHER, half, OTHER + half)]
    with clients(server, 3, GOOD, 200) as asking, all_of(others):
        late = others[-1]
        assert late.status() == 404
        with pot_locked(database, "p"):
            asking[0].send(GOOD)
            asking[1].send(GOOD * 2)
            asking[2].end(GOOD)
            until_in_flight(server, 5)      # with the halves
            server.process.send_signal(number)
            wait_until(lambda: refused(server.port))
            late.send(OTHER[-1:])       # in time: within half a second
            assert [statuses(client) for client in others] == [[], [404], [408], [404]]
            assert server.process.poll() is None
        answers = [client.answer() for client in asking]
        assert [client.answer() for client in asking] == [None] * 3
    assert sorted(issued(answers)) == [4, 5, 6]
    assert server.process.wait(10) == 0
    assert server.events()[-1] == ("INFO", "stopped")
    assert database.counter("p", "host") == 6


def test_clients_in_the_backlog_at_a_stop_are_answered(run):
    server = run(pot="p")
    with stopped(server):
        waiting = [Raw(server, GOOD) for _ in range(20)]
        server.process.terminate()
    with all_of(waiting):
        assert sorted(issued([client.answer() for client in waiting])) == list(range(1, 21))
    assert server.process.wait(10) == 0
    assert not server.path("idpot.db-wal").exists()     # it was closed


def test_an_answer_that_is_read_late_at_a_stop_comes_whole(narrow):
    server = narrow(pot="p")
    with Raw(server, LONG, buffer=4096) as late:
        until_in_flight(server, 1)
        server.process.terminate()
        with raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        assert issued(late) == list(range(1, 10001))
    assert server.process.wait(10) == 0


# ---------------------------------------------------------------- systemd

class NotifySocket(socket.socket):
    """systemd's end of NOTIFY_SOCKET; `environment` is for the service."""

    def __init__(self, name, **environment):
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bind(name.replace("@", "\0"))
        self.environment = {"NOTIFY_SOCKET": name, **environment}

    def next(self, seconds=10.0):
        """The next datagram; None when none comes in that many seconds."""
        self.settimeout(seconds)
        with suppress(TimeoutError):
            return self.recv(4096).decode()


@parametrize("name", ["{}/notify", "@{}/abstract"])
def test_systemd_is_told_of_ready_reload_and_stop_but_not_the_watchdog_unasked(run, tmp_path, name):
    with NotifySocket(name.format(tmp_path)) as told:
        server = run(environment=told.environment)
        assert told.next() == "READY=1\nSTATUS=SQLite idpot.db"
        before = time.monotonic_ns() // 1000
        server.process.send_signal(SIGHUP)
        reloading = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", told.next())
        assert before < int(reloading[1]) < time.monotonic_ns() // 1000
        assert told.next() == "READY=1"
        assert told.next(0.5) is None
        assert server.stop() == 0
        assert told.next() == "STOPPING=1"
        assert told.next(0.01) is None


def test_systemd_is_told_by_a_start_that_fails_an_error_and_nothing_else(run, tmp_path, journal):
    with NotifySocket(f"{tmp_path}/notify", **journal) as told:
        server = run(File="no/dir/db", wait=False, environment=told.environment)
        assert server.process.wait(10) == 1
        assert told.next(0.01) is None
    assert server.errors().startswith("<3>SQLite file ")


def test_the_watchdog_is_not_fed_when_a_worker_hangs(run, tmp_path):
    with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="1000000") as told:
        server = run(Timeout=0.5, environment=told.environment,
                     python=slowly("SqliteStore.take", 3600, *CLOCK))
        assert told.next().startswith("READY=1\n")
        assert [told.next(1), told.next(1)] == ["WATCHDOG=1"] * 2
        server.create("p")
        assert server.status("POST", "/id/p") == 503
        server.path("later").touch()
        wait_until(lambda: told.next(1) is None)


def test_the_units_leave_systemd_nothing_to_say_and_little_exposed():
    units = [f"{HERE}/contrib/idpot.service", f"{HERE}/contrib/idpot.socket"]
    verify = subprocess.run(
        [needs("systemd-analyze"), "verify", *units], capture_output=True, timeout=60)
    assert verify.stderr == b""
    text = subprocess.check_output(
        ["systemd-analyze", "security", "--offline=true", units[0]], text=True, timeout=60)
    exposed = re.search(r"exposure level for idpot.service: ([0-9.]+)", text)[1]
    assert float(exposed) <= 1.2
    assert "\nRequiredBy=idpot.service\n" in Path(units[1]).read_text()


# ---------------------------------------------------------------- sockets that are handed over

# Becomes the command, as a service that systemd has handed a socket, or the same one twice.
HAND_OVER = """if True:    # arguments: descriptor, how often to hand it over, command
    import os, sys
    for number in range(int(sys.argv[2])):
        os.dup2(int(sys.argv[1]), 3 + number)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
    os.execv(sys.argv[3], sys.argv[3:])"""


def handed_by_systemd(listener, count=1):
    """What starts an idpot that systemd has handed the socket."""
    python = [sys.executable, "-c", HAND_OVER, str(listener.fileno()), str(count), sys.executable]
    return {"python": python, "pass_fds": [listener.fileno()], "listen": None}


def test_clients_wait_while_idpot_is_restarted_behind_the_socket_of_systemd(run):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        server = run(**handed_by_systemd(listener), Listen="127.0.0.1:1", pot="p")
        assert server.port == listener.getsockname()[1]
        assert "Listen, 127.0.0.1:1, is not used" in server.errors()
        with Load([server]) as load:
            load.more()
            assert server.stop() == 0
            server.start()
            load.more()
        assert server.next("p") == load.all_served() + 1


@parametrize("environment", [
    {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
    {"LISTEN_FDS": "1"},
    {"LISTEN_PID": "", "LISTEN_FDS": ""},
    {"SERVER_STARTER_PORT": ""},
    {"JOURNAL_STREAM": "8:1"},
])
def test_what_is_meant_for_another_process_changes_nothing(run, environment):
    server = run(environment=environment)
    assert server.stop() == 0
    assert server.events() == [
        ("INFO", f"listening on http://127.0.0.1:{server.port} (SQLite idpot.db)"),
        ("INFO", "stopped")]


TWO = ("2 sockets were handed over, but one is served: begin the drop-in of the socket unit with "
       "an empty ListenStream=")


@parametrize("count, entries, message", [
    (2, "", TWO),
    (0, "127.0.0.1:1={0};127.0.0.1:2={0}", TWO),
    (1, "", "does not listen"),
    (0, "127.0.0.1:1={0}", "does not listen"),
    (0, "127.0.0.1:1=x", "cannot listen"),
    (0, "127.0.0.1:1=987654", "cannot listen"),
])
def test_sockets_that_are_handed_over_and_refused(run, count, entries, message):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        environment = {"SERVER_STARTER_PORT": entries.format(bound.fileno())}
        options = handed_by_systemd(bound, count)
        server = run(**options, environment=environment, wait=False)
        assert server.process.wait(20) == 1
    assert re.fullmatch(f"idpot: .*{message}.*\n", server.errors())


@parametrize("name", ["s", "a=b=1"])
def test_a_unix_socket_of_server_starter_is_served(run, tmp_path, name):
    path = f"{tmp_path}/{name}"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        entry = {"SERVER_STARTER_PORT": f"{path}={listener.fileno()}"}
        server = run(environment=entry, pass_fds=[listener.fileno()], listen=None, wait=False)
        client.settimeout(20)
        client.bind(f"{tmp_path}/client")       # then it has an address of its own
        client.connect(path)
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.recv(9999).endswith(b"\r\n\r\nok")
    line = r'(?m)^127\.0\.0\.1 - - .*"GET /healthz HTTP/1\.0" 200 2 '
    wait_until(lambda: re.search(line, server.errors()))
    assert server.stop() == 0
    assert "WARNING" not in server.errors()     # there is no Listen that is not used


# ---------------------------------------------------------------- Client

class Scripted(socketserver.ThreadingTCPServer):
    """A with block with a server that answers each request by the next of a script: a text is the
    body of a 200; behind bytes, a whole answer, it closes; None is no answer at all.

    `requests` has the number of the connection and the request line of each.
    """
    daemon_threads = True

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), None)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.script = list(script)
        self.requests = []
        self.numbers = itertools.count(1)
        Thread(target=self.serve_forever, args=(0.02,)).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def finish_request(self, connection, _):
        number = next(self.numbers)
        with connection.makefile("rb") as lines:
            while line := lines.readline().decode().strip():
                self.requests.append((number, line))
                fields = b"".join(iter(lines.readline, b"\r\n"))
                length = re.search(rb"Content-Length: (\d+)", fields)
                lines.read(int(length[1]) if length else 0)
                answer = self.script.pop(0)
                if answer is None:
                    lines.read()        # until the client closes
                elif isinstance(answer, bytes):
                    connection.sendall(answer)
                    return
                else:
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n"
                    connection.sendall(f"{head}{answer}".encode())


@fixture(scope="module")
def secured(tmp_path_factory):
    """An idpot with the tokens t and a, and the pots p and full."""
    server = Idpot(tmp_path_factory.mktemp("secured"), Token="t\xe9\u20ac", AdminToken="a")
    with idpot.Client(f"http://127.0.0.1:{server.port}", token="a") as admin:
        admin.create("p", 40)
        admin.create("full", MAX_ID)
    yield server
    server.stop(SIGKILL)


CALLS = [      # one after the other: method, arguments, what is returned
    ("create", ["numbers", 40], None),
    ("exists", ["numbers"], True),
    ("exists", ["none"], False),
    ("next", ["numbers"], 41),
    ("next_many", ["numbers", 3], range(42, 45)),
    ("current", ["numbers"], 44),
    ("next_range", ["numbers", 4294967296], range(45, 4294967341)),
    ("raise_to", ["numbers", 2**40], 2**40),
    ("raise_to", ["numbers", 5], 2**40),
    ("next", ["numbers"], 2**40 + 1),
    ("raise_to", ["numbers", 10**19], 10**19),
    ("next_many", ["numbers", 10000], range(10**19 + 1, 10**19 + 10001)),
]


def test_client_returns_numbers_and_ranges(http_server):
    with idpot.Client(f"http://127.0.0.1:{http_server.port}/") as client:
        for method, arguments, value in CALLS:
            assert getattr(client, method)(*arguments) == value


@parametrize("token, method, arguments, error, text", [
    ("guess", "next", ["p"], idpot.Unauthorized, "the bearer token is wrong"),
    (None, "create", ["p"], idpot.Unauthorized, "a bearer token is needed"),
    ("a", "create", ["p"], idpot.Exists, 'pot "p" exists'),
    ("a", "create", ["b", -1], idpot.BadRequest, 'min "-1" is not a whole number from 0 to '),
    ("a", "raise_to", ["p", 2**64], idpot.BadRequest, 'min "18446744073709551616" is not a whole'),
    ("t\xe9\u20ac", "current", ["none"], idpot.NotFound, 'there is no pot "none"'),
    ("t\xe9\u20ac", "next_many", ["p", 0], idpot.BadRequest, 'count "0" is not a whole number'),
    ("t\xe9\u20ac", "next_range", ["p", 1.5], idpot.BadRequest, 'range "1.5" is not a whole'),
    ("t\xe9\u20ac", "next_range", ["full", 9], idpot.Exhausted,
     'pot "full" is exhausted: fewer than 9 IDs are left'),
])
def test_client_raises_what_the_server_says(secured, token, method, arguments, error, text):
    with idpot.Client(f"http://127.0.0.1:{secured.port}", token) as client:
        with raises(error, match=f"^{re.escape(text)}"):
            getattr(client, method)(*arguments)


@parametrize("pot", ["p?count=5", "p/../p", "caf\xe9", "p HTTP/1.1", "", "x" * 61])
def test_client_takes_no_id_by_what_is_no_name_of_a_pot(secured, pot):
    with idpot.Client(f"http://127.0.0.1:{secured.port}", "t\xe9\u20ac") as client:
        for method, arguments in (("next", []), ("current", []), ("next_many", [2])):
            with raises((idpot.IdpotError, ValueError)):
                getattr(client, method)(pot, *arguments)
        assert client.current("p") == 40


RAISED = {b"403": idpot.Unauthorized, b"503": idpot.Unavailable}     # others: IdpotError itself


@parametrize("answer", [
    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 8\r\n\r\nbecause\n",
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 8\r\n\r\nbecause\n",
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 8\r\n\r\nbecause\n",
    # None of idpot's
    b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>hi</html>",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n12",     # the connection is cut
    b"HTTP/1.1 200 OK\r\n\r\n12",
    b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n1\n2\n3\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xd9\xa7",       # an Arabic seven
    b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n<html>\n<p>no</p>\n</htm>",
    b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"])
def test_client_raises_by_the_status_and_where_an_answer_is_not_idpots(answer):
    calls = [("create", []), ("exists", []), ("current", []), ("next", []), ("next_many", [2]),
             ("next_range", [2]), ("raise_to", [5])]
    with Scripted(*[answer] * 7) as server, idpot.Client(server.url, timeout=5) as client:
        for method, arguments in calls:
            with raises(idpot.IdpotError, match="because|response|IDs") as raised:
                getattr(client, method)("p", *arguments)
            assert type(raised.value) is RAISED.get(answer[9:12], idpot.IdpotError)
    assert len(server.requests) == 7


@parametrize("method, arguments, body", [
    ("next", [], "9"), ("next", [], "10"), ("next_many", [2], "10\n11\n"),
    ("next_range", [100], "1\t100\n")])
def test_client_raises_when_a_pot_went_back_or_was_not_raised(method, arguments, body):
    script = ["8\n9\n", "10", body, "5", "11\t20\n", "20", "21", "8", "9"]
    with Scripted(*script) as server, idpot.Client(server.url) as client:
        assert client.next_many("p", 2) == range(8, 10)
        assert client.next("p") == 10
        with raises(idpot.WentBack, match=r"\bp\b"):
            getattr(client, method)("p", *arguments)
        assert client.next("other") == 5
        assert client.next_range("p", 10) == range(11, 21)
        with raises(idpot.WentBack):
            client.next("p")
        assert client.next("p") == 21
        with raises(idpot.IdpotError, match="^8 is below 9"):
            client.raise_to("p", 9)
        assert client.raise_to("p", 9) == 9


def test_client_repeats_once_and_no_create_where_a_kept_connection_had_died():
    script = ["7", b"", "9", b"", b"", "11", b"", "12", None, "13"]
    with Scripted(*script) as server, idpot.Client(server.url, timeout=1) as client:
        assert client.next("p") == 7
        assert client.next("p") == 9
        with raises((OSError, HTTPException)):
            client.current("p")
        assert client.next("p") == 11
        with raises((OSError, HTTPException)):
            client.create("q")          # on a new connection
        assert client.next("p") == 12
        with raises(TimeoutError):
            client.next("p")
        assert client.next("p") == 13   # on a new connection: a late answer is nobody's
    assert server.requests == [
        (1, "POST /id/p HTTP/1.1"), (1, "POST /id/p HTTP/1.1"), (2, "POST /id/p HTTP/1.1"),
        (2, "GET /id/p HTTP/1.1"), (3, "GET /id/p HTTP/1.1"), (4, "POST /id/p HTTP/1.1"),
        (5, "POST /pot/create HTTP/1.1"), (6, "POST /id/p HTTP/1.1"), (6, "POST /id/p HTTP/1.1"),
        (7, "POST /id/p HTTP/1.1")]


# ---------------------------------------------------------------- starts that fail

def test_an_address_that_is_taken_stops_the_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refusal(tmp_path, f"--listen={address}")
    assert line.startswith(f"idpot: cannot listen on {address}: Address already in use")


@parametrize("settings, words", [
    ({"LogFile": "no/dir/log"}, ["LogFile", "No such file or directory", "no/dir/log"]),
    ({"LogFile": "fifo"}, ["LogFile", "No such device or address", "fifo"]),
    ({"LogFile": "x", "LogLinkName": "f.cfg"}, ["LogLinkName", "is not a symlink", "f.cfg"]),
    ({"LogFile": "x", "LogLinkName": "no/dir/link"}, ["LogLinkName", "no/dir/link"]),
])
def test_a_log_file_that_stops_the_start(tmp_path, settings, words):
    os.mkfifo(tmp_path / "fifo")       # nobody reads it
    line = refusal(tmp_path, START, **settings)
    assert_words(line, *words)
    assert (tmp_path / "f.cfg").read_text() == config_text(**settings)


@parametrize("argument, file", [
    *itertools.product([START, CHECK], ["no/dir/db", "closed/db", "roots"]),
    (START, "."),
    (START, "f.cfg"),       # it is no database
])
def test_an_sqlite_file_that_stops_the_start(tmp_path, argument, file):
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "roots").touch(mode=0o444)
    # Root may write everywhere, unless this capability is taken away.
    drop = [needs("setpriv"), "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    line = refusal(tmp_path, argument, before=[] if os.getuid() else drop, File=file)
    assert line.startswith(f'idpot: SQLite file "{file}"')


@parametrize("argument", [START, CHECK])
@parametrize("user, name, engine, words", [
    ("root:secret", "host", "InnoDB", "Access denied for user"),
    ("root", "no", "InnoDB", "Unknown database 'no'"),
    ("root", "host", "No", 'no storage engine "No"'),
])
def test_a_database_that_stops_the_start(
        tmp_path, mysql, database, argument, user, name, engine, words):
    dsn = database.dsn(name, credentials=user)
    line = refusal(tmp_path, argument, ConnectString=dsn, Engine=engine)
    assert line.startswith(f"idpot: MySQL 127.0.0.1:{database.port}: ")
    assert words in line


def test_mysql_without_its_driver_says_how_to_install_it(tmp_path):
    (tmp_path / "f.cfg").write_text("[Mysql]")
    done = subprocess.run(
        [sys.executable, "-I", "-S", f"{HERE}/idpot.py", "--config=f.cfg"], cwd=tmp_path,
        capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr == (
        "idpot: [Mysql] needs mysql-connector-python: python3 -m pip install "
        f"--target={HERE} 'mysql-connector-python>=9.2'\n")


@parametrize("arguments", [[], [CHECK]])
def test_control_characters_of_the_database_are_not_shown(run, arguments):
    packet = b"\x09\0\0\0\xff\x10\x04\x1b[31m\x07"     # error 1040
    with OddServer(packet) as odd:
        server = run(*arguments, wait=False, Port=odd.port)
        server.until_says("1040")
    assert re.fullmatch("[ -~\n]*: 1040 [ -~\n]*", server.errors())


# ---------------------------------------------------------------- --check

def listing(folder):
    """(path, size, time of the last change) of the folder and of all that is in it."""
    paths = [folder, *folder.rglob("*")]
    return {(path, path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


@parametrize("engine, parameters, words", [
    ("InnoDB", "", []),
    ("InnoDB", "?tls=false", []),
    ("InnoDB", "?tls=false&charset=utf8&loc=UTC", ["charset, loc"]),
    ("MyISAM", "", ["Engine MyISAM"]),
])
def test_a_check_reaches_the_database_and_names_what_a_start_warns_of(
        run, tmp_path, mysql, database, engine, parameters, words):
    settings = {"ConnectString": f"root@unix({database.socket})/host{parameters}", "Engine": engine}
    code, out, errors = ended(tmp_path, CHECK, **settings)
    assert code == 0
    assert_words(out + errors, f"MySQL {database.socket}", *words)
    assert database.sql("SHOW TABLES", database="host") == []
    warnings = [text for level, text in run(**settings).events() if level == "WARNING"]
    assert len(warnings) == len(words)
    assert_words("".join(warnings), *words)


def test_a_check_writes_nothing_and_does_not_look_at_log_files(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    before = listing(data)
    code, out, errors = ended(
        tmp_path, CHECK, File="data/ids.db", LogFile="no/dir/%Y", LogLinkName="f.cfg")
    assert code == 0
    assert errors == ""
    assert re.fullmatch("idpot: [ -~]*SQLite data/ids.db[ -~]*\n", out)
    assert listing(data) == before
    assert sorted(os.listdir(tmp_path)) == ["data", "f.cfg"]


@parametrize("end", [None, SIGTERM, SIGKILL])
def test_a_check_does_not_touch_what_an_idpot_uses_or_has_left(run, tmp_path, end):
    server = run(LogFile="log", pot="p")
    wait_until(lambda: "/pot/create" in server.path("log").read_text())
    if end:
        server.stop(end)
    before = listing(server.path(""))
    assert ended(tmp_path, CHECK, File=server.path("idpot.db"))[0] == 0
    assert listing(server.path("")) == before
    if end:
        server.start()
    assert server.next("p") == 1


# ---------------------------------------------------------------- starts and stops

def test_plain_python_with_nothing_installed_serves_the_two_curl_commands(run):
    server = run(config=False, python=["env", "-i", sys.executable, "-I", "-S"])
    url = f"http://127.0.0.1:{server.port}"
    create = [needs("curl"), "-sS", "-d", "name=orders", f"{url}/pot/create"]
    assert subprocess.check_output(create, timeout=20) == b"Created new pot"
    next_id = ["curl", "-sS", "-X", "POST", f"{url}/id/orders"]
    assert subprocess.check_output(next_id, timeout=20) == b"1"
    assert f"listening on {url} (SQLite idpot.db)\n" in server.errors()


@parametrize("listen, settings, count", [
    ("127.0.0.1:0", {}, 0),
    ("0.0.0.0:0", {}, 1),
    ("0.0.0.0:0", {"Token": "t"}, 0),
    ("0.0.0.0:0", {"AdminToken": "t"}, 0),
])
def test_a_server_that_others_can_reach_is_warned_of(run, listen, settings, count):
    server = run(listen=listen, **settings)
    warning = "0.0.0.0 is not a loopback address and no Token is"
    assert server.errors().count(warning) == count
    assert server.errors().count("WARNING") == count


def test_listen_without_a_host_is_ipv6_and_ipv4(run):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    server = run(Listen=":0", listen=None)
    for host in ("127.0.0.1", "::1"):
        with closing(HTTPConnection(host, server.port, timeout=10)) as connection:
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b"ok"
    hosts = re.findall(r'(?m)^(\S+) - - \[.*"GET /healthz ', logged(server))
    assert hosts == ["127.0.0.1", "::1"]


@parametrize("number", [SIGTERM, SIGINT])
def test_a_second_signal_ends_at_once_what_the_first_let_finish(run, mysql, database, number):
    server = run(**mysql(Timeout=30), pot="p")
    with pot_locked(database, "p"), Raw(server, GOOD) as client:
        until_locked(database, "p")
        server.process.send_signal(SIGTERM)
        wait_until(lambda: refused(server.port))
        assert server.process.poll() is None
        with within(2):
            assert server.stop(number) == 0
        with suppress(ConnectionError):
            assert statuses(client) in ([], [503])


def test_an_exception_that_nobody_expects_in_a_thread_ends_idpot(run):
    server = run(python=python_with(
        "import idpot", "def take(*_, **__): raise MemoryError", "idpot.SqliteStore.take = take"))
    server.create("p")
    with raises((OSError, HTTPException)):
        server.next("p")
    assert server.process.wait(10) == 1
    assert server.errors().endswith("\nMemoryError\n")


WITHOUT_THREADS = (     # a limit of the system, which does not bind root
    "import idpot, resource", "start_logs = idpot.start_logs",
    "def start_without(settings):",
    "    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))",
    "    os.getuid() or os.setresuid(65534, 65534, 65534)",
    "    start_logs(settings)",
    "idpot.start_logs = start_without")


def test_a_start_without_threads_is_refused_in_one_line(run):
    server = run(config=False, wait=False, python=python_with(*WITHOUT_THREADS))
    assert server.process.wait(10) == 1
    assert re.fullmatch("idpot: .*thread.*\n", server.errors())


# ---------------------------------------------------------------- a start without a database

@parametrize("trouble, why", [
    pytest.param(down, r" \(error 2003\)", marks=slow),
    (read_only, r": it is read-only \(error 1290\)"),
])
def test_idpot_is_there_before_its_database_and_serves_when_that_comes(
        run, tmp_path, mysql, database, trouble, why):
    reason = f"the database cannot serve this now{why}"
    with ThreadPoolExecutor(1) as pool, NotifySocket(f"{tmp_path}/notify") as told:
        with trouble(database):
            server = run(**mysql(Timeout=1), environment=told.environment)
            assert told.next().startswith("READY=1\nSTATUS=MySQL ")
            patient = run(**mysql(Timeout=60))
            waiting = pool.submit(patient.answer, "POST", "/pot/create", "name=early")
            answer = server.request("POST", "/pot/create", "name=late")
            assert_refused(answer, f"^{reason}, tried for 1 seconds\n$", again="1")
            assert_refused(server.request("GET", "/healthz"), f"^{reason}", again="1")
        assert waiting.result() == (201, "Created new pot")
    wait_until(lambda: healthy(server))
    server.create("late", 7)
    assert server.next("late") == 8
    [warning] = re.findall(r"WARNING (?!Engine MyISAM)(.*)", logged(server))
    assert f"127.0.0.1:{database.port}" in warning
    assert "waiting for it; requests get 503 until then" in warning
    assert "Traceback" not in server.errors()


@parametrize("inside, limit", [
    ([], 1),
    # To PID 1 the kernel brings no signal's default: it is obeyed when that try is over.
    pytest.param(["unshare", "--pid", "--fork", "--kill-child"], 8, marks=slow),
])
def test_sigterm_ends_a_start_that_waits_for_a_silent_address(run, inside, limit):
    if inside and os.getuid():
        pytest.skip("only root may make a PID namespace")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = run(wait=False, Port=silent.getsockname()[1], python=[*inside, sys.executable])
        assert select.select([silent], [], [], 10)[0]
        pid = server.process.pid
        if inside:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        with within(limit):
            os.kill(pid, SIGTERM)
            assert server.process.wait(10) in (0, -SIGTERM)


# ---------------------------------------------------------------- whole systems: faults under load

def emptied(database):
    """The database's server, with `idpot` made anew."""
    database.sql("DROP DATABASE IF EXISTS idpot")
    database.sql("CREATE DATABASE idpot")
    return database


def pot_of(database, pot, engine, value=0):
    """Makes the pot as go-idpot does."""
    database.sql(f"CREATE TABLE idpot.pot_{pot} ({GO}) ENGINE = {engine}")
    database.sql(f"INSERT INTO idpot.pot_{pot} VALUES ({value})")


@fixture(scope="module")
def idpots(database, tmp_path_factory):
    """Two on one database, kept over all faults: a thread stuck in one is missed in the next."""
    emptied(database)
    database.sql("CREATE USER teller IDENTIFIED BY 'p'")    # read_only spares root
    database.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO teller")
    two = []
    for _ in range(2):
        two.append(Idpot(tmp_path_factory.mktemp("idpot"), Timeout=1, LogFile="access.log",
                         Engine="InnoDB", ConnectString=database.dsn(credentials="teller:p")))
    yield two
    for server in two:
        server.stop(SIGKILL)
    database.sql("DROP USER teller")


def burned_by(name, fault, idpots, database, may_lose=()):
    """Lets the fault happen to two pots under load, which must recover; how many IDs were lost."""
    loads = []
    for engine in ("MyISAM", "InnoDB"):
        pot_of(database, f"{name}_{engine}", engine)
        loads.append(Load(idpots, f"{name}_{engine}"))
    with loads[0], loads[1]:
        for load in loads:
            load.more()
        fault(database, *loads)
        for load in loads:
            load.recover()
    burned = 0
    for load in loads:
        counter = database.counter(load.pot)
        load.verdict(counter, may_lose)
        burned += counter - load.issued()
    assert [healthy(server) for server in idpots] == [True, True]
    return burned


def until_refused(trouble):
    """The fault that the database is in that trouble until every client was refused."""
    def fault(database, *loads):
        with trouble(database):
            for load in loads:
                wait_until(load.refused)

    return fault


def queries_killed(database, *_):
    """Between the statements of a call, too."""
    killed = 0
    while killed < 6:
        for number, in database.sql("SELECT id FROM information_schema.processlist "
                                    "WHERE user = 'teller' AND command = 'Query'"):
            with suppress(Exception):    # it is gone
                database.sql(f"KILL QUERY {number}")
                killed += 1


def locked(trouble, database, other, load):
    """Another session holds one pot until all its clients are refused; the other pot is served."""
    _, harm, mend = TROUBLES[trouble]
    with troubled(database, [load.pot], harm, mend, name="idpot"):
        wait_until(load.refused)
        since = monotonic()
        other.more(1000)
        assert other.statuses(since).keys() == {200}


FAULTS = {
    "killed": until_refused(killed),
    "hung": until_refused(hung),
    "read_only": until_refused(read_only),
    "restarted": lambda database, *_: (database.signal(SIGTERM), database.start()),
    "queries_killed": queries_killed,
    "table_locked": partial(locked, "locked tables"),
    "row_locked": partial(locked, "locked rows"),
}


@parametrize("name", FAULTS)
def test_a_fault_under_load(name, idpots, database):
    burned_by(name, FAULTS[name], idpots, database)


@parametrize("number, code, most", [
    (SIGKILL, -SIGKILL, 20),      # twelve clients have no more in flight
    (SIGTERM, 0, 0)])
def test_idpot_ended_under_load_burns_what_was_in_flight(number, code, most, idpots, database):
    def fault(*_):
        with within(2):
            assert idpots[0].stop(number) == code
        idpots[0].start()

    assert burned_by(number.name, fault, idpots, database, may_lose=[0]) <= most


def test_requests_whose_time_is_over_cost_no_id(idpots, database):
    server = idpots[0]
    server.create("late")
    assert server.next("late") == 1
    with pot_locked(database, "late", "idpot"):
        with clients(server, 20, b"POST /id/late HTTP/1.1\r\nHost: x\r\n\r\n", 503):
            wait_until(lambda: not waiting_for_lock(database, "late"))
    assert server.next("late") == 2


# ---------------------------------------------------------------- a database that hangs

@parametrize("connections", [1, 8])
def test_while_a_database_hangs_each_request_waits_its_timeout_and_nobody_else(
        connections, run, mysql, database):
    server = eight_pots(run(**mysql(Timeout=2, Connections=connections)))
    with within(8):
        with hung(database), all_of([asking(server, pot) for pot in EIGHT * 4]) as waiting:
            with within(1):
                assert server.status("GET", "/x") == 404
            with within(2.5):
                assert server.status("GET", "/healthz") == 503
            for client in waiting:
                status, fields, text = client.answer()
                assert status == 503
                assert fields["Retry-After"] == "1"
                assert re.search(rb"(did not answer in|tried for) 2 seconds", text)
        wait_until(lambda: server.status("POST", "/id/p0") == 200, 2)
    assert {status for status, _ in answers_at_once(server)} == {200}


def test_a_stop_while_a_database_hangs_answers_all_and_ends(run, mysql, database):
    server = eight_pots(run(**mysql(Timeout=2)))
    with hung(database), all_of([asking(server, pot) for pot in EIGHT]) as waiting, within(5):
        until_in_flight(server, 8)
        with stopped(server):
            late = [asking(server, pot) for pot in EIGHT]       # are read when the stop has begun
            server.process.terminate()
            assert nothing_comes(late[0], 0.3)
        with all_of(late):
            assert {client.status() for client in waiting + late} == {503}
        assert server.process.wait(5) == 0


# ---------------------------------------------------------------- servers that may issue IDs

@fixture
def first(database):
    return emptied(database)


@fixture(scope="module")
def second():
    """A server that knows nothing of the first."""
    server = Database()
    yield server
    server.remove()


def on_servers(*ports, engine="InnoDB", timeout=4, parameters=""):
    """The settings for idpots of root on the servers at the ports."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    return {"Timeout": timeout, "LogFile": "access.log", "Engine": engine,
            "ConnectString": f"root@tcp({addresses})/idpot{parameters}"}


def copied(first, second, ahead=0):
    """Makes the second server what a replica of the first would be, or ahead of it."""
    emptied(second)
    for (table,) in first.sql("SHOW TABLES FROM idpot"):
        pot = table.removeprefix("pot_")
        pot_of(second, pot, "InnoDB", first.counter(pot) + ahead)


class TestMayWrite:
    def test_connections_of_root_give_no_id_once_their_server_is_read_only(self, run, first):
        """read_only does not bind root."""
        server = eight_pots(run(**on_servers(first.port, timeout=1)))
        asks = [("POST", f"/id/{pot}") for pot in EIGHT]
        asks += [("POST", "/pot/raise", "name=p0&min=9"), ("GET", "/healthz")]
        with read_only(first):
            for status, text in at_once_with(asks, lambda ask: server.answer(*ask)):
                assert status == 503
                assert "it is read-only (error 1290)" in text
        wait_until(lambda: healthy(server))
        for status, text in answers_at_once(server):
            assert status == 200
            assert 2 <= int(text) < 9       # of a call some may be burnt

    def test_a_statement_that_waited_while_its_server_was_demoted_gives_no_id(self, run, first):
        server = run(**on_servers(first.port, timeout=2))
        server.create("held", 41)
        assert server.next("held") == 42
        with read_lock(first) as session, asking(server, "held") as client:
            until_locked(first, "held")
            with between(lambda: session.execute("SET GLOBAL read_only = 1"),
                         lambda: session.execute("SET GLOBAL read_only = 0")):
                session.execute("UNLOCK TABLES")
                status, _, text = client.answer()
            assert status == 503
            assert b"read-only" in text
        assert server.next("held") in (43, 44)      # one that came too late may be burnt

    def test_a_reply_that_is_read_late_counts_only_if_its_server_may_write_still(self, run, first):
        server = run(**on_servers(first.port), pot="p")
        assert server.next("p") == 1
        with pot_locked(first, "p", "idpot") as session, asking(server, "p") as client:
            until_locked(first, "p")
            with stopped(server):
                session.execute("UNLOCK TABLES")
                wait_until(lambda: first.counter("p") == 2)
                with read_only(first):
                    assert nothing_comes(client, 1.1)       # it is believed for a second
                    server.process.send_signal(SIGCONT)
                    assert client.status() == 503

    def test_no_id_repeats_when_a_server_is_demoted_and_another_promoted(self, run, first, second):
        second.sql("SET GLOBAL read_only = 1")
        idpots = [run(**on_servers(first.port, second.port)) for _ in range(2)]
        idpots[0].create("moved")
        with read_only(first):      # until the load has ended: it would find this one again
            first.sql("SET GLOBAL read_only = 0")
            with Load(idpots, "moved", patience=4) as load:
                load.more()
                first.sql("SET GLOBAL read_only = 1")
                copied(first, second)
                second.sql("SET GLOBAL read_only = 0")
                idpots[1].stop()
                idpots[1].start()
                load.recover()
        load.verdict(second.counter("moved"), may_lose=[1])

    @parametrize("variable", ["read_only", "transaction_read_only"])
    def test_a_first_address_that_may_not_write_is_left_for_the_second(
            self, variable, first, second, tmp_path):
        emptied(second)
        with switched_on(first, variable):
            store = store_of(tmp_path, **on_servers(first.port, second.port))
            store.create("p", 5)
            assert taken(store, ("p", 1, 5)) == [6]
            store.close()
        assert second.counter("p") == 6

    @parametrize("data", [
        b"\0\0\0\0",                                # nothing
        b"\x01\0\0\0\x0a",                          # a version alone
        b"\x06\0\0\0\x0a8.0.3",                     # one that is cut off
        b"\x06\0\0\0\xff\x10\x04\xff\xfe\xfd",      # an error that is no UTF-8
        b"\x09\0\0\0\x0a8.0\0\x08\0\0\0",           # no salt
        b"HTTP/1.1 400 Bad Request\r\n\r\n"])
    def test_a_first_address_that_speaks_no_mysql_is_left_for_the_second(
            self, data, driver, first, tmp_path):
        with OddServer(data) as odd:
            store = store_of(tmp_path, **on_servers(odd.port, first.port))
            store.create("p", 5)
            assert taken(store, ("p", 1, 5)) == [6]
            store.close()

    @slow
    def test_a_second_address_is_used_by_all_until_it_fails_too(self, run, first, second):
        server = eight_pots(run(**on_servers(first.port, second.port)))
        copied(first, second, ahead=10)
        before = first.counter("p0")
        with hung(first):
            wait_until(lambda: server.status("POST", "/id/p0") == 200)
            with within(1):
                assert answers_at_once(server)[1:] == [(200, "12")] * 7
        hung_up = first.counter("p0")       # it may have run what waited
        for last in range(13, 30):
            assert answers_at_once(server)[1:] == [(200, str(last))] * 7
        assert first.counter("p0") == hung_up <= before + 1

    def test_what_an_address_says_after_it_was_given_up_does_not_count(
            self, first, second, tmp_path):
        pot_of(first, "p", "InnoDB")
        copied(first, second, ahead=10)
        one, other, *_ = stores_of(tmp_path, **on_servers(first.port, second.port))
        one.connect()
        with pot_locked(first, "p", "idpot") as session, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(take_once, one, ("p", 1, 0))
            until_locked(first, "p")
            with switched_on(first, "transaction_read_only"):
                other.connect()
            session.execute("UNLOCK TABLES")
            with raises(idpot.Transient):
                answer.result()
        assert taken(one, ("p", 1, 0)) == [11]

    @slow
    def test_two_locks_in_a_row_are_no_silence_of_a_server(self, run, first, second):
        server = eight_pots(run(**on_servers(first.port, second.port)))
        copied(first, second, ahead=990)
        with session_on(first, "BEGIN", "SELECT id FROM pot_p0 FOR UPDATE"):
            with read_lock(first) as table, asking(server, "p0") as client:
                since = monotonic()
                until_locked(first, "p0")
                wait_until(lambda: monotonic() > since + 0.7)  # of a second's patience
                table.execute("UNLOCK TABLES")
                assert client.status() == 503
        assert server.next("p0") < 20
        errors = metrics(server)
        assert errors[ERROR_1205] > 0
        assert not re.search('errno="(2013|2055|3024)"', " ".join(errors))

    def test_each_address_has_its_own_reason(self, run, first, tmp_path):
        settings = on_servers(first.port, 1, timeout=1)
        with read_only(first):
            server = run(**settings)
            assert "(error 1290)" in server.answer("POST", "/id/p")[1]
            line = refusal(tmp_path, CHECK, **settings)
        each = rf"127\.0\.0\.1:{first.port}: .*read-only .*; 127\.0\.0\.1:1: .*\b200[23]\b"
        assert re.search(each, server.errors())
        assert re.match(f"idpot: MySQL {each}", line)


# ---------------------------------------------------------------- networks and proxies

class TestNetworks:
    @contextmanager
    def several_connections(self, run, first, **options):
        """An idpot with eight pots and several connections through a proxy."""
        with Proxy(first.port) as proxy, ThreadPoolExecutor(8) as pool:
            server = eight_pots(run(**on_servers(proxy.port, **options)))
            tables = " WRITE, pot_".join(EIGHT)
            with session_on(first, f"LOCK TABLES pot_{tables} WRITE"):
                targets = [f"/id/{pot}" for pot in EIGHT]
                reads = pool.map(partial(server.status, "GET"), targets)
                wait_until(lambda: len(waiting_for_lock(first, "p")) >= 4)
            assert list(reads) == [200] * 8
            yield proxy, server

    def test_one_lost_connection_holds_up_nobody_while_new_ones_hang(self, run, first):
        with self.several_connections(run, first, timeout=10) as (proxy, server):
            proxy.answering.clear()
            with pot_locked(first, "p0", "idpot") as session, asking(server, "p0") as client:
                [[number]] = until_locked(first, "p0")
                session.execute(f"KILL {number}")
                session.execute("UNLOCK TABLES")
                with within(1.5):
                    assert client.status() == 200
            with within(3):
                for number in range(20):        # each makes another worker lead
                    assert server.status("POST", f"/id/none{number}") == 404
                    assert server.status("GET", "/x") == 404

    @slow
    def test_connections_that_are_all_dead_cost_one_wait(self, run, first):
        with self.several_connections(run, first, timeout=6) as (proxy, server):
            proxy.losses += 1
            assert server.next("p0") == 2       # two waits take more than its time
            with within(2):
                assert answers_at_once(server)[1:] == [(200, "2")] * 7

    def test_connections_that_nobody_used_for_a_minute_cost_no_wait(self, run, first):
        with Proxy(first.port) as proxy:
            server = run(**on_servers(proxy.port, timeout=8), python=python_with(*CLOCK), pot="p")
            assert server.next("p") == 1
            told = server.events()
            proxy.losses += 1
            server.path("later").touch()
            with within(1):
                assert server.next("p") == 2
            assert server.events() == told

    @parametrize("engine", ["MyISAM", "InnoDB"])
    def test_replies_that_are_cut_anywhere_give_no_id(self, engine, driver, first, tmp_path):
        room = [math.inf]       # bytes that may come

        def reply(data):
            passed = data[:max(0, min(room[0], len(data)))]
            room[0] -= len(data)
            return passed

        with Proxy(first.port, reply=reply) as proxy:
            settings = on_servers(proxy.port, engine=engine, parameters="?tls=false")
            store = store_of(tmp_path, **settings)
            for pot in "abc":
                store.create(pot, 10)
                store.current(pot)
            for length in itertools.count():
                room[0] = math.inf
                store.connect()
                room[0] = length
                with suppress(idpot.Transient):
                    lasts = take_once(store, ("c", 3, 10), ("a", 1, 10), ("b", 2, 10))
                    break
            store.close()
        assert length > 30
        assert lasts == [first.counter(pot) for pot in "cab"]

    def test_a_server_that_dies_while_tls_is_agreed_on_is_waited_for(self, run):
        with OddServer(GREETING, None) as dying:
            server = run(**on_servers(dying.port, timeout=1))
            assert_refused(server.request("POST", "/id/p"), "2026", again="1")
        assert " 2026 " in server.errors()
