"""idpot's speed, beside another version of it and beside the limits of the machine.

    python3 contrib/bench.py [--rounds 5] [--seconds 3] [--only 'myisam*,direct'] [--json FILE]
                             [--beside DIRECTORY] [--python PROGRAM]

Starts a MariaDB of its own, with its default settings, and idpot servers over it, drives them with
wrk and ab, and ends them all. All of it is in /var/tmp, not in /tmp: where that is memory, InnoDB
and SQLite look faster than a disk lets them be. The access log is on.

--beside names another checkout, whose idpot.py meets the same cases in the same run:

    git worktree add /var/tmp/idpot-1.0 582e2c9
    python3 contrib/bench.py --beside /var/tmp/idpot-1.0

Each round runs every case once, for this checkout and at once for the other; every second round
runs all of it backwards, so that the machine's drift meets all alike. A figure is the median of the
rounds (max, failed: the worst), a ratio is the median of the rounds' ratios. The direct loop is one
client that does idpot's UPDATE on a connection of its own, without HTTP. --python names another
Python, with mysql-connector-python, for the cases whose names begin with "python".
"""

import argparse
import collections
import contextlib
import fnmatch
import http.client
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))  # the driver may have been installed beside idpot.py
try:
    import mysql.connector
except ImportError:
    sys.exit("bench: mysql-connector-python is missing: README.rst says how to install it")

THIS = "this"
BESIDE = "beside"
PACKAGES = {
    "wrk": "wrk",
    "ab": "apache2-utils",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}


# Programs ---------------------------------------------------------------------------------------

# Below the ephemeral range, so that no outgoing connection takes the port meanwhile.
PORTS = iter(range(21000 + os.getpid() % 5000, 32000))


def free_port():
    """A free TCP port, never one twice."""
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    sys.exit("bench: there is no free port")


def output(*command, timeout=120):
    """What the command writes; where it fails the benchmark ends."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        sys.exit(f"bench: {command[0]} failed:\n{done.stdout}")
    return done.stdout


class Program:
    """A program that runs until the stack ends it."""

    def __init__(self, stack, command, folder, ready):
        """Returns when the program has written the words `ready`."""
        written = folder / "written"
        with open(written, "w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for us: it must not end the database first
            )
        stack.callback(self.stop)
        deadline = time.monotonic() + 60
        while ready not in written.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"bench: {command[0]} does not start:\n{written.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _stat(self):
        """The fields of /proc/PID/stat from the third on, see proc(5)."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        return text.rpartition(")")[2].split()

    def cpu_seconds(self):
        """Processor time used since the start."""
        fields = self._stat()
        user, system = int(fields[11]), int(fields[12])
        return (user + system) / os.sysconf("SC_CLK_TCK")

    def megabytes(self):
        """Memory resident now."""
        pages = int(self._stat()[21])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def settle(self):
        """Waits until the program rests, but at most ten seconds."""
        deadline = time.monotonic() + 10
        used = self.cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(0.3)
            before = used
            used = self.cpu_seconds()
            if used - before < 0.02:
                break


class Mariadb(Program):
    """A new server, with the database `test` and a root who needs no password."""

    def __init__(self, stack, folder):
        folder.mkdir()
        options = ["--no-defaults", f"--datadir={folder}/data"]
        if os.getuid() == 0:
            options.append("--user=mysql")
            shutil.chown(folder, "mysql")
            folder.parent.chmod(0o711)
        output("mariadb-install-db", *options, "--auth-root-authentication-method=normal")
        self.port = free_port()
        options += [
            f"--socket={folder}/socket",
            f"--pid-file={folder}/pid",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
        ]
        super().__init__(stack, ["mariadbd", *options], folder, "ready for connections")


MYISAM = """
[Mysql]
Port = {port}
Dbname = test
Engine = MyISAM
"""
INNODB = MYISAM.replace("MyISAM", "InnoDB")
SQLITE = """
[Sqlite]
File = idpot.db
"""
CROWD = "MaxConnections = 6000" + MYISAM

# Each has an idpot of its own; memory is measured in one that has never had more connections.
SERVERS = {
    "myisam": MYISAM,
    "innodb": INNODB,
    "sqlite": SQLITE,
    "python": MYISAM,
    "idle": CROWD,
    "idle1000": CROWD,
    "idle5000": CROWD,
}


