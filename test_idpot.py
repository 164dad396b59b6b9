"""Tests of idpot over a real MariaDB or MySQL server and SQLite, through real HTTP.

    tox                         # or: python3 -m pytest

The database server is started here, in a temporary directory on a free port, and ended here.
IDPOT_TEST_MYSQLD names the program where it is not the installed mariadbd or mysqld. Where there is
none its tests are skipped with the reason, except under CI=true: there they fail.
"""

import collections
import contextlib
import ctypes
import email.utils
import errno
import functools
import http.server
import importlib.util
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
import selectors
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, IncompleteRead
from pathlib import Path

import pytest

import idpot

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_ID = 2**64 - 1


# ---------------------------------------------------------------- real parts: servers and idpot

def wait_until(condition, seconds=10.0, every=0.02):
    """Returns the first true value of condition(); fails after that many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(every)


def at_once(*calls):
    """Runs the calls in threads that start together; returns their results in order."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait(10)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def missing(reason):
    """Skips the test for that reason; under CI=true, where nothing may be missing, it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def needs(program):
    """The program's path; without it the test is skipped, and fails under CI=true."""
    return shutil.which(program) or missing(f"{program} is not installed")


GIVEN_PORTS = set()


def free_port():
    """A free TCP port below the ephemeral range, so that no outgoing connection takes it.

    No port is given twice; parallel runs of the tests begin at different ones.
    """
    first = 21000 + os.getpid() * 97 % 9000
    for port in range(first, 32000):
        if port in GIVEN_PORTS:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            GIVEN_PORTS.add(port)
            return port
    raise RuntimeError("no free port")


def refused(port):
    """Whether nobody listens on the port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def database_program():
    """The path of the database server that the tests use, or None."""
    named = os.environ.get("IDPOT_TEST_MYSQLD")
    if named:
        return shutil.which(named) or missing(f"IDPOT_TEST_MYSQLD: {named} is no program")
    return (shutil.which("mariadbd") or shutil.which("mysqld")
            or shutil.which("mysqld", path="/usr/sbin"))


def is_mysql(program):
    """Whether the server is MySQL and not MariaDB, which has a program of the name mysqld, too."""
    version = subprocess.check_output([program, "--no-defaults", "-V"], text=True, timeout=20)
    return "MariaDB" not in version


class Database:
    """A MariaDB or MySQL server of our own; root has no password and may come over TCP.

    It has an empty database `idpot`. The options are added to the server's command line.
    """

    def __init__(self, *options):
        self.program = database_program()
        if not self.program:
            missing("no mariadbd or mysqld is installed: apt-get install mariadb-server")
        self.is_mysql = is_mysql(self.program)
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
        with contextlib.suppress(Exception):
            return self.sql("SELECT 1") == [(1,)]

    def connect(self, **options):
        """A mysql-connector connection as root, autocommit on."""
        import mysql.connector
        arguments = {"host": "127.0.0.1", "port": self.port, "user": "root", "autocommit": True,
                     "collation": "utf8mb4_general_ci", "connection_timeout": 10,
                     "read_timeout": 90}
        return mysql.connector.connect(**{**arguments, **options})

    def sql(self, statement, **options):
        """Runs one statement as root and returns its rows."""
        with contextlib.closing(self.connect(**options)) as connection:
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def dsn(self, database="idpot", parameters="", credentials="root"):
        return f"{credentials}@tcp(127.0.0.1:{self.port})/{database}{parameters}"

    def signal(self, number):
        """Sends a signal; SIGKILL and SIGTERM are waited for."""
        self.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(60)

    def remove(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)
        shutil.rmtree(self.dir, ignore_errors=True)


MYSQL_SETTINGS = (
    "ConnectString", "Hostname", "Port", "Username", "Password", "Dbname", "Engine", "Connections")


def config_text(**settings):
    """The text of a settings file; each setting stands in the section where it belongs."""
    sections = {}
    for name, value in settings.items():
        section = "Mysql" if name in MYSQL_SETTINGS else "Server"
        if name == "File":
            section = "Sqlite"
        sections.setdefault(section, [f"[{section}]\n"]).append(f"{name} = {value}\n")
    return "".join(itertools.chain(*sections.values()))


class Idpot:
    """`python idpot.py --config=...` in a directory of its own, with these settings.

    With config=False there is no file and no --config. `python` is the command that runs idpot.py.
    """

    def __init__(self, folder, *arguments, config=True, listen="127.0.0.1:0", wait=True,
                 environment=None, python=(sys.executable,), **settings):
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
        self.environment = {**os.environ, **(environment or {})}
        self.start(wait)

    def start(self, wait=True):
        """Starts it and, unless told otherwise, returns when it listens."""
        with open(self.stderr, "a") as stderr:
            seen = stderr.tell()
            self.process = subprocess.Popen(self.command, cwd=self.folder, stderr=stderr,
                                            stdout=subprocess.DEVNULL, env=self.environment)
        if wait:
            self.host, self.port = wait_until(lambda: self.address(seen), 30)

    def address(self, seen=0):
        """The host and port that it listens on, by what it wrote after `seen`; None before."""
        assert self.process.poll() is None, self.errors()
        found = re.search(r"listening on http://(\S+):(\d+)", self.errors()[seen:])
        return found and (found[1], int(found[2]))

    def errors(self):
        """What it has written on stderr."""
        with open(self.stderr) as file:
            return file.read()

    def request(self, method, path, body=None, headers=None, timeout=30):
        """One request on a connection of its own; returns (status, body text, headers)."""
        headers = dict(headers or {})
        if body is not None:
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

    def answer(self, method, path, body=None):
        """The (status, body text) of a request()."""
        status, text, _ = self.request(method, path, body)
        return status, text

    def create(self, pot, min=0):
        answer = self.answer("POST", "/pot/create", f"name={pot}&min={min}")
        assert answer == (201, "Created new pot")

    def next(self, pot, count=None):
        """The next ID; with count, the list of IDs."""
        status, text = self.answer("POST", f"/id/{pot}", f"count={count}" if count else None)
        assert status == 200, text
        ids = [int(line) for line in text.splitlines()]
        return ids if count else ids[0]

    def stop(self, number=signal.SIGTERM):
        """Sends the signal, waits for the end and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


def python_with(*lines):
    """A command that runs idpot.py, after these lines of Python."""
    before = "import os, sys; sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))"
    code = "\n".join([before, *lines, "import idpot", "sys.exit(idpot.main())"])
    return sys.executable, "-c", code


def logged(server):
    """All that the server has logged on stderr by now; it writes it a moment later."""
    mark = f"/mark-{time.monotonic_ns()}"
    server.request("GET", mark)
    return wait_until(lambda: mark in server.errors() and server.errors())


def metrics(server):
    """{series of /metrics: value}"""
    text = server.request("GET", "/metrics")[1]
    return {name: float(value) for name, value in re.findall("(?m)^([^#].*) (.*)$", text)}


@pytest.fixture(scope="session")
def database():
    server = Database()
    yield server
    server.remove()


@contextlib.contextmanager
def read_only(database):
    database.sql("SET GLOBAL read_only = 1")
    try:
        yield
    finally:
        database.sql("SET GLOBAL read_only = 0")


def one_connection_in_use(database):
    """A block in which user `single` has the only connection that it may have."""
    return contextlib.closing(database.connect(user="single", password="p"))


@contextlib.contextmanager
def signalled(database, number, mend):
    """A block in which the database's server has got the signal; mend() is called at its end."""
    database.signal(number)
    try:
        yield
    finally:
        mend()


def killed(database):
    return signalled(database, signal.SIGKILL, database.start)


def down(database):
    return signalled(database, signal.SIGTERM, database.start)


def hung(database):
    return signalled(database, signal.SIGSTOP, lambda: database.signal(signal.SIGCONT))


@pytest.fixture
def run(tmp_path):
    """Starts idpots: run(Timeout=1, ...) with settings; each is ended after the test."""
    started = []

    def start(*arguments, **options):
        folder = tmp_path / f"idpot{len(started)}"
        started.append(Idpot(folder, *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)


# ---------------------------------------------------------------- allocation, in process

class MemoryStore(idpot.Store):
    """A store in memory, as the allocator knows stores; the counters are its pots.

    `calls` are the statements that it got. Each waits while `gate` is not set. `faults` are
    functions for the next calls of take: each is called by one, and may raise; a Retry costs the
    connection.
    """
    LIMIT = 1000        # the last ID of each pot

    def __init__(self, **counters):
        self.counters = counters
        self.calls = []
        self.faults = []
        self.gate = threading.Event()
        self.gate.set()
        self.reachable = True
        self.trouble = idpot.Retry, "no connection"     # where it is not
        self.connected = False
        self.attempts = 0       # to connect

    def connect(self):
        self.attempts += 1
        if not self.reachable:
            kind, text = self.trouble
            raise kind(text)
        self.connected = True

    def begin(self, *call):
        """Notes a call, which then waits at the gate."""
        self.calls.append(call)
        assert self.gate.wait(10)

    def take(self, wants):
        if self.faults:
            self.calls.append("fault")
            try:
                self.faults.pop(0)()
            except idpot.Retry:
                self.connected = False
                raise
        self.begin("take", *(wants[0] if len(wants) == 1 else wants))
        for pot, count, _ in wants:
            if self.counters[pot] + count > self.LIMIT:
                raise idpot.Exhausted(f"fewer than {count}")
        for pot, count, _ in wants:
            self.counters[pot] += count
        return [self.counters[pot] for pot, _, _ in wants]

    def current(self, pot):
        self.begin("current", pot)
        return self.counters[pot]

    def create(self, pot, low):
        self.begin("create", pot, low)
        if pot in self.counters:
            raise idpot.Exists("exists")
        self.counters[pot] = low
        return low

    def raise_to(self, pot, low):
        self.begin("raise_to", pot, low)
        self.counters[pot] = max(self.counters[pot], low)
        return self.counters[pot]

    def pots(self):
        return sorted(self.counters.items())

    def close(self):
        self.connected = False


def failing(error):
    """A fault that raises the error."""
    def fault():
        raise error

    return fault


class Allocation:
    """An allocator over the stores, and what it answers.

    `answers` has a (name, value) for each answer as they come, or (name, error, its text).
    """

    def __init__(self, *stores):
        self.stores = stores
        self.answers = []
        self.allocator = idpot.Allocator(list(stores))
        self.allocator.start()

    def ask(self, name, pot="p", read=False, **wanted):
        """Submits a job, whose answer is to have that name, and returns it."""
        def answer(value, error, crowd):
            self.answers.append((name, type(error), str(error)) if error else (name, value))

        if read:
            wanted["call"] = idpot.Allocator.current
        patience = wanted.pop("patience", 10.0)
        job = idpot.Job(idpot.Question(pot, **wanted), answer, patience)
        self.allocator.submit(job)
        return job

    def answer(self, pot="p", **wanted):
        """The value that a job, the only one under way, is answered."""
        before = len(self.answers)
        self.ask("", pot, **wanted)
        self.wait_for(before + 1)
        return self.answers[before][1]

    def know(self, store, pots="p"):
        """Has the pots read once, which leaves no trace in the store or the answers."""
        for pot in pots:
            self.answer(pot, read=True)
        self.answers.clear()
        store.calls.clear()

    def wait_for(self, count):
        """Waits until so many jobs are answered."""
        def answered():
            self.allocator.look(time.monotonic())       # as the server does now and then
            return len(self.answers) >= count

        wait_until(answered)

    @contextlib.contextmanager
    def held(self, store):
        """A with block during which a read of pot p is under way, so that other jobs wait."""
        store.gate.clear()
        self.ask("held", read=True)
        wait_until(lambda: store.calls)
        yield
        store.gate.set()
        self.wait_for(1)
        assert self.answers[0][0] == "held"
        del self.answers[0]
        del store.calls[0]

    def stop(self):
        for store in self.stores:
            store.gate.set()
        self.allocator.stop()


class TestAllocation:
    @pytest.fixture
    def start(self):
        """Starts an Allocation over the stores; it is stopped after the test."""
        with contextlib.ExitStack() as stack:

            def start(*stores):
                allocation = Allocation(*stores)
                stack.callback(allocation.stop)
                return allocation

            yield start

    def test_jobs_that_wait_share_one_statement_in_the_order_of_their_arrival(self, start):
        store = MemoryStore(p=0)
        allocation = start(store)
        with allocation.held(store):
            allocation.ask("one", count=1)
            allocation.ask("ten", count=10)
            allocation.ask("two", count=2)
        allocation.wait_for(3)
        assert store.calls == [("take", "p", 13, 0)]
        assert allocation.answers == [("one", 1), ("ten", 11), ("two", 13)]

    def test_each_statement_is_told_the_highest_id_that_was_given(self, start):
        store = MemoryStore(p=0)
        allocation = start(store)

        def raise_to(low):
            return lambda allocator, store, pot: allocator.raise_to(store, pot, low)

        assert allocation.answer(count=5) == 5
        assert allocation.answer(count=1) == 6
        assert allocation.answer(call=raise_to(50)) == 50
        assert allocation.answer(call=raise_to(9)) == 50
        assert allocation.answer(count=1) == 51
        assert allocation.answer("q", call=lambda _, store, pot: store.create("q", 30)) == 30
        assert allocation.answer("q", count=1) == 31
        assert [call for call in store.calls if call[0] == "take"] == [
            ("take", "p", 5, 0), ("take", "p", 1, 5), ("take", "p", 1, 50), ("take", "q", 1, 30)]

    def test_what_was_given_is_neither_shown_lower_nor_given_again(self, start):
        store = MemoryStore(p=0, q=3)
        allocation = start(store)
        assert allocation.answer(count=5) == 5
        store.counters["p"] = 2
        assert allocation.answer(read=True) == 5
        list_pots = idpot.Allocator.list_pots
        assert allocation.answer("all pots", call=list_pots) == [("p", 5), ("q", 3)]
        assert allocation.answer(count=3) == idpot.Broken

    def test_jobs_that_were_answered_do_not_pile_up_while_no_worker_can_connect(self, start):
        stores = [MemoryStore(), MemoryStore()]
        for store in stores:
            store.reachable = False
        allocation = start(*stores)
        kept = []
        for number in range(50):
            def answer(value, error, crowd):
                pass

            kept.append(weakref.ref(answer))
            job = idpot.Job(idpot.Question(f"pot{number % 5}", count=1), answer)
            allocation.allocator.submit(job)
            job.expire()
        del answer, job
        wait_until(lambda: not any(answer() for answer in kept))

    def test_a_retry_puts_jobs_back_before_later_ones_and_answers_them_once(self, start):
        def fault():
            allocation.ask("late", count=5)
            raise idpot.Retry("no connection")

        store = MemoryStore(p=0)
        allocation = start(store)
        allocation.know(store)
        store.faults = [fault, failing(idpot.Retry("no connection"))]
        allocation.ask("early", count=1)
        allocation.wait_for(2)
        allocation.ask("last", count=1)
        allocation.wait_for(3)
        assert store.calls == ["fault", "fault", ("take", "p", 6, 0), ("take", "p", 1, 6)]
        assert allocation.answers == [("early", 1), ("late", 6), ("last", 7)]

    def test_a_pot_that_is_to_be_tried_again_is_left_to_another_worker(self, start):
        stores = [MemoryStore(p=0), MemoryStore(p=0)]
        for store in stores:
            store.connected = True
        allocation = start(*stores)
        allocation.answer(read=True)
        faults = stores[0].faults = stores[1].faults = []

        def served_by_the_other():
            for store in stores:
                store.calls.clear()
            faults.append(failing(idpot.Retry("no connection")))
            allocation.answer(count=1)
            return [len(store.calls) for store in stores] == [1, 1]

        wait_until(served_by_the_other)

    def test_where_not_all_fit_together_those_that_fit_alone_are_served(self, start):
        store = MemoryStore(p=990)
        allocation = start(store)
        with allocation.held(store):
            for count in (1, 500, 2, 8, 7):
                allocation.ask(f"{count} of ten", count=count)
        allocation.wait_for(5)
        assert [answer[:2] for answer in sorted(allocation.answers)] == [
            ("1 of ten", 991),
            ("2 of ten", 993),
            ("500 of ten", idpot.Exhausted),
            ("7 of ten", 1000),
            ("8 of ten", idpot.Exhausted)]

    @pytest.mark.parametrize("error", [
        idpot.NotFound("dropped"), idpot.Broken("no row"), idpot.Unavailable("disk full")])
    def test_a_pot_that_is_dropped_or_breaks_where_not_all_fit(self, start, error):
        def breaks():
            store.faults = [failing(error)] * 3

        store = MemoryStore(p=990)
        allocation = start(store)
        with allocation.held(store):
            store.faults = [lambda: None, breaks]
            for count in (1, 500, 2, 3):
                allocation.ask(f"{count} of ten", count=count)
        allocation.wait_for(4)
        assert [answer[:2] for answer in allocation.answers] == [
            ("1 of ten", 991), ("500 of ten", type(error)), ("2 of ten", type(error)),
            ("3 of ten", type(error))]

    def test_forty_jobs_for_an_exhausted_pot_share_a_statement_or_two(self, start):
        store = MemoryStore(p=1000)
        allocation = start(store)
        with allocation.held(store):
            for number in range(40):
                allocation.ask(number, count=1)
        allocation.wait_for(40)
        assert [answer[1] for answer in allocation.answers] == [idpot.Exhausted] * 40
        assert len(store.calls) <= 2

    @pytest.mark.parametrize("error, answer", [
        (idpot.NotFound("there is no pot"), (idpot.NotFound, "there is no pot")),
        (ZeroDivisionError("planted"), (idpot.IdpotError, "internal error"))])
    def test_another_error_of_the_store_is_the_answer_to_all_and_the_worker_lives_on(
            self, start, caplog, monkeypatch, error, answer):
        monkeypatch.setattr(idpot.log, "propagate", True)
        store = MemoryStore(p=0)
        store.faults = [failing(error)]
        allocation = start(store)
        with allocation.held(store):
            allocation.ask("one", count=1)
            allocation.ask("two", count=2)
        allocation.wait_for(2)
        assert allocation.answers == [("one", *answer), ("two", *answer)]
        assert allocation.answer(count=1) == 1
        assert ("ZeroDivisionError: planted" in caplog.text) == (answer[0] == idpot.IdpotError)

    def test_an_exception_while_connecting_or_answering_does_not_end_the_worker(self, start):
        store = MemoryStore(p=0)
        connect = store.connect

        def fault(*arguments):
            store.connect = connect
            raise ZeroDivisionError

        store.connect = fault
        allocation = start(store)
        job = idpot.Job(idpot.Question("p", count=1), fault)
        allocation.allocator.submit(job)
        wait_until(job.answered)
        assert allocation.answer(count=1) > 0

    @pytest.fixture
    def left_alone(self, start):
        """An allocation that has answered pot q once, by the worker of `good`, when that was free
        again: the other could not connect, and now `good` cannot either."""

        def left_alone(*trouble):
            good, bad = MemoryStore(p=0, q=0), MemoryStore(q=0)
            bad.reachable = False
            good.trouble = bad.trouble = trouble
            good.connected = True
            allocation = start(bad, good)
            with allocation.held(good):
                allocation.ask("other pot", pot="q", count=1)
                wait_until(lambda: bad.attempts > 2)
                assert allocation.answers == []
            allocation.wait_for(1)
            assert allocation.answers == [("other pot", 1)]
            assert bad.calls == []
            good.connected = good.reachable = False
            return allocation, good

        return left_alone

    def test_a_worker_that_is_refused_answers_for_nobody_who_has_a_connection(self, left_alone):
        allocation, _ = left_alone(idpot.Refused, "no right")
        allocation.ask("refused", pot="q", count=1)
        allocation.wait_for(2)
        assert allocation.answers[1] == ("refused", idpot.Refused, "no right")

    def test_a_worker_that_cannot_connect_leaves_the_pot_to_another(self, left_alone):
        allocation, good = left_alone(idpot.Retry, "no connection")
        allocation.ask("patient", pot="q", count=1)
        wait_until(lambda: good.attempts > 2)
        assert len(allocation.answers) == 1
        good.reachable = True
        allocation.wait_for(2)
        assert allocation.answers[1] == ("patient", 2)

    def test_a_slow_pot_does_not_hold_up_another(self, start):
        over = threading.Event()
        stores = [MemoryStore(p=0, q=7), MemoryStore(p=0, q=7)]
        for store in stores:
            store.faults = [functools.partial(over.wait, 10)]
        allocation = start(*stores)
        allocation.ask("slow", count=1)
        allocation.ask("quick", pot="q", read=True)
        allocation.wait_for(1)
        over.set()
        allocation.wait_for(2)
        assert allocation.answers == [("quick", 7), ("slow", 1)]

    def test_a_pot_has_one_worker_at_a_time(self, start):
        stores = [MemoryStore(p=0, q=0, r=0) for _ in range(3)]
        for store in stores:
            store.gate.clear()
        allocation = start(*stores)
        allocation.ask("first", count=1)
        wait_until(lambda: any(store.calls for store in stores))
        for _ in range(5):
            allocation.ask("later", count=1)
        allocation.ask("other", pot="q", read=True)
        allocation.ask("third", pot="r", read=True)
        wait_until(lambda: all(store.calls for store in stores))
        names = [call[0] for store in stores for call in store.calls]
        assert names == ["current"] * 3     # that of p is the look before its first take

    def test_the_worker_that_was_used_last_is_the_next(self, start):
        stores = [MemoryStore(p=0), MemoryStore(p=0), MemoryStore(p=0)]
        allocation = start(*stores)
        for store in stores:
            store.LIMIT = math.inf

        def ten_in_a_row():
            for store in stores:
                store.calls.clear()
            for _ in range(10):
                allocation.answer(count=1)
            return sorted(len(store.calls) for store in stores) == [0, 0, 10]

        wait_until(ten_in_a_row)

    def test_a_job_whose_time_is_over_is_told_why_and_its_late_value_is_dropped(self, start):
        store = MemoryStore(p=0)
        allocation = start(store)
        allocation.know(store)
        store.faults = [failing(idpot.Retry("the database cannot serve this now (error 1290)"))]
        store.gate.clear()
        late = allocation.ask("late", count=5, patience=2.5)
        wait_until(lambda: store.calls == ["fault", ("take", "p", 5, 0)])
        late.expire()
        store.gate.set()
        allocation.ask("next", count=1)
        allocation.wait_for(2)
        text = "the database cannot serve this now (error 1290), tried for 2.5 seconds"
        assert allocation.answers == [("late", idpot.Retry, text), ("next", 6)]

    def test_sound_pots_that_wait_are_taken_in_one_call(self, start):
        store = MemoryStore(p=0, q=0, r=5)
        allocation = start(store)
        allocation.know(store, "pqr")
        with allocation.held(store):
            allocation.ask("q", "q", count=2)
            allocation.ask("r", "r", count=1)
            allocation.ask("q again", "q", count=3)
        allocation.wait_for(3)
        assert store.calls == [("take", ("q", 5, 0), ("r", 1, 5))]
        assert sorted(allocation.answers) == [("q", 2), ("q again", 5), ("r", 6)]

    def test_pots_that_are_new_or_read_are_served_by_themselves(self, start):
        store = MemoryStore(p=0, q=0, r=0, s=0)
        allocation = start(store)
        allocation.know(store, "pqr")
        with allocation.held(store):
            allocation.ask("new", "s", count=1)
            allocation.ask("q", "q", count=1)
            allocation.ask("read", "r", read=True)
        allocation.wait_for(3)
        assert store.calls == [
            ("current", "s"), ("take", "s", 1, 0), ("take", "q", 1, 0), ("current", "r")]

    @pytest.mark.parametrize("error", [
        idpot.Retry("a lock"), idpot.NotFound("no pot"), idpot.Exhausted("full")])
    def test_after_a_failed_call_each_of_its_pots_is_taken_by_itself(self, start, error):
        store = MemoryStore(p=0, q=0, r=0)
        allocation = start(store)
        allocation.know(store, "pqr")
        store.faults = [failing(error)]
        with allocation.held(store):
            allocation.ask("q", "q", count=1)
            allocation.ask("r", "r", count=1)
        allocation.wait_for(2)
        assert store.calls == ["fault", ("take", "q", 1, 0), ("take", "r", 1, 0)]
        assert allocation.answers == [("q", 1), ("r", 1)]
        store.calls.clear()
        allocation.answers.clear()
        with allocation.held(store):        # they are sound again
            allocation.ask("q", "q", count=1)
            allocation.ask("r", "r", count=1)
        allocation.wait_for(2)
        assert store.calls == [("take", ("q", 1, 1), ("r", 1, 1))]

    def test_after_a_slow_call_each_of_its_pots_is_taken_by_itself_for_a_while(
            self, start, monkeypatch):
        store = MemoryStore(p=0, q=0, r=0)
        allocation = start(store)
        allocation.know(store, "pqr")
        store.faults = [functools.partial(passes, 0.3)]     # a lock on one of them, say

        def calls_for_both():
            store.calls.clear()
            allocation.answers.clear()
            with allocation.held(store):
                allocation.ask("q", "q", count=1)
                allocation.ask("r", "r", count=1)
            allocation.wait_for(2)
            return store.calls

        assert calls_for_both() == ["fault", ("take", ("q", 1, 0), ("r", 1, 0))]
        for taken in (1, 2):
            assert calls_for_both() == [("take", "q", 1, taken), ("take", "r", 1, taken)]
        monkeypatch.setattr(idpot.Queues, "ALONE", 0)
        calls_for_both()
        assert calls_for_both() == [("take", ("q", 1, 4), ("r", 1, 4))]

    def test_a_value_that_is_too_low_fails_its_call_and_costs_its_pot_alone(self, start):
        store = MemoryStore(p=0, q=0, r=0)
        allocation = start(store)
        allocation.know(store, "pqr")
        store.counters["r"] = -5
        with allocation.held(store):
            allocation.ask("q", "q", count=1)
            allocation.ask("r", "r", count=1)
        allocation.wait_for(2)
        assert store.calls == [
            ("take", ("q", 1, 0), ("r", 1, 0)), ("take", "q", 1, 1), ("take", "r", 1, 0)]
        assert [answer[:2] for answer in allocation.answers] == [("q", 2), ("r", idpot.Broken)]

    def test_a_pot_that_fails_is_tried_at_its_own_pace_and_its_worker_serves_others(self, start):
        store = MemoryStore(p=0, q=0)
        allocation = start(store)
        allocation.know(store, "pq")
        tries = []

        def fails():
            tries.append(time.monotonic())
            raise idpot.Retry("damaged")

        take = store.take
        store.take = lambda wants: fails() if wants[0][0] == "p" else take(wants)
        allocation.ask("p", "p", count=1, patience=1.5)
        moment = time.monotonic() + 1.4
        while time.monotonic() < moment:
            with within(0.2):
                allocation.answers.clear()
                allocation.answer("q", count=1)
        assert 3 <= len(tries) <= 6


def test_a_pot_whose_ids_are_too_few_is_no_part_of_a_call_for_several():
    queues = idpot.Queues()
    queues.add_all([idpot.Job(idpot.Question(pot, 2), print) for pot in "nmlko"])
    floors = {"n": 5, "m": idpot.MAX_ID - 2, "l": 7, "k": idpot.MAX_ID - 1, "o": 9}
    assert [[*queues.next_batch(floors, 64)] for _ in range(3)] == [["n", "m", "l"], ["k"], ["o"]]


def test_who_takes_a_pot_that_is_served_alone_wakes_another_worker_for_the_rest():
    queues = idpot.Queues()
    wakes = queue.SimpleQueue()
    assert queues.go_idle(MemoryStore(), wakes)
    queues.add_all([idpot.Job(idpot.Question(pot, 1), print) for pot in "pq"])
    assert wakes.empty()
    assert [*queues.next_batch({}, 64)] == ["p"]
    assert wakes.qsize() == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_allocator_without_a_living_worker_is_not_alive_while_a_job_waits():
    store = MemoryStore(p=0)
    store.faults = [failing(SystemExit())]      # ends the worker's thread
    allocator = idpot.Allocator([store], stuck=60)
    allocator.start()
    assert allocator.alive()
    for _ in range(2):
        question = idpot.Question("p", count=1)
        allocator.submit(idpot.Job(question, lambda value, error, crowd: None))
    wait_until(lambda: not allocator.alive(), 3)


# ---------------------------------------------------------------- SQLite, in process

@pytest.fixture
def sqlite_store(tmp_path):
    """An SqliteStore over a file of its own, with pot p at 10."""
    (tmp_path / "idpot.cfg").write_text(f"[Sqlite]\nFile = {tmp_path}/idpot.db\n")
    store = idpot.SqliteStore(idpot.load_settings(f"{tmp_path}/idpot.cfg"))
    store.start()
    store.create("p", 10)
    yield store
    store.close()


@pytest.mark.parametrize("floor, last", [(0, 13), (10, 13), (4, 13), (50, 53)])
def test_sqlite_takes_above_the_floor_and_the_counter_whichever_is_higher(
        sqlite_store, floor, last):
    assert sqlite_store.take([("p", 3, floor)]) == [last]
    assert sqlite_store.current("p") == last


def test_sqlite_takes_from_all_of_several_pots_or_from_none(sqlite_store):
    sqlite_store.create("full", idpot.MAX_ID)
    with pytest.raises(idpot.Exhausted):
        sqlite_store.take([("p", 3, 10), ("full", 1, idpot.MAX_ID)])
    assert sqlite_store.current("p") == 10
    sqlite_store.create("q", 20)
    assert sqlite_store.take([("q", 2, 20), ("p", 3, 10)]) == [22, 13]


def test_sqlite_syncs_before_each_answer(sqlite_store):
    assert sqlite_store._db.execute("PRAGMA synchronous").fetchone() == (2,)     # FULL


# ---------------------------------------------------------------- the API, over every store

def refusal(server, method, target, form=None):
    """The (status, text) of an answer that has changed no pot and shows nothing of the inside."""
    before = server.answer("GET", "/pot")[1]
    status, text, headers = server.request(method, target, form)
    assert re.fullmatch("[ -~]{1,199}\n", text)
    allowed = text.rpartition(", but ")[2] if status == 405 else "None\n"
    assert f"{headers['Allow']}\n" == allowed
    assert not re.search("Traceback|SELECT|UPDATE|INSERT|sqlite|mysql|pot_", text)
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Length"] == str(len(text))
    assert server.answer("GET", "/pot")[1] == before
    return status, text


API_ANSWERS = [     # one after the other
    ("POST", "/pot/create", "name=first&min=10", 201, "Created new pot"),
    ("GET", "/pot/first", None, 204, ""),
    ("GET", "/id/first", None, 200, "10"),
    ("POST", "/id/first", "", 200, "11"),
    ("GET", "/id/first", None, 200, "11"),
    ("HEAD", "/id/first", None, 200, ""),
    ("HEAD", "/id/none", None, 404, ""),
    ("POST", "/id/first?count=1", None, 200, "12\n"),
    ("POST", "/id/first?count=4", None, 200, "13\n14\n15\n16\n"),
    ("POST", "/id/first", "count=2", 200, "17\n18\n"),
    ("POST", "/pot/raise", "name=first&min=30", 200, "30"),
    ("POST", "/pot/raise", "name=first&min=7", 200, "30"),
    ("POST", "/id/first", None, 200, "31"),
    ("POST", "/id/first?count=10000", None, 200, "".join(f"{id}\n" for id in range(32, 10032))),
    ("POST", "/id/first?range=1", None, 200, "10032\t10032\n"),
    ("POST", "/id/first?range=10", None, 200, "10033\t10042\n"),
    ("POST", "/id/first", "range=4294967296", 200, "10043\t4294977338\n"),
    ("GET", "/id/first", None, 200, "4294977338"),
    ("POST", "/pot/create", "name=no-min", 201, "Created new pot"),
    ("POST", "/id/no-min", None, 200, "1"),
]

MIN = "is not a whole number from 0 to 18446744073709551615\n"
COUNT = "is not a whole number from 1 to 10000\n"
RANGE = "is not a whole number from 1 to 4294967296\n"
API_REFUSALS = [    # pot fixed is at 41; there is no pot none
    ("POST", "/id/fixed", "count=2%ff", 400, "the form is not UTF-8, or has too many fields\n"),
    ("POST", "/pot/create", "min=1", 400, 'name "" is not 1 to 60 characters of A-Z a-z 0-9 _ -\n'),
    ("POST", "/pot/create", "name=a&name=b", 400, '"name" is given twice\n'),
    ("POST", "/pot/create", "name=a&min=18446744073709551616", 400,
     f'min "18446744073709551616" {MIN}'),
    ("POST", "/pot/create", "name=fixed&min=99", 409, 'pot "fixed" exists\n'),
    ("POST", "/pot/raise", "name=fixed", 400, f'min "" {MIN}'),
    ("POST", "/pot/raise", "name=none&min=9", 404, 'there is no pot "none"\n'),
    ("POST", "/id/fixed?count=0", None, 400, f'count "0" {COUNT}'),
    ("POST", "/id/fixed", "count=10001", 400, f'count "10001" {COUNT}'),
    ("POST", "/id/fixed?count=2", "count=2", 400, '"count" is given twice\n'),
    ("POST", "/id/fixed?range=0", None, 400, f'range "0" {RANGE}'),
    ("POST", "/id/fixed", "range=4294967297", 400, f'range "4294967297" {RANGE}'),
    ("POST", "/id/none", None, 404, 'there is no pot "none"\n'),
    ("GET", "/id/none", None, 404, 'there is no pot "none"\n'),
    ("POST", "/id", None, 404, 'there is nothing at "/id"\n'),
    ("POST", "/id/fixed/", None, 404, 'there is nothing at "/id/fixed/"\n'),
    ("POST", "//id/fixed", None, 404, 'there is nothing at "//id/fixed"\n'),
    ("POST", "/id/../id/fixed", None, 404, 'there is nothing at "/id/../id/fixed"\n'),
    ("POST", "/pot", None, 405, "POST is not allowed here, but GET, HEAD\n"),
    ("POST", "/pot/fixed", None, 405, "POST is not allowed here, but GET, HEAD\n"),
    ("DELETE", "/id/fixed", None, 405, "DELETE is not allowed here, but GET, HEAD, POST\n"),
    ("post", "/pot/raise", None, 405, "post is not allowed here, but GET, HEAD, POST\n"),
]

UNKNOWN_FIELDS = [
    ("POST", "/pot/create", "name=a&mn=5", 'unknown field "mn": here are name, min\n'),
    ("POST", "/id/fixed", "counts=5", 'unknown field "counts": here are count, range\n'),
    ("POST", "/id/fixed?counts", None, 'unknown field "counts": here are count, range\n'),
    ("POST", "/id/fixed?min=5", "range=2", 'unknown field "min": here are count, range\n'),
    ("POST", "/id/fixed?%1b=", None, 'unknown field "\\x1b": here are count, range\n'),
    ("GET", "/id/fixed?count=5", None, 'field "count" is for POST\n'),
    ("GET", "/pot/fixed?min=5", None, 'unknown field "min": there are none here\n'),
    ("GET", "/pot?name=fixed", None, 'unknown field "name": there are none here\n'),
    ("GET", "/healthz?verbose=", None, 'unknown field "verbose": there are none here\n'),
]

NO_NUMBERS = [      # as it is sent, as the answer shows it
    ("", '""'),
    ("-1", '"-1"'),
    ("%2B5", '"+5"'),
    ("1_0", '"1_0"'),
    ("%201", '" 1"'),
    ("1%0A", '"1\\n"'),
    ("%D9%A3", '"\\u0663"'),
    ("%EF%BC%91", '"\\uff11"'),
    ("9" * 5000, '"' + "9" * 100 + '..."'),
]

NO_NAMES = [        # as it is sent, as the answer shows it
    ("a%20b", "a b"),
    ("%C3%A9", "\\xe9"),
    ("a%00", "a\\x00"),
    ("a%0A", "a\\n"),
    ("%60%3B--", "`;--"),
    ("x" * 61, "x" * 61),
]


class ApiContract:
    """What every store does; a subclass names the engine, "" is SQLite. Pot `fixed` stays at 41."""
    engine = ""


    @pytest.fixture(scope="class")
    @classmethod
    def api(cls, request, tmp_path_factory):
        settings = {}
        if cls.engine:
            database = request.getfixturevalue("database")
            database.sql(f"CREATE DATABASE api_{cls.engine}")
            dsn = database.dsn(f"api_{cls.engine}")
            settings = {"ConnectString": dsn, "Engine": cls.engine}
        server = Idpot(tmp_path_factory.mktemp("api"), **settings)
        server.create("fixed", 41)
        yield server
        server.stop(signal.SIGKILL)

    def test_what_is_answered(self, api):
        for method, target, form, status, text in API_ANSWERS:
            got, answer, headers = api.request(method, target, form)
            assert (got, answer) == (status, text), (method, target, form)
            assert headers["Cache-Control"] == "no-store"
            kind = None if status == 204 else "text/plain; charset=utf-8"
            assert headers["Content-Type"] == kind

    def test_names_that_are_allowed_and_the_list(self, api):
        names = ["0", "-", "_", "a-B_9", "A-b_9", "create", "raise", "select", "X" * 60]
        for number, name in enumerate(names):
            api.create(name, 18446744073709551614 - number)
            assert api.answer("GET", f"/pot/{name}") == (204, "")
        for number, name in enumerate(names):
            assert api.next(name) == 18446744073709551615 - number
        text = api.answer("GET", "/pot")[1]
        lines = text.splitlines(keepends=True)
        assert lines == sorted(lines)
        assert "fixed\t41\n" in lines
        assert "0\t18446744073709551615\n" in lines
        assert "A-b_9\t18446744073709551611\n" in lines

    @pytest.mark.parametrize("method, target, form, status, text", API_REFUSALS)
    def test_what_is_refused_changes_nothing(self, api, method, target, form, status, text):
        assert refusal(api, method, target, form) == (status, text)

    @pytest.mark.parametrize("method, target, form, text", UNKNOWN_FIELDS)
    def test_a_field_that_is_not_known_is_refused(self, api, method, target, form, text):
        assert refusal(api, method, target, form) == (400, text)

    def test_count_and_range_exclude_each_other(self, api):
        text = "count and range exclude each other\n"
        assert refusal(api, "POST", "/id/fixed?count=2&range=2") == (400, text)
        assert refusal(api, "POST", "/id/fixed?range=2", "count=2") == (400, text)

    @pytest.mark.parametrize("sent, shown", NO_NUMBERS)
    def test_numbers_are_plain_decimal_digits(self, api, sent, shown):
        for target, form, reason in [
                ("/pot/create", f"name=a&min={sent}", f"min {shown} {MIN}"),
                ("/pot/raise", f"name=a&min={sent}", f"min {shown} {MIN}"),
                ("/id/fixed", f"count={sent}", f"count {shown} {COUNT}"),
                (f"/id/fixed?count={sent}", None, f"count {shown} {COUNT}"),
                ("/id/fixed", f"range={sent}", f"range {shown} {RANGE}"),
                (f"/id/fixed?range={sent}", None, f"range {shown} {RANGE}")]:
            assert refusal(api, "POST", target, form) == (400, reason)

    @pytest.mark.parametrize("sent, shown", NO_NAMES)
    def test_names_are_letters_digits_minus_and_underline(self, api, sent, shown):
        no_name = (400, f'name "{shown}" is not 1 to 60 characters of A-Z a-z 0-9 _ -\n')
        assert refusal(api, "POST", "/pot/create", f"name={sent}") == no_name
        assert refusal(api, "POST", "/pot/raise", f"min=1&name={sent}") == no_name
        for method, path in [("GET", "/id/"), ("POST", "/id/"), ("GET", "/pot/")]:
            assert refusal(api, method, path + sent)[0] == 404

    def test_every_id_of_the_unsigned_range_is_given_once(self, api):
        exhausted = 'pot "whole" is exhausted: fewer than'
        api.create("whole", 9223372036854775799)
        for target, form, status, text in [
                ("/id/whole?range=7", None, 200, "9223372036854775800\t9223372036854775806\n"),
                ("/id/whole", None, 200, "9223372036854775807"),
                ("/id/whole", None, 200, "9223372036854775808"),
                ("/pot/raise", "name=whole&min=5", 200, "9223372036854775808"),
                ("/pot/raise", "name=whole&min=18446744069414584314", 200, "18446744069414584314"),
                ("/id/whole", "range=4294967296", 200,
                 "18446744069414584315\t18446744073709551610\n"),
                ("/pot/raise", "name=whole&min=18446744073709551612", 200, "18446744073709551612"),
                ("/id/whole", None, 200, "18446744073709551613"),
                ("/id/whole?count=3", None, 409, f"{exhausted} 3 IDs are left\n"),
                ("/id/whole?range=3", None, 409, f"{exhausted} 3 IDs are left\n"),
                ("/id/whole?count=2", None, 200, "18446744073709551614\n18446744073709551615\n"),
                ("/id/whole", None, 409, f"{exhausted} 1 IDs are left\n"),
                ("/pot/raise", "name=whole&min=18446744073709551615", 200, "18446744073709551615")]:
            assert api.answer("POST", target, form) == (status, text)
        assert api.answer("GET", "/id/whole") == (200, "18446744073709551615")
        for target, text in [
                ("count=3", "9223372036854775806\n9223372036854775807\n9223372036854775808\n"),
                ("range=3", "9223372036854775806\t9223372036854775808\n")]:
            api.create(f"{target[:5]}-over-the-middle", 9223372036854775805)
            answer = api.answer("POST", f"/id/{target[:5]}-over-the-middle?{target}")
            assert answer == (200, text)

    def test_ids_have_no_gap_and_a_later_request_gets_a_greater_one(self, api):
        api.create("order")
        history = []

        def client(query):
            for _ in range(20):
                begin = time.monotonic()
                status, text = api.answer("POST", f"/id/order{query}")
                ids = [int(word) for word in text.split()]
                assert status == 200
                history.append((begin, time.monotonic(), ids[0], ids[-1]))

        queries = ("", "", "", "?count=2", "?count=3", "", "?count=7", "?range=20")
        at_once(*[functools.partial(client, query) for query in queries])
        given = []
        for _, end, first, last in history:
            given += range(first, last + 1)
            for begin, _, later, _ in history:
                assert begin <= end or later > last
        assert sorted(given) == list(range(1, 721))


class TestApiSqlite(ApiContract):
    def test_pots_outlive_the_process_all_in_the_one_file(self, run):
        server = run()
        assert server.answer("GET", "/pot") == (200, "")
        server.create("kept", 2**63)
        assert server.next("kept") == 2**63 + 1
        assert server.stop() == 0
        assert sorted(os.listdir(server.folder)) == ["idpot.cfg", "idpot.db", "stderr"]
        server.start()
        assert server.next("kept") == 2**63 + 2


class TestApiMyisam(ApiContract):
    engine = "MyISAM"
    columns = "`id` bigint unsigned NOT NULL\n"

    @pytest.fixture
    def sql(self, api, database):
        """Runs a statement in the database of `api`."""
        return functools.partial(database.sql, database=f"api_{self.engine}")

    def table(self, sql, pot, column, *values):
        """Makes the table of a pot by hand: the column with its type, and a row for each value."""
        sql(f"CREATE TABLE pot_{pot} ({column}) ENGINE={self.engine}")
        for value in values:
            sql(f"INSERT INTO pot_{pot} VALUES ({value})")

    def warnings(self, api, pot):
        """What was logged about the pot, but for access lines."""
        return re.findall(rf" idpot\[\d+\] (?:WARNING|ERROR) (.*\b{pot}\b.*)", logged(api))

    def test_a_table_made_by_go_idpot_is_used_as_it_is_and_no_other(self, api, sql):
        self.table(sql, "from_go", "id BIGINT UNSIGNED NOT NULL", 1000)
        sql("CREATE TABLE potXother (id INT)")
        before = sql("SHOW CREATE TABLE pot_from_go")
        assert api.answer("GET", "/pot/from_go") == (204, "")
        assert api.answer("GET", "/id/from_go") == (200, "1000")
        assert api.next("from_go") == 1001
        assert api.next("from_go", 2) == [1002, 1003]
        create = api.answer("POST", "/pot/create", "name=from_go&min=5")
        assert create == (409, 'pot "from_go" exists\n')
        assert sql("SHOW CREATE TABLE pot_from_go") == before
        assert sql("SELECT * FROM pot_from_go") == [(1003,)]
        _, pots = api.answer("GET", "/pot")
        assert "from_go\t1003\n" in pots
        assert "other" not in pots

    def test_twelve_creates_of_one_name_at_two_servers_make_one_row(self, api, sql, run):
        other = run(**api.settings)
        for pot in ("row0", "row1", "row2", "row3"):
            form = f"name={pot}&min=7"
            here = functools.partial(api.answer, "POST", "/pot/create", form)
            there = functools.partial(other.answer, "POST", "/pot/create", form)
            answers = at_once(*[here, there] * 6)
            assert answers.count((201, "Created new pot")) == 1
            assert answers.count((409, f'pot "{pot}" exists\n')) == 11
            assert sql(f"SELECT id FROM pot_{pot}") == [(7,)]

    def test_the_table_of_a_new_pot(self, api, sql):
        api.create("new")
        [(_, table)] = sql("SHOW CREATE TABLE pot_new")
        table = re.sub(r"int\(\d+\)", "int", table)     # a width, which MySQL has no more
        table = table.replace("DEFAULT '1'", "DEFAULT 1")
        begin = f"CREATE TABLE `pot_new` (\n  {self.columns}) ENGINE={self.engine} "
        assert table.startswith(begin)

    def assert_no_id(self, api, pot, text):
        """Whatever is asked of the pot is answered with 503 and the text; it is logged once."""
        for method, target, form in [
                ("POST", f"/id/{pot}", None),
                ("POST", f"/id/{pot}", "count=2"),
                ("POST", f"/id/{pot}", "range=2"),
                ("GET", f"/id/{pot}", None),
                ("POST", "/pot/raise", f"name={pot}&min=9"),
                ("POST", f"/id/{pot}", None)]:
            assert api.answer(method, target, form) == (503, f"{text}\n")
        _, pots = api.answer("GET", "/pot")
        assert f"{pot}\t-\n" in pots
        assert self.warnings(api, pot) == [text]
        assert "Traceback" not in api.errors()

    @pytest.mark.parametrize("pot, values", [
        ("same", [5, 5]), ("top", [5, 18446744073709551615])])
    def test_a_table_with_several_rows_never_gives_an_id(self, api, sql, pot, values):
        self.table(sql, pot, "id BIGINT UNSIGNED NOT NULL", *values)
        self.assert_no_id(api, pot, f'the table of pot "{pot}" has several rows, not one')
        create = api.answer("POST", "/pot/create", f"name={pot}&min=8")
        assert create == (409, f'pot "{pot}" exists\n')
        left = sql(f"SELECT id FROM pot_{pot} ORDER BY id")
        assert left == [(value,) for value in values]

    def test_a_table_without_its_row_gives_no_id_until_a_create_mends_it(self, api, sql):
        self.table(sql, "empty", "id BIGINT UNSIGNED NOT NULL")
        self.assert_no_id(api, "empty", 'the table of pot "empty" has no row, not one')
        api.create("empty", 8)
        assert api.next("empty") == 9
        assert sql("SELECT id FROM pot_empty") == [(9,)]

    @pytest.mark.parametrize("pot, column, value, says", [
        ("double", "id DOUBLE NOT NULL", 9007199254740992, "holds no whole number from 0 up"),
        ("decimals", "id DECIMAL(20,2) NOT NULL", 5.5, "holds no whole number from 0 up"),
        ("varchar", "id VARCHAR(20) NOT NULL", "'5'", "holds no whole number from 0 up"),
        ("null", "id BIGINT UNSIGNED", "NULL", "holds no whole number from 0 up"),
        ("negative", "id BIGINT NOT NULL", -5, "holds no whole number from 0 up"),
        ("columnless", "number BIGINT UNSIGNED NOT NULL", 5, "has no column id")])
    def test_a_row_that_holds_no_counter_never_gives_an_id(
            self, api, sql, pot, column, value, says):
        self.table(sql, pot, column, value)
        before = sql(f"SELECT * FROM pot_{pot}")
        self.assert_no_id(api, pot, f'the table of pot "{pot}" {says}')
        assert sql(f"SELECT * FROM pot_{pot}") == before

    def test_a_table_that_was_mended_by_hand_gives_ids(self, api, sql):
        self.table(sql, "mended", "id BIGINT UNSIGNED", "NULL")
        assert api.answer("POST", "/id/mended")[0] == 503
        sql("UPDATE pot_mended SET id = 5")
        assert api.next("mended") == 6

    @pytest.mark.parametrize("pot, column, last", [
        ("byte", "id TINYINT UNSIGNED NOT NULL", 255),
        ("int", "id INT UNSIGNED NOT NULL", 4294967295),
        ("signed", "id BIGINT NOT NULL", 9223372036854775807),
        ("checked", "id BIGINT UNSIGNED NOT NULL, CHECK (id <= 9007199254740991)",
         9007199254740991)])
    def test_a_ceiling_of_the_table_exhausts_it_and_burns_nothing(
            self, api, sql, pot, column, last):
        self.table(sql, pot, column, last - 4)
        exhausted = (409, f'pot "{pot}" is exhausted: its table holds no greater number\n')
        assert api.next(pot, 2) == [last - 3, last - 2]
        assert api.answer("POST", f"/id/{pot}", "count=3") == exhausted
        assert api.answer("POST", f"/id/{pot}", "range=3") == exhausted
        assert api.answer("POST", "/pot/raise", f"name={pot}&min={last + 1}") == exhausted
        assert api.answer("GET", f"/id/{pot}") == (200, f"{last - 2}")
        assert api.next(pot, 2) == [last - 1, last]
        assert api.answer("POST", f"/id/{pot}") == exhausted
        assert sql(f"SELECT id FROM pot_{pot}") == [(last,)]

    def test_session_variables_in_the_dsn_cannot_weaken_the_promise(self, api, sql, run, database):
        parameters = "?sql_mode=''&sql_safe_updates=1&timeout=2s&charset=latin1&autocommit=0"
        dsn = database.dsn(f"api_{self.engine}", parameters)
        sql("SET GLOBAL sql_mode = ''")
        server = run(ConnectString=dsn, Engine=self.engine)
        assert server.errors().count(
            " WARNING ConnectString: these parameters are ignored: "
            "sql_mode, sql_safe_updates, timeout, charset, autocommit\n") == 1
        server.create("weak", 5)
        assert server.next("weak", 2) == [6, 7]
        assert sql("SELECT id FROM pot_weak") == [(7,)]
        self.table(sql, "clipped", "id INT UNSIGNED NOT NULL", "4294967294")
        assert server.next("clipped") == 4294967295
        sql("SET GLOBAL sql_mode = DEFAULT")
        assert server.request("POST", "/id/clipped")[0] == 409
        assert sql("SELECT id FROM pot_clipped") == [(4294967295,)]


class TestApiInnodb(TestApiMyisam):
    engine = "InnoDB"
    columns = ("`id` bigint unsigned NOT NULL,\n  `one` tinyint NOT NULL DEFAULT 1,\n"
               "  PRIMARY KEY (`one`)\n")
    # For these the engine is not asked.
    test_what_is_refused_changes_nothing = None
    test_a_field_that_is_not_known_is_refused = None
    test_numbers_are_plain_decimal_digits = None
    test_names_are_letters_digits_minus_and_underline = None


# ---------------------------------------------------------------- requests that share a statement

class TestGroups:
    @pytest.fixture(autouse=True)
    def fresh(self, database):
        database.sql("DROP DATABASE IF EXISTS groups_test")
        database.sql("CREATE DATABASE groups_test")

    @pytest.fixture
    def server(self, run, database):
        return run(Timeout=60, ConnectString=database.dsn("groups_test"))

    @contextlib.contextmanager
    def held(self, database, pot):
        """Holds the pot by a table lock; yields a function that returns when a statement waits."""
        waiting = ("SELECT id FROM information_schema.processlist "
                   f"WHERE info LIKE '%pot\\_{pot}%' AND state LIKE 'Wait%'")
        with contextlib.closing(database.connect(database="groups_test")) as connection:
            connection.cursor().execute(f"LOCK TABLES `pot_{pot}` WRITE")
            yield lambda: wait_until(lambda: database.sql(waiting))

    def status(self, database):
        """The server's counters, {name: number}."""
        rows = database.sql("SHOW GLOBAL STATUS WHERE Variable_name IN "
                            "('Com_update', 'Com_select', 'Connections')")
        return {name: int(value) for name, value in rows}

    def test_a_lone_request_costs_one_statement(self, server, database):
        server.create("lone")
        server.next("lone")
        before = self.status(database)
        assert [server.next("lone") for _ in range(20)] == list(range(2, 22))
        after = self.status(database)
        assert after["Com_update"] == before["Com_update"] + 20
        assert after["Com_select"] == before["Com_select"]
        assert after["Connections"] == before["Connections"] + 1    # the one that asked for this

    def test_forty_requests_that_wait_together_share_a_statement(self, server, database):
        server.create("group")
        with contextlib.ExitStack() as stack:
            with self.held(database, "group") as wait_for_statement:
                clients = stack.enter_context(connections(server, 1, CLOSING % b"group"))
                wait_for_statement()
                before = self.status(database)
                clients += stack.enter_context(connections(server, 39, CLOSING % b"group"))
                wait_until(lambda: in_flight(server) == 40)
            ids = [issued(until_closed(client))[0] for client in clients]
            after = self.status(database)
        assert ids[0] == 1
        assert sorted(ids) == list(range(1, 41))
        assert after["Com_update"] - before["Com_update"] <= 2

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_stop_answers_the_request_that_waits(self, server, database, number):
        server.create("stop")
        with ThreadPoolExecutor(1) as pool, self.held(database, "stop") as wait_for_statement:
            waiting = pool.submit(server.answer, "POST", "/id/stop")
            wait_for_statement()
            server.process.send_signal(number)
            wait_until(lambda: refused(server.port))
            assert not waiting.done()
        assert waiting.result() == (200, "1")
        assert server.process.wait(10) == 0
        assert '"POST /id/stop HTTP/1.1" 200 1 ' in server.errors()

    def test_a_stop_while_the_database_hangs_answers_the_backlog_with_503(self, run, database):
        server = run(Timeout=2, ConnectString=database.dsn("groups_test"))
        server.create("hung")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.held(database, "hung"))
            server.process.send_signal(signal.SIGSTOP)
            clients = stack.enter_context(
                connections(server, 20, b"POST /id/hung HTTP/1.1\r\nHost: x\r\n\r\n"))
            passes(0.3)     # until idpot looks for signals before it has accepted all
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGCONT)
            assert [client.recv(9999)[:13] for client in clients] == [b"HTTP/1.1 503 "] * 20
            assert server.process.wait(5) == 0


