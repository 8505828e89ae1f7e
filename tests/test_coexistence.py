"""Tables that another product uses too, or has used.

Its statements are those of ballerina/task 2.11, the coordination of the WSO2 Integrator, word for word.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import Database, Files, new_folder
from members import Crew, kinds, never

GROUP = "crew"


@pytest.fixture
def files(vsftpd_plain: servers.Vsftpd) -> Iterator[Files]:
    with new_folder("vsftpd", vsftpd_plain) as found:
        yield found


def execute(database: Database, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """A statement with `?` for its values, as JDBC has them."""
    for value in values:
        statement = statement.replace("?", "'" + str(value) + "'", 1)
    return database.execute(statement)


UPSERT_TOKEN = {
    "postgresql": "INSERT INTO token_holder(task_id, group_id, term) VALUES (?, ?, 1) ON CONFLICT (group_id) "
    "DO UPDATE SET task_id = EXCLUDED.task_id, term = token_holder.term + 1",
    "mysql": "INSERT INTO token_holder(task_id, group_id, term) VALUES (?, ?, 1) "
    "ON DUPLICATE KEY UPDATE task_id = VALUES(task_id), term = term + 1",
}
UPSERT_HEARTBEAT = {
    "postgresql": "INSERT INTO health_check(task_id, group_id, last_heartbeat) VALUES (?, ?, CURRENT_TIMESTAMP) "
    "ON CONFLICT (task_id, group_id) DO UPDATE SET last_heartbeat = EXCLUDED.last_heartbeat",
    "mysql": "INSERT INTO health_check(task_id, group_id, last_heartbeat) VALUES (?, ?, CURRENT_TIMESTAMP) "
    "ON DUPLICATE KEY UPDATE last_heartbeat = CURRENT_TIMESTAMP",
}
TABLES = {  # as its documentation has them, and as its example does
    "documentation": [
        "CREATE TABLE token_holder (group_id VARCHAR(128) NOT NULL PRIMARY KEY, task_id VARCHAR(128) NOT NULL, "
        "term BIGINT NOT NULL DEFAULT 1)",
        "CREATE TABLE health_check (task_id VARCHAR(128) NOT NULL, group_id VARCHAR(128) NOT NULL, "
        "last_heartbeat STAMP NOT NULL, PRIMARY KEY (task_id, group_id))",
    ],
    "example": [
        "CREATE TABLE token_holder (task_id VARCHAR(255), group_id VARCHAR(255) PRIMARY KEY, term INT NOT NULL)",
        "CREATE TABLE health_check (task_id VARCHAR(255), group_id VARCHAR(36), last_heartbeat STAMP, "
        "PRIMARY KEY (task_id, group_id))",
    ],
}


class Foreign:
    """A member of the other product, with a session in its own time zone; it beats while it lives."""

    def __init__(self, database: Database, name: str, hours: float = 0.0) -> None:
        self.database, self.name = database, name
        self.kind = "postgresql" if database.name == "postgresql" else "mysql"
        self.connection = database.connect()
        minutes = int(hours * 60)
        zone = f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"
        self._run(
            f"SET TIME ZONE INTERVAL '{zone}' HOUR TO MINUTE"
            if self.kind == "postgresql"
            else f"SET time_zone = '{zone}'"
        )
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _run(self, statement: str, *values: object) -> None:
        for value in values:
            statement = statement.replace("?", f"'{value}'", 1)
        self.connection.cursor().execute(statement)

    def take(self) -> float:
        """The token, whoever holds it; the moment before."""
        moment = time.time()
        with self._lock:
            self._run(UPSERT_TOKEN[self.kind], self.name, GROUP)
        return moment

    def beat(self) -> None:
        with self._lock:
            self._run(UPSERT_HEARTBEAT[self.kind], self.name, GROUP)

    def live(self) -> None:
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(0.3):
            self.beat()

    def die(self) -> float:
        """The moment of its last heartbeat, or just after."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        return time.time()

    def close(self) -> None:
        self.die()
        with contextlib.suppress(Exception):
            self.connection.close()


def make_tables(database: Database, which: str) -> None:
    stamp = "TIMESTAMP" if database.name == "postgresql" else "DATETIME"
    for statement in TABLES[which]:
        database.execute(statement.replace("STAMP", stamp))


@contextlib.contextmanager
def beside(database: Database, files: Files, folder: Path, which: str, hours: float) -> Iterator[tuple[Crew, Foreign]]:
    """Members of ours, on tables of the other product's, without a ledger of ours."""
    make_tables(database, which)
    foreign = Foreign(database, "urn:node-7", hours)
    try:
        with Crew(folder, database, files, tables=False, after="delete", ledger="off") as crew:
            yield crew, foreign
    finally:
        foreign.close()


