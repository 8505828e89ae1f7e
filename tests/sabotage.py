"""Negative controls: small sabotages of ftpcoord.py, each of which a check must notice.

    python tests/sabotage.py [WORD ...]     # those whose name contains a word; all without one

Each names a function, or an attribute of a class, and one small change inside it, whatever surrounds it.  Where that
no longer applies, or in two ways, it is an error here, so that the list keeps up with the source.  A changed copy
stands in for ftpcoord in a process of its own, which runs the simulation, or tests by name.  Printed is
sabotage -> caught by which check.  One that survives is a missing test.
"""

from __future__ import annotations

import ast
import concurrent.futures
import functools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "ftpcoord.py"


# -- where, and what --------------------------------------------------------------------------------------------------


PARSING = threading.Lock()  # Python 3.11 counts the depth of all threads' trees in one place


@functools.lru_cache(maxsize=2)
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


class Spot(NamedTuple):
    """What is replaced: bytes of the source, and by what."""

    start: int
    end: int
    new: str


class Place:
    """A function or an attribute of a class. `name` may leave out the class, if only one has it."""

    def __init__(self, source: str, name: str) -> None:
        self.source, self.name = source.encode(), name
        self._lines = [0]
        for line in self.source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        with PARSING:
            tree = parsed(source)
        found = [node for path, node in _named(tree) if f".{path}".endswith(f".{name}")]
        if len(found) != 1:
            raise LookupError(f"{len(found)} functions or attributes are named {name}")
        self.node = found[0]

    def start(self, node: ast.AST) -> int:
        return int(self._lines[node.lineno - 1] + node.col_offset)  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return int(self._lines[node.end_lineno - 1] + node.end_col_offset)  # type: ignore[attr-defined]

    def statements(self) -> list[ast.AST]:
        return [node for node in ast.walk(self.node) if isinstance(node, ast.stmt)]

    def innermost(self, nodes: Sequence[ast.AST], word: str) -> ast.AST:
        """That of these nodes whose text contains a word."""
        having = [node for node in nodes if word in ast.unparse(node)]
        inner = [n for n in having if not any(o is not n and o in ast.walk(n) for o in having)]
        if len(inner) != 1:
            raise LookupError(f"{self.name}: {len(inner)} places have {word!r}")
        return inner[0]

    def instead(self, node: ast.AST, new: str) -> Spot:
        return Spot(self.start(node), self.end(node), new)

    def before(self, node: ast.AST, statement: str) -> Spot:
        at = self.start(node)
        return Spot(at, at, f"{statement}\n{' ' * node.col_offset}")  # type: ignore[attr-defined]


def _named(node: ast.AST, above: str = "") -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        names = [getattr(child, "name", "")]
        if isinstance(child, (ast.Assign, ast.AnnAssign)):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        for name in filter(None, names):
            if isinstance(child, (ast.Assign, ast.AnnAssign, ast.FunctionDef)):
                yield above + name, child
            if isinstance(child, ast.ClassDef):
                yield from _named(child, f"{above}{name}.")


Edit = Callable[[Place], Spot]


def text(old: str, new: str) -> Edit:
    """The only such text, spaces and line ends aside."""
    pattern = r"\s*".join(map(re.escape, re.findall(r"\w+|\S", old))).encode()

    def edit(place: Place) -> Spot:
        found = list(re.compile(pattern).finditer(place.source, place.start(place.node), place.end(place.node)))
        if len(found) != 1:
            raise LookupError(f"{place.name}: {old!r} is there {len(found)} times")
        return Spot(*found[0].span(), new)

    return edit


def never(word: str, value: str = "False") -> Edit:
    """The innermost condition with this text is never true."""

    def edit(place: Place) -> Spot:
        conditions: list[ast.AST] = []
        for node in ast.walk(place.node):
            if isinstance(node, (ast.If, ast.While, ast.IfExp)):
                conditions.append(node.test)
            elif isinstance(node, ast.BoolOp):
                conditions += node.values
            elif isinstance(node, ast.comprehension):
                conditions += node.ifs
        return place.instead(place.innermost(conditions, word), value)

    return edit


