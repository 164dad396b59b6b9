"""Tests of idpot over a real MariaDB or MySQL server and SQLite, through real HTTP.

    tox                         # or: python3 -m pytest

The database server is started here, in a temporary directory on a free port, and ended here.
IDPOT_TEST_MYSQLD names the program where it is not the installed mariadbd or mysqld. Where there is
none its tests are skipped with the reason, except under CI=true: there they fail.
"""

import collections
import contextlib
import errno
import functools
import http.server
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
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
    first = 21000 + os.getpid() % 5000
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
    version = subprocess.check_output([program, "--no-defaults", "--version"], text=True)
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
        self.options, self.port = options, free_port()
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
        done = subprocess.run([*command, f"--datadir={self.dir}/data", *self.as_user],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        """Starts the server and returns when it answers."""
        command = [self.program, "--no-defaults", f"--datadir={self.dir}/data",
                   f"--socket={self.socket}", f"--pid-file={self.dir}/pid",
                   f"--port={self.port}", "--bind-address=127.0.0.1", "--skip-name-resolve",
                   f"--log-error={self.log}", "--innodb-buffer-pool-size=64M"]
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
                     "collation": "utf8mb4_general_ci", "connection_timeout": 10}
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


class Idpot:
    """`python idpot.py --config=...` in a directory of its own, where config is the file's text.

    With None there is no file and no --config. `python` is the command that runs idpot.py.
    """

    def __init__(self, folder, config="", *arguments, listen="127.0.0.1:0", wait=True,
                 environment=None, python=(sys.executable,)):
        self.folder = str(folder)
        os.makedirs(self.folder, exist_ok=True)
        self.stderr = os.path.join(self.folder, "stderr")
        self.command = [*python, os.path.join(HERE, "idpot.py")]
        if config is not None:
            path = Path(self.folder, "idpot.cfg")
            path.write_text(config)
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

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

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

    def raw(self, data, timeout=15, half_close=False):
        """Sends the bytes and returns all that comes until the server closes, or time is over."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                chunk = True
                while chunk:
                    chunk = connection.recv(65536)
                    answer += chunk
        return answer

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


@pytest.fixture
def run(tmp_path):
    """Starts idpots: run(config, *arguments); each is ended after the test."""
    started = []

    def start(config="", *arguments, **options):
        folder = tmp_path / f"idpot{len(started)}"
        started.append(Idpot(folder, config, *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)


# ---------------------------------------------------------------- allocation, in process

class MemoryStore:
    """A store in memory, as the allocator knows stores; the counters are its pots.

    `calls` are the statements that it got. Each waits while `gate` is not set. `faults` are
    functions for the next calls of take: each is called by one, and may raise.
    """
    LIMIT = 1000        # the last ID of each pot

    def __init__(self, **counters):
        self.counters = counters
        self.calls = []
        self.faults = []
        self.gate = threading.Event()
        self.gate.set()
        self.reachable = True
        self.connected = False
        self.attempts = 0       # to connect

    def connect(self):
        self.attempts += 1
        if not self.reachable:
            raise idpot.Retry("no connection")
        self.connected = True

    def begin(self, *call):
        self.calls.append(call)
        assert self.gate.wait(10)

    def take(self, pot, count, floor):
        if self.faults:
            self.calls.append("fault")
            self.faults.pop(0)()
        self.begin("take", pot, count, floor)
        if self.counters[pot] + count > self.LIMIT:
            raise idpot.Exhausted(f"fewer than {count}")
        self.counters[pot] += count
        return self.counters[pot]

    def current(self, pot):
        self.begin("current", pot)
        return self.counters[pot]

    def create(self, pot, low):
        self.begin("create", pot, low)
        if pot in self.counters:
            raise idpot.Exists("exists")
        self.counters[pot] = low

    def raise_to(self, pot, low):
        self.begin("raise_to", pot, low)
        self.counters[pot] = max(self.counters[pot], low)
        return self.counters[pot]

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
        self.allocator = idpot.Allocator(list(stores), idpot.Metrics())
        self.allocator.start()

    def ask(self, name, pot="p", **wanted):
        """Submits a job, whose answer is to have that name, and returns it."""
        def answer(value, error):
            self.answers.append((name, type(error), str(error)) if error else (name, value))

        job = idpot.Job(answer, **wanted)
        self.allocator.submit(pot, job)
        return job

    def wait_for(self, count):
        """Waits until so many jobs are answered."""
        wait_until(lambda: len(self.answers) >= count)

    @contextlib.contextmanager
    def held(self, store):
        """A with block during which a read of pot p is under way, so that other jobs wait."""
        store.gate.clear()
        self.ask("held", call=("current", "p"))
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


@pytest.fixture
def sqlite_store(tmp_path):
    """An SqliteStore over a file of its own, with pot p at 10."""
    (tmp_path / "idpot.cfg").write_text(f"[Sqlite]\nFile = {tmp_path}/idpot.db\n")
    store = idpot.SqliteStore(idpot.load_settings(f"{tmp_path}/idpot.cfg"), idpot.Metrics())
    store.start()
    store.create("p", 10)
    yield store
    store.close()


@pytest.mark.parametrize("floor, last", [(None, 13), (10, 13), (4, 13), (50, 53)])
def test_sqlite_takes_above_the_floor_and_the_counter_whichever_is_higher(
        sqlite_store, floor, last):
    assert sqlite_store.take("p", 3, floor) == last
    assert sqlite_store.current("p") == last


@pytest.mark.parametrize("floor", [None, 7])
def test_sqlite_takes_nothing_from_a_pot_that_is_not_there(sqlite_store, floor):
    with pytest.raises(idpot.NotFound, match='there is no pot "q"'):
        sqlite_store.take("q", 1, floor)


def test_sqlite_goes_on_across_the_sign_of_its_integers_up_to_the_end(sqlite_store):
    sqlite_store.raise_to("p", 2**63 - 2)
    assert sqlite_store.take("p", 3, 2**63 - 2) == 2**63 + 1
    assert sqlite_store.take("p", 1, 2**63 + 1) == 2**63 + 2
    sqlite_store.raise_to("p", 2**64 - 3)
    with pytest.raises(idpot.Exhausted, match="fewer than 3 IDs are left"):
        sqlite_store.take("p", 3, 2**64 - 3)
    assert sqlite_store.take("p", 2, 2**64 - 3) == 2**64 - 1


def test_sqlite_is_not_well_again_while_it_can_only_be_read(sqlite_store, caplog):
    caplog.set_level(logging.INFO)
    sqlite_store._db.execute("PRAGMA query_only = 1")
    for _ in range(2):
        with pytest.raises(idpot.Unavailable, match="readonly"):
            sqlite_store.take("p", 1, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    sqlite_store._db.execute("PRAGMA query_only = 0")
    assert sqlite_store.take("p", 1, None) == 11
    assert re.fullmatch("SQLite .* is well again", caplog.records[-1].getMessage())


@pytest.fixture
def mysql_store(database, tmp_path):
    """A MysqlStore over a database of its own, connected."""
    database.sql("DROP DATABASE IF EXISTS store_test")
    database.sql("CREATE DATABASE store_test")
    (tmp_path / "idpot.cfg").write_text(f"[Mysql]\nConnectString = {database.dsn('store_test')}\n")
    store = idpot.MysqlStore.all(idpot.load_settings(f"{tmp_path}/idpot.cfg"), idpot.Metrics())[0]
    store.connect()
    yield store
    store.close()


def test_a_missing_table_that_is_no_pots_is_trouble_of_the_database(mysql_store):
    with pytest.raises(idpot.Unavailable, match=re.escape("(error 1146)")):
        mysql_store._select("SELECT 1 FROM not_there")
    assert not mysql_store.connected


def test_a_create_whose_connection_is_lost_behind_the_row_has_made_the_pot(mysql_store, database):
    own = mysql_store._select("SELECT CONNECTION_ID()")[0][0]
    select = mysql_store._select

    def killed_before_the_release(query, *arguments):
        if "RELEASE_LOCK" in query:
            database.sql(f"KILL {own}")
        return select(query, *arguments)

    mysql_store._select = killed_before_the_release
    mysql_store.create("p", 5)
    assert not mysql_store.connected
    assert mysql_store.take("p", 1, None) == 6


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
        assert store.calls == [("take", "p", 13, None)]
        assert allocation.answers == [("one", 1), ("ten", 11), ("two", 13)]

    def test_each_statement_is_told_the_highest_id_that_was_given(self, start):
        store = MemoryStore(p=0)
        allocation = start(store)
        allocation.ask("five", count=5)
        allocation.wait_for(1)
        allocation.ask("one", count=1)
        allocation.wait_for(2)
        allocation.ask("raise", call=("raise_to", "p", 50))
        allocation.wait_for(3)
        allocation.ask("lower", call=("raise_to", "p", 9))
        allocation.wait_for(4)
        allocation.ask("last", count=1)
        allocation.wait_for(5)
        assert store.calls == [
            ("take", "p", 5, None),
            ("take", "p", 1, 5),
            ("raise_to", "p", 50),
            ("raise_to", "p", 9),
            ("take", "p", 1, 50)]
        assert allocation.answers == [
            ("five", 5), ("one", 6), ("raise", 50), ("lower", 50), ("last", 51)]

    def test_one_read_answers_all_readers_but_each_create_is_its_own(self, start):
        store = MemoryStore(p=5)
        allocation = start(store)
        with allocation.held(store):
            allocation.ask("read a", call=("current", "p"))
            allocation.ask("create a", call=("create", "p", 8))
            allocation.ask("read b", call=("current", "p"))
            allocation.ask("create b", call=("create", "p", 8))
        allocation.wait_for(4)
        assert store.calls == [("current", "p"), ("create", "p", 8), ("create", "p", 8)]
        assert allocation.answers == [
            ("read a", 5),
            ("read b", 5),
            ("create a", idpot.Exists, "exists"),
            ("create b", idpot.Exists, "exists")]

    def test_jobs_that_were_answered_do_not_pile_up_while_no_worker_can_connect(self):
        class NoDatabase:
            connected = False

            def connect(self):
                raise idpot.Retry("no database")

            def close(self):
                pass

        allocator = idpot.Allocator([NoDatabase(), NoDatabase()], idpot.Metrics())
        allocator.start()
        try:
            for number in range(50):
                job = idpot.Job(lambda value, error: None, 1)
                allocator.submit(f"pot{number % 5}", job)
                job.expire()
            wait_until(lambda: not any(allocator._queues.values()))
        finally:
            allocator.stop()

    def test_a_retry_puts_jobs_back_before_later_ones_and_answers_them_once(self, start):
        def fault():
            allocation.ask("late", count=5)
            raise idpot.Retry("no connection")

        store = MemoryStore(p=0)
        store.faults = [fault, failing(idpot.Retry("no connection"))]
        allocation = start(store)
        allocation.ask("early", count=1)
        allocation.wait_for(2)
        allocation.ask("last", count=1)
        allocation.wait_for(3)
        assert store.calls == ["fault", "fault", ("take", "p", 6, None), ("take", "p", 1, 6)]
        assert allocation.answers == [("early", 1), ("late", 6), ("last", 7)]

    def test_where_not_all_fit_together_those_that_fit_alone_are_served(self, start):
        store = MemoryStore(p=990)
        allocation = start(store)
        with allocation.held(store):
            for count in (1, 500, 2, 8, 7):
                allocation.ask(f"{count} of ten", count=count)
        allocation.wait_for(5)
        assert allocation.answers == [
            ("1 of ten", 991),
            ("500 of ten", idpot.Exhausted, "fewer than 500"),
            ("2 of ten", 993),
            ("8 of ten", idpot.Exhausted, "fewer than 8"),
            ("7 of ten", 1000)]

    def test_another_error_of_the_store_is_the_answer_to_all(self, start):
        store = MemoryStore(p=0)
        store.faults = [failing(idpot.NotFound("there is no pot"))]
        allocation = start(store)
        with allocation.held(store):
            allocation.ask("one", count=1)
            allocation.ask("two", count=2)
        allocation.wait_for(2)
        assert allocation.answers == [
            ("one", idpot.NotFound, "there is no pot"),
            ("two", idpot.NotFound, "there is no pot")]
        assert store.calls == ["fault"]

    def test_an_unexpected_exception_is_a_500_and_the_worker_lives_on(
            self, start, caplog, monkeypatch):
        monkeypatch.setattr(idpot.log, "propagate", True)
        store = MemoryStore(p=0)
        store.faults = [failing(ZeroDivisionError("planted"))]
        allocation = start(store)
        allocation.ask("unlucky", count=1)
        allocation.wait_for(1)
        allocation.ask("next", count=1)
        allocation.wait_for(2)
        assert allocation.answers == [
            ("unlucky", idpot.IdpotError, "internal error"), ("next", 1)]
        assert idpot.IdpotError.status == 500
        assert "ZeroDivisionError: planted" in caplog.text

    def test_an_exception_while_connecting_does_not_end_the_worker(self, start):
        store = MemoryStore(p=0)
        connect = store.connect

        def fault():
            store.connect = connect
            raise MemoryError

        store.connect = fault
        allocation = start(store)
        allocation.ask("first", count=1)
        allocation.wait_for(1)
        assert allocation.answers == [("first", 1)]

    def test_a_worker_that_cannot_connect_leaves_the_pot_to_another(self, start):
        good, bad = MemoryStore(p=0, q=0), MemoryStore()
        bad.reachable = False
        allocation = start(bad, good)
        with allocation.held(good):
            allocation.ask("other pot", pot="q", count=1)
            wait_until(lambda: bad.attempts > 1)
            assert allocation.answers == []
        allocation.wait_for(1)
        assert allocation.answers == [("other pot", 1)]
        assert bad.calls == []

    def test_a_try_to_connect_does_not_count_while_another_worker_has_a_connection(self, start):
        good, *bad = [MemoryStore(p=0, q=7), MemoryStore(), MemoryStore()]
        for store in bad:
            store.reachable = False
        allocation = start(good, *bad)
        with allocation.held(good):
            allocation.ask("probe", pot="q", call=("current", "q"), retries=1)
            wait_until(lambda: sum(store.attempts for store in bad) > 5)
            assert allocation.answers == []
        allocation.wait_for(1)
        assert allocation.answers == [("probe", 7)]

    def test_a_pot_is_served_again_after_answers_for_which_there_was_no_memory(self, start):
        store = MemoryStore(p=0)
        allocation = start(store)

        def answer(value, error):
            raise MemoryError

        with allocation.held(store):
            for _ in range(2):
                allocation.allocator.submit("p", idpot.Job(answer, count=1))
        allocation.ask("next", count=1)
        allocation.wait_for(1)
        assert allocation.answers == [("next", 3)]

    def test_jobs_wait_until_a_worker_can_connect(self, start):
        store = MemoryStore(p=0)
        store.reachable = False
        allocation = start(store)
        allocation.ask("patient", count=1)
        wait_until(lambda: store.attempts > 2)
        assert allocation.answers == []
        store.reachable = True
        allocation.wait_for(1)
        assert allocation.answers == [("patient", 1)]

    def test_a_slow_pot_does_not_hold_up_another(self, start):
        over = threading.Event()
        stores = [MemoryStore(p=0, q=7), MemoryStore(p=0, q=7)]
        for store in stores:
            store.faults = [functools.partial(over.wait, 10)]
        allocation = start(*stores)
        allocation.ask("slow", count=1)
        allocation.ask("quick", pot="q", call=("current", "q"))
        allocation.wait_for(1)
        over.set()
        allocation.wait_for(2)
        assert allocation.answers == [("quick", 7), ("slow", 1)]

    def test_a_pot_has_one_worker_at_a_time(self, start):
        stores = [MemoryStore(p=0), MemoryStore(p=0), MemoryStore(p=0)]
        for store in stores:
            store.gate.clear()
        allocation = start(*stores)
        allocation.ask("first", count=1)
        wait_until(lambda: any(store.calls for store in stores))
        for _ in range(5):
            allocation.ask("later", count=1)
        allocation.ask("other", pot="q", call=("current", "p"))
        allocation.ask("third", pot="r", call=("current", "p"))
        wait_until(lambda: all(store.calls for store in stores))
        names = [call[0] for store in stores for call in store.calls]
        assert sorted(names) == ["current", "current", "take"]

    def test_the_worker_that_was_used_last_is_the_next(self, start):
        stores = [MemoryStore(p=0), MemoryStore(p=0), MemoryStore(p=0)]
        allocation = start(*stores)
        for number in range(1, 21):
            wait_until(lambda: len(allocation.allocator._idle) == 3)
            allocation.ask("lone", count=1)
            allocation.wait_for(number)
        assert sorted(len(store.calls) for store in stores) == [0, 0, 20]
        assert sorted(store.attempts for store in stores) == [0, 0, 1]

    def test_a_stop_answers_what_is_under_way_and_closes_the_stores(self, start):
        stores = [MemoryStore(p=0, q=0), MemoryStore(p=0, q=0)]
        for store in stores:
            store.gate.clear()
        allocation = start(*stores)
        allocation.ask("p", count=1)
        allocation.ask("q", pot="q", count=1)
        wait_until(lambda: all(store.calls for store in stores))
        allocation.stop()
        assert sorted(allocation.answers) == [("p", 1), ("q", 1)]
        assert [store.connected for store in stores] == [False, False]

    def test_a_job_whose_time_is_over_is_told_why_and_its_late_value_is_dropped(self, start):
        store = MemoryStore(p=0)
        store.faults = [failing(idpot.Retry("the database cannot serve this now (error 1290)"))]
        store.gate.clear()
        allocation = start(store)
        late = allocation.ask("late", count=5, patience=2.5)
        wait_until(lambda: store.calls == ["fault", ("take", "p", 5, None)])
        late.expire()
        store.gate.set()
        allocation.ask("next", count=1)
        allocation.wait_for(2)
        text = "the database cannot serve this now (error 1290), tried for 2.5 seconds"
        assert allocation.answers == [("late", idpot.Unavailable, text), ("next", 6)]

    def test_a_job_that_the_database_did_not_answer_in_time_is_told_so(self, start):
        store = MemoryStore(p=0)
        store.gate.clear()
        allocation = start(store)
        hung = allocation.ask("hung", count=1)
        wait_until(lambda: store.calls)
        hung.expire()
        text = "the database did not answer in 10 seconds"
        assert allocation.answers == [("hung", idpot.Unavailable, text)]

    def test_a_job_whose_time_was_over_before_its_statement_costs_no_id(self, start):
        store = MemoryStore(p=0)
        allocation = start(store)
        with allocation.held(store):
            over = allocation.ask("over", count=5)
            allocation.ask("next", count=1)
            over.expire()
            over = allocation.answers.pop()
        allocation.wait_for(1)
        assert over[0] == "over"
        assert allocation.answers == [("next", 1)]

    def test_a_job_whose_client_has_gone_after_a_second_costs_no_id(self, start):
        store = MemoryStore(p=0)
        allocation = start(store)
        with allocation.held(store):
            gone = allocation.ask("gone", count=5, gone=lambda: True)
            gone.start -= 1.1
            allocation.ask("next", count=1)
        allocation.wait_for(2)
        text = "the client has closed its side"
        assert allocation.answers == [("gone", idpot.Unavailable, text), ("next", 1)]


# ---------------------------------------------------------------- the API, over every store

def refusal(server, method, target, form=None):
    """The (status, text) of an answer that has changed no pot and shows nothing of the inside."""
    before = server.answer("GET", "/pot")[1]
    status, text, headers = server.request(method, target, form)
    assert re.fullmatch("[ -~]{1,199}\n", text)
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
    ("POST", "/pot/create", "min=1", 400, 'name "" is not 1 to 60 characters of A-Z a-z 0-9 _ -\n'),
    ("POST", "/pot/create", "name=a&name=b", 400, '"name" is given twice\n'),
    ("POST", "/pot/create", "name=a&min=18446744073709551616", 400,
     f'min "18446744073709551616" {MIN}'),
    ("POST", "/pot/create", "name=fixed&min=99", 409, 'pot "fixed" exists\n'),
    ("POST", "/pot/raise", "name=fixed", 400, f'min "" {MIN}'),
    ("POST", "/pot/raise", "name=none&min=9", 404, 'there is no pot "none"\n'),
    ("POST", "/id/fixed?count=0", None, 400, f'count "0" {COUNT}'),
    ("POST", "/id/fixed", "count=10001", 400, f'count "10001" {COUNT}'),
    ("POST", "/id/fixed?count=2&count=2", None, 400, '"count" is given twice\n'),
    ("POST", "/id/fixed?count=2", "count=2", 400, '"count" is given twice\n'),
    ("POST", "/id/fixed?range=0", None, 400, f'range "0" {RANGE}'),
    ("POST", "/id/fixed", "range=4294967297", 400, f'range "4294967297" {RANGE}'),
    ("POST", "/id/fixed?range=2", "range=2", 400, '"range" is given twice\n'),
    ("POST", "/id/none", None, 404, 'there is no pot "none"\n'),
    ("POST", "/id/none?range=5", None, 404, 'there is no pot "none"\n'),
    ("GET", "/id/none", None, 404, 'there is no pot "none"\n'),
    ("GET", "/pot/none", None, 404, 'there is no pot "none"\n'),
    ("POST", "/", None, 404, 'there is nothing at "/"\n'),
    ("POST", "/id", None, 404, 'there is nothing at "/id"\n'),
    ("POST", "/id/", None, 404, 'there is nothing at "/id/"\n'),
    ("POST", "/pot/", None, 404, 'there is nothing at "/pot/"\n'),
    ("POST", "/id/fixed/", None, 404, 'there is nothing at "/id/fixed/"\n'),
    ("POST", "/ID/fixed", None, 404, 'there is nothing at "/ID/fixed"\n'),
    ("POST", "//id/fixed", None, 404, 'there is nothing at "//id/fixed"\n'),
    ("POST", "/id/../id/fixed", None, 404, 'there is nothing at "/id/../id/fixed"\n'),
    ("POST", "/pot", None, 405, "POST is not allowed here, but GET, HEAD\n"),
    ("POST", "/pot/fixed", None, 405, "POST is not allowed here, but GET, HEAD\n"),
    ("DELETE", "/id/fixed", None, 405, "DELETE is not allowed here, but GET, HEAD, POST\n"),
    ("PUT", "/pot/create", None, 405, "PUT is not allowed here, but GET, HEAD, POST\n"),
    ("post", "/pot/raise", None, 405, "post is not allowed here, but GET, HEAD, POST\n"),
]

UNKNOWN_FIELDS = [
    ("POST", "/pot/create", "name=a&mn=5", 'unknown field "mn": here are name, min\n'),
    ("POST", "/pot/create?Min=5", "name=a", 'unknown field "Min": here are name, min\n'),
    ("POST", "/pot/raise?max=5", "name=fixed&min=1", 'unknown field "max": here are name, min\n'),
    ("POST", "/id/fixed", "counts=5", 'unknown field "counts": here are count, range\n'),
    ("POST", "/id/fixed?Count=5", None, 'unknown field "Count": here are count, range\n'),
    ("POST", "/id/fixed?min=5", "range=2", 'unknown field "min": here are count, range\n'),
    ("POST", "/id/fixed?%1b=", None, 'unknown field "\\x1b": here are count, range\n'),
    ("GET", "/id/fixed?count=5", None, 'unknown field "count": there are none here\n'),
    ("GET", "/pot/fixed?min=5", None, 'unknown field "min": there are none here\n'),
    ("GET", "/pot?name=fixed", None, 'unknown field "name": there are none here\n'),
    ("GET", "/healthz?verbose=", None, 'unknown field "verbose": there are none here\n'),
    ("GET", "/metrics?name=", None, 'unknown field "name": there are none here\n'),
]

NO_NUMBERS = [      # as it is sent, as the answer shows it
    ("", '""'),
    ("-1", '"-1"'),
    ("%2B5", '"+5"'),
    ("1e3", '"1e3"'),
    ("1.0", '"1.0"'),
    ("0x1", '"0x1"'),
    ("1_0", '"1_0"'),
    ("%201", '" 1"'),
    ("1%0A", '"1\\n"'),
    ("%D9%A3", '"\\u0663"'),
    ("%EF%BC%91", '"\\uff11"'),
    ("9" * 5000, '"' + "9" * 100 + '..."'),
]

NO_NAMES = [        # as it is sent, as the answer shows it
    ("a%20b", "a b"),
    ("a.b", "a.b"),
    ("a/b", "a/b"),
    ("%C3%A9", "\\xe9"),
    ("a%00", "a\\x00"),
    ("a%0A", "a\\n"),
    ("%60%3B--", "`;--"),
    ("a%25", "a%"),
    ("%EF%BC%91", "\\uff11"),
    ("x" * 61, "x" * 61),
]


class ApiContract:
    """What every store does; a subclass names the engine, "" is SQLite. Pot `fixed` stays at 41."""
    engine = ""

    @pytest.fixture(scope="class")
    @classmethod
    def api(cls, request, tmp_path_factory):
        config = ""
        if cls.engine:
            database = request.getfixturevalue("database")
            database.sql(f"CREATE DATABASE api_{cls.engine}")
            config = f"[Mysql]\nConnectString = {database.dsn(f'api_{cls.engine}')}\n"
            config += f"Engine = {cls.engine}\n"
        server = Idpot(tmp_path_factory.mktemp("api"), config)
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
        no_min = (400, f"min {shown} {MIN}")
        assert refusal(api, "POST", "/pot/create", f"name=a&min={sent}") == no_min
        assert refusal(api, "POST", "/pot/raise", f"name=a&min={sent}") == no_min
        no_count = (400, f"count {shown} {COUNT}")
        assert refusal(api, "POST", "/id/fixed", f"count={sent}") == no_count
        assert refusal(api, "POST", f"/id/fixed?count={sent}") == no_count
        no_range = (400, f"range {shown} {RANGE}")
        assert refusal(api, "POST", "/id/fixed", f"range={sent}") == no_range
        assert refusal(api, "POST", f"/id/fixed?range={sent}") == no_range

    @pytest.mark.parametrize("sent, shown", NO_NAMES)
    def test_names_are_letters_digits_minus_and_underline(self, api, sent, shown):
        no_name = (400, f'name "{shown}" is not 1 to 60 characters of A-Z a-z 0-9 _ -\n')
        assert refusal(api, "POST", "/pot/create", f"name={sent}") == no_name
        assert refusal(api, "POST", "/pot/raise", f"min=1&name={sent}") == no_name
        no_id = (404, f'there is nothing at "/id/{shown}"\n')
        assert refusal(api, "GET", f"/id/{sent}") == no_id
        assert refusal(api, "POST", f"/id/{sent}") == no_id
        no_pot = (404, f'there is nothing at "/pot/{shown}"\n')
        assert refusal(api, "GET", f"/pot/{sent}") == no_pot

    def test_405_says_in_its_header_what_is_allowed(self, api):
        assert api.request("DELETE", "/id/fixed")[2]["Allow"] == "GET, HEAD, POST"
        assert api.request("post", "/pot/raise")[2]["Allow"] == "GET, HEAD, POST"
        assert api.request("POST", "/pot/fixed")[2]["Allow"] == "GET, HEAD"

    def test_every_id_of_the_unsigned_range_is_given_once(self, api):
        exhausted = 'pot "whole" is exhausted: fewer than'
        api.create("whole", 9223372036854775806)
        for target, form, status, text in [
                ("/id/whole", None, 200, "9223372036854775807"),
                ("/id/whole", None, 200, "9223372036854775808"),
                ("/id/whole", None, 200, "9223372036854775809"),
                ("/pot/raise", "name=whole&min=18446744073709551612", 200, "18446744073709551612"),
                ("/id/whole", None, 200, "18446744073709551613"),
                ("/id/whole?count=3", None, 409, f"{exhausted} 3 IDs are left\n"),
                ("/id/whole?range=3", None, 409, f"{exhausted} 3 IDs are left\n"),
                ("/id/whole?count=2", None, 200, "18446744073709551614\n18446744073709551615\n"),
                ("/id/whole", None, 409, f"{exhausted} 1 IDs are left\n"),
                ("/pot/raise", "name=whole&min=18446744073709551615", 200, "18446744073709551615")]:
            assert api.answer("POST", target, form) == (status, text)
        assert api.answer("GET", "/id/whole") == (200, "18446744073709551615")

    def test_a_batch_and_a_range_over_the_middle_of_the_unsigned_range(self, api):
        api.create("batch", 2**63 - 3)
        assert api.next("batch", 3) == [2**63 - 2, 2**63 - 1, 2**63]
        api.create("middle", 9223372036854775800)
        text = "9223372036854775801\t9223372036854775900\n"
        assert api.answer("POST", "/id/middle?range=100") == (200, text)

    def test_a_range_may_end_at_the_last_id_but_not_beyond(self, api):
        api.create("wide", 18446744069414584318)
        text = "18446744069414584319\t18446744073709551614\n"
        assert api.answer("POST", "/id/wide?range=4294967296") == (200, text)
        text = 'pot "wide" is exhausted: fewer than 2 IDs are left\n'
        assert api.answer("POST", "/id/wide?range=2") == (409, text)
        assert api.next("wide") == 18446744073709551615

    def test_forty_requests_for_the_last_ten_ids(self, api):
        api.create("last", MAX_ID - 10)
        request = functools.partial(api.answer, "POST", "/id/last")
        answers = at_once(*[request] * 40)
        given = [int(text) for status, text in answers if status == 200]
        assert sorted(given) == list(range(MAX_ID - 9, MAX_ID + 1))
        text = 'pot "last" is exhausted: fewer than 1 IDs are left\n'
        assert answers.count((409, text)) == 30

    def test_twelve_creates_of_one_name_at_once(self, api):
        create = functools.partial(api.answer, "POST", "/pot/create", "name=once&min=7")
        answers = at_once(*[create] * 12)
        assert answers.count((201, "Created new pot")) == 1
        assert answers.count((409, 'pot "once" exists\n')) == 11
        assert api.answer("GET", "/pot")[1].count("once\t7\n") == 1

    def test_ids_have_no_gap_and_a_later_request_gets_a_greater_one(self, api):
        api.create("order")
        history = []

        def client(count):
            for _ in range(20):
                begin = time.monotonic()
                ids = api.next("order", count)
                history.append((begin, time.monotonic(), ids))

        counts = (1, 1, 1, 2, 3, 1, 7, 1)
        at_once(*[functools.partial(client, count) for count in counts])
        given = []
        for _, _, ids in history:
            given += ids
            assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert sorted(given) == list(range(1, 341))
        for _, end, earlier in history:
            for begin, _, later in history:
                assert begin <= end or later[0] > earlier[-1]

    def test_singles_counts_and_ranges_at_once_have_no_id_in_common(self, api):
        api.create("mixed")

        def single():
            return [api.next("mixed")]

        def batch():
            return api.next("mixed", 3)

        def wide():
            _, text = api.answer("POST", "/id/mixed?range=100")
            first, last = text.split("\t")
            return list(range(int(first), int(last) + 1))

        answers = at_once(*[single, batch, wide] * 5)
        given = sum(answers, [])
        assert sorted(given) == list(range(1, 521))


class TestApiSqlite(ApiContract):
    def test_pots_outlive_the_process_all_in_the_one_file(self, run):
        server = run()
        assert server.request("GET", "/pot")[:2] == (200, "")
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

    @pytest.mark.parametrize("pot", ["row0", "row1", "row2", "row3"])
    def test_twelve_creates_of_one_name_at_two_servers_make_one_row(self, api, sql, run, pot):
        other = run(Path(api.folder, "idpot.cfg").read_text())
        form = f"name={pot}&min=7"
        here = functools.partial(api.answer, "POST", "/pot/create", form)
        there = functools.partial(other.answer, "POST", "/pot/create", form)
        answers = at_once(*[here, there] * 6)
        assert answers.count((201, "Created new pot")) == 1
        assert answers.count((409, f'pot "{pot}" exists\n')) == 11
        assert sql(f"SELECT * FROM pot_{pot}") == [(7,)]

    def test_the_table_of_a_new_pot(self, api, sql):
        api.create("new")
        [(_, table)] = sql("SHOW CREATE TABLE pot_new")
        table = table.replace("(20)", "")       # a display width, which MySQL has no more
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
        ("same", [5, 5]),
        ("two", [5, 6]),
        ("top", [5, 18446744073709551615])])
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
        assert sql("SELECT * FROM pot_empty") == [(9,)]

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
        parameters = "?sql_mode=''&sql_safe_updates=1&autocommit=0"
        dsn = database.dsn(f"api_{self.engine}", parameters)
        server = run(f"[Mysql]\nConnectString = {dsn}\nEngine = {self.engine}\n")
        assert server.errors().count(" WARNING ConnectString: these parameters are ignored: "
                                     "sql_mode, sql_safe_updates, autocommit\n") == 1
        server.create("weak", 5)
        assert server.next("weak", 2) == [6, 7]
        assert sql("SELECT id FROM pot_weak") == [(7,)]
        self.table(sql, "clipped", "id INT UNSIGNED NOT NULL", "4294967294")
        assert server.next("clipped") == 4294967295
        assert server.request("POST", "/id/clipped")[0] == 409
        assert sql("SELECT id FROM pot_clipped") == [(4294967295,)]

    def test_a_counter_set_back_by_hand_gives_no_lower_id_and_is_logged_once(self, api, sql):
        api.create("back", 41)
        assert api.next("back", 100)[-1] == 141
        sql("UPDATE pot_back SET id = 50")
        assert [api.next("back") for _ in range(3)] == [142, 143, 144]
        assert self.warnings(api, "back") == [
            "the counter of pot back was set back to 50, but 141 was given: it goes on above that"]
        assert sql("SELECT * FROM pot_back") == [(144,)]


class TestApiInnodb(TestApiMyisam):
    engine = "InnoDB"
    columns = "`id` bigint unsigned NOT NULL,\n  PRIMARY KEY (`id`)\n"
    # For these the engine is not asked.
    test_what_is_refused_changes_nothing = None
    test_a_field_that_is_not_known_is_refused = None
    test_numbers_are_plain_decimal_digits = None
    test_names_are_letters_digits_minus_and_underline = None
    test_405_says_in_its_header_what_is_allowed = None


# ---------------------------------------------------------------- requests that share a statement

class TestGroups:
    @pytest.fixture(autouse=True)
    def fresh(self, database):
        database.sql("DROP DATABASE IF EXISTS groups_test")
        database.sql("CREATE DATABASE groups_test")

    @pytest.fixture
    def server(self, run, database):
        dsn = database.dsn("groups_test")
        return run(f"[Server]\nTimeout = 60\n[Mysql]\nConnectString = {dsn}\n")

    @contextlib.contextmanager
    def held(self, database, pot):
        """Holds the pot by a table lock; yields a function that returns when a statement waits."""
        waiting = ("SELECT id FROM information_schema.processlist "
                   f"WHERE info LIKE '%pot\\_{pot}%' AND state LIKE 'Wait%'")
        with contextlib.closing(database.connect(database="groups_test")) as connection:
            connection.cursor().execute(f"LOCK TABLES `pot_{pot}` WRITE")
            yield lambda: wait_until(lambda: database.sql(waiting))

    def wait_for_requests(self, server, count):
        """Waits until so many requests are in flight, besides the one that asks for it."""
        wait_until(lambda: metrics(server)["idpot_http_requests_in_flight"] == count + 1)

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

    def test_sixty_requests_that_wait_together_share_a_statement_for_ids_and_one_for_reads(
            self, server, database):
        server.create("group")
        clients = []
        with self.held(database, "group") as wait_for_statement:
            for number in range(60):
                clients.append(server.connect())
                method = b"GET" if number % 3 == 2 else b"POST"
                clients[-1].sendall(method + b" /id/group HTTP/1.1\r\n"
                                    b"Host: x\r\nConnection: close\r\n\r\n")
                if number == 0:
                    wait_for_statement()
                    before = self.status(database)
            self.wait_for_requests(server, 60)
        ids = [int(client.makefile("rb").read().split()[-1]) for client in clients]
        after = self.status(database)
        assert ids[0] == 1
        assert sorted(set(ids)) == list(range(1, 41))
        assert ids[2::3] == [40] * 20       # the reads
        assert after["Com_update"] - before["Com_update"] <= 2
        assert after["Com_select"] - before["Com_select"] <= 2

    def test_a_request_whose_client_has_gone_costs_no_id(self, server, database):
        server.create("gone")
        with ThreadPoolExecutor(1) as pool, self.held(database, "gone") as wait_for_statement:
            first = pool.submit(server.next, "gone")
            wait_for_statement()
            with server.connect() as client:
                client.sendall(b"POST /id/gone HTTP/1.1\r\nHost: x\r\n\r\n")
                self.wait_for_requests(server, 2)
            left = time.monotonic()
            wait_until(lambda: time.monotonic() > left + 1.5)   # a shorter wait is not looked into
        assert first.result() == 1
        assert server.next("gone") == 2

    def test_an_impossible_count_does_not_fail_its_neighbours(self, server, database):
        server.create("near", MAX_ID - 10)
        with ThreadPoolExecutor(7) as pool, self.held(database, "near") as wait_for_statement:
            futures = []
            for count in (1, 10000, 2, 100, 3, 50, 4):
                futures.append(pool.submit(server.answer, "POST", f"/id/near?count={count}"))
            wait_for_statement()
            self.wait_for_requests(server, 7)
        answers = [future.result() for future in futures]
        assert [status for status, _ in answers] == [200, 409, 200, 409, 200, 409, 200]
        given = [text.split() for status, text in answers if status == 200]
        assert [len(ids) for ids in given] == [1, 2, 3, 4]
        assert sorted(map(int, sum(given, []))) == list(range(MAX_ID - 9, MAX_ID + 1))

    def test_a_held_pot_does_not_hold_up_another(self, server, database):
        server.create("slow")
        server.create("fast")
        with ThreadPoolExecutor(1) as pool, self.held(database, "slow") as wait_for_statement:
            slow = pool.submit(server.next, "slow")
            wait_for_statement()
            assert server.request("POST", "/id/fast", timeout=5)[:2] == (200, "1")
            assert server.request("GET", "/id/fast", timeout=5)[:2] == (200, "1")
            assert not slow.done()
        assert slow.result() == 1

    def test_twenty_pots_share_the_three_connections_that_the_user_may_have(self, run, database):
        database.sql("CREATE USER IF NOT EXISTS three IDENTIFIED BY 'p'")
        database.sql("ALTER USER three WITH MAX_USER_CONNECTIONS 3")
        database.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON groups_test.* TO three")
        dsn = database.dsn("groups_test", credentials="three:p")
        server = run(f"[Server]\nTimeout = 3\n[Mysql]\nConnectString = {dsn}\n")
        pots = [f"one_of_{number}" for number in range(20)]
        for pot in pots:
            server.create(pot)

        def client(pot):
            return [server.next(pot) for _ in range(20)]

        given = at_once(*[functools.partial(client, pot) for pot in pots])
        assert given == [list(range(1, 21))] * 20

    def test_a_stop_signal_can_reach_the_first_thread_only(self, server):
        server.create("started")        # by now all threads are there
        pid = server.process.pid
        others = [Path(f"/proc/{pid}/task/{task}/status").read_text()
                  for task in os.listdir(f"/proc/{pid}/task") if task != str(pid)]
        blocked = [int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16) for status in others]
        assert len(blocked) > 8
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert all(mask & 1 << number - 1 for mask in blocked), number

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
        dsn = database.dsn("groups_test")
        server = run(f"[Server]\nTimeout = 2\n[Mysql]\nConnectString = {dsn}\n")
        server.create("hung")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.held(database, "hung"))
            server.process.send_signal(signal.SIGSTOP)
            clients = []
            for _ in range(20):
                client = server.connect()
                clients.append(stack.enter_context(client))
                client.sendall(b"POST /id/hung HTTP/1.1\r\nHost: x\r\n\r\n")
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

    def config(self, database, credentials="root", timeout=1):
        dsn = database.dsn("start_test", credentials=credentials)
        return f"[Server]\nTimeout = {timeout}\n[Mysql]\nConnectString = {dsn}\n"

    def troubles(self, server):
        """The warnings but for the one about MyISAM."""
        return re.findall(r"WARNING (?!Engine MyISAM)(.*)", logged(server))

    def test_idpot_is_there_before_its_database_and_serves_when_it_comes(self, run, database):
        database.signal(signal.SIGTERM)
        with ThreadPoolExecutor(1) as pool:
            try:
                server = run(self.config(database))
                patient = run(self.config(database, timeout=60))
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
        wait_until(lambda: server.answer("GET", "/healthz") == (200, "ok"))
        server.create("late", 7)
        assert server.next("late") == 8
        [trouble] = self.troubles(server)
        assert f"127.0.0.1:{database.port}" in trouble

    def test_a_database_that_is_read_only_at_first(self, run, database):
        database.sql("CREATE USER IF NOT EXISTS starter IDENTIFIED BY 'p'")
        database.sql("GRANT ALL ON start_test.* TO starter")
        database.sql("SET GLOBAL read_only = 1")
        try:
            server = run(self.config(database, "starter:p"))
            answer = server.answer("POST", "/pot/create", "name=written")
        finally:
            database.sql("SET GLOBAL read_only = 0")
        text = ("the database cannot serve this now: it is read-only (error 1290), "
                "tried for 1 seconds\n")
        assert answer == (503, text)
        server.create("written")
        assert server.next("written") == 1
        assert len(self.troubles(server)) == 1

    def test_a_database_whose_connections_are_used_up_at_first(self, run, database):
        database.sql("CREATE USER IF NOT EXISTS single IDENTIFIED BY 'p'")
        database.sql("ALTER USER single WITH MAX_USER_CONNECTIONS 1")
        database.sql("GRANT ALL ON start_test.* TO single")
        with contextlib.closing(database.connect(user="single", password="p")):
            server = run(self.config(database, "single:p"))
            answer = server.answer("POST", "/pot/create", "name=crowded")
        text = "the database cannot serve this now (error 1226), tried for 1 seconds\n"
        assert answer == (503, text)
        server.create("crowded")
        assert server.next("crowded") == 1
        assert len(self.troubles(server)) == 1


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
UNCLOSED = "a double quote is not closed, or a backslash stands outside of quotes"
REFUSED_SETTINGS = [    # the text of f.cfg, what is said
    ("[Server]\nListn = 127.0.0.1:0", 'f.cfg: unknown name "listn" in [Server]'),
    ("# x\n[server]\n\nTIMEOUT = 1\nHostname=x", 'f.cfg: unknown name "hostname" in [Server]'),
    ("[Server]\nWorkers = 2", 'f.cfg: unknown name "workers" in [Server]'),
    ("[Postgres]\nHost = x", "f.cfg: unknown section [Postgres]"),
    ("[Mysql]\nPort = 1\n[Sqlite]\nFile = x",
     "f.cfg: [Mysql] and [Sqlite] are both given: keep one"),
    ("[Mysql]\nPassword: secret", "f.cfg:2: this is neither [section] nor name = value"),
    ("Listen = x", "f.cfg:1: this is neither [section] nor name = value"),
    ("[Server]\nTimeout = 1\nTimeout = 1", "f.cfg:3: this is there twice"),
    ("[Server]\nTimeout = 1\n\ntimeOUT = 2", "f.cfg:4: this is there twice"),
    ("[Server]\n[Mysql]\n[Server]", "f.cfg:3: this is there twice"),
    ("[Server]\nTimeout = 1\n[SERVER]\nListen = :80", "f.cfg:3: this is there twice"),
    ("[Mysql]\nPort = 33O6", 'f.cfg: [Mysql] Port: "33O6" is not a whole number from 1 to 65535'),
    ("[Mysql]\nEngine = a b", 'f.cfg: [Mysql] Engine: "a b" is not the name of a storage engine'),
    ("[Mysql]\nConnections = 0",
     'f.cfg: [Mysql] Connections: "0" is not a whole number from 1 to 64'),
    ("[mysql]\nconnections = 65",
     'f.cfg: [Mysql] Connections: "65" is not a whole number from 1 to 64'),
    ("[Server]\nTimeout = 0", f'f.cfg: [Server] Timeout: "0" {SECONDS}'),
    ("[Server]\nTimeout = 1_0", f'f.cfg: [Server] Timeout: "1_0" {SECONDS}'),
    ("[Server]\nIdleTimeout = nan", f'f.cfg: [Server] IdleTimeout: "nan" {SECONDS}'),
    ("[Server]\nRequestTimeout = 9s", f'f.cfg: [Server] RequestTimeout: "9s" {SECONDS}'),
    ("[Server]\nMaxConnections = x",
     'f.cfg: [Server] MaxConnections: "x" is not a whole number from 1 to 1000000'),
    ("[Server]\nListen = localhost", 'f.cfg: [Server] Listen: "localhost" is not host:port'),
    ('[Server]\nToken = "secret', f"f.cfg: [Server] Token: {UNCLOSED}"),
    ("[Server]\nLogFile = a\\b", f"f.cfg: [Server] LogFile: {UNCLOSED}"),
    ("[Server]\nLogFile = a\\\n", f"f.cfg: [Server] LogFile: {UNCLOSED}"),
    ('[Server]\nToken = "a\\qc"',
     'f.cfg: [Server] Token: a backslash stands before none of \\ " n t'),
    ("[Mysql]\nConnectString = u:secret@tcp(h:1)",
     "f.cfg: [Mysql] ConnectString: there is no database name after a last /"),
    ("[Mysql]\nConnectString=u:secret@/",
     "f.cfg: [Mysql] ConnectString: there is no database name after a last /"),
    ("[Mysql]\nConnectString=u:secret@tcp(h:x)/d",
     'f.cfg: [Mysql] ConnectString: "h:x" is not host:port'),
    ("[Mysql]\nConnectString=u:secret@tcp(h:65536)/d",
     'f.cfg: [Mysql] ConnectString: "h:65536" is not host:port'),
    ("[Mysql]\nConnectString=u:secret@tcp([::1)/d",
     'f.cfg: [Mysql] ConnectString: "[::1" is not host:port'),
    ("[Mysql]\nConnectString = u:secret/d",
     "f.cfg: [Mysql] ConnectString: there is no @ before an address, such as tcp(host:port)"),
    ("[Mysql]\nConnectString=u:secret@tcp(h/d",
     'f.cfg: [Mysql] ConnectString: "tcp(h" has no closing parenthesis at its end'),
    ("[Mysql]\nConnectString=u:secret@udp(h)/d",
     'f.cfg: [Mysql] ConnectString: "udp" is neither tcp nor unix'),
    ("[Mysql]\nConnectString=u:secret@h:3306/d",
     'f.cfg: [Mysql] ConnectString: "h:3306" is neither tcp nor unix'),
    ("[Mysql]\nConnectString=u:secret@/d?timeout=5",
     'f.cfg: [Mysql] ConnectString: "5" is not a duration such as 30s or 500ms'),
    ("[Mysql]\nConnectString=u:secret@/d?tls=maybe",
     'f.cfg: [Mysql] ConnectString: "maybe" is not true, false, skip-verify or preferred'),
]


class TestSettings:
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
        ('[Server]\nLogFile = ""\nToken = "q\\"b\\\\t\\t="', {"logfile": "", "token": 'q"b\\t\t='}),
        ("[Server]\nListen = [::1]:80\nTimeout = 0.5", {"listen": ("::1", 80), "timeout": 0.5}),
        ("[Server]\nListen = :80\nMaxConnections =", {"listen": ("", 80), "maxconnections": 1024}),
        ("[Mysql]\nConnections = 3", {"connections": 3}),
        ("[Mysql]", {
            "user": "root",
            "password": "",
            "hosts": [("127.0.0.1", 3306)],
            "database": "idpot",
            "connections": 8}),
        ('[Mysql]\nUsername = u\nPassword = "p#"\nHostname = h\nPort = 1\nDbname = d', {
            "user": "u",
            "password": "p#",
            "hosts": [("h", 1)],
            "database": "d"}),
        ("[Mysql]\nConnectString = u:p%40@/d", {
            "user": "u",
            "password": "p%40",
            "database": "d"})])
    def test_how_they_are_read(self, config, expected):
        settings = self.load(config)
        assert {name: settings[name] for name in expected} == expected

    def test_the_example_file_has_every_name_once(self):
        example = Path(HERE, "idpot.cfg.example").read_text()
        names = [name for section in idpot.SETTINGS.values() for name in section]
        assert sorted(re.findall(r"(?m)^;(\w+) =", example)) == sorted(names)

    @pytest.mark.parametrize("other", ["Mysql", "Sqlite"])      # both at once are refused
    def test_the_example_file_says_the_defaults(self, other):
        example = Path(HERE, "idpot.cfg.example").read_text()
        whole = re.sub(r"(?m)^;(\[|\w+ =)", r"\1", example)
        without_other = re.sub(rf"(?ms)^\[{other}\].*?(?=^\[|\Z)", "", whole)
        assert without_other != whole != example
        defaults = self.load("")
        for text in (example, without_other):
            loaded = self.load(text)
            for section in idpot.SETTINGS.values():
                for name in section:
                    assert loaded[name.lower()] == defaults[name.lower()]

    @pytest.mark.parametrize("text, expected", [
        ("/db", {
            "user": "",
            "password": "",
            "hosts": [("127.0.0.1", 3306)],
            "database": "db",
            "ignored": []}),
        ("u:a@b:c/d(e)?f&g@tcp(h:1)/d", {
            "user": "u",
            "password": "a@b:c/d(e)?f&g",
            "hosts": [("h", 1)],
            "database": "d"}),
        ("u@tcp/db", {
            "user": "u",
            "password": "",
            "hosts": [("127.0.0.1", 3306)]}),
        ("u:p@tcp(db1,db2:3307,[fe80::1])/db", {
            "hosts": [("db1", 3306), ("db2", 3307), ("fe80::1", 3306)]}),
        ("u:p@tcp([::1]:3307)/d%2Fb%25", {
            "hosts": [("::1", 3307)],
            "database": "d/b%"}),
        ("u:p@unix(/run/my(sql)/s.sock)/db", {
            "unix_socket": "/run/my(sql)/s.sock",
            "hosts": []}),
        ("/db?timeout=1m30s&readTimeout=500ms", {
            "connection_timeout": 90,
            "read_timeout": 0.5}),
        ("/db?writeTimeout=2.5s&tls=1", {
            "write_timeout": 2.5,
            "tls": "true"}),
        ("/db?tls=skip-verify", {"tls": "skip-verify"}),
        ("/db?charset=utf8mb4,utf8&collation=x_bin", {
            "charset": "utf8mb4",
            "collation": "x_bin"}),
        ("/db?parseTime=true&loc=Asia%2FTokyo&maxAllowedPacket=0", {
            "ignored": ["parseTime", "loc", "maxAllowedPacket"]}),
        ("/db?x=%27a+b%27&wait_timeout=9", {"ignored": ["x", "wait_timeout"]}),
        ("/db?autocommit=0&a`b=1&no=1&tls=0", {
            "ignored": ["autocommit", "a`b", "no"],
            "tls": "false"})])
    def test_what_a_dsn_says(self, text, expected):
        dsn = idpot.parse_dsn(text)
        assert {name: dsn[name] for name in expected} == expected

    @pytest.mark.parametrize("config, message", REFUSED_SETTINGS)
    def test_what_is_refused(self, capsys, config, message):
        Path("f.cfg").write_text(config)
        code = idpot.main(["--config=f.cfg", "--listen=192.0.2.1:8"])   # no address of this host
        assert (code, *capsys.readouterr()) == (78, "", f"idpot: {message}\n")

    def test_no_file(self, capsys):
        assert idpot.main(["--config=no.cfg"]) == 78
        assert idpot.main(["--config=no.cfg", "--check"]) == 1
        message = "idpot: no.cfg: No such file or directory\n"
        assert capsys.readouterr() == ("", message * 2)

    def test_an_argument_that_is_no_address(self, capsys):
        with pytest.raises(SystemExit, match="^2$"):
            idpot.main(["--listen=x"])
        message = 'idpot: error: argument --listen: "x" is not host:port\n'
        assert capsys.readouterr().err.endswith(message)

    def stopped(self, config, *arguments):
        """(exit code, stderr) of an idpot that does not start; what is no secret there is told."""
        Path("f.cfg").write_text(config)
        command = [sys.executable, f"{HERE}/idpot.py", "--config=f.cfg", "--listen=127.0.0.1:0"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=20)
        assert done.stdout == "" and "secret" not in done.stderr
        return done.returncode, done.stderr

    def test_an_address_that_is_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            code, errors = self.stopped("", f"--listen={address}")
        message = f"idpot: cannot listen on {address}: Address already in use"
        assert (code, errors.startswith(message)) == (1, True)

    def test_an_address_of_another_host(self):
        code, errors = self.stopped("", "--listen=192.0.2.1:8")
        message = "idpot: cannot listen on 192.0.2.1:8: Cannot assign requested address"
        assert (code, errors.startswith(message)) == (1, True)

    @pytest.mark.parametrize("config, message", [
        ("[Server]\nLogFile = no/dir/log\n",
         'idpot: LogFile "no/dir/log": No such file or directory\n'),
        ("[Server]\nLogFile = x\nLogLinkName = f.cfg\n",
         'idpot: LogFile "f.cfg": LogLinkName is there and is not a symlink\n'),
        ("[Sqlite]\nFile = no/dir/db\n",
         'idpot: SQLite file "no/dir/db": unable to open database file\n'),
        ("[Sqlite]\nFile = f.cfg\n", 'idpot: SQLite file "f.cfg": file is not a database\n')])
    def test_files_that_stop_the_start(self, config, message):
        assert self.stopped(config) == (1, message)

    @pytest.mark.parametrize("arguments", [[], ["--check"]])
    @pytest.mark.parametrize("user, name, engine, code, message", [
        ("root:secret", "empty_test", "InnoDB", 1,
         "idpot: MySQL {address}: .*Access denied for user.*"),
        ("root", "no", "InnoDB", 1, "idpot: MySQL {address}: .*Unknown database 'no'.*"),
        ("root", "empty_test", "No", 78, 'idpot: Engine: the server has no storage engine "No"')])
    def test_a_database_that_stops_the_start(
            self, empty, arguments, user, name, engine, code, message):
        dsn = empty.dsn(name, credentials=user)
        config = f"[Mysql]\nConnectString = {dsn}\nEngine = {engine}\n"
        got, errors = self.stopped(config, *arguments)
        assert got == (1 if arguments else code)
        line = message.format(address=f"127.0.0.1:{empty.port}")
        assert re.fullmatch(f"{line}\n", errors)

    def test_parameters_of_the_dsn_that_are_ignored_are_named_in_one_line(self, run, database):
        dsn = database.dsn(parameters="?parseTime=true&timeout=2s&autocommit=0&no=1")
        server = run(f"[Mysql]\nConnectString = {dsn}\nEngine = InnoDB\n")
        assert re.findall(r" idpot\[\d+\] WARNING (.*ignored.*)", server.errors()) == [
            "ConnectString: these parameters are ignored: parseTime, autocommit, no"]

    def test_listen_without_a_host_is_ipv6_and_ipv4(self, run):
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this host has no IPv6")
        server = run("[Server]\nListen = :0\n", listen=None)
        for host in ("127.0.0.1", "::1"):
            with contextlib.closing(HTTPConnection(host, server.port, timeout=10)) as connection:
                connection.request("GET", "/healthz")
                assert connection.getresponse().read() == b"ok"
        hosts = re.findall(r'(?m)^(\S+) - - \[.*"GET /healthz ', logged(server))
        assert hosts == ["127.0.0.1", "::1"]

    def test_a_temporary_link_that_was_left_over_does_not_stop_the_start(self, run):
        server = run("[Server]\nLogFile = log\nLogLinkName = newest\n")
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
        # -S hides pip, too.
        assert done.stderr == (
            "idpot: [Mysql] needs mysql-connector-python: apt-get install -y "
            "--no-install-recommends python3-pip && python3 -m pip install "
            f"--target={HERE} 'mysql-connector-python>=9.2'\n")

    def test_plain_python_with_nothing_installed_serves_the_two_curl_commands(self, run):
        server = run(None, python=["env", "-i", sys.executable, "-I", "-S"])
        url = f"http://127.0.0.1:{server.port}"
        create = [needs("curl"), "-sS", "-d", "name=orders", f"{url}/pot/create"]
        assert subprocess.check_output(create, timeout=20) == b"Created new pot"
        next_id = ["curl", "-sS", "-X", "POST", f"{url}/id/orders"]
        assert subprocess.check_output(next_id, timeout=20) == b"1"
        assert re.search(r"listening on http://127\.0\.0\.1:\d+ \(SQLite idpot\.db\)\n",
                         server.errors())


class TestCheck:
    """`--check` says what is wrong, and changes nothing."""

    def check(self, config, *before):
        """(exit code, stdout, stderr) of --check; `before` is the beginning of the command."""
        Path("f.cfg").write_text(config)
        command = [*before, sys.executable, f"{HERE}/idpot.py", "--config=f.cfg", "--check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.returncode, done.stdout, done.stderr

    def listing(self, folder):
        """{path: (size, time of the last change)} of the folder and of all that is in it"""
        found = {}
        for path in [Path(folder), *Path(folder).rglob("*")]:
            status = path.lstat()
            found[path] = (status.st_size, status.st_mtime_ns)
        return found

    def test_a_database_that_is_reached(self, empty, folder):
        dsn = f"root@unix({empty.socket})/empty_test"
        answer = self.check(f"[Mysql]\nConnectString = {dsn}\nEngine = InnoDB\n")
        reached = f"MySQL {empty.socket}/empty_test, InnoDB is reached"
        assert answer == (0, f"idpot: the settings are valid, {reached}\n", "")
        assert empty.sql("SHOW TABLES", database="empty_test") == []

    def test_a_database_that_cannot_be_reached(self, folder):
        port = free_port()
        dsn = f"root@tcp(127.0.0.1:{port})/idpot"
        code, out, errors = self.check(f"[Mysql]\nConnectString = {dsn}\n")
        assert (code, out) == (1, "")
        assert re.fullmatch(f"idpot: MySQL 127.0.0.1:{port}: .*Can't connect to .*\n", errors)

    def test_a_database_that_is_read_only(self, empty, folder):
        empty.sql("SET GLOBAL read_only = 1")
        try:
            dsn = empty.dsn("empty_test")
            answer = self.check(f"[Mysql]\nConnectString = {dsn}\nEngine = InnoDB\n")
        finally:
            empty.sql("SET GLOBAL read_only = 0")
        reason = "the database cannot serve this now: it is read-only (error 1290)"
        assert answer == (1, "", f"idpot: MySQL 127.0.0.1:{empty.port}: {reason}\n")

    def test_it_writes_nothing(self, folder):
        Path("data/logs").mkdir(parents=True)
        before = self.listing("data")
        answer = self.check("[Server]\nLogFile = data/logs/%Y\nLogLinkName = data/newest\n"
                            "[Sqlite]\nFile = data/ids.db\n")
        says = "SQLite data/ids.db can be made"
        assert answer == (0, f"idpot: the settings are valid, {says}\n", "")
        assert self.listing("data") == before
        assert sorted(os.listdir()) == ["data", "f.cfg"]

    def test_beside_a_running_idpot_it_says_that_the_file_is_in_use(self, run, folder):
        server = run("[Server]\nLogFile = log\nLogLinkName = newest\n[Sqlite]\nFile = ids.db\n")
        server.create("p")
        wait_until(lambda: "/pot/create" in Path(server.folder, "log").read_text())
        before = self.listing(server.folder)
        file = f"{server.folder}/ids.db"
        answer = self.check(f"[Server]\nLogFile = {server.folder}/log\n[Sqlite]\nFile = {file}\n")
        says = f"SQLite {file} is in use by another process"
        assert answer == (0, f"idpot: the settings are valid, {says}\n", "")
        assert self.listing(server.folder) == before
        assert server.next("p") == 1

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_what_an_idpot_that_has_ended_left_is_not_touched(self, run, folder, number):
        server = run()
        server.create("p")
        server.stop(number)
        before = self.listing(server.folder)
        file = f"{server.folder}/idpot.db"
        answer = self.check(f"[Sqlite]\nFile = {file}\n")
        assert answer == (0, f"idpot: the settings are valid, SQLite {file} can be used\n", "")
        assert self.listing(server.folder) == before
        server.start()
        assert server.next("p") == 1

    @pytest.mark.parametrize("config, message", [
        ("[Server]\nLogFile = closed/log\n",
         'idpot: LogFile "closed/log": its folder cannot be written\n'),
        ("[Server]\nLogFile = no/dir/log\n",
         'idpot: LogFile "no/dir/log": its folder is not there\n'),
        ("[Server]\nLogFile = f.cfg/log\n",
         'idpot: LogFile "f.cfg/log": its folder is not there\n'),
        ("[Server]\nLogFile = roots\n",
         'idpot: LogFile "roots": it cannot be written\n'),
        ("[Sqlite]\nFile = no/dir/db\n",
         'idpot: SQLite file "no/dir/db": its folder is not there\n'),
        ("[Sqlite]\nFile = closed/db\n",
         'idpot: SQLite file "closed/db": "closed" cannot be written\n'),
        ("[Sqlite]\nFile = f.cfg\n",
         'idpot: SQLite file "f.cfg": file is not a database\n')])
    def test_files_that_could_not_be_written(self, folder, config, message):
        Path("closed").mkdir(mode=0o555)
        Path("roots").touch(mode=0o444)
        # Root may write everywhere, unless this capability is taken away.
        drop = [needs("setpriv"), "--bounding-set=-dac_override"] if os.getuid() == 0 else []
        assert self.check(config, *drop) == (1, "", message)


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
        server = run("[Server]\nLogFile = log.%Y%m%d\nLogLinkName = newest\n")
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
        handler.reopen()
        assert {path.name: path.read_text() for path in tmp_path.glob("0*")} == {
            "001%": "",
            "002%": "line 0\nline 1\n",
            "003%": "line 2\n",
            "005%": "line 3\n"}

    def test_the_file_that_was_moved_away_is_made_anew_by_the_line_after_reopen(self, tmp_path):
        handler = idpot.StrftimeFileHandler(f"{tmp_path}/log", f"{tmp_path}/newest")
        handler.emit(logging.makeLogRecord({"msg": "line 0"}))
        os.rename(tmp_path / "log", tmp_path / "moved")
        handler.emit(logging.makeLogRecord({"msg": "line 1"}))
        handler.reopen()
        handler.emit(logging.makeLogRecord({"msg": "line 2"}))
        assert (tmp_path / "moved").read_text() == "line 0\nline 1\n"
        assert (tmp_path / "log").read_text() == "line 2\n"

    def test_a_reopen_while_the_link_is_set_is_for_the_next_line(self, tmp_path, monkeypatch):
        handler = idpot.StrftimeFileHandler(f"{tmp_path}/log", f"{tmp_path}/newest")
        unlink = os.unlink

        def moved_meanwhile(path):
            os.rename(tmp_path / "log", tmp_path / "moved")
            handler.reopen()
            unlink(path)

        monkeypatch.setattr(os, "unlink", moved_meanwhile)
        handler.reopen()
        handler.emit(logging.makeLogRecord({"msg": "line 0"}))
        monkeypatch.undo()
        handler.emit(logging.makeLogRecord({"msg": "line 1"}))
        assert (tmp_path / "moved").read_text() == "line 0\n"
        assert (tmp_path / "log").read_text() == "line 1\n"

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

    def test_a_client_cannot_forge_a_line(self, run):
        server = run("[Server]\nLogFile = log")
        for data in [
                b'GET /a"b\\c HTTP/1.1\r\nHost: x\r\nReferer: r"\r\nUser-Agent: q"\\\t\xe9\r\n\r\n',
                b"GET /\x1b[31m\x01\xc3 HTTP/1.1\r\n\r\n",
                b"GET /\nAuthorization: Bearer sesame\r\n\r\n"]:
            assert server.raw(data, half_close=True)
        assert server.stop() == 0
        lines = self.fields(server, "log")
        assert [(line, status, referer, agent) for line, status, _, referer, agent in lines] == [
            (r"GET /a\"b\\c HTTP/1.1", "404", r"r\"", r"q\"\\\x09\xe9"),
            (r"GET /\x1b[31m\x01\xc3 HTTP/1.1", "400", "-", "-"),
            ("GET /", "400", "-", "-")]

    def test_a_malformed_request_line_shows_no_token(self, run):
        server = run("[Server]\nLogFile = log")
        for data in [
                b"Authorization: Bearer sesame\r\n\r\n",
                b"GET / aUTHORIZATION: Bearer sesame\r\nHost: x\r\n\r\n",
                b"GET /?bearer=sesame HTTP/1.1 x\r\nHost: x\r\n\r\n",
                b"GET / HTTP/1.1 BEARER sesame\r\nHost: x\r\n\r\n",
                b"GET /\rAuthorization: Bearer sesame\r\n\r\n"]:
            assert server.raw(data, half_close=True).startswith(b"HTTP/1.1 400 ")
        assert server.stop() == 0
        lines = self.fields(server, "log")
        assert [(line, status) for line, status, *_ in lines] == [
            ("Authorization...", "400"),
            ("GET / aUTHORIZATION...", "400"),
            ("GET /?bearer...", "400"),
            ("GET / HTTP/1.1 BEARER...", "400"),
            ("GET /", "400")]
        assert "sesame" not in server.errors()


# ---------------------------------------------------------------- hostile input: answer or close

GOOD = b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n"
TWO = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
       b"Content-Length: 7\r\n\r\ncount=2")

# What is sent, the statuses of the answers in order, how many IDs of pot p that costs, and whether
# the connection is closed then, so that a good request behind it is not served.
Case = collections.namedtuple("Case", "name data answers ids closes", defaults=(0, True))

HOSTILE = [
    Case("a good request", b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    Case("RFC 9112, 2.2: an empty line before a request",
         b"\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    # RFC 9112, 3: the request line
    Case("method alone", b"POST\r\nHost: x\r\n\r\n", [400]),
    Case("no target", b"POST HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("two spaces for a target", b"POST  HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("two spaces after the method", b"POST  /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("tabs for spaces", b"POST\t/id/p\tHTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("form feeds for spaces", b"POST\x0c/id/p\x0cHTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("four words", b"POST /id/p x HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("a space after the version", b"POST /id/p HTTP/1.1 \r\nHost: x\r\n\r\n", [400]),
    Case("a space before the method", b" POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("a parenthesis in the method", b"PO(ST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("a status line", b"HTTP/1.1 200 OK\r\nHost: x\r\n\r\n", [400]),
    Case("0xff in the method", b"PO\xffST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("NUL in the method", b"PO\x00ST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    # RFC 9112, 2.3: the version
    Case("space before the slash", b"POST /id/p HTTP /1.1\r\nHost: x\r\n\r\n", [400]),
    Case("space after the slash", b"POST /id/p HTTP/ 1.1\r\nHost: x\r\n\r\n", [400]),
    Case("version in small letters", b"POST /id/p http/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("version 1", b"POST /id/p HTTP/1\r\nHost: x\r\n\r\n", [400]),
    Case("version 1.", b"POST /id/p HTTP/1.\r\nHost: x\r\n\r\n", [400]),
    Case("version .1", b"POST /id/p HTTP/.1\r\nHost: x\r\n\r\n", [400]),
    Case("version 1.10", b"POST /id/p HTTP/1.10\r\nHost: x\r\n\r\n", [400]),
    Case("version 11.1", b"POST /id/p HTTP/11.1\r\nHost: x\r\n\r\n", [400]),
    Case("version 1.1x", b"POST /id/p HTTP/1.1x\r\nHost: x\r\n\r\n", [400]),
    Case("no version number", b"POST /id/p HTTP\r\nHost: x\r\n\r\n", [400]),
    Case("HTTPS for HTTP", b"POST /id/p HTTPS/1.1\r\nHost: x\r\n\r\n", [400]),
    # RFC 9110, 15.6.6: versions that are not spoken
    Case("version 0.9", b"POST /id/p HTTP/0.9\r\nHost: x\r\n\r\n", [505]),
    Case("version 1.2", b"POST /id/p HTTP/1.2\r\nHost: x\r\n\r\n", [505]),
    Case("version 1.9", b"POST /id/p HTTP/1.9\r\nHost: x\r\n\r\n", [505]),
    Case("version 2.0", b"POST /id/p HTTP/2.0\r\nHost: x\r\n\r\n", [505]),
    Case("version 3.0", b"POST /id/p HTTP/3.0\r\nHost: x\r\n\r\n", [505]),
    # Other protocols; RFC 9112, 9.8 and RFC 9113, 3.4
    Case("HTTP/0.9 POST", b"POST /id/p\r\n", [400]),
    Case("HTTP/0.9 GET", b"GET /id/p\r\n\r\n", [400]),
    Case("SSH", b"SSH-2.0-x\r\n", [400]),
    Case("PROXY protocol",
         b"PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(100)), [400]),
    Case("a thousand NULs", bytes(1000), [400]),
    Case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04", [505]),
    # RFC 9110, 9.1: methods
    Case("post in small letters", b"post /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], closes=False),
    Case("method BREW", b"BREW /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], closes=False),
    Case("method OPTIONS", b"OPTIONS /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], closes=False),
    Case("method of odd characters",
         b"!#$%&'*+-.^_`~ /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], closes=False),
    Case("method of 5000 letters",
         b"A" * 5000 + b" /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [405], closes=False),
    # RFC 9112, 2.2: bare LF, bare CR, white space before the first header
    Case("LF before a request", b"\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("LF for each CRLF", b"POST /id/p HTTP/1.1\nHost: x\n\n", [400]),
    Case("LF after the request line", b"POST /id/p HTTP/1.1\nHost: x\r\n\r\n", [400]),
    Case("LF after a header", b"POST /id/p HTTP/1.1\r\nHost: x\n\r\n", [400]),
    Case("CR before a request", b"\rPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("CR for each CRLF", b"POST /id/p HTTP/1.1\rHost: x\r\r", [400]),
    Case("CR CRLF after a header", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\r\r\n\r\n", [400]),
    Case("LF between two headers", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\nX: b\r\n\r\n", [400]),
    Case("CR between two headers", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\rX: b\r\n\r\n", [400]),
    Case("LF for the empty line", b"POST /id/p HTTP/1.1\r\nHost: x\r\n\n", [400]),
    Case("space before the first header", b"POST /id/p HTTP/1.1\r\n Host: x\r\n\r\n", [400]),
    Case("tab before the first header", b"POST /id/p HTTP/1.1\r\n\tHost: x\r\n\r\n", [400]),
    # RFC 9110, 5.5: control bytes in a header's value
    Case("0x00 in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", [400]),
    Case("0x01 in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x01b\r\n\r\n", [400]),
    Case("0x07 in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x07b\r\n\r\n", [400]),
    Case("0x08 in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x08b\r\n\r\n", [400]),
    Case("0x0b in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x0bb\r\n\r\n", [400]),
    Case("0x0c in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x0cb\r\n\r\n", [400]),
    Case("0x1b in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x1bb\r\n\r\n", [400]),
    Case("0x1f in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x1fb\r\n\r\n", [400]),
    Case("0x7f in a value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\x7fb\r\n\r\n", [400]),
    # RFC 9110, 5.5 and RFC 9112, 5: headers that are right, if unusual
    Case("tab in a value",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\tb\r\n\r\n", [200], ids=1, closes=False),
    Case("Latin-1 in a value",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nUser-Agent: caf\xe9\r\n\r\n",
         [200], ids=1, closes=False),
    Case("bytes that are not UTF-8 in a value",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nY: \xff\xfe\xc3\r\n\r\n", [200], ids=1, closes=False),
    Case("no value", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX:\r\n\r\n", [200], ids=1, closes=False),
    Case("no space after the colon",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nX:a\r\n\r\n", [200], ids=1, closes=False),
    Case("blanks and tabs around Content-Length",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length:\t 0 \t \r\n\r\n",
         [200], ids=1, closes=False),
    Case("no space before Content-Length's value",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length:0\r\n\r\n", [200], ids=1, closes=False),
    Case("header name of odd characters",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n!#$%&'*+-.^_`~09azAZ: 1\r\n\r\n",
         [200], ids=1, closes=False),
    Case("one header twice",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: 1\r\nX: 2\r\n\r\n", [200], ids=1, closes=False),
    Case("Content_Length with an underscore",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent_Length: 9\r\n\r\n",
         [200], ids=1, closes=False),
    Case("TE", b"POST /id/p HTTP/1.1\r\nHost: x\r\nTE: x\r\n\r\n", [200], ids=1, closes=False),
    Case("an upgrade",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
         [200], ids=1, closes=False),
    Case("52 headers",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 51 + b"\r\n",
         [200], ids=1, closes=False),
    # RFC 9112, 5: no colon; 5.1: space before the colon; 5.2: folded lines
    Case("no colon", b"POST /id/p HTTP/1.1\r\nHost: x\r\nXa\r\n\r\n", [400]),
    Case("no colon, then Content-Length",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nXa\r\nContent-Length: 9\r\n\r\n", [400]),
    Case("space before the colon", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n", [400]),
    Case("tab before the colon", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\t: a\r\n\r\n", [400]),
    Case("space before Content-Length's colon",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\n", [400]),
    Case("space before Transfer-Encoding's colon",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n", [400]),
    Case("folded line", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", [400]),
    Case("folded line of a space", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\r\n \r\n\r\n", [400]),
    Case("line folded with a tab", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a\r\n\tb\r\n\r\n", [400]),
    Case("Transfer-Encoding folded",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n chunked\r\n\r\n", [400]),
    # RFC 9110, 5.1: header names
    Case("empty name", b"POST /id/p HTTP/1.1\r\nHost: x\r\n: 1\r\n\r\n", [400]),
    Case("space in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX y: 1\r\n\r\n", [400]),
    Case("NUL in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\x00y: 1\r\n\r\n", [400]),
    Case("DEL in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\x7fy: 1\r\n\r\n", [400]),
    Case("parentheses in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\n(y): 1\r\n\r\n", [400]),
    Case("@ in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX@y: 1\r\n\r\n", [400]),
    Case("quote in a name", b'POST /id/p HTTP/1.1\r\nHost: x\r\nX"y: 1\r\n\r\n', [400]),
    Case("slash in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX/y: 1\r\n\r\n", [400]),
    Case("brackets in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX[y]: 1\r\n\r\n", [400]),
    Case("comma in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX,y: 1\r\n\r\n", [400]),
    Case("semicolon in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX;y: 1\r\n\r\n", [400]),
    Case("= in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX=y: 1\r\n\r\n", [400]),
    Case("? in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX?y: 1\r\n\r\n", [400]),
    Case("backslash in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\\y: 1\r\n\r\n", [400]),
    Case("braces in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\n{y}: 1\r\n\r\n", [400]),
    Case("Latin-1 in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\xe9: 1\r\n\r\n", [400]),
    Case("UTF-8 in a name", b"POST /id/p HTTP/1.1\r\nHost: x\r\nX\xc2\xa0: 1\r\n\r\n", [400]),
    # RFC 9112, 3.2: header Host
    Case("no Host", b"POST /id/p HTTP/1.1\r\n\r\n", [400]),
    Case("no Host with an absolute target", b"POST http://x/id/p HTTP/1.1\r\n\r\n", [400]),
    Case("two Hosts in HTTP/1.0", b"POST /id/p HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", [400]),
    Case("the same Host twice", b"POST /id/p HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", [400]),
    Case("hOST beside Host", b"POST /id/p HTTP/1.1\r\nHost: x\r\nhOST: y\r\n\r\n", [400]),
    Case("space in Host", b"POST /id/p HTTP/1.1\r\nHost: a b\r\n\r\n", [400]),
    Case("slash in Host", b"POST /id/p HTTP/1.1\r\nHost: a/b\r\n\r\n", [400]),
    Case("@ in Host", b"POST /id/p HTTP/1.1\r\nHost: a@b\r\n\r\n", [400]),
    Case("? in Host", b"POST /id/p HTTP/1.1\r\nHost: a?b\r\n\r\n", [400]),
    Case("# in Host", b"POST /id/p HTTP/1.1\r\nHost: a#b\r\n\r\n", [400]),
    Case("backslash in Host", b"POST /id/p HTTP/1.1\r\nHost: a\\b\r\n\r\n", [400]),
    Case("letters for a port", b"POST /id/p HTTP/1.1\r\nHost: x:port\r\n\r\n", [400]),
    Case("two ports", b"POST /id/p HTTP/1.1\r\nHost: x:80:90\r\n\r\n", [400]),
    Case("bracket not closed in Host", b"POST /id/p HTTP/1.1\r\nHost: [::1\r\n\r\n", [400]),
    Case("0xff in Host", b"POST /id/p HTTP/1.1\r\nHost: \xff\r\n\r\n", [400]),
    Case("angle brackets in Host", b"POST /id/p HTTP/1.1\r\nHost: <a>\r\n\r\n", [400]),
    Case("URL in Host", b"POST /id/p HTTP/1.1\r\nHost: http://x\r\n\r\n", [400]),
    # RFC 9110, 7.2: hosts that are right
    Case("IPv6 Host",
         b"POST /id/p HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", [200], ids=1, closes=False),
    Case("IPv4 Host",
         b"POST /id/p HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n", [200], ids=1, closes=False),
    Case("Host with a last dot",
         b"POST /id/p HTTP/1.1\r\nHost: id-pot.example.\r\n\r\n", [200], ids=1, closes=False),
    Case("Host with an empty port",
         b"POST /id/p HTTP/1.1\r\nHost: x:\r\n\r\n", [200], ids=1, closes=False),
    # RFC 9112, 3.2 and RFC 9110, 10.1.1: HTTP/1.0 needs no Host and no expectation
    Case("HTTP/1.0 without Host", b"POST /id/p HTTP/1.0\r\n\r\n", [200], ids=1),
    Case("HTTP/1.0 with an expectation",
         b"POST /id/p HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", [200], ids=1),
    # RFC 9110, 8.6: Content-Length; RFC 9112, 6.3: two of them; 11.2: one that hides a request
    Case("empty length", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: \r\n\r\n", [400]),
    Case("length 5 5", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5 5\r\n\r\n", [400]),
    Case("length 5, 5", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\n", [400]),
    Case("length with 0xa0",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\xa0\r\n\r\n", [400]),
    Case("length +5", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n", [400]),
    Case("length -1", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", [400]),
    Case("length -0", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: -0\r\n\r\n", [400]),
    Case("length 0x5", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\n", [400]),
    Case("length 0_5", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0_5\r\n\r\n", [400]),
    Case("length 5,6", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5,6\r\n\r\n", [400]),
    Case("length 5;", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5;\r\n\r\n", [400]),
    Case("length 1e1", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 1e1\r\n\r\n", [400]),
    Case("length 5.0", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 5.0\r\n\r\n", [400]),
    Case("length five", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: five\r\n\r\n", [400]),
    Case("length in quotes",
         b'POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: "5"\r\n\r\n', [400]),
    Case("length of a comma",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: ,\r\n\r\n", [400]),
    Case("length superscript two",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: \xb2\r\n\r\n", [400]),
    Case("length of an Arabic digit",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: \xd9\xa3\r\n\r\n", [400]),
    Case("the same length twice",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nContent-Length: 7\r\n\r\n",
         [400]),
    Case("length beyond 64 bits",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551617\r\n\r\n", [400]),
    Case("two lengths",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nContent-Length: 0\r\n\r\n",
         [400]),
    Case("two lengths, one hides a request",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 32\r\n\r\n"
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\n", [400]),
    Case("length of 5000 digits",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", [400]),
    # RFC 9110, 15.5.14: the body is too long
    Case("length 65537", b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n", [413]),
    Case("length 2147483648",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 2147483648\r\n\r\n", [413]),
    Case("length 70000 with an expectation",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\nExpect: 100-continue\r\n"
         b"\r\n", [413]),
    Case("length 65537 and the body",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n" + b"a" * 65533
         + b"\r\n\r\n", [413]),
    # RFC 9112, 8: wrong UTF-8 in a form
    Case("0xff in a form",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Content-Length: 8\r\n\r\ncount=2\xff\r\n\r\n", [400], closes=False),
    Case("escaped 0xff in a form",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Content-Length: 10\r\n\r\ncount=2%ff\r\n\r\n", [400], closes=False),
    # RFC 9112, 6.1: Transfer-Encoding; 6.3: with a length
    Case("empty coding",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \r\n\r\n0\r\n\r\n", [501]),
    Case("gzip, chunked",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
         [501]),
    Case("chunked, gzip",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
         [501]),
    Case("vertical tab before chunked",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
         [400]),
    Case("identity",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", [501]),
    Case("xchunked",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", [501]),
    Case("chunked;q=1",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
         [501]),
    Case("coding of a comma",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: ,\r\n\r\n0\r\n\r\n", [501]),
    Case("coding of NUL",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \x00\r\n\r\n0\r\n\r\n", [400]),
    Case("chunked with length 5",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n"
         b"\r\n0\r\n\r\n", [501]),
    Case("chunked with length 0",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n"
         b"\r\n0\r\n\r\n", [501]),
    Case("identity and chunked",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    Case("chunked",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [501]),
    Case("Chunked with a capital",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", [501]),
    Case("CHUNKED between blanks",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \tCHUNKED \r\n\r\n0\r\n\r\n",
         [501]),
    Case("chunked in HTTP/1.0",
         b"POST /id/p HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [501]),
    # RFC 9110, 15.5.16: the type of the body
    Case("JSON",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
         b"Content-Length: 6\r\n\r\n{}\r\n\r\n", [415], closes=False),
    # RFC 9110, 15.5.15: the target is too long
    Case("pot of 20000 letters",
         b"POST /id/" + b"p" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [414]),
    Case("query of 300000 letters",
         b"POST /id/p?" + b"p" * 300000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [414]),
    # RFC 6585, 5: headers too long or too many
    Case("value of 99999 letters",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 99999 + b"\r\n\r\n", [431]),
    Case("name of 99999 letters",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X" * 99999 + b": a\r\n\r\n", [431]),
    Case("501 headers",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 500 + b"X:\r\n\r\n", [431]),
    Case("10000 headers",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 9999 + b"X:\r\n\r\n", [431]),
    Case("a line without end", b"A" * 300000, [414]),
    # RFC 9112, 3.2.2: absolute targets; RFC 9110, 4.2.3: capitals and escapes
    Case("absolute target",
         b"POST http://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    Case("absolute target in capitals",
         b"POST HTTP://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    Case("absolute target with escapes",
         b"POST http://y:80/id/%70? HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    Case("escapes in the path",
         b"POST /%69d/%70 HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    Case("escapes in the query",
         b"POST /id/p?%63ount=%31 HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    Case("empty query", b"POST /id/p? HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1, closes=False),
    # RFC 9110, 4.2: absolute targets without a path or host, with a user, of another scheme
    Case("absolute target without a path",
         b"POST http://x HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("absolute target with a query alone",
         b"POST http://x?y=/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("absolute target without a host", b"POST http:///id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("absolute target with a port alone",
         b"POST http://:8/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("absolute target with an empty user",
         b"POST http://@/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("absolute target with a user", b"POST http://u@x/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("scheme ftp", b"POST ftp://x/id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    # RFC 9112, 3.2: targets that are no origin-form
    Case("authority", b"POST x:80 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("fragment", b"POST /id/p#x HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("fragment of an absolute target",
         b"POST http://x/id/p#x HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("no slash first", b"POST id/p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("query alone", b"POST ?x HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("backslashes for slashes", b"POST \\id\\p HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    # RFC 9112, 3.2.3 and 3.2.4: targets of other methods
    Case("CONNECT", b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    # RFC 9112, 3.2: bytes in the target
    Case("0x00 in the target", b"POST /id/p\x00 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0x01 in the target", b"POST /id/p\x01 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0x09 in the target", b"POST /id/p\t HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0x0b in the target", b"POST /id/p\x0b HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0x0d in the target", b"POST /id/p\r HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0x1b in the target", b"POST /id/p\x1b HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0x7f in the target", b"POST /id/p\x7f HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0x80 in the target", b"POST /id/p\x80 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0xe9 in the target", b"POST /id/p\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("0xff in the target", b"POST /id/p\xff HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    # Other paths
    Case("pot of 4000 letters",
         b"POST /id/" + b"p" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("asterisk", b"POST * HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("two slashes first", b"POST //id/p HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("slash after the pot", b"POST /id/p/ HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("dot-dot in the path",
         b"POST /x/../id/p HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("semicolon after the pot",
         b"POST /id/p;x HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot escaped twice", b"POST /id/%2570 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("slash escaped twice after the pot",
         b"POST /id/p%252F HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("UTF-8 in the target", b"POST /id/\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    # Wrong and hostile escapes
    Case("pot p%zz", b"POST /id/p%zz HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("pot p%", b"POST /id/p% HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("pot p%7", b"POST /id/p%7 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("pot p%-1", b"POST /id/p%-1 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("pot p%+1", b"POST /id/p%+1 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("pot p%u0070", b"POST /id/p%u0070 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Case("pot p%00", b"POST /id/p%00 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%0d%0aX:1", b"POST /id/p%0d%0aX:1 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%2e", b"POST /id/p%2e HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%20", b"POST /id/p%20 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%ff", b"POST /id/p%ff HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%c3%a9", b"POST /id/p%c3%a9 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%60", b"POST /id/p%60 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%27", b"POST /id/p%27 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%3Fcount=2",
         b"POST /id/p%3Fcount=2 HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p%2F", b"POST /id/p%2F HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    Case("pot p+", b"POST /id/p+ HTTP/1.1\r\nHost: x\r\n\r\n", [404], closes=False),
    # Counts that are no number from 1 to 10000
    Case("count 0", b"POST /id/p?count=0 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count -1", b"POST /id/p?count=-1 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count 10001", b"POST /id/p?count=10001 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count +1", b"POST /id/p?count=+1 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count 1.5", b"POST /id/p?count=1.5 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count 1e3", b"POST /id/p?count=1e3 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count 0x2", b"POST /id/p?count=0x2 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count %20", b"POST /id/p?count=%20 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count 2%20", b"POST /id/p?count=2%20 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count 1_0", b"POST /id/p?count=1_0 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count %D9%A3",
         b"POST /id/p?count=%D9%A3 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count %EF%BC%92",
         b"POST /id/p?count=%EF%BC%92 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count twice",
         b"POST /id/p?count=2&count=3 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count %00", b"POST /id/p?count=%00 HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count %zz", b"POST /id/p?count=%zz HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    Case("count of 5000 digits",
         b"POST /id/p?count=" + b"9" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [400], closes=False),
    # RFC 9110, 10.1.1 and 15.5.18: expectations
    Case("expectation with its body",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\ncount=2", [200], ids=2, closes=False),
    Case("expectation in capitals with its body",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Expect: 100-Continue\r\nContent-Length: 7\r\n\r\ncount=2", [200], ids=2, closes=False),
    Case("another expectation",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nExpect: a-miracle\r\n\r\n", [417]),
    Case("another expectation beside 100-continue",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue, a-miracle\r\n\r\n", [417]),
    # RFC 9112, 9.3.2: several requests in one send
    Case("three requests",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\nGET /id/p HTTP/1.1\r\nHost: x\r\n\r\n"
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200, 200], ids=2, closes=False),
    Case("fifty requests",
         TWO * 50, [200] * 50, ids=100, closes=False),
    Case("good, no colon, good",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\nXa\r\n\r\n"
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200, 400], ids=1),
    Case("good, Transfer-Encoding, good",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n"
         b"Transfer-Encoding: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200, 501], ids=1),
    Case("good, bad length, good",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n"
         b"Content-Length: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200, 400], ids=1),
    Case("unknown pot, good",
         b"POST /id/none HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
         [404, 200], ids=1, closes=False),
    Case("HEAD of an unknown pot, good",
         b"HEAD /id/none HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
         [404, 200], ids=1, closes=False),
    # RFC 9110, 9.3.1 and 9.3.2: GET with a body, HEAD
    Case("GET with a request for its body, good",
         b"GET /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 32\r\n\r\nPOST /id/p HTTP/1.1\r\n"
         b"Host: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200], ids=1, closes=False),
    Case("HEAD, good",
         b"HEAD /id/p HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
         [200, 200], ids=1, closes=False),
    # RFC 9112, 9.3 and RFC 9110, 7.6.1: when the connection closes
    Case("HTTP/1.0, good",
         b"POST /id/p HTTP/1.0\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200], ids=1),
    Case("HTTP/1.0 with keep-alive and close, good",
         b"POST /id/p HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\nPOST /id/p HTTP/1.1\r\n"
         b"Host: x\r\n\r\n", [200], ids=1),
    Case("Connection: close",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [200], ids=1),
    Case("close among other options",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: foo , ,\tClOsE,bar\r\n\r\n", [200], ids=1),
    Case("close in a second header Connection",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: x\r\nconnection: close\r\n\r\n",
         [200], ids=1),
    # RFC 9112, 9.3 and 2.2: when it stays
    Case("empty line between two requests",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n\r\n",
         [200, 200], ids=2, closes=False),
    Case("HTTP/1.0 with keep-alive, good",
         b"POST /id/p HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\nPOST /id/p HTTP/1.1\r\n"
         b"Host: x\r\n\r\n", [200, 200], ids=2, closes=False),
    Case("options that are not close, good",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: closed, x-close\r\n\r\n"
         b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200], ids=2, closes=False),
]

# Requests that the client's end of sending cuts off.
CUT_OFF = [
    Case("nothing", b"", []),
    Case("body cut off",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Content-Length: 9\r\n\r\ncoun\r\n\r\n", [400]),
    Case("body missing",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Content-Length: 9\r\n\r\n", [400]),
    Case("a byte behind a body",
         b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         b"Content-Length: 7\r\n\r\ncount=29", [200, 400], ids=2),
]

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


@pytest.mark.parametrize("case", HOSTILE, ids=[case.name for case in HOSTILE])
def test_hostile_bytes_are_answered_or_the_connection_is_closed(http_pot, case):
    assert answered_and_burnt(http_pot, case.data) == (case.answers, case.ids)
    if case.closes:
        again = answered_and_burnt(http_pot, case.data + GOOD, half_close=False)
        assert again == (case.answers, case.ids)
    else:
        again = answered_and_burnt(http_pot, case.data + GOOD)
        assert again == ([*case.answers, 200], case.ids + 1)


@pytest.mark.parametrize("case", CUT_OFF, ids=[case.name for case in CUT_OFF])
def test_a_request_that_is_cut_off_is_not_served(http_pot, case):
    assert answered_and_burnt(http_pot, case.data) == (case.answers, case.ids)


@pytest.mark.parametrize("data", [GOOD, TWO], ids=["head", "form"])
def test_no_proper_prefix_of_a_request_costs_an_id(http_pot, data):
    before = current_p(http_pot)
    for length in range(len(data)):
        answer = http_exchange(http_pot, data[:length])
        assert statuses(answer) == ([400] if length else [])
        with connections(http_pot, 2, data[:length]) as [_, reset]:
            reset.setsockopt(*RESET_AT_CLOSE)
    assert current_p(http_pot) == before


def test_a_body_is_asked_for_with_100_continue_and_then_read(http_pot):
    head = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\n")
    with connections(http_pot, 1, head) as [connection]:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"count=2")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_head_is_answered_as_get_without_the_body(http_pot):
    answer = http_exchange(http_pot, b"HEAD /id/p HTTP/1.1\r\nHost: x\r\n\r\n")
    length = len(str(current_p(http_pot)))
    assert b"\r\nContent-Length: %d\r\n" % length in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("target, status", [
    (b"/idhttp://x/secret", 404),
    (b"/potHTTPS://x/secret", 404),
    (b"/http://x/id/p", 404),
    (b"//http://x/id/p", 404),
    (b"/id/http://x/p", 404),
    (b"/id/phttp://x", 404),
    (b"/id/p?http://x/id/secret", 400),
    (b"/id/p?http://x", 400),
    (b"http://xhttp://x/id/p", 404),
    (b"http://x/idhttp://x/p", 404),
    (b"http://x/http://x/id/p", 404)])
def test_the_absolute_form_is_known_at_the_start_of_a_target_only(http_pot, target, status):
    pots = http_pot.request("GET", "/pot")[1]
    answer = http_exchange(http_pot, b"POST %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)
    assert statuses(answer) == [status]
    assert http_pot.request("GET", "/pot")[1] == pots


@pytest.mark.parametrize("method, target, form, message", [
    ("POST", "/pot/create", "name=new&mn=5", 'unknown field "mn": here are name, min\n'),
    ("POST", "/pot/create", "mn=5&name=new&min=1", 'unknown field "mn": here are name, min\n'),
    ("POST", "/pot/create?mn=5", "name=new", 'unknown field "mn": here are name, min\n'),
    ("POST", "/pot/create", "Name=new", 'unknown field "Name": here are name, min\n'),
    ("POST", "/pot/create", "name=new&count=5", 'unknown field "count": here are name, min\n'),
    ("POST", "/pot/raise", "name=p&min=50&mn=5", 'unknown field "mn": here are name, min\n'),
    ("POST", "/id/p?counts=5", None, 'unknown field "counts": here are count, range\n'),
    ("POST", "/id/p", "counts=5", 'unknown field "counts": here are count, range\n'),
    ("POST", "/id/p", "count=5&min=5", 'unknown field "min": here are count, range\n'),
    ("POST", "/id/p?counts", None, 'unknown field "counts": here are count, range\n'),
    ("GET", "/id/p?count=5", None, 'unknown field "count": there are none here\n'),
    ("GET", "/id/p?counts=5", None, 'unknown field "counts": there are none here\n'),
    ("HEAD", "/id/p?count=5", None, ""),
    ("GET", "/pot/p?min=5", None, 'unknown field "min": there are none here\n'),
    ("GET", "/pot?name=p", None, 'unknown field "name": there are none here\n'),
    ("GET", "/healthz?x=", None, 'unknown field "x": there are none here\n'),
    ("GET", "/metrics?x=", None, 'unknown field "x": there are none here\n')])
def test_an_unknown_field_is_refused_and_named(http_pot, method, target, form, message):
    pots = http_pot.request("GET", "/pot")[1]
    assert http_pot.request(method, target, form)[:2] == (400, message)
    assert http_pot.request("GET", "/pot")[1] == pots


@pytest.mark.parametrize("data, status", [
    (b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    (b"POST /id/big?count=10000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    (b"POST /id/big?count=10000 HTTP/1.0\r\n\r\n", 200),
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n", 400),
    (b"POST /id/p HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n", 413)],
    ids=["short answer", "long answer", "HTTP/1.0", "error", "unread body"])
def test_an_answer_before_a_close_reaches_a_client_that_still_sends(http_pot, data, status):
    with slow_reader(http_pot) as connection:
        connection.sendall(data)
        connection.recv(1, socket.MSG_PEEK)     # the server has answered: what follows is late
        connection.sendall(b"x" * 4000000)
        answer = until_closed(connection)
    assert statuses(answer) == [status]
    if b"count=10000" in data:
        last = int(http_pot.request("GET", "/id/big")[1])
        assert issued(answer) == list(range(last - 9999, last + 1))


def test_answers_to_thousands_of_requests_in_one_send_come_in_order(run):
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


def test_long_input_is_parsed_in_linear_time(http_pot):
    blanks = b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: a" + b" " * 16000 + b"b\r\n\r\n"
    empty_lines = b"\r\n" * 640000 + GOOD
    for data in (blanks, empty_lines):
        before = cpu_seconds(http_pot)
        http_exchange(http_pot, data)
        assert cpu_seconds(http_pot) - before < 0.2


def cpu_of_single_bytes(server, connection, count):
    """The CPU seconds that count bytes cost the server when each comes alone."""
    before = cpu_seconds(server)
    for _ in range(count):
        connection.send(b"a")
        assert not select.select([connection], [], [], 0.0005)[0]
    return cpu_seconds(server) - before


def test_a_body_in_single_bytes_costs_no_more_behind_a_long_head(http_pot):
    cpu = {10: [], 15700: []}
    for length in (10, 15700) * 3:
        head = (b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: " + b"a" * length + b"\r\n"
                b"Content-Length: 65536\r\n\r\n")
        with connections(http_pot, 1, head) as [connection]:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            cpu[length].append(cpu_of_single_bytes(http_pot, connection, 1000))
    assert sum(cpu[15700]) < 2 * sum(cpu[10]) + 0.1     # parsed at each byte it is 1.1 s


def test_the_last_bytes_of_a_head_cost_no_more_than_the_first(http_pot):
    cpu = {"first": [], "last": []}
    for _ in range(3):
        with connections(http_pot, 1, b"POST /id/p HTTP/1.1\r\nHost: x\r\nX: ") as [connection]:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            cpu["first"].append(cpu_of_single_bytes(http_pot, connection, 1000))
            connection.sendall(b"a" * 13000)
            cpu["last"].append(cpu_of_single_bytes(http_pot, connection, 1000))
    assert sum(cpu["last"]) < 2 * sum(cpu["first"]) + 0.1       # looked at as a whole: 0.8 s


FUZZ_BASES = [
    GOOD,
    GOOD * 2,
    b"POST /id/p?count=3 HTTP/1.1\r\nHost: x\r\n\r\n",
    TWO,
    b"POST http://x/id/%70 HTTP/1.1\r\nHost: x\r\n\r\n",
    TWO + GOOD,
]
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


@pytest.mark.parametrize("batch", range(20))
def test_fuzzed_requests_cost_no_more_ids_than_were_answered(http_pot, batch):
    random_ = random.Random(batch)
    requests = [mutated(random_, random_.choice(FUZZ_BASES)) for _ in range(100)]
    before = current_p(http_pot)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(functools.partial(http_exchange, http_pot), requests))
    ids = [id for answer in answers for id in issued(answer)]
    seen = {status for answer in answers for status in statuses(answer)}
    assert len(set(ids)) == len(ids) == current_p(http_pot) - before
    assert not seen & {500, 503, 504}
    assert "Traceback" not in http_pot.errors()


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
    """All along, a client asks for an ID every 50 ms, and gets each within two seconds."""
    over = threading.Event()

    def ask():
        while not over.wait(0.05):
            assert server.request("POST", "/id/p", timeout=2)[0] == 200

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


def test_an_empty_line_that_comes_alone_does_not_end_the_connection(run):
    server = run()
    server.create("p")
    with connections(server, 1, TWO + b"\r\n") as [connection]:
        assert connection.recv(1000).endswith(b"\r\n\r\n1\n2\n")
        for number in (3, 4):
            connection.sendall(b"\r\n")
            assert not select.select([connection], [], [], 0.2)[0]
            connection.sendall(GOOD)
            assert connection.recv(1000).endswith(b"\r\n\r\n%d" % number)


def test_a_request_that_came_in_time_is_served_however_late_it_is_read(run):
    server = run("[Server]\nRequestTimeout = 0.2")
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


def test_a_client_that_sends_a_byte_now_and_then_gets_408(run):
    server = run("[Server]\nRequestTimeout = 1\n")
    server.create("p")
    with well_served(server), connections(server, 1) as [slow]:
        begin = time.monotonic()
        for byte in GOOD:
            slow.sendall(bytes([byte]))
            if select.select([slow], [], [], 0.2)[0]:
                break
        assert statuses(until_closed(slow)) == [408]
        assert 0.9 < time.monotonic() - begin < 2.5


def whole_answers(data):
    """The lists of IDs in the answers but the last, which may be cut off."""
    pieces = data.split(b"HTTP/1.1 200 OK\r\n")[1:-1]
    return [piece.partition(b"\r\n\r\n")[2].split() for piece in pieces]


@pytest.mark.slow
def test_a_client_that_reads_slowly_is_served_and_one_that_does_not_read_is_cut_off(run):
    server = run("[Server]\nRequestTimeout = 1\n")
    server.create("p")
    last = b"POST /id/p?count=10000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with well_served(server), slow_reader(server) as steady, slow_reader(server) as silent:
        for connection in (steady, silent):
            connection.sendall(LONG_ANSWER * 89 + last)
        answer = b""
        begin = time.monotonic()
        while time.monotonic() < begin + 4:
            answer += steady.recv(4096)
            select.select([], [], [], 0.05)
        answer += until_closed(steady)
        cut_off = received(silent)
    ids = issued(answer)
    assert (len(ids), len(set(ids))) == (900000, 900000)
    whole = whole_answers(cut_off)
    assert len(whole) < 89
    assert {len(ids) for ids in whole} == {10000}


def test_500_half_requests_that_are_reset_at_once_leave_nothing_behind(run):
    server = run()
    server.create("p")
    before = usage(server)
    with well_served(server), connections(server, 500, GOOD[:-1]) as reset:
        for connection in reset:
            connection.setsockopt(*RESET_AT_CLOSE)
    wait_until(lambda: usage(server).files <= before.files)
    wait_until(lambda: usage(server).threads <= before.threads + KEPT_THREADS)
    assert "Traceback" not in server.errors()


@pytest.mark.slow
def test_900_stalled_requests_a_slow_sender_silent_readers_and_resets_all_at_once(run):
    server = run("[Server]\nRequestTimeout = 2\n")
    server.create("p")
    before = usage(server)
    with contextlib.ExitStack() as stack:
        stack.enter_context(well_served(server))
        stalled = stack.enter_context(connections(server, 900, GOOD[:-3]))
        [slow] = stack.enter_context(connections(server, 1))
        readers = [stack.enter_context(slow_reader(server)) for _ in range(5)]
        for reader in readers:
            reader.sendall(LONG_ANSWER * 90)
        for byte in GOOD:
            slow.sendall(bytes([byte]))
            if select.select([slow], [], [], 0.4)[0]:
                break
        for connection in [slow, *stalled]:
            assert statuses(until_closed(connection)) == [408]
        with connections(server, 500, GOOD[:-1]) as reset:
            for connection in reset:
                connection.setsockopt(*RESET_AT_CLOSE)
        wait_until(lambda: usage(server).files <= before.files + 1)     # the good client's
        for reader in readers:
            assert {len(ids) for ids in whole_answers(received(reader))} == {10000}
    wait_until(lambda: usage(server).threads <= before.threads + KEPT_THREADS)
    assert usage(server).memory < before.memory + 40
    assert server.stop() == 0
    assert [status for _, status, _ in access_lines(server)].count("408") == 901
    assert "Traceback" not in server.errors()


def each_begins_with(beginning, clients):
    """Whether the next answer to each of the connections begins so."""
    return {client.recv(1000)[:len(beginning)] for client in clients} == {beginning}


@pytest.mark.slow
def test_5000_idle_connections_and_900_stalled_ones_are_held(run, many_descriptors):
    server = run("[Server]\nMaxConnections = 6000\nRequestTimeout = 60\n")
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
        begin = time.monotonic()
        for client in stalled:
            client.sendall(GOOD[-3:])
        for client in idle:
            client.sendall(GOOD)
        assert each_begins_with(b"HTTP/1.1 200 ", idle + stalled)
        assert time.monotonic() < begin + 5
    wait_until(lambda: usage(server).files <= before.files, 20)
    wait_until(lambda: usage(server).threads <= before.threads + KEPT_THREADS, 20)
    assert "Traceback" not in server.errors()


def test_at_max_connections_the_longest_silent_are_closed(run, many_descriptors):
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


def test_2000_short_connections_in_a_row(run):
    server = run()
    server.create("p")
    before = usage(server)
    closing = b"POST /id/p HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for number in range(1, 2001):
        answer = http_exchange(server, closing, half_close=False)
        assert answer.endswith(b"\r\n\r\n%d" % number)
    wait_until(lambda: usage(server).files <= before.files)
    assert usage(server).threads <= before.threads + KEPT_THREADS
    assert server.stop() == 0
    assert len(access_lines(server)) == 2001
    assert "Traceback" not in server.errors()


def test_ab_with_200_clients_at_once(run):
    server = run()
    server.create("p")
    url = f"http://127.0.0.1:{server.port}/id/p"
    ab = subprocess.run([needs("ab"), "-q", "-l", "-c200", "-n5000", "-mPOST", url],
                        capture_output=True, text=True, timeout=60).stdout
    assert re.findall(r"(?:Complete|Failed|Non-2xx).*:\s+(\d+)", ab) == ["5000", "0"]
    assert current_p(server) == 5000
    assert server.stop() == 0
    assert len(access_lines(server)) == 5002
    assert "Traceback" not in server.errors()


def test_at_the_limit_newcomers_wait_and_no_busy_client_is_cut_off(run):
    server = run("[Server]\nMaxConnections = 8\n")
    server.create("p")
    with ThreadPoolExecutor(30) as pool:
        clients = [pool.submit(http_exchange, server, GOOD * 100) for _ in range(30)]
    given = [issued(client.result()) for client in clients]
    assert {len(ids) for ids in given} == {100}
    assert all(ids == sorted(ids) for ids in given)
    assert sorted(id for ids in given for id in ids) == list(range(1, 3001))


def restart_under(server, limit):
    """Starts the server again, under a limit of the shell's ulimit."""
    server.stop()
    server.command[:0] = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh"]
    server.start()