# ---------------------------------------------------------------- a start without a database

class TestStartWithoutADatabase:
    @pytest.fixture(autouse=True)
    def fresh(self, database):
        database.sql("DROP DATABASE IF EXISTS start_test")
        database.sql("CREATE DATABASE start_test")
        for user, limit in [("starter", 0), ("single", 1)]:
            database.sql(f"CREATE USER IF NOT EXISTS {user} IDENTIFIED BY 'p'")
            database.sql(f"ALTER USER {user} WITH MAX_USER_CONNECTIONS {limit}")
            database.sql(f"GRANT ALL ON start_test.* TO {user}")

    def start(self, run, database, credentials="root", timeout=1):
        return run(Timeout=timeout, ConnectString=database.dsn("start_test", "", credentials))

    def assert_one_trouble(self, server, place=""):
        """One warning, but for that about MyISAM."""
        [trouble] = re.findall(r"WARNING (?!Engine MyISAM)(.*)", logged(server))
        assert place in trouble
        assert "Traceback" not in server.errors()

    def test_idpot_is_there_before_its_database_and_serves_when_it_comes(self, run, database):
        database.signal(signal.SIGTERM)
        with ThreadPoolExecutor(1) as pool:
            try:
                server = self.start(run, database)
                patient = self.start(run, database, timeout=60)
                waiting = pool.submit(patient.answer, "POST", "/pot/create", "name=early")
                status, text, headers = server.request("POST", "/pot/create", "name=late")
                assert (status, headers["Retry-After"]) == (503, "1")
                reason = "the database cannot serve this now (error 2003)"
                assert text == f"{reason}, tried for 1 seconds\n"
                status, text = server.answer("GET", "/healthz")
                assert status == 503
                assert text.startswith(reason)
            finally:
                database.start()
            assert waiting.result() == (201, "Created new pot")
        wait_until(lambda: healthy(server))
        server.create("late", 7)
        assert server.next("late") == 8
        self.assert_one_trouble(server, f"127.0.0.1:{database.port}")

    @pytest.mark.parametrize("user, trouble, why", [
        ("starter", read_only, ": it is read-only (error 1290)"),
        ("single", one_connection_in_use, " (error 1226)")])
    def test_a_database_that_refuses_at_first(self, run, database, user, trouble, why):
        with trouble(database):
            server = self.start(run, database, f"{user}:p")
            answer = server.answer("POST", "/pot/create", "name=patient")
            status, health = server.answer("GET", "/healthz")
        reason = f"the database cannot serve this now{why}"
        assert answer == (503, f"{reason}, tried for 1 seconds\n")
        assert (status, health.startswith(reason)) == (503, True)
        wait_until(lambda: healthy(server))
        server.create("patient")
        assert server.next("patient") == 1
        self.assert_one_trouble(server)


# ---------------------------------------------------------------- settings and the command line

@pytest.fixture(scope="module")
def empty(database):
    """The database's server, with an empty database `empty_test`."""
    database.sql("CREATE DATABASE empty_test")
    return database


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


SECONDS = "is not a number of seconds above 0, at most 86400"
NEITHER = "what stands behind the last @ is neither tcp(...) nor unix(...)"
UNCLOSED = "a double quote is not closed, or a backslash stands outside of quotes"
NO_DATABASE = "there is no database name after a last /"
REFUSED_SETTINGS = [    # the text of f.cfg, what is said
    ("[Server]\nListn = 127.0.0.1:0", 'f.cfg: unknown name "listn" in [Server]'),
    ("# x\n[server]\n\nTIMEOUT = 1\nHostname=x", 'f.cfg: unknown name "hostname" in [Server]'),
    ("[Postgres]\nHost = x", "f.cfg: unknown section [Postgres]"),
    ("[Mysql]\nPort = 1\n[Sqlite]\nFile = x",
     "f.cfg: [Mysql] and [Sqlite] are both given: keep one"),
    ("[Mysql]\nPassword: secret", "f.cfg:2: this is neither [section] nor name = value"),
    ("Listen = x", "f.cfg:1: this is neither [section] nor name = value"),
    ("[Server]\nTimeout = 1\n\ntimeOUT = 2", "f.cfg:4: this is there twice"),
    ("[Server]\nTimeout = 1\n[SERVER]\nListen = :80", "f.cfg:3: this is there twice"),
    ("[Mysql]\nEngine = a b", 'f.cfg: [Mysql] Engine: "a b" is not the name of a storage engine'),
    ("[Server]\nTimeout = 0", f'f.cfg: [Server] Timeout: "0" {SECONDS}'),
    ("[Server]\nIdleTimeout = nan", f'f.cfg: [Server] IdleTimeout: "nan" {SECONDS}'),
    ("[Server]\nListen = localhost", 'f.cfg: [Server] Listen: "localhost" is not host:port'),
    ('[Server]\nToken = "secret', f"f.cfg: [Server] Token: {UNCLOSED}"),
    ("[Server]\nLogFile = a\\b", f"f.cfg: [Server] LogFile: {UNCLOSED}"),
    ("[Server]\nLogFile = a\\\n", f"f.cfg: [Server] LogFile: {UNCLOSED}"),
]
HINTED_SETTINGS = [     # the text of f.cfg, words of what is said
    ("[Server]\nToken = #abc", "[Server] Token: "),
    ("[Server]\nToken = ;abc", "[Server] Token: "),
    ('[Server]\nToken = t\nAdminToken = ""', "[Server] AdminToken: "),
    ("[Server]\nToken =", "[Server] Token: it is written, but empty"),
    ('[Server]\nToken = "a "', "[Server] Token: it begins or ends with a space"),
    ("[Mysql]\nConnectString: u:secret@/d?tls=true", "f.cfg: unknown name (not shown) in [Mysql]"),
    ("[Mysql]\nPassword: secret=", "f.cfg: unknown name (not shown) in [Mysql]"),
    ("[Mysql]\nConnectString = u:p;secret@/d", "double quotes"),
    ("[Mysql]\nConnectString = u:p#secret@/d", "double quotes"),
    ("[Mysql]\nConnectString = u@tcp(a,b,)/d", "[Mysql] ConnectString: "),
    ("[Mysql]\nConnectString = u:p@secret/d", "[Mysql] ConnectString: "),
    ("[Mysql]\nConnectString = u:p@secret:3306/d", "[Mysql] ConnectString: "),
    *[(f'[Server]\nToken = "a\\{letter}c"', "[Server] Token: a backslash stands before none of")
      for letter in "qbfr/'x"],
]
REFUSED_DSNS = [        # as ConnectString has it, what is said
    ("u:secret@tcp(h:1)", NO_DATABASE),
    ("u:secret@tcp(h:x)/d", '"h:x" is not host:port'),
    ("u:secret@tcp(h:65536)/d", '"h:65536" is not host:port'),
    ("u:secret@tcp([::1)/d", '"[::1" is not host:port'),
    ("u:secret/d", "there is no @ before an address, such as tcp(host:port)"),
    ("u:secret@tcp(h/d", NEITHER),
    ("u:secret@udp(h)/d", NEITHER),
    ("u:pass@secret/d", NEITHER),
    ("u:secret@/d?tls=maybe", '"maybe" is not true, false, skip-verify or preferred'),
]
DEFAULT_ADDRESS = {"127.0.0.1:3306": {"host": "127.0.0.1", "port": 3306}}