def always(word: str) -> Edit:
    """The innermost condition with this text is always true."""
    return never(word, "True")


def drop(word: str, instead: str = "pass") -> Edit:
    """The innermost statement with this text is left out."""
    return lambda place: place.instead(place.innermost(place.statements(), word), instead)


def before(word: str, statement: str) -> Edit:
    """One more statement before the innermost one with this text."""
    return lambda place: place.before(place.innermost(place.statements(), word), statement)


def begin(statement: str) -> Edit:
    """One more statement before all else in a function."""

    def edit(place: Place) -> Spot:
        assert isinstance(place.node, ast.FunctionDef)
        return place.before(place.node.body[ast.get_docstring(place.node) is not None], statement)

    return edit


# -- the list ---------------------------------------------------------------------------------------------------------


class Sabotage(NamedTuple):
    """`check` is a pattern of what the simulation must say, or "test_file.py::test_name[...]": a test that must fail.

    `fix` are --fix arguments of the simulation, and `seed` its first world, so that it need not draw many.
    """

    name: str
    where: str
    edit: Edit
    check: str
    fix: Sequence[str] = ()
    seed: int = 1
    also: Sequence[tuple[str, Edit]] = ()  # more places, where one check backs the other


TWO = "two valid leases"
FILES = ("files=True", "suffix=''", "order='none'")
COMPANIONS = ("files=True", "suffix='.ok'", "order='none'")
ORDERED = ("files=True", "suffix=''", "order='strict'", "handler_failures=0.3")
AUDITED = (*FILES, "audit='on'")
SABOTAGES = (
    # -- the lease
    Sabotage(
        "leadership is a flag",
        "Lease.valid",
        text("self.remaining(now) > 0", 'self._latest > float("-inf")'),
        TWO,
        fix=["files=False"],
    ),
    Sabotage(
        "the margin is zero",
        "Timing.margin",
        begin("return 0.0"),
        f"{TWO}|nobody else active",
        fix=["spread=0.04"],
        seed=10,
    ),
    Sabotage(
        "the deadline counts from the reply",
        "Election._renew",
        text("extend(now + self.timing", "extend(self._clock() + self.timing"),
        TWO,
        seed=31,
    ),
    Sabotage(
        "the first deadline counts from the reply",
        "Election._stand_by",
        text("Lease(term, now + self.timing", "Lease(term, self._clock() + self.timing"),
        TWO,
        seed=6,
    ),
    Sabotage(
        "a renewal revives a lease that has run out",
        "Lease.extend",
        always("self.remaining() > 0"),
        "test_simulation.py::test_a_lease_that_has_run_out_stays_over",
    ),
    Sabotage("a lost token is ignored", "Election._renew", never("renewal.held"), TWO, seed=4),
    Sabotage(
        "an unknown outcome counts as a renewal",
        "Election._renew",
        drop(
            "self.store.renew",
            "try: renewal = self.store.renew(self.group, self.member, lease.term)\n"
            "        except DatabaseDown: renewal = Renewal(True)",
        ),
        TWO,
        seed=5,
    ),
    # -- identity and terms
    Sabotage(
        "the member id is the identity",
        "Election._free",
        always("view.term == self._own_term"),
        TWO,
        fix=["duplicates=True"],
    ),
    Sabotage(
        "a new process trusts an age at its second look",
        "ClockWatch.trusts",
        text("received + self.at_first", "received"),
        "test_election.py::test_a_process_that_starts_after_a_forward_step_waits_for_the_renewal_of_a_living_holder[0.0]",
    ),
    Sabotage(
        "what a listing that is not whole may hide is forgotten",
        "Poller._forget",
        text(" or not look.lacks(path)", ""),
        "test_not_now.py::test_a_pause_that_a_handler_asked_for_outlives_a_listing_of_its_folder_that_is_refused",
    ),
    Sabotage(
        "a vacant group is claimed with term 1",
        "Election._first",
        text("last + 1", "1"),
        "test_election.py::test_a_first_term_is_higher_than_any_that_the_ledger_knows",
    ),
    Sabotage(
        "a vanished token is claimed at once",
        "Election._first",
        never("_stood_still"),
        TWO,
        fix=["files=False", "tokens=True"],
    ),
    Sabotage(
        "a new member is not held up by what it finds without a token",
        "Election._first",
        text("> 0 or any(", "> 0 and any("),
        "test_election.py::test_a_member_that_starts_after_the_token_row_vanished_waits_for_the_lease_that_may_be_left",
    ),
    Sabotage(
        "the own id found without a token is no trace",
        "Election._first",
        drop(
            "self._at_start or",
            "rows = self._members(); at_start = {k: v for k, v in (self._at_start or {}).items() if k != self.member}",
        ),
        "test_election.py::test_a_member_that_starts_after_the_token_row_vanished_waits_for_the_lease_that_may_be_left",
    ),
    Sabotage(
        "terms begin anew when the token row was deleted",
        "Election._first",
        text("bool(last or traces)", "False"),
        "the token got term|was elected with term",
        fix=["files=False", "tokens=True"],
    ),
    Sabotage(
        "a heartbeat of NULL holds the token for ever",
        "Election._free",
        text("view.stamp is None", "not view.stamp"),
        "no active member|nobody else active",
        fix=["files=False"],
    ),
    Sabotage(
        "PostgreSQL: a takeover does not know NULL",
        "Database.WORDS",
        text(" OR :stamp IS NULL AND h.last_heartbeat IS NULL)", ")"),
        "test_dialects.py::test_a_heartbeat_of_null_has_no_age_and_is_one_that_does_not_move[own-postgresql]",
    ),
    # -- clocks
    Sabotage(
        "the database's clock is trusted at once", "Election._free", always("self._trusted"), TWO, fix=["steps=True"]
    ),
    Sabotage(
        "a release is known by its age",
        "Election._free",
        text("if view.released", "if view.released or (view.age or 0) > 365 * 86400"),
        TWO,
        fix=["steps=True"],
    ),
    Sabotage(
        "steps of the clock are forgotten at the next look",
        "ClockWatch.trusts",
        drop("+ self.distrust", "return False"),
        TWO,
        fix=["steps=True"],
        seed=21,
    ),
    Sabotage(
        "looks far apart are trusted",
        "ClockWatch.trusts",
        never("gap > self.longest_gap"),
        "test_simulation.py::test_steps_that_cancel_each_other_between_two_looks_are_not_trusted_away",
    ),
    Sabotage(
        "standing still counts from before a pause",
        "Election._stand_by",
        text("max(view.took, self._clock() - now)", "view.took"),
        "test_simulation.py::test_a_holder_does_not_stand_still_while_the_observer_was_stopped",
    ),
    Sabotage("standing still is half as long", "Timing.still_after", begin("return self.stale_after / 2"), TWO),
    # -- handing over
    Sabotage(
        "the lease is released before the work has stopped",
        "Member._beat",
        text("if state is State.STANDING_BY and", "if"),
        "releases its lease while work is running|outlived its lease",
    ),
    Sabotage(
        "a member stands again while work is running",
        "Member._beat",
        text("willing=state is State.STANDING_BY and", "willing="),
        "stands again while work",
        seed=4,
    ),
    Sabotage(
        "a member that released stands at once",
        "Election.release",
        drop("self._stand_from = "),
        "nobody else active after the release",
        fix=["files=False", "length=5"],
    ),
    Sabotage(
        "after an outage everybody stands at once",
        "Election._database_answers",
        drop("self._stand_from = "),
        "took the role of",
        fix=["files=False", "length=5"],
        seed=237,
    ),
    Sabotage(
        "nobody is told that the lease is over",
        "Member._guard",
        text("list(self.on_lost)", "()"),
        "outlived its lease",
        fix=FILES,
    ),
    # -- the log
    Sabotage(
        "an event waits until it is written",
        "Outbox.put",
        begin("return write() or True"),
        "waits for the log",
        fix=["files=False"],
    ),
    Sabotage(
        "the guard waits for the log before it cuts",
        "Member._guard",
        before("list(self.on_lost)", "log.flush(1e6)"),
        "outlived its lease",
        fix=FILES,
        seed=111,
    ),
    Sabotage(
        "warnings are dropped before what is said for information",
        "Outbox.full",
        text("level > logging.INFO", "level <= logging.INFO"),
        "(drops|keeps) a line",
        fix=FILES,
    ),
    Sabotage(
        "what was dropped is not told", "Outbox._write", never("self._dropped"), "tells of 0 of", fix=FILES, seed=14
    ),
    # -- files
    Sabotage(
        "a file is removed before it is done",
        "_done",
        before("made = self.ledger.write", "[self._act(row) for row in finished if action]"),
        "before it is done",
        fix=FILES,
    ),
    Sabotage(
        "a file is removed without another look at the lease",
        "_act_on",
        text("self.lease.check()\n        if", "if"),
        "acts past its deadline",
        fix=FILES,
        seed=33,
    ),
    Sabotage(
        "a file is removed without another look at it",
        "_act_on",
        drop("same = server.same", "same = True"),
        "which no handler has finished",
        fix=FILES,
    ),
    Sabotage(
        "a handler starts without another look at the lease",
        "_handle",
        drop("self.lease.check()"),
        "handler starts without a valid lease",
        fix=FILES,
        seed=196,
        also=[("_land", drop("self.lease.check()"))],
    ),
    Sabotage("attempts are not counted", "Ledger.claimed", text("work.attempts + 1", "1"), "is not told", fix=FILES),
    Sabotage(
        "what is done is handled again",
        "Selector.verdict",
        never("row.state == 'done'"),
        "which was done",
        fix=FILES,
        seed=2,
    ),
    Sabotage(
        "what is quarantined is handled again",
        "Selector.verdict",
        never("row.state == 'quarantined'"),
        "which is quarantined",
        fix=FILES,
        seed=18,
    ),
    # -- versions, listings, what a database refuses, what arrives late
    Sabotage(
        "the version is not looked at again after the fetch",
        "_job",
        text("write, found.entry, told)", "write)"),
        "another version's content|content of two versions|which no handler has finished|before it is done|again and is not told",
        fix=FILES,
        seed=9,
    ),
    Sabotage(
        "size alone tells versions apart",
        "same_version",
        always("a.mtime.partition('=')[0] == b.mtime"),
        "files are left over|another version's content|which no handler has finished",
        fix=FILES,
    ),
    Sabotage(
        "what an exact time was is not kept",
        "_job",
        never("'=' in entry.mtime"),
        "which was done|is not told|files are left over|which no handler has finished",
        fix=["files=True", "lines=True"],
        seed=6,
    ),
    Sabotage(
        "a claim forgets the exact time that the ledger has",
        "recognize",
        never("'=' in row.mtime"),
        "test_simulation.py::test_a_claim_that_a_dead_member_left_is_counted_also_where_the_display_of_times_has_moved_since",
    ),
    Sabotage(
        "a claim insists on an exact time that is no longer its file's",
        "Breaker.failure",
        never("FileChanged"),
        "test_versions.py::test_a_file_that_is_replaced_within_its_minute_after_it_failed_is_handled_as_it_is_now[mdtm]",
    ),
    Sabotage(
        "a minute that may not have been over is not asked for again",
        "recognize",
        never("self._doubt(row)[1] <= boot_clock()"),
        "files are left over",
        fix=["files=True", "lines=True"],
        seed=19,
    ),
    Sabotage(
        "an earlier version's doubt counts for the next one",
        "_job",
        drop("recognizer.forget"),
        "test_simulation.py::test_each_version_of_a_minute_is_handled_also_where_an_earlier_one_was_in_doubt",
    ),
    Sabotage(
        "what a refused folder does not list is forgotten",
        "Ledger.forget_unlisted",
        begin("lacks, retention = lambda path: True, 0.0"),
        "is not told|which was done",
        fix=["files=True", "refusals=0.1"],
        seed=7,
    ),
    Sabotage(
        "connections are shut and not reset",
        "set_linger",
        text("not orderly", "0"),
        "arrives after its lease|which no handler has finished",
        fix=["files=True", "server_loss=0.1"],
        seed=11,
    ),
    Sabotage(
        "a path that the database refuses is not tried in ASCII",
        "Ledger.write",
        never("plain < 2"),
        "files are left over",
        fix=FILES,
    ),
    # -- companions
    Sabotage(
        "a companion of an earlier version makes the next one ready",
        "Companions.verdict",
        never("is_older"),
        "an earlier version's",
        fix=COMPANIONS,
        seed=6,
    ),
    Sabotage(
        "a companion is not looked at before the action",
        "Companions.look",
        text("(shown is False if at_claim else bool(shown))", "False"),
        "newer than at the claim",
        fix=COMPANIONS,
        seed=14,
        also=[("Companions.look", text("bool(shown)", "(shown is not None)"))],
    ),
    Sabotage(
        "a companion is removed after its file",
        "_act_on",
        text("free + [row.path] * bool(same)", "[row.path] * bool(same) + free"),
        "before its companion",
        fix=COMPANIONS,
    ),
    Sabotage(
        "a companion is left when its file is gone",
        "_act_on",
        text("([], False) if same is False", "([], False) if not same"),
        "is left",
        fix=[*COMPANIONS, "server_loss=0.1"],
        seed=2,
    ),
    # -- order
    Sabotage(
        "the next one goes although the one before it failed",
        "Workers.hand_in",
        text("is_done(self._known(task.path), task.found.entry)", "True"),
        "is handled before",
        fix=ORDERED,
    ),
    Sabotage(
        "one that may not be taken up is passed over",
        "Order.line_up",
        text("held.add(key)", "continue"),
        "is handled before",
        fix=ORDERED,
    ),
    Sabotage(
        "one in work blocks nobody",
        "Order.line_up",
        text("for path in busy if", "for path in () if"),
        "of its key is in work|is handled before",
        fix=ORDERED,
        seed=10,
    ),
    # -- the audit trail
    Sabotage(
        "what a dead member had in work is not told",
        "Ledger.claim",
        text("outcome=lost_attempt(work.old)", "outcome=None"),
        "claimed -> claimed is told as nothing",
        fix=AUDITED,
    ),
    Sabotage(
        "a lost attempt whose file is gone is not told",
        "Ledger.forget_unlisted",
        text("retention, outcome=lost)", "retention)"),
        "claimed -> failed is told as nothing",
        fix=AUDITED,
        seed=58,
    ),
    Sabotage(
        "a file becomes done without its row in the trail",
        "_done",
        text(", outcome=item.outcome(row))", ")"),
        "claimed -> done is told as nothing",
        fix=AUDITED,
    ),
    Sabotage(
        "a failure has no row in the trail",
        "Poller._fail",
        text('None if failure.what == "not_now" else item.outcome(failure.row)', "None"),
        "claimed -> (failed|quarantined) is told as nothing",
        fix=[*AUDITED, "handler_failures=0.3"],
    ),
    Sabotage(
        "of what is written together the first one alone has its row in the trail",
        "Database._noted",
        text("any(change.outcome for change in changes)", "changes[0].outcome"),
        "test_audit.py::test_a_change_without_outcome_has_no_row_among_others_that_have[sqlite]",
    ),
    Sabotage(
        "an after-action that was written twice is told twice",
        "Database.WORDS",
        text(', "$acts = old_acts"', ""),
        "test_audit.py::test_an_after_action_of_a_quarantined_file_is_told_once_however_often_it_is_written"
        "[postgresql-delete]",
    ),
    Sabotage(
        "a move is told before it is made",
        "_act_on",
        before("for path in free", "self.ledger.change(row, row._replace(error='x'), None, Outcome('moved'))"),
        "done -> done is told as moved",
        fix=AUDITED,
    ),
    Sabotage(
        "the trail's row is written before the ledger's",
        "Database._noted",
        before("return self.execute", "told = told and self.execute(note, changes=changes, **values)"),
        "AssertionError",
        fix=AUDITED,
    ),
    Sabotage(
        "an operator's skip has no row in the trail",
        "Database._tell",
        text("self._noted(sql, note, changes, **values)", "self._noted(sql, note, [], **values)"),
        "the trail does not tell",
        fix=[*ORDERED, "audit='on'"],
    ),
    # -- SQL, which the simulation's database does not read
    Sabotage(
        "PostgreSQL: a takeover locks nothing",
        "Database.TAKE",
        text("$lock(:holder)", ""),
        "test_interleavings.py::test_a_takeover_waits_for_a_renewal_and_then_loses[READ COMMITTED-postgresql]",
    ),
    Sabotage(
        "PostgreSQL: a renewal does not lock the token",
        "Database.RENEW",
        text("$lock(:member)", ""),
        "test_interleavings.py::test_a_renewal_waits_for_a_takeover_and_then_loses[READ COMMITTED-postgresql]",
    ),
    Sabotage(
        "PostgreSQL: the ledger does not lock the token",
        "Database.WORDS",
        text("WHERE $held $update) mine", "WHERE $held) mine"),
        "test_interleavings.py::test_a_write_waits_for_a_takeover_and_then_changes_nothing"
        "[done-READ COMMITTED-postgresql]",
    ),
    Sabotage(
        "MySQL: a renewal does not look at the term",
        "MySQL.RENEW",
        text("$renewable", "t.group_id = :group AND t.task_id = :member"),
        "test_dialects.py::test_only_the_holder_renews_and_only_under_its_own_term[own-mariadb]",
    ),
    Sabotage(
        "MySQL: the winner does not ask whether it still is",
        "Database._seated",
        always("self.renew("),
        TWO,
        fix=["kind='mysql'"],
        seed=41,
    ),
    Sabotage(
        "SQLite: done is written without the term",
        "Database.WORDS",
        text("WHERE $held $update)", "WHERE t.group_id = :group AND t.task_id = :member $update)"),
        "test_dialects.py::test_nothing_is_written_without_the_token[sqlite]",
    ),
    Sabotage(
        "SQLite: a renewal does not look at the term",
        "Database.RENEW",
        text("$renewable", "t.group_id = :group AND t.task_id = :member"),
        "test_dialects.py::test_only_the_holder_renews_and_only_under_its_own_term[own-sqlite]",
    ),
    Sabotage(
        "SQLite: a standby beats under the holder's id",
        "Database.BEAT",
        text("AND task_id = :member)", "AND task_id = '')"),
        "test_dialects.py::test_a_standby_does_not_beat_under_the_holders_id[own-sqlite]",
    ),
    Sabotage(
        "SQLite: a takeover does not look at the term",
        "Database.TAKE",
        text("$seen", "t.group_id = :group AND t.task_id = :holder"),
        "test_dialects.py::test_a_takeover_needs_holder_and_term_to_be_as_seen[own-sqlite]",
    ),
    Sabotage(
        "SQLite: a takeover does not look at the stamp again",
        "Database.WORDS",
        text("(h.last_heartbeat = :stamp OR", "(1 = 1 OR h.last_heartbeat = :stamp OR"),
        "test_dialects.py::test_a_holder_that_renewed_after_the_look_is_not_replaced[own-sqlite]",
    ),
    Sabotage(
        "SQLite: a renewal leaves a stamp of the future alone",
        "Database.WORDS",
        text("THEN $shifted(h.last_heartbeat, $tick)", "THEN h.last_heartbeat"),
        "test_dialects.py::test_a_renewal_moves_the_stamp_even_when_the_stored_one_lies_in_the_future[own-sqlite]",
    ),
)