def test_out_of_descriptors_it_waits_without_spinning_and_then_serves_again(run):
    server = run()
    server.create("p")
    restart_under(server, "-n 64")
    with connections(server, 200, GOOD[:-1]):
        assert current_p(server) == 0       # the silent ones made room
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, 64))
    with connections(server, 1, GOOD) as [waiting]:
        before = cpu_seconds(server)
        assert select.select([waiting], [], [], 1) == ([], [], [])
        assert cpu_seconds(server) - before < 0.2
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in server.errors()


def at_rest(server):
    """Whether the server's process does nothing for a moment."""
    before = cpu_seconds(server)
    select.select([], [], [], 0.3)
    return cpu_seconds(server) < before + 0.01


def serves(server):
    """Whether the server issues an ID within two seconds."""
    with contextlib.suppress(OSError, HTTPException):
        return server.request("POST", "/id/p", timeout=2)[0] == 200


def half_requests_with_long_bodies(server, count):
    """Sends that many on connections of their own, and closes these when the server is at rest."""
    head = (b"POST /id/p HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 65536\r\n\r\n")
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", server.port), 20)
            stack.enter_context(connection)
            with contextlib.suppress(ConnectionError):
                connection.sendall(head + b"x" * 65000)
        wait_until(lambda: at_rest(server))


