"""idpot's speed, beside another version of it and beside the limits of the machine.

    python3 contrib/bench.py [--rounds 3] [--seconds 3] [--only REGEX] [--beside DIRECTORY] ...

Starts a MariaDB of its own, with its default settings, and an idpot for each run, drives it with
wrk or ab, and ends them all. All of it is in /var/tmp, not in /tmp: where that is memory, InnoDB
and SQLite look faster than a disk lets them be. The access log is on.

--only takes the cases in whose names the regular expression is found; --help lists them. --beside
names another checkout, whose idpot.py meets the same cases in the same run; there may be several:

    git worktree add /var/tmp/idpot-1.0 582e2c9
    git worktree add /var/tmp/idpot-2.1 8b02d01
    python3 contrib/bench.py --beside /var/tmp/idpot-1.0 --beside /var/tmp/idpot-2.1

Each round runs every case once, for this checkout and at once for the others; every second round
runs all of it backwards, so that the machine's drift meets all alike. The direct loop is one client
that does an UPDATE as idpot's on a connection of its own, without HTTP.
"""

import argparse
import contextlib
import os
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
import urllib.request
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))  # the driver may have been installed beside idpot.py


# Programs ---------------------------------------------------------------------------------------

def output(*command):
    """What the command writes on stdout; where it fails the benchmark ends."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        sys.exit(f"bench: {command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


class Program:
    """A program that runs until the stack ends it."""

    def __init__(self, stack, command, folder, ready):
        """Returns when the program has written what the pattern matches: `ready` is that match."""
        written = folder / "written"
        with open(written, "w") as file:
            # In a session of its own, as systemd starts a service: by session the kernel shares
            # the CPUs (sched_autogroup). And Ctrl-C must not end the database before idpot.
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=file, stderr=file, start_new_session=True)
        stack.callback(self.stop)
        self.ready = None
        deadline = time.monotonic() + 60
        while not self.ready:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"bench: {command[0]} does not start:\n{written.read_text()[-2000:]}")
            time.sleep(0.05)
            self.ready = re.search(ready, written.read_text())

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def usage(self):
        """Processor seconds since the start, and megabytes resident now; see proc(5)."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()  # from the third on
        ticks = int(fields[11]) + int(fields[12])
        pages = int(fields[21])
        return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6


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
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        options += [
            f"--socket={folder}/socket",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
        ]
        super().__init__(stack, ["mariadbd", *options], folder, "ready for connections")

    def connect(self):
        """A connection, for a with block."""
        import mysql.connector  # not needed for --help; idpot says so where it is missing
        return contextlib.closing(mysql.connector.connect(
            host="127.0.0.1", port=self.port, user="root", database="test", autocommit=True,
            collation="utf8mb4_general_ci",  # MariaDB does not know the driver's default
        ))


# The other versions know these settings too.
SERVER = "[Server]\nLogFile = access.log\nIdleTimeout = 600\nMaxConnections = 6000\n"
STORES = {
    "MyISAM": "[Mysql]\nPort = {port}\nDbname = test\nEngine = MyISAM\n",
    "InnoDB": "[Mysql]\nPort = {port}\nDbname = test\nEngine = InnoDB\n",
    "SQLite": "[Sqlite]\nFile = idpot.db\n",
}


class Idpot(Program):
    """An idpot with one pot, which has the folder's name."""

    def __init__(self, stack, folder, checkout, store, database_port):
        settings = SERVER + STORES[store].format(port=database_port)
        (folder / "idpot.cfg").write_text(settings)
        command = [sys.executable, "-B", f"{checkout}/idpot.py"]
        command += ["--config=idpot.cfg", "--listen=127.0.0.1:0"]
        super().__init__(stack, command, folder, r"listening on (http://127.0.0.1:(\d+))")
        url, self.port = self.ready.groups()
        self.pot = f"{url}/id/{folder.name}"
        post(f"{url}/pot/create", f"name={folder.name}")


def post(url, form=""):
    """The answer's body."""
    with urllib.request.urlopen(url, form.encode(), timeout=30) as response:
        return response.read().decode()


# Loads: each returns the figures of one run, rate per second and times in milliseconds ----------

WRK_SCRIPT = """
wrk.method = "POST"

function done(summary, latency)
   local errors = summary.errors
   print("rate", (summary.requests - errors.status) / summary.duration * 1e6)
   print("p99", latency:percentile(99) / 1e3)
   print("max", latency.max / 1e3)
   print("failed", errors.status + errors.connect + errors.read + errors.write + errors.timeout)
end
"""


def keep_alive(bench, idpot, case, seconds=None):
    """Connections that stay, for as long as all runs take or for so many seconds."""
    seconds = seconds or bench.seconds
    script = bench.folder / "wrk.lua"
    script.write_text(WRK_SCRIPT)
    command = ["wrk", "-t1", f"-c{case.clients}", f"-d{seconds}s", "--timeout=10s", f"-s{script}"]
    text = output(*command, idpot.pot + case.query)
    found = re.findall(r"(rate|p99|max|failed)\t(\S+)", text)
    figures = {name: float(value) for name, value in found}
    figures["rate"] *= case.ids
    return figures


