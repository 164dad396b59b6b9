"""Tests of contrib/prove.py, above all with answers in which faults were planted.

    python3 -m pytest contrib/test_prove.py
"""

import collections
import http.server
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_idpot import HERE, MAX_ID, free_port, idpot, prove, run, wait_until

Answer = prove.Answer


# ---------------------------------------------------------------- the checker

# A thousand answers of up to ten IDs, four at a time.
CLEAN_RUN = [Answer(n, n + 3.5, 10 * n, 10 * n + n % 10) for n in range(1, 1001)]


@pytest.mark.parametrize("history", [
    pytest.param(CLEAN_RUN, id="clean"),
    pytest.param([*CLEAN_RUN, Answer(500, 501, 20, 20, status=503)], id="a 503 has no IDs"),
    pytest.param([Answer(0, 2, 2, 2), Answer(1, 3, 1, 1)], id="overlapping in time"),
    pytest.param([Answer(0, 1, 5, 9), Answer(1, 2, 1, 4)], id="asked for when the other ended"),
])
def test_checker_accepts(history):
    assert prove.check_history(history) == []


# A violation is written here as its kind and the places of the two answers in the history.
@pytest.mark.parametrize("history, violations", [
    pytest.param([Answer(0, 9, 1, 9), Answer(1, 9, 10, 10), Answer(1, 9, 10, 10)],
                 [("repeat", 1, 2)], id="duplicate"),
    pytest.param([Answer(0, 9, 1, 9), Answer(1, 9, 10, 10), Answer(2, 9, 9, 12)],
                 [("repeat", 0, 2), ("repeat", 2, 1)], id="overlapping batch"),
    pytest.param([Answer(0, 9, 1, 2**40), Answer(1, 9, 1000, 2000)],
                 [("repeat", 0, 1)], id="range inside a range"),
    pytest.param([Answer(0, 1, 7, 8), Answer(0, 5, 9, 9), Answer(2, 3, 5, 5), Answer(4, 5, 6, 6)],
                 [("order", 0, 2), ("order", 0, 3)], id="order inversion"),
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


# ---------------------------------------------------------------- the program

def run_prove(*arguments):
    """Runs contrib/prove.py; returns its exit code and what it printed."""
    command = [sys.executable, prove.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_wrong_with_idpot(run):
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
    server.stop()
    with open(f"{server.folder}/log") as file:
        requests = re.findall(r'"POST /id/proof(\?[a-z]+=)?', file.read())
    assert set(requests) == {"", "?count=", "?range="}


def test_what_is_not_served_while_idpot_is_killed_and_stopped_is_counted(run):
    server = run(listen=f"127.0.0.1:{free_port()}")
    url = f"http://127.0.0.1:{server.port}"
    with ThreadPoolExecutor(1) as pool:
        proof = pool.submit(run_prove, url, "--seconds=4", "--clients=8")
        for number in (signal.SIGKILL, signal.SIGTERM):
            wait_until(lambda: '"POST /id/prove' in server.errors())
            server.stop(number)
            os.truncate(server.stderr, 0)
            server.start()
        code, text = proof.result()
    assert code == 0, text
    assert re.search(r"; not served: connection lost [0-9]+ times\n", text)


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
def test_a_lie_is_found(lie, monkeypatch):
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
def test_three_violations_are_shown_and_how_many_more_there_are(last, line):
    with FaultyServer(lambda *_: last) as server:
        code, text = run_prove(server.url, "--clients=8")
    assert code == 1
    assert re.fullmatch(rf"(.*\n){{3}}({line}\n){{3}}and [0-9,]+ more\n", text), text


def test_the_same_ids_may_come_from_several_pots():
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
    (["http://127.0.0.1:1"], 1, "prove.py: http://127.0.0.1:1: [Errno 111] Connection refused\n"),
])
def test_arguments_that_are_wrong(arguments, code, message):
    got, text = run_prove(*arguments)
    assert got == code
    assert text.endswith(message)


def test_it_needs_the_token_and_any_answer(run):
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