@pytest.mark.slow
def test_it_serves_again_after_900_bodies_that_did_not_fit_into_memory(run):
    server = run()
    server.create("p")
    restart_under(server, "-v 100000")
    before = usage(server)
    for _ in range(3):
        half_requests_with_long_bodies(server, 900)
        wait_until(lambda: serves(server), 20)
        wait_until(lambda: usage(server).files <= before.files)
    begin = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() < begin + 5
    assert server.errors().endswith(" INFO stopped\n")      # who writes the log is well, too


def first_bytes(connection):
    """What comes first; nothing where the server closes the connection or resets it."""
    try:
        return connection.recv(1000)
    except ConnectionError:
        return b""


def test_a_thread_that_cannot_be_started_ends_one_connection_only(run):
    server = run()
    server.create("p")
    with connections(server, 1, GOOD) as [old]:
        assert old.recv(1000).startswith(b"HTTP/1.1 200 ")
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        size = int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) * 1024
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        with connections(server, 100, GOOD) as refused:
            assert b"" in {first_bytes(connection) for connection in refused}
            old.sendall(GOOD)
            assert old.recv(1000).startswith(b"HTTP/1.1 200 ")
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, unlimited)
        with connections(server, 100, GOOD) as served:
            assert each_begins_with(b"HTTP/1.1 200 ", served)
        old.sendall(GOOD)
        assert old.recv(1000).startswith(b"HTTP/1.1 200 ")


