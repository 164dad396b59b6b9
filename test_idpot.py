"""Tests of idpot over a real MariaDB (or MySQL) server and SQLite, through real HTTP.

    tox                         # or: python3 -m pytest

The database server is started here, in a temporary directory on a free port, and ended here. Where no
server program is installed its tests are skipped with the reason, except under CI=true: there they fail.
"""

import collections
import contextlib
import errno
import functools
import itertools
import json
import logging
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
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, IncompleteRead
from pathlib import Path
from urllib.parse import unquote

import pytest

import idpot

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_ID = 2**64 - 1


# ---------------------------------------------------------------- real parts: database servers and idpot

def wait_until(condition, seconds=10.0, every=0.02):
    """Returns the first true value of condition(); fails after that many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(every)


def free_port(given=set()):
    """A free TCP port below the ephemeral range, so that no outgoing connection takes it; never one twice."""
    for port in range(max(given, default=21000 + os.getpid() % 5000) + 1, 32000):
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                given.add(port)
                return port
    raise RuntimeError("no free port")


class Database:
    """A MariaDB or MySQL server of our own; root has no password."""

    def __init__(self, *options, user="mysql"):
        self.program = shutil.which("mariadbd") or shutil.which("mysqld") or shutil.which("mysqld", path="/usr/sbin")
        if not self.program:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
                "no mariadbd or mysqld is installed: apt-get install mariadb-server")
        self.options, self.user, self.port = options, user, free_port()
        self.dir = tempfile.mkdtemp(prefix="idpot-db-")
        self.socket, self.log = f"{self.dir}/s.sock", f"{self.dir}/error.log"
        if os.getuid() == 0:
            shutil.chown(self.dir, user)
        else:
            self.user = ""
        as_user = [f"--user={self.user}"] if self.user else []
        install = ([self.program, "--no-defaults", "--initialize-insecure", f"--datadir={self.dir}/data"]
                   if "mysqld" in os.path.basename(os.path.realpath(self.program)) else
                   ["mariadb-install-db", "--no-defaults", f"--datadir={self.dir}/data", "--skip-test-db",
                    "--auth-root-authentication-method=normal"])
        subprocess.run(install + as_user, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = None
        self.start()
        self.sql("CREATE DATABASE IF NOT EXISTS idpot")

    def start(self):
        """Starts the server and returns when it answers."""
        as_user = [f"--user={self.user}"] if self.user else []
        self.process = subprocess.Popen(
            [self.program, "--no-defaults", f"--datadir={self.dir}/data", f"--socket={self.socket}",
             f"--pid-file={self.dir}/pid", f"--port={self.port}", "--bind-address=127.0.0.1",
             "--skip-name-resolve", f"--log-error={self.log}", "--innodb-buffer-pool-size=64M",
             *as_user, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers, 60)

    def answers(self):
        assert self.process.poll() is None, open(self.log).read()[-3000:]
        with contextlib.suppress(Exception):
            return self.sql("SELECT 1") == [(1,)]

    def connect(self, **options):
        """A mysql-connector connection as root, autocommit on."""
        import mysql.connector
        return mysql.connector.connect(**{
            "host": "127.0.0.1", "port": self.port, "user": "root", "autocommit": True,
            "collation": "utf8mb4_general_ci", "connection_timeout": 10, **options})

    def sql(self, statement, **options):
        """Runs one statement as root and returns its rows."""
        with contextlib.closing(self.connect(**options)) as connection:
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def dsn(self, database="idpot", parameters=""):
        return f"root@tcp(127.0.0.1:{self.port})/{database}{parameters}"

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
    """`python idpot.py --config=...` in a directory of its own; `errors()` is what it wrote on stderr."""

    def __init__(self, folder, config="", *arguments, listen="127.0.0.1:0", wait=True, environment=None):
        self.folder = str(folder)
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, "idpot.cfg")
        with open(path, "w") as file:
            file.write(config)
        os.chmod(path, 0o600)
        self.stderr = os.path.join(self.folder, "stderr")
        self.command = [sys.executable, os.path.join(HERE, "idpot.py"), f"--config={path}",
                        *([f"--listen={listen}"] if listen else []), *arguments]
        self.environment = {**os.environ, **(environment or {})}
        self.start(wait)

    def start(self, wait=True):
        with open(self.stderr, "a") as stderr:
            seen = stderr.tell()
            self.process = subprocess.Popen(self.command, cwd=self.folder, stderr=stderr,
                                            stdout=subprocess.DEVNULL, env=self.environment)
        if wait:
            self.host, self.port = wait_until(lambda: self.address(seen), 30)

    def address(self, seen=0):
        assert self.process.poll() is None, self.errors()
        found = re.search(r"listening on http://(\S+):(\d+)", self.errors()[seen:])
        return found and (found[1], int(found[2]))

    def errors(self):
        with open(self.stderr) as file:
            return file.read()

    def request(self, method, path, body=None, headers=None, timeout=30):
        """One request on a connection of its own; returns (status, body text, headers)."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            if body is not None:
                headers = {"Content-Type": "application/x-www-form-urlencoded", **(headers or {})}
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

    def raw(self, data, timeout=15, half_close=False):
        """Sends the bytes and returns all that comes until the server closes, or the time is over."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            answer = b""
            with contextlib.suppress(OSError):
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                while True:
                    chunk = connection.recv(65536)
                    if not chunk:
                        break
                    answer += chunk
            return answer

    def create(self, pot, min=0):
        status, text, _ = self.request("POST", "/pot/create", f"name={pot}&min={min}")
        assert (status, text) == (201, "Created new pot")

    def next(self, pot, count=None):
        """The next ID; with count, the list of IDs."""
        status, text, _ = self.request("POST", f"/id/{pot}" + (f"?count={count}" if count else ""))
        assert status == 200, (status, text)
        return [int(line) for line in text.splitlines()] if count else int(text)

    def stop(self, number=signal.SIGTERM):
        """Sends the signal, waits for the end and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


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
        started.append(Idpot(tmp_path / f"idpot{len(started)}", config, *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)


# ---------------------------------------------------------------- the API, over every store

BAD_NAMES = ["a%20b", "a.b", "a/b", "%C3%A9", "a%00", "a%0A", "%60%3B--", "a%25", "%EF%BC%91", "x" * 61]
NO_NUMBERS = ["", "-1", "%2B5", "1e3", "1.0", "0x1", "1_0", "%201", "1%0A", "%D9%A3", "%EF%BC%91", "9" * 5000]
API_REFUSALS = [    # method, target, form, status, what the one line (of 405: the header Allow) says
    ("POST", "/pot/create", "min=1", 400, 'name ""'),
    ("POST", "/pot/create", "name=a&name=b", 400, '"name" is given twice\n'),
    ("POST", "/pot/create", f"name=a&min={2**64}", 400, 'min "18446744073709551616" is not a'),
    ("POST", "/pot/create", "name=fixed&min=99", 409, 'pot "fixed" exists\n'),
    ("POST", "/pot/raise", "name=fixed", 400, 'min "" is not a whole number from 0 to'),
    ("POST", "/pot/raise", "name=none&min=9", 404, 'there is no pot "none"\n'),
    ("POST", "/id/fixed?count=0", None, 400, 'count "0" is not a whole number from 1 to 10000\n'),
    ("POST", "/id/fixed", "count=10001", 400, 'count "10001" is not a whole number from 1 to 10000\n'),
    ("POST", "/id/fixed?count=2&count=2", None, 400, '"count" is given twice\n'),
    ("POST", "/id/fixed?count=2", "count=2", 400, '"count" is given twice\n'),
    *((method, path, None, 404, 'there is no pot "none"\n')
      for method, path in [("POST", "/id/none"), ("GET", "/id/none"), ("GET", "/pot/none")]),
    *(("POST", path, None, 404, f'there is nothing at "{path}"\n')
      for path in ["/", "/id", "/id/", "/pot/", "/id/fixed/", "/ID/fixed", "//id/fixed", "/id/../id/fixed"]),
    ("POST", "/pot", None, 405, "GET, HEAD"), ("POST", "/pot/fixed", None, 405, "GET, HEAD"),
    *((method, path, None, 405, "GET, HEAD, POST")
      for method, path in [("DELETE", "/id/fixed"), ("PUT", "/pot/create"), ("post", "/pot/raise")]),
    *((method, path.replace("*", bad), form and form + bad, status, ascii(unquote(bad)[:80])[1:-1])
      for status, values, requests in [
          (400, NO_NUMBERS, [("POST", "/pot/create", "name=a&min="), ("POST", "/pot/raise", "name=a&min="),
                             ("POST", "/id/fixed", "count="), ("POST", "/id/fixed?count=*", None)]),
          (400, BAD_NAMES, [("POST", "/pot/create", "name="), ("POST", "/pot/raise", "min=1&name=")]),
          (404, BAD_NAMES, [("GET", "/pot/*", None), ("GET", "/id/*", None), ("POST", "/id/*", None)])]
      for method, path, form in requests for bad in values)]


def at_once(*calls):
    """Runs the calls in threads that start together; returns their results in order."""
    barrier = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: (barrier.wait(10), call())[1], calls))


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
            config = f"[Mysql]\nConnectString = {database.dsn(f'api_{cls.engine}')}\nEngine = {cls.engine}\n"
        server = Idpot(tmp_path_factory.mktemp("api"), config)
        server.create("fixed", 41)
        yield server
        server.stop(signal.SIGKILL)

    def test_what_is_answered(self, api):
        for method, target, form, *expected in [
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
                ("POST", "/pot/create", "name=no-min", 201, "Created new pot"),
                ("POST", "/id/no-min", None, 200, "1")]:
            status, text, headers = api.request(method, target, form)
            assert [status, text] == expected, (method, target, form)
            assert headers["Cache-Control"] == "no-store"
            assert headers["Content-Type"] == (None if status == 204 else "text/plain; charset=utf-8")

    def test_names_that_are_allowed_and_the_list(self, api):
        names = ["0", "-", "_", "a-B_9", "A-b_9", "create", "raise", "select", "X" * 60]
        for number, name in enumerate(names):
            api.create(name, MAX_ID - number - 1)
            assert api.request("GET", f"/pot/{name}")[0] == 204
        assert [api.next(name) for name in names] == list(range(MAX_ID, MAX_ID - 9, -1))
        lines = api.request("GET", "/pot")[1].split("\n")
        assert lines == [*sorted(lines[:-1]), ""]
        assert {"fixed\t41", "0\t18446744073709551615", "A-b_9\t18446744073709551611"} < set(lines)

    @pytest.mark.parametrize("method, target, form, status, says", API_REFUSALS, ids=itertools.count())
    def test_what_is_refused_changes_nothing(self, api, method, target, form, status, says):
        pots = sorted(api.request("GET", "/pot")[1].splitlines())
        got, text, headers = api.request(method, target, form)
        assert (got, text.count("\n"), text[-1], len(text) < 200) == (status, 1, "\n", True)
        assert says in text if status != 405 else says == headers["Allow"]
        assert not re.search("Traceback|SELECT|UPDATE|INSERT|sqlite|mysql|pot_", text)
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
        assert (headers["Cache-Control"], headers["Content-Length"]) == ("no-store", str(len(text)))
        assert sorted(api.request("GET", "/pot")[1].splitlines()) == pots and "fixed\t41" in pots

    def test_every_id_of_the_unsigned_range_is_given_once(self, api):
        api.create("range", 2**63 - 2)
        assert [api.next("range") for _ in range(3)] == [2**63 - 1, 2**63, 2**63 + 1]
        api.create("batch", 2**63 - 3)
        assert api.next("batch", 3) == [2**63 - 2, 2**63 - 1, 2**63]
        assert api.request("POST", "/pot/raise", f"name=range&min={MAX_ID - 3}")[:2] == (200, f"{MAX_ID - 3}")
        assert api.next("range") == MAX_ID - 2
        exhausted = 'pot "range" is exhausted: fewer than %d IDs are left\n'
        assert api.request("POST", "/id/range?count=3")[:2] == (409, exhausted % 3)
        assert api.next("range", 2) == [MAX_ID - 1, MAX_ID]
        assert api.request("POST", "/id/range")[:2] == (409, exhausted % 1)
        assert api.request("POST", "/pot/raise", f"name=range&min={MAX_ID}")[:2] == (200, f"{MAX_ID}")
        assert api.request("GET", "/id/range")[:2] == (200, "18446744073709551615")

    def test_forty_requests_for_the_last_ten_ids(self, api):
        api.create("last", MAX_ID - 10)
        answers = at_once(*[lambda: api.request("POST", "/id/last")[:2]] * 40)
        given = sorted(int(text) for status, text in answers if status == 200)
        assert given == list(range(MAX_ID - 9, MAX_ID + 1))
        assert [status for status, _ in answers].count(409) == 30

    def test_twelve_creates_of_one_name_at_once(self, api):
        answers = at_once(*[lambda: api.request("POST", "/pot/create", "name=once&min=7")[0]] * 12)
        assert sorted(answers) == [201] + [409] * 11
        assert api.request("GET", "/pot")[1].count("once\t7\n") == 1

    def test_ids_have_no_gap_and_a_later_request_gets_a_greater_one(self, api):
        api.create("order")
        history = []

        def client(count):
            for _ in range(20):
                begin = time.monotonic()
                ids = api.next("order", count)
                history.append((begin, time.monotonic(), ids))
                assert ids == list(range(ids[0], ids[0] + count))

        at_once(*[lambda count=count: client(count) for count in (1, 1, 1, 2, 3, 1, 7, 1)])
        assert sorted(id for *_, ids in history for id in ids) == list(range(1, 341))
        assert not [(a, b) for a in history for b in history if a[1] < b[0] and a[2][-1] > b[2][0]]