class Idpot(Program):
    """An idpot with the pots PREFIX0, PREFIX1, ..."""

    def __init__(self, stack, folder, command, server, pots, database_port):
        folder.mkdir()
        self.log = folder / "access.log"
        self.prefix = folder.name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = "[Server]\nLogFile = access.log\nIdleTimeout = 600\n" + SERVERS[server]
        (folder / "idpot.cfg").write_text(settings.format(port=database_port))
        command = [*command, "--config=idpot.cfg", f"--listen=127.0.0.1:{self.port}"]
        super().__init__(stack, command, folder, "listening on")
        for number in range(pots):
            status, text = self.post("/pot/create", f"name={self.prefix}{number}")
            if status != 201:
                sys.exit(f"bench: {folder.name}: a pot was answered by {status} {text}")
        status, text = self.post(f"/id/{self.prefix}0?range=2")
        self.knows_range = "\t" in text

    def post(self, target, form=""):
        """The answer's status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", target, form)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def connect(self):
        """A connection that has had one answer and is silent since."""
        connection = socket.create_connection(("127.0.0.1", self.port), 30)
        connection.sendall(b"GET /pot/none HTTP/1.1\r\nHost: bench\r\n\r\n")
        connection.recv(4096)
        return connection


# Loads: each returns the figures of one run, rate per second and times in milliseconds ----------

WRK_SCRIPT = """
local requests = {}

function init(args)
   local path, pots, query = args[1], args[2], args[3] or ""
   for pot = 0, pots - 1 do
      requests[pot + 1] = wrk.format("POST", path .. pot .. query)
   end
end