class Result(NamedTuple):
    sabotage: Sabotage
    caught: str  # by what; empty: it survived
    seconds: float


def changed(sabotage: Sabotage, source: str) -> str:
    """The sabotaged source text. LookupError if there is no such place, or more than one."""
    for where, edit in ((sabotage.where, sabotage.edit), *sabotage.also):
        try:
            spot = edit(Place(source, where))
        except LookupError as exc:
            raise LookupError(f"{sabotage.name}: {exc}") from None
        raw = source.encode()
        source = (raw[: spot.start] + spot.new.encode() + raw[spot.end :]).decode()
    return source


def tried(sabotage: Sabotage, source: str, ticks: int = 120_000) -> Result:
    """Runs the check against the sabotaged source."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sabotage-") as name:
        folder = Path(name)
        (folder / "ftpcoord.py").write_text(changed(sabotage, source), encoding="utf-8")
        environ = {
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{TESTS}",
            "FTPCOORD_MODULE": str(folder / "ftpcoord.py"),
        }
        if "::" in sabotage.check:
            command = [
                "-m",
                "pytest",
                "-x",
                "-q",
                "--no-header",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "-p",
                "no:hypothesispytest",  # which is imported at the end by whoever did not need it
                "-c",
                str(TESTS.parent / "setup.cfg"),
                "-o",
                f"pythonpath={folder} {TESTS}",
                "-o",
                "addopts=",
                str(TESTS / sabotage.check),
            ]
        else:
            command = [str(TESTS / "simulation.py"), "--ticks", str(ticks), "--seed", str(sabotage.seed), "--quiet"]
            for fixed in sabotage.fix:
                command += ["--fix", fixed]
        run = subprocess.run(
            ["timeout", "170", sys.executable, *command],
            env=environ,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    caught = ""
    if "::" in sabotage.check:
        if run.returncode == 1 and re.search(r"^FAILED ", run.stdout, re.MULTILINE):
            caught = sabotage.check
    else:
        found = re.search(r"^seed \d+, .*$", run.stdout, re.MULTILINE)
        if run.returncode == 1 and found and re.search(sabotage.check, found[0]):
            caught = f"simulation: {found[0]}"
    if not caught:
        sys.stderr.write(f"--- {sabotage.name}, expected {sabotage.check!r}:\n{run.stdout[-2000:]}\n")
    return Result(sabotage, caught, time.monotonic() - began)


def run_all(words: Sequence[str] = (), workers: int = 2) -> list[Result]:
    """Tries all whose name contains one of the words, and prints the table."""
    source = SOURCE.read_text(encoding="utf-8")
    chosen = [sabotage for sabotage in SABOTAGES if not words or any(word in sabotage.name for word in words)]
    wrong = []
    for sabotage in chosen:
        try:
            changed(sabotage, source)
        except LookupError as exc:
            wrong.append(f"{exc}\n")
    if wrong:
        raise LookupError("".join(wrong))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda sabotage: tried(sabotage, source), chosen))
    width = max(len(result.sabotage.name) for result in results)
    for name, caught, seconds in ((r.sabotage.name, r.caught, r.seconds) for r in results):
        print(f"{name:{width}} -> {caught or 'SURVIVED'} ({seconds:.1f} s)")
    print(f"{sum(bool(r.caught) for r in results)} of {len(results)} caught")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    results = run_all(sys.argv[1:] if arguments is None else arguments)
    return 0 if all(result.caught for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