class TestApiSqlite(ApiContract):
    def test_pots_outlive_the_process_all_in_the_one_file(self, run):
        server = run()
        assert server.request("GET", "/pot")[:2] == (200, "")
        server.create("kept", 2**63)
        assert (server.next("kept"), server.stop()) == (2**63 + 1, 0)
        assert sorted(os.listdir(server.folder)) == ["idpot.cfg", "idpot.db", "stderr"]
        server.start()
        assert server.next("kept") == 2**63 + 2


class TestApiMyisam(ApiContract):
    engine = "MyISAM"
    columns = "`id` bigint unsigned NOT NULL\n"

    @pytest.fixture
    def sql(self, api, database):
        """Runs a statement in the database of `api`."""
        return lambda statement: database.sql(statement, database=f"api_{self.engine}")

    def go_idpot_table(self, sql, pot, *values):
        sql(f"CREATE TABLE pot_{pot} (id BIGINT UNSIGNED NOT NULL) ENGINE={self.engine}")
        for value in values:
            sql(f"INSERT INTO pot_{pot} VALUES ({value})")

    def test_a_table_made_by_go_idpot_is_used_as_it_is_and_no_other(self, api, sql):
        self.go_idpot_table(sql, "from_go", 1000)
        sql("CREATE TABLE potXother (id INT)")
        before = sql("SHOW CREATE TABLE pot_from_go")
        assert (api.request("GET", "/pot/from_go")[0], api.request("GET", "/id/from_go")[1]) == (204, "1000")
        assert (api.next("from_go"), api.next("from_go", 2)) == (1001, [1002, 1003])
        assert api.request("POST", "/pot/create", "name=from_go&min=5")[0] == 409
        assert sql("SHOW CREATE TABLE pot_from_go") == before
        assert sql("SELECT * FROM pot_from_go") == [(1003,)] and "other" not in api.request("GET", "/pot")[1]

    def test_twelve_creates_of_one_name_at_two_servers_make_one_row(self, api, sql, run):
        servers = [api, run(Path(api.folder, "idpot.cfg").read_text())] * 6
        for pot in ("row0", "row1", "row2", "row3"):
            answers = at_once(*[functools.partial(server.request, "POST", "/pot/create", f"name={pot}&min=7")
                                for server in servers])
            assert sorted(status for status, *_ in answers) == [201] + [409] * 11
            assert sql(f"SELECT COUNT(*), MAX(id) FROM pot_{pot}") == [(1, 7)]
        [(_, table)] = sql("SHOW CREATE TABLE pot_row0")
        assert table.replace("(20)", "").startswith(    # a display width, which MySQL 8 has no more
            f"CREATE TABLE `pot_row0` (\n  {self.columns}) ENGINE={self.engine} ")

    @pytest.mark.parametrize("pot, values", [
        ("empty", ()), ("same", (5, 5)), ("two", (5, 6)), ("top", (5, MAX_ID))])
    def test_a_table_without_exactly_one_row_never_gives_an_id(self, api, sql, pot, values):
        self.go_idpot_table(sql, pot, *values)
        for method, path, form in [("POST", f"/id/{pot}", None), ("POST", f"/id/{pot}", "count=2"),
                                   ("GET", f"/id/{pot}", None), ("POST", "/pot/raise", f"name={pot}&min=9")]:
            status, text, _ = api.request(method, path, form)
            assert (status, text.startswith(f'the table of pot "{pot}" has ')) == (503, True)
        assert f"{pot}\t-\n" in api.request("GET", "/pot")[1]
        assert api.request("POST", "/pot/create", f"name={pot}&min=8")[0] == (409 if values else 201)
        assert values or (api.next(pot), sql(f"SELECT * FROM pot_{pot}")) == (9, [(9,)])    # mended by create

    def test_a_counter_set_back_by_hand_gives_no_lower_id_and_is_logged_once(self, api, sql):
        api.create("back", 41)
        assert api.next("back", 100)[-1] == 141
        sql("UPDATE pot_back SET id = 50")
        assert [api.next("back") for _ in range(3)] == [142, 143, 144]
        assert re.findall(r" idpot\[\d+\] WARNING (.*\bback\b.*)", api.errors()) == [
            "the counter of pot back was set back to 50, but 141 was given: it goes on above that"]
        assert sql("SELECT * FROM pot_back") == [(144,)]


class TestApiInnodb(TestApiMyisam):
    engine = "InnoDB"
    columns = "`id` bigint unsigned NOT NULL,\n  PRIMARY KEY (`id`)\n"
    test_what_is_refused_changes_nothing = None     # the engine is not asked


# ---------------------------------------------------------------- requests that share a statement

class TestGroups:
    @pytest.fixture
    def server(self, run, database):
        database.sql("DROP DATABASE IF EXISTS groups_test")
        database.sql("CREATE DATABASE groups_test")
        return run(f"[Server]\nTimeout = 60\n[Mysql]\nConnectString = {database.dsn('groups_test')}\n")

    @contextlib.contextmanager
    def held(self, database, pot):
        """Holds the pot by a table lock; yields a function that returns when a statement waits for it."""
        with contextlib.closing(database.connect(database="groups_test")) as connection:
            connection.cursor().execute(f"LOCK TABLES `pot_{pot}` WRITE")
            yield lambda: wait_until(lambda: database.sql(
                "SELECT id FROM information_schema.processlist WHERE info LIKE 'UP%' AND state LIKE 'Wait%'"))

    def status(self, database):
        return {name: int(value) for name, value in database.sql(
            "SHOW GLOBAL STATUS WHERE Variable_name IN ('Com_update', 'Com_select', 'Connections')")}

    def test_a_lone_request_costs_one_statement(self, server, database):
        server.create("lone")
        server.next("lone")
        before = self.status(database)
        assert [server.next("lone") for _ in range(20)] == list(range(2, 22))
        assert self.status(database) == {       # one connection asked for the status
            **before, "Com_update": before["Com_update"] + 20, "Connections": before["Connections"] + 1}

    def test_sixty_requests_that_wait_together_share_a_statement_for_ids_and_one_for_reads(self, server, database):
        server.create("group")
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(60)]
        with self.held(database, "group") as wait_for_statement:
            for number, client in enumerate(clients):   # the 404 shows that the server has read the second request, too
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
                               b"%s /id/group HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                               % (b"GET" if number % 3 == 2 else b"POST"))
                assert client.recv(9999).startswith(b"HTTP/1.1 404 ")
                if number == 0:
                    wait_for_statement()
                    before = self.status(database)
            assert server.request("GET", "/")[0] == 404     # by now the last client's second request waits, too
        ids = [int(client.makefile("rb").read().split()[-1]) for client in clients]
        assert (ids[0], sorted(set(ids))) == (1, list(range(1, 41))) and min(ids[2::3]) > 36
        assert all(self.status(database)[name] - before[name] <= 3 for name in ("Com_update", "Com_select"))

    def test_a_request_whose_client_has_gone_costs_no_id(self, server, database):
        server.create("gone")
        with ThreadPoolExecutor(1) as pool, self.held(database, "gone") as wait_for_statement:
            first = pool.submit(server.next, "gone")
            wait_for_statement()
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/gone HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(9999).startswith(b"HTTP/1.1 404 ")
                read = time.monotonic()
            wait_until(lambda: time.monotonic() > read + 1.5)   # a shorter wait is not looked into
        assert first.result() == 1 and server.next("gone") == 2

    def test_an_impossible_count_does_not_fail_its_neighbours(self, server, database):
        server.create("near", MAX_ID - 10)
        with ThreadPoolExecutor(7) as pool, self.held(database, "near") as wait_for_statement:
            futures = [pool.submit(server.request, "POST", f"/id/near?count={count}")
                       for count in (1, 10000, 2, 100, 3, 50, 4)]
            wait_for_statement()
        answers = [future.result()[:2] for future in futures]
        assert [status for status, _ in answers] == [200, 409, 200, 409, 200, 409, 200]
        given = [[int(id) for id in text.split()] for status, text in answers if status == 200]
        assert [len(ids) for ids in given] == [1, 2, 3, 4]
        assert sorted(sum(given, [])) == list(range(MAX_ID - 9, MAX_ID + 1))

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

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_stop_answers_the_request_that_waits(self, server, database, number):
        server.create("stop")
        with ThreadPoolExecutor(1) as pool, self.held(database, "stop") as wait_for_statement:
            waiting = pool.submit(server.request, "POST", "/id/stop")
            wait_for_statement()
            server.process.send_signal(number)
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", server.port)) == errno.ECONNREFUSED)
            assert not waiting.done()
        assert waiting.result()[:2] == (200, "1")
        assert server.process.wait(10) == 0
        assert '"POST /id/stop HTTP/1.1" 200 1 ' in server.errors()

    def test_a_stop_while_the_database_hangs_answers_the_backlog_with_503(self, run, database):
        server = run(f"[Server]\nTimeout = 2\n[Mysql]\nConnectString = {database.dsn('groups_test')}\n")
        server.create("hung")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.held(database, "hung"))
            server.process.send_signal(signal.SIGSTOP)
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
                       for _ in range(20)]
            for client in clients:
                client.sendall(b"POST /id/hung HTTP/1.1\r\nHost: x\r\n\r\n")
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGCONT)
            assert [client.recv(9999)[:13] for client in clients] == [b"HTTP/1.1 503 "] * 20
            assert server.process.wait(5) == 0


# ---------------------------------------------------------------- settings and the command line