function request()
   return requests[math.random(#requests)]
end

function done(summary, latency)
   local errors = summary.errors
   local figures = {
      ["rate"] = (summary.requests - errors.status) / summary.duration * 1e6,
      ["p50"] = latency:percentile(50) / 1e3,
      ["p99"] = latency:percentile(99) / 1e3,
      ["p99.9"] = latency:percentile(99.9) / 1e3,
      ["max"] = latency.max / 1e3,
      ["failed"] = errors.status + errors.connect + errors.read + errors.write + errors.timeout,
   }
   for name, value in pairs(figures) do
      print("figure", name, value)
   end
end
"""


def keep_alive(bench, idpot, case):
    """Connections that stay, a random pot for each request."""
    script = bench.folder / "wrk.lua"
    script.write_text(WRK_SCRIPT)
    command = ["wrk", "-t1", f"-c{case.clients}", f"-d{bench.seconds}s", "--timeout=10s"]
    arguments = [f"/id/{idpot.prefix}", str(case.pots), case.query]
    text = output(*command, f"-s{script}", idpot.url, "--", *arguments, timeout=bench.seconds + 60)
    figures = {}
    for name, value in re.findall(r"^figure\t(\S+)\t(\S+)$", text, re.MULTILINE):
        figures[name] = float(value)
    figures["rate"] *= case.ids
    return figures


def new_connections(bench, idpot, case):
    """A new connection for each request."""
    percentiles = bench.folder / "ab.csv"
    url = f"{idpot.url}/id/{idpot.prefix}0"
    # -l: IDs may grow longer; -r: an error of the network is counted and does not end the run
    command = ["ab", "-q", "-l", "-r", "-mPOST", f"-c{case.clients}", f"-t{bench.seconds}"]
    text = output(*command, f"-e{percentiles}", url, timeout=bench.seconds + 60)
    counted = collections.defaultdict(float)
    for name, value in re.findall(r"^([\w -]+): +(\d+\.?\d*)", text, re.MULTILINE):
        counted[name] = float(value)
    failed = counted["Failed requests"] + counted["Non-2xx responses"]
    times = dict(line.split(",") for line in percentiles.read_text().splitlines())
    return {
        "rate": (counted["Complete requests"] - failed) / counted["Time taken for tests"],
        "p50": float(times["50"]),
        "p99": float(times["99"]),
        "max": float(re.search(r"100% +(\d+)", text)[1]),
        "failed": failed,
    }


def silence(bench, idpot, case):
    """No requests at all."""
    time.sleep(bench.seconds)
    return {}


def direct_loop(bench, idpot, case):
    """idpot's UPDATE, on one connection; no idpot is asked."""
    connection = mysql.connector.connect(
        host="127.0.0.1",
        port=bench.mariadb.port,
        user="root",
        database="test",
        collation="utf8mb4_general_ci",
        autocommit=True,
    )
    times = []
    last = 0
    with contextlib.closing(connection):
        connection.cmd_query("CREATE OR REPLACE TABLE direct (id BIGINT UNSIGNED) ENGINE=MyISAM")
        connection.cmd_query("INSERT INTO direct VALUES (0)")
        start = now = time.perf_counter()
        while now < start + bench.seconds:
            before = now
            answer = connection.cmd_query(
                "UPDATE direct SET id = LAST_INSERT_ID(id + 1) "
                f"WHERE id BETWEEN {last} AND 18446744073709551614"
            )
            last = answer["insert_id"]
            now = time.perf_counter()
            times.append((now - before) * 1e3)
    cuts = statistics.quantiles(times, n=1000)
    return {
        "rate": len(times) / (now - start),
        "p50": cuts[499],
        "p99": cuts[989],
        "p99.9": cuts[998],
        "max": max(times),
    }


# Cases ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    title: str
    server: str  # of SERVERS; empty: no idpot is asked
    load: Callable
    clients: int = 1
    silent: int = 0  # connections that are open beside the clients'
    pots: int = 1
    query: str = ""
    ids: int = 1  # that a request asks for


CASES = [
    Case("direct", "direct loop, MyISAM", "", direct_loop),
    Case("myisam-c1", "MyISAM, keep-alive c=1", "myisam", keep_alive, 1),
    Case("myisam-c10", "MyISAM, keep-alive c=10", "myisam", keep_alive, 10),
    Case("myisam-c64", "MyISAM, keep-alive c=64", "myisam", keep_alive, 64),
    Case("myisam-c256", "MyISAM, keep-alive c=256", "myisam", keep_alive, 256),
    Case("myisam-c1000", "MyISAM, keep-alive c=1000", "myisam", keep_alive, 1000),
    Case("innodb-c1", "InnoDB, keep-alive c=1", "innodb", keep_alive, 1),
    Case("innodb-c64", "InnoDB, keep-alive c=64", "innodb", keep_alive, 64),
    Case("innodb-c256", "InnoDB, keep-alive c=256", "innodb", keep_alive, 256),
    Case("sqlite-c1", "SQLite, keep-alive c=1", "sqlite", keep_alive, 1),
    Case("sqlite-c64", "SQLite, keep-alive c=64", "sqlite", keep_alive, 64),
    Case("new-c1", "MyISAM, new connection each c=1", "myisam", new_connections, 1),
    Case("new-c10", "MyISAM, new connection each c=10", "myisam", new_connections, 10),
    Case(
        "count",
        "MyISAM, count=1000 c=8, IDs",
        "myisam",
        keep_alive,
        clients=8,
        query="?count=1000",
        ids=1000,
    ),
    Case(
        "range",
        "MyISAM, range=100000 c=8, IDs",
        "myisam",
        keep_alive,
        clients=8,
        query="?range=100000",
        ids=100000,
    ),
    Case("pots10", "MyISAM, 10 pots, c=64", "myisam", keep_alive, 64, pots=10),
    Case("pots1000", "MyISAM, 1000 pots, c=64", "myisam", keep_alive, 64, pots=1000),
    Case("busy16", "MyISAM, 16 busy alone", "myisam", keep_alive, 16),
    Case("busy16-silent984", "MyISAM, 16 busy, 984 silent", "myisam", keep_alive, 16, silent=984),
    Case("python-c1", "MyISAM, other Python, c=1", "python", keep_alive, 1),
    Case("python-c64", "MyISAM, other Python, c=64", "python", keep_alive, 64),
    Case("python-new-c10", "MyISAM, other Python, new c=10", "python", new_connections, 10),
    Case("idle", "idle server", "idle", silence),
    Case("idle1000", "1,000 idle connections", "idle1000", silence, silent=1000),
    Case("idle5000", "5,000 idle connections", "idle5000", silence, silent=5000),
]


class Bench:
    """A MariaDB, and the idpots of this checkout and of the one beside it that the cases need."""

    def __init__(self, stack, folder, seconds):
        self.stack = stack
        self.folder = folder
        self.seconds = seconds
        self.mariadb = Mariadb(stack, folder / "mariadb")
        self.idpots = {}

    def start_idpots(self, checkout, directory, cases, python):
        """Starts one for each server that the cases name, on `python` that of this name."""
        pots = {}
        for case in cases:
            if case.server:
                pots[case.server] = max(case.pots, pots.get(case.server, 1))
        for server, number in pots.items():
            program = python if server == "python" else sys.executable
            command = [program, "-B", str(directory / "idpot.py")]
            folder = self.folder / f"{server}_{checkout}_"
            idpot = Idpot(self.stack, folder, command, server, number, self.mariadb.port)
            self.idpots[checkout, server] = idpot

    def runs(self, cases):
        """Yields each case with each checkout that can run it."""
        for case in cases:
            if not case.server:
                yield case, THIS
                continue
            for checkout in THIS, BESIDE:
                idpot = self.idpots.get((checkout, case.server))
                if idpot and (idpot.knows_range or "range" not in case.query):
                    yield case, checkout

    def run(self, case, checkout):
        """The figures of one run; of idpot also percent of one processor, and megabytes."""
        idpot = self.idpots.get((checkout, case.server))
        if idpot is None:
            return case.load(self, idpot, case)
        with contextlib.ExitStack() as connections:
            for _ in range(case.silent):
                connections.enter_context(idpot.connect())
            if case.silent:
                idpot.settle()
            before = self.clocks(idpot)
            sample = case.load(self, idpot, case)
            after = self.clocks(idpot)
            sample["MB"] = idpot.megabytes()
        idpot.settle()
        os.truncate(idpot.log, 0)  # so that what it writes to the disk is not the next case's
        elapsed = after["time"] - before["time"]
        for name in "idpot", "mariadb", "client":
            sample[name] = (after[name] - before[name]) / elapsed * 100
        return sample

    def clocks(self, idpot):
        """The time, and the processor seconds of all that take part in a run."""
        return {
            "time": time.perf_counter(),
            "idpot": idpot.cpu_seconds(),
            "mariadb": self.mariadb.cpu_seconds(),
            "client": sum(os.times()[:4]),
        }


def measure_disk(folder):
    """Milliseconds, median and p99, in which os.fdatasync returns after an append of 512 bytes."""
    times = []
    with open(folder / "disk", "wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(512))
            before = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - before) * 1e3)
    cuts = statistics.quantiles(times, n=100)
    return {"median": cuts[49], "p99": cuts[98]}


# Results and report -----------------------------------------------------------------------------


def median_ratio(values, others):
    """The median of each round's value by the other; None where they were not measured."""
    ratios = [value / other for value, other in zip(values, others) if other]
    return statistics.median(ratios) if ratios else None


class Results:
    """The samples: checkout -> name of the case -> one sample for each round."""

    def __init__(self):
        self.samples = {THIS: {}, BESIDE: {}}

    def add(self, case, checkout, sample):
        self.samples[checkout].setdefault(case.name, []).append(sample)

    def values(self, case_name, figure, checkout=THIS):
        """The figure in each round, in one and the same order for all cases."""
        samples = self.samples[checkout].get(case_name, [])
        return [sample[figure] for sample in samples if figure in sample]

    def summary(self, case_name, figure, checkout=THIS):
        """The figure over all rounds; None where it was not measured."""
        values = self.values(case_name, figure, checkout)
        if not values:
            return None
        if figure in ("max", "failed"):
            return max(values)
        return statistics.median(values)


class Target(NamedTuple):
    """What DESIGN.md wants to be reached."""

    title: str
    case: str
    figure: str
    sign: str
    limit: float
    base: str = ""  # the case it is divided by; BESIDE: the same one of the other checkout

    def value(self, results):
        """What was reached; None where it was not measured."""
        if not self.base:
            return results.summary(self.case, self.figure)
        values = results.values(self.case, self.figure)
        if self.base == BESIDE:
            others = results.values(self.case, self.figure, BESIDE)
        else:
            others = results.values(self.base, self.figure)
        return median_ratio(values, others)

    def met(self, results):
        """A run with requests that failed meets nothing."""
        if results.summary(self.case, "failed"):
            return False
        value = self.value(results)
        return value >= self.limit if self.sign == ">=" else value <= self.limit


TARGETS = [
    Target("MyISAM c=1 / beside", "myisam-c1", "rate", ">=", 0.95, BESIDE),
    Target("MyISAM c=10 / beside", "myisam-c10", "rate", ">=", 0.95, BESIDE),
    Target("MyISAM c=64 / beside", "myisam-c64", "rate", ">=", 0.95, BESIDE),
    Target("InnoDB c=64 / beside", "innodb-c64", "rate", ">=", 0.95, BESIDE),
    Target("SQLite c=64 / beside", "sqlite-c64", "rate", ">=", 0.95, BESIDE),
    # 8 ms where 582e2c9 has 5
    Target("MyISAM c=64, p99 / beside", "myisam-c64", "p99", "<=", 1.6, BESIDE),
    Target("InnoDB c=64, p99 / beside", "innodb-c64", "p99", "<=", 1.6, BESIDE),
    Target("SQLite c=64, p99 / beside", "sqlite-c64", "p99", "<=", 1.6, BESIDE),
    Target("MyISAM c=256 / beside", "myisam-c256", "rate", ">=", 0.7, BESIDE),
    Target("MyISAM c=1000 / beside", "myisam-c1000", "rate", ">=", 0.55, BESIDE),
    Target("new connections c=1 / beside", "new-c1", "rate", ">=", 0.85, BESIDE),
    Target("new connections c=10 / beside", "new-c10", "rate", ">=", 0.8, BESIDE),
    Target("MyISAM c=256, slowest request, ms", "myisam-c256", "max", "<=", 1000),
    Target("MyISAM c=1000, slowest request, ms", "myisam-c1000", "max", "<=", 1000),
    Target("InnoDB c=64 / MyISAM c=64", "innodb-c64", "rate", ">=", 0.8, "myisam-c64"),
    Target("MyISAM c=1 / direct loop", "myisam-c1", "rate", ">=", 0.5, "direct"),
    Target("count=1000 c=8, IDs/s", "count", "rate", ">=", 1e6),
    Target("range=100000 c=8, IDs/s", "range", "rate", ">=", 1e9),
    Target("16 busy and 984 silent / 16 alone", "busy16-silent984", "rate", ">=", 0.8, "busy16"),
    Target("idle server, MB resident", "idle", "MB", "<=", 40),
    Target("1,000 idle connections, MB resident", "idle1000", "MB", "<=", 70),
    Target("5,000 idle connections, MB resident", "idle5000", "MB", "<=", 200),
    # 0 as far as ticks of 10 ms tell it
    Target("idle server, % CPU", "idle", "idpot", "<=", 0.5),
    Target("1,000 idle connections, % CPU", "idle1000", "idpot", "<=", 0.5),
    Target("5,000 idle connections, % CPU", "idle5000", "idpot", "<=", 0.5),
]


FIGURES = ("p50", "p99", "p99.9", "max", "failed", "idpot", "mariadb", "client", "MB")


def shown(value):
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def row(title, rate, cells):
    """A line of the table."""
    return f"{title:32}{rate:>14}" + "".join(f"{cell:>8}" for cell in cells)


def case_row(results, case, checkout):
    """The figures of one case; the ratio to the other checkout stands with this one."""
    title = case.title if checkout == THIS else f"  beside: {case.name}"
    rates = results.values(case.name, "rate", checkout)
    rate = spread = ratio = None
    if rates:
        rate = statistics.median(rates)
        spread = (max(rates) - min(rates)) / rate * 100
    if checkout == THIS:
        ratio = median_ratio(rates, results.values(case.name, "rate", BESIDE))
    figures = [results.summary(case.name, figure, checkout) for figure in FIGURES]
    return row(title, shown(rate), map(shown, [ratio, spread, *figures]))


def table(results, runs):
    """The lines of the table of all cases."""
    yield "ratio: this by beside; spread: % between the slowest and the fastest round"
    yield "p50, p99, p99.9, max: milliseconds until the answer"
    yield "idpot, mariadb, client: % of one processor; MB: idpot's resident memory"
    yield row("", "per second", ["ratio", "spread", *FIGURES])
    for case, checkout in runs:
        yield case_row(results, case, checkout)


def target_lines(results):
    """What was to be reached, as far as it was measured."""
    for target in TARGETS:
        value = target.value(results)
        if value is not None:
            verdict = "met" if target.met(results) else "NOT MET"
            limit = f"{target.sign} {shown(target.limit)}"
            yield f"{target.title:38}{limit:18}{shown(value):>14}  {verdict}"


def machine_lines(options, disk):
    """What was measured, with what, and on what."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = model[1] if model else platform.machine()
    cores = len(os.sched_getaffinity(0))
    filesystem = output("stat", "-fc%T", "/var/tmp").strip()
    mariadb = output("mariadbd", "--version").split()[2]
    driver = mysql.connector.__version__
    yield f"{cores} cores of {processor}, Linux {platform.release()}, {filesystem}"
    yield f"Python {platform.python_version()}, MariaDB {mariadb}, mysql-connector-python {driver}"
    yield f"{options.rounds} rounds, {options.seconds} seconds each"
    yield (
        "fdatasync after an append of 512 bytes in /var/tmp: "
        f"median {shown(disk['median'])} ms, p99 {shown(disk['p99'])} ms"
    )
    yield f"this: {version(HERE)}"
    if options.beside:
        yield f"beside: {version(options.beside)}"
    if options.python:
        yield f"other Python: {output(options.python, '--version').strip()}"


def version(directory):
    return output(sys.executable, "-B", str(directory / "idpot.py"), "--version").strip()


# Command line -----------------------------------------------------------------------------------


def checkout_directory(text):
    path = Path(text).resolve()
    if not (path / "idpot.py").is_file():
        raise argparse.ArgumentTypeError(f"there is no idpot.py in {text}")
    return path


def parse_arguments():
    names = " ".join(case.name for case in CASES)
    parser = argparse.ArgumentParser(description="Measures the speed of idpot on this machine.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each run")
    parser.add_argument("--only", default="*", help=f"names or patterns, with commas, of: {names}")
    parser.add_argument("--json", type=Path, help="file for the report and all samples")
    parser.add_argument("--beside", type=checkout_directory, help="another checkout, for ratios")
    parser.add_argument("--python", help="another Python to run idpot with as well")
    return parser.parse_args()


def raise_file_limit():
    """Raises the number of files that may be open as far as is needed and allowed; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(soft, min(hard, 8192))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def chosen_cases(options):
    """The cases that are asked for and possible."""
    patterns = options.only.split(",")
    files = raise_file_limit()
    cases = []
    for case in CASES:
        if not any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns):
            continue
        if case.server == "python" and not options.python:
            continue
        if case.silent + 500 > files:
            print(f"bench: {case.name} is left out: ulimit -Hn is {files}", file=sys.stderr)
            continue
        cases.append(case)
    if not cases:
        sys.exit("bench: there is no such case, see --help")
    return cases


