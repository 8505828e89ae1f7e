"""The shape of the project: one file, its copies, and a README whose blocks and files are true."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import ftpcoord

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
SITE = ROOT / "tests" / "site"  # what the README leads to
REFERENCE = (SITE / "settings.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "ftpcoord.py").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def section(text: str, title: str) -> str:
    """What stands under a heading, down to the next one of its rank."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of its tables, without their heads."""
    lines = text.splitlines()
    rule = re.compile(r"\|[-|]+\|")
    heads = {at for at, line in enumerate(lines[1:]) if rule.fullmatch(line)}
    return [
        [cell.strip() for cell in line.strip()[1:-1].split("|")]
        for at, line in enumerate(lines)
        if line.startswith("|") and at not in heads and not rule.fullmatch(line)
    ]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_schema_sql_is_the_schema_in_the_module() -> None:
    assert (ROOT / "schema.sql").read_text(encoding="utf-8") == ftpcoord.SCHEMA


def test_nothing_but_the_agreed_files_is_at_the_top_level() -> None:
    allowed = {"ftpcoord.py", "schema.sql", "setup.cfg", "pyproject.toml", "README.md", "tests"}
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= allowed
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8").startswith("[build-system]\n")


BANNER = re.compile(r"^# -{117}\n# (.*)\n# -{117}$", re.MULTILINE)


def sections() -> dict[str, str]:
    """number -> text, of the module; "" is what stands before the first one."""
    head, *parts = BANNER.split(SOURCE)
    return {"": head, **{title.split()[0]: text for title, text in zip(parts[::2], parts[1::2])}}


def names(text: str) -> set[str]:
    """What it defines at its outermost level."""
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def uses(text: str) -> set[str]:
    """The names that it looks up and does not bind itself: variables, arguments, inner functions."""
    nodes = list(ast.walk(ast.parse(text)))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {
        part.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef)
    }
    return {node.id for node in nodes if isinstance(node, ast.Name)} - bound


def test_sections_stand_in_the_order_in_which_they_are_to_be_read() -> None:
    titles = [title.split(":")[0].split(" (")[0].split(",")[0] for title in BANNER.findall(SOURCE)]
    assert titles == [
        "I.1 Errors",
        "I.2 Timing",
        "I.3 What is stored",
        "I.4 Election",
        "I.5 Member",
        "I.6 Versions and selection",
        "I.7 Ledger",
        "I.8 Delivery",
        "I.9 Poller",
        "I.10 What the poller leans on",
        "II.1 Databases",
        "II.2 File servers",
        "II.3 Listings",
        "II.4 FTP and FTPS",
        "II.5 SFTP",
        "II.6 Names",
        "II.7 Handlers",
        "III.1 Settings",
        "III.2 Logging",
        "III.3 Schedules",
        "III.4 Listeners and coordinators",
        "III.5 Status",
        "III.6 Command line",
    ]


def test_what_an_auditor_reads_does_not_grow() -> None:
    words = {number: len(text.split()) for number, text in sections().items()}
    assert sum(words[number] for number in ["", *(f"I.{count}" for count in range(1, 10))]) <= 10_900
    assert sum(words.values()) <= 60_370


def test_the_promises_know_the_rest_by_its_interfaces_and_the_tongues_know_no_lease() -> None:
    parts = sections()
    first = "".join(text for number, text in parts.items() if number.startswith("I."))
    later = {number: names(text) for number, text in parts.items() if number.startswith(("II.", "III."))}
    # What is left: an interface of each room, and words for people.
    known = {
        "Database",
        "open_database",
        "FileServer",
        "Habits",
        "Job",
        "new_server",
        "Patterns",
        "MoveTargets",
        "Companions",
        "Order",
    }
    known |= {"File", "Command", "Config", "Stats", "Backlog", "Pulse", "Route"}
    words = {
        "read_seals",
        "call_handler",
        "event",
        "reason",
        "printable",
        "utc_second",
        "shortened",
        "sha256_text",
        "duration",
        "split_path",
        "is_plain_name",
        "may_tell_of",
        "repeats",
        "Above",
    }
    used = uses(first) & set().union(*later.values())
    assert {name for name in used if not name.isupper()} <= known | words
    promised = {"Lease", "Ledger", "Election", "Member", "Poller", "Selector"}
    for number in ("II.1", "II.2", "II.3", "II.4", "II.5"):
        assert not uses(parts[number]) & promised, number
    for number in ("II.2", "II.3", "II.4", "II.5"):
        assert not uses(parts[number]) & {"Row", "Change", "Fence", "View"}, number
    assert not re.search(r"member\.(ask|hand_over|stop|cut)\w*\(", parts["III.5"]), "status decides nothing"


