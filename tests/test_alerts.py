"""What is alerted on: Prometheus' own tool reads the metrics and the rules, and the rules fire when they are to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setup_env
import yaml
from hostile import FtpHost, Site
from members import ftpcoord

RULES = Path(__file__).resolve().parent / "site" / "alerts.yaml"


@pytest.fixture(scope="module")
def promtool() -> str:
    program = setup_env.find_program("promtool")
    if program is None:
        message = "promtool: it is not installed (Debian: apt-get install prometheus)"
        if os.environ.get("FTPCOORD_REQUIRE_ALL") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return program


def check(promtool: str, *words: str, stdin: str = "") -> str:
    done = subprocess.run([promtool, *words], input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_accepts_the_metrics_of_an_active_member(promtool: str, tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1", "b": b"22"}) as host, Site(tmp_path, host.settings) as site:
        site.arrive({"a": b"1", "b": b"22"})
        site.polls(1)
        told = ftpcoord.metrics([(site.listener, ftpcoord.Survey(site.listener.config))])
    assert "ftpcoord_backlog_files{" in told and "ftpcoord_paused{" in told and "ftpcoord_not_now_files{" in told
    assert check(promtool, "check", "metrics", stdin=told) == ""


def test_promtool_accepts_the_alert_rules(promtool: str) -> None:
    number = len(yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"])
    assert f"SUCCESS: {number} rules found" in check(promtool, "check", "rules", str(RULES))


# The series of one group over an hour and more, a value a minute, and what is alerted at its end.
WELL = {
    'ftpcoord_role{group="g",member="a",role="active"}': "1x120",
    'ftpcoord_role{group="g",member="b",role="active"}': "0x120",
    'ftpcoord_database_up{group="g",member="a"}': "1x120",
    'ftpcoord_last_poll_timestamp_seconds{group="g",member="a"}': "0+60x120",
    'ftpcoord_oldest_waiting_seconds{group="g",member="a"}': "0x120",
    'ftpcoord_paused{group="g",member="a"}': "0x120",
    'ftpcoord_paused{group="g",member="b"}': "0x120",
    'ftpcoord_not_now_files{group="g",member="a"}': "0x120",
    'ftpcoord_not_now_files{group="g",member="b"}': "0x120",
    'ftpcoord_files_total{group="g",member="a",result="quarantined"}': "0x120",
    'ftpcoord_ledger_files{group="g",member="a",state="quarantined"}': "0x120",
    'ftpcoord_start_time_seconds{group="g",member="a"}': "0x120",
    'ftpcoord_start_time_seconds{group="g",member="b"}': "0+60x120",
}
ROLE, OLDEST = (
    'ftpcoord_role{group="g",member="%s",role="active"}',
    'ftpcoord_oldest_waiting_seconds{group="g",member="a"}',
)
PAUSED, POLLED = 'ftpcoord_paused{group="g",member="a"}', 'ftpcoord_last_poll_timestamp_seconds{group="g",member="a"}'
CASES: list[tuple[dict[str, str], set[str]]] = [
    ({}, set()),
    ({ROLE % "a": "0x120"}, {"FtpcoordNobodyActive"}),
    (dict.fromkeys(WELL, "1x60 stale"), {"FtpcoordNobodyActive"}),  # all members are gone, and their metrics
    ({ROLE % "b": "1x120"}, {"FtpcoordTwoActive"}),
    ({'ftpcoord_database_up{group="g",member="a"}': "0x120"}, {"FtpcoordDatabaseDown"}),
    ({POLLED: "60x120"}, {"FtpcoordNoSuccessfulPoll"}),
    ({POLLED: "_x120"}, {"FtpcoordNoSuccessfulPoll"}),  # none since the start
    # The active member and its metrics went away just now, and one that has waited for long takes over: it polls soon.
    (
        {
            **{name: text.replace("x120", "x118 stale") for name, text in WELL.items() if 'member="a"' in name},
            ROLE % "b": "0x118 1x1",
            'ftpcoord_start_time_seconds{group="g",member="b"}': "0x120",
        },
        set(),
    ),
    ({OLDEST: "0+60x120"}, {"FtpcoordWaiting"}),
    ({POLLED: "60x120", OLDEST: "0+60x120", PAUSED: "1x120"}, set()),
    ({'ftpcoord_not_now_files{group="g",member="b"}': "5x120"}, {"FtpcoordNotNow"}),
    ({'ftpcoord_missing_files{group="g",member="a"}': "2x120"}, {"FtpcoordMissing"}),
    ({'ftpcoord_blocked_since_timestamp_seconds{group="g",member="a"}': "60x120"}, {"FtpcoordBlocked"}),
    ({'ftpcoord_files_total{group="g",member="a",result="quarantined"}': "0+1x120"}, {"FtpcoordQuarantine"}),
    # Before the first scrape of a new process, as the file that ended the one before.
    ({'ftpcoord_ledger_files{group="g",member="a",state="quarantined"}': "1x120"}, {"FtpcoordQuarantine"}),
]


@pytest.mark.parametrize(("changes", "alerts"), CASES, ids=[",".join(alerts) or "none" for _, alerts in CASES])
def test_the_alert_rules_fire_when_they_are_to(
    promtool: str, tmp_path: Path, changes: dict[str, str], alerts: set[str]
) -> None:
    named = [one["alert"] for one in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]]
    assert alerts <= set(named)
    judged: list[dict[str, Any]] = []
    for name in named:
        fires = [{"exp_labels": {"group": "g"}}] if name in alerts else []
        judged.append({"eval_time": "120m", "alertname": name, "exp_alerts": fires})
    series = [{"series": name, "values": values} for name, values in {**WELL, **changes}.items()]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": judged}
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [test]}), encoding="utf-8")
    check(promtool, "test", "rules", str(path))