def fill_until_it_blocks(sock):
    """Fills the way to a peer that does not read, until no byte fits for 0.3 seconds.

    Returns how many bytes that took.
    """
    sent, before = 0, -1
    while sent > before:
        before = sent
        for size in (4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += sock.send(b"#" * size, socket.MSG_DONTWAIT)
        select.select([], [sock], [], 0.3)
    return sent


class JobsOnly:
    """Stands for an Allocator: the test answers the jobs itself."""
    last_pot = ""

    def __init__(self):
        self.jobs = []

    def submit(self, pot, job):
        self.jobs.append(job)


@pytest.fixture
def server_in_process():
    """An idpot.Server over JobsOnly, as (server, allocator, port)."""
    allocator = JobsOnly()
    listener = idpot.listen("127.0.0.1", 0)
    access = types.SimpleNamespace(add=lambda answer: None)
    server = idpot.Server(idpot.load_settings(), listener, allocator, idpot.Metrics(), access)
    threading.Thread(target=server.accept, daemon=True).start()
    yield server, allocator, listener.getsockname()[1]
    server.stop()


def test_the_rest_of_an_answer_goes_before_the_next_answer(server_in_process):
    server, allocator, port = server_in_process
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"POST /id/a HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: len(allocator.jobs) == 1)
        handler = server.handlers()[0]
        filler = fill_until_it_blocks(handler.request)
        client.sendall(b"POST /id/b HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: handler.began is not None)       # the second has been read
        allocator.jobs[0].finish(111)
        wait_until(lambda: len(allocator.jobs) == 2)
        allocator.jobs[1].finish(222)
        received = bytearray()
        while not received.endswith(b"\r\n\r\n222"):
            data = client.recv(65536)
            assert data, received[-500:]
            received += data
        assert received[filler:].count(b"HTTP/1.1 200 ") == 2
        assert received.index(b"\r\n\r\n111") < received.index(b"\r\n\r\n222")


def test_a_client_that_resets_while_it_is_answered_is_no_trouble_of_the_worker(server_in_process):
    class ResetMeanwhile(socket.socket):
        """A connection whose client does not read, and then resets."""

        def send(self, data, flags):
            raise BlockingIOError

        def shutdown(self, how):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    server, allocator, port = server_in_process
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(GOOD)
        wait_until(lambda: allocator.jobs)
        handler = server.handlers()[0]
        connection = handler.request
        handler.request = ResetMeanwhile(fileno=os.dup(connection.fileno()))
        allocator.jobs[0].finish(111)
        assert not handler.turn.locked()
        handler.request.close()
        handler.request = connection


def test_the_idle_time_begins_when_a_slow_client_has_its_answer(server_in_process):
    server, allocator, port = server_in_process
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", port))
        client.sendall(b"POST /id/p?count=10000 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: allocator.jobs)
        handler = server.handlers()[0]
        allocator.jobs[0].finish(10**18)
        wait_until(lambda: handler.sending)
        begin = time.monotonic()
        wait_until(lambda: time.monotonic() > begin + 0.5)
        read = time.monotonic()
        received = 0
        while received < 10000 * len("999999999999999999\n"):
            received += len(client.recv(65536))
        wait_until(lambda: not handler.sending)
        assert handler.since > read


def test_a_request_that_is_slow_at_a_stop_has_half_a_second(run):
    server = run()
    server.create("p")
    with connections(server, 1, TWO[:-4]) as [slow]:
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() > begun + 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(server))
        slow.sendall(TWO[-4:-2])
        assert not select.select([slow], [], [], 0.25)[0]
        slow.sendall(TWO[-2:])
        assert slow.recv(1000).endswith(b"\r\n\r\n1\n2\n")
    assert server.process.wait(10) == 0


def accepts(server):
    """Whether the server accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", server.port), 5).close()
        return True
    except ConnectionRefusedError:
        return False


def test_a_scrape_without_a_free_descriptor_fails_and_costs_no_connection(run):
    server = run("[Server]\nTimeout = 1")
    server.create("p")
    with connections(server, 3, GOOD) as kept_ones:
        for connection in kept_ones:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: at_rest(server))     # and has closed the connection of the create
        pid = server.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
        free = min(set(range(100)) - used)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limits[1]))
        for connection in kept_ones:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 500 ")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: metrics(server)["idpot_connections"] == 1)
    wait_until(lambda: metrics(server)["idpot_http_requests_in_flight"] == 1)
    wait_until(lambda: server.errors().count("Too many open files") == 3)
    begin = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() < begin + 1


def test_it_stays_on_one_cpu_and_connections_let_the_thread_that_runs_go_on(run):
    server = run()
    with connections(server, 2, b"GET /pot HTTP/1.1\r\nHost: x\r\n\r\n") as opened:
        assert each_begins_with(b"HTTP/1.1 200 ", opened)
        threads = [int(thread) for thread in os.listdir(f"/proc/{server.process.pid}/task")]
        cpus = [os.sched_getaffinity(thread) for thread in threads]
        policies = [os.sched_getscheduler(thread) for thread in threads]
    allowed = sorted(os.sched_getaffinity(0))
    assert cpus == [{allowed[0]}] * len(threads)    # Listen names port 0
    assert policies.count(os.SCHED_BATCH) >= 3      # with the accepting thread
    assert policies.count(os.SCHED_OTHER) >= 3      # of the worker, the main thread and the log


def test_a_scrape_under_load_does_not_wait(run):
    server = run()
    server.create("p")
    with mixed(server.port) as load:
        load.more()
        times = []
        for _ in range(3):
            begin = time.monotonic()
            metrics(server)
            times.append(time.monotonic() - begin)
    assert min(times) < 0.2


TOKEN_REQUESTS = [
    ("POST", "/id/p", None),
    ("GET", "/pot", None),
    ("POST", "/pot/create", "name=p"),
    ("POST", "/pot/raise", "name=p&min=5"),
]
WRONG_TOKENS = [
    "", "Bearer", "sesame", "Basic sesame", "Bearer sesam", "Bearer sesamee", "Bearer SESAME",
    "Bearer x sesame", "Bearer sesam\xe9", "Bearer sesame sesame",
]


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


def test_token_is_asked_for_everything(run):
    server = run("[Server]\nToken = sesame\n")
    server.request("POST", "/pot/create", "name=p", {"Authorization": "Bearer sesame"})
    for wrong in WRONG_TOKENS:
        assert statuses_with(server, wrong) == [401, 401, 401, 401]
    assert statuses_with(server, "Bearer sesame") == [200, 200, 409, 200]
    assert statuses_with(server, "bearer  sesame") == [200, 200, 409, 200]
    assert_no_token_is_told(server)


def test_admin_token_is_asked_for_create_and_raise_beside_token_for_the_rest(run):
    server = run("[Server]\nToken = sesame\nAdminToken = shibboleth\n")
    server.request("POST", "/pot/create", "name=p", {"Authorization": "Bearer shibboleth"})
    for wrong in WRONG_TOKENS:
        assert statuses_with(server, wrong) == [401, 401, 401, 401]
    assert statuses_with(server, "Bearer sesame") == [200, 200, 401, 401]
    assert statuses_with(server, "Bearer shibboleth") == [401, 401, 409, 200]
    assert_no_token_is_told(server)


def test_admin_token_alone_leaves_the_rest_open(run):
    server = run("[Server]\nAdminToken = shibboleth\n")
    server.request("POST", "/pot/create", "name=p", {"Authorization": "Bearer shibboleth"})
    for wrong in WRONG_TOKENS:
        assert statuses_with(server, wrong) == [200, 200, 401, 401]
    assert statuses_with(server, "Bearer shibboleth") == [200, 200, 409, 200]
    assert_no_token_is_told(server)


ORIGIN_REQUESTS = [     # method, target, form, status with the right token
    ("POST", "/id/p", None, 200),
    ("POST", "/id/p", "count=2", 200),
    ("GET", "/id/p", None, 200),
    ("HEAD", "/id/p", None, 200),
    ("GET", "/pot/p", None, 204),
    ("HEAD", "/pot/p", None, 204),
    ("GET", "/pot", None, 200),
    ("POST", "/pot/create", "name=q", 201),
    ("POST", "/pot/raise", "name=p&min=9", 200),
    ("GET", "/healthz", None, 200),
    ("HEAD", "/healthz", None, 200),
    ("GET", "/metrics", None, 200),
    ("OPTIONS", "/pot/raise", None, 405),
    ("DELETE", "/id/p", None, 405),
    ("GET", "/nowhere", None, 404),
]


@pytest.mark.parametrize("method, target, form, served", ORIGIN_REQUESTS)
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8080", ""])
def test_a_web_page_is_refused(http_pot, method, target, form, served, origin):
    pots = http_pot.request("GET", "/pot")[1]
    for headers in ({"Origin": origin}, {"Origin": origin, "Authorization": "Bearer"}):
        status, text, answered = http_pot.request(method, target, form, headers)
        assert status == 403
        assert "Access-Control-Allow-Origin" not in answered
    assert http_pot.request("GET", "/pot")[1] == pots


def test_a_web_page_is_refused_without_the_right_token_and_served_with_it(run):
    server = run("[Server]\nToken = sesame\n")
    right = {"Authorization": "Bearer sesame"}
    server.request("POST", "/pot/create", "name=p", right)
    for wrong in WRONG_TOKENS:
        headers = {"Origin": "http://page.example", "Authorization": wrong}
        for method, target, form, _ in ORIGIN_REQUESTS:
            assert server.request(method, target, form, headers)[0] == 403
    assert server.request("GET", "/pot", headers=right)[1] == "p\t0\n"
    headers = {"Origin": "http://page.example", **right}
    for method, target, form, served in ORIGIN_REQUESTS:
        assert server.request(method, target, form, headers)[0] == served
    assert_no_token_is_told(server)


def test_a_web_page_with_the_admin_token_is_served_only_what_asks_for_that(run):
    server = run("[Server]\nAdminToken = shibboleth\n")
    headers = {"Origin": "http://page.example", "Authorization": "Bearer shibboleth"}
    assert server.request("POST", "/pot/create", "name=p", headers)[0] == 201
    assert server.request("POST", "/pot/raise", "name=p&min=9", headers)[0] == 200
    assert server.request("POST", "/id/p", None, headers)[0] == 403
    assert server.request("GET", "/pot", None, headers)[0] == 403
    assert server.request("GET", "/pot")[1] == "p\t9\n"
    assert_no_token_is_told(server)


MALFORMED = [       # what is sent, and what the access log has for its request line
    (b"Authorization: Bearer sesame\r\n\r\n", "Authorization..."),
    (b"authorization:bearer sesame\r\nHost: x\r\n\r\n", "authorization..."),
    (b"AUTHORIZATION: sesame", "AUTHORIZATION..."),
    (b"Proxy-Authorization: sesame\r\n\r\n", "Proxy-Authorization..."),
    (b"Bearer sesame\r\n\r\n", "Bearer..."),
    (b"GET /id/p HTTP/1.1 Authorization: Bearer sesame\r\nHost: x\r\n\r\n",
     "GET /id/p HTTP/1.1 Authorization..."),
    (b"GET /id/p HTTP/1.1\tAuthorization: sesame\r\n\r\n",
     r"GET /id/p HTTP/1.1\x09Authorization..."),
    (b"GET /id/p bEaReR sesame HTTP/1.1\r\nHost: x\r\n\r\n", "GET /id/p bEaReR..."),
    (b"GET /id/p\0Bearer sesame HTTP/1.1\r\nHost: x\r\n\r\n", r"GET /id/p\x00Bearer..."),
    (b"GET /id/p HTTP/1.1\nAuthorization: Bearer sesame\r\n\r\n", "GET /id/p HTTP/1.1"),
    (b"GET /id/p HTTP/1.1\rAuthorization: Bearer sesame\r\n\r\n", "GET /id/p HTTP/1.1"),
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame", "GET /id/p HTTP/1.1"),
    (b"GET /id/p HTTP/1.1\r\nX : y\r\nAuthorization: Bearer sesame\r\n\r\n", "GET /id/p HTTP/1.1"),
    (b"GET /id/p HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n\r\n",
     "GET /id/p HTTP/1.1"),
]


def test_the_log_shows_no_token_of_a_malformed_request(run):
    server = run()
    for data, _ in MALFORMED:
        assert len(statuses(http_exchange(server, data))) == 1
    assert server.stop() == 0
    assert [line for line, _, _ in access_lines(server)] == [logged for _, logged in MALFORMED]
    assert "sesame" not in server.errors()


def started_again_with_mode(server, mode):
    """The warnings of a start with a settings file of that mode; none shows a secret."""
    server.stop()
    os.truncate(server.stderr, 0)
    os.chmod(f"{server.folder}/idpot.cfg", mode)
    server.start()
    assert "sesame" not in server.errors()
    return re.findall(r"WARNING .*(anybody|everybody)", server.errors())


@pytest.mark.parametrize("listen, mode, config, warnings", [
    ("0.0.0.0:0", 0o600, "", ["anybody"]),
    ("0.0.0.0:0", 0o600, "[Server]\nToken = sesame\n", []),
    ("127.0.0.1:0", 0o644, "[Server]\nTimeout = 5\n", []),
    ("127.0.0.1:0", 0o604, "[Server]\nAdminToken = sesame\n", ["everybody"])])
def test_what_others_can_reach_or_read_is_warned_of(run, listen, mode, config, warnings):
    server = run(config, listen=listen)
    assert started_again_with_mode(server, mode) == warnings


def test_a_password_of_the_database_that_everybody_can_read_is_warned_of(run, database):
    database.sql("CREATE USER IF NOT EXISTS reader IDENTIFIED BY 'sesame'")
    database.sql("GRANT ALL ON idpot.* TO reader")
    server = run(f"[Mysql]\nPort = {database.port}\nUsername = reader\nPassword = sesame\n")
    assert started_again_with_mode(server, 0o644) == ["everybody"]


ODD_TEXTS = [
    b"\x00\x1b]0;x\x07\x9b\x7f\"\\\n\n",
    b'GET /"\\\x1b[31m\x07\xff\x85 HTTP/1.1\r\nHost: x\r\n\r\n',
    b"POST /id/%0d%0aevil%1b HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /pot/create HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n"
    b"Content-Length: 19\r\n\r\nname=a%0d%0a%1b%22+",
    b'POST /id/p HTTP/1.1\r\nHost: x\r\nReferer: q" "200" \\\r\n\r\n',
    b'POST /id/p HTTP/1.1\r\nHost: x\r\nUser-Agent: q" \\ \xe9\xc2\x85\t\xff\r\n\r\n',
]


def test_every_answer_costs_one_log_line_and_nothing_of_a_request_reaches_it_raw(run):
    server = run()
    server.create("p")
    answered = []
    for data in [case.data for case in HOSTILE + CUT_OFF] + ODD_TEXTS:
        answered += statuses(http_exchange(server, data))
    assert server.stop() == 0
    assert re.fullmatch(rb"[ -~\n]*", Path(server.stderr).read_bytes())
    logged = [int(status) for _, status, _ in access_lines(server)]
    assert logged == [201] + [status for status in answered if status != 100]
    last_agent = access_lines(server)[-1][2]
    assert last_agent == r'q\" \\ \xe9\xc2\x85\x09\xff'
    assert "Traceback" not in server.errors()


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
    pytest.param([
        Answer(0, 2, 2, 2),
        Answer(1, 3, 1, 1),
    ], id="overlapping in time"),
    pytest.param([
        Answer(0, 1, 5, 9),
        Answer(1, 2, 1, 4),
    ], id="asked for at the moment when the other ended"),
    pytest.param([
        Answer(0, 1, MAX_ID - 1, MAX_ID - 1),
        Answer(2, 3, MAX_ID, MAX_ID),
    ], id="the greatest IDs"),
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
    pytest.param([
        Answer(0, 9, 1, 9),
        Answer(1, 9, 2, 3),
        Answer(2, 9, 8, 8),
    ], [("repeat", 0, 1), ("repeat", 0, 2)], id="inside a batch"),
    pytest.param([
        Answer(0, 9, 1, 2**32),
        Answer(1, 9, 2**32, 2**33),
    ], [("repeat", 0, 1)], id="overlapping range"),
    pytest.param([
        Answer(0, 9, 1, 2**40),
        Answer(1, 9, 1000, 2000),
    ], [("repeat", 0, 1)], id="range inside a range"),
    pytest.param([
        Answer(0, 1, 7, 8),
        Answer(0, 5, 9, 9),
        Answer(2, 3, 5, 5),
        Answer(4, 5, 6, 6),
    ], [("order", 0, 2), ("order", 0, 3)], id="order inversion"),
    pytest.param([
        *CLEAN_RUN,
        Answer(500, 501, 20, 20),
    ], [("repeat", 1, 1000), ("order", 495, 1000)], id="planted in a long one"),
])
def test_checker_finds(history, violations):
    shuffled = random.Random(4).sample(history, len(history))
    found = prove.check_history(shuffled)
    assert found == [(kind, history[a], history[b]) for kind, a, b in violations]


def random_history(seed):
    """Three hundred answers to eight clients, some of them slow, in the order of their ends.

    Each gets the next IDs as it ends; now and then one gets some that were given before.
    """
    random_ = random.Random(seed)
    free_at = [0.0] * 8
    times = []
    for _ in range(300):
        client = random_.randrange(8)
        start = free_at[client] + random_.random()
        end = start + random_.random() * random_.choice([0.1, 1, 30])
        free_at[client] = end
        times.append((end, start))
    history = []
    counter = 0
    for end, start in sorted(times):
        back = 0
        if random_.random() < 0.003:
            back = random_.choice([1, 10, 1000])
        count = random_.choice([1, 1, 1, 5, 100])
        first = counter + 1 - back
        history.append(Answer(start, end, first, first + count - 1))
        counter += count
    return history


def violations_by_windows(history, size):
    """Those that are found when so many answers are added at a time."""
    growing = prove.GrowingHistory()
    violations = []
    for at in range(0, len(history), size):
        window = history[at:at + size]
        to_come = [answer.start for answer in history[at + size:]]
        violations += growing.add(window, min(to_come, default=math.inf))
    assert len(growing.kept) == 1
    return violations


def test_checker_finds_in_windows_what_it_finds_in_the_whole():
    broken = 0
    for seed in range(100):
        history = random_history(seed)
        violations = prove.check_history(history)
        for size in (1, 7, 50):
            found = violations_by_windows(history, size)
            assert bool(found) == bool(violations)
        broken += bool(violations)
    assert 25 < broken < 75


class Load:
    """A with block in which twelve clients ask for IDs of one pot, each over its own connection.

    Client n asks the n-th server in turn, for one ID; client 0 asks for five at once. The status is
    200 for a whole answer only, "lost" where the connection broke before one, and another text for
    what must not be.
    """

    def __init__(self, servers, pot, patience=PATIENCE):
        self.servers = servers
        self.pot = pot
        self.patience = patience
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
        connection = None
        while not self.stopping.is_set() and time.monotonic() < self.deadline:
            if not connection:
                connection = HTTPConnection("127.0.0.1", server.port, timeout=self.patience + 5)
            start = time.monotonic()
            status, first = self.ask(connection, count)
            end = time.monotonic()
            self.seen[number].append(Answer(start, end, first, first + count - 1, status, number))
            if status in ("lost", "hung"):
                connection.close()
                connection = None       # a server that was started again may have another port
            if status != 200:
                self.stopping.wait(0.02)

    def ask(self, connection, count):
        """Returns the status and the first ID."""
        query = f"?count={count}" if count > 1 else ""
        try:
            connection.request("POST", f"/id/{self.pot}{query}")
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
            answer.status
            for answer in self.history()
            if answer.start > moment
        )

    def served_since(self, moment):
        """When each client was served first after that moment; None before all were."""
        firsts = []
        for answers in self.seen:
            ends = [
                answer.end
                for answer in answers[-500:]
                if answer.status == 200 and answer.end > moment
            ]
            if not ends:
                return None
            firsts.append(min(ends))
        return firsts

    def refused(self):
        """Whether the last that each client got is a 503."""
        return all(answers and answers[-1].status == 503 for answers in self.seen)

    def issued(self):
        """How many IDs were answered."""
        return sum(
            answer.last - answer.first + 1
            for answer in self.history()
            if answer.status == 200
        )

    def wait_for(self, ids):
        """Waits until each client was served, and all together got so many IDs."""
        wait_until(lambda: self.served_since(0) and self.issued() > ids)

    def recover(self):
        """Waits until each client is served, within 5 s, and for 200 answers more."""
        since = time.monotonic()
        firsts = wait_until(lambda: self.served_since(since), 20)
        self.recovered = max(firsts)
        wait_until(lambda: self.statuses_since(self.recovered).total() > 200)
        print(f"\n{self.pot}: each client served {self.recovered - since:.1f} s after the fault")
        assert self.recovered - since < 5

    def verdict(self, counter, may_lose=()):
        """Asserts what must hold after faults and the last recovery, and prints the figures."""
        history = self.history()
        statuses = self.statuses_since(0)
        longest = max(answer.end - answer.start for answer in history)
        print(f"{self.pot}: {self.issued()} IDs, {counter - self.issued()} burned, "
              f"{dict(statuses)}, longest wait {longest:.1f} s")
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

class Pair(typing.NamedTuple):
    """Two idpots on one database."""
    engine: str
    idpots: list


@pytest.fixture(scope="module", params=["MyISAM", "InnoDB"])
def pair(request, database, tmp_path_factory):
    """A Pair that is kept over all faults: a thread stuck in one fault is missed in the next."""
    database.sql("CREATE USER IF NOT EXISTS clerk IDENTIFIED BY 'p'")   # read_only spares root
    database.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO clerk")
    config = (f"[Server]\nTimeout = {PATIENCE}\nLogFile = access.log\n"
              f"[Mysql]\nEngine = {request.param}\n"
              f"ConnectString = clerk:p@tcp(127.0.0.1:{database.port})/idpot\n")
    idpots = [Idpot(tmp_path_factory.mktemp("idpot"), config) for _ in range(2)]
    yield Pair(request.param, idpots)
    for one in idpots:
        one.stop(signal.SIGKILL)


@contextlib.contextmanager
def killed(database):
    database.signal(signal.SIGKILL)
    try:
        yield
    finally:
        database.start()


@contextlib.contextmanager
def down(database):
    database.signal(signal.SIGTERM)
    try:
        yield
    finally:
        database.start()


@contextlib.contextmanager
def hung(database):
    database.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        database.signal(signal.SIGCONT)


@contextlib.contextmanager
def read_only(database):
    database.sql("SET GLOBAL read_only = 1")
    try:
        yield
    finally:
        database.sql("SET GLOBAL read_only = 0")


def database_killed(database, load):
    with killed(database):
        wait_until(load.refused)


def database_restarted(database, load):
    with down(database):
        pass


def database_hung(database, load):
    with hung(database):
        wait_until(load.refused)


def database_read_only(database, load):
    with read_only(database):
        wait_until(load.refused)


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


@pytest.mark.slow
@pytest.mark.parametrize("fault", [
    database_killed,
    database_restarted,
    database_hung,
    database_read_only,
    connections_killed,
    connections_used_up,
    table_locked,
    row_locked,
])
def test_fault_under_load(fault, pair, database):
    if fault is row_locked and pair.engine == "MyISAM":
        pytest.skip("MyISAM has no row locks")
    burned_under_load(pair, database, fault)


def end_and_start_again(server, number, code):
    """The server gets the signal, ends in time with that exit code, and is started again."""
    with within(PATIENCE + 1):
        assert server.stop(number) == code
    server.start()


@pytest.mark.slow
def test_idpot_killed_under_load_burns_what_its_six_clients_had_in_flight(pair, database):
    def idpot_killed(database, load):
        end_and_start_again(load.servers[0], signal.SIGKILL, -signal.SIGKILL)

    assert burned_under_load(pair, database, idpot_killed, may_lose=[0]) <= 10


@pytest.mark.slow
def test_idpot_stopped_under_load_burns_none(pair, database):
    def idpot_stopped(database, load):
        end_and_start_again(load.servers[0], signal.SIGTERM, 0)

    assert burned_under_load(pair, database, idpot_stopped, may_lose=[0]) == 0


@pytest.mark.parametrize("pot, statements", [
    pytest.param("by_hand", ["UPDATE `pot_{pot}` SET id = 3"], id="by hand"),
    pytest.param("from_a_backup", [
        "CREATE TABLE `backup_{pot}` LIKE `pot_{pot}`",
        "INSERT INTO `backup_{pot}` VALUES (3)",
        "RENAME TABLE `pot_{pot}` TO `gone_{pot}`, `backup_{pot}` TO `pot_{pot}`",
    ], id="from a backup"),
])
def test_counter_set_back_while_serving(pot, statements, pair, database):
    pot = f"{pot}_{pair.engine}"
    server = pair.idpots[1]
    server.create(pot)
    with Load([server], pot) as load:
        load.wait_for(ids=300)
        for statement in statements:
            database.sql(statement.format(pot=pot), database="idpot")
        load.recover()
    load.verdict(server.next(pot) - 1)
    warning = f" WARNING the counter of pot {pot} was set back to 3, but "
    wait_until(lambda: warning in server.errors())
    assert server.errors().count(warning) == 1


def waiting_for_lock(database, pot):
    """The statements that wait for a lock on the pot."""
    return database.sql("SELECT id FROM information_schema.processlist "
                        f"WHERE state LIKE 'Wait%' AND info LIKE '%{pot}%'")


def test_requests_without_an_answer_cost_no_id(pair, database):
    pot = f"late_{pair.engine}"
    server = pair.idpots[0]
    server.create(pot)
    first = server.next(pot)
    with contextlib.closing(database.connect(database="idpot")) as session:
        session.cursor().execute(f"LOCK TABLES `pot_{pot}` WRITE")
        clients = []
        for _ in range(20):
            clients.append(HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE + 5))
            clients[-1].request("POST", f"/id/{pot}")
        wait_until(lambda: waiting_for_lock(database, pot))
        for client in clients[10:]:
            client.close()
        for client in clients[:10]:
            assert client.getresponse().status == 503
        wait_until(lambda: not waiting_for_lock(database, pot), PATIENCE)
    assert server.next(pot) == first + 1


def test_a_503_says_the_error_of_the_database_and_how_long_it_was_tried(pair, database):
    pot = f"told_{pair.engine}"
    server = pair.idpots[0]
    server.create(pot)
    assert server.next(pot) == 1
    with read_only(database):
        status, text, headers = server.request("POST", f"/id/{pot}")
    assert status == 503
    assert headers["Retry-After"] == "1"
    assert re.fullmatch(r"[ -~]+ \(error 1290\), tried for 2 seconds\n", text)
    wait_until(lambda: status_of_next(server, pot) == 200)
    with hung(database):
        status, text, headers = server.request("POST", f"/id/{pot}")
    assert status == 503
    assert headers["Retry-After"] == "1"
    assert re.search(r"(did not answer in|\(error \d+\), tried for) 2 seconds\n", text)


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


@pytest.mark.parametrize("user", ["many", "few"])
def test_twenty_busy_pots_share_the_connections_that_there_are(user, run, busy_database):
    server = run(f"[Mysql]\nConnectString = {user}:p@tcp(127.0.0.1:{busy_database.port})/idpot\n")
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


def test_a_clean_stop_closes_its_connections_to_the_database(run, busy_database):
    server = run(f"[Mysql]\nConnectString = tidy:p@tcp(127.0.0.1:{busy_database.port})/idpot\n")
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


# ---------------------------------------------------------------------------------- faults: SQLite

def on_file(path):
    """The settings for an SQLite file."""
    return f"[Server]\nTimeout = {PATIENCE}\nLogFile = access.log\n[Sqlite]\nFile = {path}\n"


@contextlib.contextmanager
def small_disk(path, size):
    """The new directory is a small file system; who may not mount one skips the test."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "idpot", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode and os.getuid() == 0:
        missing(f"no small file system: {mounted.stderr}")
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_sqlite_killed_under_load(run, tmp_path):
    server = run(on_file(tmp_path / "ids.db"))
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
    server = run(on_file(tmp_path / "ids.db"))
    server.create("mine")
    with Load([server], "mine") as load:
        load.wait_for(ids=100)
        second = run(on_file(tmp_path / "ids.db"), wait=False)
        assert second.process.wait(10) == 1
        load.recover()
    assert second.errors() == f'idpot: SQLite file "{tmp_path}/ids.db": another process uses it\n'
    load.verdict(server.next("mine") - 1)
    assert load.statuses_since(0).keys() == {200}


def fill_up(path):
    """Writes to the file until its disk is full."""
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(65536))


def test_sqlite_disk_full_is_said_when_it_begins_and_when_it_ends(run, tmp_path):
    with small_disk(tmp_path / "disk", "16m") as disk:
        server = run(on_file(disk / "ids.db"))
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
        provider = [
            f"base_port={ports[number]}",
            f"gmcast.listen_addr=tcp://{group}",
            f"ist.recv_addr={transfer}",
            # The defaults freeze the survivors for six seconds when a node dies.
            "evs.keepalive_period=PT0.3S",
            "evs.suspect_timeout=PT1S",
            "evs.inactive_timeout=PT3S",
            "evs.inactive_check_period=PT0.3S",
            "pc.recovery=false",
            "gcache.size=16M",
        ]
        options = [
            "--wsrep-on=ON",
            f"--wsrep-provider={self.PROVIDER}",
            "--wsrep-cluster-name=idpot",
            f"--wsrep-cluster-address=gcomm://{members}",
            f"--wsrep-node-address={group}",
            f"--wsrep-node-name=n{number}",
            f"--wsrep-provider-options={';'.join(provider)}",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address={snapshot}",
            "--innodb-autoinc-lock-mode=2",
            "--binlog-format=ROW",
            "--default-storage-engine=InnoDB",
        ]
        founds = [] if number else ["--wsrep-new-cluster"]
        super().__init__(*options, *founds)
        self.options = options

    def answers(self):
        ready = [("wsrep_ready", "ON")]
        return super().answers() and self.sql("SHOW STATUS LIKE 'wsrep_ready'") == ready

    def writes(self):
        """Whether the cluster takes a write here; one that waits for a hung node hangs itself."""
        with contextlib.suppress(Exception):
            return self.sql("CREATE OR REPLACE TABLE idpot.probe (id INT PRIMARY KEY)") == []


@pytest.fixture(scope="module")
def galera():
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


def on_cluster(nodes, engine="InnoDB"):
    addresses = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return (f"[Server]\nTimeout = 4\nLogFile = access.log\n"
            f"[Mysql]\nEngine = {engine}\nConnectString = root@tcp({addresses})/idpot\n")


@pytest.mark.slow
def test_galera_refuses_myisam_at_the_start(galera, run):
    server = run(on_cluster(galera, "MyISAM"), wait=False)
    assert server.process.wait(10) == 78
    assert server.errors() == "idpot: Engine: a Galera node replicates InnoDB only, not MyISAM\n"


@pytest.mark.slow
def test_galera_refuses_a_table_of_aria_at_the_start(galera, run):
    galera[0].sql("CREATE TABLE idpot.pot_aria (id BIGINT UNSIGNED NOT NULL) ENGINE=Aria")
    server = run(on_cluster(galera), wait=False)
    code = server.process.wait(10)
    galera[0].sql("DROP TABLE idpot.pot_aria")
    assert code == 78
    assert server.errors() == (
        "idpot: table pot_aria: a Galera node replicates InnoDB only, not Aria\n")


@pytest.mark.slow
def test_galera_refuses_to_create_myisam_later(galera, run):
    galera[0].sql("SET GLOBAL wsrep_on = OFF")
    try:
        server = run(f"[Mysql]\nConnectString = {galera[0].dsn()}\n")
    finally:
        galera[0].sql("SET GLOBAL wsrep_on = ON")
    assert server.request("POST", "/pot/create", "name=myisam")[:2] == (
        503, "a Galera node replicates InnoDB only, not MyISAM\n")


def run_two(run, nodes, pot):
    """Two idpots that prefer different nodes, and see the new pot."""
    for node in nodes:
        wait_until(node.answers, 60)
    a, b, c = nodes
    first = run(on_cluster([a, b, c]))
    second = run(on_cluster([b, c, a]))
    first.create(pot)
    wait_until(lambda: second.request("GET", f"/pot/{pot}")[0] == 204)
    return [first, second]


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
        b.signal(signal.SIGSTOP)
        wait_until(c.writes, 20)    # how long the others wait for it is Galera's time, not idpot's
        load.recover()
        b.signal(signal.SIGCONT)
    counter = c.sql("SELECT id FROM idpot.pot_cluster")[0][0]
    load.verdict(counter)


@pytest.mark.slow
def test_galera_without_its_quorum_gives_no_id(galera, run):
    """The last test on these nodes: two of them stay dead."""
    a, b, c = galera
    with Load(run_two(run, galera, "minority"), "minority", patience=4) as load:
        load.wait_for(ids=300)
        b.signal(signal.SIGKILL)
        c.signal(signal.SIGKILL)
        wait_until(load.refused, 20)
        since = time.monotonic()
        wait_until(lambda: load.statuses_since(since).total() >= 12, 20)
        assert load.statuses_since(since).keys() == {503}
        a.sql("SET GLOBAL wsrep_provider_pc_bootstrap = ON")    # the operator: the others are dead
        load.recover()
    counter = a.sql("SELECT id FROM idpot.pot_minority")[0][0]
    load.verdict(counter)


# ----------------------------------------------------------- on a host: several idpots, and proof

@pytest.fixture
def mysql(database):
    """mysql(lines of [Server]) is the config for a new database, of a user with least rights."""
    for statement in (
            "DROP DATABASE IF EXISTS host",
            "CREATE DATABASE host",
            "DROP USER IF EXISTS least",
            "CREATE USER least IDENTIFIED BY 'secret'",
            "GRANT SELECT, UPDATE, CREATE, INSERT ON host.* TO least"):
        database.sql(statement)

    def config(lines=""):
        return (f"[Server]\n{lines}\n[Mysql]\nPort = {database.port}\nUsername = least\n"
                "Password = secret\nDbname = host\n")

    return config


@pytest.fixture
def two(mysql, run):
    """Two idpots on one database, with the pot p, each on a port that it keeps."""
    config = mysql(f"Timeout = {PATIENCE}")
    servers = [run(config, listen=f"127.0.0.1:{free_port()}") for _ in range(2)]
    servers[0].create("p")
    return servers


def test_two_idpots_on_one_database_by_turns(two):
    for last in range(0, 40, 2):
        assert two[0].next("p") == last + 1
        assert two[1].next("p") == last + 2


def test_two_idpots_on_one_database_at_once(two):
    with Load(two, "p") as load:
        load.wait_for(ids=2000)
        load.recover()
    load.verdict(two[0].next("p") - 1)
    assert load.statuses_since(0).keys() == {200}


class HaProxy:
    """An HAProxy in front of the servers, in turn; it does not ask whether they are well."""
    CONFIG = """
        defaults
            mode http
            timeout connect 2s
            timeout client 20s
            timeout server 20s
        listen idpot
            bind 127.0.0.1:{port}
            balance roundrobin
            option redispatch 1
            {servers}
    """

    def __init__(self, folder, servers):
        self.port = free_port()
        lines = [f"server s{server.port} 127.0.0.1:{server.port}" for server in servers]
        config = self.CONFIG.format(port=self.port, servers="\n".join(lines))
        (folder / "haproxy.cfg").write_text(config + "\n")
        self.process = subprocess.Popen([needs("haproxy"), "-db", "-f", "haproxy.cfg"], cwd=folder)
        wait_until(lambda: not refused(self.port))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def test_two_idpots_behind_haproxy_of_which_one_is_killed(two, tmp_path):
    with HaProxy(tmp_path, two) as proxy, Load([proxy], "p") as load:
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


def run_prove(*arguments):
    """contrib/prove.py as a program; returns its exit code and what it printed."""
    command = [sys.executable, f"{HERE}/contrib/prove.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_prove_finds_nothing_wrong_with_idpot(run):
    server = run("[Server]\nToken = t\nLogFile = log")
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
def test_prove_counts_what_is_not_served_while_idpot_is_killed_and_stopped(run):
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


class FaultyServer(http.server.ThreadingHTTPServer):
    """Answers as idpot does, from a counter that a fault of the test changes."""
    request_queue_size = 100

    def __init__(self, fault):
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.fault = fault
        self.lock = threading.Lock()
        self.counter = 0
        self.requests = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def take(self, count):
        """Returns the first ID of as many; the fault gets the number of the request."""
        with self.lock:
            self.requests += 1
            self.counter += self.fault(self.requests)
            self.counter += count
            return self.counter - count + 1


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.answer(204, "")

    def do_POST(self):
        query = self.path.partition("?")[2]
        field, _, count = query.partition("=")
        first = self.server.take(int(count or 1))
        if field == "range":
            self.answer(200, f"{first}\t{first + int(count) - 1}\n")
        elif field == "count":
            self.answer(200, "".join(f"{first + n}\n" for n in range(int(count))))
        else:
            self.answer(200, f"{first}")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def one_id_again(requests):
    return -1 if requests == 700 else 0


def back_after_a_while(requests):
    return -100_000 if requests == 3000 else 0


@pytest.mark.parametrize("fault", [one_id_again, back_after_a_while])
def test_prove_shows_the_two_answers_that_contradict_each_other(fault):
    with FaultyServer(fault) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        code, text = run_prove(url, "--seconds=20", "--clients=8")
    assert code == 1, text
    two_answers = re.compile(
        r"BROKEN: .*\n"
        r"    (\d+)(?: to (\d+))?, to client \d, which asked at \S+ s and was answered at \S+ s\n"
        r"    (\d+)(?: to (\d+))?, to client \d, which asked at \S+ s and was answered at \S+ s\n")
    first, last, other_first, _ = two_answers.search(text).groups()
    assert int(other_first) <= int(last or first)
    assert "kept:" not in text


def test_prove_shows_an_answer_that_is_not_what_was_asked_for():
    with FaultyServer(lambda requests: 0) as server:
        server.take = lambda count: -5
        code, text = run_prove(f"http://127.0.0.1:{server.server_port}", "--clients=1")
    assert code == 1
    assert re.search(r"\nwrong answer where (one ID|count=\d+|range=\d+) was asked for: b'-5", text)


@pytest.mark.parametrize("arguments, code, message", [
    ([], 2, "prove.py: error: the following arguments are required: URL\n"),
    (["127.0.0.1:8080"], 2,
     "argument URL: '127.0.0.1:8080' is not http://HOST:PORT or https://HOST:PORT\n"),
    (["http://h", "--pot=a.b"], 2,
     "argument --pot: 'a.b' is not 1 to 60 characters of A-Z a-z 0-9 _ -\n"),
    (["http://h", "--seconds=0"], 2, "argument --seconds: '0' is not a whole number above 0\n"),
    (["http://h", "--token=a b"], 2,
     "argument --token: a token has no spaces and only ASCII characters\n"),
    (["http://127.0.0.1:1"], 1,
     "prove.py: http://127.0.0.1:1: [Errno 111] Connection refused\n"),
])
def test_prove_says_what_is_wrong_with_its_arguments(arguments, code, message):
    got, text = run_prove(*arguments)
    assert got == code
    assert text.endswith(message)


def test_prove_needs_the_token_and_any_answer(run):
    server = run("[Server]\nToken = t\nAdminToken = a\n")
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


# ------------------------------------------------- on a host: starting, health, metrics, log lines

@contextlib.contextmanager
def pot_locked(database, pot):
    """Another session holds the table of a pot in the database `host`."""
    with contextlib.closing(database.connect(database="host")) as session:
        session.cursor().execute(f"LOCK TABLES pot_{pot} WRITE")
        yield


class Asking:
    """A with block that calls each client again and again, in a thread for each."""

    def __init__(self, *clients):
        self.clients = clients
        self.ids = [[] for _ in clients]    # that each client got, in order
        self.failed = []                    # the errors of all
        self.going = True
        self.pool = ThreadPoolExecutor(len(clients))

    def __enter__(self):
        self.pool.map(self.ask, self.clients, self.ids)
        return self

    def __exit__(self, *_):
        self.going = False
        self.pool.shutdown()

    def ask(self, client, ids):
        while self.going:
            try:
                ids.append(client())
            except Exception as error:
                self.failed.append(error)

    def more(self, count=100):
        """Waits until each client has got so many IDs more."""
        wanted = [len(ids) + count for ids in self.ids]
        wait_until(lambda: all(len(ids) >= least for ids, least in zip(self.ids, wanted)), 30)

    def issued(self):
        """How many IDs: unique, rising for each client, and none was asked for in vain."""
        assert self.failed == []
        for ids in self.ids:
            assert ids == sorted(ids)
        everything = list(itertools.chain(*self.ids))
        assert len(set(everything)) == len(everything)
        return len(everything)


def kept(port, **headers):
    """A client of pot p over one connection; with Connection="close" it opens one each time."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)

    def client():
        connection.request("POST", "/id/p", headers=headers)
        return int(connection.getresponse().read())

    return client


def mixed(port):
    """Three clients that keep their connection, and three that do not."""
    clients = [kept(port) for _ in range(3)]
    clients += [kept(port, Connection="close") for _ in range(3)]
    return Asking(*clients)


def test_idpot_starts_before_its_database_and_serves_when_that_comes(mysql, run, database):
    config = mysql("Timeout = 1\nLogFile = log")
    server = run(config)
    server.create("p")
    server.stop()
    os.truncate(server.stderr, 0)
    with down(database):
        server.start()
        assert not healthy(server)
        assert status_of_next(server, "p") == 503
    wait_until(lambda: healthy(server))
    assert server.next("p") == 1
    assert server.stop() == 0
    levels = [level for level, _ in events(server)]
    assert levels.count("WARNING") == 2     # of the database, and of MyISAM
    assert "Traceback" not in server.errors()


def test_idpot_starts_on_a_read_only_database_and_serves_when_that_is_over(mysql, run, database):
    config = mysql("Timeout = 1")
    with read_only(database):
        server = run(config)
        status, text, _ = server.request("GET", "/healthz")
    assert status == 503
    assert "(error 1290)" in text
    wait_until(lambda: healthy(server))
    server.create("p")
    assert server.next("p") == 1


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


@pytest.mark.parametrize("trouble, why", [
    (read_only, r"\(error 1290\)"),
    (read_lock, r"\(error 1205\)|did not answer"),
    (no_right_to_update, r"\(error 1142\)"),
    (hung, r"\(error (2013|2055|3024)\)|did not answer"),
    (down, r"\(error (2002|2003|2013|2055)\)"),
], ids=["read_only", "read_lock", "no_right_to_update", "hung", "down"])
def test_health_says_why_no_id_could_be_issued_and_costs_none(trouble, why, mysql, run, database):
    server = run(mysql("Timeout = 4"))
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


def test_a_health_check_is_not_misled_by_a_connection_lost_unused(mysql, run, database):
    server = run(mysql())
    with contextlib.closing(database.connect()) as root:
        for _ in range(3):
            assert healthy(server)
            kill_connections(root, "least")


def test_metrics_go_up_and_please_promtool(mysql, run, database):
    server = run(mysql())
    server.create("p")
    with mixed(server.port) as load:
        load.more()
    for _ in range(20):
        server.next("p", 100)
    issued = load.issued() + 2000
    route = 'idpot_http_requests_total{route="%s",method="%s",code="200"}'
    last = {}
    for number in range(3):
        found = metrics(server)
        assert found["idpot_ids_issued_total"] == issued
        assert found.get(route % ("/metrics", "GET"), 0) == number
        assert found[route % ("/id/{pot}", "POST")] == load.issued() + 20
        for name, value in last.items():
            assert found[name] >= value or "_total" not in name
        last = found
    assert load.issued() + 20 >= last["idpot_db_statements_total"] > 20
    with contextlib.closing(database.connect()) as root:
        kill_connections(root, "least")
    assert server.next("p") == issued + 1
    errors = [
        value
        for name, value in metrics(server).items()
        if name.startswith("idpot_db_errors_total{errno=")
    ]
    assert sum(errors) >= 1
    status, text, headers = server.request("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    promtool = subprocess.run(
        [needs("promtool"), "check", "metrics"], input=text, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (promtool.returncode, promtool.stdout) == (0, "")


def in_flight(server):
    """How many requests wait for their answer, besides this one."""
    return metrics(server)["idpot_http_requests_in_flight"] - 1


def test_metrics_count_connections_and_requests_in_flight(mysql, run, database):
    server = run(mysql())
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


class Durations:
    """What /metrics says of the times from the requests to their answers."""
    NAME = "idpot_http_request_duration_seconds"

    def __init__(self, server):
        self.buckets = collections.Counter()    # upper bound in seconds -> requests up to it
        self.sum = 0.0
        self.count = 0
        for series, value in metrics(server).items():
            name, _, labels = series.partition("{")
            if name == f"{self.NAME}_bucket":
                bound = re.search(r'\ble="([^"]+)"', labels)[1]
                self.buckets[float(bound)] += value
            elif name == f"{self.NAME}_sum":
                self.sum += value
            elif name == f"{self.NAME}_count":
                self.count += value


def test_metrics_have_a_histogram_of_the_time_until_the_answer(mysql, run, database):
    server = run(mysql())
    server.create("p")
    for _ in range(50):
        server.next("p")
    before = Durations(server)
    assert before.count == 51
    assert before.buckets[math.inf] == 51
    assert 0 < before.sum < 5
    numbers = [number for bound, number in sorted(before.buckets.items())]
    assert numbers == sorted(numbers)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool, pot_locked(database, "p"):
        pool.submit(server.next, "p")
        wait_until(lambda: waiting_for_lock(database, "pot_p"))
        wait_until(lambda: time.monotonic() > start + 1)
    held = time.monotonic() - start
    after = Durations(server)
    assert 0.8 < after.sum - before.sum < held + 0.1
    assert after.count == before.count + 2      # with that of the metrics
    assert after.buckets[0.5] == before.buckets[0.5] + 1
    assert after.buckets[5.0] == before.buckets[5.0] + 2


def test_metrics_describe_the_process(run):
    server = run()
    memory, *_, files = usage(server)
    found = metrics(server)
    assert found["process_resident_memory_bytes"] == pytest.approx(memory * 2**20, rel=0.3)
    assert found["process_open_fds"] == pytest.approx(files, abs=3)
    assert 0 < found["process_cpu_seconds_total"] < 30
    assert found["process_start_time_seconds"] == pytest.approx(time.time(), abs=30)


def test_a_database_that_is_down_is_said_when_it_begins_and_when_it_ends(mysql, run, database):
    server = run(mysql("Timeout = 1\nLogFile = log"))
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


def test_a_broken_pot_is_said_once(mysql, run, database):
    server = run(mysql("LogFile = log"))
    before = len(events(server))
    database.sql("CREATE TABLE host.pot_norow (id BIGINT UNSIGNED NOT NULL)")
    database.sql("CREATE TABLE host.pot_tworows (id BIGINT UNSIGNED NOT NULL)")
    database.sql("INSERT INTO host.pot_tworows VALUES (5), (6)")
    for pot in ("norow", "tworows", "norow", "tworows", "norow"):
        assert status_of_next(server, pot) == 503
    assert server.stop() == 0
    first, second, stopped = events(server)[before:]
    assert first[0] == "WARNING"
    assert "norow" in first[1]
    assert second[0] == "WARNING"
    assert "tworows" in second[1]


def test_under_journald_an_event_has_a_priority_and_no_time(run, tmp_path):
    stderr = tmp_path / "idpot0" / "stderr"
    stderr.parent.mkdir()
    stderr.touch()
    named = f"{stderr.stat().st_dev}:{stderr.stat().st_ino}"
    config = "[Server]\nLogFile = log\n"
    server = run(config, listen="0.0.0.0:0", environment={"JOURNAL_STREAM": named})
    assert server.stop() == 0
    warning, listening, stopped = server.errors().splitlines()
    assert warning.startswith("<4>0.0.0.0 is not a loopback address and no Token is set: ")
    assert listening == f"<6>listening on http://0.0.0.0:{server.port} (SQLite idpot.db)"
    assert stopped == "<6>stopped"


def test_a_journal_stream_that_is_not_stderr_changes_nothing(run):
    server = run("[Server]\nLogFile = log\n", environment={"JOURNAL_STREAM": "8:1"})
    assert server.stop() == 0
    assert [text for _, text in events(server)] == [
        f"listening on http://127.0.0.1:{server.port} (SQLite idpot.db)", "stopped"]


# ---------------------------------------------------- on a host: logs that nobody reads, stopping

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
@pytest.mark.parametrize("config, clogged", [
    ("", stderr_is_a_full_pipe),
    ("[Server]\nLogFile = log\n", stderr_is_a_full_pipe),
    ("[Server]\nLogFile = log\n", log_is_a_fifo_that_nobody_reads),
], ids=["stderr, with access lines", "stderr", "LogFile"])
def test_neither_ids_nor_a_stop_wait_for_a_reader(config, clogged, stop, run):
    server = run(config, listen=f"127.0.0.1:{free_port()}")
    server.create("p")
    assert server.stop() == 0
    with clogged(server):
        wait_until(lambda: not refused(server.port))
        with Asking(kept(server.port, Referer="x" * 1000)) as load:
            load.more(500)      # half a megabyte of access lines: a pipe holds 64 KB
        assert load.issued() >= 500
        with within(11):
            assert server.stop(stop) == 0
        assert refused(server.port)


@pytest.mark.parametrize("clogged", [stderr_is_a_full_pipe, log_is_a_fifo_that_nobody_reads])
def test_a_second_sigterm_ends_at_once_what_the_first_let_finish(clogged, mysql, run, database):
    server = run(mysql("Timeout = 30\nLogFile = log"), listen=f"127.0.0.1:{free_port()}")
    server.create("p")
    assert server.stop() == 0
    with clogged(server), pot_locked(database, "p"):
        wait_until(lambda: not refused(server.port))
        with connections(server, 1, b"POST /id/p HTTP/1.1\r\nHost: x\r\n\r\n") as [client]:
            wait_until(lambda: waiting_for_lock(database, "pot_p"))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refused(server.port))
            assert server.process.poll() is None
            with within(2):
                server.stop(signal.SIGTERM)
            assert b" 200 " not in client.recv(1000)


# ---------------------------------------------------- on a host: service managers, logs, the client

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


@pytest.mark.parametrize("name", ["{}/notify", "@{}/abstract"])
def test_systemd_is_told_of_ready_reload_and_stop_but_not_the_watchdog_unasked(name, run, tmp_path):
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


def test_systemd_is_told_of_ready_when_the_database_is_still_to_come(run, tmp_path):
    with NotifySocket(f"{tmp_path}/notify") as told:
        run("[Mysql]\nPort = 1\n", environment=told.environment)
        assert told.next().startswith("READY=1\nSTATUS=")


def test_systemd_is_told_nothing_by_a_start_that_fails(run, tmp_path, database):
    with NotifySocket(f"{tmp_path}/notify") as told:
        config = f"[Mysql]\nPort = {database.port}\nDbname = none\n"
        server = run(config, wait=False, environment=told.environment)
        assert server.process.wait(10) == 1
        assert told.next(0.01) is None


@pytest.mark.slow
def test_the_watchdog_is_fed_while_idpot_is_idle_or_busy_and_not_while_it_is_stopped(run, tmp_path):
    with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="3000000") as told:
        server = run(environment=told.environment)
        assert told.next().startswith("READY=1\n")
        assert [told.next(3) for _ in range(3)] == ["WATCHDOG=1"] * 3
        server.create("p")
        with mixed(server.port) as load:
            load.more()
            assert told.next(3) == "WATCHDOG=1"
        server.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: told.next(3) is None)
        server.process.send_signal(signal.SIGCONT)
        assert told.next(3) == "WATCHDOG=1"


@pytest.mark.slow
def test_the_watchdog_is_fed_without_a_free_descriptor(run, tmp_path):
    with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="3000000") as told:
        server = run(environment=told.environment)
        assert told.next().startswith("READY=1\n")
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, 3))
        assert told.next(3) == "WATCHDOG=1"
        assert [told.next(3) for _ in range(3)] == ["WATCHDOG=1"] * 3


# Runs idpot's command line, in which whatever takes an ID of the pot "hang" never comes back.
HANGING_IDPOT = """if True:
    import sys
    import threading
    sys.path.insert(0, sys.argv.pop(1))
    import idpot

    def take_or_hang(store, pot, *arguments):
        if pot == "hang":
            threading.Event().wait()
        return take(store, pot, *arguments)

    take = idpot.SqliteStore.take
    idpot.SqliteStore.take = take_or_hang
    sys.exit(idpot.main())"""


@pytest.mark.slow
def test_the_watchdog_is_not_fed_when_a_worker_hangs(run, tmp_path):
    with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="4000000") as told:
        server = run("[Server]\nTimeout = 1\n", environment=told.environment)
        server.create("hang")
        server.stop()
        while told.next(0.1):
            pass
        server.command[1:2] = ["-c", HANGING_IDPOT, HERE]
        server.start()
        assert told.next().startswith("READY=1\n")
        assert told.next(4) == "WATCHDOG=1"
        assert server.request("POST", "/id/hang")[0] == 503
        wait_until(lambda: told.next(4) is None, 40)


# Becomes the command, as a service that systemd has handed a socket, or the same one twice.
HAND_OVER = """if True:    # arguments: descriptor, how often to hand it over, command
    import os
    import sys
    for number in range(int(sys.argv[2])):
        os.dup2(int(sys.argv[1]), 3 + number)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
    os.execv(sys.argv[3], sys.argv[3:])"""


@contextlib.contextmanager
def hosted(folder, *wrapper, config="", **options):
    """Runs idpot by the wrapper, whose command it ends; yields the process and errors().

    At the end of the block SIGTERM ends it with 0.
    """
    (folder / "idpot.cfg").write_text(config)
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


def test_clients_wait_while_idpot_is_restarted_behind_the_socket_of_systemd(tmp_path):
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        descriptor = listener.fileno()
        port = listener.getsockname()[1]
        hand_over = [sys.executable, "-c", HAND_OVER, str(descriptor), "1"]
        load = mixed(port)
        with hosted(tmp_path, *hand_over, pass_fds=[descriptor]):
            idpot.Client(f"http://127.0.0.1:{port}").create("p")
            stack.enter_context(load)
            load.more()
        with hosted(tmp_path, *hand_over, pass_fds=[descriptor]):
            load.more()
            load.__exit__()
        assert load.issued() >= 1000


def test_two_sockets_of_systemd_are_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()
        done = subprocess.run(
            [sys.executable, "-c", HAND_OVER, str(descriptor), "2",
             sys.executable, f"{HERE}/idpot.py"],
            cwd=tmp_path, pass_fds=[descriptor], capture_output=True)
    assert (done.returncode, done.stderr) == (
        1, b"idpot: 2 sockets were handed over, but one is served\n")


@pytest.mark.slow
def test_start_server_replaces_idpot_under_load_without_a_failed_request(mysql, tmp_path):
    port = free_port()
    starter = [needs("start_server"), "--interval=1", f"--port=127.0.0.1:{port}", "--"]
    with hosted(tmp_path, *starter, config=mysql()) as (process, errors):
        wait_until(lambda: "listening on" in errors())
        client = idpot.Client(f"http://127.0.0.1:{port}")
        client.create("p")

        def hang_up(times):
            """A signal between start_server's look for one and its wait is lost: then another."""
            if errors().count("received HUP") == times:
                return True
            process.send_signal(signal.SIGHUP)

        with mixed(port) as load:
            for times in (1, 2):
                load.more()
                wait_until(lambda: hang_up(times), 20, every=3)
                ended = ["0"] * times
                wait_until(
                    lambda: re.findall(r"worker \d+ died, status:(\d+)", errors()) == ended, 20)
            load.more()
        assert load.issued() == client.next("p") - 1


def test_start_server_hands_over_a_unix_socket(tmp_path):
    starter = [needs("start_server"), "--interval=1", "--path=s", "--"]
    with socket.socket(socket.AF_UNIX) as client, hosted(tmp_path, *starter) as (_, errors):
        wait_until(lambda: client.connect_ex(f"{tmp_path}/s") == 0)
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.recv(9999).endswith(b"\r\n\r\nok")
        line = r'^127\.0\.0\.1 - - .*"GET /healthz HTTP/1\.0" 200 2 '
        wait_until(lambda: re.search(line, errors(), re.M))


def open_files(server):
    """The paths that the server has open."""
    folder = f"/proc/{server.process.pid}/fd"
    paths = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"{folder}/{name}"))
    return paths