def read_view(bench, idpot, case):
    """The last of eight seconds in which a transaction keeps all versions of rows, as dumps do."""
    with bench.mariadb.connect() as connection:
        connection.cmd_query("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        seconds = [keep_alive(bench, idpot, case, 1) for _ in range(8)]
        connection.cmd_query("COMMIT")
        # Waits until they are removed, so that this is not the next run's load.
        connection.cmd_query("SET GLOBAL innodb_max_purge_lag_wait = 0")
    last = seconds[-1]
    last["last/1st"] = last["rate"] / seconds[0]["rate"]
    return last


def new_connections(bench, idpot, case):
    """A new connection for each request."""
    percentiles = bench.folder / "ab.csv"
    # -l: IDs may grow longer; -r: an error of the network is counted and does not end the run
    command = ["ab", "-q", "-l", "-r", "-mPOST", f"-c{case.clients}", f"-t{bench.seconds}"]
    text = output(*command, f"-e{percentiles}", idpot.pot) + percentiles.read_text()
    failed = re.findall(r"(?:Failed requests|Non-2xx responses): +(\d+)", text)
    return {
        "rate": float(re.search(r"Requests per second: +(\S+)", text)[1]),
        "p99": float(re.search(r"\n99,(\S+)", text)[1]),
        "max": float(re.search(r"100% +(\d+)", text)[1]),
        "failed": sum(map(int, failed)),
    }


def silence(bench, idpot, case):
    """No requests, but connections that have had one answer."""
    with contextlib.ExitStack() as connections:
        for _ in range(case.clients):
            connection = socket.create_connection(("127.0.0.1", idpot.port), 30)
            connections.enter_context(connection)
            connection.sendall(b"GET /pot/none HTTP/1.1\r\nHost: bench\r\n\r\n")
            connection.recv(4096)
        time.sleep(2)
        before, _ = idpot.usage()
        time.sleep(bench.seconds)
        after, megabytes = idpot.usage()
        return {"CPU": (after - before) / bench.seconds * 100, "MB": megabytes}


def direct_loop(bench, idpot, case):
    """An UPDATE as idpot's, on one connection; idpot is not asked."""
    update = "UPDATE direct SET id = LAST_INSERT_ID(id + 1) WHERE id < 18446744073709551615"
    times = []
    with bench.mariadb.connect() as connection:
        connection.cmd_query("CREATE OR REPLACE TABLE direct (id BIGINT UNSIGNED) ENGINE=MyISAM")
        connection.cmd_query("INSERT INTO direct VALUES (0)")
        start = now = time.perf_counter()
        while now < start + bench.seconds:
            before = now
            connection.cmd_query(update)
            now = time.perf_counter()
            times.append((now - before) * 1e3)
    return {
        "rate": len(times) / (now - start),
        "p99": statistics.quantiles(times, n=100)[98],
        "max": max(times),
    }


# Cases ------------------------------------------------------------------------------------------

class Case(NamedTuple):
    name: str
    store: str
    load: Callable
    clients: int = 1
    query: str = ""
    ids: int = 1  # that a request asks for


CASES = [
    Case("myisam-direct-loop", "MyISAM", direct_loop),
    Case("myisam-c1", "MyISAM", keep_alive),
    Case("myisam-c10", "MyISAM", keep_alive, 10),
    Case("myisam-c64", "MyISAM", keep_alive, 64),
    Case("myisam-c256", "MyISAM", keep_alive, 256),
    Case("myisam-c1000", "MyISAM", keep_alive, 1000),
    Case("innodb-c1", "InnoDB", keep_alive),
    Case("innodb-c64", "InnoDB", keep_alive, 64),
    Case("innodb-c256", "InnoDB", keep_alive, 256),
    Case("innodb-c10-read-view-8s", "InnoDB", read_view, 10),
    Case("sqlite-c1", "SQLite", keep_alive),
    Case("sqlite-c64", "SQLite", keep_alive, 64),
    Case("new-connections-c1", "MyISAM", new_connections),
    Case("new-connections-c10", "MyISAM", new_connections, 10),
    Case("count-1000-c8", "MyISAM", keep_alive, 8, "?count=1000", 1000),
    Case("range-100000-c8", "MyISAM", keep_alive, 8, "?range=100000", 100000),
    Case("idle", "MyISAM", silence, 0),
    Case("idle-1000-connections", "MyISAM", silence, 1000),
    Case("idle-5000-connections", "MyISAM", silence, 5000),
]


class Run:
    """A case in a checkout, and the figures of each round."""

    def __init__(self, case, checkout, this=None):
        self.case = case
        self.checkout = checkout
        self.this = this  # the same case in this checkout, where the checkout is one beside
        self.samples = []

    def ratio(self):
        """The rate of this checkout by that beside, the median of all rounds."""
        if not self.this:
            return None
        rounds = zip(self.this.samples, self.samples)
        ratios = [this["rate"] / beside["rate"] for this, beside in rounds if "rate" in beside]
        return statistics.median(ratios) if ratios else None

    def summary(self, figure, summarize):
        """The figure over all rounds; None where it was not measured."""
        values = [sample[figure] for sample in self.samples if figure in sample]
        return summarize(values) if values else None


def planned_runs(cases, beside):
    """The runs of one round."""
    for case in cases:
        this = Run(case, HERE)
        yield this
        if case.load is not direct_loop:
            for checkout in beside:
                yield Run(case, checkout, this)


class Bench(NamedTuple):
    """Each run has an idpot of its own, so that memory is that of this run alone."""
    folder: Path
    seconds: int
    mariadb: Mariadb

    def figures(self, case, checkout):
        """The figures of one run; none where this version does not know what is asked for."""
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="pot", dir=self.folder)
            path = Path(stack.enter_context(folder))
            idpot = Idpot(stack, path, checkout, case.store, self.mariadb.port)
            if "range" in case.query and "\t" not in post(idpot.pot + case.query):
                return {}
            return case.load(self, idpot, case)