class TestSettings:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

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
        ("[Server]\nListen = :80\nWorkers =", {"listen": ("", 80), "workers": 1}),
        ("[Mysql]", {"user": "root", "password": "", "hosts": [("127.0.0.1", 3306)], "database": "idpot"}),
        ('[Mysql]\nUsername = u\nPassword = "p#"\nHostname = h\nPort = 1\nDbname = d', {
            "user": "u", "password": "p#", "hosts": [("h", 1)], "database": "d"}),
        ("[Mysql]\nConnectString = u:p%40@/d", {"user": "u", "password": "p%40", "database": "d"})])
    def test_how_they_are_read(self, config, expected):
        settings = self.load(config)
        assert {**settings, **expected} == settings

    def test_the_example_file_says_the_defaults(self):
        example = Path(HERE, "idpot.cfg.example").read_text()
        names = sorted(name.lower() for rows in idpot.SETTINGS.values() for name in rows)
        whole = re.sub(r"(?m)^;(\[|\w+ =)", r"\1", example)
        assert sorted(name.lower() for name in re.findall(r"(?m)^(\w+) =", whole)) == names
        for section in ("Mysql", "Sqlite"):     # both at once are refused
            for text in (example, re.sub(rf"(?ms)^\[{section}\].*?(?=^\[|\Z)", "", whole)):
                loaded, defaults = self.load(text), self.load("")
                assert [loaded[name] for name in names] == [defaults[name] for name in names]

    @pytest.mark.parametrize("text, expected", [
        ("/db", {"user": "", "password": "", "hosts": [("127.0.0.1", 3306)], "database": "db"}),
        ("u:a@b:c/d(e)?f&g@tcp(h:1)/d", {"password": "a@b:c/d(e)?f&g", "hosts": [("h", 1)], "database": "d"}),
        ("u@tcp/db", {"user": "u", "password": "", "hosts": [("127.0.0.1", 3306)]}),
        ("u:p@tcp(db1,db2:3307,[fe80::1])/db", {"hosts": [("db1", 3306), ("db2", 3307), ("fe80::1", 3306)]}),
        ("u:p@tcp([::1]:3307)/d%2Fb%25", {"hosts": [("::1", 3307)], "database": "d/b%"}),
        ("u:p@unix(/run/my(sql)/s.sock)/db", {"unix_socket": "/run/my(sql)/s.sock", "hosts": []}),
        ("/db?timeout=1m30s&readTimeout=500ms", {"connection_timeout": 90, "read_timeout": 0.5}),
        ("/db?writeTimeout=2.5s&tls=1", {"write_timeout": 2.5, "tls": "true"}),
        ("/db?charset=utf8mb4,utf8&collation=x_bin", {"charset": "utf8mb4", "collation": "x_bin"}),
        ("/db?parseTime=true&loc=Asia%2FTokyo&maxAllowedPacket=0", {"variables": {}}),
        ("/db?x=%27a+b%27&wait_timeout=9", {"variables": {"x": "'a b'", "wait_timeout": "9"}})])
    def test_what_a_dsn_says(self, text, expected):
        assert {**idpot.parse_dsn(text), **expected} == idpot.parse_dsn(text)

    @pytest.mark.parametrize("config, arguments, code, message", [
        ("[Server]\nListn = 127.0.0.1:0", "", 78, 'f.cfg:2: unknown name "listn" in [Server]'),
        ("# x\n[server]\n\nTIMEOUT = 1\nHostname=x", "", 78, 'f.cfg:5: unknown name "hostname" in [server]'),
        ("[Postgres]\nHost = x", "", 78, "f.cfg: unknown section [Postgres]"),
        *((f"[{section}]\n{name} = {value}", "", 78, f'f.cfg:2: {name}: "{value}" is not ...')
          for section, name, value in [
              ("Mysql", "Port", "33O6"), ("Mysql", "Engine", "a b"), ("Server", "Workers", "0"),
              ("Server", "Timeout", "0"), ("Server", "IdleTimeout", "nan"), ("Server", "MaxConnections", "x"),
              ("Server", "RequestTimeout", "9s"), ("Server", "Listen", "localhost")]),
        *((f"[Mysql]\nConnectString={dsn}", "", 78, f"f.cfg:2: ConnectString: ...{it}...") for dsn, it in [
            ("u:secret@tcp(h:1)", "database"), ("u:secret@/", "database"), ("u:secret@tcp(h:x)/d", "h:x"),
            ("u:secret@tcp(h:65536)/d", "65536"), ("u:secret@tcp(h/d", "tcp(h"), ("u:secret@udp(h)/d", "udp"),
            ("u:secret@h:3306/d", "h:3306"), ("u:secret@tcp([::1)/d", "[::1"), ("u:secret@/d?timeout=5", "5"),
            ("u:secret@/d?tls=maybe", "maybe"), ("u:secret@/d?a`b=1", "a`b")]),
        ("[Server]\nWorkers = 2", "", 78, "f.cfg: Workers above 1 need [Mysql]..."),
        ('[Server]\nToken = "abc', "", 78, "f.cfg:2: ...a double quote is not closed"),
        ('[Server]\nToken = "a\\qc"', "", 78, 'f.cfg:2: ...\\q is not one of \\\\ \\" \\n \\t'),
        ("[Mysql]\nPort = 1\n[Sqlite]\nFile = x", "", 78, "f.cfg: [Mysql] and [Sqlite] are both given..."),
        ("[Mysql]\nPassword: secret", "", 78, "...f.cfg...2..."),
        ("", "--config=no.cfg", 78, "no.cfg: No such file or directory"),
        ("", "--config=no.cfg --check", 1, "no.cfg: No such file or directory"),
        ("", "--listen=x", 2, '...error: argument --listen: "x" is not host:port'),
        ("", "", 1, "cannot listen on {taken}: Address already in use..."),
        ("", "--listen=192.0.2.1:8", 1, "cannot listen on 192.0.2.1:8: Cannot assign requested..."),
        ("[Server]\nLogFile = no/dir/log", "", 1, 'LogFile "no/dir/log": No such file or directory'),
        ("[Server]\nLogFile = x\nLogLinkName = f.cfg", "", 1, 'LogFile "f.cfg": ...is not a symlink'),
        ("[Sqlite]\nFile = no/dir/db", "", 1, 'SQLite file "no/dir/db": unable to open database file'),
        ("[Sqlite]\nFile = f.cfg", "", 1, 'SQLite file "f.cfg": file is not a database'),
        ("[Mysql]\nConnectString = tcp({free})/idpot", "", 1, "MySQL {free}: ...Can't connect..."),
        ("[Mysql]\nConnectString = root@tcp({db})/no", "--check", 1, "...{db}: ...Unknown database 'no'..."),
        ("[Mysql]\nConnectString = root:secret@tcp({db})/idpot", "", 1, "MySQL {db}: ...Access denied..."),
        ("[Mysql]\nConnectString = root@tcp({db})/idpot?no=1", "", 78, "...Unknown system variable 'no'..."),
        ("[Mysql]\nConnectString = root@tcp({db})/idpot\nEngine = No", "", 78, '...no storage engine "No"')])
    def test_what_stops_the_start(self, capsys, database, config, arguments, code, message):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = {"{taken}": taken.getsockname()[1], "{free}": free_port(), "{db}": database.port}
            fill = functools.partial(re.sub, r"\{\w+\}", lambda match: f"127.0.0.1:{ports[match[0]]}")
            Path("f.cfg").write_text(fill(config))
            try:        # a start that is not stopped earlier is by the taken port
                got = idpot.main(["--config=f.cfg", fill("--listen={taken}"), *arguments.split()])
            except SystemExit as end:       # of argparse
                got = end.code
        out, text = capsys.readouterr()
        text = re.sub("(?s)^usage: .*\n(?=idpot: )|.* WARNING Engine MyISAM .*\n", "", text)
        assert (got, out, "secret" in text) == (code, "", False)
        assert re.fullmatch(re.escape(f"idpot: {fill(message)}\n").replace(r"\.\.\.", ".*"), text), text

    def test_check_and_version(self, capsys, database):
        Path("f.cfg").write_text(f"[Mysql]\nConnectString = root@unix({database.socket})/idpot")
        assert [idpot.main(["--check"]), idpot.main(["--check", "--config=f.cfg"])] == [0, 0]
        pytest.raises(SystemExit, idpot.main, ["--version"]).match("^0$")
        assert re.fullmatch(rf"idpot: .*SQLite idpot\.db.*\nidpot: .*MySQL {database.socket}/idpot, .*\n"
                            rf"idpot {idpot.__version__}\n", capsys.readouterr().out)

    def test_mysql_without_its_driver_says_how_to_install_it(self):
        Path("f.cfg").write_text("[Mysql]")
        done = subprocess.run([sys.executable, "-I", "-S", f"{HERE}/idpot.py", "--config=f.cfg"],
                              capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert re.fullmatch(r"idpot: \[Mysql\] .*pip install 'mysql-connector-python>=9\.2'\n", done.stderr)

    def test_plain_python_with_nothing_installed_serves_the_two_curl_commands(self, run, tmp_path):
        server = run("[Broken]", wait=False)
        assert server.process.wait(20) == 78
        server.folder, server.environment = str(tmp_path / "empty"), {}
        os.mkdir(server.folder)
        server.command = [sys.executable, "-I", "-S", f"{HERE}/idpot.py", "--listen=127.0.0.1:0"]
        server.start()
        url = f"http://127.0.0.1:{server.port}"
        for arguments, answer in [(["-d", "name=orders", f"{url}/pot/create"], b"Created new pot"),
                                  (["-X", "POST", f"{url}/id/orders"], b"1")]:
            assert subprocess.check_output(["curl", "-sS", *arguments], timeout=20) == answer
        assert re.search(r"listening on http://127\.0\.0\.1:\d+ \(SQLite idpot\.db\)\n", server.errors())


# ---------------------------------------------------------------- the access log

class TestAccessLog:
    QUOTED = r'"((?:[^"\\]|\\.)*)"'
    COMBINED = re.compile(r"127\.0\.0\.1 - - \[\d\d/(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)/\d{4}"
                          rf"(?::\d\d){{3}} [+-]\d{{4}}\] {QUOTED} (\d{{3}}) (\d+|-) {QUOTED} {QUOTED}\n")

    def fields(self, path):
        """(request line, status, size, referer, user agent) of each line of the file."""
        with open(path) as file:
            return [self.COMBINED.fullmatch(line).groups() for line in file]

    def test_no_line_is_lost_at_a_stop(self, run):
        server = run("[Server]\nLogFile = log.%Y%m%d\nLogLinkName = newest\n")
        server.create("logged")
        at_once(*[lambda: [server.next("logged") for _ in range(50)]] * 4)
        assert server.stop() == 0
        assert re.fullmatch(r"log\.\d{8}", os.readlink(f"{server.folder}/newest"))
        first, *others = self.fields(f"{server.folder}/newest")
        assert first == ("POST /pot/create HTTP/1.1", "201", "15", "-", "-")
        assert (len(others), others.count(("POST /id/logged HTTP/1.1", "200", "3", "-", "-"))) == (200, 101)

    def test_the_file_changes_with_its_pattern_and_the_link_follows(self, tmp_path):
        noons = iter([43200 + 86400 * day for day in (0, 1, 1, 2, 4)])
        handler = idpot.StrftimeFileHandler(f"{tmp_path}/%j%%", f"{tmp_path}/newest", lambda: next(noons))
        for number, newest in enumerate(["002%", "002%", "003%", "005%"]):
            handler.emit(logging.makeLogRecord({"msg": f"line {number}"}))
            assert os.readlink(tmp_path / "newest") == newest
        handler.reopen()
        assert {path.name: path.read_text() for path in tmp_path.glob("0*")} == {
            "001%": "", "002%": "line 0\nline 1\n", "003%": "line 2\n", "005%": "line 3\n"}

    def test_a_client_cannot_forge_a_line(self, run):
        server = run("[Server]\nLogFile = log")
        for data in [b'GET /a"b\\c HTTP/1.1\r\nHost: x\r\nReferer: r"\r\nUser-Agent: q"\\\t\xe9\r\n\r\n',
                     b"GET /\x1b[31m\x01\xc3 HTTP/1.1\r\n\r\n", b"GET /\nAuthorization: Bearer sesame\r\n\r\n"]:
            assert server.raw(data, half_close=True)
        assert server.stop() == 0
        assert [(line, status, *tail) for line, status, _, *tail in self.fields(f"{server.folder}/log")] == [
            (r'GET /a\"b\\c HTTP/1.1', "404", r'r\"', r'q\"\\\x09\xe9'),
            (r"GET /\x1b[31m\x01\xc3 HTTP/1.1", "400", "-", "-"),
            ("GET /", "400", "-", "-")]


# ---------------------------------------------------------------- hostile input: it answers or closes

# Requests for an ID of the pot p, with a place (%s) for what is odd.
ANY, LINE, TARGET = b"%s", b"%s\r\nHost: x\r\n\r\n", b"POST %s HTTP/1.1\r\nHost: x\r\n\r\n"
FIELD, HOST = b"POST /id/p HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", b"POST /id/p HTTP/1.1\r\nHost: %s\r\n\r\n"
LENGTH, CHUNKED = FIELD % b"Content-Length: %s", FIELD % b"Transfer-Encoding: %s" + b"0\r\n\r\n"
OLD, FORM = b"POST /id/p HTTP/1.0\r\n%s\r\n", FIELD % b"Content-Type: application/x-www-form-urlencoded\r\n%s"
GOOD, TWO = HOST % b"x", FORM % b"Content-Length: 7" + b"count=2"

# Answers, most IDs they cost, what it is (and the section of RFC 9110 to 9113 or 6585), requests, split at |.
# Answers are alternatives by |, in order by commas; after ! the connection is over, no matter what follows.
HOSTILE = [
    ("closed", 0, "no byte at all", ANY, [b""]),
    ("200", 1, "good, 9112 2.2 after an empty line", ANY, [GOOD, b"\r\n" + GOOD]),
    ("400!", 0, "9112 3 malformed request line", LINE, [
        b"POST|POST HTTP/1.1|POST  HTTP/1.1|POST  /id/p HTTP/1.1|POST\t/id/p\tHTTP/1.1|POST\f/id/p\fHTTP/1.1",
        b"POST /id/p x HTTP/1.1|POST /id/p HTTP/1.1 | POST /id/p HTTP/1.1|PO(ST /id/p HTTP/1.1",
        b"HTTP/1.1 200 OK|PO\xffST /id/p HTTP/1.1|PO\0ST /id/p HTTP/1.1"]),
    ("400!", 0, "9112 2.3 malformed version", LINE % b"POST /id/p %s", [
        b"HTTP /1.1|HTTP/ 1.1|http/1.1|HTTP/1|HTTP/1.|HTTP/.1|HTTP/1.10|HTTP/11.1|HTTP/1.1x|HTTP|HTTPS/1.1"]),
    ("505!", 0, "9110 15.6.6 version", LINE % b"POST /id/p HTTP/%s", [b"0.9|1.2|1.9|2.0|3.0"]),
    ("400!", 0, "HTTP/0.9, TLS (9112 9.8), SSH, PROXY, NULs", ANY, [
        b"POST /id/p\r\n|GET /id/p\r\n\r\n|SSH-2.0-x\r\n|PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\n" + GOOD,
        b"\x16\x03\x01\x02\0\1\0\1\xfc\x03\x03" + bytes(range(100)), bytes(1000)]),
    ("400!|505!", 0, "9113 3.4 HTTP/2 preface", ANY, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4"]),
    ("405", 0, "9110 9.1", LINE % b"%s /id/p HTTP/1.1", [b"post|BREW|OPTIONS|!#$%&'*+-.^_`~", b"A" * 5000]),
    ("400!", 0, "9112 2.2 bare LF, bare CR, white space before the first field", ANY, [
        b"\n" + GOOD, GOOD.replace(b"\r", b""), GOOD.replace(b"\r", b"", 1), GOOD[:-4] + b"\n\r\n",
        b"\r" + GOOD, GOOD.replace(b"\n", b""), FIELD % b"X: a\r", FIELD % b"X: a\nX: b",
        FIELD % b"X: a\rX: b", GOOD[:-2] + b"\n", GOOD.replace(b"Ho", b" Ho"), GOOD.replace(b"Ho", b"\tHo")]),
    ("400!", 0, "9110 5.5 control byte", FIELD % b"X: a%sb", [b"\0|\1|\7|\b|\v|\f|\x1b|\x1f|\x7f"]),
    ("200", 1, "9110 5.5, 9112 5 right, if unusual", FIELD, [
        b"X: a\tb|User-Agent: caf\xe9|Y: \xff\xfe\xc3|X:|X:a|Content-Length:\t 0 \t |Content-Length:0",
        b"!#$%&'*+-.^_`~09azAZ: 1|X: 1\r\nX: 2|Content_Length: 9|TE: x|Connection: Upgrade\r\nUpgrade: x",
        b"X: a\r\n" * 50 + b"X: a"]),
    ("400!", 0, "9112 5 no colon, 5.1 space before it, 5.2 folded", FIELD, [
        b"Xa|Xa\r\nContent-Length: 9|X : a|X\t: a|Content-Length : 5|Transfer-Encoding : chunked|X: a\r\n b",
        b"X: a\r\n |X: a\r\n\tb|Transfer-Encoding:\r\n chunked"]),
    ("400!", 0, "9110 5.1 bad field name", FIELD % b"%s: 1", [
        b'|X y|X\0y|X\x7fy|(y)|X@y|X"y|X/y|X[y]|X,y|X;y|X=y|X?y|X\\y|{y}|X\xe9|X\xc2\xa0']),
    ("400!", 0, "9112 3.2 Host missing or twice", ANY, [
        b"POST /id/p HTTP/1.1\r\n\r\n|POST http://x/id/p HTTP/1.1\r\n\r\n|" + OLD % b"Host: x\r\nHost: y\r\n",
        FIELD % b"Host: x", FIELD % b"hOST: y"]),
    ("400!", 0, "9112 3.2 bad", HOST, [b"a b|a/b|a@b|a?b|a#b|a\\b|x:port|x:80:90|[::1|\xff|<a>|http://x"]),
    ("200", 1, "9110 7.2 good Host", HOST, [b"[::1]:8080|127.0.0.1:80|id-pot.example.|x:"]),
    ("200", 1, "9112 3.2 no Host, 9110 10.1.1 expectation on 1.0", OLD, [b"|Expect: 100-continue\r\n"]),
    ("400!", 0, "9110 8.6 bad Content-Length, 9112 6.3 two, 11.2 hiding a request", LENGTH, [
        b'|5 5|5, 5|5\xa0|+5|-1|-0|0x5|0_5|5,6|5;|1e1|5.0|five|"5"|,|\xb2|\xd9\xa3|7\r\nContent-Length: 7',
        b"18446744073709551617|7\r\nContent-Length: 0|0\r\nContent-Length: 32\r\n\r\n" + GOOD, b"9" * 5000]),
    ("413!", 0, "9110 15.5.14 body too long", LENGTH, [
        b"65537|2147483648|70000\r\nExpect: 100-continue", b"65537\r\n\r\n" + b"a" * 65533]),
    ("400", 0, "9112 8 body cut off, wrong UTF-8", FORM % b"Content-Length: %s", [
        b"9\r\n\r\ncoun|9|8\r\n\r\ncount=2\xff|10\r\n\r\ncount=2%ff"]),
    ("400!|501!", 0, "9112 6.1 Transfer-Encoding, 6.3 with a length", CHUNKED, [
        b"|gzip, chunked|chunked, gzip|\x0bchunked|identity|xchunked|chunked;q=1|,|\0",
        b"chunked\r\nContent-Length: 5|chunked\r\nContent-Length: 0|identity\r\nTransfer-Encoding: chunked"]),
    ("501!", 0, "9112 6.1 chunked", CHUNKED, [b"chunked|Chunked|\tCHUNKED "]),
    ("400!|501!", 0, "9112 6.1 chunked on 1.0", OLD, [b"Transfer-Encoding: chunked\r\n\r\n0\r\n"]),
    ("415", 0, "9110 15.5.16", FIELD, [b"Content-Type: application/json\r\nContent-Length: 6\r\n\r\n{}"]),
    ("414!", 0, "9110 15.5.15 target too long", TARGET, [b"/id/" + b"p" * 20000, b"/id/p?" + b"p" * 300000]),
    ("431!", 0, "6585 5 fields too long or many", FIELD, [
        b"X: " + b"a" * 99999, b"X" * 99999 + b": a", b"X: a\r\n" * 500 + b"X:", b"X: a\r\n" * 9999 + b"X:"]),
    ("400!|414!|431!", 0, "a line without end", ANY, [b"A" * 300000]),
    ("200", 1, "9112 3.2.2 absolute-form, 9110 4.2.3 in capitals, escapes", TARGET, [
        b"http://x/id/p|HTTP://x/id/p|http://y:80/id/%70?|/%69d/%70|/id/p?%63ount=%31|/id/p?"]),
    ("400!|404", 0, "9110 4.2 absolute-form with no path, no host, user, other scheme", TARGET, [
        b"http://x|http://x?y=/id/p|http:///id/p|http://:8/id/p|http://@/id/p|http://u@x/id/p|ftp://x/id/p"]),
    ("400!", 0, "9112 3.2 not origin-form", TARGET, [b"x:80|/id/p#x|http://x/id/p#x|id/p|?x|\\id\\p"]),
    ("400!|404|405|200|204", 0, "9112 3.2.3, 3.2.4", LINE, [b"CONNECT x:80 HTTP/1.1|OPTIONS * HTTP/1.1"]),
    ("400!", 0, "9112 3.2 byte", TARGET % b"/id/p%s", [b"\0|\1|\t|\v|\r|\x1b|\x7f|\x80|\xe9|\xff"]),
    ("400!|404", 0, "other path", TARGET, [
        b"/id/" + b"p" * 4000, b"*|//id/p|/id/p/|/x/../id/p|/id/p;x|/id/%2570|/id/p%252F|/id/\xc3\xa9"]),
    ("400!|404|400", 0, "wrong or hostile escape", TARGET % b"/id/p%s", [
        b"%zz|%|%7|%-1|%+1|%u0070|%00|%0d%0aX:1|%2e|%20|%ff|%c3%a9|%60|%27|%3Fcount=2|%2F|+"]),
    ("400", 0, "bad count", TARGET % b"/id/p?count=%s", [
        b"0|-1|10001|+1|1.5|1e3|0x2|%20|2%20|1_0|%D9%A3|%EF%BC%92|2&count=3|%00|%zz", b"9" * 5000]),
    ("100,200|200", 2, "9110 10.1.1", FORM + b"count=2", [
        b"Expect: 100-continue\r\nContent-Length: 7|Expect: 100-Continue\r\nContent-Length: 7"]),
    ("417|417!", 0, "9110 15.5.18", FIELD, [b"Expect: a-miracle|Expect: 100-continue, a-miracle"]),
    ("200,200,200", 2, "9112 9.3.2 three in one send", ANY, [GOOD + GOOD.replace(b"POST", b"GET") + GOOD]),
    (",".join(["200"] * 50), 100, "9112 9.3.2 fifty in one send", ANY, [TWO * 50]),
    ("200,400!|200,501!", 1, "9112 9.3.2 good, bad, good", GOOD + FIELD + GOOD, [
        b"Xa|Transfer-Encoding: x|Content-Length: x"]),
    ("200,400!", 2, "9112 6.3 body too long", ANY, [TWO + b"9"]),
    ("404,200|404!", 1, "9112 9.3.2 unknown, good", LINE % b"%s /id/none HTTP/1.1" + GOOD, [b"POST|HEAD"]),
    ("200,200|200!|400!|415,200", 1, "9110 9.3.1 GET with a body, 9.3.2 HEAD, good", ANY, [
        LENGTH.replace(b"POST", b"GET") % b"32" + GOOD + GOOD, LINE % b"HEAD /id/p HTTP/1.1" + GOOD]),
    ("200!", 1, "9112 9.3 HTTP/1.0 closes", OLD + GOOD, [b"|Connection: keep-alive, close\r\n"]),
    ("200!", 1, "9110 7.6.1 closes", FIELD, [
        b"Connection: close|Connection: foo , ,\tClOsE,bar|Connection: x\r\nconnection: close"]),
    ("200,200", 2, "9112 9.3 stays, 2.2 empty line between", ANY, [GOOD + b"\r\n" + GOOD,
        OLD % b"Connection: Keep-Alive\r\n" + GOOD, FIELD % b"Connection: closed, x-close" + GOOD]),
]
HOSTILE_CASES = [pytest.param(template.replace(b"%s", odd), wanted, most, id=f"{name} {number}")
                 for wanted, most, name, template, odds in HOSTILE
                 for number, odd in enumerate(b"|".join(odds).split(b"|"), 1)]


def http_exchange(server, data, half_close=True):
    """All that the server answers to the bytes until it closes the connection; a reset fails the test."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return until_closed(connection)


def until_closed(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


def http_answers(data):
    """The statuses, as "200,400", of the answers that the data is, and the words in those with status 200."""
    statuses, lines = [], []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        status, fields = re.fullmatch(rb"HTTP/1\.1 (\d+) [A-Za-z -]+((?:\r\n[\w-]+: [ -~]*)*)", head).groups()
        length = int((re.search(rb"\r\nContent-Length: (\d+)", fields) or (0, 0))[1])
        body = b"" if data.startswith(b"HTTP/1.1 ") else data[:length]
        assert end and len(body) in (0, length)     # 0: the answer to a HEAD
        if status >= b"400" and body:
            assert re.fullmatch(rb"[ -~]+\n?", body) and b"Content-Type: text/plain; charset=utf-8" in fields
        statuses.append(status.decode())
        lines += body.split() if status == b"200" else []
        data = data[len(body):]
    return ",".join(statuses) or "closed", lines


@pytest.fixture(scope="module")
def http_pot(tmp_path_factory):
    server = Idpot(tmp_path_factory.mktemp("http"))
    server.create("p")
    yield server
    server.stop(signal.SIGKILL)


def current_p(server):
    return int(server.request("GET", "/id/p", timeout=5)[1])


def answered_and_burnt(server, data, half_close=True):
    before = current_p(server)
    return http_answers(http_exchange(server, data, half_close))[0], current_p(server) - before


@pytest.mark.parametrize("data, wanted, most", HOSTILE_CASES)
def test_hostile_bytes_are_answered_or_the_connection_is_closed(http_pot, data, wanted, most):
    answered, burnt = answered_and_burnt(http_pot, data)
    assert answered in wanted.replace("!", "").split("|")
    assert burnt <= most if "|" in wanted else burnt == most
    if data.endswith(b"\r\n\r\n") and f"{answered}!" in wanted.split("|"):
        assert answered_and_burnt(http_pot, data + GOOD, half_close=False) == (answered, burnt)


@pytest.mark.parametrize("data", [GOOD, TWO], ids=["head", "form"])
def test_no_proper_prefix_of_a_request_costs_an_id(http_pot, data):
    before = current_p(http_pot)
    for length in range(len(data)):
        assert http_answers(http_exchange(http_pot, data[:length]))[0] == ("400" if length else "closed")
        with connections(http_pot, 2, data[:length]) as [_, reset]:
            reset.setsockopt(*RESET_AT_CLOSE)
    assert current_p(http_pot) == before


def test_a_body_is_asked_for_with_100_continue_and_then_read(http_pot):
    with connections(http_pot, 1, FORM % b"Expect: 100-continue\r\nContent-Length: 7") as [connection]:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"count=2")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_head_is_answered_as_get_without_the_body(http_pot):
    answer = http_exchange(http_pot, LINE % b"HEAD /id/p HTTP/1.1")
    length = len(str(current_p(http_pot)))
    assert b"\r\nContent-Length: %d\r\n" % length in answer and answer.endswith(b"\r\n\r\n")


def test_long_input_is_parsed_in_linear_time(http_pot):
    for data in (FIELD % (b"X: a" + b" " * 16000 + b"b"), b"\r\n" * 640000 + GOOD):
        before = usage(http_pot)[2]
        http_exchange(http_pot, data)
        assert usage(http_pot)[2] - before < 0.2


FUZZ_BASES = [GOOD, GOOD * 2, TARGET % b"/id/p?count=3", TWO, TARGET % b"http://x/id/%70", TWO + GOOD]
FUZZ_BITS = (b"\r\n |\r\n\r\n|Host: x\r\n|Content-Length: 7\r\n|Transfer-Encoding: chunked\r\n|HTTP/1.0"
             b"|count=|%0d|\0|\t|\v|\r|\n| |%|&|?|#|+|,|-|0|9|:|\xff").split(b"|")


def mutated(random_, data):
    """The bytes with one to four random changes: a piece cut, doubled, replaced or inserted, a bit turned."""
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data) + 1)
        end = at + random_.choice([0, 1, 1, 2, 5, 40])
        data = data[:at] + random_.choice([
            b"", data[at:end] * 2, random_.choice(FUZZ_BITS), random_.choice(FUZZ_BITS) + data[at:end],
            random_.randbytes(2), bytes(byte ^ 1 << at % 8 for byte in data[at:end])]) + data[end:]
    return data


@pytest.mark.parametrize("batch", range(20))
def test_fuzzed_requests_cost_no_more_ids_than_were_answered(http_pot, batch):
    random_ = random.Random(batch)
    requests = [mutated(random_, random_.choice(FUZZ_BASES)) for _ in range(100)]
    before = current_p(http_pot)
    with ThreadPoolExecutor(8) as pool:
        answers = [*map(http_answers, pool.map(lambda data: http_exchange(http_pot, data), requests))]
    issued = [id for _, ids in answers for id in ids]
    assert len(set(issued)) == len(issued) == current_p(http_pot) - before
    assert not re.search("50[034]", str([statuses for statuses, _ in answers])) and "Traceback" not in http_pot.errors()


# ---------------------------------------------------------------- load

RESET_AT_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
ACCESS_LINE = re.compile(
    r'127\.0\.0\.1 - - \[[^]]+\] "((?:[^"\\]|\\.)*)" (\d{3}) (?:\d+|-) "(?:[^"\\]|\\.)*" "((?:[^"\\]|\\.)*)"')


def access_lines(server):
    """(request line, status, user agent) of each access line on the server's stderr."""
    return [found.groups() for found in map(ACCESS_LINE.fullmatch, server.errors().splitlines()) if found]


def usage(server):
    """(resident MiB, threads, CPU seconds, open files) of the server's process."""
    proc = f"/proc/{server.process.pid}/"
    with open(proc + "status") as status, open(proc + "stat") as stat:
        memory, threads = re.findall(r"(?:VmRSS|Threads):\s+(\d+)", status.read())
        cpu = sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return int(memory) / 1024, int(threads), cpu, len(os.listdir(proc + "fd"))


@pytest.fixture
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 7000:
        pytest.skip(f"the hard limit of open files is {hard}: 7,000 are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 7000), hard))


@contextlib.contextmanager
def well_served(server):
    """All along, a client asks for an ID every 50 ms, and gets each within two seconds."""
    def ask():
        while not over.wait(0.05):
            assert server.request("POST", "/id/p", timeout=2)[0] == 200

    over = threading.Event()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as end:
        client = pool.submit(ask)
        end.callback(over.set)
        yield
    client.result()


@contextlib.contextmanager
def connections(server, count, data=b""):
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20)))
            opened[-1].sendall(data)
        yield opened