def test_the_module_depends_on_the_standard_library_until_a_driver_is_needed() -> None:
    allowed = set(sys.stdlib_module_names) if sys.version_info >= (3, 10) else None
    if allowed is None:
        pytest.skip("Python 3.9 does not list its modules")
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert imported <= allowed
    probe = "import sys, ftpcoord; print([m for m in ('pg8000', 'pymysql', 'paramiko') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_setting_stands_once_in_the_reference_and_what_most_people_set_in_the_readme() -> None:
    shown = re.findall(r"`([a-z_]+)`", " ".join(row[0] for row in rows(section(REFERENCE, "All settings"))))
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(ftpcoord.Config))
    often = re.findall(r"`([a-z_]+)`", " ".join(row[0] for row in rows(section(README, "Settings"))))
    assert len(often) > 30 and len(set(often)) == len(often) and set(often) <= set(shown)


def test_the_defaults_and_bounds_of_the_readme_are_those_of_the_module() -> None:
    words = {
        "": ("", None),
        "–": ("", None),
        "yes": (True,),
        "no": (False,),
        "on": (True,),
        "off": (False,),
        "required": ("",),
    }
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ftpcoord.Config)}
    for names, shown, _ in rows(section(README, "Settings")) + rows(section(REFERENCE, "All settings")):
        each = re.findall(r"`([a-z_]+)`", names)
        texts = shown.split(", ") if len(each) > 1 and shown else [shown] * len(each)
        assert len(texts) == len(each), names
        for name, text in zip(each, texts):
            text = text.strip("`")
            if text not in ("system", "hostname:pid") and not text.startswith(("verify ", "scheme:")):
                assert defaults[name] in words.get(text, ()) or f"{defaults[name]}" in (text, f"{text}.0"), name
    timing = ftpcoord.Timing(defaults["heartbeat_frequency"], defaults["liveness_check_interval"])
    overlap = timing.stale_after - timing.margin - timing.heartbeat - timing.call_timeout
    beside = [(SITE / name).read_text(encoding="utf-8") for name in ("security.md", "limits.md")]
    for told in (
        f"S is {timing.stale_after:g} s, m {timing.margin:g} s",
        f"S - m - H - T ({overlap:g} s)",
        f"answers for {ftpcoord.NAMES_SERVE:g} s",
        f"{ftpcoord.MAX_ENTRIES:,} files",
        f"{ftpcoord.MAX_FOLDERS:,} folders",
        f"{ftpcoord.MAX_LISTING >> 20} MiB of listing",
        f"packet in {ftpcoord.LARGEST_PACKET >> 10} KiB",
    ):
        assert told in README + "".join(beside)