def prepare_process():
    """Programs that may be missing, the environment, signals."""
    os.environ["PATH"] += ":/usr/sbin"  # where Debian has mariadbd
    os.environ.setdefault("PYTHONPATH", str(HERE))  # the other checkout needs the driver too
    for program, package in PACKAGES.items():
        if not shutil.which(program):
            sys.exit(f"bench: {program} is missing: apt-get install {package}")
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, leave)


def leave(number, frame):
    """Ends the benchmark, and with it all that it started."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def measure_all(bench, cases, rounds):
    """The results of all rounds, and the runs of each round."""
    results = Results()
    runs = list(bench.runs(cases))
    for turn in range(rounds):
        for case, checkout in runs if turn % 2 == 0 else reversed(runs):
            print(f"round {turn + 1} of {rounds}: {case.name} {checkout}", file=sys.stderr)
            results.add(case, checkout, bench.run(case, checkout))
    return results, runs


def main():
    options = parse_arguments()
    prepare_process()
    cases = chosen_cases(options)
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="idpot-bench-", dir="/var/tmp")
        path = Path(stack.enter_context(folder))
        disk = measure_disk(path)
        bench = Bench(stack, path, options.seconds)
        bench.start_idpots(THIS, HERE, cases, options.python)
        if options.beside:
            bench.start_idpots(BESIDE, options.beside, cases, options.python)
        results, runs = measure_all(bench, cases, options.rounds)
    report = [
        *machine_lines(options, disk),
        "",
        *table(results, runs),
        "",
        *target_lines(results),
    ]
    print(*report, sep="\n")
    if options.json:
        everything = {"report": report, "fdatasync": disk, "samples": results.samples}
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