class TestSettings:
    @pytest.fixture(scope="class")
    @classmethod
    def tls_servers(cls, database):
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

    @pytest.fixture(autouse=True)
    def settings_in_a_folder(self, folder):
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        yield
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)     # a start blocks some

    def load(self, text):
        """The settings, and what the DSN is, of a file with that text."""
        Path("f.cfg").write_text(text, newline="")
        settings = vars(idpot.load_settings("f.cfg"))
        return {**settings, **settings["dsn"]}

    @pytest.mark.parametrize("config, expected", [
        ("[Server]\nLogFile = /log/access.%Y%m%d.log", {"logfile": "/log/access.%Y%m%d.log"}),
        ("[SERVER]\r\nlogFILE=a%\r\nToken = a=b:c", {"logfile": "a%", "token": "a=b:c"}),
        ("\ufeff[Server] ; comment\n  LogFile   =  a b  # comment", {"logfile": "a b"}),
        ('[Server]\n; LogFile = x\n# LogFile = y\nLogFile = "a;b#c" ; d', {"logfile": "a;b#c"}),
        ('[Server]\nLogFile = ""\nToken = "q\\"b\\\\t\\t\\n="', {
            "logfile": "", "token": 'q"b\\t\t\n='}),
        ("[Server]\nListen = [::1]:80\nTimeout = 0.5", {"listen": ("::1", 80), "timeout": 0.5}),
        ("[Server]\nListen = :80\nMaxConnections =", {"listen": ("", 80), "maxconnections": 1024}),
        ("[Mysql]\nConnections = 3", {"connections": 3}),
        ("[Mysql]", {
            "user": "root", "password": "", "addresses": DEFAULT_ADDRESS, "database": "idpot",
            "connections": 8}),
        ('[Mysql]\nUsername = u\nPassword = "p#"\nHostname = h\nPort = 1\nDbname = d', {
            "user": "u", "password": "p#", "addresses": {"h:1": {"host": "h", "port": 1}},
            "database": "d"}),
        ("[Mysql]\nConnectString = u:p%40@/d", {
            "user": "u", "password": "p%40", "database": "d"})])
    def test_how_they_are_read(self, config, expected):
        settings = self.load(config)
        assert {name: settings[name] for name in expected} == expected

    @pytest.mark.parametrize("other", ["Mysql", "Sqlite"])      # both at once are refused
    def test_the_example_file_has_every_name_once_and_says_the_defaults(self, other):
        example = Path(HERE, "idpot.cfg.example").read_text()
        names = [name for section in idpot.SETTINGS.values() for name in section]
        assert sorted(re.findall(r"(?m)^;(\w+) =", example)) == sorted(names)
        assert "\n;LogFile =" in example       # README.rst makes it count by sed
        whole = re.sub(r"(?m)^;(\[|(?!\w*Token )\w+ =)", r"\1", example)   # no token is empty
        without_other = re.sub(rf"(?ms)^\[{other}\].*?(?=^\[|\Z)", "", whole)
        assert without_other != whole != example
        defaults = self.load("")
        for text in (example, without_other):
            loaded = self.load(text)
            for name in names:
                assert loaded[name.lower()] == defaults[name.lower()]

    @pytest.mark.parametrize("text, expected", [
        ("/db", {
            "user": "", "password": "", "addresses": DEFAULT_ADDRESS, "database": "db",
            "ignored": ""}),
        ("u:a@b:c/d(e)?f&g@tcp(h:1)/d", {
            "user": "u", "password": "a@b:c/d(e)?f&g", "database": "d",
            "addresses": {"h:1": {"host": "h", "port": 1}}}),
        ("u@tcp/db", {"user": "u", "password": "", "addresses": DEFAULT_ADDRESS}),
        ("u:p@tcp(db1,db2:3307,[fe80::1])/db", {
            "addresses": {
                "db1:3306": {"host": "db1", "port": 3306},
                "db2:3307": {"host": "db2", "port": 3307},
                "fe80::1:3306": {"host": "fe80::1", "port": 3306}}}),
        ("u:p@tcp([::1]:3307)/d%2Fb%25", {
            "addresses": {"::1:3307": {"host": "::1", "port": 3307}}, "database": "d/b%"}),
        ("u:p@unix(/run/my(sql)/s.sock)/db", {
            "addresses": {"/run/my(sql)/s.sock": {"unix_socket": "/run/my(sql)/s.sock"}}}),
        ("/db?tls=1", {"tls": "true", "ignored": ""}),
        ("/db?tls=skip-verify&x=%27a+b%27", {"tls": "skip-verify", "ignored": "x"}),
        ("/db?timeout=1m&readTimeout=5ms&writeTimeout=no&charset=utf8&collation=x_bin", {
            "ignored": "timeout, readTimeout, writeTimeout, charset, collation"}),
        ("/db?autocommit=0&a`b=1&loc=Asia%2FTokyo&tls=0", {
            "tls": "false", "ignored": "autocommit, a`b, loc"})])
    def test_what_a_dsn_says(self, text, expected):
        settings = self.load(f"[Mysql]\nConnectString = {text}\n")
        assert {name: settings[name] for name in expected} == expected

    def assert_refused(self, capsys, config, message):
        Path("f.cfg").write_text(config)
        code = idpot.main(["--config=f.cfg", "--listen=192.0.2.1:8"])   # no address of this host
        assert (code, *capsys.readouterr()) == (78, "", f"idpot: {message}\n")

    @pytest.mark.parametrize("config, message", REFUSED_SETTINGS)
    def test_what_is_refused(self, capsys, config, message):
        self.assert_refused(capsys, config, message)

    @pytest.mark.parametrize("dsn, message", REFUSED_DSNS)
    def test_a_dsn_that_is_refused(self, capsys, dsn, message):
        config = f"[Mysql]\nConnectString = {dsn}"
        self.assert_refused(capsys, config, f"f.cfg: [Mysql] ConnectString: {message}")

    @pytest.mark.parametrize("config, words", HINTED_SETTINGS)
    def test_what_is_refused_with_a_hint(self, capsys, config, words):
        Path("f.cfg").write_text(config)
        code = idpot.main(["--config=f.cfg", "--listen=192.0.2.1:8"])
        errors = capsys.readouterr().err
        assert (code, errors.count("\n"), words in errors) == (78, 1, True)
        assert "secret" not in errors

    def test_no_file(self, capsys):
        assert idpot.main(["--config=no.cfg"]) == 78
        assert idpot.main(["--config=no.cfg", "--check"]) == 1
        message = "idpot: no.cfg: No such file or directory\n"
        assert capsys.readouterr() == ("", message * 2)
        assert idpot.main(["--config="]) == 78      # an empty variable of a shell's, say
        assert capsys.readouterr() == ("", 'idpot: "": No such file or directory\n')

    def test_an_argument_that_is_no_address(self, capsys):
        with pytest.raises(SystemExit, match="^2$"):
            idpot.main(["--listen=x"])
        message = 'idpot: error: argument --listen: "x" is not host:port\n'
        assert capsys.readouterr().err.endswith(message)

    def stopped(self, *arguments, **settings):
        """(exit code, stderr) of an idpot that does not start; what is no secret there is told."""
        Path("f.cfg").write_text(config_text(**settings))
        command = [sys.executable, f"{HERE}/idpot.py", "--config=f.cfg", "--listen=127.0.0.1:0"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=20)
        assert not (done.stdout and done.returncode) and "secret" not in done.stderr
        return done.returncode, done.stderr

    @pytest.mark.parametrize("host, why", [
        ("127.0.0.1", "Address already in use"), ("192.0.2.1", "Cannot assign requested address")])
    def test_an_address_that_is_taken_or_of_another_host(self, host, why):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"{host}:{taken.getsockname()[1]}"
            code, errors = self.stopped(f"--listen={address}")
        assert code == 1
        assert errors.startswith(f"idpot: cannot listen on {address}: {why}")

    @pytest.mark.parametrize("settings, message", [
        ({"LogFile": "no/dir/log"}, 'LogFile "no/dir/log": No such file or directory'),
        ({"LogFile": "fifo"}, 'LogFile "fifo": No such device or address'),
        ({"LogFile": "x", "LogLinkName": "f.cfg"},
         'LogFile "f.cfg": LogLinkName is there and is not a symlink'),
        ({"LogFile": "x", "LogLinkName": "no/dir/link"}, 'LogLinkName "no/dir/link'),
        ({"File": "no/dir/db"}, 'SQLite file "no/dir/db": unable to open database file'),
        ({"File": "f.cfg"}, 'SQLite file "f.cfg": file is not a database')])
    def test_files_that_stop_the_start(self, settings, message):
        os.mkfifo("fifo")       # nobody reads it
        code, errors = self.stopped(**settings)
        assert (code, errors.count("\n")) == (1, 1)
        assert errors.startswith(f"idpot: {message}")

    @pytest.mark.parametrize("arguments", [[], ["--check"]])
    @pytest.mark.parametrize("user, name, engine, message", [
        ("root:secret", "empty_test", "InnoDB", "MySQL {address}: .*Access denied for user.*"),
        ("root", "no", "InnoDB", "MySQL {address}: .*Unknown database 'no'.*"),
        ("root", "empty_test", "No",
         'MySQL {address}: Engine: the server has no storage engine "No"')])
    def test_a_database_that_stops_the_start(self, empty, arguments, user, name, engine, message):
        dsn = empty.dsn(name, credentials=user)
        code, errors = self.stopped(*arguments, ConnectString=dsn, Engine=engine)
        assert code == 1
        line = message.format(address=f"127.0.0.1:{empty.port}")
        assert re.fullmatch(f"idpot: {line}\n", errors)

    @pytest.mark.parametrize("tls, server, why", [
        ("true", "trusted", ""),
        ("true", "foreign", "2026"),
        ("true", "without", "2026"),
        ("skip-verify", "foreign", ""),
        ("skip-verify", "without", "TLS"),
        ("preferred", "without", ""),
        ("false", "foreign", "")])
    def test_what_tls_verifies(self, tls_servers, monkeypatch, tls, server, why):
        monkeypatch.setenv("SSL_CERT_FILE", tls_servers["authority"])
        dsn = tls_servers[server].dsn(parameters=f"?tls={tls}")
        # Where waiting does not help it does not start; a server may get its TLS later.
        check = [] if tls == "true" and why else ["--check"]
        code, errors = self.stopped(*check, ConnectString=dsn, Engine="InnoDB")
        assert (code == 0) == (not why)
        assert why in errors

    @pytest.mark.parametrize("said", [
        lambda self, run, port: self.stopped("--check", Port=port)[1],
        lambda self, run, port: run(Port=port).errors()], ids=["--check", "log"])
    def test_control_characters_of_the_database_are_not_shown(self, said, run):
        error = b"\xff\x10\x04\x1b[31m\x07"     # number 1040
        packet = bytes([len(error), 0, 0, 0]) + error
        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: listener.accept()[0].sendall(packet))
            errors = said(self, run, listener.getsockname()[1])
        assert re.fullmatch("[ -~\n]*: 1040 [ -~\n]*", errors)

    def test_a_system_without_threads(self, run):
        server = run(wait=False, python=python_with(
            "import _thread", "def refuse(*_, **__): raise RuntimeError('no thread')",
            "_thread.start_new_thread = _thread.start_joinable_thread = refuse"))
        assert server.process.wait(10) == 1
        assert re.fullmatch("idpot: [ -~]+\n", server.errors())

    def test_listen_without_a_host_is_ipv6_and_ipv4(self, run):
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this host has no IPv6")
        server = run(Listen=":0", listen=None)
        for host in ("127.0.0.1", "::1"):
            with contextlib.closing(HTTPConnection(host, server.port, timeout=10)) as connection:
                connection.request("GET", "/healthz")
                assert connection.getresponse().read() == b"ok"
        hosts = re.findall(r'(?m)^(\S+) - - \[.*"GET /healthz ', logged(server))
        assert hosts == ["127.0.0.1", "::1"]

    def test_a_temporary_link_that_was_left_over_does_not_stop_the_start(self, run):
        server = run(LogFile="log", LogLinkName="newest")
        server.stop()
        os.unlink(f"{server.folder}/newest")
        # A process whose pid comes again had made this one, and was killed before it renamed it.
        code = ("import os, sys; os.symlink('gone', f'newest.{os.getpid()}'); "
                "os.execv(sys.argv[1], sys.argv[1:])")
        server.command = [sys.executable, "-c", code, *server.command]
        server.start()
        assert os.readlink(f"{server.folder}/newest") == "log"
        assert [name for name in os.listdir(server.folder) if name.startswith("newest.")] == []

    def test_version(self, capsys):
        with pytest.raises(SystemExit, match="^0$"):
            idpot.main(["--version"])
        assert capsys.readouterr() == (f"idpot {idpot.__version__}\n", "")

    def test_mysql_without_its_driver_says_how_to_install_it(self):
        Path("f.cfg").write_text("[Mysql]")
        done = subprocess.run([sys.executable, "-I", "-S", f"{HERE}/idpot.py", "--config=f.cfg"],
                              capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert done.stderr == (
            "idpot: [Mysql] needs mysql-connector-python: python3 -m pip install "
            f"--target={HERE} 'mysql-connector-python>=9.2'\n")

    def test_plain_python_with_nothing_installed_serves_the_two_curl_commands(self, run):
        server = run(config=False, python=["env", "-i", sys.executable, "-I", "-S"])
        url = f"http://127.0.0.1:{server.port}"
        create = [needs("curl"), "-sS", "-d", "name=orders", f"{url}/pot/create"]
        assert subprocess.check_output(create, timeout=20) == b"Created new pot"
        next_id = ["curl", "-sS", "-X", "POST", f"{url}/id/orders"]
        assert subprocess.check_output(next_id, timeout=20) == b"1"
        assert re.search(r"listening on http://127\.0\.0\.1:\d+ \(SQLite idpot\.db\)\n",
                         server.errors())


class TestCheck:
    """`--check` says what is wrong, and changes nothing."""

    def check(self, *before, **settings):
        """(exit code, stdout, stderr) of --check; `before` is the beginning of the command."""
        Path("f.cfg").write_text(config_text(**settings))
        command = [*before, sys.executable, f"{HERE}/idpot.py", "--config=f.cfg", "--check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.returncode, done.stdout, done.stderr

    def listing(self, folder):
        """(path, size, time of the last change) of the folder and of all that is in it."""
        paths = [Path(folder), *Path(folder).rglob("*")]
        return {(path, path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}

    def test_a_database_that_is_reached(self, empty, folder):
        dsn = f"root@unix({empty.socket})/empty_test"
        answer = self.check(ConnectString=dsn, Engine="InnoDB")
        reached = f"MySQL {empty.socket}/empty_test, InnoDB is reached"
        assert answer == (0, f"idpot: the settings are valid, {reached}\n", "")
        assert empty.sql("SHOW TABLES", database="empty_test") == []

    def test_a_database_that_cannot_be_reached(self, folder):
        port = free_port()
        code, out, errors = self.check(ConnectString=f"root@tcp(127.0.0.1:{port})/idpot")
        assert (code, out) == (1, "")
        assert re.fullmatch(f"idpot: MySQL 127.0.0.1:{port}: .*Can't connect to .*\n", errors)

    def test_a_database_that_is_read_only(self, empty, folder):
        with read_only(empty):
            answer = self.check(ConnectString=empty.dsn("empty_test"), Engine="InnoDB")
        reason = "the database cannot serve this now: it is read-only (error 1290)"
        assert answer == (1, "", f"idpot: MySQL 127.0.0.1:{empty.port}: {reason}\n")

    def assert_valid(self, file, **settings):
        code, out, errors = self.check(File=file, **settings)
        assert (code, errors) == (0, "")
        assert out.startswith(f"idpot: the settings are valid, SQLite {file} ")

    def test_it_writes_nothing(self, folder):
        Path("data/logs").mkdir(parents=True)
        before = self.listing("data")
        self.assert_valid("data/ids.db", LogFile="data/logs/%Y", LogLinkName="data/newest")
        assert self.listing("data") == before
        assert sorted(os.listdir()) == ["data", "f.cfg"]

    @pytest.mark.parametrize("end", [None, signal.SIGTERM, signal.SIGKILL])
    def test_what_an_idpot_uses_or_has_left_is_not_touched(self, run, folder, end):
        server = run(LogFile="log", LogLinkName="newest")
        server.create("p")
        wait_until(lambda: "/pot/create" in Path(server.folder, "log").read_text())
        if end:
            server.stop(end)
        before = self.listing(server.folder)
        self.assert_valid(f"{server.folder}/idpot.db", LogFile=f"{server.folder}/log")
        assert self.listing(server.folder) == before
        if end:
            server.start()
        assert server.next("p") == 1

    @pytest.mark.parametrize("setting, place, why", [
        ("LogFile", "closed/log", "it cannot be written"),
        ("LogFile", "no/dir/log", "its folder is not there"),
        ("LogFile", "f.cfg/log", "its folder is not there"),
        ("LogFile", "roots", "it cannot be written"),
        ("LogLinkName", "closed/newest", ""),
        ("LogLinkName", "no/dir/newest", ""),
        ("LogLinkName", "f.cfg", ""),
        ("File", ".", "it cannot be written"),
        ("File", "no/dir/db", "its folder is not there"),
        ("File", "closed/db", "it cannot be written")])
    def test_files_that_could_not_be_written(self, folder, setting, place, why):
        Path("closed").mkdir(mode=0o555)
        Path("roots").touch(mode=0o444)
        # Root may write everywhere, unless this capability is taken away.
        drop = [needs("setpriv"), "--bounding-set=-dac_override"] if os.getuid() == 0 else []
        what = "SQLite file" if setting == "File" else setting
        code, out, errors = self.check(*drop, **{"LogFile": "log", setting: place})
        assert (code, out) == (1, "")
        assert re.fullmatch(f'idpot: .*{what}.*\n', errors) and place in errors
        assert errors == f'idpot: {what} "{place}": {why}\n' or not why


# ---------------------------------------------------------------- the access log

class TestAccessLog:
    QUOTED = r'"((?:[^"\\]|\\.)*)"'
    MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
    TIME = rf"\[\d\d/{MONTH}/\d{{4}}:\d\d:\d\d:\d\d [+-]\d{{4}}\]"
    COMBINED = re.compile(
        rf"127\.0\.0\.1 - - {TIME} {QUOTED} (\d{{3}}) (\d+|-) {QUOTED} {QUOTED}\n")

    def fields(self, server, name):
        """(request line, status, size, referer, user agent) of each line of the file."""
        with open(f"{server.folder}/{name}") as file:
            return [self.COMBINED.fullmatch(line).groups() for line in file]

    def test_no_line_is_lost_at_a_stop(self, run):
        server = run(LogFile="log.%Y%m%d", LogLinkName="newest")
        server.create("logged")

        def client():
            for _ in range(50):
                server.next("logged")

        at_once(*[client] * 4)
        assert server.stop() == 0
        assert re.fullmatch(r"log\.\d{8}", os.readlink(f"{server.folder}/newest"))
        first, *others = self.fields(server, "newest")
        assert first == ("POST /pot/create HTTP/1.1", "201", "15", "-", "-")
        sizes = collections.Counter(others)
        assert sizes == {("POST /id/logged HTTP/1.1", "200", "1", "-", "-"): 9,
                         ("POST /id/logged HTTP/1.1", "200", "2", "-", "-"): 90,
                         ("POST /id/logged HTTP/1.1", "200", "3", "-", "-"): 101}

    def test_the_file_changes_with_its_pattern_and_the_link_follows(self, tmp_path):
        days = iter([0, 1, 1, 2, 4])
        handler = idpot.StrftimeFileHandler(f"{tmp_path}/%j%%", f"{tmp_path}/newest",
                                            lambda: 43200 + 86400 * next(days))
        for text, newest in [
                ("line 0", "002%"),
                ("line 1", "002%"),
                ("line 2", "003%"),
                ("line 3", "005%")]:
            handler.emit(logging.makeLogRecord({"msg": text}))
            assert os.readlink(tmp_path / "newest") == newest
        assert {path.name: path.read_text() for path in tmp_path.glob("0*")} == {
            "001%": "",
            "002%": "line 0\nline 1\n",
            "003%": "line 2\n",
            "005%": "line 3\n"}

    def test_a_link_in_a_folder_that_is_a_link_itself_points_to_the_file(self, tmp_path):
        (tmp_path / "deep/er").mkdir(parents=True)
        (tmp_path / "short").symlink_to("deep/er")
        for file, link in (("log", "short/newest"), ("short/log", "last"), ("short/l", "short/n")):
            handler = idpot.StrftimeFileHandler(f"{tmp_path}/{file}", f"{tmp_path}/{link}")
            handler.emit(logging.makeLogRecord({"msg": file}))
            assert (tmp_path / link).read_text() == f"{file}\n"
        assert os.readlink(tmp_path / "short/n") == "l"

    def test_a_file_that_was_moved_or_deleted_and_a_link_are_made_anew(self, tmp_path):
        umask = os.umask(0)
        handler = idpot.StrftimeFileHandler(f"{tmp_path}/log", f"{tmp_path}/newest")
        os.umask(umask)
        assert (tmp_path / "log").stat().st_mode == 0o100640
        handler.emit(logging.makeLogRecord({"msg": "line 0"}))
        os.rename(tmp_path / "log", tmp_path / "moved")
        handler.emit(logging.makeLogRecord({"msg": "line 1"}))
        assert (tmp_path / "log").read_text() == "line 1\n"
        os.remove(tmp_path / "log")
        os.remove(tmp_path / "newest")
        handler.emit(logging.makeLogRecord({"msg": "line 2"}))
        assert (tmp_path / "newest").read_text() == "line 2\n"
        assert (tmp_path / "moved").read_text() == "line 0\n"

    def test_no_line_is_lost_while_the_link_cannot_be_set(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        days = iter([0, 1, 1, 1])
        (tmp_path / "links").mkdir()
        handler = idpot.StrftimeFileHandler(f"{tmp_path}/%j", f"{tmp_path}/links/newest",
                                            lambda: 43200 + 86400 * next(days))
        os.rename(tmp_path / "links", tmp_path / "away")
        for text in ["line 0", "line 1"]:
            handler.emit(logging.makeLogRecord({"msg": text}))
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        os.rename(tmp_path / "away", tmp_path / "links")
        handler.emit(logging.makeLogRecord({"msg": "line 2"}))
        assert (tmp_path / "links" / "newest").read_text() == "line 0\nline 1\nline 2\n"
        assert caplog.records[-1].getMessage() == "LogLinkName is well again"


# ---------------------------------------------------------------- hostile input: answer or close

GOOD = b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n"
TWO = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
       b"Content-Length: 7\r\n\r\ncount=2")
CLOSING = b"POST /id/%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

# Each is answered with 400, costs no ID and ends the connection.
BAD_REQUESTS = {
    # RFC 9112, 3: the request line
    "no target": b"POST HTTP/1.1\r\nHost: x\r\n\r\n",
    "two spaces after the method": b"POST  /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    "tabs for spaces": b"POST\t/id/p\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "a parenthesis in the method": b"PO(ST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL in the method": b"PO\x00ST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    # RFC 9112, 2.3: the version; 9.8: other protocols
    "version in small letters": b"POST /id/p http/1.1\r\nHost: x\r\n\r\n",
    "version 1.10": b"POST /id/p HTTP/1.10\r\nHost: x\r\n\r\n",
    "no version number": b"POST /id/p HTTP\r\nHost: x\r\n\r\n",
    "PROXY protocol": b"PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\n" + GOOD,
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(100)),
    # RFC 9112, 2.2: bare LF, bare CR, white space before the first header
    "LF for each CRLF": b"POST /id/p HTTP/1.1\nHost: x\n\n",
    "LF after a header": b"POST /id/p HTTP/1.1\r\nHost: x\n\r\n",
    "CR between two headers": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\rX: b\r\n\r\n",
    "space before the first header": b"POST /id/p HTTP/1.1\r\n Host: x\r\n\r\n",
    # RFC 9110, 5.5: control bytes in a header's value
    "NUL in a value": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    "vertical tab in a value": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x0bb\r\n\r\n",
    "DEL in a value": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x7fb\r\n\r\n",
    # RFC 9112, 5: no colon; 5.1: space before the colon; 5.2: folded lines
    "no colon": b"POST /id/p HTTP/1.1\r\nHost: x\r\nXa\r\n\r\n",
    "space before the colon": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n",
    "space before Content-Length's colon":
        b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\n",
    "folded line": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
    "Transfer-Encoding folded":
        b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n\tchunked\r\n\r\n",
    # RFC 9110, 5.1: header names
    "@ in a name": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX@y: 1\r\n\r\n",
    "Latin-1 in a name": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\xe9: 1\r\n\r\n",
    # RFC 9112, 3.2: header Host
    "no Host": b"POST /id/p HTTP/1.1\r\n\r\n",
    "two Hosts in HTTP/1.0": b"POST /id/p HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
    "the same Host twice": b"POST /id/p HTTP/1.1\r\nHost: x\r\nhOST: x\r\n\r\n",
    "two Origins": b"POST /id/p HTTP/1.1\r\nHost: x\r\nOrigin: x\r\nOrigin: x\r\n\r\n",
    "@ in Host": b"POST /id/p HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "bracket not closed in Host": b"POST /id/p HTTP/1.1\r\nHost: [::1\r\n\r\n",
    # RFC 9110, 8.6: Content-Length; RFC 9112, 6.3: two of them; 11.2: one that hides a request
    "empty length": b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: \r\n\r\n",
    "length 5, 5": b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\n",
    "length with 0xa0": b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\xa0\r\n\r\n",
    "length 0_5": b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0_5\r\n\r\n",
    "length +5": b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n",
    "length superscript two": b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: \xb2\r\n\r\n",
    "two lengths, one hides a request":
        b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 32\r\n\r\n" + GOOD,
    "length beyond 64 bits":
        b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551617\r\n\r\n",
    # RFC 9112, 3.2: targets of no form, or of a form that is for a proxy or another method
    "absolute target without a host": b"POST http:///id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute target with a user": b"POST http://u@x/id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    "scheme ftp": b"POST ftp://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    "fragment": b"POST /id/p#x HTTP/1.1\r\nHost: x\r\n\r\n",
    "backslashes for slashes": b"POST \\id\\p HTTP/1.1\r\nHost: x\r\n\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    # RFC 9112, 3.2: bytes in the target
    "NUL in the target": b"POST /id/p\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "UTF-8 in the target": b"POST /id/\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
}

# Each is answered with 200 and costs one ID, and the connection stays.
SERVED = {
    "a good request": GOOD,
    "RFC 9112, 2.2: an empty line before a request": b"\r\n" + GOOD,
    # RFC 9110, 5.5 and RFC 9112, 5: headers that are right, if unusual
    "tab in a value": b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\tb\r\n\r\n",
    "Latin-1 in a value": b"POST /id/p HTTP/1.1\r\nHost: x\r\nUser-Agent: caf\xe9\r\n\r\n",
    "blanks and tabs around Content-Length":
        b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length:\t 0 \t \r\n\r\n",
    "no space after the colon": b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length:0\r\n\r\n",
    "64 headers": b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 63 + b"\r\n",
    # RFC 9110, 7.2: hosts
    "IPv6 Host": b"POST /id/p HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
    "Host with a last dot": b"POST /id/p HTTP/1.1\r\nHost: id-pot.example.\r\n\r\n",
    # RFC 9112, 3.2.2: absolute targets
    "absolute target": b"POST HTTP://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute target with a port": b"POST http://y:80/id/p? HTTP/1.1\r\nHost: x\r\n\r\n",
    "empty query": b"POST /id/p? HTTP/1.1\r\nHost: x\r\n\r\n",
}

# What is sent, the statuses of the answers in order, how many IDs of pot p that costs, and whether
# the connection is closed then, so that a good request behind it is not served.
Case = collections.namedtuple("Case", "name data answers ids closes", defaults=(0, True))

OTHERS = [
    # RFC 9110, 15.6.6: versions that are not spoken; RFC 9113, 3.4: HTTP/2
    Case("version 0.9", b"POST /id/p HTTP/0.9\r\nHost: x\r\n\r\n", [505]),
    Case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04", [505]),
    # RFC 9110, 9.1: methods
    Case("post in small letters", b"post /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], closes=False),
    Case("method of odd characters",
         b"!#$%&'*+-.^_`|~ /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], closes=False),
    # RFC 9112, 3.2 and RFC 9110, 10.1.1: HTTP/1.0 needs no Host and no expectation
    Case("HTTP/1.0 without Host", b"POST /id/p HTTP/1.0\r\n\r\n", [200], ids=1),
    # RFC 9110, 15.5.14: the body is too long
    Case("length 65536", b"GET /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n\r\n"
         + b"a" * 65536, [200], closes=False),
    Case("length 65537", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n", [413]),
    # RFC 9112, 8: wrong UTF-8 in a form; RFC 9110, 15.5.16: the type of the body
    Case("escaped 0xff in a form",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Content-Length: 10\r\n\r\ncount=2%ff\r\n\r\n", [400], closes=False),
    Case("form with a charset",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nContent-Type: "
         b"application/x-www-form-urlencoded;charset=UTF-8\r\n\r\ncount=2", [200], 2, False),
    Case("JSON",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
         b"Content-Length: 6\r\n\r\n{}\r\n\r\n", [415], closes=False),
    # RFC 9110, 15.5.15: the target is too long; RFC 6585, 5: headers too long or too many
    Case("query of 300000 letters",
         b"POST /id/p?" + b"p" * 300000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [414]),
    Case("line of 8192 bytes",
         b"POST /" + b"p" * 8175 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("line of 8193 bytes", b"POST /" + b"p" * 8176 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [414]),
    Case("chunks of 65536 bytes",
         b"GET /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"10000\r\n%s\r\n0\r\n\r\n" % (b"a" * 65536), [200], closes=False),
    Case("a line without end", b"A" * 300000, [414]),
    Case("value of 99999 letters",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 99999 + b"\r\n\r\n", [431]),
    Case("65 headers",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 64 + b"\r\n", [431]),
    Case("10000 headers",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 9999 + b"X:\r\n\r\n", [431]),
    # RFC 9110, 4.2: absolute targets without a path
    Case("absolute target without a path",
         b"POST http://x HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    # Other paths; no name needs an escape, and a proxy's rule may have looked at the raw path
    *[Case(path, f"POST {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), [404], closes=False)
      for path in ("/id/%70", "/%69d/p", "/id%2Fp", "/id%2fp", "http://x/id%2fp", "/id/%2570",
                   "/pot%2fraise?name=p&min=9999999", "/id/p%zz", "/id/p%", "/id/p%0d%0aX:1",
                   "/id/p%3Fcount=2")],
    Case("pot of 4000 letters",
         b"POST /id/" + b"p" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("count +1", b"POST /id/p?count=+1 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    # RFC 9110, 10.1.1 and 15.5.18: expectations
    Case("expectation in capitals with its body",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Expect: 100-Continue\r\nContent-Length: 7\r\n\r\ncount=2", [100, 200], ids=2,
         closes=False),
    Case("another expectation beside 100-continue",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue, a-miracle\r\n\r\n", [417]),
    # RFC 9112, 9.3.2: several requests in one send
    Case("good, no colon, good",
         GOOD + b"POST /id/p HTTP/1.1\r\nHost: x\r\nXa\r\n\r\n" + GOOD, [200, 400], ids=1),
    Case("fifty requests", TWO * 50, [200] * 50, ids=100, closes=False),
    Case("unknown pot, good",
         b"POST /id/none HTTP/1.1\r\nHost: x\r\n\r\n" + GOOD, [404, 200], ids=1, closes=False),
    # RFC 9110, 9.3.1 and 9.3.2: GET with a body, HEAD
    Case("GET with a request for its body, good",
         b"GET /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 32\r\n\r\n" + GOOD + GOOD,
         [200, 200], ids=1, closes=False),
    Case("HEAD, HEAD of an unknown pot, good",
         b"HEAD /id/p HTTP/1.1\r\nHost: x\r\n\r\nHEAD /id/none HTTP/1.1\r\nHost: x\r\n\r\n" + GOOD,
         [200, 404, 200], ids=1, closes=False),
    # RFC 9112, 9.3 and RFC 9110, 7.6.1: when the connection closes
    Case("HTTP/1.0, good", b"POST /id/p HTTP/1.0\r\n\r\n" + GOOD, [200], ids=1),
    Case("close among other options",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: foo , ,\tClOsE,bar\r\n\r\n", [200], ids=1),
    # RFC 9112, 9.3 and 2.2: when it stays
    Case("empty line between two requests",
         GOOD + b"\r\n" + GOOD, [200, 200], ids=2, closes=False),
    Case("HTTP/1.0 with keep-alive, good",
         b"POST /id/p HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n" + GOOD,
         [200, 200], ids=2, closes=False),
    Case("options that are not close, good",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: closed, x-close\r\n\r\n" + GOOD,
         [200, 200], ids=2, closes=False),
]
HOSTILE = [Case(name, data, [400]) for name, data in BAD_REQUESTS.items()]
HOSTILE += [Case(name, data, [200], ids=1, closes=False) for name, data in SERVED.items()]
HOSTILE += OTHERS


ANSWER_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+\r\n((?:[\w-]+: [ -~]*\r\n)*)\r\n")


def http_answers(data):
    """The answers that the bytes are, as (status, body); fails where they are anything else."""
    answers = []
    at = 0
    while at < len(data):
        head = ANSWER_HEAD.match(data, at)
        assert head, data[at:at + 500]
        status, fields = int(head[1]), head[2]
        at = head.end()
        length = re.search(rb"Content-Length: (\d+)\r\n", fields)
        body = b""
        if length and not data.startswith(b"HTTP/1.1 ", at):    # as behind the answer to a HEAD
            body = data[at:at + int(length[1])]
            assert len(body) in (0, int(length[1]))
        if status >= 400 and body:
            assert re.fullmatch(rb"[ -~]+\n", body)
            assert b"Content-Type: text/plain; charset=utf-8\r\n" in fields
        answers.append((status, body))
        at += len(body)
    return answers


def statuses(data):
    return [status for status, _ in http_answers(data)]


def issued(data):
    """The numbers in the answers with status 200."""
    bodies = [body for status, body in http_answers(data) if status == 200]
    return [int(word) for word in b" ".join(bodies).split()]


def until_closed(connection):
    """All that comes until the server closes the connection; a reset fails the test."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def received(connection):
    """All that comes until the server closes the connection or resets it."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            data += chunk
    return data


def pipelined(client, data):
    """Sends the data and meanwhile reads; returns all that comes until the server closes."""
    def send():
        with contextlib.suppress(OSError):      # the server ended it
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(send)
        return received(client)


def slow_reader(server):
    """A connection with a small buffer for what comes, so that much of it waits at the server."""
    connection = socket.socket()
    connection.settimeout(20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    return connection


def http_exchange(server, data, half_close=True):
    """All that the server answers to the bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return until_closed(connection)


def current_p(server):
    return int(server.request("GET", "/id/p", timeout=5)[1])


def answered_and_burnt(server, data, half_close=True):
    """The statuses of the answers to the bytes, and how many IDs of the pot p they cost."""
    before = current_p(server)
    answer = http_exchange(server, data, half_close)
    return statuses(answer), current_p(server) - before


@pytest.fixture(scope="module")
def http_pot(tmp_path_factory):
    """An idpot with pots p, secret and big, shared by the tests of this section."""
    server = Idpot(tmp_path_factory.mktemp("http"))
    server.create("p")
    server.create("secret")
    server.create("big", 10**18)
    yield server
    server.stop(signal.SIGKILL)


FUZZ_BASES = [
    GOOD, GOOD * 2, TWO, TWO + GOOD, b"POST /id/p?count=3 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST http://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"7\r\ncount=3\r\n0\r\n\r\n"]
FUZZ_BITS = [
    b"\r\n ", b"\r\n\r\n", b"Host: x\r\n", b"Content-Length: 7\r\n",
    b"Transfer-Encoding: chunked\r\n", b"HTTP/1.0", b"count=", b"%0d", b"\0", b"\t", b"\v", b"\r",
    b"\n", b" ", b"%", b"&", b"?", b"#", b"+", b",", b"-", b"0", b"9", b":", b"\xff",
]


def mutated(random_, data):
    """The bytes with one to four random changes in them."""
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data) + 1)
        end = at + random_.choice([0, 1, 1, 2, 5, 40])
        piece = data[at:end]
        changes = [
            b"",
            piece * 2,
            random_.choice(FUZZ_BITS),
            random_.choice(FUZZ_BITS) + piece,
            random_.randbytes(2),
            bytes(byte ^ 1 << at % 8 for byte in piece),
        ]
        data = data[:at] + random_.choice(changes) + data[end:]
    return data


class TestHostileInput:
    @pytest.mark.parametrize("case", HOSTILE, ids=[case.name for case in HOSTILE])
    def test_hostile_bytes_are_answered_or_the_connection_is_closed(self, http_pot, case):
        assert answered_and_burnt(http_pot, case.data) == (case.answers, case.ids)
        if case.closes:
            again = answered_and_burnt(http_pot, case.data + GOOD, half_close=False)
            assert again == (case.answers, case.ids)
        else:
            again = answered_and_burnt(http_pot, case.data + GOOD)
            assert again == ([*case.answers, 200], case.ids + 1)

    @pytest.mark.parametrize("data", [GOOD, TWO], ids=["head", "form"])
    def test_no_proper_prefix_of_a_request_costs_an_id(self, http_pot, data):
        before = current_p(http_pot)
        for length in range(len(data)):
            answer = http_exchange(http_pot, data[:length])
            assert statuses(answer) == ([400] if length else [])
            with connections(http_pot, 2, data[:length]) as [_, reset]:
                reset.setsockopt(*RESET_AT_CLOSE)
        assert current_p(http_pot) == before
        assert answered_and_burnt(http_pot, TWO + b"9") == ([200, 400], 2)

    def test_a_body_is_asked_for_with_100_continue_and_then_read(self, http_pot):
        head = (b"POST /id/p HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/x-www-form-urlencoded\r\n"
                b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\n")
        with connections(http_pot, 1, head) as [connection]:
            assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(b"count=2")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")

    def test_http_1_0_is_told_whether_the_connection_stays(self, http_pot):
        data = b"GET /id/p HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /id/p HTTP/1.0\r\n\r\n"
        options = re.findall(rb"\r\nConnection: (.*)\r\n", http_exchange(http_pot, data))
        assert options == [b"keep-alive", b"close"]

    def test_the_date_is_now_in_gmt(self, run):
        server = run(environment={"TZ": "XYZ-9"})
        for _ in range(3):
            date = server.request("GET", "/")[2]["Date"]
            assert re.search(" GMT$", date)
            assert abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) < 2
            passes(1)

    def test_head_is_answered_as_get_without_the_body(self, http_pot):
        answer = http_exchange(http_pot, b"HEAD /id/p HTTP/1.1\r\nHost: x\r\n\r\n")
        length = len(str(current_p(http_pot)))
        assert b"\r\nContent-Length: %d\r\n" % length in answer
        assert answer.endswith(b"\r\n\r\n")

    @pytest.mark.parametrize("target, status", [
        (b"/idhttp://x/secret", 404),
        (b"/potHTTPS://x/secret", 404),
        (b"/id/phttp://x", 404),
        (b"/id/p?http://x/id/secret", 400),
        (b"http://x/idhttp://x/p", 404)])
    def test_the_absolute_form_is_known_at_the_start_of_a_target_only(
            self, http_pot, target, status):
        pots = http_pot.request("GET", "/pot")[1]
        answer = http_exchange(http_pot, b"POST %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)
        assert statuses(answer) == [status]
        assert http_pot.request("GET", "/pot")[1] == pots

    @pytest.mark.parametrize("data, status", [
        (b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"POST /id/big?count=10000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
        (b"POST /id/big?count=10000 HTTP/1.0\r\n\r\n", 200),
        (b"GET /id/p HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n", 400),
        (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n", 413)],
        ids=["short answer", "long answer", "HTTP/1.0", "error", "unread body"])
    def test_an_answer_before_a_close_reaches_a_client_that_still_sends(
            self, http_pot, data, status):
        with slow_reader(http_pot) as connection:
            connection.sendall(data)
            connection.recv(1, socket.MSG_PEEK)     # the server has answered: what follows is late
            connection.sendall(b"x" * 4000000)
            answer = until_closed(connection)
        assert statuses(answer) == [status]
        if b"count=10000" in data:
            last = int(http_pot.request("GET", "/id/big")[1])
            assert issued(answer) == list(range(last - 9999, last + 1))

    def test_answers_to_thousands_of_requests_in_one_send_come_in_order(self, run):
        server = run()
        server.create("p")
        requests = GOOD + b"GET /id/p HTTP/1.1\r\nHost: x\r\n\r\n"
        with slow_reader(server) as connection:
            connection.sendall(requests * 3000)
            connection.shutdown(socket.SHUT_WR)
            wait_until(lambda: current_p(server) > 1000)
            answer = until_closed(connection)
        expected = []
        for number in range(1, 3001):
            expected += [number, number]
        assert issued(answer) == expected

    def test_long_input_is_parsed_in_linear_time(self, http_pot):
        before = cpu_seconds(http_pot)
        data = b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a" + b" " * 16000 + b"b\r\n\r\n"
        for _ in range(10):
            assert len(http_exchange(http_pot, data)) > 0
        assert cpu_seconds(http_pot) - before < 2       # an expression that tries all ways: minutes

    @pytest.mark.parametrize("end", [
        b"", b"\r\nContent-Length: 65536\r\n\r\n"], ids=["of a head", "of a body"])
    def test_single_bytes_cost_no_more_behind_many_than_behind_few(self, http_pot, end):
        cpu = {10: 0, 13000: 0}
        for length in (10, 13000) * 3:
            head = b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: " + b"a" * length + end
            with connections(http_pot, 1, head) as [connection]:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                before = cpu_seconds(http_pot)
                for _ in range(1000):
                    connection.send(b"a")
                    assert not select.select([connection], [], [], 0.0005)[0]
                cpu[length] += cpu_seconds(http_pot) - before
        assert cpu[13000] < 2 * cpu[10] + 0.2       # where each byte has all looked at again: 0.8 s

    @pytest.mark.parametrize("batch", range(20))
    def test_fuzzed_requests_cost_no_more_ids_than_were_answered(self, http_pot, batch):
        random_ = random.Random(batch)
        requests = [mutated(random_, random_.choice(FUZZ_BASES)) for _ in range(100)]
        before = current_p(http_pot)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(functools.partial(http_exchange, http_pot), requests))
        ids = []
        for answer in answers:
            ids += issued(answer)
            assert not {500, 503, 504} & set(statuses(answer))
        assert len(set(ids)) == len(ids) == current_p(http_pot) - before
        assert "Traceback" not in http_pot.errors()


# ---------------------------------------------------------------- hostile input: chunked bodies

CHUNKED = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
           b"Transfer-Encoding: chunked\r\n\r\n")


@pytest.mark.parametrize("body, ids", [
    (b"0\r\n\r\n", 1),
    (b"3\r\ncou\r\n4\r\nnt=3\r\n0\r\n\r\n", 3),
    (b"00B\r\nc%6Funt=%33\r\n0\r\n\r\n", 3),
    (b"7;a=b;c=\"d\"\r\ncount=3\r\n0;e\r\n\r\n", 3),
    (b"7\r\ncount=3\r\n0\r\nX: y\r\nContent-Length: 9\r\n\r\n", 3),
    (b"7;%s\r\ncount=3\r\n0\r\n\r\n" % (b"x" * 8000), 3),
    (b"7\r\ncount=3\r\n0\r\nX: %s\r\n\r\n" % (b"x" * 8000), 3),
])
def test_a_chunked_body_is_read_and_the_next_request_served(body, ids, http_pot):
    assert answered_and_burnt(http_pot, CHUNKED + body + GOOD) == ([200, 200], ids + 1)


@pytest.mark.parametrize("body, status", [
    (b"\r\ncount=3\r\n0\r\n\r\n", 400),
    (b"+7\r\ncount=3\r\n0\r\n\r\n", 400),
    (b"0x7\r\ncount=3\r\n0\r\n\r\n", 400),
    (b" 7\r\ncount=3\r\n0\r\n\r\n", 400),
    (b"\xd9\xa7\r\ncount=3\r\n0\r\n\r\n", 400),
    (b"7\ncount=3\r\n0\r\n\r\n", 400),
    (b"7\r\ncount=3\n0\r\n\r\n", 400),
    (b"7\r\ncount=30\r\n\r\n", 400),
    (b"7\r\ncount=3\r\n0\n\n", 400),
    (b"7\r\ncount=3\r\n0\r\nX y\r\n\r\n", 400),
    (b"10001\r\n", 413),
    (b"ffffffffffffffff\r\n", 413),
    (b"fffffffffffffffff\r\n", 400),
    (b"8000\r\n%s\r\n8000\r\n%s\r\n1\r\n" % (b"x" * 32768, b"x" * 32768), 413),
])
def test_a_chunked_body_is_refused_and_the_connection_closed(body, status, http_pot):
    data = CHUNKED + body + GOOD
    assert answered_and_burnt(http_pot, data, half_close=False) == ([status], 0)


@pytest.mark.parametrize("body", [
    b"7;%s\r\ncount=3\r\n0\r\n\r\n" % (b"x" * 9000),
    b"7\r\ncount=3\r\n0\r\n%s\r\n" % (b"X: y\r\n" * 2000),
    b"1;%s\r\nc\r\n1;%s\r\no\r\n" % (b"x" * 5000, b"x" * 5000),
    b"1\r\nx\r\n" * 3000,
])
def test_more_than_8_kib_of_sizes_extensions_and_trailers_is_refused(body, http_pot):
    assert answered_and_burnt(http_pot, CHUNKED + body, half_close=False) == ([413], 0)


@pytest.mark.parametrize("version, fields, status", [
    (b"1.1", b"Transfer-Encoding: Chunked\r\n", 200),
    (b"1.1", b"Transfer-Encoding: chunked\r\nContent-Length: 17\r\n", 400),
    (b"1.1", b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", 400),
    (b"1.1", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
    (b"1.0", b"Transfer-Encoding: chunked\r\n", 400),
    (b"1.1", b"Transfer-Encoding: gzip, chunked\r\n", 501),
    (b"1.1", b"Transfer-Encoding: identity\r\n", 501),
])
def test_chunked_is_the_only_coding_and_stands_alone(version, fields, status, http_pot):
    data = (b"POST /id/p HTTP/%s\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            b"%s\r\n7\r\ncount=3\r\n0\r\n\r\n" % (version, fields))
    assert answered_and_burnt(http_pot, data) == ([status], 3 if status == 200 else 0)


def test_no_proper_prefix_of_a_chunked_request_costs_an_id(http_pot):
    data = CHUNKED + b"3;a=b\r\ncou\r\n4\r\nnt=3\r\n0\r\nX: y\r\n\r\n"
    before = current_p(http_pot)
    for length in range(1, len(data)):
        assert statuses(http_exchange(http_pot, data[:length])) == [400]
        with connections(http_pot, 1, data[:length]) as [reset]:
            reset.setsockopt(*RESET_AT_CLOSE)
    assert current_p(http_pot) == before


def test_a_chunked_body_is_asked_for_with_100_continue(http_pot):
    head = CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n"
    with connections(http_pot, 1, head) as [client]:
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"7\r\ncount=2\r\n0\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


# ---------------------------------------------------------------- load

RESET_AT_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
ACCESS_LINE = re.compile(
    r'127\.0\.0\.1 - - \[[^]]+\] "((?:[^"\\]|\\.)*)" (\d{3}) (?:\d+|-) '
    r'"(?:[^"\\]|\\.)*" "((?:[^"\\]|\\.)*)"')
KEPT_THREADS = 16       # of connections that have ended
LONG_ANSWER = b"POST /id/p?count=10000 HTTP/1.1\r\nHost: x\r\n\r\n"

Usage = collections.namedtuple("Usage", "memory threads files")


def access_lines(server):
    """(request line, status, user agent) of each access line on the server's stderr."""
    found = map(ACCESS_LINE.fullmatch, server.errors().splitlines())
    return [line.groups() for line in found if line]


def usage(server):
    """Resident MiB, threads and open files of the server's process."""
    proc = Path(f"/proc/{server.process.pid}")
    status = (proc / "status").read_text()
    memory = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
    threads = int(re.search(r"Threads:\s+(\d+)", status)[1])
    return Usage(memory, threads, len(os.listdir(proc / "fd")))


def cpu_seconds(server):
    """The CPU time that the server's process has used, by its clock (clock_getcpuclockid(3))."""
    return time.clock_gettime(~server.process.pid << 3 | 2)


@pytest.fixture
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 7000:
        pytest.skip(f"the hard limit of open files is {hard}: 7,000 are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 7000), hard))


@contextlib.contextmanager
def well_served(server):
    """All along, a client asks for an ID every 50 ms, and gets each within five seconds."""
    over = threading.Event()

    def ask():
        while not over.wait(0.05):
            assert server.request("POST", "/id/p", timeout=5)[0] == 200

    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(ask)
        try:
            yield
        finally:
            over.set()
        client.result()


@contextlib.contextmanager
def connections(server, count, data=b""):
    """That many connections to the server; each has sent the bytes."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", server.port), 20)
            opened.append(stack.enter_context(connection))
            connection.sendall(data)
        yield opened


def each_begins_with(beginning, clients):
    """Whether the next answer to each of the connections begins so."""
    return {client.recv(1000)[:len(beginning)] for client in clients} == {beginning}


def restart_under(server, limit):
    """Starts the server again, under a limit of the shell's ulimit."""
    server.stop()
    server.command[:0] = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh"]
    server.start()


def first_bytes(connection):
    """What comes first; nothing where the server closes the connection or resets it."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(1000)
    return b""


def serves(server):
    """Whether the server issues an ID within two seconds."""
    with contextlib.suppress(OSError, HTTPException):
        return server.request("POST", "/id/p", timeout=2)[0] == 200


class TestLoad:
    def test_a_request_behind_empty_lines_that_come_one_by_one_is_answered(self, http_pot):
        with connections(http_pot, 1) as [client]:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(12):
                client.sendall(b"\r\n")
                passes(0.03)
            client.sendall(GOOD)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")

    def test_empty_lines_that_are_cut_within_one_are_skipped(self, http_pot):
        with connections(http_pot, 1) as [client]:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in (b"\r", b"\n\r\n\r\n\r", b"\n\r\n" + GOOD):
                client.sendall(piece)
                passes(0.05)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")

    def test_an_empty_line_that_comes_alone_does_not_end_the_connection(self, run):
        server = run()
        server.create("p")
        with connections(server, 1, TWO + b"\r\n") as [connection]:
            assert connection.recv(1000).endswith(b"\r\n\r\n1\n2\n")
            for number in (3, 4):
                connection.sendall(b"\r\n")
                assert not select.select([connection], [], [], 0.2)[0]
                connection.sendall(GOOD)
                assert connection.recv(1000).endswith(b"\r\n\r\n%d" % number)

    def test_a_request_that_came_in_time_is_served_however_late_it_is_read(self, run):
        server = run(RequestTimeout=0.2)
        server.create("p")
        unknown = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        with connections(server, 1, unknown + GOOD[:-2]) as [client]:
            assert client.recv(9999).startswith(b"HTTP/1.1 404 ")
            assert server.next("p") == 1    # by now it has read the half of the second request, too
            server.process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            client.sendall(GOOD[-2:])
            wait_until(lambda: time.monotonic() > stopped + 0.3)
            server.process.send_signal(signal.SIGCONT)
            assert client.recv(9999).startswith(b"HTTP/1.1 200 ")

    def test_a_client_that_sends_a_byte_now_and_then_gets_408(self, run):
        server = run(RequestTimeout=1)
        server.create("p")
        with well_served(server), connections(server, 1) as [slow]:
            begin = time.monotonic()
            for byte in GOOD:
                slow.sendall(bytes([byte]))
                if select.select([slow], [], [], 0.2)[0]:
                    break
            assert statuses(until_closed(slow)) == [408]
            assert time.monotonic() > begin + 0.9

    @pytest.mark.slow
    def test_a_client_that_reads_slowly_is_served_and_one_that_does_not_read_is_cut_off(self, run):
        server = run(RequestTimeout=1, IdleTimeout=5)
        server.create("p")
        last = b"POST /id/p?count=10000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with well_served(server), slow_reader(server) as steady, slow_reader(server) as silent:
            for connection in (steady, silent):
                connection.sendall(LONG_ANSWER * 89 + last)
            answer = b""
            begin = time.monotonic()
            while time.monotonic() < begin + 7:
                answer += steady.recv(4096)
                select.select([], [], [], 0.005)    # Linux lets go on when 1 MB of 4 is read
            answer += until_closed(steady)
            cut_off = received(silent)
        ids = issued(answer)
        assert (len(ids), len(set(ids))) == (900000, 900000)
        whole = cut_off.split(b"HTTP/1.1 200 OK\r\n")[1:-1]
        assert len(whole) < 89
        assert {len(one.partition(b"\r\n\r\n")[2].split()) for one in whole} <= {10000}

    def test_requests_whole_and_half_that_are_reset_at_once_leave_nothing_behind(self, run):
        server = run()
        server.create("p")
        before = usage(server)
        for data in (GOOD[:-1], GOOD, LONG_ANSWER * 3):
            with well_served(server), connections(server, 250, data) as reset:
                for connection in reset:
                    connection.setsockopt(*RESET_AT_CLOSE)
        wait_until(lambda: usage(server).files <= before.files, 20)
        wait_until(lambda: usage(server).threads <= before.threads + KEPT_THREADS, 20)
        assert "Traceback" not in server.errors()

    @pytest.mark.slow
    def test_5000_idle_connections_and_900_stalled_ones_are_held(self, run, many_descriptors):
        server = run(MaxConnections=6000, RequestTimeout=60)
        server.create("p")
        before = usage(server)
        exists = b"GET /pot/p HTTP/1.1\r\nHost: x\r\n\r\n"
        with contextlib.ExitStack() as stack:
            with well_served(server):
                idle = stack.enter_context(connections(server, 1000, exists))
                assert each_begins_with(b"HTTP/1.1 204 ", idle)
                assert usage(server).memory <= 70
                idle += stack.enter_context(connections(server, 4000, exists))
                assert each_begins_with(b"HTTP/1.1 204 ", idle[1000:])
                assert usage(server).memory <= 200
                stalled = stack.enter_context(connections(server, 900, GOOD[:-3]))
                wait_until(lambda: usage(server).files >= before.files + 5900, 20)
            for client in stalled:
                client.sendall(GOOD[-3:])
            for client in idle:
                client.sendall(GOOD)
            assert each_begins_with(b"HTTP/1.1 200 ", idle + stalled)
        wait_until(lambda: usage(server).files <= before.files, 20)
        wait_until(lambda: usage(server).threads <= before.threads + KEPT_THREADS, 20)
        assert "Traceback" not in server.errors()

    def test_at_max_connections_the_longest_silent_are_closed(self, run, many_descriptors):
        server = run()
        server.create("p")
        with well_served(server), connections(server, 1500, GOOD) as idle:
            assert each_begins_with(b"HTTP/1.1 200 ", idle)
            ends = select.poll()
            for connection in idle:
                ends.register(connection, select.POLLIN)
            wait_until(lambda: len(ends.poll(0)) >= 476)
            closed = {number for number, _ in ends.poll(0)}
            assert len(closed) < 490
            assert closed < {connection.fileno() for connection in idle[:1024]}

    def test_no_connection_more_than_max_connections_is_open(self, run):
        server = run(MaxConnections=3)
        server.create("p")
        with connections(server, 4, GOOD) as clients:
            assert each_begins_with(b"HTTP/1.1 200 ", clients)
            ended = select.select(clients, [], [], 2)[0]
            assert [received(client) for client in ended] == [b""]

    def test_heads_that_are_long_are_not_kept_in_memory(self, run):
        server = run(LogFile="/dev/null")
        heads = [b"GET / HTTP/1.1\r\nHost: x\r\nX: %d%s\r\n\r\n" % (number, b"x" * 15000)
                 for number in range(2500)]
        before = usage(server).memory
        with connections(server, 1) as [client]:
            assert pipelined(client, b"".join(heads)).count(b"HTTP/1.1 404 ") == 2500
        assert usage(server).memory < before + 25       # kept they are 35 MB

    def test_more_lines_can_be_written_than_may_wait(self, run):
        server = run(python=python_with("import idpot", "idpot.Writer.LIMIT = 9000"))
        for _ in range(6):
            http_exchange(server, GOOD * 30)
            logged(server)
        assert len(access_lines(server)) == 186

    def test_every_line_is_written_or_counted_as_lost(self, run):
        server = run(python=python_with("import idpot", "idpot.Writer.LIMIT = 1000"))
        http_exchange(server, GOOD * 30)

        def lost():
            return sum(map(int, re.findall(r"ERROR (\d+) lines of the logs", server.errors())))

        wait_until(lost)
        wait_until(lambda: lost() + len(access_lines(server)) == 30)

    def test_at_the_limit_newcomers_wait_and_no_busy_client_is_cut_off(self, run):
        server = run(MaxConnections=8)
        server.create("p")
        with ThreadPoolExecutor(30) as pool:
            clients = [pool.submit(http_exchange, server, GOOD * 100) for _ in range(30)]
        ids = []
        for client in clients:
            given = issued(client.result())
            assert (len(given), sorted(given)) == (100, given)
            ids += given
        assert sorted(ids) == list(range(1, 3001))

    def test_out_of_descriptors_it_waits_without_spinning_and_then_serves_again(self, run):
        server = run()
        server.create("p")
        restart_under(server, "-n 64")
        with connections(server, 200, GOOD[:-1]):
            assert current_p(server) == 0       # the silent ones made room
            assert 40 < metrics(server)["idpot_connections"] <= 64 - 2 - 16
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, 64))
        with connections(server, 1, GOOD) as [waiting]:
            before = cpu_seconds(server)
            assert select.select([waiting], [], [], 1) == ([], [], [])
            assert cpu_seconds(server) - before < 0.4
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
            assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert "Traceback" not in server.errors()

    def test_the_idle_time_begins_when_a_slow_client_has_its_answer(self, tmp_path):
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # also of connections
            hand_over = [sys.executable, "-c", HAND_OVER, str(listener.fileno()), "1"]
            stack.enter_context(hosted(
                tmp_path, *hand_over, settings={"IdleTimeout": 2}, pass_fds=[listener.fileno()]))
            server = types.SimpleNamespace(port=listener.getsockname()[1])
            idpot.Client(f"http://127.0.0.1:{server.port}").create("p", 10**18)
            client = stack.enter_context(slow_reader(server))
            client.sendall(LONG_ANSWER)
            assert client.recv(1) == b"H"
            select.select([], [], [], 1.2)
            length = 0
            while length < 10000 * len("1000000000000000001\n"):
                length += len(client.recv(65536))
            select.select([], [], [], 1.2)
            client.sendall(GOOD)
            assert client.recv(9999).endswith(b"\r\n\r\n1000000000000010001")

    def test_an_answer_that_is_read_slowly_at_a_stop_comes_whole(self, tmp_path):
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # also of connections
            hand_over = [sys.executable, "-c", HAND_OVER, str(listener.fileno()), "1"]
            process, _ = stack.enter_context(
                hosted(tmp_path, *hand_over, pass_fds=[listener.fileno()]))
            server = types.SimpleNamespace(port=listener.getsockname()[1])
            idpot.Client(f"http://127.0.0.1:{server.port}").create("p", 10**18)
            client = stack.enter_context(slow_reader(server))
            client.sendall(LONG_ANSWER)
            assert client.recv(1) == b"H"
            process.terminate()
            passes(1.5)
            assert until_closed(client).endswith(b"\n1000000000000010000\n")

    def test_a_client_that_does_not_close_is_closed_soon_after_its_last_answer(self, run):
        server = run()
        with connections(server, 1, CLOSING % b"p") as [client]:
            assert until_closed(client).startswith(b"HTTP/1.1 404 ")
            wait_until(lambda: metrics(server)["idpot_connections"] == 1, 5)

    def test_a_request_that_is_slow_at_a_stop_has_half_a_second(self, run):
        server = run()
        server.create("p")
        with connections(server, 1, TWO[:-4]) as [slow]:
            begun = time.monotonic()
            wait_until(lambda: time.monotonic() > begun + 1)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refused(server.port))
            slow.sendall(TWO[-4:])
            assert slow.recv(1000).endswith(b"\r\n\r\n1\n2\n")
        assert server.process.wait(10) == 0

    def test_connections_let_the_thread_that_runs_go_on(self, run):
        server = run()
        with connections(server, 2, b"GET /pot HTTP/1.1\r\nHost: x\r\n\r\n") as opened:
            assert each_begins_with(b"HTTP/1.1 200 ", opened)
            threads = [int(thread) for thread in os.listdir(f"/proc/{server.process.pid}/task")]
            policies = [os.sched_getscheduler(thread) for thread in threads]
        assert policies.count(os.SCHED_BATCH) >= 2      # of the connections
        assert policies.count(os.SCHED_OTHER) >= 2      # of the worker and the log


def waits(server):
    """The median and the 99th percentile, in ms, of 100 IDs of pot p, asked for 10 ms apart."""
    took = []
    with connections(server, 1) as [client]:
        for _ in range(100):
            select.select([], [], [], 0.01)
            start = time.monotonic()
            client.sendall(GOOD)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            took.append(1000 * (time.monotonic() - start))
    took.sort()
    return took[50], took[98]


@contextlib.contextmanager
def storm(server, count, request):
    """A block in which so many clients ask again when answered, and come again when closed."""
    over = threading.Event()

    def ask():
        with contextlib.ExitStack() as stack:
            clients = stack.enter_context(connections(server, count, request))
            while not over.is_set():
                for client in select.select(clients, [], [], 0.1)[0]:
                    if first_bytes(client):
                        with contextlib.suppress(ConnectionError):
                            client.sendall(request)
                    else:
                        client.close()
                        clients.remove(client)
                        clients += stack.enter_context(connections(server, 1, request))

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        try:
            yield
        finally:
            over.set()
        asked.result()


@pytest.mark.slow
def test_a_client_that_sends_tiny_chunks_slows_nobody_down(run):
    server = run()
    server.create("p")
    quiet, _ = waits(server)
    with storm(server, 1, CHUNKED + b"1\r\nx\r\n" * 65536 + b"0\r\n\r\n"):
        median, _ = waits(server)
    assert median < 3 + 3 * quiet


def test_a_client_that_has_gone_is_served_no_further(run):
    server = run()
    server.create("p")
    server.process.send_signal(signal.SIGSTOP)
    with connections(server, 1, GOOD * 3000):
        pass
    server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: metrics(server)["idpot_connections"] == 1)
    assert current_p(server) <= 100


def test_half_a_100_continue_is_not_followed_by_an_answer(run):
    server = run(python=python_with(
        "import socket", "send = socket.socket.send",
        "socket.socket.send = lambda self, data, *flags: "
        "send(self, data[:12] if data[9:12] == b'100' else data, *flags)"))
    head = CLOSING[:-2] % b"p" + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n"
    with connections(server, 1, head) as [client]:
        assert client.recv(1000) == b"HTTP/1.1 100"
        client.sendall(b"x")
        assert received(client) == b""


@pytest.mark.slow
def test_under_a_limit_of_memory_every_client_is_answered_or_closed(run):
    server = run(MaxConnections=200, RequestTimeout=1)
    server.create("p")
    restart_under(server, "-S -d 30720")
    for _ in range(3):
        with connections(server, 250, GOOD[:-1]) as clients, within(6):
            for client in clients:
                client.settimeout(6)
                first_bytes(client)
    unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    resource.prlimit(server.process.pid, resource.RLIMIT_DATA, unlimited)
    wait_until(lambda: metrics(server)["idpot_connections"] == 1, 5)
    assert usage(server).files < 20


@pytest.mark.slow
def test_ids_come_soon_after_the_database_ended_its_connections_and_no_descriptor_is_left(
        mysql, run, database):
    server = run(**mysql())
    server.create("p")
    restart_under(server, "-n 64")
    with contextlib.closing(database.connect()) as root, storm(server, 100, GOOD[:-1]):
        for _ in range(10):
            wait_until(lambda: serves(server), 4)
            kill_connections(root, "least")


# ------------------------------------------------------------------- load: a worker reads for many

COUNTED = """
def text(server, text=idpot.Server.metrics_text):
    crowds = server.allocator._crowds.values()
    kept = sum(len(crowd.members) for crowd in crowds)
    watched = sum(len(crowd._watched) for crowd in crowds)
    parked = sum(one.parked for one in server.made())
    return text(server) + b"kept %d\\nwatched %d\\nparked %d\\n" % (kept, watched, parked)
idpot.Server.metrics_text = text"""


class Quick:
    """A with block in which so many clients, each on a connection of its own, ask for an ID of pot
    p again as soon as they have one. Their threads in the server sleep then: a worker reads."""

    def __init__(self, server, clients=32, request=GOOD):
        self.server = server
        self.request = request
        self.ids = []           # those that they got, as they came
        self.others = []        # the statuses of answers without one
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.clients = [socket.create_connection(("127.0.0.1", server.port), 20)
                        for _ in range(clients)]

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: metrics(self.server)["parked"] > len(self.clients) / 2)
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.thread.join()
        for client in self.clients:
            client.close()

    def run(self):
        deadline = time.monotonic() + 60
        with selectors.DefaultSelector() as asking:
            for client in self.clients:
                client.sendall(self.request)
                asking.register(client, selectors.EVENT_READ)
            while asking.get_map() and time.monotonic() < deadline:
                for key, _ in asking.select(0.1):
                    self.read(key.fileobj, asking)

    def read(self, client, asking):
        data = received_now(client)
        self.ids += issued(data)
        self.others += [status for status in statuses(data) if status != 200]
        if not data or self.stopping.is_set():
            asking.unregister(client)
        else:
            client.sendall(self.request)

    def more(self, count=500):
        """Waits until they have got so many more."""
        before = len(self.ids)
        wait_until(lambda: len(self.ids) >= before + count)


def received_now(client):
    """What has come; b"" at the end of the connection."""
    with contextlib.suppress(ConnectionError):
        return client.recv(65536)
    return b""


@pytest.fixture
def counted(run):
    """Starts an idpot with pots p and q, whose /metrics tells how many connections are parked,
    have their turn kept, and are watched."""
    def start(*lines, **settings):
        server = run(python=python_with("import idpot", COUNTED, *lines), **settings)
        server.create("p")
        server.create("q")
        return server

    return start


@pytest.mark.parametrize("keep, parked, buffer, kept", [
    (True, True, b"", True), (True, False, b"", False), (True, True, GOOD, False),
    (False, True, b"", False)])
def test_a_crowd_keeps_the_turn_of_those_whose_threads_sleep(keep, parked, buffer, kept):
    connection = idpot.Connection.__new__(idpot.Connection)
    crowd = idpot.Crowd()
    connection.turn = threading.Lock()
    connection.turn.acquire()
    connection.parked = parked
    with socket.socketpair()[0] as connection.request:
        connection.descriptor = connection.request.fileno()
        connection.incoming = types.SimpleNamespace(buffer=buffer)
        connection.end_turn(keep, crowd)
        assert (connection in crowd.members.values(), connection.turn.locked()) == (kept, kept)
        crowd.end()
    assert not connection.turn.locked()


def test_a_crowd_reads_of_who_has_the_descriptor_of_one_that_has_left():
    crowd = idpot.Crowd()
    descriptors = set()
    for _ in range(2):
        jobs = []
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptors.add(ours.fileno())
            crowd.add(types.SimpleNamespace(
                descriptor=ours.fileno(), turn=threading.Lock(), serve_crowded=lambda: "a job"))
            theirs.sendall(GOOD)
            crowd.read(1, jobs)
        assert jobs == ["a job"]
    assert len(descriptors) == 1
    crowd.end()


def test_a_parked_thread_sleeps_on_while_its_connection_is_served():
    connection = idpot.Connection.__new__(idpot.Connection)
    connection.server = types.SimpleNamespace(turn_limit=0.2)
    connection.turn = threading.Lock()
    connection.turn.acquire()
    connection.parked = True
    connection.state = (idpot.IDLE, 0.0, None)
    with ThreadPoolExecutor(1) as pool:
        sleeps = pool.submit(connection.next_turn)
        for number in range(10):
            passes(0.1)
            connection.state = (idpot.IDLE, number, None)       # it was served
        still = not sleeps.done()
        assert sleeps.result(10) is False       # nothing happens any more: a fault kept the turn
    assert still


@pytest.mark.slow
class TestCrowd:
    def test_each_id_is_given_once_and_all_turns_and_descriptors_come_back(self, counted):
        server = counted()
        before = metrics(server)["process_open_fds"]
        with Quick(server) as crowd:
            crowd.more()
        assert sorted(crowd.ids) == list(range(1, len(crowd.ids) + 1))
        wait_until(lambda: metrics(server)["idpot_connections"] == 1)
        wait_until(lambda: metrics(server)["parked"] == 0)      # which asks may be parked itself
        after = metrics(server)
        assert (after["kept"], after["watched"]) == (0, 0)
        wait_until(lambda: metrics(server)["process_open_fds"] <= before)

    def test_whoever_was_parked_is_served_alone_afterwards(self, counted):
        server = counted()
        with Quick(server) as crowd:
            crowd.more()
            crowd.stopping.set()
            crowd.thread.join()
            wait_until(lambda: metrics(server)["parked"] == 0)
            for client in crowd.clients:        # a turn that was not given back would hold it
                client.settimeout(2)
                client.sendall(GOOD)
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")

    def test_pipelined_requests_split_at_any_byte_are_answered_in_order(self, counted):
        server = counted()
        data = TWO + GOOD + TWO
        with Quick(server), connections(server, 1, GOOD) as [client]:
            client.recv(1000)
            last = 0
            for split in range(1, len(data), 7):
                client.sendall(data[:split])
                wait_until(lambda: metrics(server)["parked"])
                client.sendall(data[split:])
                ids = []
                while len(ids) < 5:
                    ids += issued(client.recv(65536))
                assert ids == sorted(ids) and ids[0] > last
                last = ids[-1]

    def test_ten_thousand_pipelined_requests_come_in_order_beside_parked_ones(self, counted):
        server = counted()
        with Quick(server) as crowd, connections(server, 1) as [client]:
            ids = issued(pipelined(client, GOOD * 10000))
            crowd.more()
        assert len(ids) == 10000
        assert ids == sorted(ids)
        assert len(set(ids + crowd.ids)) == len(ids + crowd.ids)

    @pytest.mark.parametrize("request_, status, closes", [
        (b"POST /id/q HTTP/1.0\r\n\r\n", 200, True),
        (b"POST /id/q HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, False),
        (b"POST /id/q HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
         200, False),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200, False),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200, False),
        (b"GET /id/none HTTP/1.1\r\nHost: x\r\n\r\n", 404, False),
        (b"POST /id/q HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n", 400, True),
        (b"POST /id/q HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", 408, True),
        (b"POST /id/q HTTP/1.1\r\nHost: x", 408, True)])
    def test_a_member_sends_something_else(self, counted, request_, status, closes):
        server = counted(RequestTimeout=1)
        with Quick(server) as crowd, connections(server, 1, GOOD) as [client]:
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            client.sendall(request_)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            crowd.more()
            if closes:
                assert until_closed(client) == b""
            else:
                client.sendall(GOOD)
                assert b"HTTP/1.1 200 " in client.recv(65536)

    def test_a_member_waits_for_100_continue(self, counted):
        server = counted()
        with Quick(server), connections(server, 1, GOOD) as [client]:
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            client.sendall(TWO[:-11] + b"\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"count=2")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")

    def test_a_silent_member_is_closed_at_its_time_and_makes_room_before(self, counted):
        server = counted(IdleTimeout=2, MaxConnections=34)
        with Quick(server) as crowd, connections(server, 1, GOOD) as [client]:
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            with within(3.5):
                assert until_closed(client) == b""
            with connections(server, 2, GOOD) as [silent, other]:
                assert other.recv(1000).startswith(b"HTTP/1.1 200 ")
                assert silent.recv(1000).startswith(b"HTTP/1.1 200 ")
                with within(2):
                    assert server.next("q")
            crowd.more()
        assert crowd.others == []

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_stop_answers_all(self, counted, number):
        server = counted()
        with Quick(server) as crowd:
            crowd.more()
            with within(3):
                assert server.stop(number) == 0
        assert crowd.others == []
        assert sorted(crowd.ids) == list(range(1, len(crowd.ids) + 1))
        server.start()
        assert server.next("p") == len(crowd.ids) + 1

    def test_a_second_signal_ends_a_stop_at_once(self, counted, database, mysql):
        server = counted(**mysql())
        with Quick(server) as crowd, session_on(database) as session:
            session.execute("LOCK TABLES host.pot_p WRITE")
            server.process.terminate()
            passes(0.5)
            with within(2):
                assert server.stop() == 0
        assert len(set(crowd.ids)) == len(crowd.ids)

    def test_idpot_is_stopped_for_a_second(self, counted):
        server = counted()
        with Quick(server) as crowd:
            server.process.send_signal(signal.SIGSTOP)
            passes(1.5)
            server.process.send_signal(signal.SIGCONT)
            crowd.more()
        assert sorted(crowd.ids) == list(range(1, len(crowd.ids) + 1))

    def test_the_database_is_killed_and_comes_back(self, counted, database, mysql):
        server = counted(**mysql(Timeout=2))
        with Quick(server) as crowd:
            with killed(database), within(4):
                wait_until(lambda: len(crowd.others) >= 32)     # each has its 503
            with within(1.5):
                crowd.more()
        assert set(crowd.others) == {503}
        assert len(set(crowd.ids)) == len(crowd.ids)

    def test_a_crowd_may_last_longer_than_any_deadline(self, counted):
        server = counted(Timeout=1, IdleTimeout=1)
        with Quick(server) as crowd:
            passes(5)
            crowd.more()
            assert metrics(server)["idpot_connections"] == 33
        assert crowd.others == []
        assert sorted(crowd.ids) == list(range(1, len(crowd.ids) + 1))

    def test_idpot_is_stopped_for_longer_than_any_deadline(self, counted):
        server = counted(Timeout=1, IdleTimeout=4)
        with Quick(server) as crowd, connections(server, 8, GOOD) as members:
            for client in members:
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            server.process.send_signal(signal.SIGSTOP)
            for client in members:
                client.sendall(GOOD)
            passes(8)
            server.process.send_signal(signal.SIGCONT)
            for client in members:
                assert re.match(b"HTTP/1.1 (200|503) ", client.recv(1000))
            crowd.more()

    def test_a_surprise_while_a_worker_reads_or_answers_ends_its_connection_alone(self, counted):
        server = counted("""
ask = idpot.ask
def ask_or_fail(head, *rest):
    if b"two" in head.token:
        raise MemoryError
    if b"three" in head.token:
        return idpot.Question(head.pot, 1, render=lambda _: 1 / 0)
    return ask(head, *rest)
idpot.ask = ask_or_fail
answer_error = idpot.Connection.answer_error
idpot.Connection.answer_error = lambda self, *rest: (
    1 / 0 if b"two" in self.head.token else answer_error(self, *rest))""")
        with Quick(server) as crowd, connections(server, 2, GOOD) as clients:
            for client, token in zip(clients, (b"two", b"three")):
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
                client.sendall(GOOD[:-2] + b"Authorization: Bearer %s\r\n\r\n" % token)
                assert until_closed(client) == b""
            crowd.more()
        assert set(crowd.others) <= {500}       # of those that shared the statement
        wait_until(lambda: metrics(server)["idpot_connections"] == 1)

    def test_a_statement_that_hangs_does_not_keep_what_its_crowd_asks_meanwhile(
            self, counted, database, mysql):
        server = counted(**mysql())
        with Quick(server) as crowd, connections(server, 8, GOOD) as members:
            for client in members:
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            with session_on(database) as session:
                session.execute("LOCK TABLES host.pot_p WRITE")
                wait_until(lambda: waiting_for_lock(database, "pot_p"))
                with within(0.5):
                    for client in members:
                        client.sendall(b"POST /id/q HTTP/1.1\r\nHost: x\r\n\r\n")
                    for client in members:
                        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            crowd.more()

    def test_a_long_list_of_pots_does_not_keep_what_its_crowd_asks_meanwhile(self, counted):
        server = counted("""
def pots(store):
    while not idpot.threading.Event().wait(0.01):
        yield "p", 1
idpot.SqliteStore.pots = pots""", Timeout=2)
        with Quick(server), connections(server, 2, GOOD) as [lists, member]:
            for client in (lists, member):
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            lists.sendall(b"GET /pot HTTP/1.1\r\nHost: x\r\n\r\n")
            with within(1):
                wait_until(lambda: metrics(server)["kept"] == 0)
                member.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
                assert member.recv(1000).startswith(b"HTTP/1.1 404 ")
            assert lists.recv(1000).startswith(b"HTTP/1.1 503 ")

    def test_where_no_descriptor_can_be_watched_the_threads_read(self, counted):
        server = counted("""
class Epoll:
    def __init__(self, epoll=idpot.select.epoll):
        self.epoll = epoll()
        self.poll, self.unregister, self.close = (
            self.epoll.poll, self.epoll.unregister, self.epoll.close)
    def register(self, descriptor, events):
        if descriptor % 3 == 0:
            raise OSError("planted")
        self.epoll.register(descriptor, events)
idpot.select.epoll = Epoll""")
        with Quick(server) as crowd:
            crowd.more()
        assert sorted(crowd.ids) == list(range(1, len(crowd.ids) + 1))


# ---------------------------------------------------------------- tokens and web pages

TOKEN_REQUESTS = [
    ("POST", "/id/p", None), ("GET", "/pot", None),
    ("POST", "/pot/create", "name=p"), ("POST", "/pot/raise", "name=p&min=5"),
    ("GET", "/pot/create", None), ("GET", "/nowhere", None)]
WRONG_TOKENS = [
    "", "Bearer", "sesame", "Basic sesame", "Bearer sesam", "Bearer sesamee", "Bearer SESAME",
    "Bearer x sesame", "Bearer sesam\xe9", "Bearer sesame sesame",
]
OPEN, CLOSED = [200, 200, 409, 200, 404, 404], [401, 401, 401, 401, 401, 404]


def statuses_with(server, authorization):
    """The statuses of TOKEN_REQUESTS with that header; no answer may show a token."""
    seen = []
    for request in TOKEN_REQUESTS:
        status, text, headers = server.request(*request, {"Authorization": authorization})
        assert headers["WWW-Authenticate"] == ("Bearer" if status == 401 else None)
        assert not re.search("sesam|shibb", text, re.IGNORECASE)
        seen.append(status)
    return seen


def assert_no_token_is_told(server):
    """Stops the server; neither its command line nor its log holds a token."""
    command = Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert server.stop() == 0
    assert not re.search("sesam|shibb", command + server.errors(), re.IGNORECASE)


ORIGIN_REQUESTS = [     # method, target, form, status with the right token
    ("POST", "/id/p", None, 200),
    ("GET", "/id/p", None, 200),
    ("HEAD", "/pot/p", None, 204),
    ("GET", "/pot", None, 200),
    ("POST", "/pot/create", "name=q", 201),
    ("POST", "/pot/raise", "name=p&min=9", 200),
    ("GET", "/healthz", None, 200),
    ("GET", "/metrics", None, 200),
    ("OPTIONS", "/pot/raise", None, 405),
    ("GET", "/nowhere", None, 404),
]

MALFORMED = [       # what is sent, and what the access log has for its request line
    (b"Authorization: Bearer sesame\r\n\r\n", "Authorization..."),
    (b"Proxy-Authorization: sesame\r\n\r\n", "Proxy-Authorization..."),
    (b"GET /id/p HTTP/1.1 Authorization: Bearer sesame\r\nHost: x\r\n\r\n",
     "GET /id/p HTTP/1.1 Authorization..."),
    (b"GET /id/p HTTP/1.1\tAuthorization: sesame\r\n\r\n",
     r"GET /id/p HTTP/1.1\x09Authorization..."),
    (b"GET /id/p\0Bearer sesame HTTP/1.1\r\nHost: x\r\n\r\n", r"GET /id/p\x00Bearer..."),
    (b"GET /id/p HTTP/1.1\nAuthorization: Bearer sesame\r\n\r\n", "GET /id/p HTTP/1.1"),
    (b"GET /id/p HTTP/1.1\r\nX : y\r\nAuthorization: Bearer sesame\r\n\r\n", "GET /id/p HTTP/1.1"),
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n\r\n",
     "GET /id/p HTTP/1.1"),
    (b"GET /%s HTTP/9.9\r\nHost: x\r\n\r\n" % (b"a" * 3000), f"GET /{'a' * 3000} HTTP/9.9"),
]


ODD_TEXTS = [
    b"\x00\x1b]0;x\x07\x9b\x7f\"\\\n\n",
    b'GET /"\\\x1b[31m\x07\xff\x85 HTTP/1.1\r\nHost: x\r\n\r\n',
    b"POST /pot/create HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n"
    b"Content-Length: 19\r\n\r\nname=a%0d%0a%1b%22+",
    b'POST /id/p HTTP/1.1\r\nHost: x\r\nReferer: q" "200" \\\r\n\r\n',
    b'POST /id/p HTTP/1.1\r\nHost: x\r\nUser-Agent: q" \\ \xe9\xc2\x85\t\xff\r\n\r\n',
]


class TestTokens:
    @pytest.mark.parametrize("tokens, admin, without, answers", [
        ({"Token": "sesame"}, "sesame", CLOSED, {"Bearer sesame": OPEN, "bearer  sesame": OPEN}),
        ({"Token": "sesame", "AdminToken": "shibboleth"}, "shibboleth", CLOSED, {
            "Bearer sesame": [200, 200, 401, 401, 404, 404],
            "Bearer shibboleth": [401, 401, 409, 200, 401, 404]}),
        ({"AdminToken": "shibboleth"}, "shibboleth", [200, 200, 401, 401, 404, 404], {
            "Bearer shibboleth": OPEN})],
        ids=["Token", "both", "AdminToken"])
    def test_which_token_is_asked_for_what(self, run, tokens, admin, without, answers):
        server = run(**tokens)
        server.request("POST", "/pot/create", "name=p", {"Authorization": f"Bearer {admin}"})
        for wrong in WRONG_TOKENS:
            assert statuses_with(server, wrong) == without
        for right, expected in answers.items():
            assert statuses_with(server, right) == expected
        assert server.answer("GET", "/healthz") == (200, "ok")
        assert_no_token_is_told(server)

    @pytest.mark.parametrize("method, target, form, served", ORIGIN_REQUESTS)
    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8080", ""])
    def test_a_web_page_is_refused(self, http_pot, method, target, form, served, origin):
        pots = http_pot.request("GET", "/pot")[1]
        for headers in ({"Origin": origin}, {"Origin": origin, "Authorization": "Bearer"}):
            status, text, answered = http_pot.request(method, target, form, headers)
            assert status == 403
            assert "Access-Control-Allow-Origin" not in answered
        assert http_pot.request("GET", "/pot")[1] == pots

    def test_a_web_page_is_refused_without_the_right_token_and_served_with_it(self, run):
        server = run(Token="sesame")
        right = {"Authorization": "Bearer sesame"}
        server.request("POST", "/pot/create", "name=p", right)
        for wrong in WRONG_TOKENS:
            headers = {"Origin": "http://page.example", "Authorization": wrong}
            for method, target, form, _ in ORIGIN_REQUESTS:
                assert server.request(method, target, form, headers)[0] == 403
        assert server.request("GET", "/pot", headers=right)[1] == "p\t0\n"
        for method, target, form, served in ORIGIN_REQUESTS:
            headers = {"Origin": "http://page.example", **right}
            assert server.request(method, target, form, headers)[0] == served
        assert_no_token_is_told(server)

    def test_a_web_page_with_the_admin_token_is_served_only_what_asks_for_that(self, run):
        server = run(AdminToken="shibboleth")
        headers = {"Origin": "http://page.example", "Authorization": "Bearer shibboleth"}
        for (method, target, form), status in zip(TOKEN_REQUESTS, [403, 403, 201, 200]):
            assert server.request(method, target, form, headers)[0] == status
        assert server.answer("GET", "/pot") == (200, "p\t5\n")
        assert_no_token_is_told(server)

    def test_the_log_shows_no_token_of_a_malformed_request(self, run):
        server = run()
        for data, _ in MALFORMED:
            assert len(statuses(http_exchange(server, data))) == 1
        assert server.stop() == 0
        assert [line for line, _, _ in access_lines(server)] == [logged for _, logged in MALFORMED]
        assert "sesame" not in server.errors()

    def test_the_log_shows_no_token_that_stands_where_none_belongs(self, run):
        server = run(Token=r'"a\"sesame"', AdminToken=r'"a\"sesame+shibboleth"')
        for sent in (b'POST /id/o?access_token=a"sesame+shibboleth HTTP/1.1\r\nHost: x\r\n\r\n',
                     b'GET /id/o HTTP/1.1\r\nHost: x\r\nReferer: http://u:a"sesame@x/\r\n\r\n',
                     b'X-Auth: a"sesame\r\n\r\n'):
            http_exchange(server, sent)
        assert_no_token_is_told(server)
        assert server.errors().count("...") == 3

    @pytest.mark.parametrize("listen, settings, count", [
        ("0.0.0.0:0", {}, 1), ("0.0.0.0:0", {"Token": "sesame"}, 0),
        ("0.0.0.0:0", {"AdminToken": "sesame"}, 0), ("127.0.0.1:0", {}, 0)])
    def test_what_others_can_reach_is_warned_of(self, run, listen, settings, count):
        server = run(listen=listen, **settings)
        assert server.errors().count("0.0.0.0 is not a loopback address and no Token is") == count

    def test_every_answer_costs_one_log_line_that_goaccess_reads_and_nothing_raw(self, run):
        server = run()
        server.create("p")
        answered = []
        for data in [case.data for case in HOSTILE] + ODD_TEXTS:
            answered += statuses(http_exchange(server, data))
        assert server.stop() == 0
        assert re.fullmatch(rb"[ -~\n]*", Path(server.stderr).read_bytes())
        lines = access_lines(server)
        assert [int(status) for _, status, _ in lines] == [
            201, *[status for status in answered if status != 100]]
        assert lines[-1][2] == r'q\" \\ \xe9\xc2\x85\x09\xff'
        assert "Traceback" not in server.errors()
        log = re.findall(r"(?m)^127\.0\.0\.1 .{,3999}\n", server.errors())     # more are too much
        Path(server.folder, "log").write_text("".join(log))
        subprocess.run(
            [needs("goaccess"), "log", "--log-format=COMBINED", "--no-global-config",
             "--output=out.json"], cwd=server.folder, check=True, capture_output=True, timeout=60)
        found = json.loads(Path(server.folder, "out.json").read_text())["general"]
        assert (found["valid_requests"], found["failed_requests"]) == (len(log), 0)


# --------------------------------------------------- faults: recorded histories and their checker

PATIENCE = 2    # seconds: idpot's Timeout in these tests


def load_prove():
    """contrib/prove.py as a module; it is a program, and contrib/ is no package."""
    spec = importlib.util.spec_from_file_location("prove", f"{HERE}/contrib/prove.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prove = load_prove()
Answer = prove.Answer

# A thousand answers of up to ten IDs, four at a time.
CLEAN_RUN = []
for number in range(1, 1001):
    CLEAN_RUN.append(Answer(number, number + 3.5, 10 * number, 10 * number + number % 10))


@pytest.mark.parametrize("history", [
    pytest.param(CLEAN_RUN, id="clean"),
    pytest.param([*CLEAN_RUN, Answer(500, 501, 20, 20, status=503)], id="a 503 has no IDs"),
    pytest.param([Answer(0, 2, 2, 2), Answer(1, 3, 1, 1)], id="overlapping in time"),
    pytest.param([Answer(0, 1, 5, 9), Answer(1, 2, 1, 4)], id="asked for when the other ended"),
    pytest.param([Answer(0, 1, MAX_ID - 1, MAX_ID - 1), Answer(2, 3, MAX_ID, MAX_ID)],
                 id="the greatest IDs"),
])
def test_checker_accepts(history):
    assert prove.check_history(history) == []


# A violation is written here as its kind and the places of the two answers in the history.
@pytest.mark.parametrize("history, violations", [
    pytest.param([
        Answer(0, 9, 1, 9),
        Answer(1, 9, 10, 10),
        Answer(1, 9, 10, 10),
    ], [("repeat", 1, 2)], id="duplicate"),
    pytest.param([
        Answer(0, 9, 1, 9),
        Answer(1, 9, 10, 10),
        Answer(2, 9, 9, 12),
    ], [("repeat", 0, 2), ("repeat", 2, 1)], id="overlapping batch"),
    pytest.param([Answer(0, 9, 1, 2**40), Answer(1, 9, 1000, 2000)],
                 [("repeat", 0, 1)], id="range inside a range"),
    pytest.param([Answer(0, 1, 7, 8), Answer(0, 5, 9, 9), Answer(2, 3, 5, 5), Answer(4, 5, 6, 6)],
                 [("order", 0, 2), ("order", 0, 3)], id="order inversion"),
    pytest.param([Answer(0, 1, 5, 5), Answer(0, 1, 0, 999, status=503), Answer(2, 3, 5, 5)],
                 [("repeat", 0, 2)], id="after a refused range"),
    pytest.param([*CLEAN_RUN, Answer(500, 501, 20, 20)],
                 [("repeat", 1, 1000), ("order", 495, 1000)], id="planted in a long one"),
])
def test_checker_finds(history, violations):
    shuffled = random.Random(4).sample(history, len(history))
    found = prove.check_history(shuffled)
    assert found == [(kind, history[a], history[b]) for kind, a, b in violations]
    for size in (1, 2, 50):     # as prove.py looks at it: so many answers at a time
        growing = prove.GrowingHistory()
        ended = sorted(history, key=lambda answer: answer.end)
        found = []
        while ended:
            window, ended = ended[:size], ended[size:]
            to_come = [answer.start for answer in ended]
            found += growing.add(window, min(to_come, default=math.inf))
        assert found


class Load:
    """A with block in which twelve clients ask for IDs of one pot, each over its own connection.

    Client n asks the n-th server in turn, for one ID; client 0 asks for five at once, and each
    third client has its connection closed each time. The status is 200 for a whole answer only,
    "lost" where the connection broke before one, and another text for what must not be.
    """

    def __init__(self, servers, pot="p", patience=PATIENCE, **headers):
        self.servers = servers
        self.pot = pot
        self.patience = patience
        self.headers = headers
        self.recovered = math.inf
        self.stopping = threading.Event()
        self.deadline = time.monotonic() + 120
        self.seen = [[] for _ in range(12)]
        self.threads = [threading.Thread(target=self.client, args=(n,)) for n in range(12)]

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
        count = 1 if number else 5
        headers = {**self.headers, "Connection": "close" if number % 3 == 2 else "keep-alive"}
        connection = None
        while not self.stopping.is_set() and time.monotonic() < self.deadline:
            if not connection:
                connection = HTTPConnection("127.0.0.1", server.port, timeout=self.patience + 5)
            start = time.monotonic()
            status, first = self.ask(connection, count, headers)
            end = time.monotonic()
            self.seen[number].append(Answer(start, end, first, first + count - 1, status, number))
            if status in ("lost", "hung"):
                connection.close()
                connection = None       # a server that was started again may have another port
            if status != 200:
                self.stopping.wait(0.02)

    def ask(self, connection, count, headers):
        """Returns the status and the first ID."""
        query = f"?count={count}" if count > 1 else ""
        try:
            connection.request("POST", f"/id/{self.pot}{query}", headers=headers)
            response = connection.getresponse()
            body = response.read()
        except IncompleteRead as error:
            return f"half an answer: {error.partial!r}", 0
        except TimeoutError:
            return "hung", 0
        except (OSError, HTTPException):
            return "lost", 0
        if response.status != 200:
            return response.status, 0
        digits = re.match(rb"[0-9]+", body)
        first = int(digits[0]) if digits else 0
        if body != prove.right_body("count" if count > 1 else "", count, first):
            return f"not an answer: {body!r}", 0
        return 200, first

    def history(self):
        """What all clients saw, in the order of the requests."""
        answers = itertools.chain(*self.seen)
        return sorted(answers, key=lambda answer: answer.start)

    def statuses_since(self, moment):
        """The statuses of the requests that began after that moment."""
        return collections.Counter(
            answer.status for answer in self.history() if answer.start > moment)

    def served_since(self, moment):
        """When each client was served first after that moment; None before all were."""
        firsts = []
        for answers in self.seen:
            ends = [answer.end for answer in answers[-500:]
                    if answer.status == 200 and answer.end > moment]
            if not ends:
                return None
            firsts.append(min(ends))
        return firsts

    def refused(self):
        """Whether the last that each client got is a 503."""
        return all(answers and answers[-1].status == 503 for answers in self.seen)

    def issued(self):
        """How many IDs were answered."""
        return sum(answer.last - answer.first + 1
                   for answer in self.history() if answer.status == 200)

    def wait_for(self, ids):
        """Waits until each client was served, and all together got so many IDs."""
        wait_until(lambda: self.served_since(0) and self.issued() > ids, 20)

    def more(self, ids=200):
        """Waits until each client was served again, and all together got so many IDs more."""
        since, wanted = time.monotonic(), self.issued() + ids
        wait_until(lambda: self.served_since(since) and self.issued() >= wanted, 30)

    def all_served(self):
        """How many IDs were answered; every request was, and rightly."""
        assert prove.check_history(self.history()) == []
        assert self.statuses_since(0).keys() == {200}
        return self.issued()

    def recover(self):
        """Waits until each client is served, within 15 s, and for 200 answers more."""
        since = time.monotonic()
        firsts = wait_until(lambda: self.served_since(since), 20)
        self.recovered = max(firsts)
        wait_until(lambda: self.statuses_since(self.recovered).total() > 200)
        assert self.recovered - since < 15

    def verdict(self, counter, may_lose=()):
        """Asserts what must hold after faults and the last recovery."""
        history = self.history()
        statuses = self.statuses_since(0)
        longest = max(answer.end - answer.start for answer in history)
        assert prove.check_history(history) == []
        assert statuses.keys() <= {200, 503, "lost"}
        assert self.statuses_since(self.recovered).keys() == {200}
        for answer in history:
            if answer.status == "lost":
                assert answer.client % len(self.servers) in may_lose
        assert counter >= max(answer.last for answer in history)
        assert longest < self.patience + 1


@contextlib.contextmanager
def within(seconds):
    """The block takes less than so long."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def status_of_next(server, pot):
    """The status with which an ID of the pot is answered."""
    return server.request("POST", f"/id/{pot}")[0]


def healthy(server):
    return server.request("GET", "/healthz")[:2] == (200, "ok")


def events(server):
    """(level, text) of each event on the server's stderr."""
    return re.findall(r"^[-0-9]+ [:0-9]+ idpot\[\d+\] ([A-Z]+) (.*)$", server.errors(), re.M)


# ---------------------------------------------------------------------- faults: a database server


@pytest.fixture(scope="module", params=["MyISAM", "InnoDB"])
def pair(request, database, tmp_path_factory):
    """Two idpots, kept over all faults: a thread stuck in one fault is missed in the next."""
    database.sql("CREATE USER IF NOT EXISTS clerk IDENTIFIED BY 'p'")   # read_only spares root
    database.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO clerk")
    idpots = []
    for _ in range(2):
        idpots.append(Idpot(
            tmp_path_factory.mktemp("idpot"), Timeout=PATIENCE, LogFile="access.log",
            Engine=request.param, ConnectString=database.dsn(credentials="clerk:p")))
    yield types.SimpleNamespace(engine=request.param, idpots=idpots)
    for one in idpots:
        one.stop(signal.SIGKILL)


def until_refused(trouble):
    """The fault that the database is in that trouble until every client was refused."""
    def fault(database, load):
        with trouble(database):
            wait_until(load.refused)

    fault.__name__ = trouble.__name__
    return fault


def database_restarted(database, load):
    with down(database):
        pass


def kill_connections(root, user):
    """Kills the connections that the user's idpots have; returns how many there were."""
    cursor = root.cursor()
    cursor.execute("SELECT id FROM information_schema.processlist "
                   f"WHERE user = '{user}' AND db IS NOT NULL")
    numbers = [row[0] for row in cursor.fetchall()]
    for number in numbers:
        with contextlib.suppress(Exception):    # it ended by itself
            cursor.execute(f"KILL {number}")
    return len(numbers)


def connections_killed(database, load):
    with contextlib.closing(database.connect()) as root:
        for _ in range(5):
            wait_until(lambda: kill_connections(root, "clerk"))
            load.recover()


def connections_used_up(database, load):
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(contextlib.closing(database.connect()))
        stack.callback(root.cursor().execute, "SET GLOBAL max_connections = 151")
        for _ in range(12):
            other = database.connect(user="clerk", password="p")
            stack.enter_context(contextlib.closing(other))
        root.cursor().execute("SET GLOBAL max_connections = 10")
        kill_connections(root, "clerk")
        wait_until(load.refused)


def hold(database, load, *statements):
    """Another session holds a lock until every client was refused; another pot is served."""
    other = f"other_{load.pot}"
    load.servers[0].create(other)

    def all_refused():
        for server in load.servers:
            with within(1):
                server.next(other)
        return load.refused()

    with contextlib.closing(database.connect(database="idpot")) as session:
        for statement in statements:
            session.cursor(buffered=True).execute(statement)
        for server in load.servers:
            server.next(other)      # may share a call with the locked pot, once
        wait_until(all_refused)


def table_locked(database, load):
    hold(database, load, f"LOCK TABLES `pot_{load.pot}` WRITE")


def row_locked(database, load):
    hold(database, load, "BEGIN", f"SELECT id FROM `pot_{load.pot}` FOR UPDATE")


def burned_under_load(pair, database, fault, may_lose=()):
    """Lets the fault happen under load, with all that must hold; returns how many IDs it burned."""
    pot = f"{fault.__name__}_{pair.engine}"
    pair.idpots[0].create(pot)
    with Load(pair.idpots, pot) as load:
        load.wait_for(ids=500)
        fault(database, load)
        load.recover()
    counter = database.sql(f"SELECT id FROM idpot.`pot_{pot}`")[0][0]
    load.verdict(counter, may_lose)
    for server in pair.idpots:
        assert healthy(server)
    return counter - load.issued()


def end_and_start_again(server, number, code):
    """The server gets the signal, ends in time with that exit code, and is started again."""
    with within(PATIENCE + 1):
        assert server.stop(number) == code
    server.start()


def waiting_for_lock(database, pot):
    """The statements that wait for a lock on the pot."""
    return database.sql("SELECT id FROM information_schema.processlist "
                        f"WHERE state LIKE 'Wait%' AND info LIKE '%{pot}%'")


@pytest.fixture(scope="module")
def busy_database():
    """A server with room for ten connections, which logs those that were not closed properly."""
    server = Database()
    server.sql("SET GLOBAL max_connections = 10")
    verbose = "log_error_verbosity = 3" if server.is_mysql else "log_warnings = 4"
    server.sql(f"SET GLOBAL {verbose}")
    server.sql("CREATE USER many IDENTIFIED BY 'p'")
    server.sql("CREATE USER few IDENTIFIED BY 'p' WITH MAX_USER_CONNECTIONS 3")
    server.sql("CREATE USER tidy IDENTIFIED BY 'p'")
    for user in ("many", "few", "tidy"):
        server.sql(f"GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO {user}")
    yield server
    server.remove()


class TestDatabaseFaults:
    @pytest.mark.slow
    @pytest.mark.parametrize("fault", [
        until_refused(killed), until_refused(hung), until_refused(read_only), database_restarted,
        connections_killed, connections_used_up, table_locked, row_locked],
        ids=lambda fault: fault.__name__)
    def test_fault_under_load(self, fault, pair, database):
        if fault is row_locked and pair.engine == "MyISAM":
            pytest.skip("MyISAM has no row locks")
        burned_under_load(pair, database, fault)

    @pytest.mark.slow
    @pytest.mark.parametrize("number, code, most", [
        (signal.SIGKILL, -signal.SIGKILL, 10),      # six clients have no more in flight
        (signal.SIGTERM, 0, 0)])
    def test_idpot_ended_under_load_burns_what_was_in_flight(
            self, number, code, most, pair, database):
        def ended(database, load):
            end_and_start_again(load.servers[0], number, code)

        ended.__name__ = number.name
        assert burned_under_load(pair, database, ended, may_lose=[0]) <= most

    def test_a_table_from_a_backup_while_serving(self, pair, database):
        pot = f"back_{pair.engine}"
        server = pair.idpots[1]
        server.create(pot)
        with Load([server], pot) as load:
            load.wait_for(ids=300)
            for statement in (
                    f"CREATE TABLE `backup_{pot}` LIKE `pot_{pot}`",
                    f"INSERT INTO `backup_{pot}` (id) VALUES (3)",
                    f"RENAME TABLE `pot_{pot}` TO `gone_{pot}`, `backup_{pot}` TO `pot_{pot}`"):
                database.sql(statement, database="idpot")
            load.recover()
        load.verdict(server.next(pot) - 1)
        warning = f" WARNING the counter of pot {pot} was set back to 3, but "
        wait_until(lambda: warning in server.errors())
        assert server.errors().count(warning) == 1

    def test_requests_whose_time_is_over_cost_no_id(self, pair, database):
        pot = f"late_{pair.engine}"
        server = pair.idpots[0]
        server.create(pot)
        first = server.next(pot)
        with contextlib.closing(database.connect(database="idpot")) as session:
            session.cursor().execute(f"LOCK TABLES `pot_{pot}` WRITE")
            request = functools.partial(status_of_next, server, pot)
            assert at_once(*[request] * 20) == [503] * 20
            wait_until(lambda: not waiting_for_lock(database, pot), PATIENCE + 3)
        assert server.next(pot) == first + 1

    def test_a_503_says_the_error_of_the_database_and_how_long_it_was_tried(self, pair, database):
        pot = f"told_{pair.engine}"
        server = pair.idpots[0]
        server.create(pot)
        for trouble, reason in [
                (read_only, r"[ -~]+ \(error 1290\), tried for 2 seconds\n"),
                (hung, r"[ -~]+(did not answer in|\(error \d+\), tried for) 2 seconds\n")]:
            with trouble(database):
                status, text, headers = server.request("POST", f"/id/{pot}")
            assert (status, headers["Retry-After"]) == (503, "1")
            assert re.fullmatch(reason, text)
            wait_until(lambda: status_of_next(server, pot) == 200)

    @pytest.mark.parametrize("user", ["many", "few"])
    def test_twenty_busy_pots_share_the_connections_that_there_are(self, user, run, busy_database):
        server = run(ConnectString=busy_database.dsn(credentials=f"{user}:p"))
        pots = [f"{user}{number}" for number in range(20)]
        for pot in pots:
            server.create(pot)

        def client(pot):
            return [server.next(pot) for _ in range(20)]    # which asserts status 200

        with contextlib.ExitStack() as stack:
            for _ in range(4):      # which leaves six of ten; root alone may have one more
                stack.enter_context(contextlib.closing(busy_database.connect()))
            clients = [functools.partial(client, pot) for pot in pots]
            for ids in at_once(*clients):
                assert ids == list(range(1, 21))
        assert "Traceback" not in server.errors()

    def test_a_clean_stop_closes_its_connections_to_the_database(self, run, busy_database):
        server = run(ConnectString=busy_database.dsn(credentials="tidy:p"))
        pots = [f"stop{number}" for number in range(8)]
        for pot in pots:
            server.create(pot)
        clients = [functools.partial(server.next, pot) for pot in pots]
        at_once(*clients)
        assert server.stop() == 0
        wait_until(lambda: busy_database.sql(
            "SELECT id FROM information_schema.processlist WHERE user = 'tidy'") == [])
        with open(busy_database.log) as file:
            assert re.findall("Aborted connection .* user: 'tidy'.*", file.read()) == []


# ---------------------------------------------------------------- servers that may issue IDs

EIGHT = ["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"]


class Proxy(socketserver.ThreadingTCPServer):
    """Relays TCP to a port, each piece `delay` late; new connections only if `answering` is set,
    and no more those that are older than the last of the `losses`."""
    daemon_threads, block_on_close = True, False

    def __init__(self, port, delay=0.0):
        super().__init__(("127.0.0.1", 0), None)
        self.target, self.delay, self.port = port, delay, self.server_address[1]
        self.answering = threading.Event()
        self.answering.set()
        self.losses = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,)).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def finish_request(self, client, _):
        if self.answering.wait(30):
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                other = {client: server, server: client}
                losses = self.losses
                while True:
                    for end in select.select([client, server], [], [])[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        time.sleep(self.delay)
                        if losses == self.losses:
                            other[end].sendall(data)


def on_servers(*ports, engine="InnoDB", timeout=4):
    """The settings for idpots of root on the servers at the ports."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    return {"Timeout": timeout, "LogFile": "access.log", "Engine": engine,
            "ConnectString": f"root@tcp({addresses})/idpot"}


def answers_at_once(server):
    """The (status, text) for an ID of each of the eight pots, asked for together."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda pot: server.answer("POST", f"/id/{pot}"), EIGHT))


def burst(server, database):
    """As answers_at_once(), behind reads that wait for locked tables, and of which none shares a
    connection: eight are in use then."""
    tables = " WRITE, pot_".join(EIGHT)
    with ThreadPoolExecutor(8) as pool, session_on(database) as session:
        session.execute(f"LOCK TABLES pot_{tables} WRITE")
        reads = [pool.submit(server.answer, "GET", f"/id/{pot}") for pot in EIGHT]
        for pot in EIGHT:
            wait_until(lambda: waiting_for_lock(database, f"pot_{pot}"), 3)
        session.execute("UNLOCK TABLES")
        assert [read.result()[0] for read in reads] == [200] * 8
    return answers_at_once(server)


def eight_connections(run, database, settings):
    """An idpot with eight connections to the database, each of which has given an ID."""
    server = run(**settings)
    for pot in EIGHT:
        server.create(pot)
    assert burst(server, database) == [(200, "1")] * 8
    return server


@pytest.fixture(scope="module")
def two_servers():
    """Two servers that know nothing of each other."""
    both = [Database("--innodb-lock-wait-timeout=20") for _ in range(2)]
    yield both
    for server in both:
        server.remove()


def emptied(server):
    server.sql("DROP DATABASE IF EXISTS idpot")
    server.sql("CREATE DATABASE idpot")
    return server


@pytest.fixture
def first(two_servers):
    return emptied(two_servers[0])


@pytest.fixture
def second(two_servers):
    return two_servers[1]


@contextlib.contextmanager
def session_on(database):
    """The cursor of a connection to the database idpot."""
    with contextlib.closing(database.connect(database="idpot")) as connection:
        yield connection.cursor(buffered=True)


def loaded_from(first, second):
    """Makes the second server what a replica of the first would be, and then writable."""
    second.sql("SET GLOBAL read_only = 1")
    emptied(second)
    for (table,) in first.sql("SHOW TABLES FROM idpot"):
        [(value,)] = first.sql(f"SELECT id FROM idpot.{table}")
        second.sql(f"CREATE TABLE idpot.{table} (id BIGINT UNSIGNED NOT NULL) ENGINE = InnoDB")
        second.sql(f"INSERT INTO idpot.{table} VALUES ({value})")
    second.sql("SET GLOBAL read_only = 0")


def passes(seconds):
    """Waits so long: the time for which a connection is believed, say."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end)


def test_connections_of_root_give_no_id_later_than_a_second_after_read_only(run, first):
    server = eight_connections(run, first, on_servers(first.port, timeout=2))
    with read_only(first):
        assert server.answer("POST", "/pot/raise", "name=p0&min=9")[0] == 503
        passes(1.5)
        for status, text in [*answers_at_once(server), server.answer("GET", "/healthz")]:
            assert status == 503
            assert "read-only" in text
    wait_until(lambda: healthy(server))
    assert burst(server, first) == [(200, "2")] * 8


@pytest.mark.slow
def test_a_statement_that_waited_while_its_server_was_demoted_gives_no_id(run, first):
    server = run(**on_servers(first.port, timeout=4))
    server.create("held", 41)
    assert server.next("held") == 42
    with session_on(first) as session, ThreadPoolExecutor(1) as pool, read_only(first):
        first.sql("SET GLOBAL read_only = 0")
        session.execute("FLUSH TABLES WITH READ LOCK")
        answer = pool.submit(server.answer, "POST", "/id/held")
        wait_until(lambda: waiting_for_lock(first, "pot_held"))
        session.execute("SET GLOBAL read_only = 1")
        session.execute("UNLOCK TABLES")
        status, text = answer.result()
        assert (status, "read-only" in text) == (503, True)
    assert server.next("held") == 43


@pytest.mark.slow
def test_no_id_repeats_when_a_server_is_demoted_and_another_promoted(run, first, second):
    idpots = [run(**on_servers(first.port, second.port)) for _ in range(2)]
    idpots[0].create("moved")
    loaded_from(first, second)
    second.sql("SET GLOBAL read_only = 1")
    with read_only(first):      # until the load has ended: it would find this one again
        first.sql("SET GLOBAL read_only = 0")
        with Load(idpots, "moved", patience=4) as load:
            first.sql("SET GLOBAL read_only = 1")
            passes(1.5)
            loaded_from(first, second)
            idpots[1].stop()
            idpots[1].start()
            load.recover()
    load.verdict(second.sql("SELECT id FROM idpot.pot_moved")[0][0], may_lose=[1])


@pytest.mark.slow
def test_a_burst_is_served_at_once_after_the_first_address_hung(run, first, second):
    server = eight_connections(run, first, on_servers(first.port, second.port))
    loaded_from(first, second)
    with hung(first):
        wait_until(lambda: status_of_next(server, "p0") == 200)
        with within(1):
            assert answers_at_once(server)[1:] == [(200, "2")] * 7


@pytest.mark.slow
def test_a_locked_row_is_no_reason_to_leave_a_server(run, first, second):
    server = eight_connections(run, first, on_servers(first.port, second.port, timeout=2))
    loaded_from(first, second)
    second.sql("UPDATE idpot.pot_p0 SET id = 990")
    with session_on(first) as session:
        session.execute("BEGIN")
        session.execute("SELECT id FROM pot_p0 FOR UPDATE")
        assert [status_of_next(server, "p0") for _ in range(2)] == [503, 503]
    assert server.next("p0") < 20


def test_one_lost_connection_of_eight_holds_up_nobody_while_new_ones_hang(run, first):
    with Proxy(first.port) as proxy:
        server = eight_connections(run, first, on_servers(proxy.port, timeout=10))
        proxy.answering.clear()
        with session_on(first) as session:
            session.execute("LOCK TABLES pot_p0 WRITE")
            with connections(server, 1, b"POST /id/p0 HTTP/1.1\r\nHost: x\r\n\r\n") as [client]:
                [[number]] = wait_until(lambda: waiting_for_lock(first, "pot_p0"))
                session.execute(f"KILL {number}")
                session.execute("UNLOCK TABLES")
                with within(1.5):
                    assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_eight_connections_that_are_dead_cost_one_wait(run, first):
    with Proxy(first.port) as proxy:
        server = eight_connections(run, first, on_servers(proxy.port, timeout=4))
        proxy.losses += 1
        with within(3.5):
            assert server.next("p0") == 2
        with within(1):
            assert answers_at_once(server)[1:] == [(200, "2")] * 7


def test_a_row_lock_is_no_silence_of_a_server_that_was_silent_before(first, tmp_path):
    (tmp_path / "idpot.cfg").write_text(config_text(**on_servers(first.port, 1, timeout=1)))
    [store, *_] = idpot.MysqlStore.all(idpot.load_settings(f"{tmp_path}/idpot.cfg"))
    store.connect()
    store.create("p", 0)
    servers = store._servers
    servers._shunned[servers.chosen] = time.monotonic()
    with session_on(first) as session:
        session.execute("BEGIN")
        session.execute("SELECT id FROM pot_p FOR UPDATE")
        with pytest.raises(idpot.Retry, match="1205"):
            store.take([("p", 1, 0)])
    assert servers.chosen


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--innodb-read-only", "--transaction-read-only"])
def test_a_first_address_that_may_not_write_is_left_for_the_second(option, run, first, second):
    emptied(second)
    first.signal(signal.SIGTERM)
    first.options.append(option)
    try:
        first.start()
        server = run(**on_servers(first.port, second.port))
        server.create("p")
        assert server.next("p") == 1
        assert healthy(server)
        assert second.sql("SELECT id FROM idpot.pot_p") == [(1,)]
    finally:
        first.options.remove(option)
        with down(first):
            pass


class OddServer(socketserver.ThreadingTCPServer):
    """Sends the same bytes to whoever connects."""
    daemon_threads = True

    def __init__(self, data):
        super().__init__(("127.0.0.1", 0), None)
        self.data = data

    def finish_request(self, client, _):
        client.sendall(self.data)
        with contextlib.suppress(OSError):
            until_closed(client)


PURE = ("sys.modules['_mysql_connector'] = None",)     # the driver without C


@pytest.mark.parametrize("driver", [(), PURE], ids=["C", "pure"])
@pytest.mark.parametrize("data", [
    b"\0\0\0\0", b"\x01\0\0\0\x0a", b"\x06\0\0\0\x0a8.0.3", b"\x06\0\0\0\xff\x10\x04\xff\xfe\xfd",
    b"\x09\0\0\0\x0a8.0\0\x08\0\0\0", b"HTTP/1.1 400 Bad Request\r\n\r\n"],
    ids=["nothing", "version alone", "cut off", "no UTF-8", "no salt", "HTTP"])
def test_a_first_address_that_speaks_no_mysql_is_left_for_the_second(driver, data, run, first):
    with OddServer(data) as odd:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(odd.serve_forever, 0.05)
            try:
                ports = odd.server_address[1], first.port
                server = run(**on_servers(*ports), python=python_with(*driver))
                server.create("p")
                assert server.next("p") == 1
                assert "Traceback" not in server.errors()
            finally:
                odd.shutdown()


@pytest.mark.slow
def test_a_first_address_that_refuses_some_connections_does_not_make_it_flap(run, first, second):
    server = eight_connections(run, first, on_servers(first.port, second.port))
    loaded_from(first, second)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(contextlib.closing(first.connect())) for _ in range(8)]
        root = sessions[0].cursor()
        stack.callback(root.execute, "SET GLOBAL max_connections = 151")
        for pot in EIGHT:
            stack.enter_context(storm(server, 1, GOOD.replace(b"p", pot.encode())))
        seen = [metrics(server)]
        for limit in (151, 10):
            root.execute(f"SET GLOBAL max_connections = {limit}")
            kill_connections(sessions[0], "root")
            passes(3)
            seen.append(metrics(server))
    before, sound, after = [one["idpot_ids_issued_total"] for one in seen]
    assert after - sound > 0.5 * (sound - before)
    assert seen[2].get('idpot_db_errors_total{errno="1040"}', 0) < 30


@pytest.mark.parametrize("trouble", ["a firewall forgot them", "wait_timeout"])
def test_connections_that_nobody_used_for_a_minute_cost_no_wait(trouble, run, first, tmp_path):
    clock = ("import time", "real = time.monotonic",
             f"time.monotonic = lambda: real() + 70 * os.path.exists('{tmp_path}/later')")
    first.sql(f"SET GLOBAL wait_timeout = {1 if trouble == 'wait_timeout' else 28800}")
    with Proxy(first.port) as proxy:
        server = run(**on_servers(proxy.port, timeout=8), python=python_with(*clock))
        server.create("p")
        assert server.next("p") == 1
        first.sql("SET GLOBAL wait_timeout = 28800")
        told = len(events(server))
        proxy.losses += 1
        if trouble == "wait_timeout":
            wait_until(lambda: first.sql("SELECT 1 FROM information_schema.processlist "
                                         "WHERE db = 'idpot'") == [])
        (tmp_path / "later").touch()
        with within(0.5):
            assert server.next("p") == 2
        assert events(server)[told:] == []


@pytest.mark.slow
def test_what_comes_behind_the_last_request_does_not_cost_its_late_answer(run, first):
    server = run(**on_servers(first.port, timeout=8))
    server.create("p")
    with session_on(first) as session:
        session.execute("LOCK TABLES pot_p WRITE")
        with connections(server, 1, b"POST /id/p HTTP/1.0\r\n\r\n") as [client]:
            for _ in range(10):
                client.sendall(b"x")
                passes(0.3)
            session.execute("UNLOCK TABLES")
            passes(0.3)
            client.sendall(b"x")
            assert until_closed(client).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_a_request_gets_its_503_where_idpot_was_stopped_for_longer_than_that(run, first):
    server = run(**on_servers(first.port, timeout=1))
    server.create("p")
    with ThreadPoolExecutor(1) as pool, session_on(first) as session:
        session.execute("LOCK TABLES pot_p WRITE")
        answer = pool.submit(server.answer, "POST", "/id/p")
        wait_until(lambda: waiting_for_lock(first, "pot_p"))
        server.process.send_signal(signal.SIGSTOP)
        passes(4)
        server.process.send_signal(signal.SIGCONT)
        assert answer.result()[0] == 503


# ---------------------------------------------------------------- tables, and what they may be

@pytest.mark.parametrize("table", [
    "",     # idpot makes it
    "CREATE TABLE pot_p (id BIGINT UNSIGNED NOT NULL PRIMARY KEY) ENGINE = InnoDB",
    "CREATE TABLE pot_p (id BIGINT UNSIGNED NOT NULL) ENGINE = InnoDB",
    "CREATE TABLE pot_p (id BIGINT UNSIGNED NOT NULL) ENGINE = MyISAM",
])
def test_go_idpot_and_idpot_take_turns_on_each_kind_of_table(table, run, first):
    server = run(**on_servers(first.port))
    if table:
        first.sql(table, database="idpot")
        first.sql("INSERT INTO idpot.pot_p (id) VALUES (0)")
    else:
        server.create("p")
    with session_on(first) as session:
        for last in range(1, 20, 2):
            assert server.next("p") == last
            session.execute("UPDATE pot_p SET id = LAST_INSERT_ID(id + 1)")
            assert session.rowcount == 1
            session.execute("SELECT LAST_INSERT_ID(), id FROM pot_p")
            assert session.fetchall() == [(last + 1, last + 1)]
    if not table:
        assert first.sql("SHOW KEYS FROM idpot.pot_p")[0][4] == "one"


@pytest.mark.slow
def test_an_open_read_view_elsewhere_makes_ids_no_dearer(run, first):
    server = run(**on_servers(first.port))
    server.create("p")
    cpu = []
    with session_on(first) as session:
        session.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        for _ in range(6):
            before = cpu_seconds(first)
            assert statuses(http_exchange(server, GOOD * 1000)) == [200] * 1000
            cpu.append(cpu_seconds(first) - before)
    assert cpu[5] < 2 * cpu[0]


def ids_until_refused(server, pot):
    """The IDs that ten requests got, and the status of the last."""
    ids = []
    for _ in range(10):
        status, text = server.answer("POST", f"/id/{pot}")
        if status == 200:
            ids.append(int(text))
    return ids, status


@pytest.mark.parametrize("column", ["DOUBLE", "VARCHAR(20)"])
def test_a_column_that_cannot_count_from_the_beginning_gives_no_id(column, run, first):
    server = run(**on_servers(first.port, timeout=1))
    first.sql(f"CREATE TABLE idpot.pot_p (id {column} NOT NULL)")
    for target, form in [("/pot/create", "name=p&min=9007199254740991"), ("/id/p", None)]:
        assert server.answer("POST", target, form) == (
            503, 'the table of pot "p" holds no whole number from 0 up\n')


@pytest.mark.parametrize("column, low", [
    ("DOUBLE", 2**53 - 2),
    ("DOUBLE", 2**63 + 5000),
    ("FLOAT", 2**53 - 3),
    ("VARCHAR(20)", 10**18),
])
def test_a_column_altered_while_idpot_serves_gives_no_id_twice(column, low, run, first):
    server = run(**on_servers(first.port, timeout=1))
    server.create("p", low)
    assert server.next("p") == low + 1
    first.sql(f"ALTER TABLE idpot.pot_p MODIFY id {column} NOT NULL")
    ids, status = ids_until_refused(server, "p")
    assert [low + 1, *ids] == sorted({low + 1, *ids})
    assert status in (409, 503)


def test_a_second_row_that_appears_while_idpot_serves_costs_the_pot(run, first):
    server = run(**on_servers(first.port, engine="MyISAM"))
    server.create("p")
    assert server.next("p") == 1
    first.sql("INSERT INTO idpot.pot_p (id) VALUES (500)")
    assert ids_until_refused(server, "p") == ([], 503)


def test_nobody_is_told_less_than_was_given_after_a_counter_was_set_back(run, first):
    server = run(**on_servers(first.port))
    server.create("p")
    assert server.next("p", 200)[-1] == 200
    first.sql("UPDATE idpot.pot_p SET id = 100")
    assert server.answer("GET", "/id/p") == (200, "200")
    assert server.answer("GET", "/pot") == (200, "p\t200\n")
    assert server.answer("POST", "/pot/raise", "name=p&min=150") == (200, "200")
    assert server.next("p") == 201


def test_a_counter_set_back_above_the_signed_numbers_gives_no_lower_id(run, first):
    """GREATEST of MariaDB is signed."""
    server = run(**on_servers(first.port))
    server.create("p", 9223372036854775900)
    assert server.next("p") == 9223372036854775901
    first.sql("UPDATE idpot.pot_p SET id = 9223372036854775810")
    assert server.next("p") == 9223372036854775902
    first.sql("UPDATE idpot.pot_p SET id = 3")
    assert server.next("p") == 9223372036854775903
    for one in (server, run(**on_servers(first.port))):     # the second has given none
        raised = one.answer("POST", "/pot/raise", "name=p&min=5")
        assert raised == (200, "9223372036854775903")


def test_a_counter_raised_above_the_signed_numbers_while_an_id_is_taken(first, tmp_path):
    (tmp_path / "idpot.cfg").write_text(config_text(**on_servers(first.port)))
    [store, *_] = idpot.MysqlStore.all(idpot.load_settings(f"{tmp_path}/idpot.cfg"))
    store.connect()
    store.create("p", 3)
    current = store.current

    def current_and_raise(pot):
        value = current(pot)
        first.sql("UPDATE idpot.pot_p SET id = 9223372036854775900")
        return value

    store.current = current_and_raise
    with pytest.raises(idpot.Retry):
        store.take([("p", 1, 5)])
    assert store.take([("p", 1, 5)]) == [9223372036854775901]
    store.close()


def own_store(server, folder, engine="InnoDB"):
    """A store of this process on the server, with pots a, b and c at 10, 20 and 30."""
    (folder / "idpot.cfg").write_text(config_text(**on_servers(server.port, engine=engine)))
    [store, *_] = idpot.MysqlStore.all(idpot.load_settings(f"{folder}/idpot.cfg"))
    for number, pot in enumerate("abc", 1):
        store.create(pot, 10 * number)
    return store


def rows_of(server):
    return [server.sql(f"SELECT id FROM idpot.pot_{pot}")[0][0] for pot in "abc"]


ABC = [("c", 3, 30), ("a", 1, 10), ("b", 2, 20)]


@pytest.mark.parametrize("engine", ["InnoDB", "MyISAM"])
def test_several_pots_are_taken_in_one_call_each_by_its_own_reply(engine, first, tmp_path):
    store = own_store(first, tmp_path, engine)
    first.sql("ALTER TABLE idpot.pot_b ENGINE = InnoDB")
    store._servers.engines.clear()
    for pot in "abc":
        store.current(pot)
    assert store.take(ABC) == [33, 11, 22]
    assert store.take([("a", 1, 50), ("c", 1, 33)][1:]) == [34]
    assert rows_of(first) == [11, 22, 34]
    store.close()


@pytest.mark.parametrize("engine, left", [("InnoDB", [10, 20, 30]), ("MyISAM", [11, 20, 30])])
@pytest.mark.parametrize("trouble, undo, why", [
    ("RENAME TABLE idpot.pot_b TO idpot.away", "RENAME TABLE idpot.away TO idpot.pot_b", "1146"),
    ("ALTER TABLE idpot.pot_b ADD CHECK (id <= 20)", "ALTER TABLE idpot.pot_b DROP CONSTRAINT "
     "CONSTRAINT_1", "4025|3819")], ids=["no table", "full"])
def test_after_an_error_nothing_of_a_call_counts(
        engine, left, trouble, undo, why, first, tmp_path):
    store = own_store(first, tmp_path, engine)
    if first.is_mysql:
        undo = undo.replace("CONSTRAINT_1", "pot_b_chk_1")
    first.sql(trouble)
    with pytest.raises(idpot.Retry, match=why):
        store.take(ABC)
    assert not store.connected
    first.sql(undo)
    assert rows_of(first) == left
    store.connect()
    assert store.take(ABC) == [33, left[0] + 1, 22]
    store.close()


def test_a_counter_that_was_set_back_fails_its_call_and_goes_on_alone(first, tmp_path):
    store = own_store(first, tmp_path)
    first.sql("UPDATE idpot.pot_b SET id = 3")
    assert store.take(ABC) == [33, 11, 5]       # which the allocator refuses
    with pytest.raises(idpot.Retry, match="set back"):
        store.take([("b", 2, 20)])
    assert store.take([("b", 2, 20)]) == [22]
    store.close()


def test_a_counter_that_was_set_below_zero_gives_no_id_in_a_call_of_several(first, tmp_path):
    store = own_store(first, tmp_path)
    first.sql("ALTER TABLE idpot.pot_b MODIFY id BIGINT NOT NULL")
    first.sql("UPDATE idpot.pot_b SET id = -5")
    with pytest.raises(idpot.Retry, match="1264"):
        store.take(ABC)
    with pytest.raises(idpot.Broken, match="no whole number"):
        store.take([("b", 2, 20)])
    store.close()


def test_where_several_statements_are_refused_each_goes_alone(
        first, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(idpot.log, "propagate", True)
    store = own_store(first, tmp_path)
    flag = store._servers.driver.ClientFlag.MULTI_STATEMENTS
    store._servers._arguments["client_flags"].append(-flag)
    store.close()
    store.connect()
    for _ in range(2):
        with pytest.raises(idpot.Retry, match="1064"):
            store.take(ABC)
        store.connect()
    assert store.most == 1
    assert caplog.text.count("several statements in one call are refused") == 1
    assert store.take(ABC[:1]) == [33]
    store.close()


def test_where_a_reply_is_missing_each_goes_alone(first, tmp_path, monkeypatch):
    store = own_store(first, tmp_path)
    execute_all = idpot.execute_all
    monkeypatch.setattr(idpot, "execute_all", lambda *call: execute_all(*call)[:-1])
    with pytest.raises(idpot.Retry, match="a reply is missing"):
        store.take(ABC)
    assert (store.connected, store.most) == (False, 1)


def test_a_counter_that_was_set_back_from_the_end_gives_the_last_id(first, tmp_path):
    store = own_store(first, tmp_path)
    with pytest.raises(idpot.Retry, match="set back"):
        store.take([("a", 1, idpot.MAX_ID - 1)])
    assert store.take([("a", 1, idpot.MAX_ID - 1)]) == [idpot.MAX_ID]
    store.close()


def test_what_a_server_told_late_counts_only_if_it_may_still_issue_ids(
        first, tmp_path, monkeypatch):
    store = own_store(first, tmp_path)
    execute_all = idpot.execute_all
    with contextlib.ExitStack() as stack:

        def late(*call):
            told = execute_all(*call)
            stack.enter_context(read_only(first))
            store._seen -= 2
            return told

        monkeypatch.setattr(idpot, "execute_all", late)
        with pytest.raises(idpot.Retry, match="read-only"):
            store.take([("a", 1, 10)])
    assert not store.connected


def test_what_several_pots_gave_does_not_count_where_the_address_was_given_up_meanwhile(
        first, tmp_path, monkeypatch):
    store = own_store(first, tmp_path)
    execute = idpot.execute

    def given_up(*call):        # behind the COMMIT, by another worker, whose statement hung
        store._servers.chosen = None
        return execute(*call)

    monkeypatch.setattr(idpot, "execute", given_up)
    with pytest.raises(idpot.Retry, match="given up meanwhile"):
        store.take(ABC)
    assert not store.connected


def test_an_address_that_was_given_up_before_costs_the_chosen_one_nothing(first, tmp_path):
    def hangs():
        raise store._servers.driver.Error("it did not answer", errno=2013)

    store = own_store(first, tmp_path)
    store._servers._patience = 0
    store._servers.chosen = "the next one"
    with pytest.raises(idpot.Retry, match="2013") as raised:
        store._guarded((), hangs)
    assert raised.value.silent
    assert store._servers.chosen == "the next one"


def test_what_a_server_told_after_another_was_chosen_does_not_count(first, tmp_path, monkeypatch):
    store = own_store(first, tmp_path)
    execute_all = idpot.execute_all

    def late(*call):
        store._servers.chosen = "another"
        return execute_all(*call)

    monkeypatch.setattr(idpot, "execute_all", late)
    with pytest.raises(idpot.Retry, match="its address was given up"):
        store.take([("a", 1, 10)])
    assert not store.connected


def test_a_server_of_another_cluster_gives_no_id(first, tmp_path, monkeypatch):
    store = own_store(first, tmp_path)
    store._servers.cluster = "the replication group a"
    monkeypatch.setattr(idpot, "execute", lambda *_: [("wsrep_on", "ON")])
    with pytest.raises(idpot.Retry, match="is not in the replication group a"):
        store.connect(believed=0)
    assert not store.connected


class DyingServer(socketserver.ThreadingTCPServer):
    """Greets as the server on that port does, and is gone when the client answers with TLS."""

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), None)
        self.port = port

    def finish_request(self, client, _):
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            client.sendall(server.recv(1000))
        client.recv(1000)


def test_a_server_that_dies_while_tls_is_agreed_on_is_waited_for(run, first):
    with DyingServer(first.port) as dying:
        threading.Thread(target=dying.serve_forever, args=[0.05], daemon=True).start()
        server = run(**on_servers(dying.server_address[1], timeout=1))
        status, _, headers = server.request("POST", "/id/p")
        dying.shutdown()
    assert (status, headers["Retry-After"]) == (503, "1")


def test_a_limit_of_rows_on_the_server_hides_nothing(run, first):
    first.sql("SET GLOBAL sql_select_limit = 1")
    try:
        server = run(**on_servers(first.port))
        server.create("p")
        server.create("q")
        assert server.answer("GET", "/pot") == (200, "p\t0\nq\t0\n")
        with read_only(first):
            assert server.answer("POST", "/pot/raise", "name=p&min=9")[0] == 503
    finally:
        first.sql("SET GLOBAL sql_select_limit = DEFAULT")


def test_an_exhausted_pot_tells_so_to_400_clients_at_once(run, first):
    with Proxy(first.port, delay=0.02) as proxy:
        server = run(**on_servers(proxy.port, timeout=10))
        server.create("full", 2**64 - 1)
        request = b"POST /id/full HTTP/1.1\r\nHost: x\r\n\r\n"
        with within(5), connections(server, 400, request) as clients:
            assert {client.recv(1000)[:13] for client in clients} == {b"HTTP/1.1 409 "}


def test_each_address_has_its_own_reason(run, first):
    with read_only(first):
        server = run(**on_servers(first.port, 1, timeout=1))
        for method, target in [("POST", "/id/p"), ("GET", "/healthz")]:
            status, text = server.answer(method, target)
            assert status == 503
            assert "(error 1290)" in text
        done = subprocess.run([*server.command, "--check"], capture_output=True, text=True,
                              cwd=server.folder, timeout=20)
    each = rf"127\.0\.0\.1:{first.port}: .*read-only .*; 127\.0\.0\.1:1: .*\b200[23]\b"
    assert re.search(each, server.errors())
    assert re.search(each, done.stdout + done.stderr)


# ---------------------------------------------------------------------------------- faults: SQLite

def on_file(path):
    """The settings for an SQLite file."""
    return {"Timeout": PATIENCE, "LogFile": "access.log", "File": path}


@contextlib.contextmanager
def small_disk(path, size):
    """The new directory is a small file system; who may not mount one skips the test."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "idpot", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, timeout=20)
    if mounted.returncode and os.getuid() == 0:
        missing(f"no small file system: {mounted.stderr}")
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True, timeout=20)


def test_sqlite_killed_under_load(run, tmp_path):
    server = run(**on_file(tmp_path / "ids.db"))
    server.create("killed")
    with Load([server], "killed") as load:
        load.wait_for(ids=100)
        for _ in range(3):
            server.stop(signal.SIGKILL)
            server.start()
            load.recover()
    counter = server.next("killed") - 1
    load.verdict(counter, may_lose=[0])
    assert counter - load.issued() <= 3 * 16    # twelve clients had no more in flight


def test_sqlite_file_refused_to_a_second_idpot(run, tmp_path):
    server = run(**on_file(tmp_path / "ids.db"))
    server.create("mine")
    with Load([server], "mine") as load:
        load.wait_for(ids=100)
        second = run(**on_file(tmp_path / "ids.db"), wait=False)
        assert second.process.wait(10) == 1
        load.recover()
    assert second.errors() == f'idpot: SQLite file "{tmp_path}/ids.db": another process uses it\n'
    load.verdict(server.next("mine") - 1)
    assert load.statuses_since(0).keys() == {200}


@pytest.mark.parametrize("change", [
    os.remove,
    lambda path: os.rename(path, f"{path}.old"),
    lambda path: os.rename(shutil.copy(path, f"{path}.copy"), path)],
    ids=["removed", "moved", "replaced"])
def test_sqlite_file_that_is_not_there_any_more_gives_no_id(change, run, tmp_path):
    server = run(Timeout=1, File=tmp_path / "ids.db")
    server.create("p", 41)
    server.stop()       # so that all is in the one file
    server.start()
    assert server.next("p") == 42
    change(tmp_path / "ids.db")
    for method, target in [("POST", "/id/p"), ("GET", "/healthz"), ("POST", "/id/p?count=2")]:
        status, text, headers = server.request(method, target)
        assert (status, headers["Retry-After"]) == (503, None)
        assert "was moved, removed or replaced: restart idpot" in text
    second = run(**on_file(tmp_path / "ids.db"))
    second.create("q")
    assert status_of_next(server, "q") == status_of_next(server, "p") == 503


def fill_up(path):
    """Writes to the file until its disk is full."""
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(65536))


def test_sqlite_disk_full_is_said_when_it_begins_and_when_it_ends(run, tmp_path):
    with small_disk(tmp_path / "disk", "16m") as disk:
        server = run(**on_file(disk / "ids.db"))
        server.create("full")
        assert [server.next("full") for _ in range(20)] == list(range(1, 21))
        fill_up(disk / "ballast")
        with Load([server], "full") as load:
            wait_until(load.refused)
            assert load.statuses_since(0).keys() == {503}
            assert not healthy(server)
            os.remove(disk / "ballast")
            load.recover()
        load.verdict(server.next("full") - 1)
        for answer in load.history():
            assert answer.first > 20 or answer.status == 503
        assert server.stop() == 0
    listening, begin, end, stopped = events(server)
    assert begin[0] == "WARNING"
    assert "database or disk is full" in begin[1]
    assert end[0] == "INFO"


# ---------------------------------------------------------------------------------- faults: Galera

class GaleraNode(Database):
    """A node of a MariaDB cluster on loopback; node 0 founds it. Ports: three for each node."""
    PROVIDER = "/usr/lib/galera/libgalera_smm.so"

    def __init__(self, number, ports):
        group, transfer, snapshot = [f"127.0.0.1:{port}" for port in ports[number::3]]
        members = ",".join(f"127.0.0.1:{port}" for port in ports[:3])
        # The default of evs freezes the survivors for six seconds when a node dies.
        provider = (
            f"base_port={ports[number]};gmcast.listen_addr=tcp://{group};ist.recv_addr={transfer};"
            "evs.keepalive_period=PT0.3S;evs.suspect_timeout=PT1S;evs.inactive_timeout=PT3S;"
            "evs.inactive_check_period=PT0.3S;pc.recovery=false;gcache.size=16M")
        options = [
            "--wsrep-on=ON", f"--wsrep-provider={self.PROVIDER}", "--wsrep-cluster-name=idpot",
            f"--wsrep-cluster-address=gcomm://{members}", f"--wsrep-node-address={group}",
            f"--wsrep-node-name=n{number}", f"--wsrep-provider-options={provider}",
            "--wsrep-sst-method=rsync", f"--wsrep-sst-receive-address={snapshot}",
            "--innodb-autoinc-lock-mode=2", "--binlog-format=ROW",
            "--default-storage-engine=InnoDB"]
        founds = [] if number else ["--wsrep-new-cluster"]
        super().__init__(*options, *founds)
        self.options = options

    def answers(self):
        ready = "OFF" if "--wsrep-on=OFF" in self.options else "ON"
        status = [("wsrep_ready", ready)]
        return super().answers() and self.sql("SHOW STATUS LIKE 'wsrep_ready'") == status

    def writes(self):
        """Whether the cluster takes a write here; one that waits for a hung node hangs itself."""
        with contextlib.suppress(Exception):
            return self.sql("CREATE OR REPLACE TABLE idpot.probe (id INT PRIMARY KEY)") == []


@pytest.fixture(scope="module")
def galera_nodes():
    """Three nodes."""
    if "IDPOT_TEST_MYSQLD" in os.environ:
        pytest.skip("Galera belongs to MariaDB, and IDPOT_TEST_MYSQLD names another server")
    for program in ("mariadbd", "rsync", GaleraNode.PROVIDER):
        if not shutil.which(program) and not os.path.exists(program):
            missing(f"{program} is missing: apt-get install mariadb-server galera-4 rsync")
    ports = [free_port() for _ in range(9)]
    nodes = []
    with contextlib.ExitStack() as stack:
        for number in range(3):
            nodes.append(GaleraNode(number, ports))
            stack.callback(nodes[-1].remove)
        yield nodes


@pytest.fixture
def galera(galera_nodes):
    """Three nodes, each of which takes writes, whatever the test before has done to them."""
    for node in galera_nodes:
        wait_until(node.writes, 90)
    return galera_nodes


def on_cluster(nodes, engine="InnoDB"):
    addresses = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return {"Timeout": 4, "LogFile": "access.log", "Engine": engine,
            "ConnectString": f"root@tcp({addresses})/idpot"}


def assert_refused(server, reason):
    """The database was refused at the start, and one line says why."""
    assert server.process.wait(10) == 1
    assert server.errors() == f"idpot: {reason}\n"


@pytest.mark.slow
def test_galera_refuses_myisam_at_the_start(galera, run):
    server = run(**on_cluster(galera[:1], "MyISAM"), wait=False)
    assert_refused(server, f"MySQL 127.0.0.1:{galera[0].port}: Engine: the Galera cluster "
                           "replicates InnoDB only, not MyISAM")


@pytest.mark.slow
def test_galera_refuses_to_create_myisam_later(galera, run):
    galera[0].sql("SET GLOBAL wsrep_on = OFF")
    try:
        server = run(ConnectString=galera[0].dsn())
    finally:
        galera[0].sql("SET GLOBAL wsrep_on = ON")
    assert server.answer("POST", "/pot/create", "name=myisam") == (
        503, "Engine: the Galera cluster replicates InnoDB only, not MyISAM\n")


def run_two(run, nodes, pot):
    """Two idpots that prefer different nodes, and see the new pot."""
    a, b, c = nodes
    first, second = run(**on_cluster([a, b, c])), run(**on_cluster([b, c, a]))
    first.create(pot)
    wait_until(lambda: second.answer("GET", f"/pot/{pot}")[0] == 204)
    return [first, second]


def left_alone(load, a, b, c):
    """Kills b and c; a gives no ID from then on."""
    load.wait_for(ids=300)
    b.signal(signal.SIGKILL)
    c.signal(signal.SIGKILL)
    wait_until(load.refused, 20)
    since = time.monotonic()
    wait_until(lambda: load.statuses_since(since).total() >= 24, 20)
    assert load.statuses_since(since).keys() == {503}


@pytest.mark.slow
def test_galera_a_node_donates_one_dies_and_joins_again_and_one_hangs(galera, run):
    a, b, c = galera
    with Load(run_two(run, galera, "cluster"), "cluster", patience=4) as load:
        load.wait_for(ids=300)
        with contextlib.closing(b.connect()) as donor:      # what a state transfer does to it
            donor.cursor().execute("SET GLOBAL wsrep_desync = ON")
            donor.cursor().execute("FLUSH TABLES WITH READ LOCK")
            load.recover()
        b.sql("SET GLOBAL wsrep_desync = OFF")
        a.signal(signal.SIGKILL)
        load.recover()
        a.start()
        load.recover()
        wait_until(a.writes, 60)    # it has joined: without it and b the others have no quorum
        b.signal(signal.SIGSTOP)
        wait_until(c.writes, 60)    # how long the others wait for it is Galera's time, not idpot's
        load.recover()
        b.signal(signal.SIGCONT)
    load.verdict(c.sql("SELECT id FROM idpot.pot_cluster")[0][0])
    for node in galera:
        wait_until(node.answers, 60)


@pytest.mark.slow
def test_galera_two_creates_at_once_on_two_nodes_make_one_pot(galera, run):
    one, two = [run(**on_cluster([node])) for node in galera[:2]]
    for number in range(20):
        pot = f"race{number}"
        answers = at_once(
            lambda: one.answer("POST", "/pot/create", f"name={pot}&min=100"),
            lambda: two.answer("POST", "/pot/create", f"name={pot}&min=200"))
        assert sorted(answers) == [(201, "Created new pot"), (409, f'pot "{pot}" exists\n')]
        made = 100 if answers[0][0] == 201 else 200
        for node in galera:
            wait_until(lambda: node.sql(f"SELECT id FROM idpot.pot_{pot}") == [(made,)], 3)


@pytest.mark.slow
@pytest.mark.parametrize("cluster, row, reason", [
    ("galera", [5], "the table of pot \"stray\" is MyISAM: the Galera cluster "),
    ("group", [], "the table of pot \"stray\" has no row"),       # the group refuses one
])
def test_a_stray_table_of_myisam_on_a_cluster_costs_its_own_pot_only(
        cluster, row, reason, run, request):
    [node, *_] = request.getfixturevalue(cluster)
    node.sql("CREATE TABLE idpot.pot_stray (id BIGINT UNSIGNED NOT NULL) ENGINE = MyISAM")
    for value in row:
        node.sql(f"INSERT INTO idpot.pot_stray VALUES ({value})")
    try:
        server = run(**on_servers(node.port))
        server.create("sound")
        for last in (1, 2, 3):
            status, text = server.answer("POST", "/id/stray")
            assert status == 503
            assert text.startswith(reason)
            assert server.next("sound") == last
    finally:
        node.sql("DROP TABLE IF EXISTS idpot.pot_stray, idpot.pot_sound")
    wait_until(lambda: len([text for _, text in events(server) if "stray" in text]) == 1)


@pytest.mark.slow
def test_galera_a_node_that_is_not_ready_does_not_even_say_what_it_reads(galera, run):
    a, b, c = galera
    server = run(**on_servers(c.port, timeout=1))
    server.create("cut", 41)
    c.sql("SET GLOBAL wsrep_dirty_reads = ON")      # so that it would answer a SELECT
    with hung(a), hung(b):
        wait_until(lambda: c.sql("SHOW STATUS LIKE 'wsrep_ready'") == [("wsrep_ready", "OFF")], 20)
        passes(1.5)
        for method, target in [("GET", "/id/cut"), ("POST", "/id/cut"), ("GET", "/healthz")]:
            status, text = server.answer(method, target)
            assert status == 503
            assert "the Galera node is not ready" in text
    wait_until(c.answers, 30)
    c.sql("SET GLOBAL wsrep_dirty_reads = OFF")
    wait_until(lambda: healthy(server))
    assert server.next("cut") == 42


@pytest.mark.slow
def test_galera_a_writer_that_dies_and_is_started_outside_of_the_cluster_gives_no_id(galera, run):
    a, b, _ = galera
    with Load(run_two(run, galera, "outside"), "outside", patience=4) as load:
        load.wait_for(ids=300)
        a.signal(signal.SIGKILL)
        load.recover()
        a.options.append("--wsrep-on=OFF")
        a.start()
        with contextlib.closing(b.connect()) as root:
            kill_connections(root, "root")
        load.recover()
    a.signal(signal.SIGKILL)
    a.options.remove("--wsrep-on=OFF")
    a.start()
    load.verdict(b.sql("SELECT id FROM idpot.pot_outside")[0][0])


@pytest.mark.slow
def test_galera_without_its_quorum_gives_no_id(galera, run):
    """The last test on these nodes: two of them stay dead."""
    a = galera[0]
    with Load(run_two(run, galera, "minority"), "minority", patience=4) as load:
        left_alone(load, *galera)
        a.sql("SET GLOBAL wsrep_provider_pc_bootstrap = ON")    # the operator: the others are dead
        load.recover()
    load.verdict(a.sql("SELECT id FROM idpot.pot_minority")[0][0])


# ---------------------------------------------------------------- several idpots, and proof

@pytest.fixture
def mysql(database):
    """mysql(Timeout=1, ...) is the settings for a new database, of a user with least rights."""
    for statement in (
            "DROP DATABASE IF EXISTS host",
            "CREATE DATABASE host",
            "DROP USER IF EXISTS least",
            "CREATE USER least IDENTIFIED BY 'secret'",
            "GRANT SELECT, UPDATE, CREATE, INSERT ON host.* TO least"):
        database.sql(statement)

    return functools.partial(
        dict, Port=database.port, Username="least", Password="secret", Dbname="host")


@contextlib.contextmanager
def haproxy(folder, servers):
    """An HAProxy in front of the servers, in turn; it does not ask whether they are well."""
    proxy = types.SimpleNamespace(port=free_port())
    lines = ["defaults", "mode http", "timeout connect 2s", "timeout client 20s",
             "timeout server 20s", "listen idpot", f"bind 127.0.0.1:{proxy.port}",
             "balance roundrobin", "option redispatch 1"]
    lines += [f"server s{server.port} 127.0.0.1:{server.port}" for server in servers]
    (folder / "haproxy.cfg").write_text("\n".join([*lines, ""]))
    process = subprocess.Popen([needs("haproxy"), "-db", "-f", "haproxy.cfg"], cwd=folder)
    try:
        wait_until(lambda: not refused(proxy.port))
        yield proxy
    finally:
        process.kill()
        process.wait(20)


def run_prove(*arguments):
    """contrib/prove.py as a program; returns its exit code and what it printed."""
    command = [sys.executable, f"{HERE}/contrib/prove.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


class FaultyServer(http.server.ThreadingHTTPServer):
    """Answers as idpot does, from a counter for each pot, but for the lies of the test."""
    request_queue_size = 100

    def __init__(self, counter=lambda n, last, count: last, body=bytes):
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.counter = counter  # what was the pot's last ID, when it is asked the n-th time?
        self.body = body        # what becomes of the right answer?
        self.lock = threading.Lock()
        self.requests = collections.Counter()
        self.last = collections.Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def take(self, pot, count):
        with self.lock:
            self.requests[pot] += 1
            last = self.counter(self.requests[pot], self.last[pot], count)
            self.last[pot] = last + count
            return last + 1


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.answer(204, b"")

    def do_POST(self):
        pot, _, query = self.path.partition("?")
        field, _, count = query.partition("=")
        first = self.server.take(pot, int(count or 1))
        self.answer(200, self.server.body(prove.right_body(field, int(count or 1), first)))

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class TestProof:
    def test_two_idpots_behind_haproxy_of_which_one_is_killed(self, mysql, run, tmp_path):
        settings = mysql(Timeout=PATIENCE)
        two = [run(**settings, listen=f"127.0.0.1:{free_port()}") for _ in range(2)]
        two[0].create("p")
        with haproxy(tmp_path, two) as proxy, Load([proxy], "p") as load:
            load.wait_for(ids=1000)
            two[0].stop(signal.SIGKILL)
            load.recover()
            two[0].start()
            load.recover()
        assert prove.check_history(load.history()) == []
        assert load.statuses_since(0).keys() <= {200, 502, 503, "lost"}
        for server in two:
            assert metrics(server)["idpot_ids_issued_total"] > 100
        last = max(answer.last for answer in load.history())
        assert two[1].next("p") > last

    def test_prove_finds_nothing_wrong_with_idpot(self, run):
        server = run(Token="t", LogFile="log")
        url = f"http://127.0.0.1:{server.port}"
        code, text = run_prove(url, "--pot=proof", "--seconds=2", "--clients=8", "--token=t")
        assert code == 0, text
        assert re.fullmatch(
            f'[23] s, 8 clients, pot "proof" at {url}\n'
            r"[0-9,]+ answers \([0-9,]+/s\) with [0-9,]+ IDs; not served: none\n"
            r"the greatest ID is [0-9,]+, the longest wait for an answer was [0-9.]+ s\n"
            "kept: no ID came twice, each is greater than all that were answered before it was "
            "asked for\n", text)
        with idpot.Client(url, token="t") as client:
            greatest = client.current("proof")
        assert f"with {greatest:,} IDs" in text
        assert f"the greatest ID is {greatest:,}," in text
        with open(f"{server.folder}/log") as file:
            requests = re.findall(r'"POST /id/proof(\?[a-z]+=)?', file.read())
        assert set(requests) == {"", "?count=", "?range="}

    @pytest.mark.slow
    def test_prove_counts_what_is_not_served_while_idpot_is_killed_and_stopped(self, run):
        server = run(listen=f"127.0.0.1:{free_port()}")
        url = f"http://127.0.0.1:{server.port}"
        with ThreadPoolExecutor(1) as pool:
            proof = pool.submit(run_prove, url, "--seconds=5", "--clients=8")
            for number in (signal.SIGKILL, signal.SIGTERM):
                wait_until(lambda: '"POST /id/prove' in server.errors())
                server.stop(number)
                os.truncate(server.stderr, 0)
                server.start()
            code, text = proof.result()
        assert code == 0, text
        assert re.search(r"; not served: connection lost [0-9]+ times\n", text)

    @pytest.mark.parametrize("lie", [
        pytest.param({"counter": lambda n, last, count: last - (n == 99)}, id="an ID again"),
        pytest.param({"counter": lambda n, last, count: last * (n != 99)}, id="back to the start"),
        pytest.param({"counter": lambda n, last, count: last - (count > 1)}, id="lists overlap"),
        pytest.param({"counter": lambda n, last, count: last - 9**9 * (-1) ** n}, id="two blocks"),
        pytest.param({"counter": lambda n, last, count: last - (n == 1)}, id="0"),
        pytest.param({"counter": lambda n, last, count: last + 2**64 * (n == 99)}, id="2^64"),
        pytest.param({"counter": lambda n, last, count:     # once, then there is no answer
                      (last, 2**64 - 2)[count > 1] // (last < 2**63)}, id="a list across 2^64"),
        pytest.param({"body": lambda body: b"none"}, id="text"),
        pytest.param({"body": lambda body: b"+" + body}, id="plus sign"),
        pytest.param({"body": lambda body: b"0" + body}, id="leading zero"),
        pytest.param({"body": lambda body: body + b" "}, id="trailing blank"),
        pytest.param({"body": lambda body: body.strip() + b"\n"}, id="newline after one ID"),
        pytest.param({"body": lambda body: body.replace(b"\n", b"\r\n")}, id="carriage return"),
        pytest.param({"body": lambda body: body.replace(b"\t", b" ")}, id="range without a tab"),
        pytest.param({"body": lambda body: body.replace(b"\t", b"\t1")}, id="range ends late"),
        pytest.param({"body": lambda body: body[body.find(b"\n", 0, -1) + 1:]}, id="one too few"),
        pytest.param({"body": lambda body: re.sub(rb"\n(\d+)\n$", rb"\n\g<1>0\n", body)}, id="gap"),
        pytest.param({"body": lambda body: b"".join(body.splitlines(True)[::-1])}, id="descending"),
    ])
    def test_prove_finds(self, lie, monkeypatch):
        monkeypatch.setattr(prove, "WINDOW", 0.1)
        with FaultyServer(**lie) as server:
            connections = [prove.Connection(server.url, None) for _ in range(8)]
            proof = prove.Proof(connections, ["a", "b"], threading.Event())
            proof.run(5)
            proof.stopped.set()
        assert proof.broken

    @pytest.mark.parametrize("last, line", [
        (41, r"BROKEN: an ID came twice: 42 to \d+ of prove, .*; 42 to \d+ of prove, .*"),
        (-6, r"wrong answer where (one ID|\w+=\d+) was asked for: b'-5.*'"),
    ])
    def test_prove_shows_three_violations_and_says_how_many_more(self, last, line):
        with FaultyServer(lambda *_: last) as server:
            code, text = run_prove(server.url, "--clients=8")
        assert code == 1
        assert re.fullmatch(rf"(.*\n){{3}}({line}\n){{3}}and [0-9,]+ more\n", text), text

    def test_prove_tells_how_far_it_is(self, monkeypatch, capsys):
        progress = prove.Progress()
        progress.due -= 10      # seconds
        progress.show("a line")
        progress.show("too early for another")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((40, 24)))
        progress.show("x" * 99)
        assert capsys.readouterr().err == "a line\n\r\033[K" + "x" * 39

    def test_prove_takes_the_same_ids_from_several_pots(self):
        with FaultyServer() as server:
            code, text = run_prove(server.url, "--pots=3", "--seconds=1", "--clients=8")
        assert code == 0, text
        assert f'8 clients, pots "prove-1" to "prove-3" at {server.url}\n' in text
        assert sorted(server.last) == ["/id/prove-1", "/id/prove-2", "/id/prove-3"]

    @pytest.mark.parametrize("arguments, code, message", [
        ([], 2, "prove.py: error: the following arguments are required: URL\n"),
        (["127.0.0.1:8080"], 2,
         "argument URL: '127.0.0.1:8080' is not http://HOST:PORT or https://HOST:PORT\n"),
        (["http://h", "--pot=a.b"], 2,
         "argument --pot: 'a.b' is not 1 to 60 characters of A-Z a-z 0-9 _ -\n"),
        (["http://h", "--seconds=0"], 2, "argument --seconds: '0' is not a whole number above 0\n"),
        (["http://127.0.0.1:1"], 1,
         "prove.py: http://127.0.0.1:1: [Errno 111] Connection refused\n"),
    ])
    def test_prove_says_what_is_wrong_with_its_arguments(self, arguments, code, message):
        got, text = run_prove(*arguments)
        assert got == code
        assert text.endswith(message)

    def test_prove_needs_the_token_and_any_answer(self, run):
        server = run(Token="t", AdminToken="a")
        url = f"http://127.0.0.1:{server.port}"
        assert run_prove(url, "--token=wrong") == (
            1, f'prove.py: {url}: pot "prove" cannot be used: 401 the bearer token is wrong\n')
        with idpot.Client(url, token="a") as client:
            client.create("top", min=MAX_ID)
        code, text = run_prove(url, "--token=t", "--pot=top", "--seconds=1", "--clients=2")
        assert code == 1
        assert re.fullmatch(
            rf"prove.py: {url}: there was no answer with an ID; 0 answers \(0/s\) with 0 IDs; "
            r"not served: 409 \d+ times\n", text)


# ---------------------------------------------------------------- health, metrics, log lines

@contextlib.contextmanager
def pot_locked(database, pot):
    """Another session holds the table of a pot in the database `host`."""
    with contextlib.closing(database.connect(database="host")) as session:
        session.cursor().execute(f"LOCK TABLES pot_{pot} WRITE")
        yield


@contextlib.contextmanager
def read_lock(database):
    with contextlib.closing(database.connect()) as session:
        session.cursor().execute("FLUSH TABLES WITH READ LOCK")
        yield


@contextlib.contextmanager
def no_right_to_update(database):
    database.sql("REVOKE UPDATE ON host.* FROM least")
    with contextlib.closing(database.connect()) as root:
        kill_connections(root, "least")
    try:
        yield
    finally:
        database.sql("GRANT UPDATE ON host.* TO least")


def in_flight(server):
    """How many requests wait for their answer, besides this one."""
    return metrics(server)["idpot_http_requests_in_flight"] - 1


def durations(server):
    """(sum, count, buckets) of the times until the answers, these as {upper bound: requests}."""
    name = "idpot_http_request_duration_seconds"
    found = metrics(server)
    buckets = {}
    for series, value in found.items():
        if series.startswith(f"{name}_bucket"):
            buckets[float(re.search('le="(.+)"', series)[1])] = value
    return found[f"{name}_sum"], found[f"{name}_count"], buckets


class TestHealthAndMetrics:
    @pytest.mark.parametrize("trouble, why", [
        (read_only, r"\(error 1290\)"),
        (read_lock, r"\(error 1205\)|did not answer"),
        (no_right_to_update, r"\(error 1142\)"),
        (hung, r"\(error (2013|2055|3024)\)|did not answer"),
        (down, r"\(error (2002|2003|2013|2055)\)"),
    ], ids=["read_only", "read_lock", "no_right_to_update", "hung", "down"])
    def test_health_says_why_no_id_could_be_issued_and_costs_none(
            self, trouble, why, mysql, run, database):
        server = run(**mysql(Timeout=4))
        server.create("p", 41)
        assert server.next("p") == 42
        assert healthy(server)
        with trouble(database), within(4):
            status, text, _ = server.request("GET", "/healthz")
        assert status == 503
        assert re.search(why, text)
        assert text.count("\n") == 1
        wait_until(lambda: healthy(server))
        assert metrics(server)["idpot_ids_issued_total"] == 1
        assert server.next("p") == 43

    def test_metrics_go_up_and_please_promtool(self, mysql, run, database):
        server = run(**mysql())
        server.create("p")
        with Load([server]) as load:
            load.more()
        for _ in range(20):
            server.next("p", 100)
        issued = load.all_served() + 2000
        requests = len(load.history()) + 20
        route = 'idpot_http_requests_total{route="%s",method="%s",code="200"}'
        last = {}
        for number in range(3):
            found = metrics(server)
            assert found["idpot_ids_issued_total"] == issued
            assert found.get(route % ("/metrics", "GET"), 0) == number
            assert found[route % ("/id/{pot}", "POST")] == requests
            for name, value in last.items():
                assert found[name] >= value or "_total" not in name
            last = found
        assert requests >= last["idpot_db_statements_total"] > 20
        with contextlib.closing(database.connect()) as root:
            kill_connections(root, "least")
        assert server.next("p") == issued + 1
        assert "idpot_db_errors_total{errno=" in str(metrics(server))
        status, text, headers = server.request("GET", "/metrics")
        assert status == 200
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        promtool = subprocess.run(
            [needs("promtool"), "check", "metrics"], input=text, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20)
        assert (promtool.returncode, promtool.stdout) == (0, "")

    def test_metrics_count_connections_and_requests_in_flight(self, mysql, run, database):
        server = run(**mysql())
        server.create("p")
        with connections(server, 20):
            wait_until(lambda: metrics(server)["idpot_connections"] == 21)
        wait_until(lambda: in_flight(server) == 0)
        with ThreadPoolExecutor(3) as pool, pot_locked(database, "p"):
            for _ in range(3):
                pool.submit(server.next, "p")
            wait_until(lambda: in_flight(server) == 3)
            assert metrics(server)["idpot_db_connections"] >= 1
        wait_until(lambda: in_flight(server) == 0)
        assert server.next("p") == 4

    def test_an_answer_that_is_not_read_is_in_flight(self, run):
        server = run()
        server.create("p", 10**18)
        with contextlib.closing(slow_reader(server)) as reader:
            reader.sendall(LONG_ANSWER * 90)

            before = 0
            while (issued := metrics(server)["idpot_ids_issued_total"]) > before or not issued:
                before = issued
                passes(0.5)
            assert in_flight(server) == 1

    def test_metrics_have_a_histogram_of_the_time_until_the_answer(self, mysql, run, database):
        server = run(**mysql())
        server.create("p")
        for _ in range(50):
            server.next("p")
        before, count, buckets = durations(server)
        assert count == buckets[math.inf] == 51
        assert 0 < before < 5
        assert list(buckets.values()) == sorted(buckets.values())
        start = time.monotonic()
        with ThreadPoolExecutor(1) as pool, pot_locked(database, "p"):
            pool.submit(server.next, "p")
            wait_until(lambda: waiting_for_lock(database, "pot_p"))
            waiting = time.monotonic()
            wait_until(lambda: time.monotonic() > waiting + 1)
        held = time.monotonic() - start
        after, more, slower = durations(server)
        assert 1 < after - before < held + 1
        assert more == count + 2      # with that of the metrics
        assert slower[0.5] == buckets[0.5] + 1
        assert slower[math.inf] == buckets[math.inf] + 2

    def test_metrics_describe_the_process_whose_soft_limit_of_files_is_raised(self, run):
        server = run(python=["sh", "-c", 'ulimit -S -n 64; exec "$@"', "sh", sys.executable])
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
        memory, *_, files = usage(server)
        found = metrics(server)
        assert found["process_resident_memory_bytes"] == pytest.approx(memory * 2**20, rel=0.3)
        assert found["process_open_fds"] == pytest.approx(files, abs=3)
        assert 0 < found["process_cpu_seconds_total"] < 30
        assert found["process_start_time_seconds"] == pytest.approx(time.time(), abs=30)

    def test_a_database_that_is_down_is_said_when_it_begins_and_when_it_ends(
            self, mysql, run, database):
        server = run(**mysql(Timeout=1, LogFile="log"))
        pots = [f"p{number}" for number in range(10)]
        for pot in pots:
            server.create(pot)
        all_at_once = [functools.partial(status_of_next, server, pot) for pot in pots]
        assert at_once(*all_at_once) == [200] * 10
        before = len(events(server))
        with killed(database):
            for _ in range(3):
                assert at_once(*all_at_once) == [503] * 10
        wait_until(lambda: at_once(*all_at_once) == [200] * 10, 20)
        assert server.stop() == 0
        begin, end, stopped = events(server)[before:]
        assert begin[0] == "WARNING"
        assert end[0] == "INFO"

    def test_under_journald_an_event_has_a_priority_and_no_time(self, run, tmp_path):
        stderr = tmp_path / "idpot0" / "stderr"
        stderr.parent.mkdir()
        stderr.touch()
        named = f"{stderr.stat().st_dev}:{stderr.stat().st_ino}"
        server = run(listen="0.0.0.0:0", environment={"JOURNAL_STREAM": named})
        http_exchange(server, b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        assert server.stop() == 0
        warning, listening, *lines, stopped = server.errors().splitlines()
        assert {line[:12] for line in lines} == {"<6>127.0.0.1"}
        assert warning.startswith("<4>0.0.0.0 is not a loopback address and no Token is set: ")
        assert listening == f"<6>listening on http://0.0.0.0:{server.port} (SQLite idpot.db)"
        assert stopped == "<6>stopped"

    def test_a_journal_or_socket_that_is_meant_for_another_process_changes_nothing(self, run):
        server = run(LogFile="log", environment={
            "JOURNAL_STREAM": "8:1", "LISTEN_PID": "1", "LISTEN_FDS": "1"})
        assert server.stop() == 0
        assert [text for _, text in events(server)] == [
            f"listening on http://127.0.0.1:{server.port} (SQLite idpot.db)", "stopped"]


# ---------------------------------------------------------------- bad pots, and init_connect

BAD = {     # what the table of a pot is, that is at 9 and gives no ID
    "damaged": ["ENGINE = MyISAM"],
    "full": ["ENGINE = InnoDB PARTITION BY RANGE (id) (PARTITION low VALUES LESS THAN (10))"],
    "triggered": ["", "FOR EACH ROW SET @x = 1"],
    "refusing": ["", "FOR EACH ROW SIGNAL SQLSTATE '45000'"],
}


def make_bad(database, kind, pot="p"):
    table, *trigger = BAD[kind]
    database.sql(f"CREATE TABLE host.pot_{pot} (id BIGINT UNSIGNED NOT NULL) {table}")
    database.sql(f"INSERT INTO host.pot_{pot} VALUES (9)")
    for action in trigger:
        database.sql(f"CREATE TRIGGER host.on_{pot} BEFORE UPDATE ON host.pot_{pot} {action}")
    if kind == "damaged":
        database.sql(f"FLUSH TABLES host.pot_{pot}")
        os.truncate(f"{database.dir}/data/host/pot_{pot}.MYI", 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["damaged", "full"])
def test_twelve_bad_pots_cost_a_sound_one_nothing(kind, mysql, run, database):
    server = run(**mysql(Timeout=60))
    server.create("p")
    quiet, _ = waits(server)
    with contextlib.ExitStack() as stack:
        for number in range(12):
            make_bad(database, kind, f"bad{number}")
            stack.enter_context(connections(server, 1, CLOSING % b"bad%d" % number))
        passes(1)
        median, longest = waits(server)
    assert median < 5 + quiet
    assert longest < 50 + quiet


def test_a_pot_that_gives_no_id_can_be_read_meanwhile(mysql, run, database):
    server = run(**mysql())
    make_bad(database, "full")
    with connections(server, 3, GOOD):
        wait_until(lambda: in_flight(server) == 3)
        with within(2):
            assert server.answer("GET", "/id/p") == (200, "9")
            assert server.answer("GET", "/pot/p") == (204, "")


def test_a_table_with_a_trigger_is_told_once_and_burns_little(mysql, run, database):
    server = run(**mysql(Timeout=2, LogFile="log"))
    make_bad(database, "triggered")
    for _ in range(2):
        status, text = server.answer("POST", "/id/p")
        assert (status, "or its table has a trigger" in text) == (503, True)
    assert database.sql("SELECT id FROM host.pot_p")[0][0] <= 17
    assert server.answer("POST", "/pot/raise", "name=p&min=5000") == (200, "5000")
    assert ["has a trigger" in text for _, text in events(server)].count(True) == 1


def test_health_tries_the_pot_that_an_id_was_taken_from_last(mysql, run, database):
    server = run(**mysql(Timeout=1))
    make_bad(database, "refusing", "bad")
    server.create("p")
    assert status_of_next(server, "bad") == 503
    assert not healthy(server)      # none was taken: it is the one asked for
    assert server.next("p") == 1
    assert status_of_next(server, "bad") == 503
    assert healthy(server)


@pytest.mark.slow
def test_a_probe_is_answered_soon_while_400_clients_ask_for_health(mysql, run, database):
    with Proxy(database.port, delay=0.005) as proxy:
        server = run(**mysql(Port=proxy.port))
        with storm(server, 400, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
            for _ in range(20):
                with within(1):
                    assert healthy(server)


@pytest.mark.slow
def test_a_list_of_pots_ends_when_its_time_is_over(mysql, run, database):
    with Proxy(database.port, delay=0.03) as proxy:
        server = run(**mysql(Port=proxy.port, Timeout=2, Connections=1))
        server.create("p")
        for number in range(100):
            database.sql(f"CREATE TABLE host.pot_{number} (id INT) ENGINE = MyISAM")
        assert server.answer("GET", "/pot")[0] == 503
        assert server.next("p") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("statement", ["BEGIN", "START TRANSACTION", "SET autocommit=0"])
def test_what_is_answered_is_committed_whatever_init_connect_does(
        statement, number, mysql, run, database):
    settings = mysql(Engine="InnoDB")
    database.sql(f"SET GLOBAL init_connect = '{statement}'")
    try:
        server = run(**settings)
        server.create("p")      # which commits
        server.stop()
        server.start()
        assert [server.next("p") for _ in range(3)] == [1, 2, 3]
        server.stop(number)
        assert database.sql("SELECT id FROM host.pot_p") == [(3,)]
        server.start()
        assert server.next("p") == 4
    finally:
        database.sql("SET GLOBAL init_connect = ''")


# ---------------------------------------------------------------- logs that nobody reads

def full_pipe():
    """(read end, write end) of a pipe with room for nothing."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    return read_end, write_end


@contextlib.contextmanager
def stderr_is_a_full_pipe(server):
    read_end, write_end = full_pipe()
    server.process = subprocess.Popen(server.command, cwd=server.folder, stderr=write_end)
    os.close(write_end)
    yield
    os.close(read_end)


@contextlib.contextmanager
def log_is_a_fifo_that_nobody_reads(server):
    os.remove(f"{server.folder}/log")
    os.mkfifo(f"{server.folder}/log")
    reader = os.open(f"{server.folder}/log", os.O_RDWR)
    server.start(wait=False)
    yield
    os.close(reader)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("settings, clogged", [
    ({}, stderr_is_a_full_pipe),
    ({"LogFile": "log"}, stderr_is_a_full_pipe),
    ({"LogFile": "log"}, log_is_a_fifo_that_nobody_reads),
], ids=["stderr, with access lines", "stderr", "LogFile"])
def test_neither_ids_nor_a_stop_wait_for_a_reader(settings, clogged, stop, run):
    server = run(listen=f"127.0.0.1:{free_port()}", **settings)
    server.create("p")
    assert server.stop() == 0
    with clogged(server):
        wait_until(lambda: not refused(server.port))
        with Load([server], Referer="x" * 1000) as load:
            load.more(500)      # half a megabyte of access lines: a pipe holds 64 KB
        assert load.all_served() >= 500
        with within(11):
            assert server.stop(stop) == 0
        assert refused(server.port)


def test_hangups_without_end_do_not_keep_a_stop_waiting(run):
    server = run()

    def ended():
        server.process.send_signal(signal.SIGHUP)
        return server.process.poll() is not None

    server.process.send_signal(signal.SIGTERM)
    wait_until(ended, 5, every=0.01)
    assert server.process.returncode == 0


@pytest.mark.parametrize("clogged", [stderr_is_a_full_pipe, log_is_a_fifo_that_nobody_reads])
def test_a_second_sigterm_ends_at_once_what_the_first_let_finish(clogged, mysql, run, database):
    server = run(**mysql(Timeout=30, LogFile="log"), listen=f"127.0.0.1:{free_port()}")
    server.create("p")
    assert server.stop() == 0
    with clogged(server), pot_locked(database, "p"):
        wait_until(lambda: not refused(server.port))
        with connections(server, 1, GOOD) as [client]:
            wait_until(lambda: waiting_for_lock(database, "pot_p"))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refused(server.port))
            assert server.process.poll() is None
            with within(2):
                server.stop(signal.SIGTERM)
            assert b" 200 " not in client.recv(1000)


# ---------------------------------------------------------------- stops, slow readers, odd hosts

@pytest.mark.parametrize("inside", [(), ("unshare", "--pid", "--fork", "--kill-child")],
                         ids=["as it is", "as PID 1"])
def test_sigterm_ends_a_start_that_waits_for_six_silent_addresses(inside, run):
    if inside and os.getuid():
        pytest.skip("only root may make a PID namespace")
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(6)]
        ports = [listener.getsockname()[1] for listener in listeners]
        server = run(**on_servers(*ports, timeout=10), wait=False, python=[*inside, sys.executable])
        assert select.select(listeners[:1], [], [], 10)[0]
        pid = server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        with within(3):
            os.kill(int(children[0]) if inside else pid, signal.SIGTERM)
            assert server.process.wait(10) == 0


def test_a_notify_socket_that_nobody_reads_holds_up_neither_ids_nor_a_stop(run, tmp_path):
    with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="1000000") as told:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.connect(told.environment["NOTIFY_SOCKET"])
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler.send(b"x")
        server = run(environment=told.environment)
        server.create("p")
        assert server.next("p") == 1
        with within(3):
            assert server.stop() == 0


def test_100_continue_during_a_stop_does_not_renew_its_time(run):
    server = run()
    server.create("p")
    head = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\n")
    with connections(server, 1, head[:-2]) as [client]:
        passes(0.3)     # so that it is read before the stop
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refused(server.port))
        client.sendall(head[-2:])
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        with within(3):
            assert server.process.wait(20) == 0


@pytest.mark.slow
def test_slow_readers_do_not_keep_a_good_client_out(run):
    server = run(MaxConnections=16)
    server.create("p", 10**18)
    with contextlib.ExitStack() as stack:
        readers = []
        for number in range(24):
            readers.append(stack.enter_context(slow_reader(server)))
            readers[-1].sendall(LONG_ANSWER * 90)
            for reader in readers:
                with contextlib.suppress(OSError):
                    reader.recv(70, socket.MSG_DONTWAIT)
            if number >= 16:
                passes(0.1)
                assert serves(server)


SMALL_NETWORK = (
    "unshare", "-n", "sh", "-c", "ip link set lo up; old=$PWD; cd /proc/sys/net/ipv4; "
    "echo 4096 4096 4096 > tcp_wmem; echo 4096 4096 4096 > tcp_rmem; "
    'cd "$old"; exec "$@"', "sh", sys.executable)


def connected_within(server):
    """A connection in the server's own network, made by a thread that goes there (setns(2))."""
    def connect():
        with open(f"/proc/{server.process.pid}/ns/net") as network:
            assert ctypes.CDLL(None).setns(network.fileno(), 0) == 0
        return socket.create_connection(("127.0.0.1", server.port), 20)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(connect).result()


@pytest.mark.slow
def test_requests_sent_before_an_answer_is_read_are_all_answered_through_small_buffers(run):
    if os.getuid():
        pytest.skip("only root may make a network")
    server = run(python=SMALL_NETWORK)
    with connected_within(server) as client:
        client.sendall(b"POST /pot/create?name=p HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 201 ")
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        requests = GOOD * 1200
        sent = 0
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):      # both ways are full
            while sent < 200 * len(GOOD):       # one at a time, and no answer is read
                sent += client.send(requests[sent:sent + len(GOOD)])
                select.select([], [], [], 0.002)
        client.settimeout(60)       # a kernel with such buffers loses segments
        assert issued(pipelined(client, requests[sent:])) == list(range(1, 1201))


def test_where_no_thread_can_be_started_the_longest_silent_makes_room(run):
    server = run()
    server.create("p")
    with connections(server, 30, GOOD) as idle:
        assert each_begins_with(b"HTTP/1.1 200 ", idle)
        passes(0.3)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        size = (int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) + 4000) * 1024
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                [newcomer] = stack.enter_context(connections(server, 1, GOOD))
                assert first_bytes(newcomer).startswith(b"HTTP/1.1 200 ")


def test_the_health_check_waits_for_no_lock_and_for_no_pot_named_health(run, mysql, database):
    server = run(**mysql())
    for pot in ("health", "p"):
        server.create(pot)
        assert server.next(pot) == 1
    assert server.request("POST", "/id/missing")[0] == 404      # the check tries another one
    with read_lock(database), within(2.5):
        assert server.request("GET", "/healthz")[0] == 503
    wait_until(lambda: healthy(server))
    with pot_locked(database, "health"):
        with connections(server, 1, b"POST /id/health HTTP/1.1\r\nHost: x\r\n\r\n"):
            wait_until(lambda: waiting_for_lock(database, "pot_health"))
            assert server.next("p") == 2        # the pot used last is the one that is tried
            with within(1):
                assert healthy(server)


def read_slowly(descriptor, over, lines):
    """Adds what comes to the lines, with a pause behind each piece, until nothing comes."""
    while not over.is_set() or select.select([descriptor], [], [], 0.5)[0]:
        if select.select([descriptor], [], [], 0.1)[0]:
            lines.append(os.read(descriptor, 16384))
            time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"LogFile": "fifo"}, {}])
def test_a_pipe_as_log_gets_every_line_while_it_is_read(settings, run):
    server = run(listen=f"127.0.0.1:{free_port()}")
    server.stop()
    Path(server.folder, "idpot.cfg").write_text(config_text(**settings))
    os.mkfifo(f"{server.folder}/fifo")
    fifo = os.open(f"{server.folder}/fifo", os.O_RDWR | os.O_NONBLOCK)
    lines, over = [], threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(read_slowly, fifo, over, lines)
        server.process = subprocess.Popen(server.command, cwd=server.folder, stderr=fifo)
        wait_until(lambda: not refused(server.port))
        request = b"GET /counted/%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 300)
        with connections(server, 1) as [client]:
            pipelined(client, request * 20000)
        wait_until(lambda: not select.select([fifo], [], [], 2)[0], 20)
        over.set()
    os.close(fifo)
    assert b"".join(lines).count(b'"GET /counted/') == 20000


@pytest.mark.slow
def test_lines_that_nobody_reads_are_bounded_in_bytes(run):
    server = run(RequestTimeout=60, listen=f"127.0.0.1:{free_port()}")
    server.stop()
    with stderr_is_a_full_pipe(server):
        wait_until(lambda: not refused(server.port))
        before = usage(server).memory
        request = b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: %s\r\n\r\n" % (b"x" * 15000)
        with connections(server, 4) as clients, ThreadPoolExecutor(4) as pool:
            for answers in pool.map(pipelined, clients, [request * 4000] * 4):
                assert answers.count(b"HTTP/1.1 404 ") == 4000
        assert usage(server).memory < before + 180      # 240 MB of lines, of which 64 MB may wait
        assert server.stop() == 0


def test_the_file_gets_its_lines_though_nobody_reads_those_of_events(tmp_path, monkeypatch):
    write_all = idpot.write_all

    def write(descriptor, text):
        if descriptor == 2:
            raise BrokenPipeError
        write_all(descriptor, text)

    monkeypatch.setattr(idpot, "write_all", write)
    writer = idpot.Writer(idpot.StrftimeFileHandler(f"{tmp_path}/access.log"))
    writer.handle(logging.makeLogRecord({"msg": "an event", "levelno": logging.INFO}))
    writer.note(("127.0.0.1", idpot.parse_head(GOOD), 200, 1, 0.1))
    writer._write()
    assert '"POST /id/p HTTP/1.1" 200 1 ' in (tmp_path / "access.log").read_text()


def test_it_serves_with_stderr_closed_and_nothing_else_gets_the_lines(run):
    server = run(listen=f"127.0.0.1:{free_port()}")
    server.create("p")
    server.stop()
    os.truncate(server.stderr, 0)
    server.command[:0] = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    server.start(wait=False)
    wait_until(lambda: server.process.poll() or not refused(server.port))
    assert statuses(http_exchange(server, GOOD * 100)) == [200] * 100
    assert server.stop() == 0
    assert server.errors() == ""
    for file in Path(server.folder).glob("idpot.db*"):
        assert b"listening on" not in file.read_bytes()


def test_a_settings_file_removed_during_the_start_is_no_traceback(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = run(Token="t", Port=port, wait=False)
        assert select.select([listener], [], [], 10)[0]
        os.remove(f"{server.folder}/idpot.cfg")
    server.port = wait_until(server.address, 20)[1]
    assert server.stop() == 0
    assert "Traceback" not in server.errors()


def test_metrics_without_proc_leave_the_process_away(run):
    if os.getuid():
        pytest.skip("only root may hide /proc")
    server = run(python=("unshare", "-m", "sh", "-c",
                         'mount -t tmpfs none /proc && exec "$@"', "sh", sys.executable))
    status, text = server.answer("GET", "/metrics")
    assert status == 200
    assert "\nidpot_ids_issued_total 0\n" in text
    assert "\nprocess_" not in text


def test_a_create_that_the_account_may_not_make_names_no_time_to_come_again(run, mysql, database):
    settings = mysql(Timeout=1)
    database.sql("REVOKE CREATE ON host.* FROM least")
    server = run(**settings)
    status, text, headers = server.request("POST", "/pot/create", "name=p")
    assert status == 503
    assert "Retry-After" not in headers
    assert re.search(r"\(error (1142|1044)\)", text)


def test_a_table_that_cannot_be_read_does_not_hide_the_others_from_the_list(run, mysql, database):
    server = run(**mysql())
    server.create("q", 5)
    make_bad(database, "damaged")
    assert server.answer("GET", "/pot") == (200, "p\t-\nq\t5\n")


def test_a_connection_that_is_lost_within_a_list_hides_no_counter(first, tmp_path):
    (tmp_path / "idpot.cfg").write_text(config_text(**on_servers(first.port)))
    [store, *_] = idpot.MysqlStore.all(idpot.load_settings(f"{tmp_path}/idpot.cfg"))
    store.connect()
    for pot in "pqr":
        store.create(pot, 5)
    pots = store.pots()
    assert next(pots) == ("p", 5)
    with contextlib.closing(first.connect()) as root:
        kill_connections(root, "root")
    assert list(pots) == [("q", 5), ("r", 5)]
    store.close()


WITHOUT_MEMORY = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import idpot
def serve_next(*_):
    raise MemoryError
idpot.Allocator._serve_next = serve_next
sys.exit(idpot.main(sys.argv[2:]))
"""


def test_idpot_ends_with_a_worker_that_lack_of_memory_has_ended(run):
    server = run(python=(sys.executable, "-c", WITHOUT_MEMORY))
    with pytest.raises((OSError, HTTPException)):
        server.request("POST", "/id/p")
    assert server.process.wait(10) == 1
    assert server.errors().endswith("\nMemoryError\n")


@pytest.mark.parametrize("options, setting, target, number", [
    (["--log-bin", "--server-id=1", "--transaction-isolation=READ-COMMITTED"],
     "binlog_format = STATEMENT", "/id/p", 1665),
    (["--disabled-storage-engines=MyISAM"], "sql_require_primary_key = OFF", "/pot/create", 3161),
    ([], "sql_require_primary_key = ON", "/pot/create", 3750)])
def test_what_a_server_refuses_for_good_is_told_at_once(options, setting, target, number, run):
    if number > 3000:
        needs_mysql()
    server = Database(*options)
    try:
        server.sql("CREATE TABLE idpot.pot_p (id BIGINT UNSIGNED NOT NULL) ENGINE = InnoDB")
        server.sql("INSERT INTO idpot.pot_p VALUES (5)")
        server.sql(f"SET GLOBAL {setting}")
        form = "name=q" if target == "/pot/create" else None
        with within(8):
            status, text, headers = run(ConnectString=server.dsn()).request("POST", target, form)
    finally:
        server.remove()
    assert (status, headers["Retry-After"]) == (503, None)
    assert f"(error {number})" in text


@pytest.mark.parametrize("change, number", [
    ("IDENTIFIED BY 'other'", 1045), ("PASSWORD EXPIRE", 1862), ("ACCOUNT LOCK", 3118)])
def test_an_account_that_was_changed_names_no_time_to_come_again(
        change, number, run, mysql, database):
    if number == 3118:
        needs_mysql()
    server = run(**mysql(Timeout=1))
    server.create("p")
    assert server.next("p") == 1
    if not database.is_mysql:
        database.sql("SET GLOBAL disconnect_on_expired_password = ON")
    database.sql(f"ALTER USER least {change}")
    with contextlib.closing(database.connect()) as root:
        kill_connections(root, "least")
    status, text, headers = server.request("POST", "/id/p")
    assert (status, headers["Retry-After"]) == (503, None)
    assert f"(error {number})" in text


# ---------------------------------------------------------------- service managers, the client

class NotifySocket(socket.socket):
    """systemd's end of NOTIFY_SOCKET; `environment` is for the service."""

    def __init__(self, name, **environment):
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bind(name.replace("@", "\0"))
        self.environment = {"NOTIFY_SOCKET": name, **environment}

    def next(self, seconds=10.0):
        """The next datagram; None when none comes in that many seconds."""
        self.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            return self.recv(4096).decode()


# In which whatever takes an ID of the pot "hang" never comes back.
HANGING_IDPOT = python_with(
    "import idpot, threading", "take = idpot.SqliteStore.take",
    "idpot.SqliteStore.take = lambda store, wants: "
    "threading.Event().wait() if wants[0][0] == 'hang' else take(store, wants)")

# Becomes the command, as a service that systemd has handed a socket, or the same one twice.
HAND_OVER = """if True:    # arguments: descriptor, how often to hand it over, command
    import os
    import sys
    for number in range(int(sys.argv[2])):
        os.dup2(int(sys.argv[1]), 3 + number)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
    os.execv(sys.argv[3], sys.argv[3:])"""


@contextlib.contextmanager
def hosted(folder, *wrapper, settings=types.MappingProxyType({}), **options):
    """Runs idpot by the wrapper, whose command it ends; yields the process and errors().

    At the end of the block SIGTERM ends it with 0.
    """
    (folder / "idpot.cfg").write_text(config_text(**settings))
    stderr = folder / "stderr"
    command = [*wrapper, sys.executable, f"{HERE}/idpot.py", "--config=idpot.cfg"]
    with open(stderr, "w") as file:
        process = subprocess.Popen(command, cwd=folder, stderr=file, **options)
    try:
        yield process, stderr.read_text
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(20)


def open_files(server):
    """The paths that the server has open."""
    folder = f"/proc/{server.process.pid}/fd"
    paths = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"{folder}/{name}"))
    return paths


def ids_told(path):
    """How many answers with IDs the access log tells."""
    return len(re.findall(r'"POST /id/p\S* HTTP/1.1" 200 ', Path(path).read_text()))


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """The URL of a server with the tokens t and a, and the pots p and full."""
    server = Idpot(tmp_path_factory.mktemp("secured"), Token="t", AdminToken="a")
    url = f"http://127.0.0.1:{server.port}"
    with idpot.Client(url, token="a") as admin:
        admin.create("p")
        admin.create("full", idpot.MAX_ID)
    yield url
    server.stop(signal.SIGKILL)


class ScriptedServer:
    """A with block with a server that answers each request with the next body of a script.

    Bytes in the script are a whole answer, behind which it closes the connection; None is no answer
    before that; a list is sent piece by piece, each 0.2 s later. `requests` has the request lines,
    each with the number of its connection.
    """

    def __init__(self, *script):
        self.script = list(script)
        self.requests = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def serve(self):
        with contextlib.suppress(OSError):      # of accept, at the end
            for number in itertools.count(1):
                connection, _ = self.listener.accept()
                connection.settimeout(10)
                threading.Thread(target=self.serve_one, args=(number, connection)).start()

    def serve_one(self, number, connection):
        with connection, connection.makefile("rb") as lines:
            while self.answer(number, connection, lines):
                pass

    def answer(self, number, connection, lines):
        """Answers one request; returns whether the connection stays."""
        line = lines.readline().decode().strip()
        if not line:
            return False
        self.requests.append((number, line))
        fields = dict(field.split(b": ") for field in iter(lines.readline, b"\r\n"))
        lines.read(int(fields.get(b"Content-Length", 0)))
        body = self.script.pop(0)
        if isinstance(body, str):
            answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            connection.sendall(answer.encode())
            return True
        with contextlib.suppress(ConnectionError):      # the client has heard enough
            for piece in body if isinstance(body, list) else [body or b""]:
                connection.sendall(piece)
                passes(0.2 * isinstance(body, list))
        return False


def test_a_connection_that_another_process_took_is_not_waited_for():
    with idpot.listen("127.0.0.1", 0, True) as listener:
        assert not listener.getblocking()


class TestServiceManagers:
    @pytest.mark.parametrize("name", ["{}/notify", "@{}/abstract"])
    def test_systemd_is_told_of_ready_reload_and_stop_but_not_the_watchdog_unasked(
            self, name, run, tmp_path):
        with NotifySocket(name.format(tmp_path)) as told:
            listen = f"127.0.0.1:{free_port()}"
            server = run(listen=listen, wait=False, environment=told.environment)
            assert told.next() == "READY=1\nSTATUS=SQLite idpot.db"
            server.port = wait_until(server.address)[1]
            assert healthy(server)
            before = time.monotonic_ns() // 1000
            server.process.send_signal(signal.SIGHUP)
            reloading = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", told.next())
            assert before < int(reloading[1]) < time.monotonic_ns() // 1000
            assert told.next() == "READY=1"
            assert told.next(0.5) is None
            assert server.stop() == 0
            assert told.next() == "STOPPING=1"
            assert told.next(0.01) is None

    def test_systemd_is_told_of_ready_when_the_database_is_still_to_come(self, run, tmp_path):
        with NotifySocket(f"{tmp_path}/notify") as told:
            run(Port=1, environment=told.environment)
            assert told.next().startswith("READY=1\nSTATUS=")

    def test_systemd_is_told_nothing_by_a_start_that_fails(self, run, tmp_path, database):
        with NotifySocket(f"{tmp_path}/notify") as told:
            server = run(
                Port=database.port, Dbname="none", wait=False, environment=told.environment)
            assert server.process.wait(10) == 1
            assert told.next(0.01) is None

    @pytest.mark.slow
    def test_the_watchdog_is_fed_while_idpot_is_idle_or_busy_and_not_while_it_is_stopped(
            self, run, tmp_path):
        with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="3000000") as told:
            server = run(environment=told.environment)
            assert told.next().startswith("READY=1\n")
            assert [told.next(3) for _ in range(3)] == ["WATCHDOG=1"] * 3
            server.create("p")
            with Load([server]) as load:
                load.more()
                assert told.next(3) == "WATCHDOG=1"
            server.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: told.next(3) is None)
            server.process.send_signal(signal.SIGCONT)
            assert told.next(3) == "WATCHDOG=1"

    @pytest.mark.slow
    def test_the_watchdog_is_not_fed_when_a_worker_hangs(self, run, tmp_path):
        with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="4000000") as told:
            server = run(Timeout=1, environment=told.environment)
            server.create("hang")
            server.stop()
            while told.next(0.1):
                pass
            server.command[:1] = HANGING_IDPOT
            server.start()
            assert told.next().startswith("READY=1\n")
            assert told.next(4) == "WATCHDOG=1"
            assert server.request("POST", "/id/hang")[0] == 503
            wait_until(lambda: told.next(4) is None, 40)

    def test_clients_wait_while_idpot_is_restarted_behind_the_socket_of_systemd(self, tmp_path):
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            descriptor = listener.fileno()
            port = listener.getsockname()[1]
            hand_over = [sys.executable, "-c", HAND_OVER, str(descriptor), "1"]
            load = Load([types.SimpleNamespace(port=port)])
            with hosted(tmp_path, *hand_over, pass_fds=[descriptor]):
                idpot.Client(f"http://127.0.0.1:{port}").create("p")
                stack.enter_context(load)
                load.more()
            with hosted(tmp_path, *hand_over, pass_fds=[descriptor]):
                load.more()
                load.__exit__()
            assert load.all_served() >= 400

    @pytest.mark.parametrize("count, message", [
        ("2", "2 sockets were handed over, but one is served: a drop-in of the socket unit begins "
              "with an empty ListenStream="),
        ("1", "does not listen")])
    def test_sockets_of_systemd_that_are_refused(self, count, message, tmp_path):
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            done = subprocess.run(
                [sys.executable, "-c", HAND_OVER, str(bound.fileno()), count,
                 sys.executable, f"{HERE}/idpot.py"],
                cwd=tmp_path, pass_fds=[bound.fileno()], capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert re.fullmatch(f"idpot: .*{message}.*\n", done.stderr)

    @pytest.mark.parametrize("settings, count", [({}, 0), ({"Listen": "127.0.0.1:1"}, 1)])
    def test_a_listen_that_is_not_used_is_warned_of(self, settings, count, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            hand_over = [sys.executable, "-c", HAND_OVER, str(listener.fileno()), "1"]
            with hosted(tmp_path, *hand_over, settings={"LogFile": "log", **settings},
                        pass_fds=[listener.fileno()]) as (_, errors):
                wait_until(lambda: "listening on" in errors())
        assert len(re.findall(r"WARNING .*\bListen\b", errors())) == count

    @pytest.mark.slow
    def test_start_server_replaces_idpot_under_load_without_a_failed_request(self, mysql, tmp_path):
        port = free_port()
        starter = [needs("start_server"), "--interval=1", f"--port=127.0.0.1:{port}", "--"]
        with hosted(tmp_path, *starter, settings=mysql()) as (process, errors):
            wait_until(lambda: "listening on" in errors())
            client = idpot.Client(f"http://127.0.0.1:{port}")
            client.create("p")

            def hang_up(times):
                """A signal between start_server's look for one and its wait is lost."""
                if errors().count("received HUP") == times:
                    return True
                process.send_signal(signal.SIGHUP)

            with Load([types.SimpleNamespace(port=port)]) as load:
                for times in (1, 2):
                    load.more()
                    wait_until(lambda: hang_up(times), 20, every=3)
                    ended = ["0"] * times
                    wait_until(
                        lambda: re.findall(r"worker \d+ died, status:(\d+)", errors()) == ended, 20)
                load.more()
            assert load.all_served() == client.next("p") - 1

    def test_start_server_hands_over_a_unix_socket(self, tmp_path):
        starter = [needs("start_server"), "--interval=1", "--path=s", "--"]
        with socket.socket(socket.AF_UNIX) as client, hosted(tmp_path, *starter) as (_, errors):
            client.settimeout(20)
            client.bind(f"{tmp_path}/client")       # then it has an address of its own
            wait_until(lambda: client.connect_ex(f"{tmp_path}/s") == 0)
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert client.recv(9999).endswith(b"\r\n\r\nok")
            line = r'^127\.0\.0\.1 - - .*"GET /healthz HTTP/1\.0" 200 2 '
            wait_until(lambda: re.search(line, errors(), re.M))

    def test_logs_are_moved_and_reopened_at_sighup_without_losing_a_line(self, mysql, run):
        server = run(**mysql(LogFile="access", LogLinkName="newest"))
        server.create("p")
        log = f"{server.folder}/access"
        moved = [f"{server.folder}/1", f"{server.folder}/2"]
        with Load([server]) as load:
            for path in moved:
                wait_until(lambda: ids_told(log) >= 400)
                os.rename(log, path)
                load.more(20)
                server.process.send_signal(signal.SIGHUP)
                wait_until(lambda: os.path.exists(log) and path not in open_files(server))
            wait_until(lambda: ids_told(log) >= 400)
        assert server.stop() == 0
        assert os.readlink(f"{server.folder}/newest") == "access"
        load.all_served()
        assert sum(map(ids_told, (log, *moved))) == len(load.history())

    @pytest.mark.parametrize("disk", ["gone", "full"])
    def test_a_log_that_cannot_be_written_stops_no_ids_and_is_said_once(self, disk, run, tmp_path):
        logs = tmp_path / "logs"
        with contextlib.ExitStack() as stack:
            if disk == "full":
                stack.enter_context(small_disk(logs, "64k"))
                server = run(LogFile=f"{logs}/access")
            else:
                logs.mkdir()
                server = run(LogFile=f"{logs}/%S")
            server.create("p")
            if disk == "full":      # but for a page, before lines could take that room
                (logs / "ballast").write_bytes(bytes(61440))
            with Load([server], Referer="x" * 997) as load:
                if disk == "gone":      # at once: a file that is deleted is made anew
                    logs.rename(tmp_path / "away")
                wait_until(lambda: "its lines are lost: " in server.errors())
                load.more(500)
                if disk == "full":
                    (logs / "ballast").unlink()
                else:
                    logs.mkdir()
                wait_until(lambda: any(file.stat().st_size > 8192 for file in logs.iterdir()))
            assert load.all_served() == server.next("p") - 1
            assert server.stop() == 0
            assert server.errors().count("its lines are lost: ") == 1
            for file in logs.iterdir():     # no half a line before another
                assert "x127.0.0.1" not in file.read_text()

    def test_the_units_leave_systemd_nothing_to_say_and_little_exposed(self):
        units = [f"{HERE}/contrib/idpot.service", f"{HERE}/contrib/idpot.socket"]
        verify = subprocess.run(
            [needs("systemd-analyze"), "verify", *units], capture_output=True, timeout=60)
        assert verify.stderr == b""
        text = subprocess.check_output(
            ["systemd-analyze", "security", "--offline=true", units[0]], text=True, timeout=60)
        exposed = re.search(r"exposure level for idpot.service: ([0-9.]+)", text)[1]
        assert float(exposed) <= 1.2
        assert "\nRequiredBy=idpot.service\n" in Path(units[1]).read_text()

    def test_one_line_of_the_readme_is_the_command_that_ci_runs(self):
        expression = re.search(r"sed -n '(.*)' README.rst", Path(HERE, ".ci/run").read_text())[1]
        lines = subprocess.check_output(
            ["sed", "-n", expression, f"{HERE}/README.rst"], text=True, timeout=20)
        assert lines.startswith("apt-get update ")
        assert lines.count("\n") == 1


class TestClient:
    @pytest.mark.parametrize("method, arguments, token, error, text", [
        ("next", ["p"], "guess", idpot.Unauthorized, "the bearer token is wrong"),
        ("create", ["p"], None, idpot.Unauthorized, "a bearer token is needed"),
        ("create", ["p"], "a", idpot.Exists, 'pot "p" exists'),
        ("raise_to", ["none", 1], "a", idpot.NotFound, 'there is no pot "none"'),
        ("next_range", ["full", 9], "t", idpot.Exhausted,
         'pot "full" is exhausted: fewer than 9 IDs are left'),
    ])
    def test_client_raises_by_the_status(self, method, arguments, token, error, text, secured):
        with idpot.Client(secured, token) as client:
            with pytest.raises(error, match=f"^{re.escape(text)}$"):
                getattr(client, method)(*arguments)

    @pytest.mark.parametrize("call", [
        lambda url: idpot.Client(url).next("p?count=5"),
        lambda url: idpot.Client(url).current("caf\xe9"),
        lambda url: idpot.Client(url).exists("x" * 61),
        lambda url: idpot.Client(url).next_many("p", 0),
        lambda url: idpot.Client(url).next_many("p", 10001),
        lambda url: idpot.Client(url).next_range("p", 0),
        lambda url: idpot.Client(url).next_range("p", 2**32 + 1),
        lambda url: idpot.Client(url).next_range("p", 1.5),
        lambda url: idpot.Client(url).create("p", -1),
        lambda url: idpot.Client(url).create("p", 2**64),
        lambda url: idpot.Client(url).raise_to("p", "x"),
        lambda url: idpot.Client(url.replace("http", "ftp")).next("p"),
        lambda url: idpot.Client(url.replace("http://", "")).next("p"),
        lambda url: idpot.Client(url + "x").next("p"),
        lambda url: idpot.Client(url, timeout=0).next("p"),
        lambda url: idpot.Client(url, timeout=math.inf).next("p")])
    def test_client_sends_nothing_where_an_argument_cannot_be(self, call):
        with ScriptedServer("1") as server, pytest.raises((ValueError, idpot.IdpotError)):
            call(server.url)
        assert server.requests == []

    @pytest.mark.parametrize("pieces", [
        [b"%c" % byte for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" * 3000000],
    ])
    def test_client_waits_no_longer_than_its_timeout_in_all(self, pieces):
        with ScriptedServer(pieces) as server, idpot.Client(server.url, timeout=0.5) as client:
            with within(1.5), pytest.raises(TimeoutError):
                client.next("p")

    def test_client_returns_numbers_and_ranges(self, run):
        server = run(Token="t\xe9\u20ac", AdminToken="a")
        url = f"http://127.0.0.1:{server.port}"
        admin = idpot.Client(url, token="a")
        client = idpot.Client(url + "/", token="t\xe9\u20ac", timeout=1)
        with admin, client:
            assert admin.create("p", min=40) is None
            assert client.exists("p") is True
            assert client.exists("q") is False
            assert client.next("p") == 41
            assert client.next_many("p", 3) == range(42, 45)
            assert client.current("p") == 44
            assert client.next_range("p", 2**32) == range(45, 45 + 2**32)
            assert client.current("p") == 44 + 2**32
            assert admin.raise_to("p", 2**40) == 2**40
            assert admin.raise_to("p", 5) == 2**40
            assert client.next("p") == 2**40 + 1
            assert admin.raise_to("p", 10**19) == 10**19
            assert client.next_many("p", 10000) == range(10**19 + 1, 10**19 + 10001)

    def test_client_connects_again_to_a_server_that_closed_ended_or_hung(self, run):
        server = run(IdleTimeout=0.3, listen=f"127.0.0.1:{free_port()}")
        server.create("p", 200)
        with idpot.Client(f"http://127.0.0.1:{server.port}", timeout=1) as client:
            assert client.next("p") == 201
            wait_until(lambda: metrics(server)["idpot_connections"] == 1)   # the server closed it
            assert client.next("p") == 202
            for number, last in ((signal.SIGTERM, 202), (signal.SIGKILL, 203)):
                server.stop(number)
                with pytest.raises(ConnectionRefusedError):
                    client.next("p")
                server.start()
                assert client.next("p") == last + 1
            server.process.send_signal(signal.SIGSTOP)
            os.waitpid(server.process.pid, os.WUNTRACED)    # until it has stopped
            with pytest.raises(TimeoutError):
                client.current("p")
            server.process.send_signal(signal.SIGCONT)
            assert client.current("p") == 204

    def test_client_makes_a_create_on_a_new_connection_and_does_not_repeat_it(self):
        with ScriptedServer("7", None, "8") as server, idpot.Client(server.url) as client:
            assert client.next("p") == 7
            with pytest.raises((ConnectionError, HTTPException)):
                client.create("q")
            assert client.next("p") == 8
        assert server.requests[:2] == [
            (1, "POST /id/p HTTP/1.1"), (2, "POST /pot/create HTTP/1.1")]
        assert len(server.requests) == 3

    def test_client_repeats_anything_else_once_where_a_kept_connection_has_died(self):
        script = ["7", None, "9", None, None]
        with ScriptedServer(*script) as server, idpot.Client(server.url) as client:
            assert client.next("p") == 7
            assert client.next("p") == 9
            with pytest.raises((ConnectionError, HTTPException)):
                client.current("p")
        assert server.requests == [
            (1, "POST /id/p HTTP/1.1"), (1, "POST /id/p HTTP/1.1"), (2, "POST /id/p HTTP/1.1"),
            (2, "GET /id/p HTTP/1.1"), (3, "GET /id/p HTTP/1.1")]

    @pytest.mark.parametrize("method, arguments, body", [
        ("next", [], "9"),
        ("next", [], "10"),
        ("next_many", [2], "10\n11\n"),
        ("next_range", [100], "1\t100\n"),
    ])
    def test_client_raises_when_a_pot_went_back(self, method, arguments, body):
        script = ["8\n9\n", "10", body, "5", "11\t20\n", "20", "21"]
        with ScriptedServer(*script) as server, idpot.Client(server.url) as client:
            assert client.next_many("p", 2) == range(8, 10)
            assert client.next("p") == 10
            with pytest.raises(idpot.WentBack, match=r"\bp\b"):
                getattr(client, method)("p", *arguments)
            assert client.next("other") == 5
            assert client.next_range("p", 10) == range(11, 21)
            with pytest.raises(idpot.WentBack):
                client.next("p")
            assert client.next("p") == 21


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>hi</html>",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n12",     # the connection is cut
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n12\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n12",
    b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n1\n2\n3\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n<html>\n<p>no</p>\n</htm>",
    b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", *[b"1" * 100000] * 50],    # in 10 s
    [b"HTTP/1.1 200 OK\r\n\r\n", *[b"1" * 100000] * 50],
])
@pytest.mark.parametrize("method, arguments", [
    ("create", []), ("exists", []), ("current", []), ("next", []),
    ("next_many", [2]), ("next_range", [2]), ("raise_to", [5])])
def test_client_raises_where_an_answer_is_not_idpots(method, arguments, answer):
    with ScriptedServer(answer) as server, idpot.Client(server.url) as client, within(5):
        with pytest.raises(idpot.IdpotError, match="IDs that were asked for|no answer of idpot"):
            getattr(client, method)("p", *arguments)


# -------------------------------------------------------------- faults: MySQL Group Replication

GROUP = "6a4e3b52-3f0d-4c0b-9d0e-6b1d706f7400"


class GroupNode(Database):
    """A MySQL server that is configured for a replication group on loopback, and outside of it.

    `ports` are those of the group's own traffic, one for each node.
    """

    def __init__(self, ports, number=0):
        seeds = ",".join(f"127.0.0.1:{port}" for port in ports)
        super().__init__(
            "--plugin-load-add=group_replication.so",
            f"--group-replication-group-name={GROUP}",
            "--group-replication-start-on-boot=OFF",
            f"--group-replication-local-address=127.0.0.1:{ports[number]}",
            f"--group-replication-group-seeds={seeds}",
            # By default the others wait 22 s before they do without a dead primary; so 7 s.
            "--group-replication-member-expel-timeout=0",
            "--gtid-mode=ON",
            "--enforce-gtid-consistency=ON",
            f"--server-id={number + 1}",
            "--report-host=127.0.0.1",
        )

    def join(self, founds=False):
        self.sql(f"SET GLOBAL group_replication_bootstrap_group = {founds}")
        self.sql("START GROUP_REPLICATION USER = 'root'")
        self.sql("SET GLOBAL group_replication_bootstrap_group = OFF")
        wait_until(lambda: self.state() == "ONLINE", 60)

    def restart_outside(self):
        """Restarts it; it does not join by itself, and takes writes."""
        self.signal(signal.SIGKILL)     # at SIGTERM it takes 6 s to leave the group
        self.start()
        assert (self.state(), self.takes_writes()) == ("OFFLINE", True)

    def members(self):
        """(port, state, role) of each member, as this one sees them."""
        return self.sql("SELECT member_port, member_state, member_role "
                        "FROM performance_schema.replication_group_members ORDER BY 1")

    def state(self):
        """What the server says of itself: ONLINE, OFFLINE ..."""
        for port, state, _ in self.members():
            if port == self.port:
                return state

    def takes_writes(self):
        return self.sql("SELECT @@super_read_only") == [(0,)]

    def become_primary(self):
        self.sql("SELECT group_replication_set_as_primary(@@server_uuid)")

    def end_connections(self):
        """Ends those of the idpots, so that each looks for a server anew."""
        with contextlib.closing(self.connect()) as root:
            kill_connections(root, "root")

    def current(self, pot):
        return self.sql(f"SELECT id FROM idpot.pot_{pot}")[0][0]


def needs_mysql():
    """Skips the test where the server is no MySQL; no failure in CI: Debian has MariaDB only."""
    program = database_program()
    if not program or not is_mysql(program):
        pytest.skip("this needs a MySQL server: let IDPOT_TEST_MYSQLD name one")


def on_group_node(node, engine, credentials="root"):
    return {"Timeout": 2, "Engine": engine, "ConnectString": node.dsn(credentials=credentials)}


@pytest.fixture(scope="module")
def loner():
    needs_mysql()
    node = GroupNode([free_port()])
    yield node
    node.remove()


@pytest.fixture
def founder(loner):
    """The only member of a group."""
    if loner.state() != "ONLINE":
        loner.join(founds=True)
    return loner


def agree(nodes):
    """Whether all are ONLINE, and say the same of each other."""
    first = nodes[0].members()
    for node in nodes:
        if node.state() != "ONLINE" or node.members() != first:
            return False
    return len(first) == len(nodes)


@pytest.fixture(scope="module")
def three_nodes():
    needs_mysql()
    ports = [free_port() for _ in range(3)]
    nodes = []
    with contextlib.ExitStack() as stack:
        for number in range(3):
            nodes.append(GroupNode(ports, number))
            stack.callback(nodes[-1].remove)
            nodes[-1].join(founds=number == 0)
        yield nodes


@pytest.fixture
def group(three_nodes):
    """Three members of a group; the first is the primary."""
    for node in three_nodes:
        if node.state() == "OFFLINE":
            node.join()
    wait_until(lambda: agree(three_nodes), 60)
    three_nodes[0].become_primary()
    return three_nodes


class TestGroupReplication:
    def test_outside_its_group_a_server_gives_no_id_and_serves_when_it_has_joined(
            self, founder, run):
        run(**on_group_node(founder, "InnoDB")).create("outside", 41)
        founder.restart_outside()
        server = run(**on_group_node(founder, "InnoDB"))
        for method, target in [
                ("GET", "/healthz"), ("POST", "/id/outside"), ("GET", "/id/outside")]:
            status, text = server.answer(method, target)
            assert status == 503
            assert "its server is OFFLINE in the replication group" in text
        assert founder.current("outside") == 41
        founder.join(founds=True)
        wait_until(lambda: healthy(server))
        assert server.next("outside") == 42

    def test_a_group_member_asks_for_the_grant_that_it_needs(self, founder, run):
        founder.sql("CREATE USER clerk IDENTIFIED BY 'p'")
        founder.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO clerk")
        settings = on_group_node(founder, "InnoDB", credentials="clerk:p")
        refused = run(**settings, wait=False)
        assert refused.process.wait(10) == 1
        assert re.fullmatch("idpot: MySQL .* 1142 .*SELECT command denied to user 'clerk'@.*"
                            "'replication_group_members'\n", refused.errors())
        founder.sql("GRANT SELECT ON performance_schema.replication_group_members TO clerk")
        server = run(**settings)
        server.create("granted")
        assert server.next("granted") == 1
        assert healthy(server)

    def test_a_group_member_refuses_myisam_at_the_start(self, founder, run):
        server = run(**on_group_node(founder, "MyISAM"), wait=False)
        assert_refused(
            server, f"MySQL 127.0.0.1:{founder.port}: Engine: the replication group {GROUP} "
                    "replicates InnoDB only, not MyISAM")

    def test_a_server_that_joins_a_group_later_is_left_no_empty_myisam_table(self, founder, run):
        founder.restart_outside()
        founder.sql("UNINSTALL PLUGIN group_replication")
        server = run(**on_group_node(founder, "MyISAM"))
        server.create("myisam")
        founder.sql("DROP TABLE idpot.pot_myisam")
        founder.sql("INSTALL PLUGIN group_replication SONAME 'group_replication.so'")
        for state in ("OFFLINE", "ONLINE"):
            assert founder.state() == state
            status, text, _ = server.request("POST", "/pot/create", "name=myisam")
            assert status == 503
            assert founder.sql("SHOW TABLES FROM idpot LIKE 'pot_myisam'") == []
            if state == "OFFLINE":
                founder.join(founds=True)
        assert f"the replication group {GROUP} replicates InnoDB only, not MyISAM" in text

    @pytest.mark.slow
    def test_group_the_primary_changes_as_planned(self, group, run):
        a, b, c = group
        with Load(run_two(run, group, "planned"), "planned", patience=4) as load:
            load.wait_for(ids=300)
            b.become_primary()
            load.recover()
            a.become_primary()
            load.recover()
        load.verdict(a.current("planned"))
        assert {answer.status for answer in load.history()} == {200}

    @pytest.mark.slow
    def test_group_a_secondary_that_was_made_writable_gives_no_id(self, group, run):
        """The group looks for no conflicts between a primary and such a one: IDs would repeat."""
        a, b, c = group
        b.sql("SET GLOBAL super_read_only = OFF")
        b.sql("SET GLOBAL read_only = OFF")
        server = run(**on_cluster([b]))
        try:
            assert not healthy(server)
        finally:
            b.become_primary()
        wait_until(lambda: healthy(server))

    @pytest.mark.slow
    @pytest.mark.parametrize("number, state", [
        (signal.SIGKILL, "OFFLINE"),    # then it takes writes, with an older counter
        (signal.SIGSTOP, "ONLINE"),     # and believes in its office when it wakes
    ], ids=["dies", "hangs"])
    def test_group_the_primary_is_lost_and_comes_back(self, number, state, group, run):
        a, b, c = group
        pot = state.lower()
        with Load(run_two(run, group, pot), pot, patience=4) as load:
            load.wait_for(ids=300)
            a.signal(number)
            wait_until(lambda: b.takes_writes() or c.takes_writes(), 60)
            load.recover()
            if number == signal.SIGKILL:
                a.start()
            else:
                a.signal(signal.SIGCONT)
            assert (a.state(), a.takes_writes()) == (state, True)
            primary = b if b.takes_writes() else c
            primary.end_connections()
            load.recover()
        load.verdict(primary.current(pot))

    @pytest.mark.slow
    @pytest.mark.parametrize("leave", ["DO 0", "STOP GROUP_REPLICATION"])
    def test_group_an_old_primary_made_writable_by_hand_gives_no_id(self, leave, group, run):
        a, b, c = group
        server = eight_connections(run, emptied(a), on_cluster([a, b, c]))
        b.become_primary()
        a.sql(leave)
        a.sql("SET GLOBAL super_read_only = 0")
        a.sql("SET GLOBAL read_only = 0")
        other = run(**on_cluster([b, c, a]))
        passes(1.5)
        ids = []
        for _ in range(40):
            ids += at_once(lambda: server.next("p0"), lambda: other.next("p0"))
            assert len(set(ids)) == len(ids), ids

    @pytest.mark.slow
    def test_group_without_its_majority_gives_no_id(self, group, run):
        """The last test on these nodes: two of them stay dead."""
        a = group[0]
        servers = run_two(run, group, "minority")
        with Load(servers, "minority", patience=4) as load:
            left_alone(load, *group)
            assert a.takes_writes()
            assert [healthy(server) for server in servers] == [False, False]
            a.signal(signal.SIGKILL)    # the operator: the others are dead
            a.start()
            a.join(founds=True)
            load.recover()
        load.verdict(a.current("minority"))