def test_every_event_is_listed() -> None:
    listed = section(REFERENCE, "Log and events")
    contract = [
        "starting",
        "ready",
        "elected",
        "standby",
        "lost",
        "released",
        "database_down",
        "database_up",
        "server_down",
        "server_up",
        "polled",
        "file_done",
        "file_failed",
        "file_quarantined",
        "file_refused",
        "duplicate_member",
        "stopped",
    ]
    for name in contract:
        assert name in listed
        assert f'"{name}"' in SOURCE or name == "file_failed"
    calls = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Call)]
    places = {"event": 0, "self._tell": 0, "self._say": 0, "Failure": 0}  # of the name among the arguments
    told = [word for call in calls for word in call.args[places.get(ast.unparse(call.func), 99) :][:1]]
    texts = [word.value for word in told if isinstance(word, ast.Constant)]
    said = {text for text in texts if isinstance(text, str) and re.fullmatch("[a-z_]+", text)}
    words = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([a-z_\s]+)`", listed))))
    assert said == words, "every event has its place in the list, and no other"


def test_what_notify_tells_is_said_of_a_group_so_that_no_other_listener_of_the_process_tells_it() -> None:
    calls = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Call) and node.args]
    said = {
        (call.args[0].value, call.lineno): [word.arg or ast.unparse(word.value) for word in call.keywords]
        for call in calls
        if ast.unparse(call.func) == "event" and isinstance(call.args[0], ast.Constant)
    }
    assert len(said) > 30
    for (name, line), words in said.items():
        if name in ftpcoord.NOTIFIED:
            assert {"group", "about"} & set(words), f"{name}, line {line}"
    for found in re.findall(r"\babout = (\{.*?\})", SOURCE):
        assert '"group": ' in found, found


def test_the_readme_has_exactly_two_set_up_commands() -> None:
    assert re.findall(r"python3 tests/\w+\.py", README[: README.index("## Use it")]) == [
        "python3 tests/demo.py",
        "python3 tests/run.py",
    ]
    assert "python3 tests/run.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_settings_beside_the_systemd_unit_are_accepted(tmp_path: Path) -> None:
    listeners = (SITE / "ftpcoord.ini").read_text(encoding="utf-8")
    unit = (SITE / "ftpcoord.service").read_text(encoding="utf-8")
    credentials = re.findall(r"_?(?:file|key) = /run/credentials/ftpcoord.service/(.*)", listeners)
    assert credentials and set(credentials) == set(re.findall(r"LoadCredential=([^:]*):", unit))
    password = tmp_path / "password"
    password.write_text("secret\n", encoding="utf-8")
    path = tmp_path / "ftpcoord.ini"
    path.write_text(re.sub(r"(_file = ).*", rf"\g<1>{password}", listeners), encoding="utf-8")
    configs = ftpcoord.Config.from_file(str(path))
    assert [config.target.scheme for config in configs] == ["sftp", "ftpes"]


def test_the_systemd_unit_is_verified_and_the_readme_shows_a_part_of_it(tmp_path: Path) -> None:
    unit = (SITE / "ftpcoord.service").read_text(encoding="utf-8")
    (shown,) = blocks("ini")
    lines = iter(unit.splitlines())
    assert "Type=notify" in shown and all(line in lines for line in shown.splitlines()), "the same, in its order"
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit)
    assert parser["Service"]["Type"] == "notify"
    assert parser["Service"]["CapabilityBoundingSet"] == "" and parser["Service"]["MemoryMax"]
    # A stop may take drain_timeout, the grace of a command, and a few database calls.
    assert int(parser["Service"]["TimeoutStopSec"]) > 30 + 5 + 3 * 5
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there")
    path = tmp_path / "ftpcoord.service"
    path.write_text(unit.replace("/usr/bin/python3", sys.executable), encoding="utf-8")
    ran = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    complaints = [line for line in ran.stderr.splitlines() if "ftpcoord.service" in line]
    assert not complaints


def is_part(part: Any, whole: Any) -> bool:
    """Whether all of it stands in the whole; lists in any order."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and is_part(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(is_part(one, other) for other in whole) for one in part)
    return bool(part == whole)


def test_the_kubernetes_deployment_fits_the_settings_and_the_readme_shows_a_part_of_it() -> None:
    manifests = list(yaml.safe_load_all((SITE / "kubernetes.yaml").read_text(encoding="utf-8")))
    deployment, policy = sorted(manifests, key=lambda loaded: str(loaded["kind"]))
    (shown,) = map(yaml.safe_load, blocks("yaml"))
    assert is_part(shown, deployment) and not is_part({"spec": {"replicas": 1}}, deployment)
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    rights = pod["securityContext"]
    assert rights["runAsNonRoot"] and rights["seccompProfile"]["type"] == "RuntimeDefault"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"] and pod["volumes"][1]["emptyDir"]["sizeLimit"]
    assert policy["spec"]["podSelector"] == deployment["spec"]["selector"]
    environ = {item["name"]: item.get("value", "pod-1") for item in container["env"]}
    files = {name: value for name, value in environ.items() if name.endswith("_FILE")}
    assert all(value.startswith(container["volumeMounts"][0]["mountPath"]) for value in files.values())
    config = ftpcoord.Config.from_env({k: v for k, v in environ.items() if k not in files})
    assert pod["terminationGracePeriodSeconds"] > config.drain_timeout + 3 * 5
    assert config.http_address()[1] == container["ports"][0]["containerPort"]


def test_the_alert_rules_name_metrics_that_exist_and_each_has_its_place_in_the_runbook() -> None:
    rules = yaml.safe_load((SITE / "alerts.yaml").read_text(encoding="utf-8"))
    runbook = section(README, "Runbook")
    for rule in rules["groups"][0]["rules"]:
        assert f"`{rule['alert']}`" in runbook, "whoever is woken by it finds what to do"
        for metric in re.findall(r"ftpcoord_(\w+)", rule["expr"]):
            assert re.search(rf'\(\s*"{metric}",\s*"[A-Z1]', SOURCE) and "_duration_" not in metric, metric


# What the documentation of Ballerina's module names of each configuration.
BALLERINA = {
    "ftp:ListenerConfiguration": """
        protocol host port auth.credentials username password auth.privateKey path auth.secureSocket key cert mode
        dataChannelProtection verifyHostname auth.preferredMethods userDirIsRoot connectTimeout socketConfig
        ftpDataTimeout ftpSocketTimeout sftpSessionTimeout proxy type command fileTransferMode sftpCompression
        sftpSshKnownHosts laxDataBinding csvFailSafe retryConfig count interval backOffFactor maxWaitInterval
        circuitBreaker pollingInterval coordination memberId coordinationGroup heartbeatFrequency livenessCheckInterval
        coordination.databaseConfig user database fileNamePattern fileAgeFilter fileDependencyConditions""",
    "ftp:ServiceConfig": """
        path fileNamePattern fileAgeFilter minAge maxAge ageCalculationMode fileDependencyConditions targetPattern
        requiredFiles matchingMode requiredFileCount""",
    "ftp:FunctionConfig": "fileNamePattern afterProcess afterError DELETE moveTo preserveSubDirs",
    "functions of a service": """
        onFile onFileText onFileJson onFileXml onFileCsv onError onFileDelete onFileDeleted onFileChange ftp:Caller""",
}


def test_each_setting_of_ballerinas_listener_has_its_place() -> None:
    text = (SITE / "ballerina.md").read_text(encoding="utf-8")
    parts, ours = dict.fromkeys(BALLERINA, ""), set()
    for theirs, answer in rows(text):
        title = theirs.strip("*`")
        if title in parts:
            current = title
        else:
            assert answer, theirs
            parts[current] += theirs + (answer if "`command`" in answer else "")
            ours |= set(re.findall(r"`([a-z]+_[a-z_]+)", answer))
    for title, wanted in BALLERINA.items():
        named = set(re.findall(r"[\w:]+(?:\.\w+)*", parts[title]))
        assert set(wanted.split()) <= named | {name.split(".")[-1] for name in named}, title
    assert ours - {"file_quarantined"} <= {field.name for field in dataclasses.fields(ftpcoord.Config)}