@pytest.mark.slow
def test_900_stalled_requests_a_slow_sender_slow_readers_and_resets_at_once(run):
    server = run("[Server]\nRequestTimeout = 2\n")
    server.create("p")
    before = usage(server)
    with well_served(server), connections(server, 900, GOOD[:-3]) as stalled, \
            connections(server, 1) as [slow], connections(server, 5) as readers:
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            reader.sendall(TARGET % b"/id/p?count=10000" * 90)
        for byte in GOOD:
            slow.sendall(bytes([byte]))
            if select.select([slow], [], [], 0.4)[0]:
                break
        assert {http_answers(until_closed(connection))[0] for connection in [slow, *stalled]} == {"408"}
        with connections(server, 500, GOOD[:-1]) as reset:
            for connection in reset:
                connection.setsockopt(*RESET_AT_CLOSE)
        wait_until(lambda: usage(server)[3] <= before[3] + 1)
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            *whole, _ = until_closed(reader).split(b"HTTP/1.1 200 OK\r\n")[1:]
            assert {len(answer.partition(b"\r\n\r\n")[2].split()) for answer in whole} == {10000}
    wait_until(lambda: usage(server)[1] <= before[1] + 2 and usage(server)[0] < before[0] + 40, 20)
    assert server.stop() == 0 and "Traceback" not in server.errors()
    assert [status for _, status, _ in access_lines(server)].count("408") == 901


