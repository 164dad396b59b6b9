#!/usr/bin/env python3
"""Puts an idpot to the proof: no ID comes twice, each is greater than all that came before it.

    python3 contrib/prove.py http://127.0.0.1:8080
    python3 contrib/prove.py https://ids.example.org --pots 200 --seconds 600 --token T

Many clients take IDs, single ones, by count= and by range=, over connections that they keep: with
--pots each from one of them at random, as a server may serve those together that wait. Meanwhile
kill, stop, restart, cut off or fail over whatever the IDs have to survive: refusals and lost
connections are counted, and asked again. After the time, or at Ctrl-C, the figures follow:

    60 s, 64 clients, pot "prove" at http://127.0.0.1:8080
    475,287 answers (7,881/s) with 42,443,871 IDs; not served: connection lost 1,870 times
    the greatest ID is 42,443,873, the longest wait for an answer was 0.320 s
    kept: no ID came twice, each is greater than all that were answered before it was asked for

Exit codes: 0 as above; 1 where an answer breaks the promise (it is none of the IDs 1 to 2^64-1, or
two contradict each other: they are shown, and the proof ends there) and where there was no answer
at all; 2 wrong usage. A pot that is not there is created; where an AdminToken is set, that needs
this one. It needs only Python, and runs on one machine: its clock says what came before what.
"""

import argparse
import collections
import contextlib
import http.client
import math
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.parse

TIMEOUT = 20    # seconds without an answer, then a connection is lost; idpot answers within 10
PAUSE = 0.05    # seconds before a client that was not served asks again
WINDOW = 1.0    # seconds of answers that are checked at once
MAX_ID = 2**64 - 1
LOST = "connection lost"
WRONG = "wrong answer"

KEPT = "kept: no ID came twice, each is greater than all that were answered before it was asked for"
BROKEN = {
    "repeat": "BROKEN: an ID came twice",
    "order": "BROKEN: the first is greater, and was answered before the second was asked for",
}

# What a client asks for, one of these at a time: the field and the number of IDs.
ASKS = [
    *[("", 1)] * 80,
    *[("count", count) for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20)],
    *[("range", count) for count in (1, 2, 10, 50, 100, 200, 500, 1000, 2000, 5000)],
]

# The times are time.monotonic(), the IDs are first to last, the status is 200 where there are any.
Answer = collections.namedtuple(
    "Answer", "start end first last status client pot", defaults=(200, 0, ""),
)


# -------------------------------------------------------------------------------------- the checker

def check_history(history):
    """Returns one pot's violations as (kind, earlier answer, later answer), in O(n log n).

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
    """Checks one pot's history window by window, and keeps only what later answers can contradict.

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
        self.kept += [answer for answer in answers if answer.status == 200]
        violations = check_history(self.kept)
        past = [answer for answer in self.kept if answer.end < moment]
        self.kept = [answer for answer in self.kept if answer.end >= moment]
        if past:
            self.kept.append(max(past, key=lambda answer: answer.last))
        return violations


# -------------------------------------------------------------------------------------- the clients

class Connection:
    """A connection to the server, made when it is needed, and kept."""

    def __init__(self, url, token):
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPConnection
        if parts.scheme == "https":
            kind = http.client.HTTPSConnection
        port = parts.port or kind.default_port
        self.connection = kind(parts.hostname, port, timeout=TIMEOUT)
        self.path = parts.path.rstrip("/")
        self.headers = {}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def ask(self, method, target):
        """Returns the status and the body of the answer; raises OSError where none came."""
        try:
            self.connection.request(method, self.path + target, headers=self.headers)
            response = self.connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise ConnectionError(error) from error

    def close(self):
        self.connection.close()


