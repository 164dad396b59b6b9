"""idpot's speed, beside another version of it and beside the limits of the machine.

    python3 contrib/bench.py [--rounds 3] [--seconds 3] [--only REGEX] [--beside DIRECTORY] ...

Starts a MariaDB of its own, with its default settings, and an idpot for each run, drives it with
wrk, and ends them all. All of it is in /var/tmp: were that memory, InnoDB and SQLite would look
faster than a disk lets them be. The access log is on.

--only takes the cases in whose names the regular expression is found; --help lists them. --beside
names another checkout, whose idpot.py meets the same cases in the same run; there may be several:

    git worktree add /var/tmp/idpot-2.2 38b6e9d
    python3 contrib/bench.py --beside /var/tmp/idpot-2.2

Each round runs every case once, for this checkout and at once for the others; every second round
runs all of it backwards, so that the machine's drift meets all alike.
"""

import argparse
import contextlib
import os
import pwd
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
import urllib.error
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
            # In a session of its own, as systemd starts it; and Ctrl-C must not end the database.
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=file, stderr=file, start_new_session=True)
        stack.callback(self.kill)
        self.ready = None
        deadline = time.monotonic() + 60
        while not self.ready:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"bench: {command[0]} does not start:\n{written.read_text()[-2000:]}")
            time.sleep(0.05)
            self.ready = re.search(ready, written.read_text())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def usage(self):
        """Processor seconds since the start, and megabytes resident now; see proc(5)."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()  # from the third on
        ticks = int(fields[11]) + int(fields[12])
        megabytes = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        return ticks / os.sysconf("SC_CLK_TCK"), megabytes


class Mariadb(Program):
    """A new server, with the database `test` and a root who needs no password."""

    def __init__(self, stack, folder):
        folder.mkdir()
        user = pwd.getpwuid(os.getuid()).pw_name  # root too, where it is asked for by name
        options = ["--no-defaults", f"--user={user}", f"--datadir={folder}/data"]
        output("mariadb-install-db", *options, "--auth-root-authentication-method=normal")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        options += [f"--socket={folder}/socket", f"--port={self.port}"]
        options += ["--bind-address=127.0.0.1", "--skip-name-resolve"]
        super().__init__(stack, ["mariadbd", *options], folder, "ready for connections")

    def connect(self):
        import mysql.connector  # not needed for --help; idpot says so where it is missing
        return contextlib.closing(mysql.connector.connect(
            host="127.0.0.1", port=self.port, user="root", database="test", autocommit=True,
            collation="utf8mb4_general_ci"))  # MariaDB does not know the driver's default


# The other versions know these settings too.
SERVER = "[Server]\nLogFile = access.log\nIdleTimeout = 600\nMaxConnections = 6000\n"
STORES = {
    "MyISAM": "[Mysql]\nPort = {port}\nDbname = test\nEngine = MyISAM\n",
    "InnoDB": "[Mysql]\nPort = {port}\nDbname = test\nEngine = InnoDB\n",
    "SQLite": "[Sqlite]\nFile = idpot.db\n",
}


def post(url, form=""):
    with urllib.request.urlopen(url, form.encode(), timeout=30) as response:
        return response.read().decode()


class Idpot(Program):
    """An idpot with a pot that has the folder's name, and with the numbered ones of the case."""

    def __init__(self, stack, folder, checkout, case, database_port):
        settings = SERVER + STORES[case.store].format(port=database_port)
        (folder / "idpot.cfg").write_text(settings)
        command = [sys.executable, "-B", f"{checkout}/idpot.py"]
        command += ["--config=idpot.cfg", "--listen=127.0.0.1:0"]
        super().__init__(stack, command, folder, r"listening on (http://127.0.0.1:(\d+))")
        url, self.port = self.ready.groups()
        self.pot = folder.name
        self.url = f"{url}/id/{self.pot}"
        for number in "", *range(1, case.pots + 1):
            post(f"{url}/pot/create", f"name={self.pot}{number}")

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), 30)


# Loads: each returns the figures of one run, rate per second and times in milliseconds ----------

def percentiles(times):
    cuts = statistics.quantiles(times, n=100)
    return {"p50": cuts[49] * 1e3, "p99": cuts[98] * 1e3}


# What the case says of `form`, `pause` and `pots` stands before it.
WRK_SCRIPT = """
wrk.method = "POST"
if form ~= "" then wrk.body = form end
if pause > 0 then function delay() return pause end end
if pots > 0 then
   local requests = {}
   function init()
      for pot = 1, pots do requests[pot] = wrk.format(nil, wrk.path .. pot) end
   end
   function request() return requests[math.random(pots)] end
end

function done(summary, latency)
   local errors = summary.errors
   print("rate", (summary.requests - errors.status) / summary.duration * 1e6)
   print("p50", latency:percentile(50) / 1e3)
   print("p99", latency:percentile(99) / 1e3)
   print("failed", errors.status + errors.connect + errors.read + errors.write + errors.timeout)
end
"""


