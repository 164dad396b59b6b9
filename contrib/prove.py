#!/usr/bin/env python3
"""Puts an idpot to the proof: no ID comes twice, each is greater than all that came before it.

    python3 contrib/prove.py http://127.0.0.1:8080
    python3 contrib/prove.py https://ids.example.org --pot proof --seconds 600 --token T

Many clients take IDs, single ones, by count= and by range=, over connections that they keep.
Meanwhile kill, stop, restart, cut off or fail over whatever the IDs have to survive: refusals and
lost connections are counted, and asked again. After the time, or at Ctrl-C, the figures follow:

    60 s, 64 clients, pot "prove" at http://127.0.0.1:8080
    1,245,678 answers (20,761/s) with 62,873,456 IDs; not served: 503 128 times
    the greatest ID is 62,873,456, the longest wait for an answer was 2.013 s
    kept: no ID came twice, each is greater than all that were answered before it was asked for

Exit codes: 0 as above; 1 where an answer breaks the promise (the two that contradict each other are
shown, and the proof ends there) and where there was no answer at all; 2 wrong usage. The pot is
created if it is not there; where an AdminToken is set, that needs this one. It needs only Python,
and runs on one machine: its clock says what came before what.
"""

import argparse
import collections
import contextlib
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from multiprocessing.connection import wait

PROCESSES = 4       # one reached 12,000 answers/s, four 21,000/s, on two cores beside the server
TIMEOUT = 20        # seconds without an answer, then a connection is lost; idpot answers within 10
PAUSE = 0.05        # seconds before a client that was not served asks again
REPORT = 0.2        # seconds between the reports of a process
WINDOW = 1.0        # seconds of answers that are checked at once
LOST = "connection lost"
WRONG = "wrong answer"

KEPT = "kept: no ID came twice, each is greater than all that were answered before it was asked for"
BROKEN = {
    "repeat": "BROKEN: an ID came twice",
    "order": "BROKEN: the first, which is greater, was answered before the second was asked for",
}

# What a client asks for, one of these at a time: the field and the number of IDs.
ASKS = [
    *[("", 1)] * 80,
    *[("count", count) for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20)],
    *[("range", count) for count in (1, 2, 10, 50, 100, 200, 500, 1000, 2000, 5000)],
]

# The times are time.monotonic(), the IDs are first to last, the status is 200 where there are any.
Answer = collections.namedtuple(
    "Answer",
    "start end first last status client",
    defaults=(0, 0, 200, 0),
)


# -------------------------------------------------------------------------------------- the checker

def check_history(history):
    """Returns the violations as (kind, earlier answer, later answer), in O(n log n).

    "repeat": an ID stands in both answers. "order": the later one was asked for after the earlier
    one had ended, and has a smaller ID.
    """
    answers = [answer for answer in history if answer.status == 200]
    return repeats(answers) + inversions(answers)


def repeats(answers):
    violations = []
    widest = Answer(0, 0, 0, -1)    # of those that begin with a smaller ID
    for answer in sorted(answers, key=lambda answer: (answer.first, answer.start)):
        if answer.first <= widest.last:
            violations.append(("repeat", widest, answer))
        if answer.last > widest.last:
            widest = answer
    return violations


def inversions(answers):
    violations = []
    greatest = Answer(0, 0, 0, -1)  # of those that had ended when the request began
    ends = sorted(answers, key=lambda answer: answer.end, reverse=True)
    for answer in sorted(answers):
        while ends and ends[-1].end < answer.start:
            ended = ends.pop()
            if ended.last > greatest.last:
                greatest = ended
        if answer.first < greatest.last:
            violations.append(("order", greatest, answer))
    return violations


class GrowingHistory:
    """Checks a history window by window, and keeps only what later answers can contradict.

    Once it is known that all answers to come were asked for after some moment, of all the answers
    that ended before it the one with the greatest ID is enough: an answer to come with an ID of a
    forgotten one, or with a smaller one, is not above that greatest ID either, and was asked for
    after it had been answered, which check_history() finds. So no violation is missed, and the
    memory is that of the answers that come during a window and the longest wait of a request.
    """

    def __init__(self):
        self.kept = []

    def add(self, answers, moment):
        """Returns the violations; whatever is still to come was asked for after the moment."""
        self.kept.extend(answers)
        violations = check_history(self.kept)
        past = [answer for answer in self.kept if answer.end < moment]
        self.kept = [answer for answer in self.kept if answer.end >= moment]
        if past:
            self.kept.append(max(past, key=lambda answer: answer.last))
        return violations


# -------------------------------------------------------------------------------------- the clients