class Client(threading.Thread):
    """Asks for IDs until it is told to stop; what it saw of each request goes into `seen`."""

    def __init__(self, connection, pots, number, seen, stopped):
        super().__init__(daemon=True)
        self.connection = connection
        self.pots = pots
        self.number = number
        self.seen = seen
        self.stopped = stopped
        self.asking_since = time.monotonic()    # what it is still to see began then or later

    def run(self):
        while not self.stopped.is_set():
            pot = random.choice(self.pots)
            field, count = random.choice(ASKS)
            start = time.monotonic()
            self.asking_since = start
            status, first = self.ask(pot, field, count)
            end = time.monotonic()
            last = first + count - 1
            self.seen.append(Answer(start, end, first, last, status, self.number, pot))
            if status != 200:
                self.stopped.wait(PAUSE)
        self.connection.close()
        self.asking_since = math.inf

    def ask(self, pot, field, count):
        """Returns 200 and the first ID, or another status, or a text, and 0."""
        query = f"?{field}={count}" if field else ""
        try:
            status, body = self.connection.ask("POST", f"/id/{pot}{query}")
        except OSError:
            return LOST, 0
        if status != 200:
            return status, 0
        digits = re.match(rb"[0-9]{1,20}", body)
        first = int(digits[0]) if digits else 0
        valid = 1 <= first <= MAX_ID - count + 1
        if not valid or body != right_body(field, count, first):
            asked = query[1:] or "one ID"
            return f"{WRONG} where {asked} was asked for: {body[:80]!r}", 0
        return 200, first


def right_body(field, count, first):
    """What is answered when IDs are asked for by count=, by range= or without (then it is one)."""
    if field == "range":
        return b"%d\t%d\n" % (first, first + count - 1)
    if field == "count":
        return b"".join(b"%d\n" % one for one in range(first, first + count))
    return b"%d" % first


# ---------------------------------------------------------------------------------------- the proof

class Failure(Exception):
    """There can be no proof; the text says why."""


class Proof:
    """Runs the clients, checks what they saw, and counts it."""

    def __init__(self, connections, pots, stopped):
        self.began = time.monotonic()
        self.stopped = stopped
        self.seen = collections.deque()
        self.clients = []
        for number, connection in enumerate(connections):
            client = Client(connection, pots, number, self.seen, stopped)
            self.clients.append(client)
        self.histories = collections.defaultdict(GrowingHistory)    # of each pot
        self.broken = []        # a line for each violation
        self.statuses = collections.Counter()
        self.ids = 0
        self.greatest = 0
        self.longest = 0.0      # seconds from a request to its IDs

    def seconds(self):
        return time.monotonic() - self.began

    def run(self, seconds):
        """Returns when the time is over, or `stopped` is set, or something is wrong."""
        for client in self.clients:
            client.start()
        progress = Progress()
        checked = since = 0.0
        while since < math.inf and not self.broken:
            time.sleep(WINDOW / 5)
            if self.seconds() > seconds:
                self.stopped.set()
            # First the moment, then what was seen: that holds all that ended before the moment.
            since = min(client.asking_since for client in self.clients)
            if since > checked + WINDOW:
                checked = since
                self.check(since)
                progress.show(f"{self.seconds():.0f} s: {self.figures()}")
        progress.show("")

    def check(self, moment):
        """Checks and counts what was seen; all that is still to come began after the moment."""
        answers = [self.seen.popleft() for _ in range(len(self.seen))]
        by_pot = collections.defaultdict(list)
        for answer in answers:
            by_pot[answer.pot].append(answer)
            status = answer.status
            if str(status).startswith(WRONG):
                self.broken.append(status)
                status = WRONG
            self.statuses[status] += 1
            if status != 200:
                continue
            self.ids += answer.last - answer.first + 1
            self.greatest = max(self.greatest, answer.last)
            self.longest = max(self.longest, answer.end - answer.start)
        for pot, of_pot in by_pot.items():
            for kind, earlier, later in self.histories[pot].add(of_pot, moment):
                self.broken.append(f"{BROKEN[kind]}: {self.told(earlier)}; {self.told(later)}")

    def figures(self):
        answers = self.statuses[200]
        counts = self.statuses.most_common()
        refused = [f"{status} {count:,} times" for status, count in counts if status != 200]
        return (
            f"{answers:,} answers ({answers / self.seconds():,.0f}/s) with {self.ids:,} IDs; "
            f"not served: {', '.join(refused) or 'none'}"
        )

    def told(self, answer):
        asked = answer.start - self.began
        answered = answer.end - self.began
        times = f"from {asked:.6f} to {answered:.6f} s"
        return f"{answer.first} to {answer.last} of {answer.pot}, client {answer.client}, {times}"


