"""Tests of idpot on clusters, MariaDB's Galera and MySQL's Group Replication, of three nodes.

    python3 -m pytest contrib/test_clusters.py

Galera needs mariadb-server, galera-4 and rsync, Group Replication a MySQL server, which
IDPOT_TEST_MYSQLD names. The tests of the other are skipped with the reason.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_idpot import (
    Database, Load, at_once, between, eight_pots, emptied, free_port, healthy,
    hung, kill_connections, missing, needs_mysql, on_servers, run, wait_until)     # noqa


def on_nodes(*nodes, engine="InnoDB", timeout=4):
    """The settings for an idpot of root that prefers the first of the nodes."""
    return on_servers(*[node.port for node in nodes], engine=engine, timeout=timeout)


def two_on(run, nodes, pot):
    """Two idpots that prefer different nodes, and see the new pot."""
    a, b, c = nodes
    two = [run(**on_nodes(a, b, c)), run(**on_nodes(b, c, a))]
    two[0].create(pot)
    wait_until(lambda: two[1].answer("GET", f"/pot/{pot}")[0] == 204)
    return two


def counter_of(node, pot):
    return node.sql(f"SELECT id FROM idpot.pot_{pot}")[0][0]


def left_alone(load, b, c):
    """Kills two of three nodes under load: no ID is given from then on."""
    load.more()
    b.signal(signal.SIGKILL)
    c.signal(signal.SIGKILL)
    wait_until(load.refused, 20)
    since = time.monotonic()
    wait_until(lambda: load.statuses(since).total() >= 24, 20)
    assert load.statuses(since).keys() == {503}


def recover(load):
    """As load.recover(), when the cluster has sorted itself out."""
    since = time.monotonic()
    wait_until(lambda: load.served(since), 20)
    load.recover()


def assert_start_refused(server, reason):
    """The database was refused at the start, and the last line says why."""
    assert server.process.wait(10) == 1
    assert server.errors().endswith(f"{reason}\n")


# ---------------------------------------------------------------- MariaDB's Galera

class GaleraNode(Database):
    """A node of a cluster on loopback; node 0 founds it. Ports: three for each node."""
    PROVIDER = "/usr/lib/galera/libgalera_smm.so"

    def __init__(self, number, ports):
        group, transfer, snapshot = [f"127.0.0.1:{port}" for port in ports[number::3]]
        members = ",".join(f"127.0.0.1:{port}" for port in ports[:3])
        # The default of evs freezes the survivors for six seconds when a node dies.
        provider = (
            f"base_port={ports[number]};gmcast.listen_addr=tcp://{group};ist.recv_addr={transfer};"
            "evs.keepalive_period=PT0.3S;evs.suspect_timeout=PT1S;evs.inactive_timeout=PT3S;"
            "evs.inactive_check_period=PT0.3S;pc.recovery=false;gcache.size=16M")
        options = [
            "--wsrep-on=ON", f"--wsrep-provider={self.PROVIDER}", "--wsrep-cluster-name=idpot",
            f"--wsrep-cluster-address=gcomm://{members}", f"--wsrep-node-address={group}",
            f"--wsrep-node-name=n{number}", f"--wsrep-provider-options={provider}",
            "--wsrep-sst-method=rsync", f"--wsrep-sst-receive-address={snapshot}",
            "--innodb-autoinc-lock-mode=2", "--binlog-format=ROW",
            "--default-storage-engine=InnoDB"]
        founds = [] if number else ["--wsrep-new-cluster"]
        super().__init__(*options, *founds)
        self.options = options

    def answers(self):
        ready = "OFF" if "--wsrep-on=OFF" in self.options else "ON"
        return super().answers() and self.ready() == ready

    def ready(self):
        return self.sql("SHOW STATUS LIKE 'wsrep_ready'")[0][1]

    def writes(self):
        """Whether the cluster takes a write here; one that waits for a hung node hangs itself."""
        with contextlib.suppress(Exception):
            return self.sql("CREATE OR REPLACE TABLE idpot.probe (id INT)", read_timeout=5) == []


def outside(node):
    """A block in which new sessions of the node do not replicate."""
    return between(lambda: node.sql("SET GLOBAL wsrep_on = OFF"),
                   lambda: node.sql("SET GLOBAL wsrep_on = ON"))


@pytest.fixture(scope="module")
def galera_nodes():
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


@pytest.fixture
def galera(galera_nodes):
    """Three nodes, each of which takes writes, whatever the test before has done to them."""
    for node in galera_nodes:
        wait_until(node.writes, 90)
    return galera_nodes


class TestGalera:
    def test_myisam_is_refused_at_the_start(self, galera, run):
        server = run(**on_nodes(galera[0], engine="MyISAM"), wait=False)
        assert_start_refused(server, f"MySQL 127.0.0.1:{galera[0].port}: Engine: the Galera "
                                     "cluster replicates InnoDB only, not MyISAM")

    def test_myisam_is_refused_later(self, galera, run):
        with outside(galera[0]):
            server = run(ConnectString=galera[0].dsn())
        assert server.answer("POST", "/pot/create", "name=myisam") == (
            503, "Engine: the Galera cluster replicates InnoDB only, not MyISAM\n")

    def test_a_session_that_does_not_replicate_repeats_no_id(self, galera, run):
        a, b, _ = galera
        there = run(**on_nodes(b, timeout=2))
        there.create("apart")
        ids = [there.next("apart"), there.next("apart")]
        with outside(a):
            here = run(**on_nodes(a, timeout=2), Connections=1)     # a session that stays
        here.answer("GET", "/healthz")      # asks the server; otherwise it is believed for a second
        for _ in range(5):
            for server in (here, there):
                status, text = server.answer("POST", "/id/apart")
                if status == 200:
                    ids.append(int(text))
        assert sorted(set(ids)) == ids
        assert len(ids) >= 7

    def test_two_creates_at_once_on_two_nodes_make_one_pot(self, galera, run):
        one, two = [run(**on_nodes(node)) for node in galera[:2]]
        for number in range(20):
            pot = f"race{number}"
            answers = at_once(
                lambda: one.answer("POST", "/pot/create", f"name={pot}&min=100"),
                lambda: two.answer("POST", "/pot/create", f"name={pot}&min=200"))
            assert sorted(answers) == [(201, "Created new pot"), (409, f'pot "{pot}" exists\n')]
            made = 100 if answers[0][0] == 201 else 200
            for node in galera:
                wait_until(lambda: node.sql(f"SELECT id FROM idpot.pot_{pot}") == [(made,)], 3)

    def test_a_stray_table_of_myisam_costs_its_own_pot_only(self, galera, run):
        galera[0].sql("CREATE TABLE idpot.pot_stray (id BIGINT UNSIGNED) ENGINE = MyISAM")
        galera[0].sql("INSERT INTO idpot.pot_stray VALUES (5)")
        server = run(**on_nodes(galera[0]))
        server.create("sound")
        for last in (1, 2, 3):
            status, text = server.answer("POST", "/id/stray")
            assert status == 503
            assert text.startswith('the table of pot "stray" is MyISAM: the Galera cluster ')
            assert server.next("sound") == last
        galera[0].sql("DROP TABLE idpot.pot_stray")
        wait_until(lambda: len([text for _, text in server.events() if "stray" in text]) == 1)

    def test_a_node_that_is_not_ready_does_not_even_say_what_it_reads(self, galera, run):
        a, b, c = galera
        server = run(**on_nodes(c, timeout=1))
        server.create("cut", 41)
        with between(lambda: c.sql("SET GLOBAL wsrep_dirty_reads = ON"),    # it answers a SELECT
                     lambda: c.sql("SET GLOBAL wsrep_dirty_reads = OFF")):
            with hung(a), hung(b):
                wait_until(lambda: c.ready() == "OFF", 20)
                wait_until(lambda: not healthy(server))
                for method, target in [
                        ("GET", "/id/cut"), ("POST", "/id/cut"), ("GET", "/healthz")]:
                    status, text = server.answer(method, target)
                    assert status == 503
                    assert "the Galera node is not ready" in text
            wait_until(c.answers, 30)
        wait_until(lambda: healthy(server))
        assert server.next("cut") == 42

    def test_a_node_dies_and_joins_again_and_another_hangs(self, galera, run):
        a, b, c = galera
        with Load(two_on(run, galera, "cluster"), "cluster", patience=4) as load:
            load.more()
            a.signal(signal.SIGKILL)
            recover(load)
            a.start()
            recover(load)
            wait_until(a.writes, 60)    # without it and b the others have no quorum
            b.signal(signal.SIGSTOP)
            wait_until(c.writes, 60)    # how long the others wait for it is Galera's time
            recover(load)
            b.signal(signal.SIGCONT)
        load.verdict(counter_of(c, "cluster"))

    def test_a_writer_that_dies_and_is_started_outside_gives_no_id(self, galera, run):
        a, b, _ = galera
        with Load(two_on(run, galera, "outside"), "outside", patience=4) as load:
            load.more()
            a.signal(signal.SIGKILL)
            recover(load)
            a.options.append("--wsrep-on=OFF")
            a.start()
            kill_connections(b, "root")
            recover(load)
        a.signal(signal.SIGKILL)
        a.options.remove("--wsrep-on=OFF")
        a.start()
        load.verdict(counter_of(b, "outside"))

    def test_without_its_quorum_a_node_gives_no_id(self, galera, run):
        """The last test on these nodes: two of them stay dead."""
        a, b, c = galera
        with Load(two_on(run, galera, "minority"), "minority", patience=4) as load:
            left_alone(load, b, c)
            a.sql("SET GLOBAL wsrep_provider_pc_bootstrap = ON")    # the operator: they are dead
            recover(load)
        load.verdict(counter_of(a, "minority"))


# ---------------------------------------------------------------- MySQL's Group Replication

GROUP = "6a4e3b52-3f0d-4c0b-9d0e-6b1d706f7400"


class GroupNode(Database):
    """A MySQL server that is configured for a replication group on loopback, and outside of it.

    `ports` are those of the group's own traffic, one for each node.
    """

    def __init__(self, ports, number=0):
        seeds = ",".join(f"127.0.0.1:{port}" for port in ports)
        super().__init__(
            "--plugin-load-add=group_replication.so",
            f"--group-replication-group-name={GROUP}",
            "--group-replication-start-on-boot=OFF",
            f"--group-replication-local-address=127.0.0.1:{ports[number]}",
            f"--group-replication-group-seeds={seeds}",
            # By default the others wait 22 s before they do without a dead primary; so 7 s.
            "--group-replication-member-expel-timeout=0",
            "--gtid-mode=ON", "--enforce-gtid-consistency=ON",
            f"--server-id={number + 1}", "--report-host=127.0.0.1")

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
        return {port: state for port, state, _ in self.members()}.get(self.port)

    def takes_writes(self):
        return self.sql("SELECT @@super_read_only") == [(0,)]

    def take_writes(self):
        self.sql("SET GLOBAL super_read_only = OFF, GLOBAL read_only = OFF")

    def become_primary(self):
        self.sql("SELECT group_replication_set_as_primary(@@server_uuid)")


def agree(nodes):
    """Whether all are ONLINE, and say the same of each other."""
    views = [node.members() for node in nodes]
    return views == [views[0]] * 3 and [state for _, state, _ in views[0]] == ["ONLINE"] * 3


@pytest.fixture(scope="module")
def founder():
    """The only member of a group."""
    needs_mysql()
    node = GroupNode([free_port()])
    node.join(founds=True)
    yield node
    node.remove()


@pytest.fixture(scope="module")
def group_nodes():
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
def group(group_nodes):
    """Three members of a group; the first is the primary."""
    for node in group_nodes:
        if node.state() == "OFFLINE":
            node.join()
    wait_until(lambda: agree(group_nodes), 60)
    group_nodes[0].become_primary()
    return group_nodes


class TestGroupReplication:
    def test_outside_its_group_a_server_gives_no_id_and_serves_when_it_has_joined(
            self, founder, run):
        run(**on_nodes(founder)).create("outside", 41)
        founder.restart_outside()
        server = run(**on_nodes(founder, timeout=2))
        for method, target in [
                ("GET", "/healthz"), ("POST", "/id/outside"), ("GET", "/id/outside")]:
            status, text = server.answer(method, target)
            assert status == 503
            assert "its server is OFFLINE in the replication group" in text
        assert counter_of(founder, "outside") == 41
        founder.join(founds=True)
        wait_until(lambda: healthy(server))
        assert server.next("outside") == 42

    def test_a_member_asks_for_the_grant_that_it_needs(self, founder, run):
        founder.sql("CREATE USER clerk IDENTIFIED BY 'p'")
        founder.sql("GRANT SELECT, UPDATE, CREATE, INSERT ON idpot.* TO clerk")
        settings = {"ConnectString": founder.dsn(credentials="clerk:p"), "Engine": "InnoDB"}
        refused = run(**settings, wait=False)
        assert refused.process.wait(10) == 1
        assert re.fullmatch("idpot: MySQL .* 1142 .*SELECT command denied to user 'clerk'@.*"
                            "'replication_group_members'\n", refused.errors())
        founder.sql("GRANT SELECT ON performance_schema.replication_group_members TO clerk")
        server = run(**settings)
        server.create("granted")
        assert server.next("granted") == 1

    def test_myisam_is_refused_at_the_start(self, founder, run):
        server = run(**on_nodes(founder, engine="MyISAM"), wait=False)
        assert_start_refused(
            server, f"MySQL 127.0.0.1:{founder.port}: Engine: the replication group {GROUP} "
                    "replicates InnoDB only, not MyISAM")

    def test_a_server_that_joins_later_is_left_no_empty_myisam_table(self, founder, run):
        founder.restart_outside()
        founder.sql("UNINSTALL PLUGIN group_replication")
        server = run(**on_nodes(founder, engine="MyISAM", timeout=2))
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
        assert f"the replication group {GROUP} replicates InnoDB only, not MyISAM" in text

    def test_the_primary_changes_as_planned(self, group, run):
        a, b, c = group
        with Load(two_on(run, group, "planned"), "planned", patience=4) as load:
            load.more()
            for primary in (b, a):
                primary.become_primary()
                load.recover()
        load.verdict(counter_of(a, "planned"))
        assert load.statuses().keys() == {200}

    def test_a_secondary_that_was_made_writable_gives_no_id(self, group, run):
        """The group looks for no conflicts between a primary and such a one: IDs would repeat."""
        a, b, c = group
        b.take_writes()
        server = run(**on_nodes(b))
        assert not healthy(server)
        b.become_primary()
        wait_until(lambda: healthy(server))

    @pytest.mark.parametrize("number, state", [
        (signal.SIGKILL, "OFFLINE"),    # then it takes writes, with an older counter
        (signal.SIGSTOP, "ONLINE")])    # and believes in its office when it wakes
    def test_the_primary_is_lost_and_comes_back(self, number, state, group, run):
        a, b, c = group
        pot = state.lower()
        with Load(two_on(run, group, pot), pot, patience=4) as load:
            load.more()
            a.signal(number)
            wait_until(lambda: b.takes_writes() or c.takes_writes(), 60)
            recover(load)
            if number == signal.SIGKILL:
                a.start()
            else:
                a.signal(signal.SIGCONT)
            assert (a.state(), a.takes_writes()) == (state, True)
            primary = b if b.takes_writes() else c
            kill_connections(primary, "root")
            recover(load)
        load.verdict(counter_of(primary, pot))

    @pytest.mark.parametrize("leave", ["DO 0", "STOP GROUP_REPLICATION"])
    def test_an_old_primary_made_writable_by_hand_gives_no_id(self, leave, group, run):
        a, b, c = group
        emptied(a)
        server = eight_pots(run(**on_nodes(a, b, c)))
        b.become_primary()
        a.sql(leave)
        a.take_writes()
        other = run(**on_nodes(b, c, a))
        ids = []
        for _ in range(40):
            ids += at_once(lambda: server.next("p0"), lambda: other.next("p0"))
            assert len(set(ids)) == len(ids)

    def test_without_its_majority_a_primary_gives_no_id(self, group, run):
        """The last test on these nodes: two of them stay dead."""
        a, b, c = group
        servers = two_on(run, group, "minority")
        with Load(servers, "minority", patience=4) as load:
            left_alone(load, b, c)
            assert a.takes_writes()
            assert [healthy(server) for server in servers] == [False, False]
            a.signal(signal.SIGKILL)    # the operator: the others are dead
            a.start()
            a.join(founds=True)
            recover(load)
        load.verdict(counter_of(a, "minority"))