@pytest.mark.parametrize(
    ("database", "which"),
    [("postgresql", "documentation"), ("postgresql", "example"), ("mysql", "documentation"), ("mariadb", "example")],
    indirect=["database"],
)
def test_a_foreign_member_that_seizes_the_token_is_noticed_at_the_next_renewal(
    database: Database, files: Files, tmp_path: Path, which: str
) -> None:
    """And when it has died, ours takes the group back, under a term of its own."""
    with beside(database, files, tmp_path, which, 0) as (crew, foreign):
        a = crew.start("a")
        a.wait("elected")
        files.put("x.csv", b"1")
        crew.handled("x.csv")
        servers.wait_for(lambda: not files.names(), 10, "the file to be done with, else it may be handled again")
        foreign.beat()
        foreign.live()
        seized = foreign.take()
        lost = a.wait("lost", since=seized)
        assert lost.at - seized <= crew.heartbeat + 1 and "another member" in lost.fields["reason"]
        files.put("y.csv", b"2")
        never(lambda: crew.names("begin") != ["x.csv"], 2 * crew.heartbeat, "handled without the token")
        assert crew.token() == ("urn:node-7", 2)
        died = foreign.die()
        elected = a.wait("elected", since=died)
        assert elected.fields["term"] == "3" and elected.at - died <= crew.liveness + 1
        crew.handled("x.csv", "y.csv")


@kinds("postgresql", "mysql")
def test_a_foreign_member_whose_clock_stamps_lie_in_the_future_is_left_alone_while_it_lives(
    database: Database, files: Files, tmp_path: Path
) -> None:
    """Its heartbeats are CURRENT_TIMESTAMP five and a half hours east of UTC. Once they stand still, it is dead."""
    with beside(database, files, tmp_path, "documentation", 5.5) as (crew, foreign):
        foreign.take()
        foreign.beat()
        foreign.live()
        a = crew.start("a")
        a.wait("standby", active="urn:node-7")
        assert crew.status()["active"] == "urn:node-7"
        never(lambda: a.events("elected"), crew.liveness + 1, "a living member's token was taken")
        died = foreign.die()
        elected = a.wait("elected", since=died)
        # By ours own clock, which began with the last move that it saw; a column of whole seconds hides moves.
        assert elected.at - died <= crew.liveness + 2
        files.put("x.csv", b"1")
        crew.handled("x.csv")


@kinds("postgresql", "mysql")
def test_a_foreign_member_whose_clock_stamps_lie_in_the_past_does_not_take_turns_with_ours(
    database: Database, files: Files, tmp_path: Path
) -> None:
    """Nobody can tell it from a dead one. Ours takes over once, and keeps the role while the other goes on beating."""
    with beside(database, files, tmp_path, "documentation", -5) as (crew, foreign):
        foreign.take()
        foreign.beat()
        foreign.live()
        a, b = crew.start("a"), crew.start("b")
        crew.elected(a, b, since=0)
        never(lambda: a.events("lost") + b.events("lost"), 3.0, "the role was lost")
        files.put("x.csv", b"1")
        crew.handled("x.csv")
        status = crew.status()
        assert status["term"] == 2
        assert {entry["member_id"]: entry["role"] for entry in status["members"]}["urn:node-7"] == "stale"


@kinds("postgresql", "mysql")
def test_rows_that_another_product_left_behind_are_taken_over(database: Database, files: Files, tmp_path: Path) -> None:
    """A token without a heartbeat, heartbeats of long ago and of tomorrow, and the rows of other groups."""
    with beside(database, files, tmp_path, "documentation", 0) as (crew, foreign):
        foreign.take()  # it died before its first heartbeat
        for name, group, stamp in (
            ("urn:node-1", GROUP, "2019-05-05 05:05:05"),
            ("urn:node-2", GROUP, "2037-05-05 05:05:05"),
            ("a", "other", "2019-05-05 05:05:05"),
            ("a", "another", "2037-05-05 05:05:05"),
        ):
            execute(
                database,
                "INSERT INTO health_check (task_id, group_id, last_heartbeat) VALUES (?, ?, ?)",
                name,
                group,
                stamp,
            )
        for group in ("other", "another"):
            execute(database, "INSERT INTO token_holder (group_id, task_id, term) VALUES (?, 'a', 7)", group)
        others = "SELECT * FROM token_holder WHERE group_id <> 'crew' ORDER BY group_id"
        beats = "SELECT * FROM health_check WHERE group_id <> 'crew' ORDER BY group_id"
        before = database.execute(others), database.execute(beats)
        started = time.time()
        a = crew.start("a")
        elected = a.wait("elected")
        assert elected.fields["term"] == "2" and elected.at - started <= crew.liveness + 3
        files.put("x.csv", b"1")
        crew.handled("x.csv")
        assert a.stop() == 0
        assert (database.execute(others), database.execute(beats)) == before, "another group's rows were touched"