class Progress:
    """On stderr: a line that is rewritten on a terminal, elsewhere a line each ten seconds."""

    def __init__(self):
        self.due = time.monotonic() + 10

    def show(self, text):
        if sys.stderr.isatty():
            columns = os.get_terminal_size(2).columns
            print(f"\r\033[K{text[:columns - 1]}", end="", file=sys.stderr, flush=True)
        elif text and time.monotonic() > self.due:
            self.due += 10
            print(text, file=sys.stderr, flush=True)


def prepare(connection, pot):
    """Creates the pot if it is not there."""
    try:
        status, body = connection.ask("GET", f"/pot/{pot}")
        if status == 404:
            status, body = connection.ask("POST", f"/pot/create?name={pot}")
    except OSError as error:
        raise Failure(error) from None
    if status not in (201, 204, 409):
        text = body[:200].decode("ascii", "backslashreplace").strip()
        raise Failure(f'pot "{pot}" cannot be used: {status} {text}')


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


def parse_arguments():
    parser = argparse.ArgumentParser(prog="prove.py", description="Puts an idpot to the proof.")
    parser.add_argument("url", metavar="URL", type=http_url, help="http://HOST:PORT of the server")
    parser.add_argument(
        "--pot", metavar="NAME", type=pot_name, default="prove",
        help="to take the IDs from; it is created if it is not there (%(default)s)")
    parser.add_argument(
        "--pots", metavar="N", type=whole_number, default=1,
        help="take them from as many, NAME-1 to NAME-N, at random")
    parser.add_argument(
        "--seconds", metavar="N", type=whole_number, default=60,
        help="that the proof takes (%(default)s)")
    parser.add_argument(
        "--clients", metavar="N", type=whole_number, default=64,
        help="that ask at the same time (%(default)s)")
    parser.add_argument(
        "--token", metavar="T", type=bearer_token, help="bearer token, where one is set")
    return parser.parse_args()


def main():
    """Returns the exit code."""
    options = parse_arguments()
    url = options.url
    pots = [options.pot]
    title = f'pot "{options.pot}"'
    if options.pots > 1:
        pots = [f"{options.pot}-{number}" for number in range(1, options.pots + 1)]
        title = f'pots "{pots[0]}" to "{pots[-1]}"'
    connections = [Connection(url, options.token) for _ in range(options.clients)]
    stopped = threading.Event()
    try:
        for pot in pots:
            prepare(connections[0], pot)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        proof = Proof(connections, pots, stopped)
        proof.run(options.seconds)
        if not proof.statuses[200] and not proof.broken:
            raise Failure(f"there was no answer with an ID; {proof.figures()}")
    except Failure as failure:
        print(f"prove.py: {url}: {failure}", file=sys.stderr)
        return 1
    print(f'{proof.seconds():.0f} s, {options.clients} clients, {title} at {url}')
    print(proof.figures())
    longest = f"{proof.longest:.3f} s"
    print(f"the greatest ID is {proof.greatest:,}, the longest wait for an answer was {longest}")
    print("\n".join(proof.broken[:3] or [KEPT]))
    if proof.broken[3:]:
        print(f"and {len(proof.broken) - 3:,} more")
    return 1 if proof.broken else 0


if __name__ == "__main__":
    sys.exit(main())