def wrk(bench, idpot, case):
    """Clients that ask as the case says."""
    script = bench.folder / "wrk.lua"
    asked = f'form, pause, pots = "{case.form}", {case.pause}, {case.pots}'
    script.write_text(asked + WRK_SCRIPT)
    command = ["wrk", "-t1", f"-c{case.clients}", f"-d{bench.seconds}s", "--timeout=10s"]
    command += [f"-s{script}", f"--header={case.header}"]
    text = output(*command, idpot.url + case.query)
    figures = dict(re.findall(r"(rate|p50|p99|failed)\t(\S+)", text))
    figures = {name: float(value) for name, value in figures.items()}
    figures["rate"] *= case.ids
    return figures


def read_view(bench, idpot, case):
    """The last of eight seconds in which a transaction keeps all versions of rows, as dumps do."""
    second = bench._replace(seconds=1)
    with bench.mariadb.connect() as connection:
        connection.cmd_query("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        seconds = [wrk(second, idpot, case) for _ in range(8)]
        connection.cmd_query("COMMIT")
        # Waits until they are removed, so that this is not the next run's load.
        connection.cmd_query("SET GLOBAL innodb_max_purge_lag_wait = 0")
    last = seconds[-1]
    last["last/1st"] = last["rate"] / seconds[0]["rate"]
    return last


def beside_busy(bench, idpot, case):
    """Beside a process that is always busy, bound to the first CPU."""
    loop = ["sh", "-c", "echo busy; while :; do :; done"]
    with contextlib.ExitStack() as stack:
        Program(stack, ["taskset", "-c", "0", *loop], bench.folder, "busy")
        return wrk(bench, idpot, case)


def silence(bench, idpot, case):
    """No requests, but connections that have had one answer."""
    with contextlib.ExitStack() as connections:
        for _ in range(case.clients):
            connection = connections.enter_context(idpot.connect())
            connection.sendall(b"GET /pot/none HTTP/1.1\r\nHost: bench\r\n\r\n")
            connection.recv(4096)
        time.sleep(2)
        before, _ = idpot.usage()
        time.sleep(bench.seconds)
        after, megabytes = idpot.usage()
        return {"CPU": (after - before) / bench.seconds * 100, "MB": megabytes}


def direct_loop(bench, idpot, case):
    """An UPDATE as idpot's, on one connection; idpot is not asked."""
    update = f"UPDATE pot_{idpot.pot} SET id = LAST_INSERT_ID(id + 1) WHERE id < {2**64 - 1}"
    times = []
    with bench.mariadb.connect() as connection:
        start = now = time.perf_counter()
        while now < start + bench.seconds:
            before = now
            connection.cmd_query(update)
            now = time.perf_counter()
            times.append(now - before)
    return {"rate": len(times) / (now - start), **percentiles(times)}


# Cases ------------------------------------------------------------------------------------------

class Case(NamedTuple):
    name: str
    clients: int = 1
    store: str = "MyISAM"
    load: Callable = wrk
    query: str = ""
    form: str = ""
    header: str = ""
    ids: int = 1  # that a request asks for
    pause: int = 0  # milliseconds between an answer and the client's next request
    pots: int = 0  # of which each request asks one at random; 0: all ask the same one


CASES = [
    Case("myisam-direct-loop", load=direct_loop),
    Case("myisam-c1"),
    Case("myisam-c10", 10),
    Case("myisam-c64", 64),
    Case("myisam-c256", 256),
    Case("myisam-c1000", 1000),
    Case("innodb-c1", 1, "InnoDB"),
    Case("innodb-c64", 64, "InnoDB"),
    Case("innodb-c10-read-view-8s", 10, "InnoDB", read_view),
    Case("sqlite-c1", 1, "SQLite"),
    Case("sqlite-c64", 64, "SQLite"),
    Case("16-pots-myisam-c64", 64, pots=16),
    Case("200-pots-myisam-c1", 1, pots=200),
    Case("200-pots-myisam-c10", 10, pots=200),
    Case("200-pots-myisam-c64", 64, pots=200),
    Case("200-pots-myisam-c256", 256, pots=200),
    Case("200-pots-innodb-c64", 64, "InnoDB", pots=200),
    Case("200-pots-sqlite-c64", 64, "SQLite", pots=200),
    Case("pause-2-ms-c64", 64, pause=2),
    Case("pause-2-ms-c256", 256, pause=2),
    Case("busy-process-beside-c1", load=beside_busy),
    Case("new-connections-c1", 1, header="Connection: close"),
    Case("new-connections-c10", 10, header="Connection: close"),
    Case("form-count-2-c64", 64, form="count=2", ids=2,
         header="Content-Type: application/x-www-form-urlencoded"),
    Case("count-1000-c8", 8, query="?count=1000", ids=1000),
    Case("range-100000-c8", 8, query="?range=100000", ids=100000),
    Case("idle", 0, load=silence),
    Case("idle-1000-connections", 1000, load=silence),
    Case("idle-5000-connections", 5000, load=silence),
]


def gives(idpot, case):
    """Whether this version answers the case's request with as many IDs as it asks for."""
    try:
        ids = post(idpot.url + case.query, case.form).split()
    except urllib.error.HTTPError:
        return False
    return int(ids[-1]) - int(ids[0]) + 1 == case.ids


class Bench(NamedTuple):
    """Each run has an idpot of its own, so that memory is that of this run alone."""
    folder: Path
    seconds: int
    mariadb: Mariadb

    def figures(self, case, checkout):
        """The figures of one run; none where this version does not know what is asked for."""
        folder = tempfile.TemporaryDirectory(prefix="pot", dir=self.folder)
        with folder as path, contextlib.ExitStack() as stack:
            idpot = Idpot(stack, Path(path), checkout, case, self.mariadb.port)
            return case.load(self, idpot, case) if gives(idpot, case) else {}


# Report -----------------------------------------------------------------------------------------

COLUMNS = {
    "per second": ("rate", statistics.median),
    "p50": ("p50", statistics.median),
    "p99": ("p99", statistics.median),
    "failed": ("failed", max),
    "last/1st": ("last/1st", statistics.median),
    "CPU": ("CPU", statistics.median),
    "MB": ("MB", statistics.median),
    "ratio": ("ratio", statistics.median),
}
ROW = "{:24}" + "{:>14}" + "{:>9}" * 7
LEGEND = """
Medians of the rounds; failed: the worst.
ratio: this checkout's rate by that beside. last/1st: the last second's rate by the first's.
p50, p99: milliseconds until the answer. CPU: idpot's, % of one. MB: its resident memory.
Each server, MariaDB too, has a session of its own, as under systemd: see sched_autogroup.
"""


def add_ratios(samples, of_this):
    """Puts the rate of this checkout by that of the one beside into each round's figures."""
    for sample, this in zip(samples, of_this):
        if sample.get("rate"):
            sample["ratio"] = this["rate"] / sample["rate"]


def summary(samples, figure, summarize):
    """The figure over all rounds, as text."""
    values = [sample[figure] for sample in samples if figure in sample]
    if not values:
        return "-"
    value = summarize(values)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_table(runs):
    print(LEGEND)
    print(ROW.format("", *COLUMNS))
    for (case, checkout), samples in runs.items():
        title = case.name
        if checkout != HERE:
            title = f"  beside {Path(checkout).name}"
            add_ratios(samples, runs[case, HERE])
        cells = [summary(samples, *column) for column in COLUMNS.values()]
        print(ROW.format(title, *cells))


def print_machine(folder):
    """What is measured on, and how fast its disk is."""
    database = re.search(r"Ver (\S+)", output("mariadbd", "--no-defaults", "--version"))[1]
    print(f"{len(os.sched_getaffinity(0))} CPUs, {database}, Python {sys.version}")
    times = []
    with open(f"{folder}/disk", "wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(512))
            before = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - before) * 1e3)
    print(f"fdatasync after 512 bytes: {statistics.median(times):.3g} ms in the median")


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