def ids_told(path):
    """How many IDs the access log tells."""
    return Path(path).read_text().count('"POST /id/p HTTP/1.1" 200 ')


def test_logs_are_moved_and_reopened_at_sighup_without_losing_a_line(mysql, run):
    server = run(mysql("LogFile = access\nLogLinkName = newest"))
    server.create("p")
    log = f"{server.folder}/access"
    moved = [f"{server.folder}/1", f"{server.folder}/2"]
    with mixed(server.port) as load:
        for path in moved:
            wait_until(lambda: ids_told(log) >= 400)
            os.rename(log, path)
            load.more(20)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: os.path.exists(log) and path not in open_files(server))
        wait_until(lambda: ids_told(log) >= 400)
    assert server.stop() == 0
    assert os.readlink(f"{server.folder}/newest") == "access"
    assert sum(map(ids_told, (log, *moved))) == load.issued()


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """The URL of a server with the tokens t and a, and the pots p and full."""
    server = Idpot(tmp_path_factory.mktemp("secured"), "[Server]\nToken = t\nAdminToken = a\n")
    url = f"http://127.0.0.1:{server.port}"
    with idpot.Client(url, token="a") as admin:
        admin.create("p")
        admin.create("full", idpot.MAX_ID)
    yield url
    server.stop(signal.SIGKILL)


