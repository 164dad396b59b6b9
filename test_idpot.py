"""Tests of idpot over a real MariaDB (or MySQL) server and SQLite, through real HTTP.

    tox                         # or: python3 -m pytest

The database server is started here, in a temporary directory on a free port, and ended here. Where no
server program is installed its tests are skipped with the reason, except under CI=true: there they fail.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection

import pytest

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
