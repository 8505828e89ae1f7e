"""Negative controls: small sabotages of ftpcoord.py, each of which a check must notice.

    python tests/sabotage.py [WORD ...]     # those whose name contains a word; all without one

Each replaces exact text of ftpcoord.py in a copy; text that is not found is an error here, so that the list keeps
up with the source.  The copy stands in for ftpcoord in a process of its own, which runs the simulation, or tests
by name.  Printed is sabotage -> caught by which check.  One that survives is a missing test.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "ftpcoord.py"


class Sabotage(NamedTuple):
    """`old` becomes `new`: the only place, or the first one below the line that begins with `below`.

    `check` is a pattern of what the simulation must say, or "test_file.py::test_name[...]": a test that must fail.
    `fix` are --fix arguments of the simulation, and `seed` its first world, so that it need not draw many.
    """

    name: str
    old: str
    new: str
    check: str
    below: str = ""
    also: tuple[str, str] = ("", "")  # a second place, where one check backs the other
    fix: Sequence[str] = ()
    seed: int = 1


TWO = "two valid leases"
SABOTAGES = (
    # -- the lease
    Sabotage(
        "leadership is a flag",
        "return self.remaining(now) > 0 and not self._handing_over",
        "return self._deadline != ENDED",
        TWO,
        fix=["files=False"],
    ),
    Sabotage(
        "the margin is zero",
        "return 0.2 + self.stale_after / 10",
        "return 0.0",
        f"{TWO}|nobody else active",
        fix=["spread=0.04"],
    ),
    Sabotage(
        "the deadline counts from the reply",
        "lease.extend(now + self.timing",
        "lease.extend(self._clock() + self.timing",
        TWO,
    ),
    Sabotage(
        "the first deadline counts from the reply",
        "Lease(term, now + self.timing",
        "Lease(term, self._clock() + self.timing",
        TWO,
    ),
    Sabotage(
        "a renewal revives a lease that has run out",
        "        if self.remaining() > 0:\n            self._deadline = max",
        "        if True:\n            self._deadline = max",
        "test_simulation.py::test_a_lease_that_has_run_out_stays_over",
    ),
    Sabotage("a lost token is ignored", "if not renewal.held:", "if False:", TWO),
    Sabotage(
        "an unknown outcome counts as a renewal",
        "        renewal = self.store.renew(self.group, self.member, lease.term)\n",
        "        try:\n            renewal = self.store.renew(self.group, self.member, lease.term)\n"
        "        except DatabaseDown:\n            renewal = Renewal(True)\n",
        TWO,
    ),
    # -- identity and terms
    Sabotage(
        "the member id is the identity",
        "view.mine and view.term == self._own_term:",
        "view.mine:",
        TWO,
        fix=["duplicates=True"],
    ),
    Sabotage(
        "a vacant group is claimed with term 1",
        "last + 1)",
        "1)",
        "test_election.py::test_a_first_term_is_higher_than_any_that_the_ledger_knows",
    ),
    Sabotage(
        "a vanished token is claimed at once",
        "if held and not self._stood_still:",
        "if False:",
        TWO,
        fix=["files=False", "tokens=True"],
    ),
    Sabotage(
        "a new member is not held up by what it finds without a token",
        "held = self._seen_term > 0 or any(",
        "held = self._seen_term > 0 and any(",
        "test_election.py::test_a_member_that_starts_after_the_token_row_vanished_waits_for_the_lease_that_may_be_left",
    ),
    Sabotage(
        "the own id found without a token is no trace",
        "        found = self._found or {}\n",
        "        found = dict(self._found or {})\n        found.pop(self.member, None)\n",
        "test_election.py::test_a_member_that_starts_after_the_token_row_vanished_waits_for_the_lease_that_may_be_left",
    ),
    Sabotage(
        "terms begin anew when the token row was deleted",
        "            last = max(last, int(view.now - min(ages)))\n",
        "",
        "the token got term|was elected with term",
        fix=["files=False", "tokens=True"],
    ),
    Sabotage(
        "a heartbeat of NULL holds the token for ever",
        'return "absent" if view.stamp is None else "still"',
        'return "absent" if not view.stamp else "still"',
        "no active member|nobody else active",
        fix=["files=False"],
    ),
    Sabotage(
        "PostgreSQL: a takeover does not know NULL",
        " OR :stamp IS NULL AND h.last_heartbeat IS NULL)",
        ")",
        "test_dialects.py::test_a_heartbeat_of_null_has_no_age_and_is_one_that_does_not_move[own-postgresql]",
    ),
    # -- clocks
    Sabotage(
        "the database's clock is trusted at once", "self._trusted and view.age >", "view.age >", TWO, fix=["steps=True"]
    ),
    Sabotage(
        "a release is known by its age",
        "if view.released:",
        "if view.released or (view.age or 0) > 365 * 86400:",
        TWO,
        fix=["steps=True"],
    ),
    Sabotage(
        "steps of the clock are forgotten at the next look",
        "self._trusted_from = received + self.distrust",
        "return False",
        TWO,
        fix=["steps=True"],
    ),
    Sabotage(
        "looks far apart are trusted",
        " or gap > self.longest_gap",
        "",
        "test_simulation.py::test_steps_that_cancel_each_other_between_two_looks_are_not_trusted_away",
    ),
    Sabotage(
        "standing still counts from before a pause",
        "max(view.took, self._clock() - now)",
        "view.took",
        "test_simulation.py::test_a_holder_does_not_stand_still_while_the_observer_was_stopped",
    ),
    Sabotage("standing still is half as long", "now - self._still[1] >=", "2 * (now - self._still[1]) >=", TWO),
    # -- handing over
    Sabotage(
        "the lease is released before the work has stopped",
        "if state is State.STANDING_BY and (wanted.stop or",
        "if (wanted.stop or",
        "releases its lease while work is running|outlived its lease",
    ),
    Sabotage(
        "a member stands again while work is running",
        "willing=state is State.STANDING_BY and not wanted.stop",
        "willing=True",
        "stands again while work",
    ),
    Sabotage(
        "a member that released stands at once",
        "        self._stand_from = now + 2 * self.timing.heartbeat\n",
        "",
        "nobody else active after the release",
        fix=["files=False", "length=5"],
    ),
    Sabotage(
        "after an outage everybody stands at once",
        "now + 2 * self.timing.heartbeat + self.timing.call_timeout)",
        "now)",
        "took the role of",
        fix=["files=False", "length=5"],
    ),
    Sabotage(
        "nobody is told that the lease is over",
        "for function in list(self.on_lost):",
        "for function in ():",
        "outlived its lease",
        fix=["files=True"],
    ),
    # -- files
    Sabotage(
        "a file is removed before it is done",
        "        made = self.ledger.write([Change(item.row, row)",
        "        for row in finished:\n            if action:\n                self._act(row)\n"
        "        made = self.ledger.write([Change(item.row, row)",
        "before it is done",
        fix=["files=True"],
    ),
    Sabotage(
        "a file is removed without another look at the lease",
        "            self.lease.check()\n            if same is False or",
        "            if same is False or",
        "acts past its deadline",
        below="    def _act_on",
        fix=["files=True"],
    ),
    Sabotage(
        "a file is removed without another look at it",
        'same = server.same(row.path, Entry(posixpath.basename(row.path), "file", row.size, row.mtime))',
        "same = True",
        "which no handler has finished",
        fix=["files=True"],
    ),
    Sabotage(
        "a handler starts without another look at the lease",
        "                self.lease.check()\n                if not item.work.delivered",
        "                if not item.work.delivered",
        "handler starts without a valid lease",
        fix=["files=True"],
        also=("        self.lease.check()\n        with self.progress.handling(", "        with self.progress.handling("),
        seed=165,
    ),
    Sabotage(
        "attempts are not counted",
        "work.attempts + 1, work.failures",
        "1, work.failures",
        "is not told",
        fix=["files=True"],
    ),
    Sabotage(
        "what is done is handled again",
        'row.state == "done":\n            return "skip"',
        'row.state == "":\n            return "skip"',
        "which was done",
        fix=["files=True"],
    ),
    Sabotage(
        "what is quarantined is handled again",
        'row.state == "quarantined":\n            return "skip"',
        'row.state == "":\n            return "skip"',
        "which is quarantined",
        fix=["files=True"],
    ),
    # -- versions, listings, what a database refuses, what arrives late
    Sabotage(
        "the version is not looked at again after the fetch",
        "found.entry.size, write, found.entry, told)",
        "found.entry.size, write)",
        "another version's content|content of two versions|which no handler has finished",
        fix=["files=True"],
    ),
    Sabotage(
        "size alone tells versions apart",
        "    if a.size != b.size or a.mtime == b.mtime:\n",
        "    if True:\n",
        "files are left over|another version's content|which no handler has finished",
        fix=["files=True"],
    ),
    Sabotage(
        "what an exact time was is not kept",
        "                item.mtime = entry.mtime +",
        "                _ = entry.mtime +",
        "which was done|is not told|files are left over|which no handler has finished",
        fix=["files=True", "lines=True"],
    ),
    Sabotage(
        "a claim forgets the exact time that the ledger has",
        'elif same and "=" in row.mtime',
        "elif False",
        "test_simulation.py::test_a_claim_that_a_dead_member_left_is_counted_also_where_the_display_of_times_has_moved_since",
    ),
    Sabotage(
        "a claim insists on an exact time that is no longer its file's",
        "if isinstance(exc, FileChanged):  # the next",
        "if False:  # the next",
        "test_versions.py::test_a_file_that_is_replaced_within_its_minute_after_it_failed_is_handled_as_it_is_now[mdtm]",
    ),
    Sabotage(
        "a minute that may not have been over is not asked for again",
        'row.mtime.endswith("~") and self._doubt(row)[1] <= now',
        "False",
        "files are left over",
        fix=["files=True", "lines=True"],
    ),
    Sabotage(
        "an earlier version's doubt counts for the next one",
        "        self.recognizer.forget(found.path)\n",
        "",
        "test_simulation.py::test_each_version_of_a_minute_is_handled_also_where_an_earlier_one_was_in_doubt",
    ),
    Sabotage(
        "what a refused folder does not list is forgotten",
        "self.ledger.forget_unlisted(listed, retention, look.lacks,",
        "self.ledger.forget_unlisted(listed, 0.0, lambda path: True,",
        "is not told|which was done",
        fix=["files=True", "refusals=0.1"],
    ),
    Sabotage(
        "connections are shut and not reset",
        "struct.pack(form, not orderly, 0))",
        "struct.pack(form, 0, 0))",
        "arrives after its lease|which no handler has finished",
        fix=["files=True", "server_loss=0.1"],
    ),
    Sabotage(
        "a path that the database refuses is not tried in ASCII",
        "            if changes[0].plain < 2:",
        "            if False:",
        "files are left over",
        fix=["files=True"],
    ),
    # -- SQL, which the simulation's database does not read
    Sabotage(
        "PostgreSQL: a takeover locks nothing",
        "$lock(:holder) UPDATE token_holder AS t SET task_id = :member, term = t.term + 1\n",
        "UPDATE token_holder AS t SET task_id = :member, term = t.term + 1\n",
        "test_interleavings.py::test_a_takeover_waits_for_a_renewal_and_then_loses[READ COMMITTED-postgresql]",
    ),
    Sabotage(
        "PostgreSQL: a renewal does not lock the token",
        "$lock(:member) UPDATE health_check",
        "UPDATE health_check",
        "test_interleavings.py::test_a_renewal_waits_for_a_takeover_and_then_loses[READ COMMITTED-postgresql]",
    ),
    Sabotage(
        "PostgreSQL: the ledger does not lock the token",
        '"share": "FOR SHARE"',
        '"share": ""',
        "test_interleavings.py::test_a_write_waits_for_a_takeover_and_then_changes_nothing"
        "[done-READ COMMITTED-postgresql]",
    ),
    Sabotage(
        "MySQL: a renewal does not look at the term",
        'WHERE $held"""\n    RELEASE',
        'WHERE t.group_id = :group AND t.task_id = :member"""\n    RELEASE',
        "test_dialects.py::test_only_the_holder_renews_and_only_under_its_own_term[own-mariadb]",
    ),
    Sabotage(
        "MySQL: the winner does not ask whether it still is",
        "return term if term and self.renew(group, member, term).held else None",
        "return term or None",
        TWO,
        fix=["kind='mysql'"],
    ),
    Sabotage(
        "SQLite: done is written without the term",
        "$held $share)",
        "t.group_id = :group AND t.task_id = :member $share)",
        "test_dialects.py::test_nothing_is_written_without_the_token[sqlite]",
    ),
    Sabotage(
        "SQLite: a renewal does not look at the term",
        "$held)\n        RETURNING",
        "t.group_id = :group AND t.task_id = :member)\n        RETURNING",
        "test_dialects.py::test_only_the_holder_renews_and_only_under_its_own_term[own-sqlite]",
    ),
    Sabotage(
        "SQLite: a standby beats under the holder's id",
        "AND task_id = :member)\n            $or_update last_heartbeat =\n",
        "AND task_id = '')\n            $or_update last_heartbeat =\n",
        "test_dialects.py::test_a_standby_does_not_beat_under_the_holders_id[own-sqlite]",
    ),
    Sabotage(
        "SQLite: a takeover does not look at the term",
        "$seen AND EXISTS",
        "t.group_id = :group AND t.task_id = :holder AND EXISTS",
        "test_dialects.py::test_a_takeover_needs_holder_and_term_to_be_as_seen[own-sqlite-stale]",
    ),
    Sabotage(
        "SQLite: a takeover does not look at the stamp again",
        "(h.last_heartbeat = :stamp OR",
        "(1 = 1 OR h.last_heartbeat = :stamp OR",
        "test_dialects.py::test_a_holder_that_renewed_after_the_look_is_not_replaced[own-sqlite]",
    ),
    Sabotage(
        "SQLite: a renewal leaves a stamp of the future alone",
        "THEN $shifted(h.last_heartbeat, $tick)",
        "THEN h.last_heartbeat",
        "test_dialects.py::test_a_renewal_moves_the_stamp_even_when_the_stored_one_lies_in_the_future[own-sqlite]",
    ),
)