# Report -----------------------------------------------------------------------------------------

COLUMNS = {
    "per second": ("rate", statistics.median),
    "slowest": ("rate", min),
    "p99": ("p99", statistics.median),
    "max": ("max", max),
    "failed": ("failed", max),
    "last/1st": ("last/1st", statistics.median),
    "CPU": ("CPU", statistics.median),
    "MB": ("MB", statistics.median),
}
LEGEND = """
Medians of the rounds; max and failed: the worst; slowest: the rate of the slowest round.
ratio: this checkout's rate by that beside. last/1st: the last second's rate by the first's.
p99, max: milliseconds until the answer. CPU: idpot's, % of one. MB: its resident memory.
Each server, MariaDB too, runs in a session of its own, as systemd starts them: by session the
kernel shares the CPUs where sched_autogroup is on. The clients share the benchmark's session.
"""


def print_table(runs):
    print(LEGEND)
    print_row("", [*COLUMNS, "ratio"])
    for run in runs:
        title = f"  beside {Path(run.checkout).name}" if run.this else run.case.name
        values = [run.summary(*column) for column in COLUMNS.values()]
        values.append(run.ratio())
        print_row(title, map(shown, values))


def print_row(title, cells):
    rate, slowest, *others = cells
    print(f"{title:24}{rate:>14}{slowest:>14}", *(f"{cell:>8}" for cell in others))


def shown(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_machine(folder):
    """What is measured on, and how fast its disk is."""
    database = re.search(r"Ver (\S+)", output("mariadbd", "--no-defaults", "--version"))[1]
    print(f"{len(os.sched_getaffinity(0))} CPUs, {database}, Python {sys.version}")
    times = []
    with open(folder / "disk", "wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(512))
            before = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - before) * 1e3)
    print(f"fdatasync after 512 bytes: {shown(statistics.median(times))} ms in the median")


# Command line -----------------------------------------------------------------------------------

def parse_arguments():
    names = ", ".join(case.name for case in CASES)
    parser = argparse.ArgumentParser(description="Measures the speed of idpot on this machine.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each run")
    parser.add_argument("--only", default="", metavar="REGEX", help=f"cases, of: {names}")
    parser.add_argument(
        "--beside", metavar="DIRECTORY", type=os.path.abspath, action="append", default=[],
        help="another checkout; may be given several times")
    return parser.parse_args()


def prepare_process():
    """Programs that may be missing, the environment, open files, signals."""
    os.environ["PATH"] += ":/usr/sbin"  # where Debian has mariadbd
    os.environ.setdefault("PYTHONPATH", str(HERE))  # the other checkout needs the driver too
    for program in "wrk", "ab", "mariadbd", "mariadb-install-db":
        if not shutil.which(program):
            sys.exit(f"bench: no {program}: apt-get install wrk apache2-utils mariadb-server")
    try:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (8192, hard))
    except ValueError:
        sys.exit("bench: 8192 open files are needed, and `ulimit -Hn` allows less")
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, leave)


def leave(number, frame):
    """Ends the benchmark, and with it all that it started."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main():
    options = parse_arguments()
    prepare_process()
    cases = [case for case in CASES if re.search(options.only, case.name)]
    runs = list(planned_runs(cases, options.beside))
    order = []
    for turn in range(options.rounds):
        order += runs if turn % 2 == 0 else reversed(runs)
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="idpot-bench-", dir="/var/tmp")
        path = Path(stack.enter_context(folder))
        print_machine(path)
        print(f"{options.rounds} rounds of {options.seconds} s:", HERE, *options.beside)
        bench = Bench(path, options.seconds, Mariadb(stack, path / "mariadb"))
        for number, run in enumerate(order, 1):
            progress = f"{number} of {len(order)}: {run.case.name}, {run.checkout}"
            print(progress, file=sys.stderr)
            run.samples.append(bench.figures(run.case, run.checkout))
    print_table(runs)


if __name__ == "__main__":
    main()