def test_the_tests_that_are_named_exist() -> None:
    everything = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README + REFERENCE + EVIDENCE):
        assert f"def {name}(" in everything or (ROOT / "tests" / f"{name}.py").exists(), name


def test_each_promise_rule_and_threat_has_its_tests() -> None:
    titles = (
        "Promises and their tests",
        "Rules behind the promises and their tests",
        "Threats and their tests",
        "What it survives",
    )
    promises, rules, threats, faults = (rows(section(EVIDENCE, title)) for title in titles)
    assert len(rules) >= 18 and len(faults) >= 30
    for row in promises + rules + threats + faults:
        assert re.search(r"`test_\w+`", row[-1]), row
    numbers = re.findall(r"^(\d)\. \*\*", section(README, "What is guaranteed, and what is not"), re.MULTILINE)
    assert numbers == list("123456") == [row[0][0] for row in promises if row[0][0].isdigit()]
    assert [row[0] for row in threats] == [row[0] for row in rows((SITE / "security.md").read_text(encoding="utf-8"))]


def test_the_readme_stays_short_and_its_rows_can_be_read() -> None:
    assert len(README.splitlines()) <= 299 and len(README.split()) <= 4_572
    for text in (README, *((SITE / f"{name}.md").read_text("utf-8") for name in ("settings", "limits", "ballerina"))):
        assert [line for line in text.splitlines() if len(line) > 400] == []


def test_the_readme_leads_to_all_that_lies_beside_it() -> None:
    for folder in ("site", "recipes"):
        for name in (name for name in tracked() if name.startswith(f"tests/{folder}/")):
            assert f"({name})" in README or f"({name}#" in README or f"({name[len('tests/site/') :]})" in REFERENCE, (
                name
            )


def test_figures_of_the_comparison_are_those_of_the_evidence() -> None:
    evidence = section(EVIDENCE, "Beside the systems that do the same job")
    measured = re.sub(r"\]\(.*?\)", "", section(README, "How it compares").partition("Measured ")[2])
    figure = re.compile(r"\d(?:[\d.,]*\d)?")
    assert len(figure.findall(measured)) > 60
    assert set(figure.findall(measured)) <= set(figure.findall(evidence))


def test_the_places_that_the_readmes_lead_to_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "tests" / "README.md", *SITE.glob("*.md")):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            place = page.parent / path if path else page
            assert place.exists(), target
            titles = re.findall(r"^##+ (.*)", place.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in anchors, target


def test_python_blocks_of_the_readme_are_python() -> None:
    for block in blocks("python"):
        ast.parse(block)


@pytest.mark.skipif(os.name != "posix", reason="shell")
def test_shell_blocks_of_the_readme_are_settings_that_are_accepted() -> None:
    (block,) = [block for block in blocks("sh") if "FTPCOORD_URL" in block]
    environ = dict(re.findall(r"^export (\w+)='?([^'\n]*)'?$", block, re.MULTILINE))
    environ.pop("FTPCOORD_DATABASE_PASSWORD_FILE")
    assert ftpcoord.Config.from_env(environ).command() == ["/usr/local/bin/import-payment", "{file}"]