class Target:
    """The server to connect to, and the requests."""

    def __init__(self, url, pot, token):
        parts = urllib.parse.urlsplit(url)
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        self.fields = f"Host: {parts.netloc.rpartition('@')[2]}\r\nContent-Length: 0\r\n"
        if token:
            self.fields += f"Authorization: Bearer {token}\r\n"

        self.requests = {}
        for field, count in ASKS:
            query = f"?{field}={count}" if field else ""
            self.requests[field, count] = self.request("POST", f"/id/{pot}{query}")

    def request(self, method, path):
        return f"{method} {self.path}{path} HTTP/1.1\r\n{self.fields}\r\n".encode()

    def connect(self):
        connection = socket.create_connection((self.host, self.port), TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.tls:
            return connection
        return ssl.create_default_context().wrap_socket(connection, server_hostname=self.host)


class Connection:
    """A connection to the target, made when it is needed, and kept."""
    STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")
    LENGTH = re.compile(rb"\r\nContent-Length: *([0-9]+)", re.IGNORECASE)
    CLOSE = re.compile(rb"\r\nConnection: *close", re.IGNORECASE)

    def __init__(self, target):
        self.target = target
        self.socket = None

    def ask(self, request):
        """Returns the status and the body of the answer; raises OSError where none came."""
        if not self.socket:
            self.socket = self.target.connect()
        try:
            self.socket.sendall(request)
            return self.answer()
        except OSError:
            self.close()
            raise

    def answer(self):
        data = self.receive()
        while b"\r\n\r\n" not in data:
            data += self.receive()
        head, _, body = data.partition(b"\r\n\r\n")
        status = self.STATUS.match(head)
        if not status:
            raise ConnectionError("the answer is not HTTP")
        length = self.LENGTH.search(head)
        while length and len(body) < int(length[1]):
            body += self.receive()
        if self.CLOSE.search(head):
            self.close()
        return int(status[1]), body

    def receive(self):
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data

    def close(self):
        if self.socket:
            self.socket.close()
            self.socket = None


class Client(threading.Thread):
    """Asks for IDs until it is told to stop; what it saw of each request goes into `seen`."""

    def __init__(self, target, number, seen, stopping):
        super().__init__(daemon=True)
        self.target = target
        self.number = number
        self.seen = seen
        self.stopping = stopping
        self.connection = Connection(target)
        self.asking_since = time.monotonic()    # what it is still to see began then or later

    def run(self):
        while not self.stopping.is_set():
            field, count = random.choice(ASKS)
            self.asking_since = time.monotonic()
            status, first = self.ask(field, count)
            end = time.monotonic()
            last = first + count - 1
            self.seen.append((self.asking_since, end, first, last, status, self.number))
            if status != 200:
                self.stopping.wait(PAUSE)
        self.connection.close()
        self.asking_since = math.inf

    def ask(self, field, count):
        """Returns 200 and the first ID, or another status, or a text, and 0."""
        try:
            status, body = self.connection.ask(self.target.requests[field, count])
        except OSError:
            return LOST, 0
        if status != 200:
            return status, 0
        digits = re.match(rb"[0-9]{1,20}", body)
        first = int(digits[0]) if digits else 0
        if body != right_body(field, count, first):
            asked = f"{field}={count}" if field else "one ID"
            return f"{WRONG} where {asked} was asked for: {body[:80]!r}", 0
        return 200, first


def right_body(field, count, first):
    """What is answered when IDs are asked for by count=, by range= or without (then it is one)."""
    if field == "range":
        return b"%d\t%d\n" % (first, first + count - 1)
    if field == "count":
        return b"".join(b"%d\n" % one for one in range(first, first + count))
    return b"%d" % first


def drive(pipe, target, numbers):
    """Runs clients in a process of their own and tells what they see, until the pipe says stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the first process
    parent = os.getppid()
    seen = collections.deque()
    stopping = threading.Event()
    clients = [Client(target, number, seen, stopping) for number in numbers]
    for client in clients:
        client.start()
    since = 0.0
    while since < math.inf and os.getppid() == parent:
        if pipe.poll(REPORT):
            pipe.recv()
            stopping.set()
        # First the moment, then what was seen: that holds all that ended before the moment.
        since = min(client.asking_since for client in clients)
        pipe.send((since, [seen.popleft() for _ in range(len(seen))]))


# ---------------------------------------------------------------------------------------- the proof

class Failure(Exception):
    """There can be no proof; the text says why."""


class Figures:
    """What was seen, in numbers."""

    def __init__(self):
        self.began = time.monotonic()
        self.statuses = collections.Counter()
        self.ids = 0
        self.greatest = 0
        self.longest = 0.0      # seconds from a request to its IDs

    def add(self, seen):
        for answer in seen:
            self.statuses[answer.status] += 1
            if answer.status == 200:
                self.ids += answer.last - answer.first + 1
                self.greatest = max(self.greatest, answer.last)
                self.longest = max(self.longest, answer.end - answer.start)

    def seconds(self):
        return time.monotonic() - self.began

    def __str__(self):
        answers = self.statuses[200]
        rate = answers / self.seconds()
        others = [
            f"{status} {count:,} times"
            for status, count in self.statuses.most_common()
            if status != 200
        ]
        return (
            f"{answers:,} answers ({rate:,.0f}/s) with {self.ids:,} IDs; "
            f"not served: {', '.join(others) or 'none'}"
        )


class Proof:
    """Runs the processes with the clients, and checks what they report."""

    def __init__(self, target, clients):
        self.figures = Figures()
        self.history = GrowingHistory()
        self.violations = []
        self.unchecked = []
        self.checked = 0.0      # the moment of the last check
        self.since = {}         # pipe of a process -> no earlier began what it has yet to tell
        processes = min(PROCESSES, clients)
        for first in range(processes):
            pipe, other_end = multiprocessing.Pipe()
            arguments = other_end, target, range(first, clients, processes)
            multiprocessing.Process(target=drive, args=arguments, daemon=True).start()
            other_end.close()
            self.since[pipe] = 0.0

    def run(self, seconds, stopped):
        """Returns when the time is over, or `stopped` is set, or something is wrong."""
        shown = 0.0
        told = False
        while min(self.since.values()) < math.inf and not self.wrong():
            self.receive()
            now = self.figures.seconds()
            if now > shown + 1:
                shown = now
                show_progress(f"{now:.0f} s: {self.figures}")
            if not told and (now > seconds or stopped.is_set()):
                told = True
                for pipe in self.since:
                    pipe.send("stop")

    def receive(self):
        running = [pipe for pipe, since in self.since.items() if since < math.inf]
        for pipe in wait(running):
            try:
                self.since[pipe], seen = pipe.recv()
            except EOFError:
                raise Failure("a process with clients has ended before its time") from None
            self.unchecked.extend(map(Answer._make, seen))
        moment = min(self.since.values())
        if moment > self.checked + WINDOW:
            self.violations += self.history.add(self.unchecked, moment)
            self.figures.add(self.unchecked)
            self.unchecked = []
            self.checked = moment

    def wrong(self):
        """Lines that show what breaks the promise: wrong answers, and pairs of answers."""
        lines = [status for status in self.figures.statuses if str(status).startswith(WRONG)]
        for kind, earlier, later in self.violations[:3]:
            lines.append(BROKEN[kind])
            lines.append(self.told(earlier))
            lines.append(self.told(later))
        return lines

    def told(self, answer):
        ids = str(answer.first)
        if answer.last > answer.first:
            ids += f" to {answer.last}"
        asked = answer.start - self.figures.began
        answered = answer.end - self.figures.began
        return (f"    {ids}, to client {answer.client}, which asked at {asked:.6f} s "
                f"and was answered at {answered:.6f} s")


def prepare(target, pot):
    """Creates the pot if it is not there."""
    connection = Connection(target)
    try:
        status, body = connection.ask(target.request("GET", f"/pot/{pot}"))
        if status == 404:
            status, body = connection.ask(target.request("POST", f"/pot/create?name={pot}"))
    except OSError as error:
        raise Failure(str(error)) from None
    connection.close()
    if status not in (201, 204, 409):
        text = body[:200].decode("ascii", "backslashreplace").strip()
        raise Failure(f'pot "{pot}" cannot be used: {status} {text}')


def show_progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------- command line

def http_url(text):
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return text
    raise argparse.ArgumentTypeError(f"{text!r} is not http://HOST:PORT or https://HOST:PORT")


def pot_name(text):
    if re.fullmatch("[A-Za-z0-9_-]{1,60}", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 60 characters of A-Z a-z 0-9 _ -")


def whole_number(text):
    if re.fullmatch("[0-9]{1,9}", text) and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def bearer_token(text):
    if re.fullmatch("[!-~]+", text):
        return text
    raise argparse.ArgumentTypeError("a token has no spaces and only ASCII characters")


def main(argv=None):
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="prove.py", description="Puts an idpot to the proof.")
    parser.add_argument("url", metavar="URL", type=http_url, help="http://HOST:PORT of the server")
    parser.add_argument(
        "--pot", metavar="NAME", type=pot_name, default="prove",
        help="to take the IDs from; it is created if it is not there (%(default)s)")
    parser.add_argument(
        "--seconds", metavar="N", type=whole_number, default=60,
        help="that the proof takes (%(default)s)")
    parser.add_argument(
        "--clients", metavar="N", type=whole_number, default=64,
        help="that ask at the same time (%(default)s)")
    parser.add_argument(
        "--token", metavar="T", type=bearer_token,
        help="bearer token, where one is set")
    arguments = parser.parse_args(argv)
    target = Target(arguments.url, arguments.pot, arguments.token)
    stopped = threading.Event()
    try:
        prepare(target, arguments.pot)
        proof = Proof(target, arguments.clients)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        proof.run(arguments.seconds, stopped)
        show_progress("")
        figures = proof.figures
        wrong = proof.wrong()
        if not figures.statuses[200] and not wrong:
            raise Failure(f"there was no answer with an ID; {figures}")
    except Failure as failure:
        print(f"prove.py: {arguments.url}: {failure}", file=sys.stderr)
        return 1
    print(
        f"{figures.seconds():.0f} s, {arguments.clients} clients, "
        f'pot "{arguments.pot}" at {arguments.url}'
    )
    print(figures)
    print(
        f"the greatest ID is {figures.greatest:,}, "
        f"the longest wait for an answer was {figures.longest:.3f} s"
    )
    print("\n".join(wrong or [KEPT]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