def test_a_request_that_came_in_time_is_served_however_late_it_is_read(run):
    server = run("[Server]\nRequestTimeout = 0.2")
    server.create("p")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST /id/p HTTP/1.1\r\nHost: x\r\n")
        assert client.recv(9999).startswith(b"HTTP/1.1 404 ") and server.next("p") == 1     # it has read half of the next
        server.process.send_signal(signal.SIGSTOP)
        read = time.monotonic()
        client.sendall(b"\r\n")
        wait_until(lambda: time.monotonic() > read + 0.3)
        server.process.send_signal(signal.SIGCONT)
        assert client.recv(9999).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_5000_idle_connections_are_kept_without_a_thread_each(run, many_descriptors):
    server = run("[Server]\nMaxConnections = 6000\n")
    server.create("p")
    before = usage(server)
    with well_served(server), connections(server, 5000, LINE % b"GET /pot/p HTTP/1.1") as idle:
        assert {connection.recv(1000)[:13] for connection in idle} == {b"HTTP/1.1 204 "}
        memory, threads, *_ = usage(server)
        assert memory < before[0] + 80 and threads < 2000
        for connection in idle:
            connection.sendall(GOOD)
        assert {connection.recv(1000)[:13] for connection in idle} == {b"HTTP/1.1 200 "}
    wait_until(lambda: usage(server)[3] <= before[3])
    assert "Traceback" not in server.errors()


def test_at_max_connections_long_idle_ones_are_closed(run, many_descriptors):
    server = run()
    server.create("p")
    with well_served(server), connections(server, 1500, GOOD) as idle:
        assert {connection.recv(1000)[:13] for connection in idle} == {b"HTTP/1.1 200 "}
        ends = select.poll()
        for connection in idle:
            ends.register(connection, select.POLLIN)
        closed = {number for number, _ in ends.poll(0)}
        assert 476 <= len(closed) < 490 and closed < {connection.fileno() for connection in idle[:1024]}


def test_2000_short_connections_in_a_row_and_ab_with_200_at_once(run):
    server = run()
    server.create("p")
    for number in range(1, 2001):
        answer = http_exchange(server, FIELD % b"Connection: close", half_close=False)
        assert answer.endswith(b"\r\n\r\n%d" % number)
    ab = subprocess.run(["ab", "-qlc200", "-n5000", "-mPOST", f"http://127.0.0.1:{server.port}/id/p"],
                        capture_output=True, text=True, timeout=60).stdout
    assert re.findall(r"(?:Complete|Failed|Non-2xx).*:\s+(\d+)", ab) == ["5000", "0"]
    assert current_p(server) == 7000
    assert server.stop() == 0 and len(access_lines(server)) == 7002
    assert "Traceback" not in server.errors()


def test_at_the_limit_newcomers_wait_and_no_busy_client_is_cut_off(run):
    server = run("[Server]\nMaxConnections = 8\n")
    server.create("p")
    with ThreadPoolExecutor(30) as pool:
        answers = [*pool.map(lambda _: http_answers(http_exchange(server, GOOD * 100)), range(30))]
    assert {statuses for statuses, _ in answers} == {",".join(["200"] * 100)}
    assert sorted(int(id) for _, ids in answers for id in ids) == list(range(1, 3001))
    assert all(ids == sorted(ids, key=int) for _, ids in answers)


def test_out_of_descriptors_it_waits_without_spinning_and_then_serves_again(run):
    server = run()
    server.create("p")
    server.stop()
    server.command[:0] = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"]
    server.start()
    with connections(server, 200, GOOD[:-1]):
        assert current_p(server) == 0       # the silent ones made room
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, 64))
    with connections(server, 1, GOOD) as [waiting]:
        before = usage(server)[2]
        assert select.select([waiting], [], [], 1) == ([], [], [])
        assert usage(server)[2] - before < 0.2
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in server.errors()


TOKEN_REQUESTS = [("POST", "/id/p", None), ("GET", "/pot", None),
                  ("POST", "/pot/create", "name=p"), ("POST", "/pot/raise", "name=p&min=5")]
WRONG_TOKENS = ["", "Bearer", "sesame", "Basic sesame", "Bearer sesam", "Bearer sesamee", "Bearer SESAME",
                "Bearer x sesame", "Bearer sesam\xe9", "Bearer sesame sesame"]


@pytest.mark.parametrize("config, wrong, right", [
    ("Token = sesame", [401] * 4, dict.fromkeys(["Bearer sesame", "bearer  sesame"], [200, 200, 409, 200])),
    ("Token = sesame\nAdminToken = shibboleth", [401] * 4, {
        "Bearer sesame": [200, 200, 401, 401], "Bearer shibboleth": [401, 401, 409, 200]}),
    ("AdminToken = shibboleth", [200, 200, 401, 401], {"Bearer shibboleth": [200, 200, 409, 200]})])
def test_tokens_are_asked_for_and_told_to_nobody(run, config, wrong, right):
    server = run("[Server]\n" + config)
    told = server.request(*TOKEN_REQUESTS[2], {"Authorization": f"Bearer {config.split()[-1]}"})[1]
    for authorization, statuses in {**dict.fromkeys(WRONG_TOKENS, wrong), **right}.items():
        for request, status in zip(TOKEN_REQUESTS, statuses):
            got, text, answered = server.request(*request, {"Authorization": authorization})
            assert (got, answered["WWW-Authenticate"]) == (status, "Bearer" if status == 401 else None)
            told += text
    with open(f"/proc/{server.process.pid}/cmdline") as file:
        told += file.read()
    assert server.stop() == 0
    assert not re.search("sesam|shibb", told + server.errors(), re.IGNORECASE)


@pytest.mark.parametrize("listen, mode, config, warnings", [
    ("0.0.0.0:0", 0o600, "", ["anybody"]),
    ("0.0.0.0:0", 0o600, "[Server]\nToken = sesame\n", []),
    ("127.0.0.1:0", 0o644, "[Server]\nTimeout = 5\n", []),
    ("127.0.0.1:0", 0o604, "[Server]\nAdminToken = sesame\n", ["everybody"]),
    ("127.0.0.1:0", 0o644, "[Mysql]\nPort = {port}\nUsername = reader\nPassword = sesame\n", ["everybody"])])
def test_what_others_can_reach_or_read_is_warned_of_once(run, request, listen, mode, config, warnings):
    if "{port}" in config:
        database = request.getfixturevalue("database")
        database.sql("GRANT ALL ON idpot.* TO reader IDENTIFIED BY 'sesame'")
        config = config.format(port=database.port)
    server = run(config, listen=listen)
    server.stop()
    os.truncate(server.stderr, 0)
    os.chmod(f"{server.folder}/idpot.cfg", mode)
    server.start()
    assert re.findall(r"WARNING .*(anybody|everybody)", server.errors()) == warnings
    assert "sesame" not in server.errors()


def test_every_answer_costs_one_log_line_and_nothing_from_a_request_reaches_it_raw(run):
    server, answered = run(), []
    server.create("p")
    for data in (*[case.values[0] for case in HOSTILE_CASES], b"\x00\x1b]0;x\x07\x9b\x7f\"\\\n\n",
                 LINE % b'GET /"\\\x1b[31m\x07\xff\x85 HTTP/1.1', TARGET % b"/id/%0d%0aevil%1b",
                 FORM.replace(b"/id/p", b"/pot/create") % b"Content-Length: 19" + b"name=a%0d%0a%1b%22+",
                 FIELD % b'Referer: q" "200" \\', FIELD % b'User-Agent: q" \\ \xe9\xc2\x85\t\xff'):
        answered += http_answers(http_exchange(server, data))[0].split(",")
    assert server.stop() == 0
    with open(server.stderr, "rb") as file:
        assert re.fullmatch(rb"[ -~\n]*", file.read())
    logged = access_lines(server)
    assert len(logged) == 1 + sum(status not in ("100", "closed") for status in answered)
    assert logged[-1] == ("POST /id/p HTTP/1.1", "200", r'q\" \\ \xe9\xc2\x85\x09\xff')
    assert "Traceback" not in server.errors()


# ------------------------------------------------------------- faults: recorded histories and their checker

PATIENCE = 2    # seconds: idpot's Timeout in these tests
# What one client saw of one request; the times are time.monotonic().
Answer = collections.namedtuple("Answer", "start end first last status client", defaults=(0, 0, 200, 0))


def check_history(history):
    """Returns the violations as (kind, earlier answer, later answer), in O(n log n).

    "repeat": an ID stands in both. "order": the later began after the earlier ended, and has a smaller ID.
    """
    answers, violations, widest = [answer for answer in history if answer.status == 200], [], Answer(0, 0)
    for answer in sorted(answers, key=lambda answer: (answer.first, answer.start)):
        if answer.first <= widest.last:
            violations.append(("repeat", widest, answer))
        widest = max(widest, answer, key=lambda answer: answer.last)
    ended, greatest = sorted(answers, key=lambda answer: -answer.end), Answer(0, 0)
    for answer in sorted(answers):
        while ended and ended[-1].end < answer.start:
            greatest = max(greatest, ended.pop(), key=lambda answer: answer.last)
        if answer.first < greatest.last:
            violations.append(("order", greatest, answer))
    return violations


CLEAN_RUN = [Answer(n, n + 3.5, 10 * n, 10 * n + n % 10) for n in range(1, 1001)]
NINE, TENTH, PLANTED = Answer(0, 9, 1, 9), Answer(1, 9, 10, 10), Answer(500, 501, 20, 20)