def leave(number, frame):
    """Ends the benchmark, and with it all that it started."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def prepare_process():
    """Programs that may be missing, the environment, open files, signals."""
    os.environ["PATH"] += ":/usr/sbin"  # where Debian has mariadbd
    os.environ.setdefault("PYTHONPATH", str(HERE))  # the other checkout needs the driver too
    for program in "wrk", "mariadbd", "mariadb-install-db":
        if not shutil.which(program):
            sys.exit(f"bench: no {program}: apt-get install wrk mariadb-server")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, leave)


def main():
    options = parse_arguments()
    prepare_process()
    cases = [case for case in CASES if re.search(options.only, case.name)]
    runs = {(case, checkout): [] for case in cases for checkout in (HERE, *options.beside)}
    order = []
    for turn in range(options.rounds):
        order += runs if turn % 2 == 0 else reversed(runs)
    folder = tempfile.TemporaryDirectory(prefix="idpot-bench-", dir="/var/tmp")
    with folder as path, contextlib.ExitStack() as stack:
        print_machine(path)
        print(f"{options.rounds} rounds of {options.seconds} s:", HERE, *options.beside)
        bench = Bench(Path(path), options.seconds, Mariadb(stack, Path(path, "mariadb")))
        for number, (case, checkout) in enumerate(order, 1):
            print(f"{number} of {len(order)}: {case.name}, {checkout}", file=sys.stderr)
            runs[case, checkout].append(bench.figures(case, checkout))
    print_table(runs)


if __name__ == "__main__":
    main()