class Result(NamedTuple):
    sabotage: Sabotage
    caught: str  # by what; empty: it survived
    seconds: float


def changed(sabotage: Sabotage, source: str) -> str:
    """The sabotaged source text. LookupError if there is no such place, or more than one."""
    start = 0
    if sabotage.below:
        start = source.find(f"\n{sabotage.below}") + 1
        if start == 0:
            raise LookupError(f"{sabotage.name}: there is no line {sabotage.below!r} any more")
    elif source.count(sabotage.old) > 1:
        raise LookupError(f"{sabotage.name}: {sabotage.old!r} is there {source.count(sabotage.old)} times")
    at = source.find(sabotage.old, start)
    if at < 0:
        raise LookupError(f"{sabotage.name}: {sabotage.old!r} is not there any more")
    source = source[:at] + sabotage.new + source[at + len(sabotage.old) :]
    old, new = sabotage.also
    if old and source.count(old) != 1:
        raise LookupError(f"{sabotage.name}: {old!r} is there {source.count(old)} times")
    return source.replace(old, new) if old else source


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
            command = ["-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist",
                       "-c", str(TESTS.parent / "setup.cfg"), "-o", f"pythonpath={folder} {TESTS}", "-o", "addopts=",
                       str(TESTS / sabotage.check)]  # fmt: skip
        else:
            command = [str(TESTS / "simulation.py"), "--ticks", str(ticks), "--seed", str(sabotage.seed), "--quiet"]
            for fixed in sabotage.fix:
                command += ["--fix", fixed]
        run = subprocess.run(
            [sys.executable, *command], env=environ, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170,
        )  # fmt: skip
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
    for sabotage in chosen:
        changed(sabotage, source)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda sabotage: tried(sabotage, source), chosen))
    width = max(len(result.sabotage.name) for result in results)
    for name, caught, seconds in ((r.sabotage.name, r.caught, r.seconds) for r in results):
        print(f"{name:{width}} -> {caught or 'SURVIVED'} ({seconds:.1f} s)")
    print(f"{sum(bool(r.caught) for r in results)} of {len(results)} caught")
    return results


def main(arguments: Optional[Sequence[str]] = None) -> int:
    results = run_all(sys.argv[1:] if arguments is None else arguments)
    return 0 if all(result.caught for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