def test_client_in_a_program_with_more_than_1024_open_files(secured, many_descriptors):
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        client = stack.enter_context(idpot.Client(secured, "t"))
        first = client.next("p")
        assert client.next("p") > first


@pytest.mark.parametrize("method, arguments, token, error, text", [
    ("next", ["p"], "guess", idpot.Unauthorized, "the bearer token is wrong"),
    ("create", ["p"], None, idpot.Unauthorized, "a bearer token is needed"),
    ("create", ["p"], "a", idpot.Exists, 'pot "p" exists'),
    ("raise_to", ["none", 1], "a", idpot.NotFound, 'there is no pot "none"'),
    ("next", ["p?count=5\u00e9"], "t", idpot.NotFound,
     r'there is nothing at "/id/p?count=5\xe9"'),
    ("next_many", ["p", 10001], "t", idpot.BadRequest,
     'count "10001" is not a whole number from 1 to 10000'),
    ("next_range", ["p", 2**32 + 1], "t", idpot.BadRequest,
     'range "4294967297" is not a whole number from 1 to 4294967296'),
    ("next", ["full"], "t", idpot.Exhausted,
     'pot "full" is exhausted: fewer than 1 IDs are left'),
    ("next_range", ["full", 9], "t", idpot.Exhausted,
     'pot "full" is exhausted: fewer than 9 IDs are left'),
])
def test_client_raises_by_the_status(method, arguments, token, error, text, secured):
    with idpot.Client(secured, token) as client:
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            getattr(client, method)(*arguments)


