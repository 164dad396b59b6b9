"""idpot's speed beside the limits of the machine it runs on.

    python3 contrib/bench.py [--rounds 5] [--seconds 3] [--only 'myisam*,direct*'] [--json FILE] [--svg FILE]
                             [--python PROGRAM]

Starts a MariaDB of its own and idpot servers over it, drives them with wrk and ab, and ends them all. Each round
runs every case once, every second round backwards, so that the machine's drift meets all cases alike. A figure is
the median of the rounds (max, failed: the worst); a ratio is the median of the rounds' ratios.

The ceiling is the same idpot over a counter in memory. The direct loop is one client that does idpot's UPDATE on a
mysql-connector connection of its own, without HTTP. But for the cases that say so the access log is on, on disk.
--python names another Python, which needs mysql-connector-python too, for the cases that say so.
"""

import argparse
import collections
import contextlib
import fnmatch
import html
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib import metadata
from pathlib import Path

IDPOT = Path(__file__).resolve().parent.parent
PACKAGES = {"wrk": "wrk", "ab": "apache2-utils", "mariadb-install-db": "mariadb-server", "mariadbd": "mariadb-server"}


def output(command):
    """What the command, which is split at spaces, writes on stdout."""
    done = subprocess.run(command.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode == 0 else sys.exit(f"bench: {command} failed:\n{done.stdout}")


class Group:
    """A program and its children, in a process group of their own that ends with the stack."""

    def __init__(self, stack, command, folder, ready):
        """Returns when the pattern `ready` stands in what the program wrote; `found` is what it matched."""
        written = folder / "written"
        with open(written, "w") as file:
            self.process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, start_new_session=True)
        stack.callback(self.stop)
        deadline = time.monotonic() + 60
        while not (match := re.search(ready, written.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"bench: {command[0]} does not start:\n{written.read_text()[-2000:]}")
            time.sleep(0.05)
        self.found = match[0]

    def usage(self):
        """Processor seconds used so far, and megabytes resident now."""
        ticks = pages = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    ticks += int(fields[11]) + int(fields[12])
                    pages += int(fields[21])
        return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(20)
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Bench:
    """A MariaDB and the idpots that the cases need, and the ways to load them."""
    WRK_SCRIPT = """
        local requests = {}
        function init(args)
           for pot = 0, args[2] - 1 do requests[pot + 1] = wrk.format("POST", args[1] .. pot .. (args[3] or "")) end
        end
        function request() return requests[math.random(#requests)] end
        function done(summary, latency)
           local e = summary.errors
           io.write(string.format('{"rate": %f, "p50": %f, "p99": %f, "p99.9": %f, "max": %f, "failed": %d}',
              summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
              latency:percentile(99.9) / 1e3, latency.max / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
        end"""

    def __init__(self, stack, folder, seconds, cases, python):
        self.stack, self.folder, self.seconds, self.python = stack, folder, seconds, python
        (folder / "wrk.lua").write_text(self.WRK_SCRIPT)
        self.start_mariadb(folder / "mariadb")
        self.idpots = {name: self.start_idpot(name, max(case.pots for case in cases if case.server == name))
                       for name in dict.fromkeys(case.server for case in cases)}

    def start_mariadb(self, folder):
        """A new server with the database `test`, as mariadb-install-db makes it."""
        folder.mkdir()
        options = f"--no-defaults --datadir={folder}/data"
        if os.getuid() == 0:
            options += " --user=mysql"
            shutil.chown(folder, "mysql")
            self.folder.chmod(0o711)
        output(f"mariadb-install-db {options} --auth-root-authentication-method=normal")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        options += f" --socket={folder}/socket --pid-file={folder}/pid --port={self.port} --bind-address=127.0.0.1"
        self.mariadb = Group(self.stack, f"mariadbd {options} --skip-name-resolve".split(), folder, "ready for conn")

    def start_idpot(self, name, pots):
        """An idpot with the pots name0, name1, ..."""
        _, settings, patch, _, _ = SERVERS[name]
        folder = self.folder / name
        folder.mkdir()
        (folder / "idpot.cfg").write_text("[Server]\nLogFile = access.log\n" + settings.format(port=self.port))
        program = f"import sys\nsys.path.insert(0, {str(IDPOT)!r})\nimport idpot\n{patch}\nsys.exit(idpot.main())"
        python = self.python if name == "python" else sys.executable
        idpot = Group(self.stack, [python, "-Bc", program, "--config=idpot.cfg", "--listen=127.0.0.1:0"],
                      folder, r"(?<=listening on )http://[^\s/]+:\d+")
        for pot in range(pots):
            urllib.request.urlopen(f"{idpot.found}/pot/create", f"name={name}{pot}".encode()).close()
        return idpot

    def measure(self, case):
        """One run's figures: requests per second, milliseconds, percent of one processor, megabytes."""
        def used():
            return time.perf_counter(), idpot.usage()[0], self.mariadb.usage()[0], sum(os.times()[:4])

        idpot = self.idpots[case.server]
        before = used()
        sample = case.run(self, case)
        elapsed, *spent = (end - start for start, end in zip(before, used()))
        sample.update((name, seconds / elapsed * 100) for name, seconds in zip(("idpot", "mariadb", "client"), spent))
        return {**sample, "MB": idpot.usage()[1]}

    def wrk(self, case):
        """Keep-alive connections, a random pot per request, beside silent ones that did one request."""
        url = self.idpots[case.server].found
        with contextlib.ExitStack() as stack:
            for _ in range(case.silent):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", url.rpartition(":")[2]), 10))
                connection.sendall(b"GET /pot/none HTTP/1.1\r\nHost: bench\r\n\r\n")
                connection.recv(4096)
            text = output(f"wrk -t1 -c{case.clients} -d{self.seconds}s --timeout=10s -s{self.folder}/wrk.lua {url} -- "
                          f"/id/{case.server} {case.pots} {case.query}")
        figures = json.loads(text[text.rindex("{"):])
        return {**figures, "rate": figures["rate"] * case.ids}

    def ab(self, case):
        """A new connection for each request."""
        text = output(f"ab -q -l -n3000 -c{case.clients} -mPOST -e{self.folder}/ab.csv "
                      f"{self.idpots[case.server].found}/id/{case.server}0")
        percentile = dict(line.split(",") for line in (self.folder / "ab.csv").read_text().splitlines())
        counted = dict(re.findall(r"(Requests per second|Failed requests|Non-2xx responses|100%):? +([\d.]+)", text))
        return {"rate": float(counted["Requests per second"]), "p50": float(percentile["50"]),
                "p99": float(percentile["99"]), "max": float(counted["100%"]),
                "failed": int(counted["Failed requests"]) + int(counted.get("Non-2xx responses", 0))}

    def loop(self, case):
        """idpot's UPDATE, on one connection."""
        import mysql.connector  # here, since a missing one has been told by idpot
        update = ("UPDATE `pot_direct0` SET id = IF(id BETWEEN %d AND 18446744073709551614, "
                  "LAST_INSERT_ID(id + 1), id)")
        ms, last = [], 0
        with mysql.connector.connect(host="127.0.0.1", port=self.port, user="root", database="test", autocommit=True,
                                     collation="utf8mb4_general_ci") as connection:
            end = time.perf_counter() + self.seconds
            while (before := time.perf_counter()) < end:
                last = connection.cmd_query(update % last)["insert_id"]
                ms.append((time.perf_counter() - before) * 1e3)
        cut = statistics.quantiles(ms, n=1000)
        return {"rate": len(ms) / self.seconds, "p50": cut[499], "p99": cut[989], "p99.9": cut[998], "max": max(ms)}


MYISAM = "[Mysql]\nPort = {port}\nDbname = test\nEngine = MyISAM\n"
SQLITE = "[Sqlite]\nFile = idpot.db\n"
COUNTER = """
class Counter(idpot.SqliteStore):
    ids = {}
    def start(self): return "a counter in memory"
    def create(self, pot, low): self.ids[pot] = low
    def take(self, pot, count, marks): self.ids[pot] += count; return self.ids[pot]
    def close(self): pass
idpot.SqliteStore = Counter
"""

SERVERS = {  # name: title, settings, what is replaced in idpot, clients of wrk and of ab
    "direct": ("direct loop", MYISAM, "", (), ()),  # creates the loop's pot and is left alone
    "ceiling": ("ceiling", SQLITE, COUNTER, (1, 64), (1, 10)),
    "workers": ("MyISAM, Workers=2", "Workers = 2\n" + MYISAM, "", (64,), (10,)),
    "myisam": ("MyISAM", MYISAM, "", (1, 10, 16, 64, 256), (1, 10)),
    "nolog": ("MyISAM, no access log", MYISAM, "idpot.AccessLog.add = lambda self, *fields: None", (1, 64), ()),
    "python": ("MyISAM, other Python", MYISAM, "", (1, 64), (10,)),
    "innodb": ("InnoDB", MYISAM.replace("MyISAM", "InnoDB"), "", (1, 64), ()),
    "sqlite": ("SQLite", SQLITE, "", (1, 64), ()),
    "idle": ("idle server", MYISAM, "", (), ()),
}

# ids: that a request asks for; silent: connections that are open beside the clients'
Case = collections.namedtuple("Case", "name title server run clients pots query ids silent", defaults=(1, 1, "", 1, 0))
CASES = [
    Case("direct-c1", "direct loop, MyISAM", "direct", Bench.loop),
    *(Case(f"{server}-c{clients}", f"{title}, keep-alive c={clients}", server, Bench.wrk, clients)
      for server, (title, _, _, numbers, _) in SERVERS.items() for clients in numbers),
    *(Case(f"{server}-new{clients}", f"{title}, new each c={clients}", server, Bench.ab, clients)
      for server, (title, _, _, _, numbers) in SERVERS.items() for clients in numbers),
    Case("count", "MyISAM, count=1000 c=8, IDs", "myisam", Bench.wrk, 8, query="?count=1000", ids=1000),
    Case("pots10", "MyISAM, 10 pots, c=64", "myisam", Bench.wrk, 64, pots=10),
    Case("pots1000", "MyISAM, 1000 pots, c=64", "myisam", Bench.wrk, 64, pots=1000),
    Case("silent", "MyISAM, c=16 and 984 silent", "myisam", Bench.wrk, 16, silent=984),
    Case("idle", "idle server, MyISAM", "idle", lambda bench, case: time.sleep(bench.seconds) or {}),
]

TARGETS = [  # what, case, its figure, the case it is divided by, sign, limit
    ("MyISAM, keep-alive c=64, requests/s", "myisam-c64", "rate", None, ">=", 12000),
    ("  of the ceiling", "myisam-c64", "rate", "ceiling-c64", ">=", 0.6),
    ("  p99, ms", "myisam-c64", "p99", None, "<=", 15),
    ("  Workers=2, of one process", "workers-c64", "rate", "myisam-c64", ">=", 1.4),
    ("  InnoDB, of MyISAM", "innodb-c64", "rate", "myisam-c64", ">=", 0.8),
    ("  SQLite, of MyISAM", "sqlite-c64", "rate", "myisam-c64", ">=", 0.6),
    ("MyISAM, keep-alive c=256, slowest, ms", "myisam-c256", "max", None, "<=", 1000),
    ("MyISAM, keep-alive c=1, of the direct loop", "myisam-c1", "rate", "direct-c1", ">=", 0.5),
    ("MyISAM, new connections c=1, requests/s", "myisam-new1", "rate", None, ">=", 1500),
    ("MyISAM, new connections c=10, requests/s", "myisam-new10", "rate", None, ">=", 4500),
    ("MyISAM, count=1000 c=8, IDs/s", "count", "rate", None, ">=", 1e6),
    ("MyISAM, 16 busy of 1000, of 16 alone", "silent", "rate", "myisam-c16", ">=", 0.8),
    ("idle server, MB resident", "idle", "MB", None, "<=", 40),
    ("idle server, % CPU", "idle", "idpot", None, "<=", 0.5),
]


def median(samples, figure, over=None):
    """The figure over all rounds, or its ratio to the rounds of another case; "-" where it was not measured."""
    pairs = zip(samples, samples if over is None else over)
    values = [one[figure] / (1 if over is None else other[figure]) for one, other in pairs if figure in one]
    return (max if figure in ("max", "failed") else statistics.median)(values) if values else "-"


def shown(value):
    return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(cases, samples):
    """The lines of the table of all cases, and of the targets."""
    columns = ("p50", "p99", "p99.9", "max", "failed", "idpot", "mariadb", "client", "MB")
    rows = [("ms, % of one processor, MB resident", "per second", "range", "ceiling", "direct", *columns)]
    for case in cases:
        own = samples[case.name]
        rates = [sample["rate"] for sample in own if "rate" in sample]
        limits = (samples.get(name, []) for name in ("ceiling-" + case.name.rpartition("-")[2], "direct-c1"))
        rows.append((case.title, median(own, "rate"), f"{min(rates):,.0f}-{max(rates):,.0f}" if rates else "-",
                     *(median(own, "rate", limit) for limit in limits), *(median(own, column) for column in columns)))
    for title, rate, span, *cells in rows:
        yield f"{title:38}{shown(rate):>10}{span:>20}" + "".join(f"{shown(cell):>8}" for cell in cells)
    yield ""
    for text, name, figure, base, sign, limit in TARGETS:
        value = median(samples.get(name, []), figure, samples.get(base, []) if base else None)
        met = "" if value == "-" else "met" if (value >= limit if sign == ">=" else value <= limit) else "NOT MET"
        yield f"{text:44}{sign} {shown(limit):<11}{shown(value):>11}  {met}"


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img"><style>
text {{ font: 14px sans-serif; fill: #1f2328 }} .head {{ font-weight: bold }} .small {{ font-size: 12px }}
.page {{ fill: #fff }} rect {{ fill: #2f7ed8 }} .ceiling, .direct {{ fill: #b8bec6 }} path {{ stroke: #1f2328 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .page {{ fill: #0d1117 }} path {{ stroke: #e6edf3 }}
.ceiling, .direct {{ fill: #59626d }} }}</style><rect class="page" width="760" height="{height}"/>
<text class="head" x="16" y="28">IDs per second, one a request; grey: no database, no HTTP</text>{body}</svg>
"""
CHART = {"keep-alive, 64 clients": "-c64", "keep-alive, one client": "-c1", "new connections, 10 clients": "-new10"}


def chart(cases, samples, machine):
    """The comparison as an SVG: bars with figures and a line over the rounds' range; each group has its own scale."""
    parts, y = [], 36
    for heading, load in CHART.items():
        group = [case for case in cases if case.name.endswith(load)]
        rates = {case: [sample["rate"] for sample in samples[case.name]] for case in group}
        scale = 430 / max(map(max, rates.values()), default=1)
        parts.append(f'<text class="head" x="16" y="{y + 26}">{heading}</text>')
        y += 38
        for case in group:
            low, middle, high = (190 + scale * pick(rates[case]) for pick in (min, statistics.median, max))
            parts.append(f'<text x="180" y="{y + 14}" text-anchor="end">{SERVERS[case.server][0]}</text>'
                         f'<rect class="{case.server}" x="190" y="{y}" width="{middle - 190:.1f}" height="18"/>'
                         f'<path d="M{low:.1f} {y + 9}H{high:.1f}"/>'
                         f'<text x="{high + 8:.1f}" y="{y + 14}">{statistics.median(rates[case]):,.0f}</text>')
            y += 24
    parts += [f'<text class="small" x="16" y="{y + 18 * at}">{html.escape(line)}</text>'
              for at, line in enumerate(machine.splitlines(), 1)]
    return SVG.format(height=y + 50, body="\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description="Measures idpot beside the limits of this machine.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each run of wrk")
    parser.add_argument("--only", default="*", help="names or patterns of: " + " ".join(case.name for case in CASES))
    parser.add_argument("--json", help="file for all samples")
    parser.add_argument("--svg", help="file for a chart")
    parser.add_argument("--python", help="another Python to run idpot with as well")
    options = parser.parse_args()
    os.environ["PATH"] += ":/usr/sbin"  # where Debian has mariadbd
    for program, package in PACKAGES.items():
        if not shutil.which(program):
            sys.exit(f"bench: {program} is missing: apt-get install {package}")
    cases = [case for case in CASES if any(fnmatch.fnmatch(case.name, name) for name in options.only.split(","))
             and (case.server != "python" or options.python)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    samples = {case.name: [] for case in cases}
    # not /tmp: where that is memory, InnoDB and SQLite look faster than a disk lets them be
    with tempfile.TemporaryDirectory(prefix="idpot-bench-", dir="/var/tmp") as folder, contextlib.ExitStack() as stack:
        bench = Bench(stack, Path(folder), options.seconds, cases, options.python)
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
            for case in cases[::-1] if turn % 2 else cases:
                samples[case.name].append(bench.measure(case))
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        machine = (f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else os.uname().machine}, Linux "
                   f"{os.uname().release}, {output(f'stat -fc%T {folder}').strip()}, {options.rounds} rounds\n"
                   f"Python {sys.version.split()[0]}, MariaDB {output('mariadbd --version').split()[2]}, "
                   f"mysql-connector-python {metadata.version('mysql-connector-python')}"
                   + (f"; other Python: {output(f'{options.python} --version').split()[1]}" if options.python else ""))
    report = [machine, *table(cases, samples)]
    print(*report, sep="\n")
    everything = json.dumps({"report": report, "samples": samples}, indent=1)
    for path, text in (options.json, everything), (options.svg, chart(cases, samples, machine)):
        if path:
            Path(path).write_text(text)


if __name__ == "__main__":
    main()