@pytest.mark.parametrize("history, violations", [
    (CLEAN_RUN + [Answer(500, 501, 20, 20, 503)], []),
    ([Answer(0, 2, 2, 2), Answer(1, 3, 1, 1)], []),
    ([NINE, TENTH, TENTH], [("repeat", TENTH, TENTH)]),
    ([NINE, TENTH, Answer(2, 9, 9, 12)],
     [("repeat", NINE, Answer(2, 9, 9, 12)), ("repeat", Answer(2, 9, 9, 12), TENTH)]),
    ([NINE, Answer(1, 9, 2, 3), Answer(2, 9, 8, 8)],
     [("repeat", NINE, Answer(1, 9, 2, 3)), ("repeat", NINE, Answer(2, 9, 8, 8))]),
    ([Answer(0, 1, 7, 8), Answer(0, 5, 9, 9), Answer(2, 3, 5, 5), Answer(4, 5, 6, 6)],
     [("order", Answer(0, 1, 7, 8), Answer(2, 3, 5, 5)), ("order", Answer(0, 1, 7, 8), Answer(4, 5, 6, 6))]),
    (CLEAN_RUN + [PLANTED], [("repeat", CLEAN_RUN[1], PLANTED), ("order", CLEAN_RUN[495], PLANTED)]),
], ids=["clean", "overlapping in time", "duplicate", "overlapping batch", "inside a batch",
        "order inversion", "planted in a long one"])
def test_history_checker(history, violations):
    assert check_history(random.Random(4).sample(history, len(history))) == violations