def test_client_returns_numbers_and_ranges(run):
    server = run("[Server]\nToken = t\nAdminToken = a\n")
    url = f"http://127.0.0.1:{server.port}"
    admin = idpot.Client(url, token="a")
    client = idpot.Client(url + "/", token="t", timeout=1)
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


def test_client_connects_again_to_a_server_that_closed_ended_or_hung(run):
    server = run("[Server]\nIdleTimeout = 0.3\n", listen=f"127.0.0.1:{free_port()}")
    server.create("p", 200)
    with idpot.Client(f"http://127.0.0.1:{server.port}", timeout=1) as client:
        assert client.next("p") == 201
        kept_open = client._connection.sock
        wait_until(lambda: select.select([kept_open], [], [], 0)[0])    # the server closed it
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


class ScriptedServer:
    """A with block with a server that answers each request with the next body of a script.

    Where the script says None it closes the connection instead; `requests` has the request lines.
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
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    self.answer(connection)

    def answer(self, connection):
        with connection.makefile("rb") as lines:
            for line in lines:
                self.requests.append(line.decode().strip())
                length = 0
                for field in iter(lines.readline, b"\r\n"):
                    if field.lower().startswith(b"content-length:"):
                        length = int(field.split()[1])
                lines.read(length)
                body = self.script.pop(0)
                if body is None:
                    return
                answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                connection.sendall(answer.encode())


def test_client_does_not_repeat_a_create_on_a_connection_that_died():
    with ScriptedServer("7", None, "8") as server, idpot.Client(server.url) as client:
        assert client.next("p") == 7
        with pytest.raises(ConnectionError):
            client.create("q")
        assert client.next("p") == 8
    assert server.requests == [
        "POST /id/p HTTP/1.1", "POST /pot/create HTTP/1.1", "POST /id/p HTTP/1.1"]


def test_client_repeats_a_request_for_ids_on_a_connection_that_died():
    with ScriptedServer("7", None, "9") as server, idpot.Client(server.url) as client:
        assert client.next("p") == 7
        assert client.next("p") == 9
    assert server.requests == ["POST /id/p HTTP/1.1"] * 3


def test_client_does_not_repeat_a_request_on_a_new_connection():
    with ScriptedServer(None, "9") as server, idpot.Client(server.url) as client:
        with pytest.raises(ConnectionError):
            client.next("p")
    assert server.requests == ["POST /id/p HTTP/1.1"]


@pytest.mark.parametrize("method, arguments, body", [
    ("next", [], "9"),
    ("next", [], "10"),
    ("next_many", [2], "10\n11\n"),
    ("next_range", [100], "1\t100\n"),
])
def test_client_raises_when_a_pot_went_back(method, arguments, body):
    script = ["10", body, "5", "11"]
    with ScriptedServer(*script) as server, idpot.Client(server.url) as client:
        assert client.next("p") == 10
        with pytest.raises(idpot.WentBack, match=r"\bp\b"):
            getattr(client, method)("p", *arguments)
        assert client.next("other") == 5
        assert client.next("p") == 11


def test_client_remembers_the_end_of_many_and_of_a_range():
    script = ["1\n2\n3\n", "3", "4\t1003\n", "1003", "1004"]
    with ScriptedServer(*script) as server, idpot.Client(server.url) as client:
        assert client.next_many("p", 3) == range(1, 4)
        with pytest.raises(idpot.WentBack):
            client.next("p")
        assert client.next_range("p", 1000) == range(4, 1004)
        with pytest.raises(idpot.WentBack):
            client.next("p")
        assert client.next("p") == 1004


@pytest.mark.parametrize("disk", ["gone", "full"])
def test_a_log_that_cannot_be_written_stops_no_ids_and_is_said_once(disk, run, tmp_path):
    logs = tmp_path / "logs"
    with contextlib.ExitStack() as stack:
        if disk == "full":
            stack.enter_context(small_disk(logs, "64k"))
            server = run(f"[Server]\nLogFile = {logs}/access\n")
        else:
            logs.mkdir()
            server = run(f"[Server]\nLogFile = {logs}/%S\n")
        server.create("p")
        with Asking(kept(server.port, Referer="x" * 997)) as load:
            if disk == "full":
                (logs / "ballast").write_bytes(bytes(61440))
            else:
                shutil.rmtree(logs)
            wait_until(lambda: "its lines are lost: " in server.errors())
            load.more(500)
            if disk == "full":
                (logs / "ballast").unlink()
            else:
                logs.mkdir()
            wait_until(lambda: any(file.stat().st_size > 8192 for file in logs.iterdir()))
        assert load.issued() == server.next("p") - 1
        assert server.stop() == 0
        assert server.errors().count("its lines are lost: ") == 1
        for file in logs.iterdir():     # no half a line before another
            assert "x127.0.0.1" not in file.read_text()


HOSTILE_TEXT = [
    "\\", '"', '\\"', '" 200 1 "', "\\x00", "'", "<b>", "[", "-", "%", "%00",
    "\t", "é", "\xff", "名",
]
HOSTILE_STARTS = ["GET /id/p?", "POST /id/p?", "HEAD /pot/", "W-$ /pot", "GET /"]
HOSTILE_ENDS = [
    b"\x00\xff\"\\\n",
    b"GET /\x01 HTTP/1.1\r\n\r\n",
    b"GET / HTTP/3.0\r\n\r\n",
]


@pytest.mark.slow
def test_goaccess_reads_10000_lines_of_hostile_requests(run):
    server = run("[Server]\nLogFile = log\n")
    random_ = random.Random(6)

    def request():
        agent = "".join(random_.choices(HOSTILE_TEXT, k=9))
        target = "".join(random_.choices(HOSTILE_TEXT, k=9))
        target = re.sub("[^!-~]|%(?!00)", "~", target)
        line = f"{random_.choice(HOSTILE_STARTS)}{target} HTTP/1.1"
        fields = f"Host: h\r\nUser-Agent: {agent}\r\nReferer: {agent[::-1]}\r\n"
        return f"{line}\r\n{fields}\r\n".encode()

    for _ in range(100):
        requests = [request() for _ in range(99)]
        server.raw(b"".join(requests) + random_.choice(HOSTILE_ENDS))
    assert server.stop() == 0
    subprocess.run(
        [needs("goaccess"), "log", "--log-format=COMBINED", "--no-global-config", "-o", "out.json"],
        cwd=server.folder, check=True, capture_output=True)
    with open(f"{server.folder}/out.json") as file:
        found = json.load(file)["general"]
    assert found["total_requests"] == 10000
    assert found["valid_requests"] == 10000
    assert found["failed_requests"] == 0


def test_the_units_leave_systemd_nothing_to_say_and_little_exposed():
    units = [f"{HERE}/contrib/idpot.service", f"{HERE}/contrib/idpot.socket"]
    verify = subprocess.run([needs("systemd-analyze"), "verify", *units], capture_output=True)
    assert verify.stderr == b""
    text = subprocess.check_output(
        ["systemd-analyze", "security", "--offline=true", units[0]], text=True)
    exposed = re.search(r"exposure level for idpot.service: ([0-9.]+)", text)[1]
    assert float(exposed) <= 1.5


# -------------------------------------------------------------- faults: MySQL Group Replication

class GroupNode(Database):
    """A MySQL server that is configured for a replication group on loopback, and outside of it.

    `ports` are those of the group's own traffic, one for each node.
    """

    def __init__(self, ports, number=0):
        seeds = ",".join(f"127.0.0.1:{port}" for port in ports)
        super().__init__(
            "--plugin-load-add=group_replication.so",
            "--group-replication-group-name=6a4e3b52-3f0d-4c0b-9d0e-6b1d706f7400",
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
        rows = self.sql("SELECT id FROM information_schema.processlist WHERE db = 'idpot'")
        for row in rows:
            with contextlib.suppress(Exception):    # it ended by itself
                self.sql(f"KILL {row[0]}")

    def current(self, pot):
        return self.sql(f"SELECT id FROM idpot.pot_{pot}")[0][0]


def needs_mysql():
    """Skips the test where the server is no MySQL; no failure in CI: Debian has MariaDB only."""
    program = database_program()
    if not program or not is_mysql(program):
        pytest.skip("Group Replication needs a MySQL server: let IDPOT_TEST_MYSQLD name one")


def on_group_node(node, engine, credentials="root"):
    return (f"[Server]\nTimeout = 2\n[Mysql]\nEngine = {engine}\n"
            f"ConnectString = {node.dsn(credentials=credentials)}\n")


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


def test_outside_its_group_a_server_gives_no_id_and_serves_when_it_has_joined(founder, run):
    run(on_group_node(founder, "InnoDB")).create("outside", 41)
    founder.restart_outside()
    server = run(on_group_node(founder, "InnoDB"))
    for method, target in [("GET", "/healthz"), ("POST", "/id/outside"), ("GET", "/id/outside")]:
        status, text, _ = server.request(method, target)
        assert status == 503
        assert "its server is OFFLINE in the replication group" in text
    assert founder.current("outside") == 41
    founder.join(founds=True)
    wait_until(lambda: server.request("GET", "/healthz")[:2] == (200, "ok"))
    assert server.next("outside") == 42


def test_a_group_member_asks_for_the_grant_that_it_needs(founder, run):
    founder.sql("CREATE USER clerk IDENTIFIED BY 'p'")
    founder.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO clerk")
    config = on_group_node(founder, "InnoDB", credentials="clerk:p")
    ungranted = run(config, wait=False)
    assert ungranted.process.wait(10) == 78
    assert ungranted.errors() == (
        "idpot: on Group Replication the account needs GRANT SELECT ON "
        "performance_schema.replication_group_members (error 1142)\n")
    founder.sql("GRANT SELECT ON performance_schema.replication_group_members TO clerk")
    server = run(config)
    server.create("granted")
    assert server.next("granted") == 1
    assert server.request("GET", "/healthz")[:2] == (200, "ok")


def test_a_group_member_refuses_myisam_at_the_start(founder, run):
    server = run(on_group_node(founder, "MyISAM"), wait=False)
    assert server.process.wait(10) == 78
    assert server.errors() == (
        "idpot: Engine: a Group Replication member replicates InnoDB only, not MyISAM\n")


def test_a_group_member_refuses_a_table_of_myisam_at_the_start(founder, run):
    founder.sql("CREATE TABLE idpot.pot_old (id BIGINT UNSIGNED NOT NULL) ENGINE = MyISAM")
    server = run(on_group_node(founder, "InnoDB"), wait=False)
    code = server.process.wait(10)
    founder.sql("DROP TABLE idpot.pot_old")
    assert code == 78
    assert server.errors() == (
        "idpot: table pot_old: a Group Replication member replicates InnoDB only, not MyISAM\n")


def test_a_server_that_joins_a_group_later_is_left_no_empty_myisam_table(founder, run):
    founder.restart_outside()
    founder.sql("UNINSTALL PLUGIN group_replication")
    server = run(on_group_node(founder, "MyISAM"))
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
    assert "a Group Replication member replicates InnoDB only, not MyISAM" in text


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


@pytest.mark.slow
def test_group_the_primary_changes_as_planned(group, run):
    a, b, c = group
    servers = [run(on_cluster([a, b, c])), run(on_cluster([b, c, a]))]
    servers[0].create("planned")
    with Load(servers, "planned", patience=4) as load:
        load.wait_for(ids=300)
        b.become_primary()
        load.recover()
        a.become_primary()
        load.recover()
    load.verdict(a.current("planned"))
    assert {answer.status for answer in load.history()} == {200}


@pytest.mark.slow
def test_group_a_secondary_that_was_made_writable_gives_no_id(group, run):
    """The group looks for no conflicts between a primary and such a one: IDs would repeat."""
    a, b, c = group
    b.sql("SET GLOBAL super_read_only = OFF")
    b.sql("SET GLOBAL read_only = OFF")
    server = run(on_cluster([b]))
    try:
        assert server.request("GET", "/healthz")[0] == 503
    finally:
        b.become_primary()
    wait_until(lambda: server.request("GET", "/healthz")[:2] == (200, "ok"))


@pytest.mark.slow
def test_group_the_primary_dies_and_comes_back_outside_the_group(group, run):
    """It stands first in the setting, takes writes, and has an older counter."""
    a, b, c = group
    servers = [run(on_cluster([a, b, c])), run(on_cluster([b, c, a]))]
    servers[0].create("killed")
    with Load(servers, "killed", patience=4) as load:
        load.wait_for(ids=300)
        a.signal(signal.SIGKILL)
        wait_until(lambda: b.takes_writes() or c.takes_writes(), 60)
        load.recover()
        a.start()
        assert (a.state(), a.takes_writes()) == ("OFFLINE", True)
        primary = b if b.takes_writes() else c
        primary.end_connections()
        load.recover()
    load.verdict(primary.current("killed"))


@pytest.mark.slow
def test_group_the_primary_hangs_and_believes_in_its_office_when_it_wakes(group, run):
    a, b, c = group
    servers = [run(on_cluster([a, b, c])), run(on_cluster([b, c, a]))]
    servers[0].create("hung")
    with Load(servers, "hung", patience=4) as load:
        load.wait_for(ids=300)
        a.signal(signal.SIGSTOP)
        wait_until(lambda: b.takes_writes() or c.takes_writes(), 60)
        load.recover()
        a.signal(signal.SIGCONT)
        assert (a.state(), a.takes_writes()) == ("ONLINE", True)
        primary = b if b.takes_writes() else c
        primary.end_connections()
        load.recover()
    load.verdict(primary.current("hung"))


@pytest.mark.slow
def test_group_without_its_majority_gives_no_id(group, run):
    """The last test on these nodes: two of them stay dead."""
    a, b, c = group
    servers = [run(on_cluster([a, b, c])), run(on_cluster([b, c, a]))]
    servers[0].create("minority")
    with Load(servers, "minority", patience=4) as load:
        load.wait_for(ids=300)
        b.signal(signal.SIGKILL)
        c.signal(signal.SIGKILL)
        wait_until(load.refused, 20)
        since = time.monotonic()

        def later():
            return [answer.status for answer in load.history() if answer.start > since]

        wait_until(lambda: len(later()) >= 24, 20)
        assert set(later()) == {503}
        assert a.takes_writes()
        assert [server.request("GET", "/healthz")[0] for server in servers] == [503, 503]
        a.signal(signal.SIGKILL)    # the operator: the others are dead
        a.start()
        a.join(founds=True)
        load.recover()
    load.verdict(a.current("minority"))