class Load:
    """A with block in which twelve clients ask for IDs of one pot, each over its own keep-alive connection.

    Client n asks the n-th idpot in turn; client 0 asks for five IDs at once. The status is 200 for a whole
    answer only, "lost" where the connection broke before one, and another text for what must not be.
    """

    def __init__(self, idpots, pot, patience=PATIENCE):
        self.idpots, self.pot, self.patience = idpots, pot, patience
        self.stopping, self.deadline = threading.Event(), time.monotonic() + 120
        self.seen = [[] for _ in range(12)]
        self.threads = [threading.Thread(target=self.client, args=(number,)) for number in range(12)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def client(self, number):
        idpot, connection = self.idpots[number % len(self.idpots)], None
        while not self.stopping.is_set() and time.monotonic() < self.deadline:
            start, ids = time.monotonic(), [0]
            try:
                connection = connection or HTTPConnection("127.0.0.1", idpot.port, timeout=self.patience + 5)
                connection.request("POST", f"/id/{self.pot}" + ("" if number else "?count=5"))
                response = connection.getresponse()
                body, status = response.read().decode(), response.status
                if status == 200:
                    ids = [int(line) for line in body.split()]
                    five = "".join(f"{ids[0] + n}\n" for n in range(5))
                    status = 200 if body == (str(ids[0]) if number else five) else f"not an answer: {body!r}"
            except IncompleteRead as error:
                status = f"half an answer: {error.partial!r}"
            except (OSError, HTTPException) as error:
                connection, status = connection.close(), "hung" if isinstance(error, TimeoutError) else "lost"
            self.seen[number].append(Answer(start, time.monotonic(), ids[0], ids[-1], status, number))
            if status != 200:
                self.stopping.wait(0.02)

    def history(self):
        return sorted(sum(self.seen, []))

    def served(self, since=0.0):
        """Whether each client got IDs after that moment."""
        return all(any(answer.status == 200 and answer.end > since for answer in answers[-50:])
                   for answers in self.seen)

    def refused(self):
        """Whether the last that each client got is a 503."""
        return all(answers and answers[-1].status == 503 for answers in self.seen)

    def issued(self):
        return sum(answer.last - answer.first + 1 for answer in self.history() if answer.status == 200)

    def recover(self):
        """Waits until each client is served, then 200 requests more: within 5 s."""
        since = time.monotonic()
        wait_until(lambda: self.served(since), 20)
        self.recovered = max(min(one.end for one in answers if one.status == 200 and one.end > since)
                             for answers in self.seen)
        wait_until(lambda: sum(answer.start > self.recovered for answer in self.history()) > 200)
        print(f"\n{self.pot}: each client served {self.recovered - since:.1f} s after the fault")
        assert self.recovered - since < 5

    def verdict(self, counter, may_lose=()):
        """Asserts what must hold after faults and the last recovery, and prints the figures."""
        history = self.history()
        statuses = collections.Counter(answer.status for answer in history)
        longest = max(answer.end - answer.start for answer in history)
        print(f"{self.pot}: {self.issued()} IDs, {counter - self.issued()} burned, {dict(statuses)}, "
              f"longest wait {longest:.1f} s")
        assert check_history(history) == []
        assert statuses.keys() <= {200, 503, "lost"}
        assert {answer.client % 2 for answer in history if answer.status == "lost"} <= set(may_lose)
        assert [answer for answer in history if answer.start > self.recovered and answer.status != 200] == []
        assert counter >= max(answer.last for answer in history)
        assert longest < self.patience + 1


# ------------------------------------------------------------------------------- faults: a database server

@pytest.fixture(scope="module", params=["MyISAM", "InnoDB"])
def pair(request, database, tmp_path_factory):
    """Two idpots on one database, kept over all faults: a worker stuck in one is missed in the next."""
    database.sql("CREATE USER IF NOT EXISTS clerk IDENTIFIED BY 'p'")   # read_only does not bind root
    database.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO clerk")
    config = (f"[Server]\nTimeout = {PATIENCE}\nLogFile = access.log\n[Mysql]\nEngine = {request.param}\n"
              f"ConnectString = {database.dsn().replace('root', 'clerk:p')}\n")
    idpots = [Idpot(tmp_path_factory.mktemp("idpot"), config) for _ in range(2)]
    idpots[0].engine = request.param
    idpots[0].create(f"other_{request.param}")
    yield idpots
    for one in idpots:
        one.stop(signal.SIGKILL)


def outage(begin, end):
    """A fault of the database that lasts until every client was refused."""
    def fault(database, load):
        begin(database)
        try:
            wait_until(load.refused)
        finally:
            end(database)
    return fault


def kill_connections(root):
    """Kills the connections of the idpots one by one; returns how many there were."""
    cursor = root.cursor()
    cursor.execute("SELECT id FROM information_schema.processlist WHERE user = 'clerk' AND db = 'idpot'")
    numbers = cursor.fetchall()
    for number, in numbers:
        with contextlib.suppress(Exception):    # it ended by itself
            cursor.execute(f"KILL {number}")
    return len(numbers)


def connections_killed(database, load):
    with contextlib.closing(database.connect()) as root:
        for _ in range(5):
            wait_until(lambda: kill_connections(root))
            load.recover()


def connections_used_up(database, load):
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(contextlib.closing(database.connect()))
        stack.callback(root.cursor().execute, "SET GLOBAL max_connections = 151")
        for _ in range(12):
            stack.enter_context(contextlib.closing(database.connect(user="clerk", password="p")))
        root.cursor().execute("SET GLOBAL max_connections = 10")
        kill_connections(root)
        wait_until(load.refused)


def lock_held(*statements):
    """A fault: another session holds a lock until every client was refused; another pot is served."""
    def fault(database, load):
        def refused():
            for server in load.idpots:
                start = time.monotonic()
                server.next(f"other_{load.idpots[0].engine}")
                assert time.monotonic() - start < 1
            return load.refused()

        with contextlib.closing(database.connect(database="idpot")) as session:
            for statement in statements:
                session.cursor(buffered=True).execute(statement.format(load.pot))
            wait_until(refused)
    return fault


def idpot_ended(number, code):
    """A fault: the first idpot gets a signal, ends in time with that exit code, and is started again."""
    def fault(database, load):
        start = time.monotonic()
        assert load.idpots[0].stop(number) == code
        assert time.monotonic() - start < PATIENCE + 1
        load.idpots[0].start()
    return fault


FAULTS = {
    "database_killed": outage(lambda db: db.signal(signal.SIGKILL), Database.start),
    "database_restarted": lambda db, load: (db.signal(signal.SIGTERM), db.start()),
    "database_hung": outage(lambda db: db.signal(signal.SIGSTOP), lambda db: db.signal(signal.SIGCONT)),
    "database_read_only": outage(lambda db: db.sql("SET GLOBAL read_only = 1"),
                                 lambda db: db.sql("SET GLOBAL read_only = 0")),
    "connections_killed": connections_killed,
    "connections_used_up": connections_used_up,
    "table_locked": lock_held("LOCK TABLES `pot_{}` WRITE"),
    "row_locked": lock_held("BEGIN", "SELECT id FROM `pot_{}` FOR UPDATE"),
    "idpot_killed": idpot_ended(signal.SIGKILL, -signal.SIGKILL),
    "idpot_stopped": idpot_ended(signal.SIGTERM, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_under_load(fault, pair, database):
    if (fault, pair[0].engine) == ("row_locked", "MyISAM"):
        pytest.skip("MyISAM has no row locks")
    pot = f"{fault}_{pair[0].engine}"
    pair[0].create(pot)
    with Load(pair, pot) as load:
        wait_until(lambda: load.served() and load.issued() > 500)
        FAULTS[fault](database, load)
        load.recover()
    counter = database.sql(f"SELECT id FROM `pot_{pot}`", database="idpot")[0][0]
    load.verdict(counter, may_lose=[0] if "idpot" in fault else [])
    # At SIGTERM whatever was taken from the pot is answered; SIGKILL costs what six clients had in flight.
    assert counter - load.issued() <= {"idpot_stopped": 0, "idpot_killed": 10}.get(fault, counter)
    assert [idpot.request("GET", "/healthz")[0] for idpot in pair] == [200, 200]


@pytest.mark.parametrize("statements", [
    ["UPDATE `pot_{0}` SET id = 3"],
    ["CREATE TABLE `backup_{0}` LIKE `pot_{0}`", "INSERT INTO `backup_{0}` VALUES (3)",
     "RENAME TABLE `pot_{0}` TO `gone_{0}`, `backup_{0}` TO `pot_{0}`"]], ids=["by_hand", "from_a_backup"])
def test_counter_set_back_while_serving(statements, pair, database):
    pot, idpot = f"back_{len(statements)}_{pair[0].engine}", pair[1]
    idpot.create(pot)
    with Load([idpot], pot) as load:
        wait_until(lambda: load.issued() > 300)
        for statement in statements:
            database.sql(statement.format(pot), database="idpot")
        load.recover()
    load.verdict(idpot.next(pot) - 1)
    assert len(re.findall(rf" WARNING the counter of pot {pot} was set back to 3\b", idpot.errors())) == 1


def test_requests_without_an_answer_cost_no_id(pair, database):
    pot, idpot = f"late_{pair[0].engine}", pair[0]
    idpot.create(pot)
    first = idpot.next(pot)
    hanging = f"SELECT 1 FROM information_schema.processlist WHERE state LIKE 'Wait%' AND info LIKE '%{pot}%'"
    with contextlib.closing(database.connect(database="idpot")) as session:
        session.cursor().execute(f"LOCK TABLES `pot_{pot}` WRITE")
        clients = [HTTPConnection("127.0.0.1", idpot.port, timeout=PATIENCE + 5) for _ in range(20)]
        for client in clients:
            client.request("POST", f"/id/{pot}")
        wait_until(lambda: database.sql(hanging))
        for client in clients[10:]:
            client.close()
        assert [client.getresponse().status for client in clients[:10]] == [503] * 10
        wait_until(lambda: not database.sql(hanging), PATIENCE)
    assert idpot.next(pot) == first + 1


# -------------------------------------------------------------------------------------------- faults: SQLite

ON_FILE = f"[Server]\nTimeout = {PATIENCE}\nLogFile = access.log\n[Sqlite]\nFile = {{}}/ids.db\n"


@pytest.fixture
def small_disk(tmp_path):
    """A directory that is a file system of 16 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(["mount", "-ttmpfs", "-osize=16m", "tmpfs", path], capture_output=True, text=True)
    if mount.returncode:
        must = os.environ.get("CI") == "true" and os.getuid() == 0
        (pytest.fail if must else pytest.skip)(f"no small file system: {mount.stderr}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_sqlite_killed_under_load(run, tmp_path):
    idpot = run(ON_FILE.format(tmp_path))
    idpot.create("killed")
    with Load([idpot], "killed") as load:
        wait_until(load.served)
        for _ in range(3):
            idpot.stop(signal.SIGKILL)
            idpot.start()
            load.recover()
    counter = idpot.next("killed") - 1
    load.verdict(counter, may_lose=[0, 1])
    assert counter - load.issued() <= 3 * 16    # twelve clients had no more in flight


def test_sqlite_file_refused_to_a_second_idpot(run, tmp_path):
    idpot = run(ON_FILE.format(tmp_path))
    idpot.create("mine")
    with Load([idpot], "mine") as load:
        wait_until(load.served)
        second = run(ON_FILE.format(tmp_path), wait=False)
        assert second.process.wait(10) == 1
        load.recover()
    assert second.errors() == f'idpot: SQLite file "{tmp_path}/ids.db": another process uses it\n'
    load.verdict(idpot.next("mine") - 1)
    assert {answer.status for answer in load.history()} == {200}


def test_sqlite_disk_full(small_disk, run):
    idpot = run(ON_FILE.format(small_disk))
    idpot.create("full")
    assert [idpot.next("full") for _ in range(20)] == list(range(1, 21))
    fill = ["dd", "if=/dev/zero", f"of={small_disk}/filler", "bs=64k"]
    assert b"No space left on device" in subprocess.run(fill, stderr=subprocess.PIPE).stderr
    with Load([idpot], "full") as load:
        wait_until(load.refused)
        assert {answer.status for answer in load.history()} == {503}
        assert idpot.request("GET", "/healthz")[0] == 503
        os.remove(small_disk / "filler")
        load.recover()
    load.verdict(idpot.next("full") - 1)
    assert min(answer.first for answer in load.history() if answer.status == 200) > 20


# -------------------------------------------------------------------------------------------- faults: Galera

class GaleraNode(Database):
    """A node of a MariaDB cluster on loopback; node 0 founds it. Ports: three for each node."""
    PROVIDER = "/usr/lib/galera/libgalera_smm.so"

    def __init__(self, number, ports):
        group, transfer, snapshot = (f"127.0.0.1:{port}" for port in ports[number::3])
        members = ",".join(f"127.0.0.1:{port}" for port in ports[:3])
        provider = (f"base_port={ports[number]};gmcast.listen_addr=tcp://{group};ist.recv_addr={transfer};"
                    # The defaults freeze the survivors for six seconds when a node dies.
                    "evs.keepalive_period=PT0.3S;evs.suspect_timeout=PT1S;evs.inactive_timeout=PT3S;"
                    "evs.inactive_check_period=PT0.3S;pc.recovery=false;gcache.size=16M")
        options = ["--wsrep-on=ON", f"--wsrep-provider={self.PROVIDER}", "--wsrep-cluster-name=idpot",
                   f"--wsrep-cluster-address=gcomm://{members}", f"--wsrep-node-address={group}",
                   f"--wsrep-node-name=n{number}", f"--wsrep-provider-options={provider}",
                   "--wsrep-sst-method=rsync", f"--wsrep-sst-receive-address={snapshot}",
                   "--innodb-autoinc-lock-mode=2", "--binlog-format=ROW", "--default-storage-engine=InnoDB"]
        super().__init__(*options, *([] if number else ["--wsrep-new-cluster"]))
        self.options = options

    def answers(self):
        return super().answers() and self.sql("SHOW STATUS LIKE 'wsrep_ready'") == [("wsrep_ready", "ON")]

    def writes(self):
        """Whether the cluster takes a write here; it hangs while a node that does not answer belongs to it."""
        with contextlib.suppress(Exception):
            return self.sql("CREATE OR REPLACE TABLE idpot.probe (id INT PRIMARY KEY)") == []


@pytest.fixture(scope="module")
def galera():
    for program in "mariadbd", "rsync", GaleraNode.PROVIDER:
        if not shutil.which(program) and not os.path.exists(program):
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
                f"{program} is missing: apt-get install mariadb-server galera-4 rsync")
    with contextlib.ExitStack() as stack:
        ports, nodes = [free_port() for _ in range(9)], []
        for number in range(3):
            nodes.append(GaleraNode(number, ports))
            stack.callback(nodes[-1].remove)
        yield nodes


def on_cluster(nodes, engine="InnoDB"):
    addresses = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return (f"[Server]\nTimeout = 4\nLogFile = access.log\n"
            f"[Mysql]\nEngine = {engine}\nConnectString = root@tcp({addresses})/idpot\n")


@pytest.mark.slow
def test_galera_refuses_myisam(galera, run):
    idpot = run(on_cluster(galera, "MyISAM"), wait=False)
    assert idpot.process.wait(10) == 78
    assert idpot.errors() == "idpot: Engine: a Galera node replicates InnoDB only, not MyISAM\n"
    galera[0].sql("CREATE TABLE idpot.pot_aria (id BIGINT UNSIGNED NOT NULL) ENGINE=Aria")
    idpot = run(on_cluster(galera), wait=False)
    assert idpot.process.wait(10) == 78
    assert idpot.errors() == "idpot: table pot_aria: a Galera node replicates InnoDB only, not Aria\n"
    galera[0].sql("DROP TABLE idpot.pot_aria")
    galera[0].sql("SET GLOBAL wsrep_on = OFF")
    try:
        idpot = run(f"[Mysql]\nConnectString = {galera[0].dsn()}\n")
    finally:
        galera[0].sql("SET GLOBAL wsrep_on = ON")
    assert idpot.request("POST", "/pot/create", "name=myisam")[:2] == (
        503, "a Galera node replicates InnoDB only, not MyISAM\n")


@pytest.mark.slow
def test_galera_donor_death_hang_and_lost_quorum(galera, run):
    """Two idpots prefer different nodes; one donates, one dies and joins again, one hangs; then two die."""
    a, b, c = galera
    idpots = [run(on_cluster([a, b, c])), run(on_cluster([b, c, a]))]
    for pot in "cluster", "minority":
        idpots[0].create(pot)
    with Load(idpots, "cluster", 4) as load:
        wait_until(lambda: load.served() and load.issued() > 300)
        with contextlib.closing(b.connect()) as donor:      # what a state transfer does to its donor
            for statement in "SET GLOBAL wsrep_desync = ON", "FLUSH TABLES WITH READ LOCK":
                donor.cursor().execute(statement)
            load.recover()
        b.sql("SET GLOBAL wsrep_desync = OFF")
        a.signal(signal.SIGKILL)
        load.recover()
        a.start()
        load.recover()
        b.signal(signal.SIGSTOP)
        wait_until(c.writes, 20)        # how long the others wait for it is Galera's time, not idpot's
        load.recover()
        b.signal(signal.SIGCONT)
    load.verdict(c.sql("SELECT id FROM pot_cluster", database="idpot")[0][0])
    with Load(idpots, "minority", 4) as load:
        wait_until(lambda: load.served() and load.issued() > 300)
        for node in b, c:
            node.signal(signal.SIGKILL)
        wait_until(load.refused, 20)
        since = time.monotonic()
        wait_until(lambda: sum(answer.start > since for answer in load.history()) >= 12, 20)
        assert {answer.status for answer in load.history() if answer.start > since} == {503}
        a.sql("SET GLOBAL wsrep_provider_pc_bootstrap = ON")    # the operator's word that the others are dead
        load.recover()
    load.verdict(a.sql("SELECT id FROM pot_minority", database="idpot")[0][0])


# ---------------------------------------------------------------- on a host: workers, systemd, logs, client

class Asking:
    """A with block that asks each client again and again; `ids` has a list for each, `failed` the errors."""

    def __init__(self, *clients):
        self.ids, self.failed, self.going = [[] for _ in clients], [], True
        self.pool = ThreadPoolExecutor(len(clients))
        self.pool.map(self.ask, clients, self.ids)

    def ask(self, client, ids):
        while self.going:
            try:
                ids.append(client())
            except Exception as error:
                self.failed.append(error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.going = False
        self.pool.shutdown()

    def more(self, count=100):
        wanted = [len(ids) + count for ids in self.ids]
        wait_until(lambda: all(len(ids) >= least for ids, least in zip(self.ids, wanted)), 30)

    def issued(self):
        """How many IDs were given: unique, increasing for each client, and none was asked for in vain."""
        assert self.failed == [] and all(ids == sorted(ids) for ids in self.ids)
        assert len(set(sum(self.ids, []))) == len(sum(self.ids, []))
        return len(sum(self.ids, []))


def kept(port, **headers):
    """A client on one connection; with Connection="close" it opens one for each request."""
    client = HTTPConnection("127.0.0.1", port, timeout=20)
    return lambda: (client.request("POST", "/id/p", headers=headers), int(client.getresponse().read()))[1]


def mixed(port):
    return Asking(*(kept(port) for _ in range(3)), *(kept(port, Connection="close") for _ in range(3)))


@pytest.fixture
def mysql(database):
    """mysql(lines of [Server]) is the config for a new database, of a user with the least privileges."""
    for statement in """DROP DATABASE IF EXISTS host; CREATE DATABASE host; DROP USER IF EXISTS least@'%';
            CREATE USER least@'%' IDENTIFIED BY 'secret';
            GRANT SELECT, UPDATE, CREATE, INSERT ON host.* TO least@'%'""".split(";"):
        database.sql(statement)
    return lambda lines="": (f"[Server]\n{lines}\n[Mysql]\nPort = {database.port}\nUsername = least\n"
                             "Password = secret\nDbname = host")


def workers_of(server, count):
    """The pids of a server's workers, once there are so many."""
    path = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    return wait_until(lambda: len(pids := open(path).read().split()) == count and [int(pid) for pid in pids])


def gone(pids):
    return not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)


def refused(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def metrics(server):
    """{series of /metrics: value}"""
    text = server.request("GET", "/metrics")[1]
    return {name: float(value) for name, value in re.findall("^([^#].*) (.*)$", text, re.M)}


@contextlib.contextmanager
def hosted(folder, *wrapper, config="", **options):
    """Runs idpot by the wrapper till SIGTERM ends it with 0; yields the process and what reads its stderr."""
    (folder / "idpot.cfg").write_text(config)
    with open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen([*wrapper, sys.executable, f"{HERE}/idpot.py", "--config=idpot.cfg"],
                                   cwd=folder, stderr=stderr, **options)
    try:
        yield process, (folder / "stderr").read_text
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(20)


def needs(program):
    """The program's path; without it the test is skipped, and fails under CI=true."""
    missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    return shutil.which(program) or missing(f"{program} is not installed")


@pytest.mark.parametrize("workers, end, code", [(2, signal.SIGTERM, 0), (3, signal.SIGKILL, -9)])
def test_workers_share_the_work_a_killed_one_is_replaced_and_all_end(workers, end, code, mysql, run):
    server = run(mysql(f"Workers = {workers}"))
    server.create("p")
    before, url = workers_of(server, workers), f"http://127.0.0.1:{server.port}"
    with Asking(*(functools.partial(idpot.Client(url).next, "p") for _ in range(5))) as load:
        load.more()
        os.kill(before[0], signal.SIGKILL)
        now = wait_until(lambda: before[0] not in (pids := workers_of(server, workers)) and pids)
        load.more()
    assert load.issued() >= 1000 and set(before) - set(now) == {before[0]}
    assert re.findall(r"ERROR (.*)\n", server.errors()) == [
        f"worker 0 (pid {before[0]}) has ended; it is replaced in 0.2 s"]
    assert server.stop(end) == code
    wait_until(lambda: gone(now) and refused(server.port), 5)


def test_workers_share_the_connections(mysql, run):
    server = run(mysql("Workers = 2"))
    server.create("p")
    files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in workers_of(server, 2)]
    with connections(server, 40, GOOD) as clients:
        assert [client.recv(9999)[:12] for client in clients] == [b"HTTP/1.1 200"] * 40
        shares = [len(os.listdir(f"/proc/{pid}/fd")) - before
                  for pid, before in zip(workers_of(server, 2), files)]
        assert min(shares) >= 12, shares


def test_a_health_check_is_not_misled_by_a_connection_that_was_lost_unused(mysql, run, database):
    server = run(mysql())
    for _ in range(3):
        assert server.request("GET", "/healthz")[:2] == (200, "ok")
        for (pid,) in database.sql("SELECT id FROM information_schema.processlist WHERE user = 'least'"):
            with contextlib.suppress(Exception):    # it ended by itself
                database.sql(f"KILL {pid}")


def test_metrics_are_sums_over_the_workers_go_up_and_please_promtool(mysql, run, database):
    server, last = run(mysql("Workers = 3")), {}
    server.create("p")
    with mixed(server.port) as load:
        load.more()
    issued = load.issued() + sum(len(server.next("p", 100)) for _ in range(20))
    route = 'idpot_http_requests_total{route="%s",method="%s",code="200"}'
    for number in range(7):     # whichever worker answers
        found = metrics(server)
        assert found["idpot_ids_issued_total"] == issued
        assert found.get(route % ("/metrics", "GET"), 0) == number
        assert found[route % ("/id/{pot}", "POST")] == load.issued() + 20
        assert all(found[name] >= value for name, value in last.items() if "_total" in name)
        last = found
    assert load.issued() + 20 >= last["idpot_db_statements_total"] > 20
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    wait_until(lambda: metrics(server)["idpot_connections"] == 1 + len(clients))
    for (pid,) in database.sql("SELECT id FROM information_schema.processlist WHERE user = 'least'"):
        database.sql(f"KILL {pid}")
    assert server.next("p") > issued and metrics(server)['idpot_db_errors_total{errno="2013"}'] >= 1
    status, text, headers = server.request("GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert subprocess.run([needs("promtool"), "check", "metrics"], input=text, text=True, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout == ""


def test_a_counter_set_back_while_another_worker_has_an_id_in_flight_repeats_none(mysql, run, database):
    server = run(mysql("Workers = 2"))
    server.create("p")
    worker, clients = workers_of(server, 2)[0], [HTTPConnection("127.0.0.1", server.port, timeout=20) for _ in range(20)]
    for client in clients:
        client.request("POST", "/id/p")
    assert {int(client.getresponse().read()) for client in clients} == set(range(1, 21))
    sockets = {os.readlink(f"/proc/{worker}/fd/{name}") for name in os.listdir(f"/proc/{worker}/fd")}
    ends = {row[2]: f"socket:[{row[9]}]" in sockets for row in map(str.split, open("/proc/net/tcp"))}
    here = {ends[f"0100007F:{client.sock.getsockname()[1]:04X}"]: client for client in clients}
    with contextlib.closing(database.connect(database="host")) as blocker:
        blocker.cmd_query("LOCK TABLES pot_p WRITE")
        here[True].request("POST", "/id/p")
        wait_until(lambda: any("lock" in (row[6] or "") for row in database.sql("SHOW PROCESSLIST")))
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: {open(f"/proc/{worker}/task/{task}/stat").read().rpartition(")")[2][1]     # each thread
                            for task in os.listdir(f"/proc/{worker}/task")} == {"T"})
    wait_until(lambda: database.sql("SELECT id FROM host.pot_p") == [(21,)])    # but the worker does not know
    database.sql("UPDATE host.pot_p SET id = 0")
    here[False].request("POST", "/id/p")
    assert not select.select([here[False].sock], [], [], 0.5)[0]
    os.kill(worker, signal.SIGCONT)
    assert [int(here[mine].getresponse().read()) for mine in (True, False)] == [21, 22]
    assert "the counter of pot p was set back to 0, but 21 was given: it goes on above that" in server.errors()


def test_a_stop_signal_to_each_process_lets_requests_in_flight_be_answered(mysql, run, database):
    server = run(mysql("Workers = 2"))
    server.create("p")
    workers, client = workers_of(server, 2), HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(database.connect(database="host")) as blocker:
        blocker.cmd_query("LOCK TABLES pot_p WRITE")
        client.request("POST", "/id/p")
        wait_until(lambda: any("lock" in (row[6] or "") for row in database.sql("SHOW PROCESSLIST")))
        for pid in [server.process.pid, *workers]:      # as systemd and Ctrl-C do
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: refused(server.port), 5)
    assert client.getresponse().read() == b"1"
    assert server.stop() == 0 and gone(workers)


class NotifySocket(socket.socket):
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, name, **environment):
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bind(name.replace("@", "\0"))
        self.environment = {**os.environ, "NOTIFY_SOCKET": name, **environment}

    def next(self, seconds=10.0):
        """The next datagram; None when none comes in that many seconds."""
        self.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            return self.recv(4096).decode()


@pytest.mark.parametrize("name", ["{}/notify", "@{}/abstract"])
def test_systemd_is_told_of_ready_reload_and_stop_but_not_the_watchdog_unasked(name, run, tmp_path):
    with NotifySocket(name.format(tmp_path)) as told:
        server = run(listen=f"127.0.0.1:{free_port()}", wait=False, environment=told.environment)
        assert told.next() == "READY=1\nSTATUS=SQLite idpot.db"
        server.port = server.address()[1]
        assert server.request("GET", "/healthz")[:2] == (200, "ok")
        before = time.monotonic_ns() // 1000
        server.process.send_signal(signal.SIGHUP)
        reloading = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", told.next())
        assert before < int(reloading[1]) < time.monotonic_ns() // 1000 and told.next() == "READY=1"
        assert told.next(0.5) is None
        assert server.stop() == 0 and told.next() == "STOPPING=1" and told.next(0.01) is None
        unreachable = run("[Mysql]\nPort = 1", wait=False, environment=told.environment)
        assert unreachable.process.wait(10) == 1 and told.next(0.01) is None


@pytest.mark.slow
def test_the_watchdog_is_fed_only_while_every_worker_lives(mysql, run, tmp_path):
    with NotifySocket(f"{tmp_path}/notify", WATCHDOG_USEC="9000000") as told:
        server = run(mysql("Workers = 2"), environment=told.environment)
        assert told.next().startswith("READY=1\n") and told.next() == "WATCHDOG=1"
        worker = workers_of(server, 2)[1]
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: told.next(1) is None)
        os.kill(worker, signal.SIGCONT)
        assert told.next() == "WATCHDOG=1"


HAND_OVER = [sys.executable, "-c", """if True:    # arguments: descriptor, how often to hand it over, command
    import os, sys
    for to in range(int(sys.argv[2])):
        os.dup2(int(sys.argv[1]), 3 + to)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
    os.execv(sys.argv[3], sys.argv[3:])"""]


def test_clients_wait_while_idpot_is_restarted_behind_the_socket_of_systemd(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener, contextlib.ExitStack() as clients:
        fd, port = listener.fileno(), listener.getsockname()[1]
        with hosted(tmp_path, *HAND_OVER, str(fd), "1", pass_fds=[fd]):
            idpot.Client(f"http://127.0.0.1:{port}").create("p")
            load = clients.enter_context(mixed(port))
            load.more()
        with hosted(tmp_path, *HAND_OVER, str(fd), "1", pass_fds=[fd]):
            load.more()
            clients.close()
        assert load.issued() >= 1000
        two = subprocess.run([*HAND_OVER, str(fd), "2", sys.executable, f"{HERE}/idpot.py"], cwd=tmp_path,
                             pass_fds=[fd], capture_output=True)
        assert (two.returncode, two.stderr) == (1, b"idpot: 2 sockets were handed over, but one is served\n")


@pytest.mark.slow
def test_start_server_replaces_idpot_under_load_without_a_failed_request(mysql, tmp_path):
    port = free_port()
    starter = needs("start_server"), "--interval=1", f"--port=127.0.0.1:{port}", "--"
    with hosted(tmp_path, *starter, config=mysql()) as (process, errors):
        wait_until(lambda: "listening on" in errors())
        client = idpot.Client(f"http://127.0.0.1:{port}")
        client.create("p")
        with mixed(port) as load:
            for statuses in (["0"], ["0", "0"]):
                load.more()
                # A signal that comes between start_server's look for one and its wait is lost: then another.
                wait_until(lambda: errors().count("received HUP") == len(statuses) or
                           process.send_signal(signal.SIGHUP), 20, every=3)
                wait_until(lambda: re.findall(r"worker \d+ died, status:(\d+)", errors()) == statuses, 20)
            load.more()
        assert load.issued() == client.next("p") - 1
    unix = socket.socket(socket.AF_UNIX)
    with unix, hosted(tmp_path, *starter[:2], "--path=s", "--") as (_, errors):
        wait_until(lambda: unix.connect_ex(f"{tmp_path}/s") == 0)
        unix.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert unix.recv(9999).endswith(b"\r\n\r\nok")
        wait_until(lambda: re.search(r'^127.0.0.1 - - .*"GET /healthz HTTP/1.0" 200 2 ', errors(), re.M))


def test_logs_are_moved_and_reopened_at_sighup_without_losing_a_line(mysql, run):
    server = run(mysql("Workers = 2\nLogFile = access\nLogLinkName = newest"))
    server.create("p")
    pids, (log, *moved) = workers_of(server, 2), [f"{server.folder}/{name}" for name in ("access", "1", "2")]
    with mixed(server.port) as load:
        for path in moved:
            load.more()
            os.rename(log, path)
            load.more(20)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: os.path.exists(log) and f"-> {path}\n" not in subprocess.run(
                ["ls", "-l", *(f"/proc/{pid}/fd" for pid in pids)], capture_output=True, text=True).stdout)
        load.more()
    assert server.stop() == 0 and os.readlink(f"{server.folder}/newest") == "access"
    lines = [open(path).read().count('"POST /id/p HTTP/1.1" 200 ') for path in (log, *moved)]
    assert min(lines) >= 400 and sum(lines) == load.issued()


def test_health_tells_within_seconds_why_no_id_could_be_issued_and_costs_none(mysql, run, database):
    server, set_ = run(mysql("Timeout = 4")), lambda what: database.sql(f"SET GLOBAL {what}")
    server.create("p", 41)
    for break_it, mend_it, number in [
            (lambda: set_("read_only = 1"), lambda: set_("read_only = 0"), "1290"),
            (lambda: database.signal(signal.SIGSTOP), lambda: database.signal(signal.SIGCONT), "2013"),
            (lambda: database.signal(signal.SIGTERM), database.start, "2013|2003")]:
        wait_until(lambda: server.request("GET", "/healthz")[:2] == (200, "ok"))
        break_it()
        try:
            status, text, _ = server.request("GET", "/healthz", timeout=4)
        finally:
            mend_it()
        assert status == 503 and re.fullmatch(rf"the database cannot serve .* \(error ({number})\)\n", text)
    assert metrics(server)["idpot_ids_issued_total"] == 0 and server.next("p") == 42


CLIENT_ERRORS = [   # what is called, with which token, the error and its text
    ("next", ("p",), "guess", idpot.Unauthorized, "the bearer token is wrong"),
    ("create", ("p",), None, idpot.Unauthorized, "a bearer token is needed"),
    ("create", ("p",), "a", idpot.Exists, 'pot "p" exists'),
    ("raise_to", ("none", 1), "a", idpot.NotFound, 'there is no pot "none"'),
    ("next", ("p?count=5\u00e9",), "t", idpot.NotFound, r'there is nothing at "/id/p?count=5\xe9"'),
    ("next_many", ("p", 10001), "t", idpot.BadRequest, 'count "10001" is not a whole number from 1 to 10000'),
    ("next", ("full",), "t", idpot.Exhausted, 'pot "full" is exhausted: fewer than 1 IDs are left')]


def test_client(run):
    address = f"127.0.0.1:{free_port()}"
    server = run("[Server]\nToken = t\nAdminToken = a\nIdleTimeout = 0.3", listen=address)
    url = f"http://{address}"
    with idpot.Client(url, token="a") as admin, idpot.Client(url + "/", "t", timeout=1) as client:
        assert admin.create("p", min=40) is None and admin.create("full", idpot.MAX_ID) is None
        assert client.exists("p") is True and client.exists("q") is False
        assert (client.next("p"), client.next_many("p", 3), client.current("p")) == (41, range(42, 45), 44)
        assert (admin.raise_to("p", 200), admin.raise_to("p", 5), client.next("p")) == (200, 200, 201)
        for method, arguments, token, error, text in CLIENT_ERRORS:
            with pytest.raises(error, match=f"^{re.escape(text)}$"), idpot.Client(url, token) as other:
                getattr(other, method)(*arguments)
        wait_until(lambda: select.select([client._connection.sock], [], [], 0)[0])      # it was closed
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


@pytest.mark.parametrize("full", [False, True], ids=["directory removed", "disk full"])
def test_a_log_that_cannot_be_written_stops_no_ids_and_is_told_once(full, run, tmp_path):
    (logs := tmp_path / "logs").mkdir()
    if full and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "idpot", logs]).returncode:
        pytest.skip("a full disk needs root, for a tmpfs")
    try:
        server = run(f"[Server]\nLogFile = {logs}/{'access' if full else '%S'}")
        server.create("p")
        with Asking(kept(server.port, Referer="x" * 997)) as load:
            (logs / "ballast").write_bytes(bytes(61440)) if full else shutil.rmtree(logs)
            wait_until(lambda: " ERROR " in server.errors())
            load.more(500)
            (logs / "ballast").unlink() if full else logs.mkdir()
            wait_until(lambda: any(file.stat().st_size > 8192 for file in logs.iterdir()))
        assert load.issued() == server.next("p") - 1 and server.stop() == 0
        assert server.errors().count("the access log cannot be written, its lines are lost: ") == 1
        assert not any("x127.0.0.1" in file.read_text() for file in logs.iterdir())     # half a line and another
    finally:
        subprocess.run(["umount", "-l", logs]) if full else None


@pytest.mark.slow
def test_goaccess_reads_10000_lines_of_hostile_requests(run):
    goaccess, server, choices = needs("goaccess"), run("[Server]\nLogFile = log"), random.Random(6).choices
    hostile = ["\\", '"', '\\"', '" 200 1 "', "\t", "é", "\xff", "%", "'", "<b>", "%00", "[", "-", "\\x00", "名"]
    for _ in range(100):
        data = b""
        for _ in range(99):
            agent, target = "".join(choices(hostile, k=9)), re.sub("[^!-~]|%(?!00)", "~", "".join(choices(hostile, k=9)))
            start, = choices(["GET /id/p?", "POST /id/p?", "HEAD /pot/", "W-$ /pot", "GET /"])
            data += (f"{start}{target} HTTP/1.1\r\nHost: h\r\nUser-Agent: {agent}\r\n"
                     f"Referer: {agent[::-1]}\r\n\r\n").encode()
        server.raw(data + choices([b"\x00\xff\"\\\n", b"GET /\x01 HTTP/1.1\r\n\r\n", b"GET / HTTP/3.0\r\n\r\n"])[0])
    assert server.stop() == 0
    subprocess.run([goaccess, "log", "--log-format=COMBINED", "--no-global-config", "-o", "out.json"],
                   cwd=server.folder, check=True, capture_output=True)
    found = json.load(open(f"{server.folder}/out.json"))["general"]
    assert [found[f"{kind}_requests"] for kind in ("total", "valid", "failed")] == [10000, 10000, 0]


def test_the_units_leave_systemd_nothing_to_say_and_little_exposed():
    units = [f"{HERE}/contrib/idpot.{kind}" for kind in ("service", "socket")]
    assert subprocess.run([needs("systemd-analyze"), "verify", *units], capture_output=True).stderr == b""
    text = subprocess.check_output(["systemd-analyze", "security", "--offline=true", units[0]], text=True)
    assert float(re.search(r"exposure level for idpot.service: ([0-9.]+)", text)[1]) <= 1.5
